"""What shows how a run goes: trackers, the picture of its curves, the report."""
import re
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from accelerate.tracking import GeneralTracker
from PIL import Image

from alignmix_lab.runs import trackers
from alignmix_lab.runs.plotting import COLORS


class Recorder(GeneralTracker):
    """A tracker that keeps what it gets."""
    name = 'recorder'
    requires_logging_directory = False

    def __init__(self):
        super().__init__()
        self.logged, self.finished = [], 0

    tracker = property(lambda self: self)

    def store_init_configuration(self, values):
        self.configuration = values

    def log(self, values, step=None, **kwargs):
        self.logged.append((step, values))

    def finish(self):
        self.finished += 1


def test_trackers_get_every_figure(make_config, run_training, monkeypatch, tmp_path):
    recorder = Recorder()
    monkeypatch.setattr('alignmix_lab.runs.accelerator.check_trackers', lambda names: None)
    monkeypatch.setattr(trackers, 'filter_trackers', lambda names, folder: [recorder])
    run = run_training(make_config(
        tmp_path, mix='cutmix', log_trackers=['tensorboard'], log_interval=2, clip_grad=1e-3))
    assert recorder.finished == 1 and recorder.configuration['mix'] == 'cutmix'
    train = [(step, values) for step, values in recorder.logged if 'train/lr' in values]
    assert [step for step, _ in train] == [1, 3, 5, 6, 8, 10]
    assert set(train[0][1]) == {
        f'train/{name}' for name in (
            'loss', 'loss/input', 'accuracy', 'accuracy/input', 'share/input', 'lam', 'lr', 'grad_norm',
            'images_per_second', 'data_wait_share', 'skipped_updates')}
    history = run.result['history']
    for epoch, part in enumerate((train[:3], train[3:])):
        steps = np.array([1, 2, 2])  # since the line before
        for name in ('loss', 'accuracy'):
            mean = sum(count * values[f'train/{name}'] for count, (_, values) in zip(steps, part, strict=True)) / 5
            assert mean == pytest.approx(history[epoch]['train'][name], rel=1e-5)
        for _, values in part:
            assert values['train/share/input'] == 1 and 0 < values['train/lam'] < 1
            assert values['train/grad_norm'] > 0.01  # before clipping
            assert 0 <= values['train/data_wait_share'] <= 1 and values['train/images_per_second'] > 0
    evaluated = [(step, values) for step, values in recorder.logged if 'eval/top1' in values]
    assert [(step, values['eval/loss']) for step, values in evaluated] == [
        (5 * (epoch + 1), entry['validation']['loss']) for epoch, entry in enumerate(history)]


def test_tensorboard_reads_what_was_logged(make_config, run_training, tmp_path):
    reader = pytest.importorskip('tensorboard.backend.event_processing.event_accumulator')
    run = run_training(make_config(tmp_path, epochs=1, log_trackers=['tensorboard'], log_interval=1))
    found = reader.EventAccumulator(str(run.folder / 'timm-alignmix'))
    found.Reload()
    losses = found.Scalars('train/loss')
    assert [event.step for event in losses] == [1, 2, 3, 4, 5]
    assert np.mean([event.value for event in losses]) == pytest.approx(run.result['history'][0]['train']['loss'])


def test_wandb_gets_project_entity_group_and_tags(make_config, run_training, monkeypatch, tmp_path):
    """Through Accelerate's own tracker, to a stand-in for the package."""
    started, logged = [], []
    run = SimpleNamespace(log=lambda values, step=None: logged.append(step), finish=lambda: None)
    wandb = ModuleType('wandb')
    wandb.init = lambda **options: started.append(options) or run
    wandb.config = SimpleNamespace(update=lambda values, allow_val_change: None)
    monkeypatch.setitem(sys.modules, 'wandb', wandb)
    monkeypatch.setattr('alignmix_lab.runs.accelerator.check_trackers', lambda names: None)
    monkeypatch.setattr(trackers, 'filter_trackers', lambda names, folder: names)
    run_training(make_config(
        tmp_path, epochs=1, log_trackers=['wandb'], wandb_project='flowers', wandb_entity='us', wandb_group='sizes',
        wandb_tags=['small', 'first']))
    options, = started
    assert {key: options[key] for key in ('project', 'entity', 'group', 'tags', 'name', 'resume')} == dict(
        project='flowers', entity='us', group='sizes', tags=['small', 'first'], name='run', resume='allow')
    assert logged


@pytest.mark.parametrize('name', ['tensorboard', 'wandb'])
def test_a_missing_tracker_is_refused(make_config, run_training, monkeypatch, tmp_path, name):
    monkeypatch.setattr(trackers, 'find_spec', lambda package: None)
    with pytest.raises(ValueError, match=f'--log-trackers {name}: the package is not installed; pip install {name}'):
        run_training(make_config(tmp_path, log_trackers=[name]))


def test_curves_and_report(finished):
    run = finished('densemultimix')
    pixels = np.asarray(Image.open(run.folder / 'curves.png').convert('RGB')).reshape(-1, 3)
    for color in COLORS[:2]:
        rgb = [int(color[i:i + 2], 16) for i in (1, 3, 5)]
        assert (pixels == rgb).all(axis=1).sum() > 50
    text = (run.folder / 'report.md').read_text()
    last, best = run.result['last'], run.result['best']
    assert f'| 2 (last) | {last["loss"]:.4g} | {last["top1"]:.4g} | {last["top5"]:.4g} |' in text
    assert f'| {best["epoch"]} (best by top1) | {best["loss"]:.4g} |' in text
    modes = run.result['history'][-1]['train']['modes']
    assert re.findall(r'^\| (\w+) \| ([\d.]+)% \|', text, re.MULTILINE) == [
        (mode, f'{100 * values["share"]:.1f}') for mode, values in modes.items()]
    assert 'test_resnet' in text and '3 epochs of 5 updates, 16 images each' in text and '](curves.png)' in text
