"""SaliencyMix: boxes around the most salient pixel of the partner, by plain loops; the saliency has its own tests."""
import numpy as np
import pytest
import timm
import torch
from scipy import stats

from timm_alignmix import MixTask, create_mix
from timm_alignmix.functional import fine_grained_saliency
from timm_alignmix.step_random import StepRandom

MEAN, STD = (0.3, 0.5, 0.6), (0.2, 0.25, 0.3)


def pixels_of(B=6, H=30, W=44):
    return torch.randint(0, 256, (B, 3, H, W), generator=torch.Generator().manual_seed(1), dtype=torch.uint8)


def normalised(pixels, dtype=torch.float32):
    mean, std = (torch.tensor(values, dtype=dtype).view(3, 1, 1) for values in (MEAN, STD))
    return (pixels.to(dtype) / 255 - mean) / std


def draw_of(images, step=0, **options):
    mix = create_mix('saliencymix', **dict(dict(prob=1.0, mean=MEAN, std=STD), **options))
    return mix, mix.draw(images, StepRandom(0).at(step, images.device))


@pytest.mark.parametrize('options', [{}, dict(per_example=True), dict(box='batch')])
def test_the_box_of_each_pair_by_loops(options):
    pixels = pixels_of()
    images, saliency = normalised(pixels), fine_grained_saliency(pixels)
    H, W = images.shape[2:]
    for step in range(8):
        mix, draw = draw_of(images, step, **options)
        mixed, perm = mix.images(images, draw), draw['perm'].tolist()
        for i, j in enumerate(perm):
            source = perm[0] if options.get('box') == 'batch' else j
            row, column = divmod(int(np.argmax(saliency[source].numpy())), W)
            top, left, bottom, right = draw['box'][i if len(draw['box']) > 1 else 0].tolist()
            # What is clipped is known from the other side of the centre.
            half = [max(row - top, bottom - row), max(column - left, right - column)]
            assert [top, left] == [max(row - half[0], 0), max(column - half[1], 0)]
            assert [bottom, right] == [min(row + half[0], H), min(column + half[1], W)]
            expected = images[i].clone()
            expected[:, top:bottom, left:right] = images[j, :, top:bottom, left:right]
            assert torch.equal(mixed[i], expected)
            lam = draw['lam'][i] if draw['lam'].ndim else draw['lam']
            assert lam.item() == pytest.approx(1 - (bottom - top) * (right - left) / (H * W))


def test_sides_are_even_and_cutmixs_otherwise(monkeypatch):
    images = normalised(pixels_of(B=1, H=41, W=60))
    for lam in (0.0, 0.3, 0.77, 0.999, 1.0):
        monkeypatch.setattr('timm_alignmix.mixes.saliencymix.sample_beta', lambda *_, lam=lam: torch.tensor([[lam]]))
        boxes = [draw_of(images, step, centre='random')[1]['box'][0].tolist() for step in range(60)]
        sides = [max(box[2] - box[0] for box in boxes), max(box[3] - box[1] for box in boxes)]
        assert sides == [int(side * (1 - lam) ** 0.5) // 2 * 2 for side in (41, 60)]


def test_eight_bit_pixels_come_back_whatever_the_dtype():
    pixels = pixels_of()
    for dtype in (torch.float32, torch.float64):
        mix = create_mix('saliencymix', mean=MEAN, std=STD)
        assert torch.equal(mix.pixels(normalised(pixels, dtype)), pixels.int())


def test_mean_and_deviation_are_the_models_unless_given():
    model = timm.create_model('test_resnet', num_classes=5)
    model.pretrained_cfg.update(mean=MEAN, std=STD)
    pixels = pixels_of()
    mix = MixTask(model, 'saliencymix', verbose=False).mix
    assert torch.equal(mix.pixels(normalised(pixels)), pixels.int())
    half = MixTask(model, 'saliencymix', dict(mean=[0.5] * 3, std=[0.5] * 3), verbose=False).mix
    assert torch.equal(half.pixels((pixels / 255 - 0.5) / 0.5), pixels.int())
    with pytest.raises(ValueError, match='each of 1 channels, got mean=.*set its options mean and std'):
        mix.pixels(torch.zeros(2, 1, 4, 4))


def test_flat_partners_and_random_centres_are_uniform():
    for images, centre in ((torch.zeros(500, 3, 8, 8), 'saliency'), (normalised(pixels_of(500, 8, 8)), 'random')):
        found = np.zeros(8)
        for step in range(6):
            _, draw = draw_of(images, step, centre=centre, per_example=True)
            top, _, bottom, _ = draw['box'].unbind(dim=1)
            free = (top > 0) & (bottom < 8) & (bottom - top == 2)  # centre known: one pixel above and one below
            found += np.bincount(top[free].numpy() + 1, minlength=8)
        assert found[2:7].min() > 20 and stats.chisquare(found[2:7]).pvalue > 1e-3


def test_shared_probability():
    images = normalised(pixels_of(2, 8, 8))
    modes = [[create_mix('saliencymix', mean=MEAN, std=STD).draw(images, StepRandom(0, rank).at(step, images.device))
              for step in range(50)] for rank in (0, 1)]
    assert [d['mode'] for d in modes[0]] == [d['mode'] for d in modes[1]]
    assert {d['mode'] for d in modes[0]} == {'input', 'clean'}
    assert all(d['lam'] is None for d in modes[0] if d['mode'] == 'clean')
