"""The small files of a release: kept in a run's folder, and given back with its weights."""

import json
import os
from collections.abc import Mapping
from typing import Any

from config import ConfigError, ModelConfig
from families.family import Family, counting, value
from families.fields import CONFIG, Released, dtype_of, shortest_block
from storage.stores import open_store, store_errors

RELEASE = 'release'  # the folder of a workdir that holds them
TOKENIZER = 'tokenizer.json'
GENERATION = 'generation_config.json'
KINDS = ('.json', '.txt', '.jinja', '.model', '.tiktoken', '.py')


def small_files(folder: str) -> dict[str, str]:
    """Returns the files of a release beside its weights: path by name."""
    found = {}
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        kept = entry.name.endswith(KINDS) or entry.name.startswith('LICENSE')
        if not kept or entry.name.endswith('.index.json') or not entry.is_file():
            continue
        found[entry.name] = entry.path
    return found


def keep(files: Mapping[str, str], workdir: str) -> None:
    """Copies the small files of a release to a run's folder."""
    where = os.path.join(workdir, RELEASE)
    with store_errors(f'{where} cannot be written'):
        store = open_store(where)
        for name, path in files.items():
            with open(path, 'rb') as f:
                store.write(name, f.read()).result()


def kept(folder: str) -> dict[str, bytes]:
    """Returns the small files that a folder or URL holds, by name; none if there is none."""
    with store_errors(f'{folder} cannot be read'):
        store = open_store(folder)
        names = [key.decode() for key in store.list().result() if b'/' not in key]
        wanted = [n for n in names if n.endswith(KINDS) or n.startswith('LICENSE')]
        wanted = [name for name in wanted if not name.endswith('.index.json')]
        return {name: store.read(name).result().value for name in wanted}


def config_of(files: Mapping[str, bytes], where: str) -> dict[str, Any]:
    """Returns the config.json among the small files of a release, {} if there is none.

    Raises ConfigError, which names the folder, for one that is no JSON object.
    """
    try:
        config = json.loads(files.get(CONFIG, b'{}'))
    except ValueError as error:
        raise ConfigError(f'{where}/{CONFIG} is no JSON: {error}') from error
    if not isinstance(config, dict):
        raise ConfigError(f'{where}/{CONFIG} holds no JSON object')
    return config


def exported_config(
    m: ModelConfig, family: Family, source: dict[str, Any], seq_len: int, end: int
) -> dict[str, Any]:
    """Returns the config.json of an export.

    That is the release's own, `source`, where it describes the very model; else one that describes
    it, with the release's special tokens. `source` is {} for a model of no release, and `end` is
    then end of text, -1 for none.
    """
    config = family.released_config(m)
    if source.get('model_type') in family.model_types:
        there, m = family.model_fields(Released(source, CONFIG)), shortest_block(m)
        if all(value(m, name) == there.get(name, value(m, name)) for name in counting(m, there)):
            config = source
    if 'num_nextn_predict_layers' in config:
        config['num_nextn_predict_layers'] = 0  # their weights are left out
    # Weights that were quantized go out as what they stand for.
    config = {name: x for name, x in config.items() if name != 'quantization_config'}
    tokens = ('bos_token_id', 'eos_token_id', 'pad_token_id')
    ids = {name: source[name] for name in tokens if source.get(name) is not None}
    if not source and end >= 0:
        ids = {'eos_token_id': end}
    return {
        **config,
        'max_position_embeddings': config.get('max_position_embeddings', seq_len),
    } | ids


def with_dtype(config: dict[str, Any], dtype: str) -> dict[str, Any]:
    """Returns a config.json that says the type of the weights, in its own spelling."""
    name = 'dtype' if 'dtype' in config else 'torch_dtype'
    return config | {name: dtype}


def write_small(folder: str, files: Mapping[str, bytes], config: dict[str, Any]) -> None:
    """Writes config.json, generation_config.json and what else a release has beside its weights.

    Returns once the disk has them.
    """
    tokens = {n: config[n] for n in ('bos_token_id', 'eos_token_id', 'pad_token_id') if n in config}
    made = {
        GENERATION: json.dumps({'_from_model_config': True, **tokens}, indent=2).encode() + b'\n'
    }
    made |= files
    made[CONFIG] = json.dumps(config, indent=2).encode() + b'\n'
    for name, content in made.items():
        with open(os.path.join(folder, name), 'wb') as f:
            f.write(content)
            f.flush()
            os.fsync(f.fileno())


def seq_len_of(released: Released) -> int:
    """Returns the length of sequences for a run's config: the release's, up to 4,096."""
    return min(int(released.get('max_position_embeddings', 4096)), 4096)


def compute_dtype_of(released: Released) -> str:
    """Returns the compute type for a run's config."""
    return 'float32' if dtype_of(released.config) == 'float32' else 'bfloat16'


def check_target(folder: str) -> None:
    """Raises ConfigError if the folder of an export is not new, or no local one."""
    if '://' in folder:
        raise ConfigError(f'--to_hf={folder} is no local folder: export to one, and copy it')
    if os.path.exists(folder) and (not os.path.isdir(folder) or os.listdir(folder)):
        raise ConfigError(f'--to_hf={folder} is there already: name a new folder, or remove it')
