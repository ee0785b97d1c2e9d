"""torch.export of patched models and of the ops, strict and not: saved and loaded, a program answers as the model does."""

import copy
import io
import subprocess
import sys

import bitsandbytes as bnb
import mllama
import pytest
import reference
import torch
from hosts import HOSTS, SMALL, built, conversation, text
from numerics import assert_rounding_apart
from torch import nn

import fastfuse
from cases.weights import quantize, random_weight
from fastfuse import ops
from fastfuse.models.clip import clip_vision_encoder
from fastfuse.modules.low_precision import FrozenNF4Linear
from fastfuse.modules.peft import DoRALinear, LoRALinear
from fastfuse.quant import NF4View

STRICT = [True, False]


def x() -> dict[str, torch.Tensor]:
    return {"x": torch.randn(3, 128)}


def own_dora() -> nn.Module:
    made = DoRALinear(128, 256, 8, 16.0, quantize_base=True)
    made.initialize_dora_magnitude()
    return made


def own_vision() -> nn.Module:
    return reference.shaken(clip_vision_encoder(tile_size=12, patch_size=4, embed_dim=16, num_layers=1, num_heads=2, max_num_tiles=4, out_indices=None))


OWN = {
    "fastfuse LoRA": lambda: (LoRALinear(128, 256, 8, 16.0, quantize_base=True), x()),
    "fastfuse DoRA": lambda: (own_dora(), x()),
    "fastfuse frozen": lambda: (FrozenNF4Linear(128, 256), {"input": torch.randn(3, 128)}),
    "fastfuse vision": lambda: (own_vision(), {"images": torch.randn(1, 1, 4, 3, 12, 12), "aspect_ratio": torch.tensor([[[2, 2]]])}),
    "fastfuse cross-attention": lambda: (reference.shaken(reference.make_cross_layer()), text(dim=reference.D)),
}
EXPORTED = [*HOSTS, *OWN]


def frozen(name: str) -> tuple[nn.Module, dict]:
    module, given = OWN[name]() if name in OWN else built(name)
    for m in module.modules():
        if isinstance(m, bnb.nn.Linear4bit):  # as bitsandbytes has it after quantizing or loading a model
            m.quant_state = m.weight.quant_state
    return module.eval().requires_grad_(False), given


class Calls(nn.Module):
    """A call of an op as a module; tensors among its arguments are buffers, quantized weights are views (a Params4bit would lose its quant_state)."""

    def __init__(self, call, weights=(), **tensors):
        super().__init__()
        self.call, self.weights = call, [NF4View.of(weight) for weight in weights]
        for name, t in tensors.items():
            self.register_buffer(name, t)

    def forward(self, *args):
        return self.call(self, *args)


def adapter(N: int = 128, K: int = 128) -> dict[str, torch.Tensor]:
    return {"a": torch.randn(4, K) / K**0.5, "b": torch.randn(N, 4)}


def op(call, *storages: str, args=None, **tensors) -> tuple[nn.Module, tuple]:
    weights = [quantize(random_weight(128, 128), storage) for storage in storages]
    return Calls(call, weights, **tensors), (torch.randn(3, 128),) if args is None else args


def attention() -> tuple[torch.Tensor, ...]:
    return torch.randn(2, 4, 5, 16), torch.randn(2, 2, 12, 16), torch.randn(2, 2, 12, 16), torch.rand(2, 5, 12) < 0.6


OPS = {
    **{f"nf4_dequantize, {s}": lambda s=s: op(lambda m, x: x @ ops.nf4_dequantize(m.weights[0]).T, s) for s in ("flat", "nested", "torchao")},
    **{f"nf4_linear, {s}": lambda s=s: op(lambda m, x: ops.nf4_linear(x, m.weights[0]), s) for s in ("flat", "nested", "torchao")},
    "nf4_lora_linear": lambda: op(lambda m, x: ops.nf4_lora_linear(x, m.weights[0], m.a, m.b, 0.5), "nested", **adapter()),
    "nf4_lora_linears": lambda: op(
        lambda m, x: torch.cat(ops.nf4_lora_linears(x, [(m.weights[0], m.a, m.b, 0.5), (m.weights[1],)]), -1), "nested", "nested", **adapter()
    ),
    "lora_row_norms": lambda: op(lambda m, x: ops.lora_row_norms(m.weights[0], m.a, m.b, 0.5) * x[0, 0], "nested", **adapter()),
    "lora_linear": lambda: op(lambda m, x: ops.lora_linear(x, m.w, m.a, m.b, 0.5), w=torch.randn(128, 128), **adapter()),
    "nf4_swiglu_mlp": lambda: (
        Calls(
            lambda m, x: ops.nf4_swiglu_mlp(x, (m.weights[0], m.a, m.b, 0.5), (m.weights[1],), (m.weights[2],)),
            [quantize(random_weight(N, K), "nested") for N, K in ((128, 128), (128, 128), (128, 128))],
            **adapter(),
        ),
        (torch.randn(3, 128),),
    ),
    "cross_attention": lambda: op(lambda m, q, k, v, mask: ops.cross_attention(q, k, v, mask), args=attention()),
    "cross_attention without a mask": lambda: op(lambda m, q, k, v: ops.cross_attention(q, k, v), args=attention()[:3]),
    "cross_attention over tiles": lambda: op(
        lambda m, q, k, v, tiles: ops.cross_attention(q, k, v, ops.EncoderMask.from_tiles(tiles, 3)),
        args=(*attention()[:3], torch.rand(2, 5, 1, 4) < 0.6),
    ),
    "patch_embed": lambda: op(
        lambda m, images: ops.patch_embed(images, m.w, m.cls, None, m.pos),
        args=(torch.randn(2, 1, 3, 12, 12),), w=torch.randn(16, 3, 4, 4), cls=torch.randn(16), pos=torch.randn(10, 16),
    ),
}  # fmt: skip


def loaded(program: torch.export.ExportedProgram) -> nn.Module:
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    return torch.export.load(file).module()


def tensors(out) -> list[torch.Tensor]:
    return [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, torch.Tensor)]


def assert_exports(module: nn.Module, strict: bool, *args, **kwargs) -> torch.export.ExportedProgram:
    """Three programs, of which only the last has no tensor of this process: live, and saved and loaded. Gives the live one."""
    want = tensors(module(*args, **kwargs))
    program = torch.export.export(module, args, kwargs, strict=strict)
    for run in (program.module(), loaded(program)):
        got = tensors(run(*args, **kwargs))
        assert len(got) == len(want) and any(t.any() for t in want)
        for g, w in zip(got, want, strict=True):
            assert_rounding_apart(g, w, K=256, products=4)
    return program


def fused_ops(program: torch.export.ExportedProgram) -> set[str]:
    graphs = [m.graph for m in program.graph_module.modules() if isinstance(m, torch.fx.GraphModule)]
    return {node.target._opname for graph in graphs for node in graph.nodes if getattr(node.target, "namespace", "") == "fastfuse"}


@pytest.mark.parametrize("name, strict", [(name, i % 2 == 0) for i, name in enumerate(EXPORTED)])
def test_hosts(name, strict):
    module, given = frozen(name)
    report = fastfuse.patch(module, on_unsupported="raise")
    assert report.patched and not any(e.code for e in report.entries)
    program = assert_exports(module, strict, **given)
    assert fastfuse.status(module).fallbacks == {}
    found = fused_ops(program)
    assert found & {"nf4_linear", "patch_embed", "cross_attention"}
    assert not name.startswith("Mllama") or found >= {"cross_attention", "pack_tiles", "patch_embed"} | ({"nf4_linear"} if "QLoRA" in name else set())


@pytest.mark.parametrize("case, strict", [(case, i % 2 == 0) for i, case in enumerate(OPS)])
def test_ops(case, strict):
    module, args = OPS[case]()
    program = assert_exports(module, strict, *args)
    assert fused_ops(program) or case == "lora_linear"


class Outer(nn.Module):
    """Calls `inner` and changes what it gives in place, for which an export keeps a constant."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        y = self.inner(*args, **kwargs) * 2
        y[..., :1] = 3
        return y


@pytest.mark.parametrize("strict", STRICT)
@pytest.mark.parametrize("name", ["bitsandbytes nested", "PEFT over torchao", "torchtune DoRA", "torchtune cross-attention"])
def test_hosts_inside_of_a_model(name, strict):
    inner, given = frozen(name)
    model = Outer(Outer(inner))
    assert fastfuse.patch(model, on_unsupported="raise").patched
    program = assert_exports(model, strict, **given)
    assert fastfuse.status(model).fallbacks == {} and fused_ops(program)


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
        fastfuse.patch(model, on_unsupported="raise")
        if copied:
            model = copy.deepcopy(model)
            model[0].child.inner.weight.mul_(2)
            want = model[0].child(*given) + 1
        program = assert_exports(model, True, *given)
        assert any("lifted_tensor" in name for name in program.constants)
        torch.testing.assert_close(torch.export.unflatten(program)(*given), want)
    finally:
        host.remove()


@pytest.mark.parametrize("strict", STRICT)
def test_mllama_with_its_own_vision_model(strict):
    model = mllama.build(mllama.config(**SMALL)).requires_grad_(False)
    fastfuse.patch(model, ops="cross_attention", on_unsupported="raise")
    program = assert_exports(model, strict, **conversation(torch.float32))
    assert fastfuse.status(model).fallbacks == {} and fused_ops(program) >= {"cross_attention", "pack_tiles"}


class OverNF4(nn.Module):
    """A linear layer without an adapter and one with it, over the same weight."""

    def __init__(self, view: NF4View):
        super().__init__()
        self.layout = view.block_size, view.shape, view.dtype
        for i, t in enumerate((view.packed, view.code, *view.scales, torch.randn(8, 128), torch.randn(64, 8))):
            self.register_buffer(f"part{i}", t)

    def forward(self, x):
        packed, code, *scales, a, b = (t for _, t in self.named_buffers())
        view = NF4View(packed, code, tuple(scales), *self.layout)
        return ops.nf4_linear(x, view), ops.nf4_lora_linear(x, view, a, b, 2.0)


@torch.no_grad()
def test_a_package_of_aotinductor_runs_in_a_fresh_process(tmp_path):
    """It hands a custom op None for an empty list: no schema has one, not even that of a layer without an adapter."""
    module, x = OverNF4(NF4View.of(quantize(random_weight(64, 128), "nested"))), torch.randn(3, 128)
    exported = torch.export.export(module, (x,))
    torch._inductor.aoti_compile_and_package(exported, package_path=str(tmp_path / "package.pt2"))
    torch.save((x, module(x)), tmp_path / "expected.pt")
    script = (
        "import sys, torch, fastfuse\n"
        "x, expected = torch.load(sys.argv[2])\n"
        "for got, want in zip(torch._inductor.aoti_load_package(sys.argv[1])(x), expected, strict=True):\n"
        "    torch.testing.assert_close(got, want)\n"
        "print('both alike')\n"
    )
    ran = subprocess.run([sys.executable, "-c", script, tmp_path / "package.pt2", tmp_path / "expected.pt"], capture_output=True, text=True)
    assert ran.stdout == "both alike\n", ran.stderr
