"""Input files: found by globs of paths and URLs, opened for reading, read again after a failure.

A file lies in a local folder or in a file system that fsspec knows (gs://, s3://, hf://, https://).
"""

import contextlib
import dataclasses
import functools
import glob
import io
import os
import posixpath
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

from config import ConfigError

if TYPE_CHECKING:
    import fsspec

FILE_KINDS = ('.txt', '.py', '.md')  # one document per file
LINE_KINDS = ('.jsonl',)  # one document per line
ROW_KINDS = ('.parquet',)  # one document per row
TABLE_KINDS = ('.csv', '.tsv')  # one document per row
JSON_KINDS = ('.json',)  # one document per value
TAR_KINDS = ('.tar',)  # one document per member
# Folders hold such files beside the text (package.json), so they are read where --input names the
# ending.
NAMED_KINDS = JSON_KINDS + TABLE_KINDS + TAR_KINDS
MANY_KINDS = LINE_KINDS + ROW_KINDS + NAMED_KINDS  # many documents per file
KINDS = FILE_KINDS + MANY_KINDS
PACKINGS = ('.gz', '.zst', '.xz', '.bz2')  # compressions, of all kinds but ROW_KINDS
SHORT_PACKINGS = {'.tgz': '.tar.gz', '.tbz2': '.tar.bz2', '.txz': '.tar.xz', '.tzst': '.tar.zst'}

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
    as_text: bool = False  # True: it is one document, whatever its ending, or none if it is binary

    @property
    def kind(self) -> str:
        """One of the KINDS, '.txt' for all that is one document."""
        kind = kind_of(self.name)
        return '.txt' if kind not in (TAR_KINDS if self.as_text else MANY_KINDS) else kind


def _remote(url: str, fn: Callable[..., T], *args: Any) -> T:
    """Calls fn(*args), and raises RemoteError for every exception of it."""
    try:
        return fn(*args)
    except Exception as error:  # each file system raises its own classes
        raise RemoteError(f'{url}: {type(error).__name__}: {error}') from error


# ---------------------------------------------------------------------------------------------
# Finding files
# ---------------------------------------------------------------------------------------------


def has_kind(name: str, kinds: tuple[str, ...]) -> bool:
    """Returns whether the file's name has one of the endings, in small or capital letters."""
    return name.lower().endswith(kinds)


def packing(name: str) -> str:
    """Returns the ending of a compressed file that says how, '' for another file."""
    name = name.lower()
    for short, ending in SHORT_PACKINGS.items():
        name = name[: -len(short)] + ending if name.endswith(short) else name
    return next((ending for ending in PACKINGS if name.endswith(ending)), '')


def unpacked(name: str) -> str:
    """Returns the name without the ending of a compression, with which ids do not change."""
    for short, ending in SHORT_PACKINGS.items():
        if has_kind(name, (short,)):
            name = name[: -len(short)] + ending
    return name[: len(name) - len(packing(name))]


def kind_of(name: str) -> str:
    """Returns the one of the KINDS that a file's name ends in, before a compression, or ''."""
    if has_kind(unpacked(name), ROW_KINDS) and packing(name):
        return ''  # Parquet compresses its own pages
    return next((kind for kind in KINDS if has_kind(unpacked(name), (kind,))), '')


def split_inputs(values: Iterable[str]) -> list[str]:
    """Returns the paths, globs and URLs of values that may each hold several, 'a.txt,b.txt'.

    A comma belongs to a path if a file or folder of that name exists.
    """
    inputs = []
    for value in values:
        parts = value.split(',')
        while parts:
            n = len(parts)
            while n > 1 and ('://' in parts[0] or not _matches(','.join(parts[:n]))):
                n -= 1
            inputs.append(','.join(parts[:n]))
            parts = parts[n:]
    return [value for value in inputs if value]


def find_files(
    patterns: Sequence[str],
    extensions: Sequence[str] = (),
    as_text: bool = False,
    kinds: Sequence[str] = (),
    said: str = '--input=',
) -> list[File]:
    """Returns the files of paths, folders, globs and URLs, each once.

    A file's name is its path below the folder, or below the fixed part of the glob; names that
    several files would share are longer (`_with_own_names`). Files with one of the `extensions` are
    read as text, with `as_text` all files but tar archives, whose members are. Other files that
    have none of the KINDS, or one of the NAMED_KINDS that the pattern does not name, are skipped,
    and how many is printed. If `kinds` are given, files with these endings alone are meant, and
    others are no news. Raises ConfigError for a pattern that matches no file that can be read, with
    `said` before it.
    """
    text = tuple('.' + e.strip().lstrip('.').lower() for e in extensions if e.strip())
    files: dict[str, File] = {}
    for pattern in patterns:
        found = _find_urls(pattern) if '://' in pattern else _find_local(pattern)
        if not found:
            place = '' if '://' in pattern else f' in {os.getcwd()}'
            raise ConfigError(
                f'no file matches {said}{pattern}{place}: check the path; names that start with '
                'a dot are left out'
            )
        if kinds:
            known = [file for file in found if has_kind(file.name, tuple(kinds))]
            if not known:
                raise ConfigError(
                    f'{said}{pattern} has no file that can be read: what is read is '
                    f'{", ".join(kinds)}'
                )
        else:
            known = _known(pattern, found, text, as_text)
        for file in sorted(known, key=lambda file: file.name):
            files.setdefault(_place(file), file)
    return _with_own_names(list(files.values()))


def _is_read(file: File, pattern: str) -> bool:
    """Returns whether a file that the pattern matches is of a kind that is read."""
    kind = kind_of(file.name)
    if kind not in NAMED_KINDS:
        return bool(kind)
    *_, last = unpacked(pattern.rstrip('/')).split('/')
    return bool(re.search(re.escape(kind) + '(?![a-z0-9])', last.lower()))


def _known(pattern: str, found: Sequence[File], text: tuple[str, ...], as_text: bool) -> list[File]:
    """Returns those of the files that are read. Prints which others there are."""
    known, skipped = [], []
    for file in found:
        named = has_kind(unpacked(file.name), text)
        if as_text or (named and kind_of(file.name) in NAMED_KINDS):
            known.append(dataclasses.replace(file, as_text=True))
        elif named or _is_read(file, pattern):
            known.append(file)
        else:
            skipped.append(file)
    if not known or skipped:
        _say_skipped(pattern, known, skipped)
    return known


def _say_skipped(pattern: str, known: list[File], skipped: list[File]) -> None:
    """Prints which files are skipped. Raises ConfigError if there are no others."""
    counts = Counter(ending_of(file.name) for file in skipped)
    endings = ', '.join(f'{n:,} {ending}' for ending, n in counts.most_common(8))
    named = sorted({kind_of(file.name) for file in skipped} - {''})
    hint = '--extensions=rst,c, or all by --as_text'
    if named:
        hint += f"; {', '.join(named)} by an --input that names the ending, as in '*{named[0]}'"
    if not known:
        raise ConfigError(
            f'--input={pattern} has no file that can be read: there are {endings}, and what is '
            f'read is {", ".join(KINDS)}; others are read as text by {hint}'
        )
    print(f'skipped in {pattern}: {endings}; to read some as text: {hint}', file=sys.stderr)


def _place(file: File) -> str:
    """Returns the file's URL or absolute path."""
    return file.path if '://' in file.path else os.path.abspath(file.path)


def _with_own_names(files: list[File]) -> list[File]:
    """Returns the files with names of their own, because document ids start with them.

    Files that share a name get their paths below the folder that they have in common, or their
    URLs. Other names stay as they are.
    """
    used = Counter(file.name for file in files)
    renamed: dict[str, str] = {}  # by place
    for name in [name for name, n in used.items() if n > 1]:
        places = [_place(file) for file in files if file.name == name]
        local = [place for place in places if '://' not in place]
        root = os.path.commonpath([os.path.dirname(place) for place in local]) if local else ''
        longer = {place: os.path.relpath(place, root).replace(os.sep, '/') for place in local}
        if len(local) == 1:
            longer = {local[0]: name}
        taken = {*used, *renamed.values()} - {name}
        if not taken.isdisjoint(longer.values()):
            longer = {}  # other files have these names already
        renamed |= {place: longer.get(place, place) for place in places}
    return [dataclasses.replace(f, name=renamed.get(_place(f), f.name)) for f in files]


def ending_of(name: str) -> str:
    """Returns the ending of a file's name, or words that say that it has none."""
    ending = os.path.splitext(unpacked(name))[1].lower() + packing(name)
    return ending or 'without an ending'


def _matches(pattern: str) -> bool:
    """Returns whether the path exists, or the glob matches something."""
    prefix, rest = _existing_part(pattern)
    return not rest or bool(glob.glob(rest, root_dir=prefix or None, recursive=True))


def _existing_part(pattern: str) -> tuple[str, str]:
    """Splits a glob into the longest leading path that exists as it is written, and the rest.

    So brackets in the name of a folder that exists are no wildcard.
    """
    prefix, rest = os.path.expanduser(pattern), ''
    while prefix and not os.path.lexists(prefix):
        prefix, last = os.path.split(prefix)
        rest = os.path.join(last, rest) if rest else last
    return prefix, rest


def _find_local(pattern: str) -> list[File]:
    """Returns the local files of a path, a folder or a glob, in no particular order.

    Of the folders that a glob matches it takes those that are named as a file (Spark's x.parquet),
    and all of them if it matches no file. How many it leaves out is printed.
    """
    prefix, rest = _existing_part(pattern)
    if not rest:
        if os.path.isdir(prefix):
            return list(_walk(prefix, prefix))
        return [File(os.path.basename(prefix), prefix)] if os.path.isfile(prefix) else []
    names = glob.glob(rest, root_dir=prefix or None, recursive=True)
    found = [(name, os.path.join(prefix, name)) for name in names]
    files = [File(name.replace(os.sep, '/'), path) for name, path in found if os.path.isfile(path)]
    folders = [path for name, path in found if os.path.isdir(path)]
    no_file = not files
    for folder in folders:
        if no_file or kind_of(folder) in MANY_KINDS:
            files += _walk(folder, prefix or '.')
    _say_left_out(pattern, folders, [file.path for file in files])
    return list({file.path: file for file in files}.values())


def _say_left_out(pattern: str, folders: list[str], paths: list[str]) -> None:
    """Prints how many of the folders that a glob matches hold none of the files found."""
    used = set()
    for path in paths:
        while (path := os.path.dirname(path)) and path not in used:
            used.add(path)
    left_out = [folder for folder in folders if folder.rstrip('/') not in used]
    if paths and left_out:
        print(
            f'left out of {pattern}: folders ({len(left_out):,}, the first {left_out[0]}), because '
            'it matches files, too; to read them, name them as inputs',
            file=sys.stderr,
        )


def _walk(folder: str, root: str) -> Iterator[File]:
    """Yields the files below a folder, named relative to `root`. Leaves hidden ones out.

    Raises ConfigError for a folder that cannot be read.
    """

    def refuse(error: OSError) -> None:
        raise ConfigError(f'{error.filename} cannot be read ({error.strerror})') from error

    seen = {os.path.realpath(folder)}  # links may lead to a folder again, or around in a circle
    for here, folders, names in os.walk(folder, onerror=refuse, followlinks=True):
        below = {name: os.path.realpath(os.path.join(here, name)) for name in sorted(folders)}
        folders[:] = []
        for name, real in below.items():
            if not name.startswith('.') and real not in seen:
                folders.append(name)
                seen.add(real)
        for name in names:
            path = os.path.join(here, name)
            if not name.startswith('.') and os.path.isfile(path):
                yield File(os.path.relpath(path, root).replace(os.sep, '/'), path)


def _find_urls(pattern: str) -> list[File]:
    """Returns the remote files of a URL, a folder's or a glob's, in no particular order."""
    system, path = _file_system(pattern)
    # In http addresses a question mark starts the query.
    is_glob = '*' in path if pattern.startswith('http') else glob.has_magic(path)
    root = _fixed_part(path) if is_glob else posixpath.dirname(path)
    files = []
    found = _remote(pattern, _listing, system, path, is_glob)
    if not is_glob and found.get(path, {}).get('type') == 'directory':
        root = path
    for name, info in list(found.items()):
        if info.get('type') == 'directory' and (not is_glob or kind_of(name) in MANY_KINDS):
            found |= _remote(pattern, functools.partial(system.find, name, detail=True))
    if is_glob:
        folders = [name for name, info in found.items() if info.get('type') == 'directory']
        paths = [name for name, info in found.items() if info.get('type') != 'directory']
        _say_left_out(pattern, folders, paths)
    for name, info in found.items():
        below = posixpath.relpath(name, root or '.')
        if info.get('type', 'file') == 'file' and '/.' not in f'/{below}':
            files.append(_with_info(File(below, system.unstrip_protocol(name)), info))
    return files


def _listing(
    system: 'fsspec.AbstractFileSystem', path: str, is_glob: bool
) -> dict[str, dict[str, Any]]:
    """Returns {path: info} of what a glob matches, or of one file or folder, if it exists."""
    try:
        found = system.glob(path, detail=True) if is_glob else {}
        # The name itself may hold brackets.
        return found or {path: system.info(path)}
    except FileNotFoundError:
        return {}


def _fixed_part(pattern: str) -> str:
    """Returns the part of a glob above its first wildcard."""
    fixed = pattern
    while glob.has_magic(fixed):
        fixed = os.path.dirname(fixed)
    return fixed


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


@contextlib.contextmanager
def _local_errors(path: str) -> Iterator[None]:
    """Raises the errors of opening a local file as ConfigError."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f'{path} cannot be read ({error.strerror}): check that it is there and its '
            'permissions, or leave it out of --input'
        ) from error


def with_size(file: File) -> File:
    """Returns the file with its size and version, asked for if they are not there yet."""
    if file.size is not None:
        return file
    if '://' not in file.path:
        with _local_errors(file.path):
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

    def readall(self) -> bytes:  # the inherited one requests 8 KB at a time
        return _remote(self._url, self._file.read)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return _remote(self._url, self._file.seek, offset, whence)

    def tell(self) -> int:
        return _remote(self._url, self._file.tell)

    def close(self) -> None:
        if not self.closed and hasattr(self, '_file'):
            self._file.close()
        super().close()


def open_file(file: File, buffered: bool = True) -> BinaryIO:
    """Opens the file for reading; a remote one not `buffered` requests exactly what is read.

    Raises ConfigError for a local file that cannot be opened. Opening and reading raise RemoteError
    if a remote file system fails.
    """
    if '://' not in file.path:
        with _local_errors(file.path):
            return open(file.path, 'rb')
    if not buffered or has_kind(file.name, ROW_KINDS):  # pyarrow reads the ranges that it needs
        return _RemoteFile(file.path)
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
