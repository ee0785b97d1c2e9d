"""The gradients of linear layers that share x: dX in one launch, and with it those of the adapters, the weights and what scales them."""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastfuse.kernels.arguments import Operand
from fastfuse.ops import _nf4_cpu
from fastfuse.ops._fused_op import fused_op
from fastfuse.ops._launch import Launch
from fastfuse.ops._linear_group import LinearArgs, columns_of, decoded, needs_no_cast, rescale, seed_of, subset, tile_of, to_kernel, weight_of
from fastfuse.ops._op import HAS_TRITON, kernel_dtype
from fastfuse.ops.low_rank import LoRAGradArgs, drop, lora_grad, lora_up, scaled_product, threshold
from fastfuse.ops.nf4_dequantize import nf4_dequantize_ref
from fastfuse.quant.nf4 import Layout

if HAS_TRITON:
    from fastfuse.kernels.nf4_linear import nf4_linear_dx_kernel


class LinearDxArgs(NamedTuple):
    """dy: [M, N] of each operand, without gaps. d_xa: [M, sum of R] where there are adapters. The rest as in LinearArgs, without b and bias."""

    dy: tuple[Tensor, ...]
    operands: tuple[Operand, ...]
    layout: Layout | None
    K: int
    seeds: Tensor | None
    dropout_p: float
    d_xa: Tensor | None
    interpret: bool


def _reference(args: LinearDxArgs) -> tuple[Tensor]:
    def product(dz: Tensor, weight) -> Tensor:
        return dz @ (weight if isinstance(weight, Tensor) else nf4_dequantize_ref(weight, dz.dtype))

    return _eager(args, product)


def _on_cpu(args: LinearDxArgs) -> tuple[Tensor]:
    def product(dz: Tensor, weight) -> Tensor:
        return dz @ weight if isinstance(weight, Tensor) else _nf4_cpu.linear_dx(dz, weight)

    return _eager(args, product)


def _eager(args: LinearDxArgs, product: Callable) -> tuple[Tensor]:
    total = None
    for i, (p, dz) in enumerate(zip(args.operands, args.dy, strict=True)):
        part = product(dz if p.factor is None else (dz * p.factor).to(dz.dtype), weight_of(args, p))
        if p.R:
            update = scaled_product(args.d_xa[:, columns_of(args.operands, i)], p.a.to(args.d_xa.dtype), rescale(args.seeds, args.dropout_p))
            part = (part + drop(update, seed_of(args, i), args.dropout_p)).to(dz.dtype)
        total = part if total is None else total + part
    return (total,)


def _launch(args: LinearDxArgs) -> Callable[[LinearDxArgs], tuple[Tensor]]:
    dy, K = args.dy[0], args.K
    M, dtype, block_size = dy.shape[0], dy.dtype, 0 if args.layout is None else args.layout.block_size
    tile, decode = tile_of(args, "nf4_linear_dx", M, dtype, dy.device)
    if tile is None or M == 0:
        return _dense
    work, lora_dtype = kernel_dtype(dtype), dtype if args.d_xa is None else kernel_dtype(args.d_xa.dtype)
    grid = -(-M // tile["BLOCK_M"]) * -(-K // tile["BLOCK_K"]), 1, 1
    multiply = Launch(
        nf4_linear_dx_kernel, PROJECTIONS=len(args.dy), BLOCK_SIZE=block_size, SCALE_BLOCK=args.layout.scale_block, DECODE=decode,
        CUT_K=K % tile["BLOCK_K"] != 0, **tile.launch(),
    )  # fmt: skip

    kept, limit, ranks = rescale(args.seeds, args.dropout_p), threshold(args.dropout_p), 0 if args.d_xa is None else args.d_xa.shape[1]
    as_they_are = work is dtype and all(needs_no_cast(p, work, lora_dtype) for p in args.operands) and all(t.is_contiguous() for t in args.dy)
    as_they_are = as_they_are and (args.d_xa is None or lora_dtype is args.d_xa.dtype)

    def run(args: LinearDxArgs) -> tuple[Tensor]:
        group, dx, d_xa = (), args.dy[0].new_empty((M, K), dtype=work), args.d_xa
        for p, dy in zip(args.operands, args.dy, strict=True):
            if as_they_are:
                group += (_new(Operand, (p.weight, p.a, None, p.factor, None, dy, None, p.N, p.R, kept)),)
            else:
                group += (to_kernel(p, work, lora_dtype, kept, dy.to(work).contiguous()),)
        if not (as_they_are or d_xa is None):
            d_xa = d_xa.to(lora_dtype)
        multiply(grid, group, d_xa, args.seeds, dx, ranks, M, K, kept, limit)
        return (dx if as_they_are else dx.to(dtype),)

    return run


def _dense(args: LinearDxArgs) -> tuple[Tensor]:
    """Many tokens: the low-rank part first, the library's product over the decoded weight onto it."""
    dx = None
    for i, (p, dz) in enumerate(zip(args.operands, args.dy, strict=True)):
        if p.factor is not None:
            dz = (dz * p.factor).to(dz.dtype)
        if p.R:
            update = lora_up(args.d_xa[:, columns_of(args.operands, i)], p.a, rescale(args.seeds, args.dropout_p), dz.dtype, seed_of(args, i), args.dropout_p)
            dx = update if dx is None else dx.add_(update)
        with decoded(args, p, dz.dtype) as w:
            dx = dz @ w if dx is None else dx.addmm_(dz, w)
    return (dx,)


linear_dx = fused_op("nf4_linear_dx", LinearDxArgs, Layout, reference=_reference, launch=_launch, cpu=_on_cpu)
"""(args) -> (dX,): the sum over operands of (dY * factor) W + drop(d(x A^T) A), [M, K]. Nothing dequantized outlives the call."""


_new = tuple.__new__
Some = Sequence[Tensor | None]


def gradients(args: LinearArgs, xa: Tensor | None, pre_scale: Some, dy: Some, d_xa: Tensor | None, d_pre_scale: Some, needs: LinearArgs) -> LinearArgs:
    """The gradients of LinearArgs from those of what the op returned; each only where `needs` asks for it.

    args.x: (..., K), xa: (..., sum of R): only read with adapters or where dW is asked for. dy: (..., N), None where it did not take part.
    d_xa, d_pre_scale: of the values kept for the backward, which have a gradient only where a gradient is differentiated again.
    """
    like, idle, differentiated_again = None, False, False
    for t, d in zip(dy, d_pre_scale, strict=True):
        like = like if like is not None else t if t is not None else d
        idle = idle or (t is None and d is None)
        differentiated_again = differentiated_again or d is not None
    if idle and d_xa is None:
        return _of_those_in_the_loss(args, xa, pre_scale, dy, d_pre_scale, needs)
    lead, K, like = (d_xa if like is None else like).shape[:-1], args.K, args.x if like is None else like
    M = math.prod(lead)  # lead.numel() would make a constant of it under torch.compile
    kept = 1.0 if args.seeds is None else rescale(args.seeds, args.dropout_p)
    made, dz, onward, plain, column = (), (), (), (), 0
    for i, (p, wanted, t) in enumerate(zip(args.operands, needs.operands, dy, strict=True)):
        dW = da = db = d_factor = d_bias = None
        columns = slice(column, column := column + p.R)
        t = like.new_zeros(M, p.N) if t is None else t.reshape(M, p.N).contiguous()
        if wanted.factor:
            wide = torch.promote_types(t.dtype, torch.float32)
            d_factor = (t.to(wide) * pre_scale[i].reshape(t.shape)).sum(0).to(p.factor.dtype)
        if wanted.bias:
            d_bias = t.sum(0, dtype=torch.float32).to(p.bias.dtype)
        factor = p.factor
        if differentiated_again:
            t, factor = (t * factor).to(t.dtype) + (0 if d_pre_scale[i] is None else d_pre_scale[i].reshape(t.shape)), None
        if p.a is not None:
            own, through = xa.reshape(M, xa.shape[-1]), needs.x or wanted.a
            own = own if args.operands[1:] == () else own[:, columns]
            if through or wanted.b:
                is_tensor = type(p.scaling) is not float
                scaling, lora = 1.0 if is_tensor else p.scaling, p.b if through else None
                found = lora_grad(_new(LoRAGradArgs, (t, own, lora, factor, None, 0.0, scaling, wanted.b, args.interpret)))
                found = [(g * p.scaling).to(g.dtype) for g in found] if is_tensor else found
                own = found[-1] if through else own
                if wanted.b:
                    db = found[0] if args.seeds is None else found[0] * kept
                    db = db if db.dtype is p.b.dtype else db.to(p.b.dtype)
            if through and d_xa is not None and kept:
                own = own + d_xa.reshape(M, xa.shape[-1])[:, columns] / kept
            if wanted.a:
                seed = None if args.seeds is None else args.seeds[i]
                da = lora_grad(_new(LoRAGradArgs, (args.x.reshape(M, K), own, None, None, seed, args.dropout_p, kept, True, args.interpret)))[0].T
                da = da if da.dtype is p.a.dtype else da.to(p.a.dtype)
            onward += (own,)  # d(x A^T) without dropout's 1 / (1 - p), which comes onto what is made of it
        if args.layout is None and wanted.weight:
            dW = (t if factor is None else (t * factor).to(t.dtype)).T @ args.x.reshape(M, K)
        dz += (t,)
        plain += (_new(Operand, (p.weight, p.a, None, factor, None, None, None, p.N, p.R, 1.0)),)
        made += (_new(Operand, (dW, da, db, d_factor, d_bias, None, None, None, None, None)),)
    dx = None
    if needs.x:
        d_xa = torch.cat(onward, 1) if onward[1:] else onward[0] if onward else None
        dx = linear_dx(_new(LinearDxArgs, (dz, plain, args.layout, K, args.seeds, args.dropout_p, d_xa, args.interpret)))[0].view(*lead, K)
    return _new(LinearArgs, (dx, made, None, None, None, None, None, None))


def _of_those_in_the_loss(args: LinearArgs, xa: Tensor | None, pre_scale: Some, dy: Some, d_pre_scale: Some, needs: LinearArgs) -> LinearArgs:
    """What took no part in the loss gets None, as in eager PyTorch, not zeros, which an optimizer would step by."""
    used = [i for i, t in enumerate(dy) if t is not None or d_pre_scale[i] is not None]
    if xa is not None:
        xa = torch.cat([xa[..., columns_of(args.operands, i)] for i in used], -1)
    pre_scale, dy, d_pre_scale = ([of[i] for i in used] for of in (pre_scale, dy, d_pre_scale))
    found = gradients(subset(args, used), xa, pre_scale, dy, None, d_pre_scale, needs._replace(operands=[needs.operands[i] for i in used]))
    made = dict(zip(used, found.operands, strict=True))
    return found._replace(operands=[made.get(i) for i in range(len(args.operands))])
