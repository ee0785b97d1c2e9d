"""Dequantized weights equal the host library's own, to the bit, in the reference and in the kernel."""

import pytest
import torch
from weights import STORAGES, host_dequantize, quantize, random_weight

import fastfuse
from fastfuse.ops import nf4_dequantize
from fastfuse.quant import NF4View

DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("w_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("backend", ["torch", "auto", "triton"])
def test_equal_to_the_bit(storage, w_dtype, dtype, backend, device):
    weight = quantize(random_weight(256, 320, w_dtype, device), storage)
    with fastfuse.backend(backend):
        got = nf4_dequantize(weight, dtype)
    want = host_dequantize(weight, dtype)
    assert got.dtype == dtype and torch.equal(got, want)
    assert nf4_dequantize(weight).dtype == w_dtype


@pytest.mark.parametrize("block_size", [32, 128, 4096])
@pytest.mark.parametrize("storage", ["flat", "nested"])
def test_block_sizes_and_blocks_that_cross_rows(storage, block_size, kernels, device):
    weight = quantize(random_weight(50, 200, torch.float16, device), storage, block_size)  # 10,000 elements: the last block is cut short
    for dtype in DTYPES:
        assert torch.equal(nf4_dequantize(weight, dtype), host_dequantize(weight, dtype)), dtype


def test_odd_number_of_elements(kernels, device):
    weight = quantize(random_weight(3, 67, torch.float32, device), "flat")
    assert torch.equal(nf4_dequantize(weight), host_dequantize(weight, torch.float32))


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_every_code_under_adversarial_scales(backend, device):
    """All 256 bytes under scales that are tiny, huge, negative, subnormal and of every nested index."""
    every = torch.arange(256, dtype=torch.uint8, device=device).repeat(256)  # 131,072 elements, 2048 blocks of 64
    for storage in ("flat", "nested"):
        weight = quantize(random_weight(512, 256, torch.float32, device), storage)
        weight.data.copy_(every[:, None])
        state = weight.quant_state
        if storage == "flat":
            tiny = 1e-38 if device == "cpu" else 1e-30  # bitsandbytes' CUDA kernels flush subnormal products to zero, ours keep them
            state.absmax.copy_(torch.tensor([tiny, 3e-5, 6e-8, 1.0, -2.5, 60000.0, 1 / 3, 0.0], device=device).repeat(256))
        else:
            state.absmax.copy_(torch.arange(2048, device=device).to(torch.uint8))
            state.state2.absmax.copy_(torch.logspace(-6, 3, 8, device=device))
            state.offset.fill_(0.7)
        with fastfuse.backend(backend):
            for dtype in DTYPES:
                assert torch.equal(nf4_dequantize(weight, dtype), host_dequantize(weight, dtype)), (storage, dtype)


@pytest.mark.parametrize("w_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_every_torchao_scaler(w_dtype, backend, device):
    weight = quantize(random_weight(512, 256, torch.float32, device).to(w_dtype), "torchao")
    weight.quantized_scalers.copy_(torch.arange(2048, device=device).to(torch.int8))
    weight.quantization_factor.copy_(torch.logspace(0, 4, 8, device=device))
    weight.scaler_mean.fill_(0.37)
    with fastfuse.backend(backend):
        assert torch.equal(nf4_dequantize(weight), host_dequantize(weight, w_dtype))


@pytest.mark.parametrize("storage", STORAGES)
def test_registered_op(storage, device):
    weight = NF4View.of(quantize(random_weight(64, 256, device=device), storage))
    torch.library.opcheck(torch.ops.fastfuse.nf4_dequantize, (*weight.parts(), torch.bfloat16, False))


def test_refuses_other_dtypes():
    with pytest.raises(fastfuse.Unsupported, match=r"nf4_dequantize: dtype is torch.float64"):
        nf4_dequantize(quantize(random_weight(64, 64), "flat"), torch.float64)
