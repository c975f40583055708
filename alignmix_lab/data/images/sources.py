"""Find images and labels: ImageFolder roots and timm's dataset names, checked before any work starts."""
from collections.abc import Sequence
from typing import Any

import torch.utils.data
from timm.data import ImageDataset, create_dataset
from timm.data.readers.class_map import load_class_map

from .folders import EVAL_FOLDERS as EVAL_FOLDERS
from .folders import EXTENSIONS as EXTENSIONS
from .folders import TRAIN_FOLDERS as TRAIN_FOLDERS
from .folders import FolderReader, Skipped, check_folders, find_split_folder, log_skipped

PREFIXES = ('torch', 'hfds', 'hfids', 'tfds', 'wds')
STREAMS = ('hfids', 'tfds', 'wds')  # read in sequence only


class ImageSource:
    """A split of a dataset: images with integer labels.

    Args:
        dataset: A dataset made by timm's create_dataset().
        title: Name for messages.
        class_names: Names by label, where known.
        class_to_idx: Class map to hand on to the evaluation split, where the classes are folder names.
        skipped: Files and folders that are not read.
    """

    def __init__(
            self,
            dataset: Any,
            title: str,
            class_names: list[str] | None = None,
            class_to_idx: dict[str, int] | None = None,
            skipped: Sequence[Skipped] = (),
    ):
        self.dataset = dataset
        self.title = title
        self.class_names = class_names
        self.class_to_idx = class_to_idx
        self.skipped = skipped

    @property
    def is_stream(self) -> bool:
        return isinstance(self.dataset, torch.utils.data.IterableDataset)

    @property
    def labels(self) -> list[int] | None:
        """Labels of all samples, where they are known without reading images."""
        samples = getattr(getattr(self.dataset, 'reader', None), 'samples', None)
        return None if samples is None else [label for _, label in samples]

    @property
    def num_samples(self) -> int:
        """Samples of the split, over all processes. 0 where a stream does not say."""
        return self.dataset.reader.num_samples if self.is_stream else len(self.dataset)

    def read(self, index: int) -> tuple[Any, int]:
        """An open file or a PIL image, and its label."""
        if not hasattr(self.dataset, 'reader'):
            return self.dataset[index]  # torchvision's
        image, label = self.dataset.reader[index]
        return image, label

    def describe(self, index: int) -> str:
        """File name of a sample, or its place in the dataset."""
        if getattr(getattr(self.dataset, 'reader', None), 'samples', None) is not None:
            return self.dataset.filename(index, absolute=True)
        return f'{self.title}[{index}]'


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
            f'dataset {name!r} needs --data-dir, the folder where it is (or, with --dataset-download, goes)')
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
        data_dir: str | None,
        dataset: str = '',
        split: str = 'train',
        class_map: str = '',
        download: bool = False,
        class_to_idx: dict[str, int] | None = None,
        **stream,
) -> ImageSource:
    """Open one split.

    Args:
        data_dir: ImageFolder root, or the folder of a named dataset.
        dataset: timm dataset name; '' for folders.
        split: Name of the split or of its folder.
        class_map: timm class map file; '' for none.
        download: Let the dataset's library download it.
        class_to_idx: Labels by class folder, those of the training split, so that evaluation counts classes alike.
        **stream: Options of create_dataset() for datasets read in sequence: is_training, batch_size, seed.

    Raises:
        ValueError: Nothing usable is there; the message says what was looked for.
    """
    if dataset:
        return _open_named(dataset, data_dir, split, class_map, download, **stream)
    if not data_dir:
        raise ValueError('no data: give --data-dir (an ImageFolder root) or --dataset (a timm dataset name)')
    return _open_folder(data_dir, split, class_map, class_to_idx)
