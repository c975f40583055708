"""timm's transforms, extended by the random crops that timm lacks."""
from collections.abc import Callable

from timm.data import create_transform
from timm.data.transforms import str_to_interp_mode
from torchvision import transforms

from alignmix_lab.runs.options import blaming

from .options import LoaderOptions

Size = tuple[int, int]  # (height, width) in pixels


class SizedTransform:
    """Transform of a split for any image size; created once per size and picklable for worker processes."""

    def __init__(self, options: LoaderOptions, train: bool):
        self._options = options
        self._train = train
        self._made: dict[Size, Callable] = {}
        with blaming(options, 'aa', 'color_jitter', 'scale', 'ratio'):
            self(tuple(options.input_size[1:]))  # raise now for options that timm rejects

    def __call__(self, size: Size) -> Callable:
        """Return a function from a PIL image to a (C, height, width) uint8 tensor."""
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
            crop = [transforms.RandomCrop(size, padding=o.crop_padding or None)]
            if o.crop_resize:
                crop.insert(0, transforms.Resize((o.crop_resize,) * 2, str_to_interp_mode(o.interpolation)))
            transform.transforms[0] = transforms.Compose(crop)
        return transform
