"""Sums over the training steps of a mixing method."""
from typing import Any

from alignmix_lab.runs.totals import LossTotals, Sums


class MixTotals(LossTotals):
    """Loss, modes and mixing factors of an epoch."""

    def add(self, result: dict[str, Any]) -> None:
        super().add(result)
        self.count(f'loss/{result["mode"]}', result['loss'])
        if result['lam'] is not None:
            self.count('lam', result['lam'])

    def modes(self, sums: Sums, before: Sums | None = None) -> dict[str, float]:
        counts = before.counts if before else {}
        steps = {name: count - counts.get(name, 0) for name, count in sums.counts.items()}
        return {
            name.removeprefix('loss/'): count / steps['loss']
            for name, count in sorted(steps.items()) if name.startswith('loss/') and count}

    def describe(self, sums: Sums) -> str:
        """Describe the share and mean loss of every mode, and the mean lam, over all processes."""
        means = sums.means()
        parts = [
            f'{mode} {100 * share:.1f}% (loss {means["loss/" + mode]:#.3g})'
            for mode, share in self.modes(sums).items()]
        if 'lam' in means:
            parts.append(f'mean lam {means["lam"]:.3f}')
        return 'modes: ' + ', '.join(parts)
