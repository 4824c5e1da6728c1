"""HTTP servers in threads: a folder with byte ranges, a bucket for gs://, a hub for hf://."""

import contextlib
import json
import logging
import threading
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest


class Store:
    """What a server serves, and what it was asked."""

    def __init__(self):
        self.objects: dict[str, bytes] = {}
        self.reads: list[tuple[str, int]] = []  # name and bytes of each GET that was answered
        self.failures = 0  # so many of the next reads of content answer 503
        self.on_write: Callable[[str, bytes], bytes] = lambda name, content: content
        self.port = 0
        self.lock = threading.Lock()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    store: Store

    def log_message(self, *args: object) -> None:
        pass

    def reply(self, code: int, body: bytes = b'', **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace('_', '-'), value)
        self.send_header('Content-Length', str(len(body)))
        self.end_headers()
        if self.command != 'HEAD':
            self.wfile.write(body)

    def send_object(self, name: str) -> None:
        content = self.store.objects.get(name)
        if content is None:
            return self.reply(404)
        if self.command == 'GET':
            with self.store.lock:
                self.store.failures -= 1
                if self.store.failures >= 0:
                    return self.reply(503)
        same = {'Accept_Ranges': 'bytes', 'ETag': f'"{hash(content)}"', 'x_goog_generation': '1'}
        asked = self.headers.get('Range')
        if not asked:
            if self.command == 'GET':
                self.store.reads.append((name, len(content)))
            return self.reply(200, content, **same)
        first, last = asked.removeprefix('bytes=').split('-')
        start = int(first) if first else len(content) - int(last)
        stop = min(int(last) + 1, len(content)) if first and last else len(content)
        self.store.reads.append((name, stop - start))
        span = f'bytes {start}-{stop - 1}/{len(content)}'
        return self.reply(206, content[start:stop], Content_Range=span, **same)


class _FolderHandler(_Handler):
    def do_GET(self) -> None:
        name = urllib.parse.unquote(self.path.lstrip('/'))
        if name.endswith('/'):
            below = {key.removeprefix(name) for key in self.store.objects if key.startswith(name)}
            links = ''.join(f'<a href="{key}">{key}</a>\n' for key in sorted(below))
            return self.reply(200, links.encode(), Content_Type='text/html')
        return self.send_object(name)

    do_HEAD = do_GET  # noqa: N815


class _BucketHandler(_Handler):
    def parse(self) -> tuple[str, dict[str, str]]:
        url = urllib.parse.urlsplit(self.path)
        name = urllib.parse.unquote(url.path.partition('/o/')[2])
        return name, dict(urllib.parse.parse_qsl(url.query))

    def do_POST(self) -> None:
        _, query = self.parse()
        name, content = query['name'], self.rfile.read(int(self.headers['Content-Length']))
        self.store.objects[name] = self.store.on_write(name, content)
        self.reply(200, json.dumps({'name': name, 'generation': '1'}).encode())

    def do_DELETE(self) -> None:
        self.store.objects.pop(self.parse()[0], None)
        self.reply(204)

    def do_GET(self) -> None:
        name, query = self.parse()
        if name:
            return self.send_object(name)
        first, after = query.get('startOffset', ''), query.get('endOffset', '\U0010ffff')
        items = [{'name': key} for key in sorted(self.store.objects) if first <= key < after]
        return self.reply(200, json.dumps({'items': items}).encode())


class _HubHandler(_Handler):
    """The dataset org/name of a Hugging Face hub: objects by their path, one folder deep."""

    def do_GET(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        dataset = '/api/datasets/org/name'
        if '/resolve/main/' in path:
            return self.send_object(path.partition('/resolve/main/')[2])
        if path == dataset:
            return self.reply(200, json.dumps({'id': 'org/name', 'sha': 'c' * 40}).encode())
        if not path.startswith(f'{dataset}/tree/main'):
            return self.reply(404)
        folder = path.removeprefix(f'{dataset}/tree/main').lstrip('/')
        found = [
            {'type': 'file', 'oid': name, 'size': len(content), 'path': name}
            for name, content in self.store.objects.items()
            if name.rpartition('/')[0] == folder
        ]
        if not folder:
            names = {name.partition('/')[0] for name in self.store.objects if '/' in name}
            found += [{'type': 'directory', 'oid': 'd', 'path': name} for name in names]
        return self.reply(200, json.dumps(found).encode(), Content_Type='application/json')

    do_HEAD = do_GET  # noqa: N815


@contextlib.contextmanager
def serve(handler: type[_Handler]) -> Iterator[Store]:
    store = Store()
    server = ThreadingHTTPServer(('127.0.0.1', 0), type('Handler', (handler,), {'store': store}))
    store.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield store
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def serve_folder() -> contextlib.AbstractContextManager[Store]:
    """http://127.0.0.1:{port}/{name}, with an index page for each folder."""
    return serve(_FolderHandler)


def serve_bucket() -> contextlib.AbstractContextManager[Store]:
    """The objects of gs://bucket, for processes with the environment `leads_to` it."""
    return serve(_BucketHandler)


def leads_to(store: Store) -> dict[str, str]:
    """The environment in which gs:// is this server, and nobody asks who one is."""
    return {
        'TENSORSTORE_GCS_HTTP_URL': f'http://127.0.0.1:{store.port}',
        'GCE_METADATA_ROOT': '127.0.0.1:1',
    }


@contextlib.contextmanager
def serve_gs() -> Iterator[dict[str, str]]:
    """An empty gs://bucket, and the environment that leads to it."""
    with serve_bucket() as store:
        yield leads_to(store)


@contextlib.contextmanager
def serve_s3() -> Iterator[dict[str, str]]:
    """An empty s3://bucket, and the environment that leads to it. Needs moto[server]."""
    logging.getLogger('werkzeug').setLevel(logging.ERROR)  # which prints each request
    server = pytest.importorskip('moto.server', reason="pip install 'moto[server]'")
    server = server.ThreadedMotoServer('127.0.0.1', 0, verbose=False)
    server.start()
    try:
        endpoint = 'http://{}:{}'.format(*server.get_host_and_port())
        urllib.request.urlopen(
            urllib.request.Request(f'{endpoint}/bucket', method='PUT'), timeout=60
        ).close()
        yield {
            'AWS_ENDPOINT_URL': endpoint,
            'AWS_REGION': 'us-east-1',
            'AWS_ACCESS_KEY_ID': 'any',
            'AWS_SECRET_ACCESS_KEY': 'any',
        }
    finally:
        server.stop()


def serve_hub() -> contextlib.AbstractContextManager[Store]:
    """What HF_ENDPOINT=http://127.0.0.1:{port} makes of hf://datasets/org/name/{name}."""
    return serve(_HubHandler)
