"""Parts of the training images: what --val-share sets aside, and what --train-samples leaves."""
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image
from torch.utils.data import IterDataPipe

from alignmix_lab.classification import TrainConfig, train
from alignmix_lab.data import create_loaders
from alignmix_lab.data.images.sources import ImageSource
from alignmix_lab.data.loaders import open_divided, open_split_source
from alignmix_lab.data.options import LoaderOptions

COUNTS = {'cat': 20, 'dog': 11, 'owl': 2, 'rat': 1}


@pytest.fixture
def root(tmp_path):
    for name, count in COUNTS.items():
        (tmp_path / 'train' / name).mkdir(parents=True)
        for index in range(count):
            Image.new('RGB', (40, 40)).save(tmp_path / 'train' / name / f'{index}.png')
    return tmp_path


def names(source):
    return {Path(source.describe(index)).relative_to(source.title) for index in range(source.num_samples)}


def test_a_share_of_each_class_is_set_aside(root):
    options = LoaderOptions(data_dir=str(root), val_share=0.1)
    kept, val = open_divided(options)
    assert Counter(name.parts[0] for name in names(val)) == dict(cat=2, dog=1, owl=1)
    assert len(names(kept) | names(val)) == kept.num_samples + val.num_samples == sum(COUNTS.values())
    assert [val.class_names[label] for label in val.labels] == ['cat', 'cat', 'dog', 'owl']
    assert val.read(2)[1] == 1 and names(open_split_source(options, 'validation', False)) == names(val)
    assert names(open_split_source(options, 'train', False)) == names(kept)


def test_the_choice_follows_seed_class_and_file_names(root, monkeypatch):
    def choose(**options):
        return names(open_divided(LoaderOptions(data_dir=str(root), val_share=0.2, **options))[1])
    chosen = choose()
    assert choose(rank=1, world_size=2, batch_size=4) == chosen != choose(seed=1)
    Image.new('RGB', (8, 8)).save(root / 'train' / 'owl' / 'new.png')
    assert {name for name in choose() if name.parts[0] != 'owl'} == {name for name in chosen if name.parts[0] != 'owl'}
    monkeypatch.setattr(ImageSource, '_listed', property(lambda source: None))  # as of data sets without file names
    labels = [open_divided(LoaderOptions(data_dir=str(root), val_share=0.2))[1].read(i)[1] for i in range(7)]
    assert Counter(labels) == {0: 4, 1: 2, 2: 1}


def test_the_first_images_of_each_class(root):
    kept, _ = open_divided(LoaderOptions(data_dir=str(root), val_share=0.2))
    few = kept.first(3)
    files, left = ([source.describe(i) for i in range(source.num_samples)] for source in (kept, few))
    for name, count in dict(cat=3, dog=3, owl=1, rat=1).items():
        first = [file for file in files if Path(file).parent.name == name][:3]
        assert [file for file in left if Path(file).parent.name == name] == first and len(first) == count
    assert few.labels == [few.read(i)[1] for i in range(8)]
    options = dict(loader='timm', val_share=0.2, train_samples=3, batch_size=2)
    assert create_loaders(str(root), **options).train.num_samples == 8


def test_a_run_writes_down_its_validation_images(root):
    options = dict(
        data_dir=str(root), loader='timm', workers=0, model='test_resnet', img_size=32, epochs=1, warmup_epochs=0,
        batch_size=4, device='cpu', output=str(root / 'out'), experiment='run', export='none', val_share=0.1)
    train(TrainConfig(**options))
    lines = (root / 'out' / 'run' / 'val_split.txt').read_text().splitlines()
    assert {Path(line) for line in lines} == names(open_divided(LoaderOptions(data_dir=str(root), val_share=0.1))[1])


def test_what_cannot_be_divided(root):
    with pytest.raises(ValueError, match=r"no folder for the split 'validation'.*--val-share 0\.1 "):
        create_loaders(str(root), loader='timm')
    (root / 'test').mkdir()
    assert create_loaders(str(root), loader='timm', val_share=0.1, batch_size=2).val.num_samples == 4
    (root / 'val').mkdir()
    with pytest.raises(ValueError, match=f'--val-share 0.1: there is a folder of validation images, {root}/val; '):
        create_loaders(str(root), loader='timm', val_share=0.1)
    with pytest.raises(ValueError, match='--val-share 0.1: a stream is read in sequence'):
        ImageSource(IterDataPipe(), 'a stream').divide(0.1, 0)
    with pytest.raises(ValueError, match='--train-samples 3: a stream is read in sequence; leave it out'):
        ImageSource(IterDataPipe(), 'a stream').first(3)


def test_beton_files_are_not_divided(betons):
    with pytest.raises(ValueError, match=r'--val-share 0.5: .*train\.beton is divided already'):
        create_loaders(str(betons), val_share=0.5)
    with pytest.raises(ValueError, match='--train-samples 5 needs the original images; use --loader timm'):
        create_loaders(str(betons), train_samples=5)
