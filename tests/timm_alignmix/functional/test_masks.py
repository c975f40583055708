"""Boxes against timm's, and masks by loops."""
import numpy as np
import pytest
import torch
from timm.data.mixup import rand_bbox

from timm_alignmix.functional import box_around, box_sides, inside


@pytest.mark.parametrize('lam', [0.0, 0.031, 0.5, 0.77, 1.0])
def test_box_is_timms(lam, monkeypatch):
    for centre in ((0, 0), (31, 5), (16, 47), (7, 20)):
        draws = iter(centre)
        monkeypatch.setattr(np.random, 'randint', lambda low, high, size=None, draws=draws: np.asarray(next(draws)))
        top, bottom, left, right = rand_bbox((32, 48), lam)
        sides = box_sides(torch.tensor([[lam]], dtype=torch.float64), 32, 48)
        assert box_around(torch.tensor([centre]), sides, 32, 48).tolist() == [[top, left, bottom, right]]


def test_masks_by_loops():
    boxes = torch.tensor([[0, 2, 3, 5], [1, 0, 4, 6], [2, 2, 2, 4]])
    masks = inside(boxes, 4, 6)
    for (top, left, bottom, right), mask in zip(boxes.tolist(), masks, strict=True):
        for y in range(4):
            for x in range(6):
                assert mask[0, y, x] == (top <= y < bottom and left <= x < right)
