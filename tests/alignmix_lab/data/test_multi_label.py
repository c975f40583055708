"""Images with any number of labels: CSV files and COCO annotations, and batches of rows."""
import json

import numpy as np
import pytest
import torch
from PIL import Image

from alignmix_lab.data import create_loaders, open_source
from alignmix_lab.data.images.sources import MultiLabelSource


@pytest.fixture
def folder(tmp_path):
    """Callable: a folder with images of one grey each, images/0.png and so on, and other files."""
    def make(count=4, **files):
        (tmp_path / 'images').mkdir(exist_ok=True)
        for index in range(count):
            Image.new('RGB', (8, 8), (10 * index,) * 3).save(tmp_path / 'images' / f'{index}.png')
        for name, text in files.items():
            path = tmp_path / name.replace('__', '/').replace('_csv', '.csv').replace('_json', '.json')
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return tmp_path
    return make


def opened(root, split='train', **options):
    source = open_source(str(root), split=split, multi_label=True, **options)
    return source.class_names, source.labels


COCO = json.dumps(dict(
    images=[dict(id=7, file_name='1.png'), dict(id=3, file_name='0.png'), dict(id=5, file_name='2.png')],
    categories=[dict(id=9, name='dog'), dict(id=4, name='cat')],
    annotations=[dict(image_id=7, category_id=9), dict(image_id=7, category_id=4), dict(image_id=7, category_id=9),
                 dict(image_id=3, category_id=9)]))


@pytest.mark.parametrize('name, text, names, labels', [
    ('train_csv', 'file,labels\n0.png,dog cat\n1.png,\n2.png,a10 a9\n', ['a9', 'a10', 'cat', 'dog'],
     [(2, 3), (), (0, 1)]),
    ('train_csv', '\ufefffile,Tags,fold\n0.png,sea lion; cat,1\n1.png,cat,2\n', ['cat', 'sea lion'], [(0, 1), (0,)]),
    ('train_csv', 'name,labels\n0.png,"b,a"\n', ['a', 'b'], [(0, 1)]),
    ('train_csv', 'name,labels\r\n0.png,b|a|b\r\n', ['a', 'b'], [(0, 1)]),
    ('images___classes_csv', 'filename, dog, cat\n0.png, 1, 0\n1.png, 1, 1\n2.png, 0, 0\n', ['dog', 'cat'],
     [(0,), (0, 1), ()]),
    ('train_csv', 'filename,dog\n0.png,1.0\n1.png,0\n', ['dog'], [(0,), ()]),
    ('annotations__instances_train_json', COCO, ['cat', 'dog'], [(0, 1), (1,), ()]),
])
def test_files_of_labels(folder, name, text, names, labels):
    root = folder(**{name: text})
    split = 'images' if name.startswith('images') else 'train'
    assert opened(root, split) == (names, labels)


def test_images_are_found_by_the_name_of_the_split(folder):
    root = folder(training_csv='file,labels\n0.png,cat\n', part_csv='file,labels\nimages/1.png,dog\n')
    source = open_source(str(root), split='train', multi_label=True)
    assert source.describe(0) == str(root / 'images' / '0.png') and source.listing() == b'0.png\n'
    assert np.asarray(Image.open(source.read(0)[0])).max() == 0
    part = open_source(str(root), split='part.csv', multi_label=True)
    assert np.asarray(Image.open(part.read(0)[0])).max() == 10


@pytest.mark.parametrize('text, message', [
    ('', 'damaged, empty or no CSV'),
    ('file,labels\n', 'lists no images'),
    ('file,labels\n0.png,a\n0.png,b\n', "lists '0.png' twice"),
    ('file,labels\n0.png,a\n9.png,b\n8.png,b\n', r'2 of 3 are not in .*images \(the first is 8.png\)'),
    ('file,labels\n0.png\n', 'entry 2 has 1 cells, the header 2'),
    ('file,a,b\n0.png,1,yes\n', "entry 2 has 'yes' in the column b; it takes 0 or 1"),
    ('file\n0.png\n', 'needs a column labels'),
    ('file,a,a\n0.png,1,1\n', 'needs a column labels, or one column of 0 and 1 for each class; its columns are file'),
])
def test_damaged_files_are_explained(folder, text, message):
    with pytest.raises(ValueError, match=message):
        opened(folder(train_csv=text))


def test_splits_that_do_not_fit_are_explained(folder):
    root = folder(train_csv='file,labels\n0.png,cat\n1.png,dog\n')
    with pytest.raises(ValueError, match=r"no labels for the split 'validation' \(tried validation, .*--val-share"):
        opened(root, 'validation')
    folder(val_csv='file,labels\n2.png,cats\n')
    with pytest.raises(ValueError, match='classes that the training set lacks: cats; did you mean cat'):
        opened(root, 'val', class_to_idx=dict(cat=0, dog=1))
    folder(val_csv='file,labels\n2.png,dog\n')
    assert opened(root, 'validation', class_to_idx=dict(cat=0, dog=1)) == (['cat', 'dog'], [(1,)])
    with pytest.raises(ValueError, match='/nowhere does not exist'):
        opened('/nowhere')
    with pytest.raises(ValueError, match='--train-samples 2 counts the images of a class'):
        open_source(str(root), multi_label=True).first(2)


@pytest.mark.parametrize('options, message', [
    (dict(loader='ffcv'), '--loader ffcv has one label'), (dict(class_map='map.txt'), 'leave --class-map map.txt out'),
    (dict(dataset='torch/cifar10'), 'leave --dataset torch/cifar10 out'), (dict(data_dir=None), 'needs --data-dir'),
])
def test_options_that_cannot_work(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        create_loaders(**{**dict(data_dir=str(tmp_path), multi_label=True), **options})


def greys(loader):
    """The number of each image that a loader yields, by its grey, and its row."""
    return [
        (round(image.mean().item() * 25.5), tuple(row.tolist())) for images, rows in loader
        for image, row in zip(images, rows, strict=True)]


@pytest.mark.parametrize('world_size', [1, 2, 3])
def test_every_image_is_evaluated_once_with_its_row(folder, caplog, world_size):
    rows = [(0, 1), (1,), (), (0,), (1,), ()]
    text = 'file,labels\n' + ''.join(
        f'{index}.png,{" ".join("ab"[label] for label in row)}\n' for index, row in enumerate(rows))
    root = folder(6, train_csv=text.replace('a b', 'a b c'), validation_csv=text)
    found = []
    for rank in range(world_size):
        loaders = create_loaders(
            str(root), multi_label=True, input_size=(3, 8, 8), mean=(0, 0, 0), std=(1, 1, 1), crop_pct=1.0, no_aug=True,
            batch_size=2, workers=0, rank=rank, world_size=world_size)
        assert loaders.num_classes == 3 and loaders.kind == 'timm' and loaders.class_names == ['a', 'b', 'c']
        found += greys(loaders.val)
    expected = [(index, tuple(float(label in row) for label in range(3))) for index, row in enumerate(rows)]
    assert sorted(found) == expected
    assert f'{root / "validation.csv"}: no image has the class c; in evaluation' in caplog.text
    images, labels = next(iter(loaders.train))
    assert labels.dtype == torch.float32 and labels.shape == (2, 3)


def test_a_share_of_all_images_is_set_aside(folder):
    root = folder(10, train_csv='file,labels\n' + ''.join(f'{index}.png,a\n' for index in range(10)))
    train, val = open_source(str(root), multi_label=True).divide(0.3, seed=1)
    assert isinstance(val, MultiLabelSource) and (train.num_samples, val.num_samples) == (7, 3)
    assert len({*train.listing().split(), *val.listing().split()}) == 10
