"""Find images and labels: ImageFolder roots and timm's dataset names, checked before any work starts."""
import logging
import os
from pathlib import Path
from typing import Any

import torch.utils.data
from timm.data import create_dataset
from timm.data.readers.class_map import load_class_map

_logger = logging.getLogger(__name__)

PREFIXES = ('torch', 'hfds', 'hfids', 'tfds', 'wds')
STREAMS = ('hfids', 'tfds', 'wds')  # read in sequence only
EXTENSIONS = ('.bmp', '.gif', '.jpeg', '.jpg', '.pgm', '.png', '.ppm', '.tif', '.tiff', '.webp')
TRAIN_FOLDERS = ('train', 'training')
EVAL_FOLDERS = ('validation', 'val', 'valid', 'eval', 'evaluation', 'test')


class ImageSource:
    """A split of a dataset: images with integer labels.

    Args:
        dataset: A dataset made by timm's create_dataset().
        title: Name for messages.
        class_names: Names by label, where known.
        class_to_idx: Class map to hand on to the evaluation split, where the classes are folder names.
    """

    def __init__(
            self,
            dataset: Any,
            title: str,
            class_names: list[str] | None = None,
            class_to_idx: dict[str, int] | None = None,
    ):
        self.dataset = dataset
        self.title = title
        self.class_names = class_names
        self.class_to_idx = class_to_idx

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


def find_split_folder(root: str | Path, split: str) -> Path:
    """The folder of a split in an ImageFolder root; the usual names of training and evaluation folders are synonyms.

    Raises:
        ValueError: The root or the folder is missing; the message lists what is there.
    """
    root = Path(root).expanduser()
    if not root.is_dir():
        raise ValueError(f'data folder {root} does not exist' if not root.exists() else f'{root} is not a folder')
    names = [split]
    for synonyms in (TRAIN_FOLDERS, EVAL_FOLDERS):
        if split in synonyms:
            names += synonyms
    for name in names:
        if name and (root / name).is_dir():
            if name != split:
                _logger.info(f'Split {split!r}: using the folder {root / name}')
            return root / name
    there = sorted(entry.name for entry in root.iterdir() if entry.is_dir())
    raise ValueError(
        f'{root} has no folder for the split {split!r} (tried {", ".join(dict.fromkeys(names))}); it has: '
        f'{", ".join(there[:20]) or "no folders"}. Expected {root}/train/<class>/ and {root}/validation/<class>/')


def _check_folders(folder: Path, samples: list[tuple[str, int]]) -> None:
    """Every folder in a split has images, none lie outside of the folders, and links do not list a folder twice."""
    places = [os.path.relpath(os.path.dirname(name), folder).split(os.sep)[0] for name, _ in samples]
    if '.' in places:
        raise ValueError(f'images lie directly in {folder}, such as {samples[places.index(".")][0]}; '
                         'expected one folder per class')
    folders = {entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith('.')}
    empty = sorted(folders - set(places))
    if empty:
        raise ValueError(
            f'{len(empty)} class folders in {folder} have no images that can be listed ({", ".join(EXTENSIONS)}): '
            f'{", ".join(empty[:20])}; fill them or remove them')
    folder_of: dict[str, str] = {}
    for place in sorted({os.path.dirname(name) for name, _ in samples}):
        first = folder_of.setdefault(os.path.realpath(place), place)
        if first != place:
            raise ValueError(f'{place} and {first} are the same folder, through a symbolic link; remove the link')


def _open_folder(root: str, split: str, class_map: str, class_to_idx: dict[str, int] | None) -> ImageSource:
    folder = find_split_folder(root, split)

    def scan(mapping: dict[str, int] | str) -> Any:
        try:
            return create_dataset(
                '', root=str(folder), search_split=False, class_map=mapping, input_key=';'.join(EXTENSIONS))
        except RuntimeError as error:  # timm's "Found 0 images"
            raise ValueError(
                f'no images in the class folders of {folder} (extensions {", ".join(EXTENSIONS)})') from error

    if class_map:  # may leave classes out on purpose
        try:
            dataset = scan(load_class_map(class_map, str(root)))
        except AssertionError as error:
            raise ValueError(f'class map {class_map!r}: {error}') from error
    else:
        dataset = scan('')
        _check_folders(folder, dataset.reader.samples)
        if class_to_idx is not None:
            unknown = sorted(set(dataset.reader.class_to_idx) - set(class_to_idx))
            if unknown:
                raise ValueError(f'{folder} has classes that the training set lacks: {", ".join(unknown[:20])}')
            dataset = scan(class_to_idx)
    mapping = dataset.reader.class_to_idx
    return ImageSource(dataset, str(folder), _names(mapping), mapping)


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
