"""The key-value store below a path, a local folder or a URL that tensorstore knows, and small text
files in it."""

import os
import time
import urllib.parse

import tensorstore as ts


def local_folder(path: str) -> str | None:
    """The absolute path of a local folder, also one given as file://; None for another store."""
    if path.startswith('file://'):
        return path.removeprefix('file://')
    return None if '://' in path else os.path.abspath(path)


def open_store(path: str, context: ts.Context | None = None) -> ts.KvStore:
    """The store below a folder or a URL such as gs://bucket/folder.

    s3:// is Amazon's, or the compatible one (MinIO, R2, Ceph) whose address the variables
    AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL give, as to Amazon's own tools.
    """
    where: str | dict[str, str] = path.rstrip('/') + '/'
    endpoint = os.environ.get('AWS_ENDPOINT_URL_S3') or os.environ.get('AWS_ENDPOINT_URL')
    if folder := local_folder(path):
        where = {'driver': 'file', 'path': folder.rstrip('/') + '/'}
    elif path.startswith('s3://') and endpoint:
        bucket, _, key = urllib.parse.unquote(where.removeprefix('s3://')).partition('/')
        region = os.environ.get('AWS_REGION') or os.environ.get('AWS_DEFAULT_REGION')
        where = {'driver': 's3', 'bucket': bucket, 'path': key, 'endpoint': endpoint}
        where['aws_region'] = region or 'us-east-1'
    return ts.KvStore.open(where, context=context).result()


def _split(path: str) -> tuple[str, str]:
    root, name = os.path.split(path)
    return root or '.', name


def read_text(path: str) -> str | None:
    """A small file as a whole; None if there is none."""
    root, name = _split(path)
    result = open_store(root).read(name).result()
    return result.value.decode() if result.state == 'value' else None


def write_text(path: str, text: str) -> None:
    """Replaces the file as a whole: after a kill it is the old one or the new one."""
    root, name = _split(path)
    open_store(root).write(name, text.encode()).result()


class Lines:
    """A text file that grows by lines.

    On a local file system each is appended. A bucket only replaces files: there the whole is
    written again, beside the loop, at most every `seconds`, and at `flush`; a kill loses the lines
    since then.
    """

    def __init__(self, path: str, seconds: float = 60.0):
        self.seconds = seconds
        self._root, self._name = _split(path)
        self._folder = local_folder(self._root)
        self._text = '' if self._folder else read_text(path) or ''
        self._written, self._pending = time.monotonic(), None

    def add(self, line: str) -> None:
        if self._folder:
            with open(os.path.join(self._folder, self._name), 'a') as f:
                f.write(line + '\n')
            return
        self._text += line + '\n'
        if time.monotonic() - self._written >= self.seconds:
            self._write()

    def flush(self) -> None:
        """Returns when all lines are there. Raises what a write raised."""
        if self._folder:
            return
        self._write()
        self._pending.result()

    def _write(self) -> None:
        if self._pending:
            self._pending.result()
        self._pending = open_store(self._root).write(self._name, self._text.encode())
        self._written = time.monotonic()
