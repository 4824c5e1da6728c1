"""Formats what plan.py prints: tables for people, records (JSON) for programs."""

import dataclasses
import shlex
from collections.abc import Callable
from typing import Any

from ml_collections import ConfigDict

from machine.chips import Chip
from machine.memory import OutOfMemoryError
from parallel import AXES
from planning.compiled import Compiled
from planning.expected import Interval, expectation
from planning.part import part_of
from planning.prices import Cost
from planning.roofline import NEWTON_SCHULZ, Estimate
from planning.search import expected
from planning.topology import pinned_libtpu

WIDTH = 44  # characters of the column of names


# ---------------------------------------------------------------------------------------------
# Numbers for people
# ---------------------------------------------------------------------------------------------


def scaled(x: float, unit: str) -> str:
    """Returns a number with three digits and a prefix: 1234567, 'B' -> '1.23 MB'."""
    for prefix in ('', 'k', 'M', 'G', 'T', 'P'):
        if abs(x) < 999.5 or prefix == 'P':
            break
        x /= 1000
    digits = 0 if x >= 99.95 or (not prefix and x == int(x)) else 1 if x >= 9.995 else 2
    return f'{x:.{digits}f} {prefix}{unit}'


def seconds(x: float) -> str:
    """Returns a duration in s or ms: 0.0123 -> '12.3 ms'."""
    if x >= 1:
        return f'{x:.2f} s'
    return f'{x * 1e3:.1f} ms' if x < 0.0995 else f'{x * 1e3:.0f} ms'


def row(name: str, *columns: str) -> str:
    """Returns a line of a table: a name and right-aligned columns."""
    return f'  {name:<{WIDTH}}' + ''.join(f'{c:>12}' for c in columns)


def mesh_text(config: ConfigDict) -> str:
    """Returns the axes of the mesh that are larger than 1: 'fsdp 8 x tp 2'."""
    used = [f'{axis} {config.mesh[axis]}' for axis in AXES if config.mesh[axis] > 1]
    return ' x '.join(used) or 'one device'


def layout_text(config: ConfigDict) -> str:
    """Returns mesh, microbatches, pipeline schedule and rematerialization in a line."""
    m, p = config.model, config.pipeline
    kept = ''.join(f' keep {"+".join(m.remat_keep)}' if m.remat_keep else '')
    chunks = f' of {p.chunks} chunks' if p.chunks > 1 else ''
    schedule = f', {p.schedule}{chunks}' if config.mesh.pp > 1 else ''
    style = f' by {config.cp_style}' if config.mesh.cp > 1 else ''
    mesh = mesh_text(config) + style
    return f'{mesh}, {config.microbatches} microbatches{schedule}, remat {m.remat}{kept}'


# ---------------------------------------------------------------------------------------------
# The table
# ---------------------------------------------------------------------------------------------


def model_lines(config: ConfigDict, e: Estimate) -> list[str]:
    """Returns the part on parameters, FLOPs and tokens."""
    rows = part_of(config, e.chip.platform).rows
    return [
        'model',
        row('parameters', f'{e.parameters:,}'),
        row('active parameters (that a token meets)', f'{e.active:,}'),
        row('FLOPs per token, forward and backward', scaled(e.useful, 'FLOP')),
        row('FLOPs per token, with recomputation', scaled(e.computed, 'FLOP')),
        row('tokens per step', f'{e.tokens:,}'),
        '  6 FLOPs per active parameter, plus attention, where the causal half of T² counts.',
        f'  {config.batch_size} sequences of {config.seq_len:,}; {rows} per device and microbatch.',
    ]


def memory_lines(e: Estimate) -> list[str]:
    """Returns the part on memory: each kind of array, in which phase it exists, and the peak."""
    m = e.memory
    where = 'backward' if m.in_backward >= m.in_head else 'head'
    if m.peak == m.state + m.in_update:
        where = 'update'
    # Once they are summed over devices as well, gradients are sharded like their parameters.
    all_grads = where == 'update' and m.gradients != m.parameters
    parts = [
        ('parameters, float32: the master copy', m.parameters, ''),
        ("the optimizer's state, float32", m.moments, ''),
        ('gradients, float32, summed over microbatches', m.gradients, 'both' if all_grads else ''),
        ('parameters in another layout, for gathers', m.copies, 'both'),
        ('pipeline stash', m.stash, ''),
        ('gathered weights' + (' of all layers' if m.ahead else ' of a layer'), m.gathered,
         'both' if m.ahead else 'backward'),
        ('activations kept from forward to backward', m.activations,
         'backward' if m.stash else 'both'),
        ('activations of a layer, computed again', m.recomputed, 'backward'),
        ('gradients of activations within a layer', m.layer_gradients, 'backward'),
        ('gradients of one microbatch', m.microbatch_gradients, 'backward'),
        ('logits of one loss_chunk, and their gradient', m.logits, 'head'),
        ("the head's weight, gathered, and gradient", m.head, 'head'),
        ('for the backward pass, made before it', m.beside_head, 'head'),
        ('gradients, float32, of all parameters', all_grads * m.parameters, 'update'),
        ('matrices at home, and arrays made from them', m.update, 'update'),
    ]  # fmt: skip
    lines = ['memory of one device']
    lines += [row(name, scaled(n, 'B'), phase) for name, n, phase in parts if n]
    verdict = 'fits' if e.fits else 'DOES NOT FIT'
    return [
        *lines,
        row(f'peak, in the {where}', scaled(m.peak, 'B')),
        f'  of {scaled(e.chip.memory, "B")}: {m.peak / e.chip.memory:.0%}, {verdict}. What is '
        f'marked exists in that phase only.',
    ]


def muon_lines(e: Estimate) -> list[str]:
    """Returns the part on the matrices that Muon updates: how many each home takes, and in vain."""
    flops = sum(w.flops for w in e.work)
    lines = ["matrices at home: Newton-Schulz of Muon's update"]
    lines.append(f'  {"":<{WIDTH}}{"each home":>12}{"padding":>12}{"FLOPs":>12}')
    for s in e.of_muon:
        name = f'{s.rows:,} x {s.columns:,}: {s.matrices:,} on {s.homes:,} homes'
        lines.append(row(name, f'{s.per_home:,}', f'{s.padding:.1%}', f'{s.flops / flops:.2%}'))
    lines.append('  Padding is the part of the work on zeros; FLOPs are the part of a step.')
    alike = max(s.alike for s in e.of_muon)
    if alike > 1:
        lines.append(
            f"  Up to {alike} devices compute the same; optimizer.muon.replicas='split' parts it."
        )
    return lines


def network_lines(e: Estimate) -> list[str]:
    """Returns the part on the network: bytes by axis and purpose, and their seconds."""
    lines = ['network: what one device sends in a step']
    for t in e.transfers:
        if t.bytes >= 1e6 or t.bytes >= e.axis_bytes[t.axis] / 2:
            lines.append(row(f'{t.axis:<5} {t.purpose}', scaled(t.bytes, 'B')))
    for axis, n in e.axis_bytes.items():
        lines.append(row(f'{axis:<5} in all', scaled(n, 'B'), seconds(e.axis_seconds[axis])))
    rate = scaled(e.chip.link, 'B/s')
    if e.chip.platform == 'tpu':
        lines.append(f'  At {rate} per axis: both directions of one dimension of the torus.')
    else:
        lines.append(f'  At {rate} within a node.')
    return lines if e.transfers else ['network: none']


def time_lines(e: Estimate) -> list[str]:
    """Returns the part on time: seconds of each part of a step, and the two bounds."""
    lines = ['time of a step: the longer of matmuls and memory in each part']
    lines.append(f'  {"":<{WIDTH}}{"matmuls":>12}{"memory":>12}')
    for w in e.work:
        lines.append(
            row(w.part, seconds(w.flops / e.chip.flops), seconds(w.bytes / e.chip.bandwidth))
        )
    if e.bubble:
        lines.append(
            row(f'pipeline bubble, {e.bubble:.1%} of the blocks', seconds(e.bubble_seconds))
        )
    for axis, t in e.axis_seconds.items():
        lines.append(row(f'network, {axis}', seconds(t)))
    lines.append(f'  {"":<{WIDTH}}{"step":>12}{"tokens/s":>12}{"MFU":>12}')
    for name, t in (
        ('bound, every collective waited for', e.seconds),
        ('bound, every collective behind compute', e.overlapped_seconds),
    ):
        lines.append(row(name, seconds(t), f'{e.tokens / t:,.0f}', f'{e.mfu(t):.1%}'))
    return lines


def expected_lines(e: Estimate) -> list[str]:
    """Returns the part on what is expected: values, and the bounds of 8 runs in 10."""
    x = expectation(e)

    def line(name: str, i: Interval, text: Callable[[float], str]) -> str:
        return row(name, text(i.value), text(i.low), text(i.high))

    return [
        'expected, from what published runs reach of each part',
        f'  {"":<{WIDTH}}{"expected":>12}{"from":>12}{"to":>12}',
        line('time of a step', x.seconds, seconds),
        line('tokens/s', x.tokens_per_second, '{:,.0f}'.format),
        line('MFU', x.mfu, '{:.1%}'.format),
        line('memory of a device', x.memory, lambda n: scaled(n, 'B')),
        '  8 runs in 10 are within, by the errors so far: docs/plan.md, "Expected".',
    ]


def limits(e: Estimate) -> dict[str, float]:
    """Returns the seconds of a step for which each resource is the one waited for."""
    found = {'matmuls': 0.0, 'memory': 0.0, NEWTON_SCHULZ: 0.0, 'bubble': e.bubble_seconds}
    for w in e.work:
        if w.part == NEWTON_SCHULZ:
            found[w.part] = w.seconds(e.chip)
            continue
        bound = 'matmuls' if w.flops / e.chip.flops >= w.bytes / e.chip.bandwidth else 'memory'
        found[bound] += w.seconds(e.chip)
    return found | e.axis_seconds


def reason(e: Estimate) -> str:
    """Returns the resource that limits the step, and what would help."""
    name, t = max(limits(e).items(), key=lambda item: item[1])
    intensity = sum(w.flops for w in e.work) / sum(w.bytes for w in e.work)
    advice = {
        'matmuls': f'{1 - e.useful / e.computed:.0%} of the FLOPs are computed again: less remat',
        'memory': f'{intensity:.0f} FLOPs per byte, where the chip has '
        f'{e.chip.flops / e.chip.bandwidth:.0f}: keep less, a smaller tp, a wider model',
        NEWTON_SCHULZ: "more homes, by a larger fsdp or muon.replicas='split', or a larger batch",
        'bubble': 'more microbatches, zero_bubble or fewer stages',
        'fsdp': 'weights cross once per microbatch and pass: fewer microbatches, or '
        "fsdp_gather='step'",
        'tp': 'the residual stream crosses twice per layer: a smaller tp',
        'ep': 'every choice of a token crosses twice: a smaller ep',
        'cp': 'keys and values of each layer go around: a smaller cp',
        'dp': 'all gradients cross once per step: fsdp, or a larger batch',
        'pp': 'activations cross once per tick: fewer stages',
    }
    resource = f'the network along {name}' if name in AXES else name
    return f'{resource}, {t / e.seconds:.0%} of the step ({advice[name]})'


def table(config: ConfigDict, name: str, e: Estimate) -> str:
    """Returns the plan of a config as text."""
    head = f'{name} on {e.devices} x {e.chip.name}: {layout_text(config)}'
    parts = [model_lines(config, e), memory_lines(e), network_lines(e), time_lines(e)]
    parts.append(expected_lines(e))
    if e.of_muon:
        parts.insert(3, muon_lines(e))
    body = '\n\n'.join('\n'.join(part) for part in parts)
    return (
        f'{head}\n\n{body}\n\nlimited by {reason(e)}\n'
        f'{e.chip.name}: {scaled(e.chip.flops, "FLOP/s")}, {scaled(e.chip.memory, "B")}, '
        f'{scaled(e.chip.bandwidth, "B/s")}; {e.chip.source}'
    )


def record(config: ConfigDict, e: Estimate) -> dict[str, Any]:
    """Returns the plan of a config as a record: bytes, FLOPs and seconds."""
    return {
        'mesh': dict(config.mesh),
        'microbatches': config.microbatches,
        'schedule': config.pipeline.schedule,
        'chunks': config.pipeline.chunks,
        'remat': config.model.remat,
        'remat_keep': list(config.model.remat_keep),
        'chip': e.chip.name,
        'devices': e.devices,
        'parameters': e.parameters,
        'active_parameters': e.active,
        'flops_per_token': e.useful,
        'computed_flops_per_token': e.computed,
        'tokens_per_step': e.tokens,
        'memory': dataclasses.asdict(e.memory) | {'peak': e.memory.peak},
        'fits': e.fits,
        'work': [dataclasses.asdict(w) | {'seconds': w.seconds(e.chip)} for w in e.work],
        'network': [dataclasses.asdict(t) for t in e.transfers],
        'muon': [dataclasses.asdict(s) | {'padding': s.padding} for s in e.of_muon],
        'axis_seconds': e.axis_seconds,
        'bubble': e.bubble,
        'matmul_seconds': e.matmul_seconds,
        'memory_seconds': e.memory_seconds,
        'step_seconds': e.seconds,
        'overlapped_step_seconds': e.overlapped_seconds,
        'tokens_per_second': e.tokens / e.seconds,
        'mfu': e.mfu(e.seconds),
        'expected': dataclasses.asdict(expectation(e)),
        'limited_by': reason(e),
    }


# ---------------------------------------------------------------------------------------------
# The search
# ---------------------------------------------------------------------------------------------


def overrides(config: ConfigDict, base: ConfigDict) -> str:
    """Returns the flags that turn the base config into this one, as a shell takes them."""
    fields = [
        *(f'mesh.{axis}' for axis in AXES), 'cp_style', 'microbatches', 'fsdp_gather',
        'fsdp_reduce',
        'pipeline.schedule', 'pipeline.chunks', 'model.remat', 'model.remat_keep',
        'model.remat_offload',
    ]  # fmt: skip
    changed = []
    for field in fields:
        group, _, name = field.rpartition('.')
        new, old = ((c[group] if group else c)[name] for c in (config, base))
        if new != old:
            if isinstance(new, tuple) and old:
                changed.append(f'--config.{field}=')  # tuples add up
            if new != ():
                value = ','.join(new) if isinstance(new, tuple) else new
                changed.append(shlex.quote(f'--config.{field}={value}'))
    return ' '.join(changed) or '(as it is)'


def faster_lines(
    config: ConfigDict, e: Estimate, better: tuple[ConfigDict, Estimate] | None
) -> list[str]:
    """Returns what `search.faster` found, as lines; none if that is None."""
    if better is None:
        return []
    c, found = better
    return [
        f'faster: {overrides(c, config)}',
        f'  is expected to take {seconds(expected(found))}, where this takes '
        f'{seconds(expected(e))}; it fits, with {scaled(found.memory.peak, "B")}',
    ]


def faster_record(config: ConfigDict, better: tuple[ConfigDict, Estimate] | None) -> dict[str, Any]:
    """Returns what `search.faster` found as a part of a record."""
    if better is None:
        return {'faster': None}
    c, found = better
    flags = overrides(c, config)
    return {'faster': record(c, found) | {'flags': flags, 'expected_seconds': expected(found)}}


def search_title(name: str, devices: int, chip: Chip) -> str:
    """Returns the first line of the search's text."""
    return f'{name} on {devices} x {chip.name}'


def search_text(
    found: list[tuple[ConfigDict, Estimate]],
    compared: int,
    base: ConfigDict,
    n: int,
    of: str = 'meshes',
) -> str:
    """Returns the first `n` of the layouts found, each the best `of` those that have one alike,
    with its figures and its flags."""
    if not found:
        return f'{compared:,} layouts compared, and none fits: use more devices, or a smaller model'
    lines = [
        f'{compared:,} layouts compared; the best {min(n, len(found))} {of} with their best '
        'layout, in the order',
        'of the time that a step is expected to take, beside two bounds: with every collective',
        'waited for, and with every one behind compute.',
    ]
    for i, (c, e) in enumerate(found[:n], 1):
        lines += [
            '',
            f'{i}. {layout_text(c)}',
            f'   expected: {seconds(expected(e))} a step, {e.tokens / expected(e):,.0f} tokens/s, '
            f'MFU {e.mfu(expected(e)):.1%}; {scaled(e.memory.peak, "B")}',
            f'   bounds of a step: {seconds(e.seconds)} with collectives waited for, '
            f'{seconds(e.overlapped_seconds)} with them hidden',
            f'   limited by {reason(e)}',
            *([f'   {why_cut(c, found)}'] if c.mesh.cp > 1 else []),
            f'   {overrides(c, base)}',
        ]
    return '\n'.join(lines)


def why_cut(config: ConfigDict, found: list[tuple[ConfigDict, Estimate]]) -> str:
    """Returns why a layout cuts sequences: the best that does not, or that there is none."""
    whole = next((e for c, e in found if c.mesh.cp == 1), None)
    if whole is None:
        sequences = config.batch_size // config.microbatches
        return (
            f'cut by cp: with whole sequences, {sequences} of {config.seq_len:,} in a microbatch, '
            f'no layout of these devices fits'
        )
    return (
        f'cut by cp: with whole sequences the best layout is expected to take '
        f'{seconds(expected(whole))}, and {scaled(whole.memory.peak, "B")}'
    )


def search_record(
    found: list[tuple[ConfigDict, Estimate]], compared: int, n: int
) -> dict[str, Any]:
    """Returns the first `n` of the layouts found as a record, in the order of expected_seconds."""
    best = [record(c, e) | {'expected_seconds': expected(e)} for c, e in found[:n]]
    return {'tried': compared, 'best': best}


# ---------------------------------------------------------------------------------------------
# The compiler's answer
# ---------------------------------------------------------------------------------------------


def compiler_text(compiler: dict[str, str]) -> str:
    """Returns the versions of a compiler and of jax in a line: 'libtpu 0.0.42.1, jax 0.10.2'; with
    a libtpu that jax is not made for, also the one that it is."""
    said = ', '.join(f'{package} {version}' for package, version in compiler.items())
    pinned = pinned_libtpu() if 'libtpu' in compiler else None
    if pinned is None or f'{compiler["libtpu"]}.'.startswith(f'{pinned}.'):
        return said
    return f'{said}, which is made for libtpu {pinned}: pip install -r requirements/tpu.txt'


def out_of_memory_text(topology: str, compiler: dict[str, str], error: OutOfMemoryError) -> str:
    """Returns the answer for a program that does not fit, with the remedies."""
    return f'compiled for {topology}: {error}\nby {compiler_text(compiler)}'


def out_of_memory_record(
    topology: str, compiler: dict[str, str], error: OutOfMemoryError
) -> dict[str, Any]:
    """Returns the answer for a program that does not fit as a record."""
    return {'compiled': {'topology': topology, 'compiler': compiler, 'out_of_memory': str(error)}}


def compiled_text(e: Estimate, c: Compiled) -> str:
    """Returns the compiler's figures beside the estimate, as text."""
    m, tpu = e.memory, e.chip.platform == 'tpu'
    verdict = 'fits' if c.peak <= e.chip.memory else 'DOES NOT FIT'
    padding = '; small arrays are padded to tiles of 8 x 128 numbers' if tpu else ''
    loose = [row('reserved, packed with all of the memory free', scaled(c.reserved, 'B'))]
    lines = [
        f'compiled for {c.topology} in {c.seconds:.0f} s',
        *([f'  by {compiler_text(c.compiler)}'] if c.compiler else []),
        f'  {"":<{WIDTH}}{"compiler":>12}{"estimate":>12}',
        row('parameters, moments, batch', scaled(c.arguments, 'B'), scaled(m.state, 'B')),
        row('peak', scaled(c.peak, 'B'), scaled(m.peak, 'B'), f'{m.peak / c.peak - 1:+.1%}'),
        *(loose if tpu else []),
        f'  {c.peak / e.chip.memory:.0%} of {scaled(e.chip.memory, "B")}, {verdict}{padding}.',
    ]
    if c.cost is None:
        return '\n'.join([*lines, f'  the program cannot be read: {c.why}'])
    lines += ['', f'  {"collectives of a step":<{WIDTH}}{"count":>12}{"sent":>12}{"exposed":>12}']
    for (kind, axes), t in sorted(c.cost.traffic.items(), key=lambda item: -item[1].bytes):
        lines.append(
            row(f'{kind} over {axes}', f'{t.count:,.0f}', scaled(t.bytes, 'B'),
                f'{t.exposed / t.seconds:.0%}' if t.seconds else '')
        )  # fmt: skip
    for axis, n in e.axis_bytes.items():
        sent = sum(t.bytes for (_, axes), t in c.cost.traffic.items() if axis in axes.split('+'))
        lines.append(row(f'along {axis}, and the estimate', scaled(sent, 'B'), scaled(n, 'B')))
    if not tpu or e.chip.clock:
        lines += ['', *compiled_time_lines(e, c.cost)]
    return '\n'.join(lines)


def compiled_time_lines(e: Estimate, cost: Cost) -> list[str]:
    """Returns the lines on time: of the compiled program, beside the estimate."""
    total, compute = cost.total(), cost.seconds
    lines = [
        row('compute', seconds(compute), seconds(e.compute_seconds)),
        row('network', seconds(total.seconds)),
        row('step, nothing overlapped', seconds(compute + total.seconds), seconds(e.seconds)),
        row('step, as it is scheduled', seconds(compute + total.exposed)),
    ]
    if e.chip.platform == 'gpu':
        flops = sum(w.flops for w in e.work)
        return [
            row('FLOPs of matmuls', scaled(cost.flops, 'FLOP'), scaled(flops, 'FLOP')),
            *lines,
            '  Bounds: each kernel at the longer of its matmuls at the peak and its arrays at the',
            f"  memory's bandwidth. {cost.unpriced:,.0f} calls of kernels count no matmuls.",
        ]
    aside = f' SparseCores: {seconds(cost.aside)} beside it, by their bytes.' if cost.aside else ''
    return [
        *lines,
        f'  {cost.seconds * e.chip.clock / 1e6:,.0f} million cycles at {e.chip.clock / 1e9:g} GHz, '
        f'loops by their trips, conditionals by their costliest branch,',
        f'  so idle ticks of a pipeline count like full ones. Splash attention: '
        f'{seconds(cost.kernel_seconds)} of it, at an',
        f'  assumed part of the peak. {cost.unpriced:,.0f} calls of kernels without an estimate '
        f'count nothing.{aside}',
    ]


def compiled_record(c: Compiled) -> dict[str, Any]:
    """Returns the compiler's figures as a record."""
    found = dataclasses.asdict(c)
    if c.cost is not None:
        found['cost']['traffic'] = [
            {'kind': kind, 'axes': axes} | dataclasses.asdict(t)
            for (kind, axes), t in c.cost.traffic.items()
        ]
    return {'compiled': found}
