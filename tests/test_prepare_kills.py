"""Killed runs, damaged uploads, buckets and clusters leave the bytes of an undisturbed run."""

import dataclasses
import importlib
import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import pytest
from common_data import PART_BYTES, ROOT, SHIPPED, contents
from servers import leads_to, serve_bucket

from config import ConfigError
from corpus import prepare as module
from corpus import workers
from corpus.documents import cut_into_parts
from corpus.files import find_files
from corpus.prepare import Job, prepare
from corpus.shards import Split
from corpus.token_files import TokenOptions, checked_options, cut_tokens, find_token_files
from tokenizer import get_encoding

RUN = """
import os, signal, sys, time
sys.path.insert(0, {root!r})
from corpus import prepare as module, shards
from corpus.files import find_files
from corpus.prepare import Job, prepare
from machine import command

def killer(fn, nth):
    calls = 0

    def wrapped(*args, **kwargs):
        nonlocal calls
        calls += 1
        if calls == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return fn(*args, **kwargs)

    return wrapped

def holder(fn, first):
    def wrapped(enc, job, index, *args):
        if index >= first:
            time.sleep(60)
        return fn(enc, job, index, *args)

    return wrapped

pattern, output, workers, where, nth = sys.argv[1:]
if where == 'hold':  # also in the workers, which run this file, too
    module.write_part = holder(module.write_part, int(nth))
if __name__ == '__main__':
    if where and where != 'hold':
        owner = {{'finish': shards.ArrayWriter, 'array_spec': shards}}.get(where, module)
        setattr(owner, where, killer(getattr(owner, where), int(nth)))
    job = Job(output, {shipped!r}, 0.25)
    with command.messages():
        prepare(find_files([pattern]), job, int(workers), part_bytes={part_bytes})
"""


def start(tmp_path, files, workers: int, where: str, nth: int) -> subprocess.Popen:
    """Starts to prepare the files in another process.

    It kills itself in the nth call of the function `where`; or, if that is 'hold', does not go on
    with the nth part and those after it.
    """
    script = tmp_path / 'run.py'
    script.write_text(RUN.format(root=ROOT, shipped=SHIPPED, part_bytes=PART_BYTES))
    pattern = f'{os.path.commonpath([file.path for file in files])}/**/*'
    command = [sys.executable, script, pattern, f'{tmp_path}/out', str(workers), where, str(nth)]
    return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)


def finish(tmp_path, files) -> None:
    prepare(files, Job(f'{tmp_path}/out', SHIPPED, 0.25), part_bytes=PART_BYTES)


def test_killed_at_each_phase_and_resumed(corpus, tmp_path):
    _, output, files = corpus
    out = tmp_path / 'out'
    done: dict[str, int] = {}
    for where, nth in [
        ('finish', 3),  # one part; of the array nothing is there
        ('array_spec', 6),  # two parts; the array is there, unchecked
        ('total', 1),  # all parts, no manifest
        ('_remove_leftovers', 1),  # the manifest, and the parts' files
    ]:
        process = start(tmp_path, files, 1, where, nth)
        assert process.communicate()[1] == ''
        assert process.returncode == -signal.SIGKILL
        assert {path: os.stat(out / path).st_mtime_ns for path in done} == done
        found = committed(out)
        assert len(found) > len(done) or where == '_remove_leftovers'
        done = {path: os.stat(out / path).st_mtime_ns for path in found}
    finish(tmp_path, files)
    assert contents(out) == contents(output)
    assert {path: os.stat(out / path).st_mtime_ns for path in done} == done


def committed(out) -> list[str]:
    """Returns the files of the arrays that a part's file under `out` names."""
    found = contents(out)
    results = [json.loads(found[name]) for name in found if name.startswith('parts/')]
    paths = [shard['path'] for result in results for shard in result['shards'].values()]
    return [name for path in paths for name in found if name.startswith(f'{path}/')]


def test_killed_with_workers_and_by_a_killed_worker(corpus, tmp_path):
    _, output, files = corpus
    process = start(tmp_path, files, 2, 'hold', 4)
    wait_for_parts(tmp_path, process, 4)
    workers = [pid for server in children(process.pid) for pid in children(server)]
    assert len(workers) == 2
    process.kill()
    process.wait()
    process.stderr.close()
    # Workers that outlive their parent would write into the work of the next run.
    deadline = time.monotonic() + 20
    while alive := [pid for pid in workers if parent(str(pid)) is not None]:
        if time.monotonic() > deadline:
            for pid in alive:
                os.kill(pid, signal.SIGKILL)
            pytest.fail(f'workers outlive their parent: {alive}')
        time.sleep(0.01)

    process = start(tmp_path, files, 2, 'hold', 7)
    wait_for_parts(tmp_path, process, 7)
    workers = [pid for server in children(process.pid) for pid in children(server)]
    os.kill(workers[0], signal.SIGKILL)
    assert 'WorkerError: a worker was killed' in process.communicate()[1]
    assert process.returncode == 1
    finish(tmp_path, files)
    assert contents(tmp_path / 'out') == contents(output)


@pytest.mark.parametrize('workers', [1, 2])
def test_ctrl_c_ends_at_once_and_says_how_to_go_on(corpus, tmp_path, workers):
    _, output, files = corpus
    process = start(tmp_path, files, workers, 'hold', 4)
    wait_for_parts(tmp_path, process, 4)
    started = time.monotonic()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: all processes hear it
    said = process.communicate(timeout=30)[1]
    assert time.monotonic() - started < 20  # and not after the part, which takes a minute
    assert said == (
        f'interrupted: 4 of 13 parts are done, and stay in {tmp_path}/out; give the same command '
        'again to go on\n'
    )
    assert process.returncode == 130
    finish(tmp_path, files)
    assert contents(tmp_path / 'out') == contents(output)


def wait_for_parts(tmp_path, process: subprocess.Popen, n: int) -> None:
    """Returns when the running process has committed n parts."""
    while len(list(tmp_path.glob('out/parts/*.json'))) < n:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)


def children(process: int) -> list[int]:
    """Returns the running children of a process. Those of the server are the workers."""
    return [int(pid) for pid in os.listdir('/proc') if pid.isdigit() and parent(pid) == process]


def parent(pid: str) -> int | None:
    """Returns the parent of a running process; None for one that has ended."""
    try:
        with open(f'/proc/{pid}/stat') as f:
            state, ppid = f.read().rpartition(')')[2].split()[:2]
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state == 'Z' else int(ppid)


def test_changed_input_is_read_again(tmp_path):
    for i in range(4):
        (tmp_path / f'{i}.txt').write_text('good' if i != 2 else 'abcd')
    files = find_files([f'{tmp_path}/*.txt'])
    job = Job(str(tmp_path / 'out'), 'bytes', 0.0, max_bad_share=0.0)
    (tmp_path / '3.txt').write_bytes(b'\xff\xff\xff\xff')
    with pytest.raises(ConfigError, match=r'3\.txt: .*utf-8'):
        prepare(files, job, part_bytes=1)
    (tmp_path / '2.txt').write_text('ABCD')
    os.utime(tmp_path / '2.txt', ns=(1, 1))
    (tmp_path / '3.txt').write_text('fine')
    os.utime(tmp_path / '3.txt', ns=(1, 1))
    prepare(files, job, part_bytes=1)
    split = Split(job.output, 'train')
    text = get_encoding('bytes').decode(split.read(0, split.n_tokens).tolist())
    assert text.split('<|endoftext|>') == ['good', 'good', 'ABCD', 'fine', '']


# ---------------------------------------------------------------------------------------------
# Buckets
# ---------------------------------------------------------------------------------------------

BUCKET_JOB = Job('gs://bucket/tokens', SHIPPED, 0.25)


@pytest.fixture
def bucket(monkeypatch):
    with serve_bucket() as store:
        for name, value in leads_to(store).items():
            monkeypatch.setenv(name, value)
        yield store


def in_bucket(store) -> dict[str, bytes]:
    assert all(name.startswith('tokens/') for name in store.objects)
    return {name.removeprefix('tokens/'): content for name, content in store.objects.items()}


def test_three_workers_and_a_bucket_as_output(corpus, bucket):
    _, output, files = corpus
    prepare(files, BUCKET_JOB, workers=3, part_bytes=PART_BYTES)
    assert in_bucket(bucket) == contents(output)


def test_upload_that_arrives_damaged_is_an_error(corpus, bucket):
    _, output, files = corpus
    uploads = []

    def damage(name: str, content: bytes) -> bytes:
        if '/c/' in name and len(uploads) < 3:
            uploads.append(name)
            if len(uploads) == 3:  # other tokens, in chunks whose own checksums fit
                return next(c for n, c in bucket.objects.items() if '/c/' in n)
        return content

    bucket.on_write = damage
    with pytest.raises(OSError, match='reads back otherwise') as error:
        prepare(files, BUCKET_JOB, part_bytes=PART_BYTES)
    assert uploads[2].split('/c/')[0].removeprefix('tokens/') in str(error.value)
    assert not any(name.endswith('manifest.json') for name in bucket.objects)
    bucket.on_write = lambda name, content: content
    prepare(files, BUCKET_JOB, part_bytes=PART_BYTES)
    assert in_bucket(bucket) == contents(output)


# ---------------------------------------------------------------------------------------------
# Ray
# ---------------------------------------------------------------------------------------------

NO_RAY = 'Ray is not installed (requirements/data.txt)'


@pytest.mark.slow
def test_ray_gives_the_same_bytes(corpus, tmp_path, monkeypatch):
    pytest.importorskip('ray', reason=NO_RAY)
    _, output, files = corpus
    monkeypatch.chdir(tmp_path)
    prepare(files, Job('out', SHIPPED, 0.25), part_bytes=PART_BYTES, ray='local')
    assert contents(tmp_path / 'out') == contents(output)
    (tmp_path / 'c.txt').write_bytes(b'\xff')
    with pytest.raises(ConfigError, match=r'c\.txt: .*utf-8'):
        prepare(find_files(['*.txt']), Job('new', SHIPPED), ray='local')


def test_ray_without_a_cluster_or_the_package(corpus, tmp_path, monkeypatch):
    _, _, files = corpus
    monkeypatch.setitem(sys.modules, 'ray', None)
    with pytest.raises(ConfigError, match=r'--ray needs Ray: pip install'):
        prepare(files, Job(str(tmp_path / 'out'), SHIPPED), ray='auto')
    monkeypatch.undo()
    pytest.importorskip('ray', reason=NO_RAY)
    monkeypatch.setenv('RAY_TMPDIR', str(tmp_path))  # where clusters of this machine are noted
    monkeypatch.delenv('RAY_ADDRESS', raising=False)
    for address in ('auto', '127.0.0.1:1'):
        with pytest.raises(ConfigError, match=f'cluster answers at --ray={address} .*ray start'):
            prepare(files, Job(str(tmp_path / 'out'), SHIPPED), ray=address)


def test_ray_that_cannot_start_says_what_to_do(monkeypatch):
    error = OSError('AF_UNIX path length cannot exceed 107 bytes')
    monkeypatch.setenv('RAY_TMPDIR', '/tmp/' + 'long' * 20)
    assert 'short path, as in RAY_TMPDIR=/tmp' in workers._no_cluster('local', error)
    monkeypatch.setenv('RAY_TMPDIR', '/tmp')
    assert 'start it by hand with `ray start --head`' in workers._no_cluster('local', error)


def cloudpickle():
    """Returns Ray's copy of cloudpickle, or the package itself."""
    try:
        return importlib.import_module('ray.cloudpickle')
    except ImportError:
        return pytest.importorskip('cloudpickle', reason='neither Ray nor cloudpickle is installed')


@pytest.mark.parametrize('kind', ['text', 'hub', 'tokens'])
def test_code_that_ray_ships_needs_no_files_of_ours(tmp_path, kind):
    pickle, name = cloudpickle(), SHIPPED
    if kind == 'hub':
        pytest.importorskip('tokenizers')
        golden = json.loads(pathlib.Path(ROOT, 'tests/golden/tokenizers.json').read_text())
        name = str(tmp_path / 'tokenizer.json')
        pathlib.Path(name).write_text(json.dumps(golden['styles']['qwen2']['file']))
    (tmp_path / 'a.txt').write_text('text')
    job = Job(str(tmp_path / 'out'), name, 0.0)
    part = cut_into_parts(find_files([f'{tmp_path}/*.txt']), 1000)[0]
    if kind == 'tokens':
        options = checked_options(TokenOptions('megatron'))
        job = dataclasses.replace(job, tokens=options)
        prefix = f'{ROOT}/tests/golden/token_files/megatron/ended'
        part = cut_tokens(find_token_files([prefix], options), options, 1000)[0]
    workers.ship_code(pickle)
    shipped = pickle.dumps((module._retry_part, get_encoding(name), job, 0, 'key', part))
    code = f'import sys, {pickle.__name__} as c; f, *a = c.load(sys.stdin.buffer); f(*a)'
    subprocess.run([sys.executable, '-c', code], input=shipped, cwd=tmp_path, check=True)
    assert 'parts/00000.json' in contents(tmp_path / 'out')


MODULES = """
import sys
sys.path.insert(0, sys.argv[1])
import corpus.prepare
paths = {name: getattr(module, '__file__', None) or '' for name, module in sys.modules.items()}
ours = [name for name, path in paths.items() if path.startswith(sys.argv[1] + '/')]
print(*[name for name in ours if not hasattr(sys.modules[name], '__path__')])
"""


def test_all_modules_that_a_part_needs_are_shipped():
    command = [sys.executable, '-c', MODULES, ROOT]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    assert sorted(found) == sorted(workers.SHIPPED)


def variable(_: None, name: str) -> str:
    return os.environ.get(name, '')


def test_workers_have_the_environment_of_the_job(monkeypatch):
    """Not that of the start of the process which they are forked from."""
    assert list(workers.run(variable, None, [('GIVEN',)] * 2, 2, None)) == ['', '']
    monkeypatch.setenv('GIVEN', 'later')
    assert list(workers.run(variable, None, [('GIVEN',)] * 2, 2, None)) == ['later', 'later']


def test_what_workers_are_forked_from_has_no_threads_to_lose():
    code = f'import sys; import {", ".join(workers.PRELOADED)}; print("tensorstore" in sys.modules)'
    done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == 'False\n', done.stderr
