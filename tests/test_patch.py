"""The engine of patch: plan, apply all or nothing, verify, report, and give back, whatever else has wrapped the model."""

import concurrent.futures
import copy
import dataclasses
import functools
import gc
import io
import pickle
import types
import warnings
import weakref

import bitsandbytes as bnb
import peft
import pytest
import torch
from accelerate.hooks import add_hook_to_module, remove_hook_from_module
from numerics import assert_rounding_apart
from peft import LoraConfig, get_peft_model
from qlora import HOSTS, Block, Doubling, lora, quantized
from torch import nn
from weights import quantize, random_weight

import fastfuse
from fastfuse.patching import hosts
from fastfuse.patching.hosts import _host


def snapshot(model):
    """Everything patch promises to leave alone."""
    return {
        "state": [(k, getattr(v, "shape", None), getattr(v, "dtype", None)) for k, v in model.state_dict().items()],
        "storage": [(n, p.data_ptr()) for n, p in model.named_parameters() if type(p).__name__ != "NF4Tensor"],
        "parameters": [(n, id(p), p.requires_grad) for n, p in model.named_parameters()],
        "modules": [(n, id(m), type(m), m.training) for n, m in model.named_modules()],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in model.modules()],
    }


def attributes(model):
    return [dict(m.__dict__) for m in model.modules()]


@pytest.mark.parametrize("host", HOSTS)
def test_nothing_else_is_touched(host):
    model = lora(host)
    classes = [bnb.nn.Linear4bit, nn.Linear, peft.tuners.lora.layer.Linear, peft.tuners.lora.bnb.Linear4bit, nn.Module]
    forwards = [c.forward for c in classes]
    model(torch.randn(2, 128))
    before, own = snapshot(model), attributes(model)
    fastfuse.patch(model)
    assert snapshot(model) == before
    model(torch.randn(2, 128)).sum().backward()
    model.zero_grad()
    fastfuse.unpatch(model)
    assert snapshot(model) == before
    assert [{k: v for k, v in now.items() if k not in ("forward",)}.keys() for now in attributes(model)] == [d.keys() for d in own]
    assert not any("forward" in m.__dict__ or "_fastfuse" in m.__dict__ for m in model.modules())
    assert [c.forward for c in classes] == forwards


def test_patching_twice_and_unpatching_twice():
    model = lora("bitsandbytes")
    assert fastfuse.patch(model).counts == {"patched": 4}
    again = fastfuse.patch(model)
    assert again.counts == {"already": 4} and again
    assert fastfuse.unpatch(model).counts == {"restored": 4}
    assert not fastfuse.unpatch(model) and fastfuse.status(model).counts == {"unpatched": 4}


@pytest.mark.parametrize("order", ["hook, patch", "patch, hook"])
@pytest.mark.parametrize("unpatch_first", [True, False])
def test_accelerate_hooks_keep_running(order, unpatch_first):
    model, x = lora("bitsandbytes"), torch.randn(2, 128)
    layer, hook = model.base_model.model.up, Doubling()
    plain = layer(x)
    for step in order.split(", "):
        if step == "hook":
            add_hook_to_module(layer, hook)
        else:
            assert len(fastfuse.patch(model).patched) == 4
    torch.testing.assert_close(layer(x), plain * 2)
    assert hook.calls == 1
    undo = [lambda: fastfuse.unpatch(model), lambda: remove_hook_from_module(layer)]
    for step in undo if unpatch_first else undo[::-1]:
        step()
    assert torch.equal(layer(x), plain) and hook.calls == 1
    assert "_fastfuse" not in layer.__dict__ and getattr(layer.forward, "__func__", None) is type(layer).forward


def test_deepcopy_stays_patched_and_independent():
    model, x = lora("bitsandbytes"), torch.randn(2, 128)
    fastfuse.patch(model)
    copied = copy.deepcopy(model)
    want = model(x)
    assert fastfuse.status(copied).counts == {"patched": 4}
    assert torch.equal(copied(x), want)
    with torch.no_grad():
        copied.base_model.model.up.lora_B["default"].weight.zero_()
    assert not torch.equal(copied(x), want) and torch.equal(model(x), want)
    with copied.disable_adapter():
        copied(x)
    assert fastfuse.status(copied).fallbacks and not fastfuse.status(model).fallbacks
    fastfuse.unpatch(copied)
    assert fastfuse.status(model).counts == {"patched": 4}


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_saved_model_loads_unpatched(how):
    model, x = lora("bitsandbytes"), torch.randn(2, 128)
    want = model(x)
    fastfuse.patch(model)
    if how == "pickle":
        loaded = pickle.loads(pickle.dumps(model))
    else:
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
    assert fastfuse.status(loaded).counts == {"unpatched": 4}
    assert torch.equal(loaded(x), want)
    assert fastfuse.patch(loaded).counts == {"patched": 4}
    torch.testing.assert_close(loaded(x), want)
    fastfuse.unpatch(loaded)
    assert torch.equal(loaded(x), want)


def test_save_pretrained_is_unchanged(tmp_path):
    model = lora("bitsandbytes")
    model.save_pretrained(tmp_path / "before")
    fastfuse.patch(model)
    model.save_pretrained(tmp_path / "after")
    name = "adapter_model.safetensors"
    assert (tmp_path / "before" / name).read_bytes() == (tmp_path / "after" / name).read_bytes()


def test_options():
    model = lora("bitsandbytes")
    planned = fastfuse.patch(model, dry_run=True)
    assert planned.counts == {"planned": 4} and not planned and fastfuse.status(model).counts == {"unpatched": 4}
    report = fastfuse.patch(model, ops="nf4_lora_linear", exclude=["*.down"])
    assert [e.name for e in report.patched] == ["base_model.model.up"] and {e.code for e in report.skipped} == {"EXCLUDED"}
    fastfuse.unpatch(model)
    report = fastfuse.patch(model, include=lambda name, m: isinstance(m, bnb.nn.Linear4bit))
    assert [e.op for e in report.patched] == ["nf4_linear"] * 2
    fastfuse.unpatch(model, include="*up*")
    assert fastfuse.status(model).counts == {"patched": 1, "unpatched": 3}
    with fastfuse.patched(model) as report:
        assert report.counts == {"patched": 3, "already": 1}
    assert fastfuse.status(model).counts == {"patched": 1, "unpatched": 3}
    assert report.to_dict()["counts"] == {"patched": 3, "already": 1}


@pytest.mark.parametrize(
    "options, error, message",
    [
        ({"on_unsupported": "maybe"}, ValueError, "on_unsupported is 'maybe'"),
        ({"backend": "cuda"}, ValueError, "backend is 'cuda'"),
        ({"ops": ["nf4_linear", "nope"]}, ValueError, "ops has 'nope', known are cross_attention, nf4_linear, nf4_lora_linear, patch_embed"),
        ({"ops": 3}, TypeError, "ops is a int"),
        ({"include": [3]}, TypeError, "not a int"),
    ],
)
def test_bad_options(options, error, message):
    model = lora("bitsandbytes")
    with pytest.raises(error, match=message):
        fastfuse.patch(model, **options)
    assert fastfuse.status(model).counts == {"unpatched": 4}
    with pytest.raises(TypeError, match="patch: model is a list"):
        fastfuse.patch([model])
    with pytest.raises(TypeError, match="status: model is a NoneType"):
        fastfuse.status(None)


def test_nothing_to_patch_is_said_aloud():
    with pytest.warns(
        UserWarning, match="found nothing to patch in Block: no module holds an NF4 weight, .*; its 3 linear layers hold Parameter of torch.float32"
    ):
        report = fastfuse.patch(Block())
    assert not report and "found nothing to patch" in str(report)
    with pytest.raises(fastfuse.Unsupported, match="found nothing"):
        fastfuse.patch(Block(), on_unsupported="raise")


def uncovered(kind: str) -> nn.Module:
    model = quantized("bitsandbytes")
    if kind == "CPU_PACKED_BNB":
        model.up.weight.quant_state.packing_format_for_cpu = True
    elif kind == "QUANT_TYPE":
        model.up.weight.quant_state.quant_type = "fp4"
    elif kind == "NOT_NF4":
        model.up.weight = bnb.nn.Params4bit(torch.randn(256, 128), requires_grad=False, quant_type="nf4")
    elif kind == "FOREIGN_FORWARD":

        class Louder(bnb.nn.Linear4bit):
            def forward(self, x):
                return 2 * super().forward(x)

        model.up.__class__ = Louder
    elif kind == "FOREIGN_FORWARD (instance)":
        model.up.forward = functools.partial(lambda m, x: 2 * type(m).forward(m, x), model.up)
    return model


def whys(report) -> list[tuple[str, str, str]]:
    return [(e.name, e.code, e.reason) for e in report.entries]


@pytest.mark.parametrize("kind", ["CPU_PACKED_BNB", "QUANT_TYPE", "NOT_NF4", "FOREIGN_FORWARD", "FOREIGN_FORWARD (instance)"])
def test_what_is_not_covered_is_skipped_with_its_reason(kind):
    model, code = uncovered(kind), kind.split(" ")[0]
    own = dict(model.up.__dict__)
    report = fastfuse.patch(model)
    assert [(e.name, e.code) for e in report.skipped] == [("up", code)] and len(report.patched) == 1 and code in str(report)
    assert model.up.__dict__ == own
    assert whys(fastfuse.status(model)) == whys(report) and code in str(fastfuse.status(model))
    fastfuse.unpatch(model)
    with pytest.warns(UserWarning, match=code):
        fastfuse.patch(model, on_unsupported="warn")
    fastfuse.unpatch(model)
    with pytest.raises(fastfuse.Unsupported, match=code):
        fastfuse.patch(model, on_unsupported="raise")
    assert fastfuse.status(model).patched == ()


def test_status_says_what_patch_said(monkeypatch):
    """Of what was left out by request or by verify too, also when a later call of patch leaves out more; nothing of it is in a copy or a file."""
    from fastfuse.patching import hosts

    wrong = dataclasses.replace(hosts.peft.HOST, fused=lambda *args: hosts.peft.HOST.fused(*args) * 1.02)
    monkeypatch.setattr(hosts, "BUILT_IN", tuple(wrong if h is hosts.peft.HOST else h for h in hosts.BUILT_IN))
    model = lora("bitsandbytes")
    report = fastfuse.patch(model, verify=True, exclude="*up.base_layer")
    codes = {e.name.removeprefix("base_model.model."): (e.code, e.reason) for e in report.entries}
    assert [code for code, _ in codes.values()] == ["MISMATCH", "EXCLUDED", "MISMATCH", ""]

    def said(model):
        return {e.name.removeprefix("base_model.model."): (e.code, e.reason) for e in fastfuse.status(model).entries}

    assert said(model) == codes and fastfuse.status(model).counts == {"unpatched": 3, "patched": 1}
    touched = [name for name, m in model.named_modules() if {"forward", "_fastfuse"} & set(m.__dict__)]
    assert touched == ["base_model.model.down.base_layer"]
    with fastfuse.patched(model, ops="nf4_linear"):
        assert said(model)["up.base_layer"] == ("", "") and said(model)["up"] == ("EXCLUDED", "not asked for")
    assert said(model)["up.base_layer"] == codes["up.base_layer"]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert {code for code, _ in said(other).values()} == {""}
    kept = weakref.ref(model.base_model.model.up.base_layer)
    model.base_model.model.up = nn.Linear(128, 256)
    gc.collect()
    assert kept() is None


@pytest.mark.parametrize("how", ["a block", "a block after patch", "unpatch", "verify", "a block without a module"])
def test_status_says_why_a_module_is_given_back(how, monkeypatch):
    """By the module it was given back from, whether or not anything else is patched; what patch left out by request stays EXCLUDED."""
    model = quantized("bitsandbytes")
    if how == "a block":
        with fastfuse.patched(model):
            pass
    elif how == "a block after patch":
        fastfuse.patch(model.up)
        with fastfuse.patched(model):
            pass
    elif how == "a block without a module":
        with fastfuse.patched(model, exclude="down"):
            fastfuse.unpatch(model)
    elif how == "unpatch":
        fastfuse.patch(model)
        fastfuse.unpatch(model)
    else:
        wrong = dataclasses.replace(hosts.bitsandbytes.HOST, fused=lambda *args: hosts.bitsandbytes.HOST.fused(*args) * 1.02)
        monkeypatch.setattr(hosts, "BUILT_IN", tuple(wrong if h is hosts.bitsandbytes.HOST else h for h in hosts.BUILT_IN))
        assert [e.code for e in fastfuse.patch(model, verify=True).entries] == ["MISMATCH"] * 2
    want = {
        "a block": ["RESTORED", "RESTORED"],
        "a block after patch": ["", "RESTORED"],
        "a block without a module": ["RESTORED", "EXCLUDED"],
        "unpatch": ["RESTORED", "RESTORED"],
        "verify": ["MISMATCH", "MISMATCH"],
    }[how]
    found = fastfuse.status(model).entries
    assert [e.code for e in found] == want and all(bool(e.reason) == bool(e.code) for e in found)
    if how.startswith("a block") and "RESTORED" == found[1].code:
        assert found[1].reason == "the block that it was patched for has ended"
    assert {e.code for e in fastfuse.status(copy.deepcopy(model)).entries} == {""}
    fastfuse.patch(model)
    assert all(e.status == "patched" and e.code == "" for e in fastfuse.status(model).entries) or how == "verify"


def test_status_where_nothing_is_patched(monkeypatch):
    model = uncovered("FOREIGN_FORWARD")
    fastfuse.patch(model, exclude="down")
    assert [(e.name, e.status, e.code) for e in fastfuse.status(model).entries] == [("up", "unpatched", "FOREIGN_FORWARD"), ("down", "unpatched", "EXCLUDED")]
    monkeypatch.setenv("FASTFUSE_DISABLE", "1")
    assert whys(fastfuse.status(model)) == whys(fastfuse.patch(model)) and "DISABLED" in str(fastfuse.status(model))


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("how", ["a new model", "injected", "another adapter"])
def test_status_says_what_has_come_since(how, host):
    """An adapter over patched layers: their own product is fused, the adapter's is PEFT's until patch is called again."""
    x, config = torch.randn(3, 128), LoraConfig(r=8, target_modules=["up", "down"], init_lora_weights=False)
    if how == "another adapter":
        model = quantized(host)
        model.is_loaded_in_4bit = host == "bitsandbytes"
        model = get_peft_model(model, LoraConfig(r=8, target_modules=["up"], init_lora_weights=False))
        fastfuse.patch(model)
        model.add_adapter("later", config)
        model.base_model.set_adapter(["default", "later"])
        new = ["down"]
    else:
        model = quantized(host)
        model.is_loaded_in_4bit = host == "bitsandbytes"
        fastfuse.patch(model)
        model = get_peft_model(model, config) if how == "a new model" else peft.inject_adapter_in_model(config, model)
        new = ["up", "down"]
    report = fastfuse.status(model)
    found = {e.name.removeprefix("base_model.model."): (e.status, e.code) for e in report.entries}
    assert {name for name, state in found.items() if state == ("unpatched", "UNSEEN")} == set(new)
    assert all(found[f"{name}.base_layer"] == ("patched", "") for name in ("up", "down")) and "it has come since patch was called" in str(report)
    fastfuse.unpatch(model)
    want = model(x)
    fastfuse.patch(model)
    assert fastfuse.status(model).counts == {"patched": 4} and {e.code for e in fastfuse.status(model).entries} == {""}
    assert_rounding_apart(model(x), want, K=256, products=4)
    assert fastfuse.status(model).fallbacks == {}


def test_a_renamed_argument_that_only_a_keyword_gives(monkeypatch):
    """The module's own forward gets it by the name in its signature: its **others would swallow another one."""

    class Layer(nn.Module):
        def forward(self, x, *, past_key_values=None, **others):
            return x, past_key_values, others

    host = hosts.Host(
        name="renamed", op="renamed", matches=lambda module: isinstance(module, Layer), takes=("x", "cache"), renamed=(("cache", "past_key_values"),),
        fused=lambda module, given, options: _host.Reason("NEVER", "is not fused"), fallback=lambda module, given, options: _host.call_own(module, given),
    )  # fmt: skip
    monkeypatch.setattr(hosts, "BUILT_IN", (host,))
    layer = Layer()
    assert fastfuse.patch(layer).counts == {"patched": 1}
    with pytest.warns(UserWarning, match="NEVER"):
        assert layer(1, past_key_values=2) == (1, 2, {})
    with pytest.warns(UserWarning, match="called with cache, which its forward does not know"):
        assert layer(1, cache=2) == Layer()(1, cache=2) == (1, None, {"cache": 2})
    assert fastfuse.status(layer).fallbacks == {"NEVER": 1, "ARGUMENTS": 1}


def test_all_or_nothing(monkeypatch):
    model = lora("bitsandbytes")
    engine = fastfuse.patch.__globals__
    count = iter(range(100))

    def record(*args):
        if next(count) == 2:
            raise RuntimeError("no memory")
        return engine_record(*args)

    engine_record = engine["Record"]
    monkeypatch.setitem(engine, "Record", record)
    with pytest.raises(RuntimeError, match="no memory"):
        fastfuse.patch(model)
    assert fastfuse.status(model).counts == {"unpatched": 4}
    assert not any("forward" in m.__dict__ for m in model.modules())


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_verify(host, dtype, monkeypatch):
    model = lora(host, dtype)
    state = torch.get_rng_state()
    assert fastfuse.patch(model, verify=True).counts == {"patched": 4}
    assert torch.equal(torch.get_rng_state(), state)
    fastfuse.unpatch(model)
    right = hosts.peft.HOST
    wrong = dataclasses.replace(right, fused=lambda *args: right.fused(*args) * 1.02)
    monkeypatch.setattr(hosts, "BUILT_IN", tuple(wrong if h is right else h for h in hosts.BUILT_IN))
    report = fastfuse.patch(model, verify=True)
    assert [e.code for e in report.skipped] == ["MISMATCH"] * 2 and len(report.patched) == 2
    fastfuse.unpatch(model)
    with pytest.raises(fastfuse.Unsupported, match=r"differs from its own forward by 2\.\de-02 relative"):
        fastfuse.patch(model, verify=True, on_unsupported="raise")
    assert fastfuse.status(model).patched == ()


def test_another_wrapper_above_ours():
    """A library that wrapped the patched forward keeps calling it: after unpatch that is the original again."""
    model, x = quantized("bitsandbytes"), torch.randn(2, 128)
    want = model.up(x)
    fastfuse.patch(model)
    ours = model.up.forward
    model.up.forward = lambda x: ours(x) + 1
    report = fastfuse.unpatch(model)
    assert {e.code for e in report.entries if e.name == "up"} == {"WRAPPED"}
    assert torch.equal(model.up(x), want + 1)


@pytest.mark.parametrize("host", HOSTS)
def test_weight_replaced_by_something_else_while_patched(host):
    """The module's own forward runs, the report says so, and unpatch still finds the module."""
    model, x = quantized(host), torch.randn(2, 128)
    fastfuse.patch(model)
    if host == "bitsandbytes":
        model.up.weight.quant_state.packing_format_for_cpu = True
        code = "CPU_PACKED_BNB"
    else:
        model.up.weight = nn.Parameter(torch.randn(256, 128))
        code = "NOT_NF4"
        with pytest.warns(UserWarning, match=code):
            torch.testing.assert_close(model.up(x), nn.functional.linear(x, model.up.weight, model.up.bias))
    assert {e.code for e in fastfuse.status(model).entries if e.name == "up"} == {"CHANGED" if host == "torchao" else code}
    assert fastfuse.unpatch(model).counts == {"restored": 2}
    assert not any("_fastfuse" in m.__dict__ or "forward" in m.__dict__ for m in model.modules())


def test_a_chip_without_kernels_is_skipped_at_once(monkeypatch):
    """A model on a GPU that no row covers keeps working: it is not patched, and the report says why."""
    from fastfuse.ops import _op

    monkeypatch.setattr(_op, "check_device", lambda op, device, backend: fastfuse.tune.covering_arch("nf4_linear", "sm_75"))
    monkeypatch.setattr(_host, "check_device", _op.check_device)
    report = fastfuse.patch(quantized("bitsandbytes"))
    assert {(e.status, e.code) for e in report.entries} == {("skipped", "ARCH")} and "no kernel covers sm_75" in str(report)


def test_verify_leaves_the_module_as_it_was():
    """bitsandbytes settles its compute dtype by the first input: the probe must not be that. Hooks see no random input."""
    model, seen = quantized("bitsandbytes"), []
    model.up.compute_dtype, model.up.compute_type_is_set = None, False
    model.up.register_forward_hook(lambda m, args, out: seen.append(out) or out * 2)
    add_hook_to_module(model.down, Doubling())
    before = {n: dict(m.__dict__) for n, m in model.named_modules()}
    assert fastfuse.patch(model, verify=True).counts == {"patched": 2}
    assert seen == [] and model.up.compute_dtype is None and not model.up.compute_type_is_set
    fastfuse.unpatch(model)
    assert {n: dict(m.__dict__) for n, m in model.named_modules()} == before


def test_wrapped_unpatched_unwrapped():
    """A wrapper that puts our forward back after unpatch: patch still works, and unpatch cleans up."""
    model, x = quantized("bitsandbytes"), torch.randn(2, 128)
    want = model.up(x)
    fastfuse.patch(model)
    ours = model.up.forward
    model.up.forward = lambda x: ours(x) + 1
    fastfuse.unpatch(model)
    model.up.forward = ours
    assert torch.equal(model.up(x), want)
    assert fastfuse.patch(model).counts == {"patched": 2}
    torch.testing.assert_close(model.up(x), want)
    fastfuse.unpatch(model)
    model.up.forward = ours
    fastfuse.unpatch(model)
    assert "forward" not in model.up.__dict__ and torch.equal(model.up(x), want)


def test_a_shared_module_answers_to_all_its_names():
    model = nn.ModuleDict({"enc": quantized("bitsandbytes")})
    model["dec"] = model["enc"]
    assert fastfuse.patch(model, include="dec.*").counts == {"patched": 2}
    fastfuse.unpatch(model)
    assert fastfuse.patch(model, exclude="dec.*").counts == {"skipped": 2}
    with fastfuse.patched(model):
        assert fastfuse.status(model).counts == {"patched": 2}
    assert fastfuse.status(model).counts == {"unpatched": 2}


def test_threads_do_not_share_a_backend():
    from fastfuse.ops import _op

    model, x = lora("bitsandbytes"), torch.randn(2, 128)
    want = model(x)
    fastfuse.patch(model, backend="torch")
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        outputs = list(pool.map(lambda _: model(x), range(60)))
    assert _op._backend == "auto"
    for out in outputs:
        torch.testing.assert_close(out, want)


def test_patched_finds_its_modules_under_new_names():
    base = quantized("bitsandbytes")
    base.is_loaded_in_4bit = True
    with fastfuse.patched(base):
        get_peft_model(base, LoraConfig(r=4, target_modules=["up"]))
    assert not any("_fastfuse" in m.__dict__ or "forward" in m.__dict__ for m in base.modules())


def test_the_table_has_every_host():
    from fastfuse.patching.hosts import BUILT_IN, table

    assert {host.name for host in BUILT_IN} == {line.split(" | ")[0].removeprefix("| ") for line in table().splitlines()[2:]}


def test_a_wrapper_made_with_functools_wraps_is_not_ours():
    """wraps copies a function's marks: unpatch must not take the wrapper away."""
    model, x = quantized("bitsandbytes"), torch.randn(2, 128)
    want = model.up(x)
    fastfuse.patch(model)
    ours = model.up.forward.__func__
    model.up.forward = types.MethodType(functools.wraps(ours)(lambda self, x: 2 * ours(self, x)), model.up)
    assert {e.code for e in fastfuse.unpatch(model).entries if e.name == "up"} == {"WRAPPED"}
    assert torch.equal(model.up(x), 2 * want)


def test_a_scripted_part_is_left_alone():
    model = nn.Sequential(torch.jit.script(nn.ReLU()), quantized("bitsandbytes"))
    assert fastfuse.patch(model).counts == {"patched": 2} and fastfuse.status(model).counts == {"patched": 2}


def test_parametrizations_are_not_run_to_look_for_weights():
    calls = []

    class Noting(nn.Module):
        def forward(self, w):
            calls.append(1)
            return w

    model = nn.Sequential(nn.Linear(4, 4), quantized("bitsandbytes"))
    nn.utils.parametrize.register_parametrization(model[0], "weight", Noting(), unsafe=True)
    calls.clear()
    fastfuse.patch(model)
    fastfuse.status(model)
    assert calls == []


@pytest.mark.parametrize("host", HOSTS)
def test_verify_where_there_is_nothing_to_compare(host):
    """No values, or a mode that records no gradients: no exception."""
    model = quantized(host)
    with torch.inference_mode():
        assert fastfuse.patch(model, verify=True).counts == {"patched": 2}
    fastfuse.unpatch(model)
    if host == "torchao":
        assert fastfuse.patch(model.to("meta"), verify=True).counts == {"patched": 2}


def test_verify_warns_of_what_it_gives_back(monkeypatch):
    right = hosts.bitsandbytes.HOST
    wrong = dataclasses.replace(right, fused=lambda *args: right.fused(*args) * 1.02)
    monkeypatch.setattr(hosts, "BUILT_IN", tuple(wrong if h is right else h for h in hosts.BUILT_IN))
    with pytest.warns(UserWarning, match="2 modules are not covered, the first: up: differs from its own forward"):
        fastfuse.patch(quantized("bitsandbytes"), verify=True, on_unsupported="warn")


@pytest.mark.parametrize("storage", ["flat", "nested"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_verify_where_the_host_is_off(dtype, storage, monkeypatch):
    """bitsandbytes 0.50.2 decodes rows that cut a block wrongly where the CPU has AVX-512; here such a decode stands in on every CPU.

    The fused op follows the formula, so the module stays patched; a fault that flat bytes have too is fastfuse's.
    """
    from bitsandbytes import functional

    right = functional.dequantize_4bit

    def row_by_row(A, state, *args, **kwargs):
        flat = copy.copy(state)
        flat.shape = torch.Size((1, state.shape.numel()))
        w = right(A, flat, *args, **kwargs).view(state.shape)
        return w if w.shape[0] == 1 else w * torch.linspace(0.5, 2, w.shape[0], dtype=w.dtype)[:, None]  # every row by another block's scale

    def forward(self, x):
        w = functional.dequantize_4bit(self.weight.detach(), self.weight.quant_state).to(x.dtype)
        return torch.nn.functional.linear(x, w, self.bias)

    monkeypatch.setattr(functional, "dequantize_4bit", row_by_row)
    monkeypatch.setattr(bnb.nn.Linear4bit, "forward", forward)
    forward.__module__ = "bitsandbytes.nn.modules"
    layer = bnb.nn.Linear4bit(96, 40, compute_dtype=dtype, quant_type="nf4", device="meta")
    layer.weight, layer.bias = quantize(random_weight(40, 96, dtype), storage), nn.Parameter(torch.randn(40, dtype=dtype))
    layer = nn.Sequential(layer)
    x = torch.randn(3, 96, dtype=dtype)
    exact = x.double() @ fastfuse.ops.nf4_dequantize(layer[0].weight, dtype).double().T + layer[0].bias.double()
    assert (layer(x).double() - exact).norm() > 0.2 * exact.norm()
    (entry,) = fastfuse.patch(layer, verify=True).entries
    assert (entry.status, entry.code) == ("patched", "HOST_DECODE") and "off" in entry.reason
    assert (layer(x).double() - exact).norm() < 0.01 * exact.norm()
    fastfuse.unpatch(layer)
    for dora in (False, True):  # PEFT decodes the weight a second time for DoRA's norms
        adapted = get_peft_model(copy.deepcopy(layer), LoraConfig(r=4, target_modules=["0"], init_lora_weights=False, use_dora=dora))
        before = {n: id(m) for n, m in adapted.named_modules()}
        for ops in ("nf4_lora_linear", None):
            report = fastfuse.patch(adapted, ops=ops, verify=True)
            assert {(e.status, e.code) for e in report.entries if e.op == "nf4_lora_linear"} <= {("patched", "HOST_DECODE"), ("patched", "")}
            assert not [e for e in report.entries if e.code == "MISMATCH"]
            fastfuse.unpatch(adapted)
        assert {n: id(m) for n, m in adapted.named_modules()} == before
    fastfuse_wrong = dataclasses.replace(hosts.bitsandbytes.HOST, fused=lambda *args: hosts.bitsandbytes.HOST.fused(*args) * 1.1)
    monkeypatch.setattr(hosts, "BUILT_IN", (fastfuse_wrong, *(h for h in hosts.BUILT_IN if h is not hosts.bitsandbytes.HOST)))
    assert [e.code for e in fastfuse.patch(layer, verify=True).entries if e.op == "nf4_linear"] == ["MISMATCH"]


def test_verify_of_a_module_that_gives_nan():
    model = quantized("torchao")
    with torch.no_grad():
        model.up.bias[3] = torch.nan
    assert fastfuse.patch(model, verify=True).counts == {"patched": 2}


@pytest.mark.parametrize("host", HOSTS)
def test_traced_models_run_their_own_forward(host):
    model, x = quantized(host), torch.randn(2, 128)
    fastfuse.patch(model)
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        traced = torch.jit.trace(model, x)
    assert any("TRACING" in str(w.message) for w in caught)
    torch.testing.assert_close(traced(x), model(x))


@pytest.mark.parametrize("call", [lambda m, x: m.up(x, x=x), lambda m, x: m.up(x, nothing=None), lambda m, x: m.up()], ids=["twice", "unknown", "none"])
def test_wrong_calls_are_the_modules_own_errors(call):
    model, x = quantized("bitsandbytes"), torch.randn(2, 128)
    fastfuse.patch(model)
    with warnings.catch_warnings(), pytest.raises(TypeError):
        warnings.simplefilter("ignore")
        call(model, x)


def test_unpatch_knows_every_name_of_a_shared_module():
    model = nn.ModuleDict({"enc": quantized("bitsandbytes")})
    model["dec"] = model["enc"]
    fastfuse.patch(model)
    assert fastfuse.unpatch(model, include="dec.*").counts == {"restored": 2}


def test_unpatch_names_itself_and_knows_what_is_patched():
    model = quantized("bitsandbytes")
    with pytest.raises(ValueError, match="unpatch: ops has 'nope'"):
        fastfuse.unpatch(model, ops="nope")
    registered = fastfuse.register_host("mine", "mine_op", lambda m: isinstance(m, nn.ReLU), lambda m, x: x.clamp(min=0))
    model = nn.Sequential(nn.ReLU())
    assert fastfuse.patch(model, ops="mine_op").counts == {"patched": 1}
    registered.remove()
    assert [(e.host, e.code) for e in fastfuse.status(model).entries] == [("mine", "")]
    assert fastfuse.unpatch(model, ops="mine_op").counts == {"restored": 1}


def test_a_registered_forward_is_called_as_the_module_was():
    seen = []
    registered = fastfuse.register_host("mine", "mine_op", lambda m: isinstance(m, nn.ReLU), lambda m, *args, **kwargs: seen.append((args, kwargs)))
    try:
        model = nn.ReLU()
        fastfuse.patch(model)
        model(1)
        model(input=2)
    finally:
        registered.remove()
    assert seen == [((1,), {}), ((), {"input": 2})]


def test_a_host_registered_later_does_not_take_over_what_is_patched():
    model = quantized("bitsandbytes")
    fastfuse.patch(model)
    registered = fastfuse.register_host("mine", "mine_op", lambda m: isinstance(m, bnb.nn.Linear4bit), lambda m, x: x)
    try:
        assert {(e.host, e.op, e.status) for e in fastfuse.patch(model).entries} == {("bitsandbytes", "nf4_linear", "already")}
    finally:
        registered.remove()
