"""patch(model) over real PEFT, bitsandbytes and torchao layers: the same answers through everything a host can do."""

import copy
import warnings

import bitsandbytes as bnb
import peft
import pytest
import torch
from conftest import GPU
from numerics import assert_no_worse, assert_rounding_apart
from peft import LoraConfig, get_peft_model
from qlora import HOSTS, gradients, lora, quantized
from torch import nn
from weights import quantize

import fastfuse


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
    assert_rounding_apart(got, want, K=128, products=2)


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
