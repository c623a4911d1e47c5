"""Pictures in and out of bytes. Whatever a file holds, what leaves is uint8 RGB, or one sentence that says why not."""

import io
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

try:
    import simplejpeg
except ImportError:  # the extra [jpeg]; Pillow gives the same pixels, with more of its work under Python's lock
    simplejpeg = None

MIN_SIDE = 8  # pixels
MAX_PIXELS = 80_000_000
MAX_ASPECT = 20

warnings.filterwarnings("ignore", module=r"PIL\.")  # once: catch_warnings around a decode is not safe in threads


class BadRecord(ValueError):
    """A record that cannot be used; the message says why."""


def decode_picture(data: bytes) -> Image.Image:
    """Decodes one picture to an RGB image.

    The first frame of animations is taken, transparency is laid on white, 16-bit greys are scaled rather than cut,
    CMYK is converted, the EXIF orientation is applied.

    Raises:
      BadRecord: not a picture, truncated, too small, too large or too elongated.
    """
    try:
        image: Image.Image = Image.open(io.BytesIO(data))
        width, height = image.size
        if min(width, height) < MIN_SIDE:
            raise BadRecord(f"too small: {width} × {height} pixels, at least {MIN_SIDE} a side are needed")
        if width * height > MAX_PIXELS or max(width, height) > MAX_ASPECT * min(width, height):
            raise BadRecord(f"too large or too elongated: {width} × {height} pixels")
        image.seek(0)
        image = _load(image, data)
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I") or image.mode == "F":
            values = np.asarray(image, np.float64)
            top = 65535.0 if values.max() > 255 else 255.0
            image = Image.fromarray((values / top * 255).clip(0, 255).astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image if image.mode == "RGB" else image.convert("RGB")  # convert copies even then
    except BadRecord:
        raise
    except UnidentifiedImageError:  # whose own words name a Python object
        raise BadRecord("not a readable picture: of no format that Pillow knows") from None
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise BadRecord(f"not a readable picture: {error}") from error


def _load(image: Image.Image, data: bytes) -> Image.Image:
    """Decodes an opened picture; colour JPEG by simplejpeg where installed, except damaged ones."""
    if simplejpeg is not None and image.format == "JPEG" and image.mode == "RGB":
        try:
            decoded = Image.fromarray(simplejpeg.decode_jpeg(data))
            decoded.info = image.info  # the orientation
            return decoded
        except ValueError:
            pass
    image.load()
    return image


def resize(image: Image.Image, size: int) -> np.ndarray:
    """Bicubic straight to size × size (the aspect ratio is not kept; LaVIT §1.1): uint8 [size, size, 3]."""
    if image.size != (size, size):
        image = image.resize((size, size), Image.Resampling.BICUBIC)
    return np.asarray(image, np.uint8)


def to_pixels(picture: bytes | np.ndarray, size: int) -> np.ndarray:
    """Encoded bytes or pixels of any size → uint8 [size, size, 3].

    Raises:
      BadRecord: see `decode_picture`.
    """
    if isinstance(picture, bytes):
        return resize(decode_picture(picture), size)
    return picture if picture.shape == (size, size, 3) else resize(Image.fromarray(picture).convert("RGB"), size)


def encode_png(image: np.ndarray) -> bytes:
    """uint8 [H, W, 3] → PNG bytes (lossless)."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


PREPROCESSING = "rgb-white-first-frame/bicubic-square/v1"  # part of the records' fingerprint
