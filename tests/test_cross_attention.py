"""What is cross_attention's own: how a CPU is asked, splits and tiles, windows, NaN, what is prepared once and what is found again; test_ops.py has the rest."""

import functools
import gc
import weakref
from unittest import mock

import pytest
import torch
from numerics import assert_no_worse, in_several_orders
from suite import check
from torch.nn import functional as F
from waiting import Counted

import fastfuse
from cases.cross_attention import CASES, MODULE, ROUTES, dense, make, tiled
from fastfuse.kernels.arguments import Lengths
from fastfuse.ops import (
    EncoderMask,
    StaticKVCache,
    cross_attention,
    cross_attention_bwd_cost,
    cross_attention_cost,
    cross_attention_decode,
    cross_attention_decode_cost,
)
from fastfuse.ops._attention_ref import AttentionArgs
from fastfuse.ops._op import Cost


def of(case, device, **options):
    return make(device, **CASES[case] | options)


def tensors(call):
    return tuple(call.tensors[name] for name in ("q", "k", "v", "mask"))


@pytest.mark.parametrize("products", [False, True])
def test_bf16_on_a_cpu_with_products_of_it_or_without(products, device, monkeypatch):
    monkeypatch.setattr("fastfuse.ops._attention_ref.BF16_PRODUCTS", products)
    for case in ("random", "no mask"):
        check(of(case, device, dtype=torch.bfloat16), small_gradients=True)


@pytest.mark.parametrize(
    "case, route", [("one image, blind rows", "reference"), ("random", "kernels"), ("nothing is seen", "small tiles, 3 splits"), ("random", "torch")]
)
def test_what_is_blind_or_unseen_gets_no_gradient(case, route, device):
    call = of(case, device)
    seen = call.tensors["mask"]
    with ROUTES[route]():
        (y,) = call()
        grads = call.grads((y,), [torch.randn_like(y)])
    assert not grads["q"].transpose(1, 2)[~seen.any(-1)].any()
    assert not any(grads[name].transpose(1, 2)[~seen.any(1)].any() for name in "kv")


def asked_of_pytorch(monkeypatch):
    """[(shape of q, columns)] of the calls of its CPU kernel."""
    calls, name = [], "_scaled_dot_product_flash_attention_for_cpu"
    kernel = getattr(torch.ops.aten, name)
    monkeypatch.setattr(torch.ops.aten, name, lambda q, k, *rest, **options: calls.append((*q.shape, k.shape[2])) or kernel(q, k, *rest, **options))
    return calls


def test_a_cpu_is_asked_once_for_sequences_of_one_length(monkeypatch):
    calls, cache = asked_of_pytorch(monkeypatch), StaticKVCache(5, 2, 16, 9, torch.float32)
    seen = torch.arange(9) < torch.tensor([3, 3, 3, 9, 0])[:, None]
    cache.fill(torch.randn(5, 2, 9, 16), torch.randn(5, 2, 9, 16), seen[:, None])
    o = cross_attention_decode(torch.randn(5, 8, 1, 16), cache)
    assert calls == [(3, 2, 4, 16, 3), (1, 2, 4, 16, 9)] and o[:4].all() and not o[4].any()


@pytest.mark.parametrize("kind", ["interval", "bits"])
def test_a_cpu_is_asked_once_for_tokens_that_see_alike(kind, monkeypatch):
    calls = asked_of_pytorch(monkeypatch)
    q, k, v = (torch.randn(1, h, n, 16, requires_grad=True) for h, n in ((8, 100), (2, 30), (2, 30)))
    seen = torch.zeros(1, 100, 30, dtype=torch.bool)
    seen[:, 3:, 4:20] = True
    o, do = cross_attention(q, k, v, EncoderMask.from_dense(seen, kind=kind)), torch.randn(1, 8, 100, 16)
    assert calls == [(1, 8, 100, 16, 16)] and not o[:, :, :3].any()  # the first three go along
    grads = torch.autograd.grad(o, (q, k, v), do, retain_graph=True)
    do[:, :, :3] = 1e30  # and nothing of theirs reaches anything
    assert all(map(torch.equal, grads, torch.autograd.grad(o, (q, k, v), do))) and not grads[0][:, :, :3].any()
    o.mul_(2)  # it is nobody's view


@pytest.mark.parametrize(
    "case, BLOCK_M, BLOCK_N, TMA, splits",
    [
        ("interleaved images", 16, 64, True, 2),
        ("a batch shares one mask", 64, 128, True, None),
        ("no mask", 16, 64, True, None),
        ("a few tokens", 16, 16, False, None),
        ("a few tokens, no mask", 128, 32, False, None),
    ],
)
def test_other_forms_of_the_kernels(case, BLOCK_M, BLOCK_N, TMA, splits, device):
    if TMA and device == "cuda" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("no TMA before sm_90")
    with tiled(BLOCK_M, BLOCK_N, TMA, splits)():
        check(of(case, device), small_gradients=True)


def test_splits_are_for_small_grids(device):
    splits, processors = MODULE["_splits"], torch.cuda.get_device_properties(0).multi_processor_count if device == "cuda" else 8
    device = torch.device(device)
    assert splits(processors, 10**6, device) == 2 and splits(2 * processors + 1, 10**6, device) == 1
    assert splits(1, 6404, device) == min(2 * processors, 25) and splits(1, 100, device) == 1


def test_keys_that_are_the_values_too_leave_nothing_behind(device):
    """What a backward keeps for calls of one kind must not say that keys and values are one tensor."""
    q, k, v = (torch.randn(1, 2, 3, 8, device=device, requires_grad=True) for _ in range(3))

    def gradients(attend, *given):
        return torch.autograd.grad(attend(*given).square().sum(), [*dict.fromkeys(given)])

    for given in ((q, k, k), (q, k, v)):
        wide = {t: t.detach().double().requires_grad_() for t in given}
        exact = gradients(F.scaled_dot_product_attention, *[wide[t] for t in given])
        eager = in_several_orders(gradients, lambda q, k, v: (q @ k.mT / 8**0.5).softmax(-1) @ v, *given)
        for i, got in enumerate(gradients(cross_attention, *given)):
            assert_no_worse(got, [found[i] for found in eager], exact[i])


@pytest.mark.parametrize("route", ["reference", "kernels", "torch"])
def test_windows_of_overlapping_memory(route, device):
    """Two dims of stride 1: the result's layout cannot be q's, and a window's gradient adds up in what it looks at."""
    texts, encoded = (torch.randn(2, 2, n, device=device, requires_grad=True) for n in (12, 30))
    found = []
    for fn in (cross_attention, F.scaled_dot_product_attention):
        q, k = (t.unfold(2, 8, 1) for t in (texts, encoded))
        if fn is not cross_attention:
            q, k = q.contiguous(), k.contiguous()  # PyTorch's own kernel gives uninitialised memory for windows
        with ROUTES[route]():
            y = fn(q, k, k)
        found.append([y, *torch.autograd.grad(y.square().sum(), (texts, encoded))])
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("route", ["reference", "kernels", "small tiles, 3 splits", "torch"])
def test_nan_does_not_pass_for_nothing(route, device):
    q, k, v, _ = tensors(make(device, (1, 2, 300), (1, 2, 16)))
    with torch.no_grad():
        q[0, 0, 1] = torch.nan
    with ROUTES[route]():
        y, lse = cross_attention(q, k, v, return_lse=True)
        assert y[0, 0, 1].isnan().all() and lse[0, 0, 1].isnan() and y[0, 0, 0].isfinite().all() and y[0, 1].isfinite().all()
        assert all(g.isnan().any() for g in torch.autograd.grad(y.sum(), (q, k, v)))
        with torch.no_grad():
            q[0, 0, 1], k[0, 0, 200] = 0, torch.nan
        assert cross_attention(q, k, v).isnan().all()


def test_a_mask_outlives_the_mode_it_was_first_used_in(device):
    q, k, v, seen = tensors(of("holes", device))
    mask = EncoderMask.from_dense(seen)
    with fastfuse.backend("triton"):
        with torch.inference_mode():
            cross_attention(q, k, v, mask, empty_rows="uniform")
        y = cross_attention(q, k, v, mask, empty_rows="uniform")
        assert all(g.isfinite().all() for g in torch.autograd.grad(y.sum(), (q, k, v)))
    made = torch.func.grad(lambda q: cross_attention(q, k, v, seen, backend="torch").sum())(q)
    assert made.isfinite().all() and made.any()


def test_lengths_have_no_gradient_beyond_them(device):
    """Of the op: decoding with gradients takes a mask in place of lengths."""
    *qkv, _ = tensors(make(device, (2, 3, 140), (1, 2, 16)))
    lengths = Lengths(torch.tensor([5, 130], dtype=torch.int32, device=device))
    found = [torch.autograd.grad(MODULE["_attention"](AttentionArgs(*qkv, lengths, 0.25, interpret))[0].sum(), qkv) for interpret in (True, False)]
    torch.testing.assert_close(*found)
    assert not found[0][2][0, :, 5:].any() and not found[0][1][1, :, 130:].any()


def test_layout_of_the_result_is_that_of_q(device):
    for route in ROUTES:
        for layout in ("plain", "tokens first"):
            call = of("a few tokens", device, layout=layout)
            with ROUTES[route]():
                assert call()[0].stride() == call.tensors["q"].stride()


@pytest.mark.parametrize("route", ["reference", "kernels", "torch"])
def test_the_gradient_of_the_lse_alone(route, device):
    q, k, v, seen = tensors(of("random", device))
    with ROUTES[route]():
        _, lse = cross_attention(q, k, v, seen, return_lse=True)
        dq, dk, dv = torch.autograd.grad(torch.where(lse.isinf(), 0, lse).sum(), (q, k, v), allow_unused=True)
    assert dq.any() and dk.any() and (dv is None or not dv.any())


def test_a_call_like_one_before_is_found_again_and_nothing_else_is(device):
    q, k, v, seen = tensors(of("random", device).only())
    mask = EncoderMask.from_dense(seen)
    call = functools.partial(cross_attention, k=k, v=v, mask=mask)
    first = call(q)
    with mock.patch.dict(MODULE, _check=None):  # what was checked is not checked again
        assert torch.equal(call(q), first) and torch.equal(call(q.clone()), first)
    with torch.autocast(device, torch.bfloat16):
        assert call(q).dtype == torch.bfloat16
    with fastfuse.backend("torch"), mock.patch.dict(MODULE, formula=mock.Mock(wraps=MODULE["formula"])):
        call(q)
        assert MODULE["formula"].called
    assert call(q.clone().requires_grad_()).requires_grad and not call(q).requires_grad
    with torch.no_grad():
        assert not call(q.clone().requires_grad_()).requires_grad
    for options in ({"scale": -0.7}, {"empty_rows": "uniform"}, {"mask": mask.filled(3)}, {"mask": None}):
        for _ in range(2):
            torch.testing.assert_close(call(q, **options), call(q, **options, backend="torch"))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(fastfuse.Unsupported, match="forward-mode"):
        call(q)
    with pytest.raises(fastfuse.Unsupported, match=r"torch\.func"):
        torch.func.vmap(call)(q[None])
    with Counted() as modes_see_it:
        call(q)
    assert modes_see_it.sizes
    narrow = EncoderMask(mask.kind, mask.rows, mask.rows_empty, mask.s_e - 1)
    wrong = {"k": k[:, :, 1:]}, {"v": v.double()}, {"mask": narrow}, {"empty_rows": "no"}, {"empty_rows": []}, {"backend": "no"}, {"mask": mask.narrow(0, 1)}
    for options in wrong:
        with pytest.raises(ValueError, match="cross_attention: "):
            call(q, **options)
    with pytest.raises(TypeError, match="not a tensor"):
        call(None)


def test_what_is_found_again_holds_no_tensors(device):
    call = of("no mask", device)
    kept = [weakref.ref(t) for t in call.leaves().values()]
    for _ in range(2):
        call()[0].sum().backward()
    del call
    gc.collect()
    assert not any(t() is not None for t in kept)


def test_one_preparation_serves_every_call(device, launches):
    q, k, v, seen = tensors(of("random", device))
    with fastfuse.backend("triton"):
        mask = EncoderMask.from_dense(seen)
        for _ in range(2):
            cross_attention(q, k, v, mask).sum().backward()
    names = [name for name, _ in launches]
    of_masks = [n for n in names if not n.startswith("cross_attention")]
    assert len(of_masks) == len(set(of_masks)) + 1 == 4  # one pack, one table of states, a list each way
    assert names.count("cross_attention_fwd_kernel") == 2


@pytest.mark.parametrize("images, route", [(1, "kernels"), (2, "reference")])
def test_nothing_of_all_tokens_by_all_tokens_is_made(images, route, device, launches):
    """With a mask of tiles: no mask, no bias and no scores of [s, s_e], and keys and values not once for every query head."""
    s, tokens, heads = 96, 70, (2, 4, 16)
    visible = torch.zeros(1, s, images, 4, dtype=torch.bool, device=device)
    for i in range(images):
        visible[:, 5 + 40 * i :, i, : 3 - i] = True
    s_e = images * 4 * tokens
    q, k, v, _ = tensors(make(device, (1, s, s_e), heads))
    with ROUTES[route](), Counted() as made:
        cross_attention(q, k, v, EncoderMask.from_tiles(visible, tokens)).sum().backward()
    assert max(made.sizes) <= max(q.numel(), 2 * k.numel()) < heads[0] * heads[1] * s * s_e
    assert not [n for n in made.sizes if n and n % (s * s_e) == 0 and n != q.numel()]
    with Counted() as made:
        dense({"q": q, "k": k, "v": v, "mask": EncoderMask.from_tiles(visible, tokens).to_dense()}).sum().backward()
    assert [n for n in made.sizes if n % (s * s_e) == 0], "the count does not see the dense path"


def test_cost_counts_what_is_visible():
    q, k = torch.empty(2, 32, 100, 128, dtype=torch.bfloat16, device="meta"), torch.empty(2, 8, 6404, 128, dtype=torch.bfloat16, device="meta")
    row, side, flops = 2 * 2 * 32 * 100 * 128, 2 * 2 * 8 * 6404 * 128, 2 * 2 * 32 * 100 * 6404 * 128
    assert cross_attention_cost(q, k, k) == Cost(2 * row + 2 * side, 2 * flops)
    assert cross_attention_cost(q, k, k, visible=0.25) == Cost(2 * row + side // 2, flops // 2)
    assert cross_attention_bwd_cost(q, k, k, visible=0.5) == Cost(4 * row + 3 * side, 5 * flops // 2)


def test_decoding_over_a_quarter_of_the_tokens_reads_a_quarter_of_the_bytes():
    n, heads, d, hq = 164, 2, 16, 8
    q, cache = torch.empty(2, hq, 1, d, dtype=torch.bfloat16, device="meta"), StaticKVCache(2, heads, d, n, torch.bfloat16, device="meta")
    ends, (one, four, every) = 2 * q.numel() * 2, (cross_attention_decode_cost(q, cache, tokens=tokens) for tokens in (n // 4, n, None))
    assert four == Cost(ends + 2 * n * heads * d * 2, 4 * hq * d * n) and every == Cost(ends + 2 * cache.k.numel() * 2, 2 * four.flops)
    assert 4 * (one.bytes - ends) == four.bytes - ends and 4 * one.flops == four.flops


@pytest.mark.parametrize("route", ["kernels", "reference"])
def test_large_scores_below_0_stay_finite(route, device):
    """A row's largest score is its smallest product there."""
    call = make(device, **CASES["large scores"] | {"scale": -40.0}).only()
    with ROUTES[route]():
        (y,) = call()
    assert_no_worse(y, *call.by_formula(), *call.double().by_formula())
