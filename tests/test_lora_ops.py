"""Dropout, DoRA, groups, dense bases and the gated MLP: every op against float64, forward and backward, by reference and by kernel."""

import pytest
import torch
from numerics import assert_no_worse, assert_rounding_apart, in_several_orders, opcheck
from torch.nn import functional as F
from weights import STORAGES, host_dequantize, quantize, random_weight, to_nf4

import fastfuse
from fastfuse import tune
from fastfuse.ops import (
    Projection,
    _linear_launch,
    freeing_scratch,
    lora_linear,
    lora_row_norms,
    lora_row_norms_ref,
    nf4_dequantize_ref,
    nf4_linear,
    nf4_lora_linear,
    nf4_lora_linears,
    nf4_swiglu_mlp,
    nf4_swiglu_mlp_bwd_cost,
    nf4_swiglu_mlp_cost,
)
from fastfuse.ops._linear_group import linear_args
from fastfuse.ops._op import Cost
from fastfuse.ops._scratch import scratch_bytes
from fastfuse.ops.lora_row_norms import RowNormsArgs, row_norms
from fastfuse.ops.low_rank import keep_mask
from fastfuse.ops.nf4_swiglu_mlp import SwiGLUArgs, _mlp, _swiglu, _swiglu_bwd
from fastfuse.quant import NF4View
from fastfuse.quant.nf4 import Layout

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
SKINNY = tune.Tile({"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64, "SPLIT_K": 2})
WIDE = tune.Tile({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "TRANSPOSED": True})
DX = tune.Tile({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64})
ROUTES = {"reference": ("auto", None), "kernel": ("triton", WIDE), "skinny": ("triton", SKINNY), "dense": ("triton", None)}


def layer(N, K, R=8, *, storage="nested", dtype=torch.float32, lora_dtype=None, bias=False, magnitude=False, device="cpu") -> Projection:
    """A projection whose A, B, bias and magnitude are leaves; R = 0: without an adapter."""
    leaf = {"device": device, "requires_grad": True}
    a = torch.randn(R, K, dtype=lora_dtype or dtype, **leaf) if R else None
    b = torch.randn(N, R, dtype=lora_dtype or dtype, **leaf) if R else None
    weight = quantize(random_weight(N, K, dtype, device), storage)
    return Projection(
        weight, a, b, 1.5, torch.randn(N, dtype=dtype, **leaf) if bias else None, (torch.rand(N, device=device) + 0.5).requires_grad_() if magnitude else None
    )


def tensors(*projections: Projection) -> list[torch.Tensor]:
    return [t for p in projections for t in (p.lora_a, p.lora_b, p.bias, p.magnitude) if t is not None]


def widened(p: Projection) -> Projection:
    """The same numbers in float64 with leaves of their own; the weight decoded without a rounding, or in x's dtype first."""
    wide = (None if t is None else t.detach().double().requires_grad_() for t in (p.lora_a, p.lora_b))
    a, b = wide
    bias, magnitude = (None if t is None else t.detach().double().requires_grad_() for t in (p.bias, p.magnitude))
    return p._replace(lora_a=a, lora_b=b, bias=bias, magnitude=magnitude)


def formula(x, w, p: Projection, mask=None, dropout_p=0.0, norms=None):
    """One projection in eager PyTorch, as PEFT writes it: base, update and magnitude each in its own rounding."""
    y = F.linear(x, w, p.bias if p.magnitude is None else None)
    if p.lora_a is not None:
        low = torch.promote_types(x.dtype, p.lora_a.dtype)
        dropped = x if mask is None else x * mask / (1 - dropout_p)
        y = (y + F.linear(F.linear(dropped.to(low), p.lora_a.to(low)), p.lora_b.to(low)) * p.scaling).to(x.dtype)
    if p.magnitude is not None:
        y = y * (p.magnitude / norms)
        y = (y if p.bias is None else y + p.bias).to(x.dtype)
    return y


def check(call, eager, x, projections):
    """call(x) -> outputs; eager(x, weights, projections) -> the same by formula. Outputs and every gradient by the rule."""
    exact = [widened(p) for p in projections]
    x64 = x.detach().double().requires_grad_()
    decoded = [host_dequantize(p.weight, x.dtype) for p in projections]
    precise = [nf4_dequantize_ref(NF4View.of(p.weight), torch.float64) for p in projections]

    def results(outs, leaves):
        upstream = [torch.linspace(-1, 1, o.numel(), dtype=torch.float64, device=o.device).view(o.shape).to(x.dtype).to(o.dtype) for o in outs]
        return [*outs, *torch.autograd.grad(outs, leaves, upstream)]

    leaves = [x, *tensors(*projections)]
    got = results(call(x), leaves)
    plain = in_several_orders(lambda: results(eager(x, decoded, projections), leaves))
    true = results(eager(x64, precise, exact), [x64, *tensors(*exact)])
    for i, values in enumerate(zip(got, zip(*plain, strict=True), true, strict=True)):
        assert_no_worse(*values, f"result {i}")


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype, lora_dtype", [(torch.float32, None), (torch.float16, torch.float32), (torch.bfloat16, None)], ids=str)
@pytest.mark.parametrize("M, p", [(3, 0.5), (33, 0.1)])
def test_dropout(M, p, dtype, lora_dtype, route, device):
    backend, tile = ROUTES[route]
    x = torch.randn(M, 192, dtype=dtype, device=device, requires_grad=True)
    layers = [layer(65, 192, 20, dtype=dtype, lora_dtype=lora_dtype, bias=True, device=device)]
    torch.manual_seed(3)
    mask = keep_mask(torch.randint(2**62, (1,), device=device)[0], p, M, 192)
    torch.manual_seed(3)

    def eager(x, w, projections):
        return [formula(x, w[0], projections[0], mask, p)]

    with fastfuse.backend(backend), tune.pin("nf4_linear", tile), tune.pin("nf4_linear_dx", DX if tile is WIDE else None):
        check(lambda x: [nf4_lora_linear(x, *layers[0][:4], bias=layers[0].bias, dropout_p=p, training=True)], eager, x, layers)


@pytest.mark.parametrize("backend", ["torch", "auto", "triton"])
def test_dropout_follows_the_generator_and_training(backend, device):
    x = torch.randn(20, 64, device=device)
    p = layer(64, 64, device=device)
    with fastfuse.backend(backend), torch.no_grad():
        plain = nf4_lora_linear(x, *p[:4])
        assert torch.equal(nf4_lora_linear(x, *p[:4], dropout_p=0.5), plain)
        torch.manual_seed(1)
        first, second = (nf4_lora_linear(x, *p[:4], dropout_p=0.5, training=True) for _ in range(2))
        torch.manual_seed(1)
        again = nf4_lora_linear(x, *p[:4], dropout_p=0.5, training=True)
        assert torch.equal(first, again) and not torch.equal(first, second) and not torch.equal(first, plain)
        all_dropped = nf4_lora_linear(x, *p[:4], dropout_p=1.0, training=True)
        torch.testing.assert_close(all_dropped, nf4_linear(x, p.weight))


def test_dropout_is_the_same_in_every_backend(device):
    x, p = torch.randn(20, 128, device=device), layer(64, 128, device=device)
    results = []
    for backend in ("torch", "auto", "triton"):
        torch.manual_seed(5)
        y = nf4_lora_linear(x, *p[:4], dropout_p=0.3, training=True, backend=backend)
        results.append([y, *torch.autograd.grad(y.sum(), [p.lora_a, p.lora_b])])
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            assert_rounding_apart(got, want, K=128, products=2)


def test_checkpointing_draws_the_same_mask(device):
    x = torch.randn(20, 64, device=device, requires_grad=True)
    p = layer(64, 64, device=device)

    def run(x):
        return nf4_lora_linear(x, *p[:4], dropout_p=0.5, training=True).square().sum()

    torch.manual_seed(2)
    plain = torch.autograd.grad(run(x), [x, p.lora_a, p.lora_b])
    torch.manual_seed(2)
    again = torch.autograd.grad(torch.utils.checkpoint.checkpoint(run, x, use_reentrant=False), [x, p.lora_a, p.lora_b])
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_dora(bias, dtype, route, device):
    backend, tile = ROUTES[route]
    x = torch.randn(9, 128, dtype=dtype, device=device, requires_grad=True)
    layers = [layer(100, 128, dtype=dtype, bias=bias, magnitude=True, device=device)]

    def eager(x, w, projections):
        p = projections[0]
        return [formula(x, w[0], p, norms=lora_row_norms_ref(w[0], p.lora_a.detach(), p.lora_b.detach(), p.scaling))]

    with fastfuse.backend(backend), tune.pin("nf4_linear", tile), tune.pin("nf4_linear_dx", DX if tile is WIDE else None):
        check(lambda x: [nf4_lora_linear(x, *layers[0][:4], bias=layers[0].bias, magnitude=layers[0].magnitude)], eager, x, layers)


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("N, K, R", [(1, 64, 1), (65, 192, 20), (33, 320, 64)])
def test_row_norms(N, K, R, dtype, storage, backend, device):
    p = layer(N, K, R, storage=storage, dtype=dtype, device=device)
    tile = tune.Tile({"BLOCK_N": 16, "BLOCK_K": 128})
    with tune.pin("lora_row_norms", tile):
        got = lora_row_norms(*p[:4], backend=backend)
    w = host_dequantize(p.weight, dtype).double()
    exact = (w + 1.5 * p.lora_b.double() @ p.lora_a.double()).norm(dim=1)
    eager = in_several_orders(lambda: (w.float() + 1.5 * p.lora_b.float() @ p.lora_a.float()).norm(dim=1))
    if backend == "triton" and dtype == torch.bfloat16:  # the interpreter has no bf16: there W is not rounded to it
        w = nf4_dequantize_ref(NF4View.of(p.weight), torch.float32).double()
        exact = (w + 1.5 * p.lora_b.double() @ p.lora_a.double()).norm(dim=1) if device == "cpu" else exact
    assert_no_worse(got, eager, exact)
    assert not got.requires_grad


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_norms_that_were_kept(backend, device):
    x, p = torch.randn(4, 64, device=device), layer(64, 64, magnitude=True, device=device)
    with fastfuse.backend(backend):
        norms = lora_row_norms(*p[:4], x.dtype)
        kept = nf4_lora_linear(x, *p[:4], magnitude=p.magnitude, norms=norms)
        assert torch.equal(kept, nf4_lora_linear(x, *p[:4], magnitude=p.magnitude))
        assert not torch.equal(kept, nf4_lora_linear(x, *p[:4], magnitude=p.magnitude, norms=norms * 2))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("storage", STORAGES)
def test_group(storage, dtype, route, device):
    """q, k and v: other widths and ranks, an adapter, a bias and a magnitude on some alone."""
    backend, tile = ROUTES[route]
    x = torch.randn(5, 128, dtype=dtype, device=device, requires_grad=True)
    layers = [
        layer(130, 128, 20, storage=storage, dtype=dtype, device=device),
        layer(64, 128, 0, storage=storage, dtype=dtype, bias=True, device=device),
        layer(33 if storage != "torchao" else 32, 128, 8, storage=storage, dtype=dtype, device=device, magnitude=True),
    ]
    scales = {130: 260, 64: 128, 32: 64}  # what torchao's groups hold differs with the size: stored alike means one number
    if storage == "torchao":
        layers = [p._replace(weight=to_nf4(random_weight(p.weight.shape[0], 128, dtype, device), 64, 4)) for p in layers]
        assert all(n % 4 == 0 for n in scales.values())

    def eager(x, w, projections):
        p = projections[2]
        norms = lora_row_norms_ref(w[2], p.lora_a.detach(), p.lora_b.detach(), p.scaling)
        return [formula(x, w[0], projections[0]), formula(x, w[1], projections[1]), formula(x, w[2], p, norms=norms)]

    with fastfuse.backend(backend), tune.pin("nf4_linear", tile), tune.pin("nf4_linear_dx", DX if tile is WIDE else None):
        check(lambda x: nf4_lora_linears(x, layers), eager, x, layers)


@pytest.mark.parametrize("route", ROUTES)
def test_group_with_dropout_has_a_mask_each(route, device):
    backend, tile = ROUTES[route]
    x = torch.randn(12, 64, device=device, requires_grad=True)
    layers = [layer(64, 64, 4, device=device), layer(96, 64, 8, device=device)]
    torch.manual_seed(8)
    masks = [keep_mask(s, 0.4, 12, 64) for s in torch.randint(2**62, (2,), device=device)]
    torch.manual_seed(8)
    assert not torch.equal(*masks)

    def eager(x, w, projections):
        return [formula(x, *pair, mask, 0.4) for *pair, mask in zip(w, projections, masks, strict=True)]

    with fastfuse.backend(backend), tune.pin("nf4_linear", tile), tune.pin("nf4_linear_dx", DX if tile is WIDE else None):
        check(lambda x: nf4_lora_linears(x, [p[:4] for p in layers], dropout_p=0.4, training=True), eager, x, layers)


@pytest.mark.parametrize("route", ["kernel", "skinny"])
def test_a_group_is_one_launch(route, device, monkeypatch):
    name = {"kernel": "nf4_linear_fwd_kernel", "skinny": "nf4_skinny_kernel"}[route]
    launched, real = [], getattr(_linear_launch, name)

    class Counted:
        def __getitem__(self, grid):
            return lambda *args, **options: launched.append(grid) or real[grid](*args, **options)

    monkeypatch.setattr(_linear_launch, name, Counted())
    layers = [layer(64, 64, device=device) for _ in range(3)]
    with fastfuse.backend("triton"), tune.pin("nf4_linear", ROUTES[route][1]):
        nf4_lora_linears(torch.randn(3, 64, device=device), [p[:4] for p in layers])
    assert len(launched) == 1


@pytest.mark.parametrize("route", ["reference", "dense"])
@pytest.mark.parametrize("dtype, lora_dtype", [(torch.float32, None), (torch.float16, torch.float32), (torch.bfloat16, None)], ids=str)
@pytest.mark.parametrize("p", [0.0, 0.3])
def test_dense_base(p, dtype, lora_dtype, route, device):
    """lora_linear: the same over an unquantized weight, whose gradient is there where it is asked for."""
    x = torch.randn(3, 7, 64, dtype=dtype, device=device, requires_grad=True)
    m = layer(96, 64, dtype=dtype, lora_dtype=lora_dtype, bias=True, magnitude=True, device=device)
    w = host_dequantize(m.weight, dtype).requires_grad_()
    torch.manual_seed(4)
    mask = keep_mask(torch.randint(2**62, (1,), device=device)[0], p, 21, 64).view(3, 7, 64) if p else None
    torch.manual_seed(4)
    wide, w64, x64 = widened(m), w.detach().double().requires_grad_(), x.detach().double().requires_grad_()
    norms = [lora_row_norms_ref(weight.detach(), q.lora_a.detach(), q.lora_b.detach(), q.scaling) for weight, q in ((w, m), (w64, wide))]
    with fastfuse.backend(ROUTES[route][0]):
        got = lora_linear(x, w, *m[1:4], bias=m.bias, magnitude=m.magnitude, dropout_p=p, training=True)
        dy = torch.randn_like(got)
        got = [got, *torch.autograd.grad(got, [x, w, *tensors(m)], dy)]

    def results(x, w, q, n):
        y = formula(x, w, q, mask, p, n)
        return [y, *torch.autograd.grad(y, [x, w, *tensors(q)], dy.to(y.dtype))]

    eager = in_several_orders(results, x, w, m, norms[0])
    for i, values in enumerate(zip(got, zip(*eager, strict=True), results(x64, w64, wide, norms[1]), strict=True)):
        assert_no_worse(*values, f"result {i}")


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.25])
def test_swiglu_mlp(p, dtype, route, device):
    backend, tile = ROUTES[route]
    x = torch.randn(6, 64, dtype=dtype, device=device, requires_grad=True)
    layers = [
        layer(128, 64, 8, dtype=dtype, device=device, bias=True),
        layer(128, 64, 0, dtype=dtype, device=device),
        layer(64, 128, 16, dtype=dtype, device=device),
    ]
    torch.manual_seed(6)
    seeds = [*torch.randint(2**62, (2,), device=device), *torch.randint(2**62, (1,), device=device)]
    masks = [keep_mask(s, p, 6, k) if p else None for s, k in zip(seeds, (64, 64, 128), strict=True)]
    torch.manual_seed(6)

    def eager(x, w, projections):
        e, g = (formula(x, w[i], projections[i], masks[i], p) for i in range(2))
        return [formula(F.silu(e) * g, w[2], projections[2], masks[2], p)]

    with fastfuse.backend(backend), tune.pin("nf4_linear", tile), tune.pin("nf4_linear_dx", DX if tile is WIDE else None):
        check(lambda x: [nf4_swiglu_mlp(x, *layers, dropout_p=p, training=True)], eager, x, layers)


@pytest.mark.parametrize("backend", ["torch", "auto", "triton"])
@pytest.mark.parametrize("adapters", ["", "gate", "up", "down", "gate up", "up down", "gate down"])
def test_swiglu_mlp_with_adapters_on_some(adapters, backend, device):
    x = torch.randn(17, 64, device=device, requires_grad=True)  # of 3 tokens, x A^T is 24 numbers: their rounding would decide everything
    layers = [layer(n, k, 8 if name in adapters else 0, device=device) for name, n, k in (("gate", 128, 64), ("up", 128, 64), ("down", 64, 128))]

    def eager(x, w, projections):
        e, g = (formula(x, w[i], projections[i]) for i in range(2))
        return [formula(F.silu(e) * g, w[2], projections[2])]

    with fastfuse.backend(backend):
        check(lambda x: [nf4_swiglu_mlp(x, *layers)], eager, x, layers)


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_swiglu_mlp_gradients_of_gradients(backend, device):
    x = torch.randn(3, 64, device=device, requires_grad=True)
    layers = [layer(128, 64, device=device), layer(128, 64, device=device), layer(64, 128, device=device)]
    leaves = [x, *tensors(*layers)]

    def penalty(y):
        grads = torch.autograd.grad(y.square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    with fastfuse.backend(backend):
        got = penalty(nf4_swiglu_mlp(x, *layers))
    want = penalty(nf4_swiglu_mlp(x, *layers, backend="torch"))
    for g, w in zip(got, want, strict=True):
        assert ((g - w).norm() / w.norm()) < 12 * 2**-23 * 64**0.5  # a dozen products over 64 to 128 terms, in fp32


@pytest.mark.parametrize("backend", ["torch", "auto", "triton"])
def test_what_took_no_part_gets_no_gradient(backend, device):
    """As in eager PyTorch: a zero would be decayed and stepped by an optimizer."""
    x = torch.randn(3, 64, device=device, requires_grad=True)
    layers = [layer(64, 64, bias=True, magnitude=True, device=device), layer(32, 64, bias=True, magnitude=True, device=device), layer(96, 64, device=device)]
    with fastfuse.backend(backend):
        outs = nf4_lora_linears(x, layers, dropout_p=0.3, training=True)
        (outs[0].square().sum() + outs[2].sum()).backward()
    assert all(t.grad is None for t in tensors(layers[1]))
    assert all(t.grad is not None and t.grad.isfinite().all() for t in (x, *tensors(layers[0], layers[2])))


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("scaling, size", [(1 / 16, 1e-5), (1 / 4, 1e-5), (2000.0, 50.0)])
def test_fp16_adapters_keep_their_digits(scaling, size, backend, device):
    """Early in training B is tiny under a large loss scale: scaled by itself in fp16 it would be subnormal, or past the largest number."""
    x = torch.randn(32, 64, dtype=torch.float16, device=device)
    p = layer(96, 64, dtype=torch.float16, device=device)
    b = (torch.randn(96, 8, device=device) * size).half().requires_grad_()
    dy = torch.randn(32, 96, dtype=torch.float16, device=device) * (64 if size < 1 else 1e-4)
    with fastfuse.backend(backend):
        (da,) = torch.autograd.grad(nf4_lora_linear(x, p.weight, p.lora_a, b, scaling), p.lora_a, dy)
    exact = (scaling * dy.double() @ b.detach().double()).T @ x.double()

    def eager():
        dxa = ((dy * scaling) @ b.detach()) if size < 1 else (dy @ b.detach()) * scaling
        return dxa.T @ x

    assert_no_worse(da, in_several_orders(eager), exact)


@pytest.mark.parametrize("backend", ["torch", "auto", "triton"])
def test_the_widest_of_x_a_and_b(backend, device):
    x, p = torch.randn(9, 64, dtype=torch.bfloat16, device=device), layer(64, 64, dtype=torch.bfloat16, device=device)
    b = torch.randn(64, 8, device=device, requires_grad=True)
    with fastfuse.backend(backend):
        y = nf4_lora_linear(x, p.weight, p.lora_a, b, 1.0)
    dy = torch.randn_like(y)
    (db,) = torch.autograd.grad(y, b, dy)
    exact = dy.double().T @ (x.double() @ p.lora_a.double().T)
    assert_no_worse(db, in_several_orders(lambda: dy.float().T @ (x.float() @ p.lora_a.detach().float().T)), exact)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_the_default_dtype_does_not_matter(dtype, device):
    x, layers = torch.randn(3, 64, device=device), [layer(64, 64, magnitude=True, device=device), layer(32, 64, device=device)]
    want = nf4_lora_linears(x, layers)
    torch.set_default_dtype(dtype)
    try:
        got = nf4_lora_linears(x, layers)
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("backend", ["torch", "auto", "triton"])
def test_row_norms_under_autocast_and_without_an_adapter(backend, device):
    p = layer(64, 64, device=device)
    w = host_dequantize(p.weight, torch.float32)
    with torch.autocast(device, torch.bfloat16), fastfuse.backend(backend):
        for weight in (p.weight, w):
            got = lora_row_norms(weight, *p[1:4])
            exact = (w.double() + 1.5 * p.lora_b.double() @ p.lora_a.double()).norm(dim=1)
            assert_no_worse(got, in_several_orders(lambda: (w + 1.5 * p.lora_b.detach() @ p.lora_a.detach()).norm(dim=1)), exact)
            assert_no_worse(lora_row_norms(weight, None, None, 1.0), in_several_orders(w.norm, dim=1), w.double().norm(dim=1))


def test_fake_tensors(device):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x, w = torch.empty(3, 64, device=device), torch.empty(32, 64, device=device)
        a, b = torch.empty(4, 64, device=device), torch.empty(32, 4, device=device)
        assert lora_linear(x, w, a, b, 1.0, magnitude=torch.empty(32, device=device)).shape == (3, 32)


def test_swiglu_mlp_keeps_nothing_of_its_width(device):
    x = torch.randn(256, 64, device=device, requires_grad=True)
    layers = [layer(256, 64, device=device), layer(256, 64, device=device), layer(64, 256, device=device)]
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        nf4_swiglu_mlp(x, *layers)
    held = {t.untyped_storage().data_ptr() for t in (x, *tensors(*layers))}
    assert not any(t.dtype == torch.uint8 for t in saved)  # frozen weights need no hook
    fresh = [t.shape for t in saved if t.untyped_storage().data_ptr() not in held]
    assert fresh == [(256, 16), (256, 8)]  # x A^T of gate and up, h A^T of down


def test_swiglu_mlp_cost_counts_each_tensor_once():
    M, K, H, R = 10, 64, 128, 8
    x = torch.empty(M, K, device="meta")
    layers = [p._replace(weight=NF4View.of(p.weight)) for p in (layer(H, K, R), layer(H, K, R), layer(K, H, R))]
    held = sum(p.weight.nbytes for p in layers)
    adapters = 4 * sum(t.numel() for t in tensors(*layers))
    flops = 2 * M * 3 * H * K + 2 * M * R * 3 * (H + K)
    assert nf4_swiglu_mlp_cost(x, *layers) == Cost(held + adapters + 4 * 2 * M * K, flops)
    back = Cost(held + 2 * adapters + 4 * 3 * M * K, 2 * M * 3 * H * K + 4 * M * R * 3 * (H + K))  # x and dy read, dx written; A and B read, dA and dB written
    assert nf4_swiglu_mlp_bwd_cost(x, *layers) == back


@pytest.mark.parametrize("interpret", [False, True])
def test_swiglu_ops(interpret, device):
    e, g, dh = (torch.randn(5, 7, device=device) for _ in range(3))
    for t in (e, g, dh):
        t.requires_grad_()
    opcheck(_swiglu, SwiGLUArgs(e, g, None, interpret))
    opcheck(_swiglu_bwd, SwiGLUArgs(e, g, dh, interpret))


@pytest.mark.parametrize("interpret", [False, True])
def test_row_norms_op(interpret, device):
    p = layer(64, 64, device=device)
    view = NF4View.of(p.weight)
    opcheck(row_norms, RowNormsArgs(view.tensors(), Layout.of(view), view.shape, torch.float32, p.lora_a.detach(), p.lora_b.detach(), 1.5, interpret))


@pytest.mark.parametrize("interpret", [False, True])
def test_swiglu_mlp_op(interpret, device):
    x = torch.randn(4, 64, device=device, requires_grad=True)
    layers = [p._replace(weight=NF4View.of(p.weight)) for p in (layer(128, 64, device=device), layer(128, 64, device=device), layer(64, 128, device=device))]
    opcheck(_mlp, linear_args("op", x, layers, None, 0.0, interpret))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compile_fullgraph(backend, device):
    x = torch.randn(6, 64, device=device, requires_grad=True)
    q, k = layer(64, 64, magnitude=True, device=device), layer(32, 64, device=device)
    gate, up, down = layer(128, 64, device=device), layer(128, 64, device=device), layer(64, 128, device=device)

    def fn(x):
        a, b = nf4_lora_linears(x, [q, k])
        return a.square().sum() + b.sum() + nf4_swiglu_mlp(x, gate, up, down).square().sum()

    leaves = [x, *tensors(q, k, gate, up, down)]
    want = torch.autograd.grad(fn(x), leaves)
    got = torch.autograd.grad(torch.compile(fn, fullgraph=True, backend=backend)(x), leaves)
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)


def test_compile_dropout(device):
    x = torch.randn(40, 64, device=device, requires_grad=True)
    p = layer(64, 64, device=device)
    run = torch.compile(lambda x: nf4_lora_linear(x, *p[:4], dropout_p=0.5, training=True), fullgraph=True, backend="aot_eager")
    base = nf4_linear(x, p.weight)
    first, second = run(x) - base, run(x) - base
    assert not torch.equal(first, second)  # a seed drawn anew at every call, not baked into the graph
    assert torch.autograd.grad(first.sum(), p.lora_a)[0].isfinite().all()


def test_export(device):
    class Layer(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.p = layer(64, 64, device=device)
            self.a, self.b = torch.nn.Parameter(self.p.lora_a.detach()), torch.nn.Parameter(self.p.lora_b.detach())
            self.view = NF4View.of(self.p.weight)
            self.register_buffer("packed", self.view.packed)

        def forward(self, x):
            return nf4_lora_linear(x, self.view, self.a, self.b, 2.0)

    module, x = Layer(), torch.randn(5, 64, device=device)
    exported = torch.export.export(module, (x,), dynamic_shapes=({0: torch.export.Dim("M", min=2)},))
    for M in (5, 9):
        x = torch.randn(M, 64, device=device)
        torch.testing.assert_close(exported.module()(x), module(x))


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_autocast(backend, device):
    x = torch.randn(6, 64, device=device, requires_grad=True)
    q, k = layer(64, 64, device=device), layer(32, 64, magnitude=True, bias=True, device=device)
    with fastfuse.backend(backend), torch.autocast(device, torch.bfloat16):
        outs = nf4_lora_linears(x, [q, k])
        y = nf4_swiglu_mlp(x, layer(128, 64, device=device), layer(128, 64, device=device), layer(64, 128, device=device))
        dense = lora_linear(x, torch.randn(64, 64, device=device), q.lora_a, q.lora_b, 1.0)
    assert all(t.dtype == torch.bfloat16 for t in (*outs, y, dense))
    grads = torch.autograd.grad([*outs, y], [x, *tensors(q, k)], [torch.ones_like(t) for t in (*outs, y)])
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in grads)


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_gradients_of_gradients(backend, device):
    """A penalty on gradients, through dropout, a magnitude and a group."""
    x = torch.randn(7, 64, device=device, requires_grad=True)
    q, k = layer(64, 64, magnitude=True, device=device), layer(32, 64, bias=True, device=device)
    leaves = [x, *tensors(q, k)]
    weights = [nf4_dequantize_ref(NF4View.of(p.weight), torch.float32) for p in (q, k)]
    norms = lora_row_norms_ref(weights[0], q.lora_a.detach(), q.lora_b.detach(), 1.5)
    torch.manual_seed(9)
    masks = [keep_mask(s, 0.3, 7, 64) for s in torch.randint(2**62, (2,), device=device)]

    def penalty(outs):
        grads = torch.autograd.grad(sum(o.square().sum() for o in outs), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    torch.manual_seed(9)
    with fastfuse.backend(backend):
        got = penalty(nf4_lora_linears(x, [q._replace(norms=norms), k], dropout_p=0.3, training=True))
    want = penalty([formula(x, weights[0], q, masks[0], 0.3, norms), formula(x, weights[1], k, masks[1], 0.3)])
    for g, w in zip(got, want, strict=True):
        assert ((g - w).norm() / w.norm()) < 12 * 2**-23 * 64**0.5  # a dozen products over 64 to 128 terms, in fp32


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_zero_rows(backend, device):
    layers = [layer(64, 64, magnitude=True, bias=True, device=device), layer(32, 64, device=device)]
    x = torch.empty(2, 0, 64, device=device, requires_grad=True)
    with fastfuse.backend(backend):
        outs = nf4_lora_linears(x, layers, dropout_p=0.5, training=True)
        mlp = nf4_swiglu_mlp(x, layer(96, 64, device=device), layer(96, 64, device=device), layer(64, 96, device=device))
        grads = torch.autograd.grad([*outs, mlp], [x, *tensors(*layers)], [torch.ones_like(t) for t in (*outs, mlp)])
    assert [t.shape for t in (*outs, mlp)] == [(2, 0, 64), (2, 0, 32), (2, 0, 64)]
    assert grads[0].shape == x.shape and all(g.abs().sum() == 0 for g in grads[1:])


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_deterministic(backend, device):
    x = torch.randn(70, 128, device=device, requires_grad=True)
    p = layer(100, 128, 20, device=device)
    with fastfuse.backend(backend):
        runs = []
        for _ in range(2):
            torch.manual_seed(0)
            y = nf4_lora_linear(x, *p[:4], dropout_p=0.1, training=True)
            runs.append([y, *torch.autograd.grad(y.square().sum(), [x, *tensors(p)])])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_scratch_is_shared_and_freed(device):
    with freeing_scratch():
        pass  # what other tests have left
    with freeing_scratch(), fastfuse.backend("triton"), tune.pin("nf4_linear", None):
        for N in (64, 256, 128):
            p = layer(N, 64, device=device)
            nf4_linear(torch.randn(3, 64, device=device), p.weight)
        assert scratch_bytes(device) == 256 * 64 * 4
    assert scratch_bytes(device) == 0


def refusals():
    x = torch.randn(2, 64)
    q, k, wide, ao = layer(64, 64), layer(32, 64), layer(64, 128), layer(256, 64, storage="torchao")
    w = torch.randn(64, 64)
    return {
        "empty": (lambda: nf4_lora_linears(x, []), ValueError, "projections is empty"),
        "K": (lambda: nf4_lora_linears(x, [q, wide]), ValueError, "the weights take 64 and 128 features: a group shares one x"),
        "storage": (lambda: nf4_lora_linears(x, [q, ao]), ValueError, r"one weight is bitsandbytes nested.* another torchao.*: a group is stored alike"),
        "half an adapter": (lambda: nf4_lora_linears(x, [k, (q.weight, q.lora_a)]), ValueError, "lora_b is None while the other is given"),
        "member's B": (lambda: nf4_lora_linears(x, [q, (k.weight, k.lora_a, q.lora_b, 1.0)]), ValueError, r"lora_b has shape \(64, 8\), expected \(32, 8\)"),
        "dropout": (lambda: nf4_lora_linear(x, *q[:4], dropout_p=1.5, training=True), ValueError, "dropout_p is 1.5, expected a number from 0 to 1"),
        "magnitude": (lambda: nf4_lora_linear(x, *q[:4], magnitude=torch.ones(3)), ValueError, r"magnitude has shape \(3,\), expected \(64,\)"),
        "norms": (lambda: nf4_lora_linear(x, *q[:4], norms=torch.ones(64)), ValueError, "norms is given, magnitude is None"),
        "not a list": (lambda: nf4_lora_linears(x, q), TypeError, "projections is a Projection, not a list"),
        "not a projection": (lambda: nf4_lora_linears(x, [w]), TypeError, r"a projection is a Tensor, not a tuple of weight, lora_a"),
        "scale blocks": (
            lambda: nf4_lora_linears(x, [ao, ao._replace(weight=to_nf4(torch.randn(256, 64), 64, 32))]),
            ValueError,
            r"scales by 256\), .* \(scales by 32\)",
        ),
        "func": (
            lambda: torch.func.grad(lambda x: nf4_linear(x, q.weight).sum())(x),
            fastfuse.Unsupported,
            r"torch.func transforms \(grad, vmap, ...\) are not covered",
        ),
        "norms B": (lambda: lora_row_norms(q.weight, q.lora_a, k.lora_b, 1.0), ValueError, r"lora_row_norms: lora_b has shape \(32, 8\), expected \(64, 8\)"),
        "norms A": (lambda: lora_row_norms(q.weight, wide.lora_a, q.lora_b, 1.0), ValueError, r"lora_a has shape \(8, 128\), expected \(R, 64\)"),
        "norms dtype": (lambda: lora_row_norms(*q[:4], torch.int32), fastfuse.Unsupported, "dtype is torch.int32, covered are"),
        "norms device": (lambda: lora_row_norms(q.weight, q.lora_a.to("meta"), q.lora_b, 1.0), ValueError, "weight is on cpu, lora_a on meta"),
        "sparse bias": (lambda: nf4_linear(x, q.weight, torch.ones(64).to_sparse()), fastfuse.Unsupported, "bias has layout torch.sparse_coo"),
        "dense NF4": (lambda: lora_linear(x, q.weight, *q[1:4]), TypeError, "weight is a Params4bit"),
        "dense dtype": (lambda: lora_linear(x, w.half(), *q[1:4]), ValueError, "x is torch.float32, weight torch.float16"),
        "mlp shapes": (lambda: nf4_swiglu_mlp(x, q, k, q), ValueError, r"gate, up and down are \(64, 64\), \(32, 64\), \(64, 64\)"),
        "mlp magnitude": (lambda: nf4_swiglu_mlp(x, layer(64, 64, magnitude=True), q, q), fastfuse.Unsupported, "DoRA is covered by nf4_lora_linears"),
    }


@pytest.mark.parametrize("case", refusals())
def test_refusals(case):
    call, error, message = refusals()[case]
    with pytest.raises(error, match=message) as e:
        call()
    assert "\n" not in str(e.value)


def peak_bytes(run) -> int:
    """The most that tensors made inside run() held at once, in and outside of ops, from the allocator's own record."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    held = peak = 0
    for event in record.profiler.kineto_results.events():
        if event.name() == "[memory]" and event.device_type() == torch.profiler.DeviceType.CPU:
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def test_accounting_sees_what_an_op_allocates_inside():
    view = NF4View.of(quantize(random_weight(1024, 1024), "nested"))
    assert peak_bytes(lambda: nf4_dequantize_ref(view, torch.float32)) >= 1024 * 1024 * 4


@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
@pytest.mark.parametrize("magnitude", [False, True])
def test_memory_of_a_qlora_step(magnitude, dropout_p):
    """Kept for the backward: x A^T (DoRA: and y before its scale) beside what the caller holds. On the way: nothing of W's size.

    The weight is decoded some rows at a time on a CPU, 2^20 elements in fp32 with an index of half as many int32.
    """
    M, N, K, R = 8, 4096, 4096, 16
    p = layer(N, K, R, magnitude=magnitude)
    view = NF4View.of(p.weight)
    p = p._replace(weight=view)
    x = torch.randn(M, K, requires_grad=True)
    norms = lora_row_norms(*p[:4]) if magnitude else None
    held = {t.untyped_storage().data_ptr() for t in (x, *tensors(p), view.packed, view.code, *view.scales, *([norms] if magnitude else []))}
    saved = {}

    def keep(t):
        if t.untyped_storage().data_ptr() not in held:
            saved[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        y = nf4_lora_linear(x, *p[:4], magnitude=p.magnitude, norms=norms, dropout_p=dropout_p, training=True)
    small = 4 * N if magnitude else 0  # magnitude / norms
    assert sum(saved.values()) <= 4 * (M * R + (M * N if magnitude else 0)) + 2 * small + 8

    def step():
        y = nf4_lora_linear(x, *p[:4], magnitude=p.magnitude, norms=norms, dropout_p=dropout_p, training=True)
        torch.autograd.grad(y, [x, *tensors(p)], torch.ones_like(y))

    del y
    step()
    chunk = (1 << 20) * (4 + 2)
    scales = 3 * 4 * N * K // 64  # nested scales in fp32, and two steps of making them
    activations = 16 * 4 * M * max(N, K) + 4 * 4 * R * (N + K) + (100 * M * K if dropout_p else 0)  # Philox in int64
    bound = chunk + scales + activations
    assert bound < 2 * N * K  # less than half the weight in bf16 would already give a dequantized one away
    assert peak_bytes(step) <= bound
