"""Reading VOC and COCO data, what is refused, what is left out, and the loaders."""
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from detection.annotations import VOC_CLASSES, Record, clean, read_coco, read_voc
from detection.batches import TrainBatches, aspect_ratio_groups
from detection.data import DetectionDataset, DetectionLoader, find_voc_splits, read_annotations, read_image
from detection.transforms import AUGMENTATIONS, create_transform, multiscale_sizes

from .conftest import add_coco, add_voc, voc_xml

CATEGORIES = [dict(id=90, name='blue'), dict(id=7, name='red')]


def test_voc_boxes_become_zero_based_and_half_open(tmp_path):
    add_voc(tmp_path, 'train', {'a': [('red', (1, 1, 64, 48), 0), ('blue', (11, 21, 20, 40), 1)]})
    read = read_voc(tmp_path, 'train')
    (record,) = read.records
    assert read.class_names == ['blue', 'red']
    assert record.boxes.tolist() == [[0, 0, 64, 48], [10, 20, 20, 40]]
    assert record.labels.tolist() == [2, 1] and record.difficult.tolist() == [False, True]
    # The box covers the pixels that were painted, and no other.
    image = read_image(record)
    x1, y1, x2, y2 = record.boxes[1].astype(int)
    blue = (image[2] > 200).nonzero()
    assert blue.min(0).values.tolist() == [y1, x1] and blue.max(0).values.tolist() == [y2 - 1, x2 - 1]


def test_voc_years_are_joined(tmp_path):
    add_voc(tmp_path / 'VOC2007', 'trainval', {'a': [('cat', (1, 1, 9, 9), 0)]})
    add_voc(tmp_path / 'VOC2007', 'test', {'c': [('dog', (1, 1, 9, 9), 0)]})
    add_voc(tmp_path / 'VOC2012', 'trainval', {'a': [('dog', (1, 1, 9, 9), 0)], 'b': [('cat', (1, 1, 9, 9), 0)]})
    assert find_voc_splits(tmp_path) == ('2007_trainval+2012_trainval', '2007_test')
    train, val = read_annotations('voc', str(tmp_path))
    assert train.class_names == list(VOC_CLASSES) == val.class_names
    assert [r.path.parent.parent.name for r in train.records] == ['VOC2007', 'VOC2012', 'VOC2012']
    assert [r.labels.tolist() for r in train.records] == [[8], [12], [8]]
    train, _ = read_annotations('voc', str(tmp_path), train_split='2007_trainval')
    assert len(train.records) == 1


def test_clean_counts_what_it_leaves_out(tmp_path):
    add_voc(tmp_path, 'train', {
        'good': [('red', (5, 5, 20, 20), 0)],
        'mixed': [('red', (5, 5, 5, 20), 0), ('red', (70, 5, 90, 20), 0), ('blue', (50, 30, 80, 60), 0),
                  ('red', (2, 2, 9, 9), 1)],
        'none': [],
    })
    read = read_voc(tmp_path, 'train')
    train = clean(read, training=True, keep_difficult=False)
    assert [r.image_id for r in train.records] == ['good', 'mixed']
    assert train.records[1].boxes.tolist() == [[49, 29, 64, 48]]
    assert train.left_out == {
        'boxes without area dropped': 1, 'boxes outside their image dropped': 1, 'boxes clipped to their image': 1,
        'difficult objects dropped': 1, 'images without boxes dropped': 1}
    assert 'images without boxes dropped: 1' in train.describe()
    val = clean(read, training=False)  # every image is evaluated, difficult objects are known
    assert [len(r.labels) for r in val.records] == [1, 2, 0] and val.records[1].difficult.sum() == 1
    assert val.records[1].boxes[0].tolist() == [49, 29, 80, 60]


def test_coco_sparse_ids_crowd_and_empty_images(tmp_path):
    images = [dict(id=i, width=64, height=48) for i in (42, 7, 9)]
    annotations = [
        dict(image_id=42, category_id=90, bbox=[10, 10, 20, 5], area=60),
        dict(image_id=42, category_id=7, bbox=[0, 0, 64, 48], iscrowd=1),
        dict(image_id=9, category_id=7, bbox=[1.5, 2.5, 3, 4]),
    ]
    add_coco(tmp_path, 'train', images, annotations, CATEGORIES)
    add_coco(tmp_path, 'val', [dict(id=1, width=64, height=48)], [], CATEGORIES)
    read = read_coco(tmp_path, 'train')
    assert read.class_names == ['red', 'blue']  # in the order of their ids
    assert [r.image_id for r in read.records] == [42, 7, 9]
    assert read.records[0].boxes.tolist() == [[10, 10, 30, 15], [0, 0, 64, 48]]
    assert read.records[0].labels.tolist() == [2, 1] and read.records[0].areas.tolist() == [60, 64 * 48]
    train, val = read_annotations('coco', str(tmp_path))
    assert [(r.image_id, r.labels.tolist()) for r in train.records] == [(42, [2]), (9, [1])]
    assert train.left_out == {'crowd regions dropped': 1, 'images without boxes dropped': 1}
    assert len(val.records) == 1


def _damage(root, what):
    if what == 'image':
        (root / 'JPEGImages' / 'a.png').unlink()
    elif what == 'xml':
        (root / 'Annotations' / 'a.xml').write_text('<annotation><object>')
    elif what == 'no xml':
        (root / 'Annotations' / 'a.xml').unlink()
    elif what == 'number':
        (root / 'Annotations' / 'a.xml').write_text(voc_xml(64, 48, [('red', (1, 1, 'x', 4), 0)]))
    elif what == 'twice':
        (root / 'ImageSets' / 'Main' / 'train.txt').write_text('a\na\n')


@pytest.mark.parametrize('what, message', [
    ('image', 'has no image a'),
    ('xml', 'a.xml is damaged'),
    ('no xml', 'a.xml: no such annotation'),
    ('number', "a.xml is damaged or no VOC annotation .*'x'"),
    ('twice', 'lists images twice: a'),
])
def test_damaged_voc_data_is_refused(tmp_path, what, message):
    add_voc(tmp_path, 'train', {'a': [('red', (1, 1, 9, 9), 0)]})
    _damage(tmp_path, what)
    with pytest.raises(ValueError, match=message):
        read_voc(tmp_path, 'train')


def test_unknown_classes_and_splits_are_refused(tmp_path):
    add_voc(tmp_path, 'train', {'a': [('red', (1, 1, 9, 9), 0)]})
    with pytest.raises(ValueError, match="unknown class 'red'; did you mean redd.*--class-names"):
        read_voc(tmp_path, 'train', ['redd', 'blue'])
    with pytest.raises(ValueError, match='no such split; there are train'):
        read_voc(tmp_path, 'val')
    with pytest.raises(ValueError, match='no VOC-format folder'):
        read_voc(tmp_path / 'JPEGImages', 'train')
    with pytest.raises(ValueError, match='found splits train; name them'):
        read_annotations('voc', str(tmp_path))
    with pytest.raises(ValueError, match='no such folder'):
        read_annotations('voc', str(tmp_path / 'absent'))
    images = [dict(id=1, width=64, height=48)]
    add_coco(tmp_path, 'train', images, [dict(image_id=1, category_id=7, bbox=[1, 1, 2, 2])], CATEGORIES)
    with pytest.raises(ValueError, match="unknown class 'red'"):
        read_coco(tmp_path, 'train', ['blue'])
    (tmp_path / 'train' / '0001.png').unlink()
    with pytest.raises(ValueError, match=r'are missing: 1 of 1 are not in .*0001.png'):
        read_coco(tmp_path, 'train')
    with pytest.raises(ValueError, match='no annotations of split val'):
        read_coco(tmp_path, 'val')
    path = tmp_path / 'annotations' / 'instances_train.json'
    path.write_text(json.dumps(dict(images=[])))
    with pytest.raises(ValueError, match='no COCO annotation file'):
        read_coco(tmp_path, 'train')


def test_images_that_are_not_their_annotation_are_refused(tmp_path):
    add_voc(tmp_path, 'train', {'a': [('red', (1, 1, 9, 9), 0)]})
    (record,) = read_voc(tmp_path, 'train').records
    Image.new('RGB', (30, 30)).save(record.path)
    with pytest.raises(ValueError, match='a.png is 30x30 pixels, but its annotation says 64x48'):
        DetectionDataset([record])[0]
    record.path.write_bytes(b'no image')
    with pytest.raises(ValueError, match='^/.*a.png is damaged'):  # also by a worker
        list(DetectionLoader(DetectionDataset([record]), 1, False, workers=1))


@pytest.mark.parametrize('name', AUGMENTATIONS)
def test_augmented_boxes_cover_what_they_covered(rectangles, name):
    """Whatever moves the image moves its boxes: inside a box the colour of its class is still found, outside not."""
    train, _ = read_annotations('voc', str(rectangles))
    dataset = DetectionDataset(train.records, create_transform(name, 96))
    seen = 0
    for epoch in range(3):
        dataset.epoch = epoch
        for index in range(4):
            image, target = dataset[index]
            assert image.dtype == torch.uint8 and type(image) is torch.Tensor and type(target['boxes']) is torch.Tensor
            if name == 'lsj':
                assert image.shape == (3, 96, 96)
            if name == 'ssd':  # its colours change too
                assert (target['boxes'][:, 2:] > target['boxes'][:, :2]).all() and len(target['boxes']) == 1
                continue
            for box, label in zip(target['boxes'], target['labels'], strict=True):
                hue = image[{'red': 0, 'blue': 2}[train.class_names[label - 1]]].int() - image[1].int()
                x1, y1, x2, y2 = box.round().int().tolist()
                if x2 - x1 < 4 or y2 - y1 < 4:
                    continue
                seen += 1
                assert (hue[y1 + 1:y2 - 1, x1 + 1:x2 - 1] > 100).float().mean() > 0.95
                rest = hue.clone()
                rest[max(y1 - 1, 0):y2 + 1, max(x1 - 1, 0):x2 + 1] = 0
                assert (rest > 100).sum() == 0
    assert seen or name == 'ssd'


def test_unknown_augmentation_and_sizes():
    with pytest.raises(ValueError, match="'nope' must be one of none, hflip"):
        create_transform('nope', 300)
    assert multiscale_sizes(800) == (480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800)


def _indices(loader):
    return [target['index'] for _, targets in loader for target in targets]


def test_loaders_share_the_images(rectangles):
    train, val = read_annotations('voc', str(rectangles))
    parts = [DetectionLoader(DetectionDataset(val.records), 2, False, rank=r, world_size=2) for r in range(2)]
    assert [len(part) for part in parts] == [2, 1]
    assert sorted(sum(map(_indices, parts), [])) == list(range(5))  # no image twice, although 5 is odd
    parts = [DetectionLoader(DetectionDataset(train.records), 4, True, rank=r, world_size=2) for r in range(2)]
    orders = []
    for epoch in range(2):
        for part in parts:
            part.set_epoch(epoch)
        orders.append([_indices(part) for part in parts])
        assert len(set(sum(orders[-1], []))) == 8 and len(parts[0]) == 1  # 6 of 12 each: a batch of 4, the rest dropped
    assert orders[0] != orders[1]
    with pytest.raises(ValueError, match='12 samples, not enough for one batch of 8 on each of 2 processes'):
        DetectionLoader(DetectionDataset(train.records), 8, True, world_size=2)


def test_an_epoch_can_begin_at_a_batch(rectangles):
    train, _ = read_annotations('voc', str(rectangles))
    loader = DetectionLoader(DetectionDataset(train.records), 2, True)
    loader.set_epoch(3)
    whole = _indices(loader)
    loader.set_epoch(3, start=4)
    assert _indices(loader) == whole[8:] and len(loader) == 6
    loader.set_epoch(3)
    assert _indices(loader) == whole


def test_batches_hold_images_of_one_shape():
    sizes = [(640, 480)] * 33 + [(480, 640)] * 30 + [(1500, 500)] * 9 + [(100, 400)] * 5
    records = [Record(f'{i}', Path(f'{i}.jpg'), *size, *[np.zeros(0)] * 5) for i, size in enumerate(sizes)]
    groups = aspect_ratio_groups(records, 3)
    # Bins begin at 2 ** (k / 3), k = -3..3: 4/3 lies between 2 ** (1/3) = 1.26 and 1.59, 3/4 between 0.63 and 0.79.
    assert groups.tolist() == [5] * 33 + [2] * 30 + [7] * 9 + [0] * 5
    orders = []
    for epoch in range(2):
        ranks = [TrainBatches(groups, 4, 0, rank, 2) for rank in range(2)]
        for batches in ranks:
            batches.epoch = epoch
        steps = [sum(batches, []) for batches in zip(*ranks, strict=True)]  # of both processes together
        assert len(steps) == len(ranks[0]) == 77 // 8 and all(len(step) == 8 for step in steps)
        assert len(set(sum(steps, []))) == 72  # no image twice
        # 33, 30, 9 and 5 images fill 4, 3, 1 and 0 batches of 8 alone; one is left over for the rest.
        assert sum(len({groups[i] for i in step}) == 1 for step in steps) == 8
        orders.append(steps)
    assert orders[0] != orders[1]
    one = TrainBatches(groups, 8, 0, 0, 1)
    one.epoch = 1
    assert [sorted(batch) for batch in one] == [sorted(step) for step in orders[1]]  # for any number of processes
    assert not aspect_ratio_groups(records, 0).any()


def test_a_batch_depends_on_seed_and_epoch_alone(rectangles):
    train, _ = read_annotations('voc', str(rectangles))

    def first(workers, epoch, seed=0):
        dataset = DetectionDataset(train.records, create_transform('ssd', 96), seed)
        loader = DetectionLoader(dataset, 3, True, workers=workers, seed=seed)
        loader.set_epoch(epoch)
        images, targets = next(iter(loader))
        assert images[0].dtype == torch.float32 and 0 <= images[0].min() and images[0].max() <= 1
        return [image.sum().item() for image in images], [target['boxes'].tolist() for target in targets]

    assert first(0, 1) == first(1, 1)
    state = torch.get_rng_state()
    DetectionDataset(train.records, create_transform('ssd', 96))[0]
    assert torch.equal(torch.get_rng_state(), state)  # augmentation takes nothing from the detector's draws
    assert first(0, 1) != first(0, 2) and first(0, 1) != first(0, 1, seed=1)


def test_targets_are_what_detectors_take(rectangles):
    train, _ = read_annotations('voc', str(rectangles))
    empty = train.records[0].select(np.zeros(1, dtype=bool))
    image, target = DetectionDataset([empty], create_transform('hflip', 64))[0]
    assert image.shape == (3, 48, 64)
    assert target['boxes'].shape == (0, 4) and target['labels'].dtype == torch.int64


def coco_file_with(tmp_path, **changes):
    """A sound COCO split of two images and two boxes, with some lists changed by functions of them."""
    images = [dict(id=1, width=64, height=48), dict(id=2, width=64, height=48)]
    annotations = [
        dict(image_id=image_id, category_id=category['id'], bbox=[1, 1, 2, 2])
        for image_id, category in zip((1, 2), CATEGORIES, strict=False)]
    add_coco(tmp_path, 'train', images, annotations, CATEGORIES)
    path = tmp_path / 'annotations' / 'instances_train.json'
    content = json.loads(path.read_text())
    for name, change in changes.items():
        change(content[name])
    path.write_text(json.dumps(content))
    return tmp_path


@pytest.mark.parametrize('changes, said', [
    (dict(images=lambda entries: entries[1].update(id=1)), 'several images have the id 1'),
    (dict(images=lambda entries: entries[1].update(file_name='0001.png')), 'several images have the file_name'),
    (dict(images=lambda entries: entries[1].pop('width')), r'images\[1\] \(id 2\) has no width'),
    (dict(images=lambda entries: entries[1].update(height=0)), 'image 2 is 64 x 0 pixels'),
    (dict(categories=lambda entries: entries[1].update(id=entries[0]['id'])), 'several categories have the id'),
    (dict(categories=lambda entries: entries[1].update(name=entries[0]['name'])), 'several categories have the name'),
    (dict(annotations=lambda entries: entries[1].pop('bbox')), r'annotations\[1\] \(id 2\) has no bbox'),
    (dict(annotations=lambda entries: entries[1].pop('category_id')), r'annotations\[1\] .* no category_id'),
    (dict(annotations=lambda entries: entries[1].update(bbox=[1, 1, 2])), 'annotation 2 has the bbox .* four finite'),
    (dict(annotations=lambda entries: entries[1].update(bbox=[1, 1, 2, float('nan')])), 'annotation 2 has the bbox'),
    (dict(annotations=lambda entries: entries[1].update(bbox=None)), 'annotation 2 has the bbox None'),
    (dict(annotations=lambda entries: entries[1].update(image_id=9)), 'annotation 2 has the image_id 9'),
])
def test_coco_entries_are_checked_and_named(tmp_path, changes, said):
    with pytest.raises(ValueError, match=f'instances_train.json.*{said}'):
        read_coco(coco_file_with(tmp_path, **changes), 'train')


def save_turned(path, pixels):
    """Save pixels (H, W, 3) as a photo that a viewer turns by a quarter: EXIF orientation 6."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(path, exif=exif)


def record_of(path, width, height):
    none = np.zeros(0)
    return Record('a', path, width, height, np.zeros((0, 4)), none, none, none, none)


def test_turned_photos_are_read_as_their_annotation_says(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    save_turned(tmp_path / 'a.png', pixels)
    upright = np.rot90(pixels, -1).transpose(2, 0, 1)
    assert np.array_equal(read_image(record_of(tmp_path / 'a.png', 20, 30)).numpy(), upright)
    assert np.array_equal(read_image(record_of(tmp_path / 'a.png', 30, 20)).numpy(), pixels.transpose(2, 0, 1))
    with pytest.raises(ValueError, match='is 20x30 pixels, but its annotation says 31x20'):
        read_image(record_of(tmp_path / 'a.png', 31, 20))


def test_deep_grey_images_keep_their_brightness(tmp_path):
    grey = np.linspace(0, 65535, 12 * 10).reshape(10, 12).astype(np.uint16)
    Image.fromarray(grey).save(tmp_path / 'a.png')
    read = read_image(record_of(tmp_path / 'a.png', 12, 10)).numpy()
    assert np.array_equal(read, np.broadcast_to(grey >> 8, (3, 10, 12)))
