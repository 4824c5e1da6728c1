"""Where else metrics go than to metrics.jsonl: TensorBoard and Weights & Biases, as log.writers.

A writer takes the records of metrics.jsonl. Numbers are scalars; `load`, each expert's share, is a
histogram over the experts' numbers; samples are text. Its package is imported when it is made.
"""

import json
import os
import secrets
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from storage.stores import local_folder, read_text, write_text


def missing(package: str, what: str) -> ValueError:
    return ValueError(
        f'the config cannot run: {what} needs {package}: pip install {package}, or '
        f'pip install -r requirements/log.txt'
    )


def parts(record: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """(kind, name, value): 'scalar' numbers, 'loads' lists of shares, 'samples' as text."""
    for name, value in record.items():
        if name == 'samples':
            yield 'samples', name, '\n\n'.join(s['prompt'] + s['text'] for s in value)
        elif isinstance(value, list):
            yield 'loads', name, value
        elif name != 'step':
            yield 'scalar', name, value


class TensorBoard:
    """Event files in WORKDIR/tensorboard. Of a run that goes on after step `start`, TensorBoard
    drops what an interrupted one wrote beyond it."""

    def __init__(self, workdir: str, config: ConfigDict, start: int):
        try:
            import tensorboardX
        except ImportError as error:
            raise missing('tensorboardX', "log.writers='tensorboard'") from error
        folder = os.path.join(workdir, 'tensorboard')
        self._events = tensorboardX.SummaryWriter(folder, purge_step=start + 1, flush_secs=30)

    def write(self, record: dict[str, Any]) -> None:
        step = record['step']
        for kind, name, value in parts(record):
            if kind == 'scalar':
                self._events.add_scalar(name, value, step)
            elif kind == 'samples':
                self._events.add_text(name, value, step)
            else:
                self._events.add_histogram_raw(
                    name,
                    min=0,
                    max=len(value),
                    num=sum(value),
                    sum=sum(i * x for i, x in enumerate(value)),
                    sum_squares=sum(i * i * x for i, x in enumerate(value)),
                    bucket_limits=list(range(1, len(value) + 1)),
                    bucket_counts=value,
                    global_step=step,
                )

    def close(self) -> None:
        self._events.close()


class WeightsAndBiases:
    """A run of log.wandb_project, which goes on under the id in WORKDIR/wandb.json.

    WANDB_MODE, WANDB_API_KEY and its other variables count as ever; WANDB_MODE=offline writes to
    WORKDIR/wandb, for `wandb sync`. Steps that it has already, of an interrupted run that goes on
    from before them, it leaves as they are.
    """

    def __init__(self, workdir: str, config: ConfigDict, start: int):
        try:
            import wandb
        except ImportError as error:
            raise missing('wandb', "log.writers='wandb'") from error
        self._wandb: ModuleType = wandb
        self._run = wandb.init(
            project=config.log.wandb_project,
            name=os.path.basename(os.path.abspath(workdir)),
            dir=local_folder(workdir),
            id=self._id(os.path.join(workdir, 'wandb.json'), start),
            resume='allow',
            config=config.to_dict(),
        )

    @staticmethod
    def _id(path: str, start: int) -> str:
        """The workdir's run; one that starts anew is another run."""
        if start and (text := read_text(path)):
            return json.loads(text)['id']
        name = secrets.token_hex(4)
        write_text(path, json.dumps({'id': name}) + '\n')
        return name

    def write(self, record: dict[str, Any]) -> None:
        values = {}
        for kind, name, value in parts(record):
            if kind == 'loads':
                edges = list(range(len(value) + 1))
                value = self._wandb.Histogram(np_histogram=(value, edges))
            values[name] = value
        self._run.log(values, step=record['step'])

    def close(self) -> None:
        self._run.finish()


WRITERS: dict[str, Callable[[str, ConfigDict, int], Any]] = {
    'tensorboard': TensorBoard,
    'wandb': WeightsAndBiases,
}
