"""Checks of values that live on a device, without waiting for it."""

import torch
from torch import Tensor

from fastfuse.ops import _op


def values_are_at_hand(t: Tensor) -> bool:
    """Whether looking at t's values costs nothing: a CPU tensor, outside torch.compile and fake tensors, and not in the place of one on a GPU."""
    if _op.launch_interceptor is not None:
        return False
    return t.device.type == "cpu" and not torch.compiler.is_compiling() and not torch._is_functional_tensor(t) and type(t) is Tensor


def assert_on_device(condition: Tensor, message: str) -> None:
    """Fails on the device where `condition` (a bool scalar) is false: no host synchronisation, safe in CUDA graphs."""
    if condition.device.type != "meta":
        torch._assert_async(condition, message)
