"""Pass of a model over clean images before a step, for methods that mix by what the model looks at."""
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
import torch.nn as nn
import torch.nn.functional as F

from .functional._precision import at_least_fp32


def gradient_saliency(model: nn.Module, images: torch.Tensor, target: torch.Tensor, mode: str = 'eval') -> torch.Tensor:
    """Gradient of the clean loss with respect to each pixel: its root mean square over the channels.

    The loss is the cross-entropy of the targets as they are, without label smoothing, summed over the batch; a positive
    scale, such as the one that keeps gradients within float16, has no meaning. No gradient of a parameter is computed,
    and nothing of the pass is kept.

    Args:
        model: The network itself, not wrapped by DDP or torch.compile: this pass is not the one they prepare for.
        images: (B, C, H, W).
        target: (B,) classes, or (B, num_classes) probabilities.
        mode: 'eval' uses running statistics and leaves them alone, without dropout; 'train' is the training forward.

    Returns:
        (B, H, W) saliency >= 0, float32 (float64 for float64 images), up to a positive factor.

    Example:
        >>> import torch
        >>> model = nn.Sequential(nn.Flatten(), nn.Linear(12, 2)).train()
        >>> gradient_saliency(model, torch.randn(4, 3, 2, 2), torch.tensor([0, 1, 1, 0])).shape
        torch.Size([4, 2, 2])
        >>> model.training, model[1].weight.grad
        (True, None)
    """
    # Programs that measure a network may be in inference mode, whose tensors have no gradients.
    with torch.inference_mode(False), torch.enable_grad(), evaluating(model) if mode == 'eval' else nullcontext():
        images, target = (x.clone() if x.is_inference() else x.detach() for x in (images, target))
        images.requires_grad_()
        logits = model(images)
        scale = 2 ** 10 if logits.dtype == torch.float16 else 1
        with torch.autocast(logits.device.type, enabled=False):
            logits = at_least_fp32(logits)
            target = target.to(logits.dtype) if target.is_floating_point() else target.long()
            loss = F.cross_entropy(logits, target, reduction='sum') * scale
        gradient, = torch.autograd.grad(loss, images)
    return at_least_fp32(gradient).square().mean(dim=1).sqrt()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put modules into evaluation mode and those that were training back, whatever happens."""
    # By the flag: train() and eval() of some networks do more than set it.
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
