"""PuzzleMix: its energy written apart in loops, and what must hold of its masks; cut and transport have tests too."""
import itertools
import math

import numpy as np
import pytest
import timm
import torch

from timm_alignmix import MixTask, create_mix
from timm_alignmix.functional import block_transport, shares
from timm_alignmix.mixes import puzzlemix
from timm_alignmix.step_random import StepRandom

STD = (0.2, 0.25, 0.3)


def pictures(B=4, H=32, W=32, seed=0):
    """Smooth normalised images and their saliency, float64."""
    g = torch.Generator().manual_seed(seed)
    coarse = torch.rand(B, 3, H // 8, W // 8, generator=g, dtype=torch.float64)
    images = torch.nn.functional.interpolate(coarse, (H, W), mode='bilinear') - 0.5
    places = torch.rand(B, H // 8, W // 8, generator=g, dtype=torch.float64) ** 3
    noise = torch.rand(B, H, W, generator=g, dtype=torch.float64)
    saliency = places.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2) * noise
    return images / torch.tensor(STD).view(3, 1, 1).double(), saliency


def completed(images, saliency, step=0, monkeypatch=None, S=None, rank=0, **options):
    if S:
        monkeypatch.setattr(puzzlemix, '_BLOCKS', (S,))
    mix = create_mix('puzzlemix', **dict(dict(std=STD), **options))
    draw = mix.draw(images, StepRandom(0, rank).at(step, images.device))
    return mix, mix.complete(images, draw, saliency, torch.zeros(len(images)))


def energy_by_loops(x, partner, u, u_partner, lam, z, *, n_labels, beta, gamma, eta, neigh_size):
    """E of section 3.2 for one pair and one grid z, by the definition of its terms: numpy, float64."""
    S, K = len(z), n_labels - 1
    n = math.gcd(neigh_size, x.shape[1] // S, x.shape[2] // S)
    pooled = []
    for image in (partner, x):  # of label 0 (the partner) and 1
        image = image * np.array(STD).reshape(3, 1, 1)
        H, W = image.shape[1:]
        pooled.append(image.reshape(3, H // n, n, W // n, n).mean(axis=(2, 4)))
    k, m = pooled[0].shape[1] // S, pooled[0].shape[2] // S
    total = 0.0
    for r, c in itertools.product(range(S), repeat=2):
        w, level = z[r][c], round(K * (1 - z[r][c]))
        total += w * u_partner[r, c] + (1 - w) * u[r, c]
        p = math.comb(K, level) * lam ** (K - level) * (1 - lam) ** level
        total -= eta / S ** 2 * math.log(p + 1e-8)
    b = beta / (16 * S)
    for r, c in itertools.product(range(S), repeat=2):
        for down, right in ((1, 0), (0, 1)):
            if r + down >= S or c + right >= S:
                continue
            d = np.empty((2, 2))
            for a, e in itertools.product((0, 1), repeat=2):
                if down:
                    edge, columns = (r + 1) * k, slice(c * m, c * m + m)
                    last, first = pooled[a][:, edge - 1, columns], pooled[e][:, edge, columns]
                else:
                    edge, rows = (c + 1) * m, slice(r * k, r * k + k)
                    last, first = pooled[a][:, rows, edge - 1], pooled[e][:, rows, edge]
                d[a, e] = np.abs(last - first).mean()
            phi = b * gamma * d
            s, t = z[r][c], z[r + down][c + right]
            total += s * (phi[1, 0] + phi[1, 1]) / 2 + t * (phi[0, 1] + phi[1, 1]) / 2
            total += (1 - s) * (phi[0, 1] + phi[0, 0]) / 2 + (1 - t) * (phi[1, 0] + phi[0, 0]) / 2
            total += (b + (phi[1, 0] + phi[0, 1] - phi[1, 1] - phi[0, 0]) / 2) * (s - t) ** 2
    return total


OPTIONS = dict(n_labels=3, beta=1.2, gamma=0.5, eta=0.2, neigh_size=4)


@pytest.mark.parametrize('S, changes', [
    (2, {}), (2, dict(n_labels=2, beta=0.3)), (2, dict(n_labels=4, gamma=1.0)), (4, {}), (8, dict(neigh_size=3)),
    (4, dict(beta=6.0, eta=0.02)),
])
@pytest.mark.parametrize('shape', [(32, 32), (48, 32)])
def test_energy_by_loops(S, changes, shape):
    images, saliency = pictures(3, *shape)
    options = OPTIONS | changes
    mix, perm, lam = create_mix('puzzlemix', std=STD, **options), torch.tensor([2, 0, 1]), torch.tensor([0.3, 0.5, 0.9])
    u = shares(saliency, (shape[0] // S, shape[1] // S))
    cost, below, right = mix.energy(images, perm, u, lam)
    K = options['n_labels'] - 1
    levels = torch.randint(K + 1, (3, S, S), generator=torch.Generator().manual_seed(S))
    z = 1 - levels.double() / K
    found = cost.gather(1, levels.unsqueeze(1)).sum(dim=(1, 2, 3)) + sum(
        (w * z.diff(dim=dim) ** 2).sum(dim=(1, 2)) for dim, w in ((1, below), (2, right)))
    expected = [energy_by_loops(
        images[i].numpy(), images[j].numpy(), u[i].numpy(), u[j].numpy(), lam[i].double().item(), z[i].tolist(),
        **options) for i, j in enumerate(perm.tolist())]
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('n_labels', [2, 3])
def test_masks_have_the_least_energy_of_all(n_labels, monkeypatch):
    for step in range(12):
        images, saliency = pictures(seed=step)
        options = OPTIONS | dict(n_labels=n_labels, beta=1.2 * (1 + step % 3), eta=0.1)
        mix, draw = completed(images, saliency, step, monkeypatch, S=2, **options)
        u = shares(saliency, (16, 16)).numpy()
        for i, j in enumerate(draw['perm'].tolist()):
            terms = images[i].numpy(), images[j].numpy(), u[i], u[j], draw['prior_lam'].item()
            every = itertools.product(np.linspace(0, 1, n_labels), repeat=4)
            least = min(energy_by_loops(*terms, [z[:2], z[2:]], **options) for z in every)
            found = draw['mask'][i, 0, ::16, ::16].tolist()
            assert energy_by_loops(*terms, found, **options) <= least + 1e-4  # integers of 1 / 80,000


@pytest.mark.parametrize('S', [2, 4, 8, 16])
def test_equal_images_and_a_heavy_prior_give_its_mode_everywhere(S, monkeypatch):
    images, saliency = pictures()
    modes = set()
    for step in range(12):
        same = images[:1].expand(4, 3, 32, 32), saliency[:1].expand(4, 32, 32)
        for pair, options in ((same, {}), ((images, saliency), dict(eta=1000.0))):
            _, draw = completed(*pair, step, monkeypatch, S, **options)
            lam = draw['prior_lam'].item()
            mode = int(np.argmax([lam ** 2, 2 * lam * (1 - lam), (1 - lam) ** 2]))
            assert draw['mask'].unique().tolist() == [1 - mode / 2]
            modes.add(mode)
    assert len(modes) > 1


@pytest.mark.parametrize('options', [{}, dict(t_size=4), dict(t_size=6), dict(transport=False), dict(n_labels=2)])
@pytest.mark.parametrize('shape', [(32, 32), (48, 32)])
def test_images_by_loops(options, shape):
    images, saliency = pictures(4, *shape)
    for step in range(4):
        mix, draw = completed(images, saliency, step, eta=0.02, **options)
        mixed, S = mix.images(images, draw), draw['blocks']
        h, w = shape[0] // S, shape[1] // S
        mask = draw['mask']
        assert set(mask.unique().tolist()) <= set(np.linspace(0, 1, options.get('n_labels', 3)))
        counted = mask[:, 0, ::h, ::w].mean(dim=(1, 2))
        torch.testing.assert_close(draw['lam'], counted)
        torch.testing.assert_close(mask[:, 0], counted.new_tensor(
            np.kron(mask[:, 0, ::h, ::w].numpy(), np.ones((1, h, w)))))
        own, partner = images.clone(), images[draw['perm']]
        if 'moved' in draw:
            R, C = draw['moved'].shape[1:]
            p, q = shape[0] // R, shape[1] // C
            value = saliency.reshape(4, R, p, C, q).mean(dim=(2, 4))
            value = value / value.sum(dim=(1, 2), keepdim=True)
            assert torch.equal(draw['moved'], block_transport(mask[:, 0, ::p, ::q] > 0, value, 0.8))
            value = value[draw['perm']]
            assert torch.equal(draw['moved_partner'], block_transport(mask[:, 0, ::p, ::q] < 1, value, 0.8))
            if 't_size' in options:
                assert h % p == w % q == 0 and p == q == math.gcd(options['t_size'], h, w)
            else:
                assert (R, C) == (S, S)
            for out, source, moved in ((own, images, draw['moved']), (partner, partner.clone(), draw['moved_partner'])):
                for i, r, c in np.ndindex(4, R, C):
                    a, b = divmod(int(moved[i, r, c]), C)
                    out[i, :, r * p:r * p + p, c * q:c * q + q] = source[i, :, a * p:a * p + p, b * q:b * q + q]
        torch.testing.assert_close(mixed, mask * own + (1 - mask) * partner)


def test_saliency_decides_and_its_scale_does_not(monkeypatch):
    """Salient halves of the two images that are apart are both kept."""
    images = torch.zeros(2, 3, 32, 32, dtype=torch.float64)
    saliency = torch.zeros(2, 32, 32, dtype=torch.float64)
    saliency[0, :, :16], saliency[1, :, 16:] = 1, 1
    for step in range(20):
        for scale in (1.0, 1e-30):
            _, draw = completed(images, scale * saliency, step, monkeypatch, S=2, beta=0.01, eta=0.01)
            if draw['perm'].tolist() == [1, 0]:
                assert torch.equal(draw['mask'][0, 0, 0, ::16], torch.tensor([1.0, 0.0]).double())
                assert torch.equal(draw['mask'][1, 0, 0, ::16], torch.tensor([0.0, 1.0]).double())


def test_images_without_gradient_or_with_infinite_ones_are_mixed():
    images, saliency = pictures()
    for value in (0.0, torch.inf, torch.nan):
        mix, draw = completed(images.float(), torch.full_like(saliency, value).float())
        assert mix.images(images.float(), draw).isfinite().all() and draw['lam'].isfinite().all()


def test_draws_are_a_function_of_seed_step_and_rank():
    images, saliency = pictures()
    sizes = []
    for step in range(30):
        mix, draw = completed(images, saliency, step)
        torch.manual_seed(step)
        assert torch.equal(mix.images(images, completed(images, saliency, step)[1]), mix.images(images, draw))
        sizes.append(draw['blocks'])
    assert set(sizes) == {2, 4, 8, 16}
    one, two = (completed(images, saliency, 0, rank=rank)[1] for rank in (0, 1))
    assert not torch.equal(one['prior_lam'], two['prior_lam'])
    mix = create_mix('puzzlemix')
    draws = [mix.draw(torch.zeros(2, 3, 24, 20), StepRandom(0).at(step, images.device)) for step in range(12)]
    assert {draw['blocks'] for draw in draws} == {2, 4}


def test_layouts_dtypes_and_autocast():
    images, saliency = pictures()
    images, saliency = images.float(), saliency.float()
    mix, draw = completed(images, saliency)
    mixed = mix.images(images, draw)
    last = images.contiguous(memory_format=torch.channels_last)
    other = mix.images(last, completed(last, saliency)[1])
    assert torch.equal(other, mixed) and other.stride() == last.stride()
    assert mix.images(images.bfloat16(), draw).dtype == torch.bfloat16
    with torch.autocast('cpu', torch.bfloat16):
        again = completed(images, saliency)[1]
        assert torch.equal(mix.images(images, again), mixed) and torch.equal(again['lam'], draw['lam'])


def test_deviation_is_the_models_unless_given():
    model = timm.create_model('test_resnet', num_classes=5)
    model.pretrained_cfg.update(std=STD)
    images, saliency = pictures()
    u, perm, lam = shares(saliency, (8, 8)), torch.tensor([1, 2, 3, 0]), torch.tensor(0.5)
    of_model, given = MixTask(model, 'puzzlemix', verbose=False).mix, create_mix('puzzlemix', std=STD)
    for a, b in zip(of_model.energy(images, perm, u, lam), given.energy(images, perm, u, lam), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match='each of 1 channels, got std=.*set its option std'):
        given.energy(images[:, :1], perm, u, lam)
