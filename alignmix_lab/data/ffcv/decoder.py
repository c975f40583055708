"""FFCV's image decoder with reproducible crops and flips: every draw is a hash of (seed, epoch, sample, draw).

FFCV draws from numba's per-thread generators, so the result depends on which thread processes a sample and when. Here
the draws are stateless: outputs of SplitMix64 (Steele, Lea and Flood, "Fast splittable pseudorandom number generators",
2014) at a position computed from the sample index and a key made of seed and epoch. The key is an argument because
compiled code never updates captured values.

Each image is decoded into a buffer of its own size and mirrored in place, whereas FFCV allocates several batches of the
largest image and copies every batch to flip it. The status of the JPEG decoder is passed on; FFCV ignores it and
returns whatever was in memory before.
"""
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numba
import numpy as np

from .importing import import_ffcv

_ffcv = import_ffcv()

_STEP = np.uint64(0x9E3779B97F4A7C15)
_FACTORS = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_FLIP_DRAW, _CROP_DRAW = 0, 1  # positions in a sample's sequence of draws
_CROP_TRIES = 10  # torchvision's

# Without the fast-math that FFCV compiles with: results must be bit-identical for any number of threads.
_compiled = numba.njit(nogil=True, error_model='numpy')


@_compiled
def split_mix(seed, place):
    """Output of SplitMix64 at a position (from 0) in the sequence of a seed, both uint64."""
    value = np.uint64(seed) + (np.uint64(place) + np.uint64(1)) * _STEP
    value = (value ^ (value >> np.uint64(30))) * _FACTORS[0]
    value = (value ^ (value >> np.uint64(27))) * _FACTORS[1]
    return value ^ (value >> np.uint64(31))


@_compiled
def uniform(seed, place):
    """The same as a float64 in [0, 1) with 53 bits."""
    return np.float64(split_mix(seed, place) >> np.uint64(11)) * 2.0 ** -53


def epoch_key(seed: int, epoch: int, copy: int = 0) -> np.uint64:
    """Key of an epoch: sample i draws from the sequence of split_mix(key, i). Later copies of a sample have others."""
    return np.random.SeedSequence([seed, epoch, 1, copy]).generate_state(1, np.uint64)[0]


def random_resized_crop(scale: tuple[float, float], ratio: tuple[float, float]) -> Callable:
    """Compile (seed, height, width) -> (top, left, height, width), distributed as torchvision's RandomResizedCrop.

    `scale` is the range of the crop's area, relative to the image's, and `ratio` that of its aspect ratio.
    """
    smallest, largest = map(float, scale)
    narrowest, widest = map(float, ratio)
    log_narrowest, log_widest = math.log(narrowest), math.log(widest)

    @_compiled
    def crop(seed, height, width):
        for attempt in range(_CROP_TRIES):
            place = _CROP_DRAW + 4 * attempt
            area = height * width * (smallest + (largest - smallest) * uniform(seed, place))
            aspect = math.exp(log_narrowest + (log_widest - log_narrowest) * uniform(seed, place + 1))
            w = int(round(math.sqrt(area * aspect)))
            h = int(round(math.sqrt(area / aspect)))
            if 0 < w <= width and 0 < h <= height:
                top = int(uniform(seed, place + 2) * (height - h + 1))
                left = int(uniform(seed, place + 3) * (width - w + 1))
                return top, left, h, w
        h, w = height, width
        if width < narrowest * height:
            h = max(1, int(round(width / narrowest)))
        elif width > widest * height:
            w = max(1, int(round(height * widest)))
        return (height - h) // 2, (width - w) // 2, h, w

    return crop


def centre_crop(share: float) -> Callable:
    """Compile (seed, height, width) -> (top, left, height, width) of a square, `share` of the shorter image side."""
    @_compiled
    def crop(seed, height, width):
        side = int(share * min(height, width))
        return (height - side) // 2, (width - side) // 2, side, side

    return crop


@_compiled
def _mirror(image_HWC):
    height, width, _ = image_HWC.shape
    for row in range(height):
        for left in range(width // 2):
            right = width - 1 - left
            for channel in range(3):
                pixel = image_HWC[row, left, channel]
                image_HWC[row, left, channel] = image_HWC[row, right, channel]
                image_HWC[row, right, channel] = pixel


class SeededDecoder(_ffcv.fields.rgb_image.SimpleRGBImageDecoder):
    """Decode, crop, resize (by area averages) and flip in one compiled loop over the batch.

    Each batch has three buffers: the images, the epoch key of each sample, which must be filled in first, and the
    status of each sample, 0 if it was decoded without error. A new `side` takes effect at the next memory allocation,
    without recompilation.
    """

    def __init__(self, side: int, crop: Callable, hflip: float):
        super().__init__()
        self.side = side
        self._crop = crop
        self._hflip = float(hflip)

    def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, tuple]:
        shape, pixel = (self.side, self.side, 3), np.dtype(np.uint8)
        query = _ffcv.pipeline.allocation_query.AllocationQuery
        state = replace(previous_state, jit_mode=True, shape=shape, dtype=pixel)
        return state, (query(shape, pixel), query((), np.dtype(np.uint64)), query((), np.dtype(np.int32)))

    def generate_code(self) -> Callable:
        compiler, library = _ffcv.pipeline.compiler.Compiler, _ffcv.libffcv
        decode_jpeg, resize = compiler.compile(library.imdecode), compiler.compile(library.resize_crop)
        read, indices, is_jpeg = self.memory_read, compiler.get_iterator(), _ffcv.fields.rgb_image.IMAGE_MODES['jpg']
        crop, hflip = self._crop, self._hflip

        def decode(samples, memory, metadata, storage):
            images, keys, status = memory
            for place in indices(len(samples)):
                sample = samples[place]
                record = metadata[sample]
                content = read(record['data_ptr'], storage)
                height, width = np.int64(record['height']), np.int64(record['width'])
                if record['mode'] == is_jpeg:
                    pixels = np.empty((height, width, 3), np.uint8)
                    status[place] = decode_jpeg(
                        content, pixels, height, width, height, width, 0, 0, 1, 1, False, False)
                    source = pixels
                else:
                    status[place] = 0
                    source = content.reshape(height, width, 3)
                seed = split_mix(keys[place], sample)
                top, left, h, w = crop(seed, height, width)
                resize(source, top, top + h, left, left + w, images[place])
                if uniform(seed, _FLIP_DRAW) < hflip:
                    _mirror(images[place])
            return images[:len(samples)]

        decode.is_parallel = True
        return decode
