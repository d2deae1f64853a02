"""AdaCache as its released code runs it, literally: the reference for the decision rule and for stack caching.

The decision is taken on tensors in the residual's own dtype, and every block keeps two residuals.
"""

import torch
from torch import Tensor


class LiteralRule:
    """The released decision rule. `moreg` is None or a dict as in the traces; thresholds end with any large one."""

    def __init__(self, thresholds: list[float], rates: list[int], moreg: dict | None, num_steps: int):
        self.thresholds, self.rates, self.moreg, self.num_steps = thresholds, rates, moreg, num_steps
        self.rate, self.computed, self.motion_scale, self.old = 1, 0, 1.0, None
        self.trace: list[dict] = []

    def computes(self, step: int) -> bool:
        return step in (1, self.num_steps - 1, self.num_steps) or step == self.computed + self.rate

    def decide(self, step: int, new: Tensor, tokens: int) -> None:
        """`new` [B, T*S, C] of a computed step, S = tokens."""
        self.computed, old, self.old = step, self.old, new
        row = {"step": step}
        if old is not None:
            d = torch.norm(old - new, p=1) / torch.norm(old, p=1) / self.rate
            row |= {"prev_rate": self.rate, "distance": float(d)}
            if self.moreg:
                scale = self._motion_scale(step, new, tokens)
                gradient = self.moreg["gradient_weight"] * (scale - self.motion_scale) / self.rate
                d, self.motion_scale = d * (scale + abs(gradient)), scale
                row["motion_scale"] = float(scale)
            row["seen"] = float(d)
            self.rate = next((k for t, k in zip(self.thresholds, self.rates) if d < t), self.rates[-1])
        self.trace.append(row | {"rate": self.rate})

    def _motion_scale(self, step: int, new: Tensor, tokens: int):
        first, last = self.moreg["steps"]
        if not first <= step <= last:
            return 1.0
        motion = 0
        for stride in self.moreg["strides"]:
            later, earlier = new[:, stride * tokens :], new[:, : -stride * tokens]
            norms = torch.norm(later, p=1) + torch.norm(earlier, p=1)
            motion = motion + torch.norm(later - earlier, p=1) / norms
        motion = motion / len(self.moreg["strides"])
        return (motion / self.moreg["scale"]) ** self.moreg["power"] / self.moreg["divisor"]


class LiteralCache:
    """Per-block caching of a `doubles.stdit3.STDiT3`: two kept residuals in each of its blocks."""

    def __init__(self, model, rule: LiteralRule, probe: int):
        self.model, self.rule, self.probe = model, rule, probe

    def __call__(self, step: int, x: Tensor, timestep: Tensor, y: Tensor) -> Tensor:
        computes, model = self.rule.computes(step), self.model
        for blocks in (model.spatial_blocks, model.temporal_blocks):
            for index, block in enumerate(blocks):
                measured = blocks is model.temporal_blocks and index == self.probe
                block.forward = self._forward(block, step, computes, measured)
        try:
            return model(x, timestep, y)
        finally:
            for blocks in (model.spatial_blocks, model.temporal_blocks):
                for block in blocks:
                    del block.forward

    def _forward(self, block, step, computes, measured):
        def forward(x, y, t, mask=None, x_mask=None, t0=None, T=None, S=None):
            if computes:
                attention = block.attention_residual(x, t, T, S)
                rest = block.rest_residual(x + attention, y, t)
                block.kept = (attention, rest)
                if measured:
                    self.rule.decide(step, attention, S)
            return x + block.kept[0] + block.kept[1]

        return forward
