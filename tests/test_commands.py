"""How commands start: flags, configs, --help, and one message for each mistake of a user."""

import importlib
import json
import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys

import pytest
from absl import flags
from common_commands import command_line

import convert
import data
import evaluate
import generate
import plan
import tokenizer
import train
from config import ConfigError, flat
from configs import default, tiny
from machine import command
from machine.config_flag import find_config, load_config, override, parse_value
from machine.progress import interruption
from pipeline import schedules
from runtime import config_checks

ROOT = pathlib.Path(train.__file__).parent
COMMANDS = {
    'train.py': train,
    'data.py': data,
    'tokenizer.py': tokenizer,
    'generate.py': generate,
    'evaluate.py': evaluate,
    'plan.py': plan,
    'convert.py': convert,
    'parallel.py': schedules,
}
WITH_WORDS = ('train.py', 'data.py', 'tokenizer.py')
BENCHMARKS = sorted(
    {p.name for p in (ROOT / 'benchmarks').glob('*.py')} - {'common.py', 'released_models.py'}
)

FILES = {
    'syntax.py': 'import math\ndef get_config(:\n',
    'raises.py': 'def get_config():\n    return 1 / 0\n',
    'imports.py': 'import nothere\n',
    'typo.py': 'from configs import tiny\ndef get_config():\n    c = tiny.get_config()\n'
    '    c.stesp = 3\n    return c\n',
    'kind.py': 'from configs import tiny\ndef get_config():\n    c = tiny.get_config()\n'
    "    c.steps = 'x'\n    return c\n",
    'without.py': 'x = 1\n',
    'nothing.py': 'def get_config():\n    pass\n',
    'few.py': 'from ml_collections import ConfigDict\ndef get_config():\n'
    "    return ConfigDict({'steps': 3, 'stpes': 4})\n",
    'a.txt': 'text',
}  # fmt: skip

# (what is typed, what the message says); {} is a folder that holds FILES and nothing else.
MISTAKES = [
    # flags
    ('train.py', 'give --config=configs/NAME.py to train'),
    ('train.py --wrkdir=a', '--wrkdir is no flag (did you mean --workdir?)'),
    ('train.py --x', '--x is no flag; python train.py --help lists the flags'),
    ('train.py --config', 'Missing value for flag --config'),
    ('train.py --config=tiny --cpu_devices=many', 'flag --cpu_devices=many'),
    ('train.py --config=tiny --cpu_devices=-1', 'flag --cpu_devices=-1: -1 is not an integer in'),
    ('train.py --config=tiny --num_processes=0', 'flag --num_processes=0'),
    ('train.py --config=tiny --eval_only=last', 'or --eval_only=STEP'),
    ('train.py --config=tiny --eval_only', 'add --workdir=RUN'),
    ('train.py --config=tiny --averaged', 'add --eval_only to evaluate them, or --init_from=RUN'),
    ('train.py --config=tiny --nospare_devices=1', 'does not take an argument'),
    ('train.py --config=tiny a.txt', 'a.txt belongs to no flag'),
    ('train.py --config=tiny steps 3 --workdir=a', 'steps 3 belongs to no flag'),
    ('train.py --flagfile=none', "No such file or directory: 'none'"),
    ('train.py --plot=none', 'none/metrics.jsonl does not exist'),
    # the config
    ('train.py --config=tinny', 'there is no configs/tinny.py (did you mean configs/tiny.py?)'),
    ('train.py --config=configs/tinny.py', 'there is no configs/tinny.py'),
    ('train.py --config={}/none.py', 'configs/ has deepseek_v3, default, gpu_b200'),
    ('train.py --config={}', 'there is no '),
    ('train.py --config=', 'there is no configs/.py'),
    ('train.py --config={}/syntax.py', 'syntax.py, line 2: SyntaxError: '),
    ('train.py --config={}/raises.py', 'raises.py, line 2: ZeroDivisionError: division by zero'),
    (
        'train.py --config={}/imports.py',
        "imports.py, line 1: ModuleNotFoundError: No module named 'n",
    ),
    ('train.py --config={}/typo.py', 'typo.py, line 4: AttributeError'),
    ('train.py --config={}/kind.py', 'kind.py, line 4: TypeError'),
    ('train.py --config={}/without.py', 'without.py defines no get_config()'),
    ('train.py --config={}/nothing.py', 'get_config() returns NoneType'),
    ('train.py --config={}/few.py', 'a config without batch_size'),
    ('train.py --config=tiny:text', 'TypeError: get_config() takes 0 positional arguments'),
    # its fields
    ('train.py --config.steps=3', 'add --config=configs/NAME.py'),
    (
        'train.py --config=tiny --config.optimizer.peek_lr=1',
        'no such field (did you mean --config.optimizer.peak_lr?)',
    ),
    ('train.py --config=tiny --config.peak_lr=1', 'did you mean --config.optimizer.peak_lr?'),
    ('train.py --config=tiny --config.=1', '--config.: there is no such field'),
    (
        'train.py --config=tiny --config.mesh=8',
        'is a group of fields; set one, as in --config.mesh.',
    ),
    ('train.py --config=tiny --config.steps=many', '--config.steps=many is no whole number'),
    ('train.py --config=tiny --config.steps=1.5', '--config.steps=1.5 is no whole number'),
    ('train.py --config=tiny --config.steps', '--config.steps has no value'),
    ('train.py --config=tiny --config.optimizer.b1=a', 'is no number; write one as in'),
    ('train.py --config=tiny --config.check_vma=maybe', 'is neither true nor false'),
    ('train.py --config=tiny --noconfig.steps', 'is for fields that are true or false'),
    ('train.py --config=tiny --config.model.block=dense,mo', "unknown kind 'mo'"),
    ("train.py --config=tiny '--config.log.prompts=(1, 2)'", 'is no list of texts; write a,b or'),
    ("train.py --config=tiny '--config.model.block=(dense,moe'", 'is no list of texts'),
    ('train.py --config=tiny --config.data.sources=web', 'is no list of records; write "(('),
    ('train.py --config=tiny --config.seed=4294967296', 'seed=4294967296 is out of range'),
    ('train.py --config=tiny --config.optimizer.peak_lr=nan', 'peak_lr=nan is out of range'),
    ('train.py --config=tiny --config.guard.step_seconds=inf', 'step_seconds=inf is out of range'),
    (
        'train.py --config=tiny --spare_devices --config.compiler_options=foo=1',
        "No such compile option: 'foo'",
    ),
    # the machine
    ('train.py --config=tiny', 'takes 1 of 8 devices; use --config.mesh.fsdp=8'),
    ('train.py --config=tiny --config.mesh.tp=3', 'use a tp of 1, 2 or 4'),
    ('train.py --config=tiny --config.mesh.fsdp=16', 'takes 16 devices and 8 are there'),
    ('train.py --config=tiny --profile=a --spare_devices', '--profile=a names no steps'),
    ('train.py --config=tiny --coordinator=h:1', 'belong together; give all three'),
    ('train.py --workdir={} --eval_only', 'holds no checkpoint to evaluate'),
    # the other commands
    ('data.py', 'give --input, --tokenizer and --output to prepare, or --inspect'),
    ('data.py --input=a --tokenizer=bytes', 'give --input, --tokenizer and --output'),
    ('data.py --input={}/none --tokenizer=bytes --output={}/o', 'no file matches'),
    ('data.py --input={}/a.txt --tokenizer=foo --output={}/o', "no encoding is called 'foo'"),
    ('data.py --input={}/a.txt --tokenizer=bytes --output={}/a.txt', 'cannot be written'),
    ('data.py --inspect={}', 'holds no manifest.json'),
    ('data.py --inspect={} word', 'word belongs to no flag'),
    ('data.py --input=a --workers=0', 'flag --workers=0'),
    ('data.py --config=tiny', '--config is no flag'),
    ('tokenizer.py', 'give --input, the text to train on, and --output'),
    ('tokenizer.py --input={}/none --output={}/a.tiktoken', 'no file matches'),
    ('tokenizer.py --input={}/a.txt --output={}/a', 'let it end in .tiktoken'),
    ('generate.py', 'give --workdir=RUN'),
    ('generate.py --workdir={} --prompt=a', 'holds no checkpoint'),
    ('generate.py --workdir={} --prompt=a --max_tokens=0', 'flag --max_tokens=0'),
    ('generate.py --workdir={} --dtype=int8', 'flag --dtype=int8'),
    ('generate.py --workdir={} --prompt=def main', 'main belongs to no flag'),
    ('plan.py', 'give --config=configs/NAME.py, the config to plan'),
    ('plan.py --config=tiny --best=0', 'flag --best=0'),
    ('plan.py --config=tiny --chip=v9', "the chip 'v9' is unknown"),
    ('plan.py --config=tiny word', 'word belongs to no flag'),
    ('plan.py --config=tiny --config.mesh.tp=3 --chip=v4', 'use a tp of 1, 2 or 4'),
    ('convert.py', 'give --from_hf=FOLDER and --workdir=NEW to bring weights in'),
    ('convert.py --from_hf=a --to_hf=b --workdir=c', 'give --from_hf=FOLDER and --workdir=NEW'),
    ('convert.py --from_hf={}/none --workdir={}/w', 'is no local folder; fetch the model'),
    ('convert.py --from_hf={} --workdir={}/w', 'config.json: name the folder of a model'),
    ('convert.py --workdir={} --to_hf={}/o', 'holds no checkpoint'),
    ('convert.py --workdir={} --to_hf={}', 'is there already: name a new folder'),
    ('convert.py --workdir={} --to_hf={}/o --dtype=int8', 'flag --dtype=int8'),
    ('convert.py --from_hf={} --workdir={}/w --dtype=float32', '--dtype does not go with --from_'),
    ('convert.py --workdir={} --to_hf={}/o --num_processes=2', '--num_processes does not go with'),
    ('convert.py --from_hf={} --workdir={}/w --write_config={}', 'exists: remove it or choose an'),
    (
        'convert.py --workdir={} --to_hf={}/o --family=gpt2',
        '--family=gpt2 is no family: use one of llama, mistral',
    ),
    ('parallel.py --stages=0', 'flag --stages=0'),
    ('parallel.py --schedule=fifo', 'use one of gpipe, 1f1b'),
    ('parallel.py --cost_f=nan', 'use numbers above 0'),
    ('parallel.py 3', '3 belongs to no flag'),
]


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def run(line: str) -> None:
    """Runs a command line in this process."""
    script, *arguments = shlex.split(line)
    module = COMMANDS[script]
    with command_line(script, *arguments):
        define = getattr(module, 'define_flags', None) or module._define_flags
        command.run(module.main, define, script in WITH_WORDS)


@pytest.mark.parametrize(('line', 'message'), MISTAKES, ids=[line for line, _ in MISTAKES])
def test_a_mistake_is_one_message_and_exit_code_1(line, message, folder, monkeypatch):
    for module in (train, convert):
        monkeypatch.setattr(module, 'keep_freed_memory', lambda: None)
    monkeypatch.setenv('TMPDIR', str(folder))
    before = sorted(folder.iterdir())
    with pytest.raises(SystemExit) as caught:
        run(line.replace('{}', str(folder)))
    said = caught.value.code  # a text is printed, and the exit code is 1
    assert isinstance(said, str)
    assert message in said
    assert 'Traceback' not in said
    assert len(said.splitlines()) == 1 or said.startswith('the config cannot run:\n  - ')
    assert len(said) < 600
    assert sorted(folder.iterdir()) == before  # nothing is left behind
    assert not flags.FLAGS.is_parsed()


def test_a_mistake_in_a_shell(tmp_path):
    line = [sys.executable, str(ROOT / 'train.py'), '--config=tinny']
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout == ''
    assert done.stderr.startswith('there is no configs/tinny.py')
    assert len(done.stderr.splitlines()) == 1


# ---------------------------------------------------------------------------------------------
# Errors, and bugs
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('error', 'code'),
    [
        (ConfigError('use another'), 'use another'),
        (PermissionError(13, 'Permission denied', 'a/b'), 'a/b: Permission denied'),
        (KeyboardInterrupt(), command.INTERRUPTED),
        (OSError('without a file'), OSError),
        (ValueError('a bug'), ValueError),
        (KeyError('a bug'), KeyError),
    ],
    ids=repr,
)
def test_messages(error, code):
    with (
        pytest.raises(code if isinstance(code, type) else SystemExit) as caught,
        command.messages(),
    ):
        raise error
    if not isinstance(code, type):
        assert caught.value.code == code


def test_an_interruption_says_what_stands(capsys):
    with pytest.raises(SystemExit) as caught, command.messages(), interruption(lambda: 'go on'):
        raise KeyboardInterrupt
    assert caught.value.code == command.INTERRUPTED == 130
    assert capsys.readouterr().err == 'interrupted: go on\n'


@pytest.mark.parametrize('script', ['data.py', 'plan.py'])
def test_signals_while_a_command_imports(script):
    for number in (signal.SIGINT, signal.SIGTERM):
        line = [sys.executable, '-v', str(ROOT / script), '--help']
        process = subprocess.Popen(line, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for said in process.stderr:  # of the imports
            if said.startswith("import 'numpy"):
                break
        process.send_signal(number)
        out, said = process.communicate()
        assert (process.returncode, out) == (-number, '')  # 130 and 143 in a shell
        assert 'Traceback' not in said


def test_further_kinds_of_errors_are_messages():
    with pytest.raises(SystemExit, match='gone'), command.messages(LookupError):
        raise LookupError('gone')


def test_a_reader_that_leaves_ends_a_command_in_silence():
    line = f'{sys.executable} parallel.py --stages=8 --microbatches=200 | head -n 1'
    done = subprocess.run(line, shell=True, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.startswith('1f1b: 8 stages')
    assert done.stderr == ''


# ---------------------------------------------------------------------------------------------
# --help
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize('script', COMMANDS)
def test_help_fits_a_screen(script, monkeypatch, capsys):
    monkeypatch.setenv('COLUMNS', '80')
    run(f'{script} --help')
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert len(lines) <= 26  # of 24, where a command has few flags
    assert f'python {script}' in printed or 'python -m pipeline.schedules' in printed
    assert all(len(line) <= 80 for line in lines if line.startswith('  --'))
    assert 'absl' not in printed
    rare = dict.fromkeys(('train.py', 'convert.py', 'evaluate.py'), 'coordinator')
    rare['data.py'] = 'token_dtype'
    assert ('  --helpfull' in printed) == (script in rare)
    run(f'{script} --helpfull')
    full = capsys.readouterr().out
    for name in rare.values():
        assert (f'  --{name}=' in full) == (rare.get(script) == name)
        assert f'  --{name}=' not in printed
        assert (f'--{name}' in printed) == (rare.get(script) == name)
    for word in ('--config=', 'configs/default.py', '--config.optimizer.peak_lr=3e-4'):
        assert (word in printed) == (script in ('train.py', 'plan.py'))


def test_help_of_a_process_ends_with_0():
    line = [sys.executable, 'parallel.py', '--help']
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, '')
    assert '  --' in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize('script', BENCHMARKS)
def test_benchmarks_start_like_commands(script):
    if script == 'torch_step.py':
        pytest.importorskip('torch')
    line = [sys.executable, f'benchmarks/{script}']
    given = {'cwd': ROOT, 'capture_output': True, 'text': True}
    done = subprocess.run([*line, '--help'], **given)
    assert done.returncode == 0
    assert '--json' in done.stdout
    assert len(done.stdout.splitlines()) <= 40
    for mistake in ('word', '--none=1'):
        done = subprocess.run([*line, mistake], **given)
        assert done.returncode == 1
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_the_script_for_a_gpu_runs_with_small_sizes_anywhere():
    line = ['bash', 'benchmarks/on_gpu.sh', '--small', '--fp8']
    variables = os.environ | {'PYTHON': sys.executable}
    done = subprocess.run(line, cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert not [name for name in figures if name.endswith('failed')], figures
    for part in ('dense', 'moe', 'dense_fp8', 'moe_fp8'):
        assert figures[f'{part}_tokens_per_second'] > 0
    assert figures['moe_parameters'] > figures['dense_parameters']
    assert figures['attention_blockwise_ms'] > 0
    assert figures['experts_blocks_error'] < 0.02  # beside ragged_dot, both in bfloat16


# ---------------------------------------------------------------------------------------------
# The config's flags
# ---------------------------------------------------------------------------------------------


def parsed(*arguments: str):
    """Returns FLAGS.config of plan.py with these arguments."""
    with command_line('plan.py', *arguments):
        plan.define_flags()
        command.parse(sys.argv[1:])
        return flags.FLAGS.config


@pytest.mark.parametrize(
    ('typed', 'value'),
    [
        ('dense,moe', ('dense', 'moe')),
        ('dense, moe', ('dense', 'moe')),
        ("('dense','moe')", ('dense', 'moe')),
        ('["dense"]', ('dense',)),
        ("['dense', 'moe']", ('dense', 'moe')),
        ("'dense','moe'", ('dense', 'moe')),
        ('dense', ('dense',)),
        ("'dense'", ('dense',)),
        ("('dense')", ('dense',)),
        ('', ()),
        ('()', ()),
        ('1,2', ('1', '2')),
        ('3', ('3',)),
        ('def ', ('def ',)),
        ('two words', ('two words',)),
        ('two words,three more words', ('two words', 'three more words')),
        ("('def f(a, b):',)", ('def f(a, b):',)),
        ('x\ny', ('x\ny',)),
    ],
)
def test_tuples_of_texts_are_taken_as_people_type_them(typed, value):
    for name in ('model.block', 'log.prompts', 'log.writers', 'model.remat_keep'):
        assert flat(parsed('--config=tiny', f'--config.{name}={typed}').to_dict())[name] == value


@pytest.mark.parametrize(
    ('typed', 'value'),
    [
        ("(('a', 'x', 1), ('b', 'y', 0.5))", (('a', 'x', 1), ('b', 'y', 0.5))),
        ("[['a', 'x', 1]]", (('a', 'x', 1),)),
        ("('a', 'x', 1)", (('a', 'x', 1),)),
        ("('a', 'x', 1),", (('a', 'x', 1),)),
        ('()', ()),
        ('', ()),
    ],
)
def test_records(typed, value):
    assert parse_value('data.sources', typed, ()) == value


def test_other_forms_of_fields():
    config = parsed(
        '--config=tiny', '--config.steps', '7', '-config.seed=3', '--noconfig.check_vma',
        '--config.log.plot', '--config.optimizer.peak_lr=3e-4', '--config.guard.nonfinite=False',
        '--config.data.path=a=b', '--config.seed=4', '--config.log.prompts=a b',
        '--config.log.prompts=c', '--config.model.remat_keep=qkv', '--config.model.remat_keep=',
        '--config.model.remat_keep=hidden', '--config.model.document_end', '-1',
    )  # fmt: skip
    assert (config.steps, config.seed, config.check_vma, config.log.plot) == (7, 4, False, True)
    assert (config.optimizer.peak_lr, config.guard.nonfinite) == (3e-4, False)
    assert config.data.path == 'a=b'
    assert config.log.prompts == ('a b', 'c')
    assert config.model.remat_keep == ('hidden',)
    assert config.is_locked
    assert parsed('--config.steps=5', '--config=tiny').steps == 5  # in any order


def test_each_field_can_be_given_its_default():
    fields = flat(default.get_config().to_dict())
    arguments = [f'--config.{name}={value}' for name, value in fields.items()]
    assert parsed('--config=default', *arguments).to_dict() == default.get_config().to_dict()


def test_a_config_is_found_by_its_name_and_from_any_folder(tmp_path, monkeypatch):
    want = tiny.get_config().to_dict()
    assert load_config(str(ROOT / 'configs/tiny.py'))[1].to_dict() == want
    monkeypatch.chdir(tmp_path)
    for name in ('tiny', 'configs/tiny.py'):
        assert load_config(name)[1].to_dict() == want
    shutil.copy(ROOT / 'configs/tiny_dense.py', 'tiny.py')
    assert find_config('tiny.py') == 'tiny.py'
    monkeypatch.setenv('HOME', str(tmp_path))
    assert find_config('~/tiny.py') == f'{tmp_path}/tiny.py'
    (tmp_path / 'taking.py').write_text(
        'from configs import tiny\ndef get_config(n):\n    c = tiny.get_config()\n'
        '    c.steps = int(n)\n    return c\n'
    )
    assert load_config('taking.py:7')[1].steps == 7


def test_a_flag_file_holds_fields_too(tmp_path):
    (tmp_path / 'flags').write_text('--config=tiny\n--config.steps=9\n')
    assert parsed(f'--flagfile={tmp_path}/flags').steps == 9


def test_an_override_does_not_change_other_configs():
    config = default.get_config()
    override(config, [('steps', '5'), ('model.block', 'moe')])
    assert (config.steps, config.model.block) == (5, ('moe',))
    assert default.get_config().model.block == ('dense',)


def test_paths_expand_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    arguments = [
        '--workdir=~/runs/a',
        '--init_from=~/b',
        '--plot=~/a,b,gs://c/~',
        '--plot_output=~/p',
    ]
    with command_line('train.py', *arguments):
        train.define_flags()
        command.parse(sys.argv[1:])
        given = flags.FLAGS
        assert given.workdir == f'{tmp_path}/runs/a'
        assert given.init_from == f'{tmp_path}/b'
        assert given.plot == [f'{tmp_path}/a', 'b', 'gs://c/~']
        assert given.plot_output == f'{tmp_path}/p'
    with command_line('data.py', '--output=gs://b/~/x', '--inspect=~', '--tokenizer=bytes'):
        data._define_flags()
        command.parse(sys.argv[1:])
        assert flags.FLAGS.output == 'gs://b/~/x'
        assert flags.FLAGS.inspect == str(tmp_path)
        assert flags.FLAGS.tokenizer == 'bytes'


def test_the_fields_of_configs_are_written_in_no_command():
    """All configs load by --config, and plan.py prints them by their names."""
    for path in (ROOT / 'configs').glob('*.py'):
        if path.stem != '__init__':
            found = importlib.import_module(f'configs.{path.stem}').get_config()
            assert json.dumps(load_config(path.stem)[1].to_dict()) == json.dumps(found.to_dict())


def test_several_devices_are_left_idle_only_by_request(monkeypatch, capsys):
    trained = []
    monkeypatch.setattr(train, 'keep_freed_memory', lambda: None)
    monkeypatch.setattr(train, 'train', lambda config, *_: trained.append(config) or {})
    monkeypatch.setattr(train, 'say_next', lambda *_, **__: None)
    monkeypatch.setattr(train, 'say_unfinished', lambda _: None)
    run('train.py --config=tiny --workdir=a --spare_devices')
    run('train.py --config=tiny --workdir=a --config.mesh.fsdp=8')
    assert [config.mesh.fsdp for config in trained] == [1, 8]


def test_compiler_options_are_tried_before_the_run():
    config = tiny.get_config()
    config.compiler_options = 'xla_cpu_enable_fast_math=false'
    config_checks.check_compiler_options(config)
    config.compiler_options = 'xla_cpu_enable_fast_math=maybe'
    with pytest.raises(ConfigError, match="'maybe' is not a valid bool"):
        config_checks.check_compiler_options(config)
