#!/usr/bin/env python3
"""What two public codes compute, on your images, beside what their papers say: docs/findings.md.

    python benchmarks/findings.py FOLDER --images 500 --side 32

SaliencyMix's release hands a normalised float image to OpenCV's fine-grained saliency, which reads the first bytes of
each row of floats as pixels. FMix's release takes two rows of its noise for the two parts of all frequencies. Both are
done here on purpose, in numpy, without OpenCV and without their code.
"""
import argparse
from pathlib import Path

import numpy as np
import torch

from alignmix_lab.plots import find_images, read_images
from timm_alignmix.functional import fine_grained_saliency

MEAN, STD = np.array([125.3, 123.0, 113.9]) / 255, np.array([63.0, 62.1, 66.7]) / 255  # of SaliencyMix's loader


def saliency_of_bytes(pixels_BCHW: np.ndarray) -> np.ndarray:
    """(B, H, W) map of normalised float images, as OpenCV's code computes it: sums of floats, but bytes as pixels."""
    channels = ((pixels_BCHW / 255 - MEAN[:, None, None]) / STD[:, None, None]).astype(np.float32)
    grey = np.tensordot(channels, np.float32([0.114, 0.587, 0.299]), axes=(1, 0))
    for _ in range(2):
        for axis in (1, 2):
            padded = np.pad(grey, [(0, 0), *((1, 1) if i == axis else (0, 0) for i in (1, 2))], mode='reflect')
            before, middle, after = (np.take(padded, np.arange(i, i + grey.shape[axis]), axis) for i in range(3))
            grey = (before + 2 * middle + after) / np.float32(4)
    B, H, W = grey.shape
    pixels = np.ascontiguousarray(grey).view(np.uint8)[:, :, :W].astype(np.float32)
    integral = np.pad(grey.astype(np.float64), [(0, 0), (1, 0), (1, 0)]).cumsum(1).cumsum(2)
    on, off = np.zeros((B, H, W), int), np.zeros((B, H, W), int)
    y, x = np.arange(H)[:, None], np.arange(W)
    for n in (12, 24, 48, 28, 56, 112):
        top, bottom = np.maximum(y - n + 1, 0), np.minimum(y + n + 1, H)
        left, right = np.maximum(x - n + 1, 0), np.minimum(x + n + 1, W)
        total = (integral[:, bottom, right] - integral[:, top, right] - integral[:, bottom, left]
                 + integral[:, top, left])
        excess = pixels - (total - pixels) / ((bottom - top) * (right - left) - 1)
        on += np.maximum(excess, 0).astype(int) % 256
        off += np.maximum(-excess, 0).astype(int) % 256
    scaled = [255 * value // np.maximum(value.max(axis=(1, 2), keepdims=True), 1) for value in (on, off)]
    return sum(scaled) % 256


def saliencymix(pixels_BCHW: torch.Tensor) -> list[list[str]]:
    """Compare the two maps of each image."""
    B, _, H, W = pixels_BCHW.shape
    ours, theirs = fine_grained_saliency(pixels_BCHW).numpy(), saliency_of_bytes(pixels_BCHW.numpy().astype(float))
    correlation = np.mean([np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(ours, theirs, strict=True)])
    places = [np.stack(np.divmod(maps.reshape(B, -1).argmax(axis=1), W), axis=1) for maps in (ours, theirs)]
    random = np.random.default_rng(0)
    apart = [np.linalg.norm(places[0] - places[1][order], axis=1).mean()
             for order in (np.arange(B), *(random.permutation(B) for _ in range(20)))]
    return [
        ['correlation of the two maps of an image, mean', f'{correlation:.3f}'],
        ['same most salient pixel', f'{(places[0] == places[1]).all(axis=1).mean():.2%} of {B} images'],
        ['distance of the most salient pixels', f'{apart[0]:.2f} pixels of {H}x{W}'],
        ['the same for maps of other images', f'{np.mean(apart[1:]):.2f} pixels'],
    ]


def fmix(side: int, count: int = 500, decay: float = 3.0) -> list[list[str]]:
    """Share of the variance of the grey images, before they become masks, that is above one cycle."""
    random = np.random.default_rng(0)
    frequency = np.hypot(np.fft.fftfreq(side)[:, None], np.fft.rfftfreq(side))
    noise = random.normal(size=(count, *frequency.shape, 2))
    noise /= np.maximum(frequency, 1 / side)[..., None] ** decay
    two_rows = noise[:, 0] + 1j * noise[:, 1]  # the first index after the batch is a row, the parts are the last
    cycles = np.minimum(np.arange(side), side - np.arange(side))
    rows = []
    both = noise[..., 0] + 1j * noise[..., 1]
    for title, spectrum in (('both parts of each frequency', both), ('two rows', two_rows)):
        grey = np.fft.irfftn(spectrum, (side, side), axes=(1, 2))
        energy = np.abs(np.fft.fft2(grey - grey.mean(axis=(1, 2), keepdims=True))) ** 2
        share = [(energy[:, :, cycles > 1].sum(axis=(1, 2)) / energy.sum(axis=(1, 2))).mean(),
                 (energy[:, cycles > 1].sum(axis=(1, 2)) / energy.sum(axis=(1, 2))).mean()]
        rows.append([f'FMix from {title}: variance above one cycle', f'{share[0]:.1%} along rows, {share[1]:.1%} down'])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('paths', nargs='+', type=Path, metavar='FOLDER', help='images')
    parser.add_argument('--images', type=int, default=500, help='number of images')
    parser.add_argument('--side', type=int, default=32, help='pixels to which they are resized')
    args = parser.parse_args()
    pixels = read_images(find_images(args.paths, args.images), args.side)
    for title, value in (*saliencymix((255 * pixels).round().byte()), *fmix(args.side)):
        print(f'{title}: {value}')


if __name__ == '__main__':
    main()
