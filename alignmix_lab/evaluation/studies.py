"""Studies of an ablation: which options take which values. The papers' studies are in studies.yaml."""
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignmix_lab.classification.config import TrainConfig
from alignmix_lab.runs.options import load_yaml, near_names
from alignmix_lab.runs.plotting import spread

STUDIES = Path(__file__).with_name('studies.yaml')


@dataclass
class Cell:
    """A case of a study: what is trained with every seed."""
    settings: dict[str, Any]  # an option of the method is mix_kwargs.NAME
    name: str
    published: str  # name of the method in published.csv
    config: TrainConfig | None = None
    curves: list[dict[int, float]] = field(default_factory=list)  # of each finished run, top-1 (%) by epoch

    @property
    def last(self) -> tuple[float | None, float | None]:
        """Mean and standard deviation of top-1 at the last epoch."""
        return spread([curve[max(curve)] for curve in self.curves])


@dataclass
class Study:
    """Cases that are compared; studies.yaml describes the fields."""
    name: str
    title: str
    cases: list[dict[str, Any]]
    source: str = ''
    set: dict[str, Any] = field(default_factory=dict)
    x: str | None = None
    scale: str = 'linear'
    paper: str | None = None
    table: str | None = None
    note: str = ''

    def __post_init__(self):
        if self.scale not in ('log', 'linear', 'categories') or not self.cases:
            raise ValueError(f'study {self.name} needs cases, and a scale of log, linear or categories')
        cells = {}
        for case in self.cases:
            grid = {key: value for key, value in case.items() if key not in ('label', 'published')}
            for values in itertools.product(*(v if isinstance(v, list) else [v] for v in grid.values())):
                own = dict(zip(grid, values, strict=True))
                method = case.get('published', '')
                for key, value in own.items():
                    method = method.replace(f'{{{key}}}', str(value))
                settings = {**self.set, **own}
                cells[repr(sorted(settings.items()))] = Cell(settings, case.get('label') or shown(settings), method)
        self.cells = list(cells.values())
        keys = dict.fromkeys(key for cell in self.cells for key in cell.settings)
        self.keys = [key for key in keys if len({repr(cell.settings.get(key, '')) for cell in self.cells}) > 1]

    def lines(self) -> dict[str, list[Cell]]:
        """Cases with finished runs, by what they differ in other than the horizontal axis."""
        lines: dict[str, list[Cell]] = {}
        for cell in self.cells:
            own = {key: cell.settings[key] for key in self.keys if key != self.x and key in cell.settings}
            if cell.curves:
                lines.setdefault(shown(own) or str(cell.settings.get('mix', 'top-1')), []).append(cell)
        return lines

    def place(self, cell: Cell) -> float | str | None:
        """Where a case stands on the horizontal axis; None where it has nothing to stand at."""
        value = cell.settings.get(self.x, '')
        if self.scale == 'categories':
            return shown(value) or None
        value = cell.config.batch_size if value is None else value  # MultiMix's m of a whole batch
        return value if type(value) in (int, float) else None


def short(key: str) -> str:
    """An option's own name."""
    return key.rpartition('.')[2]


def shown(value: Any) -> str:
    """A value, or several options and values, in tables, pictures and names."""
    if isinstance(value, dict):
        return ' '.join(shown(v) if key == 'mix' else f'{short(key)}={shown(v)}' for key, v in value.items())
    if isinstance(value, list):
        return f'U[{", ".join(map(str, value))}]'
    return {'None': 'all', 'True': 'on', 'False': 'off'}.get(str(value), str(value))


def parse_words(words: Sequence[str], flag: str) -> dict[str, Any]:
    """Options from words such as `epochs=5`, or for --grid lists of values from `mix_kwargs.n=1,10`, all in YAML."""
    options = {}
    for word in words:
        key, _, text = word.partition('=')
        key = key.removeprefix('--').replace('-', '_')
        if not key or not text or key in options:
            raise ValueError(f'{flag} takes OPTION=VALUE, each option once, got {word!r}')
        options[key] = load_yaml(f'[{text}]' if flag == '--grid' else text, f'{flag} {word}')
    return options


def grid_study(grid: dict[str, list[Any]]) -> Study:
    """The study of all combinations; the last option with several numbers is the horizontal axis."""
    numbers = {key: [value for value in values if type(value) in (int, float)] for key, values in grid.items()}
    x = next((key for key in reversed(grid) if len(numbers[key]) > 1), None)
    is_wide = x and 0 < 20 * min(numbers[x]) <= max(numbers[x])
    return Study('grid', f'Grid of {", ".join(map(short, grid))}', [grid], x=x, scale='log' if is_wide else 'linear')


def load_studies(names: Sequence[str]) -> list[Study]:
    """Studies of the papers by name, or all of a YAML file.

    Raises:
        ValueError: There is no such study or file, or it is not as studies.yaml describes.
    """
    studies = []
    for name in names:
        path = Path(name) if name.endswith(('.yaml', '.yml')) else STUDIES
        try:
            entries = load_yaml(path.read_text(encoding='utf-8'), str(path))
            known = {key: Study(key, **entry) for key, entry in entries.items()}
        except (OSError, AttributeError, TypeError) as e:
            raise ValueError(f'--study {name}: {e}') from e
        if path is STUDIES and name not in known:
            raise ValueError(f'--study {name}: there is none{near_names(name, known)}; there are {", ".join(known)}, '
                             'or a YAML file')
        studies += [known[name]] if path is STUDIES else known.values()
    return studies
