"""Slices of large images: which grid an image is cut by, and the views that the model reads.

An image larger than what the encoder reads is seen as a whole, resized to a square, and in slices of its own
resolution. The rule that chooses the grid is LLaVA-NeXT's; the grids are all that have at most so many cells (ILLUME+),
or LLaVA-NeXT's five. An image that is not larger than a view has no slices.
"""

import functools
import math
from collections.abc import Sequence

import numpy as np
from PIL import Image

from unimm_jax.data.transforms import resize

RULES = ("illume", "llava_next")
LLAVA_NEXT_GRIDS = ((1, 2), (2, 1), (2, 2), (1, 3), (3, 1))  # (columns, rows)

Grid = tuple[int, int]  # columns, rows


@functools.cache
def grids(max_slices: int, rule: str) -> tuple[Grid, ...]:
    """The grids with at most `max_slices` cells, at least 2, as (columns, rows) in ascending order.

    Args:
      rule: "illume" for all of them, "llava_next" for those of `LLAVA_NEXT_GRIDS`.
    """
    if rule == "llava_next":
        return tuple(sorted(grid for grid in LLAVA_NEXT_GRIDS if math.prod(grid) <= max_slices))
    sides = range(1, max_slices + 1)
    return tuple((x, y) for x in sides for y in sides if 1 < x * y <= max_slices)


@functools.lru_cache(maxsize=100_000)
def choose_grid(width: int, height: int, side: int, max_slices: int, rule: str = "illume") -> Grid | None:
    """The grid of an image, or None for an image without slices.

    The chosen grid keeps the most pixels of the image when the image is resized into it; of several, the one with the
    fewest pixels beside the image.

    Args:
      width, height: of the image, in pixels. side: of a slice, in pixels.
      max_slices: maximum number of slices; below 2 there are none. rule: a name of `RULES`.
    """
    if max(width, height) <= side:
        return None
    best, best_rank = None, (0, 0)
    for columns, rows in grids(max_slices, rule):
        across, down = columns * side, rows * side
        scale = min(across / width, down / height)
        used = min(int(width * scale) * int(height * scale), width * height)
        rank = (used, used - across * down)
        if best is None or rank > best_rank:
            best, best_rank = (columns, rows), rank
    return best


def count_slices(sizes: Sequence[tuple[int, int]], side: int, max_slices: int, rule: str) -> list[int]:
    """Number of slices of images with the given (width, height); arguments as in `choose_grid`."""
    found = [choose_grid(width, height, side, max_slices, rule) for width, height in sizes]
    return [math.prod(grid) if grid else 0 for grid in found]


def views(image: Image.Image, side: int, grid: Grid | None, fit: str = "stretch") -> list[np.ndarray]:
    """The whole image, resized to a square, then its slices in raster order; each uint8 [side, side, 3].

    For the slices, the image is resized to fit the grid with its aspect ratio and centered on black.

    Args:
      fit: see `transforms.resize`; an image with slices is stretched, so that the whole image shows what they show.
    """
    if grid is None:
        return [resize(image, side, fit)]
    whole = resize(image, side)
    columns, rows = grid
    across, down = columns * side, rows * side
    scale = min(across / image.width, down / image.height)
    size = min(math.ceil(image.width * scale), across), min(math.ceil(image.height * scale), down)
    canvas = Image.new("RGB", (across, down))
    fitted = image if image.size == size else image.resize(size, Image.Resampling.BICUBIC)
    canvas.paste(fitted, ((across - size[0]) // 2, (down - size[1]) // 2))
    pixels = np.asarray(canvas, np.uint8).reshape(rows, side, columns, side, 3).swapaxes(1, 2)
    return [whole, *pixels.reshape(rows * columns, side, side, 3)]
