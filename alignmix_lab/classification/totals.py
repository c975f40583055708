"""Sums over the training steps of a mixing method."""
from typing import Any

from alignmix_lab.runs.totals import LossTotals, Sums


class MixTotals(LossTotals):
    """Loss, accuracy in per cent, modes and mixing factors of an epoch."""

    def add(self, result: dict[str, Any]) -> None:
        super().add(result)
        self.count(f'loss/{result["mode"]}', result['loss'])
        if result['accuracy'] is not None:
            for name in ('accuracy', f'accuracy/{result["mode"]}'):
                self.count(name, 100 * result['accuracy'])
        if result['lam'] is not None:
            self.count('lam', result['lam'])

    def modes(self, sums: Sums, before: Sums | None = None) -> dict[str, float]:
        counts = before.counts if before else {}
        steps = {name: count - counts.get(name, 0) for name, count in sums.counts.items()}
        return {
            name.removeprefix('loss/'): count / steps['loss']
            for name, count in sorted(steps.items()) if name.startswith('loss/') and count}

    def describe(self, sums: Sums) -> str:
        """Describe the share, mean loss and accuracy of every mode, and the mean lam, over all processes."""
        means, parts = sums.means(), []
        for mode, share in self.modes(sums).items():
            accuracy = means.get(f'accuracy/{mode}')
            parts.append(
                f'{mode} {100 * share:.1f}% (loss {means["loss/" + mode]:#.3g}'
                + ('' if accuracy is None else f', accuracy {accuracy:.1f}%') + ')')
        if 'lam' in means:
            parts.append(f'mean lam {means["lam"]:.3f}')
        return 'modes: ' + ', '.join(parts)
