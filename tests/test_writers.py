"""Records reach Weights & Biases, a fake and the real one; missing packages are named."""

import sys
import types

import pytest
from common import small_config

from config import ConfigError
from runtime import writers
from runtime.config_checks import validate

RECORDS = [
    {'step': 10, 'tokens': 100, 'loss': 2.0, 'moe/0/load': [0.25, 0.75]},
    {'step': 10, 'eval_loss': 3.0},
    {'step': 20, 'samples': [{'prompt': 'a', 'text': 'b'}, {'prompt': 'c', 'text': 'd'}]},
]


class FakeRun:
    def __init__(self, **options):
        self.options, self.logged, self.finished = options, [], False

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


def test_wandb_receives_each_record_and_goes_on_under_its_id(monkeypatch, tmp_path):
    fake = types.SimpleNamespace(init=FakeRun, Histogram=lambda np_histogram: np_histogram)
    monkeypatch.setitem(sys.modules, 'wandb', fake)
    config = small_config()
    writer = writers.WeightsAndBiases(str(tmp_path), config, start=0)
    for record in RECORDS:
        writer.write(record)
    writer.close()
    run = writer._run
    assert run.finished
    assert run.logged == [
        (10, {'tokens': 100, 'loss': 2.0, 'moe/0/load': ([0.25, 0.75], [0, 1, 2])}),
        (10, {'eval_loss': 3.0}),
        (20, {'samples': 'ab\n\ncd'}),
    ]
    assert run.options['project'] == 'jaxformer'
    assert run.options['dir'] == str(tmp_path)
    assert run.options['config'] == config.to_dict()
    again = writers.WeightsAndBiases(str(tmp_path), config, start=10)._run
    assert again.options['id'] == run.options['id']
    anew = writers.WeightsAndBiases(str(tmp_path), config, start=0)._run
    assert anew.options['id'] != run.options['id']


@pytest.mark.slow
def test_wandb_itself_writes_offline(monkeypatch, tmp_path):
    wandb = pytest.importorskip('wandb', reason='pip install -r requirements/log.txt')
    monkeypatch.setenv('WANDB_MODE', 'offline')
    writer = writers.WeightsAndBiases(str(tmp_path), small_config(), start=0)
    for record in RECORDS:
        writer.write(record)
    writer.close()
    wandb.teardown()  # ends its service, which may still be writing
    (path,) = tmp_path.glob('wandb/offline-run-*/run-*.wandb')
    content = path.read_bytes()
    for text in (b'eval_loss', b'moe/0/load', b'ab\\n\\ncd'):
        assert text in content


@pytest.mark.parametrize(('name', 'package'), [('tensorboard', 'tensorboardX'), ('wandb', 'wandb')])
def test_a_missing_package_is_named(monkeypatch, tmp_path, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=f'pip install {package}'):
        writers.WRITERS[name](str(tmp_path), small_config(), 0)


def test_unknown_writers_are_refused():
    config = small_config()
    config.log.writers = ('tensorboard,wandb',)
    message = "the unknown 'tensorboard,wandb'; use tensorboard, wandb, or both"
    with pytest.raises(ConfigError, match=message):
        validate(config, 1)
