"""Random numbers as a pure function of a key and an index, the same on every device.

`torch.Generator` gives other numbers on another device, in another order or at another batch
size. These come from splitmix64 (Steele, Lea & Flood, "Fast splittable pseudorandom number
generators", 2014) in wrapping 64-bit integers, which all devices compute alike.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

# The constants of splitmix64 as signed 64-bit integers, which is what torch has.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64


def mix(x: Tensor) -> Tensor:
    """Return splitmix64's finaliser of int64 `x`: a bijection whose output looks random."""
    x = (x ^ _shift_right(x, 30)) * _FIRST
    x = (x ^ _shift_right(x, 27)) * _SECOND
    return x ^ _shift_right(x, 31)


def key(*words: int) -> int:
    """Fold words (each in 0 .. 2^63 - 1) to one key, an int64 value."""
    state = torch.zeros((), dtype=torch.int64)
    for word in words:
        state = mix((state ^ word) + _GOLDEN)
    return int(state)


def keys(stream: int, indices: Tensor) -> Tensor:
    """Return the 64-bit number of each index of a stream, int64, same shape.

    For one stream, different indices always give different numbers.
    """
    return mix(stream + _GOLDEN * (indices + 1))


def draws(states: Tensor, count: int) -> Tensor:
    """Return `count` 64-bit random numbers for each of the `(N,)` states: `(N, count)` int64."""
    steps = torch.arange(1, count + 1, device=states.device) * _GOLDEN
    return mix(states[:, None] + steps)


def below(bits: Tensor, bound: Tensor | int) -> Tensor:
    """Map 64-bit numbers to integers uniform in `0 .. bound - 1`, for `bound` < 2^31.

    Takes the upper 31 bits times the bound; the bias is below `bound / 2^31`.
    """
    return (_shift_right(bits, 33) * bound) >> 31


@lru_cache(maxsize=3)
def permutation(size: int, *words: int) -> Tensor:
    """Return the numbers `0 .. size - 1` in an order drawn from words, as for `key`.

    The last three are kept: do not write into it.
    """
    # The numbers of one stream never repeat, so that the order has no ties to break.
    return keys(key(*words), torch.arange(size)).argsort()


def _shift_right(x: Tensor, bits: int) -> Tensor:
    # torch shifts signed integers arithmetically; the mask clears the copies of the sign.
    return (x >> bits) & ((1 << (64 - bits)) - 1)
