"""The command from end to end, what it writes, and what it refuses."""

import importlib
import json
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from common import batch_at, initial_state, small_config
from common_runs import records

import train
import train_step
from parallel import make_mesh
from runtime.config_checks import validate
from runtime.sampling import run_encoding
from train_step import setup

ROOT = pathlib.Path(train.__file__).parent
CONFIGS = sorted(p.stem for p in (ROOT / 'configs').glob('*.py') if p.stem != '__init__')
# What a step says of itself, but for its routers.
NUMBERS = {'loss', 'grad_norm', 'grad_norm_mean', 'lr', 'skipped', 'skips_in_a_row'}


@pytest.mark.parametrize('name', CONFIGS)
def test_every_config_loads_and_evaluates_its_shapes(name):
    config = importlib.import_module(f'configs.{name}').get_config()
    config.data.path = config.data.path or 'somewhere'
    validate(config, 4096)
    config.mesh.update(dict.fromkeys(config.mesh, 1))  # its shapes do not depend on it
    mesh = make_mesh(config.mesh)
    state = train_step.abstract_state(setup(config, mesh))
    step = train_step.make_train_step(setup(config, mesh))
    tokens = jax.ShapeDtypeStruct((1, config.batch_size, config.seq_len + 1), np.int32)
    new_state, metrics = jax.eval_shape(step, state, tokens)
    shapes, new_shapes = (jax.tree.map(lambda x: (x.shape, x.dtype), t) for t in (state, new_state))
    assert new_shapes == shapes
    assert set(metrics) == NUMBERS | {'router'}
    assert all(metrics[name].shape == () for name in NUMBERS)


def test_what_follows_a_step():
    config = small_config()
    config.steps = 50
    config.log.update(every=10, sample_every=20)
    config.eval.every, config.checkpoint.every = 20, 25

    def logged(start: int, tasks: str) -> list[int]:
        steps = range(start + 1, 51)
        return [s for s in steps if getattr(train.due(s, config, start, False), tasks)]

    assert logged(0, 'log') == logged(0, 'show') == [1, 10, 20, 30, 40, 50]
    # A later start shows its first step, and writes the lines of a run that was not interrupted.
    assert logged(32, 'show') == [33, 40, 50]
    assert logged(32, 'log') == [40, 50]
    assert (logged(0, 'evaluate'), logged(0, 'sample')) == ([20, 40, 50], [20, 40])
    assert logged(0, 'save') == [25, 50]
    config.log.every = 0
    assert logged(0, 'show') == logged(0, 'log') == []
    assert logged(0, 'ask') == []
    config.eval.update(tasks=('a.jsonl',), tasks_every=30)
    assert logged(0, 'ask') == [30, 50]
    config.eval.tasks_every = 0
    assert logged(0, 'ask') == []
    now = train.due(20, config, 0, True)
    assert (now.save, now.stop, now.evaluate, now.sample) == (True, True, False, False)
    assert not train.due(50, config, 0, True).stop  # it is complete


def test_masked_rows_change_nothing():
    """Rows without tokens leave loss and gradients as they are: no mean of means."""
    config = small_config()
    mesh = make_mesh({'dp': 2})
    step = train_step.make_train_step(setup(config, mesh))

    def norm_and_loss(read):
        state = initial_state(setup(config, mesh))
        _, metrics = step(state, train_step.put_batch(read, 0, setup(config, mesh)))
        return float(metrics['loss']), float(metrics['grad_norm'])

    def half(step, rows):
        tokens = batch_at(step, slice(None))
        tokens[8:] = -1
        return tokens[rows]

    def half_twice(step, rows):
        tokens = batch_at(step, slice(None))
        tokens[8:] = tokens[:8]
        return tokens[rows]

    assert norm_and_loss(half) == pytest.approx(norm_and_loss(half_twice), rel=1e-5)


@pytest.fixture(scope='module')
def corpus(tmp_path_factory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp('corpus')
    for i in range(40):
        (folder / f'{i}.txt').write_text(f'The number {i} follows {i - 1}. ' * 40)
    prepared = folder / 'tokens'
    command = [sys.executable, 'data.py', f'--input={folder}/*.txt', '--tokenizer=bytes']
    subprocess.run(
        [*command, f'--output={prepared}', '--validation_share=0.2'], cwd=ROOT, check=True
    )
    return prepared


def run_command(corpus: pathlib.Path, workdir: pathlib.Path, *more: str):
    command = [
        sys.executable, 'train.py', '--config=configs/tiny.py', f'--workdir={workdir}',
        f'--config.data.path={corpus}', '--config.steps=12', '--config.log.every=3',
        '--config.eval.every=6', '--config.model.n_layers=2', '--config.model.d_model=64',
        '--config.seq_len=32', '--config.model.vocab_size=264', '--config.model.attention_block=16',
        '--config.optimizer.warmup_steps=2', '--config.batch_size=32', '--config.eval.batches=1',
        '--config.log.loads_every=6', '--config.log.sample_tokens=8', '--config.model.d_expert=32',
        *more,
    ]  # fmt: skip
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def read_metrics(workdir: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


@pytest.fixture(scope='module')
def one(corpus, tmp_path_factory) -> pathlib.Path:
    """Trains on one device; the workdir."""
    workdir = tmp_path_factory.mktemp('one') / 'run'
    done = run_command(corpus, workdir)
    assert done.returncode == 0, done.stderr
    assert 'zlib_bits_per_byte' in done.stdout
    # What takes long is said before, and the numbers say of what they are.
    assert done.stdout.index('\ncompiling ...\n') < done.stdout.index('\ncompiled in ')
    assert '\nsummary at step 12 of 12:\n' in done.stdout
    assert re.search(r'\n *tokens_of_this_start  12,288\n', done.stdout)
    return workdir


def test_the_same_command_gives_the_same_bits(one, corpus, tmp_path):
    """In another process: what is logged, and each file of the checkpoint's arrays."""
    again = tmp_path / 'again'
    assert run_command(corpus, again).returncode == 0
    assert records(again) == records(one)
    files = [sorted((d / 'checkpoints/12/arrays').rglob('*')) for d in (one, again)]
    assert len(files[0]) == len(files[1]) > 10
    for a, b in zip(*files, strict=True):
        assert a.is_dir() or a.read_bytes() == b.read_bytes(), a


def test_command_trains_alike_on_one_and_on_eight_devices(one, corpus, tmp_path):
    eight = run_command(
        corpus, tmp_path / 'eight', '--config.log.sample_every=6', '--cpu_devices=8',
        '--config.mesh.ep=2', '--config.mesh.fsdp=2', '--config.mesh.tp=2',
        '--config.microbatches=2',
    )  # fmt: skip
    assert eight.returncode == 0, eight.stderr
    a, b = read_metrics(one), read_metrics(tmp_path / 'eight')
    logged = [r for r in a if 'loss' in r]
    assert [r['step'] for r in logged] == [1, 3, 6, 9, 12]
    names = NUMBERS | {'step', 'tokens', 'tokens_per_second', 'mfu', 'host_bytes'}
    router = {f'moe/{i}/{s}' for i in (0, 1) for s in ('load_max_over_mean', 'dropped', 'entropy')}
    assert set(logged[0]) == names | router
    assert set(logged[2]) == names | router | {'moe/0/load', 'moe/1/load'}
    assert logged[2]['moe/0/load_max_over_mean'] == pytest.approx(16 * max(logged[2]['moe/0/load']))
    assert sum(logged[2]['moe/0/load']) == pytest.approx(1)
    assert logged[-1]['tokens'] == 12 * 32 * 32
    assert logged[-1]['loss'] < logged[0]['loss'] - 0.5
    evals = [r for r in a if 'eval_loss' in r]
    assert [r['step'] for r in evals] == [6, 12]
    assert evals[-1]['eval_bits_per_byte'] == pytest.approx(
        evals[-1]['eval_loss'] / np.log(2), rel=0.01
    )  # a byte is a token; only end-of-text is none
    sampled = {r['step']: r['samples'] for r in b if 'samples' in r}
    assert list(sampled) == [6, 12]
    assert [s['prompt'] for s in sampled[12]] == ['def ']
    assert 1 <= len(sampled[12][0]['text']) <= 8
    for x, y in zip(a, [r for r in b if 'samples' not in r], strict=True):
        for name in {'loss', 'grad_norm', 'eval_loss'} & set(x):
            assert x[name] == pytest.approx(y[name], rel=1e-3)
    assert run_encoding(str(one)).name == 'bytes'
    saved = json.loads((one / 'config.json').read_text())
    assert saved['model']['d_model'] == 64

    again = run_command(corpus, one)
    assert again.returncode == 0
    assert 'is complete: step 12 is saved, and steps=12' in again.stdout
    assert read_metrics(one) == a


def test_command_trains_on_a_mixture(one, corpus, tmp_path):
    given = f"--config.data.sources=(('a', '{corpus}', 0.75), ('b', '{corpus}', 0.25))"
    two = run_command(
        corpus, tmp_path / 'two', '--config.data.path=', given, '--config.data.isolate_documents'
    )
    assert two.returncode == 0, two.stderr
    evals = [r for r in read_metrics(tmp_path / 'two') if 'eval_loss' in r]
    names = {'eval_loss', 'eval_bits_per_byte'}
    assert set(evals[0]) == {'step', 'tokens'} | {n + s for n in names for s in ('', '/a', '/b')}
    for record in evals:
        for name in names:  # twice the same source
            assert record[f'{name}/a'] == record[f'{name}/b'] == pytest.approx(record[name])
    assert 'zlib_bits_per_byte/b' in two.stdout
    single = [r for r in read_metrics(one) if 'eval_loss' in r]
    assert single[-1]['eval_loss'] != evals[-1]['eval_loss']
    assert single[-1]['eval_loss'] == pytest.approx(evals[-1]['eval_loss'], rel=0.2)


def test_command_refuses_unknown_flags_and_bad_values(corpus, tmp_path):
    bad = run_command(corpus, tmp_path / 'x', '--config.model.n_heads=3', '--config.mesh.tp=2')
    assert bad.returncode != 0
    assert 'model.n_heads=3 is not divisible by mesh.tp=2' in bad.stderr
    assert 'Traceback' not in bad.stderr
    unknown = run_command(corpus, tmp_path / 'y', '--config.model.n_head=3')
    assert unknown.returncode != 0
    small = run_command(corpus, tmp_path / 'z', '--config.model.vocab_size=256')
    assert small.returncode != 0
    assert 'model.vocab_size=256 is below the 257 tokens of bytes; use 384' in small.stderr
