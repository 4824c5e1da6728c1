"""The tiny released models of golden/make_released.py, and what is compared with them."""

import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from common import TOLERANCE

from checkpoint import Checkpointer
from config import ModelConfig, saved_config
from model import model_for, model_params
from parallel import Tree, make_mesh, map_params, shardings

RELEASED = pathlib.Path(__file__).parent / 'golden' / 'released'
MODELS = sorted(path.name for path in RELEASED.iterdir())


def restored(workdir: pathlib.Path) -> tuple[Tree, ModelConfig]:
    """Returns the parameters of a workdir in float32 on one device, and their model."""
    with Checkpointer(f'{workdir}/checkpoints') as checkpoints:
        config = saved_config(checkpoints.metadata(0)['config'] | {'compute_dtype': 'float32'})
        cfg = model_for(config, 'cpu')
        declared = model_params(cfg)
        wanted = map_params(
            lambda p, sharding: jax.ShapeDtypeStruct(p.shape, jnp.float32, sharding=sharding),
            declared,
            shardings(declared, make_mesh({})),
        )
        return checkpoints.restore(0, {'params': wanted})['params'], cfg


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(RELEASED / name / 'golden.npz') as values:
        return dict(values)


def close(got: Any, want: np.ndarray, what: str) -> None:
    got = np.asarray(got, np.float64)
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert error < TOLERANCE, f'{what}: relative error {error:.2e}'


def released_copy(tmp_path: pathlib.Path) -> pathlib.Path:
    """Returns a copy of a golden model in several files, to be damaged."""
    return pathlib.Path(shutil.copytree(RELEASED / 'llama2', tmp_path / 'release'))
