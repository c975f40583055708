"""The export of a training checkpoint: its weights, its facts, and checkpoints that are refused."""
import json
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file

from alignmix_lab.classification import TrainConfig
from alignmix_lab.classification.export_checkpoint import export_checkpoint
from alignmix_lab.commands.export import main
from alignmix_lab.evaluation.published import method_name
from timm_alignmix import weights


class Trained:
    """A model as after a training run, its checkpoint and its export."""

    def __init__(self, folder: Path, name: str, num_classes: int, size: int, mix: str = 'none', **model_kwargs):
        torch.manual_seed(0)
        self.model = timm.create_model(name, num_classes=num_classes, **model_kwargs).eval()
        for value in self.model.state_dict().values():  # at their start many norms and biases would not be missed
            if value.dtype.is_floating_point and value.ndim <= 1:
                value.copy_(value + 0.2 * torch.rand(value.shape))
        self.images = torch.randn(2, 3, size, size)
        self.args = TrainConfig(
            model=name, img_size=size, mix=mix, model_kwargs=model_kwargs, data_dir='/home/someone/Flower Photos',
            output='/home/someone/runs', crop_pct=0.9, mean=[0.4, 0.5, 0.6], std=[0.2, 0.2, 0.3],
            interpolation='bilinear', crop_mode='squash', epochs=3, lr=0.1).to_dict()
        self.checkpoint = folder / 'last.pth.tar'
        self.folder = folder / 'export'
        self.save(self.checkpoint)
        export_checkpoint(self.checkpoint, self.folder, license='cc0-1.0')

    def state(self) -> dict:
        """The content of a checkpoint."""
        return {
            'arch': self.args['model'], 'epoch': 2, 'args': self.args,
            'state_dict': self.model.state_dict(), 'optimizer': {},
            'metric': 61.25, 'metrics': {'loss': 1.5, 'top1': 61.25, 'top5': 91.0},
            'saver': {'best': {'epoch': 1, 'loss': 1.4, 'top1': 63.75, 'top5': 90.0}},
            'data_config': {'class_names': [f'class {i}' for i in range(self.model.num_classes)], 'loader': 'ffcv'},
        }

    def save(self, path: Path, **changes) -> Path:
        """Write a checkpoint with some entries changed."""
        torch.save({**self.state(), **changes}, path)
        return path


@pytest.fixture(scope='module')
def cnn(tmp_path_factory):
    return Trained(tmp_path_factory.mktemp('cnn'), 'test_resnet', 7, 64)


@pytest.fixture(scope='module')
def vit(tmp_path_factory):
    """Built for dense mixing by the checkpoint's mix: no class token, no norm after the pooling."""
    dense = dict(global_pool='avg', class_token=False, fc_norm=False)
    return Trained(tmp_path_factory.mktemp('vit'), 'test_vit', 7, 64, 'densemultimix', img_size=64, **dense)


@pytest.fixture(scope='module')
def own_network(tmp_path_factory):
    return Trained(tmp_path_factory.mktemp('own'), 'preactresnet18', 7, 32, 'alignmix', channels=(8, 8, 16, 16))


@pytest.mark.parametrize('name', ['cnn', 'vit', 'own_network'])
@torch.no_grad()
def test_the_folder_computes_what_was_trained(name, request):
    trained = request.getfixturevalue(name)
    model = timm.create_model(f'local-dir:{trained.folder}', pretrained=True).eval()
    assert torch.equal(model(trained.images), trained.model(trained.images))
    config = timm.data.resolve_model_data_config(model)
    assert list(config['mean']) == [0.4, 0.5, 0.6] and config['crop_pct'] == 0.9
    assert config['interpolation'] == 'bilinear' and config['crop_mode'] == 'squash'
    assert config['input_size'][-1] == trained.images.shape[-1]


def test_arguments_of_a_vit_for_dense_mixing_are_kept(vit, tmp_path):
    """Given by the mix at training, not by the user."""
    args = {**vit.args, 'model_kwargs': {'img_size': 64}}
    folder = export_checkpoint(vit.save(tmp_path / 'dense.pth.tar', args=args), tmp_path / 'dense')
    model_args = weights.read_config(folder)['model_args']
    assert model_args['class_token'] is False and model_args['fc_norm'] is False
    model = timm.create_model(f'local-dir:{folder}', pretrained=True)
    assert model.cls_token is None and isinstance(model.fc_norm, torch.nn.Identity) and model.global_pool == 'avg'
    assert model.patch_embed.img_size == (64, 64)


def test_configuration_carries_the_runs_facts(cnn):
    config = weights.read_config(cnn.folder)
    assert config['num_classes'] == 7 and config['label_names'][3] == 'class 3'
    assert config['pretrained_cfg']['license'] == 'cc0-1.0'
    assert config['pretrained_cfg']['tag'] == 'none_flower_photos'
    facts = config['training']
    assert facts['mix'] == 'none' and facts['dataset'] == 'Flower Photos' and facts['weights'] == 'raw'
    assert facts['accuracy']['exported'] == 'last'
    assert facts['accuracy']['last'] == {'epoch': 2, 'loss': 1.5, 'top1': 61.25, 'top5': 91.0}
    assert facts['accuracy']['best']['top1'] == 63.75
    assert facts['recipe']['lr'] == 0.1 and facts['recipe']['epochs'] == 3


def test_options_of_the_mix_are_complete(vit):
    options = weights.read_config(vit.folder)['training']['mix_options']
    assert options['n'] == 1000 and options['attention'] == 'gap'  # defaults, written out


def test_several_methods_and_when_they_mix_are_facts(cnn, tmp_path):
    own = dict(mix={'mixup': 0.5, 'cutmix': 0.5}, mix_kwargs={'mixup.alpha': 0.8}, mix_prob=0.7, mix_off_epoch=280)
    folder = export_checkpoint(cnn.save(tmp_path / 'last.pth.tar', args={**cnn.args, **own}), tmp_path / 'out')
    config = json.loads((folder / 'config.json').read_text())
    facts, options = config['training'], {'mixup.alpha': 0.8, 'cutmix.alpha': 1.0}
    assert facts['mix'] == 'cutmix+mixup' and facts['mix_weights'] == own['mix']
    assert (facts['mix_prob'], facts['mix_off_epoch']) == (0.7, 280)
    assert options.items() <= facts['mix_options'].items() and own.items() <= facts['recipe'].items()
    assert config['pretrained_cfg']['tag'].startswith('cutmix_mixup_')
    assert "- drawn with weights: {'mixup': 0.5, 'cutmix': 0.5}" in (folder / 'README.md').read_text()
    assert method_name(facts['mix_weights'], facts['mix_options'], facts) == (
        '0.5 input mixup + 0.5 CutMix (mixup.alpha=0.8, mix_prob=0.7, mix_off_epoch=280)')
    timms = {'model': 'test_resnet', 'num_classes': 7, 'mix': 'mixup', 'mixup_prob': 0.6, 'mixup_off_epoch': 3}
    folder = export_checkpoint(cnn.save(tmp_path / 'timm.pth.tar', args=timms), tmp_path / 'timm')
    facts = json.loads((folder / 'config.json').read_text())['training']
    assert (facts['mix'], facts['mix_prob'], facts['mix_off_epoch']) == ('mixup', 0.6, 3)


def test_no_path_of_the_machine_is_written(cnn):
    for file in ('config.json', 'README.md'):
        assert 'someone' not in (cnn.folder / file).read_text()


def test_average_or_raw_weights(cnn, tmp_path):
    average = {key: value * 2 for key, value in cnn.model.state_dict().items()}
    both = cnn.save(tmp_path / 'model_best.pth.tar', state_dict_ema=average, epoch=1)
    for ema, expected, name in ((None, average, 'ema'), (True, average, 'ema'), (False, cnn.model.state_dict(), 'raw')):
        folder = export_checkpoint(both, tmp_path / name, ema)  # the second time over the first
        got = load_file(folder / 'model.safetensors')
        assert all(torch.equal(got[key], value) for key, value in expected.items())
        facts = weights.read_config(folder)['training']
        assert facts['weights'] == name and facts['accuracy']['measured_on'] == 'ema'
        assert facts['accuracy']['exported'] == 'best'
    assert 'Measured on the ema weights; these are the raw ones.' in (tmp_path / 'raw' / 'README.md').read_text()
    assert '63.75' in (tmp_path / 'ema' / 'README.md').read_text().split('---')[1]  # in the hub's metadata
    assert '63.75' not in (tmp_path / 'raw' / 'README.md').read_text().split('---')[1]
    with pytest.raises(ValueError, match='no moving average'):
        export_checkpoint(cnn.checkpoint, tmp_path / 'none', ema=True)


def test_a_checkpoint_of_timms_script(cnn, tmp_path):
    """Arguments in a Namespace, no facts of ours, keys of a wrapped model."""
    args = {key: value for key, value in cnn.args.items() if key not in ('mix', 'mix_kwargs', 'loader')}
    path = tmp_path / 'checkpoint-2.pth.tar'
    state = {f'module.{key}': value for key, value in cnn.model.state_dict().items()}
    torch.save({'state_dict': state, 'optimizer': {}, 'epoch': 2, 'metric': 50.0, 'args': Namespace(**args)}, path)
    facts = weights.read_config(export_checkpoint(path, tmp_path / 'e'))['training']
    assert facts['mix'] == 'none' and facts['accuracy']['epoch 2']['top1'] == 50.0
    with torch.no_grad():
        model = timm.create_model(f'local-dir:{tmp_path}/e', pretrained=True).eval()
        assert torch.equal(model(cnn.images), cnn.model(cnn.images))


def test_imagenet_is_known_by_its_classes(cnn, tmp_path):
    torch.manual_seed(0)
    model = timm.create_model('test_resnet', num_classes=1000)
    names = [f'n{i:08}' for i in range(1000)]
    path = cnn.save(tmp_path / 'last.pth.tar', state_dict=model.state_dict(), data_config={'class_names': names})
    assert weights.read_config(export_checkpoint(path, tmp_path / 'e'))['pretrained_cfg']['tag'] == 'none_in1k'


class RunsWhenUnpickled:
    def __reduce__(self):
        return exec, ("import sys; sys.was_run = True",)


def test_a_checkpoint_never_runs_code(cnn, tmp_path):
    path = cnn.save(tmp_path / 'evil.pth.tar', extra=RunsWhenUnpickled())
    with pytest.raises(ValueError, match='damaged or no checkpoint'):
        export_checkpoint(path, tmp_path / 'e')
    assert not hasattr(sys, 'was_run') and not (tmp_path / 'e').exists()


@pytest.mark.parametrize(('key', 'found'), [
    ('fc.weight', 'missing keys: fc.weight'),
    ('layer1.0.bn1.running_mean', 'missing keys: layer1.0.bn1.running_mean'),
])
def test_partial_checkpoint(cnn, tmp_path, key, found):
    state = dict(cnn.model.state_dict())
    del state[key]
    with pytest.raises(ValueError, match=found):
        export_checkpoint(cnn.save(tmp_path / 'partial.pth.tar', state_dict=state), tmp_path / 'e')


def test_checkpoint_of_another_network(cnn, tmp_path):
    path = cnn.save(tmp_path / 'other.pth.tar', args={**cnn.args, 'model': 'test_resnet', 'num_classes': 9})
    with pytest.raises(ValueError, match=r'fc.weight is \(7, 96\), not \(9, 96\)'):
        export_checkpoint(path, tmp_path / 'e')


def test_checkpoint_without_arguments(cnn, tmp_path):
    state = {key: value for key, value in cnn.state().items() if key != 'args'}
    torch.save(state, tmp_path / 'bare.pth.tar')
    with pytest.raises(ValueError, match='does not hold the arguments'):
        export_checkpoint(tmp_path / 'bare.pth.tar', tmp_path / 'e')


def test_export_by_command(cnn, tmp_path, capsys):
    main([str(cnn.checkpoint), str(tmp_path / 'e'), '--raw', '--dataset', 'in1k', '--license', 'mit'])
    assert f"timm.create_model('local-dir:{tmp_path / 'e'}', pretrained=True)" in capsys.readouterr().out
    cfg = weights.read_config(tmp_path / 'e')['pretrained_cfg']
    assert (cfg['tag'], cfg['license']) == ('none_in1k', 'mit')
    with pytest.raises(SystemExit, match='error: .* has no moving average'):
        main([str(cnn.checkpoint), str(tmp_path / 'e'), '--ema'])
