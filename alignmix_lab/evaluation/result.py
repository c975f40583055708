"""What a protocol finds, and its files: JSON, CSV, a Markdown table and pictures, each written whole."""
import csv
import io
import json
import math
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from matplotlib.figure import Figure

from alignmix_lab.runs.files import write_whole
from alignmix_lab.runs.plotting import as_png
from timm_alignmix.version import __version__

BOLD = (
    'Bold: the best value; a percentage of images only where it leads the next one by more than the standard error of '
    'their difference.')


@dataclass(frozen=True)
class Column:
    """How a column is shown in tables; CSV and JSON hold the values in full."""
    title: str
    format: str = '.2f'  # format of numbers, as in f-strings
    better: str | None = None  # 'higher' or 'lower' marks the best value of the column in bold; None marks none
    # Key of the values' standard errors in the rows; a best value that leads the next one by no more than the standard
    # error of their difference is not marked.
    error: str | None = None


@dataclass
class Result:
    """What a protocol found."""
    columns: dict[str, Column]  # key of the rows: how it is shown, in order. 'model' comes first by itself
    rows: list[dict[str, Any]]  # one per line of the table; missing keys and None are shown as '-'
    notes: list[str] = field(default_factory=list)  # definitions and facts that a reader of the table needs
    details: dict[str, Any] = field(default_factory=dict)  # anything more for the JSON file
    figures: dict[str, Figure] = field(default_factory=dict)  # by suffix of the file; '' is the protocol's own
    tables: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # rows of further CSV files, by suffix


def plain(value: Any) -> Any:
    """A value as JSON has it: numpy's and torch's numbers and arrays become lists, numbers that are not finite None."""
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    if isinstance(value, (np.ndarray, np.generic, torch.Tensor)):
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def environment(device: torch.device, processes: int) -> dict[str, Any]:
    """Date, versions and hardware."""
    name = torch.cuda.get_device_name(device) if device.type == 'cuda' else f'{platform.machine()} CPU'
    return {
        'date': time.strftime('%Y-%m-%d'), 'device': name, 'processes': processes, 'timm_alignmix': __version__,
        'timm': timm.__version__, 'torch': torch.__version__}


def standard_error(percent: float, count: int) -> float:
    """Standard error, in per cent, of a percentage of `count` independent images."""
    share = percent / 100
    return 100 * math.sqrt(share * (1 - share) / count)


def cells(columns: dict[str, Column], rows: Sequence[dict[str, Any]]) -> list[list[tuple[str, bool]]]:
    """Each cell of a table as text, and whether it is marked as the best of its column."""
    best = {key: _best(rows, key, column) for key, column in columns.items()}
    return [
        [(_text(row.get(key), column), place in best[key]) for key, column in columns.items()]
        for place, row in enumerate(rows)]


def table(result: Result) -> str:
    """The rows as a Markdown table, the best value of a column bold where it has a best one."""
    columns = {'model': Column('model'), **result.columns}
    lines = [
        '| ' + ' | '.join(column.title for column in columns.values()) + ' |',
        '|---' + '|---:' * (len(columns) - 1) + '|']
    for row in cells(columns, result.rows):
        texts = [f'**{text}**' if best else text.replace('|', '\\|') for text, best in row]
        lines.append('| ' + ' | '.join(texts) + ' |')
    return '\n'.join(lines)


def is_number(value: Any) -> bool:
    """Whether a cell holds a finite number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _text(value: Any, column: Column) -> str:
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return '-'
    return str(value) if isinstance(value, (str, bool)) else format(value, column.format)


def _best(rows: Sequence[dict[str, Any]], key: str, column: Column) -> set[int]:
    """Places of the rows with the best value; values that look equal are equally good."""
    values = {place: row[key] for place, row in enumerate(rows) if is_number(row.get(key))}
    if column.better is None or len(values) < 2:
        return set()
    order = sorted(values, key=values.get, reverse=column.better == 'higher')
    first = order[0]
    ties = [place for place in order if _text(values[place], column) == _text(values[first], column)]
    if column.error:
        following = order[len(ties)] if len(ties) < len(order) else ties[-1]  # where all are equal, none leads
        errors = [rows[place].get(column.error) or 0.0 for place in (first, following)]
        if abs(values[first] - values[following]) <= math.hypot(*errors):
            return set()
    return set(ties)


def markdown(title: str, result: Result, facts: dict[str, Any], pictures: list[str]) -> str:
    """A page: table, definitions, pictures, and where the figures come from."""
    where = facts['environment']
    lines = [f'# {title}', '', table(result), '', *(f'- {note}' for note in result.notes)]
    lines += [f'- Data: {facts["data"]}.'] if facts.get('data') else []
    lines += ['', *(f'![{name}]({name})' for name in pictures), '', f'    {facts["command"]}', '']
    lines += [
        f'{where["date"]}, {where["device"]}, {where["processes"]} process(es), timm-alignmix '
        f'{where["timm_alignmix"]}, timm {where["timm"]}, torch {where["torch"]}.', '']
    return '\n'.join(lines)


def as_csv(rows: Sequence[dict[str, Any]], first: Sequence[str] = ()) -> str:
    """Rows with their values in full; the columns `first` come first."""
    keys = list(dict.fromkeys([*first, *(key for row in rows for key in row)]))
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=keys, lineterminator='\n')
    writer.writeheader()
    writer.writerows(plain(rows))
    return text.getvalue()


def write_result(folder: Path, name: str, help: str, result: Result, facts: dict[str, Any]) -> list[Path]:
    """Write NAME.csv, NAME.md, further NAME-SUFFIX.csv, pictures NAME.png and NAME-SUFFIX.png, and last NAME.json.

    Returns the files.

    `facts` are what else the JSON file holds; `environment`, `command` and `data` are also shown on the page.
    """
    files: dict[str, str | bytes] = {}
    for suffix, figure in result.figures.items():
        files[f'{name}-{suffix}.png' if suffix else f'{name}.png'] = as_png(figure)
    pictures = list(files)
    files[f'{name}.csv'] = as_csv(result.rows, ['model', *result.columns])
    files.update({f'{name}-{suffix}.csv': as_csv(rows) for suffix, rows in result.tables.items()})
    files[f'{name}.md'] = markdown(f'{name}: {help.rstrip(".")}', result, facts, pictures)
    content = plain({
        'protocol': name, **facts, 'columns': {key: asdict(column) for key, column in result.columns.items()},
        'rows': result.rows, 'notes': result.notes, 'details': result.details, 'pictures': pictures})
    # The JSON file is what says that a result is there: it comes last.
    files[f'{name}.json'] = json.dumps(content, indent=1) + '\n'
    for file, data in files.items():
        write_whole(folder / file, data)
    return [folder / file for file in files]
