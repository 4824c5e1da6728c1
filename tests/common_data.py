"""Corpora, prepared folders and what they hold, for several test files."""

import gzip
import json
import os
import pathlib
import random
from collections.abc import Callable
from typing import Any

import pytest

from corpus.files import File, find_files
from corpus.prepare import Job, prepare
from corpus.shards import Split, manifest_digest

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SHIPPED = 'vocab/stdlib-4096.tiktoken'  # the vocabulary that comes with the project
PART_BYTES = 5000  # of `prepared_corpus`, which has 12 parts then


def make_corpus(folder: pathlib.Path) -> dict[str, str]:
    """Writes files of all local kinds below `folder`; returns each document's text by its id."""
    rng = random.Random(0)

    def text() -> str:
        pieces = [*'abc é\n(=東', '<|endoftext|>']
        return ''.join(rng.choices(pieces, k=rng.randint(1, 500)))

    texts = {f'{kind}/{i}.{kind}': text() for kind in ('txt', 'py', 'md') for i in range(12)}
    for name, content in texts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content.encode())
    (folder / 'txt/empty.txt').write_bytes(b'')
    for name in ('lines.jsonl', 'sub/lines.jsonl.gz'):
        (folder / name).parent.mkdir(exist_ok=True)
        records = {f'{name.removesuffix(".gz")}:{i}': text() for i in range(1, 40)}
        lines = as_lines(list(records.values()))
        (folder / name).write_bytes(gzip.compress(lines) if name.endswith('.gz') else lines)
        texts |= records
    return texts


def prepared_corpus(
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[dict[str, str], str, list[File]]:
    """Returns (texts by id, prepared folder, files), of many parts, a quarter for validation."""
    folder = tmp_path_factory.mktemp('corpus')
    texts = make_corpus(folder)
    files = find_files([f'{folder}/**/*'])
    output = str(tmp_path_factory.mktemp('tokens') / 'one')
    prepare(files, Job(output, SHIPPED, 0.25), part_bytes=PART_BYTES)
    return texts, output, files


def prepared(
    folder: pathlib.Path, texts: dict[str, str], tokenizer: str = 'bytes', share: float = 0.0
) -> str:
    """Prepares texts, by file name, in parts of about 1000 bytes; returns the prepared folder."""
    files = []
    for name, text in texts.items():
        path = folder / 'input' / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(text.encode())
        files.append(File(name, str(path)))
    output = str(folder / 'tokens')
    prepare(files, Job(output, tokenizer, share), part_bytes=1000)
    return output


def split_of_length(folder: pathlib.Path, n: int) -> Split:
    """Returns a training split of n tokens, bytes and ends of text, over shards of 700 tokens."""
    texts = {}
    for i in range(0, n, 700):
        size = min(700, n - i) - 1
        texts[f'{i:06d}.txt'] = ''.join(chr(33 + (i + j) * 7 % 90) for j in range(size))
    assert min(map(len, texts.values())) > 0
    split = Split(prepared(folder, texts), 'train')
    assert split.n_tokens == n
    return split


def rewrite_manifest(
    folder: str, change: Callable[[dict[str, Any]], object], signed: bool = True
) -> None:
    """Applies a change to the manifest of a prepared folder; with a fitting digest if `signed`."""
    path = pathlib.Path(folder, 'manifest.json')
    manifest = json.loads(path.read_text())
    change(manifest)
    if signed:
        manifest['digest'] = manifest_digest(manifest)
    path.write_text(json.dumps(manifest))


def contents(folder: str | pathlib.Path) -> dict[str, bytes]:
    """Returns the bytes of all files below a folder, by their relative path."""
    paths = [path for path in pathlib.Path(folder).rglob('*') if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def swap(a: pathlib.Path, b: pathlib.Path) -> None:
    """Exchanges two files or folders."""
    rest = a.with_name('rest')
    a.rename(rest)
    b.rename(a)
    rest.rename(b)


def damage(folder: pathlib.Path, rng: random.Random) -> str:
    """Does something to a file or folder below, or two, and says what."""
    kind = rng.choice(['flip'] * 6 + ['cut', 'grow', 'remove', 'swap', 'copy', 'zeros'])
    found = [p for p in sorted(folder.rglob('*')) if kind in ('swap', 'copy') or p.is_file()]
    path = rng.choice(found)
    other = rng.choice([p for p in found if p.is_file() == path.is_file()])
    content = path.read_bytes() if path.is_file() else b''
    at = rng.randrange(len(content)) if content else 0
    if kind == 'swap' and not ({path, *path.parents} & {other, *other.parents} & {path, other}):
        swap(path, other)
    elif kind == 'copy' and path.is_file():
        other.write_bytes(content)
    elif kind == 'remove':
        path.unlink()
    elif content:
        flipped = content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]
        zeros = content[:at] + bytes(len(content) - at)
        changes = {'flip': flipped, 'cut': content[:at], 'grow': content + b'0', 'zeros': zeros}
        path.write_bytes(changes.get(kind, content))
    return f'{kind} {path} {other}'


def some_texts(n: int = 200) -> list[str]:
    """Returns n random texts of up to 300 characters, with breaks, NULs and several bytes each."""
    rng = random.Random(1)
    return [''.join(rng.choices('abc é\n\r(=東\0', k=rng.randint(0, 300))) for _ in range(n)]


def as_lines(texts: list[str]) -> bytes:
    """Returns the content of a .jsonl file with these texts."""
    return ''.join(json.dumps({'id': 1, 'text': text}) + '\n' for text in texts).encode()


def write_formats(folder: pathlib.Path, texts: list[str]) -> None:
    """Writes the texts in each format of many documents: a.jsonl to f.parquet."""
    pa, pq = pytest.importorskip('pyarrow'), pytest.importorskip('pyarrow.parquet')
    pack = pytest.importorskip('zstandard').ZstdCompressor().compress
    lines = as_lines(texts)
    (folder / 'a.jsonl').write_bytes(lines)
    (folder / 'b.jsonl.gz').write_bytes(gzip.compress(lines[:999]) + gzip.compress(lines[999:]))
    (folder / 'c.jsonl.zst').write_bytes(pack(lines[:999]) + pack(lines[999:]))
    table = pa.table({'id': ['noise' * 50 for _ in texts], 'text': texts})
    pq.write_table(table, folder / 'd.parquet', row_group_size=30)
    coded = pa.table({'text': pa.array(texts).dictionary_encode()})
    pq.write_table(coded, folder / 'e.parquet', row_group_size=1000)
    large = pa.table({'text': pa.array(texts, pa.large_string())})
    pq.write_table(large, folder / 'f.parquet', row_group_size=7, compression='zstd')
