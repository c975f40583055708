"""Working environment of a protocol: models, their images, and communication between processes."""
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from alignmix_lab.data.images.sources import ImageSource
from alignmix_lab.data.options import LoaderOptions
from alignmix_lab.data.transforms import Size
from alignmix_lab.runs.logs import progress_bar

from .config import EvalConfig
from .data import Batch, EvalLoader, open_split, open_unlabelled
from .models import EvalModel, open_models
from .predictions import Predictions, summarize
from .store import Store


class Evaluation:
    """Models and data of one evaluation.

    Attributes:
        config: All options, including those of the protocol.
        used: Descriptions of the data that the running protocol has used, in order.
    """

    def __init__(self, config: EvalConfig, accelerator: Accelerator):
        self.config = config
        self.accelerator = accelerator
        self.output = Path(config.output)
        self._loaders: dict[tuple, EvalLoader] = {}
        self._unlabelled: dict[tuple, EvalLoader] = {}  # of the running protocol
        self._predictions: dict[str, Predictions] = {}
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
        """Models of --model, on the device."""
        return open_models(self.config, self.device)

    def loader(self, model: EvalModel, split: str | None = None) -> EvalLoader:
        """Open this process's share of a split (default: --split) in the form that a model takes.

        Models that take the same share get the same loader.

        Raises:
            ValueError: The data does not fit, or the model was trained on images with several labels.
        """
        if model.training.get('multi_label') and not self.config.multi_label:
            raise ValueError(f'{model.label} was trained on images with several labels; pass --multi-label')
        split, names = split or self.config.split, model.class_names
        options = self._loader_options(model, num_classes=model.num_classes)
        key = (split, *(names or ()), str(options))
        return self._open_once(self._loaders, key, partial(open_split, options, split, names))

    def unlabelled(
            self, model: EvalModel, source: ImageSource, make_transform: Callable[[Size], Callable] | None = None,
            **options: Any) -> EvalLoader:
        """Open this process's share of images without classes; models that take the same images share it.

        Args:
            make_transform: Other than timm's transform: returns a function from a PIL image to (C, H, W) uint8.
            **options: Loader options other than the model's.
        """
        options = self._loader_options(model, num_classes=None, **options)
        key = (source, str(options))
        return self._open_once(self._unlabelled, key, partial(open_unlabelled, source, options, make_transform))

    def _loader_options(self, model: EvalModel, **decided: Any) -> LoaderOptions:
        """Options for this process's share of the images of a model, as pixels in [0, 1]."""
        shown = {key: model.data_config[key] for key in ('input_size', 'interpolation', 'crop_pct', 'crop_mode')}
        channels = shown['input_size'][0]
        return LoaderOptions.of(self.config, **{
            **shown, 'mean': (0.0,) * channels, 'std': (1.0,) * channels, 'device': self.device,
            'rank': self.accelerator.process_index, 'world_size': self.accelerator.num_processes, **decided})

    def _open_once(self, loaders: dict[tuple, EvalLoader], key: tuple, create: Callable[[], EvalLoader]) -> EvalLoader:
        if key not in loaders:
            with self.accelerator.local_main_process_first():  # the others find what the first has written
                loaders[key] = create()
        self.used[loaders[key].description] = None
        return loaders[key]

    @torch.inference_mode()
    def measure(
            self, name: str, batches: Iterable[Batch], total: int,
            function: Callable[[Batch], dict[str, Any]]) -> dict[str, np.ndarray]:
        """Apply a function to every batch, under --amp and without gradients, and gather the values of all images.

        The function returns arrays or tensors by name, with one entry per image; the result is that of :meth:`gather`.
        """
        indices: list[torch.Tensor] = []
        found: dict[str, list[Any]] = {}
        with self.progress(name, total) as bar:
            for batch in batches:
                with self.accelerator.autocast():
                    values = function(batch)
                indices.append(batch.indices)
                for key, value in values.items():
                    found.setdefault(key, []).append(value)
                bar.update()
        return self.gather(indices, **found)

    def predictions(self, model: EvalModel) -> Predictions:
        """Predictions for all images of --split, on every process; computed once for all protocols."""
        loader = self.loader(model)  # also marks the data as used
        if model.label not in self._predictions:
            found = self.measure(
                f'predict {model.label}', loader, len(loader),
                lambda batch: summarize(model.network(batch.images), batch.labels, model.label))
            del found['index']
            self._predictions[model.label] = Predictions(**found)
        return self._predictions[model.label]

    def progress(self, name: str, total: int) -> AbstractContextManager[tqdm]:
        """Progress bar of the main process."""
        return progress_bar(self, name, total)

    def gather(self, indices: Any, **values: Any) -> dict[str, np.ndarray]:
        """Gather values of all images from all processes, in dataset order.

        Args:
            indices: Positions in the dataset: a tensor, an array, or a list of them (one per batch).
            **values: Tensors or arrays of the same length, or lists of them.

        Returns:
            `index`, sorted, and the values by name, the same on every process.

        Raises:
            RuntimeError: An image was evaluated twice.
        """
        own = {'index': _join(indices), **{name: _join(value) for name, value in values.items()}}
        parts = gather_object([own])
        # Leave out processes without images: their arrays are missing, or empty and of arbitrary type and shape.
        filled = [part for part in parts if len(part['index'])] or parts[:1]
        merged = {name: np.concatenate([part[name] for part in filled]) for name in filled[0]}
        order = np.argsort(merged['index'], kind='stable')
        merged = {name: value[order] for name, value in merged.items()}
        if len(np.unique(merged['index'])) != len(order):
            raise RuntimeError('an image was evaluated twice')
        return merged

    def store(self, name: str, **facts: Any) -> Store:
        """Open a store for intermediate values of a long computation, so that it can resume after an interruption.

        `facts` are everything that its values depend on (fingerprint of the model, options, data).
        """
        self._stores.append(Store(self.output / '.partial', name, facts, self.accelerator.process_index))
        return self._stores[-1]

    def end_protocol(self) -> None:
        """Remove the stores, because the result is written, and drop the loaders of unlabelled images."""
        for store in self._stores:
            store.remove()
        self._stores.clear()
        self._unlabelled.clear()


def _join(value: Any) -> np.ndarray:
    parts = value if isinstance(value, list) else [value]
    arrays = [part.detach().cpu().numpy() if isinstance(part, torch.Tensor) else np.asarray(part) for part in parts]
    return np.concatenate(arrays) if arrays else np.empty(0)
