"""Brings released weights in, and a run's weights out, in the layout of the Hugging Face hub.

    python convert.py --from_hf=Llama-3.1-8B --workdir=runs/llama --write_config=configs/mine.py
    python convert.py --workdir=runs/mine --to_hf=mine --dtype=bfloat16

--from_hf takes a folder with config.json, safetensors files and, if there is one, tokenizer.json;
the workdir receives a checkpoint of step 0 with the parameters alone, in the types that the files
have, on which generate.py, train.py --eval_only and --init_from work. --to_hf writes a new folder
that transformers and inference engines load. Either holds a few tensors in memory at a time, and
what is cut short does not look finished.
"""

if __name__ == '__main__':  # before the imports that take seconds
    from machine import startup

    startup.quick_interrupts()

import math
import os
import shutil
import tempfile
import time
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict

from checkpoint import Checkpointer, CheckpointError
from config import ConfigError, model_config, saved_config
from configs import default
from families import files
from families.exporting import Saved, check_zeros, write_weights
from families.family import Family
from families.fields import Released, read_config
from families.importing import check_tensors, host_leaves, saved_bytes
from families.quantized import dequantized
from families.rules import Leaf
from families.table import check_name, family_for, family_of
from machine import command, processes
from machine.memory import keep_freed_memory, memory_use
from machine.progress import SILENT_SECONDS, Progress, interruption
from optimizer import AVERAGE
from runtime.config_checks import validate
from runtime.lease import Lease
from runtime.resume import check_averaged
from runtime.sampling import end_of_text, run_encoding
from runtime.workdir import CHECKPOINTS, CONFIG, TOKENIZER, check_shared, tokenizer_record
from storage.reading import DamagedError
from storage.safetensors import Tensor, read_folder
from storage.stores import local_folder, write_text
from tokenizer import get_encoding

FLAGS = flags.FLAGS
WRITING = 512 << 20  # bytes of a checkpoint that are under way at a time
# The flags that count in one direction alone.
ONLY_IN = ('write_config', 'coordinator', 'num_processes', 'process_id')
ONLY_OUT = ('step', 'averaged', 'dtype', 'shard_gigabytes', 'family', 'like')

# ---------------------------------------------------------------------------------------------
# In
# ---------------------------------------------------------------------------------------------


def imported_config(family: Family, released: Released) -> ConfigDict:
    """Returns the config of a run with a released model. Raises ConfigError if it cannot run."""
    c = default.get_config()
    c.seq_len = files.seq_len_of(released)
    c.compute_dtype = files.compute_dtype_of(released)
    c.model.update(family.model_fields(released))
    while c.seq_len % min(c.model.attention_block, c.seq_len):
        c.model.attention_block //= 2
    validate(c, 1, needs_data=False)
    return c


def read_release(
    folder: str,
) -> tuple[ConfigDict, Family, list[Leaf], dict[str, Tensor], list[str]]:
    """Returns all that is known of a release before a weight is read: its config here, its family,
    the leaves and tensors, and lines to say.

    Raises ConfigError for what the code cannot compute, and for weights that are not those of the
    model.
    """
    if not os.path.isdir(folder):
        raise ConfigError(f'--from_hf={folder} is no local folder; fetch the model to one first')
    released = read_config(folder)
    family = family_of(released)
    config = imported_config(family, released)
    leaves = family.model_leaves(model_config(config))
    tensors = dequantized(read_folder(folder), released)
    return config, family, leaves, tensors, check_tensors(leaves, tensors, family, released)


def import_model(folder: str, workdir: str) -> ConfigDict:
    """Makes a run's folder of a released model; returns its config. All processes call this."""
    started = time.perf_counter()
    config, family, leaves, tensors, said = processes.agreed(
        lambda: read_release(folder), 'read the release'
    )
    check_shared(workdir)
    path = os.path.join(workdir, CHECKPOINTS)
    with (
        Lease(workdir, say) as lease,
        Checkpointer(path, check_owner=lease.check) as checkpoints,
    ):
        newest = checkpoints.latest_step()
        if newest is not None:
            raise ConfigError(f'--workdir={workdir} holds step {newest} already: name a new folder')
        checkpoints.clean()
        lease.hold()
        said += processes.agreed(lambda: keep_files(folder, workdir, config))
        silent = math.inf if jax.process_index() else SILENT_SECONDS
        total = saved_bytes(leaves, tensors) // jax.process_count()
        with (
            interruption(f'{workdir} holds no checkpoint yet; give the same command again'),
            Progress('writing weights', total, silent=silent) as progress,
        ):
            saved = host_leaves(leaves, tensors, progress.add)
            checkpoints.save_leaves(0, saved, config.to_dict(), None, WRITING)
    for line in said:
        say(line)
    used = {tensors[name] for leaf in leaves for name in leaf.names.values()}
    say(summary(f'{family.name}: {workdir} holds', sum(t.nbytes for t in used), started))
    return config


def keep_files(folder: str, workdir: str, config: ConfigDict) -> list[str]:
    """Writes the files of a run beside its checkpoint; returns lines about the tokenizer."""
    if jax.process_index() != 0:
        return []
    small = files.small_files(folder)
    files.keep(small, workdir)
    write_text(os.path.join(workdir, CONFIG), config.to_json(indent=2) + '\n')
    if files.TOKENIZER not in small:
        return [f'{folder} has no {files.TOKENIZER}: name a vocabulary with --tokenizer later']
    own = os.path.join(workdir, files.RELEASE, files.TOKENIZER)
    try:
        encoding = get_encoding(own if local_folder(own) else small[files.TOKENIZER])
        write_text(os.path.join(workdir, TOKENIZER), tokenizer_record(encoding))
    except ConfigError as error:
        return [f'the tokenizer is kept as {own}, and not used: {error}']
    return []


def say(line: str) -> None:
    """Prints a line on process 0."""
    if jax.process_index() == 0:
        print(line, flush=True)


def summary(what: str, nbytes: int, started: float) -> str:
    """Returns the line at the end: bytes, time, rate and the most memory of this process."""
    seconds = time.perf_counter() - started
    peak = memory_use()['host_bytes'] / 1e9
    return (
        f'{what} {nbytes / 1e9:.3f} GB of weights, after {seconds:.1f} s: '
        f'{nbytes / 1e6 / seconds:.0f} MB/s, at most {peak:.2f} GB of memory'
    )


def config_text(config: ConfigDict, name: str, workdir: str) -> str:
    """Returns a config's file: what differs from the defaults, to be changed by hand."""
    plain, lines = default.get_config(), []
    for field, value in config.items():
        if not isinstance(value, ConfigDict) and value != plain[field]:
            lines.append(f'    c.{field} = {value!r}')
    lines += ["    c.data.path = 'tokens'", '', '    m = c.model']
    for field, value in config.model.items():
        if value != plain.model[field]:
            lines.append(f'    m.{field} = {value!r}')
    return (
        f'"""Goes on from the weights of a released {name} model.\n\n'
        f'    python train.py --config=THIS --init_from={workdir} --workdir=runs/NAME\n"""\n\n'
        'from ml_collections import ConfigDict\n\nfrom configs import default\n\n\n'
        'def get_config() -> ConfigDict:\n    c = default.get_config()\n'
        + '\n'.join(lines) + '\n    return c\n'
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------
# Out
# ---------------------------------------------------------------------------------------------


def export_model(
    workdir: str,
    folder: str,
    step: int | None = None,
    averaged: bool = False,
    dtype: str = '',
    family_name: str = '',
    like: str = '',
    most_bytes: int = 5 * 10**9,
) -> None:
    """Writes a checkpoint's parameters, or their average, as a release; `like` is another workdir,
    or a release, whose config.json and tokenizer it takes."""
    started = time.perf_counter()
    files.check_target(folder)
    check_name(family_name)
    with Checkpointer(os.path.join(workdir, CHECKPOINTS)) as checkpoints:
        step = checkpoints.latest_step() if step is None else step
        if step is None:
            raise ConfigError(f'{workdir} holds no checkpoint; use the --workdir of a run')
        metadata = checkpoints.metadata(step)
        check_averaged(metadata['config'], workdir, averaged)
        config = saved_config(metadata['config'])
        m = model_config(config)
        small = release_files(like or workdir, bool(like))
        released = files.config_of(small, like or workdir)
        family = family_for(m, family_name or released_name(released))
        leaves = family.model_leaves(m)
        at = f'moments.{AVERAGE}.' if averaged else 'params.'
        saved = Saved(checkpoints.reader(step), at, metadata['leaves'])
        end = -1 if released else end_of(workdir)
        described = files.exported_config(m, family, released, config.seq_len, end)
        with interruption(f'nothing is left of {folder}; give the same command again'):
            nbytes = write_folder(folder, leaves, saved, dtype, most_bytes, small, described)
    say(summary(f'{family.name}: {folder} holds', nbytes, started))


def write_folder(
    folder: str,
    leaves: list[Leaf],
    saved: Saved,
    dtype: str,
    most_bytes: int,
    small: dict[str, bytes],
    described: dict[str, Any],
) -> int:
    """Writes a release, under its name once it is complete; returns the bytes of its weights."""
    check_zeros(leaves, saved)
    parent = os.path.dirname(os.path.abspath(folder))
    os.makedirs(parent, exist_ok=True)
    unfinished = tempfile.mkdtemp(prefix=os.path.basename(folder) + '.unfinished-', dir=parent)
    try:
        nbytes = write_weights(unfinished, leaves, saved, dtype, most_bytes)
        kind = dtype or str(saved.dtype(leaves[0]))
        files.write_small(unfinished, small, files.with_dtype(described, kind))
        os.chmod(unfinished, 0o755)
        os.rename(unfinished, folder)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return nbytes


def release_files(where: str, must: bool) -> dict[str, bytes]:
    """Returns the small files of the release that a workdir came from, or of a release."""
    found = files.kept(os.path.join(where, files.RELEASE))
    if must and not found:
        found = files.kept(where)
        if 'model_type' not in files.config_of(found, where):
            raise ConfigError(
                f'--like={where} holds no {files.CONFIG} of a release: name a release, or a '
                f'workdir that --from_hf made'
            )
    return found


def released_name(released: dict[str, Any]) -> str:
    """Returns the family of the release that a run came from, '' for none."""
    return family_of(Released(released, files.CONFIG)).name if released else ''


def end_of(workdir: str) -> int:
    """Returns end of text of a run's vocabulary, -1 if it has none, or is not here, and says so."""
    try:
        return end_of_text(run_encoding(workdir))
    except ConfigError as error:
        say(f'{files.CONFIG} will name no end of text: {error}')
        return -1


# ---------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------


def check_flags(f: flags.FlagValues) -> None:
    """Raises ConfigError unless the flags say one direction, and nothing of the other one."""
    if bool(f.from_hf) == bool(f.to_hf) or not f.workdir:
        raise ConfigError(
            'give --from_hf=FOLDER and --workdir=NEW to bring weights in, or --workdir=RUN and '
            '--to_hf=NEW to bring them out'
        )
    given = '--from_hf' if f.from_hf else '--to_hf'
    for name in ONLY_OUT if f.from_hf else ONLY_IN:
        if f[name].value != f[name].default:
            raise ConfigError(f'--{name} does not go with {given}: leave it out')
    if f.write_config and os.path.exists(f.write_config):
        raise ConfigError(
            f'--write_config={f.write_config} exists: remove it or choose another name'
        )


def main(_: list[str]) -> None:
    keep_freed_memory()
    processes.choose_platform(0)
    jax.config.update('jax_platforms', 'cpu')  # weights pass through the host's memory alone
    f = FLAGS
    with command.messages(CheckpointError, DamagedError):
        check_flags(f)
        if f.from_hf:
            processes.start(
                f.coordinator, f.num_processes, f.process_id, processes.HEARTBEAT_SECONDS
            )
            config = import_model(f.from_hf, f.workdir)
            if f.write_config and jax.process_index() == 0:
                name = family_of(read_config(f.from_hf)).name
                write_text(f.write_config, config_text(config, name, f.workdir))
        else:
            export_model(
                f.workdir, f.to_hf, f.step, bool(f.averaged), f.dtype, f.family, f.like or '',
                int(f.shard_gigabytes * 1e9),
            )  # fmt: skip


def define_flags() -> None:
    command.DEFINE_path('from_hf', None, 'Folder of a released model.')
    command.DEFINE_path('workdir', None, 'Folder or URL of the run.')
    command.DEFINE_path('write_config', '', 'With --from_hf: a config file to write.')
    command.DEFINE_path('to_hf', None, 'New folder for the weights of --workdir.')
    flags.DEFINE_integer('step', None, 'Checkpoint; by default the newest.', lower_bound=0)
    flags.DEFINE_boolean('averaged', None, 'The weights that optimizer.ema averages.')
    flags.DEFINE_enum(
        'dtype', '', ['', 'float32', 'bfloat16'], 'Type of the weights; as saved if empty.'
    )
    flags.DEFINE_float(
        'shard_gigabytes', 5.0, 'Most of a file, unless one tensor is larger.', lower_bound=1e-6
    )
    flags.DEFINE_string(
        'family', '', "Of families/table.py; by default the release's, or the first that fits."
    )
    command.DEFINE_path(
        'like', None, 'Release, or workdir that came from one, whose tokenizer the run has.'
    )
    command.define_process_flags()


if __name__ == '__main__':
    startup.hear_interrupts()
    command.run(main, define_flags)
