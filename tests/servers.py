"""Runs HTTP servers in threads: a folder with byte ranges, buckets for gs:// and s3://, a hub."""

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
    """The objects of a server, and the requests that it answered."""

    def __init__(self):
        self.objects: dict[str, bytes] = {}
        self.reads: list[tuple[str, int]] = []  # name and number of bytes of each answered GET
        self.failures = 0  # number of the next GETs of an object that are answered with 503
        self.on_write: Callable[[str, bytes], bytes] = lambda name, content: content
        self.port = 0
        self.lock = threading.Lock()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = 'HTTP/1.1'
    disable_nagle_algorithm = True  # else each body waits 40 ms for its head's ACK
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
        """Answers with an object, or with the range of it that was asked for."""
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
    """The dataset org/name of a Hugging Face hub; objects lie in folders of the first level."""

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
    """Runs a server at a free port, and yields its store."""
    store = Store()
    server = ThreadingHTTPServer(('127.0.0.1', 0), type('Handler', (handler,), {'store': store}))
    store.port = server.server_address[1]
    # Looks for the shutdown every 20 ms.
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield store
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def serve_folder() -> contextlib.AbstractContextManager[Store]:
    """Serves objects as http://127.0.0.1:{port}/{name}, with an index page for each folder."""
    return serve(_FolderHandler)


def serve_bucket() -> contextlib.AbstractContextManager[Store]:
    """Serves objects as gs://bucket/{name}, in the environment that `leads_to` returns."""
    return serve(_BucketHandler)


def leads_to(store: Store) -> dict[str, str]:
    """Returns the environment variables with which gs:// is this server, without credentials."""
    return {
        'TENSORSTORE_GCS_HTTP_URL': f'http://127.0.0.1:{store.port}',
        'GCE_METADATA_ROOT': '127.0.0.1:1',
    }


@contextlib.contextmanager
def serve_gs() -> Iterator[dict[str, str]]:
    """Serves an empty gs://bucket, and yields the environment variables that lead to it."""
    with serve_bucket() as store:
        yield leads_to(store)


@contextlib.contextmanager
def serve_s3() -> Iterator[dict[str, str]]:
    """Serves an empty s3://bucket, and yields the environment variables that lead to it.

    Skips the test if moto[server] is not installed.
    """
    logging.getLogger('werkzeug').setLevel(logging.ERROR)  # by default it prints each request
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
    """Serves objects as hf://datasets/org/name/{name}, with HF_ENDPOINT=http://127.0.0.1:{port}."""
    return serve(_HubHandler)
