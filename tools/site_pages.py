"""MkDocs hooks: the site has the repository's pages at their own paths, so that links hold on GitHub and on the site.

It begins with README.md and goes on to all that pages link to. Code becomes pages that show it, folders pages that list
them, the notebook a page with its stored outputs. Pages of the API come from the docstrings, read and not imported.

    mkdocs build        # into build/site
"""
import ast
import base64
import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
LINK = re.compile(r'(?<=\]\()(?!\w+:|#)([^)\s#]+)')  # up to the anchor
ROLE = re.compile(r':(?:attr|class|func|meth|mod):<code>([\w.]+)</code>')
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


def linked(text: str, path: str) -> Iterator[str]:
    """Files and folders of the repository that a page links to."""
    for link in LINK.findall(text):
        yield posixpath.normpath(posixpath.join(posixpath.dirname(path), link))


def with_pages(text: str, path: str) -> str:
    """The text with links to files and folders turned into links to their pages."""
    folder = posixpath.dirname(path)
    return LINK.sub(lambda link: posixpath.relpath(
        page_of(posixpath.normpath(posixpath.join(folder, link[0]))), folder or '.'), text)


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


def api_pages() -> Iterator[tuple[str, str]]:
    rows = []
    for module, title in API.items():
        names = public_names(module)
        parts = [f'# {title}', f'::: {module}\n    options: {{members: false, show_root_heading: false}}']
        yield f'api/{module}.md', '\n\n'.join([*parts, *(f'::: {module}.{name}' for name in names)]) + '\n'
        rows.append(f'| [{title}]({module}.md) | `{module}` | {", ".join(f"[`{n}`][{module}.{n}]" for n in names)} |')
    yield 'api/README.md', '\n'.join(['# API', '', '| page | module | names |', '|---|---|---|', *rows, ''])


def on_files(files: Files, config: Any) -> None:
    """Put the repository's pages, and those of the API, in the place of the contents of docs/."""
    for file in [file for file in files if file.src_dir == config.docs_dir]:
        files.remove(file)
    todo, done = ['README.md', 'docs/site.css'], set()
    while todo:
        path = todo.pop()
        page = page_of(path)
        if page in done:
            continue
        done.add(page)
        if path.endswith(MEDIA):
            files.append(File.generated(config, page, abs_src_path=str(ROOT / path)))
            continue
        pictures = {}
        if (ROOT / page).is_file() and page.endswith('.md'):
            path, text = page, (ROOT / page).read_text(encoding='utf-8')
        elif (ROOT / path).is_dir():
            path, text = page, listing(path)
        elif path.endswith('.ipynb'):
            text, pictures = notebook(path)
        else:
            files.append(File.generated(config, page, content=source(path)))
            continue
        for name, picture in pictures.items():
            done.add(name)
            files.append(File.generated(config, name, content=picture))
        todo += linked(text, path)
        files.append(File.generated(config, page, content=with_pages(text, path)))
    for page, text in api_pages():
        files.append(File.generated(config, page, content=text))


def on_page_content(html: str, **_: Any) -> str:
    """Sphinx's roles of the docstrings become links where there is a page of the API."""
    names = {name: f'{module}.{name}' for module in API for name in public_names(module)}

    def link(role: re.Match) -> str:
        first, _, rest = role[1].removeprefix('timm_alignmix.').partition('.')
        full = f'{names[first]}.{rest}'.rstrip('.') if first in names else role[1]
        known = first in names or role[1].startswith('timm_alignmix.')
        return f'<autoref identifier="{full}"><code>{role[1]}</code></autoref>' if known else f'<code>{role[1]}</code>'
    return ROLE.sub(link, html)
