"""Rotary positions: pairs, frequencies, every form of positions, and a cache that stays in fp32."""

import copy
import math
import pickle

import pytest
import torch
from numerics import assert_no_worse
from reference import DTYPES, assert_matches, plain_thetas, rotate

from fastfuse.modules import Llama3ScaledRoPE, RotaryPositionalEmbeddings, VisionRotaryPositionalEmbeddings


def scaled_thetas(dim, base, factor=8, low=1, high=4, old=8192):
    """Llama 3.1's rule, a frequency at a time in float64."""
    out = []
    for f in plain_thetas(dim, base):
        wavelength = 2 * math.pi / f
        if wavelength < old / high:
            out.append(f)
        elif wavelength > old / low:
            out.append(f / factor)
        else:
            m = (old / wavelength - low) / (high - low)
            out.append((1 - m) * f / factor + m * f)
    return out


def assert_thetas(rope, thetas):
    exact = torch.tensor(thetas, dtype=torch.float64)
    # A power, a division and the blend in fp32: a few roundings, each relative to its own frequency.
    assert ((rope.theta.double() - exact).abs() / exact).max() < 16 * torch.finfo(torch.float32).eps
    angles = torch.outer(torch.arange(rope.cache.shape[0], dtype=torch.float64), rope.theta.double())
    factors = torch.stack([angles.cos(), angles.sin()], -1)
    # The factors of an angle that was itself rounded to fp32.
    assert ((rope.cache.double() - factors).abs() <= torch.finfo(torch.float32).eps * (1 + angles[..., None])).all()


def test_adjacent_pairs_rotate():
    """At position 1 with theta (1, 1/100): (a, b, c, d) -> pairs (a, b) and (c, d), not (a, c) and (b, d)."""
    rope = RotaryPositionalEmbeddings(4, max_seq_len=2)
    x = torch.tensor([1.0, 0.0, 2.0, 3.0]).expand(1, 2, 1, 4)
    cos, sin = math.cos(0.01), math.sin(0.01)
    want = [math.cos(1), math.sin(1), 2 * cos - 3 * sin, 3 * cos + 2 * sin]
    assert rope(x)[0, 1, 0].tolist() == pytest.approx(want, rel=1e-6)
    assert torch.equal(rope(x)[:, 0], x[:, 0]), "position 0 does not turn"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_forward_and_gradient(dtype):
    rope = RotaryPositionalEmbeddings(8, max_seq_len=16, base=100)

    def formula(m, x):
        return rotate(x, torch.arange(7)[None], plain_thetas(8, 100))

    assert_matches(rope, lambda m, x: m(x), formula, {"x": torch.randn(2, 7, 3, 8)}, dtype)


def test_low_precision_rotates_in_fp32_and_rounds_once():
    rope, x = RotaryPositionalEmbeddings(8), torch.randn(2, 9, 3, 8).bfloat16()
    assert torch.equal(rope(x), rope(x.float()).bfloat16())
    assert torch.equal(rope.bfloat16()(x), rope(x.float()).bfloat16())


def test_float64_stays_float64():
    rope, x = RotaryPositionalEmbeddings(4, 8), torch.randn(1, 5, 2, 4, dtype=torch.float64)
    cos, sin = rope.cache[:5].double().unbind(-1)
    a, b = x[..., 0::2], x[..., 1::2]
    want = torch.stack([a * cos[:, None] - b * sin[:, None], b * cos[:, None] + a * sin[:, None]], -1).reshape(x.shape)
    for r in (rope, copy.deepcopy(rope).double()):
        assert r(x).dtype == torch.float64
        assert_no_worse(r(x), want, want)


@pytest.mark.parametrize(("dim", "base"), [(4, 10_000), (16, 10_000), (64, 500_000), (80, 1e6)])
def test_frequencies(dim, base):
    rope = RotaryPositionalEmbeddings(dim, max_seq_len=50, base=base)
    assert_thetas(rope, plain_thetas(dim, base))


@pytest.mark.parametrize("kwargs", [{"base": 500_000}, {"base": 10_000}, {"base": 500_000, "scale_factor": 32, "old_context_len": 4096}], ids=str)
def test_scaled_frequencies(kwargs):
    dim = 128
    factor, old = kwargs.get("scale_factor", 8), kwargs.get("old_context_len", 8192)
    rope = Llama3ScaledRoPE(dim, max_seq_len=40, **kwargs)
    plain, scaled = plain_thetas(dim, kwargs["base"]), scaled_thetas(dim, kwargs["base"], factor, 1, 4, old)
    ratios = [s / p for s, p in zip(scaled, plain, strict=True)]
    assert (ratios[0] == 1 and ratios[-1] == 1 / factor) or kwargs["base"] == 10_000
    assert any(1 / factor < r < 1 for r in ratios), "all three bands must be there"
    assert_thetas(rope, scaled)
    assert rope.theta[0] == 1.0


def test_frequencies_of_llama_3_2():
    """Values of torchtune 0.6.1 for head width 128, base 500000: kept, kept, kept, kept, kept, then a factor of 8."""
    theta = Llama3ScaledRoPE(128, 4, base=500_000).theta
    want = [1.0, 0.2380538135766983, 0.05666961893439293, 0.013490419834852219, 0.0032114461064338684]
    want += [9.556212171446532e-05, 2.2748929040972143e-05, 5.415469331637723e-06, 1.289173155782919e-06, 3.068925877869333e-07]
    assert theta[::7].tolist() == pytest.approx(want, rel=1e-6)
    assert theta[29].item() == pytest.approx(scaled_thetas(128, 500_000)[29], rel=1e-6)


def test_custom_bands():
    """Old context 32 and bands at wavelengths 8 and 32: 6.3 stays, 19.9 is blended, 62.8 and 198.7 are divided by 4."""
    rope = Llama3ScaledRoPE(8, 40, base=100, scale_factor=4, low_freq_factor=1, high_freq_factor=4, old_context_len=32)
    blend = (32 / (2 * math.pi * math.sqrt(10)) - 1) / 3
    f = 10**-0.5
    assert rope.theta.tolist() == pytest.approx([1, (1 - blend) * f / 4 + blend * f, 0.1 / 4, 10**-1.5 / 4], rel=1e-6)
    assert rope.theta[1].item() == pytest.approx(0.1273239552974701, rel=1e-6)
    x = torch.randn(1, 40, 2, 8)
    exact = rotate(x.double(), torch.arange(40)[None], rope.theta.double().tolist())
    assert_no_worse(rope(x), rotate(x, torch.arange(40)[None], rope.theta.tolist()), exact)


X = torch.randn(3, 6, 2, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("rope", [RotaryPositionalEmbeddings(8, 20), Llama3ScaledRoPE(8, 20, old_context_len=16)], ids=["plain", "scaled"])
def test_packed_positions_and_positions_shared_by_the_batch(rope):
    packed = torch.tensor([[0, 1, 2, 0, 1, 2], [0, 1, 0, 1, 2, 3], [5, 3, 19, 0, 7, 7]])
    out = rope(X, input_pos=packed)
    thetas = rope.theta.double().tolist()
    assert_no_worse(out, rotate(X, packed, thetas), rotate(X.double(), packed, thetas))
    assert torch.equal(out[0, 3:], rope(X[:1, 3:])[0])
    shared = rope(X, input_pos=packed[2])
    for row in range(3):
        assert torch.equal(shared[row], rope(X[row : row + 1], input_pos=packed[2:])[0])
    assert torch.equal(rope(X, input_pos=torch.arange(6)), rope(X))


def test_one_position_per_sample_and_a_scalar_position():
    rope = RotaryPositionalEmbeddings(8, 20)
    token, positions = X[:, :1], torch.tensor([4, 0, 19])
    out = rope(token, input_pos=positions)
    assert torch.equal(out, rope(token, input_pos=positions[:, None]))
    assert_no_worse(out, rotate(token, positions[:, None], plain_thetas(8, 1e4)), rotate(token.double(), positions[:, None], plain_thetas(8, 1e4)))
    assert torch.equal(rope(token, input_pos=torch.tensor(4))[0], out[0])
    assert torch.equal(rope(token, input_pos=torch.tensor([4]))[0], out[0])


def test_positions_that_do_not_fit():
    rope = RotaryPositionalEmbeddings(8, 5)
    with pytest.raises(RuntimeError, match=r"shape '\[-1, 6, 1, 4, 2\]' is invalid"):
        rope(X)
    with pytest.raises(IndexError, match="index out of range"):
        rope(X[:, :1], input_pos=torch.tensor([5]))
    with pytest.raises(RuntimeError, match="The size of tensor a"):
        rope(X[:, :5], input_pos=torch.zeros(2, 5, dtype=torch.long))


@pytest.mark.parametrize(
    "make", [lambda: RotaryPositionalEmbeddings(8, 12), lambda: Llama3ScaledRoPE(8, 12), lambda: VisionRotaryPositionalEmbeddings(2, 6, 8)]
)
def test_the_cache_stays_fp32(make):
    rope, fresh = make(), make().cache
    assert rope.state_dict() == {} and list(rope.parameters()) == []
    for cast in (
        lambda m: m.bfloat16(),
        lambda m: m.half(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.double(),
        copy.deepcopy,
        lambda m: pickle.loads(pickle.dumps(m)),
    ):
        rope = cast(rope)
        assert rope.cache.dtype == rope.theta.dtype == torch.float32
        assert torch.equal(rope.cache, fresh)
    torch.set_default_dtype(torch.bfloat16)
    try:
        assert torch.equal(make().cache, fresh)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize(
    "make", [lambda: RotaryPositionalEmbeddings(8, 12), lambda: Llama3ScaledRoPE(8, 12), lambda: VisionRotaryPositionalEmbeddings(2, 6, 8)]
)
def test_the_cache_is_built_on_leaving_the_meta_device(make):
    with torch.device("meta"):
        rope = make()
    rope.to_empty(device="cpu")
    assert torch.equal(rope.cache, make().cache) and torch.equal(rope.theta, make().theta)


def test_scaled_rope_on_meta_refuses_to_run():
    with torch.device("meta"):
        rope = Llama3ScaledRoPE(8, 12)
    assert not rope.is_cache_built
    with pytest.raises(RuntimeError, match=r"RoPE cache is not built\. Please call rope_init\(\) first\."):
        rope(X)
    with torch.device("cpu"):
        rope.rope_init()
    assert rope.is_cache_built
    assert torch.equal(rope(X), Llama3ScaledRoPE(8, 12)(X))


def test_a_longer_cache_on_request_survives_a_cast():
    rope = RotaryPositionalEmbeddings(8, 4)
    rope.build_rope_cache(9)
    assert torch.equal(rope.cache, RotaryPositionalEmbeddings(8, 9).cache)
    assert torch.equal(rope.bfloat16().cache, RotaryPositionalEmbeddings(8, 9).cache)


def vision_angles(row, column, dim, base):
    thetas = [base ** (-2 * k / (dim // 2)) for k in range(dim // 4)]
    return [(column + 1) * t for t in thetas] + [(row + 1) * t for t in thetas]


@pytest.mark.parametrize("cls_last", [True, False])
def test_axial_rotation_of_patches(cls_last):
    """A grid of 3 x 3 patches and the CLS token, in two tiles: columns turn the first half of a head, rows the second."""
    rope = VisionRotaryPositionalEmbeddings(patch_size=2, tile_size=6, dim=8, base=100, append_cls_token=cls_last)
    x = torch.randn(2, 20, 3, 8)
    out = rope(x, input_pos=None, anything=3)
    for tile in range(2):
        cls = tile * 10 + (9 if cls_last else 0)
        assert torch.equal(out[:, cls], x[:, cls])
        for patch in range(9):
            token = tile * 10 + patch + (0 if cls_last else 1)
            angles = vision_angles(patch // 3, patch % 3, 8, 100)
            one = torch.ones(1, 1, dtype=torch.long)
            for b in range(2):
                this = x[b : b + 1, token : token + 1]
                assert_no_worse(out[b : b + 1, token : token + 1], rotate(this, one, angles), rotate(this.double(), one, angles))


def test_a_negative_position_is_refused():
    """Indexing would take it from the end of the table."""
    with pytest.raises(IndexError, match="index out of range"):
        RotaryPositionalEmbeddings(8, 20)(X, input_pos=torch.arange(X.shape[1]) - 1)


def test_more_rows_of_positions_than_of_tokens_are_refused():
    with pytest.raises(RuntimeError, match=r"The size of tensor a \(1\) must match the size of tensor b \(4\).*x has 1 rows, input_pos 4"):
        RotaryPositionalEmbeddings(8, 20)(X[:1], input_pos=torch.arange(X.shape[1]).expand(4, -1))


@pytest.mark.parametrize("start", ["meta", "cpu"])
def test_to_empty_leaves_the_tables_of_a_shared_module_right(start):
    """A model shares one module among its layers, and to_empty then comes by once a layer."""
    want = Llama3ScaledRoPE(8, 20)
    with torch.device(start):
        rope = Llama3ScaledRoPE(8, 20)
        model = torch.nn.ModuleList([torch.nn.Sequential(rope, torch.nn.Linear(2, 2)) for _ in range(3)])
    model.to_empty(device="cpu")
    assert torch.equal(rope.cache, want.cache) and torch.equal(rope.theta, want.theta)
