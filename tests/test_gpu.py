"""On a GPU: bf16 and fp16 at the model's own shapes, every row of this chip, CUDA graphs, compile, and the patched model."""

import functools

import pytest
import torch
from numerics import assert_no_worse, assert_rounding_apart
from torch.nn import functional as F
from weights import STORAGES, host_dequantize, quantize, random_weight

import fastfuse
from fastfuse import tune
from fastfuse.ops import nf4_dequantize, nf4_dequantize_ref, nf4_linear, nf4_lora_linear
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
    for N, K in SHAPES if M in (1, 100) else SHAPES[:1]:
        weight, a, b = layer(N, K, storage, dtype, lora_dtype=lora_dtype)
        x = torch.randn(M, K, device="cuda", dtype=dtype, requires_grad=True)
        dy = torch.randn(M, N, device="cuda", dtype=dtype)
        w, w64 = host_dequantize(weight, dtype), nf4_dequantize_ref(NF4View.of(weight), torch.float64)

        def grads(y, x, a, b, dy):
            return [y, *torch.autograd.grad(y, [x, a, b], dy)]

        got = grads(nf4_lora_linear(x, weight, a, b, 2.0), x, a, b, dy)
        low = F.linear(F.linear(x.to(lora_dtype), a), b) * 2.0
        eager = grads((F.linear(x, w) + low).to(dtype), x, a, b, dy)
        x64, a64, b64 = (t.detach().double().requires_grad_() for t in (x, a, b))
        exact = grads(F.linear(x64, w64) + F.linear(F.linear(x64, a64), b64) * 2.0, x64, a64, b64, dy.double())
        for what, *values in zip(["y", "dx", "da", "db"], got, eager, exact, strict=True):
            assert_no_worse(*values, f"{what} at {N}x{K}")


def test_every_row_of_this_chip_agrees():
    arch = tune.covering_arch("nf4_linear", tune.arch_of(torch.device("cuda", 0)))
    weight, a, b = layer(512, 1024, "nested", torch.bfloat16)
    x = torch.randn(50, 1024, device="cuda", dtype=torch.bfloat16)
    with tune.pin("nf4_linear", None):
        dense = nf4_lora_linear(x, weight, a, b, 1.0)
    exact = x.double() @ nf4_dequantize_ref(NF4View.of(weight), torch.float64).T + (x.double() @ a.double().T) @ b.double().T
    for row in tune.table("nf4_linear"):
        if row["arch"] == arch and row["tile"]:
            tile = tune.Tile(row["tile"]["constants"], row["tile"]["num_warps"], row["tile"]["num_stages"])
            with tune.pin("nf4_linear", tile):
                assert_no_worse(nf4_lora_linear(x, weight, a, b, 1.0), dense, exact, str(row))


@pytest.mark.parametrize("M", [1, 64, 1024])
def test_cuda_graph_replays_on_new_input(M):
    weight, a, b = layer(1024, 4096, "nested", torch.bfloat16)
    x = torch.randn(M, 4096, device="cuda", dtype=torch.bfloat16)
    with torch.no_grad():
        nf4_lora_linear(x, weight, a, b, 1.0)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = nf4_lora_linear(x, weight, a, b, 1.0)
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
        nf4_lora_linear(x, weight, a, b, 1.0).sum().backward()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            nf4_lora_linear(x, weight, a, b, 1.0).sum().backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


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
