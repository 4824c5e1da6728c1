"""The draws of tests/fuzz_parity.py, and a fault that it finds and shrinks."""

import collections
import itertools
import json

import jax
import pytest
from fuzz_draws import (
    BESIDE,
    DERIVED,
    LAYOUT,
    LAYOUT_NAMES,
    MOST_DEVICES,
    NUMBERS,
    alone,
    beside,
    config_of,
    draw_cases,
    is_layout,
    options,
    values_of,
)
from fuzz_parity import ILL, Comparison, shrunk

import train_step
from config import flat
from runtime.config_checks import DEFAULTS, choices, validate


def drawn(seed: int, n: int) -> list[dict]:
    return list(itertools.islice(draw_cases(seed, collections.Counter()), n))


def test_a_seed_gives_the_same_configs():
    assert drawn(3, 12) == drawn(3, 12)
    assert drawn(3, 12) != drawn(4, 12)


def test_every_field_is_drawn_or_left_out_for_a_reason():
    for name in DEFAULTS:
        assert beside(name) or len(values_of(name)) > 0, name
    listed = {name for names in BESIDE.values() for name in names}
    known = {*NUMBERS, *LAYOUT, *LAYOUT_NAMES, *listed}
    groups = {name for name in known if name.endswith('.')}
    assert known - groups <= DEFAULTS.keys()
    assert all(any(name.startswith(group) for name in DEFAULTS) for group in groups)
    twice = [name for name in NUMBERS if beside(name) or is_layout(name)]
    assert not twice, twice


def test_draws_are_legal_and_one_device_has_no_layout():
    for case in drawn(0, 60):
        validate(config_of(case), MOST_DEVICES)
        assert config_of(json.loads(json.dumps(case))) == config_of(case)  # by --case
        dropped = case.get('model.dropout', 0) > 0
        assert [n for n in alone(case) if is_layout(n)] == ['microbatches'] * (
            dropped and 'microbatches' in case
        )


@pytest.mark.slow
def test_draws_reach_every_value():
    """A value that no draw has would be tested by nobody."""
    cases, seen = drawn(0, 400), collections.defaultdict(set)
    for case in cases:
        for name, value in flat(config_of(case).to_dict()).items():
            seen[name].add(value)
        for axis in case:
            seen['axes'].add(axis)
        for name in DERIVED:
            seen[name].add(case.get(name))
    for name in [*options(layout=False), *options(layout=True)]:
        missing = set(values_of(name)) - seen[name]
        assert not missing, (name, missing)
    axes = {'mesh.pp', 'mesh.dp', 'mesh.fsdp', 'mesh.ep', 'mesh.cp', 'mesh.tp'}
    assert axes | {'threes'} <= seen['axes']
    assert set(choices()['pipeline.schedule']) <= seen['pipeline.schedule']


def test_a_fault_is_found_and_shrunk(monkeypatch, tmp_path):
    """Gradients that are too large by the size of an axis, as autodiff without types makes them."""
    right = train_step.sum_gradients
    case, comparison = {'model.z_loss': 0.01, 'mesh.tp': 2}, Comparison(str(tmp_path))
    assert comparison.far({'mesh.tp': 2}) == {}

    def too_large(grads, declared):
        size = jax.lax.axis_size('tp')
        return jax.tree.map(lambda g: g * size, right(grads, declared))

    monkeypatch.setattr(train_step, 'sum_gradients', too_large)
    far = comparison.far(case)
    assert ILL not in far
    assert far['grad_norms[0]'] == pytest.approx(1, rel=1e-3)
    assert shrunk(case, lambda case: bool(comparison.far(case))) == {'mesh.tp': 2}
