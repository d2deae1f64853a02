"""Write docs/kernels.md: `python benchmarks/kernel_table.py`.

What each operation moves, by count, and what it takes of each chip, as compiled. The numbers are of the Triton that
constraints.txt pins; other releases allot registers differently.
"""

from __future__ import annotations

import re
from pathlib import Path

import offline
import triton
from kernel_cases import BANDWIDTH, CASES, SHAPES, Case, Moved, traffic

ROOT = Path(__file__).resolve().parent.parent
PATH = ROOT / "docs/kernels.md"
PINNED = re.search(r"^triton==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)[1]
HEAD = f"""# The kernels by number

Written by `python benchmarks/kernel_table.py` with Triton {PINNED}: counted and compiled, not measured. Formulas,
arguments and errors are in the docstrings of `adacache_triton.kernels`.

- **reads, writes**: tensors that the kernels load and store, once unless a factor stands before them. What is read
  again comes from a cache: a gate that all tokens share, an earlier frame at strides over 1. The tests count these
  bytes in Triton's interpreter (`tests/kernels/test_bytes.py`). Partial sums, a float a column and program, are left
  out.
- **floor**: the bytes of each tensor once, over {BANDWIDTH / 1e12:g} TB/s, an H200's by its data sheet. A copy reaches
  about nine tenths of that.
- **launches**: kernels, and operations of PyTorch after them, which add the partial sums.
- **a chip's column**: registers of a thread (128-bit loads + 128-bit stores + narrower accesses). The narrower ones are
  single numbers: partial sums, weights, the few that `decide` takes. Nothing spills, or it says so. Registers of gfx942
  are vector registers. The tests hold these to promises (`tests/kernels/test_compile.py`).

bfloat16, gates per sample and new tensors for results, unless a row says otherwise; Wan's gate is float32. Shapes:

| | B | T | S | C |
|---|--:|--:|--:|--:|
"""


def document() -> str:
    parts = [HEAD + "\n".join(_row((model, *map(str, shape))) for model, shape in SHAPES.items())]
    offline.compile_ahead(CASES)
    for operation in dict.fromkeys(case.operation for case in CASES):
        columns = ("", "reads", "writes", "MB", "floor us", "launches", *offline.CHIPS)
        parts += [f"\n## {operation}\n", _row(columns), f"|---|---|---|{'--:|' * (len(columns) - 3)}"]
        parts += [_row(_cells(case)) for case in CASES if case.operation == operation]
    return "\n".join(parts) + "\n"


def _cells(case: Case) -> list[str]:
    call = case.bind(offline.absent)
    started = {chip: offline.launched(call, chip) for chip in offline.CHIPS}
    parameters = started["sm_90"].kernels[0][1]
    moved = traffic(call, parameters.get("SPAN"))
    floor = sum(m.floor for m in moved.values())
    return [
        ", ".join(filter(None, (case.model, case.what))),
        _tensors(moved, "read"),
        _tensors(moved, "written"),
        f"{floor / 1e6:.1f}",
        f"{1e6 * floor / BANDWIDTH:.1f}",
        str(len(started["sm_90"])),
        *(_resources(chip, launched) for chip, launched in started.items()),
    ]


def _tensors(moved: dict[str, Moved], how: str) -> str:
    times = {name: round(getattr(m, how) / m.size, 2) for name, m in moved.items()}
    return ", ".join(name if factor == 1 else f"{factor:g} x {name}" for name, factor in times.items() if factor)


def _resources(chip: str, launched: offline.Launched) -> str:
    (kernel,) = launched.kernels
    r = offline.resources(chip, *kernel)
    wide = [sum(n for name, n in r.accesses.items() if re.search(pattern, name)) for pattern in WIDE]
    spilled = f", {r.spilled} spilled" if r.spilled else ""
    return f"{r.registers} ({' + '.join(map(str, (*wide, r.accesses.total() - sum(wide))))}){spilled}"


def _row(cells) -> str:
    return f"| {' | '.join(cells)} |"


WIDE = r"LDG\S*\.128|load_dwordx4", r"STG\S*\.128|store_dwordx4"


if __name__ == "__main__":
    if triton.__version__ != PINNED:
        raise SystemExit(f"Triton {triton.__version__} is installed, constraints.txt pins {PINNED}")
    PATH.write_text(document())
