"""Random crops and flips through FFCV: their distribution, and that they repeat to the last bit."""
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from scipy import stats
from torchvision.transforms import RandomResizedCrop

pytest.importorskip('ffcv', reason='FFCV is not installed')

from alignmix_lab.data import WriteSettings, open_source, write_beton  # noqa: E402
from alignmix_lab.data.ffcv.beton import inspect_beton  # noqa: E402
from alignmix_lab.data.ffcv.decoder import centre_crop, epoch_key, random_resized_crop, split_mix, uniform
from alignmix_lab.data.ffcv.loader import FFCVBatches  # noqa: E402
from alignmix_lab.data.images.decode import UnusableData  # noqa: E402
from alignmix_lab.data.options import LoaderOptions  # noqa: E402

SIZE = (3, 24, 24)
BATCH = 4
SCALE, RATIO = (0.2, 0.9), (0.5, 1.5)


@pytest.fixture(scope='module')
def info(tmp_path_factory, numbered):
    path = tmp_path_factory.mktemp('decoder') / 'train.beton'
    write_beton(open_source(str(numbered), split='train'), path, WriteSettings(max_resolution=160), 0, progress=False)
    return inspect_beton(path)  # not shuffled: labels are indices


@pytest.fixture(scope='module')
def make(info):
    """Callable: training batches of all samples that fit, by number of threads; each compiled once."""
    made = {}

    def get(workers, os_cache=True):
        if (workers, os_cache) not in made:
            options = LoaderOptions(
                input_size=SIZE, batch_size=BATCH, scale=SCALE, ratio=RATIO, workers=workers, seed=1, os_cache=os_cache)
            made[workers, os_cache] = FFCVBatches(info, options, train=True)
        return made[workers, os_cache]
    return get


def read(batches, epoch, start=0):
    batches.set_epoch(epoch, start)
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def by_label(images, labels):
    assert len(labels.unique()) == len(labels)
    return dict(zip(labels.tolist(), images, strict=True))


def seed_of(key, sample):
    return np.uint64(split_mix(np.uint64(key), np.uint64(sample)))


def test_hash_is_split_mix():
    """Steele, Lea and Flood's generator; the values are those of the Java and C versions."""
    published = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431]
    assert [int(split_mix(np.uint64(1234567), np.uint64(place))) for place in range(4)] == published


def test_draws_are_uniform_and_independent_between_samples_epochs_and_places():
    seeds = [[seed_of(epoch_key(seed, epoch), sample) for sample in range(400)]
             for seed, epoch in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1))]
    draws = np.array([[[uniform(seed, place) for place in range(6)] for seed in row] for row in seeds])
    assert draws.min() >= 0 and draws.max() < 1
    assert len(np.unique(draws)) == draws.size
    assert stats.kstest(draws.ravel(), 'uniform').pvalue > 0.01
    for axis in range(3):  # neighbours along each axis fill the square evenly
        first, second = (np.moveaxis(draws, axis, 0)[part].ravel() for part in (slice(None, -1), slice(1, None)))
        counts, _, _ = np.histogram2d(first, second, bins=8, range=[(0, 1), (0, 1)])
        assert stats.chisquare(counts.ravel()).pvalue > 0.01
        assert stats.pearsonr(first, second).pvalue > 0.01


@pytest.mark.parametrize('height, width', [(120, 160), (500, 333), (64, 64)])
def test_crops_are_distributed_as_torchvisions(height, width):
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    theirs = np.array([RandomResizedCrop.get_params(image, SCALE, RATIO) for _ in range(3000)], dtype=float)
    crop = random_resized_crop(SCALE, RATIO)
    ours = np.array([crop(seed_of(5, i), height, width) for i in range(3000)], dtype=float)
    for measure in (
            lambda top, left, h, w: h * w,
            lambda top, left, h, w: w / h,
            lambda top, left, h, w: top / (height - h + 1),
            lambda top, left, h, w: left / (width - w + 1),
            lambda top, left, h, w: top + h / 2,
            lambda top, left, h, w: left + w / 2,
    ):
        assert stats.ks_2samp(measure(*ours.T), measure(*theirs.T)).pvalue > 0.01


@pytest.mark.parametrize('height, width', [(10, 400), (400, 10), (2, 999), (3, 2)])
def test_images_that_no_drawn_crop_fits_are_cropped_as_by_torchvision(height, width):
    scale, ratio = (1.0, 1.0), (1.0, 1.2) if height < width else (2.0, 2.5)
    expected = RandomResizedCrop.get_params(torch.empty(3, height, width), scale, ratio)
    assert random_resized_crop(scale, ratio)(np.uint64(0), height, width) == expected


def test_centre_crop():
    assert centre_crop(0.5)(np.uint64(0), 100, 60) == (35, 15, 30, 30)


def test_images_are_the_crops_drawn_for_them(make, info, numbered, area_average):
    """Crop, resizing and flip of every sample, computed from its draws with numpy."""
    crop = random_resized_crop(SCALE, RATIO)
    flips, errors, misplaced = [], [], []
    for label, image in by_label(*read(make(2), epoch=3)).items():
        seed = seed_of(epoch_key(1, 3), label)
        original = np.asarray(Image.open(numbered / 'train' / f'{label:02d}' / 'image.jpg'))
        stored = area_average(original, (info.heights[label], info.widths[label]))
        top, left, h, w = crop(seed, *stored.shape[:2])
        expected = area_average(stored[top:top + h, left:left + w], SIZE[1:])
        flips.append(uniform(seed, 0) < 0.5)
        mirrored = expected[:, ::-1]
        pixels = image.permute(1, 2, 0).numpy()
        errors.append(np.abs(pixels - (mirrored if flips[-1] else expected)).mean())
        misplaced.append(np.abs(pixels - (expected if flips[-1] else mirrored)).mean())
    assert max(errors) < 5 and np.mean(errors) < 0.25 * np.mean(misplaced)
    assert 8 < sum(flips) < 28  # 36 fair coins


def test_epochs_repeat_on_any_number_of_threads_and_from_any_batch(make):
    images, labels = read(make(1), epoch=3)
    for start in (0, 5):
        late_images, late_labels = read(make(2), 3, start)
        assert torch.equal(late_labels, labels[start * BATCH:])
        assert torch.equal(late_images, images[start * BATCH:])
    assert torch.equal(read(make(2), 3)[0], images)


def test_augmentation_does_not_depend_on_ranks_or_order(make, monkeypatch):
    alone = by_label(*read(make(1), epoch=2))
    pages = by_label(*read(make(1, os_cache=False), epoch=2))
    parts = []
    for rank in range(3):
        monkeypatch.setattr(make(2), '_rank_of', (rank, 3))
        parts.append(read(make(2), 2))
    ranks = by_label(*map(torch.cat, zip(*parts, strict=True)))
    for other in (pages, ranks):
        common = alone.keys() & other.keys()
        assert len(common) >= 35
        assert all(torch.equal(alone[label], other[label]) for label in common)


def test_augmentation_differs_between_epochs_and_seeds(make, monkeypatch):
    runs = []
    for seed, epoch in ((1, 0), (1, 1), (2, 0), (0, 1)):
        monkeypatch.setattr(make(1), '_seed', seed)
        runs.append(by_label(*read(make(1), epoch)))
    for first in range(4):
        for second in range(first):
            common = runs[first].keys() & runs[second].keys()
            assert sum(torch.equal(runs[first][label], runs[second][label]) for label in common) <= 1


def test_size_changes_without_compilation(make):
    """The crops stay where they were: the same epoch at half the size is nearly the small images' pixels."""
    batches = make(2)
    before, labels = read(batches, 4)
    compiled = [function for function in batches._loader.code[0][0][0].__globals__.values()
                if hasattr(function, 'signatures')]
    signatures = [len(function.signatures) for function in compiled]
    batches.set_size(48)
    large, large_labels = read(batches, 4)
    batches.set_size(24)
    assert large.shape == (36, 3, 48, 48) and torch.equal(labels, large_labels)
    halved = torch.nn.functional.avg_pool2d(large.float(), 2)
    own, other = (halved - before).abs().mean(), (halved - before.flip(0)).abs().mean()
    assert own < 0.2 * other
    assert torch.equal(read(batches, 4)[0], before)
    assert signatures and [len(function.signatures) for function in compiled] == signatures


def test_damaged_jpeg_data_ends_the_epoch(info, tmp_path):
    """FFCV would serve the pixels of the image decoded there before, under this label."""
    path = tmp_path / 'train.beton'
    shutil.copy(info.path, path)
    victim = int(np.flatnonzero(info.is_jpeg)[3])
    with open(path, 'r+b') as file:
        file.seek(info.pointers[victim])
        file.write(bytes(int(info.sizes[victim])))
    batches = FFCVBatches(inspect_beton(path), LoaderOptions(input_size=SIZE, batch_size=1, workers=1), train=False)
    seen = []
    message = f'^{path}: the JPEG data of sample {victim} is damaged; .*alignmix_lab verify {path}, and convert'
    with pytest.raises(UnusableData, match=message):  # which commands print without a traceback
        for _, labels in batches:
            seen += labels.tolist()
    assert seen == list(range(victim))
