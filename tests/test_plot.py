"""Plots of runs, whose files are written here."""

import json
import pathlib

import numpy as np
import pytest
from matplotlib.figure import Figure

from config import ConfigError
from runtime.plot import Run, plot, smooth


def write_run(workdir: pathlib.Path, batch_size: int = 4, moe: bool = True) -> str:
    workdir.mkdir()
    (workdir / 'config.json').write_text(
        json.dumps({'steps': 400, 'batch_size': batch_size, 'seq_len': 8})
    )
    records = []
    for step in range(10, 400, 10):
        record = {'step': step, 'loss': 9 / step, 'grad_norm': 1.0, 'tokens_per_second': 100.0}
        for layer in (1, 3) if moe else ():
            record[f'moe/{layer}/load_max_over_mean'] = 2.0
            record |= {f'moe/{layer}/load': [0.75, 0.25]} if step % 100 == 0 else {}
        records.append(record)
    for name in ('', '/web', '/code'):
        records.append({'step': 200, f'eval_loss{name}': 2.0, f'eval_bits_per_byte{name}': 1.0})
    lines = ''.join(json.dumps(r) + '\n' for r in records)
    (workdir / 'metrics.jsonl').write_text(lines + '{"step": 400, "lo')
    return str(workdir)


def test_a_run_is_read_by_what_it_holds(tmp_path):
    run = Run(write_run(tmp_path / 'a'))
    steps, values = run.curve('loss')
    np.testing.assert_array_equal(steps, np.arange(10, 400, 10))
    np.testing.assert_allclose(values, 9 / steps)
    assert run.names('eval_loss') == ['eval_loss', 'eval_loss/code', 'eval_loss/web']
    step, layers, loads = run.last_loads()
    assert (step, layers) == (300, [1, 3])
    np.testing.assert_array_equal(loads, [[1.5, 0.5]] * 2)
    assert Run(write_run(tmp_path / 'dense', moe=False)).last_loads() is None


def test_smoothing_keeps_level_and_slope_and_bridges_what_is_not_finite():
    x = np.arange(0, 1000, 10.0)
    np.testing.assert_allclose(smooth(x, np.full(100, 3.0)), 3)
    inside = slice(10, 90)
    np.testing.assert_allclose(smooth(x, x)[inside], x[inside], rtol=1e-3)
    y = np.where(np.arange(100) % 2, 1.0, 3.0)
    assert np.abs(smooth(x, y)[inside] - 2).max() < 0.2
    y = np.ones(100)
    y[50] = np.nan
    np.testing.assert_allclose(smooth(x, y), 1)
    np.testing.assert_allclose(smooth(np.array([5.0]), np.array([1.0])), 1)


def test_pictures_of_one_and_of_several_runs(tmp_path, monkeypatch):
    drawn, save = [], Figure.savefig

    def savefig(self, path, **options):
        drawn.append(self)
        if len(drawn) == 2:  # drawing takes seconds, and the second has all that others have
            save(self, path, **options)

    monkeypatch.setattr(Figure, 'savefig', savefig)
    a, b = write_run(tmp_path / 'a'), write_run(tmp_path / 'b', batch_size=8, moe=False)
    assert plot([a]) == f'{a}/metrics.png'
    assert plot([a, b]) == f'{tmp_path}/metrics.png'
    assert (tmp_path / 'metrics.png').read_bytes().startswith(b'\x89PNG')
    assert plot([b], str(tmp_path / 'c.png')) == f'{tmp_path}/c.png'
    one, two, dense = ([ax for ax in f.axes if ax.get_title('left')] for f in drawn)
    assert [ax.get_title('left') for ax in one] == [
        'loss (nats per token)', 'validation, bits per byte', 'gradient norm', 'tokens per second',
        'max/mean expert load', 'expert load, step 300',
    ]  # fmt: skip
    assert one[-1].get_images()[0].get_array().shape == (2, 2)
    assert {ax.get_xlabel() for ax in one} == {'step', 'expert'}
    assert {ax.get_xlabel() for ax in two} == {'tokens', 'expert'}  # batches of different sizes
    assert len(dense) == 4
    assert [t.get_text() for t in drawn[1].legends[0].get_texts()] == ['a', 'b']
    x = {tuple(line.get_xdata()[-1:]) for line in two[0].get_lines() if len(line.get_xdata()) > 2}
    assert x == {(390 * 4 * 8,), (390 * 8 * 8,)}


def test_what_cannot_be_drawn(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match='does not exist'):
        plot([str(tmp_path)])
    (tmp_path / 'metrics.jsonl').write_text('')
    with pytest.raises(ConfigError, match='no logged step yet'):
        plot([str(tmp_path)])
    (tmp_path / 'metrics.jsonl').write_text('{"step": 1, "loss": 2.0}\n')
    with pytest.raises(ConfigError, match=r'but no config\.json'):
        plot([str(tmp_path)])
    (tmp_path / 'config.json').write_text('{"steps": 2,')
    with pytest.raises(ConfigError, match=r'config\.json is damaged in line 1'):
        plot([str(tmp_path)])
    with pytest.raises(ConfigError, match=r'writes no \.doc; use one of'):
        plot([str(tmp_path)], 'a.doc')
    with pytest.raises(ConfigError, match='there is no folder'):
        plot([str(tmp_path)], f'{tmp_path}/none/a.png')
    monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
    with pytest.raises(ConfigError, match='pip install matplotlib'):
        plot([str(tmp_path)])


def test_a_run_of_one_step_shows_a_point(tmp_path, monkeypatch):
    """Also where the other metrics are missing, and a line is damaged."""
    drawn = []
    monkeypatch.setattr(Figure, 'savefig', lambda self, *_, **__: drawn.append(self))
    run = write_run(tmp_path / 'a', moe=False)
    (tmp_path / 'a/metrics.jsonl').write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo\n')
    plot([run])
    marked = [
        x for x in drawn[0].axes[0].get_lines() if x.get_marker() == 'o' and len(x.get_xdata())
    ]
    assert [(list(x.get_xdata()), list(x.get_ydata())) for x in marked] == [([1], [2])]
    assert not [x for x in drawn[0].axes[0].get_lines() if len(x.get_xdata()) > 20]
