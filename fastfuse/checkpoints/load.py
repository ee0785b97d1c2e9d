"""A checkpoint into a model, a tensor at a time, checked against the file's header before the first copy."""

import os
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastfuse.checkpoints.files import FORMATS, Checkpoint, first, one_line, open_checkpoint, read_json
from fastfuse.checkpoints.layout import Owned, inner, is_sharded, layout_to_load, tensors_of
from fastfuse.errors import InvalidArgument, Unsupported
from fastfuse.models.llama3_2_vision import Llama3VisionConfig, Profile, build
from fastfuse.models.llama3_2_vision._convert_weights import TILES, Step, steps_to_tune
from fastfuse.modules.model_fusion import DeepFusionModel
from fastfuse.modules.peft import get_adapter_params
from fastfuse.quant.nf4 import is_torchao


@dataclass(frozen=True)
class LoadReport:
    """What a load did. missing: the model's tensors the file has nothing for.  unexpected: the file's the model has no place for."""

    loaded: int
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]


def load_checkpoint(
    model: nn.Module,
    path: str | os.PathLike | Iterable[str | os.PathLike] | Checkpoint,
    *,
    format: str = "auto",
    strict: bool = True,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    tie_word_embeddings: bool | None = None,
    supported_aspect_ratios: Iterable[tuple[int, int]] | None = None,
) -> LoadReport:
    """Copy a checkpoint into a Llama-3.2-Vision model, converted a tensor at a time; heads, layers and tables as the model has them.

    path: as open_checkpoint's.  format: "hf", "meta", "tune", or "auto" to tell by the names.  strict: raise where a tensor of the model is missing, adapters
    apart, or one of the file has no place.  dtype, device: for parameters on the meta device, which are replaced; dtype None keeps
    the file's, and NF4 weights keep their own. Other parameters keep dtype and device, NF4 ones are quantized anew. Adapters that
    the file lacks are initialized as in a new model where they are on the meta device; elsewhere they stay, DoRA's magnitudes too.
    tie_word_embeddings: give `decoder.output` a copy of the text embedding where a transformers file has no lm_head; None: as its
    config.json says.  supported_aspect_ratios: (h, w) of transformers' tile tables; as config.json says where None, else every
    ratio of the number of tiles.
    A table for another number of tiles or another tile size is interpolated, in the grid form.
    Raises ValueError before anything is copied: for a file that cannot be read or does not fit, and for tile tables that no grid holds.
    """
    if format not in ("auto", *FORMATS):
        raise ValueError(f"load_checkpoint: format is {format!r}, not 'auto', {', '.join(map(repr, FORMATS))}")
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
    form = checkpoint.format if format == "auto" else format
    if form == "tune":
        steps, unknown = [Step((name,), (name,)) for name in checkpoint], []
    else:
        layout = layout_to_load(model, checkpoint, form, tie_word_embeddings, supported_aspect_ratios)
        steps, unknown = steps_to_tune(form, checkpoint, layout)
    adapters = {id(p) for p in get_adapter_params(model).values()}
    own = dict(tensors_of(model))
    optional = {name for name, owner in own.items() if id(owner.tensor) in adapters}
    report = _checked("load_checkpoint", own, checkpoint, steps, unknown, strict, optional)
    _check_adapters(model, own, report.missing)
    for step in steps:
        if step.kind == TILES and set(step.targets) <= own.keys():
            step.convert(*(checkpoint[s] for s in step.sources))  # raises where rows of ratios do not fit one grid
    _copy(model, own, checkpoint, steps, torch.device(device), dtype)
    _leave_meta(model, own, report.missing, adapters, torch.device(device), dtype)
    return report


def load_model(
    path: str | os.PathLike | Iterable[str | os.PathLike],
    *,
    profile: str | Profile = "meta",
    build: Callable[..., DeepFusionModel] = build,
    config: Llama3VisionConfig | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    strict: bool = True,
) -> DeepFusionModel:
    """The model of a checkpoint, in eval mode, its weights straight from the file.

    path, strict: as load_checkpoint.  profile: whose numerics; the published weights are Meta's.  build: called as
    build(config, profile=profile); partial(build_lora, lora_attn_modules=[...], quantize_base=True) makes a QLoRA model.
    config: read from config.json (transformers) or params.json (Meta) beside the weights where None.  dtype: of all
    parameters; where None as transformers' "auto": the one config.json names, else that of the first tensor of the first file.
    Raises ValueError as load_checkpoint, and where there is no config.
    """
    if dtype is not None and not _computes(dtype):
        raise ValueError(f"load_model: dtype is {dtype!r}, expected a floating point torch.dtype")
    checkpoint = open_checkpoint(path)
    if config is None:
        config = _config_beside(checkpoint)
    dtype = dtype or _dtype_of(checkpoint)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)  # what an NF4 weight takes for its own
    try:
        with torch.device("meta"):
            model = build(config, profile=profile)
    finally:
        torch.set_default_dtype(default)
    load_checkpoint(model, checkpoint, strict=strict, dtype=dtype, device=device)
    return model.eval()


def _dtype_of(checkpoint: Checkpoint) -> torch.dtype:
    """One dtype for a file that may mix several, which no forward takes: fp32 norms and head are what k-bit training leaves."""
    config = checkpoint.config or {}
    named = next((config[key] for key in ("dtype", "torch_dtype") if config.get(key) is not None), None)
    if named is None:
        return next(filter(_computes, checkpoint.dtypes()), torch.get_default_dtype())
    dtype = getattr(torch, named, None) if isinstance(named, str) else None
    if not _computes(dtype):
        raise ValueError(f"load_model: {checkpoint.path}: config.json has dtype {named!r}, expected a floating point one such as 'bfloat16': pass dtype")
    return dtype


def _computes(dtype: Any) -> bool:
    return isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1  # 8-bit floats only store


def _config_beside(checkpoint: Checkpoint) -> Llama3VisionConfig:
    if checkpoint.config is not None:
        return Llama3VisionConfig.from_hf(checkpoint.config)
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    if (folder / "params.json").is_file():
        return Llama3VisionConfig.from_meta(read_json(folder / "params.json"))
    raise ValueError(f"{checkpoint.path}: neither config.json nor params.json beside it: pass config, a Llama3VisionConfig")


def load_adapter(model: nn.Module, path: str | os.PathLike | Iterable[str | os.PathLike] | Checkpoint, *, strict: bool = True) -> LoadReport:
    """Copy an adapter file, safetensors or torchtune's torch file, into a model with the same adapters; all or nothing.

    strict: every adapter tensor of the model must be in the file, and no other.  Raises ValueError before anything is copied.
    """
    checkpoint = path if isinstance(path, Checkpoint) else open_checkpoint(path)
    wanted = {id(p) for p in get_adapter_params(model).values()}
    adapters = {name: owner for name, owner in tensors_of(model) if id(owner.tensor) in wanted}
    steps = [Step((name,), (name,)) for name in checkpoint]
    report = _checked("load_adapter", adapters, checkpoint, steps, [], strict, optional=set())
    _copy(model, adapters, checkpoint, steps, torch.device("cpu"), None)
    return report


def _checked(
    function: str, wanted: Mapping[str, Owned], checkpoint: Checkpoint, steps: list[Step], unknown: list[str], strict: bool, optional: set[str]
) -> LoadReport:
    """The report of a load that has not happened yet. Raises for what does not fit, from headers alone."""
    misfits, found, unexpected = [], set(), list(unknown)
    for step in steps:
        if not any(target in wanted for target in step.targets):
            unexpected += step.sources
            continue
        try:
            values = step.convert(*map(checkpoint.meta, step.sources))
        except InvalidArgument as e:
            raise InvalidArgument(f"{function}: {checkpoint.path}: {e}") from e
        for target, value in zip(step.targets, values, strict=True):
            if target in wanted:
                found.add(target)
                if is_sharded(wanted[target].tensor):
                    raise Unsupported(
                        f"{function}: {target} is sharded (DTensor): load before sharding, or use torch.distributed.checkpoint.state_dict.set_model_state_dict",
                        "DTENSOR",
                    )
                if reason := _misfit(target, value, wanted[target]):
                    misfits.append(f"{', '.join(step.sources)}: {reason}")
    missing = [name for name in wanted if name not in found]
    problems = [f"{len(misfits)} of another shape ({first(misfits)})"] if misfits else []
    if strict:
        lacking = [name for name in missing if name not in optional]
        problems += [f"{len(lacking)} missing ({first(lacking)})"] if lacking else []
        problems += [f"{len(unexpected)} unexpected ({first(unexpected)})"] if unexpected else []
        if "decoder.output.weight" in lacking and checkpoint.format == "hf":
            problems += ["a file without lm_head loads with tie_word_embeddings=True"]
    if problems:
        raise ValueError(f"{function}: {checkpoint.path} ({checkpoint.format}) does not fit the model: {'; '.join(problems)}")
    return LoadReport(len(found), tuple(missing), tuple(unexpected))


def _misfit(name: str, value: torch.Tensor, owner: Owned) -> str | None:
    """Why a tensor cannot be loaded, after the load hooks of its module, which may interpolate it, have seen its shape."""
    if value.shape == owner.tensor.shape:
        return None
    state = {name: value}
    try:
        for hook in owner.module._load_state_dict_pre_hooks.values():
            hook(state, owner.prefix, {}, False, [], [], [])
    except (ValueError, RuntimeError) as e:
        return one_line(e)
    if name in state and state[name].shape == owner.tensor.shape:
        return None
    return f"{tuple(value.shape)} for {name} {tuple(owner.tensor.shape)}"


@torch.no_grad()
def _copy(model: nn.Module, own: Mapping[str, Owned], checkpoint: Checkpoint, steps: list[Step], device: torch.device, dtype: torch.dtype | None) -> None:
    """Through load_state_dict, so that every load hook runs, a layer at a time: a call walks the whole model, and a layer is small."""
    model, groups = inner(model), {}
    for step in steps:
        layer = re.match(r".*\.layers\.\d+\.", step.targets[0])
        groups.setdefault(layer[0] if layer else ".".join(step.targets[0].split(".")[:2]), []).append(step)
    for group in groups.values():
        values = {t: v for s in group for t, v in zip(s.targets, s.convert(*(checkpoint[n] for n in s.sources)), strict=True) if t in own}
        replaced = {name: _materialized(v, own[name].tensor, device, dtype) for name, v in values.items() if own[name].tensor.is_meta}
        copied = {name: v for name, v in values.items() if name not in replaced}
        for state, assign in ((replaced, True), (copied, False)):
            if state:
                model.load_state_dict(state, strict=False, assign=assign)


def _materialized(value: torch.Tensor, parameter: torch.Tensor, device: torch.device, dtype: torch.dtype | None) -> torch.Tensor:
    """A tensor of its own memory, never the mapped file's, in NF4 where the parameter is."""
    if is_torchao(parameter):
        from fastfuse.quant.torchao import to_nf4

        sizes = {"block_size": parameter.block_size, "scaler_block_size": parameter.scaler_block_size}
        return to_nf4(value.to(device, parameter.dtype), **sizes)
    return torch.empty(value.shape, dtype=dtype or value.dtype, device=device).copy_(value)


def _check_adapters(model: nn.Module, own: Mapping[str, Owned], missing: Iterable[str]) -> None:
    """On the meta device an adapter is in the file, or made new as a whole; only DoRA's magnitude follows from the rest."""
    lacking = {id(own[name].tensor): name for name in missing if own[name].tensor.is_meta}
    for module in model.modules():
        if callable(getattr(module, "adapter_params", None)):
            names = [name for name in module.adapter_params() if id(module.get_parameter(name)) in lacking]
            if names and names not in (["magnitude"], module.adapter_params()):
                raise ValueError(f"load_checkpoint: the file has no {lacking[id(module.get_parameter(names[0]))]}, but other parts of that adapter")


@torch.no_grad()
def _leave_meta(
    model: nn.Module, own: Mapping[str, Owned], missing: Iterable[str], adapters: set[int], device: torch.device, dtype: torch.dtype | None
) -> None:
    """Build what a model on the meta device has beside its checkpoint: computed tables, and adapters the file lacks."""
    for module in model.modules():
        tables = [b for name, b in module._buffers.items() if b is not None and name in module._non_persistent_buffers_set]
        if any(b.is_meta for b in tables) and (hasattr(module, "rope_init") or "ratio_ids" in module._buffers):
            module._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta and not isinstance(t, nn.Parameter) else t, recurse=False)
    lacking = {id(own[name].tensor) for name in missing if own[name].tensor.is_meta} & adapters
    for module in model.modules():
        if callable(getattr(module, "adapter_params", None)) and hasattr(module, "initialize_parameters"):
            names = [name for name in module.adapter_params() if id(module.get_parameter(name)) in lacking]
            if names == ["magnitude"]:
                module.magnitude = nn.Parameter(torch.empty_like(module.magnitude, device=device, dtype=dtype), requires_grad=module.magnitude.requires_grad)
                module.initialize_dora_magnitude()
            elif names:
                module.to_empty(device=device)
                if dtype is not None:
                    for name in names:
                        module.get_parameter(name).data = module.get_parameter(name).data.to(dtype)
                module.initialize_parameters()
                if hasattr(module, "initialize_dora_magnitude"):
                    module.initialize_dora_magnitude()
