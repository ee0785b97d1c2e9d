"""Linear layers that share x, NF4 or dense, as the ops of nf4_linear.py take them; and the eager formula over them."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastfuse import tune
from fastfuse.kernels.arguments import Operand
from fastfuse.ops._op import kernel_dtype
from fastfuse.ops._scratch import scratch
from fastfuse.ops.low_rank import drop, lora_down
from fastfuse.ops.nf4_dequantize import decode_branch, dequantize_into
from fastfuse.quant.nf4 import Layout, NF4View, view_of


class Projection(NamedTuple):
    """One linear layer of a group. A plain tuple of its first entries serves as well.

    weight: [N, K] as NF4View.of takes it. lora_a (R, K), lora_b (N, R): the adapter, or neither. bias: (N,). magnitude: (N,), DoRA's.
    norms: (N,), lora_row_norms of the four, where the caller has them; computed where None.
    """

    weight: object
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    scaling: float = 1.0
    bias: Tensor | None = None
    magnitude: Tensor | None = None
    norms: Tensor | None = None


class LinearArgs(NamedTuple):
    """x: (..., K), shared by the operands. layout: None where their weights are dense tensors [N, K]. seeds: int64, one for the dropout mask of each, or None.

    Of an operand's fields the kernels' own, out and pre_scale, are None here; a, b, factor and bias are given by all operands or by none.
    """

    x: Tensor
    operands: tuple[Operand, ...]
    layout: Layout | None
    K: int
    seeds: Tensor | None
    dropout_p: float
    keep_pre_scale: bool
    interpret: bool


def linear_args(op: str, x: Tensor, projections: list[Projection], seeds: Tensor | None, dropout_p: float, interpret: bool) -> LinearArgs:
    """Raises ValueError where the weights are stored differently. What only some have is filled up: ranks of 0, zeros, ones."""
    layout, first = None, projections[0].weight
    if not isinstance(first, Tensor):
        layout = Layout.of(first)
        for p in projections[1:]:
            w = p.weight
            alike = w.block_size == first.block_size and len(w.scales) == len(first.scales)
            if not alike or w.dtype != first.dtype or w.scale_block != first.scale_block:
                one, other = (f"{v.layout} (scales by {v.scale_block}), {v.dtype}" for v in (first, w))
                raise ValueError(f"{op}: one weight is {one}, another {other}: a group is stored alike")
    has_a, has_factor, has_bias = (any(getattr(p, name) is not None for p in projections) for name in ("lora_a", "magnitude", "bias"))
    operands = []
    for p in projections:
        N, K = p.weight.shape
        a, b, factor, bias = p.lora_a, p.lora_b, None, p.bias
        if has_a and a is None:
            a, b = x.new_empty(0, K), x.new_empty(N, 0)
        if has_factor:
            factor = torch.ones(N, dtype=torch.float32, device=x.device) if p.magnitude is None else factor_of(p.magnitude, p.norms)
        if has_bias and bias is None:
            bias = x.new_zeros(N)
        weight = p.weight if layout is None else p.weight.tensors()
        operands.append(Operand(weight, a, b, factor, bias, None, None, N, 0 if a is None else a.shape[0], p.scaling))
    keep = has_factor and torch.is_grad_enabled() and any(p.factor.requires_grad for p in operands)
    return LinearArgs(x, tuple(operands), layout, projections[0].weight.shape[1], seeds, 0.0 if seeds is None else dropout_p, keep, interpret)


def factor_of(magnitude: Tensor, norms: Tensor) -> Tensor:
    wide = torch.promote_types(magnitude.dtype, torch.float32)
    return magnitude.to(wide) / norms.detach().to(wide)


def weight_of(args, operand: Operand) -> NF4View | Tensor:
    """An operand's weight [N, K] as the eager formulas take it."""
    return operand.weight if args.layout is None else view_of(operand.weight, args.layout, (operand.N, args.K))


def rescale(seeds: Tensor | None, p: float) -> float:
    """Dropout's 1 / (1 - p). It goes onto fp32 sums, so that no element of x is rounded again."""
    return 1.0 if seeds is None else 1 / (1 - p) if p < 1 else 0.0


def seed_of(args, i: int) -> Tensor | None:
    return None if args.seeds is None else args.seeds[i]


def columns_of(operands: Sequence[Operand], i: int) -> slice:
    """Where operand i's x A^T lies among all."""
    start = sum([p.R for p in operands[:i]])
    return slice(start, start + operands[i].R)


def xa_dtype(args: LinearArgs) -> torch.dtype:
    """The widest dtype of x and all adapters."""
    dtype = args.x.dtype
    for p in args.operands:
        if p.a is not None:
            dtype = torch.promote_types(torch.promote_types(dtype, p.a.dtype), p.b.dtype)
    return dtype


def tile_of(args, op: str, M: int, dtype: torch.dtype, device: torch.device) -> tuple[tune.Tile | None, str]:
    """The launch configuration, None for the library's matrix product over a decoded weight; and how the kernel decodes."""
    if args.layout is None:
        return None, ""
    K, size = args.K, args.layout.block_size
    decode = decode_branch(args.operands[0].weight, args.layout, dtype)
    shape = {"M": M, "N": sum([p.N for p in args.operands]), "K": K, "R": max([p.R for p in args.operands])}
    tile = tune.pick(op, tune.arch_of(device), dtype="fp32" if dtype == torch.float32 else "16-bit", decode=decode, **shape)
    # The forward's loop takes whole steps of K. dX may cut the last tile, if no scale block then reaches from one row into the next.
    cut = op == "nf4_linear_dx" and K % 64 == 0 and K % size == 0
    return (tile if tile is not None and (cut or K % tile["BLOCK_K"] == 0) else None), decode


def subset(args, indices: Sequence[int]):
    """Some of the operands alone."""
    seeds = None if args.seeds is None else torch.stack([args.seeds[i] for i in indices])
    return args._replace(operands=tuple([args.operands[i] for i in indices]), seeds=seeds)


def to_kernel(p: Operand, dtype: torch.dtype, lora_dtype: torch.dtype, scaling: float, out: Tensor, pre_scale: Tensor | None = None) -> Operand:
    """An operand as a kernel takes it, its adapter in dtype `lora_dtype`."""

    def cast(t: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        return t if t is None else t.to(dtype).contiguous()

    return Operand(
        p.weight, cast(p.a, lora_dtype), cast(p.b, lora_dtype), cast(p.factor, torch.float32), cast(p.bias, dtype), out, pre_scale, p.N, p.R, scaling
    )


def needs_no_cast(p: Operand, dtype: torch.dtype, lora_dtype: torch.dtype) -> bool:
    """Whether to_kernel would take all tensors as they are."""
    pairs = (p.a, lora_dtype), (p.b, lora_dtype), (p.factor, torch.float32), (p.bias, dtype)
    return all(t is None or (t.dtype == want and t.is_contiguous()) for t, want in pairs)


def xa_of(x: Tensor, args: LinearArgs, lora_dtype: torch.dtype) -> Tensor:
    """x [M, K] by A^T for all operands, [M, sum of R]. One product reads x once; with dropout each has its own x."""
    a = [p.a.to(lora_dtype) for p in args.operands if p.a is not None]
    if not a:
        return x.new_empty((x.shape[0], 0))
    if args.seeds is None:
        return lora_down(x, a[0] if len(a) == 1 else torch.cat(a), None, 0.0)
    parts = [lora_down(x, t, args.seeds[i], args.dropout_p) for i, t in enumerate(a)]
    return parts[0] if len(parts) == 1 else torch.cat(parts, 1)


def xa_ref(x: Tensor, a: Sequence[Tensor], dtype: torch.dtype, seeds: Tensor | None, p: float) -> Tensor:
    """dropout(x) A^T without the division by 1 - p, (..., sum of R), for each A in dtype; (..., 0) without an adapter."""
    if seeds is None:
        return x.new_empty((*x.shape[:-1], 0)) if not a else F.linear(x.to(dtype), torch.cat([t.to(dtype) for t in a]) if len(a) > 1 else a[0].to(dtype))
    x2 = x.reshape(-1, x.shape[-1])
    return torch.cat([drop(x2, seeds[i], p).to(dtype) @ t.to(dtype).T for i, t in enumerate(a)], 1).view(*x.shape[:-1], sum([t.shape[0] for t in a]))


@contextlib.contextmanager
def decoded(args, p: Operand, dtype: torch.dtype) -> Iterator[Tensor]:
    """An operand's weight [N, K] in dtype, for as long as the block: in the device's scratch, or the dense weight itself."""
    if args.layout is None:
        yield p.weight
        return
    with scratch((p.N, args.K), kernel_dtype(dtype), p.weight.packed.device) as w:
        dequantize_into(w, p.weight, args.layout, dtype)
        yield w.to(dtype)


def add_delta(y: Tensor, xa: Tensor, lora_b: Tensor, scaling: float | Tensor) -> Tensor:
    return (y + F.linear(xa, lora_b.to(xa.dtype)) * scaling).to(y.dtype)


def scaled(z: Tensor, factor: Tensor | None, bias: Tensor | None) -> Tensor:
    """factor * z + bias, rounded once."""
    if factor is None:
        return z
    y = z * factor
    return (y if bias is None else y + bias).to(z.dtype)


def shaped(t: Tensor, lead: Sequence[int]) -> Tensor:
    """[M, n] as [*lead, n], not a view: autograd forbids to change one of several views that a function returns in place."""
    return torch.ops.aten._unsafe_view(t, (*lead, t.shape[1]))
