"""Annotation files in COCO format, for boxes and for labels of images alike."""
import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Entry = dict[str, Any]


def coco_file(root: Path, split: str) -> Path:
    """Find the annotation file of a split of a COCO-format folder.

    Raises:
        ValueError: There is none; the message says where it was looked for.
    """
    candidates = (
        root / 'annotations' / f'instances_{split}.json', root / 'annotations' / f'{split}.json',
        root / split / '_annotations.coco.json')
    for path in candidates:
        if path.is_file():
            return path
    raise ValueError(f'{root} has no annotations of split {split}: looked for ' + ', '.join(map(str, candidates)))


def read_coco_file(
        path: Path, image_keys: Sequence[str] = (), annotation_keys: Sequence[str] = ()
) -> tuple[list[Entry], list[Entry], list[Entry]]:
    """Read images, annotations and categories, the last in the order of their ids.

    Images have 'id' and 'file_name', annotations 'image_id' and 'category_id', categories 'id' and 'name', and all of
    them the further keys asked for.

    Raises:
        ValueError: The file is damaged or another, or an entry is incomplete, there twice, or of an unknown image or
            category.
    """
    try:
        content = json.loads(path.read_text(encoding='utf-8'))
        images = _entries(content, 'images', ('id', 'file_name', *image_keys), path)
        categories = _entries(content, 'categories', ('id', 'name'), path)
        annotations = _entries(content, 'annotations', ('image_id', 'category_id', *annotation_keys), path)
    except (ValueError, KeyError, TypeError) as e:
        raise ValueError(f'{path} is damaged or no COCO annotation file ({e})') from e
    for kind, entries, key in (
            ('images', images, 'id'), ('images', images, 'file_name'), ('categories', categories, 'id'),
            ('categories', categories, 'name')):
        repeated = [value for value, count in Counter(entry[key] for entry in entries).items() if count > 1]
        if repeated:
            raise ValueError(f'{path}: several {kind} have the {key} {repeated[0]!r}')
    known = {
        'image_id': {entry['id'] for entry in images}, 'category_id': {entry['id'] for entry in categories}}
    for annotation in annotations:
        for key, ids in known.items():
            if annotation[key] not in ids:
                raise ValueError(
                    f'{path}: annotation {annotation.get("id")} has the {key} {annotation[key]!r}, which the file does '
                    'not list')
    return images, annotations, sorted(categories, key=lambda category: category['id'])


def _entries(content: Any, kind: str, keys: Sequence[str], path: Path) -> list[Entry]:
    """Return a list of a COCO file whose entries have what is read of them."""
    for place, entry in enumerate(content[kind]):
        missing = [key for key in keys if key not in entry]
        if missing:
            raise ValueError(f'{kind}[{place}] (id {entry.get("id")}) has no {", ".join(missing)}')
    return content[kind]


def find_images(root: Path, split: str, names: Sequence[str], source: Path) -> Path:
    """Find the folder that has all the images of a file of labels or annotations, `source`.

    Raises:
        ValueError: No folder has all; the message counts those that each lacks.
    """
    missing: dict[Path, str] = {}
    for folder in (root / split, root / 'images' / split, root / 'images', root):
        if folder.is_dir():
            absent = sorted(name for name in set(names) if not (folder / name).is_file())
            if not absent:
                return folder
            missing[folder] = f'{len(absent)} of {len(names)} are not in {folder} (the first is {absent[0]})'
    raise ValueError(f'images of {source} are missing: ' + '; '.join(missing.values()))
