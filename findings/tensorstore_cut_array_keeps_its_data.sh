#!/usr/bin/env bash
# tensorstore 0.1.86: a zarr3 array that is made shorter and then longer again shows its old data, not the
# fill value, where the cut went through a chunk: the chunk's file is left as it was. So a store that is
# resized down to drop rows, and up to append, can show dropped rows as if they had been written.
# Whole chunks beyond the cut are removed, unless resize_metadata_only is given.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet tensorstore==0.1.86
"$work/venv/bin/python" - <<'PYTHON'
import numpy as np
import tensorstore as ts


def cut_and_grown(chunk):
    array = ts.open(
        {'driver': 'zarr3', 'kvstore': 'memory://'}, create=True, dtype='int32', shape=[10],
        chunk_layout=ts.ChunkLayout(chunk_shape=[chunk]), fill_value=np.int32(-1),
    ).result()
    array[...] = np.arange(10, dtype=np.int32)
    array = array.resize(exclusive_max=[4]).result()
    return array.resize(exclusive_max=[10]).result().read().result().tolist()


assert cut_and_grown(10) == list(range(10)), f'changed: {cut_and_grown(10)}'
assert cut_and_grown(3) == [0, 1, 2, 3, 4, 5, -1, -1, -1, -1], f'changed: {cut_and_grown(3)}'
print('seen with tensorstore 0.1.86: cut to 4 and grown to 10,', cut_and_grown(3))
PYTHON
