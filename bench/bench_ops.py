"""Time every case of this device. A wrong or failing fastfuse fails here; a peer's fault is a row of the table."""

import functools
import importlib.util
import itertools
import time
from collections.abc import Callable

import pytest

from bench import harness
from bench.conftest import DEVICE, ROWS, device_peaks


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    cases = harness.all_cases(DEVICE, metafunc.config.option.quick, metafunc.config.option.compile)
    params = [pytest.param(case, provider, id="-".join([*case.key, provider]).replace(" ", "-")) for case in cases for provider in case.providers]
    metafunc.parametrize(("case", "provider"), params)


def test_op(case: harness.Case, provider: str, request: pytest.FixtureRequest) -> None:
    base, parity, sets = _prepared(case)
    row = base | harness.measure_provider(case, provider, parity, sets, _timer(request))
    request.config.stash[ROWS].append(row)
    if row.get("note"):
        pytest.skip(f"{provider}: {row['note']}")
    if provider == harness.OURS:
        assert "error" not in row, row["error"]
        assert row["parity"], f"error is {row['error_over_limit']} times its limit"


@functools.lru_cache(maxsize=1)
def _prepared(case: harness.Case) -> tuple[dict, harness.Parity, list[dict]]:
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
    fn(sets[0])
    start = time.perf_counter()
    fn(sets[0])
    rounds = max(5, min(200, int(0.25 / (time.perf_counter() - start))))
    turns = itertools.cycle(sets)
    benchmark.pedantic(fn, setup=lambda: ((next(turns),), {}), rounds=rounds)
    return benchmark.stats.stats.median * 1e6, "host clock"
