"""The record of a run's data in its checkpoints: whether another start has the same.

{'sources': {name: {'digest', 'tokens'}}, 'tokenizer': {'name', 'fingerprint'}}; of packed sources
also the 'windows', and the share of 'padding' in them.

With another vocabulary the parameters mean nothing, so that it is refused; other tokens are said.
"""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import tiktoken

from config import ConfigError
from data import Source
from runtime.workdir import TOKENIZER, read_json, same_vocabulary
from tokenizer import fingerprint


def data_record(sources: Sequence[Source], encoding: tiktoken.Encoding) -> dict[str, Any]:
    """Returns the record of opened data."""
    return {
        'sources': {
            source.name: {'digest': source.train.digest, 'tokens': source.train.n_tokens}
            | (source.packed.record() if source.packed else {})
            for source in sources
        },
        'tokenizer': {'name': encoding.name, 'fingerprint': fingerprint(encoding)},
    }


def saved_record(metadata: Mapping[str, Any], workdir: str) -> dict[str, Any]:
    """Returns the record of a checkpoint of a workdir.

    Older checkpoints have none: then the vocabulary is what tokenizer.json says, if it can be read.
    """
    if metadata.get('data'):
        return metadata['data']
    try:
        tokenizer = read_json(os.path.join(workdir, TOKENIZER))
    except ConfigError:
        return {}
    return {'tokenizer': tokenizer} if tokenizer else {}


def check_vocabulary(old: Mapping[str, Any], new: Mapping[str, Any], holder: str) -> None:
    """Raises ConfigError if `holder` was trained with another vocabulary than that of the data."""
    there, here = old.get('tokenizer'), new['tokenizer']
    if there and not same_vocabulary(there, here):
        raise ConfigError(
            f'{holder} was trained with the vocabulary {described(there)}, and the data has '
            f'{described(here)}: prepare the data with that one, or start a new run in another '
            f'--workdir, without --init_from'
        )


def described(tokenizer: Mapping[str, str]) -> str:
    """Describes a vocabulary for messages."""
    return f'{tokenizer["name"]} ({tokenizer["fingerprint"][:12]})'


def changed_data(old: Mapping[str, Any], new: Mapping[str, Any], holder: str) -> str:
    """Returns a line about other tokens than those that `holder` was trained on, '' for none."""
    there, here = old.get('sources'), new['sources']
    if there is None or there == here:
        return ''
    said = []
    for name in sorted(there.keys() | here.keys()):
        a, b = amount(there.get(name)), amount(here.get(name))
        if a != b:
            said.append(f'{name}: {a} there, {b} here')
    if not said:
        return ''
    return f'the data differs from what {holder} was trained on: {", ".join(said)}'


def amount(source: Mapping[str, Any] | None) -> str:
    """Describes the tokens of a source for messages."""
    return f'{source["tokens"]:,} tokens ({source["digest"][:12]})' if source else 'none'
