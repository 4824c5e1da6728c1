"""Training and preparation as commands, how they end undisturbed, and their files, for
tests/attack.py."""

import contextlib
import json
import pathlib
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Collection, Iterator
from typing import Any

from common_data import ROOT, contents, make_corpus
from common_runs import MEASURED

from corpus.files import find_files
from corpus.prepare import Job, prepare

END_SECONDS = 120  # for a process that was told to end, or is to run to its end


def prepared_tokens(folder: pathlib.Path) -> pathlib.Path:
    """Prepares a small corpus below `folder`; returns the folder of its tokens."""
    text, tokens = folder / 'text', folder / 'tokens'
    text.mkdir()
    make_corpus(text)
    prepare(find_files([f'{text}/**/*']), Job(str(tokens), 'bytes', 0.25), part_bytes=20_000)
    return tokens


def steps_of(text: str) -> dict[int, list[dict[str, Any]]]:
    """Returns the records of metrics.jsonl by step, without what was measured on the machine."""
    found: dict[int, list[dict[str, Any]]] = {}
    for line in text.splitlines():
        record = {k: v for k, v in json.loads(line).items() if k not in MEASURED}
        found.setdefault(record['step'], []).append(record)
    return found


def step_files(workdir: pathlib.Path, step: int) -> dict[str, bytes]:
    """Returns the files of a saved state, without those that name code and versions."""
    files = contents(workdir / f'checkpoints/{step}/arrays')
    return files or {'there are no files': b''}


class Jobs:
    """A training run and a preparation as commands, and how they end undisturbed."""

    STEPS = 24

    def __init__(self, folder: pathlib.Path):
        self.folder, self.runs = folder, 0
        self.tokens = prepared_tokens(folder)
        self.text = folder / 'text'
        started = time.monotonic()
        process = self.start(self.training(folder / 'whole'), folder / 'whole.txt')
        appears(folder / 'whole/checkpoints', process)
        self.before_saves = time.monotonic() - started
        self._succeed(process, folder / 'whole.txt')
        self.saves = time.monotonic() - started - self.before_saves  # seconds from the first on
        self.state = step_files(folder / 'whole', self.STEPS)
        self.metrics = steps_of((folder / 'whole/metrics.jsonl').read_text())
        started = time.monotonic()
        process = self.start(self.preparation(folder / 'prepared'), folder / 'prepared.txt')
        appears(folder / 'prepared', process)
        self.before_parts = time.monotonic() - started
        self._succeed(process, folder / 'prepared.txt')
        self.parts = time.monotonic() - started - self.before_parts
        self.prepared = contents(folder / 'prepared')

    def training(self, workdir: pathlib.Path) -> list[str]:
        fields = {
            'steps': self.STEPS, 'batch_size': 16, 'seq_len': 32, 'model.vocab_size': 264,
            'model.d_model': 32, 'model.n_layers': 2, 'model.d_ff': 48, 'model.n_heads': 4,
            'model.n_kv_heads': 2, 'model.head_dim': 8, 'model.attention_block': 16,
            'optimizer.warmup_steps': 2, 'eval.every': 12, 'eval.batches': 1, 'log.every': 1,
            'checkpoint.every': 2, 'peak_flops': 1e12, 'data.path': self.tokens,
            'compilation_cache': self.folder / 'compiled',
        }  # fmt: skip
        flags = [f'--config.{name}={value}' for name, value in fields.items()]
        command = [sys.executable, 'train.py', '--config=configs/tiny_dense.py', '--cpu_devices=1']
        return [*command, f'--workdir={workdir}', *flags]

    def preparation(self, output: pathlib.Path) -> list[str]:
        """Returns a preparation in many parts; of data.py's own a small corpus fills one."""
        program = [
            'from corpus.files import find_files',
            'from corpus.prepare import Job, prepare',
            'from machine.command import messages',
            'with messages():',
            f'    files = find_files([{f"{self.text}/**/*"!r}])',
            f'    prepare(files, Job({str(output)!r}, "bytes", 0.25), 1, part_bytes=500)',
        ]
        return [sys.executable, '-c', '\n'.join(program)]

    def start(
        self,
        command: list[str],
        output: pathlib.Path,
        file_limit: int = 0,
        environment: dict[str, str] | None = None,
    ) -> subprocess.Popen:
        """Starts a command, which may write no file larger than `file_limit` bytes, if given."""

        def limited() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))

        # Through a pipe, since the limit would hold for the output, too.
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            preexec_fn=limited if file_limit else None, env=environment,
        )  # fmt: skip
        with open(output, 'wb') as f:
            subprocess.Popen(['cat'], stdin=process.stdout, stdout=f)
        process.stdout.close()
        return process

    def _succeed(self, process: subprocess.Popen, output: pathlib.Path) -> None:
        if process.wait(END_SECONDS) != 0:
            raise RuntimeError(output.read_text())

    @contextlib.contextmanager
    def place(self) -> Iterator[tuple[pathlib.Path, pathlib.Path]]:
        """Yields a folder and a file of output that are not there yet, and removes both."""
        self.runs += 1
        folder, output = self.folder / f'fault-{self.runs}', self.folder / f'{self.runs}.txt'
        try:
            yield folder, output
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            output.unlink(missing_ok=True)

    def compare(
        self, training: bool, folder: pathlib.Path, stopped_at: Collection[int] = ()
    ) -> str:
        """Returns how the files differ from those of the undisturbed command, '' if not at all.

        A run that a signal asked to stop leaves out the evaluation of the step that it stops at.
        """
        if not training:
            return differences('files', contents(folder), self.prepared)
        if step_files(folder, self.STEPS) != self.state:
            return 'the last state differs'
        found = steps_of((folder / 'metrics.jsonl').read_text())
        for step in stopped_at:
            found[step] = found.get(step) or []
            if len(found[step]) == 1:
                found[step] += [x for x in self.metrics[step] if 'eval_loss' in x]
        return differences('records of steps', found, self.metrics)

    def finish(
        self,
        training: bool,
        folder: pathlib.Path,
        output: pathlib.Path,
        stopped_at: Collection[int] = (),
    ) -> str:
        """Gives the command again; returns what is wrong at its end, '' if nothing is."""
        command = self.training(folder) if training else self.preparation(folder)
        code = ended(self.start(command, output))
        said = settled(output)
        if code != 0 or 'Traceback' in said:
            return f'the same command again ended with {code}:\n{said}'
        return self.compare(training, folder, stopped_at)


def differences(kind: str, found: dict, expected: dict) -> str:
    """Names the keys whose values differ, '' if there are none."""
    other = {n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n)}
    return f'other {kind} {sorted(other)}' if other else ''


def appears(path: pathlib.Path, process: subprocess.Popen) -> None:
    """Returns once the path is there, or the process has ended."""
    while not path.exists() and process.poll() is None:
        time.sleep(0.005)


def ended(process: subprocess.Popen) -> int | None:
    """Returns the exit code, or None if the process did not end in time."""
    try:
        return process.wait(END_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return None


def settled(output: pathlib.Path) -> str:
    """Returns the output of a process that has ended, once it is all there."""
    size = -1
    while size != (size := output.stat().st_size):
        time.sleep(0.05)
    return output.read_text(errors='replace')
