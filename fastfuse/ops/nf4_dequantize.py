"""NF4 weights as numbers."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastfuse import tune
from fastfuse.errors import Unsupported
from fastfuse.kernels.arguments import NF4Weight
from fastfuse.ops import _cpu_library
from fastfuse.ops._fused_op import Planned, fused_op
from fastfuse.ops._launch import Launch
from fastfuse.ops._op import HAS_TRITON, INTERPRET, Cost, kernel_dtype, route
from fastfuse.quant.nf4 import Layout, NF4View, view_of

if HAS_TRITON:
    from fastfuse.kernels.nf4 import nf4_dequantize_kernel

_BYTES = 16384  # of the result that a program writes: twice as much of fp32 spills with Triton 3.9
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def nf4_dequantize(weight, dtype: torch.dtype | None = None, *, backend: str | None = None) -> Tensor:
    """The weight [N, K] as numbers, equal to the bit to what bitsandbytes or torchao gives.

    weight: Params4bit, NF4Tensor or NF4View.  dtype: bf16, fp16 or fp32; the weight's own where None.
    backend: as fastfuse.backend, for this call.
    Raises TypeError, ValueError or Unsupported as NF4View.of, and Unsupported for another dtype.
    """
    weight = NF4View.of(weight)
    dtype = dtype or weight.dtype
    if dtype not in DTYPES:
        raise Unsupported(f"nf4_dequantize: dtype is {dtype}, covered are bf16, fp16 and fp32")
    chosen = route("nf4_dequantize", weight.packed, backend)
    if chosen == "reference":
        return nf4_dequantize_ref(weight, dtype)
    return _dequantize(DequantizeArgs(weight.tensors(), Layout.of(weight), weight.shape, dtype, chosen == "interpreter"))[0]


def nf4_dequantize_ref(weight: NF4View, dtype: torch.dtype) -> Tensor:
    """round(code[nibble] * scale). float64 gives the exact product, which the tests measure against."""
    n, size = weight.shape[0] * weight.shape[1], weight.block_size
    torchao = len(weight.scales) == 3
    exact = weight.dtype if torchao else torch.promote_types(torch.float32, dtype)
    code = weight.code.to(exact)
    both = torch.stack([code.repeat_interleave(16), code.repeat(16)], dim=1)  # [256, 2]: the two elements of a byte
    w = both.index_select(0, weight.packed.int()).view(-1)
    scale = block_scales(weight).to(exact)
    if n % size:  # the last block is cut short
        w = w[:n] * scale.repeat_interleave(size)[:n]
    else:
        w.view(-1, size).mul_(scale[:, None])  # in place: a second tensor of this size costs a CPU more than the product
    return w.to(dtype).view(weight.shape)


def block_scales(weight: NF4View) -> Tensor:
    """One scale per block, [ceil(N K / block_size)]."""
    if len(weight.scales) == 1:
        return weight.scales[0]
    index, group = weight.scales[0], weight.scale_block
    whole = index.numel() % group == 0  # then groups broadcast, which costs a CPU a third of repeating them

    def per_group(t: Tensor) -> Tensor:
        return t[:, None] if whole else t.repeat_interleave(group)[: index.numel()]

    shape = (-1, group) if whole else (-1,)
    if len(weight.scales) == 4:
        _, code, absmax, offset = weight.scales
        return code.index_select(0, index.int()).view(shape).mul_(per_group(absmax)).add_(offset).view(-1)
    _, factor, mean = weight.scales  # each step rounds to the weight's dtype
    return (index.view(shape) / per_group(factor)).add_(mean).view(-1)


def nf4_dequantize_cost(weight, dtype: torch.dtype) -> Cost:
    weight = NF4View.of(weight)
    return Cost(weight.nbytes + weight.shape[0] * weight.shape[1] * dtype.itemsize)


class DequantizeArgs(NamedTuple):
    weight: NF4Weight
    layout: Layout
    shape: tuple[int, int]
    dtype: torch.dtype
    interpret: bool


def _reference(args: DequantizeArgs) -> tuple[Tensor]:
    return (nf4_dequantize_ref(view_of(args.weight, args.layout, args.shape), args.dtype),)


def _on_cpu(args: DequantizeArgs) -> tuple[Tensor]:
    return (_cpu_library.dequantize(args.weight, args.layout, args.shape, args.dtype),) if _cpu_library.library() else _reference(args)


def _launch(args: DequantizeArgs) -> Callable[[DequantizeArgs], tuple[Tensor]]:
    def run(args: DequantizeArgs) -> tuple[Tensor]:
        out = torch.empty(args.shape, dtype=kernel_dtype(args.dtype), device=args.weight.packed.device)
        dequantize_into(out, args.weight, args.layout, args.dtype)
        return (out.to(args.dtype),)

    return run


_dequantize = fused_op("nf4_dequantize", DequantizeArgs, reference=_reference, launch=_launch, cpu=_on_cpu)


@Planned
def dequantize_into(out: Tensor, weight: NF4Weight, layout: Layout, dtype: torch.dtype) -> Callable[..., None]:
    """Launch. out: [N, K] in kernel_dtype(dtype): in the interpreter bf16 arithmetic is wrong, so fp32 is written and rounded later."""
    n = out.numel()
    blocks = max(_BYTES // dtype.itemsize // layout.block_size, 1)
    each = blocks * layout.block_size
    grid = -(-n // each), 1, 1
    decode = decode_branch(weight, layout, dtype) if n % 2 == 0 else "gather"
    decode_all = Launch(
        nf4_dequantize_kernel, BLOCK_SIZE=layout.block_size, SCALE_BLOCK=layout.scale_block, BLOCKS=blocks, DECODE=decode, CUT=n % each != 0, num_warps=4,
        enable_fp_fusion=False,
    )  # fmt: skip
    return lambda out, weight, layout, dtype: decode_all(grid, weight, out, n)


def decode_branch(weight: NF4Weight, layout: Layout, dtype: torch.dtype) -> str:
    """Byte permutes on NVIDIA for 16-bit results; of torchao's weights for those kernels/nf4.py holds the table of."""
    if INTERPRET or tune.on_amd() or dtype == torch.float32:
        return "gather"
    return "prmt" if len(weight.scales) != 3 or layout.dtype == dtype == torch.bfloat16 else "gather"
