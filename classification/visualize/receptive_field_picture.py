"""Draws effective receptive fields side by side, and how their contribution grows with the area around the centre."""

import math
from collections.abc import Sequence
from textwrap import fill

from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.patheffects import withStroke
from matplotlib.transforms import ScaledTranslation

from .receptive_field import SHARES, ReceptiveField
from .style import COLOURS, in_paper_style, note, page, title, without_ticks

FAINTEST = 1e-4  # of the largest contribution: the least that the dark end of the colour scale stands for
OUTLINED = {0.5: "top", 0.9: "bottom"}  # shares, and the left corner of the square where each is written
COLUMNS = 3
MAP_WIDTH, CURVES_WIDTH = 1.7, 2.1  # inches
LABEL_WIDTH = 20  # characters in a line of a label
OUTLINE = [withStroke(linewidth=1.6, foreground="#00000080")]  # dark about white: seen on all colours


@in_paper_style
def draw_receptive_fields(fields: Sequence[tuple[str, ReceptiveField]], of: str) -> Figure:
    """A panel per model, with the squares that hold half and 90 % of the contribution, and one for all their growths.

    Args:
        fields: labels of models and what they were measured to have.
        of: the note below the panels: which features, which images.
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
        curves.plot([100 * field.area(s) for s in SHARES], [100 * s for s in SHARES], "o", color=COLOURS[i], ms=2.5)
    bar = left.colorbar(
        shown, ax=maps, label="contribution / largest", location="bottom", aspect=40, pad=0.03, extend="min"
    )
    bar.outline.set_visible(False)
    bar.minorticks_off()
    title(curves, len(fields), "contribution by area")
    curves.set(xlim=(0, 100), ylim=(0, 101), xlabel="share of the image, %", ylabel="share of the contribution, %")
    curves.set_yticks([0, *(100 * share for share in SHARES[:-1]), 100])
    curves.set_box_aspect(1)
    curves.set_anchor("N")
    curves.grid()
    if len(fields) > 1:
        below_axis_label = curves.transAxes + ScaledTranslation(0, -0.4, figure.dpi_scale_trans)
        curves.legend(loc="upper left", bbox_to_anchor=(-0.05, 0), bbox_transform=below_axis_label, borderaxespad=0)
    note(figure, of)
    return figure


def _outline(axes: Axes, field: ReceptiveField) -> None:
    """The squares that hold the shares of ``OUTLINED``, as far as they lie in the image."""
    height, width = field.contribution.shape
    for share, corner in OUTLINED.items():
        reach = field.reach(share)
        top, left = max(field.centre[0] - reach, 0), max(field.centre[1] - reach, 0)
        bottom, right = min(field.centre[0] + reach, height - 1), min(field.centre[1] + reach, width - 1)
        square = dict(width=right - left + 1, height=bottom - top + 1, fill=False, ec="white", lw=0.7)
        axes.add_patch(Rectangle((left - 0.5, top - 0.5), **square, path_effects=OUTLINE))
        at, up = (top, -2) if corner == "top" else (bottom, 2)
        style = dict(color="white", size=6, va=corner, path_effects=OUTLINE)
        axes.annotate(f"{100 * share:g} %", (left, at), xytext=(2, up), textcoords="offset points", **style)
