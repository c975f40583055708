"""The random crops that predate random resized ones: of CIFAR's recipes, and of fine-tuning on whole objects."""
from timm.data.transforms import str_to_interp_mode
from torchvision import transforms


def random_crop(
        size: tuple[int, int],
        resize: int | None = None,
        padding: int = 0,
        interpolation: str = 'bilinear',
) -> transforms.Compose:
    """A crop at a random place, at the scale of the image or of a square it is resized to.

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
