"""NF4 weights in every storage, quantized by the host libraries themselves."""

import bitsandbytes as bnb
import torch
from bitsandbytes import functional as bnb_functional

try:
    from torchao.quantization import NF4Tensor, to_nf4
except ImportError:  # torchao 0.17 and before
    from torchao.dtypes import NF4Tensor, to_nf4  # noqa: F401  other tests take them from here

STORAGES = ("flat", "nested", "torchao")


def random_weight(N: int, K: int, dtype: torch.dtype = torch.float32, device: str = "cpu") -> torch.Tensor:
    """Blocks of very different size, and one of zeros: an absmax wrong by one block cannot hide."""
    weight = torch.randn(N, K, device=device) * torch.logspace(-3, 0, N, device=device)[:, None]
    weight[0, : min(64, K)] = 0
    return weight.to(dtype)


def quantize(weight: torch.Tensor, storage: str, block_size: int = 64):
    """A Params4bit (flat, nested) or an NF4Tensor (torchao) on the weight's device."""
    if storage == "torchao":
        blocks = weight.numel() // block_size  # torchao wants whole groups: 256 scalers where they fit, else the most that do
        return to_nf4(weight, block_size, next(n for n in range(256, 0, -1) if blocks % n == 0))
    device = weight.device
    return bnb.nn.Params4bit(weight.cpu().clone(), requires_grad=False, quant_type="nf4", compress_statistics=storage == "nested", blocksize=block_size).to(
        device
    )


def requantized(dtype: torch.dtype, offset_dtype: torch.dtype, N: int = 256, K: int = 320):
    """A nested weight whose scales bitsandbytes has quantized a second time, from dtype.

    It does so when it unpacks what it had packed for its product on CPUs with AVX512-BF16 (state_dict() after any call without gradients). Loaded
    from a file the offset is fp32 again.
    """
    weight = quantize(random_weight(N, K, dtype), "nested")
    state = weight.quant_state
    absmax = bnb_functional.dequantize_blockwise(state.absmax, state.state2).add_(state.offset).bfloat16().to(dtype)
    offset = absmax.mean()
    state.absmax, state.state2 = bnb_functional.quantize_blockwise(absmax - offset, blocksize=256)
    state.offset = offset.to(offset_dtype)
    assert state.state2.dtype == dtype
    return weight


def host_dequantize(weight, dtype: torch.dtype) -> torch.Tensor:
    """What the host library itself makes of the weight in `dtype`.

    Of bitsandbytes as one flat row: blocks run over the ends of rows, and with AVX-512 its CPU decode (0.50.2) begins a new one in each
    row, which is wrong wherever K is a multiple of 16 but not of the block size. An odd number of elements would send it to a formula that it compiles.
    """
    if type(weight).__name__ == "NF4Tensor":
        return weight.get_original_weight().to(dtype)
    state = weight.quant_state
    absmax = state.absmax
    if state.nested:
        absmax = bnb_functional.dequantize_blockwise(state.absmax, state.state2) + state.offset
    n = state.shape.numel()
    flat = torch.ops.bitsandbytes.dequantize_4bit(weight.data, absmax.float(), state.blocksize, state.quant_type, [1, n + n % 2], dtype)
    return flat[0, :n].view(state.shape)
