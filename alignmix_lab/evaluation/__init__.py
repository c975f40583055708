"""Evaluation protocols for trained models, one file each; `base` explains how to add one."""
from . import protocols
from .base import NotApplicable, Protocol, get_protocol, list_protocols, options_class, register_protocol
from .config import EvalConfig
from .context import Evaluation
from .result import Column, Result
from .runner import evaluate, resolve

__all__ = [
    'Column', 'EvalConfig', 'Evaluation', 'NotApplicable', 'Protocol', 'Result', 'evaluate', 'get_protocol',
    'list_protocols', 'options_class', 'protocols', 'register_protocol', 'resolve']
