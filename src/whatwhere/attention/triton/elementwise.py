"""Kernels without products: angle tables, magnitudes, features 2 D wide and back."""

from __future__ import annotations

import triton
import triton.language as tl

from whatwhere.attention.triton.tiles import (
    POLAR,
    ROTATE,
    TAU,
    as_magnitude,
    load_tile,
    magnitude_slope,
    shift_angle,
    store_tile,
    turn,
    turn_back,
)


@triton.jit
def cos_sin(turns):
    """cos and sin, in float32, of an angle in float64 turns.

    Whole and quarter turns go in float64; within an eighth of a turn the Taylor polynomials are
    good to 2e-9. Nothing is left to the library's reduction of large angles, which would take
    memory of its own.
    """
    quarters = tl.floor(turns * 4.0 + 0.5)
    x = ((turns - quarters * 0.25) * TAU).to(tl.float32)
    z = x * x
    sin = 8.333333333333333e-3 + z * (-1.984126984126984e-4 + z * 2.7557319223985893e-6)
    sin = x + x * z * (-0.16666666666666666 + z * sin)
    cos = -1.388888888888889e-3 + z * (2.48015873015873e-5 - z * 2.755731922398589e-7)
    cos = 1.0 + z * (-0.5 + z * (4.1666666666666664e-2 + z * cos))
    quarter = quarters.to(tl.int64).to(tl.int32) & 3
    odd = (quarter & 1) == 1
    first = tl.where(odd, sin, cos)
    second = tl.where(odd, cos, sin)
    # cos changes sign in the second and third quarter, sin in the third and fourth.
    first = tl.where((quarter == 1) | (quarter == 2), -first, first)
    return first, tl.where(quarter >= 2, -second, second)


@triton.jit
def turns_at(AT, base, rows, ok, FREQ, channels, R, AXES: tl.constexpr, IN_ORDER: tl.constexpr):
    """``sum_a position[a] freq[a, c]`` in float64 turns; ``FREQ`` is per position, ``(A, R)``."""
    turns = tl.zeros([rows.shape[0], channels.shape[0]], tl.float64)
    for a in tl.static_range(AXES):
        at = rows if IN_ORDER else tl.load(AT + base + rows * AXES + a, mask=ok, other=0)
        freq = tl.load(FREQ + a * R + channels, mask=channels < R, other=0.0)
        turns += at[:, None].to(tl.float64) * freq[None, :]
    return turns


@triton.jit(do_not_specialize=["first"])
def table_kernel(
    AT, FREQ, COS, SIN, count, first, R,
    AXES: tl.constexpr, IN_ORDER: tl.constexpr, R2: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Float32 tables ``(count, R)`` of the angles at ``AT``, or at ``first`` and what follows."""
    n0 = tl.program_id(0).to(tl.int64) * BN
    columns = tl.arange(0, BN)
    ok = n0 + columns < count
    at = n0 + columns + first if IN_ORDER else n0 + columns
    turns = turns_at(AT, 0, at, ok, FREQ, tl.arange(0, R2), R, AXES, IN_ORDER)
    cos, sin = cos_sin(turns)
    store_tile(COS + n0 * R, cos, columns, ok, R, 0, R, R2)
    store_tile(SIN + n0 * R, sin, columns, ok, R, 0, R, R2)


@triton.jit
def magnitude_kernel(
    X, OUT, x_b, x_h, x_t, x_d, H, T, D, magnitudes,
    MAGNITUDE: tl.constexpr, D2: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Magnitudes of the first channels of every head, lengths before heads in memory."""
    m0 = tl.program_id(0) * BM
    pair = tl.program_id(1)
    b = (pair // H).to(tl.int64)
    h = pair % H
    rows = tl.arange(0, BM)
    ok = m0 + rows < T
    x = load_tile(
        X + b * x_b + h * x_h + m0.to(tl.int64) * x_t, rows, ok, x_t, x_d, 0, D, D2, True
    )
    x = as_magnitude(x, 0, magnitudes, D2, True, MAGNITUDE)
    store_tile(OUT + (b * T + m0) * H * D + h * D, x, rows, ok, H * D, 0, D, D2)


@triton.jit
def widen_kernel(
    X, OUT, x_b, x_h, x_t, x_d, COS, SIN, table_b, PHASE_COS, PHASE_SIN, GAIN, gain_b,
    H, T, R, P, magnitudes,
    KIND: tl.constexpr, MAGNITUDE: tl.constexpr, R2: tl.constexpr, P2: tl.constexpr,
    PHASED: tl.constexpr, GAINED: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Features ``2 R + P`` wide of every head, one read and one write; layout as above."""
    m0 = tl.program_id(0) * BM
    pair = tl.program_id(1)
    b = (pair // H).to(tl.int64)
    h = pair % H
    rows = tl.arange(0, BM)
    ok = m0 + rows < T
    X += b * x_b + h * x_h + m0.to(tl.int64) * x_t
    F = 2 * R + P
    OUT += (b * T + m0) * H * F + h * F
    gain = tl.full([BM], 1.0, tl.float32)
    if GAINED:
        gain = tl.load(GAIN + b * gain_b + m0 + rows, mask=ok, other=1.0)
    channels = tl.arange(0, R2)
    a = load_tile(X, rows, ok, x_t, x_d, 0, R, R2, True).to(tl.float32)
    # Unlike in the fused kernels nothing was stored before: only the feature is rounded.
    a = as_magnitude(a, 0, magnitudes, R2, False, MAGNITUDE)
    second = a
    if KIND == ROTATE:
        second = load_tile(X, rows, ok, x_t, x_d, R, R, R2, True).to(tl.float32)
    table = b * table_b + m0.to(tl.int64) * R
    cos = load_tile(COS + table, rows, ok, R, 1, 0, R, R2, True)
    sin = load_tile(SIN + table, rows, ok, R, 1, 0, R, R2, True)
    if PHASED:
        cos_by = tl.load(PHASE_COS + h * R + channels, mask=channels < R, other=1.0)[None, :]
        sin_by = tl.load(PHASE_SIN + h * R + channels, mask=channels < R, other=0.0)[None, :]
        cos, sin = shift_angle(cos, sin, cos_by, sin_by)
    first, other = turn(a, second, cos * gain[:, None], sin * gain[:, None], KIND)
    store_tile(OUT, first, rows, ok, H * F, 0, R, R2)
    store_tile(OUT, other, rows, ok, H * F, R, R, R2)
    if P2 > 0:
        rest_at = R * 2 if KIND == ROTATE else R
        rest = load_tile(X, rows, ok, x_t, x_d, rest_at, P, P2, True).to(tl.float32)
        if KIND == POLAR:
            rest = as_magnitude(rest, R, magnitudes, P2, True, MAGNITUDE)
        store_tile(OUT, rest * gain[:, None], rows, ok, H * F, 2 * R, P, P2)


@triton.jit
def narrow_kernel(
    X, GRAD, DX, D_PHASE, x_b, x_h, x_t, x_d, g_b, g_h, g_t, g_d,
    COS, SIN, table_b, PHASE_COS, PHASE_SIN, GAIN, gain_b,
    H, T, R, P, magnitudes,
    KIND: tl.constexpr, MAGNITUDE: tl.constexpr, R2: tl.constexpr, P2: tl.constexpr,
    PHASED: tl.constexpr, GAINED: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """Backward of `widen_kernel`: gradients of channels, and each tile's part of the phase's."""
    m0 = tl.program_id(0) * BM
    pair = tl.program_id(1)
    b = (pair // H).to(tl.int64)
    h = pair % H
    rows = tl.arange(0, BM)
    ok = m0 + rows < T
    X += b * x_b + h * x_h + m0.to(tl.int64) * x_t
    GRAD += b * g_b + h * g_h + m0.to(tl.int64) * g_t
    rest_at = R * 2 if KIND == ROTATE else R
    D = rest_at + P
    DX += (b * T + m0) * H * D + h * D
    gain = tl.full([BM], 1.0, tl.float32)
    if GAINED:
        gain = tl.load(GAIN + b * gain_b + m0 + rows, mask=ok, other=1.0)
    channels = tl.arange(0, R2)
    table = b * table_b + m0.to(tl.int64) * R
    cos = load_tile(COS + table, rows, ok, R, 1, 0, R, R2, True)
    sin = load_tile(SIN + table, rows, ok, R, 1, 0, R, R2, True)
    if PHASED:
        cos_by = tl.load(PHASE_COS + h * R + channels, mask=channels < R, other=1.0)[None, :]
        sin_by = tl.load(PHASE_SIN + h * R + channels, mask=channels < R, other=0.0)[None, :]
        cos, sin = shift_angle(cos, sin, cos_by, sin_by)
    d1 = load_tile(GRAD, rows, ok, g_t, g_d, 0, R, R2, True).to(tl.float32) * gain[:, None]
    d2 = load_tile(GRAD, rows, ok, g_t, g_d, R, R, R2, True).to(tl.float32) * gain[:, None]
    da, db = turn_back(d1, d2, cos, sin, KIND)
    if KIND == POLAR:
        raw = load_tile(X, rows, ok, x_t, x_d, 0, R, R2, True).to(tl.float32)
        if PHASED:
            shown = as_magnitude(raw, 0, magnitudes, R2, False, MAGNITUDE)
            d_phase = tl.sum(shown * (d1 * sin - d2 * cos), 0)
            at = (pair.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * R + channels
            tl.store(D_PHASE + at, d_phase, mask=channels < R)
        # A hidden key that holds NaN has no gradient, and 0 times NaN is no 0.
        da = tl.where(da == 0.0, 0.0, da * magnitude_slope(raw, MAGNITUDE))
    store_tile(DX, da, rows, ok, H * D, 0, R, R2)
    if KIND == ROTATE:
        store_tile(DX, db, rows, ok, H * D, R, R, R2)
    if P2 > 0:
        d3 = load_tile(GRAD, rows, ok, g_t, g_d, 2 * R, P, P2, True).to(tl.float32)
        d3 *= gain[:, None]
        if KIND == POLAR:
            raw = load_tile(X, rows, ok, x_t, x_d, rest_at, P, P2, True).to(tl.float32)
            polar = (R + tl.arange(0, P2)) < magnitudes
            by = tl.where(polar[None, :], magnitude_slope(raw, MAGNITUDE), 1.0)
            d3 = tl.where(d3 == 0.0, 0.0, d3 * by)
        store_tile(DX, d3, rows, ok, H * D, rest_at, P, P2)
