"""The writers of log.writers: they send the records of metrics.jsonl to other services as well.

Numbers become scalars; `load`, each expert's part of the choices, a histogram over the experts'
numbers; samples text. A writer imports its package when it is made.
"""

import json
import os
import secrets
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

from ml_collections import ConfigDict

from config import ConfigError
from runtime.workdir import TENSORBOARD, WANDB, read_json
from storage.stores import local_folder, write_text


def missing(package: str, setting: str) -> ConfigError:
    """Returns the error for a setting whose package is not installed."""
    return ConfigError(
        f'{setting} needs {package}: pip install {package}, or pip install -r requirements/log.txt'
    )


def parts(record: dict[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Yields (kind, name, value): 'scalar' numbers, 'loads' lists per expert, 'samples' texts."""
    for name, value in record.items():
        if name == 'samples':
            yield 'samples', name, '\n\n'.join(s['prompt'] + s['text'] for s in value)
        elif isinstance(value, list):
            yield 'loads', name, value
        elif name != 'step':
            yield 'scalar', name, value


class TensorBoard:
    """Writes event files to WORKDIR/tensorboard.

    TensorBoard drops the steps after `start`, which an interrupted run may have written.
    """

    def __init__(self, workdir: str, config: ConfigDict, start: int):
        try:
            import tensorboardX
        except ImportError as error:
            raise missing('tensorboardX', "log.writers='tensorboard'") from error
        folder = os.path.join(workdir, TENSORBOARD)
        self._events = tensorboardX.SummaryWriter(folder, purge_step=start + 1, flush_secs=30)

    def write(self, record: dict[str, Any]) -> None:
        """Writes one record."""
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
        """Ends the output."""
        self._events.close()


class WeightsAndBiases:
    """Logs to a run of log.wandb_project, whose id WORKDIR/wandb.json keeps for continuing it.

    wandb reads its environment variables, WANDB_API_KEY, WANDB_MODE, ...; WANDB_MODE=offline writes
    to WORKDIR/wandb, for `wandb sync`. Steps that an interrupted run has logged already stay as
    they are.
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
            id=self._id(os.path.join(workdir, WANDB), start),
            resume='allow',
            config=config.to_dict(),
        )

    @staticmethod
    def _id(path: str, start: int) -> str:
        """Returns the id at `path`; a run that starts at step 0 makes and keeps a new one."""
        if start and (kept := read_json(path)):
            return kept['id']
        name = secrets.token_hex(4)
        write_text(path, json.dumps({'id': name}) + '\n')
        return name

    def write(self, record: dict[str, Any]) -> None:
        """Writes one record."""
        values = {}
        for kind, name, value in parts(record):
            if kind == 'loads':
                edges = list(range(len(value) + 1))
                value = self._wandb.Histogram(np_histogram=(value, edges))
            values[name] = value
        self._run.log(values, step=record['step'])

    def close(self) -> None:
        """Ends the output."""
        self._run.finish()


WRITERS: dict[str, Callable[[str, ConfigDict, int], Any]] = {
    'tensorboard': TensorBoard,
    'wandb': WeightsAndBiases,
}
