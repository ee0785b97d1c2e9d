"""patch(model) over real PEFT, bitsandbytes and torchao layers: the same answers, and nothing left behind."""

import concurrent.futures
import copy
import dataclasses
import functools
import io
import pickle
import warnings

import bitsandbytes as bnb
import peft
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from conftest import GPU
from numerics import assert_no_worse, assert_rounding_apart
from peft import LoraConfig, get_peft_model
from torch import nn
from weights import quantize

import fastfuse
from fastfuse.patching.hosts import _host

HOSTS = ("bitsandbytes", "torchao")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.up = nn.Linear(128, 256)
        self.down = nn.Linear(256, 128, bias=False)
        self.head = nn.Linear(128, 10)

    def forward(self, x):
        return self.head(x + self.down(torch.relu(self.up(x))))


def quantized(host: str, dtype=torch.float32, storage="nested") -> nn.Module:
    model = Block().to(dtype)
    for name in ("up", "down"):
        linear = getattr(model, name)
        if host == "torchao":
            linear.weight = nn.Parameter(quantize(linear.weight.detach(), "torchao"), requires_grad=False)
            continue
        made = bnb.nn.Linear4bit(linear.in_features, linear.out_features, linear.bias is not None, compute_dtype=dtype, quant_type="nf4", device="meta")
        made.weight, made.bias = quantize(linear.weight.detach(), storage), linear.bias
        made.support_avx512bf16_for_cpu = False  # else the unpatched layer repacks its weight for good in eval mode
        setattr(model, name, made)
    return model


def lora(host: str, dtype=torch.float32, **config) -> nn.Module:
    model = quantized(host, dtype)
    model.is_loaded_in_4bit = host == "bitsandbytes"
    return get_peft_model(model, LoraConfig(r=8, target_modules=["up", "down"], init_lora_weights=False, **config))


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


def gradients(model, x):
    out = model(x)
    leaves = [p for p in model.parameters() if p.requires_grad]
    return out, torch.autograd.grad(out.square().sum(), leaves)


@pytest.mark.parametrize("backend", ["auto", "torch", *([] if GPU else ["triton"])])  # the interpreter is for machines without a GPU
@pytest.mark.parametrize("host", HOSTS)
def test_same_answers_and_gradients(host, backend):
    model, x = lora(host), torch.randn(2, 7, 128)
    want, want_grads = gradients(model, x)
    report = fastfuse.patch(model, backend=backend)
    got, got_grads = gradients(model, x)
    assert len(report.patched) == 4 and {e.op for e in report.entries} == {"nf4_linear", "nf4_lora_linear"}
    assert fastfuse.status(model).fallbacks == {}
    assert_rounding_apart(got, want, K=256, products=2)
    for g, w in zip(got_grads, want_grads, strict=True):
        assert_rounding_apart(g, w, K=256, products=4)
    fastfuse.unpatch(model)
    assert torch.equal(model(x), want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("host", HOSTS)
def test_half_precision_base_with_fp32_adapters(host, dtype):
    """What QLoRA really trains: the result and the fp32 gradients are as close to float64 as PEFT's own."""
    model, x = lora(host, dtype), torch.randn(5, 128, dtype=dtype)
    layer = model.base_model.model.up
    assert layer.lora_A["default"].weight.dtype == torch.float32
    leaves = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]

    def run():
        y = layer(x)
        return [y, *torch.autograd.grad(y, leaves, torch.ones_like(y))]

    eager = run()
    w = fastfuse.ops.nf4_dequantize_ref(fastfuse.quant.NF4View.of(layer.base_layer.weight), torch.float64)
    a, b = (t.detach().double().requires_grad_() for t in leaves)
    y = x.double() @ w.T + layer.base_layer.bias.double() + (x.double() @ a.T) @ b.T
    exact = [y, *torch.autograd.grad(y, [a, b], torch.ones_like(y))]
    with fastfuse.patched(model):
        for values in zip(run(), eager, exact, strict=True):
            assert_no_worse(*values)
        assert fastfuse.status(model).fallbacks == {}


@pytest.mark.parametrize("storage", ["flat", "nested"])
@pytest.mark.parametrize("host", HOSTS)
def test_bare_layers_without_peft(host, storage):
    model, x = quantized(host, storage=storage), torch.randn(4, 128, requires_grad=True)
    want, want_grad = gradients(model, x)[0], torch.autograd.grad(model(x).sum(), x)[0]
    report = fastfuse.patch(model)
    assert [e.op for e in report.patched] == ["nf4_linear", "nf4_linear"]
    assert all(("flat" in e.layout) == (storage == "flat" and host == "bitsandbytes") for e in report.entries)
    torch.testing.assert_close(model(x), want)
    torch.testing.assert_close(torch.autograd.grad(model(x).sum(), x)[0], want_grad)


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


@pytest.mark.parametrize("host", HOSTS)
def test_adapter_life_cycle(host):
    """Whatever happens to the adapters, the patched model answers as an unpatched twin does."""
    model = lora(host)
    twin = copy.deepcopy(model)
    x = torch.randn(3, 128)
    fastfuse.patch(model)

    def same(**expected_fallbacks):
        assert_rounding_apart(model(x), twin(x), K=256, products=2)

    def both(act):
        for m in (model, twin):
            torch.manual_seed(1)
            act(m)

    same()
    for m in (model, twin):
        m.eval()
    both(lambda m: m.add_adapter("rs", LoraConfig(r=4, target_modules=["up"], use_rslora=True, init_lora_weights=False)))
    both(lambda m: m.set_adapter("rs"))
    same()
    if host == "bitsandbytes":  # PEFT's DoRA cannot read an NF4Tensor
        both(lambda m: m.add_adapter("dora", LoraConfig(r=4, target_modules=["up", "down"], use_dora=True, init_lora_weights=False)))
        both(lambda m: m.set_adapter("dora"))
        with pytest.warns(UserWarning, match="VARIANT: DoraLinearVariant"):
            same()
        assert fastfuse.status(model).fallbacks["VARIANT"] == 2
    both(lambda m: m.set_adapter("default"))
    both(lambda m: m.base_model.set_adapter(["default", "rs"]))
    with pytest.warns(UserWarning, match="ADAPTERS: 2 adapters are active"):
        same()
    both(lambda m: m.set_adapter("default"))
    with model.disable_adapter(), twin.disable_adapter(), warnings.catch_warnings():
        warnings.simplefilter("error")
        same()
    if host == "bitsandbytes":  # PEFT cannot merge into an NF4Tensor
        both(lambda m: m.merge_adapter())  # replaces the Params4bit object
        same()
        both(lambda m: m.unmerge_adapter())
        same()
    both(lambda m: m.delete_adapter("rs"))
    same()
    counted = fastfuse.status(model).fallbacks
    assert counted["ADAPTERS_DISABLED"] == 2 and ("MERGED" in counted) == (host == "bitsandbytes")
    assert len(fastfuse.status(model).patched) == 4


@pytest.mark.parametrize("training", [True, False])
def test_dropout_is_the_modules_own_in_training(training):
    model = lora("bitsandbytes", lora_dropout=0.5).train(training)
    x = torch.randn(4, 128)
    torch.manual_seed(3)
    want = model(x)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        report = fastfuse.patch(model)
        torch.manual_seed(3)
        assert_rounding_apart(model(x), want, K=256, products=2)
        model(x)
    assert sum("DROPOUT" in str(w.message) for w in caught) == (2 if training else 0)  # once a module, not once a call
    assert fastfuse.status(model).fallbacks == ({"DROPOUT": 4} if training else {})
    assert ("DROPOUT" in {e.code for e in report.entries}) == training and ("DROPOUT" in str(report)) == training


@pytest.mark.parametrize("child", ["base_layer", "lora_A", "lora_B"])
def test_hooks_on_swallowed_children_still_run(child):
    model, x, seen = lora("bitsandbytes"), torch.randn(2, 128), []
    layer = model.base_model.model.up
    target = layer.base_layer if child == "base_layer" else getattr(layer, child)["default"]
    target.register_forward_hook(lambda m, args, out: seen.append(1))
    fastfuse.patch(model)
    with pytest.warns(UserWarning, match="HOOKED"):
        model(x)
    assert seen == [1]


class Doubling(ModelHook):
    def __init__(self):
        self.calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs

    def post_forward(self, module, output):
        return output * 2


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


def test_unload_leaves_no_patched_forward():
    model, x = lora("bitsandbytes"), torch.randn(2, 128)
    fastfuse.patch(model)
    base = model.unload()
    assert fastfuse.status(base).counts == {"patched": 2}
    fastfuse.unpatch(base)
    assert not any("_fastfuse" in m.__dict__ for m in base.modules()) and base(x).shape == (2, 10)


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("host", HOSTS)
def test_compile_fullgraph(host, backend):
    model, x = lora(host), torch.randn(6, 128)
    want, want_grads = gradients(model, x)
    fastfuse.patch(model, backend=backend)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    got, got_grads = gradients(compiled, x)
    assert_rounding_apart(got, want, K=256, products=2)
    for g, w in zip(got_grads, want_grads, strict=True):
        assert_rounding_apart(g, w, K=256, products=4)
    fastfuse.unpatch(model)
    torch.testing.assert_close(compiled(x), want)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(host, x_dtype):
    model = lora(host, torch.bfloat16)
    layer, x = model.base_model.model.down, torch.randn(6, 256, dtype=x_dtype)
    with torch.autocast("cpu", torch.bfloat16):
        want = layer(x)
        with fastfuse.patched(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an fp32 input under autocast runs the module's own forward
            got = layer(x)
    assert got.dtype == want.dtype
    assert_rounding_apart(got, want, K=256)


def test_checkpointing_and_training_loop():
    model = lora("bitsandbytes")
    twin = copy.deepcopy(model)
    fastfuse.patch(model)
    losses, x = [], torch.randn(8, 128)
    for m in (model, twin):
        optimizer = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2)
        curve = []
        for _ in range(5):
            out = torch.utils.checkpoint.checkpoint(m, x, use_reentrant=False)
            loss = out.square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            curve.append(loss.item())
        losses.append(curve)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4) and losses[0][-1] < losses[0][0]


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
        ({"ops": ["nf4_linear", "nope"]}, ValueError, "ops has 'nope', known are nf4_linear, nf4_lora_linear"),
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
    with pytest.warns(UserWarning, match="found nothing to patch in Block: no module holds an NF4 weight; its 3 linear layers hold Parameter of torch.float32"):
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


@pytest.mark.parametrize("kind", ["CPU_PACKED_BNB", "QUANT_TYPE", "NOT_NF4", "FOREIGN_FORWARD", "FOREIGN_FORWARD (instance)"])
def test_what_is_not_covered_is_skipped_with_its_reason(kind):
    model, code = uncovered(kind), kind.split(" ")[0]
    own = dict(model.up.__dict__)
    report = fastfuse.patch(model)
    assert [(e.name, e.code) for e in report.skipped] == [("up", code)] and len(report.patched) == 1 and code in str(report)
    assert model.up.__dict__ == own
    fastfuse.unpatch(model)
    with pytest.warns(UserWarning, match=code):
        fastfuse.patch(model, on_unsupported="warn")
    fastfuse.unpatch(model)
    with pytest.raises(fastfuse.Unsupported, match=code):
        fastfuse.patch(model, on_unsupported="raise")
    assert fastfuse.status(model).patched == ()


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
    from fastfuse.patching.hosts import peft as host_peft

    wrong = host_peft.fused
    monkeypatch.setattr(host_peft, "HOST", dataclasses.replace(host_peft.HOST, fused=lambda *args: wrong(*args) * 1.02))
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


def test_weights_are_read_at_every_call():
    model, x = lora("bitsandbytes"), torch.randn(2, 128)
    fastfuse.patch(model)
    before = model(x)
    base = model.base_model.model.up.base_layer
    base.weight = quantize(torch.randn(256, 128), "flat")
    after = model(x)
    fastfuse.unpatch(model)
    torch.testing.assert_close(after, model(x))
    assert not torch.allclose(after, before)


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
    assert {e.code for e in fastfuse.status(model).entries if e.name == "up"} == {code}
    assert fastfuse.unpatch(model).counts == {"restored": 2}
    assert not any("_fastfuse" in m.__dict__ or "forward" in m.__dict__ for m in model.modules())


def test_other_tuners_are_not_lora():
    """AdaLoRA's layers have all the attributes of LoRA's, and another formula."""
    model = quantized("bitsandbytes")
    model.is_loaded_in_4bit = True
    config = peft.AdaLoraConfig(target_modules=["up", "down"], init_r=8, target_r=4, total_step=10, init_lora_weights=False)
    model, x = get_peft_model(model, config), torch.randn(2, 128)
    want = model(x)
    assert {e.op for e in fastfuse.patch(model).patched} == {"nf4_linear"}
    torch.testing.assert_close(model(x), want)


def louder(cls):
    return type(f"Louder{cls.__name__}", (cls,), {"forward": lambda self, x: 2 * cls.forward(self, x)})


@pytest.mark.parametrize("child", ["base subclass", "lora_A subclass", "lora_B rebound", "global hook"])
def test_a_child_that_does_more_than_its_class_is_called(child):
    model, x, handle, calls = lora("bitsandbytes"), torch.randn(2, 128), None, []
    layer = model.base_model.model.up
    if child == "base subclass":
        layer.base_layer.__class__ = louder(bnb.nn.Linear4bit)
    elif child == "lora_A subclass":
        layer.lora_A["default"].__class__ = louder(nn.Linear)
    elif child == "lora_B rebound":
        layer.lora_B["default"].forward = lambda x, m=layer.lora_B["default"]: 3 * type(m).forward(m, x)
    else:
        handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: calls.append(m))
    try:
        want, before = layer(x), len(calls)
        fastfuse.patch(model)
        with pytest.warns(UserWarning, match="FOREIGN_FORWARD|ADAPTER_TYPE|HOOKED"):
            got = layer(x)
        assert len(calls) == 2 * before
    finally:
        if handle is not None:
            handle.remove()
    assert torch.equal(got, want)


def test_input_as_a_keyword():
    model, x = quantized("torchao"), torch.randn(2, 128)
    want = model.up(input=x)
    fastfuse.patch(model)
    with pytest.warns(UserWarning, match="ARGUMENTS"):
        assert torch.equal(model.up(input=x), want)


@pytest.mark.parametrize("host", HOSTS)
def test_autocast_of_a_bare_layer_keeps_the_hosts_dtype(host):
    model, x = quantized(host), torch.randn(2, 128)
    with torch.autocast("cpu", torch.bfloat16):
        want = model.up(x)
        with fastfuse.patched(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = model.up(x)
    assert got.dtype == want.dtype and torch.equal(got, want)


def test_a_chip_without_kernels_is_skipped_at_once(monkeypatch):
    """A model on a GPU that no row covers keeps working: it is not patched, and the report says why."""
    from fastfuse.ops import _op

    monkeypatch.setattr(_op, "check_device", lambda op, device, backend: fastfuse.tune.covering_arch("nf4_linear", "sm_75"))
    monkeypatch.setitem(_host.readable.__globals__, "check_device", _op.check_device)
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


def test_dropout_training_keeps_no_more_than_unpatched():
    model, x = lora("bitsandbytes", lora_dropout=0.5), torch.randn(64, 128)

    def kept():
        sizes = {}
        with torch.autograd.graph.saved_tensors_hooks(lambda t: sizes.update({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()}) or t, lambda t: t):
            out = model(x)
        del out
        return sum(sizes.values())

    before = kept()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fastfuse.patch(model)
        packed = sum(t.numel() for m in model.modules() if isinstance(m, bnb.nn.Linear4bit) for t in (m.weight, m.weight.quant_state.absmax))
        assert kept() <= before + packed + 4096  # references to the weight itself, which is there anyway


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


@pytest.mark.parametrize("wrap", ["bare", "lora"])
def test_torchao_bias_in_another_dtype_keeps_the_hosts_result(wrap):
    model = quantized("torchao") if wrap == "bare" else lora("torchao")
    layer = model.up if wrap == "bare" else model.base_model.model.up
    x = torch.randn(3, 128).half()
    want = layer(x)
    fastfuse.patch(model)
    with pytest.warns(UserWarning, match="DTYPE"):
        got = layer(x)
    assert got.dtype == want.dtype and torch.equal(got, want)


def test_compute_dtype_without_kernels():
    model, x = quantized("bitsandbytes"), torch.randn(3, 128)
    model.up.compute_dtype = torch.float64
    want = model.up(x)
    fastfuse.patch(model)
    with pytest.warns(UserWarning, match="DTYPE"):
        got = model.up(x)
    # bitsandbytes' own CPU path leaves a float64 weight unwritten, which the poisoned memory here shows as NaN.
    torch.testing.assert_close(got, want, rtol=0, atol=0, equal_nan=True)
    assert fastfuse.status(model).fallbacks == {"DTYPE": 1}
