"""Every recipe with its methods: settings, and two steps on a small folder with the shape of ImageNet's."""
import os
import re
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from alignmix_lab.classification import TrainConfig, dry_run, resolve_config
from alignmix_lab.classification.build import build_run
from alignmix_lab.classification.dry_run import learning_rates, plan_run, step_cost
from alignmix_lab.runs.engine import train_one_epoch
from alignmix_lab.runs.fit import wrap_run
from alignmix_lab.runs.options import find_recipe, recipe_mixes

ROOT = Path(__file__).resolve().parents[2]
FILES = [path for path in sorted((ROOT / 'recipes').rglob('*.yaml')) if path.parent.name != 'accelerate']
NAMES = [path.relative_to(ROOT / 'recipes').with_suffix('').as_posix() for path in FILES if path.name[0] != '_']
MODERN = [name for name in NAMES if name.startswith(('modern', 'study'))]
FINETUNE = [name for name in NAMES if name.startswith('finetune')]
PAPERS = [name for name in NAMES if not name.startswith(('modern', 'study', 'finetune', 'detection'))]
MIXES = (
    'none', 'mixup', 'cutmix', 'saliencymix', 'puzzlemix', 'comixup', 'zeta', 'manifold', 'alignmix', 'multimix',
    'densemultimix')
WITH_AE = [name for name in PAPERS if name.endswith(('2000ep', '1200ep', 'resnet50_300ep'))]
PAIRS = [
    *((name, mix) for name in PAPERS for mix in dict.fromkeys((*MIXES, *recipe_mixes(name, TrainConfig)))),
    *((name, 'alignmix_ae') for name in WITH_AE),
    *((name, mix) for name in MODERN for mix in (None, *recipe_mixes(name, TrainConfig))),
    *((name, mix) for name in FINETUNE for mix in MIXES),
]
ANY_FOLDER = dict(data_dir='my_photos', num_classes=7, dataset_size=(2000, 500))  # no data of their own
ALL = bool(os.environ.get('TIMM_ALIGNMIX_ALL_RECIPES'))  # all of them take minutes

pytestmark = pytest.mark.usefixtures('one_thread')


def config_of(name, mix=None, **flags):
    if name in FINETUNE:
        flags = {**ANY_FOLDER, **flags}
    return resolve_config({**({'mix': mix} if mix else {}), **flags}, name)


def test_every_row_of_the_papers_has_a_recipe():
    expected = {f'cifar{classes}/{model}_{epochs}ep' for classes in (10, 100) for model in ('preactresnet18', 'wrn16_8')
                for epochs in (300, 2000)}
    expected |= {f'imagenet/{name}' for name in ('resnet50_300ep', 'resnet50_100ep', 'vit_small_300ep',
                                                 'levit_128s_100ep')}
    expected |= {'tinyimagenet/preactresnet18_1200ep', 'cub200/resnet50', 'cub200/vgg16_gap'}
    assert set(PAPERS) == expected


@pytest.mark.parametrize('path', FILES, ids=lambda path: str(path.relative_to(ROOT / 'recipes')))
def test_a_recipe_is_complete_but_for_one_base(path):
    base = yaml.safe_load(path.read_text()).get('base')
    assert base is None or path.name[0] != '_', 'a base has no base'
    assert base is None or (path.parent / base).name[0] == '_' and (path.parent / base).is_file()


def test_every_recipe_that_is_mentioned_is_there():
    texts = [ROOT / 'README.md', *(ROOT / 'docs').glob('*.md'), *(ROOT / 'recipes').rglob('*.*')]
    texts += [path for folder in ('alignmix_lab', 'detection', 'benchmarks') for path in (ROOT / folder).rglob('*.py')]
    words = re.compile(r'\brecipes/[\w/]+\.\w+|(?<=-c )\w+/[\w/]+|(?<=--recipe )\w+/[\w/]+')
    mentioned = {word for path in texts for word in words.findall(path.read_text(encoding='utf-8'))}
    assert len(mentioned) > 5
    for word in mentioned:
        assert (ROOT / word).is_file() or find_recipe(word), word


@pytest.mark.parametrize('name, mix', PAIRS)
def test_a_recipe_is_planned_without_data(name, mix):
    """For the processes it is meant for."""
    config = config_of(name, mix, device='cpu')
    run = plan_run(config)
    assert run.global_batch_size == config.batch_size * config.num_processes
    assert len(run.loaders.train) == config.dataset_size[0] // run.global_batch_size
    curve = learning_rates(run, points=50)
    assert all(np.isfinite(rates).all() and rates.min() >= 0 < rates.max() for rates in curve.rates.values())
    if mix in (None, 'none'):
        cost = step_cost(run)
        most = 200 if '7b' in name else 80  # 100 of states, 54 of activations
        assert cost.optimizer and 0.01 < (4 * cost.parameters + cost.activations) / 2**30 < most
    default = {'mixup': 0.5, 'cutmix': 0.5} if 'rsb' in name else 'none'
    assert config.mix == (re.sub('_release$', '', mix) if mix else default)


@pytest.mark.filterwarnings('ignore:.*features aligned at.*')
@pytest.mark.parametrize('name, mix', PAIRS if ALL else [
    ('cifar10/preactresnet18_2000ep', mix) for mix in ('none', 'manifold', 'alignmix_ae', 'densemultimix')])
def test_a_recipe_dry_runs_with_its_real_model(name, mix, tmp_path, capsys):
    config = config_of(name, mix, output=str(tmp_path))
    dry_run(config)
    (tmp_path / 'printed.yaml').write_text(capsys.readouterr().out)
    again = resolve_config({}, str(tmp_path / 'printed.yaml'))
    assert (again.mix, again.lr is not None) == (config.mix, True)
    assert (tmp_path / 'learning_rate.png').stat().st_size > 5000


@pytest.mark.parametrize('mix, threshold', [
    ('multimix', None), ('densemultimix', None), ('cutmix', 0.2), ('alignmix', 0.2), ('none', 0.2)])
def test_mixtures_of_a_whole_batch_have_no_threshold(mix, threshold):
    for name in ('modern/rsb_a2', 'modern/rsb_a3'):
        config = config_of(name, mix)
        assert config.bce_loss and config.bce_target_thresh == threshold


@pytest.mark.parametrize('name, mix, batch, rates', [
    # epoch: learning rate, as the papers say it ({...} of the classifier)
    ('imagenet/resnet50_300ep', 'none', 100, {0: 0.01, 99: 0.01, 100: 0.001, 200: 1e-4, 299: 1e-4}),
    ('imagenet/resnet50_300ep', 'alignmix_release', 1024, {74: 0.1, 75: 0.01, 150: 1e-3, 225: 1e-4, 299: 1e-4}),
    ('imagenet/resnet50_100ep', 'none', 448, {0: 0.2, 39: 0.2, 40: 0.02, 65: 2e-3, 90: 2e-4}),
    ('imagenet/resnet50_100ep', 'alignmix_release', 1024, {29: 0.1, 30: 0.01, 90: 1e-4}),
    ('imagenet/vit_small_300ep', 'none', 1024, {0: 1e-6, 5: 1e-5 + 0.99e-3 * (1 + np.cos(np.pi * 5 / 300)) / 2}),
    ('imagenet/levit_128s_100ep', 'none', 2048, {0: 1e-6, 50: (2e-3 + 1e-5) / 2}),
    ('cifar100/preactresnet18_2000ep', 'none', 128, {0: 0.1, 499: 0.1, 500: 0.01, 1000: 1e-3, 1500: 1e-4, 1999: 1e-4}),
    ('cifar10/wrn16_8_300ep', 'none', 128, {74: 0.1, 75: 0.01, 299: 1e-4}),
    ('tinyimagenet/preactresnet18_1200ep', 'none', 128, {599: 0.1, 600: 0.01, 900: 1e-3, 1199: 1e-3}),
    ('tinyimagenet/preactresnet18_1200ep', 'alignmix_release', 256, {0: 0.1}),
    ('cub200/resnet50', 'none', 16, {0: 1e-3, 149: 1e-3, 150: 1e-4, 450: 1e-6}),
    ('cub200/vgg16_gap', 'none', 16, {0: 1e-4, 150: 1e-5}),
])
def test_batch_and_learning_rate_are_the_papers(name, mix, batch, rates):
    run = plan_run(config_of(name, mix, device='cpu'))
    assert run.global_batch_size == batch
    curve = learning_rates(run)
    for scale, values in curve.rates.items():
        assert [values[epoch] for epoch in rates] == pytest.approx([scale * rate for rate in rates.values()], rel=1e-9)
    has_head = 'cub200' in name or (name, mix) == ('imagenet/resnet50_300ep', 'none')
    assert set(curve.rates) == ({1.0, 10.0} if has_head else {1.0})


def test_weights_decay_everywhere_where_the_papers_have_it_so():
    for name, groups in (('cifar10/wrn16_8_2000ep', 1), ('imagenet/vit_small_300ep', 2)):
        assert len(plan_run(config_of(name)).optimizer.param_groups) == groups


@pytest.mark.parametrize('epochs, batches, switch', [(16, 312, 12), (32, 312, 25), (88, 312, 71)])
def test_progressive_resizing_is_ffcv_imagenets(epochs, batches, switch):
    """Learning rate and size of each update against straight lines through ffcv-imagenet's published points."""
    config = config_of(f'modern/ffcv_rn50_{epochs}ep')
    run = plan_run(config)
    assert (run.num_epochs, run.updates_per_epoch, run.global_batch_size) == (epochs, batches, 4096)
    curve = learning_rates(run, points=300)
    expected = np.interp(curve.epochs, [0, 2, epochs], [1.7e-4, 1.7, 0])
    np.testing.assert_allclose(curve.rates[1.0], expected, rtol=1e-9, atol=1e-12)
    assert [config.train_side(epoch) for epoch in range(epochs)] == [160] * switch + [192] * (epochs - switch)


# Two steps

SMALL = {
    'imagenet/vit': dict(model_kwargs={'img_size': 64}),
    'imagenet/levit': dict(model_kwargs={'img_size': 128}, img_size=128),
    'imagenet/resnet50_100ep': dict(min_res=32, max_res=64, start_ramp=0, end_ramp=1),
    'modern/ffcv': dict(min_res=64, max_res=96, img_size=96),
    'modern/rsb_a3': dict(min_res=48, max_res=48),
    'cifar': dict(img_size=16, crop_padding=2),
    'tinyimagenet': dict(img_size=32),
    'cub200': dict(crop_resize=72),
    'finetune/resnet50': dict(freeze=2),
    'finetune/vit_large': dict(freeze=22, img_size=64),
    'finetune/vit_small': dict(freeze=8),
    'finetune/dinov3_7b': dict(model='vit_tiny_patch16_dinov3_qkvb', img_size=64),
    'finetune/dinov2': dict(img_size=70),
}


@pytest.fixture(scope='module')
def imagenet_shaped(tmp_path_factory):
    """An ImageFolder with ImageNet's names: photographs' shapes, nothing in them."""
    root, generator = tmp_path_factory.mktemp('imagenet'), np.random.default_rng(0)
    for split, count in (('train', 2), ('val', 1)):
        for wordnet_id in ('n01440764', 'n01443537', 'n02102040'):
            folder = root / split / wordnet_id
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = generator.integers(0, 256, (90, 110, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f'{wordnet_id}_{index}.JPEG')
    return root


def chosen():
    """Two mixes of every recipe (one of CIFAR's), so that each mix is there; the release; the modern ones."""
    if ALL:
        return PAIRS
    pairs = [(name, MIXES[(2 * index + k) % len(MIXES)]) for index, name in enumerate(PAPERS)
             for k in range(1 if name.startswith('cifar') else 2)]
    release = [(name, 'alignmix_release') for name in ('imagenet/resnet50_300ep', 'cifar10/preactresnet18_2000ep')]
    modern = [('modern/ffcv_rn50_16ep', None), *((f'modern/rsb_{a}', mix) for a in ('a2', 'a3')
                                                 for mix in (None, 'densemultimix'))]
    finetune = [(name, mix) for name in FINETUNE for mix in ('alignmix', 'densemultimix')]
    return [*pairs, *release, *modern, *finetune]


@pytest.mark.filterwarnings('ignore:.*features aligned at.*')
@pytest.mark.parametrize('name, mix', chosen())
def test_a_recipe_trains(name, mix, imagenet_shaped):
    """Two steps at a batch of 3 with the recipe's own model, mix, loss, optimizer and schedule."""
    small = next((flags for start, flags in SMALL.items() if name.startswith(start)), {})
    config = config_of(name, mix, **{
        'img_size': 64, 'data_dir': str(imagenet_shaped), 'dataset': '', 'dataset_size': None, 'pretrained': False,
        'batch_size': 3, 'validation_batch_size': 3, 'workers': 0, 'device': 'cpu', 'amp': False, **small})
    run = build_run(config)
    wrap_run(run)
    model = run.task.get_eval_model()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    metrics = train_one_epoch(run, 0, save=lambda update, totals: None)
    assert len(run.loaders.train) == 2 and run.task.step == 2
    assert np.isfinite(metrics['loss'])
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    changed = [not torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True)
               if new.requires_grad]
    assert np.mean(changed) > 0.5  # in a warm-up, a step can be too small for norms' weights of 1
