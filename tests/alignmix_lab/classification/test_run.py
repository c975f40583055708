"""Whole runs on real images: what they return, write and print, and what their checkpoints hold."""
import csv
import json
import math
import re

import pytest
import timm
import torch
import yaml
from timm.models import load_checkpoint

from alignmix_lab.classification import prepare

MIXES = ['none', 'alignmix', 'multimix', 'densemultimix']
NUMBER = r'-?\d+\.?\d*(?:e[+-]\d+)?'


def best_epoch(history, metric='top1'):
    """The first epoch with the largest metric."""
    values = [entry['validation'][metric] for entry in history]
    return history[values.index(max(values))]['epoch']


@pytest.mark.parametrize('mix', MIXES)
def test_a_run_learns_and_returns_every_epoch(finished, mix):
    run = finished(mix)
    history = run.result['history']
    assert [entry['epoch'] for entry in history] == list(range(run.config.epochs))
    losses = [entry['train']['loss'] for entry in history]
    assert all(0 < loss < 4 for loss in losses) and losses[-1] < losses[0]
    assert run.result['last'] == {'epoch': run.config.epochs - 1, **history[-1]['validation']}
    best = best_epoch(history)
    assert run.result['best'] == {'epoch': best, **history[best]['validation']}
    assert run.result['folder'] == run.folder


@pytest.mark.parametrize('mix', MIXES)
def test_summary_csv_holds_the_history(finished, mix):
    run = finished(mix)
    with open(run.folder / 'summary.csv', newline='') as file:
        rows = list(csv.reader(file))
    assert rows[0] == ['epoch', 'train_loss', 'train_accuracy', 'eval_loss', 'eval_top1', 'eval_top5', 'lr']
    expected = [
        [entry['epoch'], *(entry['train'][key] for key in ('loss', 'accuracy')),
         *(entry['validation'][key] for key in ('loss', 'top1', 'top5')), entry['lr']]
        for entry in run.result['history']]
    assert [[float(value) for value in row] for row in rows[1:]] == expected


def test_the_learning_rate_follows_timms_schedule(finished):
    """A cosine over 3 epochs, of which the first warms up from --warmup-lr."""
    rates = [entry['lr'] for entry in finished('densemultimix').result['history']]
    cosine = [0.5 * 3e-3 * (1 + math.cos(math.pi * epoch / 3)) for epoch in (1, 2)]
    assert rates == pytest.approx([1e-5, *cosine], rel=1e-9)


@pytest.mark.parametrize('mix', MIXES)
def test_args_yaml_starts_the_same_run_as_config(finished, script, mix):
    run = finished(mix)
    again = script.parse_config(['--config', str(run.folder / 'args.yaml')])
    assert yaml.safe_load(yaml.safe_dump(run.config.to_dict())) == again.to_dict()


@pytest.mark.parametrize('mix', MIXES)
def test_log_lines_have_timms_shape(finished, mix):
    run = finished(mix)
    updates = {'alignmix': 3}.get(mix, 5)  # 5 batches, two of them to an update for alignmix
    train = re.compile(
        r'Train: (\d+) \[ *(\d+)/(\d+) \( *(\d+)%\)\]  '
        rf'Loss: ({NUMBER}) \(({NUMBER})\)  '
        r'Time: \d+\.\d{3}s, +\d+\.\d{2}/s  \(\d+\.\d{3}s, +\d+\.\d{2}/s\)  '
        r'LR: \d\.\d{3}e[+-]\d{2}  Data: \d+\.\d{3} \(\d+\.\d{3}\)')
    found = [train.fullmatch(line) for line in run.log if line.startswith('Train: ') and '[' in line]
    assert all(found)
    interval = run.config.log_interval
    logged = [update for update in range(updates) if update % interval == 0 or update == updates - 1]
    assert [(int(match[1]), int(match[2]), int(match[3]), int(match[4])) for match in found] == [
        (epoch, update, updates, round(100 * (update + 1) / updates))
        for epoch in range(run.config.epochs) for update in logged]
    for entry, match in zip(run.result['history'], found[len(logged) - 1::len(logged)], strict=True):
        assert float(match[6]) == pytest.approx(entry['train']['loss'], rel=1e-2)


@pytest.mark.parametrize('mix', MIXES)
def test_evaluation_lines_have_timms_shape(finished, mix):
    run = finished(mix)
    name = 'Test (EMA)' if run.config.model_ema else 'Test'
    test = re.compile(
        rf'{re.escape(name)}: \[ *(\d+)/3\]  Time: \d+\.\d+\S*  Loss: +({NUMBER})  '
        rf'Acc@1: +({NUMBER})  Acc@5: +({NUMBER})')
    found = [match for match in map(test.fullmatch, run.log) if match and int(match[1]) == 3]
    assert [[float(match[index]) for index in (2, 3, 4)] for match in found] == [
        pytest.approx([entry['validation'][key] for key in ('loss', 'top1', 'top5')], abs=6e-4)
        for entry in run.result['history']]


@pytest.mark.parametrize('mix', MIXES)
def test_the_end_names_the_last_and_the_best_epoch(finished, mix):
    run = finished(mix)
    history, lines = run.result['history'], '\n'.join(run.log)
    best, last = best_epoch(history), len(history) - 1
    top1 = [entry['validation']['top1'] for entry in history]
    assert f'*** Best metric: {top1[best]} (epoch {best})' in lines
    for name, epoch in (('Last epoch', last), ('Best epoch by top1', best)):
        line = re.search(rf'^\*\*\* {name} \({epoch}\): .*top1 ({NUMBER})', lines, re.MULTILINE)
        assert line and float(line[1]) == pytest.approx(top1[epoch], rel=1e-3)
    ranked = json.loads(run.printed.split('--result\n')[1])
    assert {entry['epoch'] for entry in ranked} == set(range(len(history)))
    assert ranked[-1]['validation']['top1'] == max(top1)


def test_modes_and_lam_are_logged(finished):
    """alignmix draws one of clean, mixed images or features; each batch of an epoch is one of them."""
    lines = [line for line in finished('alignmix').log if 'modes: ' in line]
    assert len(lines) == 2
    for line in lines:
        found = re.findall(r'(\d+\.\d)% \(loss \d+\.?\d*, accuracy (\d+\.\d)%\)', line)
        shares, accuracies = zip(*found, strict=True)
        assert sum(map(float, shares)) == pytest.approx(100, abs=0.3)
        assert all(0 <= float(accuracy) <= 100 for accuracy in accuracies)


@pytest.mark.parametrize('mix', MIXES)
def test_checkpoints_give_the_recorded_metrics_in_a_plain_timm_model(finished, new_model, evaluate, mix):
    run = finished(mix)
    for name, epoch in (('last', len(run.result['history']) - 1), ('model_best', best_epoch(run.result['history']))):
        model = new_model()
        load_checkpoint(model, run.folder / f'{name}.pth.tar', use_ema=run.config.model_ema, strict=True)
        found, recorded = evaluate(model), run.result['history'][epoch]['validation']
        assert found['top1'] == pytest.approx(recorded['top1'], abs=1e-9)
        assert found['top5'] == pytest.approx(recorded['top5'], abs=1e-9)
        assert found['loss'] == pytest.approx(recorded['loss'], rel=1e-5)
    assert evaluate(new_model())['loss'] != pytest.approx(found['loss'], rel=1e-2)


def test_checkpoints_hold_timms_keys(finished, new_model):
    run = finished('densemultimix')
    state = torch.load(run.folder / 'last.pth.tar', weights_only=True)
    model = new_model().state_dict()
    assert set(state['state_dict']) == set(state['state_dict_ema']) == set(model)
    assert not torch.equal(state['state_dict']['conv1.0.weight'], state['state_dict_ema']['conv1.0.weight'])
    assert (state['epoch'], state['arch'], state['version']) == (2, 'test_resnet', 2)
    assert state['metric'] == run.result['last']['top1']
    assert state['task_state'] == {'step': 15, 'seed': 42}
    assert state['args']['mix'] == 'densemultimix' and 'optimizer' in state


def test_the_trained_weights_and_their_average_are_both_evaluated(finished, new_model, evaluate):
    run = finished('densemultimix')
    model = new_model()
    load_checkpoint(model, run.folder / 'last.pth.tar', use_ema=False, strict=True)
    last = [line for line in run.log if line.startswith('Test: [   3/3]')][-1]
    shown = re.search(rf'Loss: +({NUMBER})  Acc@1: +({NUMBER})', last)
    assert [float(shown[1]), float(shown[2])] == pytest.approx(list(evaluate(model).values())[:2], abs=6e-4)
    assert float(shown[1]) != pytest.approx(run.result['last']['loss'], abs=1e-3)


def test_the_export_is_the_last_checkpoint_as_a_timm_folder(finished, evaluate):
    run = finished('none')
    model = timm.create_model(f'local-dir:{run.folder / "export"}', pretrained=True)
    assert model.pretrained_cfg['input_size'] == (3, 64, 64)
    assert evaluate(model)['loss'] == pytest.approx(run.result['last']['loss'], rel=1e-5)


@pytest.mark.parametrize('options, missed', [
    (dict(sched='multistep', epochs=6, decay_milestones=[4, 16, 22]), '--decay-milestones 16 22: the run has 6 epochs'),
    (dict(sched='multistep', epochs=6, decay_milestones=[7], warmup_epochs=3, warmup_prefix=True), ' 7: the run has 9'),
    (dict(sched='step', epochs=6), '--decay-epochs 90: the run has 6 epochs'),
    (dict(sched='multistep', epochs=6, decay_milestones=[4, 6]), None),
    (dict(sched='step', epochs=6, decay_epochs=5), None),
])
def test_decays_that_never_come_are_told(make_config, tmp_path, caplog, options, missed):
    """As timm's schedule has it: a rate that no epoch of the run has."""
    run, _ = prepare(make_config(tmp_path, **options))
    assert missed is None or missed in caplog.text
    assert ('will not decay' in caplog.text) == ('too short to decay at' in run.describe()) == (missed is not None)
    rates = []
    for epoch in range(run.num_epochs):
        run.scheduler.step(epoch)
        rates.append(run.optimizer.param_groups[0]['lr'])
    planned = len(options.get('decay_milestones', [0]))
    reached = planned - len(run.missed_decays())
    assert len(set(rates[options.get('warmup_epochs', 0):])) == 1 + reached


def test_a_dry_run_trains_nothing(make_config, run_training, script, tmp_path):
    config = make_config(tmp_path, mix='multimix', dry_run=True, lr=None, opt='adamw', grad_accum_steps=2)
    run = run_training(config)
    assert run.result is None and [path.name for path in run.folder.iterdir()] == ['learning_rate.png']
    lines = '\n'.join(run.log)
    assert 'Global batch: 32 ' in lines and 'Steps: 2 epochs x 3 updates (5 batches)' in lines
    printed = yaml.safe_load(run.printed)
    assert printed['lr'] == pytest.approx(0.1 * math.sqrt(32 / 256))
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_text(run.printed)
    assert script.parse_config(['-c', str(recipe)]).to_dict() == printed
