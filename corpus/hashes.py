"""Hashes that decide where documents and samples go, the same for ever, and digests of jobs."""

import hashlib
import json
from typing import Any

import numpy as np


def split_of(document: str, validation_share: float, hashed: str = '') -> str:
    """Returns the split of the document with this id. It does not depend on other documents.

    `hashed` is its `document_hash`, where that is there already.
    """
    below = int(hashed or document_hash(document), 16) < validation_share * 2**64
    return 'validation' if below else 'train'


def document_hash(document: str) -> str:
    """Returns 16 hex digits over a document's id, in whose order documents go to validation."""
    name = document.encode('utf-8', 'surrogateescape')  # Linux allows any bytes in a file's name
    return hashlib.blake2b(name, digest_size=8).hexdigest()


def mix(x: np.ndarray) -> np.ndarray:
    """Mixes the bits of each number, uint64 -> uint64: the finalizer of splitmix64."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def digest_of(value: Any) -> str:
    """Returns 32 hex digits over a value that JSON can express."""
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=16).hexdigest()
