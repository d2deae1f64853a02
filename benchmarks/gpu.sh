#!/usr/bin/env bash
# Everything that needs a CUDA GPU, most valuable first: GPU tests, kernel benchmarks, whether the GPU ever waits for the
# host and what CUDA graphs take (`benchmarks/no_stall.py` says how it is measured), denoising loops at full size, the
# README's tables and pictures, the demo. All but the kernels needs diffusers.
#
#   bash benchmarks/gpu.sh [RESULTS]      default: benchmarks/results/gpu
#
# A call ends within nine minutes. A part that is done leaves a stamp in RESULTS and is not run again: call until it
# says that nothing is left. RESULTS.tar.gz then holds all of it. The torch and the packages are those that the machine
# has (PYTHON names another interpreter); this package is installed beside them, without dependencies. A copy without
# its git history is told its revision by REVISION.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
results=${1:-benchmarks/results/gpu}
python=${PYTHON:-python3}
export REVISION=${REVISION:-$(git describe --always --dirty --exclude='*' 2>/dev/null || true)}
mkdir -p "$results"
left=0

"$python" -m pip install -q --no-deps --no-build-isolation -e .
"$python" - >"$results/environment.json" <<'PY'
import json, os, platform, subprocess
import torch, triton
smi = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
print(json.dumps({
    "gpu": subprocess.run(smi, capture_output=True, text=True, check=True).stdout.strip(),
    "python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__,
    "cuda": torch.version.cuda, "revision": os.environ["REVISION"] or None,
}, indent=2))
PY

part() { # part NAME SECONDS COMMAND...: run once, with its own time limit, and go on if it fails
  local name=$1 seconds=$2 time=$((510 - SECONDS)); shift 2
  [ -e "$results/$name.done" ] && return
  if [ "$time" -lt $((seconds / 2)) ]; then left=$((left + 1)); return; fi
  if timeout "$((seconds < time ? seconds : time))" "$@" >"$results/$name.log" 2>&1; then
    touch "$results/$name.done"; echo "$name: done after $SECONDS s"
  else
    local status=$?; left=$((left + 1))
    if [ "$status" = 3 ]; then echo "$name: the rest is for the next call"; return; fi
    echo "$name: FAILED with $status"; tail -n 15 "$results/$name.log"
  fi
}

kernels() { # kernels NAME SECONDS RUNS: those that a pytest expression chooses
  part "kernels-$1" "$2" "$python" -m pytest benchmarks/test_kernels.py --benchmark-only -k "$3" --benchmark-json "$results/kernels-$1.json"
}

stall() { # stall WHAT SECONDS OPTIONS...: a measurement of benchmarks/no_stall.py; all rows go into one file
  local what=$1 seconds=$2; shift 2
  part "no-stall-$what" "$seconds" "$python" benchmarks/no_stall.py "$what" --out "$results/no_stall.csv" "$@"
}

row() { # row NAME SECONDS [--compiled]: a denoising loop at full size; what was timed is not timed again
  local name=$1 seconds=$2 time=$((510 - SECONDS)); shift 2
  part "row-$name${1-}" "$seconds" "$python" benchmarks/end_to_end.py "$name" --out "$results/end_to_end" \
    --loop-seconds 40 --seconds "$(((seconds < time ? seconds : time) - 20))" "$@"
}

compiled='(torch.compile or max-autotune)'
part tests 150 "$python" -m pytest tests/test_gpu.py
part step-tests 300 "$python" -m pytest tests/test_gpu_steps.py
kernels plain 240 "not $compiled"
row open-sora-720p 240
stall trace 150 --traces "$results"
stall busy 240
part cuda-graphs 150 "$python" examples/cuda_graphs.py
stall graphs 400
row open-sora-480p 150
row wan-1.3b 360
row latte 150
row open-sora-plan 180
row cogvideox-2b 240
row ltx 180
row open-sora-720p 300 --compiled
for operation in residual_stats gated_residual reuse keep relative_distance; do
  kernels "$operation" 200 "$operation and $compiled"
done
part kernel-tests 300 "$python" -m pytest tests/kernels \
  --ignore tests/kernels/test_compile.py --ignore tests/kernels/test_interpreter.py
row hunyuan-720p 490
row wan-1.3b 490 --compiled
row ltx 360 --compiled
part demo 120 "$python" -c "import sys; from adacache_triton.cli import main; sys.exit(main())" generate --device cuda --out "$results/demo"

if [ -s "$results/kernels-plain.json" ]; then "$python" benchmarks/update_readme.py "$results"/kernels-*.json || true; fi
if [ -d "$results/end_to_end" ]; then "$python" benchmarks/update_readme.py "$results"/end_to_end/*.jsonl || true; fi
if [ -s "$results/no_stall.csv" ]; then cp "$results/no_stall.csv" benchmarks/results/; fi
tar -czf "$results.tar.gz" -C "$results" .
[ "$left" = 0 ] && echo "nothing is left" || echo "parts left: $left; call again"
