"""Sums over the training steps of an epoch, kept on the device so that no step waits for it."""
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator


@dataclass
class Sums:
    """Sums by name on the host, averaged over the processes, and their numbers of steps."""

    sums: dict[str, float]
    counts: dict[str, int]

    def means(self, before: 'Sums | None' = None) -> dict[str, float]:
        """Compute the mean of each name over all steps, or over those since `before`."""
        sums, counts = (before.sums, before.counts) if before else ({}, {})
        return {
            name: (total - sums.get(name, 0.0)) / (self.counts[name] - counts.get(name, 0))
            for name, total in self.sums.items() if self.counts[name] > counts.get(name, 0)}


class LossTotals:
    """Sums of the results of an epoch's training steps."""

    def __init__(self, device: torch.device):
        self.device = device
        # Of this process, float32; 'loss' covers every step, 'loss/NAME' the steps of a mode or a part of the loss.
        self.sums: dict[str, torch.Tensor] = {}
        self.counts: dict[str, int] = {}  # steps, the same on all processes
        self.skipped = 0  # updates, because a loss was not finite

    def add(self, result: dict[str, Any]) -> None:
        """Add the result of a step."""
        self.count('loss', result['loss'])

    def count(self, name: str, value: torch.Tensor) -> None:
        """Add the mean of a value's elements to the sum of a name."""
        value = value.detach().float().mean()
        self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.counts[name] = self.counts.get(name, 0) + 1

    def reduced(self, accelerator: Accelerator, *values: torch.Tensor) -> tuple[Sums, list[float]]:
        """Average the sums so far, and further 0-d values, over the processes; the host waits for the device here."""
        names = sorted(self.sums)
        stacked = torch.stack([torch.zeros((), device=self.device), *(self.sums[name] for name in names), *values])
        _, *numbers = accelerator.reduce(stacked, 'mean').tolist()
        return Sums(dict(zip(names, numbers, strict=False)), dict(self.counts)), numbers[len(names):]

    def modes(self, sums: Sums, before: Sums | None = None) -> dict[str, float]:
        """Compute the share of each mode in the steps (since `before`); empty for tasks without modes."""
        return {}

    def describe(self, sums: Sums) -> str:
        """Describe the epoch for its final log line."""
        return f'mean loss {sums.means().get("loss", 0.0):#.3g}'

    def state_dict(self, accelerator: Accelerator) -> dict[str, Any]:
        """Collect the sums of all processes, (processes, names)."""
        names = sorted(self.sums)
        own = torch.stack([self.sums[name] for name in names]) if names else torch.zeros(0, device=self.device)
        return dict(
            names=names, sums=accelerator.gather(own[None]).cpu(), counts=dict(self.counts), skipped=self.skipped)

    def load_state_dict(self, state: dict[str, Any], accelerator: Accelerator) -> None:
        """Restore the sums; on another number of processes each continues with their mean."""
        sums = state['sums']
        own = sums[accelerator.process_index] if len(sums) == accelerator.num_processes else sums.mean(dim=0)
        self.sums = dict(zip(state['names'], own.to(self.device), strict=True))
        self.counts, self.skipped = dict(state['counts']), state['skipped']
