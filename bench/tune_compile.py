"""What the compiler makes of the tiles that bench.tune would try, before any is timed."""

import concurrent.futures
import functools
import json
import multiprocessing
import statistics
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from unittest import mock

from tqdm import tqdm

from bench import codegen, harness
from bench.sass import Report
from bench.tune_space import TuneCase, sweeps
from bench.tune_table import SCHEDULE, when_of
from bench.tune_tiles import Tile
from bench.work import TUNED
from fastfuse import tune

BOUND = 0.6  # of the best bound of the same blocks

Job = tuple[str, str, str, str]  # arch, op, row as JSON, words of a case (empty: all that bench.codegen compiles)
Compiled = Mapping[Job, "list[Report] | str"]  # the reports, or why there are none
Compiler = Callable[[list[Job]], Compiled]


@dataclass
class Candidate:
    tile: Tile
    reports: list[Report] = field(default_factory=list)

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


def prune(op: str, arch: str, row: dict, cases: list[TuneCase], tiles: list[Tile], compiled: Compiled) -> tuple[list[Candidate], dict[str, list]]:
    """(what is left, reason -> what is not). The row's own tile, the first, always is left, and the unfused route, which has no code of ours."""
    left, pruned = [], {}
    for n, tile in enumerate(tiles):
        reports = _reports(jobs_of(arch, op, row, tile, cases), compiled)
        reason = _fault(reports)
        if isinstance(reports, str) and not n:
            raise ValueError(f"{op} {when_of(row)}: the row's own tile did not compile: {reports}")  # then nothing here can be believed
        if reason and n:
            pruned.setdefault(reason, []).append(tile)
        else:
            left.append(Candidate(tile, reports))
    best = {_blocks(c.tile): c.bound for c in sorted(left, key=lambda c: c.bound or 0)}  # the last of a key stays
    low = [c for c in left[1:] if c.bound is not None and c.bound < BOUND * best[_blocks(c.tile)]]
    return [c for c in left if c not in low], pruned | ({"low bound": [c.tile for c in low]} if low else {})


def _reports(jobs: list[Job], compiled: Compiled) -> list[Report] | str:
    found = [compiled[_code(job)] for job in jobs]
    error = next((reports for reports in found if isinstance(reports, str)), None)
    return error or [r for reports in found for r in reports]


def _fault(reports: list[Report] | str) -> str | None:
    if isinstance(reports, str):
        return "did not compile"
    if any(r.stack for r in reports):
        return "spilled"
    return "shared memory" if any(r.problems() for r in reports) else None


def _blocks(tile: Tile) -> str:
    """What tiles have in common that do the same work in a step."""
    return json.dumps({k: v for k, v in sorted(tile["constants"].items()) if k.startswith("BLOCK_")}) if tile else ""


def in_words(pruned: Mapping[str, list]) -> str:
    return ", ".join(f"{len(tiles)} {reason}" for reason, tiles in pruned.items()) or "none pruned"


def jobs_of(arch: str, op: str, row: dict, tile: Tile, cases: list[TuneCase]) -> list[Job]:
    words = dict.fromkeys(case.words for case in cases) if tile else ()
    return [(arch, op, json.dumps({"when": row["when"], "tile": tile}), each) for each in words]


def _code(job: Job) -> Job:
    """The job without what divides a launch alone: such tiles are compiled once."""
    row = json.loads(job[2])
    for constant in SCHEDULE:
        row["tile"]["constants"].pop(constant, None)
    return job[0], job[1], json.dumps(row["tile"]), job[3]


def by_code(jobs: Iterable[Job]) -> dict[Job, Job]:
    """Of each code the first job."""
    return {_code(job): job for job in reversed(list(jobs))}


def compiled_by_code(jobs: Iterable[Job], compiled: Compiler) -> Compiled:
    """What compiled gives for one job of each code, by code."""
    firsts = by_code(jobs)
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

    def alone(job):
        with concurrent.futures.ProcessPoolExecutor(1, spawn) as pool:
            try:
                return pool.submit(_compile, job).result()
            except BrokenProcessPool:
                return "the compiler crashed"

    with concurrent.futures.ThreadPoolExecutor(workers) as threads:  # side by side: each starts a process of its own
        return found | dict(zip(lost, threads.map(alone, lost), strict=True))


def _compile(job: Job) -> list[Report] | str:
    arch, op, row, words = job
    row = json.loads(row)
    try:
        builds = codegen.collect(arch, [(words, functools.partial(run_case, arch, op, words, row["tile"]))]) if words else _everything(arch, op, row)
        return [codegen.report(b) for b in builds if TUNED.get(b.op) == op]
    except Exception as error:
        return harness.describe_error(error).splitlines()[0]


def run_case(arch: str, op: str, words: str, tile: dict) -> None:
    """On meta tensors."""
    bench = next(case.bench for sweep in sweeps(op, arch) for case in map(sweep.at, sweep.counts) if case.words == words)
    with tune.pin(op, tune.tile_of(tile)):
        bench.providers[harness.OURS](bench.make("meta", 0))


def _everything(arch: str, op: str, row: dict) -> list[codegen.KernelBuild]:
    """What bench.codegen would compile with the tile were it the row's."""
    pick, tile = tune.pick, row["tile"]

    def picked(of, of_arch, **shape):
        served = tune.match(tune.table(of), tune.covering_arch(of, of_arch), shape) if of == op else None
        return tune.tile_of(tile) if served and served["when"] == row["when"] else pick(of, of_arch, **shape)

    with mock.patch.object(tune, "pick", picked):
        builds = codegen.all_builds(arch)
    fixed = {k: v for k, v in tile["constants"].items() if k not in SCHEDULE}
    return [b for b in builds if all(b.constants.get(k, v) == v for k, v in fixed.items())]
