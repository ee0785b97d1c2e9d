"""Cross-attention of whole models over an EncoderMask: prepared once, the same result as over a tensor, nothing of the mask's dense size made."""

import contextlib
import copy
from collections import Counter
from functools import partial

import pytest
import reference
import torch
import torch._dynamo.testing
from numerics import Orders, assert_no_worse, assert_rounding_apart
from reference import DTYPES, VOCAB, D, assert_matches, make_attention, make_cross_layer, make_decoder, shaken
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fastfuse.modules import MultiHeadAttention, TransformerCrossAttentionLayer
from fastfuse.modules.attention_utils import sdpa_or_flex_attention
from fastfuse.modules.model_fusion import FusionLayer
from fastfuse.modules.transformer import cross_attention_of
from fastfuse.ops import EncoderMask

IMAGE = VOCAB  # the first fusion token
PER_TILE, N_TILES, B, S = 3, 2, 2, 9
FP32, BF16, FP16 = DTYPES
RULES = ("zero", "uniform")  # of rows that see nothing
LAYERS = ("fusion", "self", "fusion last", "cross")
N_CROSS = 3


def draw_text(seed, s, *images):
    tokens = torch.randint(0, VOCAB, (B, s), generator=torch.Generator().manual_seed(seed))
    for place in images:
        tokens[place] = IMAGE
    return tokens


TEXT = draw_text(3, S, (0, 2), (1, 0), (1, 4))  # row 0 starts with text that sees nothing; row 1 has two images with text between them
TILES = torch.tensor([[1, 0], [1, 2]])  # of each image, real ones: the first row has one image, and the other one's padding


def rule(tokens, tiles):
    """bool [b, s, n_img, N_TILES]: text sees the real tiles of the image before it."""
    visible = torch.zeros(*tokens.shape, tiles.shape[1], N_TILES, dtype=torch.bool)
    for row, ids in enumerate(tokens.tolist()):
        image = -1
        for t, token in enumerate(ids):
            image += token == IMAGE
            if image >= 0:
                visible[row, t, image, : tiles[row, image]] = True
    return visible


VISIBLE = rule(TEXT, TILES)
DENSE = VISIBLE.repeat_interleave(PER_TILE, 3).flatten(2)
S_E = DENSE.shape[2]
HOLES = torch.rand(DENSE.shape, generator=torch.Generator().manual_seed(1)) < 0.5
HOLES[0, 3] = HOLES[1, 0] = False


def infinite(mask):
    return torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)


FORMS = {  # name: what it says, and how it says it
    "tensor": (DENSE, DENSE.clone),
    "tensor of any rows": (HOLES, HOLES.clone),
    "bits": (DENSE, lambda: EncoderMask.from_dense(DENSE, kind="bits")),
    "bits of any rows": (HOLES, lambda: EncoderMask.from_dense(HOLES)),
    "intervals": (DENSE, lambda: EncoderMask.from_dense(DENSE, kind="interval")),
    "tiles": (DENSE, lambda: EncoderMask.from_tiles(VISIBLE, PER_TILE)),
    "tokens": (DENSE, lambda: EncoderMask.from_tokens(TEXT, IMAGE, TILES, N_TILES, PER_TILE)),
    "minus infinity": (HOLES, lambda: infinite(HOLES)),
    "none": (None, lambda: None),
}
ANY_ROWS = ["tensor of any rows", "bits of any rows"]


def form_of(form, dtype=FP32):
    dense, make = FORMS[form]
    mask = make()
    return dense, mask.to(dtype) if isinstance(mask, Tensor) and mask.is_floating_point() else mask


def in_turn(*columns):
    """Rows in which every value of a column meets the values of the shorter ones by turns."""
    return [tuple(column[i % len(column)] for column in columns) for i in range(max(map(len, columns)))]


def make_model(empty_rows="zero", layers=LAYERS):
    return reference.make_model(*layers, empty_rows=empty_rows, decoder_trainable=True, encoder_trainable=True)


make_small_model = partial(make_model, layers=("fusion", "cross"))  # which takes a fraction of the time to compile


def images_of(t):
    return {"encoder_input": {"images": t}}


X, Y, IMAGES = (torch.randn(B, n, d, generator=torch.Generator().manual_seed(n + d)) for n, d in ((S, D), (S_E, D), (S_E, 5)))
PICTURES = images_of(IMAGES)


@pytest.mark.parametrize(("form", "empty_rows", "dtype"), in_turn(list(FORMS) * 2, RULES, DTYPES))
def test_a_layer_and_every_gradient(form, empty_rows, dtype):
    """An odd number of forms, twice: each meets both rules."""
    dense, mask = form_of(form, dtype)

    def run(m, x, y):
        return m(x, encoder_input=y, encoder_mask=mask)

    assert_matches(make_cross_layer(empty_rows=empty_rows), run, lambda m, x, y: reference.cross_layer(m, x, y, dense), {"x": X.clone(), "y": Y.clone()}, dtype)


@pytest.mark.parametrize(
    ("form", "empty_rows", "dtype"), in_turn(["tensor", "bits of any rows", "tiles", "tensor of any rows", "intervals", "tokens"], RULES, DTYPES)
)
def test_the_whole_model_and_every_gradient(form, empty_rows, dtype):
    dense, mask = form_of(form)

    def run(m, images):
        return m(TEXT, **images_of(images), encoder_mask=mask)

    assert_matches(make_model(empty_rows), run, lambda m, images: reference.model(m, TEXT, images, dense), {"images": IMAGES.clone()}, dtype, draws=2)


def test_the_masks_of_these_tests_tell_what_they_should():
    assert [FORMS[name][1]().kind for name in ("bits", "bits of any rows", "intervals")] == ["bits", "bits", "interval"]
    assert all(not m.any(-1).all() and m.any() and not m.all(-1).all() for m in (DENSE, HOLES))
    assert not DENSE[1, -1, :6].any() and not DENSE[1, 1, 3:].any(), "each image by its own text, its real tiles alone"


def test_other_shapes_still_broadcast():
    """One mask for the batch in either form; of a tensor PyTorch's attention has always taken one row for all tokens, one sequence of images for the batch."""
    layer, one = make_cross_layer(), HOLES[:, 4:5]
    assert one.any(-1).all()
    for mask, whole in (
        (HOLES[:1], HOLES[:1].expand(B, -1, -1)),
        (EncoderMask.from_dense(HOLES[:1]), HOLES[:1].expand(B, -1, -1)),
        (one, one.expand(-1, S, -1)),
    ):
        want = layer(X, encoder_input=Y, encoder_mask=whole)
        assert_rounding_apart(layer(X, encoder_input=Y, encoder_mask=mask), want, D, products=8)
    want = layer(X, encoder_input=Y[:1].expand(B, -1, -1), encoder_mask=HOLES)
    assert_rounding_apart(layer(X, encoder_input=Y[:1], encoder_mask=HOLES), want, D, products=8)


def rows_of(mask, start, stop):
    return mask.narrow(start, stop - start) if isinstance(mask, EncoderMask) else mask[:, start:stop]


def widened(mask, width):
    if isinstance(mask, EncoderMask):
        return mask.widened(width)
    return nn.functional.pad(mask, (0, width - mask.shape[2]), value=0 if mask.dtype == torch.bool else -torch.inf)


def causal_rows(length, start=0, stop=None):
    return torch.ones(1, length, length, dtype=torch.bool).tril()[:, start:stop]


def steps_of(mask, width, parts, own_positions=False):
    """Tokens and keywords of the steps of a cached forward."""
    start = 0
    for n in parts:
        stop = start + n
        positions = torch.arange(start, stop)
        positions = positions.expand(B, -1) if own_positions else positions
        given = {
            "encoder_mask": rows_of(mask, start, stop),
            "mask": causal_rows(width, start, stop),
            "input_pos": positions[:, 0] if own_positions and n == 1 else positions,
        }
        yield start, stop, given
        start = stop


CACHED = in_turn(
    [f for f in FORMS if f != "none"] * 2, [0, 5, 5, 0], RULES * 4 + RULES[::-1] * 4, DTYPES, [[4, 1, 1, 1, 1, 1], [9], [2, 3, 2, 1, 1]], [False, True]
)


def assert_cached(model, form, more, dtype, parts, own_positions):
    images, (dense, mask) = IMAGES.to(dtype), form_of(form, dtype)
    eager = Orders(reference.model, copy.deepcopy(model), TEXT, images, dense)
    exact = reference.model(copy.deepcopy(model).double(), TEXT, images.double(), dense)
    model.setup_caches(B, dtype, encoder_max_seq_len=S_E + more, decoder_max_seq_len=12)
    wide = widened(mask, S_E + more)
    for _ in range(2):
        outs = []
        for start, stop, given in steps_of(wide, 12, parts, own_positions):
            outs.append(model(TEXT[:, start:stop], **given, **({} if start else images_of(images))))
        assert_no_worse(torch.cat(outs, 1), eager, exact)
        model.reset_caches()
    start, stop, given = next(steps_of(wide, 12, [2]))
    assert model.decoder(TEXT[:, start:stop], **given).isfinite().all(), "empty caches: cross-attention is left out"


@torch.no_grad()
@pytest.mark.parametrize(("form", "more", "empty_rows", "dtype", "parts", "own_positions"), CACHED)
def test_cached_steps_equal_the_whole(form, more, empty_rows, dtype, parts, own_positions):
    """In caches wider than what they hold the tail is nobody's, rows that see nothing included; a second run after a reset is the first."""
    assert_cached(make_model(empty_rows).to(dtype), form, more, dtype, parts, own_positions)


@torch.no_grad()
@pytest.mark.parametrize(("form", "empty_rows"), [("tensor", "zero"), ("mask", "zero"), ("mask", "uniform")])
def test_images_that_come_in_two_parts(form, empty_rows):
    """Rows that see nothing attend, uniformly, to what the cache holds by then."""
    layer = make_cross_layer(empty_rows=empty_rows)
    layer.setup_caches(B, FP32, encoder_max_seq_len=S_E + 3, decoder_max_seq_len=1)
    for start, stop in ((0, 7), (7, S_E)):
        mask = HOLES.clone()
        mask[:, :, stop:] = False
        wide = widened(mask if form == "tensor" else EncoderMask.from_dense(mask), S_E + 3)
        out = layer(X, encoder_input=Y[:, start:stop], encoder_mask=wide)
        exact = reference.cross_layer(copy.deepcopy(layer).double(), X.double(), Y[:, :stop].double(), mask[:, :, :stop])
        assert_no_worse(out, reference.cross_layer(layer, X, Y[:, :stop], mask[:, :, :stop]), exact)
    with pytest.raises(ValueError, match="KVCache: k_val has 4 tokens"):
        layer(X, encoder_input=Y[:, :4], encoder_mask=wide)


class Ops(TorchDispatchMode):
    """The names of fastfuse's ops that run, and what else was asked for."""

    def __init__(self):
        super().__init__()
        self.names = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names[f"{func.namespace}::{func.overloadpacket.__name__}"] += 1
        return func(*args, **(kwargs or {}))

    def __getitem__(self, name):
        return self.names[f"fastfuse::{name}"]


class Recorded(nn.Module):
    """A layer of somebody's own."""

    def forward(self, x, **kwargs):
        self.masks = [*getattr(self, "masks", []), kwargs["encoder_mask"]]
        return super().forward(x, **kwargs) if isinstance(self, (FusionLayer, TransformerCrossAttentionLayer)) else x


class Derived(Recorded, TransformerCrossAttentionLayer):
    pass


class DerivedFusion(Recorded, FusionLayer):
    pass


def test_layers_of_somebody_s_own_get_the_tensor_that_was_passed():
    """As they did, while ours beside them share one mask."""
    decoder, em = make_decoder(*LAYERS), EncoderMask.from_dense(HOLES)
    want = decoder(TEXT, encoder_input=Y, encoder_mask=HOLES)
    decoder.layers[0].__class__, decoder.layers[3].__class__ = DerivedFusion, Derived
    decoder.layers.insert(1, Recorded())
    assert torch.equal(decoder(TEXT, encoder_input=Y, encoder_mask=HOLES), want)
    decoder(TEXT, encoder_input=Y, encoder_mask=em)
    for i in (0, 1, 4):
        first, second = decoder.layers[i].masks
        assert first is HOLES and second is em, "what was passed, whatever it is"


@pytest.mark.parametrize("where", ["layer", "part", "attn"])
@pytest.mark.parametrize("how", ["forward", "pre-hook", "hook", "global hook"])
def test_whoever_looks_at_the_keywords_sees_a_tensor(how, where):
    decoder, seen = make_decoder(*LAYERS), []
    want, layer = decoder(TEXT, encoder_input=Y, encoder_mask=HOLES), decoder.layers[0]
    module = {"layer": layer, "part": layer.fusion_layer, "attn": layer.fusion_layer.attn}[where]

    def look(m, args, kwargs, *out):
        if m is module:
            seen.append(kwargs["mask" if where == "attn" else "encoder_mask"])

    handle = contextlib.nullcontext()
    if how == "forward":
        forward = module.forward
        module.forward = lambda *args, **kwargs: (look(module, args, kwargs), forward(*args, **kwargs))[1]
    elif how == "global hook":
        handle = nn.modules.module.register_module_forward_hook(look, with_kwargs=True)
    else:
        handle = (module.register_forward_hook if how == "hook" else module.register_forward_pre_hook)(look, with_kwargs=True)
    with handle:
        out = decoder(TEXT, encoder_input=Y, encoder_mask=HOLES)
    assert len(seen) == 1 and isinstance(seen[0], Tensor)
    assert_rounding_apart(out, want, D, products=30)
    with Ops() as ops:
        make_decoder(*LAYERS)(TEXT, encoder_input=Y, encoder_mask=HOLES)
    assert ops["cross_attention"] == N_CROSS, "a hook that is gone"
    nn.modules.module._global_forward_hooks_with_kwargs.clear()  # which PyTorch forgets


def test_hooks_that_get_no_keywords_change_nothing():
    decoder = make_decoder(*LAYERS)
    with contextlib.ExitStack() as hooks, Ops() as ops:
        for module in decoder.modules():
            hooks.enter_context(module.register_forward_hook(lambda m, args, out: None))
        decoder(TEXT, encoder_input=Y, encoder_mask=HOLES)
    assert (ops["pack_mask"], ops["cross_attention"]) == (1, N_CROSS)


class Sub(MultiHeadAttention):
    def forward(self, x, y=None, *, mask=None, **kwargs):
        self.seen.append(mask)
        return super().forward(x, y, mask=mask, **kwargs)


class Own(nn.Module):
    """Attention of somebody's own, as torchtune's layers take it."""

    def __init__(self, attn):
        super().__init__()
        self.attn, self.pos_embeddings, self.kv_cache, self.cache_enabled = attn, None, None, False

    def forward(self, x, y, *, mask=None):
        self.seen.append(mask)
        return self.attn(x, y, mask=mask)


@pytest.mark.parametrize(
    ("form", "kind", "empty_rows"),
    [(form, kind, RULES[i % 2]) for kind in ("own", "subclass", "attention call") for i, form in enumerate(["bits of any rows", *ANY_ROWS, "intervals"])],
)
def test_attention_of_somebody_s_own_gets_a_tensor(form, kind, empty_rows):
    layer, seen, (dense, mask) = make_cross_layer(empty_rows=empty_rows), [], form_of(form)
    exact, eager = (reference.cross_layer(m, X.to(dtype), Y.to(dtype), dense) for m, dtype in ((copy.deepcopy(layer).double(), torch.float64), (layer, FP32)))
    if kind == "attention call":
        layer.attn._attention_call = lambda *args, **kwargs: seen.append(kwargs["mask"]) or sdpa_or_flex_attention(*args, **kwargs)
    else:
        layer.attn.__class__, layer.attn = (Sub, layer.attn) if kind == "subclass" else (MultiHeadAttention, Own(layer.attn))
        layer.attn.seen = seen
    with Ops() as ops:
        assert_no_worse(layer(X, encoder_input=Y, encoder_mask=mask), eager, exact)
    assert [type(m) for m in seen] == [Tensor] and seen[0].shape == (B, S, S_E) and ops["cross_attention"] == 0
    assert seen[0].any(-1).all(), "no row of nothing: a softmax of it is NaN in some kernels"


def test_attention_alone_gives_a_call_of_somebody_s_own_a_tensor():
    attn, seen = shaken(make_attention(cross=True)), []
    want = attn(X, Y, mask=HOLES)
    attn._attention_call = lambda *args, **kwargs: seen.append(kwargs["mask"]) or sdpa_or_flex_attention(*args, **kwargs)
    assert torch.equal(attn(X, Y, mask=EncoderMask.from_dense(HOLES)), want) and torch.equal(seen[0], HOLES)


def test_dropout_is_pytorch_s():
    layer, results, mask = make_cross_layer(), [], EncoderMask.from_dense(HOLES)
    layer.attn.attn_dropout = 0.5
    for form in (HOLES, mask):
        torch.manual_seed(5)
        with Ops() as ops:
            results.append(layer.train()(X, encoder_input=Y, encoder_mask=form))
        assert ops["cross_attention"] == ops["pack_mask"] == 0
    with Ops() as ops:
        plain = layer.eval()(X, encoder_input=Y, encoder_mask=mask)
    assert ops["cross_attention"] == 1
    assert torch.equal(*results) and not torch.isclose(plain, results[0]).all()
    blind = ~HOLES.any(-1)
    assert torch.equal(results[0][blind], X[blind])
    q, k = torch.randn(B, 4, S, 4), torch.randn(B, 2, S_E, 4)
    out = sdpa_or_flex_attention(q, k, k, mask, 0.5, False).transpose(1, 2)
    assert not out[blind].any() and out[~blind].any() and out.isfinite().all()


TRANSFORMS = {
    "none": lambda f, x, t: f(x),
    "grad": lambda f, x, t: torch.func.grad(lambda x: f(x).square().sum())(x),
    "vmap": lambda f, x, t: torch.func.vmap(f)(torch.stack([x, t])),
    "jvp": lambda f, x, t: torch.func.jvp(f, (x,), (t,))[1],
}


@pytest.mark.parametrize("form", ANY_ROWS)
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_transforms_of_a_functional_call(transform, form):
    layer, x, t, y = make_cross_layer().double(), X.double(), torch.randn(X.shape).double(), Y.double()
    given = {"encoder_input": y, "encoder_mask": form_of(form)[1]}
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        got = TRANSFORMS[transform](lambda x: torch.func.functional_call(layer, dict(layer.named_parameters()), (x,), given), x, t)
    assert (got - TRANSFORMS[transform](lambda x: reference.cross_layer(layer, x, y, HOLES), x, t)).abs().max() < 1e-12


@pytest.mark.parametrize("form", ANY_ROWS)
def test_what_no_kernel_covers_goes_the_dense_way(form, kernels):
    """float64, as on a GPU, where nothing is tried first: no error is caught."""
    layer, x, y, mask = make_cross_layer().double(), X.double(), Y.double(), form_of(form)[1]
    with Ops() as ops:
        out = layer(x, encoder_input=y, encoder_mask=mask)
    assert (out - reference.cross_layer(layer, x, y, HOLES)).abs().max() < 1e-12
    assert not [n for n in ops.names if n.startswith("fastfuse::")]
    got = layer.attn(x, y, mask=EncoderMask.from_dense(HOLES))
    assert (got - reference.attention(layer.attn, x, y, HOLES)).abs().max() < 1e-12 and not got[~HOLES.any(-1)].any()


def test_autocast():
    """q and k leave their norms in fp32, v its projection in bf16: the op takes all three in bf16."""
    model = make_model()

    def run(mask, calls):
        with torch.autocast("cpu", BF16), Ops() as ops:
            out = model(TEXT, **PICTURES, encoder_mask=mask)
        assert ops["cross_attention"] == calls
        return out

    results = [run(mask, N_CROSS) for mask in (HOLES, EncoderMask.from_dense(HOLES))]
    exact = reference.model(copy.deepcopy(model).double(), TEXT, IMAGES.double(), HOLES)
    for layer in filter(None, map(cross_attention_of, model.decoder.layers)):
        layer.attn._attention_call = lambda *args, **kwargs: sdpa_or_flex_attention(*args, **kwargs)
    eager = run(HOLES, 0)
    for got in results:
        assert_no_worse(got, eager, exact)


def test_shapes_of_the_mask_are_checked():
    decoder, em = make_decoder(), EncoderMask.from_dense(HOLES)
    for wrong, error, message in (
        (EncoderMask.cat([em, em]), ValueError, r"encoder_mask has shape \(4, 9, 12\), expected \(2 or 1, 9, keys\)"),
        (em.narrow(0, 1), ValueError, r"encoder_mask has shape \(2, 1, 12\), expected \(2 or 1, 9, keys\)"),
        (em.widened(13), ValueError, r"mask has shape \(2, 9, 13\), q and k need \(2 or 1, 9, 12\)"),
        (widened(HOLES, 13), RuntimeError, "13.*12|12.*13"),
    ):
        with pytest.raises(error, match=message):
            decoder(TEXT, encoder_input=Y, encoder_mask=wrong)
