"""Training in processes of its own: killed in each phase of a save, stopped by signals, split over
two processes and moved between meshes, on a full disk. Whatever happens, the next start goes on
from the last committed step, and ends as the run that nothing happened to."""

import json
import pathlib
import random
import signal
import socket
import subprocess
import time
import zlib

import numpy as np
import pytest
from common_runs import records
from common_workers import Worker, arrays, assert_bit_equal

STEPS = 24
ONCE = ('before the marker', 'after the marker')  # announced once per save, others more often


def start_together(n: int, workdir: pathlib.Path, setup: dict, *each: dict, **options):
    """Starts n processes of one run; `each` has more options for process 0, 1, ..."""
    with socket.socket() as s:
        s.bind(('localhost', 0))
        options['address'] = f'localhost:{s.getsockname()[1]}'
    each = each or ({},) * n
    return [
        Worker(workdir, setup, **options, **more, process=i, processes=n)
        for i, more in enumerate(each)
    ]


def committed(workdir: pathlib.Path) -> list[int]:
    """Lists the steps, whose markers have to match; uses none of the code under test."""
    steps = []
    for marker in workdir.glob('checkpoints/*/COMMIT'):
        metadata = (marker.parent / 'metadata.json').read_bytes()
        assert int(marker.read_text(), 16) == zlib.crc32(metadata)
        steps.append(int(marker.parent.name))
    return sorted(steps)


def said_start(workdir: pathlib.Path) -> str:
    """Returns what the next start has to print."""
    steps = committed(workdir)
    return f'going on from step {steps[-1]} of {STEPS}' if steps else 'starting again'


@pytest.fixture(scope='module')
def setup(tokens, tmp_path_factory) -> dict:
    cache = tmp_path_factory.mktemp('compiled')
    return {'tokens': str(tokens), 'cache': str(cache), 'config': {'steps': STEPS}}


@pytest.fixture(scope='module')
def whole(setup, tmp_path_factory) -> pathlib.Path:
    """Returns the workdir of a run that nothing happened to."""
    workdir = tmp_path_factory.mktemp('whole') / 'run'
    Worker(workdir, setup).succeed()
    return workdir


def finish_and_compare(workdir: pathlib.Path, setup: dict, whole: pathlib.Path) -> None:
    """Lets the run end, and compares its records and state with the whole one's, bit for bit."""
    expected = said_start(workdir)
    assert expected in Worker(workdir, setup).succeed()
    assert records(workdir) == records(whole)
    last = f'checkpoints/{STEPS}'
    assert_bit_equal(arrays(workdir / last), arrays(whole / last))
    # Nothing unfinished is left, nor what retention was removing.
    assert [path.name for path in (workdir / 'checkpoints').iterdir()] == [str(STEPS)]


def kill_while(phase: str, workdir: pathlib.Path, setup: dict) -> None:
    """Starts the run, and kills it at some moment of this phase of a save, the second or later."""
    rng = random.Random(phase)
    expected = said_start(workdir) if workdir.exists() else ''
    worker = Worker(workdir, setup, phase=phase)
    worker.wait_for(f'PHASE {phase}', 1 if phase in ONCE else rng.randint(1, 40))
    time.sleep(rng.uniform(0, 0.1))
    worker.send(signal.SIGKILL)
    assert worker.end() == -signal.SIGKILL
    assert expected in worker.output
    assert committed(workdir)
    assert committed(workdir)[-1] < STEPS


def interrupt_twice(workdir: pathlib.Path, setup: dict) -> None:
    """Starts the run, and sends two SIGINTs during a save: the second one ends it at once."""
    worker = Worker(workdir, setup, phase='copying')
    worker.wait_for('PHASE copying', 3)
    worker.send(signal.SIGINT)
    time.sleep(0.2)
    worker.send(signal.SIGINT)
    assert worker.end() == -signal.SIGINT
    assert 'stopped by a signal' not in worker.output


def stop(number: int, workdir: pathlib.Path, setup: dict, phase: str = 'step') -> None:
    """Starts the run, and sends a signal: it is heard, saves the step and ends in success."""
    expected = said_start(workdir) if workdir.exists() else ''
    worker = Worker(workdir, setup, phase=phase)
    worker.wait_for(f'PHASE {phase}')
    worker.send(number)
    worker.wait_for(f'{signal.Signals(number).name}: the run stops after this step, and saves it')
    worker.wait_for('saving step ')
    output = worker.succeed()
    announced = output.index('the run stops after')
    assert output[announced:].count(f'PHASE {phase}') <= 3  # steps, or batches of an evaluation
    step = committed(workdir)[-1]
    assert expected in output
    assert f'stopped by a signal: step {step} is saved' in output
    assert records(workdir)[-1]['step'] == step < STEPS


def be_refused(workdir: pathlib.Path, setup: dict) -> None:
    """Starts a new run that may write no large file from its second save on.

    It ends soon after that, and not at its third save, which is its end.
    """
    setup = setup | {'config': setup['config'] | {'checkpoint__every': 8}}
    worker = Worker(workdir, setup, file_limit=10_000, phase='step')
    assert worker.end() == 1
    assert 'step 16 could not be saved' in worker.output
    assert 'File too large' in worker.output
    assert 'Steps that are safe there: 8.' in worker.output
    assert 'Traceback' not in worker.output
    assert worker.output.count('PHASE step') <= 4
    assert committed(workdir) == [8]


# Each event's start goes on from what the event before has left, and the last start, which nothing
# happens to, has to end as the whole run.


def test_refused_killed_interrupted_and_stopped(setup, whole, tmp_path):
    workdir = tmp_path / 'run'
    be_refused(workdir, setup)
    kill_while('writing', workdir, setup)
    interrupt_twice(workdir, setup)
    stop(signal.SIGTERM, workdir, setup)
    finish_and_compare(workdir, setup, whole)


@pytest.mark.slow
def test_a_signal_in_an_evaluation_cuts_it_short(setup, whole, tmp_path):
    workdir = tmp_path / 'run'
    evaluating = {'eval__every': 6, 'eval__batches': 40, 'batch_size': 4}
    setup = setup | {'config': setup['config'] | evaluating}
    stop(signal.SIGHUP, workdir, setup, phase='evaluation')
    assert committed(workdir) == [6]
    stop(signal.SIGUSR1, workdir, setup, phase='evaluation')
    assert committed(workdir) == [12]


@pytest.mark.slow
def test_a_signal_to_one_process_cuts_the_evaluation_of_both_short(setup, tmp_path):
    workdir = tmp_path / 'run'
    config = {'mesh__fsdp': 2, 'eval__every': 6, 'eval__batches': 40, 'batch_size': 4}
    each = [{}, {'phase': 'evaluation'}]
    config = setup['config'] | config
    workers = start_together(2, workdir, setup, *each, config=config)
    workers[1].wait_for('PHASE evaluation')
    workers[1].send(signal.SIGTERM)
    for worker in workers:
        worker.succeed()
    assert 'process 1: SIGTERM: the run stops after this step' in workers[1].output
    assert workers[1].output.count('PHASE evaluation') <= 6
    assert committed(workdir)[-1] == 6


@pytest.mark.slow
def test_killed_before_the_first_save_and_around_the_marker(setup, whole, tmp_path):
    workdir = tmp_path / 'run'
    # Compiling the evaluation after step 2 leaves seconds for the kill.
    never = {'checkpoint__every': STEPS, 'eval__every': 2}
    worker = Worker(workdir, setup | {'config': setup['config'] | never})
    worker.wait_for('step 1/')
    worker.send(signal.SIGKILL)
    worker.end()
    assert not committed(workdir)
    kill_while('before the marker', workdir, setup)
    kill_while('after the marker', workdir, setup)
    kill_while('clean-up', workdir, setup)
    stop(signal.SIGINT, workdir, setup)
    finish_and_compare(workdir, setup, whole)


@pytest.mark.slow
def test_a_full_disk_says_what_is_safe(setup, whole, tmp_path):
    disk = tmp_path / 'disk'
    disk.mkdir()
    mount = ['mount', '-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', str(disk)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip('this user may not mount a small disk')
    try:
        workdir = disk / 'run'
        keep_all = setup | {'config': setup['config'] | {'checkpoint__keep': 0}}
        worker = Worker(workdir, keep_all, tmp_path)
        assert worker.end() == 1
        safe = ', '.join(map(str, committed(workdir)))
        assert f'Steps that are safe there: {safe}.' in worker.output
        assert 'No space left on device' in worker.output
        assert 'Traceback' not in worker.output
        # With room the same command goes on.
        subprocess.run(['mount', '-o', 'remount,size=100m', str(disk)], check=True)
        output = Worker(workdir, setup, tmp_path).succeed()
        assert f'going on from step {safe.split(", ")[-1]} of {STEPS}' in output
        assert records(workdir) == records(whole)
    finally:
        subprocess.run(['umount', str(disk)], check=True)


# ---------------------------------------------------------------------------------------------
# Two processes
# ---------------------------------------------------------------------------------------------

# (processes, devices of each, mesh, pipeline chunks): a run goes through them one after the other.
LAYOUTS = [
    (2, 4, {'dp': 2, 'fsdp': 2, 'tp': 2}, 1),
    (1, 8, {'pp': 2, 'ep': 2, 'tp': 2}, 1),
    (2, 4, {'pp': 2, 'fsdp': 2, 'ep': 2}, 2),
    (1, 1, {}, 1),
]


def dumped(folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Returns the global arrays that the workers' shards make up."""
    found: dict[str, np.ndarray] = {}
    for file in folder.glob('*.npz'):
        for key, piece in np.load(file).items():
            name, shape, bounds = json.loads(key)
            whole = found.setdefault(name, np.zeros(shape, piece.dtype))
            whole[tuple(slice(*b) for b in bounds)] = piece
    return found


@pytest.mark.slow
def test_a_run_moves_between_processes_and_meshes(setup, tmp_path):
    workdir = tmp_path / 'run'
    setup = setup | {'config': setup['config'] | {'moe': True, 'checkpoint__keep': 0}}
    for i, (n, devices, mesh, chunks) in enumerate(LAYOUTS):
        dump = tmp_path / f'dump-{i}'
        dump.mkdir()
        config = setup['config'] | {f'mesh__{axis}': size for axis, size in mesh.items()}
        if chunks > 1:
            config |= {'pipeline__schedule': 'interleaved', 'pipeline__chunks': chunks}
        options = {'devices': devices, 'config': config, 'dump': str(dump)}
        before, last = committed(workdir), i == len(LAYOUTS) - 1
        if not last:  # one process alone gets a signal
            options['stop_at'] = [n - 1, 7 * (i + 1)]
        workers = (
            start_together(n, workdir, setup, **options)
            if n > 1
            else [Worker(workdir, setup, **options)]
        )
        for worker in workers:
            worker.succeed()
        steps = committed(workdir)
        if i:
            assert f'going on from step {before[-1]}' in workers[0].output
            restored = arrays(workdir / f'checkpoints/{before[-1]}')
            assert_bit_equal(dumped(dump), restored)
        if not last:
            assert steps[-1] == 7 * (i + 1) + (n > 1)  # processes agree one step later
            assert f'stopped by a signal: step {steps[-1]} is saved' in workers[0].output
    (tmp_path / 'whole').mkdir()
    whole = tmp_path / 'whole' / 'run'
    Worker(whole, setup).succeed()
    found, expected = records(workdir), records(whole)
    assert [r['step'] for r in found] == list(range(1, STEPS + 1))
    for a, b in zip(found, expected, strict=True):
        assert a['loss'] == pytest.approx(b['loss'], rel=1e-3)
        assert a['lr'] == b['lr']


@pytest.mark.slow
def test_what_one_of_two_processes_cannot_write_or_read_stops_both(setup, tmp_path):
    workdir = tmp_path / 'run'
    config = setup['config'] | {'mesh__fsdp': 2}
    workers = start_together(2, workdir, setup, {}, {'fail': True}, config=config)
    for worker in workers:
        assert worker.end() != 0
        assert 'step 4 could not be saved' in worker.output
        assert 'Steps that are safe there: 2.' in worker.output
    assert 'processes 1 did not write their chunks' in workers[0].output
    assert 'the disk of this process is gone' in workers[1].output
    assert committed(workdir) == [2]

    chunk = workdir / 'checkpoints/2/arrays/params.embed.w_VD/c/0/1'  # of process 1
    good = chunk.read_bytes()
    chunk.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    workers = start_together(2, workdir, setup, config=config)
    for worker in workers:
        assert worker.end() != 0
        assert 'Nothing was loaded' in worker.output
    assert 'another process could not read it' in workers[0].output
    error = f'leaf params.embed.w_VD: DATA_LOSS: Error reading local file "{chunk}"'
    assert error in workers[1].output


@pytest.mark.slow
def test_one_of_two_processes_is_killed_while_writing(setup, tmp_path):
    workdir = tmp_path / 'run'
    config = setup['config'] | {'mesh__fsdp': 2}
    for victim in (0, 1):
        expected = said_start(workdir) if victim else ''
        each = [{}, {}]
        each[victim] = {'phase': 'writing'}
        workers = start_together(2, workdir, setup, *each, config=config)
        workers[victim].wait_for('PHASE writing', 5 + victim)
        workers[victim].send(signal.SIGKILL)
        workers[victim].end()
        time.sleep(1)  # in which the other must not commit
        steps = committed(workdir)
        workers[1 - victim].send(signal.SIGKILL)
        workers[1 - victim].end()
        assert steps
        assert steps == committed(workdir)
        assert expected in workers[0].output
    expected = said_start(workdir)
    workers = start_together(2, workdir, setup, config=config)
    assert expected in workers[0].succeed()
    workers[1].succeed()
    assert committed(workdir) == [STEPS]
