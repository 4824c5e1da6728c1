"""Encodings by name, their errors, and that tiktoken encodes as the trainer does."""

import base64
import gzip
import json
import os
import random
import re
import subprocess
import sys
import time
import types

import numpy as np
import pytest
import tiktoken
import tiktoken.load
import tiktoken.registry
from common_data import ROOT, SHIPPED

import tokenizer
from config import ConfigError
from corpus import hub_tokenizer
from tokenizer import (
    END_OF_TEXT,
    encode,
    fingerprint,
    get_encoding,
    learn_merges,
    token_bytes,
    train,
)

AWKWARD = [
    '',
    'a',
    'hello world',
    "don't, 'self' and 'SELF'",
    'a' * 1000,
    'ab' * 500 + 'b' * 77,
    ' ' * 300 + 'x' + ' ' * 13,
    '\n\n\n\t\t  \r\n \r \n x\n',
    '=' * 201 + '\n' + '-' * 99,
    '1234567890' * 20,
    'naïve Ångström 東京 🙂🙂🙂 \U0001f468\u200d\U0001f469 \u0301\u0301 ﷽',
    '\x00\x01\x7f\x80\x85\xa0\u2028\u3000\ufeff',
    END_OF_TEXT,
]


def corpus(seed: int = 0) -> list[str]:
    rng = random.Random(seed)
    words = [''.join(rng.choices('aabbcde', k=rng.randint(1, 9))) for _ in range(300)]
    texts = [' '.join(rng.choices(words, k=200)) for _ in range(20)]
    return [*texts, 'aaaa' * 60, 'é' * 50 + '=' * 90, *(['x = [1, 2]\n    return x\n'] * 9)]


def random_texts(n: int) -> list[str]:
    """Returns n texts of few letters, whose pieces repeat and overlap, and n of many scripts."""
    rng = random.Random(1)
    few = [''.join(rng.choices('aab =(\n\té1', k=rng.randint(1, 400))) for _ in range(n)]
    ranges = [(0, 0x250), (0x370, 0x600), (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0x1F300, 0x1F5FF)]
    many = []
    for _ in range(n):
        low, high = rng.choice(ranges)
        many.append(''.join(chr(rng.randint(low, high)) for _ in range(60)))
    return few + many


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """Returns an encoding that `train` wrote, and its path."""
    pytest.importorskip('tokenizers')
    path = str(tmp_path_factory.mktemp('vocab') / 'tiny.tiktoken')
    return train(corpus(), 600, path), path


def test_shipped_vocabulary():
    enc = get_encoding(SHIPPED)
    assert enc.n_vocab == 4096
    assert enc.eot_token == 4095
    with open(os.path.join(ROOT, 'tokenizer.py'), encoding='utf-8') as f:
        text = f.read()
    ids = enc.encode_ordinary(text)
    assert enc.decode(ids) == text
    assert len(text.encode()) / len(ids) > 2.5


def test_relative_path_falls_back_to_the_folder_of_the_code(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert get_encoding(SHIPPED).n_vocab == 4096


@pytest.mark.parametrize('name', ['bytes', SHIPPED])
def test_every_text_survives_the_round_trip(name):
    enc = get_encoding(name)
    for text in AWKWARD + random_texts(50):
        assert enc.decode_bytes(enc.encode_ordinary(text)) == text.encode()


def test_bytes():
    enc = get_encoding('bytes')
    assert enc.n_vocab == 257
    assert enc.encode_ordinary('aé') == list('aé'.encode())
    assert enc.encode(END_OF_TEXT, allowed_special='all') == [256]


@pytest.mark.parametrize('name', ['bytes', SHIPPED])
def test_token_bytes(name):
    enc = get_encoding(name)
    sizes = token_bytes(enc)
    assert sizes.dtype == np.int32
    assert sizes.shape == (enc.n_vocab,)
    assert sizes[enc.eot_token] == 0
    text = ''.join(AWKWARD)
    assert sizes[enc.encode_ordinary(text)].sum() == len(text.encode())


def test_token_bytes_of_unused_ids_is_zero(tmp_path):
    write(tmp_path / 'gap.tiktoken', special={END_OF_TEXT: 300})
    sizes = token_bytes(get_encoding(str(tmp_path / 'gap.tiktoken')))
    assert sizes.tolist() == [1] * 256 + [0] * 45


def test_fingerprint_follows_content_alone(tmp_path):
    for name, pattern in [('a', ANY), ('b', ANY), ('c', ANY * 2 + '?')]:
        write(tmp_path / f'{name}.tiktoken', pattern=pattern)
    a, b, c = (fingerprint(get_encoding(str(tmp_path / f'{n}.tiktoken'))) for n in 'abc')
    assert a == b != c


def test_tiktoken_encodes_as_the_trainer(trained):
    enc, _ = trained
    trainer = learn_merges(corpus(), 600)
    for text in AWKWARD + corpus() + corpus(7) + random_texts(300):
        assert enc.encode_ordinary(text) == trainer.encode(text).ids, repr(text)


def test_training_sizes_and_order(trained):
    enc, path = trained
    assert enc.n_vocab == 600
    assert enc.eot_token == 599
    assert sorted(len(enc.decode_single_token_bytes(i)) for i in range(256)) == [1] * 256
    with pytest.raises(ConfigError, match='exists'):
        train(corpus(), 600, path)


def test_training_errors(tmp_path):
    pytest.importorskip('tokenizers')
    with pytest.raises(ConfigError, match='below 257'):
        train(corpus(), 256, str(tmp_path / 'a.tiktoken'))
    with pytest.raises(ConfigError, match='more text, or --vocab_size=259'):
        train(['abab'], 1000, str(tmp_path / 'a.tiktoken'))
    with pytest.raises(ConfigError, match=r'let it end in \.tiktoken'):
        train(corpus(), 300, str(tmp_path / 'a'))
    refused = ['fine', ' ' * 1_000_000 + 'x']
    with pytest.raises(ConfigError, match=r'b\.txt: the tokenizer cannot encode it .*leave it out'):
        train(refused, 300, str(tmp_path / 'a.tiktoken'), ['a.txt', 'b.txt'])
    assert not list(tmp_path.iterdir())
    (tmp_path / 'file').write_text('')
    with pytest.raises(ConfigError, match=r'--output=.* cannot be written \('):
        train(corpus(), 300, str(tmp_path / 'file/a.tiktoken'))


def test_training_checks_its_result(monkeypatch, tmp_path):
    pytest.importorskip('tokenizers')
    learn = tokenizer.learn_merges

    def other(texts: list[str], vocab_size: int):
        trained = learn(texts, vocab_size)
        return types.SimpleNamespace(
            get_vocab=trained.get_vocab, encode=lambda text: trained.encode(text + '.')
        )

    monkeypatch.setattr(tokenizer, 'learn_merges', other)
    with pytest.raises(ValueError, match='encode text 0 differently'):
        train(corpus(), 600, str(tmp_path / 'a.tiktoken'))
    assert not list(tmp_path.iterdir())


def test_training_refuses_a_pattern_that_loses_text(monkeypatch, tmp_path):
    monkeypatch.setattr(tokenizer, 'PATTERN', r'\w+|\s+')
    with pytest.raises(ConfigError, match=r'tokenizer\.PATTERN: the pattern .* does not give text'):
        train(corpus(), 600, str(tmp_path / 'a.tiktoken'))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('letters', ['x', 'ACGT', 'abcdefghijklmnopqrstuvwxyz', '='])
def test_training_on_an_unbroken_run(letters):
    pytest.importorskip('tokenizers')
    rng = random.Random(0)
    run = ''.join(rng.choices(letters, k=300_000))
    started = time.perf_counter()
    trainer = learn_merges([*corpus(), run], 400)
    assert time.perf_counter() - started < 10  # by the square of the length it were a minute
    byte_of = hub_tokenizer.byte_of_character()
    enc = tiktoken.Encoding(
        'run',
        pat_str=tokenizer.PATTERN,
        mergeable_ranks={
            bytes(byte_of[c] for c in token): i for token, i in trainer.get_vocab().items()
        },
        special_tokens={},
    )
    for text in (run[:5000], *corpus(3)):
        assert enc.encode_ordinary(text) == trainer.encode(text).ids


@pytest.mark.parametrize(
    ('pattern', 'problem'),
    [
        ('.', r"'\\n': comes back as b''"),
        (r'\w+|\s+', 'comes back'),
        (r'\S+| ', 'comes back'),
        (r'[^\p{M}]', 'comes back'),
        (r'[^\p{Co}]', 'comes back'),
        (r'\P{Cc}|\s', 'comes back'),
        (r'[\x00-\x{ffff}]', 'comes back'),
        (r'(?s).(?!$)', 'comes back'),
        (r'a*|[\s\S]', 'the tokenizer cannot encode it'),  # tiktoken panics
    ],
)
def test_pattern_that_loses_text(tmp_path, pattern, problem):
    write(tmp_path / 'own.tiktoken', pattern)
    with pytest.raises(
        ConfigError, match=r'own\.tiktoken: the pattern .* does not give'
    ) as refused:
        get_encoding(str(tmp_path / 'own.tiktoken'))
    assert re.search(problem, str(refused.value))


def test_encode_counts_the_bytes():
    enc = get_encoding('bytes')
    assert encode(enc, 'aé<|endoftext|>').tolist() == list('aé<|endoftext|>'.encode())
    ranks = {bytes([i]): i for i in range(256)}
    loses = tiktoken.Encoding('x', pat_str=r'\w+', mergeable_ranks=ranks, special_tokens={})
    assert encode(loses, 'ab').tolist() == [97, 98]
    with pytest.raises(ConfigError, match='keeps 2 of its 3 bytes'):
        encode(loses, 'a b')
    panics = tiktoken.Encoding('x', pat_str=r'a*', mergeable_ranks=ranks, special_tokens={})
    with pytest.raises(ConfigError, match='cannot encode it'):
        encode(panics, 'b')


def test_training_without_the_library_names_the_requirements(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, 'tokenizers', None)
    with pytest.raises(ConfigError, match=r'pip install -r requirements/tokenizer\.txt'):
        train(corpus(), 600, str(tmp_path / 'a.tiktoken'))


def test_command(tmp_path):
    pytest.importorskip('tokenizers')
    texts = corpus()
    for i, text in enumerate(texts[2:]):
        (tmp_path / f'{i}.txt').write_text(text, encoding='utf-8')
    (tmp_path / 'in').mkdir()
    lines = [json.dumps({'body': {'text': text}}) + '\n' for text in texts[:2]]
    (tmp_path / 'in/a.jsonl').write_text(''.join([*lines, '{"body": 3}\n']))
    out = tmp_path / 'own.tiktoken'
    command = [sys.executable, os.path.join(ROOT, 'tokenizer.py'), '--vocab_size=400']
    files = [str(path) for path in sorted(tmp_path.glob('*.txt'))]
    done = subprocess.run(
        [*command, '--input', files[0], *files[1:], f'--input={tmp_path}/in', f'--output={out}',
         '--text_field=body.text'],
        check=True, capture_output=True, text=True,
    )  # fmt: skip
    assert f'400 ids from {len(texts)} documents' in done.stderr
    assert ', 1 bad records left out' in done.stderr
    assert get_encoding(str(out)).n_vocab == 400


@pytest.mark.parametrize(
    ('inputs', 'content', 'message'),
    [
        (['none/*.txt'], b'', 'no file matches --input=none/'),
        (['a.txt'], b'\xff', r'hold no text.*\n.*a\.txt: .*utf-8'),
        (['a.txt', 'b.txt'], b'abc', 'no file matches --input=b.txt'),
        (['a.txt'], b'abc', 'after 259 of 300 tokens'),
    ],
)
def test_command_ends_with_the_message_of_an_error(tmp_path, monkeypatch, inputs, content, message):
    pytest.importorskip('tokenizers')
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'a.txt').write_bytes(content)
    given = types.SimpleNamespace(
        input=inputs[:1], vocab_size=300, output='out.tiktoken', text_field='text', extensions=[],
        from_hf=None, end_of_text='', as_text=False,
    )  # fmt: skip
    monkeypatch.setattr(tokenizer, 'flags', types.SimpleNamespace(FLAGS=given))
    with pytest.raises(SystemExit, match=message):
        tokenizer.main(inputs[1:])


ANY = r'[\s\S]'


def write(path, pattern: str = ANY, special: dict | None = None, extra: bytes = b''):
    lines = [base64.b64encode(bytes([i])) + b' %d\n' % i for i in range(256)]
    path.write_bytes(b''.join(lines) + extra)
    sidecar = {'pattern': pattern, 'special_tokens': special or {END_OF_TEXT: 256}}
    path.with_suffix('.json').write_text(json.dumps(sidecar))


def test_unknown_name_lists_the_known():
    with pytest.raises(ConfigError, match=r"'cl200k'.*bytes.*cl100k_base"):
        get_encoding('cl200k')


def test_missing_file_and_sidecar(tmp_path):
    path = tmp_path / 'own.tiktoken'
    with pytest.raises(ConfigError, match='there is no vocabulary'):
        get_encoding(str(path))
    (tmp_path / 'folder.tiktoken').mkdir()
    write(path)
    (tmp_path / 'folder.json').write_bytes((tmp_path / 'own.json').read_bytes())
    with pytest.raises(ConfigError, match=r'folder\.tiktoken cannot be read \(Is a directory'):
        get_encoding(f'{tmp_path}/folder.tiktoken')
    (tmp_path / 'own.json').unlink()
    with pytest.raises(ConfigError, match=r'own\.json.*"pattern".*"special_tokens"'):
        get_encoding(str(path))


@pytest.mark.parametrize(
    'sidecar', ['{', '[]', '{"pattern": "."}', '{"pattern": 3, "special_tokens": {}}']
)
def test_bad_sidecar(tmp_path, sidecar):
    write(tmp_path / 'own.tiktoken')
    (tmp_path / 'own.json').write_text(sidecar)
    with pytest.raises(ConfigError, match=r'own\.json is not valid'):
        get_encoding(str(tmp_path / 'own.tiktoken'))


@pytest.mark.parametrize('line', [b'YWI=', b'YWI= x', b'YW!I= 256', b'YWI= 255', b'YQ== 256'])
def test_corrupt_line_is_named(tmp_path, line):
    write(tmp_path / 'own.tiktoken', extra=line + b'\n')
    with pytest.raises(ConfigError, match=r'own\.tiktoken, line 257'):
        get_encoding(str(tmp_path / 'own.tiktoken'))


def test_incomplete_or_clashing_vocabularies(tmp_path):
    path = tmp_path / 'own.tiktoken'
    write(path)
    path.write_bytes(b''.join(path.read_bytes().splitlines(keepends=True)[:99]))
    with pytest.raises(ConfigError, match='157 are missing, first 0x63'):
        get_encoding(str(path))
    write(path, special={END_OF_TEXT: 255})
    with pytest.raises(ConfigError, match='use ids from 256 up'):
        get_encoding(str(path))
    write(path, pattern='(')
    with pytest.raises(ConfigError, match='refuses'):
        get_encoding(str(path))


def test_cut_at_a_line_border_is_known_by_the_sidecar(trained, tmp_path):
    _, path = trained
    with open(path, 'rb') as f:
        lines = f.readlines()
    (tmp_path / 'cut.tiktoken').write_bytes(b''.join(lines[:400]))
    with open(path.removesuffix('.tiktoken') + '.json', 'rb') as f:
        (tmp_path / 'cut.json').write_bytes(f.read())
    with pytest.raises(ConfigError, match=r'cut\.tiktoken ends at line 400.* counts 599 tokens'):
        get_encoding(str(tmp_path / 'cut.tiktoken'))


def test_no_network_says_how_to_supply_the_file(monkeypatch, tmp_path):
    def offline(path: str) -> bytes:
        raise ConnectionError(f'no route to {path}')

    monkeypatch.setenv('TIKTOKEN_CACHE_DIR', str(tmp_path))
    monkeypatch.setattr(tiktoken.load, 'read_file', offline)
    monkeypatch.setattr(tiktoken.registry, 'ENCODINGS', {})
    with pytest.raises(ConfigError, match=r'cl100k_base.*TIKTOKEN_CACHE_DIR.*\.tiktoken'):
        get_encoding('cl100k_base')


def test_documents_with_one_name_are_all_read(tmp_path):
    (tmp_path / 'a.jsonl').write_text('{"text": "plain"}')
    (tmp_path / 'a.jsonl.gz').write_bytes(gzip.compress(b'{"text": "packed"}'))
    found, bad = tokenizer._read_texts([str(tmp_path)], 'text', ())
    assert sorted(found) == [(f'{tmp_path}/a.jsonl:1', text) for text in ('packed', 'plain')]
    assert not bad
