"""Grids, views and position embeddings of images larger than the encoder reads."""

import io

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from unimm_jax.data import slices, transforms
from unimm_jax.models.unified import merge_patches
from unimm_jax.models.vit import can_resize, resize_positions

# (width, height) → (columns, rows) by select_best_resolution of LLaVA-NeXT and ILLUME+ with slices of 448 pixels and
# all grids of at most 9 cells, and with LLaVA-NeXT's five grids of 336 pixels; computed with ILLUME+'s code
# (mm_utils.py at 51de69d, grids in ascending order)
GOLDEN = [
    ((640, 480), (2, 2), (2, 2)),
    ((480, 640), (2, 2), (2, 2)),
    ((1920, 1080), (4, 2), (2, 2)),
    ((1080, 1920), (2, 4), (2, 2)),
    ((1000, 1000), (3, 3), (2, 2)),
    ((1344, 1344), (3, 3), (2, 2)),
    ((3000, 500), (6, 1), (3, 1)),
    ((500, 3000), (1, 6), (1, 3)),
    ((900, 450), (3, 2), (2, 1)),
    ((512, 512), (2, 2), (2, 2)),
    ((4032, 3024), (3, 3), (2, 2)),
    ((672, 1344), (2, 3), (1, 2)),
]


@pytest.mark.parametrize(("size", "illume", "llava_next"), GOLDEN)
def test_grids_are_those_of_the_published_code(size, illume, llava_next):
    assert slices.choose_grid(*size, 448, 9, "illume") == illume
    assert slices.choose_grid(*size, 336, 9, "llava_next") == llava_next


def test_an_image_that_is_not_larger_than_a_view_has_no_slices():
    assert slices.choose_grid(448, 300, 448, 9) is None and slices.choose_grid(449, 300, 448, 9) == (2, 1)
    assert slices.choose_grid(1000, 1000, 448, 0) is None and slices.choose_grid(1000, 1000, 448, 1) is None
    assert slices.count_slices([(64, 64), (192, 192), (192, 64)], 64, 9, "illume") == [0, 9, 3]
    assert all(1 < x * y <= 9 for x, y in slices.grids(9, "illume")) and len(slices.grids(9, "illume")) == 22


def test_slices_are_the_pixels_of_the_image():
    pixels = np.random.default_rng(0).integers(0, 256, (192, 128, 3), np.uint8)
    whole, *parts = slices.views(Image.fromarray(pixels), 64, slices.choose_grid(128, 192, 64, 9))
    assert len(parts) == 6 and whole.shape == (64, 64, 3)
    for i, part in enumerate(parts):
        top, left = i // 2 * 64, i % 2 * 64
        assert (part == pixels[top : top + 64, left : left + 64]).all()
    assert (whole == transforms.resize(Image.fromarray(pixels), 64)).all()


def test_the_aspect_ratio_is_kept_and_the_rest_is_black():
    pixels = np.full((100, 200, 3), 255, np.uint8)
    _, *parts = slices.views(Image.fromarray(pixels), 64, (3, 2))
    canvas = np.concatenate([np.concatenate(parts[:3], 1), np.concatenate(parts[3:], 1)])
    assert canvas.shape == (128, 192, 3) and (canvas[16:112] == 255).all()
    assert not canvas[:16].any() and not canvas[112:].any()


def test_sizes_are_read_without_decoding(monkeypatch):
    image = Image.new("RGB", (40, 30))
    exif = image.getexif()
    exif[transforms.ORIENTATION] = 6
    for form in ("JPEG", "PNG"):
        buffer = io.BytesIO()
        image.save(buffer, form, exif=exif)
        assert transforms.size_of(buffer.getvalue()) == (30, 40) == transforms.decode_image(buffer.getvalue()).size
    assert transforms.size_of(np.zeros((5, 7, 3), np.uint8)) == (7, 5)
    plain = transforms.encode_png(np.zeros((5, 7, 3), np.uint8))
    monkeypatch.setattr(PngImagePlugin.PngImageFile, "load", None)  # would fail if it were called
    assert transforms.size_of(plain) == (7, 5)


def test_merged_patches_are_squares_in_raster_order():
    x = jnp.arange(16.0).reshape(1, 16, 1)
    found = merge_patches(x, 2)
    assert found.shape == (1, 4, 4)
    assert found[0].astype(int).tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


def test_positions_are_interpolated_to_another_image_size():
    grid = np.stack(np.meshgrid(np.arange(4.0), np.arange(4.0)), -1).reshape(16, 2)
    table = jnp.asarray(np.concatenate([[[100.0, 100.0]], grid]))
    found = np.asarray(resize_positions(table, 65))
    assert found.shape == (65, 2) and (found[0] == 100).all()
    inner = found[1:].reshape(8, 8, 2)[2:-2, 2:-2]  # cubic interpolation keeps a linear table linear inside
    assert np.allclose(np.diff(inner[..., 0], axis=1), 0.5, atol=0.05)
    assert np.allclose(np.diff(inner[..., 1], axis=0), 0.5, atol=0.05)
    assert np.allclose(resize_positions(table, 17), table)
    assert can_resize("encoder/positions", (17, 2), (65, 2)) and can_resize("encoder/positions", (16, 2), (64, 2))
    assert not can_resize("encoder/positions", (17, 2), (64, 2)) and not can_resize("encoder/x", (17, 2), (65, 2))
    assert not can_resize("encoder/positions", (17, 2), (65, 3))
