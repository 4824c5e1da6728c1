#!/usr/bin/env bash
# tokenizers 0.23.3: the ids that a tokenizer.json gives its added tokens are not read. They are numbered
# on from the model's, in the file's order, so a file with a gap gives other ids than it says, and
# nothing is said. A token that the model has too keeps the model's id.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet tokenizers==0.23.3
"$work/venv/bin/python" - <<'PYTHON'
import json

from tokenizers import Tokenizer, models

file = json.loads(Tokenizer(models.BPE(vocab={'a': 0, 'b': 1}, merges=[])).to_str())
no = dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'normalized'), False)
file['added_tokens'] = [{'id': 7, 'content': '<end>', 'special': True} | no]
ids = Tokenizer.from_str(json.dumps(file)).encode('a<end>').ids
assert ids == [0, 2], f'changed: {ids}'  # the file says [0, 7]
print('seen: the file gives <end> the id 7, tokenizers 0.23.3 the id 2')
PYTHON
