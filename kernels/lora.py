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
    xa_ptr, lora_ptr, seed_ptr, out_ptr,
    stride_xa, stride_lr, stride_lc,
    M, C, R,
    scaling, threshold,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """out[m, c] = keep[m, c] * scaling * sum_r xa[m, r] lora[r, c]: the update itself from x A^T and B^T, or the update's part of dX from d(x A^T) and A.

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
        xa = tl.load(xa_ptr + rows_m[:, None] * stride_xa + offs_r[None, :], mask=offs_r[None, :] < R, other=0.0)
        lora = tl.load(lora_ptr + offs_r[:, None].to(tl.int64) * stride_lr + in_c[None, :] * stride_lc, mask=offs_r[:, None] < R, other=0.0)
        acc = tl.dot(xa, lora.to(xa.dtype), acc, input_precision=PRECISION)
    acc *= scaling  # here, in fp32: a small fp16 factor scaled by itself would lose its digits
    if seed_ptr is not None:
        acc = tl.where(keep_mask(tl.load(seed_ptr), offs_m, pid_c * BLOCK_C, threshold, BLOCK_M, BLOCK_C), acc, 0.0)
    out_ptrs = out_ptr + offs_m[:, None] * C + offs_c[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(offs_m[:, None] < M) & (offs_c[None, :] < C))


@triton.jit(do_not_specialize=["M"], do_not_specialize_on_alignment=["seed_ptr"])
def lora_grad_kernel(
    activation_ptr, xa_ptr, lora_ptr, factor_ptr, seed_ptr, outer_ptr, d_xa_ptr,
    stride_am, stride_xa,
    M, C, R, rows_per_split,
    threshold,
    PRECISION: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Both products of one activation with thin matrices, reading it once; t[m, c] = keep[m, c] factor[c] activation[m, c]:
        outer[s, c, r] = sum of t[m, c] xa[m, r] over the rows m of split s         dB from dY and x A^T; dA from x and d(x A^T)
        d_xa[p, m, r] = sum of t[m, c] lora[c, r] over the columns c of strip p     d(x A^T) from dY and B

    Program (p, s, b) reads one strip of BLOCK_C columns and one split of the rows for block b of BLOCK_R ranks, of which there
    mostly is one. Sums are fp32 and added in order: no atomics.
    """
    strip = tl.program_id(0)
    split = tl.program_id(1)
    offs_c = strip * BLOCK_C + tl.arange(0, BLOCK_C)
    offs_r = tl.program_id(2) * BLOCK_R + tl.arange(0, BLOCK_R)
    mask_r = offs_r[None, :] < R
    in_c = tl.minimum(offs_c, C - 1).to(tl.int64)
    ACTIVATION: tl.constexpr = activation_ptr.dtype.element_ty
    XA: tl.constexpr = xa_ptr.dtype.element_ty
    if lora_ptr is not None:
        lora = tl.load(lora_ptr + in_c[:, None] * R + offs_r[None, :], mask=(offs_c[:, None] < C) & mask_r, other=0.0)
        lora = lora.to(XA)
    outer = tl.zeros((BLOCK_C, BLOCK_R), tl.float32)
    first = split.to(tl.int64) * rows_per_split
    for start in range(0, rows_per_split, BLOCK_M):
        offs_m = first + start + tl.arange(0, BLOCK_M)
        mask_m = offs_m[:, None] < M
        activation = tl.load(activation_ptr + offs_m[:, None] * stride_am + offs_c[None, :], mask=mask_m & (offs_c[None, :] < C), other=0.0)
        if factor_ptr is not None:
            activation = (activation.to(tl.float32) * tl.load(factor_ptr + in_c)[None, :].to(tl.float32)).to(ACTIVATION)
        if seed_ptr is not None:
            activation = tl.where(keep_mask(tl.load(seed_ptr), offs_m, strip * BLOCK_C, threshold, BLOCK_M, BLOCK_C), activation, 0.0).to(ACTIVATION)
        if outer_ptr is not None:
            xa = tl.load(xa_ptr + offs_m[:, None] * stride_xa + offs_r[None, :], mask=mask_m & mask_r, other=0.0)
            outer = tl.dot(activation.T.to(XA), xa, outer, input_precision=PRECISION)
        if lora_ptr is not None:
            d_xa = tl.dot(activation.to(XA), lora, input_precision=PRECISION)
            tl.store(d_xa_ptr + (strip.to(tl.int64) * M + offs_m[:, None]) * R + offs_r[None, :], d_xa, mask=mask_m & mask_r)
    if outer_ptr is not None:
        tl.store(outer_ptr + (split.to(tl.int64) * C + offs_c[:, None]) * R + offs_r[None, :], outer, mask=(offs_c[:, None] < C) & mask_r)
