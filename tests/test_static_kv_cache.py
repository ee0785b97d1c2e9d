"""StaticKVCache against lists of single tokens, decoding against float64; what they move, keep, wait for and refuse."""

import contextlib
import copy
import functools
import itertools
import pickle
from unittest import mock

import pytest
import torch
from numerics import assert_no_worse, in_several_orders
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from waiting import OPS, Launched, NoReading

import fastfuse
from fastfuse.ops import EncoderMask, _mask_ops, cross_attention
from fastfuse.ops._op import Cost
from fastfuse.ops.static_kv_cache import StaticKVCache, cross_attention_decode, cross_attention_decode_cost, cross_attention_decode_ref

OP = cross_attention_decode.__globals__
ATTEND = cross_attention.__globals__  # fastfuse.ops.cross_attention names the function
MASK = EncoderMask.from_dense.__globals__
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
ROUTES = ("auto", "torch", "triton")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LENGTHS = (0, 1, 129, 300)
LAYOUTS = ("plain", "heads last", "every other", "last dim apart", "same batch")
NAN = float("nan")


def tokens(b: int, heads: int, n: int, d: int, dtype=torch.float32, layout: str = "plain") -> Tensor:
    """[b, heads, n, d], no two values alike but for rounding."""
    shape = {
        "plain": (b, heads, n, d), "heads last": (b, n, heads, d), "every other": (b, heads, 2 * n, d + 3), "last dim apart": (b, heads, d, n),
        "same batch": (1, heads, n, d),
    }[layout]  # fmt: skip
    x = torch.randn(shape).to(DEVICE, dtype)
    if layout == "heads last":
        return x.transpose(1, 2)
    if layout == "every other":
        return x[:, :, 1::2, 3:]
    return x.mT if layout == "last dim apart" else x.expand(b, -1, -1, -1)


def new_cache(b: int, heads: int, d: int, max_len: int, dtype=torch.float32, slack: float = NAN) -> StaticKVCache:
    cache = StaticKVCache(b, heads, d, max_len, dtype, device=DEVICE)
    assert cache.k.shape == cache.v.shape == (b, heads, max_len, d) and cache.k.dtype == cache.v.dtype == dtype
    assert cache.lengths.dtype == torch.int32 and cache.lengths.tolist() == [0] * b and not cache.is_filled and cache.mask is None
    cache.k.fill_(slack)
    cache.v.fill_(slack)
    return cache


def front(lengths, s_e: int, s: int = 1) -> Tensor:
    """bool [b, s, s_e]: the last row sees lengths[i] tokens, the others something else."""
    seen = torch.arange(s_e) < torch.tensor(lengths)[:, None, None]
    return torch.cat([~seen.expand(-1, s - 1, -1), seen], 1).to(DEVICE)


def scattered(b: int, s: int, s_e: int) -> Tensor:
    mask = torch.rand(b, s, s_e, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[0, -1] = False  # a sequence that sees nothing
    return mask.to(DEVICE)


def kept(x: Tensor, mask: Tensor | None) -> list[list[Tensor]]:
    """For each sequence the tokens [heads, d] that the mask's last row shows, one by one."""
    rows = [[True] * x.shape[2]] * len(x) if mask is None else mask[:, -1].expand(len(x), -1).tolist()
    return [[x[i, :, n] for n, seen in enumerate(row) if seen] for i, row in enumerate(rows)]


def check_holds(cache: StaticKVCache, k: list, v: list, slack: float | None = NAN) -> None:
    """Those tokens, and behind them what was there, unless that is None."""
    assert cache.is_filled and cache.mask is None
    assert cache.lengths.dtype == torch.int32 and cache.lengths.tolist() == [len(row) for row in k]
    for own, want in ((cache.k, k), (cache.v, v)):
        expected = own.clone() if slack is None else torch.full_like(own, slack)
        for i, row in enumerate(want):
            for n, token in enumerate(row):
                expected[i, :, n] = token
        torch.testing.assert_close(own, expected, rtol=0, atol=0, equal_nan=True)


def alone(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """[hq, s, d] over [hkv, n, d], by PyTorch."""
    if k.shape[1] == 0:
        return torch.zeros_like(q)
    k, v = (t.repeat_interleave(len(q) // len(t), 0)[None] for t in (k, v))
    return F.scaled_dot_product_attention(q[None], k, v, scale=scale)[0]


def lse_alone(q: Tensor, k: Tensor, scale: float | None = None) -> Tensor:
    scores = q @ k.repeat_interleave(len(q) // len(k), 0).mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    return scores.logsumexp(-1)


def check_decode(o: Tensor, q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float | None = None, lse: Tensor | None = None) -> None:
    """o [b, hq, s, d] by the rule, over the columns of k and v that seen [b, n] has."""
    for i, row in enumerate(seen):
        if not row.any():
            assert torch.equal(o[i], torch.zeros_like(o[i])), i

    def rows(fn, dtype, *tensors):
        return torch.stack([fn(*(t.to(dtype) for t in (q[i].detach(), *(t[i][:, row] for t in tensors))), scale) for i, row in enumerate(seen)])

    assert o.stride() == torch.empty_like(q).stride()
    assert_no_worse(o, in_several_orders(rows, alone, q.dtype, k, v), rows(alone, torch.float64, k, v))
    if lse is not None:
        empty = ~seen.any(1)
        assert lse.dtype == torch.float32 and lse.shape == q.shape[:3] and bool((lse[empty] == torch.inf).all())
        eager = in_several_orders(lambda: rows(lse_alone, torch.float32, k)[~empty])
        assert_no_worse(lse[~empty], eager, rows(lse_alone, torch.float64, k)[~empty], "lse")


@contextlib.contextmanager
def splits(n: int):
    with mock.patch.dict(ATTEND, {"_splits": lambda programs, columns, device: n}):
        yield


# Filling


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("layout, dtype", zip(LAYOUTS, (*DTYPES, *DTYPES), strict=False))
@pytest.mark.parametrize("kind", [None, "bool", "one for all", "bits", "interval"])
def test_fill_packs_what_the_last_row_sees(kind, layout, dtype, route):
    b, heads, s_e, d, max_len = 3, 2, 67, 5, 71
    k, v = tokens(b, heads, s_e, d, dtype, layout), tokens(b, heads, s_e, d, dtype)
    dense = scattered(b, 2, s_e)
    if kind == "interval":
        dense[:, -1] = front((0, 66, 67), s_e)[:, 0]
        dense[1, -1, 0] = False
        mask = EncoderMask.from_dense(dense[:, -1:], kind="interval")
    elif kind == "bits":
        mask = EncoderMask.from_dense(dense, kind="bits")
    elif kind == "one for all":
        mask = dense = dense[1:2]
    else:
        mask = dense = None if kind is None else dense
    cache = new_cache(b, heads, d, max_len, dtype)
    with fastfuse.backend(route):
        assert cache.fill(k, v, mask) is None
    check_holds(cache, kept(k, dense), kept(v, dense))


@pytest.mark.parametrize("route", ROUTES)
def test_fill_takes_several_programs_and_strides_of_any_size(route, monkeypatch):
    monkeypatch.setitem(OP, "_ELEMENTS", 64)
    k, v = (tokens(2, 2, 15, 5, layout=layout) for layout in ("heads last", "every other"))
    for mask in (None, scattered(2, 1, 15)):
        cache = new_cache(2, 2, 5, 15)
        with fastfuse.backend(route):
            cache.fill(k, v, mask)
        check_holds(cache, kept(k, mask), kept(v, mask))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("given", [(0, 67, 0), (3, 0, 5), (0, 1, 1)])
def test_empty_batches_and_no_tokens(given, route):
    b, s_e, max_len = given
    cache = new_cache(b, 2, 16, max_len)
    with fastfuse.backend(route):
        cache.append(tokens(b, 2, 0, 16), tokens(b, 2, 0, 16), torch.ones(b, 1, 0, dtype=torch.bool, device=DEVICE))
        check_holds(cache, [[]] * b, [[]] * b)
        if s_e <= max_len:
            cache.fill(tokens(b, 2, s_e, 16), tokens(b, 2, s_e, 16))
        q = tokens(b, 4, 1, 16)
        o, lse = cross_attention_decode(q, cache, return_lse=True)
    assert torch.equal(o, torch.zeros_like(q)) and lse.shape == q.shape[:3] and bool((lse == torch.inf).all())


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_append_reset_and_fill_again_in_the_same_memory(dtype, route):
    b, heads, d, max_len = 3, 2, 8, 40
    cache = new_cache(b, heads, d, max_len, dtype)
    pointers = [t.data_ptr() for t in (cache.k, cache.v, cache.lengths)]
    held = [[] for _ in range(b)], [[] for _ in range(b)]
    with fastfuse.backend(route):
        for turn, s_e in enumerate((13, 7, 9)):
            k, v = (tokens(b, heads, s_e, d, dtype, "heads last") for _ in range(2))
            mask = None if turn == 2 else scattered(b, 2, s_e).roll(turn, 0)
            cache.append(k, v, None if mask is None else EncoderMask.from_dense(mask))
            for own, x in zip(held, (k, v), strict=True):
                for row, more in zip(own, kept(x, mask), strict=True):
                    row += more
            check_holds(cache, *held)
        assert len(set(cache.lengths.tolist())) == b
        before = cache.k.clone()
        cache.reset()
        assert cache.lengths.tolist() == [0] * b and not cache.is_filled
        k, v = (tokens(b, heads, 5, d, dtype) for _ in range(2))
        cache.fill(k, v)
        assert cache.lengths.tolist() == [5] * b
        torch.testing.assert_close(cache.k, torch.cat([k, before[:, :, 5:]], 2), rtol=0, atol=0, equal_nan=True)
        cache.fill(*(tokens(b, heads, max_len, d, dtype) for _ in range(2)))  # to the last place
        cache.fill(k, v, scattered(1, 1, 5))  # whose one row sees nothing
        assert cache.lengths.tolist() == [0] * b
        cache.append(v, k)
        assert torch.equal(cache.k[:, :, :5], v) and torch.equal(cache.v[:, :, :5], k) and cache.lengths.tolist() == [5] * b
    assert pointers == [t.data_ptr() for t in (cache.k, cache.v, cache.lengths)]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("kind", ["bits", "interval", "one for all"])
def test_tokens_stay_in_their_columns_without_compaction(kind, route):
    b, hkv, hq, s_e, d, max_len = 2, 2, 4, 67, 16, 140
    k, v, q = tokens(b, hkv, s_e, d), tokens(b, hkv, s_e, d), tokens(b, hq, 3, d)
    dense = front((0, 30), s_e, 4) if kind == "interval" else scattered(b, 4, s_e)
    dense = dense[1:] if kind == "one for all" else dense
    cache = new_cache(b, hkv, d, max_len)
    with fastfuse.backend(route):
        cache.fill(k, v, dense if kind == "one for all" else EncoderMask.from_dense(dense, kind=kind if kind == "bits" else "auto"), compact=False)
        assert cache.lengths.tolist() == [s_e] * b
        assert cache.mask.shape == (b, 1, max_len)
        assert torch.equal(cache.mask.to_dense(), F.pad(dense[:, -1:], (0, max_len - s_e)).expand(b, -1, -1))
        assert torch.equal(cache.k[:, :, :s_e], k) and torch.equal(cache.v[:, :, :s_e], v)
        for s in (3, 0, 1):  # no other token's row
            o, lse = cross_attention_decode(q[:, :, :s], cache, return_lse=True)
            if s:
                check_decode(o, q[:, :, :s], k, v, dense[:, -1].expand(b, -1), lse=lse)
            else:
                assert o.shape == (b, hq, 0, d) and lse.shape == (b, hq, 0)
        with pytest.raises(ValueError, match="compact=False and a mask"):
            cache.append(k, v)
        cache.fill(k, v, compact=False)  # without a mask that is compact
        assert cache.mask is None and cache.lengths.tolist() == [s_e] * b
        cache.append(k, v)
        assert cache.lengths.tolist() == [2 * s_e] * b
        cache.fill(k, v, dense, compact=False)
        cache.reset()
        assert cache.mask is None
        cache.append(k, v, dense)
    check_holds(cache, kept(k, dense), kept(v, dense), None)


def test_a_one_tile_image_holds_a_quarter_of_the_tokens_and_reads_a_quarter_of_the_bytes():
    per_tile, heads, d, hq = 41, 2, 16, 8
    tiles = torch.tensor([[1], [4]], device=DEVICE)
    text = torch.tensor([[7, 1, 2], [7, 3, 4]], device=DEVICE)
    mask = EncoderMask.from_tokens(text, 7, tiles, 4, per_tile)
    cache = new_cache(2, heads, d, 4 * per_tile, torch.bfloat16)
    cache.fill(*(tokens(2, heads, 4 * per_tile, d, torch.bfloat16) for _ in range(2)), mask)
    assert cache.lengths.tolist() == [per_tile, 4 * per_tile]
    q = tokens(1, hq, 1, d, torch.bfloat16)
    one, four = (cross_attention_decode_cost(q, cache, tokens=n) for n in cache.lengths.tolist())
    ends = 2 * q.numel() * 2
    assert four == Cost(ends + 2 * 4 * per_tile * heads * d * 2, 4 * hq * d * 4 * per_tile)
    assert 4 * (one.bytes - ends) == four.bytes - ends and 4 * one.flops == four.flops
    on_meta = StaticKVCache(2, heads, d, 4 * per_tile, torch.bfloat16, device="meta")
    every = cross_attention_decode_cost(tokens(2, hq, 1, d, torch.bfloat16).to("meta"), on_meta)
    assert every == Cost(2 * ends + 2 * cache.k.numel() * 2, 4 * hq * d * 2 * 4 * per_tile)


# Decoding


@pytest.mark.parametrize(
    "n_splits, dtype", [(1, torch.float32), (2, torch.float16), (3, torch.bfloat16), (4, torch.float32), (5, torch.float32), (5, torch.float16)]
)
def test_decode_of_every_split(n_splits, dtype, kernels):
    hkv, d, G = 1, 16, 4
    k, v = tokens(4, hkv, 300, d, dtype), tokens(4, hkv, 300, d, dtype)
    cache = new_cache(4, hkv, d, 333, dtype)
    cache.fill(k, v, front(LENGTHS, 300))
    q = tokens(4, G * hkv, 1, d, dtype, "heads last")
    with splits(n_splits):
        o, lse = cross_attention_decode(q, cache, return_lse=True)
    check_decode(o, q, k, v, front(LENGTHS, 300)[:, 0], lse=lse)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("hkv, G, d, s, scale", [(2, 1, 20, 1, None), (1, 3, 16, 2, 0.3), (2, 4, 64, 1, -0.2), (1, 8, 128, 3, None)])
def test_decode_of_every_group(hkv, G, d, s, scale, route):
    k, v = tokens(4, hkv, 300, d), tokens(4, hkv, 300, d)
    cache = new_cache(4, hkv, d, 301)
    q = tokens(4, G * hkv, s, d)
    with fastfuse.backend(route):
        cache.fill(k, v, front(LENGTHS, 300))
        o, lse = cross_attention_decode(q, cache, scale=scale, return_lse=True)
        assert torch.equal(cross_attention_decode(q, cache, scale=scale), o)
    check_decode(o, q, k, v, front(LENGTHS, 300)[:, 0], scale, lse)
    assert torch.equal(cross_attention_decode_ref(q, cache, scale=scale), cross_attention_decode(q, cache, scale=scale, backend="torch"))


@pytest.mark.parametrize("b", [1, 64])
def test_decode_of_a_batch(b, kernels):
    lengths = [(129, 3, 0, 64, 1, 0, 0, 0)[i % 8] for i in range(b)]  # the interpreter takes 10 ms for a block
    k, v, q = tokens(b, 1, 130, 16), tokens(b, 1, 130, 16), tokens(b, 2, 1, 16)
    cache = new_cache(b, 1, 16, 130)
    cache.fill(k, v, front(lengths, 130))
    check_decode(cross_attention_decode(q, cache), q, k, v, front(lengths, 130)[:, 0])


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_decode_is_the_last_row_of_prefill(dtype, route):
    b, hkv, hq, s, s_e, d = 2, 1, 4, 5, 131, 32
    k, v, q = tokens(b, hkv, s_e, d, dtype), tokens(b, hkv, s_e, d, dtype), tokens(b, hq, s, d, dtype)
    mask, cache, last = scattered(b, s, s_e), new_cache(b, hkv, d, s_e, dtype), q[:, :, -1:]
    with fastfuse.backend(route):
        prefill = cross_attention(q, k, v, mask)[:, :, -1:]
        by_mask = cross_attention(last, k, v, EncoderMask.from_dense(mask).last_row())
        found = []
        for compact in (True, False):
            cache.fill(k, v, mask, compact=compact)
            found.append(cross_attention_decode(last, cache))
    exact = torch.stack([alone(*(t.double() for t in (last[i], k[i][:, m], v[i][:, m]))) for i, m in enumerate(mask[:, -1])])
    for o in found:
        for want in (prefill, by_mask):
            assert_no_worse(o, want, exact)
    assert torch.equal(found[1], by_mask)


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("hkv, s", [(1, 1), (2, 3)])
def test_q_gets_its_gradient_whatever_lies_in_the_slack(hkv, s, route):
    hq, d, s_e, lengths = 4, 16, 70, (0, 1, 70)
    k, v = (tokens(3, hkv, s_e, d).requires_grad_() for _ in range(2))
    q, do, dlse = tokens(3, hq, s, d).requires_grad_(), tokens(3, hq, s, d), torch.rand(3, hq, s, device=DEVICE)
    cache = new_cache(3, hkv, d, 75)
    with fastfuse.backend(route):
        cache.fill(k, v, front(lengths, s_e))
        assert not cache.k.requires_grad and cache.k.grad_fn is None
        o, lse = cross_attention_decode(q, cache, return_lse=True)
        with torch.no_grad():
            plain = cross_attention_decode(q, cache)
        loss = (o * do).sum() + (lse[1:] * dlse[1:]).sum()
        cache.append(k[:, :, :1], v[:, :, :1])  # what the backward needs is its own
        (dq,) = torch.autograd.grad(loss, q)
    seen = front(lengths, s_e)[:, 0]
    check_decode(o, q, k.detach(), v.detach(), seen, lse=lse.detach())
    check_decode(plain, q, k.detach(), v.detach(), seen)

    def gradient(dtype):
        total, leaf = 0, q.detach().to(dtype).requires_grad_()
        for i in (1, 2):
            parts = leaf[i], k[i][:, seen[i]].detach().to(dtype), v[i][:, seen[i]].detach().to(dtype)
            total = total + (alone(*parts) * do[i].to(dtype)).sum() + (lse_alone(*parts[:2]) * dlse[i].to(dtype)).sum()
        return torch.autograd.grad(total, leaf)[0]

    assert not dq[0].any()
    assert_no_worse(dq, in_several_orders(gradient, torch.float32), gradient(torch.float64), "dq")


@pytest.mark.parametrize("route", ROUTES)
def test_q_gets_its_gradient_under_a_mask(route):
    mask, k, v = scattered(2, 1, 40), tokens(2, 1, 40, 16), tokens(2, 1, 40, 16)
    q, cache = tokens(2, 2, 2, 16).requires_grad_(), new_cache(2, 1, 16, 50)
    with fastfuse.backend(route):
        cache.fill(k, v, mask, compact=False)
        (dq,) = torch.autograd.grad(cross_attention_decode(q, cache).sum(), q)
        want = torch.autograd.grad(cross_attention(q, k, v, mask.expand(-1, 2, -1)).sum(), q)[0]
    torch.testing.assert_close(dq, want)
    assert not dq[0].any() and dq[1].any()


def test_the_whole_slack_may_be_nan_at_every_split(kernels):
    """Also where a split begins or ends at it, and where a block is full but for it."""
    k, v, q = tokens(5, 1, 256, 16), tokens(5, 1, 256, 16), tokens(5, 2, 1, 16)
    lengths = (63, 64, 65, 128, 255)
    cache = new_cache(5, 1, 16, 400)
    cache.fill(k, v, front(lengths, 256))
    for n in (1, 3):
        with splits(n):
            check_decode(cross_attention_decode(q, cache), q, k, v, front(lengths, 256)[:, 0])


# What is refused


def state(cache: StaticKVCache) -> tuple:
    return *(t.clone() for t in (cache.k, cache.v, cache.lengths)), cache.is_filled, cache.mask


def assert_unchanged(cache: StaticKVCache, before: tuple) -> None:
    for now, then in zip((cache.k, cache.v, cache.lengths), before, strict=False):
        torch.testing.assert_close(now, then, rtol=0, atol=0, equal_nan=True)
    assert (cache.is_filled, cache.mask) == before[3:]


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("at_hand", [True, False])
def test_more_than_max_len_is_refused_and_nothing_is_written(at_hand, route, monkeypatch):
    cache = new_cache(2, 1, 4, 10)
    k, v = tokens(2, 1, 11, 4), tokens(2, 1, 11, 4)
    full, most = (torch.ones(2, 1, n, dtype=torch.bool, device=DEVICE) for n in (11, 8))
    with fastfuse.backend(route):
        cache.fill(k[:, :, :8], v[:, :, :8], most)
        cases = [
            (cache.fill, (k, v), {}, r"^StaticKVCache.fill: k has 11 tokens, max_len is 10$"),
            (cache.fill, (k, v, full), {"compact": False}, r"^StaticKVCache.fill: k has 11 tokens, max_len is 10$"),
            (cache.append, (k, v), {}, r"^StaticKVCache.append: k has 11 tokens, max_len is 10$"),
        ]
        of_values = [
            (cache.fill, (k, v, full), r"fill: sequence 0 would hold 11 tokens, max_len is 10$"),
            (cache.append, (k[:, :, :3], v[:, :, :3]), r"append: sequence 0 would hold 11 tokens, max_len is 10$"),
            (cache.append, (k[:, :, :8], v[:, :, :8], front((2, 3), 8)), r"append: sequence 1 would hold 11 tokens, max_len is 10$"),
        ]
        if not at_hand:
            monkeypatch.setitem(OP, "values_are_at_hand", lambda t: False)
        before = state(cache)
        for call, args, options, message in cases:
            with pytest.raises(ValueError, match=message):
                call(*args, **options)
            assert_unchanged(cache, before)
        if CUDA:  # there the device's assertion ends the process
            return
        for call, args, message in of_values:
            with pytest.raises(*((ValueError,) if at_hand else (RuntimeError,)), match=message if at_hand else "more tokens than max_len=10"):
                call(*args)
            assert_unchanged(cache, before)
        cache.append(k[:, :, :8], v[:, :, :8], front((2, 1), 8))  # there is room for that
        assert cache.lengths.tolist() == [10, 9]


@pytest.mark.parametrize("interpret", [True, False, None])
@pytest.mark.parametrize("at", [6, 9, 10, 13])
def test_nothing_is_written_past_max_len_where_the_assertion_is_lost(at, interpret):
    max_len, s_e = 10, 5
    k, v = tokens(2, 1, s_e, 4), tokens(2, 1, s_e, 4)
    for places in (None, torch.arange(at, at + s_e, dtype=torch.int32, device=DEVICE).expand(2, -1)):
        guarded = torch.full((2, 3, 1, max_len, 4), 7.0, device=DEVICE)
        caches, held = guarded[:, :2].unbind(), torch.full((2,), at + s_e, dtype=torch.int32, device=DEVICE)
        args = (*(c.contiguous() for c in caches), k, v, places, held)
        assert all(a.data_ptr() == c.data_ptr() for a, c in zip(args, caches, strict=False))
        OP["_kv_cache_write_ref"](*args) if interpret is None else OP["_kv_cache_write"](*args, interpret)
        want = torch.full_like(guarded, 7.0)
        for own, x in zip(want, (k, v), strict=True):
            own[:2, :, at:max_len] = x[:, :, : max(0, max_len - at)]
        assert torch.equal(guarded, want)
        cache = new_cache(2, 1, 4, max_len)
        cache.lengths.fill_(at)
        route = {True: "triton", False: "auto", None: "torch"}[interpret]
        with fastfuse.backend(route), mock.patch.dict(OP, {"_check_room": lambda *_: None}):
            cache.append(k, v, None if places is None else torch.ones(2, 1, s_e, dtype=torch.bool, device=DEVICE))
        assert cache.lengths.tolist() == [max_len] * 2


def refusals():
    good = lambda **shape: tokens(**{"b": 2, "heads": 2, "n": 9, "d": 4} | shape)  # noqa: E731
    mask = torch.ones(2, 3, 9, dtype=torch.bool, device=DEVICE)
    k = good()
    yield (3, k), TypeError, "k is a int, not a tensor"
    yield (k, None), TypeError, "v is a NoneType, not a tensor"
    yield (k[0], k), ValueError, r"k has shape \(2, 9, 4\), expected \(b, n_kv_heads, s_e, head_dim\)"
    yield (good(b=1), k), ValueError, "k has a batch of 1, the cache 2"
    yield (k, good(heads=4)), ValueError, "v has heads: 4, the cache 2"
    yield (k, good(d=8)), ValueError, "v has head_dim 8, the cache 4"
    yield (k, good(n=8)), ValueError, "k has 9 tokens, v 8"
    yield (k.half(), k), ValueError, "k is torch.float16, the cache torch.float32"
    yield (k, k.long()), ValueError, "v is torch.int64, expected floating point"
    yield (k.to("meta"), k), ValueError, f"k is on meta, the cache on {DEVICE}"
    yield (k, k, [True]), TypeError, "mask is a list, expected a bool tensor or an EncoderMask"
    yield (k, k, mask.int()), ValueError, "mask is torch.int32, expected torch.bool"
    yield (k, k, mask[..., :8]), ValueError, r"mask has shape \(2, 3, 8\), k needs \(2 or 1, 1 or more, 9\)"
    yield (k, k, EncoderMask.from_dense(mask[..., :8])), ValueError, r"mask has shape \(2, 3, 8\), k needs"
    yield (k, k, mask[:1].expand(3, -1, -1)), ValueError, r"mask has shape \(3, 3, 9\), k needs"
    yield (k, k, mask[:, 0]), ValueError, r"mask has shape \(2, 9\), k needs"
    yield (k, k, mask[:, :0]), ValueError, r"mask has shape \(2, 0, 9\), k needs"
    yield (k, k, mask.to("meta")), ValueError, f"k is on {DEVICE}.*, mask on meta"


@pytest.mark.parametrize("args, error, message", list(refusals()), ids=lambda x: x if isinstance(x, str) else "")
def test_fill_and_append_refuse_before_they_write(args, error, message):
    cache = new_cache(2, 2, 4, 12)
    cache.fill(tokens(2, 2, 3, 4), tokens(2, 2, 3, 4))
    before = state(cache)
    for name in ("fill", "append"):
        with pytest.raises(error, match=rf"^StaticKVCache.{name}: {message}"):
            getattr(cache, name)(*args)
        assert_unchanged(cache, before)


def test_the_caches_own_memory_is_refused():
    cache = new_cache(2, 1, 4, 12)
    x = tokens(2, 1, 12, 4)
    cache.fill(x, x)  # one tensor for both is fine
    before = state(cache)
    for k, v, name in ((cache.k[:, :, 2:6], x[:, :, :4], "k"), (x, cache.k, "v"), (cache.v.clone(), cache.v, "v")):
        with pytest.raises(ValueError, match=rf"fill: {name} is memory of the cache.* pass a clone"):
            cache.fill(k, v)
        assert_unchanged(cache, before)
    cache.fill(cache.k.clone(), cache.v.clone(), front((3, 4), 12))
    assert cache.lengths.tolist() == [3, 4]


def test_decode_refuses():
    cache = new_cache(2, 2, 4, 12)
    q = tokens(2, 4, 1, 4)
    with pytest.raises(ValueError, match=r"^cross_attention_decode: the cache holds nothing"):
        cross_attention_decode(q, cache)
    cache.fill(tokens(2, 2, 3, 4), tokens(2, 2, 3, 4))
    for args, error, message in (
        ((q, cache.k), TypeError, "cache is a Tensor, expected a StaticKVCache"),
        ((None, cache), TypeError, "q is a NoneType, not a tensor"),
        ((q[0], cache), ValueError, r"q has shape \(4, 1, 4\), expected"),
        ((q[:1], cache), ValueError, "q has a batch of 1, the cache of 2"),
        ((tokens(2, 3, 1, 4), cache), ValueError, "q has 3 heads, the cache 2, which does not divide them"),
        ((tokens(2, 0, 1, 4), cache), ValueError, "q has 0 heads"),
        ((tokens(2, 4, 1, 8), cache), ValueError, "q has head_dim 8, the cache 4"),
        ((q.half(), cache), ValueError, "q is torch.float16, the cache torch.float32"),
        ((q.long(), cache), ValueError, "q is torch.int64, expected floating point"),
        ((q.to("meta"), cache), ValueError, f"q is on meta, the cache on {DEVICE}"),
    ):
        with pytest.raises(error, match=f"^cross_attention_decode: {message}"):
            cross_attention_decode(*args)
    with pytest.raises(ValueError, match="backend is 'cuda'"):
        cross_attention_decode(q, cache, backend="cuda")
    cache.reset()
    with pytest.raises(ValueError, match="the cache holds nothing"):
        cross_attention_decode(q, cache)
    cache.is_filled = True  # another hand has filled it, with nothing
    assert not cross_attention_decode(q, cache).any()


@pytest.mark.parametrize(
    "change, error, message",
    [
        ({"batch_size": -1}, ValueError, "batch_size is -1, expected 0 or more"),
        ({"n_kv_heads": 0}, ValueError, "n_kv_heads is 0, expected 1 or more"),
        ({"head_dim": 0}, ValueError, "head_dim is 0, expected 1 or more"),
        ({"max_len": 1.5}, TypeError, "max_len is a float, expected a whole number"),
        ({"dtype": torch.int8}, ValueError, "dtype is torch.int8, expected"),
        ({"dtype": "float16"}, ValueError, "dtype is 'float16', expected"),
    ],
)
def test_a_cache_that_cannot_be(change, error, message):
    with pytest.raises(error, match=f"^StaticKVCache: {message}"):
        StaticKVCache(**{"batch_size": 1, "n_kv_heads": 1, "head_dim": 4, "max_len": 4, "dtype": torch.float32} | change)


def test_a_head_dim_that_kernels_do_not_cover_can_be_held_and_is_said(kernels):
    cache = new_cache(1, 1, 300, 3)
    x = tokens(1, 1, 2, 300)
    cache.fill(x, x)
    check_holds(cache, kept(x, None), kept(x, None))
    with pytest.raises(fastfuse.Unsupported, match="cross_attention_decode: head_dim is 300"):
        cross_attention_decode(tokens(1, 1, 1, 300), cache)


# How it lives with PyTorch


@pytest.mark.parametrize("route", ROUTES)
def test_autocast_casts(route):
    k, v, q = tokens(2, 1, 20, 16), tokens(2, 1, 20, 16), tokens(2, 2, 1, 16)
    cache = new_cache(2, 1, 16, 20, torch.bfloat16)
    with fastfuse.backend(route), torch.autocast(DEVICE, torch.bfloat16):
        cache.fill(k, v)
        o = cross_attention_decode(q, cache)
        kept_wide = new_cache(2, 1, 16, 20)
        kept_wide.fill(k.half(), v)
        assert o.dtype == cross_attention_decode(q, kept_wide).dtype == torch.bfloat16
    assert torch.equal(cache.k, k.bfloat16()) and torch.equal(kept_wide.k, k.half().float())
    check_decode(o, q.bfloat16(), k.bfloat16(), v.bfloat16(), torch.ones(2, 20, dtype=torch.bool, device=DEVICE))


@pytest.mark.parametrize("made_in, filled_in", itertools.product([True, False], repeat=2))
def test_inference_mode(made_in, filled_in, kernels):
    k, q = tokens(1, 1, 3, 16), tokens(1, 1, 1, 16)
    with torch.inference_mode(made_in):
        cache = new_cache(1, 1, 16, 6)
    for mode in (filled_in, not filled_in):
        with torch.inference_mode(mode):
            cache.append(k, k)
            assert cross_attention_decode(q, cache).isfinite().all()
    cache.reset()
    assert cache.lengths.tolist() == [0]


def test_copies_are_caches_of_their_own():
    cache = new_cache(2, 1, 16, 12)
    x, q = tokens(2, 1, 12, 16), tokens(2, 1, 1, 16)
    for compact in (True, False):
        cache.fill(x, x, scattered(2, 1, 12), compact=compact)
        want = cross_attention_decode(q, cache)
        for other in (copy.deepcopy(cache), pickle.loads(pickle.dumps(cache))):
            assert torch.equal(cross_attention_decode(q, other), want)
            other.reset()
            assert torch.equal(cross_attention_decode(q, cache), want)
    assert repr(cache) == f"StaticKVCache(shape=(2, 1, 12, 16), dtype=torch.float32, device='{cache.k.device}', is_filled=True)"


@pytest.mark.parametrize("with_places", [True, False])
@pytest.mark.parametrize("interpret", [False, True])
def test_opcheck(interpret, with_places):
    k, v = tokens(2, 2, 6, 4, layout="every other"), tokens(2, 2, 6, 4, layout="same batch")
    cache = new_cache(2, 2, 4, 9, slack=0)
    start = torch.zeros(2, dtype=torch.int32, device=DEVICE)
    places, held = OP["_places"](scattered(2, 1, 6)[:, 0], start) if with_places else (None, start + 6)
    torch.library.opcheck(OP["_kv_cache_write"], (cache.k, cache.v, k, v, places, held, interpret))


def test_what_changes_after_a_step_is_seen_by_the_next():
    cache, q = new_cache(2, 1, 16, 40, slack=0), tokens(2, 2, 1, 16)
    again = functools.partial(cross_attention_decode, q, cache)
    check = lambda: torch.testing.assert_close(again(), cross_attention_decode_ref(q, cache))  # noqa: E731
    cache.fill(tokens(2, 1, 9, 16), tokens(2, 1, 9, 16))
    check()
    with mock.patch.dict(OP, _check_decode=None):  # what was checked is not checked again
        again()
    cache.append(tokens(2, 1, 9, 16), tokens(2, 1, 9, 16))
    check()
    cache.fill(tokens(2, 1, 9, 16), tokens(2, 1, 9, 16), scattered(2, 3, 9), compact=False)
    check()
    cache.fill(tokens(2, 1, 9, 16), tokens(2, 1, 9, 16))
    cache.lengths = torch.full_like(cache.lengths, 3)
    check()
    assert cross_attention_decode(q.clone().requires_grad_(), cache).requires_grad
    with pytest.raises(ValueError, match="a batch of 1"):
        cross_attention_decode(q[:1], cache)
    cache.is_filled = False
    with pytest.raises(ValueError, match="holds nothing"):
        again()


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("route, dynamic", [*((route, False) for route in ROUTES), ("auto", True)])
def test_a_decode_step_compiles_once(route, dynamic, compact):
    torch._dynamo.reset()  # one function's limit of compilations counts for all caches
    cache, eager = new_cache(2, 1, 16, 40), new_cache(2, 1, 16, 40)
    counter = CompileCounterWithBackend("aot_eager")
    step = torch.compile(lambda q: cross_attention_decode(q, cache) * 2, backend=counter, fullgraph=True, dynamic=dynamic)
    with fastfuse.backend(route), torch.no_grad():
        for i in range(4):
            x, q = tokens(2, 1, 9, 16), tokens(2, 2, 1, 16)
            for c in (cache, eager):
                if compact:
                    c.append(x, x, scattered(2, 1, 9).roll(i, 0))
                elif i == 0:
                    c.fill(x, x, scattered(2, 1, 9), compact=False)
            torch.testing.assert_close(step(q), cross_attention_decode(q, eager) * 2)
            if i == (not compact):
                first = counter.frame_count
    assert counter.frame_count == first  # a mask's lists of blocks are made by the first step, which the second finds
    assert dynamic or first == 1 + (not compact and (route == "triton" or (CUDA and route == "auto")))


@pytest.mark.parametrize("route", ROUTES)
def test_a_compiled_fill_writes_the_same_in_the_same_memory(route):
    torch._dynamo.reset()
    cache, eager = new_cache(2, 1, 16, 40, slack=0), new_cache(2, 1, 16, 40, slack=0)
    pointers = [t.data_ptr() for t in (cache.k, cache.v, cache.lengths)]

    def prefill(cache, k, v, mask, q):
        cache.fill(k, v, mask)
        cache.append(v, k)
        return cross_attention_decode(q, cache)

    compiled = torch.compile(prefill, backend="aot_eager", fullgraph=True)
    with fastfuse.backend(route), torch.no_grad():
        for _ in range(2):
            k, v, q, mask = tokens(2, 1, 9, 16), tokens(2, 1, 9, 16), tokens(2, 2, 1, 16), scattered(2, 3, 9)
            torch.testing.assert_close(compiled(cache, k, v, mask, q), prefill(eager, k, v, mask, q))
            for own, want in zip(state(cache), state(eager), strict=True):
                assert torch.equal(own, want) if isinstance(own, Tensor) else own == want
        if not CUDA:
            before = state(cache)
            with pytest.raises(RuntimeError, match="more tokens than max_len=40"):
                torch.compile(cache.append, backend="aot_eager")(*(tokens(2, 1, 39, 16) for _ in range(2)))
            assert_unchanged(cache, before)
    assert pointers == [t.data_ptr() for t in (cache.k, cache.v, cache.lengths)]


class NoWaiting(TorchDispatchMode):
    """Fails where a result's size or a value of a tensor has to reach the host, inside of fastfuse's ops too; keeps the names of ops."""

    WAITING = ("_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim", "unique_consecutive", "bincount")

    def __init__(self):
        super().__init__()
        self.ops = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        by_mask = name.startswith(("index", "_index_put", "_unsafe_index")) and any(
            isinstance(t, Tensor) and t.dtype in (torch.bool, torch.uint8) for t in torch.utils._pytree.tree_leaves(args[1])
        )
        assert name not in self.WAITING and not by_mask, f"{func} waits for the device"
        self.ops.append(name)
        if func.namespace == "fastfuse":
            with self:
                return OPS[name]._backend_fns[DEVICE](*args)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launches(monkeypatch) -> list[tuple]:
    """(name, grid) of the kernels that were launched. What the interpreter does inside of one is out of every mode's sight."""
    seen = []

    for names in (OP, ATTEND, vars(_mask_ops)):
        for name in [n for n in names if n.endswith("_kernel")]:
            monkeypatch.setitem(names, name, Launched(names[name], name, lambda *launch: seen.append(launch)))
    return seen


@pytest.mark.parametrize("route", ["torch", "triton"])
@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("as_mask", [True, False])
def test_nothing_waits_for_the_device(as_mask, compact, route, launches, monkeypatch):
    k, v, q, mask = tokens(2, 1, 9, 16), tokens(2, 1, 9, 16), tokens(2, 2, 1, 16), scattered(2, 3, 9)
    cache = new_cache(2, 1, 16, 40, slack=0)
    for names in (OP, MASK):
        monkeypatch.setitem(names, "values_are_at_hand", lambda t: False)
    with fastfuse.backend(route), NoReading(), NoWaiting() as mode:
        cache.fill(k, v, EncoderMask.from_dense(mask) if as_mask else mask, compact=compact)
        cross_attention_decode(q, cache)
        if compact:
            cache.append(k, v)
            cache.append(k, v, mask)
            cross_attention_decode(q.clone().requires_grad_(), cache)
        cache.reset()
    if route == "triton":
        assert mode.ops.count("kv_cache_write") == (3 if compact else 1) and "cross_attention" in mode.ops
    assert mode.ops.count("_assert_async") == (4 if compact else 0)  # a fill, two appends, the intervals of the gradient


def test_waiting_is_found_out(launches):
    cache = new_cache(2, 1, 16, 40)
    for call in (lambda: cache.fill(tokens(2, 1, 9, 16), tokens(2, 1, 9, 16), scattered(2, 3, 9)), lambda: cache.k[cache.k > 0]):
        with pytest.raises(AssertionError, match="waits"), NoReading(), NoWaiting():
            call()


def test_every_step_is_the_same_launches_and_a_fill_makes_no_mask_of_every_token(launches, kernels):
    cache = new_cache(2, 2, 16, 300)
    with splits(2):
        seen = []
        for lengths in ((0, 1), (70, 3), (30, 64)):
            cache.append(*(tokens(2, 2, 70, 16) for _ in range(2)), front(lengths, 70))
            launches.clear()
            cross_attention_decode(tokens(2, 4, 1, 16), cache)
            seen.append(list(launches))
    assert seen[0] == seen[1] == seen[2] and [name for name, _ in seen[0]] == ["cross_attention_fwd_kernel", "cross_attention_merge_kernel"]
    s, s_e = 32, 256  # a mask of prefill: only its last row is looked at
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            if not func.is_view:
                largest = max([largest, *(t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor))])
            return out

    k, v, mask = tokens(2, 2, s_e, 16), tokens(2, 2, s_e, 16), scattered(2, s, s_e)
    for given in (mask, EncoderMask.from_dense(mask)):
        largest = 0
        with Largest():
            cache.fill(k, v, given)
        assert 0 < largest <= 2 * s_e


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_graph_serves_every_step_and_fill(dtype):
    b, hkv, hq, d, max_len = 2, 8, 32, 128, 6404
    cache, q = new_cache(b, hkv, d, max_len, dtype), tokens(b, hq, 1, d, dtype)
    k, v = (tokens(b, hkv, max_len, d, dtype) for _ in range(2))
    cache.fill(k, v)
    cross_attention_decode(q, cache)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = cross_attention_decode(q, cache)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for lengths in ((1601, 6404), (0, 1), (129, 300)):
            mask = (torch.arange(max_len, device=DEVICE) < torch.stack([torch.full((), n, device=DEVICE) for n in lengths])[:, None])[:, None]
            cache.fill(k, v, mask)
            q.mul_(-1)
            graph.replay()
            torch.cuda.set_sync_debug_mode("default")
            check_decode(o, q, k, v, mask[:, 0])
            torch.cuda.set_sync_debug_mode("error")
    finally:
        torch.cuda.set_sync_debug_mode("default")
