"""Preparation is exact, repeatable and resumable; what cannot be read is counted and named."""

import dataclasses
import gzip
import json
import os
import threading

import numpy as np
import pytest
import tiktoken
from common_data import (
    PART_BYTES,
    ROOT,
    SHIPPED,
    contents,
    prepared,
    some_texts,
    write_formats,
)
from servers import serve_s3

from config import ConfigError
from corpus import prepare as module
from corpus.files import find_files
from corpus.hashes import split_of
from corpus.prepare import Job, ahead, prepare, tail_start
from corpus.shards import SPLITS, ArrayWriter, Split
from tokenizer import fingerprint, get_encoding


def test_tokens_decode_to_the_documents(corpus):
    texts, output, _ = corpus
    enc = get_encoding(SHIPPED)
    for name in SPLITS:
        split = Split(output, name)
        ids = split.read(0, split.n_tokens)
        assert ids.dtype == np.int32
        assert ids[-1] == split.end_of_text == enc.eot_token
        ends = np.flatnonzero(ids == split.end_of_text)
        found = [enc.decode(piece[:-1]) for piece in np.split(ids, ends + 1)[:-1]]
        expected = [text for doc, text in texts.items() if split_of(doc, 0.25) == name]
        assert sorted(found) == sorted(expected)
        assert len(expected) > 10


def test_manifest_totals(corpus):
    texts, output, _ = corpus
    manifest = json.loads(contents(output)['manifest.json'])
    assert manifest['version'] == 2
    assert manifest['tokenizer'] == {
        'name': SHIPPED,
        'fingerprint': fingerprint(get_encoding(SHIPPED)),
        'n_vocab': 4096,
        'end_of_text': 4095,
    }
    for name in SPLITS:
        record, split = manifest['splits'][name], Split(output, name)
        assert len(record['shards']) > 3
        for key in ('tokens', 'documents', 'bytes'):
            assert record[key] == sum(shard[key] for shard in record['shards'])
            assert record[key] == getattr(split, f'n_{key}')
        mine = [text for doc, text in texts.items() if split_of(doc, 0.25) == name]
        assert split.n_documents == len(mine)
        assert split.n_bytes == sum(len(text.encode()) for text in mine)
        assert split.encoding().n_vocab == 4096
        assert split.tokenizer == SHIPPED


def test_tokens_do_not_depend_on_the_cut_into_parts(corpus, tmp_path):
    _, output, files = corpus
    prepare(files, Job(str(tmp_path / 'out'), SHIPPED, 0.25))
    for name in SPLITS:
        one, many = Split(str(tmp_path / 'out'), name), Split(output, name)
        np.testing.assert_array_equal(one.read(0, one.n_tokens), many.read(0, many.n_tokens))


def test_rerun_over_the_leftovers_of_a_killed_run(corpus, tmp_path):
    _, output, files = corpus
    job = Job(str(tmp_path / 'out'), SHIPPED, 0.25)
    prepare(files[:9], job, part_bytes=PART_BYTES)
    (tmp_path / 'out/manifest.json').unlink()
    prepare(files, job, part_bytes=PART_BYTES)
    assert contents(tmp_path / 'out') == contents(output)


def test_validation_share_and_independence():
    names = [f'{i}.txt' for i in range(4000)]
    chosen = {name for name in names if split_of(name, 0.1) == 'validation'}
    assert 320 < len(chosen) < 480
    assert not any(split_of(name, 0.0) == 'validation' for name in names)
    larger = {name for name in names if split_of(name, 0.2) == 'validation'}
    assert chosen < larger
    # Fixed for ever: other values would mix validation text of old data into new training data.
    assert sorted(chosen, key=names.index)[:4] == ['14.txt', '48.txt', '68.txt', '71.txt']


def test_assignment_does_not_depend_on_other_documents_or_the_place(tmp_path):
    texts = {f'{i}.txt': f'text {i}' for i in range(60)}
    enc = get_encoding('bytes')
    kept = {}
    for label, names in {'all': list(texts), 'some': list(texts)[::-3]}.items():
        folder = prepared(tmp_path / label, {n: texts[n] for n in names}, share=0.3)
        split = Split(folder, 'validation')
        decoded = enc.decode(split.read(0, split.n_tokens))
        kept[label] = set(decoded.split('<|endoftext|>')[:-1])
    some = {texts[n] for n in list(texts)[::-3]}
    assert kept['some'] == kept['all'] & some
    assert 0 < len(kept['some']) < len(some)


def test_uint16_up_to_65536_ids_and_uint32_above(tmp_path):
    ranks = (tmp_path / 'big.tiktoken').with_suffix('.json')
    source = os.path.join(ROOT, SHIPPED)
    with open(source, 'rb') as f:
        (tmp_path / 'big.tiktoken').write_bytes(f.read())
    for end, dtype in [(65535, 'uint16'), (65536, 'uint32')]:
        ranks.write_text(
            json.dumps({'pattern': r'[\s\S]+', 'special_tokens': {'<|endoftext|>': end}})
        )
        folder = prepared(
            tmp_path / dtype, {'a.txt': 'abc', 'b.txt': 'd'}, str(tmp_path / 'big.tiktoken')
        )
        manifest = json.loads(contents(folder)['manifest.json'])
        assert manifest['dtype'] == dtype
        array = json.loads(contents(folder)['train/00000/zarr.json'])
        assert array['data_type'] == dtype
        split = Split(folder, 'train')
        assert (split.read(0, split.n_tokens) == end).sum() == 2


def test_text_that_the_tokenizer_refuses_is_named(tmp_path):
    lines = '{"text": "x"}\n' + json.dumps({'text': ' ' * 1_000_000 + 'x'})
    (tmp_path / 'a.jsonl').write_text(lines)
    with pytest.raises(ConfigError, match=r'/a\.jsonl, document a\.jsonl:2: the tokenizer cannot'):
        prepare(find_files([f'{tmp_path}/*.jsonl']), Job(str(tmp_path / 'out'), SHIPPED))


@pytest.mark.parametrize(
    ('name', 'content', 'message'),
    [
        ('a.txt', b'ab\xff', r'a\.txt: .*utf-8'),
        ('a.jsonl', b'{"text": "x"}\n\n{"text": ', r'a\.jsonl, line 3: Expecting value'),
        ('a.jsonl', b'{"text": "x"}\n{"text": "\xff"}', r'a\.jsonl, line 2: .*utf-8'),
        (
            'a.jsonl',
            b'{"content": "x"}',
            r"a\.jsonl, line 1: no text in a field 'text' \(--text_field\)",
        ),
        ('a.jsonl', b'{"text": 3}', r'a\.jsonl, line 1: no text'),
        ('a.jsonl', b'["text"]', r'a\.jsonl, line 1: no text'),
        ('a.jsonl', b'{"text": "\\ud800"}', r'a\.jsonl, line 1: .*surrogates'),
        ('a.jsonl.gz', b'not gzip', r'a\.jsonl\.gz is broken \(Not a gzipped'),
        (
            'a.jsonl.gz',
            gzip.compress(b'{"text": "x"}\n' * 9, mtime=0)[:-4],
            r'a\.jsonl\.gz is broken after',
        ),
    ],
)
def test_bad_records_are_named(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        prepare(find_files([f'{tmp_path}/*.*']), Job(str(tmp_path / 'out'), 'bytes'))
    assert not (tmp_path / 'out/manifest.json').exists()


def test_bad_records_are_named_by_other_processes(tmp_path):
    for name in 'abcd':
        (tmp_path / f'{name}.txt').write_bytes(b'\xff' if name == 'c' else b'good')
    files = find_files([f'{tmp_path}/*.txt'])
    job = Job(str(tmp_path / 'out'), 'bytes', max_bad_share=0.0)
    with pytest.raises(ConfigError, match=r'c\.txt: .*utf-8'):
        prepare(files, job, workers=2, part_bytes=1)
    assert not (tmp_path / 'out/manifest.json').exists()


def test_errors_of_the_input_and_the_output(tmp_path):
    with pytest.raises(ConfigError, match=r'no file matches --input=.*\*\.txt'):
        find_files([f'{tmp_path}/*.txt'])
    (tmp_path / 'a.txt').write_bytes(b'')
    files = find_files([f'{tmp_path}/a.txt'])
    with pytest.raises(ConfigError, match='no text in 1 input files'):
        prepare(files, Job(str(tmp_path / 'out'), 'bytes'))
    (tmp_path / 'a.txt').write_bytes(b'text')
    prepare(files, Job(str(tmp_path / 'out'), 'bytes'))
    with pytest.raises(ConfigError, match='prepared already, with another value of valid'):
        prepare(files, Job(str(tmp_path / 'out'), 'bytes', 0.5))
    with pytest.raises(ConfigError, match=r'validation_share lies in \[0, 1\), but is 1'):
        prepare(files, Job(str(tmp_path / 'new'), 'bytes', 1.0))
    with pytest.raises(ConfigError, match='workers'):
        prepare(files, Job(str(tmp_path / 'new'), 'bytes'), workers=0)


def test_stores_that_cannot_be_used_are_named(tmp_path):
    (tmp_path / 'a.txt').write_text('text')
    files = find_files([f'{tmp_path}/a.txt'])
    with pytest.raises(ConfigError, match='nosuch://bucket cannot be opened'):
        prepare(files, Job('nosuch://bucket', 'bytes'))
    for output in (f'{tmp_path}/a.txt', f'{tmp_path}/a.txt/below'):
        with pytest.raises(ConfigError, match=r'--output=.*/a\.txt.* cannot be written \('):
            prepare(files, Job(output, 'bytes'))


def test_names_are_relative_to_the_fixed_part_of_the_glob(tmp_path, monkeypatch):
    (tmp_path / 'x/y').mkdir(parents=True)
    (tmp_path / 'x/y/b.txt').write_text('b')
    (tmp_path / 'x/a.md').write_text('a')
    monkeypatch.chdir(tmp_path)
    for pattern in (f'{tmp_path}/x/**/*', 'x/**/*', './x/**/*.*'):
        assert [file.name for file in find_files([pattern])] == ['a.md', 'y/b.txt']
    assert [file.name for file in find_files(['x/a.md', 'x/*', 'x/y/b.txt'])] == ['a.md', 'b.txt']


# Formats, counts and finished jobs


def test_formats_give_the_same_tokens(tmp_path):
    texts = some_texts(100)
    (tmp_path / 'in').mkdir()
    write_formats(tmp_path / 'in', texts)
    found = {}
    for file in find_files([f'{tmp_path}/in/*']):
        job = Job(str(tmp_path / 'out' / file.name), SHIPPED, 0.0)
        prepare([file], job, part_bytes=4000)
        split = Split(job.output, 'train')
        found[file.name] = split.read(0, split.n_tokens).tolist()
    assert len(found) == 6
    enc = get_encoding(SHIPPED)
    expected = [i for text in texts if text for i in [*enc.encode_ordinary(text), enc.eot_token]]
    assert all(ids == expected for ids in found.values())


def test_packing_a_file_moves_no_document(tmp_path):
    lines = b''.join(b'{"text": "%d"}\n' % i for i in range(300))
    for name, content in {'a.jsonl': lines, 'a.jsonl.gz': gzip.compress(lines)}.items():
        folder = tmp_path / name.replace('.', '-')
        folder.mkdir()
        (folder / name).write_bytes(content)
        prepare(find_files([f'{folder}/*']), Job(f'{folder}/out', 'bytes', 0.3), part_bytes=999)
    for name in SPLITS:
        plain, packed = (Split(f'{tmp_path}/{f}/out', name) for f in ('a-jsonl', 'a-jsonl-gz'))
        assert plain.n_documents > 50
        np.testing.assert_array_equal(
            plain.read(0, plain.n_tokens), packed.read(0, packed.n_tokens)
        )


def test_empty_and_bad_records_are_counted_and_named(tmp_path):
    lines = [json.dumps({'text': f'text {i}'}) for i in range(100)]
    lines[10], lines[20], lines[30], lines[40] = '{"text": ""}', '{"text"', '[]', ' '
    (tmp_path / 'a.jsonl').write_text('\n'.join(lines))
    (tmp_path / 'b.txt').write_bytes(b'\xff')
    (tmp_path / 'c.txt').write_bytes(b'')
    whole = gzip.compress(b'{"text": "x"}\n' * 5)
    (tmp_path / 'd.jsonl.gz').write_bytes(whole[:-4])
    files = find_files([f'{tmp_path}/*'])
    job = Job(str(tmp_path / 'out'), SHIPPED, 0.0, max_bad_share=0.5)
    manifest = prepare(files, job, part_bytes=200)
    read, train = manifest['input'], manifest['splits']['train']
    places = [(r['file'], r['place']) for r in read['reports']]
    assert places[:3] == [('a.jsonl', 'line 21'), ('a.jsonl', 'line 31'), ('b.txt', '')]
    assert places[3][0] == 'd.jsonl.gz'
    assert (read['bad'], read['empty'], read['lost_bytes']) == (4, 2, 1)
    assert train['documents'] == read['records'] - 6 == 96 + int(places[3][1].split()[1])
    # The share decides at the end, too.
    job = Job(str(tmp_path / 'new'), SHIPPED, 0.0, max_bad_share=0.03)
    with pytest.raises(ConfigError, match=r'4 of 10\d records are bad.*max_bad_share=0.03') as bad:
        prepare(files, job)
    for text in ('a.jsonl, line 21: ', 'a.jsonl, line 31: ', 'b.txt: ', 'd.jsonl.gz is broken'):
        assert f'{tmp_path}/{text}' in str(bad.value)


def test_bad_share_stops_early_only_where_the_rest_cannot_help(tmp_path):
    for i in range(40):
        (tmp_path / f'{i:02}.txt').write_bytes(b'\xff' if i < 4 else b'x')
    files = find_files([f'{tmp_path}/*.txt'])
    prepare(files, Job(str(tmp_path / 'out'), 'bytes', 0.0, max_bad_share=0.1), part_bytes=1)
    with pytest.raises(ConfigError, match='4 of 4 records are bad'):
        prepare(files, Job(str(tmp_path / 'new'), 'bytes', 0.0, max_bad_share=0.09), part_bytes=1)


def test_one_file_that_is_no_text_is_left_out(tmp_path):
    for name in 'abc':
        (tmp_path / f'{name}.txt').write_bytes(b'\xff' if name == 'a' else b'good')
    files = find_files([f'{tmp_path}/*.txt'])
    read = prepare(files, Job(str(tmp_path / 'out'), 'bytes'))['input']
    assert (read['records'], read['bad']) == (3, 1)
    assert read['reports'][0]['file'] == 'a.txt'
    (tmp_path / 'b.txt').write_bytes(b'\xff')
    with pytest.raises(ConfigError, match=r'2 of 3 records are bad.*by --max_bad_share=0\.667\n'):
        prepare(files, Job(str(tmp_path / 'two'), 'bytes'))
    with pytest.raises(ConfigError, match=r'no text in 1 input files: .*\n.*a\.txt: .*utf'):
        prepare(files[:1], Job(str(tmp_path / 'alone'), 'bytes'))
    (tmp_path / 'a.txt').write_bytes(b'\xff' * 1000)  # most of the input
    (tmp_path / 'b.txt').write_bytes(b'good')
    for part_bytes in (1, PART_BYTES):
        with pytest.raises(ConfigError, match=r'1 of \d records are bad'):
            prepare(
                find_files([f'{tmp_path}/*.txt']),
                Job(str(tmp_path / 'large'), 'bytes'),
                part_bytes=part_bytes,
            )


def test_text_that_the_tokenizer_drops_is_named(tmp_path, monkeypatch):
    ranks = {bytes([i]): i for i in range(256)}
    dropping = tiktoken.Encoding(
        'own', pat_str=r'\w+| ', mergeable_ranks=ranks, special_tokens={'<|endoftext|>': 256}
    )
    monkeypatch.setattr('corpus.prepare.get_encoding', lambda _: dropping)
    (tmp_path / 'a.jsonl').write_text('{"text": "a b"}\n{"text": "a, b"}\n')
    job = Job(str(tmp_path / 'out'), 'own', 0.0)
    with pytest.raises(ConfigError, match=r'document a\.jsonl:2: the tokenizer keeps 3 of its 4'):
        prepare(find_files([f'{tmp_path}/a.jsonl']), job)
    job = dataclasses.replace(job, max_bad_share=0.5)
    manifest = prepare(find_files([f'{tmp_path}/a.jsonl']), job)
    assert (manifest['input']['bad'], manifest['splits']['train']['documents']) == (1, 1)


# What is held out of few documents


def texts_of(folder: str, name: str) -> list[str]:
    split = Split(folder, name)
    decoded = split.encoding().decode(split.read(0, split.n_tokens).tolist())
    return decoded.split('<|endoftext|>')[:-1]


def test_of_few_documents_one_is_held_out(tmp_path):
    texts = {f'{i}.txt': f'document {i}' for i in range(17)}
    assert not any(split_of(name, 0.01) == 'validation' for name in texts)
    (tmp_path / 'few').mkdir()
    folder = prepared(tmp_path / 'few', texts, share=0.01)
    (held,) = texts_of(folder, 'validation')
    # The first to go there at a larger share.
    share = next(i / 100 for i in range(100) if any(split_of(n, i / 100) != 'train' for n in texts))
    assert [text for name, text in texts.items() if split_of(name, share) != 'train'] == [held]
    assert sorted([held, *texts_of(folder, 'train')]) == sorted(texts.values())
    assert Split(folder, 'train').n_documents == 16
    none = prepared(tmp_path / 'none', texts, share=0.0)
    assert sorted(texts_of(none, 'train')) == sorted(texts.values())
    # Nor is all of it held out.
    all_of_it = prepared(tmp_path / 'all', {'1.txt': 'one', '2.txt': 'two'}, share=0.999)
    assert len(texts_of(all_of_it, 'train')) == len(texts_of(all_of_it, 'validation')) == 1


def test_the_document_that_holds_most_of_the_text_is_not_held_out(tmp_path):
    for i, (a, b) in enumerate([(9, 900), (900, 9)]):
        texts = {'a.txt': 'a' * a, 'b.txt': 'b' * b}
        folder = prepared(tmp_path / str(i), texts, share=1e-9)
        assert [len(text) for text in texts_of(folder, 'validation')] == [9]


@pytest.mark.parametrize('name', ['a.txt', 'a.jsonl'])
@pytest.mark.parametrize('share', [0.01, 0.4, 0.999])
def test_of_one_document_the_end_is_held_out(tmp_path, name, share):
    text = ''.join(f'line {i} of the only one\n' for i in range(5000))
    content = text if name == 'a.txt' else json.dumps({'text': text}) + '\n'
    (tmp_path / name).write_text(content)
    files = find_files([f'{tmp_path}/{name}'])
    manifest = prepare(files, Job(str(tmp_path / 'out'), 'bytes', share))
    (start,), (end,) = (texts_of(str(tmp_path / 'out'), split) for split in SPLITS)
    assert start + end == text
    assert start.endswith('\n')
    assert share * len(text) * 0.99 < len(end) < max(share * len(text) * 1.01, 4200)
    assert manifest['splits']['validation']['bytes'] == len(end)
    assert manifest['input']['records'] == 1
    assert manifest['moved']['tail'] is True


def test_where_the_end_of_a_text_starts():
    for text, cut in [
        ('', 0), ('a', 1), ('ab', 1), ('a' * 1000, 900), ('a b' * 90, 242),
        ('x ' * 450 + '\n\n' + 'y ' * 50, 902), ('x\n' * 6000, 10800),
        ('x\n' * 60000, 120000 - 4096),
    ]:  # fmt: skip
        assert tail_start(text, 0.01) == cut, text[:30]


@pytest.mark.parametrize('workers', [1, 2])
def test_what_is_held_out_does_not_depend_on_parts_workers_or_leftovers(tmp_path, workers):
    for i in range(9):
        (tmp_path / f'{i}.txt').write_text(f'document {i}')
    files = find_files([f'{tmp_path}/*.txt'])
    whole = prepare(files, Job(str(tmp_path / 'one'), 'bytes'))
    job = Job(str(tmp_path / 'many'), 'bytes')
    prepare(files, job, workers, part_bytes=50)
    assert texts_of(job.output, 'validation') == texts_of(str(tmp_path / 'one'), 'validation')
    before = contents(job.output)
    # Without its manifest all is done again, but for parts that a killed job committed.
    (tmp_path / 'many/manifest.json').unlink()
    prepare(files, job, part_bytes=50)
    assert contents(job.output) == before
    assert whole['moved']['to'] == 'validation'


def test_of_documents_with_one_id_only_one_is_held_out(tmp_path, monkeypatch):
    for name, text in {'a': 'one', 'b': 'two', 'c': 'six'}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / 'r.md').write_text(text)
    (tmp_path / 'a.jsonl').write_text('{"text": "plain"}')
    (tmp_path / 'a.jsonl.gz').write_bytes(gzip.compress(b'{"text": "packed"}'))
    for i, pattern in enumerate(['*/r.md', 'a.jsonl*']):
        paths = sorted(str(path) for path in tmp_path.glob(pattern))
        job = Job(f'{tmp_path}/out{i}', 'bytes')
        prepare(find_files(paths), job)
        held_out, kept = texts_of(job.output, 'validation'), texts_of(job.output, 'train')
        assert (len(held_out), len(kept)) == (1, len(paths) - 1)
    monkeypatch.setattr(module, '_moved', lambda *_: [])
    with pytest.raises(ConfigError, match='no document of 2 is left for validation'):
        prepare(find_files([f'{tmp_path}/?/r.md']), Job(f'{tmp_path}/none', 'bytes'))


def test_interrupted_while_a_document_is_moved(tmp_path, monkeypatch):
    for i in range(5):
        (tmp_path / f'{i}.txt').write_text(f'document {i}')
    files, job = find_files([f'{tmp_path}/*.txt']), Job(str(tmp_path / 'out'), 'bytes')
    prepare(files, Job(str(tmp_path / 'new'), 'bytes'), part_bytes=1)
    calls = []

    def stop(*args):
        calls.append(args)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return finish(*args)

    finish = ArrayWriter.finish  # of five parts, then of the one that is written again
    monkeypatch.setattr(ArrayWriter, 'finish', stop)
    with pytest.raises(KeyboardInterrupt):
        prepare(files, job, part_bytes=1)
    assert len(list((tmp_path / 'out/parts').iterdir())) == 4
    monkeypatch.undo()
    prepare(files, job, part_bytes=1)
    assert contents(tmp_path / 'out') == contents(tmp_path / 'new')


def interrupt(*_):
    raise KeyboardInterrupt


def prepare_without_manifest(monkeypatch, files: list, job: Job, **options) -> None:
    """Prepares, and is interrupted once all parts are there."""
    with monkeypatch.context() as patches:
        patches.setattr(module, 'write_manifest', interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(files, job, **options)


def test_parts_of_an_earlier_version_serve(tmp_path, monkeypatch):
    for i in range(5):
        (tmp_path / f'{i}.txt').write_text(f'document {i}')
    files, job = find_files([f'{tmp_path}/*.txt']), Job(str(tmp_path / 'out'), 'bytes')
    prepare(files, Job(str(tmp_path / 'new'), 'bytes'), part_bytes=1)

    monkeypatch.setattr(module, '_fill_empty_split', lambda *_: None)
    prepare_without_manifest(monkeypatch, files, job, part_bytes=1)
    for path in (tmp_path / 'out/parts').iterdir():
        result = json.loads(path.read_text())
        del result['first']
        path.write_text(json.dumps(result))
    monkeypatch.undo()
    prepare(files, job, part_bytes=1)
    assert contents(tmp_path / 'out') == contents(tmp_path / 'new')


@pytest.mark.parametrize('kept', [0, 20])
def test_a_damaged_part_file_is_written_again(tmp_path, monkeypatch, kept):
    for i in range(3):
        (tmp_path / f'{i}.txt').write_text(f'document {i}')
    files, job = find_files([f'{tmp_path}/*.txt']), Job(str(tmp_path / 'out'), 'bytes')
    prepare(files, Job(str(tmp_path / 'new'), 'bytes'), part_bytes=1)

    prepare_without_manifest(monkeypatch, files, job, part_bytes=1)
    part = tmp_path / 'out/parts/00000.json'
    part.write_bytes(part.read_bytes()[:kept])
    prepare(files, job, part_bytes=1)
    assert contents(tmp_path / 'out') == contents(tmp_path / 'new')


def test_a_part_that_is_written_over_is_not_committed(tmp_path, monkeypatch):
    for i in range(3):
        (tmp_path / f'{i}.txt').write_text(f'document {i}')
    files, job = find_files([f'{tmp_path}/*.txt']), Job(str(tmp_path / 'out'), 'bytes')

    prepare_without_manifest(monkeypatch, files, job)
    monkeypatch.setattr(module, '_encoded', interrupt)
    with pytest.raises(KeyboardInterrupt):
        prepare(files, dataclasses.replace(job, validation_share=0.5))
    assert not list((tmp_path / 'out/parts').iterdir())


def test_a_lost_file_counts_by_its_bytes(tmp_path):
    (tmp_path / 'a.jsonl').write_text('{"text": "x"}\n' * 5000)
    (tmp_path / 'b.jsonl.gz').write_bytes(b'\x1f\x8b' + bytes(20_000))
    files = find_files([f'{tmp_path}/*.*'])
    with pytest.raises(ConfigError, match=r'1 of 5,001 records are bad, and 20,002 bytes'):
        prepare(files, Job(str(tmp_path / 'out'), 'bytes', max_bad_share=0.01))


def test_finished_job_is_no_work(corpus, capsys):
    _, output, files = corpus
    before = {path: os.stat(f'{output}/{path}').st_mtime_ns for path in contents(output)}
    manifest = prepare(files, Job(output, SHIPPED, 0.25), part_bytes=PART_BYTES)
    assert 'is prepared already, from files of the same names and sizes: nothing to do' in (
        capsys.readouterr().out
    )
    assert manifest == json.loads(contents(output)['manifest.json'])
    assert {path: os.stat(f'{output}/{path}').st_mtime_ns for path in contents(output)} == before
    for job, given, what in [
        (Job(output, SHIPPED, 0.25), files[1:], r'the input \(files\)'),
        (Job(output, SHIPPED, 0.25, 'body'), files, r'the input \(text_field\)'),
        (Job(output, 'bytes', 0.25), files, 'the vocabulary'),
    ]:
        with pytest.raises(ConfigError, match=f'prepared already, with another value of .*{what}'):
            prepare(given, job, part_bytes=PART_BYTES)


def test_cleaning_up_removes_nothing_of_others(tmp_path):
    out = tmp_path / 'out'
    kept = ['train/photo.jpg', 'train/00009/c/x', 'parts/notes.json', 'train/7/zarr.json', 'a']
    for name in [
        *kept,
        'train/00007/zarr.json',
        'train/00007.lengths',
        'validation/00003/c/0',
        'parts/00004.json',
    ]:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text('{"key": "another"}')
    (tmp_path / 'a.txt').write_text('text')
    prepare(find_files([f'{tmp_path}/a.txt']), Job(str(out), 'bytes', 0.0))
    left = {'manifest.json', 'train/00000/zarr.json', 'train/00000/c/0', 'train/00000.lengths'}
    assert set(contents(out)) == {*kept, *left}


def test_remote_input_gives_the_same_bytes(corpus, tmp_path):
    _, output, files = corpus
    fsspec = pytest.importorskip('fsspec')
    system = fsspec.filesystem('memory')
    for file in files:
        with open(file.path, 'rb') as f:
            system.pipe(f'/corpus/{file.name}', f.read())
    remote = [dataclasses.replace(file, path=f'memory://corpus/{file.name}') for file in files]
    prepare(remote, Job(str(tmp_path / 'out'), SHIPPED, 0.25), part_bytes=PART_BYTES)
    assert contents(tmp_path / 'out') == contents(output)


def test_reading_ahead_keeps_the_order_and_raises():
    assert list(ahead(iter(range(1000)), 7)) == list(range(1000))
    assert list(ahead(iter(()))) == []

    def items():
        yield from range(20)
        raise OSError('gone')

    stream = ahead(items(), 8)
    assert [next(stream) for _ in range(16)] == list(range(16))
    with pytest.raises(OSError, match='gone'):
        next(stream)
    assert not [t for t in threading.enumerate() if t.name.startswith('ahead')]


def test_output_in_an_s3_bucket_is_read_as_from_a_folder(corpus, monkeypatch):
    _, output, files = corpus
    with serve_s3() as environment:
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        prepare(files, Job('s3://bucket/tokens', SHIPPED, 0.25), part_bytes=3 * PART_BYTES)
        remote, local = Split('s3://bucket/tokens', 'train'), Split(str(output), 'train')
        np.testing.assert_array_equal(
            remote.read(0, remote.n_tokens), local.read(0, local.n_tokens)
        )
