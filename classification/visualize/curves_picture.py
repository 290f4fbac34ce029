"""Draws the training curves of several runs in one figure."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from .run_records import RunRecord
from .style import COLOURS, INK, in_paper_style, page, title

# For each panel: title, label of the y axis, and for each field its name in the legend and its line style.
PANELS: Sequence[tuple[str, str, dict[str, tuple[str, str]]]] = (
    (
        "loss",
        "loss",
        {"train_loss": ("training", "-"), "val_loss": ("validation", "--"), "ema_loss": ("validation, EMA", ":")},
    ),
    ("validation accuracy", "top-1, %", {"val_acc1": ("model", "-"), "ema_acc1": ("EMA", ":")}),
    ("learning rate", "learning rate", {"learning_rate": ("", "-")}),
    ("gradient norm before clipping", "mean norm", {"gradient_norm": ("", "-")}),
)
SKIPPED = "skipped_updates"


@in_paper_style
def draw_curves(runs: Sequence[RunRecord]) -> Figure:
    """Loss, accuracy, learning rate and gradient norm by epoch, with a colour per run and a line style per quantity.

    Epochs with skipped updates are marked on the gradient norm, with their number.

    Args:
        runs: at most as many as there are colours.
    """
    figure = page(height=4.4)
    for i, (panel, (name, unit, fields)) in enumerate(zip(figure.subplots(2, 2).flat, PANELS, strict=True)):
        drawn = {field: line for field, line in fields.items() if any(run.has(field) for run in runs)}
        for colour, run in zip(COLOURS, runs, strict=False):
            for field, (_, line) in drawn.items():
                if run.has(field):
                    marker = "." if len(run.epochs) == 1 else None
                    panel.plot(run.epochs, run.values[field], line, color=colour, marker=marker)
            if "gradient_norm" in drawn and run.has("gradient_norm"):
                _mark_skipped(panel, run, colour)
        title(panel, i, name)
        panel.set(xlabel="epoch", ylabel=unit)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.yaxis.set_major_formatter("{x:g}")
        panel.grid()
        if len(drawn) > 1:
            lines = [Line2D([], [], color=INK, linestyle=line, label=label) for label, line in drawn.values()]
            panel.legend(handles=lines)
        if not drawn:
            panel.text(0.5, 0.5, "not recorded", transform=panel.transAxes, ha="center")
    if any(run.has(SKIPPED) and np.nansum(run.values[SKIPPED]) > 0 for run in runs):
        panel.legend(handles=[Line2D([], [], color=INK, marker="x", linestyle="", label="skipped updates")])
    handles = [Line2D([], [], color=colour, label=run.label) for colour, run in zip(COLOURS, runs, strict=False)]
    figure.legend(handles=handles, loc="outside upper left", ncols=4)
    return figure


def _mark_skipped(panel: Axes, run: RunRecord, colour: str) -> None:
    if not run.has(SKIPPED):
        return
    skipped = np.nan_to_num(run.values[SKIPPED])
    norms = np.nan_to_num(run.values["gradient_norm"])  # NaN if all updates of an epoch were skipped
    for epoch, norm, count in zip(run.epochs, norms, skipped, strict=True):
        if count:
            panel.plot(epoch, norm, "x", color=colour)
            panel.annotate(f"{count:g}", (epoch, norm), xytext=(3, 3), textcoords="offset points", color=colour)
