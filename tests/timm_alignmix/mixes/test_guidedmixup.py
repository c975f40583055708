"""GuidedMixup on maps made by hand; the saliency and the pairing have their own tests."""
import numpy as np
import pytest
import torch

from timm_alignmix import create_mix
from timm_alignmix.functional import gaussian_blur, greedy_cycle, spectral_residual
from timm_alignmix.mixes import guidedmixup
from timm_alignmix.step_random import StepRandom


def draw_of(images, **options):
    mix = create_mix('guidedmixup', prob=1.0, **options)
    return mix, mix.draw(images, StepRandom(0).at(0, images.device))


def test_z_by_loops():
    images = torch.randn(5, 3, 20, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    mix, draw = draw_of(images)
    s = gaussian_blur(spectral_residual(images)).numpy()
    s = np.stack([image / image.sum() for image in s])
    distance = np.array([[np.sqrt(((a - b) ** 2).sum()) for b in s] for a in s])
    perm = greedy_cycle(torch.from_numpy(distance)).tolist()
    assert draw['perm'].tolist() == perm and all(i != j for i, j in enumerate(perm))
    mixed, target = mix.images(images, draw), mix.target(torch.eye(5, dtype=torch.float64), draw)
    for i, j in enumerate(perm):
        z = s[i] / (s[i] + s[j])
        expected = z * images[i].numpy() + (1 - z) * images[j].numpy()
        np.testing.assert_allclose(mixed[i].numpy(), expected, rtol=1e-6, atol=1e-8)
        assert target[i, i].item() == pytest.approx(z.mean(), rel=1e-6)
        assert target[i, j].item() == pytest.approx(1 - z.mean(), rel=1e-6)


def test_maps_made_by_hand(monkeypatch):
    """One image is salient on the left, three times as much as on the right, the other the other way round."""
    left = torch.tensor([3.0] * 8 + [1.0] * 8).expand(16, 16)
    monkeypatch.setattr(guidedmixup, 'spectral_residual', lambda images: torch.stack([5 * left, left.flip(1)]))
    monkeypatch.setattr(guidedmixup, 'gaussian_blur', lambda s: s)
    images = torch.stack([torch.zeros(3, 16, 16), torch.ones(3, 16, 16)])
    mix, draw = draw_of(images)
    expected = torch.tensor([0.25] * 8 + [0.75] * 8).expand(3, 16, 16)  # the share of the second image
    torch.testing.assert_close(mix.images(images, draw), torch.stack([expected, expected]))
    torch.testing.assert_close(draw['lam'], torch.tensor([0.5, 0.5]))


def test_blank_images_are_mixed_in_halves():
    mix, draw = draw_of(torch.zeros(4, 3, 32, 32))
    torch.testing.assert_close(draw['mask'], torch.full((4, 1, 32, 32), 0.5))
    torch.testing.assert_close(draw['lam'], torch.full((4,), 0.5))


def test_random_pairs_are_a_permutation_of_the_draws():
    images = torch.randn(32, 3, 16, 16)
    greedy, random = (draw_of(images, pairing=pairing)[1]['perm'] for pairing in ('greedy', 'random'))
    assert not torch.equal(greedy, random) and torch.equal(random.sort().values, torch.arange(32))


def test_gradients_are_blurred_and_weighed_whatever_their_scale():
    images = torch.randn(5, 3, 20, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gradient = torch.rand(5, 20, 24, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) ** 4
    mix, draw = draw_of(images, saliency='ap', saliency_mode='train')
    assert draw['clean_pass'] == mix.clean_pass == 'train' and 'mask' not in draw
    s = gaussian_blur(gradient).numpy()
    s = np.stack([image / image.sum() for image in s])
    for scale in (1.0, 1e-20):
        done = mix.complete(images, draw, scale * gradient, torch.arange(5))
        distance = np.array([[np.sqrt(((a - b) ** 2).sum()) for b in s] for a in s])
        assert torch.equal(done['perm'], greedy_cycle(torch.from_numpy(distance))) and 'clean_pass' not in done
        z = s / (s + s[done['perm'].numpy()])
        np.testing.assert_allclose(done['mask'][:, 0].numpy(), z, rtol=1e-5)
        np.testing.assert_allclose(done['lam'].numpy(), z.mean(axis=(1, 2)), rtol=1e-6)
    assert create_mix('guidedmixup').clean_pass is None
