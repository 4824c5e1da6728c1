"""Three steps on a mesh and on one device, compared: for test_parity.py and the like.

All in float32, by relative error of each leaf's norm; replicas must be bit-identical.
"""

import functools
import math
from collections.abc import Callable

import jax
import numpy as np
from common import (
    TOLERANCE,
    assert_replicas_identical,
    batch_at,
    initial_state,
    on_mesh,
    set_up,
    small_config,
)
from ml_collections import ConfigDict

from parallel import Array, Tree, merged
from runtime.config_checks import validate
from train_step import Setup, make_train_step, put_batch

STEPS = 3


def run(config: ConfigDict) -> dict[str, Tree]:
    """Takes three steps from `initial_state`: see `take`."""
    validate(config, jax.device_count())
    s = set_up(config)
    return take(s, make_train_step(s), initial_state(s))


def take(
    s: Setup,
    step: Callable[[Tree, Array], tuple[Tree, Tree]],
    state: Tree,
    first: int = 0,
    last: int = STEPS,
    batches: Callable[..., np.ndarray] = batch_at,
) -> dict[str, Tree]:
    """Takes the steps from `first` up to `last`. The gradient is read from the first moment (of
    Muon: the momentum) after one of them, where it stands clipped and times 1 - b1: so each leaf is
    tested without a second program."""
    batches = functools.partial(batches, seq_len=s.config.seq_len)
    history, grads = [], None
    for i in range(first, last):
        state, metrics = step(state, put_batch(batches, i, s))
        history.append(jax.device_get(metrics))
        if i == first:
            moments = jax.device_get(state['moments'])
            grads = merged(moments['m'], moments.get('momentum', {}))
    return {
        'loss': history[0]['loss'],
        'router': history[0]['router'],
        'grads': grads,
        'params': state['params'],
        'average': state['moments'].get('ema', {}),
        'skipped': int(history[-1]['skipped']),
        'grad_norms': [float(metrics['grad_norm']) for metrics in history],
        'losses': [float(metrics['loss']) for metrics in history],
        'state': state,
    }


# What a mesh must have in common with one device, as `take` returns it.
COMPARED = ('loss', 'losses', 'grad_norms', 'grads', 'params', 'average', 'skipped', 'router')


def distances(got: dict[str, Tree], want: dict[str, Tree]) -> dict[str, float]:
    """Returns the relative error of each number, and of each leaf by its norm, by their names.

    A number that is not finite on one side alone is infinitely far. Where stages have chunks,
    blocks count in two dimensions, in the same order.
    """
    found = {}
    for part in COMPARED:
        pairs = zip(
            jax.tree_util.tree_leaves_with_path(got[part]), jax.tree.leaves(want[part]), strict=True
        )
        for (path, a), b in pairs:
            name = part + jax.tree_util.keystr(path)
            a, b = (np.asarray(x, np.float64).reshape(-1) for x in (a, b))
            error = np.linalg.norm(a - b) / (np.linalg.norm(b) or 1)
            found[name] = float(error) if math.isfinite(error) else math.inf
            if np.array_equal(a, b, equal_nan=True):
                found[name] = 0.0
    return found


_reference: dict[str, dict] = {}


def reference(config: ConfigDict) -> dict[str, Tree]:
    name = config.to_json()
    if name not in _reference:
        _reference[name] = run(config)
    return _reference[name]


def check(
    config: ConfigDict,
    sizes: tuple[int, ...],
    tolerance: float = TOLERANCE,
    want: dict[str, Tree] | None = None,
) -> None:
    """Compares a mesh with one device, where the config is the same or `want` is another's."""
    want = want or reference(config)
    got = run(on_mesh(config, sizes))
    assert min(want['grad_norms']) > config.optimizer.clip_norm, 'clipping is not active'
    far = {name: error for name, error in distances(got, want).items() if not error < tolerance}
    assert not far, far
    assert_replicas_identical(got['params'])
    assert_replicas_identical(got['average'])
    for path, g in jax.tree_util.tree_leaves_with_path(got['grads']):
        if path[-1].key == 'bias':  # moved by the load, and compared above with the parameters
            continue
        assert np.abs(np.asarray(g)).max() > 0, f'{jax.tree_util.keystr(path)} has no gradient'


def cut(attention: str, style: str, documents: bool, moe: bool = False, **model) -> ConfigDict:
    """Two microbatches of sequences that cp can cut into up to 8 parts."""
    config = small_config(attention, microbatches=2, moe=moe)
    config.cp_style, config.seed = style, 1  # of seed 0 two choices are alike but for rounding
    config.model.update(attention_block=2, **model)
    if moe:
        config.model.capacity_factor = 0.8
    if documents:
        config.model.document_end = 3
    return config
