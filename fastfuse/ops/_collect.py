"""Which kernels calls would launch, compiled for which device: found out without compiling, launching or reading anything. For warm-up."""

import contextlib
import sys
import threading
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from fastfuse import tune
from fastfuse.ops import _op
from fastfuse.ops._fused_op import leaves

if _op.HAS_TRITON:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

# Triton keeps what it has compiled by device: by this one it keeps nothing that a launch would find.
_NOWHERE = "no device"
_lock = threading.RLock()  # autograd runs a thread for each GPU


@contextlib.contextmanager
def collecting(target: "GPUTarget", arch: str, processors: int) -> Iterator[dict[str, Callable]]:
    """Inside the block fused ops give zeros, and the dict fills up: Triton's cache key -> a function that compiles the kernel into Triton's cache.

    The launchers run as they are, over meta tensors in place of their arguments, for a driver that says `target` and launches nothing. Anything else
    that launches Triton kernels, in another thread too, has to wait: Triton has one driver.
    """
    found: dict[str, Callable] = {}

    def launch_interceptor(launch: Callable, args: tuple):
        device = leaves(args)[0][0].device
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("warmup: a call captures a CUDA graph, which would hold zeros for good: warm up first, capture afterwards")
        with _lock, _driver(target), _Finder(found):
            made = launch(*tree_map_only(Tensor, _on_meta, args))
        return tree_map_only(Tensor, lambda t: torch.zeros_like(t, device=device), made)

    before = _op.launch_interceptor
    if before is not None:
        raise RuntimeError("collecting: kernels are being collected already")
    _op.launch_interceptor = launch_interceptor
    try:
        with tune.assume(arch, processors):
            yield found
    finally:
        _op.launch_interceptor = before
        for kernel in _kernels():
            kernel.device_caches.pop(_NOWHERE, None)


def _on_meta(t: Tensor) -> Tensor:
    """As far off an aligned address as t is: kernels are compiled for that too."""
    off = t.data_ptr() % 16 // t.element_size()
    room = off + 1 + sum((n - 1) * stride for n, stride in zip(t.shape, t.stride(), strict=True)) if t.numel() else off
    return torch.empty(room, dtype=t.dtype, device="meta").as_strided(t.shape, t.stride(), off)


@contextlib.contextmanager
def _driver(target: "GPUTarget") -> Iterator[None]:
    """A driver that has nothing to launch on. Entered again inside, where an op launches another op's kernels."""
    drivers = triton.runtime.driver
    before = drivers._active
    drivers.set_active(SimpleNamespace(get_current_target=lambda: target, get_current_device=lambda: _NOWHERE, get_current_stream=lambda device=None: 0))
    try:
        yield
    finally:
        drivers._active = before


def _kernels() -> Iterator["JITFunction"]:
    for name, module in list(sys.modules.items()):
        if name.startswith("fastfuse.kernels."):
            yield from (value for value in vars(module).values() if isinstance(value, JITFunction))


class _Finder:
    """What Triton hands its compilations to: keeps them instead of running them."""

    def __init__(self, found: dict[str, Callable]):
        self.found = found

    def submit(self, key: str, compile_kernel: Callable, _finish: Callable) -> "_Unlaunched":
        self.found.setdefault(key, compile_kernel)
        return _Unlaunched()

    def __enter__(self):
        self._token = triton.runtime._async_compile.active_mode.set(self)

    def __exit__(self, *error):
        triton.runtime._async_compile.active_mode.reset(self._token)


class _Unlaunched:
    """In the place of a compiled kernel."""

    function = packed_metadata = None

    def launch_metadata(self, *args) -> None:
        return None

    def run(self, *args) -> None:
        return None
