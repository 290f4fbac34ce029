"""Draws scenes for detection and segmentation: real handwritten digits pasted on crops of real photographs.

Digits and photographs come with scikit-learn, so a demo needs no download.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image

from ...kernels.errors import UserError

SPLITS = ("train", "val")
VAL_FRACTION = 0.2  # of the digits
TRAIN_COLUMNS = 0.6  # fraction of each photograph, from its left edge, for training; the rest is for validation

SIDES = (36, 60)  # smallest and largest width of a pasted 8x8 digit, in pixels
MOST_DIGITS = 7
EMPTY_EVERY = 16  # every 16th scene has no digit
INK = 0.45  # fraction of full ink from which a pixel belongs to the digit
LEAST_VISIBLE = 0.8  # fraction of a digit's pixels that later digits must leave visible
PLACES_TRIED = 12
COLOURS_TRIED = 6


@dataclass(frozen=True)
class Scene:
    """An image and the digits in it.

    Attributes:
        image: (H, W, 3) RGB, uint8.
        classes: (n,) values 0..9 of the digits, in the order of pasting.
        masks: (n, H, W) bool, the visible pixels of each digit. Masks do not overlap, and none is empty.
    """

    image: np.ndarray
    classes: np.ndarray
    masks: np.ndarray


@dataclass(frozen=True)
class Sources:
    """The material of one split: photographs (H, W, 3) uint8; digits (n, 8, 8) in 0..1; values (n,)."""

    photographs: list[np.ndarray]
    digits: np.ndarray
    values: np.ndarray


def load_sources(split: str) -> Sources:
    """The part of scikit-learn's two photographs and 1,797 digits that belongs to ``split``.

    Training and validation have no digit in common (80/20, stratified by value) and no pixel of a photograph (left
    and right part).

    Raises:
        UserError: if scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits, load_sample_images
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise UserError("scikit-learn, which holds the pictures, is missing: pip install scikit-learn") from error

    number = SPLITS.index(split)
    digits = load_digits()
    indices = train_test_split(
        np.arange(len(digits.target)), test_size=VAL_FRACTION, stratify=digits.target, random_state=0
    )[number]
    photographs = []
    for photograph in load_sample_images().images:
        border = round(TRAIN_COLUMNS * photograph.shape[1])
        photographs.append((photograph[:, :border], photograph[:, border:])[number])
    return Sources(photographs, digits.images[indices] / 16, digits.target[indices])


def scenes(split: str, count: int, size: int = 160, seed: int = 0) -> Iterator[Scene]:
    """``count`` square scenes of ``size`` pixels, determined by split, size and seed but not by the count."""
    sources = load_sources(split)
    for index in range(count):
        rng = np.random.default_rng((seed, SPLITS.index(split), index))
        empty = index % EMPTY_EVERY == EMPTY_EVERY - 1
        yield compose(sources, rng, size, 0 if empty else int(rng.integers(1, MOST_DIGITS + 1)))


def compose(sources: Sources, rng: np.random.Generator, size: int, digits: int) -> Scene:
    """Paste ``digits`` digits on a crop of a photograph, except those that would hide too much of earlier ones."""
    image = _crop(sources, rng, size)
    classes: list[int] = []
    masks: list[np.ndarray] = []
    least_areas: list[float] = []  # number of pixels of each mask that must stay visible
    for _ in range(digits):
        index = rng.integers(len(sources.values))
        opacity = _upscale(sources.digits[index], int(rng.integers(SIDES[0], SIDES[1] + 1)))
        ink = opacity >= 0.5
        place = _place(ink, masks, least_areas, rng, size)
        if place is None:
            continue
        for earlier in masks:
            earlier[place] &= ~ink
        image[place] += opacity[..., None] * (_colour(image[place], rng) - image[place])
        classes.append(int(sources.values[index]))
        masks.append(np.zeros((size, size), bool))
        masks[-1][place] = ink
        least_areas.append(LEAST_VISIBLE * ink.sum())
    stacked = np.stack(masks) if masks else np.zeros((0, size, size), bool)
    return Scene(np.round(image).astype(np.uint8), np.array(classes, int), stacked)


def _crop(sources: Sources, rng: np.random.Generator, size: int) -> np.ndarray:
    """A random crop (size, size, 3) of a photograph in float64, mirrored half of the time."""
    photograph = sources.photographs[rng.integers(len(sources.photographs))]
    height, width = photograph.shape[:2]
    if size > min(height, width):
        raise ValueError(f"scenes of {size} pixels do not fit on the photographs; choose at most {min(height, width)}")
    top, left = rng.integers(height - size + 1), rng.integers(width - size + 1)
    crop = photograph[top : top + size, left : left + size]
    return (crop[:, ::-1] if rng.random() < 0.5 else crop).astype(float)


def _upscale(digit: np.ndarray, side: int) -> np.ndarray:
    """An (8, 8) digit as smooth opacities (h, w) in 0..1, with edges about a pixel wide, cropped to its ink."""
    # With a blank margin, strokes at the border of the 8x8 grid end smoothly.
    paper = Image.fromarray(np.pad(digit, 1).astype(np.float32))
    scale = side / 8
    ink = np.asarray(paper.resize((round(10 * scale),) * 2, Image.Resampling.BICUBIC), dtype=float)
    opacity = np.clip((ink - INK) * scale + 0.5, 0, 1)
    rows, columns = np.flatnonzero(opacity.any(1)), np.flatnonzero(opacity.any(0))
    return opacity[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _place(
    ink: np.ndarray, masks: list[np.ndarray], least_areas: list[float], rng: np.random.Generator, size: int
) -> tuple[slice, slice] | None:
    """Rows and columns of the scene for a digit, or None if every place tried hides too much of another digit."""
    height, width = ink.shape
    for _ in range(PLACES_TRIED):
        top, left = rng.integers(size - height + 1), rng.integers(size - width + 1)
        place = np.s_[top : top + height, left : left + width]
        hidden = [np.count_nonzero(mask[place] & ink) for mask in masks]
        if all(mask.sum() - loss >= least for mask, loss, least in zip(masks, hidden, least_areas, strict=True)):
            return place
    return None


def _colour(background: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Of several random RGB colours, the one that stands out most from the (h, w, 3) pixels around it."""
    colours = rng.uniform(0, 255, (COLOURS_TRIED, 3))
    distances = np.linalg.norm(colours[:, None] - background.reshape(1, -1, 3), axis=-1)
    # Visibility is the distance from the colour within which the most similar tenth of the pixels lies.
    return colours[np.quantile(distances, 0.1, axis=1).argmax()]
