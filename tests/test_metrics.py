"""One run with everything that can be seen of it, and a second one, which is to be its equal."""

import glob
import json
import math
import os
import pathlib
import resource
import signal
import struct
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from common import small_config
from training_worker import small_run

import train
from machine import chips
from machine.profiler import parse_steps
from parallel import make_mesh
from runtime import evaluation, sampling
from runtime.evaluation import checkpoint_config
from runtime.guards import CutShortError, TrainingError
from runtime.metrics import Progress, Writer
from runtime.plot import Run
from runtime.workdir import EVALUATIONS, add_entry, git_state
from tokenizer import get_encoding
from train_step import setup

MEASURED = {'tokens_per_second', 'mfu', 'time', 'host_bytes'}
RUN = {
    'steps': 4, 'eval__every': 2, 'log__loads_every': 2, 'model__n_layers': 2, 'microbatches': 1,
    'mesh__fsdp': 2, 'mesh__ep': 2, 'mesh__tp': 2,
}  # fmt: skip


@pytest.fixture(scope='module')
def seen(tokens, tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp('seen') / 'run'
    config = small_run(tokens, moe=True, log__writers=('tensorboard',), log__plot=True, **RUN)
    train.train(config, str(workdir), traced_steps=(2, 3))
    return workdir


def read(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def without_measured(record: dict) -> dict:
    return {k: v for k, v in record.items() if k not in MEASURED}


def test_two_runs_of_one_record_give_the_same_numbers(seen, tokens, tmp_path):
    train.train(small_run(tokens, moe=True, **RUN), str(tmp_path))
    first, second = (read(folder / 'metrics.jsonl') for folder in (seen, tmp_path))
    assert [without_measured(r) for r in first] == [without_measured(r) for r in second]
    assert sum('loss' in r for r in first) == 4
    (a,), (b,) = (json.loads((f / 'record.json').read_text()) for f in (seen, tmp_path))
    logs = [entry['config'].pop('log') for entry in (a, b)]
    assert without_measured(a) == without_measured(b)
    assert logs[0] != logs[1]
    assert a['mesh'] == {'pp': 1, 'dp': 1, 'fsdp': 2, 'ep': 2, 'cp': 1, 'tp': 2}
    assert a['devices']['count'] == 8
    assert a['devices']['platform'] == 'cpu'
    assert a['versions']['jax'] == jax.__version__
    assert a['config']['model']['block'] == ['moe']


def test_what_is_no_number_is_null(tmp_path):
    with Writer(str(tmp_path), small_config(), 0) as writer:
        writer.write(step=1, loss=1.5, grad_norm=float('nan'))
        writer.write(step=2, loss=float('inf'), grad_norm=2.0)
    first, second = read(tmp_path / 'metrics.jsonl')
    assert first == {'step': 1, 'loss': 1.5, 'grad_norm': None}
    assert second == {'step': 2, 'loss': None, 'grad_norm': 2.0}
    np.testing.assert_array_equal(Run(str(tmp_path)).curve('grad_norm'), [[1, 2], [np.nan, 2]])


class FullDisk:
    """Stands for Lines on a disk that has room again later."""

    def __init__(self):
        self.full, self.kept, self.written = False, [], []

    def add(self, line: str) -> None:
        self.kept.append(line)
        self.flush()

    def flush(self) -> None:
        if self.full:
            raise OSError(28, 'No space left on device')
        self.written += self.kept
        self.kept.clear()


def test_lines_that_cannot_be_written_end_no_run_and_are_kept(tmp_path, capsys):
    disk = FullDisk()
    with Writer(str(tmp_path), small_config(), 0) as writer:
        writer._lines = disk
        for step, full in [(1, False), (2, True), (3, True), (4, False)]:
            disk.full = full
            writer.write(step=step)
            writer.flush()
    assert [json.loads(line)['step'] for line in disk.written] == [1, 2, 3, 4]
    said = capsys.readouterr().out
    assert said.count('metrics.jsonl cannot be written ([Errno 28] No space') == 1
    assert said.count('metrics.jsonl is written again') == 1


def test_lines_that_are_lost_at_the_end_are_an_error(tmp_path):
    writer = Writer(str(tmp_path), small_config(), 0)
    writer._lines = FullDisk()
    writer._lines.full = True
    writer.write(step=1)
    with pytest.raises(TrainingError, match=r'metrics\.jsonl lacks lines.*No space left'), writer:
        pass
    with pytest.raises(ZeroDivisionError), writer:  # the error that ends the run counts
        raise ZeroDivisionError


def test_a_line_that_cannot_be_written_stays_whole(tmp_path):
    """Nothing of it remains in the file, and all of it is there once there is room."""
    path = tmp_path / 'metrics.jsonl'
    with Writer(str(tmp_path), small_config(), 0) as writer:
        writer.write(step=1)
        size = path.stat().st_size
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 5, limits[1]))
        try:
            writer.write(step=2)
            assert path.stat().st_size == size
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            signal.signal(signal.SIGXFSZ, before)
        writer.write(step=3)
    assert [record['step'] for record in read(path)] == [1, 2, 3]


class Service:
    """Stands for one of log.writers, whose service goes away."""

    def __init__(self):
        self.calls = []

    def write(self, record: dict) -> None:
        self.calls.append(record['step'])
        raise RuntimeError('the service is gone')

    def close(self) -> None:
        self.calls.append('close')


def test_a_writer_that_fails_is_left_out(tmp_path, capsys):
    service = Service()
    with Writer(str(tmp_path), small_config(), 0) as writer:
        writer._others = [service]
        writer.write(step=1)
        writer.write(step=2)
    assert service.calls == [1]
    assert [record['step'] for record in read(tmp_path / 'metrics.jsonl')] == [1, 2]
    said = "Service has failed and is left out: RuntimeError('the service is gone')"
    assert said in capsys.readouterr().out


def test_no_step_beats_a_peak_that_was_measured(tmp_path, monkeypatch, capsys):
    peaks = [1e9, 8e9]  # while the machine was busy, and later
    monkeypatch.setattr(chips, 'cpu_flops', lambda _: peaks.pop(0))
    config = small_config()
    with Writer(str(tmp_path), config, 0) as writer:
        progress = Progress(setup(config, make_mesh({})), writer, lambda step: step)
        progress.check_peak()
        assert progress.mfu(0.5e9) == 0.5
        assert math.isnan(progress.mfu(4e9))
        progress.check_peak()
        assert progress.mfu(4e9) == 0.5
        assert not peaks
    assert 'peak measured again: 0.008 TFLOP/s' in capsys.readouterr().out
    config.peak_flops = 1e9  # a figure that was given is not doubted
    with Writer(str(tmp_path), config, 0) as writer:
        progress = Progress(setup(config, make_mesh({})), writer, lambda step: step)
        assert progress.mfu(4e9) == 4.0


def batches_of(n: int) -> types.SimpleNamespace:
    """Returns an evaluation set of n batches."""
    return types.SimpleNamespace(n_batches=n, batch_at=lambda i, rows=slice(None): np.int32(i))


def test_an_evaluation_stops_between_batches(monkeypatch):
    began = []

    def step(params, i, _):
        began.append(i)
        return {'nats': jnp.float32(2.0), 'targets': jnp.int32(4), 'bytes': jnp.int32(8)}

    def between() -> None:
        if len(began) == 3:
            raise CutShortError

    monkeypatch.setattr(evaluation, 'make_eval_step', lambda _: step)
    monkeypatch.setattr(evaluation, 'put_batch', lambda batch_at, i, s: batch_at(i))
    config = small_config()
    config.model.vocab_size = 264
    evaluate = evaluation.make_evaluation(setup(config, make_mesh({})), get_encoding('bytes'))
    result = evaluate({}, batches_of(5))
    assert result['eval_loss'] == 0.5
    assert began == [0, 1, 2, 3, 4]
    began.clear()
    with pytest.raises(CutShortError):
        evaluate({}, batches_of(5), between=between)
    assert began == [0, 1, 2]


def test_sampling_stops_between_tokens(monkeypatch):
    began = []

    def stream(*_, **__):
        for token in b'abc':
            began.append(token)
            yield np.array([[token]])

    def between() -> None:
        if len(began) == 2:
            raise CutShortError

    monkeypatch.setattr(sampling, 'stream', stream)
    config = small_config()
    config.model.vocab_size, config.log.prompts = 264, ('x',)
    sample = sampling.make_sampler(setup(config, make_mesh({})), get_encoding('bytes'))
    assert sample({}, 1) == [{'prompt': 'x', 'text': 'abc'}]
    began.clear()
    with pytest.raises(CutShortError):
        sample({}, 1, between=between)
    assert len(began) == 2


def test_sources_without_validation_documents_are_left_out():
    sources = [
        types.SimpleNamespace(name=name, share=share, evaluation=e)
        for name, share, e in [('a', 0.25, 1.0), ('b', 0.25, 2.0), ('c', 0.5, None)]
    ]
    result = evaluation.over_sources(sources, lambda e: {'eval_loss': e})
    assert result == {'eval_loss': 1.5, 'eval_loss/a': 1.0, 'eval_loss/b': 2.0}
    assert evaluation.over_sources(sources[2:], lambda e: {'eval_loss': e}) == {}


def test_each_start_adds_an_entry(tmp_path):
    for step in (0, 10, 20):
        add_entry(str(tmp_path), {'from_step': step})
    entries = json.loads((tmp_path / 'record.json').read_text())
    assert [entry['from_step'] for entry in entries] == [0, 10, 20]


def test_revision_is_that_of_the_checkout_alone(tmp_path):
    assert git_state(str(tmp_path)) == {}
    git = f'git -C {tmp_path} -c user.name=a -c user.email=a'
    (tmp_path / 'file').write_text('1')
    os.system(f'git init -q {tmp_path} && {git} add file && {git} commit -qm 1')
    state = git_state(str(tmp_path))
    assert len(state['revision']) == 40
    assert not state['dirty']
    (tmp_path / 'untracked').write_text('1')
    assert git_state(str(tmp_path)) == state
    (tmp_path / 'file').write_text('2')
    assert git_state(str(tmp_path)) == state | {'dirty': True}
    (tmp_path / 'inside').mkdir()
    assert git_state(str(tmp_path / 'inside')) == {}


def test_trace_shows_layers_experts_and_collectives_by_name(seen):
    (path,) = glob.glob(f'{seen}/profile/**/*.xplane.pb', recursive=True)
    trace = jax.profiler.ProfileData.from_file(path)
    events = [e for plane in trace.planes for line in plane.lines for e in line.events]
    steps = [dict(e.stats)['step_num'] for e in events if e.name == 'train']
    assert steps == [2, 3]
    names = pathlib.Path(path).read_bytes()  # of the compiled program's operations
    for scope in (
        'layer_0_moe/attention/', 'moe/router/', 'moe/dispatch/', 'moe/experts/', 'moe/combine/',
        'shared_experts/', 'embed/', 'head_and_loss/', 'optimizer/', 'all_gather_tp/all_gather',
        'all_gather_fsdp/all_gather', 'reduce_scatter_tp/', 'all_to_all_ep/all_to_all',
        'sum_gradients/psum',
    ):  # fmt: skip
        assert scope.encode() in names, scope


@pytest.mark.parametrize('text', ['10', '0:3', '5:4', 'a:b', '10:13:16', ':'])
def test_profile_takes_a_range_of_steps(text):
    with pytest.raises(ValueError, match='use FIRST:LAST'):
        parse_steps(text)
    assert parse_steps('10:13') == (10, 13)
    assert parse_steps('') is None


def tensorboard_values(folder: pathlib.Path) -> list[tuple[int, object]]:
    """(step, value) of all event files: TFRecord, a length, its checksum, the event, its own."""
    from tensorboardX.proto.event_pb2 import Event

    values = []
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        while content:
            (size,) = struct.unpack('<Q', content[:8])
            event = Event.FromString(content[12 : 12 + size])
            values += [(event.step, value) for value in event.summary.value]
            content = content[16 + size :]
    return values


def test_tensorboard_holds_what_metrics_jsonl_does(seen):
    values = tensorboard_values(seen / 'tensorboard')
    scalars = {(step, v.tag): v.simple_value for step, v in values if not v.HasField('histo')}
    loads = {(step, v.tag): list(v.histo.bucket) for step, v in values if v.HasField('histo')}
    expected = {(r['step'], k): v for r in read(seen / 'metrics.jsonl') for k, v in r.items()}
    expected = {key: v for key, v in expected.items() if key[1] != 'step'}
    assert scalars.keys() | loads.keys() == expected.keys()
    for key, value in expected.items():
        found = loads[key] if key[1].endswith('/load') else scalars[key]
        assert found == pytest.approx(value, rel=1e-6)
    assert len(loads) == 4


def test_plot_is_drawn_at_the_end(seen):
    assert (seen / 'metrics.png').read_bytes().startswith(b'\x89PNG')


def test_a_checkpoint_is_evaluated_as_in_its_run(seen, capsys):
    before = {p: p.stat().st_mtime_ns for p in seen.rglob('*') if p.is_file()}
    (expected,) = (r for r in read(seen / 'metrics.jsonl') if 'eval_loss' in r and r['step'] == 4)
    step, config = checkpoint_config(str(seen), None, None)
    config.mesh.update(fsdp=1, ep=1, tp=4)
    result = train.evaluate_only(config, str(seen), step)
    for name in ('eval_loss', 'eval_bits_per_byte'):
        assert result[name] == pytest.approx(expected[name], rel=1e-5)
    (line,) = read(seen / EVALUATIONS)
    assert line['step'] == 4
    assert line['eval_loss'] == result['eval_loss']
    assert 'eval_bits_per_byte' in capsys.readouterr().out
    after = {p: p.stat().st_mtime_ns for p in seen.rglob('*') if p.name != EVALUATIONS}
    assert {p: t for p, t in after.items() if p.is_file()} == before


def test_evaluation_refuses_what_is_not_there(seen, tokens, tmp_path):
    with pytest.raises(ValueError, match='holds no checkpoint to evaluate'):
        checkpoint_config(str(tmp_path), None, None)
    with pytest.raises(ValueError, match='--eval_only=3'):
        checkpoint_config(str(seen), 3, None)
    with pytest.raises(ValueError, match=r'model\.d_ff: 48 there, 64 here'):
        checkpoint_config(str(seen), 4, small_run(tokens, moe=True, model__d_ff=64))
