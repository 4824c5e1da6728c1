"""Task files: what a model is asked, one JSON object a line.

    {"task": "capitals", "score": "bytes", "shots": [{"query": "Spain:", ...}]}     the header
    {"query": "France:", "choices": ["Paris", "Rome"], "gold": 0}                    the items

The kind of all items of a file follows from their fields (`KINDS`), other fields of an item are
left alone; the header, a first record without such fields, may be missing. docs/tasks.md explains
both. The names of fields are those of LLM Foundry's and DCLM's files, which are read as they are.
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from config import ConfigError
from machine.config_flag import did_you_mean
from storage.stores import read_text

CHOICE, SCHEMA, CLOZE, EXACT = KINDS = ('choice', 'schema', 'cloze', 'exact')
CONTEXT = ('query', 'context', 'prompt')  # names of the field with the text before
TELLING = {'choices': CHOICE, 'context_options': SCHEMA, 'continuation': CLOZE, 'answer': EXACT,
           'answers': EXACT}  # fmt: skip
SCORES = ('raw', 'bytes', 'tokens', 'prior')  # ways to compare choices
NORMALIZE = ('strip', 'case', 'punctuation', 'articles')  # of answers, before they are compared


class Item(NamedTuple):
    """One question. A choice has one context and several continuations, a schema the reverse, a
    cloze one of each; an exact item has one context and the answers that are right."""

    kind: str
    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int  # the right choice or context
    line: int = 0

    @property
    def context(self) -> str:
        """The context of the right answer."""
        return self.contexts[self.gold if self.kind == SCHEMA else 0]

    @property
    def answer(self) -> str:
        """The right answer, or the first of them."""
        return self.continuations[self.gold if self.kind == CHOICE else 0]


@dataclass(frozen=True)
class Task:
    """A task file, checked. The fields from `description` on are the header's."""

    path: str
    name: str
    items: tuple[Item, ...]
    description: str = ''  # before all else
    delimiter: str = ' '  # between a context and its continuation
    separator: str = '\n\n'  # after each example
    shots: tuple[Item, ...] = ()  # the fixed examples
    score: str = 'raw'  # what choices are compared by
    prior: str = ''  # the neutral context of score 'prior'; '': none is computed
    stop: tuple[str, ...] = ('\n',)  # texts that end an answer
    max_tokens: int = 32  # of an answer
    normalize: tuple[str, ...] = ('strip',)
    content: str = field(default='', repr=False)  # of the file

    @property
    def kind(self) -> str:
        return self.items[0].kind

    def prompt(self, context: str) -> str:
        """Returns the text before a continuation: the description, the examples, the context."""
        examples = (s.context + self.delimiter + s.answer + self.separator for s in self.shots)
        return self.description + ''.join(examples) + context


# ---------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------


def open_tasks(paths: Sequence[str], shots: int | None = None) -> list[Task]:
    """Reads and checks task files; `shots` takes the first so many examples of each, None all.

    Raises ConfigError, with file, line and field, for what is wrong in one.
    """
    tasks = [read_task(path, shots) for path in paths]
    for i, task in enumerate(tasks):
        for other in tasks[:i]:
            if other.name == task.name:
                raise ConfigError(
                    f'{task.path} and {other.path} are both tasks of the name {task.name!r}; give '
                    f'one a header with another, as in {{"task": "{task.name}_2"}}'
                )
    return tasks


def read_task(path: str, shots: int | None = None) -> Task:
    """Reads one task file."""
    content = read_text(path)
    if content is None:
        raise ConfigError(f'{path} does not exist; give the path of a task file, a .jsonl')
    header: dict[str, Any] = {}
    items: list[Item] = []
    for number, record in records(path, content):
        place = f'{path}, line {number}'
        if not (items or header) and not TELLING.keys() & record.keys():
            header = read_header(record, place)
        else:
            items.append(read_item(record, place)._replace(line=number))
            check_kind(items[-1], items[0], place)
    if not items:
        raise ConfigError(f'{path} holds no item; give it at least one')
    name = header.pop('task', os.path.basename(path).partition('.')[0])
    if not re.fullmatch(r'[\w.\-]+', name):
        raise ConfigError(
            f'{path} names the task {name!r}; use letters, digits, ".", "_" and "-" in "task"'
        )
    header['shots'] = chosen_shots(path, header.get('shots', ()), shots)
    task = Task(path, name, tuple(items), **header, content=content)
    check_task(task)
    return task


def records(path: str, content: str) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (number, record) for the lines that are not blank."""
    for number, line in enumerate(content.removeprefix('\ufeff').split('\n'), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ConfigError(f'{path}, line {number}: {error}; write a JSON object') from error
        if not isinstance(record, dict):
            raise ConfigError(f'{path}, line {number} is no JSON object: {line[:60]}')
        yield number, record


def text_of(value: Any, what: str, place: str) -> str:
    """Returns a field's value, which has to be a text."""
    if not isinstance(value, str):
        raise ConfigError(f'{place}: {what} is {value!r}; use a text, in quotes')
    return value


def texts_of(value: Any, what: str, place: str, least: int) -> tuple[str, ...]:
    """Returns a list of texts, none of them empty."""
    if not isinstance(value, list) or len(value) < least:
        raise ConfigError(f'{place}: {what} is {value!r}; use a list of {least} texts or more')
    for text in value:
        if not text_of(text, f'an entry of {what}', place):
            raise ConfigError(f'{place}: {what} holds an empty text; leave it out, or fill it')
    return tuple(value)


def read_item(record: dict[str, Any], place: str) -> Item:
    """Reads an item. Raises ConfigError for fields that are missing or make no sense."""
    kinds = {TELLING[name] for name in TELLING if name in record}
    if SCHEMA in kinds:  # whose continuation has the name of a cloze's
        kinds.discard(CLOZE)
    if len(kinds) != 1:
        known = ', '.join(TELLING)
        raise ConfigError(
            f'{place} has {"both " if kinds else "none "}of {known}, which tell the kind of an '
            f'item; give one. Its fields: {", ".join(map(repr, record))}'
        )
    (kind,) = kinds
    given = [name for name in CONTEXT if name in record]
    if kind == SCHEMA:
        contexts = texts_of(record['context_options'], "'context_options'", place, 2)
    elif len(given) == 1:
        contexts = (text_of(record[given[0]], f'{given[0]!r}', place),)
    else:
        raise ConfigError(
            f'{place} has {len(given)} of the fields {", ".join(CONTEXT)}; give one, which may be '
            f'an empty text'
        )
    return Item(kind, contexts, continuations_of(kind, record, place), gold_of(kind, record, place))


def continuations_of(kind: str, record: dict[str, Any], place: str) -> tuple[str, ...]:
    """Returns the choices, the continuation or the right answers of an item."""
    if kind == CHOICE:
        return texts_of(record['choices'], "'choices'", place, 2)
    if kind == EXACT:
        answers = record.get('answers', [])
        first = [record['answer']] if 'answer' in record else []
        aliases = record.get('aliases', [])
        if not isinstance(answers, list) or not isinstance(aliases, list):
            raise ConfigError(f"{place}: 'answers' and 'aliases' are lists of texts")
        return texts_of([*first, *answers, *aliases], 'the answers', place, 1)
    if 'continuation' not in record:
        raise ConfigError(f"{place} has 'context_options' and no 'continuation'; give one")
    return texts_of([record['continuation']], "'continuation'", place, 1)


def gold_of(kind: str, record: dict[str, Any], place: str) -> int:
    """Returns the number of the right choice or context."""
    if kind not in (CHOICE, SCHEMA):
        return 0
    n = len(record['choices' if kind == CHOICE else 'context_options'])
    gold = record.get('gold')
    if type(gold) is not int or not 0 <= gold < n:
        raise ConfigError(
            f"{place}: 'gold' is {gold!r}, the number of the right one of {n}, from 0; use 0 to "
            f'{n - 1}'
        )
    return gold


def check_kind(item: Item, first: Item, place: str) -> None:
    if item.kind != first.kind:
        raise ConfigError(
            f'{place} is of the kind {item.kind!r}, and line {first.line} of {first.kind!r}; give '
            f'each kind a file of its own'
        )


# ---------------------------------------------------------------------------------------------
# The header
# ---------------------------------------------------------------------------------------------


def number_of(value: Any, what: str, place: str) -> int:
    """Returns a field's value, which has to be a number of tokens."""
    if type(value) is not int or value < 1:
        raise ConfigError(f'{place}: {what} is {value!r}; use a whole number, 1 or more')
    return value


def one_of(allowed: Sequence[str]) -> Callable[[Any, str, str], str]:
    """Returns the reader of a field whose value is one of these."""

    def read(value: Any, what: str, place: str) -> str:
        if value not in allowed:
            raise ConfigError(f'{place}: {what} is {value!r}; use one of {", ".join(allowed)}')
        return value

    return read


def some_of(allowed: Sequence[str]) -> Callable[[Any, str, str], tuple[str, ...]]:
    """Returns the reader of a field whose value is a list of some of these."""

    def read(value: Any, what: str, place: str) -> tuple[str, ...]:
        if not isinstance(value, list):
            raise ConfigError(f'{place}: {what} is {value!r}; use a list of {", ".join(allowed)}')
        return tuple(one_of(allowed)(entry, f'an entry of {what}', place) for entry in value)

    return read


def stops_of(value: Any, what: str, place: str) -> tuple[str, ...]:
    return texts_of(value, what, place, 0)


def shots_of(value: Any, what: str, place: str) -> tuple[Item, ...]:
    """Reads the list of examples."""
    if not isinstance(value, list) or not all(isinstance(shot, dict) for shot in value):
        raise ConfigError(f'{place}: {what} is a list of items')
    return tuple(read_item(shot, f'{place}, example {i}') for i, shot in enumerate(value, 1))


HEADER: dict[str, Callable[[Any, str, str], Any]] = {
    'task': text_of,
    'description': text_of,
    'delimiter': text_of,
    'separator': text_of,
    'shots': shots_of,
    'score': one_of(SCORES),
    'prior': text_of,
    'stop': stops_of,
    'max_tokens': number_of,
    'normalize': some_of(NORMALIZE),
}


def read_header(record: dict[str, Any], place: str) -> dict[str, Any]:
    """Reads the header. Raises ConfigError for fields that it does not have."""
    for name in record:
        if name not in HEADER:
            raise ConfigError(
                f'{place} has the unknown field {name!r}{did_you_mean(name, [*HEADER, *TELLING])}; '
                f'a header has {", ".join(HEADER)}, and an item one of {", ".join(TELLING)}'
            )
    return {name: HEADER[name](value, f'{name!r}', place) for name, value in record.items()}


def chosen_shots(path: str, fixed: tuple[Item, ...], n: int | None) -> tuple[Item, ...]:
    """Returns the first n examples; None takes all."""
    if n is not None and n > len(fixed):
        raise ConfigError(
            f'--shots={n} asks for more examples than {path} has: {len(fixed)} in "shots" of its '
            f'header; add some, or use fewer'
        )
    return fixed if n is None else fixed[:n]


def check_task(task: Task) -> None:
    """Raises ConfigError for a header that does not fit the items, and for an item that is an
    example too, which would be asked with its answer in sight."""
    for i, shot in enumerate(task.shots, 1):
        if shot.kind != task.kind:
            raise ConfigError(
                f'{task.path}: example {i} of "shots" is of the kind {shot.kind!r}, and the items '
                f'of {task.kind!r}; use the same fields'
            )
    shown = {(shot.context, shot.answer) for shot in task.shots}
    for item in task.items:
        if (item.context, item.answer) in shown:
            raise ConfigError(
                f'{task.path}, line {item.line} is one of the examples in "shots", which hold its '
                f'answer; leave it out of one of them'
            )
    if task.score == 'prior' and not task.prior:
        raise ConfigError(
            f'{task.path}: "score" is "prior", and no neutral context is given; add it, as in '
            f'"prior": "Answer:"'
        )
    for name, value, unset, kinds in (
        ('score', task.score, 'raw', (CHOICE,)),
        ('prior', task.prior, '', (CHOICE,)),
        ('stop', task.stop, Task.stop, (EXACT,)),
        ('max_tokens', task.max_tokens, Task.max_tokens, (EXACT,)),
        ('normalize', task.normalize, Task.normalize, (EXACT,)),
    ):
        if value != unset and task.kind not in kinds:
            raise ConfigError(
                f'{task.path}: "{name}" of the header is for items of the kind {kinds[0]!r}, and '
                f'these are of {task.kind!r}; leave it out'
            )
