"""One HTML page from the outputs of several evaluations, trainings and ablations."""
from .cli import main
from .compare import Comparison, compare_result, compare_runs
from .page import render
from .sources import Sources, find_sources

__all__ = ['Comparison', 'Sources', 'compare_result', 'compare_runs', 'find_sources', 'main', 'render']
