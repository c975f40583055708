"""The loader around timm's datasets and transforms."""
import multiprocessing
import os
import threading
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.utils.data
from PIL import Image
from timm.data import create_transform

from alignmix_lab.data import open_source
from alignmix_lab.data.images.decode import UnusableData
from alignmix_lab.data.images.sources import ImageSource
from alignmix_lab.data.options import LoaderOptions
from alignmix_lab.data.timm_loader import StreamBatches, TimmBatches

SIZE = (3, 32, 32)


def make(root, split='train', train=True, batch_size=8, transform=None, **options):
    transform = transform or create_transform(
        SIZE, is_training=train, auto_augment='rand-m9-mstd0.5', use_prefetcher=True)
    options = {'input_size': SIZE, 'num_classes': 37, 'workers': 0, 'seed': 1, **options}
    options = LoaderOptions(batch_size=batch_size, **options)
    return TimmBatches(open_source(str(root), split=split), lambda size: transform, options, train)


def read(batches, epoch=0):
    batches.set_epoch(epoch)
    images, labels = zip(*batches, strict=True)
    return torch.cat(images), torch.cat(labels)


def test_images_are_those_of_timms_transform(numbered):
    transform = create_transform(SIZE, crop_pct=0.8, use_prefetcher=True)
    images, labels = read(make(numbered, 'val', train=False, transform=transform))
    assert (images.dtype, labels.dtype, labels.tolist()) == (torch.uint8, torch.int64, list(range(11)))
    for image, label in zip(images, labels.tolist(), strict=True):
        expected = transform(Image.open(numbered / 'val' / f'{label:02d}' / 'image.jpg'))
        np.testing.assert_array_equal(image, expected)


@pytest.mark.parametrize('world_size', [1, 2, 3])
def test_evaluation_reads_every_sample_once(numbered, world_size):
    shards = [make(numbered, 'val', False, 2, rank=rank, world_size=world_size) for rank in range(world_size)]
    assert sorted(label for shard in shards for label in read(shard)[1].tolist()) == list(range(11))
    assert [len(list(shard)) for shard in shards] == [len(shard) for shard in shards]


def test_epochs_repeat_exactly_on_any_number_of_workers(numbered):
    first = make(numbered)
    epochs = [read(first, epoch) for epoch in (0, 1)]
    assert not torch.equal(epochs[0][1], epochs[1][1])
    with_workers = make(numbered, workers=2)
    for epoch in (1, 0):  # backwards: nothing depends on the epochs before
        images, labels = read(with_workers, epoch)
        assert torch.equal(labels, epochs[epoch][1])
        assert torch.equal(images, epochs[epoch][0])


def test_augmentation_changes_with_epoch_and_seed(numbered):
    def image_of_sample_5(seed, epoch):
        images, labels = read(make(numbered, batch_size=37, seed=seed), epoch)
        return images[labels == 5]

    images = [image_of_sample_5(*which) for which in ((1, 0), (1, 1), (2, 0))]
    assert not torch.equal(images[0], images[1])
    assert not torch.equal(images[0], images[2])


def test_ranks_share_an_epoch_without_overlap(numbered):
    labels = [read(make(numbered, batch_size=4, rank=rank, world_size=3))[1].tolist() for rank in range(3)]
    assert [len(part) for part in labels] == [12, 12, 12]
    assert len(set(sum(labels, []))) == 36


@pytest.mark.parametrize('workers', [0, 1])  # torch waits 5 s for each worker after an exception
def test_an_unreadable_image_is_named(tmp_path, crops, workers):
    folder = tmp_path / 'train' / 'a'
    folder.mkdir(parents=True)
    for index in range(4):
        crops[index].save(folder / f'{index}.jpg')
    (folder / '2.jpg').write_bytes((folder / '2.jpg').read_bytes()[:500])
    with pytest.raises(UnusableData, match=r'^/.*a/2.jpg cannot be read \(OSError.*, which skips such images$'):
        read(make(tmp_path, batch_size=2, workers=workers))


def test_a_worker_that_dies_ends_the_epoch(numbered, monkeypatch):
    """As one does that the system kills for its memory."""
    monkeypatch.setattr(ImageSource, 'read', lambda self, index: os._exit(9))
    with pytest.raises(RuntimeError, match='exited unexpectedly'):
        list(make(numbered, workers=1))


def test_leaving_epochs_early_leaves_no_processes_or_threads(numbered):
    batches = make(numbered, workers=1)
    list(batches)
    before = threading.active_count(), len(multiprocessing.active_children())
    for _ in range(3):
        next(iter(batches))
    assert (threading.active_count(), len(multiprocessing.active_children())) == before


def test_leaving_an_epoch_early_does_not_disturb_the_next(numbered):
    batches = make(numbered, workers=1)
    expected = read(batches, 1)
    for _ in range(3):
        batches.set_epoch(0)
        next(iter(batches))
    assert all(torch.equal(a, b) for a, b in zip(read(batches, 1), expected, strict=True))


def test_labels_beyond_the_model_are_named(numbered):
    with pytest.raises(UnusableData, match='has the label .*; --num-classes 5 allows 0 to 4'):
        read(make(numbered, num_classes=5))


def test_grey_input(numbered):
    transform = create_transform((1, 32, 32), use_prefetcher=True)
    images, _ = read(make(numbered, 'val', False, transform=transform, input_size=(1, 32, 32)))
    assert images.shape == (11, 1, 32, 32)
    with pytest.raises(ValueError, match='images have 1 or 3 channels, not 4'):
        make(numbered, input_size=(4, 32, 32))


class Reader:
    """Stands for a reader of timm that splits its stream between ranks, as webdataset's does."""
    num_samples = 11
    dist_rank, dist_num_replicas = 1, 2


class Stream(torch.utils.data.IterableDataset):
    """Yields (image, label) with labels 0, 1, 2, ...; split between workers and, where the reader says so, ranks."""

    def __init__(self):
        self.reader = Reader()
        self.epoch = None

    def set_loader_cfg(self, num_workers):
        self.workers = max(1, num_workers)

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __len__(self):
        return self.reader.num_samples

    def __iter__(self):
        worker = torch.utils.data.get_worker_info()
        mine = range(self.reader.dist_rank, self.reader.num_samples, self.reader.dist_num_replicas)
        for label in mine if worker is None else mine[worker.id::self.workers]:
            yield self.transform(Image.new('RGB', (32, 32), (label,) * 3)), label


@pytest.mark.parametrize('workers', [0, 2])
@pytest.mark.parametrize('world_size', [1, 3])
def test_streams_are_evaluated_exactly(workers, world_size):
    transform = create_transform(SIZE, use_prefetcher=True)
    seen = []
    for rank in range(world_size):
        source = ImageSource(Stream(), 'stream')
        options = LoaderOptions(
            input_size=SIZE, batch_size=3, num_classes=11, workers=workers, rank=rank, world_size=world_size)
        batches = StreamBatches(source, lambda size: transform, options, train=False)
        batches.set_epoch(4)
        images, labels = zip(*batches, strict=True)
        assert torch.equal(torch.cat(images)[:, 0, 0, 0].long(), torch.cat(labels))
        assert source.dataset.epoch == 4
        assert batches.order().tolist() == torch.cat(labels).tolist() or workers
        seen += torch.cat(labels).tolist()
    assert sorted(seen) == list(range(11))


def test_streams_are_trained_on_in_full_batches():
    transform = create_transform(SIZE, is_training=True, use_prefetcher=True)
    source = ImageSource(Stream(), 'stream')
    source.dataset.reader.dist_rank, source.dataset.reader.dist_num_replicas = 0, 1
    options = LoaderOptions(input_size=SIZE, batch_size=4, num_classes=11, workers=0)
    batches = StreamBatches(source, lambda size: transform, options, train=True)
    assert [len(labels) for _, labels in batches] == [4, 4]
    assert (len(batches), batches.num_samples) == (2, 11)
    batches = StreamBatches(source, lambda size: transform, replace(options, num_classes=3), train=True)
    with pytest.raises(UnusableData, match='^stream has the label 3; --num-classes 3 allows 0 to 2'):
        list(batches)
