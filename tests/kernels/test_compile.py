"""What the compilers make of the kernels, for chips that need not be here: access widths, spills, registers.

Every operation at the shapes of real models (`benchmarks/kernel_cases.py`), on every chip. `docs/kernels.md` has the
numbers.
"""

import re
from functools import partial

import pytest
import torch

from adacache_triton.kernels.residual_stats import residual_stats

from .kernel_views import INTERPRETED

triton = pytest.importorskip("triton", reason="Triton is not installed")
if INTERPRETED:
    pytest.skip("the interpreter and the compiler cannot share a process", allow_module_level=True)

import kernel_table  # noqa: E402
import offline  # noqa: E402
from kernel_cases import CASES, MODELS  # noqa: E402

if not offline.TRIED:
    pytest.skip("this Triton may compile for absent chips otherwise", allow_module_level=True)
if not (offline.TOOLS / "nvdisasm").exists():
    pytest.skip("this build of Triton brings no NVIDIA tools", allow_module_level=True)

pytestmark = pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")

# A thread's. With 64, eight programs of 128 threads fit a multiprocessor, with 32 all it has slots for. For sm_100 the
# compiler takes some more, with which seven fit; on gfx942 128 vector registers leave four waves on each SIMD.
REGISTERS = {
    "residual_stats": 64,
    "gated_residual": 64,
    "reuse": 32,
    "keep": 64,
    "relative_distance": 48,
    "decide": 64,  # one program
}
MORE = {
    "gated_residual, Open-Sora 720p, strides 1 and 2": 80,
    "reuse, Open-Sora 720p, three, weights per sample": 48,
} | dict.fromkeys((f"reuse, {model}, two, weights per sample" for model in MODELS), 40)
# What an operation moves in single numbers: a float a column and program, or a few weights a program reads.
SCALARS = {"residual_stats": 7, "gated_residual": 7, "keep": 6, "reuse": 3, "relative_distance": 2}
NARROW = {"LDG.E", "STG.E", "global_load_dword", "global_store_dword"}
WIDE = {"LDG.E.128", "STG.E.128", "global_load_dwordx4", "global_store_dwordx4", "buffer_load_dwordx4"}


@pytest.fixture(scope="module", params=offline.CHIPS)
def chip(request):
    offline.compile_ahead(CASES, [request.param])
    return request.param


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernel_for(chip, case):
    (launch,) = offline.launched(case.bind(offline.absent), chip).kernels
    resources = offline.resources(chip, *launch)
    accesses = resources.accesses
    print(f"{chip}, {case}: {resources.registers} registers, {dict(accesses)}")
    promised = MORE.get(str(case), REGISTERS[case.operation])
    assert resources.spilled == 0
    assert resources.registers <= {"sm_100": promised + 8, "gfx942": 128}.get(chip, promised)
    if case.operation == "decide":  # a few hundred bytes
        return
    assert set(accesses) <= WIDE | NARROW and set(accesses) & WIDE
    assert sum(accesses[name] for name in NARROW) <= SCALARS[case.operation]


# From float32 to bfloat16. (A bfloat16 sum of two bfloat16 numbers becomes one instruction: the bits are the same.)
ROUNDED = (
    "residual_stats, Open-Sora 720p, float32, kept bfloat16",
    "gated_residual, Wan 14B 720p",
    "reuse, Wan 14B 720p, kept float32",
    "keep, Wan 14B 720p, depth 2, float32, kept bfloat16",
)


@pytest.mark.parametrize("case", ROUNDED)
def test_bfloat16_is_rounded_to_the_nearest(case):
    """Which the interpreter does not do."""
    bind = {str(case): case.bind for case in CASES}[case]
    (launch,) = offline.launched(bind(offline.absent)).kernels
    roundings = re.findall(r"cvt\.(\w+)\.bf16(?:x2)?\.f32", offline.resources("sm_90", *launch).assembly)
    assert set(roundings) == {"rn"}


def test_spills_and_narrow_accesses_would_be_seen():
    new, old = (offline.absent(2, 15, 3600, 1152, dtype=torch.bfloat16) for _ in range(2))
    (kernel, parameters, options) = offline.launched(partial(residual_stats, new, old)).kernels[0]
    assert offline.resources("sm_90", kernel, parameters, options | {"maxnreg": 24}).spilled > 0
    odd = offline.absent(2 * 15 * 3600 * 1152 + 1, dtype=torch.bfloat16)[1:].view_as(new)
    (launch,) = offline.launched(partial(residual_stats, odd, old)).kernels
    assert offline.resources("sm_90", *launch).accesses.keys() - WIDE - NARROW


def test_the_documentation_is_what_the_command_writes():
    if triton.__version__ != kernel_table.PINNED:
        pytest.skip(f"docs/kernels.md is of Triton {kernel_table.PINNED}, this is {triton.__version__}")
    assert kernel_table.PATH.read_text() == kernel_table.document()
