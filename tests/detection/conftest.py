"""Small data sets of coloured rectangles in VOC and COCO format."""
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

COLORS = {'red': (220, 30, 30), 'blue': (30, 30, 220)}


def write_image(path: Path, width: int, height: int, objects: list) -> None:
    """A grey picture with a filled rectangle per object (name, (x1, y1, x2, y2), 0-based and half-open)."""
    pixels = np.full((height, width, 3), 128, dtype=np.uint8)
    for name, (x1, y1, x2, y2) in objects:
        pixels[y1:y2, x1:x2] = COLORS[name]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def voc_xml(width: int, height: int, objects: list) -> str:
    """A VOC annotation; objects are (name, (xmin, ymin, xmax, ymax) as VOC counts, difficult)."""
    items = ''.join(
        f'<object><name>{name}</name><difficult>{difficult}</difficult><bndbox><xmin>{b[0]}</xmin><ymin>{b[1]}</ymin>'
        f'<xmax>{b[2]}</xmax><ymax>{b[3]}</ymax></bndbox></object>' for name, b, difficult in objects)
    return f'<annotation><size><width>{width}</width><height>{height}</height></size>{items}</annotation>'


def add_voc(root: Path, split: str, images: dict[str, list], width: int = 64, height: int = 48) -> Path:
    """Write images {id: objects} of a split in VOC format; objects as for `voc_xml`."""
    for image_id, objects in images.items():
        shapes = [(name, (max(b[0] - 1, 0), max(b[1] - 1, 0), b[2], b[3])) for name, b, _ in objects if name in COLORS]
        write_image(root / 'JPEGImages' / f'{image_id}.png', width, height, shapes)
        (root / 'Annotations').mkdir(exist_ok=True)
        (root / 'Annotations' / f'{image_id}.xml').write_text(voc_xml(width, height, objects))
    lists = root / 'ImageSets' / 'Main'
    lists.mkdir(parents=True, exist_ok=True)
    (lists / f'{split}.txt').write_text('\n'.join(images) + '\n')
    return root


def add_coco(root: Path, split: str, images: list[dict], annotations: list[dict], categories: list[dict]) -> Path:
    """Write a split in COCO format; images have id, width, height."""
    for image in images:
        image['file_name'] = f'{image["id"]:04d}.png'
        write_image(root / split / image['file_name'], image['width'], image['height'], [])
    content = dict(images=images, categories=categories, annotations=[
        dict(id=index + 1, iscrowd=0, area=a['bbox'][2] * a['bbox'][3]) | a for index, a in enumerate(annotations)])
    (root / 'annotations').mkdir(exist_ok=True)
    (root / 'annotations' / f'instances_{split}.json').write_text(json.dumps(content))
    return root


@pytest.fixture(scope='session')
def rectangles(tmp_path_factory) -> Path:
    """Twelve training and five validation pictures in VOC format, one rectangle of either class in each."""
    rng, root = np.random.default_rng(0), tmp_path_factory.mktemp('rectangles')
    for split, count in (('trainval', 12), ('test', 5)):
        images = {}
        for index in range(count):
            x, y = rng.integers(1, 30), rng.integers(1, 20)
            images[f'{split}{index}'] = [(('red', 'blue')[index % 2], (x, y, x + 25, y + 20), 0)]
        add_voc(root, split, images)
    return root
