"""Options of `pytest bench/`, and what it prints at its end."""

import functools
import importlib.util
import os
import subprocess
import sys

import pytest
import torch

from bench import harness, peaks

ROWS = pytest.StashKey[list]()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("bench")
    group.addoption("--quick", action="store_true", help="fewer shapes")
    group.addoption("--compile", action="store_true", help="time torch.compile at every shape, not at a few")
    group.addoption("--save", action="store_true", help="append the rows to bench/results")


def pytest_configure(config: pytest.Config) -> None:
    config.stash[ROWS] = []
    if importlib.util.find_spec("pytest_benchmark"):
        config.option.benchmark_quiet = True  # one table: ours has the floors


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
        show(harness.floors(harness.all_cases("cuda", config.option.quick), peaks.DATA_SHEET["H200"]))
    terminalreporter.section("what the compiler makes of the kernels (needs no GPU)")
    show(_codegen())
    if config.option.save:
        harness.append(rows)
        show(f"{len(rows)} rows appended to {harness.RESULTS}")


def _codegen() -> str:
    """Last of all: its two workers would disturb anything timed beside them."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    try:
        done = subprocess.run([sys.executable, "-m", "bench.codegen"], cwd=harness.ROOT, env=env, capture_output=True, text=True, timeout=300)
    except subprocess.TimeoutExpired:
        return "not shown: compiling took more than 300 s"
    return done.stdout if done.stdout else f"failed: {done.stderr[-1500:]}"
