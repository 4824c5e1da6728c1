"""Reads the documents of text files: a file, a line of JSON, or a value of a JSON array each."""

import codecs
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from corpus.compression import decompressed
from corpus.files import READ_BYTES, File, open_file, unpacked
from corpus.records import Bad, Binary, Document, Piece, json_document, text_document

BOM = '\ufeff'.encode()  # the byte-order mark, which some programs write before UTF-8 text
FIRST_BYTES = 8000  # of a file, by which it is told whether it is text, as git does
SPACES = ' \t\n\r'  # that may stand between the tokens of JSON
NO_BYTES = 'the file has no bytes, so no compressed text'
NEAR = 16  # characters; a JSON token that is cut is no longer, but for a string


def is_binary(start: bytes) -> bool:
    """Returns whether the first bytes of a file hold a NUL, or are not UTF-8."""
    decoder, cut = codecs.getincrementaldecoder('utf-8')(), len(start) >= FIRST_BYTES
    start = start[:FIRST_BYTES]
    try:
        decoder.decode(start, final=not cut)  # else the last character may be there in part
    except UnicodeDecodeError:
        return True
    return b'\0' in start


def whole_file(file: File) -> Document | Bad | Binary:
    """Returns the content of a file as one document."""
    with open_file(file) as raw:
        content, errors = decompressed(raw, file.name)
        try:
            start = content.read(FIRST_BYTES)
            if file.as_text and is_binary(start):
                return Binary(file.name)
            text = start + content.read()
        except errors as error:
            reason = str(error) or type(error).__name__
            return Bad(file.name, '', reason, 1, True, max(1, file.size or 0))
        if not text and errors and not raw.tell():
            return Bad(file.name, '', NO_BYTES, 1, True, 1)
    return text_of(unpacked(file.name), file.name, '', text)


def text_of(document: str, file: str, place: str, content: bytes) -> Document | Bad:
    """Returns bytes of UTF-8 as the document of this id, or what is wrong with them."""
    content = content.removeprefix(BOM)
    try:
        return Document(document, content.decode(), len(content))
    except UnicodeDecodeError as error:
        utf16 = content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        hint = ' (it starts as UTF-16 does, and what is read is UTF-8)' if utf16 else ''
        return Bad(file, place, f'{error}{hint}')


def lines(piece: Piece, text_field: str) -> Iterator[Document | Bad]:
    """Yields the documents of the lines of a .jsonl file that start within the piece."""
    name = piece.file.name
    prefix = unpacked(name)
    number, position = piece.first - 1, piece.start
    with open_file(piece.file) as raw:
        if piece.start:
            raw.seek(piece.start - 1)
            position += len(raw.readline()) - 1  # skip a line that started in the piece before
        content, errors = decompressed(raw, name)
        while piece.stop is None or position < piece.stop:
            try:
                line = content.readline()
            except errors as error:
                yield cut_short(piece.file, raw, f'line {number}', error)
                return
            if not line and errors and not raw.tell():  # compressed text has bytes, even of nothing
                yield Bad(name, 'line 0', NO_BYTES, 1, True, 1)
            if not line:
                return
            position += len(line)
            number += 1
            if number == 1:
                line = line.removeprefix(BOM)
            if line.strip():
                try:
                    yield json_document(f'{prefix}:{number}', line, text_field)
                except (ValueError, RecursionError) as error:  # bad UTF-8, JSON or record
                    yield Bad(name, f'line {number}', str(error))


def cut_short(file: File, raw: BinaryIO, place: str, error: Exception) -> Bad:
    """Returns the record of a compressed file of which nothing after `place` can be read."""
    lost = max(1, (file.size or 0) - raw.tell())
    return Bad(file.name, place, str(error), 1, True, lost)


# ---------------------------------------------------------------------------------------------
# JSON
# ---------------------------------------------------------------------------------------------


def json_values(piece: Piece, text_field: str) -> Iterator[Document | Bad]:
    """Yields the documents of a .json file: of the values of its array, of its lines or objects.

    A value is an object with a text, or a text. Lines of JSON in a file of this name are read as
    those of a .jsonl file; other files as consecutive values, of which few are in memory at a time.
    """
    file = piece.file
    with open_file(file) as raw:
        content, errors = decompressed(raw, file.name)
        try:
            by_lines = _is_json_lines(content)
        except errors:
            by_lines = True  # which name the error
    if by_lines:
        yield from lines(piece, text_field)
        return
    number = 0
    with open_file(file) as raw:
        content, errors = decompressed(raw, file.name)
        try:
            for value, shown in json_stream(content):
                number += 1
                document = f'{unpacked(file.name)}:{number}'
                try:
                    if isinstance(value, str):
                        yield Document(document, value, len(value.encode()))
                    else:
                        yield text_document(document, value, text_field, shown)
                except ValueError as error:
                    yield Bad(file.name, f'value {number}', str(error))
        except (*errors, ValueError, RecursionError) as error:
            yield cut_short(file, raw, f'value {number}', error)


def _is_json_lines(content: BinaryIO) -> bool:
    """Returns whether the first line that is not blank is a JSON object by itself."""
    line = content.readline(READ_BYTES).removeprefix(BOM)
    while line and not line.strip():
        line = content.readline(READ_BYTES)
    if not line.lstrip().startswith(b'{'):
        return not line
    while not line.endswith(b'\n') and (more := content.readline(READ_BYTES)):
        line += more
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True


def json_stream(content: BinaryIO) -> Iterator[tuple[Any, str]]:
    """Yields (value, start of its text) of a JSON array, or of consecutive JSON values.

    Holds one value and a block of READ_BYTES in memory. Raises ValueError, with the position in the
    file, for what is no JSON or no UTF-8, RecursionError for values that are too deep.
    """
    text = _JsonText(content)
    if text.peek() != '[':
        while text.peek():
            yield text.value()
        return
    text.skip()
    mark = ','
    if text.peek() == ']':
        mark = ']'
        text.skip()
    while mark == ',':
        yield text.value()
        mark = text.peek()
        if mark not in (',', ']'):
            raise text.error('Expecting , or ] after a value of the array')
        text.skip()
    if text.peek():
        raise text.error('Extra data after the array')


class _JsonText:
    """The text of a JSON file, of which a value is parsed at a time."""

    def __init__(self, content: BinaryIO):
        self._content, self._utf8 = content, codecs.getincrementaldecoder('utf-8-sig')()
        self._decoder = json.JSONDecoder()
        self._buffer, self._at, self._before = '', 0, 0  # `before`: characters before the buffer

    def peek(self) -> str:
        """Returns the next character that is no space, '' at the end."""
        while True:
            while self._buffer[self._at : self._at + 1] in SPACES and self._at < len(self._buffer):
                self._at += 1
            if self._at < len(self._buffer) or not self._more():
                return self._buffer[self._at : self._at + 1]

    def skip(self) -> None:
        """Skips a character."""
        self._at += 1

    def value(self) -> tuple[Any, str]:
        """Returns the next value, and the start of its text. Raises ValueError for none."""
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._buffer, self._at)
                if end < len(self._buffer) or not self._more():  # a number may go on
                    break
            except json.JSONDecodeError as error:
                open_string = error.msg.startswith('Unterminated string')
                cut = open_string or error.pos > len(self._buffer) - NEAR
                if not (cut and self._more()):
                    self._at = error.pos
                    raise self.error(error.msg) from error
        shown = self._buffer[self._at : self._at + 60]
        self._at = end
        return value, shown

    def error(self, problem: str) -> ValueError:
        """Returns an error with the present position."""
        return ValueError(f'{problem} at character {self._before + self._at:,}')

    def _more(self) -> bool:
        """Reads about as much as is not parsed yet, a block at least; False at the end."""
        n_bytes = max(READ_BYTES, len(self._buffer) - self._at)
        more, ended = '', False
        while not more and not ended:
            block = self._content.read(n_bytes)
            ended = not block
            more = self._utf8.decode(block, final=ended)
        if more:
            self._before += self._at
            self._buffer, self._at = self._buffer[self._at :] + more, 0
        return bool(more)
