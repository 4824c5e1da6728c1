"""Prints the commands that go on where this one ended, ready to be copied into a shell."""

import contextlib
import os
import shlex
import sys

import numpy as np
from ml_collections import ConfigDict

from checkpoint import Checkpointer
from config import ConfigError
from data import open_data
from runtime.lease import held_by_living
from runtime.workdir import CHECKPOINTS, unfinished_run

PROMPT_TOKENS, PROMPT_LETTERS = 64, 32  # of the prompt that `say_next` suggests


def say_next(config: ConfigDict, workdir: str, named: bool) -> None:
    """Prints the commands that one may want next; `named` if this one had a --workdir.

    A complete run goes on only with more steps.
    """
    arguments, steps = sys.argv, config.steps
    if not named:
        arguments = [*arguments, f'--workdir={workdir}']
    newest = 0
    # What cannot be listed any more does not spoil a run that has ended well.
    with (
        contextlib.suppress(ConfigError),
        Checkpointer(os.path.join(workdir, CHECKPOINTS)) as checkpoints,
    ):
        newest = max(checkpoints.steps(), default=0)
    if newest >= steps:
        arguments = [*without_flag(arguments, 'config.steps'), f'--config.steps={2 * steps}']
    prompt = f'--prompt={first_words(config)}'
    commands = {
        'go on': ['python', *arguments],
        'curves': ['python', 'train.py', f'--plot={workdir}'],
        'text': ['python', 'generate.py', f'--workdir={workdir}', prompt],
    }
    for purpose, words in commands.items():
        print(f'{purpose:>22}  {shlex.join(words)}')


def without_flag(arguments: list[str], name: str) -> list[str]:
    """Returns the arguments without a flag, given as --name=value or --name value."""
    kept, skip = [], False
    for argument in arguments:
        flag, equals, _ = argument.partition('=')
        is_it = flag.startswith('-') and flag.lstrip('-') == name
        if not (skip or is_it):
            kept.append(argument)
        skip = is_it and not equals
    return kept


def first_words(config: ConfigDict) -> str:
    """Returns the first words of a document that was held out, else of the first one."""
    try:
        _, sources, encoding = open_data(config, training=False)
        source = sources[0]
        split = source.evaluation.split if source.evaluation else source.train
        tokens = split.read(0, min(PROMPT_TOKENS, split.n_tokens))
    except (ConfigError, OSError):
        return 'The'
    ends = np.flatnonzero(tokens == split.end_of_text)
    text = encoding.decode(tokens[: ends[0] if len(ends) else None].tolist())
    words = ' '.join(text.replace('\ufffd', ' ').split()[:4])
    if len(words) > PROMPT_LETTERS:  # up to a space, if there is one
        words = words[:PROMPT_LETTERS].rpartition(' ')[0] or words[:PROMPT_LETTERS]
    return words or 'The'


def say_unfinished(config: ConfigDict) -> None:
    """Says which unfinished run of the same config there is among those without a --workdir."""
    found = unfinished_run(config)
    if found and not held_by_living(found[0]):
        workdir, step = found
        again = shlex.join(['python', *sys.argv, f'--workdir={workdir}'])
        print(f'{workdir} stopped at step {step} of {config.steps}; to go on with it: {again}')
