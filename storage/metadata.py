"""Content of a step's metadata.json, and its checksum, which COMMIT holds."""

import importlib.metadata
import json
import platform
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

from storage.leaves import HostLeaf, count_chunks

METADATA = 'metadata.json'
VERSION = 2  # of the layout of a step
READABLE = (1, 2)  # layout 1 has no checksums of chunks

Checksums = dict[str, dict[int, str]]  # of chunks by leaf and number, eight hexadecimal digits


def encode_metadata(
    step: int,
    leaves: Iterable[HostLeaf],
    config: Mapping[str, Any] | None,
    data: Mapping[str, Any] | None,
) -> str:
    """Returns the content of metadata.json before the chunks are written."""
    packages = {name: importlib.metadata.version(name) for name in ('jax', 'tensorstore')}
    versions = {'layout': VERSION, 'python': platform.python_version()} | packages
    entries = {leaf.name: leaf.entry for leaf in leaves}
    metadata = {'step': step, 'versions': versions, 'config': config, 'data': data}
    return json.dumps(metadata | {'leaves': entries})


def with_checksums(metadata: str, written: Iterable[Checksums]) -> bytes:
    """Returns the content of metadata.json with the checksums of the chunks of all processes."""
    content = json.loads(metadata)
    found: Checksums = {name: {} for name in content['leaves']}
    for checksums in written:
        for name, of_leaf in checksums.items():
            found[name] |= {int(number): checksum for number, checksum in of_leaf.items()}
    for name, entry in content['leaves'].items():
        n = count_chunks(entry)
        assert found[name].keys() == set(range(n)), f'each chunk of {name} is written once'
        entry['crc32c'] = ''.join(found[name][number] for number in range(n))
    return json.dumps(content, indent=1).encode() + b'\n'


def checksum(metadata: bytes) -> bytes:
    """Returns the content of COMMIT: the crc32 of metadata.json, in hexadecimal."""
    return f'{zlib.crc32(metadata):08x}'.encode()
