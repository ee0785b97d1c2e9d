"""What patch did, module by module, and why."""

import collections
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field


@dataclass(frozen=True)
class Entry:
    """One module that a fused op could serve.

    status: "patched", "already" (by an earlier call, or fused as it is), "planned" (dry run), "skipped" (no fused op covers it, or
    nobody asked), "unpatched" (how status has these) or "restored".
    code, reason: why it was skipped, why a patched module would run its own forward now, or what verify found; both "" where there is nothing to say.
    fallbacks: how often its own forward ran instead since it was patched, by reason code.
    """

    name: str
    module_type: str
    host: str
    op: str
    status: str
    code: str = ""
    reason: str = ""
    layout: str = ""
    backend: str = ""
    fallbacks: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class PatchReport:
    """The outcome of patch, unpatch or status. True where at least one module runs a fused op."""

    model_type: str
    entries: tuple[Entry, ...]
    note: str = ""  # why nothing was found

    @property
    def patched(self) -> tuple[Entry, ...]:
        return tuple(e for e in self.entries if e.status in ("patched", "already"))

    @property
    def skipped(self) -> tuple[Entry, ...]:
        return tuple(e for e in self.entries if e.status == "skipped")

    @property
    def counts(self) -> dict[str, int]:
        """Modules by status."""
        return dict(collections.Counter(e.status for e in self.entries))

    @property
    def fallbacks(self) -> dict[str, int]:
        """Calls that ran a module's own forward, by reason code, over all modules."""
        total = collections.Counter()
        for entry in self.entries:
            total.update(entry.fallbacks)
        return dict(total)

    def to_dict(self) -> dict:
        return {"model_type": self.model_type, "note": self.note, "counts": self.counts, "entries": [asdict(e) for e in self.entries]}

    def __bool__(self) -> bool:
        return bool(self.patched)

    def __str__(self) -> str:
        counts = ", ".join(f"{n} {status}" for status, n in self.counts.items())
        lines = [f"fastfuse: {self.model_type}: {counts or self.note}"]
        rows = collections.Counter()
        for e in self.entries:
            rows[e.op, e.status, e.host, e.layout, e.backend, f"{e.code}: {e.reason}" if e.code else ""] += 1
            if e.fallbacks:
                why = f"{', '.join(sorted(e.fallbacks))}: calls that ran the module's own forward"
                rows[e.op, "fell back", e.host, "", "", why] += sum(e.fallbacks.values())
        if rows:
            table = [("op", "status", "count", "host", "storage", "backend", "why"), *((op, status, str(n), *rest) for (op, status, *rest), n in rows.items())]
            widths = [max(map(len, column)) for column in zip(*table, strict=True)]
            lines += ["  " + "  ".join(map(str.ljust, row, widths)).rstrip() for row in table]
        return "\n".join(lines)
