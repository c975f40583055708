"""FFCV's loader under our hands: what it yields against Pillow and numpy, and the traps of FFCV 1.0.2."""
import threading

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip('ffcv', reason='FFCV is not installed')

from alignmix_lab.data.device_loader import DeviceLoader  # noqa: E402
from alignmix_lab.data.ffcv import loader as ffcv_loader  # noqa: E402
from alignmix_lab.data.ffcv.beton import inspect_beton  # noqa: E402
from alignmix_lab.data.ffcv.loader import FFCVBatches, visible_workers  # noqa: E402
from alignmix_lab.data.options import LoaderOptions  # noqa: E402

SIZE = (3, 48, 48)
TIMEOUT = 120  # seconds until what never ends counts as hanging; compilation takes some 10


def make(info, batch_size, train, **options):
    return FFCVBatches(info, LoaderOptions(batch_size=batch_size, **{'input_size': SIZE, **options}), train)


@pytest.fixture(scope='module')
def train_info(betons):
    return inspect_beton(betons / 'train.beton')


@pytest.fixture(scope='module')
def val_info(betons):
    return inspect_beton(betons / 'val.beton')


@pytest.fixture(scope='module')
def train(train_info):
    """Training batches of the only rank, on two threads through the page cache."""
    return make(train_info, 4, train=True, workers=2, seed=1)  # more batches than FFCV's ring holds


@pytest.fixture(scope='module')
def paged(train_info):
    """The same for the last of three ranks, page by page."""
    return make(train_info, 1, train=True, workers=1, seed=1, rank=2, world_size=3, os_cache=False)


@pytest.fixture(scope='module')
def val(val_info):
    """Evaluation batches of the second of two ranks."""
    return make(val_info, 2, train=False, crop_pct=0.75, workers=1, rank=1, world_size=2)


def in_thread(function):
    """Run a function that must end; return what it returned or raised."""
    outcome = []

    def target():
        try:
            outcome.append(function())
        except BaseException as error:
            outcome.append(error)

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    thread.join(TIMEOUT)
    assert not thread.is_alive(), 'hangs'
    return outcome[0]


def test_evaluation_crops_and_averages_areas(val, val_info, numbered, area_average):
    images, labels = zip(*val, strict=True)
    assert [len(batch) for batch in images] == [2, 2, 1]  # the last batch of one sample, too
    assert len(val) == 3
    images, labels = torch.cat(images), torch.cat(labels)
    assert (images.dtype, labels.dtype, images.shape) == (torch.uint8, torch.int64, (5, *SIZE))
    assert labels.tolist() == [6, 7, 8, 9, 10]
    errors, misplaced = [], []
    for image, label, lossy in zip(images, labels.tolist(), val_info.is_jpeg[6:], strict=True):
        original = Image.open(numbered / 'val' / f'{label:02d}' / 'image.jpg')
        scale = min(1, 160 / max(original.size))
        stored = area_average(np.asarray(original), (int(original.height * scale), int(original.width * scale)))
        side = int(0.75 * min(stored.shape[:2]))
        top, left = ((length - side) // 2 for length in stored.shape[:2])
        expected = area_average(stored[top:top + side, left:left + side], (48, 48))
        neighbour = area_average(stored[top:top + side, left + 2:left + 2 + side], (48, 48))
        pixels = image.permute(1, 2, 0).numpy()
        errors.append(np.abs(pixels - expected).mean())
        assert errors[-1] < (3 if lossy else 0.6)
        misplaced.append(np.abs(pixels - neighbour).mean())
    assert np.mean(errors) < 0.3 * np.mean(misplaced)  # a crop two pixels to the side would not pass


@pytest.mark.parametrize('world_size', [1, 2, 3])
def test_evaluation_reads_every_sample_once(val, val_info, monkeypatch, world_size):
    seen = []
    for rank in range(world_size):
        monkeypatch.setattr(val, '_rank_of', (rank, world_size))
        seen += torch.cat([labels for _, labels in val]).tolist()
    assert sorted(seen) == list(range(11))


def test_more_ranks_than_samples(val, monkeypatch):
    monkeypatch.setattr(val, '_rank_of', (12, 13))
    assert list(val) == []


def epoch_labels(batches, epoch):
    batches.set_epoch(epoch)
    return torch.cat([labels for _, labels in batches]).tolist()


def test_training_order_repeats_and_changes(train):
    first = epoch_labels(train, 0)
    assert len(set(first)) == len(first) == 36  # 9 batches of 4 from 37 samples
    assert len(train) == 9
    assert epoch_labels(train, 0) == first
    assert epoch_labels(train, 1) != first


@pytest.mark.parametrize('name', ['train', 'paged'])
def test_an_epoch_is_entered_at_any_batch(request, name):
    batches = request.getfixturevalue(name)
    labels = epoch_labels(batches, 3)
    for start in (0, 7, len(batches)):
        batches.set_epoch(3, start)
        assert [label for _, part in batches for label in part.tolist()] == labels[start * len(labels) // len(batches):]
    assert batches.info.labels[batches.order()].tolist() == labels  # the file is not in class order
    batches.set_epoch(0)


def test_page_by_page_order_repeats_and_changes(paged, train_info, monkeypatch):
    first = epoch_labels(paged, 0)
    assert len(set(first)) == len(first) == 12
    assert epoch_labels(paged, 0) == first
    assert epoch_labels(paged, 1) != first
    seen = []
    paged.set_epoch(5)
    for rank in range(3):
        monkeypatch.setattr(paged, '_rank_of', (rank, 3))
        seen += paged.order().tolist()
    assert len(set(seen)) == len(seen) == 36


def test_training_images_belong_to_their_labels(train, numbered):
    """Mean colours tell the two photographs and their crops apart well enough to see a mix-up."""
    means = torch.stack([
        torch.from_numpy(np.asarray(Image.open(numbered / 'train' / f'{label:02d}' / 'image.jpg')).copy())
        .float().mean((0, 1)) for label in range(37)
    ])
    own, other = [], []
    for images, labels in train:
        distances = torch.cdist(images.float().mean((2, 3)), means)
        own += distances[torch.arange(len(labels)), labels].tolist()
        other += distances.mean(1).tolist()
    assert np.mean(own) < 0.4 * np.mean(other)


def test_batches_keep_their_values_when_the_loop_moves_on(train):
    kept, copies = [], []
    for images, labels in train:
        kept.append((images, labels))
        copies.append((images.clone(), labels.clone()))
    for (images, labels), (image_copy, label_copy) in zip(kept, copies, strict=True):
        assert torch.equal(images, image_copy) and torch.equal(labels, label_copy)


@pytest.mark.parametrize('name', ['train', 'paged'])
def test_leaving_an_epoch_early_leaks_no_threads(request, name):
    batches = request.getfixturevalue(name)
    list(batches)
    before = threading.active_count()
    for _ in range(5):
        for _batch in batches:
            break
        assert threading.active_count() == before
    assert len(list(batches)) == len(batches)


@pytest.mark.parametrize('name', ['train', 'paged'])
def test_a_failure_in_the_thread_surfaces(request, monkeypatch, name):
    batches = request.getfixturevalue(name)
    run = ffcv_loader._Epoch.run_pipeline

    def fail_at_the_third(self, batch, *args):
        if batch == 2:
            raise KeyError('a bug in a transform')
        return run(self, batch, *args)

    monkeypatch.setattr(ffcv_loader._Epoch, 'run_pipeline', fail_at_the_third)
    before = threading.active_count()
    error = in_thread(lambda: list(batches))
    assert isinstance(error, RuntimeError) and "KeyError: 'a bug in a transform'" in str(error)
    assert isinstance(error.__cause__, KeyError)
    assert threading.active_count() == before


@pytest.mark.filterwarnings('ignore::pytest.PytestUnhandledThreadExceptionWarning')
def test_a_file_that_disappears_surfaces(paged, monkeypatch):
    monkeypatch.setattr(paged._loader.reader, '_fname', '/nowhere/train.beton')
    error = in_thread(lambda: list(paged))
    assert isinstance(error, RuntimeError) and 'has died; does the file still exist?' in str(error)


def test_two_loaders_run_at_once(train, val):
    """Numba's workqueue layer would abort the process here."""
    pairs = 0
    for _ in train:
        pairs += sum(1 for _ in val)
    assert pairs == 9 * 3


def test_numba_types_of_the_process_stay_as_they_are(val_info):
    """FFCV marks a type read-only that all of the process shares: numba's finalizers then fail, at any later time."""
    import numba
    shared = numba.uint8[::1]
    make(val_info, 2, train=False, workers=1)
    assert shared.mutable and numba.uint8[::1] is shared


def test_torch_keeps_its_threads(train, val_info):
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        make(val_info, 2, train=False, workers=1)
        list(train)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_workers_are_clipped_to_the_cpus(monkeypatch):
    monkeypatch.setattr('os.sched_getaffinity', lambda pid: {0})
    assert visible_workers(64) == visible_workers(0) == 1


def test_normalisation_and_memory_format(val):
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
    raw = torch.cat([images for images, _ in val]).float() / 255
    expected = (raw - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    for channels_last in (False, True):
        options = LoaderOptions(input_size=SIZE, mean=mean, std=std, channels_last=channels_last)
        loader = DeviceLoader(val, options, train=False)
        yielded = [images for images, _ in loader]
        memory_format = torch.channels_last if channels_last else torch.contiguous_format
        assert all(batch.is_contiguous(memory_format=memory_format) for batch in yielded)
        torch.testing.assert_close(torch.cat(yielded), expected)
        assert (len(loader), loader.num_samples) == (3, 11)


@pytest.mark.parametrize('options, message', [
    ({'batch_size': 38}, '37 samples, not enough for one batch of 38'),
    ({'batch_size': 16, 'world_size': 3}, '37 samples, not enough for one batch of 16 on each of 3'),
    ({'input_size': (1, 48, 48)}, r'FFCV makes square RGB images, not \(1, 48, 48\); use --loader timm'),
    ({'input_size': (3, 48, 32)}, 'FFCV makes square RGB images'),
])
def test_impossible_options_are_refused(train_info, options, message):
    with pytest.raises(ValueError, match=message):
        make(train_info, train=True, **{'batch_size': 8, **options})


def test_images_that_are_too_small_for_the_crop_are_refused(val_info):
    with pytest.raises(ValueError, match='an image of .* pixels is too small for a crop of 0.001'):
        make(val_info, 2, train=False, crop_pct=0.001)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
def test_cuda_batches_equal_cpu_batches(val_info):
    loaders = []
    for device in ('cpu', 'cuda'):
        options = LoaderOptions(
            input_size=SIZE, batch_size=2, mean=(0.5,) * 3, std=(0.25,) * 3, device=device)
        loaders.append(DeviceLoader(FFCVBatches(val_info, options, train=False), options, train=False))
    for (on_cpu, cpu_labels), (on_cuda, cuda_labels) in zip(*loaders, strict=True):
        assert on_cuda.is_cuda and torch.equal(cpu_labels, cuda_labels.cpu())
        torch.testing.assert_close(on_cuda.cpu(), on_cpu)
