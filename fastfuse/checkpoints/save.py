"""A model into a checkpoint, a tensor at a time; old files are replaced only when the new ones are complete."""

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastfuse.checkpoints.files import DTYPES, FORMATS, INDEX, TORCH_SUFFIXES, first, shards_in
from fastfuse.checkpoints.layout import is_sharded, layout_from_config, layout_of, ratios_in, tensors_of
from fastfuse.errors import Unsupported
from fastfuse.models.llama3_2_vision import Llama3VisionConfig
from fastfuse.models.llama3_2_vision._convert_weights import TILES, Step, steps_from_tune
from fastfuse.modules.peft import get_adapter_params
from fastfuse.ops import nf4_dequantize
from fastfuse.quant.nf4 import is_torchao


def save_checkpoint(
    model: nn.Module | Mapping[str, torch.Tensor],
    path: str | os.PathLike,
    *,
    format: str = "hf",
    max_shard_size: int = 5_000_000_000,
    config: Mapping[str, Any] | None = None,
) -> list[Path]:
    """Write a Llama-3.2-Vision model, or a state dict with torchtune's names, and return the files.

    format: "hf" with the names and layouts transformers saves, "meta" or "tune".  path: a file by its suffix (.safetensors; .pt, .pth
    or .bin for torch's), otherwise a directory for safetensors in shards of at most max_shard_size bytes and their index.
    config: transformers' config as a dict, written as config.json into a directory; where None that of model.config, which fastfuse's
    builders set; needed for "hf" from a state dict, whose tensors do not tell the heads.
    NF4 weights are written dequantized, in their own dtype (quantizing them again gives the same codes, but may round a scale otherwise); cells of a tile grid that no aspect ratio uses have no place in "hf".
    Adapters go into "tune" alone: merge them first for the others.
    Safetensors are streamed: besides the model one tensor is in memory; a torch file holds all tensors that had to be made.
    Files are written under temporary names and renamed when all are complete; a directory's index comes last, and the shards it
    replaces are removed after it, so that an interrupted save leaves the old checkpoint.
    Raises ValueError for an option or a tensor the format has no place for, Unsupported for sharded tensors (DTensor).
    """
    if format not in FORMATS:
        raise ValueError(f"save_checkpoint: format is {format!r}, not {', '.join(map(repr, FORMATS))}")
    if not isinstance(model, (nn.Module, Mapping)) or (isinstance(model, Mapping) and not model):
        raise ValueError(
            f"save_checkpoint: model is {'an empty dict' if isinstance(model, Mapping) else type(model).__name__}, expected a model or a state dict"
        )
    if isinstance(model, DistributedDataParallel):
        model = model.module
    if config is None and format == "hf" and isinstance(getattr(model, "config", None), Llama3VisionConfig):
        config = model.config.to_hf()
    tensors = {name: owner.tensor for name, owner in tensors_of(model)} if isinstance(model, nn.Module) else dict(model)
    for name, t in tensors.items():
        if is_sharded(t):
            raise Unsupported(f"save_checkpoint: {name} is sharded (DTensor): gather the state dict first", "DTENSOR")
        if t.is_meta:
            raise ValueError(f"save_checkpoint: {name} is on the meta device and has no values")
        if t.dtype not in DTYPES:
            raise ValueError(f"save_checkpoint: {name} is of {t.dtype}, which safetensors does not hold")
    if format == "tune":
        steps, unknown = [Step((name,), (name,)) for name in tensors], []
    else:
        layout = layout_of(model) if isinstance(model, nn.Module) else layout_from_config(tensors, config, format)
        if layout.tile_tables == "grid":
            layout = replace(layout, aspect_ratios=ratios_in(config) or layout.aspect_ratios)
        elif layout.aspect_ratios != (ratios_in(config) or layout.aspect_ratios):
            raise ValueError(f"save_checkpoint: config has aspect ratios {ratios_in(config)}, the model {layout.aspect_ratios}")
        layout = replace(layout, check=True)
        steps, unknown = steps_from_tune(format, tensors, layout)
    if unknown:
        adapters = any("lora_" in name or name.endswith("magnitude") for name in unknown)
        hint = ": merge the adapters first, or use save_adapter" if adapters else ""
        raise ValueError(f"save_checkpoint: format {format!r} has no place for {len(unknown)} tensors, {first(unknown)}{hint}")
    return _write(Path(path), [_Pending(step, i, tensors) for step in steps for i in range(len(step.targets))], max_shard_size, config)


def save_adapter(model: nn.Module, path: str | os.PathLike) -> list[Path]:
    """Write the adapters of a model (lora_a, lora_b, magnitude) under their state-dict names, as torchtune's adapter files hold them.

    path: a file, safetensors or torch's by its suffix.  Raises ValueError where the model has none.
    """
    wanted = {id(p) for p in get_adapter_params(model).values()}
    tensors = {name: owner.tensor for name, owner in tensors_of(model) if id(owner.tensor) in wanted}
    if not tensors:
        raise ValueError("save_adapter: the model has no adapters")
    return _write(Path(path), [_Pending(Step((name,), (name,)), 0, tensors) for name in tensors], max_shard_size=2**63, config=None)


@dataclass(frozen=True)
class _Pending:
    """A tensor of a file to be: its name, dtype and shape now, its values when asked for."""

    step: Step
    index: int
    tensors: Mapping[str, torch.Tensor]

    @property
    def name(self) -> str:
        return self.step.targets[self.index]

    def meta(self) -> torch.Tensor:
        sources = (self.tensors[name] for name in self.step.sources)
        return self.step.convert(*(torch.empty(t.shape, dtype=t.dtype, device="meta") for t in sources))[self.index]

    @torch.no_grad()
    def value(self) -> torch.Tensor:
        sources = (_dense(self.tensors[name].detach()).cpu() for name in self.step.sources)
        return self.step.convert(*sources)[self.index].contiguous()


def _dense(t: torch.Tensor) -> torch.Tensor:
    if not is_torchao(t):
        return t
    try:
        return nf4_dequantize(t, t.dtype)
    except Unsupported:
        return t.to(t.dtype)


def _write(path: Path, pending: list[_Pending], max_shard_size: int, config: Mapping[str, Any] | None) -> list[Path]:
    for p in pending:
        if p.step.kind == TILES:
            p.value()  # raises before the first file where rows of ratios do not fit one grid
    if path.suffix in TORCH_SUFFIXES:
        with _replacing(path) as file:
            torch.save({p.name: _compact(p.value()) for p in pending}, file)
        return [path]
    if path.suffix == ".safetensors":
        with _replacing(path) as file:
            _write_safetensors(file, pending)
        return [path]
    path.mkdir(parents=True, exist_ok=True)
    return _write_folder(path, _shards(pending, max_shard_size), config)


def _shards(pending: list[_Pending], max_shard_size: int) -> list[list[_Pending]]:
    shards, size = [[]], 0
    for p in pending:
        nbytes = p.meta().nbytes
        if shards[-1] and size + nbytes > max_shard_size:
            shards.append([])
            size = 0
        shards[-1].append(p)
        size += nbytes
    return shards


def _write_folder(folder: Path, shards: list[list[_Pending]], config: Mapping[str, Any] | None) -> list[Path]:
    index = folder / INDEX
    old = {f.name for f in (folder / "model.safetensors", index) if f.is_file()}
    if index.is_file():
        with contextlib.suppress(ValueError):
            old |= {f.name for f in shards_in(index)}
    files, generation = _shard_names(len(shards), 0), 0
    while len(shards) > 1 and old & set(files):  # the old index must find its own shards until the new one is there
        generation += 1
        files = _shard_names(len(shards), generation)
    written = [folder / f for f in files]
    with contextlib.ExitStack() as stack:  # renames in reverse order of entering: shards, config, then the index
        if len(shards) > 1:
            total = sum(p.meta().nbytes for shard in shards for p in shard)
            weight_map = {p.name: f for f, shard in zip(files, shards, strict=True) for p in shard}
            stack.enter_context(_replacing(index)).write(_json({"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}))
            written.append(index)
        if config is not None:
            stack.enter_context(_replacing(folder / "config.json")).write(_json(config))
            written.append(folder / "config.json")
        for file, shard in zip(files, shards, strict=True):
            _write_safetensors(stack.enter_context(_replacing(folder / file)), shard)
    for name in old - {f.name for f in written}:
        (folder / name).unlink(missing_ok=True)
    return written


def _shard_names(count: int, generation: int) -> list[str]:
    if count == 1:
        return ["model.safetensors"]
    return [f"model{f'-v{generation}' if generation else ''}-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]


def _write_safetensors(file, pending: list[_Pending]) -> None:
    """The format of https://github.com/huggingface/safetensors, a tensor at a time: save_file wants all of them at once."""
    metas = {p.name: p.meta() for p in pending}
    pending = sorted(pending, key=lambda p: -metas[p.name].element_size())  # the widest first keeps every tensor aligned
    header, at = {"__metadata__": {"format": "pt"}}, 0
    for p in pending:
        t = metas[p.name]
        header[p.name] = {"dtype": DTYPES[t.dtype], "shape": list(t.shape), "data_offsets": [at, at + t.nbytes]}
        at += t.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    file.write(len(text).to_bytes(8, "little") + text)
    for p in pending:
        if math.prod(metas[p.name].shape):
            file.write(p.value().reshape(-1).view(torch.uint8).numpy())


def _compact(t: torch.Tensor) -> torch.Tensor:
    """torch.save writes the whole storage behind a view."""
    return t if t.untyped_storage().nbytes() == t.nbytes else t.clone()


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Any]:
    """A file to write that takes `path`'s place when the block is done, and leaves it alone when the block fails."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2) + "\n").encode()
