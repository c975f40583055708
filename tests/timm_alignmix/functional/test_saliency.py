"""Saliency against OpenCV's integers and plain loops, and pairs by a plain loop."""
import zlib

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF

from timm_alignmix.functional import fine_grained_saliency, gaussian_blur, greedy_cycle, spectral_residual

# cv2.saliency.StaticSaliencyFineGrained of opencv-contrib-python-headless 5.0.0, as integers.
SMALL = [
    [255, 223, 153, 76, 6, 22, 25, 140, 191],
    [242, 204, 121, 31, 37, 67, 0, 89, 127],
    [204, 159, 51, 52, 135, 135, 90, 52, 52],
    [153, 108, 6, 97, 172, 202, 210, 240, 255],
    [127, 82, 0, 90, 172, 240, 255, 225, 210],
    [127, 82, 15, 120, 195, 225, 135, 19, 76],
    [133, 76, 30, 150, 217, 202, 30, 153, 229],
]
GREY = [
    [255, 237, 181, 91, 24, 164, 106, 115, 172],
    [221, 201, 147, 61, 82, 156, 74, 115, 197],
    [119, 104, 61, 8, 164, 131, 41, 115, 205],
    [16, 41, 82, 123, 148, 106, 57, 74, 98],
    [238, 238, 180, 90, 90, 131, 90, 2, 20],
    [255, 246, 156, 41, 90, 197, 123, 20, 53],
    [230, 222, 131, 24, 98, 222, 131, 25, 61],
]


def small_image():
    y, x = torch.meshgrid(torch.arange(7), torch.arange(9), indexing='ij')
    return torch.stack([37 * x + 11 * y * y, 5 * x * y + 90, 200 - 13 * x + 29 * y]) % 256


def test_opencvs_integers():
    y, x = torch.meshgrid(torch.arange(7), torch.arange(9), indexing='ij')
    grey = ((13 * y * y + 7 * x * x) % 256).view(1, 1, 7, 9)
    for dtype in (torch.uint8, torch.int32, torch.int64):
        assert fine_grained_saliency(small_image()[None].to(dtype))[0].tolist() == SMALL
        assert fine_grained_saliency(grey.to(dtype))[0].tolist() == GREY
    y, x = torch.meshgrid(torch.arange(40), torch.arange(60), indexing='ij')
    larger = torch.stack([3 * x * x + 17 * y, x * y, 255 - 6 * y]) % 256
    found = fine_grained_saliency(larger[None])[0]
    assert found.sum() == 180362 and zlib.crc32(found.numpy().astype(np.uint8).tobytes()) == 1818680653


def fine_grained_by_loops(pixels_CHW):
    """The definition, pixel by pixel, in Python's integers and numpy's floats."""
    R, G, B = pixels_CHW.astype(int)
    grey = (9798 * R + 19235 * G + 3735 * B + 16384) >> 15
    H, W = grey.shape
    for _ in range(2):
        padded = np.pad(grey, 1, mode='reflect')
        blurred = np.zeros_like(grey)
        for y in range(H):
            for x in range(W):
                blurred[y, x] = (padded[y:y + 3, x:x + 3] * np.outer([1, 2, 1], [1, 2, 1])).sum() + 8 >> 4
        grey = blurred
    on, off = np.zeros_like(grey), np.zeros_like(grey)
    for n in (12, 24, 48, 28, 56, 112):
        for y in range(H):
            for x in range(W):
                window = grey[max(y - n + 1, 0):y + n + 1, max(x - n + 1, 0):x + n + 1]
                mean = np.float64(window.sum() - grey[y, x]) / (window.size - 1)
                on[y, x] += int(max(grey[y, x] - mean, 0) + 1e-9)
                off[y, x] += int(max(mean - grey[y, x], 0) + 1e-9)
    parts = [np.trunc(255. * (value.astype(np.float32) / np.float32(value.max()))).astype(int) for value in (on, off)]
    return np.trunc(255 * sum(parts) / max(part.max() for part in parts)).astype(int) % 256


@pytest.mark.parametrize('H, W', [(20, 33), (40, 16), (5, 70)])
def test_fine_grained_saliency_by_loops(H, W):
    pixels = np.random.default_rng(H).integers(0, 256, (2, 3, H, W))
    pixels[1] = pixels[1] // 64 * 20 + np.arange(W) * 2  # smooth, with ties
    found = fine_grained_saliency(torch.from_numpy(pixels))
    for image, mine in zip(pixels, found.numpy(), strict=True):
        np.testing.assert_array_equal(mine, fine_grained_by_loops(image))


def test_saliency_wraps_at_8_bits_as_opencvs():
    """A place that is far above the mean near it and far below the mean of all has much of both parts."""
    y, x = torch.meshgrid(torch.arange(100), torch.arange(100), indexing='ij')
    pixels = torch.where(torch.maximum((y - 50).abs(), (x - 50).abs()) > 12, 160, 0)
    pixels[48:53, 48:53] = 140
    found = fine_grained_saliency(pixels[None, None])[0]
    assert found[50, 48:53].tolist() == [194, 226, 4, 219, 185]
    assert zlib.crc32(found.numpy().astype(np.uint8).tobytes()) == 197196690


def test_one_colour_has_no_saliency_and_other_channels_are_refused():
    assert not fine_grained_saliency(torch.full((2, 3, 12, 9), 200)).any()
    with pytest.raises(ValueError, match='got 4 channels'):
        fine_grained_saliency(torch.zeros(1, 4, 8, 8, dtype=torch.uint8))


def spectral_residual_by_numpy(image_CHW):
    grey = 0.2989 * image_CHW[0] + 0.587 * image_CHW[1] + 0.114 * image_CHW[2]
    H, W = grey.shape
    if max(H, W) > 128:
        grey = TF.resize(torch.from_numpy(grey)[None], [128, 128], antialias=True)[0].numpy()
    spectrum = np.fft.fft2(grey)
    magnitude = np.sqrt(np.abs(spectrum) ** 2 + 1e-10)
    padded = np.pad(np.log(magnitude), 1, mode='edge')
    mean = np.zeros_like(grey)
    for y in range(len(grey)):
        for x in range(len(grey[0])):
            mean[y, x] = padded[y:y + 3, x:x + 3].mean()
    saliency = np.abs(np.fft.ifft2(np.exp(np.log(magnitude) - mean) * spectrum / magnitude))
    saliency = TF.gaussian_blur(torch.from_numpy(saliency)[None], [7, 7], [3.0, 3.0])
    return TF.resize(saliency, [H, W], antialias=True)[0] if max(H, W) > 128 else saliency[0]


@pytest.mark.parametrize('H, W', [(32, 32), (17, 30), (140, 100)])
def test_spectral_residual_by_numpy(H, W):
    images = torch.randn(2, 3, H, W, dtype=torch.float64, generator=torch.Generator().manual_seed(H))
    for image, found in zip(images, spectral_residual(images), strict=True):
        torch.testing.assert_close(found, spectral_residual_by_numpy(image.numpy()))
    single = spectral_residual(images.float())
    torch.testing.assert_close(single.double(), spectral_residual(images), rtol=1e-3, atol=1e-6)


def test_blur_is_torchvisions():
    x = torch.rand(2, 9, 12, dtype=torch.float64)
    torch.testing.assert_close(gaussian_blur(x), TF.gaussian_blur(x, [7, 7], [3.0, 3.0]))
    torch.testing.assert_close(gaussian_blur(x, radius=2, sigma=0.8), TF.gaussian_blur(x, [5, 5], [0.8, 0.8]))


def cycle_by_loops(distance):
    """The cycle, as GuidedMixup's paper says it."""
    B = len(distance)
    start, partner = max(((i, j) for i in range(B) for j in range(B) if i != j), key=lambda pair: distance[pair])
    partners, visited, current = {start: partner}, {start, partner}, partner
    while len(visited) < B:
        farthest = max((i for i in range(B) if i not in visited), key=lambda i: distance[current][i])
        partners[current] = farthest
        visited.add(farthest)
        current = farthest
    partners[current] = start
    return [partners[i] for i in range(B)]


@pytest.mark.parametrize('B', [2, 3, 5, 40])
def test_pairs_are_a_greedy_cycle(B):
    for seed in range(10):
        place = np.random.default_rng(seed).normal(size=(B, 6))
        distance = np.linalg.norm(place[:, None] - place, axis=2)
        perm = greedy_cycle(torch.from_numpy(distance)).tolist()
        assert perm == cycle_by_loops(distance)
        seen, i = [], 0
        while i not in seen:
            seen.append(i)
            i = perm[i]
        assert len(seen) == B  # one cycle through all


def test_one_example_is_its_own_partner():
    assert greedy_cycle(torch.zeros(1, 1)).tolist() == [0]
