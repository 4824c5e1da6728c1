"""Three steps on a mesh and on one device, compared: for test_parity.py and the like.

All in float32, by relative error of each leaf's norm; replicas must be bit-identical.
"""

import functools

import jax
import numpy as np
import pytest
from common import (
    TOLERANCE,
    assert_replicas_identical,
    assert_trees_close,
    batch_at,
    initial_state,
    on_mesh,
    set_up,
    small_config,
)
from ml_collections import ConfigDict

from parallel import Tree, merged
from runtime.config_checks import validate
from train_step import make_train_step, put_batch


def run(config: ConfigDict) -> dict[str, Tree]:
    """Takes three steps. The gradient is read from the first moment (of Muon: the momentum) after
    one of them, where it stands clipped and times 1 - b1: so each leaf is tested without a second
    program."""
    validate(config, jax.device_count())
    s, batches = set_up(config), functools.partial(batch_at, seq_len=config.seq_len)
    state, step = initial_state(s), make_train_step(s)
    history, grads = [], None
    for i in range(3):
        state, metrics = step(state, put_batch(batches, i, s))
        history.append(jax.device_get(metrics))
        if i == 0:
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
    }


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
    assert got['loss'] == pytest.approx(want['loss'], rel=tolerance)
    assert min(want['grad_norms']) > config.optimizer.clip_norm, 'clipping is not active'
    assert got['grad_norms'] == pytest.approx(want['grad_norms'], rel=tolerance)
    assert_trees_close(got['grads'], want['grads'], tolerance)
    assert_trees_close(got['params'], want['params'], tolerance)
    assert_trees_close(got['average'], want['average'], tolerance)
    assert got['skipped'] == want['skipped']
    assert_trees_close(got['router'], want['router'], tolerance)
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
