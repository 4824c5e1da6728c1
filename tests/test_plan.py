"""The estimates against the compilers' figures, the search, and the command that prints them."""

import importlib
import json
import pathlib
import re
import shlex
from collections import Counter
from importlib.metadata import version

import jax
import jax.numpy as jnp
import pytest
from common import KINDS, small_config
from common_commands import run_command
from jax.sharding import Mesh

import optimizer
import plan
from config import model_config, model_kinds, of_layer
from layers.attention import attention_sizes
from layers.context_parallel import STYLES
from machine.chips import CHIPS, Chip, chip_of
from parallel import Tree, make_mesh, specs
from planning import report
from planning.compiled import Walk, compile_step, read_cost
from planning.hlo import Instruction, Program, parse
from planning.prices import Cost, Traffic, matmul_flops
from planning.roofline import NEWTON_SCHULZ, Estimate, estimate
from runtime.config_checks import validate
from train_step import abstract_state, lower_train_step, setup

ROOT = pathlib.Path(plan.__file__).parent
CONFIGS = sorted(p.stem for p in (ROOT / 'configs').glob('*.py') if p.stem != '__init__')
CPU = Chip('a CPU', 'cpu', ('cpu',), 1e11, 1e9, 1e10, 1e10, 'none')


def load(name: str):
    return importlib.import_module(f'configs.{name}').get_config()


@pytest.mark.parametrize('name', CONFIGS)
def test_every_config_has_a_plan_and_fits_its_chip(name):
    config = load(name)
    validate(config, 10_000, needs_data=False)
    e = estimate(config, CHIPS.get(config.chip, CPU))
    assert e.fits
    assert 0 < e.mfu(e.seconds) <= e.mfu(e.overlapped_seconds) < 1
    assert e.computed > 0.97 * e.useful
    text = report.table(config, name, e)
    assert f'{e.parameters:,}' in text
    json.dumps(report.record(config, e))


A2A = 'all-to-all'

OPTIMIZERS = {
    'adamw': {'ema': 0.0},
    'muon': {'name': 'muon', 'ema': 0.9},
    'muon, split': {'name': 'muon', 'ema': 0.9, 'muon': {'replicas': 'split'}},
}


@pytest.mark.parametrize('name', OPTIMIZERS)
def test_state_and_network_are_those_of_the_compiled_step(name):
    """Parameters and slots to the byte, traffic along each axis within 3 %; of Muon's matrices
    FLOPs and bytes to the last one, with those of the padding."""
    config = small_config('gqa', tied=False, microbatches=4)
    config.model.update(n_layers=7, block=('dense',), remat='full')
    config.mesh.update(dp=2, fsdp=2, tp=2)
    config.optimizer.update(OPTIMIZERS[name])
    validate(config, 8)
    s = setup(config, make_mesh(config.mesh))
    step, state, e = lower_train_step(s).compile(), abstract_state(s), estimate(config, CPU)
    scalars = {k: v for k, v in state.items() if k not in ('params', 'moments')}
    others = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(scalars))
    others += 16 // 4 * 17 * 4  # the batch
    assert step.memory_analysis().argument_size_in_bytes == e.memory.state + others
    traffic = read_cost(step.as_text(), s.mesh, CPU).traffic
    sent = dict.fromkeys(('dp', 'fsdp', 'tp'), 0.0)
    for (_, axes), t in traffic.items():
        if axes in sent:
            sent[axes] += t.bytes
    for axis, n in sent.items():
        assert e.axis_bytes[axis] == pytest.approx(n, rel=0.03), axis
    assert_muon_agrees(e, step.as_text(), s.mesh, {'dp': 'all-gather', 'fsdp': A2A, 'tp': A2A})


def test_kinds_of_layers_are_those_of_the_compiled_step():
    """The state to the byte, and what tp gathers and scatters: with a gate D numbers more."""
    config = small_config(tied=False, microbatches=2)
    config.model.update(KINDS['mla'], n_layers=4, remat='full')
    config.mesh.update(tp=2)
    validate(config, 8)
    s, e = setup(config, make_mesh(config.mesh)), estimate(config, CPU)
    step, state = lower_train_step(s).compile(), abstract_state(s)
    scalars = {k: v for k, v in state.items() if k not in ('params', 'moments')}
    others = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(scalars)) + 16 * 17 * 4
    assert step.memory_analysis().argument_size_in_bytes == e.memory.state + others
    traffic = read_cost(step.as_text(), s.mesh, CPU).traffic
    sent = sum(t.bytes for (_, axes), t in traffic.items() if axes == 'tp')
    assert e.axis_bytes['tp'] == pytest.approx(sent, rel=0.005)


def matmul_price(i: Instruction, program: Program, _: Chip) -> Cost:
    """Returns the FLOPs of a matmul."""
    return Cost(flops=matmul_flops(i, program))


def test_a_window_saves_the_flops_that_the_compiled_step_saves():
    """Two windows of many blocks: their difference, in which nothing else takes part."""
    found = {}
    for window in (32, 96):
        config = small_config('gqa', tied=False)
        config.seq_len, config.batch_size = 256, 2
        config.model.update(
            block=('gqa_window+dense',), n_layers=1, window=window, attention_block=4
        )
        s, e = setup(config, make_mesh({})), estimate(config, CPU)
        program = parse(lower_train_step(s).compile().as_text())
        compiled = Walk(program, s.mesh, CPU, matmul_price).cost(program.entry)
        found[window] = (compiled.flops, e.computed * e.tokens)
    saved, said = (b - a for a, b in zip(found[32], found[96], strict=True))
    assert saved == pytest.approx(said, rel=0.02)


def delta_step_config(kind: str, remat: str = 'none', **changes):
    config = small_config(tied=False)
    config.seq_len, config.batch_size = 256, 2
    config.model.update(
        block=(f'{kind}+dense',), n_layers=2, attention_block=128, remat=remat, delta_heads=4,
        delta_key_dim=32, delta_value_dim=32,
    )  # fmt: skip
    config.update_from_flattened_dict(changes)
    validate(config, 8)
    return config


@pytest.mark.parametrize(
    ('kind', 'remat', 'cp'),
    [
        ('gdn', 'none', 1),
        pytest.param('gdn', 'full', 2, marks=pytest.mark.slow),
        pytest.param('kda', 'full', 1, marks=pytest.mark.slow),
    ],
)
def test_linear_layers_have_the_flops_of_the_compiled_step(kind, remat, cp):
    config = delta_step_config(kind, remat, **{'mesh.cp': cp})
    s, e = setup(config, make_mesh(config.mesh)), estimate(config, CPU)
    program = parse(lower_train_step(s).compile().as_text())
    compiled = Walk(program, s.mesh, CPU, matmul_price).cost(program.entry).flops
    assert compiled * cp == pytest.approx(e.computed * e.tokens, rel=0.1)


@pytest.mark.parametrize('kind', ['gdn', pytest.param('kda', marks=pytest.mark.slow)])
def test_what_linear_layers_send_over_cp_is_that_of_the_compiled_step(kind):
    config = delta_step_config(kind, 'full', **{'mesh.cp': 2})
    s, e = setup(config, make_mesh(config.mesh)), estimate(config, CPU)
    traffic = read_cost(lower_train_step(s).compile().as_text(), s.mesh, CPU).traffic
    sent = sum(t.bytes for (_, axes), t in traffic.items() if axes == 'cp')
    assert e.axis_bytes['cp'] == pytest.approx(sent, rel=0.03)


@pytest.mark.parametrize('cp', [2, pytest.param(4, marks=pytest.mark.slow)])
@pytest.mark.parametrize('style', STYLES)
@pytest.mark.parametrize(
    ('attention', 'remat', 'keep'),
    [
        ('mla', 'full', ()),
        pytest.param('gqa', 'full', ('attention',), marks=pytest.mark.slow),
        pytest.param('mla', 'none', (), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_what_travels_over_cp_is_that_of_the_compiled_step(attention, remat, keep, style, cp):
    config = small_config(attention, tied=False, microbatches=2)
    config.seq_len, config.cp_style = 128, style
    config.model.update(n_layers=4, block=('dense',), remat=remat, remat_keep=keep)
    config.mesh.update(cp=cp)
    validate(config, 8)
    s = setup(config, make_mesh(config.mesh))
    traffic = read_cost(lower_train_step(s).compile().as_text(), s.mesh, CPU).traffic
    sent = sum(t.bytes for (_, axes), t in traffic.items() if axes == 'cp')
    assert estimate(config, CPU).axis_bytes['cp'] == pytest.approx(sent, rel=0.05)


def test_latents_are_a_sixth_of_the_heads_at_most():
    for name in ('tpu_v4', 'long_context', 'deepseek_v3'):
        cfg = model_config(load(name))
        for kind in model_kinds(cfg):
            sizes = attention_sizes(of_layer(cfg, kind))
            assert 6 * sizes.travels <= sizes.kv_heads * (sizes.key + sizes.value)


def assert_muon_agrees(e: Estimate, text: str, mesh: Mesh, kinds: dict[str, str]):
    """FLOPs of Newton-Schulz, and bytes along each axis, in which only Muon has collectives of this
    kind."""
    program = parse(text)
    cost = Walk(program, mesh, CPU, newton_schulz_price).cost(program.entry)
    assert cost.flops == sum(shape.flops for shape in e.of_muon)
    sent = Counter()
    for shape in e.of_muon:
        sent.update(dict(shape.sent))
    for axis, kind in kinds.items():
        assert sent[axis] == cost.traffic.get((kind, axis), Traffic()).bytes, axis


def newton_schulz_price(i: Instruction, program: Program, _: Chip) -> Cost:
    """Returns the FLOPs of a matmul of Newton-Schulz; nothing for any other instruction."""
    return Cost(flops=matmul_flops(i, program) if 'newton_schulz' in i.text else 0.0)


def test_muons_update_costs_the_same_with_stages_experts_and_heads():
    """The update alone, in which layers before the stages are alike on all of them."""
    config = small_config('mla', tied=False, moe=True)
    config.mesh.update(pp=2, fsdp=2, ep=2)
    config.optimizer.update(name='muon', muon={'split_heads': True, 'replicas': 'split'})
    validate(config, 8)
    s = setup(config, make_mesh(config.mesh))
    like = abstract_state(s)
    layout = specs(s.declared), specs(s.slots)

    def update(params: Tree, grads: Tree, slots: Tree) -> tuple[Tree, Tree]:
        return optimizer.muon(
            params, grads, slots, jnp.float32(0.1), jnp.int32(0), s.declared, s.optimizer
        )

    step = jax.jit(
        jax.shard_map(update, mesh=s.mesh, in_specs=(layout[0], *layout), out_specs=layout)
    )
    text = step.lower(like['params'], like['params'], like['moments']).compile().as_text()
    e = estimate(config, CPU)
    assert_muon_agrees(e, text, s.mesh, {'pp': 'all-gather', 'ep': 'all-gather', 'fsdp': A2A})
    assert {shape.alike for shape in e.of_muon} == {1}


def test_homes_and_padding_are_those_counted_by_hand():
    """5 layers of 4 attention matrices of 32 x 64, and of 3 in the feed-forward, 32 x 48."""
    config = small_config('gqa', tied=False)
    config.model.update(n_layers=5, block=('dense',))
    config.optimizer.name = 'muon'
    config.mesh.update(dp=2, fsdp=4, tp=2)
    attention, feed_forward = estimate(config, CPU).of_muon
    assert (attention.rows, attention.columns, attention.matrices) == (32, 64, 20)
    assert (attention.homes, attention.per_home, attention.alike) == (8, 3, 2)
    assert attention.padding == pytest.approx(4 / 24)
    assert attention.flops == 3 * 5 * (4 * 32 * 32 * 64 + 2 * 32 * 32 * 32)
    three = 3 * 32 * 64 * 4  # bytes of three matrices in float32, there and back
    assert dict(attention.sent) == {'fsdp': 2 * three * 3 / 4, 'tp': 2 * three / 2}
    assert (feed_forward.matrices, feed_forward.per_home) == (15, 2)
    assert feed_forward.padding == pytest.approx(1 / 16)

    config.optimizer.muon.replicas = 'split'  # 20 on 16 homes, two on each: 12 of 32 are padding
    attention = estimate(config, CPU).of_muon[0]
    assert (attention.homes, attention.per_home, attention.alike) == (16, 2, 1)
    assert attention.padding == pytest.approx(12 / 32)
    two = 2 * 32 * 64 * 4
    # Over dp each device gives the other all that its eight homes, and it, brought together.
    assert dict(attention.sent) == {'fsdp': 2 * two * 3 / 4, 'tp': 2 * two / 2, 'dp': two}

    config.optimizer.muon.split_heads = True  # 4 · 8 heads a layer, 8 x 32, halved by tp
    heads = next(x for x in estimate(config, CPU).of_muon if x.rows == 8)
    assert (heads.columns, heads.matrices, heads.homes, heads.per_home) == (32, 80, 8, 10)
    assert heads.padding == 0


def test_experts_are_matrices_of_their_own_devices():
    """8 experts of 3 matrices in each of 2 layers, over ep 2: 24 on a device, 12 for each home."""
    config = small_config('gqa', moe=True)
    config.optimizer.name = 'muon'
    config.mesh.update(fsdp=2, ep=2)
    experts = next(x for x in estimate(config, CPU).of_muon if (x.rows, x.columns) == (16, 32))
    assert (experts.matrices, experts.homes, experts.per_home) == (24, 2, 12)


# The peak is in the update, as the batch is small.
MUON = {
    'batch_size': 8, 'seq_len': 1024, 'microbatches': 1, 'model': {'remat': 'full'},
    'optimizer': {'name': 'muon'},
}  # fmt: skip


@pytest.mark.tpu
def test_cutting_sequences_over_8_devices_takes_a_fifth_of_the_memory(tpu_devices):
    cut = assert_memory_agrees('long_context', 'v5p:4x4x4', {}, {}, {})
    assert cut <= 0.2 * assert_memory_agrees('long_context', 'v5p:2x2x2', {}, {'cp': 1}, {})


def test_a_small_batch_has_its_peak_in_the_update():
    config = load('gpu_h100')
    config.update(MUON)
    e = estimate(config, CHIPS['v5p'])
    m, largest = e.memory, 11 * 3072 * 8192  # numbers of the matrices on a home: 84 on 8
    assert m.update == (2 + 2 * 4) * largest  # in bfloat16, and twice in float32
    assert m.peak == m.state + m.parameters + m.update
    assert re.search(r'peak, in the update +7.62 GB', report.table(config, 'a config', e))
    config.optimizer.name = 'adamw'
    assert estimate(config, CHIPS['v5p']).memory.update == 0


@pytest.mark.gpu
def test_newton_schulz_has_the_flops_that_the_gpu_compiler_counts(gpu_compiler):
    config = load('gpu_h100')
    config.update(MUON)
    e = estimate(config, CHIPS['h100'])
    with_muon = compile_step(config, 'h100:8', e.chip).cost.flops
    config.optimizer.name = 'adamw'
    without = compile_step(config, 'h100:8', e.chip).cost.flops
    assert with_muon - without == sum(shape.flops for shape in e.of_muon)


def assert_memory_agrees(name: str, topology: str, fields: dict, mesh: dict, model: dict) -> int:
    """The peak within 15 %, and both say that it fits; returns the compiler's."""
    config = load(name)
    config.update(fields)
    config.mesh.update(mesh)
    config.model.update(model)
    validate(config, 64, needs_data=False)
    e = estimate(config, CHIPS[config.chip])
    peak = compile_step(config, topology, e.chip).peak
    assert e.memory.peak == pytest.approx(peak, rel=0.15)
    assert e.fits
    assert peak < e.chip.memory
    return peak


@pytest.fixture
def run_plan(capsys):
    """The command in this process: its flags -> what it prints to standard output."""

    def run(*argv: str) -> str:
        run_command(plan, *argv)
        return capsys.readouterr().out

    return run


TPU_V4 = f'--config={ROOT}/configs/tpu_v4.py'


def test_command_prints_a_table_and_json(run_plan):
    printed = run_plan(TPU_V4, '--json', '--config.mesh.fsdp=16', '--config.mesh.tp=1')
    assert 'limited by' in printed
    result = json.loads(printed.splitlines()[-1])
    assert result['mesh'] == {'pp': 2, 'dp': 1, 'fsdp': 16, 'ep': 1, 'cp': 1, 'tp': 1}
    assert result['devices'] == 32
    assert result['memory']['parameters'] * 32 > 4 * result['parameters'] * 0.9


def test_command_prints_what_each_home_of_muon_takes(run_plan):
    printed = run_plan(TPU_V4, '--json', '--config.optimizer.name=muon')
    result = json.loads(printed.splitlines()[-1])
    # 5 dense layers of 3 matrices in each of 4 blocks of a stage: 60 on 16 homes, 4 on each.
    shape = next(x for x in result['muon'] if (x['rows'], x['columns']) == (768, 1536))
    assert (shape['matrices'], shape['homes'], shape['per_home']) == (60, 16, 4)
    assert shape['padding'] == 1 / 16
    flops = sum(w['flops'] for w in result['work'])
    line = f'768 x 1,536: 60 on 16 homes +4 +6.2% +{shape["flops"] / flops:.2%}\n'
    assert re.search(line, printed)
    work = next(w for w in result['work'] if w['part'] == NEWTON_SCHULZ)
    assert work['flops'] == sum(x['flops'] for x in result['muon'])
    assert 'homes' not in run_plan(TPU_V4)


def test_command_searches(run_plan):
    flags = (
        '--config.mesh.pp=1',
        '--config.batch_size=8',
        '--config.microbatches=1',
        '--devices=2',
    )
    printed = run_plan(TPU_V4, '--search', '--best=1', '--json', *flags)
    result = json.loads(printed.splitlines()[-1])
    assert f'{result["tried"]} layouts compared' in printed
    assert len(result['best']) == 1
    best = result['best'][0]
    assert best['fits']
    assert best['expected_seconds'] == best['expected']['seconds']['value']
    assert f'expected: {report.seconds(best["expected_seconds"])} a step' in printed
    assert 'bounds of a step' in printed


@pytest.mark.parametrize(
    ('flag', 'message'),
    [
        ('--config.mesh.tp=5', 'is not divisible by mesh.tp=5'),
        ('--chip=abacus', "the chip 'abacus' is unknown"),
        ('--compile=h100:many', 'use h100:8'),
    ],
)
def test_command_exits_with_what_is_wrong(run_plan, flag, message):
    with pytest.raises(SystemExit, match=message):
        run_plan(TPU_V4, flag)


def test_command_shows_the_traceback_of_a_bug(run_plan, monkeypatch):
    monkeypatch.setattr(plan, 'estimate', lambda *_: [].index('missing'))
    with pytest.raises(ValueError, match='not in list'):
        run_plan(TPU_V4)


def test_flags_of_a_layout_are_those_that_a_shell_takes(run_plan):
    base, found = load('tpu_v4'), load('tpu_v4')
    found.mesh.update(fsdp=16, tp=1)
    found.model.update(remat='full', remat_keep=('attention', 'residual'))
    argv = shlex.split(report.overrides(found, base))
    assert "'" not in report.overrides(found, base)
    result = json.loads(run_plan(TPU_V4, *argv, '--json').splitlines()[-1])
    assert result['mesh']['fsdp'] == 16
    assert result['remat_keep'] == ['attention', 'residual']
    base.model.remat_keep = ('attention',)
    found.model.remat_keep = ('residual',)
    argv = [
        TPU_V4,
        '--config.model.remat_keep=attention',
        *shlex.split(report.overrides(found, base)),
    ]
    assert json.loads(run_plan(*argv, '--json').splitlines()[-1])['remat_keep'] == ['residual']


@pytest.mark.parametrize(
    ('flag', 'message'),
    [
        ('--config.model.d_ff=0', r'model\.d_ff=0 is out of range'),
        ('--config.model.remat_keep=heads', "has the unknown 'heads'"),
        ('--devices=7', 'no layout of 7 devices divides the config'),
    ],
)
def test_a_search_that_can_find_nothing_says_why(run_plan, flag, message):
    with pytest.raises(SystemExit, match=message):
        run_plan(TPU_V4, '--search', flag)


def test_a_search_says_how_far_it_is(run_plan, monkeypatch, capsys):
    monkeypatch.setattr(plan.time, 'monotonic', iter(range(10**6)).__next__)
    small = ('--devices=2', '--config.batch_size=2', '--config.microbatches=1')
    run_command(plan, TPU_V4, '--search', *small)
    assert '55 layouts compared' in capsys.readouterr().err


@pytest.mark.tpu
def test_out_of_memory_is_an_answer(run_plan, tpu_devices):
    printed = run_plan(
        f'--config={ROOT}/configs/tiny_dense.py', '--compile=v5e:2x2', '--config.batch_size=8192',
        '--config.seq_len=2048', '--config.model.d_model=1024', '--config.model.n_layers=16',
        '--json',
    )  # fmt: skip
    assert 'compiled for v5e:2x2: out of memory' in printed
    assert "model.remat='none': 'full' keeps only the input" in printed
    answer = json.loads(printed.splitlines()[-1])['compiled']
    assert 'out_of_memory' in answer
    assert answer['compiler'] == {x: version(x) for x in ('libtpu', 'jax')}
    assert f'by libtpu {version("libtpu")}, jax {version("jax")}' in printed


def test_chips_are_known_by_their_device_kind():
    assert chip_of('TPU v4') is CHIPS['v4']
    assert chip_of('TPU v5 lite') is CHIPS['v5e']
    assert chip_of('a toaster') is None
    assert all(chip.source for chip in CHIPS.values())
