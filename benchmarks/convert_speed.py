"""Bringing weights in and out, beside a plain sequential read and write of their bytes.

    python benchmarks/convert_speed.py --gigabytes=16 --folder=/mnt/disk
    python benchmarks/convert_speed.py --gigabytes=2 --rounds=3 --json

Makes a release of random weights in bfloat16, in files of 5 GB, with the shapes of Llama 3 8B and
as many layers as the size takes (below 6 GB half as wide). Each round reads all of its files and
writes one file of their bytes, block by block; imports them by convert.py, in a process of its own;
and exports them again. What is read has been dropped from the system's cache before, and what is
written is through to the disk at the end. The times are those of whole processes, their start
included; `memory` is the most that one had resident.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time

import common
import numpy as np
from absl import flags
from checkpoint_speed import BLOCK, drop_cached
from common import Figures

from families.exporting import tensors_of
from families.fields import Released
from families.llama import FAMILY
from families.rules import tensor_shape
from storage import safetensors

FLAGS = flags.FLAGS
ROOT = pathlib.Path(common.HERE).parent


def model_of(gigabytes: float) -> dict:
    """Returns the config.json of a model whose weights take about this size in bfloat16."""
    half = 2 if gigabytes < 6 else 1
    d, f, v, heads = 4096 // half, 14336 // half, 128256 // half, 32 // half
    layer = 2 * (2 * d * d + 2 * d * 1024 // half + 3 * d * f)
    n_layers = max(1, round((gigabytes * 1e9 - 4 * v * d) / layer))
    return {
        'model_type': 'llama', 'vocab_size': v, 'hidden_size': d, 'intermediate_size': f,
        'num_hidden_layers': n_layers, 'num_attention_heads': heads,
        'num_key_value_heads': 8 // half, 'head_dim': 128, 'rms_norm_eps': 1e-5,
        'rope_theta': 5e5, 'max_position_embeddings': 8192, 'tie_word_embeddings': False,
        'torch_dtype': 'bfloat16',
    }  # fmt: skip


def make_release(folder: pathlib.Path, gigabytes: float) -> int:
    """Writes a release of random weights; returns their bytes."""
    from config import model_config
    from convert import imported_config

    config = model_of(gigabytes)
    m = model_config(imported_config(FAMILY, Released(config, 'config.json')))
    dtype = safetensors.DTYPES['BF16']
    entries = [
        (name, dtype, tensor_shape(parts[0].leaf.rule, parts[0].leaf.part))
        for name, parts in tensors_of(FAMILY.model_leaves(m)).items()
    ]
    block = np.random.default_rng(0).integers(0x3C00, 0x3E00, 1 << 25, np.uint16).view(dtype)

    def numbers(entry: safetensors.Entry):
        rows, columns = entry[2][0], int(np.prod(entry[2][1:]))
        step = max(1, block.size // columns)
        for i in range(0, rows, step):
            n = min(step, rows - i)
            yield block[: n * columns].reshape(n, *entry[2][1:])

    folder.mkdir()
    groups = safetensors.split(entries, 5 * 10**9)
    files = {safetensors.file_name(i, len(groups)): g for i, g in enumerate(groups)}
    for name, group in files.items():
        pieces = (piece for entry in group for piece in numbers(entry))
        safetensors.write_file(str(folder / name), group, pieces)
    if len(files) > 1:
        (folder / safetensors.INDEX).write_text(safetensors.index(files))
    (folder / 'config.json').write_text(json.dumps(config))
    return sum(safetensors.nbytes(entry) for entry in entries)


def plain_copy(release: pathlib.Path, file: pathlib.Path) -> None:
    """Reads all files, one after the other, and writes one, through to the disk."""
    buffer = memoryview(bytearray(BLOCK))
    with open(file, 'wb', buffering=0) as out:
        for source in sorted(release.glob('*.safetensors')):
            with open(source, 'rb', buffering=0) as f:
                while n := f.readinto(buffer):
                    out.write(buffer[:n])
        os.fsync(out.fileno())


def convert(*arguments: str) -> tuple[float, int]:
    """Runs convert.py; returns its seconds, and the most bytes that it had resident."""
    start = time.perf_counter()
    process = subprocess.Popen([sys.executable, str(ROOT / 'convert.py'), *arguments])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise subprocess.CalledProcessError(status, 'convert.py')
    unit = 1 if sys.platform == 'darwin' else 1024
    return time.perf_counter() - start, usage.ru_maxrss * unit


def one_round(release: pathlib.Path, folder: pathlib.Path) -> dict[str, float]:
    """Returns the seconds and the memory of everything, done once."""
    drop_cached(release)
    times = {'plain': common.timed(plain_copy, release, folder / 'plain')[0]}
    os.remove(folder / 'plain')
    run, out = folder / 'run', folder / 'out'
    drop_cached(release)
    times['import'], times['import_memory'] = convert(f'--from_hf={release}', f'--workdir={run}')
    drop_cached(run)
    if FLAGS.out:
        times['export'], times['export_memory'] = convert(f'--workdir={run}', f'--to_hf={out}')
        shutil.rmtree(out)
    shutil.rmtree(run)
    return times


def main() -> Figures:
    with tempfile.TemporaryDirectory(dir=FLAGS.folder) as name:
        folder = pathlib.Path(name)
        n_bytes = make_release(folder / 'release', FLAGS.gigabytes)
        rounds = [one_round(folder / 'release', folder) for _ in range(FLAGS.rounds)]
    figures: Figures = {'bytes': n_bytes, 'rounds': len(rounds)}
    done = ('import', 'export') if FLAGS.out else ('import',)
    for name, value in common.medians(rounds).items():
        memory = name.endswith('memory')
        figures[name + ('_gb' if memory else '_seconds')] = value / 1e9 if memory else value
    return figures | common.medians(
        [{f'{name}_over_plain': r[name] / r['plain'] for name in done} for r in rounds]
    )


if __name__ == '__main__':
    flags.DEFINE_float('gigabytes', 2.0, 'Size of the weights.', lower_bound=0.01)
    flags.DEFINE_integer('rounds', 3, 'Rounds.', lower_bound=1)
    flags.DEFINE_string('folder', None, 'Where to write; the system folder for temporary files.')
    flags.DEFINE_boolean('out', True, 'Also export.')
    common.run(main)
