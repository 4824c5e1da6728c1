"""Token shards are what was written, open elsewhere, and say so when they are damaged."""

import json
import pathlib
import random
import shutil

import numpy as np
import pytest
from common_data import contents, damage, prepared, rewrite_manifest, split_of_length, swap

from config import ConfigError
from corpus import shards
from corpus.inspection import inspect
from corpus.shards import Split


def test_arrays_open_with_zarr(tmp_path):
    zarr = pytest.importorskip('zarr')
    split_of_length(tmp_path, 2500)
    output = str(tmp_path / 'tokens')
    split = Split(output, 'train')
    manifest = json.loads(contents(output)['manifest.json'])
    arrays = [zarr.open(f'{output}/{s["path"]}') for s in manifest['splits']['train']['shards']]
    assert {array.dtype for array in arrays} == {np.dtype(np.uint16)}
    found = np.concatenate([array[:] for array in arrays])
    np.testing.assert_array_equal(found, split.read(0, split.n_tokens))


def test_array_of_several_objects_and_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, 'CHUNK_TOKENS', 16)
    monkeypatch.setattr(shards, 'OBJECT_TOKENS', 64)
    split = split_of_length(tmp_path, 2001)
    assert 'train/00000/c/1' in contents(tmp_path / 'tokens')
    ids = split.read(0, 2001)
    assert (ids[:699] == 33 + np.arange(699) * 7 % 90).all()


def test_damaged_shard_is_an_error(tmp_path):
    split_of_length(tmp_path, 500)
    path = tmp_path / 'tokens/train/00000/c/0'
    damaged = bytearray(path.read_bytes())
    damaged[100] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(OSError, match=r'train/00000.*Digest mismatch'):
        Split(str(tmp_path / 'tokens'), 'train').read(0, 500)


def test_lost_chunk_is_an_error(tmp_path):
    split_of_length(tmp_path, 500)
    (tmp_path / 'tokens/train/00000/c/0').unlink()
    with pytest.raises(ConfigError, match=r'train/00000/c/0 is missing'):
        Split(str(tmp_path / 'tokens'), 'train')


def test_chunks_of_the_fill_value_are_written(tmp_path):
    split = Split(prepared(tmp_path, {'a.txt': '\0' * (shards.CHUNK_TOKENS + 9)}), 'train')
    assert not split.read(0, split.n_tokens - 1).any()


def test_read_across_shards(tmp_path):
    split = split_of_length(tmp_path, 2500)
    everything = split.read(0, 2500)
    for start, stop in [(0, 1), (699, 701), (650, 2200), (2499, 2500), (5, 5), (2500, 2500)]:
        np.testing.assert_array_equal(split.read(start, stop), everything[start:stop])
    for start, stop in [(-1, 3), (0, 2501), (4, 3)]:
        with pytest.raises(ValueError, match='no range of the 2500 tokens'):
            split.read(start, stop)


def test_split_of_a_url(tmp_path):
    split = split_of_length(tmp_path, 900)
    url = Split(f'file://{tmp_path}/tokens', 'train')
    np.testing.assert_array_equal(url.read(0, 900), split.read(0, 900))


def test_split_errors(tmp_path):
    with pytest.raises(ConfigError, match=r'holds no manifest\.json.*python data\.py'):
        Split(str(tmp_path / 'nothing'), 'train')
    folder = prepared(tmp_path, {'a.txt': 'text'})
    with pytest.raises(ConfigError, match='no document in its validation split'):
        Split(folder, 'validation')
    with pytest.raises(ValueError, match="not 'test'"):
        Split(folder, 'test')
    rewrite_manifest(folder, lambda m: m['tokenizer'].update(fingerprint='0'))
    with pytest.raises(ConfigError, match='another vocabulary than bytes'):
        Split(folder, 'train').encoding()
    rewrite_manifest(folder, lambda m: m.update(version=99))
    with pytest.raises(ConfigError, match='format version 99'):
        Split(folder, 'train')
    (tmp_path / 'tokens/manifest.json').write_text('[')
    with pytest.raises(ConfigError, match='not a manifest'):
        Split(folder, 'train')


# ---------------------------------------------------------------------------------------------
# The manifest
# ---------------------------------------------------------------------------------------------


def edit_count(manifest: dict) -> None:
    manifest['splits']['train']['shards'][1]['documents'] += 1
    manifest['splits']['train']['documents'] += 1


def lose_digest(manifest: dict) -> None:
    del manifest['digest']


@pytest.mark.parametrize(
    'change',
    [
        edit_count,
        lose_digest,
        lambda m: m.update(digest=None),
        lambda m: m.update(version=1),
        lambda m: m['splits']['train']['shards'].reverse(),
        lambda m: m['tokenizer'].update(end_of_text=0),
    ],
)
def test_an_edited_manifest_is_refused(change, tmp_path):
    split_of_length(tmp_path, 2500)
    folder = str(tmp_path / 'tokens')
    rewrite_manifest(folder, change, signed=False)
    with pytest.raises(ConfigError, match=r'manifest\.json is damaged, or was edited'):
        Split(folder, 'train')
    with pytest.raises(ConfigError, match=r'manifest\.json is damaged, or was edited'):
        inspect(folder)


def to_version_1(manifest: dict) -> None:
    """Makes it what data.py wrote before manifests and shards had digests and checksums."""
    manifest['version'] = 1
    del manifest['digest']
    for split in manifest['splits'].values():
        for shard in split['shards']:
            for key in ('digest', *shards.CHECKSUMS):
                shard.pop(key, None)


def test_folders_without_digests_can_be_read_and_inspected(tmp_path):
    split = split_of_length(tmp_path, 900)
    folder = str(tmp_path / 'tokens')
    rewrite_manifest(folder, lambda m: (to_version_1(m), m.pop('input')), signed=False)
    assert inspect(folder) == []
    again = Split(folder, 'train')
    np.testing.assert_array_equal(again.read(0, 900), split.read(0, 900))
    assert len(again.digest) == 64
    assert again.digest != split.digest


@pytest.mark.parametrize('change', [
    lambda m: m['splits']['train']['shards'][0].update(tokens=699),
    lambda m: m['splits']['train'].update(tokens=2501),
    lambda m: m['splits']['train']['shards'][0].update(documents=True),
    lambda m: m['splits']['train']['shards'][0].update(path='../elsewhere'),
    lambda m: m['splits']['train']['shards'].append(m['splits']['train']['shards'][0]),
    lambda m: m['splits'].pop('validation'),
    lambda m: m.pop('tokenizer'),
    lambda m: m['tokenizer'].update(n_vocab=10**15),
    lambda m: m.update(dtype='float32'),
    lambda m: m.update(splits=7),
])  # fmt: skip
def test_an_old_manifest_has_counts_that_add_up(change, tmp_path):
    split_of_length(tmp_path, 2500)
    folder = str(tmp_path / 'tokens')
    rewrite_manifest(folder, lambda m: (to_version_1(m), change(m)), signed=False)
    with pytest.raises(ConfigError, match=r'manifest\.json is damaged'):
        Split(folder, 'train')


def test_counts_are_those_of_the_arrays(tmp_path):
    def move_a_token(manifest: dict) -> None:
        train = manifest['splits']['train']['shards']
        train[0]['tokens'] += 1
        train[1]['tokens'] -= 1

    split_of_length(tmp_path, 2500)
    folder = str(tmp_path / 'tokens')
    rewrite_manifest(folder, move_a_token)
    with pytest.raises(ConfigError, match=r'train/00000 holds uint16 \[700\], the manifest .*701'):
        Split(folder, 'train')


# ---------------------------------------------------------------------------------------------
# Exchanged shards
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize('what', ['', 'c/0', 'c'])
def test_shards_that_changed_places_are_refused(what, tmp_path):
    split_of_length(tmp_path, 2100)  # three of one length
    train = tmp_path / 'tokens/train'
    swap(train / '00000' / what, train / '00002' / what)
    with pytest.raises(ConfigError, match='train/00000 is not the shard that the manifest'):
        Split(str(tmp_path / 'tokens'), 'train')


def text_of(n: int, odd: int) -> str:
    """Returns n characters, of which one differs with `odd`."""
    return ''.join('?' if i == odd else chr(97 + i % 26) for i in range(n))


def test_a_shard_of_another_preparation_is_refused(tmp_path, monkeypatch):
    """Even if only its first chunk differs, which opening does not look at."""
    monkeypatch.setattr(shards, 'CHUNK_TOKENS', 64)
    monkeypatch.setattr(shards, 'OBJECT_TOKENS', 256)
    old, new = (
        Split(prepared(tmp_path / str(odd), {'a.txt': text_of(900, odd)}), 'train')
        for odd in (3, 4)
    )
    assert old.digest != new.digest
    shutil.copy(tmp_path / '3/tokens/train/00000/c/0', tmp_path / '4/tokens/train/00000/c/0')
    mixed = Split(str(tmp_path / '4/tokens'), 'train')
    with pytest.raises(OSError, match='train/00000 is not the shard that the manifest is about'):
        mixed.read(300, 310)
    assert len(inspect(str(tmp_path / '4/tokens'))) == 1


def test_whatever_is_damaged_the_tokens_are_right_or_refused(tmp_path):
    texts = {f'{i}.txt': text_of(400, i) for i in range(12)}
    whole = prepared(tmp_path, texts, share=0.3)
    right = {name: tokens_of(whole, name) for name in shards.SPLITS}
    rng, messages = random.Random(0), []
    for i in range(250):
        folder = f'{tmp_path}/copy-{i}'
        shutil.copytree(whole, folder)
        said = damage(pathlib.Path(folder), rng)
        for name in shards.SPLITS:
            try:
                found = tokens_of(folder, name)
            except (ConfigError, OSError) as error:
                messages.append(str(error))
            else:
                assert found == right[name], said
    assert len(messages) > 150
    assert all(f'{tmp_path}/copy-' in message for message in messages)


def tokens_of(folder: str, name: str) -> tuple:
    """Returns all that a split says and holds."""
    split = Split(folder, name)
    tokens = split.read(0, split.n_tokens).tobytes()
    return split.n_tokens, split.n_documents, split.n_bytes, split.end_of_text, split.digest, tokens


def test_only_some_shards_are_opened_at_once(tmp_path, monkeypatch):
    monkeypatch.setattr(shards, 'OPENED_AT_ONCE', 2)
    split_of_length(tmp_path, 2800)
    train = tmp_path / 'tokens/train'
    swap(train / '00001', train / '00002')
    split = Split(str(tmp_path / 'tokens'), 'train')
    split.read(0, 700)
    split.read(2100, 2800)
    for _ in range(2):
        with pytest.raises(OSError, match='train/00001 is not the shard that the manifest'):
            split.read(700, 701)


def test_a_home_folder(tmp_path, monkeypatch):
    split = split_of_length(tmp_path, 900)
    monkeypatch.setenv('HOME', str(tmp_path))
    assert Split('~/tokens', 'train').digest == split.digest


# ---------------------------------------------------------------------------------------------
# Inspection
# ---------------------------------------------------------------------------------------------


def test_inspect_prints_and_verifies(tmp_path, capsys):
    folder = prepared(tmp_path, {f'{i}.txt': f'document {i} of text' for i in range(30)}, share=0.3)
    assert inspect(folder, 2) == []
    out = capsys.readouterr().out
    splits = [Split(folder, name) for name in shards.SPLITS]
    for split in splits:
        assert f'{split.name}: {split.n_documents} documents, {split.n_tokens} tokens' in out
        assert out.count(f'--- {split.name} document') == 2
    assert "b'o'" in out
    assert 'document 0 of text\n' in out
    assert '"fingerprint": "' in out
    assert 'all shards are as the manifest says' in out


def test_inspect_reads_urls_and_arrays_of_several_objects(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shards, 'CHUNK_TOKENS', 16)
    monkeypatch.setattr(shards, 'OBJECT_TOKENS', 64)
    split_of_length(tmp_path, 2001)
    assert inspect(f'file://{tmp_path}/tokens') == []
    assert 'train: 3 documents, 2,001 tokens' in capsys.readouterr().out


@pytest.mark.parametrize('damage', ['flip', 'lose', 'swap', 'count'])
def test_inspect_names_damaged_shards(tmp_path, damage, capsys):
    split_of_length(tmp_path, 2500)
    tokens = tmp_path / 'tokens'
    path = tokens / 'train/00001/c/0'
    if damage == 'flip':
        content = bytearray(path.read_bytes())
        content[100] ^= 1
        path.write_bytes(content)
    elif damage == 'lose':
        path.unlink()
    elif damage == 'swap':  # its own checksums fit
        path.write_bytes((tokens / 'train/00002/c/0').read_bytes())
    else:
        rewrite_manifest(str(tokens), edit_count)
    (found,) = inspect(str(tokens))
    assert found.startswith(f'{tokens}/train/00001 is damaged: ')
    assert '1 damaged shards' in capsys.readouterr().out
