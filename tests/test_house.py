"""The arrows between the parts of the project, read from the imports of every file.

Imports inside functions and behind TYPE_CHECKING count: what needs them there is in the wrong place.
"""
import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ('timm_alignmix', 'alignmix_lab', 'detection')
# What a part may import of the project, besides itself. The first prefix that fits a module is its part.
MAY_IMPORT = {
    'timm_alignmix.functional': (),
    'timm_alignmix.kernels': ('timm_alignmix.functional',),
    'timm_alignmix.anatomy': (),
    'timm_alignmix.models': (),
    'timm_alignmix.weights': ('timm_alignmix.version',),
    'timm_alignmix.mixes': (
        'timm_alignmix.functional', 'timm_alignmix.kernels', 'timm_alignmix.anatomy', 'timm_alignmix.models',
        'timm_alignmix.step_random'),
    'timm_alignmix': (),
    'alignmix_lab.runs.options': ('timm_alignmix',),
    'alignmix_lab.runs': ('timm_alignmix', 'alignmix_lab.runs.options'),
    'alignmix_lab.data': ('timm_alignmix', 'alignmix_lab.runs.options', 'alignmix_lab.runs.files'),
    'alignmix_lab.classification': ('timm_alignmix', 'alignmix_lab.runs', 'alignmix_lab.data'),
    'alignmix_lab.evaluation': (
        'timm_alignmix', 'alignmix_lab.runs', 'alignmix_lab.data', 'alignmix_lab.classification.config',
        'alignmix_lab.classification.export_checkpoint'),
    'alignmix_lab.plots': (
        'timm_alignmix', 'alignmix_lab.runs', 'alignmix_lab.evaluation.config', 'alignmix_lab.evaluation.models'),
    'alignmix_lab.commands': ('timm_alignmix', 'alignmix_lab'),
    'alignmix_lab': (),
    'detection': (
        'timm_alignmix', 'alignmix_lab.runs', 'alignmix_lab.data', 'alignmix_lab.classification.export_checkpoint'),
}


def module_name(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix('').parts
    return '.'.join(parts[:-1] if parts[-1] == '__init__' else parts)


FILES = {module_name(file): file for room in ROOMS for file in sorted((ROOT / room).rglob('*.py'))}


def imports_of(source: str, name: str, is_package: bool, modules: set[str]) -> set[str]:
    """Modules of the project that a file imports, wherever in the file the import stands."""
    package = name.split('.') if is_package else name.split('.')[:-1]
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[:len(package) - node.level + 1] if node.level else []
            base = '.'.join([*above, *([node.module] if node.module else [])])
            # `from package import name` takes a module of that name, or something that the package itself has.
            found |= {
                full if (full := f'{base}.{alias.name}') in modules else base for alias in node.names}
    return {module for module in found if module in modules and module != name}


def all_imports() -> dict[str, set[str]]:
    return {
        name: imports_of(file.read_text(encoding='utf-8'), name, file.name == '__init__.py', set(FILES))
        for name, file in FILES.items()}


def is_in(module: str, part: str) -> bool:
    return module == part or module.startswith(f'{part}.')


def wrong_arrows(imports: dict[str, set[str]]) -> list[str]:
    """Imports that no rule of MAY_IMPORT allows."""
    wrong = []
    for name, targets in imports.items():
        part = next(part for part in MAY_IMPORT if is_in(name, part))
        for target in sorted(targets):
            own = next(other for other in MAY_IMPORT if is_in(target, other))
            whole_plugin = part == 'timm_alignmix' and is_in(target, 'timm_alignmix')
            if own != part and not whole_plugin and not any(is_in(target, other) for other in MAY_IMPORT[part]):
                wrong.append(f'{name} imports {target}')
    return wrong


def cycle(imports: dict[str, set[str]]) -> list[str]:
    """The modules of a circle, [] where there is none."""
    try:
        tuple(TopologicalSorter(imports).static_order())
    except CycleError as e:
        return e.args[1]
    return []


def test_arrows():
    assert wrong_arrows(all_imports()) == []


def test_no_circles():
    assert cycle(all_imports()) == []


def test_nothing_hides_behind_type_checking():
    assert [name for name, file in FILES.items() if 'TYPE_CHECKING' in file.read_text(encoding='utf-8')] == []


def test_programs_stay_out_of_the_package():
    """Benchmarks, tools and tests import the package, never the other way round."""
    for name, file in FILES.items():
        tree = ast.parse(file.read_text(encoding='utf-8'))
        roots = {
            alias.name.split('.')[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        roots |= {
            node.module.split('.')[0] for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom) and node.module and not node.level}
        assert not roots & {'benchmarks', 'tools', 'tests', 'recipes', 'train_imagenet', 'evaluate'}, name


@pytest.mark.parametrize('name, source, target', [
    ('timm_alignmix.task', 'from alignmix_lab.runs import files', 'alignmix_lab.runs.files'),
    ('timm_alignmix.functional.losses', 'def f():\n    from ..mixes import base', 'timm_alignmix.mixes.base'),
    ('alignmix_lab.runs.fit', 'from alignmix_lab.classification.build import build_run',
     'alignmix_lab.classification.build'),
    ('alignmix_lab.data.loaders', 'if TYPE_CHECKING:\n    import alignmix_lab.runs.run', 'alignmix_lab.runs.run'),
    ('alignmix_lab.plots.hull', 'from detection import data', 'detection.data'),
])
def test_a_wrong_import_is_found(name, source, target):
    """The rules themselves: each of these imports breaks one."""
    found = imports_of(source, name, False, set(FILES))
    assert target in found
    assert wrong_arrows({name: found}) == [f'{name} imports {target}']


def test_a_circle_is_found():
    imports = all_imports()
    imports['alignmix_lab.runs.files'] = {'alignmix_lab.runs.fit'}
    assert cycle(imports)
