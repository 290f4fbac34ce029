"""What is reported: the tables, ratios to a reference, and the cost per pixel over that at 224x224."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import timm
import torch

from ...kernels.benchmark import report
from .competitors import COMPILE, EAGER, FUSED, FUSED_COMPILE
from .roster import BASE_RESOLUTION

COUNTERPARTS = {EAGER: FUSED, FUSED: EAGER, COMPILE: FUSED_COMPILE, FUSED_COMPILE: COMPILE}
COLUMNS = (
    ("", "<48"),
    ("ms", ">9"),
    ("quartiles", ">18"),
    ("images/s", ">10"),
    ("ms/image", ">10"),
    ("x time", ">8"),
    ("peak MB", ">10"),
    ("weights MB", ">12"),
    ("J/image", ">9"),
    ("MFU", ">7"),
)

Row = Mapping[str, Any]


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware and versions."""
    return report.environment(device) | {"timm": timm.__version__}


def timed(rows: Sequence[Row]) -> list[Row]:
    """The rows of competitors that were timed and did not fail."""
    return [row for row in rows if "median" in row and "failure" not in row]


def add_ratios(rows: Sequence[dict[str, Any]], reference: str) -> None:
    """Give each timed row its ``times_reference``: its time over that of the reference in the same form.

    Where the reference was not timed in that form, it is the same form with or without ``fuse()``, or else its first.

    Args:
        rows: of one case.
        reference: name of a model.
    """
    forms = {row["form"]: row for row in timed(rows) if row["model"] == reference}
    for row in timed(rows):
        form = next((form for form in (row["form"], COUNTERPARTS.get(row["form"])) if form in forms), None)
        other = forms[form] if form else next(iter(forms.values()), None)
        row["relative_to"] = other and other["competitor"]
        row["times_reference"] = other and row["median"] / other["median"]


def per_pixel(results: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Cost per pixel over that at 224x224 of the same competitor, mode, dtype and batch: time, and peak memory.

    Peak memory is what a call takes beyond weights and the optimiser's state.
    """
    costs: dict[tuple[str, ...], dict[int, dict[str, float | None]]] = {}
    for result in results:
        pixels = result["images"] * result["resolution"] ** 2
        for row in timed(result["rows"]):
            peak = row["peak_bytes"]
            costs.setdefault((row["competitor"], result["mode"], result["dtype"], result["batch"]), {})[
                result["resolution"]
            ] = {"seconds": row["seconds_per_pixel"], "bytes": None if peak is None else peak / pixels}
    names = ("competitor", "mode", "dtype", "batch")
    return [
        dict(zip(names, key, strict=True))
        | {
            "resolution": resolution,
            "times_seconds": cost["seconds"] / base["seconds"],
            "times_bytes": None if cost["bytes"] is None or not base["bytes"] else cost["bytes"] / base["bytes"],
        }
        for key, found in costs.items()
        if (base := found.get(BASE_RESOLUTION))
        for resolution, cost in sorted(found.items())
        if resolution != BASE_RESOLUTION
    ]


def per_pixel_tables(costs: Iterable[Mapping[str, Any]]) -> list[str]:
    """One table per mode, dtype and batch, with a column of times and memory for each resolution."""
    tables: dict[tuple[str, ...], dict[str, dict[int, str]]] = {}
    for cost in costs:
        cells = tables.setdefault((cost["mode"], cost["dtype"], cost["batch"]), {})
        figures = f"{cost['times_seconds']:.2f}, {_number(cost['times_bytes'], '.2f')}"
        cells.setdefault(cost["competitor"], {})[cost["resolution"]] = figures
    texts = []
    for (mode, dtype, batch), cells in tables.items():
        sizes = sorted({size for row in cells.values() for size in row})
        lines = [
            f"{mode}  {dtype}  batch {batch}: time and peak memory of a pixel, over those at "
            f"{BASE_RESOLUTION}x{BASE_RESOLUTION}",
            " " * 50 + "".join(f"{f'{size}x{size}':>14}" for size in sizes),
        ]
        lines += [
            f"  {name:{COLUMNS[0][1]}}" + "".join(f"{row.get(size, '-'):>14}" for size in sizes)
            for name, row in cells.items()
        ]
        texts.append("\n".join(lines) + "\n")
    return texts


def table(result: Mapping[str, Any]) -> str:
    """The rows of one case."""
    size, references = result["resolution"], {row.get("relative_to") for row in result["rows"]} - {None}
    lines = [
        f"{result['mode']}  {result['dtype']}  {size}x{size}  batch {result['images']}",
        f"  100% MFU is {result['peak'] / 1e9:.0f} GFLOP/s, of a {result['dtype']} matrix product",
        f"  x time: over {' or '.join(sorted(references)) or 'a reference that was not timed'}; "
        "peak MB: of a call, beyond weights and optimiser state",
        "  " + "".join(f"{title:{width}}" for title, width in COLUMNS).rstrip(),
    ]
    return "\n".join([*lines, *("  " + _line(row) for row in result["rows"])]) + "\n"


def _line(row: Row) -> str:
    name = f"{row['competitor']:{COLUMNS[0][1]}}"
    if "failure" in row:
        return f"{name}failed: {row['failure']}"
    if "not_run" in row:
        return f"{name}not run: {row['not_run']}"
    cells = (
        f"{1e3 * row['median']:.4g}",
        f"{1e3 * row['lower']:.4g} - {1e3 * row['upper']:.4g}",
        f"{row['images_per_second']:.4g}",
        f"{1e3 * row['seconds_per_image']:.4g}",
        _number(row["times_reference"], ".2f"),
        "-" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e6:.1f}",
        f"{row['weight_bytes'] / 1e6:.1f}",
        _number(row["joules_per_image"], ".3g"),
        f"{row['mfu']:.1%}",
    )
    figures = (f"{cell:{width}}" for cell, (_, width) in zip(cells, COLUMNS[1:], strict=True))
    return f"{name}{''.join(figures)}  {row['note']}"


def _number(value: float | None, style: str) -> str:
    return "-" if value is None else f"{value:{style}}"
