"""Dequantized weights equal the host library's own, to the bit, in the reference, in C and in the kernel."""

from functools import partial

import pytest
import torch
from numerics import assert_no_worse, opcheck
from torch import nn

import fastfuse
from cases.weights import STORAGES, host_dequantize, quantize, random_weight, to_nf4
from fastfuse.ops import nf4_dequantize
from fastfuse.ops.nf4_dequantize import DequantizeArgs, _dequantize
from fastfuse.quant import NF4View
from fastfuse.quant.nf4 import Layout

F32, F16, BF16 = DTYPES = torch.float32, torch.float16, torch.bfloat16
BACKENDS = "torch", "auto", "triton"


def made(storage, dtype, device, N=256, K=320, block_size=64):
    return quantize(random_weight(N, K, dtype, device), storage, block_size)


def factors_by(scale_block, dtype, device):
    """QLoRA of the vision encoder shares a factor among 200 blocks of 64."""
    return to_nf4(random_weight(400 if scale_block == 200 else 256, 256, dtype, device), 64, scale_block)


def last_group_cut(device):
    """300 blocks in groups of 128."""
    weight = made("nested", F32, device, 75, 256)
    nested = weight.quant_state.state2
    nested.blocksize, nested.absmax = 128, torch.tensor([0.5, 1.25, 3.0], device=device)
    return weight


def loaded(dtype, table, device):
    """Loading a bf16 weight into an fp32 NF4 parameter leaves bf16's table there: -0.6953125 for -0.6962."""
    weight = made("torchao", dtype, device, 256, 128)
    weight.copy_(random_weight(256, 128, table, device))
    return weight


def every_scaler(dtype, device):
    weight = made("torchao", dtype, device, 512, 256)
    weight.quantized_scalers.copy_(torch.arange(2048, device=device).to(torch.int8))
    weight.quantization_factor.copy_(torch.logspace(0, 4, 8, device=device))
    weight.scaler_mean.fill_(0.37)
    return weight


WEIGHTS = {
    **{f"{s} of {d}": partial(made, s, d) for s in STORAGES for d in DTYPES},
    **{f"{s}, blocks of {b}": partial(made, s, F16, N=50, K=200, block_size=b) for s in STORAGES[:2] for b in (32, 128, 4096)},  # across rows; the last is cut
    **{f"factors of {b}, {d}": partial(factors_by, b, d) for b, d in ((64, F32), (128, F16), (200, BF16), (200, F32), (256, F16))},
    **{f"{d} with the table of {table}": partial(loaded, d, table) for d in DTYPES for table in DTYPES},
    **{f"every scaler of torchao, {d}": partial(every_scaler, d) for d in DTYPES},
    "an odd number of elements": partial(made, "flat", F32, N=3, K=67),
    "the last group of scales cut": last_group_cut,
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_equal_to_the_bit(name, device):
    weight = WEIGHTS[name](device=device)
    for dtype in DTYPES:
        want = host_dequantize(weight, dtype)
        for backend in BACKENDS:
            got = nf4_dequantize(weight, dtype, backend=backend)
            assert got.dtype == dtype and torch.equal(got, want), (dtype, backend)
    assert nf4_dequantize(weight).dtype == NF4View.of(weight).dtype


@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
def test_weight_of_a_module_cast_to_another_dtype(dtype, device):
    """Its numbers are still what it was quantized to, rounded once; torchao's own rounds each scale as well."""
    layer = nn.Linear(128, 256, bias=False, device=device)
    layer.weight = nn.Parameter(made("torchao", F32, device, 256, 128))
    want = layer.weight.get_original_weight()
    layer.to(dtype)
    assert layer.weight.dtype == dtype and NF4View.of(layer.weight).dtype == F32, "that of the scales, which stay"
    for backend in BACKENDS:
        assert torch.equal(nf4_dequantize(layer.weight, dtype, backend=backend), want.to(dtype))
    assert_no_worse(nf4_dequantize(layer.weight, dtype), host_dequantize(layer.weight, dtype), want)


@pytest.mark.parametrize("storage", ["flat", "nested"])
def test_every_code_under_adversarial_scales(storage, device):
    """All 256 bytes under scales that are tiny, huge, negative, subnormal and of every nested index, against the formula: a code's value times
    its scale in fp32, rounded once. (bitsandbytes' own decode flushes subnormal results to zero on a GPU, and in bf16 with AVX-512.)"""
    every = torch.arange(256, dtype=torch.uint8, device=device).repeat(256)  # 131,072 elements, 2048 blocks of 64
    weight = made(storage, F32, device, 512, 256)
    weight.data.copy_(every[:, None])
    state, nested = weight.quant_state, weight.quant_state.state2
    if storage == "flat":
        absmax = state.absmax.copy_(torch.tensor([1e-38, 3e-5, 6e-8, 1.0, -2.5, 60000.0, 1 / 3, 0.0], device=device).repeat(256))
    else:
        state.absmax.copy_(torch.arange(2048, device=device).to(torch.uint8))
        nested.absmax.copy_(torch.logspace(-6, 3, 8, device=device))
        state.offset.fill_(0.7)
        absmax = nested.code[state.absmax.int()] * nested.absmax.repeat_interleave(nested.blocksize) + state.offset
    exact = (state.code[torch.stack([every >> 4, every & 15], 1).int()].view(-1, 64) * absmax[:, None]).view(512, 256)
    for dtype in DTYPES:
        for backend in BACKENDS[1:]:
            assert torch.equal(nf4_dequantize(weight, dtype, backend=backend), exact.to(dtype)), (dtype, backend)


@pytest.mark.parametrize("storage", [*STORAGES, "by 200"])
def test_registered_op(storage, device):
    weight = NF4View.of(factors_by(200, F32, device) if storage == "by 200" else made(storage, F32, device, 64, 256))
    opcheck(_dequantize, DequantizeArgs(weight.tensors(), Layout.of(weight), weight.shape, BF16, False))


def test_refuses_other_dtypes():
    with pytest.raises(fastfuse.Unsupported, match=r"nf4_dequantize: dtype is torch.float64"):
        nf4_dequantize(made("flat", F32, "cpu"), torch.float64)
