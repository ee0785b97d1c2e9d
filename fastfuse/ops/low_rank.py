"""The low-rank half of LoRA: x A^T, the update, and the gradients of A and B. Dropout is part of it.

Everything is 2-D here. What no tune row covers is the library's matrix product.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastfuse import tune
from fastfuse.ops._fused_op import Planned, fused_op
from fastfuse.ops._launch import Launch
from fastfuse.ops._op import HAS_TRITON, kernel_dtype, precision

if HAS_TRITON:
    from fastfuse.kernels.lora import lora_down_kernel, lora_grad_kernel, lora_up_kernel


def keep_mask(seed: Tensor, p: float | Tensor, M: int, C: int) -> Tensor:
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


def threshold(p: float | Tensor) -> int | Tensor:
    """What the upper 31 bits of a word must reach for its element to be kept."""
    if isinstance(p, Tensor):
        return (p * 2**31).round().clamp(max=2**31 - 1).long()
    return min(round(p * 2**31), 2**31 - 1)


def drop(x: Tensor, seed: Tensor | None, p: float | Tensor) -> Tensor:
    """x with the elements that dropout drops set to 0; the division by 1 - p is in the caller's scaling."""
    return x if seed is None else x.masked_fill(~keep_mask(seed, p, *x.shape), 0)


@Planned
def lora_down(x: Tensor, a: Tensor, seed: Tensor | None, p: float) -> Callable[..., Tensor]:
    """drop(x) A^T, [M, R], in the wider of the two dtypes."""
    dtype = torch.promote_types(x.dtype, a.dtype)
    (M, K), R = x.shape, a.shape[0]
    tile = tune.pick("lora_down", tune.arch_of(x.device), kind=_kind(x.dtype, dtype, seed), M=M, K=K, R=R)
    if tile is None or M == 0 or R == 0:
        return lambda x, a, seed, p: drop(x, seed, p).to(dtype) @ a.to(dtype).T
    splits = min(tile["SPLIT_K"], -(-K // tile["BLOCK_K"]))
    grid = -(-M // tile["BLOCK_M"]) * -(-R // tile["BLOCK_R"]), splits, 1
    multiply = Launch(lora_down_kernel, PRECISION=precision(), **tile.launch() | {"SPLIT_K": splits})

    def run(x: Tensor, a: Tensor, seed: Tensor | None, p: float) -> Tensor:
        x, a = x.to(kernel_dtype(x.dtype)), a.to(kernel_dtype(dtype)).contiguous()
        part = torch.empty((splits, M, R), dtype=torch.float32, device=x.device)
        multiply(grid, x, a, seed, part, x.stride(0), M, K, R, threshold(p))
        return part.sum(0).to(dtype)

    return run


@Planned
def lora_up(xa: Tensor, lora: Tensor, scaling: float, dtype: torch.dtype, seed: Tensor | None, p: float) -> Callable[..., Tensor]:
    """scaling * drop(xa lora), [M, C] in dtype. xa: [M, R], lora: [R, C], any strides."""
    (M, R), C = xa.shape, lora.shape[1]
    tile = tune.pick("lora_up", tune.arch_of(xa.device), kind=_kind(dtype, xa.dtype, seed), M=M, C=C, R=R)
    if tile is None or M == 0 or R == 0:
        return lambda xa, lora, scaling, dtype, seed, p: drop(scaled_product(xa, lora.to(xa.dtype), scaling), seed, p).to(dtype)
    grid = -(-M // tile["BLOCK_M"]) * -(-C // tile["BLOCK_C"]), 1, 1
    multiply = Launch(lora_up_kernel, PRECISION=precision(), **tile.launch())

    def run(xa: Tensor, lora: Tensor, scaling: float, dtype: torch.dtype, seed: Tensor | None, p: float) -> Tensor:
        work = kernel_dtype(xa.dtype)
        xa, lora = xa.to(work).contiguous(), lora.to(work)
        out = torch.empty((M, C), dtype=kernel_dtype(dtype), device=xa.device)
        multiply(grid, xa, lora, seed, out, xa.stride(0), lora.stride(0), lora.stride(1), M, C, R, scaling, threshold(p))
        return out.to(dtype)

    return run


def scaled_product(left: Tensor, right: Tensor, scaling: float) -> Tensor:
    """scaling * left right with the scale on the fp32 sums: scaled by itself, a small fp16 factor would lose its digits and a large one overflow."""
    return torch.addmm(left.new_zeros(1), left, right, beta=0, alpha=scaling)


def _kind(activation: torch.dtype, lora: torch.dtype, seed: Tensor | None) -> str:
    """What the library's product cannot do in one pass: "dropout", "mixed" dtypes; else "plain"."""
    return "dropout" if seed is not None else "mixed" if activation != lora else "plain"


class LoRAGradArgs(NamedTuple):
    """activation: [M, C], xa: [M, R], lora: [C, R] or None, factor: [C] or None, seed: of the dropout of activation's elements, or None."""

    activation: Tensor
    xa: Tensor
    lora: Tensor | None
    factor: Tensor | None
    seed: Tensor | None
    dropout_p: float
    scaling: float
    want_outer: bool
    interpret: bool


def _dropped(args: LoRAGradArgs) -> Tensor:
    """t = drop(activation * factor), in the activation's dtype."""
    t = args.activation if args.factor is None else (args.activation * args.factor).to(args.activation.dtype)
    return drop(t, args.seed, args.dropout_p)


def _grad_reference(args: LoRAGradArgs) -> tuple[Tensor, ...]:
    t, xa = _dropped(args).to(args.xa.dtype), args.xa
    outer = (scaled_product(t.T, xa, args.scaling),) if args.want_outer else ()
    return outer if args.lora is None else (*outer, scaled_product(t, args.lora.to(xa.dtype), args.scaling))


def _grad_launch(args: LoRAGradArgs) -> Callable[[LoRAGradArgs], tuple[Tensor, ...]]:
    (M, C), R, dtype = args.activation.shape, args.xa.shape[1], args.xa.dtype
    outer, through = args.want_outer, args.lora is not None
    shape = {"M": M, "C": C, "R": R, "products": int(outer) + through, "lora": "fp32" if dtype == torch.float32 else "16-bit"}
    tile = tune.pick("lora_grad", tune.arch_of(args.activation.device), kind=_kind(args.activation.dtype, dtype, args.seed), **shape)
    if tile is None or 0 in (M, C, R):
        return _grad_reference
    strips = -(-C // tile["BLOCK_C"])
    splits = max(1, min(tile["PROGRAMS"] // strips, -(-M // tile["BLOCK_M"])))
    rows = -(-M // (splits * tile["BLOCK_M"])) * tile["BLOCK_M"]
    splits = -(-M // rows)
    grid = strips, splits, -(-R // tile["BLOCK_R"])
    multiply = Launch(lora_grad_kernel, PRECISION=precision(), **{k: v for k, v in tile.launch().items() if k != "PROGRAMS"})
    fp32, limit, cast = torch.float32, threshold(args.dropout_p), _caster(args)
    stride_am, stride_xa = (t.stride(0) for t in cast(args)[:2])

    def run(args: LoRAGradArgs) -> tuple[Tensor, ...]:
        activation, xa, lora = cast(args) if cast is not _as_they_are else args[:3]
        outers = xa.new_empty((splits, C, R), dtype=fp32) if outer else None
        strips_of = xa.new_empty((strips, M, R), dtype=fp32) if through else None
        multiply(grid, activation, xa, lora, args.factor, args.seed, outers, strips_of, stride_am, stride_xa, M, C, R, rows, limit)
        made = ()
        for part in (outers, strips_of):
            if part is not None:
                total = part.sum(0) * args.scaling
                made += (total if dtype is fp32 else total.to(dtype),)
        return made

    return run


def _as_they_are(args: LoRAGradArgs) -> tuple:
    return args[:3]


def _caster(args: LoRAGradArgs) -> Callable[[LoRAGradArgs], tuple]:
    """What gives activation, xa and lora as the kernel reads them."""

    def cast(args: LoRAGradArgs) -> tuple:
        activation, xa = (_adjacent(t).to(kernel_dtype(t.dtype)) for t in args[:2])
        return activation, xa, None if args.lora is None else args.lora.to(xa.dtype).contiguous()

    return _as_they_are if all(a is b for a, b in zip(cast(args), args[:3], strict=True)) else cast


def _adjacent(t: Tensor) -> Tensor:
    return t if t.stride(1) == 1 else t.contiguous()


lora_grad = fused_op("lora_grad", LoRAGradArgs, reference=_grad_reference, launch=_grad_launch)
"""(args) -> scaling * t^T xa [C, R] where want_outer, and scaling * t lora [M, R] where lora is given, in xa's dtype, with t = drop(activation * factor): one
pass over the activation. dY with x A^T and B gives dB and d(x A^T); x with d(x A^T) gives dA^T. Deterministic: fp32 partial sums, added in order."""


def _grad_backward(args: LoRAGradArgs, outs: tuple, grads: tuple, needs: LoRAGradArgs) -> LoRAGradArgs:
    """Both products are linear in each of activation * factor, xa and lora."""
    xa, lora, scaling = args.xa, args.lora, args.scaling
    t, grads = _dropped(args).to(xa.dtype), list(grads)
    d_t, d_xa, d_lora = torch.zeros_like(t), None, None
    if args.want_outer and (d_outer := grads.pop(0)) is not None:
        d_t = d_t + xa @ d_outer.T * scaling
        d_xa = t @ d_outer * scaling
    if lora is not None and (d_through := grads.pop(0)) is not None:
        d_t = d_t + d_through @ (lora.to(xa.dtype) * scaling).T
        d_lora = (t.T @ d_through * scaling).to(lora.dtype)
    d_t = drop(d_t.to(args.activation.dtype), args.seed, args.dropout_p)
    d_factor = None if args.factor is None else (d_t * args.activation).sum(0, dtype=torch.float32).to(args.factor.dtype)
    d_activation = d_t if args.factor is None else (d_t * args.factor).to(args.activation.dtype)
    return LoRAGradArgs(d_activation, d_xa, d_lora, d_factor, *(None,) * 5)


lora_grad.register_backward(_grad_backward, lambda args, outs, needs: (args, ()))
