"""Plots the metrics of one or several runs in one PNG."""

import importlib.util
import json
import logging
import os
import sys
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from config import ConfigError
from runtime.workdir import CONFIG, EVALUATIONS, METRICS, PICTURE, exists, read_json, read_records
from storage.stores import local_folder

COLUMNS = 3
SMOOTHING = 0.02  # width over which noisy curves are averaged, as a fraction of the logged range
FEW = 20  # points; so many are marked, since a line of one or two hardly shows
GREY = '#666666'
STYLES = ('-', '--', ':', '-.')  # of the lines of sources


class Run:
    """The records of one workdir, by metric."""

    def __init__(self, workdir: str):
        """Reads the records; raises ConfigError if there are none of training steps."""
        path = os.path.join(workdir, METRICS)
        if not exists(path):
            raise ConfigError(f'{path} does not exist: --plot takes the workdirs of runs')
        self.records, complaints = read_records(path)
        for complaint in complaints:
            print(f'{complaint}; it is left out', file=sys.stderr)
        if not any('loss' in record for record in self.records):
            raise ConfigError(f'{path} holds no logged step yet: wait for one, or lower log.every')
        later, complaints = read_records(os.path.join(workdir, EVALUATIONS))
        for complaint in complaints:
            print(f'{complaint}; it is left out', file=sys.stderr)
        self.records = with_tasks(self.records, later)
        self.name = os.path.basename(os.path.abspath(workdir))
        config = read_json(os.path.join(workdir, CONFIG))
        if config is None:
            raise ConfigError(f'{workdir} holds {METRICS}, but no {CONFIG}: restore it')
        self.step_tokens: int = config['batch_size'] * config['seq_len']
        # Sizes of a step that change in the run, or differ from those of other runs.
        schedule = {name: value for name, value in config.get('schedule', {}).items() if value}
        packing = config.get('data', {}).get('packing', 'stream')
        self.sizes = json.dumps([self.step_tokens, schedule, packing])

    def curve(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns the steps that logged this metric, and its values; null is not finite."""
        numbers = (int, float, type(None))
        points = [(r['step'], r[name]) for r in self.records if type(r.get(name, '')) in numbers]
        steps, values = np.array(points, np.float64).reshape(-1, 2).T
        return steps, values

    def tokens(self, steps: np.ndarray) -> np.ndarray:
        """Returns the tokens of a run after these steps, as they were logged."""
        known = [(r['step'], r['tokens']) for r in self.records if 'tokens' in r]
        if not known:
            return steps * self.step_tokens
        return np.interp(steps, *np.array(sorted(known), np.float64).T)

    def layers(self, statistic: str) -> list[str]:
        """Returns the names of a statistic of all MoE layers: moe/3/load, ..."""
        names = {n for r in self.records for n in r if n.startswith('moe/')}
        names = {n for n in names if n.rpartition('/')[2] == statistic}
        return sorted(names, key=lambda n: int(n.split('/')[1]))

    def names(self, metric: str) -> list[str]:
        """Returns the names of a metric and of its values per source: eval_loss/web, ..."""
        return sorted({n for r in self.records for n in r if n.partition('/')[0] == metric})

    def last_loads(self) -> tuple[int, list[int], np.ndarray] | None:
        """Returns the last step that logged experts' loads, its MoE layers, and their loads_LE.

        A load is the expert's part of all choices, relative to an even one; None without experts.
        """
        names = self.layers('load')
        logged = [r for r in self.records if names and names[0] in r]
        if not logged:
            return None
        loads = np.array([logged[-1][name] for name in names])
        return logged[-1]['step'], [int(n.split('/')[1]) for n in names], loads * loads.shape[1]


def with_tasks(records: list[dict], later: list[dict]) -> list[dict]:
    """Adds what tasks gave that a checkpoint was asked later, by step."""
    asked = [
        {name: x for name, x in record.items() if name == 'step' or name.startswith('task_')}
        for record in later
    ]
    return sorted([*records, *asked], key=lambda record: record['step'])


def smooth(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Averages the finite values of y, weighted by a Gaussian in x."""
    if not len(x):
        return y
    width = SMOOTHING * (x[-1] - x[0]) or 1.0
    finite = np.isfinite(y)
    known_x, known_y = x[finite], y[finite]
    if not len(known_x):
        return y
    out = np.empty(len(x))
    for i in range(0, len(x), 256):  # in parts, as the weights take [part, all] numbers
        distance = (x[i : i + 256, None] - known_x) / width
        weights = np.exp(-(distance**2) / 2) + 1e-300
        out[i : i + 256] = weights @ known_y / weights.sum(axis=1)
    return out


class Figure:
    """Panels in rows of COLUMNS, with one colour per run."""

    def __init__(self, runs: Sequence[Run], n_panels: int):
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure as MatplotlibFigure

        self.runs, rows = runs, -(-n_panels // COLUMNS)
        self.figure = MatplotlibFigure(figsize=(15, 3.9 * rows + 0.8), layout='constrained')
        FigureCanvasAgg(self.figure)
        self._grid = self.figure.add_gridspec(rows, COLUMNS, wspace=0.05, hspace=0.08)
        self._used = 0
        # Batches of different sizes make steps of different sizes: then x is the tokens.
        self.by_tokens = len({run.sizes for run in runs}) > 1
        self.colours = [f'C{i % 10}' for i in range(len(runs))]

    def panel(self, title: str) -> Any:
        """Adds a panel; returns its axes."""
        axes = self.figure.add_subplot(self._grid[divmod(self._used, COLUMNS)])
        self._used += 1
        axes.set_title(title, fontsize=12, loc='left')
        axes.tick_params(labelsize=10, colors=GREY)
        for side in ('top', 'right'):
            axes.spines[side].set_visible(False)
        for side in ('bottom', 'left'):
            axes.spines[side].set_color('#bbbbbb')
        return axes

    def curves(self, title: str) -> Any:
        """Adds a panel over steps, or tokens; returns its axes."""
        from matplotlib.ticker import EngFormatter

        axes = self.panel(title)
        axes.grid(color='#eeeeee')
        axes.set_axisbelow(True)
        axes.set_xlabel('tokens' if self.by_tokens else 'step', fontsize=10, color=GREY)
        axes.xaxis.set_major_formatter(EngFormatter(sep=''))
        return axes

    def name_runs(self) -> None:
        """Adds one legend of the runs, above the panels."""
        from matplotlib.lines import Line2D

        pairs = zip(self.runs, self.colours, strict=True)
        handles = [Line2D([], [], color=colour, lw=3, label=run.name) for run, colour in pairs]
        self.figure.legend(
            handles=handles, loc='outside upper left', ncols=4, frameon=False, fontsize=11
        )

    def x(self, run: Run, steps: np.ndarray) -> np.ndarray:
        """Returns the values of the x axis for these steps."""
        return run.tokens(steps) if self.by_tokens else steps

    def noisy(self, axes: Any, name: str) -> None:
        """Draws a metric of each run: the logged values, faint, and the smoothed ones."""
        for run, colour in zip(self.runs, self.colours, strict=True):
            steps, values = run.curve(name)
            x, marker = self.x(run, steps), 'o' if len(steps) <= FEW else ''
            axes.plot(x, values, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(x, smooth(x, values), marker=marker, ms=4, color=colour, linewidth=1.6)


def draw_loss(figure: Figure) -> None:
    """Draws the training and the validation loss."""
    axes = figure.curves('loss (nats per token)')
    figure.noisy(axes, 'loss')
    for run, colour in zip(figure.runs, figure.colours, strict=True):
        steps, values = run.curve('eval_loss')
        axes.plot(figure.x(run, steps), values, 'o', color=colour, markersize=5, mec='white')
    axes.plot([], [], color=GREY, label='training, smoothed')
    if any(run.names('eval_loss') for run in figure.runs):
        axes.plot([], [], 'o', color=GREY, markersize=5, mec='white', label='validation')
    axes.legend(fontsize=9, frameon=False)
    zoom(axes, [run.curve('loss')[1] for run in figure.runs])


def zoom(axes: Any, curves: list[np.ndarray]) -> None:
    """Limits the y axis so that the peak of the first steps does not flatten the curves."""
    values = np.concatenate(curves)
    values = values[np.isfinite(values)]
    if len(values) >= 20:
        low, high = values.min(), np.quantile(values, 0.97)
        margin = 0.05 * (high - low)
        if margin > 0:
            axes.set_ylim(low - margin, high + margin)


def draw_bits(figure: Figure) -> None:
    """Draws the validation's bits per byte, in all and per source."""
    axes = figure.curves('validation, bits per byte')
    several = any(len(run.names('eval_bits_per_byte')) > 1 for run in figure.runs)
    for run, colour in zip(figure.runs, figure.colours, strict=True):
        for i, name in enumerate(run.names('eval_bits_per_byte')):
            steps, values = run.curve(name)
            style = STYLES[i % len(STYLES)]
            axes.plot(figure.x(run, steps), values, style, marker='o', ms=4, color=colour, lw=1.4)
    if several:
        names = sorted({n for run in figure.runs for n in run.names('eval_bits_per_byte')})
        for i, name in enumerate(names):
            source = name.partition('/')[2] or 'all sources'
            axes.plot([], [], STYLES[i % len(STYLES)], color=GREY, label=source)
        axes.legend(fontsize=9, frameon=False)


def draw_tasks(figure: Figure) -> None:
    """Draws the accuracy of each task, and of guessing where that is known."""
    axes = figure.curves('tasks, accuracy')
    tasks = sorted({n for run in figure.runs for n in run.names('task_accuracy')})
    for run, colour in zip(figure.runs, figure.colours, strict=True):
        for i, name in enumerate(tasks):
            steps, values = run.curve(name)
            style = STYLES[i % len(STYLES)]
            axes.plot(figure.x(run, steps), values, style, marker='o', ms=4, color=colour, lw=1.4)
    for i, name in enumerate(tasks):
        task = name.partition('/')[2]
        axes.plot([], [], STYLES[i % len(STYLES)], color=GREY, marker='o', ms=4, label=task)
        chances = [run.curve(f'task_chance/{task}')[1] for run in figure.runs]
        if known := [values[-1] for values in chances if len(values)]:
            axes.axhline(known[0], color='#bbbbbb', linestyle=STYLES[i % len(STYLES)], lw=0.8)
    axes.set_ylim(0, 1)
    axes.legend(fontsize=9, frameon=False)


def draw_norm(figure: Figure) -> None:
    """Draws the gradient norm."""
    axes = figure.curves('gradient norm')
    figure.noisy(axes, 'grad_norm')
    axes.set_yscale('log')
    for axis_format in (axes.yaxis.set_major_formatter, axes.yaxis.set_minor_formatter):
        axis_format(lambda y, _: f'{y:g}' if f'{y:e}'[0] in '1235' else '')
    axes.tick_params(which='minor', labelsize=10, colors=GREY)


def draw_speed(figure: Figure) -> None:
    """Draws the tokens per second."""
    from matplotlib.ticker import EngFormatter

    axes = figure.curves('tokens per second')
    figure.noisy(axes, 'tokens_per_second')
    axes.yaxis.set_major_formatter(EngFormatter(sep=''))
    axes.set_ylim(bottom=0)


def draw_balance(figure: Figure) -> None:
    """Draws the mean and the range over layers of the fullest expert's load."""
    axes = figure.curves('max/mean expert load')
    for run, colour in zip(figure.runs, figure.colours, strict=True):
        names = run.layers('load_max_over_mean')
        if not names:
            continue
        x = figure.x(run, run.curve(names[0])[0])
        layers = np.array([smooth(x, run.curve(name)[1]) for name in names])
        axes.fill_between(x, layers.min(axis=0), layers.max(axis=0), color=colour, alpha=0.15, lw=0)
        marker = 'o' if len(x) <= FEW else ''
        axes.plot(x, layers.mean(axis=0), marker=marker, ms=4, color=colour, linewidth=1.6)
    axes.plot([], [], color=GREY, label='mean of layers')
    axes.fill_between([], [], [], color=GREY, alpha=0.15, lw=0, label='all layers')
    axes.axhline(1, color='#bbbbbb', linewidth=0.8)
    axes.legend(fontsize=9, frameon=False)


def draw_loads(figure: Figure, run: Run) -> None:
    """Draws the loads of a run's experts by layer, at the last step that logged them."""
    step, layers, loads_LE = run.last_loads()
    of = f' of {run.name}' if len(figure.runs) > 1 else ''
    axes = figure.panel(f'expert load{of}, step {step:,}')
    spread = max(0.5, np.abs(loads_LE - 1).max())
    image = axes.imshow(
        loads_LE, aspect='auto', cmap='RdBu_r', vmin=1 - spread, vmax=1 + spread,
        interpolation='nearest',
    )  # fmt: skip
    axes.set_xlabel('expert', fontsize=10, color=GREY)
    axes.set_ylabel('layer', fontsize=10, color=GREY)
    axes.set_yticks(range(len(layers)), layers)
    axes.xaxis.get_major_locator().set_params(integer=True)
    if len(layers) > 16:
        axes.set_yticks(range(0, len(layers), -(-len(layers) // 16)))
    bar = figure.figure.colorbar(image, ax=axes, pad=0.02)
    bar.set_label('share over an even one', fontsize=9, color=GREY)
    bar.ax.tick_params(labelsize=9, colors=GREY)


def need_matplotlib() -> None:
    """Raises ConfigError if matplotlib is not installed."""
    if importlib.util.find_spec('matplotlib') is None:
        raise ConfigError(
            'plots need matplotlib: pip install matplotlib, or pip install -r requirements/log.txt'
        )


def check_output(output: str) -> None:
    """Raises ConfigError if a picture cannot be written there; '' is the default."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    known = FigureCanvasAgg.get_supported_filetypes()
    kind = os.path.splitext(output)[1].removeprefix('.').lower()
    if kind and kind not in known:
        raise ConfigError(
            f'--plot_output={output}: matplotlib writes no .{kind}; use one of {", ".join(known)}'
        )
    folder = os.path.dirname(output) or '.'
    if output and not os.path.isdir(folder):
        raise ConfigError(f'--plot_output={output}: there is no folder {folder}; make it first')


def plot(workdirs: Sequence[str], output: str = '') -> str:
    """Draws the runs of these workdirs; returns the path of the PNG.

    `output` '' stands for metrics.png in the only workdir, or beside the first of several. Raises
    ConfigError if matplotlib or a workdir's metrics are missing.
    """
    need_matplotlib()
    check_output(output)
    logging.getLogger('matplotlib').setLevel(logging.WARNING)  # silences its messages on fonts
    runs = [Run(workdir) for workdir in workdirs]
    moe = [run for run in runs if run.last_loads()]
    panels: list[Callable[[Figure], None]] = [draw_loss, draw_bits, draw_norm, draw_speed]
    if any(run.names('task_accuracy') for run in runs):
        panels.append(draw_tasks)
    if any(run.layers('load_max_over_mean') for run in runs):
        panels.append(draw_balance)
    figure = Figure(runs, len(panels) + len(moe))
    for draw in panels:
        draw(figure)
    for run in moe:
        draw_loads(figure, run)
    if len(runs) > 1:
        figure.name_runs()
    else:
        figure.figure.suptitle(runs[0].name, fontsize=13, x=0.01, ha='left')
    folder = local_folder(workdirs[0]) or '.'
    folder = folder if len(runs) == 1 else os.path.dirname(folder)
    output = output or os.path.join(folder, PICTURE)
    figure.figure.savefig(output, dpi=110)
    return output
