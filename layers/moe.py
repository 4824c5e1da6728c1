"""Mixture of experts (DeepSeekMoE, Dai et al. 2024; DeepSeek-V3, section 2.1.2): dropless unless a
capacity is asked for, experts spread over `ep`, their matrices also over `fsdp` and `tp`.

Dimensions as in layers/dense.py, and here:
    T tokens (all of a device, flattened)    C choices a token    A assignments (T·C)
    E experts    S slots of the exchange buffers    G rows grouped by expert
An assignment a is choice a % C of token a // C.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from config import HIDDEN, ModelConfig
from layers.dense import swiglu_params, swiglu_shards
from layers.expert_kernels import BLOCK, grouped_swiglu
from parallel import (
    BATCH,
    EP,
    FSDP,
    TP,
    Array,
    P,
    Param,
    Tree,
    all_gather,
    all_to_all,
    normal,
    psum,
    ragged_all_to_all,
    reduce_scatter,
    unshard,
    zeros,
)


def moe_params(cfg: ModelConfig) -> Tree:
    D, E, F = cfg.d_model, cfg.n_experts, cfg.d_expert
    use = cfg.experts_per_token / E
    down = normal((2 * cfg.n_layers * F) ** -0.5)
    shared = {}
    if cfg.n_shared_experts:
        shared = {'shared': swiglu_params(cfg, cfg.n_shared_experts * F)}
    return shared | {
        'router': Param((D, E), P(None, None), normal(D**-0.5)),
        'bias': Param((E,), P(None), zeros, matrix=False, trainable=False),
        'experts': {
            'w_gate': Param((E, D, F), P(EP, FSDP, TP), normal(D**-0.5), use=use),
            'w_up': Param((E, D, F), P(EP, FSDP, TP), normal(D**-0.5), use=use),
            'w_down': Param((E, F, D), P(EP, TP, FSDP), down, use=use),
        },
    }


def moe(params: Tree, x_BTD: Array, cfg: ModelConfig) -> tuple[Array, dict[str, Array]]:
    """Routed experts plus shared ones. x_BTD: [B, T/tp, D] -> the same, and `route`'s statistics.

    Each device routes its own positions; tokens and choices are then gathered over tp, rows
    travel over ep to their experts and back, and every tp device adds its slice of F.
    """
    declared = moe_params(cfg)
    w = unshard(params['experts'], declared['experts'], x_BTD.dtype)
    expert_BTC, weight_BTC, stats = route(params, x_BTD, cfg)
    x_BTD, expert_BTC, weight_BTC = (
        all_gather(y, TP, 1) for y in (x_BTD, expert_BTC, weight_BTC)
    )  # B T/tp -> B T
    expert_BTC = keep_within_capacity(expert_BTC, cfg)
    slots, expert_BTC = keep_within_buffers(expert_BTC, cfg)
    x_TD = x_BTD.reshape(-1, cfg.d_model)

    with jax.named_scope('dispatch'):
        x_GD, sizes_E, return_rows = dispatch(x_TD, expert_BTC.reshape(-1), slots, cfg)
    with jax.named_scope('experts'):
        y_GD = grouped_swiglu(x_GD, w, sizes_E, cfg.expert_kernel)
    with jax.named_scope('combine'):
        # By its name: no policy saves what comes out of a loop or a branch, as all of this does.
        y_AD = checkpoint_name(return_rows(y_GD), HIDDEN)
        choices = (x_TD.shape[0], cfg.experts_per_token)
        out_TD = combine(y_AD.reshape(*choices, -1), weight_BTC.reshape(choices))
    out_BTD = out_TD.reshape(x_BTD.shape)
    if cfg.n_shared_experts:
        shared = unshard(params['shared'], declared['shared'], x_BTD.dtype)
        with jax.named_scope('shared_experts'):
            out_BTD += swiglu_shards(shared, x_BTD)
    # every tp device counts the same drops
    stats['dropped'] = jnp.sum(expert_BTC == cfg.n_experts, dtype=jnp.float32) / lax.axis_size(TP)
    return reduce_scatter(out_BTD, TP, 1), stats


# ---------------------------------------------------------------------------------------------
# Routing
# ---------------------------------------------------------------------------------------------


@jax.named_scope('router')
def route(params: Tree, x_BTD: Array, cfg: ModelConfig) -> tuple[Array, Array, dict[str, Array]]:
    """The experts of each token, int32 [B, T, C], and their weights, float32; in float32.

    The bias enters the choice and not the weight (auxiliary-loss-free balancing, Wang et al.
    2024). With groups, only experts of the best `n_top_groups` are eligible, a group's score
    being the sum of its two best (DeepSeek-V3). Statistics of this device's tokens, as sums:
    `load` [E] assignments, `entropy` nats, `tokens`; and `loss`, its share of the balance and
    z-losses' mean over the microbatch.
    """
    logits_BTE = jnp.einsum(
        'btd,de->bte', x_BTD.astype(jnp.float32), params['router'], precision='highest'
    )
    if cfg.router == 'sigmoid':
        scores_BTE = jax.nn.sigmoid(logits_BTE)
        probs_BTE = scores_BTE / jnp.sum(scores_BTE, axis=-1, keepdims=True)
    else:
        scores_BTE = probs_BTE = jax.nn.softmax(logits_BTE, axis=-1)
    choice_BTE = lax.stop_gradient(scores_BTE) + lax.stop_gradient(params['bias'])
    if cfg.n_expert_groups > 1:
        choice_BTE = mask_groups(choice_BTE, cfg)
    expert_BTC = lax.top_k(choice_BTE, cfg.experts_per_token)[1]
    weight_BTC = jnp.take_along_axis(scores_BTE, expert_BTC, axis=-1)
    if cfg.normalize_weights:
        weight_BTC /= jnp.sum(weight_BTC, axis=-1, keepdims=True) + 1e-20
    B, T, E = probs_BTE.shape
    rows_B = jnp.arange(B)[:, None, None]
    load_BE = jnp.zeros_like(probs_BTE, shape=(B, E)).at[rows_B, expert_BTC].add(1.0)
    entropy = -jnp.sum(probs_BTE * jnp.log(probs_BTE + 1e-20))
    stats = {
        'load': jnp.sum(load_BE, axis=0),
        'entropy': lax.stop_gradient(entropy),
        'tokens': jnp.full_like(entropy, B * T),
        'loss': router_losses(logits_BTE, probs_BTE, load_BE, cfg),
    }
    return expert_BTC, weight_BTC * cfg.routed_scale, stats


def mask_groups(choice_BTE: Array, cfg: ModelConfig) -> Array:
    """-inf for the experts outside of each token's best groups (DeepSeek-V3, section 2.1.2)."""
    groups = choice_BTE.reshape(*choice_BTE.shape[:-1], cfg.n_expert_groups, -1)
    best_two = lax.top_k(groups, min(2, groups.shape[-1]))[0]
    top = lax.top_k(jnp.sum(best_two, axis=-1), cfg.n_top_groups)[1]
    kept = jnp.any(top[..., None] == jnp.arange(cfg.n_expert_groups), axis=-2)
    return jnp.where(kept[..., None], groups, -jnp.inf).reshape(choice_BTE.shape)


def router_losses(logits_BTE: Array, probs_BTE: Array, load_BE: Array, cfg: ModelConfig) -> Array:
    """This device's share of the mean over the microbatch of
    balance_loss · Σ_e f_e P_e of each sequence (DeepSeek-V3, equations 17-20), and of
    router_z_loss · logsumexp(logits)² of each token (ST-MoE, Zoph et al. 2022)."""
    _, T, E = probs_BTE.shape
    tp, devices = lax.axis_size(TP), lax.axis_size((*BATCH, TP))
    total = jnp.zeros_like(logits_BTE, shape=())
    if cfg.router_z_loss:
        z_BT = jnp.square(jax.nn.logsumexp(logits_BTE, axis=-1))
        total += cfg.router_z_loss * jnp.mean(z_BT) / devices
    if cfg.balance_loss:
        chosen_BE, prob_BE = psum(jnp.stack((load_BE, jnp.sum(probs_BTE, axis=1))), TP)
        chosen_BE *= E / (cfg.experts_per_token * T * tp)
        balance_B = jnp.sum(chosen_BE * prob_BE / (T * tp), axis=-1)
        total += cfg.balance_loss * jnp.mean(balance_B) / devices
    return total


def keep_within_capacity(expert_BTC: Array, cfg: ModelConfig) -> Array:
    """Replaces by E, no expert, the choices beyond an expert's capacity.

    Each expert takes the first ceil(factor · C · T / E) choices of each sequence, so no token is
    dropped because of a later one, nor because of what else shares its batch or its device.
    """
    if not cfg.capacity_factor:
        return expert_BTC
    B, T, C = expert_BTC.shape
    capacity = int(np.ceil(cfg.capacity_factor * C * T / cfg.n_experts))
    group_A = (expert_BTC + cfg.n_experts * jnp.arange(B)[:, None, None]).reshape(-1)
    kept_A = rank_within(group_A) < capacity
    return jnp.where(kept_A.reshape(B, T, C), expert_BTC, cfg.n_experts)


def keep_within_buffers(expert_BTC: Array, cfg: ModelConfig) -> tuple[int, Array]:
    """Rows that a device can send to each ep peer; choices beyond them lose their expert (E).

    buffer_factor 0 is exact: a peer may receive everything. Else it is the room over an even
    spread. First come, first served in order of positions, so no token loses its place to one at
    a later position; but to one of another sequence it may, and that depends on the mesh.
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
    """How many earlier entries are of the same group: int32 [A]."""
    order_A = jnp.argsort(group_A, stable=True)
    sorted_A = group_A[order_A]
    first_A = jnp.searchsorted(sorted_A, sorted_A)
    ranks_A = jnp.arange(len(group_A)) - first_A
    return jnp.zeros_like(ranks_A).at[order_A].set(ranks_A, unique_indices=True)


def update_biases(params: Tree, stats: Tree, rate: float) -> Tree:
    """Moves each expert's bias by `rate` towards the mean load of the step's global batch.

    `params` is a tree of stacked layers, `stats` that of the same layers which have a `load`:
    [L, E], alike on all devices that hold the layer.
    """

    def layer(params: Tree, stats: Tree) -> Tree:
        load_LE = stats['load']
        step_LE = rate * jnp.sign(jnp.mean(load_LE, axis=-1, keepdims=True) - load_LE)
        return params | {'ffn': params['ffn'] | {'bias': params['ffn']['bias'] + step_LE}}

    return params | {name: layer(params[name], s) for name, s in stats.items()}


# ---------------------------------------------------------------------------------------------
# Dispatch: rows to their experts and back
# ---------------------------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def permute(x_RD: Array, index_S: Array, inverse_A: Array, copies: int) -> Array:
    """Rows x[index // copies]; zeros where the index is out of range.

    `inverse_A`, of copies · R entries, says at which place of the result each copy of each row
    stands (out of range: nowhere). So the backward pass is a gather too, not a scatter.
    """
    return x_RD.at[index_S // copies].get(mode='fill', fill_value=0)


def _permute_forward(x_RD: Array, index_S: Array, inverse_A: Array, copies: int):
    return permute(x_RD, index_S, inverse_A, copies), inverse_A


def _permute_backward(copies: int, inverse_A: Array, d_SD: Array):
    d_AD = d_SD.at[inverse_A].get(mode='fill', fill_value=0)
    d_RCD = d_AD.reshape(-1, copies, d_SD.shape[-1])
    return sum_choices(d_RCD).astype(d_SD.dtype), None, None


permute.defvjp(_permute_forward, _permute_backward)


def sum_choices(x_TCD: Array) -> Array:
    """Σ over C in float32, written out: XLA:CPU takes ten times as long for such a reduction."""
    return sum(x_TCD[:, c].astype(jnp.float32) for c in range(x_TCD.shape[1]))


@jax.custom_vjp
def combine(y_TCD: Array, weight_TC: Array) -> Array:
    """Σ_C weight · y, added up in float32: [T, D] in the type of y, which is saved as it comes."""
    return sum_choices(y_TCD * weight_TC[..., None]).astype(y_TCD.dtype)


def _combine_backward(saved: tuple[Array, Array], d_TD: Array):
    y_TCD, weight_TC = saved
    d_TD = d_TD.astype(jnp.float32)
    d_weight_TC = jnp.sum(y_TCD.astype(jnp.float32) * d_TD[:, None], axis=-1)
    return (d_TD[:, None] * weight_TC[..., None]).astype(y_TCD.dtype), d_weight_TC


combine.defvjp(lambda y, weight: (combine(y, weight), (y, weight)), _combine_backward)


def inverted(index: Array, size: int) -> Array:
    """The places at which 0..size-1 stand in `index`; len(index) for those that do not."""
    nowhere = jnp.full_like(index, len(index), shape=(size,))
    return nowhere.at[index].set(jnp.arange(len(index)), mode='drop', unique_indices=True)


def dispatch(
    x_TD: Array, expert_A: Array, slots: int, cfg: ModelConfig
) -> tuple[Array, Array, Callable[[Array], Array]]:
    """Brings each token to its experts' device: rows grouped by expert, x_GD; rows a local
    expert, int32 [E/ep]; and a function that brings [G, D] back to the assignments, [A, D].

    Rows of assignments without an expert (E) come back as zeros.
    """
    C, E, A = cfg.experts_per_token, cfg.n_experts, len(expert_A)
    ep = lax.axis_size(EP)
    order_A = jnp.argsort(expert_A, stable=True)
    place_A = inverted(order_A, A)
    place_A = jnp.where(expert_A < E, place_A, A + BLOCK)
    sizes_E = jnp.zeros_like(expert_A, shape=(E,)).at[expert_A].add(1, mode='drop')
    if ep == 1:  # rows grouped by expert are where they belong
        order_G = jnp.pad(order_A, (0, BLOCK), constant_values=A)
        x_GD = permute(x_TD, order_G, place_A, C)
        return x_GD, sizes_E, lambda y_GD: permute(y_GD, place_A, order_G, 1)

    sizes_PE = sizes_E.reshape(ep, -1)
    received_PE = all_to_all(sizes_PE, EP, 0)
    send, receive = exchange(order_A, place_A, sizes_PE, received_PE, slots, C)
    dest_S, sizes_E = regroup(received_PE, slots)
    source_G = inverted(dest_S, len(dest_S) + BLOCK)
    x_GD = permute(send(x_TD), source_G, dest_S, 1)
    return x_GD, sizes_E, lambda y_GD: receive(permute(y_GD, dest_S, source_G, 1))


def exchange(
    order_A: Array, place_A: Array, sizes_PE: Array, received_PE: Array, slots: int, copies: int
) -> tuple[Callable[[Array], Array], Callable[[Array], Array]]:
    """Two functions, [T, D] tokens -> [S, D] and back [S, D] -> [A, D]: slot p·slots + c of a
    device holds the c-th row that peer p sent it. Rows are sent in order of their expert.

    On TPU and GPU a ragged all-to-all moves the real rows only; CPU has none, and there all
    slots travel.
    """
    ep, A = sizes_PE.shape[0], len(order_A)
    sizes_P, received_P = jnp.sum(sizes_PE, axis=1), jnp.sum(received_PE, axis=1)
    start_P = jnp.cumsum(sizes_P) - sizes_P
    c = jnp.arange(slots)
    filled_PC = c < sizes_P[:, None]
    from_PC = order_A.at[start_P[:, None] + c].get(mode='fill', fill_value=A)
    from_S = jnp.where(filled_PC, from_PC, A).reshape(-1)
    slot_A = inverted(from_S, A)
    mine = lax.axis_index(EP) * slots + jnp.zeros_like(start_P)
    theirs = jnp.arange(ep) * slots
    start_there_P = all_to_all(start_P, EP, 0)

    def send_slots(x_TD: Array) -> Array:
        return all_to_all(permute(x_TD, from_S, slot_A, copies), EP, 0)

    def receive_slots(y_SD: Array) -> Array:
        return permute(all_to_all(y_SD, EP, 0), slot_A, from_S, 1)

    def send_ragged(x_TD: Array) -> Array:
        x_AD = permute(x_TD, order_A, place_A, copies)
        return ragged_all_to_all(x_AD, ep * slots, start_P, sizes_P, mine, received_P, EP)

    def receive_ragged(y_SD: Array) -> Array:
        y_AD = ragged_all_to_all(y_SD, A, theirs, received_P, start_there_P, sizes_P, EP)
        return permute(y_AD, place_A, order_A, 1)

    def by_platform(slots: Callable, ragged: Callable) -> Callable[[Array], Array]:
        return lambda x: lax.platform_dependent(x, cpu=slots, default=ragged)

    return by_platform(send_slots, send_ragged), by_platform(receive_slots, receive_ragged)


def regroup(received_PE: Array, slots: int) -> tuple[Array, Array]:
    """Where each slot of the exchange goes among rows grouped by expert, int32 [S] (out of range:
    it is empty), and the rows of each local expert, int32 [E/ep]."""
    sizes_E = jnp.sum(received_PE, axis=0)
    before_PE = jnp.cumsum(received_PE, axis=1)  # within what one peer sent
    peers_PE = jnp.cumsum(received_PE, axis=0) - received_PE  # from earlier peers, an expert
    c = jnp.arange(slots)
    expert_PC = jnp.sum(c[None, :, None] >= before_PE[:, None, :], axis=-1)
    shift_PE = jnp.cumsum(sizes_E) - sizes_E + peers_PE - (before_PE - received_PE)
    shift_PC = jnp.take_along_axis(shift_PE, expert_PC, axis=1, mode='clip')
    dest_PC = jnp.where(c < before_PE[:, -1:], c + shift_PC, received_PE.shape[0] * slots + BLOCK)
    return dest_PC.reshape(-1), sizes_E
