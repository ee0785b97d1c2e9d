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
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
import triton

from bench import arguments, codegen, harness, peaks
from bench.sass import Report
from bench.tune_clock import Clock, Refused, Unprepared
from bench.tune_compile import Candidate, Compiler, Job, by_code, compile_all, compiled_by_code, in_words, jobs_of, prune
from bench.tune_space import OPS, Sweep, TuneCase, sweeps
from bench.tune_table import FOLDER, as_written, check, name, name_without_schedule, own_rows, read, when_of, write
from bench.tune_tiles import Tile, candidates, illegal
from fastfuse import Unsupported, tune

ROUNDS = 3  # of the last comparison, in turns
TRIES = 3  # candidates that are compared at last


class Late(Exception):
    """The time is up."""


@dataclass
class TuneConfig:
    """What a sweep is done with. clock: (op, case, tile) -> us; raises Refused or Unprepared."""

    clock: Callable[[str, TuneCase, Tile], float]
    floor: Callable[[TuneCase], float]
    compiled: Compiler
    mark: Mapping = field(default_factory=dict)  # device, commit, date and Triton, for the rows
    quick: bool = False
    bounds: bool = False
    margin: float = 0.02
    deadline: float = float("inf")
    log: Callable[[Mapping], None] = lambda entry: None
    say: Callable[[str], None] = print
    prepare: Callable[[str, TuneCase, list[Tile]], None] = lambda op, case, tiles: None  # before the first of them is timed

    def us(self, op: str, case: TuneCase, tile: Tile, why: str) -> float:
        if time.monotonic() > self.deadline:
            raise Late
        entry = {"op": op, "shape": case.bench.shape, "dtype": harness.dtype_name(case.bench.dtype), "tile": tile, "for": why}
        try:
            us = self.clock(op, case, tile)
        except Refused as refusal:
            self.log(entry | {"refused": str(refusal)})
            raise
        self.log(entry | {"us": us})
        return us


def main() -> None:
    p = arguments(
        __doc__,
        bounds="move the rows' M_max too",
        quick="of the grid only what differs from a row's tile in one value",
        dry_run="compile and print, time and write nothing",
    )
    p.add_argument("op", nargs="+", choices=(*OPS, "all"), metavar="OP", help=f"{', '.join(OPS)}, or all")
    p.add_argument("--minutes", type=float, default=float("inf"), help="rows that are not done by then stay as they are")
    p.add_argument("--margin", type=float, default=2.0, help="percent that a tile must be faster by")
    p.add_argument("--out", type=Path, metavar="FILE", help="every timing, a line of JSON each")
    p.add_argument("--commit", help="recorded where the tree has no git folder")
    p.add_argument("--workers", type=int, default=min(16, os.cpu_count() or 1), help="processes that compile")
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
        clock, chip, commit = Clock("cuda"), _chip(), where["commit"] + (" with changes" if where["dirty"] else "")
        config = TuneConfig(
            clock=clock,
            prepare=lambda op, case, tiles: clock.compile_launches(op, case, tiles, chip, a.workers),
            floor=lambda case: harness.floor_us(case.bench.cost(case.bench.make("meta", 0)), ceilings, case.bench.dtype),
            compiled=lambda jobs: compile_all(jobs, a.workers),
            mark={"device": where["device"], "commit": commit, "date": harness.now(), "triton": where["triton"]},
            quick=a.quick,
            bounds=a.bounds,
            margin=a.margin / 100,
            deadline=deadline,
            log=lambda entry: print(json.dumps(entry), file=out, flush=True),
        )
        changed = [op for op in names if tune_op(op, arch, sweeps(op, arch), config)]
    if changed:
        print(f"written: {', '.join(f'fastfuse/tune/{op}.json' for op in changed)}; in the same commit: python -m bench.codegen --store")


def _chip() -> tuple:
    """Of the GPU at hand, as collecting() takes it."""
    device = torch.device("cuda", torch.cuda.current_device())
    return triton.runtime.driver.active.get_current_target(), tune.arch_of(device), tune.processors_of(device)


def tune_op(op: str, arch: str, calls: list[Sweep], config: TuneConfig, folder: Path = FOLDER) -> bool:
    """Sweep the rows that serve `arch` and rewrite them; whether anything was. Without rows of its own it gets a copy of its family's.

    Raises ValueError, and writes nothing, where the result would be a table that pick() cannot serve.
    """
    if time.monotonic() > config.deadline:
        config.say(f"{op}: no time is left for it")
        return False
    path = folder / f"{op}.json"
    rows = read(path)
    check(op, rows)
    written, family = own_rows(op, arch, rows)
    own = [tune.served(row) for row in written]
    regimes, tried, jobs = _plan(op, family, own, calls, config.quick)
    config.say(f"{op} on {arch}: {len(own)} rows of {family}, {sum(map(len, tried))} candidates, {len(by_code(jobs))} compilations")
    compiled = compiled_by_code(jobs, config.compiled)
    new = [row if family == arch else {"arch": arch, "when": row["when"], "tile": row["tile"]} for row in own]
    measured = False
    try:
        for i, ((row, cases), tiles) in enumerate(zip(regimes, tried, strict=True)):
            if not cases:
                config.say(f"  {when_of(row)}: no case is served by it: left as it is")
                continue
            kept, pruned = prune(op, family, row, cases, tiles, compiled)
            config.say(f"  {when_of(row)}: {len(cases)} cases, {in_words(pruned)}, {len(kept)} timed")
            tile, times = _decide(op, family, row, cases, kept, config)
            if times:
                figures = _figures(times, config)
                new[i] = {"arch": arch, "when": row["when"], "tile": tile} | figures
                of_floor = statistics.geometric_mean(floor / us for floor, us in zip(figures["floor_us"], figures["us"], strict=True))
                config.say(f"    {100 * of_floor:.0f}% of the floor")
                measured = True
        if config.bounds:
            new = move_bounds(op, arch, new, calls, config)
    except Late:
        config.say("  the time is up: the rows that are not done stay as they are")
    if not measured:
        return False
    if family == arch:
        fresh = iter(map(as_written, written, own, new))
        rows = [next(fresh) if row["arch"] == arch else row for row in rows]
    else:
        after = 1 + max(i for i, row in enumerate(rows) if row["arch"] == family)
        rows = [*rows[:after], *new, *rows[after:]]
    check(op, rows)
    write(path, rows)
    return True


def _regimes(own: list[dict], family: str, calls: Iterable[Sweep]) -> list[tuple[dict, list[TuneCase]]]:
    served = {id(row): [] for row in own}
    for case in (s.at(n) for s in calls for n in s.counts):
        served[id(tune.match(own, family, case.shape))].append(case)
    return [(row, served[id(row)]) for row in own]


def _plan(op: str, family: str, own: list[dict], calls: list[Sweep], quick: bool) -> tuple[list, list[list[Tile]], list[Job]]:
    """Rows with their cases, the tiles that are tried in each row's place, and all that has to be compiled for it."""
    regimes = _regimes(own, family, calls)
    tried = [candidates(op, own, row, quick) for row, _ in regimes]
    jobs = [job for (row, cases), tiles in zip(regimes, tried, strict=True) for tile in tiles for job in jobs_of(family, op, row, tile, cases)]
    return regimes, tried, jobs


def _figures(times: list[tuple[TuneCase, float]], config: TuneConfig) -> dict:
    return {
        "us": [round(us, 3) for _, us in times],
        "floor_us": [round(config.floor(case), 3) for case, _ in times],
        "shape": [f"{case.bench.shape} {harness.dtype_name(case.bench.dtype)}" for case, _ in times],
        **config.mark,
    }


def _decide(op: str, arch: str, row: dict, cases: list[TuneCase], kept: list[Candidate], config: TuneConfig) -> tuple[Tile, list]:
    """The tile that the row gets, and its time of each case that could be run."""
    alive, times = list(kept), {id(c): [] for c in kept}
    ran = []
    for case in cases:
        try:
            config.prepare(op, case, [c.tile for c in alive])
            for c in list(alive):
                try:
                    times[id(c)].append(config.us(op, case, c.tile, "sweep"))
                except Refused as refusal:
                    alive.remove(c)
                    config.say(f"    {name(c.tile)} refused at {case.bench.shape}: {refusal}")
        except Unprepared as reason:
            config.say(f"    {case.bench.shape} left out: {reason}")
        else:
            ran.append(case)
    if not ran or not alive:
        config.say("    left as it is: nothing could be timed")
        return row["tile"], []
    mean = {id(c): statistics.geometric_mean(times[id(c)]) for c in alive}
    present = kept[0] if kept[0] in alive else None
    order = sorted((c for c in alive if c is not present), key=lambda c: mean[id(c)])
    faster = [c for c in order if present is None or mean[id(c)] * (1 + config.margin) < mean[id(present)]]
    chosen = times[id(present)] if present else []
    for c in faster[:TRIES]:
        if fault := _variants_fault(op, arch, row, c.tile, config):
            config.say(f"    {name(c.tile)} refused: {fault}")
            continue
        theirs, mine = in_turns(op, ran, present.tile, c.tile, config) if present else (times[id(c)],) * 2
        gain = statistics.geometric_mean(theirs) / statistics.geometric_mean(mine) - 1
        if present is None or gain > config.margin:
            config.say(f"    {name(row['tile'])} -> {name(c.tile)}: " + (f"{100 * gain:.1f}% faster" if present else "the row's own tile is refused"))
            return c.tile, list(zip(ran, mine, strict=True))
        chosen = theirs
        config.say(f"    {name(c.tile)} in turns with the row's own: {100 * gain:+.1f}%, not enough")
    if present is None:
        return row["tile"], []
    config.say(
        f"    {name(row['tile'])} stays" + (f", next {name(order[0].tile)} at {mean[id(order[0])] / mean[id(present)]:.2f} of its time" if order else "")
    )
    return row["tile"], list(zip(ran, chosen, strict=True))


def in_turns(op: str, cases: list[TuneCase], one: Tile, other: Tile, config: TuneConfig) -> tuple[list[float], list[float]]:
    """Both tiles' medians at every case, one after the other: what the clock or the neighbours do in between, both feel."""
    found = [], []
    for case in cases:
        rounds = [[config.us(op, case, tile, "in turns") for tile in (one, other)] for _ in range(ROUNDS)]
        for times, each in zip(found, zip(*rounds, strict=True), strict=True):
            times.append(statistics.median(each))
    return found


def _variants_fault(op: str, arch: str, row: dict, tile: Tile, config: TuneConfig) -> str | None:
    """Why bench.codegen's gate would stop this tile: it compiles what no case here launches, fp32 adapters or torchao's weights."""
    if tile is None:
        return None
    job = (arch, op, json.dumps({"when": row["when"], "tile": tile}), "")
    reports = config.compiled([job])[job]
    if isinstance(reports, str):
        return reports
    return next((f"{r.op} {r.name}: {problem}" for r in reports for problem in r.problems()), None)


def move_bounds(op: str, arch: str, rows: list[dict], calls: list[Sweep], config: TuneConfig) -> list[dict]:
    """Each M_max to the largest M tried up to which the row's tile is no slower than what would serve without the row.

    An M_max already between that and the next M tried stays. Tried are the sweeps' `bounds`, as far as the row behind the boundary goes.
    """
    rows = list(rows)
    for i, row in enumerate(rows):
        if "M_max" not in row["when"]:
            continue
        bound, trials = row["when"]["M_max"], _trials(op, arch, rows, i, calls)
        won, lost = None, None
        for M, pairs in sorted(trials.items()):
            try:
                times = [[config.us(op, case, tile, "bounds") for tile in (row["tile"], other)] for case, other in pairs]
                mine, theirs = map(statistics.geometric_mean, zip(*times, strict=True))
            except (Refused, Unprepared) as reason:
                config.say(f"  {when_of(row)}: stopped at M {M}: {reason}")
                break
            if mine > theirs:
                lost = M
                break
            won = M
        if won is None:
            if lost is not None:
                config.say(f"  {when_of(row)}: its neighbour is faster at M {lost} already, the boundary stays")
        elif not won <= bound < (lost or max(*trials, bound) + 1):
            rows[i] = row | {"when": row["when"] | {"M_max": won}}
            config.say(f"  {when_of(row)}: M_max {bound} -> {won}")
    return rows


def _trials(op: str, arch: str, rows: list[dict], i: int, calls: list[Sweep]) -> dict[int, list[tuple]]:
    """M -> calls of that many rows that row i would serve without its M_max, each with the tile that it gets without row i."""
    row, others = rows[i], [*rows[:i], *rows[i + 1 :]]
    free = row | {"when": {k: v for k, v in row["when"].items() if k != "M_max"}}
    with_it = [*rows[:i], free, *rows[i + 1 :]]
    found: dict[int, list] = {}
    for case in (s.at(n) for s in calls for n in s.bounds):
        M = case.shape["M"]
        if tune.match(with_it, arch, case.shape) is not free or illegal(op, row["when"] | {"M_max": M}, row["tile"]):
            continue
        served = tune.match(others, arch, case.shape)
        behind = tune.match(others, arch, {**case.shape, "M": row["when"]["M_max"] + 1})
        if served["tile"] != row["tile"] and (M <= row["when"]["M_max"] or served is behind):
            found.setdefault(M, []).append((case, served["tile"]))
    return found


def dry_run(op: str, arch: str, compiled: Compiler, quick: bool = False, folder: Path = FOLDER) -> None:
    """Print every row's cases, what is tried there, what is left out and why, and what the compiler made of the rest, best bound first."""
    own, family = own_rows(op, arch, [tune.served(row) for row in read(folder / f"{op}.json")])
    if family not in codegen.ARCHS:
        raise ValueError(f"{op}: the compiler has no target {family}, only {', '.join(codegen.ARCHS)}")
    regimes, tried, jobs = _plan(op, family, own, sweeps(op, arch), quick)
    reports = compiled_by_code(jobs, compiled)
    print(f"{op} on {arch}: {len(own)} rows of {family}; * is the row's own tile; bounds count a tile's own padding as work")
    for (row, cases), tiles in zip(regimes, tried, strict=True):
        print(f"{when_of(row)}: {name(row['tile'])}, {len(cases)} cases{': ' if cases else ''}{', '.join(p.bench.shape for p in cases)}")
        if not cases:
            continue
        kept, pruned = prune(op, family, row, cases, tiles, reports)
        print(f"  {len(tiles)} candidates: {in_words(pruned)}, {len(kept)} left")
        for reason, left_out in pruned.items():
            print(f"    {reason}: {', '.join(dict.fromkeys(map(name_without_schedule, left_out)))}")
        alike: dict[str, list[Candidate]] = {}
        for c in sorted(kept, key=lambda c: (-(c.bound or 0), -c.resident, c.registers)):
            alike.setdefault(name_without_schedule(c.tile), []).append(c)
        for label, (c, *others) in alike.items():
            mark = "*" if row["tile"] and label == name_without_schedule(row["tile"]) else " "
            times = f" x{1 + len(others)}" if others else ""
            print(f"  {mark} {label}{times}: {'; '.join(_line(r) for r in c.reports) or 'no code of ours'}")


def _line(r: Report) -> str:
    bounds = " ".join(f"{loop} {f['bound']:.0f}% by {f['by']}" for loop, f in r.loops.items() if "bound" in f)
    return f"{r.op} {r.name}: {r.registers} registers, {r.shared} B, {r.blocks * r.warps} warps{', bound: ' if bounds else ''}{bounds}"


if __name__ == "__main__":
    main()
