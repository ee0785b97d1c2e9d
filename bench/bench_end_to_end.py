"""A QLoRA training step and decoding of Llama-3.2-Vision 11B, in transformers, PEFT and bitsandbytes, as it is and patched.

python -m bench.bench_end_to_end --out DIR [--size 11b|quick|tiny] [--device cuda|cpu] [--compile]
pytest bench/bench_end_to_end.py

Writes results.jsonl, a row as soon as it is measured, and summary.txt.
"""

import contextlib
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn

import fastfuse
from bench import arguments, harness, mllama
from bench.harness import PATCHED, UNPATCHED, Case, Run, Tensors, cpu_us, cuda_event_us, timed, warm_up
from bench.mllama import FULL, RANK, SIZES, TINY, Size

PACKAGES = ("transformers", "peft", "bitsandbytes")
SETTLED = 4  # tokens after which a token takes what the next one does: compiled decoding records its graph in the first ones


test_end_to_end = timed


def cases(device: str, quick: bool, compile_all: bool) -> Iterator[Case]:
    """None where one of the three libraries is missing: nothing is left to compare."""
    if all(harness.installed(package) for package in PACKAGES):
        yield from cases_of(SIZES["tiny" if device == "cpu" else "quick" if quick else "11b"], compile_all)


def cases_of(size: Size, compile_all: bool = False) -> Iterator[Case]:
    if size is TINY:
        yield decode_case(size, 1, 16, 12, compile_all)
        yield step_case(size, 1, 24, compile_all)
        yield step_case(size, 1, 24, compile_all, checkpointed=True)
        return
    compiled = compile_all or size is FULL
    yield decode_case(size, 1, 64, 32, compiled)
    yield step_case(size, 1, 512, compiled)
    if size is FULL:
        yield step_case(size, 1, 2048, compile_all, checkpointed=True)
        yield decode_case(size, 8, 64, 32, compile_all)


def step_case(size: Size, b: int, text: int, compiled: bool, checkpointed: bool = False) -> Case:
    """Forward, loss, backward and AdamW over the adapters."""

    def make(of, device, seed):
        model = mllama.build(of, device, seed).train()
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        batch = mllama.batch(of, b, text, device, seed)
        ids = batch["input_ids"]
        return {"model": model, "batch": batch | {"labels": ids.masked_fill(ids == of.vocab, -100)}}

    ways = _ways(_step, compiled and Way(_step, compiled=_layers_compiled))
    shape = f"{size.name} b{b} {text} tokens 1 image R{RANK}{' checkpointed' if checkpointed else ''}"

    def truth(i):
        return _step(i | {"model": mllama.exact(i["model"])})

    return _case("qlora_step", shape, size, ways, make, make, truth, lambda _: mllama.step_cost(size, b, text), _time_steps, b * text)


def decode_case(size: Size, b: int, prompt: int, new: int, compiled: bool) -> Case:
    """One token of greedy generation, adapters attached, halfway through `new` of them."""

    def make(of, device, seed):
        model, batch = mllama.build(of, device, seed), mllama.batch(of, b, prompt, device, seed)
        return {"model": model, "batch": batch, "new": new}

    def make_judged(of, device, seed):
        # Tokens given beforehand: the best two of random logits may lie nearer than rounding, and all later ones would be of another text.
        made = make(of, device, seed)
        return made | {"new": 4, "forced": torch.randint(2, of.vocab, (b, 4)).to(device)}

    def truth(i):
        # Text by text: in float64 the vision encoder holds all of its scores, 5 GB for an image of 4 tiles of 560 pixels.
        model = mllama.exact(i["model"])
        each = [i | {"model": model, "batch": {k: t[n : n + 1] for k, t in i["batch"].items()}, "forced": i["forced"][n : n + 1]} for n in range(b)]
        return (torch.cat([_decode(one)[0] for one in each]),)

    ways = _ways(_decode, compiled and Way(_decode_compiled, compiled=_fresh_compiler))
    shape = f"{size.name} b{b} {prompt}+{new} tokens 1 image R{RANK}"
    return _case("decode", shape, size, ways, make, make_judged, truth, lambda _: mllama.decode_cost(size, b, prompt + new // 2), _time_decoding, b)


def _case(op, shape, size, ways, make, make_judged, truth, cost, timer, tokens) -> Case:
    """Judged on mllama.judged(size), timed on the size itself. The models are made by make(size, device, seed)."""

    def judged(device, seed):
        return {} if device == "meta" else make_judged(mllama.judged(size), device, seed)

    def timed_on(device):
        with _Memory(device) as memory:
            made = make(size, device, 0)
        return [made | {"bytes": memory.kept}]

    seconds = None if size.hidden <= TINY.hidden else 150 if len(ways) > 2 else 60  # two more ways to compile
    return Case(op, shape, mllama.DTYPE, judged, ways, truth, cost, 1, timed_on=timed_on, timer=timer, tokens=tokens, seconds=seconds)


@dataclass(frozen=True, eq=False)
class Way:
    """How a model is run: patched or not, and compiled by what."""

    run: Run
    patched: bool = False
    compiled: Callable[[nn.Module], contextlib.AbstractContextManager] | None = None

    def __call__(self, inputs: dict) -> Tensors:
        if self.compiled:
            torch.compiler.reset()  # what other ways compiled of the same layers counts towards the limit of recompilations
        with self.on(inputs["model"]):
            return self.run(inputs)

    @contextlib.contextmanager
    def on(self, model: nn.Module) -> Iterator[None]:
        """RuntimeError where a module ran its own forward after all: that would time something else."""
        with contextlib.ExitStack() as stack:
            if self.patched:
                stack.enter_context(fastfuse.patched(model, on_unsupported="raise"))
            if self.compiled:
                stack.enter_context(self.compiled(model))
            yield
            if self.patched and (fallbacks := fastfuse.status(model).fallbacks):
                raise RuntimeError(f"patched modules ran their own forward: {fallbacks}")


def _ways(run: Run, compiled: Way | None) -> dict[str, Way]:
    """compiled: the last ones."""
    ways = {UNPATCHED: Way(run), PATCHED: Way(run, patched=True)}
    return ways | ({f"{name} + torch.compile": replace(compiled, patched=name == PATCHED) for name in (PATCHED, UNPATCHED)} if compiled else {})


def _step(i: dict) -> Tensors:
    """Logits and the adapters' gradients."""
    out = i["model"](**i["batch"], use_cache=False)
    out.loss.backward()
    adapters = mllama.trainable(i["model"])
    grads = [p.grad for p in adapters]
    if "optimizer" in i:
        i["optimizer"].step()
    for p in adapters:
        p.grad = None
    return out.logits.detach(), *grads


def _decode(i: dict, **options) -> Tensors:
    """The tokens, or of those given beforehand the logits that lead to them."""
    model, forced = i["model"], i.get("forced")
    if forced is not None:
        options |= {"logits_processor": [partial(_force, forced, i["batch"]["input_ids"].shape[1])], "output_logits": True}
    out = model.generate(
        **i["batch"], max_new_tokens=i["new"], min_new_tokens=i["new"], do_sample=False, streamer=i.get("clock"), return_dict_in_generate=True, **options
    )
    return (out.sequences,) if forced is None else (torch.stack(out.logits, 1).to(model.lm_head.weight.dtype),)


def _force(forced: Tensor, prompt: int, ids: Tensor, scores: Tensor) -> Tensor:
    """A logits processor that lets one token through."""
    return torch.full_like(scores, -torch.inf).scatter(1, forced[:, ids.shape[1] - prompt, None], 0.0)


def _decode_compiled(i: dict) -> Tensors:
    """What generate compiles by itself on a GPU: a step over a static cache, in a CUDA graph."""
    from transformers import CompileConfig

    compiling = CompileConfig()
    compiling._compile_all_devices = True  # else on a GPU alone
    return _decode(i, cache_implementation="static", compile_config=compiling)


@contextlib.contextmanager
def _layers_compiled(model: nn.Module) -> Iterator[None]:
    """torch.compile for each decoder and encoder layer: five graphs serve 80 layers, and those that were judged serve the timed ones too."""
    layers = [m for m in model.modules() if type(m).__name__.endswith(("DecoderLayer", "EncoderLayer"))]
    for layer in layers:
        layer.compile(dynamic=False)
    try:
        with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):  # the other layers would run as they are, under this name
            yield
    finally:
        for layer in layers:
            layer._compiled_call_impl = None


@contextlib.contextmanager
def _fresh_compiler(model: nn.Module) -> Iterator[None]:
    """CUDA graphs keep memory: those of the judged model go before the timed one runs, and those of the timed one after.

    RuntimeError where generate saw a reason not to compile.
    """
    torch.compiler.reset()
    host = model.get_base_model()
    host.__dict__.pop("_compiled_call", None)
    try:
        yield
        if "_compiled_call" not in host.__dict__:
            raise RuntimeError("generate has not compiled")
    finally:
        torch.compiler.reset()


def _time_steps(way: Way, sets: list[dict]) -> tuple:
    """Every provider starts from the same adapters."""
    model, adapters = sets[0]["model"], mllama.trainable(sets[0]["model"])
    start = [p.detach().clone() for p in adapters]
    i = sets[0] | {"optimizer": torch.optim.AdamW(adapters, lr=1e-4, fused=True)}
    try:
        with way.on(model):
            if not adapters[0].is_cuda:
                return cpu_us(way.run, [i])
            with _Memory("cuda") as memory:
                warm_up(way.run, [i], 3)
                memory.forget_peak()  # compiling tries things out
                way.run(i)
            return cuda_event_us(way.run, [i], 7), "events", {"peak_bytes": i["bytes"] + memory.peak}
    finally:
        with torch.no_grad():
            for p, was in zip(adapters, start, strict=True):
                p.copy_(was)


def _time_decoding(way: Way, sets: list[dict]) -> tuple:
    """The host's clock from token to token: each is on the host before the next one's forward begins."""
    (i,), times = sets, []
    # generate takes it for a streamer, which is told of the prompt, then of every token
    clock = SimpleNamespace(put=lambda tokens: times.append(time.perf_counter()), end=lambda: None)
    device = i["batch"]["input_ids"].device.type
    with way.on(i["model"]), _Memory(device) as memory:
        way.run(i)
        memory.forget_peak()
        way.run(i | {"clock": clock})
    steps = [after - before for before, after in pairwise(times[1:])]  # the first is the prompt's
    return statistics.median(steps[SETTLED:]) * 1e6, "host clock", {"peak_bytes": i["bytes"] + memory.peak if device == "cuda" else None}


class _Memory:
    """What a block adds to the memory in use, by PyTorch's allocator: `kept` at its end, `peak` at most. Nothing on a CPU.

    Models of earlier cases and those that results are judged on may be there too, so only differences count.
    """

    kept = peak = 0

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"

    def __enter__(self) -> "_Memory":
        gc.collect()  # what went during the block would be taken off its own
        self.forget_peak()
        if self.cuda:
            self.before = torch.cuda.memory_allocated()
        return self

    def forget_peak(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()

    def __exit__(self, *_) -> None:
        if self.cuda:
            torch.cuda.synchronize()
            self.kept, self.peak = torch.cuda.memory_allocated() - self.before, torch.cuda.max_memory_allocated() - self.before


def main() -> int:
    from bench.all import run

    p = arguments(__doc__, compile="torch.compile in every case, not in two of 11b's")
    p.add_argument("--out", type=Path, required=True)
    p.add_argument("--size", choices=SIZES, help="11b on a GPU, else tiny")
    p.add_argument("--device", choices=("cuda", "cpu"))
    p.add_argument("--commit", help="recorded where the tree has no git folder")
    a = p.parse_args()
    a.out.mkdir(parents=True, exist_ok=True)
    if (a.out / "results.jsonl").exists():
        p.error(f"{a.out} holds results")
    a.deadline, a.resume, a.alone, device = float("inf"), False, True, a.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return run(a, device, list(cases_of(SIZES[a.size or ("11b" if device == "cuda" else "tiny")], a.compile)))


if __name__ == "__main__":
    sys.exit(main())
