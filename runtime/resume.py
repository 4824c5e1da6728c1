"""The start of a run: from the newest checkpoint of its workdir, or from another run's parameters.

A run goes on from the newest checkpoint of its workdir. The data's position and every random key
follow from the step and the seed, so the state and the step are all there is to restore.
"""

import itertools
import math
import os
from typing import Any

import jax
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

from checkpoint import Checkpointer
from config import FIXED, FREE, ConfigError, check_alike, differences, model_config, saved_config
from model import model_params
from optimizer import AVERAGE
from parallel import P, Tree
from runtime.data_record import changed_data, check_vocabulary, saved_record
from runtime.workdir import CHECKPOINTS, CONFIG, exists
from storage.leaves import leaf_names


def first_step(config: ConfigDict, workdir: str, checkpoints: Checkpointer) -> tuple[int, str]:
    """Returns the step that the run goes on from (0: it starts anew), and a line that says so.

    A workdir without a checkpoint binds nothing. Raises ConfigError if the workdir holds the run of
    another model or order of the data, CheckpointError if its newest checkpoint is damaged. All
    processes have to call this.
    """
    step = checkpoints.latest_step()
    if step == 0:
        raise ConfigError(
            f'{workdir} holds released weights, which convert.py brought in, and no run: start one '
            f'from them, with another --workdir and --init_from={workdir}'
        )
    if step is None:
        begun = exists(os.path.join(workdir, CONFIG))
        return 0, f'starting again: {workdir} holds no checkpoint' if begun else ''
    old = checkpoints.metadata(step)['config']
    check_alike(old, config, FIXED, f'{workdir} holds a run')
    check_optimizer(old, config, workdir)
    changed = differences(old, config.to_dict())
    if step >= config.steps:
        return step, (
            f'the run in {workdir} is complete: step {step} is saved, and steps={config.steps}; to '
            f'go on, give it more with --config.steps'
        )
    said = ''.join(f' · {name} {a!r} -> {b!r}' for name, a, b in changed)
    return step, f'going on from step {step} of {config.steps} in {checkpoints.path}{said}'


def check_optimizer(old: dict[str, Any], config: ConfigDict, workdir: str) -> None:
    """Raises ConfigError if the run's checkpoints lack what the optimizer keeps."""
    was, now = saved_config(old).optimizer, config.optimizer
    if was.name != now.name:
        field = 'name'
    elif now.ema and not was.ema:
        field = 'ema'
    else:
        return
    raise ConfigError(
        f'the config cannot run: the checkpoints of {workdir} lack what optimizer.{field}='
        f'{now[field]!r} keeps beside the parameters; use optimizer.{field}={was[field]!r} to go '
        f'on with them, or start a new run from its parameters: another --workdir, and '
        f'--init_from={workdir}'
    )


def compared_model(init_from: str, config: ConfigDict) -> str:
    """Compares the model with the one that a new run takes its parameters from.

    Returns a line about fields that differ, '' for none. Raises ConfigError, with those fields, if
    the parameters do not fit. All processes have to call this.
    """
    path, step, _ = init_step(init_from)
    with Checkpointer(path) as source:
        old = saved_config(source.metadata(step)['config'])
    changed = [
        f'{name}: {a!r} there, {b!r} here'
        for name, a, b in differences(old.to_dict(), config.to_dict())
        if name.startswith('model.') and name not in FREE
    ]
    there, here = (
        {name: p.shape for name, p in leaf_names(model_params(model_config(c))).items()}
        for c in (old, config)
    )
    if there != here:
        raise ConfigError(
            f'the config cannot run: the parameters of {init_from} are those of another model\n'
            + '\n'.join(f'  - {line}' for line in changed)
            + '\nuse the values there, or start without --init_from'
        )
    listed = ', '.join(changed)
    return f'the model differs from that of {init_from}: {listed}' if changed else ''


def compared_data(
    checkpoints: Checkpointer, start: int, workdir: str, init_from: str, record: dict[str, Any]
) -> list[str]:
    """Compares the data with what the parameters that a run starts from were trained on.

    Those are step `start` of the workdir, or at 0 those of `init_from`, if any. Returns lines to
    say. Raises ConfigError if the vocabulary is another one, or `init_from` holds no checkpoint.
    All processes have to call this.
    """
    if start:
        holder = f'step {start} of {workdir}'
        old = saved_record(checkpoints.metadata(start), workdir)
    elif init_from:
        path, step, origin = init_step(init_from)
        holder = f'step {step} of {origin}'
        with Checkpointer(path) as source:
            old = saved_record(source.metadata(step), origin)
    else:
        return []
    check_vocabulary(old, record, holder)
    ignored = start and init_from
    return [
        *([f'--init_from={init_from} is left aside: the run has steps of its own'] * bool(ignored)),
        *([changed] if (changed := changed_data(old, record, holder)) else []),
    ]


def restore_state(checkpoints: Checkpointer, step: int, target: Tree) -> Tree:
    """Restores a state, whatever number of chunks the pipeline had that saved it.

    With several, parameters have their blocks in [chunks, blocks / chunks, ...], with one in
    [blocks, ...], in the same order. A leaf that was saved in another layout is restored in that
    one, alike on all stages, and then laid out anew; one leaf after the other.
    """
    wanted, structure = leaf_names(target), jax.tree.structure(target)
    entries = checkpoints.metadata(step)['leaves']
    saved = [as_saved(name, want, entries.get(name)) for name, want in wanted.items()]
    wants = list(wanted.values())
    alike = [i for i, want in enumerate(wants) if saved[i] is want]
    leaves: dict[int, jax.Array] = {}
    for group in [alike, *([i] for i in range(len(wants)) if i not in alike)]:
        asked = [x if i in group else None for i, x in enumerate(saved)]
        restored = checkpoints.restore(step, jax.tree.unflatten(structure, asked))
        for i, x in zip(group, jax.tree.leaves(restored), strict=True):
            leaves[i] = x if i in alike else laid_out(x, wants[i])
    return jax.tree.unflatten(structure, [leaves[i] for i in range(len(wants))])


def as_saved(name: str, want: jax.ShapeDtypeStruct, entry: dict | None) -> jax.ShapeDtypeStruct:
    """Returns the leaf in the checkpoint's layout of the blocks, or `want` if it is the same."""
    if entry is None or 'blocks' not in name.split('.') or tuple(entry['shape']) == want.shape:
        return want
    shape = tuple(entry['shape'])
    for i, j in itertools.product((1, 2), (1, 2)):
        if shape[i:] == want.shape[j:] and math.prod(shape[:i]) == math.prod(want.shape[:j]):
            spec = P(*[None] * i, *want.sharding.spec[j:])
            sharding = NamedSharding(want.sharding.mesh, spec)
            return jax.ShapeDtypeStruct(shape, want.dtype, sharding=sharding)
    return want  # restoring tells the difference


def laid_out(x: jax.Array, want: jax.ShapeDtypeStruct) -> jax.Array:
    """Reshapes a leaf to the layout that is wanted."""
    return jax.jit(lambda x: x.reshape(want.shape), out_shardings=want.sharding)(x)


def load_params(path: str, shapes: Tree, averaged: bool = False) -> Tree:
    """Restores the parameters of another run: of its newest step, or of one checkpoint's folder.

    With `averaged`, their mean over the last updates. Raises ConfigError if there are none or the
    shapes differ. All processes have to call this.
    """
    folder, step, _ = init_step(path)
    with Checkpointer(folder) as source:
        check_averaged(source.metadata(step)['config'], path, averaged)
        try:
            restored = restore_state(source, step, as_state(shapes, averaged))
        except ConfigError as error:
            raise ConfigError(f'the parameters of {path}: {error}') from error
    return restored['moments'][AVERAGE] if averaged else restored['params']


def as_state(params: Tree, averaged: bool) -> Tree:
    """Returns a tree of parameters, or of averaged ones, at their place in the state."""
    return {'moments': {AVERAGE: params}} if averaged else {'params': params}


def check_averaged(saved: dict[str, Any], path: str, averaged: bool) -> None:
    """Raises ConfigError if averaged weights are asked for and the checkpoint has none."""
    if averaged and not saved_config(saved).optimizer.ema:
        raise ConfigError(
            f'{path} keeps no averaged weights: it was trained with optimizer.ema=0.0; use '
            f'--noaveraged'
        )


def init_step(path: str) -> tuple[str, int, str]:
    """Returns the folder of checkpoints, the step and the workdir that `path` stands for.

    It is a workdir, whose newest step is taken, or the folder of one checkpoint. Raises ConfigError
    if there is none. All processes have to call this.
    """
    path = path.rstrip('/')
    root, name = os.path.split(path)
    if os.path.basename(root) == CHECKPOINTS and name.isdecimal():
        return root, int(name), os.path.dirname(root)
    with Checkpointer(os.path.join(path, CHECKPOINTS)) as source:
        step = source.latest_step()
        if step is None:
            raise ConfigError(
                f'{path} holds no checkpoint to start from; use the workdir '
                f'of a run, or WORKDIR/checkpoints/STEP'
            )
        return source.path, step, path
