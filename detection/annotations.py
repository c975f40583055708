"""Annotations in VOC and COCO format, read into one form; objects that are left out are counted.

Boxes are (x1, y1, x2, y2) in pixels, 0-based and half-open: a box around the first pixel is (0, 0, 1, 1). VOC files
count pixels from 1 and include the last one, so (xmin, ymin, xmax, ymax) becomes (xmin - 1, ymin - 1, xmax, ymax).
Labels start at 1; 0 is the background.
"""
import logging
import math
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from alignmix_lab.data.images.coco import coco_file, find_images, read_coco_file
from alignmix_lab.data.images.folders import EXTENSIONS
from alignmix_lab.runs.options import near_names

_logger = logging.getLogger(__name__)

VOC_CLASSES = (
    'aeroplane', 'bicycle', 'bird', 'boat', 'bottle', 'bus', 'car', 'cat', 'chair', 'cow', 'diningtable', 'dog',
    'horse', 'motorbike', 'person', 'pottedplant', 'sheep', 'sofa', 'train', 'tvmonitor',
)


@dataclass
class Record:
    """One image and its objects."""

    image_id: str | int  # the file's name without suffix (VOC) or the image's id (COCO)
    path: Path
    width: int  # in pixels
    height: int
    boxes: np.ndarray  # (N, 4) float64
    labels: np.ndarray  # (N,) int64, from 1
    difficult: np.ndarray  # (N,) bool, VOC's flag of objects ignored by the evaluation
    crowd: np.ndarray  # (N,) bool, COCO's flag of regions with many objects
    areas: np.ndarray  # (N,) float64 in pixels; in COCO the area of the object's outline, not of its box

    def select(self, keep: np.ndarray) -> 'Record':
        """Return a copy with some of the objects, given by a boolean mask or indices."""
        names = ('boxes', 'labels', 'difficult', 'crowd', 'areas')
        return replace(self, **{name: getattr(self, name)[keep] for name in names})


@dataclass
class Annotations:
    """Images of a split with their objects."""

    records: list[Record]
    class_names: list[str]  # of labels 1, 2, ...
    left_out: Counter = field(default_factory=Counter)  # number of dropped or changed objects and images, by reason
    category_ids: dict[str, int] = field(default_factory=dict)  # COCO's ids of the classes, by name

    def describe(self) -> str:
        """Describe images, boxes and omissions in one line."""
        boxes = sum(len(record.labels) for record in self.records)
        text = f'{len(self.records):,} images with {boxes:,} boxes of {len(self.class_names)} classes'
        left_out = ', '.join(f'{reason}: {count}' for reason, count in sorted(self.left_out.items()))
        return f'{text} ({left_out})' if left_out else text


def clean(annotations: Annotations, training: bool, keep_difficult: bool = True) -> Annotations:
    """Drop or repair unusable boxes, and count them.

    Boxes without area and boxes completely outside their image are dropped. For training, the others are clipped to the
    image, and crowd regions, difficult objects unless kept, and finally images without boxes are dropped.
    """
    left_out, records = Counter(annotations.left_out), []
    for record in annotations.records:
        record = _drop(record, _no_area(record.boxes), 'boxes without area dropped', left_out)
        limit = np.array([record.width, record.height] * 2, dtype=np.float64)
        inside = record.boxes.clip(0, limit)
        record = _drop(record, outside := _no_area(inside), 'boxes outside their image dropped', left_out)
        if training:
            inside = inside[~outside]
            left_out['boxes clipped to their image'] += int((np.abs(inside - record.boxes).max(1) > 1).sum())
            record = replace(record, boxes=inside)
            record = _drop(record, record.crowd, 'crowd regions dropped', left_out)
            if not keep_difficult:
                record = _drop(record, record.difficult, 'difficult objects dropped', left_out)
            if not len(record.labels):
                left_out['images without boxes dropped'] += 1
                continue
        records.append(record)
    return replace(annotations, records=records, left_out=+left_out)


def _no_area(boxes: np.ndarray) -> np.ndarray:
    return ((boxes[:, 2:] - boxes[:, :2]) <= 0).any(1)


def _drop(record: Record, mask: np.ndarray, reason: str, left_out: Counter) -> Record:
    left_out[reason] += int(mask.sum())
    return record.select(~mask) if mask.any() else record


def read_voc(data_dir: str | Path, split: str, class_names: Sequence[str] | None = None) -> Annotations:
    """Read splits of VOC-format folders (Annotations, JPEGImages, ImageSets/Main inside).

    Args:
        data_dir: Such a folder, or VOCdevkit with VOC2007 and VOC2012 inside.
        split: Name of a file in ImageSets/Main, for VOCdevkit after the year; several are joined by '+', as in
            '2007_trainval+2012_trainval'.
        class_names: The classes in order; None for the names found, in alphabetical order.

    Raises:
        ValueError: A folder, list, annotation or image is missing or damaged, or a class is unknown.
    """
    root, items = Path(data_dir), []
    for part in split.split('+'):
        year, _, name = part.rpartition('_')
        folder = root / f'VOC{year}' if year and (root / f'VOC{year}').is_dir() else root
        name = name if folder != root else part
        items += [(folder, image_id) for image_id in _read_split(folder, name)]
    parsed = [_read_voc_file(folder, image_id) for folder, image_id in items]
    found = sorted({name for _, names in parsed for name in names})
    known = list(class_names) if class_names else found
    images = {folder: _image_files(folder / 'JPEGImages') for folder in {folder for folder, _ in items}}
    records = []
    for (folder, image_id), (record, names) in zip(items, parsed, strict=True):
        if image_id not in images[folder]:
            raise ValueError(f'{folder / "JPEGImages"} has no image {image_id} (of split {split})')
        source = folder / 'Annotations' / f'{image_id}.xml'
        record.path = images[folder][image_id]
        record.labels = np.array([_label(name, known, source) for name in names], dtype=np.int64)
        records.append(record)
    return Annotations(records, known)


def _label(name: str, known: Sequence[str], source: Path) -> int:
    if name not in known:
        raise ValueError(
            f'{source}: unknown class {name!r}{near_names(name, known)}; the classes are {", ".join(known)} '
            '(--class-names sets them)')
    return known.index(name) + 1


def _read_split(folder: Path, name: str) -> list[str]:
    path = folder / 'ImageSets' / 'Main' / f'{name}.txt'
    if not path.is_file():
        splits = sorted(p.stem for p in path.parent.glob('*.txt'))
        hint = f'there are {", ".join(splits)}' if splits else (
            f'{folder} is no VOC-format folder (Annotations, JPEGImages, ImageSets/Main)')
        raise ValueError(f'{path}: no such split; {hint}')
    # The lists of single classes have a second column, which tells whether the image shows the class.
    ids = [line.split()[0] for line in path.read_text(encoding='utf-8').splitlines() if line.strip()]
    repeated = [image_id for image_id, count in Counter(ids).items() if count > 1]
    if repeated:
        raise ValueError(f'{path} lists images twice: {", ".join(repeated[:5])}')
    if not ids:
        raise ValueError(f'{path} lists no image')
    return ids


def _image_files(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise ValueError(f'{folder}: no such folder of images')
    return {path.stem: path for path in folder.iterdir() if path.suffix.lower() in EXTENSIONS}


def _read_voc_file(folder: Path, image_id: str) -> tuple[Record, list[str]]:
    """Read the objects of an annotation file, without image and labels, and the names of their classes."""
    path = folder / 'Annotations' / f'{image_id}.xml'
    try:
        tree = ET.parse(path).getroot()
        width, height = int(tree.findtext('size/width')), int(tree.findtext('size/height'))
        objects = tree.findall('object')
        names = [str(item.findtext('name')).strip() for item in objects]
        boxes = np.array(
            [[float(item.findtext(f'bndbox/{key}')) for key in ('xmin', 'ymin', 'xmax', 'ymax')] for item in objects],
            dtype=np.float64).reshape(-1, 4)
        difficult = np.array([int(item.findtext('difficult') or 0) for item in objects], dtype=bool)
    except FileNotFoundError as e:
        raise ValueError(f'{path}: no such annotation') from e
    except (ET.ParseError, TypeError, ValueError) as e:  # a value is missing or not a number
        raise ValueError(f'{path} is damaged or no VOC annotation ({e})') from e
    boxes[:, :2] -= boxes[:, :2] < boxes[:, 2:]  # a box that ends where it starts is a mistake and keeps no area
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    empty = np.zeros(len(names), dtype=np.int64)
    return Record(image_id, path, width, height, boxes, empty, difficult, empty.astype(bool), areas), names


def read_coco(data_dir: str | Path, split: str, class_names: Sequence[str] | None = None) -> Annotations:
    """Read a split of a COCO-format folder.

    Category ids may have gaps; labels number the categories in the order of their ids.

    Args:
        data_dir: Folder with annotations/instances_SPLIT.json, annotations/SPLIT.json or SPLIT/_annotations.coco.json,
            and images in SPLIT, images/SPLIT or images.
        split: Name of the split, such as 'train2017'.
        class_names: Names of the categories in order; None for those of the file.

    Raises:
        ValueError: The file or an image is missing, an entry is incomplete, malformed or there twice, or a class is
            unknown.
    """
    path = coco_file(Path(data_dir), split)
    images, annotations, categories = read_coco_file(path, ('width', 'height'), ('bbox',))
    _check_coco(path, images, annotations)
    known = list(class_names) if class_names else [category['name'] for category in categories]
    used = {annotation['category_id'] for annotation in annotations}
    labels = {c['id']: _label(c['name'], known, path) for c in categories if c['id'] in used or c['name'] in known}
    by_image: dict[int, list[dict[str, Any]]] = {image['id']: [] for image in images}
    for annotation in annotations:
        by_image[annotation['image_id']].append(annotation)
    folder = find_images(Path(data_dir), split, [image['file_name'] for image in images], path)
    records = [_coco_record(image, by_image[image['id']], labels, folder) for image in images]
    return Annotations(records, known, category_ids={category['name']: category['id'] for category in categories})


def _check_coco(path: Path, images: list[dict[str, Any]], annotations: list[dict[str, Any]]) -> None:
    for image in images:
        if not all(isinstance(image[side], int) and image[side] > 0 for side in ('width', 'height')):
            raise ValueError(f'{path}: image {image["id"]} is {image["width"]!r} x {image["height"]!r} pixels')
    for annotation in annotations:
        box = annotation['bbox']
        if not (isinstance(box, list) and len(box) == 4 and all(
                isinstance(value, (int, float)) and math.isfinite(value) for value in box)):
            raise ValueError(
                f'{path}: annotation {annotation.get("id")} has the bbox {box!r}; it takes four finite numbers: x, y, '
                'width, height')


def _coco_record(
        image: dict[str, Any], annotations: list[dict[str, Any]], labels: dict[int, int], folder: Path) -> Record:
    boxes = np.array([annotation['bbox'] for annotation in annotations], dtype=np.float64).reshape(-1, 4)
    areas = [annotation.get('area', w * h) for annotation, (_, _, w, h) in zip(annotations, boxes, strict=True)]
    boxes[:, 2:] += boxes[:, :2]
    return Record(
        image_id=image['id'],
        path=folder / image['file_name'],
        width=image['width'],
        height=image['height'],
        boxes=boxes,
        labels=np.array([labels[annotation['category_id']] for annotation in annotations], dtype=np.int64),
        difficult=np.zeros(len(annotations), dtype=bool),
        crowd=np.array([annotation.get('iscrowd', 0) for annotation in annotations], dtype=bool),
        areas=np.array(areas, dtype=np.float64),
    )
