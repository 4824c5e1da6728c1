"""A process of a training run, for the tests that kill, stop or split one.

    python tests/training_worker.py '{"workdir": ..., "tokens": ..., "config": {...}, ...}'

Options: devices (a process), processes, process, address, phase (what to announce and to do slowly,
from the second save on), stop_at ([process, step] that gets a SIGTERM), fail (the process cannot
write its second save), file_limit (bytes, from the second save on), dump (a folder for what was
restored), cache (of compiled programs).
"""

import json
import os
import pathlib
import resource
import shutil
import signal
import sys
import time

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import jax
import numpy as np
from ml_collections import ConfigDict

import train
from checkpoint import Checkpointer, CheckpointError
from config import ConfigError
from configs import default
from machine.processes import choose_platform
from parallel import Tree
from runtime import evaluation
from storage import leaves
from storage.leaves import leaf_names
from storage.steps import StepFiles, Steps

PAUSE = 0.05  # seconds, while which a kill may arrive


def small_run(tokens: str, moe: bool = False, **changes) -> ConfigDict:
    """A config that trains in seconds. `changes`: fields, with __ for the dot."""
    c = default.get_config()
    c.data.path, c.steps, c.batch_size, c.seq_len, c.peak_flops = str(tokens), 20, 16, 32, 1e12
    c.model.update(
        vocab_size=264, d_model=32, n_layers=2, d_ff=48, n_heads=4, kv_rank=16, nope_dim=8,
        rope_dim=8, v_dim=8, attention_block=16, dropout=0.1,
    )  # fmt: skip
    if moe:
        c.model.update(block=('moe',), n_layers=4, n_experts=8, d_expert=16, bias_rate=0.02)
        c.microbatches = 2
    c.optimizer.warmup_steps, c.eval.every, c.eval.batches, c.log.every = 2, 0, 1, 1
    c.checkpoint.update(every=2, keep=1)
    c.update_from_flattened_dict({name.replace('__', '.'): x for name, x in changes.items()})
    return c


def announce(phase: str) -> None:
    print(f'PHASE {phase}', flush=True)
    time.sleep(PAUSE)


def slow_down(phase: str, active) -> None:
    """Makes one phase of a save announce itself, again and again, while `active()`."""

    def before(function):
        def wrapped(*args, **kwargs):
            if active():
                announce(phase)
            return function(*args, **kwargs)

        return wrapped

    if phase == 'copying':
        leaves.host_chunks = before(leaves.host_chunks)
    elif phase == 'writing':
        StepFiles.open_leaf = before(StepFiles.open_leaf)
    elif phase == 'before the marker':
        StepFiles.commit = before(StepFiles.commit)
    elif phase == 'after the marker':
        Steps.remove_old = before(Steps.remove_old)
    elif phase == 'clean-up':
        shutil.rmtree = remove_slowly
    elif phase == 'evaluation':
        evaluation.put_batch = before(evaluation.put_batch)
    elif phase == 'step':
        train.Tracer.before = before(train.Tracer.before)  # so that this step is the last one
    else:
        raise ValueError(phase)


def remove_slowly(folder: str) -> None:
    for path in sorted(pathlib.Path(folder).rglob('*'), reverse=True):
        announce('clean-up')
        path.rmdir() if path.is_dir() else path.unlink()
    os.rmdir(folder)


def dump_restored(folder: str) -> None:
    """Writes the shards of the state that training starts from, one file per process."""
    original = train.start_state

    def wrapped(*args):
        state = original(*args)
        pieces = {}
        for name, x in leaf_names(state).items():
            for shard in x.addressable_shards:
                if shard.replica_id == 0:
                    bounds = [s.indices(n)[:2] for s, n in zip(shard.index, x.shape, strict=True)]
                    pieces[json.dumps([name, x.shape, bounds])] = np.asarray(shard.data)
        np.savez(os.path.join(folder, f'{jax.process_index()}.npz'), **pieces)
        return state

    train.start_state = wrapped


def stop_at(process: int, step: int) -> None:
    """This process gets a SIGTERM in this step."""
    original = train.Tracer.before

    def before(self: train.Tracer, now: int, state: Tree) -> None:
        if jax.process_index() == process and now == step:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, now, state)

    train.Tracer.before = before


def main(options: dict) -> None:
    choose_platform(options.get('devices', 1))
    if 'cache' in options:  # of compiled programs, so that a start takes seconds
        jax.config.update('jax_compilation_cache_dir', options['cache'])
        jax.config.update('jax_persistent_cache_min_compile_time_secs', 0)
    if 'address' in options:
        jax.config.update('jax_cpu_collectives_implementation', 'gloo')
        jax.distributed.initialize(
            options['address'], options['processes'], options['process'], initialization_timeout=60
        )
    saves = []
    original = Checkpointer.save

    def save(self, *args, **named):
        saves.append(args[0])
        if len(saves) == 2:
            self.wait()  # so that it is the second save that is hindered
        if len(saves) == 2 and 'file_limit' in options:
            limit = options['file_limit']
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        if len(saves) == 2 and options.get('fail'):
            StepFiles.write = fail
        original(self, *args, **named)

    def fail(self, *args):
        raise OSError('the disk of this process is gone')

    Checkpointer.save = save
    if 'stop_at' in options:
        stop_at(*options['stop_at'])
    if 'phase' in options:
        slow_down(options['phase'], lambda: len(saves) >= 2)
    if 'dump' in options:
        dump_restored(options['dump'])
    try:
        config = small_run(options['tokens'], **options['config'])
        train.train(config, options['workdir'])
    except (CheckpointError, ConfigError) as error:
        sys.exit(str(error))


if __name__ == '__main__':
    main(json.loads(sys.argv[1]))
