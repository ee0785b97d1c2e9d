"""Launch configurations: rows in <op>.json, chosen by a pure function of the shape.

A row is {"arch", "when", "tile"}. "when" holds conditions on the shape: "<name>" is equality, "<name>_max" is
an upper bound, "<name>_multiple" is divisibility. The first match wins and the last row of each architecture is unconditional. "tile": null says that
no fused kernel pays there. An architecture without rows of its own uses the highest one below it in its family.
bench.tune adds what it measured: "us" and "floor_us" for each of "shape", with "device", "commit", "date" and "triton". A row without "us" is a guess.
"since": {"3.9": {"tile": ...}} replaces the tile, and what was measured of it, from that Triton on: where one tile spills with the later compiler and
another with the earlier one.
"""

import contextlib
import functools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import torch

from fastfuse.errors import Unsupported

try:
    from triton import __version__ as TRITON
except ImportError:
    TRITON = "0.0"  # no rows but the reference's are used then

# What every launch tells the compiler: a product and the sum it goes into may become one fma. Triton does so unasked up to 3.9 and not from 3.10 on,
# which costs sm_90's loops up to 15%.
OPTIONS = MappingProxyType({"enable_fp_fusion": True})


@dataclass(frozen=True)
class Tile:
    """One launch configuration: the kernel's compile-time constants, and how it is scheduled."""

    constants: Mapping[str, int | bool]
    num_warps: int = 4
    num_stages: int = 2

    def __getitem__(self, name: str) -> int | bool:
        return self.constants[name]

    def launch(self) -> dict:
        return {**self.constants, "num_warps": self.num_warps, "num_stages": self.num_stages, **OPTIONS}


_pinned: dict[str, Tile | None] = {}


@contextlib.contextmanager
def pin(op: str, tile: Tile | None) -> Iterator[None]:
    """Make pick(op, ...) return this tile (None: the unfused route) inside the block. For tests and sweeps."""
    before = dict(_pinned)
    _pinned[op] = tile
    try:
        yield
    finally:
        _pinned.clear()
        _pinned.update(before)


def pick(op: str, arch: str, **shape: int | str) -> Tile | None:
    """The tile of the first row of `op` that matches; None where the row says that no fused kernel pays.

    arch: "sm_90", "gfx942", "interpreter".  Raises Unsupported for an architecture that no rows cover.
    """
    if op in _pinned:
        return _pinned[op]
    return _pick(op, arch, tuple(sorted(shape.items())))


@functools.lru_cache(maxsize=4096)
def _pick(op: str, arch: str, shape: tuple) -> Tile | None:
    family = covering_arch(op, arch)
    row = match(table(op), family, dict(shape))
    if row is None:
        raise LookupError(f"tune/{op}.json: no row of {family} matches {dict(shape)}: its last row must be unconditional")
    return tile_of(row["tile"])


def match(rows: Iterable[dict], arch: str, shape: Mapping) -> dict | None:
    """The first of the rows of this very architecture that the shape meets."""
    return next((row for row in rows if row["arch"] == arch and all(_holds(key, want, shape) for key, want in row["when"].items())), None)


def tile_of(written: dict | None) -> Tile | None:
    """A row's tile as a launcher takes it."""
    return written and Tile(MappingProxyType(written["constants"]), written["num_warps"], written["num_stages"])


def _holds(key: str, want: int | str, have: Mapping) -> bool:
    name, _, test = key.rpartition("_")
    if test == "max":
        return have[name] <= want
    if test == "multiple":
        return have[name] % want == 0
    return have[key] == want


@functools.cache
def table(op: str) -> list[dict]:
    """All rows of an op, as the installed Triton takes them."""
    return [served(row) for row in json.loads((Path(__file__).parent / f"{op}.json").read_text())]


def served(row: dict, triton: str = TRITON) -> dict:
    """The row as this Triton takes it: what is written, or what replaces it since the latest release up to this one."""
    release = since(row, triton)
    return {"arch": row["arch"], "when": row["when"], **row["since"][release]} if release else row


def since(row: dict, triton: str = TRITON) -> str | None:
    """The release of `row["since"]` that this Triton goes by, None where it is the row itself."""
    return max((r for r in row.get("since", ()) if _release(r) <= _release(triton)), key=_release, default=None)


def _release(version: str) -> tuple[int, ...]:
    return tuple(int(v) for v in version.split(".")[:2])  # not as text: 3.10 is after 3.9


@functools.cache
def covering_arch(op: str, arch: str) -> str:
    """The architecture whose rows serve `arch`: itself, or the highest below it with the same prefix."""
    archs = {row["arch"] for row in table(op)}
    if arch in archs:
        return arch
    prefix = "sm_" if arch.startswith("sm_") else "gfx9"  # other gfx are not CDNA
    below = [a for a in archs if arch.startswith(prefix) and a.startswith(prefix) and int(a[3:], 16) <= int(arch[3:], 16)]
    if not below:
        raise Unsupported(f"{op}: no kernel covers {arch}, only {', '.join(sorted(archs))}", "ARCH")
    return max(below, key=lambda a: int(a[3:], 16))


_assumed: tuple[str, int] | None = None


@contextlib.contextmanager
def assume(arch: str, processors: int) -> Iterator[None]:
    """Inside the block every tensor counts as one on a GPU of this architecture with so many multiprocessors: for compiling ahead."""
    global _assumed
    before, _assumed = _assumed, (arch, processors)
    try:
        yield
    finally:
        _assumed = before


def arch_of(device: torch.device) -> str:
    """The architecture's name, as the rows write it: "sm_90", "gfx942"; "interpreter" for a CPU."""
    return _assumed[0] if _assumed else _arch_of(device)


def on_amd() -> bool:
    return _assumed[0].startswith("gfx") if _assumed else bool(torch.version.hip)


def processors_of(device: torch.device, interpreted: int = 2) -> int:
    """How many multiprocessors (compute units) the device has; `interpreted` for a CPU, where the interpreter runs one program after another."""
    return _assumed[1] if _assumed else _processors_of(device) if device.type == "cuda" else interpreted


@functools.cache
def _processors_of(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _arch_of(device: torch.device) -> str:
    if device.type != "cuda":
        return "interpreter"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"
