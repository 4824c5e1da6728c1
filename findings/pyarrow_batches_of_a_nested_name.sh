#!/usr/bin/env bash
# pyarrow 26.0.1: ParquetFile.iter_batches(columns=[name]) and ParquetFile.read(columns=[name]) give
# batches without any column, and no error, for a name that is not there, such as that of a field inside
# a struct. 'doc.text' finds such a field, but gives the struct column 'doc' with that one field, not a
# column of text. pyarrow.parquet.read_table raises ArrowInvalid for the same missing name.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet pyarrow==26.0.1
cd "$work"
"$work/venv/bin/python" - <<'PYTHON'
import pyarrow as pa
import pyarrow.parquet as pq

pq.write_table(pa.table({'doc': [{'text': 'a', 'id': 1}]}), 'nested.parquet')
file = pq.ParquetFile('nested.parquet')
names = [batch.schema.names for batch in file.iter_batches(columns=['text'])]
assert names == [[]], f'changed: {names}'
assert file.read(columns=['text']).num_columns == 0, 'changed: read'
(batch,) = file.iter_batches(columns=['doc.text'])
assert batch.schema.names == ['doc'] and batch.column(0).to_pylist() == [{'text': 'a'}], batch
try:
    pq.read_table('nested.parquet', columns=['text'])
except pa.ArrowInvalid:
    print('seen with pyarrow 26.0.1: no column and no error in batches, ArrowInvalid by read_table')
else:
    raise SystemExit('changed: read_table accepts the name')
PYTHON
