"""Time a case against its floor: the least time the device allows for the bytes and flops the case declares.

python -m bench.harness FILE           print the table of a file of rows
python -m bench.harness FILE --keep    and append its rows to bench/results/<device>.jsonl
"""

import contextlib
import datetime
import importlib.metadata
import importlib.util
import itertools
import json
import math
import pkgutil
import re
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

import bench
from bench import arguments
from bench.peaks import Peaks, clocks, device_name, event_ms, output_of
from fastfuse.ops._op import Cost
from tests.numerics import allowed_error, in_several_orders, max_error

ROOT = Path(__file__).parent.parent
RESULTS = Path(__file__).parent / "results"
OURS, EAGER = "fastfuse", "eager"
PACKAGES = ("torch", "triton", "bitsandbytes", "peft", "torchao", "transformers")  # a row says which versions it was measured with
PATCHED, UNPATCHED = "patched", "unpatched"  # the same where somebody's whole model is timed
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32

DType = torch.dtype
Tensors = tuple[Tensor, ...]
Run = Callable[[dict], Tensors]  # a provider, or the truth: of a case's inputs


@dataclass(frozen=True, eq=False)
class Case:
    """One op at one shape: what to run, what it must give, and what it must at least cost."""

    op: str
    shape: str
    dtype: DType
    make: Callable[[str, int], dict]  # device, seed -> inputs; device "meta" gives the shapes alone
    providers: Mapping[str, Run | None]  # OURS, EAGER and peers; None: not installed
    truth: Run  # in float64
    cost: Callable[[dict], Cost]
    priority: int = 0  # lower is measured earlier
    # Provider -> the inputs it is judged on, made of the case's, where its library cannot hold the case's own.
    judged_on: Mapping[str, Callable[[dict], dict]] = field(default_factory=dict)
    timed_on: Callable[[str], list[dict]] | None = None  # device -> input sets to time, where none that make() gives: these have no truth
    timer: "Timer | None" = None  # where cuda_us and cpu_us do not fit
    tokens: int | None = None  # of text, that a call takes in or gives out
    seconds: float | None = None  # what a run gives it at most, if not what it gives any case

    @property
    def key(self) -> tuple[str, str, str]:
        return self.op, self.shape, dtype_name(self.dtype)


def dtype_name(dtype: DType) -> str:
    return str(dtype).removeprefix("torch.")


def words(*parts: object) -> str:
    """Those that are there, apart by a space."""
    return " ".join(filter(None, parts))


def installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def timed(case: Case, provider: str, time_case: Callable) -> None:
    """What pytest runs of every provider of a module's cases: see conftest.py."""
    time_case(case, provider)


def by_device(gpu: Callable, cpu: Callable) -> Callable[[str, bool, bool], Iterator[Case]]:
    """A module's cases(device, quick, compile_all), of what makes those of a GPU and those of a CPU."""
    return lambda device, *asked: (gpu if device == "cuda" else cpu)(*asked)


def all_cases(device: str, quick: bool = False, compile_all: bool = False) -> list[Case]:
    """The cases of every bench/bench_*.py, most important first."""
    names = sorted(m.name for m in pkgutil.iter_modules(bench.__path__) if m.name.startswith("bench_"))
    return in_order(case for name in names for case in importlib.import_module(f"bench.{name}").cases(device, quick, compile_all))


def in_order(cases: Iterable[Case]) -> list[Case]:
    return sorted(cases, key=lambda case: case.priority)


def floor_us(cost: Cost, peaks: Peaks, dtype: DType) -> float:
    return max(cost.bytes / peaks.bytes_per_s * 1e6, cost.flops / peaks.flops_per_s[dtype_name(dtype)] * 1e6, peaks.launch_us)


def compile_once(fn: Callable) -> Callable:
    """torch.compile at the first call. What earlier cases compiled is dropped: many shapes of one function hit the recompile limit."""

    @cache
    def build():
        torch.compiler.reset()
        return torch.compile(lambda *args: fn(*args), dynamic=False)

    return lambda *args: build()(*args)


def with_backward(forward: Run, leaves: Callable[[dict], Sequence[Tensor]]) -> Run:
    """The results, and the leaves' gradients for those of the results that the inputs hold: their names start with "dy"."""

    def run(i):
        ys = forward(i)
        return *(y.detach() for y in ys), *torch.autograd.grad(ys, leaves(i), [t for name, t in i.items() if name.startswith("dy")])

    return run


def in_double(run: Run) -> Run:
    """The truth: of float64 copies of tensors, and of what has a double_copy() of its own. NF4 is decoded to float64 without a rounding."""

    def truth(i):
        return run({name: value.double_copy() if hasattr(value, "double_copy") else double(value) for name, value in i.items()})

    return truth


def double(t: Tensor) -> Tensor:
    return t.detach().double().requires_grad_(t.requires_grad) if t.is_floating_point() else t


def cost_of(passes: Iterable[Callable[..., Cost]], *args, **options) -> Cost:
    """Of all the passes together."""
    costs = [cost(*args, **options) for cost in passes]
    return Cost(sum(c.bytes for c in costs), sum(c.flops for c in costs))


class Parity:
    """Inputs of a case with their float64 truth: tells whether a provider computes what it is timed for.

    The error of each output may be twice that of the eager reference in the same dtype, the worst of several orders of summation, plus one ulp of
    the largest value. ratio() is the worst error over that limit; NaN, a wrong shape and a wrong dtype never pass.
    """

    def __init__(self, case: Case, device: str) -> None:
        self.case = case
        self.inputs = case.make(device, 0)
        self._limits = {None: self._limits_on(self.inputs)}

    def _limits_on(self, inputs: dict) -> list[tuple]:
        """The truth of each output, its dtype and its largest error."""
        eager = self.case.providers.get(EAGER) or self.case.providers[UNPATCHED]
        orders = zip(*in_several_orders(_seeded, eager, inputs), strict=True)
        return [(true, outs[0].dtype, allowed_error(outs, true)) for outs, true in zip(orders, _seeded(self.case.truth, inputs), strict=True)]

    def ratio(self, provider: str) -> float:
        outputs = _seeded(self.case.providers[provider], self.inputs)
        change = self.case.judged_on.get(provider)
        if change not in self._limits:
            self._limits[change] = self._limits_on(change(self.inputs))
        ratios = [
            max_error(out, true) / limit if (out.shape, out.dtype) == (true.shape, dtype) else math.inf
            for out, (true, dtype, limit) in zip(outputs, self._limits[change], strict=True)
        ]
        return math.inf if any(map(math.isnan, ratios)) else max(ratios)


def _seeded(fn: Run, inputs: dict) -> Tensors:
    """What draws a dropout mask draws the same one as the truth."""
    torch.manual_seed(0)
    return fn(inputs)


def warm_up(fn: Run, sets: list[dict], calls: int) -> None:
    """At least `calls` calls, and one on every set: a peer may build what it needs of a set at its first use."""
    for i in range(max(calls, len(sets))):
        fn(sets[i % len(sets)])


def cuda_us(fn: Run, sets: list[dict], budget_ms: float = 60.0) -> tuple[float, str]:
    """Median time of one call with a cold L2, and how it was taken.

    One graph holds a call on every input set in turn, so a replay has no launch gaps from Python, and between two
    uses of a set all the others have passed through the L2: input_sets() makes enough of them. A flush between
    calls would have to lie inside the timed region, or leave one short kernel alone between two events.
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        warm_up(fn, sets, 3)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=stream):
            for inputs in sets:
                fn(inputs)
    except RuntimeError:  # something in fn waits for the device, which a graph cannot hold
        torch.cuda.synchronize()
        return cuda_event_us(fn, sets), "events"
    once = min(event_ms(graph.replay, 1) + event_ms(graph.replay, 1))
    times = event_ms(graph.replay, max(5, min(200, int(budget_ms / max(once, 1e-3)))))
    return statistics.median(times) * 1e3 / len(sets), "cuda graph"


def cuda_event_us(fn: Run, sets: list[dict], repeats: int = 30) -> float:
    """Without a graph: the L2 is overwritten before each call. Host time shows wherever the device outruns it."""
    flush = torch.empty(2 * _l2_bytes(), dtype=torch.uint8, device="cuda")
    turns = itertools.cycle(sets)
    return statistics.median([event_ms(lambda: fn(next(turns)), 1, flush.zero_)[0] for _ in range(repeats)]) * 1e3


def cpu_us(fn: Run, sets: list[dict], budget_s: float = 0.25) -> tuple[float, str]:
    """Median of repeats after a warm-up, rotating over the same input sets as on a GPU."""
    times = []
    for inputs in itertools.islice(itertools.cycle(sets), cpu_repeats(fn, sets, budget_s)):
        start = time.perf_counter()
        fn(inputs)
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e6, "host clock"


def cpu_repeats(fn: Run, sets: list[dict], budget_s: float = 0.25) -> int:
    """Warm up, and tell how many calls fill the time. Three at least: a bf16 product without hardware for it takes seconds."""
    warm_up(fn, sets[1:] or sets, 1)
    start = time.perf_counter()
    fn(sets[0])  # not its first call: parity was
    return max(3, min(200, int(budget_s / (time.perf_counter() - start))))


def input_sets(case: Case, device: str, first: dict) -> list[dict]:
    """Independent inputs, three times the L2 in all, at least two: see cuda_us. On a CPU two."""
    if case.timed_on:
        return case.timed_on(device)
    if device != "cuda":
        return [first, case.make(device, 1)]
    size = sum(value.nbytes for value in first.values() if hasattr(value, "nbytes"))
    n = min(256, max(2, math.ceil(3 * _l2_bytes() / size)))
    return [first, *(case.make(device, seed) for seed in range(1, n))]


def _l2_bytes() -> int:
    return torch.cuda.get_device_properties().L2_cache_size


Timer = Callable[[Callable, list[dict]], tuple]  # us, how it was taken, and a dict of what else belongs into the row


def measure(case: Case, device: str, peaks: Peaks, environment: Mapping) -> Iterator[dict]:
    """A row for every provider, as soon as it is measured. What raises becomes a row with "error"."""
    base = row_base(case, peaks, environment)
    try:
        parity = Parity(case, device)
        sets = input_sets(case, device, parity.inputs)
    except Exception as error:
        for provider in case.providers:
            yield base | {"provider": provider, "error": f"preparing the case: {describe_error(error)}"}
        return
    base["clocks"] = clocks(device)  # here the device has just worked: an idle one would show its idle clocks
    for provider in case.providers:
        yield base | measure_provider(case, provider, parity, sets, case.timer or (cuda_us if device == "cuda" else cpu_us))


def measure_provider(case: Case, provider: str, parity: Parity, sets: list[dict], timer: Timer) -> dict:
    """The part of a row that depends on the provider. Parity comes first: a wrong result has a time but no speed-up."""
    row: dict = {"provider": provider}
    fn = case.providers[provider]
    if fn is None:
        return row | {"note": "not installed"}
    try:
        ratio = parity.ratio(provider)
        row |= {"parity": ratio <= 1, "error_over_limit": round(ratio, 3) if math.isfinite(ratio) else None}
        us, timing, *more = timer(fn, sets)
    except Exception as error:
        return row | {"error": describe_error(error)}
    return row | {"us": round(us, 3), "timing": timing, **(more[0] if more else {})}


def describe_error(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip()[:300]}"


def row_base(case: Case, peaks: Peaks, environment: Mapping) -> dict:
    """What all rows of a case share; the date tells its runs apart. us, parity and clocks are None until measured."""
    op, shape, dtype = case.key
    cost = case.cost(case.make("meta", 0))
    floor = {"floor_us": round(floor_us(cost, peaks, case.dtype), 3), "floor_from": peaks.source, "bytes": cost.bytes, "flops": cost.flops}
    measured = {"us": None, "parity": None, "clocks": None}
    model = {"tokens": case.tokens, "peak_bytes": None} if case.tokens else {}
    return {"op": op, "shape": shape, "dtype": dtype, **floor, **measured, **model, **environment, "date": now()}


def now() -> str:
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")


@cache
def environment(device: str, commit: str | None = None) -> dict:
    """Where and with what rows were measured. commit: for a tree that was copied without its git folder."""
    sha = output_of(["git", "rev-parse", "HEAD"])
    changes = output_of(["git", "status", "--porcelain"])
    dirty = None if changes is None else bool(changes)
    return {"device": device_name(device), "device_type": device, "commit": sha or commit, "dirty": dirty} | {p: _version(p) for p in PACKAGES}


def _version(package: str) -> str | None:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(package)


def append(rows: Iterable[Mapping], folder: Path = RESULTS) -> None:
    """Add rows to <folder>/<device>.jsonl. Nothing already there is touched."""
    folder.mkdir(parents=True, exist_ok=True)
    for row in rows:
        with open(folder / f"{file_stem(row['device'])}.jsonl", "a") as f:
            f.write(json.dumps(row) + "\n")


def file_stem(device: str) -> str:
    """A device's name in the files about it."""
    return re.sub(r"\W+", "_", device).strip("_")


def read(file: Path) -> list[dict]:
    """Rows of a file; a last line cut short by an interruption is left out."""
    rows = []
    for line in file.read_text().splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(json.loads(line))
    return rows


def table(rows: Iterable[Mapping]) -> str:
    """A line per row. The last column says how many times faster fastfuse is than the row's provider, if both are right.

    Of a whole model fastfuse is the provider "patched"; its rows end in tokens per second and peak memory.
    """
    groups: dict[tuple, list[Mapping]] = {}
    for row in rows:
        groups.setdefault((row["op"], row["shape"], row["dtype"], row["device"], row["date"]), []).append(row)
    lines = [f"{'op':24} {'shape':48} {'dtype':8} {'provider':25} {'median us':>11} {'floor us':>10} {'% of floor':>10}  fastfuse is"]
    for (op, shape, dtype, *_), group in groups.items():
        ours = next((r for r in group if is_ours(r["provider"]) and r["parity"] and r["us"]), None)
        for r in group:
            us = f"{r['us']:11.2f}" if r["us"] else f"{'-':>11}"
            percent = f"{100 * r['floor_us'] / r['us']:9.1f}%" if r["us"] else f"{'-':>10}"
            end = f"{r['us'] / ours['us']:.2f}x as fast" if ours and r is not ours and r["parity"] and r["us"] else _remark(r)
            lines.append(f"{op:24} {shape:48} {dtype:8} {r['provider']:25} {us} {r['floor_us']:10.2f} {percent}  {end}{_of_a_model(r)}".rstrip())
    return "\n".join(lines)


def is_ours(provider: str) -> bool:
    return provider in (OURS, PATCHED)


def _of_a_model(row: Mapping) -> str:
    if not (row.get("tokens") and row["us"]):
        return ""
    peak = f", {row['peak_bytes'] / 2**30:.2f} GiB" if row.get("peak_bytes") else ""
    return f"  {row['tokens'] / row['us'] * 1e6:.4g} tokens/s{peak}"


def _remark(row: Mapping) -> str:
    if row.get("error"):
        return f"ERROR {row['error'].splitlines()[0][:120]}"
    if row["parity"] is False:
        wrong = f"error is {row['error_over_limit']} times its limit" if row["error_over_limit"] else "not finite, or another shape or dtype"
        return f"WRONG: {wrong}; no speed-up"
    return row.get("note", "")


def floors(cases: Iterable[Case], peaks: Peaks) -> str:
    """The floors alone, from shapes: needs no device."""
    lines = [f"floors on {peaks.device}, from its {peaks.source if peaks.source == 'data sheet' else 'measured peaks'}"]
    for case in cases:
        cost = case.cost(case.make("meta", 0))
        memory = cost.bytes / peaks.bytes_per_s * 1e6 >= cost.flops / peaks.flops_per_s[dtype_name(case.dtype)] * 1e6
        floor = floor_us(cost, peaks, case.dtype)
        lines.append(f"{case.op:24} {case.shape:48} {dtype_name(case.dtype):8} {floor:10.2f} us  {'memory' if memory else 'matrix units'}")
    return "\n".join(lines)


def main() -> None:
    p = arguments(__doc__, keep="append the rows to bench/results")
    p.add_argument("file", type=Path)
    a = p.parse_args()
    rows = read(a.file)
    print(table(rows))
    if a.keep:
        append(rows)


if __name__ == "__main__":
    main()
