"""Reads the documents of tar archives, a member each, as they stream by.

WebDataset's shards hold samples: consecutive members whose names are alike up to the first dot
behind the folder. Where a sample has a text, its .json member describes it and is no document.
"""

import itertools
import posixpath
import tarfile
from collections.abc import Iterator
from typing import NamedTuple

from corpus.compression import decompressed
from corpus.files import FILE_KINDS, JSON_KINDS, has_kind, open_file, unpacked
from corpus.records import Bad, Binary, Document, Piece, json_document
from corpus.text_files import cut_short, is_binary, text_of


class BrokenTarError(ValueError):
    """A tar archive is damaged or cut short."""


def _header_class() -> type[tarfile.TarInfo]:
    """Returns the class of the headers of one archive, which raises BrokenTarError for damage.

    tarfile takes a damaged header, but for the first, and a missing end mark for the end.
    """

    class Header(tarfile.TarInfo):
        ended = False  # the last block was an end mark

        @classmethod
        def frombuf(cls, buf: bytes, encoding: str, errors: str) -> tarfile.TarInfo:
            try:
                header = super().frombuf(buf, encoding, errors)
            except tarfile.HeaderError as error:
                if buf and not any(buf) and len(buf) == tarfile.BLOCKSIZE:
                    cls.ended = True
                elif buf or not cls.ended:
                    problem = f'a bad header: {error}' if buf else 'it is cut short, with no end'
                    raise BrokenTarError(problem) from error
                raise
            cls.ended = False
            return header

    return Header


class _Member(NamedTuple):
    """A file of an archive."""

    name: str
    content: bytes

    @property
    def sample(self) -> str:
        """The name that the members of a sample share."""
        folder, name = posixpath.split(self.name)
        return f'{folder}/{name.partition(".")[0]}'


def members(piece: Piece, text_field: str) -> Iterator[Document | Bad | Binary]:
    """Yields the documents of the members: text files, and JSON objects with a text.

    If the archive is read as text, all members are text files, and others binary. An id is the
    archive's name and the member's. Names that start with a dot are left out.
    """
    file, place = piece.file, ''
    with open_file(file) as raw:
        content, errors = decompressed(raw, file.name)
        try:
            # Archives may stand one after the other, so an end mark is not the end.
            with tarfile.open(
                fileobj=content, mode='r|', tarinfo=_header_class(), ignore_zeros=True
            ) as archive:
                found = _files(archive, file.as_text)
                for _, sample in itertools.groupby(found, lambda member: member.sample):
                    for member in _texts(list(sample), file.as_text):
                        place = f'member {member.name}'
                        yield _document(piece, member, text_field)
        except (*errors, tarfile.TarError, BrokenTarError) as error:
            yield cut_short(file, raw, place, error)


def _files(archive: tarfile.TarFile, as_text: bool) -> Iterator[_Member]:
    """Yields the files of an archive that may hold text. Raises as tarfile, or BrokenTarError."""
    for header in archive:
        name = header.name.removeprefix('./')
        hidden = any(part.startswith('.') for part in name.split('/'))
        if header.isreg() and not hidden and (as_text or has_kind(name, FILE_KINDS + JSON_KINDS)):
            yield _Member(name, archive.extractfile(header).read())
        archive.members = []  # which tarfile would keep, a kilobyte each


def _texts(sample: list[_Member], as_text: bool) -> list[_Member]:
    """Returns the members of a sample that are documents."""
    texts = [member for member in sample if has_kind(member.name, FILE_KINDS)]
    return sample if as_text else texts or sample


def _document(piece: Piece, member: _Member, text_field: str) -> Document | Bad | Binary:
    """Returns the text of a member, or what is wrong with it."""
    file = piece.file
    document, place = f'{unpacked(file.name)}:{member.name}', f'member {member.name}'
    if file.as_text and is_binary(member.content):
        return Binary(member.name)
    if file.as_text or has_kind(member.name, FILE_KINDS):
        return text_of(document, file.name, place, member.content)
    try:
        return json_document(document, member.content, text_field)
    except (ValueError, RecursionError) as error:
        return Bad(file.name, place, str(error))
