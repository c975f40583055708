"""Studies: which options take which values, and what is compared with what. studies.yaml has those of the papers."""
import itertools
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from alignmix_lab.classification.config import TrainConfig
from alignmix_lab.runs import options as opts
from alignmix_lab.runs import plotting
from alignmix_lab.runs.jobs import Job

STUDIES = Path(__file__).with_name('studies.yaml')


@dataclass
class Cell:
    """A case of a study: what is trained with every seed."""
    settings: dict[str, Any]  # an option of the method is mix_kwargs.NAME
    name: str = ''
    published: str = ''  # name of the method in published.csv
    config: TrainConfig | None = None
    jobs: dict[int, Job] = field(default_factory=dict)  # by seed
    curves: dict[int, dict[int, float]] = field(default_factory=dict)  # of finished jobs

    @property
    def last(self) -> dict[int, float]:
        """Top-1 (%) at the last epoch, by seed."""
        return {seed: curve[max(curve)] for seed, curve in self.curves.items()}

    @property
    def score(self) -> tuple[float | None, float | None]:
        """Mean and standard deviation of top-1 at the last epoch."""
        return plotting.spread([*self.last.values()])


@dataclass
class Study:
    """Cases that are compared; studies.yaml describes the fields."""
    name: str
    title: str
    cases: list[dict[str, Any]]
    source: str = ''
    set: dict[str, Any] = field(default_factory=dict)
    x: str | None = None
    paper: str | None = None
    table: str | None = None
    note: str = ''
    reference: str | dict[str, Any] | None = None

    def __post_init__(self):
        if not self.cases:
            raise ValueError(f'study {self.name} needs cases')
        cells = {}
        for case in self.cases:
            grid = {key: value for key, value in case.items() if key not in ('label', 'published')}
            for values in itertools.product(*(v if isinstance(v, list) else [v] for v in grid.values())):
                own = dict(zip(grid, values, strict=True))
                method = re.sub('{(.+?)}', lambda m, own=own: str(own.get(m[1], m[0])), case.get('published', ''))
                settings = {**self.set, **own}
                cells[repr(sorted(settings.items()))] = Cell(settings, case.get('label') or shown(settings), method)
        self.cells = list(cells.values())
        keys = dict.fromkeys(key for cell in self.cells for key in cell.settings)
        self.keys = [key for key in keys if len({repr(cell.settings.get(key, '')) for cell in self.cells}) > 1]
        if self.reference and not any(map(self.reference_of, self.cells)):
            raise ValueError(f'study {self.name}: no case is the reference {shown(self.reference)}')

    def reference_of(self, cell: Cell) -> Cell | None:
        """The case that a case is compared with; first of all one that differs in the reference's settings alone."""
        wanted = [self.reference]
        if isinstance(self.reference, dict):
            wanted = [{**cell.settings, **self.reference}, {**self.set, **self.reference}]
        found = (other for known in wanted for other in self.cells if known in (other.name, other.settings))
        return next((other for other in found if other is not cell), None)

    @property
    def columns(self) -> list[str]:
        """What names a case in tables: its label, or the options in which cases differ."""
        return ['case'] if any('label' in case for case in self.cases) else self.keys

    def columns_of(self, cell: Cell) -> dict[str, str | None]:
        """A case's cells in these columns."""
        values = {'case': cell.name, **{key: shown(value) for key, value in cell.settings.items()}}
        return {key: values.get(key) for key in self.columns}

    def lines(self) -> dict[str, list[Cell]]:
        """Cases with finished runs, by what they differ in other than the horizontal axis."""
        lines: dict[str, list[Cell]] = {}
        for cell in self.cells:
            own = {key: cell.settings[key] for key in self.keys if key != self.x and key in cell.settings}
            if cell.curves:
                lines.setdefault(shown(own) or str(cell.settings.get('mix', 'top-1')), []).append(cell)
        return lines

    def place(self, cell: Cell) -> str:
        """Where a case stands on the horizontal axis."""
        return shown(cell.settings.get(self.x, cell.name))


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


def parse_words(words: list[str], flag: str) -> dict[str, Any]:
    """Options from words such as `epochs=5`, or for --grid lists of values from `mix_kwargs.n=1,10`, all in YAML."""
    options = {}
    for word in words:
        key, _, text = word.partition('=')
        key = key.removeprefix('--').replace('-', '_')
        if not key or not text or key in options:
            raise ValueError(f'{flag} takes OPTION=VALUE, each option once, got {word!r}')
        options[key] = opts.load_yaml(f'[{text}]' if flag == '--grid' else text, f'{flag} {word}')
    return options


def grid_study(grid: dict[str, list[Any]]) -> Study:
    """The study of all combinations; the last option with several numbers is the horizontal axis."""
    x = next((key for key in reversed(grid) if sum(type(value) in (int, float) for value in grid[key]) > 1), None)
    return Study('grid', f'Grid of {", ".join(map(short, grid))}', [grid], x=x,
                 reference={'mix': 'none'} if {'none'} < {*map(str, grid.get('mix', ()))} else None)


def load_studies(names: list[str]) -> list[Study]:
    """Studies of the papers by name, or all of a YAML file; a ValueError says what is wrong with one."""
    studies = []
    for name in names:
        path = Path(name) if name.endswith(('.yaml', '.yml')) else STUDIES
        try:
            entries = opts.load_yaml(path.read_text(encoding='utf-8'), str(path))
            known = {key: Study(key, **entry) for key, entry in entries.items()}
        except (OSError, AttributeError, TypeError) as e:
            raise ValueError(f'--study {name}: {e}') from e
        if path is STUDIES and name not in known:
            near = opts.near_names(name, known)
            raise ValueError(f'--study {name}: there is none{near}; there are {", ".join(known)}, or a YAML file')
        studies += [known[name]] if path is STUDIES else known.values()
    return studies
