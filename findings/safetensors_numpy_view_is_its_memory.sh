#!/usr/bin/env bash
# safetensors 0.8.0: the NumPy API writes the memory behind an array, with the array's shape. A transposed
# view (what a conversion from [in, out] to [out, in] usually holds) is saved with its values in the wrong
# places: shape and dtype are as asked, and nothing is raised. np.ascontiguousarray first. float8 arrays
# (ml_dtypes) are saved, and the same API cannot load what it wrote.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet safetensors==0.8.0 numpy==2.4.1 ml_dtypes==0.5.4
"$work/venv/bin/python" - <<'PYTHON'
import ml_dtypes
import numpy as np
from safetensors.numpy import load, save

weight = np.arange(6, dtype=np.float32).reshape(2, 3)
back = load(save({'w': weight.T}))['w']
assert back.shape == (3, 2) and back.dtype == np.float32
assert (back.reshape(-1) == weight.reshape(-1)).all(), f'changed: the view comes back as {back}'
assert (load(save({'w': np.ascontiguousarray(weight.T)}))['w'] == weight.T).all()
stored = save({'w': weight.astype(ml_dtypes.float8_e4m3fn)})
try:
    load(stored)
except KeyError as error:
    print(f'seen with safetensors 0.8.0: {back.tolist()} for {weight.T.tolist()}; KeyError {error}')
else:
    raise SystemExit('changed: float8 is loaded')
PYTHON
