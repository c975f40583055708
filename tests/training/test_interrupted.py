"""Runs that die, are stopped or meet losses that are not finite, within an epoch."""

import pytest
import torch

import timm_alignmix

OPTIONS = {
    'none': {'mix': 'none', 'drop_path': 0.2, 'model': 'test_vit', 'model_kwargs': {'img_size': 32}},
    'alignmix': {'mix_kwargs': {'mode_probs': (0.3, 0.3, 0.4)}, 'img_size': 64},
    'multimix': {'mix_kwargs': {'n': 12}},
    'densemultimix': {'mix_kwargs': {'n': 12}, 'img_size': 64, 'amp': True, 'amp_dtype': 'bfloat16'},
}


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
