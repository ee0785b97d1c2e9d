"""NF4View: zero-copy over every storage, and a clear no for what it cannot read."""

import dataclasses
from dataclasses import replace

import bitsandbytes as bnb
import pytest
import torch
from torch import nn
from weights import STORAGES, quantize, random_weight, requantized, to_nf4

from fastfuse import Unsupported
from fastfuse.kernels.nf4 import BITSANDBYTES, codebook_values
from fastfuse.ops import nf4_dequantize
from fastfuse.quant import NF4View
from fastfuse.quant.nf4 import of_bitsandbytes


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
    assert torch.equal(nf4_dequantize(replace(view)), nf4_dequantize(weight))


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
    assert view.scale_block == 200 and view.scales[1].numel() == 2 and replace(view).scale_block == 200


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
        def __init__(self, local=None):
            self._local_tensor = local

    assert refusal(DTensor()) == refusal(DTensor(quantize(random_weight(64, 256), "torchao"))) == "DTENSOR"
    assert refusal(DTensor(to_nf4(random_weight(64, 256), 16, 256))) == "BLOCK_SIZE"  # of the whole weight too


def test_bytes_that_do_not_fit_the_shape():
    weight = quantize(random_weight(64, 64), "flat")
    weight.quant_state.shape = torch.Size([64, 128])
    with pytest.raises(ValueError, match=r"packed is torch.uint8 \(2048,\), a weight of shape \(64, 128\) needs torch.uint8 \(4096,\)"):
        NF4View.of(weight)


def test_hand_made_views_are_checked():
    """dtype, shape, contiguity and device of every part: a kernel would read a wrong one as if it were right."""
    view = NF4View.of(quantize(random_weight(64, 256), "nested"))
    with pytest.raises(ValueError, match=r"scales\[0\] is torch.uint8 \(255,\), a weight of shape \(64, 256\) needs torch.uint8 \(256,\)"):
        dataclasses.replace(view, scales=(view.scales[0][:255], *view.scales[1:]))
    with pytest.raises(ValueError, match=r"must be contiguous and on cpu, packed is on cpu with strides \(2,\)"):
        dataclasses.replace(view, packed=view.packed.repeat_interleave(2)[::2])
    with pytest.raises(ValueError, match=r"must be contiguous and on cpu, code is on meta with strides \(1,\)"):
        dataclasses.replace(view, code=view.code.to("meta"))
    with pytest.raises(ValueError, match="2 scale tensors, expected 1, 3 or 4"):
        dataclasses.replace(view, scales=view.scales[:2])
    with pytest.raises(ValueError, match=r"scales\[2\] is torch.float32 \(1,\), a weight of shape \(64, 256\) needs torch.float32 \(2,\)"):
        dataclasses.replace(view, scale_block=200)
    with pytest.raises(ValueError, match="scale_block is 0, expected at least 1"):
        dataclasses.replace(view, scale_block=0)
    with pytest.raises(Unsupported, match="block_size is 48"):
        dataclasses.replace(view, block_size=48)


@pytest.mark.parametrize("storage", STORAGES)
def test_every_part_of_another_dtype_or_shape_is_named(storage):
    view = NF4View.of(quantize(random_weight(64, 256), storage))
    parts = {"packed": view.packed, "code": view.code} | {f"scales[{i}]": part for i, part in enumerate(view.scales)}
    for name, part in parts.items():
        for wrong in (part.to(torch.bfloat16), torch.cat([part.view(-1), part.view(-1)]), part.view(1, -1)):
            given = dict(parts, **{name: wrong})
            scales = tuple(given[n] for n in given if n.startswith("scales"))
            with pytest.raises(ValueError) as e:
                dataclasses.replace(view, packed=given["packed"], code=given["code"], scales=scales)
            assert str(e.value).startswith(f"NF4View: {name} is {wrong.dtype} {tuple(wrong.shape)}, a weight of shape (64, 256) needs {part.dtype}")


@pytest.mark.parametrize("offset_dtype", ["fp32", "as quantized"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_nested_scales_quantized_from_16_bits(dtype, offset_dtype):
    """bitsandbytes' dequantize_4bit rounds the product, and then the sum, to what the scales were quantized from. Its Linear4bit rounds neither."""
    weight = requantized(dtype, torch.float32 if offset_dtype == "fp32" else dtype)
    state = weight.quant_state
    each = state.state2.absmax.repeat_interleave(256)[: state.absmax.numel()]
    product = (state.state2.code[state.absmax.long()] * each).to(dtype)
    scales = (product.double() + state.offset.double()).to(dtype)  # one rounding: fp64 holds the sum of two 16-bit numbers
    code = state.code.double()[torch.stack([weight.data.view(-1) >> 4, weight.data.view(-1) & 15], 1).view(-1).long()].view(-1, 64)
    want = (code * scales.double()[:, None]).float().view(256, 320)  # fp32 rounds the exact product once, as the library does
    for out in (torch.float32, torch.float16, torch.bfloat16):
        assert torch.equal(nf4_dequantize(weight, out), want.to(out)), out
        assert torch.equal(nf4_dequantize(weight, out, backend="torch"), want.to(out)), out
    assert torch.equal(bnb.functional.dequantize_4bit(weight.data, state), want.to(dtype))

    linear = nf4_dequantize(of_bitsandbytes(weight, state, as_linear=True), torch.float32)
    unrounded = state.state2.code[state.absmax.long()] * each + state.offset.float()
    assert torch.equal(linear, (code * unrounded.double()[:, None]).float().view(256, 320))
    assert (linear != want).double().mean() > 0.2  # the two are different weights


def test_flat_scales_that_were_packed_and_unpacked_are_refused():
    """bitsandbytes leaves them [K / block, N] in bf16, under the codes of [N, K]: its own decode, and any kernel, would take another block's."""
    weight = quantize(random_weight(64, 256), "flat")
    weight.quant_state.absmax = weight.quant_state.absmax.view(64, 4).T.bfloat16().contiguous()
    assert refusal(weight) == "CPU_UNPACKED_BNB"
    with pytest.raises(Unsupported, match=r"its absmax is torch.bfloat16 \(4, 64\), as bitsandbytes leaves it after packing"):
        NF4View.of(weight)
    weight.quant_state.absmax = weight.quant_state.absmax.float()
    assert refusal(weight) == "CPU_UNPACKED_BNB"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_flat_scales_in_16_bits_are_read_as_the_numbers_they_are(dtype):
    """What casting a checkpoint leaves: bitsandbytes widens them."""
    weight = quantize(random_weight(64, 256), "flat")
    weight.quant_state.absmax = weight.quant_state.absmax.to(dtype)
    twin = quantize(random_weight(64, 256), "flat")
    twin.data, twin.quant_state.absmax = weight.data, weight.quant_state.absmax.float()
    assert torch.equal(nf4_dequantize(weight), nf4_dequantize(twin))


@pytest.mark.parametrize("part", ["absmax2", "code2", "table"])
def test_nested_parts_in_16_bits_are_refused(part):
    """bitsandbytes reads their bytes as fp32."""
    weight = quantize(random_weight(64, 256), "nested")
    state = weight.quant_state
    owner, name = {"absmax2": (state.state2, "absmax"), "code2": (state.state2, "code"), "table": (state, "code")}[part]
    setattr(owner, name, getattr(owner, name).bfloat16())
    with pytest.raises(ValueError, match=r"is torch.bfloat16 .* needs torch.float32"):
        NF4View.of(weight)
