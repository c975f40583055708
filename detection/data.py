"""Detection data sets and their loaders: VOC, COCO and any folder in either format."""
import logging
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import tv_tensors
from torchvision.transforms.v2.functional import pil_to_tensor

from alignmix_lab.data.images.coco import coco_file
from alignmix_lab.data.images.decode import UnusableData, decode_image
from alignmix_lab.data.worker_signals import end_with_parent, iterate

from .annotations import VOC_CLASSES, Annotations, Record, clean, read_coco, read_voc
from .batches import TrainBatches, aspect_ratio_groups

_logger = logging.getLogger(__name__)

# (images, targets): tensors (3, H, W) in [0, 1]; dicts of boxes (N, 4) and labels (N,).
Batch = tuple[list[torch.Tensor], list[dict[str, Any]]]


def read_annotations(
        dataset: str, data_dir: str, train_split: str | None = None, val_split: str | None = None,
        class_names: Sequence[str] | None = None, keep_difficult: bool = True) -> tuple[Annotations, Annotations]:
    """Read the training and the validation split of a folder in the format 'voc' or 'coco'.

    The defaults are those of the options: for the splits VOC 2007 + 2012 trainval and 2007 test, train2017 and
    val2017, or the folder's own; for the classes VOC's 20 in VOCdevkit, else those of the training split.

    Raises:
        ValueError: Something is missing or damaged; the message names it and suggests a remedy.
    """
    read, find = _format(dataset, data_dir)
    if train_split is None or val_split is None:
        found = find(Path(data_dir))
        train_split, val_split = train_split or found[0], val_split or found[1]
    if class_names is None and dataset == 'voc' and _has_years(Path(data_dir)):
        class_names = VOC_CLASSES
    train = read(data_dir, train_split, class_names)
    val = read(data_dir, val_split, train.class_names)
    shared = {record.path for record in train.records} & {record.path for record in val.records}
    if shared:
        _logger.warning(f'{len(shared)} images are both in {train_split} and in {val_split}')
    return clean(train, True, keep_difficult), clean(val, False)


def read_validation(dataset: str, data_dir: str, split: str | None, class_names: Sequence[str]) -> Annotations:
    """Read only the validation split; see :func:`read_annotations`."""
    read, find = _format(dataset, data_dir)
    return clean(read(data_dir, split or find(Path(data_dir))[1], class_names), False)


def _format(dataset: str, data_dir: str) -> tuple[Callable, Callable]:
    """Return the functions that read a split and that find the names of the splits."""
    if not Path(data_dir).is_dir():
        raise ValueError(f'--data-dir {data_dir}: no such folder')
    return {'voc': (read_voc, find_voc_splits), 'coco': (read_coco, find_coco_splits)}[dataset]


def _has_years(root: Path) -> bool:
    return (root / 'VOC2007').is_dir() or (root / 'VOC2012').is_dir()


def find_voc_splits(root: Path) -> tuple[str, str]:
    """Find the training and validation split of a VOC-format folder, or of VOCdevkit."""
    if _has_years(root):
        years = [year for year in ('2007', '2012') if (root / f'VOC{year}').is_dir()]
        return '+'.join(f'{year}_trainval' for year in years), '2007_test'
    there = {path.stem for path in (root / 'ImageSets' / 'Main').glob('*.txt')}
    return _choose(root, there, [('trainval', 'test'), ('train', 'val'), ('train', 'test')])


def find_coco_splits(root: Path) -> tuple[str, str]:
    """Find the training and validation split of a COCO-format folder."""
    there = set()
    for name in ('train2017', 'val2017', 'train', 'val', 'valid', 'validation', 'test'):
        try:
            coco_file(root, name)
        except ValueError:
            continue
        there.add(name)
    pairs = [('train2017', 'val2017'), *(('train', name) for name in ('val', 'valid', 'validation', 'test'))]
    return _choose(root, there, pairs)


def _choose(root: Path, there: set[str], pairs: list[tuple[str, str]]) -> tuple[str, str]:
    for pair in pairs:
        if there.issuperset(pair):
            return pair
    raise ValueError(
        f'{root}: found splits {", ".join(sorted(there)) or "none"}; name them with --train-split and --val-split')


class DetectionDataset(Dataset):
    """Images with their boxes.

    An augmented image depends on (seed, epoch, index) alone, and not on the number of workers or on a resume. The
    transform maps a uint8 image and a dict of boxes and labels to the same.
    """

    def __init__(self, records: Sequence[Record], transform: Callable | None = None, seed: int = 0):
        self.records = records
        self.transform = transform
        self.seed = seed
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, dict[str, Any]]:
        record = self.records[index]
        image = read_image(record)
        target = dict(
            boxes=tv_tensors.BoundingBoxes(
                torch.from_numpy(record.boxes).float(), format='XYXY', canvas_size=(record.height, record.width)),
            labels=torch.from_numpy(record.labels),
        )
        if self.transform is not None:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed((self.seed * 1_000_003 + self.epoch) * 1_000_003 + index)
                image, target = self.transform(tv_tensors.Image(image), target)
        boxes = target['boxes'].as_subclass(torch.Tensor).reshape(-1, 4)
        return image, dict(boxes=boxes, labels=target['labels'], index=index)


def open_image(path: Path, upright: bool = True) -> torch.Tensor:
    """Read an image file as uint8 (3, H, W), turned as its EXIF orientation says or as it is stored.

    Raises:
        UnusableData: The file is damaged.
    """
    try:
        return pil_to_tensor(decode_image(path, upright=upright))
    except Exception as e:  # Pillow raises many types on damaged files
        raise UnusableData(f'{path} is damaged or no image ({e})') from e


def read_image(record: Record) -> torch.Tensor:
    """Read the image of a record as uint8 (3, H, W).

    Raises:
        UnusableData: The file is damaged, or its size differs from the annotation.
    """
    image, size = open_image(record.path), (record.height, record.width)
    if image.shape[1:] != size and image.shape[1:] == size[::-1]:
        image = open_image(record.path, upright=False)  # its boxes were drawn on the pixels as they are stored
    if image.shape[1:] != size:
        raise UnusableData(
            f'{record.path} is {image.shape[2]}x{image.shape[1]} pixels, but its annotation says '
            f'{record.width}x{record.height}')
    return image


class DetectionLoader:
    """Batches of a data set on the device.

    In training, every process gets its own part of a shuffled epoch, without the last partial batch. In evaluation, the
    processes share the images and every image is used once. `batch_size` is that of one process.

    Raises:
        ValueError: The training images do not fill a batch.
    """

    def __init__(
            self, dataset: DetectionDataset, batch_size: int, training: bool, workers: int = 0,
            device: torch.device | str = 'cpu', seed: int = 0, rank: int = 0, world_size: int = 1,
            pin_mem: bool = False, aspect_ratio_group_factor: int = 0):
        self.dataset, self.device = dataset, device
        shared = dict(num_workers=workers, collate_fn=_collate, pin_memory=pin_mem, worker_init_fn=end_with_parent)
        if training:
            groups = aspect_ratio_groups(dataset.records, aspect_ratio_group_factor)
            self.batches = TrainBatches(groups, batch_size, seed, rank, world_size)
            self.loader = DataLoader(dataset, batch_sampler=self.batches, **shared)
        else:
            part = Subset(dataset, range(rank, len(dataset), world_size))
            self.loader = DataLoader(part, batch_size, **shared)

    def __len__(self) -> int:
        return len(self.loader)

    def set_epoch(self, epoch: int, start: int = 0) -> None:
        """Select a training epoch, which determines order and augmentation, and its first batch."""
        self.dataset.epoch = self.batches.epoch = epoch
        self.batches.start = start

    def __iter__(self) -> Iterator[Batch]:
        for images, targets in iterate(self.loader):
            images = [image.to(self.device, non_blocking=True).float() / 255 for image in images]
            yield images, send_to_device(targets, self.device, non_blocking=True)


def _collate(samples: list[tuple[torch.Tensor, dict[str, Any]]]) -> Batch:
    images, targets = zip(*samples, strict=True)
    return list(images), list(targets)
