"""Reads what runs leave behind, and lets runs of one process share their compiled step."""

import json
import pathlib
import types
from typing import Any

import jax
import pytest
from common import set_up
from ml_collections import ConfigDict

import train
from checkpoint import Checkpointer
from parallel import Tree
from train_step import Setup, abstract_state, lower_train_step

MEASURED = {'tokens_per_second', 'mfu', 'host_bytes'}  # on this machine, at this time
BESIDE = ('data', 'eval', 'log', 'checkpoint')  # groups of the config that the step does not read
_programs: dict[str, jax.stages.Compiled] = {}


def records(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """Returns the records of metrics.jsonl, without what was measured on the machine."""
    lines = (workdir / 'metrics.jsonl').read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in MEASURED} for line in lines]


def share_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes `train.train` compile a step only if no run of this process has compiled the same.

    A program takes seconds to compile, and follows from the config and the model alone.
    """

    def lower(s: Setup) -> types.SimpleNamespace:
        config = {name: x for name, x in s.config.to_dict().items() if name not in BESIDE}
        key = json.dumps(config) + repr(s.model)

        def compiled() -> jax.stages.Compiled:
            if key not in _programs:
                _programs[key] = lower_train_step(s).compile()
            return _programs[key]

        return types.SimpleNamespace(compile=compiled)

    monkeypatch.setattr(train, 'lower_train_step', lower)


def final_state(workdir: pathlib.Path, config: ConfigDict) -> Tree:
    """Returns the state of a run's newest checkpoint."""
    checkpoints = Checkpointer(f'{workdir}/checkpoints')
    shapes = abstract_state(set_up(config))
    return checkpoints.restore(checkpoints.latest_step(), shapes)
