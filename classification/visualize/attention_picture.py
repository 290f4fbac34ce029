"""Draws which tokens contribute to the output of one token, and all outputs of a layer, in three formulations."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .formulations import FORMULATIONS, activation, magnitude, matrix_row
from .layers import ScanLayer
from .style import QUERY_COLOUR, colour_bar, in_paper_style, note, page, title, without_ticks

GAMMA = 0.5  # keeps small weights visible next to the largest
NOTE = (
    "All maps use the parameters of this layer: linear attention is its $B$ and $C$ without decay and delta, "
    "Mamba its scan without fusion; no model was trained that way. "
    "Each map is a mean over channels, relative to its own maximum, without the skip connection."
)


@in_paper_style
def draw_attention(image: np.ndarray, layer: ScanLayer, row: int, column: int, name: str) -> Figure:
    """Rows of M for one query token (upper row), and the magnitudes of y = M u (lower row), on the map of tokens.

    Args:
        image: (height, width, 3), from 0 to 1.
        layer: the result of `read_layer` for the image.
        row: row of the query on the map of tokens.
        column: its column.
        name: the name of the layer.
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
    axes.plot(
        column, row, marker="s", markersize=5, markerfacecolor="none", markeredgewidth=1.2, markeredgecolor=QUERY_COLOUR
    )
