"""Training augmentation of images with boxes, from torchvision.transforms.v2.

Every pipeline takes a uint8 image (3, H, W) and a dict of boxes and labels. The detector itself resizes images to its
size and normalises them; among the pipelines only large-scale jitter resizes.
"""
import torch
from torchvision.transforms import v2

AUGMENTATIONS = ('none', 'hflip', 'multiscale', 'lsj', 'ssd')


def create_transform(
        name: str, size: int, mean: tuple[float, ...] = (0.485, 0.456, 0.406), hflip: float = 0.5) -> v2.Transform:
    """Create an augmentation.

    Args:
        name: 'hflip'; 'multiscale', the same flip (the detector draws the size); 'lsj', large-scale jitter (resize by
            0.1 to 2, crop or pad to a square; Ghiasi et al. 2021, 2012.07177); 'ssd', colour distortion, zoom-out and
            IoU crops (Liu et al. 2016, 1512.02325); 'none'.
        size: Side of the square of 'lsj'.
        mean: Pixel mean, 0-1 scale, used as fill colour.
    """
    fill = [round(255 * value) for value in mean]
    flip = v2.RandomHorizontalFlip(hflip)
    # Cropping leaves boxes without area, which the detectors refuse.
    sanitize = v2.SanitizeBoundingBoxes(labels_getter=lambda inputs: (inputs[1]['labels'],))
    steps = {
        'none': [],
        'hflip': [flip],
        'multiscale': [flip],
        'lsj': [v2.ScaleJitter((size, size)), v2.RandomCrop(size, pad_if_needed=True, fill=fill), flip, sanitize],
        'ssd': [v2.RandomPhotometricDistort(), v2.RandomZoomOut(fill=fill), v2.RandomIoUCrop(), flip, sanitize],
    }
    if name not in steps:
        raise ValueError(f'augmentation {name!r} must be one of {", ".join(AUGMENTATIONS)}')
    return v2.Compose([*steps[name], v2.ToDtype(torch.uint8), v2.ToPureTensor()])


def multiscale_sizes(size: int) -> tuple[int, ...]:
    """Return 11 shorter sides from 0.6 * size to size (480, 512, ..., 800 for 800); evaluation uses the last."""
    return tuple(round(size * (0.6 + 0.4 * step / 10)) for step in range(11))
