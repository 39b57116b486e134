"""Noise that can be drawn again: a pure function of a key and of which example it is for.

An example's noise does not depend on the batch it is in, on its rank, or on who drew before, so any batch can be
found again, W ranks see what one rank would, and an evaluation's draw stays fixed when its batch size changes.
The generator is SplitMix64 (Steele, Lea, Flood 2014), which can be entered anywhere in its sequence.
"""

from __future__ import annotations

import numpy as np

STATIC, DYNAMIC, FLIP, DEQUANTIZE, CARVE, ORDER, PASS = range(1, 8)  # first entry of a key: what the noise is for


def bits(key: tuple[int, ...], index: np.ndarray, width: int) -> np.ndarray:
    """(B, width) uniform uint64, row b belonging to example `index[b]`."""
    start = np.random.SeedSequence(key).generate_state(1, np.uint64)[0]
    z = index.astype(np.uint64)[:, None] * np.uint64(width) + np.arange(1, width + 1, dtype=np.uint64)
    z *= np.uint64(0x9E3779B97F4A7C15)
    z += start
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        z ^= z >> np.uint64(shift)
        z *= np.uint64(factor)
    z ^= z >> np.uint64(31)
    return z


def bernoulli(key: tuple[int, ...], index: np.ndarray, x: np.ndarray, levels: int) -> np.ndarray:
    """(B, *shape) uint8 draws in {0, 1}, one with probability x / (levels − 1) to within 2⁻²⁴."""
    dims = int(np.prod(x.shape[1:]))
    halves = bits(key, index, -(-dims // 2)).view(np.uint32)[:, :dims]  # two draws of 24 bits from each number
    u = (halves >> np.uint32(8)).astype(np.float32)
    threshold = x.astype(np.float32).reshape(u.shape) * np.float32(2**24 / (levels - 1))
    return (u < threshold).astype(np.uint8).reshape(x.shape)


def dequantization(key: tuple[int, ...], index: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """(B, *shape) float64, uniform on the midpoints of 2¹⁴ cells of [0, 1).

    The distance of every midpoint from 0 and 1 is above float32's rounding of (x + u) / 256 and of its logit, so that
    what is stored goes back to exactly the level it came from.
    """
    u = (bits(key, index, int(np.prod(shape))) >> np.uint64(50)).astype(np.float64)
    return ((u + 0.5) * 2.0**-14).reshape(len(index), *shape)


def coins(key: tuple[int, ...], index: np.ndarray) -> np.ndarray:
    """(B,) fair booleans."""
    return (bits(key, index, 1)[:, 0] >> np.uint64(63)).astype(bool)
