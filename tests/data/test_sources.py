import pytest
from PIL import Image

from timm_alignmix.data import open_source
from timm_alignmix.data.sources import find_split_folder


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


def test_links_that_list_a_folder_twice_are_refused(tree):
    root = tree('train/a/1.png', 'train/b/1.png')
    (root / 'train' / 'a' / 'loop').symlink_to(root / 'train' / 'a')  # would become a class of its own
    with pytest.raises(ValueError, match='a/loop and .*/a are the same folder, through a symbolic link'):
        open_source(str(root))


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
