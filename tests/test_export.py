"""torch.export of patched models and of the ops, strict and not: saved and loaded, a program answers as the model does."""

import copy
import io
from functools import partial
from itertools import product

import bitsandbytes as bnb
import mllama
import pytest
import reference
import torch
from hosts import HOSTS, SMALL, built, conversation, text
from numerics import assert_rounding_apart
from prepared_layers import own
from processes import python
from torch import nn

import cases
import fastfuse
from cases import linear
from fastfuse import ops, patch, status
from fastfuse.models.clip import clip_vision_encoder
from fastfuse.modules.low_precision import FrozenNF4Linear
from fastfuse.modules.peft import DoRALinear, LoRALinear


def own_vision():
    return reference.shaken(clip_vision_encoder(tile_size=12, patch_size=4, embed_dim=16, num_layers=1, num_heads=2, max_num_tiles=4, out_indices=None))


OWN = {
    **{f"fastfuse {kind.__name__}": partial(lambda kind: (own(kind), {"x": torch.randn(3, 128)}), kind) for kind in (LoRALinear, DoRALinear)},
    "fastfuse frozen": lambda: (own(FrozenNF4Linear), {"input": torch.randn(3, 128)}),
    "fastfuse vision": lambda: (own_vision(), {"images": torch.randn(1, 1, 4, 3, 12, 12), "aspect_ratio": torch.tensor([[[2, 2]]])}),
    "fastfuse cross-attention": lambda: (reference.shaken(reference.make_cross_layer()), text(dim=reference.D)),
}
EXPORTED = [*HOSTS, *OWN]


def frozen(name):
    module, given = OWN[name]() if name in OWN else built(name)
    for m in module.modules():
        if isinstance(m, bnb.nn.Linear4bit):  # as bitsandbytes has it after quantizing or loading a model
            m.quant_state = m.weight.quant_state
    return module.eval().requires_grad_(False), given


class Calls(nn.Module):
    def __init__(self, run):
        super().__init__()
        self.run = run

    def forward(self, tensors):
        return self.run(tensors)


NF4 = ("q, k and v", "an adapter", "magnitude, bf16", "no adapter, fp32", "no adapter, bf16", "no adapter, torchao")
ATTENTION = ("a few tokens", "a few tokens, no mask", "bits, blind rows")
OPS = [
    *product(["nf4_linear"], NF4),
    *product(["cross_attention"], ATTENTION),
    ("nf4_swiglu_mlp", "all"),
    ("lora_linear", "plain"),
    ("patch_embed", "positions"),
]


def loaded(program):
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


def tensors(out):
    return [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]


def assert_exports(module, strict, *args, **kwargs):
    """Three programs, of which only the last has no tensor of this process: live, and saved and loaded. Gives the live one."""
    want = tensors(module(*args, **kwargs))
    program = torch.export.export(module, args, kwargs, strict=strict)
    for run in (program.module(), loaded(program)):
        got = tensors(run(*args, **kwargs))
        assert len(got) == len(want) and any(t.any() for t in want)
        for g, w in zip(got, want, strict=True):
            assert_rounding_apart(g, w, K=256, products=4)
    return program


def fused_ops(program):
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    return {node.target._opname for graph in graphs for node in graph.nodes if getattr(node.target, "namespace", "") == "fastfuse"}


@pytest.mark.parametrize("name, strict", [(name, i % 2 == 0) for i, name in enumerate(EXPORTED)])
def test_hosts(name, strict):
    module, given = frozen(name)
    report = patch(module, on_unsupported="raise")
    assert report.patched and not any(e.code for e in report.entries)
    program = assert_exports(module, strict, **given)
    assert status(module).fallbacks == {}
    found = fused_ops(program)
    assert found & {"nf4_linear", "patch_embed", "cross_attention"}
    assert not name.startswith("Mllama") or found >= {"cross_attention", "pack_tiles", "patch_embed"} | ({"nf4_linear"} if "QLoRA" in name else set())


@pytest.mark.parametrize("op, case, strict", [(*case, i % 2 == 0) for i, case in enumerate(OPS)])
def test_ops(op, case, strict, monkeypatch):
    """Weights are constants of the program."""
    monkeypatch.setattr(linear, "beside", lambda view, x: view)
    call = cases.ops()[op].call(case, "cpu").only()
    program = assert_exports(Calls(call.run), strict, call.tensors)
    assert fused_ops(program) or op == "lora_linear"


@pytest.mark.parametrize("storage, strict", [("flat", True), ("nested", False), ("torchao", True)])
def test_decoded_weights(storage, strict):
    w = linear.weight(0, 64, 64, storage)
    assert_exports(Calls(lambda x: x @ ops.nf4_dequantize(w).T), strict, torch.randn(3, 64))


class Outer(nn.Module):
    """Calls `inner` and changes what it gives in place, for which an export keeps a constant."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        y = self.inner(*args, **kwargs) * 2
        y[..., :1] = 3
        return y


INSIDE = ("bitsandbytes nested", "PEFT over torchao", "torchtune DoRA", "torchtune cross-attention")


@pytest.mark.parametrize("name, strict", [*((name, True) for name in INSIDE), (INSIDE[0], False)])
def test_hosts_inside_of_a_model(name, strict):
    inner, given = frozen(name)
    model = Outer(Outer(inner))
    assert patch(model, on_unsupported="raise").patched
    program = assert_exports(model, strict, **given)
    assert status(model).fallbacks == {} and fused_ops(program)


@pytest.mark.parametrize("copied", [False, True], ids=["patched", "deep copy"])
def test_a_constant_below_a_patched_module(copied):
    """A strict export names it by the modules around it: the names must be some that torch.export finds again, and unflatten too."""

    class Middle(nn.Module):
        def __init__(self):
            super().__init__()
            self.child = Outer(nn.Linear(8, 8))

        def forward(self, x):
            return self.child(x)

    model, given = nn.Sequential(Middle()).requires_grad_(False), (torch.randn(2, 8),)
    host = fastfuse.register_host("middle", "middle", lambda module: isinstance(module, Middle), lambda module, x: module.child(x) + 1)
    try:
        want = model(*given) + 1
        patch(model, on_unsupported="raise")
        if copied:
            model = copy.deepcopy(model)
            model[0].child.inner.weight.mul_(2)
            want = model[0].child(*given) + 1
        program = assert_exports(model, True, *given)
        assert any("lifted_tensor" in name for name in program.constants)
        torch.testing.assert_close(torch.export.unflatten(program)(*given), want)
    finally:
        host.remove()


def test_mllama_with_its_own_vision_model():
    model = mllama.build(mllama.config(**SMALL)).requires_grad_(False)
    patch(model, ops="cross_attention", on_unsupported="raise")
    program = assert_exports(model, False, **conversation(torch.float32))
    assert status(model).fallbacks == {} and fused_ops(program) >= {"cross_attention", "pack_tiles"}


@torch.no_grad()
def test_a_package_of_aotinductor_runs_in_a_fresh_process(tmp_path):
    """It hands a custom op None for an empty list: no schema has one, not even that of a layer without an adapter."""
    w, a, b, *_ = (t.detach() if isinstance(t, torch.Tensor) else t for t in linear.layer(64, 128))
    module, x = Calls(lambda x: (ops.nf4_linear(x, w), ops.nf4_lora_linear(x, w, a, b, 2.0))), torch.randn(3, 128)
    with torch._inductor.config.patch("aot_inductor.compile_wrapper_opt_level", "O0"):
        torch._inductor.aoti_compile_and_package(torch.export.export(module, (x,)), package_path=str(tmp_path / "package.pt2"))
    torch.save((x, module(x)), tmp_path / "expected.pt")
    script = (
        "import sys, torch, fastfuse\n"
        "x, expected = torch.load(sys.argv[2])\n"
        "for got, want in zip(torch._inductor.aoti_load_package(sys.argv[1])(x), expected, strict=True):\n"
        "    torch.testing.assert_close(got, want)\n"
        "print('both alike')\n"
    )
    assert python("-c", script, tmp_path / "package.pt2", tmp_path / "expected.pt").stdout == "both alike\n"
