"""The forward kernel: one tile of queries against the keys it sees, softmax as it goes."""

from __future__ import annotations

import triton
import triton.language as tl

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
    places,
    store_tile,
    visible,
)


@triton.jit
def key_blocks(
    first,
    last,
    ahead,
    S,
    window,
    BN: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """Bounds of the key blocks that queries ``first..last`` see, keys and queries in order.

    Returns:
        Where blocks begin that are seen, those seen whole, and those at the end seen in part;
        and where all end.
    """
    begin = 0
    whole = 0
    end = S
    whole_end = S // BN
    if CAUSAL:
        end = tl.minimum(last + ahead + 1, S)
        whole_end = tl.minimum((first + ahead + 1) // BN, S // BN)
    if WINDOWED:
        begin = tl.maximum(first + ahead - window + 1, 0) // BN
        whole = tl.cdiv(tl.maximum(last + ahead - window + 1, 0), BN)
    end = tl.cdiv(tl.maximum(end, 0), BN)
    whole = tl.minimum(whole, end)
    whole_end = tl.maximum(tl.minimum(whole_end, end), whole)
    return begin, whole, whole_end, end


# Triton makes a program for sizes of 1, one for multiples of 16 and one for the rest: of lengths
# that comes to a few. What is a difference of lengths need not double them.
@triton.jit(do_not_specialize=["ahead", "window"])
def forward_kernel(
    Q, K, V, OUT, LSE,
    q_b, q_h, q_t, q_d, k_b, k_h, k_s, k_d, v_b, v_h, v_s, v_d,
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
    """Attention of ``BM`` queries of one head.

    ``K`` holds magnitudes (polar) or raw channels; ``Q`` raw ones. Writes the output and the
    base-2 log-sum-exp of the scores, +inf for a query that sees no key. ``zero`` is 0: numbers
    made from it after the loop are not kept in registers through it.
    """
    TURNS: tl.constexpr = R2 > 0
    RESTS: tl.constexpr = P2 > 0
    # Tiles late in the sequence have most to do: they start first.
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
    q1 = 0
    q2 = 0
    q3 = 0
    if TURNS:
        table = b * q_table_b + m0.to(tl.int64) * R
        cos, sin = angles(
            Q_COS, Q_SIN, table, PHASE_COS, PHASE_SIN, h * R, 1.0, rows, q_ok, R, R2, PHASED
        )
        q1, q2 = features(
            Q, cos, sin, rows, q_ok, q_t, q_d, magnitudes, R, dtype, KIND, MAGNITUDE, R2
        )
    if RESTS:
        q3 = load_tile(Q, rows, q_ok, q_t, q_d, rest_at, P, P2, True)
        if KIND == POLAR:
            q3 = as_magnitude(q3, R, magnitudes, P2, PART, MAGNITUDE)
    factor = tl.full([BM], scale * LOG2E, tl.float32)
    if GAINED:
        factor *= tl.load(GAIN + b * gain_b + q_rows, mask=q_ok, other=1.0)
    if SLOPED:
        slope = tl.load(SLOPES + h) * LOG2E
    q_at = places(Q_AT, b * q_at_b, q_rows, q_ok, ahead, IN_ORDER)
    latest = tl.max(tl.where(q_ok, q_at, q_at - T), 0) if IN_ORDER else tl.max(q_at, 0)
    q_segment = labels(Q_SEGMENT + b * T, q_rows, q_ok, True) if SEGMENTED else q_rows

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

    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    out = tl.zeros([BM, V2], tl.float32)
    columns = tl.arange(0, BN)
    for i in tl.range(begin, end):
        n = tl.load(LIST + i) if LISTED else i
        n0 = n * BN
        k_rows = n0 + columns
        k_ok = k_rows < S
        k_at = places(K_AT, b * k_at_b, k_rows, k_ok, 0, IN_ORDER)
        # What no query here sees may be NaN, and 0 times NaN is no 0: it is not even loaded.
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
        s = inner(q1, q2, q3, k1, k2, k3, TURNS, RESTS, PRECISION) * factor[:, None]
        if SLOPED:
            s -= slope * (q_at[:, None] - k_at[None, :]).to(tl.float32)
        if (i < whole) | (i >= whole_end):
            k_segment = labels(K_SEGMENT + b * S, k_rows, k_ok, True) if SEGMENTED else k_rows
            seen = visible(
                q_ok[:, None], q_at[:, None], q_segment[:, None],
                k_live[None, :], k_at[None, :], k_segment[None, :],
                window, CAUSAL, WINDOWED, SEGMENTED,
            )  # fmt: skip
            s = tl.where(seen, s, float("-inf"))
        higher = tl.maximum(top, tl.max(s, 1))
        # A query that has seen nothing yet: -inf less -inf would be NaN.
        level = tl.where(higher == float("-inf"), 0.0, higher)
        p = tl.exp2(s - level[:, None])
        shrink = tl.exp2(top - level)
        total = total * shrink + tl.sum(p, 1)
        out = out * shrink[:, None]
        v = load_tile(V + n0.to(tl.int64) * v_s, columns, k_live, v_s, v_d, 0, W, V2, True)
        out = tl.dot(p.to(dtype), v, out, input_precision=PRECISION)
        top = higher

    found = total > 0.0
    out = out / tl.where(found, total, 1.0)[:, None]
    late = tl.arange(0, BM) + zero
    block = tl.program_id(0) + zero
    m0 = (tl.num_programs(0) - 1 - block if CAUSAL else block) * BM
    pair = tl.program_id(1) + zero
    late_ok = m0 + late < T
    # Lengths lie before heads in memory, as the projection after attention wants them.
    OUT += ((pair // H).to(tl.int64) * T + m0) * H * W + pair % H * W
    store_tile(OUT, out, late, late_ok, H * W, 0, W, V2)
    lse = tl.where(found, top + tl.log2(tl.where(found, total, 1.0)), float("inf"))
    tl.store(LSE + pair.to(tl.int64) * T + m0 + late, lse, mask=late_ok)
