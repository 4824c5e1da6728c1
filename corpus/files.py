"""Input files, in a local folder or in a file system of fsspec's."""

import dataclasses
import glob
import io
import os
import posixpath
import sys
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

if TYPE_CHECKING:
    import fsspec


FILE_KINDS = ('.txt', '.py', '.md')  # a document a file


LINE_KINDS = ('.jsonl', '.jsonl.gz', '.jsonl.zst')  # a document a line


ROW_KINDS = ('.parquet',)  # a document a row


KINDS = FILE_KINDS + LINE_KINDS + ROW_KINDS

READ_BYTES = 4 << 20  # of a remote file or a compressed stream at a time


ATTEMPTS, PAUSE = 4, 1.0  # at a remote file; the pause in seconds doubles each time

_PIP = 'pip install -r requirements/data.txt'

T = TypeVar('T')


class RemoteError(OSError):
    """A remote file system failed; the same read may work the next time."""


@dataclasses.dataclass(frozen=True)
class File:
    """An input file. Its `name`, which document ids start with, is the same wherever it lies."""

    name: str
    path: str  # or URL
    size: int | None = None  # bytes; None: not asked for yet, or not told by the server
    version: str = ''  # another one when the content has changed: a time or a tag


# ---------------------------------------------------------------------------------------------
# Files
# ---------------------------------------------------------------------------------------------


def find_files(patterns: Sequence[str]) -> list[File]:
    """The files that globs of paths and URLs match, each once, named relative to the fixed part
    of their glob. Raises ValueError for a pattern without files, and for a file of another kind.
    """
    files: dict[str, File] = {}
    for pattern in patterns:
        found = _find_urls(pattern) if '://' in pattern else _find_local(pattern)
        if not found:
            raise ValueError(f'no file matches --input={pattern}: check the pattern')
        for file in sorted(found, key=lambda file: file.name):
            if not file.name.endswith(KINDS):
                raise ValueError(
                    f'{file.path} is of no kind that can be read ({", ".join(KINDS)}): narrow '
                    f'--input={pattern}'
                )
            files.setdefault(file.path if '://' in file.path else os.path.abspath(file.path), file)
    return list(files.values())


def _find_local(pattern: str) -> list[File]:
    root = _fixed_part(pattern)
    found = [path for path in glob.glob(pattern, recursive=True) if os.path.isfile(path)]
    return [File(os.path.relpath(path, root or '.').replace(os.sep, '/'), path) for path in found]


def _find_urls(pattern: str) -> list[File]:
    system, path = _file_system(pattern)
    # In http addresses a question mark starts the query.
    is_glob = '*' in path if pattern.startswith('http') else glob.has_magic(path)
    try:
        found = system.glob(path, detail=True) if is_glob else {path: system.info(path)}
    except FileNotFoundError:
        return []
    root = _fixed_part(path) if is_glob else posixpath.dirname(path)
    files = []
    for name, info in found.items():
        if info.get('type', 'file') == 'file':
            file = File(posixpath.relpath(name, root or '.'), system.unstrip_protocol(name))
            files.append(_with_info(file, info))
    return files


def _fixed_part(pattern: str) -> str:
    """The folder above the first component with a wildcard; without one, that of the file."""
    fixed = pattern
    while glob.has_magic(fixed):
        fixed = os.path.dirname(fixed)
    return os.path.dirname(fixed) if fixed == pattern else fixed


def _file_system(url: str) -> tuple['fsspec.AbstractFileSystem', str]:
    """The file system of a URL, and the path in it."""
    try:
        import fsspec

        return fsspec.url_to_fs(url)
    except ImportError as error:  # of fsspec, or of what it needs for this protocol
        raise ImportError(f'{url} cannot be opened ({error}): {_PIP}') from error
    except ValueError as error:  # an unknown protocol
        raise ValueError(
            f'{url} cannot be opened ({error}): use a URL that fsspec knows'
        ) from error


def _with_info(file: File, info: dict[str, Any]) -> File:
    # Whatever the file system calls what changes with the content.
    tags = ('ETag', 'etag', 'md5Hash', 'blob_id', 'mtime', 'LastModified', 'updated', 'created')
    version = next((str(info[tag]) for tag in tags if info.get(tag)), '')
    return dataclasses.replace(file, size=info.get('size'), version=version)


def _with_size(file: File) -> File:
    if file.size is not None:
        return file
    if '://' not in file.path:
        status = os.stat(file.path)
        return dataclasses.replace(file, size=status.st_size, version=str(status.st_mtime_ns))
    system, path = _file_system(file.path)
    return _with_info(file, system.info(path))


class _Remote(io.RawIOBase):
    """A file of fsspec whose failures are RemoteErrors, to be told from those of its content."""

    def __init__(self, url: str):
        super().__init__()
        system, path = _file_system(url)
        self._url = url
        self._file = self._try(lambda: system.open(path, 'rb', cache_type='none'))

    def _try(self, fn: Callable[..., T], *args: Any) -> T:
        try:
            return fn(*args)
        except Exception as error:  # each file system raises classes of its own
            raise RemoteError(f'{self._url}: {type(error).__name__}: {error}') from error

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        content = self._try(self._file.read, len(buffer))
        buffer[: len(content)] = content
        return len(content)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._try(self._file.seek, offset, whence)

    def tell(self) -> int:
        return self._try(self._file.tell)

    def close(self) -> None:
        if not self.closed and hasattr(self, '_file'):
            self._file.close()
        super().close()


def open_file(file: File) -> BinaryIO:
    """The file for reading. Raises RemoteError, also later, if a remote file system fails."""
    if '://' not in file.path:
        return open(file.path, 'rb')
    if file.name.endswith(ROW_KINDS):
        return _Remote(file.path)  # each read is a request: pyarrow asks for just what it needs
    return io.BufferedReader(_Remote(file.path), READ_BYTES)


def retry(fn: Callable[..., T], *args: Any) -> T:
    """fn(*args), tried again while a remote file system fails, at most ATTEMPTS times in all."""
    for attempt in range(1, ATTEMPTS):
        try:
            return fn(*args)
        except RemoteError as error:
            print(f'{error}: trying again', file=sys.stderr)
            time.sleep(2**attempt * PAUSE)
    return fn(*args)
