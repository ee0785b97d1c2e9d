"""Prepared calls of linear layers: the same bits as the whole way, and whatever changes between two calls is seen by the very next one."""

import copy
import functools

import pytest
import torch
from accelerate.hooks import remove_hook_from_module
from peft import LoraConfig
from prepared_layers import (
    F32,
    HOOKS,
    LAYERS,
    Another,
    P,
    a_of,
    b_of,
    children,
    forget,
    other_base,
    own,
    patched,
    prepared,
    results,
    same,
    served,
    weights,
)
from qlora import HOSTS, lora
from torch import nn
from torch.nn.modules import module as nn_module
from weights import requantized

from fastfuse.modules import _prepared
from fastfuse.modules.peft import DoRALinear, LoRALinear

pytestmark = pytest.mark.filterwarnings("ignore:fastfuse. .* runs its own forward", "ignore:Unmerge lora module", "ignore:Merge lora module")


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_same_bits(kind, dtype, grad, taken):
    layer = prepared(LAYERS[kind](dtype), weights(2, 128).to(dtype))
    for shape in ((1,), (7,), (33,), (1, 1), (3, 11)):
        x, before = weights(*shape, 128).to(dtype), len(taken)
        got = results(layer, x, grad)
        assert taken[before:] == [True]
        forget(layer)
        want = results(layer, x, grad)
        assert taken[before:] == [True] and same(got, want) and all(t is not None for t in got)


def add(m, rank):
    m.add_adapter("other", LoraConfig(r=rank, target_modules=["up"], init_lora_weights=False))


def edit(t, make=lambda t: t.flip(0)):
    t.data = make(t.data)


def twice_the_adapter(up):
    for held in (up.lora_A, up.lora_B, up.lora_dropout, up.scaling):
        held.update({"other": copy.deepcopy(held["default"])})


def dora_added(m, up):
    """As an adapter loaded under the same name."""
    up.lora_variant["default"] = lora("bitsandbytes", use_dora=True).base_model.model.up.lora_variant["default"]
    up.lora_magnitude_vector = lora("bitsandbytes", use_dora=True).base_model.model.up.lora_magnitude_vector


# (the PEFT model, its layer `up`): what is changed
COMMON = {
    "set_adapter": lambda m, up: (add(m, 4), m.set_adapter("other")),
    "active list changed in place": lambda m, up: (add(m, 8), up._active_adapter.append("other")),
    "an adapter that was active before it came": lambda m, up: (up._active_adapter.append("other"), up(weights(3, 128)), twice_the_adapter(up)),
    "disabled": lambda m, up: up.enable_adapters(False),
    "merged": lambda m, up: up.merge(),
    "the model merged": lambda m, up: m.merge_adapter(),
    "merged and unmerged": lambda m, up: (up.merge(), up.unmerge()),
    "scale_layer": lambda m, up: up.scale_layer(3.0),
    "scaled and unscaled": lambda m, up: (up.scale_layer(3.0), up.unscale_layer(2.0)),
    "set_scale": lambda m, up: up.set_scale("default", 5.0),
    "scaling is a tensor": lambda m, up: up.scaling.update(default=torch.tensor(5.0)),
    "A replaced": lambda m, up: setattr(a_of(up), "weight", P(weights(8, 128))),
    "B replaced": lambda m, up: setattr(b_of(up), "weight", P(weights(256, 8))),
    "A edited": lambda m, up: a_of(up).weight.data.add_(1),
    "A loaded": lambda m, up: a_of(up).load_state_dict({"weight": weights(8, 128)}),
    "A loaded and assigned": lambda m, up: a_of(up).load_state_dict({"weight": weights(8, 128)}, assign=True),
    "A.data": lambda m, up: edit(a_of(up).weight),
    "A.data of another dtype": lambda m, up: up.lora_A.half(),
    "A and B of another rank": lambda m, up: (edit(a_of(up).weight, lambda t: t[:4]), edit(b_of(up).weight, lambda t: t[:, :4].contiguous())),
    "A.data transposed": lambda m, up: edit(a_of(up).weight, lambda t: t.flip(0).T.contiguous().T),
    "A.data misaligned": lambda m, up: edit(a_of(up).weight, lambda t: torch.cat([t.new_zeros(1), t.flip(0).flatten()])[1:].view(8, 128)),
    "A.data negative": lambda m, up: edit(a_of(up).weight, lambda t: torch._neg_view(t)),
    "A swapped": lambda m, up: torch.utils.swap_tensors(a_of(up).weight, P(weights(8, 128))),
    "A and B swapped for another rank": lambda m, up: [
        torch.utils.swap_tensors(child.weight, P(weights(*shape))) for child, shape in ((a_of(up), (4, 128)), (b_of(up), (256, 4)))
    ],
    "A frozen": lambda m, up: a_of(up).weight.requires_grad_(False),
    "module A replaced": lambda m, up: up.lora_A.update({"default": nn.Linear(128, 8, bias=False)}),
    "A of another class": lambda m, up: setattr(a_of(up), "__class__", Another),
    "bias replaced": lambda m, up: setattr(up.base_layer, "bias", P(weights(256))),
    "bias edited": lambda m, up: up.base_layer.bias.data.add_(1),
    "bias removed": lambda m, up: setattr(up.base_layer, "bias", None),
    "B bias": lambda m, up: setattr(b_of(up), "bias", P(weights(256))),
    "dropout, training": lambda m, up: (up.lora_dropout.update({"default": nn.Dropout(1.0)}), up.train()),
    "a variant": dora_added,
    **{
        f"{hook}, {name}": lambda m, up, hook=hook, name=name: HOOKS[hook](children(up)[name])
        for hook in HOOKS for name in ("A", "B", "dropout", "base")
    },
}  # fmt: skip
BITSANDBYTES = {
    "base replaced": lambda m, up: setattr(up.base_layer, "weight", other_base("bitsandbytes")),
    "base.data": lambda m, up: edit(up.base_layer.weight),
    "base edited": lambda m, up: up.base_layer.weight.data.bitwise_not_(),
    "quant_state replaced": lambda m, up: setattr(up.base_layer.weight, "quant_state", other_base("bitsandbytes").quant_state),
    "compute_dtype": lambda m, up: setattr(up.base_layer, "compute_dtype", torch.bfloat16),
    **{
        f"{name} {how}": lambda m, up, name=name, how=how: change(up.base_layer.weight.quant_state, name, how)
        for name in ("absmax", "offset", "code", "state2.absmax", "state2.code") for how in ("replaced", "edited", ".data")
    },
}  # fmt: skip
TORCHAO = {
    "base replaced": lambda m, up: setattr(up.base_layer, "weight", P(other_base("torchao"), requires_grad=False)),
    "base swapped": lambda m, up: torch.utils.swap_tensors(up.base_layer.weight, P(other_base("torchao"), requires_grad=False)),
    **{
        f"{name} {how}": lambda m, up, name=name, how=how: change(up.base_layer.weight, name, how)
        for name in ("quantized_data", "nf4", "quantized_scalers", "quantization_factor", "scaler_mean") for how in ("replaced", "edited", ".data")
    },
}  # fmt: skip


def change(holder, path, how):
    *way, name = path.split(".")
    holder = functools.reduce(getattr, way, holder)
    t = getattr(holder, name)
    other = t // 2 if t.dtype in (torch.uint8, torch.int8) else 2 * t
    if how == "replaced":
        setattr(holder, name, other)
    elif how == "edited":
        t.copy_(other)
    else:
        t.data = other


# Where the layer then runs its own forward, or what has come of it is not prepared.
NOT_AGAIN = {
    "active list changed in place", "an adapter that was active before it came", "disabled", "merged", "the model merged", "scaling is a tensor",
    "A.data transposed", "A.data misaligned", "A.data negative", "A of another class", "B bias", "dropout, training", "compute_dtype",
}.union(name for name in COMMON if name.partition(",")[0] in HOOKS)  # fmt: skip
CHANGES = {"bitsandbytes": COMMON | BITSANDBYTES, "torchao": {n: c for n, c in COMMON.items() if "merged" not in n} | TORCHAO}  # torchao's cannot be merged


@pytest.mark.parametrize("host, name", [(host, name) for host in HOSTS for name in CHANGES[host]])
def test_a_change_is_seen_by_the_next_call(host, name):
    x = weights(3, 128)
    for grad in (False, True):
        model = lora(host, lora_dropout=0.1).eval()
        layer = prepared(patched(model), x)
        before = results(layer, x, grad)
        layer.set_adapter(["default"])  # a list, that can be changed in place
        prepared(layer, x)
        CHANGES[host][name](model, layer)
        got = results(layer, x, grad)
        forget(layer)
        assert same(got, results(layer, x, grad))
        assert not grad or name == "merged and unmerged" or not same(got, before)
        layer(x)
        assert served(layer, x) != (name in NOT_AGAIN)


@pytest.mark.parametrize("child", ["A", "B", "dropout", "base"])
@pytest.mark.parametrize("hook", ["forward hook", "pre-hook", "backward hook", "backward pre-hook", "accelerate"])
def test_a_hook_that_is_taken_off_again(hook, child):
    layer, x = prepared(patched(lora("bitsandbytes")), weights(3, 128)), weights(3, 128)
    want, module = results(layer, x), children(layer)[child]
    handle = HOOKS[hook](module)
    assert not served(layer, x) and not same(results(layer, x), want)
    remove_hook_from_module(module) if hook == "accelerate" else handle.remove()
    assert same(results(layer, x), want)
    layer(x)
    assert served(layer, x)


@torch.no_grad()
def test_a_hook_on_every_module_runs():
    layer, x, seen = prepared(LAYERS["PEFT over bitsandbytes"](), weights(3, 128)), weights(3, 128), []
    handle = nn_module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        layer(x)
    finally:
        handle.remove()
    assert "Linear4bit" in seen and len(seen) > 2 and served(layer, x)


def test_a_forward_of_the_class_replaced(monkeypatch):
    layer, x = prepared(LAYERS["PEFT over torchao"](), weights(3, 128)), weights(3, 128)
    monkeypatch.setattr(nn.Linear, "forward", lambda self, x: 2 * torch.nn.functional.linear(x, self.weight, self.bias))
    assert not served(layer, x)
    got = results(layer, x)
    forget(layer)
    assert same(got, results(layer, x)) and served(layer, x)


OWN = {
    "disabled": lambda m: setattr(m, "disabled", True),
    "alpha": lambda m: (setattr(m, "alpha", 99.0), setattr(m, "scaling", 99.0 / 8)),
    "A replaced": lambda m: setattr(m.lora_a, "weight", P(weights(8, 128))),
    "A.data": lambda m: edit(m.lora_a.weight),
    "B swapped": lambda m: torch.utils.swap_tensors(m.lora_b.weight, P(weights(256, 8))),
    "module B replaced": lambda m: setattr(m, "lora_b", nn.Linear(8, 256, bias=False)),
    "B bias": lambda m: setattr(m.lora_b, "bias", P(weights(256))),
    "bias": lambda m: setattr(m, "bias", P(weights(256))),
    "dropout, training": lambda m: (setattr(m, "dropout", nn.Dropout(1.0)), m.train()),
    "A of another class": lambda m: setattr(m.lora_a, "__class__", Another),
    "hook": lambda m: HOOKS["forward hook"](m.lora_a),
    "weight replaced": lambda m: setattr(m, "weight", P(other_base("torchao"))),
    "scales edited": lambda m: change(m.weight, "scaler_mean", "edited"),
    "magnitude": lambda m: m.magnitude.data.mul_(2) if hasattr(m, "magnitude") else edit(m.lora_b.weight),
    "magnitude replaced": lambda m: setattr(m, "magnitude", P(weights(256))) if hasattr(m, "magnitude") else edit(m.lora_b.weight),
    "magnitude in bf16": lambda m: setattr(m, "magnitude", P(weights(256).bfloat16())) if hasattr(m, "magnitude") else edit(m.lora_b.weight),
}


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear])
def test_a_change_of_a_module_of_ones_own(kind, name):
    x = weights(3, 128)
    for grad in (False, True):
        layer = prepared(own(kind), x)
        before = results(layer, x, grad)
        OWN[name](layer)
        got = results(layer, x, grad)
        forget(layer)
        assert same(got, results(layer, x, grad)) and not same(got, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_16_bit_offset_is_copied_at_every_call(dtype):
    model, x = lora("bitsandbytes"), weights(3, 320)
    layer = patched(model)
    layer.base_layer.weight, layer.base_layer.in_features = requantized(torch.bfloat16, dtype), 320
    a_of(layer).weight = P(weights(8, 320))
    layer(x)
    before = results(layer, x)
    layer.base_layer.weight.quant_state.offset.mul_(3)
    got = results(layer, x)
    forget(layer)
    assert same(got, results(layer, x)) and not same(got, before)


def test_without_pytorchs_guards(monkeypatch):
    """They are private. Every call then compares by hand what they compare."""
    monkeypatch.setattr(_prepared, "TensorGuards", None)
    layer, x = LAYERS["PEFT over bitsandbytes"](), weights(2, 3, 128)
    want = results(layer, x, grad=False)
    assert same(results(prepared(layer, x), x, grad=False), want) and served(layer, x)
    layer.lora_A["default"].weight.data = layer.lora_A["default"].weight.data.double()
    assert not served(layer, x)
