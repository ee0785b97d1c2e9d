"""The mask of cross-attention in compact form: bool -> bits, tiles -> bits, rows -> lists of blocks.

A row of bits has W = 4 NK words of int32, NK = ceil(s_e / 128); column n is bit n % 32 of word n // 32, bits past s_e are 0.
"""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["stride_b", "stride_s", "s", "width", "NK"])
def pack_mask_kernel(
    mask_ptr, bits_ptr, empty_ptr, stride_b, stride_s, stride_n, s, width, NK, FLAGS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_W: tl.constexpr
):
    """bits [b, s, 4 NK] of mask [b, s, width], any strides; empty [b, s]: rows without a bit. Program (row block, batch).

    An element of mask has FLAGS flags, a byte each: four at once where rows are whole words, as those of 4 tiles of 1601 tokens are.
    """
    tl.static_assert(FLAGS == 1 or FLAGS == 4)
    b = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    each: tl.constexpr = 32 // FLAGS  # elements of a word
    offs_n, w = tl.arange(0, BLOCK_W * each), tl.arange(0, BLOCK_W)
    src = (mask_ptr + b * stride_b + row * stride_s)[:, None] + (offs_n.to(tl.int64) * stride_n)[None, :]
    dst = (bits_ptr + (b * s + row) * (4 * NK))[:, None] + w[None, :]
    some = tl.zeros((BLOCK_S, BLOCK_W), tl.int32)
    for start in range(0, 4 * NK, BLOCK_W):
        flags = tl.load(src, mask=(row < s)[:, None] & (offs_n < width - start * each)[None, :], other=0)
        if FLAGS == 1:
            part = (flags != 0).to(tl.int32)
        else:
            flags = flags | (flags >> 4)  # any byte but 0 is true
            flags = flags | (flags >> 2)
            flags = (flags | (flags >> 1)) & 0x01010101
            part = ((flags * 0x01020408) >> 24) & 15  # adds flag i, bit 8 i, at bit 24 + i, where no two others meet
        words = tl.sum((part << (offs_n % each * FLAGS)[None, :]).reshape(BLOCK_S, BLOCK_W, each), 2)
        tl.store(dst + start, words, mask=(row < s)[:, None] & (w < 4 * NK - start)[None, :])
        some = some | words
        src += BLOCK_W * each * stride_n
    tl.store(empty_ptr + b * s + row, tl.max((some != 0).to(tl.int32), 1) == 0, mask=row < s)


@triton.jit(do_not_specialize=["s", "n_tiles", "tokens_per_tile", "NK"])
def pack_tiles_kernel(
    visible_ptr, bits_ptr, empty_ptr, s, n_tiles, tokens_per_tile, NK,
    TILES_IN_A_WORD: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_W: tl.constexpr,
):  # fmt: skip
    """bits [b, s, 4 NK] of visible [b, s, n_tiles], a byte for tokens_per_tile columns; empty [b, s]. Program (row block, batch)."""
    b = tl.program_id(1).to(tl.int64)
    row = tl.program_id(0).to(tl.int64) * BLOCK_S + tl.arange(0, BLOCK_S)
    base = visible_ptr + (b * s + row) * n_tiles
    out = bits_ptr + (b * s + row) * (4 * NK)
    some = tl.zeros((BLOCK_S, BLOCK_W), tl.int32)
    for start in range(0, 4 * NK, BLOCK_W):
        w = start + tl.arange(0, BLOCK_W)
        words = tl.zeros((BLOCK_S, BLOCK_W), tl.int32)
        for i in range(0, TILES_IN_A_WORD):
            tile = w * 32 // tokens_per_tile + i
            first = tile * tokens_per_tile - w * 32  # the tile's columns, counted from the word's first
            lo, hi = tl.minimum(tl.maximum(first, 0), 32), tl.minimum(tl.maximum(first + tokens_per_tile, 0), 32)
            one = tl.full((BLOCK_W,), 1, tl.int64)
            part = ((one << hi.to(tl.int64)) - (one << lo.to(tl.int64))).to(tl.int32)
            seen = tl.load(base[:, None] + tile[None, :], mask=(row < s)[:, None] & (tile < n_tiles)[None, :], other=0) != 0
            words = words | tl.where(seen, part[None, :], 0)
        tl.store(out[:, None] + w[None, :], words, mask=(row < s)[:, None] & (w < 4 * NK)[None, :])
        some = some | words
    tl.store(empty_ptr + b * s + row, tl.max((some != 0).to(tl.int32), 1) == 0, mask=row < s)


@triton.jit(do_not_specialize=["s", "tokens", "NK"])
def block_states_kernel(rows_ptr, empty_ptr, states_ptr, s, tokens, NK, BITS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_K: tl.constexpr):
    """states [b, NQ, NK] of blocks of `tokens` rows and 128 columns: 0 nothing is seen, 2 all of it by every row that sees anything, else 1.

    rows: intervals [b, s, 2], or [b, s, 4 NK] with BITS; empty [b, s]. Program (row block, BLOCK_K column blocks, batch).
    """
    b = tl.program_id(2).to(tl.int64)
    first = tl.program_id(0).to(tl.int64) * tokens
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    parts: tl.constexpr = 4 if BITS else 1
    some = tl.zeros((BLOCK_K * parts,), tl.int32)
    every = tl.full((BLOCK_K * parts,), 1, tl.int32)
    for start in range(0, tokens, BLOCK_S):
        offs = start + tl.arange(0, BLOCK_S)
        row = first + offs
        mask = (offs < tokens) & (row < s)
        empty = tl.load(empty_ptr + b * s + row, mask=mask, other=1) != 0
        if BITS:
            w = tl.program_id(1) * BLOCK_K * 4 + tl.arange(0, BLOCK_K * 4)
            words = tl.load(rows_ptr + ((b * s + row) * (4 * NK))[:, None] + w[None, :], mask=mask[:, None] & (w < 4 * NK)[None, :], other=0)
            some_here, every_here = words != 0, words == -1
        else:
            at = rows_ptr + (b * s + row) * 2
            lo, hi = tl.load(at, mask=mask, other=0)[:, None], tl.load(at + 1, mask=mask, other=0)[:, None]
            some_here = (lo < (k * 128 + 128)[None, :]) & (hi > (k * 128)[None, :])
            every_here = (lo <= (k * 128)[None, :]) & (hi >= (k * 128 + 128)[None, :])
        some = some | tl.max(some_here.to(tl.int32), 0)
        every = every & tl.min((every_here | empty[:, None]).to(tl.int32), 0)
    if BITS:
        some, every = tl.max(some.reshape(BLOCK_K, 4), 1), tl.min(every.reshape(BLOCK_K, 4), 1)
    states = tl.where(some != 0, 1 + every, 0)
    out = states_ptr + (b * tl.num_programs(0) + tl.program_id(0)) * NK
    tl.store(out + k, states.to(tl.int8), mask=k < NK)


@triton.jit(do_not_specialize=["stride_b", "stride_l", "stride_n", "length"])
def block_list_kernel(states_ptr, list_ptr, counts_ptr, stride_b, stride_l, stride_n, length, BLOCK: tl.constexpr):
    """list [b, lists, length] of the indices in a row of `length` states: those of state 2, then those of state 1, then 0; counts [b, lists, 2].

    Program (list, batch), twice over its states: how many of each there are says where each goes.
    """
    at = tl.program_id(1).to(tl.int64) * tl.num_programs(0) + tl.program_id(0)
    base = states_ptr + tl.program_id(1).to(tl.int64) * stride_b + tl.program_id(0).to(tl.int64) * stride_l
    n_full, n_seen = 0, 0
    for start in range(0, length, BLOCK):
        i = start + tl.arange(0, BLOCK)
        state = tl.load(base + i.to(tl.int64) * stride_n, mask=i < length, other=0)
        n_full += tl.sum((state == 2).to(tl.int32), 0)
        n_seen += tl.sum((state != 0).to(tl.int32), 0)
    tl.store(counts_ptr + at * 2, n_full)
    tl.store(counts_ptr + at * 2 + 1, n_seen)
    full_before, seen_before = 0, 0
    for start in range(0, length, BLOCK):
        i = start + tl.arange(0, BLOCK)
        state = tl.load(base + i.to(tl.int64) * stride_n, mask=i < length, other=0)
        full, seen = (state == 2).to(tl.int32), (state != 0).to(tl.int32)
        full_to, seen_to = full_before + tl.cumsum(full, 0), seen_before + tl.cumsum(seen, 0)  # this one included
        place = tl.where(full != 0, full_to - 1, tl.where(seen != 0, n_full + seen_to - full_to - 1, n_seen + i - seen_to))
        tl.store(list_ptr + at * length + place, tl.where(seen != 0, i, 0), mask=i < length)
        full_before += tl.sum(full, 0)
        seen_before += tl.sum(seen, 0)
