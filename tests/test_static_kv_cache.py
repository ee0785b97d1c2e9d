"""StaticKVCache against lists of single tokens, and what decoding keeps from step to step, waits for and refuses; test_ops.py holds decoding to float64."""

import copy
import functools
import pickle
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F
from waiting import Counted, NoReading, NoWaiting

import fastfuse
from cases.cross_attention import MODULE, laid_out
from fastfuse.ops import EncoderMask
from fastfuse.ops.static_kv_cache import StaticKVCache, cross_attention_decode, cross_attention_decode_ref

OP = cross_attention_decode.__globals__
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
ROUTES = ("auto", "torch", "triton")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = ("plain", "tokens first", "gaps", "last dim apart", "same batch")
every_route = pytest.mark.parametrize("route", ROUTES)
route_and_dtype = pytest.mark.parametrize("route, dtype", [*zip(ROUTES, DTYPES, strict=True)])


def tokens(b, heads, n, d, dtype=torch.float32, layout="plain"):
    return laid_out(b, heads, n, d, dtype, DEVICE, layout)


def pair(*shape, **options):
    """Keys and values."""
    return tokens(*shape, **options), tokens(*shape, **options)


def new_cache(b, heads, d, max_len, dtype=torch.float32, slack=torch.nan):
    cache = StaticKVCache(b, heads, d, max_len, dtype, device=DEVICE)
    assert cache.k.shape == cache.v.shape == (b, heads, max_len, d) and cache.k.dtype == cache.v.dtype == dtype
    assert cache.lengths.dtype == torch.int32 and cache.lengths.tolist() == [0] * b and not cache.is_filled and cache.mask is None
    cache.k.fill_(slack)
    cache.v.fill_(slack)
    return cache


def front(lengths, s_e):
    """bool [b, 1, s_e]: sequence i sees lengths[i] tokens."""
    return (torch.arange(s_e) < torch.tensor(lengths)[:, None, None]).to(DEVICE)


def scattered(b, s, s_e):
    mask = torch.rand(b, s, s_e, generator=torch.Generator().manual_seed(1)) < 0.5
    mask[0, -1] = False  # a sequence that sees nothing
    return mask.to(DEVICE)


def kept(x, mask):
    """For each sequence the tokens [heads, d] that the mask's last row shows, one by one."""
    rows = [[True] * x.shape[2]] * len(x) if mask is None else mask[:, -1].expand(len(x), -1).tolist()
    return [[x[i, :, n] for n, seen in enumerate(row) if seen] for i, row in enumerate(rows)]


def check_holds(cache, k, v, slack=torch.nan):
    """Those tokens, and behind them what was there, unless that is None."""
    assert cache.is_filled and cache.mask is None
    assert cache.lengths.dtype == torch.int32 and cache.lengths.tolist() == [len(row) for row in k]
    for own, want in ((cache.k, k), (cache.v, v)):
        expected = own.clone() if slack is None else torch.full_like(own, slack)
        for i, row in enumerate(want):
            for n, token in enumerate(row):
                expected[i, :, n] = token
        torch.testing.assert_close(own, expected, rtol=0, atol=0, equal_nan=True)


def addresses(cache):
    return [t.data_ptr() for t in (cache.k, cache.v, cache.lengths)]


def state(cache):
    return (*(t.clone() for t in (cache.k, cache.v, cache.lengths)), cache.is_filled, cache.mask)


def assert_unchanged(cache, before):
    now = state(cache)
    torch.testing.assert_close(now[:3], before[:3], rtol=0, atol=0, equal_nan=True)
    assert now[3:] == before[3:]


def assert_refused(cache, write, args, message, error=None):
    """And nothing is written."""
    before = state(cache)
    with pytest.raises(error or (TypeError if " is a " in message else ValueError), match=message):
        write(*args)
    assert_unchanged(cache, before)


@every_route
@pytest.mark.parametrize("kind", [None, "bool", "one for all", "bits", "interval"])
def test_fill_packs_what_the_last_row_sees(kind, route, monkeypatch):
    monkeypatch.setitem(OP, "_ELEMENTS", 512)  # several programs of the kernel
    b, heads, s_e, d, max_len = 3, 2, 67, 5, 71
    dense = scattered(b, 2, s_e)
    if kind == "interval":
        dense = front((0, 66, 67), s_e)
        dense[1, -1, 0] = False
    dense = None if kind is None else dense[1:2] if kind == "one for all" else dense
    mask = EncoderMask.from_dense(dense, kind=kind) if kind in ("bits", "interval") else dense
    for layout, dtype in zip(LAYOUTS, DTYPES * 2, strict=False):
        k, v, cache = tokens(b, heads, s_e, d, dtype, layout), tokens(b, heads, s_e, d, dtype), new_cache(b, heads, d, max_len, dtype)
        with fastfuse.backend(route):
            assert cache.fill(k, v, mask) is None
        check_holds(cache, kept(k, dense), kept(v, dense))


@every_route
def test_empty_batches_and_no_tokens(route):
    for b, s_e, max_len in ((0, 67, 0), (3, 0, 5), (0, 1, 1)):
        cache = new_cache(b, 2, 16, max_len)
        with fastfuse.backend(route):
            cache.append(*pair(b, 2, 0, 16), torch.ones(b, 1, 0, dtype=torch.bool, device=DEVICE))
            check_holds(cache, [[]] * b, [[]] * b)
            if s_e <= max_len:
                cache.fill(*pair(b, 2, s_e, 16))
            q = tokens(b, 4, 1, 16)
            o, lse = cross_attention_decode(q, cache, return_lse=True)
        assert torch.equal(o, torch.zeros_like(q)) and lse.shape == q.shape[:3] and bool((lse == torch.inf).all())


@route_and_dtype
def test_append_reset_and_fill_again_in_the_same_memory(route, dtype):
    b, heads, d, max_len = 3, 2, 8, 40
    cache = new_cache(b, heads, d, max_len, dtype)
    pointers = addresses(cache)
    held = [[] for _ in range(b)], [[] for _ in range(b)]
    with fastfuse.backend(route):
        for turn, s_e in enumerate((13, 7, 9)):
            k, v = pair(b, heads, s_e, d, dtype, "tokens first")
            mask = None if turn == 2 else scattered(b, 2, s_e).roll(turn, 0)
            cache.append(k, v, None if mask is None else EncoderMask.from_dense(mask))
            for own, x in zip(held, (k, v), strict=True):
                for row, more in zip(own, kept(x, mask), strict=True):
                    row += more
            check_holds(cache, *held)
        assert len(set(cache.lengths.tolist())) == b
        cache.reset()
        assert cache.lengths.tolist() == [0] * b and not cache.is_filled
        for s_e, mask in ((5, None), (max_len, None), (5, scattered(1, 1, 5))):  # the last one's row sees nothing
            k, v = pair(b, heads, s_e, d, dtype)
            cache.fill(k, v, mask)
            check_holds(cache, kept(k, mask), kept(v, mask), None)
        cache.append(v, k)
        check_holds(cache, kept(v, None), kept(k, None), None)
    assert addresses(cache) == pointers


@pytest.mark.parametrize("kind, route", [("bits", "auto"), ("interval", "triton"), ("one for all", "torch"), ("bits", "triton")])
def test_tokens_stay_in_their_columns_without_compaction(kind, route):
    b, hkv, hq, s_e, d, max_len = 2, 2, 4, 67, 16, 140
    (k, v), q = pair(b, hkv, s_e, d), tokens(b, hq, 0, d)
    mask = front((0, 30), s_e) if kind == "interval" else scattered(b, 4, s_e)
    mask = mask[1:] if kind == "one for all" else mask
    cache = new_cache(b, hkv, d, max_len)
    with fastfuse.backend(route):
        cache.fill(k, v, mask if kind == "one for all" else EncoderMask.from_dense(mask, kind=kind), compact=False)
        assert cache.lengths.tolist() == [s_e] * b
        assert torch.equal(cache.mask.to_dense(), F.pad(mask[:, -1:], (0, max_len - s_e)).expand(b, -1, -1))
        assert torch.equal(cache.k[:, :, :s_e], k) and torch.equal(cache.v[:, :, :s_e], v)
        assert cross_attention_decode(q, cache).shape == (b, hq, 0, d)
        with pytest.raises(ValueError, match="compact=False and a mask"):
            cache.append(k, v)
        cache.fill(k, v, compact=False)  # without a mask that is compact
        assert cache.mask is None and cache.lengths.tolist() == [s_e] * b
        cache.append(k, v)
        assert cache.lengths.tolist() == [2 * s_e] * b
        cache.fill(k, v, mask, compact=False)
        cache.reset()
        assert cache.mask is None
        cache.append(k, v, mask)
    check_holds(cache, kept(k, mask), kept(v, mask), None)


@every_route
def test_what_the_backward_of_q_needs_is_its_own(route):
    k, v = map(Tensor.requires_grad_, pair(3, 1, 70, 16))
    q, cache = tokens(3, 4, 1, 16).requires_grad_(), new_cache(3, 1, 16, 75)
    with fastfuse.backend(route):
        cache.fill(k, v, front((0, 1, 70), 70))
        assert not cache.k.requires_grad and cache.k.grad_fn is None
        first, second = cross_attention_decode(q, cache), cross_attention_decode(q, cache)
        (want,) = torch.autograd.grad(first.square().sum(), q)
        cache.append(k[:, :, :1], v[:, :, :1])
        assert torch.equal(torch.autograd.grad(second.square().sum(), q)[0], want) and not want[0].any() and want[2].any()


@every_route
@pytest.mark.parametrize("at_hand", [True, False])
def test_more_than_max_len_is_refused_and_nothing_is_written(at_hand, route, monkeypatch):
    cache, x = new_cache(2, 1, 4, 10), tokens(2, 1, 11, 4)
    eight, full = x[:, :, :8], torch.ones(2, 1, 11, dtype=torch.bool, device=DEVICE)
    by_shape, by_value = "k has 11 tokens, max_len is 10", "sequence {} would hold 11 tokens, max_len is 10"
    if not at_hand:
        monkeypatch.setitem(OP, "values_are_at_hand", lambda t: False)
    with fastfuse.backend(route):
        cache.fill(eight, eight, full[..., :8])
        for write, args, message in (
            (cache.fill, (x, x), by_shape),
            (functools.partial(cache.fill, compact=False), (x, x, full), by_shape),
            (cache.append, (x, x), by_shape),
            (cache.fill, (x, x, full), by_value.format(0)),
            (cache.append, (x[:, :, :3], x[:, :, :3]), by_value.format(0)),
            (cache.append, (eight, eight, front((2, 3), 8)), by_value.format(1)),
        ):
            if message == by_shape or at_hand:
                assert_refused(cache, write, args, rf"^StaticKVCache.(fill|append): {message}$")
            elif not CUDA:  # there the device's assertion ends the process
                assert_refused(cache, write, args, "more tokens than max_len=10", RuntimeError)
        cache.append(eight, eight, front((2, 1), 8))  # there is room for that
        assert cache.lengths.tolist() == [10, 9]


@every_route
@pytest.mark.parametrize("at", [6, 9, 10, 13])
def test_nothing_is_written_past_max_len_where_the_assertion_is_lost(at, route):
    max_len, s_e = 10, 5
    k, v = pair(2, 1, s_e, 4)
    for places in (None, torch.arange(at, at + s_e, dtype=torch.int32, device=DEVICE).expand(2, -1)):
        guarded = torch.full((2, 3, 1, max_len, 4), 7.0, device=DEVICE)  # keys, then values: two sequences, and one that is nobody's
        args = *guarded[:, :2].unbind(), k, v, places, torch.full((2,), at + s_e, dtype=torch.int32, device=DEVICE)
        OP["_kv_cache_write_ref"](*args) if route == "torch" else OP["_kv_cache_write"](*args, route == "triton")
        want = torch.full_like(guarded, 7.0)
        for own, x in zip(want, (k, v), strict=True):
            own[:2, :, at:max_len] = x[:, :, : max(0, max_len - at)]
        assert torch.equal(guarded, want)
        cache = new_cache(2, 1, 4, max_len)
        cache.lengths.fill_(at)
        with fastfuse.backend(route), mock.patch.dict(OP, {"_check_room": lambda *_: None}):
            cache.append(k, v, None if places is None else torch.ones(2, 1, s_e, dtype=torch.bool, device=DEVICE))
        assert cache.lengths.tolist() == [max_len] * 2


def test_fill_and_append_refuse_before_they_write():
    cache, k = new_cache(2, 2, 4, 12), tokens(2, 2, 9, 4)
    cache.fill(*pair(2, 2, 3, 4))
    mask = torch.ones(2, 3, 9, dtype=torch.bool, device=DEVICE)
    for args, message in (
        ((3, k), "k is a int, not a tensor"),
        ((k, None), "v is a NoneType, not a tensor"),
        ((k[0], k), r"k has shape \(2, 9, 4\), expected \(b, n_kv_heads, s_e, head_dim\)"),
        ((k[:1], k), "k has a batch of 1, the cache 2"),
        ((k, k.repeat(1, 2, 1, 1)), "v has heads: 4, the cache 2"),
        ((k, k.repeat(1, 1, 1, 2)), "v has head_dim 8, the cache 4"),
        ((k, k[:, :, :8]), "k has 9 tokens, v 8"),
        ((k.half(), k), "k is torch.float16, the cache torch.float32"),
        ((k, k.long()), "v is torch.int64, expected floating point"),
        ((k.to("meta"), k), f"k is on meta, the cache on {DEVICE}"),
        ((k, k, [True]), "mask is a list, expected a bool tensor or an EncoderMask"),
        ((k, k, mask.int()), "mask is torch.int32, expected torch.bool"),
        ((k, k, mask[..., :8]), r"mask has shape \(2, 3, 8\), k needs \(2 or 1, 1 or more, 9\)"),
        ((k, k, EncoderMask.from_dense(mask[..., :8])), r"mask has shape \(2, 3, 8\), k needs"),
        ((k, k, mask[:1].expand(3, -1, -1)), r"mask has shape \(3, 3, 9\), k needs"),
        ((k, k, mask[:, 0]), r"mask has shape \(2, 9\), k needs"),
        ((k, k, mask[:, :0]), r"mask has shape \(2, 0, 9\), k needs"),
        ((k, k, mask.to("meta")), f"k is on {DEVICE}.*, mask on meta"),
    ):
        for name in ("fill", "append"):
            assert_refused(cache, getattr(cache, name), args, rf"^StaticKVCache.{name}: {message}")


def test_the_caches_own_memory_is_refused():
    cache = new_cache(2, 1, 4, 12)
    x = tokens(2, 1, 12, 4)
    cache.fill(x, x)  # one tensor for both is fine
    for k, v, name in ((cache.k[:, :, 2:6], x[:, :, :4], "k"), (x, cache.k, "v"), (cache.v.clone(), cache.v, "v")):
        assert_refused(cache, cache.fill, (k, v), rf"fill: {name} is memory of the cache.* pass a clone")
    cache.fill(cache.k.clone(), cache.v.clone(), front((3, 4), 12))
    assert cache.lengths.tolist() == [3, 4]


def test_decode_refuses():
    cache = new_cache(2, 2, 4, 12)
    q = tokens(2, 4, 1, 4)
    with pytest.raises(ValueError, match=r"^cross_attention_decode: the cache holds nothing"):
        cross_attention_decode(q, cache)
    cache.fill(*pair(2, 2, 3, 4))
    for args, message in (
        ((q, cache.k), "cache is a Tensor, expected a StaticKVCache"),
        ((None, cache), "q is a NoneType, not a tensor"),
        ((q[0], cache), r"q has shape \(4, 1, 4\), expected"),
        ((q[:1], cache), "q has a batch of 1, the cache of 2"),
        ((tokens(2, 3, 1, 4), cache), "q has 3 heads, the cache 2, which does not divide them"),
        ((tokens(2, 0, 1, 4), cache), "q has 0 heads"),
        ((tokens(2, 4, 1, 8), cache), "q has head_dim 8, the cache 4"),
        ((q.half(), cache), "q is torch.float16, the cache torch.float32"),
        ((q.long(), cache), "q is torch.int64, expected floating point"),
        ((q.to("meta"), cache), f"q is on meta, the cache on {DEVICE}"),
    ):
        assert_refused(cache, cross_attention_decode, args, f"^cross_attention_decode: {message}")
    with pytest.raises(ValueError, match="backend is 'cuda'"):
        cross_attention_decode(q, cache, backend="cuda")
    cache.reset()
    assert not cache.is_filled
    cache.is_filled = True  # another hand has filled it, with nothing
    assert not cross_attention_decode(q, cache).any()


def test_a_cache_that_cannot_be():
    for change, message in (
        ({"batch_size": -1}, "batch_size is -1, expected 0 or more"),
        ({"n_kv_heads": 0}, "n_kv_heads is 0, expected 1 or more"),
        ({"head_dim": 0}, "head_dim is 0, expected 1 or more"),
        ({"max_len": 1.5}, "max_len is a float, expected a whole number"),
        ({"dtype": torch.int8}, "dtype is torch.int8, expected"),
        ({"dtype": "float16"}, "dtype is 'float16', expected"),
    ):
        with pytest.raises(TypeError if " is a " in message else ValueError, match=f"^StaticKVCache: {message}"):
            StaticKVCache(**{"batch_size": 1, "n_kv_heads": 1, "head_dim": 4, "max_len": 4, "dtype": torch.float32} | change)


def test_a_head_dim_that_kernels_do_not_cover_can_be_held_and_is_said(kernels):
    cache = new_cache(1, 1, 300, 3)
    x = tokens(1, 1, 2, 300)
    cache.fill(x, x)
    check_holds(cache, kept(x, None), kept(x, None))
    with pytest.raises(fastfuse.Unsupported, match="cross_attention_decode: head_dim is 300"):
        cross_attention_decode(tokens(1, 1, 1, 300), cache)


@every_route
def test_autocast_casts_to_the_caches_dtype(route):
    (k, v), cache, wide = pair(2, 1, 20, 16), new_cache(2, 1, 16, 20, torch.bfloat16), new_cache(2, 1, 16, 20)
    with fastfuse.backend(route), torch.autocast(DEVICE, torch.bfloat16):
        cache.fill(k, v)
        wide.fill(k.half(), v)
    assert torch.equal(cache.k, k.bfloat16()) and torch.equal(wide.k, k.half().float())


@pytest.mark.parametrize("made_in", [True, False])
def test_inference_mode(made_in, kernels):
    k, q = tokens(1, 1, 3, 16), tokens(1, 1, 1, 16)
    with torch.inference_mode(made_in):
        cache = new_cache(1, 1, 16, 12)
    for mode in (True, False, False, True):
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


def test_what_changes_after_a_step_is_seen_by_the_next():
    cache, q = new_cache(2, 1, 16, 40, slack=0), tokens(2, 2, 1, 16)
    again = functools.partial(cross_attention_decode, q, cache)

    def check():
        torch.testing.assert_close(again(), cross_attention_decode_ref(q, cache))
        assert torch.equal(cross_attention_decode_ref(q, cache), cross_attention_decode(q, cache, backend="torch"))

    cache.fill(*pair(2, 1, 9, 16))
    check()
    with mock.patch.dict(OP, _check_decode=None):  # what was checked is not checked again
        again()
    cache.append(*pair(2, 1, 9, 16))
    check()
    cache.fill(*pair(2, 1, 9, 16), scattered(2, 3, 9), compact=False)
    check()
    cache.fill(*pair(2, 1, 9, 16))
    cache.lengths = torch.full_like(cache.lengths, 3)
    check()
    assert cross_attention_decode(q.clone().requires_grad_(), cache).requires_grad
    with pytest.raises(ValueError, match="a batch of 1"):
        cross_attention_decode(q[:1], cache)
    cache.is_filled = False
    with pytest.raises(ValueError, match="holds nothing"):
        again()


@pytest.mark.parametrize("route, compact, dynamic", [("auto", False, False), ("torch", True, False), ("triton", False, False), ("auto", True, True)])
def test_a_decode_step_compiles_once(route, compact, dynamic):
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


@pytest.mark.parametrize("route", ["auto", "triton"])
def test_a_compiled_fill_writes_the_same_in_the_same_memory(route):
    torch._dynamo.reset()
    cache, eager = new_cache(2, 1, 16, 40, slack=0), new_cache(2, 1, 16, 40, slack=0)
    pointers = addresses(cache)

    def prefill(cache, k, v, mask, q):
        cache.fill(k, v, mask)
        cache.append(v, k)
        return cross_attention_decode(q, cache)

    compiled = torch.compile(prefill, backend="aot_eager", fullgraph=True)
    with fastfuse.backend(route), torch.no_grad():
        for _ in range(2):
            (k, v), q, mask = pair(2, 1, 9, 16), tokens(2, 2, 1, 16), scattered(2, 3, 9)
            torch.testing.assert_close(compiled(cache, k, v, mask, q), prefill(eager, k, v, mask, q))
            assert_unchanged(cache, state(eager))
        if not CUDA:
            assert_refused(cache, torch.compile(cache.append, backend="aot_eager"), pair(2, 1, 39, 16), "more tokens than max_len=40", RuntimeError)
    assert addresses(cache) == pointers


@pytest.mark.parametrize("as_mask, compact, route", [(True, True, "triton"), (False, True, "torch"), (True, False, "torch"), (False, False, "triton")])
def test_nothing_waits_for_the_device(as_mask, compact, route, launches, values_on_a_device):
    (k, v), q, mask = pair(2, 1, 9, 16), tokens(2, 2, 1, 16), scattered(2, 3, 9)
    cache = new_cache(2, 1, 16, 40, slack=0)
    with fastfuse.backend(route), NoReading(), NoWaiting() as mode:
        cache.fill(k, v, EncoderMask.from_dense(mask) if as_mask else mask, compact=compact)
        cross_attention_decode(q, cache)
        if compact:
            cache.append(k, v)
            cache.append(k, v, mask)
            cross_attention_decode(q.clone().requires_grad_(), cache)
        cache.reset()
    if route == "triton":
        assert mode.ops["kv_cache_write"] == (3 if compact else 1) and mode.ops["cross_attention"]
    assert mode.ops["_assert_async"] == (4 if compact else 0)  # a fill, two appends, the intervals of the gradient


def test_every_step_is_the_same_launches_and_a_fill_makes_no_mask_of_every_token(launches, kernels):
    cache = new_cache(2, 2, 16, 300)
    with mock.patch.dict(MODULE, _splits=lambda *_: 2):
        seen = []
        for lengths in ((0, 1), (70, 3), (30, 64)):
            cache.append(*pair(2, 2, 70, 16), front(lengths, 70))
            launches.clear()
            cross_attention_decode(tokens(2, 4, 1, 16), cache)
            seen.append(list(launches))
    assert seen[0] == seen[1] == seen[2] and [name for name, _ in seen[0]] == ["cross_attention_fwd_kernel", "cross_attention_merge_kernel"]
    s, s_e = 32, 256  # a mask of prefill: only its last row is looked at
    (k, v), mask = pair(2, 2, s_e, 16), scattered(2, s, s_e)
    for given in (mask, EncoderMask.from_dense(mask)):
        with Counted() as mode:
            cache.fill(k, v, given)
        assert 0 < max(mode.sizes) <= 2 * s_e
