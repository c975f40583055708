"""Evaluate trained models by a protocol of the papers.

One model:       python evaluate.py accuracy --model resnet50.a1_in1k --data-dir /data/imagenet
Side by side:    python evaluate.py calibration --model runs/none runs/alignmix/last.pth.tar local-dir:exported ...
Everything:      python evaluate.py all --model ... --data-dir ... --output results
Eight GPUs:      accelerate launch --multi_gpu --num_processes 8 evaluate.py robustness ...

Writes PROTOCOL.json, .csv, .md and .png to --output. An interrupted evaluation continues where it stopped.
`alignmix evaluate` is the same program.
"""
import logging
import sys

from timm.utils import setup_default_logging

from alignmix_lab import evaluation
from alignmix_lab.runs.options import create_parser, exit_with_message, parse_flags


def usage() -> str:
    """List the protocols and explain how to see their options."""
    lines = [f'  {name:<14}{evaluation.get_protocol(name).help}' for name in evaluation.list_protocols()]
    lines.append(f'  {"all":<14}All protocols that fit the data.')
    return '\n'.join([(__doc__ or '').strip(), '', 'Protocols (options: evaluate.py PROTOCOL --help):', '', *lines])


def main(argv: list[str] | None = None, prog: str = 'evaluate.py') -> None:
    """Run a protocol, or all of them."""
    setup_default_logging()
    logging.getLogger('timm').setLevel(logging.WARNING)  # it logs three lines per model about its weights
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0].startswith('-'):
        print(usage())
        sys.exit(0 if words and words[0] in ('-h', '--help') else 2)
    name = words[0]
    with exit_with_message(prog):
        config_class = evaluation.options_class(name)
    help = evaluation.get_protocol(name).help if name != 'all' else 'All protocols that fit the data.'
    parser = create_parser(
        config_class, f'%(prog)s {name} --model NAME ... [--data-dir DIR] [options]', help, prog)
    config = parse_flags(
        parser, config_class, lambda flags, file: evaluation.resolve(name, flags, file), words[1:])
    with exit_with_message(prog):
        evaluation.evaluate(name, config)
