"""VisionTransformer up to its layers: one op where its modules are plain, the modules themselves where someone changed them."""

import copy

import pytest
import torch
from numerics import in_several_orders
from reference import assert_results_no_worse
from test_vision_transformer import RATIOS, SUPPORTED, D, images, transformer
from torch import Tensor, nn
from torch.nn import functional as F

import fastfuse
from fastfuse import tune
from fastfuse.models.clip import clip_vision_encoder
from fastfuse.modules import tile_position_embeddings

KINDS = {
    "tiled": {},
    "append": {"append_cls_token": True},
    "no pre": {"pre": False},
    "padded": {"pad_tokens_to": 8},
    "ids": {"ratios": SUPPORTED, "pad_tokens_to": 8},
    "one tile": {"tiles": 1},
    "remainder": {"tile_size": 11},
}


def flat(model, **kwargs) -> tuple[Tensor, Tensor | None]:
    pixels = images(tile_size=model.tile_size, **kwargs).flatten(0, 1)
    return pixels, None if model.pre_tile_pos_embed is None and not hasattr(model.token_pos_embedding, "gate") else RATIOS.flatten(0, 1)


def embedded(model, fused: bool, pixels: Tensor, ratio: Tensor | None) -> tuple[Tensor, dict[str, tuple]]:
    """Tokens, and the gradients of everything in front of the layers for a few upstream gradients."""
    parts = {n: getattr(model, n) for n in ("conv", "cls_token_embedding", "pre_tile_pos_embed", "token_pos_embedding", "ln_pre")}
    pixels = pixels.clone().requires_grad_()
    leaves = {"images": pixels} | {f"{n}.{name}": p for n, m in parts.items() if m is not None for name, p in m.named_parameters()}
    y = (model._fused_embedding if fused else model._embedding)(pixels, ratio)
    ups = [torch.randn(y.shape, generator=torch.Generator().manual_seed(k)).to(y.dtype) for k in range(4)]
    draws = [torch.autograd.grad(y, leaves.values(), up, retain_graph=True) for up in ups]
    return y.detach(), dict(zip(leaves, zip(*draws, strict=True), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_one_op_is_the_modules(kind):
    """By the rule, and in float64 the same."""
    model = transformer(**KINDS[kind])
    pixels, ratio = flat(model)
    assert model._is_plain()
    for dtype in (torch.float32, torch.bfloat16):
        model, pixels = model.to(dtype), pixels.to(dtype)
        double = copy.deepcopy(model).double(), pixels.double()
        exact = embedded(double[0], False, double[1], ratio)
        assert_results_no_worse(embedded(model, True, pixels, ratio), in_several_orders(embedded, model, False, pixels, ratio), exact)
    torch.testing.assert_close(embedded(double[0], True, double[1], ratio), exact)


@pytest.mark.parametrize("kind", ["append", "ids", "remainder"])
@pytest.mark.parametrize("gathered", [False, True])
def test_by_the_kernels(kind, gathered):
    model = transformer(**KINDS[kind])
    pixels, ratio = flat(model)
    tile = tune.Tile({"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_K": 32, "SUBTILES": 2, "DIRECT": gathered, "FLATTEN": False})
    with fastfuse.backend("triton"), tune.pin("patch_embed", tile):
        got = embedded(model, True, pixels, ratio)
    eager = in_several_orders(embedded, model, False, pixels, ratio)
    assert_results_no_worse(got, eager, embedded(copy.deepcopy(model).double(), False, pixels.double(), ratio))


def test_clip_too():
    model = clip_vision_encoder(tile_size=8, patch_size=4, embed_dim=8, num_layers=1, num_heads=2, max_num_tiles=1)
    calls = spied(model)
    model(torch.randn(2, 1, 1, 3, 8, 8))
    assert calls == ["fused"]


def spied(model) -> list[str]:
    calls = []
    for name in ("_fused_embedding", "_embedding"):
        real = getattr(model, name)
        setattr(model, name, lambda *args, real=real, name=name: calls.append("fused" if "fused" in name else "modules") or real(*args))
    return calls


class Doubled(nn.Conv2d):
    def forward(self, x):
        return 2 * super().forward(x)


def _forward_of_its_own(model):
    real = model.ln_pre.forward
    model.ln_pre.forward = lambda x: 2 * real(x)


def _class_of_its_own(model):
    conv = Doubled(3, D, 3, stride=3, bias=False)
    conv.load_state_dict(model.conv.state_dict())
    model.conv = conv


def _bias(model):
    weight = model.conv.weight
    model.conv = nn.Conv2d(3, D, 3, stride=3)
    model.conv.weight = weight


def _convolution_of_its_own(model):
    real = model.conv._conv_forward
    model.conv._conv_forward = lambda *args: 2 * real(*args)


CHANGES = {
    "hook": lambda model: model.cls_token_embedding.register_forward_hook(lambda m, args, y: 2 * y),
    "pre-hook": lambda model: model.conv.register_forward_pre_hook(lambda m, args: (2 * args[0],)),
    "backward hook": lambda model: model.ln_pre.register_full_backward_hook(lambda m, gi, go: None),
    "forward": _forward_of_its_own,
    "convolution": _convolution_of_its_own,
    "class": _class_of_its_own,
    "bias": _bias,
    "overlap": lambda model: setattr(model.conv, "padding", (1, 1)) or setattr(model.conv, "stride", (4, 4)),
    "parametrized": lambda model: nn.utils.parametrizations.weight_norm(model.conv),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_someone_changed_is_called(change):
    model = transformer()
    calls = spied(model)
    before = model(images(), RATIOS)[0]
    CHANGES[change](model)
    after = model(images(), RATIOS)[0]
    assert calls == ["fused", "modules"]
    assert after.shape == before.shape and after.isfinite().all()


def test_transforms_and_forward_mode_take_the_modules():
    model = transformer()
    assert model._is_plain()
    x = torch.func.grad(lambda x: model(x, RATIOS)[0].sum())(images())
    assert x.any()
    assert not torch.func.vmap(lambda x: x + model._is_plain())(torch.zeros(1)).item()
    with torch.autograd.forward_ad.dual_level():
        pixels, ratio = flat(model)
        assert not model._is_plain()
        y = model._embedding(torch.autograd.forward_ad.make_dual(pixels, torch.ones_like(pixels)), ratio)
        assert torch.autograd.forward_ad.unpack_dual(y).tangent.any()


def test_two_tables_of_other_sizes_take_the_modules():
    model, other = transformer(), transformer(5)
    model.pre_tile_pos_embed = other.pre_tile_pos_embed
    calls = spied(model)
    x = model(images(), RATIOS)[0]
    assert calls == ["modules"] and x.isfinite().all()


@pytest.mark.parametrize("ratios", [None, SUPPORTED])
@pytest.mark.parametrize("wrong", [(5, 1), (2, 3), (-1, 1)])
def test_a_ratio_without_a_place_is_named(ratios, wrong):
    ratio = RATIOS.clone()
    ratio[0, 1] = torch.tensor(wrong)
    with pytest.raises(ValueError, match=rf"aspect_ratio has \[{wrong[0]}, {wrong[1]}\] \(h, w\)"):
        transformer(ratios=ratios)(images(), ratio)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_ids_are_of_whole_numbers_wherever_the_ratios_are(dtype, monkeypatch):
    monkeypatch.setattr(tile_position_embeddings, "values_are_at_hand", lambda t: False)
    with pytest.raises(ValueError, match=f"aspect_ratio is {dtype}, expected integers"):
        transformer(ratios=SUPPORTED).pre_tile_pos_embed.ids_of(torch.ones(2, 2).to(dtype), 4)


def test_pixels_of_any_dtype_are_cast():
    model = transformer(tiles=1)
    whole = torch.randint(256, (1, 1, 1, 3, 9, 9))
    want = model(whole.float())[0]
    for dtype in (torch.uint8, torch.int64, torch.float64):
        assert torch.equal(model(whole.to(dtype))[0], want)


def test_linear_layers_after_it_see_the_padding_as_zeros():
    model = transformer(pad_tokens_to=8)
    pixels, ratio = flat(model)
    y = model._fused_embedding(pixels, ratio)
    assert y.shape[2] == 16 and not y[:, :, 10:].any() and torch.equal(y, F.pad(y[:, :, :10], (0, 0, 0, 6)))
