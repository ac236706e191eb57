"""Backward kernel of keys: gradients of k and v, one tile of keys against its queries."""

from __future__ import annotations

import triton
import triton.language as tl

from whatwhere.attention.triton.tiles import (
    LOG2E,
    POLAR,
    RAW,
    ROTATE,
    angles,
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


@triton.jit
def query_blocks(
    first,
    last,
    ahead,
    T,
    window,
    BM: tl.constexpr,
    CAUSAL: tl.constexpr,
    WINDOWED: tl.constexpr,
):
    """Bounds of the blocks of queries that see keys ``first..last``, in order.

    Returns:
        Where they begin, where those begin and end that see every key, and where all end.
    """
    begin = 0
    whole = 0
    end = T
    whole_end = T // BM
    if CAUSAL:
        begin = tl.maximum(first - ahead, 0) // BM
        whole = tl.cdiv(tl.maximum(last - ahead, 0), BM)
    if WINDOWED:
        end = tl.minimum(T, last - ahead + window)
        whole_end = tl.minimum(T // BM, tl.maximum(first - ahead + window, 0) // BM)
    end = tl.cdiv(tl.maximum(end, 0), BM)
    begin = tl.minimum(begin, end)
    whole = tl.minimum(tl.maximum(whole, begin), end)
    whole_end = tl.maximum(tl.minimum(whole_end, end), whole)
    return begin, whole, whole_end, end


# Triton makes a program for sizes of 1, one for multiples of 16 and one for the rest: of lengths
# that comes to a few. What is a difference of lengths need not double them.
@triton.jit(do_not_specialize=["ahead", "window"])
def backward_keys_kernel(
    Q, K, V, K_RAW, LSE, GRAD, SHARE, DK, DV,
    q_b, q_h, q_t, q_d, k_b, k_h, k_s, k_d, v_b, v_h, v_s, v_d, g_b, g_h, g_t, g_d,
    r_b, r_h, r_s, r_d,
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
    """Gradients of ``BN`` keys and values of one key head, over all its query heads.

    ``Q`` and ``K`` hold magnitudes, ``K_RAW`` the keys as given. The score hangs on the
    difference of angles alone, so that the phase may turn either side.
    """
    TURNS: tl.constexpr = R2 > 0
    RESTS: tl.constexpr = P2 > 0
    # The phase of the only head that sees these keys turns them, once; of several, each turns its
    # queries as they stream past, so that one sum of gradients does for all.
    TURN_KEYS: tl.constexpr = PHASED and GROUPS == 1
    TURN_QUERIES: tl.constexpr = PHASED and GROUPS > 1
    block = tl.program_id(0)
    pair = tl.program_id(1)
    G = H // GROUPS
    b = (pair // G).to(tl.int64)
    g = pair % G
    dtype = K.dtype.element_ty
    rest_at = R * 2 if KIND == ROTATE else R

    n0 = block * BN
    columns = tl.arange(0, BN)
    k_rows = n0 + columns
    k_ok = k_rows < S
    K += b * k_b + g * k_h + n0.to(tl.int64) * k_s
    k_at = places(K_AT, b * k_at_b, k_rows, k_ok, 0, IN_ORDER)
    k_segment = labels(K_SEGMENT + b * S, k_rows, k_ok, True) if SEGMENTED else k_rows
    # A key that nobody may see can hold anything, NaN included.
    k_live = k_ok
    if KEYS_MASKED:
        k_live = k_ok & (tl.load(K_MASK + b * S + k_rows, mask=k_ok, other=0) != 0)
    k_table = b * k_table_b + n0.to(tl.int64) * R
    k1 = 0
    k2 = 0
    if TURNS:
        dk1 = tl.zeros([BN, R2], tl.float32)
        dk2 = tl.zeros([BN, R2], tl.float32)
        cos, sin = angles(
            K_COS, K_SIN, k_table, PHASE_COS, PHASE_SIN, g * R, -1.0,
            columns, k_live, R, R2, TURN_KEYS,
        )  # fmt: skip
        k1, k2 = features(
            K, cos, sin, columns, k_live, k_s, k_d, magnitudes, R, dtype, KIND, RAW, R2
        )
    k3 = 0
    if RESTS:
        k3 = load_tile(K, columns, k_live, k_s, k_d, rest_at, P, P2, True)
        dk3 = tl.zeros([BN, P2], tl.float32)
    v = load_tile(
        V + b * v_b + g * v_h + n0.to(tl.int64) * v_s, columns, k_live, v_s, v_d, 0, W, V2, True
    )
    dv = tl.zeros([BN, V2], tl.float32)

    if LISTED:
        begin = 0
        whole = 0
        row = b * list_b + block
        whole_end = tl.load(WHOLE + row)
        end = tl.load(COUNT + row)
        LIST += row * tl.cdiv(T, BM)
    else:
        last = tl.minimum(n0 + BN, S) - 1
        begin, whole, whole_end, end = query_blocks(
            n0, last, ahead, T, window, BM, CAUSAL, WINDOWED
        )
    rows = tl.arange(0, BM)
    count = end - begin
    # One loop over heads and their blocks, so that loads of the next head overlap with this one.
    for j in tl.range(0, GROUPS * count):
        h = g * GROUPS
        i = begin + j
        if GROUPS > 1:
            h += j // count
            i = begin + j % count
        if SLOPED:
            slope = tl.load(SLOPES + h) * LOG2E
        q_head = Q + b * q_b + h * q_h
        g_head = GRAD + b * g_b + h * g_h
        per_row = (b * H + h) * T
        m = tl.load(LIST + i) if LISTED else i
        m0 = m * BM
        q_rows = m0 + rows
        q_ok = q_rows < T
        qp = q_head + m0.to(tl.int64) * q_t
        q1 = 0
        q2 = 0
        q3 = 0
        if TURNS:
            table = b * q_table_b + m0.to(tl.int64) * R
            q_cos, q_sin = angles(
                Q_COS, Q_SIN, table, PHASE_COS, PHASE_SIN, h * R, 1.0,
                rows, q_ok, R, R2, TURN_QUERIES,
            )  # fmt: skip
            q1, q2 = features(
                qp, q_cos, q_sin, rows, q_ok, q_t, q_d, magnitudes, R, dtype, KIND, RAW, R2
            )
        if RESTS:
            q3 = load_tile(qp, rows, q_ok, q_t, q_d, rest_at, P, P2, True)
        lse = tl.load(LSE + per_row + q_rows, mask=q_ok, other=float("inf"))
        share = tl.load(SHARE + per_row + q_rows, mask=q_ok, other=0.0)
        factor = tl.full([BM], scale, tl.float32)
        if GAINED:
            factor *= tl.load(GAIN + b * gain_b + q_rows, mask=q_ok, other=1.0)
        s = inner(k1, k2, k3, q1, q2, q3, TURNS, RESTS, PRECISION)
        s *= (factor * LOG2E)[None, :]
        q_at = places(Q_AT, b * q_at_b, q_rows, q_ok, ahead, IN_ORDER)
        if SLOPED:
            s -= slope * (q_at[None, :] - k_at[:, None]).to(tl.float32)
        p = tl.exp2(s - lse[None, :])
        if (i < whole) | (i >= whole_end):
            q_segment = labels(Q_SEGMENT + b * T, q_rows, q_ok, True) if SEGMENTED else q_rows
            seen = visible(
                q_ok[None, :], q_at[None, :], q_segment[None, :],
                k_live[:, None], k_at[:, None], k_segment[:, None],
                window, CAUSAL, WINDOWED, SEGMENTED,
            )  # fmt: skip
            p = tl.where(seen, p, 0.0)
        gp = g_head + m0.to(tl.int64) * g_t
        grad = load_tile(gp, rows, q_ok, g_t, g_d, 0, W, V2, True).to(dtype)
        dv = tl.dot(p.to(dtype), grad, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(grad), input_precision=PRECISION)
        # A key that nobody sees may hold NaN: its p is 0, and so must this be.
        ds = tl.where(p == 0.0, 0.0, p * (dp - share[None, :]))
        if GAINED:
            ds *= (factor / scale)[None, :]
        ds = ds.to(dtype)
        if TURNS:
            dk1 = tl.dot(ds, q1, dk1, input_precision=PRECISION)
            dk2 = tl.dot(ds, q2, dk2, input_precision=PRECISION)
        if RESTS:
            dk3 = tl.dot(ds, q3, dk3, input_precision=PRECISION)

    # Addresses and angles are worked out and read anew: kept through the loop, they would push
    # the accumulators out of registers.
    late = tl.arange(0, BN) + zero
    n0 = (tl.program_id(0) + zero) * BN
    pair = tl.program_id(1) + zero
    b = (pair // G).to(tl.int64)
    g = pair % G
    k_table = b * k_table_b + n0.to(tl.int64) * R
    late_ok = n0 + late < S
    late_live = late_ok
    if KEYS_MASKED:
        late_live = late_ok & (tl.load(K_MASK + b * S + n0 + late, mask=late_ok, other=0) != 0)
    D = rest_at + P
    K_RAW += b * r_b + g * r_h + n0.to(tl.int64) * r_s
    DK += (b * S + n0) * G * D + g * D
    if TURNS:
        own_cos, own_sin = angles(
            K_COS, K_SIN, k_table, PHASE_COS, PHASE_SIN, g * R, -1.0,
            late, late_live, R, R2, TURN_KEYS,
        )  # fmt: skip
        da, db = turn_back(dk1, dk2, own_cos, own_sin, KIND)
        if KIND == POLAR:
            raw = load_tile(K_RAW, late, late_live, r_s, r_d, 0, R, R2, True).to(tl.float32)
            # A hidden key that holds NaN has no gradient, and 0 times NaN is no 0.
            da = tl.where(da == 0.0, 0.0, da * magnitude_slope(raw, MAGNITUDE))
        store_tile(DK, da * scale, late, late_ok, G * D, 0, R, R2)
        if KIND == ROTATE:
            store_tile(DK, db * scale, late, late_ok, G * D, R, R, R2)
    if RESTS:
        if KIND == POLAR:
            raw = load_tile(K_RAW, late, late_live, r_s, r_d, rest_at, P, P2, True).to(tl.float32)
            polar = (R + tl.arange(0, P2)) < magnitudes
            by = tl.where(polar[None, :], magnitude_slope(raw, MAGNITUDE), 1.0)
            dk3 = tl.where(dk3 == 0.0, 0.0, dk3 * by)
        store_tile(DK, dk3 * scale, late, late_ok, G * D, rest_at, P, P2)
    DV += (b * S + n0) * G * W + g * W
    store_tile(DV, dv, late, late_ok, G * W, 0, W, V2)
