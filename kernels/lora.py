"""Products of tall activations with thin factors, the low-rank half of a LoRA layer, forward and backward; and its dropout."""

import triton
import triton.language as tl


@triton.jit
def keep_mask(seed, offs_m, first, threshold, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr):
    """Which of the elements [offs_m, first : first + BLOCK_C] dropout keeps: [BLOCK_M, BLOCK_C], first a multiple of 4.

    One Philox-4x32-10 counter, (column // 4, row, 0, 0), decides four neighbours: an element is kept where the upper 31 bits of
    its word are at least `threshold` = p * 2^31. It depends on the element's place alone, so that any tile gives the same.
    """
    QUADS: tl.constexpr = BLOCK_C // 4
    quad = tl.broadcast_to((first // 4 + tl.arange(0, QUADS)).to(tl.uint32)[None, :], (BLOCK_M, QUADS))
    row = tl.broadcast_to(offs_m.to(tl.uint32)[:, None], (BLOCK_M, QUADS))
    zero = quad * 0
    r0, r1, r2, r3 = tl.philox(seed, quad, row, zero, zero)
    words = tl.join(tl.join(r0, r2), tl.join(r1, r3)).reshape(BLOCK_M, BLOCK_C)
    return (words >> 1).to(tl.int32) >= threshold


@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=["seed_ptr"])
def lora_down_kernel(
    x_ptr, a_ptr, seed_ptr, part_ptr,
    stride_xm,
    M, K, R,
    threshold,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, SPLIT_K: tl.constexpr,
):  # fmt: skip
    """part[s, m, r] = sum of keep[m, k] x[m, k] A[r, k] over the k of split s, multiplied in A's dtype, which is no narrower than x's.

    Program (p, s) computes BLOCK_M tokens and BLOCK_R ranks over one split of K. keep is 1 without a seed.
    """
    ranks = tl.cdiv(R, BLOCK_R)
    pid_m = tl.program_id(0) // ranks
    pid_r = tl.program_id(0) % ranks
    split = tl.program_id(1)
    steps = tl.cdiv(K, BLOCK_K)
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    rows_m = tl.minimum(offs_m, M - 1)
    offs_r = pid_r * BLOCK_R + tl.arange(0, BLOCK_R)
    rows_r = tl.minimum(offs_r, R - 1).to(tl.int64)
    WIDE: tl.constexpr = a_ptr.dtype.element_ty
    acc = tl.zeros((BLOCK_M, BLOCK_R), tl.float32)
    for step in range(split * steps // SPLIT_K, (split + 1) * steps // SPLIT_K):
        offs_k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        x = tl.load(x_ptr + rows_m[:, None] * stride_xm + offs_k[None, :], mask=offs_k[None, :] < K, other=0.0)
        if seed_ptr is not None:
            x = tl.where(keep_mask(tl.load(seed_ptr), offs_m, step * BLOCK_K, threshold, BLOCK_M, BLOCK_K), x, 0.0).to(x_ptr.dtype.element_ty)
        a = tl.load(a_ptr + rows_r[:, None] * K + offs_k[None, :], mask=offs_k[None, :] < K, other=0.0)
        acc = tl.dot(x.to(WIDE), a.T, acc, input_precision=PRECISION)
    part_ptrs = part_ptr + (split * M + offs_m[:, None]) * R + offs_r[None, :]
    tl.store(part_ptrs, acc, mask=(offs_m[:, None] < M) & (offs_r[None, :] < R))


@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=["seed_ptr"])
def lora_up_kernel(
    low_ptr, thin_ptr, seed_ptr, out_ptr,
    stride_lm, stride_tr, stride_tc,
    M, C, R,
    scaling, threshold,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out[m, c] = keep[m, c] * scaling * sum_r low[m, r] thin[r, c]: the update itself, or the update's part of dX.

    Program p computes one tile of BLOCK_M x BLOCK_C. keep is 1 without a seed.
    """
    BLOCK_R: tl.constexpr = 16
    tiles_c = tl.cdiv(C, BLOCK_C)
    pid_m = tl.program_id(0) // tiles_c
    pid_c = tl.program_id(0) % tiles_c
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_c = pid_c * BLOCK_C + tl.arange(0, BLOCK_C)
    rows_m = tl.minimum(offs_m, M - 1)
    in_c = tl.minimum(offs_c, C - 1).to(tl.int64)
    acc = tl.zeros((BLOCK_M, BLOCK_C), tl.float32)
    for r in range(0, R, BLOCK_R):
        offs_r = r + tl.arange(0, BLOCK_R)
        low = tl.load(low_ptr + rows_m[:, None] * stride_lm + offs_r[None, :], mask=offs_r[None, :] < R, other=0.0)
        thin = tl.load(thin_ptr + offs_r[:, None].to(tl.int64) * stride_tr + in_c[None, :] * stride_tc, mask=offs_r[:, None] < R, other=0.0)
        acc = tl.dot(low, thin.to(low.dtype), acc, input_precision=PRECISION)
    acc *= scaling  # here, in fp32: a small fp16 factor scaled by itself would lose its digits
    if seed_ptr is not None:
        acc = tl.where(keep_mask(tl.load(seed_ptr), offs_m, pid_c * BLOCK_C, threshold, BLOCK_M, BLOCK_C), acc, 0.0)
    out_ptrs = out_ptr + offs_m[:, None] * C + offs_c[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(offs_m[:, None] < M) & (offs_c[None, :] < C))


@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=["seed_ptr"])
def lora_grad_kernel(
    tall_ptr, low_ptr, thin_ptr, factor_ptr, seed_ptr, outer_ptr, through_ptr,
    stride_tm, stride_lm,
    M, C, R, rows_per_split,
    threshold,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Both products of one tall matrix with thin ones, reading it once; t[m, c] = keep[m, c] factor[c] tall[m, c]:
        outer[s, c, r] = sum of t[m, c] low[m, r] over the rows m of split s            dB from dY and x A^T; dA from x and d(x A^T)
        through[p, m, r] = sum of t[m, c] thin[c, r] over the columns c of strip p     d(x A^T) from dY and B

    Program (p, s, b) reads one strip of BLOCK_C columns and one split of the rows for block b of BLOCK_R ranks, of which there
    mostly is one. Sums are fp32 and added in order: no atomics.
    """
    strip = tl.program_id(0)
    split = tl.program_id(1)
    offs_c = strip * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = offs_r[None, :] < R
    in_c = tl.minimum(offs_c, C - 1).to(tl.int64)
    TALL: tl.constexpr = tall_ptr.dtype.element_ty
    LOW: tl.constexpr = low_ptr.dtype.element_ty
    if thin_ptr is not None:
        thin = tl.load(thin_ptr + in_c[:, None] * R + offs_r[None, :], mask=(offs_c[:, None] < C) & mask_r, other=0.0)
        thin = thin.to(LOW)
    outer = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    first = split.to(tl.int64) * rows_per_split
    for start in range(0, rows_per_split, BLOCK_M):
        offs_m = first + start + tl.arange(0, BLOCK_M)
        mask_m = offs_m[:, None] < M
        tall = tl.load(tall_ptr + offs_m[:, None] * stride_tm + offs_c[None, :], mask=mask_m & (offs_c[None, :] < C), other=0.0)
        if factor_ptr is not None:
            tall = (tall.to(tl.float32) * tl.load(factor_ptr + in_c)[None, :].to(tl.float32)).to(TALL)
        if seed_ptr is not None:
            tall = tl.where(keep_mask(tl.load(seed_ptr), offs_m, strip * BLOCK_C, threshold, BLOCK_M, BLOCK_C), tall, 0.0).to(TALL)
        if outer_ptr is not None:
            low = tl.load(low_ptr + offs_m[:, None] * stride_lm + offs_r[None, :], mask=mask_m & mask_r, other=0.0)
            outer = tl.dot(tall.T.to(LOW), low, outer, input_precision=PRECISION)
        if thin_ptr is not None:
            through = tl.dot(tall.to(LOW), thin, input_precision=PRECISION)
            tl.store(through_ptr + (strip.to(tl.int64) * M + offs_m[:, None]) * R + offs_r[None, :], through, mask=mask_m & mask_r)
    if outer_ptr is not None:
        tl.store(outer_ptr + (split.to(tl.int64) * C + offs_c[:, None]) * R + offs_r[None, :], outer, mask=(offs_c[:, None] < C) & mask_r)
