"""patch(model) over real PEFT, bitsandbytes and torchao layers: what else these hosts can do than test_hosts.py asks of all."""

import copy
import functools
import warnings
from collections import Counter
from contextlib import nullcontext
from operator import attrgetter

import bitsandbytes as bnb
import peft
import pytest
import torch
import torchtune_modules as tt
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from conftest import GPU
from hosts import Truth, assert_fused, assert_true, in_float64, results
from numerics import assert_rounding_apart, in_several_orders
from peft import LoraConfig, get_peft_model
from prepared_layers import HOOKS, IN_THE_WAY, a_of, b_of, children, layer_of, twice_the_adapter
from qlora import HOSTS, assert_same, gradients, lora, quantized
from torch import nn

import fastfuse
from cases.linear import BF16, F16, F32
from cases.weights import requantized
from fastfuse import patch, status
from fastfuse.quant.nf4 import of_bitsandbytes


@pytest.mark.parametrize("host", HOSTS)
def test_adapter_life_cycle(host):
    """Whatever happens to the adapters, the patched model answers as an unpatched twin does, and only what is named runs PEFT's own forward."""
    model = lora(host)
    twin, x = copy.deepcopy(model), torch.randn(3, 128)
    patch(model)

    def step(act="eval", *args, **fallbacks):
        before = Counter(status(model).fallbacks)
        for m in (model, twin):
            torch.manual_seed(1)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PEFT's, of rounding where it merges
                attrgetter(act)(m)(*args)
        with warnings.catch_warnings():
            warnings.simplefilter("error" if set(fallbacks) <= {"ADAPTERS_DISABLED", "MERGED", "NO_ADAPTER"} else "ignore")  # asked for: no warning
            got = model.base_model(x)  # PEFT's outermost layer fails where no adapter is left
        assert_rounding_apart(got, twin.base_model(x), K=256, products=2)
        assert Counter(status(model).fallbacks) - before == fallbacks

    step("train")
    step("eval")
    # beside "default": another rank and scaling on one layer alone, and where PEFT can read the weight, DoRA
    step("add_adapter", "rs", LoraConfig(r=4, target_modules=["up"], use_rslora=True, init_lora_weights=False))
    step("set_adapter", "rs", NO_ADAPTER=1)  # "down" has no such adapter
    step("base_model.set_adapter", ["default", "rs"])
    step("base_model.set_adapter", ["rs", "default", "rs"])  # PEFT adds it twice
    step("base_model.model.up.scale_layer", 0.25)
    step("base_model.model.up.unscale_layer")
    if host == "bitsandbytes":  # PEFT's DoRA cannot read an NF4Tensor
        step("add_adapter", "dora", LoraConfig(r=4, target_modules=["up", "down"], use_dora=True, init_lora_weights=False))
        step("set_adapter", "dora")
        step("train")
        step("base_model.set_adapter", ["default", "dora"], VARIANT=2)
        step("eval", VARIANT=2)
    step("set_adapter", "default")
    step("disable_adapter_layers", ADAPTERS_DISABLED=2)
    step("enable_adapter_layers")
    with model.disable_adapter(), twin.disable_adapter():
        step(ADAPTERS_DISABLED=2)
    if host == "bitsandbytes":  # PEFT cannot merge into an NF4Tensor
        for names in ("default", ["default", "rs"], "dora"):
            step("base_model.set_adapter", names)
            step("merge_adapter", MERGED=2)  # replaces the Params4bit object
            step("unmerge_adapter")
        step("delete_adapter", "dora")
    step("set_adapter", "default")
    step("delete_adapter", "rs")
    step("train")
    assert status(model).counts == {"patched": 4}
    step("delete_adapter", "default", NO_ADAPTER=2)  # the last one: nothing is left to add


# Every kind of adapter, against float64


def truth_of(layer, x, dtype, call=None):
    """What an unpatched layer gives for x, and what it gives in float64 with its weight decoded in dtype."""
    return Truth(in_several_orders(results, layer, {"x": x}, call), results(in_float64(layer, dtype), {"x": x.double()}))


ADAPTERS = {
    "one": {},
    "bias on B": {"lora_bias": True},
    "two": {"second": {"r": 8}},
    "two, other rank and scaling": {"second": {"r": 3, "lora_alpha": 5}, "lora_alpha": 11},
    "two with biases on B": {"lora_bias": True, "second": {"r": 4, "lora_bias": True, "use_rslora": True}},
    "two, the second in another dtype": {"second": {"r": 4, "lora_alpha": 6}, "recast": "rs"},
    "two, the first in another dtype": {"second": {"r": 4, "lora_alpha": 6}, "recast": "default"},
    "two, with a small B": {"second": {"r": 4, "lora_alpha": 0.3}, "lora_alpha": 0.4, "shrink": 1e-4},
    "DoRA": {"use_dora": True, "lora_alpha": 5},
}


def with_adapters(host, dtype, case, adapter_dtype=None):
    """A layer; PEFT's DoRA cannot read an NF4Tensor."""
    config = dict(ADAPTERS[case])
    second, recast, shrink = config.pop("second", None), config.pop("recast", None), config.pop("shrink", 1.0)
    model = lora("bitsandbytes" if case == "DoRA" else host, dtype, **config)
    layer = layer_of(model)
    if second is not None:
        model.add_adapter("rs", LoraConfig(target_modules=["up"], init_lora_weights=False, **second))
        model.base_model.set_adapter(["default", "rs"])
    for parts in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
        if adapter_dtype is not None:
            parts.to(adapter_dtype)
        if recast in parts:
            parts[recast].to(BF16 if adapter_dtype is None else F32)
        for part in parts.values() if parts is not layer.lora_A else ():  # trained: not the norm that DoRA begins with
            part.weight.data.mul_(shrink * (torch.rand_like(part.weight) + 0.5))
    return layer


# (of the base, of the adapters, shape of x): fp32 adapters over 16 bits are what QLoRA trains
KINDS = [
    ("bitsandbytes", F32, None, (128,)),
    ("bitsandbytes", BF16, None, (6, 128)),
    ("torchao", F16, None, (2, 3, 5, 128)),
    ("torchao", BF16, BF16, (6, 128)),
    ("bitsandbytes", F16, F16, (6, 128)),
]


@pytest.mark.parametrize("host, dtype, adapter_dtype, shape", KINDS, ids=str)
@pytest.mark.parametrize("case", ADAPTERS)
@pytest.mark.filterwarnings("ignore:fastfuse. .* SHAPE")
def test_every_kind_of_adapter_is_no_worse_than_pefts(case, host, dtype, adapter_dtype, shape):
    layer, x = with_adapters(host, dtype, case, adapter_dtype), torch.randn(shape).to(dtype)
    true = truth_of(layer, x, dtype)
    patch(layer)
    assert_true(results(layer, {"x": x}), true)
    assert status(layer).fallbacks == ({"SHAPE": 1} if case == "DoRA" and len(shape) == 1 else {})  # PEFT's DoRA gives a vector a dimension
    empty = torch.empty(2, 0, 128, dtype=dtype)
    outs, grads = results(layer, {"x": empty})
    assert outs[0].shape == (2, 0, 256) and not any(g.any() for draws in grads.values() for g in draws)


# A GPU's is the only autocast that PEFT asks for: it casts x to the adapter's dtype where there is none. An fp32 x is what prepare_model_for_kbit_training
# leaves; over torchao it runs the module's own forward.
AUTOCAST = [
    ("bitsandbytes", None, BF16, False),
    ("bitsandbytes", BF16, F32, False),
    ("bitsandbytes", None, F32, True),
    ("bitsandbytes", BF16, BF16, True),
    ("torchao", None, BF16, True),
]


@pytest.mark.parametrize("host, adapter_dtype, x_dtype, on_a_gpu", AUTOCAST, ids=str)
@pytest.mark.parametrize("case", ["one", "bias on B", "two, other rank and scaling", "DoRA"])
def test_autocast_is_no_worse_than_pefts(case, host, adapter_dtype, x_dtype, on_a_gpu, monkeypatch):
    if on_a_gpu:
        own = torch.is_autocast_enabled
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: own(*device or ("cpu",)))
    layer, x = with_adapters(host, BF16, case, adapter_dtype), torch.randn(6, 128).bfloat16().to(x_dtype)

    def call(x):
        with torch.autocast("cpu", BF16):
            y = layer(x)
        assert y.dtype == (F32 if on_a_gpu and case == "DoRA" and adapter_dtype is None else x_dtype)
        return y

    true = truth_of(layer, x, BF16, call)
    patch(layer)
    assert_fused(layer, {"x": x}, true, call)


class Masked(nn.Module):
    """A dropout whose mask is known."""

    def __init__(self, keep):
        super().__init__()
        self.keep = keep

    def forward(self, x):
        return x * self.keep.to(x.dtype)


DRAWN = [
    ("auto", BF16, "torchao"),
    ("torch", F32, "torchao"),
    ("torch", BF16, "bitsandbytes"),
    ("compiled", F32, "bitsandbytes"),
    ("checkpointed", F32, "bitsandbytes"),
    ("auto", F32, "torchtune lora"),
    ("auto", BF16, "torchtune dora"),
    *([] if GPU else [("triton", F32, "bitsandbytes")]),
]


@torch._functorch.config.patch(donated_buffer=False)  # several backwards through one graph
@pytest.mark.parametrize("how, dtype, host", DRAWN, ids=str)
def test_dropout_gradients_are_of_the_mask_that_was_drawn(how, dtype, host):
    x, p, of_torchtune = torch.randn(5, 128).to(dtype), 0.25, host.startswith("torchtune")
    layer = tt.adapted(host.split()[1], dtype=dtype, dropout=p) if of_torchtune else layer_of(lora(host, dtype, lora_dropout=p))
    a, twin = layer.lora_a if of_torchtune else a_of(layer), copy.deepcopy(layer)
    patch(layer, backend=how if how in ("torch", "triton") else "auto")
    call = layer
    if how == "compiled":
        torch.compiler.reset()  # else it gives up: one patched forward serves the modules of every test
        call = torch.compile(layer, fullgraph=True, backend="aot_eager")
    elif how == "checkpointed":
        call = functools.partial(torch.utils.checkpoint.checkpoint, layer, use_reentrant=False)

    def seeded(x):
        torch.manual_seed(5)
        return call(x=x)

    torch.manual_seed(5)
    reached = [torch.autograd.grad(row.sum(), a.weight, retain_graph=True)[0].abs().sum(0) > 0 for row in layer(x)]
    mask = torch.stack(reached)  # which elements of x reached A
    assert 0 < mask.sum() < mask.numel()
    setattr(*(twin, "dropout") if of_torchtune else (twin.lora_dropout, "default"), Masked(mask.double() / (1 - p)))
    got = results(layer, {"x": x}, seeded)
    assert_true(got, truth_of(twin, x, dtype))
    again = seeded(x)
    assert torch.equal(again, got[0][0])  # one seed, one mask
    assert not torch.equal(call(x), again)  # the next call draws another
    assert status(layer).fallbacks == {}


# What else is fused, and what runs the own forward


def of_the_model(model, x, host):
    return gradients(model, x)


# what: (LoRA's configuration, None for bare layers; what is done to the model; the call)
FUSED = {
    "a scaling that is a tensor": ({}, lambda m: layer_of(m).scaling.update(default=torch.tensor(0.7)), of_the_model),  # PEFT's hot swapping
    "dropout in eval": ({"lora_dropout": 0.5}, nn.Module.eval, of_the_model),
    "dropout of everything": ({"lora_dropout": 1.0}, nn.Module.train, lambda m, x, host: (m(x), [])),
    "bare, by keyword": (None, nn.Module.train, lambda m, x, host: (m.up(**{"input" if host == "torchao" else "x": x}), [])),
    "changed in place": (None, nn.Module.train, lambda m, x, host: (m.up(x.requires_grad_()).relu_(), [])),
}


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("what", FUSED)
def test_fused_all_the_same(what, host):
    config, change, call = FUSED[what]
    model, x = quantized(host) if config is None else lora(host, **config), torch.randn(3, 128)
    change(model)
    want = call(model, x, host)
    patch(model)
    state = torch.get_rng_state()
    assert_same(call(model, x, host), want)
    assert torch.equal(torch.get_rng_state(), state) or what == "dropout of everything"
    assert status(model).fallbacks == {}


class Louder(bnb.nn.Linear4bit):
    def forward(self, x):
        return 2 * super().forward(x)


def code_of(hook, child):
    """Of a hook on a child of an adapted layer."""
    if child == "dropout":
        return "DROPOUT"
    return "HOOKED" if hook != "rebound" else "FOREIGN_FORWARD" if child == "base" else "CHILD_TYPE"


OFFLOADED = {"offloaded": lambda child: add_hook_to_module(child, AlignDevicesHook(execution_device="cpu", io_same_device=True))}
# what: (its code, what is done to the adapted layer)
OWN_FORWARD = IN_THE_WAY | {
    "dropout in place": ("DROPOUT", lambda up: up.lora_dropout.update({"default": nn.Dropout(0.5, inplace=True)})),
    "two adapters with dropout": ("DROPOUT", lambda up: (twice_the_adapter(up), up.set_adapter(["default", "other"]))),
    "DoRA with dropout": ("DORA_DROPOUT", nn.Module.train),
    "a mixed batch": ("ARGUMENTS", nn.Module.train),
    "a subclass of the base layer": ("FOREIGN_FORWARD", lambda up: setattr(up.base_layer, "__class__", Louder)),
    **{
        f"{name}, {child}": (code_of(name, child), lambda up, hook=hook, child=child: hook(children(up)[child]))
        for name, hook in (HOOKS | OFFLOADED).items() for child in ("A", "B", "dropout", "base")
    },
}  # fmt: skip


@pytest.mark.parametrize("what", OWN_FORWARD)
def test_runs_pefts_forward(what):
    """In training with PEFT's own masks. What is a matter of training alone is fused in eval."""
    (code, act), mixed = OWN_FORWARD[what], {"adapter_names": ["default", "__base__", "default"]} if what == "a mixed batch" else {}
    model = lora("bitsandbytes", lora_dropout=0.5 if "with dropout" in what else 0.0, use_dora="DoRA" in what)
    up, x = layer_of(model), torch.randn(3, 128, requires_grad=True)
    act(up)

    def run():
        torch.manual_seed(3)
        out = up(x.clone(), **mixed)
        return out, torch.autograd.grad(out.square().sum(), [x, *(p for p in up.parameters() if p.requires_grad)])

    want = run()
    report = patch(model)
    entry = next(e for e in report.entries if e.name.endswith("up"))
    assert (entry.code, code in str(report)) == (("", False) if mixed else (code, True))
    with pytest.warns(UserWarning, match=code):
        assert_same(run(), want, K=128)
    assert status(model).fallbacks == {code: 1}
    up.eval()(x)
    assert status(model).fallbacks == {code: 1 if mixed or "with dropout" in what else 2}


@pytest.mark.parametrize("wrap", ["bare", "lora"])
@pytest.mark.parametrize("host", HOSTS)
def test_a_dtype_without_a_kernel(host, wrap):
    """bitsandbytes' compute dtype, or torchao's bias in another dtype: the host's own result."""
    model, x = quantized(host) if wrap == "bare" else lora(host), torch.randn(3, 128)
    layer = layer_of(model)
    if host == "torchao":
        x = x.half()
    else:
        getattr(layer, "base_layer", layer).compute_dtype = torch.float64
    want = layer(x)
    patch(model)
    with pytest.warns(UserWarning, match="DTYPE"):
        got = layer(x)
    # bitsandbytes' own CPU path leaves a float64 weight unwritten, which the poisoned memory here shows as NaN.
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    assert set(status(model).fallbacks) == {"DTYPE"}


def test_other_tuners_are_not_lora():
    """AdaLoRA's layers have all the attributes of LoRA's, and another formula."""
    model, x = quantized("bitsandbytes"), torch.randn(2, 128)
    model.is_loaded_in_4bit = True
    config = peft.AdaLoraConfig(target_modules=["up", "down"], init_r=8, target_r=4, total_step=10, init_lora_weights=False)
    model = get_peft_model(model, config)
    want = model(x)
    assert {e.op for e in patch(model).patched} == {"nf4_linear"}
    assert_rounding_apart(model(x), want, K=256, products=6)  # three products a layer, two layers


# What the weight of a bitsandbytes layer may be


def with_own_state(wrap, host="bitsandbytes"):
    """(model, its layer "up", that layer's base) where each Linear4bit keeps its weight's quant_state, as bitsandbytes has it after quantizing or loading."""
    model = quantized(host) if wrap == "bare" else lora(host)
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.quant_state = module.weight.quant_state
    layer = layer_of(model)
    return model, layer, getattr(layer, "base_layer", layer)


@pytest.mark.parametrize("wrap, dtype", [("bare", BF16), ("PEFT's dense layer", F16), ("PEFT's 4-bit layer", F32)], ids=str)
def test_a_linear4bit_around_a_plain_weight(wrap, dtype):
    """What a list of modules to skip leaves of a checkpoint: bitsandbytes' own class, and no codes in it."""
    model, plain = quantized("bitsandbytes", dtype), nn.Parameter(torch.randn(256, 128, dtype=dtype), requires_grad=False)
    if wrap != "PEFT's 4-bit layer":  # PEFT chooses that one by what it finds
        model.up.weight = plain
    if wrap != "bare":
        model.is_loaded_in_4bit = wrap == "PEFT's 4-bit layer"
        model = get_peft_model(model, LoraConfig(r=8, target_modules=["up"], init_lora_weights=False)).base_model.model
        model.up.base_layer.weight = plain
    found = {e.name: (e.status, e.code, e.reason) for e in patch(model).entries}
    words = f"its weight is a plain {str(dtype).removeprefix('torch.')} Parameter"
    assert found.pop("down") == ("patched", "", "")
    assert found == dict.fromkeys(["up"] if wrap == "bare" else ["up", "up.base_layer"], ("skipped", "NOT_NF4", words))


@pytest.mark.parametrize("wrap", ["bare", "lora"])
@pytest.mark.parametrize("host", HOSTS)
def test_a_weight_made_plain_after_the_patch(host, wrap):
    """Dequantized by hand: a quant_state of the layer's own belongs to no codes. The own forward runs, the report says so, and unpatch finds the module."""
    model, layer, base = with_own_state(wrap, host)
    patch(model)
    base.weight = nn.Parameter(torch.randn(256, 128), requires_grad=False)
    entry = next(e for e in status(model).entries if e.name.endswith("up"))
    if host == "bitsandbytes":
        assert (entry.code, entry.reason) == ("NOT_NF4", "runs its own forward for now: its weight is a plain float32 Parameter")
    else:
        assert entry.code == "CHANGED"
    with pytest.warns(UserWarning, match="NOT_NF4"), pytest.raises(AssertionError) if host == "bitsandbytes" else nullcontext():  # bitsandbytes' own
        layer(torch.randn(3, 128))
    assert fastfuse.unpatch(model).counts == {"restored": 2 if wrap == "bare" else 4}
    assert not any("_fastfuse" in m.__dict__ or "forward" in m.__dict__ for m in model.modules())


@pytest.mark.parametrize("wrap, dtype", [("bare", BF16), ("lora", F16)], ids=str)
def test_scales_quantized_from_16_bits_as_the_layers_own_product_takes_them(wrap, dtype):
    """In fp32, unrounded: only dequantize_4bit rounds them. fp32 activations over weights that were 16-bit show the difference.

    dx is the forward's gradient. bitsandbytes' own is not: its backward decodes by dequantize_4bit.
    """
    model, layer, base = with_own_state(wrap)
    base.weight = requantized(dtype, dtype, 256, 128)
    w = fastfuse.ops.nf4_dequantize_ref(of_bitsandbytes(base.weight, base.weight.quant_state, as_linear=True), F32).double()
    if wrap == "lora":
        w = w + layer.scaling["default"] * b_of(layer).weight.double() @ a_of(layer).weight.double()
    patch(model, on_unsupported="raise")
    x, dy = torch.randn(6, 128, requires_grad=True), torch.randn(6, 256)
    y = layer(x)
    assert_rounding_apart(y, (x.double() @ w.T + base.bias.double()).float(), K=128, products=2)
    assert_rounding_apart(torch.autograd.grad(y, x, dy)[0], (dy.double() @ w).float(), K=256, products=2)
    assert status(model).fallbacks == {}


@pytest.mark.parametrize("storage", ["flat", "nested"])
def test_the_report_names_the_storage(storage):
    report = patch(quantized("bitsandbytes", storage=storage))
    assert [e.layout for e in report.entries] == [f"bitsandbytes {storage}, blocks of 64"] * 2
