"""How the pictures look, and how they are saved: sizes and type for a page of a paper, colours for all eyes."""

from pathlib import Path
from string import ascii_lowercase
from textwrap import fill
from typing import TYPE_CHECKING

from ...kernels.errors import UserError

try:
    import matplotlib.style
    from matplotlib.figure import Figure
except ImportError as missing:
    raise UserError("matplotlib, which draws the pictures, is missing: pip install matplotlib") from missing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colorbar import Colorbar

PAGE_WIDTH = 7.2  # inches, of a paper's two columns
DPI = 300
COLOUR_MAP = "viridis"  # perceptually uniform, and readable without red and green
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito's
INK = "#333333"
NOTE_SIZE = 6.5  # points, of the line below a picture
QUERY_COLOUR = "#D55E00"  # seen on photographs and on the colour map

_STYLE = {
    "font.size": 7.5,
    "axes.titlesize": 8,
    "axes.labelsize": 7.5,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "legend.frameon": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.linewidth": 0.6,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
    "lines.linewidth": 1.2,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "grid.linewidth": 0.4,
    "grid.alpha": 0.4,
    "image.interpolation": "nearest",
    "image.cmap": COLOUR_MAP,
    "pdf.fonttype": 42,  # text stays text
    "savefig.facecolor": "white",
}

# Decorates whatever draws or saves; the user's settings of matplotlib are back afterwards.
in_paper_style = matplotlib.style.context(["default", _STYLE])


def page(height: float, width: float = PAGE_WIDTH) -> Figure:
    """An empty figure, in inches."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.06, h_pad=0.06)
    return figure


def note(figure: Figure, text: str) -> None:
    """A line or more of small print at the foot of a figure, broken to its width."""
    characters = int(figure.get_figwidth() * 72 / NOTE_SIZE / 0.56)  # of 0.56 em on average
    figure.supxlabel(fill(text, characters), fontsize=NOTE_SIZE, x=0.01, ha="left")


@in_paper_style
def save(figure: Figure, path: Path) -> None:
    """Write a figure in the format that the ending of the path names.

    Raises:
        UserError: if the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DPI)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error


def title(axes: "Axes", index: int, text: str) -> None:
    """Title of a panel, with its letter."""
    axes.set_title(rf"$\bf{{{ascii_lowercase[index]}}}$  {text}")


def number(value: float) -> str:
    """Two digits, in mathematical type, with a power of ten where it is needed."""
    digits, _, power = f"{value:.2g}".partition("e")
    return f"${digits}$" if not power else rf"${digits} \times 10^{{{int(power)}}}$"


def without_ticks(axes: "Axes") -> None:
    """A picture rather than a plot: neither ticks nor a frame."""
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_visible(False)


def colour_bar(
    figure: Figure, mappable: "ScalarMappable", axes: "list[Axes]", label: str, extend: str = "neither"
) -> "Colorbar":
    """A slim colour bar beside panels, with what it measures; pointed at the ends that values may lie beyond."""
    bar = figure.colorbar(mappable, ax=axes, label=label, shrink=0.9, aspect=28, pad=0.015, extend=extend)
    bar.outline.set_visible(False)
    return bar
