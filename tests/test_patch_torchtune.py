"""patch(model) over modules built as torchtune 0.6.1 builds them, beyond what test_hosts.py asks of them."""

import copy
import warnings
from functools import partial

import peft
import pytest
import torch
import torchtune_modules as tt
from conftest import GPU
from hosts import exchanged, pictures, results, runs_its_own, text
from numerics import assert_no_worse, assert_rounding_apart, in_several_orders
from qlora import said
from torch import nn

import fastfuse
from cases.linear import BF16, F16, F32
from fastfuse import patch, status

OPS = {"lora": "nf4_lora_linear", "dora": "nf4_lora_linear", "frozen": "nf4_linear"}
TRITON = "auto" if GPU else "triton"  # the interpreter is for machines without a GPU
adapters = pytest.mark.parametrize("kind", ["lora", "dora"])
linears = pytest.mark.parametrize("kind", OPS)


def rows(kind, dtype=F32):
    return {"input" if kind == "frozen" else "x": torch.randn(6, 128, dtype=dtype)}


# Linear layers


@pytest.mark.parametrize("kind, dtype, backend", [("lora", F32, TRITON), ("dora", BF16, "auto"), ("frozen", F16, "torch")])
def test_linear_layers_without_a_bias(kind, dtype, backend):
    module = tt.adapted(kind, dtype=dtype)
    (entry,) = exchanged(module, rows(kind, dtype), dtype, backend=backend).entries
    assert (entry.host, entry.op, entry.status, entry.module_type) == ("torchtune", OPS[kind], "patched", type(module).__name__)
    assert entry.layout.startswith("torchao, blocks of 64")


@adapters
def test_disabled_and_merged(kind):
    """disabled leaves the base; merged is a note that torchtune's forward does not read."""
    module = tt.adapted(kind, use_bias=True, dropout=0.5)
    module.disabled = True
    exchanged(module, rows(kind))
    module.disabled, module.merged = False, True
    exchanged(module.eval(), rows(kind))


# A factor may carry an adapter of its own.
ADAPTED = {
    "bias": ("LORA_BIAS", lambda m: m.lora_b.register_parameter("bias", nn.Parameter(torch.randn(256)))),
    "dropout": ("DROPOUT", lambda m: setattr(m, "dropout", nn.ReLU())),
    "LoRA": ("CHILD_TYPE", lambda m: setattr(m, "lora_b", peft.tuners.lora.Linear(m.lora_b, "default", peft.LoraConfig(r=2, lora_alpha=2), r=2))),
}


@pytest.mark.parametrize("what", ADAPTED)
@adapters
def test_an_adapter_that_does_more_is_called(kind, what):
    module, (code, change) = tt.adapted(kind), ADAPTED[what]
    change(module)
    runs_its_own(module, rows(kind), code)


@linears
def test_a_bias_of_another_dtype_promotes_as_it_did(kind):
    module, x = tt.adapted(kind, use_bias=True, dtype=BF16), torch.randn(6, 128, dtype=BF16)
    module.bias = nn.Parameter(torch.randn(256))
    eager, exact = in_several_orders(module, x), copy.deepcopy(module)
    exact.weight = nn.Parameter(fastfuse.ops.nf4_dequantize_ref(fastfuse.quant.NF4View.of(module.weight), torch.float64), requires_grad=False)
    patch(module)
    got = module(x)
    assert got.dtype == eager[0].dtype == F32 and status(module).fallbacks == {}
    assert_no_worse(got, eager, exact.double()(x.double()))


@pytest.mark.parametrize("kind, fallbacks", [("lora", {}), ("dora", {"DTYPE": 1}), ("frozen", {})])
def test_autocast_of_a_narrow_input(kind, fallbacks):
    """fp32 modules, and what dtype their own forward gives. The product rounds to bf16, whatever the sum is in."""
    module, x = tt.adapted(kind), torch.randn(6, 128, dtype=BF16)
    with torch.autocast("cpu", BF16), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        want = module(x)
        patch(module)
        got = module(x)
    assert status(module).fallbacks == fallbacks and got.dtype == want.dtype
    assert_rounding_apart(got.bfloat16(), want.bfloat16(), 128, 2)


def test_layers_without_nf4_are_nobodys():
    module = nn.Sequential(tt.LoRALinear(128, 256, 8, 16, quantize_base=False), tt.DoRALinear(256, 128, 8, 16, quantize_base=False))
    with pytest.warns(UserWarning, match="found nothing to patch"):
        assert patch(module).entries == ()


# The vision transformer


@pytest.mark.parametrize(
    "tiles, options",
    [
        (1, {}),
        (2, {"out_indices": [2, 0]}),
        (3, {"cls_out": 5}),
        (4, {"append_cls_token": True, "cls_out": 5, "out_indices": [1]}),
        (4, {"tile_size": 14, "out_indices": [1]}),  # left-over pixels
    ],
)
def test_vision(tiles, options):
    """Several images of up to `tiles` tiles, some of them padding, their position tables gated."""
    module, given = tt.vision(tiles, **options), pictures(F32, tiles, options.get("tile_size", 12))
    report = exchanged(module, given)
    assert [(e.host, e.op, e.layout) for e in report.entries] == [("torchtune", "patch_embed", "4 px patches, 9 to a tile")]
    out, hidden = module(**given)
    assert len(hidden) == len(options.get("out_indices", [])) and out.shape[3:] == ((1, 5) if "cls_out" in options else (10, 16))


def test_vision_without_ratios():
    exchanged(tt.vision(1), {"images": torch.randn(2, 2, 1, 3, 12, 12)})
    exchanged(tt.vision(4), {"images": torch.randn(2, 1, 1, 3, 12, 12)})


def of_another_dtype(module):
    for part in (module.cls_token_embedding, module.ln_post, module.layers, module.post_tile_pos_embed):
        part.double()


def lost_table(module):
    pre = module.pre_tile_pos_embed
    pre.__class__ = type("TilePositionalEmbedding", (nn.Module,), {"forward": lambda self, x, ratio: x, "__module__": "torchtune.models.clip"})
    pre.table = pre.embedding
    del pre.embedding


FRONTS = {
    "embedding": ("CHILD_TYPE", lambda m: setattr(m, "token_pos_embedding", type("Nothing", (nn.Module,), {"forward": lambda self, x, ratio: x})())),
    "norm": ("CHILD_TYPE", lambda m: setattr(m, "ln_pre", nn.LayerNorm(16))),
    "bias": ("GEOMETRY", lambda m: m.conv.register_parameter("bias", nn.Parameter(torch.randn(16)))),
    "stride": ("GEOMETRY", lambda m: setattr(m, "conv", nn.Conv2d(3, 16, 2, 4, padding=0, bias=False))),
    "grids": ("GEOMETRY", lambda m: setattr(m, "pre_tile_pos_embed", tt.TilePositionalEmbedding(5, 16))),
    "dtype": ("DTYPE", of_another_dtype),
    "last index": ("OUT_INDICES", lambda m: setattr(m, "out_indices", [0, 3])),
    "renamed table": ("STRUCTURE", lost_table),
}


@pytest.mark.parametrize("what", FRONTS)
def test_an_unusual_front_is_called(what):
    module, (code, change) = tt.vision(4), FRONTS[what]
    change(module)
    report = patch(module, dry_run=True)
    assert said(report) == [("planned", code)]
    assert what != "renamed table" or "TilePositionalEmbedding has no embedding" in report.entries[0].reason
    runs_its_own(module, pictures(F32), code)


# Cross-attention


@pytest.mark.parametrize(
    "mask, kv_heads, dtype, backend",
    [
        (None, 1, F32, "auto"),
        (None, 2, BF16, "torch"),
        ("none seen", 4, F32, "auto"),
        ("none seen", 1, F16, TRITON),
        ("holes", 4, F32, "torch"),
        ("holes", 1, BF16, "auto"),
    ],
)
def test_cross_attention(mask, kv_heads, dtype, backend):
    (entry,) = exchanged(tt.cross_layer(kv_heads=kv_heads).to(dtype), text(dtype, mask=mask), dtype, backend=backend).entries
    assert (entry.host, entry.op, entry.layout) == ("torchtune", "cross_attention", f"4 heads over {kv_heads} of 8")


def test_rows_that_see_nothing_stay_and_give_no_gradient():
    module, given = tt.cross_layer(linear=lambda a, b: nn.Linear(a, b)), text()
    patch(module)
    (out,), grads = results(module, given)
    assert torch.equal(out[0, :2], given["x"][0, :2]) and not torch.equal(out[0, 2:], given["x"][0, 2:])
    assert all(g is not None for draws in grads.values() for g in draws)


@pytest.mark.parametrize("cached", [False, True])
def test_masked_rows_uniform(cached):
    """Rows that see nothing attend to every token there is, and their MLP is left out."""
    module, given = tt.cross_layer(), text()
    attended = copy.deepcopy(module)
    patch(module, masked_rows="uniform")
    attended.mlp_scale.scale.data.zero_()
    seen = given["encoder_mask"] | ~given["encoder_mask"].any(-1, keepdim=True)
    want = attended(**(given | {"encoder_mask": seen}))
    if cached:
        module.attn.setup_cache(2, F32, 40)
        given["encoder_mask"] = nn.functional.pad(given["encoder_mask"], (0, 16))
    assert_rounding_apart(module(**given)[0, :2], want[0, :2], 64, 6)
    if cached:
        given["encoder_input"] = None
        assert_rounding_apart(module(**given)[0, :2], want[0, :2], 64, 6)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["auto", TRITON])
def test_with_a_cache(backend):
    """Text before any image, prefill in two goes, steps, a reset, the cache disabled: as the unpatched twin, its cache too."""
    module = tt.cross_layer()
    module.attn.setup_cache(2, F32, 32)
    twin = copy.deepcopy(module)
    patch(module, backend=backend)
    seen = torch.zeros(2, 6, 32, dtype=torch.bool)
    seen[:, 2:, :10] = True
    seen[1, :, 3:20:2] = True
    x, first, second = torch.randn(2, 6, 32), torch.randn(2, 12, 32), torch.randn(2, 8, 32)

    def both(x, encoder_input=None, encoder_mask=None):
        got, want = (m(x, encoder_input=encoder_input, encoder_mask=encoder_mask, mask=x, input_pos=x) for m in (module, twin))
        assert_rounding_apart(got, want, 64, 6)
        for name in ("k_cache", "v_cache", "cache_pos"):
            assert torch.equal(getattr(module.attn.kv_cache, name), getattr(twin.attn.kv_cache, name))
        return got

    assert both(x) is x
    both(x, first, seen)
    both(x[:, :1], None, seen[:, -1:])
    both(x[:, :1], second, seen[:, -1:])
    both(x[:, :1])
    both(x[:, :3], None, seen[:, :3])
    for m in (module, twin):
        m.attn.kv_cache.reset()
    assert both(x, None, seen) is x
    for m in (module, twin):
        m.attn.cache_enabled = False
    assert both(x) is x
    both(x, first, seen[..., :12])
    both(x, first)
    assert status(module).fallbacks == {}


@torch.no_grad()
def test_what_a_full_cache_says_is_said_once():
    """Its own error, and not a second update by the layer's own forward."""
    module, given = tt.cross_layer(), text(mask=None)
    module.attn.setup_cache(2, F32, 30)
    patch(module)
    module(**given)
    with pytest.raises(IndexError):
        module(**given)
    assert module.attn.kv_cache.size == 24 and status(module).fallbacks == {}


def test_projections_are_called():
    """They may be adapted, hooked or sharded: LoRA over NF4 inside of the layer is patched for itself."""
    module, seen = tt.cross_layer(128, kv_heads=4, linear=lambda a, b: tt.LoRALinear(a, b, 4, 8)), []
    for part in (module.attn.q_proj, module.mlp):
        part.register_forward_hook(lambda m, args, out: seen.append(m))
    report = exchanged(module, text(dim=128))
    assert report.counts == {"patched": 5} and {e.op for e in report.entries} == {"cross_attention", "nf4_lora_linear"}
    assert seen.count(module.mlp) == seen.count(module.attn.q_proj) == 2  # patched and given back


def with_hooked_cache(module, given):
    module.attn.kv_cache = tt.KVCache(2, 30, 2, 8, F32)
    module.attn.kv_cache.register_forward_hook(lambda m, args, out: out)


ATTENTIONS = {
    "float mask": ("MASK", lambda m, g: g.update(encoder_mask=torch.zeros(g["encoder_mask"].shape).masked_fill(~g["encoder_mask"], -torch.inf))),
    "a mask of one row for all of the text": ("MASK", lambda m, g: g.update(encoder_mask=g["encoder_mask"][:, 3:4])),
    "causal": ("CAUSAL", lambda m, g: setattr(m.attn, "is_causal", g.pop("encoder_mask") is not None)),
    "dropout": ("DROPOUT", lambda m, g: setattr(m.attn, "attn_dropout", 1e-9)),
    "attention call": ("ATTENTION", lambda m, g: setattr(m.attn, "_attention_call", lambda q, k, v, **kwargs: q)),
    "cache hook": ("HOOKED", with_hooked_cache),
    "keyword": ("ARGUMENTS", lambda m, g: g.update(something=3)),
}


@pytest.mark.parametrize("what", ATTENTIONS)
def test_an_unusual_attention_is_called(what):
    (module, given), (code, change) = (tt.cross_layer(), text()), ATTENTIONS[what]
    change(module, given)
    runs_its_own(module, given, code)


@torch.no_grad()
def test_no_image_is_no_reason():
    """Nor in a graph, which does not ask what the cache holds."""
    module, x, given = tt.cross_layer(), torch.randn(2, 1, 32), text()
    mask = given["encoder_mask"][:, -1:]
    patch(module)
    assert module(x) is x and module(x, encoder_mask=mask) is x
    module.attn.setup_cache(2, F32, 24)
    twin = copy.deepcopy(module)
    fastfuse.unpatch(twin)
    step = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(step(x, encoder_mask=mask), x)
    for call in (given, {"x": x, "encoder_mask": mask}):
        assert_rounding_apart(step(**call), twin(**call), 64, 6)
    assert status(module).fallbacks == {}


def test_verify():
    """Of a layer that drops, one that is causal, images of one tile, and one with a cache, which is not written to."""
    model = nn.ModuleDict({"lora": tt.adapted("lora", dropout=0.5), "one": tt.vision(1), "causal": tt.cross_layer(is_causal=True), "cached": tt.cross_layer()})
    model["cached"].attn.setup_cache(2, F32, 24)
    assert patch(model, verify=True).counts == {"patched": 4}
    assert model["causal"].attn.kv_cache is None and model["cached"].attn.kv_cache.size == 0


RATIO = pictures(F32)["aspect_ratio"]
RAISES = [
    (partial(tt.adapted, "lora"), (torch.randn(4, 128, dtype=BF16),), "DTYPE: the input is torch.bfloat16, the adapter torch.float32"),
    (partial(tt.vision, 1), (torch.randn(1, 1, 2, 3, 12, 12),), "ARGUMENTS"),
    *((partial(tt.vision, 4), (torch.randn(shape), RATIO), "") for shape in ((2, 2, 4, 3, 8, 12), (2, 2, 4, 1, 12, 12), (4, 3, 12, 12))),
    (partial(tt.vision, 4), (torch.randn(2, 2, 4, 3, 12, 12).double(), RATIO), ""),
]


@pytest.mark.parametrize("make, args, match", RAISES)
def test_what_does_not_fit_raises_as_it_did(make, args, match):
    module = make()
    with pytest.raises((RuntimeError, ValueError)) as before:
        module(*args)
    patch(module)
    with pytest.raises(type(before.value)) as after, pytest.warns(UserWarning, match=match):
        module(*args)
    assert str(before.value) == str(after.value)
