"""Writes text_files/: tables, JSON and tar shards by the programs that people write them with.

    pip install pandas duckdb pyarrow webdataset && python tests/golden/make_text_files.py

TEXTS, the texts of all of them, has quotes, tabs, line breaks of both kinds, an empty text and one
that starts with the mark of a spreadsheet's formula. versions.json says by which versions.
"""

import importlib.metadata
import json
import pathlib
import shutil
import subprocess

import duckdb
import pandas as pd
import pyarrow as pa
import pyarrow.csv
import webdataset

FOLDER = pathlib.Path(__file__).parent / 'text_files'
TEXTS = [
    'plain', '"quoted" throughout, "here"', 'two\nlines\r\nand a third', 'a\ttab', '', '=1+1',
    'é 東京 🙂', '"', 'commas, many, commas', '\\ backslash \\" and \\n', ' spaces at both ends ',
]  # fmt: skip


def tables() -> None:
    """Writes the texts as a column between two others."""
    frame = pd.DataFrame({'n': range(len(TEXTS)), 'text': TEXTS, 'tail': 'x'})
    frame.to_csv(FOLDER / 'pandas.csv', index=False)
    frame.to_csv(FOLDER / 'pandas.tsv', index=False, sep='\t')
    frame.to_csv(FOLDER / 'pandas_crlf.csv.bz2', index=False, lineterminator='\r\n')
    frame.to_json(FOLDER / 'pandas_records.json', orient='records')
    frame.to_json(FOLDER / 'pandas_lines.json.gz', orient='records', lines=True)
    pa.csv.write_csv(pa.Table.from_pandas(frame), str(FOLDER / 'pyarrow.csv'))
    duckdb.sql(f"COPY (SELECT * FROM frame ORDER BY n) TO '{FOLDER}/duckdb.csv.gz'")
    duckdb.sql(f"COPY (SELECT * FROM frame ORDER BY n) TO '{FOLDER}/duckdb.json' (ARRAY true)")


def shards() -> None:
    """Writes tar shards of samples: a text with its metadata, and records."""
    with webdataset.TarWriter(str(FOLDER / 'texts.tar')) as sink:
        for i, text in enumerate(TEXTS):
            sink.write({'__key__': f'a/{i:03}', 'txt': text, 'json': {'n': i}, 'cls': i})
    with webdataset.TarWriter(str(FOLDER / 'records.tar.gz')) as sink:
        for i, text in enumerate(TEXTS):
            sink.write({'__key__': f'{i:03}', 'json': {'text': text}, 'npy.bin': b'\0' * 9})


def main() -> None:
    shutil.rmtree(FOLDER, ignore_errors=True)
    FOLDER.mkdir()
    tables()
    shards()
    for pack in (['xz', '-k'], ['zstd', '-qk']):
        plain = FOLDER / f'{pack[0]}.txt'
        plain.write_text('\n'.join(TEXTS))
        subprocess.run([*pack, plain], check=True)
        plain.unlink(missing_ok=True)
    packages = ('pandas', 'duckdb', 'pyarrow', 'webdataset')
    versions = {name: importlib.metadata.version(name) for name in packages}
    (FOLDER / 'versions.json').write_text(json.dumps(versions, indent=1) + '\n')
    (FOLDER / 'texts.json').write_text(json.dumps(TEXTS, indent=1) + '\n')


if __name__ == '__main__':
    main()
