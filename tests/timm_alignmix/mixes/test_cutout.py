"""Cutout against its definition in plain loops."""
import numpy as np
import pytest
import torch
from scipy import stats

from timm_alignmix import create_mix
from timm_alignmix.step_random import StepRandom


def draws_of(B, H, W, **options):
    mix, images = create_mix('cutout', **options), torch.rand(B, 3, H, W) + 1
    return mix, images, mix.draw(images, StepRandom(0).at(0, images.device))


def squares(length, H, W):
    """All masks that one square can make, and of how many centres."""
    found = {}
    for y in range(H):
        for x in range(W):
            mask = np.zeros((H, W), bool)
            mask[max(y - length // 2, 0):y + length // 2, max(x - length // 2, 0):x + length // 2] = True
            found[mask.tobytes()] = found.get(mask.tobytes(), 0) + 1
    return found


@pytest.mark.parametrize('length', [4, 5, 16])
def test_each_image_loses_a_square_around_a_uniform_centre(length):
    H, W, B = 8, 6, 4000
    mix, images, draw = draws_of(B, H, W, length=length)
    mixed, expected = mix.images(images, draw), squares(length, H, W)
    holes = (mixed == 0).all(dim=1)
    assert torch.equal(mixed[~holes.unsqueeze(1).expand_as(mixed)], images[~holes.unsqueeze(1).expand_as(mixed)])
    counts = dict.fromkeys(expected, 0)
    for hole in holes.numpy():
        counts[hole.tobytes()] += 1  # KeyError: no square
    share = np.array(list(expected.values())) * B / (H * W)
    assert stats.chisquare(list(counts.values()), share).pvalue > 1e-3 if len(share) > 1 else holes.all()


def test_several_holes_and_the_default_side():
    mix, images, draw = draws_of(200, 32, 48, n_holes=3, length=2)
    counts = (mix.images(images, draw) == 0).all(dim=1).sum(dim=(1, 2))
    assert counts.max() == 12 and counts.min() < 12
    mix, images, draw = draws_of(200, 32, 48)
    assert (mix.images(images, draw) == 0).all(dim=1).sum(dim=(1, 2)).max() == 16 ** 2
    assert draw['lam'] is None
    target = torch.rand(200, 5)
    assert mix.target(target, draw) is target
