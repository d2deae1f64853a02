#!/usr/bin/env bash
# Everything that needs a CUDA GPU, most valuable first: the GPU tests, the kernel benchmarks, the demo.
#
#   bash benchmarks/gpu.sh [RESULTS]      default: benchmarks/results/gpu-<date>
#
# A part that is done leaves a stamp in RESULTS and is not run again. It uses the torch and the packages that the
# machine has (set PYTHON for another interpreter) and installs this package beside them, without dependencies.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
results=${1:-benchmarks/results/gpu-$(date +%F)}
python=${PYTHON:-python3}
mkdir -p "$results"

"$python" -m pip install -q --no-deps --no-build-isolation -e .
"$python" - >"$results/environment.json" <<'PY'
import json, platform, subprocess
import torch, triton
smi = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
revision = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip()
print(json.dumps({
    "gpu": subprocess.run(smi, capture_output=True, text=True, check=True).stdout.strip(),
    "python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__,
    "cuda": torch.version.cuda, "revision": revision or None,
}, indent=2))
PY

part() { # part NAME SECONDS COMMAND...: run once, with its own time limit, and go on if it fails
  local name=$1 seconds=$2; shift 2
  [ -e "$results/$name.done" ] && return
  if timeout "$seconds" "$@" >"$results/$name.log" 2>&1; then touch "$results/$name.done"; echo "$name: done"
  else echo "$name: FAILED with $?"; tail -n 15 "$results/$name.log"; fi
}

part tests 200 "$python" -m pytest tests -m gpu
part kernels 200 "$python" -m pytest benchmarks --benchmark-only --benchmark-json "$results/kernels.json"
part demo 120 "$python" -c "import sys; from adacache_triton.cli import main; sys.exit(main())" generate --device cuda --out "$results/demo"
