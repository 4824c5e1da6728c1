"""Damaged files of a workdir, signals and full disks, for tests/attack.py.

Whatever happens to a run or a preparation, the same command given again has to end as one that
nothing happened to, bit for bit.
"""

import contextlib
import functools
import json
import math
import pathlib
import random
import resource
import shlex
import shutil
import signal
import subprocess
import time
from typing import Any

import jax
import pytest
from attack_faults import (
    DAMAGE,
    HARMLESS,
    REFUSED,
    TRACEBACK,
    WARNED,
    WRONG,
    Family,
    Outcome,
    Undo,
    judge,
    silent,
)
from attack_jobs import (
    END_SECONDS,
    Jobs,
    appears,
    ended,
    prepared_tokens,
    settled,
    step_files,
    steps_of,
)
from common_runs import share_programs
from training_worker import small_run

import train
from checkpoint import Checkpointer
from runtime import lease
from runtime.workdir import append_evaluation, keep_records

# ---------------------------------------------------------------------------------------------
# The files beside the checkpoints
# ---------------------------------------------------------------------------------------------


class Records(Family):
    """A workdir of a run that was killed after step 5 of 6; then its next start, to the end."""

    name = 'records'
    FILES = (
        'config.json', 'record.json', 'metrics.jsonl', 'metrics.jsonl', 'tokenizer.json',
        'eval.jsonl', 'lease.json',
    )  # fmt: skip

    def __init__(self, folder: pathlib.Path):
        super().__init__(folder)
        share_programs(pytest.MonkeyPatch())
        lease.STALE_SECONDS = 1.0  # a lease that names nobody is waited for
        self.config = small_run(
            str(prepared_tokens(folder)), steps=6, checkpoint__keep=0, mesh__dp=jax.device_count()
        )
        self.workdir = folder / 'run'
        with silent():
            train.train(self.config, str(self.workdir))
        self.whole = {step: step_files(self.workdir, step) for step in (2, 4, 6)}
        lines = (self.workdir / 'metrics.jsonl').read_text()
        self.metrics = steps_of(lines)
        shutil.rmtree(self.workdir / 'checkpoints/6')
        whole = [line for line in lines.splitlines(True) if json.loads(line)['step'] <= 5]
        (self.workdir / 'metrics.jsonl').write_text(''.join(whole))
        mesh = train.make_mesh(self.config.mesh)
        for step in (2, 4):
            append_evaluation(str(self.workdir), step, {'eval_loss': 2.0 / step}, mesh)
        dead = lease.this_process() | {'started': '1', 'beat': 3}
        (self.workdir / 'lease.json').write_text(json.dumps(dead) + '\n')
        self.undo = Undo(self.workdir)

    def attack(self, rng: random.Random, index: int) -> Outcome:
        with self.undo as workdir:
            path = workdir / rng.choice(self.FILES)
            fault = rng.choice((*DAMAGE, crlf, other_json, broken_line, lost_line_end, a_folder))
            description = f'{fault(path, rng)} {path.name}'
            if new := rng.random() < 0.15:
                shutil.rmtree(workdir / 'checkpoints')
                description += ', no checkpoints'
            damaged = path.read_bytes() if path.is_file() else None
            outcome = judge(
                description,
                functools.partial(self._start, workdir, path),
                functools.partial(self._check, workdir, path, damaged, new),
                (path.name,),
            )
            kept = all(step_files(workdir, step) == self.whole[step] for step in (2, 4))
            if not kept and not (new and outcome.verdict == REFUSED):
                return Outcome(WRONG, description, f'a checkpoint was lost; {outcome.detail}')
            return outcome

    def _start(self, workdir: pathlib.Path, path: pathlib.Path) -> str:
        """Runs to the end, and adds an evaluation if it is those that are damaged."""
        with silent() as said:
            train.train(self.config, str(workdir))
            if path.name == 'eval.jsonl':  # as --eval_only does it
                keep_records(str(path))
                mesh = train.make_mesh(self.config.mesh)
                append_evaluation(str(workdir), 6, {'eval_loss': 0.5}, mesh)
        return said.getvalue()

    def _check(
        self,
        workdir: pathlib.Path,
        path: pathlib.Path,
        damaged: bytes | None,
        new: bool,
        said: str,
    ) -> tuple[str, str]:
        if step_files(workdir, 6) != self.whole[6]:
            return WRONG, 'the last state differs'
        text = (workdir / 'metrics.jsonl').read_text()
        try:
            found = steps_of(text)
            json.loads((workdir / 'record.json').read_text())
            json.loads((workdir / 'config.json').read_text())
            json.loads((workdir / 'tokenizer.json').read_text())
        except (ValueError, KeyError, TypeError) as error:
            return WRONG, f'a file cannot be read after the start: {error!r}'
        start = 0 if new else 4
        expected = {step: records for step, records in self.metrics.items() if step > start}
        if {step: records for step, records in found.items() if step > start} != expected:
            return WRONG, f'other records beyond step {start}: {text}'
        unread, kept = readable(damaged, path.name)
        if path.name == 'metrics.jsonl':
            lost = [record for record in kept if 0 < record['step'] <= start]
            lost = [record for record in lost if json.dumps(record) not in text]
        elif path.name == 'eval.jsonl':
            lines = (workdir / 'eval.jsonl').read_text(errors='replace').splitlines()
            if json.loads(lines[-1])['step'] != 6:
                return WRONG, 'the new evaluation is not on a line of its own'
            lost = [record for record in kept if json.dumps(record) not in '\n'.join(lines)]
            unread = False  # whoever reads it says so
        else:
            lost = []
        if lost:
            return WRONG, f'records that could be read are gone: {lost}'
        if path.name in said:
            return WARNED, next(line for line in said.splitlines() if path.name in line)
        if unread and path.name != 'lease.json':
            return WRONG, f'nothing was said; the output:\n{said}'
        if path.name == 'metrics.jsonl' and found.keys() != self.metrics.keys():
            return WARNED, 'lines are gone, as after a kill'
        return HARMLESS, ''


def readable(content: bytes | None, name: str) -> tuple[bool, list[dict[str, Any]]]:
    """Returns True if a part of a file cannot be read, and the records of the lines that can be.

    A missing file (None) and the rest of a last line that a kill cut short do not count.
    """
    if content is None:
        return False, []
    if not name.endswith('.jsonl'):
        try:
            value = json.loads(content)
        except ValueError:
            return True, []
        return not isinstance(value, list if name == 'record.json' else dict), []
    unread, records = False, []
    *lines, _ = content.split(b'\n')
    for line in filter(bytes.strip, lines):
        try:
            record = json.loads(line)
            assert isinstance(record['step'], int)
        except (ValueError, KeyError, TypeError, AssertionError):
            unread = True
        else:
            records.append(record)
    return unread, records


def crlf(path: pathlib.Path, rng: random.Random) -> str:
    path.write_bytes(path.read_bytes().replace(b'\n', b'\r\n'))
    return 'line ends of Windows in'


def other_json(path: pathlib.Path, rng: random.Random) -> str:
    content = rng.choice(['[]', '{}', 'null', '5', '"x"', '[[]]', '{"step": null}', 'NaN'])
    path.write_text(content + '\n')
    return f'{content} in place of'


def broken_line(path: pathlib.Path, rng: random.Random) -> str:
    lines = path.read_bytes().splitlines(True)
    content = rng.choice(
        [b'{"step": 1, "lo\n', b'\xff\xfe\n', b'\0' * 300 + b'\n', b'}\n', b'[1]\n']
    )
    lines.insert(rng.randint(0, len(lines)), content)
    path.write_bytes(b''.join(lines))
    return f'a line {content[:16]!r} in'


def lost_line_end(path: pathlib.Path, rng: random.Random) -> str:
    lines = path.read_bytes().splitlines(True)
    i = rng.randrange(len(lines))
    lines[i] = lines[i].rstrip(b'\n')
    path.write_bytes(b''.join(lines))
    return f'no end of line {i + 1} in'


def a_folder(path: pathlib.Path, rng: random.Random) -> str:
    path.unlink()
    path.mkdir()
    return 'a folder in place of'


# ---------------------------------------------------------------------------------------------
# Signals and full disks
# ---------------------------------------------------------------------------------------------


class Kills(Family):
    """SIGKILL, SIGTERM or SIGHUP at random moments of a run or a preparation."""

    name = 'kills'
    limit = 4 * END_SECONDS

    def __init__(self, folder: pathlib.Path):
        super().__init__(folder)
        self.jobs = Jobs(folder)

    def attack(self, rng: random.Random, index: int) -> Outcome:
        training, said, stopped_at = rng.random() < 0.75, [], set()
        with self.jobs.place() as (folder, output):
            for _ in range(rng.choice((1, 1, 2))):
                number = rng.choice((signal.SIGKILL,) * 3 + (signal.SIGTERM, signal.SIGHUP))
                moment, problem = self._kill(training, folder, output, number, rng)
                said.append(f'{signal.Signals(number).name} {moment}')
                if problem:
                    verdict, detail = problem
                    return Outcome(verdict, f'{what(training)}: {", then ".join(said)}', detail)
                if training and number != signal.SIGKILL:
                    saved = [int(x.parent.name) for x in folder.glob('checkpoints/*/COMMIT')]
                    stopped_at.add(max(saved, default=self.jobs.STEPS))
            description = f'{what(training)}: {", then ".join(said)}'
            problem = self.jobs.finish(training, folder, output, stopped_at)
        verdict = TRACEBACK if 'Traceback' in problem else WRONG if problem else HARMLESS
        return Outcome(verdict, description, problem)

    def _kill(
        self,
        training: bool,
        folder: pathlib.Path,
        output: pathlib.Path,
        number: int,
        rng: random.Random,
    ) -> tuple[str, tuple[str, str] | None]:
        """Starts the command and sends a signal; returns when, and verdict and detail of a failure.

        The moment is seldom one before the first file is written, in which little can go wrong.
        """
        j = self.jobs
        command = j.training(folder) if training else j.preparation(folder)
        before, after = (j.before_saves, j.saves) if training else (j.before_parts, j.parts)
        process = j.start(command, output)
        if rng.random() < 0.2:
            seconds, start = rng.uniform(0, before), 'the start'
        else:
            seconds, start = rng.uniform(0, after), 'the first file'
            appears(folder / 'checkpoints' if training else folder, process)
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(number)
        code, moment = ended(process), f'{seconds:.2f} s after {start}'
        said = settled(output)
        if code is None:
            return moment, ('hang', f'it did not end:\n{said}')
        if 'Traceback' in said:
            return moment, (TRACEBACK, said)
        if code not in (0, -number):
            return moment, (WRONG, f'it ended with {code}:\n{said}')
        return moment, None


def what(training: bool) -> str:
    return 'training' if training else 'preparation'


class FullDisks(Family):
    """No room from some byte on, by a limit on files or a small disk; then room again."""

    name = 'disk'
    limit = 4 * END_SECONDS

    def __init__(self, folder: pathlib.Path):
        super().__init__(folder)
        self.jobs = Jobs(folder)
        self.may_mount = (
            subprocess.run(['unshare', '-Urm', 'true'], capture_output=True).returncode == 0
            if shutil.which('unshare')
            else False
        )

    def attack(self, rng: random.Random, index: int) -> Outcome:
        training = rng.random() < 0.7
        fault = rng.choice((self._limit, self._late_limit, *[self._small_disk] * 2))
        if fault == self._small_disk and not self.may_mount:
            fault = self._limit
        with self.jobs.place() as (folder, output):
            description, code, said, problem = fault(training, folder, output, rng)
        description = f'{what(training)}: {description}'
        if code is None:
            return Outcome('hang', description, said)
        if 'Traceback' in said or 'Traceback' in problem:
            return Outcome(TRACEBACK, description, f'{said}\n{problem}')
        if code not in (0, 1) or problem:
            return Outcome(WRONG, description, f'it ended with {code}:\n{said}\n{problem}')
        last = said.strip().rpartition('\n')[2]
        return Outcome(REFUSED if code else HARMLESS, description, last)

    def _finish(self, training: bool, folder: pathlib.Path, output: pathlib.Path) -> str:
        """Reads all checkpoints, then lets the command end; returns what is wrong."""
        if training and (folder / 'checkpoints').is_dir():
            with Checkpointer(str(folder / 'checkpoints')) as checkpoints:
                for step in checkpoints.steps():
                    checkpoints.verify(step)
        return self.jobs.finish(training, folder, output)

    def _limit(
        self, training: bool, folder: pathlib.Path, output: pathlib.Path, rng: random.Random
    ) -> tuple[str, int | None, str, str]:
        """Lets no file grow beyond a limit."""
        n = int(math.exp(rng.uniform(math.log(30), math.log(50_000))))
        command = self.jobs.training(folder) if training else self.jobs.preparation(folder)
        code = ended(self.jobs.start(command, output, n))
        said = settled(output)
        return f'files of {n} bytes at most', code, said, self._finish(training, folder, output)

    def _late_limit(
        self, training: bool, folder: pathlib.Path, output: pathlib.Path, rng: random.Random
    ) -> tuple[str, int | None, str, str]:
        """The same, from a random moment after the first file on."""
        n, j = int(math.exp(rng.uniform(math.log(30), math.log(50_000)))), self.jobs
        command = j.training(folder) if training else j.preparation(folder)
        process = j.start(command, output)
        appears(folder / 'checkpoints' if training else folder, process)
        seconds = rng.uniform(0, 0.8 * (j.saves if training else j.parts))
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
        with contextlib.suppress(ProcessLookupError):
            resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (n, resource.RLIM_INFINITY))
        code = ended(process)
        said = settled(output)
        description = f'files of {n} bytes at most, {seconds:.2f} s after the first'
        return description, code, said, self._finish(training, folder, output)

    def _small_disk(
        self, training: bool, folder: pathlib.Path, output: pathlib.Path, rng: random.Random
    ) -> tuple[str, int | None, str, str]:
        """Runs on a small disk, which then grows; of a namespace, so that it ends with it."""
        pages = int(math.exp(rng.uniform(math.log(4), math.log(900 if training else 300))))
        disk, result = folder.with_name(folder.name + '-disk'), folder
        disk.mkdir()
        inside = disk / 'out'
        command = self.jobs.training(inside) if training else self.jobs.preparation(inside)
        script = (
            f'mount -t tmpfs -o size={4 * pages}k attack {disk} || exit 9\n'
            f'{shlex.join(command)}\ncode=$?\n'
            f'mount -o remount,size=200m {disk} || exit 9\n'
            f'echo AGAIN $code\n{shlex.join(command)}\ncode=$?\n'
            f'cp -r {inside} {result}\nexit $code\n'
        )
        code = ended(self.jobs.start(['unshare', '-Urm', 'sh', '-c', script], output))
        disk.rmdir()
        description = f'a disk of {4 * pages} KiB'
        first, again, second = settled(output).partition('AGAIN ')
        if code != 0 or not again:
            return description, code, first + again + second, 'the same command again failed'
        problem = second if 'Traceback' in second else self.jobs.compare(training, result)
        return description, int(second.split()[0]), first, problem
