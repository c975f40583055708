"""Studies and their cases: which options take which values. The papers' studies are in studies.yaml."""
import itertools
import re
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import yaml

from alignmix_lab.runs.options import near_names

STUDIES = Path(__file__).with_name('studies.yaml')


@dataclass(frozen=True)
class Cell:
    """One case of a study: what is trained with every seed.

    Attributes:
        settings: Options and values; an option of the method is `mix_kwargs.NAME`.
        label: Its name in tables and pictures, where it has one.
        published: Name of the method in the published figures.
    """
    settings: dict[str, Any]
    label: str | None = None
    published: str | None = None

    @property
    def name(self) -> str:
        """The settings in few words."""
        return self.label or ' '.join(
            str(value) if key == 'mix' else f'{short(key)}={shown(value)}' for key, value in self.settings.items())


@dataclass(frozen=True)
class Study:
    """Cases that are compared. The fields are those of studies.yaml, where they are described."""
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
        if self.scale not in ('log', 'linear', 'categories'):
            raise ValueError(f'study {self.name}: scale must be log, linear or categories, got {self.scale!r}')
        if not isinstance(self.cases, list) or not self.cases or not all(isinstance(c, dict) for c in self.cases):
            raise ValueError(f'study {self.name}: cases must be a list of mappings of options to values')

    @property
    def cells(self) -> list[Cell]:
        """All cases, in order, each once."""
        found = {}
        for case in self.cases:
            grid = {key: value for key, value in case.items() if key not in ('label', 'published')}
            for values in itertools.product(*(v if isinstance(v, list) else [v] for v in grid.values())):
                own = dict(zip(grid, values, strict=True))
                published = case.get('published')
                for key, value in own.items():
                    published = published and published.replace(f'{{{key}}}', str(value))
                cell = Cell({**self.set, **own}, case.get('label'), published)
                found[repr(sorted(cell.settings.items()))] = cell
        return list(found.values())

    @property
    def keys(self) -> list[str]:
        """Options that differ between cases."""
        cells = self.cells
        names = dict.fromkeys(key for cell in cells for key in cell.settings)
        return [key for key in names if len({repr(cell.settings.get(key, '')) for cell in cells}) > 1]


def short(key: str) -> str:
    """An option's own name."""
    return key.rpartition('.')[2]


def shown(value: Any) -> str:
    """A value in tables, pictures and names."""
    if value is None:
        return 'all'
    if isinstance(value, (list, tuple)):
        return 'U[' + ', '.join(map(str, value)) + ']'
    return str(value)


def parse_grid(words: list[str]) -> dict[str, list[Any]]:
    """Values of options from words like `mix_kwargs.n=1,10,100`; values are YAML, lists stand in brackets.

    Raises:
        ValueError: A word is of another form, or an option is named twice.
    """
    grid = {}
    for word in words:
        key, equals, text = word.partition('=')
        key = key.removeprefix('--').replace('-', '_')
        if not key or not equals or key in grid:
            raise ValueError(f'--grid takes OPTION=VALUE,VALUE,... with each option once, got {word!r}')
        grid[key] = _parse_yaml(f'[{text}]', word)
        if not grid[key]:
            raise ValueError(f'--grid {word!r} names no values')
    return grid


def parse_settings(words: list[str]) -> dict[str, Any]:
    """Options from words like `epochs=5` or `mix_kwargs.eps=0.2`; values are YAML.

    Raises:
        ValueError: A word is of another form.
    """
    settings = {}
    for word in words:
        key, equals, text = word.partition('=')
        if not key or not equals:
            raise ValueError(f'--set takes OPTION=VALUE, got {word!r}')
        settings[key.removeprefix('--').replace('-', '_')] = _parse_yaml(text, word)
    return settings


def _parse_yaml(text: str, word: str) -> Any:
    try:
        return _numbers(yaml.safe_load(text))
    except yaml.YAMLError as e:
        raise ValueError(f'{word!r} is not YAML: {e}') from e


def _numbers(value: Any) -> Any:
    """YAML takes 1e-3 for text; a flag would not."""
    if isinstance(value, dict):
        return {key: _numbers(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_numbers(entry) for entry in value]
    return float(value) if isinstance(value, str) and re.fullmatch(r'[-+]?\d+[eE][-+]?\d+', value) else value


def grid_study(grid: dict[str, list[Any]]) -> Study:
    """The study of a grid of the command line; its last option with several numbers is the horizontal axis."""
    numeric = [key for key, values in grid.items() if sum(_is_number(v) for v in values) > 1]
    x = numeric[-1] if numeric else None
    numbers = [v for v in grid[x] if _is_number(v)] if x else []
    wide = bool(numbers) and min(numbers) > 0 and max(numbers) >= 20 * min(numbers)
    return Study('grid', 'Grid of ' + ', '.join(map(short, grid)), [grid], x=x, scale='log' if wide else 'linear')


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def load_studies(names: list[str]) -> list[Study]:
    """Studies by name, or all of a YAML file.

    Raises:
        ValueError: No such study or file, or a study with unknown fields.
    """
    known = _read(STUDIES)
    studies = []
    for name in names:
        if name.endswith(('.yaml', '.yml')):
            if not Path(name).is_file():
                raise ValueError(f'--study {name}: no such file')
            studies += _read(Path(name)).values()
        elif name in known:
            studies.append(known[name])
        else:
            raise ValueError(f'--study {name}: there is none{near_names(name, known)}; there are {", ".join(known)}, '
                             'or a YAML file')
    return studies


def _read(path: Path) -> dict[str, Study]:
    found = _parse_yaml(path.read_text(encoding='utf-8'), str(path))
    if not isinstance(found, dict) or not all(isinstance(entry, dict) for entry in found.values()):
        raise ValueError(f'{path} must hold a mapping of studies')
    known = {option.name for option in fields(Study)} - {'name'}
    for name, entry in found.items():
        wrong = sorted(set(entry) - known) + sorted({'title', 'cases'} - set(entry))
        if wrong:
            raise ValueError(f'{path}: study {name} has unknown or missing fields: {", ".join(wrong)}')
    return {name: Study(name, **entry) for name, entry in found.items()}
