"""Host time of a call, without a GPU: Python calls and microseconds from the public function down to the driver call that launches.

python -m bench.host                   the table, and the sum over a decode step of the 11B model
python -m bench.host --only PATTERN    rows whose name matches the regular expression
python -m bench.host --save            and store them in bench/results/host.json
python -m bench.host --check [--quick] compare call counts alone with the stored ones: fails where one is over 10% higher

fastfuse, bitsandbytes, PyTorch's torch.cuda and Triton's binder, launcher and compiler run as on an H200 (sm_90, 132 processors), over CPU tensors; the CUDA
driver and bitsandbytes' C library are stubs that return at once (stub_cuda.c). Calls are counted by cProfile, C functions included, less those of an empty
call; they are deterministic. Microseconds are the minimum over batches. "own" rows are the host library without fastfuse.

What PyTorch computes itself it really computes here, so times hold a CPU's work where a GPU's host would only launch: 23 us of the 99 of PEFT's own layer of
4096 x 4096, all but a few in its backward, which decodes the whole weight, as in DoRA's norms and transformers' attention, most in rows of many tokens, and the
reductions of our backwards. Counts hold. The decode step is summed over layers of 512 x 512, where little is computed and as much is called.
On a GPU autograd runs backward in a thread of its own, and torch.cuda.current_stream makes about ten calls more.
"""

import ast
import contextlib
import cProfile
import ctypes
import gc
import importlib.abc
import importlib.machinery
import importlib.metadata
import json
import logging
import operator
import os
import re
import shlex
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

from bench import arguments
from bench.host_case import BACKWARD, NO_GRAD, Case

STORED = Path(__file__).parent / "results" / "host.json"
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastfuse-bench-host"
PACKAGES = ("torch", "triton", "transformers", "peft", "bitsandbytes", "torchao")
SLACK = 1.10  # how much a count may grow
LINEARS = 32 * 7 + 8 * 5  # of the 11B decoder: k and v of its 8 cross-attention layers are computed once, from the image
launches: ctypes.c_longlong  # of the stub driver, since the process began


class AsOnGPU(importlib.machinery.SourceFileLoader):
    """Loads a module so that it takes CPU tensors for a GPU's: "cuda" and "cpu" have changed places in its source, so every frame, branch and
    registration is the GPU's. Never from or into __pycache__."""

    def get_code(self, fullname: str):
        return self.source_to_code(self.get_data(self.path), self.path)

    def source_to_code(self, data, path, **options):
        return compile(_Swapped().visit(ast.parse(data)), path, "exec", dont_inherit=True)


class _Swapped(ast.NodeTransformer):
    def visit_Constant(self, node: ast.Constant) -> ast.Constant:
        swapped = {"cuda": "cpu", "cpu": "cuda"}.get(node.value) if isinstance(node.value, str) else None
        return node if swapped is None else ast.copy_location(ast.Constant(swapped), node)

    def visit_keyword(self, node: ast.keyword) -> ast.keyword:
        return node if node.arg == "device" else self.generic_visit(node)  # where a tensor is made

    def visit_Attribute(self, node: ast.Attribute) -> ast.Attribute:
        node.attr = {"is_cuda": "is_cpu", "is_cpu": "is_cuda"}.get(node.attr, node.attr)
        return self.generic_visit(node)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path, target=None):
        if name.partition(".")[0] not in ("fastfuse", "bitsandbytes"):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and type(spec.loader) is importlib.machinery.SourceFileLoader:
            spec.loader = AsOnGPU(name, spec.loader.path)
        return spec


def as_on_gpu() -> None:
    """Make this process one with an H200 whose tensors are the CPU's; before fastfuse, bitsandbytes or Triton's driver is there.

    Of fastfuse it assumes only that device types are compared with the words "cuda" and "cpu", and that a CPU device's index, None, counts as the current one.
    """
    global launches
    assert not {"fastfuse", "bitsandbytes", "triton"} & sys.modules.keys(), "as_on_gpu comes first"
    os.environ["TRITON_LIBCUDA_PATH"] = str(folder := compile_stub())
    os.environ["TRITON_CACHE_DIR"] = str(CACHE / "triton")  # of its own: Triton keeps there what it linked with the stub
    os.environ["TRITON_INTERPRET"] = "0"
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    stub = ctypes.CDLL(str(folder / "libcuda.so.1"), mode=ctypes.RTLD_GLOBAL)
    launches = ctypes.c_longlong.in_dll(stub, "launches")
    sys.meta_path.insert(0, _Finder())
    import torch

    torch.set_num_threads(1)
    zero = gc.get_freeze_count  # C functions, as on a GPU: one without arguments that gives 0, one of a device that gives False
    torch._C._cuda_getDevice, torch._C._cuda_getCurrentRawStream = zero, callable
    torch.cuda._initialized, torch.cuda._is_in_bad_fork, torch.cuda.graphs._cuda_isCurrentStreamCapturing = True, zero, zero
    h200 = SimpleNamespace(name="NVIDIA H200", major=9, minor=0, multi_processor_count=132, warp_size=32)
    torch.cuda.get_device_properties = lambda device=None: h200
    torch.cuda.current_stream = lambda device=None: torch.cuda._lazy_init()
    torch.cuda.memory_snapshot = list
    torch.Tensor.record_stream = callable
    torch._assert_async = operator.is_  # what a kernel would have written is not there
    import triton
    from triton.backends.nvidia.driver import CudaDriver

    triton.runtime.driver.set_active(CudaDriver())
    for library in ("bitsandbytes", "torchao", "torch.utils._pytree", "transformers"):  # what they lack on a CPU, and of a configuration this small
        logging.getLogger(library).setLevel(logging.ERROR)
    import bitsandbytes.cextension as native

    pointers = type("Stub", (), {"__getattr__": lambda self, name: stub["stub_call"]})
    native.lib = native.CudaBNBNativeLibrary(pointers())
    import bitsandbytes.backends.cuda.ops  # noqa: F401  registered for the CPU


def compile_stub() -> Path:
    """The folder of libcuda.so.1, compiled where the source is newer. Raises CalledProcessError where there is no C compiler."""
    source, folder = Path(__file__).with_name("stub_cuda.c"), CACHE / "driver"
    library, link = folder / "libcuda.so.1", folder / "libcuda.so"
    if not library.exists() or library.stat().st_mtime < source.stat().st_mtime:
        folder.mkdir(parents=True, exist_ok=True)
        fresh = folder / f"{os.getpid()}.so"  # renamed when whole: another process may be doing the same
        compiler = shlex.split(os.environ.get("CC", "cc"))
        subprocess.run([*compiler, "-O1", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", str(fresh), str(source)], check=True)
        fresh.replace(library)
    with contextlib.suppress(FileExistsError):
        link.symlink_to(library.name)
    return folder


class Row(NamedTuple):
    launches: float  # of Triton kernels, a call
    calls: int
    us: float | None


def measure(case: Case, mode: str, timed: bool) -> Row:
    import torch

    run, x = case.function(), case.x().requires_grad_(mode != NO_GRAD)

    def forward():
        return run(x)

    def with_backward():
        torch.autograd.backward(run(x), gradients)

    with torch.set_grad_enabled(mode != NO_GRAD):
        made, call = forward(), forward
        if mode == BACKWARD:
            gradients = [torch.zeros_like(t) for t in made] if isinstance(made, (list, tuple)) else torch.zeros_like(made)
            call = with_backward
        for _ in range(4):
            before = launches.value
            call()
        per_call = launches.value - before
        if (per_call == 0) != case.own:
            raise RuntimeError(f"{case.name}, {mode}: {per_call} launches of Triton kernels: not the way that the row is about")
        return Row(per_call, count(call), best(call) if timed else None)


def count(call: Callable, n: int = 10) -> int:
    """Python frames and C functions of a call, its own frame left out."""
    profile = cProfile.Profile()
    gc.disable()
    profile.enable()
    for _ in range(n):
        call()
    profile.disable()
    gc.enable()
    return round(sum(entry.callcount for entry in profile.getstats()) / n) - 1


def best(call: Callable, batches: int = 400, seconds: float = 1.5) -> float:
    """Microseconds a call, of the fastest batch."""
    n, least, start = 1, float("inf"), time.perf_counter()
    end = start + seconds
    for _ in range(batches):
        for _ in range(n):
            call()
        now = time.perf_counter()
        least, start, n = min(least, (now - start) / n), now, 8 if now - start < 0.01 else n
        if now > end:
            break
    return round(least * 1e6, 2)


def rows(only: str, quick: bool, timed: bool) -> Iterator[tuple[str, Row]]:
    """(name, what was measured) of each case in each of its modes."""
    from bench.host_cases import cases

    for case in cases():
        for mode in case.modes:
            name = f"{case.name}, {mode}"
            if re.search(only, name) and (case.quick or not quick):
                yield name, measure(case, mode, timed)


def line(name: str, row: Row) -> str:
    us = f"{row.us:10.2f}" if row.us else f"{'-':>10}"
    return f"{name:72} {row.launches:8} {row.calls:7} {us}"


def decode_step(found: dict[str, Row]) -> str:
    """The sum over the linear layers of one token of the 11B model, each of them with LoRA over bitsandbytes' NF4; "" without their rows."""
    from bench.host_cases import DECODE

    ours, own = (found.get(f"{name}, {NO_GRAD}") for name in DECODE)
    if not (ours and own and ours.us and own.us):
        return ""
    sums = "\n".join(f"  {who:34} {LINEARS * r.calls:8} calls {LINEARS * r.us / 1e3:8.1f} ms" for who, r in (("patched", ours), ("PEFT + bitsandbytes", own)))
    ratio = f"  patched over PEFT + bitsandbytes   {ours.calls / own.calls:7.2f}x calls {ours.us / own.us:7.2f}x the time"
    return f"one decode step, 32 layers of 7 and 8 of 5 = {LINEARS} LoRA linears\n{sums}\n{ratio}"


def differences(found: dict[str, Row], stored: dict[str, list]) -> list[str]:
    """In words: rows whose calls or launches grew beyond what is stored, and rows that are not stored."""
    wrong = []
    for name, row in found.items():
        if name not in stored:
            wrong.append(f"{name}: no such row is stored, run with --save")
            continue
        launched, calls, _ = stored[name]
        if row.calls > SLACK * calls:
            wrong.append(f"{name}: {row.calls} calls, stored are {calls}: over {SLACK - 1:.0%} more")
        if row.launches > launched:
            wrong.append(f"{name}: {row.launches} launches, stored are {launched}")
    return wrong


def save(key: str, found: dict[str, Row], whole: bool) -> None:
    """Rows of another Triton stay; so do others not measured now, unless all were asked for or they are of other versions of the packages."""
    from bench.peaks import device_name

    held = json.loads(STORED.read_text()) if STORED.exists() else {}
    entry = held.get(key, {})
    kept = entry["rows"] if not whole and entry.get("versions") == versions() else {}
    held[key] = {"cpu": device_name("cpu"), "versions": versions(), "rows": kept | {name: list(row) for name, row in found.items()}}
    text = json.dumps({k: held[k] for k in sorted(held)}, indent=1)
    STORED.write_text(re.sub(r"\[\s+(\S+)\s+(\S+)\s+(\S+)\s+\]", r"[\1 \2 \3]", text) + "\n")  # a row on a line


def versions() -> dict[str, str]:
    """What counts depend on, besides fastfuse."""
    return {p: importlib.metadata.version(p).partition("+")[0] for p in PACKAGES} | {"python": ".".join(map(str, sys.version_info[:2]))}


def main() -> None:
    p = arguments(__doc__, quick="the rows that tests check", save="store the rows", check="fail where a call count grew")
    p.add_argument("--only", default="", metavar="PATTERN")
    a = p.parse_args()
    if a.save and a.check:
        p.error("--save and --check exclude each other")
    warnings.filterwarnings("ignore")
    as_on_gpu()
    import triton

    key, found = f"triton {triton.__version__}", {}
    stored = json.loads(STORED.read_text()).get(key) if a.check else None
    if a.check and stored is None:
        sys.exit(f"bench.host: no rows of {key} are stored in {STORED.name}")
    print(f"{key:72} {'launches':>8} {'calls':>7} {'us':>10}")
    for name, row in rows(a.only, a.quick, timed=not a.check):
        found[name] = row
        print(line(name, row), flush=True)
    if step := decode_step(found):
        print(step)
    if a.save:
        save(key, found, whole=not (a.only or a.quick))
    if a.check and (wrong := differences(found, stored["rows"])):
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
