"""NF4 linear with a LoRA delta: decode, matrix product, low-rank update and bias in one kernel."""

import triton
import triton.language as tl

from fastfuse.kernels.nf4 import block_scale, decode


@triton.jit(do_not_specialize=["M", "R"])  # else one token, 16 and 17 are three compilations of the same code
def nf4_linear_fwd_kernel(
    x_ptr, packed_ptr, code_ptr, scales, lora, bias_ptr, out_ptr,
    stride_xm,
    M, N, K, R,
    scaling,
    BLOCK_SIZE: tl.constexpr, SCALE_BLOCK: tl.constexpr, DECODE: tl.constexpr, TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """out[m, n] = sum_k x[m, k] W[n, k]  +  scaling * sum_r xa[m, r] B[n, r]  +  bias[n],   lora = (xa [M, R], B [N, R]) or None.

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
    pid_n = tl.program_id(0) // tiles_m
    offs_m = pid_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = pid_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows_m = tl.minimum(offs_m, M - 1)  # rows past the end repeat the last one and are not stored
    rows_n = tl.minimum(offs_n, N - 1)
    offs_k = tl.arange(0, BLOCK_K)
    packed_ptrs = packed_ptr + rows_n[:, None] * (K // 2) + tl.arange(0, BLOCK_K // 2)[None, :]
    first = rows_n[:, None] * K + tl.arange(0, GROUPS)[None, :] * BLOCK_SIZE

    if TRANSPOSED:
        acc = tl.zeros((BLOCK_N, BLOCK_M), tl.float32)
        x_ptrs = x_ptr + rows_m[None, :] * stride_xm + offs_k[:, None]
    else:
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        x_ptrs = x_ptr + rows_m[:, None] * stride_xm + offs_k[None, :]
    for k in range(0, K, BLOCK_K):
        packed = tl.load(packed_ptrs + k // 2)
        scale = block_scale(scales, (first + k) // BLOCK_SIZE, SCALE_BLOCK)
        w = decode(packed, scale, code_ptr, scales, DTYPE, DECODE, BLOCK_N, GROUPS, BLOCK_K // 2)
        x = tl.load(x_ptrs + k)
        if TRANSPOSED:
            acc = tl.dot(w, x, acc, input_precision="ieee")
        else:
            acc = tl.dot(x, w.T, acc, input_precision="ieee")

    if lora is not None:
        # PEFT keeps adapters in fp32: three tf32 products keep them so on the matrix unit.
        PRECISION: tl.constexpr = "tf32x3" if DECODE == "prmt" else "ieee"
        BLOCK_R: tl.constexpr = 16  # the whole rank at once spills from rank 64 on sm_80
        for r in range(0, R, BLOCK_R):
            offs_r = r + tl.arange(0, BLOCK_R)
            xa = tl.load(lora[0] + rows_m[:, None] * R + offs_r[None, :], mask=offs_r[None, :] < R, other=0.0)
            b = tl.load(lora[1] + rows_n[:, None] * R + offs_r[None, :], mask=offs_r[None, :] < R, other=0.0)
            b = (b * scaling).to(xa.dtype)  # into B, not into xa: an fp16 x A^T may be near the largest fp16
            if TRANSPOSED:
                acc = tl.dot(b, xa.T, acc, input_precision=PRECISION)
            else:
                acc = tl.dot(xa, b.T, acc, input_precision=PRECISION)
    if TRANSPOSED:
        acc = acc.T
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + rows_n)[None, :].to(tl.float32)
    out_ptrs = out_ptr + offs_m[:, None] * N + offs_n[None, :]
    tl.store(out_ptrs, acc.to(out_ptr.dtype.element_ty), mask=(offs_m[:, None] < M) & (offs_n[None, :] < N))
