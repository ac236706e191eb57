"""Device functions that every kernel shares: loads, magnitudes, rotations, scores, visibility.

Kinds of features are small integers here, since a kernel is a program of its own for each:
`IDENTITY`, `ROTATE`, `POLAR`; and `RAW`, `SOFTPLUS`, `RELU` for magnitudes. A head's channels are
two parts: ``R`` that turn (``2 R`` for pairs), then the rest. Widths are padded to powers of two,
with zeros, which add nothing to an inner product.
"""

from __future__ import annotations

import triton
import triton.language as tl

IDENTITY = tl.constexpr(0)
ROTATE = tl.constexpr(1)
POLAR = tl.constexpr(2)
RAW = tl.constexpr(0)
SOFTPLUS = tl.constexpr(1)
RELU = tl.constexpr(2)
LOG2E = tl.constexpr(1.4426950408889634)
TAU = tl.constexpr(6.283185307179586)


@triton.jit
def softplus(x):
    """``log(1 + e^x)`` to a few float32 roundings, relative, down to the smallest results.

    ``log(1 + e) = 2 artanh(e / (2 + e))`` with ``e = e^-|x|``: the series in ``z^2 <= 1/9`` has
    no cancellation, where a logarithm near 1 would lose all digits of a small magnitude.
    """
    e = tl.exp(-tl.abs(x))
    z = e / (2.0 + e)
    w = z * z
    tail = 0.06666666666666667 + w * 0.058823529411764705
    tail = 0.09090909090909091 + w * (0.07692307692307693 + w * tail)
    tail = 0.14285714285714285 + w * (0.1111111111111111 + w * tail)
    tail = 0.3333333333333333 + w * (0.2 + w * tail)
    return tl.maximum(x, 0.0) + 2.0 * (z + z * w * tail)


@triton.jit
def magnitude(x, MAGNITUDE: tl.constexpr):
    """Float32 channels to magnitudes."""
    if MAGNITUDE == SOFTPLUS:
        return softplus(x)
    elif MAGNITUDE == RELU:
        return tl.maximum(x, 0.0)
    else:
        return x


@triton.jit
def magnitude_slope(x, MAGNITUDE: tl.constexpr):
    """Derivative of `magnitude`."""
    if MAGNITUDE == SOFTPLUS:
        e = tl.exp(-tl.abs(x))
        return tl.where(x >= 0.0, 1.0, e) / (1.0 + e)
    elif MAGNITUDE == RELU:
        return tl.where(x > 0.0, 1.0, 0.0)
    else:
        return tl.full(x.shape, 1.0, tl.float32)


@triton.jit
def load_tile(
    X, rows, row_ok, row_stride, step, first, count, WIDTH: tl.constexpr, CHECKED: tl.constexpr
):
    """Rows times ``WIDTH`` channels from ``first``; zeros beyond ``count`` and rows not ok."""
    channels = tl.arange(0, WIDTH)
    at = X + rows[:, None] * row_stride + (first + channels)[None, :] * step
    if CHECKED:
        return tl.load(at, mask=row_ok[:, None] & (channels < count)[None, :], other=0.0)
    else:
        return tl.load(at)


@triton.jit
def store_tile(X, value, rows, row_ok, row_stride, first, count, WIDTH: tl.constexpr):
    """The other way, channels next to one another."""
    channels = tl.arange(0, WIDTH)
    at = X + rows[:, None] * row_stride + (first + channels)[None, :]
    ok = row_ok[:, None] & (channels < count)[None, :]
    tl.store(at, value.to(X.dtype.element_ty), mask=ok)


@triton.jit
def as_magnitude(
    x, first, magnitudes, WIDTH: tl.constexpr, PART: tl.constexpr, MAGNITUDE: tl.constexpr
):
    """Magnitudes of the channels below ``magnitudes``, in the dtype they came in.

    Args as in `load_tile`; ``PART`` says that only some channels of the tile are magnitudes.
    Rounding here makes what was stored as magnitudes and what is computed now the same number.
    """
    if MAGNITUDE == RAW:
        return x
    else:
        shown = magnitude(x.to(tl.float32), MAGNITUDE).to(x.dtype)
        if PART:
            polar = (first + tl.arange(0, WIDTH)) < magnitudes
            return tl.where(polar[None, :], shown, x)
        else:
            return shown


@triton.jit
def turn(first, second, cos, sin, KIND: tl.constexpr):
    """A magnitude to its two components, or a pair turned by its angle."""
    if KIND == POLAR:
        return first * cos, first * sin
    else:
        return first * cos - second * sin, second * cos + first * sin


@triton.jit
def turn_back(first, second, cos, sin, KIND: tl.constexpr):
    """Transpose of `turn`: gradients of features to those of channels."""
    along = first * cos + second * sin
    if KIND == POLAR:
        return along, along
    else:
        return along, second * cos - first * sin


@triton.jit
def shift_angle(cos, sin, cos_by, sin_by):
    """cos and sin of an angle less another."""
    return cos * cos_by + sin * sin_by, sin * cos_by - cos * sin_by


@triton.jit
def angles(
    COS, SIN, table, PHASE_COS, PHASE_SIN, phases, sign, rows, ok, R,
    R2: tl.constexpr, PHASED: tl.constexpr,
):  # fmt: skip
    """cos and sin of the angles of a tile, less (``sign = 1``) or plus (-1) a head's phase."""
    cos = load_tile(COS + table, rows, ok, R, 1, 0, R, R2, True)
    sin = load_tile(SIN + table, rows, ok, R, 1, 0, R, R2, True)
    if PHASED:
        channels = tl.arange(0, R2)
        at = phases + channels
        cos_by = tl.load(PHASE_COS + at, mask=channels < R, other=1.0)[None, :]
        sin_by = tl.load(PHASE_SIN + at, mask=channels < R, other=0.0)[None, :]
        cos, sin = shift_angle(cos, sin, cos_by, sign * sin_by)
    return cos, sin


@triton.jit
def features(
    X, cos, sin, rows, ok, row_stride, step, magnitudes, R, dtype: tl.constexpr,
    KIND: tl.constexpr, MAGNITUDE: tl.constexpr, R2: tl.constexpr,
):  # fmt: skip
    """The two components of the channels of a tile that turn, rounded to ``dtype`` once."""
    a = load_tile(X, rows, ok, row_stride, step, 0, R, R2, True)
    a = as_magnitude(a, 0, magnitudes, R2, False, MAGNITUDE).to(tl.float32)
    b = a
    if KIND == ROTATE:
        b = load_tile(X, rows, ok, row_stride, step, R, R, R2, True).to(tl.float32)
    first, second = turn(a, b, cos, sin, KIND)
    return first.to(dtype), second.to(dtype)


@triton.jit
def inner(
    a1, a2, a3, b1, b2, b3, TURNS: tl.constexpr, RESTS: tl.constexpr, PRECISION: tl.constexpr
):
    """Inner products of the rows of two tiles of features, in float32."""
    if TURNS:
        s = tl.dot(a1, tl.trans(b1), input_precision=PRECISION)
        s = tl.dot(a2, tl.trans(b2), s, input_precision=PRECISION)
        if RESTS:
            s = tl.dot(a3, tl.trans(b3), s, input_precision=PRECISION)
        return s
    else:
        return tl.dot(a3, tl.trans(b3), input_precision=PRECISION)


@triton.jit
def places(AT, base, rows, ok, offset, IN_ORDER: tl.constexpr):
    """Positions of rows: the row itself moved by ``offset``, or what was given."""
    if IN_ORDER:
        return rows + offset
    else:
        return tl.load(AT + base + rows, mask=ok, other=0)


@triton.jit
def labels(X, rows, ok, GIVEN: tl.constexpr):
    """Segments or mask of rows, or just anything where there are none."""
    if GIVEN:
        return tl.load(X + rows, mask=ok, other=0)
    else:
        return rows


@triton.jit
def visible(
    q_ok,
    q_at,
    q_segment,
    k_ok,
    k_at,
    k_segment,
    window,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
    SEGMENTED: tl.constexpr,
):
    """Which keys a query sees. Query vectors come as columns and keys as rows, or reversed."""
    seen = q_ok & k_ok
    if CAUSAL:
        ahead = q_at - k_at
        seen = seen & (ahead >= 0)
        if WINDOWED:
            seen = seen & (ahead < window)
    if SEGMENTED:
        seen = seen & (q_segment == k_segment)
    return seen
