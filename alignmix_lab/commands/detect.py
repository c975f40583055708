"""`alignmix detect train|validate|predict|export`: the programs of detection/, which runs from a clone."""
import importlib
import sys

MODULES = {
    'train': 'detection.train',
    'validate': 'detection.validate',
    'predict': 'detection.predict',
    'export': 'detection.export_checkpoint',
}


def main(argv: list[str] | None = None, prog: str = 'alignmix detect') -> None:
    """Run one of the programs."""
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] not in MODULES:
        print(f'usage: {prog} {{{",".join(MODULES)}}} [options]')
        sys.exit(0 if words and words[0] in ('-h', '--help') else 2)
    try:
        module = importlib.import_module(MODULES[words[0]])
    except ModuleNotFoundError as e:
        if e.name != 'detection':
            raise
        sys.exit(f'{prog}: error: detection/ is not part of the installed package; run this from a clone of the '
                 'repository, or with the clone on PYTHONPATH')
    module.main(words[1:], prog=f'{prog} {words[0]}')
