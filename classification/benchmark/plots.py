"""The plots: accuracy against throughput, cost per pixel against resolution, throughput against batch."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .competitors import COMPILE, CUDAGRAPH, EAGER, FUSED, FUSED_COMPILE, INFERENCE
from .report import timed
from .roster import BASE_RESOLUTION, MODELS, SOURCES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

MARKERS = {EAGER: "o", FUSED: "s", COMPILE: "^", FUSED_COMPILE: "D", CUDAGRAPH: "*"}
# Okabe and Ito's colours, one per family.
COLOURS = dict(zip(SOURCES, ("#D55E00", "#56B4E9", "#0072B2", "#009E73", "#CC79A7", "#7f7f7f"), strict=True))
LINES = ("-", "--", ":")  # of the models of a family, from the smallest
TICKS = (1, 1.5, 2, 3, 5, 7)  # in a decade

Result = Mapping[str, Any]
Curves = dict[tuple[str, str], list[tuple[float, float]]]  # points by model and form


def draw(folder: Path, results: Sequence[Result]) -> dict[str, str]:
    """Write the PNGs for which there are figures.

    Returns:
        By the name of each PNG that was not drawn, the reason.

    Raises:
        ImportError: without matplotlib.
    """
    from matplotlib.figure import Figure

    def figure(rows: int, columns: int) -> "Figure":
        return Figure(figsize=(1 + 6 * columns, 1.5 + 4 * rows), layout="constrained")

    missing = {}
    for name, plot in PLOTS.items():
        drawn = plot(results, figure)
        if isinstance(drawn, str):
            missing[name] = drawn
        else:
            drawn.savefig(folder / name, dpi=110)
    return missing


def _accuracy(results: Sequence[Result], figure: Callable[[int, int], "Figure"]) -> "Figure | str":
    """Each dtype on its largest batch, inference."""
    chosen: dict[str, Result] = {}
    for result in results:
        if (result["mode"], result["resolution"]) == (INFERENCE, BASE_RESOLUTION) and timed(result["rows"]):
            best = chosen.get(result["dtype"])
            if best is None or result["batch"] > best["batch"]:
                chosen[result["dtype"]] = result
    if not chosen:
        return f"needs inference at {BASE_RESOLUTION}x{BASE_RESOLUTION}"
    drawing = figure(1, len(chosen))
    for panel, (dtype, result) in zip(drawing.subplots(1, len(chosen), squeeze=False)[0], chosen.items(), strict=True):
        for family, colour in COLOURS.items():
            for form, marker in MARKERS.items():
                rows = [row for row in timed(result["rows"]) if (row["family"], row["form"]) == (family, form)]
                points = sorted((row["images_per_second"], row["accuracy"]) for row in rows)
                if points:
                    label = f"{family}, {form} ({SOURCES[family]})"
                    panel.plot(*zip(*points, strict=True), marker=marker, color=colour, lw=1, alpha=0.8, label=label)
        _finish(panel, f"inference, {dtype}, batch {result['images']}", "images/s", "ImageNet-1K top-1 as published, %")
        panel.set_xscale("log")
        _ticks(panel.xaxis)
    _legend(drawing)
    return drawing


def _resolution(results: Sequence[Result], figure: Callable[[int, int], "Figure"]) -> "Figure | str":
    def seconds(result: Result, row: Mapping[str, Any]) -> float:
        return 1e9 * row["seconds_per_pixel"]

    def memory(result: Result, row: Mapping[str, Any]) -> float | None:
        peak = row["peak_bytes"]
        return None if peak is None else peak / (result["images"] * result["resolution"] ** 2)

    groups = _groups(results, lambda result: (result["mode"], result["dtype"], result["batch"]), "resolution")
    if not groups:
        return "needs two resolutions"
    drawing = figure(len(groups), 2)
    for panels, ((mode, dtype, batch), members) in zip(
        drawing.subplots(len(groups), 2, squeeze=False), groups.items(), strict=True
    ):
        title = f"{mode}, {dtype}, batch {batch}"
        for panel, value, unit in zip(panels, (seconds, memory), ("ns/pixel", "peak bytes/pixel"), strict=True):
            _curves(panel, _points(members, "resolution", value))
            _finish(panel, title, "side of the image, pixels", unit)
            panel.set_xticks(sorted({member["resolution"] for member in members}))
            panel.set_ylim(bottom=0)
    _legend(drawing)
    return drawing


def _batch(results: Sequence[Result], figure: Callable[[int, int], "Figure"]) -> "Figure | str":
    groups = _groups(results, lambda result: (result["mode"], result["dtype"], result["resolution"]), "images")
    if not groups:
        return "needs two batches"
    drawing = figure(len(groups), 1)
    for (panel,), ((mode, dtype, size), members) in zip(
        drawing.subplots(len(groups), 1, squeeze=False), groups.items(), strict=True
    ):
        _curves(panel, _points(members, "images", lambda _, row: row["images_per_second"]))
        _finish(panel, f"{mode}, {dtype}, {size}x{size}", "images in a batch", "images/s")
        panel.set_xscale("log", base=2)
        counts = sorted({member["images"] for member in members})
        panel.set_xticks(counts, list(map(str, counts)))
        panel.set_yscale("log")
        _ticks(panel.yaxis)
    _legend(drawing)
    return drawing


PLOTS = {"accuracy.png": _accuracy, "resolution.png": _resolution, "batch.png": _batch}


def _groups(results: Iterable[Result], key: Callable[[Result], tuple], along: str) -> dict[tuple, list[Result]]:
    """Results by key, where there are at least two values to draw along."""
    groups: dict[tuple, list[Result]] = {}
    for result in results:
        groups.setdefault(key(result), []).append(result)
    return {name: members for name, members in groups.items() if len({member[along] for member in members}) > 1}


def _points(
    results: Iterable[Result], along: str, value: Callable[[Result, Mapping[str, Any]], float | None]
) -> Curves:
    points: Curves = {}
    for result in sorted(results, key=lambda result: result[along]):
        for row in timed(result["rows"]):
            if (y := value(result, row)) is not None:
                points.setdefault((row["model"], row["form"]), []).append((result[along], y))
    return points


def _curves(panel: "Axes", curves: Curves) -> None:
    for (model, form), points in curves.items():
        family = next(known.family for known in MODELS if known.name == model)
        rank = [known.name for known in MODELS if known.family == family].index(model)
        style = dict(color=COLOURS[family], linestyle=LINES[rank], marker=MARKERS[form], ms=4, alpha=0.8)
        panel.plot(*zip(*points, strict=True), label=f"{model}, {form}", **style)


def _finish(panel: "Axes", title: str, x: str, y: str) -> None:
    panel.set(title=title, xlabel=x, ylabel=y)
    panel.grid(alpha=0.3)


def _ticks(axis: "Axis") -> None:
    """Plain numbers on a logarithmic axis."""
    from matplotlib.ticker import LogLocator, NullLocator

    axis.set_major_locator(LogLocator(subs=TICKS))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_locator(NullLocator())


def _legend(figure: "Figure") -> None:
    """One legend for all panels, each name once."""
    entries: dict[str, Any] = {}
    for panel in figure.axes:
        handles, labels = panel.get_legend_handles_labels()
        entries |= dict(zip(labels, handles, strict=True))
    place = dict(loc="outside lower center", ncols=2, frameon=False, fontsize=7)
    figure.legend(list(entries.values()), list(entries), **place)
