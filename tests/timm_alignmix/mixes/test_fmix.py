"""FMix against its definition in numpy, given the same noise, and its draws."""
import numpy as np
import pytest
import torch
from scipy import stats

from timm_alignmix import create_mix
from timm_alignmix.step_random import StepRandom


def draw_of(images, step=0, **options):
    mix = create_mix('fmix', **options)
    return mix, mix.draw(images, StepRandom(0).at(step, images.device))


@pytest.mark.parametrize('H, W, decay', [(32, 32, 3.0), (20, 31, 1.5), (17, 8, 3.0)])
def test_masks_by_numpy_from_the_same_noise(H, W, decay, monkeypatch):
    drawn, randn = [], torch.randn

    def record(*args, **kwargs):
        drawn.append(randn(*args, **kwargs))
        return drawn[-1]

    monkeypatch.setattr(torch, 'randn', record)
    mix, draw = draw_of(torch.zeros(3, 1, H, W), decay=decay, per_example=True)
    for noise, lam, mask in zip(drawn[0].numpy(), draw['lam'].tolist(), draw['mask'][:, 0].numpy(), strict=True):
        spectrum = np.zeros_like(noise, dtype=np.complex128)
        for u in range(H):
            for v in range(W // 2 + 1):
                fy, fx = min(u, H - u) / H, v / W
                spectrum[u, v] = noise[u, v] / max(np.hypot(fy, fx), 1 / max(H, W)) ** decay
        grey = np.fft.irfft2(spectrum, (H, W)).flatten()
        count = mask.sum()
        assert abs(count - lam * H * W) < 1
        expected = np.zeros(H * W, bool)
        expected[np.argsort(-grey)[:count]] = True
        assert (expected.reshape(H, W) != mask).sum() <= 2  # two pixels that are the same in float32


def test_counts_are_rounded_both_ways_and_lam_is_as_drawn():
    images, up, lams = torch.zeros(64, 1, 5, 5), [], []
    for step in range(10):
        _, draw = draw_of(images, step, per_example=True)
        share, count = draw['lam'] * 25, draw['mask'].sum(dim=(1, 2, 3))
        assert ((count - share).abs() < 1).all()
        up += (count > share).tolist()
        lams += draw['lam'].tolist()
    assert stats.binomtest(sum(up), len(up)).pvalue > 1e-3
    assert stats.kstest(lams, stats.uniform(0, 1).cdf).pvalue > 1e-3  # Beta(1, 1)


def test_one_mask_or_one_for_each():
    images = torch.randn(6, 3, 32, 32)
    mix, draw = draw_of(images)
    assert draw['mask'].shape == (1, 1, 32, 32) and draw['lam'].shape == ()
    expected = torch.where(draw['mask'], images, images[draw['perm']])
    assert torch.equal(mix.images(images, draw), expected)
    masks = draw_of(images, per_example=True)[1]['mask']
    assert masks.shape == (6, 1, 32, 32) and len({mask.numpy().tobytes() for mask in masks}) == 6


def test_less_decay_makes_finer_shapes():
    edges = [(draw_of(torch.zeros(64, 1, 32, 32), decay=decay, per_example=True)[1]['mask'].float().diff(dim=3)
              .abs().sum().item()) for decay in (3.0, 1.0)]
    assert edges[1] > 2 * edges[0]
