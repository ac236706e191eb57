"""`attention`, `scores`, `explain` and what goes with them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from numbers import Integral
from typing import Any, Literal

import torch
from torch import Tensor

from whatwhere.attention import choices, cpu, flex, reference, sdpa, triton
from whatwhere.attention.angles import rotation_table
from whatwhere.attention.call import Backend, Call, check_tensors, prepare
from whatwhere.spec import ScoreSpec, UnsupportedError

BACKENDS: dict[str, Backend] = {
    "reference": reference.BACKEND,
    "sdpa": sdpa.BACKEND,
    "flex": flex.BACKEND,
    "cpu": cpu.BACKEND,
    "triton": triton.BACKEND,
    "widened": triton.WIDENED,
}

# Keys from which blocks of rows beat SDPA for features that are the channels themselves, and
# queries up to which they do not in order (benchmarks/results/cpu_choice.csv).
_ROWS_PAY = 128
_FEW = 16


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: ScoreSpec,
    *,
    causal: bool = False,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    key_mask: Tensor | None = None,
    segments: Tensor | None = None,
    window: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Softmax attention with the scores that ``spec`` describes.

    ``out[t] = sum_s softmax_s(score(t, s)) v[s]`` over the keys that ``t`` sees.

    Args:
        q: ``(B, H, T, D)`` queries, floating point.
        k: ``(B, G, S, D)`` keys; ``H`` is a multiple of ``G``, and query heads ``i H/G`` to
            ``(i + 1) H/G - 1`` share key head ``i``, as in transformers.
        v: ``(B, G, S, V)`` values.
        spec: What an encoding returns when it is called.
        causal: Whether a query sees a key only if ``key_position <= query_position``.
        query_positions: ``(T,)`` or ``(B, T)`` integers, by default the last T of 0..S-1. With
            several position axes a last axis of size A is added, and there is no default.
        key_positions: ``(S,)`` or ``(B, S)`` integers, by default 0..S-1; axes likewise.
        key_mask: ``(B, S)`` bool, True where a key may be attended to.
        segments: ``(B, S)`` integers, the document of each key; queries belong to the last T.
            Documents do not see one another. Default positions go on from one document to the
            next, which only a length temperature tells from positions that start anew.
        window: A query sees this many positions at most, its own included. Causal only.
        backend: A name in `BACKENDS`, or ``"auto"`` for the fastest that takes the call.

    Returns:
        ``(B, H, T, V)`` in the dtype of ``q``. A query that sees no key gets zeros.

    Raises:
        ValueError: If arguments do not fit one another, or the backend is unknown.
        UnsupportedError: If the backend named cannot compute this call.
    """
    given = (query_positions, key_positions, key_mask, segments, window)
    if backend == "auto" and isinstance(causal, bool) and all(x is None for x in given):
        out = _plain_step(q, k, v, spec)
        if out is not None:
            return out
    call = prepare(q, k, v, spec, causal, *given)
    name = _choose(call, backend)[0]
    if 0 in (q.shape[0], q.shape[2], k.shape[2]):
        return _nothing_seen(call)
    with _dtypes_as_given(q.device):
        return BACKENDS[name].run(call)


def scores(
    q: Tensor,
    k: Tensor,
    spec: ScoreSpec,
    *,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
) -> Tensor:
    """Scaled scores before mask and softmax, by the reference backend.

    Args:
        q: ``(B, H, T, D)``.
        k: ``(B, G, S, D)``.
        spec: What an encoding returns when it is called.
        query_positions: As for `attention`.
        key_positions: As for `attention`.

    Returns:
        ``(B, H, T, S)``, float64 for float64 input, else float32.

    Raises:
        ValueError: If arguments do not fit one another.
    """
    call = prepare(q, k, k, spec, False, query_positions, key_positions, None, None, None)
    with _dtypes_as_given(q.device):
        return reference.scores(call)


@dataclass(frozen=True)
class Explanation:
    """Which backend `attention` would take for a call, and why.

    Attributes:
        backend: Its name.
        reason: Why it is the one.
        refused: Why each of the others cannot take the call, for those that cannot.
        cache_form: Which form of keys a cache should keep here (`cache_form`).
        cache_numbers: Numbers a cache keeps per token and key head, keys and values.
    """

    backend: str
    reason: str
    refused: dict[str, str]
    cache_form: Literal["encoded", "raw"]
    cache_numbers: int

    def __str__(self) -> str:
        lines = [f"backend {self.backend}: {self.reason}"]
        lines += [f"not {name}: {why}" for name, why in self.refused.items()]
        lines.append(
            f"cache {self.cache_form} keys: {self.cache_numbers} numbers per token and key head"
        )
        return "\n".join(lines)


def explain(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: ScoreSpec,
    *,
    causal: bool = False,
    query_positions: Tensor | None = None,
    key_positions: Tensor | None = None,
    key_mask: Tensor | None = None,
    segments: Tensor | None = None,
    window: int | None = None,
    backend: str = "auto",
) -> Explanation:
    """Say which backend `attention` takes for these arguments, and why. Computes nothing.

    Raises:
        ValueError: As `attention`.
        UnsupportedError: As `attention`.
    """
    call = prepare(
        q, k, v, spec, causal, query_positions, key_positions, key_mask, segments, window
    )
    name, reason = _choose(call, backend)
    refused = {
        other: why
        for other, entry in BACKENDS.items()
        if other != name and (why := entry.refuses(call)) is not None
    }
    form = cache_form(spec, q.device)
    width = q.shape[-1] if form == "raw" else spec.feature_dim(q.shape[-1])
    return Explanation(name, reason, refused, form, width + v.shape[-1])


def cache_form(
    spec: ScoreSpec, device: torch.device | str | None = None
) -> Literal["encoded", "raw"]:
    """Which form of keys a cache should keep for decoding on a device.

    ``"encoded"`` keys are features (`encode_keys`), computed once per token, up to ``2 D``
    numbers for polar scores. ``"raw"`` keys are ``D`` numbers, and pay only where a backend
    applies the rotation while it reads them: elsewhere every step would encode the whole cache
    anew. As magnitudes (`unturned`), as many numbers, they are cheaper still to read.
    """
    target = torch.device("cpu" if device is None else device)
    raw = any(
        entry.reads_raw_keys(spec, target) and _decodes_by(name, target)
        for name, entry in BACKENDS.items()
    )
    return "raw" if raw else "encoded"


def table_bytes(encoding: ScoreSpec | Callable[[], ScoreSpec], length: int) -> int:
    """Bytes of the cos and sin tables that attention over ``length`` positions makes.

    Read off the tensors that `attention` allocates, float32, here on PyTorch's ``meta`` device.
    Channels that do not turn need none; 0 where nothing turns.

    Args:
        encoding: An encoding, or the spec it returns.
        length: Positions.

    Raises:
        ValueError: If ``length`` is no integer or negative, or ``encoding`` is none.
    """
    if not isinstance(length, Integral) or length < 0:
        raise ValueError(f"length={length!r}: expected an integer of at least 0")
    spec = encoding() if callable(encoding) else encoding
    if not isinstance(spec, ScoreSpec):
        raise ValueError(f"encoding={encoding!r}: expected an encoding or a ScoreSpec")
    if spec.inv_freq is None:
        return 0
    inv_freq = spec.inv_freq[:, : spec.num_turning].to("meta")
    positions = torch.empty(length, spec.num_axes, dtype=torch.int64, device="meta")
    return sum(table.nbytes for table in rotation_table(inv_freq, positions))


def grid(*sizes: int, device: torch.device | str | None = None) -> Tensor:
    """Positions of a grid in row-major order, e.g. of the patches of an image or a video.

    ``grid(height, width)`` is ``(height * width, 2)`` int64, ``grid(frames, height, width)``
    has three columns.

    Raises:
        ValueError: If no size is given or one is not positive.
    """
    if not sizes or any(not isinstance(n, Integral) or n < 1 for n in sizes):
        raise ValueError(f"sizes={sizes}: expected one positive integer per axis")
    axes = [torch.arange(n, device=device) for n in sizes]
    return torch.cartesian_prod(*axes).reshape(-1, len(sizes))


def _nothing_seen(call: Call) -> Tensor:
    """Zeros for calls without sequences, queries or keys; gradients (all zero) still pass."""
    zeros = torch.where(torch.zeros((), dtype=torch.bool, device=call.q.device), call.q, 0.0)
    out = zeros[..., :1].expand(*call.q.shape[:3], call.v.shape[-1]) + call.k.sum() + call.v.sum()
    for learned in (call.spec.phase, call.spec.slopes):
        if learned is not None:
            out = out + learned[:0].sum().to(out)
    return out


def _plain_step(q: Tensor, k: Tensor, v: Tensor, spec: ScoreSpec) -> Tensor | None:
    """One query that sees every key, on a CPU, if there is a short way for it.

    Then positions and masks say nothing, and filling them in would take as long as attending to
    a short cache.
    """
    if not isinstance(spec, ScoreSpec) or not isinstance(q, Tensor) or q.device.type != "cpu":
        return None
    if any(x is not None for x in (spec.slopes, spec.temperature_length, spec.softcap)):
        return None
    check_tensors(q, k, v)
    if q.shape[2] != 1 or torch.is_autocast_enabled("cpu"):
        return None
    if 0 in (q.shape[0], k.shape[2], v.shape[-1]):
        return None
    if spec.feature == "identity":
        return sdpa.attend_one(q, k, v, spec.scale) if q.shape[-1] <= v.shape[-1] else None
    return cpu.attend_one(q, k, v, spec) if cpu.takes_one(q, k, v, spec) else None


def _dtypes_as_given(device: torch.device) -> AbstractContextManager[Any]:
    """No autocast: where rounding is harmless is decided here, operation by operation."""
    if torch.amp.is_autocast_available(device.type):
        return torch.autocast(device.type, enabled=False)
    return nullcontext()


def _choose(call: Call, backend: str) -> tuple[str, str]:
    if backend != "auto":
        if not isinstance(backend, str) or backend not in BACKENDS:
            raise ValueError(
                f"unknown backend {backend!r}: expected 'auto' or one of {', '.join(BACKENDS)}"
            )
        why = BACKENDS[backend].refuses(call)
        if why is not None:
            able = [name for name, entry in BACKENDS.items() if entry.refuses(call) is None]
            raise UnsupportedError(
                f"backend {backend!r} cannot compute this call: {why} (can: {', '.join(able)})"
            )
        return backend, "named in the call"
    if call.q.device.type == "cuda":
        return _choose_on_gpu(call)
    if cpu.refuses(call) is None:
        why = _rows_pay(call)
        if why is not None:
            return "cpu", why
    return _stock(call)


def _stock(call: Call) -> tuple[str, str]:
    if sdpa.refuses(call) is None:
        return "sdpa", "PyTorch's fused kernel over widened features"
    return "reference", "no fused kernel here takes the call"


def _decodes_by(name: str, device: torch.device) -> bool:
    """Whether ``"auto"`` may decode by a backend: on a GPU only once that was measured there."""
    return device.type != "cuda" or choices.measured_on(device, name, "decode")


def _choose_on_gpu(call: Call) -> tuple[str, str]:
    """Our kernels where they were measured, and so checked, on this device; else PyTorch's.

    `whatwhere bench --calibrate` measures them.
    """
    device, head_dim, total = call.q.device, call.q.shape[-1], call.k.shape[2]
    decodes = call.q.shape[2] <= triton.DECODE_QUERIES and not call.needs_grad
    raw = triton.reads_raw_keys(call.spec, device) and _decodes_by("triton", device)
    if decodes and raw and triton.refuses(call) is None:
        return "triton", "few queries: keys are read once, raw, and split among programs"
    stage = "decode" if decodes else "forward+backward" if call.needs_grad else "forward"
    named = choices.best(
        choices.device_name(device),
        head_dim,
        call.v.shape[-1],
        total,
        stage,
        feature_dim=call.spec.feature_dim(head_dim),
        measured=True,
    )
    if named is not None and named in BACKENDS and BACKENDS[named].refuses(call) is None:
        return named, "measured as the fastest on this device"
    if flex.refuses(call) is None:
        if call.spec.softcap is not None:
            return "flex", "a softcap is fused there"
        hidden = call.key_segments is not None or call.window is not None
        if hidden or call.spec.slopes is not None:
            return "flex", "documents, windows and slopes need no dense mask there"
    return _stock(call)


def _rows_pay(call: Call) -> str | None:
    """Why blocks of rows are faster than SDPA on a CPU, or ``None`` if they are not."""
    if call.spec.softcap is not None:
        return "scores are capped while they are in a core's cache"
    if call.spec.feature_dim(call.q.shape[-1]) > call.v.shape[-1]:
        return "features are wider than values, which PyTorch's CPU kernel would pad"
    if not call.masked:
        return None
    if call.spec.feature != "identity":
        return "features are made for what is in a core's cache, and hidden keys are skipped"
    plain = call.in_order and not (call.key_mask is not None or call.key_segments is not None)
    if call.k.shape[2] < _ROWS_PAY or (plain and call.q.shape[2] <= _FEW):
        return None
    return "hidden keys are skipped, and no dense mask is made"


__all__ = [
    "BACKENDS",
    "Explanation",
    "attention",
    "cache_form",
    "explain",
    "grid",
    "scores",
    "table_bytes",
]
