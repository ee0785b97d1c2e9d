"""NF4View: zero-copy over every storage, and a clear no for what it cannot read."""

from dataclasses import replace

import bitsandbytes as bnb
import pytest
import torch
from torch import nn

from cases.weights import STORAGES, quantize, random_weight, requantized, to_nf4
from fastfuse import Unsupported
from fastfuse.kernels.nf4 import BITSANDBYTES, codebook_values
from fastfuse.ops import nf4_dequantize
from fastfuse.quant import NF4View
from fastfuse.quant.nf4 import of_bitsandbytes

HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def made(storage="nested", dtype=torch.float32):
    return quantize(random_weight(64, 256, dtype), storage)


@pytest.mark.parametrize("storage", STORAGES)
def test_views_not_copies(storage):
    weight = made(storage)
    view = NF4View.of(weight)
    packed, scales = (weight.quantized_data, weight.quantized_scalers) if storage == "torchao" else (weight.data, weight.quant_state.absmax)
    assert view.packed.data_ptr() == packed.data_ptr() and view.scales[0] is scales
    assert view.shape == (64, 256) and view.block_size == 64 and view.scale_block == 256
    assert view.nbytes == sum(t.numel() * t.element_size() for t in (view.packed, view.code, *view.scales))
    assert NF4View.of(view) is view
    assert torch.equal(nf4_dequantize(replace(view)), nf4_dequantize(weight))


@pytest.mark.parametrize("storage_dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
def test_bytes_stored_as_floats(storage_dtype):
    """FSDP setups store the bytes in a float dtype; some patterns are NaN, none may change."""
    plain = made()
    stored = bnb.nn.Params4bit(random_weight(64, 256), requires_grad=False, quant_type="nf4", quant_storage=storage_dtype).to("cpu")
    stored.data.view(torch.uint8).view(-1).copy_(plain.data.view(-1))
    stored.quant_state = plain.quant_state
    assert stored.data.dtype == storage_dtype and torch.equal(nf4_dequantize(stored), nf4_dequantize(plain))


@pytest.mark.parametrize("name, dtype", [("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)])
def test_codebooks_are_the_host_libraries_own(name, dtype):
    assert list(BITSANDBYTES) == made("flat").quant_state.code.tolist()
    assert codebook_values(True, name) == made("torchao", dtype).nf4.tolist()


class DTensor:
    def __init__(self, local=None):
        self._local_tensor = local


def changed(weight, **state):
    vars(weight.quant_state).update(state)
    return weight


def unpacked(dtype):
    """bitsandbytes leaves the scales [K / block, N] in bf16, under the codes of [N, K]: its own decode, and any kernel, would take another block's."""
    weight = made("flat")
    return changed(weight, absmax=weight.quant_state.absmax.view(64, 4).T.to(dtype).contiguous())


UNREADABLE = {
    "QUANT_TYPE": lambda: bnb.nn.Params4bit(torch.randn(64, 64), requires_grad=False, quant_type="fp4").to("cpu"),
    "CPU_PACKED_BNB": lambda: changed(made("flat"), packing_format_for_cpu=True),
    "CPU_UNPACKED_BNB": lambda: unpacked(torch.bfloat16),
    "CPU_UNPACKED_BNB, widened": lambda: unpacked(torch.float32),
    "TRANSPOSED": lambda: made("torchao").t(),
    "DTENSOR": lambda: DTensor(made("torchao")),
    "DTENSOR, empty": DTensor,
    "BLOCK_SIZE": lambda: DTensor(to_nf4(random_weight(64, 256), 16, 256)),  # of the whole weight too
}


@pytest.mark.parametrize("code", UNREADABLE)
def test_unreadable_storages(code):
    with pytest.raises(Unsupported) as e:
        NF4View.of(UNREADABLE[code]())
    assert "\n" not in str(e.value) and e.value.code == code.split(",")[0]
    assert code != "CPU_UNPACKED_BNB" or "its absmax is torch.bfloat16 (4, 64), as bitsandbytes leaves it after packing" in str(e.value)


def with_changes(**changes):
    """A hand-made view: a kernel would read a wrong part as if it were right."""
    view = NF4View.of(made())
    return replace(view, **{name: change(getattr(view, name)) if callable(change) else change for name, change in changes.items()})


def in_16_bits(part, name):
    """bitsandbytes reads their bytes as fp32."""
    state = (weight := made()).quant_state
    owner = state if part == "table" else state.state2
    setattr(owner, name, getattr(owner, name).bfloat16())
    return NF4View.of(weight)


@pytest.mark.parametrize(
    "view, error, message",
    [
        (lambda: NF4View.of(nn.Linear(4, 4).weight), TypeError, "weight is a Parameter of torch.float32, neither NF4View, Params4bit nor NF4Tensor"),
        (lambda: NF4View.of("weight"), TypeError, "weight is a str"),
        (lambda: NF4View.of(bnb.nn.Params4bit(torch.randn(64, 64), requires_grad=False, quant_type="nf4")), ValueError, "not quantized yet"),
        (
            lambda: NF4View.of(changed(made("flat"), shape=torch.Size([64, 128]))),
            ValueError,
            r"packed is torch.uint8 \(8192,\), a weight of shape \(64, 128\) needs torch.uint8 \(4096,\)",
        ),
        (lambda: with_changes(packed=lambda t: t.repeat_interleave(2)[::2]), ValueError, r"contiguous and on cpu, packed is on cpu with strides \(2,\)"),
        (lambda: with_changes(code=lambda t: t.to("meta")), ValueError, r"must be contiguous and on cpu, code is on meta with strides \(1,\)"),
        (lambda: with_changes(scales=lambda scales: scales[:2]), ValueError, "2 scale tensors, expected 1, 3 or 4"),
        (lambda: with_changes(scale_block=200), ValueError, r"scales\[2\] is torch.float32 \(1,\), a weight of .* needs torch.float32 \(2,\)"),
        (lambda: with_changes(scale_block=0), ValueError, "scale_block is 0, expected at least 1"),
        (lambda: with_changes(block_size=48), Unsupported, "block_size is 48"),
        *(
            (lambda part=part, name=name: in_16_bits(part, name), ValueError, r"is torch.bfloat16 .* needs torch.float32")
            for part, name in (("nested", "absmax"), ("nested", "code"), ("table", "code"))
        ),
    ],
)
def test_refusals(view, error, message):
    with pytest.raises(error, match=message):
        view()


@pytest.mark.parametrize("storage", STORAGES)
def test_every_part_of_another_dtype_or_shape_is_named(storage):
    view = NF4View.of(made(storage))
    parts = {"packed": view.packed, "code": view.code} | {f"scales[{i}]": part for i, part in enumerate(view.scales)}
    for name, part in parts.items():
        for wrong in (part.to(torch.bfloat16), torch.cat([part.view(-1), part.view(-1)]), part.view(1, -1)):
            packed, code, *scales = (parts | {name: wrong}).values()
            with pytest.raises(ValueError) as e:
                replace(view, packed=packed, code=code, scales=tuple(scales))
            assert str(e.value).startswith(f"NF4View: {name} is {wrong.dtype} {tuple(wrong.shape)}, a weight of shape (64, 256) needs {part.dtype}")


@pytest.mark.parametrize("offset_dtype", ["fp32", "as quantized"])
@HALVES
def test_nested_scales_quantized_from_16_bits(dtype, offset_dtype):
    """bitsandbytes' dequantize_4bit rounds the product, and then the sum, to what the scales were quantized from. Its Linear4bit rounds neither."""
    weight = requantized(dtype, torch.float32 if offset_dtype == "fp32" else dtype)
    state = weight.quant_state
    each = state.state2.absmax.repeat_interleave(256)[: state.absmax.numel()]
    product = state.state2.code[state.absmax.long()] * each
    rounded = (product.to(dtype).double() + state.offset.double()).to(dtype)  # one rounding: fp64 holds the sum of two 16-bit numbers
    code = state.code.double()[torch.stack([weight.data.view(-1) >> 4, weight.data.view(-1) & 15], 1).view(-1).long()].view(-1, 64)

    def decoded(scales):
        return (code * scales.double()[:, None]).float().view(256, 320)  # fp32 rounds the exact product once, as the library does

    want, linear = decoded(rounded), decoded(product + state.offset.float())
    for out in (torch.float32, torch.float16, torch.bfloat16):
        for backend in ("auto", "torch"):
            assert torch.equal(nf4_dequantize(weight, out, backend=backend), want.to(out)), out
    assert torch.equal(bnb.functional.dequantize_4bit(weight.data, state), want.to(dtype))
    assert torch.equal(nf4_dequantize(of_bitsandbytes(weight, state, as_linear=True), torch.float32), linear)
    assert (linear != want).double().mean() > 0.2  # the two are different weights


@HALVES
def test_flat_scales_in_16_bits_are_read_as_the_numbers_they_are(dtype):
    """What casting a checkpoint leaves: bitsandbytes widens them."""
    weight, twin = made("flat"), made("flat")
    cast = weight.quant_state.absmax.to(dtype)
    twin.data = weight.data
    assert torch.equal(nf4_dequantize(changed(weight, absmax=cast)), nf4_dequantize(changed(twin, absmax=cast.float())))
