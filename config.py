"""The configs of a run: typed for the model's code, compared with a saved one, restored.

Dimension letters, as suffixes of array names and in einsums, the same in all files:

    B batch rows    T position (query)    S position (key)    D model    V vocabulary
    N query heads    K key/value heads    G query heads per key/value head (N = K·G)    H head size
    R latent rank    F feed-forward    L layers    M microbatches    I, O in and out of a linear
    E experts    C choices per token    A assignments (T·C)    P peers of an expert group
    X rows grouped by expert    Z slots of an exchange buffer

Where B is missing, T counts the tokens of all rows. T and S are positions of this device of cp; the
whole sequence where keys are gathered over cp. A lower-case letter is this device's shard of
the dimension: x_BtD = [B, T/tp, D] goes into a layer, all_gather(x_BtD, TP, 1) makes x_BTD of it.
B is written large all the same: it counts the rows of this device.
"""

import dataclasses
import functools
import json
import operator
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from configs import default


class ConfigError(ValueError):
    """A mistake in what the user gave: a field, a flag, a path, a file.

    The message names the rule, the values and the remedy. Commands print it and end with 1; any
    other ValueError is a bug, and shows its traceback.
    """


# ---------------------------------------------------------------------------------------------
# Typed
# ---------------------------------------------------------------------------------------------

# Names of arrays that model.remat_keep and model.remat_offload may list. Bytes per token and layer,
# in bfloat16 on one device of tp: attention's output and log-sum-exp, N·(2·H_v + 4); its inputs,
# N·(4·H_qk + 2·H_v); the residual stream after both parts of a layer, 4·D/tp; both factors of a
# SwiGLU's product, 4·F, and for experts, where that is per choice, their output too, 2·D.
# 'hidden' has the routed experts' outputs with it, 'experts' has them alone.
REMAT_NAMES = ('attention', 'qkv', 'residual', 'hidden', 'experts')
ATTENTION_OUTPUT, QKV, RESIDUAL, HIDDEN, EXPERTS = REMAT_NAMES

MATMUL_TYPES = ('compute', 'fp8')  # of the layers' weights: compute_dtype, or layers/float8.py
COMPUTE, FP8 = MATMUL_TYPES


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and choices of one model; configs/default.py explains each field.

    Equal configs are one model, and hash alike: compiled programs are kept by them. A field that
    comes later has a default here too, so that code that makes one by hand need not know it.
    """

    vocab_size: int
    d_model: int
    n_layers: int
    first_dense: int
    block: tuple[str, ...]
    d_ff: int
    attention: str
    n_heads: int
    n_kv_heads: int
    head_dim: int
    qk_norm: bool
    q_rank: int
    kv_rank: int
    nope_dim: int
    rope_dim: int
    v_dim: int
    rope_base: float
    rope_scaling: str
    rope_factor: float
    rope_original_len: int
    attention_kernel: str
    attention_block: int
    document_end: int
    n_experts: int
    experts_per_token: int
    n_shared_experts: int
    d_expert: int
    expert_kernel: str
    router: str
    normalize_weights: bool
    routed_scale: float
    n_expert_groups: int
    n_top_groups: int
    bias_rate: float
    balance_loss: float
    router_z_loss: float
    capacity_factor: float
    buffer_factor: float
    tie_embeddings: bool
    norm_eps: float
    dropout: float
    z_loss: float
    loss_chunk: int
    remat: str
    remat_keep: tuple[str, ...]
    remat_offload: tuple[str, ...]
    compute_dtype: str
    rope_beta_fast: float = 32.0
    rope_beta_slow: float = 1.0
    rope_mscale: float = 1.0
    rope_mscale_all_dim: float = 0.0
    rope_attention_factor: float = 0.0
    rope_truncate: bool = True
    rope_low_freq_factor: float = 1.0
    rope_high_freq_factor: float = 4.0
    latent_norm_eps: float = 0.0
    group_score: str = 'top2'
    router_bias: bool = False
    expert_bias: bool = False
    shared_gate: bool = False
    swiglu_limit: float = 0.0
    cp: int = 1
    cp_style: str = 'ring'
    fsdp_reduce: str = 'reduce_scatter'
    ragged: bool = False  # the devices have a ragged all-to-all, as all but CPUs; see model_for
    window: int = 0
    attention_sinks: bool = False
    attention_gate: bool = False
    attention_bias: str = 'none'
    norms: str = 'before'
    qk_norm_over: str = 'head'
    rotary_dim: int = 0
    padded: bool = False  # rows may end in -1, no token: experts leave these out; see model_for
    matmul_type: str = COMPUTE
    delta_heads: int = 4
    delta_key_heads: int = 0
    delta_key_dim: int = 64
    delta_value_dim: int = 64
    delta_conv: int = 4
    nope: bool = False  # of the config of one layer (`of_layer`): no rotary part

    @property
    def first_kind(self) -> str:
        """The kind of the layers before the blocks."""
        return first_kind(self.block)

    @property
    def n_blocks(self) -> int:
        """Number of blocks, each of the layers that `block` names."""
        return (self.n_layers - self.first_dense) // len(self.block)

    @property
    def kept_names(self) -> tuple[str, ...]:
        """The REMAT_NAMES whose arrays stay on the device; all of them with remat='dots'."""
        if self.remat == 'dots':
            return REMAT_NAMES
        return _with_experts(self.remat_keep, self.remat_offload)

    @property
    def offloaded_names(self) -> tuple[str, ...]:
        """The REMAT_NAMES whose arrays are kept in host memory."""
        return _with_experts(self.remat_offload, self.remat_keep)

    @property
    def spared_names(self) -> tuple[str, ...]:
        """The REMAT_NAMES whose arrays are not computed again: kept here or in host memory."""
        return (*self.kept_names, *self.offloaded_names)


def _with_experts(names: tuple[str, ...], others: tuple[str, ...]) -> tuple[str, ...]:
    """Adds the experts' outputs to 'hidden', unless they have a place of their own."""
    alone = HIDDEN in names and EXPERTS not in (*names, *others)
    return (*names, EXPERTS) if alone else names


class LayerKind(NamedTuple):
    """The parts of an entry of model.block. attention: '' where it is that of model.attention."""

    attention: str
    window: bool
    nope: bool
    feed_forward: str


WINDOW, NOPE = '_window', '_nope'  # the suffixes of an attention, in this order


@functools.cache
def layer_kind(kind: str) -> LayerKind:
    """Parses 'dense', or 'gqa_window_nope+dense': attention, its suffixes and feed-forward."""
    attention, _, feed_forward = kind.rpartition('+')
    without = attention.removesuffix(NOPE)
    base = without.removesuffix(WINDOW)
    return LayerKind(base, base != without, without != attention, feed_forward)


def first_kind(block: Sequence[str]) -> str:
    """Returns the kind of the dense layers before the blocks, which have the attention of a block's
    first layer."""
    attention, plus, _ = block[0].rpartition('+')
    return f'{attention}{plus}dense'


@functools.cache
def of_layer(cfg: ModelConfig, kind: str) -> ModelConfig:
    """Returns the config of one layer of a model: `attention` is its own, `window` 0 where it has
    none, and without a rotary part rope_dim is 0."""
    attention, window, nope, _ = layer_kind(kind)
    return dataclasses.replace(
        cfg,
        attention=attention or cfg.attention,
        window=cfg.window if window else 0,
        nope=nope,
        rope_dim=0 if nope else cfg.rope_dim,
    )


def config_of_layer(config: ConfigDict, kind: str) -> ConfigDict:
    """Returns a config whose model.attention and model.window are those of one layer."""
    attention, window, *_ = layer_kind(kind)
    own = {
        'attention': attention or config.model.attention,
        'window': config.model.window if window else 0,
    }
    if all(config.model[field] == value for field, value in own.items()):
        return config
    config = config.copy_and_resolve_references()
    config.model.update(own)
    return config


def model_kinds(m: ModelConfig | ConfigDict) -> tuple[str, ...]:
    """Lists the kinds of layers of a model, each once."""
    return tuple(dict.fromkeys((*m.block, *((first_kind(m.block),) if m.first_dense else ()))))


@dataclasses.dataclass(frozen=True)
class MuonConfig:
    """Choices of Muon, as configs/default.py explains them."""

    momentum: float = 0.95
    nesterov: bool = True
    split_heads: bool = False
    steps: int = 5
    coefficients: str = 'jordan'
    scale: str = 'rms'
    adamw_lr: float = 0.0
    replicas: str = 'repeat'
    dtype: str = 'auto'


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Choices of the update, as configs/default.py explains them; `steps` is the run's length."""

    steps: int
    name: str
    lr_schedule: str
    peak_lr: float
    final_lr: float
    warmup_steps: int
    decay_steps: int
    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip_norm: float
    cautious_decay: bool = False
    ema: float = 0.0
    muon: MuonConfig = MuonConfig()


def model_config(config: ConfigDict) -> ModelConfig:
    """Returns the model's part of a config, as written: a kernel may still be 'auto'.

    `model.model_for` replaces it by the one that runs.
    """
    return ModelConfig(
        **config.model,
        compute_dtype=config.compute_dtype,
        cp=config.mesh.cp,
        cp_style=config.cp_style,
        fsdp_reduce=config.fsdp_reduce,
    )


def optimizer_config(config: ConfigDict) -> OptimizerConfig:
    """Returns the optimizer's part of a config."""
    fields = dict(config.optimizer) | {'muon': MuonConfig(**config.optimizer.muon)}
    return OptimizerConfig(steps=config.steps, **fields)


# ---------------------------------------------------------------------------------------------
# Phases
# ---------------------------------------------------------------------------------------------


class Phase(NamedTuple):
    """The steps of a run, from `start` on, that have one batch size and one sequence length.

    Steps count from 0. windows: those of config.seq_len that the phases before it take, the last
    one of a phase wholly. positions: batch_size * seq_len of all steps before it.
    """

    start: int
    batch_size: int
    seq_len: int
    windows: int = 0
    positions: int = 0


def schedule_entries(name: str, entries: Sequence[str]) -> list[tuple[int, int]]:
    """Returns the (step, value) pairs of a field of config.schedule, written as 'STEP:VALUE'.

    Raises ConfigError if the steps do not rise from 0.
    """
    found = [re.fullmatch(r'([0-9]{1,9}):([0-9]{1,9})', entry) for entry in entries]
    pairs = [(int(match[1]), int(match[2])) for match in found if match]
    steps = [step for step, _ in pairs]
    if len(pairs) < len(entries) or steps != sorted(set(steps)) or steps[:1] not in ([], [0]):
        raise ConfigError(
            f'schedule.{name}={tuple(entries)!r} is no list of STEP:VALUE whose steps rise from 0; '
            f'write as in --config.schedule.{name}=0:256,1000:1024, the value after 1000 steps '
            f'being 1024'
        )
    return pairs


def phases(config: ConfigDict) -> tuple[Phase, ...]:
    """Returns the phases of a run: one, unless config.schedule says more."""
    values = {
        name: schedule_entries(name, config.schedule[name]) or [(0, config[name])]
        for name in ('batch_size', 'seq_len')
    }
    found: list[Phase] = []
    for start in sorted({step for pairs in values.values() for step, _ in pairs}):
        batch_size, seq_len = (
            [value for step, value in pairs if step <= start][-1] for pairs in values.values()
        )
        windows = positions = 0
        if found:
            last = found[-1]
            if (batch_size, seq_len) == (last.batch_size, last.seq_len):
                continue
            rows = (start - last.start) * last.batch_size
            windows = last.windows + -(-rows * last.seq_len // config.seq_len)
            positions = last.positions + rows * last.seq_len
        found.append(Phase(start, batch_size, seq_len, windows, positions))
    return tuple(found)


def phase_at(phases: Sequence[Phase], step: int) -> Phase:
    """Returns the phase that a step belongs to, steps counted from 0."""
    return [phase for phase in phases if phase.start <= step][-1]


def largest_phase(config: ConfigDict) -> Phase:
    """Returns the phase whose steps take the most positions; of equal ones, the longest rows."""
    return max(phases(config), key=lambda p: (p.batch_size * p.seq_len, p.seq_len))


def in_phase(config: ConfigDict, phase: Phase) -> ConfigDict:
    """Returns the config with the sizes of a phase, and without a schedule."""
    if not (config.schedule.batch_size or config.schedule.seq_len):
        return config
    config = config.copy_and_resolve_references()
    config.update(batch_size=phase.batch_size, seq_len=phase.seq_len)
    config.schedule.update(batch_size=(), seq_len=())
    return config


def without_schedule(config: ConfigDict) -> ConfigDict:
    """Returns the config with the sizes that evaluation has, its own, and without a schedule."""
    return in_phase(config, Phase(0, config.batch_size, config.seq_len))


# ---------------------------------------------------------------------------------------------
# Compared
# ---------------------------------------------------------------------------------------------

# Fields that older checkpoints hold by another name.
RENAMED = {'optimizer.schedule': 'optimizer.lr_schedule'}

# Fields that mean nothing with model.rope_scaling='none'.
OF_ROPE_SCALING = (
    'model.rope_factor', 'model.rope_original_len', 'model.rope_beta_fast', 'model.rope_beta_slow',
    'model.rope_mscale', 'model.rope_mscale_all_dim', 'model.rope_attention_factor',
    'model.rope_truncate', 'model.rope_low_freq_factor', 'model.rope_high_freq_factor',
)  # fmt: skip

# The fields that a checkpoint, and the meaning of its step, depend on ...
FIXED = (
    'seed', 'batch_size', 'seq_len', 'schedule.', 'data.isolate_documents', 'data.packing',
    'data.max_documents', 'model.',
)  # fmt: skip
# ... but for those that say how the model is computed, not which one it is.
FREE = (
    'model.remat', 'model.remat_keep', 'model.remat_offload', 'model.attention_kernel',
    'model.attention_block', 'model.expert_kernel', 'model.loss_chunk',
)  # fmt: skip


def flat(config: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
    """Returns the fields of all groups by their full names: {'model.d_model': 256, ...}."""
    fields: dict[str, Any] = {}
    for name, value in config.items():
        nested = isinstance(value, Mapping)
        fields |= flat(value, f'{prefix}{name}.') if nested else {prefix + name: value}
    return fields


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Lists (field, old value, new value) for the fields of both configs whose values differ.

    Fields that mean nothing are left out: those of model.rope_scaling where it is 'none' in both.
    So is model.document_end with isolated documents: older checkpoints hold the token that the data
    ended documents with, newer ones leave it to the data.
    """
    a, b = (flat(json.loads(json.dumps(config))) for config in (old, new))
    a, b = ({RENAMED.get(name, name): x for name, x in fields.items()} for fields in (a, b))
    same = set()
    if a.get('data.isolate_documents') and b.get('data.isolate_documents'):
        same.add('model.document_end')
    if a.get('model.rope_scaling') == b.get('model.rope_scaling') == 'none':
        same.update(OF_ROPE_SCALING)
    return [(n, a[n], b[n]) for n in a if n in b and n not in same and a[n] != b[n]]


def check_alike(
    old: Mapping[str, Any], config: ConfigDict, fixed: tuple[str, ...], holder: str
) -> None:
    """Raises ConfigError if the config that `holder` has differs in a field that `fixed` covers.

    `fixed` lists names or beginnings of names; FREE fields may differ. A field that came later than
    that config has its default there.
    """
    changed = differences(saved_config(old).to_dict(), config.to_dict())
    changed = [c for c in changed if c[0].startswith(fixed) and c[0] not in FREE]
    if changed:
        raise ConfigError(
            f'the config cannot run: {holder} that differs in\n'
            + '\n'.join(f'  - {name}: {a!r} there, {b!r} here' for name, a, b in changed)
            + '\nuse the values there to go on with it, or another --workdir for a new run'
        )


# ---------------------------------------------------------------------------------------------
# Restored
# ---------------------------------------------------------------------------------------------


def saved_config(saved: Mapping[str, Any]) -> ConfigDict:
    """Returns the config of a checkpoint; fields that came later have their defaults."""
    check_yarn(saved)
    return ConfigDict(as_tuples(filled(default.get_config().to_dict(), saved)))


def filled(fields: dict[str, Any], saved: Mapping[str, Any], group: str = '') -> dict[str, Any]:
    """Returns the fields with the saved values in their place, group by group."""
    for old, value in saved.items():
        name = RENAMED.get(group + old, group + old)
        field = name.removeprefix(group)
        below = fields.get(field)
        inner = isinstance(below, dict) and isinstance(value, Mapping)
        fields[field] = filled(below, value, f'{name}.') if inner else value
    return fields


def check_yarn(saved: Mapping[str, Any]) -> None:
    """Raises ConfigError for the config of an older run with YaRN.

    Its ramp was not yet that of released models, and other frequencies would be another model.
    """
    model = saved.get('model', {})
    if model.get('rope_scaling') == 'yarn' and 'rope_beta_fast' not in model:
        raise ConfigError(
            "the run was trained with model.rope_scaling='yarn' by an older version, whose "
            'frequencies this one does not compute; go on with it by the version that trained it'
        )


def as_tuples(value: Any) -> Any:
    """Turns the lists that JSON makes of tuples into tuples again, at any depth."""
    if isinstance(value, dict):
        return {name: as_tuples(x) for name, x in value.items()}
    return tuple(map(as_tuples, value)) if isinstance(value, list) else value


# ---------------------------------------------------------------------------------------------
# Rules that several files share
# ---------------------------------------------------------------------------------------------


def divisors(n: int) -> str:
    """Lists the divisors of n up to 64, for messages: '1, 2, 4 or 8'."""
    small = [str(d) for d in range(1, min(n, 64) + 1) if n % d == 0]
    return ', '.join(small[:-1]) + (' or ' if small[:-1] else '') + small[-1]


def indivisible(config: ConfigDict, axis: str, fields: Iterable[str]) -> Iterable[str]:
    """Yields an error for each field, named in full, that the mesh axis does not divide."""
    size = config.mesh[axis]
    for name in fields:
        value = functools.reduce(operator.getitem, name.split('.'), config)
        if value % size:
            yield (
                f'{name}={value} is not divisible by mesh.{axis}={size}; '
                f'use a {axis} of {divisors(value)}'
            )
