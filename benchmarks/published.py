"""Published throughput of training runs beside what plan.py expects of them.

    python benchmarks/published.py
    python benchmarks/published.py --table=runs.tsv --json
    python benchmarks/published.py --fit       # the efficiencies for planning/expected.py

Makes a config of each row of a table with the columns of docs/published.tsv: the released model by
its name, the mesh, the batch, and of rematerialization what comes nearest. Three figures stand
beside the published one. `expected` is what plan.py says today. `left out` is by efficiencies that
are fitted to all other rows, those of docs/published.tsv included; this is the honest error, and
the predicted_tok_s of --json. Memory is estimated, not fitted. What the published program does
otherwise is said below the table.
"""

import csv
import dataclasses
import io
import math
import os
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import common
import jax
import released_models
from absl import flags
from ml_collections import ConfigDict

from config import ConfigError
from configs import default
from machine.chips import CHIPS, GIB, Chip
from parallel import TP
from planning.expected import (
    EFFICIENCIES,
    PRIORS,
    Efficiency,
    expected_seconds,
    fitted,
    spread_of,
)
from planning.roofline import Estimate, estimate
from planning.search import REMAT_CHOICES
from runtime.config_checks import validate

FLAGS = flags.FLAGS
TABLE = os.path.join(os.path.dirname(common.HERE), 'docs/published.tsv')
MESH = ('pp', 'dp', 'fsdp', 'ep', 'tp')
COLUMNS = (
    'model', 'chip', 'chips', 'seq_len', 'batch_per_chip', *MESH, 'capacity_factor', 'kept',
    'tok_s', 'mem_GiB', 'source',
)  # fmt: skip
UNKNOWN = ('-', '')

# kept -> model.remat_keep, model.remat_offload, and what differs. Layer inputs are always kept.
NAMED = ('attention', 'qkv', 'residual', 'hidden')
KEPT: dict[str, tuple[tuple[str, ...], tuple[str, ...], str]] = {
    'full': ((), (), ''),
    'attention': (NAMED[:1], (), ''),
    'qkv': (NAMED[:2], (), ''),
    'offload': ((), ('qkv', 'residual'), ''),
    'offload_no_out': ((), ('qkv',), 'layer inputs are in host memory there, and here on the chip'),
    'selective': (NAMED, (), 'every other matmul of a layer is computed again there: its FLOPs are '
                  'added, and the arrays counted as kept'),
    'none': (NAMED, (), ''),
    # by MaxText's names
    'minimal': (NAMED, (), ''),
    'minimal_offloaded': ((), ('qkv', 'residual', 'hidden'), ''),
    'qkv_proj_offloaded': ((), ('qkv',), ''),
    'save_qkv_proj': (('qkv',), (), ''),
    'save_out_proj': (('residual',), (), ''),
    'save_dot_except_mlp': (NAMED[:3], (), ''),
    'save_dot_except_mlpwi': (NAMED[:3], (), ''),
}  # fmt: skip
AGAIN = 0.37  # of a dense layer's matmuls, that 'selective' computes again: wk, wo and w3

# Cards that go by the name of others: (chip, a word of the source) -> chip.
CARDS = {('h100', 'torchtitan'): 'h100-96gb'}


# ---------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a table. None: the source does not say."""

    model: str
    chip: str
    chips: int
    seq_len: int
    batch_per_chip: float | None  # sequences
    mesh: tuple[int, ...]  # of MESH and cp, over chips
    capacity_factor: float | None
    kept: str | None
    tok_s: float | None  # of a chip
    mem_GiB: float | None  # noqa: N815 (as the column is called)
    source: str

    @property
    def key(self) -> tuple[Any, ...]:
        """The values that two rows of one run share."""
        name = released_models.known_as(self.model)
        return name, card(self), self.chips, self.seq_len, self.mesh


def read_table(path: str) -> list[Row]:
    """Reads a table of tab-separated columns, whose comments begin with '#'. Raises ConfigError,
    with the number of the line, if it lacks a column or a value is no number."""
    try:
        with open(path, encoding='utf-8') as f:
            lines = f.read().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f'{path} cannot be read ({error}); give --table a file') from error
    numbered = [(i, x) for i, x in enumerate(lines, 1) if x.strip() and not x.startswith('#')]
    if not numbered:
        raise ConfigError(f'{path} has no rows; its first is the names of the columns')
    names = next(csv.reader(io.StringIO(numbered[0][1]), delimiter='\t'))
    missing = [name for name in COLUMNS if name not in names]
    if missing:
        raise ConfigError(
            f'{path} lacks the columns {", ".join(missing)}; separate by tabs {", ".join(COLUMNS)}'
        )
    return [read_row(x.split('\t'), names, f'{path}, line {i}') for i, x in numbered[1:]]


def read_row(values: Sequence[str], names: Sequence[str], where: str) -> Row:
    """Returns a row. Raises ConfigError, which begins with `where`, for a value that is wrong."""
    if len(values) != len(names):
        raise ConfigError(f'{where} has {len(values)} columns, and the head {len(names)}')
    given = {name: x.strip() for name, x in zip(names, values, strict=True)}

    def number(name: str, kind: Callable[[str], Any] = float, needed: bool = False) -> Any:
        text = given.get(name, '1')
        if text in UNKNOWN and not needed:
            return None
        try:
            value = kind(text)
        except ValueError:
            value = 0
        if not 0 < value < math.inf:
            raise ConfigError(f'{where}: {name}={text!r} is no {kind.__name__} above 0')
        return value

    kept = None if given['kept'] in UNKNOWN else given['kept']
    if kept not in (None, *KEPT):
        raise ConfigError(f'{where}: kept={kept!r} is unknown; use {", ".join(KEPT)} or -')
    row = Row(
        given['model'], given['chip'].lower(), number('chips', int, True),
        number('seq_len', int, True), number('batch_per_chip'),
        tuple(number(axis, int) or 1 for axis in (*MESH, 'cp')), number('capacity_factor'), kept,
        number('tok_s'), number('mem_GiB'), given['source'],
    )  # fmt: skip
    released_models.fields_of(row.model)  # or says which there are
    if card(row) not in CHIPS:
        raise ConfigError(f'{where}: the chip {row.chip!r} is unknown; use {", ".join(CHIPS)}')
    return row


def card(row: Row) -> str:
    """Returns the name in CHIPS of a row's chip."""
    for (chip, word), name in CARDS.items():
        if chip == row.chip and word in row.source.lower():
            return name
    return row.chip


# ---------------------------------------------------------------------------------------------
# A row as a config
# ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Expressed:
    """A row as this project plans it, and what the published program does otherwise."""

    row: Row
    config: ConfigDict
    estimate: Estimate
    differs: tuple[str, ...]

    @property
    def seconds(self) -> float:
        """Published seconds of a step."""
        return self.estimate.tokens / (self.row.tok_s * self.row.chips)

    def tok_s(self, x: Efficiency) -> float:
        """Returns the tokens per second and chip by these efficiencies."""
        return self.estimate.tokens / (expected_seconds(self.estimate, x) * self.row.chips)


def express(row: Row) -> Expressed:
    """Returns a row as a config with its estimate. What the row leaves open is what fits and is
    expected to be fastest. Raises ConfigError if no config comes near."""
    batches = [row.batch_per_chip] if row.batch_per_chip else [8, 4, 2, 1]
    chip, found = CHIPS[card(row)], []
    for batch in batches:
        kinds = [KEPT[row.kept][:2]] if row.kept else [(keep, ()) for _, keep in REMAT_CHOICES[:-1]]
        for keep, offload in kinds:
            config, differs = configure(row, chip, batch, keep, offload)
            e = estimate(config, chip)
            choice = len(batches) * len(kinds) > 1
            if not choice or e.fits or (batch, keep) == (batches[-1], ()):
                rate = e.tokens / expected_seconds(e, PRIORS[chip.platform])
                found.append((rate, len(found), config, e, differs))
    _, _, config, e, differs = max(found)
    if not row.batch_per_chip:
        batch = config.batch_size / row.chips
        differs = (*differs, f'the batch is not published: {batch:g} sequences a chip')
    if not row.kept:
        kept = '+'.join(config.model.remat_keep) or 'nothing but layer inputs'
        differs = (*differs, f'what is kept is not published: {kept}')
    e, priced = as_published(row, config, e)
    return Expressed(row, config, e, (*differs, *priced))


def configure(
    row: Row, chip: Chip, batch: float, keep: tuple[str, ...], offload: tuple[str, ...]
) -> tuple[ConfigDict, tuple[str, ...]]:
    """Returns the config of a row, and what differs. Raises ConfigError if it cannot run."""
    c, differs = default.get_config(), []
    released_models.set_model(c, row.model)
    mesh = dict(zip((*MESH, 'cp'), row.mesh, strict=True))
    size, devices = math.prod(row.mesh), row.chips * chip.of_chip
    if size == row.chips and devices != size:  # the columns count chips
        mesh['fsdp'] *= chip.of_chip
    elif size != devices:
        raise ConfigError(
            f'{row.model} on {row.chips} {row.chip}: the mesh is of {size} devices, not {devices}'
        )
    if mesh['ep'] > 1 and 'moe' not in ''.join(c.model.block):
        raise ConfigError(f'{row.model} has no experts, and the row says ep={mesh["ep"]}')
    while c.model.d_model % mesh['fsdp'] and mesh['fsdp'] % 2 == 0:
        mesh['fsdp'] //= 2
        mesh['dp'] *= 2
    if mesh['dp'] != row.mesh[1]:
        differs.append(f'd_model={c.model.d_model} is cut by fsdp {mesh["fsdp"]} x dp {mesh["dp"]}')
    c.update(
        chip=card(row), seq_len=row.seq_len, batch_size=round(batch * row.chips),
        compute_dtype='bfloat16', check_vma=False, cp_style='gather',
    )  # fmt: skip
    c.mesh.update(mesh)
    m = c.model
    m.update(remat='full', remat_keep=keep, remat_offload=offload, attention_block=1024)
    m.loss_chunk = row.seq_len * c.batch_size  # logits as a whole
    m.buffer_factor = row.capacity_factor or 1.0  # of an even spread, as benchmarks have it
    differs += stages(row, c)
    try:
        validate(c, devices, needs_data=False)
    except ConfigError as error:
        raise ConfigError(f'{row.model} on {row.chips} {row.chip}: {error}') from error
    return c, tuple(differs)


def stages(row: Row, c: ConfigDict) -> list[str]:
    """Sets what a pipeline takes; returns what differs."""
    m, pp = c.model, c.mesh.pp
    if pp == 1:
        return []
    differs = ['microbatches of one sequence, weights gathered once a step']
    c.fsdp_gather = 'step'
    c.microbatches = c.batch_size // (c.mesh.dp * c.mesh.fsdp * c.mesh.ep)
    if m.first_dense:
        differs.append(f'the {m.first_dense} dense layers first count as layers with experts')
        m.first_dense = 0
    each = pp * len(m.block)
    if 'interleaved' in row.source.lower():
        c.pipeline.update(schedule='interleaved', chunks=4)
        differs.append('4 virtual stages a stage')
        each *= 4
    layers = -(-m.n_layers // each) * each
    if layers != m.n_layers:
        differs.append(f'{m.n_layers} layers count as {layers}, since stages are alike here')
        m.n_layers = layers
    return differs


def as_published(row: Row, c: ConfigDict, e: Estimate) -> tuple[Estimate, list[str]]:
    """Returns the estimate with the work that the published program does and this code does not,
    and the other way round; and what that is."""
    blocks, transfers, differs = e.work[0], e.transfers, []
    if row.kept and KEPT[row.kept][2]:
        differs.append(KEPT[row.kept][2])
    forward = e.tokens / e.devices * e.useful / 3 * blocks.flops / sum(w.flops for w in e.work)
    if row.kept == 'selective' and c.mesh.pp == 1:
        more = AGAIN * (blocks.flops - blocks.attention) / 3
        blocks = dataclasses.replace(blocks, flops=blocks.flops + more)
    if c.mesh.pp > 1 and row.kept not in ('full', None):
        # Here B of a pipeline runs the stage once more, whatever is kept: of 5 passes over arrays,
        # two of them forward and one again, 3 are left, and of 3 gathers over tp 2.
        blocks = dataclasses.replace(
            blocks, flops=blocks.flops - forward, bytes=blocks.bytes * 3 / 5
        )
        transfers = [
            dataclasses.replace(t, bytes=t.bytes * 2 / 3) if t.axis == TP else t for t in transfers
        ]
        differs.append('a stage runs forward once there, and twice here: once counts')
    if row.capacity_factor and blocks.experts:
        m = c.model
        slots = row.capacity_factor * row.seq_len * m.experts_per_token / m.n_experts
        ours = 3 * m.experts_per_token * m.d_expert
        theirs = 2 * m.n_experts * slots  # into slots and out of them, by matrices of 0 and 1
        more = blocks.experts * (row.capacity_factor - 1 + theirs / ours)
        blocks = dataclasses.replace(blocks, flops=blocks.flops + more)
        differs.append(
            f'rows go into slots of capacity {row.capacity_factor:g} by matmuls, which are added'
        )
    if any(word in f'{row.source} {row.kept}'.lower() for word in ('fp8', 'float8', 'int8')):
        differs.append('matmuls in 8 bits, which count as bfloat16: left out of the fit')
    e = dataclasses.replace(e, work=[blocks, *e.work[1:]], transfers=transfers)
    return e, differs


# ---------------------------------------------------------------------------------------------
# The fit and the figures
# ---------------------------------------------------------------------------------------------


def fits(x: Expressed) -> bool:
    """Returns whether the fit takes a row: its time is published, of matmuls in bfloat16."""
    return x.row.tok_s is not None and not any('8 bits' in text for text in x.differs)


def fit(platform: str, runs: Iterable[Expressed]) -> Efficiency:
    """Returns the efficiencies of a platform by these runs."""
    of_it = [x for x in runs if x.estimate.chip.platform == platform and fits(x)]
    return fitted(platform, [(x.estimate, x.seconds) for x in of_it])


def without(key: tuple[Any, ...], platform: str, runs: Iterable[Expressed]) -> Efficiency:
    """Returns the efficiencies by all runs but those of a key."""
    return fit(platform, [x for x in runs if x.row.key != key])


def together(given: Sequence[Expressed]) -> list[Expressed]:
    """Returns the given rows and those of TABLE, of which they replace those of the same run."""
    keys = {x.row.key for x in given}
    known = [row for row in read_table(TABLE) if row.key not in keys]
    return [*given, *map(express, known)]


def best(platform: str, runs: Sequence[Expressed]) -> Efficiency:
    """Returns the efficiencies by all runs, with the spread of those that are left out in turn."""
    errors = [
        math.log(x.tok_s(without(x.row.key, platform, runs)) / x.row.tok_s)
        for x in runs
        if x.estimate.chip.platform == platform and fits(x)
    ]
    found = fit(platform, runs)
    values = {f.name: float(f'{getattr(found, f.name):.3g}') for f in dataclasses.fields(found)}
    return Efficiency(**values | {'spread': float(f'{spread_of(errors):.2g}')})


def figures(x: Expressed, runs: Sequence[Expressed]) -> dict[str, Any]:
    """Returns the record of a row."""
    row, platform = x.row, x.estimate.chip.platform
    left_out = x.tok_s(without(row.key, platform, runs))
    memory = x.estimate.memory.peak / GIB
    return {
        'model': row.model, 'chip': row.chip, 'chips': row.chips, 'seq_len': row.seq_len,
        'tok_s': row.tok_s, 'predicted_tok_s': left_out,
        'error': left_out / row.tok_s - 1 if row.tok_s else None,
        'expected_tok_s': x.tok_s(EFFICIENCIES[platform]),
        'mem_GiB': row.mem_GiB, 'predicted_mem_GiB': memory,
        'mem_error': memory / row.mem_GiB - 1 if row.mem_GiB else None,
        'differs': list(x.differs),
    }  # fmt: skip


def cell(value: float | None, text: str) -> str:
    """Returns a number by a format, '-' for None."""
    return '-' if value is None else format(value, text)


def text_of(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the figures as a table, what differs, and the errors in all."""
    lines = [
        f'{"":33}{"tokens/s and chip":^30}{"error,":>10}{"GiB":^20}',
        f'{"":33}{"published":>10}{"left out":>10}{"expected":>10}{"left out":>10}'
        f'{"published":>10}{"expected":>10}{"error":>8}',
    ]
    for number, r in enumerate(rows, 1):
        lines.append(
            f'{number:>2} {r["model"]:<16}{r["chips"]:>5} {r["chip"]:<9}'
            f'{cell(r["tok_s"], ",.0f"):>10}{r["predicted_tok_s"]:>10,.0f}'
            f'{r["expected_tok_s"]:>10,.0f}{cell(r["error"], "+.1%"):>10}'
            f'{cell(r["mem_GiB"], ".1f"):>10}{r["predicted_mem_GiB"]:>10.1f}'
            f'{cell(r["mem_error"], "+.1%"):>8}'
        )
    lines.append('')
    for number, r in enumerate(rows, 1):
        if r['differs']:
            lines.append(f'{number:>2} {"; ".join(r["differs"])}')
    errors = [abs(r['error']) for r in rows if r['error'] is not None]
    if errors:
        lines += ['', f'left out, {len(errors)} rows: median {statistics.median(errors):.1%}, '
                  f'largest {max(errors):.1%}']  # fmt: skip
    return '\n'.join(lines)


def main(_: list[str]) -> None:
    jax.config.update('jax_platforms', 'cpu')
    if FLAGS.fit:
        runs = [express(row) for row in read_table(FLAGS.table)]
        for platform in ('tpu', 'gpu'):
            print(f'{platform!r}: {best(platform, runs)},')
        return
    given = [express(row) for row in read_table(FLAGS.table)]
    runs = together(given)
    rows = [figures(x, runs) for x in given]
    print(text_of(rows))
    if FLAGS.json:
        print(common.json.dumps({'rows': rows}))


def define_flags() -> None:
    flags.DEFINE_string('table', TABLE, 'Table of published runs, with the columns of the default.')
    flags.DEFINE_boolean('fit', False, 'Print the efficiencies that the table tells.')
    flags.DEFINE_boolean('json', False, 'Print the figures as a JSON object on the last line, too.')


if __name__ == '__main__':
    common.command.run(main, define_flags)
