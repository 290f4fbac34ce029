"""The style of all pictures, and saving them: sizes and fonts for a paper, colours for colour-blind readers."""

from pathlib import Path
from string import ascii_lowercase
from textwrap import fill
from typing import TYPE_CHECKING, Any

from ...kernels.errors import UserError

try:
    import matplotlib.style
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine
except ImportError as missing:
    raise UserError("matplotlib, which draws the pictures, is missing: pip install matplotlib") from missing

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.cm import ScalarMappable
    from matplotlib.colorbar import Colorbar

PAGE_WIDTH = 7.2  # inches, of a paper's two columns
DPI = 300
COLOUR_MAP = "viridis"  # perceptually uniform, safe for colour-blind readers
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # of Okabe and Ito
INK = "#333333"
NOTE_SIZE = 6.5  # points, for the text below a picture
QUERY_COLOUR = "#D55E00"  # visible on photographs and on the colour map

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

# Decorator of everything that draws or saves; it restores the user's settings of matplotlib.
in_paper_style = matplotlib.style.context(["default", _STYLE])


def page(height: float, width: float = PAGE_WIDTH) -> Figure:
    """An empty figure of this size in inches."""
    return Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06))


def note(figure: Figure, text: str) -> None:
    """Small print below a figure, wrapped to its width."""
    characters = int(figure.get_figwidth() * 72 / NOTE_SIZE / 0.56)  # 0.56 em wide on average
    figure.supxlabel(fill(text, characters), fontsize=NOTE_SIZE, x=0.01, ha="left")


@in_paper_style
def save(figure: Figure, path: Path) -> None:
    """Write a figure in the format given by the ending of the path.

    Raises:
        UserError: if the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=DPI)
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error


def title(axes: "Axes", index: int, text: str) -> None:
    """Set the title of a panel, with its letter."""
    axes.set_title(rf"$\bf{{{ascii_lowercase[index]}}}$  {text}")


def number(value: float) -> str:
    """Format a value as mathematical text with two digits, and a power of ten if needed."""
    digits, _, power = f"{value:.2g}".partition("e")
    return f"${digits}$" if not power else rf"${digits} \times 10^{{{int(power)}}}$"


def without_ticks(axes: "Axes") -> None:
    """Remove ticks and frame, for a picture rather than a plot."""
    axes.set_xticks([])
    axes.set_yticks([])
    for spine in axes.spines.values():
        spine.set_visible(False)


def colour_bar(
    figure: Figure, mappable: "ScalarMappable", axes: "list[Axes]", label: str, extend: str = "neither"
) -> "Colorbar":
    """A slim, labelled colour bar next to panels; pointed ends, set by ``extend``, mean values beyond the scale."""
    bar: Any = figure.colorbar(mappable, ax=axes, label=label, shrink=0.9, aspect=28, pad=0.015, extend=extend)
    bar.outline.set_visible(False)
    return bar
