"""What a protocol works with: the models, their images, and what is shared between processes."""
import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import fields
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from alignmix_lab.runs.logs import progress_bar

from .config import EvalConfig
from .data import Batch, EvalLoader, open_split
from .models import EvalModel, open_models
from .predictions import Predictions, summarize
from .store import Store

_logger = logging.getLogger(__name__)


class Evaluation:
    """Models and data of one call of evaluate.py.

    Attributes:
        config: All options, those of the protocol included.
        accelerator: Processes and device.
        output: Folder of the results.
        used: Descriptions of the data that the running protocol has asked for, in order.
    """

    def __init__(self, config: EvalConfig, accelerator: Accelerator):
        self.config = config
        self.accelerator = accelerator
        self.output = Path(config.output)
        self._loaders: dict[Any, EvalLoader] = {}
        self._predictions: dict[tuple[str, str], Predictions] = {}
        self._stores: list[Store] = []
        self.used: dict[str, None] = {}

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def is_main(self) -> bool:
        return self.accelerator.is_main_process

    @cached_property
    def models(self) -> list[EvalModel]:
        """The models of --model, on the device."""
        return open_models(self.config, self.device)

    def loader(self, model: EvalModel, split: str | None = None, labelled: bool = True) -> EvalLoader:
        """This process's share of a split, with the images a model takes; made once for models that take the same.

        Args:
            model: The model.
            split: Name of the split; None for --split.
            labelled: Whether labels must be classes of the model.
        """
        split = split or self.config.split
        images = tuple(str(model.data_config[key]) for key in ('input_size', 'interpolation', 'crop_pct', 'crop_mode'))
        names = model.class_names if labelled else None
        key = (split, images, model.num_classes if labelled else None, tuple(names or ()))
        if key not in self._loaders:
            with self.accelerator.local_main_process_first():  # what is written once is written by the first
                self._loaders[key] = open_split(
                    self.config, split, model.data_config, names, model.num_classes if labelled else None, self.device,
                    self.accelerator.process_index, self.accelerator.num_processes)
        self.used[self._loaders[key].description] = None
        return self._loaders[key]

    def batches(self, model: EvalModel, split: str | None = None) -> Iterator[Batch]:
        """This process's images of a split: pixels in [0, 1] and labels on the device, and places in the data."""
        return iter(self.loader(model, split))

    def predictions(self, model: EvalModel) -> Predictions:
        """Predictions for every image of --split, on every process; computed once for all protocols."""
        key = (model.label, self.config.split)
        self.loader(model)  # counts as used
        if key not in self._predictions:
            self._predictions[key] = self._predict(model)
        return self._predictions[key]

    @torch.inference_mode()
    def _predict(self, model: EvalModel) -> Predictions:
        loader, indices, parts = self.loader(model), [], []
        with self.progress(f'predict {model.label}', len(loader)) as bar:
            for batch in loader:
                with self.autocast():
                    logits = model.network(batch.images)
                indices.append(batch.indices)
                parts.append(summarize(logits, batch.labels, model.label))
                bar.update()
        names = [field.name for field in fields(Predictions)]
        return Predictions(**{
            name: values for name, values in self.gather(
                indices, **{name: [part[name] for part in parts] for name in names}).items() if name in names})

    def autocast(self) -> AbstractContextManager:
        """Mixed precision, where --amp asks for it."""
        return self.accelerator.autocast()

    def progress(self, name: str, total: int) -> AbstractContextManager[tqdm]:
        """A progress bar of the main process."""
        return progress_bar(self, name, total)

    def gather(self, indices: Any, **values: Any) -> dict[str, np.ndarray]:
        """Values of all images from all processes, in the order of the data, each image once.

        Args:
            indices: Places in the data, a tensor, an array or a list of them (one a batch).
            **values: For each name a tensor or array of as many entries, or a list of them.

        Returns:
            `index`, sorted, and each name, the same on every process.

        Raises:
            RuntimeError: An image was counted twice.
        """
        own = {'index': _join(indices), **{name: _join(value) for name, value in values.items()}}
        parts = gather_object([own])
        # A process without images has empty arrays, whose type and shape say nothing, or none.
        filled = [part for part in parts if len(part['index'])] or parts[:1]
        merged = {name: np.concatenate([part[name] for part in filled]) for name in filled[0]}
        order = np.argsort(merged['index'], kind='stable')
        merged = {name: value[order] for name, value in merged.items()}
        if len(np.unique(merged['index'])) != len(order):
            raise RuntimeError('an image was evaluated twice')
        return merged

    def store(self, name: str, **facts: Any) -> Store:
        """What is kept of a computation over images, so that it goes on where it was cut.

        Args:
            name: Name of the computation, part of the file's name.
            **facts: All that decides on its values (fingerprint of the model, options, data); other facts, other store.
        """
        self._stores.append(Store(self.output / '.partial', name, facts, self.accelerator.process_index))
        return self._stores[-1]

    def clear_stores(self) -> None:
        """Remove what was kept: the result is written."""
        for store in self._stores:
            store.remove()
        self._stores.clear()


def _join(value: Any) -> np.ndarray:
    parts = value if isinstance(value, list) else [value]
    arrays = [part.detach().cpu().numpy() if isinstance(part, torch.Tensor) else np.asarray(part) for part in parts]
    return np.concatenate(arrays) if arrays else np.empty(0)
