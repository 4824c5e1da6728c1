"""Mixture of experts (DeepSeekMoE, Dai et al. 2024; DeepSeek-V3, section 2.1.2): dropless unless a
capacity is asked for, experts spread over `ep`, their matrices also over `fsdp` and `tp`.

Assignment a is choice a % C of token a // C; peer p of an ep group holds experts p·E/ep and on.
"""

import functools
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from ml_collections import ConfigDict

from config import EXPERTS, HIDDEN, ModelConfig, divisors, indivisible
from layers.dense import FeedForward, swiglu_params, swiglu_shards, weights
from layers.expert_kernels import BLOCK, EXPERT_KERNELS, grouped_swiglu
from parallel import (
    BATCH,
    CP,
    EP,
    FSDP,
    SEQUENCE,
    TP,
    Array,
    P,
    Param,
    Tree,
    all_gather,
    all_to_all,
    gather_zigzag,
    normal,
    psum,
    ragged_all_to_all,
    reduce_scatter,
    zeros,
    zigzag,
)

GROUP_SCORES = {'top2': 2, 'max': 1}  # how many of a group's best choices add up to its score


def moe_params(cfg: ModelConfig) -> Tree:
    """Declares the router, its biases, the routed experts and the shared ones.

    `bias` is moved by the load and enters the choice alone; `router_bias` is one of the logits,
    learned like the experts' b_gate, b_up and b_down.
    """
    D, E, F = cfg.d_model, cfg.n_experts, cfg.d_expert
    use = cfg.experts_per_token / E
    expert = functools.partial(Param, use=use, kept_by=HIDDEN, inputs=1, outputs=1)
    up, down = normal(D**-0.5), normal((2 * cfg.n_layers * F) ** -0.5)
    bias = functools.partial(Param, init=zeros, matrix=False)
    options, biases = {}, {}
    if cfg.n_shared_experts:
        options['shared'] = swiglu_params(cfg, cfg.n_shared_experts * F)
    if cfg.shared_gate:
        options['shared_gate'] = Param((D, 1), P(None, None), normal(D**-0.5))
    if cfg.router_bias:
        options['router_bias'] = bias((E,), P(None))
    if cfg.expert_bias:
        hidden = bias((E, F), P(EP, TP), use=use)
        biases = {'b_gate': hidden, 'b_up': hidden, 'b_down': bias((E, D), P(EP, None), use=use)}
    return options | {
        'router': Param((D, E), P(None, None), normal(D**-0.5)),
        'bias': Param((E,), P(None), zeros, matrix=False, trainable=False),
        'experts': {
            'w_gate': expert((E, D, F), P(EP, FSDP, TP), up),
            'w_up': expert((E, D, F), P(EP, FSDP, TP), up),
            'w_down': expert((E, F, D), P(EP, TP, FSDP), down, kept_by=EXPERTS),
        }
        | biases,
    }


def moe(
    params: Tree, x_BtD: Array, cfg: ModelConfig, held_Bt: Array | None = None
) -> tuple[Array, dict[str, Array]]:
    """Runs routed experts plus shared ones: [B, T/tp, D] -> the same, and `route`'s statistics.

    Each device routes its own positions; tokens and choices are then gathered over tp, rows
    travel over ep to their experts and back, and every tp device adds its slice of F. Positions
    where held_Bt is False hold no token: they have no expert, take nobody's room, and count for
    nothing.
    """
    declared = moe_params(cfg)
    w = weights(params['experts'], declared['experts'], x_BtD.dtype, cfg)
    if cfg.expert_bias:
        w['b_down'] /= lax.axis_size(TP)  # each tp device adds an equal share
    expert_BtC, weight_BtC, stats = route(params, x_BtD, cfg, held_Bt)
    x_BTD, expert_BTC, weight_BTC = (all_gather(y, TP, 1) for y in (x_BtD, expert_BtC, weight_BtC))
    expert_BTC = keep_within_capacity(expert_BTC, cfg)
    slots, expert_BTC = keep_within_buffers(expert_BTC, cfg)
    x_TD = x_BTD.reshape(-1, cfg.d_model)

    with jax.named_scope('dispatch'):
        x_XD, sizes_e, return_rows = dispatch(x_TD, expert_BTC.reshape(-1), slots, cfg)
    with jax.named_scope('experts'):
        y_XD = grouped_swiglu(x_XD, w, sizes_e, cfg.expert_kernel, cfg.swiglu_limit)
    with jax.named_scope('combine'):
        # Named, since no policy saves the results of a loop or a branch, as all of these are.
        y_AD = checkpoint_name(return_rows(y_XD), EXPERTS)
        choices = (x_TD.shape[0], cfg.experts_per_token)
        out_TD = combine(y_AD.reshape(*choices, -1), weight_BTC.reshape(choices))
    partial_BTD = out_TD.reshape(x_BTD.shape)
    if cfg.n_shared_experts:
        with jax.named_scope('shared_experts'):
            partial_BTD += shared_experts(params, x_BtD, x_BTD, cfg)
    # every tp device counts the same drops
    stats['dropped'] = jnp.sum(expert_BTC == cfg.n_experts, dtype=jnp.float32) / lax.axis_size(TP)
    if held_Bt is not None:  # what never had an expert was not dropped
        stats['dropped'] -= cfg.experts_per_token * jnp.sum(~held_Bt, dtype=jnp.float32)
    return reduce_scatter(partial_BTD, TP, 1), stats


def shared_experts(params: Tree, x_BtD: Array, x_BTD: Array, cfg: ModelConfig) -> Array:
    """Runs the experts that every token meets, as one SwiGLU: [B, T, D], a partial sum over tp.

    With shared_gate times σ(x·w) of each token (Qwen1.5-MoE, as released), in float32, which each
    device computes for its own positions.
    """
    w = weights(params['shared'], moe_params(cfg)['shared'], x_BtD.dtype, cfg)
    if not cfg.shared_gate:
        return swiglu_shards(w, x_BTD, cfg.swiglu_limit)
    gate_Bt1 = jax.nn.sigmoid(float32_product(x_BtD, params['shared_gate']))
    return swiglu_shards(w, x_BTD, cfg.swiglu_limit, all_gather(gate_Bt1, TP, 1))


# ---------------------------------------------------------------------------------------------
# Routing
# ---------------------------------------------------------------------------------------------


def float32_product(x_BtD: Array, w_DE: Array) -> Array:
    """Multiplies in float32, whatever the type of x: [B, T/tp, E]."""
    x_BtD = x_BtD.astype(jnp.float32)
    return jnp.einsum('btd,de->bte', x_BtD, w_DE, precision='highest')


@jax.named_scope('router')
def route(
    params: Tree, x_BtD: Array, cfg: ModelConfig, held_Bt: Array | None = None
) -> tuple[Array, Array, dict[str, Array]]:
    """Chooses the experts of each token, int32 [B, T/tp, C], and their weights, float32.

    The bias enters the choice and not the weight (auxiliary-loss-free balancing, Wang et al.
    2024); a router_bias is one of the logits. Softmax scores that are normalized are a softmax over
    the chosen logits (Mixtral, gpt-oss). With groups, only experts of the best `n_top_groups` are
    eligible, a group's score being the sum of its two best (DeepSeek-V3) or its best (DeepSeek-V2).
    All in float32, and weights and probabilities from logarithms of the scores, so that they add up
    to 1 where the scores themselves underflow. Statistics are sums over this device's tokens:
    `load` [E] assignments, `entropy` nats, `tokens`; and `loss`, its share of the balance and
    z-losses' mean over the microbatch. Positions that hold no token choose E, and are left out.
    """
    logits_BtE = float32_product(x_BtD, params['router'])
    if cfg.router_bias:
        logits_BtE += params['router_bias']
    if cfg.router == 'sigmoid':
        log_score_BtE = jax.nn.log_sigmoid(logits_BtE)
        log_prob_BtE = jax.nn.log_softmax(log_score_BtE, axis=-1)  # of scores over their sum
    else:
        log_score_BtE = log_prob_BtE = jax.nn.log_softmax(logits_BtE, axis=-1)
    choice_BtE = lax.stop_gradient(jnp.exp(log_score_BtE)) + lax.stop_gradient(params['bias'])
    if cfg.n_expert_groups > 1:
        choice_BtE = mask_groups(choice_BtE, cfg)
    expert_BtC = lax.top_k(choice_BtE, cfg.experts_per_token)[1]
    log_score_BtC = jnp.take_along_axis(log_score_BtE, expert_BtC, axis=-1)
    if cfg.normalize_weights:
        log_score_BtC = jax.nn.log_softmax(log_score_BtC, axis=-1)
    probs_BtE = jnp.exp(log_prob_BtE)
    entropy_BtE = -probs_BtE * log_prob_BtE
    tokens = expert_BtC.shape[0] * expert_BtC.shape[1]
    if held_Bt is not None:
        expert_BtC = jnp.where(held_Bt[..., None], expert_BtC, cfg.n_experts)
        entropy_BtE = jnp.where(held_Bt[..., None], entropy_BtE, 0)
        tokens = jnp.sum(held_Bt)
    entropy = jnp.sum(entropy_BtE)
    stats = {
        'load': jnp.sum(count_choices(expert_BtC, cfg.n_experts), axis=0),
        'entropy': lax.stop_gradient(entropy),
        'tokens': jnp.full_like(entropy, tokens),
        'loss': router_losses(logits_BtE, probs_BtE, cfg, held_Bt),
    }
    return expert_BtC, jnp.exp(log_score_BtC) * cfg.routed_scale, stats


def count_choices(expert_BtC: Array, n_experts: int) -> Array:
    """Counts the choices of each expert in each sequence: float32 [B, E]; E is no expert."""
    B = expert_BtC.shape[0]
    zeros_BE = jnp.zeros_like(expert_BtC, shape=(B, n_experts), dtype=jnp.float32)
    return zeros_BE.at[jnp.arange(B)[:, None, None], expert_BtC].add(1.0, mode='drop')


def mask_groups(choice_BtE: Array, cfg: ModelConfig) -> Array:
    """Sets experts outside of each token's best groups to -inf (DeepSeek-V3, section 2.1.2)."""
    groups = choice_BtE.reshape(*choice_BtE.shape[:-1], cfg.n_expert_groups, -1)
    best = lax.top_k(groups, min(GROUP_SCORES[cfg.group_score], groups.shape[-1]))[0]
    top = lax.top_k(jnp.sum(best, axis=-1), cfg.n_top_groups)[1]
    kept = jnp.any(top[..., None] == jnp.arange(cfg.n_expert_groups), axis=-2)
    return jnp.where(kept[..., None], groups, -jnp.inf).reshape(choice_BtE.shape)


def router_losses(
    logits_BtE: Array, probs_BtE: Array, cfg: ModelConfig, held_Bt: Array | None = None
) -> Array:
    """Returns this device's share of the routers' losses, averaged over the microbatch.

    balance_loss · Σ_e f_e P_e per sequence (DeepSeek-V3, equations 17-20), and router_z_loss ·
    logsumexp(logits)² per token (ST-MoE, Zoph et al. 2022). f counts the best C experts by their
    scores alone, without biases and groups (equation 18): what the router prefers, not what the
    balancing made of it. Scores rise with logits, so the best logits are the best scores.

    Where rows are padded, both are means over the tokens of each sequence, and then over the
    sequences: so neither depends on the cut into microbatches.
    """
    _, t, E = probs_BtE.shape
    T, devices = t * lax.axis_size(SEQUENCE), lax.axis_size((*BATCH, *SEQUENCE))
    total = jnp.zeros_like(logits_BtE, shape=())
    if held_Bt is not None:
        tokens_B = psum(jnp.sum(held_Bt, axis=1, dtype=jnp.float32), SEQUENCE)
        T = jnp.maximum(tokens_B, 1)[:, None]  # of each sequence, for [B, E]
        probs_BtE = jnp.where(held_Bt[..., None], probs_BtE, 0)
    if cfg.router_z_loss:
        z_Bt = jnp.square(jax.nn.logsumexp(logits_BtE, axis=-1))
        if held_Bt is not None:
            z_Bt = jnp.where(held_Bt, z_Bt, 0) * (t * lax.axis_size(SEQUENCE) / T)
        total += cfg.router_z_loss * jnp.mean(z_Bt) / devices
    if cfg.balance_loss:
        best_BtC = lax.top_k(lax.stop_gradient(logits_BtE), cfg.experts_per_token)[1]
        if held_Bt is not None:
            best_BtC = jnp.where(held_Bt[..., None], best_BtC, E)
        best_BE = count_choices(best_BtC, E)
        chosen_BE, prob_BE = psum(jnp.stack((best_BE, jnp.sum(probs_BtE, axis=1))), SEQUENCE)
        chosen_BE *= E / (cfg.experts_per_token * T)
        balance_B = jnp.sum(chosen_BE * prob_BE / T, axis=-1)
        total += cfg.balance_loss * jnp.mean(balance_B) / devices
    return total


def keep_within_capacity(expert_BTC: Array, cfg: ModelConfig) -> Array:
    """Replaces by E, no expert, the choices beyond an expert's capacity.

    Each expert takes the first ceil(factor · C · T / E) choices of each sequence, so no token is
    dropped because of a later one, nor because of what else shares its batch or its device. T
    counts the tokens of the sequence, where rows are padded.
    """
    if not cfg.capacity_factor:
        return expert_BTC
    expert_BTC = gather_zigzag(expert_BTC, CP, 1)
    B, T, C = expert_BTC.shape
    capacity = np.ceil(cfg.capacity_factor * C * np.arange(T + 1) / cfg.n_experts).astype(np.int32)
    room = int(capacity[T])
    if cfg.padded:
        room = jnp.asarray(capacity)[jnp.sum(expert_BTC[..., 0] < cfg.n_experts, axis=1)]
        room = room[:, None, None]
    # E, no expert, is a group of its own in each sequence.
    group_A = (expert_BTC + (cfg.n_experts + 1) * jnp.arange(B)[:, None, None]).reshape(-1)
    kept_BTC = rank_within(group_A).reshape(B, T, C) < room
    return zigzag(jnp.where(kept_BTC, expert_BTC, cfg.n_experts), CP, 1)


def keep_within_buffers(expert_BTC: Array, cfg: ModelConfig) -> tuple[int, Array]:
    """Returns the rows that a device can send to each ep peer, and the choices that are within
    them; the others lose their expert (E).

    buffer_factor 0 is exact: a peer may receive everything. Else it is the room over an even
    spread. First come, first served in order of positions, so no token loses its place to one at
    a later position; but it may to one of another sequence, which depends on the mesh.
    """
    ep = lax.axis_size(EP)
    if not cfg.buffer_factor or cfg.buffer_factor >= ep:
        return expert_BTC.size, expert_BTC
    slots = int(np.ceil(cfg.buffer_factor * expert_BTC.size / ep))
    expert_TBC = expert_BTC.swapaxes(0, 1)
    peer_A = (expert_TBC // (cfg.n_experts // ep)).reshape(-1)
    kept_TBC = (rank_within(peer_A) < slots).reshape(expert_TBC.shape)
    return slots, jnp.where(kept_TBC, expert_TBC, cfg.n_experts).swapaxes(0, 1)


def rank_within(group_A: Array) -> Array:
    """Counts the earlier entries of the same group: int32 [A]."""
    order_A = jnp.argsort(group_A, stable=True)
    sorted_A = group_A[order_A]
    first_A = jnp.searchsorted(sorted_A, sorted_A)
    ranks_A = jnp.arange(len(group_A)) - first_A
    return jnp.zeros_like(ranks_A).at[order_A].set(ranks_A, unique_indices=True)


def update_biases(params: Tree, stats: Tree, rate: float) -> Tree:
    """Moves each expert's bias by `rate` towards the mean load of the step's global batch.

    `params` is a tree of stacked layers; `stats` has the `load` of those with experts, [L, E],
    alike on all devices that hold the layer.
    """

    def layer(params: Tree, stats: Tree) -> Tree:
        load_LE = stats['load']
        step_LE = rate * jnp.sign(jnp.mean(load_LE, axis=-1, keepdims=True) - load_LE)
        return params | {'ffn': params['ffn'] | {'bias': params['ffn']['bias'] + step_LE}}

    return params | {name: layer(params[name], s) for name, s in stats.items()}


# ---------------------------------------------------------------------------------------------
# Dispatch: rows to their experts and back
# ---------------------------------------------------------------------------------------------


# Its derivative is written by hand, below: change both. tests/test_derivatives.py compares them.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def permute(x: Array, index: Array, inverse: Array, copies: int) -> Array:
    """Gathers the rows x[index // copies]; zeros where the index is out of range.

    `inverse` has copies · rows entries: the place of each copy of each row in the result (out of
    range: nowhere). So the backward pass is a gather too, not a scatter.
    """
    return x.at[index // copies].get(mode='fill', fill_value=0)


def _permute_forward(x: Array, index: Array, inverse: Array, copies: int):
    return permute(x, index, inverse, copies), inverse


def _permute_backward(copies: int, inverse: Array, d_out: Array):
    d_sorted = d_out.at[inverse].get(mode='fill', fill_value=0)
    d_copies = d_sorted.reshape(-1, copies, d_out.shape[-1])
    return sum_choices(d_copies).astype(d_out.dtype), None, None


permute.defvjp(_permute_forward, _permute_backward)


def sum_choices(x_TCD: Array) -> Array:
    """Sums over C in float32, term by term: XLA:CPU takes ten times as long for a reduction."""
    return sum(x_TCD[:, c].astype(jnp.float32) for c in range(x_TCD.shape[1]))


# Its derivative is written by hand, below: change both. tests/test_derivatives.py compares them.
@jax.custom_vjp
def combine(y_TCD: Array, weight_TC: Array) -> Array:
    """Computes Σ_C weight · y in float32: [T, D] in the type of y, which is saved as it comes."""
    return sum_choices(y_TCD * weight_TC[..., None]).astype(y_TCD.dtype)


def _combine_backward(saved: tuple[Array, Array], d_TD: Array):
    y_TCD, weight_TC = saved
    d_TD = d_TD.astype(jnp.float32)
    d_weight_TC = jnp.sum(y_TCD.astype(jnp.float32) * d_TD[:, None], axis=-1)
    return (d_TD[:, None] * weight_TC[..., None]).astype(y_TCD.dtype), d_weight_TC


combine.defvjp(lambda y, weight: (combine(y, weight), (y, weight)), _combine_backward)


def inverted(index: Array, size: int) -> Array:
    """Finds the places of 0..size-1 in `index`; len(index) for those that are not in it."""
    nowhere = jnp.full_like(index, len(index), shape=(size,))
    return nowhere.at[index].set(jnp.arange(len(index)), mode='drop', unique_indices=True)


def dispatch(
    x_TD: Array, expert_A: Array, slots: int, cfg: ModelConfig
) -> tuple[Array, Array, Callable[[Array], Array]]:
    """Brings each token to its experts' device.

    Returns rows grouped by expert, x_XD; the rows of each local expert, int32 [E/ep]; and a
    function that brings [X, D] back to the assignments, [A, D]. Rows of assignments without an
    expert (E) come back as zeros.
    """
    C, E, A = cfg.experts_per_token, cfg.n_experts, len(expert_A)
    ep, behind = lax.axis_size(EP), EXPERT_KERNELS[cfg.expert_kernel].compute.behind
    order_A = jnp.argsort(expert_A, stable=True)
    place_A = inverted(order_A, A)
    place_A = jnp.where(expert_A < E, place_A, A + BLOCK)
    sizes_E = jnp.zeros_like(expert_A, shape=(E,)).at[expert_A].add(1, mode='drop')
    if ep == 1:  # rows grouped by expert are where they belong
        order_X = jnp.pad(order_A, (0, behind(A)), constant_values=A)
        x_XD = permute(x_TD, order_X, place_A, C)
        return x_XD, sizes_E, lambda y_XD: permute(y_XD, place_A, order_X, 1)

    sizes_Pe = sizes_E.reshape(ep, -1)
    received_Pe = all_to_all(sizes_Pe, EP, 0)
    send, receive = exchange(order_A, place_A, sizes_Pe, received_Pe, slots, C, cfg.ragged)
    dest_Z, sizes_e = regroup(received_Pe, slots)
    source_X = inverted(dest_Z, len(dest_Z) + behind(len(dest_Z)))
    x_XD = permute(send(x_TD), source_X, dest_Z, 1)
    return x_XD, sizes_e, lambda y_XD: receive(permute(y_XD, dest_Z, source_X, 1))


def exchange(
    order_A: Array, place_A: Array, sizes_Pe: Array, received_Pe: Array, slots: int, copies: int,
    ragged: bool,
) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:  # fmt: skip
    """Returns two functions, [T, D] tokens -> [Z, D] and back, [Z, D] -> [A, D].

    Slot p·slots + z of a device holds the z-th row that peer p sent it. Rows are sent in order of
    their expert.

    A ragged all-to-all, which CPUs lack, moves the real rows only; else all slots travel. It is no
    `lax.platform_dependent`: see `pass_on`.
    """
    ep, A = sizes_Pe.shape[0], len(order_A)
    sizes_P, received_P = jnp.sum(sizes_Pe, axis=1), jnp.sum(received_Pe, axis=1)
    start_P = jnp.cumsum(sizes_P) - sizes_P
    z = jnp.arange(slots)
    filled_Pz = z < sizes_P[:, None]
    from_Pz = order_A.at[start_P[:, None] + z].get(mode='fill', fill_value=A)
    from_Z = jnp.where(filled_Pz, from_Pz, A).reshape(-1)
    slot_A = inverted(from_Z, A)
    mine = lax.axis_index(EP) * slots + jnp.zeros_like(start_P)
    theirs = jnp.arange(ep) * slots
    start_there_P = all_to_all(start_P, EP, 0)

    def send_slots(x_TD: Array) -> Array:
        return all_to_all(permute(x_TD, from_Z, slot_A, copies), EP, 0)

    def receive_slots(y_ZD: Array) -> Array:
        return permute(all_to_all(y_ZD, EP, 0), slot_A, from_Z, 1)

    def send_ragged(x_TD: Array) -> Array:
        x_AD = permute(x_TD, order_A, place_A, copies)
        return ragged_all_to_all(x_AD, ep * slots, start_P, sizes_P, mine, received_P, EP)

    def receive_ragged(y_ZD: Array) -> Array:
        y_AD = ragged_all_to_all(y_ZD, A, theirs, received_P, start_there_P, sizes_P, EP)
        return permute(y_AD, place_A, order_A, 1)

    return (send_ragged, receive_ragged) if ragged else (send_slots, receive_slots)


def regroup(received_Pe: Array, slots: int) -> tuple[Array, Array]:
    """Returns the place of each slot of the exchange among rows grouped by expert, int32 [Z] (out
    of range: the slot is empty), and the rows of each local expert, int32 [E/ep]."""
    sizes_e = jnp.sum(received_Pe, axis=0)
    before_Pe = jnp.cumsum(received_Pe, axis=1)  # within what one peer sent
    peers_Pe = jnp.cumsum(received_Pe, axis=0) - received_Pe  # from earlier peers, per expert
    z = jnp.arange(slots)
    expert_Pz = jnp.sum(z[None, :, None] >= before_Pe[:, None, :], axis=-1)
    shift_Pe = jnp.cumsum(sizes_e) - sizes_e + peers_Pe - (before_Pe - received_Pe)
    shift_Pz = jnp.take_along_axis(shift_Pe, expert_Pz, axis=1, mode='clip')
    dest_Pz = jnp.where(z < before_Pe[:, -1:], z + shift_Pz, received_Pe.shape[0] * slots + BLOCK)
    return dest_Pz.reshape(-1), sizes_e


# ---------------------------------------------------------------------------------------------
# Its record as a feed-forward
# ---------------------------------------------------------------------------------------------


def moe_width(m: ModelConfig | ConfigDict) -> int:
    """Returns the hidden size of one expert."""
    return m.d_expert


def moe_rules(config: ConfigDict) -> Iterator[str]:
    """Yields errors for sizes and choices that do not go together or do not fit the mesh."""
    m, ep = config.model, config.mesh.ep
    yield from indivisible(config, TP, ['model.d_expert'])
    yield from indivisible(config, EP, ['model.n_experts'])
    if m.experts_per_token > m.n_experts:
        yield (
            f'model.experts_per_token={m.experts_per_token} is above model.n_experts='
            f'{m.n_experts}; use {m.n_experts} or fewer'
        )
    yield from router_gradient_errors(m)
    if m.n_experts % m.n_expert_groups:
        yield (
            f'model.n_experts={m.n_experts} is not divisible by model.n_expert_groups='
            f'{m.n_expert_groups}; use {divisors(m.n_experts)} groups'
        )
    elif m.n_top_groups > m.n_expert_groups:
        yield (
            f'model.n_top_groups={m.n_top_groups} is above model.n_expert_groups='
            f'{m.n_expert_groups}; use {m.n_expert_groups} or fewer'
        )
    elif m.n_top_groups * (m.n_experts // m.n_expert_groups) < m.experts_per_token:
        yield (
            f'model.n_top_groups={m.n_top_groups} of {m.n_experts // m.n_expert_groups} experts '
            f'cannot offer model.experts_per_token={m.experts_per_token}; use more groups'
        )
    if m.shared_gate and not m.n_shared_experts:
        yield (
            'model.shared_gate=True weighs shared experts, and model.n_shared_experts=0; use one '
            'or more, or shared_gate=False'
        )
    if ep > 1 and m.buffer_factor and m.buffer_factor < 1:
        yield (
            f'model.buffer_factor={m.buffer_factor} has less room than an even spread takes; '
            f'use 1 or more, or 0 for room for all'
        )


def router_gradient_errors(m: ConfigDict) -> Iterator[str]:
    """Yields an error where the weights of the chosen experts are constants, so that the router
    gets no gradient from what the experts do."""
    if m.experts_per_token == 1 and m.normalize_weights:
        yield (
            'model.experts_per_token=1 with model.normalize_weights=True gives every token the '
            'weight 1 and the router no gradient; use normalize_weights=False, or 2 or more '
            'experts per token'
        )
    elif m.n_experts == 1 and m.router == 'softmax':
        yield (
            "model.n_experts=1 with model.router='softmax' gives every token the weight 1 and the "
            "router no gradient; use more experts, the router 'sigmoid', or a 'dense' layer"
        )
    elif m.routed_scale == 0:
        yield (
            'model.routed_scale=0 gives the experts the weight 0, and them and the router no '
            'gradient; use a factor above 0'
        )


MOE = FeedForward(moe_params, moe, True, moe_width, moe_rules)
