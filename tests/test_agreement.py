"""Processes that differ in config, code, versions or data are named, and end before compiling."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import threading
import types

import numpy as np
import pytest
from training_worker import small_run

from config import ConfigError
from corpus.files import find_files
from corpus.prepare import Job, prepare
from runtime import agreement
from runtime.agreement import check_same, differing, start_facts

WORKER = pathlib.Path(__file__).with_name('training_worker.py')


def together(monkeypatch, *facts: dict) -> list[str]:
    """Calls check_same in one thread per process; returns the messages, '' for none."""
    n, said = len(facts), [''] * len(facts)
    barrier, sent, number = threading.Barrier(n, timeout=10), [None] * n, threading.local()

    def gather(x: np.ndarray) -> np.ndarray:
        sent[number.i] = x
        barrier.wait()
        assert len({(x.shape, x.dtype) for x in sent}) == 1  # or a collective would hang
        out = np.stack(sent)
        barrier.wait()
        return out

    def one(i: int) -> None:
        number.i = i
        try:
            check_same(facts[i])
        except ConfigError as error:
            said[i] = str(error)

    monkeypatch.setattr(agreement.multihost_utils, 'process_allgather', gather)
    monkeypatch.setattr(agreement, 'check_devices', lambda: None)
    monkeypatch.setattr(agreement.jax, 'process_count', lambda: n)
    threads = [threading.Thread(target=one, args=(i,)) for i in range(n)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return said


def test_who_differs_is_named_on_all_processes(monkeypatch):
    same = {'steps': 20, 'optimizer.peak_lr': 0.01, 'block': ('dense',), 'nan': float('nan')}
    assert together(monkeypatch, same, dict(same), dict(same)) == ['', '', '']
    other = same | {'optimizer.peak_lr': 0.001, 'steps': 30, 'long': 'x' * 200}
    said = together(monkeypatch, same, dict(same), other)
    assert len(set(said)) == 1
    assert said[0].startswith(
        'process 2 differs from process 0 in: long, '
        'optimizer.peak_lr: 0.001 there, 0.01 on process 0, steps: 30 there, 20 on process 0\n'
    )
    assert 'process 1' not in said[0]


def test_many_differences_are_cut_and_code_is_named_by_file():
    here = {f'f{i:02}': i for i in range(20)} | {'the code of layers/moe.py': 'abc'}
    there = here | {'the code of layers/moe.py': 'abd'}
    assert differing(1, there, here).endswith('in: the code of layers/moe.py')
    there = dict.fromkeys(here, -1)
    assert differing(1, there, here).endswith('f07: -1 there, 7 on process 0, and 13 more')


def test_code_without_git_counts_as_that_of_any_revision():
    assert differing(1, {'git revision': 'a'}, {}) == ''
    assert differing(1, {'git revision': 'a'}, {'git revision': 'b'}) != ''
    assert differing(1, {'XLA_FLAGS': 'a'}, {}).endswith("XLA_FLAGS: 'a' there, none on process 0")


def test_the_facts_of_a_start(tmp_path, monkeypatch):
    for path in ('top.py', 'package/__init__.py', 'package/deep/__init__.py', 'other/x.py'):
        file = tmp_path / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text('')
    (tmp_path / '.#top.py').symlink_to('user@host.123')  # as editors lock a file
    (tmp_path / 'gone.py').symlink_to('nowhere')
    monkeypatch.setattr(agreement, 'ROOT', str(tmp_path))
    agreement.code_facts.cache_clear()
    assert start_facts(small_run('tokens'), workdir='w') == {}  # nobody to compare with
    monkeypatch.setattr(agreement.jax, 'process_count', lambda: 2)
    monkeypatch.setenv('XLA_FLAGS', '--xla_a')
    config = small_run('tokens')
    before = start_facts(config, workdir='w')
    assert before['optimizer.peak_lr'] == config.optimizer.peak_lr
    assert before['--workdir'] == 'w'
    assert before['XLA_FLAGS'] == '--xla_a'
    assert before['version of jax']
    assert 'the code of other/x.py' not in before
    assert 'the code of .#top.py' not in before
    assert before['the code of gone.py'] == 'unreadable'
    (tmp_path / 'package/deep/__init__.py').write_text('x = 1')
    agreement.code_facts.cache_clear()
    assert differing(1, start_facts(config, workdir='w'), before).endswith(
        'in: the code of package/deep/__init__.py'
    )
    agreement.code_facts.cache_clear()


def test_different_numbers_of_devices_are_named(monkeypatch):
    devices = [types.SimpleNamespace(process_index=i) for i in (0, 0, 1)]
    monkeypatch.setattr(agreement.jax, 'devices', lambda: devices)
    with pytest.raises(ConfigError, match='process 0 has 2, process 1 has 1; use as many on each'):
        agreement.check_devices()


@pytest.fixture(scope='module')
def other_tokens(tmp_path_factory) -> pathlib.Path:
    """Returns prepared data of another text than `tokens`."""
    folder = tmp_path_factory.mktemp('other')
    for i in range(40):
        (folder / f'{i}.txt').write_text(f'The number {i} is followed by {i + 1}. ' * 40)
    prepare(find_files([f'{folder}/*.txt']), Job(f'{folder}/tokens', 'bytes', 0.2))
    return folder / 'tokens'


@pytest.mark.slow
@pytest.mark.parametrize(
    ('there', 'named'),
    [
        ({'config': {'optimizer__peak_lr': 0.5}}, 'optimizer.peak_lr: 0.5 there, 0.001 on'),
        ({'config': {'steps': 30}}, 'steps: 30 there, 20 on process 0'),
        ({'config': {'model__d_ff': 96}}, 'model.d_ff: 96 there, 48 on process 0'),
        ({'config': {'log__every': 7}}, 'log.every: 7 there, 1 on process 0'),
        ({'tokens': 'other'}, 'data.path'),
        ({'devices': 2}, 'process 0 has 1, process 1 has 2'),
        ({'link': 'other'}, 'sources'),
    ],
    ids=str,
)
def test_two_processes_that_differ_end_before_compiling(
    there, named, tokens, other_tokens, tmp_path
):
    """What `link` leads to is other data under the same path, as on two hosts."""
    with socket.socket() as s:
        s.bind(('localhost', 0))
        address, workers = f'localhost:{s.getsockname()[1]}', []
    for i, options in enumerate(({}, there)):
        options = {'tokens': str(tokens)} | options
        options['config'] = {'mesh__fsdp': 2} | options.get('config', {})
        if options['tokens'] == 'other':
            options['tokens'] = str(other_tokens)
        host = tmp_path / str(i)  # whose working folder is a host's own disk
        host.mkdir()
        if 'link' in there:
            (host / 'data').symlink_to(other_tokens if 'link' in options else tokens)
            options['tokens'] = 'data'
        options |= {'workdir': str(tmp_path / 'run'), 'address': address, 'processes': 2}
        command = [sys.executable, WORKER, json.dumps(options | {'process': i})]
        workers.append(
            subprocess.Popen(
                command, cwd=host, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
            )
        )
    for worker in workers:
        output, _ = worker.communicate(timeout=120)
        assert worker.returncode == 1, output
        assert named in output
        assert 'compiled' not in output
    assert not os.path.exists(tmp_path / 'run' / 'config.json')
