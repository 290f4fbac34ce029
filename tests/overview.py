"""Draw the overview of the model for the root README, with numbers read from the models.

python tests/overview.py [OUTPUT.png]
"""

import argparse
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib.style
import torch
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyBboxPatch, Polygon

from spatial_mamba import SpatialMamba, spatial_mamba_base, spatial_mamba_small, spatial_mamba_tiny
from spatial_mamba.classification.models.spatial_mamba import FUSION_DILATIONS, Block

WIDTH, HEIGHT, DPI, IMAGE = 1600, 1250, 100, 224  # size of the canvas; coordinates are pixels, y points down
INK, MUTED, RULE, SCANNED = "#1f2933", "#55616b", "#c3cad0", "#dfe4e8"
CONV, LINEAR, NORM, STATE = "#d3e8f6", "#fbe6b8", "#e8ebed", "#f2d3e5"
KINDS = {"convolution": CONV, "linear": LINEAR, "normalisation": NORM, "state space": STATE}
TAPS = (("#0072B2", "white"), ("#E69F00", INK), ("#009E73", "white"))  # fill (Okabe and Ito) and text colours
PICTURE = Path(__file__).parents[1] / "classification/models/overview.png"
Point = tuple[float, float]


def by(*sizes: object) -> str:
    return " \u00d7 ".join(map(str, sizes))


class Box(NamedTuple):
    """A rectangle on the canvas: centre and size. ``at(-1, 0)`` is the middle of its left side."""

    x: float
    y: float
    w: float
    h: float

    def at(self, dx: float, dy: float) -> Point:
        return self.x + dx * self.w / 2, self.y + dy * self.h / 2


class Canvas:
    """A blank figure, and the shapes that are drawn on it."""

    def __init__(self) -> None:
        self.figure = Figure(figsize=(WIDTH / DPI, HEIGHT / DPI), dpi=DPI, facecolor="white")
        self.axes = self.figure.add_axes((0, 0, 1, 1), xlim=(0, WIDTH), ylim=(HEIGHT, 0))
        self.axes.set_axis_off()

    def text(self, x: float, y: float, text: str, size: float = 20, **style: Any) -> None:
        style = dict(ha="center", va="center_baseline", color=INK, zorder=5) | style
        self.axes.text(x, y, text, fontsize=size * 72 / DPI, **style)

    def rectangle(self, box: Box, fill: str, edge: str = INK, radius: float = 8, **style: Any) -> None:
        style = dict(boxstyle=f"round,pad=0,rounding_size={radius}", fc=fill, ec=edge, lw=1.3, zorder=3) | style
        self.axes.add_patch(FancyBboxPatch(box.at(-1, -1), box.w, box.h, **style))

    def box(self, box: Box, fill: str, *lines: str, bold: bool = False) -> Box:
        """A labelled box; ``bold`` is for its first line."""
        self.rectangle(box, fill)
        for i, line in enumerate(lines):
            weight = "bold" if bold and i == 0 else "normal"
            self.text(box.x, box.y + (i - (len(lines) - 1) / 2) * 29, line, weight=weight)
        return box

    def panel(self, left: float, top: float, right: float, bottom: float, title: str) -> Box:
        box = Box((left + right) / 2, (top + bottom) / 2, right - left, bottom - top)
        self.rectangle(box, "white", RULE, radius=14, lw=1.6, zorder=0)
        self.text(left + 20, top + 34, title, 24, weight="bold", ha="left")
        return box

    def line(self, *points: Point, arrow: bool = True, branch: bool = False, **style: Any) -> None:
        """A line through the points; ``arrow`` adds a head at the last, ``branch`` a dot at the first."""
        style = dict(color=INK, lw=1.7, zorder=2) | style
        if branch:
            self.axes.add_patch(Circle(points[0], 4.5, color=INK, zorder=3))
        if arrow:
            head = dict(arrowstyle="-|>,head_length=0.5,head_width=0.25", shrinkA=0, shrinkB=0, **style)
            self.axes.annotate("", points[-1], points[-2], arrowprops=head)
            points = points[:-1]
        self.axes.plot(*zip(*points, strict=True), **style)

    def operator(self, x: float, y: float, sign: str) -> Box:
        self.axes.add_patch(Circle((x, y), 14, fc="white", ec=INK, lw=1.5, zorder=3))
        for dx, dy in ((8, 0), (0, 8)) if sign == "+" else ((5.5, 5.5), (5.5, -5.5)):
            self.line((x - dx, y - dy), (x + dx, y + dy), arrow=False, zorder=4)
        return Box(x, y, 28, 28)

    def zoom(self, source: Box, panel: Box) -> None:
        """A wedge from the right side of a box to the panel that shows its contents."""
        corners = (source.at(1, -0.85), panel.at(-1, -0.96), panel.at(-1, 0.96), source.at(1, 0.85))
        self.axes.add_patch(Polygon(corners, color=STATE, alpha=0.45, lw=0, zorder=0.5))


def stage_shapes(model: SpatialMamba) -> list[torch.Size]:
    """Shapes (1, H, W, width) of the tokens in each stage of a model on the meta device."""
    shapes = [model.patch_embed(torch.empty(1, model.in_chans, IMAGE, IMAGE, device="meta")).shape]
    for stage in model.layers[:-1]:
        shapes.append(stage.downsample(torch.empty(shapes[-1], device="meta")).shape)
    return shapes


def draw_pipeline(c: Canvas, models: dict[str, SpatialMamba]) -> None:
    c.panel(20, 20, 1580, 418, f"The network, for an image of {by(IMAGE, IMAGE)}")
    for x, (kind, fill) in zip((985, 1145, 1248, 1432), KINDS.items(), strict=True):
        c.rectangle(Box(x, 54, 20, 20), fill, radius=4)
        c.text(x + 18, 54, kind, 19, ha="left", color=MUTED)

    shapes = stage_shapes(model := models["tiny"])
    columns = [(166, 76, "white", "Image", by(model.in_chans, IMAGE, IMAGE))]
    for i, (_, height, width, _) in enumerate(shapes):
        before = shapes[i - 1][1] if i else IMAGE
        columns.append((84, 76, CONV, "Down" if i else "Stem", f"↓ {before // height}"))
        columns.append((150, 136 - 11 * i, STATE, f"Stage {i + 1}", by(height, width), "tokens"))
    columns += [(92, 76, LINEAR, "Head"), (96, 76, "white", "Logits", f"{model.num_classes}")]
    gap = (1520 - sum(width for width, *_ in columns)) / (len(columns) - 1)
    boxes, left = [], 40.0
    for width, height, fill, *lines in columns:
        boxes.append(c.box(Box(left + width / 2, 160, width, height), fill, *lines, bold=True))
        left += width + gap
    for before, after in pairwise(boxes):
        c.line(before.at(1, 0), after.at(-1, 0))

    for y, (name, variant) in zip((268, 304, 340), models.items(), strict=True):
        c.rectangle(Box(800, y, 1520, 33), "#f3f5f6", "none", zorder=1)
        c.text(52, y, name, weight="bold", ha="left")
        for stage, shape, layer in zip(boxes[2:-2:2], stage_shapes(variant), variant.layers, strict=True):
            c.text(stage.x, y, f"width {shape[3]}, {len(layer.blocks)} blocks", 19)
        c.text(1550, y, f"{sum(p.numel() for p in variant.parameters()) / 1e6:.1f}M params", 19, ha="right")
    note = "Stem: {0} ↓2, residual pair of {0}, {0} ↓2, {1}.  Down: {1}, depthwise {0} ↓2, {1}."
    note = f"{note.format(by(3, 3), by(1, 1))}  Head: LayerNorm, mean, linear."
    c.text(800, 388, note, 19, color=MUTED)


def draw_block(c: Canvas, block: Block) -> Box:
    """The residual block; returns the box of its SSM."""
    c.panel(20, 438, 340, 1230, "One block")
    hidden = block.mlp.fc1.out_features // block.mlp.fc1.in_features
    conv, norm = f"depthwise {by(*block.cpe1.kernel_size)}", (NORM, "LayerNorm")
    mlp = (LINEAR, f"MLP: $d$ → {hidden}$d$ → $d$")
    groups = ([(CONV, f"cpe1: {conv}")], [norm, (STATE, "SSM")], [(CONV, f"cpe2: {conv}")], [norm, mlp])
    x, y = 196, 540.0
    c.text(x, y - 34, f"tokens, {by('$H$', '$W$', '$d$')}")
    c.line((x, y - 16), (x, y), arrow=False)
    boxes = []
    for group in groups:
        above = (x, y)
        for i, (fill, label) in enumerate(group):
            boxes.append(c.box(Box(x, y + 47 + 67 * i, 248, 46), fill, label))
            c.line(above, boxes[-1].at(0, -1))
            above = boxes[-1].at(0, 1)
        plus = c.operator(x, above[1] + 35, "+")
        c.line(above, plus.at(0, -1))
        c.line((x, y), (44, y), (44, plus.y), plus.at(-1, 0), branch=True)
        y = plus.y + 31
        c.line(plus.at(0, 1), (x, y), arrow=group is groups[-1])
    return boxes[2]


def draw_ssm(c: Canvas, block: Block) -> tuple[Box, Box]:
    """The mixer; returns its panel and the box of its state fusion."""
    panel = c.panel(364, 438, 1012, 1230, "Structure-aware SSM")
    ssm, left, main, skip, gate = block.self_attention, 454, 712, 904, 962
    inner = f"{ssm.inner_dim // ssm.in_proj.in_features}$d$"
    recurrence = r"$h_t=\exp(\Delta_t a)\,h_{t-1}+\Delta_t B_t\,u_t$"
    mixture = r"$h'={\sum}_k\,\alpha_k\;\mathrm{conv}_k(h)$"
    c.box(Box(808, 536, 380, 44), LINEAR, f"in_proj: $d$ → {inner} + {inner}")
    conv = c.box(Box(main, 620, 344, 44), CONV, f"depthwise {by(*ssm.conv2d.kernel_size)}, SiLU")
    project = c.box(Box(left, 686, 152, 80), LINEAR, "project to", r"$\Delta,\; B,\; C$")
    scan = c.box(Box(main, 784, 344, 84), STATE, "One raster scan", recurrence, bold=True)
    fusion = c.box(Box(main, 900, 344, 84), STATE, "State fusion", mixture, bold=True)
    read = c.box(Box(main, 996, 344, 48), STATE, r"$y_t=C_t\,h'_t+D\,u_t$")
    norm = c.box(Box(main, 1066, 344, 42), NORM, "out_norm: LayerNorm")
    times = c.operator(main, 1121, "x")
    out = c.box(Box(main, 1174, 344, 44), LINEAR, f"out_proj: {inner} → $d$")
    silu = c.box(Box(gate, 1066, 76, 42), "white", "SiLU")
    for above, below in pairwise((conv, scan, fusion, read, norm, times, out)):
        c.line(above.at(0, 1), below.at(0, -1))
    for above, below in (((main, 486), (main, 514)), ((main, 558), conv.at(0, -1)), ((gate, 558), silu.at(0, -1))):
        c.line(above, below)
    c.line(silu.at(0, 1), (gate, times.y), times.at(1, 0))
    c.line(out.at(0, 1), (main, 1218))
    c.line(u := (main, project.y), project.at(1, 0), branch=True)
    c.line(u, (skip, u[1]), (skip, read.y), read.at(1, 0))
    for x, box in ((left + 30, scan), (left - 30, read)):
        c.line((x, project.at(0, 1)[1]), (x, box.y), box.at(-1, 0))
    labels = {"$x$": (694, 580), "$z$": (944, 580), "$u$": (728, 712), r"$\Delta, B$": (514, 766), "$C$": (514, 978)}
    for label, (x, y) in labels.items():
        c.text(x, y, label)
    c.text(main + 16, 495, f"tokens, {by('$H$', '$W$', '$d$')}", ha="left")
    note = f"{inner} channels,\none state each"
    c.text(project.at(-1, 0)[0], 546, note, 19, ha="left", va="top", linespacing=1.3, color=MUTED)
    return panel, fusion


def draw_fusion(c: Canvas) -> Box:
    """The taps of the dilated kernels around one token, and the path of the scan."""
    panel = c.panel(1036, 438, 1580, 1230, "State fusion on the token grid")
    reach, cell, x0, y0 = max(FUSION_DILATIONS), 43, panel.x, 744
    steps = range(-reach, reach + 1)
    taps = {(d * i, d * j): k for k, d in enumerate(FUSION_DILATIONS) for i in (-1, 0, 1) for j in (-1, 0, 1)}

    def tile(x: float, y: float, fill: str, color: str = INK, label: str = "", z: float = 3) -> None:
        c.rectangle(Box(x, y, cell - 3, cell - 3), fill, RULE, radius=5, lw=1, zorder=z)
        c.text(x, y, label, color=color)

    start, end = x0 - cell * reach - 34, x0 + cell * reach + 36
    for y, dy in ((y0 + cell * dy, dy) for dy in steps):
        for dx in steps:
            tile(x0 + cell * dx, y, SCANNED if (dy, dx) < (0, 0) else "white", z=1)
        c.line((start, y), (end, y), color="#7f8a93", lw=1.5)
        if dy < reach:
            c.line((end, y), (start, y + cell), arrow=False, color="#aab3ba", lw=1, linestyle=(0, (4, 3)))
    for (dx, dy), k in taps.items():
        look = (*TAPS[k], f"{FUSION_DILATIONS[k]}") if dx or dy else (INK, "white", "$t$")
        tile(x0 + cell * dx, y0 + cell * dy, *look)
    keys = [(1084 + 172 * k, 1028, *TAPS[k], f"{d}", f"dilation {d}") for k, d in enumerate(FUSION_DILATIONS)]
    keys += [(1084, 1076, INK, "white", "$t$", "in all three"), (1256, 1076, SCANNED, INK, "", "scanned before $t$")]
    for x, y, fill, color, label, text in keys:
        tile(x, y, fill, color, label)
        c.text(x + 30, y, text, ha="left")
    note = f"{len(taps)} distinct taps in a window of {by(len(steps), len(steps))}: the\n"
    note += "fused state of token $t$ mixes 2-D neighbours,\nalso those that the scan reaches only later."
    c.text(1064, 1118, note, ha="left", va="top", linespacing=1.35)
    return panel


def draw() -> Figure:
    with torch.device("meta"):
        models = {"tiny": spatial_mamba_tiny(), "small": spatial_mamba_small(), "base": spatial_mamba_base()}
    with matplotlib.style.context("default"):
        c = Canvas()
        draw_pipeline(c, models)
        block = models["tiny"].layers[0].blocks[0]
        ssm_panel, fusion_box = draw_ssm(c, block)
        c.zoom(draw_block(c, block), ssm_panel)
        c.zoom(fusion_box, draw_fusion(c))
    return c.figure


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output", nargs="?", type=Path, default=PICTURE)
    draw().savefig(parser.parse_args().output, backend="agg", metadata={"Software": None})


if __name__ == "__main__":
    main()
