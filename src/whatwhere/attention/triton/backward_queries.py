"""Backward kernel of queries: gradients of q, of the phase and of slopes, one tile of queries."""

from __future__ import annotations

import triton
import triton.language as tl

from whatwhere.attention.triton.forward import key_blocks
from whatwhere.attention.triton.tiles import (
    LOG2E,
    POLAR,
    RAW,
    ROTATE,
    angles,
    as_magnitude,
    features,
    inner,
    labels,
    load_tile,
    magnitude_slope,
    places,
    store_tile,
    turn_back,
    visible,
)


# Triton makes a program for sizes of 1, one for multiples of 16 and one for the rest: of lengths
# that comes to a few. What is a difference of lengths need not double them.
@triton.jit(do_not_specialize=["ahead", "window"])
def backward_queries_kernel(
    Q, K, V, OUT, LSE, GRAD, SHARE, DQ, D_PHASE, D_SLOPES,
    q_b, q_h, q_t, q_d, k_b, k_h, k_s, k_d, v_b, v_h, v_s, v_d, g_b, g_h, g_t, g_d,
    Q_COS, Q_SIN, q_table_b, K_COS, K_SIN, k_table_b,
    PHASE_COS, PHASE_SIN, GAIN, gain_b, SLOPES,
    Q_AT, q_at_b, K_AT, k_at_b, Q_SEGMENT, K_SEGMENT, K_MASK,
    LIST, WHOLE, COUNT, list_b,
    H, T, S, ahead, window, R, P, W, magnitudes, scale, zero,
    GROUPS: tl.constexpr,
    KIND: tl.constexpr, MAGNITUDE: tl.constexpr, PART: tl.constexpr,
    R2: tl.constexpr, P2: tl.constexpr, V2: tl.constexpr,
    PHASED: tl.constexpr, GAINED: tl.constexpr, SLOPED: tl.constexpr,
    IN_ORDER: tl.constexpr, CAUSAL: tl.constexpr, WINDOWED: tl.constexpr,
    SEGMENTED: tl.constexpr, KEYS_MASKED: tl.constexpr, LISTED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Gradients of ``BM`` queries of one head; names as in the forward kernel.

    Also writes ``SHARE``, the sum of gradient times output of each query, which the kernel of
    keys needs, and this tile's part of the gradients of phase and slope, which are added up
    afterwards in a fixed order: no atomics.
    """
    TURNS: tl.constexpr = R2 > 0
    RESTS: tl.constexpr = P2 > 0
    block = tl.num_programs(0) - 1 - tl.program_id(0) if CAUSAL else tl.program_id(0)
    pair = tl.program_id(1)
    b = (pair // H).to(tl.int64)
    h = pair % H
    g = h // GROUPS
    dtype = K.dtype.element_ty
    rest_at = R * 2 if KIND == ROTATE else R

    m0 = block * BM
    rows = tl.arange(0, BM)
    q_rows = m0 + rows
    q_ok = q_rows < T
    Q += b * q_b + h * q_h + m0.to(tl.int64) * q_t
    q_table = b * q_table_b + m0.to(tl.int64) * R
    q1 = 0
    q2 = 0
    q3 = 0
    if TURNS:
        cos, sin = angles(
            Q_COS, Q_SIN, q_table, PHASE_COS, PHASE_SIN, h * R, 1.0, rows, q_ok, R, R2, PHASED
        )
        q1, q2 = features(
            Q, cos, sin, rows, q_ok, q_t, q_d, magnitudes, R, dtype, KIND, MAGNITUDE, R2
        )
        dq1 = tl.zeros([BM, R2], tl.float32)
        dq2 = tl.zeros([BM, R2], tl.float32)
    if RESTS:
        q3 = load_tile(Q, rows, q_ok, q_t, q_d, rest_at, P, P2, True)
        if KIND == POLAR:
            q3 = as_magnitude(q3, R, magnitudes, P2, PART, MAGNITUDE)
        dq3 = tl.zeros([BM, P2], tl.float32)
    factor = tl.full([BM], scale, tl.float32)
    if GAINED:
        factor *= tl.load(GAIN + b * gain_b + q_rows, mask=q_ok, other=1.0)
    if SLOPED:
        slope = tl.load(SLOPES + h) * LOG2E
        d_slope = tl.zeros([BM], tl.float32)
    q_at = places(Q_AT, b * q_at_b, q_rows, q_ok, ahead, IN_ORDER)
    latest = tl.max(tl.where(q_ok, q_at, q_at - T), 0) if IN_ORDER else tl.max(q_at, 0)
    q_segment = labels(Q_SEGMENT + b * T, q_rows, q_ok, True) if SEGMENTED else q_rows

    grad = load_tile(
        GRAD + b * g_b + h * g_h + m0.to(tl.int64) * g_t, rows, q_ok, g_t, g_d, 0, W, V2, True
    ).to(dtype)
    out = load_tile(OUT + (b * T + m0) * H * W + h * W, rows, q_ok, H * W, 1, 0, W, V2, True)
    share = tl.sum(grad.to(tl.float32) * out.to(tl.float32), 1)
    per_row = pair.to(tl.int64) * T + q_rows
    tl.store(SHARE + per_row, share, mask=q_ok)
    lse = tl.load(LSE + per_row, mask=q_ok, other=float("inf"))

    K += b * k_b + g * k_h
    V += b * v_b + g * v_h
    if LISTED:
        begin = 0
        whole = 0
        row = b * list_b + block
        whole_end = tl.load(WHOLE + row)
        end = tl.load(COUNT + row)
        LIST += row * tl.cdiv(S, BN)
    else:
        last = tl.minimum(m0 + BM, T) - 1
        begin, whole, whole_end, end = key_blocks(m0, last, ahead, S, window, BN, CAUSAL, WINDOWED)

    columns = tl.arange(0, BN)
    for i in tl.range(begin, end):
        n = tl.load(LIST + i) if LISTED else i
        n0 = n * BN
        k_rows = n0 + columns
        k_ok = k_rows < S
        k_at = places(K_AT, b * k_at_b, k_rows, k_ok, 0, IN_ORDER)
        k_live = k_ok
        if KEYS_MASKED:
            k_live = k_live & (tl.load(K_MASK + b * S + k_rows, mask=k_ok, other=0) != 0)
        if CAUSAL:
            k_live = k_live & (k_at <= latest)
        k1 = 0
        k2 = 0
        k3 = 0
        kp = K + n0.to(tl.int64) * k_s
        if TURNS:
            table = b * k_table_b + n0.to(tl.int64) * R
            k_cos = load_tile(K_COS + table, columns, k_live, R, 1, 0, R, R2, True)
            k_sin = load_tile(K_SIN + table, columns, k_live, R, 1, 0, R, R2, True)
            k1, k2 = features(
                kp, k_cos, k_sin, columns, k_live, k_s, k_d, magnitudes, R, dtype, KIND, RAW, R2
            )
        if RESTS:
            k3 = load_tile(kp, columns, k_live, k_s, k_d, rest_at, P, P2, True)
        s = inner(q1, q2, q3, k1, k2, k3, TURNS, RESTS, PRECISION) * (factor * LOG2E)[:, None]
        if SLOPED:
            s -= slope * (q_at[:, None] - k_at[None, :]).to(tl.float32)
        p = tl.exp2(s - lse[:, None])
        if (i < whole) | (i >= whole_end):
            k_segment = labels(K_SEGMENT + b * S, k_rows, k_ok, True) if SEGMENTED else k_rows
            seen = visible(
                q_ok[:, None], q_at[:, None], q_segment[:, None],
                k_live[None, :], k_at[None, :], k_segment[None, :],
                window, CAUSAL, WINDOWED, SEGMENTED,
            )  # fmt: skip
            p = tl.where(seen, p, 0.0)
        v = load_tile(V + n0.to(tl.int64) * v_s, columns, k_live, v_s, v_d, 0, W, V2, True)
        dp = tl.dot(grad, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - share[:, None])
        if SLOPED:
            d_slope -= tl.sum(ds * (q_at[:, None] - k_at[None, :]).to(tl.float32), 1)
        ds = ds.to(dtype)
        if TURNS:
            dq1 = tl.dot(ds, k1, dq1, input_precision=PRECISION)
            dq2 = tl.dot(ds, k2, dq2, input_precision=PRECISION)
        if RESTS:
            dq3 = tl.dot(ds, k3, dq3, input_precision=PRECISION)

    # Addresses and angles are worked out and read anew: kept through the loop, they would push
    # the accumulators out of registers.
    late = tl.arange(0, BM) + zero
    block = tl.program_id(0) + zero
    block = tl.num_programs(0) - 1 - block if CAUSAL else block
    m0 = block * BM
    pair = tl.program_id(1) + zero
    b = (pair // H).to(tl.int64)
    h = pair % H
    q_table = b * q_table_b + m0.to(tl.int64) * R
    late_ok = m0 + late < T
    # The width of a head, at which the gradients of a query lie next to one another.
    D = rest_at + P
    DQ += (b * T + m0) * H * D + h * D
    if TURNS:
        cos, sin = angles(
            Q_COS, Q_SIN, q_table, PHASE_COS, PHASE_SIN, h * R, 1.0, late, late_ok, R, R2, PHASED
        )
        dq1 *= factor[:, None]
        dq2 *= factor[:, None]
        if PHASED:
            q_a = load_tile(Q, late, late_ok, q_t, q_d, 0, R, R2, True)
            q_a = as_magnitude(q_a, 0, magnitudes, R2, False, MAGNITUDE).to(tl.float32)
            d_phase = tl.sum(q_a * (dq1 * sin - dq2 * cos), 0)
            channels = tl.arange(0, R2)
            at = (pair.to(tl.int64) * tl.num_programs(0) + block) * R + channels
            tl.store(D_PHASE + at, d_phase, mask=channels < R)
        da, db = turn_back(dq1, dq2, cos, sin, KIND)
        if KIND == POLAR:
            raw = load_tile(Q, late, late_ok, q_t, q_d, 0, R, R2, True).to(tl.float32)
            da *= magnitude_slope(raw, MAGNITUDE)
        store_tile(DQ, da, late, late_ok, H * D, 0, R, R2)
        if KIND == ROTATE:
            store_tile(DQ, db, late, late_ok, H * D, R, R, R2)
    if RESTS:
        dq3 *= factor[:, None]
        if KIND == POLAR:
            raw = load_tile(Q, late, late_ok, q_t, q_d, rest_at, P, P2, True).to(tl.float32)
            by = magnitude_slope(raw, MAGNITUDE)
            polar = (R + tl.arange(0, P2)) < magnitudes
            dq3 *= tl.where(polar[None, :], by, 1.0)
        store_tile(DQ, dq3, late, late_ok, H * D, rest_at, P, P2)
    if SLOPED:
        tl.store(D_SLOPES + pair * tl.num_programs(0) + block, tl.sum(d_slope, 0))
