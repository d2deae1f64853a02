"""What a row of measurements says about the machine and the versions."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch


def where() -> dict[str, str | None]:
    """Date, device, driver, versions and revision."""
    cuda = torch.cuda.is_available()
    return {
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name() if cuda else f"cpu {platform.machine()}",
        "driver": _answer("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None,
        "torch": torch.__version__,
        "triton": getattr(sys.modules.get("triton"), "__version__", None),
        # A copy without its history is told.
        "revision": os.environ.get("REVISION") or _answer("git", "describe", "--always", "--dirty", "--exclude=*"),
    }


def _answer(*command: str) -> str | None:
    """The first line that a command prints."""
    try:
        lines = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parent).stdout
    except OSError:
        return None
    return lines.split("\n")[0] or None
