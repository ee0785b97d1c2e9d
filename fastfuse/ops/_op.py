"""What every op shares: registration with PyTorch, the backend in force, the cost of a call, argument checks and errors."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from fastfuse import tune
from fastfuse.errors import Unsupported

try:
    import triton
except ImportError:  # Triton ships for Linux alone; everywhere else the PyTorch references serve
    triton = None

HAS_TRITON = triton is not None
INTERPRET = HAS_TRITON and bool(triton.knobs.runtime.interpret)  # TRITON_INTERPRET=1 when fastfuse was imported
BACKENDS = ("auto", "triton", "torch")

_backend = "auto"


@dataclass(frozen=True)
class Cost:
    """What a call cannot avoid: bytes moved to and from device memory, each tensor once, and matrix-unit flops."""

    bytes: int
    flops: int = 0


def nbytes(*tensors: Tensor | None) -> int:
    return sum(t.numel() * t.element_size() for t in tensors if t is not None)


def check(ok: bool, message: str, error: type[Exception] = ValueError) -> None:
    """Raise before any launch: a bad argument must never reach the device."""
    if not ok:
        raise error(message)


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Choose what runs inside the block: "auto", "triton" or "torch".

    auto: Triton kernels on a GPU, the PyTorch reference on a CPU. triton: the kernels, on a CPU through Triton's
    interpreter (slow; needs TRITON_INTERPRET=1 before fastfuse is imported). torch: the eager reference everywhere.
    The choice is process-wide while the block lasts. Raises ValueError for another name, Unsupported where it cannot run.
    """
    global _backend
    check(name in BACKENDS, f"backend: {name!r} is none of {', '.join(BACKENDS)}")
    before, _backend = _backend, name
    try:
        yield
    finally:
        _backend = before


def current_backend() -> str:
    return _backend


def uses_reference(op: str, x: Tensor) -> bool:
    """True where the caller chose the eager reference. Raises Unsupported where the chosen backend cannot run x."""
    if _backend == "torch":
        return True
    if x.device.type == "cuda":
        check_triton(op)
    elif x.device.type not in ("cpu", "meta") and _backend == "auto":
        return True  # a device without kernels of ours: eager PyTorch runs wherever PyTorch does
    elif _backend == "triton":
        check_triton(op)
        if not INTERPRET:
            raise Unsupported(f"{op}: backend 'triton' on a {x.device.type} tensor needs TRITON_INTERPRET=1 set before import", "NO_GPU")
    return False


def check_triton(op: str) -> None:
    if not HAS_TRITON:
        raise Unsupported(f"{op}: backend 'triton' needs the triton package, which is not installed", "NO_TRITON")


def check_device(op: str, device: torch.device) -> None:
    """Raise Unsupported where the backend in force has no kernel of `op` for this device."""
    if device.type == "cuda" and _backend != "torch":
        check_triton(op)
        tune.covering_arch(op, tune.arch_of(device))


def backend_for(device: torch.device) -> str:
    """What would run on this device now, in words."""
    if _backend == "torch":
        return "torch"
    if device.type == "cuda":
        return "triton"
    return "triton (interpreter)" if _backend == "triton" else "torch"


def fused_op(name: str, reference: Callable) -> Callable:
    """Register a Triton launcher as torch.ops.fastfuse.<name>, an opaque op for autograd and torch.compile.

    The eager reference does three more jobs: it is the CPU implementation, the fake kernel that torch.compile
    traces, and the truth the tests compare with. The first argument of both must be a tensor.
    """

    def register(launch: Callable) -> torch.library.CustomOpDef:
        def on_cpu(*args):
            return (launch if _backend == "triton" and INTERPRET else reference)(*args)

        op = torch.library.custom_op(f"fastfuse::{name}", _no_autocast(_on_device(launch)), mutates_args=(), device_types="cuda")
        op.register_kernel("cpu")(_no_autocast(on_cpu))
        op.register_fake(reference)
        return op

    return register


def _no_autocast(kernel: Callable) -> Callable:
    """Dtypes were settled by the public function: autocast must not reach the matrix products inside."""

    @functools.wraps(kernel)
    def run(x, *args):
        if not torch.is_autocast_enabled(x.device.type):
            return kernel(x, *args)
        with torch.autocast(x.device.type, enabled=False):
            return kernel(x, *args)

    return run


def _on_device(launch: Callable) -> Callable:
    """Triton launches on the current device, which need not be the one the tensors are on."""

    @functools.wraps(launch)
    def run(x, *args):
        if x.device.index in (None, torch.cuda.current_device()):
            return launch(x, *args)
        with torch.cuda.device(x.device):
            return launch(x, *args)

    return run


def rows(x: Tensor) -> Tensor:
    """x as [M, last dim] with a contiguous last dim: a view wherever the layout allows one."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(-1) == 1 else x.contiguous()
