"""timm's transforms for either split, with the random crops that timm lacks."""
from collections.abc import Callable

from timm.data import create_transform
from timm.data.transforms import str_to_interp_mode
from torchvision import transforms

from .options import LoaderOptions

Size = tuple[int, int]  # (height, width) in pixels


class SizedTransform:
    """The transform of a split for any size, made once for each; an object that loader processes can be sent.

    Args:
        options: Those of the loaders.
        train: Which of the splits.
    """

    def __init__(self, options: LoaderOptions, train: bool):
        self._options = options
        self._train = train
        self._made: dict[Size, Callable] = {}
        self(tuple(options.input_size[1:]))  # an option that timm refuses is refused now

    def __call__(self, size: Size) -> Callable:
        """PIL image -> (C, height, width) uint8 tensor."""
        if size not in self._made:
            self._made[size] = self._make(size)
        return self._made[size]

    def _make(self, size: Size) -> Callable:
        o, train = self._options, self._train
        transform = create_transform(
            (o.input_size[0], *size),
            is_training=train,
            no_aug=o.no_aug,
            scale=o.scale,
            ratio=o.ratio,
            hflip=o.hflip,
            color_jitter=o.color_jitter or None,
            auto_augment=o.aa,
            interpolation=(o.train_interpolation or o.interpolation) if train else o.interpolation,
            mean=o.mean,
            std=o.std,
            crop_pct=o.crop_pct,
            crop_mode=o.crop_mode,
            use_prefetcher=True,
        )
        if train and not o.no_aug and (o.crop_resize or o.crop_padding):
            transform.transforms[0] = random_crop(size, o.crop_resize, o.crop_padding, o.interpolation)
        return transform


def random_crop(
        size: Size,
        resize: int | None = None,
        padding: int = 0,
        interpolation: str = 'bilinear',
) -> transforms.Compose:
    """A crop at a random place, at the scale of the image or of a square it is resized to.

    Older than random resized crops: of CIFAR's recipes, and of fine-tuning on whole objects.

    Args:
        size: Height and width of the crop.
        resize: Side of the square that the whole image is resized to first; None leaves it as it is.
        padding: Black pixels put on every side before the crop.
        interpolation: Of the resizing.
    """
    steps = [transforms.RandomCrop(size, padding=padding or None)]
    if resize:
        steps.insert(0, transforms.Resize((resize, resize), str_to_interp_mode(interpolation)))
    return transforms.Compose(steps)
