"""Decoding, resizing and encoding of images. The result is always uint8 RGB, or an error that states the reason."""

import io
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from unimm_jax.errors import InvalidRecordError

try:
    import simplejpeg
except ImportError:  # optional dependency [jpeg]; Pillow decodes to the same pixels, but holds the GIL longer
    simplejpeg = None

MIN_SIDE = 8  # pixels
MAX_PIXELS = 80_000_000
MAX_ASPECT = 20
FITS = ("stretch", "crop")  # how an image becomes a square
ORIENTATION = 0x0112  # EXIF tag; from 5 on, width and height are exchanged

warnings.filterwarnings("ignore", module=r"PIL\.")  # set once: catch_warnings around each decode is not thread-safe


def decode_image(data: bytes) -> Image.Image:
    """Decodes one image to RGB.

    Uses the first frame of animations, composites transparency on white, scales 16-bit grayscale to 8 bits, converts
    CMYK and applies the EXIF orientation.

    Raises:
      InvalidRecordError: not an image, truncated, smaller than `MIN_SIDE`, larger than `MAX_PIXELS`, or with an aspect
        ratio above `MAX_ASPECT`.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data))
        width, height = image.size
        if min(width, height) < MIN_SIDE:
            raise InvalidRecordError(f"too small: {width} × {height} pixels, each side needs at least {MIN_SIDE}")
        if width * height > MAX_PIXELS or max(width, height) > MAX_ASPECT * min(width, height):
            raise InvalidRecordError(f"too large or too elongated: {width} × {height} pixels")
        image.seek(0)
        image = _load(image, data)
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I") or image.mode == "F":
            values = np.asarray(image, np.float64)
            top = 65535.0 if np.max(values) > 255 else 255.0
            image = Image.fromarray((values / top * 255).clip(0, 255).astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image if image.mode == "RGB" else image.convert("RGB")  # convert would copy an RGB image
    except InvalidRecordError:
        raise
    except UnidentifiedImageError:  # its message names a Python object
        raise InvalidRecordError("not a readable image: unknown format") from None
    except Exception as error:  # Pillow raises many types for damaged files
        raise InvalidRecordError(f"not a readable image: {error}") from error


def _load(image: Image.Image, data: bytes) -> Image.Image:
    """Decodes an opened image. Color JPEGs are decoded by simplejpeg if it is installed, damaged ones by Pillow."""
    if simplejpeg is not None and image.format == "JPEG" and image.mode == "RGB":
        try:
            decoded = Image.fromarray(simplejpeg.decode_jpeg(data))
            decoded.info = image.info  # keeps the EXIF orientation
            return decoded
        except ValueError:
            pass
    image.load()
    return image


PNG_METADATA = (b"eXIf", b"Raw profile type", b"XML:com.adobe.xmp")  # where a PNG can say how it is turned


def size_of(image: bytes | np.ndarray) -> tuple[int, int]:
    """(width, height) of encoded bytes, as `decode_image` gives them, or of pixels uint8 [H, W, 3]; decodes nothing.

    Raises:
      InvalidRecordError: not an image.
    """
    if not isinstance(image, bytes):
        return image.shape[1], image.shape[0]
    try:
        with Image.open(io.BytesIO(image)) as opened:
            width, height = opened.size
            # Pillow decodes a PNG to look for metadata behind the pixels
            has_exif = opened.format != "PNG" or any(mark in image for mark in PNG_METADATA)
            turned = has_exif and opened.getexif().get(ORIENTATION, 1) >= 5
    except Exception as error:  # Pillow raises many types for damaged files
        raise InvalidRecordError(f"not a readable image: {error}") from error
    return (height, width) if turned else (width, height)


def resize(image: Image.Image, size: int, fit: str = "stretch") -> np.ndarray:
    """Bicubic resize to uint8 [size, size, 3].

    Args:
      fit: a name of `FITS`: "stretch" does not keep the aspect ratio (LaVIT); "crop" resizes the centered square.
    """
    if fit == "crop" and image.width != image.height:
        side = min(image.size)
        left, top = (image.width - side) // 2, (image.height - side) // 2
        image = image.crop((left, top, left + side, top + side))
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image, np.uint8)


def to_pixels(image: bytes | np.ndarray, size: int, fit: str = "stretch", max_crop: float = 1.0) -> np.ndarray:
    """Encoded bytes, or uint8 pixels [H, W, 3] → uint8 [size, size, 3].

    Args:
      fit: see `resize`. max_crop: largest share of an image that the fit "crop" may remove.

    Raises:
      InvalidRecordError: see `decode_image`; or more than `max_crop` would be removed.
    """
    if not isinstance(image, bytes):
        if image.shape == (size, size, 3):
            return image
        decoded = Image.fromarray(image).convert("RGB")
    else:
        decoded = decode_image(image)
    removed = 1 - min(decoded.size) / max(decoded.size)
    if fit == "crop" and removed > max_crop:
        raise InvalidRecordError(
            f"too elongated for fit='crop': {decoded.width} × {decoded.height} pixels would lose {removed:.0%}, more "
            f"than max_crop={max_crop:g}"
        )
    return resize(decoded, size, fit)


def encode_png(image: np.ndarray) -> bytes:
    """uint8 [H, W, 3] → PNG bytes (lossless)."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


PREPROCESSING = {  # fit → part of the records' fingerprint
    "stretch": "rgb-white-first-frame/bicubic-square/v1",
    "crop": "rgb-white-first-frame/bicubic-center-crop/v1",
}
