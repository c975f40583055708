#!/usr/bin/env python3
"""Test the oldest and the newest versions that setup.py allows, each in an environment of its own.

The floor has the lowest version of every requirement of setup.py on the oldest Python, so that a floor that does not
hold shows. Needs uv, which fetches the Pythons: `pip install uv`. An environment takes 6 GB, and stays for next time.

    python tools/versions.py                        # all of them, the tests of TESTS
    python tools/versions.py floor -- tests -k mixup  # one, with words for pytest
"""
import argparse
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# Name: Python, words for uv's resolver, versions that are held.
ENVIRONMENTS = {
    'floor': ('3.10', ('--resolution', 'lowest-direct'), ()),
    'torch-2.11': ('3.12', (), ('torch==2.11.*', 'triton==3.6.*')),  # what GPU machines have
    'newest': ('3.13', (), ()),
}
TESTS = [f'tests/{name}' for name in """
timm_alignmix/functional timm_alignmix/kernels/test_dispatch.py timm_alignmix/mixes/test_mixes.py timm_alignmix/models
timm_alignmix/test_attached.py timm_alignmix/test_mixup_fn.py timm_alignmix/test_task.py timm_alignmix/weights
alignmix_lab/classification/test_run.py alignmix_lab/data/test_timm_loader.py alignmix_lab/evaluation/test_robustness.py
alignmix_lab/runs/test_options.py alignmix_lab/runs/test_resume.py detection/test_models.py
""".split()]


def install(name: str, folder: Path) -> Path:
    """Make or update an environment; its Python."""
    version, resolution, held = ENVIRONMENTS[name]
    subprocess.run(['uv', 'venv', '--quiet', '--allow-existing', '--python', version, folder], check=True)
    python = folder / 'bin' / 'python'
    subprocess.run(
        ['uv', 'pip', 'install', '--quiet', '--upgrade', '--python', python, *resolution, '-r', 'setup.py',
         '--extra', 'train', '--extra', 'test', *held], cwd=ROOT, check=True)
    return python


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('names', nargs='*', default=list(ENVIRONMENTS), help='of ' + ', '.join(ENVIRONMENTS))
    parser.add_argument('--folder', type=Path, default=ROOT / 'build' / 'versions', help='where environments lie')
    cut = sys.argv.index('--') if '--' in sys.argv else len(sys.argv)
    args, words = parser.parse_args(sys.argv[1:cut]), sys.argv[cut + 1:]
    if unknown := set(args.names) - set(ENVIRONMENTS):
        parser.error(f'no environment {", ".join(unknown)}; there are {", ".join(ENVIRONMENTS)}')
    failed = []
    for name in args.names:
        python = install(name, args.folder / name)
        print(f'== {name}', flush=True)
        subprocess.run(['uv', 'pip', 'freeze', '--python', python], check=True)
        done = subprocess.run(
            [python, '-m', 'pytest', '-q', '-n', 'auto', '--dist', 'loadfile', *(words or TESTS)], cwd=ROOT,
            env={**os.environ, 'PYTHONPATH': str(ROOT)})
        failed += [name] if done.returncode else []
    sys.exit(f'failed: {", ".join(failed)}' if failed else 0)


if __name__ == '__main__':
    main()
