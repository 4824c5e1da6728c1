"""Task files, prompts, the rules of scoring, and what commands do with them."""

import json
import math
import pathlib
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable

import numpy as np
import pytest
from common_runs import share_programs
from training_worker import small_run

import evaluate
import train
from config import ConfigError
from runtime import sampling
from runtime.plot import Run, plot
from runtime.scoring import Request, Score
from runtime.task_files import Task, open_tasks, read_task
from runtime.tasks import (
    encode_pair,
    fitted,
    judge,
    make_tasks,
    normalized,
    pairs_of,
    results_of,
)
from tokenizer import get_encoding

ROOT = pathlib.Path(evaluate.__file__).parent
SHIPPED = ROOT / 'tasks' / 'python.jsonl'


def written(path: pathlib.Path, *records: dict | str) -> str:
    lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
    path.write_text('\n'.join(lines) + '\n')
    return str(path)


def task_of(tmp_path: pathlib.Path, *records: dict, shots: int | None = None) -> Task:
    return read_task(written(tmp_path / 'x.jsonl', *records), shots)


CHOICE = {'query': 'Q:', 'choices': ['four', 'no'], 'gold': 0}
SCHEMA = {'context_options': ['The cup', 'The ball'], 'continuation': 'rolls', 'gold': 1}
CLOZE = {'context': 'one two', 'continuation': 'three'}
EXACT = {'prompt': 'Q: 1 + 1', 'answers': ['2', 'two']}

# ---------------------------------------------------------------------------------------------
# Prompts
# ---------------------------------------------------------------------------------------------


def test_prompts_are_these_texts(tmp_path):
    shots = [{'query': 'A:', 'choices': ['x', 'y'], 'gold': 1},
             {'context': 'B:', 'choices': ['z', 'w'], 'gold': 0}]  # fmt: skip
    header = {'task': 't', 'description': 'Answer.\n', 'shots': shots, 'prior': 'Answer:'}
    task = task_of(tmp_path, header, CHOICE)
    before = 'Answer.\nA: y\n\nB: z\n\nQ:'
    assert pairs_of(task, task.items[0]) == [
        (before, ' four'), (before, ' no'), ('Answer:', ' four'), ('Answer:', ' no')
    ]  # fmt: skip
    one = task_of(tmp_path, header, CHOICE, shots=1)
    assert pairs_of(one, one.items[0])[0] == ('Answer.\nA: y\n\nQ:', ' four')
    none = task_of(tmp_path, header, CHOICE, shots=0)
    assert pairs_of(none, none.items[0])[1] == ('Answer.\nQ:', ' no')
    close = {'delimiter': '', 'separator': '|', 'shots': [SCHEMA | {'continuation': 'falls'}]}
    task = task_of(tmp_path, close, SCHEMA)
    assert pairs_of(task, task.items[0]) == [
        ('The ballfalls|The cup', 'rolls'), ('The ballfalls|The ball', 'rolls')
    ]  # fmt: skip
    task = task_of(tmp_path, {'shots': [EXACT | {'prompt': 'Q: 0 + 2'}]}, EXACT)
    assert task.prompt(task.items[0].context) == 'Q: 0 + 2 2\n\nQ: 1 + 1'
    assert task_of(tmp_path, CLOZE).name == 'x'


def test_files_of_other_projects_are_read_as_they_are(tmp_path):
    """The fields of LLM Foundry's and DCLM's files, with fields of their own beside."""
    answered = {'context': 'c', 'answer': 'x', 'aliases': ['x', 'X'], 'category': 'k'}
    a = read_task(written(tmp_path / 'a.jsonl', answered))
    assert (a.kind, a.items[0].continuations) == ('exact', ('x', 'x', 'X'))
    b = read_task(written(tmp_path / 'b.jsonl', {**SCHEMA, 'id': 3}, '', SCHEMA))
    assert (b.kind, [item.line for item in b.items]) == ('schema', [1, 3])


@pytest.mark.parametrize(
    ('records', 'message'),
    [
        (['{"query": "a"'], r'line 1: Expecting .* write a JSON object'),
        (['[1]'], r'line 1 is no JSON object: \[1\]'),
        ([], 'holds no item'),
        ([{'task': 'a'}], 'holds no item'),
        ([{'chioces': []}], r"line 1 has the unknown field 'chioces' \(did you mean choices"),
        ([CHOICE, {'task': 'late'}], 'line 2 has none of choices'),
        ([CHOICE | {'continuation': 'x'}], 'line 1 has both of'),
        ([CHOICE | {'gold': 2}], "line 1: 'gold' is 2, the number of the right one of 2"),
        ([CHOICE | {'gold': True}], "'gold' is True"),
        ([{k: v for k, v in CHOICE.items() if k != 'gold'}], "'gold' is None"),
        ([CHOICE | {'choices': ['a']}], "'choices' is .*; use a list of 2 texts or more"),
        ([CHOICE | {'choices': ['a', '']}], "'choices' holds an empty text"),
        ([CHOICE | {'choices': ['a', 3]}], "an entry of 'choices' is 3; use a text"),
        ([CHOICE | {'context': 'two'}], 'line 1 has 2 of the fields query, context, prompt'),
        ([{'choices': ['a', 'b'], 'gold': 0}], 'line 1 has 0 of the fields'),
        ([CHOICE | {'query': 7}], "'query' is 7; use a text"),
        ([{'context_options': ['a', 'b'], 'gold': 0}], "no 'continuation'"),
        ([EXACT | {'answers': 'two'}], 'are lists of texts'),
        ([EXACT | {'answers': []}], 'the answers'),
        ([CHOICE, CLOZE], "line 2 is of the kind 'cloze', and line 1 of 'choice'"),
        ([{'task': 'a/b'}, CHOICE], "names the task 'a/b'"),
        ([{'score': 'best'}, CHOICE], "'score' is 'best'; use one of raw, bytes"),
        ([{'score': 'prior'}, CHOICE], '"score" is "prior", and no neutral context'),
        ([{'score': 'bytes'}, CLOZE], "is for items of the kind 'choice', and these are of 'clo"),
        ([{'stop': ['x']}, CHOICE], '"stop" of the header is for items'),
        ([{'stop': ['']}, EXACT], "'stop' holds an empty text"),
        ([{'max_tokens': 0}, EXACT], "'max_tokens' is 0; use a whole number"),
        ([{'normalize': ['lower']}, EXACT], "an entry of 'normalize' is 'lower'"),
        ([{'shots': [CLOZE]}, CHOICE], 'example 1 of "shots" is of the kind'),
        ([{'shots': [{'query': 'a'}]}, CHOICE], 'line 1, example 1 has none of'),
        ([{'shots': [CHOICE]}, CHOICE], 'line 2 is one of the examples'),
    ],
)  # fmt: skip
def test_a_bad_file_is_named_with_line_and_field(records, message, tmp_path):
    with pytest.raises(ConfigError, match=message) as caught:
        task_of(tmp_path, *records)
    assert str(tmp_path / 'x.jsonl') in str(caught.value)


def test_bad_sets_of_files_are_named(tmp_path):
    a, b = (
        written(tmp_path / 'a.jsonl', CHOICE),
        written(tmp_path / 'b.jsonl', {'task': 'a'}, CHOICE),
    )
    with pytest.raises(ConfigError, match="both tasks of the name 'a'"):
        open_tasks([a, b])
    with pytest.raises(ConfigError, match='--shots=1 asks for more examples than'):
        open_tasks([a], shots=1)
    with pytest.raises(ConfigError, match=r'nothing.jsonl does not exist'):
        open_tasks([str(tmp_path / 'nothing.jsonl')])


# ---------------------------------------------------------------------------------------------
# Borders
# ---------------------------------------------------------------------------------------------


@pytest.fixture(scope='module')
def encoding():
    return get_encoding(str(ROOT / 'vocab' / 'stdlib-4096.tiktoken'))


@pytest.mark.parametrize(
    ('context', 'continuation'),
    [
        ('def f(x):', '\n    return x'),
        ('def f(x):\n    ', 'return x'),
        ('import ', 'os'),
        ('import', ' os'),
        ('the number \n\n', 'three'),
        ('x = [1', ', 2]'),
        ('os.path.jo', 'in(a)'),
    ],
)
def test_borders_are_those_of_the_harness(context, continuation, encoding):
    """Its rule, TemplateLM._encode_pair: one text, its first tokens as many as the context's."""
    n = len(context) - len(context.rstrip())
    moved, rest = context[len(context) - n :] + continuation, context[: len(context) - n]
    whole, alone = encoding.encode_ordinary(rest + moved), encoding.encode_ordinary(rest)
    got = encode_pair(encoding, context, continuation)
    assert got.tokens == tuple(whole)
    assert got.n_scored == len(whole) - len(alone) > 0


def test_borders_without_a_context_or_a_token_of_their_own(encoding):
    end = sampling.end_of_text(encoding)
    tokens = encoding.encode_ordinary('return x')
    assert encode_pair(encoding, '', 'return x') == Request((end, *tokens), len(tokens))
    name = encoding.decode([end])
    assert encode_pair(encoding, '', name + 'return x') == Request((end, *tokens), len(tokens))
    spaces = encoding.encode_ordinary('  return')
    assert encode_pair(encoding, '  ', 'return') == Request((end, *spaces), len(spaces))
    # 'self' is one token, as is 'sel' or more of them: its last one is scored.
    assert len(encoding.encode_ordinary('x self')) <= len(encoding.encode_ordinary('x sel'))
    whole = tuple(encoding.encode_ordinary('x self'))
    assert encode_pair(encoding, 'x sel', 'f') == Request(whole, 1)
    assert encode_pair(encoding, 'retur', 'n').tokens[-1] == encoding.encode_ordinary('return')[-1]
    assert fitted(Request((1, 2, 3, 4, 5), 2), 3) == Request((2, 3, 4, 5), 2)


# ---------------------------------------------------------------------------------------------
# Rules
# ---------------------------------------------------------------------------------------------


def test_choices_are_compared_by_four_rules(tmp_path):
    """Each rule prefers another choice of the four."""
    choices = ['a', 'bb' * 4, 'é' * 10, 'dd']  # 1, 8, 20 and 2 bytes
    item = {'query': '', 'choices': choices, 'gold': 1}
    raw, n_tokens, prior = [-2.0, -6.4, -9.0, -3.0], [1, 4, 4, 1], [-1.0, -9.0, -7.0, -8.5]
    tokens = [r / n for r, n in zip(raw, n_tokens, strict=True)]
    n_bytes = [r / len(c.encode()) for r, c in zip(raw, choices, strict=True)]
    gained = [r - p for r, p in zip(raw, prior, strict=True)]
    best = [int(np.argmax(x)) for x in (raw, n_bytes, tokens, gained)]
    assert best == [0, 2, 1, 3]
    scores = [Score(x, False) for x in raw + prior]
    for gold in range(4):
        task = task_of(tmp_path, {'prior': 'P:', 'score': 'bytes'}, item | {'gold': gold})
        judged = judge(task, task.items[0], scores, n_tokens * 2)
        assert judged.right == {
            'raw': gold == 0, 'bytes': gold == 2, 'tokens': gold == 1, 'prior': gold == 3
        }  # fmt: skip
        assert judged.bits == pytest.approx(-raw[gold] / math.log(2))
        results = results_of(
            task, [judged, judged._replace(right=dict.fromkeys(judged.right, True))]
        )
        assert results['task_accuracy/x'] == results['task_accuracy_bytes/x'] == (0.5, 1)[gold == 2]
        assert results['task_accuracy_raw/x'] == (0.5, 1)[gold == 0]
        assert results['task_chance/x'] == 0.25
        assert results['task_stderr/x'] == (0 if gold == 2 else pytest.approx(0.5))
        want = -raw[gold] / math.log(2) / len(choices[gold].encode())
        assert results['task_gold_bits_per_byte/x'] == pytest.approx(want)


def test_schemas_and_cloze(tmp_path):
    task = task_of(tmp_path, SCHEMA)
    for found, right in (([-3.0, -2.0], True), ([-2.0, -3.0], False)):
        judged = judge(task, task.items[0], [Score(x, False) for x in found], [1, 1])
        assert (judged.right, judged.n_bytes) == ({'raw': right}, 5)
        assert judged.bits == pytest.approx(-found[1] / math.log(2))
    nan = [Score(math.nan, False)] * 2  # of a model that is lost: nothing is right
    first = task_of(tmp_path, SCHEMA | {'gold': 0})
    assert judge(first, first.items[0], nan, [1, 1]).right == {'raw': False}
    choice = task_of(tmp_path, CHOICE)
    assert not any(judge(choice, choice.items[0], nan, [1, 1]).right.values())
    task = task_of(tmp_path, CLOZE)
    for greedy in (True, False):
        assert judge(task, task.items[0], [Score(-1.0, greedy)], [2]).right == {'raw': greedy}


@pytest.mark.parametrize(
    ('steps', 'want'),
    [
        ((), ' The  U.S., a land '),
        (('strip',), 'The  U.S., a land'),
        (('case', 'strip'), 'the  u.s., a land'),
        (('punctuation',), ' The  US a land '),
        (('case', 'punctuation', 'articles'), 'us land'),
        (('articles',), 'The U.S., land'),
    ],
)
def test_answers_are_normalized_by_these_steps(steps, want):
    assert normalized(' The  U.S., a land ', steps) == want


# ---------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------


def write_tasks(folder: pathlib.Path) -> list[str]:
    """Writes a task of each kind about the sentences of the fixture `tokens`."""
    choices = [
        {'query': f'The number {i} follows', 'choices': [f' {i - 1}.', ' cat.'], 'gold': 0}
        for i in range(10, 30)
    ]
    known = [{'context': f'The number {i} fol', 'continuation': 'lows'} for i in range(9)]
    unknown = {'context': 'x ' * 40, 'continuation': 'The'}
    exact = [
        {'prompt': 'The number 3 fol', 'answers': ['lows']},
        {'prompt': 'The number 3 follows ' * 5, 'answers': ['nothing']},
    ]
    header = {'task': 'follows', 'delimiter': '', 'prior': 'x:'}
    return [
        written(folder / 'choice.jsonl', header, *choices),
        written(folder / 'cloze.jsonl', {'delimiter': ''}, *known, unknown),
        written(folder / 'exact.jsonl', {'stop': [' '], 'max_tokens': 8}, *exact),
    ]


def records(path: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope='module')
def asked(tokens, tmp_path_factory):
    """Returns the workdir of a run that asks tasks, and their files."""
    folder = tmp_path_factory.mktemp('asked')
    files = write_tasks(folder)
    config = small_run(
        tokens, steps=60, eval__tasks=tuple(files), eval__tasks_every=30, checkpoint__every=30,
        checkpoint__keep=0, log__every=10, model__dropout=0.0, optimizer__peak_lr=1e-2,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as monkeypatch:
        share_programs(monkeypatch)
        train.train(config, str(folder / 'run'))
    return folder / 'run', files


_compiled: dict[tuple, Callable] = {}


def asked_again(workdir: pathlib.Path, files: list[str], mesh: str = '', step: int = 60) -> dict:
    _, config = evaluate.checkpoint_config(str(workdir), step, None)
    config = evaluate.evaluated_config(config, mesh, 0)
    s, params, encoding = evaluate.loaded(str(workdir), config, step, False)
    key = (mesh, *files)
    if key not in _compiled:
        _compiled[key] = make_tasks(s, open_tasks(files), encoding)
    return _compiled[key](params)[0]


def test_a_run_asks_its_tasks_as_the_command_does(asked, capsys):
    workdir, files = asked
    found = [r for r in records(workdir / 'metrics.jsonl') if 'task_accuracy/follows' in r]
    assert [r['step'] for r in found] == [30, 60]
    assert found[1]['task_chance/follows'] == 0.5
    assert found[1]['task_accuracy/follows'] > 0.9
    assert found[1]['task_accuracy/cloze'] == 0.9  # of x x x it knows nothing
    assert found[1]['task_accuracy/exact'] == 0.5
    assert found[1]['task_gold_bits_per_byte/cloze'] < found[0]['task_gold_bits_per_byte/cloze']
    for record in found:
        again = asked_again(workdir, files, step=record['step'])
        assert {name: record[name] for name in again} == again


DEFAULT = 'fsdp=2,tp=2,pp=2'


@pytest.mark.parametrize(
    'mesh',
    [
        DEFAULT,
        *(pytest.param(m, marks=pytest.mark.slow) for m in ('dp=8', 'pp=2,tp=4', 'fsdp=4')),
    ],
)
def test_other_meshes_give_the_same_numbers(asked, mesh):
    workdir, files = asked
    found = asked_again(workdir, files if mesh != DEFAULT else files[:2], mesh)
    want = asked_again(workdir, files)
    assert found == pytest.approx({name: want[name] for name in found}, rel=1e-5)


def test_generation_is_refused_on_cut_sequences_and_the_rest_is_not(asked):
    workdir, files = asked
    found, want = asked_again(workdir, files[1:2], 'cp=2'), asked_again(workdir, files)
    assert found == pytest.approx({name: want[name] for name in found}, rel=1e-5)
    with pytest.raises(ConfigError, match=r'exact.jsonl is answered by generation.* mesh.cp=2'):
        asked_again(workdir, files, 'cp=2')


def test_items_that_cannot_be_asked_are_named(asked, tmp_path):
    workdir, _ = asked
    long = written(tmp_path / 'long.jsonl', CLOZE, CLOZE | {'continuation': 'long ' * 40})
    with pytest.raises(ConfigError, match=r'long.jsonl, line 2: an answer has 201 tokens'):
        asked_again(workdir, [long])
    much = written(tmp_path / 'much.jsonl', {'max_tokens': 32}, EXACT)
    with pytest.raises(ConfigError, match='"max_tokens" is 32, which with a prompt takes more'):
        asked_again(workdir, [much])


def test_the_command_prints_and_keeps_what_it_found(asked, tmp_path):
    workdir, files = asked
    command = [sys.executable, 'evaluate.py', f'--workdir={workdir}', '--cpu_devices=2',
               '--mesh=tp=2', f'--tasks={",".join(files[:2])}']  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'task cloze: accuracy 90.0% ± 10.0%, ' in done.stdout
    assert '10 items, 1 of them cut from the left' in done.stdout
    assert f'step 60 of {workdir}, added to {workdir}/eval.jsonl' in done.stdout
    (record,) = records(workdir / 'eval.jsonl')
    found = {name: x for name, x in record.items() if name.startswith('task_')}
    want = asked_again(workdir, files)
    assert found == pytest.approx({name: want[name] for name in found}, rel=1e-5)
    assert len(found) == 11
    assert (record['step'], record['mesh']['tp']) == (60, 2)
    refused = subprocess.run([*command, '--step=7'], cwd=ROOT, capture_output=True, text=True)
    assert (refused.returncode, refused.stdout) == (1, '')
    assert re.search(r'--step=7: .* use one of: 30, 60', refused.stderr)
    # What the plot draws: the run's own, and what was asked later.
    run = Run(str(workdir))
    assert run.names('task_accuracy') == [
        f'task_accuracy/{n}' for n in ('cloze', 'exact', 'follows')
    ]
    steps, values = run.curve('task_accuracy/follows')
    assert steps.tolist() == [30, 60, 60]
    assert values[1] == values[2]
    assert pathlib.Path(plot([str(workdir)], str(tmp_path / 'x.png'))).exists()


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(asked, tmp_path):
    """Each makes the rows of its own devices; a file that one alone has is refused by both."""
    workdir, files = asked
    own = shutil.copytree(workdir, tmp_path / 'run')

    def ask(*tasks: str) -> list[tuple[int, str]]:
        with socket.socket() as s:
            s.bind(('127.0.0.1', 0))
            port = s.getsockname()[1]
        running = [
            subprocess.Popen(
                [sys.executable, 'evaluate.py', f'--workdir={own}', f'--tasks={task}',
                 '--cpu_devices=2', '--mesh=fsdp=2,tp=2', f'--coordinator=127.0.0.1:{port}',
                 '--num_processes=2', f'--process_id={i}'],
                cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            )
            for i, task in enumerate(tasks)
        ]  # fmt: skip
        said = [process.communicate(timeout=300)[0] for process in running]
        return [(process.returncode, text) for process, text in zip(running, said, strict=True)]

    found = ask(','.join(files), ','.join(files))
    assert [code for code, _ in found] == [0, 0], found
    assert ['task follows' in text for _, text in found] == [True, False]
    record, want = records(own / 'eval.jsonl')[-1], asked_again(workdir, files)
    assert {name: record[name] for name in want} == pytest.approx(want, rel=1e-5)
    refused = ask(files[0], files[1])
    assert all(code == 1 and 'differs from process 0 in: --tasks' in t for code, t in refused)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'eval__tasks': ('nowhere.jsonl',)}, 'nowhere.jsonl does not exist'),
        ({'eval__tasks': (3,)}, r'eval.tasks=\(3,\) holds 3; use texts'),
        ({'eval__tasks_every': -1}, 'eval.tasks_every=-1 is out of range; use 0 or more'),
    ],
)
def test_a_bad_setting_ends_the_run_before_it_compiles(
    changes, message, tokens, tmp_path, monkeypatch
):
    monkeypatch.setattr(train, 'lower_train_step', None)
    with pytest.raises(ConfigError, match=message):
        train.train(small_run(tokens, **changes), str(tmp_path / 'run'))


@pytest.mark.parametrize('flag', ['fsdp', 'foo=2', 'tp=x', 'tp=2,tp=2', ''])
def test_meshes_are_parsed(flag):
    with pytest.raises(ConfigError, match='use sizes of pp, dp'):
        evaluate.mesh_sizes(flag)
    assert evaluate.mesh_sizes('fsdp=4, tp=2') == {'fsdp': 4, 'tp': 2}


# ---------------------------------------------------------------------------------------------
# The task that ships
# ---------------------------------------------------------------------------------------------


def test_the_shipped_task_is_sound():
    task = read_task(str(SHIPPED))
    assert (task.name, task.kind, len(task.items)) == ('python', 'choice', 300)
    assert {len(item.continuations) for item in task.items} == {4}
    assert SHIPPED.stat().st_size < 80_000
    golds = np.bincount([item.gold for item in task.items], minlength=4)
    assert golds.min() > 50  # no place of the right one helps
    assert all(len(set(item.continuations)) == 4 for item in task.items)
    # Nor does it help to take the shortest or the longest.
    for pick in (np.argmin, np.argmax):
        right = [pick([len(c) for c in i.continuations]) == i.gold for i in task.items]
        assert np.mean(right) < 0.4


def test_tasks_are_made_of_code_that_can_be_read(tmp_path):
    """A form feed ends no line of code, and other files are named and left out."""
    (tmp_path / 'a.py').write_text('\x0c\n' + (ROOT / 'data.py').read_text())
    (tmp_path / 'b.py').write_text('print "x"\n  y = (\n')
    (tmp_path / 'c.py').write_bytes(b'\xff\xfe')
    command = [sys.executable, 'scripts/make_tasks.py', f'--source={tmp_path}',
               f'--output={tmp_path}/made.jsonl', '--items=40']  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == f'{tmp_path}/made.jsonl: 40 items of 1 files\n'
    assert [f'{name}.py is left out' in done.stderr for name in 'abc'] == [False, True, True]
    code = (tmp_path / 'a.py').read_text()
    for item in read_task(f'{tmp_path}/made.jsonl').items:
        assert item.context + item.answer in code
    uneven = subprocess.run([*command, '--items=10'], cwd=ROOT, capture_output=True, text=True)
    assert (uneven.returncode, 'no multiple of the 4 kinds' in uneven.stderr) == (1, True)
