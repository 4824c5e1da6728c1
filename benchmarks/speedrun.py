"""Seconds of training until a model predicts held-out text at 1.80 bits a byte, on this machine.

    python benchmarks/speedrun.py --runs=muon,adamw
    pip install torch && python benchmarks/speedrun.py --rounds=2 --json

Trains on the source of Python's standard library, in turns, each run in a process of its own:

    muon    configs/tiny.py
    adamw   configs/tiny_adamw.py
    torch   a GPT in PyTorch with as many layers and about as many active parameters as `muon`:
            RoPE, RMSNorm, SwiGLU, tied embedding, fused AdamW; glibc is kept from returning memory

All read the same tokens in the same order from this project's loader, in float32, on all cores. A
run stops at the first evaluation that finds the target or less. Fit --torch_lr, and schedules by
--steps=RUN:STEPS, to end about there: too long or too short costs time. `seconds` counts
compilation, which is shown apart too, and steps: neither imports and the first parameters, nor
evaluation, every 10 steps in the last third of the schedule.
"""

import functools
import math
import os
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import common
import numpy as np
from absl import flags
from beside_torch import MALLOC
from ml_collections import ConfigDict

from config import ConfigError
from configs import tiny, tiny_adamw
from data import open_data
from tokenizer import token_bytes

FLAGS = flags.FLAGS
STEPS = {'muon': 200, 'adamw': 210, 'torch': 400}  # of the schedules


class Run(NamedTuple):
    """A model in training. step(i) may return before step i, from 0, is done; wait() until it is.
    bits() evaluates it, in bits a byte."""

    step: Callable[[int], None]
    wait: Callable[[], None]
    bits: Callable[[], float]
    active_parameters: int
    compile_seconds: float = 0.0


def config_of(name: str) -> ConfigDict:
    """Returns the config of a run, with its schedule squeezed into its steps."""
    config, steps = tiny_adamw if name == 'adamw' else tiny, schedules()[name]
    c = config.get_config()
    c.optimizer.decay_steps = round(c.optimizer.decay_steps * steps / c.steps)
    c.steps, c.eval.batches = steps, FLAGS.eval_rows // c.batch_size
    if FLAGS.small:
        c.model.update(n_layers=1, d_model=32, d_expert=16, n_experts=4)
        c.batch_size, c.seq_len = 2, 32
    return c


def schedules() -> dict[str, int]:
    """Returns the steps of each run's schedule. Raises ConfigError for a run that there is not."""
    given = dict(entry.partition(':')[::2] for entry in FLAGS.steps)
    wrong = [name for name in (*given, *FLAGS.runs) if name not in STEPS]
    wrong += [f'{name}:{steps}' for name, steps in given.items() if not steps.isdecimal()]
    if wrong:
        raise ConfigError(
            f'there is no run {", ".join(wrong)}; the runs are {", ".join(STEPS)}, as in '
            f'--runs=muon,torch --steps=muon:300,torch:500'
        )
    return STEPS | {name: int(steps) for name, steps in given.items()}


# ---------------------------------------------------------------------------------------------
# This project's runs
# ---------------------------------------------------------------------------------------------


def ours(name: str) -> Run:
    """Sets up a run of this project."""
    common.prepare_devices(1 if FLAGS.small else 0)
    import jax

    from parallel import count, make_mesh
    from runtime.evaluation import make_evaluation
    from train_step import init_state, lower_train_step, put_batch, setup

    config = config_of(name)
    loader, (source,), encoding = open_data(config)
    s = setup(config, make_mesh(config.mesh), encoding.eot_token)
    state = jax.block_until_ready(init_state(s))
    seconds, compiled = common.timed(lambda: lower_train_step(s).compile())
    evaluate = make_evaluation(s, encoding)

    def step(i: int) -> None:
        nonlocal state
        state, _ = compiled(state, put_batch(loader.batch_at, i, s))

    def wait() -> None:
        jax.block_until_ready(state)

    def bits() -> float:
        return evaluate(state['params'], source.evaluation)['eval_bits_per_byte']

    return Run(step, wait, bits, count(s.declared, active=True), seconds)


# ---------------------------------------------------------------------------------------------
# PyTorch's
# ---------------------------------------------------------------------------------------------


def torch_parameters(m: ConfigDict) -> dict[str, Any]:
    """Makes the parameters of the GPT, by GPT-2's initialization (0.02, less towards the residual
    stream)."""
    import torch

    torch.manual_seed(0)
    shapes = {'embed': (m.vocab_size, m.d_model)}
    for i in range(m.n_layers):
        shapes |= {
            f'{i}.qkv': (3 * m.n_heads * FLAGS.torch_head, m.d_model),
            f'{i}.out': (m.d_model, m.n_heads * FLAGS.torch_head),
            f'{i}.gate_up': (2 * FLAGS.torch_d_ff, m.d_model),
            f'{i}.down': (m.d_model, FLAGS.torch_d_ff),
        }
    residual = 0.02 / math.sqrt(2 * m.n_layers)
    stds = {name: residual if name.endswith(('out', 'down')) else 0.02 for name in shapes}
    gains = ['norm', *(f'{i}.{part}_norm' for i in range(m.n_layers) for part in ('qkv', 'ff'))]
    made = {name: stds[name] * torch.randn(shape) for name, shape in shapes.items()}
    made |= {name: torch.ones(m.d_model) for name in gains}
    return {name: x.requires_grad_() for name, x in made.items()}


def torch_logits(w: dict[str, Any], tokens_BT: Any, m: ConfigDict) -> Any:
    """Runs the GPT: int64 [B, T] -> [B, T, V]."""
    import torch
    from torch.nn import functional as f

    B, T, half = *tokens_BT.shape, FLAGS.torch_head // 2
    angle = torch.arange(T)[:, None] / m.rope_base ** (torch.arange(half) / half)
    cos, sin = angle.cos(), angle.sin()

    def rotate(x_BNTH: Any) -> Any:
        a, b = x_BNTH.chunk(2, dim=-1)
        return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)

    def norm(x_BTD: Any, name: str) -> Any:
        return f.rms_norm(x_BTD, (m.d_model,), w[name], m.norm_eps)

    x_BTD = f.embedding(tokens_BT, w['embed'])
    for i in range(m.n_layers):
        qkv = f.linear(norm(x_BTD, f'{i}.qkv_norm'), w[f'{i}.qkv'])
        q, k, v = (y.transpose(1, 2) for y in qkv.view(B, T, 3, m.n_heads, -1).unbind(2))
        y = f.scaled_dot_product_attention(rotate(q), rotate(k), v, is_causal=True)
        x_BTD = x_BTD + f.linear(y.transpose(1, 2).reshape(B, T, -1), w[f'{i}.out'])
        gate, up = f.linear(norm(x_BTD, f'{i}.ff_norm'), w[f'{i}.gate_up']).chunk(2, dim=-1)
        x_BTD = x_BTD + f.linear(f.silu(gate) * up, w[f'{i}.down'])
    return f.linear(norm(x_BTD, 'norm'), w['embed'])


def in_torch(name: str) -> Run:
    """Sets up the run in PyTorch: linear warmup over 5 % of the schedule, then linear to 0."""
    import torch
    from torch.nn import functional as f

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    config = config_of(name)
    loader, (source,), encoding = open_data(config)
    w, steps, warmup = torch_parameters(config.model), config.steps, max(config.steps // 20, 1)
    matrices, gains = (
        [x for x in w.values() if (x.ndim > 1) is is_matrix] for is_matrix in (True, False)
    )
    groups = [{'params': matrices, 'weight_decay': 0.1}, {'params': gains, 'weight_decay': 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=FLAGS.torch_lr, betas=(0.9, 0.95), fused=True)

    def rate(i: int) -> float:
        return min((i + 1) / warmup, (steps - i) / (steps - warmup))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)

    def nats(tokens_BT: np.ndarray, reduction: str) -> Any:
        ids_BT = torch.from_numpy(tokens_BT).long()
        logits_BTV = torch_logits(w, ids_BT[:, :-1].clamp(min=0), config.model)
        labels = ids_BT[:, 1:].reshape(-1)
        return f.cross_entropy(
            logits_BTV.flatten(0, 1), labels, ignore_index=-1, reduction=reduction
        )

    def step(i: int) -> None:
        nats(loader.batch_at(i), 'mean').backward()
        torch.nn.utils.clip_grad_norm_(w.values(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)

    sizes_V, evaluation = token_bytes(encoding), source.evaluation

    @torch.no_grad()
    def bits() -> float:
        total = n_bytes = 0.0
        for tokens_BT in map(evaluation.batch_at, range(evaluation.n_batches)):
            total += nats(tokens_BT, 'sum').item()
            labels_BT = tokens_BT[:, 1:]
            n_bytes += sizes_V[labels_BT[labels_BT >= 0]].sum()
        return total / math.log(2) / n_bytes

    return Run(step, lambda: None, bits, sum(x.numel() for x in w.values()))


# ---------------------------------------------------------------------------------------------
# The race
# ---------------------------------------------------------------------------------------------


def raced(name: str) -> common.Figures:
    """Trains a run until an evaluation finds the target or less, or else to its schedule's end."""
    run, steps = in_torch(name) if name == 'torch' else ours(name), schedules()[name]
    start, seconds = 0, run.compile_seconds
    for end in evaluated_steps(steps):
        seconds += common.timed(train, run, range(start, end))[0]
        start, bits = end, run.bits()
        if bits <= FLAGS.target:
            break
    config = config_of(name)
    return {
        'run': name,
        'active_parameters': run.active_parameters,
        'schedule': steps,
        'steps': start,
        'tokens': start * config.batch_size * config.seq_len,
        'compile_seconds': run.compile_seconds,
        'seconds': seconds,
        'bits_per_byte': bits,
    }


def train(run: Run, steps: range) -> None:
    """Takes steps, and waits for the last one."""
    for i in steps:
        run.step(i)
    run.wait()


def evaluated_steps(steps: int) -> list[int]:
    """Returns the steps after which a run is evaluated."""
    first = -(-2 * steps // 3)
    return sorted({*(i for i in range(first, steps) if i % FLAGS.every == 0), steps})


def main() -> common.Figures | list[common.Figures]:
    schedules()
    if FLAGS.only:
        return raced(FLAGS.only)
    if 'torch' in FLAGS.runs:
        common.need('torch')
    keep_freed = dict.fromkeys(MALLOC, '4294967296')
    runs = {
        name: functools.partial(
            common.figures_of,
            'speedrun.py',
            [*sys.argv[1:], f'--only={name}'],
            keep_freed if name == 'torch' else None,
        )
        for name in FLAGS.runs
    }
    results = common.in_turns(runs, FLAGS.rounds)
    best = [min(found, key=lambda x: x['seconds']) for found in results.values()]
    for row in best:
        if row['bits_per_byte'] > FLAGS.target:
            raise ConfigError(
                f'{row["run"]} ended its schedule at {row["bits_per_byte"]:.3f} bits a byte, above '
                f'--target={FLAGS.target}: give it more steps, --steps={row["run"]}:STEPS'
            )
    return [row | {'times_first': row['seconds'] / best[0]['seconds']} for row in best]


if __name__ == '__main__':
    flags.DEFINE_list('runs', list(STEPS), 'Runs to compare.')
    flags.DEFINE_list('steps', [], 'Schedules, RUN:STEPS, in place of those in the source.')
    flags.DEFINE_float('target', 1.8, 'Bits a byte to reach.')
    flags.DEFINE_integer('every', 10, 'Steps between evaluations.', lower_bound=1)
    flags.DEFINE_integer('eval_rows', 0, 'Validation rows of an evaluation; 0: all.', lower_bound=0)
    flags.DEFINE_integer('rounds', 1, 'Rounds of which the best counts.', lower_bound=1)
    flags.DEFINE_float('torch_lr', 3e-3, "Peak rate of PyTorch's AdamW.")
    flags.DEFINE_integer('torch_head', 32, "Size of PyTorch's heads.")
    flags.DEFINE_integer('torch_d_ff', 352, "Hidden size of PyTorch's SwiGLUs.")
    flags.DEFINE_boolean('small', False, 'Take models of a few thousand parameters, for tests.')
    flags.DEFINE_string('only', '', 'Train this one run, in this process.')
    common.run(main)
