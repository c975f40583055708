"""Streams of webdataset shards from a server on this machine, and through commands."""
import functools
import gc
import http.server
import io
import json
import tarfile
import threading
from pathlib import Path

import pytest
import torch
from PIL import Image

from alignmix_lab.data.images.decode import UnusableData
from alignmix_lab.data.images.sources import open_source
from alignmix_lab.data.options import LoaderOptions
from alignmix_lab.data.timm_loader import StreamBatches
from alignmix_lab.data.transforms import SizedTransform

pytest.importorskip('webdataset', reason='shards are read with webdataset')
SHARDS, EACH, BATCH = 12, 20, 10


def write_shards(folder: Path, listed: bool = True) -> None:
    """Shards of PNG images whose colour and label is their number."""
    for shard in range(SHARDS):
        with tarfile.open(folder / f'train-{shard:04}.tar', 'w') as tar:
            for number in range(shard * EACH, (shard + 1) * EACH):
                image = io.BytesIO()
                Image.new('RGB', (8, 8), (number, number, number)).save(image, 'png')
                for name, content in (('png', image.getvalue()), ('cls', str(number).encode())):
                    member = tarfile.TarInfo(f'{number:06}.{name}')
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    names = [f'train-{shard:04}.tar' for shard in range(SHARDS)]
    split = dict(name='train', filenames=names, shard_lengths=[EACH] * SHARDS, num_samples=SHARDS * EACH)
    if listed:
        (folder / '_info.json').write_text(json.dumps({'splits': {'train': split}}))


@pytest.fixture(autouse=True)
def workers_ended():
    """Other tests count processes."""
    yield
    gc.collect()


class Handler(http.server.SimpleHTTPRequestHandler):
    """Serves a folder and notes what it was asked for."""

    def log_message(self, form, *args):
        self.server.asked.append(self.path)


@pytest.fixture
def server(tmp_path):
    write_shards(tmp_path)
    with http.server.ThreadingHTTPServer(
            ('127.0.0.1', 0), functools.partial(Handler, directory=str(tmp_path))) as server:
        server.asked = []
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()


def open_batches(root, workers=0, rank=0, world_size=1, split='train', seed=3):
    options = LoaderOptions(
        input_size=(3, 8, 8), batch_size=BATCH, num_classes=SHARDS * EACH, workers=workers, rank=rank,
        world_size=world_size, seed=seed)
    source = open_source(root, 'wds/numbers', split, is_training=True, batch_size=BATCH, seed=seed)
    reader = source.dataset.reader
    reader.sample_shuffle_size, reader.sample_initial_size = 24, 12
    reader.dist_rank, reader.dist_num_replicas = rank, world_size
    return StreamBatches(source, SizedTransform(options, True), options, train=True)


def read(batches, epoch, start=0):
    batches.set_epoch(epoch, start)
    images, labels = zip(*batches, strict=True)
    return torch.stack(labels), torch.stack(images)


@pytest.mark.parametrize('workers', [0, 2])
def test_an_epoch_repeats_whatever_came_before(server, workers):
    root = f'http://127.0.0.1:{server.server_port}'
    batches = open_batches(root, workers)
    first, second = read(batches, 0), read(batches, 1)
    assert sorted(first[0].flatten().tolist()) == list(range(SHARDS * EACH))
    assert not torch.equal(first[0], second[0]) and first[0].diff().ne(1).any()
    assert all(map(torch.equal, read(open_batches(root, workers), 1), second))
    assert all(map(torch.equal, read(batches, 0), first))
    assert not torch.equal(read(open_batches(root, workers, seed=4), 0)[0], first[0])


@pytest.mark.parametrize('workers, start', [(0, 18), (2, 17), (2, 1), (0, 23)])
def test_a_late_start_reads_what_is_still_to_come(server, workers, start):
    """The same batches as those of a whole epoch from there on, and a second epoch as ever."""
    root = f'http://127.0.0.1:{server.server_port}'
    labels, images = read(open_batches(root, workers), 2)
    following, _ = read(open_batches(root, workers), 3)
    server.asked.clear()
    batches = open_batches(root, workers)
    late = read(batches, 2, start)
    assert torch.equal(late[0], labels[start:]) and torch.equal(late[1], images[start:])
    shards = {path for path in server.asked if path.endswith('.tar')}
    assert {f'/train-{label // EACH:04}.tar' for label in late[0].flatten().tolist()} == shards
    assert start < 10 or len(shards) <= SHARDS - 3
    assert torch.equal(read(batches, 3)[0], following)


def test_ranks_read_different_shards(server):
    root = f'http://127.0.0.1:{server.server_port}'
    parts = [read(open_batches(root, 1, rank, 3), 0)[0] for rank in range(3)]
    assert sorted(torch.cat(parts).flatten().tolist()) == list(range(SHARDS * EACH))
    late = read(open_batches(root, 1, 2, 3), 0, 5)
    assert torch.equal(late[0], parts[2][5:])


def test_commands_and_shards_without_a_list(tmp_path):
    """Through `cat`, as S3 and GCS are read through their clients; without a list all shards are read."""
    write_shards(tmp_path, listed=False)
    root, split = f'pipe:cat {tmp_path}', f'train-{{0000..{SHARDS - 1:04}}}.tar|{SHARDS * EACH}'
    labels, images = read(open_batches(root, split=split), 0)
    assert sorted(labels.flatten().tolist()) == list(range(SHARDS * EACH))
    late = read(open_batches(root, split=split), 0, 20)
    assert torch.equal(late[0], labels[20:]) and torch.equal(late[1], images[20:])


def test_a_late_start_within_the_second_round_of_a_small_set(tmp_path):
    """More samples asked for than there are: timm's reader goes round again."""
    write_shards(tmp_path, listed=False)
    split = f'train-{{0000..0001}}.tar|{4 * EACH}'
    labels, _ = read(open_batches(str(tmp_path), split=split), 0)
    assert len(labels) == 8 and labels.flatten().unique().numel() == 2 * EACH
    for start in (3, 6):
        assert torch.equal(read(open_batches(str(tmp_path), split=split), 0, start)[0], labels[start:])


def test_a_wrong_list_is_named(tmp_path):
    write_shards(tmp_path)
    info = json.loads((tmp_path / '_info.json').read_text())
    info['splits']['train']['shard_lengths'] = [EACH + 1] * SHARDS
    (tmp_path / '_info.json').write_text(json.dumps(info))
    with pytest.raises(UnusableData, match=r'train-00\d\d.tar has 20 samples, 21 are listed; correct shard_lengths'):
        read(open_batches(str(tmp_path)), 0, 12)
