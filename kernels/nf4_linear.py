"""Linear layers over NF4 weights: decode, matrix product, low-rank update, scale and bias, for one weight or several that share x.

A group is a tuple of arguments.py's Operand. PROJECTIONS is its length: Triton 3.6 cannot take the len() of a tuple that has None in it.
"""

import triton
import triton.language as tl

from fastfuse.kernels.arguments import FlatScales, NestedScales, NF4Weight, TorchaoScales
from fastfuse.kernels.lora import keep_mask
from fastfuse.kernels.nf4 import block_scale, decode


@triton.jit
def _select_scales(take, one, other):
    if len(one) == 1:
        return FlatScales(tl.where(take, other.absmax, one.absmax))
    elif len(one) == 3:
        return TorchaoScales(tl.where(take, other.scaler, one.scaler), tl.where(take, other.factor, one.factor), tl.where(take, other.mean, one.mean))
    else:
        return NestedScales(
            tl.where(take, other.index, one.index),
            tl.where(take, other.code, one.code),
            tl.where(take, other.absmax, one.absmax),
            tl.where(take, other.offset, one.offset),
        )


@triton.jit
def _nth(values, index):
    """Of a pointer for each layer of the group that of number `index`."""
    value = values[0]
    for i in tl.static_range(1, len(values)):
        value = tl.where(index == i, values[i], value)
    return value


@triton.jit
def _projection(group, tile, PROJECTIONS: tl.constexpr, BLOCK_N: tl.constexpr):
    """The projection that output tile number `tile` belongs to: its number, what every projection has, the tile's number in it,
    and the first column of its x A^T."""
    weight, out, N, R, scaling = group[0].weight, group[0].out, group[0].N, group[0].R, group[0].scaling
    index = 0
    first = 0
    column = 0
    tiles_before = 0
    ranks_before = 0
    for i in tl.static_range(1, PROJECTIONS):
        other = group[i]
        tiles_before += tl.cdiv(group[i - 1].N, BLOCK_N)
        ranks_before += group[i - 1].R
        take = tile >= tiles_before
        index = tl.where(take, i, index)
        weight = NF4Weight(
            tl.where(take, other.weight.packed, weight.packed),
            tl.where(take, other.weight.code, weight.code),
            _select_scales(take, weight.scales, other.weight.scales),
        )
        out = tl.where(take, other.out, out)
        N = tl.where(take, other.N, N)
        R = tl.where(take, other.R, R)
        scaling = tl.where(take, other.scaling, scaling)
        first = tl.where(take, tiles_before, first)
        column = tl.where(take, ranks_before, column)
    return index, weight, out, N, R, scaling, tile - first, column


@triton.jit
def _block(first, k, BLOCK_SIZE: tl.constexpr, BLOCK_K: tl.constexpr):
    """The index of element first + k's scale block. It fits 32 bits, and mostly only a scalar of it changes with k."""
    if BLOCK_K % BLOCK_SIZE == 0:
        return (first // BLOCK_SIZE).to(tl.int32) + k // BLOCK_SIZE
    else:
        return ((first + k) // BLOCK_SIZE).to(tl.int32)


@triton.constexpr_function
def _precision(DECODE):
    """Of products with adapters, which PEFT keeps in fp32: three tf32 products keep them so on the matrix unit."""
    return "tf32x3" if DECODE == "prmt" else "ieee"


@triton.jit
def _inputs(first_k, K, BLOCK_SIZE: tl.constexpr, BLOCK_K: tl.constexpr, CUT_K: tl.constexpr):
    """(columns, bytes, scale blocks' first columns) of BLOCK_K inputs. CUT_K: those past K repeat the last ones; the compiler then loads byte by byte."""
    in_k = first_k + tl.arange(0, BLOCK_K)
    bytes_k = first_k // 2 + tl.arange(0, BLOCK_K // 2)
    blocks_k = first_k + tl.arange(0, max(BLOCK_K // BLOCK_SIZE, 1)) * BLOCK_SIZE
    if CUT_K:
        return tl.minimum(in_k, K - 1), tl.minimum(bytes_k, K // 2 - 1), tl.minimum(blocks_k, K - 1)
    else:
        return in_k, bytes_k, blocks_k


@triton.jit
def _decoded(
    weight, rows_n, bytes_k, blocks_k, K,
    DTYPE: tl.constexpr, BLOCK_SIZE: tl.constexpr, SCALE_BLOCK: tl.constexpr, DECODE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """W [rows_n, inputs] in DTYPE, the inputs as _inputs gives them."""
    packed = tl.load(weight.packed + rows_n[:, None] * (K // 2) + bytes_k[None, :])
    scale = block_scale(weight.scales, ((rows_n[:, None] * K + blocks_k[None, :]) // BLOCK_SIZE).to(tl.int32), SCALE_BLOCK)
    return decode(packed, scale, weight, DTYPE, DECODE, BLOCK_N, max(BLOCK_K // BLOCK_SIZE, 1), BLOCK_K // 2)


@triton.jit
def _ranks(rows_ptr, offs_r, R):
    """Columns offs_r of the rows of x A^T or of B, 0 past its rank."""
    return tl.load(rows_ptr + offs_r[None, :], mask=offs_r[None, :] < R, other=0.0)


@triton.jit
def _store(acc, group, index, out_ptr, offs_m, offs_n, M, N):
    """out = factor * acc + bias, and pre_scale = acc where the backward of a factor will need it."""
    rows_n = tl.minimum(offs_n, N - 1)
    offs = offs_m[:, None] * N + offs_n[None, :]
    mask = (offs_m[:, None] < M) & (offs_n[None, :] < N)
    if group[0].pre_scale is not None:
        pre_scale_ptr = _nth([layer.pre_scale for layer in group], index)
        tl.store(pre_scale_ptr + offs, acc.to(pre_scale_ptr.dtype.element_ty), mask=mask)
    if group[0].factor is not None:
        acc *= tl.load(_nth([layer.factor for layer in group], index) + rows_n)[None, :].to(tl.float32)
    if group[0].bias is not None:
        acc += tl.load(_nth([layer.bias for layer in group], index) + rows_n)[None, :].to(tl.float32)
    tl.store(out_ptr + offs, acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["M"])  # else one token, 16 and 17 are three compilations of the same code
def nf4_linear_fwd_kernel(
    x_ptr, group, xa_ptr,
    stride_xm, stride_xam,
    M, K,
    PROJECTIONS: tl.constexpr, BLOCK_SIZE: tl.constexpr, SCALE_BLOCK: tl.constexpr, DECODE: tl.constexpr, TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[m, n] = factor[n] * (sum_k x[m, k] W[n, k]  +  scaling * sum_r xa[m, r] B[n, r])  +  bias[n] for every projection.

    Program p computes one tile of BLOCK_M tokens and BLOCK_N features; tiles of the same features are neighbours, so
    that a packed weight is read from HBM once. K must be a multiple of BLOCK_K. TRANSPOSED computes out^T = W x^T, which
    makes the decoded weight the register operand of wgmma; the other order needs fewer registers for few tokens.
    """
    tl.static_assert(BLOCK_K % 32 == 0 and BLOCK_SIZE % 32 == 0)
    tl.assume(K >= BLOCK_K)  # a loop that may run zero times makes ptxas wait for every wgmma (its C7515 warning)
    DTYPE: tl.constexpr = x_ptr.dtype.element_ty
    GROUPS: tl.constexpr = max(BLOCK_K // BLOCK_SIZE, 1)  # scales per row and step
    tiles_m = tl.cdiv(M, BLOCK_M)
    pid_m = tl.program_id(0) % tiles_m
    index, weight, out_ptr, N, R, scaling, pid_n, column = _projection(group, tl.program_id(0) // tiles_m, PROJECTIONS, BLOCK_N)
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_m = tl.minimum(offs_m, M - 1)  # rows past the end repeat the last one and are not stored
    rows_n = tl.minimum(offs_n, N - 1)
    offs_k = tl.arange(0, BLOCK_K)
    packed_ptrs = weight.packed + rows_n[:, None] * (K // 2) + tl.arange(0, BLOCK_K // 2)[None, :]
    first = rows_n[:, None] * K + tl.arange(0, GROUPS)[None, :] * BLOCK_SIZE

    if TRANSPOSED:
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        x_ptrs = x_ptr + rows_m[None, :] * stride_xm + offs_k[:, None]
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        x_ptrs = x_ptr + rows_m[:, None] * stride_xm + offs_k[None, :]
    # With a factor Triton 3.9 spilled 8 bytes a thread on sm_80, of what it hoists out of the loop. Others keep it: torchao's loops would be 6% longer.
    for k in tl.range(0, K, BLOCK_K, disable_licm=group[0].factor is not None and not TRANSPOSED):
        packed = tl.load(packed_ptrs + k // 2)
        scale = block_scale(weight.scales, _block(first, k, BLOCK_SIZE, BLOCK_K), SCALE_BLOCK)
        w = decode(packed, scale, weight, DTYPE, DECODE, BLOCK_N, GROUPS, BLOCK_K // 2)
        x = tl.load(x_ptrs + k)
        if TRANSPOSED:
            acc = tl.dot(w, x, acc, input_precision="ieee")
        else:
            acc = tl.dot(x, w.T, acc, input_precision="ieee")

    if group[0].b is not None:
        b_ptr = _nth([layer.b for layer in group], index)
        BLOCK_R: tl.constexpr = 16  # the whole rank at once spills from rank 64 on sm_80
        for r in range(0, R, BLOCK_R):
            offs_r = r + tl.arange(0, BLOCK_R)
            xa = _ranks(xa_ptr + rows_m[:, None] * stride_xam + column, offs_r, R)
            b = _ranks(b_ptr + rows_n[:, None] * R, offs_r, R)
            b = (b * scaling).to(xa.dtype)  # into B, not into xa: an fp16 x A^T may be near the largest fp16
            if TRANSPOSED:
                acc = tl.dot(b, xa.T, acc, input_precision=_precision(DECODE))
            else:
                acc = tl.dot(xa, b.T, acc, input_precision=_precision(DECODE))
    if TRANSPOSED:
        acc = acc.T
    _store(acc, group, index, out_ptr, offs_m, offs_n, M, N)


@triton.jit
def _tile_of_weights(
    acc, offs, x_ptrs, group, tile, begin, end, K,
    DTYPE: tl.constexpr, PROJECTIONS: tl.constexpr, BLOCK_SIZE: tl.constexpr, SCALE_BLOCK: tl.constexpr, DECODE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Of tile number `tile` over the rows of every W, with k from begin to end: (acc + x W^T, offs of its rows in W, how many W has, column of W's first)."""
    GROUPS: tl.constexpr = max(BLOCK_K // BLOCK_SIZE, 1)
    _index, weight, _out, rows, _R, _scaling, number, _column = _projection(group, tile, PROJECTIONS, BLOCK_N)
    start = 0
    before = 0
    for i in tl.static_range(1, PROJECTIONS):
        before += tl.cdiv(group[i - 1].N, BLOCK_N)
        start += tl.where(tile >= before, group[i - 1].N, 0)
    offs += number * BLOCK_N
    rows_n = tl.minimum(offs, rows - 1).to(tl.int64)
    packed_ptrs = weight.packed + rows_n[:, None] * (K // 2) + begin // 2 + tl.arange(0, BLOCK_K // 2)[None, :]
    first = rows_n[:, None] * K + begin + tl.arange(0, GROUPS)[None, :] * BLOCK_SIZE
    for k in range(0, end - begin, BLOCK_K):  # from 0: a k whose sign is unknown is dearer to divide
        packed = tl.load(packed_ptrs + k // 2)
        scale = block_scale(weight.scales, _block(first, k, BLOCK_SIZE, BLOCK_K), SCALE_BLOCK)
        w = decode(packed, scale, weight, DTYPE, DECODE, BLOCK_N, GROUPS, BLOCK_K // 2)
        acc = tl.dot(tl.load(x_ptrs + k), w.T, acc, input_precision="ieee")
    return acc, offs, rows, start


@triton.jit
def _tile_of_adapters(
    acc, offs, x_ptr, rows_m, stride_xm, group, tile, columns_w, begin, end, K,
    PROJECTIONS: tl.constexpr, DECODE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The same of the rows of every A, which come behind the columns_w rows of the W."""
    rows = group[0].R
    index = 0
    number = tile
    start = columns_w
    before = 0
    ranks = 0
    for i in tl.static_range(1, PROJECTIONS):
        before += tl.cdiv(group[i - 1].R, BLOCK_N)
        ranks += group[i - 1].R
        take = tile >= before
        index = tl.where(take, i, index)
        rows = tl.where(take, group[i].R, rows)
        number = tl.where(take, tile - before, number)
        start = tl.where(take, columns_w + ranks, start)
    offs += number * BLOCK_N
    if group[0].a is not None:
        a_ptr = _nth([layer.a for layer in group], index)
        WIDE: tl.constexpr = tl.float32 if a_ptr.dtype.element_ty == tl.float32 else x_ptr.dtype.element_ty
        rows_r = tl.minimum(offs, rows - 1).to(tl.int64)
        STEP: tl.constexpr = min(BLOCK_K, 64)  # 128 of fp32 spill
        x_ptrs = x_ptr + rows_m[:, None].to(tl.int64) * stride_xm + begin + tl.arange(0, STEP)[None, :]
        a_ptrs = a_ptr + rows_r[:, None] * K + begin + tl.arange(0, STEP)[None, :]
        for k in tl.range(0, end - begin, STEP, num_stages=2):
            a = tl.load(a_ptrs + k).to(WIDE)
            acc = tl.dot(tl.load(x_ptrs + k).to(WIDE), a.T, acc, input_precision=_precision(DECODE))
    return acc, offs, rows, start


@triton.jit(do_not_specialize=["M"])
def nf4_skinny_kernel(
    x_ptr, group, part_ptr,
    stride_xm,
    M, K, columns,
    PROJECTIONS: tl.constexpr, BLOCK_SIZE: tl.constexpr, SCALE_BLOCK: tl.constexpr, DECODE: tl.constexpr, SPLIT_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """part[s, m, c] = sum of x[m, k] V[c, k] over the k of split s, in fp32; V's rows are those of every W, then those of every A.

    Program (t, s) computes all M <= BLOCK_M tokens of one tile of BLOCK_N rows of one W or one A. Few tokens have few tiles:
    the splits are what fills the chip. x A^T comes out of the same launch. K must be a multiple of BLOCK_K, SPLIT_K at most K / BLOCK_K.
    """
    tl.static_assert(BLOCK_K % 32 == 0 and BLOCK_SIZE % 32 == 0)
    tile = tl.program_id(0)
    split = tl.program_id(1)
    steps = K // BLOCK_K
    begin = split * steps // SPLIT_K * BLOCK_K
    end = (split + 1) * steps // SPLIT_K * BLOCK_K
    tl.assume(end > begin)
    tiles_w = 0
    columns_w = 0
    for i in tl.static_range(PROJECTIONS):
        tiles_w += tl.cdiv(group[i].N, BLOCK_N)
        columns_w += group[i].N
    rows_m = tl.minimum(tl.arange(0, BLOCK_M), M - 1)
    x_ptrs = x_ptr + rows_m[:, None].to(tl.int64) * stride_xm + begin + tl.arange(0, BLOCK_K)[None, :]
    offs = tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if tile < tiles_w:
        acc, offs, rows, start = _tile_of_weights(
            acc, offs, x_ptrs, group, tile, begin, end, K, x_ptr.dtype.element_ty, PROJECTIONS, BLOCK_SIZE, SCALE_BLOCK, DECODE, BLOCK_N, BLOCK_K
        )
    else:
        acc, offs, rows, start = _tile_of_adapters(
            acc, offs, x_ptr, rows_m, stride_xm, group, tile - tiles_w, columns_w, begin, end, K, PROJECTIONS, DECODE, BLOCK_N, BLOCK_K
        )
    offs_m = tl.arange(0, BLOCK_M)
    part_ptrs = part_ptr + (split * M + offs_m[:, None]).to(tl.int64) * columns + start + offs[None, :]
    tl.store(part_ptrs, acc, mask=(offs_m[:, None] < M) & (offs[None, :] < rows))


@triton.jit(do_not_specialize=["M"])
def nf4_skinny_reduce_kernel(
    part_ptr, group, xa_ptr,
    stride_xam,
    M, columns,
    PROJECTIONS: tl.constexpr, SPLIT_K: tl.constexpr, DECODE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """From nf4_skinny_kernel's partial sums, added in the order of the splits: out as nf4_linear_fwd_kernel, and xa = x A^T.

    Program p computes tile p of BLOCK_N features for all tokens; the first tile of each projection stores its xa.
    """
    index, _weight, out_ptr, N, R, scaling, pid_n, column = _projection(group, tl.program_id(0), PROJECTIONS, BLOCK_N)
    columns_w = 0
    start = 0
    before = 0
    for i in tl.static_range(PROJECTIONS):
        columns_w += group[i].N
        before += tl.cdiv(group[i].N, BLOCK_N)
        start += tl.where(tl.program_id(0) >= before, group[i].N, 0)
    offs_m = tl.arange(0, BLOCK_M).to(tl.int64)
    offs_n = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (offs_m[:, None] < M) & (offs_n[None, :] < N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for split in range(SPLIT_K):  # unrolled, 16 splits spill
        acc += tl.load(part_ptr + (split * M + offs_m[:, None]) * columns + start + offs_n[None, :], mask=mask, other=0.0)
    if group[0].b is not None:
        b_ptr = _nth([layer.b for layer in group], index)
        BLOCK_R: tl.constexpr = 16
        for r in range(0, R, BLOCK_R):
            offs_r = r + tl.arange(0, BLOCK_R)
            mask_r = (offs_m[:, None] < M) & (offs_r[None, :] < R)
            xa = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
            for split in range(SPLIT_K):
                xa += tl.load(part_ptr + (split * M + offs_m[:, None]) * columns + columns_w + column + offs_r[None, :], mask=mask_r, other=0.0)
            if pid_n == 0:
                tl.store(xa_ptr + offs_m[:, None] * stride_xam + column + offs_r[None, :], xa.to(xa_ptr.dtype.element_ty), mask=mask_r)
            b = tl.load(b_ptr + offs_n[:, None].to(tl.int64) * R + offs_r[None, :], mask=(offs_n[:, None] < N) & (offs_r[None, :] < R), other=0.0)
            acc = tl.dot(xa, (b.to(tl.float32) * scaling).T, acc, input_precision=_precision(DECODE))
    _store(acc, group, index, out_ptr, offs_m, offs_n, M, N)


@triton.jit(do_not_specialize=["M"])
def nf4_linear_dx_kernel(
    group, dxa_ptr, seeds_ptr, dx_ptr,
    stride_dxam,
    M, K,
    rescale, threshold,
    PROJECTIONS: tl.constexpr, BLOCK_SIZE: tl.constexpr, SCALE_BLOCK: tl.constexpr, DECODE: tl.constexpr, CUT_K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dx[m, k] = sum over projections of  sum_n dy[m, n] factor[n] W[n, k]  +  keep[m, k] * rescale * sum_r dxa[m, r] A[r, k].

    Program p computes one tile of BLOCK_M tokens and BLOCK_K inputs, over all features of all projections; dy takes `out`'s
    place in the group. keep is the dropout mask where seeds are given, one for each projection, rescale its 1 / (1 - p). CUT_K: K is no multiple of BLOCK_K.
    """
    tl.static_assert(BLOCK_K % 32 == 0 and BLOCK_SIZE % 32 == 0)
    DTYPE: tl.constexpr = dx_ptr.dtype.element_ty
    BLOCK_R: tl.constexpr = 16
    tiles_m = tl.cdiv(M, BLOCK_M)
    pid_m = tl.program_id(0) % tiles_m
    pid_k = tl.program_id(0) // tiles_m
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_m = tl.minimum(offs_m, M - 1)
    first_k = pid_k * BLOCK_K
    offs_k = first_k + tl.arange(0, BLOCK_K)
    in_k, bytes_k, blocks_k = _inputs(first_k, K, BLOCK_SIZE, BLOCK_K, CUT_K)
    acc = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
    column = 0
    for i in tl.static_range(PROJECTIONS):
        weight, a_ptr, factor_ptr, dy_ptr, N, R = group[i].weight, group[i].a, group[i].factor, group[i].out, group[i].N, group[i].R
        tl.assume(N > 0)
        for n in range(0, N, BLOCK_N):
            offs_n = n + tl.arange(0, BLOCK_N)
            rows_n = tl.minimum(offs_n, N - 1).to(tl.int64)
            w = _decoded(weight, rows_n, bytes_k, blocks_k, K, DTYPE, BLOCK_SIZE, SCALE_BLOCK, DECODE, BLOCK_N, BLOCK_K)
            dy = tl.load(dy_ptr + rows_m[:, None] * N + offs_n[None, :], mask=offs_n[None, :] < N, other=0.0)
            if factor_ptr is not None:
                dy = (dy.to(tl.float32) * tl.load(factor_ptr + rows_n)[None, :].to(tl.float32)).to(DTYPE)
            acc = tl.dot(dy, w, acc, input_precision="ieee")
        if a_ptr is not None:
            delta = tl.zeros((BLOCK_M, BLOCK_K), tl.float32)
            for r in range(0, R, BLOCK_R):
                offs_r = r + tl.arange(0, BLOCK_R)
                dxa = _ranks(dxa_ptr + rows_m[:, None] * stride_dxam + column, offs_r, R)
                a = tl.load(a_ptr + offs_r[:, None].to(tl.int64) * K + in_k[None, :], mask=offs_r[:, None] < R, other=0.0).to(dxa.dtype)
                delta = tl.dot(dxa, a, delta, input_precision=_precision(DECODE))
            if seeds_ptr is not None:
                keep = keep_mask(tl.load(seeds_ptr + i), offs_m, first_k, threshold, BLOCK_M, BLOCK_K)
                delta = tl.where(keep, delta, 0.0)
            acc += delta * rescale
            column += R
    tl.store(dx_ptr + offs_m[:, None] * K + offs_k[None, :], acc.to(DTYPE), mask=(offs_m[:, None] < M) & (offs_k[None, :] < K))


@triton.jit
def nf4_row_norms_kernel(
    weight, a_ptr, b_ptr, norms_ptr,
    N, K, R,
    scaling,
    DTYPE: tl.constexpr, BLOCK_SIZE: tl.constexpr, SCALE_BLOCK: tl.constexpr, DECODE: tl.constexpr, CUT_K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """norms[n] = || W[n, :] + scaling * B[n, :] A ||, W decoded in DTYPE; nothing of W's size is stored.

    Program p computes BLOCK_N norms. CUT_K: K is no multiple of BLOCK_K.
    """
    BLOCK_R: tl.constexpr = 16
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_n = tl.minimum(offs_n, N - 1).to(tl.int64)
    squares = tl.zeros((BLOCK_N,), tl.float32)
    for k in range(0, K, BLOCK_K):
        offs_k = k + tl.arange(0, BLOCK_K)
        in_k, bytes_k, blocks_k = _inputs(k, K, BLOCK_SIZE, BLOCK_K, CUT_K)
        w = _decoded(weight, rows_n, bytes_k, blocks_k, K, DTYPE, BLOCK_SIZE, SCALE_BLOCK, DECODE, BLOCK_N, BLOCK_K).to(tl.float32)
        if a_ptr is not None:
            for r in range(0, R, BLOCK_R):
                offs_r = r + tl.arange(0, BLOCK_R)
                b = _ranks(b_ptr + rows_n[:, None] * R, offs_r, R).to(tl.float32) * scaling
                a = tl.load(a_ptr + offs_r[:, None].to(tl.int64) * K + in_k[None, :], mask=offs_r[:, None] < R, other=0.0).to(tl.float32)
                w = tl.dot(b, a, w, input_precision=_precision(DECODE))
        if CUT_K:
            w = tl.where(offs_k[None, :] < K, w, 0.0)
        squares += tl.sum(w * w, 1)
    tl.store(norms_ptr + offs_n, tl.sqrt(squares), mask=offs_n < N)
