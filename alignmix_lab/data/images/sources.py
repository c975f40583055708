"""Sources of images and labels: ImageFolder roots, files of labels and timm's dataset names."""
import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import torch.utils.data
from timm.data import ImageDataset, create_dataset
from timm.data.readers.class_map import load_class_map

from ..order import shuffled
from .folders import FolderReader, Skipped, check_folders, find_split_folder, log_skipped
from .multi_label import MultiLabelReader

PREFIXES = ('torch', 'hfds', 'hfids', 'tfds', 'wds')
STREAMS = ('hfids', 'tfds', 'wds')  # read sequentially


class ImageSource:
    """A split of a dataset from timm's create_dataset(): images with integer labels.

    Args:
        title: Name for messages.
        class_names: Names by label, if known.
        class_to_idx: Class map for the evaluation split, if the classes are folder names.
        indices: The part of the dataset that belongs to the split; None for all.
    """

    def __init__(
            self, dataset: Any, title: str, class_names: list[str] | None = None,
            class_to_idx: dict[str, int] | None = None, skipped: Sequence[Skipped] = (),
            indices: Sequence[int] | None = None):
        self.dataset = dataset
        self.title = title
        self.class_names = class_names
        self.class_to_idx = class_to_idx
        self.skipped = skipped
        self.indices = range(len(dataset)) if indices is None and not self.is_stream else indices

    @property
    def is_stream(self) -> bool:
        return isinstance(self.dataset, torch.utils.data.IterableDataset)

    @property
    def _listed(self) -> list[tuple[str, int]] | None:
        return getattr(getattr(self.dataset, 'reader', None), 'samples', None)

    @property
    def labels(self) -> list[int] | None:
        """Labels of all samples, if they are known without reading images."""
        return None if self._listed is None else [self._listed[index][1] for index in self.indices]

    def read_labels(self) -> list[int]:
        """Labels of all samples; reads the samples where the dataset does not list them.

        Raises:
            ValueError: The images are read in sequence.
        """
        if self.is_stream:
            raise ValueError(
                f'{self.title} is read in sequence, so the number of images of each class is not known; convert it '
                'with python -m alignmix_lab convert')
        if self._listed is not None:
            return self.labels
        targets = getattr(self.dataset, 'targets', None)
        return [int(self.read(place)[1] if targets is None else targets[index])
                for place, index in enumerate(self.indices)]

    @property
    def largest_label(self) -> int | None:
        """Largest label of a sample, if known without reading images."""
        return max(self.labels or (), default=None)

    @property
    def num_classes(self) -> int | None:
        """Number of classes by name or label, if known."""
        largest = self.largest_label
        return max(len(self.class_names or []), 0 if largest is None else largest + 1) or None

    @property
    def num_samples(self) -> int:
        """Samples of the split over all processes; 0 if a stream does not say."""
        return self.dataset.reader.num_samples if self.is_stream else len(self.indices)

    def read(self, index: int) -> tuple[Any, int]:
        """Return an open file or a PIL image, and its label."""
        index = self.indices[index]
        if not hasattr(self.dataset, 'reader'):
            return self.dataset[index]  # torchvision's
        image, label = self.dataset.reader[index]
        return image, label

    def describe(self, index: int) -> str:
        """File name of a sample, or its index in the dataset."""
        if self._listed is not None:
            return self.dataset.filename(self.indices[index], absolute=True)
        return f'{self.title}[{self.indices[index]}]'

    def listing(self) -> bytes:
        """Content of a text file with a line per image: its file within the split, or its index in the dataset."""
        names = map(str, self.indices) if self._listed is None else map(self.dataset.filename, self.indices)
        return os.fsencode(''.join(f'{name}\n' for name in names))

    def divide(self, share: float, seed: int) -> tuple['ImageSource', 'ImageSource']:
        """Divide into training and validation images, the latter a share of each class.

        The choice depends on the seed, the label and the order of the file names. At least one image of a class is for
        training.

        Raises:
            ValueError: The images are read in sequence, or are too few.
        """
        by_class = self._by_class(f'--val-share {share}', 'it needs a --val-split of its own')
        chosen = set()
        for label, members in by_class.items():
            count = min(max(round(share * len(members)), 1), len(members) - 1)
            if self._listed is not None:
                members.sort(key=self.dataset.filename)
            chosen.update(members[place] for place in shuffled(len(members), seed, label)[:count])
        if not chosen:
            raise ValueError(f'--val-share {share}: {self.title} has one image per class, none for validation')
        return self._part([index for index in self.indices if index not in chosen]), self._part(sorted(chosen))

    def first(self, count: int) -> 'ImageSource':
        """Keep the first images of each class, `count` or as many as there are.

        Raises:
            ValueError: The images are read in sequence.
        """
        by_class = self._by_class(f'--train-samples {count}', 'leave it out')
        return self._part(sorted(index for members in by_class.values() for index in members[:count]))

    def _by_class(self, flag: str, remedy: str) -> dict[int, list[int]]:
        """Indices of each label, in their order."""
        if self.is_stream:
            raise ValueError(f'{flag}: {self.title} is read in sequence; {remedy}')
        by_class = defaultdict(list)
        for index, label in zip(self.indices, self.read_labels(), strict=True):
            by_class[label].append(index)
        return by_class

    def _part(self, indices: Sequence[int]) -> 'ImageSource':
        return type(self)(self.dataset, self.title, self.class_names, self.class_to_idx, self.skipped, indices)


class MultiLabelSource(ImageSource):
    """Images with any number of labels: `labels`, and those of `read`, are tuples of classes."""

    @property
    def largest_label(self) -> int | None:
        return max((label for labels in self.labels for label in labels), default=None)

    def count_images(self) -> dict[str, int]:
        """Number of images of each class, by name."""
        counts = Counter(label for labels in self.labels for label in labels)
        return {name: counts[label] for label, name in enumerate(self.class_names)}

    def first(self, count: int) -> ImageSource:
        raise ValueError(
            f'--train-samples {count} counts the images of a class, of which --multi-label images may have several; '
            'leave it out')

    def _by_class(self, flag: str, remedy: str) -> dict[int, list[int]]:
        return {0: list(self.indices)}  # a division takes its share of all images


def _open_folder(root: str, split: str, class_map: str, class_to_idx: dict[str, int] | None) -> ImageSource:
    folder = str(find_split_folder(root, split))
    if class_map:  # may leave classes out on purpose
        try:
            reader = FolderReader(folder, load_class_map(class_map, str(root)))
        except AssertionError as error:
            raise ValueError(f'class map {class_map!r}: {error}') from error
    else:
        reader = FolderReader(folder)
        check_folders(reader)
        if class_to_idx is not None:
            unknown = sorted(set(reader.class_to_idx) - set(class_to_idx))
            if unknown:
                raise ValueError(f'{folder} has classes that the training set lacks: {", ".join(unknown[:20])}')
            reader = FolderReader(folder, class_to_idx)
    log_skipped(reader)
    mapping = reader.class_to_idx
    return ImageSource(ImageDataset(folder, reader=reader), folder, _names(mapping), mapping, reader.skipped)


def _names(class_to_idx: dict[str, int]) -> list[str] | None:
    if not class_to_idx:
        return None
    names = {index: str(name) for name, index in class_to_idx.items()}
    return [names.get(index, str(index)) for index in range(max(names) + 1)]


def _open_named(name: str, root: str | None, split: str, class_map: str, download: bool, **stream) -> ImageSource:
    prefix = name.partition('/')[0].lower()
    if '/' not in name or prefix not in PREFIXES:
        raise ValueError(
            f'dataset {name!r} is unknown; use a name with one of the prefixes {", ".join(p + "/" for p in PREFIXES)}, '
            'such as torch/cifar10, or leave --dataset out for folders')
    if prefix in ('torch', 'wds') and not root:
        raise ValueError(
            f'dataset {name!r} needs --data-dir, the folder that holds it (or will, with --dataset-download)')
    options = {} if prefix == 'torch' else {'class_map': class_map}
    if prefix in STREAMS:
        options.update(stream)
    try:
        dataset = create_dataset(name, root=root, split=split, download=download, **options)
    except (AssertionError, FileNotFoundError, RuntimeError) as error:
        raise ValueError(f'dataset {name!r}, split {split!r} in {root}: {error}') from error
    reader = getattr(dataset, 'reader', None)
    names = _names(reader.class_to_idx) if reader is not None else getattr(dataset, 'classes', None)
    return ImageSource(dataset, f'{name}:{split}', names)


def open_source(
        data_dir: str | None, dataset: str = '', split: str = 'train', class_map: str = '', download: bool = False,
        class_to_idx: dict[str, int] | None = None, multi_label: bool = False, **stream) -> ImageSource:
    """Open one split.

    Args:
        data_dir: ImageFolder root, or the folder of a named dataset.
        dataset: timm dataset name; '' for folders.
        split: Name of the split or of its folder.
        class_map: timm class map file; '' for none.
        download: Let the dataset's library download it.
        class_to_idx: Labels by class folder, from the training split.
        multi_label: Read a file of labels instead of class folders, see :class:`MultiLabelReader`.
        **stream: Options of create_dataset() that only sequential datasets take: is_training, batch_size, seed.

    Raises:
        ValueError: The data is missing or unusable; the message says what was looked for.
    """
    if dataset:
        return _open_named(dataset, data_dir, split, class_map, download, **stream)
    if not data_dir:
        raise ValueError('no data: give --data-dir (an ImageFolder root) or --dataset (a timm dataset name)')
    if multi_label:
        reader = MultiLabelReader(data_dir, split, class_to_idx)
        mapping = reader.class_to_idx
        return MultiLabelSource(
            ImageDataset(str(reader.folder), reader=reader), str(reader.source), _names(mapping), mapping)
    return _open_folder(data_dir, split, class_map, class_to_idx)
