"""What the compilers make of the kernels, for chips that need not be here: access widths, spills, registers.

The launchers run on meta tensors with the kernel replaced by a recorder, and what they launch is compiled.
"""

import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
import torch

import adacache_triton.kernels  # noqa: F401

from .kernel_views import INTERPRETED

triton = pytest.importorskip("triton", reason="Triton is not installed")
# Compiling for another chip is no public interface: these are the releases whose shape of it was tried.
if triton.__version__.split(".")[:2] not in (["3", "7"], ["3", "8"], ["3", "9"]):
    pytest.skip(f"Triton {triton.__version__} may compile offline otherwise", allow_module_level=True)
if INTERPRETED:
    pytest.skip("the interpreter and the compiler cannot share a process", allow_module_level=True)

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource, compile  # noqa: E402

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
STATS = sys.modules["adacache_triton.kernels.residual_stats"]
REUSE = sys.modules["adacache_triton.kernels.reuse"]

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(shape, dtype=dtype, device="meta")


def stats(new, old, frame_strides=(1,), refresh=True):
    return STATS, "_residual_stats_kernel", lambda: STATS._launch(new, old, frame_strides, refresh)


def reuse(hidden, residual):
    return REUSE, "_reuse_kernel", lambda: REUSE._launch(hidden, residual, torch.empty_like(hidden))


# Open-Sora 1.2 at 720p, 2 s: 15 latent frames of 3600 tokens and 1152 channels, two guidance branches.
FRAME_MAJOR = empty(2, 15, 3600, 1152)
SPATIAL_MAJOR = empty(2, 3600, 15, 1152).transpose(1, 2)  # inside its temporal blocks
TOKENS = empty(2, 15 * 3600, 1152)
CASES = {
    "stats, frame-major": stats(FRAME_MAJOR, FRAME_MAJOR),
    "stats, spatial-major": stats(SPATIAL_MAJOR, FRAME_MAJOR),
    "stats, two frame strides": stats(FRAME_MAJOR, FRAME_MAJOR, (1, 2)),
    "stats, float32": stats(FRAME_MAJOR.float(), FRAME_MAJOR.float()),
    "stats, few tokens": stats(empty(1, 16, 64, 1152), empty(1, 16, 64, 1152)),
    "reuse, contiguous": reuse(TOKENS, TOKENS),
    "reuse, float32 residual": reuse(TOKENS, TOKENS.float()),
    "reuse, token range": reuse(empty(2, 226 + 17550, 3072)[:, 226:], empty(2, 17550, 3072)),
    "reuse, frame range": reuse(empty(2, 3600, 15, 1152)[:, :, 4:8], empty(2, 3600, 15, 1152)[:, :, 8:12]),
}
# With 64, eight programs of 128 threads fit a multiprocessor's registers; with 32, all that it has slots for.
REGISTERS = {case: 64 if case.startswith("stats") else 32 for case in CASES} | {"stats, two frame strides": 112}


class Recorder:
    """Stands in for a kernel and keeps the arguments of its launches."""

    def __init__(self):
        self.launches = []

    def __getitem__(self, grid):
        return lambda *args, **kwargs: self.launches.append((args, kwargs))


def compile_for(target, case):
    module, name, launch = CASES[case]
    kernel, recorder = getattr(module, name), Recorder()
    with patch.object(module, name, recorder), patch.object(module, "WARP", target.warp_size):
        launch()
    ((args, kwargs),) = recorder.launches  # one launch
    num_warps = kwargs.pop("num_warps")
    values = dict(zip(kernel.arg_names, args, strict=False)) | kwargs
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or (special and isinstance(value, int) and value == 1):
            signature[parameter.name], constants[(i,)] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            aligned = value.storage_offset() * value.element_size() % 16 == 0
        else:
            signature[parameter.name] = "i32" if value < 2**31 else "i64"
            aligned = value % 16 == 0
        if special and aligned:
            attributes[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    return compile(source, target=target, options={"num_warps": num_warps})


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("chip", [80, 90, 100])
def test_nvidia(case, chip, tmp_path):
    if not (TOOLS / "nvdisasm").exists():
        pytest.skip("this build of Triton brings no NVIDIA tools")
    compiled = compile_for(GPUTarget("cuda", chip, 32), case)
    cubin = tmp_path / "kernel.cubin"
    cubin.write_bytes(compiled.asm["cubin"])

    def tool(name, *options):
        return subprocess.run([TOOLS / name, *options, cubin], capture_output=True, text=True, check=True).stdout

    usage = tool("cuobjdump", "-res-usage")
    registers, stack = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK"))
    accesses = re.findall(r"\b(?:LDG|STG|LDL|STL|LD|ST)\.[\w.]+", tool("nvdisasm"))
    print(f"{case}, sm_{chip}: {registers} registers,", {a: accesses.count(a) for a in sorted(set(accesses))})
    # The reductions store a float per column and program; everything else goes in 128-bit accesses.
    scalars = {"STG.E"} if case.startswith("stats") else set()
    assert set(accesses) == {"LDG.E.128", "STG.E.128"} | scalars
    assert stack == 0
    assert registers <= REGISTERS[case]
    if case == "reuse, float32 residual":  # rounded to the nearest, which the interpreter does not do
        assert "cvt.rn.bf16" in compiled.asm["ptx"]


@pytest.mark.parametrize("case", CASES)
def test_amd(case):
    assembly = compile_for(GPUTarget("hip", "gfx942", 64), case).asm["amdgcn"]
    loads = set(re.findall(r"\b(?:global|buffer)_load_\w+", assembly))
    print(f"{case}, gfx942: {re.search(r'vgpr_count: *[0-9]+', assembly)[0]},", loads)
    assert loads <= {"global_load_dwordx4", "buffer_load_dwordx4"} and loads
    assert re.search(r"\.vgpr_spill_count: *0\b", assembly)
