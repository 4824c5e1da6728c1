"""Hostile configs and command lines, and damaged input files, for tests/attack.py."""

import functools
import gzip
import json
import math
import os
import pathlib
import random
import shutil
import sys
from collections import Counter
from typing import Any

import jax
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from attack_faults import (
    HARMLESS,
    REFUSED,
    TRACEBACK,
    WARNED,
    WRONG,
    Family,
    Outcome,
    damage_file,
    files_below,
    flip_bit,
    judge,
    silent,
)
from attack_jobs import END_SECONDS, Jobs, ended, settled
from common_data import ROOT, as_lines, some_texts
from ml_collections import ConfigDict

from config import flat
from corpus.files import find_files
from corpus.prepare import Job, prepare
from corpus.shards import read_blocks
from machine.config_flag import load_config, override, split_overrides
from parallel import make_mesh
from runtime.config_checks import validate
from storage.stores import open_store
from train_step import abstract_state, setup

# ---------------------------------------------------------------------------------------------
# Configs
# ---------------------------------------------------------------------------------------------

# As they are typed behind --config.FIELD=, and as a config's file may set them.
TYPED = (
    'nan', 'inf', '-inf', '-1', '0', '-0.0', '1e308', '1e-308', '1e39', '1e400', '0.5', '1e3',
    '2147483647', '2147483648', '4294967295', '4294967296', '9223372036854775808', '9' * 5000,
    '3.0', '0x10', '1_000', '１２', ' 7 ', '', ' ', 'None', 'True', 'yes', '()', '(', '[', '(1, 2)',
    "('',)", '((),)', "(('a',),)", "(('a', 'b', nan),)", "(('a', 'b', -1), ('a', 'b', 1))", 'dense',
    'dense,,moe', 'mla', 'x' * 100_000, '\n', '\0', '../..', '~', '{}', "{'a': 1}", '"', "'",
    '--help',
)  # fmt: skip
SET = (
    math.nan, math.inf, -1, 0, 2**31, 2**32, 2**63, 10**30, 1e308, 1e-308, 0.5, 3.0, True, None, '',
    '3', 'x', (), (1,), ('',), [], ['dense'], (('a', 'b'),), (('a', 'b', math.nan),), b'x',
    np.float32(0.1), np.int64(3), object,
)  # fmt: skip
BASES = ('tiny', 'tiny_dense', 'default', 'deepseek_v3', 'llama3_8b', 'tpu_v4')


class Configs(Family):
    """A config with a hostile field or two; then the rules, and the shapes of its state."""

    name = 'config'

    def __init__(self, folder: pathlib.Path):
        super().__init__(folder)
        self.bases = [
            name for name in BASES if (pathlib.Path(ROOT) / f'configs/{name}.py').exists()
        ]
        self.fields = sorted(flat(load_config('default')[1].to_dict()))

    def attack(self, rng: random.Random, index: int) -> Outcome:
        base = rng.choice(BASES[:2] * 4 + BASES)
        fields = rng.sample(self.fields, rng.choice((1, 1, 2)))
        if typed := rng.random() < 0.7:
            values = [rng.choice(TYPED) for _ in fields]
            if rng.random() < 0.05:
                fields[0] = rng.choice([fields[0] + 'x', fields[0][:-1], 'model', '', 'a.b.c', '_'])
        else:
            values = [rng.choice(SET) for _ in fields]
        pairs = list(zip(fields, values, strict=True))
        shown = ' '.join(f'{name}={str(value)[:40]!r}' for name, value in pairs)
        return judge(
            f'{base}, {"typed" if typed else "set"}: {shown}',
            functools.partial(self._set_up, base, pairs, typed),
            functools.partial(self._check, pairs if typed else []),
            tuple(x for name in fields for x in (name, name.rpartition('.')[2])),
        )

    def _set_up(self, base: str, pairs: list[tuple[str, Any]], typed: bool) -> ConfigDict:
        """Does what a start does before it compiles; returns the config."""
        _, config = load_config(base)
        config.data.path = config.data.path or 'tokens'
        if base not in ('tiny', 'tiny_dense', 'default'):  # fit for the devices here
            config.mesh.update(dict.fromkeys(config.mesh, 1))
            config.check_vma = True
        if typed:
            override(config, split_overrides([f'--config.{n}={v}' for n, v in pairs])[0])
        else:
            with config.unlocked(), config.ignore_type():
                for name, value in pairs:
                    *groups, field = name.split('.')
                    functools.reduce(lambda c, group: c[group], groups, config)[field] = value
        validate(config, jax.device_count())
        abstract_state(setup(config, make_mesh(config.mesh)))
        return config

    def _check(self, typed: list[tuple[str, str]], config: ConfigDict) -> tuple[str, str]:
        values = flat(config.to_dict())
        for name, text in dict(typed).items():
            value = values[name]
            if isinstance(value, bool):
                continue
            if isinstance(value, int | float) and type(value)(text) != value:
                return WRONG, f'{name}={text} became {value!r}'
            if isinstance(value, str) and text != value:
                return WRONG, f'{name}={text} became {value!r}'
            entries = np.ravel(np.array(value, dtype=object)) if isinstance(value, tuple) else ()
            if any(str(entry) not in text for entry in entries):
                return WRONG, f'{name}={text} became {value!r}'
        for name, value in values.items():
            if isinstance(value, float) and not np.isfinite(np.float32(value)):
                return WRONG, f'{name}={value} passed all rules'
            if isinstance(value, int) and not -1 <= value < 2**32:
                return WRONG, f'{name}={value} passed all rules'
            if not isinstance(value, bool | int | float | str | tuple):
                return WRONG, f'{name}={value!r} of {type(value)} passed all rules'
        return HARMLESS, ''


# ---------------------------------------------------------------------------------------------
# Command lines
# ---------------------------------------------------------------------------------------------

# In braces: what `Commands` makes. A step of --config=tiny is never reached. Two of them do run.
COMMANDS = """
train.py
train.py stray
train.py --config=tiny stray words
train.py --config=configs/tinny.py
train.py --config=
train.py --config={broken_config}
train.py --config={text}
train.py --config={empty}
train.py --config.steps=3
train.py --config=tiny --config.optimizer.peek_lr=1
train.py --config=tiny --config.model=3
train.py --config=tiny --config.data.path={empty}
train.py --config=tiny --config.data.path={missing} --cpu_devices=1
train.py --config=tiny --config.data.path={text} --cpu_devices=1
train.py --config=tiny --workdir={text} --cpu_devices=1
train.py --config=tiny --workdir={text}/below --cpu_devices=1
train.py --config=tiny --workdir=/proc/nothing --cpu_devices=1
train.py --config=tiny --workdir=nothing://at/all --cpu_devices=1
train.py --config=tiny --cpu_devices=-1
train.py --config=tiny --cpu_devices=many
train.py --config=tiny --cpu_devices=3
train.py --config=tiny --cpu_devices=1 --init_from={missing}
train.py --config=tiny --cpu_devices=1 --init_from={empty}
train.py --config=tiny --cpu_devices=1 --profile=3
train.py --config=tiny --cpu_devices=1 --profile=9:3
train.py --config=tiny --cpu_devices=1 --config.data.tokenizer=nothing
train.py --config=tiny --cpu_devices=1 --config.data.tokenizer={text}
train.py --config=tiny --cpu_devices=1 --config.log.writers=nothing
train.py --config=tiny --coordinator=localhost
train.py --config=tiny --num_processes=2
train.py --config=tiny --noconfig.steps
train.py --eval_only
train.py --eval_only --workdir={empty}
train.py --eval_only=7 --workdir={run} --cpu_devices=1
train.py --eval_only=x --workdir={run}
train.py --eval_only --workdir={damaged_run} --cpu_devices=1
train.py --plot={empty}
train.py --plot={missing}
train.py --plot={run} --plot_output=/proc/nothing.png
train.py --help
{training} --workdir={damaged_run}
{training} --workdir={new} --config.data.path={damaged_tokens}
{training} --workdir={run} --config.model.d_model=64
{training} --workdir={run} --config.data.path={other_tokens}
data.py
data.py --input={missing} --tokenizer=bytes --output={new}
data.py --input={empty} --tokenizer=bytes --output={new}
data.py --input={binary} --tokenizer=bytes --output={new}
data.py --input={text} --tokenizer=nothing --output={new}
data.py --input={text} --tokenizer={text} --output={new}
data.py --input={text} --tokenizer={broken_vocabulary} --output={new}
data.py --input={text} --tokenizer={broken_tokenizer} --output={new}
data.py --input={text} --tokenizer=bytes --output={text}
data.py --input={text} --tokenizer=bytes --output=/proc/nothing
data.py --input={text} --tokenizer=bytes --output={tokens}
data.py --input={text} --tokenizer=bytes --output={new} --validation_share=nan
data.py --input={text} --tokenizer=bytes --output={new} --validation_share=2
data.py --input={text} --tokenizer=bytes --output={new} --max_bad_share=-1
data.py --input={text} --tokenizer=bytes --output={new} --workers=0
data.py --input={text} --tokenizer=bytes --output={new} --workers=x
data.py --input={lines} --tokenizer=bytes --output={new} --text_field=nothing
data.py --input={broken_parquet} --tokenizer=bytes --output={new}
data.py --input=nothing://at/all.txt --tokenizer=bytes --output={new}
data.py --inspect={empty}
data.py --inspect={text}
data.py --inspect={damaged_tokens}
data.py --inspect={tokens} --samples=-1
data.py --unknown=3
tokenizer.py
tokenizer.py --input={missing} --vocab_size=300 --output={new}.tiktoken
tokenizer.py --input={binary} --vocab_size=300 --output={new}.tiktoken
tokenizer.py --input={text} --vocab_size=-1 --output={new}.tiktoken
tokenizer.py --input={text} --vocab_size=1 --output={new}.tiktoken
tokenizer.py --input={text} --vocab_size=x --output={new}.tiktoken
tokenizer.py --input={text} --vocab_size=300 --output=/proc/nothing.tiktoken
tokenizer.py --input={text} --vocab_size=300 --output={new}
tokenizer.py --from_hf={missing} --output={new}.tiktoken
tokenizer.py --from_hf={text} --output={new}.tiktoken
tokenizer.py --from_hf={broken_tokenizer} --output={new}.tiktoken
tokenizer.py --from_hf={broken_tokenizer} --output={new}.json
tokenizer.py --end_of_text=a --input={text} --output={new}.tiktoken
generate.py
generate.py --workdir={missing} --prompt=a
generate.py --workdir={empty} --prompt=a
generate.py --workdir={run} --prompt=
generate.py --workdir={run} --prompt=a --step=3
generate.py --workdir={run} --prompt=a --max_tokens=-1
generate.py --workdir={run} --prompt=a --temperature=nan
generate.py --workdir={run} --prompt=a --temperature=-1
generate.py --workdir={run} --prompt=a --top_p=7
generate.py --workdir={run} --prompt=a --top_k=-7
generate.py --workdir={run} --prompt=a --seed=18446744073709551616
generate.py --workdir={run} --prompt=a --context=-1
generate.py --workdir={run} --prompt=a --tp=3
generate.py --workdir={run} --prompt=a --dtype=int8
generate.py --workdir={run} --prompt=a --tokenizer={broken_vocabulary}
generate.py --workdir={run} --prompts_file={missing}
generate.py --workdir={run} --prompts_file={binary}
generate.py --workdir={run} --prompts_file={empty}
generate.py --workdir={damaged_run} --prompt=a
plan.py
plan.py --config=tinny
plan.py --config=tiny --chip=nothing
plan.py --config=tiny --devices=-1
plan.py --config=tiny --search --devices=0 --best=0
plan.py --config=tiny --compile=nothing
plan.py --config=tiny --config.steps=x
plan.py --config=tiny --config.batch_size=7 --config.mesh.dp=2
parallel.py --schedule=nothing
parallel.py --stages=0
parallel.py --microbatches=-3
parallel.py --schedule=zero_bubble --cost_w=nan
parallel.py --schedule=interleaved --chunks=0
""".strip().splitlines()
# The damage is in an array that they do not read; other text of the same vocabulary is said.
ENDS_WELL = {
    'train.py --help',
    'train.py --eval_only --workdir={damaged_run} --cpu_devices=1',
    '{training} --workdir={damaged_run}',
    '{training} --workdir={run} --config.data.path={other_tokens}',
    'generate.py --workdir={damaged_run} --prompt=a',
}


class Commands(Family):
    """Command lines with mistakes: all but ENDS_WELL end with 1, and none with a traceback."""

    name = 'commands'
    limit = 2 * END_SECONDS

    def __init__(self, folder: pathlib.Path):
        super().__init__(folder)
        self.jobs = Jobs(folder)
        rng, texts = random.Random(0), some_texts(20)
        run, tokens = folder / 'whole', self.jobs.tokens
        files = {name: folder / name for name in ('missing', 'new', 'empty', 'damaged_run')}
        files |= {'run': run, 'tokens': tokens}
        files['empty'].mkdir()
        for name, content in {
            'text.txt': b'some text\n' * 50,
            'binary.txt': rng.randbytes(500) + b'\xff',
            'lines.jsonl': as_lines(texts),
            'broken_config.py': b'def get_config(:\n',
            'broken_vocabulary.tiktoken': b'IQ== 0\nIg==\n',
            'broken_tokenizer.json': b'{"model": {"type": "BPE"}, "added_tokens": [3]}',
            'broken_parquet.parquet': b'PAR1' + rng.randbytes(200) + b'PAR1',
        }.items():
            files[name.partition('.')[0]] = folder / name
            (folder / name).write_bytes(content)
        shutil.copytree(run, files['damaged_run'])
        steps = sorted(files['damaged_run'].glob('checkpoints/*'), key=lambda p: int(p.name))
        chunks = [p for p in files_below(steps[-1] / 'arrays') if p.name != 'zarr.json']
        flip_bit(chunks[0], rng)
        files['damaged_tokens'] = folder / 'damaged_tokens'
        shutil.copytree(tokens, files['damaged_tokens'])
        for path in files['damaged_tokens'].glob('train/*/c/0'):
            content = path.read_bytes()
            path.write_bytes(bytes(len(content) // 2) + content[len(content) // 2 :])
        files['other_tokens'] = folder / 'other_tokens'
        prepare(
            find_files([str(files['text']), str(files['lines'])]),
            Job(str(files['other_tokens']), 'vocab/stdlib-4096.tiktoken', 0.25),
        )
        self.files = {name: str(path) for name, path in files.items()}
        self.files['training'] = ' '.join(self.jobs.training(run)[1:-1])

    def attack(self, rng: random.Random, index: int) -> Outcome:
        line = COMMANDS[(index * 41) % len(COMMANDS)]  # 41: so that a few are of all commands
        new = pathlib.Path(self.files['new'])
        output = self.folder / 'said.txt'
        environment = os.environ | {'JAXFORMER_CACHE': str(self.folder / 'cache')}
        environment.pop('JAX_NUM_CPU_DEVICES', None)
        command = [sys.executable, *line.format(**self.files).split()]
        try:
            code = ended(self.jobs.start(command, output, environment=environment))
            said = settled(output)
        finally:
            shutil.rmtree(new, ignore_errors=True)
            for path in new.parent.glob('new.*'):
                path.unlink()
        if code is None:
            return Outcome('hang', line, said)
        if 'Traceback' in said or code not in (0, 1):
            return Outcome(TRACEBACK, line, f'exit code {code}\n{said}')
        message = said.strip().rpartition('\n')[2]
        if not code and line not in ENDS_WELL:
            return Outcome(WRONG, line, f'it ended as if nothing were wrong: {message}')
        return Outcome(REFUSED if code else HARMLESS, line, message)


# ---------------------------------------------------------------------------------------------
# Input files
# ---------------------------------------------------------------------------------------------


class Corpora(Family):
    """Damaged files of text beside an undamaged one; then a preparation."""

    name = 'corpus'
    KINDS = ('a.txt', 'b.jsonl', 'b.jsonl', 'c.jsonl.gz', 'd.jsonl.zst', 'e.parquet')

    def __init__(self, folder: pathlib.Path):
        super().__init__(folder)
        self.texts, self.beside = some_texts(60), 'beside, undamaged: é東\n'
        lines = as_lines(self.texts)
        pack = zstandard.ZstdCompressor(write_checksum=True)
        self.files = {
            'a.txt': ''.join(self.texts).encode(),
            'b.jsonl': lines,
            'c.jsonl.gz': gzip.compress(lines),
            'd.jsonl.zst': pack.compress(lines),
        }
        path = folder / 'e.parquet'
        pq.write_table(
            pa.table({'text': self.texts}), path, row_group_size=20, write_page_checksum=True,
            compression='zstd',
        )  # fmt: skip
        self.files[path.name] = path.read_bytes()
        self.input, self.output = folder / 'input', folder / 'output'
        self.input.mkdir()

    def attack(self, rng: random.Random, index: int) -> Outcome:
        path, beside = self.input / rng.choice(self.KINDS), self.input / 'beside.txt'
        beside.write_text(self.beside)
        path.write_bytes(self.files[path.name])
        faults = [damage_file(self.input, path, rng)]
        while rng.random() < 0.25 and path.exists():
            faults.append(damage_file(self.input, path, rng))
        limit = rng.choice((0.001, 1.0))
        try:
            return judge(
                f'{"; ".join(faults)}; max_bad_share={limit:g}',
                functools.partial(self._prepare, path, beside, limit),
                functools.partial(self._check, path, limit),
                (path.name,),
            )
        finally:
            path.unlink(missing_ok=True)
            shutil.rmtree(self.output, ignore_errors=True)

    def _prepare(
        self, path: pathlib.Path, beside: pathlib.Path, limit: float
    ) -> tuple[list[str], dict[str, Any]]:
        """Prepares both files; returns the texts of all documents, and the manifest."""
        job = Job(str(self.output), 'bytes', 0.0, max_bad_share=limit)
        with silent():
            manifest = prepare(find_files([str(path), str(beside)]), job)
        store, texts = open_store(str(self.output)), []
        for split in manifest['splits'].values():
            for shard in split['shards']:
                tokens = np.concatenate(list(read_blocks(store, shard['path'])))
                for document in np.split(tokens, np.flatnonzero(tokens == 256) + 1)[:-1]:
                    texts.append(document[:-1].astype(np.uint8).tobytes().decode())
        return texts, manifest

    def _check(
        self, path: pathlib.Path, limit: float, result: tuple[list[str], dict[str, Any]]
    ) -> tuple[str, str]:
        texts, manifest = result
        found, bad = Counter(texts), manifest['input']['bad']
        if not found[self.beside]:
            return WRONG, 'the undamaged file is gone'
        found -= Counter([self.beside])
        whole = Counter([''.join(self.texts)] if path.suffix == '.txt' else self.texts)
        del whole['']
        content = path.read_bytes()
        if path.suffix in ('.txt', '.jsonl'):  # no checksums: what is there is what counts
            expected, expected_bad = read_plainly(path.suffix, content)
            if (found, bool(bad)) != (expected, bool(expected_bad)):
                return WRONG, f'{found - expected} too many, {expected - found} missing, {bad} bad'
            return (WARNED, f'{bad} bad records') if bad else (HARMLESS, '')
        cut = any(report['place'] and report['broken'] for report in manifest['input']['reports'])
        if (altered := found - (whole + whole)) and not (cut and limit == 1):
            return WRONG, f'{sum(altered.values())} altered texts were kept'
        if bad:
            if limit < 1:
                return WRONG, f'{bad} bad records are within the limit of {limit}'
            return WARNED, f'{bad} bad records'
        repeated = content == self.files[path.name] * 2  # which is a valid file
        if found not in (whole, whole + whole if repeated else whole):
            return WRONG, f'{len(list(found.elements()))} documents, not one of them bad'
        return HARMLESS, ''


def read_plainly(suffix: str, content: bytes) -> tuple[Counter, int]:
    """Returns the texts that a file without compression holds, and the number of bad records."""
    texts, bad = [], 0
    for record in [content] if suffix == '.txt' else content.split(b'\n'):
        if suffix == '.jsonl' and not record.strip():
            continue
        try:
            text = record.decode()
            text = text if suffix == '.txt' else json.loads(text)['text']
            text.encode()
        except (ValueError, KeyError, TypeError, AttributeError):
            bad += 1
        else:
            texts += [text] if text else []
    return Counter(texts), bad
