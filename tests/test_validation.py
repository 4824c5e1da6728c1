"""What validation refuses, and that it names the remedy."""

import importlib

import pytest

from validation import validate


def errors(**changes) -> str:
    config = importlib.import_module('configs.tiny').get_config()
    for name, value in changes.items():
        group, _, field = name.rpartition('__')
        (config[group] if group else config)[field] = value
    with pytest.raises(ValueError, match='the config cannot run') as caught:
        validate(config, 8)
    return str(caught.value)


@pytest.mark.parametrize('tp', [1, 2, 4])
@pytest.mark.parametrize('fsdp', [1, 2, 4, 8])
@pytest.mark.parametrize('dp', [1, 2, 4, 8])
def test_tiny_divides_on_every_mesh(dp, fsdp, tp):
    if dp * fsdp * tp > 8:
        pytest.skip('more than 8 devices')
    config = importlib.import_module('configs.tiny').get_config()
    config.mesh.update(dp=dp, fsdp=fsdp, tp=tp)
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
        ({'seq_len': 200}, 'seq_len=200 is not a multiple of model.attention_block=128'),
        ({'model__attention': 'mha'}, "model.attention='mha' is unknown; use one of mla, gqa"),
        ({'model__block': ('sparse',)}, "unknown kind 'sparse'"),
        ({'model__block': ('dense',) * 3}, 'model.n_layers=4 is not a multiple of the 3 layers'),
        ({'model__rope_dim': 7}, 'model.rope_dim=7 is odd'),
        ({'model__kv_rank': 60, 'mesh__fsdp': 8}, 'model.kv_rank=60'),
        ({'model__attention': 'gqa', 'model__n_kv_heads': 3}, 'model.n_kv_heads=3'),
        ({'mesh__dp': 16}, '--cpu_devices=16'),
        ({'mesh__pp': 2}, 'mesh.pp=2'),
        ({'optimizer__schedule': 'step'}, 'cosine, wsd'),
        ({'optimizer__peak_lr': -1.0}, 'optimizer.peak_lr=-1.0 is negative'),
        ({'steps': 0}, 'steps=0 is below 1'),
        ({'data__path': ''}, 'data.path is empty'),
        ({'compute_dtype': 'float16'}, 'float32, bfloat16'),
        ({'model__dropout': 1.0}, 'model.dropout=1.0'),
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
