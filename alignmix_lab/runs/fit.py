"""The course of a run: open its folder, resume, train, evaluate, save."""
import itertools
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import datetime
from pathlib import Path
from typing import IO, Any

import torch
import yaml
from timm.utils import distribute_bn, trim_summary
from torch import nn
from torch.distributed import DistError

from .agreement import EXIT_REQUEUE, StopRequested
from .checkpoint import CheckpointSaver, find_checkpoint, has_checkpoints, read_checkpoint
from .config import RunConfig
from .engine import train_one_epoch
from .files import lock_file, write_whole
from .logs import append_summary, mean_lr
from .models import trained_norms
from .options import changed_options
from .run import Run, average_arguments
from .run_report import draw_curves, write_report
from .sharding import is_sharded, write_shards
from .totals import LossTotals
from .trackers import start_trackers, track_epoch

_logger = logging.getLogger(__name__)


def open_run(run: Run, name: str) -> CheckpointSaver:
    """Describe a run, create its folder and resume it if asked; a dry run stops after the description.

    The run is complete but not wrapped for its devices. Without --experiment the folder is named by time and `name`.
    """
    config = run.config
    name = config.experiment or f'{datetime.now().strftime("%Y%m%d-%H%M%S")}-{name}'
    saver = CheckpointSaver(Path(config.output) / name, config.eval_metric, config.checkpoint_hist)
    if run.accelerator.is_main_process:
        _logger.info(run.describe())
        if missed := run.missed_decays():
            option = '--decay-milestones' if config.sched == 'multistep' else '--decay-epochs'
            _logger.warning(
                f'The learning rate will not decay at {option} {" ".join(map(str, missed))}: the run has '
                f'{run.num_epochs} epochs; pass {option} that fit --epochs {config.epochs}')
    if config.dry_run:
        return saver

    resumed = _find_resume(config, saver.folder)
    if config.model_ema and not run.task.has_ema():  # a sharded model came with it
        run.task.setup_ema(**average_arguments(config))
    if resumed is not None:
        run.load_state_dict(resumed[1], resumed[0])
    if config.start_epoch is not None:
        run.start_epoch, run.start_update = config.start_epoch, 0
    _check_same_start(run)
    if run.accelerator.is_main_process:
        run.lock = _open_folder(saver, config, resumed is not None)
        if resumed is not None:
            saver.restore(resumed[1], resumed[0])
        saver.forget_after((run.start_epoch, run.start_update))
        trim_summary(saver.folder / 'summary.csv', run.start_epoch)
    start_trackers(run, saver.folder)
    return saver


def _check_same_start(run: Run) -> None:
    """Refuse to continue from different checkpoints, after which the processes would wait for each other forever."""
    own = torch.tensor([[run.start_epoch, run.start_update]], device=run.accelerator.device)
    places = run.accelerator.gather(own).tolist()
    if any(place != places[0] for place in places):
        raise ValueError(
            'the processes found different checkpoints: ' + ', '.join(
                f'process {rank} would begin at epoch {epoch}, update {update}'
                for rank, (epoch, update) in enumerate(places)) +
            '; all machines must share the same --output folder')


def _find_resume(config: RunConfig, folder: Path) -> tuple[Path, dict[str, Any]] | None:
    if config.resume != 'auto':
        return (Path(config.resume), read_checkpoint(config.resume)) if config.resume else None
    found = find_checkpoint(folder)
    if found is None:
        _logger.info(f'--resume auto: no checkpoint in {folder}, starting from scratch')
    return found


def _open_folder(saver: CheckpointSaver, config: RunConfig, resumed: bool) -> IO:
    """Create and lock the run's folder and write its arguments; refuses to overwrite another run.

    Without --experiment, a run that finds its name taken by one of the same second gets a number.
    """
    first = saver.folder
    for number in itertools.count(2):
        try:
            saver.folder.mkdir(parents=True, exist_ok=bool(config.experiment))
            break
        except FileExistsError:
            if config.experiment:  # it is a file
                raise
            saver.folder = first.with_name(f'{first.name}-{number}')
    folder = saver.folder
    lock = (folder / '.lock').open('a')
    os.register_at_fork(after_in_child=lock.close)  # loader processes may outlive a killed run
    if not lock_file(lock):
        lock.close()
        raise ValueError(f'another process is training in {folder}; wait for it, or pass another --experiment')
    args_file = folder / 'args.yaml'
    old = yaml.safe_load(args_file.read_text(encoding='utf-8')) if args_file.exists() else {}
    changed = changed_options(config, old)
    if has_checkpoints(folder) and not resumed:
        lock.close()
        what = f'other arguments ({", ".join(changed)})' if changed else 'the same arguments'
        raise ValueError(
            f'{folder} holds a run with {what}; pass --resume auto to continue it or another --experiment')
    if changed and resumed:
        _logger.warning(f'Resuming with changed arguments: {", ".join(changed)}')
    write_whole(args_file, yaml.safe_dump(config.to_dict(), default_flow_style=False))
    return lock


def wrap_run(run: Run) -> None:
    """Wrap a run's model and optimizer for its devices, and set the schedule to where the run starts."""
    task, accelerator = run.task, run.accelerator
    module = task.get_trainable_module()
    if is_sharded(accelerator):  # sharded when it was built; what is left is mixed precision
        accelerator.prepare_model(module, device_placement=False, evaluation_mode=True)
        run.optimizer = accelerator.prepare_optimizer(run.optimizer)
    else:
        task.trainable_module, run.optimizer = accelerator.prepare(module, run.optimizer)
    if run.scheduler is None:
        return
    if run.start_epoch > 0:
        run.scheduler.step(run.start_epoch)
    if run.start_epoch + run.start_update > 0:
        run.scheduler.step_update(run.start_epoch * run.updates_per_epoch + run.start_update)


def fit(
        run: Run, saver: CheckpointSaver,
        evaluate: Callable[[Run, nn.Module, str], dict[str, float]]) -> dict[str, Any] | None:
    """Train a prepared run to its end.

    `evaluate` is called with the run, a model and the start of the log lines, and returns the metrics.

    Returns:
        `folder` of the run, `last` and `best` epoch (`epoch` and the metrics; `best` on the main process) and
        `history`, one entry per epoch; None for a dry run.
    """
    config = run.config
    if config.dry_run:
        if run.accelerator.is_main_process:
            print(yaml.safe_dump(config.to_dict(), default_flow_style=False))
        return None
    stop = min(run.num_epochs, config.stop_epoch or run.num_epochs)
    history = []
    with run.lock or nullcontext():
        if run.start_epoch >= stop:
            raise ValueError(f'nothing to train: epoch {run.start_epoch} of {stop} is already reached; raise --epochs')
        with run.stop.listening(), _explained_ends(run, saver):
            for epoch in range(run.start_epoch, stop):
                history.append(_run_epoch(run, saver, evaluate, epoch, epoch + 1 == stop))
                if epoch + 1 < stop and _asked_to_stop(run):
                    raise StopRequested
        result = _report(run, saver, history)
        _finish_trackers(run)
    return result


@contextmanager
def _explained_ends(run: Run, saver: CheckpointSaver) -> Iterator[None]:
    """Explain why a run ends early and how to continue it."""
    go_on = f'--resume auto --experiment {saver.folder.name}'
    try:
        yield
    except StopRequested:
        # A launcher ends all processes when the first one exits, so wait until the checkpoint is written.
        run.accelerator.wait_for_everyone()
        _finish_trackers(run)
        if run.accelerator.is_main_process:
            name = run.stop.received.name if run.stop.received else 'a signal to another process'
            _logger.warning(
                f'*** Stopped by {name}; everything is saved in {saver.folder}. Continue with {go_on}. '
                f'Exit code {EXIT_REQUEUE}')
        raise SystemExit(EXIT_REQUEUE) from None
    except RuntimeError as e:
        # gloo's errors have no type of their own; NCCL's watchdog may end the process first.
        is_lost = isinstance(e, DistError) or any(words in str(e) for words in ('gloo', 'pair closure', 'Connection '))
        if run.accelerator.num_processes == 1 or not is_lost:
            raise
        raise RuntimeError(
            f'process {run.accelerator.process_index} lost contact with the others: one died or did not answer '
            f'for --dist-timeout {run.config.dist_timeout} seconds. Restart all of them with {go_on}') from e


def _asked_to_stop(run: Run) -> bool:
    """Return whether any process was asked to stop after the last update of an epoch."""
    asked = torch.tensor(float(run.stop.received is not None), device=run.accelerator.device)
    return run.accelerator.reduce(asked, 'sum').item() > 0


def _finish_trackers(run: Run) -> None:
    """Close the trackers but not the process group, which the caller may still need."""
    for tracker in run.accelerator.trackers:
        tracker.finish()


def _run_epoch(run: Run, saver: CheckpointSaver, evaluate: Callable, epoch: int, is_last: bool) -> dict[str, Any]:
    config, accelerator = run.config, run.accelerator

    def save_within(updates: int, totals: LossTotals) -> None:
        state = write_shards(accelerator, run.state_dict(epoch, updates, totals), saver.folder, epoch, updates)
        if accelerator.is_main_process:
            saver.save_recovery(state, epoch, updates)

    entry = {'epoch': epoch, 'train': train_one_epoch(run, epoch, save_within), 'lr': mean_lr(run)}
    if is_last or (epoch + 1) % config.val_interval == 0:
        entry['validation'] = _evaluate(run, evaluate)
    metrics = entry.get('validation')
    if run.scheduler is not None:
        run.scheduler.step(epoch + 1, metrics and metrics[config.eval_metric])
    state = write_shards(accelerator, run.state_dict(epoch + 1), saver.folder, epoch + 1)
    if accelerator.is_main_process:
        summary = saver.folder / 'summary.csv'
        with saver.explained(summary.name):
            append_summary(summary, epoch, entry['train'], metrics, entry['lr'], config.metrics)
            if config.curves:
                draw_curves(summary, saver.folder / 'curves.png')
        saver.save(state, epoch, metrics)
    track_epoch(run, entry)
    return entry


def _evaluate(run: Run, evaluate: Callable) -> dict[str, float]:
    """Evaluate the model and its moving average on the device, if any; returns the metrics of the last one."""
    config, task, processes = run.config, run.task, run.accelerator.num_processes
    models = {'Test': task.get_eval_model()}
    if task.has_ema() and not config.model_ema_force_cpu:
        models['Test (EMA)'] = task.get_eval_model(ema=True)
    for name, model in models.items():
        if config.dist_bn and processes > 1:
            for norm in trained_norms(model):
                distribute_bn(norm, processes, config.dist_bn == 'reduce')
        metrics = evaluate(run, model, name)
    return metrics


def _report(run: Run, saver: CheckpointSaver, history: list[dict[str, Any]]) -> dict[str, Any]:
    """Log, write and return the outcome of the run: its last and its best epoch."""
    metric, best = run.config.eval_metric, saver.best
    last = {'epoch': history[-1]['epoch'], **history[-1]['validation']}
    if run.accelerator.is_main_process:
        _logger.info(f'*** Best metric: {best[metric]} (epoch {best["epoch"]})')
        for which, entry in (('last epoch', last), (f'best epoch by {metric}', best)):
            values = ', '.join(f'{key} {entry[key]:.4g}' for key in run.config.metrics)
            _logger.info(f'*** {which.capitalize()} ({entry["epoch"]}): {values}')
        write_report(run, saver.folder, last, best, history[-1]['train'])
        evaluated = [entry for entry in history if 'validation' in entry]
        evaluated.sort(key=lambda entry: entry['validation'][metric], reverse=metric == 'loss')
        print('--result\n' + json.dumps(evaluated[-10:], indent=4), flush=True)  # as timm ends, the best epoch last
    return {'folder': saver.folder, 'last': last, 'best': best, 'history': history}
