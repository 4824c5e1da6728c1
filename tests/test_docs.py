"""The README and the pages of docs/: their names, links, flags and fields exist, their code runs.

Fenced blocks are of four kinds. ```python runs, all blocks of a page in one process. ```bash runs
with `-m slow`, all blocks of a page in one copy of the project. ```text right after either is its
output, in which … stands for anything; other ```text is a figure or a list. ```console cannot run
here. The commands of ```bash and ```console are checked: files, flags, config fields, values.
"""

import ast
import functools
import importlib
import inspect
import itertools
import json
import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from typing import NamedTuple

import pytest
from ml_collections import ConfigDict

from config import ConfigError
from configs import default
from machine.command import define_process_flags
from machine.config_flag import load_config, override, split_overrides
from runtime.config_checks import check_all_devices, validate

ROOT = pathlib.Path(__file__).parent.parent
PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
LANGUAGES = ('python', 'bash', 'console', 'text')
DEVICES = 4096  # the most that a documented mesh may have


class Block(NamedTuple):
    """One fenced block of a page."""

    language: str
    text: str
    line: int  # of the fence, from 1 up
    output: str | None  # the ```text block that follows


def blocks(page: str) -> list[Block]:
    """Returns the fenced blocks of a page."""
    found: list[Block] = []
    end = 0
    for fence in re.finditer(r'^```(.*)\n((?:.*\n)*?)```$', page, re.MULTILINE):
        block = Block(fence[1], fence[2], page.count('\n', 0, fence.start()) + 1, None)
        if block.language == 'text' and found and not page[end : fence.start()].strip():
            found[-1] = found[-1]._replace(output=block.text)
        found.append(block)
        end = fence.end()
    return found


def prose(page: str) -> str:
    """Returns the page without its fenced blocks."""
    return re.sub(r'^```(.*)\n((?:.*\n)*?)```$', '', page, flags=re.MULTILINE)


# ---------------------------------------------------------------------------------------------
# Names
# ---------------------------------------------------------------------------------------------


@functools.cache
def defined(module: str) -> dict[str, ast.AST]:
    """Returns the definitions and imports at the top level of a module, by name."""
    tree = ast.parse(modules()[module].read_text())
    names: dict[str, ast.AST] = {}
    for node in tree.body:
        if isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name: node for alias in node.names}
    return names | members(tree)


def members(node: ast.AST) -> dict[str, ast.AST]:
    """Returns the definitions in a module or class, by name; in a class also attributes of self."""
    names: dict[str, ast.AST] = {}
    for child in getattr(node, 'body', []):
        if isinstance(child, ast.FunctionDef | ast.ClassDef):
            names[child.name] = child
        elif isinstance(child, ast.Assign | ast.AnnAssign):
            targets = child.targets if isinstance(child, ast.Assign) else [child.target]
            names |= {n.id: child for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)}
    if isinstance(node, ast.ClassDef):
        for child in ast.walk(node):
            if isinstance(child, ast.Attribute) and isinstance(child.ctx, ast.Store):
                names[child.attr] = child
    return names


@functools.cache
def modules() -> dict[str, pathlib.Path]:
    """Returns the files of the project's modules and packages, by the last part of their name."""
    packages = {path.parent for path in ROOT.glob('*/__init__.py')} - {ROOT / 'configs'}
    found = [p for folder in (ROOT, *packages) for p in folder.glob('*.py')]
    return {path.stem: path for path in found if path.stem != '__init__'}


def is_field(name: str, config: ConfigDict) -> bool:
    """Returns whether the config has a field or a group of this full name."""
    for part in name.split('.'):
        if not isinstance(config, ConfigDict) or part not in config:
            return False
        config = config[part]
    return True


def resolves(name: str) -> bool:
    """Returns whether a dotted name exists in the project's modules, its config, or jax."""
    first, *rest = name.split('.')
    if is_field(name, default.get_config()):
        return True
    if first in ('jax', 'lax', 'jnp'):
        module = {'jax': 'jax', 'lax': 'jax.lax', 'jnp': 'jax.numpy'}[first]
        found = importlib.import_module(module)
        for part in rest:
            found = getattr(found, part, None)
        return found is not None
    if first not in modules() or rest[0] not in defined(first):
        return False
    node = defined(first)[rest[0]]
    return len(rest) == 1 or not isinstance(node, ast.ClassDef) or rest[1] in members(node)


def listed_files(text: str) -> Iterator[str]:
    """Yields the paths of .py and .md files in a ```text block.

    A folder at the start of a line counts for that line and the indented lines that follow it.
    """
    folder = ''
    for line in text.splitlines():
        if heading := re.match(r'(\w+/)\s', line):
            folder = heading[1]
        elif not line.startswith(' '):
            folder = ''
        for name in re.findall(r'(?<![\w./-])[\w/]+\.(?:py|md)\b', line):
            yield folder + name


def is_file(name: str) -> bool:
    """Returns whether a page may name this file: a path from the root or from docs/."""
    return (ROOT / name).exists() or (ROOT / 'docs' / name).exists()


def wrong_names(page: str) -> Iterator[str]:
    """Yields the names, files and flags of inline code, and files of figures, that do not exist."""
    for block in blocks(page):
        if block.language == 'text':
            yield from (
                f'{name} is no file' for name in listed_files(block.text) if not is_file(name)
            )
    groups = {name for name, value in default.get_config().items() if isinstance(value, ConfigDict)}
    for code in re.findall(r'`([^`\n]+)`', prose(page)):
        if re.fullmatch(r'[\w/]+\.(py|md)', code):
            if not is_file(code):
                yield f'`{code}` is no file'
        elif code.startswith('--'):
            yield from wrong_flags(shlex.split(code), None)
        elif name := re.fullmatch(r'([a-z]\w*)((?:\.\w+)+)(?:\(.*\)|=.*)?', code):
            if name[2].endswith(('.json', '.jsonl', '.txt', '.tiktoken')):
                continue
            known = modules().keys() | groups | {'jax', 'lax', 'jnp'}
            if name[1] in known and not resolves(name[1] + name[2]):
                yield f'`{code}` does not exist'


# ---------------------------------------------------------------------------------------------
# Links
# ---------------------------------------------------------------------------------------------


def anchors(page: str) -> set[str]:
    """Returns the anchors that GitHub gives to a page's headings."""
    titles = re.findall(r'^#+ (.*)$', prose(page), re.MULTILINE)
    plain = [re.sub(r'[^\w\- ]', '', title.lower()) for title in titles]
    return {title.replace(' ', '-') for title in plain}


def wrong_links(page: str, folder: pathlib.Path) -> Iterator[str]:
    """Yields the links of a page in this folder that lead to no file or no heading."""
    for target in re.findall(r'\]\(([^)\s]+)\)', prose(page)):
        if target.startswith(('https://', 'http://')):
            continue
        path, _, anchor = target.partition('#')
        if not (folder / path).exists():
            yield f'the link {target} leads nowhere'
        elif anchor and anchor not in anchors((folder / path).read_text() if path else page):
            yield f'the link {target} names no heading'


# ---------------------------------------------------------------------------------------------
# Commands
# ---------------------------------------------------------------------------------------------


def commands(script: str) -> Iterator[list[str]]:
    """Yields the simple commands of a shell script, each as its words."""
    for line in script.replace('\\\n', ' ').splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars=True)
        words.whitespace_split = True
        command: list[str] = []
        for word in [*words, ';']:
            if set(word) <= set('();<>|&'):
                if command:
                    yield command
                command = []
            else:
                command.append(word)


@functools.cache
def flags_of(script: str) -> dict[str, str]:
    """Returns the kinds of the flags that a script defines, by name."""
    found: dict[str, str] = {}
    tree = ast.parse((ROOT / script).read_text())
    runs = tree.body[-1].body if isinstance(tree.body[-1], ast.If) else []
    for node in runs:  # flags of a command that another module defines
        for alias in node.names if isinstance(node, ast.ImportFrom) else ():
            found |= flags_of(str(modules()[alias.name].relative_to(ROOT)))
    return found | defined_in(tree)


def defined_in(tree: ast.AST) -> dict[str, str]:
    """Returns the kinds of the flags that code defines, itself or by a function that several
    commands share."""
    found: dict[str, str] = {}
    for node in ast.walk(tree):
        kind = getattr(node.func, 'attr', '') if isinstance(node, ast.Call) else ''
        if kind == 'DEFINE_flag':  # (parser, serializer, name, ...) of a flag of its own type
            found[ast.literal_eval(node.args[0].args[2])] = 'flag'
        elif kind.startswith('DEFINE_'):
            found[ast.literal_eval(node.args[0])] = kind.removeprefix('DEFINE_')
        elif kind == define_process_flags.__name__:
            source = inspect.getsource(define_process_flags)
            found |= defined_in(ast.parse(source))
        elif kind == 'add_argument':  # argparse, in the scripts of the tests
            found[ast.literal_eval(node.args[0]).removeprefix('--')] = 'argument'
    return found


def wrong_flags(words: list[str], script: str | None) -> Iterator[str]:
    """Yields the words that are no flag of the script; without one, of no command at the top."""
    scripts = [script] if script else [path.name for path in ROOT.glob('*.py')]
    for word in words:
        name = word.partition('=')[0].removeprefix('--')
        if not word.startswith('--') or name in ('help', 'helpfull') or name.startswith('xla_'):
            continue
        if name.startswith('config.') and not script:
            if not is_field(name.removeprefix('config.').rstrip('.*'), default.get_config()):
                yield f'{word}: there is no such field'
        elif not name.startswith('config.'):
            known = {n: kind for s in scripts for n, kind in flags_of(s).items()}
            positive = name.removeprefix('no')
            if name not in known and known.get(positive) not in ('bool', 'boolean'):
                yield f'{word}: {script or "no command"} has no such flag'


def wrong_config(words: list[str]) -> Iterator[str]:
    """Yields why the config that a command names, with its overrides, cannot run."""
    settings = [
        w for w in words if re.match(r'--config[.=]', w) and not re.search(r'[$…]|\.\.\.', w)
    ]
    files = [w.partition('=')[2] for w in settings if w.startswith('--config=')]
    if not files:
        return
    fields, _ = split_overrides(settings)
    simulated = [w.partition('=')[2] for w in words if w.startswith('--cpu_devices=')]
    try:
        config = load_config(files[-1])[1]
        override(config, fields)
        config.data.path = config.data.path or ('' if config.data.sources else 'somewhere')
        if simulated:  # these are what a command of the page runs on
            check_all_devices(config, int(simulated[0]))
        validate(config, DEVICES)
    except (ConfigError, OSError) as error:
        yield f'{shlex.join(words)}: {error}'


def wrong_commands(page: str) -> Iterator[str]:
    """Yields the files, flags, configs and fields of a page's commands that are wrong."""
    for block in blocks(page):
        if block.language not in ('bash', 'console'):
            continue
        for words in commands(block.text):
            for before, word in itertools.pairwise(['', *words]):
                if before == '-r' and not (ROOT / word).exists():
                    yield f'{word} is no file'
            words = words[next((i for i, w in enumerate(words) if '=' not in w), 0) :]
            if words[0].endswith('.sh'):
                if not (ROOT / words[0]).exists():
                    yield f'{words[0]} is no file'
                yield from wrong_config(words)
            if words[0].startswith('python') and len(words) > 1 and words[1].endswith('.py'):
                if not (ROOT / words[1]).exists():
                    yield f'python {words[1]} is no file'
                    continue
                yield from wrong_flags(words[2:], words[1])
                yield from wrong_config(words)


# ---------------------------------------------------------------------------------------------
# The tests of the pages
# ---------------------------------------------------------------------------------------------


def wrong_layout(page: str) -> Iterator[str]:
    """Yields fences of another kind or without an end, and indented code, which would not run."""
    for block in blocks(page):
        if block.language not in LANGUAGES:
            yield f'line {block.line}: a block is {", ".join(LANGUAGES)}, not {block.language!r}'
    if page.count('```') != 2 * len(blocks(page)):
        yield 'a fence is not closed'
    if re.search(r'^\n {4,}(?!\d|[-*])\S', prose(page), re.MULTILINE):
        yield 'an indented block runs in no test: fence it'


def wrong(page: str, folder: pathlib.Path) -> list[str]:
    """Returns all errors of a page that show without running its code."""
    return [
        *wrong_layout(page),
        *wrong_links(page, folder),
        *wrong_names(page),
        *wrong_commands(page),
    ]


def agrees(printed: str, expected: str) -> bool:
    """Returns whether the output is the page's, where … stands for any text.

    Spaces at the ends of lines do not count.
    """

    def tidy(text: str) -> str:
        return '\n'.join(line.rstrip() for line in text.strip().splitlines())

    pattern = '.*'.join(re.escape(part.strip(' ')) for part in tidy(expected).split('…'))
    return re.fullmatch(pattern, tidy(printed), re.DOTALL) is not None


@pytest.mark.parametrize('page', PAGES, ids=lambda path: path.stem)
def test_page_names_what_exists(page):
    assert wrong(page.read_text(), page.parent) == []


def test_the_readme_lists_every_module():
    readme = (ROOT / 'README.md').read_text()
    listing = blocks(readme[readme.index('\n## The files\n') :])[0].text
    assert {str(path.relative_to(ROOT)) for path in modules().values()} <= {*listed_files(listing)}


# Runs blocks of Python in one namespace, and prints the output of each as a JSON list.
RUNNER = """
import contextlib, io, json, sys
namespace, printed = {'__name__': '__main__'}, []
for name, source in json.load(sys.stdin):
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(source, name, 'exec'), namespace)
    printed.append(out.getvalue())
print(json.dumps(printed))
"""


def copy_of_project(folder: pathlib.Path) -> pathlib.Path:
    """Copies the project into a folder, without runs and hidden files; returns the copy."""
    hidden = shutil.ignore_patterns('.*', '__pycache__', 'runs')
    return pathlib.Path(shutil.copytree(ROOT, folder / 'project', ignore=hidden))


def of_language(page: pathlib.Path, language: str) -> list[Block]:
    """Returns the blocks of a page in this language."""
    return [block for block in blocks(page.read_text()) if block.language == language]


def with_blocks(language: str) -> list[pathlib.Path]:
    """Returns the pages that have blocks in this language."""
    return [page for page in PAGES if of_language(page, language)]


# The Python whose standard library the runs of the pages have learned from. That of another one is
# another text, on which the same runs have other losses.
PYTHON = (3, 11, 7)


def expected_of(block: Block, python: tuple[int, ...] = sys.version_info[:3]) -> str | None:
    """Returns what a block has to print: with another Python, any decimals where it trains."""
    if block.output is None or block.language != 'bash' or python == PYTHON:
        return block.output
    return re.sub(r'\d+\.\d+', '…', block.output)


def test_losses_are_those_of_one_python():
    block = blocks('```bash\ntrue\n```\n\n```text\nstep 2/2  loss 8.33\n```\n')[0]
    assert expected_of(block, PYTHON) == block.output
    assert agrees('step 2/2  loss 8.41', expected_of(block, (3, 11, 9)))
    assert not agrees('step 3/3  loss 8.41', expected_of(block, (3, 11, 9)))


def compare(page: pathlib.Path, block: Block, printed: str) -> None:
    """Fails the test if a block printed something else than the page shows."""
    expected = expected_of(block)
    if expected is not None and not agrees(printed, expected):
        pytest.fail(f'{page.name}, line {block.line} printed:\n{printed}\nnot:\n{expected}')


@pytest.mark.parametrize('page', with_blocks('python'), ids=lambda path: path.stem)
def test_python_prints_what_the_page_shows(page, tmp_path):
    found = of_language(page, 'python')
    sources = [(f'{page.name}, line {block.line}', block.text) for block in found]
    done = subprocess.run(
        [sys.executable, '-c', RUNNER],
        input=json.dumps(sources),
        cwd=copy_of_project(tmp_path),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for block, printed in zip(found, json.loads(done.stdout), strict=True):
        compare(page, block, printed)


@pytest.mark.slow
@pytest.mark.parametrize('page', with_blocks('bash'), ids=lambda path: path.stem)
def test_commands_print_what_the_page_shows(page, tmp_path):
    project = copy_of_project(tmp_path)
    path = f'{pathlib.Path(sys.executable).parent}:{os.environ["PATH"]}'
    for block in of_language(page, 'bash'):
        done = subprocess.run(
            ['bash', '-euo', 'pipefail', '-c', block.text],
            cwd=project,
            env={**os.environ, 'PATH': path, 'JAX_PLATFORMS': 'cpu'},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, (
            f'{page.name}, line {block.line}:\n{done.stdout}\n{done.stderr}'
        )
        compare(page, block, done.stdout)


# ---------------------------------------------------------------------------------------------
# The tests of the tests
# ---------------------------------------------------------------------------------------------

GOOD = """# A title, with words

[this](#a-title-with-words), [that](default.py), `parallel.Param.spec`, `moe.dispatch`,
`data.path`, `jax.shard_map`, `--config.mesh.fsdp=8`, `train.py`, `metrics.jsonl`

```bash
XLA_FLAGS= python train.py --config=configs/tiny.py --cpu_devices=4 \\
    --config.mesh.fsdp=4 && pip install -r requirements.txt  # comment --none
python benchmarks/train_step.py --nokeep_freed_memory | head
scripts/tpu.sh start --config=configs/tiny.py --config.steps=9
```

```text
train.py     a file
layers/      a folder
  dense.py   a file in it
```
"""


def test_a_right_page_is_right():
    assert wrong(GOOD, ROOT / 'configs') == []


@pytest.mark.parametrize(
    ('old', 'new'),
    [
        ('a-title-with', 'a-title-without'),
        ('(default.py)', '(defaults.py)'),
        ('Param.spec', 'Param.specs'),
        ('moe.dispatch', 'moe.despatch'),
        ('data.path', 'data.paths'),
        ('jax.shard_map', 'jax.shard_maps'),
        ('--config.mesh.fsdp=8', '--config.mesh.fsd=8'),
        ('`train.py', '`trains.py'),
        ('python train.py', 'python trains.py'),
        ('--cpu_devices=4', '--cpus=4'),
        ('--cpu_devices=4', '--cpu_devices=2'),
        ('configs/tiny.py', 'configs/tinier.py'),
        ('--config.mesh.fsdp=4', '--config.mesh.fsd=4'),
        ('--config.mesh.fsdp=4', '--config.mesh.fsdp=3'),
        ('--config.mesh.fsdp=4', '--config.mesh.fsdp=2'),
        ('--nokeep', '--nkeep'),
        ('requirements.txt', 'requirement.txt'),
        ('scripts/tpu.sh', 'scripts/tpus.sh'),
        ('--config.steps=9', '--config.step=9'),
        ('  dense.py', '  dents.py'),
        ('\ntrain.py', '\ntrains.py'),
        ('```bash', '```sh'),
        ('```bash\n', '\n    python train.py\n\n```bash\n'),
    ],
)
def test_a_wrong_page_is_found(old, new):
    page = GOOD.replace(old, new)
    assert page != GOOD
    assert wrong(page, ROOT / 'configs') != []


def test_output_is_compared_up_to_what_is_left_out():
    assert agrees('loss 8.31  \nmore\nend\n', 'loss 8.…\n…\nend')
    assert not agrees('loss 7.31\nend\n', 'loss 8.…\nend')
    assert not agrees('loss 8.31\nmore\n', 'loss 8.31\n')


def test_every_block_that_must_run_is_found():
    page = 'a\n```python\nprint(1)\n```\n\n```text\n1\n```\nb\n```text\n2\n```\n'
    assert [(b.language, b.output) for b in blocks(page)] == [
        ('python', '1\n'),
        ('text', None),
        ('text', None),
    ]
