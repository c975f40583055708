"""The measured steps: modes in their proportions, the work of a training step, memory, refusals, and the table."""
import pytest
import timm
import torch

from alignmix_lab.evaluation.protocols import cost
from alignmix_lab.runs.timing import Timing


@pytest.mark.parametrize('probs, count, expected', [
    ({}, 2, [None, None]),
    ({'embedding': 0.5, 'input': 0.5}, 6, ['embedding'] * 3 + ['input'] * 3),
    ({'input': 1 / 3, 'feat': 1 / 3, 'feat_prime': 1 / 3}, 6, ['input'] * 2 + ['feat'] * 2 + ['feat_prime'] * 2),
    ({'a': 0.7, 'b': 0.3}, 2, ['a', 'b']),  # 1.4 and 0.6: the larger remainder gets the odd one
    ({'a': 1.0, 'b': 0.0}, 3, ['a'] * 3),
])
def test_modes_in_proportion(probs, count, expected):
    assert cost.modes_in_proportion(probs, count) == expected


@pytest.fixture(scope='module')
def steps():
    images, target = torch.randn(4, 3, 32, 32), torch.arange(4)
    return cost.build_steps(
        lambda mix: timm.create_model('test_resnet', num_classes=5), ['alignmix'], images, target)[0]


def test_a_cycle_runs_the_modes_and_keeps_the_weights(steps):
    step = steps['alignmix']
    model = step.task.get_eval_model()
    before = {name: value.clone() for name, value in model.named_parameters()}
    assert step() == ['input', 'input', 'feat', 'feat', 'feat_prime', 'feat_prime']
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())
    assert all(value.grad is not None for value in model.parameters())
    # Momentum was updated, so the update is part of the step: as many bytes as the parameters.
    params = sum(p.nbytes for p in model.parameters())
    assert step.state_bytes() == 2 * params + sum(b.nbytes for b in model.buffers())


def test_measured_together():
    images, target, ticks = torch.randn(2, 3, 32, 32), torch.arange(2), []
    steps, _ = cost.build_steps(
        lambda mix: timm.create_model('test_resnet', num_classes=5), ['none', 'multimix'], images, target, cycle=1)
    costs = cost.measure_steps(steps, rounds=2, tick=lambda: ticks.append(1))
    assert list(costs) == ['none', 'multimix'] and len(ticks) == 2 * (1 + 2 + 1)  # warmup, rounds, memory
    assert all(len(c.step.seconds) == 2 for c in costs.values())
    parameters = sum(p.nbytes for p in steps['none'].task.get_eval_model().parameters())
    assert costs['none'].step_bytes > parameters  # the gradients at least


def test_a_mix_that_refuses_is_left_out_with_its_reason():
    images, target = torch.randn(2, 3, 64, 64), torch.arange(2)
    steps, refused = cost.build_steps(
        lambda mix: timm.create_model('test_vit', img_size=64, num_classes=5), ['none', 'densemultimix'],
        images, target)
    assert list(steps) == ['none'] and 'class token' in refused['densemultimix']


def test_row_by_hand():
    base = cost.StepCost(Timing([0.1, 0.2, 0.4]), 2 ** 20, 2 ** 20)
    mine = cost.StepCost(Timing([0.11, 0.24, 0.40]), 2 ** 20, 3 * 2 ** 20)  # ratios 1.1, 1.2, 1.0
    row = cost._row('net', 'mixup', mine, base, 12)
    assert row['images_s'] == pytest.approx(50) and row['ms'] == pytest.approx(240)
    assert row['overhead'] == pytest.approx(10) and (row['mib'], row['more_mib']) == (4, 2)
    assert cost._row('net', 'none', base, base, 12)['overhead'] is None
