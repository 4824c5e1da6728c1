#!/usr/bin/env bash
# tiktoken 0.14.0: text that an encoding's pattern does not match is dropped, without a word. A byte-level
# vocabulary that holds all 256 bytes is therefore no promise that decode(encode(text)) is the text: a
# pattern of one's own that forgets a class of characters (digits, say) prepares a corpus without them.
# Hugging Face's tokenizers keep what a pattern leaves out, so the same pattern moved over from a
# tokenizer.json behaves differently. Compare the number of bytes, or decode.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet tiktoken==0.14.0 tokenizers==0.23.3
"$work/venv/bin/python" - <<'PYTHON'
import tiktoken
from tokenizers import Regex, pre_tokenizers

pattern, text = '[a-z]+', 'ab 12 cd'
ranks = {bytes([byte]): byte for byte in range(256)}
encoding = tiktoken.Encoding('letters', pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
back = encoding.decode(encoding.encode(text))
assert back == 'abcd', f'changed: {text!r} comes back as {back!r}'
split = pre_tokenizers.Split(Regex(pattern), 'isolated').pre_tokenize_str(text)
assert ''.join(piece for piece, _ in split) == text, f'changed: tokenizers splits into {split}'
print(f'seen with tiktoken 0.14.0: {text!r} comes back as {back!r}; tokenizers keeps {split}')
PYTHON
