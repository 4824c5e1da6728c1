"""Writes balance_loss.json: the sequence-level balance loss by Megatron-Core's functions.

    pip install torch megatron-core && python tests/golden/make_balance_loss.py

Each case holds the router's logits [B, T, E], the loss and its gradient with respect to them.
"""

import importlib.metadata
import json
import pathlib
import platform

import torch
from megatron.core.transformer.moe import moe_utils

B, T, E, C = 2, 6, 8, 3  # sequences, tokens, experts, choices per token


def case(score_function: str, seed: int) -> dict:
    """Returns one case, computed in the order of TopKRouter._apply_seq_aux_loss."""
    logits_BTE = 3 * torch.randn(B, T, E, generator=torch.Generator().manual_seed(seed))
    logits_BTE.requires_grad_()
    logits = logits_BTE.swapaxes(0, 1).reshape(T * B, E)  # Megatron puts positions first
    chosen, scores = moe_utils.compute_routing_scores_for_aux_loss(logits, C, score_function)
    loss = moe_utils.switch_load_balancing_loss_func(
        probs=scores.reshape(T, B * E),
        tokens_per_expert=chosen.reshape(T, B * E).sum(dim=0),
        total_num_tokens=T,
        topk=C,
        num_experts=E,
        moe_aux_loss_coeff=1.0,
    )
    loss = loss / B
    loss.backward()
    return {
        'router': score_function,
        'experts_per_token': C,
        'logits': logits_BTE.tolist(),
        'loss': loss.item(),
        'gradient': logits_BTE.grad.tolist(),
    }


if __name__ == '__main__':
    versions = {name: importlib.metadata.version(name) for name in ('torch', 'megatron-core')}
    golden = {
        'versions': versions | {'python': platform.python_version()},
        'cases': [case('sigmoid', 0), case('softmax', 1)],
    }
    path = pathlib.Path(__file__).with_name('balance_loss.json')
    path.write_text(json.dumps(golden) + '\n')
