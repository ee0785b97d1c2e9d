"""What patch replaces in a Mllama, drawn from the code: a tiny one with PEFT LoRA over bitsandbytes is run before and after.

python -m bench.draw_patch            write docs/pictures/mllama_patched.svg
python -m bench.draw_patch --check    write nothing; exit 1 where the file is not what the code gives

Modules whose forward is a fused op now are coloured. Pale are those that ran before and no longer do: the op above does their work. The others are grey.
Modules that are alike are one row.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from html import escape

import torch
from rich.progress import Progress
from torch import nn

import fastfuse
from bench import arguments
from bench.harness import ROOT
from fastfuse.demo.image import load_image
from fastfuse.demo.mllama import build, prepare
from fastfuse.demo.show import Size

FILE = ROOT / "docs" / "pictures" / "mllama_patched.svg"
TINY = Size(64, 112, 4, 2, 4, 32, 64, 4, 2, 56, 96, torch.float32)
COLOURS = {"patch_embed": "#b34d00", "cross_attention": "#00795a", "nf4_lora_linear": "#0065a3", "nf4_linear": "#7a4f8f"}
FUSED, INSIDE, OWN = "runs a fused op now", "its work is in the fused op above", "runs as before"
LINE, INDENT, COLUMN, MARGIN = 22, 18, 590, 12


@dataclass(frozen=True)
class Row:
    """A module, or several that are alike."""

    names: tuple[str, ...]
    kind: str
    state: str
    op: str  # that it runs, or that has its work
    children: tuple["Row", ...]

    def flat(self, depth: int = 0) -> Iterator[tuple[int, "Row"]]:
        yield depth, self
        for child in self.children:
            yield from child.flat(depth + 1)


@contextmanager
def _recording() -> Iterator[set[int]]:
    """The ids of the modules that are called inside."""
    called, own = set(), nn.Module.__call__

    def recorded(self, *args, **kwargs):
        called.add(id(self))
        return own(self, *args, **kwargs)

    nn.Module.__call__ = recorded
    try:
        yield called
    finally:
        nn.Module.__call__ = own


@torch.no_grad()
def tree() -> Row:
    """The tiny model's modules, with what became of them."""
    torch.manual_seed(0)
    model = build(TINY, torch.device("cpu"), Progress(disable=True))
    batch = prepare(load_image(None)[0], TINY, torch.device("cpu"))
    batch.pop("tiles")
    with _recording() as before:
        model(**batch)
    report = fastfuse.patch(model)
    ops = {id(model.get_submodule(entry.name)): entry.op for entry in report.patched}
    with _recording() as after:
        model(**batch)
    if found := fastfuse.status(model).fallbacks:
        raise RuntimeError(f"bench.draw_patch: modules of the tiny Mllama run their own forward: {found}")

    def row(module, inside):
        op = ops.get(id(module), inside if id(module) not in after else "")
        state = FUSED if id(module) in ops else INSIDE if id(module) in before - after else OWN
        alike: dict[Row, dict[str, None]] = {}
        if not op.startswith("nf4"):  # of a linear layer the row says it all
            for name, child in _children(module):
                if any(id(m) in before for m in child.modules()):
                    alike.setdefault(row(child, op if state != OWN else ""), {})[name] = None
        return Row((), type(module).__name__, state, op, tuple(replace(child, names=tuple(names)) for child, names in alike.items()))

    return row(model.get_base_model(), "")


def _children(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Those of a list as the module's own."""
    for name, child in module.named_children():
        if isinstance(child, nn.ModuleList):
            yield from ((f"{name}.N", one) for one in child)
        else:
            yield name, child


def svg(root: Row) -> str:
    """The model and its first child over the whole width, below them the vision model on the left and the rest on the right."""
    (inner,) = (row for row in root.children if row.kind == "MllamaModel")
    vision = [row for row in inner.children if row.names == ("vision_model",)]
    text = [*(row for row in inner.children if row not in vision), *(row for row in root.children if row is not inner)]
    columns = [[found for row in column for found in row.flat()] for column in (vision, text)]
    top = MARGIN + 2 * LINE + 14
    height = top + LINE * (2 + max(map(len, columns))) + 16 + MARGIN
    width = 2 * COLUMN + 3 * MARGIN
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" font-family="Helvetica, Arial, sans-serif" font-size="13">',
        "<title>What patch replaces in a Mllama with PEFT LoRA over bitsandbytes</title>",
        f'<rect width="{width}" height="{height}" fill="white"/>',
        *_legend(),
    ]
    for i, row in enumerate((root, inner)):
        parts += _drawn(MARGIN + i * INDENT, top + i * LINE, width - 2 * MARGIN - i * INDENT, row)
    for n, column in enumerate(columns):
        left = MARGIN + n * (COLUMN + MARGIN)
        for i, (depth, row) in enumerate(column):
            parts += _drawn(left + depth * INDENT, top + 2 * LINE + 8 + i * LINE, COLUMN - depth * INDENT, row)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _legend() -> list[str]:
    parts, left = [f'<text x="{MARGIN}" y="{MARGIN + 14}" font-weight="bold">What patch replaces in a Mllama with PEFT LoRA over bitsandbytes</text>'], MARGIN
    keys = [(colour, 1.0, op) for op, colour in COLOURS.items() if op != "nf4_linear"]
    for colour, opacity, words in [*keys, (COLOURS["patch_embed"], 0.16, "ran before, its work is in the fused op above"), ("#eeeeee", 1.0, "runs as before")]:
        parts.append(f'<rect x="{left}" y="{MARGIN + LINE + 4}" width="16" height="14" fill="{colour}" fill-opacity="{opacity}"/>')
        parts.append(f'<text x="{left + 22}" y="{MARGIN + LINE + 16}">{words}</text>')
        left += 60 + 7 * len(words)
    return parts


def _drawn(x: int, y: int, width: int, row: Row) -> list[str]:
    colour, opacity = (COLOURS[row.op], 1.0 if row.state == FUSED else 0.16) if row.state != OWN else ("#eeeeee", 1.0)
    ink, faint = ("white", "white") if row.state == FUSED else ("#111111", "#555555")
    parts = [f'<rect x="{x}" y="{y}" width="{width}" height="{LINE - 2}" rx="3" fill="{colour}" fill-opacity="{opacity}"/>']
    name, kind = escape(", ".join(row.names)), escape(row.kind)
    told = f'<tspan font-weight="bold">{name or kind}</tspan>' + (f'<tspan dx="8" fill="{faint}">{kind}</tspan>' if name else "")
    parts.append(f'<text x="{x + 7}" y="{y + 15}" fill="{ink}">{told}</text>')
    if row.state == FUSED:
        parts.append(f'<text x="{x + width - 7}" y="{y + 15}" fill="{ink}" text-anchor="end">{row.op}</text>')
    return parts


def main(argv: list[str] | None = None) -> int:
    p = arguments(__doc__, check="write nothing")
    check, made = p.parse_args(argv).check, svg(tree())
    if not check:
        FILE.parent.mkdir(parents=True, exist_ok=True)
        FILE.write_text(made, encoding="utf-8")
    elif not FILE.exists() or FILE.read_text(encoding="utf-8") != made:
        print(f"bench.draw_patch: {FILE.relative_to(ROOT)} is not what the code gives: run python -m bench.draw_patch", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
