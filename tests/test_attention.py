"""Attention and the layers around it: heads, causality, dropout, packed sequences, tokens that see nothing, their caches. Formulas: test_modules.py."""

import copy

import pytest
import reference
import torch
from numerics import assert_no_worse
from reference import HEAD_DIM, KV_HEADS, D, make_attention, make_cross_layer, make_mlp, make_self_layer, shaken
from test_fusion_attention import HOLES, S_E, B, S, X, Y, infinite
from torch import nn

from fastfuse.modules import (
    KVCache,
    RotaryPositionalEmbeddings,
    TransformerCrossAttentionLayer,
    TransformerSelfAttentionLayer,
    create_block_causal_mask,
    packed_block_causal_mask,
)
from fastfuse.modules.attention_utils import sdpa_or_flex_attention


def test_causal_over_a_longer_sequence_is_aligned_at_the_top_left():
    attn, mask = shaken(make_attention()), torch.ones(1, S, S_E, dtype=torch.bool).tril()
    exact = reference.attention(copy.deepcopy(attn).double(), X.double(), Y.double(), mask)
    assert_no_worse(attn(X, Y), reference.attention(attn, X, Y, mask), exact)


@pytest.mark.parametrize(("kind", "dtype"), [("bool", torch.float32), ("infinite", torch.float16), ("infinite", torch.bfloat16)])
def test_a_row_that_sees_nothing_gives_exactly_zero(kind, dtype):
    """So do its gradients, of attention; the layer lets the token leave as it came, with the gradient of the residual alone."""
    upstream, sees = torch.randn(B, S, D).to(dtype), HOLES.any(-1)
    mask = HOLES if kind == "bool" else infinite(HOLES).to(dtype)
    passed = mask.clone()
    for module in (shaken(make_attention(cross=True)).to(dtype), make_cross_layer().to(dtype)):
        a, b = (t.to(dtype, copy=True).requires_grad_() for t in (X, Y))
        is_layer = isinstance(module, TransformerCrossAttentionLayer)
        out = module(a, encoder_input=b, encoder_mask=mask) if is_layer else module(a, b, mask=mask)
        out.backward(upstream)
        assert torch.equal(mask, passed), "the caller's mask is not written to"
        apart = [(t - left).detach() for t, left in ((out, a), (a.grad, upstream))] if is_layer else [out.detach(), a.grad]
        assert all(not t[~sees].any() and t[sees].any(-1).all() and t.isfinite().all() for t in apart)
        assert all(t.isfinite().all() and t.any() for t in (b.grad, *(p.grad for p in module.parameters())))


@pytest.mark.parametrize("everywhere", [True, False])
def test_tokens_that_see_nothing_give_the_parameters_no_gradient(everywhere):
    layer, mask, upstream, y = make_cross_layer(), HOLES & (not everywhere), torch.randn(B, S, D), Y.clone().requires_grad_()
    layer(X, encoder_input=y, encoder_mask=mask).backward(upstream.masked_fill(mask.any(-1)[..., None], 0))
    assert not y.grad.any() and all(not p.grad.any() for p in layer.parameters())


def test_dropout_is_for_training_alone():
    """What it drops is PyTorch's to say."""
    attn, seen = shaken(make_attention(attn_dropout=0.25)), []
    attn._attention_call = lambda *args, **kwargs: seen.append(kwargs["dropout_p"]) or sdpa_or_flex_attention(*args, **kwargs)
    dropped, whole = attn.train()(X, X), attn.eval()(X, X)
    assert seen == [0.25, 0.0] and not torch.isclose(dropped, whole).all()
    attn.attn_dropout = 1.0
    assert not attn.train()(X, X).any() and torch.equal(attn.eval()(X, X), whole)


def test_packed_sequences_see_themselves_alone():
    lengths = [torch.tensor([2, 3]), torch.tensor([1, 1, 3])]
    want = torch.stack([torch.block_diag(*(torch.ones(n, n).tril() for n in row.tolist())).bool() for row in lengths])
    assert torch.equal(create_block_causal_mask(lengths), want) and torch.equal(packed_block_causal_mask(lengths), want)
    attn, x = shaken(make_attention(rope=RotaryPositionalEmbeddings(HEAD_DIM))), torch.randn(1, 5, D)
    packed = attn(x, x, mask=want[:1], input_pos=torch.tensor([[0, 1, 0, 1, 2]]))
    apart = torch.cat([attn(part, part) for part in (x[:, :2], x[:, 2:])], 1)
    assert (packed - apart).abs().max() <= 1e-5 * apart.abs().max()


def test_a_cache_passed_in_starts_disabled():
    """Enabled it is read without y and left alone; disabled, y is needed again."""
    cache = KVCache(B, S_E, KV_HEADS, HEAD_DIM, torch.float32)
    attn = shaken(make_attention(cross=True, kv_cache=cache))
    whole = attn(X, Y)
    assert attn.kv_cache is cache and attn.cache_enabled is False and cache.size == 0
    attn.cache_enabled = True
    assert torch.equal(attn(X, Y), attn(X)) and cache.size == S_E
    attn.cache_enabled = False
    assert torch.equal(attn(X, Y), whole)
    with pytest.raises(ValueError, match="Must provide y input"):
        attn(X)


def test_caches_live_beside_the_key_projection():
    attn = make_attention().to("meta")
    attn.setup_cache(B, torch.float32, max_seq_len=8)
    assert attn.kv_cache.k_cache.is_meta and attn.kv_cache.cache_pos.is_meta
    with torch.device("meta"):
        attn = make_attention()
        attn.k_proj = nn.Linear(D, 8, device="cpu")
        attn.setup_cache(B, torch.float32, max_seq_len=8)
    assert attn.kv_cache.k_cache.device.type == "cpu"


def test_norms_and_scales_left_out_are_the_identity():
    attn, mlp = shaken(make_attention()), shaken(make_mlp())
    layer, cross = TransformerSelfAttentionLayer(attn, mlp), TransformerCrossAttentionLayer(attn, mlp)
    for got, h in ((layer(X), X + attn(X, X)), (cross(X, encoder_input=Y), X + attn(X, Y))):
        assert torch.equal(got, h + mlp(h))
    assert not any("norm" in key or "scale" in key for key in layer.state_dict())


def test_mask_mod_gives_the_mask_to_use():
    seen = []

    def window(**keywords):
        seen.append(keywords)
        return torch.ones(1, S, S, dtype=torch.bool).tril().triu(-2)

    plain = make_self_layer()
    layer = TransformerSelfAttentionLayer(plain.attn, plain.mlp, sa_norm=plain.sa_norm, mlp_norm=plain.mlp_norm, mask_mod=window)
    assert torch.equal(layer(X), plain(X, mask=window()))
    assert seen[0] == {"mask": None, "bsz": B, "seq_len": S}


@torch.no_grad()
def test_without_an_encoder_input_the_cache_is_one():
    layer = make_cross_layer()
    whole = layer(X, encoder_input=Y)
    assert layer(X) is X and layer(X, encoder_mask=HOLES) is X
    layer.setup_caches(B, torch.float32, encoder_max_seq_len=S_E, decoder_max_seq_len=3)
    assert layer(X) is X, "an empty cache is no input"
    layer(X, encoder_input=torch.randn(B, S_E, D))
    assert layer(X) is not X
    layer.attn.cache_enabled = False
    assert layer(X) is X and torch.equal(layer(X, encoder_input=Y), whole), "a disabled cache is not read"


@torch.no_grad()
def test_without_a_mask_the_zero_tail_of_the_cache_counts():
    """A zero key has score 0 and weight exp(0): eleven more tokens of nothing. A mask is as wide as the cache."""
    layer, x, y = make_cross_layer().double(), X.double(), Y.double()
    layer.setup_caches(B, torch.float64, encoder_max_seq_len=S_E + 11, decoder_max_seq_len=1)
    want = reference.cross_layer(layer, x, torch.cat([y, torch.zeros(B, 11, D, dtype=torch.float64)], 1))
    assert (layer(x, encoder_input=y) - want).abs().max() < 1e-13
    layer.reset_cache()
    with pytest.raises(RuntimeError, match=r"23.*12|12.*23"):
        layer(x, encoder_input=y, encoder_mask=HOLES)
