"""Rows of bench/results and what bench/bars.json asks of them, for bench.report."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from bench import harness

BARS = Path(__file__).parent / "bars.json"
OURS, UNPATCHED = (harness.OURS, harness.PATCHED), harness.UNPATCHED
SECTIONS = {"cpu": "cpu", "gpu": "cuda"}  # marker on the page -> device_type of its rows
BACKWARD = " fwd+bwd"
NEEDED = ("op", "shape", "dtype", "provider", "us", "floor_us", "parity", "device", "device_type", "commit", "dirty", "date")
MATCHED = {"op", "shape", "dtype", "device_type", "provider"}  # an entry of bars.json holds for the rows whose fields match its globs
KNOWN = {"not_peers": {"why"}, "bars": {"fastest_peer", "percent_of_floor", "why"}, "explained": {"fastest_peer", "percent_of_floor", "why"}}


class Refused(ValueError):
    """What is at hand cannot be reported; the message names the row, the file or the entry."""


@dataclass(frozen=True, eq=False)
class Case:
    """The newest run of an op at a shape."""

    op: str
    shape: str
    dtype: str
    rows: Mapping[str, Mapping]  # provider -> row
    peers: Mapping[str, float]  # right, and doing the same work: provider -> us, the fastest first

    @property
    def name(self) -> str:
        return f"{self.op} {self.shape} {self.dtype}"

    @property
    def ours(self) -> Mapping | None:
        return next((self.rows[name] for name in OURS if name in self.rows), None)

    @property
    def fastest(self) -> str | None:
        return next(iter(self.peers), None)

    @property
    def whole_model(self) -> bool:
        return any("tokens" in row for row in self.rows.values())

    def times(self, provider: str) -> float:
        """The provider's time over fastfuse's."""
        return self.rows[provider]["us"] / self.ours["us"]


@dataclass(frozen=True)
class Shortfall:
    case: Case
    text: str
    why: str | None


@dataclass(frozen=True)
class Device:
    name: str
    kind: str  # device_type
    cases: list[Case]
    shortfalls: list[Shortfall]

    @property
    def rows(self) -> list[Mapping]:
        return [row for case in self.cases for row in case.rows.values()]

    @property
    def measured(self) -> str:
        """Commit and days."""
        days = sorted({row["date"][:10] for row in self.rows})
        return f"commit {self.rows[0]['commit'][:10]}, {days[0] if len(days) == 1 else f'{days[0]} to {days[-1]}'}"

    @property
    def versions(self) -> str:
        return ", ".join(f"{package} {self.rows[0][package]}" for package in harness.PACKAGES if self.rows[0].get(package))


def read_bars() -> dict:
    try:
        bars = json.loads(BARS.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise Refused(f"{BARS.name}: {error}") from None
    if missing := {"tables", *KNOWN} - bars.keys():
        raise Refused(f"{BARS.name}: no list {min(missing)!r}")
    entries = [(kind, entry) for kind in KNOWN for entry in bars[kind]] + [("tables", entry) for table in bars["tables"] for entry in table["cases"]]
    for kind, entry in entries:
        known = MATCHED | KNOWN.get(kind, set())
        if unknown := entry.keys() - known:  # a field misspelt would match every row
            raise Refused(f"{BARS.name}: {kind}: an entry has {min(unknown)!r}, known are {', '.join(sorted(known))}")
        if "why" in known - entry.keys():
            raise Refused(f"{BARS.name}: {kind}: an entry without 'why': {json.dumps(entry)}")
    return bars


def holds(entry: Mapping, row: Mapping) -> bool:
    return all(fnmatchcase(row[field], entry[field]) for field in MATCHED & entry.keys())


def load(folder: Path, bars: Mapping) -> list[Device]:
    """What is shown of every device, those with the newest rows first."""
    found: dict[str, list[dict]] = {}
    for file in sorted(folder.glob("*.jsonl")):
        for row in harness.read(file):
            if missing := [field for field in NEEDED if field not in row]:
                raise Refused(f"{file.name}: a row without {missing[0]!r}: {json.dumps(row)[:200]}")
            if row["device_type"] not in SECTIONS.values():
                raise Refused(f"{_row_name(row)}: device_type is {row['device_type']!r}, known are {', '.join(SECTIONS.values())}")
            found.setdefault(row["device"], []).append(row)
    return [_device(rows, bars) for rows in sorted(found.values(), key=_newest, reverse=True)]


def _newest(rows: Iterable[Mapping]) -> str:
    return max(row["date"] for row in rows)


def _device(rows: list[dict], bars: Mapping) -> Device:
    newest = _newest(rows)
    commit = next(row["commit"] for row in rows if row["date"] == newest)
    runs: dict[tuple, list[dict]] = {}
    for row in rows:
        if row["commit"] == commit:
            if is_own(row["provider"]) and row["parity"] is False:  # at this commit once is enough: a later run may have been lucky
                raise Refused(f"{_row_name(row)}: wrong, its error is {row.get('error_over_limit')} times its limit")
            runs.setdefault((row["op"], row["shape"], row["dtype"]), []).append(row)
    cases = []
    for key, run in sorted(runs.items(), key=lambda item: [_natural(word) for word in item[0]]):
        date = _newest(run)
        gone = {row["provider"] for row in run} - {row["provider"] for row in run if row["date"] == date}
        if gone:  # a run that was cut short would show fewer peers, the faster ones perhaps
            raise Refused(f"{' '.join(key)}, {run[0]['device']}: its newest run, of {date}, lacks {min(gone)}, which an earlier one at this commit has")
        cases.append(_case(key, {row["provider"]: row for row in run if row["date"] == date}, bars))
    shown = [row for case in cases for row in case.rows.values()]
    first = shown[0]
    for row in shown:
        if row["dirty"] or not row["commit"]:
            raise Refused(f"{_row_name(row)}: measured in a tree {'with changes' if row['dirty'] else 'of no known commit'}")
        if row["provider"] in OURS and (row.get("error") or not row["us"] or row["parity"] is not True):
            raise Refused(f"{_row_name(row)}: failed, {row.get('error') or 'it has no time, or was not checked'}")
        for package in harness.PACKAGES:
            if row.get(package) != first.get(package):
                raise Refused(f"{_row_name(row)}: {package} {row.get(package)}, and {first.get(package)} in {_row_name(first)}")
    return Device(first["device"], first["device_type"], cases, [short for case in cases for short in _shortfalls(case, bars)])


def _row_name(row: Mapping) -> str:
    return f"{row['op']} {row['shape']} {row['dtype']}, {row['provider']}, {row['device']}, {row['date']}"


def _natural(text: str) -> list:
    return [(int(part), "") if part.isdigit() else (0, part) for part in re.split(r"(\d+)", text)]


def _case(key: tuple, rows: Mapping[str, Mapping], bars: Mapping) -> Case:
    right = {name: row["us"] for name, row in rows.items() if row["parity"] and row["us"] and counts(row, bars)}
    return Case(*key, rows, dict(sorted(right.items(), key=lambda item: item[1])))


def counts(row: Mapping, bars: Mapping) -> bool:
    """Whether a provider is a peer: neither fastfuse by whatever route, nor one that bars.json leaves out."""
    return not is_own(row["provider"]) and not any(holds(entry, row) for entry in bars["not_peers"])


def is_own(provider: str) -> bool:
    return any(provider == ours or provider.startswith(f"{ours} ") for ours in OURS)


def _shortfalls(case: Case, bars: Mapping) -> Iterator[Shortfall]:
    ours = case.ours
    if not ours:
        return
    # Judged as shown: a bar is not missed by less than two digits can say.
    reached = {"percent_of_floor": (round(percent(ours)), f"{percent(ours):.0f}% of the floor", "%")}
    if case.fastest:
        times = case.times(case.fastest)
        reached["fastest_peer"] = round(times, 2), f"{shown_ratio(times)}x as fast as {case.fastest}", "x"
    for kind, (value, text, unit) in reached.items():
        missed = [entry[kind] for entry in bars["bars"] if kind in entry and holds(entry, ours) and value < entry[kind]]
        if missed:
            why = next((entry["why"] for entry in bars["explained"] if kind in entry and value >= entry[kind] and holds(entry, ours)), None)
            yield Shortfall(case, f"{text}, bar {max(missed):g}{unit}", why)


def percent(row: Mapping) -> float:
    return 100 * row["floor_us"] / row["us"]


def shown_ratio(ratio: float) -> str:
    return f"{ratio:.2f}" if ratio < 10 else three_digits(ratio)


def three_digits(number: float) -> str:
    """The first three."""
    return f"{number:.0f}" if number >= 99.95 else f"{number:#.3g}"
