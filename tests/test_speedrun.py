"""The race to a number of bits a byte, with models of a few thousand parameters."""

import importlib.util
import json
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_every_run_of_the_race_reaches_an_easy_target():
    """Without training all are above 3.7 bits a byte, the 12 bits of a token over its bytes."""
    runs = ['muon', 'dense', 'adamw', *(['torch'] if importlib.util.find_spec('torch') else [])]
    steps = ','.join(f'{run}:60' for run in runs)
    line = [sys.executable, 'benchmarks/speedrun.py', '--small', f'--runs={",".join(runs)}']
    line += [f'--steps={steps}', '--every=2', '--eval_rows=8', '--target=3.5', '--json']
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])['rows']
    assert [row['run'] for row in rows] == runs
    for row in rows:
        assert 40 <= row['steps'] <= 50  # the first evaluations of the last third
        assert 2 < row['bits_per_byte'] < 3.5
        assert row['seconds'] >= row['compile_seconds']
    assert rows[0]['times_first'] == 1


@pytest.mark.slow
def test_a_target_that_is_missed_is_an_error():
    line = [sys.executable, 'benchmarks/speedrun.py', '--small', '--runs=muon', '--steps=muon:2']
    line += ['--every=2', '--eval_rows=8', '--target=0.1']
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert 'muon ended its schedule at' in done.stderr
    assert 'give it more steps' in done.stderr
