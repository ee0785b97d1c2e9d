"""State-dict hooks that replace NF4 weights by the numbers they stand for, so that a QLoRA checkpoint is a plain one."""

import functools
import sys
import tempfile
from typing import Any

import torch
from torch import Tensor, nn

from fastfuse.errors import Unsupported
from fastfuse.ops import nf4_dequantize
from fastfuse.quant.nf4 import is_torchao

# True before a model is built: its state dicts are then written to memory-mapped files, for hosts with less memory than the checkpoint.
_use_low_cpu_ram = False


def reparametrize_as_dtype_state_dict_post_hook(
    model: nn.Module, state_dict: dict[str, Any], *args: Any, dtype: torch.dtype = torch.bfloat16, offload_to_cpu: bool = True, **kwargs: Any
) -> None:
    """Replace every NF4Tensor of state_dict by a dense tensor of `dtype`, on the CPU where offload_to_cpu; other values stay as they are.

    For nn.Module._register_state_dict_hook, which passes the arguments not named here (torchtune.modules.common_utils).
    """
    for name, value in state_dict.items():
        if is_torchao(value):
            dense = _dequantize(value, dtype)
            state_dict[name] = dense.cpu() if offload_to_cpu else dense


def _low_ram_reparametrize_as_dtype_state_dict_post_hook(
    model: nn.Module, state_dict: dict[str, Any], *args: Any, dtype: torch.dtype = torch.bfloat16, offload_to_cpu: bool = True, **kwargs: Any
) -> None:
    """As the hook above, one tensor in memory at a time: with offload_to_cpu every tensor of the result is mapped from a file without a name."""
    for name, value in state_dict.items():
        if not isinstance(value, Tensor):
            continue
        dense = _dequantize(value, dtype) if is_torchao(value) else value
        if offload_to_cpu and dense.numel():
            with tempfile.NamedTemporaryFile() as file:  # the mapping keeps the data after the name is gone
                mapped = torch.from_file(file.name, shared=True, size=dense.numel(), dtype=dense.dtype)
            dense = mapped.view(dense.shape).copy_(dense)
        state_dict[name] = dense


def _dequantize(weight: Tensor, dtype: torch.dtype) -> Tensor:
    try:
        return nf4_dequantize(weight, dtype)  # torchao's own makes two int64 tensors of half the weight's elements on the way
    except Unsupported:
        return weight.to(dtype)


def _register_reparametrize_state_dict_hooks(module: nn.Module, dtype: torch.dtype = torch.bfloat16, offload_to_cpu: bool = True) -> None:
    """Make module.state_dict() give NF4 weights as dense tensors of `dtype`.

    Raises RuntimeError where _use_low_cpu_ram is set on Windows, whose mapped files cannot lose their names.
    """
    if _use_low_cpu_ram and sys.platform == "win32":
        raise RuntimeError("_use_low_cpu_ram is set, which Windows does not support: a mapped file cannot be deleted there")
    hook = _low_ram_reparametrize_as_dtype_state_dict_post_hook if _use_low_cpu_ram else reparametrize_as_dtype_state_dict_post_hook
    module._register_state_dict_hook(functools.partial(hook, dtype=dtype, offload_to_cpu=offload_to_cpu))
