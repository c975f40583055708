"""ResizeMix against torchvision's resize, and its draws."""
import pytest
import torch
import torchvision.transforms.functional as TF
from scipy import stats

from timm_alignmix import create_mix
from timm_alignmix.step_random import StepRandom


def draw_of(images, step=0, **options):
    mix = create_mix('resizemix', **options)
    return mix, mix.draw(images, StepRandom(0).at(step, images.device))


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
def test_the_whole_partner_is_resized_and_pasted(memory_format):
    images = torch.randn(4, 3, 30, 44).to(memory_format=memory_format)
    for step in range(8):
        mix, draw = draw_of(images, step)
        mixed, (rows, columns) = mix.images(images, draw), draw['box']
        expected = images.clone()
        expected[..., rows, columns] = TF.resize(
            images[draw['perm']], [rows.stop - rows.start, columns.stop - columns.start], antialias=True)
        torch.testing.assert_close(mixed, expected)
        assert mixed.stride() == images.stride()
        changed = (mixed != images).any(dim=1)[draw['perm'] != torch.arange(4)]
        if len(changed):
            assert draw['lam'].item() == pytest.approx(1 - changed[0].sum().item() / (30 * 44), rel=1e-6)


def test_sizes_and_places_are_uniform():
    images, sizes, places = torch.zeros(1, 3, 100, 1000), [], []
    for step in range(500):
        rows, columns = draw_of(images, step)[1]['box']
        size = columns.stop - columns.start
        assert 0 <= rows.start and rows.stop <= 100 and 0 <= columns.start and columns.stop <= 1000
        assert rows.stop - rows.start == size // 10
        sizes.append(size / 1000)
        places.append(columns.start / (1000 - size))
    assert stats.kstest(sizes, stats.uniform(0.1, 0.7).cdf).pvalue > 1e-3
    assert stats.kstest(places, stats.uniform(0, 1).cdf).pvalue > 1e-3


def test_a_factor_of_one_is_the_partner():
    images = torch.randn(4, 3, 16, 16)
    mix, draw = draw_of(images, low=1.0, high=1.0)
    torch.testing.assert_close(mix.images(images, draw), images[draw['perm']])
    assert draw['lam'] == 0
