"""Evaluate a trained detector on validation images: VOC's and COCO's metrics, and pictures.

    python -m detection.validate --checkpoint output/detection/RUN/last.pth.tar --data-dir DIR

writes to --output classes.json (the metrics of every class), pictures/ and results.json, the detections in COCO's
format with the data's own image and category ids; of VOC data, image names and numbers of the classes from 1. Images
are shared by the processes of accelerate launch.
"""
import argparse
import json
import logging
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import broadcast_object_list, gather_object
from timm.utils import setup_default_logging
from torch import nn

from alignmix_lab.data.loaders import Loaders
from alignmix_lab.runs.accelerator import create_accelerator
from alignmix_lab.runs.files import write_whole
from alignmix_lab.runs.logs import progress_bar
from alignmix_lab.runs.options import exit_with_message, flag
from alignmix_lab.runs.run import Run

from .coco_eval import coco_metrics, coco_results
from .config import DetectConfig
from .data import DetectionDataset, DetectionLoader, read_image, read_validation
from .export_checkpoint import load_detector
from .pictures import draw_detections
from .task import DetectionTask, DetectionTotals
from .voc_eval import voc_metrics

_logger = logging.getLogger(__name__)


def validate(run: Run, model: nn.Module, name: str, folder: Path) -> dict[str, float]:
    """Evaluate a detector on the whole validation set, using every image once.

    Processes may have different numbers of batches, so they only synchronise after the last one. Writes
    classes-NAME.json, the metrics of every class, and pictures-NAME/ to the folder.

    Returns:
        Metrics in per cent, on every process; see `voc_metrics` and `coco_metrics`.
    """
    return measure(run, model, name, folder, '-' + name.lower().replace(' ', '-').replace('(', '').replace(')', ''))[0]


def measure(
        run: Run,
        model: nn.Module,
        name: str,
        folder: Path,
        suffix: str = '',
) -> tuple[dict[str, float], list[dict[str, np.ndarray]]]:
    """Do the work of :func:`validate`, with a suffix to the names of its files; returns the detections too."""
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
        write_whole(folder / f'classes{suffix}.json', json.dumps(per_class, indent=4))
        save_pictures(run, detections, folder / f'pictures{suffix}')
    return broadcast_object_list(shared)[0], detections


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


def evaluate(checkpoint: str, output: str, ema: bool | None = None, **options: Any) -> dict[str, float]:
    """Evaluate a detector on a validation split and write the results to a folder.

    Args:
        checkpoint: Training checkpoint or exported folder.
        output: Folder of the results.
        ema: Which weights of a checkpoint, as for `load_detector`.
        **options: Options of DetectConfig for data, loader and pictures.

    Returns:
        The metrics, as :func:`validate` does.

    Raises:
        ValueError: The detector or the data is missing or damaged, or they do not fit.
    """
    config = DetectConfig(**options)
    model, class_names = load_detector(checkpoint, ema)
    data = read_validation(config.dataset, config.data_dir, config.val_split, class_names)
    accelerator = create_accelerator(config.device)
    loader = DetectionLoader(
        DetectionDataset(data.records), config.batch_size, False, config.workers, accelerator.device,
        rank=accelerator.process_index, world_size=accelerator.num_processes)
    loaders = Loaders(None, loader, len(class_names), class_names, config.dataset, data.describe())
    task = DetectionTask(model.to(accelerator.device), {}, accelerator.device, accelerator.is_main_process)
    run = Run(config, accelerator, loaders, task, {}, DetectionTotals)
    _logger.info(f'Data: {loaders.description}')
    metrics, detections = measure(run, model, 'Validation', Path(output))
    if accelerator.is_main_process:
        ids = data.category_ids or {name: label for label, name in enumerate(class_names, 1)}
        known = {label: ids[name] for label, name in enumerate(class_names, 1) if name in ids}
        results = coco_results(detections, [record.image_id for record in data.records], known)
        write_whole(Path(output) / 'results.json', json.dumps(results))
    return metrics


def main(argv: list[str] | None = None, prog: str = 'python -m detection.validate') -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(
        prog=prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS)
    parser.add_argument('--checkpoint', required=True, help='last.pth.tar of detection.train, or an exported folder')
    parser.add_argument('--output', default='output/validation', help='folder to write (default: %(default)s)')
    parser.add_argument('--ema', action=argparse.BooleanOptionalAction,
                        help='evaluate the moving average; default: if there is one')
    for name in (
            'data_dir', 'dataset', 'val_split', 'batch_size', 'workers', 'pictures', 'picture_threshold', 'device'):
        meta = DetectConfig.__dataclass_fields__[name].metadata
        parser.add_argument(flag(name), type=meta['type'], choices=meta['choices'], help=meta['help'])
    setup_default_logging()
    with exit_with_message(prog):
        evaluate(**vars(parser.parse_args(argv)))


if __name__ == '__main__':
    main()
