"""The hosts that patch recognizes, a row each, and what tests of all of them ask: test_hosts.py, test_export.py."""

import copy
import functools
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import mllama
import pytest
import torch
import torchtune_modules as tt
from fronts import PatchEmbed, made, photos, shaken
from numerics import Orders, assert_no_worse, exactly
from peft import LoraConfig
from qlora import lora, quantized, said
from reference import assert_gradients_no_worse
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import fastfuse
from fastfuse import patch, status
from fastfuse.quant import NF4View

MLLAMA_CROSS = "MllamaTextCrossAttention"
PEFT, BNB, AO, TT, MLLAMA = "PEFT LoRA", "bitsandbytes", "torchao", "torchtune", "transformers Mllama"


class Row(NamedTuple):
    """A host: how a module or a small model of it is made in a dtype, a call of it, and what patch finds there."""

    make: Callable[[torch.dtype], nn.Module]
    given: Callable[[torch.dtype], dict[str, Any]]
    patched: dict[tuple[str, str], int]  # how many modules of a (host, op)
    parts: tuple[str, ...] = ()  # "Class.part" of those that are patched: something its op reads, which a later version may call otherwise
    swallows: bool = True  # the op stands in for modules inside, which cannot be called then
    autocast: tuple[str, ...] = ()  # why one in fp32 runs its own forward under autocast
    unverified: int = 0  # modules which verify has nothing to compare of


def rows(n, name="x"):
    return lambda dtype: {name: torch.randn(3, n, dtype=dtype)}


def two_adapters(dtype):
    """Of another rank and scaling, with biases on B."""
    model = lora("bitsandbytes", dtype, lora_bias=True)
    model.add_adapter("rs", LoraConfig(r=3, target_modules=["up", "down"], use_rslora=True, lora_bias=True, init_lora_weights=False))
    model.base_model.set_adapter(["default", "rs"])
    return model


def pictures(dtype, tiles=4, size=12):
    """Two images of two samples, of up to `tiles` tiles; some tiles are padding."""
    ratios = {1: [[1, 1]] * 4, 2: [[1, 2], [2, 1], [1, 1], [0, 0]], 3: [[1, 3], [1, 2], [3, 1], [1, 1]], 4: [[2, 2], [1, 3], [4, 1], [1, 1]]}
    return {"images": torch.randn(2, 2, tiles, 3, size, size).to(dtype), "aspect_ratio": torch.tensor(ratios[tiles]).view(2, 2, 2)}


def text(dtype=torch.float32, dim=32, mask="holes"):
    """Text, image tokens, and a mask in which the first two rows of the first sample see nothing."""
    given = {"x": torch.randn(2, 6, dim).to(dtype), "encoder_input": torch.randn(2, 24, dim).to(dtype)}
    if mask is not None:
        seen = torch.rand(2, 6, 24) < 0.5
        seen[..., :4] = True
        seen[0, :2] = False
        given["encoder_mask"] = torch.zeros_like(seen) if mask == "none seen" else seen
    return given


def conversation(dtype):
    given = mllama.batch([["coffee"], []]) | {"use_cache": False}
    return given | {"pixel_values": given["pixel_values"].to(dtype)}


SMALL = {"cross": (1,), "layers": 2, "vision_layers": (1, 1), "taken": (0,)}
WHOLE = {(MLLAMA, "cross_attention"): 3, (MLLAMA, "patch_embed"): 1}


def front(kind, name, cls, *parts):
    return Row(
        lambda dtype: made(kind).to(dtype), lambda dtype: {"pixel_values": photos(dtype=dtype)}, {(f"transformers {name}", "patch_embed"): 1},
        tuple(f"{cls}Embeddings.{part}" for part in parts),
    )  # fmt: skip


def nf4(make, base):
    return Row(make, rows(128), {(base, "nf4_linear"): 2}, swallows=False, autocast=("AUTOCAST",))


def adapted(make, base, *parts):
    return Row(make, rows(128), {(PEFT, "nf4_lora_linear"): 2, (base, "nf4_linear"): 2}, parts, autocast=("AUTOCAST",))


MLLAMA_PARTS = (
    "MllamaModel.language_model.layers",
    "MllamaTextModel.layers",
    f"{MLLAMA_CROSS}.q_norm.weight",
    "MllamaVisionModel.pre_tile_positional_embedding.embedding.weight",
)
HOSTS = {
    "bitsandbytes nested": nf4(lambda d: quantized("bitsandbytes", d), BNB),
    "bitsandbytes flat": nf4(lambda d: quantized("bitsandbytes", d, "flat"), BNB),
    "torchao": nf4(lambda d: quantized("torchao", d), AO),
    "PEFT over bitsandbytes": adapted(lambda d: lora("bitsandbytes", d), BNB, "Linear4bit.lora_A"),
    "PEFT over torchao": adapted(lambda d: lora("torchao", d), AO),
    "PEFT DoRA": adapted(lambda d: lora("bitsandbytes", d, use_dora=True), BNB, "Linear4bit.scaling"),
    "PEFT, two adapters": adapted(two_adapters, BNB, "Linear4bit.lora_B"),
    "torchtune LoRA": Row(lambda d: tt.adapted("lora", dtype=d, use_bias=True), rows(128), {(TT, "nf4_lora_linear"): 1}, ("LoRALinear.alpha", "LoRALinear.weight")),
    "torchtune DoRA": Row(
        lambda d: tt.adapted("dora", dtype=d, use_bias=True), rows(128), {(TT, "nf4_lora_linear"): 1}, ("DoRALinear.magnitude",), autocast=("AUTOCAST",)
    ),
    "torchtune frozen": Row(
        lambda d: tt.adapted("frozen", dtype=d, use_bias=True), rows(128, "input"), {(TT, "nf4_linear"): 1}, ("FrozenNF4Linear.bias",), swallows=False
    ),
    "torchtune vision": Row(
        lambda d: tt.vision(4, layers=2, out_indices=[1]).to(d), pictures, {(TT, "patch_embed"): 1}, ("VisionTransformer.token_pos_embedding",)
    ),
    "torchtune cross-attention": Row(
        lambda d: tt.cross_layer().to(d), text, {(TT, "cross_attention"): 1}, ("TransformerCrossAttentionLayer.ca_scale",)
    ),
    "Mllama": Row(lambda d: mllama.build(mllama.config(**SMALL)).to(d), conversation, WHOLE, MLLAMA_PARTS, unverified=2),
    "Mllama QLoRA": Row(
        lambda d: mllama.qlora(mllama.config(**SMALL, intermediate_size=128), d), conversation,
        WHOLE | {(PEFT, "nf4_lora_linear"): 14, (BNB, "nf4_linear"): 14}, autocast=("AUTOCAST",), unverified=2,
    ),
    "CLIP": front("clip", "CLIP", "CLIPVision", "position_embedding.weight", "class_embedding"),
    "SigLIP": front("siglip", "SigLIP", "SiglipVision", "patch_embedding.weight"),
    "DINOv2": front("dinov2", "ViT", "Dinov2", "cls_token"),
    "DINOv2 with registers": front("registers", "ViT", "Dinov2WithRegisters", "dropout"),
    "ViT": front("vit", "ViT", "ViT", "patch_embeddings.projection.weight"),
    "timm": Row(
        lambda d: shaken(PatchEmbed(32, 8, embed_dim=32)).to(d), lambda d: {"x": photos(dtype=d)}, {("timm", "patch_embed"): 1},
        ("PatchEmbed.strict_img_size",),
    ),
}  # fmt: skip


def built(name, dtype=torch.float32, seed=0):
    """A fresh model, always the same one for a seed, and a call of it, the same for all seeds."""
    torch.manual_seed(seed)
    model = HOSTS[name].make(dtype)
    if name.startswith("Mllama"):
        model.set_attn_implementation("sdpa")
    torch.manual_seed(1)
    return model.train(), HOSTS[name].given(dtype)


def nf4_modules(model):
    return [m for m in model.modules() if type(m._parameters.get("weight")).__name__ in ("NF4Tensor", "Params4bit")]


def in_float64(model, dtype):
    """A copy that computes in float64, with the weights that codes and scales stand for, rounded to dtype."""
    made = copy.deepcopy(model)
    for module in nf4_modules(made):
        weight = fastfuse.ops.nf4_dequantize_ref(NF4View.of(module.weight), dtype)
        if type(module).__module__.startswith("bitsandbytes"):
            module.__class__ = nn.Linear
        module.weight = nn.Parameter(weight, requires_grad=False)
    return exactly(made) if hasattr(made, "set_attn_implementation") else made.double()


def results(model, given, call=None):
    """All that a call gives, and the gradients of every parameter and floating input for two upstream gradients."""
    given = {n: t.detach().clone().requires_grad_() if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in given.items()}
    outs = [t for t in tree_leaves((model if call is None else call)(**given)) if isinstance(t, Tensor)]
    # A bias of keys shifts all scores of a query alike: its gradient is rounding and nothing else.
    leaves = {
        n: t for n, t in [*model.named_parameters(), *given.items()] if getattr(t, "requires_grad", False) and not n.endswith(("k_proj.bias", "key.bias"))
    }
    draws = []
    for seed in range(2):
        made = torch.Generator().manual_seed(seed)
        ups = [torch.randn(out.shape, generator=made).to(out.dtype) for out in outs]
        draws.append(torch.autograd.grad(outs, list(leaves.values()), ups, retain_graph=True, allow_unused=True))
    return [out.detach() for out in outs], dict(zip(leaves, zip(*draws, strict=True), strict=True))


class Truth(NamedTuple):
    eager: Iterable[tuple]  # results as the host sums, and in other orders
    exact: tuple  # results in float64

    @property
    def plain(self):
        """Results as the host sums."""
        return next(iter(self.eager))


def truth_of(model, given, dtype, autocast=False):
    wide = {n: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t for n, t in given.items()}
    own = copy.deepcopy(model)

    def eager():
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            return results(own, given)

    return Truth(Orders(eager), results(in_float64(model, dtype), wide))


@functools.cache
def truth(name, dtype, autocast=False):
    return truth_of(*built(name, dtype), dtype, autocast)


def assert_true(got, true):
    """Each result and each gradient by the rule of numerics.py; a gradient that is exactly zero is zero."""
    for i, exact in enumerate(true.exact[0]):
        assert_no_worse(got[0][i], (outs[i] for outs, _ in true.eager), exact, f"result {i}")
    grads = {n.removeprefix("_orig_mod."): draws for n, draws in got[1].items()}
    zero = {n for n, draws in true.exact[1].items() if not any(d is not None and d.any() for d in draws)}
    assert not any(g is not None and g.any() for n in zero for g in grads[n])
    assert_gradients_no_worse(grads, (found for _, found in true.eager), {n: draws for n, draws in true.exact[1].items() if n not in zero})


def assert_fused(model, given, true, call=None):
    """A call by the rule, in which nothing ran its own forward."""
    assert_true(results(model, given, call), true)
    assert status(model).fallbacks == {}


def assert_equal(got, want):
    """To the bit."""
    for g, w in zip(tree_leaves(got), tree_leaves(want), strict=True):
        assert g is w is None or torch.equal(g, w)


def found(report):
    return dict(Counter((e.host, e.op) for e in report.entries))


def patched_modules(model):
    return [m for m in model.modules() if m.__dict__.get("_fastfuse") is not None]


def outermost(model):
    """The patched modules that are not inside of another one."""
    ours = patched_modules(model)
    inside = {id(m) for outer in ours for m in outer.modules() if m is not outer}
    return [m for m in ours if id(m) not in inside]


def everything(model):
    """What there is of every module: attributes, parameters, buffers, children, hooks."""
    return [{k: dict(v) if isinstance(v, dict) and k.startswith("_") else v for k, v in m.__dict__.items()} for m in model.modules()]


def exchanged(module, given, dtype=torch.float32, **options):
    """Patched, a module that has no row gives and learns what it did, by the rule; given back, to the bit."""
    before, true = everything(module), truth_of(module, given, dtype)
    report = patch(module, **options)
    assert report.patched
    assert_fused(module, given, true)
    fastfuse.unpatch(module)
    assert everything(module) == before
    assert_equal(results(module, given), true.plain)
    return report


def runs_its_own(module, given, code, words=""):
    """A patched call gives to the bit what the module's own forward gives, and says why, once. The module stays patched."""
    torch.manual_seed(2)
    want = results(module, given)
    report = patch(module)
    torch.manual_seed(2)
    with pytest.warns(UserWarning, match=f"{code}: .*{words}"):
        assert_equal(results(module, given), want)
    assert set(status(module).fallbacks) == {code}
    return report


def with_forward(module, forward, author):
    """Of a class of the same name whose forward is another, as a later version would have it, or as `author` wrote it."""
    cls = type(module)
    forward.__module__ = author
    module.__class__ = type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})


def is_skipped(module, code, words):
    """Untouched, with the reason in the report, and an error where that is asked for."""
    before = everything(module)
    report = patch(module)
    assert said(report) == [("skipped", code)] and not report
    assert words in report.entries[0].reason and report.entries[0].reason in str(status(module))
    assert everything(module) == before
    with pytest.raises(fastfuse.Unsupported, match=code):
        patch(module, on_unsupported="raise")


# transformers' Mllama, whole

THREE = [["coffee"], ["astronaut", "chelsea"], []]  # samples with 1, 2 and 0 images


@pytest.fixture(scope="module")
def shared():
    return mllama.build(mllama.config(cross=(1, 2), layers=3, vision_layers=(1, 1), taken=(0,)))


@pytest.fixture
def model(shared):
    """A copy, for a test to do with what it likes."""
    return copy.deepcopy(shared)


def conversations(samples=THREE, side="none"):
    return mllama.padded(mllama.batch(samples), side)


def attention_of(model):
    return model.model.language_model.layers[1].cross_attn


def assert_as_before(model, call, match="", **fallbacks):
    """Patched, it gives the logits that it gave, to fp32's rounding. match: which warning is to be there."""
    want = model(**call).logits
    report = patch(model)
    with pytest.warns(UserWarning, match=match) if match else warnings.catch_warnings():
        torch.testing.assert_close(model(**call).logits, want)
    assert status(model).fallbacks == fallbacks
    return report
