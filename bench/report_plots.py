"""The plots of bench.report."""

import hashlib
import io
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from bench.report_rows import BACKWARD, Case, Device, holds, three_digits

COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#999999", "#f0e442", "#000000")  # Okabe and Ito: told apart without red and green
INK = {"bfloat16": COLOURS[0], "float32": COLOURS[5], "float16": COLOURS[2]}
DASHES = {"bfloat16": "-", "float32": (0, (4, 4)), "float16": ":"}  # on a CPU their floors can be one line


@dataclass(frozen=True)
class Plot:
    """A figure and what is drawn in it. Its file says of which data it is made, so that checking it takes no matplotlib."""

    data: Mapping
    draw: Callable[[Mapping], object]  # -> matplotlib's Figure

    @property
    def digest(self) -> str:
        return hashlib.sha256(json.dumps(self.data, sort_keys=True).encode()).hexdigest()

    def svg(self) -> str:
        """The same data, the same bytes, with one version of matplotlib."""
        import matplotlib

        file = io.StringIO()
        with matplotlib.rc_context({"svg.hashsalt": "fastfuse", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
            self.draw(self.data).savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Description": f"data {self.digest}"})
        return re.sub(r" +$", "", file.getvalue(), flags=re.MULTILINE)


def plots_of(device: Device, bars: Mapping) -> dict[str, Plot]:
    """Those that the rows suffice for."""
    caption = f"{device.name}, {device.measured}"
    data = {"roofline": (_roofline(device), _draw_roofline), "speedup": (_speedup(device, bars), _draw_bars), "tokens": (_tokens(device), _draw_bars)}
    return {name: Plot(found | {"caption": caption}, draw) for name, (found, draw) in data.items() if found["panels"]}


def _roofline(device: Device) -> dict:
    """Rates in flop/s. The roof is what the floors were drawn from: the bandwidth and matrix rate that the fastest floors need."""
    panels: dict[str, list] = {}
    cases = [case for case in device.cases if case.ours and case.ours.get("flops")]  # dequantizing takes no matrix units
    for case in cases:
        flops = case.ours["flops"]
        rates = [flops / us * 1e6 for us in (case.ours["us"], *list(case.peers.values())[:1])]
        point = {"dtype": case.dtype, "backward": case.op.endswith(BACKWARD), "intensity": flops / case.ours["bytes"], "rates": rates}
        panels.setdefault(case.op.removesuffix(BACKWARD), []).append(point)
    rows = [case.ours for case in cases]
    peak = {dtype: max(row["flops"] / row["floor_us"] for row in rows if row["dtype"] == dtype) * 1e6 for dtype in sorted({row["dtype"] for row in rows})}
    return {"panels": panels, "axis": "flop/s", "peak": peak, "bandwidth": max((row["bytes"] / row["floor_us"] for row in rows), default=0) * 1e6}


def _speedup(device: Device, bars: Mapping) -> dict:
    """Of the page's layers with a number of tokens M: the peers' times over fastfuse's."""
    layers: dict[str, list[Case]] = {}
    cells = [entry for table in bars["tables"] for entry in table["cases"]]
    for case in device.cases:
        m, _, rest = case.shape.partition(" ")
        if re.fullmatch(r"M\d+", m) and case.ours and any(holds(entry, case.ours) for entry in cells):
            layers.setdefault(f"{case.op}, {case.dtype}\n{rest}", []).append(case)
    panels = {}
    for title, cases in layers.items():
        if len(cases) > 1:
            peers = [name for case in cases for name in case.rows if name in case.peers]
            values = {name: [case.times(name) if name in case.peers else None for case in cases] for name in peers}
            panels[title] = {"groups": [case.shape.split()[0] for case in cases], "bars": values}
    return {"panels": panels, "axis": "fastfuse is x times as fast", "base": 1, "limit": None}


def _tokens(device: Device) -> dict:
    # On a CPU the model is a tiny one, whose weights' bytes are no limit: 0.2% of it is reached, by whichever provider.
    cases = [case for case in device.cases if case.op == "decode" and case.whole_model and device.kind == "cuda"]
    panels = {}
    shared = set.intersection(*(set(case.shape.split()) for case in cases)) if len(cases) > 1 else set()
    for dtype in dict.fromkeys(case.dtype for case in cases):
        of = [case for case in cases if case.dtype == dtype]
        bars: dict[str, list] = {name: [] for case in of for name in case.rows}
        for case in of:
            for name, values in bars.items():
                row = case.rows.get(name, {})
                values.append(row["tokens"] / row["us"] * 1e6 if row.get("us") and row["parity"] else None)
        limits = [next(row["tokens"] / row["floor_us"] * 1e6 for row in case.rows.values() if "tokens" in row) for case in of]
        labels = [" ".join(word for word in case.shape.split() if word not in shared) for case in of]
        title = f"decode, {' '.join([dtype, *(word for word in of[0].shape.split() if word in shared)])}"
        panels[title] = {"groups": labels, "bars": bars, "limits": limits}
    return {"panels": panels, "axis": "tokens/s", "base": 0, "limit": "what the weights' bytes allow"}


def _panels(data: Mapping, columns: int, width: float, height: float) -> tuple:
    """A figure, and axes of one scale for the panels."""
    from matplotlib.figure import Figure

    n = len(data["panels"])
    columns = min(columns, n)
    rows = -(-n // columns)
    figure = Figure(figsize=(max(width * columns, 6), height * rows + 0.7), layout="constrained", facecolor="white")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True).flatten()
    for empty in axes[n:]:
        empty.remove()
    for ax, title in zip(axes, data["panels"], strict=False):
        ax.set_title(title, fontsize=9, loc="left")
        ax.grid(axis="y", color="#dddddd", linewidth=0.5)
        ax.set_axisbelow(True)
    for ax in axes[:n:columns]:
        ax.set_ylabel(data["axis"])
    figure.supxlabel(data["caption"], fontsize=8, color="#555555")
    return figure, axes[:n]


def _draw_roofline(data: Mapping) -> object:
    from matplotlib.lines import Line2D

    figure, axes = _panels(data, 4, 2.7, 2.4)
    intensities = [point["intensity"] for panel in data["panels"].values() for point in panel]
    for ax, panel in zip(axes, data["panels"].values(), strict=True):
        for dtype, peak in data["peak"].items():
            xs = sorted((min(intensities), peak / data["bandwidth"], max(intensities)))
            ax.plot(xs, [min(peak, data["bandwidth"] * x) for x in xs], color=INK[dtype], linestyle=DASHES[dtype], linewidth=1)
        for point in panel:
            style = {"marker": "s" if point["backward"] else "o", "color": INK[point["dtype"]], "linestyle": "none"}
            for rate, fill, size in zip(point["rates"], ("full", "none"), (3.5, 5.5), strict=False):
                ax.plot(point["intensity"], rate, fillstyle=fill, markersize=size, **style)
        ax.set(xscale="log", yscale="log", xlim=(min(intensities) / 2, max(intensities) * 2))
        ax.minorticks_off()
    for ax in axes[-4:]:
        ax.set_xlabel("flop per byte")
    handles = [Line2D([], [], color=INK[dtype], linestyle=DASHES[dtype], label=f"floor, {dtype}") for dtype in data["peak"]]
    marks = {"fastfuse": {"marker": "o"}, "fastfuse, fwd+bwd": {"marker": "s"}, "fastest peer": {"marker": "o", "fillstyle": "none"}}
    handles += [Line2D([], [], color="black", linestyle="none", label=label, **mark) for label, mark in marks.items()]
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles), frameon=False, fontsize=8)
    return figure


def _draw_bars(data: Mapping) -> object:
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.ticker import LogLocator

    crowded = max(len(panel["groups"]) for panel in data["panels"].values()) > 4
    figure, axes = _panels(data, 1 if crowded else 2, 9 if crowded else 4.6, 2.5)
    names = list(dict.fromkeys(name for panel in data["panels"].values() for name in panel["bars"]))
    for ax, panel in zip(axes, data["panels"].values(), strict=True):
        width = 0.8 / len(panel["bars"])
        for n, (name, values) in enumerate(panel["bars"].items()):
            drawn = {group + (n + 0.5) * width - 0.4: value for group, value in enumerate(values) if value is not None}
            heights = [value - data["base"] for value in drawn.values()]
            bars = ax.bar(list(drawn), heights, width, data["base"], color=COLOURS[names.index(name) % len(COLOURS)], edgecolor="white", linewidth=0.5)
            if not data["base"]:
                ax.bar_label(bars, fmt=three_digits, fontsize=7)
        for group, limit in enumerate(panel.get("limits", ())):
            ax.hlines(limit, group - 0.45, group + 0.45, color="black", linestyle="--", linewidth=1)
        ax.set_xticks(range(len(panel["groups"])), panel["groups"])
        if data["base"]:
            ax.set_yscale("log")
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter("{x:g}")
            ax.minorticks_off()
            ax.axhline(data["base"], color="black", linewidth=1)
    handles = [Patch(color=COLOURS[n % len(COLOURS)], label=name) for n, name in enumerate(names)]
    if data["limit"]:
        handles.append(Line2D([], [], color="black", linestyle="--", linewidth=1, label=data["limit"]))
    figure.legend(handles=handles, loc="outside upper center", ncols=min(len(handles), 4 if data["base"] else 2), frameon=False, fontsize=8)
    return figure
