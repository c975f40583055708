"""One command for everything: `python -m alignmix_lab COMMAND ...`, or `alignmix COMMAND ...` once installed.

Multi-GPU runs go through Accelerate: `accelerate launch -m alignmix_lab train ...`.
"""
import importlib
import sys

# Command: (module with its main(), line of help). A module is imported only when its command is called.
COMMANDS = {
    'train': ('alignmix_lab.commands.train', 'train a timm model with a mixing method'),
    'evaluate': ('alignmix_lab.commands.evaluate', 'evaluate trained models by a protocol of the papers'),
    'ablate': ('alignmix_lab.evaluation.ablation', 'train over a grid of options, or the studies of the papers'),
    'report': ('alignmix_lab.evaluation.report', 'one HTML page from the results of several commands'),
    'convert': ('alignmix_lab.commands.convert', 'convert images to the .beton files that FFCV loads'),
    'cub': ('alignmix_lab.commands.cub', 'add the folders that training reads to CUB-200-2011'),
    'verify': ('alignmix_lab.commands.verify', 'find damage in .beton files and exported weights'),
    'export': ('alignmix_lab.commands.export', "write a checkpoint as a folder for timm's 'local-dir:FOLDER'"),
    'weights': ('alignmix_lab.commands.weights', 'list, install or push exported weights'),
    'plot': ('alignmix_lab.commands.plot', 'draw the effect of a method on your own images and model'),
    'detect': ('alignmix_lab.commands.detect', 'train a detector, validate, predict, export (from a clone)'),
}


def usage() -> str:
    """List the commands."""
    lines = [f'  {name:<10}{help}' for name, (_, help) in COMMANDS.items()]
    return '\n'.join([
        'usage: alignmix COMMAND [options]   (also: python -m alignmix_lab COMMAND [options])', '',
        *lines, '', 'alignmix COMMAND --help explains the options of a command.'])


def main(argv: list[str] | None = None) -> None:
    """Run a command."""
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ('-h', '--help'):
        print(usage())
        sys.exit(0 if words else 2)
    name = words[0]
    if name not in COMMANDS:
        sys.exit(f'alignmix: error: no command {name!r}; there are {", ".join(COMMANDS)}')
    importlib.import_module(COMMANDS[name][0]).main(words[1:], prog=f'alignmix {name}')


if __name__ == '__main__':
    main()
