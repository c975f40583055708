"""Evaluation of a detector on the validation images: VOC's and COCO's metrics, and pictures."""
import json
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import nn

from alignmix_lab.runs.logs import progress_bar
from alignmix_lab.runs.run import Run

from .coco_eval import coco_metrics
from .data import read_image
from .pictures import draw_detections
from .voc_eval import voc_metrics

_logger = logging.getLogger(__name__)


def validate(run: Run, model: nn.Module, name: str, folder: Path) -> dict[str, float]:
    """Evaluate a detector on the whole validation set, using every image once.

    Processes may have different numbers of batches, so they only synchronise after the last one. Writes
    classes-NAME.json, the metrics of every class, and pictures-NAME/ to the folder.

    Returns:
        Metrics in per cent, on every process; see `voc_metrics` and `coco_metrics`.
    """
    records, class_names = run.loaders.val.dataset.records, run.loaders.class_names
    own, seconds = detect(run, model, name)
    detections = collect(own, len(records))
    shared: list[Any] = [None]
    if run.accelerator.is_main_process:
        voc, voc_classes = voc_metrics(records, detections, class_names)
        coco, coco_classes = coco_metrics(records, detections, class_names)
        shared[0] = {**voc, **coco}
        per_class = {name: {**values, **coco_classes.get(name, {})} for name, values in voc_classes.items()}
        _log(name, shared[0], per_class, len(own) / seconds)
        suffix = name.lower().replace(' ', '-').replace('(', '').replace(')', '')
        (folder / f'classes-{suffix}.json').write_text(json.dumps(per_class, indent=4), encoding='utf-8')
        save_pictures(run, detections, folder / f'pictures-{suffix}')
    return broadcast_object_list(shared)[0]


# Not inference_mode: its tensors cannot be used in training, and the detectors cache their anchors between calls.
@torch.no_grad()
def detect(run: Run, model: nn.Module, name: str) -> tuple[dict[int, dict[str, np.ndarray]], float]:
    """Return the detections of this process by index in the data set, and the seconds spent in the detector."""
    loader, interval, seconds, found = run.loaders.val, run.config.log_interval, 0.0, {}
    model.eval()
    with progress_bar(run, name, len(loader)) as bar:
        for index, (images, targets) in enumerate(loader):
            start = time.perf_counter()
            with run.accelerator.autocast():
                outputs = model(images)
            outputs = [{key: value.float().cpu().numpy() for key, value in output.items()} for output in outputs]
            seconds += time.perf_counter() - start
            for target, output in zip(targets, outputs, strict=True):
                found[target['index']] = {**output, 'labels': output['labels'].astype(np.int64)}
            bar.update()
            if index % interval == 0 and index + 1 < len(loader):
                _logger.info(f'{name}: [{index:>4d}/{len(loader) - 1}]  {len(found) / seconds:.1f} images/s')
    return found, seconds


def collect(own: dict[int, dict[str, np.ndarray]], num_images: int) -> list[dict[str, np.ndarray]]:
    """Gather the detections of all processes in the order of the data set.

    Raises:
        RuntimeError: Images are missing, so that metrics would be misleading.
    """
    merged = dict(gather_object(list(own.items())))
    missing = [index for index in range(num_images) if index not in merged]
    if missing:
        raise RuntimeError(f'{len(missing)} of {num_images} validation images were not evaluated')
    return [merged[index] for index in range(num_images)]


def _log(name: str, metrics: dict[str, float], per_class: dict[str, dict[str, float]], rate: float) -> None:
    values = '  '.join(f'{key}: {value:.2f}' for key, value in metrics.items() if value >= 0)
    _logger.info(f'{name}: {values}  ({rate:.1f} images/s per process)')
    width = max(map(len, per_class))
    for class_name, figures in per_class.items():
        _logger.info(f'  {class_name:<{width}}  ' + '  '.join(f'{key} {value:6.2f}' for key, value in figures.items()))


def save_pictures(run: Run, detections: list[dict[str, np.ndarray]], folder: Path) -> None:
    """Draw the detections and, thinner, the true boxes on images spread evenly over the data set."""
    records, count = run.loaders.val.dataset.records, run.config.pictures
    if not count:
        return
    folder.mkdir(parents=True, exist_ok=True)
    places = np.linspace(0, len(records) - 1, min(count, len(records))).round().astype(int)
    for index in dict.fromkeys(places.tolist()):
        record = records[index]
        picture = draw_detections(
            read_image(record), detections[index], run.loaders.class_names, run.config.picture_threshold, record.boxes)
        picture.save(folder / f'{record.path.stem}.png')
