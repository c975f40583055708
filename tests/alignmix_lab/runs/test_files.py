"""Files that are written whole, and the lock of a run's folder."""
import multiprocessing
import os
import time
from datetime import datetime

import pytest

from alignmix_lab.classification import prepare
from alignmix_lab.runs import fit
from alignmix_lab.runs.files import lock_file, write_whole


def test_a_path_that_the_locale_cannot_decode_is_written_back(tmp_path):
    """As a path such as /data/größe arrives under LC_ALL=C without UTF-8 mode."""
    name = b'gr\xc3\xb6\xc3\x9fe'
    write_whole(tmp_path / 'report.md', name.decode('ascii', 'surrogateescape'))
    assert (tmp_path / 'report.md').read_bytes() == name and os.listdir(tmp_path) == ['report.md']


def test_a_second_run_in_a_folder_is_refused_while_the_first_lives(make_config, tmp_path):
    run, saver = prepare(make_config(tmp_path))
    for resume in ('', 'auto'):
        with pytest.raises(ValueError, match='another process is training in .*run; .* another --experiment'):
            prepare(make_config(tmp_path, resume=resume))
    context = multiprocessing.get_context('fork')
    started = context.Event()
    child = context.Process(target=lambda: (started.set(), time.sleep(60)))
    child.start()  # a loader's process that outlives the run
    assert started.wait(30)
    run.lock.close()
    try:
        with (saver.folder / '.lock').open('a') as file:
            assert lock_file(file)
    finally:
        child.kill()
        child.join()


def test_unnamed_runs_of_the_same_second_have_folders_of_their_own(make_config, monkeypatch, tmp_path):
    class Noon(datetime):
        @classmethod
        def now(cls):
            return cls(2026, 1, 2, 12)

    monkeypatch.setattr(fit, 'datetime', Noon)
    folders = [prepare(make_config(tmp_path, experiment=''))[1].folder.name for _ in range(3)]
    assert folders == [f'20260102-120000-test_resnet-64-none{end}' for end in ('', '-2', '-3')]


def test_a_file_system_without_locks_refuses_nothing(monkeypatch, tmp_path):
    def unsupported(*_):
        raise OSError(38, 'Function not implemented')

    monkeypatch.setattr('fcntl.flock', unsupported)
    with (tmp_path / 'x').open('a') as file:
        assert lock_file(file)
