"""Where a run starts, and how it is asked to end.

A run goes on from the newest checkpoint of its workdir. The data's position and every random key
follow from the step and the seed, so the state and the step are all there is to restore.
"""

import functools
import itertools
import json
import math
import os
import signal
import threading
from collections.abc import Callable, Mapping
from types import FrameType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from ml_collections import ConfigDict

from checkpoint import Checkpointer
from leaves import leaf_names
from parallel import P, Tree
from stores import read_text, write_text

# What the checkpoint, and the meaning of its step, depend on; of the model, all but how it runs.
FIXED = ('seed', 'batch_size', 'seq_len', 'model.')
FREE = (
    'model.remat', 'model.remat_keep', 'model.remat_offload', 'model.attention_kernel',
    'model.attention_block', 'model.expert_kernel', 'model.loss_chunk',
)  # fmt: skip


def flat(config: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
    """{'model.d_model': 256, ...}"""
    fields: dict[str, Any] = {}
    for name, value in config.items():
        nested = isinstance(value, Mapping)
        fields |= flat(value, f'{prefix}{name}.') if nested else {prefix + name: value}
    return fields


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(field, old value, new value) of the fields that both configs have with other values."""
    a, b = (flat(json.loads(json.dumps(config))) for config in (old, new))
    return [(name, a[name], b[name]) for name in a if name in b and a[name] != b[name]]


def check_alike(
    old: Mapping[str, Any], config: ConfigDict, fixed: tuple[str, ...], holder: str
) -> None:
    """Raises ValueError if `holder` differs in a field that starts as `fixed` says."""
    changed = differences(old, config.to_dict())
    changed = [c for c in changed if c[0].startswith(fixed) and c[0] not in FREE]
    if changed:
        raise ValueError(
            f'the config cannot run: {holder} that differs in\n'
            + '\n'.join(f'  - {name}: {a!r} there, {b!r} here' for name, a, b in changed)
            + '\nuse the values there to go on with it, or another --workdir for a new run'
        )


def first_step(config: ConfigDict, workdir: str, checkpoints: Checkpointer) -> tuple[int, str]:
    """The step that the run goes on from (0: it starts anew), and a line that says so.

    Raises ValueError if what the workdir holds is the run of another model or order of the data,
    CheckpointError if its newest checkpoint is damaged. All processes have to call this.
    """
    step, old = checkpoints.latest_step() or 0, {}
    file = os.path.join(workdir, 'config.json')
    if step:
        old = checkpoints.metadata(step)['config']
    elif text := read_text(file):
        old = json.loads(text)
    check_alike(old, config, FIXED, f'{workdir} holds a run')
    changed = differences(old, config.to_dict())
    if not step:
        return 0, f'starting again: {workdir} holds no checkpoint' if old else ''
    if step >= config.steps:
        return step, (
            f'the run in {workdir} is complete: step {step} of {config.steps} is saved; to go on, '
            f'give it more with --config.steps'
        )
    said = ''.join(f' · {name} {a!r} -> {b!r}' for name, a, b in changed)
    return step, f'going on from step {step} of {config.steps} in {checkpoints.path}{said}'


def keep_records(path: str, step: int) -> None:
    """Drops from metrics.jsonl what was logged beyond the step, and a line cut short by a kill."""
    text = read_text(path)
    if text is None:
        return
    whole = [line for line in text.splitlines(keepends=True) if line.endswith('}\n')]
    write_text(path, ''.join(line for line in whole if json.loads(line)['step'] <= step))


def restore_state(checkpoints: Checkpointer, step: int, target: Tree) -> Tree:
    """`Checkpointer.restore`, whatever number of chunks the pipeline had.

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
    """The leaf in the checkpoint's layout of the blocks, or `want` if that is no other."""
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
    return jax.jit(lambda x: x.reshape(want.shape), out_shardings=want.sharding)(x)


def load_params(path: str, shapes: Tree) -> Tree:
    """The parameters of another run: of its workdir's newest step, or of one checkpoint's folder.

    Raises ValueError if there is none or the shapes differ. All processes have to call this.
    """
    root, name = os.path.split(path.rstrip('/'))
    is_step = os.path.basename(root) == 'checkpoints' and name.isdecimal()
    with Checkpointer(root if is_step else os.path.join(path, 'checkpoints')) as source:
        step = int(name) if is_step else source.latest_step()
        if step is None:
            raise ValueError(
                f'the config cannot run: {path} holds no checkpoint to start from; use the workdir '
                f'of a run, or WORKDIR/checkpoints/STEP'
            )
        try:
            return restore_state(source, step, {'params': shapes})['params']
        except ValueError as error:
            raise ValueError(f'the config cannot run: the parameters of {path}: {error}') from error


class StopSignals:
    """While entered, SIGTERM and SIGINT ask the run to save and end after the present step.

    A second SIGINT ends the process at once.
    """

    def __init__(self) -> None:
        self.received = False
        self._previous: dict[int, Any] = {}
        self._last_answer: jax.Array | None = None

    def __enter__(self) -> 'StopSignals':
        if threading.current_thread() is threading.main_thread():  # others may set no handlers
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.received = True
        if number == signal.SIGINT:
            signal.signal(signal.SIGINT, signal.SIG_DFL)

    def asked(self) -> bool:
        """Whether to end after this step: alike on all processes, which call it once a step.

        With several processes it is the answer of the call before: a device has it by now, so
        that nobody waits for the step that is running.
        """
        if jax.process_count() == 1:
            return self.received
        mesh, any_of = self._mesh_and_any
        flag = np.array([self.received], np.int32)
        flags = jax.make_array_from_callback(
            (mesh.size,), NamedSharding(mesh, P('all')), lambda _: flag
        )
        last, self._last_answer = self._last_answer, any_of(flags)
        return last is not None and bool(last)

    @functools.cached_property
    def _mesh_and_any(self) -> tuple[Mesh, Callable[[jax.Array], jax.Array]]:
        """All devices in a row, and a reduction over them to one number that all hold."""
        mesh = Mesh(np.array(jax.devices()), 'all')
        return mesh, jax.jit(jnp.max, out_shardings=NamedSharding(mesh, P()))
