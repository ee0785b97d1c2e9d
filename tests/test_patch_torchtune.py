"""patch(model) over modules built as torchtune 0.6.1 builds them: the same answers and gradients before, during and after."""

import copy
import warnings

import peft
import pytest
import torch
import torchtune_modules as tt
from conftest import GPU
from numerics import assert_no_worse, assert_rounding_apart, in_several_orders
from qlora import quantized
from reference import assert_gradients_no_worse
from torch import nn

import fastfuse
from fastfuse import modules as own
from fastfuse.patching.hosts import torchtune

BACKENDS = ["auto", "torch", *([] if GPU else ["triton"])]  # the interpreter is for machines without a GPU
LINEARS = [("lora", False), ("lora", True), ("dora", False), ("dora", True), ("frozen", False), ("frozen", True)]
OPS = {"lora": "nf4_lora_linear", "dora": "nf4_lora_linear", "frozen": "nf4_linear"}


def run(module: nn.Module, given: dict, seed: int = 3) -> tuple[list, dict]:
    """All results, and the gradients of a random sum of them for every parameter and every floating input."""
    given = {n: t.detach().clone().requires_grad_() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for n, t in given.items()}
    out = module(**given)
    outs = [out] if isinstance(out, torch.Tensor) else [out[0], *out[1]]
    made = torch.Generator().manual_seed(seed)
    upstream = [torch.randn(o.shape, generator=made).to(o.dtype) for o in outs]
    leaves = {n: t for n, t in [*module.named_parameters(), *given.items()] if isinstance(t, torch.Tensor) and t.requires_grad}
    grads = torch.autograd.grad(outs, leaves.values(), upstream, allow_unused=True)
    return [o.detach() for o in outs], dict(zip(leaves, grads, strict=True))


def assert_same(got: tuple, want: tuple, K: int, products: int) -> None:
    for g, w in zip(got[0], want[0], strict=True):
        assert_rounding_apart(g, w, K, products)
    assert got[1].keys() == want[1].keys()
    for name, w in want[1].items():
        g = got[1][name]
        if w is None or not w.any():
            assert g is None or not g.any(), name
        else:
            assert_rounding_apart(g, w, K, 2 * products)


def exchanged(module: nn.Module, given: dict, K: int, products: int, **options) -> fastfuse.PatchReport:
    """Patches, compares values and gradients, unpatches, and compares to the bit."""
    before, want = dict(module.__dict__), run(module, given)
    report = fastfuse.patch(module, **options)
    got = run(module, given)
    assert fastfuse.status(module).fallbacks == {}
    assert_same(got, want, K, products)
    fastfuse.unpatch(module)
    assert module.__dict__ == before
    again = run(module, given)
    assert all(torch.equal(a, w) for a, w in zip(again[0], want[0], strict=True))
    assert all(a is w or torch.equal(a, w) for a, w in zip(again[1].values(), want[1].values(), strict=True))
    return report


def runs_its_own(module: nn.Module, given: dict, code: str) -> None:
    """A patched call gives to the bit what the module's own forward gives, and says why."""
    want = run(module, given)
    fastfuse.patch(module)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        got = run(module, given)
    assert set(fastfuse.status(module).fallbacks) == {code}
    assert all(torch.equal(g, w) for g, w in zip(got[0], want[0], strict=True))
    assert all(g is w or torch.equal(g, w) for g, w in zip(got[1].values(), want[1].values(), strict=True))


def no_worse(module: nn.Module, given: dict, exact: nn.Module, **options) -> None:
    """In half precision, against the same module in float64."""
    wide = {n: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t for n, t in given.items()}
    draws = range(8)
    eager = in_several_orders(lambda: [run(module, given, seed) for seed in draws])
    with fastfuse.patched(module, **options):
        fused = [run(module, given, seed) for seed in draws]
        assert fastfuse.status(module).fallbacks == {}
    true = [run(exact, wide, seed) for seed in draws]
    for values in zip(fused[0][0], zip(*(order[0][0] for order in eager), strict=True), true[0][0], strict=True):
        assert_no_worse(*values)
    names = [n for n, g in fused[0][1].items() if g is not None]
    got, exact, *eager = ({n: tuple(draw[1][n] for draw in draws_of) for n in names} for draws_of in (fused, true, *eager))
    assert_gradients_no_worse(got, eager, exact)


# Linear layers


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("kind, bias", LINEARS)
def test_linear_layers(kind, bias, backend):
    module, x = tt.adapted(kind, use_bias=bias), torch.randn(2, 7, 128)
    report = exchanged(module, {"input" if kind == "frozen" else "x": x}, 256, 4, backend=backend)
    (entry,) = report.entries
    assert (entry.host, entry.op, entry.status, entry.module_type) == ("torchtune", OPS[kind], "patched", type(module).__name__)
    assert entry.layout.startswith("torchao, blocks of 64")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind, bias", LINEARS)
def test_linear_layers_in_half_precision(kind, bias, dtype):
    module = tt.adapted(kind, use_bias=bias, dtype=dtype)
    exact = tt.adapted(kind, use_bias=bias)
    weight = fastfuse.ops.nf4_dequantize_ref(fastfuse.quant.NF4View.of(module.weight), dtype)
    exact.weight = nn.Parameter(weight.double(), requires_grad=False)
    for name, p in module.named_parameters():
        if name != "weight":
            exact.get_parameter(name).data = p.detach().double()
    no_worse(module, {"input" if kind == "frozen" else "x": torch.randn(9, 128, dtype=dtype)}, exact)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_disabled_and_merged(kind):
    """disabled leaves the base; merged is a note that torchtune's forward does not read."""
    module, x = tt.adapted(kind, use_bias=True, dropout=0.5), torch.randn(3, 128)
    module.disabled = True
    exchanged(module, {"x": x}, 128, 1)
    module.disabled, module.merged = False, True
    exchanged(module.eval(), {"x": x}, 256, 4)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_dropout(kind, bias):
    """Another mask for a seed, the same distribution; backward draws the forward's mask."""
    module, x, draws = tt.adapted(kind, use_bias=bias, dropout=0.25), torch.randn(5, 128), 128
    with torch.no_grad():
        module.lora_b.weight.mul_(20)  # an update worth dropping
    twin, training = copy.deepcopy(module).eval(), copy.deepcopy(module)
    fastfuse.patch(module)
    with torch.no_grad():
        want = twin(x).double()
        drawn, before = (torch.stack([m(x).double() for _ in range(draws)]) for m in (module, training))
    assert fastfuse.status(module).fallbacks == {} and not torch.equal(drawn[0], drawn[1])
    spread = drawn.var(0).sum()
    assert (drawn.mean(0) - want).norm() ** 2 <= 4 * spread / draws  # twice the standard error
    # The update has rank 8: 5 x 8 independent variances, each known to sqrt(2 / draws).
    assert abs(spread / before.var(0).sum() - 1) < 3 * 2**0.5 * (2 / draws / 40) ** 0.5
    state = torch.get_rng_state()
    y = module(x)
    (dA,) = torch.autograd.grad(y, module.lora_a.weight, y.detach())
    torch.set_rng_state(state)
    assert torch.equal(module(x), y)
    if kind == "lora":  # the update is linear in A, its gradient is what doubling A adds; DoRA's norm would move
        a = module.lora_a.weight.detach().clone()
        module.lora_a.weight.data.mul_(2)
        torch.set_rng_state(state)
        assert_rounding_apart((y * (module(x) - y)).sum(), (dA * a).sum(), 256, 4)
        module.lora_a.weight.data.copy_(a)
    module.dropout.p = 0.0
    assert_rounding_apart(module(x), twin(x), 256, 4)


@pytest.mark.parametrize("where", ["hook", "subclass", "rebound", "bias", "dropout", "global hook"])
@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_an_adapter_that_does_more_is_called(kind, where):
    module, handle = tt.adapted(kind), None
    code = {"hook": "HOOKED", "subclass": "CHILD_TYPE", "rebound": "CHILD_TYPE", "bias": "LORA_BIAS", "dropout": "DROPOUT", "global hook": "HOOKED"}[where]
    if where == "hook":
        module.lora_a.register_forward_hook(lambda m, args, out: out * 2)
    elif where == "subclass":
        module.lora_b.__class__ = type("Louder", (nn.Linear,), {"forward": lambda self, x: 2 * nn.Linear.forward(self, x)})
    elif where == "rebound":
        module.lora_b.forward = lambda x, m=module.lora_b: 3 * nn.Linear.forward(m, x)
    elif where == "bias":
        module.lora_b.bias = nn.Parameter(torch.randn(256))
    elif where == "dropout":
        module.dropout = nn.ReLU()
    else:
        handle = nn.modules.module.register_module_forward_hook(lambda m, args, out: None)
    try:
        runs_its_own(module, {"x": torch.randn(4, 128)}, code)
    finally:
        if handle is not None:
            handle.remove()


def test_lora_over_lora_is_called():
    """A factor that carries an adapter of its own."""
    module = tt.adapted("lora")
    module.lora_b = peft.tuners.lora.Linear(module.lora_b, "default", peft.LoraConfig(r=2, lora_alpha=2), r=2)
    runs_its_own(module, {"x": torch.randn(4, 128)}, "CHILD_TYPE")


@pytest.mark.parametrize("kind", ["lora", "dora", "frozen"])
def test_a_bias_of_another_dtype_promotes_as_it_did(kind):
    module, x = tt.adapted(kind, use_bias=True, dtype=torch.bfloat16), torch.randn(6, 128, dtype=torch.bfloat16)
    module.bias = nn.Parameter(torch.randn(256))
    eager, exact = in_several_orders(module, x), copy.deepcopy(module)
    exact.weight = nn.Parameter(fastfuse.ops.nf4_dequantize_ref(fastfuse.quant.NF4View.of(module.weight), torch.float64), requires_grad=False)
    with fastfuse.patched(module):
        got = module(x)
        assert fastfuse.status(module).fallbacks == {}
    assert got.dtype == eager[0].dtype == torch.float32
    assert_no_worse(got, eager, exact.double()(x.double()))


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind, bias", LINEARS)
def test_autocast(kind, bias, x_dtype):
    """fp32 modules, and what dtype their own forward gives."""
    module, x = tt.adapted(kind, use_bias=bias), torch.randn(6, 128, dtype=x_dtype)
    with torch.autocast("cpu", torch.bfloat16):
        want = module(x)
        with fastfuse.patched(module), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            got = module(x)
            assert fastfuse.status(module).fallbacks == ({} if kind != "dora" else {"AUTOCAST": 1} if x_dtype == torch.float32 else {"DTYPE": 1})
    assert got.dtype == want.dtype
    # The product rounds to bf16, whatever the sum is in.
    assert_rounding_apart(got.bfloat16(), want.bfloat16(), 128, 2)


def test_dtypes_that_do_not_fit_raise_as_they_did():
    module, x = tt.adapted("lora"), torch.randn(4, 128, dtype=torch.bfloat16)
    with pytest.raises(RuntimeError) as before:
        module(x)
    fastfuse.patch(module)
    with pytest.raises(RuntimeError) as after, pytest.warns(UserWarning, match="DTYPE: the input is torch.bfloat16, the adapter torch.float32"):
        module(x)
    assert str(before.value) == str(after.value)


def test_layers_without_nf4_are_nobodys():
    module = nn.Sequential(tt.LoRALinear(128, 256, 8, 16, quantize_base=False), tt.DoRALinear(256, 128, 8, 16, quantize_base=False))
    with pytest.warns(UserWarning, match="found nothing to patch"):
        assert fastfuse.patch(module).entries == ()


def test_other_layers_keep_their_hosts():
    model = quantized("torchao")
    assert not any(host.matches(m) for host in torchtune.HOSTS for m in model.modules())
    model = quantized("bitsandbytes")
    model.is_loaded_in_4bit = True
    model = peft.get_peft_model(model, peft.LoraConfig(r=8, target_modules=["up", "down"]))
    assert not any(host.matches(m) for host in torchtune.HOSTS for m in model.modules())
    assert {e.host for e in fastfuse.patch(model).patched} == {"PEFT LoRA", "bitsandbytes"}
    ours = own.peft.LoRALinear(128, 256, 8, 16, quantize_base=True)
    assert [(e.host, e.status) for e in fastfuse.status(ours).entries] == [("fastfuse", "already")]


def test_a_layer_fake_quantized_in_training_is_skipped():
    """A subclass with a forward of its own."""
    module = tt.adapted("lora")
    module.__class__ = type("QuantizedLoRALinear", (tt.LoRALinear,), {"forward": lambda self, x: tt.LoRALinear.forward(self, x.round())})
    report = fastfuse.patch(module)
    assert [(e.status, e.code) for e in report.entries] == [("skipped", "FOREIGN_FORWARD")]


# The vision transformer

RATIOS = {1: [[1, 1]] * 4, 2: [[1, 2], [2, 1], [1, 1], [0, 0]], 3: [[1, 3], [1, 2], [3, 1], [1, 1]], 4: [[2, 2], [1, 3], [4, 1], [1, 1]]}


def pictures(tiles: int, **options) -> dict:
    ratio = torch.tensor(RATIOS[tiles]).view(2, 2, 2)
    return {"images": torch.randn(2, 2, tiles, 3, options.get("size", 12), options.get("size", 12)), "aspect_ratio": ratio}


@pytest.mark.parametrize("tiles, backend", [*((tiles, "auto") for tiles in (1, 2, 3)), *((4, backend) for backend in BACKENDS)])
def test_vision(tiles, backend):
    """Several images of up to `tiles` tiles, some of them padding, their position tables gated."""
    report = exchanged(tt.vision(tiles), pictures(tiles), 64, 12, backend=backend)
    assert [(e.host, e.op, e.status, e.layout) for e in report.entries] == [("torchtune", "patch_embed", "patched", "4 px patches, 9 to a tile")]


@pytest.mark.parametrize(
    "options",
    [{"out_indices": [2, 0]}, {"cls_out": 5}, {"append_cls_token": True, "cls_out": 5, "out_indices": [1]}, {"tile_size": 14, "out_indices": [1]}],
    ids=["out_indices", "cls_projection", "CLS last", "left-over pixels"],
)
def test_what_vision_gives(options):
    given = pictures(4, size=options.get("tile_size", 12))
    module = tt.vision(4, **options)
    exchanged(module, given, 64, 12)
    out, hidden = module(**given)
    assert len(hidden) == len(options.get("out_indices", [])) and out.shape[3:] == ((1, 5) if "cls_out" in options else (10, 16))


def test_vision_without_ratios():
    module = tt.vision(1)
    exchanged(module, {"images": torch.randn(2, 2, 1, 3, 12, 12)}, 64, 12)
    exchanged(tt.vision(4), {"images": torch.randn(2, 1, 1, 3, 12, 12)}, 64, 12)
    fastfuse.patch(module)
    with pytest.raises(ValueError, match="several tiles and no aspect_ratio"), pytest.warns(UserWarning, match="ARGUMENTS"):
        module(torch.randn(1, 1, 2, 3, 12, 12))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_vision_in_half_precision(dtype):
    module = tt.vision(4, out_indices=[0, 2]).to(dtype)
    given = pictures(4)
    given["images"] = given["images"].to(dtype)
    no_worse(module, given, copy.deepcopy(module).double())


def test_vision_under_autocast():
    module, given = tt.vision(4, out_indices=[0]), pictures(4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        want, want_hidden = module(**given)
        fastfuse.patch(module)
        got, got_hidden = module(**given)
    assert fastfuse.status(module).fallbacks == {} and got.dtype == want.dtype and got_hidden[0].dtype == want_hidden[0].dtype == torch.float32
    assert_rounding_apart(got_hidden[0].bfloat16(), want_hidden[0].bfloat16(), 64, 2)


@pytest.mark.parametrize(
    "what, code",
    [("hook", "HOOKED"), ("embedding", "CHILD_TYPE"), ("subclass", "CHILD_TYPE"), ("norm", "CHILD_TYPE"), ("bias", "GEOMETRY"), ("stride", "GEOMETRY"),
     ("grids", "GEOMETRY"), ("dtype", "DTYPE"), ("last index", "OUT_INDICES")],
)  # fmt: skip
def test_an_unusual_front_is_called(what, code):
    module, given = tt.vision(4), pictures(4)
    if what == "hook":
        module.ln_pre.register_forward_hook(lambda m, args, out: out * 2)
    elif what == "embedding":
        module.token_pos_embedding = type("Nothing", (nn.Module,), {"forward": lambda self, x, ratio: x})()
    elif what == "subclass":
        module.pre_tile_pos_embed.__class__ = type("Louder", (tt.TilePositionalEmbedding,), {})
    elif what == "norm":
        module.ln_pre = nn.LayerNorm(16)
    elif what == "bias":
        module.conv.bias = nn.Parameter(torch.randn(16))
    elif what == "stride":
        module.conv = nn.Conv2d(3, 16, 2, 4, padding=0, bias=False)
    elif what == "grids":
        module.pre_tile_pos_embed = tt.TilePositionalEmbedding(5, 16)
    elif what == "dtype":
        module.cls_token_embedding.double()
        module.ln_post.double()
        module.layers.double()
        module.post_tile_pos_embed.double()
    else:
        module.out_indices = [0, 3]
    report = fastfuse.patch(module, dry_run=True)
    assert [(e.status, e.code) for e in report.entries] == [("planned", code)]
    runs_its_own(module, given, code)


def test_a_hooked_embedding_after_the_layers_is_called():
    module, seen = tt.vision(4), []
    module.post_tile_pos_embed.register_forward_hook(lambda m, args, out: seen.append(1))
    exchanged(module, pictures(4), 64, 12)
    assert len(seen) == 3


@pytest.mark.parametrize(
    "images", [torch.randn(2, 2, 4, 3, 8, 12), torch.randn(2, 2, 4, 1, 12, 12), torch.randn(2, 2, 4, 3, 12, 12).double(), torch.randn(4, 3, 12, 12)]
)
def test_images_that_do_not_fit_raise_as_they_did(images):
    module, ratio = tt.vision(4), torch.tensor(RATIOS[4]).view(2, 2, 2)
    with pytest.raises((RuntimeError, ValueError)) as before:
        module(images, ratio)
    fastfuse.patch(module)
    with pytest.raises((RuntimeError, ValueError)) as after, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        module(images, ratio)
    assert str(before.value) == str(after.value)


# Cross-attention


def text(b: int = 2, s: int = 6, s_e: int = 24, dim: int = 32, mask: str | None = "holes") -> dict:
    """Text, image tokens, and a mask in which the first two rows of the first sample see nothing."""
    given = {"x": torch.randn(b, s, dim), "encoder_input": torch.randn(b, s_e, dim)}
    if mask is not None:
        seen = torch.rand(b, s, s_e) < 0.5
        seen[..., :4] = True
        seen[0, :2] = False
        given["encoder_mask"] = seen.all(-1, keepdim=True).expand(b, s, s_e) if mask == "none seen" else seen
    return given


@pytest.mark.parametrize(
    "mask, kv_heads, backend",
    [*((mask, n, "auto") for mask in (None, "none seen") for n in (1, 2, 4)), *(("holes", 2, b) for b in BACKENDS), ("holes", 4, "auto")],
)
def test_cross_attention(mask, kv_heads, backend):
    module = tt.cross_layer(kv_heads=kv_heads)
    report = exchanged(module, text(mask=mask), 64, 10, backend=backend)
    entry = report.entries[0]
    assert (entry.host, entry.op, entry.status, entry.layout) == ("torchtune", "cross_attention", "patched", f"4 heads over {kv_heads} of 8")


def test_rows_that_see_nothing_stay_and_give_no_gradient():
    module, given = tt.cross_layer(linear=lambda a, b: nn.Linear(a, b)), text()
    fastfuse.patch(module)
    (out,), grads = run(module, given)
    assert torch.equal(out[0, :2], given["x"][0, :2]) and not torch.equal(out[0, 2:], given["x"][0, 2:])
    assert all(g is not None for g in grads.values())


@pytest.mark.parametrize("cached", [False, True])
def test_masked_rows_uniform(cached):
    """Rows that see nothing attend to every token there is, and their MLP is left out."""
    module, given = tt.cross_layer(), text()
    fastfuse.patch(module, masked_rows="uniform")
    attended = copy.deepcopy(module)
    fastfuse.unpatch(attended)
    attended.mlp_scale.scale.data.zero_()
    seen = given["encoder_mask"] | ~given["encoder_mask"].any(-1, keepdim=True)
    want = attended(**(given | {"encoder_mask": seen}))
    if cached:
        module.attn.setup_cache(2, torch.float32, 40)
        given["encoder_mask"] = torch.nn.functional.pad(given["encoder_mask"], (0, 16))
    assert_rounding_apart(module(**given)[0, :2], want[0, :2], 64, 6)
    if cached:
        given["encoder_input"] = None
        assert_rounding_apart(module(**given)[0, :2], want[0, :2], 64, 6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("mask", [None, "holes"])
def test_cross_attention_in_half_precision(mask, dtype):
    module = tt.cross_layer().to(dtype)
    given = {n: t.to(dtype) if t.is_floating_point() else t for n, t in text(mask=mask).items()}
    no_worse(module, given, copy.deepcopy(module).double())


@torch.no_grad()
@pytest.mark.parametrize("backend", BACKENDS)
def test_with_a_cache(backend):
    """Text before any image, prefill in two goes, steps, a reset, the cache disabled: as the unpatched twin, its cache too."""
    module = tt.cross_layer()
    module.attn.setup_cache(2, torch.float32, 32)
    twin = copy.deepcopy(module)
    fastfuse.patch(module, backend=backend)
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
    assert fastfuse.status(module).fallbacks == {}


@torch.no_grad()
def test_what_a_full_cache_says_is_said_once():
    """Its own error, and not a second update by the layer's own forward."""
    module, given = tt.cross_layer(), text(mask=None)
    module.attn.setup_cache(2, torch.float32, 30)
    fastfuse.patch(module)
    module(**given)
    with pytest.raises(IndexError):
        module(**given)
    assert module.attn.kv_cache.size == 24 and fastfuse.status(module).fallbacks == {}


def test_projections_are_called():
    """They may be adapted, hooked or sharded: LoRA over NF4 inside of the layer is patched for itself."""
    module, seen = tt.cross_layer(64, linear=lambda a, b: tt.LoRALinear(a, b, 4, 8)), []
    module.attn.q_proj.register_forward_hook(lambda m, args, out: seen.append(m))
    module.mlp.register_forward_hook(lambda m, args, out: seen.append(m))
    report = exchanged(module, text(dim=64), 64, 14)
    assert report.counts == {"patched": 5} and {e.op for e in report.entries} == {"cross_attention", "nf4_lora_linear"}
    assert len(seen) == 6


@pytest.mark.parametrize(
    "what, code",
    [("float mask", "MASK"), ("wide mask", "MASK"), ("causal", "CAUSAL"), ("dropout", "DROPOUT"), ("attention call", "ATTENTION"), ("hook", "HOOKED"),
     ("cache hook", "HOOKED"), ("attn", "CHILD_TYPE"), ("keyword", "ARGUMENTS")],
)  # fmt: skip
def test_an_unusual_attention_is_called(what, code):
    module, given = tt.cross_layer(is_causal=what == "causal"), text(mask=None if what in ("causal", "dropout") else "holes")
    if what == "float mask":
        given["encoder_mask"] = torch.zeros(given["encoder_mask"].shape).masked_fill(~given["encoder_mask"], -torch.inf)
    elif what == "wide mask":
        given["encoder_mask"] = given["encoder_mask"][:, 3:4]  # of one row for all of the text
    elif what == "dropout":
        module.attn.attn_dropout = 1e-9
    elif what == "attention call":
        module.attn._attention_call = lambda q, k, v, **kwargs: q
    elif what == "hook":
        module.attn.register_forward_hook(lambda m, args, out: out * 2)
    elif what == "cache hook":
        module.attn.kv_cache = tt.KVCache(2, 30, 2, 8, torch.float32)
        module.attn.kv_cache.register_forward_hook(lambda m, args, out: out)
    elif what == "attn":
        module.attn.__class__ = type("Attention", (tt.MultiHeadAttention,), {})
    elif what == "keyword":
        given["something"] = 3
    runs_its_own(module, given, code)


def test_no_image_is_no_reason():
    module, x = tt.cross_layer(), torch.randn(2, 3, 32)
    fastfuse.patch(module)
    assert module(x) is x and module(x, encoder_mask=torch.ones(2, 3, 5, dtype=torch.bool)) is x
    assert fastfuse.status(module).fallbacks == {}


# All of them

MODULES = {
    "lora": (lambda: tt.adapted("lora", use_bias=True), lambda: {"x": torch.randn(4, 128)}, "alpha"),
    "dora": (lambda: tt.adapted("dora", use_bias=True), lambda: {"x": torch.randn(4, 128)}, "magnitude"),
    "frozen": (lambda: tt.adapted("frozen", use_bias=True), lambda: {"input": torch.randn(4, 128)}, "bias"),
    "vision": (lambda: tt.vision(4, out_indices=[1]), lambda: pictures(4), "token_pos_embedding"),
    "cross": (tt.cross_layer, text, "ca_scale"),
}


@pytest.mark.parametrize("kind", MODULES)
def test_compile_fullgraph(kind):
    make, arguments, _ = MODULES[kind]
    module, given = make(), arguments()
    want = run(module, given)
    fastfuse.patch(module)
    got = run(torch.compile(module, fullgraph=True, backend="aot_eager"), given)
    got = got[0], {name.removeprefix("_orig_mod."): g for name, g in got[1].items()}
    assert_same(got, want, 256, 12)
    assert fastfuse.status(module).fallbacks == {}


@torch.no_grad()
def test_compiled_steps_do_not_ask_what_the_cache_holds():
    module = tt.cross_layer()
    module.attn.setup_cache(2, torch.float32, 24)
    twin, given = copy.deepcopy(module), text()
    fastfuse.patch(module)
    step = torch.compile(module, fullgraph=True, backend="aot_eager")
    x, mask = torch.randn(2, 1, 32), given["encoder_mask"][:, -1:]
    assert torch.equal(step(x, encoder_mask=mask), x)
    for call in (given, {"x": x, "encoder_mask": mask}):
        assert_rounding_apart(step(**call), twin(**call), 64, 6)


@pytest.mark.parametrize("kind", MODULES)
def test_a_renamed_attribute_is_reported(kind):
    make, _, name = MODULES[kind]
    module = make()
    setattr(module, f"{name}_", getattr(module, name))
    delattr(module, name)
    report = fastfuse.patch(module)
    assert [(e.status, e.code) for e in report.entries] == [("skipped", "STRUCTURE")]
    assert f"{type(module).__name__} has no {name}" in report.entries[0].reason and "_fastfuse" not in module.__dict__


@pytest.mark.parametrize("kind", MODULES)
def test_a_renamed_argument_is_reported(kind):
    module = MODULES[kind][0]()
    cls = type(module)
    forward = lambda self, anything=None: None  # noqa: E731
    forward.__module__ = cls.__module__
    module.__class__ = type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})
    assert [(e.status, e.code) for e in fastfuse.patch(module).entries] == [("skipped", "SIGNATURE")]


def test_a_renamed_weight_is_reported():
    module = tt.adapted("lora")
    module.base = module.weight
    del module.weight
    assert [(e.code, e.reason.split(":")[0]) for e in fastfuse.patch(module).entries] == [("STRUCTURE", "LoRALinear has no weight")]


def test_a_renamed_part_of_a_child_is_reported():
    module, given = tt.vision(4), pictures(4)
    pre = module.pre_tile_pos_embed
    pre.__class__ = type("TilePositionalEmbedding", (nn.Module,), {"forward": lambda self, x, ratio: x, "__module__": "torchtune.models.clip"})
    pre.table = pre.embedding
    del pre.embedding
    report = fastfuse.patch(module, dry_run=True)
    assert [e.code for e in report.entries] == ["STRUCTURE"] and "TilePositionalEmbedding has no embedding" in report.entries[0].reason
    runs_its_own(module, given, "STRUCTURE")


@pytest.mark.parametrize("kind", MODULES)
def test_deepcopy_stays_patched(kind):
    make, arguments, _ = MODULES[kind]
    module, given = make(), arguments()
    fastfuse.patch(module)
    copied = copy.deepcopy(module)
    assert fastfuse.status(copied).counts == {"patched": 1}
    assert all(torch.equal(a, b) for a, b in zip(run(copied, given)[0], run(module, given)[0], strict=True))
    fastfuse.unpatch(copied)
    assert "forward" not in copied.__dict__ and fastfuse.status(module).counts == {"patched": 1}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_verify(dtype):
    model = nn.ModuleDict({"lora": tt.adapted("lora", use_bias=True, dropout=0.5, dtype=dtype), "dora": tt.adapted("dora", use_bias=True, dtype=dtype)})
    model["frozen"], model["clip"], model["one"] = tt.adapted("frozen", dtype=dtype), tt.vision(4).to(dtype), tt.vision(1).to(dtype)
    model["cross"] = tt.cross_layer(is_causal=True).to(dtype)
    state = torch.get_rng_state()
    assert fastfuse.patch(model, verify=True).counts == {"patched": 6}
    assert torch.equal(torch.get_rng_state(), state)
    assert model["cross"].attn.kv_cache is None


def test_verify_does_not_write_to_a_cache():
    module = tt.cross_layer()
    module.attn.setup_cache(2, torch.float32, 24)
    assert fastfuse.patch(module, verify=True).counts == {"patched": 1} and module.attn.kv_cache.size == 0
