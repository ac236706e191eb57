"""Decoding: few queries against a long cache of raw keys, split over keys, and the merge."""

from __future__ import annotations

import triton
import triton.language as tl

from whatwhere.attention.triton.elementwise import cos_sin, turns_at
from whatwhere.attention.triton.tiles import (
    LOG2E,
    POLAR,
    ROTATE,
    as_magnitude,
    labels,
    load_tile,
    places,
    shift_angle,
    turn,
    visible,
)


# Triton makes a program for sizes of 1, one for multiples of 16 and one for the rest: of lengths
# that comes to a few. What is a difference of lengths need not double them.
@triton.jit(do_not_specialize=["ahead", "window"])
def decode_kernel(
    Q, K, V, PART, PART_LSE,
    q_b, q_h, q_t, q_d, k_b, k_h, k_s, k_d, v_b, v_h, v_s, v_d,
    PAGES, pages_b, page, LENGTHS,
    Q_COS, Q_SIN, q_table_b, LO_COS, LO_SIN, FREQ,
    PHASE_COS, PHASE_SIN, GAIN, gain_b, SLOPES,
    Q_AT, q_at_b, K_AT, k_at_b, Q_SEGMENT, K_SEGMENT, K_MASK,
    H, T, S, ahead, window, R, P, W, magnitudes, scale, zero,
    GROUPS: tl.constexpr,
    KIND: tl.constexpr, MAGNITUDE: tl.constexpr, PART_OF: tl.constexpr,
    R2: tl.constexpr, P2: tl.constexpr, V2: tl.constexpr, AXES: tl.constexpr,
    PHASED: tl.constexpr, GAINED: tl.constexpr, SLOPED: tl.constexpr,
    KEYS_IN_ORDER: tl.constexpr, IN_ORDER: tl.constexpr, PAGED: tl.constexpr,
    CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
    SEGMENTED: tl.constexpr, KEYS_MASKED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Part of the keys for ``BM`` rows: the queries of all heads that share a key head.

    Keys are read as they lie in the cache, ``D`` numbers each. In order, a key's angle is that
    of its place in the tile (a table that stays in registers) plus that of the tile, by which
    the queries are turned back; elsewhere angles are computed from the positions given.
    """
    TURNS: tl.constexpr = R2 > 0
    RESTS: tl.constexpr = P2 > 0
    split = tl.program_id(0)
    pair = tl.program_id(1)
    G = H // GROUPS
    b = (pair // G).to(tl.int64)
    g = pair % G
    dtype = K.dtype.element_ty
    rest_at = R * 2 if KIND == ROTATE else R
    if PAGED:
        # A length beyond the table reads what there is of it.
        length = tl.load(LENGTHS + b)
        ahead = length - T
        S = tl.minimum(length, S)

    row = tl.program_id(2) * BM + tl.arange(0, BM)
    q_ok = row < GROUPS * T
    h = g * GROUPS + row // T
    t = row % T
    Q += b * q_b
    at_row = h * q_h + t * q_t
    if TURNS:
        q_a = load_tile(Q, at_row, q_ok, 1, q_d, 0, R, R2, True)
        q_a = as_magnitude(q_a, 0, magnitudes, R2, False, MAGNITUDE).to(tl.float32)
        q_b2 = q_a
        if KIND == ROTATE:
            q_b2 = load_tile(Q, at_row, q_ok, 1, q_d, R, R, R2, True).to(tl.float32)
        table = b * q_table_b
        cos = load_tile(Q_COS + table, t, q_ok, R, 1, 0, R, R2, True)
        sin = load_tile(Q_SIN + table, t, q_ok, R, 1, 0, R, R2, True)
        channels = tl.arange(0, R2)
        if PHASED:
            cos_by = load_tile(PHASE_COS, h, q_ok, R, 1, 0, R, R2, True)
            sin_by = load_tile(PHASE_SIN, h, q_ok, R, 1, 0, R, R2, True)
            cos, sin = shift_angle(cos, sin, cos_by, sin_by)
        q_first, q_second = turn(q_a, q_b2, cos, sin, KIND)
        q1 = q_first.to(dtype)
        q2 = q_second.to(dtype)
        if KEYS_IN_ORDER:
            columns = tl.arange(0, BN)
            k_cos = load_tile(LO_COS, columns, columns < BN, R, 1, 0, R, R2, True)
            k_sin = load_tile(LO_SIN, columns, columns < BN, R, 1, 0, R, R2, True)
    if RESTS:
        q3 = load_tile(Q, at_row, q_ok, 1, q_d, rest_at, P, P2, True)
        if KIND == POLAR:
            q3 = as_magnitude(q3, R, magnitudes, P2, PART_OF, MAGNITUDE)
    factor = tl.full([BM], scale * LOG2E, tl.float32)
    if GAINED:
        factor *= tl.load(GAIN + b * gain_b + t, mask=q_ok, other=1.0)
    if SLOPED:
        slope = tl.load(SLOPES + h, mask=q_ok, other=0.0) * LOG2E
    q_at = places(Q_AT, b * q_at_b, t, q_ok, ahead, IN_ORDER)
    q_segment = labels(Q_SEGMENT + b * T, t, q_ok, True) if SEGMENTED else t

    K += g * k_h
    V += g * v_h
    if not PAGED:
        K += b * k_b
        V += b * v_b
    begin = 0
    end = tl.cdiv(S, BN)
    if WINDOWED and IN_ORDER:
        begin = tl.maximum(ahead - window + 1, 0) // BN
    each = tl.cdiv(end - begin, tl.num_programs(0))
    begin += split * each
    end = tl.minimum(begin + each, end)

    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    out = tl.zeros([V2, BM], tl.float32)
    columns = tl.arange(0, BN)
    for n in tl.range(begin, end):
        n0 = n * BN
        k_rows = n0 + columns
        k_ok = k_rows < S
        if PAGED and WINDOWED:
            # Pages before the window may have been given back.
            k_ok = k_ok & (k_rows > ahead - window)
        if PAGED:
            block = tl.load(PAGES + b * pages_b + k_rows // page, mask=k_ok, other=0).to(tl.int64)
            k_at_row = block * k_b + (k_rows % page) * k_s
            v_at_row = block * v_b + (k_rows % page) * v_s
        else:
            k_at_row = k_rows.to(tl.int64) * k_s
            v_at_row = k_rows.to(tl.int64) * v_s
        if KEYS_MASKED:
            k_ok = k_ok & (tl.load(K_MASK + b * S + k_rows, mask=k_ok, other=0) != 0)
        k_segment = labels(K_SEGMENT + b * S, k_rows, k_ok, True) if SEGMENTED else k_rows
        k_at = places(K_AT, b * k_at_b, k_rows, k_ok, 0, IN_ORDER)
        seen = visible(
            q_ok[None, :], q_at[None, :], q_segment[None, :],
            k_ok[:, None], k_at[:, None], k_segment[:, None],
            window, CAUSAL, WINDOWED, SEGMENTED,
        )  # fmt: skip
        s = tl.zeros([BN, BM], tl.float32)
        if TURNS:
            k_a = load_tile(K, k_at_row, k_ok, 1, k_d, 0, R, R2, True)
            k_a = as_magnitude(k_a, 0, magnitudes, R2, False, MAGNITUDE).to(tl.float32)
            k_b2 = k_a
            if KIND == ROTATE:
                k_b2 = load_tile(K, k_at_row, k_ok, 1, k_d, R, R, R2, True).to(tl.float32)
            if KEYS_IN_ORDER:
                start = n0 + tl.arange(0, 1)
                turns = turns_at(K_AT, 0, start, start >= 0, FREQ, channels, R, 1, True)
                hi_cos, hi_sin = cos_sin(turns)
                t1 = (q_first * hi_cos + q_second * hi_sin).to(dtype)
                t2 = (q_second * hi_cos - q_first * hi_sin).to(dtype)
                k1, k2 = turn(k_a, k_b2, k_cos, k_sin, KIND)
            else:
                turns = turns_at(
                    K_AT, b * k_at_b * AXES, k_rows, k_ok, FREQ, channels, R, AXES, False
                )
                own_cos, own_sin = cos_sin(turns)
                k1, k2 = turn(k_a, k_b2, own_cos, own_sin, KIND)
                t1 = q1
                t2 = q2
            s = tl.dot(k1.to(dtype), tl.trans(t1), s, input_precision=PRECISION)
            s = tl.dot(k2.to(dtype), tl.trans(t2), s, input_precision=PRECISION)
        if RESTS:
            k3 = load_tile(K, k_at_row, k_ok, 1, k_d, rest_at, P, P2, True)
            if KIND == POLAR:
                k3 = as_magnitude(k3, R, magnitudes, P2, PART_OF, MAGNITUDE)
            s = tl.dot(k3, tl.trans(q3), s, input_precision=PRECISION)
        s *= factor[None, :]
        if SLOPED:
            s -= slope[None, :] * (q_at[None, :] - k_at[:, None]).to(tl.float32)
        s = tl.where(seen, s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 0))
        level = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(s - level[None, :])
        shrink = tl.exp2(top - level)
        total = total * shrink + tl.sum(p, 0)
        v = load_tile(V, v_at_row, k_ok, 1, v_d, 0, W, V2, True)
        some = tl.max(seen.to(tl.int32), 1) > 0
        v = tl.where(some[:, None], v, 0.0)
        out = out * shrink[None, :]
        out = tl.dot(tl.trans(v.to(dtype)), p.to(dtype), out, input_precision=PRECISION)
        top = higher
    found = total > 0.0
    out = out / tl.where(found, total, 1.0)[None, :]
    lse = tl.where(found, top + tl.log2(tl.where(found, total, 1.0)), float("-inf"))
    at = (pair.to(tl.int64) * tl.num_programs(0) + split) * GROUPS * T + row
    wide = tl.arange(0, V2)
    tl.store(PART + at[None, :] * W + wide[:, None], out, mask=q_ok[None, :] & (wide < W)[:, None])
    tl.store(PART_LSE + at, lse, mask=q_ok)


@triton.jit(do_not_specialize=["splits"])
def merge_kernel(
    PART, PART_LSE, OUT, H, T, W, splits,
    GROUPS: tl.constexpr, V2: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One row of output from its parts, in a fixed order."""
    row = tl.program_id(0)
    pair = tl.program_id(1)
    G = H // GROUPS
    b = (pair // G).to(tl.int64)
    h = (pair % G) * GROUPS + row // T
    t = row % T
    part = tl.arange(0, SPLITS)
    wide = tl.arange(0, V2)
    at = (pair.to(tl.int64) * splits + part) * GROUPS * T + row
    lse = tl.load(PART_LSE + at, mask=part < splits, other=float("-inf"))
    top = tl.max(lse, 0)
    weight = tl.exp2(lse - tl.where(top == float("-inf"), 0.0, top))
    ok = (part < splits)[:, None] & (wide < W)[None, :]
    values = tl.load(PART + at[:, None] * W + wide[None, :], mask=ok, other=0.0)
    total = tl.sum(weight, 0)
    out = tl.sum(values * weight[:, None], 0) / tl.where(total > 0.0, total, 1.0)
    to = OUT + ((b * T + t) * H + h) * W + wide
    tl.store(to, out.to(OUT.dtype.element_ty), mask=wide < W)
