"""timm_train against a script that has the names, the flags and the order of events of timm's train.py."""
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml

from timm_alignmix import timm_train

SCRIPT = '''
import argparse, json
from pathlib import Path

import timm
import torch
import yaml
from timm.loss import SoftTargetCrossEntropy
from timm.task import ClassificationTask
from timm.utils import ParseKwargs

config_parser = parser = argparse.ArgumentParser()
parser.add_argument('-c', '--config')
parser = argparse.ArgumentParser()
parser.add_argument('--model', default='test_resnet')
parser.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs)
parser.add_argument('--img-size', type=int, default=None)
parser.add_argument('--seed', type=int, default=42)
parser.add_argument('--smoothing', type=float, default=0.1)
parser.add_argument('--mixup', type=float, default=0.)
parser.add_argument('--cutmix', type=float, default=0.)
parser.add_argument('--cutmix-minmax', type=float, nargs='+', default=None)
parser.add_argument('--loss', default=None)
for flag in ('--naflex-loader', '--grad-checkpointing', '--jsd-loss', '--torchscript', '--bce-loss'):
    parser.add_argument(flag, action='store_true')
parser.add_argument('--mixup-prob', type=float, default=1.)
parser.add_argument('--mixup-switch-prob', type=float, default=0.5)
parser.add_argument('--mixup-mode', default='batch')
parser.add_argument('--mixup-off-epoch', type=int, default=0)
parser.add_argument('--kd-model-name')
parser.add_argument('--task', default='classification')
parser.add_argument('--output', default='.')
parser.add_argument('--steps', type=int, default=2)


def _parse_args():
    args_config, remaining = config_parser.parse_known_args()
    if args_config.config:
        parser.set_defaults(**yaml.safe_load(Path(args_config.config).read_text()))
    args = parser.parse_args(remaining)
    return args, yaml.safe_dump(args.__dict__, default_flow_style=False)


def train_one_epoch(epoch, model, loader, optimizer, args, task=None):
    results = []
    for images, target in loader:
        results.append(task(images, target))
        results[-1]['loss'].backward()
        optimizer.step()
        optimizer.zero_grad()
    return results


def main():
    args, args_text = _parse_args()
    args.rank = 0
    torch.manual_seed(args.seed)
    model = timm.create_model(args.model, num_classes=4, **args.model_kwargs)
    task = ClassificationTask(
        model=model, criterion=torch.nn.CrossEntropyLoss(label_smoothing=args.smoothing),
        device=torch.device('cpu'), dtype=None, verbose=True)
    optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.01)
    images, target = torch.randn(8, 3, args.img_size or 160, args.img_size or 160), torch.arange(8) % 4
    modes, losses = [], []
    for epoch in range(2):
        for result in train_one_epoch(
                epoch, task.get_trainable_module(), [(images, target)] * args.steps, optimizer, args, task=task):
            losses.append(result['loss'].item())
            modes.append(result.get('mode'))
    out = Path(args.output)
    (out / 'args.yaml').write_text(args_text)
    (out / 'run.json').write_text(json.dumps(dict(
        task=type(task).__name__, timm=timm.__file__, modes=modes, losses=losses)))
    torch.save(task.get_checkpoint_state(), out / 'last.pth.tar')


if __name__ == '__main__':
    main()
'''


@pytest.fixture
def script(tmp_path, monkeypatch):
    """train.py in a folder with another `timm` beside it, as in a clone of timm's repository."""
    monkeypatch.setattr(sys, 'argv', sys.argv)
    monkeypatch.setitem(sys.modules, 'train', None)  # what was there before comes back afterwards
    clone = tmp_path / 'clone'
    (clone / 'timm').mkdir(parents=True)
    (clone / 'timm' / '__init__.py').write_text('raise ImportError("the timm of the clone was imported")')
    path = clone / 'train.py'
    path.write_text(SCRIPT)
    return path


def run(script: Path, *flags: str) -> dict:
    timm_train.main([str(script), '--output', str(script.parent), '--img-size', '64', *flags])
    return json.loads((script.parent / 'run.json').read_text())


def test_trains_with_the_method_and_leaves_a_plain_timm_checkpoint(script):
    ran = run(script, '--mix', 'multimix', '--mix-kwargs', 'n=16', 'prob=1.0', '--smoothing', '0')
    assert ran['task'] == 'MixTask'
    assert len(set(ran['modes'])) == 1 and None not in ran['modes']
    assert all(loss > 0 for loss in ran['losses'])

    args = yaml.safe_load((script.parent / 'args.yaml').read_text())
    assert args['mix'] == 'multimix' and args['mix_kwargs'] == {'n': 16, 'prob': 1.0}

    state = torch.load(script.parent / 'last.pth.tar', weights_only=True)
    timm.create_model('test_resnet', num_classes=4).load_state_dict(state['state_dict'], strict=True)
    assert state['task_state']['step'] == 4


def test_without_a_method_it_is_timms_task(script):
    """--mix none gives the losses of the script run by itself, step by step."""
    # -I: python puts the folder of a script first on sys.path, here the one with the other timm
    subprocess.run([sys.executable, '-I', script, '--output', script.parent, '--img-size', '64'], check=True)
    alone = json.loads((script.parent / 'run.json').read_text())
    assert alone['task'] == 'ClassificationTask'
    # Its own task, so what --mix refuses is timm's affair here.
    ran = run(script, '--naflex-loader', '--jsd-loss', '--torchscript', '--mixup-off-epoch', '3')
    assert ran['task'] == 'ClassificationTask'
    torch.testing.assert_close(ran['losses'], alone['losses'])


def test_the_draws_depend_on_the_seed(script):
    flags = ('--mix', 'mixup', '--seed')
    first = run(script, *flags, '1')['losses']
    assert run(script, *flags, '1')['losses'] == first
    assert run(script, *flags, '2')['losses'] != first


def test_flags_from_a_config_file(script, capsys):
    config = script.parent / 'recipe.yaml'
    config.write_text(yaml.safe_dump(dict(mix='alignmix', mix_kwargs=dict(iterations=3))))
    run(script, '--config', str(config))
    args = yaml.safe_load((script.parent / 'args.yaml').read_text())
    assert args['mix'] == 'alignmix' and args['mix_kwargs'] == {'iterations': 3}
    config.write_text(yaml.safe_dump(dict(mix='alignmix', mixup=0.8)))
    with pytest.raises(SystemExit):
        run(script, '--config', str(config))
    assert 'drop it or --mixup' in capsys.readouterr().err
    config.write_text(yaml.safe_dump(dict(mix=dict(mixup=1, cutmix=1), mix_kwargs={'mixup.alpha': 0.8})))
    assert set(run(script, '--config', str(config), '--steps', '6')['modes']) == {'mixup', 'cutmix'}


def test_several_methods_and_timms_flags_of_when_to_mix(script):
    flags = ('--mix', 'mixup=0.5', 'cutmix=0.5', '--mix-kwargs', 'mixup.alpha=0.8', '--steps', '5')
    always = run(script, *flags)
    assert set(always['modes']) == {'mixup', 'cutmix'}
    args = yaml.safe_load((script.parent / 'args.yaml').read_text())
    assert args['mix'] == {'mixup': 0.5, 'cutmix': 0.5} and args['mix_kwargs'] == {'mixup.alpha': 0.8}

    off = run(script, *flags, '--mixup-off-epoch', '1')
    assert (off['modes'][:5], off['losses'][:5]) == (always['modes'][:5], always['losses'][:5])
    assert off['modes'][5:] == ['clean'] * 5

    seldom = run(script, '--mix', 'multimix', '--mix-kwargs', 'n=8', 'prob=1.0', '--mixup-prob', '0.5', '--steps', '5')
    assert set(seldom['modes']) == {'multimix/embedding', 'clean'}
    assert set(run(script, '--mix', 'mixup', '--mixup-prob', '0')['modes']) == {'clean'}


@pytest.mark.filterwarnings('ignore:.*alignment is .nearly. a no-op')
def test_the_split_is_checked_at_the_size_of_the_images(script):
    """A network with one position at 32 px has nothing to align there, at its own 160 px it has."""
    flags = ('--mix', 'alignmix', '--mix-kwargs', 'align_at=last')
    run(script, *flags, '--img-size', '160')
    with pytest.raises(ValueError, match='position'):
        run(script, *flags, '--img-size', '32')


@pytest.mark.parametrize('flags, message', [
    (('--mix', 'nomix'), 'alignmix.*densemultimix'),
    (('--mix', 'multimix', '--mix-kwargs', 'nope=1'), 'nope.*alpha'),
    (('--mix', 'mixup', '--cutmix', '1.0'), "--mix mixup takes the place of timm's mixing: drop it or --cutmix"),
    (('--mix', 'alignmix', '--mixup-switch-prob', '0.3'), 'or --mixup-switch-prob .*--mix mixup=0.5 cutmix=0.5'),
    (('--mix', 'alignmix', '--mixup-mode', 'elem'), 'or --mixup-mode .*per_example=True'),
    (('--mix', 'alignmix', '--mixup-prob', '1.5'), 'probability of mixing must be from 0 to 1, got 1.5'),
    (('--mix', 'mixup', '/data/imagenet'), "takes one method.* got 'mixup /data/imagenet' .*before it"),
    (('--mix', 'mixup=0.5', 'cutmix'), 'several with a weight each'),
    (('--mix', 'mixup=0.5', 'mixup=0.5'), 'several with a weight each'),
    (('--mix', 'mixup=half', 'cutmix=0.5'), 'several with a weight each'),
    (('--mix', 'mixup=1', 'densemultimix=1', '--loss', 'poly'), '--mix densemultimix.mixup cannot train with the poly'),
    (('--mix', 'mixup', '--naflex-loader'), '--naflex-loader loads sequences of patches.*: drop one'),
    (('--mix', 'mixup', '--jsd-loss'), '--jsd-loss compares'),
    (('--mix', 'mixup', '--torchscript'), '--torchscript makes a model that takes no hooks'),
    (('--mix', 'densemultimix', '--loss', 'poly'), '--mix densemultimix cannot train with the poly loss'),
    (('--mix', 'mixup', '--loss', 'asl'), '--mix mixup cannot train with the asl loss'),
    (('--mix', 'mixup', '--seed', '-1'), 'seed must be 0'),
    (('--mix', 'mixup', '--mixup', '0.8', '--cutmix-minmax', '0.2', '0.8'), '--mixup, --cutmix-minmax'),
    (('--mix', 'mixup', '--kd-model-name', 'resnet50'), '--kd-model-name'),
    (('--mix', 'mixup', '--task', 'multilabel'), 'needs --task classification, got --task multilabel'),
])
def test_refused_flags(script, capsys, flags, message):
    with pytest.raises(SystemExit) as e:
        run(script, *flags)
    assert e.value.code == 2
    error = ' '.join(capsys.readouterr().err.split())
    assert re.search(message, error), error


@pytest.mark.parametrize('name', timm_train.NAMES_USED)
def test_script_without_a_needed_name_is_refused(script, name):
    script.write_text(SCRIPT.split("if __name__ == '__main__'")[0] + f'\ndel {name}\n')
    with pytest.raises(SystemExit, match=f'has no {name}: it is not a train.py of timm'):
        timm_train.main([str(script), '--mix', 'mixup'])


def test_usage_and_missing_file(tmp_path):
    with pytest.raises(SystemExit, match='python -m timm_alignmix.timm_train PATH/TO/train.py'):
        timm_train.main([])
    with pytest.raises(SystemExit, match="no file .*: give the path of train.py in a clone of timm's repository"):
        timm_train.main([str(tmp_path / 'train.py')])


def test_a_timm_that_hides_the_installed_one_is_refused(script, monkeypatch):
    """`python -m` from inside a clone finds the clone's timm first."""
    timm_train.check_timm_is_the_installed_one()
    monkeypatch.setattr(timm, '__file__', str(script.parent / 'timm' / '__init__.py'))
    with pytest.raises(SystemExit, match='hides the installed timm .*: run the command from another folder'):
        timm_train.main([str(script)])
