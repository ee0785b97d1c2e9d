"""Self-attention and cross-attention layers: the formulas, tokens without anything to see, caches."""

import copy

import pytest
import reference
import torch
from numerics import assert_no_worse
from reference import DTYPES, HEAD_DIM, D, assert_matches, make_attention, make_cross_layer, make_mlp, make_self_layer, shaken

from fastfuse.errors import InvalidArgument
from fastfuse.modules import RMSNorm, RotaryPositionalEmbeddings, TanhGate, TransformerCrossAttentionLayer, TransformerSelfAttentionLayer

B, S, S_E = 3, 8, 10
EMPTY = [(0, 0), (0, 1), (1, 5), (2, 7)]


def encoder_mask(kind: str = "bool", dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Random, but the tokens of EMPTY see nothing and all others something."""
    visible = torch.rand(B, S, S_E) < 0.5
    visible[..., 3] = True
    for b, s in EMPTY:
        visible[b, s] = False
    return visible if kind == "bool" else torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, -torch.inf)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_self_attention_layer(masked, dtype):
    mask = torch.rand(B, S, S) < 0.6 if masked else None
    positions = torch.randint(0, 60, (B, S))
    assert_matches(
        make_self_layer(),
        lambda m, x: m(x, mask=mask, input_pos=positions),
        lambda m, x: reference.self_layer(m, x, mask, positions),
        {"x": torch.randn(B, S, D)},
        dtype,
    )


def test_scales_of_a_self_attention_layer():
    layer = make_self_layer()
    gates = TanhGate(), TanhGate()
    scaled = TransformerSelfAttentionLayer(
        layer.attn, layer.mlp, sa_norm=layer.sa_norm, mlp_norm=layer.mlp_norm, sa_scale=gates[0], mlp_scale=gates[1]
    ).double()
    x = torch.randn(B, S, D, dtype=torch.float64)
    assert torch.equal(scaled(x), x), "both gates closed"
    gates[0].scale.data.fill_(0.3)
    n = scaled.sa_norm(x)
    h = x + scaled.attn(n, n) * torch.tanh(torch.tensor(0.3, dtype=torch.float64))
    assert_no_worse(scaled(x), h, h)
    gates[1].scale.data.fill_(-0.7)
    out = h + scaled.mlp(scaled.mlp_norm(h)) * torch.tanh(torch.tensor(-0.7, dtype=torch.float64))
    assert_no_worse(scaled(x), out, out)


def test_norms_and_scales_left_out_are_the_identity():
    attn, mlp, x, y = shaken(make_attention()), shaken(make_mlp()), torch.randn(B, S, D), torch.randn(B, S_E, D)
    h = x + attn(x, x)
    layer = TransformerSelfAttentionLayer(attn, mlp)
    assert torch.equal(layer(x), h + mlp(h))
    assert list(layer.state_dict()) == [f"attn.{p}_proj.weight" for p in ("q", "k", "v", "output")] + [f"mlp.w{i}.weight" for i in (1, 2, 3)]
    h = x + attn(x, y)
    assert torch.equal(TransformerCrossAttentionLayer(attn, mlp)(x, encoder_input=y), h + mlp(h))


def test_other_keywords_are_ignored():
    layer, cross, x, y = make_self_layer(), make_cross_layer(), torch.randn(B, S, D), torch.randn(B, S_E, D)
    assert torch.equal(layer(x, encoder_input=y, encoder_mask=encoder_mask(), anything=1), layer(x))
    assert torch.equal(cross(x, encoder_input=y, mask=torch.zeros(1), input_pos=torch.arange(3)), cross(x, encoder_input=y))


def test_mask_mod_gives_the_mask_to_use():
    seen = []

    def window(*, mask, bsz, seq_len):
        seen.append((mask, bsz, seq_len))
        return torch.ones(1, seq_len, seq_len, dtype=torch.bool).tril().triu(-2)

    plain = make_self_layer()
    layer = TransformerSelfAttentionLayer(plain.attn, plain.mlp, sa_norm=plain.sa_norm, mlp_norm=plain.mlp_norm, mask_mod=window)
    x = torch.randn(B, S, D)
    assert torch.equal(layer(x), plain(x, mask=window(mask=None, bsz=B, seq_len=S)))
    assert seen[0] == (None, B, S)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["none", "bool", "minus infinity", "float"])
def test_cross_attention_layer(kind, dtype):
    if kind == "float":
        mask = torch.randn(B, S, S_E).to(dtype)
    else:
        mask = None if kind == "none" else encoder_mask(kind, dtype)
    cast = mask if mask is None or kind == "bool" else mask.double()
    assert_matches(
        make_cross_layer(),
        lambda m, x, y: m(x, encoder_input=y, encoder_mask=mask),
        lambda m, x, y: reference.cross_layer(m, x, y, cast.to(x.dtype) if kind in ("float", "minus infinity") else mask),
        {"x": torch.randn(B, S, D), "y": torch.randn(B, S_E, D)},
        dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["bool", "minus infinity"])
def test_a_token_that_sees_nothing_leaves_as_it_came(kind, dtype):
    """Its bits are those of x, and its gradient is that of the residual alone; neither branch gives it any."""
    layer = make_cross_layer().to(dtype)
    x, y, mask = torch.randn(B, S, D).to(dtype).requires_grad_(), torch.randn(B, S_E, D).to(dtype), encoder_mask(kind, dtype)
    out = layer(x, encoder_input=y, encoder_mask=mask)
    upstream = torch.randn(B, S, D).to(dtype)
    out.backward(upstream)
    for b in range(B):
        for s in range(S):
            if (b, s) in EMPTY:
                assert torch.equal(out[b, s], x[b, s]) and torch.equal(x.grad[b, s], upstream[b, s])
            else:
                assert not torch.equal(out[b, s], x[b, s]) and not torch.equal(x.grad[b, s], upstream[b, s])


def test_tokens_that_see_nothing_give_the_parameters_no_gradient():
    layer, x, y = make_cross_layer(), torch.randn(B, S, D), torch.randn(B, S_E, D, requires_grad=True)
    layer(x, encoder_input=y, encoder_mask=torch.zeros(B, S, S_E, dtype=torch.bool)).sum().backward()
    assert not y.grad.any()
    assert all(not p.grad.any() for p in layer.parameters())
    upstream = torch.zeros(B, S, D)
    for b, s in EMPTY:
        upstream[b, s] = torch.randn(D)
    layer.zero_grad()
    layer(x, encoder_input=y, encoder_mask=encoder_mask()).backward(upstream)
    assert all(not p.grad.any() for p in layer.parameters())


def test_bool_and_minus_infinity_masks_agree_to_the_bit():
    layer, x, y, mask = make_cross_layer(), torch.randn(B, S, D), torch.randn(B, S_E, D), encoder_mask()
    as_float = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    given = mask.clone()
    assert torch.equal(layer(x, encoder_input=y, encoder_mask=mask), layer(x, encoder_input=y, encoder_mask=as_float))
    assert torch.equal(mask, given), "the caller's mask is not written to"


def test_what_a_token_sees_is_its_row_of_the_mask():
    """One visible key has weight one, whatever its score: the branch is the output projection of that key's value."""
    layer = make_cross_layer().double()
    layer.mlp_scale.scale.data.zero_()
    x, y = torch.randn(1, S, D, dtype=torch.float64), torch.randn(1, S_E, D, dtype=torch.float64)
    columns = [(3 * s + 1) % S_E for s in range(S)]
    mask = torch.zeros(1, S, S_E, dtype=torch.bool)
    mask[0, range(S), columns] = True
    v = (y[0] @ layer.attn.v_proj.weight.T).view(S_E, 2, HEAD_DIM).repeat_interleave(2, 1).flatten(1)
    want = x + (v[columns] @ layer.attn.output_proj.weight.T) * torch.tanh(layer.ca_scale.scale)
    assert (layer(x, encoder_input=y, encoder_mask=mask) - want).abs().max() < 1e-14


def test_a_mask_shared_by_the_batch():
    layer, x, y, mask = make_cross_layer(), torch.randn(B, S, D), torch.randn(B, S_E, D), encoder_mask()[:1]
    assert torch.equal(layer(x, encoder_input=y, encoder_mask=mask), layer(x, encoder_input=y, encoder_mask=mask.expand(B, -1, -1)))


def test_without_an_encoder_input_nothing_happens():
    layer, x = make_cross_layer(), torch.randn(B, S, D)
    assert layer(x) is x
    assert layer(x, encoder_mask=encoder_mask()) is x
    layer.setup_caches(B, torch.float32, encoder_max_seq_len=S_E, decoder_max_seq_len=3)
    assert layer(x) is x, "an empty cache is no input"


def uniform_formula(m, x, y, mask):
    """transformers' rule: all scores of a row that sees nothing are masked alike, so that all keys get in; the MLP is left out."""
    sees = mask.any(-1, keepdim=True)
    a = reference.attention(m.attn, reference.rms(x, m.ca_norm.scale, 1e-6), y, mask | ~sees)
    h = x + a * torch.tanh(m.ca_scale.scale)
    out = h + reference.mlp(m.mlp, reference.rms(h, m.mlp_norm.scale, 1e-6)) * torch.tanh(m.mlp_scale.scale)
    return torch.where(sees, out, h)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["bool", "minus infinity"])
def test_uniform_rows_attend_to_everything_and_skip_the_mlp(kind, dtype):
    visible = encoder_mask()
    mask = visible if kind == "bool" else torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, -torch.inf)
    assert_matches(
        make_cross_layer(empty_rows="uniform"),
        lambda m, x, y: m(x, encoder_input=y, encoder_mask=mask),
        lambda m, x, y: uniform_formula(m, x, y, visible),
        {"x": torch.randn(B, S, D), "y": torch.randn(B, S_E, D)},
        dtype,
    )


def test_the_two_rules_differ_in_rows_that_see_nothing_alone():
    uniform, zero = make_cross_layer(empty_rows="uniform"), make_cross_layer()
    zero.load_state_dict(uniform.state_dict())
    x, y, mask = torch.randn(B, S, D), torch.randn(B, S_E, D), encoder_mask()
    a, b = (m(x, encoder_input=y, encoder_mask=mask) for m in (uniform, zero))
    sees = mask.any(-1)
    assert torch.equal(a[sees], b[sees]) and not torch.isclose(a[~sees], b[~sees]).all(-1).any()


def test_what_does_not_fit_is_refused():
    rope = RotaryPositionalEmbeddings(HEAD_DIM)
    for error in (InvalidArgument, AssertionError, ValueError):
        with pytest.raises(error, match=r"^Doesn't support positional embeddings for cross attention, "):
            TransformerCrossAttentionLayer(make_attention(rope=rope), make_mlp())
    with pytest.raises(ValueError, match="empty_rows is 'none', expected 'zero' or 'uniform'"):
        make_cross_layer(empty_rows="none")


def test_each_layer_takes_its_own_cache_length():
    for layer, length in ((make_self_layer(), 5), (make_cross_layer(), 7)):
        assert not layer.caches_are_setup() and not layer.caches_are_enabled()
        layer.setup_caches(B, torch.bfloat16, encoder_max_seq_len=7, decoder_max_seq_len=5)
        assert layer.caches_are_setup() and layer.caches_are_enabled()
        assert layer.attn.kv_cache.k_cache.shape == (B, 2, length, HEAD_DIM)
        layer.attn.cache_enabled = False
        assert layer.caches_are_setup() and not layer.caches_are_enabled()


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cached_self_attention_steps(dtype):
    layer, x = make_self_layer().to(dtype), torch.randn(B, S, D).to(dtype)
    whole, exact = layer(x), reference.self_layer(copy.deepcopy(layer).double(), x.double())
    layer.setup_caches(B, dtype, encoder_max_seq_len=1, decoder_max_seq_len=12)
    rows = torch.ones(1, S, 12, dtype=torch.bool).tril()
    for start, stop in ((0, 4), *((i, i + 1) for i in range(4, S))):
        out = layer(x[:, start:stop], mask=rows[:, start:stop], input_pos=torch.arange(start, stop))
        assert_no_worse(out, whole[:, start:stop], exact[:, start:stop], f"tokens {start}..{stop - 1}")


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("empty_rows", ["zero", "uniform"])
@pytest.mark.parametrize("kind", ["bool", "minus infinity"])
def test_cached_cross_attention_steps(kind, empty_rows, dtype):
    """The encoder's tokens come once; later tokens see them in the cache, which may be wider: its tail is nobody's, empty rows included."""
    layer, x, y = make_cross_layer(empty_rows=empty_rows).to(dtype), torch.randn(B, S, D).to(dtype), torch.randn(B, S_E, D).to(dtype)
    mask, double = encoder_mask(), copy.deepcopy(layer).double()
    whole = layer(x, encoder_input=y, encoder_mask=mask)
    exact = (uniform_formula if empty_rows == "uniform" else reference.cross_layer)(double, x.double(), y.double(), mask)
    for width in (S_E, S_E + 3):
        cached = copy.deepcopy(layer)
        cached.setup_caches(B, dtype, encoder_max_seq_len=width, decoder_max_seq_len=1)
        wider = torch.cat([mask, torch.zeros(B, S, width - S_E, dtype=torch.bool)], -1)
        if kind == "minus infinity":
            wider = torch.zeros(wider.shape, dtype=dtype).masked_fill(~wider, -torch.inf)
        for start, stop in ((0, 4), *((i, i + 1) for i in range(4, S))):
            out = cached(x[:, start:stop], encoder_input=y if start == 0 else None, encoder_mask=wider[:, start:stop])
            assert_no_worse(out, whole[:, start:stop], exact[:, start:stop], f"tokens {start}..{stop - 1}")
        assert cached.attn.kv_cache.size == S_E
        cached.reset_cache()
        assert cached(x) is x


@torch.no_grad()
def test_encoder_inputs_are_appended_to_the_cache():
    layer, x, y = make_cross_layer(), torch.randn(B, S, D), torch.randn(B, S_E, D)
    layer.setup_caches(B, torch.float32, encoder_max_seq_len=S_E, decoder_max_seq_len=1)
    first = torch.zeros(1, S, S_E, dtype=torch.bool)
    first[..., :4] = True
    layer(x, encoder_input=y[:, :4], encoder_mask=first)
    out = layer(x, encoder_input=y[:, 4:], encoder_mask=torch.ones(1, S, S_E, dtype=torch.bool))
    exact = reference.cross_layer(copy.deepcopy(layer).double(), x.double(), y.double())
    assert_no_worse(out, reference.cross_layer(layer, x, y), exact)
    with pytest.raises(AssertionError, match="KVCache"):
        layer(x, encoder_input=y[:, :1], encoder_mask=torch.ones(1, S, S_E, dtype=torch.bool))


@torch.no_grad()
def test_without_a_mask_the_zero_tail_of_the_cache_counts():
    """A zero key has score 0 and weight exp(0): eleven more tokens of nothing."""
    layer, x, y = make_cross_layer().double(), torch.randn(B, S, D, dtype=torch.float64), torch.randn(B, S_E, D, dtype=torch.float64)
    layer.setup_caches(B, torch.float64, encoder_max_seq_len=S_E + 11, decoder_max_seq_len=1)
    want = reference.cross_layer(layer, x, torch.cat([y, torch.zeros(B, 11, D, dtype=torch.float64)], 1))
    assert (layer(x, encoder_input=y) - want).abs().max() < 1e-13


@torch.no_grad()
def test_a_disabled_cache_is_not_read():
    layer, x, y = make_cross_layer(), torch.randn(B, S, D), torch.randn(B, S_E, D)
    whole = layer(x, encoder_input=y)
    layer.setup_caches(B, torch.float32, encoder_max_seq_len=S_E, decoder_max_seq_len=1)
    layer(x, encoder_input=torch.randn(B, S_E, D))
    layer.attn.cache_enabled = False
    assert layer(x) is x
    assert torch.equal(layer(x, encoder_input=y), whole)


def test_the_mask_is_as_wide_as_the_cache():
    layer = make_cross_layer()
    layer.setup_caches(B, torch.float32, encoder_max_seq_len=S_E + 2, decoder_max_seq_len=1)
    with pytest.raises(RuntimeError, match=rf"{S_E + 2}.*{S_E}|{S_E}.*{S_E + 2}"):
        layer(torch.randn(B, S, D), encoder_input=torch.randn(B, S_E, D), encoder_mask=torch.ones(B, S, S_E, dtype=torch.bool))


def test_norms_keep_their_own_eps():
    """Inputs as small as the eps tell 1e-6 from 1e-5."""
    layer = make_cross_layer().double()
    other = copy.deepcopy(layer)
    other.ca_norm = RMSNorm(D, 1e-5).double()
    other.ca_norm.load_state_dict(layer.ca_norm.state_dict())
    x, y = torch.randn(B, S, D, dtype=torch.float64) * 1e-3, torch.randn(B, S_E, D, dtype=torch.float64)
    for m in (layer, other):
        assert (m(x, encoder_input=y) - reference.cross_layer(m, x, y)).abs().max() < 1e-13
    assert (other(x, encoder_input=y) - layer(x, encoder_input=y)).abs().max() > 1e-6
