"""The kernels of linear layers that share x: for a kind of arguments, what launches them."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastfuse import tune
from fastfuse.kernels.arguments import Operand
from fastfuse.ops._launch import Launch, is_watched
from fastfuse.ops._linear_group import LinearArgs, rescale, shaped, to_kernel, xa_dtype, xa_of
from fastfuse.ops._op import HAS_TRITON, rows

if HAS_TRITON:
    from fastfuse.kernels.nf4_linear import nf4_linear_fwd_kernel, nf4_skinny_kernel, nf4_skinny_reduce_kernel

Run = Callable[[LinearArgs], tuple[Tensor, ...]]


class Kind(NamedTuple):
    """What all calls of a plan share. work, lora_dtype: in which the kernel computes, and takes adapters. as_it_is: it needs no tensor cast or copied."""

    tile: tune.Tile
    decode: str
    M: int
    work: torch.dtype
    lora_dtype: torch.dtype
    as_it_is: bool


def few_tokens(args: LinearArgs, kind: Kind, splits: int) -> Run:
    """One launch writes sums over each split of K, x A^T among them, and one adds them up."""
    operands, lead, K, (tile, decode, M, work, lora_dtype, as_it_is) = args.operands, args.x.shape[:-1], args.K, kind
    ranks, block = sum([p.R for p in operands]), tile["BLOCK_N"]
    columns, tiles, tiles_a = sum([p.N for p in operands]) + ranks, _tiles(operands, block), sum([-(-p.R // block) for p in operands])
    multiply = Launch(nf4_skinny_kernel, **_constants(args, kind) | {"SPLIT_K": splits})
    reduce = Launch(
        nf4_skinny_reduce_kernel, PROJECTIONS=len(operands), SPLIT_K=splits, DECODE=decode, BLOCK_M=tile["BLOCK_M"], BLOCK_N=block, num_warps=4, **tune.OPTIONS
    )
    grid, grid_of_reduce = (tiles + tiles_a, splits, 1), (tiles, 1, 1)
    shape_of_xa, shape_of_part, group_of, finished = (*lead, ranks), (splits, M, columns), _grouping(args, kind), _finishing(args)

    def run(args: LinearArgs) -> tuple[Tensor, ...]:
        x = args.x if as_it_is else rows(args.x).to(work)
        group, outs, pre_scale = group_of(args)
        xa, part = x.new_empty(shape_of_xa, dtype=lora_dtype), x.new_empty(shape_of_part, dtype=torch.float32)
        multiply(grid, x, group, part, K if as_it_is else x.stride(0), M, K, columns)
        reduce(grid_of_reduce, part, group, xa, ranks, M, columns)
        return (*outs, xa, *pre_scale) if as_it_is else finished(outs, xa, pre_scale)

    p = operands[0]
    if as_it_is and len(operands) == 1 and not args.keep_pre_scale and p.factor is None:
        run.at_addresses = _at_addresses(multiply, reduce, grid, grid_of_reduce, (*lead, p.N), shape_of_part, p, K)
    return run


def by_tiles(args: LinearArgs, kind: Kind) -> Run:
    """x A^T in a launch of its own, all else in one."""
    operands, lead, K, (tile, _, M, work, lora_dtype, _) = args.operands, args.x.shape[:-1], args.K, kind
    ranks, wanted = sum([p.R for p in operands]), xa_dtype(args)
    multiply = Launch(nf4_linear_fwd_kernel, **{"TRANSPOSED": False} | _constants(args, kind))
    grid, group_of, finished = (-(-M // tile["BLOCK_M"]) * _tiles(operands, tile["BLOCK_N"]), 1, 1), _grouping(args, kind), _finishing(args)

    def run(args: LinearArgs) -> tuple[Tensor, ...]:
        x = rows(args.x)
        group, outs, pre_scale = group_of(args)
        xa = xa_of(x, args, wanted).to(lora_dtype)
        x = x.to(work)
        multiply(grid, x, group, xa, x.stride(0), ranks, M, K)
        return finished(outs, shaped(xa, lead), pre_scale)

    return run


def _tiles(operands: Sequence[Operand], block: int) -> int:
    return sum([-(-p.N // block) for p in operands])


def _constants(args: LinearArgs, kind: Kind) -> dict:
    tile = {name: value for name, value in kind.tile.launch().items() if name != "SPLIT_K"}
    return {"PROJECTIONS": len(args.operands), "BLOCK_SIZE": args.layout.block_size, "SCALE_BLOCK": args.layout.scale_block, "DECODE": kind.decode} | tile


def _grouping(args: LinearArgs, kind: Kind) -> Callable[[LinearArgs], tuple[tuple[Operand, ...], tuple[Tensor, ...], tuple[Tensor, ...]]]:
    """The operands as kernels take them, where they write, and where y goes before its scale."""
    lead, keeps, (_, _, _, work, lora_dtype, as_it_is) = args.x.shape[:-1], args.keep_pre_scale, kind

    def group_of(args: LinearArgs) -> tuple[tuple[Operand, ...], tuple[Tensor, ...], tuple[Tensor, ...]]:
        group, outs, pre_scale, kept = (), (), (), 1.0 if args.seeds is None else rescale(args.seeds, args.dropout_p)
        for p in args.operands:  # a comprehension, in Python 3.11, is a call more
            out, pre = args.x.new_empty((*lead, p.N), dtype=work), None
            if keeps:
                pre = torch.empty_like(out)
                pre_scale += (pre,)
            if as_it_is:
                group += (_new(Operand, (p.weight, p.a, p.b, p.factor, p.bias, out, pre, p.N, p.R, p.scaling * kept)),)
            else:
                group += (_to_kernel(p, work, lora_dtype, kept, out, pre),)
            outs += (out,)
        return group, outs, pre_scale

    return group_of


def _finishing(args: LinearArgs) -> Callable[[tuple[Tensor, ...], Tensor, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """What the kernels wrote in the dtypes that are promised."""
    dtype, of_xa = args.x.dtype, xa_dtype(args)

    def finished(outs: tuple[Tensor, ...], xa: Tensor, pre_scale: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (*[t.to(dtype) for t in outs], xa.to(of_xa), *[t.to(dtype) for t in pre_scale])

    return finished


def _at_addresses(multiply: Launch, reduce: Launch, grid: tuple, grid_of_reduce: tuple, shape: tuple, shape_of_part: tuple, p: Operand, K: int) -> Callable:
    """few_tokens of one operand for a caller who has all addresses and lets go of x A^T: (x, addresses of x and of the operand's tensors) -> y. None where
    the kernels cannot be launched so. It is 10 us faster: one allocation less, and nothing is asked for its address, or whether it lies on the device."""
    N, R, scaling, (splits, M, columns) = p.N, p.R, p.scaling, shape_of_part
    scales = 3 + len(p.weight.scales)
    has_a, has_bias = p.a is not None, p.bias is not None
    size = -(-splits * M * columns // 4) * 4  # of part, in fp32: x A^T begins where it is aligned

    def launch(x: Tensor, at: tuple[int, ...]) -> Tensor | None:
        if multiply.direct is None or reduce.direct is None or multiply.kernel.pre_run_hooks or reduce.kernel.pre_run_hooks or is_watched():
            return None
        y, part = x.new_empty(shape), x.new_empty(size + M * R, dtype=torch.float32)  # held until both are launched: the memory is the stream's then
        a, b = at[scales : scales + 2] if has_a else (None, None)
        to = part.data_ptr()
        group = (((at[1], at[2], at[3:scales]), a, b, None, at[-1] if has_bias else None, y.data_ptr(), None, N, R, scaling),)
        multiply.again(grid, at[0], group, to, K, M, K, columns)
        reduce.again(grid_of_reduce, to, group, to + 4 * size, R, M, columns)
        return y

    return launch


_new = tuple.__new__


def _to_kernel(p: Operand, dtype: torch.dtype, lora_dtype: torch.dtype, kept: float, out: Tensor, pre_scale: Tensor | None) -> Operand:
    """An operand as kernels take it. A scaling that is a tensor goes into B, in fp32: the kernel rounds their product as it does with a number."""
    if not isinstance(p.scaling, Tensor) or p.b is None:
        return to_kernel(p, dtype, lora_dtype, p.scaling * kept, out, pre_scale)
    return to_kernel(p, dtype, lora_dtype, kept, out, pre_scale)._replace(b=(p.b.float() * p.scaling).contiguous())
