"""The plots: accuracy against throughput, and cost per pixel against resolution."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .prepared import AOTI, CHECKPOINT, COMPILE, CUDAGRAPH, EAGER, FUSED, FUSED_COMPILE, INFERENCE, ONNX, ONNX_INT8
from .roster import BASE_RESOLUTION, MODELS, SOURCES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MARKERS = {
    EAGER: "o", FUSED: "s", COMPILE: "^", FUSED_COMPILE: "D", CUDAGRAPH: "*", CHECKPOINT: "v", ONNX: "P",
    ONNX_INT8: "p", AOTI: "X",
}  # fmt: skip
# Okabe and Ito's colours, one per family.
COLOURS = dict(zip(SOURCES, ("#D55E00", "#7f7f7f", "#56B4E9", "#0072B2", "#009E73", "#CC79A7"), strict=True))
LINES = ("-", "--", ":")  # of the models of a family, from the smallest
TICKS = (1, 1.5, 2, 3, 5, 7)  # in a decade
COSTS = {"ns/pixel": ("seconds_per_pixel", 1e9), "peak bytes/pixel": ("bytes_per_pixel", 1)}

Result = Mapping[str, Any]


def draw(folder: Path, results: Sequence[Result]) -> list[str]:
    """Write the PNGs for which there are figures.

    Returns:
        A line per PNG: where it is, or what it needs.

    Raises:
        ImportError: without matplotlib.
    """
    from matplotlib.figure import Figure

    def figure(rows: int, columns: int) -> "Figure":
        return Figure(figsize=(1 + 6 * columns, 1.5 + 4 * rows), layout="constrained")

    lines = []
    for name, plot in {"accuracy.png": _accuracy, "resolution.png": _resolution}.items():
        drawn = plot(results, figure)
        if isinstance(drawn, str):
            lines.append(f"no {name}: {drawn}")
        else:
            entries: dict[str, Any] = {}  # one legend for all panels, each name once
            for panel in drawn.axes:
                handles, labels = panel.get_legend_handles_labels()
                entries |= dict(zip(labels, handles, strict=True))
            place = dict(loc="outside lower center", ncols=2, frameon=False, fontsize=7)
            drawn.legend(list(entries.values()), list(entries), **place)
            drawn.savefig(folder / name, dpi=110)
            lines.append(f"drawn: {folder / name}")
    return lines


def _accuracy(results: Sequence[Result], figure: Callable[[int, int], "Figure"]) -> "Figure | str":
    """Each dtype on its largest batch, inference."""
    from matplotlib.ticker import LogLocator, NullLocator

    at_base = [r for r in results if (r["mode"], r["resolution"]) == (INFERENCE, BASE_RESOLUTION) and _timed(r)]
    chosen = {result["dtype"]: result for result in sorted(at_base, key=lambda result: result["images"])}
    if not chosen:
        return f"needs inference at {BASE_RESOLUTION}x{BASE_RESOLUTION}"
    drawing = figure(1, len(chosen))
    for panel, (dtype, result) in zip(drawing.subplots(1, len(chosen), squeeze=False)[0], chosen.items(), strict=True):
        for family, colour in COLOURS.items():
            for form, marker in MARKERS.items():
                rows = [row for row in _timed(result) if (row["family"], row["form"]) == (family, form)]
                points = sorted((row["images_per_second"], row["accuracy"]) for row in rows)
                if points:
                    label = f"{family}, {form} ({SOURCES[family]})"
                    panel.plot(*zip(*points, strict=True), marker=marker, color=colour, lw=1, alpha=0.8, label=label)
        _finish(panel, f"inference, {dtype}, batch {result['images']}", "images/s", "ImageNet-1K top-1 as published, %")
        panel.set_xscale("log")  # with plain numbers
        panel.xaxis.set_major_locator(LogLocator(subs=TICKS))
        panel.xaxis.set_major_formatter("{x:g}")
        panel.xaxis.set_minor_locator(NullLocator())
    return drawing


def _resolution(results: Sequence[Result], figure: Callable[[int, int], "Figure"]) -> "Figure | str":
    groups: dict[tuple[str, str], list[Result]] = {}
    for result in sorted(results, key=lambda result: result["resolution"]):
        groups.setdefault((result["mode"], result["dtype"]), []).append(result)
    groups = {key: found for key, found in groups.items() if len({result["resolution"] for result in found}) > 1}
    if not groups:
        return "needs two resolutions"
    drawing = figure(len(groups), 2)
    for panels, (key, found) in zip(drawing.subplots(len(groups), 2, squeeze=False), groups.items(), strict=True):
        for panel, (unit, (cost, factor)) in zip(panels, COSTS.items(), strict=True):
            curves: dict[tuple[str, str], list[tuple[float, float]]] = {}
            for result in found:
                for row in _timed(result):
                    if row[cost] is not None:
                        points = curves.setdefault((row["model"], row["form"]), [])
                        points.append((result["resolution"], factor * row[cost]))
            for (name, form), points in curves.items():
                family = next(known.family for known in MODELS if known.name == name)
                line = LINES[[known.name for known in MODELS if known.family == family].index(name)]
                style = dict(color=COLOURS[family], linestyle=line, marker=MARKERS[form], ms=4, alpha=0.8)
                panel.plot(*zip(*points, strict=True), label=f"{name}, {form}", **style)
            _finish(panel, ", ".join(key), "side of the image, pixels", unit)
            panel.set_xticks(sorted({result["resolution"] for result in found}))
            panel.set_ylim(bottom=0)
    return drawing


def _timed(result: Result) -> list[Mapping[str, Any]]:
    return [row for row in result["rows"] if "seconds" in row]


def _finish(panel: "Axes", title: str, x: str, y: str) -> None:
    panel.set(title=title, xlabel=x, ylabel=y)
    panel.grid(alpha=0.3)
