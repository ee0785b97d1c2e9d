"""Rotary positions: pairs, frequencies, every form of positions, and a cache that stays in fp32. Values and gradients by the rule: test_modules.py."""

import copy
import pickle

import pytest
import torch
from dense_vision import rope_frequencies
from numerics import assert_no_worse
from reference import plain_thetas, rotate

from fastfuse.modules import Llama3ScaledRoPE, RotaryPositionalEmbeddings, VisionRotaryPositionalEmbeddings

X = torch.randn(3, 6, 2, 8, generator=torch.Generator().manual_seed(1))
CACHES = {
    "plain": lambda: RotaryPositionalEmbeddings(8, 20),
    "scaled": lambda: Llama3ScaledRoPE(8, 20, old_context_len=16),
    "vision": lambda: VisionRotaryPositionalEmbeddings(2, 6, 8),
}


def assert_rotated(rope, x, positions, **kwargs):
    """rope(x) is x turned by the positions [b, s] at the frequencies of rope."""
    thetas = rope.theta.double().tolist()
    assert_no_worse(rope(x, **kwargs), rotate(x, positions, thetas), rotate(x.double(), positions, thetas))


def test_low_precision_rotates_in_fp32_and_rounds_once():
    rope, x = RotaryPositionalEmbeddings(8), torch.randn(2, 9, 3, 8).bfloat16()
    assert torch.equal(rope(x), rope(x.float()).bfloat16())
    assert torch.equal(rope.bfloat16()(x), rope(x.float()).bfloat16())


def test_float64_stays_float64():
    """By the fp32 table."""
    rope, x = RotaryPositionalEmbeddings(4, 8), torch.randn(1, 5, 2, 4, dtype=torch.float64)
    factors = torch.view_as_complex(rope.cache[:5].double())[:, None]
    want = torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (2, 2))) * factors).flatten(-2)
    assert_no_worse(rope.double()(x), want, want)


@pytest.mark.parametrize(
    ("dim", "base", "scaling"),
    [
        *((dim, base, ()) for dim, base in ((4, 10_000), (16, 10_000), (64, 500_000), (80, 1e6))),
        *((128, base, scaling) for base, scaling in ((500_000, (8, 1, 4, 8192)), (10_000, (8, 1, 4, 8192)), (500_000, (32, 1, 4, 4096)))),
        (8, 100, (4, 1, 4, 32)),  # 6.3 is a short wave and stays, 19.9 is blended, 62.8 and 198.7 are divided by 4
    ],
)
def test_frequencies(dim, base, scaling):
    """scaling: the factor, those of low and high frequencies, and the old context."""
    rope = (Llama3ScaledRoPE if scaling else RotaryPositionalEmbeddings)(dim, 50, base, *scaling)
    plain, thetas = plain_thetas(dim, base), rope_frequencies(dim, base, *scaling or [1])
    assert not scaling or any(1 / scaling[0] < t / p < 1 for t, p in zip(thetas, plain, strict=True)), "something is blended"
    # A power, a division and the blend in fp32: a few roundings, each relative to its own frequency.
    assert rope.theta.tolist() == pytest.approx(thetas, rel=16 * torch.finfo(torch.float32).eps)
    angles = torch.outer(torch.arange(50, dtype=torch.float64), rope.theta.double())
    factors = torch.stack([angles.cos(), angles.sin()], -1)
    # The factors of an angle that was itself rounded to fp32.
    assert ((rope.cache.double() - factors).abs() <= torch.finfo(torch.float32).eps * (1 + angles[..., None])).all()


@pytest.mark.parametrize("kind", ["plain", "scaled"])
def test_every_form_of_positions(kind):
    """Packed, of each sample, shared by the batch, one per sample, and a scalar."""
    rope, packed = CACHES[kind](), torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 2, 3], [5, 3, 19, 0, 7, 7]])
    assert_rotated(rope, X, packed, input_pos=packed)
    assert_rotated(rope, X, packed[2:], input_pos=packed[2])
    assert torch.equal(rope(X, input_pos=torch.arange(6)), rope(X))
    token, positions = X[:, :1], torch.tensor([4, 0, 19])
    assert_rotated(rope, token, positions[:, None], input_pos=positions)
    for one in (torch.tensor(4), torch.tensor([4])):
        assert_rotated(rope, token, positions[None, :1], input_pos=one)


@pytest.mark.parametrize("kind", CACHES)
def test_the_cache_stays_fp32(kind):
    make = CACHES[kind]
    rope, fresh = make(), make().cache
    assert rope.state_dict() == {} and list(rope.parameters()) == []
    for cast in (torch.nn.Module.bfloat16, torch.nn.Module.half, torch.nn.Module.double, copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))):
        rope = cast(rope)
        assert rope.cache.dtype == rope.theta.dtype == torch.float32 and torch.equal(rope.cache, fresh)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(make().cache, fresh)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("start", ["meta", "cpu"])
@pytest.mark.parametrize("kind", CACHES)
def test_to_empty_leaves_the_tables_right(kind, start):
    """A model shares one module among its layers, and to_empty then comes by once a layer."""
    with torch.device(start):
        rope = CACHES[kind]()
        model = torch.nn.ModuleList([torch.nn.Sequential(rope, torch.nn.Linear(2, 2)) for _ in range(3)])
    model.to_empty(device="cpu")
    assert torch.equal(rope.cache, CACHES[kind]().cache) and torch.equal(rope.theta, CACHES[kind]().theta)


def test_a_cache_is_built_on_request():
    """Of a model on the meta device, and a longer one, which survives a cast."""
    with torch.device("meta"):
        scaled = CACHES["scaled"]()
    assert not scaled.is_cache_built
    with torch.device("cpu"):
        scaled.rope_init()
    assert scaled.is_cache_built and torch.equal(scaled(X), CACHES["scaled"]()(X))
    rope = RotaryPositionalEmbeddings(8, 4)
    rope.build_rope_cache(9)
    assert torch.equal(rope.bfloat16().cache, RotaryPositionalEmbeddings(8, 9).cache)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cls_last", [True, False])
def test_axial_rotation_of_patches(cls_last, dtype):
    """A grid of 3 x 3 patches and the CLS token, in two tiles: columns turn the first half of a head, rows the second, both counted from 1."""
    rope = VisionRotaryPositionalEmbeddings(patch_size=2, tile_size=6, dim=8, base=100, append_cls_token=cls_last)
    x, thetas = torch.randn(2, 20, 3, 8).to(dtype), plain_thetas(4, 100)
    out, once = rope(x, input_pos=None, anything=3), torch.ones(1, 1, dtype=torch.long)
    for tile in range(0, 20, 10):
        cls = tile + 9 * cls_last
        assert torch.equal(out[:, cls], x[:, cls])
        for patch in range(9):
            angles, token = [(place + 1) * t for place in (patch % 3, patch // 3) for t in thetas], tile + patch + (not cls_last)
            got, this = out[:, token : token + 1], x[:, token : token + 1]
            assert_no_worse(got, rotate(this, once, angles), rotate(this.double(), once, angles))
