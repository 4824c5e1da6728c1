"""Writes tokenizers.json: small tokenizer.json files in released styles, and the ids they give.

    pip install tokenizers==0.23.3
    PYTHONPATH=. python tests/golden/make_tokenizers.py

The library's own trainer makes each vocabulary from the text below. Then each file gets the form of
a release: its splits, normalizer, added tokens and list of merges. The ids are the library's, of
hostile texts (seed 0), with special tokens as ordinary text (ids) and, by the number of the text,
where they differ as tokens (special_ids); without the tokens that a post-processor adds.
"""

import json
import pathlib
from typing import Any

import tokenizers
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

from corpus.hub_convert import hostile_texts

HERE = pathlib.Path(__file__).parent

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r'|\s*[\r\n]+|\s+(?!\S)|\s+'
)
UPPER, LOWER = r'[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]', r'[\p{Ll}\p{Lm}\p{Lo}\p{M}]'
SHORT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
O200K = (
    rf'[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+{SHORT}|[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*{SHORT}'
    r'|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+'
)
DEEPSEEK = (
    r'\p{N}{1,3}',
    '[一-龥\u3040-ゟ゠-ヿ]+',
    r'[!"#$%&' + r"'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r'| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+',
)
TEXTS = [
    'The number of tokens that a text becomes is counted, and counted again: 1234567 of 1,234.',
    "don't, it's, they'll; DON'T, IT'S. e\u0301 and é, Å and Å; 東京と日本、한국어, हिन्दी, עברית",
    '    def tokens(self, text):\n        return [x for x in self.text if x]\n\n\n' * 3,
    'aaaa aaaa bbbb abab   \t\t   12 123 1234 <think> XyZ  XyZW ..... === ----- 🙂🙂 \U0010ffff',
]  # fmt: skip


def added(name: str, i: int, special: bool = True, normalized: bool = False) -> dict[str, Any]:
    """Returns an added token as the file has it."""
    no = dict.fromkeys(('single_word', 'lstrip', 'rstrip'), False)
    return {'id': i, 'content': name, **no, 'normalized': normalized, 'special': special}


def split(pattern: str) -> dict[str, Any]:
    """Returns a pre-tokenizer that cuts by a pattern."""
    return {
        'type': 'Split',
        'pattern': {'Regex': pattern},
        'behavior': 'Isolated',
        'invert': False,
    }


def byte_level(*patterns: str) -> dict[str, Any]:
    """Returns the pre-tokenizer of a byte-level file; without patterns GPT-2's."""
    last = {
        'type': 'ByteLevel',
        'add_prefix_space': False,
        'trim_offsets': True,
        'use_regex': not patterns,
    }
    if not patterns:
        return last
    return {'type': 'Sequence', 'pretokenizers': [*map(split, patterns), last]}


def trained(size: int, special: list[str]) -> dict[str, Any]:
    """Returns a byte-level file of `size` tokens, the special ones first."""
    made = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(LLAMA_3), 'isolated')
    in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.pre_tokenizer = pre_tokenizers.Sequence([words, in_bytes])
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made.train_from_iterator(
        TEXTS * 4,
        trainers.BpeTrainer(
            vocab_size=size, initial_alphabet=alphabet, special_tokens=special, show_progress=False
        ),
    )
    file = json.loads(made.to_str())
    file['decoder'] = {
        'type': 'ByteLevel',
        'add_prefix_space': True,
        'trim_offsets': True,
        'use_regex': True,
    }
    return file


def all_pairs(model: dict[str, Any]) -> list[list[str]]:
    """Returns all pairs of tokens that give a token, by the tokens' ids, as Llama 3's file has."""
    vocab, pairs = model['vocab'], []
    for token, _ in sorted(vocab.items(), key=lambda item: item[1]):
        cuts = [[token[:i], token[i:]] for i in range(1, len(token))]
        cuts = [cut for cut in cuts if cut[0] in vocab and cut[1] in vocab]
        pairs += sorted(cuts, key=lambda cut: (vocab[cut[0]], vocab[cut[1]]))
    return pairs


def files() -> dict[str, dict[str, Any]]:
    """Returns the files by the name of their style."""
    out = {}
    out['gpt2'] = trained(420, ['<|endoftext|>']) | {'pre_tokenizer': byte_level()}

    out['llama3'] = trained(440, [])
    model = out['llama3']['model']
    model['merges'], model['ignore_merges'] = all_pairs(model), True
    model['vocab']['ĠQzj'] = 440  # which no pair gives
    out['llama3']['added_tokens'] = [
        added(name, 441 + i)
        for i, name in enumerate(['<|begin_of_text|>', '<|end_of_text|>', '<|eot_id|>'])
    ]

    out['o200k'] = trained(430, [])
    out['o200k']['pre_tokenizer'] = byte_level(O200K)
    out['o200k']['added_tokens'] = [
        added('<|endoftext|>', 430), added('<|return|>', 431), added('<|call|>', 432)
    ]  # fmt: skip

    out['olmo2'] = trained(410, [])
    out['olmo2']['added_tokens'] = [
        added('|||IP_ADDRESS|||', 410, special=False), added('<|endoftext|>', 411)
    ]  # fmt: skip

    out['qwen2'] = trained(430, []) | {'normalizer': {'type': 'NFC'}}
    out['qwen2']['pre_tokenizer'] = byte_level(LLAMA_3.replace('{1,3}', ''))
    out['qwen2']['added_tokens'] = [
        added('<|endoftext|>', 430), added('<|im_end|>', 431), added('<think>', 432, special=False)
    ]  # fmt: skip

    out['deepseek_v3'] = trained(432, ['<｜begin▁of▁sentence｜>', '<｜end▁of▁sentence｜>'])
    out['deepseek_v3']['pre_tokenizer'] = byte_level(*DEEPSEEK)
    out['deepseek_v3']['added_tokens'].append(added('<｜User｜>', 432, False, True))

    out['llama2'] = sentencepiece()
    return out


def sentencepiece() -> dict[str, Any]:
    """Returns a file in the style of Llama 2: no splits, ▁ for spaces, and <0x00> for bytes."""
    special = ['<unk>', '<s>', '</s>', *(f'<0x{i:02X}>' for i in range(256))]
    made = Tokenizer(models.BPE(unk_token='<unk>', fuse_unk=True, byte_fallback=True))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=420, limit_alphabet=90, special_tokens=special, show_progress=False
    )
    made.train_from_iterator(TEXTS * 4, trainer)
    file = json.loads(made.to_str()) | {'pre_tokenizer': None}
    file['added_tokens'] = file['added_tokens'][:3]
    replace = {'type': 'Replace', 'pattern': {'String': ' '}, 'content': '▁'}
    back = {'type': 'Replace', 'pattern': {'String': '▁'}, 'content': ' '}
    file['normalizer'] = {
        'type': 'Sequence',
        'normalizers': [{'type': 'Prepend', 'prepend': '▁'}, replace],
    }
    strip = {'type': 'Strip', 'content': ' ', 'start': 1, 'stop': 0}
    file['decoder'] = {
        'type': 'Sequence',
        'decoders': [back, {'type': 'ByteFallback'}, {'type': 'Fuse'}, strip],
    }
    return file


def main() -> None:
    made = files()
    names = sorted({token['content'] for file in made.values() for token in file['added_tokens']})
    texts = [*TEXTS, ' Qzj', 'a Qzj', *names, *hostile_texts(24, 0, names)]
    styles = {}
    for style, file in made.items():
        there = Tokenizer.from_str(json.dumps(file))
        special = [there.encode(text, add_special_tokens=False).ids for text in texts]
        there.encode_special_tokens = True
        ids = [there.encode(text, add_special_tokens=False).ids for text in texts]
        differing = {i: special[i] for i in range(len(texts)) if special[i] != ids[i]}
        styles[style] = {'file': file, 'ids': ids, 'special_ids': differing}
    with open(HERE / 'tokenizers.json', 'w', encoding='utf-8') as f:
        made = {'tokenizers': tokenizers.__version__, 'texts': texts, 'styles': styles}
        json.dump(made, f, separators=(',', ':'))
        f.write('\n')


if __name__ == '__main__':
    main()
