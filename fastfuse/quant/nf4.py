"""One zero-copy view over the ways an NF4 weight is stored."""

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastfuse.errors import Unsupported
from fastfuse.kernels.arguments import FlatScales, NestedScales, NF4Weight, TorchaoScales

_PARTS = ("packed", "code", "scales[0]", "scales[1]", "scales[2]", "scales[3]")
_SCALES = {1: FlatScales, 3: TorchaoScales, 4: NestedScales}
_TORCHAO_PARTS = ("quantized_data", "quantized_scalers", "quantization_factor", "scaler_mean", "nf4")


@dataclass(frozen=True, eq=False)
class NF4View:
    """A weight [N, K] in NF4: views of the host library's own storage, nothing copied (16-bit scales of bitsandbytes apart), nothing re-quantized.

    packed: uint8 [ceil(N K / 2)], row-major, the even element in the high nibble.
    code: [16], the values the codes stand for: the host library's own; fp32, torchao's in the weight's dtype.
    scales, one entry per block of block_size consecutive elements (blocks may cross rows):
        (absmax fp32,)                                            bitsandbytes, flat
        (index uint8, code fp32 [256], absmax fp32, offset fp32)  bitsandbytes, nested: code[index] * absmax + offset
        (scaler int8, factor, mean)                               torchao: scaler / factor + mean in the weight's dtype
      where absmax and factor have one entry per scale_block blocks: 256, unless torchao was asked for another number.
    dtype: what the weight was quantized from, and what torchao rounds in. It is its scales' dtype: module.to(dtype) changes only the
        one that an NF4Tensor shows.
    """

    packed: Tensor
    code: Tensor
    scales: tuple[Tensor, ...]
    block_size: int
    shape: tuple[int, int]
    dtype: torch.dtype
    scale_block: int = 256

    def __post_init__(self):
        _check_block_size(self.block_size)
        if self.scale_block < 1:
            raise ValueError(f"NF4View: scale_block is {self.scale_block}, expected at least 1")
        if len(self.scales) not in (1, 3, 4):
            raise ValueError(f"NF4View: {len(self.scales)} scale tensors, expected 1, 3 or 4")
        n = self.shape[0] * self.shape[1]
        blocks = -(-n // self.block_size)
        groups = -(-blocks // self.scale_block)
        fp32 = torch.float32
        if len(self.scales) == 1:
            layout = ((blocks, fp32),)
        elif len(self.scales) == 3:
            layout = ((blocks, torch.int8), (groups, self.dtype), (1, self.dtype))
        else:
            layout = ((blocks, torch.uint8), (256, fp32), (groups, fp32), (1, fp32))
        expected = (((n + 1) // 2, torch.uint8), (16, self.dtype if len(self.scales) == 3 else fp32), *layout)
        for name, part, (size, dtype) in zip(_PARTS, (self.packed, self.code, *self.scales), expected, strict=False):
            if part.dtype != dtype or part.numel() != size or part.dim() > 1:
                have = f"{part.dtype} {tuple(part.shape)}"
                raise ValueError(f"NF4View: {name} is {have}, a weight of shape {tuple(self.shape)} needs {dtype} ({size},)")
            if not part.is_contiguous() or part.device != self.packed.device:
                where = f"on {part.device} with strides {part.stride()}"
                raise ValueError(f"NF4View: packed, code and scales must be contiguous and on {self.packed.device}, {name} is {where}")

    @staticmethod
    def of(weight) -> "NF4View":
        """A view of a bitsandbytes Params4bit, a torchao NF4Tensor or an NF4View, recognised by structure.

        Raises TypeError for anything else, ValueError for a weight not quantized yet or with a part that does not fit, and Unsupported for a
        storage no kernel reads: FP4, bitsandbytes' packing for AVX512 and what it leaves behind of flat scales, DTensor.
        """
        if isinstance(weight, NF4View):
            return weight
        if type(weight).__name__ == "DTensor":
            if is_torchao(local := getattr(weight, "_local_tensor", None)):
                _check_block_size(local.block_size)
            raise _sharded()
        if is_torchao(weight):
            return _of_torchao(weight)
        if hasattr(weight, "quant_state"):
            return of_bitsandbytes(weight, weight.quant_state)
        kind = f"{type(weight).__name__} of {weight.dtype}" if isinstance(weight, Tensor) else type(weight).__name__
        raise TypeError(f"NF4View: weight is a {kind}, neither NF4View, Params4bit nor NF4Tensor")

    @property
    def layout(self) -> str:
        """A short name of the storage, for reports."""
        return {1: "bitsandbytes flat", 4: "bitsandbytes nested", 3: "torchao"}[len(self.scales)] + f", blocks of {self.block_size}"

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for t in (self.packed, self.code, *self.scales))

    @property
    def device(self) -> torch.device:
        return self.packed.device

    def tensors(self) -> NF4Weight:
        """The tensors alone, as ops and kernels take them."""
        return NF4Weight(self.packed, self.code, _SCALES[len(self.scales)](*self.scales))


class Layout(NamedTuple):
    """What an NF4View says beside its tensors and its shape."""

    block_size: int
    dtype: torch.dtype
    scale_block: int

    @classmethod
    def of(cls, view: NF4View) -> "Layout":
        return cls(view.block_size, view.dtype, view.scale_block)


def view_of(weight: NF4Weight, layout: Layout, shape: tuple[int, int]) -> NF4View:
    """A view of parts that have been checked, for the inside of an op."""
    view = object.__new__(NF4View)
    view.__dict__.update(packed=weight.packed, code=weight.code, scales=weight.scales, shape=tuple(shape), **layout._asdict())
    return view


def _check_block_size(size: int) -> None:
    if size < 32 or size & (size - 1):
        raise Unsupported(f"NF4View: block_size is {size}, powers of two from 32 are covered", "BLOCK_SIZE")


def _sharded() -> Unsupported:
    return Unsupported("NF4View: the weight is a DTensor; its shards must be gathered first", "DTENSOR")


def is_dense(weight) -> bool:
    """Whether the weight is an ordinary tensor (a fake or functional one as well), of numbers and not of codes."""
    return isinstance(weight, Tensor) and not hasattr(weight, "quant_state") and not is_torchao(weight) and type(weight).__name__ != "DTensor"


def holds_torchao(weight) -> bool:
    """Whether it is an NF4Tensor, or a shard of one."""
    return is_torchao(getattr(weight, "_local_tensor", weight))


def is_torchao(weight) -> bool:
    return type(weight).__name__ == "NF4Tensor" and all(hasattr(weight, part) for part in _TORCHAO_PARTS)


def _of_torchao(weight) -> NF4View:
    if weight.dim() != 2:
        raise Unsupported(f"NF4View: the NF4Tensor has shape {tuple(weight.shape)}, 2 dimensions are covered", "SHAPE")
    if weight.stride() != (weight.shape[1], 1):
        raise Unsupported(f"NF4View: the NF4Tensor is a view with strides {weight.stride()}, its bytes are in another order", "TRANSPOSED")
    scales = (weight.quantized_scalers, weight.quantization_factor, weight.scaler_mean)
    return NF4View(weight.quantized_data, weight.nf4, scales, weight.block_size, tuple(weight.shape), weight.nf4.dtype, weight.scaler_block_size)


def of_bitsandbytes(weight: Tensor, state, as_linear: bool = False) -> NF4View:
    """A view of bitsandbytes' codes under the QuantState that belongs to them.

    as_linear: only makes a difference for nested scales that were quantized from bf16 or fp16. True keeps them in fp32, as Linear4bit's forward does; False
        rounds them to that dtype, as dequantize_4bit does. bitsandbytes' backward calls dequantize_4bit, so its dx is of another weight than its forward's.
        fastfuse's dx is of the forward's weight.
    Raises as NF4View.of, and DTENSOR last: for a weight that fits once its shards are gathered.
    """
    if state is None:
        raise ValueError("NF4View: the Params4bit is not quantized yet: move it to a device first")
    if getattr(state, "packing_format_for_cpu", False):
        raise Unsupported("NF4View: bitsandbytes has repacked this weight for AVX512, which no kernel reads", "CPU_PACKED_BNB")
    if state.quant_type != "nf4":
        raise Unsupported(f"NF4View: quant_type is {state.quant_type!r}, 'nf4' is covered", "QUANT_TYPE")
    if len(state.shape) != 2:
        raise Unsupported(f"NF4View: the quantized weight has shape {tuple(state.shape)}, 2 dimensions are covered", "SHAPE")
    scales, scale_block = (_flat_scales(state.absmax),), 256
    if state.nested:
        scales, scale_block = (state.absmax, state.state2.code, state.state2.absmax, state.offset.float()), state.state2.blocksize
    if type(weight).__name__ == "DTensor":
        codes = torch.empty(weight.numel() * weight.element_size(), dtype=torch.uint8, device="meta")
        NF4View(codes, state.code.to("meta"), tuple(t.to("meta") for t in scales), state.blocksize, tuple(state.shape), state.dtype, scale_block)
        raise _sharded()
    # quant_storage may be a float dtype, in which some byte patterns are NaN: only ever look at bytes. By detach: torch.export has zeros for .data.
    packed = weight.detach().view(-1).view(torch.uint8)
    view = NF4View(packed, state.code, scales, state.blocksize, tuple(state.shape), state.dtype, scale_block)
    if state.nested and state.state2.dtype != torch.float32 and not as_linear:
        return replace(view, scales=(_rounded_scales(view, state.state2.dtype),))
    return view


def _flat_scales(absmax: Tensor) -> Tensor:
    if absmax.dim() == 2:
        have = f"{absmax.dtype} {tuple(absmax.shape)}"
        reason = f"its absmax is {have}, as bitsandbytes leaves it after packing the weight for AVX512 and unpacking it: load or quantize the weight anew"
        raise Unsupported(f"NF4View: {reason}", "CPU_UNPACKED_BNB")
    return absmax.float() if absmax.dtype in (torch.bfloat16, torch.float16) else absmax


def _rounded_scales(nested: NF4View, dtype: torch.dtype) -> Tensor:
    """The scales in fp32, each step rounded to dtype: what bitsandbytes quantizes from after packing a weight for AVX512 and unpacking it."""
    if dtype not in (torch.bfloat16, torch.float16):
        raise ValueError(f"NF4View: the nested scales are of {dtype}, expected fp32, bf16 or fp16")
    index, code, absmax, offset = nested.scales
    product = code.index_select(0, index.int()) * absmax.repeat_interleave(nested.scale_block)[: index.numel()]
    return (product.to(dtype) + offset).float()
