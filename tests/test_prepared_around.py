"""Prepared calls of linear layers: who looks on, what they are given, copies, wrappers, and what they keep in memory."""

import contextlib
import copy
import gc
import pickle
import threading
import weakref

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from numerics import assert_rounding_apart
from prepared_layers import LAYERS, P, X, adapted, bare, children, forget, other_base, patched, plan_of, prepared, results, same, served
from qlora import HOSTS, quantized
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint, set_checkpoint_early_stop

import fastfuse
from fastfuse import tune
from fastfuse.modules._prepared import PreparedLinear
from fastfuse.ops.lora_row_norms import row_norms

pytestmark = pytest.mark.filterwarnings("ignore:fastfuse. .* runs its own forward", "ignore:Unmerge lora module", "ignore:Merge lora module")


class Modes(TorchDispatchMode):
    def __torch_dispatch__(self, function, kinds, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class Functions(TorchFunctionMode):
    __torch_function__ = Modes.__torch_dispatch__


AROUND = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "dispatch mode": Modes,
    "function mode": Functions,
    "fake tensors": lambda: FakeTensorMode(allow_non_fake_inputs=True),
    "backend": lambda: fastfuse.backend("torch"),
    "pin": lambda: tune.pin("nf4_linear", None),
    "profiler": torch.autograd.profiler.profile,
    "forward mode": forward_ad.dual_level,
}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["PEFT over bitsandbytes", "bare torchao", "DoRALinear"])
@pytest.mark.parametrize("around", AROUND)
def test_whoever_looks_on_sees_the_call(around, kind, taken):
    layer = prepared(LAYERS[kind]())
    want, plan = layer(X), plan_of(layer)
    del taken[:]
    refused = around == "forward mode" and kind == "DoRALinear"
    with AROUND[around](), pytest.raises(fastfuse.Unsupported, match="forward-mode") if refused else contextlib.nullcontext():
        got = layer(X)
        assert type(got) is torch.Tensor or around == "fake tensors"
        assert got.shape == want.shape and (around != "dispatch mode" or torch.equal(got, want))
    assert taken == [False] and plan_of(layer) is plan
    assert torch.equal(layer(X), want) and taken == [False, True]


def outcome(f, *args):
    """What a function gives, or the error that it raises."""
    try:
        return f(*args)
    except (RuntimeError, ValueError, NotImplementedError, IndexError, AttributeError, TypeError) as error:
        return type(error), str(error)[:60]


def same_outcome(got, want) -> bool:
    if isinstance(got, tuple) or isinstance(want, tuple):
        return got == want
    return type(got) is type(want) and (got.dtype, got.shape) == (want.dtype, want.shape) and (got.is_meta or torch.equal(got, want))


TRANSFORMS = {
    "vmap": lambda layer, x: torch.func.vmap(layer)(x[None]),
    "grad": lambda layer, x: torch.func.grad(lambda x: layer(x).square().sum())(x),
    "jvp": lambda layer, x: torch.func.jvp(layer, (x,), (x,))[0],
    "functional_call": lambda layer, x: torch.func.functional_call(layer, {n: 2 * p for n, p in layer.named_parameters() if "lora_" in n}, (x,)),
    "trace": lambda layer, x: torch.jit.trace(layer, x, check_trace=False)(x),
    "make_fx": lambda layer, x: make_fx(layer)(x)(x),
}
INPUTS = {
    "another dtype": torch.Tensor.half,
    "strided": lambda x: torch.stack([x, x], -1).flatten(1)[:, ::2],
    "expanded": lambda x: x[:1].expand(3, 128),
    "misaligned": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(3, 128),
    "negative view": lambda x: torch._neg_view(-x),
    "a Parameter": P,
    "a subclass": lambda x: x.as_subclass(type("Mine", (torch.Tensor,), {})),
    "empty": lambda x: x[:0],
    "a vector": lambda x: x[0],
    "a number": lambda x: x[0, 0],
    "narrower": lambda x: x[:, :64],
    "sparse": torch.Tensor.to_sparse,
    "nested": lambda x: torch.nested.nested_tensor([x, x[:1]]),
    "on meta": lambda x: x.to("meta"),
    "of inference mode": torch.inference_mode()(torch.clone),
    "none": lambda x: None,
}
KINDS = ["PEFT over bitsandbytes", "bare torchao", "LoRALinear"]


def is_served(name: str, kind: str) -> bool:
    if name == "functional_call":
        return kind == "bare torchao"  # of which nothing was replaced
    return name in ("empty", "of inference mode") or (name == "a vector" and "DoRA" not in kind)


@torch.no_grad()
@pytest.mark.parametrize("name, kind", [*((n, k) for n in TRANSFORMS for k in KINDS), *((n, k) for n in INPUTS for k in (*KINDS, "DoRA"))])
def test_transforms_and_inputs_of_another_kind(name, kind, taken):
    layer = prepared(LAYERS[kind]())
    call, x = TRANSFORMS.get(name, lambda layer, x: layer(x)), INPUTS.get(name, torch.clone)(X)
    before = layer(X)
    del taken[:]
    got = outcome(call, layer, x)
    assert taken[: 1 if name in TRANSFORMS else None] == [is_served(name, kind)]
    forget(layer)
    assert same_outcome(got, outcome(call, layer, x))
    assert torch.equal(layer(X), before)
    layer(X)
    assert served(layer)


def test_by_name_and_with_more(taken):
    layer = prepared(adapted("bitsandbytes"))
    want = layer(X)
    assert torch.equal(layer(x=X), want) and taken == [True, True]
    with pytest.raises(TypeError, match="unknown"):
        layer(X, unknown=1)


@pytest.mark.parametrize("kind", LAYERS)
def test_copies_carry_no_plan(kind):
    layer = prepared(LAYERS[kind]())
    shallow = [] if "_fastfuse" in layer.__dict__ else [copy.copy(layer), pickle.loads(pickle.dumps(layer))]
    for twin in (copy.deepcopy(layer), *shallow):
        assert plan_of(twin) is None and torch.equal(twin(X), layer(X))
        twin(X)
        assert served(twin) and plan_of(twin) is not plan_of(layer)
    if hasattr(layer, "disabled"):
        want, twin = layer(X), shallow[0]
        twin.disabled = True
        assert not torch.equal(twin(X), want) and torch.equal(layer(X), want)


@torch.no_grad()
@pytest.mark.parametrize("kind, compiled_first", [("PEFT over bitsandbytes", False), ("LoRALinear", True)])
def test_compile_does_not_see_it(kind, compiled_first, taken):
    torch.compiler.reset()
    layer = LAYERS[kind]()
    if not compiled_first:
        prepared(layer)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    got = compiled(X)
    assert (plan_of(layer) is None) == compiled_first and taken == []
    want = prepared(layer)(X)
    torch.testing.assert_close(got, want)
    del taken[:]
    assert torch.equal(compiled(X), got) and taken == []
    assert torch.equal(layer(X), want) and taken == [True]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("kind", ["PEFT over bitsandbytes", "bare torchao", "DoRA", "LoRALinear", "DoRALinear"])
def test_checkpointing_recomputes_by_the_plan(kind, reentrant, taken):
    """The first forward goes the whole way, its recomputation does not: both must save the same."""
    layer = LAYERS[kind]()
    want = results(layer)
    forget(layer)
    for asked in ([True], [True, True]):
        del taken[:]
        t = X.clone().requires_grad_()
        with set_checkpoint_early_stop(False):  # else the recomputed call does not come back
            y = checkpoint(layer, t, use_reentrant=reentrant)
        y.backward(torch.linspace(-1, 1, y.numel()).view_as(y))
        grads = [p.grad for p in layer.parameters() if p.requires_grad and type(p).__name__ != "NF4Tensor"]
        assert same([y.detach(), t.grad, *grads], want) and taken == asked
        layer.zero_grad()


@torch.no_grad()
def test_threads_and_inference_mode():
    layer, got = prepared(adapted("torchao")), []
    want = layer(X)
    threads = [threading.Thread(target=lambda: got.extend(layer(X) for _ in range(20))) for _ in range(2)]
    for act in (threading.Thread.start, threading.Thread.join):
        for thread in threads:
            act(thread)
    with torch.inference_mode():
        assert served(layer)
        got.append(layer(X))
    assert len(got) == 41 and all(torch.equal(y, want) for y in got)


def test_accelerate_s_hooks_that_only_align():
    layer = prepared(adapted("bitsandbytes"))
    want = layer(X)
    for child in children(layer).values():
        add_hook_to_module(child, AlignDevicesHook(execution_device="cpu"))
    assert not served(layer) and torch.equal(layer(X), want)
    layer(X)
    assert served(layer) and fastfuse.status(layer).fallbacks == {}
    layer.base_layer._hf_hook.io_same_device = True  # now the base alone is fused, and the update is PEFT's: summed in another order
    assert not served(layer)
    assert_rounding_apart(layer(X), want, 128, products=3)


@torch.no_grad()
@pytest.mark.parametrize("host", HOSTS)
def test_an_old_base_weight_is_let_go(host):
    """One that was replaced, and the scales of one that an adapter was merged into."""
    layer, gone = prepared(adapted(host)), []

    def watch(*tensors):
        for t in tensors:
            weakref.finalize(t.untyped_storage(), gone.append, 1)

    base = layer.base_layer
    watch(base.weight.quantized_data if host == "torchao" else base.weight.data)
    base.weight = other_base(host) if host == "bitsandbytes" else P(other_base(host), requires_grad=False)
    gc.collect()
    assert gone == [1] and plan_of(layer) is not None
    if host == "bitsandbytes":  # PEFT cannot merge into an NF4Tensor
        prepared(layer)
        watch(base.weight.data, base.weight.quant_state.absmax)
        layer.merge()
        layer(X)
        gc.collect()
        assert gone == [1, 1, 1] and plan_of(layer) is None


def test_unpatch_and_patch_again():
    model = quantized("bitsandbytes")
    layer = prepared(patched(model))
    want, plan = layer(X), weakref.ref(plan_of(layer))
    fastfuse.unpatch(model)
    gc.collect()
    assert plan() is None and "_fastfuse" not in layer.__dict__
    fastfuse.patch(model)
    layer(X)
    assert torch.equal(layer(X), want) and served(layer)


@pytest.mark.parametrize("kind", ["DoRA", "DoRALinear"])
def test_dora_s_norms_are_computed_once_a_call(kind, monkeypatch):
    layer, calls, cpu = prepared(LAYERS[kind]()), [], row_norms.cpu
    monkeypatch.setattr(row_norms, "cpu", lambda args: (calls.append(args), cpu(args))[1])
    for grad in (False, False, True, True):
        results(layer, grad)
    assert len(calls) == 4


def test_what_never_serves_is_seldom_prepared(monkeypatch):
    made, init = [], PreparedLinear.__init__
    monkeypatch.setattr(PreparedLinear, "__init__", lambda self, *args, **kwargs: (made.append(call), init(self, *args, **kwargs))[1])
    layer = bare("torchao")
    for call in range(1, 101):  # noqa: B007  the function above reads it
        layer(input=X)
    assert made == [1, 2, 4, 8, 16, 32, 64, 96]


def test_after_long_training_with_dropout():
    layer = adapted("bitsandbytes", lora_dropout=0.1)
    for _ in range(100):
        layer(X)
    assert plan_of(layer) is None
    layer.eval()
    for _ in range(32):
        layer(X)
    assert served(layer)


@pytest.mark.parametrize("kind", ["bare torchao", "FrozenNF4Linear", "DoRALinear"])
def test_on_the_meta_device(kind):
    layer = LAYERS[kind]().to("meta")
    assert [layer(torch.empty(3, 128, device="meta")).shape for _ in range(3)] == [(3, 256)] * 3 and plan_of(layer) is None
