"""Uploading, against a hub that records what it is asked, and loading from the hub client's cache."""
import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import timm
import torch

COMMIT = 'a' * 40


class Hub(BaseHTTPRequestHandler):
    """The hub's side of one commit of small files, which travel inside the commit itself."""

    def do_POST(self):
        chunks = []
        if self.headers.get('Transfer-Encoding') == 'chunked':
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
        else:
            chunks.append(self.rfile.read(int(self.headers['Content-Length'])))
        body = b''.join(chunks)
        self.server.requests.append((self.path, dict(self.headers), body))
        if self.path == '/api/repos/create':
            self._answer({'url': f'{self.server.address}/me/resnet', 'id': 'me/resnet'})
        elif self.path.endswith('/preupload/main'):
            asked = json.loads(body)['files']
            files = [{'path': file['path'], 'uploadMode': 'regular', 'shouldIgnore': False} for file in asked]
            self._answer({'files': files})
        elif self.path == '/api/validate-yaml':
            self._answer({'errors': [], 'warnings': []})
        elif '/commit/main' in self.path:
            address = f'{self.server.address}/me/resnet/commit/{COMMIT}'
            self._answer({'success': True, 'commitOid': COMMIT, 'commitUrl': address})
        else:
            self._answer({}, 404)

    def do_GET(self):
        self.server.requests.append((self.path, dict(self.headers), b''))
        self._answer({}, 404)

    def _answer(self, content: dict, status: int = 200):
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header('Content-Type', 'application/json')
        self.send_header('Content-Length', str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *args):
        pass


@pytest.fixture
def hub():
    server = ThreadingHTTPServer(('127.0.0.1', 0), Hub)
    server.requests, server.address = [], f'http://127.0.0.1:{server.server_port}'
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_push_and_load(cnn, hub, run_python, tmp_path):
    """What arrives at the hub is what was verified; put into the client's cache, timm loads it offline."""
    (cnn.folder / 'notes.txt').write_text('not to be uploaded')
    code = f"from timm_alignmix.weights import push; print(push({str(cnn.folder)!r}, 'me/resnet'))"
    output = run_python(
        code, plugin=True, HF_ENDPOINT=hub.address, HF_HUB_OFFLINE='0', HF_TOKEN='hf_secret', HF_HOME=str(tmp_path))
    assert f'/commit/{COMMIT}' in output

    create = next(json.loads(body) for path, _, body in hub.requests if path == '/api/repos/create')
    assert create['name'] == 'resnet' and create['organization'] == 'me'
    path, headers, body = next(request for request in hub.requests if '/commit/main' in request[0])
    assert path.startswith('/api/models/me/resnet/') and headers['authorization'] == 'Bearer hf_secret'
    lines = [json.loads(line) for line in body.splitlines()]
    assert lines[0]['value']['summary'] == 'Add none_flower_photos of test_resnet'
    files = {line['value']['path']: base64.b64decode(line['value']['content']) for line in lines[1:]}
    assert sorted(files) == ['README.md', 'config.json', 'model.safetensors']
    assert all((cnn.folder / name).read_bytes() == content for name, content in files.items())
    (cnn.folder / 'notes.txt').unlink()

    cached = tmp_path / 'cache' / 'models--me--resnet'
    (cached / 'refs').mkdir(parents=True)
    (cached / 'refs' / 'main').write_text(COMMIT)
    (cached / 'snapshots' / COMMIT).mkdir(parents=True)
    for name, content in files.items():
        (cached / 'snapshots' / COMMIT / name).write_bytes(content)
    model = timm.create_model('hf-hub:me/resnet', pretrained=True, cache_dir=tmp_path / 'cache').eval()
    with torch.no_grad():
        assert torch.equal(model(cnn.images), cnn.model(cnn.images))


def test_metadata_is_the_hubs(cnn):
    """Read back by the hub client's own parser."""
    from huggingface_hub import ModelCard
    card = ModelCard.load(cnn.folder / 'README.md')
    assert card.data.library_name == 'timm' and card.data.license == 'cc0-1.0'
    assert card.data.pipeline_tag == 'image-classification'
    result, = card.data.eval_results
    assert (result.dataset_name, result.metric_type, result.metric_value) == ('Flower Photos', 'accuracy', 61.25)
