"""Which channels a model's own rotation pairs, and how fast, read off what it does to numbers."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rotation:
    """What a rotation does to a head's channels.

    Attributes:
        pairs: The two channels of each pair, ``(a, b)``: a turn takes ``a`` towards ``b``.
        frequencies: Radians per position of each pair.
    """

    pairs: tuple[tuple[int, int], ...]
    frequencies: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Turn:
    """One call of a model's rotation, as its attention module made it.

    Attributes:
        function: The model's own function.
        arguments: What it was called with.
        inputs: Queries and keys before (one of them where each has a call of its own).
        outputs: The same, after.
    """

    function: Callable[..., Any]
    arguments: inspect.BoundArguments
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]


def record(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], out: Any
) -> Turn:
    """Describe a call of ``function`` that returned ``out``."""
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    outputs = out if isinstance(out, tuple) else (out,)
    given = [x for x in bound.arguments.values() if isinstance(x, Tensor) and x.ndim == 4]
    return Turn(function, bound, tuple(given[: len(outputs)]), outputs)


def read_rotation(turn: Turn, length: int) -> Rotation | None:
    """Find pairs and frequencies of a rotation from what it does to unit vectors.

    A unit vector of channel ``a`` becomes ``g cos(angle) e_a + g sin(angle) e_b``; ``g`` is a
    scaling that the tables carry (YaRN). Angles at positions 1, 2, 4, ... refine the frequency,
    whatever the precision of the tables.

    Args:
        turn: A call whose tables are those of positions that rise by 1.
        length: ``T``, tokens in that call.

    Returns:
        The rotation, or ``None`` if the function takes no tables ``cos`` and ``sin`` of positions
        or mixes channels in another way.
    """
    tables = {name: turn.arguments.arguments.get(name) for name in ("cos", "sin")}
    for table in tables.values():
        if not isinstance(table, Tensor) or table.ndim not in (2, 3) or table.shape[-2] != length:
            return None
    axis = turn.arguments.arguments.get("unsqueeze_dim", 1)
    width = turn.inputs[0].shape[-1]

    def responses(at: int) -> Tensor:
        # One head for each unit vector, so that all stand at one position.
        eye = torch.eye(width, dtype=torch.float32, device=turn.inputs[0].device)
        probe = eye[None, :, None] if axis == 1 else eye[None, None]
        changed: dict[str, Any] = {}
        for name, value in turn.arguments.arguments.items():
            if name in tables:
                row = value[..., at : at + 1, :]
                changed[name] = row[:1] if row.ndim == 3 else row
            elif any(value is one for one in turn.inputs):
                changed[name] = probe
        signature, before = turn.arguments.signature, turn.arguments.arguments
        call = inspect.BoundArguments(signature, before | changed)
        out = turn.function(*call.args, **call.kwargs)
        first = out[0] if isinstance(out, tuple) else out
        return cast(Tensor, first).reshape(width, width).double().cpu()

    try:
        pairs = _pairs(responses(1))
    except (RuntimeError, TypeError, ValueError, IndexError):
        return None
    if not pairs:
        return None
    steps = [2**i for i in range(int(math.log2(length - 1)) + 1)] if length > 1 else []
    at_zero = _angles(responses(0), pairs)
    found = [0.0] * len(pairs)
    for step in steps:
        for index, angle in enumerate(_angles(responses(step), pairs)):
            turned = angle - at_zero[index]
            whole = round((found[index] * step - turned) / (2 * math.pi))
            found[index] = (turned + 2 * math.pi * whole) / step
    return Rotation(tuple(pairs), tuple(found))


def _pairs(response: Tensor) -> list[tuple[int, int]] | None:
    """Channels that a step mixes; ``None`` if more than two at a time."""
    pairs = []
    for channel, row in enumerate(response != 0):
        others = [c for c in row.nonzero().flatten().tolist() if c != channel]
        if len(others) > 1:
            return None
        if others and response[channel, others[0]] > 0:
            pairs.append((channel, others[0]))
    return pairs


def _angles(response: Tensor, pairs: list[tuple[int, int]]) -> list[float]:
    return [math.atan2(float(response[a, b]), float(response[a, a])) for a, b in pairs]
