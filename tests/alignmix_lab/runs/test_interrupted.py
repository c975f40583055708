"""Runs that die, are stopped or meet losses that are not finite, within an epoch."""
import multiprocessing
import os
import signal
import subprocess
import threading

import pytest
import torch

import timm_alignmix
from alignmix_lab.data import create_loaders
from alignmix_lab.runs.agreement import EXIT_REQUEUE, StopSignals

OPTIONS = {
    'none': {'mix': 'none', 'drop_path': 0.2, 'model': 'test_vit', 'model_kwargs': {'img_size': 32}},
    'alignmix': {'mix_kwargs': {'mode_probs': (0.3, 0.3, 0.4)}, 'img_size': 64},
    'multimix': {'mix_kwargs': {'n': 12}},
    'densemultimix': {'mix_kwargs': {'n': 12}, 'img_size': 64, 'amp': True, 'amp_dtype': 'bfloat16'},
}

SMALL = {'mix': 'mixup', 'img_size': 32, 'batch_size': 8, 'grad_accum_steps': 3, 'drop': 0.1}


class Died(Exception):
    """In place of SIGKILL."""


@pytest.fixture
def at_step(monkeypatch):
    """Callable: do something in the training step of a number, counted from the task's own."""
    def arrange(number, act):
        forward = timm_alignmix.MixTask.forward

        def step(task, images, target):
            before = task.step
            return act(task, forward(task, images, target)) if before == number else forward(task, images, target)
        monkeypatch.setattr(timm_alignmix.MixTask, 'forward', step)
    return arrange


def die(task, result):
    raise Died


def assert_same(found, expected, key='checkpoint'):
    """Every number of two checkpoints, bit by bit, but for their times and folders."""
    assert type(found) is type(expected), key
    if isinstance(expected, dict):
        assert set(found) == set(expected), key
        for name, value in expected.items():
            if name not in ('seconds', 'output', 'resume'):
                assert_same(found[name], value, f'{key}.{name}')
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), key
        for index, value in enumerate(expected):
            assert_same(found[index], value, f'{key}[{index}]')
    elif isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected), key
    else:
        assert found == expected, key


def last(folder):
    return torch.load(folder / 'last.pth.tar', weights_only=True)


@pytest.mark.parametrize('mix', ['none', 'mixup', 'cutmix', 'manifold', 'alignmix', 'multimix', 'densemultimix'])
def test_a_run_that_dies_within_an_epoch_ends_as_if_it_had_not(
        make_config, run_training, at_step, monkeypatch, tmp_path, mix):
    """10 batches of 8 in 4 updates an epoch, the last of one batch; one mix dies in two epochs."""
    epochs, deaths = (2, (7, 19)) if mix == 'densemultimix' else (1, (7,))
    options = {
        'mix': mix, 'img_size': 32, 'batch_size': 8, 'grad_accum_steps': 3, 'model_ema': True, 'model_ema_decay': 0.7,
        'drop': 0.1, 'clip_grad': 5.0, 'sched_on_updates': mix == 'multimix', 'reprob': 0.3, 'epochs': epochs,
        **OPTIONS.get(mix, {})}
    full = run_training(make_config(tmp_path / 'full', **options))
    config = make_config(tmp_path / 'died', resume='auto', checkpoint_steps=2, **options)
    for step in deaths:
        at_step(step, die)
        with pytest.raises(Died):
            run_training(config)
        monkeypatch.undo()
    run = run_training(config)
    found = [line for line in run.log if line.startswith('Resumed ')]
    where = f'recovery-{epochs - 1}-2.pth.tar: epoch {epochs - 1} continues after 2 of 4 updates'
    assert len(found) == 1 and where in found[0]
    assert run.result['history'] == full.result['history'][epochs - 1:]
    assert_same({**last(run.folder), 'args': None}, {**last(full.folder), 'args': None})
    assert (run.folder / 'summary.csv').read_text() == (full.folder / 'summary.csv').read_text()
    assert sorted(path.name for path in run.folder.glob('recovery*')) == [
        f'recovery-{epoch}-2.pth.tar' for epoch in range(epochs)]


@pytest.fixture(scope='module')
def whole(make_config, run_training, tmp_path_factory):
    """A run of two epochs of 4 updates, of 3 batches but for the last, left alone. Do not write into its folder."""
    return run_training(make_config(tmp_path_factory.mktemp('whole'), **SMALL))


@pytest.mark.parametrize('number, step, updates', [
    (signal.SIGUSR1, 1, 1), (signal.SIGTERM, 9, 4)])
def test_a_signal_ends_the_run_after_the_update_and_it_continues(
        whole, make_config, run_training, at_step, monkeypatch, tmp_path, number, step, updates):
    """Also in the last update of an epoch, which is evaluated when the run continues."""
    def ask(task, result):
        os.kill(os.getpid(), number)
        return result

    config = make_config(tmp_path, resume='auto', **SMALL)
    handlers = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)
    at_step(step, ask)
    with pytest.raises(SystemExit) as ended:
        run_training(config)
    assert ended.value.code == EXIT_REQUEUE == 75
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGUSR1)) == handlers
    assert [path.name for path in (tmp_path / 'run').glob('*.pth.tar')] == [f'recovery-0-{updates}.pth.tar']
    monkeypatch.undo()
    run = run_training(config)
    assert run.result['history'] == whole.result['history']
    assert_same({**last(run.folder), 'args': None}, {**last(whole.folder), 'args': None})


def test_a_run_within_its_first_epoch_is_not_trained_over(make_config, run_training, at_step, tmp_path):
    at_step(7, die)
    config = make_config(tmp_path, checkpoint_steps=1, **SMALL)
    with pytest.raises(Died):
        run_training(config)
    with pytest.raises(ValueError, match='holds a run with the same arguments.*--resume auto'):
        run_training(config)


def test_a_loss_that_is_not_finite_leaves_the_update_out(make_config, run_training, at_step, tmp_path):
    """Weights, average, running statistics and optimizer are those before it; the mean loss is that of the others."""
    def spoil(task, result):
        for module in task.get_eval_model().modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_mean.data.fill_(float('nan'))  # as a forward pass of such a batch leaves them
        return {**result, 'loss': result['loss'] * float('nan')}

    config = make_config(
        tmp_path, checkpoint_steps=1, model_ema=True, model_ema_decay=0.7, epochs=1, **{**SMALL, 'batch_size': 9})
    at_step(5, spoil)  # the last of the second of three updates
    run = run_training(config)
    before, after = (torch.load(run.folder / f'recovery-0-{n}.pth.tar', weights_only=True) for n in (1, 2))
    assert (before['progress']['totals']['skipped'], after['progress']['totals']['skipped']) == (0, 1)
    for part in ('state_dict', 'state_dict_ema', 'optimizer'):
        assert_same(after[part], before[part])
    assert_same(after['progress']['totals']['sums'], before['progress']['totals']['sums'])
    assert all(value.isfinite().all() for value in last(run.folder)['state_dict'].values())
    train = run.result['history'][0]['train']
    assert train['skipped'] == 1 and 1 < train['loss'] < 4
    assert any('the loss is not finite at epoch 0, update 1: update skipped, 1 in a row' in line for line in run.log)


@pytest.mark.parametrize('bad', [2, 3])
def test_a_run_whose_updates_are_all_left_out_ends(make_config, run_training, monkeypatch, tmp_path, bad):
    """Batches 3 to 8 are the second and the third update; a run may lose two in a row."""
    forward = timm_alignmix.MixTask.forward

    def step(task, images, target):
        is_bad = 3 <= task.step < 3 * (bad + 1)
        result = forward(task, images, target)
        return {**result, 'loss': result['loss'] / 0} if is_bad else result
    monkeypatch.setattr(timm_alignmix.MixTask, 'forward', step)
    config = make_config(tmp_path, max_nonfinite=3, epochs=1, **{**SMALL, 'batch_size': 6})
    if bad == 2:
        assert run_training(config).result['history'][0]['train']['skipped'] == 2
        return
    message = 'not finite in 3 updates in a row, the last at epoch 0, update 3; a lower --lr'
    with pytest.raises(RuntimeError, match=message):
        run_training(config)
    assert {path.name for path in (tmp_path / 'run').iterdir()} == {'.lock', 'args.yaml'}


def test_weights_that_are_not_finite_are_not_saved(make_config, run_training, at_step, tmp_path):
    def spoil(task, result):
        task.get_eval_model().fc.weight.data[0, 0] = float('inf')  # as gradients that overflow would
        return result

    at_step(19, spoil)
    with pytest.raises(RuntimeError, match='the weights are no longer finite'):
        run_training(make_config(tmp_path, opt='sgd', **{**SMALL, 'grad_accum_steps': 1}))
    assert last(tmp_path / 'run')['epoch'] == 0


def test_another_layout_continues_the_order_and_says_what_changed(
        make_config, run_training, at_step, monkeypatch, tmp_path):
    """From batches of 8 in threes to batches of 16: the images after 48 are those that batches of 16 always get."""
    seen, forward = [], timm_alignmix.MixTask.forward

    def record(task, images, target):
        seen.append(images.clone())
        return forward(task, images, target)

    options = {**SMALL, 'epochs': 1, 'checkpoint_steps': 1, 'resume': 'auto'}
    other = {**options, 'batch_size': 16, 'grad_accum_steps': 1}
    at_step(6, die)
    with pytest.raises(Died):
        run_training(make_config(tmp_path / 'died', **options))
    monkeypatch.setattr(timm_alignmix.MixTask, 'forward', record)
    run = run_training(make_config(tmp_path / 'died', **other))
    resumed = list(seen)
    seen.clear()
    run_training(make_config(tmp_path / 'other', **other))
    assert len(resumed) == 2 and len(seen) == 5
    assert torch.equal(torch.stack(resumed), torch.stack(seen[3:]))
    message = next(line for line in run.log if 'another layout' in line)
    assert 'batch_size 8 -> 16, grad_accum_steps 3 -> 1; learning rate' in message
    assert 'from 2 of 4 updates to 3 of 5 (sample 48)' in message


def test_stop_signals_are_left_alone_outside_the_main_thread():
    before = signal.getsignal(signal.SIGTERM)
    found = []

    def listen():
        with StopSignals().listening():
            found.append(signal.getsignal(signal.SIGTERM))
    thread = threading.Thread(target=listen)
    thread.start()
    thread.join()
    assert found == [before]


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGUSR1])
def test_workers_outlive_a_signal_to_the_whole_job_but_not_their_parent(digits, number):
    loader = create_loaders(str(digits), loader='timm', input_size=(3, 32, 32), batch_size=4, workers=1).train
    batches = iter(loader)
    next(batches)
    (worker,) = multiprocessing.active_children()
    subprocess.run(['kill', f'-{int(number)}', str(worker.pid)], check=True)
    assert len(list(batches)) == len(loader) - 1 and worker.is_alive()
    worker.terminate()
    worker.join(20)
    assert worker.exitcode == 0
