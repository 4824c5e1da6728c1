"""Makes a task file from Python code: which of four continuations is the right one?

    python scripts/make_tasks.py --output=tasks/python.jsonl           # from the project's own code
    python scripts/make_tasks.py --source=CODE --output=mine.jsonl --items=400

Items ask for the bracket that closes, the keyword that comes next, a name that the lines before
have, or the indentation of the next line; as many of each. The wrong choices are of the same kind.
configs/tiny.py learns from Python's standard library, so the project's own code is new to it.
"""

import io
import itertools
import json
import keyword
import pathlib
import random
import sys
import tokenize
from collections.abc import Iterable, Iterator
from typing import NamedTuple

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

from absl import flags

from config import ConfigError
from machine import command

ROOT = pathlib.Path(__file__).parent.parent
FOLDERS = ('layers', 'pipeline', 'corpus', 'storage', 'machine', 'runtime')  # of the project
KINDS = ('bracket', 'indent', 'keyword', 'name')
CONTEXT = 110  # characters before a continuation, from the start of a line
BRACKETS = (')', ']', '}', ':')
KEYWORDS = (' in ', ' is ', ' and ', ' or ', ' if ', ' else ', ' for ', ' as ', ' import ')
INDENTS = (0, 4, 8, 12)
CHOICES = 4


class Question(NamedTuple):
    """A place in code: its kind, the text before, the right continuation, and wrong ones."""

    kind: str
    query: str
    right: str
    wrong: tuple[str, ...]


def questions(code: str) -> Iterator[Question]:
    """Yields all questions that a file of code offers."""
    starts = [0]
    for line in io.StringIO(code):  # the lines that tokenize counts: none ends at a form feed
        starts.append(starts[-1] + len(line))
    tokens = list(tokenize.generate_tokens(io.StringIO(code).readline))
    names = sorted({t.string for t in tokens if is_name(t)})
    for token in tokens:
        at = starts[token.start[0] - 1] + token.start[1]
        query = before(code, at)
        if token.type == tokenize.OP and token.string in BRACKETS[:3]:
            yield Question('bracket', query, token.string, without(BRACKETS, token.string))
        elif code[at - 1 : at] == ' ' and f' {token.string} ' in KEYWORDS:
            word = f' {token.string} '
            if query.rstrip() != query[:-1] or not code[at:].startswith(word[1:]):
                continue  # at the start of a line, or before its end
            yield Question('keyword', query[:-1], word, without(KEYWORDS, word))
        elif is_name(token) and token.string in query and len(token.string) > 3:
            others = tuple(name for name in names if name not in query and len(name) > 3)
            yield Question('name', query, token.string, others)
        elif token.type == tokenize.NEWLINE and (asked := indentation(code, at)):
            yield Question('indent', query, *asked)


def is_name(token: tokenize.TokenInfo) -> bool:
    return token.type == tokenize.NAME and not keyword.iskeyword(token.string)


def before(code: str, at: int) -> str:
    """Returns the whole lines before a place that CONTEXT holds, and the start of its own."""
    start = code.find('\n', max(at - CONTEXT, 0)) + 1
    return code[start:at] if start <= at else ''


def without(words: tuple[str, ...], right: str) -> tuple[str, ...]:
    return tuple(word for word in words if word != right)


def indentation(code: str, at: int) -> tuple[str, tuple[str, ...]] | None:
    """Returns the end of a line with the first word of the next one, and the same with other
    indentations; None if no code comes right after."""
    line = code[at + 1 :].partition('\n')[0]
    word, depth = line.lstrip().partition(' ')[0], len(line) - len(line.lstrip())
    if not word or depth not in INDENTS:
        return None
    texts = {n: '\n' + ' ' * n + word for n in INDENTS}
    return texts[depth], tuple(text for n, text in texts.items() if n != depth)


def of_files(files: list[pathlib.Path]) -> Iterator[list[Question]]:
    """Yields the questions of each file; says which are no Python code of today."""
    for file in files:
        try:
            yield list(questions(file.read_text('utf-8')))
        except (SyntaxError, UnicodeDecodeError, tokenize.TokenError) as error:
            print(f'{file} is left out: {error}', file=sys.stderr)


def items(asked: Iterable[Question], n: int, seed: int) -> list[dict]:
    """Draws n items, as many of each kind, none of them twice."""
    rng = random.Random(seed)
    by_kind: dict[str, list[Question]] = {kind: [] for kind in KINDS}
    for q in asked:
        if len(q.query) >= CONTEXT // 3 and len(q.wrong) >= CHOICES - 1:
            by_kind[q.kind].append(q)
    found = []
    for kind in KINDS:
        distinct = list({q.query: q for q in by_kind[kind]}.values())
        if len(distinct) < n // len(KINDS):
            raise ConfigError(f'the code has {len(distinct)} questions of the kind {kind!r}; give '
                              f'more of it, or ask for fewer --items')  # fmt: skip
        for q in rng.sample(distinct, n // len(KINDS)):
            choices = [q.right, *rng.sample(q.wrong, CHOICES - 1)]
            rng.shuffle(choices)
            gold = choices.index(q.right)
            found.append({'kind': kind, 'query': q.query, 'choices': choices, 'gold': gold})
    rng.shuffle(found)
    return found


def main(_: list[str]) -> None:
    f = flags.FLAGS
    if not f.output:
        raise ConfigError('give --output=FILE.jsonl, the task file to write')
    if f.items % len(KINDS):
        raise ConfigError(f'--items={f.items} is no multiple of the {len(KINDS)} kinds; use one')
    folders = [pathlib.Path(f.source)] if f.source else [ROOT / name for name in FOLDERS]
    files = sorted(file for folder in folders for file in folder.rglob('*.py'))
    if not files:
        raise ConfigError(f'--source={f.source} holds no .py file; give a folder of Python code')
    asked = list(of_files(files))
    made = items(itertools.chain(*asked), f.items, f.seed)
    header = {'task': pathlib.Path(f.output).stem, 'delimiter': ''}
    lines = [json.dumps(record) for record in (header, *made)]
    pathlib.Path(f.output).write_text('\n'.join(lines) + '\n')
    print(f'{f.output}: {len(made)} items of {len(asked)} files')


def define_flags() -> None:
    command.DEFINE_path('output', None, 'The task file to write.')
    command.DEFINE_path('source', '', "Folder of Python code; by default the project's packages.")
    flags.DEFINE_integer('items', 300, 'Items, a multiple of the four kinds.', lower_bound=4)
    flags.DEFINE_integer('seed', 0, 'Random seed.', lower_bound=0)


if __name__ == '__main__':
    command.run(main, define_flags)
