"""Converts a tokenizer.json to a tiktoken encoding, where the two give the same ids.

Both cut text by a regular expression and merge the bytes of each piece. They differ in the regular
expressions' engines (Oniguruma there, Rust's fancy_regex in tiktoken), in what decides a merge (a
list of pairs there, the ids of the merged tokens in tiktoken), and in all that tiktoken does not
have: normalizers, several splits, added tokens that take spaces with them. `reasons` finds what
differs by reading the file; `compare` then tries both on texts.
"""

import itertools
import json
import os
import random
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import tiktoken

from config import ConfigError
from corpus.hub_tokenizer import (
    CONFIG,
    HubEncoding,
    added_tokens,
    byte_of_character,
    end_of_text,
    found_in_text,
    library,
    read_file,
    steps,
    tokenizer_of,
)
from corpus.vocabulary_files import write_vocabulary
from tokenizer import END_OF_TEXT, checked_encoding, get_encoding, in_text

# The pattern of a ByteLevel pre-tokenizer with use_regex, GPT-2's.
BYTE_LEVEL = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

TEXTS = 3000  # hostile ones that a conversion is tried on

_NAMED = 5  # differences that a message names


class Parts(NamedTuple):
    """The parts of a tiktoken encoding."""

    pattern: str
    ranks: dict[bytes, int]  # of the tokens, by the order of merges
    special_tokens: dict[str, int]
    end_of_text: str
    in_text: frozenset[str]  # of special_tokens: found in any text

    def sidecar(self) -> dict[str, Any]:
        """Returns the content of the sidecar of a .tiktoken file, but for the number of tokens."""
        own = {'end_of_text': self.end_of_text, 'in_text': sorted(self.in_text)}
        plain = self.end_of_text == END_OF_TEXT and not self.in_text
        first = {'pattern': self.pattern, 'special_tokens': self.special_tokens}
        return first if plain else first | own


# ---------------------------------------------------------------------------------------------
# Reasons why tiktoken would give other ids
# ---------------------------------------------------------------------------------------------


def reasons(content: dict[str, Any]) -> list[str]:
    """Returns why tiktoken cannot give the ids of a tokenizer.json, a line each; [] if it can."""
    found = [*_model_reasons(content['model']), *_normalizer_reasons(content.get('normalizer'))]
    try:
        found += pattern_reasons(pattern_of(content))
    except ConfigError as error:
        found.append(str(error))
    found += _added_reasons(content)
    return found or _merge_reasons(content)


def _model_reasons(model: dict[str, Any]) -> Iterator[str]:
    if (kind := model.get('type')) != 'BPE':
        yield f'its model is {kind or "of no named type"}; tiktoken merges bytes (BPE)'
        return
    for field in ('dropout', 'continuing_subword_prefix', 'end_of_word_suffix'):
        if model.get(field):
            yield f'its model has {field}={model[field]!r}, which tiktoken has not'
    missing = [c for c in byte_of_character() if c not in model['vocab']]
    if missing:
        yield (
            f'its model is not byte-level: {len(missing)} of the 256 bytes have no token'
            + (', and others are written <0x00>' if model.get('byte_fallback') else '')
        )


def _normalizer_reasons(normalizer: dict[str, Any] | None) -> Iterator[str]:
    names = [step['type'] for step in steps(normalizer, 'normalizers')]
    if names:
        yield f'its normalizer ({", ".join(names)}) changes text first, which tiktoken does not'


def _added_reasons(content: dict[str, Any]) -> Iterator[str]:
    tokens = content.get('added_tokens') or ()
    for token in tokens:
        for field in ('lstrip', 'rstrip', 'single_word'):
            if token.get(field):
                yield (
                    f'its added token {token["content"]!r} has {field}, so that the characters '
                    'beside it count, which tiktoken does not look at'
                )
    names = sorted(added_tokens(content))
    # Sorted, so that a name stands right before some name that it begins.
    for short, long in itertools.pairwise(names):
        if long.startswith(short):
            yield (
                f'its added token {short!r} begins {long!r}: the longer one is meant, and tiktoken '
                'takes either'
            )
            return
    if len({bool(token.get('normalized')) for token in tokens}) > 1:
        first = [token['content'] for token in tokens if not token.get('normalized')]
        second = [token['content'] for token in tokens if token.get('normalized')]
        for a, b in itertools.product(first, second):
            if _overlap(a, b):
                yield f'its added tokens {a!r} and {b!r} overlap, and {a!r} is looked for first'
                return


def _overlap(a: str, b: str) -> bool:
    """Returns True if a text can hold both at places that overlap."""
    ends = any(
        x.endswith(y[:n]) for x, y in ((a, b), (b, a)) for n in range(1, min(len(x), len(y)) + 1)
    )
    return a in b or b in a or ends


# ---------------------------------------------------------------------------------------------
# The pattern
# ---------------------------------------------------------------------------------------------


def pattern_of(content: dict[str, Any]) -> str:
    """Returns the regular expression that cuts text into pieces.

    Raises ConfigError, with the reason, if it is not one whose matches are the pieces.
    """
    splits = steps(content.get('pre_tokenizer'), 'pretokenizers')
    patterns = []
    for step in splits:
        kind = step['type']
        if kind == 'ByteLevel':
            if step.get('add_prefix_space'):
                raise ConfigError('its pre-tokenizer puts a space before each text')
            if step.get('use_regex', True):
                patterns.append(BYTE_LEVEL)
        elif kind == 'Split' and 'Regex' in step['pattern']:
            if step['behavior'] != 'Isolated' or step.get('invert'):
                raise ConfigError(
                    f'its split is {step["behavior"]}{", inverted" if step.get("invert") else ""}; '
                    "tiktoken's pieces are the matches alone"
                )
            patterns.append(step['pattern']['Regex'])
        else:
            raise ConfigError(f'it splits text by {kind}, which is no regular expression')
    if not splits or splits[-1]['type'] != 'ByteLevel':
        raise ConfigError('its last pre-tokenizer is not ByteLevel, which turns text into bytes')
    if len(patterns) != 1:
        raise ConfigError(
            f'it splits text {len(patterns)} times, each time within the pieces of the one before; '
            'tiktoken splits once'
        )
    return patterns[0]


# The forms that both engines read alike. Named classes are tried on all characters by `compare`.
_FORM = re.compile(
    r"""
    (?P<class> \[ \^? (?: \\[pP]\{\w+\} | \\[srntSd] | \\[^\w\s] | [^\\\[\]&~] )+ \] )
    | (?P<named> \\[pP]\{\w+\} | \\[sSd] )
    | \\[rnt] | \\[^\w\s]
    | (?P<cases> \(\?i: (?: (?: '?(?:[a-z]{1,3} | \[[a-z]+\]) \|?)+ ) \) )
    | \(\?: | \(\?! | \(\?= | \((?!\?) | \) | \|
    | (?P<repeat> \{\d+(?:,\d*)?\} (?![+?]) | [?*+] [+?]? )
    | [^\\()\[\]{}|?*+.^$\s] | [ ]
    """,
    re.VERBOSE,
)

# In a case-insensitive group, letters that one character can stand for: ß, ﬁ, ﬆ and the like.
_LIGATURES = ('ss', 'ff', 'fi', 'fl', 'st')


def pattern_reasons(pattern: str) -> list[str]:
    """Returns why the two engines may read a pattern differently; [] if they do not."""
    position = 0
    while position < len(pattern):
        rest = pattern[position:]
        form = _FORM.match(rest)
        if form is None:
            return [f'its pattern has {rest[:12]!r}, {_why(rest)}: {pattern}']
        if form['cases'] and any(pair in form['cases'] for pair in _LIGATURES):
            return [f'its pattern has {form["cases"]!r}, which one letter can match, as ß does ss']
        if form['class'] and re.search(r'--|\[:', form['class'][1:]):
            return [f'its pattern has {form["class"]!r}, {_why("[")}: {pattern}']
        position += form.end()
    return []


def _why(rest: str) -> str:
    """Returns why the start of the rest of a pattern is not taken as it is."""
    if re.match(r'\{\d*,?\d*\}[+?]', rest):
        return 'a repeated group in the one engine and a possessive or lazy repeat in the other'
    if rest[0] in '^$':
        return 'which is the end of a line in the one engine and that of the text in the other'
    return 'which the two engines may read differently'


def named_classes(pattern: str) -> list[str]:
    r"""Returns the classes of characters in a pattern: \p{L}, \s, and letters in either case."""
    found = {*re.findall(r'\\[pP]\{\w+\}|\\[sd]', pattern.replace(r'\S', r'\s'))}
    letters = {
        x for group in re.findall(r'\(\?i:([^()]*)\)', pattern) for x in group if x.isalpha()
    }
    return sorted(found) + ([f'(?i:[{"".join(sorted(letters))}])'] if letters else [])


def class_differences(pattern: str) -> list[str]:
    """Returns the classes of a pattern in which the two engines put different characters.

    All characters of Unicode are tried, since each engine has the tables of one Unicode version.
    """
    module = library('comparing with tiktoken')
    everything = ''.join(chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000)
    bytes_alone = {bytes([i]): i for i in range(256)}
    found = []
    for name in named_classes(pattern):
        split = module.pre_tokenizers.Split(module.Regex(f'{name}+'), 'removed', invert=True)
        there = ''.join(piece for piece, _ in split.pre_tokenize_str(everything))
        enc = tiktoken.Encoding(
            'class', pat_str=f'{name}+', mergeable_ranks=bytes_alone, special_tokens={}
        )
        kept = enc.encode_to_numpy(everything, disallowed_special=())
        here = kept.astype(np.uint8).tobytes().decode()
        if differing := sorted({*there} ^ {*here}):
            some = ', '.join(f'U+{ord(c):04X}' for c in differing[:_NAMED])
            found.append(f'{name} differs in {len(differing)} characters ({some})')
    return found


# ---------------------------------------------------------------------------------------------
# The merges
# ---------------------------------------------------------------------------------------------


def _merges(model: dict[str, Any]) -> list[tuple[bytes, bytes]]:
    """Returns the pairs that a model merges, in order."""
    byte_of = byte_of_character()
    pairs = (pair.split(' ') if isinstance(pair, str) else pair for pair in model['merges'])
    return [tuple(bytes(byte_of[c] for c in token) for token in pair) for pair in pairs]


def ranks_of(content: dict[str, Any]) -> dict[bytes, int]:
    """Returns {bytes: id} of a byte-level model's tokens, without the added ones.

    Raises ConfigError if a token is no bytes.
    """
    byte_of, added, ranks = byte_of_character(), added_tokens(content), {}
    for token, i in content['model']['vocab'].items():
        if token in added:
            continue
        if not token or not {*token} <= byte_of.keys():
            raise ConfigError(f'its token {token!r} is not written in the byte-level alphabet')
        ranks[bytes(byte_of[c] for c in token)] = i
    return ranks


def _merge_reasons(content: dict[str, Any]) -> list[str]:
    """Returns why ranks cannot stand for the merges of a byte-level BPE; [] if they can.

    The library merges the first of the listed pairs. tiktoken merges the two neighbours that
    together are the token of the lowest id. Two neighbours that together are a token t were both
    made inside t's bytes alone, since nothing was merged across their border. So they are what
    merging t's bytes alone came to. If that ends in t itself, it has one last pair, and no other
    pair ever gives t. Both then choose alike at every step if those last pairs stand in the list in
    the order of the ids. A token that its own bytes do not lead to needs ignore_merges, with which
    the library too takes a piece that is a token whole, and all pairs of tokens that give it have
    to be listed at its place in the order.
    """
    try:
        ranks, pairs = ranks_of(content), _merges(content['model'])
    except (ConfigError, KeyError, ValueError) as error:
        return [str(error) if isinstance(error, ConfigError) else f'a merge is no pair: {error}']
    place = {pair: i for i, pair in enumerate(pairs)}
    if len(place) < len(pairs):
        return ['its merges list a pair twice']
    whole, last, token = content['model'].get('ignore_merges', False), -1, b''
    for token, _ in sorted(ranks.items(), key=lambda item: item[1]):
        if len(token) == 1:
            continue
        pieces, pair = merge(token, place)
        if pieces == [token]:
            places = [place[pair]]
        else:
            splits = [(token[:i], token[i:]) for i in range(1, len(token))]
            splits = [(a, b) for a, b in splits if a in ranks and b in ranks]
            if not whole or not all(pair in place for pair in splits):
                return [
                    f'its merges do not lead to the token {token!r}, but to {pieces}, while '
                    'tiktoken gives the token'
                ]
            if any(b == c and place[a, b] > place[c, d] for a, b in splits for c, d in splits):
                return [f'two pairs that give the token {token!r} overlap in another order']
            places = sorted(place[pair] for pair in splits)
        if places and places[0] < last:
            return [
                f'its ids do not follow the order of its merges (first at the token {token!r}), '
                "which tiktoken's do"
            ]
        last = places[-1] if places else last
    return []


def merge(
    token: bytes, place: dict[tuple[bytes, bytes], int]
) -> tuple[list[bytes], tuple[bytes, bytes] | None]:
    """Merges the bytes of a token by a list of pairs; returns the rest, and the last pair."""
    pieces: list[bytes] = [token[i : i + 1] for i in range(len(token))]
    last = None
    while len(pieces) > 1:
        first = min(
            range(len(pieces) - 1),
            key=lambda i: place.get((pieces[i], pieces[i + 1]), len(place)),
        )
        pair = pieces[first], pieces[first + 1]
        if pair not in place:
            break
        pieces[first : first + 2] = [pair[0] + pair[1]]
        last = pair
    return pieces, last


# ---------------------------------------------------------------------------------------------
# Both, on texts
# ---------------------------------------------------------------------------------------------


def _as_it_is(path: str) -> str:
    """Returns the remedy for a file that tiktoken cannot stand for."""
    return (
        f'Use the file as it is: --tokenizer={path}; or copy it, to choose the token that ends a '
        'document: --output=FOLDER/tokenizer.json --end_of_text=NAME'
    )


def parts_of(path: str, end: str = '') -> Parts:
    """Returns what makes the tiktoken encoding of a tokenizer.json.

    `end` is the name of the token that ends a document, '' for what the file says. Raises
    ConfigError, with all reasons, if tiktoken would give other ids.
    """
    _, content = read_file(path)
    end = end_of_text(path, content, end)
    if why := reasons(content):
        raise ConfigError(
            f'{path} is no tiktoken encoding:\n  ' + '\n  '.join(why) + f'\n{_as_it_is(path)}'
        )
    return Parts(
        pattern_of(content), ranks_of(content), added_tokens(content), end, found_in_text(content)
    )


_SCRIPTS = (
    (0x21, 0x7E), (0x61, 0x7A), (0xA1, 0x24F), (0x370, 0x3FF), (0x400, 0x52F), (0x590, 0x6FF),
    (0x900, 0xDFF), (0xE00, 0xE7F), (0x1100, 0x11FF), (0x2000, 0x206F), (0x20A0, 0x2BFF),
    (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0xE000, 0xF8FF), (0xFE00, 0xFFFF),
    (0x10000, 0x1FFFF), (0x1F300, 0x1FAFF), (0x20000, 0x3FFFF), (0xE0000, 0x10FFFF),
)  # fmt: skip
_SPACES = (
    ' ', '  ', '\t', '\n', '\r', '\r\n', '\n\n', '\v', '\f', '\x1c', '\x85', '\xa0', '\u1680',
    '\u180e', '\u2003', '\u2028', '\u2029', '\u202f', '\u3000', '\u200b', '\ufeff',
)  # fmt: skip
_PIECES = (
    "'s", "'S", "'ll", "'LL", "'Ve", "'re", "'d", "'M", "'t", "’s", "'ſ", "'k", "'K", "don't",
    '1', '12', '123', '1234', '3.14', '1,000', '٣٤٥', '½', 'Ⅷ', '²', 'x²', 'A', 'Ab', 'aB', 'AB',
    'ǅ', 'ʰ', 'ﬁ', 'ß', 'ẞ', 'İ', 'ı', 'Å', 'e\u0301', 'é', '\u0301', '\u0903', '\u20dd',
    'क्षि', '각', '\u1100\u1161', '👩\u200d💻', '🇩🇪', '\0', '\x1b', '\x7f', '\u200d', '/', '//',
    '...', '!?', '"', '--', '==', '<|', '|>', '_', '#', '@', '$', '+', '\\n', '\ud7ff', '\ue000',
    '\ufffd', '\ufffe', '\uffff', '\U0001fffe', '\U0010ffff', '\u0378',
)  # fmt: skip


def hostile_texts(n: int, seed: int, names: Sequence[str] = ()) -> Iterator[str]:
    """Yields n short texts of what tokenizers trip over; `names` are the added tokens.

    Letters of many scripts, digits, contractions, marks that combine, spaces of all kinds in runs,
    unassigned and private characters, long runs, and the added tokens, whole and cut.
    """
    rng = random.Random(seed)
    low, high = [*range(1, 9)], [20, 99, 100, 101, 300]

    def piece() -> str:
        kind = rng.randrange(9)
        if kind < 2:
            first, last = rng.choice(_SCRIPTS)
            return ''.join(chr(rng.randint(first, last)) for _ in range(rng.choice(low)))
        if kind == 2:
            return rng.choice(_SPACES) * rng.choice(low)
        if kind == 3:
            return ''.join(rng.choices(_SPACES, k=rng.choice(low)))
        if kind == 4:
            return ''.join(rng.choices('0123456789', k=rng.choice(low)))
        if kind == 5 and names:
            name = rng.choice(names)
            return name if rng.random() < 0.7 else name[: rng.randrange(len(name) + 1)]
        if kind == 6 and rng.random() < 0.2:
            return rng.choice([*_PIECES, *_SPACES, 'ab', 'the ']) * rng.choice(high)
        return ''.join(rng.choices(_PIECES, k=rng.choice(low)))

    for _ in range(n):
        yield ''.join(piece() for _ in range(rng.choice(low)))


def compare(enc: tiktoken.Encoding, hub: HubEncoding, texts: Iterable[str]) -> None:
    """Raises ConfigError if the two encode or decode one of the texts differently.

    With special tokens as ordinary text, and as tokens.
    """
    for text in texts:
        for allowed in (in_text(enc), 'all'):
            ids = enc.encode(text, allowed_special=allowed, disallowed_special=())
            there, decoded = hub.by_library(text, allowed == 'all')
            if ids != there:
                pairs = enumerate(itertools.zip_longest(ids, there))
                at = next(i for i, (a, b) in pairs if a != b)
                raise ConfigError(
                    f'{hub.name} is no tiktoken encoding: of {text[:80]!r} tokenizers gives '
                    f'{there[at : at + 8]} from place {at} on, and tiktoken {ids[at : at + 8]}. '
                    + _as_it_is(hub.name)
                )
            if not enc.decode(ids) == decoded == text:
                raise ConfigError(
                    f'{hub.name} is no tiktoken encoding: {text[:80]!r} comes back from tokenizers '
                    f'as {decoded[:80]!r}, and from tiktoken as {enc.decode(ids)[:80]!r}. '
                    + _as_it_is(hub.name)
                )


# ---------------------------------------------------------------------------------------------
# The conversion
# ---------------------------------------------------------------------------------------------


def convert(path: str, output: str, end: str = '', texts: Iterable[str] = ()) -> tiktoken.Encoding:
    """Writes a tokenizer.json as a .tiktoken file with its sidecar, and returns its encoding.

    `end` is the name of the token that ends a document, '' for what the file says. Raises
    ConfigError, and writes nothing, if tiktoken would give other ids, or gives them for one of the
    texts or of TEXTS hostile ones.
    """
    sidecar = output.removesuffix('.tiktoken') + '.json'
    if os.path.exists(sidecar):
        raise ConfigError(f'{sidecar}, the sidecar of --output, exists: choose another name')
    tokenizer_of(path, read_file(path)[0])  # which refuses a file that is damaged
    parts = parts_of(path, end)
    if why := class_differences(parts.pattern):
        raise ConfigError(
            f'{path} is no tiktoken encoding with these versions of tiktoken and tokenizers, whose '
            f'tables of characters differ: {"; ".join(why)}. Update the older of the two (pip '
            f'install --upgrade tiktoken tokenizers). {_as_it_is(path)}'
        )
    enc = checked_encoding(output, path, ranks=parts.ranks, **parts.sidecar())
    hub = HubEncoding(path, read_file(path)[0], parts.end_of_text)
    names = sorted(parts.special_tokens)
    compare(enc, hub, itertools.chain(names, hostile_texts(TEXTS, 0, names), texts))
    write_vocabulary(output, parts.sidecar(), parts.ranks)
    return get_encoding(output)


def copy(path: str, output: str, end: str = '') -> tiktoken.Encoding:
    """Copies a tokenizer.json, with the name of the token that ends a document beside it.

    Returns its encoding. Raises ConfigError, and writes nothing, if it cannot be used.
    """
    text, content = read_file(path)
    end = end_of_text(path, content, end)
    HubEncoding(path, text, end, content)
    beside = os.path.join(os.path.dirname(output), CONFIG)
    if os.path.exists(beside):
        raise ConfigError(f'{beside} exists: choose a folder of its own for --output')
    with open(beside, 'w', encoding='utf-8') as f:
        json.dump({'eos_token': end}, f, ensure_ascii=False)
        f.write('\n')
    shutil.copyfile(path, output)
    return get_encoding(output)
