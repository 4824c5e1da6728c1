"""Writes tests/golden/token_files: small files of token ids, by the projects' own writers.

    python tests/golden/make_token_files.py megatron mds      # megatron-core 0.16.1, torch 2.13.0,
                                                              # mosaicml-streaming 0.13.0
    python tests/golden/make_token_files.py datasets          # datasets 5.2.0 (writes Parquet, too)
    python tests/golden/make_token_files.py llmc --source=LLM.C     # a clone of llm.c, f1e2ace
    python tests/golden/make_token_files.py levanter --source=LEVANTER  # of levanter, 9263f81;
                                                              # jax 0.10.2, tensorstore 0.1.86
    python tests/golden/make_token_files.py nanogpt           # numpy alone, as prepare.py does

Each format in an environment that has its packages. llm.c's write_datafile and Levanter's
JaggedArrayStore are those of the clones. nanoGPT has no function of its own, so its lines
(data/openwebtext/prepare.py) are repeated here; so is Levanter's ledger, whose writer needs Ray.

The ids are the bytes of each document; 256 is the end-of-text token. documents.json holds them.
"""

import argparse
import json
import os
import shutil
import sys
import types

import numpy as np

FOLDER = os.path.join(os.path.dirname(os.path.abspath(__file__)), 'token_files')
END = 256
DOCUMENTS = [
    list(f'Document {i}: {"é of some length, " * (i % 5)}and its end.\n'.encode())
    for i in range(17)
]


def folder(name: str) -> str:
    """Returns the path of an empty folder."""
    path = os.path.join(FOLDER, name)
    shutil.rmtree(path, ignore_errors=True)
    os.makedirs(path)
    return path


def megatron(_: str) -> None:
    """With and without an end behind each document, of several sequences, and multimodal."""
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    at = folder('megatron')
    small, large = DType.optimal_dtype(257), DType.optimal_dtype(128_256)

    def build(name: str, dtype: type, ids: list[list[int]], sequences: int, **more: bool) -> None:
        builder = IndexedDatasetBuilder(f'{at}/{name}.bin', dtype=dtype, **more)
        for document in ids:
            n = len(document) // sequences
            lengths = [n] * (sequences - 1) + [len(document) - n * (sequences - 1)]
            modes = {'modes': [0] * sequences} if more else {}
            builder.add_document(torch.tensor(document), lengths, **modes)
        builder.finalize(f'{at}/{name}.idx')

    ended = [[*document, END] for document in DOCUMENTS]
    build('ended', small, ended, 1)
    build('plain', large, DOCUMENTS, 1)
    build('sentences', small, ended, 3)
    build('multimodal', large, ended, 2, multimodal=True)


def mds(_: str) -> None:
    """Each way to encode ids, one of them compressed, in several shards."""
    from streaming import MDSWriter

    at = folder('mds')
    cases = {
        'bytes': ('bytes', {'compression': 'zstd'}, lambda ids: np.array(ids, np.int64).tobytes()),
        'ndarray': ('ndarray', {}, lambda ids: np.array(ids, np.uint32)),
        'uint16': ('ndarray:uint16', {}, lambda ids: np.array(ids, np.uint16)),
    }
    for name, (encoding, more, encode) in cases.items():
        columns = {'id': 'int', 'tokens': encoding, 'url': 'str'}
        with MDSWriter(out=f'{at}/{name}', columns=columns, size_limit=1500, **more) as out:
            for i, document in enumerate(DOCUMENTS):
                out.write({'id': i, 'tokens': encode(document), 'url': 'u' * i})
    # Windows of 32 ids out of the stream of all documents, as for LLM Foundry.
    stream = np.array([i for document in DOCUMENTS for i in (*document, END)], np.uint16)
    columns = {'tokens': 'ndarray:uint16:32'}
    with MDSWriter(out=f'{at}/windows', columns=columns, size_limit=1 << 20) as out:
        for window in stream[: len(stream) // 32 * 32].reshape(-1, 32):
            out.write({'tokens': window})


def datasets(_: str) -> None:
    """A saved dataset of two Arrow files, and Parquet; the last row is empty."""
    import datasets as hub

    at = folder('datasets')
    rows = [*DOCUMENTS, []]
    kind = hub.Features({'input_ids': hub.List(hub.Value('int32')), 'length': hub.Value('int64')})
    data = hub.Dataset.from_dict(
        {'input_ids': rows, 'length': [len(row) for row in rows]}, features=kind
    )
    data.save_to_disk(f'{at}/saved', num_shards=2)
    kind = hub.Features({'ids': hub.LargeList(hub.Value('uint16')), 'text': hub.Value('string')})
    data = hub.Dataset.from_dict({'ids': rows, 'text': ['t'] * len(rows)}, features=kind)
    data.to_parquet(f'{at}/large.parquet', batch_size=7)
    fixed = hub.Features({'input_ids': hub.List(hub.Value('int64'), length=32)})
    stream = [i for document in DOCUMENTS for i in (*document, END)]
    windows = [stream[i : i + 32] for i in range(0, len(stream) - 31, 32)]
    data = hub.Dataset.from_dict({'input_ids': windows}, features=fixed)
    data.to_parquet(f'{at}/windows.parquet')


def llmc(source: str) -> None:
    """The two kinds of llm.c, with an end before each document."""
    sys.path.insert(0, f'{source}/dev/data')
    from data_common import write_datafile

    at = folder('llmc')
    ids = [i for document in DOCUMENTS for i in (END, *document)]
    write_datafile(f'{at}/gpt2.bin', ids, 'gpt-2')
    write_datafile(f'{at}/llama3.bin', ids, 'llama-3')


def levanter(source: str) -> None:
    """A cache of one column, in two batches; the last row is empty."""
    for name in (
        'levanter',
        'levanter.store',
        'levanter.utils',
    ):  # without what their __init__ need
        module = types.ModuleType(name)
        module.__path__ = [f'{source}/src/{name.replace(".", "/")}']
        sys.modules[name] = module
    from levanter.store.jagged_array import JaggedArrayStore

    at = folder('levanter')
    store = JaggedArrayStore.open(f'{at}/input_ids', mode='w', dtype=np.int32)
    rows = [np.array(row, np.int32) for row in [*DOCUMENTS, []]]
    store.extend(rows[:9])
    store.extend(rows[9:])
    ledger = {
        'total_num_rows': len(rows), 'shard_rows': {'': len(rows)}, 'is_finished': True,
        'finished_shards': [''], 'field_counts': {}, 'metadata': {'preprocessor_metadata': None},
    }  # fmt: skip
    with open(f'{at}/shard_ledger.json', 'w') as f:
        json.dump(ledger, f)


def nanogpt(_: str) -> None:
    """An end behind each document, in a memory map."""
    at = folder('nanogpt')
    ids = [i for document in DOCUMENTS for i in (*document, END)]
    arr = np.memmap(f'{at}/train.bin', dtype=np.uint16, mode='w+', shape=(len(ids),))
    arr[:] = ids
    arr.flush()


if __name__ == '__main__':
    parser = argparse.ArgumentParser()
    parser.add_argument('formats', nargs='+')
    parser.add_argument('--source', default='')
    args = parser.parse_args()
    os.makedirs(FOLDER, exist_ok=True)
    with open(os.path.join(FOLDER, 'documents.json'), 'w') as f:
        json.dump(DOCUMENTS, f)
    for name in args.formats:
        globals()[name](args.source)
