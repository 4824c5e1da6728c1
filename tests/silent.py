"""Puts the faults of silent_faults.py into a copy of the code, one by one, and sees a test fall.

    python tests/silent.py --jobs=2          # all of them, two at a time
    python tests/silent.py --only=Megatron   # those whose project or number holds this
    python tests/silent.py --clean           # the same tests without a fault: they pass
    python tests/silent.py --table           # the rows of docs/silent_bugs.md

Ends with a line of counts, and with 1 if a test did not fall, or fell before it ran.
"""

import argparse
import contextlib
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from silent_faults import FAULTS, Fault

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
SECONDS = 900  # for one test
LEFT_OUT = ('docs', 'findings', 'released', 'runs', 'shared')  # what these tests do not read
SHOWN = 120  # characters of what a test says


def copied(folder: str) -> str:
    """Copies the code, its tests and what they read to a folder; returns it."""

    def ignored(_: str, names: list[str]) -> list[str]:
        return [name for name in names if name.startswith('.') or name in LEFT_OUT]

    target = os.path.join(folder, 'code')
    shutil.copytree(ROOT, target, ignore=ignored)
    return target


@contextlib.contextmanager
def edited(fault: Fault, code: str) -> Iterator[None]:
    """Puts a fault into the copy, and takes it out again.

    Raises ValueError if the place is not there, or there twice.
    """
    path = os.path.join(code, fault.file)
    with open(path) as f:
        right = f.read()
    if right.count(fault.old) != 1:
        raise ValueError(f'{fault.file} holds {right.count(fault.old)} times: {fault.old}')
    with open(path, 'w') as f:
        f.write(right.replace(fault.old, fault.new))
    try:
        yield
    finally:
        with open(path, 'w') as f:
            f.write(right)


def ran(code: str, test: str) -> subprocess.CompletedProcess:
    """Runs one test of the copy; what it compiles is kept beside this code's own tests'."""
    cache = os.path.join(ROOT, '.pytest_cache', 'compiled')
    environment = {'JAX_COMPILATION_CACHE_DIR': cache, **os.environ}
    command = [
        sys.executable,
        '-m',
        'pytest',
        '-o',
        'addopts=',
        '-q',
        '-x',
        '-p',
        'no:cacheprovider',
    ]
    return subprocess.run(
        [*command, test], cwd=code, env=environment, capture_output=True, text=True, timeout=SECONDS
    )  # fmt: skip


def fell(done: subprocess.CompletedProcess) -> str:
    """Returns what a test said as it fell; '' if it passed, or did not get to run."""
    if done.returncode != 1 or not re.search(r'^FAILED ', done.stdout, re.M):
        return ''
    said = re.findall(r'^E   +(.*)', done.stdout, re.M) or ['FAILED']
    # The edit itself is wrong, if it names what is not there.
    return '' if said[0].startswith(('NameError', 'AttributeError')) else said[0].strip()[:SHOWN]


def row(fault: Fault) -> str:
    """Returns the row of a fault in docs/silent_bugs.md."""
    number = f'[{fault.project} {fault.number}]({fault.link})'
    path, _, name = fault.test.partition('::')
    test = f'`{path}`: {name.partition("[")[0]}'
    return f'| {number} | {fault.date} | {fault.fault} | {fault.meshes} | `{fault.file}` | {test} |'


def check(faults: list[Fault], clean: bool = False, jobs: int = 1) -> int:
    """Runs the test of each fault, with it or clean; prints a line each, and returns how many did
    not do what they should."""
    started = time.monotonic()
    tasks = [*dict.fromkeys(f.test for f in faults)] if clean else faults
    with tempfile.TemporaryDirectory(prefix='silent-') as folder, ThreadPoolExecutor(jobs) as pool:
        codes: queue.SimpleQueue[str] = queue.SimpleQueue()
        for i in range(jobs):
            codes.put(copied(os.path.join(folder, str(i))))
        good = list(pool.map(lambda task: run_one(task, codes), tasks))
    seconds, failed = time.monotonic() - started, good.count(False)
    print(f'{len(tasks)} tests in {seconds:.0f} s, {failed} not as they should be')
    return failed


def run_one(task: Fault | str, codes: queue.SimpleQueue) -> bool:
    """Runs a test clean, or the test of a fault with it, in a copy that is free; returns whether it
    did what it should."""
    code = codes.get()
    try:
        return passes(task, code) if isinstance(task, str) else put_in(task, code)
    finally:
        codes.put(code)


def passes(test: str, code: str) -> bool:
    """Runs a test without a fault; returns whether it passed."""
    done = ran(code, test)
    print(f'{"passes" if done.returncode == 0 else "FALLS"}: {test}', flush=True)
    return done.returncode == 0


def put_in(fault: Fault, code: str) -> bool:
    """Runs the test of a fault with it; returns whether it fell."""
    with edited(fault, code):
        done = ran(code, fault.test)
    said = fell(done)
    print(f'{fault.project} {fault.number}: {said or "STANDS"}', flush=True)
    if not said:
        print('\n'.join([fault.test, *done.stdout.splitlines()[-15:], done.stderr[-2000:]]))
    return bool(said)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--only', default='', help='faults whose project or number holds this')
    parser.add_argument('--clean', action='store_true', help='run the tests without the faults')
    parser.add_argument('--table', action='store_true', help='print the rows of the page')
    parser.add_argument('--jobs', type=int, default=1, help='tests that run side by side')
    arguments = parser.parse_args()
    faults = [f for f in FAULTS if arguments.only in f'{f.project} {f.number}']
    if arguments.table:
        print('\n'.join(map(row, faults)))
        return 0
    return min(check(faults, arguments.clean, arguments.jobs), 1)


if __name__ == '__main__':
    sys.exit(main())
