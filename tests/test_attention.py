"""Multi-head attention: heads, masks, dropout, rotation before the norm, and cached steps equal to the whole."""

import copy
import logging
import math

import pytest
import reference
import torch
from numerics import assert_no_worse, in_several_orders
from reference import DTYPES, HEAD_DIM, HEADS, KV_HEADS, D, assert_matches, make_attention, shaken
from torch import nn

from fastfuse.modules import KVCache, MultiHeadAttention, RotaryPositionalEmbeddings
from fastfuse.modules.attention_utils import sdpa_or_flex_attention

B, S, S_E = 3, 9, 12
MASKS = {
    "none": lambda: None,
    "bool": lambda: torch.rand(B, S, S_E) < 0.5,
    "one bool mask for the batch": lambda: torch.rand(1, S, S_E) < 0.5,
    "bool with an empty row": lambda: (torch.rand(B, S, S_E) < 0.5).index_fill(1, torch.tensor([2]), False),
    "float": lambda: torch.randn(B, S, S_E),
    "float zeros and ones": lambda: torch.ones(B, S, S_E).tril(),
    "minus infinity": lambda: torch.zeros(B, S, S_E).masked_fill(torch.rand(B, S, S_E) < 0.5, -torch.inf),
    "minus infinity with an empty row": lambda: (
        torch.zeros(B, S, S_E).masked_fill(torch.rand(B, S, S_E) < 0.5, -torch.inf).index_fill(1, torch.tensor([2]), -torch.inf)
    ),
}


def rope(**kwargs):
    return RotaryPositionalEmbeddings(HEAD_DIM, max_seq_len=32, **kwargs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mask", MASKS)
def test_attention_over_another_sequence(mask, dtype):
    attn = shaken(make_attention(cross=True))
    inputs = {"x": torch.randn(B, S, D), "y": torch.randn(B, S_E, D), "mask": MASKS[mask]()}
    if inputs["mask"] is not None and inputs["mask"].is_floating_point():
        fixed = inputs.pop("mask").to(dtype)  # SDPA gives a bias of the query's dtype no gradient of its own here
        assert_matches(attn, lambda m, x, y: m(x, y, mask=fixed.to(x.dtype)), lambda m, x, y: reference.attention(m, x, y, fixed.to(x.dtype)), inputs, dtype)
    else:
        assert_matches(attn, lambda m, x, y, mask: m(x, y, mask=mask), reference.attention, inputs, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_self_attention(masked, kv_heads, dtype):
    """Causal without a mask; with one, the mask alone decides."""
    attn = shaken(make_attention(rope=rope(), norms=True, num_kv_heads=kv_heads))
    mask = torch.rand(B, S, S) < 0.6 if masked else None
    assert_matches(attn, lambda m, x: m(x, x, mask=mask), lambda m, x: reference.attention(m, x, x, mask), {"x": torch.randn(B, S, D)}, dtype)


def test_causal_means_that_later_tokens_change_nothing():
    attn, x = shaken(make_attention()), torch.randn(B, S, D)
    changed = x.clone()
    changed[:, 3:] = torch.randn(B, S - 3, D)
    assert torch.equal(attn(x, x)[:, :3], attn(changed, changed)[:, :3])
    everything = shaken(make_attention(is_causal=False))
    assert not torch.equal(everything(x, x)[:, :3], everything(changed, changed)[:, :3])


def test_causal_over_a_longer_sequence_is_aligned_at_the_top_left():
    attn, x, y = shaken(make_attention()), torch.randn(B, S, D), torch.randn(B, S_E, D)
    mask = torch.ones(1, S, S_E, dtype=torch.bool).tril()
    exact = reference.attention(copy.deepcopy(attn).double(), x.double(), y.double(), mask)
    assert_no_worse(attn(x, y), reference.attention(attn, x, y, mask), exact)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_a_key_head_serves_consecutive_query_heads(kv_heads, masked):
    """Value head j says j + 1 everywhere: query head h must say h // group + 1."""
    attn = make_attention(num_kv_heads=kv_heads)
    attn.output_proj = nn.Identity()
    attn.v_proj = nn.Linear(D, kv_heads * HEAD_DIM)
    nn.init.zeros_(attn.v_proj.weight)
    attn.v_proj.bias.data.copy_(torch.arange(kv_heads).repeat_interleave(HEAD_DIM) + 1)
    x = torch.randn(1, 3, D)
    out = attn(x, x, mask=torch.ones(1, 3, 3, dtype=torch.bool) if masked else None)
    want = [float(h // (HEADS // kv_heads) + 1) for h in range(HEADS) for _ in range(HEAD_DIM)]
    assert out[0, 1].tolist() == pytest.approx(want, rel=1e-6)


def test_a_key_head_is_read_by_its_own_queries():
    """Only the keys of head 1 single out token 2: query heads 2 and 3 follow them, 0 and 1 average."""
    q = torch.ones(1, HEADS, 1, HEAD_DIM, dtype=torch.float64)
    k = torch.zeros(1, KV_HEADS, 4, HEAD_DIM, dtype=torch.float64)
    k[:, 1, 2] = 100.0
    v = torch.eye(4, dtype=torch.float64).expand(1, KV_HEADS, 4, 4)
    for mask in (None, torch.ones(1, 1, 4, dtype=torch.bool), torch.zeros(1, 1, 4, dtype=torch.float64)):
        out = sdpa_or_flex_attention(q, k, v, mask, 0.0, False)[0, :, 0]
        assert out[:2].flatten().tolist() == pytest.approx([0.25] * 8, rel=1e-15)
        assert out[2:].flatten().tolist() == pytest.approx([0, 0, 1, 0] * 2, abs=1e-15)


def test_a_float_mask_of_zeros_and_ones_is_a_bias():
    """It hides nothing: weights of two equal keys with biases 1 and 0 are e / (e + 1) and 1 / (e + 1)."""
    q, k = torch.zeros(1, 1, 2, 2, dtype=torch.float64), torch.zeros(1, 1, 2, 2, dtype=torch.float64)
    v = torch.eye(2, dtype=torch.float64).expand(1, 1, 2, 2)
    out = sdpa_or_flex_attention(q, k, v, torch.ones(1, 2, 2, dtype=torch.float64).tril(), 0.0, False)[0, 0]
    e = math.e
    assert out.tolist() == [pytest.approx([e / (e + 1), 1 / (e + 1)]), pytest.approx([0.5, 0.5])]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", ["bool", "minus infinity"])
def test_a_row_that_sees_nothing_gives_exactly_zero(kind, dtype):
    attn = shaken(make_attention(cross=True)).to(dtype)
    x, y = torch.randn(B, S, D).to(dtype).requires_grad_(), torch.randn(B, S_E, D).to(dtype).requires_grad_()
    visible = torch.ones(B, S, S_E, dtype=torch.bool)
    visible[0, 1] = visible[1, 4] = False
    mask = visible if kind == "bool" else torch.zeros(B, S, S_E, dtype=dtype).masked_fill(~visible, -torch.inf)
    out = attn(x, y, mask=mask)
    assert not out[0, 1].any() and not out[1, 4].any()
    assert out.isfinite().all() and out[0, 0].all()
    out.sum().backward()
    assert not x.grad[0, 1].any() and not x.grad[1, 4].any()
    assert all(t.isfinite().all() and t.any() for t in (x.grad, y.grad, *(p.grad for p in attn.parameters())))


def test_a_two_dimensional_mask_is_refused():
    attn, x = make_attention(), torch.randn(B, S, D)
    with pytest.raises(IndexError):
        attn(x, x, mask=torch.ones(S, S, dtype=torch.bool))


def test_queries_and_keys_are_normed_after_the_rotation():
    """With scales that differ inside a pair the order shows."""
    attn, x = shaken(make_attention(rope=rope(), norms=True)), torch.randn(B, S, D)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1], [3, 9, 4, 30, 5, 5, 0, 31, 8], list(range(S))])
    exact = reference.attention(copy.deepcopy(attn).double(), x.double(), x.double(), None, positions)
    assert_no_worse(attn(x, x, input_pos=positions), reference.attention(attn, x, x, None, positions), exact)
    q = attn.q_proj(x).view(B, S, HEADS, HEAD_DIM)
    after = reference.rms(reference.rotate(q, positions, reference.plain_thetas(HEAD_DIM, 1e4)), attn.q_norm.scale, 1e-5)
    before = reference.rotate(reference.rms(q, attn.q_norm.scale, 1e-5), positions, reference.plain_thetas(HEAD_DIM, 1e4))
    assert (after - before).abs().max() > 0.1, "the input must tell the two orders apart"


def test_dropout_drops_its_share_in_training_alone():
    n, p = 16, 0.25
    attn = MultiHeadAttention(
        embed_dim=n, num_heads=1, num_kv_heads=1, head_dim=n, q_proj=nn.Linear(n, n), k_proj=nn.Linear(n, n), v_proj=nn.Identity(),
        output_proj=nn.Identity(), is_causal=False, attn_dropout=p,
    )  # fmt: skip
    for m in (attn.q_proj, attn.k_proj):
        nn.init.zeros_(m.weight)
        nn.init.zeros_(m.bias)
    x, y = torch.randn(1, 512, n), torch.eye(n)[None]  # the output is the weights of the n tokens, 1 / n each
    assert attn.eval()(x, y).flatten().tolist() == pytest.approx([1 / n] * 512 * n, rel=1e-6)
    weights = attn.train()(x, y)
    kept = weights != 0
    assert weights[kept].tolist() == pytest.approx([1 / (n * (1 - p))] * int(kept.sum()), rel=1e-6)
    sigma = math.sqrt(p * (1 - p) / weights.numel())
    assert abs((~kept).double().mean().item() - p) < 5 * sigma
    attn.attn_dropout = 0.0
    assert torch.equal(attn(x, y), attn.eval()(x, y))


def test_everything_is_dropped_at_one():
    attn, x = make_attention(attn_dropout=1.0), torch.randn(B, S, D)
    assert not attn.train()(x, x).any()
    assert attn.eval()(x, x).any()


def causal_rows(length: int, start: int, tokens: int) -> torch.Tensor:
    return torch.ones(length, length, dtype=torch.bool).tril()[None, start : start + tokens]


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("steps", [[7], [4, 1, 1, 1], [1] * 7, [2, 3, 2]], ids=str)
def test_cached_self_attention_equals_the_whole(steps, dtype):
    attn, x = shaken(make_attention(rope=rope(), norms=True)).to(dtype), torch.randn(B, 7, D).to(dtype)
    whole = in_several_orders(attn, x, x)
    exact = reference.attention(copy.deepcopy(attn).double(), x.double(), x.double())
    attn.setup_cache(B, dtype, max_seq_len=10)
    start = 0
    for n in steps:
        part, positions = x[:, start : start + n], torch.arange(start, start + n)
        out = attn(part, part, mask=causal_rows(10, start, n), input_pos=positions)
        assert_no_worse(out, [w[:, start : start + n] for w in whole], exact[:, start : start + n], f"tokens {start}..{start + n - 1}")
        start += n
    assert attn.kv_cache.size == 7
    attn.reset_cache()
    assert attn.kv_cache.size == 0
    again = attn(x, x, mask=causal_rows(10, 0, 7), input_pos=torch.arange(7))
    assert_no_worse(again, whole, exact, "after reset")


@torch.no_grad()
def test_cached_keys_are_rotated_and_normed():
    attn, x = shaken(make_attention(rope=rope(), norms=True)), torch.randn(B, 3, D)
    attn.setup_cache(B, torch.float32, max_seq_len=5)
    attn(x, x, mask=causal_rows(5, 0, 3), input_pos=torch.tensor([4, 7, 2]))

    def keys(m, x):
        k = reference.rotate((x @ m.k_proj.weight.T).view(B, 3, KV_HEADS, HEAD_DIM), torch.tensor([[4, 7, 2]]), reference.plain_thetas(HEAD_DIM, 1e4))
        return reference.rms(k, m.k_norm.scale, 1e-5).transpose(1, 2)

    assert_no_worse(attn.kv_cache.k_cache[:, :, :3], keys(attn, x), keys(copy.deepcopy(attn).double(), x.double()))
    assert_no_worse(
        attn.kv_cache.v_cache[:, :, :3],
        (x @ attn.v_proj.weight.T).view(B, 3, KV_HEADS, HEAD_DIM).transpose(1, 2),
        (x.double() @ attn.v_proj.weight.double().T).view(B, 3, KV_HEADS, HEAD_DIM).transpose(1, 2),
    )


@torch.no_grad()
def test_without_y_the_cache_is_read_and_left_alone():
    attn, x, y = shaken(make_attention(cross=True)), torch.randn(B, S, D), torch.randn(B, S_E, D)
    with pytest.raises(ValueError, match=r"^Must provide y input or use kv_cache to enable streaming decoding$"):
        attn(x)
    whole = attn(x, y)
    attn.setup_cache(B, torch.float32, max_seq_len=S_E)
    full = torch.ones(1, S, S_E, dtype=torch.bool)
    assert torch.equal(attn(x, y, mask=full), attn(x, mask=full))
    assert attn.kv_cache.size == S_E
    exact = reference.attention(copy.deepcopy(attn).double(), x.double(), y.double())
    assert_no_worse(attn(x), whole, exact)
    attn.cache_enabled = False
    with pytest.raises(ValueError, match="Must provide y input"):
        attn(x)
    assert torch.equal(attn(x, y), whole)
    attn.cache_enabled = True
    assert_no_worse(attn(x), whole, exact)


def test_a_disabled_cache_leaves_attention_causal():
    attn, x = shaken(make_attention()), torch.randn(B, S, D)
    whole = attn(x, x)
    attn.setup_cache(B, torch.float32, max_seq_len=8)
    attn.cache_enabled = False
    assert torch.equal(attn(x, x), whole)
    assert attn.kv_cache.size == 0


def test_a_cache_passed_in_starts_disabled():
    cache = KVCache(B, 10, KV_HEADS, HEAD_DIM, torch.float32)
    attn, x = shaken(make_attention(kv_cache=cache)), torch.randn(B, S, D)
    assert attn.kv_cache is cache and attn.cache_enabled is False
    attn(x, x)
    assert cache.size == 0
    attn.cache_enabled = True
    exact = reference.attention(copy.deepcopy(attn).double(), x.double(), x.double())
    assert_no_worse(attn(x, x, mask=causal_rows(10, 0, S)), reference.attention(attn, x, x), exact)
    assert cache.size == S


def test_a_second_setup_keeps_the_first_cache(caplog):
    attn = make_attention()
    attn.setup_cache(B, torch.bfloat16, max_seq_len=8)
    cache = attn.kv_cache
    assert cache.k_cache.shape == (B, KV_HEADS, 8, HEAD_DIM) and cache.k_cache.dtype == torch.bfloat16 and attn.cache_enabled
    with caplog.at_level(logging.WARNING):
        attn.setup_cache(B, torch.float32, max_seq_len=9)
    assert attn.kv_cache is cache and len(caplog.records) == 1


def test_caches_live_beside_the_key_projection():
    attn = make_attention().to("meta")
    attn.setup_cache(B, torch.float32, max_seq_len=8)
    assert attn.kv_cache.k_cache.is_meta and attn.kv_cache.cache_pos.is_meta
    with torch.device("meta"):
        attn = MultiHeadAttention(
            embed_dim=D, num_heads=HEADS, num_kv_heads=KV_HEADS, head_dim=HEAD_DIM, q_proj=nn.Identity(), k_proj=nn.Linear(D, 8, device="cpu"),
            v_proj=nn.Identity(), output_proj=nn.Identity(),
        )  # fmt: skip
        attn.setup_cache(B, torch.float32, max_seq_len=8)
    assert attn.kv_cache.k_cache.device.type == "cpu"


def test_resetting_no_cache_is_an_error():
    with pytest.raises(RuntimeError, match=r"^Key value caches are not setup\. Call ``setup_caches\(\)`` first\.$"):
        make_attention().reset_cache()


def test_the_batch_and_the_length_of_the_cache_bound_what_comes():
    attn = make_attention()
    attn.setup_cache(B, torch.float32, max_seq_len=4)
    with pytest.raises(ValueError, match="batch size of 3, but found new key tensors with batch size 4"):
        attn(torch.randn(4, 2, D), torch.randn(4, 2, D), mask=causal_rows(4, 0, 2))
    with pytest.raises(ValueError, match="5 tokens"):
        attn(torch.randn(B, 5, D), torch.randn(B, 5, D), mask=causal_rows(5, 0, 5))


WRONG = [
    ({"num_kv_heads": 3, "embed_dim": 9, "attn_dropout": 2, "q_norm": nn.Identity()}, r"^num_heads \(4\) must be divisible by num_kv_heads \(3\)$"),
    ({"embed_dim": 9, "attn_dropout": 2, "q_norm": nn.Identity()}, r"^embed_dim \(9\) must be divisible by num_heads \(4\)$"),
    ({"num_heads": 0}, r"^embed_dim \(8\) must be divisible by num_heads \(0\)$"),
    ({"attn_dropout": 2, "q_norm": nn.Identity()}, r"^attn_dropout \(2\) must be between 0\.0 and 1\.0$"),
    ({"attn_dropout": -0.5}, r"^attn_dropout \(-0\.5\) must be between"),
    ({"q_norm": nn.Identity()}, r"^q and k norm must be set together"),
    ({"k_norm": nn.Identity()}, r"^q and k norm must be set together"),
]


@pytest.mark.parametrize(("kwargs", "message"), WRONG, ids=[m[1:25] for _, m in WRONG])
def test_what_does_not_fit_is_refused_in_this_order(kwargs, message):
    parts = {name: nn.Identity() for name in ("q_proj", "k_proj", "v_proj", "output_proj")}
    with pytest.raises(ValueError, match=message):
        MultiHeadAttention(**{"embed_dim": 8, "num_heads": 4, "num_kv_heads": 2, "head_dim": 2, **parts, **kwargs})


def test_names_and_attributes():
    attn = make_attention(rope=rope(), norms=True, max_seq_len=77)
    assert list(attn.state_dict()) == [
        "q_proj.weight", "k_proj.weight", "v_proj.weight", "output_proj.weight", "q_norm.scale", "k_norm.scale",
    ]  # fmt: skip
    assert attn.q_norm.scale.shape == (HEAD_DIM,)
    assert (attn.num_heads, attn.num_kv_heads, attn.embed_dim, attn.head_dim, attn.max_seq_len) == (HEADS, KV_HEADS, D, HEAD_DIM, 77)
    assert attn.is_causal and attn.attn_dropout == 0.0 and attn.kv_cache is None
    attn.setup_cache(B, torch.float32, max_seq_len=8)
    assert not any("cache" in key for key in attn.state_dict())


def test_a_head_width_that_is_not_the_share_of_the_model_width():
    attn = MultiHeadAttention(
        embed_dim=8, num_heads=2, num_kv_heads=1, head_dim=6, q_proj=nn.Linear(8, 12), k_proj=nn.Linear(8, 6, bias=False),
        v_proj=nn.Linear(8, 6), output_proj=nn.Linear(12, 8),
    )  # fmt: skip
    assert_matches(attn, lambda m, x: m(x, x), lambda m, x: reference.attention(m, x, x), {"x": torch.randn(2, 3, 8)}, torch.float32)


def test_gradients_by_finite_differences():
    attn = shaken(make_attention(cross=True)).double()
    mask = torch.tensor([[[1, 0, 1], [0, 0, 0]]]).bool()
    x, y = torch.randn(1, 2, D, dtype=torch.float64, requires_grad=True), torch.randn(1, 3, D, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, y: attn(x, y, mask=mask), (x, y))


def test_packed_sequences_see_themselves_alone():
    from fastfuse.modules import create_block_causal_mask, packed_block_causal_mask

    lengths = [torch.tensor([2, 3]), torch.tensor([1, 1, 3])]
    want = torch.tensor(
        [
            [[1, 0, 0, 0, 0], [1, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]],
            [[1, 0, 0, 0, 0], [0, 1, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 1, 1, 1]],
        ],
        dtype=torch.bool,
    )
    assert torch.equal(create_block_causal_mask(lengths), want) and torch.equal(packed_block_causal_mask(lengths), want)
    attn = shaken(make_attention(rope=rope()))
    x = torch.randn(1, 5, D)
    packed = attn(x, x, mask=want[:1], input_pos=torch.tensor([[0, 1, 0, 1, 2]]))
    apart = torch.cat([attn(part, part) for part in (x[:, :2], x[:, 2:])], 1)
    assert (packed - apart).abs().max() <= 1e-5 * apart.abs().max()
    with pytest.raises(ValueError, match=r"seq_lens has rows of \[2, 3\] tokens"):
        create_block_causal_mask([torch.tensor([2]), torch.tensor([3])])


@pytest.mark.parametrize("mask", ["none", "bool", "float"])
def test_one_token_of_grouped_heads_is_the_whole_s_row(mask):
    """It takes another way, which copies no keys: the heads of a group are rows of one."""
    q, k, v = torch.randn(B, HEADS, S, HEAD_DIM), torch.randn(B, KV_HEADS, S_E, HEAD_DIM), torch.randn(B, KV_HEADS, S_E, HEAD_DIM)
    m = MASKS[mask]()
    whole = sdpa_or_flex_attention(q, k, v, m, 0.0, False)
    for i in range(S):
        one = sdpa_or_flex_attention(q[:, :, i : i + 1], k, v, None if m is None else m[:, i : i + 1], 0.0, False)
        assert (one - whole[:, :, i : i + 1]).abs().max() <= 1e-6 * whole.abs().max()
