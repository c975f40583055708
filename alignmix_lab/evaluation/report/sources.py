"""Find what evaluations and trainings have written, by its content, not by its name."""
import csv
import json
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from .. import published

_logger = logging.getLogger(__name__)

PICTURES = {'.png': 'image/png', '.jpg': 'image/jpeg', '.jpeg': 'image/jpeg', '.svg': 'image/svg+xml',
            '.webp': 'image/webp', '.gif': 'image/gif'}


@dataclass
class EvaluationResult:
    """What evaluate.py wrote for one protocol or study.

    Attributes:
        path: The JSON file.
        name: Path for the reader, from the folder that was given.
        data: Its content.
        pictures: Its pictures that are there.
    """
    path: Path
    name: str
    data: dict[str, Any]
    pictures: list[Path]

    @property
    def protocol(self) -> str:
        return self.data['protocol']


@dataclass
class TrainingRun:
    """The folder of a training run.

    Attributes:
        folder: The folder.
        name: Path for the reader, from the folder that was given.
        args: Its options.
        epochs: Its summary.csv: a mapping of columns to numbers for each epoch, those that were not measured left out.
        pictures: Pictures in the folder.
        report: Its report.md, if it has one.
    """
    folder: Path
    name: str
    args: dict[str, Any]
    epochs: list[dict[str, float]]
    pictures: list[Path]
    report: str

    @property
    def is_detector(self) -> bool:
        return 'detector' in self.args

    @property
    def metric(self) -> str:
        """Column of summary.csv that is shown."""
        return f'eval_{self.args.get("eval_metric") or "top1"}'

    @property
    def last(self) -> dict[str, float] | None:
        """The last epoch that was evaluated."""
        return next((row for row in reversed(self.epochs) if self.metric in row), None)

    @property
    def best(self) -> dict[str, float] | None:
        """The best epoch by the metric that is shown; of 'loss' the smallest."""
        rows, sign = [row for row in self.epochs if self.metric in row], -1 if self.metric == 'eval_loss' else 1
        return max(rows, key=lambda row: sign * row[self.metric], default=None)

    @property
    def done(self) -> int:
        """Epochs that are done."""
        return int(self.epochs[-1]['epoch']) + 1 if self.epochs else 0

    @property
    def finished(self) -> bool:
        """Whether all its epochs are done."""
        return self.done >= self.args['epochs']

    @property
    def dataset(self) -> str:
        """Name of the data; of a path only the last part."""
        name, folder = self.args.get('dataset'), self.args.get('data_dir')
        if name and not self.is_detector:
            return published.dataset_name(name)
        return Path(folder).name if folder else 'digits of scikit-learn'

    @property
    def network(self) -> str:
        """The papers' name of the network, or timm's."""
        if self.is_detector:
            return published.network_name(f'{self.args["detector"]} {self.args["backbone"]}')
        return published.network_name(self.args['model'])


@dataclass
class Sources:
    """All that was found.

    Attributes:
        results: Of evaluations and ablations.
        runs: Of trainings.
        pictures: Pictures that belong to none of them.
        pages: Markdown files that belong to none of them, by path for the reader.
    """
    results: list[EvaluationResult] = field(default_factory=list)
    runs: list[TrainingRun] = field(default_factory=list)
    pictures: list[tuple[str, Path]] = field(default_factory=list)
    pages: list[tuple[str, str]] = field(default_factory=list)

    def count_pictures(self) -> int:
        """Number of pictures."""
        return len(self.pictures) + sum(len(source.pictures) for source in (*self.results, *self.runs))


def find_sources(folders: Sequence[Path]) -> Sources:
    """Search folders.

    Raises:
        ValueError: A folder does not exist, or there is nothing in any of them.
    """
    found, seen = Sources(), set()
    for top in folders:
        if not top.is_dir():
            raise ValueError(f'{top} is no folder')
        files = [path for path in sorted(top.rglob('*'))
                 if path.is_file() and not any(p.startswith('.') for p in path.relative_to(top).parts)]
        files = [path for path in files if path.resolve() not in seen]  # one folder may lie in another
        seen.update(path.resolve() for path in files)
        _search(top, files, found)
    if not (found.results or found.runs or found.pictures or found.pages):
        raise ValueError('nothing to report in ' + ', '.join(map(str, folders)) + ': no results of evaluate.py, no '
                         'training runs (args.yaml, summary.csv), no pictures')
    return found


def _search(top: Path, files: list[Path], found: Sources) -> None:
    def name(path: Path) -> str:
        return (Path(top.resolve().name) / path.relative_to(top)).as_posix()

    used: set[Path] = set()
    for path in (path for path in files if path.suffix == '.json'):
        data = _read_json(path)
        if {'protocol', 'columns', 'rows'} <= data.keys():
            pictures = [path.with_name(Path(file).name) for file in data.get('pictures', ())]
            pictures = [picture for picture in pictures if picture.is_file()]
            found.results.append(EvaluationResult(path, name(path), data, pictures))
            used.update([path, path.with_suffix('.md'), *pictures])
    for folder in dict.fromkeys(path.parent for path in files if path.name == 'summary.csv'):
        own = [path for path in files if path.parent == folder]
        run = _read_run(folder, name(folder), own)
        if run is not None:
            found.runs.append(run)
            # The card of its exported weights says nothing that the run does not.
            used.update([*own, *(path for path in files if path.parent == folder / 'export')])
    for path in (path for path in files if path not in used):
        if path.suffix.lower() in PICTURES:
            found.pictures.append((name(path), path))
        elif path.suffix == '.md':
            found.pages.append((name(path), path.read_text(encoding='utf-8', errors='replace')))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError) as e:
        _logger.warning(f'{path} is left out: {e}')
        return {}
    return data if isinstance(data, dict) else {}


def _read_run(folder: Path, name: str, files: Iterable[Path]) -> TrainingRun | None:
    try:
        args = yaml.safe_load((folder / 'args.yaml').read_text(encoding='utf-8'))
        with (folder / 'summary.csv').open(newline='', encoding='utf-8') as file:
            epochs = [_numbers(row) for row in csv.DictReader(file)]
    except (OSError, yaml.YAMLError) as e:
        _logger.warning(f'{folder} is left out: {e}')
        return None
    report = folder / 'report.md'
    return TrainingRun(
        folder, name, args, epochs, sorted(path for path in files if path.suffix.lower() in PICTURES),
        report.read_text(encoding='utf-8') if report.is_file() else '')


def _numbers(row: dict[str, str | None]) -> dict[str, float]:
    """The cells of a line that hold finite numbers; a line that is being written may lack some."""
    found = {}
    for key, text in row.items():
        try:
            value = float(text)
        except (TypeError, ValueError):
            continue
        if math.isfinite(value):
            found[key] = value
    return found
