#!/usr/bin/env python3
"""Build the site: the repository's pages at their own paths, so that links hold on GitHub and on the site.

It begins with README.md and docs/, and goes on to all that pages link to. Code becomes pages that show it, folders
pages that list them, the notebook a page with its stored outputs. Pages of the API come from the docstrings, which are
read and not imported. Broken links and anchors, and pages that the navigation lacks, end it.

    python tools/build_site.py      # pages into build/pages, the site into build/site; needs pip install '.[docs]'
"""
import ast
import base64
import json
import os
import posixpath
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import griffe

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / 'build' / 'pages'
LINK = re.compile(r'(?<=\]\()(?!\w+:|#)([^)\s#]+)')  # up to the anchor
ROLE = re.compile(r':(?:class|func|meth|mod):`([\w.]+)`')
MEDIA = ('.png', '.jpg', '.css')
LANGUAGES = {'.cff': 'yaml', '.py': 'python', '.sh': 'bash', '.yaml': 'yaml'}
API = {
    'timm_alignmix': 'Plugin', 'timm_alignmix.mixes': 'Methods', 'timm_alignmix.functional': 'Functions',
    'timm_alignmix.models': 'Networks', 'timm_alignmix.weights': 'Weights'}


def page_of(path: str) -> str:
    """Name on the site of a file or folder of the repository."""
    if path.endswith(('.md', *MEDIA)):
        return path
    if (ROOT / path).is_dir():
        return posixpath.join(path, 'README.md')
    return path.removesuffix('.ipynb') + '.md'


def linked(text: str, path: str) -> list[str]:
    """Files and folders of the repository that a page links to."""
    return [posixpath.normpath(posixpath.join(posixpath.dirname(path), link)) for link in LINK.findall(text)]


def with_pages(text: str, path: str) -> str:
    """The text with links to files and folders turned into links to their pages."""
    folder = posixpath.dirname(path)
    return LINK.sub(lambda link: posixpath.relpath(page_of(*linked(f'[]({link[0]})', path)), folder or '.'), text)


def listing(path: str) -> str:
    """A folder without a README."""
    files = sorted(file.name for file in (ROOT / path).iterdir() if file.is_file())
    return '\n'.join([f'# {path}/', '', *(f'- [{name}]({name})' for name in files), ''])


def source(path: str) -> str:
    """A file of code."""
    code = (ROOT / path).read_text(encoding='utf-8')
    return f'# {path}\n\n````{LANGUAGES.get(Path(path).suffix, "text")}\n{code}````\n'


def notebook(path: str) -> tuple[str, dict[str, bytes]]:
    """A notebook with what it stores of its run, and its pictures by path."""
    parts, pictures = [], {}
    for cell in json.loads((ROOT / path).read_text(encoding='utf-8'))['cells']:
        text = ''.join(cell['source'])
        parts.append(text if cell['cell_type'] == 'markdown' else f'```python\n{text}\n```')
        for output in cell.get('outputs', ()):
            data = output.get('data', {'text/plain': output.get('text', '')})
            if 'image/png' in data:
                name = f'{Path(path).stem}-{len(pictures) + 1}.png'
                pictures[posixpath.join(posixpath.dirname(path), name)] = base64.b64decode(data['image/png'])
                parts.append(f'![]({name})')
            else:
                parts.append(f'```text\n{"".join(data["text/plain"])}\n```')
    return '\n\n'.join(parts) + '\n', pictures


def public_names(module: str) -> list[str]:
    """Names in a package's `__all__` that are no modules."""
    package = ROOT / module.replace('.', '/')
    tree = ast.parse((package / '__init__.py').read_text(encoding='utf-8'))
    value = next(
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == '__all__')
    return [name for name in ast.literal_eval(value) if name[0] != '_' and not (package / name).is_dir()]


NAMES = {name: f'{module}.{name}' for module in reversed(API) for name in public_names(module)}


def api_pages() -> Iterator[tuple[str, str]]:
    rows = []
    for module, title in API.items():
        names = public_names(module)
        parts = [f'# {title}', f'::: {module}\n    options: {{members: false, show_root_heading: false}}']
        yield f'api/{module}.md', '\n\n'.join([*parts, *(f'::: {module}.{name}' for name in names)]) + '\n'
        rows.append(f'| [{title}]({module}.md) | {", ".join(f"[`{n}`][{module}.{n}]" for n in names)} |')
    yield 'api/README.md', '\n'.join(['# API', '', '| page | names |', '|---|---|', *rows, ''])


class Docstrings(griffe.Extension):
    """Sphinx's roles become links where the API has a page, code otherwise; `Example` the heading that griffe knows."""

    def on_instance(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring:
            obj.docstring.value = ROLE.sub(self._link, obj.docstring.value).replace('\nExample:\n', '\nExamples:\n')

    @staticmethod
    def _link(role: re.Match) -> str:
        first, *rest = role[1].removeprefix('timm_alignmix.').removeprefix('functional.').split('.')
        return f'[`{role[1]}`][{".".join([NAMES[first], *rest])}]' if first in NAMES else f'`{role[1]}`'


def pages() -> dict[str, str | bytes]:
    """Every page and picture of the site by its name there."""
    found = dict(api_pages())
    todo = ['README.md', 'docs/site.css', *(f'docs/{page.name}' for page in (ROOT / 'docs').glob('*.md'))]
    while todo:
        path = todo.pop()
        page = page_of(path)
        if page in found:
            continue
        if path.endswith(MEDIA):
            found[page] = (ROOT / path).read_bytes()
        elif (ROOT / page).is_file():
            path, found[page] = page, (ROOT / page).read_text(encoding='utf-8')
        elif (ROOT / path).is_dir():
            path, found[page] = page, listing(path)
        elif path.endswith('.ipynb'):
            found[page], pictures = notebook(path)
            found |= pictures
        else:
            found[page] = source(path)
            continue
        if page.endswith('.md'):
            todo += [file for file in linked(found[page], path) if file not in found]
            found[page] = with_pages(found[page], path)
    return found


def main() -> None:
    shutil.rmtree(PAGES, ignore_errors=True)
    for name, content in pages().items():
        file = PAGES / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content if isinstance(content, bytes) else content.encode())
    command = [sys.executable, '-m', 'mkdocs', 'build', '--strict']
    sys.exit(subprocess.run(command, cwd=ROOT, env={**os.environ, 'NO_MKDOCS_2_WARNING': '1'}).returncode)


if __name__ == '__main__':
    main()
