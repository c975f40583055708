"""1,001 images through both loaders, on one to three ranks: evaluation reads each once, training each at most once."""
import multiprocessing
import os
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from alignmix_lab.data.device_loader import DeviceLoader
from alignmix_lab.data.images.sources import ImageSource
from alignmix_lab.data.options import LoaderOptions
from alignmix_lab.data.timm_loader import TimmBatches

COUNT = 1001
SIZE = (3, 8, 8)


class Numbered(torch.utils.data.Dataset):
    """Images that show their number, which is their label, too."""

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        return Image.new('RGB', SIZE[1:], divmod(index, 256) + (0,)), index


@pytest.fixture(scope='module')
def info(tmp_path_factory):
    pytest.importorskip('ffcv', reason='FFCV is not installed')
    from alignmix_lab.data.ffcv.beton import BetonWriter, encode_sample, inspect_beton
    path = tmp_path_factory.mktemp('counting') / 'all.beton'
    writer = BetonWriter(path, COUNT, page_size=1 << 14)  # small pages: the order that follows pages has 12 of them
    for image, label in (Numbered()[index] for index in range(COUNT)):
        writer.append(encode_sample(np.asarray(image), label, as_jpeg=False, jpeg_quality=90))
    writer.close()
    return inspect_beton(path)


@pytest.fixture(scope='module', params=['ffcv', 'ffcv, page by page', 'timm'])
def make(request):
    """Callable: the loader of a rank; FFCV's is compiled once for each split and batch size."""
    compiled = {}
    common = dict(input_size=SIZE, mean=(0,) * 3, std=(1 / 255,) * 3, no_aug=True, crop_pct=1.0)

    def get(train, batch_size, rank, world_size):
        if request.param == 'timm':
            transform = create_transform(SIZE, use_prefetcher=True, crop_pct=1.0)
            options = LoaderOptions(
                **common, num_classes=COUNT, batch_size=batch_size, workers=0, rank=rank, world_size=world_size)
            batches = TimmBatches(ImageSource(Numbered(), 'numbered'), lambda size: transform, options, train)
            return DeviceLoader(batches, options, train)
        from alignmix_lab.data.ffcv.loader import FFCVBatches
        options = LoaderOptions(**common, batch_size=batch_size, workers=1, os_cache=request.param == 'ffcv')
        if (train, batch_size) not in compiled:
            compiled[train, batch_size] = FFCVBatches(request.getfixturevalue('info'), options, train)
        batches = compiled[train, batch_size]
        batches._rank_of = rank, world_size
        return DeviceLoader(batches, options, train)
    return get


def numbers_read(loader):
    """Labels of an epoch; the images show the same."""
    images, labels = zip(*loader, strict=True)
    assert len(labels) == len(loader)
    images, labels = torch.cat(images), torch.cat(labels)
    shown = images[:, :2].round().long()
    assert torch.equal(shown[:, 0, 4, 4] * 256 + shown[:, 1, 4, 4], labels)
    return labels.tolist()


@pytest.mark.parametrize('batch_size', [64, 1001])
def test_evaluation_reads_every_image_once(make, batch_size):
    for world_size in (1, 2, 3):
        seen = []
        for rank in range(world_size):
            seen += numbers_read(make(False, batch_size, rank, world_size))
        assert seen == list(range(COUNT))


@pytest.mark.parametrize('batch_size', [64])
def test_training_reads_an_image_at_most_once_an_epoch(make, batch_size):
    for world_size in (1, 2, 3):
        seen = []
        for rank in range(world_size):
            loader = make(True, batch_size, rank, world_size)
            loader.set_epoch(1)
            seen += numbers_read(loader)
        assert len(set(seen)) == len(seen) == COUNT // (batch_size * world_size) * batch_size * world_size


def test_leaving_epochs_early_leaves_nothing_behind(make):
    def held():
        return threading.active_count(), len(os.listdir('/proc/self/fd')), len(multiprocessing.active_children())

    loader = make(True, 64, 0, 1)
    list(loader)
    before = held()
    for _ in range(5):
        for _batch in loader:
            break
    # Not more: what earlier tests left may go away meanwhile.
    assert all(now <= then for now, then in zip(held(), before, strict=True))
