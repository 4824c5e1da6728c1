"""The processes of a run compare what has to be the same on all of them, before they compile.

Processes that differ would train on with replicas that drift apart, or wait for each other in
collectives that are not the same.
"""

import collections
import functools
import hashlib
import json
import os
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from config import ConfigError, flat
from runtime.workdir import ROOT, VARIABLES, git_state, versions

GIT = 'git revision'
LONGEST = 60  # characters of a value that a message shows
MOST = 8  # differences of a process that a message lists


@functools.cache
def code_facts() -> dict[str, str]:
    """Returns the start of the sha256 of each Python file of the project, and the git revision.

    The files are those of the top folder and of its packages.
    """
    facts = {}
    for folder, inside, files in os.walk(ROOT):
        inside[:] = [x for x in inside if os.path.exists(os.path.join(folder, x, '__init__.py'))]
        for name in files:
            if name.endswith('.py') and not name.startswith('.'):  # editors' lock files
                path = os.path.join(folder, name)
                try:
                    with open(path, 'rb') as f:
                        digest = hashlib.sha256(f.read()).hexdigest()
                except OSError:
                    digest = 'unreadable'
                facts[f'the code of {os.path.relpath(path, ROOT)}'] = digest[:12]
    if revision := git_state(ROOT).get('revision'):
        facts[GIT] = revision
    return facts


def start_facts(config: ConfigDict | None, **arguments: Any) -> dict[str, Any]:
    """Returns all that the processes of a run have in common before they open its data.

    `arguments` are those of the command that are not part of the config. A process alone has nobody
    to compare with: {}.
    """
    if jax.process_count() == 1:
        return {}
    facts = flat(config.to_dict()) if config else {}
    facts |= {f'--{name}': x for name, x in arguments.items()}
    facts |= {f'version of {name}': version for name, version in versions().items()}
    facts |= {name: os.environ[name] for name in VARIABLES if name in os.environ}
    return facts | code_facts()


def check_same(facts: Mapping[str, Any]) -> None:
    """Raises ConfigError on all processes if one's facts, JSON values by name, are not process 0's.

    All processes have to call this, on the main thread. What is sent has the same size everywhere:
    first a digest, and if those differ the facts themselves, padded to the longest.
    """
    if jax.process_count() == 1:
        return
    check_devices()
    content = json.dumps(facts, sort_keys=True, default=str).encode()
    digests = gather(np.frombuffer(hashlib.sha256(content).digest(), np.uint8))
    if (digests == digests[0]).all():
        return
    lengths = gather(np.array([len(content)], np.int32))[:, 0]
    padded = np.frombuffer(content.ljust(lengths.max(), b' '), np.uint8)
    every = [json.loads(row.tobytes()) for row in gather(padded)]
    found = [said for i, facts in enumerate(every) if (said := differing(i, facts, every[0]))]
    if found:
        found.append('all processes of a run are given the same command, code and data')
        raise ConfigError('\n'.join(found))


def check_devices() -> None:
    """Raises ConfigError, on all processes alike, if they have not equally many devices."""
    counts = collections.Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:
        listed = ', '.join(f'process {i} has {n}' for i, n in sorted(counts.items()))
        raise ConfigError(
            f'the processes have different numbers of devices: {listed}; use as many on each, and '
            f'the same --cpu_devices'
        )


def gather(x: np.ndarray) -> np.ndarray:
    """Returns the arrays of all processes, [processes, *shape]."""
    return np.asarray(multihost_utils.process_allgather(x)).reshape(-1, *x.shape)


def differing(process: int, there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """Returns a line with the names, and the short values, in which a process differs from 0.

    '' if it does not: code without git counts as that of any revision.
    """
    said = []
    names = there.keys() | here.keys()
    if GIT in names and not (GIT in there and GIT in here):
        names -= {GIT}
    for name in sorted(names):
        a, b = (repr(facts[name]) if name in facts else 'none' for facts in (there, here))
        if a != b:
            shown = max(len(a), len(b)) <= LONGEST and not name.startswith('the code of')
            said.append(f'{name}: {a} there, {b} on process 0' if shown else name)
    if not said:
        return ''
    more = f', and {len(said) - MOST} more' if len(said) > MOST else ''
    return f'process {process} differs from process 0 in: {", ".join(said[:MOST])}{more}'
