"""Continues text with the model of a run.

    python generate.py --workdir=runs/tiny --prompt='def main(' --max_tokens=200
    python generate.py --workdir=runs/tiny --prompts_file=prompts.txt --json --temperature=0

Text is printed as it comes, and the speed at the end on standard error. With --json standard output
holds nothing but one object per completion, in the order of the prompts: prompt, text, tokens (ids)
and finish_reason ('stop': end of text or a stop string, which the text leaves out; 'length').

The text is runtime/sampling.py's business, the tokens decoding.py's.
"""

if __name__ == '__main__':  # before the imports that take seconds
    from machine import startup

    startup.quick_interrupts()

import json
import math
import os
import sys
import time
from typing import Any

import jax
import numpy as np
import tiktoken
from absl import flags
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from checkpoint import Checkpointer, CheckpointError
from config import ConfigError, ModelConfig, divisors, saved_config
from decoding import Sampling, stream, weight_types
from machine import command, processes
from model import declared_params, model_for
from parallel import FSDP, TP, Tree, is_param, make_mesh, spec_axes
from runtime.resume import as_state, check_averaged
from runtime.sampling import (
    Completion,
    allowed_tokens,
    check_stops,
    encode,
    end_of_text,
    run_encoding,
)
from runtime.workdir import CHECKPOINTS
from tokenizer import END_OF_TEXT

# ---------------------------------------------------------------------------------------------
# A run's model
# ---------------------------------------------------------------------------------------------


def make_decoding_mesh(declared: Tree, tp: int, fsdp: int) -> Mesh:
    """Makes a mesh of tp · fsdp devices.

    Raises ConfigError if they do not divide the model or are not there.
    """
    sizes = {TP: tp, FSDP: fsdp}
    for axis, size in sizes.items():
        dims = [
            p.shape[dim]
            for p in jax.tree.leaves(declared, is_leaf=is_param)
            for dim, entry in enumerate(p.spec)
            if axis in spec_axes((entry,))
        ]
        if size < 1 or math.gcd(*dims) % size:
            raise ConfigError(
                f'--{axis}={size} does not divide all dimensions of the model that it shards; use '
                f'{divisors(math.gcd(*dims))}'
            )
    if tp * fsdp > jax.device_count():
        raise ConfigError(
            f'--tp={tp} times --fsdp={fsdp} takes {tp * fsdp} devices and {jax.device_count()} are '
            f'there; use smaller ones, or --cpu_devices={tp * fsdp} to simulate them'
        )
    return make_mesh(sizes)


def load(
    workdir: str,
    step: int | None = None,
    tp: int = 1,
    fsdp: int = 1,
    dtype: str = '',
    tokenizer: str = '',
    averaged: bool | None = None,
) -> tuple[Tree, ModelConfig, ConfigDict, tiktoken.Encoding]:
    """Loads a run's checkpoint onto this machine: (params, model, config, its tokenizer).

    Any mesh may have written them; each is cast to the type that it is used in (`dtype`, or the
    run's) as soon as it is read. `step` None is the newest, `tokenizer` as in `run_encoding`;
    `averaged` loads the averaged weights, by default where the run evaluates them. Raises
    ConfigError if there is no such checkpoint or tokenizer, or it does not fit the mesh,
    CheckpointError if it is damaged.
    """
    path = os.path.join(workdir, CHECKPOINTS)
    with Checkpointer(path) as checkpoints:
        newest = checkpoints.latest_step()
        if newest is None:
            raise ConfigError(
                f'{path} holds no checkpoint; use the --workdir of a run that has saved one'
            )
        step = newest if step is None else step
        saved = checkpoints.metadata(step)['config']
        config = saved_config(saved | ({'compute_dtype': dtype} if dtype else {}))
        averaged = config.eval.averaged if averaged is None else averaged
        check_averaged(saved, workdir, averaged)
        encoding = run_encoding(workdir, tokenizer)
        end = end_of_text(encoding) if config.data.isolate_documents else -1
        cfg = model_for(config, jax.default_backend(), end)
        declared = declared_params(config)
        mesh = make_decoding_mesh(declared, tp, fsdp)
        leaves, tree = jax.tree_util.tree_flatten_with_path(declared, is_leaf=is_param)
        params = []
        types = jax.tree.leaves(weight_types(declared, cfg))
        for (keys, p), used in zip(leaves, types, strict=True):
            sharding = NamedSharding(mesh, p.spec)
            wanted = jax.ShapeDtypeStruct(p.shape, np.float32, sharding=sharding)
            for entry in reversed(keys):
                wanted = {entry.key: wanted}
            (x,) = jax.tree.leaves(checkpoints.restore(step, as_state(wanted, averaged)))
            params.append(x.astype(used))
    return jax.tree.unflatten(tree, params), cfg, config, encoding


# ---------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------

FLAGS = flags.FLAGS


def read_prompts() -> list[str]:
    """Returns --prompt, and the lines of --prompts_file, each a JSON string in a file .jsonl.

    Lines end with \\n or \\r\\n, and with nothing else; blank ones are left out. Raises
    ConfigError, with file and line, for a prompt that is empty or no text.
    """
    prompts = [('--prompt', prompt) for prompt in FLAGS.prompt]
    if path := FLAGS.prompts_file:
        prompts += prompts_of(path)
    for place, prompt in prompts:
        if not isinstance(prompt, str) or not prompt:
            raise ConfigError(
                f'{place}: a prompt is a text that is not empty, and this is {prompt!r}; use '
                f'the end-of-text token, often {END_OF_TEXT}, to start from nothing'
            )
    if not prompts:
        raise ConfigError(
            f'there is no prompt; give --prompt or a --prompts_file that has one, and the '
            f'end-of-text token, often {END_OF_TEXT}, to start from nothing'
        )
    return [prompt for _, prompt in prompts]


def prompts_of(path: str) -> list[tuple[str, Any]]:
    """Returns ('PATH, line N', prompt) for each line of the file that is not blank."""
    try:
        with open(path, encoding='utf-8-sig', newline='\n') as f:  # drops a byte-order mark
            lines = [line.removesuffix('\n').removesuffix('\r') for line in f]
    except (OSError, UnicodeError) as error:
        raise ConfigError(f'--prompts_file={path} cannot be read: {error}') from error
    prompts = []
    for number, line in enumerate(lines, 1):
        place = f'{path}, line {number}'
        try:
            if line.strip():
                prompts.append((place, json.loads(line) if path.endswith('.jsonl') else line))
        except ValueError as error:
            raise ConfigError(f'{place}: {error}; write a JSON string, as in "a text"') from error
    return prompts


class Printer:
    """Prints completions in order, each as its text comes once those before it have ended."""

    def __init__(self, completions: list[Completion]):
        self._waiting = list(completions)
        self._begun = False

    def update(self) -> None:
        while self._waiting:
            completion = self._waiting[0]
            text = completion.take()
            print(text if self._begun else completion.prompt + text, end='', flush=True)
            self._begun = True
            if not completion.finish_reason:
                return
            print('\n' if self._waiting[1:] else '')
            self._begun = not self._waiting.pop(0)


def report(completions: list[Completion], seconds: float, first: float) -> None:
    """Prints the speed to standard error; compiling belongs to the time before the first tokens."""
    n_tokens = sum(len(c.tokens) for c in completions)
    rest = max(n_tokens - len(completions), 0)
    print(
        f'{n_tokens} tokens for {len(completions)} prompt(s): the first after {first:.2f} s, then '
        f'{rest / max(seconds - first, 1e-9):.1f} tokens/s',
        file=sys.stderr,
    )


def run() -> None:
    """Continues the prompts of the flags."""
    f = FLAGS
    if not f.workdir:
        raise ConfigError('give --workdir=RUN, the folder that train.py named and wrote')
    check_stops(f.stop)
    prompts, sampling = read_prompts(), Sampling(f.temperature, f.top_k, f.top_p, f.min_p)
    params, cfg, config, encoding = load(
        f.workdir, f.step, f.tp, f.fsdp, f.dtype, f.tokenizer, f.averaged
    )
    allowed = allowed_tokens(encoding, cfg.vocab_size)
    completions = [Completion(prompt, encoding, f.stop) for prompt in prompts]
    active = jax.process_index() == 0
    printer = Printer(completions if active and not f.json else [])
    started, first = time.perf_counter(), 0.0
    for tokens in stream(
        params,
        cfg,
        [encode(encoding, prompt) for prompt in prompts],
        f.max_tokens,
        f.context or config.seq_len,
        sampling=sampling,
        seed=f.seed,
        stop=end_of_text(encoding),
        allowed=allowed,
    ):
        first = first or time.perf_counter() - started
        for completion, row in zip(completions, tokens, strict=True):
            completion.add(row)
        printer.update()
        if all(completion.finish_reason for completion in completions):
            break
    for completion in completions:
        completion.finish()
    printer.update()
    if active and f.json:
        print('\n'.join(json.dumps(completion.record()) for completion in completions))
    if active:
        report(completions, time.perf_counter() - started, first)


def main(_: list[str]) -> None:
    processes.choose_platform(FLAGS.cpu_devices)
    with command.messages(CheckpointError):
        run()


def define_flags() -> None:
    command.DEFINE_path('workdir', None, 'The run, as train.py left it.')
    flags.DEFINE_integer('step', None, 'Checkpoint to load; by default the newest.', lower_bound=0)
    flags.DEFINE_boolean('averaged', None, 'Averaged weights; by default those evaluated.')
    flags.DEFINE_multi_string('prompt', [], 'Text to continue; several are allowed.')
    command.DEFINE_path('prompts_file', '', 'A prompt per line; .jsonl: JSON strings.')
    flags.DEFINE_integer('max_tokens', 200, 'Most tokens to add to a prompt.', lower_bound=1)
    flags.DEFINE_integer(
        'context', 0, 'Most tokens of prompt and text; 0: as trained.', lower_bound=0
    )
    flags.DEFINE_float('temperature', 0.8, 'Randomness; 0 takes the likeliest token.')
    flags.DEFINE_integer('top_k', 0, 'Draw from the k likeliest tokens; 0: from all.')
    flags.DEFINE_float('top_p', 1.0, 'Draw from the likeliest that sum to this.')
    flags.DEFINE_float('min_p', 0.0, 'Least probability, as a share of the largest.')
    flags.DEFINE_integer('seed', 0, 'Random seed.', lower_bound=0, upper_bound=2**32 - 1)
    flags.DEFINE_multi_string('stop', [], 'Text that ends a completion; several are allowed.')
    command.DEFINE_path('tokenizer', '', "The run's vocabulary, if its file has moved.")
    flags.DEFINE_integer('tp', 1, 'Shards of heads, feed-forward, vocabulary.')
    flags.DEFINE_integer('fsdp', 1, 'Shards of weights and prompts.')
    flags.DEFINE_enum('dtype', '', ['', 'float32', 'bfloat16'], "Compute type; the run's if empty.")
    flags.DEFINE_integer(
        'cpu_devices', 0, 'Devices to simulate on the CPU.', lower_bound=0, upper_bound=4096
    )
    flags.DEFINE_boolean('json', False, 'Print a JSON object per completion alone.')


if __name__ == '__main__':
    startup.hear_interrupts()
    command.run(main, define_flags)
