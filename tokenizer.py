"""Tokenizers: encodings by name, and a command that trains or converts a vocabulary.

    enc = get_encoding('cl100k_base')                   # any name that tiktoken knows
    enc = get_encoding('bytes')                         # the 256 bytes and <|endoftext|>
    enc = get_encoding('vocab/stdlib-4096.tiktoken')    # a local file with its sidecar
    enc = get_encoding('DIR/tokenizer.json')            # Hugging Face's (corpus/hub_tokenizer.py)

    python tokenizer.py --input=corpus --vocab_size=4096 --output=NAME.tiktoken
    python tokenizer.py --from_hf=DIR/tokenizer.json --output=NAME.tiktoken

A vocabulary of your own is two files (corpus/vocabulary_files.py): NAME.tiktoken with the tokens,
and NAME.json, its sidecar, with the pattern that splits text into pieces and the special tokens.
"""

if __name__ == '__main__':  # before the imports that take seconds
    from machine import startup

    startup.quick_interrupts()

import hashlib
import json
import os
import sys
import sysconfig
from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import tiktoken
from absl import flags

from config import ConfigError
from corpus import hub_tokenizer
from corpus.vocabulary_files import read_ranks, read_sidecar, write_vocabulary
from machine import command
from machine.progress import interruptible, interruption, track

if TYPE_CHECKING:
    import tokenizers

END_OF_TEXT = '<|endoftext|>'

PIECE = 512  # characters; training cuts a longer piece, since its time grows with their square

# cl100k's pattern without its possessive quantifiers, which the trainer's regex engine reads
# differently, and without its rule for contractions, which splits 'self' into 's and elf.
PATTERN = r'[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+'

# Characters of all kinds, to try a pattern with: letters, digits, punctuation, symbols, combining
# marks, controls, spaces, formats, private use, unassigned, beyond 16 bits.
_KINDS_OF_CHARACTERS = (
    'aZéßǅΩжʰ東한あع0٣Ⅷ²½_-([])}«».,!?;:\'"#%&*@/\\$+<=>|~^`°©→€'
    '\u0301\u0903\u20dd\t\n\r\v\f\0\x1b\x7f\x85\xa0\u2028\u2029\u3000 '
    '\u200d\ufeff\ue000\u0378\U0001f642\U000e0001\U0010ffff'
)


def get_encoding(name: str) -> tiktoken.Encoding:
    """Returns the encoding `name`: 'bytes', a .tiktoken or .json file, or one of tiktoken's.

    A .json file is a tokenizer.json of Hugging Face's tokenizers. A relative path is looked up from
    the working directory, then from the folder of this file. Raises ConfigError if there is no such
    encoding, if its files are missing or corrupt, or if it loses text.
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
    if name.endswith('.json'):
        path = _found(name)
        return _checked(hub_tokenizer.read(name, path), path)
    if name not in tiktoken.list_encoding_names():
        known = ', '.join(sorted(tiktoken.list_encoding_names()))
        raise ConfigError(
            f'no encoding is called {name!r}: use bytes, the path of a .tiktoken file or of a '
            f'tokenizer.json, or one of {known}'
        )
    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:  # no network, or a download with a wrong checksum
        raise ConfigError(
            f'tiktoken could not fetch the vocabulary of {name!r} ({type(error).__name__}: '
            f'{error}). Without network, set TIKTOKEN_CACHE_DIR to a cache folder of tiktoken '
            'that holds it, filled on a machine with network, or name a local .tiktoken file'
        ) from error


class LocalEncoding(tiktoken.Encoding):
    """A tiktoken encoding whose end of a document has another name, or with tokens in any text.

    `end_of_text` names the special token that ends a document. The special tokens in `in_text` are
    part of the text: whoever encodes finds them, and a model may sample them.
    """

    def __init__(self, name: str, end_of_text: str, in_text: Collection[str], **more: Any):
        super().__init__(name, **more)
        self.end_of_text, self.in_text = end_of_text, frozenset(in_text)

    @property
    def eot_token(self) -> int:
        return self.encode_single_token(self.end_of_text)

    def __getstate__(self) -> dict[str, Any]:
        own = {'end_of_text': self.end_of_text, 'in_text': self.in_text}
        return {**super().__getstate__(), **own}


def end_of_text(enc: tiktoken.Encoding) -> str | None:
    """Returns the name of the token that ends a document, or None if there is none."""
    name = getattr(enc, 'end_of_text', END_OF_TEXT)
    return name if name in enc.special_tokens_set else None


def in_text(enc: tiktoken.Encoding) -> frozenset[str]:
    """Returns the names of the added tokens that any text may hold."""
    return getattr(enc, 'in_text', frozenset())


def encode(enc: tiktoken.Encoding, text: str, n_bytes: int | None = None) -> np.ndarray:
    """Returns the ids of a text, uint32 [n]; '<|endoftext|>' in it is ordinary text.

    `n_bytes` is the length of the text in UTF-8, which is counted if it is not given.

    Raises ConfigError if tiktoken cannot encode the text (a megabyte of spaces is too long for its
    regex engine), or if the ids stand for less than the whole text.
    """
    ids = _ids(enc, text)
    if isinstance(enc, hub_tokenizer.HubEncoding):  # whose normalizer may change the text
        kept, whole = enc.kept(text, ids)
    else:
        kept = int(np.add.reduce(cached_token_bytes(enc).take(ids)))
        whole = len(text.encode()) if n_bytes is None else n_bytes
    if kept != whole:  # what the pattern does not match, tiktoken leaves out
        raise ConfigError(
            f'the tokenizer keeps {kept:,} of its {whole:,} bytes: it leaves text out'
        )
    return ids


def _ids(enc: tiktoken.Encoding, text: str) -> np.ndarray:
    """Returns tiktoken's ids of a text, uint32 [n]. Raises ConfigError if it cannot encode it."""
    try:
        return enc.encode_to_numpy(text, allowed_special=in_text(enc), disallowed_special=())
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # a panic of tiktoken is no Exception
        raise ConfigError(f'the tokenizer cannot encode it ({error})') from error


_kept_lengths: list[tuple[tiktoken.Encoding, np.ndarray]] = []  # of the encoding used last


def cached_token_bytes(enc: tiktoken.Encoding) -> np.ndarray:
    """Returns `token_bytes`, kept for the next text."""
    for kept, lengths in _kept_lengths:
        if kept is enc:
            return lengths
    lengths = token_bytes(enc).astype(np.int64)  # which numpy adds without a conversion
    _kept_lengths[:] = [(enc, lengths)]  # no lru_cache, which Ray cannot send to machines
    return lengths


def token_bytes(enc: tiktoken.Encoding) -> np.ndarray:
    """Returns how many bytes of text each id stands for, int32 [n_vocab].

    Unused ids, and special ones that are not part of any text, stand for 0.
    """
    out = np.zeros(enc.n_vocab, np.int32)
    for i, token in _tokens(enc):
        out[i] = len(token)
    for name in in_text(enc):
        out[enc.encode_single_token(name)] = len(name.encode())
    return out


def fingerprint(enc: tiktoken.Encoding) -> str:
    """Returns 32 hex digits over all that decides the ids: pattern, tokens, special tokens."""
    if isinstance(enc, hub_tokenizer.HubEncoding):
        return enc.fingerprint()
    special = sorted((enc.encode_single_token(s), s) for s in enc.special_tokens_set)
    tokens = [(i, token.hex()) for i, token in _tokens(enc)]
    named = [enc.end_of_text, sorted(enc.in_text)] if isinstance(enc, LocalEncoding) else []
    content = json.dumps([enc._pat_str, special, tokens, *named])
    return hashlib.blake2b(content.encode(), digest_size=16).hexdigest()


def same_ids(a: tiktoken.Encoding, b: tiktoken.Encoding) -> bool:
    """Returns True if ids mean the same in both: if the fingerprints are equal, or if one is a
    tokenizer.json and the other a tiktoken encoding with the same tokens, as of a conversion."""
    if fingerprint(a) == fingerprint(b):
        return True
    kinds = {isinstance(enc, hub_tokenizer.HubEncoding) for enc in (a, b)}
    return len(kinds) == 2 and _meaning(a) == _meaning(b)


def _meaning(enc: tiktoken.Encoding) -> tuple:
    """Returns the tokens by id, and what is said of the special ones."""
    special = {enc.encode_single_token(name): name.encode() for name in enc.special_tokens_set}
    return dict(_tokens(enc)) | special, set(special), end_of_text(enc), in_text(enc)


def _tokens(enc: tiktoken.Encoding) -> list[tuple[int, bytes]]:
    """Returns (id, bytes) of each token that is not special, ordered by id; ids may have gaps."""
    if isinstance(enc, hub_tokenizer.HubEncoding):
        return enc.tokens()
    return sorted((i, token) for token, i in enc._mergeable_ranks.items())


def _found(name: str) -> str:
    """Returns the path of a vocabulary's file. Raises ConfigError if there is none."""
    beside = os.path.join(os.path.dirname(os.path.abspath(__file__)), name)
    path = os.path.expanduser(name)
    path = path if os.path.exists(path) else beside
    if not os.path.exists(path):
        folders = dict.fromkeys([os.getcwd(), os.path.dirname(os.path.abspath(__file__))])
        raise ConfigError(
            f'there is no vocabulary {name!r} in {" or ".join(folders)}: give the path of a '
            '.tiktoken file, or train one with python tokenizer.py'
        )
    return path


def _local_encoding(name: str) -> tiktoken.Encoding:
    """Returns the encoding of a .tiktoken file and its sidecar. Raises as `get_encoding`."""
    path = _found(name)
    try:
        pattern, special_tokens, n_tokens, more = read_sidecar(path)
        ranks = read_ranks(path)
    except OSError as error:
        raise ConfigError(
            f'{error.filename} cannot be read ({error.strerror}): name a file that can'
        ) from error
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
    return checked_encoding(name, path, pattern, ranks, special_tokens, **more)


def checked_encoding(
    name: str,
    path: str,
    pattern: str,
    ranks: dict[bytes, int],
    special_tokens: dict[str, int],
    **more: Any,
) -> tiktoken.Encoding:
    """Returns an encoding whose pattern loses no text. Raises ConfigError, naming the path.

    `more` are the further arguments of a LocalEncoding.
    """
    kind = LocalEncoding if more else tiktoken.Encoding
    try:
        enc = kind(
            name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special_tokens, **more
        )
    except ValueError as error:  # the regex engine rejects the pattern
        raise ConfigError(f'{path}: tiktoken refuses the vocabulary: {error}') from error
    return _checked(enc, path)


def _checked(enc: tiktoken.Encoding, path: str) -> tiktoken.Encoding:
    """Returns an encoding that gives all kinds of text back. Raises ConfigError with the path."""
    pairs = ''.join(a + b for a in _KINDS_OF_CHARACTERS for b in _KINDS_OF_CHARACTERS)
    runs = [c * n for c in _KINDS_OF_CHARACTERS for n in (1, 2, 40)]
    for text in (*runs, pairs):
        if problem := _loss(enc, text):
            raise ConfigError(f'{path}: {problem}')
    return enc


def _loss(enc: tiktoken.Encoding, text: str) -> str:
    """Returns what an encoding loses of a text, with the remedy, or ''."""
    is_hub = isinstance(enc, hub_tokenizer.HubEncoding)
    try:
        ids = encode(enc, text) if is_hub else _ids(enc, text)
        kept = enc.decode_bytes(ids.tolist())
        if is_hub or kept == text.encode():  # a normalizer of its own may change the text
            return ''
        problem = f'comes back as {kept[:20]!r}'
    except ConfigError as error:
        problem = str(error)
    if is_hub:
        return (
            f'it does not give text back. Of {text[:20]!r}: {problem}. Use a tokenizer that keeps '
            'all text: a byte-level one, or one with byte_fallback'
        )
    return (
        f'the pattern {enc._pat_str!r} does not give text back. Of {text[:20]!r}: {problem}. Let '
        'it match every character, for example by |[\\s\\S] at its end'
    )


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


def train(
    texts: Iterable[str], vocab_size: int, output: str, names: Sequence[str] = ()
) -> tiktoken.Encoding:
    """Trains a byte-level BPE of `vocab_size` ids (with <|endoftext|>) and writes `output`.

    Returns its encoding. Raises ConfigError for a bad output, size or text, which `names` name, and
    ValueError if tiktoken and the trainer encode one of the texts differently.

    tiktoken merges any two neighbours that together are a token; the trainer merges only the pairs
    that it learned. They give the same ids: when a token was learned, its text was split into
    exactly that pair after all earlier merges, and merges inside a stretch of text do not depend on
    its surroundings, so no other split of it occurs. This assumes the trainer's merges and ranks,
    complete and in their order. The end of this function checks it on the texts.
    """
    _check_output(output)
    texts = list(texts)
    names = [*names, *(f'text {i}' for i in range(len(names), len(texts)))]
    ranks = {bytes([i]): i for i in range(256)}
    alphabet = checked_encoding(output, 'tokenizer.PATTERN', PATTERN, ranks, {})
    named = list(zip(names, texts, strict=True))
    for name, text in track(named, 'splitting texts', len(named)):
        _encode_named(alphabet, text, name)  # before the training, which takes longer
    trained = learn_merges(texts, vocab_size)
    byte_of = hub_tokenizer.byte_of_character()
    ranks = {bytes(byte_of[c] for c in token): rank for token, rank in trained.get_vocab().items()}
    special_tokens = {END_OF_TEXT: vocab_size - 1}
    enc = checked_encoding(output, output, PATTERN, ranks, special_tokens)
    for name, text in track(named, 'checking the vocabulary', len(named)):
        if _encode_named(enc, text, name).tolist() != trained.encode(text).ids:
            raise ValueError(
                f'tiktoken and the trainer encode {name} differently with the trained vocabulary: '
                'report the two versions and the text'
            )
    write_vocabulary(output, {'pattern': PATTERN, 'special_tokens': special_tokens}, ranks)
    return get_encoding(output)


def _encode_named(enc: tiktoken.Encoding, text: str, name: str) -> np.ndarray:
    """Returns the ids of a text. Raises ConfigError with the text's name."""
    try:
        return encode(enc, text)
    except ConfigError as error:
        raise ConfigError(f'{name}: {error}: leave it out of --input') from error


def _check_output(output: str, endings: tuple[str, ...] = ('.tiktoken',)) -> None:
    """Makes the output's folder. Raises ConfigError if the output cannot be written."""
    if not output.endswith(endings):
        raise ConfigError(
            f'--output={output} is no name of a vocabulary: let it end in '
            f'{" or ".join(endings)}, as in mine{endings[0]}'
        )
    if os.path.exists(output):
        raise ConfigError(f'--output={output} exists: remove it or choose another name')
    folder = os.path.dirname(output) or '.'
    try:
        os.makedirs(folder, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f'--output={output} cannot be written ({error.strerror}: {error.filename}): choose '
            'another folder'
        ) from error
    if not os.access(folder, os.W_OK):
        raise ConfigError(
            f'--output={output} cannot be written: its folder is not writable; choose another one'
        )


def learn_merges(texts: list[str], vocab_size: int) -> 'tokenizers.Tokenizer':
    """Trains the trainer's own tokenizer: vocab_size - 1 ids, the bytes and then the merges.

    Pieces of more than PIECE characters (DNA, base64, minified code) are cut for the training
    alone: the tokenizer, like tiktoken, encodes them whole. Raises ConfigError if there is too
    little text, or if `tokenizers` is not installed.
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
    words = pre_tokenizers.Split(Regex(PATTERN), behavior='isolated')
    shorter = pre_tokenizers.Split(Regex(f'[\\s\\S]{{1,{PIECE}}}'), behavior='isolated')
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, shorter, in_bytes])
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=sys.stderr.isatty(),
    )
    interruptible(tokenizer.train_from_iterator, texts, trainer)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, in_bytes])
    if tokenizer.get_vocab_size() < vocab_size - 1:
        raise ConfigError(
            f'the text has no more pairs to merge after {tokenizer.get_vocab_size() + 1} of '
            f'{vocab_size} tokens: give more text, or '
            f'--vocab_size={tokenizer.get_vocab_size() + 1}'
        )
    return tokenizer


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
    flags.DEFINE_multi_string(
        'input',
        None,
        "Paths, folders, globs or URLs of text, as for data.py, or 'stdlib' for Python's own "
        'source; several with commas, or as further words.',
    )
    flags.DEFINE_integer('vocab_size', 4096, f'Number of ids, with 256 bytes and {END_OF_TEXT}.')
    command.DEFINE_path('output', None, 'The .tiktoken file to write; its sidecar goes beside it.')
    command.DEFINE_path(
        'from_hf', None, 'A tokenizer.json to convert instead, or to copy to an --output so named.'
    )
    flags.DEFINE_string('end_of_text', '', 'With --from_hf: the token that ends a document.')
    flags.DEFINE_string('text_field', 'text', 'Field of a record that holds the text.')
    flags.DEFINE_list('extensions', [], 'Endings of further files to read as text, as in rst,c.')
    flags.DEFINE_boolean('as_text', False, 'Read files of any ending as text; not binary ones.')


def _read_texts(
    inputs: Sequence[str], text_field: str, extensions: Sequence[str], as_text: bool = False
) -> tuple[list[tuple[str, str]], list[str]]:
    """Returns the inputs' documents, as (name, text), and a message for each bad record.

    Names may occur twice: a file and its compressed copy have the same ones.

    Raises ConfigError if there is no text.
    """
    # Here, so that whoever only encodes needs none of it.
    from corpus.documents import cut_into_parts, documents
    from corpus.files import File, find_files
    from corpus.records import Bad, Document

    patterns = [name for name in inputs if name != 'stdlib']
    files = find_files(patterns, extensions, as_text) if patterns else []
    if len(patterns) < len(inputs):
        files += [File(name, path) for name, path in stdlib_files()[0]]
    found, bad = [], []
    for part in cut_into_parts(files, sys.maxsize, text_field):
        for piece in track(part, 'reading', len(part)):
            for item in documents(piece, text_field):
                if isinstance(item, Bad):
                    bad.append(item.message(piece.file.path))
                elif isinstance(item, Document):
                    path, name = piece.file.path, piece.file.name
                    folder = path.removesuffix(name) if path.endswith(name) else ''
                    found.append((f'{folder}{item.id}', item.text))
    if not any(text for _, text in found):
        raise ConfigError(
            '\n  '.join([f'the {len(files)} input files hold no text: check --input', *bad[:10]])
        )
    return found, bad


def main(words: list[str]) -> None:
    from corpus.files import RemoteError, split_inputs

    args = flags.FLAGS
    with command.messages(OSError, RemoteError):
        inputs = [*split_inputs(args.input or []), *words]
        if args.end_of_text and not args.from_hf:
            raise ConfigError(f'--end_of_text={args.end_of_text} goes with --from_hf; leave it out')
        if not ((inputs or args.from_hf) and args.output):
            raise ConfigError(
                'give --input, the text to train on, and --output=NAME.tiktoken; or '
                '--from_hf=tokenizer.json and --output'
            )
        if args.from_hf and args['vocab_size'].present:
            raise ConfigError('--vocab_size does not go with --from_hf: leave it out')
        _check_output(args.output, ('.tiktoken', '.json') if args.from_hf else ('.tiktoken',))
        given = args.text_field, args.extensions, args.as_text
        found, bad = _read_texts(inputs, *given) if inputs else ([], [])
        names, texts = [name for name, _ in found], [text for _, text in found]
        for message in bad[:10]:
            print(message, file=sys.stderr)
        if args.from_hf:
            print(_converted(args.from_hf, args.output, args.end_of_text, texts), file=sys.stderr)
            return
        print(f'training on {len(found):,} documents ...', file=sys.stderr)
        with interruption(f'{args.output} is not written; give the same command again'):
            enc = train(texts, args.vocab_size, args.output, names)
    size = sum(len(text.encode()) for text in texts)
    tokens = sum(len(encode(enc, text)) for text in texts)
    left_out = f', {len(bad):,} bad records left out' if bad else ''
    print(
        f'{args.output}: {enc.n_vocab} ids from {len(texts):,} documents, {size / 1e6:.1f} MB, '
        f'{size / tokens:.2f} bytes per token{left_out}',
        file=sys.stderr,
    )


def _converted(path: str, output: str, end: str, texts: list[str]) -> str:
    """Converts or copies a tokenizer.json, and returns a line that says what was done."""
    from corpus import hub_convert

    if output.endswith('.json'):
        if texts:
            raise ConfigError('--input is not looked at where a tokenizer.json is copied: leave it')
        enc, what = hub_convert.copy(path, output, end), 'copied, as it is'
    else:
        enc = hub_convert.convert(path, output, end, texts)
        what = f'the ids of {path} in {hub_convert.TEXTS:,} hostile texts'
        what += f' and {len(texts):,} documents' if texts else ''
    return f'{output}: {enc.n_vocab} ids, {end_of_text(enc)} ends a document; {what}'


if __name__ == '__main__':
    startup.hear_interrupts()
    command.run(main, _define_flags, takes_words=True)
