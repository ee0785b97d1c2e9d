"""Prepared calls of linear layers: the same bits as the whole way, and whatever changes between two calls is seen by the very next one."""

import copy
import gc
import pickle
import threading
import warnings
import weakref

import pytest
import torch
from peft import LoraConfig
from qlora import HOSTS, lora, quantized
from torch import nn
from torch.nn.modules import module as nn_module
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastfuse
from fastfuse import tune
from fastfuse.modules._prepared import PreparedLinear
from fastfuse.modules.low_precision import FrozenNF4Linear
from fastfuse.modules.peft import DoRALinear, LoRALinear


def own(kind, **options):
    torch.manual_seed(0)
    if kind is FrozenNF4Linear:
        return kind(128, 256, **options)
    layer = kind(128, 256, rank=8, alpha=16, quantize_base=True, **options)
    nn.init.normal_(layer.lora_b.weight)
    if kind is DoRALinear:
        layer.initialize_dora_magnitude()
    return layer


def patched(model):
    fastfuse.patch(model)
    return model.base_model.model.up if hasattr(model, "base_model") else model.up


LAYERS = {
    **{f"PEFT over {host}": lambda host=host: patched(lora(host)) for host in HOSTS},
    **{f"bare {host}": lambda host=host: patched(quantized(host)) for host in HOSTS},
    "rsLoRA": lambda: patched(lora("bitsandbytes", use_rslora=True)),
    "DoRA": lambda: patched(lora("bitsandbytes", use_dora=True)),
    "dropout in eval": lambda: patched(lora("bitsandbytes", lora_dropout=0.3).eval()),
    "flat scales": lambda: patched(quantized("bitsandbytes", storage="flat")),
    "LoRALinear": lambda: own(LoRALinear),
    "DoRALinear": lambda: own(DoRALinear),
    "FrozenNF4Linear": lambda: own(FrozenNF4Linear),
}


def plan_of(layer):
    record = layer.__dict__.get("_fastfuse")
    return layer._prepared if record is None else record.prepared


def forget(layer) -> None:
    record = layer.__dict__.get("_fastfuse")
    if record is None:
        layer.__dict__.pop("_prepared", None)
    else:
        record.prepared = None


def prepared(make, x):
    layer = make()
    with torch.no_grad():
        layer(x)
    assert isinstance(plan_of(layer), PreparedLinear)
    return layer


def served(layer, x) -> bool:
    """Whether the plan, asked itself, takes the call."""
    return plan_of(layer) is not None and plan_of(layer)(x) is not None


@pytest.mark.parametrize("tokens", [(1,), (1, 1), (3, 11)], ids=str)
@pytest.mark.parametrize("kind", LAYERS)
def test_same_bits(kind, tokens):
    x = torch.randn(*tokens, 128)
    layer = prepared(LAYERS[kind], torch.randn(2, 128))
    with torch.no_grad():
        assert served(layer, x)
        got = layer(x)
        forget(layer)
        assert torch.equal(got, layer(x))


@pytest.mark.parametrize("kind", LAYERS)
def test_same_gradients(kind):
    layer = prepared(LAYERS[kind], torch.randn(2, 128))
    results = []
    for _ in range(2):
        x = torch.linspace(-1, 1, 5 * 128).view(5, 128).requires_grad_()
        y = layer(x)
        leaves = [x, *(p for p in layer.parameters() if p.requires_grad)]
        results.append([y, *torch.autograd.grad(y, leaves, torch.ones_like(y), allow_unused=True)])
        forget(layer)
    assert len(results[0]) > 1 and all(a is b is None or torch.equal(a, b) for a, b in zip(*results, strict=True))


P, Linear = nn.Parameter, nn.Linear


def weights(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5))


def a_of(layer):
    return layer.lora_A["default"]


def replace_base(layer):
    """As unmerge and load_state_dict do: other codes under another state."""
    layer.base_layer.weight = lora("bitsandbytes").base_model.model.up.base_layer.weight


CHANGES = {
    "set_adapter": lambda m, up: (m.add_adapter("other", LoraConfig(r=4, target_modules=["up"], init_lora_weights=False)), m.set_adapter("other")),
    "active list changed in place": lambda m, up: (
        m.add_adapter("other", LoraConfig(r=8, target_modules=["up"], init_lora_weights=False)), up._active_adapter.append("other")
    ),
    "disabled": lambda m, up: up.enable_adapters(False),
    "merged": lambda m, up: up.merge(),
    "merged and unmerged": lambda m, up: (up.merge(), up.unmerge()),
    "scale_layer": lambda m, up: up.scale_layer(3.0),
    "set_scale": lambda m, up: up.set_scale("default", 5.0),
    "A replaced": lambda m, up: setattr(a_of(up), "weight", P(weights(8, 128))),
    "A edited": lambda m, up: a_of(up).weight.data.add_(1),
    "A.data": lambda m, up: setattr(a_of(up).weight, "data", weights(8, 128)),
    "A.data of another dtype": lambda m, up: up.lora_A.half(),
    "A and B of another rank": lambda m, up: (setattr(a_of(up).weight, "data", weights(4, 128)), setattr(up.lora_B["default"].weight, "data", weights(256, 4))),
    "A.data transposed": lambda m, up: setattr(a_of(up).weight, "data", weights(128, 8).T),
    "A.data negative": lambda m, up: setattr(a_of(up).weight, "data", torch._neg_view(weights(8, 128))),
    "A swapped": lambda m, up: torch.utils.swap_tensors(a_of(up).weight, P(weights(8, 128))),
    "module A replaced": lambda m, up: up.lora_A.update({"default": Linear(128, 8, bias=False)}),
    "base weight replaced": lambda m, up: replace_base(up),
    "base weight.data replaced": lambda m, up: setattr(up.base_layer.weight, "data", up.base_layer.weight.data.flip(0)),
    "quant_state replaced": lambda m, up: setattr(up.base_layer.weight, "quant_state", lora("bitsandbytes").base_model.model.up.base_layer.weight.quant_state),
    "absmax replaced": lambda m, up: setattr(up.base_layer.weight.quant_state, "absmax", up.base_layer.weight.quant_state.absmax.flip(0)),
    "absmax edited": lambda m, up: up.base_layer.weight.quant_state.absmax.zero_(),
    "state2.absmax replaced": lambda m, up: setattr(up.base_layer.weight.quant_state.state2, "absmax", 2 * up.base_layer.weight.quant_state.state2.absmax),
    "base bias replaced": lambda m, up: setattr(up.base_layer, "bias", P(weights(256))),
    "base bias removed": lambda m, up: setattr(up.base_layer, "bias", None),
    "B bias": lambda m, up: setattr(up.lora_B["default"], "bias", P(weights(256))),
    "compute_dtype": lambda m, up: setattr(up.base_layer, "compute_dtype", torch.bfloat16),
    "dropout, training": lambda m, up: (up.lora_dropout.update({"default": nn.Dropout(1.0)}), up.train()),
    "A's forward rebound": lambda m, up: setattr(a_of(up), "forward", lambda x: torch.zeros(*x.shape[:-1], 8)),
    "base's forward rebound": lambda m, up: setattr(up.base_layer, "forward", lambda x: torch.zeros(*x.shape[:-1], 256)),
    "hook on A": lambda m, up: a_of(up).register_forward_hook(lambda *_: torch.zeros(3, 8)),
    "hooks of A replaced": lambda m, up: setattr(a_of(up), "_forward_hooks", {0: lambda *_: torch.zeros(3, 8)}),
    "hook before the base": lambda m, up: up.base_layer.register_forward_pre_hook(lambda _, given: (2 * given[0],)),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_by_the_next_call(change):
    model, x = lora("bitsandbytes").eval(), weights(3, 128)
    layer = prepared(lambda: patched(model), x)
    before = layer(x)
    CHANGES[change](model, layer)
    with warnings.catch_warnings(action="ignore"):  # a call that is not fused says so
        got = layer(x)
        forget(layer)
        want = layer(x)
    assert torch.equal(got, want)
    assert change == "merged and unmerged" or not torch.equal(got, before)


@torch.no_grad()
def test_a_hook_on_every_module_runs():
    layer, x, seen = prepared(LAYERS["PEFT over bitsandbytes"], weights(3, 128)), weights(3, 128), []
    handle = nn_module.register_module_forward_hook(lambda module, *_: seen.append(type(module).__name__))
    try:
        layer(x)
    finally:
        handle.remove()
    assert "Linear4bit" in seen and len(seen) > 2 and served(layer, x)


class Modes(TorchDispatchMode):
    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    def __torch_function__(self, function, kinds, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


AROUND = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "dispatch mode": Modes,
    "function mode": Functions,
    "backend": lambda: fastfuse.backend("torch"),
    "pin": lambda: tune.pin("nf4_linear", None),
    "profiler": lambda: torch.autograd.profiler.profile(),
    "forward mode": torch.autograd.forward_ad.dual_level,
}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["PEFT over bitsandbytes", "bare torchao", "LoRALinear"])
@pytest.mark.parametrize("around", AROUND)
def test_whoever_looks_on_sees_the_call(around, kind):
    x = weights(3, 128)
    layer = prepared(LAYERS[kind], x)
    with AROUND[around]():
        assert not served(layer, x)
    assert served(layer, x)


@torch.no_grad()
def test_transforms_and_tracing_see_the_call():
    layer, x, taken = prepared(LAYERS["bare bitsandbytes"], weights(3, 128)), weights(3, 128), []

    def ask(x):
        taken.append(served(layer, x))
        return x + 0

    torch.func.vmap(ask)(x[None])
    torch.func.jvp(ask, (x,), (x,))
    torch.jit.trace(ask, x, check_trace=False)
    assert taken == [False] * 3


INPUTS = {
    "another dtype": lambda x: x.half(),
    "strided": lambda x: torch.stack([x, x], -1).flatten(1)[:, ::2],
    "negative view": lambda x: torch._neg_view(-x),
    "a Parameter": lambda x: P(x),
    "by name": lambda x: x,
    "narrower": lambda x: x[:, :64],
}


@torch.no_grad()
@pytest.mark.parametrize("kind", INPUTS)
def test_inputs_of_another_kind(kind):
    layer = prepared(LAYERS["PEFT over bitsandbytes"], weights(3, 128))
    x = INPUTS[kind](weights(3, 128))
    results = []
    for _ in range(2):
        try:
            results.append(layer(x=x) if kind == "by name" else layer(x))
        except (RuntimeError, ValueError) as error:
            results.append(torch.tensor(len(str(error))))
        forget(layer)
    assert torch.equal(*results) and (kind == "narrower") == (results[0].dim() == 0)


@pytest.mark.parametrize("kind", ["PEFT over bitsandbytes", "LoRALinear"])
def test_copies_carry_no_plan(kind):
    x = weights(3, 128)
    layer = prepared(LAYERS[kind], x)
    twin = copy.deepcopy(layer)
    assert plan_of(twin) is None and torch.equal(twin(x), layer(x))
    if kind == "LoRALinear":
        loaded = pickle.loads(pickle.dumps(layer))
        assert plan_of(loaded) is None and torch.equal(loaded(x), layer(x))


@torch.no_grad()
def test_compile_does_not_see_it():
    layer, x = prepared(LAYERS["PEFT over bitsandbytes"], weights(3, 128)), weights(3, 128)
    torch.compiler.reset()
    want = layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), want)
    assert torch.equal(layer(x), want) and served(layer, x)


@torch.no_grad()
def test_threads_and_inference_mode():
    layer, x, got = prepared(LAYERS["PEFT over torchao"], weights(3, 128)), weights(3, 128), []
    want = layer(x)
    threads = [threading.Thread(target=lambda: got.extend(layer(x) for _ in range(20))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with torch.inference_mode():
        got.append(layer(x))
    assert len(got) == 41 and all(torch.equal(y, want) for y in got)


@torch.no_grad()
@pytest.mark.parametrize("host", HOSTS)
def test_an_old_base_weight_is_let_go(host):
    layer = prepared(lambda: patched(lora(host)), weights(3, 128))
    base = layer.base_layer
    codes = base.weight.quantized_data if host == "torchao" else base.weight.data
    gone = []
    weakref.finalize(codes.untyped_storage(), gone.append, 1)
    del codes
    base.weight = lora(host).base_model.model.up.base_layer.weight
    gc.collect()
    assert gone == [1] and plan_of(layer) is not None


def test_unpatch_and_patch_again():
    model, x = quantized("bitsandbytes"), weights(3, 128)
    layer = prepared(lambda: patched(model), x)
    want = layer(x)
    fastfuse.unpatch(model)
    assert "_fastfuse" not in layer.__dict__
    fastfuse.patch(model)
    layer(x)
    assert torch.equal(layer(x), want) and served(layer, x)


def test_a_prepared_dora_layer_saves_no_more_than_the_whole_way():
    layer, x, seen = LAYERS["DoRA"](), weights(5, 128), []
    for _ in range(2):  # the second call is prepared
        seen.append([])
        with torch.autograd.graph.saved_tensors_hooks(lambda t: seen[-1].append(t.shape) or t, lambda t: t):
            layer(x)
    assert served(layer, x) and seen[0] == seen[1] != []
