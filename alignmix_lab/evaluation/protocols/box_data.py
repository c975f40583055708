"""Localization data: image folders with boxes in the format of CUB-200-2011 or VOC."""
import xml.etree.ElementTree as ET
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from alignmix_lab.data.images.folders import TRAIN_FOLDERS
from alignmix_lab.data.images.sources import ImageSource

from ..base import NotApplicable

CUB_FILES = ('images.txt', 'image_class_labels.txt', 'train_test_split.txt', 'bounding_boxes.txt')


@dataclass(frozen=True)
class BoxImage:
    """An image and its objects."""
    path: Path
    boxes: dict[str, np.ndarray]  # by class, (N, 4) of (x0, y0, x1, y1) in pixels of the file, inclusive and from 0


class BoxSource(ImageSource):
    """Images with boxes; `dataset` is a list of :class:`BoxImage`, and labels have no meaning."""

    def read(self, index: int) -> tuple[Any, int]:
        return open(self.dataset[index].path, 'rb'), 0

    def describe(self, index: int) -> str:
        return str(self.dataset[index].path)


def open_boxes(folder: str | None, split: str) -> BoxSource:
    """Open a folder of images with boxes.

    Args:
        folder: CUB-200-2011 (images.txt etc.) or VOC (Annotations, JPEGImages, ImageSets/Main).
        split: For CUB: 'train', or else the test images. For VOC: a file of ImageSets/Main; 'validation' also finds val
            or test.

    Raises:
        NotApplicable: The folder has neither format.
        ValueError: A file is missing or damaged.
    """
    root = Path(folder or '')
    if folder and (root / CUB_FILES[-1]).is_file():
        return read_cub(root, split)
    if folder and (root / 'Annotations').is_dir():
        return read_voc(root, split)
    raise NotApplicable(
        f'localization needs boxes, and --data-dir {folder} has none: it takes folders in the format of CUB-200-2011 '
        f'({", ".join(CUB_FILES)}, images) or of VOC (Annotations, JPEGImages, ImageSets/Main)')


def read_cub(root: Path, split: str) -> BoxSource:
    """Read the training or test images of a CUB-200-2011 folder.

    Its files list boxes as x, y, width, height. As in public evaluations, x + width is the last column of a box.
    """
    tables = {name: cub_table(root, name) for name in CUB_FILES}
    paths, labels, is_train, boxes = tables.values()
    names = cub_class_names(root, paths, labels)
    wanted = '1' if split in TRAIN_FOLDERS else '0'
    images = []
    for key, (path, *_) in paths.items():
        if is_train[key][0] != wanted:
            continue
        x, y, width, height = map(float, boxes[key])
        name = names[labels[key][0]]
        images.append(BoxImage(root / 'images' / path, {name: np.array([[x, y, x + width, y + height]])}))
    if not images:
        raise ValueError(f'{root / "train_test_split.txt"} marks no image of split {split!r}')
    return BoxSource(images, f'{root.name}, {split}', list(names.values()))


def cub_table(root: Path, name: str) -> dict[str, list[str]]:
    """Read the rows of one of CUB's text files, by id.

    Raises:
        ValueError: The file is missing, or its ids are not those of images.txt.
    """
    if not (root / name).is_file():
        raise ValueError(f'{root} has no {name}; the format of CUB-200-2011 has {", ".join(CUB_FILES)} and images')
    rows = [line.split() for line in (root / name).read_text(encoding='utf-8').splitlines() if line.strip()]
    columns = {'bounding_boxes.txt': 5}.get(name, 2)
    wrong = next((row for row in rows if len(row) != columns), None)
    if wrong:
        raise ValueError(f'{root / name}: expected {columns} values per line, got {" ".join(wrong)!r}')
    table = {key: values for key, *values in rows}
    if name not in ('images.txt', 'classes.txt'):
        ids = cub_table(root, 'images.txt').keys()
        if table.keys() != ids:
            odd = sorted(table.keys() ^ ids)[:5]
            raise ValueError(f'{root / name} has other ids than images.txt: {", ".join(odd)}')
    return table


def cub_class_names(root: Path, paths: dict[str, list[str]], labels: dict[str, list[str]]) -> dict[str, str]:
    """Class names by CUB's class ids, in order; the names are those of the image folders."""
    names = {labels[key][0]: Path(path).parent.name for key, (path,) in paths.items()}
    ordered = sorted(names.items(), key=lambda entry: int(entry[0]))
    if [name for _, name in ordered] != sorted(names.values()) or len(set(names.values())) != len(names):
        raise ValueError(
            f'{root / "image_class_labels.txt"}: the classes are not the image folders in alphabetical order')
    return dict(ordered)


def read_voc(root: Path, split: str) -> BoxSource:
    """Read the images of a split of a VOC folder that show objects; difficult boxes are included."""
    lists = root / 'ImageSets' / 'Main'
    candidates = (split, 'val', 'test') if split == 'validation' else (split,)
    path = next((lists / f'{name}.txt' for name in candidates if (lists / f'{name}.txt').is_file()), None)
    if path is None:
        there = ', '.join(sorted(file.stem for file in lists.glob('*.txt'))) or 'none'
        raise ValueError(f'{lists} has no list for --split {split}; it has: {there}')
    ids = [line.split()[0] for line in path.read_text(encoding='utf-8').splitlines() if line.strip()]
    files = {file.stem: file for file in (root / 'JPEGImages').iterdir()}
    missing = [image_id for image_id in ids if image_id not in files]
    if missing:
        raise ValueError(f'{root / "JPEGImages"} lacks images of {path.name}: {", ".join(missing[:5])}')
    images = [BoxImage(files[image_id], _voc_boxes(root / 'Annotations' / f'{image_id}.xml')) for image_id in ids]
    images = [image for image in images if image.boxes]
    if not images:
        raise ValueError(f'{path}: none of its {len(ids)} images shows an object')
    names = sorted({name for image in images for name in image.boxes})
    return BoxSource(images, f'{root.name}, {path.stem}', names)


def _voc_boxes(path: Path) -> dict[str, np.ndarray]:
    """Read boxes by class; VOC counts pixels from 1."""
    boxes: dict[str, list[list[float]]] = {}
    try:
        for item in ET.parse(path).getroot().findall('object'):
            corners = [float(item.findtext(f'bndbox/{key}')) - 1 for key in ('xmin', 'ymin', 'xmax', 'ymax')]
            boxes.setdefault(str(item.findtext('name')).strip(), []).append(corners)
    except (OSError, ET.ParseError, TypeError, ValueError) as e:  # e.g. a missing or malformed number
        raise ValueError(f'{path} is missing, damaged or not a VOC annotation ({e!r})') from e
    return {name: np.array(corners) for name, corners in boxes.items()}
