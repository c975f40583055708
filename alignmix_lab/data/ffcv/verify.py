"""Verification of .beton files.

FFCV does not notice a damaged image: it trains on the pixels of whatever image was decoded before. So every byte of the
file is compared with the checksums that the converter wrote beside it. If there are none (the file was converted by
other software), all JPEG images are decoded instead.
"""
import io
import logging
import zlib
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from .beton import BetonInfo, inspect_beton

_logger = logging.getLogger(__name__)


def _damaged_by_checksum(info: BetonInfo, progress: bool) -> list[int]:
    """Compare the pages; inspect_beton() has compared the index."""
    checksums = info.sidecar['checksums']
    start, page_size = checksums['data_start'], checksums['page_size']
    damaged = []
    with open(info.path, 'rb') as file:
        file.seek(start)
        table_start = checksums['size'] - 24 * info.num_samples  # three 64-bit numbers per sample
        pages = tqdm(checksums['pages'], desc=info.path.name, unit='page', disable=not progress)
        for page, expected in enumerate(pages):
            begin = start + page * page_size
            content = file.read(min(page_size, table_start - begin))
            if zlib.crc32(content) != expected:
                inside = (info.pointers >= begin) & (info.pointers < begin + page_size)
                damaged += np.flatnonzero(inside).tolist()
    return damaged


def _damaged_by_decoding(info: BetonInfo, progress: bool) -> list[int]:
    damaged = []
    jpegs = np.flatnonzero(info.is_jpeg)
    with open(info.path, 'rb') as file:
        for index in tqdm(jpegs, desc=info.path.name, unit='img', disable=not progress):
            file.seek(info.pointers[index])
            try:
                with Image.open(io.BytesIO(file.read(info.sizes[index]))) as image:
                    image.load()
                    whole = image.size == (info.widths[index], info.heights[index])
            except Exception:  # Pillow raises many types on damaged files
                whole = False
            if not whole:
                damaged.append(int(index))
    return damaged


def verify_beton(path: str | Path, progress: bool = True) -> list[int]:
    """Read a .beton file in full and return the indices of damaged samples.

    With checksums, all samples of a damaged page count as damaged. Without, only JPEG images can be checked.

    Raises:
        ValueError: It is not a .beton file, is truncated, or has a damaged index.
    """
    info = inspect_beton(path)
    check = _damaged_by_checksum if info.sidecar else _damaged_by_decoding
    if not info.sidecar:
        _logger.warning(f'{path} has no checksum file: decoding its {info.is_jpeg.sum()} JPEG images instead; '
                        f'{np.sum(~info.is_jpeg)} raw images cannot be checked')
    return check(info, progress)
