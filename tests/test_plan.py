"""The estimates against what compilers say, and the command that prints them."""

import importlib
import json
import math
import pathlib
import subprocess
import sys

import jax
import pytest
from common import small_config

import plan
from machine.chips import CHIPS, Chip, chip_of
from parallel import make_mesh
from planning import report
from planning.compiled import Reader, compile_step
from planning.footprint import memory, share
from planning.roofline import estimate
from planning.search import search
from runtime.config_checks import validate
from train_step import abstract_state, lower_train_step

ROOT = pathlib.Path(plan.__file__).parent
CONFIGS = sorted(p.stem for p in (ROOT / 'configs').glob('*.py') if p.stem != '__init__')
CPU = Chip('a CPU', 'cpu', ('cpu',), 1e11, 1e9, 1e10, 1e10, 'none')


def load(name: str):
    config = importlib.import_module(f'configs.{name}').get_config()
    config.data.path = config.data.path or 'somewhere'
    return config


@pytest.mark.parametrize('name', CONFIGS)
def test_every_config_has_a_plan_and_fits_its_chip(name):
    config = load(name)
    validate(config, 10_000)
    e = estimate(config, CHIPS.get(config.chip, CPU))
    assert e.fits
    assert 0 < e.mfu(e.seconds) <= e.mfu(e.overlapped_seconds) < 1
    assert e.computed > 0.97 * e.useful
    text = report.table(config, name, e)
    assert f'{e.parameters:,}' in text
    json.dumps(report.record(config, e))


def compiled(config):
    validate(config, 8)
    mesh = make_mesh(config.mesh)
    return lower_train_step(config, mesh).compile(), mesh


def test_state_and_network_are_those_of_the_compiled_step():
    """Parameters and moments to the byte, bytes along each axis within 3 %."""
    config = small_config('gqa', tied=False, microbatches=4)
    config.model.update(n_layers=8, block=('dense',), remat='full')
    config.mesh.update(dp=2, fsdp=2, tp=2)
    step, mesh = compiled(config)
    e = estimate(config, CPU)
    state = abstract_state(config, mesh)
    scalars = {k: v for k, v in state.items() if k not in ('params', 'moments')}
    others = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(scalars))
    others += 16 // 4 * 17 * 4  # the batch
    assert step.memory_analysis().argument_size_in_bytes == e.memory.state + others
    traffic = Reader(step.as_text(), mesh, CPU).cost().traffic
    sent = dict.fromkeys(('dp', 'fsdp', 'tp'), 0.0)
    for (_, axes), t in traffic.items():
        if axes in sent:
            sent[axes] += t.bytes
    for axis, n in sent.items():
        assert e.axis_bytes[axis] == pytest.approx(n, rel=0.03), axis


# Some with fewer kinds of layers than their config, so that they compile in a minute: one
# microbatch and several, stages, experts, both attentions, all kinds of rematerialization.
ONE_AXIS = {'pp': 1, 'fsdp': 32, 'tp': 1}
SPREAD = {
    'llama3_8b': ('llama3_8b', 'v5p:4x4x4', {}, {}, {}),
    'fsdp': ('tpu_v4', 'v4:2x4x4', {'microbatches': 1}, ONE_AXIS, {'block': ('dense',)}),
    'stages': ('tpu_v4', 'v4:2x4x4', {}, {}, {'block': ('dense',)}),
    'experts': (
        'tpu_v4', 'v4:2x4x4', {'microbatches': 1}, ONE_AXIS | {'fsdp': 16, 'ep': 2},
        {'block': ('moe',), 'n_layers': 8, 'remat': 'none'},
    ),
    'kept by name': (
        'gpu_h100', 'v5p:2x2x2', {'chip': 'v5p'}, {},
        {'remat': 'full', 'remat_keep': ('attention', 'qkv')},
    ),
}  # fmt: skip


@pytest.mark.tpu
@pytest.mark.parametrize('case', SPREAD)
def test_memory_is_what_the_tpu_compiler_says(case, tpu_devices):
    assert_memory_agrees(*SPREAD[case])


ON_GPU = {
    'gpu_h100': ('gpu_h100', 'h100:8', {}, {}, {}),
    'stages': (
        'tpu_v4', 'h100:8', {'chip': 'h100', 'batch_size': 64}, {'fsdp': 2}, {'block': ('dense',)}
    ),
    'experts': ('tpu_v4_best', 'h100:8', {'chip': 'h100', 'batch_size': 64}, {'fsdp': 8}, {}),
    'a head of its own': (
        'llama3_8b', 'h100:8', {'chip': 'h100', 'batch_size': 128, 'microbatches': 16},
        {'fsdp': 8}, {},
    ),
}  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize('case', ON_GPU)
def test_memory_is_what_the_gpu_compiler_says(case, gpu_compiler):
    assert_memory_agrees(*ON_GPU[case])


def assert_memory_agrees(name: str, topology: str, fields: dict, mesh: dict, model: dict):
    """The peak within 15 %; both say that it fits."""
    config = load(name)
    config.update(fields)
    config.mesh.update(mesh)
    config.model.update(model)
    validate(config, 64)
    e = estimate(config, CHIPS[config.chip])
    peak = compile_step(config, topology, e.chip).peak
    assert e.memory.peak == pytest.approx(peak, rel=0.15)
    assert e.fits
    assert peak < e.chip.memory


@pytest.mark.tpu
def test_out_of_memory_is_an_answer(tpu_devices):
    done = run_command(
        '--config=configs/tiny_dense.py', '--compile=v5e:2x2', '--config.batch_size=8192',
        '--config.seq_len=2048', '--config.model.d_model=1024', '--config.model.n_layers=16',
        '--json',
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert 'compiled for v5e:2x2: out of memory' in done.stdout
    assert "model.remat='none': 'full' keeps only the input" in done.stdout
    assert 'out_of_memory' in json.loads(done.stdout.splitlines()[-1])['compiled']


@pytest.mark.slow
def test_best_config_is_the_first_that_the_search_finds():
    """The TPU compiler has it so, too (docs/7_final_run.md)."""
    best, found = load('tpu_v4_best'), search(load('tpu_v4'), 32, CHIPS['v4'])[0][0][0]
    assert found.mesh == best.mesh
    assert found.microbatches == best.microbatches
    assert (found.model.remat, found.model.remat_keep) == (best.model.remat, best.model.remat_keep)


def test_search_finds_what_fits_and_is_fastest():
    config = small_config('gqa', microbatches=2)
    config.mesh.update(fsdp=2, tp=2)
    found, tried = search(config, 4, CPU)
    assert tried > 50
    times = [(e.seconds + e.overlapped_seconds) / 2 for _, e in found]
    assert times == sorted(times)
    for c, e in found:
        validate(c, 4)
        assert math.prod(c.mesh.values()) == 4
        assert e.fits
    given = estimate(config, CPU)
    assert times[0] <= (given.seconds + given.overlapped_seconds) / 2
    small = Chip('small', 'cpu', ('cpu',), 1e11, memory(share(config, 'cpu')).state, 1e10, 1e10, '')
    assert all(e.memory.peak < small.memory for _, e in search(config, 4, small)[0])


def run_command(*flags: str):
    command = [sys.executable, 'plan.py', *flags]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_command_prints_a_table_and_json():
    done = run_command('--config=configs/tpu_v4.py', '--json', '--config.mesh.fsdp=16',
                       '--config.mesh.tp=1')  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert 'limited by' in done.stdout
    result = json.loads(done.stdout.splitlines()[-1])
    assert result['mesh'] == {'pp': 2, 'dp': 1, 'fsdp': 16, 'ep': 1, 'tp': 1}
    assert result['devices'] == 32
    assert result['memory']['parameters'] * 32 > 4 * result['parameters'] * 0.9


def test_command_refuses_what_cannot_be():
    bad = run_command('--config=configs/tpu_v4.py', '--config.mesh.tp=5')
    assert bad.returncode != 0
    assert 'is not divisible by mesh.tp=5' in bad.stderr
    assert 'Traceback' not in bad.stderr


def test_chips_are_known_by_their_device_kind():
    assert chip_of('TPU v4') is CHIPS['v4']
    assert chip_of('TPU v5 lite') is CHIPS['v5e']
    assert chip_of('a toaster') is None
    assert all(chip.source for chip in CHIPS.values())
