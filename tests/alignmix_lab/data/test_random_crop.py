"""The crops of CIFAR's recipes and of fine-tuning on whole objects, against windows cut by hand."""
import numpy as np
import pytest
import torch
from PIL import Image

from alignmix_lab.data import create_loaders
from alignmix_lab.data.loaders import _ffcv_loaders
from alignmix_lab.data.options import LoaderOptions

COUNT = 120


@pytest.fixture(scope='module')
def marked(tmp_path_factory):
    """An ImageFolder of one 32 x 28 image many times, none of whose pixels repeats."""
    root = tmp_path_factory.mktemp('marked')
    pixels = np.random.default_rng(0).integers(1, 256, (32, 28, 3), dtype=np.uint8)
    for split, count in (('train', COUNT), ('val', 2)):
        (root / split / 'one').mkdir(parents=True)
        for index in range(count):
            Image.fromarray(pixels).save(root / split / 'one' / f'{index:03d}.png')
    return root, pixels


@pytest.fixture
def load(marked):
    """Callable: all training images and the validation images of an epoch, uint8 (N, H, W, 3)."""
    def images(size: int, **options) -> tuple[np.ndarray, np.ndarray]:
        loaders = create_loaders(
            str(marked[0]), loader='timm', workers=0, input_size=(3, size, size), batch_size=COUNT, num_classes=2,
            mean=(0, 0, 0), std=(1, 1, 1), hflip=0.0, **options)
        both = (torch.cat([batch for batch, _ in loader]) for loader in (loaders.train, loaders.val))
        return tuple((x * 255).round().byte().permute(0, 2, 3, 1).numpy() for x in both)
    return images


def places(crops: np.ndarray, whole: np.ndarray) -> np.ndarray:
    """(N, 2) top and left of crops in an image, each of which has exactly one place."""
    side = crops.shape[1]
    windows = np.lib.stride_tricks.sliding_window_view(whole, (side, side), axis=(0, 1)).transpose(0, 1, 3, 4, 2)
    found = [np.argwhere((windows == crop).all(axis=(2, 3, 4))) for crop in crops]
    assert all(len(place) == 1 for place in found)
    return np.concatenate(found)


def test_the_padded_crop_is_any_window_of_the_image_with_a_black_frame(load, marked):
    crops, _ = load(24, crop_padding=3)
    tops, lefts = places(crops, np.pad(marked[1], ((3, 3), (3, 3), (0, 0)))).T
    for offsets, count in ((tops, 32 + 6 - 24 + 1), (lefts, 28 + 6 - 24 + 1)):
        drawn = np.bincount(offsets, minlength=count)
        assert len(drawn) == count and (drawn > 0).sum() >= count - 1  # each is missed with probability 3e-4 at most
        assert ((drawn - COUNT / count)**2 / (COUNT / count)).sum() < 40  # chi squared, 14 degrees: p < 3e-4


def test_the_resized_crop_is_a_window_of_the_whole_image(load, marked):
    crops, _ = load(24, crop_resize=26)
    whole = Image.fromarray(marked[1]).resize((26, 26), Image.Resampling.BILINEAR)
    assert len(np.unique(places(crops, np.asarray(whole)), axis=0)) == 9


def test_squashing_evaluates_the_whole_image(load, marked):
    _, images = load(24, crop_mode='squash', crop_pct=1.0)
    whole = np.asarray(Image.fromarray(marked[1]).resize((24, 24), Image.Resampling.BILINEAR))
    assert len(images) == 2 and (images == whole).all()


@pytest.mark.parametrize('option, flag', [
    (dict(crop_padding=4), '--crop-padding 4'), (dict(crop_resize=256), '--crop-resize 256'),
    (dict(crop_mode='squash'), '--crop-mode squash')])
def test_ffcv_refuses_what_it_cannot_crop(tmp_path, option, flag):
    with pytest.raises(ValueError, match=f'{flag} is not available with FFCV; use --loader timm'):
        _ffcv_loaders(LoaderOptions(data_dir=str(tmp_path), **option))
