"""What every demo shows: the model's size, two answers side by side, and which backend gave them."""

import gc
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import Progress
from torch import Tensor

from fastfuse.ops._cpu_library import library

REPEATS = 3  # timed runs of the prompt; the median is shown
QUESTION = range(5, 17)  # a prompt of fixed token ids: the weights are random, words would mean nothing


@dataclass(frozen=True)
class Size:
    """Llama 3.2 Vision's architecture at another size."""

    text_hidden: int
    text_mlp: int
    text_heads: int
    text_kv_heads: int
    text_layers: int
    vision_hidden: int
    vision_mlp: int
    vision_heads: int
    vision_layers: int
    tile: int
    vocab: int
    dtype: torch.dtype


CPU_SIZE = Size(256, 704, 4, 2, 4, 128, 512, 4, 2, 224, 1024, torch.float32)
GPU_SIZE = Size(4096, 14336, 32, 8, 4, 1280, 5120, 16, 4, 560, 128256, torch.bfloat16)  # the widths of the 11B model


@dataclass(frozen=True)
class Answer:
    logits: Tensor  # of the prompt
    tokens: list[int]
    margin: float  # the smallest lead of a chosen token over the next best
    prefill_s: float
    decode_s: float
    python_calls: int = 0  # that one generated token costs


def calls_per_token(generate: Callable[[int], object]) -> int:
    """Calls that one more token costs the host, of Python functions and of those written in C: three tokens' less two tokens'.

    generate: makes that many tokens. A profile function that was set is put back.
    """
    calls = {2: 0, 3: 0}
    generate(3)  # first calls prepare those that follow
    found = sys.getprofile()
    for n in calls:

        def count(frame, event: str, arg, n: int = n) -> None:
            calls[n] += event in ("call", "c_call")

        collects = gc.isenabled()
        gc.disable()  # a collection calls whatever watches for it
        sys.setprofile(count)
        try:
            generate(n)
        finally:
            sys.setprofile(found)
            if collects:
                gc.enable()
    return calls[3] - calls[2]


@torch.no_grad()
def timed_answer(
    prompt: Callable[[], Tensor], generate: Callable[..., tuple[list[int], Tensor]], tokens: int, caches: AbstractContextManager, progress: Progress,
    title: str, steps: int,
) -> Answer:  # fmt: skip
    """Logits of the prompt, then greedy generation.

    prompt: gives the logits. generate(n, tick): n tokens and their logits [b, n, v]; tick, which may be None, moves the progress bar.
    caches: entered for generation. steps: of the progress bar.
    """
    task = progress.add_task(title, total=steps)
    logits = prompt()  # compiles the kernels on a GPU, settles allocations on a CPU
    synchronize = torch.cuda.synchronize if logits.is_cuda else lambda: None
    progress.advance(task)
    times = []
    for _ in range(REPEATS):
        synchronize()
        start = time.perf_counter()
        logits = prompt()
        synchronize()
        times.append(time.perf_counter() - start)
        progress.advance(task)
    prefill = statistics.median(times)
    made, margin, decode, calls = [], float("inf"), 0.0, 0
    if tokens:
        with caches:
            start = time.perf_counter()
            made, chosen = generate(tokens, lambda: progress.advance(task))
            synchronize()
            decode = (time.perf_counter() - start - prefill) / max(tokens - 1, 1)
            calls = calls_per_token(lambda n: generate(n, None))
        best = chosen.float().topk(2).values
        margin = (best[..., 0] - best[..., 1]).min().item()
    progress.remove_task(task)
    return Answer(logits.float(), made, margin, prefill, decode, calls)


def print_model(console: Console, what: str, size: Size, rank: int) -> None:
    text, vision = f"{size.text_layers} text layers of width {size.text_hidden}", f"{size.vision_layers} + 1 vision layers of width {size.vision_hidden}"
    console.print(f"model        {what}, random weights: {text}, {vision}, LoRA rank {rank}, {size.dtype}")


def print_comparison(console: Console, before: Answer, after: Answer, back: Answer, undo: str) -> None:
    console.print(f"tokens       before {before.tokens}")
    console.print(f"             after  {after.tokens}")
    apart = (after.logits - before.logits).abs().max().item()
    if before.tokens == after.tokens:
        verdict = f"equal, all {len(before.tokens)}"
    else:
        first = next(i for i, (p, q) in enumerate(zip(before.tokens, after.tokens, strict=True)) if p != q)
        verdict = f"differ from token {first + 1} of {len(before.tokens)}"
    console.print(f"             {verdict}; the closest choice led by {before.margin:.2e}")
    console.print(f"logits       at most {apart:.2e} apart on a scale of {before.logits.abs().max().item():.2f}")
    console.print(f"{undo:<12} logits {'equal to the bit again' if torch.equal(back.logits, before.logits) else 'DIFFER from before'}")
    token = f", token {before.decode_s * 1e3:.1f} -> {after.decode_s * 1e3:.1f} ms" if len(before.tokens) > 1 else ""
    if before.python_calls:
        console.print(f"Python       a token costs {before.python_calls} calls before, {after.python_calls} after")
    console.print(f"time         prompt {before.prefill_s * 1e3:.1f} -> {after.prefill_s * 1e3:.1f} ms{token}")


def print_slice(console: Console, before: Answer, sliced: tuple[Answer, int]) -> None:
    answer, n = sliced
    apart = (answer.logits - before.logits).abs().max().item()
    console.print(f"interpreter  {n} modules of the first decoder layer as Triton kernels: logits {apart:.2e} apart, {answer.prefill_s:.1f} s")


def print_memory(console: Console, predicted: int, dense: int, measured: int) -> None:
    console.print(f"memory       predicted {predicted / 2**20:.1f} MiB of weights, measured {measured / 2**20:.1f} MiB; without NF4 {dense / 2**20:.1f} MiB")


def print_backend(console: Console, triton: bool) -> None:
    nf4 = f", NF4 in C ({library().instructions})" if library() else ""
    console.print(f"backend      {'Triton kernels' if triton else f'PyTorch{nf4}: no GPU found, and nothing here was measured on one'}")
