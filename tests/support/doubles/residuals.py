"""The made residuals on which the traces in `tests/data/decisions.json` were taken."""

import numpy as np
import torch


def residual(trace: dict, step: int) -> torch.Tensor:
    """The residual of one denoising step of a trace: [B, T*S, C], frame-major, in the trace's dtype.

    A still and a moving part, mixed by `motion`, turn from one random state towards another by `speed` radians
    in all, fast at both ends of the run and slowly in its middle.
    """
    B, T, S, C = trace["shape"]
    draw = np.random.Generator(np.random.PCG64(trace["seed"])).standard_normal
    start, end = (draw((B, 1, S, C)) + trace["motion"] * draw((B, T, S, C)) for _ in range(2))
    u = (step - 1) / (trace["num_steps"] - 1)
    phase = trace["speed"] * (4 * (u - 0.5) ** 3 + 0.5)
    r = start * np.cos(phase) + end * np.sin(phase)
    return torch.from_numpy(r.reshape(B, T * S, C).astype(np.float32)).to(getattr(torch, trace["dtype"]))
