"""The files of a vocabulary of your own: NAME.tiktoken, and NAME.json, its sidecar.

NAME.tiktoken has a line `base64(token) rank` for each token. The sidecar is a JSON object:

pattern         the regular expression that cuts text into pieces
special_tokens  {name: id}
n_tokens        number of lines, which tells when NAME.tiktoken was cut short (may be missing)
end_of_text     the special token that ends a document, if it is not <|endoftext|>
in_text         the special tokens that any text is searched for, if there are any
"""

import base64
import json
from typing import Any

from config import ConfigError

_SIDECAR_HELP = (
    'a JSON object like {"pattern": "\\\\p{L}+|\\\\p{N}{1,3}|[^\\\\p{L}\\\\p{N}]+", '
    '"special_tokens": {"<|endoftext|>": 100257}}: the regular expression that cuts text into '
    'pieces, and the id of each special token'
)


def read_sidecar(path: str) -> tuple[str, dict[str, int], int | None, dict[str, Any]]:
    """Returns pattern, special tokens, the number of other tokens if the sidecar has it, and the
    arguments of a LocalEncoding if it has any of them."""
    sidecar = path.removesuffix('.tiktoken') + '.json'
    try:
        with open(sidecar, encoding='utf-8') as f:
            content = json.load(f)
        pattern, special_tokens = content['pattern'], content['special_tokens']
        if not isinstance(pattern, str) or not all(
            isinstance(i, int) and i >= 0 for i in special_tokens.values()
        ):
            raise TypeError('the pattern is a string, the ids are integers from 0 up')
        more = {}
        if {'end_of_text', 'in_text'} & {*content}:
            end, found = content.get('end_of_text', '<|endoftext|>'), content.get('in_text', [])
            if not isinstance(found, list) or {end, *found} - {*special_tokens} or end in found:
                raise TypeError('end_of_text and in_text are different special tokens')
            more = {'end_of_text': end, 'in_text': found}
    except FileNotFoundError as error:
        raise ConfigError(f'{path} needs {sidecar} beside it, {_SIDECAR_HELP}') from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f'{sidecar} is not valid ({type(error).__name__}: {error}): write {_SIDECAR_HELP}'
        ) from error
    return pattern, special_tokens, content.get('n_tokens'), more


def read_ranks(path: str) -> dict[bytes, int]:
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


def write_vocabulary(path: str, sidecar: dict[str, Any], ranks: dict[bytes, int]) -> None:
    """Writes the sidecar, with the number of tokens, and then the .tiktoken file."""
    with open(path.removesuffix('.tiktoken') + '.json', 'w', encoding='utf-8') as f:
        json.dump({**sidecar, 'n_tokens': len(ranks)}, f, indent=2)
        f.write('\n')
    with open(path, 'wb') as f:
        for token, rank in sorted(ranks.items(), key=lambda item: item[1]):
            f.write(base64.b64encode(token) + b' %d\n' % rank)
