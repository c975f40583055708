"""Evaluations of trained models, one file a protocol; `base` says how to add one."""
from .base import (
    Column,
    NotApplicable,
    Protocol,
    Result,
    get_protocol,
    list_protocols,
    options_class,
    register_protocol,
)
from .config import EvalConfig
from .context import Evaluation
from .runner import evaluate, resolve

# Protocols register themselves, in the order in which `all` runs them.
from . import accuracy  # noqa: F401  # isort: skip
from . import robustness  # noqa: F401  # isort: skip
from . import calibration  # noqa: F401  # isort: skip
from . import ood  # noqa: F401  # isort: skip
from . import localization  # noqa: F401  # isort: skip
from . import embedding  # noqa: F401  # isort: skip
from . import intrusion  # noqa: F401  # isort: skip
from . import cost  # noqa: F401  # isort: skip

__all__ = [
    'Column',
    'EvalConfig',
    'Evaluation',
    'NotApplicable',
    'Protocol',
    'Result',
    'evaluate',
    'get_protocol',
    'list_protocols',
    'options_class',
    'register_protocol',
    'resolve',
]
