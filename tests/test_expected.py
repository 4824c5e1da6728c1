"""What a step is expected to take: the model of efficiencies, its fit, and the published runs."""

import dataclasses
import importlib
import json
import math
import pathlib
import re
import statistics
import subprocess
import sys

import pytest
from common_commands import benchmark

from config import ConfigError
from configs import default
from machine.chips import CHIPS
from parallel import AXES
from planning import expected
from planning.expected import EFFICIENCIES, PRIORS, Efficiency, axis_rate, expected_seconds
from planning.footprint import Memory
from planning.roofline import Estimate, Transfer, Work, estimate

ROOT = pathlib.Path(__file__).resolve().parent.parent
MESH = dict.fromkeys(AXES, 1)


@pytest.fixture(scope='module')
def published():
    return benchmark('published')


@pytest.fixture(scope='module')
def runs(published):
    """All rows of docs/published.tsv, expressed."""
    return [published.express(row) for row in published.read_table(published.TABLE)]


def spans(mesh: dict[str, int]) -> dict[str, int]:
    sizes = [mesh[axis] for axis in AXES]
    return {axis: math.prod(sizes[i:]) for i, axis in enumerate(AXES)}


def step(chip: str, mesh: dict[str, int], work: list[Work], sent: dict[str, float]) -> Estimate:
    """An estimate of these parts alone."""
    memory = Memory(*[1.0] * (len(dataclasses.fields(Memory)) - 1), ahead=False)
    return Estimate(
        CHIPS[chip], math.prod(mesh.values()), 1000, 1, 1, 1.0, 1.0, memory, work,
        [Transfer(axis, '', n) for axis, n in sent.items()], (), 0.0, spans(mesh),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------


def test_seconds_are_those_added_up_by_hand():
    x = Efficiency(
        matmul=0.5, width=100, attention=0.25, experts=0.5, memory=0.5, network=0.5, hidden=0.75,
        doubling=0.01,
    )  # fmt: skip
    chip = CHIPS['v4']
    # 4 s of matmuls at the peak, of which 1 in experts, and 0.01 s more for each of 100; 1 s of
    # attention at the peak; 2 s of memory.
    work = Work('blocks', 5 * chip.flops, 2 * chip.bandwidth, chip.flops, chip.flops,
                0.01 * chip.flops)  # fmt: skip
    computed = (4 + 1 + 1) / 0.5 + 1 / 0.25 + 2 / 0.5
    mesh = MESH | {'fsdp': 4, 'tp': 4}
    rate = chip.link * 3 * math.log(4) / math.log(16)  # half of the torus' dimensions
    sent = {'fsdp': 10 * 0.5 * rate, 'tp': 3 * 0.5 * rate}
    seconds = expected_seconds(step('v4', mesh, [work], sent), x)
    assert seconds == pytest.approx((computed + 3 + 0.25 * 10) * 1.04)
    sent['fsdp'] *= 10  # more than 0.75 of the work hides
    seconds = expected_seconds(step('v4', mesh, [work], sent), x)
    assert seconds == pytest.approx((computed + 3 + 100 - 0.75 * computed) * 1.04)
    bubbly = dataclasses.replace(step('v4', MESH, [work, work], {}), bubble=0.2)
    assert expected_seconds(bubbly, x) == pytest.approx(computed * (1 + 1 / 0.8))


@pytest.mark.parametrize(
    ('chip', 'mesh', 'axis', 'links'),
    [
        ('v5p', {'fsdp': 512}, 'fsdp', 3),  # all three dimensions of the torus
        ('v6e', {'fsdp': 256}, 'fsdp', 2),
        ('v6e', {'fsdp': 16, 'tp': 16}, 'tp', 1),
        ('v5p', {'fsdp': 256, 'tp': 2}, 'tp', 1),  # never less than one
        ('h100', {'fsdp': 8}, 'fsdp', 1),
    ],
)
def test_an_axis_lies_along_the_links_that_it_spans(chip, mesh, axis, links):
    e = step(chip, MESH | mesh, [], {})
    assert axis_rate(e, axis) == pytest.approx(links * CHIPS[chip].link)


def test_nodes_are_entered_by_all_of_their_members():
    h100 = CHIPS['h100']
    assert axis_rate(step('h100', MESH | {'fsdp': 128}, [], {}), 'fsdp') == 8 * h100.outer
    assert axis_rate(step('h100', MESH | {'fsdp': 32, 'tp': 8}, [], {}), 'fsdp') == h100.outer
    assert axis_rate(step('h100', MESH | {'fsdp': 32, 'tp': 2}, [], {}), 'fsdp') == 4 * h100.outer
    assert axis_rate(step('h100', MESH | {'fsdp': 32, 'tp': 8}, [], {}), 'tp') == h100.link
    a100 = CHIPS['a100']
    assert axis_rate(step('a100', MESH | {'fsdp': 16}, [], {}), 'fsdp') == 8 * a100.outer


def config_of(name: str, chip: str, published, **fields):
    c = default.get_config()
    published.released_models.set_model(c, name)
    c.update(chip=chip, seq_len=4096, compute_dtype='bfloat16', check_vma=False)
    c.model.update(remat='full', attention_block=512)
    c.update(fields)
    return estimate(c, CHIPS[chip])


def test_narrow_matmuls_and_experts_are_those_counted_by_hand(published):
    """Llama 3 8B with 2 x 4,096 tokens on one of 4 devices of tp, and Mixtral with ep 4."""
    e = config_of('llama3-8b', 'h100', published, batch_size=2, mesh={'tp': 4})
    # (inputs, outputs) of a device: query, key, value, out, gate, up, down
    sizes = [(4096, 1024), (4096, 256), (4096, 256), (1024, 4096), (4096, 3584), (4096, 3584),
             (3584, 4096)]  # fmt: skip
    mean = sum(a * b / min(a, b, 8192) for a, b in sizes) / sum(a * b for a, b in sizes)
    blocks = e.work[0]
    assert blocks.narrow == pytest.approx((blocks.flops - blocks.attention) * mean)
    assert blocks.experts == 0

    e = config_of('mixtral-8x7b', 'h100', published, batch_size=8, mesh={'ep': 4})
    attention = 4096 * (4096 + 1024 + 1024 + 4096)
    routed, router = 3 * 2 * 4096 * 14_336, 4096 * 8
    blocks = e.work[0]
    matmuls = blocks.flops - blocks.attention
    part = routed / (attention + routed + router)
    assert blocks.experts == pytest.approx(matmuls * part)
    # 2 x 4,096 tokens of each of 4 devices, 2 of 8 experts: 8,192 rows an expert
    narrow = 4096 * 2 * (4096 / 4096 + 1024 / 1024) + router / 8 + routed / 4096
    assert blocks.narrow == pytest.approx(matmuls * narrow / (attention + routed + router))


def test_what_is_offloaded_is_not_computed_again(published):
    def of(**model):
        return config_of('llama3-8b', 'v5p', published, batch_size=2, model=model)

    kept, offloaded, none = of(remat_keep=('qkv',)), of(remat_offload=('qkv',)), of()
    assert offloaded.work[0].flops == kept.work[0].flops < none.work[0].flops
    assert offloaded.memory.activations == none.memory.activations < kept.memory.activations


@pytest.mark.parametrize('chip', ['v5p', 'v6e', 'tpu7x', 'h100', 'b200'])
@pytest.mark.parametrize('model', ['llama3.2-1b', 'llama3-8b', 'mixtral-8x7b'])
def test_more_devices_with_the_same_batch_each_are_not_faster_each(chip, model, published):
    times = []
    for n in (8, 16, 64, 512, 2048)[2 * (model == 'mixtral-8x7b') :]:  # on fewer it does not fit
        e = config_of(model, chip, published, batch_size=8 * n, mesh={'fsdp': n})
        times.append(expected_seconds(e))
    assert times == sorted(times)
    assert times[-1] < 1.5 * times[0]


def test_larger_microbatches_larger_models_and_fewer_parts_are_not_slower(published):
    def seconds_per_flop(e):
        return expected_seconds(e) / (e.tokens * e.useful)

    def of(model: str, **fields):
        return seconds_per_flop(config_of(model, 'h100', published, **fields))

    parts = [of('llama3-8b', batch_size=64, mesh={'fsdp': 8}, microbatches=m) for m in (8, 4, 2, 1)]
    assert parts == sorted(parts, reverse=True)
    names = ('llama3.2-1b', 'llama3.2-3b', 'llama3-8b', 'llama3-70b')
    sizes = [of(name, batch_size=64, mesh={'fsdp': 8}) for name in names]
    assert sizes == sorted(sizes, reverse=True)
    cut = [of('llama3-8b', batch_size=64, mesh={'fsdp': 64 // n, 'tp': n}) for n in (1, 2, 4, 8)]
    assert cut == sorted(cut)


@pytest.mark.parametrize(('dp', 'batch', 'mfu'), [(64, 2048, 0.43), (128, 2048, 0.41)])
def test_llama3_405b_at_scale_is_near_its_paper(dp, batch, mfu, published):
    """Grattafiori et al. 2024, table 4: tp 8, pp 16, interleaved, nothing computed again."""
    row = published.Row(
        'llama3-405b', 'h100', 128 * dp, 8192, batch / (128 * dp), (16, dp, 1, 1, 8, 1), None,
        'none', None, None, 'table 4, interleaved',
    )  # fmt: skip
    e = published.express(row).estimate
    assert 0.7 * mfu < e.mfu(expected_seconds(e)) < 1.2 * mfu


# ---------------------------------------------------------------------------------------------
# The fit and the published runs
# ---------------------------------------------------------------------------------------------


def test_a_fit_finds_the_efficiencies_that_made_the_times(runs):
    """Of runs without noise: times to 5 %, where the priors are up to 25 % off."""
    made = dataclasses.replace(PRIORS['tpu'], matmul=0.8, attention=0.25, memory=0.6)
    on_tpu = [x.estimate for x in runs if x.estimate.chip.platform == 'tpu']
    found = expected.fitted('tpu', [(e, expected_seconds(e, made)) for e in on_tpu])
    for e in on_tpu:
        assert expected_seconds(e, found) == pytest.approx(expected_seconds(e, made), rel=0.05)
    off = [expected_seconds(e, made) / expected_seconds(e, PRIORS['tpu']) for e in on_tpu]
    assert min(off) > 1.1
    assert_alike(expected.fitted('tpu', []), PRIORS['tpu'])


def assert_alike(a: Efficiency, b: Efficiency):
    assert dataclasses.asdict(a) == pytest.approx(dataclasses.asdict(b), rel=0.01)


def test_a_run_that_is_far_off_tells_little(runs):
    given = [(x.estimate, x.seconds) for x in runs if x.estimate.chip.platform == 'tpu']
    wrong = [(e, 10 * t if i == 3 else t) for i, (e, t) in enumerate(given)]
    right, other = expected.fitted('tpu', given), expected.fitted('tpu', wrong)
    for e, _ in given:
        assert expected_seconds(e, other) == pytest.approx(expected_seconds(e, right), rel=0.08)


@pytest.mark.parametrize('platform', ['tpu', 'gpu'])
def test_the_efficiencies_are_those_of_the_table(platform, published, runs):
    assert_alike(published.best(platform, runs), EFFICIENCIES[platform])


def test_published_runs_are_expected_without_themselves(published, runs):
    rows = [published.figures(x, runs) for x in runs]
    errors = [abs(r['error']) for r in rows]
    assert max(errors) < 0.2
    assert statistics.median(errors) < 0.1
    assert all(abs(r['mem_error']) < 0.1 for r in rows if r['mem_GiB'])
    assert sum(r['mem_GiB'] is not None for r in rows) == 2
    within = [
        abs(math.log1p(r['error'])) < 1.28 * EFFICIENCIES[x.estimate.chip.platform].spread
        for x, r in zip(runs, rows, strict=True)
    ]
    assert statistics.mean(within) >= 0.8
    for x in runs:
        assert x.estimate.mfu(expected_seconds(x.estimate)) < 0.75


def test_the_page_shows_these_figures(published, runs):
    page, measured = ((ROOT / 'docs' / name).read_text() for name in ('plan.md', 'measured.md'))
    rows = [published.figures(x, runs) for x in runs]
    table = re.findall(r'^\| (\S+) \| (\d+) .* \| ([\d,]+) \| ([\d,]+) \| (\S+) % \|$', page, re.M)
    assert len(table) == len(rows)
    for r, (model, chips, told, predicted, error) in zip(rows, table, strict=True):
        assert (r['model'], r['chips'], f'{r["tok_s"]:,.0f}') == (model, int(chips), told)
        assert float(predicted.replace(',', '')) == pytest.approx(r['predicted_tok_s'], rel=0.006)
        assert float(error) == pytest.approx(100 * r['error'], abs=0.3)
    errors = [100 * abs(r['error']) for r in rows]
    half, largest = re.search(r'errors are below (\S+) %, the largest is (\S+) %', page).groups()
    assert float(half) == pytest.approx(statistics.median(errors), abs=0.3)
    assert float(largest) == pytest.approx(max(errors), abs=0.3)
    assert f'{len(rows)} runs' in measured
    assert f'half within {half} %, all within {largest} %' in measured
    for f in dataclasses.fields(Efficiency)[:-1]:
        line = next(x for x in page.splitlines() if x.startswith(f'| `{f.name}` |'))
        shown = [float(x) for x in line.split('|')[3:5]]
        assert shown == [getattr(EFFICIENCIES[platform], f.name) for platform in ('tpu', 'gpu')]


def test_a_row_is_left_out_of_its_own_prediction(published, runs):
    def predicted(i: int, factor: float) -> list[float]:
        row = dataclasses.replace(runs[i].row, tok_s=factor * runs[i].row.tok_s)
        changed = [*runs[:i], dataclasses.replace(runs[i], row=row), *runs[i + 1 :]]
        return [published.figures(x, changed)['predicted_tok_s'] for x in changed[:4]]

    before, after = predicted(1, 1.0), predicted(1, 0.9)
    assert after[1] == before[1]
    assert all(b < a for i, (a, b) in enumerate(zip(before, after, strict=True)) if i != 1)


HEAD = (
    'model\tchip\tchips\tseq_len\tbatch_per_chip\tpp\tdp\tfsdp\tep\ttp\tcapacity_factor\tkept\t'
    'tok_s\tmfu_percent\tmem_GiB\tsource\n'
)


def test_the_command_takes_other_tables(tmp_path):
    """Other models and chips, what is not published, cards by their source, devices of chips."""
    table = tmp_path / 'runs.tsv'
    table.write_text(
        '# a comment\n'
        + HEAD
        + 'llama3.1-8b\th100\t8\t8192\t2\t1\t1\t8\t1\t1\t-\tselective\t6667\t-\t77.0\ttorchtitan\n'
        + 'llama2-13b\ta100\t64\t4096\t4\t1\t1\t64\t1\t1\t-\t-\t-\t-\t-\tnone\n'
        + 'gpt-oss-120b\ttpu7x\t64\t4096\t4\t1\t1\t64\t1\t1\t-\tfull\t9000\t-\t-\tx\n'
        + 'llama3.1-405b\th100\t512\t8192\t0.5\t8\t1\t8\t1\t8\t-\tfull\t100\t-\t82.5\t1F1B, fp8\n'
    )
    line = [sys.executable, 'benchmarks/published.py', f'--table={table}', '--json']
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])['rows']
    assert [(r['model'], r['chip'], r['chips']) for r in rows] == [
        ('llama3.1-8b', 'h100', 8), ('llama2-13b', 'a100', 64), ('gpt-oss-120b', 'tpu7x', 64),
        ('llama3.1-405b', 'h100', 512),
    ]  # fmt: skip
    assert rows[0]['predicted_tok_s'] == pytest.approx(6667, rel=0.1)
    assert rows[0]['predicted_mem_GiB'] == pytest.approx(77.0, rel=0.1)
    assert rows[1]['tok_s'] is None
    assert 1500 < rows[1]['predicted_tok_s'] < 3200
    assert any('what is kept is not published' in text for text in rows[1]['differs'])
    assert any('fsdp 64 x dp 2' in text for text in rows[2]['differs'])
    assert any('126 layers count as 128' in text for text in rows[3]['differs'])
    assert any('8 bits' in text for text in rows[3]['differs'])


RIGHT = {
    'model': 'llama3-8b', 'chip': 'v5p', 'chips': '8', 'seq_len': '8192', 'batch_per_chip': '2',
    'pp': '1', 'dp': '1', 'fsdp': '8', 'ep': '1', 'tp': '1', 'capacity_factor': '-',
    'kept': 'full', 'tok_s': '1', 'mfu_percent': '-', 'mem_GiB': '-', 'source': 'x',
}  # fmt: skip


@pytest.mark.parametrize(
    ('column', 'value', 'message'),
    [
        ('model', 'llama9-8b', "'llama9-8b' is unknown; use llama2-7b"),
        ('chip', 'v9', "line 2: the chip 'v9' is unknown"),
        ('kept', 'some', "line 2: kept='some' is unknown"),
        ('seq_len', 'many', "line 2: seq_len='many' is no int above 0"),
        ('tok_s', '-1', "line 2: tok_s='-1' is no float above 0"),
        ('chips', '-', "line 2: chips='-' is no int above 0"),
        ('source', 'x\ty', 'line 2 has 17 columns, and the head 16'),
    ],
)
def test_a_table_that_is_wrong_says_where(column, value, message, tmp_path, published):
    table = tmp_path / 'runs.tsv'
    table.write_text(HEAD + '\t'.join((RIGHT | {column: value}).values()) + '\n')
    with pytest.raises(ConfigError, match=message):
        published.read_table(str(table))


@pytest.mark.parametrize(
    ('fields', 'message'),
    [
        ({'mesh': (1, 1, 4, 1, 1, 1)}, 'the mesh is of 4 devices, not 8'),
        ({'mesh': (1, 1, 4, 2, 1, 1)}, 'has no experts'),
        ({'mesh': (1, 1, 1, 1, 8, 1), 'seq_len': 100}, 'llama3-8b on 8 v5p: the config cannot run'),
    ],
)
def test_a_row_that_no_config_is_near_says_why(fields, message, published):
    row = published.Row(
        'llama3-8b', 'v5p', 8, 4096, 2.0, (1, 1, 8, 1, 1, 1), None, 'full', 1.0, None, 'x'
    )
    with pytest.raises(ConfigError, match=message):
        published.express(dataclasses.replace(row, **fields))


def test_sizes_of_released_models_add_up_to_their_names(published):
    """Billions of parameters, as the releases count them: all, and those that a token meets."""
    known = {
        'llama2-7b': (6.74, 6.74), 'llama2-13b': (13.02, 13.02), 'llama2-70b': (68.98, 68.98),
        'llama3.1-8b': (8.03, 8.03), 'llama3.1-405b': (405.9, 405.9), 'llama3.2-1b': (1.24, 1.24),
        'mixtral-8x7b': (46.7, 12.9), 'mixtral-8x22b': (140.6, 39.2), 'deepseek-v2': (235.7, 21.4),
        'deepseek-v3': (671.0, 37.6), 'qwen3-235b-a22b': (235.1, 22.2), 'kimi-k2': (1026.4, 32.9),
        'gpt-oss-120b': (116.8, 5.7), 'qwen3-30b-a3b': (30.5, 3.3), 'qwen2.5-72b': (72.7, 72.7),
    }  # fmt: skip
    for name, (total, active) in known.items():
        e = config_of(name, 'v5p', published, batch_size=1)
        assert e.parameters / 1e9 == pytest.approx(total, rel=0.004), name
        assert e.active / 1e9 == pytest.approx(active, rel=0.02), name


def test_the_plan_prints_what_is_expected():
    from planning import report

    config = importlib.import_module('configs.tpu_v4').get_config()
    e = estimate(config, CHIPS['v4'])
    x, text = expected.expectation(e), report.table(config, 'a config', e)
    assert x.seconds.low < x.seconds.value < x.seconds.high
    assert x.tokens_per_second.low == pytest.approx(e.tokens / x.seconds.high)
    factor = math.exp(1.28 * EFFICIENCIES['tpu'].spread)
    assert x.mfu.high == pytest.approx(e.mfu(expected_seconds(e)) * factor)
    time = report.seconds(x.seconds.value)
    assert re.search(rf'time of a step +{time} +{report.seconds(x.seconds.low)} ', text)
    record = report.record(config, e)['expected']
    assert record['memory']['value'] == e.memory.peak
    assert record['seconds']['low'] == x.seconds.low
