"""Eight simulated CPU devices for every test: set before jax starts; a corpus to train on."""

import os
import pathlib

# Most of the time goes into compiling small programs that run for milliseconds: LLVM's part of
# that is halved. XLA's own passes, which decide what is computed, stay as they are.
os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} --xla_backend_optimization_level=0'

import jax
import pytest

from corpus.files import find_files
from corpus.prepare import Job, prepare

jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)


@pytest.fixture
def tpu_devices():
    """name of a topology -> its devices, which can be compiled for but are not there."""
    pytest.importorskip('libtpu', reason='needs libtpu: pip install -r requirements/tpu.txt')
    from jax.experimental import topologies

    def devices(name: str, **more):
        return topologies.get_topology_desc(platform='tpu', topology_name=name, **more).devices

    return devices


@pytest.fixture
def gpu_compiler():
    """Skips where the compiler for NVIDIA's GPUs is missing."""
    pytest.importorskip('jax_cuda12_plugin', reason='needs pip install -r requirements/gpu.txt')


@pytest.fixture(scope='session')
def tokens(tmp_path_factory) -> pathlib.Path:
    """A folder of token shards: counting, byte by byte."""
    folder = tmp_path_factory.mktemp('text')
    for i in range(40):
        (folder / f'{i}.txt').write_text(f'The number {i} follows {i - 1}. ' * 40)
    output = folder / 'tokens'
    files = find_files([f'{folder}/*.txt'])
    prepare(files, Job(str(output), 'bytes', validation_share=0.2))
    return output
