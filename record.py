"""With what a run was started: record.json in the workdir, one entry a start.

Two runs whose entries agree in all but the time give the same numbers, bit for bit, on the same
kind of machine.
"""

import datetime
import importlib.metadata
import json
import os
import platform
import subprocess
from typing import Any

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from stores import read_text, write_text

RECORD = 'record.json'
PACKAGES = ('jax', 'jaxlib', 'libtpu', 'numpy', 'tensorstore', 'tiktoken', 'ml_collections')
VARIABLES = ('XLA_FLAGS', 'LIBTPU_INIT_ARGS')  # that change what is compiled


def versions() -> dict[str, str]:
    """Of Python and of the packages that numbers can depend on, as far as they are installed."""
    found = {'python': platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def git_state(folder: str) -> dict[str, Any]:
    """{'revision', 'dirty'} of the git checkout whose root this folder is; else {}.

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
    """What determines the numbers of a run that goes on from step `start`."""
    devices = mesh.devices.flat
    git = git_state(os.path.dirname(os.path.abspath(__file__)))
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
    """Appends to record.json, which is always whole."""
    path = os.path.join(workdir, RECORD)
    entries = json.loads(read_text(path) or '[]')
    write_text(path, json.dumps([*entries, entry], indent=1) + '\n')
