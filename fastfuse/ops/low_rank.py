"""The low-rank half of LoRA: x A^T, the update, and the gradients of A and B. Dropout is part of it.

Everything is 2-D here. What no tune row covers is the library's matrix product.
"""

import torch
from torch import Tensor

from fastfuse import tune
from fastfuse.ops._op import HAS_TRITON, fused_op, kernel_dtype, precision

if HAS_TRITON:
    from fastfuse.kernels.lora import lora_down_kernel, lora_grad_kernel, lora_up_kernel


def keep_mask(seed: Tensor, p: float, M: int, C: int) -> Tensor:
    """Which elements of [M, C] dropout keeps, as the kernels draw them: Philox-4x32-10 (Salmon et al., 2011).

    The counter (column // 4, row, 0, 0) under the key `seed` (one int64) gives the words of four neighbours.
    """
    low32 = 0xFFFFFFFF
    quads = -(-C // 4)
    c0 = torch.arange(quads, device=seed.device).expand(M, quads)
    c1 = torch.arange(M, device=seed.device)[:, None].expand(M, quads)
    c2 = c3 = torch.zeros_like(c0)
    k0, k1 = seed & low32, seed >> 32 & low32
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # int64 keeps the low 64 bits, which hold both halves of the product
        c0, c1, c2, c3 = (p1 >> 32 & low32) ^ c1 ^ k0, p1 & low32, (p0 >> 32 & low32) ^ c3 ^ k1, p0 & low32
        k0, k1 = k0 + 0x9E3779B9 & low32, k1 + 0xBB67AE85 & low32
    words = torch.stack([c0, c1, c2, c3], -1).view(M, quads * 4)[:, :C]
    return (words >> 1) >= threshold(p)


def threshold(p: float) -> int:
    """What the upper 31 bits of a word must reach for its element to be kept."""
    return min(round(p * 2**31), 2**31 - 1)


def drop(x: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """x with the elements that dropout drops set to 0; the division by 1 - p is in the caller's scaling."""
    return x if seed is None else x.masked_fill(~keep_mask(seed, p, *x.shape), 0)


def lora_down(x: Tensor, a: Tensor, seed: Tensor | None = None, p: float = 0.0) -> Tensor:
    """drop(x) A^T, [M, R], in the wider of the two dtypes."""
    low = torch.promote_types(x.dtype, a.dtype)
    a = a.to(low)
    (M, K), R = x.shape, a.shape[0]
    tile = tune.pick("lora_down", tune.arch_of(x.device), kind=_kind(x.dtype, low, seed), M=M, K=K, R=R)
    if tile is None or M == 0 or R == 0:
        return drop(x, seed, p).to(low) @ a.T
    work = kernel_dtype(low)
    x, a = x.to(kernel_dtype(x.dtype)), a.to(work).contiguous()
    splits = min(tile["SPLIT_K"], -(-K // tile["BLOCK_K"]))
    part = torch.empty((splits, M, R), dtype=torch.float32, device=x.device)
    options = tile.launch() | {"SPLIT_K": splits}
    grid = (-(-M // tile["BLOCK_M"]) * -(-R // tile["BLOCK_R"]), splits)
    lora_down_kernel[grid](x, a, seed, part, x.stride(0), M, K, R, threshold(p), PRECISION=precision(), **options)
    return part.sum(0).to(low)


def lora_up(low: Tensor, thin: Tensor, scaling: float, dtype: torch.dtype, seed: Tensor | None = None, p: float = 0.0) -> Tensor:
    """scaling * drop(low thin), [M, C] in dtype. low: [M, R], thin: [R, C], any strides."""
    (M, R), C = low.shape, thin.shape[1]
    thin = thin.to(low.dtype)
    tile = tune.pick("lora_up", tune.arch_of(low.device), kind=_kind(dtype, low.dtype, seed), M=M, C=C, R=R)
    if tile is None or M == 0 or R == 0:
        return drop(scaled_product(low, thin, scaling), seed, p).to(dtype)
    low, thin = low.to(kernel_dtype(low.dtype)).contiguous(), thin.to(kernel_dtype(thin.dtype))
    out = torch.empty((M, C), dtype=kernel_dtype(dtype), device=low.device)
    grid = (-(-M // tile["BLOCK_M"]) * -(-C // tile["BLOCK_C"]),)
    lora_up_kernel[grid](
        low, thin, seed, out, low.stride(0), thin.stride(0), thin.stride(1), M, C, R, scaling, threshold(p), PRECISION=precision(), **tile.launch()
    )
    return out.to(dtype)


def scaled_product(left: Tensor, right: Tensor, scaling: float) -> Tensor:
    """scaling * left right with the scale on the fp32 sums: scaled by itself, a small fp16 factor would lose its digits and a large one overflow."""
    return torch.addmm(left.new_zeros(1), left, right, beta=0, alpha=scaling)


def _kind(activation: torch.dtype, low: torch.dtype, seed: Tensor | None) -> str:
    """What the library's product cannot do in one pass: "dropout", "mixed" dtypes; else "plain"."""
    return "dropout" if seed is not None else "mixed" if activation != low else "plain"


def _grad_reference(
    tall: Tensor, low: Tensor, thin: Tensor | None, factor: Tensor | None, seed: Tensor | None, p: float, scaling: float, outer: bool, interpret: bool
) -> tuple[Tensor, Tensor]:
    t = drop(tall if factor is None else (tall * factor).to(tall.dtype), seed, p).to(low.dtype)
    product = scaled_product(t.T, low, scaling) if outer else low.new_empty(0)
    through = low.new_empty(0) if thin is None else scaled_product(t, thin.to(low.dtype), scaling)
    return product, through


@fused_op("lora_grad", reference=_grad_reference)
def lora_grad(
    tall: Tensor, low: Tensor, thin: Tensor | None, factor: Tensor | None, seed: Tensor | None, p: float, scaling: float, outer: bool, interpret: bool
) -> tuple[Tensor, Tensor]:
    """(scaling * t^T low [C, R], scaling * t thin [M, R]) with t = drop(tall * factor), in one pass over tall; in low's dtype.

    tall: [M, C], low: [M, R], thin: [C, R], factor: [C]. The first where `outer`, the second where thin is given, else empty.
    dY with x A^T and B gives dB and d(x A^T); x with d(x A^T) gives dA^T. Deterministic: fp32 partial sums, added in order.
    """
    (M, C), R = tall.shape, low.shape[1]
    shape = {"M": M, "C": C, "R": R, "products": int(outer) + (thin is not None), "low": "fp32" if low.dtype == torch.float32 else "16-bit"}
    tile = tune.pick("lora_grad", tune.arch_of(tall.device), kind=_kind(tall.dtype, low.dtype, seed), **shape)
    if tile is None or 0 in (M, C, R):
        return _grad_reference(tall, low, thin, factor, seed, p, scaling, outer, interpret)
    dtype, work = low.dtype, kernel_dtype(low.dtype)
    if tall.stride(1) != 1:
        tall = tall.contiguous()
    tall, low = tall.to(kernel_dtype(tall.dtype)), low.to(work)
    if low.stride(1) != 1:
        low = low.contiguous()
    strips = -(-C // tile["BLOCK_C"])
    splits = max(1, min(tile["PROGRAMS"] // strips, -(-M // tile["BLOCK_M"])))
    rows = -(-M // (splits * tile["BLOCK_M"])) * tile["BLOCK_M"]
    splits = -(-M // rows)
    product = torch.empty((splits, C, R), dtype=torch.float32, device=tall.device) if outer else None
    through = None if thin is None else torch.empty((strips, M, R), dtype=torch.float32, device=tall.device)
    options = {k: v for k, v in tile.launch().items() if k != "PROGRAMS"}
    lora_grad_kernel[(strips, splits, -(-R // tile["BLOCK_R"]))](
        tall, low, None if thin is None else thin.to(work).contiguous(), factor, seed, product, through,
        tall.stride(0), low.stride(0), M, C, R, rows, threshold(p), PRECISION=precision(), **options,
    )  # fmt: skip
    empty = torch.empty(0, dtype=dtype, device=tall.device)
    return (product.sum(0) * scaling).to(dtype) if outer else empty, empty.clone() if thin is None else (through.sum(0) * scaling).to(dtype)


def _grad_setup_context(ctx, inputs, output) -> None:
    tall, low, thin, factor, seed, ctx.p, ctx.scaling, ctx.outer, _ = inputs
    ctx.save_for_backward(tall, low, thin, factor, seed)


def _grad_backward(ctx, d_outer: Tensor, d_through: Tensor):
    """Both products are linear in each of tall * factor, low and thin."""
    tall, low, thin, factor, seed = ctx.saved_tensors
    t = drop(tall if factor is None else (tall * factor).to(tall.dtype), seed, ctx.p).to(low.dtype)
    d_t, d_low, d_thin = torch.zeros_like(t), None, None
    if ctx.outer:
        d_t = d_t + low @ d_outer.T * ctx.scaling
        d_low = t @ d_outer * ctx.scaling
    if thin is not None:
        d_t = d_t + d_through @ (thin.to(low.dtype) * ctx.scaling).T
        d_thin = (t.T @ d_through * ctx.scaling).to(thin.dtype)
    d_t = drop(d_t.to(tall.dtype), seed, ctx.p)
    d_factor = None if factor is None else (d_t * tall).sum(0, dtype=torch.float32).to(factor.dtype)
    d_tall = d_t if factor is None else (d_t * factor).to(tall.dtype)
    return d_tall, d_low, d_thin, d_factor, None, None, None, None, None


lora_grad.register_autograd(_grad_backward, setup_context=_grad_setup_context)
