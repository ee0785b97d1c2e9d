"""Time an op's launch configurations on the GPU at hand and keep the fastest, in fastfuse/tune/<op>.json.

    python -m bench.tune nf4_linear lora_down    every row of this GPU's architecture; "all" for every op
    python -m bench.tune all --minutes 25 --quick --out tune.jsonl
    python -m bench.tune nf4_linear --bounds     afterwards the rows' M_max move to where the neighbour becomes faster
    python -m bench.tune lora_grad --arch sm_90 --dry-run    what would be tried, and what the compiler makes of it: needs no GPU

A row stands for the cases of bench/tune_space.py that it serves. What is tried in its place: its own tile, the unfused route, the other
rows' tiles and a small grid. Before anything is timed all are compiled ahead of time, and left out is what spills, does not fit the
chip's shared memory, does not compile, or is bound to less than 60% of the best tile of the same blocks. The rest runs through the op
itself: a result that fails the parity rule is refused. The fastest by geometric mean over the cases takes the row's place if all of its
variants compile without spills and it is faster by more than the margin once more, in turns with the row's own tile.
An op's file is replaced at once, when all of its rows are done or the time is up. Ctrl-C writes nothing of the op under way.
"""

import argparse
import concurrent.futures
import contextlib
import datetime
import gc
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

import torch
import triton
from tqdm import tqdm

import fastfuse
from bench import codegen, harness, peaks
from bench.all import _context_alive
from bench.tune_space import OPS, SCHEDULE, Point, Series, candidates, illegal, series, specimens
from fastfuse import Unsupported, tune
from fastfuse.ops._collect import collecting

FOLDER = Path(tune.__file__).parent
BOUND = 0.6  # of the best bound of the same blocks
ROUNDS = 3  # of the last comparison, in turns
TRIES = 3  # candidates that are compared at last

Job = tuple[str, str, str, tuple | None]  # arch, op, row as JSON, variant (None: all that bench.codegen compiles)
Compiled = Mapping[Job, "list[codegen.Report] | str"]  # the reports, or why there are none


class Refused(Exception):
    """This tile must not be used for this case, and why."""


class Unprepared(Exception):
    """This case cannot be run here at all."""


class Late(Exception):
    """The time is up."""


@dataclass
class Setting:
    """What a sweep is done with. clock: (op, point, tile) -> us; raises Refused or Unprepared."""

    clock: Callable[[str, Point, dict | None], float]
    floor: Callable[[Point], float]
    compiled: Callable[[list[Job]], Compiled]
    mark: Mapping = field(default_factory=dict)  # device, commit, date and Triton, for the rows
    quick: bool = False
    bounds: bool = False
    margin: float = 0.02
    deadline: float = float("inf")
    log: Callable[[Mapping], None] = lambda entry: None
    say: Callable[[str], None] = print
    prepare: Callable[[str, Point, list[dict | None]], None] = lambda op, point, tiles: None  # before the first of them is timed

    def us(self, op: str, point: Point, tile: dict | None, why: str) -> float:
        if time.monotonic() > self.deadline:
            raise Late
        entry = {"op": op, "shape": point.case.shape, "dtype": harness.dtype_name(point.case.dtype), "tile": tile, "for": why}
        try:
            us = self.clock(op, point, tile)
        except Refused as refusal:
            self.log(entry | {"refused": str(refusal)})
            raise
        self.log(entry | {"us": us})
        return us


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("op", nargs="+", choices=(*OPS, "all"), metavar="OP", help=f"{', '.join(OPS)}, or all")
    p.add_argument("--bounds", action="store_true", help="move the rows' M_max too")
    p.add_argument("--quick", action="store_true", help="of the grid only what differs from a row's tile in one value")
    p.add_argument("--minutes", type=float, default=float("inf"), help="rows that are not done by then stay as they are")
    p.add_argument("--margin", type=float, default=2.0, help="percent that a tile must be faster by")
    p.add_argument("--out", type=Path, metavar="FILE", help="every timing, a line of JSON each")
    p.add_argument("--commit", help="recorded where the tree has no git folder")
    p.add_argument("--workers", type=int, default=min(16, os.cpu_count() or 1), help="processes that compile")
    p.add_argument("--dry-run", action="store_true", help="compile and print, time and write nothing")
    p.add_argument("--arch", help="of a dry run; otherwise that of the GPU at hand")
    a = p.parse_args()
    names = list(OPS) if "all" in a.op else list(dict.fromkeys(a.op))
    gpu = torch.cuda.is_available()
    if triton.knobs.runtime.interpret:
        sys.exit("bench.tune: unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    if a.arch and not a.dry_run:
        sys.exit(f"bench.tune: --arch {a.arch} without --dry-run: rows are measured for the GPU at hand alone")
    if not gpu and not (a.dry_run and a.arch):
        sys.exit("bench.tune: no GPU found, nothing can be timed: --arch sm_90 --dry-run shows what would be")
    arch = a.arch or tune.arch_of(torch.device("cuda"))
    try:
        if a.dry_run:
            for op in names:
                dry_run(op, arch, lambda jobs: compile_all(jobs, a.workers), a.quick)
        else:
            _sweep(names, arch, a)
    except (Unsupported, ValueError) as error:
        sys.exit(f"bench.tune: {error}")


def _sweep(names: list[str], arch: str, a: argparse.Namespace) -> None:
    deadline = time.monotonic() + 60 * a.minutes
    where = harness.environment("cuda", a.commit)
    if where["commit"] is None:
        sys.exit("bench.tune: no git folder here: --commit SHA, which the rows will say")
    ceilings = peaks.measure("cuda")
    print(f"{peaks.describe(ceilings)}, {arch}")
    with open(a.out or os.devnull, "a") as out:
        clock, chip = Clock("cuda"), _chip()
        setting = Setting(
            clock=clock,
            prepare=lambda op, point, tiles: clock.compile_launches(op, point, tiles, chip, a.workers),
            floor=lambda point: harness.floor_us(point.case.cost(point.case.make("meta", 0)), ceilings, point.case.dtype),
            compiled=lambda jobs: compile_all(jobs, a.workers),
            mark=_mark(where),
            quick=a.quick,
            bounds=a.bounds,
            margin=a.margin / 100,
            deadline=deadline,
            log=lambda entry: print(json.dumps(entry), file=out, flush=True),
        )
        changed = [op for op in names if tune_op(op, arch, series(op, arch), setting)]
    if changed:
        print(f"written: {', '.join(f'fastfuse/tune/{op}.json' for op in changed)}; in the same commit: python -m bench.codegen --store")


def _chip() -> tuple:
    """Of the GPU at hand, as collecting() takes it."""
    device = torch.device("cuda", torch.cuda.current_device())
    return triton.runtime.driver.active.get_current_target(), tune.arch_of(device), tune.processors_of(device)


def _mark(where: Mapping) -> dict:
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    commit = where["commit"] if not where["dirty"] else f"{where['commit']} with changes"
    return {"device": where["device"], "commit": commit, "date": date, "triton": where["triton"]}


def tune_op(op: str, arch: str, calls: list[Series], setting: Setting, folder: Path = FOLDER) -> bool:
    """Sweep the rows that serve `arch` and rewrite them; whether anything was. Without rows of its own it gets a copy of its family's.

    Raises ValueError, and writes nothing, where the result would be a table that pick() cannot serve.
    """
    if time.monotonic() > setting.deadline:
        setting.say(f"{op}: no time is left for it")
        return False
    path = folder / f"{op}.json"
    rows = read(path)
    _check(op, rows)
    written, family = _own_rows(op, arch, rows)
    own = [tune.served(row) for row in written]
    regimes = _regimes(own, family, calls)
    tried = {id(row): candidates(op, own, row, setting.quick) for row, _ in regimes}
    jobs = [job for row, points in regimes for tile in tried[id(row)] for job in _jobs(family, op, row, tile, points)]
    setting.say(f"{op} on {arch}: {len(own)} rows of {family}, {sum(map(len, tried.values()))} candidates, {len(_by_code(jobs))} compilations")
    compiled = _of_codes(jobs, setting.compiled)
    new = [row if family == arch else {"arch": arch, "when": row["when"], "tile": row["tile"]} for row in own]
    measured = False
    try:
        for i, (row, points) in enumerate(regimes):
            if not points:
                setting.say(f"  {_when(row)}: no case is served by it: left as it is")
                continue
            kept, pruned = prune(op, family, row, points, tried[id(row)], compiled)
            setting.say(f"  {_when(row)}: {len(points)} cases, {_pruned(pruned)}, {len(kept)} timed")
            tile, times = _decide(op, family, row, points, kept, setting)
            if times:
                figures = _figures(times, setting)
                new[i] = {"arch": arch, "when": row["when"], "tile": tile} | figures
                of_floor = statistics.geometric_mean(floor / us for floor, us in zip(figures["floor_us"], figures["us"], strict=True))
                setting.say(f"    {100 * of_floor:.0f}% of the floor")
                measured = True
        if setting.bounds:
            new = move_bounds(op, arch, new, calls, setting)
    except Late:
        setting.say("  the time is up: the rows that are not done stay as they are")
    if not measured:
        return False
    if family == arch:
        fresh = iter(map(_written, written, own, new))
        rows = [next(fresh) if row["arch"] == arch else row for row in rows]
    else:
        after = 1 + max(i for i, row in enumerate(rows) if row["arch"] == family)
        rows = [*rows[:after], *new, *rows[after:]]
    _check(op, rows)
    write(path, rows)
    return True


def _written(row: dict, before: dict, after: dict) -> dict:
    """How the row is written when it was served as `before` and now is to be as `after`; what other Tritons take of it stays."""
    if after is before:
        return row
    release = tune.since(row)
    own = {k: v for k, v in after.items() if k not in ("arch", "when", "since")}
    if release:
        return {**row, "when": after["when"], "since": row["since"] | {release: own}}
    return after | ({"since": row["since"]} if "since" in row else {})


def _check(op: str, rows: list[dict]) -> None:
    if wrong := problems(op, rows):
        raise ValueError(f"tune/{op}.json is not written: {'; '.join(wrong)}")


def _own_rows(op: str, arch: str, rows: list[dict]) -> tuple[list[dict], str]:
    """The rows that serve this architecture, and whose they are."""
    family = arch if any(row["arch"] == arch for row in rows) else tune.covering_arch(op, arch)
    return [row for row in rows if row["arch"] == family], family


def _regimes(own: list[dict], family: str, calls: Iterable[Series]) -> list[tuple[dict, list[Point]]]:
    points = [s.at(n) for s in calls for n in s.counts]
    served = {id(row): [] for row in own}
    for point in points:
        served[id(tune.match(own, family, point.shape))].append(point)
    return [(row, served[id(row)]) for row in own]


def _figures(times: list[tuple[Point, float]], setting: Setting) -> dict:
    return {
        "us": [round(us, 3) for _, us in times],
        "floor_us": [round(setting.floor(point), 3) for point, _ in times],
        "shape": [f"{point.case.shape} {harness.dtype_name(point.case.dtype)}" for point, _ in times],
        **setting.mark,
    }


@dataclass
class Candidate:
    tile: dict | None  # as a row writes it
    reports: list[codegen.Report] = field(default_factory=list)

    @property
    def bound(self) -> float | None:
        """Percent of the floor that the main loops allow at most, their mean; None where no floor is known. A tile's own padding counts as work."""
        found = [loop["bound"] for r in self.reports for loop in r.loops.values() if "bound" in loop]
        return statistics.mean(found) if found else None

    @property
    def resident(self) -> int:
        """Warps of an SM, of the kernel that has the fewest."""
        return min((r.blocks * r.warps for r in self.reports), default=0)

    @property
    def registers(self) -> int:
        return max((r.registers for r in self.reports), default=0)


def prune(op: str, arch: str, row: dict, points: list[Point], tiles: list[dict | None], compiled: Compiled) -> tuple[list[Candidate], dict[str, list[dict]]]:
    """(what is left, reason -> what is not). The row's own tile, the first, always is left, and the unfused route, which has no code of ours."""
    left, pruned = [], {}
    for n, tile in enumerate(tiles):
        reports = _reports(_jobs(arch, op, row, tile, points), compiled)
        reason = _fault(reports)
        if isinstance(reports, str) and not n:
            raise ValueError(f"{op} {_when(row)}: the row's own tile did not compile: {reports}")  # then nothing here can be believed
        if reason and n:
            pruned.setdefault(reason, []).append(tile)
        else:
            left.append(Candidate(tile, reports))
    best: dict[str, float] = {}
    for c in left:
        best[_blocks(c.tile)] = max(best.get(_blocks(c.tile), 0), c.bound or 0)
    kept = []
    for n, c in enumerate(left):
        if n and c.bound is not None and c.bound < BOUND * best[_blocks(c.tile)]:
            pruned.setdefault("low bound", []).append(c.tile)
        else:
            kept.append(c)
    return kept, pruned


def _reports(jobs: list[Job], compiled: Compiled) -> list[codegen.Report] | str:
    found = [compiled[_code(job)] for job in jobs]
    error = next((reports for reports in found if isinstance(reports, str)), None)
    return error or [r for reports in found for r in reports]


def _fault(reports: list[codegen.Report] | str) -> str | None:
    if isinstance(reports, str):
        return "did not compile"
    if any(r.stack for r in reports):
        return "spilled"
    return "shared memory" if any(r.problems() for r in reports) else None


def _blocks(tile: dict | None) -> str:
    """What tiles have in common that do the same work in a step."""
    return json.dumps({k: v for k, v in sorted(tile["constants"].items()) if k.startswith("BLOCK_")}) if tile else ""


def _pruned(pruned: Mapping[str, list]) -> str:
    return ", ".join(f"{len(tiles)} {reason}" for reason, tiles in pruned.items()) or "none pruned"


def _decide(op: str, arch: str, row: dict, points: list[Point], kept: list[Candidate], setting: Setting) -> tuple[dict | None, list[tuple[Point, float]]]:
    """The tile that the row gets, and its time of each case that could be run."""
    alive, times = list(kept), {id(c): [] for c in kept}
    ran = []
    for point in points:
        try:
            setting.prepare(op, point, [c.tile for c in alive])
            for c in list(alive):
                try:
                    times[id(c)].append(setting.us(op, point, c.tile, "sweep"))
                except Refused as refusal:
                    alive.remove(c)
                    setting.say(f"    {name(c.tile)} refused at {point.case.shape}: {refusal}")
        except Unprepared as reason:
            setting.say(f"    {point.case.shape} left out: {reason}")
        else:
            ran.append(point)
    if not ran or not alive:
        setting.say("    left as it is: nothing could be timed")
        return row["tile"], []
    mean = {id(c): statistics.geometric_mean(times[id(c)]) for c in alive}
    present = kept[0] if kept[0] in alive else None
    order = sorted((c for c in alive if c is not present), key=lambda c: mean[id(c)])
    faster = [c for c in order if present is None or mean[id(c)] * (1 + setting.margin) < mean[id(present)]]
    chosen = times[id(present)] if present else []
    for c in faster[:TRIES]:
        if fault := _variants_fault(op, arch, row, c.tile, setting):
            setting.say(f"    {name(c.tile)} refused: {fault}")
            continue
        if present is None:
            mine, theirs = times[id(c)], times[id(c)]
        else:
            theirs, mine = in_turns(op, ran, present.tile, c.tile, setting)
        gain = statistics.geometric_mean(theirs) / statistics.geometric_mean(mine) - 1
        if present is None or gain > setting.margin:
            setting.say(f"    {name(row['tile'])} -> {name(c.tile)}: " + (f"{100 * gain:.1f}% faster" if present else "the row's own tile is refused"))
            return c.tile, list(zip(ran, mine, strict=True))
        chosen = theirs
        setting.say(f"    {name(c.tile)} in turns with the row's own: {100 * gain:+.1f}%, not enough")
    if present is None:
        return row["tile"], []
    setting.say(
        f"    {name(row['tile'])} stays" + (f", next {name(order[0].tile)} at {mean[id(order[0])] / mean[id(present)]:.2f} of its time" if order else "")
    )
    return row["tile"], list(zip(ran, chosen, strict=True))


def in_turns(op: str, points: list[Point], one: dict | None, other: dict | None, setting: Setting) -> tuple[list[float], list[float]]:
    """Both tiles' medians at every case, one after the other: what the clock or the neighbours do in between, both feel."""
    found = [], []
    for point in points:
        rounds = [[setting.us(op, point, tile, "in turns") for tile in (one, other)] for _ in range(ROUNDS)]
        for times, each in zip(found, zip(*rounds, strict=True), strict=True):
            times.append(statistics.median(each))
    return found


def _variants_fault(op: str, arch: str, row: dict, tile: dict | None, setting: Setting) -> str | None:
    """Why bench.codegen's gate would stop this tile: it compiles what no case here launches, fp32 adapters or torchao's weights."""
    if tile is None:
        return None
    job = (arch, op, json.dumps({"when": row["when"], "tile": tile}), None)
    reports = setting.compiled([job])[job]
    if isinstance(reports, str):
        return reports
    return next((f"{r.op} {r.name}: {problem}" for r in reports for problem in r.problems()), None)


def move_bounds(op: str, arch: str, rows: list[dict], calls: list[Series], setting: Setting) -> list[dict]:
    """Each M_max to the largest M tried up to which the row's tile is no slower than what would serve without the row.

    An M_max already between that and the next M tried stays. Tried are the series' `bounds`, as far as the row behind the boundary goes.
    """
    rows = list(rows)
    for i, row in enumerate(rows):
        if "M_max" not in row["when"]:
            continue
        bound, trials = row["when"]["M_max"], _trials(op, arch, rows, i, calls)
        won, lost = None, None
        for M, pairs in sorted(trials.items()):
            try:
                mine, theirs = (statistics.geometric_mean(times) for times in zip(*(_both(op, row, *pair, setting) for pair in pairs), strict=True))
            except (Refused, Unprepared) as reason:
                setting.say(f"  {_when(row)}: stopped at M {M}: {reason}")
                break
            if mine > theirs:
                lost = M
                break
            won = M
        if won is None:
            if lost is not None:
                setting.say(f"  {_when(row)}: its neighbour is faster at M {lost} already, the boundary stays")
        elif not won <= bound < (lost or max(*trials, bound) + 1):
            rows[i] = row | {"when": row["when"] | {"M_max": won}}
            setting.say(f"  {_when(row)}: M_max {bound} -> {won}")
    return rows


def _trials(op: str, arch: str, rows: list[dict], i: int, calls: list[Series]) -> dict[int, list[tuple[Point, dict | None]]]:
    """M -> calls of that many rows that row i would serve without its M_max, each with the tile that it gets without row i."""
    row, others = rows[i], [*rows[:i], *rows[i + 1 :]]
    free = row | {"when": {k: v for k, v in row["when"].items() if k != "M_max"}}
    with_it = [*rows[:i], free, *rows[i + 1 :]]
    found: dict[int, list] = {}
    for point in (s.at(n) for s in calls for n in s.bounds):
        M = point.shape["M"]
        if tune.match(with_it, arch, point.shape) is not free or illegal(op, row["when"] | {"M_max": M}, row["tile"]):
            continue
        served = tune.match(others, arch, point.shape)
        behind = tune.match(others, arch, {**point.shape, "M": row["when"]["M_max"] + 1})
        if served["tile"] != row["tile"] and (M <= row["when"]["M_max"] or served is behind):
            found.setdefault(M, []).append((point, served["tile"]))
    return found


def _both(op: str, row: dict, point: Point, other: dict | None, setting: Setting) -> tuple[float, float]:
    return setting.us(op, point, row["tile"], "bounds"), setting.us(op, point, other, "bounds")


class Clock:
    """Times a case through its op, with the tile pinned, after its result passed the parity rule. The inputs of one case are kept."""

    def __init__(self, device: str):
        self.device, self._at, self._made = device, None, None

    def __call__(self, op: str, point: Point, tile: dict | None) -> float:
        asked, pick = [], tune.pick

        def listen(of: str, arch: str, **shape) -> tune.Tile | None:
            if of == op:
                asked.append(shape)
            return pick(of, arch, **shape)

        with fastfuse.backend("triton"):  # on a CPU the interpreter
            if self._at is not point:
                self._prepare(point)
            with tune.pin(op, tune.tile_of(tile)), mock.patch.object(tune, "pick", listen):
                row = harness.measure_provider(point.case, harness.OURS, *self._made, harness.cuda_us if self.device == "cuda" else harness.cpu_us)
        if "error" in row:
            if self.device == "cuda" and not _context_alive():
                sys.exit(f"bench.tune: the CUDA context is lost, {op} is not written: {name(tile)} at {point.case.shape}: {row['error']}")
            raise Refused(row["error"])
        if any(shape != point.shape for shape in asked) or not asked:
            raise Unprepared(f"it asks for {asked[:1]}, the case is declared as {dict(point.shape)}")
        if not row["parity"]:
            raise Refused(
                f"wrong: its error is {row['error_over_limit']} times the limit" if row["error_over_limit"] else "wrong: not finite, or another shape"
            )
        if row["timing"] == "events":
            raise Refused("no CUDA graph could hold it: its time would include launch gaps")
        return row["us"]

    def compile_launches(self, op: str, point: Point, tiles: list[dict | None], chip: tuple, workers: int) -> None:
        """Side by side, into Triton's cache. What the specimens compile is not it: their integers are divisible by 16 or not as no call's need be."""
        if self._at is not point:
            self._prepare(point)
        run, inputs = point.case.providers[harness.OURS], self._made[0].inputs
        with collecting(*chip) as found:
            for tile in tiles:
                with tune.pin(op, tune.tile_of(tile)), contextlib.suppress(Exception):  # whatever it is, timing the tile will meet it and name it
                    run(inputs)
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            concurrent.futures.wait([pool.submit(compile_kernel) for compile_kernel in found.values()])

    def _prepare(self, point: Point) -> None:
        self._at = self._made = None
        gc.collect()
        if self.device == "cuda":
            torch.cuda.empty_cache()
        try:
            parity = harness.Parity(point.case, self.device)
            self._made = parity, harness.input_sets(point.case, self.device, parity.inputs)
        except Exception as error:
            raise Unprepared(harness.describe_error(error)) from None
        self._at = point


def problems(op: str, rows: list[dict]) -> list[str]:
    """Why a table must not be written: an architecture without its unconditional last row, or a tile that a launcher cannot use."""
    found = []
    for arch in dict.fromkeys(row["arch"] for row in rows):
        own = [row for row in rows if row["arch"] == arch]
        if [i for i, row in enumerate(own) if not row["when"]] != [len(own) - 1]:
            found.append(f"{arch}: the last row, and no other, must be unconditional")
        tiles = [(row, each["tile"]) for row in own for each in (row, *row.get("since", {}).values())]
        found += [f"{arch} {_when(row)}: {reason}" for row, tile in tiles if (reason := illegal(op, row["when"], tile))]
    return found


class Row(dict):
    """A row as read, with its line."""

    line = ""


def read(path: Path) -> list[dict]:
    """The rows of a table, one a line."""
    text, rows = path.read_text(), []
    for line in text.splitlines()[1:-1]:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(Row(json.loads(line.rstrip(","))))
            rows[-1].line = line.rstrip(",")
    if _text(rows) != text:
        raise ValueError(f"{path}: not one row a line between [ and ]")
    return rows


def write(path: Path, rows: list[dict]) -> None:
    """At once; a row that was read keeps its line to the byte."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(_text(rows))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _text(rows: list[dict]) -> str:
    return "[\n" + ",\n".join(row.line if isinstance(row, Row) else f"  {json.dumps(row)}" for row in rows) + "\n]\n"


def _jobs(arch: str, op: str, row: dict, tile: dict | None, points: list[Point]) -> list[Job]:
    variants = dict.fromkeys(p.variant for p in points) if tile else ()
    return [(arch, op, json.dumps({"when": row["when"], "tile": tile}), variant) for variant in variants]


def _code(job: Job) -> Job:
    """The job without what divides a launch alone: such tiles are compiled once."""
    row = json.loads(job[2])
    for constant in SCHEDULE:
        row["tile"]["constants"].pop(constant, None)
    if not job[1].startswith("cross"):  # attention's builder reads the row's conditions
        row["when"] = {}
    return job[0], job[1], json.dumps(row), job[3]


def _by_code(jobs: Iterable[Job]) -> dict[Job, Job]:
    found: dict[Job, Job] = {}
    for job in jobs:
        found.setdefault(_code(job), job)
    return found


def _of_codes(jobs: Iterable[Job], compiled: Callable[[list[Job]], Compiled]) -> Compiled:
    """What compiled gives for one job of each code, by code."""
    firsts = _by_code(jobs)
    reports = compiled(list(firsts.values()))
    return {code: reports[job] for code, job in firsts.items()}


def compile_all(jobs: list[Job], workers: int) -> Compiled:
    """Each job's reports, or the error as a line. A compiler that takes its process down costs the job that did it alone."""
    found, lost = {}, []
    spawn = multiprocessing.get_context("spawn")  # here CUDA may be in use, which a fork does not survive
    with concurrent.futures.ProcessPoolExecutor(min(workers, max(1, len(jobs))), spawn) as pool:
        waiting = {pool.submit(_compile, job): job for job in jobs}
        for future in tqdm(concurrent.futures.as_completed(waiting), "compiling", len(jobs), leave=False, disable=None):
            try:
                found[waiting[future]] = future.result()
            except BrokenProcessPool:
                lost.append(waiting[future])

    def alone(job: Job) -> list[codegen.Report] | str:
        with concurrent.futures.ProcessPoolExecutor(1, spawn) as pool:
            try:
                return pool.submit(_compile, job).result()
            except BrokenProcessPool:
                return "the compiler crashed"

    with concurrent.futures.ThreadPoolExecutor(workers) as threads:  # side by side: each starts a process of its own
        return found | dict(zip(lost, threads.map(alone, lost), strict=True))


def _compile(job: Job) -> list[codegen.Report] | str:
    arch, op, row, variant = job
    row = json.loads(row)
    try:
        made = codegen.row_specimens(arch, op, row) if variant is None else specimens(arch, op, row, variant)
        return [codegen.report(s) for s in made]
    except Exception as error:
        return harness.describe_error(error).splitlines()[0]


def dry_run(op: str, arch: str, compiled: Callable[[list[Job]], Compiled], quick: bool = False, folder: Path = FOLDER) -> None:
    """Print every row's cases, what is tried there, what is left out and why, and what the compiler made of the rest, best bound first."""
    own, family = _own_rows(op, arch, [tune.served(row) for row in read(folder / f"{op}.json")])
    if family not in codegen.ARCHS:
        raise ValueError(f"{op}: the compiler has no target {family}, only {', '.join(codegen.ARCHS)}")
    regimes = _regimes(own, family, series(op, arch))
    tried = {id(row): candidates(op, own, row, quick) for row, _ in regimes}
    reports = _of_codes([job for row, points in regimes for tile in tried[id(row)] for job in _jobs(family, op, row, tile, points)], compiled)
    print(f"{op} on {arch}: {len(own)} rows of {family}; * is the row's own tile; bounds count a tile's own padding as work")
    for row, points in regimes:
        print(f"{_when(row)}: {name(row['tile'])}, {len(points)} cases{': ' if points else ''}{', '.join(p.case.shape for p in points)}")
        if not points:
            continue
        kept, pruned = prune(op, family, row, points, tried[id(row)], reports)
        print(f"  {len(tried[id(row)])} candidates: {_pruned(pruned)}, {len(kept)} left")
        for reason, tiles in pruned.items():
            print(f"    {reason}: {', '.join(dict.fromkeys(_without_schedule(t) for t in tiles))}")
        alike = Counter(_without_schedule(c.tile) for c in kept)
        ranked = sorted(kept, key=lambda c: (-(c.bound or 0), -c.resident, c.registers))
        shown = {}
        for c in ranked:
            shown.setdefault(_without_schedule(c.tile), c)
        for label, c in shown.items():
            mark = "*" if row["tile"] and c.tile and label == _without_schedule(row["tile"]) else " "
            times = f" x{alike[label]}" if alike[label] > 1 else ""
            print(f"  {mark} {label}{times}: {'; '.join(_line(r) for r in c.reports) or 'no code of ours'}")


def _line(r: codegen.Report) -> str:
    bounds = " ".join(f"{loop} {f['bound']:.0f}% by {f['by']}" for loop, f in r.loops.items() if "bound" in f)
    return f"{r.op} {r.name}: {r.registers} registers, {r.shared} B, {r.blocks * r.warps} warps{', bound: ' if bounds else ''}{bounds}"


def _without_schedule(tile: dict | None) -> str:
    return name(tile and {**tile, "constants": {k: v for k, v in tile["constants"].items() if k not in SCHEDULE}})


def name(tile: dict | None) -> str:
    """A tile in a few words: 64x128x64 TRANSPOSED w4 s3."""
    if tile is None:
        return "unfused"
    blocks = "x".join(str(v) for k, v in tile["constants"].items() if k.startswith("BLOCK_"))
    rest = {k: v for k, v in tile["constants"].items() if not k.startswith("BLOCK_") and v is not False}
    words = [k if v is True else f"{k}={v}" for k, v in rest.items()]
    return " ".join([blocks, *words, f"w{tile['num_warps']}", f"s{tile['num_stages']}"])


def _when(row: Mapping) -> str:
    return " ".join(f"{k}={v}" for k, v in row["when"].items()) or "all else"


if __name__ == "__main__":
    main()
