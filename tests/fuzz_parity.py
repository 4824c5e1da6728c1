"""Draws legal configs at random, and compares each on its mesh with one device.

    python tests/fuzz_parity.py --seconds=600 --seed=1
    python tests/fuzz_parity.py --case='{"mesh.tp": 2}'      # one config again

A config is a base, a single dense layer on one device, and what differs from it: architecture,
kinds of layers, options, mesh of up to eight simulated devices, schedule, microbatches, optimizer.
It is compared with one device that has no schedule, no rematerialization and one microbatch, in
float32: losses, gradients, their norms (and by them clipping and skipped steps), routers' loads,
parameters and averages after three steps, replicas bit by bit. The state after two of them goes
through a checkpoint: the third step must then give the same bits on the mesh, and the same numbers
on one device.

A config that falls is shrunk, one deviation at a time, and printed with the command that repeats
it; then this ends with 1. It is counted as ill-conditioned instead if one device alone moves as
far when its parameters move by a rounding error: where two experts are equally good, or a
gradient is zero but for rounding. A seed gives the same configs again.
"""

import argparse
import collections
import functools
import gc
import itertools
import json
import os
import shutil
import sys
import tempfile
import threading
import time
import traceback
import zlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

sys.path.insert(1, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

import jax
import numpy as np
from common import assert_replicas_identical, set_up
from common_flags import set_flags
from common_parity import STEPS, distances, take
from fuzz_draws import MOST_DEVICES, Case, alone, config_of, draw_cases, legal
from jax.sharding import NamedSharding
from ml_collections import ConfigDict

import parallel
from checkpoint import Checkpointer
from machine.processes import choose_platform
from parallel import P, Param, Tree, map_params
from runtime.config_checks import validate
from runtime.resume import restore_state
from train_step import Setup, abstract_state, init_numbers, make_train_step

FAR = 1e-4  # of a leaf's norm: deep layers amplify roundings; faults are larger
JITTER, DRAWS = 3e-7, 6  # relative, of parameters; how often
AMPLIFIED = 10.0  # a mesh may be that many times as far off as a jitter is
HANGS, IDLE = 600, 120  # seconds of a config, the last ones without using a core
SHRINKING = 300  # seconds of it at most

# ---------------------------------------------------------------------------------------------
# Compared
# ---------------------------------------------------------------------------------------------


class Program(NamedTuple):
    """A config's compiled step."""

    s: Setup
    step: Callable[[Tree, jax.Array], tuple[Tree, Tree]]

    def run(self, state: Tree, first: int = 0, last: int = STEPS) -> dict[str, Tree]:
        """Takes steps, as `common_parity.take`."""
        return take(self.s, self.step, state, first, last, functools.partial(batch_at, self.s))


def program(config: ConfigDict) -> Program:
    """Sets up a config."""
    s = set_up(config)
    return Program(s, make_train_step(s))


def batch_at(s: Setup, step: int, rows: slice, seq_len: int) -> np.ndarray:
    """Draws random tokens, with some targets left out, and not as many in each row."""
    B, V = s.config.batch_size, s.config.model.vocab_size
    rng = np.random.default_rng([s.config.seed, step])
    tokens = rng.integers(0, V, (B, seq_len + 1))
    tokens[np.arange(seq_len + 1) > seq_len // 2 + np.arange(B)[:, None] % seq_len] = -1
    return tokens.astype(np.int32)[rows]


def state_of(s: Setup, jitter: int = 0) -> Tree:
    """Returns a state whose parameters depend on the seed and their names alone: around 1 for
    gains, small for biases, else so large that each layer counts. With a jitter other than 0, each
    number is moved by about a rounding error, another one for each jitter."""

    def value(path: tuple, p: Param) -> jax.Array:
        name = jax.tree_util.keystr(path)
        rng = np.random.default_rng([s.config.seed, zlib.crc32(name.encode())])
        x = rng.standard_normal(p.shape)
        if p.matrix:
            x *= p.shape[-2] ** -0.5
        else:
            x = 0.1 * x + ('norm' in name)
        if jitter:
            x *= 1 + JITTER * np.random.default_rng([jitter, *p.shape]).standard_normal(p.shape)
        return jax.device_put(x.astype(np.float32), NamedSharding(s.mesh, p.spec))

    def zero(p: Param) -> jax.Array:
        return jax.device_put(np.zeros(p.shape, np.float32), NamedSharding(s.mesh, p.spec))

    params = jax.tree_util.tree_map_with_path(value, s.declared, is_leaf=parallel.is_param)
    numbers = jax.device_put(init_numbers(), NamedSharding(s.mesh, P()))
    return {'params': params, 'moments': map_params(zero, s.slots), **numbers}


class Reference(NamedTuple):
    """One device's program, and its numbers."""

    program: Program
    want: dict[str, Tree]


class Comparison:
    """Compares cases with one device; those of one model after each other share its program."""

    def __init__(self, folder: str):
        """Writes checkpoints below `folder`."""
        self._folder, self._name, self._reference = folder, '', None

    def reference(self, case: Case) -> Reference:
        """Returns the single device of a case."""
        name = json.dumps(alone(case), sort_keys=True)
        if name != self._name:
            self._reference = None
            jax.clear_caches()
            gc.collect()
            own = program(config_of(alone(case)))
            want = jax.device_get(own.run(state_of(own.s)))
            self._name, self._reference = name, Reference(own, want)
        return self._reference

    def far(self, case: Case) -> dict[str, float]:
        """Returns what is further from one device than the tolerance, by name; {} for a case that
        agrees. An exception counts as infinitely far."""
        try:
            return self._far(case)
        except Exception as error:
            traceback.print_exc()
            return {f'{type(error).__name__}: {str(error)[:300]}': np.inf}

    def _far(self, case: Case) -> dict[str, float]:
        reference, own = self.reference(case), program(config_of(case))
        two = own.run(state_of(own.s), last=STEPS - 1)
        with Checkpointer(tempfile.mkdtemp(dir=self._folder)) as checkpoints:
            checkpoints.save(STEPS - 1, two['state'])
            checkpoints.wait()
            got = merge(two, own.run(two['state'], first=STEPS - 1))
            again = self._resumed(own, checkpoints)
            moved = self._resumed(reference.program, checkpoints)
        shutil.rmtree(checkpoints.path)
        found = {
            **distances(got, reference.want),
            **{f'resumed, bit by bit: {name}': np.inf for name in unequal(again, got)},
            **{
                f'resumed on one device: {name}': error
                for name, error in distances(merge(two, moved), reference.want).items()
            },
        }
        for part in ('params', 'average'):
            try:
                assert_replicas_identical(got[part])
            except AssertionError as error:
                found[f'replicas: {error}'] = np.inf
        far = {name: error for name, error in found.items() if not error < FAR}
        return self._well_conditioned(far, reference) if far else {}

    def _resumed(self, own: Program, checkpoints: Checkpointer) -> dict[str, Tree]:
        """Takes the last step from the checkpoint."""
        state = restore_state(checkpoints, STEPS - 1, abstract_state(own.s))
        return own.run(state, first=STEPS - 1)

    def _well_conditioned(self, far: dict[str, float], reference: Reference) -> dict[str, float]:
        """Leaves out what one device moves as far by itself, and marks it as such if all is."""
        own = reference.program
        moved: dict[str, float] = collections.defaultdict(float)
        for jitter in range(1, DRAWS + 1):
            for name, x in distances(own.run(state_of(own.s, jitter)), reference.want).items():
                moved[name] = max(moved[name], x)
        bare = {name: name.removeprefix('resumed on one device: ') for name in far}
        left = {name: x for name, x in far.items() if not x < AMPLIFIED * moved[bare[name]]}
        return left or {ILL: max(far.values()), **far}


ILL = 'ill-conditioned'


def merge(two: dict[str, Tree], last: dict[str, Tree]) -> dict[str, Tree]:
    """Returns the numbers of a run whose last step was taken by itself."""
    both = {name: two[name] + last[name] for name in ('losses', 'grad_norms')}
    return {**last, **{name: two[name] for name in ('loss', 'grads', 'router')}, **both}


def unequal(a: dict[str, Tree], b: dict[str, Tree]) -> list[str]:
    """Lists the leaves of two states that are not equal bit by bit."""
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(a['state']), jax.tree.leaves(b['state']), strict=True
    )
    return [
        jax.tree_util.keystr(path)
        for (path, x), y in pairs
        if np.asarray(x).tobytes() != np.asarray(y).tobytes()
    ]


def shrunk(case: Case, falls: Callable[[Case], bool], seconds: float = SHRINKING) -> Case:
    """Returns a case that still falls, and does not if any one of its deviations is taken back: as
    far as the time goes."""
    end, again = time.monotonic() + seconds, True
    while again:
        again = False
        for name in list(case):
            smaller = {n: x for n, x in case.items() if n != name}
            if time.monotonic() > end:
                return case
            if legal(smaller, collections.Counter()) and falls(smaller):
                case, again = smaller, True
    return case


# ---------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------


class Watch:
    """Ends the process, with the case that it is at, if that takes long and does nothing any more:
    collectives that wait for each other take no time of a core, and a busy machine leaves some."""

    def __init__(self) -> None:
        self._case: Case = {}
        self._started = time.monotonic()
        threading.Thread(target=self._watch, daemon=True).start()

    def at(self, case: Case) -> None:
        """Starts to count anew, for this case."""
        self._case, self._started = case, time.monotonic()

    def _watch(self) -> None:
        used = time.process_time()
        while True:
            time.sleep(IDLE)
            before, used = used, time.process_time()
            if time.monotonic() - self._started > HANGS and used - before < 0.001 * IDLE:
                print(f'hangs; again by\n  {command(self._case)}', flush=True)
                os._exit(1)


def command(case: Case) -> str:
    """Returns the command that compares this case alone."""
    return f"python tests/fuzz_parity.py --case='{json.dumps(case)}'"


def report(case: Case, far: dict[str, float], verdict: str = 'fell') -> None:
    """Prints a case that does not agree, with what is furthest off."""
    print(f'{verdict}: {json.dumps(case)}')
    for name, error in sorted(far.items(), key=lambda item: -item[1])[:8]:
        print(f'  {error:9.2e}  {name}')
    print(f'again by\n  {command(case)}', flush=True)


def fuzz(cases: Iterator[Case], seconds: float, most: int, counts: collections.Counter) -> None:
    """Compares cases until the time is over or there are `most`; fills `counts`."""
    folder, watch = tempfile.mkdtemp(prefix='fuzz-'), Watch()
    comparison, started = Comparison(folder), time.monotonic()
    for case in itertools.islice(cases, most):
        if time.monotonic() > started + seconds:
            break
        watch.at(case)
        far = comparison.far(case)
        counts['configs'] += 1
        counts[ILL if ILL in far else 'fell' if far else 'agree'] += 1
        if counts['configs'] % 50 == 0:
            print(summary(counts, time.monotonic() - started), flush=True)
        if ILL in far:
            report(case, far, ILL)
        elif far:
            report(case, far)

            def falls(case: Case) -> bool:
                watch.at(case)
                return bool(comparison.far(case).keys() - {ILL})

            smallest = shrunk(case, falls)
            print('shrunk:')
            report(smallest, comparison.far(smallest))
    shutil.rmtree(folder)


def summary(counts: collections.Counter, seconds: float) -> str:
    """Returns the line of counts."""
    return (
        f'{counts["configs"]} configs in {seconds:.0f} s: {counts["agree"]} agree with one device, '
        f'{counts["fell"]} fell, {counts[ILL]} are {ILL}; {counts["illegal"]} draws were illegal'
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('--seconds', type=float, default=60, help='after which no config starts')
    parser.add_argument('--seed', type=int, default=0, help='that all configs follow from')
    parser.add_argument('--configs', type=int, help='the most configs; else as the time goes')
    parser.add_argument('--case', type=json.loads, help='compare this case alone')
    arguments = parser.parse_args()
    set_flags()
    choose_platform(MOST_DEVICES)
    counts: collections.Counter = collections.Counter()
    cases, started = draw_cases(arguments.seed, counts), time.monotonic()
    if arguments.case is not None:
        validate(config_of(arguments.case), MOST_DEVICES)
        cases = iter([arguments.case])
    fuzz(cases, arguments.seconds, arguments.configs or sys.maxsize, counts)
    print(summary(counts, time.monotonic() - started))
    return 1 if counts['fell'] else 0


if __name__ == '__main__':
    sys.exit(main())
