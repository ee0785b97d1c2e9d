"""What patch promises of every host there is: hosts.py has a row for each, and each test here runs all of them."""

import contextlib
import copy
import dataclasses
import functools
import inspect
import io
import pickle
import sys
import warnings
from itertools import cycle

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from conftest import GPU
from hosts import BNB, HOSTS, assert_equal, assert_fused, assert_true, built, everything, found, outermost, patched_modules, results, truth, with_forward
from numerics import assert_rounding_apart
from torch import nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._pytree import tree_leaves, tree_map

import fastfuse
from cases.linear import BF16, F16, F32
from fastfuse import patch, status, unpatch
from fastfuse.patching import engine, hosts

KINDS = [name for name in HOSTS if name != "Mllama QLoRA"]  # whose layers are PEFT's and Mllama's
every_host, every_kind = (pytest.mark.parametrize("name", names) for names in (HOSTS, KINDS))
RUNS = [
    *(pytest.param(name, F32, "auto", marks=pytest.mark.quick) for name in HOSTS),
    *((name, *run) for name in HOSTS for run in ((BF16, "auto"), (F16, "torch"))),
    *((name, F32, "triton") for name in ([] if GPU else KINDS)),  # the interpreter is for machines without a GPU
]


@pytest.fixture(autouse=True)
def compiled_anew():
    """One patched forward serves the modules of every test, and their number of recompilations."""
    torch.compiler.reset()


def library_of(model: nn.Module) -> dict:
    """What its classes hold, and the Python modules that they are from."""
    classes = {type(m) for m in model.modules()}
    files = [sys.modules[cls.__module__] for cls in classes if cls.__module__ in sys.modules]
    return {held: {k: v for k, v in vars(held).items() if not k.startswith("__")} for held in (*classes, *files, nn.functional)}


@pytest.mark.parametrize("name, dtype, backend", RUNS, ids=str)
def test_answers_and_gradients(name, dtype, backend):
    """Patched, in calls that find a prepared one too; given back, to the bit; patched a second time, by nothing new."""
    (model, given), true = built(name, dtype), truth(name, dtype)
    before, library = everything(model), library_of(model)
    signatures = [inspect.signature(m.forward) for m in model.modules()]
    report = patch(model, backend=backend)
    assert found(report) == HOSTS[name].patched and {(e.status, e.code) for e in report.entries} == {("patched", "")}
    assert [inspect.signature(m.forward) for m in model.modules()] == signatures
    touched = [set(now) ^ set(was) for now, was in zip(everything(model), before, strict=True)]
    assert set().union(*touched) == {"forward", "_fastfuse"} and sum(map(bool, touched)) == len(report.patched) == len(patched_modules(model))
    for _ in range(1 if backend == "triton" else 2):
        assert_fused(model, given, true)
    again = patch(model)
    assert again and again.counts == {"already": len(report.patched)}
    assert unpatch(model).counts == {"restored": len(report.patched)} and not unpatch(model)
    assert everything(model) == before and library_of(model) == library
    assert_equal(results(model, given), true.plain)


@every_host
def test_weights_are_read_at_every_call(name):
    """Another model's take the place of those that the calls before have seen."""
    (model, given), (other, _) = built(name), built(name, seed=1)
    patch(model)
    for _ in range(2):
        results(model, given)
    for module, source in zip(model.modules(), other.modules(), strict=True):
        for key, parameter in source._parameters.items():
            setattr(module, key, parameter)
    patch(other)
    assert_equal(results(model, given), results(other, given))
    assert status(model).fallbacks == {}


@torch._functorch.config.patch(donated_buffer=False)  # several backwards through one graph
@every_kind
def test_compiled_in_one_graph(name):
    model, given = built(name)
    patch(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_fused(model, given, truth(name, F32), compiled)
    unpatch(model)
    if name in ("torchao", "PEFT over bitsandbytes", "PEFT over torchao", "CLIP"):
        assert_true(results(model, given, compiled), truth(name, F32))


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@every_host
def test_autocast(name, dtype):
    """In the host's own dtypes, and no worse than it."""
    (model, given), true = built(name, dtype), truth(name, dtype, autocast=True)
    patch(model)
    with torch.autocast("cpu", BF16), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = results(model, given)
    assert_true(got, true)
    assert set(status(model).fallbacks) == (set(HOSTS[name].autocast) if dtype == F32 else set())


@torch.no_grad()
@pytest.mark.parametrize("name", [name for name in HOSTS if (BNB, "nf4_linear") not in HOSTS[name].patched])  # bitsandbytes' weights cannot go there
def test_on_the_meta_device(name):
    model, given = built(name)
    # transformers reads the values of an attention mask, and of positions where there are several samples or is no cache.
    given = {n: t[:1] if isinstance(t, torch.Tensor) else t for n, t in given.items() if n not in ("attention_mask", "use_cache")}
    want = [t for t in tree_leaves(model(**given)) if isinstance(t, torch.Tensor)]
    model, given = model.to("meta"), {n: t.to("meta") if isinstance(t, torch.Tensor) else t for n, t in given.items()}
    assert found(patch(model, verify=True)) == HOSTS[name].patched and not status(model).skipped
    got = [t for t in tree_leaves(model(**given)) if isinstance(t, torch.Tensor)]
    assert [(t.shape, t.dtype) for t in got] == [(t.shape, t.dtype) for t in want] and all(t.is_meta for t in got)
    assert status(model).fallbacks == {}


# Stand-ins, which no module of their name holds; and PEFT's own forward fails over a weight from a file.
UNFILED = ("torchtune LoRA", "torchtune DoRA", "torchtune frozen", "torchtune vision", "torchtune cross-attention", "timm", "PEFT DoRA")


@every_host
def test_copies_and_files(name):
    """A copy stays patched, by weights of its own; a file is of the unpatched model."""
    (model, given), true = built(name), truth(name, F32)
    patch(model)
    if not name.startswith("Mllama"):  # hooks that transformers adds to a called model do not pickle
        assert_true(results(model, given), true)
    copied, n, files = copy.deepcopy(model), len(patched_modules(model)), [io.BytesIO(), io.BytesIO()]
    for save, file in zip((pickle.dump, torch.save) if name not in UNFILED else (), files, strict=False):
        save(model, file)
        file.seek(0)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p.add_(1)
    assert status(copied).counts == {"patched": n} and status(copied).fallbacks == {}
    assert_true(results(copied, given), true)
    unpatch(model)
    assert status(copied).counts == {"patched": n}
    if name not in UNFILED:
        for loaded in (pickle.load(files[0]), torch.load(files[1], weights_only=False)):
            assert status(loaded).counts == {"unpatched": n}
            assert_equal(results(loaded, given), true.plain)
        assert patch(loaded).counts == {"patched": n}
        assert_true(results(loaded, given), true)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@every_host
def test_verify(name, dtype, monkeypatch):
    """It finds nothing in the right ones and the fault in wrong ones, draws no random number and leaves nothing."""
    model, _ = built(name, dtype)
    before, state, n, allowed = everything(model), torch.get_rng_state(), sum(HOSTS[name].patched.values()), []

    def apart(got, want, probe):
        allowed.append(probe.steps * max(torch.finfo(dtype).eps, torch.finfo(F32).eps * probe.depth**0.5))
        return judged(got, want, probe)

    def as_it_was():
        if name == "PEFT DoRA":  # PEFT's own forward puts an equal parameter in the place of the base's weight, when it decodes it on a CPU
            return all(torch.equal(p, values[n]) for n, p in model.named_parameters())
        return everything(model) == before

    judged, values = engine._apart, {n: p.clone() for n, p in model.named_parameters()}
    monkeypatch.setattr(engine, "_apart", apart)
    assert patch(model, verify=True).counts == {"patched": n}
    assert torch.equal(torch.get_rng_state(), state)
    unpatch(model)
    assert as_it_was()

    fault = 1 + 2.6 * max(allowed)  # more than is allowed, where right results are as far apart the other way and the faulty one is rounded, half an epsilon

    def wrong(host):
        return dataclasses.replace(host, fused=lambda *args: tree_map(lambda t: t * fault if isinstance(t, torch.Tensor) else t, host.fused(*args)))

    monkeypatch.setattr(hosts, "BUILT_IN", tuple(map(wrong, hosts.BUILT_IN)))
    report = patch(model, verify=True)
    assert len(report.patched) == HOSTS[name].unverified and len(report.skipped) == n - HOSTS[name].unverified
    assert {(e.code, e.reason.split(" by ")[0]) for e in report.skipped} == {("MISMATCH", "differs from its own forward")}
    unpatch(model)
    with pytest.raises(fastfuse.Unsupported, match=r"differs from its own forward by \d\.\de-0\d relative"):
        patch(model, verify=True, on_unsupported="raise")
    assert as_it_was()


HOOKS = {
    "pre": nn.Module.register_forward_pre_hook,
    "global": lambda module, hook: register_module_forward_hook(hook),
    "backward": nn.Module.register_full_backward_hook,
    "forward": nn.Module.register_forward_hook,
}
# Every kind of host with hooks on what its modules give, and with one of the other kinds.
HOOKED = [(name, kind) for i, name in enumerate(HOSTS) for kind in ("forward", [*HOOKS][i % 3])]


@pytest.mark.parametrize("name, kind", HOOKED)
def test_hooks_run(name, kind):
    """On every module, those that an op would swallow too, as often as unpatched. Those on the patched ones alone keep none from its op."""
    (model, given), ran = built(name), []
    handles = {module: HOOKS[kind](module, lambda *_: ran.append(1)) for module in (model.modules() if kind != "global" else [model])}
    try:
        results(model, given)
        count = len(ran)
        patch(model)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert_true(results(model, given), truth(name, F32))
        assert len(ran) == 2 * count > 0
        hindered = status(model).fallbacks
        assert set(hindered) == ({"HOOKED"} if HOSTS[name].swallows else set())
        for module in handles.keys() - set(outermost(model) if kind != "global" else []):
            handles[module].remove()
        assert_true(results(model, given), truth(name, F32))
        assert status(model).fallbacks == hindered
        assert (kind == "global") == (len(ran) == 2 * count)
    finally:
        for handle in handles.values():
            handle.remove()


def doubled(out):
    return tree_map(lambda t: 2 * t if isinstance(t, torch.Tensor) else t, out)


class Twice(nn.Module):
    def forward(self, t):
        return 2 * t


@contextlib.contextmanager
def doing_more(child: nn.Module, how: str):
    """Inside, the child does more than its class does."""
    cls = type(child)
    if how == "a hook":
        with child.register_forward_hook(lambda m, args, out: doubled(out)):
            yield
    elif how == "a subclass":
        child.__class__ = type(f"Louder{cls.__name__}", (cls,), {"forward": lambda self, *args, **kwargs: doubled(cls.forward(self, *args, **kwargs))})
        yield
        child.__class__ = cls
    elif how == "a forward of its own":
        child.forward = lambda *args, **kwargs: doubled(cls.forward(child, *args, **kwargs))
        yield
        del child.forward
    elif type(child._parameters.get("weight")) is nn.Parameter:
        nn.utils.parametrize.register_parametrization(child, "weight", Twice())
        yield
        nn.utils.parametrize.remove_parametrizations(child, "weight", leave_parametrized=False)
    else:
        yield


@torch.no_grad()
@pytest.mark.parametrize("how", ["a hook", "a subclass", "a forward of its own", "a parametrization"])
@every_kind
def test_children_that_do_more_than_their_class_are_called(name, how):
    """Each module inside of a patched one, one after the other: the same answers, whether the op runs around it or not at all."""
    model, given = built(name)
    with fastfuse.patched(model):
        inside = {(type(m), path.rsplit(".")[-1]): m for outer in outermost(model) for path, m in outer.named_modules() if path}
    codes = set()
    for child in inside.values():
        with doing_more(child, how):
            want = tree_leaves(model(**given))
            with fastfuse.patched(model), warnings.catch_warnings():
                warnings.simplefilter("ignore")
                got = tree_leaves(model(**given))
                codes |= set(status(model).fallbacks)
        for g, w in zip(got, want, strict=True):
            assert g is w is None or assert_rounding_apart(g, w, 256, 20) is None
    if HOSTS[name].swallows and how != "a parametrization":
        assert codes & ({"HOOKED"} if how == "a hook" else {"CHILD_TYPE"})
    else:
        assert codes <= {"CHILD_TYPE"}


@pytest.mark.parametrize("name, order", [*zip(HOSTS, cycle(("patch, hook", "hook, patch")), strict=False)])
def test_accelerate_hooks(name, order):
    """A model spread over devices: its hook moves the arguments of what it is on, and the op runs."""
    (model, given), true = built(name), truth(name, F32)
    names = [e.name for e in patch(model, dry_run=True).entries]
    placed = [model.get_submodule(n) for n in names if not any(n.startswith(outer + ".") for outer in names if outer != n)]
    for act in order.split(", "):
        if act == "patch":
            patch(model)
        else:
            for module in placed:
                add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    assert_fused(model, given, true)
    undo = [lambda: unpatch(model), lambda: [remove_hook_from_module(module) for module in placed]]
    for step in undo if order == "hook, patch" else undo[::-1]:
        step()
    assert patched_modules(model) == [] and all(getattr(m.forward, "__func__", None) is type(m).forward for m in placed)
    assert_equal(results(model, given), true.plain)


@every_host
def test_what_no_op_covers_runs_the_own_forward(name, monkeypatch):
    """Forward-mode differentiation: said once a module, counted each time, an error where that is asked for."""
    model, given = built(name)
    n = sum(HOSTS[name].patched.values())
    with torch.autograd.forward_ad.dual_level():
        want = model(**given)
        patch(model)
        for said in (n, 0):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                assert_equal(tree_leaves(model(**given)), tree_leaves(want))
            assert sum("runs its own forward: FORWARD_AD: " in str(w.message) for w in caught) == said
    assert_true(results(model, given), truth(name, F32))
    assert status(model).fallbacks == {"FORWARD_AD": 2 * n}
    unpatch(model)
    monkeypatch.setenv("FASTFUSE_STRICT", "1")
    patch(model)
    with torch.autograd.forward_ad.dual_level(), pytest.raises(fastfuse.Unsupported, match="FORWARD_AD"):
        model(**given)


def without(module: nn.Module, part: str) -> None:
    """The part has another name."""
    *path, last = part.split(".")
    holder = module.get_submodule(".".join(path))
    held = next(d for d in (holder._modules, holder._parameters, holder.__dict__) if last in d)
    held[last + "_"] = held.pop(last)


CHANGES = {
    "STRUCTURE": (without, "{cls} has no {part}"),
    "SIGNATURE": (lambda m, _: with_forward(m, lambda self, anything=None, **kwargs: None, type(m).__module__), "{cls}.forward takes no "),
    "FOREIGN_FORWARD": (
        lambda m, _: with_forward(m, functools.wraps(type(m).forward)(lambda self, *args, **kwargs: None), __name__),
        f"the forward of {{cls}} comes from {__name__}",
    ),
}


@pytest.mark.parametrize("name, part, code", [(name, part, code) for name in HOSTS for part in HOSTS[name].parts for code in CHANGES])
def test_another_version_is_left_alone(name, part, code):
    """A part or an argument is gone, or somebody has written the forward: with the reason in the report, an error where that is asked for."""
    (model, _), (cls, part), (change, words) = built(name), part.split(".", 1), CHANGES[code]
    module = model.get_submodule(next(e.name for e in patch(model, dry_run=True).entries if e.module_type == cls))
    change(module, part)
    before = everything(model)
    entry = next(e for e in patch(model).entries if model.get_submodule(e.name) is module)
    assert (entry.status, entry.code) == ("skipped", code) and entry.reason.startswith(words.format(cls=cls, part=part))
    assert "_fastfuse" not in module.__dict__ and entry.reason in str(status(model))
    unpatch(model)
    assert everything(model) == before
    with pytest.raises(fastfuse.Unsupported, match=code):
        patch(model, on_unsupported="raise")
