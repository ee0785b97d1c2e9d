"""Patch embedding: pixels to placed tokens.

Row r = tile * padded + token of the result [tiles * padded, N]. A tile has `patches` patches in row-major order and a CLS token
before or after them, or none; rows past the last token are padding and stay zero. Of arguments.py, `image` is an Image, `shape` a Geometry and
`tables` a Placed.
"""

import triton
import triton.language as tl


@triton.jit
def _gate(x):
    """(tanh(x), 1 - tanh(x)) to fp32's last digits, out of fp64. Near zero, where gates begin, (1 - e) / (1 + e) loses even those: there the series to x^9."""
    x = x.to(tl.float64)
    s = x * x
    near = x * (1 + s * (-1 / 3 + s * (2 / 15 + s * (-17 / 315 + s * (62 / 2835)))))
    e = tl.exp(-2 * tl.abs(x))
    far = (1 - e) / (1 + e)
    rest = tl.where(x < 0, 2.0, 2 * e) / (1 + e)
    tanh, rest = tl.where(s < 0.04, near, tl.where(x < 0, -far, far)), tl.where(s < 0.04, 1 - near, rest)
    return tanh.to(tl.float32), rest.to(tl.float32)


@triton.jit(do_not_specialize=["n", "n_tiles"])
def tile_rows_kernel(aspect_ptr, gate_ptr, pre_gate_ptr, rows_ptr, factors_ptr, fits_ptr, n, n_tiles, side, entries, IDS: tl.constexpr, BLOCK: tl.constexpr):
    """rows[image, tile]: the tables' row for it, -1 where it has none; factors of the gates; fits: whether every ratio has its place.

    aspect: (h, w) of each image, tile t at row (t // w) * side + t % w where t < h w; with IDS its entry in tables of `side` rows
    an entry. One program: n = images * n_tiles is small.
    """
    fits = 1
    for start in range(0, n, BLOCK):
        offs = start + tl.arange(0, BLOCK)
        mask = offs < n
        image, tile = offs // n_tiles, offs % n_tiles
        if IDS:
            entry = tl.load(aspect_ptr + image, mask=mask, other=0)  # compared as wide as it is
            ok = (entry >= 0) & (entry < entries)
            row = tl.where(ok, entry.to(tl.int32) * side + tile, -1)
        else:
            h = tl.load(aspect_ptr + 2 * image, mask=mask, other=0)
            w = tl.load(aspect_ptr + 2 * image + 1, mask=mask, other=0)
            ok = (h >= 0) & (w >= 0) & (h <= side) & (w <= side)
            h, w = tl.where(ok, h, 0).to(tl.int32), tl.where(ok, w, 0).to(tl.int32)
            ok = ok & (h * w <= n_tiles)
            across = tl.maximum(w, 1)
            row = tl.where(ok & (tile < h * w), tile // across * side + tile % across, -1)
        tl.store(rows_ptr + offs, row, mask=mask)
        fits = fits & tl.min((ok | (offs >= n)).to(tl.int32), 0)
    tl.store(fits_ptr, fits != 0)
    gate, local = 1.0, 1.0
    if gate_ptr is not None:
        gate, local = _gate(tl.load(gate_ptr))
    pre = 1.0
    if pre_gate_ptr is not None:
        pre, _ = _gate(tl.load(pre_gate_ptr))
    tl.store(factors_ptr, local)
    tl.store(factors_ptr + 1, gate)
    tl.store(factors_ptr + 2, pre)


@triton.jit
def _per_channel(values, channel):
    """values[channel]; a single value serves all."""
    out = tl.zeros(channel.shape, tl.float32) + values[0]
    for i in tl.static_range(1, len(values)):
        out = tl.where(channel >= i, values[i], out)
    return out


@triton.jit
def _pixels(images_ptr, image, shape, scale, shift, row, k, M, CHANNELS: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, LINE: tl.constexpr):
    """The pixels [rows, k] of rows of the result, k = (channel, line, pixel of LINE >= PATCH_W); zero where there are none."""
    tile, token = row // shape.padded, row % shape.padded
    patch = token - shape.first
    there = (row < M) & (patch >= 0) & (patch < shape.patches)
    patch = tl.where(there, patch, 0)
    start = (
        tile.to(tl.int64) * image.stride_tile
        + (patch // image.across).to(tl.int64) * PATCH_H * image.stride_line
        + (patch % image.across) * PATCH_W * image.stride_pixel
    )
    channel, line, pixel = k // (PATCH_H * LINE), k // LINE % PATCH_H, k % LINE
    offset = channel * image.stride_channel + line * image.stride_line + pixel * image.stride_pixel
    mask = there[:, None] & ((pixel < PATCH_W) & (channel < CHANNELS))[None, :]
    x = tl.load((images_ptr + start)[:, None] + offset[None, :], mask=mask, other=0)
    if scale is not None:
        x = x.to(tl.float32) * _per_channel(scale, channel)[None, :] + _per_channel(shift, channel)[None, :]
        x = tl.where(mask, x, 0.0)
    return x


@triton.jit(do_not_specialize=["M"])
def patchify_kernel(
    images_ptr, a_ptr, image, shape, scale, shift, M, K,
    CHANNELS: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A [M, K]: a patch a row, (channel, line, pixel) then zeros; zero rows for CLS and padding. Program (m, k): a block of it."""
    start = tl.program_id(0).to(tl.int64) * BLOCK_M
    offs_m = tl.arange(0, BLOCK_M)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    x = _pixels(images_ptr, image, shape, scale, shift, start.to(tl.int32) + offs_m, k, M, CHANNELS, PATCH_H, PATCH_W, PATCH_W)
    mask = (start + offs_m < M)[:, None] & (k < K)[None, :]
    tl.store(a_ptr + start * K + offs_m[:, None] * K + k[None, :], x.to(a_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_row(ptr, n, N):
    return tl.load(ptr + n, mask=n < N, other=0.0).to(tl.float32)


@triton.jit
def _place(x, row, n, M, N, tables, shape):
    """x [rows, n] in fp32 plus everything that has its place there."""
    tile, token = row // shape.padded, row % shape.padded
    patch = token - shape.first
    inside = (n < N)[None, :]
    is_token = ((row < M) & (token < shape.tokens))[:, None] & inside
    is_patch = ((row < M) & (patch >= 0) & (patch < shape.patches))[:, None] & inside
    if tables.bias is not None:
        x += tl.where(is_patch, _load_row(tables.bias, n, N)[None, :], 0.0)
    if tables.cls is not None:
        x += tl.where(is_token & (token == shape.cls_at)[:, None], _load_row(tables.cls, n, N)[None, :], 0.0)
    if tables.local_pos is not None:
        local = tl.load(tables.local_pos + token[:, None] * N + n[None, :], mask=is_token, other=0.0).to(tl.float32)
        x += local if tables.factors is None else local * tl.load(tables.factors)
    if tables.rows is not None:
        placed = tl.load(tables.rows + tile, mask=row < M, other=-1)
        if tables.global_pos is not None:
            start = (tl.maximum(placed, 0).to(tl.int64) * shape.tokens + token) * N
            value = tl.load((tables.global_pos + start)[:, None] + n[None, :], mask=is_token & (placed >= 0)[:, None], other=0.0)
            x += value.to(tl.float32) * tl.load(tables.factors + 1)
        if tables.pre_pos is not None:
            start = tl.maximum(placed, 0) * N
            value = tl.load((tables.pre_pos + start)[:, None] + n[None, :], mask=is_patch & (placed >= 0)[:, None], other=0.0)
            x += value.to(tl.float32) * tl.load(tables.factors + 2)
    return x


@triton.jit
def _strips(x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, COUNT: tl.constexpr):
    """The columns of x in COUNT strips, side by side."""
    if COUNT == 1:
        return (x,)
    else:
        left, right = tl.split(x.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1))
        return _strips(left, BLOCK_M, BLOCK_N // 2, COUNT // 2) + _strips(right, BLOCK_M, BLOCK_N // 2, COUNT // 2)


@triton.jit(do_not_specialize=["M"])
def patch_embed_fwd_kernel(
    x_ptr, w_ptr, out_ptr, tables, image, shape, scale, shift, M, N, K,
    DIRECT: tl.constexpr, CHANNELS: tl.constexpr, PATCH_H: tl.constexpr, PATCH_W: tl.constexpr, LINE: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, SUBTILES: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """out = place(A W^T), W [N, K] with K a multiple of BLOCK_K. x: the images with DIRECT, else A [M, K] from patchify_kernel.

    Program p takes tiles p, p + programs, ... of the result, those of one row block side by side, so that A is read from L2 after the
    first; with FLATTEN, as many programs as multiprocessors, the next tile's loads start under the epilogue of this one. The epilogue goes in SUBTILES strips of columns, one after another: a whole one of 128 x 256 spills 1296 bytes on sm_90.
    """
    across = tl.cdiv(N, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tl.cdiv(M, BLOCK_M) * across, tl.num_programs(0), flatten=FLATTEN):
        start = (tile // across).to(tl.int64) * BLOCK_M
        offs_m = tl.arange(0, BLOCK_M)
        row = start.to(tl.int32) + offs_m
        n0 = tile % across * BLOCK_N
        offs_n = n0 + tl.arange(0, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k0 in range(0, K, BLOCK_K):
            k = k0 + tl.arange(0, BLOCK_K)
            if DIRECT:
                x = _pixels(x_ptr, image, shape, scale, shift, row, k, M, CHANNELS, PATCH_H, PATCH_W, LINE).to(w_ptr.dtype.element_ty)
            else:
                x = tl.load(x_ptr + start * K + offs_m[:, None] * K + k[None, :], mask=(row < M)[:, None], other=0.0)
            w = tl.load(w_ptr + offs_n[None, :] * K + k[:, None], mask=(offs_n < N)[None, :], other=0.0)
            acc = tl.dot(x, w, acc, input_precision=PRECISION)
        n = n0 + tl.arange(0, BLOCK_N // SUBTILES)
        strips = _strips(acc, BLOCK_M, BLOCK_N, SUBTILES)
        for i in tl.static_range(SUBTILES):
            at = n + i * (BLOCK_N // SUBTILES)
            y = _place(strips[i], row, at, M, N, tables, shape)
            tl.store(out_ptr + start * N + offs_m[:, None] * N + at[None, :], y.to(out_ptr.dtype.element_ty), mask=(row < M)[:, None] & (at < N)[None, :])


@triton.jit(do_not_specialize=["M"])
def place_kernel(
    x_ptr, y_ptr, kept_ptr, stats_ptr, tables, norm_w_ptr, norm_b_ptr, shape, M, N, eps, NORM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """y = place(x), with NORM its layer norm over N <= BLOCK_N in fp32. Program m: BLOCK_M whole rows.

    kept, where given, takes place(x) itself; stats [2, M] then its mean and 1 / deviation. y may be x.
    """
    start = tl.program_id(0).to(tl.int64) * BLOCK_M
    offs_m, n = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    row = start.to(tl.int32) + offs_m
    mask = (row < M)[:, None] & (n < N)[None, :]
    offs = start * N + offs_m[:, None] * N + n[None, :]
    x = _place(tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32), row, n, M, N, tables, shape)
    if kept_ptr is not None:
        tl.store(kept_ptr + offs, x.to(kept_ptr.dtype.element_ty), mask=mask)
    if NORM:
        mean = tl.sum(x, 1) / N
        centred = tl.where(mask, x - mean[:, None], 0.0)
        rstd = 1 / tl.sqrt_rn(tl.sum(centred * centred, 1) / N + eps)
        if stats_ptr is not None:
            tl.store(stats_ptr + row, mean, mask=row < M)
            tl.store(stats_ptr + M + row, rstd, mask=row < M)
        x = centred * rstd[:, None]
        if norm_w_ptr is not None:
            x *= _load_row(norm_w_ptr, n, N)[None, :]
        if norm_b_ptr is not None:
            x += _load_row(norm_b_ptr, n, N)[None, :]
        x = tl.where((row % shape.padded < shape.tokens)[:, None], x, 0.0)  # padding is not normalised
    tl.store(y_ptr + offs, x.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M", "rows"])
def norm_bwd_kernel(dy_ptr, x_ptr, stats_ptr, w_ptr, dx_ptr, dw_ptr, db_ptr, shape, M, N, rows, BLOCK_N: tl.constexpr):
    """dx = rstd (g - mean(g) - xhat mean(g xhat)), g = dy w; dw = sum of dy xhat, db = sum of dy over the rows of tokens.

    Program p: rows p * rows .. (p + 1) * rows, whose dw and db [programs, N] are added up afterwards, in order.
    """
    p = tl.program_id(0)
    n = tl.arange(0, BLOCK_N)
    mask = n < N
    w = tl.full((BLOCK_N,), 1.0, tl.float32)
    if w_ptr is not None:
        w = _load_row(w_ptr, n, N)
    dw, db = tl.zeros((BLOCK_N,), tl.float32), tl.zeros((BLOCK_N,), tl.float32)
    offs = (p * rows).to(tl.int64) * N + n
    for row in range(p * rows, tl.minimum((p + 1) * rows, M)):
        real = row % shape.padded < shape.tokens
        here = (mask & real) != 0  # a block and a flag are an integer in the interpreter, which 3.9 takes for no mask
        dy = tl.load(dy_ptr + offs, mask=here, other=0.0).to(tl.float32)
        mean = tl.load(stats_ptr + row)
        rstd = tl.load(stats_ptr + M + row, mask=real, other=0.0)  # of a padding row infinite where eps is 0
        xhat = tl.where(mask, tl.load(x_ptr + offs, mask=here, other=0.0).to(tl.float32) - mean, 0.0) * rstd
        g = dy * w
        dx = (g - tl.sum(g, 0) / N - xhat * (tl.sum(g * xhat, 0) / N)) * rstd
        tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
        dw += dy * xhat
        db += dy
        offs += N
    tl.store(dw_ptr + p * N + n, dw, mask=mask)
    tl.store(db_ptr + p * N + n, db, mask=mask)


@triton.jit
def _sum_of_tiles(total, dy_ptr, order_ptr, first, last, stride, offs, mask, TILES: tl.constexpr):
    """total + the blocks of the tiles order[first .. last), TILES loads under way at a time."""
    for start in range(first, last, TILES):
        j = start + tl.arange(0, TILES)
        tile = tl.load(order_ptr + j, mask=j < last, other=0).to(tl.int64) * stride
        block = tl.load((dy_ptr + tile)[:, None, None] + offs[None, :, :], mask=(j < last)[:, None, None] & mask[None, :, :], other=0.0)
        total += tl.sum(block.to(tl.float32), 0)
    return total


@triton.jit
def place_bwd_kernel(
    dy_ptr, order_ptr, starts_ptr, table_ptr, local_ptr, factors_ptr, total_ptr, dtable_ptr, pre_ptr, dots_ptr, shape, N, rows,
    BLOCK_T: tl.constexpr, BLOCK_N: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Every table's gradient in one pass over dy, without atomics. Program (t, n): a block of tokens and columns, over all tiles.

    order: the tiles sorted by their row, those without one first; starts [rows + 1]: where each row's tiles begin.
    total [tokens, N] = sum of dy over all tiles;  dtable [rows, tokens, N] = factor * sum over the row's tiles;
    pre [programs t, rows, N] = that sum over the block's patches;  dots [programs, 2] = <sums, table>, <total, local>.
    """
    pid_t, pid_n = tl.program_id(0), tl.program_id(1)
    token = pid_t * BLOCK_T + tl.arange(0, BLOCK_T)
    n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (token < shape.tokens)[:, None] & (n < N)[None, :]
    is_patch = ((token >= shape.first) & (token < shape.first + shape.patches))[:, None]
    offs = token[:, None] * N + n[None, :]
    total = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    along = tl.zeros((BLOCK_T, BLOCK_N), tl.float32)
    total = _sum_of_tiles(total, dy_ptr, order_ptr, 0, tl.load(starts_ptr), shape.padded * N, offs, mask, TILES)
    start = pid_t.to(tl.int64) * 0  # of the row in the table
    for row in range(0, rows):
        first, last = tl.load(starts_ptr + row), tl.load(starts_ptr + row + 1)
        part = _sum_of_tiles(tl.zeros((BLOCK_T, BLOCK_N), tl.float32), dy_ptr, order_ptr, first, last, shape.padded * N, offs, mask, TILES)
        total += part
        if dtable_ptr is not None:
            tl.store(dtable_ptr + start + offs, (part * tl.load(factors_ptr + 1)).to(dtable_ptr.dtype.element_ty), mask=mask)
        if dots_ptr is not None:
            has_tiles = (mask & (last > first)) != 0
            along += part * tl.load(table_ptr + start + offs, mask=has_tiles, other=0.0).to(tl.float32)
        if pre_ptr is not None:
            tl.store(pre_ptr + (pid_t * rows + row) * N + n, tl.sum(tl.where(is_patch, part, 0.0), 0), mask=n < N)
        start += shape.tokens * N
    tl.store(total_ptr + offs, total, mask=mask)
    if dots_ptr is not None:
        at = dots_ptr + (pid_t * tl.num_programs(1) + pid_n) * 2
        tl.store(at, tl.sum(along))
        local = total
        if local_ptr is not None:
            local = total * tl.load(local_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        tl.store(at + 1, tl.sum(local))
