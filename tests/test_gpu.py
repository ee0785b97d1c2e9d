"""On a GPU: bf16 and fp16 at the model's own shapes, every row of this chip, CUDA graphs, compile, and the patched model."""

import functools

import pytest
import torch
from numerics import assert_no_worse, assert_rounding_apart
from suite import captured, rows_of_this_chip, without_waiting
from torch.nn import functional as F

import fastfuse
from cases import as_tuple
from cases.weights import STORAGES, host_dequantize, quantize, random_weight
from fastfuse import tune
from fastfuse.ops import (
    freeing_scratch,
    lora_row_norms,
    nf4_dequantize,
    nf4_dequantize_ref,
    nf4_linear,
    nf4_lora_linear,
    nf4_lora_linears,
    nf4_swiglu_mlp,
)
from fastfuse.ops.low_rank import keep_mask
from fastfuse.quant import NF4View

pytestmark = pytest.mark.gpu
SHAPES = [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (1280, 1280), (5120, 1280)]


@functools.lru_cache(maxsize=40)
def weight_of(N, K, storage, dtype):
    return quantize(random_weight(N, K, dtype, "cuda"), storage)


def layer(N, K, storage, dtype, R=16, lora_dtype=None):
    a = torch.randn(R, K, device="cuda", dtype=lora_dtype or dtype) / K**0.5
    b = torch.randn(N, R, device="cuda", dtype=lora_dtype or dtype)
    return weight_of(N, K, storage, dtype), a.requires_grad_(), b.requires_grad_()


def check(run, formula, weights, leaves) -> None:
    """run() and its gradients by the rule; formula: (weights, *leaves), with the weights as the host library decodes them, and exactly."""
    results, dtype, upstream = as_tuple(run()), leaves[0].dtype, []

    def with_gradients(ys, leaves):
        upstream.extend(torch.randn_like(y) for y in ys[len(upstream) :])
        return [*ys, *torch.autograd.grad(ys, leaves, [dy.to(y.dtype) for y, dy in zip(ys, upstream, strict=True)])]

    got = with_gradients(results, leaves)
    eager = with_gradients(as_tuple(formula([host_dequantize(w, dtype) for w in weights], *leaves)), leaves)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    exact = with_gradients(as_tuple(formula([nf4_dequantize_ref(NF4View.of(w), torch.float64) for w in weights], *wide)), wide)
    for i, values in enumerate(zip(got, eager, exact, strict=True)):
        assert_no_worse(*values, f"result {i}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("storage", STORAGES)
def test_dequantize_equals_the_host_library_to_the_bit(storage, dtype):
    for N, K in SHAPES[:3]:
        weight = weight_of(N, K, storage, dtype)
        assert torch.equal(nf4_dequantize(weight, dtype), host_dequantize(weight, dtype)), (N, K)


PAIRS = [*((s, torch.bfloat16, d) for s in STORAGES for d in (torch.bfloat16, torch.float32)), ("nested", torch.float16, torch.float16)]


@pytest.mark.parametrize("M", [1, 3, 16, 17, 64, 100, 256, 700, 701, 2048])
@pytest.mark.parametrize("storage, dtype, lora_dtype", PAIRS, ids=str)
def test_forward_and_backward(storage, dtype, lora_dtype, M):
    def formula(w, x, a, b):
        return (F.linear(x, w[0]) + F.linear(F.linear(x.to(a.dtype), a), b) * 2.0).to(x.dtype)

    for N, K in SHAPES if M in (1, 100) else SHAPES[:1]:
        weight, a, b = layer(N, K, storage, dtype, lora_dtype=lora_dtype)
        x = torch.randn(M, K, device="cuda", dtype=dtype, requires_grad=True)
        check(functools.partial(nf4_lora_linear, x, weight, a, b, 2.0), formula, [weight], [x, a, b])


def test_every_row_of_this_chip_agrees():
    weight, a, b = layer(512, 1024, "nested", torch.bfloat16)
    x = torch.randn(50, 1024, device="cuda", dtype=torch.bfloat16)
    with tune.pin("nf4_linear", None):
        dense = nf4_lora_linear(x, weight, a, b, 1.0)
    exact = x.double() @ nf4_dequantize_ref(NF4View.of(weight), torch.float64).T + (x.double() @ a.double().T) @ b.double().T
    for tile in rows_of_this_chip("nf4_linear", None):  # those with SPLIT_K take 50 tokens without splits; 16 and fewer are tested above
        with tune.pin("nf4_linear", tile):
            assert_no_worse(nf4_lora_linear(x, weight, a, b, 1.0), dense, exact, str(tile))


@pytest.mark.parametrize("M", [1, 64, 1024])
def test_cuda_graph_replays_on_new_input(M):
    weight, a, b = layer(1024, 4096, "nested", torch.bfloat16)
    x = torch.randn(M, 4096, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        graph, y = captured(lambda: nf4_lora_linear(x, weight, a, b, 1.0))
        x.copy_(torch.randn_like(x))
        graph.replay()
        assert torch.equal(y, nf4_lora_linear(x, weight, a, b, 1.0))


@pytest.mark.parametrize("M", [4, 256])
def test_compiled_equals_eager(M):
    weight, a, b = layer(1024, 1024, "nested", torch.bfloat16)
    x = torch.randn(M, 1024, device="cuda", dtype=torch.bfloat16)
    compiled = torch.compile(lambda x: nf4_lora_linear(x, weight, a, b, 1.0), fullgraph=True)
    assert torch.equal(compiled(x), nf4_lora_linear(x, weight, a, b, 1.0))


def test_no_host_synchronisation():
    weight, a, b = layer(1024, 1024, "nested", torch.bfloat16)
    for M in (1, 64, 2048):
        x = torch.randn(M, 1024, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        without_waiting(lambda x=x: nf4_lora_linear(x, weight, a, b, 1.0).sum().backward())


def test_patched_layer_on_the_gpu():
    import bitsandbytes as bnb
    from peft import LoraConfig, get_peft_model

    model = torch.nn.Sequential(bnb.nn.Linear4bit(1024, 2048, bias=True, compute_dtype=torch.bfloat16, quant_type="nf4"))
    model = model.to(torch.bfloat16).to("cuda")
    model.is_loaded_in_4bit = True
    model = get_peft_model(model, LoraConfig(r=8, target_modules=["0"], init_lora_weights=False))
    x = torch.randn(5, 1024, device="cuda", dtype=torch.bfloat16)
    want = model(x)
    report = fastfuse.patch(model, verify=True)
    assert report.counts == {"patched": 2} and {e.backend for e in report.entries} == {"triton"}
    assert_rounding_apart(model(x), want, K=1024)
    fastfuse.unpatch(model)
    assert torch.equal(model(x), want)


def test_other_devices_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    weight = quantize(random_weight(256, 256, torch.bfloat16, "cuda:1"), "nested")
    x = torch.randn(2, 256, device="cuda:1", dtype=torch.bfloat16)
    assert nf4_linear(x, weight).device == x.device


@pytest.mark.parametrize("M", [1, 16, 64, 300, 2048])
def test_group_dropout_and_dora_at_the_models_shapes(M):
    """q, k and v in one launch, k without an adapter, v with a magnitude; dropout in all; against eager in bf16 and float64."""
    dtype, p = torch.bfloat16, 0.1
    x = torch.randn(M, 4096, device="cuda", dtype=dtype, requires_grad=True)
    (wq, aq, bq), (wk, _, _), (wv, av, bv) = layer(4096, 4096, "nested", dtype), layer(1024, 4096, "nested", dtype), layer(1024, 4096, "nested", dtype)
    m = (torch.rand(1024, device="cuda") + 0.5).requires_grad_()
    torch.manual_seed(1)
    masks = [keep_mask(s, p, M, 4096) for s in torch.randint(2**62, (3,), device="cuda")]
    norms = lora_row_norms(wv, av, bv, 2.0, dtype)

    def run():
        torch.manual_seed(1)
        return tuple(nf4_lora_linears(x, [(wq, aq, bq, 2.0), (wk,), (wv, av, bv, 2.0, None, m)], dropout_p=p, training=True))

    def formula(w, x, aq, bq, av, bv, m):
        def delta(a, b, mask):
            return F.linear(F.linear(x * mask / (1 - p), a), b) * 2.0

        return F.linear(x, w[0]) + delta(aq, bq, masks[0]), F.linear(x, w[1]), ((F.linear(x, w[2]) + delta(av, bv, masks[2])) * (m / norms)).to(x.dtype)

    check(run, formula, [wq, wk, wv], [x, aq, bq, av, bv, m])


@pytest.mark.parametrize("M", [1, 64, 2048])
def test_swiglu_mlp_at_the_models_shapes(M):
    dtype = torch.bfloat16
    x = torch.randn(M, 4096, device="cuda", dtype=dtype, requires_grad=True)
    layers = [layer(n, k, "nested", dtype) for n, k in ((14336, 4096), (14336, 4096), (4096, 14336))]

    def formula(weights, x, *factors):
        e, g = (F.linear(x, weights[i]) + F.linear(F.linear(x, factors[2 * i]), factors[2 * i + 1]) for i in range(2))
        h = F.silu(e) * g
        return F.linear(h, weights[2]) + F.linear(F.linear(h, factors[4]), factors[5])

    leaves = [x, *(t for _, a, b in layers for t in (a, b))]
    check(lambda: nf4_swiglu_mlp(x, *((w, a, b, 1.0) for w, a, b in layers)), formula, [w for w, _, _ in layers], leaves)


def test_scratch_on_two_streams_and_in_graphs():
    """The shared buffer is waited for across streams, replaced under a captured graph, and never what the graph replays on."""
    weight, a, b = layer(1024, 4096, "nested", torch.bfloat16)
    large, _, _ = layer(14336, 4096, "nested", torch.bfloat16)
    x = torch.randn(2048, 4096, device="cuda", dtype=torch.bfloat16)
    want, want_large = nf4_lora_linear(x, weight, a, b, 1.0).detach(), nf4_linear(x, large)
    other = torch.cuda.Stream()
    other.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), freeing_scratch():
        results = []
        for i in range(20):
            with torch.cuda.stream(other if i % 2 else torch.cuda.current_stream()):
                results.append(nf4_linear(x, large) if i % 2 else nf4_lora_linear(x, weight, a, b, 1.0))
        torch.cuda.synchronize()
        graph, y = captured(lambda: nf4_lora_linear(x, weight, a, b, 1.0))
    nf4_linear(x, large)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(r, want_large if i % 2 else want) for i, r in enumerate(results)) and torch.equal(y, want)


def test_dropout_in_a_graph_draws_anew_at_every_replay():
    weight, a, b = layer(1024, 4096, "nested", torch.bfloat16)
    x = torch.randn(64, 4096, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        graph, y = captured(lambda: nf4_lora_linear(x, weight, a, b, 1.0, dropout_p=0.5, training=True))
        graph.replay()
        first = y.clone()
        graph.replay()
    assert not torch.equal(first, y)


def test_scratch_under_reduce_overhead():
    """The warm-up of torch.compile's CUDA graphs allocates in a pool of its own, which the shared buffer must not live in."""
    weight, a, b = layer(1024, 4096, "nested", torch.bfloat16)
    with freeing_scratch():
        pass
    compiled = torch.compile(lambda x: nf4_lora_linear(x, weight, a, b, 1.0), mode="reduce-overhead", fullgraph=True)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        x = torch.randn(1024, 4096, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        y = compiled(x)
        y.sum().backward()
        assert torch.equal(y, nf4_lora_linear(x, weight, a, b, 1.0)) and x.grad.isfinite().all()
