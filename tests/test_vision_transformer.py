"""VisionTransformer against its formula written out with loops, and the modules around it."""

import copy
import math

import pytest
import torch
from dense_vision import Dense, attend, layer_norm, leaves, parameters, patches, randomize
from numerics import assert_no_worse, in_several_orders
from reference import assert_gradients_no_worse
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from fastfuse.modules import (
    CLSEmbedding,
    CLSProjection,
    FeedForward,
    Fp32LayerNorm,
    MultiHeadAttention,
    TiledTokenPositionalEmbedding,
    TilePositionalEmbedding,
    TokenPositionalEmbedding,
    TransformerSelfAttentionLayer,
    VisionRotaryPositionalEmbeddings,
    VisionTransformer,
)

D, HEADS, PATCH, TILE, T, LAYERS = 16, 2, 3, 9, 4, 3
N = (TILE // PATCH) ** 2 + 1
RATIOS = torch.tensor([[[2, 2], [1, 3]], [[4, 1], [1, 1]]])
SUPPORTED = [(1, 1), (1, 2), (1, 3), (1, 4), (2, 1), (2, 2), (3, 1), (4, 1)]


def layer() -> TransformerSelfAttentionLayer:
    projections = {name: nn.Linear(D, D, bias=False) for name in ("q_proj", "k_proj", "v_proj", "output_proj")}
    attention = MultiHeadAttention(embed_dim=D, num_heads=HEADS, num_kv_heads=HEADS, head_dim=D // HEADS, **projections, is_causal=False)
    mlp = FeedForward(gate_proj=nn.Linear(D, 2 * D), down_proj=nn.Linear(2 * D, D), activation=nn.GELU())
    return TransformerSelfAttentionLayer(attention, mlp, sa_norm=Fp32LayerNorm(D), mlp_norm=Fp32LayerNorm(D))


def transformer(tiles=T, cls=None, tile_size=TILE, patch=PATCH, ratios=None, pre=True, post=True, **kwargs) -> VisionTransformer:
    if tiles == 1:
        token, pre, post = TokenPositionalEmbedding(D, tile_size, patch), False, False
    else:
        token = TiledTokenPositionalEmbedding(tiles, D, tile_size, patch, aspect_ratios=ratios)
    return randomize(
        VisionTransformer(
            patch, tile_size, LAYERS, D, layer(), token,
            pre_tile_pos_embed=TilePositionalEmbedding(tiles, D, aspect_ratios=ratios) if pre else None,
            post_tile_pos_embed=TilePositionalEmbedding(tiles, D, aspect_ratios=ratios) if post else None,
            cls_projection=CLSProjection(D, 5) if cls else None, **kwargs,
        )
    )  # fmt: skip


def dense(params, **kwargs) -> Dense:
    return Dense(params, clip_heads=HEADS, **kwargs)


def images(b=2, i=2, t=T, tile_size=TILE, channels=3, dtype=torch.float32):
    return torch.randn(b, i, t, channels, tile_size, tile_size, dtype=dtype)


def run(forward, params, pixels, ratio, dtype):
    """All outputs, and the gradients of a loss that weighs every one of them."""
    pixels = pixels.detach().clone().requires_grad_()
    out, hidden = forward(pixels, ratio)
    outputs = [out, *hidden]
    weights = [torch.randn(y.shape, generator=torch.Generator().manual_seed(k)).to(dtype).to(y.dtype) for k, y in enumerate(outputs)]
    return outputs, dict(zip(["images", *params], torch.autograd.grad(outputs, [pixels, *params.values()], weights), strict=True))


def check(model, pixels, ratio, dtype=torch.float32, **kwargs):
    """In float64 values and gradients are the formula's; in dtype they are as near to it as the formula itself."""
    model, pixels = model.to(dtype), pixels.to(dtype)
    exact, same = leaves(parameters(model), torch.float64), leaves(parameters(model), dtype)
    want, want_g = run(dense(exact, **kwargs).clip, exact, pixels.double(), ratio, dtype)
    double = copy.deepcopy(model).double()
    got, got_g = run(double, parameters(double), pixels.double(), ratio, dtype)
    assert len(got) == len(want)
    for a, b in zip([*got, *got_g.values()], [*want, *want_g.values()], strict=True):
        assert_no_worse(a.float(), b.float(), b, "in float64")
    got, got_g = run(model, parameters(model), pixels, ratio, dtype)
    eager = in_several_orders(run, dense(same, **kwargs).clip, same, pixels, ratio, dtype)
    for k, triple in enumerate(zip(got, zip(*(outputs for outputs, _ in eager), strict=True), want, strict=True)):
        assert_no_worse(*triple, "x" if k == 0 else f"hidden state {k - 1}")
    # There is no rule for one sum with cancellation, and where the truth is zero float64 has already shown it.
    several = [name for name, g in want_g.items() if g.numel() > 1 and g.any()]
    got, exact, *orders = ({name: (found[name],) for name in several} for found in (got_g, want_g, *(found for _, found in eager)))
    assert_gradients_no_worse(got, orders, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "made, known",
    [
        ({}, {}),
        ({"out_indices": [0, 2]}, {"out_indices": [0, 2]}),
        ({"append_cls_token": True}, {"append_cls": True}),
        ({"cls": True, "append_cls_token": True, "out_indices": [1]}, {"append_cls": True, "out_indices": [1]}),
        ({"ratios": SUPPORTED}, {"supported": SUPPORTED}),
        ({"pre": False}, {}),
        ({"post": False}, {}),
    ],
    ids=["plain", "hidden", "append", "cls", "ratios", "no-pre", "no-post"],
)
def test_values_and_gradients_are_the_formula_s(made, known, dtype):
    check(transformer(**made), images(), RATIOS, dtype, **known)


@pytest.mark.parametrize("pad_to, ratios", [(8, None), (4, SUPPORTED), (2, None)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_padding_tokens_are_hidden_from_each_other_and_from_nothing_else(pad_to, ratios, dtype):
    """10 tokens of a tile become 16, 12 or 10; with 10 the mask of padding tiles alone is left."""
    known = {"pad_to": pad_to, "supported": ratios, "out_indices": [0, 2]}
    check(transformer(pad_tokens_to=pad_to, out_indices=[0, 2], ratios=ratios), images(), RATIOS, dtype, **known)


def test_an_image_of_padding_tiles_alone_stays_finite_under_a_mask():
    check(transformer(pad_tokens_to=8), images(), torch.tensor([[[2, 2], [0, 0]], [[0, 0], [1, 1]]]), pad_to=8)


def test_encode_keeps_the_padding_and_the_mask_that_forward_drops():
    model, pixels = transformer(pad_tokens_to=8, out_indices=[1]), images()
    encoded = model.encode(pixels, RATIOS)
    x, hidden = model(pixels, RATIOS)
    want, _, masks = dense(leaves(parameters(model), torch.float64), pad_to=8).encode("", pixels.double(), RATIOS)
    eager = in_several_orders(lambda: dense(parameters(model), pad_to=8).encode("", pixels, RATIOS)[0])
    assert encoded.x.shape == (2, 2, T, 16, D)
    assert_no_worse(encoded.x, eager, want)
    visible = torch.stack(masks)
    assert torch.equal(encoded.mask, torch.zeros(visible.shape).masked_fill(~visible, -torch.inf))
    assert torch.equal(encoded.x[:, :, :, :N], x) and torch.equal(encoded.hidden_states[0], hidden[0])
    assert transformer().encode(pixels, RATIOS).mask is None


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("out_indices", [[0], [2], [2, 0], [1, 1], [0, 1, 2], [3], [0, 3], None, []])
def test_hidden_states_come_in_the_order_of_layers_each_once(out_indices, after):
    """Index k is the input of layer k; 3, the number of layers, the output of the last one, before ln_post."""
    model, pixels = transformer(out_indices=out_indices, states_after_layer=after), images()
    outputs = []
    for each in model.layers:
        each.register_forward_hook(lambda m, args, out: outputs.extend([args[0], out]))
    _, hidden = model(pixels, RATIOS)
    inputs, after_layer = outputs[0::2], outputs[1::2]
    want = [(after_layer if after or k == LAYERS else inputs)[min(k, LAYERS - 1)] for k in sorted(set(out_indices or []))]
    assert len(hidden) == len(want)
    for got, state in zip(hidden, want, strict=True):
        assert got.shape == (2, 2, T, N, D) and torch.equal(got.flatten(0, 1).flatten(1, 2), state)
    assert model.out_indices == (out_indices or [])


def test_hidden_states_of_real_depths_are_inputs_of_the_named_layers():
    torch.manual_seed(0)
    model = transformer(out_indices=[0, 1, 2])
    params, pixels = parameters(model), images()
    _, hidden = model(pixels, RATIOS)
    exact = dense(leaves(params, torch.float64), out_indices=[0, 1, 2]).clip(pixels.double(), RATIOS)[1]
    eager = in_several_orders(lambda: dense(params, out_indices=[0, 1, 2]).clip(pixels, RATIOS)[1])
    for triple in zip(hidden, zip(*eager, strict=True), exact, strict=True):
        assert_no_worse(*triple)


@pytest.mark.parametrize("append", [False, True])
def test_the_projection_reads_token_0_wherever_cls_is(append):
    model, whole = transformer(cls=True, append_cls_token=append), transformer(append_cls_token=append)
    whole.load_state_dict({name: p for name, p in model.state_dict().items() if "cls_projection" not in name})
    pixels = images()
    x, _ = whole(pixels, RATIOS)
    got, hidden = model(pixels, RATIOS)
    assert got.shape == (2, 2, T, 1, 5) and hidden == []
    assert torch.equal(got, x[:, :, :, :1] @ model.cls_projection.weight)


def test_cls_goes_before_the_patches_or_after_them():
    x = torch.randn(2, 3, 4, D)
    for append in (False, True):
        module = CLSEmbedding(D, append_cls_token=append)
        y = module(x)
        place, rest = (4, slice(0, 4)) if append else (0, slice(1, 5))
        assert torch.equal(y[:, :, place], module.weight.expand(2, 3, D)) and torch.equal(y[:, :, rest], x)


def test_the_small_modules_start_as_torchtune_s_do():
    torch.manual_seed(5)
    embedding, projection = CLSEmbedding(D), CLSProjection(D, 7)
    torch.manual_seed(5)
    assert torch.equal(embedding.weight, torch.randn(D) * D**-0.5)
    assert torch.equal(projection.weight, torch.randn(D, 7) * D**-0.5)
    assert list(projection.state_dict()) == ["weight"]


def test_a_tile_that_patches_do_not_fill_drops_the_remainder():
    model, pixels = transformer(tile_size=49, patch=9), images(1, 1, 2, 49)
    assert model.patches_per_tile == 25 and model.get_image_tokens_per_tile() == 26
    ratio = torch.tensor([[[1, 2]]])
    x, _ = model(pixels, ratio)
    assert x.shape == (1, 1, 2, 26, D)
    pixels[..., 45:, :] = torch.nan
    pixels[..., 45:] = torch.nan
    assert torch.equal(model(pixels, ratio)[0], x)
    check(model, images(1, 1, 2, 49), ratio)


def test_patches_are_cut_row_by_row():
    model = transformer(tiles=1)
    pixels = images(1, 1, 1)
    got = model.conv(pixels[0, 0]).flatten(2).transpose(1, 2).detach()
    params = parameters(model)
    assert_no_worse(got, patches(pixels[0, 0], params["conv.weight"]), patches(pixels[0, 0].double(), params["conv.weight"].double()))
    check(model, pixels, None)


def test_padding_tiles_take_part_in_attention():
    model, pixels = transformer(), images(1, 1)
    ratio = torch.tensor([[[1, 1]]])
    before, _ = model(pixels, ratio)
    pixels[:, :, 3] += 1
    after, _ = model(pixels, ratio)
    assert not torch.isclose(before[:, :, 0], after[:, :, 0]).all(-1).any()


def test_images_do_not_see_each_other():
    model, pixels = transformer(), images()
    before, _ = model(pixels, RATIOS)
    pixels[0, 0] += 1
    after, _ = model(pixels, RATIOS)
    assert not torch.equal(before[0, 0], after[0, 0])
    assert torch.equal(before[0, 1], after[0, 1]) and torch.equal(before[1], after[1])


def test_pre_and_post_tile_embeddings_stand_where_their_names_say():
    """With the other one's gate closed, before the layers and after ln_post."""
    for kept in ("pre_tile_pos_embed", "post_tile_pos_embed"):
        model = transformer()
        for name in ("pre_tile_pos_embed", "post_tile_pos_embed"):
            if name != kept:
                nn.init.zeros_(getattr(model, name).gate)
        check(model, images(1, 2), RATIOS[:1])
    model, pixels = transformer(), images()
    closed = copy.deepcopy(model)
    nn.init.zeros_(closed.post_tile_pos_embed.gate)
    x, y = (m(pixels, RATIOS)[0].flatten(0, 1) for m in (model, closed))
    assert torch.equal(x, model.post_tile_pos_embed(y, RATIOS.flatten(0, 1)))


def test_modules_that_are_passed_in_are_used_under_their_own_names():
    pre, post, token = TilePositionalEmbedding(T, D), TilePositionalEmbedding(T, D), TiledTokenPositionalEmbedding(T, D, TILE, PATCH)
    projection = CLSProjection(D, 5)
    model = VisionTransformer(PATCH, TILE, LAYERS, D, layer(), token, pre, post, projection, [2, 0])
    assert model.pre_tile_pos_embed is pre and model.post_tile_pos_embed is post
    assert model.token_pos_embedding is token and model.cls_projection is projection and model.out_indices == [2, 0]


def test_layers_are_copies_that_start_equal_and_share_nothing():
    source = layer()
    model = VisionTransformer(PATCH, TILE, LAYERS, D, source, TokenPositionalEmbedding(D, TILE, PATCH))
    assert len(model.layers) == LAYERS
    for each in model.layers:
        for (name, p), (_, q) in zip(each.named_parameters(), source.named_parameters(), strict=True):
            assert torch.equal(p, q) and p is not q, name
    assert len({p.data_ptr() for p in model.layers.parameters()}) == len(list(model.layers.parameters()))


def test_keys_are_torchtune_s_in_its_order():
    per_layer = [f"attn.{p}_proj.weight" for p in ("q", "k", "v", "output")] + [f"mlp.{w}.{p}" for w in ("w1", "w2") for p in ("weight", "bias")]
    per_layer += [f"{norm}.{p}" for norm in ("sa_norm", "mlp_norm") for p in ("weight", "bias")]
    tiles = [f"{place}_tile_pos_embed.{p}" for place in ("pre", "post") for p in ("embedding", "gate")]
    tokens = [f"token_pos_embedding.{p}" for p in ("local_token_positional_embedding", "global_token_positional_embedding", "gate")]
    layers = [f"layers.{k}.{name}" for k in range(LAYERS) for name in per_layer]
    rest = ["conv.weight", "ln_post.weight", "ln_post.bias", "ln_pre.weight", "ln_pre.bias", "cls_token_embedding.weight"]
    assert list(transformer(cls=True).state_dict()) == [*tiles, *tokens, "cls_projection.weight", *layers, *rest]


def test_norms_around_the_layers_have_eps_1e_5():
    model = transformer()
    assert model.ln_pre.eps == model.ln_post.eps == 1e-5
    tiny = 1e-3 * torch.randn(4, D)  # so small that eps decides
    assert_no_worse(model.ln_pre(tiny), layer_norm(tiny, model.ln_pre.weight, model.ln_pre.bias, 1e-5), layer_norm(tiny.double(), model.ln_pre.weight, model.ln_pre.bias, 1e-5))  # fmt: skip


@pytest.mark.parametrize("t", [1, 3])
def test_without_tile_embeddings_the_ratio_may_be_left_out_for_any_number_of_tiles(t):
    model, pixels = transformer(tiles=1), images(t=t)
    x, _ = model(pixels)
    assert torch.equal(x, model(pixels, RATIOS)[0])
    check(model, pixels, None)


@pytest.mark.parametrize("ratios", [None, SUPPORTED])
def test_with_tile_embeddings_a_left_out_ratio_is_one_tile(ratios):
    model, pixels = transformer(ratios=ratios), images(t=1)
    assert torch.equal(model(pixels)[0], model(pixels, torch.ones(2, 2, 2, dtype=torch.int64))[0])


@pytest.mark.parametrize("made", [{}, {"pre": False, "post": False}, {"ratios": SUPPORTED}])
def test_with_tile_embeddings_several_tiles_need_a_ratio(made):
    with pytest.raises(ValueError, match=r"aspect_ratio was not provided, but found n_tiles>1 for images.shape=\(2, 2, 4, 3, 9, 9\)"):
        transformer(**made)(images())


def test_shapes_that_do_not_fit_are_named():
    with pytest.raises(ValueError, match=r"images has shape \(2, 4, 3, 9, 9\), expected \(b, n_imgs, n_tiles, 3, 9, 9\)"):
        transformer()(images()[0], RATIOS)
    with pytest.raises(ValueError, match=r"aspect_ratio has shape \(4, 2\), images \(2, 2, 4, 3, 9, 9\) need \(2, 2, 2\)"):
        transformer()(images(), RATIOS.flatten(0, 1))
    with pytest.raises(ValueError, match=r"\[2, 3\] \(h, w\), images have 4 tiles"):
        transformer()(images(1, 1), torch.tensor([[[2, 3]]]))


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"tile_size": 0}, "tile_size must be > 0"),
        ({"tile_size": -4}, "tile_size must be > 0"),
        ({"patch_size": 0}, "patch_size must be > 0"),
        ({"out_indices": [0, 1], "num_layers": 1}, r"len\(out_indices\) must be <= num_layers. Got out_indices=\[0, 1\] and num_layers=1"),
        ({"pad_tokens_to": 0}, "pad_tokens_to must be >= 1"),
    ],
)
def test_wrong_sizes_are_refused(kwargs, message):
    sizes = {"patch_size": PATCH, "tile_size": TILE, "num_layers": 2, "embed_dim": D} | kwargs
    with pytest.raises(ValueError, match=message):
        VisionTransformer(**sizes, layer=layer(), token_pos_embedding=TokenPositionalEmbedding(D, TILE, PATCH))


def test_images_of_other_channels_need_in_channels():
    model = transformer(in_channels=1)
    assert model.conv.weight.shape == (D, 1, PATCH, PATCH) and model.conv.bias is None
    check(model, images(channels=1), RATIOS)


def test_bf16_stays_bf16():
    model = transformer(out_indices=[0, 1]).bfloat16()
    x, hidden = model(images(dtype=torch.bfloat16), RATIOS)
    assert {t.dtype for t in (x, *hidden)} == {torch.bfloat16}


def test_every_parameter_gets_a_gradient_even_those_of_unused_tiles_a_zero_one():
    model = transformer(out_indices=[1])
    x, hidden = model(images(), RATIOS)
    (x.square().sum() + hidden[0].sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() and p.grad.any() for p in model.parameters())
    assert not model.pre_tile_pos_embed.embedding.grad[3, 3].any()


def test_a_layer_s_mask_keyword_is_passed_only_where_there_is_a_mask():
    class Scale(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.tensor(2.0))

        def forward(self, x):
            return x * self.w

    model = VisionTransformer(PATCH, TILE, 2, D, Scale(), TokenPositionalEmbedding(D, TILE, PATCH), out_indices=[0, 1])
    _, (first, second) = model(images())
    assert torch.equal(second, 2 * first)


@pytest.mark.parametrize("pad_to, ratios", [(1, None), (8, SUPPORTED)])
def test_forward_and_backward_need_no_values_at_all(pad_to, ratios):
    model = transformer(pad_tokens_to=pad_to, ratios=ratios, out_indices=[1])
    with FakeTensorMode() as mode:  # shapes alone: whatever asks for a value raises
        fake = {name: mode.from_tensor(t) for name, t in (*model.named_parameters(), *model.named_buffers())}
        pixels, ratio = torch.randn(2, 2, T, 3, TILE, TILE), torch.ones(2, 2, 2, dtype=torch.int64)
        x, _ = torch.func.functional_call(model, fake, (pixels, ratio))
        x.sum().backward()
    assert x.shape == (2, 2, T, N, D)
    assert all(t.grad.shape == t.shape for t in fake.values() if t.requires_grad)


def test_compiled_with_tables_of_ratios_and_a_mask_it_is_one_graph_with_the_same_values():
    model, pixels = transformer(out_indices=[0, 2], pad_tokens_to=8, ratios=SUPPORTED), images()
    torch._dynamo.reset()
    want, hidden = model(pixels, RATIOS)
    got, got_hidden = torch.compile(model, fullgraph=True, backend="aot_eager")(pixels, RATIOS)
    assert torch.equal(got, want) and all(torch.equal(a, b) for a, b in zip(got_hidden, hidden, strict=True))


def axial_angle(token: int, pair: int, grid: int, dim: int, append: bool, base: float = 10_000) -> float:
    """The first half of the pairs turns by the column, the second by the row, both counted from 1; CLS by nothing."""
    patch = token if append else token - 1
    if patch in (-1, grid * grid):
        return 0.0
    half = dim // 4
    place = patch % grid + 1 if pair < half else patch // grid + 1
    return place * base ** (-2 * (pair % half) / (dim // 2))


@pytest.mark.parametrize("append", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_axial_rotation_turns_pairs_by_column_then_row_in_every_tile(append, dtype):
    dim, heads, tiles = 8, 2, 3
    rope = VisionRotaryPositionalEmbeddings(PATCH, TILE, dim, append_cls_token=append)
    x = torch.randn(2, tiles * N, heads, dim, dtype=dtype)
    angle = torch.tensor([[axial_angle(token, k, 3, dim, append) for k in range(dim // 2)] for token in range(N)], dtype=torch.float64)
    cos_sin = torch.stack([angle.cos(), angle.sin()], -1)
    assert rope.cache.shape == (N, dim // 2, 2) and rope.cache.dtype == torch.float32
    fp32 = angle.float()
    assert_no_worse(rope.cache, torch.stack([fp32.cos(), fp32.sin()], -1), cos_sin)
    pairs = x.double().reshape(2, tiles, N, heads, dim // 2, 2)
    want = torch.empty_like(pairs)
    for k in range(dim // 2):
        c, s = (cos_sin[:, k, j].reshape(N, 1) for j in (0, 1))
        want[..., k, 0] = pairs[..., k, 0] * c - pairs[..., k, 1] * s
        want[..., k, 1] = pairs[..., k, 0] * s + pairs[..., k, 1] * c
    want = want.reshape(x.shape)
    got = rope(x, input_pos=torch.arange(3))
    assert got.dtype == dtype
    assert_no_worse(got, want.to(dtype), want)
    cls = slice(N - 1, None, N) if append else slice(0, None, N)
    assert torch.equal(got[:, cls], x[:, cls])
    assert list(rope.state_dict()) == []


def test_axial_rotation_stays_fp32_when_the_model_is_cast_and_is_built_on_leaving_meta():
    rope = VisionRotaryPositionalEmbeddings(PATCH, TILE, 8)
    want = rope.cache.clone()
    assert torch.equal(rope.bfloat16().cache, want)
    with torch.device("meta"):
        empty = VisionRotaryPositionalEmbeddings(PATCH, TILE, 8)
    assert torch.equal(empty.to_empty(device="cpu").cache, want)


def test_the_dense_formula_agrees_with_torch_on_its_parts():
    """The reference of this file against operators nobody here wrote."""
    x, w = torch.randn(5, 3, 12, 12, dtype=torch.float64), torch.randn(D, 3, 4, 4, dtype=torch.float64)
    torch.testing.assert_close(patches(x, w), F.conv2d(x, w, stride=4).flatten(2).transpose(1, 2))
    q = torch.randn(3, 7, D, dtype=torch.float64)
    torch.testing.assert_close(attend(q, q, q, None), F.scaled_dot_product_attention(q, q, q, scale=1 / math.sqrt(D)).transpose(0, 1).flatten(1))


def small(**kwargs):
    tables = {"pre_tile_pos_embed": TilePositionalEmbedding(T, D), "post_tile_pos_embed": TilePositionalEmbedding(T, D)}
    return VisionTransformer(PATCH, TILE, 1, D, layer(), TiledTokenPositionalEmbedding(T, D, TILE, PATCH), **tables, **kwargs)


@pytest.mark.parametrize("shape", [(1, 1, 1, 3, 12, 12), (1, 1, 1, 3, 27, 3), (1, 1, 1, 1, 9, 9), (1, 1, 1, 9, 9, 3), (1, 1, 3, 9, 9)])
def test_tiles_of_another_size_are_refused(shape):
    """3 x 9 patches of a 9 x 27 tile are as many as 9 x 3: they would pass as tokens of the wrong place."""
    with pytest.raises(ValueError, match=r"images has shape .*, expected \(b, n_imgs, n_tiles, 3, 9, 9\)"):
        small()(torch.randn(shape), torch.ones(1, 1, 2, dtype=torch.int64))


def test_images_take_the_dtype_of_the_weights():
    """The image transform makes bf16."""
    model = small()
    images, ratio = torch.randn(1, 1, 1, 3, 9, 9).bfloat16(), torch.ones(1, 1, 2, dtype=torch.int64)
    assert torch.equal(model(images, ratio)[0], model(images.float(), ratio)[0])


def test_no_images_are_no_error():
    x, hidden = small(out_indices=[0])(torch.randn(0, 1, 2, 3, 9, 9), torch.ones(0, 1, 2, dtype=torch.int64))
    assert x.shape == hidden[0].shape == (0, 1, 2, N, D)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_ratios_are_integers(dtype):
    with pytest.raises(ValueError, match=f"aspect_ratio is {dtype}, expected integers"):
        small()(torch.randn(1, 1, 1, 3, 9, 9), torch.ones(1, 1, 2).to(dtype))
