"""Targets as probabilities, and their cross-entropy.

Shape suffixes: B batch, C classes.
"""
import torch
import torch.nn.functional as F

from ._precision import at_least_fp32


def soft_target(
        target: torch.Tensor,
        num_classes: int,
        smoothing: float = 0.0,
        dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Convert targets to probabilities, smoothed by timm's convention: s / C everywhere plus 1 - s on the target.

    Args:
        target: (B,) integer classes, or (B, C) probabilities.
        num_classes: C.
        smoothing: Label smoothing s in [0, 1).
        dtype: Dtype of the result; float64 targets stay float64.

    Returns:
        (B, C) probabilities.

    Raises:
        ValueError: As :func:`check_target`.

    Example:
        >>> import torch
        >>> soft_target(torch.tensor([0, 2]), num_classes=4, smoothing=0.2)
        tensor([[0.8500, 0.0500, 0.0500, 0.0500],
                [0.0500, 0.0500, 0.8500, 0.0500]])
    """
    check_target(target, len(target), num_classes)
    target = F.one_hot(target.long(), num_classes) if target.ndim == 1 else target
    target = target.to(torch.float64 if target.dtype == torch.float64 else dtype)
    return target if smoothing == 0 else target * (1 - smoothing) + smoothing / num_classes


def check_target(target: torch.Tensor, batch: int, num_classes: int) -> None:
    """Check targets.

    Args:
        target: (batch,) integer classes, or (batch, num_classes) probabilities of any float dtype.
        batch: B.
        num_classes: C.

    Raises:
        ValueError: Another shape or dtype. Values are not looked at, which would wait for the device: see
            :func:`check_values`.

    Example:
        >>> import torch
        >>> check_target(torch.tensor([[0.5, 0.5]]), batch=1, num_classes=2)
        >>> check_target(torch.tensor([1, 0]), batch=3, num_classes=2)
        Traceback (most recent call last):
        ValueError: target must be (3,) integers or (3, 2) probabilities, got (2,) of torch.int64
    """
    hard = target.shape == (batch,) and not target.is_floating_point()
    soft = target.shape == (batch, num_classes) and target.is_floating_point()
    if not hard and not soft:
        raise ValueError(
            f'target must be ({batch},) integers or ({batch}, {num_classes}) probabilities, '
            f'got {tuple(target.shape)} of {target.dtype}')


def check_values(target: torch.Tensor, num_classes: int, sum_to_one: bool = True) -> None:
    """Check the values of targets, which waits for the device: for the first step of a run.

    Args:
        target: Targets that :func:`check_target` accepts.
        num_classes: C.
        sum_to_one: Rows must be probabilities, as softmax cross-entropy needs them.

    Raises:
        ValueError: A class outside of 0 to C - 1, or rows that do not sum to 1.

    Example:
        >>> import torch
        >>> check_values(torch.tensor([1, 255]), num_classes=2)
        Traceback (most recent call last):
        ValueError: target must hold classes 0 to 1, got 1 to 255; leave other examples out of the batch
    """
    if target.ndim == 1:
        low, high = (int(x) for x in target.aminmax())
        if low < 0 or high >= num_classes:
            raise ValueError(
                f'target must hold classes 0 to {num_classes - 1}, got {low} to {high}; leave other examples out of '
                'the batch')
    elif sum_to_one:
        off = (target.float().sum(dim=1) - 1).abs().max()
        # bf16 probabilities of 1000 classes sum to 1 within about 2**-8.
        if not off <= 0.01:
            raise ValueError(
                f'targets must be probabilities that sum to 1, a row is off by {off:.3g}: the loss is softmax '
                'cross-entropy; for multi-label targets give MixTask another criterion, such as binary cross-entropy '
                '(criterion=nn.BCEWithLogitsLoss())')


def target_mass(logits_BC: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mass of each row's target on the predicted class, the class of the largest logit: its mean is the accuracy of
    mixed examples, and for classes or one-hot rows plain top-1 accuracy.

    Args:
        logits_BC: (B, C) logits.
        target: (B,) integer classes, or (B, C) probabilities or labels, without label smoothing.

    Returns:
        (B,) float32 without gradient; 0 for classes that do not exist.

    Example:
        >>> import torch
        >>> target_mass(torch.tensor([[2.0, 0.0], [1.0, 3.0]]), torch.tensor([[0.75, 0.25], [1.0, 0.0]]))
        tensor([0.7500, 0.0000])
    """
    predicted_B = logits_BC.detach().argmax(dim=1)
    mass_B = predicted_B == target if target.ndim == 1 else target.gather(1, predicted_B[:, None])[:, 0]
    return mass_B.float()


def soft_target_cross_entropy(logits_BC: torch.Tensor, target_BC: torch.Tensor) -> torch.Tensor:
    """Mean over examples of -sum_c y log softmax(logits), in float32 or better whatever autocast says.

    Args:
        logits_BC: (B, C) logits, any float dtype.
        target_BC: (B, C) probabilities, or weights >= 0 whose rows need not sum to 1: a row of sum w weighs as w
            examples, as where the two images of a mixture have weights of their own.

    Returns:
        Scalar loss, float32 (float64 for float64 logits).

    Example:
        >>> import torch
        >>> soft_target_cross_entropy(torch.tensor([[2.0, 0.0]]), torch.tensor([[0.5, 0.5]]))
        tensor(1.1269)
    """
    with torch.autocast(logits_BC.device.type, enabled=False):
        return F.cross_entropy(at_least_fp32(logits_BC), target_BC.to(at_least_fp32(logits_BC).dtype))
