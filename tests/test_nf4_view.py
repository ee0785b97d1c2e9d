"""NF4View: zero-copy over every storage, and a clear no for what it cannot read."""

import dataclasses

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from torchao.quantization import to_nf4
from weights import STORAGES, quantize, random_weight

from fastfuse import Unsupported
from fastfuse.kernels.nf4 import BITSANDBYTES, codebook_values
from fastfuse.ops import nf4_dequantize
from fastfuse.quant import NF4View


@pytest.mark.parametrize("storage", STORAGES)
def test_views_not_copies(storage):
    weight = quantize(random_weight(64, 256), storage)
    view = NF4View.of(weight)
    bytes_of = weight.quantized_data if storage == "torchao" else weight.data
    assert view.packed.data_ptr() == bytes_of.data_ptr()
    scales = weight.quantized_scalers if storage == "torchao" else weight.quant_state.absmax
    assert view.scales[0] is scales
    assert view.shape == (64, 256) and view.block_size == 64 and view.scale_block == 256
    assert view.nbytes == sum(t.numel() * t.element_size() for t in (view.packed, view.code, *view.scales))
    assert NF4View.of(view) is view
    assert torch.equal(nf4_dequantize(NF4View(*view.parts())), nf4_dequantize(weight))


@pytest.mark.parametrize("storage_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_bytes_stored_as_floats(storage_dtype):
    """FSDP setups store the bytes in a float dtype; some patterns are NaN, none may change."""
    plain = quantize(random_weight(64, 256), "nested")
    stored = bnb.nn.Params4bit(random_weight(64, 256), requires_grad=False, quant_type="nf4", quant_storage=storage_dtype).to("cpu")
    stored.data.view(torch.uint8).view(-1).copy_(plain.data.view(-1))
    stored.quant_state = plain.quant_state
    assert stored.data.dtype == storage_dtype
    assert torch.equal(nf4_dequantize(stored), nf4_dequantize(plain))


def test_parameter_and_transposed_weight():
    weight = quantize(random_weight(64, 256), "torchao")
    assert NF4View.of(nn.Parameter(weight, requires_grad=False)).shape == (64, 256)


def test_scale_blocks_of_other_sizes():
    weight = to_nf4(random_weight(100, 128), 32, 200)
    view = NF4View.of(weight)
    assert view.scale_block == 200 and view.scales[1].numel() == 2 and NF4View(*view.parts()).scale_block == 200


def test_dtype_is_that_of_the_stored_scales():
    """module.to(dtype) changes what an NF4Tensor shows and nothing it holds."""
    layer = nn.Linear(256, 64, bias=False)
    layer.weight = nn.Parameter(quantize(random_weight(64, 256), "torchao"))
    layer.to(torch.bfloat16)
    assert layer.weight.dtype == torch.bfloat16 and NF4View.of(layer.weight).dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_codebooks_are_the_host_libraries_own(dtype):
    assert list(BITSANDBYTES) == quantize(random_weight(64, 256), "flat").quant_state.code.tolist()
    name = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}[dtype]
    assert codebook_values(True, name) == quantize(random_weight(64, 256, dtype), "torchao").nf4.tolist()


def test_not_nf4():
    with pytest.raises(TypeError, match=r"weight is a Parameter of torch.float32, neither NF4View, Params4bit nor NF4Tensor"):
        NF4View.of(nn.Linear(4, 4).weight)
    with pytest.raises(TypeError, match="weight is a str"):
        NF4View.of("weight")


def test_not_quantized_yet():
    with pytest.raises(ValueError, match="not quantized yet"):
        NF4View.of(bnb.nn.Params4bit(torch.randn(64, 64), requires_grad=False, quant_type="nf4"))


def refusal(weight) -> str:
    with pytest.raises(Unsupported) as e:
        NF4View.of(weight)
    assert "\n" not in str(e.value)
    return e.value.code


def test_unreadable_storages():
    fp4 = bnb.nn.Params4bit(torch.randn(64, 64), requires_grad=False, quant_type="fp4").to("cpu")
    assert refusal(fp4) == "QUANT_TYPE"
    packed = quantize(random_weight(64, 64), "flat")
    packed.quant_state.packing_format_for_cpu = True
    assert refusal(packed) == "CPU_PACKED_BNB"
    assert refusal(quantize(random_weight(64, 256), "torchao").t()) == "TRANSPOSED"

    class DTensor:
        pass

    assert refusal(DTensor()) == "DTENSOR"


def test_bytes_that_do_not_fit_the_shape():
    weight = quantize(random_weight(64, 64), "flat")
    weight.quant_state.shape = torch.Size([64, 128])
    with pytest.raises(ValueError, match=r"packed is torch.uint8 \(2048,\), a weight of shape \(64, 128\) needs torch.uint8 \(4096,\)"):
        NF4View.of(weight)


def test_hand_made_views_are_checked():
    view = NF4View.of(quantize(random_weight(64, 256), "nested"))
    with pytest.raises(ValueError, match=r"scales\[0\] has 255 entries, a weight of shape \(64, 256\) needs 256"):
        dataclasses.replace(view, scales=(view.scales[0][:255], *view.scales[1:]))
    with pytest.raises(ValueError, match="must be contiguous"):
        dataclasses.replace(view, packed=view.packed.repeat_interleave(2)[::2])
    with pytest.raises(ValueError, match="2 scale tensors, expected 1, 3 or 4"):
        dataclasses.replace(view, scales=view.scales[:2])
    with pytest.raises(ValueError, match=r"scales\[2\] has 1 entries, a weight of shape \(64, 256\) needs 2"):
        dataclasses.replace(view, scale_block=200)
    with pytest.raises(ValueError, match="scale_block is 0, expected at least 1"):
        dataclasses.replace(view, scale_block=0)
    with pytest.raises(Unsupported, match="block_size is 48"):
        dataclasses.replace(view, block_size=48)
