"""Stored progress of long computations over images, so that they resume after an interruption."""
import hashlib
import io
import json
import logging
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from alignmix_lab.runs.files import write_whole

_logger = logging.getLogger(__name__)


class Store:
    """Values by image, written to disk after every batch.

    Entries are keyed by position in the dataset, so that a run can resume with another batch size or number of
    processes. The file name contains a hash of `facts`, everything that the values depend on: for other models, options
    or data the store is empty. Each rank writes its own file and reads those of all ranks.
    """

    def __init__(self, folder: Path, name: str, facts: dict[str, Any], rank: int):
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode()).hexdigest()[:16]
        self._folder = folder
        self._stem = f'{re.sub(r"[^A-Za-z0-9]+", "-", name).strip("-")}-{digest}'
        self._file = folder / f'{self._stem}-{rank}.npz'
        self._own: dict[int, dict[str, np.ndarray]] = {}
        self.done: dict[int, dict[str, np.ndarray]] = {}
        for path in sorted(folder.glob(f'{self._stem}-*.npz')):
            read = _read(path)
            self.done.update(read)
            if path == self._file:
                self._own = read
        if self.done:
            _logger.info(f'{name}: resuming after {len(self.done)} images')

    def has(self, indices: Any) -> bool:
        """Whether all these images are done."""
        return all(int(index) in self.done for index in indices)

    def add(self, indices: Any, **values: Any) -> None:
        """Add the values of some images, arrays with one entry per image, and write the file."""
        arrays = {key: np.asarray(value) for key, value in values.items()}
        for place, index in enumerate(indices):
            self._own[int(index)] = self.done[int(index)] = {key: value[place] for key, value in arrays.items()}
        order = sorted(self._own)
        columns = {key: np.stack([self._own[index][key] for index in order]) for key in arrays}
        buffer = io.BytesIO()
        np.savez_compressed(buffer, index=np.array(order), **columns)
        write_whole(self._file, buffer.getvalue())

    def take(self, indices: Any) -> dict[str, np.ndarray]:
        """Values of some images, by name."""
        rows = [self.done[int(index)] for index in indices]
        return {key: np.stack([row[key] for row in rows]) for key in (rows[0] if rows else ())}

    def remove(self) -> None:
        """Remove the files of all processes."""
        for path in self._folder.glob(f'{self._stem}-*.npz'):
            path.unlink(missing_ok=True)  # another process may have done it


def _read(path: Path) -> dict[int, dict[str, np.ndarray]]:
    try:
        with np.load(path) as file:
            arrays = {key: file[key] for key in file.files}
    except (OSError, ValueError, zipfile.BadZipFile) as e:
        _logger.warning(f'{path} cannot be read, its values are computed again ({e})')
        return {}
    indices = arrays.pop('index')
    return {int(index): {key: value[place] for key, value in arrays.items()} for place, index in enumerate(indices)}
