"""Runs the cases of the bench_*.py that pytest collects, and prints their table at the end.

A wrong or failing fastfuse fails; a peer's fault is a row of the table.
"""

import functools
import importlib.util
import itertools
import os
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch

from bench import harness, peaks

ROWS = pytest.StashKey[list]()
FAMILIES = pytest.StashKey[list]()  # the modules collected
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench")
    group.addoption("--quick", action="store_true", help="fewer shapes")
    group.addoption("--compile", action="store_true", help="time torch.compile at every shape, not at a few")
    group.addoption("--save", action="store_true", help="append the rows to bench/results")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []
    config.stash[FAMILIES] = []
    if importlib.util.find_spec("pytest_benchmark"):
        config.option.benchmark_quiet = True  # one table: ours has the floors


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A test of a module with cases() that takes `case` and `provider` runs once for each."""
    if not hasattr(metafunc.module, "cases") or "case" not in metafunc.fixturenames:
        return
    metafunc.config.stash[FAMILIES].append(metafunc.module)
    cases = harness.in_order(metafunc.module.cases(DEVICE, metafunc.config.option.quick, metafunc.config.option.compile))
    params = [pytest.param(case, provider, id="-".join([*case.key, provider]).replace(" ", "-")) for case in cases for provider in case.providers]
    metafunc.parametrize(("case", "provider"), params)


@pytest.fixture
def time_case(request: pytest.FixtureRequest) -> Callable[[harness.Case, str], None]:
    """Measures one provider of a case and keeps the row."""

    def run(case: harness.Case, provider: str) -> None:
        base, parity, sets = _prepared(case)
        row = base | harness.measure_provider(case, provider, parity, sets, case.timer or _timer(request))
        request.config.stash[ROWS].append(row)
        if row.get("note"):
            pytest.skip(f"{provider}: {row['note']}")
        if harness.is_ours(provider):
            assert "error" not in row, row["error"]
            assert row["parity"], f"error is {row['error_over_limit']} times its limit"

    return run


@functools.lru_cache(maxsize=1)
def _prepared(case: harness.Case) -> tuple:
    """Shared by the providers of a case, which run one after another."""
    base = harness.row_base(case, device_peaks(), harness.environment(DEVICE))
    parity = harness.Parity(case, DEVICE)
    sets = harness.input_sets(case, DEVICE, parity.inputs)
    return base | {"clocks": harness.clocks(DEVICE)}, parity, sets


def _timer(request: pytest.FixtureRequest) -> harness.Timer:
    if DEVICE == "cuda":
        return harness.cuda_us
    if not importlib.util.find_spec("pytest_benchmark") or request.config.option.benchmark_disable:
        return harness.cpu_us
    return functools.partial(_pytest_benchmark_us, request.getfixturevalue("benchmark"))


def _pytest_benchmark_us(benchmark, fn: Callable, sets: list[dict]) -> tuple[float, str]:
    """As harness.cpu_us, with pytest-benchmark's clock, so that its own options and files work too."""
    rounds = harness.cpu_repeats(fn, sets)
    turns = itertools.cycle(sets)
    benchmark.pedantic(fn, setup=lambda: ((next(turns),), {}), rounds=rounds)
    return benchmark.stats.stats.median * 1e6, "host clock"


@functools.cache
def device_peaks() -> peaks.Peaks:
    return peaks.measure(DEVICE)


def pytest_terminal_summary(terminalreporter, config: pytest.Config) -> None:
    rows = config.stash[ROWS]
    if not rows:
        return
    show = terminalreporter.write_line
    terminalreporter.section("benchmarks")
    show(peaks.describe(device_peaks()))
    show(harness.table(rows))
    if DEVICE == "cpu":
        show("\nOn a CPU fastfuse runs its PyTorch reference: the rows above show what calling it as an op costs, not a kernel.")
        show(f"Load average now {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores: other work on the machine is in these times.")
        show("no GPU found: nothing here was measured on a GPU\n")
        cases = [case for family in config.stash[FAMILIES] for case in family.cases("cuda", True, False)]
        show(harness.floors(harness.in_order(cases), peaks.DATA_SHEET["H200"]))
    terminalreporter.section("what the compiler makes of the kernels for sm_90 (needs no GPU; python -m bench.codegen: every target)")
    show(_codegen())
    if config.option.save:
        harness.append(rows)
        show(f"{len(rows)} rows appended to {harness.RESULTS}")


def _codegen() -> str:
    """Last of all: where a kernel is not stored as it is, two workers compile, and would disturb anything timed beside them. One target of five."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    try:
        done = subprocess.run(
            [sys.executable, "-m", "bench.codegen", "--only", "sm_90"], cwd=harness.ROOT, env=env, capture_output=True, text=True, timeout=300
        )
    except subprocess.TimeoutExpired:
        return "not shown: compiling took more than 300 s"
    return done.stdout if done.stdout else f"failed: {done.stderr[-1500:]}"
