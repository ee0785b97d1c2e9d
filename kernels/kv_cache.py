"""Writing encoder tokens into a cache of keys and values, where it lies."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["s_e", "max_len", "heads"])
def kv_cache_write_kernel(
    k_ptr, v_ptr, k_cache_ptr, v_cache_ptr, places_ptr, held_ptr, strides, s_e, max_len, heads, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr
):
    """k_cache[b, head, place(b, n)] = k[b, head, n] where that is a place, and v likewise. Program (block of columns n, batch row and key head).

    place: places [b, s_e], -1 for a token that is left out, which is not read either; where None n counted from held[b] - s_e, the tokens being
    the last that are held. Caches: contiguous [b, heads, max_len, D], nothing is written at or past max_len. strides: CacheStrides.
    """
    n, bh = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N), tl.program_id(1)
    b, head = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    if places_ptr is not None:
        place = tl.load(places_ptr + b * s_e + n, mask=n < s_e, other=-1)
    else:
        place = tl.where(n < s_e, tl.load(held_ptr + b) - s_e + n, -1)
    d = tl.arange(0, BLOCK_D)
    mask = ((place >= 0) & (place < max_len))[:, None] & (d < D)[None, :]
    row = n.to(tl.int64)
    x = tl.load((k_ptr + b * strides.k.batch + head * strides.k.head + row * strides.k.token)[:, None] + d[None, :], mask=mask)
    y = tl.load((v_ptr + b * strides.v.batch + head * strides.v.head + row * strides.v.token)[:, None] + d[None, :], mask=mask)
    at = ((bh.to(tl.int64) * max_len + place) * D)[:, None] + d[None, :]
    tl.store(k_cache_ptr + at, x, mask=mask)
    tl.store(v_cache_ptr + at, y, mask=mask)
