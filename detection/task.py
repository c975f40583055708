"""A detector as a timm training task."""
from typing import Any

import torch
from timm.task import TrainingTask
from timm.utils import unwrap_model
from torch import nn

from alignmix_lab.runs.totals import LossTotals, Sums


class DetectionTask(TrainingTask):
    """Training task that sums a detector's losses; EMA and checkpoints are timm's.

    Args:
        model: Detector with torchvision's interface: losses of (images, targets) in training.
        description: Plain values to rebuild the detector from; saved in checkpoints.
    """

    def __init__(
            self, model: nn.Module, description: dict[str, Any], device: torch.device | None = None,
            verbose: bool = True):
        super().__init__(device=device, verbose=verbose)
        self.trainable_module = model
        self.description = description

    def forward(self, input: list[torch.Tensor], target: list[dict[str, Any]]) -> dict[str, Any]:
        """One training step.

        Args:
            input: Images (3, H, W) in [0, 1].
            target: Dicts of `boxes` (N, 4) and `labels` (N,).

        Returns:
            'loss', the sum; 'losses', the detached parts by name; 'output', None.
        """
        losses = self.trainable_module(input, target)
        return dict(
            loss=torch.stack([loss.float() for loss in losses.values()]).sum(),
            losses={name: loss.detach().float() for name, loss in losses.items()},
            output=None,
        )

    def get_eval_model(self, module: nn.Module | None = None, ema: bool = False) -> nn.Module | None:
        """Return the plain detector, or its moving average."""
        resolved = super().get_eval_model(module=module, ema=ema)
        return resolved if resolved is None else unwrap_model(resolved)

    def get_task_state(self, module: nn.Module | None = None, ema: bool = False) -> dict[str, Any]:
        """Return the description of the detector, with its classes."""
        return dict(detector=self.description)

    def load_task_state(
            self, state: dict[str, Any] | None, strict: bool = True, module: nn.Module | None = None,
            ema: bool = False) -> None:
        """Refuse a checkpoint of other classes, which loads silently if there are as many."""
        names, own = (description['class_names'] for description in (state['detector'], self.description))
        if names != own:
            raise ValueError(
                f'the checkpoint was trained on the classes {", ".join(names)}, the data have {", ".join(own)}; '
                'pass --class-names in the order of the checkpoint')


class DetectionTotals(LossTotals):
    """Total loss of an epoch and its parts."""

    def add(self, result: dict[str, Any]) -> None:
        super().add(result)
        for name, loss in result['losses'].items():
            self.count(f'loss/{name}', loss)

    def describe(self, sums: Sums) -> str:
        """Describe the mean of every part, over all processes."""
        means = sums.means()
        return 'losses: ' + ', '.join(
            f'{name.removeprefix("loss/")} {mean:.4f}' for name, mean in means.items() if name != 'loss')
