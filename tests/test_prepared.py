"""Prepared calls of linear layers: the same bits as the whole way, and whatever changes between two calls is seen by the very next one."""

import functools
from operator import methodcaller

import pytest
import torch
from accelerate.hooks import remove_hook_from_module
from prepared_layers import (
    F32,
    HOOKS,
    LAYERS,
    Another,
    P,
    X,
    a_of,
    adapted,
    children,
    forget,
    other_base,
    own,
    prepared,
    results,
    same,
    served,
    twice_the_adapter,
    weights,
)
from qlora import HOSTS, lora
from torch import nn
from torch.nn.modules import module as nn_module

from cases.linear import BF16, F16
from cases.weights import quantize, requantized
from fastfuse.modules import _prepared
from fastfuse.modules.peft import DoRALinear, LoRALinear
from fastfuse.quant import NF4View

pytestmark = pytest.mark.filterwarnings("ignore:fastfuse. .* runs its own forward", "ignore:Unmerge lora module", "ignore:Merge lora module")
DTYPES = [F32, BF16, F16]
SAME = [(kind, dtype, (i + j) % 2 == 0) for i, kind in enumerate(LAYERS) for j, dtype in enumerate(DTYPES)]


@pytest.mark.parametrize("kind, dtype, grad", SAME, ids=str)
def test_same_bits(kind, dtype, grad, taken, monkeypatch):
    """And nothing is looked at again."""
    layer = prepared(LAYERS[kind](dtype), weights(2, 128).to(dtype))
    for shape in ((1,), (7,), (33,), (1, 1), (3, 11)):
        x, before = weights(*shape, 128).to(dtype), len(taken)
        with monkeypatch.context() as patch:
            if kind != "DoRALinear":  # which may keep its norms, and reads the weight to know
                patch.setattr(NF4View, "__post_init__", None)
            got = results(layer, grad, x)
        assert taken[before:] == [True]
        forget(layer)
        want = results(layer, grad, x)
        assert taken[before:] == [True] and same(got, want) and all(t is not None for t in got)


def holder(layer, path):
    """What has the attribute at the end of the path, and the attribute's name."""
    *way, name = path.split(".")
    return functools.reduce(getattr, way, layer), name


def put(path, value):
    return lambda layer: setattr(*holder(layer, path), value)


def swap(path, *shape):
    return lambda layer: torch.utils.swap_tensors(getattr(*holder(layer, path)), P(weights(*shape)))


def data(path, make):
    def act(layer):
        t = getattr(*holder(layer, path))
        t.data = make(t.data)

    return act


def change(path, how):
    """Other values, in one of the ways to get at them."""

    def act(layer):
        t = getattr(*holder(layer, path))
        other = t.data // 2 if t.dtype in (torch.uint8, torch.int8) else 2 * t.data
        if how == "replaced":
            setattr(*holder(layer, path), P(other) if isinstance(t, P) else other)
        elif how == "edited":
            t.data.copy_(other)
        else:
            t.data = other

    return act


def changes(prefix, *paths, hows=("replaced", "edited", ".data")):
    return {f"{path} {how}": change(prefix + path, how) for path in paths for how in hows}


def each(*acts):
    return lambda layer: [act(layer) for act in acts]


def another_adapter(act):
    return lambda up: (twice_the_adapter(up), act(up))


def an_adapter_that_was_active_before(up):
    up._active_adapter.append("other")
    up(X)
    twice_the_adapter(up)


def dora_added(up):
    """As an adapter loaded under the same name."""
    other = lora("bitsandbytes", use_dora=True).base_model.model.up
    up.lora_variant["default"], up.lora_magnitude_vector = other.lora_variant["default"], other.lora_magnitude_vector


A, B = "lora_A.default.weight", "lora_B.default.weight"
COMMON = {
    "set_adapter": another_adapter(methodcaller("set_adapter", "other")),
    "active list changed in place": another_adapter(lambda up: up._active_adapter.append("other")),
    "an adapter that was active before it came": an_adapter_that_was_active_before,
    "disabled": methodcaller("enable_adapters", False),
    "merged": methodcaller("merge"),
    "merged and unmerged": each(methodcaller("merge"), methodcaller("unmerge")),
    "scale_layer": methodcaller("scale_layer", 3.0),
    "scaled and unscaled": each(methodcaller("scale_layer", 3.0), methodcaller("unscale_layer", 2.0)),
    "set_scale": methodcaller("set_scale", "default", 5.0),
    "scaling is a tensor": lambda up: up.scaling.update(default=torch.tensor(5.0)),
    **changes("", A, B, "base_layer.bias"),
    "A loaded": lambda up: a_of(up).load_state_dict({"weight": weights(8, 128)}),
    "A loaded and assigned": lambda up: a_of(up).load_state_dict({"weight": weights(8, 128)}, assign=True),
    "A.data of another dtype": data(A, torch.Tensor.half),
    "A and B of another rank": each(data(A, lambda t: t[:4]), data(B, lambda t: t[:, :4].contiguous())),
    "A.data transposed": data(A, lambda t: t.flip(0).T.contiguous().T),
    "A.data misaligned": data(A, lambda t: torch.cat([t.new_zeros(1), t.flip(0).flatten()])[1:].view(8, 128)),
    "A.data negative": data(A, torch._neg_view),
    "A swapped": swap(A, 8, 128),
    "A and B swapped for another rank": each(swap(A, 4, 128), swap(B, 256, 4)),
    "A frozen": put(f"{A}.requires_grad", False),
    "module A replaced": lambda up: up.lora_A.update({"default": nn.Linear(128, 8, bias=False)}),
    "A of another class": put("lora_A.default.__class__", Another),
    "bias removed": put("base_layer.bias", None),
    "B bias": put("lora_B.default.bias", P(weights(256))),
    "dropout, training": each(lambda up: up.lora_dropout.update({"default": nn.Dropout(1.0)}), nn.Module.train),
    "a variant": dora_added,
    **{f"{hook}, {name}": lambda up, hook=hook, name=name: HOOKS[hook](children(up)[name]) for hook in HOOKS for name in ("A", "B", "dropout", "base")},
}
BITSANDBYTES = {
    "base replaced": lambda up: setattr(up.base_layer, "weight", other_base("bitsandbytes")),
    "base replaced by one with flat scales": lambda up: setattr(up.base_layer, "weight", quantize(weights(256, 128), "flat")),
    "quant_state replaced": lambda up: setattr(up.base_layer.weight, "quant_state", other_base("bitsandbytes").quant_state),
    "compute_dtype": put("base_layer.compute_dtype", BF16),
    **changes("base_layer.", "weight", hows=("edited", ".data")),
    **changes("base_layer.weight.quant_state.", "absmax", "offset", "code", "state2.absmax", "state2.code"),
}
TORCHAO = {
    "base replaced": lambda up: setattr(up.base_layer, "weight", P(other_base("torchao"), requires_grad=False)),
    "base swapped": lambda up: torch.utils.swap_tensors(up.base_layer.weight, P(other_base("torchao"), requires_grad=False)),
    **changes("base_layer.weight.", "quantized_data", "nf4", "quantized_scalers", "quantization_factor", "scaler_mean"),
}
# Where the layer then runs its own forward, or what has come of it is not prepared.
NOT_AGAIN = {
    "active list changed in place", "an adapter that was active before it came", "disabled", "merged", "scaling is a tensor", "A.data transposed",
    "A.data misaligned", "A.data negative", "A of another class", "B bias", "dropout, training", "compute_dtype",
}.union(name for name in COMMON if name.partition(",")[0] in HOOKS)  # fmt: skip
CHANGES = {"bitsandbytes": COMMON | BITSANDBYTES, "torchao": {n: c for n, c in COMMON.items() if "merged" not in n} | TORCHAO}  # torchao's cannot be merged


@pytest.mark.parametrize("host, name", [(host, name) for host in HOSTS for name in CHANGES[host]])
def test_a_change_is_seen_by_the_next_call(host, name):
    for grad in (False, True):
        layer = prepared(adapted(host, lora_dropout=0.1, training=False))
        before = results(layer, grad)
        layer.set_adapter(["default"])  # a list, that can be changed in place
        prepared(layer)
        CHANGES[host][name](layer)
        got = results(layer, grad)
        forget(layer)
        assert same(got, results(layer, grad))
        assert not grad or name == "merged and unmerged" or not same(got, before)
        layer(X)
        assert served(layer) != (name in NOT_AGAIN)


OWN = {
    "disabled": put("disabled", True),
    "alpha": each(put("alpha", 99.0), put("scaling", 99.0 / 8)),
    **changes("", "lora_a.weight", "weight.scaler_mean"),
    "B swapped": swap("lora_b.weight", 256, 8),
    "module B replaced": lambda m: setattr(m, "lora_b", nn.Linear(8, 256, bias=False)),
    "B bias": put("lora_b.bias", P(weights(256))),
    "bias": put("bias", P(weights(256))),
    "dropout, training": lambda m: m.train().register_module("dropout", nn.Dropout(1.0)),
    "A of another class": put("lora_a.__class__", Another),
    "hook": lambda m: HOOKS["forward hook"](m.lora_a),
    "weight replaced": lambda m: setattr(m, "weight", P(other_base("torchao"))),
}
OF_DORA = changes("", "magnitude") | {"magnitude in bf16": put("magnitude", P(weights(256).bfloat16()))}


@pytest.mark.parametrize("kind, name", [*((LoRALinear, name) for name in OWN), *((DoRALinear, name) for name in OWN | OF_DORA)])
def test_a_change_of_a_module_of_ones_own(kind, name):
    for grad in (False, True):
        layer = prepared(own(kind))
        before = results(layer, grad)
        (OWN | OF_DORA)[name](layer)
        got = results(layer, grad)
        forget(layer)
        assert same(got, results(layer, grad)) and not same(got, before)


TAKEN_OFF = [
    ("forward hook", "A"),
    ("pre-hook", "B"),
    ("backward hook", "dropout"),
    ("backward pre-hook", "base"),
    ("accelerate", "A"),
    ("forward hook", "base"),
]


@pytest.mark.parametrize("hook, child", TAKEN_OFF)
def test_a_hook_that_is_taken_off_again(hook, child):
    layer = prepared(adapted("bitsandbytes"))
    want, module = results(layer), children(layer)[child]
    handle = HOOKS[hook](module)
    assert not served(layer) and not same(results(layer), want)
    remove_hook_from_module(module) if hook == "accelerate" else handle.remove()
    assert same(results(layer), want)
    layer(X)
    assert served(layer)


@torch.no_grad()
def test_a_hook_on_every_module_runs():
    layer, seen = prepared(adapted("bitsandbytes")), []
    with nn_module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__)):
        layer(X)
    assert "Linear4bit" in seen and len(seen) > 2 and served(layer)


def test_a_forward_of_the_class_replaced(monkeypatch):
    layer = prepared(adapted("torchao"))
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 2 * nn.functional.linear(x, self.weight, self.bias))
    assert not served(layer)
    got = results(layer)
    forget(layer)
    assert same(got, results(layer)) and served(layer)


@pytest.mark.parametrize("dtype", [BF16, F16], ids=str)
def test_a_16_bit_offset_is_copied_at_every_call(dtype):
    layer = adapted("bitsandbytes")
    layer.base_layer.weight = requantized(BF16, dtype, 256, 128)
    layer(X)
    before = results(layer)
    layer.base_layer.weight.quant_state.offset.mul_(3)
    got = results(layer)
    forget(layer)
    assert same(got, results(layer)) and not same(got, before)


def test_without_pytorchs_guards(monkeypatch):
    """They are private. Every call then compares by hand what they compare."""
    monkeypatch.setattr(_prepared, "TensorGuards", None)
    layer, x = adapted("bitsandbytes"), weights(2, 3, 128)
    want = results(layer, False, x)
    assert same(results(prepared(layer, x), False, x), want) and served(layer, x)
    data(A, torch.Tensor.double)(layer)
    assert not served(layer, x)
