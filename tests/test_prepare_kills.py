"""Killed runs, damaged uploads, buckets and clusters: the bytes are those of an undisturbed run."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from servers import leads_to, serve_bucket
from test_prepare import ROOT, SHIPPED, prepared_corpus
from test_shards import contents

from corpus import documents as documents
from corpus import prepare as module
from corpus.files import find_files
from corpus.prepare import Job, prepare
from corpus.shards import Split
from tokenizer import get_encoding


@pytest.fixture(scope='module')
def corpus(tmp_path_factory):
    return prepared_corpus(tmp_path_factory)


RUN = """
import os, signal, sys
sys.path.insert(0, {root!r})
from corpus import prepare as module, shards
from corpus.files import find_files
from corpus.prepare import Job, prepare

calls = 0

def killer(fn, nth):
    def wrapped(*args, **kwargs):
        global calls
        calls += 1
        if calls == nth:
            os.kill(os.getpid(), signal.SIGKILL)
        return fn(*args, **kwargs)
    return wrapped

if __name__ == '__main__':
    pattern, output, workers, where, nth = sys.argv[1:]
    owner = {{'finish': shards.ArrayWriter, 'array_spec': shards}}.get(where, module)
    if where:
        setattr(owner, where, killer(getattr(owner, where), int(nth)))
    prepare(find_files([pattern]), Job(output, {shipped!r}, 0.25), int(workers), part_bytes=8000)
"""


def command(tmp_path, files, output: str, workers: int, where: str, nth: int) -> list[str]:
    """A command that prepares the files, and kills itself in the nth call of `where`."""
    script = tmp_path / 'run.py'
    script.write_text(RUN.format(root=ROOT, shipped=SHIPPED))
    folder = os.path.commonpath([file.path for file in files])
    return [sys.executable, script, f'{folder}/**/*', output, str(workers), where, str(nth)]


def start(tmp_path, files, workers: int = 1, where: str = '', nth: int = 0) -> subprocess.Popen:
    return subprocess.Popen(command(tmp_path, files, f'{tmp_path}/out', workers, where, nth))


@pytest.mark.parametrize(
    ('where', 'nth'),
    [
        ('finish', 7),  # nothing of the array is there
        ('array_spec', 10),  # the array is there, unchecked
        ('_total', 1),  # all parts, no manifest
        ('_remove_leftovers', 1),  # the manifest, and the parts' records
    ],
)
def test_killed_at_each_phase_and_resumed(corpus, tmp_path, where, nth):
    _, output, files = corpus
    assert start(tmp_path, files, 1, where, nth).wait() == -signal.SIGKILL
    out = tmp_path / 'out'
    done = {name: os.stat(out / name).st_mtime_ns for name in committed(out)}
    assert start(tmp_path, files).wait() == 0
    assert contents(out) == contents(output)
    assert {p: os.stat(out / p).st_mtime_ns for p in done} == done


def committed(out) -> list[str]:
    """The files of the arrays that a record under `out` names."""
    found = contents(out)
    records = [json.loads(found[name]) for name in found if name.startswith('parts/')]
    paths = [shard['path'] for record in records for shard in record['shards'].values()]
    return [name for path in paths for name in found if name.startswith(f'{path}/')]


def test_killed_again_and_again_with_workers(corpus, tmp_path):
    _, output, files = corpus
    out, kills = tmp_path / 'out', 0
    while True:
        before = len(list(out.glob('parts/*.json')))
        process = start(tmp_path, files, workers=2)
        while process.poll() is None and len(list(out.glob('parts/*.json'))) < before + 3:
            time.sleep(0.001)
        if process.poll() is not None:
            break
        children = [int(p) for p in os.listdir('/proc') if p.isdigit() and parent(p) == process.pid]
        process.kill()
        process.wait()
        kills += 1
        # Workers of a dead parent would write into the work of the next run.
        assert children
        for _ in range(2000):
            if not any(parent(str(child)) is not None for child in children):
                break
            time.sleep(0.01)
        else:
            pytest.fail(f'workers outlive their parent: {children}')
    assert process.returncode == 0
    assert kills >= 3
    assert contents(out) == contents(output)


def parent(pid: str) -> int | None:
    """The parent of a running process; None for one that has ended."""
    try:
        with open(f'/proc/{pid}/stat') as f:
            state, ppid = f.read().rpartition(')')[2].split()[:2]
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if state == 'Z' else int(ppid)


def test_killed_worker_is_named(corpus, tmp_path):
    _, output, files = corpus
    process = subprocess.Popen(
        command(tmp_path, files, f'{tmp_path}/out', 2, '', 0), stderr=subprocess.PIPE, text=True
    )
    while len(list(tmp_path.glob('out/parts/*.json'))) < 2:
        time.sleep(0.001)
    workers = [p for p in os.listdir('/proc') if p.isdigit() and parent(p) == process.pid]
    for pid in workers:
        with open(f'/proc/{pid}/cmdline') as f:
            if 'spawn_main' in f.read():
                os.kill(int(pid), signal.SIGKILL)
                break
    assert 'a worker was killed' in process.communicate()[1]
    assert process.returncode == 1
    assert start(tmp_path, files, 2).wait() == 0
    assert contents(tmp_path / 'out') == contents(output)


def test_changed_input_is_read_again(tmp_path):
    for i in range(4):
        (tmp_path / f'{i}.txt').write_text('good' if i != 2 else 'abcd')
    files = find_files([f'{tmp_path}/*.txt'])
    job = Job(str(tmp_path / 'out'), 'bytes', 0.0, max_bad_share=0.0)
    (tmp_path / '3.txt').write_bytes(b'\xff\xff\xff\xff')
    with pytest.raises(ValueError, match=r'3\.txt: .*utf-8'):
        prepare(files, job, part_bytes=1)
    (tmp_path / '2.txt').write_text('ABCD')
    os.utime(tmp_path / '2.txt', ns=(1, 1))
    (tmp_path / '3.txt').write_text('fine')
    os.utime(tmp_path / '3.txt', ns=(1, 1))
    prepare(files, job, part_bytes=1)
    split = Split(job.output, 'train')
    text = get_encoding('bytes').decode(split.read(0, split.n_tokens).tolist())
    assert text.split('<|endoftext|>') == ['good', 'good', 'ABCD', 'fine', '']


# Buckets and clusters


@pytest.mark.parametrize('workers', [1, 2])
def test_output_in_a_bucket(corpus, tmp_path, workers):
    _, output, files = corpus
    with serve_bucket() as store:
        run_with_bucket(store, tmp_path, files, workers)
        prefix = 'tokens/'
        assert all(name.startswith(prefix) for name in store.objects)
        found = {name.removeprefix(prefix): content for name, content in store.objects.items()}
        assert found == contents(output)


def test_upload_that_arrives_damaged_is_an_error(corpus, tmp_path):
    _, _, files = corpus
    with serve_bucket() as store:
        damaged = []

        def damage(name: str, content: bytes) -> bytes:
            if '/c/' in name and len(damaged) < 3:
                damaged.append(name)
                if len(damaged) == 3:  # other tokens, in chunks whose own checksums fit
                    return next(c for n, c in store.objects.items() if '/c/' in n)
            return content

        store.on_write = damage
        with pytest.raises(subprocess.CalledProcessError) as error:
            run_with_bucket(store, tmp_path, files, 1)
        assert damaged[2].split('/c/')[0].removeprefix('tokens/') in error.value.stderr
        assert not any(name.endswith('manifest.json') for name in store.objects)
        store.on_write = lambda name, content: content
        run_with_bucket(store, tmp_path, files, 1)
        found = {n.removeprefix('tokens/'): content for n, content in store.objects.items()}
        assert found == contents(corpus[1])


def run_with_bucket(store, tmp_path, files, workers: int) -> None:
    subprocess.run(
        command(tmp_path, files, 'gs://bucket/tokens', workers, '', 0),
        env=os.environ | leads_to(store),
        check=True,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
def test_ray_gives_the_same_bytes(corpus, tmp_path, monkeypatch):
    pytest.importorskip('ray', reason='Ray is not installed (requirements/data.txt)')
    _, output, files = corpus
    monkeypatch.chdir(tmp_path)
    prepare(files, Job('out', SHIPPED, 0.25), part_bytes=8000, ray='local')
    assert contents(tmp_path / 'out') == contents(output)
    (tmp_path / 'c.txt').write_bytes(b'\xff')
    with pytest.raises(ValueError, match=r'c\.txt: .*utf-8'):
        prepare(find_files(['*.txt']), Job('new', SHIPPED), ray='local')


def test_ray_without_a_cluster_or_the_package(corpus, tmp_path, monkeypatch):
    _, _, files = corpus
    monkeypatch.setitem(sys.modules, 'ray', None)
    with pytest.raises(ImportError, match=r'--ray needs Ray: pip install'):
        prepare(files, Job(str(tmp_path / 'out'), SHIPPED), ray='auto')
    monkeypatch.undo()
    pytest.importorskip('ray', reason='Ray is not installed (requirements/data.txt)')
    monkeypatch.setenv('RAY_TMPDIR', str(tmp_path))  # where clusters of this machine are noted
    monkeypatch.delenv('RAY_ADDRESS', raising=False)
    for address in ('auto', '127.0.0.1:1'):
        with pytest.raises(ValueError, match=f'cluster answers at --ray={address} .*ray start'):
            prepare(files, Job(str(tmp_path / 'out'), SHIPPED), ray=address)


def test_code_that_ray_ships_needs_no_files_of_ours(tmp_path):
    pytest.importorskip('ray', reason='Ray is not installed (requirements/data.txt)')
    from ray import cloudpickle

    (tmp_path / 'a.txt').write_text('text')
    job = Job(str(tmp_path / 'out'), SHIPPED, 0.0)
    part = documents.cut_into_parts(find_files([f'{tmp_path}/*.txt']), 1000)[0]
    module.ship_code(cloudpickle)
    shipped = cloudpickle.dumps((module.write_part, get_encoding(SHIPPED), job, 0, 'key', part))
    code = 'import sys, ray.cloudpickle as c; f, *a = c.load(sys.stdin.buffer); f(*a)'
    subprocess.run([sys.executable, '-c', code], input=shipped, cwd=tmp_path, check=True)
    assert 'parts/00000.json' in contents(tmp_path / 'out')
