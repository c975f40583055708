"""From a study and a recipe to the trainings that it needs."""
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from timm.scheduler import create_scheduler_v2, scheduler_kwargs

import timm_alignmix
from alignmix_lab.classification.config import TrainConfig, resolve_config
from alignmix_lab.runs.options import changed_options, near_names, option_words

from .grid import Cell, Study, short
from .jobs import Job

ROOT = Path(timm_alignmix.__file__).resolve().parent.parent


@dataclass(frozen=True)
class Plan:
    """What every training of an ablation shares.

    Attributes:
        recipe: YAML file, or None for the options of train_imagenet.py, which without data are those of the sample.
        settings: Options of every training, over the recipe.
        seeds: Seeds of every case.
        runs: Folder of the trainings' folders.
        launch: Words that start a script: 'python', or a launcher with its arguments.
    """
    recipe: str | None
    settings: dict[str, Any]
    seeds: list[int]
    runs: Path
    launch: str = 'python'

    def flags(self, cell: Cell, seed: int) -> dict[str, Any]:
        """Options of a training over the recipe."""
        settings = {**self.settings, **cell.settings, 'seed': seed}
        known = [option.name for option in fields(TrainConfig)]
        unknown = [key for key in settings if key.partition('.')[0] not in known]
        if unknown:
            raise ValueError('train_imagenet.py has no option ' + ', '.join(
                f'{key}{near_names(key, known)}' for key in unknown) + ' (those of a mix are mix_kwargs.NAME)')
        flags = {key: value for key, value in settings.items() if '.' not in key}
        base = resolve_config(flags, self.recipe)
        own_mix = resolve_config({key: v for key, v in flags.items() if key != 'mix'}, self.recipe).mix == base.mix
        if not own_mix and 'mix_kwargs' not in flags:
            flags['mix_kwargs'] = {}  # the recipe's belong to its own method
        for key, value in settings.items():
            name, dot, option = key.partition('.')
            if dot:
                flags[name] = {**flags.get(name, getattr(base, name, {})), option: value}
        return flags

    def config(self, cell: Cell, seed: int) -> TrainConfig:
        """The options of a training, proved to be options.

        Raises:
            ValueError: An option, or one of the method, that does not exist or does not take its value.
        """
        config = resolve_config(self.flags(cell, seed), self.recipe)
        timm_alignmix.create_mix(config.mix, **config.mix_kwargs)
        return config

    def job(self, cell: Cell, seed: int) -> Job:
        """The training of a case with a seed.

        Raises:
            ValueError: A wrong option, or a folder with a training of other options.
        """
        config, folder = self.config(cell, seed), self.runs / run_name(cell, seed)
        _check_same(folder, config)
        flags = self.flags(cell, seed)
        flags.setdefault('checkpoint_hist', 1)
        command = [
            *shlex.split(self.launch), 'train_imagenet.py' if (Path.cwd() / 'train_imagenet.py').is_file()
            else str(ROOT / 'train_imagenet.py'), *(['-c', self.recipe] if self.recipe else []),
            *(word for key, value in flags.items() for word in option_words(key, value)),
            '--output', str(self.runs), '--experiment', folder.name, '--resume', 'auto']
        return Job(tuple(command), folder, total_epochs(config))

    def jobs(self, studies: Sequence[Study]) -> dict[str, Job]:
        """All trainings by name, seed by seed, so that what is unfinished still compares; what studies share, once.

        Raises:
            ValueError: A wrong option, or a folder with a training of other options.
        """
        if not (ROOT / 'train_imagenet.py').is_file():
            raise ValueError(f'{ROOT} has no train_imagenet.py: ablations run from a checkout of the repository')
        jobs: dict[str, Job] = {}
        for seed in self.seeds:
            for study in studies:
                names = [run_name(cell, seed) for cell in study.cells]
                if len(set(names)) < len(names):
                    raise ValueError(f'study {study.name}: two of its cases have the same name in files')
                for cell, name in zip(study.cells, names, strict=True):
                    if name not in jobs:
                        try:
                            jobs[name] = self.job(cell, seed)
                        except ValueError as e:
                            raise ValueError(f'study {study.name}, {cell.name}: {e}') from e
        return jobs


def run_name(cell: Cell, seed: int) -> str:
    """Name of a training's folder; the same in every study that has the same case."""
    words = [str(cell.settings['mix'])] if 'mix' in cell.settings else []
    words += [
        f'{short(key)}{_slug(value)}' for key, value in sorted(cell.settings.items()) if key != 'mix']
    return '-'.join([*words, f'seed{seed}'])


def _slug(value: Any) -> str:
    """A value in the name of a folder."""
    if isinstance(value, (list, tuple)):
        return '_'.join(map(_slug, value))
    if isinstance(value, bool):
        return 'on' if value else 'off'
    return 'all' if value is None else re.sub(r'[^A-Za-z0-9.]+', '_', str(value))


def total_epochs(config: TrainConfig) -> int:
    """Epochs that a training does in all, as its schedule counts them."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=0.1)
    _, epochs = create_scheduler_v2(optimizer, **scheduler_kwargs(config), updates_per_epoch=1)
    return min(epochs, config.stop_epoch or epochs)


def _check_same(folder: Path, config: TrainConfig) -> None:
    """Refuse to count a run that was trained with other options, or to go on with it."""
    file = folder / 'args.yaml'
    if not file.is_file():
        return
    changed = changed_options(config, yaml.safe_load(file.read_text(encoding='utf-8')))
    if changed:
        raise ValueError(
            f'{folder} holds a training with other options ({", ".join(changed)}); name another --output or remove it')
