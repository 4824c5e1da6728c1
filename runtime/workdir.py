"""The folder of a run: its files by name, and the ones that are written as a whole.

checkpoints/      checkpoint.py's, a folder per step
config.json       the config of the last start
record.json       an entry per start: config, mesh, devices, cores, versions, git revision
metrics.jsonl     an object per logged step
eval.jsonl        an object per evaluated checkpoint
tokenizer.json    name and fingerprint of the vocabulary
lease.json        the process that is writing here, while it does
profile/          traces, with --profile
metrics.png       curves, by --plot
tensorboard/      event files, and wandb.json the id of the run there, with log.writers
*.damaged-N       such a file as it was when it could not be read any more
metrics.jsonl.before-N   that of a run that began anew, since there was no checkpoint
"""

import contextlib
import datetime
import glob
import importlib.metadata
import itertools
import json
import math
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import tiktoken
from jax.sharding import Mesh
from ml_collections import ConfigDict

from config import ConfigError, flat
from machine.processes import all_processes, from_process_0
from storage.stores import Lines, local_folder, open_store, store_errors, write_text
from tokenizer import fingerprint, get_encoding, same_ids

CHECKPOINTS = 'checkpoints'
CONFIG = 'config.json'
RECORD = 'record.json'
METRICS = 'metrics.jsonl'
EVALUATIONS = 'eval.jsonl'
TOKENIZER = 'tokenizer.json'
LEASE = 'lease.json'
PROFILE = 'profile'
PICTURE = 'metrics.png'
WANDB = 'wandb.json'  # the run's id there
TENSORBOARD = 'tensorboard'

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))  # of the project
RUNS = 'runs'  # the folder of runs that were given no workdir
RECENT = 20  # of them that are looked at for an unfinished one

PACKAGES = (
    'jax', 'jaxlib', 'libtpu', 'numpy', 'tensorstore', 'tiktoken', 'tokenizers', 'ml_collections',
)  # fmt: skip
# Variables that change the compiled program, or its numbers.
VARIABLES = (
    'XLA_FLAGS', 'LIBTPU_INIT_ARGS', 'NVIDIA_TF32_OVERRIDE', 'JAX_DEFAULT_MATMUL_PRECISION',
    'JAX_ENABLE_X64', 'JAX_DEFAULT_PRNG_IMPL', 'JAX_THREEFRY_PARTITIONABLE',
)  # fmt: skip

# The JSON files with one object, and fields without which they are of no use.
OBJECTS = {
    CONFIG: {'steps': int, 'batch_size': int, 'seq_len': int},
    TOKENIZER: {'name': str, 'fingerprint': str},
    WANDB: {'id': str},
}

# ---------------------------------------------------------------------------------------------
# The folder
# ---------------------------------------------------------------------------------------------


def new_workdir() -> str:
    """Returns a folder named after the time, the same on all processes."""
    now = time.localtime(from_process_0(int(time.time())))
    return time.strftime(f'{RUNS}/%Y%m%d-%H%M%S', now)


def check_shared(workdir: str) -> None:
    """Raises ConfigError if the processes do not see the same folder; all have to call this.

    A URL is the same everywhere.
    """
    if jax.process_count() == 1 or '://' in workdir:
        return
    probe = os.path.join(workdir, f'.seen-by-all-{from_process_0(time.monotonic_ns() % 2**31)}')
    error = None
    if jax.process_index() == 0:
        try:
            os.makedirs(workdir, exist_ok=True)
            with open(probe, 'w'):
                pass
        except OSError as e:
            error = e
    if not all_processes(error is None):
        cause = error or 'see the message of process 0'
        raise ConfigError(f'--workdir={workdir} cannot be written: {cause}; use another one')
    seen = all_processes(os.path.exists(probe))
    if jax.process_index() == 0:
        os.remove(probe)
    if not seen:
        raise ConfigError(
            f'--workdir={workdir} is not the same folder on all hosts; use '
            f'a file system that they share, or a URL (gs://, s3://)'
        )


def unfinished_run(config: ConfigDict) -> tuple[str, int] | None:
    """Returns the newest workdir in RUNS of the very same config that is not complete, and its
    newest step; None if there is none among the last few."""
    wanted = json.loads(config.to_json())
    for file in sorted(glob.glob(f'{RUNS}/*/{CONFIG}'), reverse=True)[:RECENT]:
        workdir = os.path.dirname(file)
        try:
            same = read_json(file) == wanted
        except (ConfigError, OSError):
            continue
        commits = glob.glob(f'{glob.escape(workdir)}/{CHECKPOINTS}/*/COMMIT')
        steps = [os.path.basename(os.path.dirname(commit)) for commit in commits]
        step = max((int(step) for step in steps if step.isdecimal()), default=0)
        if same and 0 < step < config.steps:
            return workdir, step
    return None


# ---------------------------------------------------------------------------------------------
# Files that may be damaged
# ---------------------------------------------------------------------------------------------


def _read(path: str, byte_range: slice = slice(None)) -> bytes | None:
    """Returns the content of a file, or a range of it, or None if there is no such file."""
    folder, name = os.path.split(path)
    with store_errors(f'{path} cannot be read'):
        found = open_store(folder or '.').read(name, byte_range=byte_range).result()
    return found.value if found.state == 'value' else None


def exists(path: str) -> bool:
    """Returns True if there is such a file, damaged or not; reads nothing of it."""
    return _read(path, slice(0, 0)) is not None


def read_json(path: str) -> Any:
    """Returns the content of a JSON file of the workdir, or None if there is no such file.

    Raises ConfigError, with file, line and reason, if it is damaged.
    """
    content = _read(path)
    if content is None:
        return None
    name = os.path.basename(path)
    try:
        value = json.loads(content.decode())
        if name == RECORD and not (isinstance(value, list) and all_objects(value)):
            raise ValueError('it is no list of objects')
        for field, kind in OBJECTS.get(name, {}).items():
            if not isinstance(value, dict) or not isinstance(value.get(field), kind):
                raise ValueError(f'it has no {field!r}')
    except ValueError as error:
        line, reason = _place(error, content)
        raise ConfigError(f'{path} is damaged in line {line}: {reason}') from error
    return value


def all_objects(values: Iterable[Any]) -> bool:
    """Returns True if all values are JSON objects."""
    return all(isinstance(value, dict) for value in values)


def _place(error: ValueError, content: bytes) -> tuple[int, str]:
    """Returns the line, counted from 1, and the reason of an error of decoding or of JSON."""
    if isinstance(error, json.JSONDecodeError):
        return error.lineno, error.msg
    if isinstance(error, UnicodeDecodeError):
        return content.count(b'\n', 0, error.start) + 1, 'it holds bytes that are no UTF-8'
    return 1, str(error)


def set_aside(path: str, why: str = 'damaged') -> str:
    """Moves a file to path.WHY-N, with the first N that is free; returns that path."""
    if not (local := local_folder(path)):
        aside = copy_aside(path, why)
        folder, name = os.path.split(path)
        with store_errors(f'{path} cannot be set aside'):
            open_store(folder).write(name, None).result()
        return aside
    aside = _free(path, why)
    with file_errors(path):
        os.rename(local, local_folder(aside))
    return aside


def copy_aside(path: str, why: str = 'damaged') -> str:
    """Copies a file that is about to be replaced as a whole to path.WHY-N; returns that path.

    A kill or a full disk then leaves the file as it was. A link, where there are such, needs no
    room.
    """
    aside = _free(path, why)
    if local := local_folder(path):
        try:
            os.link(local, local_folder(aside))
        except OSError:
            with file_errors(path):
                shutil.copy2(local, local_folder(aside))
        return aside
    folder, name = os.path.split(aside)
    with store_errors(f'{path} cannot be set aside'):
        open_store(folder).write(name, _read(path)).result()
    return aside


@contextlib.contextmanager
def file_errors(path: str) -> Iterator[None]:
    """Raises the operating system's errors as ConfigError: the file cannot be set aside."""
    try:
        yield
    except OSError as error:
        raise ConfigError(
            f'{path} cannot be set aside: {error}; make room or mend the access'
        ) from error


def _free(path: str, why: str) -> str:
    """Returns path.WHY-N with the first N, from 1, that no file has."""
    for n in itertools.count(1):
        if not exists(f'{path}.{why}-{n}'):
            return f'{path}.{why}-{n}'


class Line(NamedTuple):
    """A line of metrics.jsonl or eval.jsonl."""

    number: int  # from 1
    content: bytes  # with its end
    records: list[dict[str, Any]]  # one, or what can be read of a damaged line
    problem: str  # '' if it is not damaged


def _lines(content: bytes) -> Iterator[Line]:
    """Yields the lines, but for empty ones and a last one without its end: a kill cut it short, or
    a run is writing it."""
    for number, line in enumerate(re.findall(rb'[^\n]*\n', content), 1):
        if not line.strip():
            continue
        try:
            record, problem = json.loads(line.decode()), ''
            if not isinstance(record, dict) or not isinstance(record.get('step'), int):
                record, problem = None, 'it has no step'
        except ValueError as error:
            record, problem = None, _place(error, line)[1]
        yield Line(number, line, [record] if record else _salvaged(line), problem)


def _salvaged(line: bytes) -> list[dict[str, Any]]:
    """Returns the records that are whole in a damaged line, whose newline may have been lost."""
    found = []
    for piece in re.split(rb'(?=\{"step": )', line):
        with contextlib.suppress(ValueError):
            record, _ = json.JSONDecoder().raw_decode(piece.decode())
            if isinstance(record, dict) and isinstance(record.get('step'), int):
                found.append(record)
    return found


def read_records(path: str) -> tuple[list[dict[str, Any]], list[str]]:
    """Returns the records of metrics.jsonl or eval.jsonl, and a complaint per damaged line.

    Both are empty if there is no such file.
    """
    lines = list(_lines(_read(path) or b''))
    complaints = [f'{path}, line {x.number}: {x.problem}' for x in lines if x.problem]
    return [record for line in lines for record in line.records], complaints


def keep_records(path: str, step: float = math.inf) -> str:
    """Drops the records beyond the step, damaged lines, and a last line that a kill cut short.

    Returns a line to say if lines were damaged, else ''; then the file as it was is set aside.
    Nothing is written if there is nothing to drop.
    """
    content = _read(path)
    if not content:
        return ''
    lines = list(_lines(content))
    damaged = [line for line in lines if line.problem]
    kept = b''.join(
        json.dumps(record).encode() + b'\n' if line.problem else line.content
        for line in lines
        for record in line.records
        if record['step'] <= step
    )
    said, local = '', local_folder(path)
    if damaged:
        numbers = ', '.join(str(line.number) for line in damaged[:5])
        more = f' and {len(damaged) - 5} more' if len(damaged) > 5 else ''
        said = (
            f'{path} is damaged in line {numbers}{more} ({damaged[0].problem}): what can be read '
            f'is kept, and the file as it was is {copy_aside(path)}'
        )
    if not damaged and local and content.startswith(kept):
        if len(kept) < len(content):
            os.truncate(local, len(kept))  # which needs no room on a disk
    elif kept != content:
        write_text(path, kept.decode())
    return said


def mend(workdir: str, step: int) -> list[str]:
    """Makes the files of a run that goes on after `step` readable; returns lines to say.

    A damaged file is set aside, and what can be read of it kept. The metrics of a run that left no
    checkpoint, or whose checkpoints were removed, are set aside whole. For the process that writes.
    """
    said = []
    for name in (*OBJECTS, RECORD):
        path = os.path.join(workdir, name)
        try:
            read_json(path)
        except ConfigError as error:
            kept = _entries(_read(path)) if name == RECORD else []
            aside = copy_aside(path) if kept else set_aside(path)
            said.append(f'{error}; it is set aside as {aside}')
            if kept:
                write_text(path, json.dumps(kept, indent=1) + '\n')
                said[-1] += f', {len(kept)} entries can be read'
    metrics = os.path.join(workdir, METRICS)
    if step == 0 and read_records(metrics)[0]:
        said.append(f'the {METRICS} of an earlier run is now {set_aside(metrics, "before")}')
    return said + [line for line in [keep_records(metrics, step)] if line]


def _entries(content: bytes) -> list[dict[str, Any]]:
    """Returns the entries of a damaged record.json that can be read."""
    found = []
    for piece in re.split(rb'(?m)^ (?=\{)', content):  # as `add_entry` indents them
        with contextlib.suppress(ValueError):
            found.append(json.loads(piece.decode().strip().rstrip(',]').rstrip()))
    return [entry for entry in found if isinstance(entry, dict)]


# ---------------------------------------------------------------------------------------------
# record.json
# ---------------------------------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Returns the versions of Python and of the installed packages that numbers can depend on."""
    found = {'python': platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_state(folder: str) -> dict[str, Any]:
    """Returns {'revision', 'dirty'} of the git checkout with this root; {} for another folder.

    Files that git does not track do not make it dirty.
    """

    def git(*arguments: str) -> str:
        command = ['git', '-C', folder, *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        root = git('rev-parse', '--show-toplevel')
        if os.path.realpath(root) != os.path.realpath(folder):
            return {}  # another project's checkout, in which this code lies
        dirty = bool(git('status', '--porcelain', '--untracked-files=no'))
        return {'revision': git('rev-parse', 'HEAD'), 'dirty': dirty}
    except (OSError, subprocess.CalledProcessError):  # no git, or no checkout
        return {}


def cores() -> int:
    """Returns the number of cores that this process may use."""
    affinity = getattr(os, 'sched_getaffinity', None)  # Linux has it
    return len(affinity(0)) if affinity else os.cpu_count() or 1


# The parts of an entry, beside the config, that the last bits of a run's numbers depend on. XLA:CPU
# cuts sums and weight gradients by the cores that it finds, as it runs.
BITS = ('cores', 'processes', 'devices.kinds', 'devices.platform', 'devices.count', 'versions.',
        'environment.', 'git.revision')  # fmt: skip


def changed_start(workdir: str, entry: Mapping[str, Any]) -> str:
    """Returns a line on what an entry has otherwise than the newest of record.json, of all that
    the last bits of numbers depend on; '' if there is nothing, or no entry."""
    entries = read_json(os.path.join(workdir, RECORD))
    if not entries:
        return ''
    old, new = flat(entries[-1]), flat(json.loads(json.dumps(entry)))
    on_cpu = old.get('devices.platform') == new['devices.platform'] == 'cpu'
    names = [n for n in {**old, **new} if n.startswith(BITS) and (on_cpu or n != 'cores')]
    if 'cores' not in old:  # the entry of an older version
        names = [n for n in names if n != 'cores']
    changed = [
        f'{name} {old.get(name, "none")} -> {new.get(name, "none")}'
        for name in names
        if old.get(name) != new.get(name)
    ]
    if not changed:
        return ''
    said = ' · '.join(changed)
    return f'from here on numbers may differ in their last bits from an unbroken run: {said}'


def start_entry(config: ConfigDict, mesh: Mesh, start: int) -> dict[str, Any]:
    """Returns the entry of record.json for a run that goes on from step `start`.

    Two runs whose entries agree in all but the time give the same numbers, bit for bit, on the same
    kind of machine: see docs/silent_bugs.md.
    """
    devices = mesh.devices.flat
    git = git_state(ROOT)
    return {
        'time': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
        'from_step': start,
        'mesh': dict(mesh.shape),
        'devices': {
            'kinds': sorted({d.device_kind for d in devices}),
            'platform': devices[0].platform,
            'count': mesh.size,
            'ids': [d.id for d in devices],  # in the mesh's order
        },
        'processes': jax.process_count(),
        'cores': cores(),
        'versions': versions(),
        'environment': {name: os.environ[name] for name in VARIABLES if name in os.environ},
        **({'git': git} if git else {}),
        'config': config.to_dict(),
    }


def add_entry(workdir: str, entry: dict[str, Any]) -> None:
    """Appends to record.json, which is replaced as a whole."""
    path = os.path.join(workdir, RECORD)
    entries = read_json(path) or []
    write_text(path, json.dumps([*entries, entry], indent=1) + '\n')


# ---------------------------------------------------------------------------------------------
# The other files
# ---------------------------------------------------------------------------------------------


def tokenizer_record(encoding: tiktoken.Encoding) -> str:
    """Returns the content of tokenizer.json: a name, and the fingerprint to check it by."""
    return json.dumps({'name': encoding.name, 'fingerprint': fingerprint(encoding)}) + '\n'


def same_vocabulary(a: Mapping[str, str], b: Mapping[str, str]) -> bool:
    """Returns True if ids mean the same by two records {'name', 'fingerprint'}.

    So they do in a tokenizer.json and the .tiktoken file that it was converted to. These are read,
    and count if both are there and are what they were.
    """
    if a['fingerprint'] == b['fingerprint']:
        return True
    if sum(record['name'].endswith('.json') for record in (a, b)) != 1:
        return False
    try:
        encodings = [get_encoding(record['name']) for record in (a, b)]
    except ConfigError:
        return False
    found = [fingerprint(encoding) for encoding in encodings]
    return found == [a['fingerprint'], b['fingerprint']] and same_ids(*encodings)


def append_evaluation(
    workdir: str, step: int, result: dict[str, float], mesh: Mesh, averaged: bool = False
) -> str:
    """Adds a line to eval.jsonl, about a step's parameters or averaged ones, and returns its path.

    A file of its own, since a run may be writing the others.
    """
    path = os.path.join(workdir, EVALUATIONS)
    record = {
        'step': step,
        **({'averaged': True} if averaged else {}),
        **result,
        'time': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
        'mesh': dict(mesh.shape),
    }
    if jax.process_index() == 0:
        lines = Lines(path)
        lines.add(json.dumps(record))
        lines.flush()
    return path
