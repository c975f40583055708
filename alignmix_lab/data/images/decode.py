"""Image decoding to 8-bit RGB or grey, shared by the converter and timm's readers."""
import functools
import io
import logging
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

_logger = logging.getLogger(__name__)

MAX_PIXELS = 2 * 89_478_485  # Pillow raises above this: 0.5 GB once decoded to RGB
MAX_BYTES = 1 << 30  # file size; more than MAX_PIXELS can need


class UnusableData(ValueError):
    """Data that stops a run, named in one sentence.

    From a loader's worker, torch raises it again with the worker's whole traceback as its message, which ends with that
    sentence.
    """

    def __init__(self, message: str):
        super().__init__(message.rpartition(f'{type(self).__name__}: ')[2].strip())


@functools.cache
def _formats() -> tuple[str, ...]:
    """Formats that Pillow decodes itself: for EPS it would run Ghostscript, even on a file named .jpg."""
    Image.init()
    return tuple(sorted(set(Image.ID) - {'EPS'}))


def _open(source: BinaryIO | str | Path) -> Image.Image:
    """Open without Pillow's global pixel limit: decode_image() has its own, applied after JPEG scaling."""
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
    try:
        return Image.open(source, formats=_formats())
    except UnidentifiedImageError:
        raise ValueError('not an image in any supported format') from None
    finally:
        Image.MAX_IMAGE_PIXELS = limit


# How an EXIF orientation of 5 to 8 is shown: width and height are exchanged.
_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)
_BITS_PER_SAMPLE = 258  # of a TIFF file


def image_size(path: str | Path) -> tuple[int, int]:
    """Width and height of a file as decode_image() returns it, from its header."""
    with Image.open(path) as image:
        return _upright_size(image)


def _upright_size(image: Image.Image) -> tuple[int, int]:
    try:
        turned = image.getexif().get(_ORIENTATION) in _TURNED
    except Exception:  # a damaged EXIF block (many error types in Pillow): decode_image() ignores it too
        turned = False
    return image.size[::-1] if turned else image.size


def _to_eight_bits(image: Image.Image, bits: int) -> Image.Image:
    """Keep the highest 8 of the bits of grey images; Pillow's convert() would clip everything above 255 to white."""
    if image.mode == 'F':
        raise ValueError('floating-point pixels have no fixed range')
    if not image.mode.startswith('I'):
        return image
    pixels = np.asarray(image)
    if pixels.max() > 65535 or pixels.min() < 0:
        raise ValueError(f'integer pixels from {pixels.min()} to {pixels.max()} do not fit in 16 bits')
    return Image.fromarray((pixels >> max(bits - 8, 0)).clip(0, 255).astype(np.uint8))


def decode_image(
        source: Image.Image | BinaryIO | str | Path, mode: str = 'RGB', max_side: int | None = None,
        max_pixels: int = MAX_PIXELS, upright: bool = True) -> Image.Image:
    """Decode every pixel of an image, upright and as 8-bit `mode`.

    Grey, 16-bit, CMYK, palette and transparent images become RGB; transparency is dropped, as in timm. Animations yield
    their first frame. The EXIF orientation is applied.

    Args:
        source: File, path or opened image.
        mode: 'RGB' or 'L'.
        max_side: Sufficient longer side: a JPEG of more than max_pixels is decoded at a reduced scale, but no smaller
            than this. Other images keep their size.
        max_pixels: Maximum number of pixels to decode.
        upright: Turn the image as its EXIF orientation says.

    Raises:
        ValueError: Not an image, too many pixels, or a pixel type without an 8-bit equivalent.
        Exception: Whatever Pillow raises for damaged files (OSError, SyntaxError, struct.error, ...).
    """
    image = source if isinstance(source, Image.Image) else _open(source)
    width, height = image.size
    if max_side and width * height > max_pixels:
        image.draft(image.mode, (max_side, max_side))
    if image.width * image.height > max_pixels:
        raise ValueError(f'{width} x {height} pixels are more than the limit of {max_pixels} (a decompression bomb?)')
    bits = getattr(image, 'tag_v2', {}).get(_BITS_PER_SAMPLE, (16,))[0]
    image.load()
    try:
        image = ImageOps.exif_transpose(image) if upright else image
    except Exception as error:  # a damaged EXIF block (many error types in Pillow) says nothing about the pixels
        _logger.debug(f'EXIF orientation ignored: {error}')
    image = _to_eight_bits(image, bits)
    if image.mode == 'P' and 'transparency' in image.info:
        image = image.convert('RGBA')
    return image.convert(mode)


def read_bytes(source: BinaryIO) -> io.BytesIO:
    """Read a whole file into memory and close it; Pillow would keep it open.

    Raises:
        ValueError: The file is larger than any image that decode_image() accepts.
    """
    with source:
        size = source.seek(0, io.SEEK_END)
        if size > MAX_BYTES:
            raise ValueError(f'{size} bytes are more than the limit of {MAX_BYTES} for an image file')
        source.seek(0)
        return io.BytesIO(source.read())
