"""Procedural training videos with captions of three words: six scenes, from an empty one to waves of fast texture.

A caption names scene, subject and ground, as in "swarm red navy". What differs between two videos of one caption is
drawn; it is nothing in an empty scene, and much in the last two, so the scenes differ in difficulty. Frames, colours
and the model's space are those of `videos.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import videos
from .videos import BACKGROUND, FOREGROUND, NUM_FRAMES, SIZE, Draw, cover, paint, reflect, to_model

CLASSES = ("empty", "disc", "glide", "bounce", "swarm", "waves")
SUBJECTS = ("red", "yellow", "green", "blue", "pink")
GROUNDS = ("navy", "gray", "forest", "plum")
WORDS = (*CLASSES, *SUBJECTS, *GROUNDS)


def _disc(d: Draw) -> Tensor:
    x, y, radius = d.uniform(8, 16), d.uniform(8, 16), d.uniform(5, 7.5)
    return cover((((d.x - x) ** 2 + (d.y - y) ** 2).sqrt() - radius).expand(d.n, NUM_FRAMES, SIZE, SIZE))


def _glide(d: Draw) -> Tensor:
    angle, speed = d.uniform(0, 6.2832), d.uniform(0.5, 0.9)
    x = d.uniform(9, 15) + (d.t - 3.5) * speed * angle.cos()
    y = d.uniform(9, 15) + (d.t - 3.5) * speed * angle.sin()
    return cover(torch.maximum((d.x - x).abs(), (d.y - y).abs()) - 4.5)


def _ball(d: Draw, radius: float, slow: float, fast: float) -> Tensor:
    """A ball that bounces between the borders."""
    angle, speed = d.uniform(0, 6.2832), d.uniform(slow, fast)
    x = reflect(d.uniform(radius, SIZE - radius) + d.t * speed * angle.cos(), radius, SIZE - radius)
    y = reflect(d.uniform(radius, SIZE - radius) + d.t * speed * angle.sin(), radius, SIZE - radius)
    return cover(((d.x - x) ** 2 + (d.y - y) ** 2).sqrt() - radius)


def _swarm(d: Draw, balls: int = 5) -> Tensor:
    return torch.stack([_ball(d, 2.4, 1.5, 3.5) for _ in range(balls)]).amax(0)


COVERAGE = {
    "disc": _disc,
    "glide": _glide,
    "bounce": lambda d: _ball(d, 4, 3.8, 5.2),
    "swarm": _swarm,
    "waves": videos.texture,
}


def draw(words: Tensor, generator: torch.Generator) -> Tensor:
    """A video for each caption, word numbers [n, 3] of one scene: pixels in [0, 1], float32, [n, 3, T, H, W]."""
    d = Draw(len(words), generator)
    subject = FOREGROUND[words[:, 1] - len(CLASSES), :, None, None, None]
    ground = BACKGROUND[words[:, 2] - len(CLASSES) - len(SUBJECTS), :, None, None, None]
    canvas = (ground * (0.5 + d.y[:, None] / SIZE)).expand(d.n, 3, NUM_FRAMES, SIZE, SIZE)
    scene = CLASSES[int(words[0, 0])]
    return paint(canvas, subject, COVERAGE[scene](d)) if scene in COVERAGE else canvas


def batch(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Videos of random captions in the model's space [size, 3, T, H, W], and their words [size, 3]."""
    choices = torch.tensor([len(CLASSES), len(SUBJECTS), len(GROUNDS)])
    words = (torch.rand(size, 3, generator=generator) * choices).long()
    words = words[words[:, 0].sort().indices] + torch.tensor([0, len(CLASSES), len(CLASSES) + len(SUBJECTS)])
    scenes = words.split(torch.bincount(words[:, 0], minlength=len(CLASSES)).tolist())
    return to_model(torch.cat([draw(each, generator) for each in scenes if len(each)])), words


def parse(prompt: str) -> list[int]:
    """The three word numbers of a caption."""
    words = prompt.split()
    expected = (CLASSES, SUBJECTS, GROUNDS)
    if len(words) != 3 or any(word not in known for word, known in zip(words, expected)):
        names = " ".join(f"({'|'.join(known)})" for known in expected)
        raise ValueError(f"prompt: expected {names}, got {prompt!r}")
    return [WORDS.index(word) for word in words]
