"""VisionTransformer against its formula written out with loops; up to its layers as one op where its modules are plain, the modules where someone changed them."""

import copy

import pytest
import torch
from dense_vision import Dense, parameters, randomize
from numerics import assert_no_worse, in_several_orders
from reference import assert_matches
from small_vision import RATIOS, SUPPORTED
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastfuse
from fastfuse import tune
from fastfuse.models.clip import clip_vision_encoder
from fastfuse.modules import (
    CLSProjection,
    TiledTokenPositionalEmbedding,
    TilePositionalEmbedding,
    TokenPositionalEmbedding,
    VisionTransformer,
    tile_position_embeddings,
)

D, HEADS, PATCH, TILE, T, LAYERS = 16, 2, 3, 9, 4, 3
N = (TILE // PATCH) ** 2 + 1


def transformer(tiles=T, cls=False, tile_size=TILE, patch=PATCH, ratios=None, pre=True, post=True, **kwargs):
    sizes = {"activation": nn.GELU, "attn_bias": False, "hidden_dim": 2 * D, "cls_output_dim": 5, "output_cls_projection": cls}
    model = clip_vision_encoder(tile_size, patch, D, LAYERS, HEADS, max_num_tiles=tiles, aspect_ratios=ratios, **sizes, **kwargs)
    for place, wanted in (("pre", pre), ("post", post)):
        if not wanted:
            setattr(model, f"{place}_tile_pos_embed", None)
    return randomize(model)


def images(b=2, i=2, t=T, tile_size=TILE, channels=3):
    return torch.randn(b, i, t, channels, tile_size, tile_size)


PADDED = {"out_indices": [0, 2], "pad_to": 8}
CASES = {  # name: arguments of the module, of its formula, of the images, the ratios
    "plain": ({}, {}, {}, RATIOS),
    # Index k is the input of layer k, or its output; 3, the number of layers, the output of the last one, before ln_post: in their order, each once
    "hidden_states": ({"out_indices": [2, 0, 2]}, {"out_indices": [2, 0]}, {}, RATIOS),
    "hidden_states of the last": ({"out_indices": [3, 1]}, {"out_indices": [1, 3]}, {}, RATIOS),
    "hidden_states after layers": ({"out_indices": [0, 3, 1], "states_after_layer": True}, {"out_indices": [0, 1, 3], "states_after": True}, {}, RATIOS),
    "append": ({"append_cls_token": True}, {"append_cls": True}, {}, RATIOS),
    "cls": ({"cls": True, "append_cls_token": True, "out_indices": [1]}, {"append_cls": True, "out_indices": [1]}, {}, RATIOS),
    "ratios": ({"ratios": SUPPORTED}, {"supported": SUPPORTED}, {}, RATIOS),
    "no pre": ({"pre": False}, {}, {}, RATIOS),
    "no post": ({"post": False}, {}, {}, RATIOS),
    # 10 tokens of a tile become 16, 12 or 10; with 10 the mask of padding tiles alone is left
    "padded to 16": ({"pad_tokens_to": 8, "out_indices": [0, 2]}, PADDED, {}, RATIOS),
    "padded to 12": ({"pad_tokens_to": 4, "ratios": SUPPORTED}, {"pad_to": 4, "supported": SUPPORTED}, {}, RATIOS),
    "padded to 10": ({"pad_tokens_to": 2}, {"pad_to": 2}, {}, RATIOS),
    "padding tiles alone": ({"pad_tokens_to": 8}, {"pad_to": 8}, {}, torch.tensor([[[2, 2], [0, 0]], [[0, 0], [1, 1]]])),
    "remainder": ({"tile_size": 49, "patch": 9}, {}, {"b": 1, "i": 1, "t": 2, "tile_size": 49}, torch.tensor([[[1, 2]]])),
    "one channel": ({"in_channels": 1}, {}, {"channels": 1}, RATIOS),
    "one tile": ({"tiles": 1}, {}, {"t": 1}, None),
    "tiles without places": ({"tiles": 1}, {}, {"t": 3}, None),
}  # fmt: skip


@pytest.mark.parametrize(("case", "dtype"), [(case, (torch.float32, torch.bfloat16)[i % 2]) for i, case in enumerate(CASES)])
def test_values_and_gradients_are_the_formula_s(case, dtype):
    made, known, shape, ratio = CASES[case]

    def together(outputs):
        return torch.cat([y.flatten() for y in (outputs[0], *outputs[1])])

    def formula(m, images):
        return together(Dense(parameters(m), clip_heads=HEADS, **known).clip(images, ratio))

    assert_matches(transformer(**made), lambda m, images: together(m(images, ratio)), formula, {"images": images(**shape)}, dtype, draws=2)


def test_encode_keeps_the_padding_and_the_mask_that_forward_drops():
    model, pixels = transformer(pad_tokens_to=8, out_indices=[1]), images()
    encoded, (x, hidden) = model.encode(pixels, RATIOS), model(pixels, RATIOS)
    _, _, visible = Dense(parameters(model), clip_heads=HEADS, pad_to=8).encode("", pixels, RATIOS)
    assert encoded.x.shape == (2, 2, T, 16, D) and torch.equal(encoded.mask, torch.zeros(visible.shape).masked_fill(~visible, -torch.inf))
    assert torch.equal(encoded.x[:, :, :, :N], x) and torch.equal(encoded.hidden_states[0], hidden[0])
    assert transformer().encode(pixels, RATIOS).mask is None


def test_parts_are_used_under_their_own_names_and_the_layer_is_copied():
    source, token, projection = transformer().layers[0], TiledTokenPositionalEmbedding(T, D, TILE, PATCH), CLSProjection(D, 5)
    pre, post = (TilePositionalEmbedding(T, D) for _ in range(2))
    model = VisionTransformer(PATCH, TILE, LAYERS, D, source, token, pre, post, projection, [2, 0])
    assert model.pre_tile_pos_embed is pre and model.post_tile_pos_embed is post and model.token_pos_embedding is token and model.cls_projection is projection
    assert (
        (model.patches_per_tile, model.get_image_tokens_per_tile(), model.out_indices) == (N - 1, N, [2, 0])
        and model.ln_pre.eps == model.ln_post.eps == 1e-5
        and model.conv.bias is None
    )
    assert all(torch.equal(p, q) for each in model.layers for p, q in zip(each.parameters(), source.parameters(), strict=True))
    assert len({p.data_ptr() for m in (source, model.layers) for p in m.parameters()}) == (1 + LAYERS) * len(list(source.parameters()))


def test_keys_are_torchtune_s_in_its_order():
    per_layer = [f"attn.{p}_proj.weight" for p in ("q", "k", "v", "output")]
    per_layer += [f"{m}.{p}" for m in ("mlp.w1", "mlp.w2", "sa_norm", "mlp_norm") for p in ("weight", "bias")]
    tiles = [f"{place}_tile_pos_embed.{p}" for place in ("pre", "post") for p in ("embedding", "gate")]
    tokens = [f"token_pos_embedding.{p}" for p in ("local_token_positional_embedding", "global_token_positional_embedding", "gate")]
    layers = [f"layers.{k}.{name}" for k in range(LAYERS) for name in per_layer]
    rest = ["conv.weight", "ln_post.weight", "ln_post.bias", "ln_pre.weight", "ln_pre.bias", "cls_token_embedding.weight"]
    assert list(transformer(cls=True).state_dict()) == [*tiles, *tokens, "cls_projection.weight", *layers, *rest]


def test_a_ratio_that_decides_nothing_may_be_left_out():
    """Without tile embeddings any; with them None stands for one tile."""
    model, pixels = transformer(tiles=1), images(t=3)
    assert torch.equal(model(pixels)[0], model(pixels, RATIOS)[0])
    for ratios in (None, SUPPORTED):
        model, pixels = transformer(ratios=ratios), images(t=1)
        assert torch.equal(model(pixels)[0], model(pixels, torch.ones(2, 2, 2, dtype=torch.int64))[0])


def forward(*shape, ratio=(1, 1), **made):
    """Of one image, or of images of the shape."""
    return transformer(**made)(torch.zeros(shape or (1, 1, T, 3, TILE, TILE)), torch.tensor([[ratio]]))


SIX, SHAPE = (2, 2, T, 3, TILE, TILE), r"images has shape .*, expected \(b, n_imgs, n_tiles, 3, 9, 9\)"
NO_RATIO = r"aspect_ratio was not provided, but found n_tiles>1 for images.shape=\(2, 2, 4, 3, 9, 9\)"
REFUSED = [
    *((NO_RATIO, lambda made=made: transformer(**made)(images())) for made in ({}, {"pre": False, "post": False}, {"ratios": SUPPORTED})),
    (r"images has shape \(2, 4, 3, 9, 9\), expected \(b, n_imgs, n_tiles, 3, 9, 9\)", lambda: forward(*SIX[1:])),
    # 3 x 9 patches of a 9 x 27 tile are as many as 9 x 3: they would pass as tokens of the wrong place.
    *((SHAPE, lambda tile=tile: forward(1, 1, 1, *tile)) for tile in ((3, 12, 12), (3, 27, 3), (1, 9, 9), (9, 9, 3))),
    (r"aspect_ratio has shape \(4, 2\), images \(2, 2, 4, 3, 9, 9\) need \(2, 2, 2\)", lambda: transformer()(images(), RATIOS.flatten(0, 1))),
    *(
        (rf"aspect_ratio has \[{h}, {w}\] \(h, w\), images have 4 tiles", lambda h=h, w=w, ratios=ratios: forward(ratio=(h, w), ratios=ratios))
        for h, w, ratios in ((2, 3, None), (5, 1, SUPPORTED))
    ),
]


@pytest.mark.parametrize(("message", "call"), REFUSED)
def test_what_does_not_fit_is_refused(message, call):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_ids_are_of_whole_numbers_wherever_the_ratios_are(dtype, monkeypatch):
    monkeypatch.setattr(tile_position_embeddings, "values_are_at_hand", lambda t: False)
    with pytest.raises(ValueError, match=f"aspect_ratio is {dtype}, expected integers"):
        transformer(ratios=SUPPORTED).pre_tile_pos_embed.ids_of(torch.ones(2, 2).to(dtype), 4)


def test_a_layer_s_mask_keyword_is_passed_only_where_there_is_a_mask():
    model = VisionTransformer(PATCH, TILE, 2, D, nn.Tanh(), TokenPositionalEmbedding(D, TILE, PATCH), out_indices=[0, 1])
    _, (first, second) = model(images())
    assert torch.equal(second, first.tanh())


@pytest.mark.parametrize("pad_to, ratios", [(1, None), (8, SUPPORTED)])
def test_forward_and_backward_need_no_values_at_all(pad_to, ratios):
    model = transformer(pad_tokens_to=pad_to, ratios=ratios, out_indices=[1])
    with FakeTensorMode() as mode:  # shapes alone: whatever asks for a value raises
        fake = {name: mode.from_tensor(t) for name, t in (*model.named_parameters(), *model.named_buffers())}
        x, _ = torch.func.functional_call(model, fake, (images(), torch.ones(2, 2, 2, dtype=torch.int64)))
        x.sum().backward()
    assert x.shape == (2, 2, T, N, D) and all(t.grad.shape == t.shape for t in fake.values() if t.requires_grad)


def test_compiled_with_tables_of_ratios_and_a_mask_it_is_one_graph_with_the_same_values():
    model, pixels = transformer(out_indices=[0, 2], pad_tokens_to=8, ratios=SUPPORTED), images()
    torch._dynamo.reset()
    (want, hidden), (got, got_hidden) = (m(pixels, RATIOS) for m in (model, torch.compile(model, fullgraph=True, backend="aot_eager")))
    assert torch.equal(got, want) and all(map(torch.equal, got_hidden, hidden))


def test_images_take_the_dtype_of_the_weights():
    """The image transform makes bf16; no images are no error."""
    model, whole = transformer(out_indices=[0]), torch.randint(256, (1, 1, 1, 3, TILE, TILE))
    for dtype in (torch.uint8, torch.int64, torch.float64, torch.bfloat16):
        assert torch.equal(model(whole.to(dtype))[0], model(whole.to(dtype).float())[0])
    x, hidden = model(torch.randn(0, 1, 2, 3, TILE, TILE), torch.ones(0, 1, 2, dtype=torch.int64))
    assert x.shape == hidden[0].shape == (0, 1, 2, N, D)


def front(case):
    """A model, and of each image its tiles and its ratio."""
    made, _, shape, ratio = CASES[case]
    return transformer(**made), images(**shape).flatten(0, 1), None if ratio is None else ratio.flatten(0, 1)


@torch.no_grad()
@pytest.mark.parametrize("case", ["plain", "append", "no pre", "padded to 16", "padded to 12", "one tile", "remainder"])
def test_one_op_is_the_modules(case, device):
    """In front of the layers, in float64 and by the kernels of two images; padding tokens are zeros."""
    model, pixels, ratio = (t if t is None else t.to(device) for t in front(case))
    assert model._is_plain()
    exact, few, n = copy.deepcopy(model).double(), slice(-2, None), model.get_image_tokens_per_tile()
    got, want = (way(pixels.double(), ratio) for way in (exact._fused_embedding, exact._embedding))
    torch.testing.assert_close(got, want)
    assert got.shape[2] == n + -n % model.pad_tokens_to and not got[:, :, n:].any()
    tile = {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 32, "SUBTILES": 2, "DIRECT": case in ("padded to 12", "remainder"), "FLATTEN": False}
    given = pixels[few], None if ratio is None else ratio[few]
    with fastfuse.backend("triton"), tune.pin("patch_embed", tune.Tile(tile)):
        got = model._fused_embedding(*given)
    assert_no_worse(got, in_several_orders(model._embedding, *given), want[few])


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def doubled(owner, name):
    real = getattr(owner, name)
    setattr(owner, name, lambda *args: 2 * real(*args))


CHANGES = {
    "hook": lambda model: model.cls_token_embedding.register_forward_hook(lambda m, args, y: 2 * y),
    "pre-hook": lambda model: model.conv.register_forward_pre_hook(lambda m, args: (2 * args[0],)),
    "backward hook": lambda model: model.ln_pre.register_full_backward_hook(lambda m, gi, go: None),
    "forward": lambda model: doubled(model.ln_pre, "forward"),
    "convolution": lambda model: doubled(model.conv, "_conv_forward"),
    "class": lambda model: setattr(model.conv, "__class__", Doubled),
    "bias": lambda model: setattr(model, "conv", nn.Conv2d(3, D, 3, stride=3)),
    "overlap": lambda model: setattr(model.conv, "padding", (1, 1)) or setattr(model.conv, "stride", (4, 4)),
    "parametrized": lambda model: nn.utils.parametrizations.weight_norm(model.conv),
    "a table of another size": lambda model: setattr(model, "pre_tile_pos_embed", transformer(5).pre_tile_pos_embed),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_someone_changed_is_called(change):
    model, calls = transformer(), []
    for name in ("_fused_embedding", "_embedding"):
        real = getattr(model, name)
        setattr(model, name, lambda *args, real=real, name=name: calls.append(name) or real(*args))
    before = model(images(), RATIOS)[0]
    CHANGES[change](model)
    after = model(images(), RATIOS)[0]
    assert calls == ["_fused_embedding", "_embedding"] and after.shape == before.shape and after.isfinite().all()


def test_transforms_and_forward_mode_take_the_modules():
    model, pixels, ratio = front("plain")
    assert model._is_plain() and torch.func.grad(lambda x: model(x, RATIOS)[0].sum())(images()).any()
    assert not torch.func.vmap(lambda x: x + model._is_plain())(torch.zeros(1)).item()
    with torch.autograd.forward_ad.dual_level():
        assert not model._is_plain()
        y = model._embedding(torch.autograd.forward_ad.make_dual(pixels, torch.ones_like(pixels)), ratio)
        assert torch.autograd.forward_ad.unpack_dual(y).tangent.any()
