"""The configs as the code sees them: typed, compared, restored."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from configs import default

# What model.remat_keep and model.remat_offload may name. Bytes a token and layer, in bfloat16 on
# one device of tp: of attention the output and log-sum-exp, N·(2·H_v + 4); its inputs,
# N·(4·H_qk + 2·H_v); the residual stream after both parts of a layer, 4·D/tp; both factors of a
# SwiGLU's product, 4·F, and of experts, where that is for each choice, their output too, 2·D.
REMAT_NAMES = ('attention', 'qkv', 'residual', 'hidden')


ATTENTION_OUTPUT, QKV, RESIDUAL, HIDDEN = REMAT_NAMES


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Sizes and choices of one model; configs/default.py explains each field."""

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

    @property
    def n_blocks(self) -> int:
        return (self.n_layers - self.first_dense) // len(self.block)

    @property
    def kept_names(self) -> tuple[str, ...]:
        """Those of REMAT_NAMES that are kept on the device; with remat='dots', all."""
        return REMAT_NAMES if self.remat == 'dots' else self.remat_keep

    @property
    def rotary_dim(self) -> int:
        return self.rope_dim if self.attention == 'mla' else self.head_dim


# What the checkpoint, and the meaning of its step, depend on; of the model, all but how it runs.
FIXED = ('seed', 'batch_size', 'seq_len', 'model.')


FREE = (
    'model.remat', 'model.remat_keep', 'model.remat_offload', 'model.attention_kernel',
    'model.attention_block', 'model.expert_kernel', 'model.loss_chunk',
)  # fmt: skip


def flat(config: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
    """{'model.d_model': 256, ...}"""
    fields: dict[str, Any] = {}
    for name, value in config.items():
        nested = isinstance(value, Mapping)
        fields |= flat(value, f'{prefix}{name}.') if nested else {prefix + name: value}
    return fields


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """(field, old value, new value) of the fields that both configs have with other values."""
    a, b = (flat(json.loads(json.dumps(config))) for config in (old, new))
    return [(name, a[name], b[name]) for name in a if name in b and a[name] != b[name]]


def check_alike(
    old: Mapping[str, Any], config: ConfigDict, fixed: tuple[str, ...], holder: str
) -> None:
    """Raises ValueError if `holder` differs in a field that starts as `fixed` says."""
    changed = differences(old, config.to_dict())
    changed = [c for c in changed if c[0].startswith(fixed) and c[0] not in FREE]
    if changed:
        raise ValueError(
            f'the config cannot run: {holder} that differs in\n'
            + '\n'.join(f'  - {name}: {a!r} there, {b!r} here' for name, a, b in changed)
            + '\nuse the values there to go on with it, or another --workdir for a new run'
        )


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """Choices of one run; configs/default.py explains each field. `steps` is the run's length."""

    steps: int
    schedule: str
    peak_lr: float
    final_lr: float
    warmup_steps: int
    decay_steps: int
    b1: float
    b2: float
    eps: float
    weight_decay: float
    clip_norm: float


def optimizer_config(config: ConfigDict) -> OptimizerConfig:
    return OptimizerConfig(steps=config.steps, **config.optimizer)


def divisors(n: int) -> str:
    small = [str(d) for d in range(1, min(n, 64) + 1) if n % d == 0]
    return ', '.join(small[:-1]) + (' or ' if small[:-1] else '') + small[-1]


# ---------------------------------------------------------------------------------------------
# A run's model
# ---------------------------------------------------------------------------------------------


def saved_config(saved: dict[str, Any]) -> ConfigDict:
    """The config of a checkpoint; fields that came later have their defaults."""
    config = default.get_config().to_dict()
    for name, value in saved.items():
        group = config.get(name)
        config[name] = group | value if isinstance(group, dict) else value
    return ConfigDict({name: as_tuples(value) for name, value in config.items()})


def as_tuples(value: Any) -> Any:
    """Tuples, of which JSON makes lists."""
    if isinstance(value, dict):
        return {name: as_tuples(x) for name, x in value.items()}
    return tuple(map(as_tuples, value)) if isinstance(value, list) else value
