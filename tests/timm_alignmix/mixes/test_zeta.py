"""zeta-Mixup against its definition in plain loops."""
import numpy as np
import pytest
import torch
from scipy import stats

from timm_alignmix import create_mix
from timm_alignmix.step_random import StepRandom


def draw_of(mix, B, step=0, size=2):
    images = torch.randn(B, 3, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
    return images, mix.draw(images, StepRandom(0).at(step, images.device))


def weights_by_hand(B, gamma):
    powers = [j ** -gamma for j in range(1, B + 1)]
    return [p / sum(powers) for p in powers]


@pytest.mark.parametrize('B, gamma', [(1, 2.8), (2, 2.8), (7, 2.8), (128, 2.8), (20, 1.72865)])
def test_rows_hold_the_weights_with_the_largest_for_the_example(B, gamma):
    weights = draw_of(create_mix('zeta', gamma=gamma), B)[1]['weights'].double()
    expected = torch.tensor(weights_by_hand(B, gamma), dtype=torch.float64).expand(B, B)
    torch.testing.assert_close(weights.sort(dim=1, descending=True).values, expected, rtol=1e-6, atol=1e-9)
    assert torch.equal(weights.argmax(dim=1), torch.arange(B)) and weights.diagonal().min() >= 0.4999
    if B == 128 and gamma == 2.8:
        assert [round(w, 3) for w in expected[0, :4].tolist()] == [0.802, 0.115, 0.037, 0.017]


def test_images_and_targets_by_double_loop():
    mix, B = create_mix('zeta'), 6
    images, draw = draw_of(mix, B)
    target = torch.rand(B, 4, dtype=torch.float64)
    mixed, rows, weights = mix.images(images, draw), mix.target(target, draw), draw['weights'].tolist()
    for i in range(B):
        image, row = torch.zeros_like(images[0]), torch.zeros_like(target[0])
        for j in range(B):
            image += weights[i][j] * images[j]
            row += weights[i][j] * target[j]
        torch.testing.assert_close(mixed[i], image)
        torch.testing.assert_close(rows[i], row)


def test_the_order_of_the_others_is_uniform_and_independent():
    mix, counts, same = create_mix('zeta'), np.zeros(6), 0
    orders = {}
    for step in range(600):
        order = draw_of(mix, 4, step)[1]['weights'].argsort(dim=1, descending=True)[:, 1:]
        others = [sorted({0, 1, 2, 3} - {i}) for i in range(4)]
        ranks = [tuple(others[i].index(j) for j in order[i].tolist()) for i in range(4)]
        counts[orders.setdefault(ranks[0], len(orders))] += 1
        same += ranks[0] == ranks[1]
    assert stats.chisquare(counts).pvalue > 1e-3  # all 3! orders of a row
    assert stats.binomtest(same, 600, 1 / 6).pvalue > 1e-3  # whatever the other rows have
