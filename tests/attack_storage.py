"""Damaged checkpoints, tokens and manifests, for tests/attack.py."""

import json
import pathlib
import random
import shutil
from typing import Any

import jax
import numpy as np
from attack_faults import (
    HARMLESS,
    WARNED,
    WRONG,
    Family,
    Outcome,
    Undo,
    damage_file,
    exchange,
    exchange_with_alike,
    files_below,
    judge,
    silent,
)
from common import set_up, small_config
from common_checkpoint import bits
from common_data import make_corpus
from ml_collections import ConfigDict

from checkpoint import Checkpointer
from corpus.files import find_files
from corpus.prepare import Job, prepare
from data import open_data
from parallel import Tree
from runtime.resume import restore_state
from storage import leaves
from train_step import abstract_state

STEPS = (2, 4, 6)
CHUNK_BYTES = 4096  # so that leaves have several chunks


class Checkpoints(Family):
    """A training state, parameters and optimizer, at several steps; then a start from it."""

    name = 'checkpoint'

    def __init__(self, folder: pathlib.Path):
        super().__init__(folder)
        config = small_config('gqa', moe=True)
        config.model.update(n_layers=2, block=('moe',), n_experts=4, n_expert_groups=2)
        config.model.update(n_top_groups=2, experts_per_token=2)
        self.shapes = abstract_state(set_up(config))
        self.states = {step: self._state(step) for step in STEPS}
        self.whole = folder / 'checkpoints'
        usual, leaves.CHUNK_BYTES = leaves.CHUNK_BYTES, CHUNK_BYTES
        try:
            with Checkpointer(str(self.whole)) as checkpoints:
                for step in STEPS:
                    checkpoints.save(step, self.states[step], config.to_dict())
        finally:
            leaves.CHUNK_BYTES = usual
        self.bits = {
            step: list(map(bits, jax.tree.leaves(state))) for step, state in self.states.items()
        }
        self.arrays = sorted(p.name for p in (self.whole / '2/arrays').iterdir())
        self.undo = Undo(self.whole)

    def _state(self, step: int) -> Tree:
        rng = np.random.default_rng(step)

        def fill(x: jax.ShapeDtypeStruct) -> jax.Array:
            return jax.device_put(rng.normal(scale=100, size=x.shape).astype(x.dtype), x.sharding)

        return jax.tree.map(fill, self.shapes) | {'step': jax.numpy.int32(step)}

    def attack(self, rng: random.Random, index: int) -> Outcome:
        with self.undo as copy:
            target = rng.choice((6, 6, 6, *STEPS))
            fault = rng.choice([self._file] * 7 + [self._exchange_files, self._exchange_leaves,
                                self._older_chunk, self._steps, self._folder])  # fmt: skip
            description = fault(copy, target, rng)
            return judge(description, lambda: self._start(copy, target), self._check, (str(copy),))

    def _file(self, copy: pathlib.Path, step: int, rng: random.Random) -> str:
        """Damages one file: of a chunk, or, more often than by its number, another one."""
        files = files_below(copy / str(step))
        beside = [p for p in files if p.name in ('metadata.json', 'COMMIT')]
        return damage_file(copy, rng.choice(beside if rng.random() < 0.25 else files), rng)

    def _exchange_files(self, copy: pathlib.Path, step: int, rng: random.Random) -> str:
        chunks = [p for p in files_below(copy) if 'c' in p.parts]
        first = rng.choice([p for p in chunks if p.is_relative_to(copy / str(step))])
        description = exchange_with_alike(copy, first, chunks, rng)
        return description or self._older_chunk(copy, step, rng)

    def _exchange_leaves(self, copy: pathlib.Path, step: int, rng: random.Random) -> str:
        """Exchanges the folders of two leaves, of the same shape if there are such."""
        a = copy / f'{step}/arrays' / rng.choice(self.arrays)
        sizes = [p.stat().st_size for p in files_below(a)]
        others = [a.with_name(name) for name in self.arrays if name != a.name]
        alike = [b for b in others if [p.stat().st_size for p in files_below(b)] == sizes]
        b = rng.choice(alike if alike and rng.random() < 0.8 else others)
        exchange(a, b)
        return f'exchanged: {a.relative_to(copy)} and {b.relative_to(copy)}'

    def _older_chunk(self, copy: pathlib.Path, step: int, rng: random.Random) -> str:
        """Puts files of another step in: a chunk, or all that one leaf has."""
        other = rng.choice([s for s in STEPS if s != step])
        leaf = copy / f'{step}/arrays' / rng.choice(self.arrays)
        files = files_below(leaf)
        for path in files if rng.random() < 0.3 else [rng.choice(files)]:
            shutil.copyfile(copy / str(other) / path.relative_to(copy / str(step)), path)
        return f'from step {other}: {leaf.relative_to(copy)}, {path.name}'

    def _steps(self, copy: pathlib.Path, step: int, rng: random.Random) -> str:
        """Renames, copies, exchanges or replaces steps."""
        other = rng.choice([s for s in STEPS if s != step])
        new = rng.choice((8, 3, 10**9, 5))
        kind = rng.choice(('renamed', 'copied', 'exchanged', 'replaced'))
        a, b = copy / str(step), copy / str(other)
        if kind == 'renamed':
            a.rename(copy / str(new))
        elif kind == 'copied':
            shutil.copytree(a, copy / str(new))
        elif kind == 'exchanged':
            exchange(a, b)
        else:
            shutil.rmtree(b)
            a.rename(b)
        return f'steps {kind}: {step}, {other if kind in ("exchanged", "replaced") else new}'

    def _folder(self, copy: pathlib.Path, step: int, rng: random.Random) -> str:
        """Removes a leaf's folder, all arrays, or the whole step."""
        gone = rng.choice([f'{step}/arrays/{rng.choice(self.arrays)}', f'{step}/arrays', str(step)])
        shutil.rmtree(copy / gone)
        return f'removed: {gone}'

    def _start(self, copy: pathlib.Path, target: int) -> list[tuple[int, dict, Tree]]:
        """Reads what a start reads, the newest step; then damaged or new ones, like --init_from."""
        found = []
        committed = [int(marker.parent.name) for marker in copy.glob('*/COMMIT')]
        with silent(), Checkpointer(str(copy)) as checkpoints:
            newest = checkpoints.latest_step()
            assert newest == max(committed), (newest, committed)
            also = [step for step in committed if step == target or step not in STEPS]
            for step in dict.fromkeys([newest, *also]):
                metadata = checkpoints.metadata(step)
                found.append((step, metadata, restore_state(checkpoints, step, self.shapes)))
            checkpoints.clean()
        return found

    def _check(self, found: list[tuple[int, dict, Tree]]) -> tuple[str, str]:
        for step, metadata, state in found:
            if step not in self.bits or metadata['step'] != step:
                return WRONG, f'step {metadata["step"]} passed for step {step}'
            for (path, x), want in zip(
                jax.tree_util.tree_leaves_with_path(state), self.bits[step], strict=True
            ):
                if bits(x) != want:
                    return WRONG, f'step {step}: {jax.tree_util.keystr(path)} has other values'
        newest = found[0][0]
        if newest != STEPS[-1]:
            return WARNED, f'goes on from step {newest}, which the start says'
        return HARMLESS, ''


class Tokens(Family):
    """A prepared folder of many shards; then all batches of an epoch and of the evaluation."""

    name = 'tokens'

    def __init__(self, folder: pathlib.Path):
        super().__init__(folder)
        text = folder / 'text'
        text.mkdir()
        make_corpus(text)
        self.whole = folder / 'tokens'
        prepare(find_files([f'{text}/**/*']), Job(str(self.whole), 'bytes', 0.25), part_bytes=5000)
        self.config = small_config()
        self.config.model.vocab_size = 264
        self.expected = self._read(self.whole)
        self.undo = Undo(self.whole)

    def attack(self, rng: random.Random, index: int) -> Outcome:
        with self.undo as copy:
            fault = rng.choice(
                [self._file] * 4 + [self._number] * 4 + [self._entry, self._exchange]
            )
            description = fault(copy, rng)
            return judge(description, lambda: self._read(copy), self._check, (str(copy),))

    def _read(self, folder: pathlib.Path) -> dict[str, Any]:
        """Returns all that training takes from a prepared folder."""
        config: ConfigDict = self.config.copy_and_resolve_references()
        config.data.path = str(folder)
        with silent():
            loader, sources, encoding = open_data(config)
            evaluation = sources[0].evaluation
            epoch = -(-loader.n_windows // loader.batch_size)
            return {
                'windows': loader.n_windows,
                'train': [loader.batch_at(i).tobytes() for i in range(epoch)],
                'counts': [
                    (split.n_tokens, split.n_documents, split.n_bytes, split.end_of_text)
                    for split in (loader.split, evaluation.split)
                ],
                'evaluation': [
                    evaluation.batch_at(i).tobytes() for i in range(evaluation.n_batches)
                ],
                'encoding': (encoding.name, encoding.n_vocab, encoding.eot_token),
            }

    def _check(self, found: dict[str, Any]) -> tuple[str, str]:
        for name, expected in self.expected.items():
            if found[name] != expected:
                return WRONG, f'{name} differ'
        return HARMLESS, ''

    def _file(self, copy: pathlib.Path, rng: random.Random) -> str:
        files = files_below(copy)
        if rng.random() < 0.25:
            files = [copy / 'manifest.json']
        return damage_file(copy, rng.choice(files), rng)

    def _exchange(self, copy: pathlib.Path, rng: random.Random) -> str:
        """Exchanges two shards, or two files of them, of one split or of both."""
        shards = sorted(path for path in copy.glob('*/*') if path.is_dir())
        a, b = rng.sample(shards, 2)
        if rng.random() < 0.5:
            a, b = a / 'c/0', b / 'c/0'
        exchange(a, b)
        return f'exchanged: {a.relative_to(copy)} and {b.relative_to(copy)}'

    def _number(self, copy: pathlib.Path, rng: random.Random) -> str:
        """Changes one number or text of manifest.json, or of an array's zarr.json."""
        arrays = [p for p in files_below(copy) if p.name == 'zarr.json']
        path = copy / 'manifest.json' if rng.random() < 0.8 else rng.choice(arrays)
        content = json.loads(path.read_bytes())
        holder, key = rng.choice(list(_values(content)))
        old = holder[key]
        holder[key] = _changed(old, rng)
        path.write_text(json.dumps(content, indent=1) + '\n')
        return f'{path.relative_to(copy)}: {key!r} changed from {old!r} to {holder[key]!r}'

    def _entry(self, copy: pathlib.Path, rng: random.Random) -> str:
        """Takes a shard out of manifest.json, doubles it, or exchanges two."""
        path = copy / 'manifest.json'
        content = json.loads(path.read_bytes())
        split = rng.choice(sorted(content['splits']))
        shards = content['splits'][split]['shards']
        i, j = rng.sample(range(len(shards)), 2)
        kind = rng.choice(('removed', 'doubled', 'exchanged', 'counts exchanged'))
        if kind == 'removed':
            del shards[i]
        elif kind == 'doubled':
            shards.insert(j, shards[i])
        elif kind == 'exchanged':
            shards[i], shards[j] = shards[j], shards[i]
        else:
            shards[i]['tokens'], shards[j]['tokens'] = shards[j]['tokens'], shards[i]['tokens']
        path.write_text(json.dumps(content, indent=1) + '\n')
        return f'manifest.json: shards {i}, {j} of {split} {kind}'


def _values(content: Any) -> Any:
    """Yields (holder, key) of each number and text in a JSON value."""
    for key, value in content.items() if isinstance(content, dict) else enumerate(content):
        if isinstance(value, dict | list):
            yield from _values(value)
        else:
            yield content, key


def _changed(value: Any, rng: random.Random) -> Any:
    """Returns another value of the same type, or at times of another one."""
    if rng.random() < 0.15:
        return rng.choice([None, -1, 0.5, 'x', [], {}, True, 1e308, 2**63])
    if isinstance(value, str):
        others = [
            '',
            value + 'x',
            value[:-1],
            value.swapcase(),
            'bytes',
            '../tokens',
            'train/00001',
        ]
        return rng.choice([other for other in others if other != value])
    others = [value + 1, value - 1, value * 2, value // 2, 0, -value, value + 256, 2**31, 2**40]
    return rng.choice([other for other in others if other != value])
