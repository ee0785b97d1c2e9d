"""What a GPU would wait for, and the kernels it would launch, seen on a CPU."""

from collections.abc import Callable

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes


class NoReading(TorchFunctionMode):
    """Fails on ways between host and device that are no op on a CPU."""

    NAMES = ("tolist", "item", "numpy", "cpu", "tensor", "as_tensor", "__bool__", "__index__", "__int__", "__float__", "__array__", "__contains__")

    def __torch_function__(self, func, types, args=(), kwargs=None):
        assert getattr(func, "__name__", "") not in self.NAMES, f"{func.__name__} waits for the device"
        return func(*args, **(kwargs or {}))


class Launched:
    """A kernel whose launches go to note(name, grid). What the interpreter does inside of one is out of every mode's sight."""

    def __init__(self, kernel: object, name: str, note: Callable):
        self.kernel, self.name, self.note = kernel, name, note

    def __getitem__(self, grid):
        def run(*args, **options):
            self.note(self.name, grid)
            with _disable_current_modes(), torch._C.DisableTorchFunction():
                self.kernel[grid](*args, **options)

        return run
