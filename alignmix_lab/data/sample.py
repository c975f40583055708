"""The built-in sample: scikit-learn's handwritten digits, 1,797 real images of 8 x 8 pixels that pip already
installed."""
import logging
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

_logger = logging.getLogger(__name__)

SIZE = 64  # pixels, after upscaling
TEST_SHARE = 0.2


def cache_dir() -> Path:
    """$TIMM_ALIGNMIX_CACHE, or timm_alignmix in $XDG_CACHE_HOME (~/.cache)."""
    named = os.environ.get('TIMM_ALIGNMIX_CACHE')
    if named:
        return Path(named).expanduser()
    return Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser() / 'timm_alignmix'


def _write_images(folder: Path) -> None:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split
    pixels, labels = load_digits(return_X_y=True)
    parts = train_test_split(np.arange(len(labels)), test_size=TEST_SHARE, stratify=labels, random_state=0)
    for split, indices in zip(('train', 'validation'), parts, strict=True):
        for index in indices:
            grey = (pixels[index].reshape(8, 8) * (255 / 16)).astype(np.uint8)
            place = folder / split / str(labels[index])
            place.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(grey).resize((SIZE, SIZE), Image.Resampling.BICUBIC)
            image.save(place / f'{index:04d}.png')


def _write_betons(folder: Path) -> None:
    from .ffcv.writer import convert
    convert(str(sample_dir('timm')), folder, workers=0, progress=False)


def _make_once(folder: Path, make: Callable[[Path], None]) -> Path:
    """Fill a folder beside its final place, then rename it. Of several processes that do, the first wins."""
    if folder.is_dir():
        return folder
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f'.{folder.name}.', dir=folder.parent))
    try:
        make(temporary)
        temporary.chmod(0o755)
        try:
            temporary.rename(folder)
            _logger.info(f'Built-in sample written to {folder}')
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return folder


def sample_dir(kind: str = 'ffcv') -> Path:
    """The folder of the sample, written to the cache when first asked for.

    1,437 training and 360 validation images, a fixed split with the same share of each digit.

    Args:
        kind: 'ffcv' for train.beton and val.beton, 'timm' for an ImageFolder.

    Raises:
        ImportError: scikit-learn is missing, or FFCV for 'ffcv'.
    """
    if kind == 'timm':
        return _make_once(cache_dir() / 'digits-images-v1', _write_images)
    return _make_once(cache_dir() / 'digits-ffcv-v1', _write_betons)
