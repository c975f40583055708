"""Images with any number of labels: CSV files, and COCO's annotations of objects.

A CSV file has a header and a line for each image, the first column being the file. The labels are either in a column
`labels` or `tags`, as names separated by spaces, or by `;`, `|` or commas if the file has any of these between labels;
or every other column is a class, with 1 where an image has it and 0 where it has not.
"""
import csv
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any, BinaryIO

from timm.data.readers.reader import Reader

from alignmix_lab.runs.options import near_names

from .coco import coco_file, find_images, read_coco_file
from .folders import natural, split_names

LIST_COLUMNS = ('labels', 'tags')
_ON = {'0': False, '1': True, '0.0': False, '1.0': True}


class MultiLabelReader(Reader):
    """Reader of one split, for timm's ImageDataset.

    Args:
        root: Folder of the data set. The labels of a split `train` are `train.csv` or `train/_classes.csv` there, or
            COCO annotations as :func:`coco_file` finds them; a split may also be the path of a CSV file in `root`. The
            images are in `train`, `images/train`, `images` or `root` itself.
        split: Name of the split; the usual names of training or evaluation are synonyms.
        class_to_idx: Labels by name; None numbers the classes found: columns and COCO's categories in their order,
            other names in natural order.

    Attributes:
        source: File of the labels.
        samples: (file name, classes in increasing order) of every image, in the order of the file.

    Raises:
        ValueError: There is no file of labels, or it is damaged, lists an image twice, or has no images or unknown
            classes; or images are missing.
    """

    def __init__(self, root: str | Path, split: str, class_to_idx: dict[str, int] | None = None):
        super().__init__()
        self.source, name = _find(Path(root).expanduser(), split)
        read = _read_coco if self.source.suffix == '.json' else _read_csv
        labelled, names = read(self.source)
        repeated = [file for file, count in Counter(file for file, _ in labelled).items() if count > 1]
        if repeated or not labelled:
            raise ValueError(f'{self.source} lists {repeated[0]!r} twice' if repeated else
                             f'{self.source} lists no images')
        if class_to_idx is None:
            class_to_idx = {name: index for index, name in enumerate(names)}
        elif unknown := [name for name in names if name not in class_to_idx]:
            raise ValueError(
                f'{self.source} has classes that the training set lacks: {", ".join(unknown[:20])}'
                f'{near_names(unknown[0], class_to_idx)}')
        self.class_to_idx = class_to_idx
        self.folder = find_images(Path(root).expanduser(), name, [file for file, _ in labelled], self.source)
        self.samples = [(file, tuple(sorted({class_to_idx[name] for name in own}))) for file, own in labelled]

    def __getitem__(self, index: int) -> tuple[BinaryIO, tuple[int, ...]]:
        file, classes = self.samples[index]
        return open(self.folder / file, 'rb'), classes

    def __len__(self) -> int:
        return len(self.samples)

    def _filename(self, index: int, basename: bool = False, absolute: bool = False) -> str:
        file = self.samples[index][0]
        return os.path.basename(file) if basename else str(self.folder / file) if absolute else file


def _find(root: Path, split: str) -> tuple[Path, str]:
    """File of a split's labels, and the name that the split goes by there."""
    if not root.is_dir():
        raise ValueError(f'data folder {root} does not exist' if not root.exists() else f'{root} is not a folder')
    if split and (root / split).is_file():
        return root / split, Path(split).stem
    names = split_names(split)
    for name in names:
        for path in (root / f'{name}.csv', root / name / '_classes.csv'):
            if path.is_file():
                return path, name
        try:
            return coco_file(root, name), name
        except ValueError:
            continue
    raise ValueError(
        f'{root} has no labels for the split {split!r} (tried {", ".join(names)}): --multi-label reads SPLIT.csv, '
        'SPLIT/_classes.csv, or COCO annotations such as annotations/instances_SPLIT.json'
        + ('; without validation labels, --val-share 0.1 sets a tenth of the training images aside'
           if 'validation' in names else ''))


Labelled = list[tuple[str, list[str]]]  # file and names of its classes


def _read_coco(path: Path) -> tuple[Labelled, list[str]]:
    images, annotations, categories = read_coco_file(path)
    names = {category['id']: str(category['name']) for category in categories}
    classes: dict[Any, list[str]] = {image['id']: [] for image in images}
    for annotation in annotations:
        classes[annotation['image_id']].append(names[annotation['category_id']])
    return [(image['file_name'], classes[image['id']]) for image in images], list(names.values())


def _read_csv(path: Path) -> tuple[Labelled, list[str]]:
    try:
        with open(path, newline='', encoding='utf-8-sig') as file:
            header, *rows = (row for row in csv.reader(file, skipinitialspace=True, strict=True) if row)
    except (ValueError, csv.Error) as e:  # no header, or bytes that are no text
        raise ValueError(f'{path} is damaged, empty or no CSV file ({e})') from e
    columns = [name.strip() for name in header]
    for number, row in enumerate(rows, 2):
        if len(row) != len(columns):
            raise ValueError(
                f'{path}: entry {number} has {len(row)} cells, the header {len(columns)} ({", ".join(columns[:10])})')
    place = next((index for index, name in enumerate(columns) if index and name.lower() in LIST_COLUMNS), None)
    if place is not None:
        cells = [row[place].strip() for row in rows]
        separator = r'[;|,]' if any(re.search(r'[;|,]', cell) for cell in cells) else r'\s'
        lists = [[name for name in map(str.strip, re.split(separator, cell)) if name] for cell in cells]
        names = sorted({name for own in lists for name in own}, key=natural)
        return [(row[0].strip(), own) for row, own in zip(rows, lists, strict=True)], names
    names = columns[1:]
    if not names or len(set(names)) < len(names):
        raise ValueError(
            f'{path} needs a column labels, or one column of 0 and 1 for each class; its columns are '
            f'{", ".join(columns)}')
    labelled = []
    for number, row in enumerate(rows, 2):
        for name, cell in zip(names, row[1:], strict=True):
            if cell.strip() not in _ON:
                raise ValueError(
                    f'{path}: entry {number} has {cell!r} in the column {name}; it takes 0 or 1, or names of classes '
                    'in a column labels')
        labelled.append((row[0].strip(), [n for n, cell in zip(names, row[1:], strict=True) if _ON[cell.strip()]]))
    return labelled, names
