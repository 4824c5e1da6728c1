#!/usr/bin/env bash
# tokenizers 0.23.3: in a Split pattern `\p{N}{1,3}+` means "one to three digits, repeated", so a number
# of any length is one piece. In tiktoken (0.14.0) the same text is a possessive quantifier: at most three
# digits. The pattern of cl100k_base is written in this way; copied from tiktoken into a tokenizer.json it
# gives other tokens for every number of four digits or more, and nothing is said. Patterns without
# the last plus, `\p{N}{1,3}`, mean the same in both.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet tiktoken==0.14.0 tokenizers==0.23.3
"$work/venv/bin/python" - <<'PYTHON'
import tiktoken
from tokenizers import Regex, pre_tokenizers


def pieces(pattern):
    split = pre_tokenizers.Split(Regex(pattern), 'isolated')
    return [piece for piece, _ in split.pre_tokenize_str('1234567')]


possessive = pieces(r'\p{N}{1,3}+')
assert possessive == ['1234567'], f'changed: {possessive}'
assert pieces(r'\p{N}{1,3}') == ['123', '456', '7']
ranks = {bytes([byte]): byte for byte in range(256)} | {b'12': 256, b'123': 257, b'1234': 258}
tokens = tiktoken.Encoding(
    'numbers', pat_str=r'\p{N}{1,3}+', mergeable_ranks=ranks, special_tokens={}
).encode('1234567')
assert tokens[0] == 257, f'changed: tiktoken gives {tokens}'  # '1234' would be 258
print('seen: one piece of 7 digits in tokenizers 0.23.3, at most 3 in tiktoken 0.14.0')
PYTHON
