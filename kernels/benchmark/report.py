"""What is reported: the table, JSON, and the roofline plot."""

import json
import os
import platform
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .trial import MEMORY_COPY, MODES, OWN_COPY

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = (
    ("", "<28"),
    ("ms", ">10"),
    ("quartiles", ">19"),
    ("x definition", ">14"),
    ("GB/s", ">8"),
    ("of memory copy", ">16"),
    ("of own-size copy", ">18"),
    ("peak MB", ">10"),
    ("error", ">9"),
    ("  in", "<27"),
)
TOKEN_IMAGES = ("224x224", "2048x2048")  # 56x56 and 512x512 tokens
MARKERS = "osD^vPX*<>"


def environment(device: torch.device) -> dict[str, Any]:
    """Hardware and versions."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = None
    facts = {
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": triton_version,
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {
            "gpu": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "gpu_bytes": properties.total_memory,
            "cuda": torch.version.cuda,
            "driver": _driver(),
            "cudnn": torch.backends.cudnn.version(),
            "cudnn_allow_tf32": torch.backends.cudnn.allow_tf32,
        }
    return facts


def table(result: Mapping[str, Any]) -> str:
    """The rows of one case, dtype and mode."""
    case, copies = result["case"], result["copies"]
    size, operations = result["bytes"], result["operations"]
    lines = [
        f"{case['name']}  {result['dtype']}  {result['mode']}",
        f"  batch {case['batch']}, {case['height']}x{case['width']} tokens, dim {case['dim']}, R {case['rank']}, "
        f"N {case['d_state']}; compulsory {size / 1e6:.1f} MB, {operations / 1e9:.2f} GFLOP, "
        f"{operations / size:.1f} FLOP/byte",
        "  "
        + "; ".join(
            f"{name} ({yardstick['bytes'] / 1e6:.1f} MB): {yardstick['bandwidth'] / 1e9:.1f} GB/s"
            for name, yardstick in copies.items()
        ),
        "  " + "".join(f"{title:{width}}" for title, width in COLUMNS).rstrip(),
    ]
    lines += ["  " + _line(row) for row in result["rows"]]
    return "\n".join(lines) + "\n"


def _line(row: Mapping[str, Any]) -> str:
    if "failure" in row:
        return f"{row['competitor']:<28}failed: {row['failure']}"
    speedup = row["faster_than_definition"]
    cells = (
        row["competitor"],
        f"{1e3 * row['median']:.4g}",
        f"{1e3 * row['lower']:.4g} - {1e3 * row['upper']:.4g}",
        "-" if speedup is None else f"{speedup:.2f}",
        f"{row['bandwidth'] / 1e9:.1f}",
        f"{row[f'share of {MEMORY_COPY}']:.1%}",
        f"{row[f'share of {OWN_COPY}']:.1%}",
        f"{row['peak_bytes'] / 1e6:.1f}",
        f"{row['error']:.1e}",
        f"  {row['error_in']}",
    )
    line = "".join(f"{cell:{width}}" for cell, (_, width) in zip(cells, COLUMNS, strict=True))
    return (line + row["note"]).rstrip()


def per_token(results: Iterable[Mapping[str, Any]]) -> list[str]:
    """One line per competitor: its time per token on the largest image, relative to that at 224x224."""
    times: dict[tuple[str, ...], dict[str, float]] = {}
    for result in results:
        case = result["case"]
        group, image = case["name"].rsplit("/", 1)
        tokens = case["batch"] * case["height"] * case["width"]
        for row in result["rows"]:
            if image in TOKEN_IMAGES and "median" in row:
                key = (group, result["dtype"], result["mode"], row["competitor"])
                times.setdefault(key, {})[image] = row["median"] / tokens
    small, large = TOKEN_IMAGES
    return [
        f"{'  '.join(key)}: a token at {large} takes {found[large] / found[small]:.2f} times that at {small}"
        for key, found in times.items()
        if len(found) == len(TOKEN_IMAGES)
    ]


def write(folder: Path, record: Mapping[str, Any], text: str) -> None:
    """Write ``benchmark.json`` and ``benchmark.txt``."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "benchmark.json").write_text(json.dumps(record, indent=1) + "\n")
    (folder / "benchmark.txt").write_text(text + "\n")


def roofline(path: Path, results: Sequence[Mapping[str, Any]], peak: float) -> None:
    """Draw operations per second over operations per compulsory byte, one panel per dtype and mode.

    Cases whose operations are not counted are left out.

    Args:
        path: of the PNG.
        results: of one run.
        peak: operations per second of a float32 matrix product.

    Raises:
        ImportError: without matplotlib.
    """
    from matplotlib.figure import Figure

    results = [result for result in results if result["operations"]]
    if not results:
        return
    dtypes = list(dict.fromkeys(result["dtype"] for result in results))
    names = list(dict.fromkeys(row["competitor"] for result in results for row in result["rows"]))
    figure = Figure(figsize=(13, 1 + 5 * len(dtypes)), layout="constrained")
    panels = figure.subplots(len(dtypes), len(MODES), sharex=True, sharey=True, squeeze=False)
    for i, dtype in enumerate(dtypes):
        for panel, mode in zip(panels[i], MODES, strict=True):
            chosen = [result for result in results if (result["dtype"], result["mode"]) == (dtype, mode)]
            if chosen:
                _panel(panel, chosen, names, peak)
            panel.set_title(f"{dtype}, {mode}")
    for panel in panels[-1]:
        panel.set_xlabel("FLOP per compulsory byte")
    for panel in panels[:, 0]:
        panel.set_ylabel("FLOP/s")
    # No panel need have them all.
    keys = {label: key for panel in panels.flat for key, label in zip(*panel.get_legend_handles_labels(), strict=True)}
    figure.legend(keys.values(), keys.keys(), loc="outside lower center", ncols=4, frameon=False)
    figure.savefig(path, dpi=110)


def _panel(panel: "Axes", results: Sequence[Mapping[str, Any]], names: Sequence[str], peak: float) -> None:
    intensities = [result["operations"] / result["bytes"] for result in results]
    bandwidth = max(result["copies"][MEMORY_COPY]["bandwidth"] for result in results)
    left, right = min(intensities) / 2, 2 * max(*intensities, peak / bandwidth)
    ridge = peak / bandwidth
    panel.plot(
        [left, ridge, right],
        [bandwidth * left, peak, peak],
        color="black",
        label="roof: memory copy, float32 matrix product",
    )
    for name, marker in zip(names, MARKERS, strict=False):
        points = [
            (intensity, result["operations"] / row["median"])
            for intensity, result in zip(intensities, results, strict=True)
            for row in result["rows"]
            if row["competitor"] == name and "median" in row
        ]
        if points:
            panel.scatter(*zip(*points, strict=True), marker=marker, s=28, alpha=0.8, label=name)
    labels = {result["case"]["name"].rsplit("/", 1)[0]: x for x, result in zip(intensities, results, strict=True)}
    for label, intensity in labels.items():  # images of all sizes have nearly the same intensity
        foot = panel.get_xaxis_transform()
        panel.text(intensity, 0.01, label, transform=foot, rotation=90, fontsize=6, color="gray", ha="center")
    panel.set(xscale="log", yscale="log")
    panel.margins(y=0.25)
    panel.grid(alpha=0.3)


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _driver() -> str | None:
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True, timeout=30).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return None
