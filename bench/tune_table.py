"""The rows of fastfuse/tune/<op>.json as bench.tune reads and writes them, and what a table must hold."""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from bench.tune_tiles import Tile, illegal
from fastfuse import tune

FOLDER = Path(tune.__file__).parent
SCHEDULE = ("SPLIT_K", "PROGRAMS")  # how a launch is divided: one program's code is the same, as are its registers


class Row(dict):
    """A row as read, with its line."""

    line = ""


def read(path: Path) -> list[dict]:
    """The rows of a table, one a line."""
    text, rows = path.read_text(), []
    for line in text.splitlines()[1:-1]:
        with contextlib.suppress(json.JSONDecodeError):
            rows.append(Row(json.loads(line.rstrip(","))))
            rows[-1].line = line.rstrip(",")
    if _text(rows) != text:
        raise ValueError(f"{path}: not one row a line between [ and ]")
    return rows


def write(path: Path, rows: list[dict]) -> None:
    """At once; a row that was read keeps its line to the byte."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(_text(rows))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _text(rows: list[dict]) -> str:
    return "[\n" + ",\n".join(row.line if isinstance(row, Row) else f"  {json.dumps(row)}" for row in rows) + "\n]\n"


def problems(op: str, rows: list[dict]) -> list[str]:
    """Why a table must not be written: an architecture without its unconditional last row, or a tile that a launcher cannot use."""
    found = []
    for arch in dict.fromkeys(row["arch"] for row in rows):
        own = [row for row in rows if row["arch"] == arch]
        if [i for i, row in enumerate(own) if not row["when"]] != [len(own) - 1]:
            found.append(f"{arch}: the last row, and no other, must be unconditional")
        tiles = [(row, each["tile"]) for row in own for each in (row, *row.get("since", {}).values())]
        found += [f"{arch} {when_of(row)}: {reason}" for row, tile in tiles if (reason := illegal(op, row["when"], tile))]
    return found


def check(op: str, rows: list[dict]) -> None:
    if wrong := problems(op, rows):
        raise ValueError(f"tune/{op}.json is not written: {'; '.join(wrong)}")


def own_rows(op: str, arch: str, rows: list[dict]) -> tuple[list[dict], str]:
    """The rows that serve this architecture, and whose they are."""
    family = arch if any(row["arch"] == arch for row in rows) else tune.covering_arch(op, arch)
    return [row for row in rows if row["arch"] == family], family


def as_written(row: dict, before: dict, after: dict) -> dict:
    """How the row is written when it was served as `before` and now is to be as `after`; what other Tritons take of it stays."""
    if after is before:
        return row
    release = tune.since(row)
    own = {k: v for k, v in after.items() if k not in ("arch", "when", "since")}
    if release:
        return {**row, "when": after["when"], "since": row["since"] | {release: own}}
    return after | ({"since": row["since"]} if "since" in row else {})


def name(tile: Tile) -> str:
    """A tile in a few words: 64x128x64 TRANSPOSED w4 s3."""
    if tile is None:
        return "unfused"
    blocks = "x".join(str(v) for k, v in tile["constants"].items() if k.startswith("BLOCK_"))
    words = [k if v is True else f"{k}={v}" for k, v in tile["constants"].items() if not k.startswith("BLOCK_") and v is not False]
    return " ".join([blocks, *words, f"w{tile['num_warps']}", f"s{tile['num_stages']}"])


def name_without_schedule(tile: Tile) -> str:
    return name(tile and {**tile, "constants": {k: v for k, v in tile["constants"].items() if k not in SCHEDULE}})


def when_of(row: Mapping) -> str:
    return " ".join(f"{k}={v}" for k, v in row["when"].items()) or "all else"
