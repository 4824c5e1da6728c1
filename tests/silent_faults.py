"""Faults that other projects published: each as an edit of this code, and the test that falls.

`silent.py` makes the edits in a copy and runs the tests; docs/silent_bugs.md is the same table to
read. Dates are those of the report. The words are ours; what each report says is behind its link.
"""

from typing import NamedTuple


class Fault(NamedTuple):
    """One published fault.

    project, number: the issue or, with pull, the pull request at GitHub. fault: what went wrong.
    meshes: those that show it. file, old, new: the edit that makes the same fault here; `old`
    stands in the file once. test: the one that falls.
    """

    project: str
    number: int
    date: str
    fault: str
    meshes: str
    file: str
    old: str
    new: str
    test: str
    pull: bool = False

    @property
    def link(self) -> str:
        """The report."""
        kind = 'pull' if self.pull else 'issues'
        return f'https://github.com/{self.project}/{kind}/{self.number}'


PARITY, PIPELINE, RESUME = 'tests/test_parity.py', 'tests/test_pipeline.py', 'tests/test_resume.py'
EXPERTS = f'{PARITY}::test_experts_match[(1, 2, 2, 2)]'
DENSE = f'{PARITY}::test_mesh_matches_one_device[mla-(2, 2, 2)]'
UNCHECKED = f'{PARITY}::test_mesh_matches_without_check_vma[mla]'
STAGES = f'{PARITY}::test_stages_match'
CUT = f'{PARITY}::test_cut_sequences_match[mla-ring-(1, 1, 2, 1, 1, 4)-True-True]'
KINDS = f'{PARITY}::test_kinds_of_layers_match[gqa-(1, 1, 2, 1, 1, 4)-True-ring]'
RELEASED = f'{PARITY}::test_experts_of_released_models_match[gpt_oss-(1, 1, 2, 2, 2)-True-blocks]'
DROPOUT = f'{PARITY}::test_dropout_matches'
RESUMED = f'{RESUME}::test_a_resumed_run_is_the_uninterrupted_one[{{}}]'

SQUARES = 'return varying(jnp.sum(jnp.square(x)) / lax.axis_size(free), free)'
SUM = 'return map_params(lambda p, g: lax.psum(g, free_axes(p.spec)), declared, grads)'
RESTORED = 'return restore_state(checkpoints, start, abstract_state(s))'


def squares(factor: str) -> str:
    """Returns the norm's sum of squares of a leaf, times a factor."""
    return SQUARES.replace('jnp.sum(jnp.square(x))', f'jnp.sum(jnp.square(x)) * {factor}')


def summed(gradient: str) -> str:
    """Returns the sum of gradients with another expression for each."""
    return SUM.replace('lax.psum(g, free_axes(p.spec))', gradient)


FAULTS = [
    # -------------------------------------------------------------------------------------------
    # The norm of the gradient
    # -------------------------------------------------------------------------------------------
    Fault(
        'NVIDIA/Megatron-LM', 5916, '2026-07-21',
        'the gradient norm leaves out the experts of all but one tensor-parallel rank, so that '
        'clipping clips less than it is told to',
        'ep × tp',
        'parallel.py', SQUARES,
        squares('(lax.axis_index(TP) == 0 if EP in spec_axes(p.spec) else 1)'),
        EXPERTS, pull=True,
    ),
    Fault(
        'ROCm/TransformerEngine', 715, '2026-08-25',
        'weights that all ranks hold count once a rank in the gradient norm: 1.36 to 1.52 times '
        'too large for models with latent attention',
        'tp',
        'parallel.py', SQUARES, SQUARES.replace(' / lax.axis_size(free)', ''),
        DENSE, pull=True,
    ),
    Fault(
        'deepspeedai/DeepSpeed', 5259, '2024-03-12',
        "the norm takes the average of the expert ranks' squares, where their sum is meant",
        'ep',
        'parallel.py', SQUARES,
        squares('(1 / lax.axis_size(EP) if EP in spec_axes(p.spec) else 1)'),
        EXPERTS, pull=True,
    ),
    Fault(
        'NVIDIA-NeMo/Automodel', 3817, '2026-09-05',
        'each expert-parallel rank clips by a norm of its own, so that copies of dense parameters '
        'are scaled by different factors and drift apart',
        'ep',
        'parallel.py',
        'return global_sum(sum(jax.tree.leaves(map_params(leaf, declared, tree))))',
        'total = sum(jax.tree.leaves(map_params(leaf, declared, tree)))\n'
        '    return lax.psum(total, tuple(axis for axis in AXES if axis != EP))',
        EXPERTS, pull=True,
    ),
    Fault(
        'NVIDIA/Megatron-LM', 7227, '2026-09-11',
        'an embedding that is the head as well counts twice in the norm where stages hold a copy '
        'each',
        'pp',
        'parallel.py', SQUARES,
        squares('(2 if p.spec == P(TP, FSDP) and lax.axis_size(PP) > 1 else 1)'),
        STAGES, pull=True,
    ),
    Fault(
        'NVIDIA/Megatron-LM', 7452, '2026-09-17',
        'attention sinks are left out of the norm on all tensor-parallel ranks but the first',
        'tp',
        'parallel.py', SQUARES,
        squares('(1 if p.matrix or TP not in spec_axes(p.spec) else lax.axis_index(TP) == 0)'),
        KINDS,
    ),
    # -------------------------------------------------------------------------------------------
    # The gradients
    # -------------------------------------------------------------------------------------------
    Fault(
        'pytorch/pytorch', 160285, '2025-08-10',
        'with two expert ranks every expert gradient is exactly twice as large, and the loss curve '
        'does not show it (found with torchtitan)',
        'ep',
        'parallel.py', SUM,
        summed('lax.psum(g, free_axes(p.spec)) * (lax.axis_size(EP) if EP in p.spec else 1)'),
        EXPERTS,
    ),
    Fault(
        'deepspeedai/DeepSpeed', 6545, '2024-09-17',
        'ZeRO hands out expert gradients that are ep times too large',
        'ep × fsdp',
        'parallel.py',
        'return x if whole else gather(x, FSDP, dim)',
        'y = x if whole else gather(x, FSDP, dim)\n'
        '        n = lax.axis_size(EP) if EP in p.spec else 1\n'
        '        return n * y - lax.stop_gradient((n - 1) * y)',
        EXPERTS,
    ),
    Fault(
        'huggingface/transformers', 48205, '2026-08-22',
        'what lies before the experts gets the gradient of its own rank alone: nothing sums it '
        'over the expert ranks',
        'ep',
        'parallel.py', SUM,
        summed('lax.psum(g, tuple(axis for axis in free_axes(p.spec) if axis != EP))'),
        EXPERTS, pull=True,
    ),
    Fault(
        'huggingface/transformers', 48687, '2026-09-10',
        "the router's gradient lacks the choices whose experts are on other ranks, while the loss "
        'is right',
        'ep',
        'layers/moe.py',
        '    expert_BTC = keep_within_capacity(expert_BTC, cfg)\n    slots,',
        '    here = expert_BTC // (cfg.n_experts // lax.axis_size(EP)) == lax.axis_index(EP)\n'
        '    weight_BTC = jnp.where(here, weight_BTC, lax.stop_gradient(weight_BTC))\n'
        '    expert_BTC = keep_within_capacity(expert_BTC, cfg)\n    slots,',
        EXPERTS,
    ),
    Fault(
        'NVIDIA/Megatron-LM', 1446, '2025-03-04',
        'gains of norms have another gradient on each tensor-parallel rank, since each sees a part '
        'of the sequence and nothing sums them',
        'tp, sequence parallel',
        'parallel.py', SUM,
        summed('lax.psum(g, tuple(a for a in free_axes(p.spec) if p.matrix or a != TP))'),
        UNCHECKED,
    ),
    Fault(
        'bigcode-project/Megatron-LM', 11, '2022-12-03',
        'biases of a single head of keys and values, which all tensor-parallel ranks hold, are '
        'left out of the sum over them',
        'tp',
        'parallel.py', SUM,
        summed('lax.psum(g, tuple(a for a in free_axes(p.spec) if len(p.shape) != 3 or p.matrix '
               'or a != TP))'),
        f'{PARITY}::test_biases_of_a_head_that_all_share_match',
    ),
    Fault(
        'NVIDIA/Megatron-LM', 1628, '2025-06-13',
        'with the experts cut by tensor parallelism alone their gradients are summed over the '
        'wrong group',
        'tp, ep = 1',
        'parallel.py', SUM,
        summed('lax.psum(g, tuple(a for a in free_axes(p.spec) if EP not in p.spec or a != DP))'),
        f'{PARITY}::test_experts_match[(2, 1, 4, 1)]',
    ),
    Fault(
        'deepspeedai/DeepSpeed', 5555, '2024-05-21',
        'gradients are divided by the sequence-parallel ranks too, and come out four times too '
        'small on four',
        'cp',
        'parallel.py', SUM, summed('lax.psum(g, free_axes(p.spec)) / lax.axis_size(CP)'),
        CUT, pull=True,
    ),
    Fault(
        'uw-syfi/piper', 13, '2026-07-17',
        'an embedding that is the head as well gets the gradient of one of its two stages',
        'pp',
        'train_step.py',
        '    if ahead:\n        grads = grads |',
        "    first = lax.axis_index(PP) == 0\n"
        "    own = jax.tree.map(lambda g: jnp.where(first, g, 0), grads['embed'])\n"
        "    grads = grads | {'embed': own}\n"
        '    if ahead:\n        grads = grads |',
        STAGES,
    ),
    Fault(
        'NVIDIA/TransformerEngine', 1557, '2025-03-11',
        'where keys go round between ranks the gradients of queries, keys and values are wrong, by '
        'a relative error of up to 1.2',
        'cp',
        'layers/context_parallel.py', 'd_travels = _next(d_here, cfg)', 'd_travels = d_here',
        CUT,
    ),
    Fault(
        'pytorch/torchtitan', 2972, '2026-04-15',
        'the pipeline goes backward from the sum of the loss, and only the number that is shown is '
        'divided by the tokens: gradients are larger by as many',
        'pp',
        'train_step.py', "return total / n_targets, {'nll': nll / n_targets}",
        "return total, {'nll': nll / n_targets}",
        STAGES,
    ),
    Fault(
        'pytorch/torchtitan', 1733, '2025-09-22',
        'what is accumulated is scaled again with each microbatch: a running mean, no sum',
        'any, with microbatches',
        'train_step.py', 'return (jax.tree.map(jnp.add, grads, new), nll_sum + nll), stats',
        'scaled = jax.tree.map(lambda g, n: (g + n) / n_microbatches, grads, new)\n'
        '        return (scaled, nll_sum + nll), stats',
        f'{PARITY}::test_accumulation_matches_one_large_batch',
    ),
    # -------------------------------------------------------------------------------------------
    # The loss
    # -------------------------------------------------------------------------------------------
    Fault(
        'huggingface/transformers', 24725, '2023-07-10',
        'a step is the mean of the microbatches\' means, so tokens of short rows weigh more',
        'any, with microbatches',
        'train_step.py',
        'return total / n_targets + router / n_microbatches, (nll / n_targets, stats)',
        'here = psum(jnp.sum(tokens_BT[:, 1:] >= 0), BATCH).astype(jnp.float32) * n_microbatches\n'
        '        return total / here + router / n_microbatches, (nll / here, stats)',
        f'{PARITY}::test_accumulation_matches_one_large_batch',
    ),
    Fault(
        'NVIDIA/Megatron-LM', 4896, '2026-05-20',
        'a loss is divided by the tokens of its own rank, and the quotients are averaged',
        'dp, cp',
        'train_step.py',
        'n_targets = psum(jnp.sum(tokens_MBT[..., 1:] >= 0), BATCH).astype(jnp.float32)',
        'n_targets = jnp.sum(tokens_MBT[..., 1:] >= 0).astype(jnp.float32) * lax.axis_size(BATCH)',
        DENSE,
    ),
    Fault(
        'NVIDIA/Megatron-LM', 7452, '2026-09-17',
        'each rank takes the whole vocabulary for its part: the loss is too large by log(tp), and '
        'its gradients are wrong',
        'tp',
        'layers/cross_entropy.py',
        'return exp_Tv, sum_T, label_logit_T',
        'return exp_Tv, sum_T * lax.axis_size(TP), label_logit_T',
        DENSE,
    ),
    Fault(
        'NVIDIA/Megatron-LM', 906, '2024-07-07',
        'the loss is multiplied by the ranks that cut the sequence, and so are the gradients',
        'cp',
        'model.py',
        '    router, stats = split_router_loss(stats)\n    return total, (nll, router, stats)',
        '    router, stats = split_router_loss(stats)\n'
        '    return total * lax.axis_size(CP), (nll, router, stats)',
        CUT,
    ),
    Fault(
        'huggingface/transformers', 45994, '2026-05-15',
        'the loss that is shown is multiplied by all processes, those too that hold the same rows: '
        '47.9 for 12 on 2 × 4',
        'tp with another axis',
        'train_step.py', "{'loss': global_sum(nll), 'router': router}",
        "{'loss': global_sum(nll) * lax.axis_size('tp'), 'router': router}",
        DENSE, pull=True,
    ),
    Fault(
        'NovaSky-AI/SkyRL', 1420, '2026-03-31',
        'numbers that all ranks of a cut sequence hold alike are summed over them: twice the loss',
        'cp',
        'train_step.py', "{'loss': global_sum(nll), 'router': router}",
        "{'loss': global_sum(nll) * lax.axis_size('cp'), 'router': router}",
        CUT, pull=True,
    ),
    Fault(
        'pytorch/torchtitan', 1759, '2025-09-25',
        'the validation loss is divided by the steps of gradient accumulation',
        'any, with microbatches',
        'train_step.py', "return run_stages(params, tokens_MBT, key, one, cfg, forward_schedule(s))"
        "[1].last['nll']",
        "return run_stages(params, tokens_MBT, key, one, cfg, forward_schedule(s))[1].last['nll'] "
        '/ tokens_MBT.shape[0]',
        f'{PIPELINE}::test_evaluation[1]',
    ),
    Fault(
        'NVIDIA-NeMo/Automodel', 3359, '2026-08-02',
        "the routers' loss enters every microbatch whole, and counts as often as there are any",
        'any, with microbatches',
        'train_step.py',
        'return total / n_targets + router / n_microbatches, (nll / n_targets, stats)',
        'return total / n_targets + router, (nll / n_targets, stats)',
        STAGES, pull=True,
    ),
    Fault(
        'NVIDIA/Megatron-LM', 3943, '2026-03-19',
        'an auxiliary loss is divided once more by the ranks that cut the sequence',
        'cp',
        'layers/moe.py',
        'lax.axis_size((*BATCH, *SEQUENCE))\n    total =',
        'lax.axis_size((*BATCH, *SEQUENCE)) * lax.axis_size(CP)\n    total =',
        CUT,
    ),
    # -------------------------------------------------------------------------------------------
    # Random numbers
    # -------------------------------------------------------------------------------------------
    Fault(
        'huggingface/transformers', 31412, '2024-06-14',
        'replicas draw the same dropout masks for different rows',
        'dp',
        'layers/dense.py', 'rows_B = lax.axis_index(BATCH) * B + jnp.arange(B)',
        'rows_B = jnp.arange(B)',
        DROPOUT,
    ),
    Fault(
        'PaddlePaddle/PaddleFleetX', 1005, '2022-12-28',
        'ranks that hold different parts of a sequence draw the same dropout masks',
        'tp, sequence parallel',
        'layers/dense.py',
        'positions_t = own_positions(jnp.arange(t * lax.axis_size(SEQUENCE)), 0)',
        'positions_t = jnp.arange(t)',
        DROPOUT, pull=True,
    ),
    Fault(
        'pytorch/torchtitan', 514, '2024-08-10',
        'every stage initialises its layers from the same seed, so layers are copies',
        'pp',
        'parallel.py', 'jax.random.fold_in(key, i))(jnp.arange(n))',
        'jax.random.fold_in(key, i))(jnp.zeros(n, int))',
        'tests/test_parallel.py::test_stacked_layers_differ_and_are_sharded_over_pp',
    ),
    Fault(
        'allenai/OLMo-core', 679, '2026-05-14',
        'the chunks of one stage are initialised alike',
        'pp, interleaved',
        'parallel.py', 'jax.random.fold_in(key, i))(jnp.arange(n))',
        'jax.random.fold_in(key, i))(jnp.arange(n) % (n // chunks))',
        'tests/test_parallel.py::test_layers_of_chunks_are_those_without',
        pull=True,
    ),
    Fault(
        'modelscope/ms-swift', 9935, '2026-08-17',
        'the random state that a checkpoint brought back is thrown away by a later seeding',
        'any, resumed',
        'train.py',
        '    s = setup(config, make_mesh(config.mesh), encoding.eot_token)\n    sample =',
        '    if r.start:\n'
        '        config = config.copy_and_resolve_references()\n'
        '        config.seed += 1\n'
        '    s = setup(config, make_mesh(config.mesh), encoding.eot_token)\n    sample =',
        RESUMED, pull=True,
    ),
    # -------------------------------------------------------------------------------------------
    # Resuming
    # -------------------------------------------------------------------------------------------
    Fault(
        'huggingface/accelerate', 4071, '2026-06-10',
        'after a resume the data starts over, in the order of the first epoch',
        'any, resumed',
        'train.py', 'batches = prefetch(phased.batch, r.start, config.steps)',
        'batches = prefetch(lambda i: phased.batch(i - r.start), r.start, config.steps)',
        RESUMED, pull=True,
    ),
    Fault(
        'NVIDIA-NeMo/Automodel', 763, '2025-11-04',
        "the optimizer's state is not restored, and the learning rate starts over",
        'any, resumed',
        'train.py', RESTORED,
        "fresh = init_state(s)\n"
        "        fresh['params'] = restore_state(checkpoints, start, abstract_state(s))['params']\n"
        '        return fresh',
        RESUMED,
    ),
    Fault(
        'deepspeedai/DeepSpeed', 564, '2020-11-28',
        'moments are restored without the count of updates that their bias correction goes by',
        'any, resumed',
        'train.py', RESTORED,
        "restored = restore_state(checkpoints, start, abstract_state(s))\n"
        "        restored['history']['skipped'] += restored['step']\n"
        '        return restored',
        RESUMED, pull=True,
    ),
    Fault(
        'marin-community/marin', 8911, '2026-09-04',
        'the step counter is made with another sharding than the step returns: the second step '
        'compiles everything again, and keeps both programs',
        'any',
        'train_step.py', 'jax.jit(init_numbers, out_shardings=NamedSharding(s.mesh, P()))()',
        'init_numbers()',
        'tests/test_train_step.py::test_a_step_is_compiled_once',
        pull=True,
    ),
    # -------------------------------------------------------------------------------------------
    # Documents, decay, experts
    # -------------------------------------------------------------------------------------------
    Fault(
        'axolotl-ai-cloud/axolotl', 1375, '2024-03-08',
        'packed documents attend to those before them',
        'any',
        'layers/attention.py', 'return table._replace(documents=documents_BT)', 'return table',
        'tests/test_model.py::test_a_document_does_not_feel_what_it_is_packed_with[mla]',
    ),
    Fault(
        'hiyouga/LlamaFactory', 7318, '2025-03-15',
        'packed documents are told apart, but positions go on from one to the next',
        'any',
        'layers/attention.py', 'zigzag(jnp.arange(T) - starts_BT, CP, 1)[:, None]',
        'zigzag(jnp.arange(T) + 0 * starts_BT, CP, 1)[:, None]',
        'tests/test_attention.py::test_positions_start_anew_after_the_end_of_a_document',
        pull=True,
    ),
    Fault(
        'ServiceNow/Fast-LLM', 542, '2026-06-17',
        'a refactoring lets gains of norms decay again',
        'any',
        'optimizer.py', 'decay = cfg.weight_decay if p.matrix else 0.0',
        'decay = cfg.weight_decay',
        'tests/test_optimizer.py::test_adamw_is_the_paper',
    ),
    Fault(
        'pytorch/torchtitan', 1304, '2025-06-16',
        "experts' biases are moved by the load of a microbatch, not of the step",
        'any, with microbatches',
        'train_step.py', 'return grads, nll, jax.tree.map(lambda x: jnp.sum(x, axis=0), stats)',
        'return grads, nll, jax.tree.map(lambda x: x[-1], stats)',
        STAGES, pull=True,
    ),
    Fault(
        'pytorch/torchtitan', 1114, '2025-04-17',
        "experts' biases that follow the load of their own rank drift apart: the sum over ranks "
        'has to be made by hand',
        'dp, ep',
        'train_step.py', 'lambda x: lax.psum(x, (*BATCH, *SEQUENCE)), stats)',
        'lambda x: lax.psum(x, SEQUENCE), stats)',
        EXPERTS, pull=True,
    ),
    Fault(
        'AI-Hypercomputer/maxtext', 2494, '2025-10-13',
        "experts' biases are declared and enter the choice, and nothing ever moves them",
        'any',
        'train_step.py',
        "params['blocks'] = update_biases(params['blocks'], metrics['router'], s.model.bias_rate)",
        "params['blocks'] = update_biases(params['blocks'], metrics['router'], 0.0)",
        'tests/test_moe.py::test_biases_balance_a_skewed_router[0.02]',
    ),
    Fault(
        'NVIDIA/Megatron-LM', 1545, '2025-04-17',
        'a router can push all its scores below the 1e-20 of the normaliser, and so the balance '
        'loss below its minimum',
        'any',
        'layers/moe.py',
        'log_prob_BtE = jax.nn.log_softmax(log_score_BtE, axis=-1)  # of scores over their sum',
        'score_BtE = jnp.exp(log_score_BtE)\n'
        '        share_BtE = score_BtE / (jnp.sum(score_BtE, axis=-1, keepdims=True) + 1e-20)\n'
        '        log_prob_BtE = jnp.log(jnp.maximum(share_BtE, 1e-30))',
        'tests/test_moe.py::test_router_is_exact_for_any_logits[sigmoid-True]',
    ),
    Fault(
        'meta-pytorch/MSLK', 158, '2026-02-19',
        'an expert without a token gets what lay in memory for its weight gradient, NaN among it',
        'ep, any',
        'layers/expert_kernels.py',
        'return carry[0], jax.tree.map(lambda g, x: g.astype(x.dtype), carry[1], m)',
        'poison = jnp.where(size > 0, 0, jnp.nan)\n'
        '        return carry[0], jax.tree.map(\n'
        '            lambda g, x: (g + poison).astype(x.dtype), carry[1], m\n'
        '        )',
        'tests/test_moe.py::test_grouped_swiglu_and_its_gradients[(300, 0, 5)-blocks]',
        pull=True,
    ),
    Fault(
        'facebookresearch/habitat-lab', 2226, '2026-04-20',
        'one NaN in the gradient of one rank passes through clipping into every parameter',
        'dp',
        'optimizer.py', '    if guard.nonfinite:\n        apply &= jnp.isfinite(norm)\n', '',
        'tests/test_guards.py::test_a_poisoned_step_is_as_if_it_had_not_been[(1, 2, 2, 2)-{}]',
    ),
    Fault(
        'kyutai-labs/pocket-tts', 262, '2026-08-28',
        'weights that are NaN are saved on, and push the last good checkpoints out',
        'any',
        'storage/steps.py', '                if leaf.finite:\n', '                if False:\n',
        'tests/test_poison.py::test_a_poisoned_copy_on_one_device_is_not_saved[(2, 2, 2)]',
        pull=True,
    ),
]  # fmt: skip
