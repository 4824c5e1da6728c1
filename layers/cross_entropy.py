"""The head's logits, chunk by chunk: the loss with its gradients, and the scores of labels."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from parallel import AXES, TP, Array, all_gather, local_slice, pmax, psum, reduce_scatter


# Its derivative is written by hand, in `_cross_entropy` where it is with_grads: change both.
# tests/test_derivatives.py compares them.
@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def cross_entropy(
    x_tD: Array, w_vD: Array, labels_t: Array, z_loss: float, chunk: int
) -> tuple[Array, Array]:
    """Returns this device's share of Σ (-log p(label) + z_loss · logsumexp²), and of the first term
    alone.

    x_tD holds the tokens of this tp device, w_vD the rows of its part of the vocabulary; negative
    labels are left out. Logits are [chunk · tp, V/tp] at a time: B·T·V of them never exist. Where
    gradients are wanted, the forward pass computes them chunk by chunk, since d logits follow
    from the logits at once: three matmuls in all, where rematerialization takes four. Only the
    first result is differentiable. z-loss: PaLM, section 5.
    """
    return _cross_entropy(x_tD, w_vD, labels_t, z_loss, chunk, with_grads=False)[0]


def _cross_entropy(
    x_tD: Array, w_vD: Array, labels_t: Array, z_loss: float, chunk: int, with_grads: bool
) -> tuple[tuple[Array, Array], tuple]:
    """Returns both shares, and the gradients of x_tD and w_vD, in float32, if they are wanted."""
    first_row = lax.axis_index(TP) * w_vD.shape[0]
    rows_v = first_row + jnp.arange(w_vD.shape[0])

    def step(carry: tuple, inputs: tuple[Array, Array]):
        total, nll_total, dw_vD = carry
        x_TD, labels_T, logits_Tv, top_T = chunk_logits(*inputs, w_vD)
        exp_Tv, sum_T, label_logit_T = chunk_sums(logits_Tv, top_T, labels_T, rows_v)
        logsumexp_T = top_T + jnp.log(sum_T)
        valid_T = labels_T >= 0
        nll = jnp.sum(jnp.where(valid_T, logsumexp_T - label_logit_T, 0))
        z = jnp.sum(jnp.where(valid_T, z_loss * jnp.square(logsumexp_T), 0))
        total, nll_total = total + nll + z, nll_total + nll
        if not with_grads:
            return (total, nll_total, dw_vD), None
        scale_T = jnp.where(valid_T, (1 + 2 * z_loss * logsumexp_T) / sum_T, 0)
        dx_tD, dw = logit_gradients(exp_Tv, scale_T, labels_T[:, None] == rows_v, x_TD, w_vD)
        return (total, nll_total, dw_vD + dw), dx_tD

    zero = jnp.zeros_like(x_tD, dtype=jnp.float32, shape=())
    dw_vD = jnp.zeros_like(w_vD, dtype=jnp.float32) if with_grads else ()
    chunks = in_chunks(x_tD, labels_t, chunk)
    (total, nll, dw_vD), dx_tD = lax.scan(step, (zero, zero, dw_vD), chunks)
    tp = lax.axis_size(TP)  # all tp devices found the same sums: each takes an equal share
    if with_grads:
        dx_tD = dx_tD.reshape(x_tD.shape)
    return (total / tp, nll / tp), (dx_tD, dw_vD)


def in_chunks(x_tD: Array, labels_t: Array, chunk: int) -> tuple[Array, Array]:
    """Splits tokens into equal parts of at most `chunk`: [chunks, t / chunks, ...] of each."""
    n_chunks = -(-x_tD.shape[0] // chunk)
    while x_tD.shape[0] % n_chunks:
        n_chunks += 1
    return x_tD.reshape(n_chunks, -1, x_tD.shape[-1]), labels_t.reshape(n_chunks, -1)


def chunk_logits(x_tD: Array, labels_t: Array, w_vD: Array) -> tuple[Array, Array, Array, Array]:
    """Gathers a chunk's tokens over tp: their x_TD and labels_T, logits_Tv for this device's part
    of the vocabulary, and the largest logit of all parts, float32 [T]."""
    x_TD, labels_T = all_gather(x_tD, TP, 0), all_gather(labels_t, TP, 0)
    logits_Tv = jnp.einsum('td,vd->tv', x_TD, w_vD, preferred_element_type=jnp.float32)
    return x_TD, labels_T, logits_Tv, pmax(jnp.max(logits_Tv, axis=-1), TP)


def chunk_sums(
    logits_Tv: Array, top_T: Array, labels_T: Array, rows_v: Array
) -> tuple[Array, Array, Array]:
    """Returns exp(logits - top) of this device's part of the vocabulary, whose ids are `rows_v`;
    its sum over all of it; and the label's logit."""
    exp_Tv = jnp.exp(logits_Tv - top_T[:, None])
    row_T = jnp.clip(labels_T - rows_v[0], 0, len(rows_v) - 1)
    own_logit_T = jnp.take_along_axis(logits_Tv, row_T[:, None], axis=1)[:, 0]
    own_logit_T = jnp.where(rows_v[row_T] == labels_T, own_logit_T, 0)
    sum_T, label_logit_T = psum(jnp.stack((jnp.sum(exp_Tv, axis=-1), own_logit_T)), TP)
    return exp_Tv, sum_T, label_logit_T


def label_scores(x_tD: Array, w_vD: Array, labels_t: Array, chunk: int) -> tuple[Array, Array]:
    """Returns -log p(label) of each token, and whether greedy decoding would miss it: some other
    token is likelier, or as likely with a lower id. float32 [t] and bool [t].

    Layout and chunks as in `cross_entropy`; 0 and False for negative labels. Tokens with labels
    come first, and chunks in which no device has any are skipped: often few of a text's tokens are
    asked for. Moves one number more over the whole mesh. Not differentiated.
    """
    rows_v = lax.axis_index(TP) * w_vD.shape[0] + jnp.arange(w_vD.shape[0])
    order_t = jnp.argsort(labels_t < 0)
    # The largest number of labels on a device. Alike on all, so that all skip the same chunks: XLA
    # may move collectives that came before, of weights over fsdp, into the branch that reads them.
    n_labels = pmax(jnp.sum(labels_t >= 0, dtype=jnp.int32), AXES)

    def scores(x_tD: Array, labels_t: Array) -> tuple[Array, Array]:
        _, labels_T, logits_Tv, top_T = chunk_logits(x_tD, labels_t, w_vD)
        _, sum_T, label_logit_T = chunk_sums(logits_Tv, top_T, labels_T, rows_v)
        nats_T = top_T + jnp.log(sum_T) - label_logit_T
        # As jnp.argmax, which takes the first of equals.
        before_Tv = (logits_Tv == top_T[:, None]) & (rows_v < labels_T[:, None])
        n_before_T = psum(jnp.sum(before_Tv, axis=-1, dtype=jnp.int32), TP)
        missed_T = ~(label_logit_T >= top_T) | (n_before_T > 0)  # NaN are missed
        valid_T = labels_T >= 0
        own = functools.partial(local_slice, axis=TP, dim=0)
        return own(jnp.where(valid_T, nats_T, 0)), own(missed_T & valid_T)

    def none(_: Array, labels_t: Array) -> tuple[Array, Array]:
        return jnp.zeros_like(labels_t, dtype=jnp.float32), jnp.zeros_like(labels_t, dtype=bool)

    def step(first: Array, inputs: tuple[Array, Array]):
        found = lax.cond(first < n_labels, scores, none, *inputs)
        return first + len(inputs[1]), found

    chunks = in_chunks(x_tD[order_t], labels_t[order_t], chunk)
    _, found = lax.scan(step, jnp.zeros_like(n_labels), chunks)
    back_t = jnp.argsort(order_t)
    nats_t, missed_t = (values.reshape(-1)[back_t] for values in found)
    return nats_t, missed_t


def logit_gradients(
    exp_Tv: Array, scale_T: Array, is_label_Tv: Array, x_TD: Array, w_vD: Array
) -> tuple[Array, Array]:
    """Computes the gradients of x_tD and w_vD from d logits = exp · scale - is_label.

    exp is evaluated and written once, in the compute type. On TPU each of the two matmuls then
    makes its d logits from it as it reads, and none are written, if they look like two.
    """
    exp_Tv = lax.optimization_barrier(exp_Tv.astype(x_TD.dtype))

    def d_logits(exp_Tv: Array) -> Array:
        return (exp_Tv * scale_T[:, None] - is_label_Tv).astype(x_TD.dtype)

    dx_tD = reduce_scatter(jnp.einsum('tv,vd->td', d_logits(exp_Tv), w_vD), TP, 0)
    d_logits_Tv = d_logits(
        lax.platform_dependent(exp_Tv, tpu=lax.optimization_barrier, default=lambda x: x)
    )
    dw_vD = jnp.einsum('tv,td->vd', d_logits_Tv, x_TD, preferred_element_type=jnp.float32)
    return dx_tD, dw_vD


def _cross_entropy_forward(x_tD: Array, w_vD: Array, labels_t: Array, z_loss: float, chunk: int):
    shares, (dx_tD, dw_vD) = _cross_entropy(x_tD, w_vD, labels_t, z_loss, chunk, with_grads=True)
    return shares, (dx_tD, dw_vD.astype(w_vD.dtype))


def _cross_entropy_backward(z_loss: float, chunk: int, grads: tuple, cotangents: tuple):
    dx_tD, dw_vD = grads
    scale = psum(cotangents[0], TP) / lax.axis_size(TP)
    return (dx_tD * scale).astype(dx_tD.dtype), (dw_vD * scale).astype(dw_vD.dtype), None


cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)
