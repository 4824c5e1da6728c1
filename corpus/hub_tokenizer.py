"""Reads a tokenizer.json, the file of Hugging Face's tokenizers library, as an encoding.

    enc = get_encoding('DIR/tokenizer.json')    # of tokenizer.py, which calls `read`

The library gives the ids. This file adds what the project asks of every encoding: the bytes that
each id stands for, the token that ends a document, a fingerprint, and that no text is lost.

Tokens marked special are found in text only where the caller allows it, as everywhere here. Those
that are not marked so (`in_text`) are part of the vocabulary, and the library always finds them.
"""

import hashlib
import itertools
import json
import os
import re
from collections.abc import Callable, Collection, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import tiktoken

from config import ConfigError

if TYPE_CHECKING:
    import tokenizers

CONFIG = 'tokenizer_config.json'  # beside the file; its eos_token ends a document

# Names of the token that ends a document, where the file alone has to tell.
ENDS = (
    '<|endoftext|>', '<|end_of_text|>', '</s>', '<｜end▁of▁sentence｜>', '<eos>', '[EOS]',
)  # fmt: skip

SPACE = '▁'  # stands for a space in the vocabularies of SentencePiece

# What decides the ids and the text that they stand for. The post-processor, which puts a token
# before a text, padding and truncation are not used here.
_DECIDING = ('added_tokens', 'normalizer', 'pre_tokenizer', 'model', 'decoder')


def read_file(path: str) -> tuple[str, dict[str, Any]]:
    """Returns a tokenizer.json as text and as an object. Raises ConfigError if it is none."""
    try:
        with open(path, encoding='utf-8') as f:
            text = f.read()
        content = json.loads(text)
    except ValueError as error:
        raise ConfigError(f'{path} is damaged ({error}): fetch it again') from error
    except OSError as error:
        raise ConfigError(f'{path} cannot be read ({error.strerror}): name one that can') from error
    if not isinstance(content, dict) or not isinstance(content.get('model'), dict):
        raise ConfigError(
            f"{path} is no tokenizer.json of Hugging Face's tokenizers: it has no model. Name such "
            'a file, or NAME.tiktoken if this is the sidecar of one'
        )
    for token in content.get('added_tokens') or ():
        if not isinstance(token, dict) or not (
            isinstance(token.get('content'), str)
            and token['content']
            and isinstance(token.get('id'), int)
            and token['id'] >= 0
        ):
            raise ConfigError(
                f'{path} is damaged: it adds the token {token!r}, which has no content or no id '
                'from 0 up: fetch it again'
            )
    return text, content


def added_tokens(content: dict[str, Any]) -> dict[str, int]:
    """Returns {name: id} of the tokens that the file adds to its model's."""
    return {token['content']: token['id'] for token in content.get('added_tokens') or ()}


def found_in_text(content: dict[str, Any]) -> frozenset[str]:
    """Returns the names of the added tokens that are not special, which any text may hold."""
    tokens = content.get('added_tokens') or ()
    return frozenset(token['content'] for token in tokens if not token.get('special'))


def end_of_text(path: str, content: dict[str, Any], name: str = '') -> str:
    """Returns the name of the token that ends a document.

    It is `name` if given, else eos_token of the tokenizer_config.json beside the file, else the
    first of ENDS that the file adds. Raises ConfigError if the file has no such token, or does not
    mark it as special.
    """
    known, beside = added_tokens(content), os.path.join(os.path.dirname(path), CONFIG)
    source = '--end_of_text'
    if not name and os.path.exists(beside):
        try:
            with open(beside, encoding='utf-8') as f:
                name = json.load(f).get('eos_token') or ''
            name = name['content'] if isinstance(name, dict) else name
        except (OSError, ValueError, KeyError, AttributeError) as error:
            raise ConfigError(
                f'{beside} cannot be read ({type(error).__name__}: {error}): fetch it again, or '
                'write {"eos_token": "NAME"}'
            ) from error
        source = f'eos_token of {beside}'
    name = name or next((end for end in ENDS if end in known), '')
    if name not in known:
        some = ', '.join(list(known)[:20]) or 'none'
        raise ConfigError(
            (f'{path} has no token {name!r}, the {source}' if name else f'{path} names no token')
            + f' that ends a document. It adds: {some}. Write {{"eos_token": "NAME"}} into {beside}'
        )
    if name in found_in_text(content):
        raise ConfigError(
            f'{path} does not mark {name!r} as special, so it would end a document in the middle '
            f'of any text that holds its name: write "special": true in its entry, or choose '
            'another token to end a document'
        )
    return name


# ---------------------------------------------------------------------------------------------
# The bytes of a token
# ---------------------------------------------------------------------------------------------


def byte_of_character() -> dict[str, int]:
    """Returns the byte that each character of the byte-level alphabet stands for.

    Printable Latin-1 characters stand for themselves, the characters from 256 on for the other
    bytes in order.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def steps(part: dict[str, Any] | None, plural: str) -> list[dict[str, Any]]:
    """Returns the steps of a normalizer, pre-tokenizer or decoder, sequences taken apart."""
    if not part:
        return []
    if part['type'] == 'Sequence':
        return [step for inner in part[plural] for step in steps(inner, plural)]
    return [part]


def _is_byte_level(content: dict[str, Any]) -> bool:
    """Returns True if tokens are written in the alphabet of `byte_of_character`."""
    return [step['type'] for step in steps(content.get('decoder'), 'decoders')] == ['ByteLevel']


def _bytes_of_tokens(path: str, content: dict[str, Any]) -> Callable[[str], bytes]:
    """Returns the function: token of the model -> the bytes that the decoder makes of it.

    Raises ConfigError for a decoder that does not join tokens byte by byte.
    """
    decoders = steps(content.get('decoder'), 'decoders')
    kinds = [step['type'] for step in decoders]
    if _is_byte_level(content):
        byte_of = byte_of_character()

        def of_alphabet(token: str) -> bytes:
            bytes_of = [byte_of.get(c) for c in token]
            return token.encode() if None in bytes_of else bytes(bytes_of)

        return of_alphabet

    if not kinds or {*kinds} - {'Replace', 'ByteFallback', 'Fuse', 'Strip', 'Metaspace'}:
        raise ConfigError(
            f'{path} cannot be used: its decoder ({", ".join(kinds) or "none"}) does not join the '
            'bytes of tokens to text, as a ByteLevel, Metaspace or ByteFallback decoder does, so '
            'text would not come back. Use a byte-level tokenizer'
        )
    replaced = [(SPACE, ' ')] if 'Metaspace' in kinds else []
    for step in decoders:
        if step['type'] == 'Replace':
            replaced.append((step['pattern'].get('String', ''), step['content']))

    def of_pieces(token: str) -> bytes:
        if 'ByteFallback' in kinds and re.fullmatch('<0x[0-9A-F]{2}>', token):
            return bytes([int(token[3:5], 16)])
        for old, new in replaced:
            token = token.replace(old, new) if old else token
        return token.encode()

    return of_pieces


def _strips_space(content: dict[str, Any]) -> bool:
    """Returns True if the decoder takes a space off the start of a text."""
    return any(
        (step['type'] == 'Strip' and step.get('start') == 1 and step.get('content') == ' ')
        or (step['type'] == 'Metaspace' and step.get('prepend_scheme', 'always') != 'never')
        for step in steps(content.get('decoder'), 'decoders')
    )


# ---------------------------------------------------------------------------------------------
# The encoding
# ---------------------------------------------------------------------------------------------


def library(purpose: str) -> Any:
    """Returns the module tokenizers. Raises ConfigError if it is not installed."""
    try:
        import tokenizers
    except ImportError as error:
        raise ConfigError(
            f'{purpose} needs tokenizers: pip install -r requirements/tokenizer.txt'
        ) from error
    return tokenizers


def tokenizer_of(path: str, text: str) -> 'tokenizers.Tokenizer':
    """Returns the library's tokenizer, without padding and truncation.

    Raises ConfigError if it is not installed, or if it refuses the file.
    """
    module = library(f'the vocabulary {path}')
    try:
        made = module.Tokenizer.from_str(text)
    except Exception as error:  # the library raises Exception itself
        raise ConfigError(f'{path}: tokenizers {module.__version__} refuses it: {error}') from error
    made.no_padding()
    made.no_truncation()
    return made


class HubEncoding(tiktoken.Encoding):
    """An encoding with the methods of tiktoken's, whose ids come from the tokenizers library.

    `end_of_text` names the token that ends a document, `in_text` the tokens that the library finds
    in any text. `token_bytes[i]` is what id i stands for, None if there is no such id.
    """

    def __init__(self, name: str, text: str, end: str, content: dict[str, Any] | None = None):
        """`text` is the file, `content` the object in it, `end` the token that ends a document."""
        content = content or json.loads(text)
        self.name, self.end_of_text = name, end
        self._text, self._content, self._fingerprint = text, content, ''
        self.in_text = found_in_text(content)
        self._pat_str, self._special_tokens = '', added_tokens(content)
        self._special_token_values = {*self._special_tokens.values()}
        self._tokenizer = tokenizer_of(name, text)
        self._tokenizer.encode_special_tokens = True  # as ordinary text
        self._strips_space = _strips_space(content)
        of_token, of_library = _bytes_of_tokens(name, content), self._tokenizer.get_vocab(True)
        ids = self._file_ids(name, of_library)
        self.max_token_value = max(ids.values())
        self.token_bytes: list[bytes | None] = [None] * self.n_vocab
        for token, i in ids.items():
            added = token in self._special_tokens
            self.token_bytes[i] = token.encode() if added else of_token(token)
        # The library numbers added tokens on from the model's, even where the file has a gap.
        self._id_of = np.arange(max(of_library.values()) + 1, dtype=np.uint32)
        for token in self._special_tokens:
            self._id_of[of_library[token]] = ids[token]

    def _file_ids(self, path: str, of_library: dict[str, int]) -> dict[str, int]:
        """Returns {token: id}, of the model's tokens and the added ones, as the file has them.

        Raises ConfigError if the file gives one id to two tokens, or two to one.
        """
        ids = of_library | self._special_tokens
        of_model = self._tokenizer.get_vocab(False)
        for token, i in self._special_tokens.items():
            if of_model.get(token, i) != i:
                raise ConfigError(
                    f'{path} gives the token {token!r} the ids {of_model[token]} and {i}: mend one'
                )
        if len({*ids.values()}) < len(ids):
            token, i = max(self._special_tokens.items(), key=lambda item: item[1])
            raise ConfigError(
                f'{path} gives an id to two tokens (its last added token is {token!r}, {i}): give '
                'added tokens ids of their own'
            )
        return ids

    def __reduce__(self) -> tuple:
        return HubEncoding, (self.name, self._text, self.end_of_text)

    # Encoding

    def encode_to_numpy(
        self,
        text: str,
        *,
        allowed_special: Literal['all'] | AbstractSet[str] = frozenset(),
        disallowed_special: Literal['all'] | Collection[str] = (),
    ) -> np.ndarray:
        """Returns the ids of a text, uint32 [n]; names in `allowed_special` become their token.

        `disallowed_special` is not looked at: other special tokens are ordinary text.
        """
        names = self.special_tokens_set if allowed_special == 'all' else allowed_special
        names = names - self.in_text  # which the library finds itself
        out = []
        for part in re.split(f'({_any_of(names)})', text) if names else [text]:
            if part in names:
                out.append(np.array([self._special_tokens[part]], np.uint32))
            elif part:  # without offsets, which take a third of the time
                got = self._tokenizer.encode_batch_fast([part], add_special_tokens=False)[0].ids
                out.append(self._id_of[got])
        return np.concatenate(out) if out else np.empty(0, np.uint32)

    def encode(self, text: str, **special: Any) -> list[int]:
        return self.encode_to_numpy(text, **special).tolist()

    def encode_ordinary(self, text: str) -> list[int]:
        return self.encode(text)

    def encode_single_token(self, text_or_bytes: str | bytes) -> int:
        """Returns the id of an added token by its name, or of the only token with these bytes."""
        if isinstance(text_or_bytes, str):
            if text_or_bytes in self._special_tokens:
                return self._special_tokens[text_or_bytes]
            text_or_bytes = text_or_bytes.encode()
        return self.token_bytes.index(text_or_bytes)

    # Decoding

    def decode_single_token_bytes(self, token: int) -> bytes:
        found = self.token_bytes[token] if 0 <= token < self.n_vocab else None
        if found is None:
            raise KeyError(token)
        return found

    def decode_bytes(self, tokens: Sequence[int]) -> bytes:
        """Returns the text of the ids; without its first space if the file's decoder drops it."""
        out = b''.join([self.decode_single_token_bytes(token) for token in tokens])
        return out.removeprefix(b' ') if self._strips_space else out

    def decode(self, tokens: Sequence[int], errors: str = 'replace') -> str:
        return self.decode_bytes(tokens).decode(errors=errors)

    def token_byte_values(self) -> list[bytes]:
        return sorted(token for _, token in self.tokens())

    # What tokenizer.py asks for

    @property
    def eot_token(self) -> int:
        return self._special_tokens[self.end_of_text]

    def tokens(self) -> list[tuple[int, bytes]]:
        """Returns (id, bytes) of each token that text can hold, ordered by id."""
        special = {self._special_tokens[name] for name in self.special_tokens_set - self.in_text}
        return [
            (i, token)
            for i, token in enumerate(self.token_bytes)
            if token is not None and i not in special
        ]

    def fingerprint(self) -> str:
        """Returns 32 hex digits over all that decides the ids, and the end of a document."""
        if not self._fingerprint:
            parts = [self._content.get(name) for name in _DECIDING]
            content = json.dumps([parts, self.end_of_text], sort_keys=True)
            digest = hashlib.blake2b(content.encode(), digest_size=16)
            self._fingerprint = digest.hexdigest()
        return self._fingerprint

    def kept(self, text: str, ids: np.ndarray) -> tuple[int, int]:
        """Returns how many bytes the ids keep of how many, after the file's own normalizer.

        They are equal exactly if nothing is lost.
        """
        found = b''.join([self.token_bytes[i] for i in ids.tolist()])
        if found == (whole := text.encode()):
            return len(whole), len(whole)
        wanted, first = [], True
        for part in re.split(f'({_any_of(self.in_text)})', text) if self.in_text else [text]:
            is_token = part in self.in_text
            wanted.append(part if is_token or not part else self._normalized(part, first))
            first = first and not part
        wanted = ''.join(wanted).encode()
        if found == wanted:
            return len(wanted), len(wanted)
        pairs = zip(found, wanted, strict=False)
        same = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
        return min(same, len(wanted) - 1), len(wanted)

    def by_library(self, text: str, special: bool) -> tuple[list[int], str]:
        """Returns the library's own ids, numbered as in the file, and what it decodes them to.

        With `special`, names of special tokens become their tokens.
        """
        self._tokenizer.encode_special_tokens = not special
        try:
            ids = self._tokenizer.encode(text, add_special_tokens=False).ids
        finally:
            self._tokenizer.encode_special_tokens = True
        return self._id_of[ids].tolist(), self._tokenizer.decode(ids, skip_special_tokens=False)

    def _normalized(self, text: str, first: bool) -> str:
        """Returns the text that the tokens of a part stand for, with a space put before it."""
        if self._tokenizer.normalizer is not None:
            text = self._tokenizer.normalizer.normalize_str(text)
        for step in steps(self._content.get('pre_tokenizer'), 'pretokenizers'):
            if step['type'] == 'Metaspace':
                text = text.replace(' ', SPACE)
                scheme = step.get('prepend_scheme', 'always')
                put = scheme == 'always' or (scheme == 'first' and first)
                text = SPACE + text if put and not text.startswith(SPACE) else text
            elif step['type'] == 'ByteLevel' and step.get('add_prefix_space'):
                text = text if text.startswith(' ') else ' ' + text
        return text if _is_byte_level(self._content) else text.replace(SPACE, ' ')


def _any_of(names: Collection[str]) -> str:
    """Returns a pattern of the names, the longest first, as the library looks for them."""
    return '|'.join(re.escape(name) for name in sorted(names, key=len, reverse=True))


def read(name: str, path: str) -> HubEncoding:
    """Returns the encoding of a tokenizer.json. Raises ConfigError if it cannot be used."""
    text, content = read_file(path)
    return HubEncoding(name, text, end_of_text(path, content), content)
