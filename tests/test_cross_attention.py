"""Cross-attention against dense SDPA as torchtune calls it and float64; its masks, gradients, splits, and what it allocates and refuses."""

import contextlib
import functools
import gc
import itertools
import weakref
from collections import Counter
from unittest import mock

import pytest
import torch
from numerics import assert_no_worse, in_several_orders, opcheck
from reference import assert_gradients_no_worse
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from waiting import OPS as REGISTERED
from waiting import Launched

import fastfuse
from fastfuse import tune
from fastfuse.kernels.arguments import Lengths
from fastfuse.ops import EncoderMask, StaticKVCache, _mask_ops, cross_attention, cross_attention_bwd_cost, cross_attention_cost, cross_attention_decode
from fastfuse.ops._attention_ref import AttentionArgs, AttentionGradArgs
from fastfuse.ops._op import Cost

OP = cross_attention.__globals__  # fastfuse.ops.cross_attention names the function
OPS = ("cross_attention", "cross_attention_dq", "cross_attention_dkdv")
KERNELS = [n for n in OP if n.endswith("_kernel")]
ROUTES = ("auto", "triton")  # on a CPU: PyTorch's kernel run by run; the Triton kernels in the interpreter
NAMES = ("q", "k", "v")


def tiles(s: int, tokens: int, *images: tuple[int, int, int]) -> Tensor:
    """bool [1, s, s_e] of images (first token, end, real tiles) of two tiles of `tokens` columns."""
    mask = torch.zeros(1, s, len(images) * 2 * tokens, dtype=torch.bool)
    for i, (start, end, real) in enumerate(images):
        mask[:, start:end, i * 2 * tokens : (i * 2 + real) * tokens] = True
    return mask


def scattered(b: int, s: int, s_e: int, blind=()) -> Tensor:
    mask = torch.rand(b, s, s_e, generator=torch.Generator().manual_seed(1)) < 0.3
    mask[:, list(blind)] = False
    return mask


# mask, or (b, s, s_e) without one; (key heads, query heads of each, head_dim)
CASES = {
    "one image, blind rows": (tiles(33, 150, (7, 33, 1)), (1, 4, 32)),
    "one image of two tiles": (tiles(9, 67, (2, 9, 2)), (2, 4, 16)),
    "two images, padded tiles": (tiles(35, 67, (3, 17, 1), (17, 35, 2)), (1, 4, 32)),
    "interleaved images": (tiles(29, 67, (1, 10, 2), (10, 20, 1), (20, 29, 2)), (1, 4, 16)),
    "holes": (tiles(20, 80, (5, 20, 1), (6, 20, 1)), (1, 3, 16)),
    "random": (scattered(2, 19, 173, (0, 1, 17)), (1, 4, 32)),
    "random, one key head": (scattered(1, 17, 129), (1, 8, 20)),
    "nothing is seen": (torch.zeros(1, 11, 70, dtype=torch.bool), (1, 4, 16)),
    "everything is seen": (torch.ones(1, 11, 256, dtype=torch.bool), (1, 4, 16)),
    "the last columns": (torch.arange(130).ge(128).expand(1, 5, 130), (1, 1, 16)),
    "a batch shares one mask": (tiles(9, 67, (2, 9, 1)), (1, 2, 16, 3)),
    "no mask": ((2, 13, 173), (1, 4, 24)),
    "no mask, whole blocks": ((1, 33, 128), (2, 1, 16)),
    "no mask, groups of three": ((1, 21, 67), (1, 3, 32)),
    "one token": (scattered(2, 1, 201), (1, 4, 32)),
    "head_dim 80": (tiles(9, 67, (2, 9, 1)), (1, 4, 80)),
    "head_dim 256": (tiles(5, 40, (1, 5, 1)), (1, 2, 256)),
    "head_dim 7": (tiles(5, 40, (1, 5, 1)), (1, 2, 7)),
}


class Given:
    """q [b, hq, s, d], k, v [b, hkv, s_e, d] with tokens before heads in memory, as modules have them."""

    def __init__(self, device, mask, heads, dtype=torch.float32, layout="tokens first", **options):
        hkv, G, d, *b = heads
        if isinstance(mask, Tensor):
            b, s, s_e = b[0] if b else mask.shape[0], *mask.shape[1:]
            mask = mask.to(device)
        else:
            (b, s, s_e), mask = mask, None
        self.mask, self.options, self.heads = mask, options, (hkv, G, d)

        def leaf(heads, tokens):
            if layout == "tokens first":
                t = torch.randn(b, tokens, heads, d, device=device).to(dtype).transpose(1, 2)
            elif layout == "last dim apart":
                t = torch.randn(b, heads, d, tokens, device=device).to(dtype).mT
            elif layout == "gaps":
                t = torch.randn(b, heads + 1, tokens + 3, d + 5, device=device).to(dtype)[:, 1:, 1:-2, 3:-2]
            else:
                t = torch.randn(b, heads, tokens, d, device=device).to(dtype)
            return t.requires_grad_()

        self.q, self.k, self.v = leaf(hkv * G, s), leaf(hkv, s_e), leaf(hkv, s_e)

    def double(self) -> "Given":
        other = object.__new__(Given)
        other.__dict__ |= self.__dict__
        other.q, other.k, other.v = (t.detach().double().requires_grad_() for t in (self.q, self.k, self.v))
        return other

    def leaves(self) -> list[Tensor]:
        return [t for t in (self.q, self.k, self.v) if t.requires_grad]

    def __call__(self, mask="as given", **more) -> Tensor:
        return cross_attention(self.q, self.k, self.v, self.mask if isinstance(mask, str) else mask, **self.options | more)

    def eager(self, return_lse: bool = False):
        """Dense, as torchtune: keys and values for every head, rows without a column unmasked and cleared afterwards."""
        G = self.q.shape[1] // self.k.shape[1]
        k, v = (t.repeat_interleave(G, 1) for t in (self.k, self.v))
        scale = self.options.get("scale")
        mask = torch.ones(1, self.q.shape[2], k.shape[2], dtype=torch.bool, device=k.device) if self.mask is None else self.mask
        blind = ~mask.any(-1, keepdim=True)
        seen = mask | blind
        o = F.scaled_dot_product_attention(self.q, k, v, attn_mask=seen[:, None], scale=scale)
        if self.options.get("empty_rows") != "uniform":
            o = o.masked_fill(blind[:, None], 0)
        if not return_lse:
            return o
        scores = self.q @ k.mT * (self.q.shape[-1] ** -0.5 if scale is None else scale)
        lse = scores.masked_fill(~seen[:, None], -torch.inf).logsumexp(-1)
        return o, lse.masked_fill(blind[..., 0][:, None], torch.inf)


def grads(given: Given, y: Tensor, dy: Tensor, retain_graph: bool = False) -> dict[str, Tensor]:
    return dict(zip(NAMES, torch.autograd.grad(y, given.leaves(), dy.to(y.dtype), retain_graph=retain_graph), strict=True))


def gradients_no_worse(got: dict[str, Tensor], eager: list[dict[str, Tensor]], exact: dict[str, Tensor]) -> None:
    """By the rule, in 2-norm: of a few hundred numbers the largest error alone is a matter of luck."""
    for n in NAMES:
        if not exact[n].any():
            assert not got[n].any() and got[n].dtype == eager[0][n].dtype
    if all(exact[n].any() for n in NAMES):
        got, exact, *eager = ({n: (t,) for n, t in found.items()} for found in (got, exact, *eager))
        assert_gradients_no_worse(got, eager, exact)


def check(given: Given, mask="as given") -> None:
    """Result and gradients by the rule."""
    exact = given.double()
    y, want = given(mask), exact.eager()
    dy = torch.randn(y.shape, dtype=torch.float64, device=y.device).to(y.dtype)

    def by_eager():
        out = given.eager()
        return out.detach(), grads(given, out, dy)

    eager = in_several_orders(by_eager)
    assert_no_worse(y, [value for value, _ in eager], want)
    got = grads(given, y, dy)
    gradients_no_worse(got, [found for _, found in eager], grads(exact, want, dy))
    if given.mask is not None and given.options.get("empty_rows") != "uniform":
        blind = ~given.mask.any(-1).expand(y.shape[0], -1)
        assert not y.transpose(1, 2)[blind].any() and not got["q"].transpose(1, 2)[blind].any()
        unseen = ~given.mask.any(1).expand(y.shape[0], -1)
        assert not any(got[n].transpose(1, 2)[unseen].any() for n in "kv")


@contextlib.contextmanager
def tiled(BLOCK_M: int, BLOCK_N: int, TMA: bool = False):
    """The three kernels' tiles, pinned."""
    tile = tune.Tile({"BLOCK_M": BLOCK_M, "BLOCK_N": BLOCK_N, "TMA": TMA}, 4, 1)
    with contextlib.ExitStack() as stack:
        for op in OPS:
            stack.enter_context(tune.pin(op, tile))
        yield


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("case", CASES)
def test_cases(case, route, device):
    dtype = torch.float16 if case == "head_dim 256" else torch.float32  # what no kernel takes in fp32
    with fastfuse.backend(route):
        check(Given(device, *CASES[case], dtype=dtype))


@pytest.mark.parametrize("route", [*ROUTES, "torch"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", ["two images, padded tiles", "random", "no mask"])
def test_16_bits(case, dtype, route, device):
    with fastfuse.backend(route):
        check(Given(device, *CASES[case], dtype=dtype))


@pytest.mark.parametrize("products", [False, True])
def test_bf16_on_a_cpu_with_products_of_it_or_without(products, device, monkeypatch):
    monkeypatch.setattr("fastfuse.ops._attention_ref.BF16_PRODUCTS", products)
    for case in ("random", "no mask"):
        check(Given(device, *CASES[case], dtype=torch.bfloat16))


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


@pytest.mark.parametrize("kind", ["interval", "bits"])
@pytest.mark.parametrize("case", ["one image, blind rows", "nothing is seen", "everything is seen"])
def test_both_kinds_of_mask(case, kind, device):
    given = Given(device, *CASES[case])
    with fastfuse.backend("triton"):
        check(given, EncoderMask.from_dense(given.mask, kind=kind))


@pytest.mark.parametrize("route", [*ROUTES, "torch"])
@pytest.mark.parametrize("case", ["one image, blind rows", "random", "nothing is seen"])
def test_uniform_is_the_softmax_over_everything(case, route, device):
    given = Given(device, *CASES[case], empty_rows="uniform")
    with fastfuse.backend(route):
        check(given)
        y = given()
    blind = ~given.mask.any(-1)
    given.mask = None
    assert blind.any()
    assert_no_worse(*(t.transpose(1, 2)[blind] for t in (y, given.eager(), given.double().eager())))


@pytest.mark.parametrize("BLOCK_M, BLOCK_N, TMA", [(16, 16, False), (16, 64, True), (64, 128, True), (128, 32, False), (128, 128, False)])
@pytest.mark.parametrize("case", ["interleaved images", "a batch shares one mask", "no mask"])
def test_every_form_of_the_kernels(case, BLOCK_M, BLOCK_N, TMA, device):
    if TMA and device == "cuda" and torch.cuda.get_device_capability()[0] < 9:
        pytest.skip("no TMA before sm_90")
    with fastfuse.backend("triton"), tiled(BLOCK_M, BLOCK_N, TMA):
        check(Given(device, *CASES[case]))


@pytest.mark.parametrize("splits", [2, 3, 5])
@pytest.mark.parametrize("case", ["two images, padded tiles", "random", "no mask", "nothing is seen", "no mask, groups of three"])
def test_splits(case, splits, device, monkeypatch):
    """More splits than blocks too: an idle one counts for nothing."""
    monkeypatch.setitem(OP, "_splits", lambda *_: splits)
    with fastfuse.backend("triton"):
        check(Given(device, *CASES[case]))


def test_splits_are_for_small_grids(device):
    splits, processors = OP["_splits"], torch.cuda.get_device_properties(0).multi_processor_count if device == "cuda" else 8
    device = torch.device(device)
    assert splits(processors, 10**6, device) == 2 and splits(2 * processors + 1, 10**6, device) == 1
    assert splits(1, 6404, device) == min(2 * processors, 25) and splits(1, 100, device) == 1


def test_keys_that_are_the_values_too_leave_nothing_behind(device):
    """What a backward keeps for calls of one kind must not say that keys and values are one tensor."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 3, 8, device=device, requires_grad=True) for _ in range(3))

    def gradients(attend, *given):
        return torch.autograd.grad(attend(*given).square().sum(), [*dict.fromkeys(given)])

    for given in ((q, k, k), (q, k, v)):
        wide = {t: t.detach().double().requires_grad_() for t in given}
        exact = gradients(F.scaled_dot_product_attention, *[wide[t] for t in given])
        eager = in_several_orders(gradients, lambda q, k, v: (q @ k.mT / 8**0.5).softmax(-1) @ v, *given)
        for i, got in enumerate(gradients(cross_attention, *given)):
            assert_no_worse(got, [found[i] for found in eager], exact[i])


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("layout", ["plain", "last dim apart", "gaps"])
def test_any_strides(layout, route, device):
    with fastfuse.backend(route):
        check(Given(device, *CASES["two images, padded tiles"], layout=layout))


@pytest.mark.parametrize("route", [*ROUTES, "torch"])
@pytest.mark.parametrize("upstream", ["expanded", "transposed"])
def test_any_strides_of_what_comes_back(upstream, route, device):
    given = Given(device, *CASES["holes"])
    with fastfuse.backend(route):
        y = given()
        dy = torch.ones((), device=device).expand(y.shape) if upstream == "expanded" else torch.randn_like(y.mT).mT
        got = grads(given, y, dy)
    exact = given.double()
    gradients_no_worse(got, in_several_orders(lambda: grads(given, given.eager(), dy)), grads(exact, exact.eager(), dy))


@pytest.mark.parametrize("route", [*ROUTES, "torch"])
def test_windows_of_overlapping_memory(route, device):
    """Two dims of stride 1: the result's layout cannot be q's, and a window's gradient adds up in what it looks at."""
    texts, encoded = (torch.randn(2, 2, n, device=device, requires_grad=True) for n in (12, 30))
    found = []
    for fn in (cross_attention, F.scaled_dot_product_attention):
        q, k = (t.unfold(2, 8, 1) for t in (texts, encoded))
        if fn is not cross_attention:
            q, k = q.contiguous(), k.contiguous()  # PyTorch's own kernel gives uninitialised memory for windows
        with fastfuse.backend(route):
            y = fn(q, k, k)
        found.append([y, *torch.autograd.grad(y.square().sum(), (texts, encoded))])
    for got, want in zip(*found, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("route", [*ROUTES, "torch"])
def test_nan_does_not_pass_for_nothing(route, splits, device, monkeypatch):
    monkeypatch.setitem(OP, "_splits", lambda *_: splits)
    given = Given(device, (1, 2, 300), (1, 2, 16))
    with torch.no_grad():
        given.q[0, 0, 1] = torch.nan
    with fastfuse.backend(route):
        y, lse = given(return_lse=True)
        assert y[0, 0, 1].isnan().all() and lse[0, 0, 1].isnan() and y[0, 0, 0].isfinite().all() and y[0, 1].isfinite().all()
        assert all(g.isnan().any() for g in grads(given, y, torch.ones_like(y)).values())
        with torch.no_grad():
            given.q[0, 0, 1], given.k[0, 0, 200] = 0, torch.nan
        assert given().isnan().all()


def test_a_mask_outlives_the_mode_it_was_first_used_in(device):
    given = Given(device, *CASES["holes"], empty_rows="uniform")
    mask = EncoderMask.from_dense(given.mask)
    with fastfuse.backend("triton"):
        with torch.inference_mode():
            given(mask)
        y = given(mask)
        assert all(g.isfinite().all() for g in grads(given, y, torch.ones_like(y)).values())
    made = torch.func.grad(lambda q: cross_attention(q, given.k, given.v, given.mask, backend="torch").sum())(given.q)
    assert made.isfinite().all() and made.any()


def test_lengths_have_no_gradient_beyond_them(device):
    """Of the op: decoding with gradients takes a mask in place of lengths."""
    given, lengths = Given(device, (2, 3, 140), (1, 2, 16)), Lengths(torch.tensor([5, 130], dtype=torch.int32, device=device))
    found = []
    for interpret in (True, False):
        y, _ = OP["_attention"](AttentionArgs(given.q, given.k, given.v, lengths, 0.25, interpret))
        found.append(grads(given, y, torch.ones_like(y)))
    for n in NAMES:
        torch.testing.assert_close(found[0][n], found[1][n])
    assert not found[0]["v"][0, :, 5:].any() and not found[0]["k"][1, :, 130:].any()


def test_layout_of_the_result_is_that_of_q(device):
    for route, layout in itertools.product([*ROUTES, "torch"], ["plain", "tokens first"]):
        given = Given(device, *CASES["holes"], layout=layout)
        with fastfuse.backend(route):
            assert given().stride() == given.q.stride()


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("scale", [0.7, -0.4, 0.0])
def test_any_scale(scale, route, device):
    with fastfuse.backend(route):
        check(Given(device, *CASES["holes"], scale=scale)) if scale else None
        given = Given(device, *CASES["holes"], scale=scale)
        torch.testing.assert_close(given(), given.eager())


@pytest.mark.parametrize("route", [*ROUTES, "torch"])
def test_large_scores_stay_finite(route, device):
    """exp would overflow in fp32 from 88 on; a row's largest score is taken off first."""
    given = Given(device, *CASES["two images, padded tiles"], scale=40.0)
    with fastfuse.backend(route):
        check(given)  # which no inf or NaN passes


@pytest.mark.parametrize("route", [*ROUTES, "torch"])
@pytest.mark.parametrize("case", ["two images, padded tiles", "random", "no mask, groups of three"])
def test_lse_and_its_gradient(case, route, device):
    given = Given(device, *CASES[case])
    exact = given.double()
    with fastfuse.backend(route):
        dy = torch.randn(given.q.shape[:3], dtype=torch.float64, device=device)

        def results(g, y, lse):
            finite = torch.where(lse.isinf(), 0, lse)
            loss = y.sum() + (finite * dy.to(lse.dtype)).sum()
            return finite.detach(), dict(zip(NAMES, torch.autograd.grad(loss, g.leaves(), retain_graph=True), strict=True))

        y, lse = given(return_lse=True)
        exact_y, want = exact.eager(return_lse=True)
        assert lse.shape == given.q.shape[:3] and torch.equal(lse.isinf(), want.isinf())
        got, true = results(given, y, lse), results(exact, exact_y, want)
        eager = in_several_orders(lambda: results(given, *given.eager(return_lse=True)))
        assert_no_worse(got[0], [value for value, _ in eager], true[0])
        gradients_no_worse(got[1], [found for _, found in eager], true[1])
        alone = torch.autograd.grad((torch.where(lse.isinf(), 0, lse)).sum(), given.leaves(), allow_unused=True)
        assert alone[0].any() and alone[1].any() and (alone[2] is None or not alone[2].any())


def test_a_call_like_one_before_is_found_again_and_nothing_else_is(device):
    given = Given(device, *CASES["random"])
    q, k, v = (t.detach() for t in (given.q, given.k, given.v))
    mask = EncoderMask.from_dense(given.mask)
    call = functools.partial(cross_attention, k=k, v=v, mask=mask)
    first = call(q)
    with mock.patch.dict(OP, _check=None):  # what was checked is not checked again
        assert torch.equal(call(q), first) and torch.equal(call(q.clone()), first)
    with torch.autocast(device, torch.bfloat16):
        assert call(q).dtype == torch.bfloat16
    with fastfuse.backend("torch"), mock.patch.dict(OP, formula=mock.Mock(wraps=OP["formula"])):
        call(q)
        assert OP["formula"].called
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
    with Made() as seen:
        call(q)
    assert seen.sizes
    narrow = EncoderMask(mask.kind, mask.rows, mask.rows_empty, mask.s_e - 1)
    wrong = {"k": k[:, :, 1:]}, {"v": v.double()}, {"mask": narrow}, {"empty_rows": "no"}, {"empty_rows": []}, {"backend": "no"}, {"mask": mask.narrow(0, 1)}
    for options in wrong:
        with pytest.raises(ValueError, match="cross_attention: "):
            call(q, **options)
    with pytest.raises(TypeError, match="not a tensor"):
        call(None)


def test_what_is_found_again_holds_no_tensors(device):
    given = Given(device, *CASES["no mask"])
    kept = [weakref.ref(t) for t in given.leaves()]
    for _ in range(2):
        given().sum().backward()
    del given
    gc.collect()
    assert not any(t() is not None for t in kept)


@pytest.fixture
def launches(monkeypatch) -> list[str]:
    names = []
    for space in (OP, vars(_mask_ops)):
        for name in [n for n in space if n.endswith("_kernel")]:
            monkeypatch.setitem(space, name, Launched(space[name], name, lambda name, grid: names.append(name)))
    return names


@pytest.mark.parametrize("wanted", [n for k in (1, 2) for n in itertools.combinations(NAMES, k)], ids="".join)
def test_only_what_requires_a_gradient_is_computed(wanted, device, launches):
    given = Given(device, *CASES["holes"])
    every = {}
    with fastfuse.backend("triton"):
        y = given()
        dy = torch.randn_like(y)
        every = grads(given, y, dy)
        for n in NAMES:
            getattr(given, n).requires_grad_(n in wanted)
        y = given()
        launches.clear()
        found = dict(zip(wanted, torch.autograd.grad(y, given.leaves(), dy), strict=True))
    assert all(torch.equal(found[n], every[n]) for n in wanted)
    assert ("cross_attention_dq_kernel" in launches) == ("q" in wanted)
    assert ("cross_attention_dkdv_kernel" in launches) == bool({"k", "v"} & set(wanted))


def test_one_preparation_serves_every_call(device, launches):
    given = Given(device, *CASES["random"])
    with fastfuse.backend("triton"):
        mask = EncoderMask.from_dense(given.mask)
        for _ in range(2):
            y = given(mask)
            grads(given, y, y.detach())
    of_masks = [n for n in launches if not n.startswith("cross_attention")]
    assert len(of_masks) == len(set(of_masks)) + 1 == 4  # one pack, one table of states, a list each way
    assert launches.count("cross_attention_fwd_kernel") == 2


class Made(TorchDispatchMode):
    """Every tensor that is made, inside of fastfuse's ops too, and whatever waits for the device."""

    WAITING = ("_local_scalar_dense", "item", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2", "unique_dim", "unique_consecutive")

    def __init__(self, waiting_is_an_error: bool = False):
        super().__init__()
        self.strict, self.sizes, self.ops = waiting_is_an_error, Counter(), Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert not (self.strict and name in self.WAITING), f"{func} waits for the device"
        if func.namespace == "fastfuse":
            with self:
                return REGISTERED[name]._backend_fns["cuda" if torch.cuda.is_available() else "cpu"](*args)
        out = func(*args, **(kwargs or {}))
        self.ops[name] += 1
        if not func.is_view:
            self.sizes.update(t.numel() for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor))
        return out


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("images", [1, 2])
def test_nothing_of_all_tokens_by_all_tokens_is_made(images, route, device, launches):
    """With a mask of tiles: no mask, no bias and no scores of [s, s_e], and keys and values not once for every query head."""
    s, tokens, heads = 96, 70, (2, 4, 16)
    visible = torch.zeros(1, s, images, 4, dtype=torch.bool, device=device)
    for i in range(images):
        visible[:, 5 + 40 * i :, i, : 3 - i] = True
    given = Given(device, (1, s, images * 4 * tokens), heads)
    with fastfuse.backend(route), Made() as made:
        y = given(EncoderMask.from_tiles(visible, tokens))
        grads(given, y, y.detach())
    s_e = images * 4 * tokens
    largest = max(made.sizes)
    assert largest <= max(given.q.numel(), 2 * given.k.numel()) < heads[0] * heads[1] * s * s_e
    assert not [n for n in made.sizes if n and n % (s * s_e) == 0 and n != given.q.numel()]
    with Made() as made:
        given.mask = EncoderMask.from_tiles(visible, tokens).to_dense()
        grads(given, given.eager(), y.detach())
    assert [n for n in made.sizes if n % (s * s_e) == 0], "the count does not see the dense path"


@pytest.mark.parametrize("case", ["two images, padded tiles", "no mask"])
def test_nothing_waits_for_the_device(case, device, launches, monkeypatch):
    for space in (EncoderMask.from_dense.__func__.__globals__,):
        monkeypatch.setitem(space, "values_are_at_hand", lambda t: False)
    given = Given(device, *CASES[case])
    with fastfuse.backend("triton"), Made(waiting_is_an_error=True):
        y = given()
        grads(given, y, y.detach())


def test_two_runs_are_equal_to_the_bit(device, monkeypatch):
    for splits in (1, 3):
        monkeypatch.setitem(OP, "_splits", lambda *_, splits=splits: splits)
        given = Given(device, *CASES["random"])
        with fastfuse.backend("triton"):
            runs = [[y := given(), *grads(given, y, y.detach()).values()] for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("route", [*ROUTES, "torch"])
@pytest.mark.parametrize("shape", [(0, 5, 9), (1, 0, 9), (1, 5, 0)])
def test_nothing_to_attend(shape, route, device):
    for mask in (None, torch.ones(shape, dtype=torch.bool, device=device)):
        given = Given(device, shape, (1, 2, 16))
        with fastfuse.backend(route):
            y, lse = given(mask, return_lse=True)
            found = grads(given, y, torch.ones_like(y))
        assert y.shape == given.q.shape and not y.any() and (lse == torch.inf).all()
        assert all(g.shape == getattr(given, n).shape and not g.any() for n, g in found.items())


@pytest.mark.parametrize("route", ["auto", "torch"])
def test_float64_by_the_references(route, device):
    if device == "cuda" and route == "auto":
        pytest.skip("kernels are for up to fp32")
    given = Given(device, *CASES["random"], dtype=torch.float64)
    with fastfuse.backend(route):
        y = given()
        got = [y, *grads(given, y, torch.ones_like(y)).values()]
    want = given.eager()
    for g, w in zip(got, [want, *grads(given, want, torch.ones_like(want)).values()], strict=True):
        torch.testing.assert_close(g, w, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("route", [*ROUTES, "torch"])
def test_gradients_of_gradients(route, device):
    given = Given(device, *CASES["holes"])

    def penalty(y):
        found = torch.autograd.grad(y.square().sum(), given.leaves(), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in found), given.leaves())

    with fastfuse.backend(route):
        got = penalty(given())
    exact = given.double()
    with sdpa_kernel(SDPBackend.MATH):  # the one with a second derivative
        y = exact.eager()
    first = torch.autograd.grad(y.square().sum(), exact.leaves(), create_graph=True)
    want = torch.autograd.grad(sum(g.square().sum() for g in first), exact.leaves())
    for n, g, w in zip(NAMES, got, want, strict=True):
        assert (g - w).norm() / w.norm() < 20 * 2**-23 * 160**0.5, n  # a dozen sums of up to 160 columns, in fp32


@pytest.mark.parametrize("route", [*ROUTES, "torch"])
def test_autocast(route, device):
    given = Given(device, *CASES["holes"])
    with torch.autocast(device, torch.bfloat16), fastfuse.backend(route):
        y = given()
        found = grads(given, y, torch.ones_like(y))
    low = Given(device, *CASES["holes"])
    low.q, low.k, low.v = (t.detach().bfloat16() for t in (given.q, given.k, given.v))
    with fastfuse.backend(route):
        assert y.dtype == torch.bfloat16 and torch.equal(y, low())
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in found.values())


@pytest.mark.parametrize("route", ROUTES)
def test_checkpointing(route, device):
    given = Given(device, *CASES["random"])
    with fastfuse.backend(route):
        mask = EncoderMask.from_dense(given.mask)
        plain, again = given(mask), checkpoint(given, mask, use_reentrant=False)
        dy = torch.randn_like(plain)
        assert torch.equal(plain, again)
        for a, b in zip(grads(given, plain, dy).values(), grads(given, again, dy).values(), strict=True):
            assert torch.equal(a, b)


def test_shapes_without_memory(device):
    given = Given("cpu", *CASES["random"])
    want, lse = given(return_lse=True)
    meta = [t.detach().to("meta") for t in (given.q, given.k, given.v, given.mask)]
    for backend in ("auto", "torch"):
        got, sums = cross_attention(*meta, return_lse=True, backend=backend)
        assert (got.shape, got.dtype, got.stride(), sums.shape) == (want.shape, want.dtype, want.stride(), lse.shape)
    mode = FakeTensorMode()
    q, k, v, mask = [mode.from_tensor(t.detach()).requires_grad_(t.is_floating_point()) for t in (given.q, given.k, given.v, given.mask)]
    with mode:
        y = cross_attention(q, k, v, mask)
        assert [g.shape for g in torch.autograd.grad(y.sum(), (q, k, v))] == [t.shape for t in (given.q, given.k, given.v)]


def test_compiled(device):
    """One graph for every number of rows and tokens, the mask made in it."""
    counter = CompileCounterWithBackend("aot_eager")
    run = torch.compile(lambda q, k, v, mask: cross_attention(q, k, v, mask), fullgraph=True, backend=counter)
    for b, s in ((2, 19), (3, 23), (4, 31)):
        given = Given(device, scattered(b, s, 173, (0,)), (1, 4, 32))
        for t, dims in ((given.q, (0, 2)), (given.k, (0,)), (given.v, (0,)), (given.mask, (0, 1))):
            for dim in dims:
                torch._dynamo.mark_dynamic(t, dim)
        y, want = run(given.q, given.k, given.v, given.mask), given()
        torch.testing.assert_close(y, want)
        dy = torch.randn_like(y)
        for a, c in zip(grads(given, y, dy).values(), grads(given, want, dy).values(), strict=True):
            torch.testing.assert_close(a, c)
    assert counter.frame_count == 1


def test_compiled_by_inductor_with_a_mask_from_outside(device):
    given = Given(device, *CASES["two images, padded tiles"])
    mask = EncoderMask.from_dense(given.mask)
    with torch._inductor.config.patch(force_disable_caches=True):
        y = torch.compile(lambda: given(mask), fullgraph=True)()
    torch.testing.assert_close(y, given(mask))


@pytest.mark.parametrize("interpret", [False, True])
@pytest.mark.parametrize("case", ["holes", "two images, padded tiles", "no mask, groups of three"])
def test_ops(case, interpret, device):
    given = Given(device, *CASES[case])
    mask = None if given.mask is None else EncoderMask.from_dense(given.mask)
    with fastfuse.backend("triton" if interpret else "auto"):
        tokens = OP["listed_tokens"](given.heads[1]) if interpret or device == "cuda" else None
        seen = Lengths(None) if mask is None else mask.for_op(tokens, False)
    checks = ("test_schema", "test_faketensor", *(("test_autograd_registration", "test_aot_dispatch_dynamic") if case == "holes" and not interpret else ()))
    opcheck(OP["_attention"], AttentionArgs(given.q, given.k, given.v, seen, 0.25, interpret), checks)
    q, k, v = (t.detach() for t in (given.q, given.k, given.v))
    o, lse = OP["_attention"](AttentionArgs(q, k, v, seen, 0.25, interpret))
    for dlse in (None, torch.randn_like(lse)):
        do = torch.ones((), device=device).expand(o.shape)
        opcheck(OP["_attention_grad"], AttentionGradArgs(do, q, k, v, o, lse, dlse, seen, 0.25, (True, False, True), interpret), checks[:3])


def test_cost_counts_what_is_visible():
    q, k = torch.empty(2, 32, 100, 128, dtype=torch.bfloat16, device="meta"), torch.empty(2, 8, 6404, 128, dtype=torch.bfloat16, device="meta")
    row, side, flops = 2 * 2 * 32 * 100 * 128, 2 * 2 * 8 * 6404 * 128, 2 * 2 * 32 * 100 * 6404 * 128
    assert cross_attention_cost(q, k, k) == Cost(2 * row + 2 * side, 2 * flops)
    assert cross_attention_cost(q, k, k, visible=0.25) == Cost(2 * row + side // 2, flops // 2)
    assert cross_attention_bwd_cost(q, k, k, visible=0.5) == Cost(4 * row + 3 * side, 5 * flops // 2)


def refusals():
    q, k = torch.randn(2, 8, 5, 16), torch.randn(2, 2, 9, 16)
    mask = torch.ones(2, 5, 9, dtype=torch.bool)

    def call(q=q, k=k, v=None, *args, **options):
        return lambda: cross_attention(q, k, k if v is None else v, *args, **options)

    V, T, U = ValueError, TypeError, fastfuse.Unsupported
    return {
        "q a list": (call([1.0]), T, "q is a list, not a tensor"),
        "dims": (call(q[0]), V, r"q has shape \(8, 5, 16\), expected \(b, heads, tokens, head_dim\)"),
        "integers": (call(q, k.int()), V, "k is torch.int32, expected floating point"),
        "k and v": (call(q, k, k[:, :, :8]), V, r"k has shape \(2, 2, 9, 16\), v \(2, 2, 8, 16\)"),
        "batch": (call(q, k[:1]), V, "q has a batch of 2, k of 1"),
        "heads": (call(q[:, :7]), V, "q has 7 heads, k 2, which does not divide them"),
        "no heads": (call(q, k[:, :0]), V, "q has 8 heads, k 0, which does not divide them"),
        "head_dim": (call(q[..., :8]), V, "q has head_dim 8, k 16"),
        "no head_dim": (call(q[..., :0], k[..., :0]), V, "head_dim is 0"),
        "dtype": (call(q, k.half()), V, "q is torch.float32, k torch.float16"),
        "device": (call(q, k.to("meta")), V, "q is on cpu, k on meta"),
        "float mask": (call(q, k, k, mask.float()), V, "mask is torch.float32, expected torch.bool"),
        "int mask": (call(q, k, k, mask.int()), V, "mask is torch.int32, expected torch.bool"),
        "mask a list": (call(q, k, k, [[True]]), T, "mask is a list, expected a bool tensor or an EncoderMask"),
        "mask's tokens": (call(q, k, k, mask[:, :4]), V, r"mask has shape \(2, 4, 9\), q and k need \(2 or 1, 5, 9\)"),
        "mask's columns": (call(q, k, k, mask[..., :8]), V, r"mask has shape \(2, 5, 8\), q and k need \(2 or 1, 5, 9\)"),
        "mask's batch": (call(q, k, k, mask[:1].expand(3, -1, -1)), V, r"mask has shape \(3, 5, 9\)"),
        "mask per head": (call(q, k, k, mask[:, None]), V, r"mask has shape \(2, 1, 5, 9\)"),
        "encoder mask": (call(q, k, k, EncoderMask.from_dense(mask[:, :4])), V, r"mask has shape \(2, 4, 9\)"),
        "mask's device": (call(q, k, k, mask.to("meta")), V, "q is on cpu, mask on meta"),
        "empty rows": (call(q, k, k, mask, empty_rows="mean"), V, "empty_rows is 'mean', expected 'zero' or 'uniform'"),
        "backend": (call(q, k, k, backend="cuda"), V, "backend is 'cuda', not one of"),
        "float64": (call(q.double(), k.double(), backend="triton"), U, "q is torch.float64, covered are bf16, fp16 and fp32"),
        "wide heads": (call(q.repeat(1, 1, 1, 9), k.repeat(1, 1, 1, 9), backend="triton"), U, "head_dim is 144, covered are up to 128 in torch.float32"),
        "wider heads": (call(q.half().repeat(1, 1, 1, 17), k.half().repeat(1, 1, 1, 17), backend="triton"), U, "head_dim is 272, covered are up to 256"),
        "many heads": (call(q.repeat(1, 33, 1, 1), k[:, :1], backend="triton"), U, "264 query heads share a key head, covered are up to 32"),
    }


@pytest.mark.parametrize("case", refusals())
def test_refusals(case, launches):
    call, error, message = refusals()[case]
    with pytest.raises(error, match=message) as e:
        call()
    assert "\n" not in str(e.value) and not launches


@pytest.mark.parametrize("arch, shape, want", [
    ("sm_90", {"tma": 1}, (128, 128, True)),
    ("sm_90", {"tma": 0}, (128, 64, False)),
    ("sm_90", {"tma": 1, "M": 4}, (16, 64, False)),
    ("sm_90", {"tma": 1, "D": 256}, (64, 64, True)),
    ("sm_90", {"dtype": "fp32", "tma": 1}, (16, 32, False)),
    ("sm_80", {"tma": 0}, (128, 32, False)),
])  # fmt: skip
def test_the_row_that_shapes_pick(arch, shape, want):
    tile = tune.pick("cross_attention", arch, **{"dtype": "16-bit", "D": 128, "M": 4096, "N": 6404} | shape)
    assert (tile["BLOCK_M"], tile["BLOCK_N"], tile["TMA"]) == want
