"""Figures of runs that differ in the seed: means, deviations, and differences paired by seed."""
import json
from pathlib import Path

from scipy.special import stdtrit

from alignmix_lab.runs import plotting

from . import published
from .result import Column, Result, is_number
from .studies import Study, short, shown


def paired_difference(ours: dict[int, float], theirs: dict[int, float]) -> tuple[float | None, float | None]:
    """Mean difference over the seeds that both have, and half its 95 % interval by Student's t.

    Both are None for fewer than two seeds.

    Example:
        >>> paired_difference({0: 81.0, 1: 83.0, 2: 85.0}, {0: 80.0, 1: 81.0})
        (1.5, 6.353...)
    """
    differences = [ours[seed] - theirs[seed] for seed in ours.keys() & theirs.keys()]
    mean, std = plotting.spread(differences)
    if std is None:
        return None, None
    return mean, float(stdtrit(len(differences) - 1, 0.975)) * std / len(differences) ** 0.5


def evaluated(study: Study, folder: Path) -> Result:
    """Table of what `alignmix evaluate` found of the runs of a study: the quantities that the papers report, and NLL.

    Results are found by their labels, which are the names of the runs' folders unless --labels said otherwise. A
    ValueError says that there is none of these runs.
    """
    found, rows = _read_measures(folder), []
    for cell in study.cells:
        other = study.reference_of(cell)
        row = {'model': cell.config.model, **study.columns_of(cell), 'seeds': 0}
        for title, values in found.items():
            own, theirs = (
                {seed: values[job.name] for seed, job in case.jobs.items() if job.name in values} if case else {}
                for case in (cell, other))
            mean, std = plotting.spread([*own.values()])
            difference, interval = paired_difference(own, theirs)
            star = r'\*' if interval is not None and abs(difference) > interval else ''
            row['seeds'] = max(row['seeds'], len(own))
            row |= {title: mean if std is None else f'{mean:.2f} ± {std:.2f}{star}', f'{title}, mean': mean,
                    f'{title}, difference': difference, f'{title}, interval': interval}
        rows.append(row)
    if not any(row['seeds'] for row in rows):
        name = next(iter(study.cells[0].jobs.values())).name
        raise ValueError(
            f'--evaluated {folder} has no result of runs such as {name}: evaluate their last.pth.tar with --output '
            f"{folder}, and --labels with the names of the runs' folders")
    notes = ['Mean ± sample standard deviation over seeds, at the last epoch.']
    if study.reference:
        notes.append(
            rf"\*: the difference to {shown(study.reference)}, paired by seed, has a 95 % interval (Student's t over "
            'seeds) without 0. The CSV file has the differences and half their intervals.')
    columns = {**{key: Column(short(key)) for key in study.columns}, 'seeds': Column('seeds', 'd')}
    return Result({**columns, **{title: Column(title) for title in found}}, rows, notes)


def _read_measures(folder: Path) -> dict[str, dict[str, float]]:
    """Values by quantity and label."""
    measures = *published.MEASURES, ('calibration', 'nll', 'NLL')
    files = {protocol: folder / f'{protocol}.json' for protocol, *_ in measures}
    rows = {protocol: json.loads(path.read_text(encoding='utf-8'))['rows']
            for protocol, path in files.items() if path.is_file()}
    found: dict[str, dict[str, float]] = {}
    for protocol, key, title, *_ in measures:
        for row in rows.get(protocol, ()):
            if is_number(row.get(key)):
                full = f'{title}, {row["set"]}' if 'set' in row else title
                found.setdefault(full, {})[row['model']] = row[key]
    return found
