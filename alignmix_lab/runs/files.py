"""Atomic writing of files."""
import os
from pathlib import Path


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file atomically, so that it always has either its old or its new content; creates its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.{path.name}.tmp')
    # A path that the locale cannot decode has surrogates for its bytes.
    temporary.write_bytes(content.encode(errors='surrogateescape') if isinstance(content, str) else content)
    os.replace(temporary, path)
