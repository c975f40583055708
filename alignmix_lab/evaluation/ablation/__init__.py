"""Ablations: the trainings of a grid of options, through train_imagenet.py, and what comes out of them."""
from .cli import AblationOptions, main
from .grid import Cell, Study, load_studies, parse_grid
from .jobs import Job, run_jobs

__all__ = ['AblationOptions', 'Cell', 'Job', 'Study', 'load_studies', 'main', 'parse_grid', 'run_jobs']
