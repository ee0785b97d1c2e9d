"""Kernel tests run on a GPU where there is one, else on the CPU through Triton's interpreter; gpu tests only on a GPU."""

import os
import sys

import torch

GPU = torch.cuda.is_available()
if not GPU:
    os.environ["TRITON_INTERPRET"] = "1"  # read when fastfuse imports Triton
    torch.set_num_threads(1)  # the interpreter's many small calls lose more to threads than they gain
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest  # noqa: E402

import fastfuse  # noqa: E402


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


def pytest_collection_modifyitems(items):
    if not GPU:
        skip = pytest.mark.skip(reason="no GPU: not measured, not run")
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(skip)
