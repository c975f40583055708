"""Small real data: crops of the two photographs that scikit-learn carries, as JPEG files in class folders."""
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_sample_images

from alignmix_lab.data import WriteSettings, convert

NUM_TRAIN, NUM_VAL = 37, 11  # no multiple of any world size or batch size that the tests use


def _average_rows(image: np.ndarray, count: int) -> np.ndarray:
    edges = np.linspace(0, len(image), count + 1)
    starts = np.arange(len(image))
    overlap = np.minimum(edges[1:, None], starts + 1) - np.maximum(edges[:-1, None], starts)
    return np.tensordot(overlap.clip(0) * count / len(image), image, axes=1)


@pytest.fixture(scope='session')
def area_average():
    """Callable: exact area averages of an image at a smaller (height, width), in float64."""
    def resize(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        return _average_rows(_average_rows(image, size[0]).swapaxes(0, 1), size[1]).swapaxes(0, 1)
    return resize


@pytest.fixture(scope='session')
def photos() -> list[np.ndarray]:
    """Two photographs, (427, 640, 3) uint8."""
    return load_sample_images().images


@pytest.fixture(scope='session')
def crops(photos) -> list[Image.Image]:
    """Different crops of various sizes, one for each sample of the numbered data."""
    rng = np.random.default_rng(0)
    images = []
    for index in range(NUM_TRAIN):
        height, width = rng.integers(80, 200, 2)
        top, left = rng.integers(0, 427 - height), rng.integers(0, 640 - width)
        images.append(Image.fromarray(photos[index % 2][top:top + height, left:left + width]))
    return images


@pytest.fixture(scope='session')
def numbered(tmp_path_factory, crops) -> Path:
    """An ImageFolder with one image per class, so that a label says which image was read."""
    root = tmp_path_factory.mktemp('numbered')
    for split, count in (('train', NUM_TRAIN), ('val', NUM_VAL)):
        for index in range(count):
            folder = root / split / f'{index:02d}'
            folder.mkdir(parents=True)
            crops[index].save(folder / 'image.jpg', quality=95)
    return root


@pytest.fixture(scope='session')
def betons(tmp_path_factory, numbered) -> Path:
    """The same as train.beton and val.beton, half JPEG and half raw."""
    pytest.importorskip('ffcv', reason='FFCV is not installed')
    folder = tmp_path_factory.mktemp('betons')
    convert(str(numbered), folder, settings=WriteSettings(max_resolution=160), workers=0, progress=False)
    return folder
