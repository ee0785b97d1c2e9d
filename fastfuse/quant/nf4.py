"""One zero-copy view over the ways an NF4 weight is stored."""

from dataclasses import dataclass

import torch
from torch import Tensor

from fastfuse.errors import Unsupported

_TORCHAO_PARTS = ("quantized_data", "quantized_scalers", "quantization_factor", "scaler_mean", "nf4")


@dataclass(frozen=True, eq=False)
class NF4View:
    """A weight [N, K] in NF4: views of the host library's own storage, nothing copied, nothing re-quantized.

    packed: uint8 [ceil(N K / 2)], row-major, the even element in the high nibble.
    code: [16], the values the codes stand for: the host library's own.
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
        if self.block_size < 32 or self.block_size & (self.block_size - 1):
            raise Unsupported(f"NF4View: block_size is {self.block_size}, powers of two from 32 are covered", "BLOCK_SIZE")
        if self.scale_block < 1:
            raise ValueError(f"NF4View: scale_block is {self.scale_block}, expected at least 1")
        if len(self.scales) not in (1, 3, 4):
            raise ValueError(f"NF4View: {len(self.scales)} scale tensors, expected 1, 3 or 4")
        n = self.shape[0] * self.shape[1]
        blocks = -(-n // self.block_size)
        if self.packed.shape != ((n + 1) // 2,) or self.packed.dtype != torch.uint8:
            have = f"{self.packed.dtype} {tuple(self.packed.shape)}"
            raise ValueError(f"NF4View: packed is {have}, a weight of shape {tuple(self.shape)} needs torch.uint8 {((n + 1) // 2,)}")
        groups = -(-blocks // self.scale_block)
        sizes = {1: (blocks,), 3: (blocks, groups, 1), 4: (blocks, 256, groups, 1)}[len(self.scales)]
        for i, (part, size) in enumerate(zip(self.scales, sizes, strict=True)):
            if part.numel() != size:
                raise ValueError(f"NF4View: scales[{i}] has {part.numel()} entries, a weight of shape {tuple(self.shape)} needs {size}")
        for part in (self.packed, *self.scales):
            if not part.is_contiguous() or part.device != self.packed.device:
                raise ValueError(f"NF4View: packed and scales must be contiguous and on one device, one is on {part.device} with strides {part.stride()}")

    @staticmethod
    def of(weight) -> "NF4View":
        """A view of a bitsandbytes Params4bit, a torchao NF4Tensor or an NF4View, recognised by structure.

        Raises TypeError for anything else, ValueError for a weight not quantized yet, and Unsupported for a storage
        no kernel reads: FP4, bitsandbytes' packing for AVX512, DTensor.
        """
        if isinstance(weight, NF4View):
            return weight
        if type(weight).__name__ == "DTensor":
            raise Unsupported("NF4View: the weight is a DTensor; its shards must be gathered first", "DTENSOR")
        if is_torchao(weight):
            return _of_torchao(weight)
        if hasattr(weight, "quant_state"):
            return _of_bitsandbytes(weight)
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

    def parts(self) -> tuple:
        """The fields in order, as an op's schema takes them; NF4View(*parts) undoes it."""
        return self.packed, self.code, list(self.scales), self.block_size, list(self.shape), self.dtype, self.scale_block


def is_dense(weight) -> bool:
    """Whether the weight is an ordinary tensor (a fake or functional one as well), of numbers and not of codes."""
    return isinstance(weight, Tensor) and not hasattr(weight, "quant_state") and not is_torchao(weight) and type(weight).__name__ != "DTensor"


def is_torchao(weight) -> bool:
    return type(weight).__name__ == "NF4Tensor" and all(hasattr(weight, part) for part in _TORCHAO_PARTS)


def _of_torchao(weight) -> NF4View:
    if weight.dim() != 2:
        raise Unsupported(f"NF4View: the NF4Tensor has shape {tuple(weight.shape)}, 2 dimensions are covered", "SHAPE")
    if weight.stride() != (weight.shape[1], 1):
        raise Unsupported(f"NF4View: the NF4Tensor is a view with strides {weight.stride()}, its bytes are in another order", "TRANSPOSED")
    scales = (weight.quantized_scalers, weight.quantization_factor, weight.scaler_mean)
    return NF4View(weight.quantized_data, weight.nf4, scales, weight.block_size, tuple(weight.shape), weight.nf4.dtype, weight.scaler_block_size)


def _of_bitsandbytes(weight) -> NF4View:
    state = weight.quant_state
    if state is None:
        raise ValueError("NF4View: the Params4bit is not quantized yet: move it to a device first")
    if getattr(state, "packing_format_for_cpu", False):
        raise Unsupported("NF4View: bitsandbytes has repacked this weight for AVX512, which no kernel reads", "CPU_PACKED_BNB")
    if state.quant_type != "nf4":
        raise Unsupported(f"NF4View: quant_type is {state.quant_type!r}, 'nf4' is covered", "QUANT_TYPE")
    if len(state.shape) != 2:
        raise Unsupported(f"NF4View: the quantized weight has shape {tuple(state.shape)}, 2 dimensions are covered", "SHAPE")
    scales, scale_block = (state.absmax,), 256
    if state.nested:
        scales, scale_block = (state.absmax, state.state2.code, state.state2.absmax, state.offset), state.state2.blocksize
    # quant_storage may be a float dtype, in which some byte patterns are NaN: only ever look at bytes.
    packed = weight.data.detach().view(-1).view(torch.uint8)
    return NF4View(packed, state.code, scales, state.blocksize, tuple(state.shape), state.dtype, scale_block)
