"""Kernel tests run on a GPU where there is one, else on the CPU through Triton's interpreter; gpu tests only on a GPU."""

import json
import os
import sys
from collections import Counter
from pathlib import Path

import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when fastfuse imports Triton
    torch.set_num_threads(1)  # the interpreter's many small calls lose more to threads than they gain
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402

import fastfuse  # noqa: E402


def _remember_what_the_interpreter_looks_up() -> None:
    """Triton's interpreter lists all of triton.language whenever a kernel calls a function, and builds a table of dtypes for every value: a third of its time."""
    import triton.language as tl
    from triton.runtime import interpreter

    builtins = {}
    for pkg in (tl, tl.core, tl.math, tl.tensor, tl.core.tensor_descriptor_base):
        builtins[pkg] = [name for name in dir(pkg) if tl.core.is_builtin(getattr(pkg, name))]

    def patch(pkg, *rest):
        for name in builtins[pkg]:
            if tl.core.is_builtin(member := getattr(pkg, name)):
                interpreter._patch_attr(pkg, name, member, *rest)

    dtypes, look_up = {}, interpreter._get_np_dtype

    def np_dtype(of):
        if of.name not in dtypes:
            dtypes[of.name] = look_up(of)
        return dtypes[of.name]

    interpreter._patch_builtin, interpreter._get_np_dtype = patch, np_dtype


if not GPU:
    _remember_what_the_interpreter_looks_up()


@pytest.fixture
def device() -> str:
    return "cuda" if GPU else "cpu"


@pytest.fixture
def kernels():
    """Inside this fixture public ops launch the Triton kernels, on a CPU too."""
    with fastfuse.backend("triton"):
        yield


@pytest.fixture(autouse=True)
def seeded_and_poisoned():
    """Every test starts from one seed, and memory from torch.empty holds NaN: an output nobody wrote cannot pass."""
    torch.manual_seed(0)
    torch.use_deterministic_algorithms(True, warn_only=True)  # what makes PyTorch fill uninitialised memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def launches(monkeypatch) -> list[tuple[str, tuple]]:
    """(name, grid) of every kernel that an op launches from now on."""
    import waiting

    found = []
    for name, module in [*sys.modules.items()]:
        for kernel in [n for n in vars(module) if n.endswith("_kernel")] if name.startswith("fastfuse.ops.") else ():
            monkeypatch.setitem(vars(module), kernel, waiting.Launched(getattr(module, kernel), kernel, lambda *launch: found.append(launch)))
    return found


@pytest.fixture
def values_on_a_device(monkeypatch):
    """Nothing looks at a tensor's values, as if they were on a GPU."""
    for name, module in [*sys.modules.items()]:
        if name.startswith("fastfuse.ops.") and "values_are_at_hand" in vars(module):
            monkeypatch.setitem(vars(module), "values_are_at_hand", lambda t: False)


@pytest.fixture
def taken(monkeypatch):
    """Of every call in which a layer's prepared one was asked, whether that served it."""
    from fastfuse.modules._prepared import PreparedLinear

    asked, call = [], PreparedLinear.__call__

    def counted(self, *args, **kwargs):
        out = call(self, *args, **kwargs)
        asked.append(out is not None)
        return out

    monkeypatch.setattr(PreparedLinear, "__call__", counted)
    return asked


SECONDS = Path(__file__).with_name("seconds.json")  # of each file: pytest --record-seconds writes it


def pytest_addoption(parser):
    parser.addoption("--record-seconds", action="store_true", help="write what each file took into tests/seconds.json, by which they are ordered")


def pytest_collection_modifyitems(items):
    """The longest file first, as cores take files one after the other."""
    seconds = json.loads(SECONDS.read_text())
    items.sort(key=lambda item: -seconds.get(item.path.name, 0))
    if not GPU:
        skip = pytest.mark.skip(reason="no GPU: not measured, not run")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)


def pytest_terminal_summary(terminalreporter):
    if terminalreporter.config.option.record_seconds:
        seconds = Counter()
        for report in (r for reports in terminalreporter.stats.values() for r in reports if hasattr(r, "duration")):
            seconds[Path(report.location[0]).name] += report.duration
        SECONDS.write_text(json.dumps({name: round(taken) for name, taken in sorted(seconds.items())}, indent=1) + "\n")
