"""nf4_linear and nf4_lora_linear: the kernels and the reference against float64, forward and backward."""

import pytest
import torch
from numerics import assert_no_worse, assert_rounding_apart, in_several_orders, opcheck
from torch import nn
from torch.nn import functional as F
from weights import STORAGES, host_dequantize, quantize, random_weight, to_nf4

import fastfuse
from fastfuse import tune
from fastfuse.ops import (
    Projection,
    nf4_dequantize,
    nf4_dequantize_ref,
    nf4_linear,
    nf4_linear_bwd_cost,
    nf4_linear_cost,
    nf4_linear_dx,
    nf4_linear_ref,
    nf4_lora_linear,
)
from fastfuse.ops._linear_group import linear_args
from fastfuse.ops.nf4_linear import linear
from fastfuse.ops.nf4_linear_dx import LinearDxArgs, linear_dx
from fastfuse.quant import NF4View

ROW_MAJOR = tune.Tile({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "TRANSPOSED": False})
TRANSPOSED = tune.Tile({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64, "TRANSPOSED": True})
SKINNY = tune.Tile({"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 64, "SPLIT_K": 3})
TWO_SCALES_A_STEP = tune.Tile({"BLOCK_M": 16, "BLOCK_N": 128, "BLOCK_K": 128, "TRANSPOSED": False})
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def inputs(M, N, K, R=8, *, storage="nested", dtype=torch.float32, lora_dtype=None, bias=True, device="cpu", block_size=64):
    weight = quantize(random_weight(N, K, dtype, device), storage, block_size)
    leaf = {"device": device, "requires_grad": True}
    x = torch.randn(M, K, dtype=dtype, **leaf)
    a = torch.randn(R, K, dtype=lora_dtype or dtype, **leaf)
    b = torch.randn(N, R, dtype=lora_dtype or dtype, **leaf)
    return x, weight, a, b, (torch.randn(N, dtype=dtype, **leaf) if bias else None)


def run(fn, x, a, b, bias, dy):
    leaves = [t for t in (x, a, b, bias) if t is not None]
    y = fn(x, a, b, bias)
    return [y, *torch.autograd.grad(y, leaves, dy)]


def check_against_float64(x, weight, a, b, bias, scaling=1.5):
    """y and every gradient of the op, of the formula in eager PyTorch, and of the same in float64."""
    view = NF4View.of(weight)
    # Where x A^T is a handful of numbers, one draw of their rounding decides everything: several draws are compared together.
    xs = [x, *(torch.randn_like(x).requires_grad_() for _ in range(7 if x.shape[0] * a.shape[0] < 16 else 0))]
    dys = [torch.randn(*x.shape[:-1], view.shape[0], dtype=x.dtype, device=x.device) for _ in xs]
    wide = [None if t is None else t.detach().double().requires_grad_() for t in (a, b, bias)]
    w = host_dequantize(weight, x.dtype)
    low = torch.promote_types(x.dtype, a.dtype)

    def eager(x, a, b, bias):
        return (F.linear(x, w, bias) + F.linear(F.linear(x.to(low), a.to(low)), b.to(low)) * scaling).to(x.dtype)

    def exact(x, a, b, bias):
        y = F.linear(x, nf4_dequantize_ref(view, torch.float64), bias)
        return y + F.linear(F.linear(x, a), b) * scaling

    def fused(x, a, b, bias):
        return nf4_lora_linear(x, weight, a, b, scaling, bias=bias)

    def stacked(fn):
        draws = [run(fn, x, a, b, bias, dy) for x, dy in zip(xs, dys, strict=True)]
        return [torch.stack(values) for values in zip(*draws, strict=True)]

    truth = [run(exact, x.detach().double().requires_grad_(), *wide, dy.double()) for x, dy in zip(xs, dys, strict=True)]
    truth = [torch.stack(values) for values in zip(*truth, strict=True)]
    plain = zip(*in_several_orders(stacked, eager), strict=True)
    for what, *values in zip(["y", "dx", "da", "db", "dbias"], stacked(fused), plain, truth, strict=False):
        assert_no_worse(*values, what)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("tile", [ROW_MAJOR, TRANSPOSED], ids=["row-major", "transposed"])
def test_kernel(tile, storage, dtype, kernels, device):
    with tune.pin("nf4_linear", tile):
        check_against_float64(*inputs(17, 128, 128, storage=storage, dtype=dtype, device=device))


@pytest.mark.parametrize("M, N, K, R", [(1, 64, 64, 1), (3, 65, 192, 16), (64, 127, 64, 20), (100, 33, 128, 64), (16, 256, 576, 8)])
def test_kernel_odd_shapes(M, N, K, R, kernels, device):
    for tile in (ROW_MAJOR, TRANSPOSED):
        with tune.pin("nf4_linear", tile):
            check_against_float64(*inputs(M, N, K, R, device=device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("M, N, K, R", [(1, 65, 192, 20), (16, 100, 320, 8), (3, 64, 64, 64)])
def test_skinny_kernel(M, N, K, R, storage, dtype, kernels, device):
    """Splits of unequal length (5 steps by 3), more splits than steps (K = 64), tiles of A beside those of W (R = 64 of BLOCK_N = 64)."""
    with tune.pin("nf4_linear", SKINNY):
        check_against_float64(*inputs(M, N, K, R, storage=storage, dtype=dtype, device=device))


@pytest.mark.parametrize("splits", [1, 2, 4])
def test_skinny_kernel_without_adapter_and_with_wide_ones(splits, kernels, device):
    tile = tune.Tile({"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 128, "SPLIT_K": splits})
    with tune.pin("nf4_linear", tile):
        check_against_float64(*inputs(5, 100, 512, 40, dtype=torch.float16, lora_dtype=torch.float32, device=device))
        x, weight, _, _, bias = inputs(5, 100, 512, device=device)
        w = host_dequantize(weight, torch.float32)
        eager = in_several_orders(F.linear, x, w, bias)
        assert_no_worse(nf4_linear(x, weight, bias), eager, F.linear(x.double(), w.double(), bias.double()))


DX_TILES = {
    "row-major": tune.Tile({"BLOCK_M": 16, "BLOCK_N": 64, "BLOCK_K": 128}),
    "square": tune.Tile({"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 64}),
    "dense": None,
}


@pytest.mark.parametrize("tile", DX_TILES)
@pytest.mark.parametrize(
    "M, N, K, R, storage, dtype",
    [
        (1, 64, 64, 1, "flat", torch.float32),
        (17, 100, 192, 16, "nested", torch.float32),
        (33, 65, 320, 20, "torchao", torch.bfloat16),
        (20, 130, 128, 64, "torchao", torch.float16),
    ],
)
def test_dx_kernel(M, N, K, R, storage, dtype, tile, kernels, device):
    """N cut by BLOCK_N, K by BLOCK_K, several scales a tile."""
    with tune.pin("nf4_linear", None), tune.pin("nf4_linear_dx", DX_TILES[tile]):
        check_against_float64(*inputs(M, N, K, R, storage=storage, dtype=dtype, device=device))


@pytest.mark.parametrize("block_size, K", [(32, 192), (128, 192), (256, 384), (128, 384)])
def test_dx_kernel_scale_blocks(block_size, K, kernels, device):
    """Blocks that cross rows under a cut tile take the dense route; a whole tile and blocks within rows do not."""
    for tile in DX_TILES.values():
        with tune.pin("nf4_linear_dx", tile):
            check_against_float64(*inputs(5, 66, K, block_size=block_size, device=device))


@pytest.mark.parametrize("block_size", [32, 64, 256])
def test_kernel_scale_blocks(block_size, kernels, device):
    """Several scales a step, one, and blocks that cross rows (256 does not divide K)."""
    for tile in (TWO_SCALES_A_STEP, TRANSPOSED):
        with tune.pin("nf4_linear", tile):
            check_against_float64(*inputs(5, 64, 384, storage="nested", block_size=block_size, device=device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("tile", [TWO_SCALES_A_STEP, TRANSPOSED, None], ids=["row-major", "transposed", "dense"])
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_factors_shared_by_200_blocks(backend, tile, dtype, device):
    """torchao's scaler_block_size 200, as QLoRA of the vision encoder has it: two groups here, the border inside a row."""
    x, _, a, b, bias = inputs(17, 100, 256, dtype=dtype, device=device)
    weight = to_nf4(random_weight(100, 256, dtype, device), 64, 200)
    with fastfuse.backend(backend), tune.pin("nf4_linear", tile):
        check_against_float64(x, weight, a, b, bias)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype, lora_dtype", [(torch.bfloat16, torch.float32), (torch.float16, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_adapters_in_another_dtype(backend, dtype, lora_dtype, storage, device):
    """PEFT keeps adapters in fp32 over a 16-bit base: their gradients must stay fp32-accurate."""
    with fastfuse.backend(backend):
        check_against_float64(*inputs(20, 128, 128, storage=storage, dtype=dtype, lora_dtype=lora_dtype, bias=False, device=device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("M, N, K", [(1, 64, 64), (40, 96, 100), (33, 48, 256)])
def test_dense_route(M, N, K, dtype, kernels, device):
    """What large M takes: decode once, then the library's GEMM. Also any K, as K = 100 here."""
    with tune.pin("nf4_linear", None):
        check_against_float64(*inputs(M, N, K, dtype=dtype, storage="flat", device=device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("storage", STORAGES)
def test_reference(storage, dtype, device):
    check_against_float64(*inputs(50, 128, 256, storage=storage, dtype=dtype, device=device))


@pytest.mark.parametrize("backend", ["torch", "auto", "triton"])
@pytest.mark.parametrize("bias", [True, False])
def test_plain_linear(backend, bias, device):
    x, weight, _, _, b = inputs(9, 64, 128, bias=bias, device=device)
    w = host_dequantize(weight, torch.float32)
    with fastfuse.backend(backend):
        y = nf4_linear(x, weight, b)
        dx = torch.autograd.grad(y.sum(), x)[0]  # an expanded gradient
    exact = F.linear(x.double(), w.double(), None if b is None else b.double())
    assert_no_worse(y, F.linear(x, w, b), exact, "y")
    assert_no_worse(dx, torch.ones(9, 64, device=device) @ w, torch.ones(9, 64, dtype=torch.float64, device=device) @ w.double(), "dx")


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_layouts_of_x(backend, device):
    base, weight, a, b, bias = inputs(24, 64, 64, device=device)
    wide = torch.randn(24, 128, device=device)
    wide[:, ::2] = base.detach()
    cases = {
        "strided last dim": wide[:, ::2],
        "row stride": torch.cat([base, base], 1).detach()[:, :64],
        "leading dims": base.detach().view(2, 3, 4, 64),
        "transposed leading dims": base.detach().view(4, 6, 64).transpose(0, 1),
        "column major": base.detach().T.contiguous().T,
        "expanded": base.detach()[:1].expand(24, 64),
        "one row": base.detach()[0],
    }
    with fastfuse.backend(backend):
        for name, x in cases.items():
            y = nf4_lora_linear(x, weight, a, b, 0.5, bias=bias)
            want = nf4_linear_ref(x.contiguous(), NF4View.of(weight), a, b, 0.5, bias)
            assert y.shape == want.shape, name
            assert_rounding_apart(y, want, K=64, products=2)


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("shape", [(0, 64), (2, 0, 64)])
def test_zero_rows(shape, backend, device):
    _, weight, a, b, bias = inputs(1, 96, 64, device=device)
    x = torch.empty(shape, device=device, requires_grad=True)
    with fastfuse.backend(backend):
        y = nf4_lora_linear(x, weight, a, b, 2.0, bias=bias)
        grads = torch.autograd.grad(y.sum(), [x, a, b, bias])
    assert y.shape == (*shape[:-1], 96)
    assert grads[0].shape == shape and all(g.abs().sum() == 0 for g in grads[1:])


def test_only_the_gradients_asked_for(kernels, device, monkeypatch):
    """A frozen input needs no dX, so the weight is not decoded in the backward at all."""
    x, weight, a, b, _ = inputs(4, 64, 64, bias=False, device=device)
    y = nf4_lora_linear(x.detach(), weight, a, b, 1.0)
    monkeypatch.setattr(nf4_linear_dx, "linear_dx", None)
    y.sum().backward()
    assert a.grad is not None and b.grad is not None


@pytest.mark.parametrize("lora_dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("tile", [None, TRANSPOSED], ids=["dense", "fused"])
@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_large_fp16_values_stay_finite(backend, tile, lora_dtype, device):
    """Loss-scaled gradients and large activations: x A^T may be near the largest fp16, or past it in fp32 adapters."""
    x, weight, a, b, _ = inputs(8, 64, 64, dtype=torch.float16, lora_dtype=lora_dtype, bias=False, device=device)
    x = (x.detach() * 400).requires_grad_()
    b = (b.detach() * 1e-3).requires_grad_()
    if lora_dtype == torch.float32:
        a, b = (a.detach() * 100).requires_grad_(), (b.detach() / 100).requires_grad_()
    dy = torch.full((8, 64), 400.0, dtype=torch.float16, device=device)
    with fastfuse.backend(backend), tune.pin("nf4_linear", tile):
        y = nf4_lora_linear(x, weight, a, b, 16.0)
        values = [y, *torch.autograd.grad(y, [x, a, b], dy)]
    assert all(v.isfinite().all() for v in values[:2]), "y, dx"
    if lora_dtype == torch.float32:
        assert all(v.isfinite().all() for v in values[2:]), "da, db"


def test_the_backward_runs_what_the_forward_ran(device, monkeypatch):
    """The gradient is usually taken after the block that chose the backend."""
    x, weight, a, b, bias = inputs(4, 64, 64, device=device)
    launched = []
    real = nf4_linear_dx.nf4_linear_dx_kernel

    class Counted:
        def __getitem__(self, grid):
            return lambda *args, **options: launched.append(1) or real[grid](*args, **options)

    monkeypatch.setattr(nf4_linear_dx, "nf4_linear_dx_kernel", Counted())
    with fastfuse.backend("triton"), tune.pin("nf4_linear", TRANSPOSED):
        y = nf4_lora_linear(x, weight, a, b, 1.0, bias=bias)
    assert launched == []
    y.sum().backward()
    assert launched == [1]


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_gradients_of_gradients(backend, device):
    x, weight, a, b, bias = inputs(7, 64, 128, device=device)
    w = host_dequantize(weight, torch.float32)

    def penalty(fn, *leaves):
        grads = torch.autograd.grad(fn(*leaves).square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in grads), leaves)

    def formula(w):
        return lambda x, a, b, bias: F.linear(x, w, bias) + F.linear(F.linear(x, a), b) * 0.5

    with fastfuse.backend(backend):
        got = penalty(lambda x, a, b, bias: nf4_lora_linear(x, weight, a, b, 0.5, bias=bias), x, a, b, bias)
    eager = in_several_orders(lambda: penalty(formula(w), x, a, b, bias))
    exact = penalty(formula(w.double()), *(t.detach().double().requires_grad_() for t in (x, a, b, bias)))
    for what, *values in zip(["x", "a", "b", "bias"], got, zip(*eager, strict=True), exact, strict=True):
        assert_no_worse(*values, what)


def test_backward_keeps_no_dequantized_weight(device):
    x, weight, a, b, _ = inputs(4, 256, 256, bias=False, device=device)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        nf4_lora_linear(x, weight, a, b, 1.0)
    assert saved and max(saved) <= 256 * 256 // 2  # the packed bytes, which the module holds anyway


CASES = ["plain", "strided", "expanded", "empty", "no adapter", "mixed dtypes", "magnitude", "dropout", "group", "dense"]


@pytest.mark.parametrize("interpret", [False, True])
@pytest.mark.parametrize("case", CASES)
def test_registered_op(case, interpret, device):
    x, weight, a, b, bias = inputs(6, 64, 64, device=device)
    if case == "strided":
        x = torch.randn(6, 2, 64, device=device)[:, 0].requires_grad_()
    if case == "expanded":
        x = torch.randn(1, 64, device=device).expand(6, 64)
    if case == "empty":
        x = x.detach()[:0].requires_grad_()
    if case == "no adapter":
        a = b = None
    if case == "mixed dtypes":
        x, bias = x.detach().half().requires_grad_(), bias.detach().half().requires_grad_()
    weight = NF4View.of(weight)
    if case == "dense":
        weight = nf4_dequantize(weight).requires_grad_()
    lengths = torch.rand(2, 64, device=device) + 0.5
    magnitude, norms = (lengths[0].requires_grad_(), lengths[1]) if case == "magnitude" else (None, None)
    projections = [Projection(weight, a, b, 2.0, bias, magnitude, norms)]
    if case == "group":
        projections.append(Projection(NF4View.of(quantize(random_weight(32, 64, device=device), "nested")), a, b[:32].detach(), 0.5))
    seeds = torch.randint(2**62, (1,), device=device) if case == "dropout" else None
    args = linear_args("op", x, projections, seeds, 0.25, interpret)
    assert args.keep_pre_scale == (case == "magnitude")
    opcheck(linear, args)
    ranks = sum(p.R for p in args.operands)
    d_xa = torch.randn(x.shape[0], ranks, device=device).requires_grad_() if ranks else None
    dy = tuple(torch.randn(x.shape[0], p.N, device=device, dtype=x.dtype).requires_grad_() for p in args.operands)
    operands = tuple(p._replace(b=None, bias=None) for p in args.operands)
    opcheck(linear_dx, LinearDxArgs(dy, operands, args.layout, 64, seeds, args.dropout_p, d_xa, interpret))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize("storage", STORAGES)
def test_compile_fullgraph(storage, backend, device):
    x, weight, a, b, bias = inputs(6, 64, 256, storage=storage, device=device)

    def fn(x, a, b, bias):
        return nf4_lora_linear(x, weight, a, b, 2.0, bias=bias).square().sum()

    want = fn(x, a, b, bias)
    want_grads = torch.autograd.grad(want, [x, a, b, bias])
    compiled = torch.compile(fn, fullgraph=True, backend=backend)
    got = compiled(x, a, b, bias)
    torch.testing.assert_close(got, want)
    for g, w in zip(torch.autograd.grad(got, [x, a, b, bias]), want_grads, strict=True):
        torch.testing.assert_close(g, w)


def test_compile_dynamic_is_one_graph(device):
    _, weight, a, b, _ = inputs(1, 64, 64, device=device)
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda x: nf4_lora_linear(x, weight, a, b, 2.0), fullgraph=True, dynamic=True, backend=counter)
    for M in (5, 9, 33):
        x = torch.randn(M, 64, device=device)
        torch.testing.assert_close(compiled(x), nf4_lora_linear(x, weight, a, b, 2.0))
    assert counter.frame_count == 1


def test_autocast_moves_x_and_never_the_tables(device):
    x, weight, a, b, bias = inputs(6, 64, 64, device=device)
    with torch.autocast(device, torch.bfloat16):
        y = nf4_lora_linear(x, weight, a, b, 2.0, bias=bias)
    assert y.dtype == torch.bfloat16
    x16, a16, b16, bias16 = (t.detach().bfloat16() for t in (x, a, b, bias))
    assert torch.equal(y, nf4_lora_linear(x16, weight, a16, b16, 2.0, bias=bias16))
    y.sum().backward()
    assert x.grad.dtype == a.grad.dtype == torch.float32


def test_deterministic(kernels, device):
    x, weight, a, b, bias = inputs(33, 64, 128, device=device)
    first = run(lambda *t: nf4_lora_linear(t[0], weight, t[1], t[2], 2.0, bias=t[3]), x, a, b, bias, torch.ones(33, 64, device=device))
    again = run(lambda *t: nf4_lora_linear(t[0], weight, t[1], t[2], 2.0, bias=t[3]), x, a, b, bias, torch.ones(33, 64, device=device))
    assert all(torch.equal(p, q) for p, q in zip(first, again, strict=True))


def test_cost_counts_each_tensor_once():
    weight = NF4View.of(quantize(random_weight(128, 64), "flat"))
    x, a, b = torch.empty(10, 64, device="meta"), torch.empty(4, 64, device="meta"), torch.empty(128, 4, device="meta")
    cost = nf4_linear_cost(x, weight, a, b)
    assert cost.bytes == 4 * (10 * 64 + 4 * 64 + 128 * 4 + 10 * 128) + 128 * 64 // 2 + 4 * 128 + 4 * 16
    assert cost.flops == 2 * 10 * 128 * 64 + 2 * 10 * 4 * (64 + 128)
    assert nf4_linear_bwd_cost(x, weight, a, b).flops == 2 * 10 * 128 * 64 + 4 * 10 * 4 * (64 + 128)


def bad_calls():
    x, w = torch.randn(2, 64), quantize(random_weight(96, 64), "flat")
    a, b = torch.randn(4, 64), torch.randn(96, 4)
    return {
        "features": (lambda: nf4_linear(torch.randn(2, 63), w), ValueError, r"nf4_linear: x has shape \(2, 63\), weight takes 64 features"),
        "lora_a": (lambda: nf4_lora_linear(x, w, torch.randn(4, 65), b, 1.0), ValueError, r"lora_a has shape \(4, 65\), expected \(R, 64\)"),
        "lora_b": (lambda: nf4_lora_linear(x, w, a, torch.randn(96, 5), 1.0), ValueError, r"lora_b has shape \(96, 5\), expected \(96, 4\)"),
        "rank 0": (lambda: nf4_lora_linear(x, w, a[:0], b[:, :0], 1.0), ValueError, r"lora_a has shape \(0, 64\), expected \(R, 64\) with R >= 1"),
        "bias": (lambda: nf4_linear(x, w, torch.randn(95)), ValueError, r"bias has shape \(95,\), expected \(96,\)"),
        "dtype": (lambda: nf4_linear(x.double(), w), fastfuse.Unsupported, "x is torch.float64, covered are bf16, fp16 and fp32"),
        "adapter dtype": (lambda: nf4_lora_linear(x, w, a.double(), b, 1.0), fastfuse.Unsupported, "lora_a is torch.float64"),
        "device": (lambda: nf4_linear(x.to("meta"), w), ValueError, "x is on meta, weight on cpu"),
        "not a tensor": (lambda: nf4_linear([1.0], w), TypeError, "x is a list"),
        "bias list": (lambda: nf4_linear(x, w, [1.0]), TypeError, "nf4_linear: bias is a list"),
        "no lora_a": (lambda: nf4_lora_linear(x, w, None, b, 1.0), TypeError, "lora_a is a NoneType"),
        "scaling": (lambda: nf4_lora_linear(x, w, a, b, torch.ones(1)), TypeError, "scaling is a Tensor, not a number"),
        "sparse": (lambda: nf4_linear(x.to_sparse(), w), fastfuse.Unsupported, "x has layout torch.sparse_coo"),
        "backend argument": (lambda: nf4_linear(x, w, backend="cuda"), ValueError, "nf4_linear: backend is 'cuda', not one of auto, triton, torch"),
        "not quantized": (lambda: nf4_linear(x, nn.Linear(64, 96).weight), TypeError, "neither NF4View, Params4bit nor NF4Tensor"),
        "backend": (lambda: fastfuse.backend("cuda").__enter__(), ValueError, "'cuda' is none of auto, triton, torch"),
    }


@pytest.mark.parametrize("case", bad_calls())
def test_refusals(case):
    call, error, message = bad_calls()[case]
    with pytest.raises(error, match=message) as e:
        call()
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("backend", ["auto", "triton"])
def test_forward_mode_is_refused_not_zero(backend, device):
    x, weight, _, _, _ = inputs(3, 64, 64, device=device)
    with fastfuse.backend(backend), pytest.raises(fastfuse.Unsupported, match="forward-mode differentiation is not covered"):
        torch.func.jvp(lambda x: nf4_linear(x, weight), (x,), (torch.ones_like(x),))
    with fastfuse.backend("torch"):
        tangent = torch.func.jvp(lambda x: nf4_linear(x, weight), (x,), (torch.ones_like(x),))[1]
    torch.testing.assert_close(tangent, torch.ones_like(x) @ host_dequantize(weight, torch.float32).T)


def test_backend_argument_is_for_one_call(device):
    x, weight, a, b, _ = inputs(3, 64, 64, device=device)
    for backend in ("torch", "auto", "triton"):
        y = nf4_lora_linear(x, weight, a, b, 1.0, backend=backend)
        torch.testing.assert_close(y, nf4_linear_ref(x, NF4View.of(weight), a, b, 1.0))
    torch.testing.assert_close(nf4_dequantize(weight, backend="triton"), nf4_dequantize(weight))


def test_backend_is_restored_after_an_error():
    with pytest.raises(RuntimeError, match="inside"), fastfuse.backend("torch"):
        raise RuntimeError("inside")
    from fastfuse.ops import _op

    assert _op._backend == "auto"
