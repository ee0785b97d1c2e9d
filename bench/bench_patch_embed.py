"""Patch embedding of Llama-3.2-Vision's tiles, and of a CLIP's images, against the modules it is made of.

pytest bench/bench_patch_embed.py
"""

import functools
import itertools
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.nn import functional as F

from bench.harness import EAGER, OURS, Case, compile_once
from bench.nf4_peers import double, short
from cases.embedding import Embedding, Size, eager, fused, torchtune
from fastfuse import tune
from fastfuse.models.llama3_2_vision._component_builders import ASPECT_RATIOS
from fastfuse.ops import patch_embed_bwd_cost, patch_embed_cost
from fastfuse.ops._op import Cost, nbytes

RATIOS = ((2, 2), (1, 3), (1, 1), (4, 1))  # (h, w), in turn: 12 of 16 tiles are no padding
CLIP = (Size(64, 1, 224, 32, 768, tables=None, norm=True), Size(64, 1, 224, 16, 768, tables=None, norm=True))

# What pick() chooses from, whatever it chooses: timed as providers of their own.
_CONSTANTS = {"BLOCK_M": 128, "BLOCK_N": 256, "BLOCK_K": 64, "SUBTILES": 4, "FLATTEN": True}
ROUTES = {
    "library": None,
    "gemm": tune.Tile(_CONSTANTS | {"DIRECT": False}, num_warps=8, num_stages=3),
    "gather": tune.Tile(_CONSTANTS | {"DIRECT": True}, num_warps=8, num_stages=3),
}


def test_patch_embed(case: Case, provider: str, time_case: Callable) -> None:
    time_case(case, provider)


def cases(device: str, quick: bool, compile_all: bool) -> Iterator[Case]:
    yield from _gpu_cases(quick, compile_all) if device == "cuda" else _cpu_cases(quick, compile_all)


def _gpu_cases(quick: bool, compile_all: bool) -> Iterator[Case]:
    make = functools.partial(embed_case, dtype=torch.bfloat16, routes=True)
    for images, backward in itertools.product((16,) if quick else (1, 4, 16), (False, True)):
        few = images == 16
        yield make(Size(images), backward=backward, compiled=compile_all or few, priority=0 if few else 2)
    for backward in (False, True):
        yield make(Size(16, norm=True), backward=backward, compiled=compile_all, priority=1)
        if quick:
            continue
        yield make(Size(4, tables="ids", norm=True, pad_tokens_to=8), backward=backward, compiled=compile_all, priority=2)
        for size in CLIP:
            yield make(size, backward=backward, compiled=compile_all, priority=3)
    if not quick:
        for pixels in (torch.float32, torch.uint8):
            yield make(Size(16), pixels=pixels, compiled=compile_all, priority=2)
    for backward in (False, True):
        yield conv_case(Size(16), torch.bfloat16, backward, priority=1)


def _cpu_cases(quick: bool, compile_all: bool) -> Iterator[Case]:
    for backward in (False, True):
        # 17 and 257 tokens a tile: in the cache, and far beyond it as 1601 are. There torchtune's scheme takes seconds a call.
        for pixels in (56,) if quick else (56, 224):
            yield embed_case(Size(16, pixels=pixels), torch.float32, backward=backward, compiled=compile_all, priority=int(pixels > 56))
        if not quick:
            yield embed_case(Size(16, pixels=56), torch.bfloat16, backward=backward, compiled=compile_all)
            yield conv_case(Size(16, pixels=56), torch.float32, backward)


def embed_case(
    size: Size,
    dtype: torch.dtype = torch.bfloat16,
    pixels: torch.dtype | None = None,
    backward: bool = False,
    compiled: bool = False,
    routes: bool = False,
    priority: int = 0,
) -> Case:
    """pixels: their dtype where it is another one. With backward=True the gradients of all parameters as well, timed together with the forward."""
    pixels = pixels or dtype
    finish = _with_backward if backward else torch.no_grad()
    providers = {OURS: finish(_provider(fused)), EAGER: finish(_provider(eager))}
    if routes:
        providers |= {f"fastfuse {name}": finish(_pinned(_provider(fused), tile)) for name, tile in ROUTES.items()}
    if size.tables == "grid":
        providers["torchtune"] = finish(_provider(torchtune))
    if compiled:
        providers["torch.compile"] = finish(_provider(compile_once(eager)))

    def make(device: str, seed: int) -> dict:
        torch.manual_seed(seed)
        shape = (size.images, size.tiles, 3, size.pixels, size.pixels)
        ratios = [RATIOS[n % len(RATIOS)] if size.tables else (1, 1) for n in range(size.images)]
        inputs = {
            "embedding": Embedding(size, dtype, device),
            "images": _pixels(shape, pixels, device),
            "aspect_ratio": torch.tensor(ratios, device=device),
        }
        if size.tables == "ids":
            inputs["ids"] = torch.tensor([1 + ASPECT_RATIOS.index(ratio) for ratio in ratios], device=device)
        if backward:
            inputs["dy"] = torch.randn(size.images, size.tiles, size.tokens, size.D, dtype=dtype, device=device)
        return inputs

    name = str(size) if pixels == dtype else f"{size} {'uint8' if pixels == torch.uint8 else short(pixels)} pixels"
    op = "patch_embed" + (" fwd+bwd" if backward else "")
    return Case(op, name, dtype, make, providers, functools.partial(_truth, finish(_provider(eager))), functools.partial(_cost, backward), priority)


def conv_case(size: Size, dtype: torch.dtype, backward: bool, priority: int = 0) -> Case:
    """The convolution alone, which patch_embed contains: no provider of a whole embedding is compared with it, and there is no fastfuse in it."""

    def run(i: dict) -> tuple[Tensor, ...]:
        y = F.conv2d(i["images"], i["weight"], stride=size.patch)
        return (y.detach(), *torch.autograd.grad(y, i["weight"], i["dy"])) if backward else (y,)

    def make(device: str, seed: int) -> dict:
        torch.manual_seed(seed)
        tiles, side = size.images * size.tiles, size.pixels // size.patch
        weight = torch.randn(size.D, 3, size.patch, size.patch, dtype=dtype, device=device) * (3 * size.patch**2) ** -0.5
        inputs = {"images": _pixels((tiles, 3, size.pixels, size.pixels), dtype, device), "weight": weight.requires_grad_(backward)}
        return inputs | ({"dy": torch.randn(tiles, size.D, side, side, dtype=dtype, device=device)} if backward else {})

    def cost(i: dict) -> Cost:
        out = i["images"].shape[0] * (size.pixels // size.patch) ** 2
        passes = 1 + backward
        n_bytes = passes * (nbytes(i["images"], i["weight"]) + out * size.D * dtype.itemsize)
        return Cost(n_bytes, passes * 2 * out * i["weight"].numel())

    name = f"{size.images * size.tiles} tiles {size.pixels}px P{size.patch} D{size.D}"

    def truth(i: dict) -> tuple[Tensor, ...]:
        return run({name: double(t) for name, t in i.items()})

    return Case("conv2d alone" + (" fwd+bwd" if backward else ""), name, dtype, make, {EAGER: run}, truth, cost, priority)


def _pixels(shape: tuple[int, ...], dtype: torch.dtype, device: str) -> Tensor:
    return torch.randint(256, shape, dtype=dtype, device=device) if dtype == torch.uint8 else torch.randn(shape, dtype=dtype, device=device)


def _provider(run: Callable[..., Tensor]) -> Callable[[dict], tuple[Tensor, ...]]:
    return lambda i: (run(i["embedding"], i["images"], i["aspect_ratio"], i.get("ids")),)


def _pinned(run: Callable[[dict], tuple[Tensor, ...]], tile: tune.Tile | None) -> Callable[[dict], tuple[Tensor, ...]]:
    def pinned(i: dict) -> tuple[Tensor, ...]:
        with tune.pin("patch_embed", tile):
            return run(i)

    return pinned


def _with_backward(forward: Callable[[dict], tuple[Tensor, ...]]) -> Callable[[dict], tuple[Tensor, ...]]:
    def run(i: dict) -> tuple[Tensor, ...]:
        (y,) = forward(i)
        grads = torch.autograd.grad(y, list(i["embedding"].parameters()), i["dy"])
        # The gates are judged together: of one number alone either side may be right by luck.
        gates = [g for g in grads if g.numel() == 1]
        return y.detach(), *(g for g in grads if g.numel() > 1), *([torch.cat(gates)] if gates else [])

    return run


def _truth(run: Callable[[dict], tuple[Tensor, ...]], inputs: dict) -> tuple[Tensor, ...]:
    """The modules on float64 copies of everything."""
    wide = {name: double(t) for name, t in inputs.items() if name in ("images", "dy") and t.is_floating_point()}
    return run(inputs | wide | {"embedding": inputs["embedding"].double_copy()})


def _cost(backward: bool, inputs: dict) -> Cost:
    e, places = inputs["embedding"], ("local_pos", "global_pos", "pre_pos")
    tables = {name: t for name, t in e.tables().items() if name in places}
    costs = [cost(inputs["images"], e.conv.weight, e.cls.weight, **tables, pad_tokens_to=e.pad_tokens_to) for cost in (patch_embed_cost, patch_embed_bwd_cost)]
    return Cost(sum(c.bytes for c in costs[: 1 + backward]), sum(c.flops for c in costs[: 1 + backward]))
