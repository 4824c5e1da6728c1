"""Tasks: multiple choice, schemas and cloze by log-likelihood, exact match by greedy generation.

    tasks = make_tasks(s, open_tasks(['tasks/python.jsonl']), encoding)
    results, lines = tasks(params)

Results are numbers by name, `task_accuracy/NAME` first; docs/tasks.md defines each.
"""

import functools
import hashlib
import math
import re
import string
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import tiktoken

from config import ConfigError
from decoding import stream
from machine import processes
from parallel import CP, Tree
from runtime import agreement
from runtime.sampling import Completion, allowed_tokens, encode, end_of_text
from runtime.scoring import Between, Request, Score, make_scorer
from runtime.task_files import CHOICE, CLOZE, EXACT, SCHEMA, Item, Task, open_tasks
from train_step import Setup

Results = dict[str, float]
ROWS = 64  # prompts that are continued together


# ---------------------------------------------------------------------------------------------
# From texts to tokens
# ---------------------------------------------------------------------------------------------


def encode_pair(encoding: tiktoken.Encoding, context: str, continuation: str) -> Request:
    """Encodes both as one text, of which the continuation's tokens are scored, as EleutherAI's
    harness does (TemplateLM._encode_pair): spaces at the context's end belong to the continuation.

    Where there is no context, the end-of-text token stands for it. Where both meet in a token that
    the context alone has as well, that one is scored, and the harness would score none. Raises
    ConfigError if a context is missing and the vocabulary has no end of text.
    """
    if spaces := len(context) - len(context.rstrip()):
        context, continuation = context[:-spaces], context[-spaces:] + continuation
    whole = encode(encoding, context + continuation)
    n_context = len(encode(encoding, context)) if context else 0
    n_scored = max(len(whole) - n_context, 1)
    if n_scored < len(whole):
        return Request(tuple(whole), n_scored)
    end = end_of_text(encoding)
    if end < 0:
        raise ConfigError(
            f'a continuation has no context, and {encoding.name} no end-of-text token to stand for '
            f'it; give a context'
        )
    if whole[0] == end and len(whole) > 1:
        return Request(tuple(whole), len(whole) - 1)
    return Request((end, *whole), n_scored)


def fitted(request: Request, seq_len: int) -> Request:
    """Returns the request with as many tokens cut from its left as a row has no place for."""
    return request._replace(tokens=request.tokens[-(seq_len + 1) :])


def pairs_of(task: Task, item: Item) -> list[tuple[str, str]]:
    """Lists the (context, continuation) whose log-likelihoods an item is judged by, those of the
    neutral context last."""
    pairs = [
        (task.prompt(context), task.delimiter + continuation)
        for context in item.contexts
        for continuation in item.continuations
    ]
    if task.prior and task.kind == CHOICE:
        pairs += [(task.prior, task.delimiter + choice) for choice in item.continuations]
    return pairs


# ---------------------------------------------------------------------------------------------
# From log-likelihoods to scores
# ---------------------------------------------------------------------------------------------


class Judged(NamedTuple):
    """An item's answers: which way of comparing choices is right, and the bits per byte of the
    right answer."""

    right: dict[str, bool]
    bits: float
    n_bytes: int


def judge(task: Task, item: Item, scores: Sequence[Score], n_tokens: Sequence[int]) -> Judged:
    """Judges an item by the scores of `pairs_of`, and how many tokens of each were scored."""
    found = np.array([score.log_likelihood for score in scores])
    n = len(item.contexts) * len(item.continuations)
    sizes = np.array([len(text.encode()) for text in item.continuations])
    if item.kind == CLOZE:
        right = {'raw': scores[0].greedy}
    elif item.kind == SCHEMA:
        right = {'raw': is_best(found, item.gold)}
    else:
        by_rule = {
            'raw': found[:n],
            'bytes': found[:n] / sizes,
            'tokens': found[:n] / np.array(n_tokens[:n]),
        }
        if task.prior:
            by_rule['prior'] = found[:n] - found[n:]
        right = {rule: is_best(values, item.gold) for rule, values in by_rule.items()}
    bits = -found[item.gold] / math.log(2)
    return Judged(right, bits, len(item.answer.encode()))


def is_best(values: np.ndarray, gold: int) -> bool:
    """Returns whether the value of the right answer is the first of the highest, and no NaN."""
    return bool(np.argmax(values) == gold and not np.isnan(values[gold]))


def accuracy(right: Sequence[bool]) -> tuple[float, float]:
    """Returns the share of right answers, and its standard error: of the mean of a sample."""
    share = float(np.mean(right))
    return share, math.sqrt(share * (1 - share) / max(len(right) - 1, 1))


def results_of(task: Task, judged: Sequence[Judged]) -> Results:
    """Returns the numbers of a task that is judged by log-likelihoods."""
    share, error = accuracy([j.right[task.score] for j in judged])
    found = {'accuracy': share}
    if task.kind == CHOICE:
        for rule in judged[0].right:
            found[f'accuracy_{rule}'] = accuracy([j.right[rule] for j in judged])[0]
    found['stderr'] = error
    if task.kind != CLOZE:
        options = [len(i.contexts) * len(i.continuations) for i in task.items]
        found['chance'] = float(np.mean([1 / n for n in options]))
    found['gold_bits_per_byte'] = sum(j.bits for j in judged) / sum(j.n_bytes for j in judged)
    return named(task, found)


def named(task: Task, results: Results) -> Results:
    """Returns the results by their full names, as in task_accuracy/NAME."""
    return {f'task_{what}/{task.name}': value for what, value in results.items()}


def normalized(text: str, steps: Sequence[str]) -> str:
    """Returns an answer as it is compared. Punctuation is that of ASCII, articles are a, an and
    the, as in SQuAD's evaluation (Rajpurkar et al. 2016), whose order of the steps this is."""
    if 'case' in steps:
        text = text.lower()
    if 'punctuation' in steps:
        text = text.translate(str.maketrans('', '', string.punctuation))
    if 'articles' in steps:
        text = ' '.join(re.sub(r'\b(a|an|the)\b', ' ', text).split())
    return text.strip() if 'strip' in steps else text


# ---------------------------------------------------------------------------------------------
# Exact match
# ---------------------------------------------------------------------------------------------


class Continuer:
    """Continues prompts greedily, on the mesh of the parameters."""

    def __init__(self, s: Setup, encoding: tiktoken.Encoding):
        self.s, self.encoding = s, encoding
        self.end = end_of_text(encoding)
        self.allowed = allowed_tokens(encoding, s.model.vocab_size)

    def room(self, max_tokens: int) -> int:
        """Returns how many tokens of a prompt are kept, the last ones."""
        return max(self.s.config.seq_len - max_tokens, 1)

    def continued(
        self,
        params: Tree,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        stop: Sequence[str],
        between: Between,
    ) -> list[str]:
        """Returns the text after each prompt, up to a stop string or the end of text."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        texts = [''] * len(prompts)
        for start in range(0, len(order), ROWS):
            group = order[start : start + ROWS]
            # As many rows each time, so that no other program is compiled.
            rows = [prompts[i] for i in group] + [[0]] * (min(ROWS, len(order)) - len(group))
            completions = [Completion('', self.encoding, stop) for _ in group]
            context = self.s.config.seq_len
            options = {'stop': self.end, 'allowed': self.allowed}
            for tokens in stream(params, self.s.model, rows, max_tokens, context, **options):
                for completion, row in zip(completions, tokens, strict=False):
                    completion.add(row)
                between()
                if all(completion.finish_reason for completion in completions):
                    break
            for i, completion in zip(group, completions, strict=True):
                completion.finish()
                texts[i] = completion.text
        return texts


def exact_prompts(
    task: Task, continuer: Continuer, encoding: tiktoken.Encoding
) -> tuple[list[list[int]], int]:
    """Returns the tokens of each item's prompt, and how many were cut from the left."""
    room, prompts = continuer.room(task.max_tokens), []
    for item in task.items:
        tokens = encode(encoding, task.prompt(item.context))
        if not tokens and continuer.end < 0:
            raise place_of(task, item, 'the prompt is empty, and the vocabulary has no end of text')
        prompts.append(tokens or [continuer.end])
    return [p[-room:] for p in prompts], sum(len(p) > room for p in prompts)


def place_of(task: Task, item: Item, problem: str) -> ConfigError:
    return ConfigError(f'{task.path}, line {item.line}: {problem}')


# ---------------------------------------------------------------------------------------------
# All of them
# ---------------------------------------------------------------------------------------------


def agreed_tasks(paths: Sequence[str], shots: int | None = None) -> list[Task]:
    """Reads task files as `open_tasks`; all processes call this.

    Raises ConfigError on all of them if one cannot read the files, or has others.
    """
    tasks = processes.agreed(functools.partial(open_tasks, paths, shots), 'read the tasks')
    digests = {t.path: hashlib.sha256(t.content.encode()).hexdigest()[:12] for t in tasks}
    agreement.check_same({f'the task {path}': digest for path, digest in digests.items()})
    return tasks


class Prepared(NamedTuple):
    """A task in tokens."""

    task: Task
    requests: list[list[Request]]  # of each item
    prompts: list[list[int]]  # of each item, for exact match
    n_cut: int  # items that were cut from the left


def prepared(
    task: Task, s: Setup, encoding: tiktoken.Encoding, continuer: Continuer | None
) -> Prepared:
    """Encodes a task. Raises ConfigError, with file and line, for an item that cannot be asked."""
    if task.kind == EXACT:
        return Prepared(task, [], *exact_prompts(task, continuer, encoding))
    requests, n_cut, T = [], 0, s.config.seq_len
    for item in task.items:
        try:
            whole = [encode_pair(encoding, *pair) for pair in pairs_of(task, item)]
        except ConfigError as error:
            raise place_of(task, item, str(error)) from error
        longest = max(request.n_scored for request in whole)
        if longest > T:
            raise place_of(
                task, item, f'an answer has {longest} tokens, and seq_len={T}; shorten it'
            )
        requests.append([fitted(request, T) for request in whole])
        n_cut += requests[-1] != whole
    return Prepared(task, requests, [], n_cut)


def make_tasks(
    s: Setup, tasks: Sequence[Task], encoding: tiktoken.Encoding
) -> Callable[..., tuple[Results, list[str]]]:
    """Returns (params) -> numbers by name, and a line about each task.

    As keyword arguments it takes `between` and `progress`, as `make_scorer`. All that can be wrong
    with a task is raised here, as ConfigError, before anything compiles. With several processes all
    call both.
    """
    allowed_tokens(encoding, s.model.vocab_size)  # raises for another vocabulary than the model's
    exact = [task for task in tasks if task.kind == EXACT]
    if exact and s.mesh.shape[CP] > 1:
        raise ConfigError(
            f'{exact[0].path} is answered by generation, which does not cut sequences, and '
            f'mesh.cp={s.mesh.shape[CP]}; use a mesh without cp, as evaluate.py can'
        )
    for task in exact:
        if task.max_tokens >= s.config.seq_len:
            raise ConfigError(
                f'{task.path}: "max_tokens" is {task.max_tokens}, which with a prompt takes more '
                f'than seq_len={s.config.seq_len}; use less'
            )
    continuer = Continuer(s, encoding) if exact else None
    ready = [prepared(task, s, encoding, continuer) for task in tasks]
    score = make_scorer(s)

    def measure(params: Tree, **options: Callable[..., None]) -> tuple[Results, list[str]]:
        results: Results = {}
        every = [r for p in ready for requests in p.requests for r in requests]
        scores = iter(score(params, every, **options) if every else [])
        lines = []
        for p in ready:
            if p.task.kind == EXACT:
                between = options.get('between', lambda: None)
                found = exact_results(p, params, continuer, between)
            else:
                judged = [
                    judge(p.task, item, [next(scores) for _ in asked], [r.n_scored for r in asked])
                    for item, asked in zip(p.task.items, p.requests, strict=True)
                ]
                found = results_of(p.task, judged)
            results |= found
            lines.append(line_of(p, found))
        return results, lines

    return measure


def exact_results(p: Prepared, params: Tree, continuer: Continuer, between: Between) -> Results:
    """Returns the numbers of a task that is answered by generation."""
    task = p.task
    texts = continuer.continued(params, p.prompts, task.max_tokens, task.stop, between)
    right = []
    for item, text in zip(task.items, texts, strict=True):
        answers = {normalized(answer, task.normalize) for answer in item.continuations}
        right.append(normalized(text, task.normalize) in answers)
    share, error = accuracy(right)
    return named(task, {'accuracy': share, 'stderr': error})


def line_of(p: Prepared, results: Results) -> str:
    """Returns the line of the terminal about a task."""
    found = {name.removeprefix('task_').partition('/')[0]: x for name, x in results.items()}
    text = f'task {p.task.name}: accuracy {found["accuracy"]:.1%} ± {found["stderr"]:.1%}'
    if 'chance' in found:
        text += f' (chance {found["chance"]:.1%})'
    if 'gold_bits_per_byte' in found:
        text += f', {found["gold_bits_per_byte"]:.3f} bits/byte'
    text += f', {len(p.task.items)} items'
    return text + (f', {p.n_cut} of them cut from the left' if p.n_cut else '')
