"""What the compilers make of the kernels, for chips that need not be here: registers, spills, access widths.

A call is made on meta tensors, where the launch of a kernel is recorded instead of run, and what it launches is
compiled. Compiling for another chip is no public interface of Triton: `TRIED` names the releases whose shape of it
was tried.
"""

from __future__ import annotations

import functools
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import torch
import triton
from kernel_cases import Case
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile
from triton.runtime.jit import JITFunction

TRIED = triton.__version__.split(".")[:2] in (["3", "7"], ["3", "8"], ["3", "9"])
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
CHIPS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
ACCESS = re.compile(
    r"\b(?:(?:LDG|STG|LDL|STL|LD|ST|ATOMG?|RED)\b[\w.]*|(?:global|buffer|flat|scratch)_(?:load|store|atomic)_\w+)"
)
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}


def absent(*shape: int, dtype: torch.dtype) -> torch.Tensor:
    """A tensor that is nothing but a shape."""
    return torch.empty(shape, dtype=dtype, device="meta")


@dataclass
class Launched:
    """What a call started: kernels with their arguments, and how many operations of PyTorch beside them."""

    kernels: list[tuple[JITFunction, dict, dict]]  # kernel, values of its parameters, options of the launch
    others: int

    def __len__(self) -> int:
        return len(self.kernels) + self.others


# nvdisasm takes twice as long as the compiler: it runs beside it.
BESIDE = ThreadPoolExecutor(1)


@dataclass(frozen=True)
class Resources:
    """What one kernel takes of a chip."""

    registers: int  # of a thread; on AMD, vector registers
    spilled: int  # bytes of a thread's stack; on AMD, registers
    code: Future  # the instructions, as text
    assembly: str  # PTX or amdgcn

    @functools.cached_property
    def accesses(self) -> Counter:
        """Loads and stores of global and local memory, by instruction."""
        return Counter(ACCESS.findall(self.code.result()))


class _Operations(TorchDispatchMode):
    """Counts what PyTorch computes; views and empty tensors start nothing on a device."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view and "empty" not in func.__name__
        return func(*args, **(kwargs or {}))


def launched(call: Callable, chip: str = "sm_90") -> Launched:
    """What a call on meta tensors would start on a chip."""
    kernels = []

    def record(kernel, *args, grid, warmup, **kwargs):
        parameters = dict(zip(kernel.arg_names, args)) | kwargs
        options = {name: parameters.pop(name) for name in kwargs if name not in kernel.arg_names}
        kernels.append((kernel, parameters, options))

    stand_ins = {
        "WARP": CHIPS[chip].warp_size,
        "traced": lambda tensor: False,
        "pick_backend": lambda *args: "triton",
    }
    with ExitStack() as stack:
        stack.enter_context(patch.object(JITFunction, "run", record))
        for path, module in list(sys.modules.items()):
            if path.startswith("adacache_triton.kernels.") and not path.endswith("._checks"):
                for name in stand_ins.keys() & vars(module).keys():
                    stack.enter_context(patch.object(module, name, stand_ins[name]))
        operations = stack.enter_context(_Operations())
        call()
    return Launched(kernels, operations.count)


def resources(chip: str, kernel: JITFunction, parameters: dict, options: dict) -> Resources:
    """Compile a recorded launch; one that differs in no constant, type or alignment is not compiled again."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = parameters[parameter.name]
        special = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (special and isinstance(value, int) and value == 1):
            signature[parameter.name], constants[(i,)] = "constexpr", value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = TYPES[value.dtype]
            aligned = value.storage_offset() * value.element_size() % 16 == 0
        elif isinstance(value, int):
            signature[parameter.name] = "i32" if value < 2**31 else "i64"
            aligned = value % 16 == 0
        else:
            signature[parameter.name], aligned = "fp32", False
        if special and aligned:
            attributes[(i,)] = (("tt.divisibility", 16),)
    items = (tuple(mapping.items()) for mapping in (signature, constants, attributes, options))
    return _compiled(chip, kernel, *items)


def compile_ahead(cases: Iterable[Case], chips: Iterable[str] = CHIPS) -> None:
    """Compile every case for the chips: whoever asks for the resources then waits for little."""
    for chip in chips:
        for case in cases:
            for launch in launched(case.bind(absent), chip).kernels:
                resources(chip, *launch)


@functools.cache
def _compiled(chip, kernel, signature, constants, attributes, options) -> Resources:
    attributes = {place: [list(pair) for pair in pairs] for place, pairs in attributes}
    source = ASTSource(kernel, dict(signature), dict(constants), attributes)
    assembled = compile(source, target=CHIPS[chip], options=dict(options)).asm
    if "amdgcn" in assembled:
        text = assembled["amdgcn"]
        registers, spilled = (int(re.search(rf"\.vgpr_{what}: *(\d+)", text)[1]) for what in ("count", "spill_count"))
        return Resources(registers, spilled, BESIDE.submit(str, text), text)
    usage = _tool(assembled["cubin"], "cuobjdump", "-res-usage")
    registers, spilled = (int(re.search(rf"{what}:(\d+)", usage)[1]) for what in ("REG", "STACK"))
    return Resources(registers, spilled, BESIDE.submit(_tool, assembled["cubin"], "nvdisasm", "-ndf"), assembled["ptx"])


def _tool(cubin: bytes, name: str, *options: str) -> str:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([TOOLS / name, *options, file.name], capture_output=True, text=True, check=True).stdout
