"""Cases of the NF4 ops: forward, forward with backward, and dequantization, over both storages."""

import functools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.harness import EAGER, OURS, Case, installed
from fastfuse.kernels.nf4 import BITSANDBYTES, TORCHAO
from fastfuse.ops import (
    nf4_dequantize,
    nf4_dequantize_cost,
    nf4_dequantize_ref,
    nf4_linear,
    nf4_linear_bwd_cost,
    nf4_linear_cost,
    nf4_linear_ref,
    nf4_lora_linear,
)
from fastfuse.ops._op import Cost
from fastfuse.quant.nf4 import NF4View

RANK, SCALING, BLOCK = 16, 2.0, 64
# The projections of an 8B Llama decoder, and the square ones of a ViT.
GPU_SHAPES = ((4096, 4096), (14336, 4096), (4096, 14336), (1280, 1280))
# 6404: four tiles of 1601 vision tokens.
GPU_TOKENS = (1, 16, 64, 256, 1024, 4096, 6404)


def cases(device: str, quick: bool, compile_all: bool) -> Iterator[Case]:
    yield from _gpu_cases(quick, compile_all) if device == "cuda" else _cpu_cases(quick, compile_all)


def _gpu_cases(quick: bool, compile_all: bool) -> Iterator[Case]:
    shapes, tokens = (GPU_SHAPES[:1], (1, 16, 256, 4096)) if quick else (GPU_SHAPES, GPU_TOKENS)
    for N, K in shapes:
        for storage in ("bitsandbytes", "torchao"):
            other = 0 if storage == "bitsandbytes" else 10  # both storages go through the same kernels
            yield dequantize_case(N, K, storage, torch.bfloat16, compile_all, priority=3 + other)
            for M in tokens:
                few = compile_all or (storage == "bitsandbytes" and (N, K) == (4096, 4096) and M in (1, 16, 4096))
                decode, train = M in (1, 16), M == 4096
                yield linear_case(M, N, K, storage, torch.bfloat16, few, priority=(1 if decode else 4) + other)
                if M >= 256:
                    yield linear_case(M, N, K, storage, torch.bfloat16, few, backward=True, priority=(2 if train else 5) + other)
                yield linear_case(M, N, K, storage, torch.bfloat16, compile_all, lora=False, priority=6 + other)


def _cpu_cases(quick: bool, compile_all: bool) -> Iterator[Case]:
    for dtype in (torch.float32, torch.bfloat16):
        for M in (16,) if quick else (1, 16, 128):
            yield linear_case(M, 1024, 1024, "bitsandbytes", dtype, compile_all or (M == 16 and dtype == torch.float32 and not quick))
        yield linear_case(16, 1024, 1024, "torchao", dtype, compile_all)
        if quick:
            continue
        yield linear_case(16, 4096, 4096, "bitsandbytes", dtype, compile_all)
        yield linear_case(128 if dtype == torch.float32 else 16, 1024, 1024, "bitsandbytes", dtype, compile_all, backward=True)
        yield linear_case(16, 1024, 1024, "bitsandbytes", dtype, compile_all, lora=False)
        for storage in ("bitsandbytes", "torchao"):
            yield dequantize_case(1024, 1024, storage, dtype, compile_all)


def linear_case(M: int, N: int, K: int, storage: str, dtype: torch.dtype, compiled: bool, lora: bool = True, backward: bool = False, priority: int = 0) -> Case:
    """y = x W^T (+ the LoRA delta); with backward=True the gradients of x, A and B as well, timed together with the forward."""
    forwards: dict[str, Callable | None] = {OURS: _fastfuse, EAGER: _eager}
    if compiled:
        forwards["torch.compile"] = _compiled(_eager)
    forwards[storage] = _HOSTS[storage] if installed(storage) else None
    finish = _with_backward if backward else torch.no_grad()
    providers = {name: forward and finish(_one(forward)) for name, forward in forwards.items()}
    rank = RANK if lora else 0
    op = ("nf4_lora_linear" if lora else "nf4_linear") + (" fwd+bwd" if backward else "")

    def make(device: str, seed: int) -> dict:
        torch.manual_seed(seed)
        inputs = {"x": torch.randn(M, K, dtype=dtype, device=device)} | _weight(N, K, storage, dtype, device)
        inputs["lora_a"] = inputs["lora_b"] = None
        if lora:
            inputs["lora_a"] = torch.randn(RANK, K, dtype=dtype, device=device) * K**-0.5
            inputs["lora_b"] = torch.randn(N, RANK, dtype=dtype, device=device) * 0.1
        if backward:
            inputs["dy"] = torch.randn(M, N, dtype=dtype, device=device)
            for leaf in ("x", "lora_a", "lora_b"):
                inputs[leaf].requires_grad_()
        return inputs

    def cost(inputs: dict) -> Cost:
        args = inputs["x"], inputs["weight"], inputs["lora_a"], inputs["lora_b"]
        forward = nf4_linear_cost(*args)
        if not backward:
            return forward
        back = nf4_linear_bwd_cost(*args)
        return Cost(forward.bytes + back.bytes, forward.flops + back.flops)

    shape = f"M{M} N{N} K{K}" + (f" R{rank}" if lora else "") + f" {storage}"
    return Case(op, shape, dtype, make, providers, functools.partial(_truth, finish(_one(_eager))), cost, priority)


def dequantize_case(N: int, K: int, storage: str, dtype: torch.dtype, compiled: bool, priority: int = 0) -> Case:
    providers: dict[str, Callable | None] = {
        OURS: _one(lambda i: nf4_dequantize(i["weight"], dtype)),
        EAGER: _one(lambda i: nf4_dequantize_ref(i["weight"], dtype)),
    }
    if compiled:
        providers["torch.compile"] = _one(_compiled(lambda i: nf4_dequantize_ref(i["weight"], dtype)))
    providers[storage] = _one(_HOST_DEQUANTIZE[storage]) if installed(storage) else None
    return Case(
        "nf4_dequantize",
        f"N{N} K{K} {storage}",
        dtype,
        lambda device, seed: _seeded(seed, _weight, N, K, storage, dtype, device),
        providers,
        lambda i: (nf4_dequantize_ref(i["weight"], torch.float64),),
        lambda i: nf4_dequantize_cost(i["weight"], dtype),
        priority,
    )


def _seeded(seed: int, make: Callable, *args) -> dict:
    torch.manual_seed(seed)
    return make(*args)


def _weight(N: int, K: int, storage: str, dtype: torch.dtype, device: str) -> dict:
    """Random bytes are a valid weight: scales lie in 0.03 .. 0.07, as those of weights with deviation 0.02 do.

    "host" gives the same tensors as the host library's own type, built on first use so that the library need not be there.
    """
    blocks = N * K // BLOCK
    packed = torch.randint(256, (N * K // 2,), dtype=torch.uint8, device=device)
    groups = -(-blocks // 256)
    if storage == "bitsandbytes":
        code = torch.tensor(BITSANDBYTES, device=device)
        index = torch.randint(256, (blocks,), dtype=torch.uint8, device=device)
        absmax = 0.01 + 0.01 * torch.rand(groups, device=device)
        scales = (index, torch.linspace(-1, 1, 256, device=device), absmax, torch.full((), 0.05, device=device))
    else:
        code = torch.tensor(TORCHAO, dtype=dtype, device=device)
        scaler = torch.randint(-128, 128, (blocks,), dtype=torch.int8, device=device)
        factor = (6400 + 6400 * torch.rand(groups, device=device)).to(dtype)
        scales = (scaler, factor, torch.full((), 0.05, dtype=dtype, device=device))
    view = NF4View(packed, code, scales, BLOCK, (N, K), dtype)
    return {"weight": view, "host": functools.cache(lambda: _AS_HOST[storage](view))}


def _as_bitsandbytes(view: NF4View):
    from bitsandbytes.functional import QuantState

    index, code, absmax, offset = view.scales
    nested = QuantState(absmax=absmax, code=code, blocksize=256, dtype=torch.float32)
    return view.packed.view(-1, 1), QuantState(
        absmax=index, shape=torch.Size(view.shape), code=view.code, blocksize=BLOCK, quant_type="nf4", dtype=view.dtype, offset=offset, state2=nested
    )


def _as_torchao(view: NF4View):
    try:
        from torchao.quantization.quantize_.workflows.nf4 import nf4_tensor
    except ImportError:
        from torchao.dtypes import nf4tensor as nf4_tensor
    N, K = view.shape
    meta = nf4_tensor.SubclassTensorArgs(torch.Size((N, K)), (K, 1), 0, view.dtype, view.device, False)
    return nf4_tensor.NF4Tensor(meta, BLOCK, N * K // BLOCK, view.scale_block, *view.scales, view.packed, nf4=view.code)


_AS_HOST = {"bitsandbytes": _as_bitsandbytes, "torchao": _as_torchao}


def _fastfuse(i: dict) -> Tensor:
    if i["lora_a"] is None:
        return nf4_linear(i["x"], i["weight"])
    return nf4_lora_linear(i["x"], i["weight"], i["lora_a"], i["lora_b"], SCALING)


def _eager(i: dict) -> Tensor:
    return nf4_linear_ref(i["x"], i["weight"], i["lora_a"], i["lora_b"], SCALING)


def _bitsandbytes(i: dict) -> Tensor:
    from bitsandbytes import matmul_4bit

    packed, state = i["host"]()
    return _add_delta(i, matmul_4bit(i["x"], packed, state))


def _torchao(i: dict) -> Tensor:
    return _add_delta(i, F.linear(i["x"], i["host"]()))


def _add_delta(i: dict, y: Tensor) -> Tensor:
    """The adapter as PEFT and torchtune run it."""
    return y if i["lora_a"] is None else y + F.linear(F.linear(i["x"], i["lora_a"]), i["lora_b"]) * SCALING


_HOSTS = {"bitsandbytes": _bitsandbytes, "torchao": _torchao}


def _dequantize_bitsandbytes(i: dict) -> Tensor:
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(*i["host"]())


_HOST_DEQUANTIZE = {"bitsandbytes": _dequantize_bitsandbytes, "torchao": lambda i: i["host"]().get_original_weight()}


def _compiled(fn: Callable[[dict], Tensor]) -> Callable[[dict], Tensor]:
    """torch.compile at the first call. What earlier cases compiled is dropped: many shapes of one function hit the recompile limit."""

    @functools.cache
    def build() -> Callable:
        torch.compiler.reset()
        return torch.compile(lambda tensors: fn(tensors), dynamic=False)

    return lambda i: build()({name: value for name, value in i.items() if name != "host"})


def _one(fn: Callable[[dict], Tensor]) -> Callable[[dict], tuple[Tensor]]:
    return lambda i: (fn(i),)


def _with_backward(forward: Callable[[dict], tuple[Tensor]]) -> Callable[[dict], tuple[Tensor, ...]]:
    def run(i: dict) -> tuple[Tensor, ...]:
        (y,) = forward(i)
        return y.detach(), *torch.autograd.grad(y, (i["x"], i["lora_a"], i["lora_b"]), i["dy"])

    return run


def _truth(run: Callable[[dict], tuple[Tensor, ...]], inputs: dict) -> tuple[Tensor, ...]:
    """The reference on float64 copies of the tensors; the weight is decoded to float64 without a rounding."""
    wide = dict(inputs)
    for name in ("x", "lora_a", "lora_b", "dy"):
        if isinstance(value := inputs.get(name), Tensor):
            wide[name] = value.detach().double().requires_grad_(value.requires_grad)
    return run(wide)
