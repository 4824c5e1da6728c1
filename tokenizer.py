"""Tokenizers: tiktoken encodings by name, and a command that trains a vocabulary.

    enc = get_encoding('cl100k_base')                   # any name that tiktoken knows
    enc = get_encoding('bytes')                         # the 256 bytes and <|endoftext|>
    enc = get_encoding('vocab/stdlib-4096.tiktoken')    # a local file with its sidecar

    python tokenizer.py --input='corpus/**/*.txt' --vocab_size=4096 --output=NAME.tiktoken

A trained vocabulary is two files: NAME.tiktoken with a line `base64(token) rank` for each token,
and NAME.json, its sidecar, with the pattern that splits text into pieces, the special tokens, and
the number of lines, which tells when NAME.tiktoken was cut short.
"""

import base64
import glob
import hashlib
import json
import os
import sys
import sysconfig
from collections.abc import Iterable
from typing import TYPE_CHECKING

import numpy as np
import tiktoken
from absl import app, flags

from config import ConfigError

if TYPE_CHECKING:
    import tokenizers

END_OF_TEXT = '<|endoftext|>'

# cl100k's pattern without its possessive quantifiers, which the trainer's regex engine reads
# differently, and without its rule for contractions, which splits 'self' into 's and elf.
PATTERN = r'[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'

_SIDECAR_HELP = (
    'a JSON object like {"pattern": "\\\\p{L}+|\\\\p{N}{1,3}|[^\\\\p{L}\\\\p{N}]+", '
    '"special_tokens": {"<|endoftext|>": 100257}}: the regular expression that cuts text into '
    'pieces, and the id of each special token'
)


def get_encoding(name: str) -> tiktoken.Encoding:
    """Returns the encoding `name`: 'bytes', the path of a .tiktoken file, or one of tiktoken's.

    A relative path is looked up from the working directory, then from the folder of this file.
    Raises ConfigError if there is no such encoding, or if its files are missing or corrupt.
    """
    if name == 'bytes':
        return tiktoken.Encoding(
            name,
            pat_str=r'[\s\S]{1,256}',
            mergeable_ranks={bytes([i]): i for i in range(256)},
            special_tokens={END_OF_TEXT: 256},
        )
    if name.endswith('.tiktoken'):
        return _local_encoding(name)
    if name not in tiktoken.list_encoding_names():
        known = ', '.join(sorted(tiktoken.list_encoding_names()))
        raise ConfigError(
            f'no encoding is called {name!r}: use bytes, the path of a .tiktoken file, '
            f'or one of {known}'
        )
    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:  # no network, or a download with a wrong checksum
        raise ConfigError(
            f'tiktoken could not fetch the vocabulary of {name!r} ({type(error).__name__}: '
            f'{error}). Without network, set TIKTOKEN_CACHE_DIR to a cache folder of tiktoken '
            'that holds it, filled on a machine with network, or name a local .tiktoken file'
        ) from error


def token_bytes(enc: tiktoken.Encoding) -> np.ndarray:
    """Returns how many bytes of text each id stands for, int32 [n_vocab].

    Special and unused ids stand for 0.
    """
    out = np.zeros(enc.n_vocab, np.int32)
    for i, token in _tokens(enc):
        out[i] = len(token)
    return out


def fingerprint(enc: tiktoken.Encoding) -> str:
    """Returns 32 hex digits over all that decides the ids: pattern, tokens, special tokens."""
    special = sorted((enc.encode_single_token(s), s) for s in enc.special_tokens_set)
    tokens = [(i, token.hex()) for i, token in _tokens(enc)]
    content = json.dumps([enc._pat_str, special, tokens])
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def _tokens(enc: tiktoken.Encoding) -> list[tuple[int, bytes]]:
    """Returns (id, bytes) of each token that is not special, ordered by id; ids may have gaps."""
    return sorted((enc.encode_single_token(token), token) for token in enc.token_byte_values())


def _local_encoding(name: str) -> tiktoken.Encoding:
    """Returns the encoding of a .tiktoken file and its sidecar. Raises as `get_encoding`."""
    beside = os.path.join(os.path.dirname(os.path.abspath(__file__)), name)
    path = name if os.path.exists(name) else beside
    if not os.path.exists(path):
        raise ConfigError(
            f'there is no vocabulary {name!r}, neither in {os.getcwd()} nor in '
            f'{os.path.dirname(os.path.abspath(__file__))}: give the path of a .tiktoken file, '
            'or train one with python tokenizer.py'
        )
    pattern, special_tokens, n_tokens = _read_sidecar(path)
    ranks = _read_ranks(path)
    if n_tokens is not None and len(ranks) != n_tokens:
        raise ConfigError(
            f'{path} ends at line {len(ranks)}, but its sidecar counts {n_tokens} tokens: fetch '
            'or write both files again'
        )
    ids = [*ranks.values(), *special_tokens.values()]
    if len(set(ids)) < len(ids):
        raise ConfigError(
            f'{path}: special tokens need ids of their own, but {special_tokens} repeats an id '
            f'or takes one of the vocabulary: use ids from {max(ranks.values()) + 1} up'
        )
    try:
        return tiktoken.Encoding(
            name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens
        )
    except ValueError as error:  # the regex engine rejects the pattern
        raise ConfigError(f'{path}: tiktoken refuses the vocabulary: {error}') from error


def _read_sidecar(path: str) -> tuple[str, dict[str, int], int | None]:
    """Returns pattern, special tokens, and the number of other tokens if the sidecar has it."""
    sidecar = path.removesuffix('.tiktoken') + '.json'
    try:
        with open(sidecar, encoding='utf-8') as f:
            content = json.load(f)
        pattern, special_tokens = content['pattern'], content['special_tokens']
        n_tokens = content.get('n_tokens')
        if not isinstance(pattern, str) or not all(
            isinstance(i, int) and i >= 0 for i in special_tokens.values()
        ):
            raise TypeError('the pattern is a string, the ids are integers from 0 up')
    except FileNotFoundError as error:
        raise ConfigError(f'{path} needs {sidecar} beside it, {_SIDECAR_HELP}') from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f'{sidecar} is not valid ({type(error).__name__}: {error}): write {_SIDECAR_HELP}'
        ) from error
    return pattern, special_tokens, n_tokens


def _read_ranks(path: str) -> dict[bytes, int]:
    """Returns {token: id} of a .tiktoken file. Raises ConfigError, with the line, if it is bad."""
    ranks: dict[bytes, int] = {}
    taken: set[int] = set()
    with open(path, 'rb') as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                encoded, digits = line.split()
                token, rank = base64.b64decode(encoded, validate=True), int(digits)
            except ValueError as error:
                raise ConfigError(
                    f'{path}, line {number}: a line is `base64(token) rank`, not {line!r}: '
                    'fetch or write the file again'
                ) from error
            if token in ranks or rank in taken or rank < 0:
                raise ConfigError(
                    f'{path}, line {number}: tokens and ranks (from 0 up) are distinct, but '
                    f'{line!r} is not: fetch or write the file again'
                )
            ranks[token] = rank
            taken.add(rank)
    missing = [i for i in range(256) if bytes([i]) not in ranks]
    if missing:
        raise ConfigError(
            f'{path}: a byte-level vocabulary holds all 256 single bytes, here {len(missing)} are '
            f'missing, first {missing[0]:#04x}: the file is cut short or of another kind'
        )
    return ranks


# ---------------------------------------------------------------------------------------------
# Training a vocabulary
# ---------------------------------------------------------------------------------------------


def stdlib_files() -> tuple[list[tuple[str, str]], int]:
    """Returns (name, path) of the source files of the running Python's standard library.

    A name is the path relative to the library, with '/'; the files are ordered by name. Leaves out
    tests, and files that differ between machines. Also returns the number of files left out because
    they are not UTF-8. Raises ConfigError if this Python has no source.
    """
    root = sysconfig.get_path('stdlib')
    skip = {'test', 'tests', 'idle_test', 'site-packages', 'dist-packages', '__pycache__'}
    found, skipped = [], 0
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in skip]
        for name in names:
            path = os.path.join(folder, name)
            # _sysconfigdata_*.py holds the paths and flags of this one machine's build.
            if not name.endswith('.py') or name.startswith('_sysconfigdata_'):
                continue
            try:
                _read_text(path)
            except ConfigError:
                skipped += 1
                continue
            found.append((os.path.relpath(path, root).replace(os.sep, '/'), path))
    if not found:
        raise ConfigError(
            f'this Python has no source of its standard library in {root}: use one that has'
        )
    return sorted(found), skipped


def train(texts: Iterable[str], vocab_size: int, output: str) -> tiktoken.Encoding:
    """Trains a byte-level BPE of `vocab_size` ids (with <|endoftext|>) and writes `output`.

    Returns its encoding. Raises ConfigError for a bad output, size or text, and ValueError if
    tiktoken and the trainer encode one of the texts differently.

    tiktoken merges any two neighbours that together are a token; the trainer merges only the pairs
    that it learned. They give the same ids: when a token was learned, its text was split into
    exactly that pair after all earlier merges, and merges inside a stretch of text do not depend on
    its surroundings, so no other split of it occurs. This assumes the trainer's merges and ranks,
    complete and in their order. The end of this function checks it on the texts.
    """
    if not output.endswith('.tiktoken'):
        raise ConfigError(f'the output ends in .tiktoken, but is {output!r}')
    if os.path.exists(output):
        raise ConfigError(f'{output} exists: remove it or choose another name')
    texts = list(texts)
    trained = learn_merges(texts, vocab_size)
    byte_of = _byte_of_character()
    ranks = {bytes(byte_of[c] for c in token): rank for token, rank in trained.get_vocab().items()}
    _write_vocabulary(output, ranks, {END_OF_TEXT: vocab_size - 1})

    enc = get_encoding(output)
    for text in texts:
        if enc.encode_ordinary(text) != trained.encode(text).ids:
            raise ValueError(
                f'tiktoken and the trainer encode the text {text[:60]!r}... differently with '
                f'{output}: do not use it, and report the two versions and the text'
            )
    return enc


def learn_merges(texts: list[str], vocab_size: int) -> 'tokenizers.Tokenizer':
    """Trains the trainer's own tokenizer: vocab_size - 1 ids, the bytes and then the merges.

    Raises ConfigError if there is too little text, or if `tokenizers` is not installed.
    """
    if vocab_size < 257:
        raise ConfigError(
            f'vocab_size={vocab_size} is below 257, the 256 bytes and {END_OF_TEXT}: use more'
        )
    try:
        from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
    except ImportError as error:
        raise ConfigError(
            'training a vocabulary needs tokenizers: pip install -r requirements/tokenizer.txt'
        ) from error

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PATTERN), behavior='isolated'),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() < vocab_size - 1:
        raise ConfigError(
            f'the text has no more pairs to merge after {tokenizer.get_vocab_size() + 1} of '
            f'{vocab_size} tokens: give more text or a smaller vocab_size'
        )
    return tokenizer


def _byte_of_character() -> dict[str, int]:
    """Returns the byte that each character of the trainer's byte-level alphabet stands for.

    Printable Latin-1 characters stand for themselves, the characters from 256 on for the other
    bytes in order.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def _write_vocabulary(path: str, ranks: dict[bytes, int], special_tokens: dict[str, int]) -> None:
    """Writes the sidecar and then the .tiktoken file."""
    os.makedirs(os.path.dirname(path) or '.', exist_ok=True)
    with open(path.removesuffix('.tiktoken') + '.json', 'w', encoding='utf-8') as f:
        sidecar = {
            'pattern': PATTERN,
            'special_tokens': special_tokens,
            'n_tokens': len(ranks),
        }
        json.dump(sidecar, f, indent=2)
        f.write('\n')
    with open(path, 'wb') as f:
        for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
            f.write(base64.b64encode(token) + b' %d\n' % rank)


def _read_text(path: str) -> str:
    """Returns the content of a text file. Raises ConfigError if it is not UTF-8."""
    with open(path, 'rb') as f:
        content = f.read()
    try:
        return content.decode('utf-8')
    except UnicodeDecodeError as error:
        raise ConfigError(f'{path} is not UTF-8 text: {error}') from error


# ---------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------


def _define_flags() -> None:
    flags.DEFINE_list('input', None, "globs of text files, or 'stdlib' for Python's own source")
    flags.DEFINE_integer('vocab_size', 4096, f'number of ids, with 256 bytes and {END_OF_TEXT}')
    flags.DEFINE_string('output', None, 'the .tiktoken file to write; its sidecar goes beside it')
    flags.mark_flags_as_required(['input', 'output'])


def _input_files(patterns: Iterable[str]) -> list[str]:
    """Returns the paths that the globs match, each once; 'stdlib' means the standard library."""
    paths: dict[str, None] = {}
    for pattern in patterns:
        if pattern == 'stdlib':
            matches = [path for _, path in stdlib_files()[0]]
        else:
            matches = [p for p in sorted(glob.glob(pattern, recursive=True)) if os.path.isfile(p)]
        if not matches:
            raise ConfigError(f'no file matches --input={pattern}: check the pattern')
        paths.update(dict.fromkeys(matches))
    return list(paths)


def main(_: list[str]) -> None:
    args = flags.FLAGS
    try:
        texts = [_read_text(path) for path in _input_files(args.input)]
        enc = train(texts, args.vocab_size, args.output)
    except (ConfigError, OSError) as error:
        sys.exit(str(error))
    size = sum(len(text.encode()) for text in texts)
    tokens = sum(len(enc.encode_ordinary(text)) for text in texts)
    print(
        f'{args.output}: {enc.n_vocab} ids from {len(texts)} files, {size / 1e6:.1f} MB, '
        f'{size / tokens:.2f} bytes per token',
        file=sys.stderr,
    )


if __name__ == '__main__':
    _define_flags()
    app.run(main)
