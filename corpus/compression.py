"""The content of compressed files, as a stream; damage is an error, never an early end.

Python's own readers of .bz2 and .xz files take what follows a stream and is none for padding and
end there, so that a damaged stream in the middle of a file would end it in silence.
"""

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from typing import Any, BinaryIO

from config import ConfigError
from corpus.files import INSTALL, READ_BYTES, File, open_file, packing

ZSTD_WINDOW = 1 << 31  # bytes that a zstd frame may refer back to; --long=31 makes so many


def decompressed(raw: BinaryIO, name: str) -> tuple[BinaryIO, tuple[type[Exception], ...]]:
    """Returns the content of a file, and the exceptions that broken compression raises.

    EOFError among them says that the file is cut short. A file that is not compressed is returned
    as it is, and raises none. Raises ConfigError if a package is missing.
    """
    kind = packing(name)
    if kind == '.gz':
        return gzip.open(raw), (EOFError, gzip.BadGzipFile, zlib.error)
    if kind == '.bz2':
        stream = _Frames(raw, bz2.BZ2Decompressor, OSError)
    elif kind == '.xz':
        stream = _Frames(raw, lzma.LZMADecompressor, lzma.LZMAError, padding=b'\0')
    elif kind == '.zst':
        try:
            import zstandard
        except ImportError as error:
            raise ConfigError(f'reading {name} needs zstandard: {INSTALL}') from error
        stream = _Frames(raw, _zstd_frame, zstandard.ZstdError)
    else:
        return raw, ()
    return io.BufferedReader(stream, READ_BYTES), (EOFError, CorruptError)


class CorruptError(ValueError):
    """Compressed data is corrupt."""


def damage(file: File) -> str:
    """Returns the error of a compressed file with corrupt data, '' for a good or a plain file.

    Reads a compressed file to its end, since the checksum, which shows that the text was altered,
    comes after the text. A file that is cut short has no checksum left, and counts as good so far.
    """
    if not packing(file.name):
        return ''
    with open_file(file) as raw:
        content, errors = decompressed(raw, file.name)
        try:
            while content.read(READ_BYTES):
                pass
        except EOFError:
            return ''
        except errors as error:
            return str(error) or type(error).__name__
    return ''


def _zstd_frame() -> Any:
    """Returns the decompressor of one zstd frame."""
    import zstandard

    return zstandard.ZstdDecompressor(max_window_size=ZSTD_WINDOW).decompressobj()


class _Frames(io.RawIOBase):
    """The content of consecutive frames (zstd) or streams (bzip2, xz).

    Raises EOFError for a frame that is cut short, CorruptError for what is no frame.
    """

    def __init__(
        self,
        raw: BinaryIO,
        new_frame: Callable[[], Any],
        error: type[Exception],
        padding: bytes = b'',
    ):
        """`new_frame` makes the decompressor of a frame, which raises `error`; `padding` may stand
        between frames."""
        super().__init__()
        self._raw, self._new_frame, self._error, self._padding = raw, new_frame, error, padding
        self._frame = None  # decompressor of the current frame; None between frames
        self._begun = False
        self._ready = memoryview(b'')  # decompressed, not yet returned
        self._rest = b''  # compressed, read beyond the end of the last frame

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        while not self._ready:
            block = self._block()
            if block is None:
                return 0
            self._decompress(block)
        n = min(len(buffer), len(self._ready))
        buffer[:n] = self._ready[:n]
        self._ready = self._ready[n:]
        return n

    def _block(self) -> bytes | None:
        """Returns compressed bytes for the frame, which it may not need; None at the end."""
        if self._frame and not getattr(self._frame, 'needs_input', True):
            return b''
        while block := self._rest or self._raw.read(READ_BYTES // 8):
            self._rest = b''
            if self._begun and not self._frame:
                block = block.lstrip(self._padding)
            if block:
                return block
        if self._frame:
            raise EOFError('the last frame is cut short')
        return None

    def _decompress(self, block: bytes) -> None:
        """Decompresses a block, or with those that take one, as much of it as a read returns."""
        if not self._frame:
            self._frame, self._begun = self._new_frame(), True
        limit = (READ_BYTES,) if hasattr(self._frame, 'needs_input') else ()
        try:
            self._ready = memoryview(self._frame.decompress(block, *limit))
        except self._error as error:
            raise CorruptError(str(error) or 'corrupt data') from error
        if self._frame.eof:
            self._rest, self._frame = self._frame.unused_data, None
