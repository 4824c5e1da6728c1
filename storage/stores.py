"""Key-value stores below local folders and URLs that tensorstore knows, and small text files in
them."""

import contextlib
import os
import time
import urllib.parse
from collections.abc import Iterator

import tensorstore as ts

from config import ConfigError


def cache_folder() -> str:
    """Returns $JAXFORMER_CACHE, else $XDG_CACHE_HOME/jaxformer, else ~/.cache/jaxformer."""
    user_cache = os.environ.get('XDG_CACHE_HOME') or os.path.expanduser('~/.cache')
    return os.environ.get('JAXFORMER_CACHE') or os.path.join(user_cache, 'jaxformer')


def expanded(path: str) -> str:
    """Returns the path with the home folder for a leading ~ or ~user; URLs stay as they are.

    Shells leave the ~ of --flag=~/folder alone.
    """
    return path if '://' in path else os.path.expanduser(path)


def local_folder(path: str) -> str | None:
    """Returns the absolute path of a local folder, given as a path or as file://, else None."""
    if path.startswith('file://'):
        return path.removeprefix('file://')
    return None if '://' in path else os.path.abspath(expanded(path))


@contextlib.contextmanager
def store_errors(action: str) -> Iterator[None]:
    """Raises tensorstore's errors, which are plain ValueErrors, as ConfigError('action: error').

    For calls of tensorstore alone: a ValueError of other code is a bug.
    """
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError(f'{action}: {error}') from error


def open_store(path: str, context: ts.Context | None = None) -> ts.KvStore:
    """Opens the store below a folder or a URL such as gs://bucket/folder.

    s3:// is Amazon's, or the compatible one (MinIO, R2, Ceph) at the address that the variable
    AWS_ENDPOINT_URL_S3 or AWS_ENDPOINT_URL gives, as for Amazon's own tools. Raises ConfigError if
    tensorstore does not know the scheme, or the bucket's name is invalid.
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
    try:
        return ts.KvStore.open(where, context=context).result()
    except ValueError as error:
        raise ConfigError(
            f'{path} cannot be opened: {error}; use a folder, gs://BUCKET/FOLDER or '
            f's3://BUCKET/FOLDER'
        ) from error


def _split(path: str) -> tuple[str, str]:
    """Splits a file's path into its folder and its name."""
    folder, name = os.path.split(path)
    return folder or '.', name


def read_text(path: str) -> str | None:
    """Returns the text of a file, or None if there is no such file.

    Raises ConfigError, with the file, if it cannot be read or is no UTF-8.
    """
    folder, name = _split(path)
    with store_errors(f'{path} cannot be read'):
        result = open_store(folder).read(name).result()
    if result.state != 'value':
        return None
    try:
        return result.value.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(f'{path} is damaged: it is no text ({error})') from error


def write_text(path: str, text: str) -> None:
    """Replaces the whole file at once: after a kill it holds the old text or the new one.

    Raises ConfigError, with the file, if it cannot be written.
    """
    folder, name = _split(path)
    with store_errors(f'{path} cannot be written'):
        open_store(folder).write(name, text.encode()).result()


class Lines:
    """A text file that grows by lines.

    On a local file system each line is appended at once. A bucket can only replace files: there
    the whole text is written again, in the background, at most once per `seconds` and at `flush`;
    a kill loses the lines since then. Lines that cannot be written are kept, and written with the
    next ones or at `flush`; of them, the file holds none in part.
    """

    def __init__(self, path: str, seconds: float = 60.0):
        self.seconds = seconds
        self._path = path
        self._root, self._name = _split(path)
        self._folder = local_folder(self._root)
        # In a folder the lines that are to be written, in a bucket all.
        self._text = '' if self._folder else read_text(path) or ''
        self._last_write = time.monotonic()
        self._pending: ts.Future | None = None

    def add(self, line: str) -> None:
        """Adds a line, given without its newline. Raises OSError or ConfigError as `flush`."""
        self._text += line + '\n'
        if self._folder:
            self._append()
        elif time.monotonic() - self._last_write >= self.seconds:
            self._write()

    def flush(self) -> None:
        """Returns once all lines are stored; raises OSError or ConfigError if that fails."""
        if self._folder:
            self._append()
            return
        self._write()
        self._finish()

    def _append(self) -> None:
        """Appends the lines that wait, all or none."""
        if not self._text:
            return
        with open(os.path.join(self._folder, self._name), 'ab', buffering=0) as f:
            size, rest = f.seek(0, os.SEEK_END), self._text.encode()
            try:
                while rest:
                    rest = rest[f.write(rest) :]
            except OSError:
                f.truncate(size)
                raise
        self._text = ''

    def _write(self) -> None:
        """Starts to write the whole text, after the write before has ended."""
        self._finish()
        self._pending = open_store(self._root).write(self._name, self._text.encode())
        self._last_write = time.monotonic()

    def _finish(self) -> None:
        """Waits for the write under way."""
        pending, self._pending = self._pending, None
        if pending:
            with store_errors(f'{self._path} cannot be written'):
                pending.result()
