"""Epochs entered late, read with other workers or by other ranks: the same samples, augmented alike."""
import random

import numpy as np
import pytest
import torch
import torch.utils.data

from alignmix_lab.data import create_loaders
from alignmix_lab.data.images.sources import ImageSource
from alignmix_lab.data.options import LoaderOptions
from alignmix_lab.data.timm_loader import StreamBatches

EVERYTHING = {  # all that timm's loader draws
    'color_jitter': 0.4, 'aa': 'rand-m9-mstd0.5-inc1', 'reprob': 0.5, 'remode': 'pixel', 'recount': 2,
    'train_interpolation': 'random',
}


def through_timm(root, **options):
    options = {'batch_size': 4, 'workers': 0, 'seed': 1, **EVERYTHING, **options}
    return create_loaders(str(root), loader='timm', input_size=(3, 32, 32), **options).train


def read(loader, epoch, start=0):
    loader.set_epoch(epoch, start)
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


def by_label(*parts):
    """{label: image} of (images, labels) pairs; each label once."""
    images, labels = (torch.cat(column) for column in zip(*parts, strict=True))
    assert len(labels.unique()) == len(labels)
    return dict(zip(labels.tolist(), images, strict=True))


def assert_same_samples(ours, theirs):
    """The samples that both have are augmented alike."""
    common = ours.keys() & theirs.keys()
    assert len(common) > 30
    assert all(torch.equal(ours[label], theirs[label]) for label in common)


@pytest.mark.parametrize('workers', [0, 2])
def test_timms_loader_enters_an_epoch_at_any_batch(numbered, workers):
    images, labels = read(through_timm(numbered), 3)
    loader = through_timm(numbered, workers=workers)
    for start in (7, 0, 9):  # not in order: nothing depends on what was read before
        if start == 9:
            loader.set_epoch(3, start)
            assert list(loader) == []
            continue
        late_images, late_labels = read(loader, 3, start)
        assert torch.equal(late_labels, labels[4 * start:])
        assert torch.equal(late_images, images[4 * start:])
        assert len(loader) == 9
    np.testing.assert_array_equal(loader.order(), labels)
    with pytest.raises(ValueError, match='cannot start at batch 10: it has 9'):
        loader.set_epoch(0, 10)


def test_timms_loader_skips_without_reading(numbered, monkeypatch):
    loader = through_timm(numbered)
    read_samples, read_one = [], ImageSource.read
    monkeypatch.setattr(ImageSource, 'read', lambda self, index: read_samples.append(index) or read_one(self, index))
    _, labels = read(loader, 0, start=7)
    assert read_samples == labels.tolist()


def test_timms_augmentation_does_not_depend_on_the_number_of_ranks(numbered):
    alone = by_label(read(through_timm(numbered), 2))
    ranks = [read(through_timm(numbered, rank=rank, world_size=3), 2) for rank in range(3)]
    assert_same_samples(alone, by_label(*ranks))


def test_random_erasing_differs_between_epochs_seeds_and_samples(numbered):
    options = {'color_jitter': 0.0, 'aa': None, 'hflip': 0.0, 'scale': (1, 1), 'ratio': (1, 1), 'reprob': 1.0,
               'remode': 'const', 'train_interpolation': 'bilinear'}
    loaders = [through_timm(numbered, **{**options, 'seed': seed}) for seed in (1, 2)]
    epochs = [by_label(read(loader, epoch)) for loader in loaders for epoch in (0, 1)]
    erased = [{label: (image == 0).all(0) for label, image in epoch.items()} for epoch in epochs]
    for label in set.intersection(*(set(epoch) for epoch in erased)):
        masks = [epoch[label] for epoch in erased]
        assert all(mask.any() for mask in masks)
        assert len({mask.numpy().tobytes() for mask in masks}) > 2
    assert len({mask.numpy().tobytes() for mask in erased[0].values()}) > 30


@pytest.mark.parametrize('workers', [0, 1])
def test_global_generators_are_left_alone(numbered, workers):
    def draw():
        return random.random(), np.random.rand(), torch.rand(1).item()

    loader = through_timm(numbered, workers=workers)
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    expected = draw()
    random.seed(0), np.random.seed(0), torch.manual_seed(0)
    list(loader)
    assert draw() == expected


class Noise:
    """A random transform of a stream: its draw, repeated, is the image."""

    def __init__(self, size):
        self.size = size

    def __call__(self, label):
        draws = torch.tensor([random.random(), np.random.rand(), torch.rand(()).item()]).mul(255).byte()
        return draws.view(3, 1, 1).expand(3, *self.size)


class Stream(torch.utils.data.IterableDataset):
    """Stands for timm's datasets that are read in sequence; its samples are their labels."""

    class reader:
        num_samples = 24

    def __init__(self):
        self.transform = None

    def set_loader_cfg(self, num_workers):
        self.workers = max(1, num_workers)

    def set_epoch(self, epoch):
        pass

    def __len__(self):
        return self.reader.num_samples

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        for label in range(0 if worker is None else worker.id, self.reader.num_samples, self.workers):
            yield self.transform(label), label


@pytest.mark.parametrize('workers', [0, 2])
def test_streams_enter_an_epoch_at_any_batch(workers):
    def stream(rank=0):
        options = LoaderOptions(
            input_size=(3, 1, 1), batch_size=4, num_classes=24, workers=workers, seed=1, rank=rank)
        return StreamBatches(ImageSource(Stream(), 'stream'), Noise, options, train=True)

    images, labels = read(stream(), 3)
    assert len(images.unique(dim=0)) == 24
    batches = stream()
    for start in (4, 0):
        late = read(batches, 3, start)
        assert torch.equal(late[0], images[4 * start:]) and torch.equal(late[1], labels[4 * start:])
    assert len(batches) == 6
    assert not torch.equal(read(batches, 4)[0], images)
    assert not torch.equal(read(stream(rank=1), 3)[0], images)
    with pytest.raises(RuntimeError, match='stream is read in sequence: its samples have no indices'):
        batches.order()
    batches.set_size(2)
    assert torch.equal(read(batches, 3)[0], images.expand(-1, -1, 2, 2))


def test_transforms_of_timm_are_seeded(numbered):
    """Two samples with the same picture are augmented differently, and one sample differently in each epoch."""
    loader = through_timm(numbered, aa=None, reprob=0.0)
    first, again, other = (by_label(read(loader, epoch)) for epoch in (0, 0, 1))
    assert_same_samples(first, again)
    common = first.keys() & other.keys()
    assert sum(torch.equal(first[label], other[label]) for label in common) == 0


@pytest.mark.parametrize('workers', [0, 2])
def test_timms_loader_changes_size_between_epochs(numbered, workers):
    """The same draws at another size: a loader made for that size yields the same."""
    loader = through_timm(numbered, workers=workers)
    before = read(loader, 0)
    loader.set_size(48)
    images, labels = read(loader, 0)
    assert images.shape == (36, 3, 48, 48)
    made_so = create_loaders(
        str(numbered), loader='timm', input_size=(3, 48, 48), batch_size=4, workers=0, seed=1, **EVERYTHING).train
    assert torch.equal(images, read(made_so, 0)[0])
    loader.set_size(32)
    assert all(torch.equal(a, b) for a, b in zip(read(loader, 0), before, strict=True))
    with pytest.raises(ValueError, match='images cannot have 0 pixels a side'):
        loader.set_size(0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')
def test_random_erasing_repeats_on_cuda(numbered):
    before = torch.cuda.get_rng_state()
    images, _ = read(through_timm(numbered, device='cuda'), 3)
    late, _ = read(through_timm(numbered, device='cuda'), 3, start=5)
    assert torch.equal(images[20:], late)
    assert torch.equal(torch.cuda.get_rng_state(), before)
