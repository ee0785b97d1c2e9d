"""NF4 weights as numbers."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastfuse.errors import Unsupported
from fastfuse.kernels.arguments import FlatScales, NestedScales, NF4Weight, TorchaoScales
from fastfuse.ops._op import HAS_TRITON, INTERPRET, Cost, fused_op, kernel_dtype, route
from fastfuse.quant.nf4 import NF4View

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
    return _nf4_dequantize(*weight.parts(), dtype, chosen == "interpreter")


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


def _reference(packed: Tensor, *args) -> Tensor:
    *parts, dtype, _interpret = args
    return nf4_dequantize_ref(NF4View.from_parts(packed, *parts), dtype)


@fused_op("nf4_dequantize", reference=_reference)
def _nf4_dequantize(
    packed: Tensor,
    code: Tensor,
    scales: Sequence[Tensor],
    block_size: int,
    shape: Sequence[int],
    w_dtype: torch.dtype,
    scale_block: int,
    dtype: torch.dtype,
    interpret: bool,
) -> Tensor:
    weight = NF4View.from_parts(packed, code, scales, block_size, shape, w_dtype, scale_block)
    out = torch.empty(weight.shape, dtype=kernel_dtype(dtype), device=weight.device)
    dequantize_into(out, weight, dtype)
    return out.to(dtype)


def dequantize_into(out: Tensor, weight: NF4View, dtype: torch.dtype) -> None:
    """Launch. out: [N, K] in kernel_dtype(dtype): in the interpreter bf16 arithmetic is wrong, so fp32 is written and rounded later."""
    n = weight.shape[0] * weight.shape[1]
    blocks = max(_BYTES // dtype.itemsize // weight.block_size, 1)
    each = blocks * weight.block_size
    grid = (-(-n // each),)
    decode = decode_branch(weight, dtype) if n % 2 == 0 else "gather"
    nf4_dequantize_kernel[grid](
        kernel_weight(weight), out, n,
        weight.block_size, weight.scale_block, blocks, decode, CUT=n % each != 0, num_warps=4, enable_fp_fusion=False,
    )  # fmt: skip


def kernel_weight(weight: NF4View) -> NF4Weight:
    return NF4Weight(weight.packed, weight.code, {1: FlatScales, 3: TorchaoScales, 4: NestedScales}[len(weight.scales)](*weight.scales))


def decode_branch(weight: NF4View, dtype: torch.dtype) -> str:
    """Byte permutes on NVIDIA for 16-bit results; of torchao's weights for those kernels/nf4.py holds the table of."""
    if INTERPRET or torch.version.hip or dtype == torch.float32:
        return "gather"
    return "prmt" if len(weight.scales) != 3 or weight.dtype == dtype == torch.bfloat16 else "gather"
