"""The Triton kernels on a CPU: the tests of the operations again, in a process where Triton interprets."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from .kernel_views import INTERPRETED

HERE = Path(__file__).parent
OPERATIONS = ("residual_stats", "gated_residual", "reuse", "decide", "keep", "metrics", "bytes")


@pytest.mark.skipif(INTERPRETED, reason="this process interprets already")
@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
def test_kernels_in_the_interpreter():
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *(HERE / f"test_{name}.py" for name in OPERATIONS)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, f"\n{run.stdout}\n{run.stderr}"


def test_without_triton_the_reference_runs():
    script = """
import sys
sys.modules["triton"] = None  # what Python takes for a package that is not there
import torch
from adacache_triton.kernels import residual_stats, reuse
x = torch.ones(1, 2, 3, 4)
assert residual_stats(x, 3 * x, frame_strides=(1,)).tolist() == [[48, 72, 0, 24]]
assert reuse(x, x).eq(2).all()
try:
    reuse(x, x, backend="triton")
except ValueError as error:
    assert str(error).startswith("reuse: Triton 3.4 or newer is not installed; "), error
else:
    raise AssertionError("no error")
"""
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert run.returncode == 0, f"\n{run.stdout}\n{run.stderr}"
