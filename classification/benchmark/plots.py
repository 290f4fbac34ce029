"""The plots: accuracy over throughput, and cost per pixel over resolution."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .prepared import FORMS, INFERENCE
from .roster import BASE_RESOLUTION, MODELS, SOURCES

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKERS = dict(zip(FORMS, "os^D*vPpX", strict=True))
# Okabe and Ito's colours, one per family.
COLOURS = dict(zip(SOURCES, ("#D55E00", "#7f7f7f", "#56B4E9", "#0072B2", "#009E73", "#CC79A7"), strict=True))
LINES = ("-", "--", ":")  # for the models of a family, the smallest first
COSTS = {"ns/pixel": ("seconds", 1e9), "peak bytes/pixel": ("peak_bytes", 1)}
Result = Mapping[str, Any]


def draw(folder: Path, results: Sequence[Result]) -> None:
    """Write ``accuracy.png`` and ``resolution.png``, if there are results to draw, and print where they are."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        print("\nno plots: matplotlib is not installed; pip install matplotlib")
        return
    at_base = [r for r in results if (r["mode"], r["resolution"]) == (INFERENCE, BASE_RESOLUTION) and _timed(r)]
    largest = {result["dtype"]: [result] for result in sorted(at_base, key=lambda result: result["images"])}
    groups: dict[str, list[Result]] = {}
    for result in sorted(results, key=lambda result: result["resolution"]):
        groups.setdefault(f"{result['mode']}, {result['dtype']}", []).append(result)
    groups = {title: found for title, found in groups.items() if len({result["resolution"] for result in found}) > 1}
    plots = (("accuracy.png", _accuracy, largest, 1), ("resolution.png", _resolution, groups, len(COSTS)))
    for name, plot, found, columns in plots:
        if found:
            figure = Figure(figsize=(1 + 6 * columns, 5 * len(found)), layout="constrained")
            rows = figure.subplots(len(found), columns, squeeze=False)
            for panels, (title, several) in zip(rows, found.items(), strict=True):
                plot(panels, title, several)
                for panel in panels:
                    panel.grid(alpha=0.3)
                    panel.legend(frameon=False, fontsize=7)
            figure.savefig(folder / name, dpi=110)
            print(f"\nplot: {folder / name}")


def _accuracy(panels: Sequence["Axes"], title: str, results: Sequence[Result]) -> None:
    [panel], [result] = panels, results
    for family, colour in COLOURS.items():
        for form, marker in MARKERS.items():
            rows = [row for row in _timed(result) if (row["family"], row["form"]) == (family, form)]
            if points := sorted((row["images_per_second"], row["accuracy"]) for row in rows):
                label = f"{family}, {form} ({SOURCES[family]})"
                panel.plot(*zip(*points, strict=True), marker=marker, color=colour, lw=1, alpha=0.8, label=label)
    title = f"inference, {title}, batch {result['images']}"
    panel.set(title=title, xlabel="images/s", ylabel="published ImageNet-1K top-1, %")


def _resolution(panels: Sequence["Axes"], title: str, results: Sequence[Result]) -> None:
    for panel, (unit, (cost, factor)) in zip(panels, COSTS.items(), strict=True):
        curves: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
        for result in results:
            for row in _timed(result):
                if row[cost] is not None:
                    pixels = result["images"] * result["resolution"] ** 2
                    points = curves.setdefault((row["family"], row["model"], row["form"]), [])
                    points.append((result["resolution"], factor * row[cost] / pixels))
        for (family, name, form), points in curves.items():
            siblings = [model.name for model in MODELS.values() if model.family == family]
            line = LINES[siblings.index(name)]
            style: dict[str, Any] = dict(color=COLOURS[family], linestyle=line, marker=MARKERS[form], ms=4, alpha=0.8)
            panel.plot(*zip(*points, strict=True), label=f"{name}, {form}", **style)
        panel.set(title=title, xlabel="side of the image, pixels", ylabel=unit)
        panel.set_xticks(sorted({result["resolution"] for result in results}))
        panel.set_ylim(bottom=0)


def _timed(result: Result) -> list[Mapping[str, Any]]:
    return [row for row in result["rows"] if "seconds" in row]
