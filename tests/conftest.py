"""Sets up eight simulated CPU devices, before jax starts, and the fixtures of several files."""

import os
import pathlib
import signal

# Programs that several tests, processes or runs of the tests compile alike are compiled once.
os.environ.setdefault(
    'JAX_COMPILATION_CACHE_DIR',
    str(pathlib.Path(__file__).parent.parent / '.pytest_cache/compiled'),
)
os.environ.setdefault('JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS', '0.5')

import pytest
from common_data import prepared_corpus
from common_flags import set_flags

from corpus.files import File, find_files
from corpus.prepare import Job, prepare
from machine.processes import choose_platform

# nohup ignores SIGHUP, and a shell SIGINT of what runs behind it, for all processes that are
# started: there, the tests' own would not hear the signals that they are sent.
for number, handler in (
    (signal.SIGHUP, signal.SIG_DFL),
    (signal.SIGINT, signal.default_int_handler),
):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)

set_flags()
choose_platform(8)


@pytest.fixture
def tpu_devices():
    """Returns a function: name of a topology -> its devices, for which jax can only compile."""
    pytest.importorskip('libtpu', reason='needs libtpu: pip install -r requirements/tpu.txt')
    from planning.topology import tpu_devices

    return tpu_devices


@pytest.fixture
def gpu_compiler():
    """Skips a test if the compiler for NVIDIA's GPUs is missing."""
    pytest.importorskip('jax_cuda12_plugin', reason='needs pip install -r requirements/gpu.txt')


@pytest.fixture(scope='session')
def tokens(tmp_path_factory) -> pathlib.Path:
    """Returns a folder of token shards to train on: sentences that count, byte by byte."""
    folder = tmp_path_factory.mktemp('text')
    for i in range(40):
        (folder / f'{i}.txt').write_text(f'The number {i} follows {i - 1}. ' * 40)
    output = folder / 'tokens'
    files = find_files([f'{folder}/*.txt'])
    prepare(files, Job(str(output), 'bytes', validation_share=0.2))
    return output


@pytest.fixture(scope='session')
def corpus(tmp_path_factory) -> tuple[dict[str, str], str, list[File]]:
    """Returns `common_data.prepared_corpus`, which no test may change."""
    return prepared_corpus(tmp_path_factory)
