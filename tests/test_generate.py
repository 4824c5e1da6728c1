"""From a run's checkpoint to text: the command, and the parts of it."""

import json
import pathlib
import subprocess
import sys
import types

import jax
import numpy as np
import pytest
from common import cpu_model, initial_params, set_up, small_config
from common_commands import run_command

import decoding
import generate
from checkpoint import Checkpointer
from config import ConfigError
from generate import load
from parallel import make_mesh
from runtime import sampling
from runtime.sampling import Completion, allowed_tokens, make_sampler, run_encoding
from runtime.workdir import tokenizer_record
from tokenizer import get_encoding
from train_step import setup

ROOT = pathlib.Path(generate.__file__).parent
BYTES = get_encoding('bytes')
PROMPTS = ['def main(', 'x' * 20, 'é']


def config():
    c = small_config('mla', tied=False, moe=True)
    c.model.vocab_size, c.seq_len = 264, 48
    return c


def write_run(workdir: pathlib.Path, mesh: dict[str, int], c, steps: tuple[int, ...]) -> None:
    """Writes the files of a run that generation reads."""
    with Checkpointer(str(workdir / 'checkpoints')) as checkpoints:
        for step in steps:
            params = initial_params(cpu_model(c), make_mesh(mesh), step, c.pipeline.chunks)
            state = {'params': params, 'step': np.int32(step)}
            checkpoints.save(step, state, json.loads(c.to_json()))
    (workdir / 'tokenizer.json').write_text(tokenizer_record(BYTES))


@pytest.fixture(scope='module')
def workdir(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp('run')
    write_run(path, {'pp': 2, 'tp': 2}, config(), (3, 7))
    return path


def command(workdir: pathlib.Path, *more: str) -> subprocess.CompletedProcess:
    line = [sys.executable, 'generate.py', f'--workdir={workdir}', '--max_tokens=20', *more]
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True)


def test_command_says_the_same_on_one_and_on_four_devices(workdir, tmp_path):
    prompts = [f'--prompt={PROMPTS[0]}', f'--prompts_file={tmp_path}/more.jsonl']
    (tmp_path / 'more.jsonl').write_text('\n'.join(map(json.dumps, PROMPTS[1:])) + '\n')
    one = command(workdir, *prompts, '--json', '--seed=5')
    assert one.returncode == 0, one.stderr
    four = command(workdir, *prompts, '--json', '--seed=5', '--cpu_devices=4', '--tp=2', '--fsdp=2')
    assert four.returncode == 0, four.stderr
    assert four.stdout == one.stdout
    completions = [json.loads(line) for line in one.stdout.splitlines()]
    assert [c['prompt'] for c in completions] == PROMPTS
    for c in completions:
        assert set(c) == {'prompt', 'text', 'tokens', 'finish_reason'}
        assert c['text'] == bytes(c['tokens']).decode(errors='replace')
        assert c['finish_reason'] == 'stop' or len(c['tokens']) == 20
    assert 'tokens/s' in one.stderr
    printed = command(workdir, *prompts, '--seed=5')
    assert printed.stdout == '\n\n'.join(c['prompt'] + c['text'] for c in completions) + '\n'


def test_command_refuses_without_a_traceback(workdir, tmp_path):
    bad = command(tmp_path / 'nothing', '--prompt=a')
    assert bad.returncode != 0
    assert f'{tmp_path}/nothing/checkpoints holds no checkpoint' in bad.stderr
    assert 'Traceback' not in bad.stderr
    long = command(workdir, f'--prompt={"x" * 48}')
    assert 'prompt 0 has 48 tokens, and the context of 48 must hold it' in long.stderr
    assert 'Traceback' not in long.stderr


@pytest.mark.parametrize(
    ('name', 'content', 'prompts'),
    [
        ('a.jsonl', '"a\u2028b"\n"c\x85d"\n', ['a\u2028b', 'c\x85d']),
        ('a.jsonl', '\ufeff"a"\r\n\r\n"b"', ['a', 'b']),
        ('a.txt', 'f():\x0c pass\r\n \n\na\u2028b\x1cc\n', ['f():\x0c pass', 'a\u2028b\x1cc']),
        ('a.txt', '\ufeffa\n', ['a']),
    ],
)  # fmt: skip
def test_lines_of_a_prompts_file(tmp_path, monkeypatch, name, content, prompts):
    (tmp_path / name).write_bytes(content.encode())
    given = types.SimpleNamespace(prompt=['x'], prompts_file=str(tmp_path / name))
    monkeypatch.setattr(generate, 'FLAGS', given)
    assert generate.read_prompts() == ['x', *prompts]


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        (['--prompt='], '--prompt: a prompt is a text that is not empty'),
        ([], 'there is no prompt; give --prompt'),
        (['--prompts_file=a.jsonl'], 'a.jsonl, line 2: Expecting value'),
        (['--prompts_file=b.jsonl'], 'b.jsonl, line 1: a prompt is a text'),
        (['--prompts_file=c.txt'], '--prompts_file=c.txt cannot be read'),
        (['--prompts_file=d.txt'], '--prompts_file=d.txt cannot be read'),
        (['--prompt=a', '--stop='], "--stop='' is in every text"),
        (['--prompt=a', '--temperature=nan'], 'temperature=nan is out of range'),
        (['--prompt=a', '--workdir='], 'give --workdir=RUN'),
        (['--prompt=a', '--seed=-1'], 'flag --seed=-1'),
        (['--prompt=a', '--tp=3'], '--tp=3 does not divide'),
        (['--prompt=a', 'b'], 'b belongs to no flag'),
    ],
)
def test_what_is_refused(workdir, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'a.jsonl').write_text('"a"\nb\n')
    (tmp_path / 'b.jsonl').write_text('1\n')
    (tmp_path / 'd.txt').write_bytes(b'\xff\xfe')
    with pytest.raises(SystemExit) as caught:
        run_command(generate, f'--workdir={workdir}', *arguments)
    assert message in str(caught.value)


def test_the_tokenizer_of_a_run_is_read_once(workdir, monkeypatch, capsys):
    read = []

    def run_encoding(*arguments):
        read.append(arguments)
        return sampling.run_encoding(*arguments)

    monkeypatch.setattr(generate, 'run_encoding', run_encoding)
    monkeypatch.setattr(generate, 'stream', lambda *_, **__: iter([[[97]], [[-1]]]))
    run_command(generate, f'--workdir={workdir}', '--prompt=a', '--json')
    assert len(read) == 1
    assert json.loads(capsys.readouterr().out)['text'] == 'a'


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        ({'step': 4}, 'holds no committed step 4; use one of: 3, 7'),
        ({'averaged': True}, 'keeps no averaged weights: it was trained with optimizer.ema=0.0'),
        ({'tp': 3}, '--tp=3 does not divide .* use 1, 2, 4 or 8'),
        ({'tp': 4, 'fsdp': 4}, 'takes 16 devices and 8 are there'),
    ],
)
def test_what_cannot_be_loaded(workdir, options, message):
    with pytest.raises(ValueError, match=message):
        load(str(workdir), **options)


@pytest.mark.parametrize('chunks', [pytest.param(1, marks=pytest.mark.slow), 2])
def test_checkpoints_of_any_mesh_are_loaded_in_the_type_of_use(tmp_path, chunks):
    c = config()
    c.pipeline.chunks = chunks
    c.model.n_layers = 9
    write_run(tmp_path, {'pp': 2, 'fsdp': 2}, c, (2,))
    params, cfg, loaded, _ = load(str(tmp_path), tp=2, fsdp=2, dtype='bfloat16')
    assert loaded.seq_len == 48
    assert cfg.compute_dtype == 'bfloat16'
    want = initial_params(cpu_model(c), make_mesh({}), 2, chunks)
    for (path, x), y in zip(
        jax.tree_util.tree_leaves_with_path(params), jax.tree.leaves(want), strict=True
    ):
        name = path[-1].key
        exact = name.endswith('norm') or name in ('router', 'bias')
        assert x.dtype == (np.float32 if exact else jax.numpy.bfloat16), name
        assert np.array_equal(x, y.astype(x.dtype))
    if chunks > 1:
        assert len(decoding.generate(params, cfg, [[1, 2, 3]], 5, 48)[0]) == 5


def test_the_newest_step_is_taken(workdir):
    newest = load(str(workdir))[0]
    for step in (3, 7):
        params = load(str(workdir), step)[0]
        assert np.array_equal(params['head']['w_VD'], newest['head']['w_VD']) == (step == 7)


def test_averaged_weights_are_loaded(tmp_path):
    c = config()
    c.optimizer.ema = 0.9
    params, mean = (initial_params(cpu_model(c), make_mesh({}), seed) for seed in (0, 1))
    with Checkpointer(str(tmp_path / 'checkpoints')) as checkpoints:
        state = {'params': params, 'moments': {'ema': mean}, 'step': np.int32(1)}
        checkpoints.save(1, state, json.loads(c.to_json()))
    (tmp_path / 'tokenizer.json').write_text(tokenizer_record(BYTES))
    for averaged, want in ((False, params), (True, mean)):
        found = load(str(tmp_path), averaged=averaged)[0]
        jax.tree.map(np.testing.assert_array_equal, found, want)


def test_tokenizer_of_the_run(workdir, tmp_path):
    assert run_encoding(str(workdir)).name == 'bytes'
    with pytest.raises(ValueError, match='does not say which tokenizer'):
        run_encoding(str(tmp_path))
    other = 'vocab/stdlib-4096.tiktoken'
    assert run_encoding(str(tmp_path), other).n_vocab == 4096
    with pytest.raises(ValueError, match="another vocabulary than 'bytes' was"):
        run_encoding(str(workdir), other)
    with pytest.raises(ValueError, match='has 4096 tokens, and the model has 264'):
        allowed_tokens(get_encoding(other), 264)
    assert np.flatnonzero(~allowed_tokens(BYTES, 264)).tolist() == list(range(257, 264))


def test_end_of_text_in_a_prompt_is_the_token():
    assert sampling.encode(BYTES, '<|endoftext|>a') == [256, 97]


def text_of(*chunks: bytes, stops: tuple[str, ...] = ()) -> tuple[Completion, list[str]]:
    completion, taken = Completion('', BYTES, stops), []
    for chunk in chunks:
        completion.add(list(chunk))
        taken.append(completion.take())
    return completion, taken


def test_characters_come_whole():
    completion, taken = text_of('aé'.encode()[:2], 'aé'.encode()[2:], b'\xff', b'\xc3')
    assert taken == ['a', 'é', '\ufffd', '']
    completion.add([-1])
    assert (completion.take(), completion.text) == ('\ufffd', 'aé\ufffd\ufffd')
    assert completion.finish_reason == 'length'


def test_an_empty_stop_string_is_refused():
    with pytest.raises(ConfigError, match='is in every text'):
        Completion('', BYTES, ('a', ''))


def test_stop_strings_are_held_back_and_left_out():
    completion, taken = text_of(b'one\n', b'\ntwo\n', b'\nd', b'ef three', stops=('\n\ndef', '@'))
    assert taken == ['one', '\n\ntwo', '', '']
    assert (completion.text, completion.finish_reason) == ('one\n\ntwo', 'stop')
    assert bytes(completion.tokens) == b'one\n\ntwo\n\ndef'
    completion, _ = text_of(b'ab@cd', stops=('cd', '@'))
    assert completion.text == 'ab'
    completion, taken = text_of(b'one\n', stops=('\n\ndef',))
    completion.finish()
    assert [*taken, completion.take()] == ['one', '\n']


def test_a_bug_shows_its_traceback(monkeypatch):
    """Only errors of the user end as a message."""

    def fail(error: Exception) -> None:
        raise error

    monkeypatch.setattr(generate, 'FLAGS', types.SimpleNamespace(cpu_devices=0))
    monkeypatch.setattr(generate, 'run', lambda: fail(ValueError('a bug')))
    with pytest.raises(ValueError, match='a bug'):
        generate.main([])
    monkeypatch.setattr(generate, 'run', lambda: fail(ConfigError('use another prompt')))
    with pytest.raises(SystemExit, match='use another prompt'):
        generate.main([])


def test_end_of_text_ends_a_completion():
    completion = Completion('p', BYTES)
    completion.add([97, 256, 98])
    assert completion.record() == {
        'prompt': 'p',
        'text': 'a',
        'tokens': [97],
        'finish_reason': 'stop',
    }


@pytest.mark.slow
def test_samples_of_a_run_do_not_depend_on_its_mesh():
    c = small_config('gqa')
    c.model.vocab_size, c.log.prompts, c.log.sample_tokens = 264, ('a', 'bcd'), 6

    def samples(**mesh: int):
        params = initial_params(cpu_model(c), make_mesh(mesh))
        return make_sampler(setup(c, make_mesh(mesh)), BYTES)(params, 10)

    want = samples()
    assert [s['prompt'] for s in want] == ['a', 'bcd']
    assert all(s['text'] for s in want)
    assert samples(pp=2, fsdp=2, tp=2) == want
    c.log.prompts = ('x' * 16,)
    with pytest.raises(ValueError, match=r'the config cannot run: log\.prompts: prompt 0 has 16'):
        make_sampler(set_up(c), BYTES)
