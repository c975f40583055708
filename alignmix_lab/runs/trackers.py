"""TensorBoard and Weights & Biases, through Accelerate."""
import hashlib
import os
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from accelerate.tracking import filter_trackers

from .run import Run


def check_trackers(names: list[str]) -> None:
    """Raise a ValueError for trackers whose packages are missing, which Accelerate would silently ignore."""
    for name in names:
        if find_spec(name) is None and not (name == 'tensorboard' and find_spec('tensorboardX')):
            raise ValueError(f'--log-trackers {name}: the package is not installed; pip install {name}')


def start_trackers(run: Run, folder: Path) -> None:
    """Start the trackers of --log-trackers. TensorBoard writes to the folder; a resumed run continues its records."""
    config, names, accelerator = run.config, run.config.log_trackers, run.accelerator
    if not names:
        return
    first = run.start_epoch * run.updates_per_epoch + run.start_update
    settings = {
        'tensorboard': dict(purge_step=first),
        'wandb': dict(
            name=folder.name, id=hashlib.sha1(os.fsencode(folder.resolve())).hexdigest()[:16], resume='allow',
            dir=str(folder), entity=config.wandb_entity, group=config.wandb_group, tags=config.wandb_tags),
    }
    accelerator.project_configuration.set_directories(str(folder))
    accelerator.log_with = filter_trackers(names, str(folder))
    options = {
        key: value if isinstance(value, (int, float, str, bool)) else str(value)
        for key, value in config.to_dict().items()}
    accelerator.init_trackers(config.wandb_project, options, settings)


def track_epoch(run: Run, entry: dict[str, Any]) -> None:
    """Send the results of an epoch to the trackers."""
    if run.accelerator.trackers:
        values = {f'eval/{name}': value for name, value in entry.get('validation', {}).items()}
        train = {f'epoch/train_{key}': entry['train'][key] for key in ('loss', 'accuracy') if key in entry['train']}
        values.update({'epoch': entry['epoch'], **train})
        run.accelerator.log(values, step=(entry['epoch'] + 1) * run.updates_per_epoch)
