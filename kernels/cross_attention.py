"""Attention of text over encoder tokens: softmax(scale q k^T) v where a mask lets it.

BLOCK_M rows are tokens and query heads of one key head: row r is token t0 + r // GP and head r % GP of its group, GP the group's G heads
rounded up to a power of two. Encoder tokens go by BLOCK_N at a time. lse and delta lie as [b * key heads, s, GP], a block's rows side
by side, for backwards together in `sums`. Logarithms are base 2 inside, natural outside. `mask` is Lengths of arguments.py with KIND 0, Mask with KIND 1
and 2, whose blocks are of 128 columns or of TOKENS_PER_BLOCK tokens; `strides` has a Strides for each of a kernel's tensors; scale is that of the scores
times log2(e). k and v are pointers, or with TMA descriptors of [b, key heads, s_e, D].
"""

import triton
import triton.language as tl

from fastfuse.kernels.arguments import Shape


@triton.constexpr_function
def _list_columns():
    """Columns of a block in the mask's lists. A function: constants of the module are compared at every launch."""
    return 128


@triton.constexpr_function
def _log2e():
    return 1.4426950408889634


@triton.jit
def _start(x_ptr, stride, b, head, token):
    return x_ptr + b.to(tl.int64) * stride.batch + head.to(tl.int64) * stride.head + token.to(tl.int64) * stride.token


@triton.jit
def _rows_of(x_ptr, stride, b, head, t0, s, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """(pointers, mask) of rows [BLOCK_M, BLOCK_D] of q, o or their gradients, `head` the first of the group."""
    r, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    start = _start(x_ptr, stride, b, head, t0)
    mask = (t0 + r // GP < s) & (r % GP < G)
    return start + (r // GP * stride.token + r % GP * stride.head)[:, None] + d[None, :], mask[:, None] & (d < D)[None, :]


@triton.jit
def _load_rows(
    x, stride, b, head, t0, s, G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr = False
):
    """Rows [BLOCK_M, BLOCK_D] from token t0 on; with TMA x is a descriptor of [b, s, query heads, D] and G is GP."""
    if TMA:
        return x.load([b, t0, head, 0]).reshape(BLOCK_M, BLOCK_D)
    else:
        at, inside = _rows_of(x, stride, b, head, t0, s, G, GP, D, BLOCK_M, BLOCK_D)
        return tl.load(at, mask=inside, other=0.0)


@triton.jit
def _columns_of(x, stride, b, head, n0, end, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, CUT: tl.constexpr, TMA: tl.constexpr):
    """k or v [BLOCK_N, BLOCK_D] from column n0 on; with CUT columns from `end` on are not read and 0, as past s_e they are with TMA."""
    if TMA:
        return x.load([b, head, n0, 0]).reshape(BLOCK_N, BLOCK_D)
    else:
        n, d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
        start = _start(x, stride, b, head, n0)
        mask = (d < D)[None, :]
        if CUT:
            mask = mask & (n0 + n < end)[:, None]
        return tl.load(start + (n * stride.token)[:, None] + d[None, :], mask=mask, other=0.0)


@triton.jit
def _across(rows, TRANSPOSED: tl.constexpr):
    if TRANSPOSED:
        return rows[None, :]
    else:
        return rows[:, None]


@triton.jit
def _intervals(mask, b, t, ok, shape, KIND: tl.constexpr):
    """(lo, hi) of each row's tokens; nothing where the mask is of another kind."""
    if KIND == 1:
        at = mask.rows + ((b % shape.masks).to(tl.int64) * shape.s + t) * 2
        return tl.load(at, mask=ok, other=0), tl.load(at + 1, mask=ok, other=0)
    else:
        return t * 0, t * 0


@triton.jit
def _visible(mask, b, t, ok, lo, hi, n0, end, shape, BLOCK_N: tl.constexpr, KIND: tl.constexpr, TRANSPOSED: tl.constexpr):
    """bool [rows, BLOCK_N], or transposed: which columns from n0 on each row sees."""
    n = tl.arange(0, BLOCK_N)
    columns = _across(n, not TRANSPOSED)
    if KIND == 0:
        return (n0 + columns < end) & _across(ok, TRANSPOSED)
    elif KIND == 1:
        return (n0 + columns >= _across(lo, TRANSPOSED)) & (n0 + columns < _across(hi, TRANSPOSED))
    else:
        words = (shape.s_e + _list_columns() - 1) // _list_columns() * (_list_columns() // 32)
        at = mask.rows + ((b % shape.masks).to(tl.int64) * shape.s + t) * words + n0 // 32
        word = _across(tl.load(at, mask=ok, other=0), TRANSPOSED)
        for i in tl.static_range(1, BLOCK_N // 32):
            word = tl.where(columns >= 32 * i, _across(tl.load(at + i, mask=ok, other=0), TRANSPOSED), word)
        if BLOCK_N < 32:
            columns += n0 % 32
        return ((word >> (columns % 32)) & 1) != 0


@triton.jit
def _sees(total, mask, b, t, ok, lo, hi, shape, KIND: tl.constexpr):
    """Which rows see anything, where `total` is the sum of their weights: of NaN too, which must not pass for nothing."""
    if KIND == 0:
        return total != 0
    elif KIND == 1:
        return (total != 0) & (lo < hi)
    else:
        return (total != 0) & (tl.load(mask.rows_empty + (b % shape.masks).to(tl.int64) * shape.s + t, mask=ok, other=1) == 0)


@triton.jit
def _part(list_ptr, j, SIZE: tl.constexpr, BLOCK: tl.constexpr, KIND: tl.constexpr):
    """The first of SIZE tokens or columns, the j-th of the parts of the listed blocks of BLOCK."""
    j += tl.full((), 0, tl.int32)  # no tensor in the interpreter
    if KIND == 0:
        return j * SIZE
    else:
        parts: tl.constexpr = BLOCK // SIZE
        return tl.load(list_ptr + j // parts) * BLOCK + j % parts * SIZE


@triton.jit
def _column_lists(mask, b, t0, shape, BLOCK_N: tl.constexpr, KIND: tl.constexpr, TOKENS_PER_BLOCK: tl.constexpr):
    """(list, full parts, parts, where columns end) of the token block at t0."""
    if KIND == 0:
        end = shape.s_e
        if mask.lengths is not None:
            end = tl.minimum(tl.load(mask.lengths + b), end)
        return 0, end // BLOCK_N, tl.cdiv(end, BLOCK_N), end
    else:
        at = (b % shape.masks) * tl.cdiv(shape.s, TOKENS_PER_BLOCK) + t0 // TOKENS_PER_BLOCK
        parts: tl.constexpr = _list_columns() // BLOCK_N
        full, every = tl.load(mask.counts + at * 2) * parts, tl.load(mask.counts + at * 2 + 1) * parts
        return mask.blocks + at.to(tl.int64) * tl.cdiv(shape.s_e, _list_columns()), full, every, shape.s_e


@triton.jit(do_not_specialize=["s", "s_e", "masks", "splits"])
def cross_attention_fwd_kernel(
    q_ptr, k, v, o_ptr, lse_ptr, mask, strides, s, s_e, key_heads, masks, scale, splits,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, KIND: tl.constexpr, SPLIT: tl.constexpr, TOKENS_PER_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """o and lse = log2(sum(exp(scores))); of a row that sees nothing 0 and inf. Program (token block, batch row and key head, split).

    With SPLIT a program takes its share of the block's columns, and writes o [splits, b * key heads, s * GP, D] and lse [splits, b * key
    heads, s * GP] in fp32, -inf for nothing: cross_attention_merge_kernel puts them together. Full blocks come first, and
    know no mask: rows that see nothing may gather anything there, and are cleared in the end.
    """
    tokens: tl.constexpr = BLOCK_M // GP
    t0, bh = tl.program_id(0) * tokens, tl.program_id(1)
    b, head, shape = bh // key_heads, bh % key_heads, Shape(s, s_e, masks)
    r = tl.arange(0, BLOCK_M)
    t = t0 + r // GP
    ok = t < s
    q = _load_rows(q_ptr, strides.q, b, head * G, t0, s, G, GP, D, BLOCK_M, BLOCK_D)
    lo, hi = _intervals(mask, b, t, ok, shape, KIND)
    blocks, full, last, end = _column_lists(mask, b, t0, shape, BLOCK_N, KIND, TOKENS_PER_BLOCK)
    first = 0
    if SPLIT:
        share = tl.cdiv(last, splits)
        first = tl.program_id(2) * share
        last = tl.minimum(first + share, last)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    for CUT in tl.static_range(2):
        begin = tl.maximum(full, first) if CUT else first
        for j in tl.range(begin, last if CUT else tl.minimum(full, last)):
            n0 = tl.multiple_of(_part(blocks, j, BLOCK_N, _list_columns(), KIND), BLOCK_N)
            x = _columns_of(k, strides.k, b, head, n0, end, D, BLOCK_N, BLOCK_D, CUT, TMA)
            scores = tl.dot(q, tl.trans(x), input_precision=PRECISION) * scale
            if CUT:
                scores = tl.where(_visible(mask, b, t, ok, lo, hi, n0, end, shape, BLOCK_N, KIND, False), scores, float("-inf"))
            x = _columns_of(v, strides.v, b, head, n0, end, D, BLOCK_N, BLOCK_D, CUT, TMA)
            new = tl.maximum(m, tl.max(scores, 1))
            base = new
            if CUT:  # a row may have seen nothing yet
                base = tl.where(new == float("-inf"), 0.0, new)
            p = tl.math.exp2(scores - base[:, None])
            shrink = tl.math.exp2(m - base)
            m, total = new, total * shrink + tl.sum(p, 1)
            acc = tl.dot(p.to(x.dtype), x, acc * shrink[:, None], input_precision=PRECISION)
    live = _sees(total, mask, b, t, ok, lo, hi, shape, KIND)
    total = tl.where(live, total, 1.0)
    o = tl.where(live[:, None], acc / total[:, None], 0.0)
    row = bh.to(tl.int64) * s * GP + t0 * GP
    if SPLIT:
        row += tl.program_id(2).to(tl.int64) * tl.num_programs(1) * s * GP
        d = tl.arange(0, BLOCK_D)
        tl.store(o_ptr + row * D + r[:, None] * D + d[None, :], o, mask=ok[:, None] & (d < D)[None, :])
        tl.store(lse_ptr + row + r, tl.where(live, m + tl.math.log2(total), float("-inf")), mask=ok)
    else:
        at, inside = _rows_of(o_ptr, strides.o, b, head * G, t0, s, G, GP, D, BLOCK_M, BLOCK_D)
        tl.store(at, o.to(o_ptr.dtype.element_ty), mask=inside)
        tl.store(lse_ptr + row + r, tl.where(live, m + tl.math.log2(total), float("inf")), mask=ok)


@triton.jit(do_not_specialize=["s", "s_e", "masks", "splits"])
def cross_attention_merge_kernel(
    parts_ptr, part_lse_ptr, o_ptr, lse_ptr, o_stride, s, s_e, key_heads, masks, splits,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """o and lse of all splits of cross_attention_fwd_kernel, in order. Program (token block, batch row and key head)."""
    t0, bh = tl.program_id(0) * (BLOCK_M // GP), tl.program_id(1)
    r, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    ok = t0 + r // GP < s
    row = bh.to(tl.int64) * s * GP + t0 * GP
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    at = row
    for _ in range(0, splits):
        lse = tl.load(part_lse_ptr + at + r, mask=ok, other=float("-inf"))
        new = tl.maximum(m, lse)
        base = tl.where(new == float("-inf"), 0.0, new)
        shrink, weight = tl.math.exp2(m - base), tl.math.exp2(lse - base)
        part = tl.load(parts_ptr + at * D + r[:, None] * D + d[None, :], mask=ok[:, None] & (d < D)[None, :], other=0.0)
        acc = acc * shrink[:, None] + part * weight[:, None]
        total = total * shrink + weight
        m = new
        at += tl.num_programs(1).to(tl.int64) * s * GP
    live = total != 0
    total = tl.where(live, total, 1.0)
    pointers, inside = _rows_of(o_ptr, o_stride, bh // key_heads, bh % key_heads * G, t0, s, G, GP, D, BLOCK_M, BLOCK_D)
    tl.store(pointers, (acc / total[:, None]).to(o_ptr.dtype.element_ty), mask=inside)
    tl.store(lse_ptr + row + r, tl.where(live, m + tl.math.log2(total), float("inf")), mask=ok)


@triton.jit(do_not_specialize=["s", "s_e", "masks"])
def cross_attention_delta_kernel(
    o_ptr, do_ptr, dlse_ptr, delta_ptr, o_stride, do_stride, s, s_e, key_heads, masks,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """delta = sum(o do) - dlse of each row: what softmax's backward subtracts. Program (token block, batch row and key head)."""
    t0, bh = tl.program_id(0) * (BLOCK_M // GP), tl.program_id(1)
    b, head = bh // key_heads, bh % key_heads * G
    o = _load_rows(o_ptr, o_stride, b, head, t0, s, G, GP, D, BLOCK_M, BLOCK_D).to(tl.float32)
    delta = tl.sum(o * _load_rows(do_ptr, do_stride, b, head, t0, s, G, GP, D, BLOCK_M, BLOCK_D).to(tl.float32), 1)
    r = tl.arange(0, BLOCK_M)
    row = bh.to(tl.int64) * s * GP + t0 * GP + r
    ok = t0 + r // GP < s
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + row, mask=ok & (r % GP < G), other=0.0) * _log2e()
    tl.store(delta_ptr + row, delta, mask=ok)


@triton.jit(do_not_specialize=["s", "s_e", "masks"])
def cross_attention_dq_kernel(
    q_ptr, k, v, do_ptr, sums, dq_ptr, mask, strides, s, s_e, key_heads, masks, scale,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, KIND: tl.constexpr, TOKENS_PER_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """dq = ds k, ds = p (do v^T - delta), p = exp(scores - lse): 0 for a row that sees nothing, whose lse is inf. Programs as the forward's."""
    t0, bh = tl.program_id(0) * (BLOCK_M // GP), tl.program_id(1)
    b, head, shape = bh // key_heads, bh % key_heads, Shape(s, s_e, masks)
    r = tl.arange(0, BLOCK_M)
    t = t0 + r // GP
    ok = t < s
    q = _load_rows(q_ptr, strides.q, b, head * G, t0, s, G, GP, D, BLOCK_M, BLOCK_D)
    do = _load_rows(do_ptr, strides.do, b, head * G, t0, s, G, GP, D, BLOCK_M, BLOCK_D)
    row = bh.to(tl.int64) * s * GP + t0 * GP + r
    lse = tl.load(sums.lse + row, mask=ok, other=float("inf"))
    delta = tl.load(sums.delta + row, mask=ok, other=0.0)
    lo, hi = _intervals(mask, b, t, ok, shape, KIND)
    blocks, full, last, end = _column_lists(mask, b, t0, shape, BLOCK_N, KIND, TOKENS_PER_BLOCK)
    dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # At head_dim 256, with tiles of 64 rows, nothing is hoisted out of the loops: the descriptors of wgmma and tcgen05 would take the registers of the
    # sums. On sm_90 Triton 3.9 spilled 64 bytes a thread here, up to 104 in dkdv; 3.7.1 took 253 registers where it takes 199 now. It costs: dkdv's loops
    # grew by 2 to 4% with 3.7.1, and dq's by up to 14% with 3.9 where there is no TMA; sm_100's are 10% shorter. Elsewhere hoisting makes loops shorter.
    for CUT in tl.static_range(2):
        for j in tl.range(full if CUT else 0, last if CUT else full, disable_licm=BLOCK_D > 128 and BLOCK_M >= 64):
            n0 = tl.multiple_of(_part(blocks, j, BLOCK_N, _list_columns(), KIND), BLOCK_N)
            x = _columns_of(k, strides.k, b, head, n0, end, D, BLOCK_N, BLOCK_D, CUT, TMA)
            y = _columns_of(v, strides.v, b, head, n0, end, D, BLOCK_N, BLOCK_D, CUT, TMA)
            if CUT:
                visible = _visible(mask, b, t, ok, lo, hi, n0, end, shape, BLOCK_N, KIND, False)
            p = tl.math.exp2(tl.dot(q, tl.trans(x), input_precision=PRECISION) * scale - lse[:, None])
            if CUT:
                p = tl.where(visible, p, 0.0)
            ds = p * (tl.dot(do, tl.trans(y), input_precision=PRECISION) - delta[:, None])
            dq = tl.dot(ds.to(x.dtype), x, dq, input_precision=PRECISION)
    at, inside = _rows_of(dq_ptr, strides.dq, b, head * G, t0, s, G, GP, D, BLOCK_M, BLOCK_D)
    tl.store(at, (dq * (scale / _log2e())).to(dq_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["s", "s_e", "masks"])
def cross_attention_dkdv_kernel(
    q, k_ptr, v_ptr, do, sums, dk_ptr, dv_ptr, mask, strides, s, s_e, key_heads, masks, scale,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, KIND: tl.constexpr, TOKENS_PER_BLOCK: tl.constexpr, PRECISION: tl.constexpr, DK: tl.constexpr, DV: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, TMA: tl.constexpr,
):  # fmt: skip
    """dv = p^T do, dk = ds^T q, over all the heads of the group. Program (column block, batch row and key head), over the token blocks that see it.

    A column past s_e spoils its own row of dk and dv alone, which nobody stores.
    """
    n0, bh = tl.program_id(0) * BLOCK_N, tl.program_id(1)
    b, head, end, shape = bh // key_heads, bh % key_heads, s_e, Shape(s, s_e, masks)
    k = _columns_of(k_ptr, strides.k, b, head, n0, end, D, BLOCK_N, BLOCK_D, True, False)
    v = _columns_of(v_ptr, strides.v, b, head, n0, end, D, BLOCK_N, BLOCK_D, True, False)
    dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    r = tl.arange(0, BLOCK_M)
    tokens: tl.constexpr = BLOCK_M // GP
    rows = bh.to(tl.int64) * s * GP
    if KIND == 0:
        blocks, last = 0, tl.cdiv(s, tokens)
    else:
        at = (b % masks) * tl.cdiv(end, _list_columns()) + n0 // _list_columns()
        blocks = mask.blocks + at.to(tl.int64) * tl.cdiv(s, TOKENS_PER_BLOCK)
        last = tl.load(mask.counts + at * 2 + 1) * (TOKENS_PER_BLOCK // tokens)
    for j in tl.range(0, last, disable_licm=BLOCK_D > 128 and BLOCK_N >= 64):
        t0 = _part(blocks, j, tokens, TOKENS_PER_BLOCK, KIND)
        x = _load_rows(q, strides.q, b, head * G, t0, s, G, GP, D, BLOCK_M, BLOCK_D, TMA)
        y = _load_rows(do, strides.do, b, head * G, t0, s, G, GP, D, BLOCK_M, BLOCK_D, TMA)
        ok = r < (s - t0) * GP
        p = tl.dot(k, tl.trans(x), input_precision=PRECISION) * scale
        lse = tl.load(sums.lse + rows + t0 * GP + r, mask=ok, other=float("inf"))
        p = tl.math.exp2(p - lse[None, :])
        if KIND != 0:
            t = t0 + r // GP
            lo, hi = _intervals(mask, b, t, ok, shape, KIND)
            p = tl.where(_visible(mask, b, t, ok, lo, hi, n0, end, shape, BLOCK_N, KIND, True), p, 0.0)
        if DV:
            dv = tl.dot(p.to(y.dtype), y, dv, input_precision=PRECISION)
        if DK:
            ds = tl.dot(v, tl.trans(y), input_precision=PRECISION)
            delta = tl.load(sums.delta + rows + t0 * GP + r, mask=ok, other=0.0)
            ds = p * (ds - delta[None, :])
            dk = tl.dot(ds.to(x.dtype), x, dk, input_precision=PRECISION)
    n, d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    if KIND == 0 and mask.lengths is not None:
        held = (n0 + n < tl.load(mask.lengths + b))[:, None]
        dk, dv = tl.where(held, dk, 0.0), tl.where(held, dv, 0.0)
    inside = (n0 + n < end)[:, None] & (d < D)[None, :]
    if DK:
        start = _start(dk_ptr, strides.dk, b, head, n0)
        tl.store(start + (n * strides.dk.token)[:, None] + d[None, :], (dk * (scale / _log2e())).to(dk_ptr.dtype.element_ty), mask=inside)
    if DV:
        start = _start(dv_ptr, strides.dv, b, head, n0)
        tl.store(start + (n * strides.dv.token)[:, None] + d[None, :], dv.to(dv_ptr.dtype.element_ty), mask=inside)
