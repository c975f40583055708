"""Running of protocols and writing of their results."""
import hashlib
import json
import logging
import shlex
from dataclasses import fields
from pathlib import Path
from typing import Any

from alignmix_lab.runs.accelerator import create_accelerator
from alignmix_lab.runs.options import option_words, read_yaml, result_options
from alignmix_lab.runs.timing import hardware
from timm_alignmix.version import __version__

from .base import NotApplicable, Protocol, get_protocol, list_protocols, options_class
from .config import EvalConfig
from .context import Evaluation
from .result import Result, environment, plain, table, write_result

_logger = logging.getLogger(__name__)


def evaluate(name: str, config: EvalConfig) -> dict[str, Result]:
    """Run a protocol, or 'all' of them, on every process of the launcher; `config` is an `options_class(name)`.

    Results in the output folder for the same models, data and options are kept; the others are returned by protocol.

    Raises:
        ValueError: The models, the data or an option do not fit; the message states the remedy.
    """
    accelerator = create_accelerator(config.device, config.amp, config.amp_dtype)
    ev = Evaluation(config, accelerator)
    results = {}
    skipped = [get_protocol(skip).name for skip in getattr(config, 'skip', None) or ()]
    for protocol in map(get_protocol, list_protocols() if name == 'all' else [name]):
        if protocol.name in skipped:
            continue
        try:
            if config.multi_label and not protocol.multi_label:
                raise NotApplicable(f'{protocol.name} takes images with one label; leave --multi-label out')
            results[protocol.name] = run_protocol(ev, protocol)
        except NotApplicable as e:
            if name != 'all':
                raise
            _logger.warning(f'{protocol.name} is left out: {e}')
    return {name: result for name, result in results.items() if result is not None}


def run_protocol(ev: Evaluation, protocol: Protocol) -> Result | None:
    """Run one protocol and write its result; None if the output folder has it already."""
    key = result_key(ev, protocol)
    kept = find_result(ev.output, protocol.name, key)
    ev.accelerator.wait_for_everyone()  # nobody writes before all have looked
    if kept is not None and not ev.config.redo:
        _logger.info(f'{protocol.name}: {kept} has the result; --redo computes it again')
        return None
    ev.used.clear()
    result = protocol.run(ev)
    if ev.is_main:
        own = {option.name: getattr(ev.config, option.name) for option in fields(protocol.options)}
        facts = {
            'key': key,
            'command': command_line(protocol.name, ev.config),
            'environment': environment(ev.device, ev.accelerator.num_processes),
            'data': '; '.join(ev.used) or None,
            'options': plain(own),
            'models': [model.describe() for model in ev.models],
        }
        files = write_result(ev.output, protocol.name, protocol.help, result, facts)
        print(f'\n{protocol.name}\n\n{table(result)}\n', flush=True)
        _logger.info('Written: ' + ', '.join(map(str, files)))
    ev.accelerator.wait_for_everyone()
    ev.end_protocol()
    return result


def result_key(ev: Evaluation, protocol: Protocol) -> str:
    """Hash of all inputs of a result: weights, labels, options, version; also the machine if it is timed."""
    names = {*result_options(EvalConfig), *result_options(protocol.options)}
    facts: dict[str, Any] = {name: getattr(ev.config, name) for name in sorted(names)}
    if protocol.timed:
        facts['machine'] = [hardware(ev.device), ev.config.channels_last]
    facts['models'] = [(model.label, model.fingerprint) for model in ev.models]
    text = json.dumps([protocol.name, __version__, facts], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def command_line(name: str, config: EvalConfig) -> str:
    """Command that reproduces a result, with all options that differ from their defaults."""
    words = ['python', 'evaluate.py', name]
    default = type(config)()
    for option in (*fields(EvalConfig), *fields(get_protocol(name).options)):  # `all` has those of every protocol
        value = getattr(config, option.name)
        if value != getattr(default, option.name):
            words += option_words(option.name, value)
    return shlex.join(words)


def find_result(folder: Path, name: str, key: str) -> Path | None:
    """JSON file of a result, or None if there is none with this key."""
    path = folder / f'{name}.json'
    try:
        found = json.loads(path.read_text(encoding='utf-8'))
    except (OSError, ValueError):
        return None
    return path if isinstance(found, dict) and found.get('key') == key else None


def resolve(name: str, flags: dict[str, Any], config_file: str | None = None) -> EvalConfig:
    """Combine flags, which win, with a YAML file and the defaults.

    Raises:
        ValueError: A key is unknown, or an option does not accept its value.
    """
    config_class = options_class(name)
    return config_class(**{**(read_yaml(config_file, config_class) if config_file else {}), **flags})
