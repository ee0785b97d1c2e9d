"""Checkpoint files as lazy mappings from names to memory-mapped tensors. No code in a file is run."""

import json
import os
import pickle
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from fastfuse.models.llama3_2_vision._names import form_of

FORMATS = ("hf", "meta", "tune")
TORCH_SUFFIXES = (".pt", ".pth", ".bin")
INDEX = "model.safetensors.index.json"
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPE_OF = {name: dtype for dtype, name in DTYPES.items()}


class Checkpoint(Mapping):
    """Tensors by name, read from memory-mapped files when asked for; from open_checkpoint.

    path: as opened.  format: "hf", "meta" or "tune", by the names.  config: the config.json beside the weights, or None.
    """

    def __init__(self, path: Path, readers: Mapping[str, "_Safetensors | _TorchFile"], config: dict | None):
        self.path = path
        self.config = config
        self._readers = readers
        self.format = _format_of(path, readers)

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._readers[name].tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._readers)

    def __len__(self) -> int:
        return len(self._readers)

    def meta(self, name: str) -> torch.Tensor:
        """The tensor's shape and dtype on the meta device, without reading its values."""
        return self._readers[name].meta(name)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.meta(name).shape)

    def dtypes(self) -> Iterator[torch.dtype]:
        """Of the tensors in the order of file names, then as each file lists them; Meta's RoPE table, which is computed, left out."""
        for reader in sorted(set(self._readers.values()), key=lambda reader: reader.path):
            yield from (reader.meta(name).dtype for name in reader.names if not name.endswith("rope.freqs"))


class _Safetensors:
    def __init__(self, path: Path):
        try:
            self._file = safe_open(path, framework="pt")
        except (SafetensorError, OSError) as e:
            raise ValueError(f"{path}: not a readable safetensors file: {one_line(e)}") from e
        self.names = list(self._file.keys())
        self.path = path

    def tensor(self, name: str) -> torch.Tensor:
        return self._file.get_tensor(name)  # a view of the mapped file

    def meta(self, name: str) -> torch.Tensor:
        header = self._file.get_slice(name)
        if header.get_dtype() not in DTYPE_OF:
            raise ValueError(f"{self.path}: {name} is of {header.get_dtype()}, which is not covered")
        return torch.empty(header.get_shape(), dtype=DTYPE_OF[header.get_dtype()], device="meta")


class _TorchFile:
    def __init__(self, path: Path):
        with open(path, "rb") as file:
            if file.read(2) != b"PK":
                raise ValueError(f"{path}: not a torch file that can be memory-mapped (a zip): torch.save the tensors again, or use safetensors")
        try:
            self._tensors = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except pickle.UnpicklingError as e:
            found = re.search(r"GLOBAL (\S+)|was not an allowed global|Unsupported (?:class|operand)[^.]*", str(e))
            raise ValueError(f"{path}: refused, it holds more than tensors and would run code when loaded{f' ({found[0]})' if found else ''}") from e
        except (RuntimeError, OSError, EOFError, ValueError) as e:
            raise ValueError(f"{path}: not a readable torch file: {one_line(e)}") from e
        if not isinstance(self._tensors, dict) or not all(isinstance(k, str) and isinstance(t, torch.Tensor) for k, t in self._tensors.items()):
            kind = type(self._tensors).__name__
            others = [k for k, t in self._tensors.items() if not isinstance(t, torch.Tensor)] if isinstance(self._tensors, dict) else []
            raise ValueError(f"{path}: not a flat dict of names and tensors: a {kind}" + (f" with {first(others)}" if others else ""))
        self.names = list(self._tensors)
        self.path = path

    def tensor(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def meta(self, name: str) -> torch.Tensor:
        return torch.empty_like(self._tensors[name], device="meta")


def open_checkpoint(path: str | os.PathLike | Iterable[str | os.PathLike]) -> Checkpoint:
    """A lazy mapping from names to tensors over a directory as transformers, Meta or torchtune lays it out, an index, or files.

    path: a directory, an index, a file, or a list of the files of one checkpoint, in any order. Takes safetensors and torch's zip
    files (.pt, .pth, .bin), sharded or whole; a directory's shards without an index are told by their names, counted from 0 or 1.
    Tensors are views of the mapped files. No code in a file is run. Raises ValueError, naming the path, for what cannot be read or is incomplete, and for no
    names of a known format.
    """
    if not isinstance(path, (str, os.PathLike)):
        return _open_files([Path(file) for file in path])
    path = Path(path)
    if not path.exists():
        raise ValueError(f"{path}: no such file or directory")
    files = _weights_in(path) if path.is_dir() else [path]
    expected = shards_in(files[0]) if files[0].suffix == ".json" else dict.fromkeys(files)
    return Checkpoint(path, _readers(expected, files[0].name), _config_in({files[0].parent}))


def _open_files(files: list[Path]) -> Checkpoint:
    if not files:
        raise ValueError("open_checkpoint: path is an empty list, expected files")
    if absent := [file for file in files if not file.is_file()]:
        what = "a folder, give it alone:" if absent[0].is_dir() else "no such file,"
        raise ValueError(f"{absent[0]}: {what} it is one of {len(files)} given")
    folder = Path(os.path.commonpath([file.absolute().parent for file in files]))
    return Checkpoint(folder, _readers(dict.fromkeys(sorted(files)), "the list"), _config_in({file.parent for file in files}))


def _readers(expected: Mapping[Path, list[str] | None], index: str) -> dict[str, "_Safetensors | _TorchFile"]:
    """The reader of each tensor, of those an index expects in a file, or of all where there is none."""
    readers = {}
    for file, names in expected.items():
        reader = _reader(file)
        if absent := sorted(set(names or ()) - set(reader.names)):
            raise ValueError(f"{file}: lacks {first(absent)}, which {index} says it holds")
        if twice := sorted(readers.keys() & set(names or reader.names)):
            raise ValueError(f"{file}: {first(twice)} of it are in {readers[twice[0]].path.name} too")
        readers |= dict.fromkeys(reader.names if names is None else names, reader)
    return readers


def _config_in(folders: Iterable[Path]) -> dict | None:
    found = [folder / "config.json" for folder in folders if (folder / "config.json").is_file()]
    return read_json(found[0]) if len(found) == 1 else None


def _weights_in(folder: Path) -> list[Path]:
    for name in ("model.safetensors", INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json"):  # transformers' order
        if (folder / name).is_file():
            return [folder / name]
    found = sorted(folder.glob("consolidated.*pth"))
    if len(found) > 1:
        raise ValueError(f"{folder}: {len(found)} model-parallel files {found[0].name}, ...: join them first, or use the safetensors of the same model")
    if found := found or [folder / name for name in _complete_shards(folder, os.listdir(folder))]:
        return found
    raise ValueError(
        f"{folder}: no model.safetensors, pytorch_model.bin, index of either, shards or consolidated.*pth; it has {first(os.listdir(folder)) or 'no files'}"
    )


_SHARDS = [  # torchtune's until 0.4, with the number of the epoch last, and everybody's
    re.compile(r"hf_model_(?P<number>\d+)_(?P<epoch>\d+)\.(pt|bin|safetensors)"),
    re.compile(r"(ft-|pytorch_)?model-(?P<number>\d+)-of-(?P<count>\d+)(_(?P<epoch>\d+))?\.(pt|bin|safetensors)"),
]


def _complete_shards(folder: Path, names: Iterable[str]) -> list[str]:
    """Those of `names` that are the shards of one checkpoint, by number. Raises ValueError where there are several checkpoints or gaps."""
    sets = {}
    for name, match in ((name, match) for name in sorted(names) for pattern in _SHARDS if (match := pattern.fullmatch(name))):
        kind = name[: match.start("number")], match.groupdict().get("count"), match["epoch"], Path(name).suffix
        sets.setdefault(kind, {})[int(match["number"])] = name
    if len(sets) > 1:
        kinds = ", ".join(next(iter(numbered.values())) for numbered in sets.values())
        raise ValueError(f"{folder}: holds the shards of {len(sets)} checkpoints ({kinds}): give the list of files of one")
    for (_, count, *_), numbered in sets.items():
        start = 0 if 0 in numbered else 1
        total = int(count or max(numbered) + 1 - start)
        if missing := [number for number in range(start, start + total) if number not in numbered]:
            shown = f"number {first(map(str, missing))} beside {next(iter(numbered.values()))}"
            raise ValueError(f"{folder}: {len(missing)} of {total} shards are missing: {shown}")
        return [numbered[number] for number in sorted(numbered)]
    return []


def shards_in(index: Path) -> dict[Path, list[str]]:
    """The files an index names, all of which exist, and the tensors it expects in each."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(f, str) for f in weight_map.values()):
        raise ValueError(f"{index}: no index of a sharded checkpoint, it has no weight_map of names and files")
    shards = {}
    for name, file in weight_map.items():
        shards.setdefault(file, []).append(name)
    if outside := sorted(f for f in shards if Path(f).name != f):
        raise ValueError(f"{index}: names a file outside its directory: {outside[0]}")
    if absent := sorted(f for f in shards if not (index.parent / f).is_file()):
        raise ValueError(f"{index}: {len(absent)} of {len(shards)} shards are missing: {first(absent)}")
    return {index.parent / f: names for f, names in shards.items()}


def _reader(path: Path) -> _Safetensors | _TorchFile:
    if path.suffix == ".safetensors":
        return _Safetensors(path)
    if path.suffix in TORCH_SUFFIXES:
        return _TorchFile(path)
    raise ValueError(f"{path}: not a checkpoint: a directory, .safetensors, {', '.join(TORCH_SUFFIXES)} or .index.json is")


def read_json(path: Path) -> dict:
    try:
        found = json.loads(path.read_text())
    except ValueError as e:
        raise ValueError(f"{path}: not readable as JSON: {one_line(e)}") from e
    if not isinstance(found, dict):
        raise ValueError(f"{path}: a JSON {type(found).__name__}, not an object")
    return found


def _format_of(path: Path, names: Iterable[str]) -> str:
    found = {}
    for name in names:
        found.setdefault(form_of(name), []).append(name)
    known = [form for form in FORMATS if form in found]
    if len(known) > 1:
        mixed = ", ".join(f"{form} ({found[form][0]})" for form in known)
        raise ValueError(f"{path}: mixes the names of several formats: {mixed}")
    if not known:
        raise ValueError(f"{path}: no names of a Llama-3.2-Vision checkpoint; it has {first(found.get(None, [])) or 'no tensors'}")
    return known[0]


def first(names: Iterable[str], count: int = 3) -> str:
    names = list(names)
    return ", ".join(names[:count]) + (", ..." if len(names) > count else "")


def one_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
