"""create_loaders(): which loader, for which data, with which complaints."""
import builtins
import json
import pwd
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image

from alignmix_lab.classification.config import SAMPLE_DEFAULTS
from alignmix_lab.data import convert, create_loaders, sample_dir
from alignmix_lab.data.sample import _make_once, cache_dir

SMALL = {'input_size': (3, 48, 48), 'batch_size': 8, 'workers': 1}


@pytest.fixture
def without_ffcv(monkeypatch):
    """Make `import ffcv` fail, as where it is not installed."""
    import_module = builtins.__import__

    def refuse(name, globals=None, locals=None, fromlist=(), level=0):
        if name.partition('.')[0] == 'ffcv' and not level:
            raise ModuleNotFoundError("No module named 'ffcv'")
        return import_module(name, globals, locals, fromlist, level)

    monkeypatch.setattr(builtins, '__import__', refuse)


@pytest.fixture(scope='session')
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp('cache')


@pytest.fixture
def own_cache(cache, monkeypatch):
    """A cache of the tests' own, so that the user's stays untouched."""
    monkeypatch.setenv('TIMM_ALIGNMIX_CACHE', str(cache))


def test_both_loaders_yield_the_same(betons, numbered):
    """Same samples, shapes and types, and for the same crop nearly the same pixels."""
    options = {**SMALL, 'batch_size': 11, 'mean': (0.5,) * 3, 'std': (0.5,) * 3, 'crop_pct': 1.0}
    through_ffcv = create_loaders(str(betons), **options)
    through_timm = create_loaders(str(numbered), loader='timm', **options)
    assert (through_ffcv.kind, through_timm.kind) == ('ffcv', 'timm')
    assert through_ffcv.num_classes == through_timm.num_classes == 37
    assert through_ffcv.class_names == through_timm.class_names == [f'{index:02d}' for index in range(37)]
    assert len(through_ffcv.train) == len(through_timm.train) == 3
    (ffcv_images, ffcv_labels), = through_ffcv.val
    (timm_images, timm_labels), = through_timm.val
    assert ffcv_images.dtype == timm_images.dtype == torch.float32
    assert torch.equal(ffcv_labels, timm_labels)
    assert (ffcv_images - timm_images).abs().mean() < 0.5 * (ffcv_images - timm_images.roll(4, dims=3)).abs().mean()


def test_ffcv_is_chosen_where_the_files_are(betons, numbered, caplog):
    caplog.set_level('INFO')
    assert create_loaders(str(numbered), **SMALL).kind == 'timm'
    assert f'convert the data once: python -m alignmix_lab convert --data-dir {numbered} --output' in caplog.text
    with pytest.raises(ValueError, match='train.beton and val.beton, which are not there; convert with: python -m'):
        create_loaders(str(numbered), loader='ffcv', **SMALL)
    with pytest.raises(ValueError, match='holds .beton files only, which need FFCV'):
        create_loaders(str(betons), loader='timm', **SMALL)
    with pytest.raises(ValueError, match="--loader must be one of 'auto', 'ffcv', 'timm', got 'dali'"):
        create_loaders(str(betons), loader='dali')


def test_without_ffcv(without_ffcv, own_cache, betons, numbered, tmp_path, caplog):
    with pytest.raises(ImportError, match='apt-get install .*libopencv-dev, then: pip install ffcv'):
        create_loaders(str(betons), loader='ffcv', **SMALL)
    with pytest.raises(ValueError, match='need FFCV'):
        create_loaders(str(betons), **SMALL)
    loaders = create_loaders(**SMALL)
    assert loaders.kind == 'timm' and loaders.val.num_samples == 360
    assert 'apt-get install' in caplog.text
    with pytest.raises(ImportError, match='pip install ffcv'):
        convert(str(numbered), tmp_path)


def test_importing_does_not_need_ffcv():
    code = "import sys; sys.modules['ffcv'] = None; import alignmix_lab.data, alignmix_lab.data.timm_loader"
    subprocess.run([sys.executable, '-c', code], check=True)


@pytest.mark.parametrize('flag, options', [
    ('--color-jitter 0.4', {'color_jitter': 0.4}),
    ('--aa rand-m9', {'aa': 'rand-m9'}),
    ('--reprob 0.25', {'reprob': 0.25}),
    ('--class-map map.txt', {'class_map': 'map.txt'}),
])
def test_augmentation_that_ffcv_lacks_is_refused(betons, flag, options):
    with pytest.raises(ValueError, match=f'{flag} is not available with FFCV; use --loader timm'):
        create_loaders(str(betons), **SMALL, **options)


def test_labels_must_fit_the_model(betons, numbered):
    for folder in (betons, numbered):
        with pytest.raises(ValueError, match='labels up to 36, --num-classes 10 allows 0 to 9; pass --num-classes 37'):
            create_loaders(str(folder), num_classes=10, **SMALL)
    assert create_loaders(str(numbered), num_classes=50, **SMALL).num_classes == 50


def test_files_of_different_classes_are_refused(betons, tmp_path):
    for name in ('train.beton', 'val.beton', 'train.beton.json', 'val.beton.json'):
        (tmp_path / name).symlink_to(betons / name)
    description = json.loads((betons / 'val.beton.json').read_text())
    (tmp_path / 'val.beton.json').unlink()
    (tmp_path / 'val.beton.json').write_text(json.dumps({**description, 'class_names': ['x', 'y']}))
    with pytest.raises(ValueError, match='have different classes; convert both in one run'):
        create_loaders(str(tmp_path), **SMALL)


@pytest.mark.parametrize('loader', ['auto', 'timm', 'ffcv'])
def test_missing_data(tmp_path, loader):
    with pytest.raises(ValueError, match='data folder .*nowhere does not exist'):
        create_loaders(str(tmp_path / 'nowhere'), loader=loader, **SMALL)


def test_small_sets_are_refused_before_training(betons, numbered):
    for folder in (betons, numbered):
        with pytest.raises(ValueError, match='37 samples, not enough for one batch of 64; use --batch-size 37'):
            create_loaders(str(folder), **{**SMALL, 'batch_size': 64})


def test_random_erasing_and_validation_batch_size(numbered):
    options = {**SMALL, 'loader': 'timm', 'workers': 0, 'no_aug': False, 'hflip': 0.0, 'scale': (1, 1), 'ratio': (1, 1)}
    loaders = create_loaders(str(numbered), validation_batch_size=4, reprob=1.0, remode='const', **options)
    zeros = [(images == 0).all(1).flatten(1).any(1) for images, _ in loaders.train]
    assert torch.cat(zeros).all()
    assert [len(labels) for _, labels in loaders.val] == [4, 4, 3]


def test_a_dataset_by_name(tmp_path):
    """torchvision's CIFAR-10 from files made here in its format."""
    import hashlib
    import pickle

    from torchvision.datasets import CIFAR10
    folder = tmp_path / CIFAR10.base_folder
    folder.mkdir()
    rng = np.random.default_rng(0)
    checksums = {}
    for name, _ in CIFAR10.train_list + CIFAR10.test_list:
        batch = {'data': rng.integers(0, 256, (4, 3072), dtype=np.uint8), 'labels': [0, 1, 8, 9]}
        (folder / name).write_bytes(pickle.dumps(batch))
        checksums[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    meta = CIFAR10.meta['filename']
    (folder / meta).write_bytes(pickle.dumps({'label_names': [f'class {index}' for index in range(10)]}))
    checksums[meta] = hashlib.md5((folder / meta).read_bytes()).hexdigest()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CIFAR10, 'train_list', [[name, checksums[name]] for name, _ in CIFAR10.train_list])
        patch.setattr(CIFAR10, 'test_list', [[name, checksums[name]] for name, _ in CIFAR10.test_list])
        patch.setattr(CIFAR10, 'meta', {**CIFAR10.meta, 'md5': checksums[meta]})
        loaders = create_loaders(str(tmp_path), dataset='torch/cifar10', **SMALL)
    assert (loaders.train.num_samples, loaders.val.num_samples, loaders.num_classes) == (20, 4, 10)
    assert loaders.class_names[9] == 'class 9'
    assert [labels.tolist() for _, labels in loaders.val] == [[0, 1, 8, 9]]


def test_without_a_home_the_cache_is_asked_for(monkeypatch):
    """A container whose user has no entry in its passwd."""
    monkeypatch.setattr(pwd, 'getpwuid', {}.__getitem__)
    for name in ('TIMM_ALIGNMIX_CACHE', 'XDG_CACHE_HOME', 'HOME'):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match='no home directory .* set TIMM_ALIGNMIX_CACHE'):
        cache_dir()


def test_sample_is_written_once(own_cache, cache):
    folder = sample_dir('timm')
    assert folder.parent == cache == cache_dir()
    stamp = next((folder / 'train' / '7').iterdir()).stat().st_mtime_ns
    assert sample_dir('timm') == folder
    assert next((folder / 'train' / '7').iterdir()).stat().st_mtime_ns == stamp
    counts = {split: [len(list((folder / split / str(digit)).iterdir())) for digit in range(10)]
              for split in ('train', 'validation')}
    assert (sum(counts['train']), sum(counts['validation'])) == (1437, 360)
    assert all(34 <= count <= 38 for count in counts['validation'])
    names = [path.name for split in counts for path in (folder / split).rglob('*.png')]
    assert len(set(names)) == 1797
    assert [path.name for path in cache.iterdir() if path.name.startswith('.')] == []


def test_sample_shows_digits(own_cache):
    from sklearn.datasets import load_digits
    digits = load_digits()
    for path in sorted(sample_dir('timm').rglob('*.png'))[::100]:
        index = int(path.stem)
        assert int(path.parent.name) == digits.target[index]
        small = np.asarray(Image.open(path).resize((8, 8), Image.Resampling.BOX)) / 255 * 16
        assert np.corrcoef(small.ravel(), digits.images[index].ravel())[0, 1] > 0.98


def test_ranks_that_write_the_sample_at_once(tmp_path):
    """All three find the cache empty and fill a folder each; one wins, and all end up with it."""
    together = threading.Barrier(3)

    def make(folder):
        together.wait()
        (folder / 'image.png').touch()

    with ThreadPoolExecutor(3) as pool:
        folders = list(pool.map(lambda _: _make_once(tmp_path / 'cache' / 'digits', make), range(3)))
    assert folders == [tmp_path / 'cache' / 'digits'] * 3
    assert [path.relative_to(tmp_path).as_posix() for path in sorted(tmp_path.rglob('*'))] == [
        'cache', 'cache/digits', 'cache/digits/image.png']


def test_sample_through_ffcv(own_cache):
    pytest.importorskip('ffcv', reason='FFCV is not installed')
    size = SAMPLE_DEFAULTS['img_size']
    loaders = create_loaders(
        input_size=(3, size, size), batch_size=120, workers=2, crop_pct=SAMPLE_DEFAULTS['crop_pct'])
    assert (loaders.kind, loaders.num_classes, loaders.train.num_samples) == ('ffcv', 10, 1437)
    labels = torch.cat([labels for _, labels in loaders.val])
    folder = sample_dir('timm') / 'validation'
    assert labels.bincount().tolist() == [len(list((folder / str(digit)).iterdir())) for digit in range(10)]
