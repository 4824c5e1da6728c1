"""Vocabularies in tokenizer.json files: as they are, and as tiktoken encodings where those agree.

tests/golden/make_tokenizers.py made the files and the ids with the tokenizers library.
"""

import copy
import json
import os
import pathlib
import pickle
import random
import subprocess
import sys

import numpy as np
import pytest
import tiktoken
from common_data import ROOT

from config import ConfigError
from corpus import hub_convert, hub_tokenizer
from corpus.hub_convert import parts_of, pattern_reasons, reasons
from corpus.shards import Split
from corpus.vocabulary_files import write_vocabulary
from runtime.data_record import check_vocabulary
from runtime.sampling import Completion, allowed_tokens, run_encoding
from runtime.sampling import encode as encode_prompt
from runtime.workdir import same_vocabulary, tokenizer_record
from tokenizer import (
    checked_encoding,
    encode,
    end_of_text,
    fingerprint,
    get_encoding,
    token_bytes,
)

GOLDEN = json.loads((pathlib.Path(__file__).parent / 'golden/tokenizers.json').read_text())
TEXTS, STYLES = GOLDEN['texts'], GOLDEN['styles']
EXACT = ['gpt2', 'llama3', 'o200k', 'olmo2']
OTHERS = {
    'qwen2': r'its normalizer \(NFC\) changes text first',
    'deepseek_v3': 'it splits text 3 times',
    'llama2': 'its model is not byte-level: .*are written <0x00>',
}


def file_of(style: str, **changes) -> dict:
    """Returns a copy of a style's file, with changes to its fields."""
    return copy.deepcopy(STYLES[style]['file']) | changes


def written(folder: pathlib.Path, file: dict, eos: str | dict = '') -> str:
    """Writes a tokenizer.json, with a config beside it, and returns its path."""
    folder.mkdir(exist_ok=True, parents=True)
    (folder / 'tokenizer.json').write_text(json.dumps(file))
    if eos:
        (folder / 'tokenizer_config.json').write_text(json.dumps({'eos_token': eos}))
    return str(folder / 'tokenizer.json')


def tiktoken_of(path: str, end: str = '') -> tiktoken.Encoding:
    """Returns the tiktoken encoding of a file, without a look at the library."""
    parts = parts_of(path, end)
    return checked_encoding('made', path, ranks=parts.ranks, **parts.sidecar())


def hub(path: str):
    """Returns the encoding of a file by the library, or skips the test."""
    pytest.importorskip('tokenizers')
    return get_encoding(path)


# ---------------------------------------------------------------------------------------------
# tiktoken in its place, without the library
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize('style', EXACT)
def test_tiktoken_gives_the_ids_of_the_library(style, tmp_path):
    enc = tiktoken_of(written(tmp_path, file_of(style)))
    for i, (text, ids) in enumerate(zip(TEXTS, STYLES[style]['ids'], strict=True)):
        assert encode(enc, text).tolist() == ids, repr(text)
        special = STYLES[style]['special_ids'].get(str(i), ids)
        assert enc.encode(text, allowed_special='all') == special, repr(text)
        assert enc.decode(ids) == text
    assert any(STYLES[style]['special_ids'].values())


def test_the_golden_texts_tell_the_styles_apart():
    """An encoding that ignored ignore_merges, the split or the tokens in text would be seen."""
    assert 440 in STYLES['llama3']['ids'][TEXTS.index(' Qzj')]
    of_name = TEXTS.index('|||IP_ADDRESS|||')
    assert STYLES['olmo2']['ids'][of_name] == [410]
    assert len({json.dumps(STYLES[style]['ids']) for style in STYLES}) == len(STYLES)


@pytest.mark.parametrize('style', OTHERS)
def test_what_tiktoken_has_not_is_said(style, tmp_path):
    path = written(tmp_path, file_of(style))
    with pytest.raises(ConfigError, match=OTHERS[style]) as refused:
        parts_of(path)
    assert f'--tokenizer={path}' in str(refused.value)


def added(name: str, i: int = 500, **fields) -> dict:
    no = dict.fromkeys(('single_word', 'lstrip', 'rstrip', 'normalized'), False)
    return {'content': name, 'id': i, 'special': True} | no | fields


BYTE_LEVEL = {
    'type': 'ByteLevel',
    'add_prefix_space': False,
    'trim_offsets': True,
    'use_regex': True,
}


@pytest.mark.parametrize(
    ('changes', 'reason'),
    [
        ({'pre_tokenizer': BYTE_LEVEL | {'add_prefix_space': True}}, 'puts a space before'),
        ({'pre_tokenizer': {'type': 'Digits'}}, 'splits text by Digits'),
        ({'pre_tokenizer': None}, 'last pre-tokenizer is not ByteLevel'),
        (
            {'pre_tokenizer': {'type': 'Sequence', 'pretokenizers': [
                {'type': 'Split', 'pattern': {'Regex': r'\s+'}, 'behavior': 'Removed'}, BYTE_LEVEL,
            ]}},
            'its split is Removed',
        ),
        ({'added_tokens': [added('<a>', lstrip=True)]}, "'<a>' has lstrip"),
        ({'added_tokens': [added('<a>', rstrip=True)]}, "'<a>' has rstrip"),
        ({'added_tokens': [added('<a>', single_word=True)]}, "'<a>' has single_word"),
        ({'added_tokens': [added('<a>'), added('<a>b', 501)]}, "'<a>' begins '<a>b'"),
        (
            {'added_tokens': [added('<a>'), added('>b', 501, normalized=True)]},
            "'<a>' and '>b' overlap",
        ),
        ({'normalizer': {'type': 'Sequence', 'normalizers': [{'type': 'NFKC'}]}}, 'NFKC'),
        ({'model': {'type': 'WordPiece', 'vocab': {}}}, 'its model is WordPiece'),
        ({'model': {'type': 'Unigram', 'vocab': []}}, 'its model is Unigram'),
    ],
)  # fmt: skip
def test_reasons(changes, reason):
    assert reason in ' '.join(reasons(file_of('gpt2', **changes)))


def test_empty_sequences_and_tokens_of_both_kinds_are_no_reason():
    apart = [added('<a>'), added('<b>', 501, normalized=True)]
    changes = {'normalizer': {'type': 'Sequence', 'normalizers': []}, 'added_tokens': apart}
    assert reasons(file_of('olmo2', **changes)) == []


@pytest.mark.parametrize(
    ('change', 'reason'),
    [
        (lambda m: m.update(dropout=0.1), 'dropout=0.1'),
        (lambda m: m.update(end_of_word_suffix='</w>'), "end_of_word_suffix='</w>'"),
        (lambda m: m['vocab'].pop('a'), '1 of the 256 bytes have no token'),
        (lambda m: m['vocab'].update({'Ġqzx': 500}), "merges do not lead to the token b' qzx'"),
        (lambda m: m['vocab'].update({'日': 500}), "'日' is not written in the byte-level"),
        (lambda m: m['merges'].reverse(), 'its'),
        (lambda m: m['merges'].append(m['merges'][0]), 'list a pair twice'),
    ],
)
def test_reasons_in_the_model(change, reason):
    file = file_of('o200k')
    change(file['model'])
    assert reason in ' '.join(reasons(file))


@pytest.mark.parametrize(
    ('pattern', 'reason'),
    [
        (r'\p{N}{1,3}+|\s+', 'a repeated group in the one engine'),
        (r'\p{N}{2}?', 'a repeated group in the one engine'),
        (r'\s++$|\s', 'the end of a line in the one'),
        (r'^a', 'the end of a line'),
        (r'\w+', 'read differently'),
        (r'(?i:ss|d)', 'which one letter can match'),
        (r'(?i:st)', 'which one letter can match'),
        (r'(?s:a)', 'read differently'),
        (r'(?<=a)b', 'read differently'),
        (r'[a-z&&[^b]]', 'read differently'),
        (r'[[:alpha:]]', 'read differently'),
        (r'[a--b]', 'read differently'),
        (r'\Ga', 'read differently'),
        (r'a.b', 'read differently'),
        (r'a{,3}', 'read differently'),
    ],
)
def test_patterns_that_engines_may_read_differently(pattern, reason):
    (found,) = pattern_reasons(pattern)
    assert reason in found


@pytest.mark.parametrize('style', [*EXACT, 'qwen2'])
def test_released_patterns_are_read_alike(style):
    assert pattern_reasons(hub_convert.pattern_of(file_of(style))) == []
    assert pattern_reasons(r"'(?i:[sdmt]|ll|ve|re)|\p{L}++|[^\r\n\p{L}\p{N}]?+\d*?(?:a|b)") == []


def random_model(rng: random.Random) -> dict:
    """Returns a byte-level model whose merges make sense only sometimes."""
    alphabet = hub_tokenizer.byte_of_character()
    vocab = {c: i for i, c in enumerate(alphabet)}
    merges, tokens = [], ['a', 'b', 'c']
    for _ in range(rng.randint(1, 9)):
        pair = [rng.choice(tokens), rng.choice(tokens)]
        if pair not in merges:
            merges.append(pair)
            vocab.setdefault(''.join(pair), len(vocab))
            tokens.append(''.join(pair))
    ignore = rng.random() < 0.5
    if rng.random() < 0.5:
        merges = hub_pairs(vocab, rng)
    if rng.random() < 0.3:
        i, j = rng.randrange(len(merges)), rng.randrange(len(merges))
        merges[i], merges[j] = merges[j], merges[i]
    return {'type': 'BPE', 'vocab': vocab, 'merges': merges, 'ignore_merges': ignore}


def hub_pairs(vocab: dict[str, int], rng: random.Random) -> list[list[str]]:
    """Returns all pairs of tokens that give a token, in the order of the tokens."""
    pairs = []
    for token in sorted(vocab, key=vocab.get):
        cuts = [[token[:i], token[i:]] for i in range(1, len(token))]
        cuts = [cut for cut in cuts if cut[0] in vocab and cut[1] in vocab]
        rng.shuffle(cuts)
        pairs += cuts
    return pairs


def test_ranks_stand_for_merges_exactly_where_it_is_said():
    """Brute force: tiktoken against merging by the list, over random models and all short texts."""
    rng = random.Random(0)
    accepted = refused = differing = 0
    texts = [bytes(rng.choices(b'abc', k=n)) for n in range(1, 11) for _ in range(30)]
    for _ in range(300):
        model = random_model(rng)
        content = {'model': model}
        why = hub_convert._merge_reasons(content)
        ranks = hub_convert.ranks_of(content)
        place = {pair: i for i, pair in enumerate(hub_convert._merges(model))}
        enc = tiktoken.Encoding('x', pat_str=r'[\s\S]+', mergeable_ranks=ranks, special_tokens={})
        same = True
        for text in texts:
            whole = model['ignore_merges'] and text in ranks
            pieces = [text] if whole else hub_convert.merge(text, place)[0]
            same &= enc.encode_ordinary(text.decode()) == [ranks[piece] for piece in pieces]
        assert same or why, model
        accepted, refused = accepted + (not why), refused + bool(why)
        differing += not same
    assert accepted > 50
    assert refused > 50
    assert differing > refused / 3  # it does not refuse at will


# ---------------------------------------------------------------------------------------------
# End of text, and a sidecar that names it
# ---------------------------------------------------------------------------------------------


def test_which_token_ends_a_document(tmp_path):
    file = file_of('o200k')
    assert parts_of(written(tmp_path / 'a', file)).end_of_text == '<|endoftext|>'
    assert parts_of(written(tmp_path / 'b', file, '<|call|>')).end_of_text == '<|call|>'
    beside = written(tmp_path / 'c', file, {'content': '<|return|>', 'lstrip': False})
    assert parts_of(beside).end_of_text == '<|return|>'
    assert parts_of(beside, '<|call|>').end_of_text == '<|call|>'
    with pytest.raises(ConfigError, match=r"no token '</s>', the eos_token of .*<\|return\|>"):
        parts_of(written(tmp_path / 'd', file, '</s>'))
    with pytest.raises(ConfigError, match=r"no token '<x>', the --end_of_text .*<\|return\|>"):
        parts_of(beside, '<x>')
    file['added_tokens'] = [added('<other>')]
    with pytest.raises(ConfigError, match='names no token that ends a document'):
        parts_of(written(tmp_path / 'e', file))
    file['added_tokens'] = [added('</s>', special=False)]
    with pytest.raises(ConfigError, match=r"does not mark '</s>' as special"):
        parts_of(written(tmp_path / 'e', file))
    (tmp_path / 'a/tokenizer_config.json').write_text('{')
    with pytest.raises(ConfigError, match=r'tokenizer_config\.json cannot be read'):
        parts_of(str(tmp_path / 'a/tokenizer.json'))


def test_a_sidecar_names_the_end_and_the_tokens_in_text(tmp_path):
    parts = parts_of(written(tmp_path, file_of('olmo2')))
    path = str(tmp_path / 'own.tiktoken')
    encodings = {}
    for end, in_text in (
        ('<|endoftext|>', ()),
        ('<|endoftext|>', ('|||IP_ADDRESS|||',)),
        ('|||IP_ADDRESS|||', ()),
    ):
        own = parts._replace(end_of_text=end, in_text=frozenset(in_text))
        write_vocabulary(path, own.sidecar(), own.ranks)
        enc = pickle.loads(pickle.dumps(get_encoding(path)))
        encodings[fingerprint(enc)] = enc
        assert end_of_text(enc) == end
        assert enc.eot_token == own.special_tokens[end]
        assert token_bytes(enc)[410] == (16 if in_text else 0)
        assert (encode(enc, 'a|||IP_ADDRESS|||').tolist()[-1] == 410) == bool(in_text)
    assert len(encodings) == 3
    plain = next(iter(encodings.values()))
    assert type(plain) is tiktoken.Encoding  # as without the fields
    sidecar = json.loads((tmp_path / 'own.json').read_text())
    for bad in (
        {'end_of_text': '<x>'},
        {'in_text': ['<x>']},
        {'in_text': 3},
        {'in_text': ['|||IP_ADDRESS|||'], 'end_of_text': '|||IP_ADDRESS|||'},
    ):
        (tmp_path / 'own.json').write_text(json.dumps(sidecar | bad))
        with pytest.raises(ConfigError, match=r'own\.json is not valid'):
            get_encoding(path)


# ---------------------------------------------------------------------------------------------
# The file as it is
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize('style', STYLES)
def test_the_library_behind_the_interface(style, tmp_path):
    enc = hub(written(tmp_path, file_of(style)))
    enc = pickle.loads(pickle.dumps(enc))
    sizes = token_bytes(enc)
    for i, (text, ids) in enumerate(zip(TEXTS, STYLES[style]['ids'], strict=True)):
        assert encode(enc, text).dtype == np.uint32
        assert encode(enc, text).tolist() == ids, repr(text)
        if not any(s['normalizer'] for s in [STYLES[style]['file']]):
            assert enc.decode(ids) == text
            assert sizes[ids].sum() == len(text.encode())
            special = STYLES[style]['special_ids'].get(str(i), ids)
            assert enc.encode(text, allowed_special='all') == special
        assert enc.by_library(text, False) == (ids, enc.decode(ids))
    assert enc.eot_token == enc.encode_single_token(end_of_text(enc))
    assert sizes[enc.eot_token] == 0


def test_the_bytes_of_an_id_are_those_of_tiktoken(tmp_path):
    path = written(tmp_path, file_of('olmo2'))
    enc, other = hub(path), tiktoken_of(path)
    assert enc.n_vocab == other.n_vocab
    assert token_bytes(enc).tolist() == token_bytes(other).tolist()
    for i in range(enc.n_vocab):
        assert enc.decode_single_token_bytes(i) == other.decode_single_token_bytes(i)
    for i in (-1, enc.n_vocab):
        with pytest.raises(KeyError):
            enc.decode_single_token_bytes(i)


def test_a_normalizer_may_change_text_but_not_lose_it(tmp_path):
    enc = hub(written(tmp_path / 'qwen', file_of('qwen2')))
    ids = encode(enc, 'e\u0301<think>e\u0301')
    assert enc.decode(ids.tolist()) == 'é<think>é'
    assert enc.kept('e\u0301', ids[:1])[0] < 2 == enc.kept('e\u0301', ids[:1])[1]
    llama = hub(written(tmp_path / 'llama', file_of('llama2')))
    assert llama.decode(encode(llama, 'a ▁b').tolist()) == 'a  b'
    assert llama.decode_bytes(encode(llama, '\x01\U0010ffff').tolist()) == '\x01\U0010ffff'.encode()


@pytest.mark.parametrize('scheme', ['always', 'first', 'never'])
def test_unigram_tokens_with_a_space_put_first(scheme, tmp_path):
    """Nothing is lost with any way to put a space first, and what is lost is counted."""
    tokenizers = pytest.importorskip('tokenizers')
    made = tokenizers.Tokenizer(tokenizers.models.Unigram())
    made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace(prepend_scheme=scheme)
    all_bytes = [f'<0x{i:02X}>' for i in range(256)]
    trainer = tokenizers.trainers.UnigramTrainer(
        vocab_size=400, special_tokens=['<unk>', '</s>', *all_bytes], unk_token='<unk>',
        show_progress=False,
    )  # fmt: skip
    made.train_from_iterator(TEXTS[:4], trainer)
    file = json.loads(made.to_str())
    file['model']['byte_fallback'] = True
    of_pieces = {'type': 'Metaspace', 'replacement': '▁', 'prepend_scheme': scheme, 'split': True}
    file['decoder'] = {'type': 'Sequence', 'decoders': [{'type': 'ByteFallback'}, of_pieces]}
    file['added_tokens'] = [*file['added_tokens'][:2], added('<think>', 400, special=False)]
    enc = hub(written(tmp_path, file))
    for text in [*TEXTS, '<think>x<think> y', ' x', '▁']:
        ids = encode(enc, text)
        assert enc.by_library(text, False) == (ids.tolist(), enc.decode(ids.tolist()))
        if len(ids):
            kept, whole = enc.kept(text, ids[:-1])
            assert kept < whole
    file['model']['byte_fallback'] = False
    with pytest.raises(ConfigError, match='does not give text back'):
        hub(written(tmp_path, file))


def test_fingerprint(tmp_path):
    file = file_of('qwen2')
    paths = [written(tmp_path / name, file) for name in 'ab']
    other = copy.deepcopy(file) | {
        'post_processor': {'type': 'ByteLevel', 'add_prefix_space': True, 'trim_offsets': False,
                           'use_regex': True},
    }  # fmt: skip
    paths += [written(tmp_path / 'c', other), written(tmp_path / 'd', file, '<|im_end|>')]
    paths += [written(tmp_path / 'e', file | {'normalizer': None})]
    a, b, c, d, e = (fingerprint(hub(path)) for path in paths)
    assert a == b == c
    assert len({a, d, e}) == 3


def test_ids_are_those_of_the_file_where_it_has_gaps(tmp_path):
    file = file_of('olmo2')
    file['added_tokens'] = [added('<|t|>', 600, special=False), added('<|endoftext|>', 500)]
    path = written(tmp_path, file)
    enc, other = hub(path), tiktoken_of(path)
    text = 'a<|t|>b<|endoftext|>'
    for e in (enc, other):
        assert (e.n_vocab, e.eot_token) == (601, 500)
        assert encode(e, text).tolist()[1] == 600
        assert e.encode(text, allowed_special='all')[-1] == 500
        assert np.flatnonzero(token_bytes(e))[-1] == 600
    assert encode(enc, text).tolist() == encode(other, text).tolist()
    with pytest.raises(KeyError):
        enc.decode_single_token_bytes(550)
    file['added_tokens'][0]['id'] = 409  # which the model has
    with pytest.raises(ConfigError, match='gives an id to two tokens'):
        hub(written(tmp_path, file))
    file['added_tokens'] = [added('Ġthe', 500), added('<|endoftext|>', 501)]
    assert 'Ġthe' in file['model']['vocab']
    with pytest.raises(ConfigError, match="gives the token 'Ġthe' the ids"):
        hub(written(tmp_path, file))


@pytest.mark.parametrize(
    ('changes', 'problem'),
    [
        ({'decoder': {'type': 'WordPiece', 'prefix': '##', 'cleanup': True}}, r'decoder \(WordPie'),
        ({'decoder': None}, r'its decoder \(none\)'),
        ({'normalizer': {'type': 'Lowercase'}, 'pre_tokenizer': {'type': 'Sequence',
          'pretokenizers': [{'type': 'WhitespaceSplit'}, BYTE_LEVEL]}}, 'does not give text back'),
        ({'added_tokens': [added('<|endoftext|>', 'x')]}, 'which has no content or no id'),
        ({'added_tokens': [added('')]}, 'which has no content or no id'),
        ({'added_tokens': [3]}, 'is damaged: it adds the token 3'),
        ({'pre_tokenizer': 3}, 'refuses it'),
    ],
)  # fmt: skip
def test_files_that_cannot_be_used(tmp_path, changes, problem):
    with pytest.raises(ConfigError, match=problem):
        hub(written(tmp_path, file_of('gpt2', **changes)))


def test_unknown_characters_are_text_that_is_lost(tmp_path):
    file = file_of('llama2')
    file['model'] |= {'byte_fallback': False, 'fuse_unk': True}
    with pytest.raises(ConfigError, match=r'does not give text back.*byte_fallback'):
        hub(written(tmp_path, file))


def test_other_files_and_a_missing_library(tmp_path, monkeypatch):
    (tmp_path / 'a.json').write_text('{"pattern": "."}')
    with pytest.raises(ConfigError, match=r'is no tokenizer\.json .*NAME\.tiktoken if this is the'):
        get_encoding(str(tmp_path / 'a.json'))
    (tmp_path / 'a.json').write_text('{"model": ')
    with pytest.raises(ConfigError, match='is damaged'):
        get_encoding(str(tmp_path / 'a.json'))
    with pytest.raises(ConfigError, match='there is no vocabulary'):
        get_encoding(str(tmp_path / 'b.json'))
    monkeypatch.setitem(sys.modules, 'tokenizers', None)
    with pytest.raises(ConfigError, match=r'needs tokenizers: pip install -r requirements/token'):
        get_encoding(written(tmp_path, file_of('gpt2')))


def test_data_and_samples(tmp_path):
    """Shards by two worker processes hold the library's ids; a sample reads them back."""
    pytest.importorskip('tokenizers')
    path = written(tmp_path / 'hub', file_of('qwen2'), '<|im_end|>')
    texts = {f'{i}.txt': text for i, text in enumerate(TEXTS) if text}
    (tmp_path / 'in').mkdir()
    for name, text in texts.items():
        (tmp_path / 'in' / name).write_text(text, encoding='utf-8', newline='')
    command = [
        sys.executable, 'data.py', f'--input={tmp_path}/in', f'--tokenizer={path}', '--workers=2',
        f'--output={tmp_path}/out', '--validation_share=0',
    ]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    split = Split(str(tmp_path / 'out'), 'train')
    ids = split.read(0, split.n_tokens).tolist()
    expected = []
    for name in sorted(texts):
        expected += [*STYLES['qwen2']['ids'][TEXTS.index(texts[name])], 431]
    assert ids == expected
    enc = split.encoding()
    assert encode_prompt(enc, 'a<|im_end|><think>')[-2:] == [431, 432]
    allowed = allowed_tokens(enc, 440)
    assert np.flatnonzero(~allowed).tolist() == [430, *range(433, 440)]
    completion = Completion('', enc)
    completion.add([*encode(enc, 'é<think>').tolist(), 431])
    assert (completion.text, completion.finish_reason) == ('é<think>', 'stop')


# ---------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------


def command(*arguments: str) -> subprocess.CompletedProcess:
    words = [sys.executable, os.path.join(ROOT, 'tokenizer.py'), *arguments]
    return subprocess.run(words, capture_output=True, text=True, check=False)


def test_conversion(tmp_path, monkeypatch):
    path = written(tmp_path, file_of('olmo2'))
    hub(path)
    monkeypatch.setattr(hub_convert, 'TEXTS', 200)
    monkeypatch.setattr(hub_convert, 'class_differences', lambda _: [])  # some seconds
    enc = hub_convert.convert(path, str(tmp_path / 'own.tiktoken'), texts=['a text'])
    assert [encode(enc, text).tolist() for text in TEXTS] == STYLES['olmo2']['ids']
    assert enc.eot_token == get_encoding(path).eot_token == 411
    with pytest.raises(ConfigError, match=r'tokenizer\.json, the sidecar of --output, exists'):
        hub_convert.convert(path, str(tmp_path / 'tokenizer.tiktoken'))
    monkeypatch.setattr(hub_convert, 'class_differences', lambda _: ['\\p{L} differs'])
    with pytest.raises(ConfigError, match=r'tables of characters differ: \\p{L} differs'):
        hub_convert.convert(path, str(tmp_path / 'other.tiktoken'))


def test_a_file_and_its_conversion_are_one_vocabulary(tmp_path):
    def record(enc: tiktoken.Encoding) -> dict[str, str]:
        return json.loads(tokenizer_record(enc))

    path, own = written(tmp_path, file_of('olmo2')), str(tmp_path / 'own.tiktoken')
    there, parts = hub(path), parts_of(path)
    write_vocabulary(own, parts.sidecar(), parts.ranks)
    here = get_encoding(own)
    check_vocabulary({'tokenizer': record(there)}, {'tokenizer': record(here)}, 'it')
    (tmp_path / 'run').mkdir()
    (tmp_path / 'run/tokenizer.json').write_text(tokenizer_record(there))
    assert run_encoding(str(tmp_path / 'run'), own).name == own
    # Other tokens, another end, or a file that has changed since.
    tokens = dict(zip(parts.ranks, reversed(parts.ranks.values()), strict=True))
    for other in (parts._replace(ranks=tokens), parts._replace(in_text=frozenset())):
        write_vocabulary(own, other.sidecar(), other.ranks)
        assert not same_vocabulary(record(there), record(get_encoding(own)))
        assert not same_vocabulary(record(there), record(here))
        with pytest.raises(ConfigError, match='was trained with the vocabulary'):
            check_vocabulary(
                {'tokenizer': record(there)}, {'tokenizer': record(get_encoding(own))}, 'it'
            )
        with pytest.raises(ConfigError, match='is another vocabulary than'):
            run_encoding(str(tmp_path / 'run'), own)


def test_command_copies_with_another_end(tmp_path):
    path = written(tmp_path, file_of('qwen2'), '<|im_end|>')
    hub(path)
    refused = command(f'--from_hf={path}', f'--output={tmp_path}/own.tiktoken')
    assert refused.returncode == 1
    assert 'its normalizer (NFC)' in refused.stderr
    output = f'{tmp_path}/new/tokenizer.json'
    done = command(f'--from_hf={path}', f'--output={output}', '--end_of_text=<|endoftext|>')
    assert done.returncode == 0, done.stderr
    assert get_encoding(output).eot_token == 430
    assert get_encoding(path).eot_token == 431
    again = command(f'--from_hf={path}', f'--output={tmp_path}/new/x.json')
    assert 'tokenizer_config.json exists' in again.stderr
    lone = command('--end_of_text=x', f'--output={output}')
    assert 'goes with --from_hf' in lone.stderr
    output = f'{tmp_path}/other/tokenizer.json'
    sized = command(f'--from_hf={path}', f'--output={output}', '--vocab_size=300')
    assert '--vocab_size does not go with --from_hf' in sized.stderr
    tried = command(f'--from_hf={path}', f'--output={output}', f'--input={ROOT}/README.md')
    assert '--input is not looked at' in tried.stderr
    assert not os.path.exists(output)


@pytest.mark.parametrize('style', ['qwen2', 'deepseek_v3'])
def test_the_texts_would_find_what_the_reasons_miss(style, tmp_path, monkeypatch):
    path = written(tmp_path, file_of(style))
    hub(path)
    monkeypatch.setattr(hub_convert, 'reasons', lambda _: [])
    monkeypatch.setattr(hub_convert, 'class_differences', lambda _: [])
    monkeypatch.setattr(
        hub_convert, 'pattern_of',
        lambda c: hub_tokenizer.steps(c['pre_tokenizer'], 'pretokenizers')[-2]['pattern']['Regex']
        + r'|[\s\S]',
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r'encoding: of .* tokenizers gives'):
        hub_convert.convert(path, str(tmp_path / 'own.tiktoken'))
    assert not (tmp_path / 'own.tiktoken').exists()
    assert not (tmp_path / 'own.json').exists()


def test_classes_of_characters_are_compared(monkeypatch):
    pytest.importorskip('tokenizers')
    names = hub_convert.named_classes(r"\p{L}|(?i:'s|[d])|[^\S\p{L}]")
    assert names == [r'\p{L}', r'\s', '(?i:[ds])']
    assert hub_convert.class_differences(r'\s+') == []
    monkeypatch.setattr(hub_convert, 'named_classes', lambda _: [r'\w'])
    assert hub_convert.class_differences('')[0].startswith(r'\w differs in ')


@pytest.mark.slow
@pytest.mark.parametrize('style', EXACT)
def test_the_command_converts_every_style(style, tmp_path):
    path = written(tmp_path, file_of(style))
    there = hub(path)
    (tmp_path / 'a.txt').write_text('some text')
    output = f'{tmp_path}/own.tiktoken'
    done = command(f'--from_hf={path}', f'--output={output}', f'--input={tmp_path}/a.txt')
    assert done.returncode == 0, done.stderr
    assert f' ids, {there.end_of_text} ends a document' in done.stderr
    assert '3,000 hostile texts and 1 documents' in done.stderr
    enc = get_encoding(output)
    names = sorted(enc.special_tokens_set)
    hub_convert.compare(enc, there, hub_convert.hostile_texts(20_000, 7, names))
