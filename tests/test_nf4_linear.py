"""The linear ops beside what tests/test_ops.py holds all ops to: backends, launches, dropout's masks, DoRA's norms, memory, costs, and fp16 near its ends."""

import pytest
import torch
from numerics import Orders, assert_no_worse, in_several_orders, opcheck
from torch.utils.checkpoint import checkpoint

import fastfuse
from cases.linear import BF16, F16, F32, ROUTES, layer, leaves
from cases.weights import STORAGES
from fastfuse import tune
from fastfuse.ops import (
    freeing_scratch,
    lora_row_norms,
    nf4_dequantize,
    nf4_dequantize_ref,
    nf4_linear,
    nf4_linear_bwd_cost,
    nf4_linear_cost,
    nf4_linear_dx,
    nf4_linear_ref,
    nf4_lora_linear,
    nf4_lora_linears,
    nf4_swiglu_mlp,
    nf4_swiglu_mlp_bwd_cost,
    nf4_swiglu_mlp_cost,
)
from fastfuse.ops._op import Cost
from fastfuse.ops._scratch import scratch_bytes
from fastfuse.ops.lora_row_norms import RowNormsArgs, row_norms
from fastfuse.ops.nf4_swiglu_mlp import SwiGLUArgs, _swiglu, _swiglu_bwd
from fastfuse.quant.nf4 import Layout

every_backend = pytest.mark.parametrize("backend", ["torch", "auto", "triton"])


def inputs(M, device, dtype=F32, **options):
    """x and a layer of 64 by 64."""
    return torch.randn(M, 64, dtype=dtype, device=device, requires_grad=True), layer(64, 64, dtype=dtype, device=device, **options)


def lora(x, p, **more):
    return nf4_lora_linear(x, *p[:4], bias=p.bias, magnitude=p.magnitude, norms=p.norms, **more)


def mlp(K, H, device="cpu"):
    return [layer(N, taken, device=device) for N, taken in ((H, K), (H, K), (K, H))]


@pytest.mark.parametrize("route, kernel", [("transposed", "nf4_linear_fwd_kernel"), ("skinny", "nf4_skinny_kernel")])
def test_a_group_is_one_launch(route, kernel, device, launches):
    x, p = inputs(3, device)
    with ROUTES[route]():
        nf4_lora_linears(x, [p, p, p])
    assert [name for name, _ in launches].count(kernel) == 1


def test_a_frozen_input_has_no_gradient_that_would_decode_the_weight(kernels, device, monkeypatch):
    x, p = inputs(4, device)
    y = lora(x.detach(), p)
    monkeypatch.setattr(nf4_linear_dx, "linear_dx", None)
    assert all(g is not None for g in torch.autograd.grad(y.sum(), leaves(p)))


def test_the_backward_runs_what_the_forward_ran(device, launches):
    """The gradient is usually taken after the block that chose the backend."""
    with ROUTES["transposed"]():
        y = lora(*inputs(4, device, bias=True))
    launches.clear()
    y.sum().backward()
    assert [name for name, _ in launches].count("nf4_linear_dx_kernel") == 1


def test_backend_argument_is_for_one_call(device):
    x, p = inputs(3, device)
    for backend in ("torch", "auto", "triton"):
        torch.testing.assert_close(lora(x, p, backend=backend), nf4_linear_ref(x, *p[:4]))
    torch.testing.assert_close(nf4_dequantize(p.weight, backend="triton"), nf4_dequantize(p.weight))


def test_backend_is_restored_after_an_error():
    from fastfuse.ops import _op

    with pytest.raises(RuntimeError, match="inside"), fastfuse.backend("torch"):
        raise RuntimeError("inside")
    assert _op._backend == "auto"
    with pytest.raises(ValueError, match="'cuda' is none of auto, triton, torch"), fastfuse.backend("cuda"):
        pass


def test_forward_mode_by_the_formula(device):
    x, p = inputs(3, device)
    with fastfuse.backend("torch"):
        tangent = torch.func.jvp(lambda x: nf4_linear(x, p.weight), (x.detach(),), (torch.ones_like(x),))[1]
    torch.testing.assert_close(tangent, torch.ones_like(x) @ nf4_dequantize(p.weight).T)


@pytest.mark.parametrize("dtype", [BF16, torch.float64], ids=str)
def test_the_default_dtype_does_not_matter(dtype, device):
    x, p = inputs(3, device, magnitude=True)
    layers = [p, layer(32, 64, device=device)]
    want = nf4_lora_linears(x, layers)
    torch.set_default_dtype(dtype)
    try:
        got = nf4_lora_linears(x, layers)
    finally:
        torch.set_default_dtype(F32)
    assert all(torch.equal(g, w) for g, w in zip(got, want, strict=True))


@pytest.mark.parametrize("low", [F16, F32], ids=str)
@pytest.mark.parametrize("route", ["reference", "transposed", "dense"])
def test_large_fp16_values_stay_finite(route, low, device):
    """Loss-scaled gradients and large activations: x A^T may be near the largest fp16, or past it in fp32 adapters."""
    x, p = inputs(8, device, F16, low=low)
    larger, smaller = (100, 1e-5) if low == F32 else (1, 1e-3)
    x, a, b = ((t.detach() * size).requires_grad_() for t, size in ((x, 400), (p.lora_a, larger), (p.lora_b, smaller)))
    with ROUTES[route]():
        y = nf4_lora_linear(x, p.weight, a, b, 16.0)
        values = [y, *torch.autograd.grad(y, [x, a, b], torch.full_like(y, 400.0))]
    assert all(v.isfinite().all() for v in (values[:2] if low == F16 else values))


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("scaling, size", [(1 / 16, 1e-5), (1 / 4, 1e-5), (2000.0, 50.0)])
def test_fp16_adapters_keep_their_digits(scaling, size, backend, device):
    """Early in training B is tiny under a large loss scale: scaled by itself in fp16 it would be subnormal, or past the largest number."""
    x, p = inputs(32, device, F16)
    x, b, dy = x.detach(), p.lora_b.detach().float().mul(size).half(), torch.randn(32, 64, dtype=F16, device=device) * (64 if size < 1 else 1e-4)
    (da,) = torch.autograd.grad(nf4_lora_linear(x, p.weight, p.lora_a, b, scaling, backend=backend), p.lora_a, dy)

    def eager():
        return (((dy * scaling) @ b) if size < 1 else (dy @ b) * scaling).T @ x

    assert_no_worse(da, Orders(eager), (scaling * dy.double() @ b.double()).T @ x.double())


@every_backend
def test_what_took_no_part_gets_no_gradient(backend, device):
    """As in eager PyTorch: a zero would be decayed and stepped by an optimizer."""
    x, p = inputs(3, device, bias=True, magnitude=True)
    left_out, plain = layer(32, 64, bias=True, magnitude=True, device=device), layer(96, 64, device=device)
    outs = nf4_lora_linears(x, [p, left_out, plain], dropout_p=0.3, training=True, backend=backend)
    (outs[0].square().sum() + outs[2].sum()).backward()
    assert all(t.grad is None for t in leaves(left_out))
    assert all(t.grad is not None and t.grad.isfinite().all() for t in (x, *leaves(p, plain)))


@every_backend
def test_dropout_follows_the_generator_and_training(backend, device):
    x, p = inputs(20, device)

    def dropped(training=True):
        return lora(x, p, dropout_p=0.5, training=training, backend=backend)

    torch.manual_seed(1)
    plain, first, second = dropped(training=False), dropped(), dropped()
    torch.manual_seed(1)
    assert torch.equal(plain, lora(x, p, backend=backend)) and torch.equal(first, dropped())
    assert not torch.equal(first, second) and not torch.equal(first, plain)


def test_checkpointing_draws_the_same_mask(device):
    x, p = inputs(20, device)

    def run(x):
        return lora(x, p, dropout_p=0.5, training=True).square().sum()

    grads = []
    for call in (run, lambda x: checkpoint(run, x, use_reentrant=False)):
        torch.manual_seed(2)
        grads.append(torch.autograd.grad(call(x), [x, *leaves(p)]))
    assert all(map(torch.equal, *grads))


def lengths(w, p):
    return (w + 1.5 * p.lora_b.detach().to(w.dtype) @ p.lora_a.detach().to(w.dtype)).norm(dim=1)


SIZES, DTYPES = [(1, 64, 1), (65, 192, 20), (33, 320, 64)], [F32, F16, BF16]  # 192 and 320: columns cut by the tile


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("size, dtype, storage", [(SIZES[i], DTYPES[j], STORAGES[(i + j) % 3]) for i in range(3) for j in range(3)], ids=str)
def test_row_norms(size, dtype, storage, backend, device):
    p = layer(*size, storage=storage, dtype=dtype, device=device)
    with tune.pin("lora_row_norms", tune.Tile({"BLOCK_N": 16, "BLOCK_K": 128})):
        got = lora_row_norms(*p[:4], backend=backend)
    unrounded = backend == "triton" and dtype == BF16 and device == "cpu"  # the interpreter has no bf16
    w = nf4_dequantize_ref(p.weight, F32 if unrounded else dtype)
    assert_no_worse(got, Orders(lengths, w.float(), p), lengths(w.double(), p))
    assert not got.requires_grad


@every_backend
def test_row_norms_under_autocast_and_without_an_adapter(backend, device):
    _, p = inputs(1, device)
    w = nf4_dequantize_ref(p.weight, F32)
    eager, exact = in_several_orders(lengths, w, p), lengths(w.double(), p)
    with torch.autocast(device, BF16):
        for given in (p.weight, w):
            assert_no_worse(lora_row_norms(given, *p[1:4], backend=backend), eager, exact)
            assert_no_worse(lora_row_norms(given, None, None, 1.0, backend=backend), in_several_orders(w.norm, dim=1), w.double().norm(dim=1))


@pytest.mark.parametrize("interpret", [False, True])
def test_registered_ops(interpret, device):
    """Those that no public op's call shows to PyTorch's checks: they run inside of one."""
    _, p = inputs(1, device)
    adapter = p.lora_a.detach(), p.lora_b.detach(), 1.5
    opcheck(row_norms, RowNormsArgs(p.weight.tensors(), Layout.of(p.weight), p.weight.shape, F32, *adapter, interpret))
    e, g, dh = (torch.randn(5, 7, device=device).requires_grad_() for _ in range(3))
    opcheck(_swiglu, SwiGLUArgs(e, g, None, interpret))
    opcheck(_swiglu_bwd, SwiGLUArgs(e, g, dh, interpret))


def test_exported_for_any_number_of_tokens(device):
    class Module(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.view, a, b, *_ = layer(64, 64, device=device)
            self.a, self.b = torch.nn.Parameter(a.detach()), torch.nn.Parameter(b.detach())
            self.register_buffer("packed", self.view.packed)

        def forward(self, x):
            return nf4_lora_linear(x, self.view, self.a, self.b, 2.0)

    module = Module()
    exported = torch.export.export(module, (torch.randn(5, 64, device=device),), dynamic_shapes=({0: torch.export.Dim("M", min=2)},))
    x = torch.randn(9, 64, device=device)
    torch.testing.assert_close(exported.module()(x), module(x))


def test_costs_count_each_tensor_once():
    M, K, H, R = 10, 64, 128, 8
    x, (gate, up, down) = torch.empty(M, K, device="meta"), mlp(K, H)
    adapter, base, low = 4 * R * (H + K), 2 * M * H * K, 2 * M * R * (H + K)
    assert gate.weight.nbytes == H * K // 2 + H * K // 64 + 4 * (256 + 1 + 1 + 16)  # codes, scales by the byte, and what those are scaled and coded by
    assert nf4_linear_cost(x, *gate[:4]) == Cost(gate.weight.nbytes + adapter + 4 * M * (K + H), base + low)
    assert nf4_linear_bwd_cost(x, *gate[:4]).flops == base + 2 * low
    held = 3 * gate.weight.nbytes
    assert nf4_swiglu_mlp_cost(x, gate, up, down) == Cost(held + 3 * adapter + 4 * 2 * M * K, 3 * (base + low))
    # x and dy read, dx written; A and B read, dA and dB written
    assert nf4_swiglu_mlp_bwd_cost(x, gate, up, down) == Cost(held + 6 * adapter + 4 * 3 * M * K, 3 * (base + 2 * low))


def test_scratch_is_shared_and_freed(device):
    with freeing_scratch():
        pass  # what other tests have left
    with freeing_scratch(), fastfuse.backend("triton"), tune.pin("nf4_linear", None):
        for N in (64, 256, 128):
            nf4_linear(torch.randn(3, 64, device=device), layer(N, 64, device=device).weight)
        assert scratch_bytes(device) == 256 * 64 * 4
    assert scratch_bytes(device) == 0


def kept_beside(held, run):
    """What run() saves for its backward in memory that is not held anyway."""
    saved, known = {}, {t.untyped_storage().data_ptr() for t in held}

    def keep(t):
        saved[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        run()
    return [t for at, t in saved.items() if at not in known]


def test_swiglu_mlp_keeps_nothing_of_its_width(device):
    x, layers = torch.randn(256, 64, device=device, requires_grad=True), mlp(64, 256, device)
    fresh = kept_beside([x, *leaves(*layers)], lambda: nf4_swiglu_mlp(x, *layers))  # of frozen weights nothing is saved
    assert [t.shape for t in fresh] == [(256, 16), (256, 8)]  # x A^T of gate and up, h A^T of down


def peak_bytes(run):
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
    view = layer(1024, 1024).weight
    assert peak_bytes(lambda: nf4_dequantize_ref(view, F32)) >= 1024 * 1024 * 4


@pytest.mark.parametrize("magnitude, dropout_p", [(False, 0.0), (False, 0.1), (True, 0.0), (True, 0.1)])
def test_memory_of_a_qlora_step(magnitude, dropout_p):
    """Kept for the backward: x A^T (DoRA: and y before its scale) beside what the caller holds. On the way: nothing of W's size.

    The weight is decoded some rows at a time on a CPU, 2^20 elements in fp32 with an index of half as many int32.
    """
    M, N, K, R = 8, 4096, 4096, 16
    x, p = torch.randn(M, K, requires_grad=True), layer(N, K, R, magnitude=magnitude)
    p = p._replace(norms=lora_row_norms(*p[:4]) if magnitude else None)

    def forward():
        return lora(x, p, dropout_p=dropout_p, training=True)

    def step():
        y = forward()
        torch.autograd.grad(y, [x, *leaves(p)], torch.ones_like(y))

    kept = kept_beside([x, *leaves(p), *([p.norms] if magnitude else [])], forward)
    small = 4 * N if magnitude else 0  # magnitude / norms
    assert sum(t.untyped_storage().nbytes() for t in kept) <= 4 * (M * R + (M * N if magnitude else 0)) + 2 * small + 8
    step()
    chunk = (1 << 20) * (4 + 2)
    scales = 3 * 4 * N * K // 64  # nested scales in fp32, and two steps of making them
    activations = 16 * 4 * M * max(N, K) + 4 * 4 * R * (N + K) + (100 * M * K if dropout_p else 0)  # Philox in int64
    bound = chunk + scales + activations
    assert bound < 2 * N * K  # less than half the weight in bf16 would already give a dequantized one away
    assert peak_bytes(step) <= bound
