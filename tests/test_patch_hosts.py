"""patch(model) over real PEFT, bitsandbytes and torchao layers: the same answers through everything a host can do."""

import copy
import functools
import warnings

import bitsandbytes as bnb
import peft
import pytest
import torch
from conftest import GPU
from numerics import assert_no_worse, assert_rounding_apart, in_several_orders
from peft import LoraConfig, get_peft_model
from qlora import HOSTS, gradients, lora, quantized
from reference import assert_results_no_worse
from torch import nn
from weights import quantize, requantized

import fastfuse
from fastfuse.patching import hosts
from fastfuse.quant import NF4View


def compiled(module):
    torch.compiler.reset()  # else it gives up: one patched forward serves the modules of every test
    return torch.compile(module, fullgraph=True, backend="aot_eager")


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

    eager = in_several_orders(run)
    w = fastfuse.ops.nf4_dequantize_ref(fastfuse.quant.NF4View.of(layer.base_layer.weight), torch.float64)
    a, b = (t.detach().double().requires_grad_() for t in leaves)
    y = x.double() @ w.T + layer.base_layer.bias.double() + (x.double() @ a.T) @ b.T
    exact = [y, *torch.autograd.grad(y, [a, b], torch.ones_like(y))]
    with fastfuse.patched(model):
        for values in zip(run(), zip(*eager, strict=True), exact, strict=True):
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


def adapters_added(model) -> None:
    """Beside "default": another rank and scaling (rsLoRA) on one layer alone, and where PEFT can read the weight, DoRA."""
    model.add_adapter("rs", LoraConfig(r=4, target_modules=["up"], use_rslora=True, init_lora_weights=False))
    if model.is_loaded_in_4bit:  # PEFT's DoRA cannot read an NF4Tensor
        model.add_adapter("dora", LoraConfig(r=4, target_modules=["up", "down"], use_dora=True, init_lora_weights=False))


@pytest.mark.parametrize("host", HOSTS)
def test_adapter_life_cycle(host):
    """Whatever happens to the adapters, the patched model answers as an unpatched twin does, and only what is named runs PEFT's own forward."""
    model = lora(host)
    twin, x = copy.deepcopy(model), torch.randn(3, 128)
    fastfuse.patch(model)

    def step(act=lambda m: None, **fallbacks):
        before = fastfuse.status(model).fallbacks
        for m in (model, twin):
            torch.manual_seed(1)
            act(m)
        with warnings.catch_warnings():
            warnings.simplefilter("error" if set(fallbacks) <= {"ADAPTERS_DISABLED", "MERGED", "NO_ADAPTER"} else "ignore")  # asked for: no warning
            got = model.base_model(x)  # PEFT's outermost layer fails where no adapter is left
        assert_rounding_apart(got, twin.base_model(x), K=256, products=2)
        after = fastfuse.status(model).fallbacks
        assert {code: n - before.get(code, 0) for code, n in after.items() if n != before.get(code, 0)} == fallbacks

    step()
    step(lambda m: m.eval())
    step(adapters_added)
    step(lambda m: m.set_adapter("rs"), NO_ADAPTER=1)  # "down" has no such adapter
    step(lambda m: m.base_model.set_adapter(["default", "rs"]))
    step(lambda m: m.base_model.set_adapter(["rs", "default", "rs"]))  # PEFT adds it twice
    step(lambda m: m.base_model.model.up.scale_layer(0.25))
    step(lambda m: m.base_model.model.up.unscale_layer())
    if host == "bitsandbytes":
        step(lambda m: m.set_adapter("dora"))
        step(lambda m: m.train())
        step(lambda m: m.base_model.set_adapter(["default", "dora"]), VARIANT=2)
        step(lambda m: m.eval(), VARIANT=2)
    step(lambda m: m.set_adapter("default"))
    step(lambda m: m.disable_adapter_layers(), ADAPTERS_DISABLED=2)
    step(lambda m: m.enable_adapter_layers())
    with model.disable_adapter(), twin.disable_adapter():
        step(ADAPTERS_DISABLED=2)
    if host == "bitsandbytes":  # PEFT cannot merge into an NF4Tensor
        for names in ("default", ["default", "rs"], "dora"):
            step(lambda m, names=names: m.base_model.set_adapter(names))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # PEFT's, of rounding
                for m in (model, twin):
                    m.merge_adapter()  # replaces the Params4bit object
                step(MERGED=2)
                for m in (model, twin):
                    m.unmerge_adapter()
            step()
        step(lambda m: m.delete_adapter("dora"))
    step(lambda m: m.set_adapter("default"))
    step(lambda m: m.delete_adapter("rs"))
    step(lambda m: m.train())
    assert fastfuse.status(model).counts == {"patched": 4}
    for m in (model, twin):
        m.delete_adapter("default")  # the last one: nothing is left to add
    step(NO_ADAPTER=2)


def with_grad(t, dtype) -> torch.Tensor:
    return t.detach().to(dtype).requires_grad_()


def adapter_leaves(layer, names, dtype=None) -> dict[str, torch.Tensor]:
    """The parameters that the adapters train: PEFT's own, or copies of them in dtype."""
    found = {}
    for name in names:
        found[f"A {name}"], found[f"B {name}"] = layer.lora_A[name].weight, layer.lora_B[name].weight
        if layer.lora_B[name].bias is not None:
            found[f"bias {name}"] = layer.lora_B[name].bias
        if name in layer.lora_magnitude_vector:
            found[f"magnitude {name}"] = layer.lora_magnitude_vector[name].weight
    return found if dtype is None else {what: with_grad(t, dtype) for what, t in found.items()}


def formula(layer, x, leaves, names, keep=None) -> torch.Tensor:
    """A PEFT layer written out: the product in x's dtype, the adapters in theirs. keep: dropout's mask, scaled."""
    base = layer.base_layer
    w = fastfuse.ops.nf4_dequantize_ref(fastfuse.quant.NF4View.of(base.weight), x.dtype)
    y = x @ w.T
    for name in names:
        a, b, scaling = leaves[f"A {name}"], leaves[f"B {name}"], layer.scaling[name]
        x_low = x.to(a.dtype) if keep is None else x.to(a.dtype) * keep
        y = y + (scaling * (x_low @ a.T) @ b.T).to(x.dtype)
        if f"bias {name}" in leaves:
            y = y + scaling * leaves[f"bias {name}"]
        if f"magnitude {name}" in leaves:
            y = y * leaves[f"magnitude {name}"] / torch.linalg.vector_norm(w + scaling * b @ a, dim=1).detach()
    return y if base.bias is None else y + base.bias.detach().to(x.dtype)


def value_and_gradients(y, leaves, upstreams) -> tuple[torch.Tensor, dict[str, tuple]]:
    draws = [torch.autograd.grad(y, list(leaves.values()), u.to(y.dtype), retain_graph=True) for u in upstreams]
    return y.detach(), dict(zip(leaves, zip(*draws, strict=True), strict=True))


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


def with_adapters(host, dtype, case, adapter_dtype=None) -> tuple[nn.Module, nn.Module, list[str]]:
    """(model, its layer "up", the active adapters)."""
    config = dict(ADAPTERS[case])
    second, recast, shrink = config.pop("second", None), config.pop("recast", None), config.pop("shrink", 1.0)
    model = lora(host, dtype, **config)
    layer, names = model.base_model.model.up, ["default"]
    if second is not None:
        model.add_adapter("rs", LoraConfig(target_modules=["up"], init_lora_weights=False, **second))
        names.append("rs")
        model.base_model.set_adapter(names)
    for children in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
        for child in children.values() if adapter_dtype is not None else ():
            child.to(adapter_dtype)
        if recast in children:
            children[recast].to(torch.bfloat16 if adapter_dtype is None else torch.float32)
    with torch.no_grad():
        for name in names:  # trained: not the norm that DoRA begins with
            for child in (layer.lora_B[name], *([layer.lora_magnitude_vector[name]] if name in layer.lora_magnitude_vector else [])):
                child.weight.mul_(shrink * (torch.rand_like(child.weight) + 0.5))
    return model, layer, names


def assert_no_worse_than_peft(model, layer, names, x, call=None) -> None:
    """The result of a layer and the gradients of x and of every trained parameter, patched and by PEFT itself, against float64."""
    upstreams = [torch.randn(*x.shape[:-1], 256, dtype=torch.float64).to(x.dtype) for _ in range(8)]

    def run():
        leaves = {"x": with_grad(x, x.dtype)} | adapter_leaves(layer, names)
        return value_and_gradients((call or layer)(leaves["x"]), leaves, upstreams)

    wide = {"x": with_grad(x, torch.float64)} | adapter_leaves(layer, names, torch.float64)
    exact = value_and_gradients(formula(layer, wide["x"], wide, names), wide, upstreams)
    eager = in_several_orders(run)
    with fastfuse.patched(model):
        got = run()
        assert fastfuse.status(model).fallbacks == {}
    assert_results_no_worse(got, eager, exact)


@pytest.mark.parametrize("adapters_in", ["fp32", "the base's dtype"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", ADAPTERS)
@pytest.mark.parametrize("host", HOSTS)
def test_every_kind_of_adapter_is_no_worse_than_pefts(host, case, dtype, adapters_in):
    """The result and the gradients of x and of every trained parameter against float64."""
    if adapters_in != "fp32" and dtype == torch.float32:
        pytest.skip("the same case")
    if host == "torchao" and "DoRA" in case:
        pytest.skip("PEFT's DoRA cannot read an NF4Tensor")
    assert_no_worse_than_peft(*with_adapters(host, dtype, case, None if adapters_in == "fp32" else dtype), torch.randn(6, 128).to(dtype))


@pytest.mark.parametrize("on_a_gpu", [False, True], ids=["cpu", "as on a GPU"])
@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("adapters_in", ["fp32", "the base's dtype"])
@pytest.mark.parametrize("case", ["one", "bias on B", "two, other rank and scaling", "DoRA"])
@pytest.mark.parametrize("host", HOSTS)
def test_autocast_is_no_worse_than_pefts(host, case, adapters_in, x_dtype, on_a_gpu, monkeypatch):
    """Over bitsandbytes also an fp32 stream, as prepare_model_for_kbit_training leaves it: values and gradients, DoRA's magnitude among them."""
    if host == "torchao" and (case == "DoRA" or x_dtype == torch.float32):
        pytest.skip("PEFT's DoRA cannot read an NF4Tensor; an fp32 input under autocast runs the module's own forward")
    if on_a_gpu:  # PEFT asks for a GPU's autocast alone, and casts x to the adapter's dtype where there is none
        own = torch.is_autocast_enabled
        monkeypatch.setattr(torch, "is_autocast_enabled", lambda *device: own(*device or ("cpu",)))
    model, layer, names = with_adapters(host, torch.bfloat16, case, None if adapters_in == "fp32" else torch.bfloat16)

    def call(x):
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        widest = on_a_gpu and case == "DoRA" and adapters_in == "fp32"
        assert y.dtype == (torch.float32 if widest else x_dtype)
        return y

    assert_no_worse_than_peft(model, layer, names, torch.randn(6, 128).bfloat16().to(x_dtype), call)


@pytest.mark.parametrize("case", ["one", "bias on B", "two, other rank and scaling"])
def test_fp32_input_under_autocast_is_fused(case):
    """What prepare_model_for_kbit_training and bf16=True make of a model: an fp32 stream through layers that compute in bf16."""
    model, layer, names = with_adapters("bitsandbytes", torch.bfloat16, case, None)

    def call(x):
        with torch.autocast("cpu", torch.bfloat16):
            return layer(x)

    x = torch.randn(6, 128).bfloat16().float()
    want = call(x)
    fastfuse.patch(model)
    got = call(x)
    assert got.dtype == want.dtype == torch.float32 and fastfuse.status(model).fallbacks == {}
    with torch.no_grad():
        w = fastfuse.ops.nf4_dequantize_ref(fastfuse.quant.NF4View.of(layer.base_layer.weight), torch.bfloat16).double()
        exact = x.double() @ w.T + layer.base_layer.bias.double()
        for name in names:
            a, b = layer.lora_A[name], layer.lora_B[name]
            delta = x.double() @ a.weight.double().T @ b.weight.double().T + (0 if b.bias is None else b.bias.double())
            exact = exact + layer.scaling[name] * delta
    assert_no_worse(got.bfloat16(), want.bfloat16(), exact)


@pytest.mark.parametrize("shape", [(0, 128), (128,), (2, 0, 128), (2, 3, 5, 128)], ids=str)
@pytest.mark.parametrize("case", ["one", "two", "DoRA"])
def test_inputs_of_other_shapes(case, shape):
    model, layer, names = with_adapters("bitsandbytes", torch.float32, case)
    x = torch.randn(shape)
    if case == "DoRA" and x.dim() == 1:  # PEFT gives it a dimension
        want = layer(x)
        fastfuse.patch(model)
        with pytest.warns(UserWarning, match="SHAPE"):
            return assert_rounding_apart(layer(x), want, K=128, products=2)
    if x.numel():
        return assert_no_worse_than_peft(model, layer, names, x)
    fastfuse.patch(model)
    y = layer(x)
    y.sum().backward()
    assert y.shape == (*shape[:-1], 256) and not any(p.grad.any() for p in adapter_leaves(layer, names).values())
    assert fastfuse.status(model).fallbacks == {}


@pytest.mark.parametrize("case", ["bias on B", "two", "DoRA"])
def test_compile_fullgraph_of_every_kind(case):
    model, layer, _ = with_adapters("bitsandbytes", torch.float32, case)
    want, want_grads = gradients(layer, x := torch.randn(6, 128))
    fastfuse.patch(model)
    got, got_grads = gradients(compiled(layer), x)
    assert_rounding_apart(got, want, K=128, products=2)
    for g, w in zip(got_grads, want_grads, strict=True):
        assert_rounding_apart(g, w, K=256, products=4)


def drawn_mask(y, a, shape) -> torch.Tensor:
    """Which elements of x reached A, from the gradient of A for each row of y."""
    rows = [torch.autograd.grad(y[i].sum(), a, retain_graph=True)[0].abs().sum(0) > 0 for i in range(shape[0])]
    return torch.stack(rows)


@pytest.mark.parametrize("how", ["auto", "torch", "compiled", "checkpointed", *([] if GPU else ["triton"])])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("host", HOSTS)
def test_dropout_gradients_are_of_the_mask_that_was_drawn(host, dtype, how):
    if how in ("triton", "compiled") and (dtype == torch.bfloat16 or host == "torchao"):
        pytest.skip("the interpreter computes in fp32, the compiled graph calls the same op, and how W is stored is not dropout's business")
    p = 0.25
    model = lora(host, dtype, lora_dropout=p)
    layer, x = model.base_model.model.up, torch.randn(5, 128).to(dtype)
    upstreams = [torch.randn(5, 256, dtype=torch.float64).to(dtype) for _ in range(8)]
    fastfuse.patch(model, backend=how if how in ("torch", "triton") else "auto")
    call = compiled(layer) if how == "compiled" else layer
    if how == "checkpointed":
        call = functools.partial(torch.utils.checkpoint.checkpoint, layer, use_reentrant=False)
    leaves = {"x": with_grad(x, dtype)} | adapter_leaves(layer, ["default"])
    torch.manual_seed(5)
    y = call(leaves["x"])
    torch.manual_seed(5)
    mask = drawn_mask(layer(leaves["x"]) if how == "checkpointed" else y, leaves["A default"], x.shape)
    assert 0 < mask.sum() < mask.numel()
    got = value_and_gradients(y, leaves, upstreams)

    def by_formula(to):
        copies = {"x": with_grad(x, to)} | adapter_leaves(layer, ["default"], torch.promote_types(to, torch.float32))
        return value_and_gradients(formula(layer, copies["x"], copies, ["default"], mask / (1 - p)), copies, upstreams)

    assert_results_no_worse(got, in_several_orders(by_formula, dtype), by_formula(torch.float64))
    torch.manual_seed(5)
    again = call(x)
    assert torch.equal(again, got[0])  # one seed, one mask
    assert not torch.equal(call(x), again)  # the next call draws another
    assert fastfuse.status(model).fallbacks == {}


@pytest.mark.parametrize("p", [0.1, 0.5])
@pytest.mark.parametrize("patched", [False, True])
def test_dropout_has_pefts_mean_and_variance(p, patched):
    """Rows of one x draw a mask each: over many, each feature's mean and variance are those of independent Bernoulli masks to 5 standard errors."""
    model = lora("bitsandbytes", lora_dropout=p)
    layer, x, draws = model.base_model.model.down, torch.randn(256), 20000
    if patched:
        fastfuse.patch(model)
    with torch.no_grad():
        y = torch.cat([layer(x.expand(draws // 4, 256)) for _ in range(4)]).double()
        leaves = adapter_leaves(layer, ["default"], torch.float64)
        mean = formula(layer, x.double()[None], leaves, ["default"])[0]
        terms = layer.scaling["default"] * x.double() * (leaves["B default"] @ leaves["A default"])  # of the sum over K
    variance = p / (1 - p) * terms.square().sum(1)
    assert ((y.mean(0) - mean).abs() / (variance / draws).sqrt()).max() < 5
    # The fourth moment of a sum of independent terms: three times the squared variance, and the excess of each.
    excess = ((1 - p) * p * (1 - 6 * p * (1 - p)) / (1 - p) ** 4) * terms.pow(4).sum(1)
    spread = ((2 * variance.square() + excess) / draws).sqrt()
    assert (((y - mean).square().mean(0) - variance).abs() / spread).max() < 5
    assert fastfuse.status(model).fallbacks == {}


@pytest.mark.parametrize("host", HOSTS)
def test_dropout_in_eval_is_none(host):
    model, x = lora(host, lora_dropout=0.5).eval(), torch.randn(4, 128)
    want, want_grads = gradients(model, x)
    fastfuse.patch(model)
    state = torch.get_rng_state()
    got, got_grads = gradients(model, x)
    assert torch.equal(torch.get_rng_state(), state)
    assert_rounding_apart(got, want, K=256, products=2)
    for g, w in zip(got_grads, want_grads, strict=True):
        assert_rounding_apart(g, w, K=256, products=4)
    assert fastfuse.status(model).fallbacks == {}


def test_dropout_of_everything():
    model, x = lora("bitsandbytes", lora_dropout=1.0), torch.randn(4, 128)
    want = model(x)
    fastfuse.patch(model)
    assert_rounding_apart(model(x), want, K=256, products=2)
    assert fastfuse.status(model).fallbacks == {}


@pytest.mark.parametrize("case", ["two adapters", "DoRA", "a dropout of another kind"])
def test_what_dropout_cannot_be_fused_with_runs_pefts_forward(case):
    """In training, with PEFT's own masks; in eval it is fused."""
    model, x = lora("bitsandbytes", lora_dropout=0.5, use_dora=case == "DoRA"), torch.randn(4, 128)
    code = "DROPOUT"
    if case == "two adapters":
        model.add_adapter("rs", LoraConfig(r=4, target_modules=["up", "down"], init_lora_weights=False))
        model.base_model.set_adapter(["default", "rs"])
    elif case == "DoRA":
        code = "DORA_DROPOUT"
    else:
        for layer in (model.base_model.model.up, model.base_model.model.down):
            layer.lora_dropout["default"] = nn.AlphaDropout(0.5)
    results = []
    for training in (True, False):
        model.train(training)
        torch.manual_seed(3)
        results.append(model(x))
    report = fastfuse.patch(model.train())
    assert code in {e.code for e in report.entries} and code in str(report)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for training, want in zip((True, False), results, strict=True):
            model.train(training)
            torch.manual_seed(3)
            assert_rounding_apart(model(x), want, K=256, products=2)
    assert sum(code in str(w.message) for w in caught) == 2  # once a module
    assert fastfuse.status(model).fallbacks == {code: 4 if case == "a dropout of another kind" else 2}


@torch.no_grad()
def test_a_mixed_batch_runs_pefts_forward():
    model, x = lora("bitsandbytes"), torch.randn(4, 128)
    model.add_adapter("rs", LoraConfig(r=4, target_modules=["up", "down"], use_rslora=True, init_lora_weights=False))
    model.eval()
    names = ["default", "rs", "__base__", "rs"]
    want = model(x, adapter_names=names)
    fastfuse.patch(model)
    with pytest.warns(UserWarning, match="ARGUMENTS: called with adapter_names"):
        got = model(x, adapter_names=names)
    assert_rounding_apart(got, want, K=256, products=2)
    assert fastfuse.status(model).fallbacks == {"ARGUMENTS": 2}


def test_a_bias_on_a_too_runs_pefts_forward():
    model, x = lora("bitsandbytes"), torch.randn(2, 128)
    layer = model.base_model.model.up
    layer.lora_A["default"].bias = nn.Parameter(torch.randn(8))
    want = model(x)
    fastfuse.patch(model)
    with pytest.warns(UserWarning, match="LORA_BIAS"):
        assert_rounding_apart(model(x), want, K=256, products=2)


@pytest.mark.parametrize("part", ["lora_variant", "lora_dropout", "disable_adapters"])
def test_a_part_that_peft_has_renamed_is_reported(part, monkeypatch):
    """A later PEFT: not patched, not silent, and its base layer is still served."""
    model, x = lora("bitsandbytes"), torch.randn(2, 128)
    want = model(x)
    own, inside = type(model.base_model.model.up), []

    class Later(own):
        def __getattribute__(self, name):
            if name == part and not inside:
                raise AttributeError(name)
            return super().__getattribute__(name)

        __getattr__ = None

        def forward(self, x):
            inside.append(1)
            out = super().forward(x)
            inside.clear()
            return out

    def getattr_(self, name):
        if name == part and not inside:
            raise AttributeError(name)
        return own.__getattr__(self, name)

    Later.__getattr__, Later.__name__, Later.__module__, Later.forward.__module__ = getattr_, own.__name__, own.__module__, own.__module__
    for layer in (model.base_model.model.up, model.base_model.model.down):
        layer.__class__ = Later
    report = fastfuse.patch(model)
    assert {(e.code, e.status) for e in report.entries if e.host == "PEFT LoRA"} == {("STRUCTURE", "skipped")} and f"has no {part}" in str(report)
    assert len(report.patched) == 2
    assert_rounding_apart(model(x), want, K=256, products=2)


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
    call = compiled(model)
    got, got_grads = gradients(call, x)
    assert_rounding_apart(got, want, K=256, products=2)
    for g, w in zip(got_grads, want_grads, strict=True):
        assert_rounding_apart(g, w, K=256, products=4)
    fastfuse.unpatch(model)
    torch.testing.assert_close(call(x), want)


@pytest.mark.parametrize("host", HOSTS)
@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_autocast(host, x_dtype):
    model = lora(host, torch.bfloat16)
    layer, x = model.base_model.model.down, torch.randn(6, 256, dtype=x_dtype)
    with torch.autocast("cpu", torch.bfloat16):
        want = layer(x)
        with fastfuse.patched(model), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # over torchao an fp32 input under autocast runs the module's own forward
            got = layer(x)
    assert got.dtype == want.dtype
    assert_rounding_apart(got.bfloat16(), want.bfloat16(), K=256)  # what the layer computes in


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
    assert_rounding_apart(model(x), want, K=256, products=6)  # three products a layer, two layers


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
        with pytest.warns(UserWarning, match="FOREIGN_FORWARD|CHILD_TYPE|HOOKED"):
            got = layer(x)
        assert len(calls) == 2 * before
    finally:
        if handle is not None:
            handle.remove()
    assert_rounding_apart(got, want, K=128, products=2)


@pytest.mark.parametrize("host", HOSTS)
def test_the_result_may_be_changed_in_place(host):
    model, x = quantized(host), torch.randn(4, 128, requires_grad=True)
    want = model.up(x).relu_()
    fastfuse.patch(model)
    assert_rounding_apart(model.up(x).relu_(), want, K=128)


@pytest.mark.parametrize("host, name", [("torchao", "input"), ("bitsandbytes", "x")])
@pytest.mark.parametrize("wrap", ["bare", "lora"])
def test_the_input_as_a_keyword(host, name, wrap):
    model, x = quantized(host) if wrap == "bare" else lora(host), torch.randn(2, 128)
    layer = model.up if wrap == "bare" else model.base_model.model.up
    given = {name if wrap == "bare" else "x": x}
    want = layer(**given)
    fastfuse.patch(model)
    assert_rounding_apart(layer(**given), want, K=128, products=2)
    assert fastfuse.status(model).fallbacks == {}


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


@pytest.mark.parametrize("host", HOSTS)
def test_scaling_as_a_tensor(host):
    """PEFT's preparation for hot swapping compiled adapters."""
    model, x = lora(host), torch.randn(3, 128)
    layer = model.base_model.model.up
    layer.scaling["default"] = torch.tensor(0.7)
    want, want_grads = gradients(model, x)
    fastfuse.patch(model)
    got, got_grads = gradients(model, x)
    assert fastfuse.status(model).fallbacks == {}
    assert_rounding_apart(got, want, K=256, products=2)
    for g, w in zip(got_grads, want_grads, strict=True):
        assert_rounding_apart(g, w, K=256, products=4)


def test_dropout_in_place_is_peft_s():
    model, x = lora("bitsandbytes", lora_dropout=0.5), torch.randn(3, 128)
    for layer in (model.base_model.model.up, model.base_model.model.down):
        layer.lora_dropout["default"].inplace = True
    fastfuse.patch(model)
    with pytest.warns(UserWarning, match="DROPOUT"), torch.no_grad():
        model.base_model.model.up(x)


def with_own_state(model: nn.Module) -> nn.Module:
    """Each Linear4bit keeps its weight's quant_state, as bitsandbytes has it after quantizing or loading a model."""
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            module.quant_state = module.weight.quant_state
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("wrap", ["bare", "PEFT's dense layer", "PEFT's 4-bit layer"])
def test_a_linear4bit_around_a_plain_weight(wrap, dtype):
    """What a list of modules to skip leaves of a checkpoint: bitsandbytes' own class, and no codes in it."""
    model = quantized("bitsandbytes", dtype)
    plain = nn.Parameter(torch.randn(256, 128, dtype=dtype), requires_grad=False)
    if wrap != "PEFT's 4-bit layer":  # PEFT chooses that one by what it finds
        model.up.weight = plain
    if wrap != "bare":
        model.is_loaded_in_4bit = wrap == "PEFT's 4-bit layer"
        model = get_peft_model(model, LoraConfig(r=8, target_modules=["up"], init_lora_weights=False)).base_model.model
        model.up.base_layer.weight = plain
    report = fastfuse.patch(model)
    found = {e.name: (e.status, e.code, e.reason) for e in report.entries}
    words = f"its weight is a plain {str(dtype).removeprefix('torch.')} Parameter"
    assert found.pop("down") == ("patched", "", "")
    assert found and set(found.values()) == {("skipped", "NOT_NF4", words)}
    assert set(found) == ({"up"} if wrap == "bare" else {"up", "up.base_layer"})


@pytest.mark.parametrize("wrap", ["bare", "lora"])
def test_a_weight_made_plain_after_the_patch(wrap):
    """Dequantized by hand: the layer's quant_state is still there, and belongs to no codes."""
    model = with_own_state(quantized("bitsandbytes") if wrap == "bare" else lora("bitsandbytes"))
    layer, x = model.up if wrap == "bare" else model.base_model.model.up, torch.randn(3, 128)
    base = layer if wrap == "bare" else layer.base_layer
    fastfuse.patch(model)
    base.weight = nn.Parameter(torch.randn(256, 128), requires_grad=False)
    entry = next(e for e in fastfuse.status(model).entries if e.name.endswith("up"))
    assert (entry.code, entry.reason) == ("NOT_NF4", "runs its own forward for now: its weight is a plain float32 Parameter")
    with pytest.warns(UserWarning, match="NOT_NF4: its weight is a plain float32 Parameter"), pytest.raises(AssertionError):  # bitsandbytes' own
        layer(x)


@pytest.mark.parametrize("wrap", ["bare", "lora"])
def test_codes_that_have_lost_their_quant_state(wrap):
    """functional_call with plain codes: the layer's own quant_state serves, as in bitsandbytes' own forward. Other codes, other results."""
    model, x = with_own_state(quantized("bitsandbytes") if wrap == "bare" else lora("bitsandbytes")), torch.randn(3, 128, requires_grad=True)
    name = "up.weight" if wrap == "bare" else "base_model.model.up.base_layer.weight"
    codes = torch.randint(256, model.get_parameter(name).shape, dtype=torch.uint8)
    twin = copy.deepcopy(model)
    twin.get_parameter(name).data.copy_(codes)
    want = twin(x)
    want_grad = torch.autograd.grad(want.sum(), x)[0]
    fastfuse.patch(model, on_unsupported="raise")
    got = torch.func.functional_call(model, {name: codes}, (x,))
    assert fastfuse.status(model).fallbacks == {}
    assert_rounding_apart(got, want, K=256, products=2)
    assert_rounding_apart(torch.autograd.grad(got.sum(), x)[0], want_grad, K=256, products=4)
    assert not torch.allclose(got, model(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("wrap", ["bare", "lora"])
def test_scales_quantized_from_16_bits_as_the_layers_own_product_takes_them(wrap, dtype):
    """In fp32, unrounded: only dequantize_4bit rounds them. fp32 activations over weights that were 16-bit show the difference.

    dx is the forward's gradient. bitsandbytes' own is not: its backward decodes by dequantize_4bit.
    """
    model = quantized("bitsandbytes") if wrap == "bare" else lora("bitsandbytes")
    layer, x = model.up if wrap == "bare" else model.base_model.model.up, torch.randn(6, 128)
    base = layer if wrap == "bare" else layer.base_layer
    base.weight = requantized(dtype, dtype, 256, 128)
    state = base.weight.quant_state
    each = state.state2.absmax.double().repeat_interleave(256)[: state.absmax.numel()]
    scales = state.state2.code.double()[state.absmax.long()] * each + state.offset.double()
    codes = torch.stack([base.weight.data.view(-1) >> 4, base.weight.data.view(-1) & 15], 1).view(-1, 64).long()
    w = (state.code.double()[codes] * scales[:, None]).view(256, 128)
    exact = x.double() @ w.T + base.bias.double()
    if wrap == "lora":
        a, b = layer.lora_A["default"].weight.double(), layer.lora_B["default"].weight.double()
        exact = exact + layer.scaling["default"] * x.double() @ a.T @ b.T
    report = fastfuse.patch(model)
    assert {e.layout for e in report.patched} == {"bitsandbytes nested, blocks of 64"} and not report.skipped
    with torch.no_grad():
        assert_rounding_apart(layer(x), exact.float(), K=128, products=2)
    x, dy = x.requires_grad_(), torch.randn(6, 256)
    (dx,) = torch.autograd.grad(layer(x), x, dy)
    want = dy.double() @ w
    if wrap == "lora":
        want = want + layer.scaling["default"] * dy.double() @ b @ a
    assert_rounding_apart(dx, want.float(), K=256, products=2)
    assert fastfuse.status(model).fallbacks == {}


def test_flat_scales_that_were_packed_and_unpacked_are_not_patched():
    model = quantized("bitsandbytes", storage="flat")
    state = model.up.weight.quant_state
    state.absmax = state.absmax.view(256, 2).T.bfloat16().contiguous()
    report = fastfuse.patch(model)
    assert [(e.name, e.status, e.code) for e in report.entries] == [("up", "skipped", "CPU_UNPACKED_BNB"), ("down", "patched", "")]
    assert "its absmax is torch.bfloat16 (2, 256)" in report.entries[0].reason


@pytest.mark.parametrize("wrap", ["bare", "lora"])
@pytest.mark.parametrize("host", HOSTS)
def test_a_call_like_the_one_before_checks_nothing_again(host, wrap, monkeypatch):
    layer = quantized(host).up if wrap == "bare" else lora(host).base_model.model.up
    fastfuse.patch(layer)
    counts, x = {"checks": 0, "matches": 0}, torch.randn(3, 128, requires_grad=True)
    want = layer(x)

    def counted(name, function):
        def wrapper(*args):
            counts[name] += 1
            return function(*args)

        return wrapper

    monkeypatch.setattr(NF4View, "__post_init__", counted("checks", NF4View.__post_init__))
    kind = hosts.bitsandbytes if host == "bitsandbytes" else hosts.torchao
    monkeypatch.setattr(kind, "matches", counted("matches", kind.matches))
    got = layer(x)
    got.sum().backward()
    assert torch.equal(got, want) and x.grad is not None and counts == {"checks": 0, "matches": 0}
    assert fastfuse.status(layer).fallbacks == {}
