"""Procedural training videos: six classes, from a still disc to a fast random texture.

Every class is drawn analytically (signed distances and plane waves), so a batch costs next to nothing and
depends on nothing but its generator. The three in the middle of the list move about equally.
"""

from __future__ import annotations

import torch
from torch import Tensor

CLASSES = ("still", "drift", "bounce", "spin", "cross", "texture")
NUM_FRAMES, SIZE = 8, 24

FOREGROUND = torch.tensor(
    [[0.93, 0.26, 0.22], [0.98, 0.80, 0.18], [0.30, 0.78, 0.36], [0.25, 0.75, 0.93], [0.88, 0.36, 0.80]]
)
BACKGROUND = torch.tensor([[0.07, 0.09, 0.22], [0.12, 0.12, 0.13], [0.06, 0.17, 0.12], [0.17, 0.07, 0.17]])

# The model sees (pixel - SHIFT) / SCALE: near zero mean and unit variance over the six classes.
SHIFT, SCALE = 0.3, 0.3


def to_model(pixels: Tensor) -> Tensor:
    """Pixels in [0, 1] to the space that the model denoises."""
    return (pixels - SHIFT) / SCALE


def to_pixels(sample: Tensor) -> Tensor:
    """The model's space back to pixels, clamped to [0, 1]."""
    return (sample * SCALE + SHIFT).clamp(0, 1)


class Draw:
    """Uniform draws and pixel coordinates for n videos."""

    def __init__(self, n: int, generator: torch.Generator):
        self.n, self.generator = n, generator
        axis = torch.arange(SIZE) + 0.5
        self.y, self.x = axis[None, None, :, None], axis[None, None, None, :]  # [n, T, H, W]
        self.t = torch.arange(NUM_FRAMES).float()[None, :, None, None]

    def uniform(self, low: float, high: float, k: int = 1) -> Tensor:
        """[n, k, 1, 1], k a frame axis of length one or a set of waves."""
        return low + (high - low) * torch.rand(self.n, k, 1, 1, generator=self.generator)

    def sign(self) -> Tensor:
        return (self.uniform(0, 1) < 0.5) * 2.0 - 1.0

    def pair(self, palette: Tensor) -> tuple[Tensor, Tensor]:
        """Two different colours of a palette, each [n, 3, 1, 1, 1]."""
        first = torch.randint(len(palette), (self.n,), generator=self.generator)
        step = torch.randint(1, len(palette), (self.n,), generator=self.generator)
        second = (first + step) % len(palette)
        return palette[first, :, None, None, None], palette[second, :, None, None, None]


def cover(distance: Tensor) -> Tensor:
    """Signed distance in pixels to antialiased coverage, [n, 1, T, H, W]."""
    return (0.5 - distance).clamp(0, 1)[:, None]


def paint(canvas: Tensor, colour: Tensor, coverage: Tensor) -> Tensor:
    return canvas + (colour - canvas) * coverage


def reflect(position: Tensor, low: float, high: float) -> Tensor:
    """A straight path folded between two walls."""
    phase = (position - low) % (2 * (high - low))
    return low + torch.where(phase > high - low, 2 * (high - low) - phase, phase)


def _still(d: Draw) -> Tensor:
    x, y, radius = d.uniform(9, 15), d.uniform(9, 15), d.uniform(5.5, 7.5)
    disc = ((d.x - x) ** 2 + (d.y - y) ** 2).sqrt() - radius
    return cover(disc.expand(d.n, NUM_FRAMES, SIZE, SIZE))


def _drift(d: Draw) -> Tensor:
    angle, speed = d.uniform(0, 6.2832), d.uniform(0.5, 0.9)
    x = d.uniform(9, 15) + (d.t - 3.5) * speed * angle.cos()
    y = d.uniform(9, 15) + (d.t - 3.5) * speed * angle.sin()
    return cover(torch.maximum((d.x - x).abs(), (d.y - y).abs()) - 4.5)


def _cross(d: Draw) -> tuple[Tensor, Tensor]:
    speed, swap = d.uniform(2.0, 2.6), d.sign()
    dx = (d.t - 3.5) * speed * swap
    upper, lower = d.uniform(5.5, 9), d.uniform(15, 18.5)
    ball = [((d.x - 12 - s * dx) ** 2 + (d.y - y) ** 2).sqrt() - 3.7 for s, y in ((1, upper), (-1, lower))]
    return cover(ball[0]), cover(ball[1])


def _spin(d: Draw) -> Tensor:
    angle = d.uniform(0, 3.1416) + d.sign() * d.uniform(0.3, 0.5) * d.t
    x, y = d.x - d.uniform(11, 13), d.y - d.uniform(11, 13)
    along, across = x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()
    return cover(torch.maximum(along.abs() - 9.5, across.abs() - 2.3))


def _bounce(d: Draw) -> Tensor:
    angle, speed = d.uniform(0, 6.2832), d.uniform(3.8, 5.2)
    x = reflect(d.uniform(4, 20) + d.t * speed * angle.cos(), 4, 20)
    y = reflect(d.uniform(4, 20) + d.t * speed * angle.sin(), 4, 20)
    return cover(((d.x - x) ** 2 + (d.y - y) ** 2).sqrt() - 4)


def texture(d: Draw, waves: int = 10) -> Tensor:
    """Plane waves of random direction and length, hardened, all moving with one velocity."""
    angle, speed = d.uniform(0, 6.2832), d.uniform(2.2, 3.5)
    x, y = d.x - d.t * speed * angle.cos(), d.y - d.t * speed * angle.sin()
    direction, phase = d.uniform(0, 6.2832, waves), d.uniform(0, 6.2832, waves)
    k = 6.2832 / d.uniform(5, 13, waves)
    field = 0
    for w in range(waves):
        kx, ky = (k * direction.cos())[:, w : w + 1], (k * direction.sin())[:, w : w + 1]
        field = field + (kx * x + ky * y + phase[:, w : w + 1]).cos()
    return torch.sigmoid(3.0 * field / (waves / 2) ** 0.5)[:, None]


def draw(label: int, count: int, generator: torch.Generator) -> Tensor:
    """`count` videos of one class: pixels in [0, 1], float32, [count, 3, T, H, W]."""
    d = Draw(count, generator)
    foreground, other = d.pair(FOREGROUND)
    background, _ = d.pair(BACKGROUND)
    name = CLASSES[label]
    canvas = background.expand(count, 3, NUM_FRAMES, SIZE, SIZE)
    if name == "texture":
        return paint(foreground.expand_as(canvas), other, texture(d))
    if name == "cross":
        first, second = _cross(d)
        return paint(paint(canvas, foreground, first), other, second)
    shape = {"still": _still, "drift": _drift, "spin": _spin, "bounce": _bounce}[name](d)
    return paint(canvas, foreground, shape)


def batch(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Videos of random classes in the model's space [size, 3, T, H, W], and their labels [size, 1]."""
    labels = torch.randint(len(CLASSES), (size,), generator=generator).sort().values
    counts = torch.bincount(labels, minlength=len(CLASSES)).tolist()
    videos = [draw(label, n, generator) for label, n in enumerate(counts) if n]
    return to_model(torch.cat(videos)), labels[:, None]
