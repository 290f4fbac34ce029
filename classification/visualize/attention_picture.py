"""Draws where a token of a layer takes its output from, and the outputs of all, in the three formulations."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .formulations import FORMULATIONS, activation, magnitude, matrix_row
from .layers import ScanLayer
from .style import QUERY_COLOUR, colour_bar, in_paper_style, note, page, title, without_ticks

GAMMA = 0.5  # small weights stay visible beside the largest
NOTE = (
    "All from the parameters of this one layer: linear attention is its $B$ and $C$ without decay and step, "
    "Mamba its scan without fusion; neither is a model trained that way. "
    "Each map is over its own maximum, mean over channels, without the skip connection."
)


@in_paper_style
def draw_attention(image: np.ndarray, layer: ScanLayer, row: int, column: int, name: str) -> Figure:
    """Rows of M for one query token (upper row), and the magnitudes of y = M u (lower row), on the map of tokens.

    Args:
        image: (height, width, 3), from 0 to 1.
        layer: what `read_layer` read for the image.
        row: of the query on the map of tokens.
        column: likewise.
        name: of the layer.
    """
    size = (layer.height, layer.width)
    figure = page(height=0.95 + 2 * 1.6 * layer.height / layer.width)
    grid = figure.add_gridspec(2, len(FORMULATIONS) + 1, width_ratios=[1.35] + [1] * len(FORMULATIONS))
    photo = figure.add_subplot(grid[:, 0])
    photo.imshow(image, interpolation="lanczos", extent=(-0.5, layer.width - 0.5, layer.height - 0.5, -0.5))
    title(photo, 0, "image and query")
    without_ticks(photo)
    photo.set_xlabel(f"{name}: {layer.height} \u00d7 {layer.width} tokens,\nquery at row {row}, column {column}")
    _mark(photo, row, column)

    upper, lower = [], []
    for i, formulation in enumerate(FORMULATIONS):
        weights = magnitude(matrix_row(layer, formulation, row, column)).unflatten(0, size).numpy()
        panel = figure.add_subplot(grid[0, i + 1])
        rows = panel.imshow(_relative(weights) ** GAMMA, vmin=0, vmax=1, cmap="magma")
        title(panel, i + 1, formulation)
        without_ticks(panel)
        _mark(panel, row, column)
        upper.append(panel)

        panel = figure.add_subplot(grid[1, i + 1])
        outputs = panel.imshow(_relative(magnitude(activation(layer, formulation)).numpy()), vmin=0, vmax=1)
        title(panel, len(FORMULATIONS) + i + 1, formulation)
        without_ticks(panel)
        lower.append(panel)
    upper[0].set_ylabel("query's row of $|M|$")
    lower[0].set_ylabel("activation, $|Mu|$")
    bar = colour_bar(figure, rows, upper, "weight / largest")
    ticks = (0, 0.05, 0.2, 0.5, 1)
    bar.set_ticks([tick**GAMMA for tick in ticks], labels=[f"{tick:g}" for tick in ticks])
    colour_bar(figure, outputs, lower, "output / largest")
    note(figure, NOTE)
    return figure


def _relative(values: np.ndarray) -> np.ndarray:
    largest = values.max()
    return values / largest if largest > 0 else values


def _mark(axes: Axes, row: int, column: int) -> None:
    style = dict(marker="s", markersize=5, markerfacecolor="none", markeredgewidth=1.2, markeredgecolor=QUERY_COLOUR)
    axes.plot(column, row, **style)
