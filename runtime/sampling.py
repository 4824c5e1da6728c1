"""Text of a run: its tokenizer, and completions of prompts."""

import codecs
import json
import os
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
import tiktoken
from ml_collections import ConfigDict

from decoding import Sampling, check_prompts, generate
from model import model_config
from parallel import Tree
from runtime.workdir import TOKENIZER
from storage.stores import read_text
from tokenizer import END_OF_TEXT, fingerprint, get_encoding, token_bytes


def run_encoding(workdir: str, name: str = '') -> tiktoken.Encoding:
    """The tokenizer of a run, which `name` may find elsewhere than where the run found it.

    Raises ValueError if it is unknown or another one than the run's.
    """
    record = json.loads(read_text(os.path.join(workdir, TOKENIZER)) or '{}')
    if not name and not record:
        raise ValueError(
            f'{workdir} does not say which tokenizer its run has: there is no {TOKENIZER}; name '
            f'the one of its data with --tokenizer'
        )
    encoding = get_encoding(name or record['name'])
    if record and fingerprint(encoding) != record['fingerprint']:
        raise ValueError(
            f'{encoding.name} is another vocabulary than {record["name"]!r} was when {workdir} was '
            f'trained: name a copy of that one with --tokenizer'
        )
    return encoding


def end_of_text(encoding: tiktoken.Encoding) -> int:
    """Its id, or -1 if the vocabulary has none."""
    has_one = END_OF_TEXT in encoding.special_tokens_set
    return encoding.encode_single_token(END_OF_TEXT) if has_one else -1


def allowed_tokens(encoding: tiktoken.Encoding, vocab_size: int) -> np.ndarray:
    """The ids that stand for text, and end of text: bool [V]. A model may have further ids."""
    if encoding.n_vocab > vocab_size:
        raise ValueError(
            f'{encoding.name} has {encoding.n_vocab} tokens, and the model has {vocab_size}: it '
            f'was trained with another tokenizer; name that one with --tokenizer'
        )
    allowed = np.zeros(vocab_size, bool)
    allowed[: encoding.n_vocab] = token_bytes(encoding) > 0
    if (stop := end_of_text(encoding)) >= 0:
        allowed[stop] = True
    return allowed


def encode(encoding: tiktoken.Encoding, prompt: str) -> list[int]:
    """Where a prompt says <|endoftext|>, the token of that name is meant."""
    return encoding.encode(
        prompt, allowed_special={END_OF_TEXT} & encoding.special_tokens_set, disallowed_special=()
    )


class Completion:
    """What follows one prompt, as its tokens come.

    `tokens` leaves out end of text; `text` also the stop string and what came after it. Bytes that
    are no UTF-8 read as U+FFFD.
    """

    def __init__(self, prompt: str, encoding: tiktoken.Encoding, stops: Sequence[str] = ()):
        self.prompt, self.text, self.finish_reason = prompt, '', ''
        self.tokens: list[int] = []
        self._encoding, self._stops, self._end = encoding, stops, end_of_text(encoding)
        self._decoder = codecs.getincrementaldecoder('utf-8')('replace')
        self._taken = 0

    def add(self, tokens: Sequence[int]) -> None:
        """Further tokens; a negative one says that there are no more."""
        for token in map(int, tokens):
            if self.finish_reason:
                return
            if token < 0 or token == self._end:
                self.finish('length' if token < 0 else 'stop')
                return
            self.tokens.append(token)
            self._append(self._decoder.decode(self._encoding.decode_single_token_bytes(token)))

    def finish(self, reason: str = 'length') -> None:
        if not self.finish_reason:
            self._append(self._decoder.decode(b'', final=True))
            self.finish_reason = self.finish_reason or reason

    def _append(self, text: str) -> None:
        longest = max(map(len, self._stops), default=0)
        start = max(0, len(self.text) - longest + 1)
        self.text += text
        found = [i for stop in self._stops if (i := self.text.find(stop, start)) >= 0]
        if found:
            self.text, self.finish_reason = self.text[: min(found)], 'stop'

    def take(self) -> str:
        """The text since the last call; but not yet what may be the start of a stop string."""
        end = len(self.text)
        if not self.finish_reason:
            starts = (stop[:n] for stop in self._stops for n in range(1, len(stop)))
            end -= max((len(s) for s in starts if self.text.endswith(s)), default=0)
        text, self._taken = self.text[self._taken : end], max(end, self._taken)
        return text

    def record(self) -> dict[str, Any]:
        fields = ('prompt', 'text', 'tokens', 'finish_reason')
        return {name: getattr(self, name) for name in fields}


def make_sampler(
    config: ConfigDict, encoding: tiktoken.Encoding
) -> Callable[[Tree, int], list[dict[str, str]]]:
    """(params on their training mesh, step) -> [{prompt, text}] for config.log.prompts.

    Raises ValueError, before the run starts, for prompts that cannot be continued. With several
    processes all call the sampler.
    """
    log, cfg = config.log, model_config(config, jax.default_backend())
    prompts = [encode(encoding, prompt) for prompt in log.prompts]
    try:
        check_prompts(prompts, config.seq_len, cfg.vocab_size)
    except ValueError as error:
        raise ValueError(f'the config cannot run: log.prompts: {error}') from error
    options = {
        'sampling': Sampling(temperature=log.sample_temperature),
        'stop': end_of_text(encoding),
        'allowed': allowed_tokens(encoding, cfg.vocab_size),
    }

    def sample(params: Tree, step: int) -> list[dict[str, str]]:
        rows = generate(
            params, cfg, prompts, log.sample_tokens, config.seq_len, seed=step, **options
        )
        completions = [Completion(prompt, encoding) for prompt in log.prompts]
        for completion, tokens in zip(completions, rows, strict=True):
            completion.add([*tokens, -1])
        return [{'prompt': c.prompt, 'text': c.text} for c in completions]

    return sample
