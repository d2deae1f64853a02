"""The examples run as they stand, and notice when what they show is not so."""

import importlib.util
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_swap_backend():
    run = subprocess.run([sys.executable, EXAMPLES / "swap_backend.py"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    assert "\nthe same decisions; the videos differ by 0.0e+00" in run.stdout
    rows = [line.replace("->", "").split() for line in run.stdout.splitlines() if "->" in line]
    assert [rows[0], rows[-1][0]] == [["1", "nan", "1", "nan", "1"], "30"]
    rates = [(int(theirs), int(ours)) for _, _, theirs, _, ours in rows]
    assert len(set(rates)) >= 4, "one rate would show little"
    assert all(theirs == ours for theirs, ours in rates)


def test_swap_backend_notices_another_decision(capsys):
    example = load("swap_backend")
    with patch.object(example, "residual_distance", lambda kept, new, rate: (kept - new).norm(p=1)):
        assert example.main() == 1
    assert "DIFFERENT decisions" in capsys.readouterr().out
