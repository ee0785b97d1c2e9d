"""What a training recipe does with adapters: find, freeze, disable, check, save and merge them."""

import contextlib
import warnings
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import nn

from fastfuse.errors import InvalidArgument, Unsupported
from fastfuse.quant.nf4 import is_torchao

# The projections of MultiHeadAttention that may carry an adapter.
LORA_ATTN_MODULES = Literal["q_proj", "k_proj", "v_proj", "output_proj"]

_SUFFIXES = ("lora_a.weight", "lora_b.weight", "magnitude")


class _WrongKeys(RuntimeError, AssertionError):
    """RuntimeError in torchtune's last source, AssertionError in its last release: code written for either keeps working."""


@runtime_checkable
class AdapterModule(Protocol):
    """A module with adapter parameters. It need not inherit from this: having the method is enough."""

    def adapter_params(self) -> list[str]:
        """The names, as in named_parameters, of the parameters that belong to the adapter."""
        ...


def get_adapter_params(model: nn.Module) -> dict[str, nn.Parameter]:
    """The adapter's parameters by their full names, as in model.named_parameters().

    Raises InvalidArgument where a module's adapter_params names a parameter it does not have.
    """
    parameters = {}
    for path, module in model.named_modules():
        if not _is_adapter(module):
            continue
        names = module.adapter_params()
        own = {name: p for name, p in module.named_parameters() if name in names}
        if missing := [name for name in names if name not in own]:
            raise InvalidArgument(f"Adapter params {missing} not converted: {path or 'the model'} has no parameters of these names")
        parameters |= {f"{path}.{name}" if path else name: p for name, p in own.items()}
    return parameters


def _is_adapter(module: nn.Module) -> bool:
    return callable(getattr(module, "adapter_params", None))


def set_trainable_params(model: nn.Module, adapter_params: Mapping[str, Any] | Collection[str]) -> None:
    """Let the parameters named in adapter_params, and no others, require a gradient."""
    for name, p in model.named_parameters():
        p.requires_grad_(name in adapter_params)


def get_adapter_state_dict(state_dict: Mapping[str, Any], device: str | torch.device | None = "cpu") -> dict[str, Any]:
    """The entries of state_dict that belong to an adapter (their keys hold "lora" or "magnitude"), moved to `device`."""
    return {name: value.to(device) for name, value in state_dict.items() if _is_adapter_key(name)}


def _is_adapter_key(name: str) -> bool:
    return "lora" in name or "magnitude" in name


def get_lora_module_names(lora_attn_modules: list[LORA_ATTN_MODULES], apply_lora_to_mlp: bool, apply_lora_to_output: bool) -> list[str]:
    """The names, each within its parent, of the linear layers that carry LoRA under these builder arguments, in a new list."""
    names = list(lora_attn_modules)
    if apply_lora_to_mlp:
        names += ["w1", "w2", "w3"]
    if apply_lora_to_output:
        names.append("output")
    return names


@torch.no_grad()
def get_merged_lora_ckpt(state_dict: dict[str, Any], rank: int, alpha: float, use_distributed_barriers: bool = False) -> dict[str, Any]:
    """Merge every adapter of state_dict into its base weight and drop the adapter's keys; edits and returns state_dict.

    LoRA: W += alpha / rank * B A in the tensor itself, in its dtype. DoRA: a new tensor magnitude * (W + alpha / rank * B A) / norm in
    A's dtype; a bias is not scaled, although DoRALinear's forward does. use_distributed_barriers: let all ranks merge the same
    module at the same time, for sharded tensors.
    Raises KeyError for an adapter key whose other parts are missing, ValueError for rank below 1 and fastfuse.Unsupported, a
    NotImplementedError, for LoRA on an NF4 weight; in all cases before anything is changed.
    """
    if rank < 1:
        raise InvalidArgument(f"get_merged_lora_ckpt: rank is {rank}, expected at least 1")
    scaling = alpha / rank
    modules = _adapted_modules(state_dict)
    for module in modules:
        if (held := state_dict[module + "lora_a.weight"].shape[0]) != rank:
            raise InvalidArgument(f"get_merged_lora_ckpt: rank is {rank}, {module}lora_a.weight has rank {held}")
    for module in modules:
        if use_distributed_barriers:
            torch.distributed.barrier()
        weight, a, b = (state_dict[module + part] for part in ("weight", "lora_a.weight", "lora_b.weight"))
        delta = scaling * b @ a
        if module + "magnitude" in state_dict:
            merged = weight.to(a.dtype) + delta
            merged *= (state_dict.pop(module + "magnitude") / torch.linalg.norm(merged, dim=1))[:, None]
            state_dict[module + "weight"] = merged
        else:
            weight += delta
        del state_dict[module + "lora_a.weight"], state_dict[module + "lora_b.weight"]
    if use_distributed_barriers:
        torch.distributed.barrier()
    return state_dict


def _adapted_modules(state_dict: Mapping[str, Any]) -> list[str]:
    """The prefixes ("" or "...."), in order, of the modules that carry an adapter which can be merged."""
    modules = {}
    for key in filter(_is_adapter_key, state_dict):
        suffix = next((s for s in _SUFFIXES if key == s or key.endswith("." + s)), None)
        if suffix is None:
            raise KeyError(f"get_merged_lora_ckpt: {key} is no part of a LoRA or DoRA linear layer ({', '.join(_SUFFIXES)})")
        modules[key.removesuffix(suffix)] = key
    for module, key in modules.items():
        for part in ("weight", "lora_a.weight", "lora_b.weight"):
            if module + part not in state_dict:
                raise KeyError(f"get_merged_lora_ckpt: {key} is there without {module + part}")
        if is_torchao(state_dict[module + "weight"]) and module + "magnitude" not in state_dict:
            raise Unsupported(
                f"get_merged_lora_ckpt: {module}weight is an NF4Tensor, which holds no exact sum: dequantize it first, "
                f"state_dict['{module}weight'] = state_dict['{module}weight'].to(torch.bfloat16), "
                "or take the state dict from a model whose NF4 weights are saved as numbers (_register_reparametrize_state_dict_hooks)",
                "NF4_BASE",
            )
    return list(modules)


@contextlib.contextmanager
def disable_adapter(model: nn.Module) -> Iterator[None]:
    """Run the model without its adapters inside the block; afterwards each is what it was before."""
    before = [(module, module.disabled) for module in model.modules() if _is_adapter(module) and hasattr(module, "disabled")]
    for module, _ in before:
        module.disabled = True
    try:
        yield
    finally:
        for module, disabled in before:
            module.disabled = disabled


def validate_missing_and_unexpected_for_lora(
    lora_attn_modules: list[LORA_ATTN_MODULES] | None = None,
    apply_lora_to_mlp: bool | None = None,
    apply_lora_to_output: bool | None = None,
    state_dict_keys: Collection[str] | None = None,
    base_missing: Collection[str] | None = None,
    base_unexpected: Collection[str] | None = None,
    lora_missing: Collection[str] | None = None,
    lora_unexpected: Collection[str] | None = None,
) -> None:
    """Check what two calls of load_state_dict(strict=False), with the base's and the adapter's checkpoint, reported.

    state_dict_keys: all keys of the model. The four others are the calls' missing_keys and unexpected_keys: the base may miss
    adapter keys only, the adapter base keys only, and neither may bring a key that the model does not have. Without state_dict_keys the
    three builder arguments, deprecated, tell which keys are the adapter's.
    Raises RuntimeError naming every key that breaks this, InvalidArgument where neither way of telling is given.
    """
    deprecated = {"lora_attn_modules": lora_attn_modules, "apply_lora_to_mlp": apply_lora_to_mlp, "apply_lora_to_output": apply_lora_to_output}
    for name, value in deprecated.items():
        if value is not None:
            warnings.warn(f"validate_missing_and_unexpected_for_lora: {name} is deprecated. Please use state_dict_keys instead.", FutureWarning, stacklevel=2)
    base_missing, lora_missing = set(base_missing or ()), set(lora_missing or ())
    if state_dict_keys is not None:
        adapter_keys = {k for k in state_dict_keys if _is_adapter_key(k)}
        base_keys = set(state_dict_keys) - adapter_keys
        if unknown := sorted((base_missing & lora_missing) - adapter_keys - base_keys):
            raise _WrongKeys(f"Unexpected key found missing: {', '.join(unknown)}: not among state_dict_keys")
        base_lacks = base_keys & base_missing
        adapter_lacks = adapter_keys & lora_missing
    else:
        if absent := [name for name, value in deprecated.items() if value is None]:
            raise InvalidArgument(f"validate_missing_and_unexpected_for_lora: state_dict_keys is None, and so is {', '.join(absent)}")
        modules = get_lora_module_names(lora_attn_modules, apply_lora_to_mlp, apply_lora_to_output)
        parts = [f"{module}.{part}" for module in modules for part in ("lora", "magnitude")]
        base_lacks = {k for k in base_missing if not any(part in k for part in parts)}
        adapter_lacks = {k for k in lora_missing if any(part in k for part in parts)}
    lines = [f"- Missing non-LoRA key {k} from base model dict" for k in sorted(base_lacks)]
    lines += [f"- Missing LoRA key {k} from adapter state dict" for k in sorted(adapter_lacks)]
    if lines:
        raise _WrongKeys("Missing keys when validating state dict: \n" + "\n".join(lines))
    for unexpected, what in ((base_unexpected, "base model"), (lora_unexpected, "adapter")):
        if unexpected:
            raise _WrongKeys(f"Unexpected key loading {what}: {', '.join(unexpected)}")
