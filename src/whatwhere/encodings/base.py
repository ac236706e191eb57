"""`Encoding`: the module that owns an encoding's parameters and makes its `ScoreSpec`."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor, nn

from whatwhere.encodings.frequencies import geometric
from whatwhere.spec import ScoreSpec


class Encoding(nn.Module):
    """Base of every position encoding.

    Calling an encoding returns the `ScoreSpec` that attention computes. Subclasses say which by
    setting ``frequencies`` and by implementing `forward`.

    Args:
        head_dim: ``D``, channels of a head.
        num_heads: ``H``, query heads.
        temperature_length: Sharpen queries beyond this length (`ScoreSpec`), or ``None``.
        scale: Factor of every score; ``None`` is ``head_dim ** -0.5``.

    Attributes:
        absolute: Whether the encoding is a vector added to token embeddings (`embed`).
        frequencies: ``(A, R)`` nested tuples of radians per position, empty if nothing rotates.
        train_length: The training length that it was made for, ``None`` if it was told none.
        original_frequencies: What ``frequencies`` were in training where they are changed for a
            longer context, ``None`` where they are as in training.
    """

    absolute: bool = False

    def __init__(
        self,
        head_dim: int,
        num_heads: int,
        *,
        temperature_length: int | None = None,
        scale: float | None = None,
    ) -> None:
        super().__init__()
        if temperature_length is not None:
            temperature_length = check_whole("temperature_length", temperature_length)
        self.head_dim = check_whole("head_dim", head_dim)
        self.num_heads = check_whole("num_heads", num_heads)
        self.temperature_length = temperature_length
        self.scale = self.head_dim**-0.5 if scale is None else check_number("scale", scale)
        self.frequencies: tuple[tuple[float, ...], ...] = ()
        self.train_length: int | None = None
        self.original_frequencies: tuple[tuple[float, ...], ...] | None = None
        self._inv_freq: dict[torch.device, Tensor] = {}

    def forward(self, device: torch.device | str | None = None) -> ScoreSpec:
        """The score this encoding stands for.

        Args:
            device: Where the spec's tensors should lie; ``None`` is where the encoding's
                parameters lie, or the CPU if it has none.
        """
        raise NotImplementedError

    def embed(self, positions: Tensor) -> Tensor | None:
        """What to add to token embeddings: ``(..., T, width)``, ``None`` if not `absolute`."""
        return None

    def reset_parameters(self) -> None:
        """Initialise the parameters again, as when the encoding was made."""

    def project_(self) -> None:
        """Move parameters that an optimiser has put out of bounds back onto the bound."""

    def _device(self, device: torch.device | str | None) -> torch.device:
        if device is not None:
            return torch.device(device)
        parameter = next(self.parameters(), None)
        return torch.device("cpu") if parameter is None else parameter.device

    def inv_freq(self, device: torch.device | str | None = None) -> Tensor:
        """``frequencies`` as an ``(A, R)`` float64 tensor.

        Built from Python floats on each device it is asked for, never registered as a buffer:
        ``.to(bfloat16)`` and ``.half()`` cast buffers, and frequencies must not be cast.
        """
        target = self._device(device)
        if torch.compiler.is_compiling():
            return torch.tensor(self.frequencies, dtype=torch.float64, device=target)
        if target not in self._inv_freq:
            made = torch.tensor(self.frequencies, dtype=torch.float64, device=target)
            if type(made) is not Tensor:  # a tracer's stand-in, of no use to a later call
                return made
            self._inv_freq[target] = made
        return self._inv_freq[target]

    def extra_repr(self) -> str:
        """Shown by ``print(model)``."""
        turning = len(self.frequencies[0]) if self.frequencies else 0
        parts = [f"head_dim={self.head_dim}", f"num_heads={self.num_heads}"]
        parts += [f"frequencies={turning}"] if turning else []
        if self.temperature_length is not None:
            parts.append(f"temperature_length={self.temperature_length}")
        return ", ".join(parts)


def check_whole(name: str, value: int) -> int:
    """``value`` as an ``int``; NumPy's integers are taken too.

    Raises:
        ValueError: If it is not a positive integer.
    """
    try:
        whole = 0 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        whole = 0
    if whole < 1:
        raise ValueError(f"{name}={value!r}: expected a positive integer")
    return whole


def check_number(name: str, value: float) -> float:
    """``value`` as a ``float``; integers and NumPy's numbers are taken too.

    Raises:
        ValueError: If it is not a number, text that spells one included.
    """
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ValueError(f"{name}={value!r}: expected a number, got a {type(value).__name__}")
    return float(value)


def check_base(base: float) -> float:
    """``base`` if frequencies can be made from it.

    Raises:
        ValueError: If it is not a finite number above 1.
    """
    base = check_number("base", base)
    if not 1 < base < float("inf"):
        raise ValueError(f"base={base}: expected a finite number above 1")
    return base


def rotated_units(head_dim: int, fraction: float, unit: int, nobody: str) -> int:
    """How many units of ``unit`` channels a fraction of a head has, rounded to the nearest.

    Args:
        head_dim: ``D``.
        fraction: Share of the channels, in (0, 1].
        unit: 2 for pairs (``rotate``), 1 for channels (``polar``).
        nobody: What to use in place of a fraction that rotates nothing, for the message.

    Raises:
        ValueError: If the fraction is out of range, rotates no channel, or ``head_dim`` does not
            divide into units.
    """
    head_dim, fraction = check_whole("head_dim", head_dim), check_number("fraction", fraction)
    if head_dim % unit:
        raise ValueError(f"head_dim={head_dim}: rotating pairs of channels needs an even number")
    if not 0 < fraction <= 1:
        raise ValueError(f"fraction={fraction}: expected more than 0 and at most 1; {nobody}")
    units = round(fraction * head_dim / unit)
    if units == 0:
        raise ValueError(
            f"fraction={fraction} of head_dim={head_dim} rotates no channel: the smallest that "
            f"does is {unit}/{head_dim} = {unit / head_dim:.4g}; {nobody}"
        )
    return units


def split_axes(
    axes: Sequence[int], head_dim: int, unit: int, base: float
) -> tuple[tuple[float, ...], ...]:
    """Frequencies ``(A, R)`` where each position axis turns channels of its own.

    Args:
        axes: Channels for each axis; together at most ``head_dim``.
        head_dim: ``D``.
        unit: Channels that share one frequency, 2 for ``rotate`` and 1 for ``polar``.
        base: Every axis has the geometric frequencies of this base.

    Raises:
        ValueError: If the axes do not fit the head.
    """
    try:
        counts = [check_whole("axes", n) for n in axes]
    except (TypeError, ValueError):
        counts = []
    if not counts or any(n % unit for n in counts) or sum(counts) > head_dim:
        raise ValueError(
            f"axes={axes!r}: expected channels for each position axis, multiples of {unit}, "
            f"together at most head_dim={head_dim}"
        )
    counts = [n // unit for n in counts]
    return tuple(
        (0.0,) * sum(counts[:a]) + geometric(count, base) + (0.0,) * sum(counts[a + 1 :])
        for a, count in enumerate(counts)
    )
