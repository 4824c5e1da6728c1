"""Text of a run: its tokenizer, and completions of prompts."""

import codecs
import os
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tiktoken

from config import ConfigError
from decoding import Sampling, check_prompts, stream
from parallel import Tree
from runtime.workdir import TOKENIZER, read_json, same_vocabulary
from tokenizer import end_of_text as name_of_end
from tokenizer import fingerprint, get_encoding, in_text, token_bytes
from train_step import Setup


def run_encoding(workdir: str, name: str = '') -> tiktoken.Encoding:
    """Returns the tokenizer of a run; `name` says where it is now, if it has moved.

    Raises ConfigError if it is unknown or another one than the run's.
    """
    path = os.path.join(workdir, TOKENIZER)
    try:
        record = read_json(path)
    except ConfigError as error:
        raise ConfigError(f'{error}; remove it, and name the tokenizer with --tokenizer') from error
    if not name and not record:
        raise ConfigError(
            f'{workdir} does not say which tokenizer its run has: there is no {TOKENIZER}; name '
            f'the one of its data with --tokenizer'
        )
    encoding = get_encoding(name or record['name'])
    here = {'name': encoding.name, 'fingerprint': fingerprint(encoding)}
    if record and not same_vocabulary(record, here):
        raise ConfigError(
            f'{encoding.name} is another vocabulary than {record["name"]!r} was when {workdir} was '
            f'trained: name a copy of that one with --tokenizer'
        )
    return encoding


def end_of_text(encoding: tiktoken.Encoding) -> int:
    """Returns the id of end of text, or -1 if the vocabulary has none."""
    name = name_of_end(encoding)
    return -1 if name is None else encoding.encode_single_token(name)


def allowed_tokens(encoding: tiktoken.Encoding, vocab_size: int) -> np.ndarray:
    """Marks the ids of text and end of text: bool [V]. A model may have further ids."""
    if encoding.n_vocab > vocab_size:
        raise ConfigError(
            f'{encoding.name} has {encoding.n_vocab} tokens, and the model has {vocab_size}: it '
            f'was trained with another tokenizer; name that one with --tokenizer'
        )
    allowed = np.zeros(vocab_size, bool)
    allowed[: encoding.n_vocab] = token_bytes(encoding) > 0
    if (stop := end_of_text(encoding)) >= 0:
        allowed[stop] = True
    return allowed


def encode(encoding: tiktoken.Encoding, prompt: str) -> list[int]:
    """Encodes a prompt; the name of the end-of-text token in it stands for that token."""
    end = name_of_end(encoding)
    try:
        return encoding.encode(
            prompt,
            allowed_special=in_text(encoding) | ({end} if end else set()),
            disallowed_special=(),
        )
    except ValueError as error:  # such as a million spaces
        raise ConfigError(f'the tokenizer cannot encode a prompt ({error}); shorten it') from error


def check_stops(stops: Sequence[str]) -> None:
    """Raises ConfigError for an empty stop string, which is in every text."""
    if not all(stops):
        raise ConfigError("--stop='' is in every text; give a text that ends a completion, or none")


class Completion:
    """The continuation of one prompt, which grows as tokens come.

    `tokens` leaves out end of text; `text` also the stop string and all after it. Bytes that are
    no UTF-8 read as U+FFFD.
    """

    def __init__(self, prompt: str, encoding: tiktoken.Encoding, stops: Sequence[str] = ()):
        check_stops(stops)
        self.prompt, self.text, self.finish_reason = prompt, '', ''
        self.tokens: list[int] = []
        self._encoding, self._stops, self._end = encoding, stops, end_of_text(encoding)
        self._decoder = codecs.getincrementaldecoder('utf-8')('replace')
        self._taken = 0

    def add(self, tokens: Sequence[int]) -> None:
        """Takes further tokens; a negative one says that there are no more."""
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
        """Returns the text since the last call, but not yet a possible start of a stop string."""
        end = len(self.text)
        if not self.finish_reason:
            starts = (stop[:n] for stop in self._stops for n in range(1, len(stop)))
            end -= max((len(s) for s in starts if self.text.endswith(s)), default=0)
        text, self._taken = self.text[self._taken : end], max(end, self._taken)
        return text

    def record(self) -> dict[str, Any]:
        fields = ('prompt', 'text', 'tokens', 'finish_reason')
        return {name: getattr(self, name) for name in fields}


def make_sampler(s: Setup, encoding: tiktoken.Encoding) -> Callable[..., list[dict[str, str]]]:
    """Returns (params on their training mesh, step) -> [{prompt, text}] for config.log.prompts.

    As keyword argument it takes `between`, which is called after every few tokens, and stops the
    sampling by an exception. Raises ConfigError, before the run starts, for prompts that cannot be
    continued. With several processes all call the sampler.
    """
    log, context = s.config.log, s.config.seq_len
    prompts = [encode(encoding, prompt) for prompt in log.prompts]
    try:
        check_prompts(prompts, context, s.model.vocab_size)
    except ConfigError as error:
        raise ConfigError(f'the config cannot run: log.prompts: {error}') from error
    options = {
        'sampling': Sampling(temperature=log.sample_temperature),
        'stop': end_of_text(encoding),
        'allowed': allowed_tokens(encoding, s.model.vocab_size),
    }

    def sample(
        params: Tree, step: int, between: Callable[[], None] | None = None
    ) -> list[dict[str, str]]:
        completions = [Completion(prompt, encoding) for prompt in log.prompts]
        arguments = (params, s.model, prompts, log.sample_tokens, context)
        for tokens in stream(*arguments, seed=step, **options):
            for completion, row in zip(completions, tokens, strict=True):
                completion.add(row)
            if between:
                between()
        for completion in completions:
            completion.finish()
        return [{'prompt': c.prompt, 'text': c.text} for c in completions]

    return sample
