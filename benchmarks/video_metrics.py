"""How far a video is from another, both [T, H, W, 3] with values in [0, 1].

PSNR and SSIM are scikit-image's. LPIPS and its like download weights; GMSD stands for them here: of the classic
full-reference measures among the closest to what people see (Xue et al., "Gradient Magnitude Similarity Deviation",
arXiv 1308.3052).
"""

from __future__ import annotations

import numpy as np
from scipy.ndimage import convolve
from skimage.metrics import structural_similarity

LUMA = np.array([0.299, 0.587, 0.114])
PREWITT = np.array([[1.0, 0.0, -1.0]] * 3) / 3
GMSD_C = 0.0026  # the paper's 170 for values up to 255


def psnr(reference: np.ndarray, frames: np.ndarray) -> float:
    """Of the whole video in dB, at most 80; 0 where it is not finite."""
    error = float(np.square(reference.astype(np.float64) - frames).mean())
    return min(80.0, -10 * np.log10(max(error, 1e-12))) if np.isfinite(error) else 0.0


def ssim(reference: np.ndarray, frames: np.ndarray) -> float:
    """Mean over frames, at most 1."""
    window = min(7, *(size - 1 + size % 2 for size in reference.shape[1:3]))
    pairs = zip(reference, frames)
    return float(
        np.mean([structural_similarity(a, b, data_range=1, channel_axis=-1, win_size=window) for a, b in pairs])
    )


def gmsd(reference: np.ndarray, frames: np.ndarray) -> float:
    """Gradient magnitude similarity deviation on luma, mean over frames: 0 where they are equal, larger is worse."""

    def gradient(image: np.ndarray) -> np.ndarray:
        return np.hypot(convolve(image, PREWITT, mode="nearest"), convolve(image, PREWITT.T, mode="nearest"))

    found = []
    for a, b in zip(reference @ LUMA, frames @ LUMA):
        x, y = gradient(a), gradient(b)
        found.append(((2 * x * y + GMSD_C) / (x**2 + y**2 + GMSD_C)).std())
    return float(np.mean(found))


def flicker(reference: np.ndarray, frames: np.ndarray) -> float:
    """Mean absolute difference of the changes from frame to frame, in thousandths of the range: what flickers anew."""
    return 1000 * float(np.abs(np.diff(frames, axis=0) - np.diff(reference, axis=0)).mean())
