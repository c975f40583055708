"""Atomic writing of files, and locks."""
import fcntl
import os
from pathlib import Path
from typing import IO


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file atomically, so that it always has either its old or its new content; creates its folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f'.{path.name}.tmp')
    # A path that the locale cannot decode has surrogates for its bytes.
    temporary.write_bytes(content.encode(errors='surrogateescape') if isinstance(content, str) else content)
    os.replace(temporary, path)


def lock_file(file: IO) -> bool:
    """Lock a file until all processes that inherit it have closed it or died; False if it is locked already.

    File systems without locks never refuse.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        pass
    return True
