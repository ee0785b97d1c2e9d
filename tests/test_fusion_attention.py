"""Cross-attention of whole models over an EncoderMask: prepared once, the same result as over a tensor, nothing of the mask's dense size made."""

import contextlib
import copy
import pickle
from collections import Counter
from functools import partial

import pytest
import reference
import torch
import torch._dynamo.testing
from numerics import assert_no_worse, assert_rounding_apart, in_several_orders
from reference import DTYPES, FUSED, HEADS, VOCAB, D, assert_matches, make_attention, make_cross_layer, make_self_layer, shaken
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from waiting import Allocated

import fastfuse
from fastfuse.generation import generate, generate_next_token
from fastfuse.modules import MultiHeadAttention, RMSNorm, RotaryPositionalEmbeddings, TransformerCrossAttentionLayer, TransformerDecoder, local_kv_cache
from fastfuse.modules.attention_utils import sdpa_or_flex_attention
from fastfuse.modules.model_fusion import DeepFusionModel, FusionEmbedding, FusionLayer
from fastfuse.modules.transformer import cross_attention_of
from fastfuse.ops import EncoderMask

IMAGE = VOCAB  # the first fusion token
PER_TILE, N_TILES = 3, 2


def text(b: int = 2, s: int = 9) -> Tensor:
    """Row 0 starts with text that sees nothing, then an image; row 1 has two images with text between them."""
    tokens = torch.randint(0, VOCAB, (b, s))
    tokens[0, 2] = tokens[1, 0] = tokens[1, 4] = IMAGE
    return tokens


TILES = torch.tensor([[1, 0], [1, 2]])  # of each image, real ones: the first row has one image, and the other one's padding


def rule(tokens: Tensor, tiles: Tensor, per_tile: int = PER_TILE) -> Tensor:
    """bool [b, s, n_img, N_TILES]: text sees the real tiles of the image before it."""
    visible = torch.zeros(*tokens.shape, tiles.shape[1], N_TILES, dtype=torch.bool)
    for row, ids in enumerate(tokens.tolist()):
        image = -1
        for t, token in enumerate(ids):
            image += token == IMAGE
            if image >= 0:
                visible[row, t, image, : tiles[row, image]] = True
    return visible


def dense_of(visible: Tensor, per_tile: int = PER_TILE) -> Tensor:
    return visible.repeat_interleave(per_tile, 3).flatten(2)


TEXT = torch.manual_seed(3) and text()
VISIBLE = rule(TEXT, TILES)
DENSE = dense_of(VISIBLE)
S_E = DENSE.shape[2]
HOLES = torch.rand(*DENSE.shape[:2], S_E, generator=torch.Generator().manual_seed(1)) < 0.5
HOLES[0, 3] = HOLES[1, 0] = False
FORMS = {
    "tensor": lambda: DENSE.clone(),
    "tensor of any rows": lambda: HOLES.clone(),
    "bits": lambda: EncoderMask.from_dense(DENSE, kind="bits"),
    "bits of any rows": lambda: EncoderMask.from_dense(HOLES),
    "intervals": lambda: EncoderMask.from_dense(DENSE, kind="interval"),
    "tiles": lambda: EncoderMask.from_tiles(VISIBLE, PER_TILE),
    "tokens": lambda: EncoderMask.from_tokens(TEXT, IMAGE, TILES, N_TILES, PER_TILE),
    "none": lambda: None,
}


def as_dense(mask: Tensor | EncoderMask | None) -> Tensor | None:
    return mask.to_dense() if isinstance(mask, EncoderMask) else mask


def make_decoder(empty_rows: str = "zero", **kwargs) -> TransformerDecoder:
    """Four layers: fusion, self-attention, fusion with the cross-attention behind, cross-attention alone."""
    rope = RotaryPositionalEmbeddings(4, max_seq_len=64)
    cross = partial(make_cross_layer, empty_rows=empty_rows)
    layers = [FusionLayer(make_self_layer(rope), cross()), make_self_layer(rope), FusionLayer(make_self_layer(rope), cross(), fusion_first=False), cross()]
    rest = {"tok_embeddings": FusionEmbedding(VOCAB, FUSED, D), "norm": shaken(RMSNorm(D, 1e-5)), "output": nn.Linear(D, VOCAB, bias=False)}
    return TransformerDecoder(layers=layers, max_seq_len=64, num_heads=HEADS, head_dim=4, **rest, **kwargs)


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.projection = nn.Linear(5, D)

    def forward(self, images):
        return self.projection(images)


def make_model(empty_rows: str = "zero") -> DeepFusionModel:
    return DeepFusionModel(make_decoder(empty_rows), Encoder(), decoder_trainable=True, encoder_trainable=True)


def make_small_model(empty_rows: str) -> DeepFusionModel:
    """Two layers, which take a fraction of the time to compile."""
    model = make_model(empty_rows)
    model.decoder.layers = model.decoder.layers[::3]
    return model


def cross_formula(m, x, y, mask):
    """reference.cross_layer, and transformers' rule: a row that sees nothing attends to everything, and leaves out the MLP alone."""
    if mask is None or m.empty_rows == "zero":
        return reference.cross_layer(m, x, y, mask)
    sees = mask.any(-1, keepdim=True)
    h = x + reference.attention(m.attn, reference.rms(x, m.ca_norm.scale, m.ca_norm.eps), y, mask | ~sees) * torch.tanh(m.ca_scale.scale)
    out = h + reference.mlp(m.mlp, reference.rms(h, m.mlp_norm.scale, m.mlp_norm.eps)) * torch.tanh(m.mlp_scale.scale)
    return torch.where(sees, out, h)


def decoder_formula(m, tokens, y, mask):
    h = reference.embed(m.tok_embeddings, tokens)
    for layer in m.layers:
        parts = [layer]
        if isinstance(layer, FusionLayer):
            parts = [layer.fusion_layer, layer.layer] if layer.fusion_first else [layer.layer, layer.fusion_layer]
        for part in parts:
            h = cross_formula(part, h, y, mask) if isinstance(part, TransformerCrossAttentionLayer) else reference.self_layer(part, h)
    return reference.wide(reference.linear(m.output, reference.rms(h, m.norm.scale, m.norm.eps)))


def model_formula(m, tokens, images, mask):
    return decoder_formula(m.decoder, tokens, reference.linear(m.encoder.projection, images), mask)


@pytest.fixture
def images():
    return torch.randn(2, S_E, 5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("empty_rows", ["zero", "uniform"])
@pytest.mark.parametrize("form", FORMS)
def test_a_layer_and_every_gradient(form, empty_rows, dtype):
    mask = FORMS[form]()
    assert_matches(
        make_cross_layer(empty_rows=empty_rows),
        lambda m, x, y: m(x, encoder_input=y, encoder_mask=mask),
        lambda m, x, y: cross_formula(m, x, y, as_dense(mask)),
        {"x": torch.randn(2, 9, D), "y": torch.randn(2, S_E, D)},
        dtype,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("empty_rows", ["zero", "uniform"])
@pytest.mark.parametrize("form", FORMS)
def test_the_whole_model_and_every_gradient(form, empty_rows, dtype, images):
    mask = FORMS[form]()
    assert_matches(
        make_model(empty_rows),
        lambda m, tokens, images: m(tokens, encoder_input={"images": images}, encoder_mask=mask),
        lambda m, tokens, images: model_formula(m, tokens, images, as_dense(mask)),
        {"tokens": TEXT, "images": images},
        dtype,
    )


def test_the_masks_of_these_tests_tell_what_they_should():
    masks = {name: make() for name, make in FORMS.items()}
    for name in ("bits", "intervals", "tiles", "tokens"):
        assert torch.equal(masks[name].to_dense(), DENSE), name
    assert [masks[n].kind for n in ("bits", "bits of any rows", "intervals")] == ["bits", "bits", "interval"]
    assert all(not m.any(-1).all() and m.any() and not m.all(-1).all() for m in (DENSE, HOLES))
    assert not DENSE[1, -1, :6].any() and not DENSE[1, 1, 3:].any(), "each image by its own text, its real tiles alone"


def test_one_mask_for_the_batch():
    layer, x, y = make_cross_layer(), torch.randn(2, 9, D), torch.randn(2, S_E, D)
    want = layer(x, encoder_input=y, encoder_mask=HOLES[:1].expand(2, -1, -1))
    for mask in (HOLES[:1], EncoderMask.from_dense(HOLES[:1])):
        assert_rounding_apart(layer(x, encoder_input=y, encoder_mask=mask), want, D, products=8)


def rows_of(mask: Tensor | EncoderMask | None, start: int, stop: int):
    if mask is None:
        return None
    return mask.narrow(start, stop - start) if isinstance(mask, EncoderMask) else mask[:, start:stop]


def widened(mask: Tensor | EncoderMask, width: int):
    return mask.widened(width) if isinstance(mask, EncoderMask) else nn.functional.pad(mask, (0, width - mask.shape[2]))


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("more", [0, 5])
@pytest.mark.parametrize("empty_rows", ["zero", "uniform"])
@pytest.mark.parametrize("form", [f for f in FORMS if f != "none"])
def test_cached_steps_equal_the_whole(form, empty_rows, more, dtype, images):
    """In caches wider than what they hold the tail is nobody's, rows that see nothing included; a second run after a reset is the first."""
    model, mask, images = make_model(empty_rows).to(dtype), FORMS[form](), images.to(dtype)
    eager = in_several_orders(model_formula, model, TEXT, images, as_dense(mask))
    exact = model_formula(copy.deepcopy(model).double(), TEXT, images.double(), as_dense(mask))
    model.setup_caches(2, dtype, encoder_max_seq_len=S_E + more, decoder_max_seq_len=12)
    rows, wide = torch.ones(1, 12, 12, dtype=torch.bool).tril(), widened(mask, S_E + more)
    for _ in range(2):
        outs = []
        for start, stop in ((0, 4), *((i, i + 1) for i in range(4, 9))):
            given = {"encoder_input": {"images": images}} if start == 0 else {}
            given |= {"encoder_mask": rows_of(wide, start, stop), "mask": rows[:, start:stop], "input_pos": torch.arange(start, stop)}
            outs.append(model(TEXT[:, start:stop], **given))
        assert_no_worse(torch.cat(outs, 1), eager, exact)
        model.reset_caches()
    text_alone = model.decoder(TEXT[:, :2], mask=rows[:, :2], encoder_mask=rows_of(wide, 0, 2), input_pos=torch.arange(2))
    assert text_alone.isfinite().all(), "empty caches: cross-attention is left out"


@torch.no_grad()
@pytest.mark.parametrize("empty_rows", ["zero", "uniform"])
def test_images_that_come_in_two_parts(empty_rows):
    """Rows that see nothing attend, uniformly, to what the cache holds by then."""
    layer, x, y = make_cross_layer(empty_rows=empty_rows), torch.randn(2, 9, D), torch.randn(2, S_E, D)
    layer.setup_caches(2, torch.float32, encoder_max_seq_len=S_E + 3, decoder_max_seq_len=1)
    for start, stop in ((0, 7), (7, S_E)):
        mask = HOLES.clone()
        mask[:, :, stop:] = False
        wide = EncoderMask.from_dense(mask).widened(S_E + 3)
        out = layer(x, encoder_input=y[:, start:stop], encoder_mask=wide)
        exact = cross_formula(copy.deepcopy(layer).double(), x.double(), y[:, :stop].double(), mask[:, :, :stop])
        assert_no_worse(out, cross_formula(layer, x, y[:, :stop], mask[:, :, :stop]), exact)
    with pytest.raises(ValueError, match="KVCache: k_val has 4 tokens"):
        layer(x, encoder_input=y[:, :4], encoder_mask=wide)


class Ops(TorchDispatchMode):
    """The names of fastfuse's ops that run, and what else was asked for."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[f"{func.namespace}::{func.overloadpacket.__name__}"] += 1
        return func(*args, **(kwargs or {}))

    def __getitem__(self, name: str) -> int:
        return self.names[f"fastfuse::{name}"]


N_CROSS = 3


ONCE = [(form, empty_rows, "auto", wrapped) for form in ("tensor", "bits", "tiles") for empty_rows in ("zero", "uniform") for wrapped in (False, True)]
ONCE += [("tensor", "zero", "triton", False), ("bits", "uniform", "triton", True)]


@pytest.mark.parametrize(("form", "empty_rows", "backend", "wrapped"), ONCE)
def test_the_mask_is_prepared_once(form, empty_rows, backend, wrapped, images, monkeypatch):
    """However many layers there are, backward included; torch's checkpoint_wrapper around layers hides nothing."""
    packed = []
    from_dense = EncoderMask.from_dense
    monkeypatch.setattr(EncoderMask, "from_dense", lambda *args, **kwargs: packed.append(args) or from_dense(*args, **kwargs))
    model, mask = make_model(empty_rows), FORMS[form]()
    packed.clear()
    if wrapped:
        for i, layer in enumerate(model.decoder.layers):
            model.decoder.layers[i] = checkpoint_wrapper(layer)
    with fastfuse.backend(backend), Ops() as ops:
        model(TEXT, encoder_input={"images": images}, encoder_mask=mask).sum().backward()
    assert len(packed) == ops["pack_mask"] == (form == "tensor")
    assert ops["mask_blocks"] == (backend == "triton")
    assert ops["cross_attention"] == N_CROSS * (1 + wrapped) and ops["cross_attention_bwd"] == N_CROSS
    assert not any("scaled_dot_product" in n for n in ops.names if ops.names[n] > N_CROSS * (1 + wrapped)), "self-attention's alone"


def test_nothing_is_packed_where_nothing_attends(images):
    decoder = make_decoder()
    with Ops() as ops:
        decoder(TEXT, encoder_mask=DENSE)
    assert ops["pack_mask"] == 0
    with local_kv_cache(decoder, batch_size=2, device="cpu", dtype=torch.float32, encoder_max_seq_len=S_E, decoder_max_seq_len=9), Ops() as ops:
        decoder(TEXT, mask=torch.ones(1, 9, 9, dtype=torch.bool).tril(), encoder_mask=DENSE, input_pos=torch.arange(9))
    assert ops["pack_mask"] == 0


class Recorded(nn.Module):
    """A layer of somebody's own."""

    def __init__(self):
        super().__init__()
        self.masks = []

    def forward(self, x, *, mask, encoder_input, encoder_mask, input_pos):
        self.masks.append(encoder_mask)
        return x


class Derived(TransformerCrossAttentionLayer):
    def forward(self, x, **kwargs):
        self.masks = [*getattr(self, "masks", []), kwargs["encoder_mask"]]
        return super().forward(x, **kwargs)


class DerivedFusion(FusionLayer):
    def forward(self, x, **kwargs):
        self.masks = [*getattr(self, "masks", []), kwargs["encoder_mask"]]
        return super().forward(x, **kwargs)


def test_layers_of_somebody_s_own_get_the_tensor_that_was_passed():
    """As they did, while ours beside them share one mask."""
    decoder, y = make_decoder(), torch.randn(2, S_E, D)
    want = decoder(TEXT, encoder_input=y, encoder_mask=HOLES)
    decoder.layers.insert(1, Recorded())
    fusion = decoder.layers[0]
    derived = DerivedFusion(fusion.layer, fusion.fusion_layer)
    cross = decoder.layers[4]
    also = Derived(cross.attn, cross.mlp, ca_norm=cross.ca_norm, mlp_norm=cross.mlp_norm, ca_scale=cross.ca_scale, mlp_scale=cross.mlp_scale)
    decoder.layers[0], decoder.layers[4] = derived, also
    out = decoder(TEXT, encoder_input=y, encoder_mask=HOLES)
    assert torch.equal(out, want)
    for layer in (decoder.layers[1], derived, also):
        assert len(layer.masks) == 1 and layer.masks[0] is HOLES
    em = EncoderMask.from_dense(HOLES)
    decoder(TEXT, encoder_input=y, encoder_mask=em)
    assert all(layer.masks[-1] is em for layer in (decoder.layers[1], derived, also)), "what was passed, whatever it is"


@pytest.mark.parametrize("where", ["layer", "part", "attn"])
@pytest.mark.parametrize("how", ["forward", "pre-hook", "hook", "global hook"])
def test_whoever_looks_at_the_keywords_sees_a_tensor(how, where):
    decoder, y, seen = make_decoder(), torch.randn(2, S_E, D), []
    want = decoder(TEXT, encoder_input=y, encoder_mask=HOLES)
    module = decoder.layers[0] if where == "layer" else decoder.layers[0].fusion_layer if where == "part" else decoder.layers[0].fusion_layer.attn

    def look(m, kwargs):
        if m is module:
            seen.append(kwargs["mask"] if where == "attn" else kwargs["encoder_mask"])

    if how == "forward":
        forward = module.forward
        module.forward = lambda *args, **kwargs: (look(module, kwargs), forward(*args, **kwargs))[1]
        handle = contextlib.nullcontext()
    elif how == "pre-hook":
        handle = module.register_forward_pre_hook(lambda m, args, kwargs: look(m, kwargs), with_kwargs=True)
    elif how == "hook":
        handle = module.register_forward_hook(lambda m, args, kwargs, out: look(m, kwargs), with_kwargs=True)
    else:
        handle = nn.modules.module.register_module_forward_hook(lambda m, args, kwargs, out: look(m, kwargs), with_kwargs=True)
    with handle:
        out = decoder(TEXT, encoder_input=y, encoder_mask=HOLES)
    assert len(seen) == 1 and isinstance(seen[0], Tensor)
    assert_rounding_apart(out, want, D, products=30)
    with Ops() as ops:
        make_decoder()(TEXT, encoder_input=y, encoder_mask=HOLES)
    assert ops["cross_attention"] == N_CROSS, "a hook that is gone"
    nn.modules.module._global_forward_hooks_with_kwargs.clear()  # which PyTorch forgets


def test_hooks_that_get_no_keywords_change_nothing():
    decoder, y = make_decoder(), torch.randn(2, S_E, D)
    with contextlib.ExitStack() as hooks, Ops() as ops:
        for module in decoder.modules():
            hooks.enter_context(module.register_forward_hook(lambda m, args, out: None))
        decoder(TEXT, encoder_input=y, encoder_mask=HOLES)
    assert (ops["pack_mask"], ops["cross_attention"]) == (1, N_CROSS)


class Own(nn.Module):
    """Attention of somebody's own, as torchtune's layers take it."""

    def __init__(self, attn: MultiHeadAttention):
        super().__init__()
        self.attn, self.masks = attn, []
        self.pos_embeddings, self.kv_cache, self.cache_enabled = None, None, False

    def forward(self, x, y, *, mask=None):
        self.masks.append(mask)
        return self.attn(x, y, mask=mask)


class Sub(MultiHeadAttention):
    pass


@pytest.mark.parametrize("kind", ["own", "subclass", "attention call"])
@pytest.mark.parametrize("empty_rows", ["zero", "uniform"])
@pytest.mark.parametrize("form", ["tensor of any rows", "bits of any rows", "intervals"])
def test_attention_of_somebody_s_own_gets_a_tensor(form, empty_rows, kind):
    layer, x, y, mask = make_cross_layer(empty_rows=empty_rows), torch.randn(2, 9, D), torch.randn(2, S_E, D), FORMS[form]()
    exact = cross_formula(copy.deepcopy(layer).double(), x.double(), y.double(), as_dense(mask))
    eager = cross_formula(layer, x, y, as_dense(mask))
    seen = []
    if kind == "own":
        layer.attn = Own(layer.attn)
        seen = layer.attn.masks
    elif kind == "subclass":
        layer.attn.__class__ = Sub
        layer.attn.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs["mask"]), with_kwargs=True)
    else:

        def call(*args, **kwargs):
            seen.append(kwargs["mask"])
            return sdpa_or_flex_attention(*args, **kwargs)

        layer.attn._attention_call = call
    with Ops() as ops:
        out = layer(x, encoder_input=y, encoder_mask=mask)
    assert_no_worse(out, eager, exact)
    assert [type(m) for m in seen] == [Tensor] and seen[0].shape == (2, 9, S_E) and ops["cross_attention"] == 0
    assert seen[0].any(-1).all(), "no row of nothing: a softmax of it is NaN in some kernels"


def test_attention_alone_takes_either_form():
    attn, x, y = shaken(make_attention(cross=True)), torch.randn(2, 9, D), torch.randn(2, S_E, D)
    mask = EncoderMask.from_dense(HOLES)
    exact = reference.attention(copy.deepcopy(attn).double(), x.double(), y.double(), HOLES)
    assert_no_worse(attn(x, y, mask=mask), reference.attention(attn, x, y, HOLES), exact)
    seen = []
    attn._attention_call = lambda *args, **kwargs: seen.append(kwargs["mask"]) or sdpa_or_flex_attention(*args, **kwargs)
    assert_no_worse(attn(x, y, mask=mask), reference.attention(attn, x, y, HOLES), exact)
    assert torch.equal(seen[0], HOLES)


def test_other_shapes_of_a_tensor_still_broadcast():
    """PyTorch's attention has always taken them: one row for all tokens, one sequence of images for the batch."""
    layer, x, y = make_cross_layer(), torch.randn(2, 9, D), torch.randn(2, S_E, D)
    one = HOLES[:, 4:5]
    assert one.any(-1).all()
    want = layer(x, encoder_input=y, encoder_mask=one.expand(-1, 9, -1))
    assert_rounding_apart(layer(x, encoder_input=y, encoder_mask=one), want, D, products=8)
    want = layer(x, encoder_input=y[:1].expand(2, -1, -1), encoder_mask=HOLES)
    assert_rounding_apart(layer(x, encoder_input=y[:1], encoder_mask=HOLES), want, D, products=8)


def test_dropout_is_pytorch_s():
    layer, x, y = make_cross_layer(), torch.randn(2, 9, D), torch.randn(2, S_E, D)
    layer.attn.attn_dropout = 0.5
    results = []
    for mask in (HOLES, EncoderMask.from_dense(HOLES)):
        torch.manual_seed(5)
        with Ops() as ops:
            results.append(layer.train()(x, encoder_input=y, encoder_mask=mask))
        assert ops["cross_attention"] == ops["pack_mask"] == 0
    with Ops() as ops:
        plain = layer.eval()(x, encoder_input=y, encoder_mask=mask)
    assert ops["cross_attention"] == 1
    assert torch.equal(*results) and not torch.isclose(plain, results[0]).all()
    blind = ~HOLES.any(-1)
    assert torch.equal(results[0][blind], x[blind])
    q, k = torch.randn(2, 4, 9, 4), torch.randn(2, 2, S_E, 4)
    out = sdpa_or_flex_attention(q, k, k, mask, 0.5, False)
    assert not out.transpose(1, 2)[blind].any() and out.transpose(1, 2)[~blind].any() and out.isfinite().all()


@pytest.mark.parametrize("form", ["tensor of any rows", "bits of any rows"])
@pytest.mark.parametrize("transform", ["grad", "vmap", "jvp", "functional_call"])
def test_transforms(transform, form):
    layer, x, y, mask = make_cross_layer().double(), torch.randn(2, 9, D).double(), torch.randn(2, S_E, D).double(), FORMS[form]()

    def f(x):
        return layer(x, encoder_input=y, encoder_mask=mask)

    want = cross_formula(layer, x, y, HOLES)
    if transform == "grad":
        given = x.clone().requires_grad_()
        (expected,) = torch.autograd.grad(cross_formula(layer, given, y, HOLES).square().sum(), given)
        got = torch.func.grad(lambda x: f(x).square().sum())(x)
    elif transform == "vmap":
        xs = torch.stack([x, 2 * x])
        expected, got = torch.stack([want, cross_formula(layer, 2 * x, y, HOLES)]), torch.func.vmap(f)(xs)
    elif transform == "jvp":
        t = torch.randn_like(x)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            _, got = torch.func.jvp(f, (x,), (t,))
        step = 1e-6
        expected = (cross_formula(layer, x + step * t, y, HOLES) - cross_formula(layer, x - step * t, y, HOLES)) / (2 * step)
        assert (got - expected).abs().max() < 1e-7
        return
    else:
        expected, got = want, torch.func.functional_call(layer, dict(layer.named_parameters()), (x,), {"encoder_input": y, "encoder_mask": mask})
    assert (got - expected).abs().max() < 1e-12


@pytest.mark.parametrize("form", ["tensor of any rows", "bits of any rows"])
def test_what_no_kernel_covers_goes_the_dense_way(form, kernels):
    """float64, as on a GPU, where nothing is tried first: no error is caught."""
    layer, x, y, mask = make_cross_layer().double(), torch.randn(2, 9, D).double(), torch.randn(2, S_E, D).double(), FORMS[form]()
    with Ops() as ops:
        out = layer(x, encoder_input=y, encoder_mask=mask)
    assert (out - cross_formula(layer, x, y, HOLES)).abs().max() < 1e-12
    assert not [n for n in ops.names if n.startswith("fastfuse::")]
    q, k = torch.randn(2, 4, 9, 4).double(), torch.randn(2, 2, S_E, 4).double()
    got = sdpa_or_flex_attention(q, k, k, EncoderMask.from_dense(HOLES), 0.0, False)
    want = reference.softmax_attention(q.transpose(1, 2), k.transpose(1, 2), k.transpose(1, 2), HOLES).transpose(1, 2)
    assert (got - want).abs().max() < 1e-12 and not got.mT[..., ~HOLES[0].any(-1)][0].any()


def test_autocast():
    """q and k leave their norms in fp32, v its projection in bf16: the op takes all three in bf16."""
    model, images = make_model(), torch.randn(2, S_E, 5)
    exact = model_formula(copy.deepcopy(model).double(), TEXT, images.double(), HOLES)
    results = []
    for mask in (HOLES, EncoderMask.from_dense(HOLES)):
        with torch.autocast("cpu", torch.bfloat16), Ops() as ops:
            results.append(model(TEXT, encoder_input={"images": images}, encoder_mask=mask))
        assert ops["cross_attention"] == N_CROSS
    for layer in model.decoder.layers:
        if cross_attention_of(layer) is not None:
            cross_attention_of(layer).attn._attention_call = lambda *args, **kwargs: sdpa_or_flex_attention(*args, **kwargs)
    with torch.autocast("cpu", torch.bfloat16), Ops() as ops:
        eager = model(TEXT, encoder_input={"images": images}, encoder_mask=HOLES)
    assert ops["cross_attention"] == 0
    for got in results:
        assert_no_worse(got, eager, exact)


def test_shapes_of_the_mask_are_checked():
    decoder, y, em = make_decoder(), torch.randn(2, S_E, D), EncoderMask.from_dense(HOLES)
    for wrong, message in (
        (EncoderMask.cat([em, em]), r"encoder_mask has shape \(4, 9, 12\), expected \(2 or 1, 9, keys\)"),
        (em.narrow(0, 1), r"encoder_mask has shape \(2, 1, 12\), expected \(2 or 1, 9, keys\)"),
        (em.widened(13), r"mask has shape \(2, 9, 13\), q and k need \(2 or 1, 9, 12\)"),
    ):
        with pytest.raises(ValueError, match=message):
            decoder(TEXT, encoder_input=y, encoder_mask=wrong)
    with pytest.raises(RuntimeError, match=r"13.*12|12.*13"):
        decoder(TEXT, encoder_input=y, encoder_mask=widened(HOLES, 13))


@pytest.mark.parametrize("form", ["tensor", "bits", "tiles"])
@pytest.mark.parametrize("how", ["checkpoint", "wrapper", "reentrant"])
def test_activation_checkpointing(how, form, images):
    model, mask = make_model(), FORMS[form]()
    out = model(TEXT, encoder_input={"images": images}, encoder_mask=mask)
    upstream = torch.randn(out.shape)
    want = torch.autograd.grad(out, list(model.parameters()), upstream)
    if how == "wrapper":
        for i, layer in enumerate(model.decoder.layers):
            model.decoder.layers[i] = checkpoint_wrapper(layer)
        again = model(TEXT, encoder_input={"images": images}, encoder_mask=mask)
    else:
        run = partial(model, encoder_input={"images": images}, encoder_mask=mask)
        h = checkpoint(lambda tokens, _: run(tokens), TEXT, torch.zeros(1, requires_grad=True), use_reentrant=how == "reentrant")
        again = h
    assert torch.equal(again, out)
    if how == "reentrant":
        again.backward(upstream)
        got = [p.grad for p in model.parameters()]
    else:
        got = torch.autograd.grad(again, list(model.parameters()), upstream)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_nothing_is_left_on_the_model(images):
    model = make_model()
    keys, size = list(model.state_dict()), len(pickle.dumps(model))
    before = {n: set(vars(m)) for n, m in model.named_modules()}
    for form in FORMS:
        model(TEXT, encoder_input={"images": images}, encoder_mask=FORMS[form]()).sum()
    assert list(model.state_dict()) == keys and len(pickle.dumps(model)) == size
    assert {n: set(vars(m)) for n, m in model.named_modules()} == before
    out = model(TEXT, encoder_input={"images": images}, encoder_mask=HOLES)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with Ops() as ops:
            assert torch.equal(twin(TEXT, encoder_input={"images": images}, encoder_mask=HOLES), out)
        assert (ops["pack_mask"], ops["cross_attention"]) == (1, N_CROSS), "a copy is as plain as the original"


@pytest.mark.parametrize("empty_rows", ["zero", "uniform"])
def test_by_the_kernels(empty_rows, images):
    """The model in the interpreter, forward, backward and a cached step."""
    model, mask = make_small_model(empty_rows), EncoderMask.from_tiles(VISIBLE, PER_TILE)

    def run(m, tokens, images):
        with fastfuse.backend("triton"):
            return m(tokens, encoder_input={"images": images}, encoder_mask=mask)

    out = run(model, TEXT, images)
    upstream = torch.randn(out.shape)

    def results(m, value):
        with fastfuse.backend("triton"):  # backward too
            grads = torch.autograd.grad(value, list(m.parameters()), upstream.to(value.dtype))
        return value, dict(zip(dict(m.named_parameters()), ((g,) for g in grads), strict=True))

    wide = copy.deepcopy(model).double()
    eager, exact = (
        in_several_orders(lambda: results(model, model_formula(model, TEXT, images, DENSE))),
        results(wide, model_formula(wide, TEXT, images.double(), DENSE)),
    )
    reference.assert_results_no_worse(results(model, run(model, TEXT, images)), eager, exact)
    with (
        torch.no_grad(), fastfuse.backend("triton"), Ops() as ops,
        local_kv_cache(model, batch_size=2, device="cpu", dtype=torch.float32, encoder_max_seq_len=S_E + 5, decoder_max_seq_len=9),
    ):  # fmt: skip
        rows, wide = torch.ones(1, 9, 9, dtype=torch.bool).tril(), mask.widened(S_E + 5)
        for start, stop in ((0, 8), (8, 9)):
            given = {"encoder_input": {"images": images}} if start == 0 else {}
            given |= {"encoder_mask": wide.narrow(start, stop - start), "mask": rows[:, start:stop], "input_pos": torch.arange(start, stop)}
            got = model(TEXT[:, start:stop], **given)
            assert_no_worse(got, [value[:, start:stop] for value, _ in eager], exact[0][:, start:stop], f"tokens {start}..{stop - 1}")
    assert ops["cross_attention"] == 2 * 2


LONG, LONG_TILE = 48, 50


def long_case(kind: str) -> tuple[Tensor, EncoderMask]:
    """48 tokens, 2 images of 2 tiles of 50 tokens: tokens and their mask, of tiles."""
    torch.manual_seed(2)
    tokens = torch.randint(0, VOCAB, (2, LONG))
    tokens[0, 5] = tokens[1, 0] = tokens[1, 20] = IMAGE
    visible = rule(tokens, TILES)
    if kind == "bits":  # the last text of the second row sees one tile of the first image and one of the second, not its neighbour
        visible[1, 30:] = torch.tensor([[True, False], [True, False]])
    mask = EncoderMask.from_tiles(visible, LONG_TILE)
    assert mask.kind == kind and torch.equal(mask.to_dense(), dense_of(visible, LONG_TILE))
    return tokens, mask


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("empty_rows", ["zero", "uniform"])
@pytest.mark.parametrize("kind", ["interval", "bits"])
def test_nothing_of_the_dense_mask_s_size_is_made(kind, empty_rows, dtype):
    """Not for one row of the batch, not for one head, forward or backward."""
    tokens, mask = long_case(kind)
    s_e = mask.shape[2]
    model, images = make_model(empty_rows).to(dtype), torch.randn(2, s_e, 5).to(dtype)
    assert 2 * s_e * D < LONG * s_e, "else the images would be taken for it"
    with Allocated() as mode:
        model(tokens, encoder_input={"images": images}, encoder_mask=mask).sum().backward()
    assert any("flash_attention_for_cpu_backward" in f for _, f in mode.made), "ops were looked into"
    assert mode.of(LONG * s_e, LONG, s_e) == []
    with Allocated() as dense:
        model(tokens, encoder_input={"images": images}, encoder_mask=torch.zeros(mask.shape, dtype=dtype)).sum().backward()
    assert dense.of(LONG * s_e, LONG, s_e), "the count finds the dense way out"


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("empty_rows", ["zero", "uniform"])
@pytest.mark.parametrize("kind", ["interval", "bits"])
def test_a_cached_step_makes_a_few_rows(kind, empty_rows, dtype):
    """Less than the keys of one head of one row of the batch, which any copy of keys, or scores of all heads, would be."""
    tokens, mask = long_case(kind)
    s_e = mask.shape[2]
    model, images = make_model(empty_rows).to(dtype), torch.randn(2, s_e, 5).to(dtype)
    with local_kv_cache(model, batch_size=2, device="cpu", dtype=dtype, encoder_max_seq_len=s_e, decoder_max_seq_len=LONG):
        rows, step = torch.ones(1, LONG, LONG, dtype=torch.bool).tril(), mask.last_row()
        start = LONG - 1
        model(
            tokens[:, :start], encoder_input={"images": images}, encoder_mask=mask.narrow(0, start), mask=rows[:, :start], input_pos=torch.arange(start)
        )  # fmt: skip
        with Allocated() as mode:
            model(tokens[:, start:], encoder_mask=step, mask=rows[:, start:], input_pos=torch.tensor([start]))
    assert mode.of(2 * s_e * HEADS) == [], "scores of all heads"
    assert mode.of(2 * s_e + 1) == [], "more than a mask"


def steps(model, tokens, mask, images, width):
    rows = torch.ones(1, 16, 16, dtype=torch.bool).tril()
    given = {"encoder_input": {"images": images}, "encoder_mask": mask, "mask": rows[:, : tokens.shape[1]], "input_pos": torch.arange(tokens.shape[1])}
    yield tokens, given
    last = mask[:, -1:] if isinstance(mask, Tensor) else mask.last_row()
    for i in range(tokens.shape[1], tokens.shape[1] + 4):
        yield torch.randint(0, VOCAB, (2, 1)), {"encoder_mask": last, "mask": rows[:, i : i + 1].clone(), "input_pos": torch.tensor([i])}


@torch.no_grad()
@pytest.mark.parametrize(("empty_rows", "form"), [("zero", "tensor"), ("zero", "intervals"), ("uniform", "bits")])
def test_compiled_steps_share_a_graph(empty_rows, form, images):
    model, mask = make_small_model(empty_rows), FORMS[form]()
    model.setup_caches(2, torch.float32, encoder_max_seq_len=S_E, decoder_max_seq_len=16)
    torch.manual_seed(4)
    want = [model(tokens, **given) for tokens, given in steps(model, TEXT, mask, images, S_E)]
    model.reset_caches()
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    torch.manual_seed(4)
    frames = []
    for (tokens, given), expected in zip(steps(model, TEXT, mask, images, S_E), want, strict=True):
        assert_rounding_apart(compiled(tokens, **given), expected, D, products=40)
        frames.append(counter.frame_count)
    assert frames == [1, 2, 2, 2, 2], "one graph for the prompt, one for the four steps"


@pytest.mark.parametrize(("empty_rows", "form"), [("zero", "tensor of any rows"), ("zero", "intervals"), ("uniform", "bits")])
def test_compiled_forward_and_backward(empty_rows, form, images):
    """One graph, for a second mask too."""
    model, mask = make_small_model(empty_rows), FORMS[form]()
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    for given in (mask, copy.deepcopy(mask)):
        out, eager = (m(TEXT, encoder_input={"images": images}, encoder_mask=given) for m in (compiled, model))
        exact = model_formula(copy.deepcopy(model).double(), TEXT, images.double(), as_dense(mask))
        assert_no_worse(out, eager, exact)
        upstream = torch.randn(out.shape)
        for got, want in zip(*(torch.autograd.grad(y, list(model.parameters()), upstream) for y in (out, eager)), strict=True):
            assert_rounding_apart(got, want, D * 9, products=40)
    assert counter.frame_count == 1


@pytest.mark.parametrize(("empty_rows", "form", "backend"), [("zero", "tensor", "auto"), ("uniform", "tiles", "auto"), ("zero", "bits", "triton")])
def test_compiled_generation_is_one_graph(empty_rows, form, backend, images):
    """The mask that steps share is complete before the first one: none changes it, which would be a graph of its own."""
    model, mask = make_small_model(empty_rows).eval(), FORMS[form]()
    given = {"max_generated_tokens": 4, "temperature": 0, "pad_id": -1, "encoder_input": {"images": images}, "encoder_mask": mask}
    want, _ = generate(model, TEXT, **given)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    step = torch.compile(generate_next_token, fullgraph=True, backend=counter)
    with local_kv_cache(model, batch_size=2, device="cpu", dtype=torch.float32, encoder_max_seq_len=S_E + 2, decoder_max_seq_len=16), fastfuse.backend(backend):
        for _ in range(2):
            got, _ = generate(model, TEXT, compiled_generate_next_token=step, **given)
            assert torch.equal(got, want)
    assert counter.frame_count == 1


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("form", ["tensor", "bits"])
def test_generation_prepares_the_mask_once(form, backend, images):
    """Twice, that is: for the prompt and for all steps after it."""
    model, mask = make_small_model("zero").eval(), FORMS[form]()
    given = {"max_generated_tokens": 4, "temperature": 0, "pad_id": -1, "encoder_input": {"images": images}, "encoder_mask": mask}
    with (
        local_kv_cache(model, batch_size=2, device="cpu", dtype=torch.float32, encoder_max_seq_len=S_E, decoder_max_seq_len=16),
        fastfuse.backend(backend), Ops() as ops,
    ):  # fmt: skip
        generate(model, TEXT, **given)
    assert ops["cross_attention"] == 4 * 2
    assert ops["pack_mask"] == (2 if form == "tensor" else 0) and ops["mask_blocks"] == (2 if backend == "triton" else 0)
