"""Every mesh gives the numbers of one device: loss, each gradient leaf, updated parameters.

All in float32, by relative error of each leaf's norm; replicas must be bit-identical.
"""

import jax
import numpy as np
import pytest
from common import (
    KINDS,
    TOLERANCE,
    assert_replicas_identical,
    assert_trees_close,
    kinds_config,
    on_mesh,
    small_config,
)
from common_parity import check, cut, reference, run
from ml_collections import ConfigDict

MESHES = [(2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 2), (1, 4, 2), (1, 1, 8), (2, 1, 4), (8, 1, 1)]


@pytest.mark.parametrize(
    ('attention', 'sizes'), [('mla', (2, 2, 2)), ('mla', (1, 1, 8)), ('gqa', (2, 2, 2))], ids=str
)
def test_mesh_matches_one_device(attention, sizes):
    check(small_config(attention, tied=attention == 'mla'), sizes)


@pytest.mark.parametrize('attention', ['mla', pytest.param('gqa', marks=pytest.mark.slow)])
def test_mesh_matches_with_accumulation(attention):
    check(small_config(attention, tied=attention == 'gqa', microbatches=2), (2, 2, 2))


@pytest.mark.parametrize('attention', ['mla', pytest.param('gqa', marks=pytest.mark.slow)])
def test_mesh_matches_without_check_vma(attention):
    config = small_config(attention)
    config.check_vma = False
    check(config, (2, 2, 2))


@pytest.mark.parametrize('moe', [False, pytest.param(True, marks=pytest.mark.slow)])
def test_matmuls_in_8_bits_match(moe):
    """Over fsdp. Axes that add in another order may round to the other number what lies between
    two in 8 bits; tests/test_float8_meshes.py has those."""
    config = small_config('gqa', moe=moe)
    config.model.matmul_type = 'fp8'
    check(config, (1, 2, 1))


EXPERT_MESHES = [
    (1, 1, 1, 2),
    (1, 1, 1, 4),
    (2, 1, 1, 4),
    (1, 2, 1, 2),
    (1, 1, 2, 4),
    (1, 2, 2, 2),
    (2, 1, 2, 2),
]


@pytest.mark.parametrize(
    'sizes', [(1, 2, 2, 2), pytest.param((2, 1, 4, 1), marks=pytest.mark.slow)], ids=str
)
def test_experts_match(sizes):
    check(small_config(moe=True), sizes)


@pytest.mark.slow
def test_experts_match_with_accumulation_and_remat():
    config = small_config('gqa', moe=True, microbatches=2)
    config.model.remat, config.model.router, config.model.normalize_weights = (
        'full',
        'softmax',
        False,
    )
    check(config, (1, 2, 2, 2))


def test_stages_match():
    """Clipping, updates and biases where layers are spread over pp."""
    check(small_config(moe=True, microbatches=2), (1, 1, 2, 2, 2))


EXPERT_VARIANTS = [('sigmoid', 0.0, True), ('softmax', 0.8, True), ('sigmoid', 0.8, False)]


@pytest.mark.slow
@pytest.mark.parametrize('k', range(2 * len(EXPERT_MESHES)))
def test_complete_grid_of_experts(k):
    """Every mesh is seen with two of the three variants."""
    again, i = divmod(k, len(EXPERT_MESHES))
    sizes, (router, capacity, check_vma) = EXPERT_MESHES[i], EXPERT_VARIANTS[(i + again) % 3]
    config = small_config(moe=True, microbatches=2)
    config.model.update(router=router, capacity_factor=capacity)
    want = reference(config)
    config.check_vma = check_vma
    check(config, sizes, want=want)


# Every mesh sees tied and untied heads and both numbers of microbatches, if not each with each;
# without the check, two meshes with all three collectives suffice.
WITH_CHECK = [(*m, *c, True) for m in MESHES for c in ((True, 1), (False, 2))]
WITHOUT_CHECK = [(*m, *c, False) for m in ((2, 2, 2), (1, 4, 2)) for c in ((True, 2), (False, 1))]


@pytest.mark.slow
@pytest.mark.parametrize('k', range(len(WITH_CHECK + WITHOUT_CHECK)))
def test_complete_grid(k):
    """Both attentions go through the grid in turns."""
    dp, fsdp, tp, tied, microbatches, check_vma = (WITH_CHECK + WITHOUT_CHECK)[k]
    config = small_config(('mla', 'gqa')[(k + k // 2) % 2], tied, microbatches)
    want = reference(config)  # the check changes no number: one reference serves both
    config.check_vma = check_vma
    check(config, (dp, fsdp, tp), want=want)


# ---------------------------------------------------------------------------------------------
# Muon, which brings the shards of each matrix together
# ---------------------------------------------------------------------------------------------


def muon_config(attention: str = 'mla', **changes) -> ConfigDict:
    """Its three steps end with one that is skipped, and the weights are averaged."""
    config = small_config(attention, moe=True, microbatches=2)
    config.optimizer.update(name='muon', ema=0.9, cautious_decay=True)
    config.optimizer.muon.update(changes)
    config.guard.update(history=1, spike_factor=1.001)
    return config


@pytest.mark.parametrize(
    ('attention', 'sizes', 'check_vma', 'changes'),
    [
        ('mla', (1, 2, 1, 2, 2), True, {}),
        ('gqa', (2, 2, 2), False, {'split_heads': True, 'replicas': 'split'}),
    ],
    ids=str,
)
def test_muon_matches(attention, sizes, check_vma, changes):
    check_muon(muon_config(attention, **changes), sizes, check_vma)


def check_muon(config: ConfigDict, sizes: tuple[int, ...], check_vma: bool) -> None:
    want = reference(config)
    assert want['skipped'] == 1, want['grad_norms']
    config.check_vma = check_vma
    check(config, sizes, want=want)


# (dp, fsdp, tp, ep, pp)
MUON_MESHES = [
    (8, 1, 1, 1, 1),
    (1, 8, 1, 1, 1),
    (1, 1, 8, 1, 1),
    (1, 1, 1, 8, 1),
    (1, 2, 2, 2, 1),
    (2, 1, 2, 1, 2),
    (2, 2, 1, 1, 2),
    (1, 1, 2, 2, 2),
]


MUON_VARIANTS = [
    ('mla', {}),
    ('gqa', {'replicas': 'split', 'scale': 'spectral', 'coefficients': 'polar_express'}),
]


@pytest.mark.slow
@pytest.mark.parametrize('k', range(len(MUON_MESHES) + 4))
def test_complete_grid_of_muon(k):
    """The variants go through the meshes in turns; those of several axes are seen with both."""
    i = k if k < len(MUON_MESHES) else k - 4
    attention, changes = MUON_VARIANTS[(i + (k > i)) % 2]
    check_muon(muon_config(attention, **changes), MUON_MESHES[i], check_vma=i // 2 % 2 > 0)


@pytest.mark.slow
@pytest.mark.parametrize('sizes', [(1, 2, 4, 1, 1), (1, 1, 2, 2, 2)], ids=str)
def test_muon_matches_with_a_head_that_all_share(sizes):
    """Keys and values of one head are whole on each tp device, and queries are not."""
    config = muon_config('gqa', split_heads=True, replicas='split')
    config.model.update(n_kv_heads=1, n_shared_experts=2)
    config.guard.spike_factor = 0.0
    check(config, sizes)


@pytest.mark.slow
def test_muon_matches_by_interleaved_stages():
    """Layers of several chunks: two dimensions count matrices."""
    config = muon_config()
    config.model.update(n_layers=9, block=('dense', 'moe'))
    want = reference(config)
    config.pipeline.update(schedule='interleaved', chunks=2)
    config.mesh.update(pp=2, fsdp=2, tp=2)
    got = run(config)
    flat = jax.tree.map(lambda x, like: np.reshape(x, np.shape(like)), got, want)
    for part in ('params', 'average', 'grads'):
        assert_trees_close(flat[part], want[part], TOLERANCE)
    assert flat['skipped'] == want['skipped'] == 1


# ---------------------------------------------------------------------------------------------
# Experts and rotations of released models
# ---------------------------------------------------------------------------------------------

RELEASED = {
    'gpt_oss': {
        'router': 'softmax', 'router_bias': True, 'expert_bias': True, 'swiglu_limit': 0.5,
        'n_shared_experts': 0, 'rope_scaling': 'yarn', 'rope_factor': 4.0, 'rope_truncate': False,
    },
    'gated': {
        'router': 'softmax', 'normalize_weights': False, 'group_score': 'max', 'shared_gate': True,
        'n_shared_experts': 2, 'rope_scaling': 'llama3', 'rope_factor': 8.0,
        'rope_original_len': 64, 'latent_norm_eps': 0.01,
    },
}  # fmt: skip


def check_released(
    name: str, sizes: tuple[int, ...], check_vma: bool = True, kernel: str = 'blocks', **changes
) -> None:
    """Of one device: no schedule, no check, and the loop over blocks."""
    config = small_config('gqa' if name == 'gpt_oss' else 'mla', moe=True, microbatches=2)
    config.optimizer.name = 'muon'
    config.model.update(RELEASED[name], attention_block=2, expert_kernel='blocks', **changes)
    want = reference(config)
    config.check_vma, config.model.expert_kernel = check_vma, kernel
    config.pipeline.schedule = 'zero_bubble'
    check(config, sizes, want=want)


@pytest.mark.parametrize(
    ('name', 'sizes', 'check_vma', 'kernel'),
    [
        ('gpt_oss', (1, 1, 2, 2, 2), True, 'blocks'),
        ('gated', (1, 2, 2, 1, 1, 2), False, 'ragged_dot'),
    ],
    ids=str,
)
def test_experts_of_released_models_match(name, sizes, check_vma, kernel):
    check_released(name, sizes, check_vma, kernel)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('name', 'sizes', 'check_vma', 'kernel'),
    [
        ('gpt_oss', (1, 2, 2, 2), True, 'blocks'),
        ('gated', (2, 1, 1, 4), True, 'ragged_dot'),
        ('gpt_oss', (1, 1, 2, 2, 1, 2), False, 'pallas'),
        ('gated', (1, 1, 2, 2, 2), True, 'blocks'),
        ('gated', (1, 1, 2, 2, 1, 2), False, 'pallas'),
        ('gpt_oss', (1, 2, 1, 1, 2, 2), True, 'ragged_dot'),
        ('gpt_oss', (1, 1, 8), False, 'blocks'),
    ],
    ids=str,
)
def test_complete_grid_of_released_experts(name, sizes, check_vma, kernel):
    """With and without a capacity and remat, if not each with each."""
    changes = {'remat': 'full'} if check_vma else {'capacity_factor': 0.8}
    check_released(name, sizes, check_vma, kernel, **changes)


# ---------------------------------------------------------------------------------------------
# Context parallelism
# ---------------------------------------------------------------------------------------------


def check_cut(
    config: ConfigDict,
    sizes: tuple[int, ...],
    check_vma: bool = True,
    tolerance: float = TOLERANCE,
) -> None:
    """Of one device: neither style nor check."""
    alone = config.copy_and_resolve_references()
    alone.cp_style = 'ring'
    want = reference(alone)
    config.check_vma = check_vma
    check(config, sizes, tolerance, want)


@pytest.mark.parametrize(
    ('attention', 'style', 'sizes', 'check_vma', 'documents'),
    [
        ('mla', 'ring', (1, 1, 2, 1, 1, 4), True, True),
        ('gqa', 'ring', (1, 2, 1, 2, 1, 2), False, False),
        ('mla', 'gather', (2, 1, 1, 1, 2, 2), True, True),
    ],
    ids=str,
)
def test_cut_sequences_match(attention, style, sizes, check_vma, documents):
    check_cut(cut(attention, style, documents, moe=True), sizes, check_vma)


# (dp, fsdp, tp, ep, pp, cp)
CUT_MESHES = [
    (*tuple(2 if i == axis else 1 for i in range(5)), cp) for cp in (2, 4) for axis in range(5)
]


@pytest.mark.slow
@pytest.mark.parametrize('k', range(len(CUT_MESHES)))
def test_complete_grid_of_cut_sequences(k):
    """Styles, attentions, documents or none, the check or none go through the grid in turns, so
    that each axis is seen with both styles."""
    style, attention = ('ring', 'gather')[k % 2], ('mla', 'gqa')[k // 2 % 2]
    config = cut(attention, style, documents=k // 3 % 2 > 0, moe=True)
    check_cut(config, CUT_MESHES[k], check_vma=k % 3 > 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('style', 'model'),
    [
        ('ring', {'dropout': 0.3, 'remat': 'full'}), ('gather', {'dropout': 0.3}),
        ('ring', {'remat': 'full', 'remat_keep': ('attention',)}), ('ring', {'remat': 'dots'}),
        ('gather', {'remat': 'full', 'remat_keep': ('attention',)}),
    ],
    ids=str,
)  # fmt: skip
def test_cut_sequences_match_with_dropout_and_remat(style, model):
    check_cut(cut('mla', style, documents=True, **model), (1, 1, 2, 1, 1, 2))


@pytest.mark.slow
@pytest.mark.parametrize('style', ['ring', 'gather'])
def test_cut_sequences_match_by_muon(style):
    config = muon_config(replicas='split')
    config.model.attention_block, config.cp_style = 2, style
    check_muon(config, (1, 2, 1, 1, 1, 4), check_vma=True)


@pytest.mark.slow
def test_cut_sequences_match_with_a_head_that_all_share():
    check_cut(cut('gqa', 'ring', documents=True, n_kv_heads=1), (1, 1, 2, 1, 1, 4))


# ---------------------------------------------------------------------------------------------
# Kinds of layers
# ---------------------------------------------------------------------------------------------


def check_kinds(
    name: str,
    sizes: tuple[int, ...],
    check_vma: bool,
    style: str = 'ring',
    moe: bool = False,
    tolerance: float = TOLERANCE,
    **model,
) -> None:
    config = kinds_config(name, microbatches=2, moe=moe)
    config.cp_style = style
    config.model.update({'attention_block': 2, 'document_end': 3} | model)
    check_cut(config, sizes, check_vma, tolerance)


@pytest.mark.parametrize(
    ('name', 'sizes', 'check_vma', 'style'),
    [
        ('gqa', (1, 1, 2, 1, 1, 4), True, 'ring'),
        ('mla', (1, 2, 2, 1, 1, 2), False, 'gather'),
        ('delta', (1, 1, 2, 1, 1, 4), True, 'ring'),
        pytest.param('delta', (1, 2, 4), False, 'ring', marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_kinds_of_layers_match(name, sizes, check_vma, style):
    check_kinds(name, sizes, check_vma, style)


# (dp, fsdp, tp, ep, pp, cp)
KIND_MESHES = [
    (2, 1, 1, 1, 1, 4), (1, 2, 1, 1, 2, 2), (1, 1, 4, 2, 1, 1), (1, 2, 2, 1, 1, 2),
    (1, 1, 4, 1, 2, 1), (2, 2, 1, 2, 1, 1),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize('k', range(2 * len(KIND_MESHES)))
def test_complete_grid_of_kinds(k):
    """Every mesh is seen with a block of both attentions and with one of them, with both styles,
    with and without the check."""
    again, i = divmod(k, len(KIND_MESHES))
    name = ('gqa', 'mla')[i % 2] if again else 'both'
    style = ('ring', 'gather')[(i // 2 + again) % 2]
    check_kinds(name, KIND_MESHES[i], (i + again) % 2 > 0, style, moe=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('sizes', 'check_vma', 'model'),
    [
        ((1, 1, 2, 1, 2, 2), True, {'remat': 'full'}),
        ((1, 2, 2, 2), False, {'remat': 'full', 'remat_keep': ('attention',)}),
        ((2, 1, 1, 1, 1, 4), False, {'document_end': -1}),
        ((1, 1, 2, 1, 1, 2), True, {'delta_conv': 1}),
    ],
    ids=str,
)
def test_complete_grid_of_linear_layers(sizes, check_vma, model):
    """A state that passes over parts is rounded in another order than that of one device: gradients
    differ by 2.4e-5 of a leaf over four parts, and by 6e-5 over two without convolutions. Three
    steps of Adam amplify that."""
    rounded = sizes[-1] == 4 or 'delta_conv' in model
    tolerance = 1e-3 if rounded else TOLERANCE
    check_kinds('delta', sizes, check_vma, moe=True, tolerance=tolerance, **model)


@pytest.mark.slow
@pytest.mark.parametrize(
    ('name', 'model'),
    [
        ('gqa', {'dropout': 0.3, 'remat': 'full'}), ('mla', {'remat': 'dots'}),
        ('mla', {'remat': 'full', 'remat_keep': ('attention', 'qkv')}),
        ('gqa', {'remat': 'full', 'remat_keep': ('attention', 'qkv')}),
        ('gqa', {'document_end': -1, 'window': 1}), ('mla', {'document_end': -1, 'window': 100}),
    ],
    ids=str,
)  # fmt: skip
def test_kinds_of_layers_match_with_dropout_remat_and_other_windows(name, model):
    check_kinds(name, (1, 1, 2, 1, 1, 2), check_vma=True, **model)


@pytest.mark.slow
def test_kinds_of_layers_match_by_muon():
    config = muon_config(replicas='split')
    config.model.update(KINDS['gqa'], n_layers=4, first_dense=0)
    check_muon(config, (1, 2, 2, 1, 2), check_vma=True)


@pytest.mark.slow
@pytest.mark.parametrize('sizes', [(1, 1, 2, 1, 1, 2), (1, 2, 2)], ids=str)
def test_splash_matches_with_windows_and_sinks(sizes):
    """The interpreted kernel, and documents."""
    config = kinds_config('mla')
    config.batch_size, config.seq_len = 4, 512
    config.check_vma, config.cp_style = False, 'gather'
    config.model.update(attention_block=128, document_end=3, window=150)
    want = reference(config)
    config.model.attention_kernel = 'splash'
    check(config, sizes, want=want)


def test_accumulation_matches_one_large_batch():
    check(small_config(microbatches=1), (1, 1, 1))
    whole, parts = reference(small_config()), reference(small_config(microbatches=4))
    assert_trees_close(parts['grads'], whole['grads'], TOLERANCE)


def test_multi_query_matches():
    config = small_config('gqa')
    config.model.n_kv_heads = 1
    check(config, (1, 2, 4))


def test_biases_of_a_head_that_all_share_match():
    """Copies of the biases of a single head of keys and values stay alike over tp."""
    config = kinds_config('gqa')
    config.model.n_kv_heads = 1
    config.check_vma = False
    check(config, (1, 1, 2))


@pytest.mark.slow
def test_whole_query_matches():
    config = small_config('mla')
    config.model.q_rank = 0
    check(config, (2, 1, 4))


@pytest.mark.parametrize(
    ('attention', 'sizes'),
    [('mla', (1, 1, 2, 1, 1, 2)), pytest.param('gqa', (1, 1, 1, 1, 1, 4), marks=pytest.mark.slow)],
    ids=str,
)
def test_splash_matches_on_cut_sequences(attention, sizes):
    """The interpreted kernel of each device's queries, and documents."""
    config = small_config(attention)
    config.batch_size, config.seq_len = 4, 256 * sizes[-1]
    config.check_vma, config.cp_style = False, 'gather'
    config.model.update(attention_block=128, document_end=3)
    want = reference(config)
    config.model.attention_kernel = 'splash'
    check(config, sizes, want=want)


def test_splash_matches():
    """The interpreted kernel on a mesh against the blockwise form on one device."""
    config = small_config()
    config.seq_len, config.model.attention_block, config.check_vma = 128, 128, False
    config.model.update(remat='full', remat_keep=('attention', 'qkv'))
    want = reference(config)
    config.model.attention_kernel = 'splash'
    check(config, (2, 2, 2), want=want)


@pytest.mark.parametrize(
    ('sizes', 'model'),
    [
        ((2, 2, 2), {'remat': 'full', 'remat_keep': ('attention',)}),
        pytest.param((1, 2, 4), {'q_rank': 0, 'attention_gate': True}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_latent_kernel_matches(sizes, model):
    """The interpreted kernel on a mesh against the blockwise form on one device; one layer in two
    has no rotary part."""
    config = small_config()
    config.seq_len, config.check_vma = 128, False
    config.model.update(attention_block=128, block=('mla+dense', 'mla_nope+dense'), **model)
    want = reference(config)
    config.model.attention_kernel = 'latent'
    check(config, sizes, want=want)


@pytest.mark.parametrize(
    ('sizes', 'changes'),
    [
        ((1, 2, 4), {'check_vma': True}),
        pytest.param((2, 2, 2), {'check_vma': False}, marks=pytest.mark.slow),
        pytest.param((1, 4, 2), {'fsdp_gather': 'step'}, marks=pytest.mark.slow),
        pytest.param((2, 2, 2), {'pipeline.schedule': 'zero_bubble'}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_gradients_by_all_to_all_match(sizes, changes):
    """Against reduce-scatters on one device; experts too, which fsdp cuts in their second dimension
    and their third."""
    config = small_config(microbatches=2, moe='pipeline.schedule' not in changes)
    config.update_from_flattened_dict(changes)
    want = reference(config)
    config.fsdp_reduce = 'all_to_all'
    check(config, sizes, want=want)


@pytest.mark.slow
@pytest.mark.parametrize('kernel', ['pallas', 'megablox'])
def test_experts_by_pallas_match(kernel):
    """The interpreted kernels on a mesh against the loop over blocks on one device, experts'
    outputs kept."""
    config = small_config(moe=True)
    config.check_vma = False
    config.mesh.ep = 2
    want = reference(config)
    config.model.update(expert_kernel=kernel, remat='full', remat_keep=('experts',))
    check(config, (1, 2, 2), want=want)


@pytest.mark.parametrize('attention', ['mla', pytest.param('gqa', marks=pytest.mark.slow)])
def test_packed_documents_match(attention):
    config = small_config(attention)
    config.model.document_end = 3
    assert reference(config)['loss'] != reference(small_config(attention))['loss']
    check(config, (2, 2, 2))


def test_dropout_matches():
    config = small_config()
    config.model.dropout = 0.3
    assert reference(config)['loss'] != reference(small_config())['loss']
    check(config, (2, 2, 2))


@pytest.mark.parametrize(
    'keep',
    [None, *(pytest.param(k, marks=pytest.mark.slow) for k in ((), ('attention', 'hidden')))],
    ids=str,
)
def test_remat_matches(keep):
    config = small_config()
    plain = reference(config)
    config.model.remat = 'dots' if keep is None else 'full'
    config.model.remat_keep = keep or ()
    check(config, (2, 2, 2))
    assert_trees_close(reference(config)['grads'], plain['grads'], TOLERANCE)


@pytest.mark.parametrize(
    'sizes', [(2, 2, 2), pytest.param((1, 1, 8), marks=pytest.mark.slow)], ids=str
)
def test_bfloat16_matches(sizes):
    config = small_config()
    config.compute_dtype = 'bfloat16'
    want, got = reference(config), run(on_mesh(config, sizes))
    exact = reference(small_config())
    assert got['loss'] == pytest.approx(exact['loss'], rel=5e-3)
    assert_trees_close(got['grads'], want['grads'], 5e-2)
    assert_trees_close(got['grads'], exact['grads'], 8e-2)
    assert all(g.dtype == np.float32 for g in jax.tree.leaves(got['grads']))
    assert_replicas_identical(got['params'])
