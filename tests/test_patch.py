"""The engine of patch: options, reports, verify, all or nothing, and what has wrapped the model. What holds for every host is in test_hosts.py."""

import concurrent.futures
import copy
import dataclasses
import functools
import gc
import pickle
import types
import weakref

import bitsandbytes as bnb
import peft
import pytest
import torch
from accelerate.hooks import add_hook_to_module
from peft import LoraConfig, get_peft_model
from qlora import HOSTS, UNREAD, Block, Doubling, in_nf4, lora, quantized, said
from torch import nn

import fastfuse
from cases.weights import random_weight
from fastfuse import patch, status, unpatch
from fastfuse.ops import _op
from fastfuse.patching import hosts
from fastfuse.patching.hosts import _host


def named(report, *fields):
    """Fields of the entries by the modules' names."""
    return {e.name.removeprefix("base_model.model."): tuple(getattr(e, field) for field in fields) for e in report.entries}


def untouched(model):
    return not any("_fastfuse" in m.__dict__ or "forward" in m.__dict__ for m in model.modules())


@pytest.fixture
def wrong(monkeypatch):
    """Makes a host's op off by a factor."""

    def replace(host, factor=1.02):
        other = dataclasses.replace(host, fused=lambda *args: host.fused(*args) * factor)
        monkeypatch.setattr(hosts, "BUILT_IN", tuple(other if h is host else h for h in hosts.BUILT_IN))

    return replace


# Options


def test_options():
    model = lora("bitsandbytes")
    planned = patch(model, dry_run=True)
    assert planned.counts == {"planned": 4} and not planned and untouched(model)
    report = patch(model, ops="nf4_lora_linear", exclude=["*.down"])
    assert [e.name for e in report.patched] == ["base_model.model.up"] and {e.code for e in report.skipped} == {"EXCLUDED"}
    unpatch(model)
    report = patch(model, include=lambda name, m: isinstance(m, bnb.nn.Linear4bit))
    assert [e.op for e in report.patched] == ["nf4_linear"] * 2
    unpatch(model, include="*up*")
    with fastfuse.patched(model) as report:
        assert report.counts == report.to_dict()["counts"] == {"patched": 3, "already": 1}
    assert status(model).counts == {"patched": 1, "unpatched": 3}


BAD_OPTIONS = [
    ({"on_unsupported": "maybe"}, ValueError, "on_unsupported is 'maybe'"),
    ({"backend": "cuda"}, ValueError, "backend is 'cuda'"),
    ({"ops": ["nf4_linear", "nope"]}, ValueError, "ops has 'nope', known are cross_attention, nf4_linear, nf4_lora_linear, patch_embed"),
    ({"ops": 3}, TypeError, "ops is a int"),
    ({"include": [3]}, TypeError, "not a int"),
    ({"model": [1]}, TypeError, "patch: model is a list"),
]


@pytest.mark.parametrize("options, error, message", BAD_OPTIONS)
def test_bad_options(options, error, message):
    model = lora("bitsandbytes")
    with pytest.raises(error, match=message):
        patch(**{"model": model} | options)
    assert untouched(model)
    with pytest.raises(TypeError, match="status: model is a NoneType"):
        status(None)


def test_nothing_to_patch_is_said_aloud():
    words = "found nothing to patch in Block: no module holds an NF4 weight, .*; its 3 linear layers hold Parameter of torch.float32"
    with pytest.warns(UserWarning, match=words):
        report = patch(Block())
    assert not report and "found nothing to patch" in str(report)
    with pytest.raises(fastfuse.Unsupported, match="found nothing"):
        patch(Block(), on_unsupported="raise")


def not_quantized_yet(layer, state):
    layer.weight = bnb.nn.Params4bit(torch.randn(256, 128), requires_grad=False, quant_type="nf4")


UNCOVERED = UNREAD | {
    "not quantized yet": ("NOT_NF4", not_quantized_yet),
    "a forward of its own": ("FOREIGN_FORWARD", lambda layer, state: setattr(layer, "forward", lambda x: 2 * x)),
}


@pytest.mark.parametrize("what", UNCOVERED)
def test_what_is_not_covered_is_skipped_with_its_reason(what):
    model, (code, change) = quantized("bitsandbytes", storage="flat"), UNCOVERED[what]
    change(model.up, model.up.weight.quant_state)
    own = dict(model.up.__dict__)
    report = patch(model)
    assert said(report) == [("skipped", code), ("patched", "")] and code in str(report) and model.up.__dict__ == own
    assert named(status(model), "code", "reason") == named(report, "code", "reason") and code in str(status(model))
    for how, outcome in (("warn", pytest.warns(UserWarning, match=code)), ("raise", pytest.raises(fastfuse.Unsupported, match=code))):
        unpatch(model)
        assert model.up.__dict__ == own
        with outcome:
            patch(model, on_unsupported=how)
    assert status(model).patched == ()
    patch(model, exclude="down")
    assert said(status(model)) == [("unpatched", code), ("unpatched", "EXCLUDED")]  # where nothing is patched too


def test_a_chip_without_kernels_is_skipped_at_once(monkeypatch):
    """A model on a GPU that no row covers keeps working: it is not patched, and the report says why."""
    monkeypatch.setattr(_host, "check_device", lambda op, device, backend: fastfuse.tune.covering_arch("nf4_linear", "sm_75"))
    report = patch(quantized("bitsandbytes"))
    assert said(report) == [("skipped", "ARCH")] * 2 and "no kernel covers sm_75" in str(report)


def test_a_shared_module_answers_to_all_its_names():
    model = nn.ModuleDict({"enc": quantized("bitsandbytes")})
    model["dec"] = model["enc"]
    assert patch(model, include="dec.*").counts == {"patched": 2}
    assert unpatch(model, include="dec.*").counts == {"restored": 2}
    assert patch(model, exclude="dec.*").counts == {"skipped": 2}
    with fastfuse.patched(model):
        assert status(model).counts == {"patched": 2}
    assert status(model).counts == {"unpatched": 2}


def test_patched_finds_its_modules_under_new_names():
    base = quantized("bitsandbytes")
    base.is_loaded_in_4bit = True
    with fastfuse.patched(base):
        get_peft_model(base, LoraConfig(r=4, target_modules=["up"]))
    assert untouched(base)


def test_parts_that_are_left_alone():
    """A scripted one, and a parametrization, which is not run to look for a weight."""
    calls = []

    class Noting(nn.Module):
        def forward(self, w):
            calls.append(1)
            return w

    model = nn.Sequential(nn.Linear(4, 4), torch.jit.script(nn.ReLU()), quantized("bitsandbytes"))
    nn.utils.parametrize.register_parametrization(model[0], "weight", Noting(), unsafe=True)
    calls.clear()
    assert patch(model).counts == status(model).counts == {"patched": 2}
    assert calls == []


def test_all_or_nothing(monkeypatch):
    model, engine, count = lora("bitsandbytes"), patch.__globals__, iter(range(100))
    record = engine["Record"]

    def failing(*args):
        if next(count) == 2:
            raise RuntimeError("no memory")
        return record(*args)

    monkeypatch.setitem(engine, "Record", failing)
    with pytest.raises(RuntimeError, match="no memory"):
        patch(model)
    assert status(model).counts == {"unpatched": 4} and untouched(model)


def test_the_table_has_every_host():
    assert {host.name for host in hosts.BUILT_IN} == {line.split(" | ")[0].removeprefix("| ") for line in hosts.table().splitlines()[2:]}


# What status says


def test_status_says_what_patch_said(wrong):
    """Of what was left out by request or by verify too, also when a later call of patch leaves out more; nothing of it is in a copy or a file."""
    wrong(hosts.peft.HOST)
    model = lora("bitsandbytes")
    report = named(patch(model, verify=True, exclude="*up.base_layer"), "code", "reason")
    assert [code for code, _ in report.values()] == ["MISMATCH", "EXCLUDED", "MISMATCH", ""]

    def now(model):
        return named(status(model), "code", "reason")

    assert now(model) == report and status(model).counts == {"unpatched": 3, "patched": 1}
    touched = [name for name, m in model.named_modules() if {"forward", "_fastfuse"} & set(m.__dict__)]
    assert touched == ["base_model.model.down.base_layer"]
    with fastfuse.patched(model, ops="nf4_linear"):
        assert now(model)["up.base_layer"] == ("", "") and now(model)["up"] == ("EXCLUDED", "not asked for")
    assert now(model)["up.base_layer"] == report["up.base_layer"]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert {code for code, _ in now(other).values()} == {""}
    kept = weakref.ref(model.base_model.model.up.base_layer)
    model.base_model.model.up = nn.Linear(128, 256)
    gc.collect()
    assert kept() is None


def block(model, inside=lambda model: None, **options):
    with fastfuse.patched(model, **options):
        inside(model)


GIVEN_BACK = {
    "a block": (block, ["RESTORED", "RESTORED"]),
    "a block after patch": (lambda model: (patch(model.up), block(model)), ["", "RESTORED"]),
    "a block without a module": (lambda model: block(model, unpatch, exclude="down"), ["RESTORED", "EXCLUDED"]),
    "unpatch": (lambda model: (patch(model), unpatch(model)), ["RESTORED", "RESTORED"]),
}


@pytest.mark.parametrize("how", GIVEN_BACK)
def test_status_says_why_a_module_is_given_back(how):
    """By the module it was given back from, whether or not anything else is patched; what patch left out by request stays EXCLUDED."""
    model, (act, codes) = quantized("bitsandbytes"), GIVEN_BACK[how]
    act(model)
    up, down = status(model).entries
    assert [up.code, down.code] == codes and all(bool(e.reason) == bool(e.code) for e in (up, down))
    if how.startswith("a block") and down.code == "RESTORED":
        assert down.reason == "the block that it was patched for has ended"
    assert {e.code for e in status(copy.deepcopy(model)).entries} == {""}
    patch(model)
    assert said(status(model)) == [("patched", "")] * 2


@pytest.mark.parametrize(
    "how, host", [("a new model", "torchao"), ("injected", "bitsandbytes"), ("another adapter", "torchao"), ("another adapter", "bitsandbytes")]
)
def test_status_says_what_has_come_since(how, host):
    """An adapter over patched layers: their own product is fused, the adapter's is PEFT's until patch is called again."""
    model, config = quantized(host), LoraConfig(r=8, target_modules=["up", "down"], init_lora_weights=False)
    model.is_loaded_in_4bit = host == "bitsandbytes"
    if how == "another adapter":
        model = get_peft_model(model, LoraConfig(r=8, target_modules=["up"], init_lora_weights=False))
    patch(model)
    if how == "another adapter":
        model.add_adapter("later", config)
        model.base_model.set_adapter(["default", "later"])
    else:
        model = get_peft_model(model, config) if how == "a new model" else peft.inject_adapter_in_model(config, model)
    new, report = {"down"} if how == "another adapter" else {"up", "down"}, status(model)
    found = named(report, "status", "code")
    assert {name for name, state in found.items() if state == ("unpatched", "UNSEEN")} == new
    assert all(found[f"{name}.base_layer"] == ("patched", "") for name in ("up", "down")) and "it has come since patch was called" in str(report)
    patch(model)
    assert said(status(model)) == [("patched", "")] * 4


def test_a_copy_counts_for_itself():
    model, x = lora("bitsandbytes"), torch.randn(2, 128)
    patch(model)
    copied = copy.deepcopy(model)
    with copied.disable_adapter():
        copied(x)
    assert status(copied).fallbacks == {"ADAPTERS_DISABLED": 2} and status(model).fallbacks == {}


# verify


def test_verify_leaves_the_module_as_it_was():
    """bitsandbytes settles its compute dtype by the first input: the probe must not be that. Hooks see no random input."""
    model, seen = quantized("bitsandbytes"), []
    model.up.compute_dtype, model.up.compute_type_is_set = None, False
    model.up.register_forward_hook(lambda m, args, out: seen.append(out) or out * 2)
    add_hook_to_module(model.down, Doubling())
    before = {n: dict(m.__dict__) for n, m in model.named_modules()}
    assert patch(model, verify=True).counts == {"patched": 2}
    assert seen == [] and model.up.compute_dtype is None and not model.up.compute_type_is_set
    unpatch(model)
    assert {n: dict(m.__dict__) for n, m in model.named_modules()} == before


@pytest.mark.parametrize("host", HOSTS)
def test_verify_where_there_is_nothing_to_compare(host):
    """A mode that records no gradients, or NaN: no exception."""
    model = quantized(host)
    with torch.inference_mode():
        assert patch(model, verify=True).counts == {"patched": 2}
    unpatch(model)
    model.up.bias.data[3] = torch.nan
    assert patch(model, verify=True).counts == {"patched": 2}


def test_verify_warns_of_what_it_gives_back(wrong):
    wrong(hosts.bitsandbytes.HOST)
    model = quantized("bitsandbytes")
    with pytest.warns(UserWarning, match="2 modules are not covered, the first: up: differs from its own forward"):
        patch(model, verify=True, on_unsupported="warn")
    assert said(status(model)) == [("unpatched", "MISMATCH")] * 2


@pytest.mark.parametrize("storage, dtype", [("flat", torch.float32), ("nested", torch.bfloat16)], ids=str)
def test_verify_where_the_host_is_off(storage, dtype, monkeypatch, wrong):
    """bitsandbytes 0.50.2 decodes rows that cut a block wrongly where the CPU has AVX-512; here such a decode stands in on every CPU.

    The fused op follows the formula, so the module stays patched; a fault that flat bytes have too is fastfuse's.
    """
    right = bnb.functional.dequantize_4bit

    def row_by_row(A, state, *args, **kwargs):
        flat = copy.copy(state)
        flat.shape = torch.Size((1, state.shape.numel()))
        w = right(A, flat, *args, **kwargs).view(state.shape)
        return w if w.shape[0] == 1 else w * torch.linspace(0.5, 2, w.shape[0], dtype=w.dtype)[:, None]  # every row by another block's scale

    def forward(self, x):
        return nn.functional.linear(x, row_by_row(self.weight.detach(), self.weight.quant_state).to(x.dtype), self.bias)

    monkeypatch.setattr(bnb.functional, "dequantize_4bit", row_by_row)
    monkeypatch.setattr(bnb.nn.Linear4bit, "forward", forward)
    forward.__module__ = "bitsandbytes.nn.modules"
    linear, x = nn.Linear(96, 40, dtype=dtype), torch.randn(3, 96, dtype=dtype)
    linear.weight.data = random_weight(40, 96, dtype)
    model = nn.Sequential(layer := in_nf4(linear, storage))
    exact = x.double() @ fastfuse.ops.nf4_dequantize(layer.weight, dtype).double().T + layer.bias.double()

    def off():
        return (model(x).double() - exact).norm() / exact.norm()

    assert off() > 0.2
    (entry,) = patch(model, verify=True).entries
    assert (entry.status, entry.code) == ("patched", "HOST_DECODE") and "off" in entry.reason and off() < 0.01
    unpatch(model)
    for dora in (False, True):  # PEFT decodes the weight a second time for DoRA's norms
        adapted = get_peft_model(copy.deepcopy(model), LoraConfig(r=4, target_modules=["0"], init_lora_weights=False, use_dora=dora))
        before = list(adapted.modules())
        for ops in ("nf4_lora_linear", None):
            report = patch(adapted, ops=ops, verify=True)
            assert {(e.status, e.code) for e in report.entries if e.op == "nf4_lora_linear"} <= {("patched", "HOST_DECODE"), ("patched", "")}
            assert "MISMATCH" not in str(report)
            unpatch(adapted)
        assert list(adapted.modules()) == before
    wrong(hosts.bitsandbytes.HOST, 1.1)
    assert said(patch(model, verify=True)) == [("skipped", "MISMATCH")]


# What else wraps, traces and calls


@pytest.mark.parametrize("marked", [False, True])
def test_another_wrapper_above_ours(marked):
    """A library that wrapped the patched forward keeps calling it: after unpatch that is the original again. What puts ours back later is no harm.
    functools.wraps copies a function's marks, and still the wrapper is not ours."""
    model, x = quantized("bitsandbytes"), torch.randn(2, 128)
    want = model.up(x)
    patch(model)
    ours = model.up.forward
    model.up.forward = types.MethodType(functools.wraps(ours.__func__)(lambda self, x: ours(x) + 1), model.up) if marked else lambda x: ours(x) + 1
    assert named(unpatch(model), "code")["up"] == ("WRAPPED",)
    assert torch.equal(model.up(x), want + 1)
    model.up.forward = ours
    assert torch.equal(model.up(x), want)
    assert patch(model).counts == {"patched": 2}
    torch.testing.assert_close(model.up(x), want)
    unpatch(model)
    model.up.forward = ours
    unpatch(model)
    assert "forward" not in model.up.__dict__ and torch.equal(model.up(x), want)


def test_threads_do_not_share_a_backend():
    model, x = lora("bitsandbytes"), torch.randn(2, 128)
    want = model(x)
    patch(model, backend="torch")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(lambda _: model(x), range(60)))
    assert _op._backend == "auto"
    for out in outputs:
        torch.testing.assert_close(out, want)


TRANSFORMS = {"TRACING": torch.jit.trace, "FUNCTORCH": lambda model, x: torch.func.vmap(model)}


@torch.no_grad()
@pytest.mark.parametrize("code, host", [("TRACING", "bitsandbytes"), ("TRACING", "torchao"), ("FUNCTORCH", "bitsandbytes")])
def test_transformed_models_run_their_own_forward(code, host):
    model, x = quantized(host), torch.randn(2, 3, 128)
    want = TRANSFORMS[code](model, x)(x)
    patch(model)
    with pytest.warns(UserWarning, match=code):
        got = TRANSFORMS[code](model, x)(x)
    torch.testing.assert_close(got, want)


@pytest.mark.filterwarnings("ignore:fastfuse. .* runs its own forward")
def test_wrong_calls_are_the_modules_own_errors():
    model, x = quantized("bitsandbytes"), torch.randn(2, 128)
    patch(model)
    for args, kwargs in (((x,), {"x": x}), ((x,), {"nothing": None}), ((), {})):
        with pytest.raises(TypeError):
            model.up(*args, **kwargs)
