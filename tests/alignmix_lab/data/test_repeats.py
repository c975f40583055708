"""Samples that come several times in an epoch: --balanced-sampling and --aug-repeats, in timm's loader and in FFCV."""
import functools
from collections import Counter
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from alignmix_lab.data import WriteSettings, convert, create_loaders
from alignmix_lab.data.images.sources import ImageSource
from alignmix_lab.data.options import LoaderOptions
from alignmix_lab.data.timm_loader import StreamBatches

COUNTS = (23, 9, 5)  # images by class
KINDS = ['timm', pytest.param('ffcv', marks=pytest.mark.skipif(find_spec('ffcv') is None, reason='no FFCV'))]


@pytest.fixture(scope='module')
def imbalanced(tmp_path_factory, crops):
    """Folder by loader of the same images, of classes of different sizes."""
    root = tmp_path_factory.mktemp('imbalanced')
    for split in ('train', 'val'):
        images = iter(crops)
        for label, count in enumerate(COUNTS):
            folder = root / split / str(label)
            folder.mkdir(parents=True)
            for index in range(count):
                next(images).save(folder / f'{index:02d}.png')

    @functools.cache
    def folder(kind):
        if kind == 'timm':
            return root
        convert(str(root), root / 'betons', settings=WriteSettings(max_resolution=160), workers=0, progress=False)
        return root / 'betons'
    return folder


@pytest.fixture(scope='module')
def open_train(imbalanced):
    """Callable: the training loader; loaders of one kind share their options, so that FFCV compiles once."""
    def make(kind, batch_size=3, **options):
        return create_loaders(
            str(imbalanced(kind)), loader=kind, input_size=(3, 16, 16), batch_size=batch_size, seed=1, workers=0,
            **options).train
    return make


def read(loader, epoch, start=0):
    loader.set_epoch(epoch, start)
    images, labels = zip(*loader, strict=True)
    return torch.cat(images), torch.cat(labels)


@pytest.mark.parametrize('kind', KINDS)
def test_every_class_is_read_equally_often(open_train, kind):
    loader = open_train(kind, balanced_sampling=True)
    assert Counter(loader.labels().tolist()) == dict(enumerate(COUNTS))
    images, labels = read(loader, 2)
    assert torch.bincount(labels).tolist() == [12, 12, 12]  # 12 batches of 3 from 37 images
    assert loader.labels()[loader.order()].tolist() == labels.tolist()
    used = Counter(loader.order().tolist())
    assert sorted(used.values())[-1] == 3  # 12 draws from 5 images
    for sample, count in used.items():
        copies = images[torch.from_numpy(loader.order() == sample)]
        assert len(copies.flatten(1).unique(dim=0)) == count, 'copies are augmented alike'
    late_images, late_labels = read(loader, 2, start=7)
    assert torch.equal(late_images, images[21:]) and torch.equal(late_labels, labels[21:])


@pytest.mark.parametrize('kind', KINDS)
def test_copies_do_not_depend_on_the_number_of_ranks(open_train, kind):
    """Steps of two processes together have the images of one."""
    options = dict(balanced_sampling=True, aug_repeats=2)
    images, labels = read(open_train(kind, batch_size=6, **options), 1)
    ranks = [read(open_train(kind, batch_size=3, rank=rank, world_size=2, **options), 1) for rank in (0, 1)]
    for step in range(6):
        together = torch.cat([part[0][3 * step:3 * step + 3] for part in ranks])
        assert torch.equal(together[[0, 3, 1, 4, 2, 5]], images[6 * step:6 * step + 6])


@pytest.mark.parametrize('kind', KINDS)
def test_augmentation_is_repeated(open_train, kind):
    loader = open_train(kind, aug_repeats=3)
    images, labels = read(loader, 0)
    order = loader.order().reshape(12, 3)
    assert (order == order[:, :1]).all() and len(set(order[:, 0])) == 12 == len(loader)
    assert labels.tolist() == loader.labels()[order.ravel()].tolist()
    assert len(images.flatten(1).unique(dim=0)) == 36
    plain = open_train(kind)
    once, _ = read(plain, 0)
    places = {sample: place for place, sample in enumerate(plain.order().tolist())}
    for place, sample in enumerate(order[:, 0]):  # the first copy is the one of an epoch without repeats
        assert sample not in places or torch.equal(images[3 * place], once[places[sample]])


def test_random_erasing_differs_between_copies(open_train):
    loader = open_train('timm', aug_repeats=3, reprob=1.0, remode='const', hflip=0.0, scale=(1, 1), ratio=(1, 1))
    images, _ = read(loader, 0)
    masks = (images == 0).all(1).reshape(12, 3, -1)
    assert sum(len(copies.unique(dim=0)) for copies in masks) > 30


@pytest.mark.skipif(find_spec('ffcv') is None, reason='no FFCV')
def test_a_file_larger_than_memory(open_train):
    with pytest.raises(ValueError, match='larger than memory .* --balanced-sampling needs --loader timm'):
        open_train('ffcv', balanced_sampling=True, os_cache=False)
    loader = open_train('ffcv', aug_repeats=3, os_cache=False, batch_size=1)
    assert Counter(Counter(loader.order().tolist()).values()) == {3: 12, 1: 1}


def test_streams_and_halves_are_refused():
    class Stream(torch.utils.data.IterableDataset):
        class reader:
            num_samples = 24

        def __iter__(self):
            return iter(())

    source = ImageSource(Stream(), 'stream')
    for option in ({'balanced_sampling': True}, {'aug_repeats': 3}):
        with pytest.raises(ValueError, match='stream is read in sequence, and --balanced-sampling and --aug-repeats'):
            StreamBatches(source, None, LoaderOptions(**option), train=True)
    with pytest.raises(ValueError, match='--aug-repeats 0.5 repeats nothing'):
        LoaderOptions(aug_repeats=0.5)


def test_labels_of_a_part_of_a_dataset():
    """Of a dataset that lists the labels of all its images, such as torchvision's."""
    class Listed:
        targets = [3, 0, 2, 1]

        def __len__(self):
            return 4

    part = ImageSource(Listed(), 'listed', indices=[2, 3])
    assert part.read_labels() == [2, 1]
    assert np.array_equal(part.first(1).indices, [2, 3])
