"""Training of a classifier: build, resume, train, evaluate, save, export."""
import logging
from pathlib import Path
from typing import Any

from timm.models import safe_model_name

from alignmix_lab.runs.checkpoint import CheckpointSaver
from alignmix_lab.runs.files import write_whole
from alignmix_lab.runs.fit import fit, open_run, wrap_run
from alignmix_lab.runs.run import Run
from alignmix_lab.runs.sharding import compile_blocks, is_sharded

from .build import build_run
from .config import TrainConfig
from .dry_run import dry_run
from .export_checkpoint import export_checkpoint
from .validate import validate

_logger = logging.getLogger(__name__)


def train(config: TrainConfig) -> dict[str, Any] | None:
    """Train as configured; returns the result of :func:`alignmix_lab.runs.fit.fit`.

    Raises:
        ValueError: An option, the data or the model does not fit; training has not started.
        RuntimeError: The training loss is not finite, or a checkpoint cannot be written.
        SystemExit: The run was stopped by SIGTERM or SIGUSR1; everything is saved.
    """
    if config.dry_run:
        return dry_run(config)
    return fit_and_export(*prepare(config))


def prepare(config: TrainConfig) -> tuple[Run, CheckpointSaver]:
    """Build and check a run, resume it if asked, and wrap it for its devices."""
    run = build_run(config)
    saver = open_run(run, f'{safe_model_name(config.model)}-{run.data_config["input_size"][-1]}-{config.mix_name}')
    if run.accelerator.is_main_process and run.loaders.val_listing is not None:
        _write_listing(saver.folder / 'val_split.txt', run.loaders.val_listing)
    if config.torchcompile and is_sharded(run.accelerator):
        compile_blocks(run.task, config.torchcompile)
    elif config.torchcompile:
        run.task.compile(backend=config.torchcompile)
        run.task.compile_ema(backend=config.torchcompile)
    wrap_run(run)
    return run, saver


def _write_listing(path: Path, listing: bytes) -> None:
    if path.exists() and path.read_bytes() != listing:
        _logger.warning(f'{path}: other validation images than before; the run may have been trained on some of them')
    write_whole(path, listing)


def fit_and_export(run: Run, saver: CheckpointSaver) -> dict[str, Any] | None:
    """Train a prepared classifier to its end, and export its last weights to a folder for timm.

    The run is complete and saved before the export, so a failing export is only logged.
    """
    result = fit(run, saver, validate)
    if result is None or run.config.export == 'none' or not run.accelerator.is_main_process:
        return result
    folder, checkpoint = saver.folder / 'export', saver.path('last')
    try:
        export_checkpoint(checkpoint, folder, {'auto': None, 'ema': True, 'raw': False}[run.config.export])
    except (ValueError, RuntimeError, OSError) as e:
        _logger.error(f'{checkpoint} was not exported: {e}')
    else:
        _logger.info(f"Exported: timm.create_model('local-dir:{folder}', pretrained=True)")
    return result
