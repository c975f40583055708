"""Fine-tuning: frozen layers, weighted and balanced classes, and the way from one data set to another."""
import shutil

import numpy as np
import pytest
import timm
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import functional as F

from alignmix_lab.classification import TrainConfig, prepare
from alignmix_lab.classification.build import balanced_weights
from alignmix_lab.classification.dry_run import plan_run

FROZEN = 'conv1', 'bn1', 'layer1', 'layer2'  # --freeze 2 of test_resnet


@pytest.fixture(scope='module')
def start(tmp_path_factory):
    """File of weights whose running statistics are not those of a new network."""
    torch.manual_seed(3)
    model = timm.create_model('test_resnet', num_classes=10)
    for _ in range(3):
        model(torch.randn(4, 3, 64, 64))
    path = tmp_path_factory.mktemp('start') / 'start.pth'
    torch.save(model.state_dict(), path)
    return path


def assert_frozen(state_dict, start):
    before = torch.load(start, weights_only=True)
    assert state_dict.keys() == before.keys()
    for key, value in before.items():
        assert torch.equal(state_dict[key], value) == key.startswith(FROZEN), key


@pytest.mark.parametrize('mix, mix_kwargs', [
    ('alignmix', {'align_at': 'layer1', 'mode_probs': (0.0, 0.0, 1.0)}),  # within the frozen part
    ('manifold', {}),
    ('densemultimix', {'n': 12}),
])
@pytest.mark.filterwarnings('ignore:.*features aligned at.*')
def test_frozen_layers_do_not_change(make_config, run_training, start, tmp_path, mix, mix_kwargs):
    run = run_training(make_config(
        tmp_path, freeze='2', initial_checkpoint=str(start), mix=mix, mix_kwargs=mix_kwargs, layer_decay=0.8, lr=0.01,
        epochs=1, model_ema=True, model_ema_decay=0.5, weight_decay=0.5))
    checkpoint = torch.load(run.folder / 'last.pth.tar', weights_only=True)
    assert_frozen(checkpoint['state_dict'], start)
    assert_frozen(checkpoint['state_dict_ema'], start)
    scales = sorted({group['lr_scale'] for group in checkpoint['optimizer']['param_groups']})
    assert scales == pytest.approx([0.64, 0.8, 1.0])  # layer3, layer4, classifier
    assert any('Frozen: ' in line for line in run.log)


def test_a_frozen_run_continues_bit_by_bit(make_config, run_training, start, tmp_path):
    options = dict(freeze='2', initial_checkpoint=str(start), mix='mixup', layer_decay=0.8, model_ema=True,
                   balanced_sampling=True, aug_repeats=2, class_weights='balanced', checkpoint_steps=3)
    full = run_training(make_config(tmp_path / 'full', **options))
    folder = tmp_path / 'late' / 'run'
    shutil.copytree(full.folder, folder, ignore=shutil.ignore_patterns('last*', 'model_best*', 'checkpoint*'))
    (folder / 'previous.pth.tar').unlink()
    late = run_training(make_config(tmp_path / 'late', resume='auto', **options))
    assert any('epoch 1 continues after 4 of 5 updates' in line for line in late.log)
    ends = [torch.load(run.folder / 'last.pth.tar', weights_only=True) for run in (full, late)]
    for which in ('state_dict', 'state_dict_ema'):
        assert all(torch.equal(ends[1][which][key], value) for key, value in ends[0][which].items())
    assert_frozen(ends[1]['state_dict'], start)


def test_a_dry_run_counts_gradients_of_what_trains(digits):
    run = plan_run(TrainConfig(
        data_dir=str(digits), model='test_resnet', img_size=64, freeze='backbone', device='cpu', loader='timm',
        batch_size=16))
    assert sum(p.numel() for group in run.optimizer.param_groups for p in group['params']) == 96 * 10 + 10
    assert f'Frozen: {len(list(run.task.parameters())) - 2} tensors' in run.describe()


@pytest.mark.parametrize('options, said', [
    (dict(freeze='9'), '--freeze 9: test_resnet has 4 stages or blocks'),
    (dict(freeze='head'), "--freeze takes 'backbone' or a number of stages, got 'head'"),
    (dict(class_weights='balanced', mix='densemultimix'), '--balanced-sampling instead, which works with all methods'),
    (dict(class_weights='balanced', bce_loss=True), '--class-weights weighs softmax cross-entropy'),
    (dict(wandb_tags=['a']), '--wandb-tags need --log-trackers wandb'),
])
def test_what_cannot_work_is_refused(make_config, tmp_path, options, said):
    with pytest.raises(ValueError) as error:
        prepare(make_config(tmp_path, **options))
    assert said in str(error.value)


def test_pretrained_vits_keep_their_class_token_in_dense_mixing(make_config, tmp_path):
    """It is in their weights; only the other positions are classified."""
    weights = timm.create_model('test_vit', num_classes=7)
    torch.save(weights.state_dict(), tmp_path / 'vit.pth')
    run, _ = prepare(make_config(
        tmp_path / 'out', model='test_vit', img_size=160, pretrained=True, mix='densemultimix',
        model_kwargs={'pretrained_cfg_overlay': {'file': str(tmp_path / 'vit.pth'), 'num_classes': 7}}))
    model = run.task.get_eval_model()
    assert model.global_pool == 'avg' and torch.equal(model.cls_token, weights.cls_token)
    assert run.task(*next(iter(run.loaders.train)))['loss'].isfinite()


def test_a_number_of_stages_in_yaml():
    assert TrainConfig(freeze=2).freeze == '2'


def test_weights_are_scikit_learns():
    labels = np.random.default_rng(0).choice(4, 200, p=[0.6, 0.25, 0.1, 0.05])
    expected = compute_class_weight('balanced', classes=np.arange(4), y=labels)
    np.testing.assert_allclose(balanced_weights(labels, 4).numpy(), expected, rtol=1e-6)


@pytest.mark.parametrize('mix', ['none', 'mixup'])
def test_the_loss_is_weighted_by_class(make_config, mix, tmp_path):
    """A step against the definition of the weighted cross-entropy, in float64."""
    run, _ = prepare(make_config(tmp_path, mix=mix, class_weights='balanced', smoothing=0.1))
    images, labels = next(iter(run.loaders.train))
    weights = torch.from_numpy(compute_class_weight('balanced', classes=np.arange(10), y=run.loaders.train.labels()))
    seen = []
    handle = run.task.criterion.register_forward_pre_hook(lambda module, inputs: seen.append(inputs))
    loss = run.task(images, labels)['loss']
    handle.remove()
    (logits, target), = seen
    rows = F.one_hot(target, 10) if target.ndim == 1 else target
    assert (rows.double().max(dim=1).values < 1).any() == (mix == 'mixup')
    smooth = 0.9 * rows.double() + 0.1 / 10
    terms = -(weights * smooth * logits.double().log_softmax(dim=1)).sum(dim=1)
    expected = terms.sum() / weights[labels].sum() if mix == 'none' else terms.mean()  # as torch defines them
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize('freeze', ['', '2'])
def test_from_one_data_set_to_another(make_config, run_training, digits, tmp_path, freeze):
    """Train on half of the digits, export, and fine-tune on the other half from the exported folder."""
    halves = [tmp_path / name for name in ('old', 'new')]
    for half, labels in zip(halves, ('56789', '01234'), strict=True):
        for split in ('train', 'validation'):
            for label in labels:
                shutil.copytree(digits / split / label, half / split / label)
    first = run_training(make_config(
        tmp_path / 'first', data_dir=str(halves[0]), epochs=1, batch_size=8, export='auto'))
    exported = timm.create_model(f'local-dir:{first.folder / "export"}', pretrained=True).state_dict()
    second = run_training(make_config(
        tmp_path / 'second', data_dir=str(halves[1]), model=f'local-dir:{first.folder / "export"}', pretrained=True,
        epochs=1, batch_size=8, freeze=freeze, layer_decay=0.7, head_lr_scale=3, export='auto'))
    tuned = timm.create_model(f'local-dir:{second.folder / "export"}', pretrained=True).state_dict()
    assert tuned['fc.weight'].shape == (5, 96)
    for key, value in exported.items():
        if not key.startswith('fc'):
            assert torch.equal(tuned[key], value) == (bool(freeze) and key.startswith(FROZEN)), key
