"""Attacks the code with faults drawn from a seed, and counts what came of them.

    python tests/attack.py                                   # 1,500 faults, in about 12 minutes
    python tests/attack.py --faults=200 --seed=7 --families=checkpoint,tokens
    python tests/attack.py --seed=7 --only=tokens:31         # one fault again, with all it says

Families: checkpoint (damaged, exchanged and renamed files and steps, then a restore), tokens
(prepared shards and their manifest, then all batches), records (the other files of a workdir, then
a start), config (fields with hostile values, then rules and shapes), commands (hostile command
lines), kills (signals at random moments of training and preparation, then the same command again),
disk (no room from a random byte on, then the same command with room), corpus (damaged input files,
then a preparation).

A fault is harmless if the result is the same bit for bit, refused if an error names what is wrong,
warned if the run goes on as designed and says so. It fails if the result is silently wrong, if it
hangs, or if an error comes as a traceback or names nothing. Exits with 1 if any fault fails.
A seed gives the same faults again; what a signal hits at its moment also depends on the machine.
"""

import argparse
import collections
import contextlib
import importlib
import json
import os
import pathlib
import queue
import random
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from typing import Any, NamedTuple

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

FAMILIES = {  # name: (module, class, faults of 1,500)
    'checkpoint': ('attack_storage', 'Checkpoints', 560),
    'tokens': ('attack_storage', 'Tokens', 330),
    'records': ('attack_runs', 'Records', 95),
    'config': ('attack_inputs', 'Configs', 270),
    'commands': ('attack_inputs', 'Commands', 36),
    'kills': ('attack_runs', 'Kills', 42),
    'disk': ('attack_runs', 'FullDisks', 20),
    'corpus': ('attack_inputs', 'Corpora', 147),
}
DEFAULT_FAULTS = sum(faults for *_, faults in FAMILIES.values())
VERDICTS = ('harmless', 'refused', 'warned', 'wrong', 'hang', 'traceback')
FAILURES = VERDICTS[3:]
BUILD_SECONDS = 600  # for what a family damages copies of
DEVICES = 2  # simulated ones, of the processes that attack


class Task(NamedTuple):
    """The fault number `index` of a family."""

    family: str
    index: int


def build(name: str, folder: pathlib.Path) -> Any:
    """Returns the family of this name, which keeps its files below `folder`."""
    module, family, _ = FAMILIES[name]
    folder = folder / name
    folder.mkdir(parents=True)
    return getattr(importlib.import_module(module), family)(folder)


def attack(family: Any, task: Task, seed: int) -> dict[str, Any]:
    """Makes one fault, and returns its outcome with its task and seconds."""
    rng, started = random.Random(f'{seed}:{task.family}:{task.index}'), time.perf_counter()
    try:
        outcome = family.attack(rng, task.index)._asdict()
    except Exception:  # of the attack itself, which then shows nothing
        outcome = {'verdict': 'traceback', 'description': 'the attack itself failed'}
        outcome['detail'] = traceback.format_exc()
    return {**task._asdict(), **outcome, 'seconds': time.perf_counter() - started}


def draw_tasks(n: int, names: list[str]) -> list[Task]:
    """Returns n faults spread over the families, so mixed that any beginning has some of all."""
    total = sum(FAMILIES[name][2] for name in names)
    exact = {name: n * FAMILIES[name][2] / total for name in names}
    counts = {name: int(x) for name, x in exact.items()}
    for name in sorted(names, key=lambda name: counts[name] - exact[name])[
        : n - sum(counts.values())
    ]:
        counts[name] += 1
    tasks = [(i / count, Task(name, i)) for name, count in counts.items() for i in range(count)]
    return [task for _, task in sorted(tasks, key=lambda pair: pair[0])]


# ---------------------------------------------------------------------------------------------
# Processes that attack
# ---------------------------------------------------------------------------------------------


def environment() -> dict[str, str]:
    """Returns the environment of the processes: simulated devices, quick compilation."""
    flags = os.environ.get('XLA_FLAGS', '') + ' --xla_backend_optimization_level=0'
    return {
        **os.environ,
        'JAX_PLATFORMS': 'cpu',
        'JAX_NUM_CPU_DEVICES': str(DEVICES),
        'XLA_FLAGS': flags,
    }


def serve(seed: int, folder: pathlib.Path) -> None:
    """Attacks as the lines of standard input say, 'family index', and prints outcomes as JSON.

    What the attacked code prints goes to standard error.
    """
    answers = os.fdopen(os.dup(1), 'w')
    os.dup2(2, 1)
    families: dict[str, Any] = {}
    for line in sys.stdin:
        task = Task(line.split()[0], int(line.split()[1]))
        if task.family not in families:
            families[task.family] = build(task.family, folder)
        print(json.dumps({'limit': families[task.family].limit}), file=answers, flush=True)
        outcome = attack(families[task.family], task, seed)
        print(json.dumps(outcome), file=answers, flush=True)


class BuildError(RuntimeError):
    """What a family attacks could not be built, so that its faults would show nothing."""


class Process:
    """A process that attacks; ended and started anew when a fault hangs or kills it."""

    def __init__(self, seed: int, folder: pathlib.Path, number: int):
        self.seed, self.folder, self.starts = seed, folder / str(number), 0
        self.process: subprocess.Popen | None = None

    def start(self) -> None:
        self.starts, self.unread = self.starts + 1, b''
        folder = self.folder / str(self.starts)
        folder.mkdir(parents=True)
        self.log = folder / 'output.txt'
        command = [sys.executable, __file__, f'--seed={self.seed}', f'--serve={folder}']
        with open(self.log, 'w') as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log,
                env=environment(), start_new_session=True,
            )  # fmt: skip

    def ask(self, task: Task) -> dict[str, Any]:
        """Returns the outcome of a fault."""
        if self.process is None:
            self.start()
        started = time.perf_counter()
        with contextlib.suppress(BrokenPipeError):  # it has ended, which the answer shows
            self.process.stdin.write(f'{task.family} {task.index}\n'.encode())
            self.process.stdin.flush()
        answer = self._answer(BUILD_SECONDS)
        built = isinstance(answer, dict)
        if built:
            answer = self._answer(answer['limit'])
        if isinstance(answer, dict):
            return answer
        self.stop()
        end = self.log.read_text()[-3000:]
        if not built:
            raise BuildError(f'{task.family}: what is to be attacked cannot be built\n{end}')
        return {
            **task._asdict(),
            'verdict': answer,
            'description': 'the process was ended, or ended by itself; it last printed',
            'detail': end,
            'seconds': time.perf_counter() - started,
        }

    def _answer(self, seconds: float) -> dict[str, Any] | str:
        """Returns the next answer, or the verdict if there is none in time."""
        end = time.monotonic() + seconds
        while b'\n' not in self.unread:
            ready, *_ = select.select([self.process.stdout], [], [], max(0, end - time.monotonic()))
            if not ready:
                return 'hang'
            more = os.read(self.process.stdout.fileno(), 1 << 20)
            if not more:
                return 'traceback'
            self.unread += more
        line, _, self.unread = self.unread.partition(b'\n')
        return json.loads(line)

    def stop(self) -> None:
        """Ends the process, and those that it started."""
        process, self.process = self.process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def attack_all(
    tasks: list[Task], seed: int, folder: pathlib.Path, jobs: int, minutes: float
) -> Iterator[dict[str, Any]]:
    """Yields the outcomes of the faults, from `jobs` processes, until the time is over."""
    waiting, found = collections.deque(tasks), queue.Queue()
    deadline = time.monotonic() + 60 * minutes
    processes = [Process(seed, folder, i) for i in range(jobs)]

    def work(process: Process) -> None:
        try:
            while waiting and time.monotonic() < deadline:
                found.put(process.ask(waiting.popleft()))
            found.put(None)
        except IndexError:  # another thread took the last one
            found.put(None)
        except Exception as error:
            found.put(error)

    for process in processes:
        threading.Thread(target=work, args=(process,), daemon=True).start()
    running = jobs
    try:
        while running:
            outcome = found.get()
            if isinstance(outcome, Exception):
                raise outcome
            if outcome is None:
                running -= 1
            else:
                yield outcome
    finally:
        waiting.clear()
        for process in processes:
            process.stop()


# ---------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------


def table(outcomes: list[dict[str, Any]]) -> str:
    """Returns the counts of the verdicts, a line per family."""
    counts = collections.defaultdict(collections.Counter)
    for outcome in outcomes:
        for row in (outcome['family'], 'all'):
            counts[row][outcome['verdict']] += 1
    head = f'{"":12}{"faults":>9}' + ''.join(f'{verdict:>11}' for verdict in VERDICTS)
    lines = [head]
    for row in [name for name in (*FAMILIES, 'all') if name in counts]:
        numbers = ''.join(f'{counts[row][verdict]:>11,}' for verdict in VERDICTS)
        lines.append(f'{row:12}{sum(counts[row].values()):>9,}{numbers}')
    return '\n'.join(lines)


def failure(outcome: dict[str, Any], seed: int) -> str:
    """Returns what a failure was, and how to see it again."""
    task = f'{outcome["family"]}:{outcome["index"]}'
    return (
        f'\n{outcome["verdict"].upper()} {outcome["description"]}\n{outcome["detail"].rstrip()}\n'
        f'again: python tests/attack.py --seed={seed} --only={task}'
    )


def progress(outcomes: list[dict[str, Any]], n: int, seconds: float) -> str:
    """Returns a line that says how far n faults are."""
    failures = sum(outcome['verdict'] in FAILURES for outcome in outcomes)
    return f'{seconds:5.0f} s  {len(outcomes):,} of {n:,} faults, {failures} failures'


def end_early(number: int, frame: Any) -> None:
    """Ends the command at a signal; what it started and wrote is removed on the way."""
    sys.exit(128 + number)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--faults', type=int, default=DEFAULT_FAULTS, help='number of faults')
    parser.add_argument('--seed', type=int, default=0, help='that all faults follow from')
    parser.add_argument('--families', default=','.join(FAMILIES), help='names, with commas')
    parser.add_argument('--minutes', type=float, default=20, help='after which no fault starts')
    parser.add_argument('--jobs', type=int, default=2, help='processes')
    parser.add_argument('--json', action='store_true', help='print each outcome as a line of JSON')
    parser.add_argument('--only', metavar='FAMILY:INDEX', help='make this fault alone')
    parser.add_argument('--serve', type=pathlib.Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    only = arguments.only
    names = [only.partition(':')[0]] if only else arguments.families.split(',')
    if unknown := [name for name in names if name not in FAMILIES]:
        parser.error(f'unknown: {", ".join(unknown)}; the families are {", ".join(FAMILIES)}')
    if only and not only.partition(':')[2].isdecimal():
        parser.error('--only takes FAMILY:INDEX')
    return arguments


def main() -> None:
    arguments = parse()
    if arguments.serve:
        return serve(arguments.seed, arguments.serve)
    folder = pathlib.Path(tempfile.mkdtemp(prefix='attack-'))
    if arguments.only:
        family, _, index = arguments.only.partition(':')
        tasks, jobs = [Task(family, int(index))], 1
    else:
        names = arguments.families.split(',')
        tasks, jobs = draw_tasks(arguments.faults, names), arguments.jobs
    outcomes, started = [], time.monotonic()
    show_at = 0.0
    attacks = attack_all(tasks, arguments.seed, folder, jobs, arguments.minutes)
    signal.signal(signal.SIGTERM, end_early)
    try:
        with contextlib.closing(attacks):
            for outcome in attacks:
                outcomes.append(outcome)
                seconds = time.monotonic() - started
                if arguments.json:
                    print(json.dumps(outcome), flush=True)
                elif outcome['verdict'] in FAILURES or arguments.only:
                    print(failure(outcome, arguments.seed), flush=True)
                elif seconds >= show_at:
                    print(progress(outcomes, len(tasks), seconds), flush=True)
                    show_at = seconds + 10
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f'\nseed {arguments.seed}, {time.monotonic() - started:.0f} s', file=sys.stderr)
    print(table(outcomes), file=sys.stderr if arguments.json else sys.stdout)
    if len(outcomes) < len(tasks):
        print(f'the time was over after {len(outcomes):,} of {len(tasks):,} faults')
    failed = any(outcome['verdict'] in FAILURES for outcome in outcomes)
    sys.exit(failed or len(outcomes) < len(tasks))


if __name__ == '__main__':
    main()
