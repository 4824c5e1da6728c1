"""A sequence cut over cp: layout, balance, no leak between documents, rules, and 16 devices.

Its parity is in test_parity.py and, by schedule, in test_pipeline.py.
"""

import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest
from common import initial_params, set_up, small_config
from common_data import ROOT
from common_parity import check, cut
from ml_collections import ConfigDict

from config import ConfigError
from layers.attention import ATTENTION, gqa_sizes
from layers.context_parallel import STYLES, ring_pairs
from model import logits
from parallel import (
    BATCH,
    CP,
    TP,
    Array,
    P,
    gather_zigzag,
    make_mesh,
    own_positions,
    specs,
    zigzag,
    zigzag_order,
)
from runtime.config_checks import validate

END = 3  # the token that ends a document


def cut_config(attention: str = 'mla', style: str = 'ring', cp: int = 2, **mesh) -> ConfigDict:
    """Cuts sequences of 16 into parts of 8/cp tokens, with blocks of 2 at most."""
    config = small_config(attention)
    config.cp_style, config.model.attention_block = style, 2
    config.mesh.update(cp=cp, **mesh)
    return config


# ---------------------------------------------------------------------------------------------
# Layout
# ---------------------------------------------------------------------------------------------


def on_devices(f, x: Array, out: P, **mesh) -> np.ndarray:
    sharded = jax.shard_map(f, mesh=make_mesh(mesh), in_specs=P(), out_specs=out, check_vma=False)
    return np.asarray(jax.jit(sharded)(x))


@pytest.mark.parametrize('cp', [1, 2, 4])
def test_parts_are_an_early_and_a_late_one(cp):
    x = np.arange(3 * 16).reshape(3, 16)
    held = on_devices(lambda x: zigzag(x, CP, 1), x, P(None, CP), cp=cp)
    size = 16 // (2 * cp)
    for i, row in enumerate(np.split(held, cp, axis=1)):
        parts = [x[:, p * size : (p + 1) * size] for p in (i, 2 * cp - 1 - i)]
        np.testing.assert_array_equal(row, np.concatenate(parts, 1) if cp > 1 else x)
    for dim in (1, -1):
        both = on_devices(lambda x: gather_zigzag(zigzag(x, CP, 1), CP, dim), x, P(), cp=cp)  # noqa: B023
        np.testing.assert_array_equal(both, x)


def test_positions_are_spread_over_cp_and_tp():
    x = np.arange(16)
    held = on_devices(lambda x: own_positions(x, 0), x, P((CP, TP)), cp=2, tp=2)
    assert held.reshape(4, 4).tolist() == [
        [0, 1, 2, 3], [12, 13, 14, 15], [4, 5, 6, 7], [8, 9, 10, 11],
    ]  # fmt: skip


# ---------------------------------------------------------------------------------------------
# Balance
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize('cp', [2, 4, 8])
def test_each_device_computes_as_much(cp):
    """Pairs of a query and a key that it sees, counted one by one."""
    T = 256
    held = zigzag_order(T, cp).reshape(cp, -1, 1)
    seen = np.sum(held >= np.arange(T), axis=(1, 2))
    assert max(seen) <= 1.05 * min(seen)
    assert sum(seen) == T * (T + 1) // 2


@pytest.mark.parametrize('cp', [2, 4])
def test_the_ring_computes_each_visible_pair_of_blocks_once(cp):
    cfg = set_up(cut_config()).model
    block, own, others = ring_pairs(32, cp, cfg)  # of each device: two parts of 8 blocks
    assert block == 2
    assert own.shape == (cp, 2 * 8 * 8 + 8, 4)
    assert others.shape == (cp - 1, cp, 2 * 8 * 8, 4)  # each device as many, in each step
    pairs = [*own.reshape(-1, 4).tolist(), *others.reshape(-1, 4).tolist()]
    lower = {(i, j) for i in range(16 * cp) for j in range(i + 1)}
    assert len(pairs) == len(lower)
    assert {(i, j) for _, _, i, j in pairs} == lower


def test_the_ring_refuses_parts_that_are_no_whole_blocks():
    cfg = set_up(cut_config()).model
    for T in (6, 33):
        with pytest.raises(ValueError, match=r'not cut evenly by model.attention_block=2'):
            ring_pairs(T, 2, cfg)


# ---------------------------------------------------------------------------------------------
# Documents
# ---------------------------------------------------------------------------------------------


def logits_of(config: ConfigDict, ids_BT: np.ndarray) -> np.ndarray:
    s = set_up(config)
    sharded = jax.shard_map(
        lambda params, ids: logits(params, ids, s.model),
        mesh=s.mesh,
        in_specs=(specs(s.declared), P(BATCH)),
        out_specs=P(BATCH, None, TP),
        check_vma=False,
    )
    return np.asarray(jax.jit(sharded)(initial_params(s.model, s.mesh), ids_BT))


LEAK_MESHES = [{'cp': 2}, {'cp': 4}, {'cp': 2, 'tp': 2, 'fsdp': 2}, {'cp': 4, 'dp': 2}]


@pytest.mark.parametrize(
    ('attention', 'style', 'mesh'),
    [
        ('mla', 'ring', {'cp': 4, 'tp': 2}),
        ('gqa', 'gather', {'cp': 2, 'tp': 2}),
        pytest.param('gdn', 'ring', {'cp': 4, 'tp': 2}, marks=pytest.mark.slow),
        pytest.param('kda', 'ring', {'cp': 2, 'dp': 2}, marks=pytest.mark.slow),
        *(
            pytest.param(attention, style, mesh, marks=pytest.mark.slow)
            for attention in ('mla', 'gqa')
            for style in STYLES
            for mesh in LEAK_MESHES
        ),
    ],
    ids=str,
)
def test_no_document_sees_another(attention, style, mesh):
    """Documents that begin and end at borders of parts and within them: all tokens of one change,
    and no logit of another by one bit."""
    config = cut_config(attention, style, **mesh)
    config.model.document_end = END
    lengths = np.array([[4, 4, 8], [5, 2, 9], [1, 14, 1], [8, 7, 1]])
    rng = np.random.default_rng(0)
    ids_BT = rng.integers(4, 64, (4, 16)).astype(np.int32)
    ends = np.cumsum(lengths, axis=1)
    np.put_along_axis(ids_BT, ends - 1, END, axis=1)
    document_BT = np.sum(np.arange(16) >= ends[:, :, None], axis=1)
    before = logits_of(config, ids_BT)
    for changed in range(3):
        ours = (document_BT == changed) & (ids_BT != END)
        after = logits_of(config, np.where(ours, (ids_BT - 4 + 7) % 60 + 4, ids_BT))
        others = document_BT != changed
        np.testing.assert_array_equal(after[others], before[others])
        assert (after[ours] != before[ours]).any(axis=-1).all()


# ---------------------------------------------------------------------------------------------
# Rules
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'seq_len': 20}, 'use a seq_len of 16 or 24, or a smaller block'),
        ({'cp_style': 'star'}, 'cp_style=.star. is unknown; use one of ring, gather'),
        ({'model.attention_kernel': 'splash', 'check_vma': False}, 'use cp_style=.gather.'),
        ({'model.attention_kernel': 'cudnn', 'check_vma': False}, 'masks from the first query on'),
        ({'log.sample_every': 5}, 'generation does not run with mesh.cp=2'),
        ({'mesh.cp': 16}, 'is not cut evenly by mesh.cp=16'),
    ],
    ids=str,
)
def test_rules(changes, message):
    config = cut_config(tp=2)
    config.update_from_flattened_dict(changes)
    with pytest.raises(ConfigError, match=message):
        validate(config, 32)


def test_a_kind_of_layer_runs_over_cp_if_it_says_what_travels(monkeypatch):
    config = cut_config(tp=2)
    for kind in ('gqa+dense', 'gqa_nope+dense', 'mla+dense', 'mla_nope+dense'):
        config.model.block = (kind,)
        validate(config, 4)
    whole = ATTENTION['gqa']._replace(sizes=lambda cfg: gqa_sizes(cfg)._replace(travels=0))
    monkeypatch.setitem(ATTENTION, 'whole', whole)
    config.model.block = ('whole+dense', 'mla+dense')
    with pytest.raises(ConfigError, match="attention 'whole' takes whole sequences"):
        validate(config, 4)


# ---------------------------------------------------------------------------------------------
# Four axes
# ---------------------------------------------------------------------------------------------

# (dp, fsdp, tp, ep, pp, cp)
FOUR_AXES = [
    ((1, 2, 2, 1, 2, 2), 'ring'),
    ((1, 2, 2, 2, 1, 2), 'gather'),
    ((2, 1, 1, 2, 2, 2), 'ring'),
]


@pytest.mark.slow
@pytest.mark.parametrize(('sizes', 'style'), FOUR_AXES, ids=str)
def test_meshes_of_four_axes_match(sizes, style):
    """On 16 devices, in a process of its own."""
    given = json.dumps({'sizes': sizes, 'style': style})
    done = subprocess.run(
        [sys.executable, __file__, given],
        env={**os.environ, 'PYTHONPATH': ROOT},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr


if __name__ == '__main__':
    from machine.processes import choose_platform

    choose_platform(16)
    given = json.loads(sys.argv[1])
    config = cut('mla', given['style'], documents=True, moe=True)
    check(config, tuple(given['sizes']))
