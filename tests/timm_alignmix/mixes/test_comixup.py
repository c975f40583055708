"""Co-Mixup: its costs, A, images and targets written apart in loops; the labels have tests of their own."""
import math

import numpy as np
import pytest
import timm
import torch

from timm_alignmix import MixTask, create_mix, functional
from timm_alignmix.mixes import comixup
from timm_alignmix.step_random import StepRandom


def pictures(B=6, H=32, W=32, seed=0):
    """Images and a saliency that is in few places, float64."""
    g = torch.Generator().manual_seed(seed)
    images = torch.randn(B, 3, H, W, generator=g, dtype=torch.float64)
    places = torch.rand(B, H // 8, W // 8, generator=g, dtype=torch.float64) ** 3
    noise = torch.rand(B, H, W, generator=g, dtype=torch.float64)
    return images, places.repeat_interleave(8, dim=1).repeat_interleave(8, dim=2) * noise


def completed(images, saliency, step=0, seed=0, rank=0, **options):
    mix = create_mix('comixup', **options)
    draw = mix.draw(images, StepRandom(seed, rank).at(step, images.device))
    return mix, mix.complete(images, draw, saliency, None)


def parts_of(B, m):
    """Sizes as equal as they can be, larger ones first."""
    P = math.ceil(B / m)
    return [B // P + (p < B % P) for p in range(P)]


@pytest.mark.parametrize('B, m, shape, S, changes', [
    (6, 20, (32, 32), 4, {}), (7, 3, (32, 48), 4, dict(omega=0.3, eta=0.4)), (5, 5, (24, 24), 3, dict(omega=1.0)),
    (4, 4, (72, 80), 2, dict(omega=0.5)), (3, 2, (6, 6), 2, {}), (3, 1, (16, 16), 4, dict(omega=0.5)),
])
def test_costs_and_compatibility_by_loops(B, m, shape, S, changes):
    options = dict(m=m, blocks=S, eta=0.05, omega=0.001) | changes
    H, W = shape
    saliency = torch.rand(B, H, W, generator=torch.Generator().manual_seed(B), dtype=torch.float64) ** 4
    g = torch.Generator().manual_seed(1)
    variate, start = (torch.rand(*size, generator=g, dtype=torch.float64) for size in ((B,), (B, S, S)))
    terms = [x.numpy() for x in create_mix('comixup', **options).terms(saliency, variate, start)]
    n, first = min(8, H, W), 0
    stride = 1 if max(H, W) <= 64 else 8
    assert len(terms[0]) == len(parts_of(B, m))
    for p, M in enumerate(parts_of(B, m)):
        cost, A, begin, present = (x[p] for x in terms)
        assert present.tolist() == [True] * M + [False] * (len(present) - M)
        place = []
        for k in range(M):
            s = saliency[first + k].numpy()
            a = variate[first + k].item() / variate[first:first + M].sum().item()
            for r, c in np.ndindex(S, S):
                h, w = H // S, W // S
                u = s[r * h:r * h + h, c * w:c * w + w].sum() / s.sum()
                assert cost[k, r, c] == pytest.approx(-u - options['eta'] / S ** 2 * math.log(a + 1e-8), rel=1e-9)
                assert begin[k, r, c] == int(start[first + k, r, c].item() * M)
            windows = {(y, x): s[y:y + n, x:x + n].mean()
                       for y in range(0, H - n + 1, stride) for x in range(0, W - n + 1, stride)}
            place.append(tuple(v // stride for v in max(windows, key=windows.get)))
        D = np.array([[abs(a[0] - b[0]) + abs(a[1] - b[1]) for b in place] for a in place], dtype=float)
        share = M * D / D.sum() if D.sum() else D
        expected = (1 - options['omega']) * np.eye(M) + options['omega'] * share
        np.testing.assert_allclose(A[:M, :M], expected, rtol=1e-9, atol=1e-12)
        first += M


@pytest.mark.parametrize('B, m, S, shape', [(6, 20, 4, (32, 32)), (7, 4, 3, (24, 48)), (5, 3, 6, (24, 48))])
def test_images_and_targets_by_loops(B, m, S, shape):
    images, saliency = pictures(B, *shape)
    y = torch.randn(B, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64).softmax(dim=1)
    halves = 0
    for step in range(4):
        mix, draw = completed(images, saliency, step, m=m, blocks=S, gamma=0.3, tau=2.0, beta=0.3)
        mixed, target, shown = mix.images(images, draw), mix.target(y, draw), draw['shown'].tolist()
        h, w, part_of = shape[0] // S, shape[1] // S, np.repeat(range(len(parts_of(B, m))), parts_of(B, m))
        for i in range(B):
            image, row = torch.zeros_like(images[0]), torch.zeros_like(y[0])
            for r, c in np.ndindex(S, S):
                block = (slice(None), slice(r * h, r * h + h), slice(c * w, c * w + w))
                for j in shown[i][r][c]:
                    assert part_of[i] == part_of[j]
                    image[block] += images[j][block] / 2
                    row += y[j] / 2 / S ** 2
                halves += len(set(shown[i][r][c])) - 1
            torch.testing.assert_close(mixed[i], image)
            torch.testing.assert_close(target[i], row, rtol=1e-6, atol=1e-7)
    assert halves > 0


def test_labels_are_those_of_the_terms_and_options(monkeypatch):
    images, saliency = pictures(7)
    options = dict(beta=0.5, gamma=0.4, tau=0.2, threshold='soft', sweeps=3, resolve=False)
    mix = create_mix('comixup', m=4, alpha=0.7, **options)
    draw = mix.draw(images, StepRandom(0).at(3, images.device))
    labels = functional.co_mixup_labels(*mix.terms(saliency, draw['variate'], draw['start']), **options)
    expected = torch.cat([labels[0, :4], labels[1, :3] + 4])
    assert torch.equal(mix.complete(images, draw, saliency, None)['shown'], expected)
    seen = []
    monkeypatch.setattr(comixup, 'co_mixup_labels', lambda *args, **kwargs: seen.append(kwargs) or labels)
    default = create_mix('comixup', m=4)
    default.complete(images, draw, saliency, None)
    assert seen == [dict(beta=0.32, gamma=1.0, tau=0.83, threshold='hard', sweeps=4, resolve=True)]


def test_prior_is_dirichlet():
    """Moments of a part's weights: mean 1/M, variance (1/M)(1 - 1/M)/(M alpha + 1)."""
    images, M, alpha = torch.zeros(5, 1, 8, 8), 5, 2.0
    mix = create_mix('comixup', alpha=alpha)
    rows = torch.stack([
        mix.draw(images, StepRandom(0).at(step, images.device))['variate'] for step in range(4000)])
    share = rows / rows.sum(dim=1, keepdim=True)
    assert (share.mean(dim=0) - 1 / M).abs().max() < 0.01
    variance = (1 / M) * (1 - 1 / M) / (M * alpha + 1)
    assert (share.var(dim=0) / variance - 1).abs().max() < 0.1


def test_salient_blocks_of_both_are_shown():
    images, saliency = torch.zeros(2, 3, 32, 32), torch.zeros(2, 32, 32)
    saliency[0, :, :16], saliency[1, :, 16:] = 1, 1
    for scale in (1.0, 1e-30):
        _, draw = completed(images, scale * saliency, gamma=0.0, beta=0.01, eta=0.001)
        assert (draw['shown'][:, :, :2] == 0).all() and (draw['shown'][:, :, 2:] == 1).all()
        assert torch.equal(draw['weights'], torch.full((2, 2), 0.5))


def test_constant_images_stay_and_targets_sum_to_one():
    saliency = pictures(9)[1].float()
    for step in range(3):
        images = torch.full((9, 3, 32, 32), 0.3)
        mix, draw = completed(images, saliency, step, m=5)
        assert torch.equal(mix.images(images, draw), images)
        torch.testing.assert_close(mix.target(torch.eye(9), draw).sum(dim=1), torch.ones(9))
        number = torch.arange(9.0).view(9, 1, 1, 1).expand(9, 3, 32, 32)
        mean = mix.images(number, draw).mean(dim=(1, 2, 3))
        torch.testing.assert_close(mean, mix.target(torch.arange(9.0)[:, None], draw)[:, 0])


def test_images_without_gradient_or_with_infinite_ones_are_mixed():
    images, saliency = pictures()
    for value in (0.0, torch.inf, torch.nan):
        mix, draw = completed(images.float(), torch.full_like(saliency, value).float())
        assert mix.images(images.float(), draw).isfinite().all() and draw['weights'].isfinite().all()


def test_draws_are_a_function_of_seed_step_and_rank():
    images, saliency = pictures()
    mixed = [mix.images(images, draw) for mix, draw in (completed(images, saliency, 7, 3, 1) for _ in range(2))]
    torch.manual_seed(99)
    assert torch.equal(*mixed)
    for step, seed, rank in ((8, 3, 1), (7, 4, 1), (7, 3, 0)):
        mix, draw = completed(images, saliency, step, seed, rank)
        assert not torch.equal(mix.images(images, draw), mixed[0])


def test_layouts_dtypes_and_autocast():
    images, saliency = pictures()
    images, saliency = images.float(), saliency.float()
    mix, draw = completed(images, saliency)
    mixed, target = mix.images(images, draw), mix.target(torch.eye(6), draw)
    last = images.contiguous(memory_format=torch.channels_last)
    other = mix.images(last, completed(last, saliency)[1])
    assert torch.equal(other, mixed) and other.stride() == last.stride()
    assert mix.images(images.bfloat16(), draw).dtype == torch.bfloat16
    with torch.autocast('cpu', torch.bfloat16):
        again = completed(images, saliency)[1]
        assert torch.equal(mix.images(images, again), mixed)
        assert torch.equal(mix.target(torch.eye(6), again), target)


def test_nothing_waits_for_the_device():
    """Numbers on the meta device cannot be read."""
    numbers = (torch.empty(*size, dtype=torch.float64, device='meta') for size in ((7, 32, 32), (7,), (7, 4, 4)))
    assert functional.co_mixup_labels(*create_mix('comixup', m=4).terms(*numbers)).shape == (2, 4, 4, 4, 2)


def test_images_that_do_not_divide_are_refused():
    with pytest.raises(ValueError, match='sides 3 blocks divide, got 32x32; crop or resize.*option blocks'):
        completed(*pictures(2, 32, 32), blocks=3)


def test_the_task_trains():
    task = MixTask(timm.create_model('test_resnet', num_classes=5), 'comixup', dict(m=3), verbose=False)
    result = task(torch.randn(5, 3, 32, 32), torch.arange(5))
    result['loss'].backward()
    assert result['loss'].isfinite() and result['lam'] is None and result['output'].shape == (5, 5)
