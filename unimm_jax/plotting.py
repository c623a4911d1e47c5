"""Sheets of images for people to look at. Small images are enlarged by a whole factor, to about `SIDE` pixels."""

import numpy as np

SIDE = 128


def enlarged(image: np.ndarray) -> np.ndarray:
    """An image uint8 [H, W, 3], enlarged if it is small."""
    scale = max(SIDE // image.shape[0], 1)
    return image.repeat(scale, 0).repeat(scale, 1)


def grid(images: list[np.ndarray], columns: int, gap: int = 2) -> np.ndarray:
    """Lays uint8 images in rows on white, each at the (enlarged) size of the first: uint8 [H, W, 3]."""
    h, w = enlarged(images[0]).shape[:2]
    rows = -(-len(images) // columns)
    sheet = np.full((rows * (h + gap) + gap, columns * (w + gap) + gap, 3), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = gap + i // columns * (h + gap), gap + i % columns * (w + gap)
        sheet[top : top + h, left : left + w] = _resized(image, h, w)
    return sheet


def _resized(image: np.ndarray, height: int, width: int) -> np.ndarray:
    from PIL import Image

    method = Image.Resampling.NEAREST if image.shape[0] <= height else Image.Resampling.BOX
    return np.asarray(Image.fromarray(image).resize((width, height), method))


def kept_patches(image: np.ndarray, keep: np.ndarray) -> np.ndarray:
    """The image with dropped patches faded to white and a dark frame around each kept one.

    Args:
      image: uint8 [S, S, 3]; keep: boolean [P].
    """
    side = round(len(keep) ** 0.5)
    size = image.shape[0] // side
    big = keep.reshape(side, side).repeat(size, 0).repeat(size, 1)
    shown = np.where(big[..., None], image, 255 - (255 - image.astype(int)) // 5).astype(np.uint8)
    for p in np.flatnonzero(keep):
        y, x = p // side * size, p % side * size
        shown[[y, y + size - 1], x : x + size] = (30, 30, 30)
        shown[y : y + size, [x, x + size - 1]] = (30, 30, 30)
    return shown


def labelled(images: list[np.ndarray], labels: list[str], columns: int) -> np.ndarray:
    """Images in rows like `grid`, each with its label (two lines at most) below: uint8 [H, W, 3]."""
    from PIL import Image, ImageDraw, ImageFont

    side, strip, gap = enlarged(images[0]).shape[0], 28, 6
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * (side + gap) + gap, rows * (side + strip + gap) + gap), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for i, (image, label) in enumerate(zip(images, labels, strict=True)):
        left, top = gap + i % columns * (side + gap), gap + i // columns * (side + strip + gap)
        sheet.paste(Image.fromarray(_resized(image, side, side)), (left, top))
        lines, words = [""], label.split()
        for word in words:
            longer = f"{lines[-1]} {word}".strip()
            if draw.textlength(longer, font) > side and lines[-1]:
                lines.append(word)
            else:
                lines[-1] = longer
        for k, line in enumerate(lines[:2]):
            draw.text((left, top + side + 1 + 12 * k), line, "black", font)
    return np.asarray(sheet)
