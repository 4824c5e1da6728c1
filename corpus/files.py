"""Input files: found by globs of paths and URLs, opened for reading, read again after a failure.

A file lies in a local folder or in a file system that fsspec knows (gs://, s3://, hf://, https://).
"""

import dataclasses
import functools
import glob
import io
import os
import posixpath
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from config import ConfigError

if TYPE_CHECKING:
    import fsspec

FILE_KINDS = ('.txt', '.py', '.md')  # one document per file
LINE_KINDS = ('.jsonl', '.jsonl.gz', '.jsonl.zst')  # one document per line
ROW_KINDS = ('.parquet',)  # one document per row
KINDS = FILE_KINDS + LINE_KINDS + ROW_KINDS

READ_BYTES = 4 << 20  # bytes requested at a time from a remote file or a compressed stream
ATTEMPTS = 4  # to read a remote file
PAUSE = 1.0  # seconds; the pauses between the attempts are 2, 4 and 8 times as long
INSTALL = 'pip install -r requirements/data.txt'  # the remedy for a missing optional package

T = TypeVar('T')


class RemoteError(OSError):
    """A remote file system failed; the same read may work the next time."""


@dataclasses.dataclass(frozen=True)
class File:
    """An input file. Document ids start with its `name`, which does not depend on its folder."""

    name: str
    path: str  # or URL
    size: int | None = None  # bytes; None: not asked for yet, or unknown to the server
    version: str = ''  # a time or a tag, which changes with the content; '': unknown


def _remote(url: str, fn: Callable[..., T], *args: Any) -> T:
    """Calls fn(*args), and raises RemoteError for every exception of it."""
    try:
        return fn(*args)
    except Exception as error:  # each file system raises its own classes
        raise RemoteError(f'{url}: {type(error).__name__}: {error}') from error


# ---------------------------------------------------------------------------------------------
# Finding files
# ---------------------------------------------------------------------------------------------


def find_files(patterns: Sequence[str]) -> list[File]:
    """Returns the files that globs of paths and URLs match, each once.

    A file's name is its path below the fixed part of its glob. Raises ConfigError for a pattern
    that matches nothing, and for a file of an unknown kind.
    """
    files: dict[str, File] = {}
    for pattern in patterns:
        found = _find_urls(pattern) if '://' in pattern else _find_local(pattern)
        if not found:
            raise ConfigError(f'no file matches --input={pattern}: check the pattern')
        for file in sorted(found, key=lambda file: file.name):
            if not file.name.endswith(KINDS):
                raise ConfigError(
                    f'{file.path} has none of the endings that can be read ({", ".join(KINDS)}): '
                    f'narrow --input={pattern}'
                )
            files.setdefault(file.path if '://' in file.path else os.path.abspath(file.path), file)
    return list(files.values())


def _find_local(pattern: str) -> list[File]:
    """Returns the local files that the glob matches, in no particular order."""
    root = _fixed_part(pattern)
    found = [path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)]
    return [File(os.path.relpath(path, root or '.').replace(os.sep, '/'), path) for path in found]


def _find_urls(pattern: str) -> list[File]:
    """Returns the remote files that the glob of a URL matches, in no particular order."""
    system, path = _file_system(pattern)
    # In http addresses a question mark starts the query.
    is_glob = '*' in path if pattern.startswith('http') else glob.has_magic(path)
    root = _fixed_part(path) if is_glob else posixpath.dirname(path)
    files = []
    for name, info in _remote(pattern, _listing, system, path, is_glob).items():
        if info.get('type', 'file') == 'file':
            file = File(posixpath.relpath(name, root or '.'), system.unstrip_protocol(name))
            files.append(_with_info(file, info))
    return files


def _listing(
    system: 'fsspec.AbstractFileSystem', path: str, is_glob: bool
) -> dict[str, dict[str, Any]]:
    """Returns {path: info} of the files that a glob matches, or of one file, if it exists."""
    try:
        return system.glob(path, detail=True) if is_glob else {path: system.info(path)}
    except FileNotFoundError:
        return {}


def _fixed_part(pattern: str) -> str:
    """Returns the folder above the first wildcard; for a pattern without one, the file's folder."""
    fixed = pattern
    while glob.has_magic(fixed):
        fixed = os.path.dirname(fixed)
    return os.path.dirname(fixed) if fixed == pattern else fixed


def _file_system(url: str) -> tuple['fsspec.AbstractFileSystem', str]:
    """Returns the file system of a URL, and the path in it.

    Raises ConfigError if a package is missing or fsspec does not know the protocol.
    """
    try:
        import fsspec

        return fsspec.url_to_fs(url)
    except ImportError as error:  # fsspec is missing, or what it needs for this protocol
        raise ConfigError(f'{url} cannot be opened ({error}): {INSTALL}') from error
    except ValueError as error:  # an unknown protocol
        raise ConfigError(
            f'{url} cannot be opened ({error}): use a URL that fsspec knows'
        ) from error


def _with_info(file: File, info: dict[str, Any]) -> File:
    """Returns the file with the size and the version that a file system's `info` holds."""
    # Each file system has its own name for the tag or time that changes with the content.
    tags = ('ETag', 'etag', 'md5Hash', 'blob_id', 'mtime', 'LastModified', 'updated', 'created')
    version = next((str(info[tag]) for tag in tags if info.get(tag)), '')
    return dataclasses.replace(file, size=info.get('size'), version=version)


def with_size(file: File) -> File:
    """Returns the file with its size and version, asked for if they are not there yet."""
    if file.size is not None:
        return file
    if '://' not in file.path:
        status = os.stat(file.path)
        return dataclasses.replace(file, size=status.st_size, version=str(status.st_mtime_ns))
    system, path = _file_system(file.path)
    return _with_info(file, _remote(file.path, system.info, path))


# ---------------------------------------------------------------------------------------------
# Reading files
# ---------------------------------------------------------------------------------------------


class _RemoteFile(io.RawIOBase):
    """A remote file, opened with fsspec.

    Raises RemoteError for every failure of the file system, so that it is not taken for a failure
    of the file's content.
    """

    def __init__(self, url: str):
        super().__init__()
        system, path = _file_system(url)
        self._url = url
        self._file = _remote(url, functools.partial(system.open, path, 'rb', cache_type='none'))

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        content = _remote(self._url, self._file.read, len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return _remote(self._url, self._file.seek, offset, whence)

    def tell(self) -> int:
        return _remote(self._url, self._file.tell)

    def close(self) -> None:
        if not self.closed and hasattr(self, '_file'):
            self._file.close()
        super().close()


def open_file(file: File) -> BinaryIO:
    """Opens the file for reading.

    Opening and reading raise RemoteError if a remote file system fails.
    """
    if '://' not in file.path:
        return open(file.path, 'rb')
    if file.name.endswith(ROW_KINDS):
        return _RemoteFile(file.path)  # unbuffered: pyarrow requests exactly the ranges it needs
    return io.BufferedReader(_RemoteFile(file.path), READ_BYTES)


def retry(fn: Callable[..., T], *args: Any) -> T:
    """Calls fn(*args), again if it raises RemoteError, and at most ATTEMPTS times in all."""
    for attempt in range(1, ATTEMPTS):
        try:
            return fn(*args)
        except RemoteError as error:
            print(f'{error}: trying again', file=sys.stderr)
            time.sleep(2**attempt * PAUSE)
    return fn(*args)
