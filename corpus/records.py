"""The pieces that files are cut into, and what is read from them: documents and bad records."""

import dataclasses
import json
from typing import Any, NamedTuple

from corpus.files import File


@dataclasses.dataclass(frozen=True)
class Piece:
    """Consecutive records of one file, which belong to one part."""

    file: File
    start: int  # the first row group or byte
    stop: int | None  # the first row group or byte after the piece; None: the end of the file
    first: int  # number of the first record in its file, from 1 up
    size: int  # bytes to read


class Document(NamedTuple):
    """The text of one document, and the id that decides its split."""

    id: str  # the file's name and, in files of many documents, the number of the line or row
    text: str
    n_bytes: int  # length of the text in UTF-8


class Bad(NamedTuple):
    """A record that cannot be read, or several consecutive ones."""

    file: str  # its name
    place: str  # 'line 3' or 'row 3'; '': the file as a whole
    error: str
    count: int = 1  # lost records, as far as they can be counted
    broken: bool = False  # True: nothing after `place` can be read
    lost_bytes: int = 0  # bytes of input whose records cannot be counted

    def message(self, path: str) -> str:
        """Returns a line for the user: the file at `path`, the place, the error, the remedy."""
        if self.broken:
            after = f' after {self.place}' if self.place else ''
            return f'{path} is broken{after} ({self.error}): fetch it again'
        return f'{path}{f", {self.place}" if self.place else ""}: {self.error}: repair or remove it'


class Binary(NamedTuple):
    """A file that is no UTF-8 text, found where files of any ending are read as text."""

    name: str


def json_document(document: str, content: bytes, text_field: str) -> Document:
    """Parses an object with a text. Raises ValueError or RecursionError if it is bad."""
    return text_document(document, json.loads(content.decode()), text_field, content)


def text_document(document: str, record: Any, text_field: str, shown: bytes | str) -> Document:
    """Returns the text in a field of a parsed object; a null is an empty text.

    Raises ValueError, with the start of `shown`, if there is none or it is no UTF-8.
    """
    path = (text_field,)
    if isinstance(record, dict) and text_field not in record:
        path = text_field.split('.')  # of a text inside an object, 'doc.text'
    text = record
    for i, name in enumerate(path):
        if text is None and i:
            break  # a null in place of the object that holds the text
        if not isinstance(text, dict) or name not in text:
            raise ValueError(f'no text in a field {text_field!r} (--text_field) of {shown[:60]!r}')
        text = text[name]
    text = '' if text is None else text
    if not isinstance(text, str):
        raise ValueError(f'no text in a field {text_field!r} (--text_field) of {shown[:60]!r}')
    # encode() raises for half a surrogate pair, which JSON can express and UTF-8 cannot.
    return Document(document, text, len(text.encode()))
