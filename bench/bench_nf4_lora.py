"""NF4 + LoRA linear layers of Llama-3.2-Vision 11B against what runs them today.

pytest bench/bench_nf4_lora.py
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.harness import BF16, EAGER, FP32, OURS, Case, Run, Tensors, by_device, compile_once, cost_of, in_double, installed, timed, with_backward, words
from bench.nf4_peers import Layer, Linear, Peer, dense_eager, dense_peers, dequantize, eager, nf4_peers, random_layer, short, wide_dense_eager
from fastfuse import ops
from fastfuse.ops import nf4_dequantize_cost, nf4_dequantize_ref, nf4_linear_bwd_cost, nf4_linear_cost, nf4_linear_ref
from fastfuse.ops._op import Cost
from fastfuse.quant.nf4 import NF4View

RANK, DROPOUT_P = 16, 0.05
SQUARE = (4096, 4096)
TEXT = (SQUARE, (1024, 4096), (14336, 4096), (4096, 14336))  # N, K: q and o, k and v, gate and up, down of the decoder
VISION = ((1280, 1280), (5120, 1280), (1280, 5120))  # the vision encoder's attention and MLP
QKV, GATE_UP = ((4096, 4096), (1024, 4096), (1024, 4096)), ((14336, 4096), (14336, 4096))
MLP = (*GATE_UP, (4096, 14336))
TOKENS = (1, 4, 16, 64, 256, 1024, 4096, 6404)  # 6404: four tiles of 1601 vision tokens


test_nf4_lora = timed


def _gpu_cases(quick: bool, compile_all: bool) -> Iterator[Case]:
    for (N, K), backward in product((SQUARE,) if quick else (*TEXT, *VISION), (False, True)):
        for M in (1, 16, 256, 4096) if quick else TOKENS:
            for rank in (RANK, 8, 64) if (N, K) == SQUARE and not quick else (RANK,):
                first = (N, K) == SQUARE and rank == RANK
                few = first and (M == 4096 if backward else M in (1, 16, 256, 4096))
                yield layers_case(LINEAR, M, [(N, K)], rank, backward=backward, compiled=compile_all or few, priority=_priority(M, N, K, rank, backward))
    for M, backward in product((16, 4096) if quick else (1, 16, 256, 4096), (False, True)):
        one = partial(layers_case, M=M, backward=backward, compiled=compile_all)
        for op, layers in ((LINEARS, QKV), (LINEARS, GATE_UP), (SWIGLU, MLP)):
            yield one(op, sizes=layers, priority=2)
        yield one(DENSE, sizes=[SQUARE], priority=4)
        if M == 4096 and backward:
            yield one(DROPOUT, sizes=[SQUARE], priority=4)
        if M in (16, 4096):
            yield one(LINEAR, sizes=[SQUARE], lora_dtype=FP32, priority=2)
        yield one(LINEAR, sizes=[SQUARE], storage="torchao", priority=4)
        if not backward:
            for layer in (SQUARE,) if quick else TEXT:
                yield one(PLAIN, sizes=[layer], rank=0, priority=4)
    for N, K in (SQUARE,) if quick else (*TEXT, *VISION):
        for storage in ("bitsandbytes", "torchao"):
            yield dequantize_case(N, K, storage, BF16, compile_all, priority=3 if (N, K) == SQUARE else 5)


def _priority(M: int, N: int, K: int, rank: int, backward: bool) -> int:
    """A run may be cut off by its time limit: first the decoder's square layers at decode, at a short prompt and at a long one."""
    if (N, K) == SQUARE and rank == RANK:
        first = (256, 4096, 6404) if backward else (1, 16, 64, 256, 4096, 6404)
        return int(backward) if M in first else 5
    usual = (6404,) if (N, K) in VISION else (4096,) if backward else (1, 16, 256, 4096)
    return 3 if M in usual else 6


def _cpu_cases(quick: bool, compile_all: bool) -> Iterator[Case]:
    for dtype in (FP32, BF16):
        make = partial(layers_case, dtype=dtype, compiled=compile_all)
        small = [(1024, 1024)]
        for M in (16,) if quick else (1, 16, 128):
            yield make(LINEAR, M, small, compiled=compile_all or (M == 16 and dtype == FP32 and not quick))
        yield make(LINEAR, 16, small, storage="torchao")
        yield make(LINEAR, 16, small, backward=True)
        if quick:
            continue
        # Without hardware for bf16 products a call with its backward takes 2 s at 16 tokens and 18 s at 128.
        slow = dtype == BF16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
        for M, backward in product((1, 16, 128), (False, True)):
            if M == 128 and backward and slow:
                continue
            yield make(LINEAR, M, [SQUARE], backward=backward, priority=int(backward))  # the slow ones last
        yield make(LINEAR, 128, small, backward=True)
        yield make(PLAIN, 16, small, 0)
        for op, layers in ((LINEARS, small * 3), (SWIGLU, [(2048, 1024), (2048, 1024), (1024, 2048)]), (DENSE, small)):
            yield make(op, 16, layers, backward=True)
        for storage in ("bitsandbytes", "torchao"):
            yield dequantize_case(1024, 1024, storage, dtype, compile_all)


cases = by_device(_gpu_cases, _cpu_cases)


@dataclass(frozen=True)
class Op:
    """What is timed: fastfuse's function, and the same put together from single layers as a peer runs them."""

    name: str
    ours: Callable[[Tensor, list[tuple]], Tensors]  # x, layers as (weight, A, B, scaling)
    composed: Callable[[Linear, Tensor, list[tuple]], Tensors]
    # Bytes that the costs of its layers count and the op need not move, forward and backward. x, h: bytes of x and of the first output; n: layers.
    unmoved: Callable[[int, int, int], tuple[int, int]] = lambda x, h, n: (0, 0)


def _each(linear: Linear, x: Tensor, layers: list[tuple]) -> Tensors:
    return tuple(linear(x, *layer) for layer in layers)


def _swiglu(linear: Linear, x: Tensor, layers: list[tuple]) -> Tensors:
    gate, up, down = layers
    return (linear(F.silu(linear(x, *gate)) * linear(x, *up), *down),)


LINEAR = Op("nf4_lora_linear", lambda x, layers: (ops.nf4_lora_linear(x, *layers[0]),), _each)
PLAIN = Op("nf4_linear", lambda x, layers: (ops.nf4_linear(x, layers[0][0]),), _each)
DENSE = Op("lora_linear", lambda x, layers: (ops.lora_linear(x, *layers[0]),), _each)
DROPOUT = Op("nf4_lora_linear", lambda x, layers: (ops.nf4_lora_linear(x, *layers[0], dropout_p=DROPOUT_P, training=True),), _each)
# x is read once and its gradient written once.
LINEARS = Op("nf4_lora_linears", lambda x, layers: tuple(ops.nf4_lora_linears(x, layers)), _each, lambda x, h, n: ((n - 1) * x, 2 * (n - 1) * x))
# Nor do gate(x), up(x), their product and the gradients of the three have to exist outside the chip.
SWIGLU = Op("nf4_swiglu_mlp", lambda x, layers: (ops.nf4_swiglu_mlp(x, *layers),), _swiglu, lambda x, h, n: (x + 3 * h, 2 * x + 4 * h))


def layers_case(
    op: Op,
    M: int,
    sizes: Sequence[tuple[int, int]],
    rank: int = RANK,
    dtype: torch.dtype = BF16,
    storage: str = "bitsandbytes",
    lora_dtype: torch.dtype | None = None,
    backward: bool = False,
    compiled: bool = False,
    priority: int = 0,
) -> Case:
    """sizes: (N, K) of each layer. With backward=True the gradients of x and of every A and B as well, timed together with the forward."""
    lora_dtype = lora_dtype or dtype
    K, out = sizes[0][1], [N for N, _ in sizes] if op.composed is _each else [sizes[-1][0]]
    if op is DENSE:
        storage = "dense"
        reference, true, peers = dense_eager, wide_dense_eager, dense_peers(compiled)
    elif op is DROPOUT:  # a peer's mask is another one: its result cannot be judged
        reference, true, peers = _dropout_eager, _dropout_eager, {}
    else:
        reference = true = eager
        peers = nf4_peers(dtype, storage, bool(rank), lora_dtype != dtype, compiled)
    finish = partial(with_backward, leaves=_leaves) if backward else torch.no_grad()
    providers: dict[str, Run | None] = {OURS: finish(lambda i: op.ours(i["x"], _tuples(i, "weight")))}
    for name, peer in ({EAGER: Peer("weight", reference)} | peers).items():
        providers[name] = finish(_provider(op, peer)) if peer.available else None

    def make(device, seed):
        torch.manual_seed(seed)
        inputs = {"x": torch.randn(M, K, dtype=dtype, device=device, requires_grad=backward)}
        for n, size in enumerate(sizes):
            inputs[f"layer {n}"] = random_layer(*size, rank, storage, dtype, device, backward, lora_dtype)
        if backward:
            inputs |= {f"dy {n}": torch.randn(M, N, dtype=dtype, device=device) for n, N in enumerate(out)}
        return inputs

    Ns = "+".join(str(N) for N, _ in (sizes[:1] if op is SWIGLU else sizes))
    of_adapter = rank and f"R{rank}", storage, lora_dtype != dtype and f"{short(lora_dtype)} A,B", op is DROPOUT and f"dropout {DROPOUT_P}"
    shape = words(f"M{M} N{Ns} K{K}", *of_adapter)
    truth = in_double(finish(_provider(op, Peer("weight", true))))
    own = {name: _with_torchao_weights for name, peer in peers.items() if peer.weight == "torchao" and storage != "torchao"}
    return Case(op.name + (" fwd+bwd" if backward else ""), shape, dtype, make, providers, truth, partial(_cost, op, backward), priority, own)


def _dropout_eager(x: Tensor, weight: NF4View, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """Draws its seed as the op does: from one state of the generator both have one mask."""
    seed = torch.randint(2**62, (1,), device=x.device)[0]
    return nf4_linear_ref(x, weight, a, b, scaling, seed=seed, dropout_p=DROPOUT_P)


def dequantize_case(N: int, K: int, storage: str, dtype: torch.dtype, compiled: bool, priority: int = 0) -> Case:
    def decoded(i, by=nf4_dequantize_ref, dtype=dtype):
        return (by(i["layer"].weight, dtype),)

    providers: dict[str, Run | None] = {OURS: partial(decoded, by=ops.nf4_dequantize), EAGER: decoded}
    providers[storage] = (lambda i: (dequantize(i["layer"], storage),)) if installed(storage) else None
    if compiled:
        providers["torch.compile"] = partial(decoded, by=compile_once(nf4_dequantize_ref))

    def make(device, seed):
        torch.manual_seed(seed)
        return {"layer": random_layer(N, K, 0, storage, dtype, device)}

    truth = partial(decoded, dtype=torch.float64)
    return Case("nf4_dequantize", f"N{N} K{K} {storage}", dtype, make, providers, truth, lambda i: nf4_dequantize_cost(i["layer"].weight, dtype), priority)


def _layers(inputs: dict) -> list[Layer]:
    return [value for value in inputs.values() if isinstance(value, Layer)]


def _leaves(inputs: dict) -> list[Tensor]:
    return [inputs["x"], *(t for layer in _layers(inputs) for t in (layer.lora_a, layer.lora_b))]


def _tuples(inputs: dict, weight: str) -> list[tuple]:
    """weight: in which form."""
    return [(getattr(layer, weight), layer.lora_a, layer.lora_b, layer.scaling) for layer in _layers(inputs)]


def _provider(op: Op, peer: Peer) -> Run:
    run = partial(op.composed, peer.linear)
    if peer.compiled:
        run = compile_once(run)
    return lambda i: run(i["x"], _tuples(i, peer.weight))


def _with_torchao_weights(inputs: dict) -> dict:
    return {name: replace(value, weight=value.torchao_weight) if isinstance(value, Layer) else value for name, value in inputs.items()}


def _cost(op: Op, backward: bool, inputs: dict) -> Cost:
    x, layers = inputs["x"], _layers(inputs)
    calls = [(x.new_empty(x.shape[0], layer.weight.shape[1]), layer.weight, layer.lora_a, layer.lora_b) for layer in layers]
    passes = (nf4_linear_cost, nf4_linear_bwd_cost)[: 1 + backward]
    whole = cost_of(partial(cost, *call) for call in calls for cost in passes)
    unmoved = op.unmoved(x.nbytes, x.shape[0] * layers[0].weight.shape[0] * x.element_size(), len(layers))
    return Cost(whole.bytes - sum(unmoved[: 1 + backward]), whole.flops)
