"""Train a detector on a timm backbone: SSD or Faster R-CNN, on VOC, COCO or any folder of either format.

VOC07+12, one GPU:  accelerate launch -m detection.train -c recipes/detection/ssd300_voc0712.yaml --data-dir VOCdevkit
                    --weights DIR_OR_TAG
COCO, eight GPUs:   accelerate launch --multi_gpu --num_processes 8 -m detection.train --detector fasterrcnn
                    --dataset coco --data-dir /data/coco --backbone resnet50 --weights DIR_OR_TAG --batch-size 2
Your own photos:    python -m detection.train --dataset voc --data-dir FOLDER --backbone resnet18 --epochs 20
Continue a run:     ... --experiment NAME --resume auto

--weights takes a folder exported by train_imagenet.py, a tag such as resnet50.densemultimix_in1k, or a last.pth.tar;
every key of the backbone must be in it. The run's folder holds summary.csv (one line per epoch: VOC's 11-point AP and
area AP, COCO's mAP), classes-test.json (the same per class), pictures-test/ and checkpoints.
"""
import sys
from functools import partial
from typing import Any

from timm.models import safe_model_name
from timm.utils import setup_default_logging

from alignmix_lab.data.images.decode import UnusableData
from alignmix_lab.runs.checkpoint import CheckpointSaver
from alignmix_lab.runs.fit import fit, open_run, wrap_run
from alignmix_lab.runs.options import create_parser, exit_with_message, parse_flags
from alignmix_lab.runs.run import Run

from .build import build_run
from .config import DetectConfig, resolve_config
from .validate import validate


def train(config: DetectConfig) -> dict[str, Any] | None:
    """Train as configured; see :func:`alignmix_lab.runs.fit.fit`."""
    return _fit(*prepare(config))


def prepare(config: DetectConfig) -> tuple[Run, CheckpointSaver]:
    """Build and check a run, resume it if asked, and wrap it for its devices.

    Raises:
        ValueError: An option, the data or the model does not fit; the message suggests a remedy.
    """
    run = build_run(config)
    backbone = safe_model_name(config.backbone.rstrip('/').rpartition('/')[2])
    saver = open_run(run, f'{config.detector}-{backbone}-{config.img_size}')
    if not config.dry_run:
        wrap_run(run)
    return run, saver


def _fit(run: Run, saver: CheckpointSaver) -> dict[str, Any] | None:
    return fit(run, saver, partial(validate, folder=saver.folder))


def parse_config(argv: list[str] | None = None, prog: str | None = None) -> DetectConfig:
    """Read options from the command line; exits with a message if they are invalid."""
    parser = create_parser(
        DetectConfig, 'accelerate launch -m detection.train --data-dir DIR [-c RECIPE] [options]', __doc__, prog)
    return parse_flags(parser, DetectConfig, resolve_config, argv)


def main(argv: list[str] | None = None, prog: str = 'detection.train') -> None:
    """Train, or describe the run with --dry-run."""
    setup_default_logging()
    config = parse_config(argv, prog)
    with exit_with_message(prog):
        run, saver = prepare(config)
    try:
        _fit(run, saver)
    except UnusableData as e:
        sys.exit(f'{prog}: error: {e}')
    run.accelerator.state.destroy_process_group()


if __name__ == '__main__':
    main()
