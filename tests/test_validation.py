"""Validation refuses configs that cannot run, and names the remedy."""

import importlib
import itertools
import math
import re

import pytest

from config import ConfigError, flat
from configs import default
from runtime.config_checks import RANGES, check_all_devices, validate


def errors(**changes) -> str:
    config = importlib.import_module('configs.tiny').get_config()
    config.update_from_flattened_dict({name.replace('__', '.'): x for name, x in changes.items()})
    with pytest.raises(ValueError, match='the config cannot run') as caught:
        validate(config, 8)
    return str(caught.value)


SIZES = [s for s in itertools.product((1, 2, 4, 8), repeat=4) if math.prod(s) <= 8 and s[3] <= 4]


@pytest.mark.parametrize('name', ['tiny', 'tiny_dense'])
@pytest.mark.parametrize('sizes', SIZES, ids=str)
def test_tiny_divides_on_every_mesh(name, sizes):
    config = importlib.import_module(f'configs.{name}').get_config()
    config.mesh.update(dict(zip(('dp', 'fsdp', 'ep', 'tp'), sizes, strict=True)))
    validate(config, 8)
    assert config.model.n_layers % 4 == 0


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (
            {'model__n_heads': 12, 'mesh__tp': 8},
            'model.n_heads=12 is not divisible by mesh.tp=8; use a tp of 1, 2, 3, 4, 6 or 12',
        ),
        ({'batch_size': 30, 'mesh__dp': 4}, 'batch_size=30'),
        ({'seq_len': 384}, 'seq_len=384 is not a multiple of model.attention_block=256'),
        ({'model__attention': 'mha'}, "model.attention='mha' is unknown; use one of mla, gqa"),
        ({'model__block': ('sparse',)}, "unknown kind 'sparse'"),
        ({'model__block': ('dense',) * 3}, 'use a multiple of 3'),
        ({'model__first_dense': 4}, 'model.first_dense=4'),
        ({'model__n_experts': 6, 'mesh__ep': 4}, 'use a ep of 1, 2, 3 or 6'),
        ({'model__experts_per_token': 17}, 'model.experts_per_token=17 is above'),
        ({'model__n_expert_groups': 3}, 'model.n_expert_groups=3; use 1, 2, 4, 8 or 16 groups'),
        ({'model__n_expert_groups': 4, 'model__n_top_groups': 5}, 'n_top_groups=5 is above'),
        ({'model__n_expert_groups': 16}, 'cannot offer model.experts_per_token=2'),
        ({'model__buffer_factor': 0.5, 'mesh__ep': 2}, 'model.buffer_factor=0.5'),
        ({'model__router': 'tanh'}, 'sigmoid, softmax'),
        ({'model__attention_kernel': 'splash'}, 'use check_vma=False'),
        ({'model__attention_kernel': 'flash'}, 'auto, splash, cudnn, latent, blockwise'),
        (
            {'model__attention_kernel': 'splash', 'check_vma': False, 'model__attention_block': 64},
            'makes blocks of 64, and splash takes multiples of 128',
        ),
        ({'model__attention_kernel': 'cudnn', 'check_vma': False}, "use 'bfloat16'"),
        (
            {
                'model__attention_kernel': 'cudnn',
                'check_vma': False,
                'model__remat': 'full',
                'model__remat_offload': ('attention',),
            },
            'name it in model.remat_keep',
        ),
        ({'optimizer__name': 'sgd'}, "optimizer.name='sgd' is unknown; use one of adamw, muon"),
        ({'optimizer__muon__coefficients': 'newton'}, 'use one of jordan, polar_express'),
        ({'optimizer__muon__scale': 'frobenius'}, 'use one of spectral, rms'),
        ({'optimizer__muon__replicas': 'share'}, 'use one of repeat, split'),
        ({'optimizer__muon__dtype': 'float16'}, 'use one of auto, float32, bfloat16'),
        (
            {
                'optimizer__name': 'muon',
                'optimizer__peak_lr': 0.0,
                'optimizer__muon__adamw_lr': 1e-3,
            },
            'follows the schedule of optimizer.peak_lr, which is 0; use a peak_lr above 0',
        ),
        ({'eval__averaged': True}, 'optimizer.ema=0.0 keeps none; give it a decay'),
        (
            {'model__attention_kernel': 'cudnn', 'check_vma': False, 'model__nope_dim': 36},
            'heads of 52 for queries and keys; use a multiple of 8',
        ),
        ({'model__remat_keep': ('attention',)}, "exceptions from remat='full'"),
        (
            {
                'model__remat': 'full',
                'model__remat_keep': ('qkv', 'residual'),
                'model__remat_offload': ('residual',),
            },
            "both have 'residual'",
        ),
        (
            {'model__block': ('dense',), 'model__remat': 'full', 'model__remat_keep': ('experts',)},
            "has 'experts', and no layer",
        ),
        (
            {'model__attention': 'gdn', 'model__remat': 'full', 'model__remat_offload': ('qkv',)},
            "has 'qkv', and no layer",
        ),
        ({'model__expert_kernel': 'triton'}, 'auto, ragged_dot, megablox, pallas, blocks'),
        ({'compiler_options': 'xla_a'}, "'xla_a', which sets nothing"),
        ({'model__remat': 'full', 'model__remat_offload': ('heads',)}, "the unknown 'heads'"),
        ({'model__rope_dim': 7}, 'model.rope_dim=7 is odd'),
        ({'model__rope_scaling': 'dynamic'}, "'dynamic' changes all rotations with the length"),
        ({'model__rope_scaling': 'longrope'}, 'use yarn, linear or llama3'),
        ({'model__rope_scaling': 'ntk'}, 'unknown; use one of none, linear, llama3, yarn'),
        ({'model__rope_scaling': 'llama3', 'model__rope_low_freq_factor': 5.0}, 'a low one below'),
        ({'model__group_score': 'mean'}, 'use one of top2, max'),
        ({'model__shared_gate': True, 'model__n_shared_experts': 0}, 'or shared_gate=False'),
        ({'model__kv_rank': 60, 'mesh__fsdp': 8}, 'model.kv_rank=60'),
        ({'model__attention': 'gqa', 'model__n_kv_heads': 3}, 'model.n_kv_heads=3'),
        ({'mesh__dp': 16}, '--cpu_devices=16'),
        ({'mesh__pp': 8}, 'mesh.pp * pipeline.chunks=8; use a product of 1, 2 or 4'),
        ({'pipeline__chunks': 2}, 'pipeline.chunks=2 cuts stages'),
        ({'mesh__pp': 2, 'pipeline__schedule': 'fifo'}, 'gpipe, 1f1b, interleaved, zero_bubble'),
        (
            {'mesh__pp': 2, 'pipeline__schedule': 'interleaved', 'pipeline__chunks': 2},
            'microbatches=1 is not a multiple of stages=2',
        ),
        ({'fsdp_gather': 'never'}, 'layer, step'),
        ({'fsdp_reduce': 'ring'}, 'reduce_scatter, all_to_all'),
        ({'optimizer__lr_schedule': 'step'}, 'cosine, wsd'),
        ({'optimizer__peak_lr': -1.0}, 'optimizer.peak_lr=-1.0 is out of range; use 0 or more'),
        ({'steps': 0}, 'steps=0 is out of range; use 1 or more'),
        ({'data__path': ''}, 'data.path is empty'),
        ({'data__sources': (('a', 'x', 1),)}, 'data.sources are both set; leave one of them empty'),
        ({'data__path': '', 'data__sources': ('x',)}, "data.sources holds 'x'; use ((name, path"),
        ({'data__path': '', 'data__sources': (('a', 'x', -1),)}, 'whose weight is not above 0'),
        ({'data__path': '', 'data__sources': (('', 'x', 1),)}, 'whose name or path is no text'),
        ({'data__path': '', 'data__sources': (('a', 'x', 1), ('a', 'y', 1))}, 'a name of its own'),
        ({'log__sample_every': 5, 'log__prompts': ()}, 'log.prompts=(); give texts that are not'),
        ({'log__sample_every': 5, 'log__prompts': ('',)}, "log.prompts=('',); give texts"),
        ({'compute_dtype': 'float16'}, 'float32, bfloat16'),
        ({'model__dropout': 1.0}, 'model.dropout=1.0 is out of range; use 0 to 0.99999994'),
        ({'guard__spike_factor': 0.5}, 'use a factor above 1, or 0 for none'),
        ({'guard__history': 0}, 'guard.history=0 is out of range; use 1 to 1000000'),
        (
            {'guard__step_seconds': -1.0},
            'guard.step_seconds=-1.0 is out of range; use 0 to 31622400',
        ),
    ],
    ids=lambda x: x if isinstance(x, str) else '',
)
def test_bad_values_are_refused_with_a_remedy(change, message):
    assert message in errors(**change)


def test_all_errors_come_at_once():
    text = errors(model__n_heads=6, mesh__tp=4, batch_size=31, mesh__dp=2)
    assert text.count('\n  - ') == 2


def test_unknown_keys_are_errors():
    config = importlib.import_module('configs.tiny').get_config()
    with pytest.raises((AttributeError, KeyError), match='n_head'):
        config.model.n_head = 3


def numbers() -> dict[str, float]:
    fields = flat(default.get_config().to_dict())
    return {n: x for n, x in fields.items() if type(x) in (int, float)}


def test_every_numeric_field_has_a_range_and_a_default_in_it():
    assert set(RANGES) == set(numbers())
    for name, value in numbers().items():
        low, high = RANGES[name]
        assert low <= value <= high, name
        assert math.isfinite(low), name
        assert math.isfinite(high), name


def set_field(config, name: str, value) -> None:
    config.update_from_flattened_dict({name: value})


@pytest.mark.parametrize('name', numbers())
def test_numbers_out_of_range_are_refused(name):
    low, high = RANGES[name]
    outside = [low - 1, high + 1 if isinstance(high, int) else high * 2]
    if isinstance(numbers()[name], float):
        outside += [math.nan, math.inf, -math.inf]
    for value in outside:
        config = importlib.import_module('configs.tiny').get_config()
        set_field(config, name, value)
        with pytest.raises(ConfigError, match=f'{name}={config_value(config, name)} is out of'):
            validate(config, 8)


def config_value(config, name: str) -> str:
    return re.escape(str(flat(config.to_dict())[name]))


@pytest.mark.parametrize(
    ('name', 'value', 'message'),
    [
        ('steps', True, 'steps=True is of the type bool; use a whole number'),
        ('steps', None, 'steps=None is of the type NoneType; use a whole number'),
        ('optimizer.peak_lr', None, 'of the type NoneType; use a number'),
        ('data.path', None, 'data.path=None is of the type NoneType; use a text'),
        ('log.prompts', (1, 2), "log.prompts=(1, 2) holds 1; use texts, as in ('1',)"),
        ('model.block', (('dense',),), 'model.block'),
        ('seed', 2**32, 'seed=4294967296 is out of range; use 0 to 4294967295'),
    ],
)
def test_values_have_the_type_of_the_default(name, value, message):
    assert message in errors(**{name.replace('.', '__'): value})


@pytest.mark.parametrize(
    ('mesh', 'devices', 'message'),
    [
        ({}, 8, 'takes 1 of 8 devices; use --config.mesh.fsdp=8 or --config.mesh.dp=8, or --spare'),
        ({'fsdp': 2, 'tp': 2}, 8, 'takes 4 of 8 devices; use --config.mesh.fsdp=4 or --config'),
        ({}, 7, 'python plan.py --config=... --search --devices=7'),
        ({'tp': 16}, 8, 'takes 16 devices and 8 are there'),
    ],
)  # fmt: skip
def test_a_mesh_that_leaves_devices_idle_is_refused_with_sizes(mesh, devices, message):
    config = importlib.import_module('configs.tiny').get_config()
    config.model.n_heads = 16
    config.mesh.update(mesh)
    with pytest.raises(ConfigError) as caught:
        check_all_devices(config, devices)
    assert message in str(caught.value)
    config.mesh.update(fsdp=4, tp=2)
    check_all_devices(config, 8)
