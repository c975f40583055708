import os

import pytest
from PIL import Image
from timm.data import create_dataset

from alignmix_lab.data import open_source
from alignmix_lab.data.images.folders import find_split_folder


@pytest.fixture
def tree(tmp_path):
    """Callable that makes image files below a folder."""
    def make(*names):
        for name in names:
            path = tmp_path / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new('RGB', (8, 8)).save(path)
        return tmp_path
    return make


def test_labels_follow_class_folders(tree):
    root = tree('train/cat/1.png', 'train/cat/2.jpg', 'train/dog/1.webp', 'val/cat/1.png', 'val/dog/1.png')
    source = open_source(str(root))
    assert (source.num_samples, source.labels, source.class_names) == (3, [0, 0, 1], ['cat', 'dog'])
    assert source.describe(2) == str(root / 'train' / 'dog' / '1.webp')
    assert open_source(str(root), split='validation').num_samples == 2


def test_evaluation_takes_its_labels_from_training(tree):
    root = tree('train/a/1.png', 'train/b/1.png', 'train/c/1.png', 'val/c/1.png')
    train = open_source(str(root))
    assert open_source(str(root), split='val', class_to_idx=train.class_to_idx).labels == [2]
    tree('val/d/1.png')
    with pytest.raises(ValueError, match='classes that the training set lacks: d'):
        open_source(str(root), split='val', class_to_idx=train.class_to_idx)


def test_class_map_selects_classes(tree, tmp_path):
    root = tree('train/a/1.png', 'train/b/1.png', 'train/c/1.png')
    (tmp_path / 'map.txt').write_text('c\na\n')
    source = open_source(str(root), class_map='map.txt')
    assert sorted(source.labels) == [0, 1]
    assert source.class_names == ['c', 'a']
    with pytest.raises(ValueError, match="class map 'none.txt'"):
        open_source(str(root), class_map='none.txt')


@pytest.mark.parametrize('names, split, message', [
    (['train/a/1.png'], 'validation', r"no folder for the split 'validation' \(tried validation, val.*it has: train"),
    (['train/1.png', 'train/a/1.png'], 'train', 'images lie directly in'),
    (['validation/a/1.png'], 'train', "no folder for the split 'train'"),
])
def test_wrong_layouts_are_explained(tree, names, split, message):
    with pytest.raises(ValueError, match=message):
        open_source(str(tree(*names)), split=split)


def test_empty_class_folders_are_named(tree):
    root = tree('train/a/1.png')
    (root / 'train' / 'b').mkdir()
    (root / 'train' / 'c').mkdir()
    (root / 'train' / 'c' / 'notes.txt').write_text('no image')
    with pytest.raises(ValueError, match='2 class folders in .* have no images .*: b, c; fill them or remove'):
        open_source(str(root))


def test_links_to_folders_that_are_listed_anyway_are_passed_over(tree, caplog):
    """Followed, three links would list every image in 40 levels of 3 classes named after the links."""
    root = tree('train/a/1.png', 'train/b/1.png', 'val/c/1.png')
    (root / 'train' / 'a' / 'self').symlink_to(root / 'train' / 'a')
    (root / 'train' / 'a' / 'up').symlink_to(root / 'train')
    (root / 'train' / 'a' / 'all').symlink_to(root)  # also holds the other split
    (root / 'train' / 'b' / 'across').symlink_to('../a')
    source = open_source(str(root))
    assert (source.num_samples, source.class_names) == (2, ['a', 'b'])
    reasons = {os.path.relpath(name, root / 'train'): reason for name, reason in source.skipped}
    assert reasons.keys() == {'a/self', 'a/up', 'a/all', 'b/across'}
    assert 'the same folder as' in reasons['a/self'] and 'a folder that contains' in reasons['a/up']
    assert '4 files or folders are skipped' in caplog.text


def test_a_class_that_is_a_link_to_another_is_refused(tree):
    root = tree('train/a/1.png')
    (root / 'train' / 'b').symlink_to('a')
    with pytest.raises(ValueError, match='1 class folders .*: b; fill them or remove them .*b: the same folder as'):
        open_source(str(root))


def test_links_to_other_folders_are_followed(tree, tmp_path):
    root = tree('elsewhere/1.png', 'root/train/a/1.png')
    (root / 'root' / 'train' / 'b').symlink_to(root / 'elsewhere')
    source = open_source(str(root / 'root'))
    assert (source.labels, source.class_names, list(source.skipped)) == ([0, 1], ['a', 'b'], [])


def test_what_is_no_image_is_listed(tree):
    root = tree('train/a/1.png')
    (root / 'train' / 'a' / 'notes.txt').touch()
    os.mkfifo(root / 'train' / 'a' / 'pipe.jpg')  # reading it would wait forever
    (root / 'train' / 'a' / 'endless.jpg').symlink_to('/dev/zero')
    source = open_source(str(root))
    assert source.num_samples == 1
    assert [reason for _, reason in source.skipped] == [
        'not a regular file', "the extension '.txt' is not read", 'not a regular file']


def test_order_is_timms(tree):
    names = 'x10.png', 'X9.jpg', '10.jpeg'
    root = tree(*(f'train/{folder}/{name}' for folder in ('c10', 'c9', 'B') for name in names))
    theirs = create_dataset('', str(root / 'train'), search_split=False)
    source = open_source(str(root))
    assert source.dataset.reader.samples == theirs.reader.samples
    assert source.class_to_idx == theirs.reader.class_to_idx


def test_names_that_timm_cannot_sort(tree):
    assert open_source(str(tree('train/a/1\u00b22.png', 'train/a/1a2.png', 'train/a/12.png'))).num_samples == 3


def test_no_images_at_all(tmp_path):
    (tmp_path / 'train' / 'a').mkdir(parents=True)
    with pytest.raises(ValueError, match='no images in the class folders'):
        open_source(str(tmp_path))


def test_missing_folders_and_names():
    with pytest.raises(ValueError, match='data folder /nowhere does not exist'):
        open_source('/nowhere')
    with pytest.raises(ValueError, match="'cifar10' is unknown; use a name with one of the prefixes torch/"):
        open_source('/nowhere', 'cifar10')
    with pytest.raises(ValueError, match='Unknown torchvision dataset'):
        open_source('/nowhere', 'torch/nothing')
    with pytest.raises(ValueError, match="'torch/cifar10' needs --data-dir"):
        open_source(None, 'torch/cifar10')
    with pytest.raises(ValueError, match='no data: give --data-dir'):
        open_source(None)


def test_a_missing_named_dataset_says_how_to_get_it(tmp_path):
    with pytest.raises(ValueError, match="'torch/cifar10', split 'train'.*not found"):
        open_source(str(tmp_path), 'torch/cifar10')


def test_test_folder_serves_as_validation(tree):
    root = tree('train/a/1.png', 'test/a/1.png')
    assert find_split_folder(root, 'validation') == root / 'test'
