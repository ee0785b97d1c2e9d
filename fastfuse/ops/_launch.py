"""A kernel with its compile-time constants, launched again without Triton's way of finding out what it has compiled."""

import functools
import sys

import torch

from fastfuse import tune
from fastfuse.ops import _op

if _op.HAS_TRITON:
    from triton import knobs


class Launch:
    """A kernel and its constants: kernel[grid] at the first call, afterwards the compiled kernel itself.

    Of the 36 Python calls (14 us) of kernel[grid] most find out which compiled kernel its arguments need. A plan (see _fused_op.py), which keeps its Launches,
    serves arguments of one kind alone: they need the kernel of the first call. Where Triton's hooks or debugging watch launches, it is kernel[grid] again.
    """

    __slots__ = ("compiled", "constants", "device", "direct", "function", "kernel", "metadata", "run", "values")

    def __init__(self, kernel, **constants):
        self.kernel, self.constants, self.run, self.direct = kernel, constants, None, None

    def __call__(self, grid: tuple[int, int, int], *args) -> None:
        if self.run is None or self.kernel.pre_run_hooks or is_watched():
            self._by_triton(grid, args)
        else:
            stream = torch._C._cuda_getCurrentRawStream(self.device)
            if self.direct is None:
                self.run(*grid, stream, self.function, self.metadata, None, None, None, *args, *self.values)
            else:
                launch, constants = self.direct
                launch(*grid, stream, *constants, (*args, *self.values))

    def again(self, grid: tuple[int, int, int], *args) -> None:
        """Where self.direct is given and nothing watches. Tensors' addresses serve as well as tensors: Triton's C function asks a tensor for its own, and
        the driver whether it is one of the device."""
        launch, constants = self.direct
        launch(*grid, torch._C._cuda_getCurrentRawStream(self.device), *constants, (*args, *self.values))

    def _by_triton(self, grid: tuple[int, int, int], args: tuple) -> None:
        _settle_cache_keys()
        compiled = self.kernel[grid](*args, **self.constants)
        if self.run is None and compiled is not None and not _op.INTERPRET and _op.launch_interceptor is None:
            self.compiled = compiled  # held whole: from Triton 3.9 on, its module is unloaded with it
            self.function, self.metadata = compiled.function, compiled.packed_metadata
            self.values = tuple(self.constants[p.name] for p in self.kernel.params[len(args) :])
            self.device = torch.cuda.current_device()
            self.direct = _direct(compiled)
            self.run = compiled.run


def is_watched() -> bool:
    """Whether Triton's hooks or debugging look on at launches."""
    runtime = knobs.runtime
    try:  # attributes alone: each call of a function would cost more than the launch's own 2 us allow
        watched = runtime.launch_enter_hook.calls or runtime.launch_exit_hook.calls or runtime.add_stages_inspection_hook or runtime.debug
        return watched or "instrumentation_mode" in knobs.compilation.__dict__
    except AttributeError:  # a hook that is no chain
        return True


def _direct(compiled) -> tuple | None:
    """The C function under Triton's launcher, and what it takes beside a launch's own arguments: without scratch memory to allocate, the launcher adds
    nothing but 3 Python calls (7 with Triton 3.9). None for a launcher that is not known to be like that."""
    launcher = compiled.run
    if type(launcher).__name__ != "CudaLauncher" or not tune.TRITON.startswith(("3.7.", "3.9.")) or getattr(launcher, "gsan_enabled", False):
        return None
    if launcher.global_scratch_size or launcher.profile_scratch_size:
        return None
    options = launcher.launch_cooperative_grid, launcher.launch_pdl
    none = (None,) * 5  # hooks of launches and scratch memory
    return launcher.launch, (compiled.function, *options, compiled.packed_metadata, *none, launcher.arg_annotations, launcher.kernel_signature)


@functools.cache
def _settle_cache_keys() -> None:
    """Compute the kernels' cache keys in one order, before the first launch.

    Up to Triton 3.7 (triton-lang/triton#10494 mends it) a kernel's key depends on which kernels got theirs before it: a process that launches in another
    order than the one before compiles its NF4 kernels again. 0.2 s once, most of it to parse their source, which launching all of them would do too.
    """
    if not _op.INTERPRET:
        for module in [sys.modules[name] for name in sorted(sys.modules) if name.startswith("fastfuse.kernels.")]:
            for value in vars(module).values():
                getattr(value, "cache_key", None)
