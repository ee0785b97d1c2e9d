"""On a GPU: bf16 and fp16 at the model's own shapes, every row of this chip, CUDA graphs and the memory that calls share."""

from functools import partial

import pytest
import torch
from suite import captured, check, rows_of_this_chip, without_waiting

from cases import nf4_linear, nf4_swiglu_mlp
from cases.linear import BF16, F16, F32, Layer, layer, weight
from cases.weights import STORAGES
from fastfuse import ops, tune
from fastfuse.ops import freeing_scratch, nf4_lora_linear

pytestmark = pytest.mark.gpu
SHAPES = [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (1280, 1280), (5120, 1280)]


def sized(call):
    """With an update that leaves the base product its weight in the result."""
    return call.replaced(**{name: t * t.shape[1] ** -0.5 for name, t in call.tensors.items() if name.startswith("a") and t is not None})


def linear(M, *layers, K=4096, dtype=BF16, **options):
    return sized(nf4_linear.make("cuda", layers=layers, K=K, lead=(M,), dtype=dtype, **options))


def one(M, N=1024, K=4096, **options):
    """A call of a layer, whose first argument is x."""
    return partial(nf4_lora_linear, torch.randn(M, K, device="cuda", dtype=BF16), *layer(N, K, 16, dtype=BF16, device="cuda")[:4], **options)


PAIRS = [*((s, BF16, d) for s in STORAGES for d in (BF16, F32)), ("nested", F16, F16)]


@pytest.mark.parametrize("M", [1, 3, 16, 17, 64, 100, 256, 700, 701, 2048])
@pytest.mark.parametrize("storage, dtype, low", PAIRS, ids=str)
def test_forward_and_backward(storage, dtype, low, M):
    for N, K in SHAPES if M in (1, 100) else SHAPES[:1]:
        check(linear(M, Layer(N, 16, low=low), K=K, dtype=dtype, storage=storage))


@pytest.mark.parametrize("M", [1, 16, 64, 300, 2048])
def test_group_dropout_and_dora(M):
    """q, k and v in one launch, k without an adapter, v with a magnitude; dropout in all."""
    check(linear(M, Layer(4096, 16), Layer(1024, 0), Layer(1024, 16, magnitude=True), p=0.1))


@pytest.mark.parametrize("M", [1, 64, 2048])
def test_swiglu_mlp(M):
    check(sized(nf4_swiglu_mlp.make("cuda", ranks=(16, 16, 16), K=4096, H=14336, lead=(M,), dtype=BF16)))


def test_every_row_of_this_chip_agrees():
    call = linear(50, Layer(512, 16), K=1024)
    for tile in rows_of_this_chip("nf4_linear", None):  # those with SPLIT_K take 50 tokens without splits; 16 and fewer are tested above
        with tune.pin("nf4_linear", tile):
            check(call)


@pytest.mark.parametrize("M", [1, 64, 1024])
@torch.no_grad()
def test_cuda_graph_replays_on_new_input(M):
    call = one(M)
    graph, y = captured(call)
    call.args[0].normal_()
    graph.replay()
    assert torch.equal(y, call())


def test_no_host_synchronisation():
    for M in (1, 64, 2048):
        call = linear(M, Layer(1024, 16), K=1024)
        without_waiting(lambda call=call: call.grads(call()))


def test_other_devices_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    x = torch.randn(2, 256, device="cuda:1", dtype=BF16)
    assert ops.nf4_linear(x, weight(0, 256, 256, dtype=BF16, device="cuda:1")).device == x.device


@torch.no_grad()
def test_scratch_on_two_streams_and_in_graphs():
    """The shared buffer is waited for across streams, replaced under a captured graph, and never what the graph replays on."""
    calls, other = [one(2048), one(2048, 14336)], torch.cuda.Stream()
    wanted = [call() for call in calls]
    other.wait_stream(torch.cuda.current_stream())
    with freeing_scratch():
        results = []
        for i in range(20):
            with torch.cuda.stream(other if i % 2 else torch.cuda.current_stream()):
                results.append(calls[i % 2]())
        torch.cuda.synchronize()
        graph, y = captured(calls[0])
    calls[1]()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(r, wanted[i % 2]) for i, r in enumerate(results)) and torch.equal(y, wanted[0])


@torch.no_grad()
def test_dropout_in_a_graph_draws_anew_at_every_replay():
    graph, y = captured(one(64, dropout_p=0.5, training=True))
    graph.replay()
    first = y.clone()
    graph.replay()
    assert not torch.equal(first, y)


def test_scratch_under_reduce_overhead():
    """The warm-up of torch.compile's CUDA graphs allocates in a pool of its own, which the shared buffer must not live in."""
    p = layer(1024, 4096, 16, dtype=BF16, device="cuda")[:4]
    with freeing_scratch():
        pass
    compiled = torch.compile(lambda x: nf4_lora_linear(x, *p), mode="reduce-overhead", fullgraph=True)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        x = torch.randn(1024, 4096, device="cuda", dtype=BF16, requires_grad=True)
        y = compiled(x)
        y.sum().backward()
        assert torch.equal(y, nf4_lora_linear(x, *p)) and x.grad.isfinite().all()
