"""Draws the states of a scan before and after fusion, channel by channel."""

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import Figure
from torch import Tensor

from .layers import fusion_change, standardised
from .style import colour_bar, in_paper_style, number, page, title, without_ticks

LIMIT = 2.5  # standard deviations at the ends of the colour scale
MAP_WIDTH = 1.4  # inches
PHOTO = 1.35  # width of the image, in widths of a map


@in_paper_style
def draw_states(image: np.ndarray, before: Tensor, after: Tensor, channels: Sequence[int], name: str) -> Figure:
    """Image, states before fusion (upper row) and after fusion (lower row), in one colour scale.

    Fusion scales the states, up to 27-fold at initialisation, so the picture compares patterns: each map is
    standardised. Its mean and standard deviation are printed below it, with the result of `layers.fusion_change`.

    Args:
        image: (height, width, 3), from 0 to 1.
        before: (D, H, W), the states h of all channels.
        after: (D, H, W), the fused states h'.
        channels: the channels to draw.
        name: the name of the layer.
    """
    change = fusion_change(before, after)
    count = len(channels)
    ratio = before.shape[1] / before.shape[2]
    figure = page(height=1.1 + 2 * ratio * MAP_WIDTH, width=0.95 + MAP_WIDTH * (count + PHOTO))
    grid = figure.add_gridspec(2, count + 1, width_ratios=[PHOTO] + [1] * count)
    photo = figure.add_subplot(grid[:, 0])
    photo.imshow(image, interpolation="lanczos")
    title(photo, 0, "image")
    without_ticks(photo)

    panels = []
    for row, (maps, label) in enumerate(((before, "$h$, before fusion"), (after, "$h'$, after fusion"))):
        patterns = standardised(maps)
        for column, channel in enumerate(channels):
            panel = figure.add_subplot(grid[row, column + 1])
            shown = panel.imshow(patterns[channel].numpy(), vmin=-LIMIT, vmax=LIMIT)
            without_ticks(panel)
            mean, spread = maps[channel].mean().item(), maps[channel].std(correction=0).item()
            numbers = f"mean {number(mean)}\ns.d. {number(spread)}"
            if row == 0:
                title(panel, column + 1, f"channel {channel}")
            else:
                numbers += f"\nchange {change[channel]:.2g}"
            panel.set_xlabel(numbers)
            if column == 0:
                panel.set_ylabel(label)
            panels.append(panel)
    bar = colour_bar(figure, shown, panels, "state, standard deviations from its mean", extend="both")
    bar.ax.set_yticks([-2, -1, 0, 1, 2])
    photo.set_xlabel(f"{name}: {before.shape[1]} \u00d7 {before.shape[2]} tokens,\n{len(before)} channels")
    return figure
