"""The folder of a run: its files by name, and the ones that are written as a whole.

checkpoints/      checkpoint.py's, a folder per step
config.json       the config of the last start
record.json       an entry per start: config, mesh, devices, versions, git revision
metrics.jsonl     an object per logged step
eval.jsonl        an object per evaluated checkpoint
tokenizer.json    name and fingerprint of the vocabulary
profile/          traces, with --profile
metrics.png       curves, by --plot
tensorboard/      event files, and wandb.json the id of the run there, with log.writers
"""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
import time
from typing import Any

import jax
import tiktoken
from jax.sharding import Mesh
from ml_collections import ConfigDict

from config import ConfigError
from machine.processes import all_processes, from_process_0
from storage.stores import Lines, read_text, write_text
from tokenizer import fingerprint

CHECKPOINTS = 'checkpoints'
CONFIG = 'config.json'
RECORD = 'record.json'
METRICS = 'metrics.jsonl'
EVALUATIONS = 'eval.jsonl'
TOKENIZER = 'tokenizer.json'
PROFILE = 'profile'
PICTURE = 'metrics.png'
WANDB = 'wandb.json'  # the run's id there
TENSORBOARD = 'tensorboard'

RUNS = 'runs'  # the folder of runs that were given no workdir

PACKAGES = ('jax', 'jaxlib', 'libtpu', 'numpy', 'tensorstore', 'tiktoken', 'ml_collections')
VARIABLES = ('XLA_FLAGS', 'LIBTPU_INIT_ARGS')  # that change the compiled program

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
    if jax.process_index() == 0:
        os.makedirs(workdir, exist_ok=True)
        with open(probe, 'w'):
            pass
    all_processes(True)  # it is written
    seen = all_processes(os.path.exists(probe))
    if jax.process_index() == 0:
        os.remove(probe)
    if not seen:
        raise ConfigError(
            f'the config cannot run: --workdir={workdir} is not the same folder on all hosts; use '
            f'a file system that they share, or a URL (gs://, s3://)'
        )


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


def start_entry(config: ConfigDict, mesh: Mesh, start: int) -> dict[str, Any]:
    """Returns the entry of record.json for a run that goes on from step `start`.

    Two runs whose entries agree in all but the time give the same numbers, bit for bit, on the same
    kind of machine.
    """
    devices = mesh.devices.flat
    git = git_state(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
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
        'versions': versions(),
        'environment': {name: os.environ[name] for name in VARIABLES if name in os.environ},
        **({'git': git} if git else {}),
        'config': config.to_dict(),
    }


def add_entry(workdir: str, entry: dict[str, Any]) -> None:
    """Appends to record.json, which is replaced as a whole."""
    path = os.path.join(workdir, RECORD)
    entries = json.loads(read_text(path) or '[]')
    write_text(path, json.dumps([*entries, entry], indent=1) + '\n')


# ---------------------------------------------------------------------------------------------
# The other files
# ---------------------------------------------------------------------------------------------


def tokenizer_record(encoding: tiktoken.Encoding) -> str:
    """Returns the content of tokenizer.json: a name, and the fingerprint to check it by."""
    return json.dumps({'name': encoding.name, 'fingerprint': fingerprint(encoding)}) + '\n'


def keep_records(path: str, step: int) -> None:
    """Drops the lines of metrics.jsonl beyond the step, and one that a kill cut short."""
    text = read_text(path)
    if text is None:
        return
    whole = [line for line in text.splitlines(keepends=True) if line.endswith('}\n')]
    write_text(path, ''.join(line for line in whole if json.loads(line)['step'] <= step))


def append_evaluation(workdir: str, step: int, result: dict[str, float], mesh: Mesh) -> str:
    """Adds a line to eval.jsonl, and returns its path.

    A file of its own, since a run may be writing the others.
    """
    path = os.path.join(workdir, EVALUATIONS)
    record = {
        'step': step,
        **result,
        'time': datetime.datetime.now(datetime.UTC).isoformat(timespec='seconds'),
        'mesh': dict(mesh.shape),
    }
    if jax.process_index() == 0:
        lines = Lines(path)
        lines.add(json.dumps(record))
        lines.flush()
    return path
