"""The benchmark of Muon's collectives: none where none was written, bytes by its formula."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


def measured(*arguments: str) -> list[dict]:
    """Runs the benchmark and returns its rows."""
    line = [sys.executable, 'benchmarks/muon_collectives.py', *arguments, '--json']
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])['rows']


@pytest.mark.slow
def test_two_sharded_sides_take_two_all_to_alls_a_group_each_way():
    (ours,) = measured('--cpu_devices=8', '--layers=1', '--nooptax')
    assert ours['in_newton_schulz'] == 0
    assert ours['per_group'] == 2
    assert ours['deviation_%'] == pytest.approx(0, abs=1e-9)
    assert all('all-to-all' in kind for kind in ours['kinds'].split(', '))


@pytest.mark.slow
def test_the_partitioner_puts_collectives_inside():
    pytest.importorskip('optax')
    ours, optax = measured('--cpu_devices=8', '--layers=1')
    assert optax['in_newton_schulz'] > 0 == ours['in_newton_schulz']
    assert optax['sent_mb'] > 3 * ours['sent_mb']


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec('optax') is not None, reason='optax is here')
def test_missing_optax_is_named():
    line = [sys.executable, 'benchmarks/muon_collectives.py', '--cpu_devices=8']
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == 'optax cannot be imported: pip install optax\n'


@pytest.mark.tpu
def test_the_tpu_compiler_keeps_what_was_written(tpu_devices):
    arguments = ('--programs=tpu_v4_best@v4:2x4x4', '--layers=6', '--nooptax')
    (ours,) = measured(*arguments)
    assert ours['in_newton_schulz'] == 0
    assert ours['per_group'] == 1  # fsdp alone shards the matrices, and none is cut into several
    assert abs(ours['deviation_%']) < 5
    assert 0 < ours['peak_%'] < 100  # the scope of Newton-Schulz is found
