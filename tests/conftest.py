"""Eight simulated CPU devices for every test: set before jax starts; a corpus to train on."""

import pathlib

import jax
import pytest

import data

jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 8)


@pytest.fixture(scope='session')
def tokens(tmp_path_factory) -> pathlib.Path:
    """A folder of token shards: counting, byte by byte."""
    folder = tmp_path_factory.mktemp('text')
    for i in range(40):
        (folder / f'{i}.txt').write_text(f'The number {i} follows {i - 1}. ' * 40)
    output = folder / 'tokens'
    files = data.find_files([f'{folder}/*.txt'])
    data.prepare(files, data.Job(str(output), 'bytes', validation_share=0.2))
    return output
