"""Built-in sample: the 1,797 handwritten digits, 8 x 8 pixels each, that come with scikit-learn."""
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
    try:
        return Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache').expanduser() / 'timm_alignmix'
    except RuntimeError as e:
        raise ValueError('no home directory to keep the built-in sample; set TIMM_ALIGNMIX_CACHE to a folder') from e


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
    """Fill a temporary folder, then rename it. If several processes do so, the first one wins."""
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
    """Return the folder of the sample, which is written to the cache on first use.

    1,437 training and 360 validation images, a fixed split stratified by digit.

    Args:
        kind: 'ffcv' for train.beton and val.beton, 'timm' for an ImageFolder.

    Raises:
        ImportError: scikit-learn is not installed, or FFCV for 'ffcv'.
    """
    if kind == 'timm':
        return _make_once(cache_dir() / 'digits-images-v1', _write_images)
    return _make_once(cache_dir() / 'digits-ffcv-v1', _write_betons)
