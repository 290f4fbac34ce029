"""Draws effective receptive fields side by side, and their contribution as a function of the area."""

import math
from collections.abc import Sequence
from textwrap import fill
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.transforms import ScaledTranslation

from .receptive_field import FRACTIONS, ReceptiveField
from .style import COLOURS, in_paper_style, note, page, title, without_ticks

FAINTEST = 1e-4  # lower bound of the colour scale, relative to the largest contribution
OUTLINED = {0.5: "top", 0.9: "bottom"}  # fractions of the contribution, each with the corner of its label
COLUMNS = 3
MAP_WIDTH, CURVES_WIDTH = 1.7, 2.1  # inches
LABEL_WIDTH = 20  # characters in a line of a label
OUTLINE = [withStroke(linewidth=1.6, foreground="#00000080")]  # dark around white: visible on all colours


@in_paper_style
def draw_receptive_fields(fields: Sequence[tuple[str, ReceptiveField]], of: str) -> Figure:
    """One panel per model, with the squares that have 50 % and 90 % of the contribution, and one with curves for all.

    Args:
        fields: labels of the models with their receptive fields.
        of: the note below the panels, about features and images.
    """
    rows = math.ceil(len(fields) / COLUMNS)
    columns = math.ceil(len(fields) / rows)
    figure = page(height=0.55 + max(rows * 1.85, 2.5), width=CURVES_WIDTH + MAP_WIDTH * columns)
    left, right = figure.subfigures(1, 2, width_ratios=[MAP_WIDTH * columns, CURVES_WIDTH])
    maps = left.subplots(rows, columns, squeeze=False).flatten().tolist()
    curves = right.subplots()
    for panel in maps[len(fields) :]:
        panel.remove()
    del maps[len(fields) :]
    relative = [field.contribution / field.contribution.max() for _, field in fields]
    faintest = min(float(contribution.quantile(0.01)) for contribution in relative)
    norm = LogNorm(10 ** math.floor(math.log10(min(max(faintest, FAINTEST), 0.1))), 1)
    for i, (panel, (label, field)) in enumerate(zip(maps, fields, strict=True)):
        shown = panel.imshow(relative[i].clamp(min=norm.vmin).numpy(), norm=norm, cmap="magma")
        _outline(panel, field)
        label = fill(label, LABEL_WIDTH)
        title(panel, i, label)
        without_ticks(panel)
        panel.set_xlabel("{} \u00d7 {} pixels".format(*relative[i].shape))
        areas, inside = field.growth()
        curves.plot(100 * areas, 100 * inside, color=COLOURS[i], label=label)
        points = [(100 * field.area(fraction), 100 * fraction) for fraction in FRACTIONS]
        curves.plot(*zip(*points, strict=True), "o", color=COLOURS[i], ms=2.5)
    bar = left.colorbar(
        shown, ax=maps, label="contribution / largest", location="bottom", aspect=40, pad=0.03, extend="min"
    )
    bar.outline.set_visible(False)
    bar.minorticks_off()
    title(curves, len(fields), "contribution by area")
    curves.set(xlim=(0, 100), ylim=(0, 101), xlabel="area, % of the image", ylabel="contribution, %")
    curves.set_yticks([0, *(100 * fraction for fraction in FRACTIONS[:-1]), 100])
    curves.set_box_aspect(1)
    curves.set_anchor("N")
    curves.grid()
    if len(fields) > 1:
        below_axis_label = curves.transAxes + ScaledTranslation(0, -0.4, figure.dpi_scale_trans)
        curves.legend(loc="upper left", bbox_to_anchor=(-0.05, 0), bbox_transform=below_axis_label, borderaxespad=0)
    note(figure, of)
    return figure


def _outline(axes: Axes, field: ReceptiveField) -> None:
    """Outline the squares for the fractions in ``OUTLINED``, clipped to the image."""
    height, width = field.contribution.shape
    for fraction, corner in OUTLINED.items():
        reach = field.reach(fraction)
        top, left = max(field.centre[0] - reach, 0), max(field.centre[1] - reach, 0)
        bottom, right = min(field.centre[0] + reach, height - 1), min(field.centre[1] + reach, width - 1)
        size = (right - left + 1, bottom - top + 1)
        axes.add_patch(Rectangle((left - 0.5, top - 0.5), *size, fill=False, ec="white", lw=0.7, path_effects=OUTLINE))
        at, up = (top, -2) if corner == "top" else (bottom, 2)
        style: dict[str, Any] = dict(color="white", size=6, va=corner, path_effects=OUTLINE)
        axes.annotate(f"{100 * fraction:g} %", (left, at), xytext=(2, up), textcoords="offset points", **style)
