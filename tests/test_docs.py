"""The pages: links lead somewhere, code runs, and commands exist with the options that are shown."""
import ast
import importlib
import importlib.util
import io
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path

import pytest
import timm
import torch
import yaml

import timm_alignmix
from alignmix_lab.__main__ import COMMANDS, main
from alignmix_lab.classification import resolve_config
from alignmix_lab.commands import train
from alignmix_lab.evaluation import base as evaluation
from alignmix_lab.runs.options import find_recipe
from timm_alignmix.mixes import registry

ROOT = Path(__file__).resolve().parents[1]
PAGES = [*sorted(ROOT.glob('*.md')), *(
    page for folder in ('docs', 'benchmarks', 'examples', 'recipes') for page in sorted((ROOT / folder).rglob('*.md'))
    if page.parent.parent.name != 'weights')]  # cards that the export wrote
HAVE_COMMANDS = ('evaluate', 'weights', 'plot', 'detect')  # commands of their own
PROGRAMS = {  # what starts a program besides `alignmix`, and the command that is the same
    'alignmix_lab': [],
    'train_imagenet.py': ['train'],
    'recipes/slurm.sh': ['train'],
    'evaluate.py': ['evaluate'],
    'detection.train': ['detect', 'train'],
}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


@cache
def anchors(page: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r'^#+ (.+)$', page.read_text(encoding='utf-8'), re.MULTILINE)
    return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


def code_of(page: Path) -> Iterator[str]:
    """Lines of fenced and indented code, continued ones joined, and inline code."""
    text = page.read_text(encoding='utf-8')
    fences = r'^```.*?^```$'
    blocks = re.findall(fences, text, re.MULTILINE | re.DOTALL)
    text = re.sub(fences, '', text, flags=re.MULTILINE | re.DOTALL)
    blocks += [line for line in text.replace('\\\n', ' ').splitlines() if line.startswith('    ')]
    for block in blocks:
        yield from block.replace('\\\n', ' ').splitlines()
    text = '\n'.join(line for line in text.splitlines() if not line.startswith('    '))
    yield from (re.sub(r'\s+', ' ', code) for code in re.findall(r'`([^`]+)`', text))


def words_of(code: str) -> list[str]:
    try:
        return shlex.split(code, comments=True)
    except ValueError:  # no shell
        return []


def commands_in(code: str) -> Iterator[list[str]]:
    """Words of the commands of this project in a line, the command of `alignmix` first."""
    words = words_of(code)
    for index, word in enumerate(words):
        rest = words[index + 1:]
        rest = rest[:next((i for i, other in enumerate(rest) if other in ('&&', '|', '>', ';')), len(rest))]
        begins = index == 0 or words[index - 1] in ('&&', ';', 'do')
        if begins and Path(word).name == 'alignmix' and rest:
            yield rest
        elif word in PROGRAMS and (rest or PROGRAMS[word]):
            yield [*PROGRAMS[word], *rest]


def flags_in(words: list[str]) -> set[str]:
    return {word.partition('=')[0] for word in words if re.fullmatch(r'--?[a-zA-Z][\w-]*(=.*)?', word)}


@cache
def options_of(*command: str) -> set[str]:
    """Options that --help of a command names."""
    printed = io.StringIO()
    with redirect_stdout(printed), pytest.raises(SystemExit) as ended:
        main([*command, '--help'])
    assert ended.value.code in (0, None), f'alignmix {" ".join(command)}: {ended.value.code}'
    return set(re.findall(r'(?<![\w-])--?[a-zA-Z][\w-]*', printed.getvalue()))


@pytest.mark.parametrize('page', PAGES, ids=name_of)
def test_links_lead_somewhere(page):
    for target in re.findall(r'\]\(([^)\s]+)\)', page.read_text(encoding='utf-8')):
        path, _, anchor = target.partition('#')
        if '://' in path:
            continue
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        if anchor:
            assert anchor in anchors(file), target


@pytest.mark.parametrize('page', PAGES, ids=name_of)
def test_commands_and_their_options_exist(page):
    for code in code_of(page):
        for words in commands_in(code):
            if not words[0].islower():  # a placeholder
                continue
            assert words[0] in COMMANDS, code
            command = words[:2] if words[0] in HAVE_COMMANDS and words[1:] and words[1].islower() else words[:1]
            assert flags_in(words) <= options_of(*command), code
            for flag, value in zip(words, words[1:], strict=False):
                if flag in ('-c', '--config', '--recipe') and '/' in value:
                    find_recipe(value)


@pytest.mark.parametrize('page', PAGES, ids=name_of)
def test_training_commands_are_accepted(page):
    """By the program's own parser: values, recipes, options that exclude each other."""
    for code in code_of(page):
        for words in commands_in(code):
            if words[0] == 'train' and len(words) > 1 and not any(
                    word in ('...', 'MIX', 'NAME', 'mine.yaml', 'args.yaml') or '$' in word for word in words):
                train.parse_config(words[1:])


@pytest.mark.parametrize('page', PAGES, ids=name_of)
def test_files_in_commands_exist(page):
    for code in code_of(page):
        for word in words_of(code):
            if re.fullmatch(r'[a-z_]+(/[a-z\d_.]+)+\.(py|sh|yaml)', word) and (ROOT / word.partition('/')[0]).is_dir():
                assert (ROOT / word).is_file(), code


PYTHON = re.compile(r'^(?: *<!-- not run: (.+?) -->\n)?( *)```python\n(.*?)^\2```$', re.MULTILINE | re.DOTALL)
BLOCKS = [
    pytest.param(textwrap.dedent(code), why, id=f'{name_of(page)}-{number}')
    for page in PAGES for number, (why, _, code) in enumerate(PYTHON.findall(page.read_text(encoding='utf-8')), 1)]


def check_names(code: str) -> None:
    """Raise AssertionError where code uses a name that timm_alignmix, or a module that it imports, does not have."""
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == 'timm_alignmix':
            assert hasattr(timm_alignmix, node.attr), ast.unparse(node)
        elif isinstance(node, ast.ImportFrom) and node.module.split('.')[0] in ('timm_alignmix', 'alignmix_lab'):
            module = importlib.import_module(node.module)
            assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)


@pytest.mark.parametrize('code, why', BLOCKS)
def test_python_runs(code, why, monkeypatch):
    """With a small model and batch at hand; a comment before a block says why it cannot be run."""
    if why:
        return check_names(code)
    for module, table in ((registry, '_MIXES'), (evaluation, '_protocols')):
        monkeypatch.setattr(module, table, dict(getattr(module, table)))
    known = timm_alignmix.list_mixes()
    model, images, labels = timm.create_model('test_resnet', num_classes=9), torch.randn(2, 3, 64, 64), torch.arange(2)
    exec(compile(code, '<page>', 'exec'), dict(
        vars(timm_alignmix), timm=timm, timm_alignmix=timm_alignmix, torch=torch, model=model, images=images,
        labels=labels))
    for name in set(timm_alignmix.list_mixes()) - set(known):
        timm_alignmix.MixTask(model, name, img_size=64)(images, labels)['loss'].backward()


def test_the_recipe_of_the_page_is_one(tmp_path):
    page = (ROOT / 'recipes' / 'README.md').read_text(encoding='utf-8')
    code, = re.findall(r'^```yaml\n(.*?)^```$', page, re.MULTILINE | re.DOTALL)
    (tmp_path / 'mine.yaml').write_text(code)
    config = resolve_config({'mix': 'few'}, str(tmp_path / 'mine.yaml'))
    assert (config.mix, config.mix_kwargs, config.epochs) == ('multimix', {'n': 100}, 100)
    assert config.model == 'preactresnet18'


@pytest.mark.parametrize('page', PAGES, ids=name_of)
def test_scripts_and_their_options_exist(page):
    shared = (ROOT / 'benchmarks' / 'report.py').read_text(encoding='utf-8')
    for code in code_of(page):
        for script, rest in re.findall(r'python (?:-m )?((?:benchmarks|tools)[/.]\w+)(?:\.py)?(.*)', code):
            source = (ROOT / f'{script.replace(".", "/")}.py').read_text(encoding='utf-8') + shared
            own = words_of(rest.partition(' -- ')[0])
            assert all(f"'{flag}'" in source for flag in flags_in(own)), code


def test_the_site_is_built_and_loads_nothing_from_elsewhere():
    if not importlib.util.find_spec('material'):
        pytest.skip("THE SITE WAS NOT BUILT: mkdocs-material is missing; pip install '.[docs]'")
    done = subprocess.run(
        [sys.executable, ROOT / 'tools' / 'build_site.py'], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert done.returncode == 0, done.stdout[-6000:]
    pages = [page.read_text(encoding='utf-8') for page in (ROOT / 'build' / 'site').rglob('*.html')]
    assert all(any(f'id="timm_alignmix.{name}"' in page for page in pages) for name in ('MixTask', 'mixes.Mixup'))
    assert not any(re.search(r'(src|href)="(https?:)?//[^"]*\.(js|css|woff2?)"', page) for page in pages)


def test_the_version_is_one():
    citation = yaml.safe_load((ROOT / 'CITATION.cff').read_text(encoding='utf-8'))
    changelog = (ROOT / 'CHANGELOG.md').read_text(encoding='utf-8')
    assert citation['version'] == timm_alignmix.__version__ == re.search(r'^## (\S+)', changelog, re.MULTILINE)[1]


def test_the_readme_has_its_two_commands():
    lines = (ROOT / 'README.md').read_text(encoding='utf-8').splitlines()
    assert '    bash install.sh && .venv/bin/accelerate launch train_imagenet.py --mix densemultimix' in lines
    assert '    bash install.sh test && .venv/bin/python -m pytest -n auto --dist loadfile' in lines


@pytest.mark.parametrize('code, found', [
    ('.venv/bin/alignmix convert --data-dir D && alignmix train', [['convert', '--data-dir', 'D'], ['train']]),
    ('accelerate launch --num_processes 8 -m alignmix_lab detect train -b 2', [['detect', 'train', '-b', '2']]),
    ('bash install.sh && .venv/bin/accelerate launch train_imagenet.py --mix mixup', [['train', '--mix', 'mixup']]),
    ('python benchmarks/step_cost.py --mixes alignmix multimix', []),
])
def test_commands_are_found(code, found):
    """The reading itself."""
    assert list(commands_in(code)) == found


@pytest.mark.parametrize('command, flag', [
    ('train', '--no-such-option'), ('evaluate accuracy', '--ood'), ('weights list', '--tag')])
def test_a_wrong_option_is_found(command, flag):
    assert flag not in options_of(*command.split())
