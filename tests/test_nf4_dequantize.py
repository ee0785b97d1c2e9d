"""Dequantized weights equal the host library's own, to the bit, in the reference and in the kernel."""

import pytest
import torch
from numerics import assert_no_worse, opcheck
from torch import nn
from weights import STORAGES, host_dequantize, quantize, random_weight, to_nf4

import fastfuse
from fastfuse.ops import nf4_dequantize
from fastfuse.ops.nf4_dequantize import DequantizeArgs, _dequantize
from fastfuse.quant import NF4View
from fastfuse.quant.nf4 import Layout

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


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("scale_block", [64, 128, 200, 256])
@pytest.mark.parametrize("backend", ["torch", "auto", "triton"])
def test_torchao_scale_blocks(backend, scale_block, dtype, device):
    """QLoRA of the vision encoder shares a factor among 200 blocks of 64."""
    N = 400 if scale_block == 200 else 256
    weight = to_nf4(random_weight(N, 256, dtype, device), 64, scale_block)
    assert weight.quantization_factor.numel() > 1
    with fastfuse.backend(backend):
        for out in DTYPES:
            assert torch.equal(nf4_dequantize(weight, out), host_dequantize(weight, out)), out


@pytest.mark.parametrize("backend", ["torch", "auto", "triton"])
def test_nested_scale_blocks(backend, device):
    """300 blocks in groups of 128: the last group is cut short."""
    weight = quantize(random_weight(75, 256, torch.float32, device), "nested")
    state = weight.quant_state
    state.state2.blocksize, state.state2.absmax = 128, torch.tensor([0.5, 1.25, 3.0], device=device)
    with fastfuse.backend(backend):
        assert torch.equal(nf4_dequantize(weight), host_dequantize(weight, torch.float32))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("loaded", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["torch", "auto", "triton"])
def test_table_of_a_checkpoint_in_another_dtype(backend, loaded, dtype, device):
    """Loading a bf16 weight into an fp32 NF4 parameter leaves bf16's table there: -0.6953125 for -0.6962."""
    weight = quantize(random_weight(256, 128, dtype, device), "torchao")
    weight.copy_(random_weight(256, 128, loaded, device))
    with fastfuse.backend(backend):
        for out in DTYPES:
            assert torch.equal(nf4_dequantize(weight, out), host_dequantize(weight, out)), out


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_weight_of_a_module_cast_to_another_dtype(dtype, device):
    """Its numbers are still what it was quantized to, rounded once; torchao's own rounds each scale as well."""
    layer = nn.Linear(128, 256, bias=False, device=device)
    layer.weight = nn.Parameter(quantize(random_weight(256, 128, torch.float32, device), "torchao"))
    want = layer.weight.get_original_weight()
    layer.to(dtype)
    for backend in ("torch", "auto", "triton"):
        assert torch.equal(nf4_dequantize(layer.weight, dtype, backend=backend), want.to(dtype))
    assert_no_worse(nf4_dequantize(layer.weight, dtype), host_dequantize(layer.weight, dtype), want)


def test_odd_number_of_elements(kernels, device):
    weight = quantize(random_weight(3, 67, torch.float32, device), "flat")
    assert torch.equal(nf4_dequantize(weight), host_dequantize(weight, torch.float32))


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_every_code_under_adversarial_scales(backend, device):
    """All 256 bytes under scales that are tiny, huge, negative, subnormal and of every nested index, against the formula: a code's value times
    its scale in fp32, rounded once. (bitsandbytes' own decode flushes subnormal results to zero on a GPU, and in bf16 with AVX-512.)"""
    every = torch.arange(256, dtype=torch.uint8, device=device).repeat(256)  # 131,072 elements, 2048 blocks of 64
    for storage in ("flat", "nested"):
        weight = quantize(random_weight(512, 256, torch.float32, device), storage)
        weight.data.copy_(every[:, None])
        state = weight.quant_state
        if storage == "flat":
            state.absmax.copy_(torch.tensor([1e-38, 3e-5, 6e-8, 1.0, -2.5, 60000.0, 1 / 3, 0.0], device=device).repeat(256))
            absmax = state.absmax
        else:
            state.absmax.copy_(torch.arange(2048, device=device).to(torch.uint8))
            state.state2.absmax.copy_(torch.logspace(-6, 3, 8, device=device))
            state.offset.fill_(0.7)
            nested = state.state2
            absmax = nested.code[state.absmax.int()] * nested.absmax.repeat_interleave(nested.blocksize) + state.offset
        exact = (state.code[torch.stack([every >> 4, every & 15], 1).int()].view(-1, 64) * absmax[:, None]).view(512, 256)
        with fastfuse.backend(backend):
            for dtype in DTYPES:
                assert torch.equal(nf4_dequantize(weight, dtype), exact.to(dtype)), (storage, dtype)


@pytest.mark.parametrize("w_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_every_torchao_scaler(w_dtype, backend, device):
    weight = quantize(random_weight(512, 256, torch.float32, device).to(w_dtype), "torchao")
    weight.quantized_scalers.copy_(torch.arange(2048, device=device).to(torch.int8))
    weight.quantization_factor.copy_(torch.logspace(0, 4, 8, device=device))
    weight.scaler_mean.fill_(0.37)
    with fastfuse.backend(backend):
        assert torch.equal(nf4_dequantize(weight), host_dequantize(weight, w_dtype))


@pytest.mark.parametrize("storage", [*STORAGES, "by 200"])
def test_registered_op(storage, device):
    weight = NF4View.of(to_nf4(random_weight(100, 128), 64, 200) if storage == "by 200" else quantize(random_weight(64, 256, device=device), storage))
    opcheck(_dequantize, DequantizeArgs(weight.tensors(), Layout.of(weight), weight.shape, torch.bfloat16, False))


def test_refuses_other_dtypes():
    with pytest.raises(fastfuse.Unsupported, match=r"nf4_dequantize: dtype is torch.float64"):
        nf4_dequantize(quantize(random_weight(64, 64), "flat"), torch.float64)
