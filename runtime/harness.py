"""A model of a run in EleutherAI's harness (lm-eval, an optional package), for any of its tasks.

    model = make_model(s, params, encoding)
    results, table = run(model, ['hellaswag'])

The harness makes the prompts and the numbers, and cuts texts at their borders; the model scores and
continues them (`scoring`, `decoding`). So the numbers are those of its Hugging Face backend on the
same weights, if both have the same length of context, and no token is put before texts there
(add_bos_token=False): none is here.
"""

import importlib.util
import json
import math
from collections.abc import Sequence
from typing import Any

import tiktoken

from config import ConfigError
from parallel import CP, Tree
from runtime.sampling import encode, end_of_text
from runtime.scoring import Request, make_scorer
from runtime.tasks import Continuer, fitted
from train_step import Setup

INSTALL = 'pip install lm-eval, or pip install -r requirements/eval.txt'
MAX_TOKENS = 256  # of an answer, where a task does not say
# Arguments of generation that say nothing else than greedy.
GREEDY = {'until', 'do_sample', 'temperature', 'max_gen_toks', 'max_new_tokens', 'max_tokens',
          'max_completion_tokens'}  # fmt: skip


def need_lm_eval() -> None:
    """Raises ConfigError if the harness is not installed."""
    if importlib.util.find_spec('lm_eval') is None:
        raise ConfigError(f"--lm_eval needs EleutherAI's harness: {INSTALL}")


def make_model(s: Setup, params: Tree, encoding: tiktoken.Encoding) -> Any:
    """Returns the model as the harness takes it, an `lm_eval.api.model.TemplateLM`.

    Its `end` is the prefix of texts without context, and ends generation. Raises ConfigError if
    the harness is missing, or the vocabulary has no end of text.
    """
    need_lm_eval()
    from lm_eval import utils
    from lm_eval.api.model import TemplateLM
    from lm_eval.models.utils import normalize_gen_kwargs

    end = end_of_text(encoding)
    if end < 0:
        raise ConfigError(
            f'--lm_eval takes texts without context after the end-of-text token, and '
            f'{encoding.name} has none; use --tasks'
        )
    score, continuer = make_scorer(s), Continuer(s, encoding)

    class Jaxformer(TemplateLM):
        """The methods that the harness asks for."""

        eot_token_id = end
        tokenizer_name = encoding.name
        max_length = s.config.seq_len
        max_gen_toks = MAX_TOKENS

        def tok_encode(self, text: str, add_special_tokens: bool | None = None, **_: Any) -> list:
            return encode(encoding, text)

        def _loglikelihood_tokens(
            self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: Any
        ) -> list[tuple[float, bool]]:
            asked = []
            for texts, context, continuation in requests:
                if not 0 < len(continuation) <= self.max_length:
                    raise ConfigError(
                        f'a continuation of {len(continuation)} tokens cannot be scored with '
                        f'seq_len={self.max_length}: {texts!r:.200}'
                    )
                request = Request((*context, *continuation), len(continuation))
                asked.append(fitted(request, self.max_length))
            return [(x.log_likelihood, x.greedy) for x in score(params, asked)]

        def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
            windows, counts = [], []
            for request in requests:
                (text,) = request.args
                pairs = utils.get_rolling_token_windows(
                    self.tok_encode(text), self.prefix_token_id, self.max_length, context_len=1
                )
                own = [(None, *utils.make_disjoint_window(pair)) for pair in pairs]
                windows += own
                counts.append(len(own))
            found = iter(self._loglikelihood_tokens(windows))
            return [sum(next(found)[0] for _ in range(n)) for n in counts]

        def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
            groups: dict[str, list[int]] = {}  # those of the same arguments are continued at once
            for i, request in enumerate(requests):
                groups.setdefault(json.dumps(request.args[1], sort_keys=True), []).append(i)
            texts = [''] * len(requests)
            for arguments, indices in groups.items():
                options = normalize_gen_kwargs(json.loads(arguments), self.max_gen_toks)
                check_greedy(options, s)
                n, until = options['max_gen_toks'], [text for text in options['until'] if text]
                room = continuer.room(n)
                prompts = [encode(encoding, requests[i].args[0])[-room:] or [end] for i in indices]
                found = continuer.continued(params, prompts, n, until, lambda: None)
                for i, text in zip(indices, found, strict=True):
                    texts[i] = text
            return texts

    return Jaxformer()


def check_greedy(options: dict[str, Any], s: Setup) -> None:
    """Raises ConfigError for generation that is not greedy, or that the mesh or the length of rows
    does not take."""
    further = sorted(options.keys() - GREEDY)
    if options['do_sample'] or options.get('temperature') or further:
        raise ConfigError(
            f'a task asks for generation with {options}, and answers are greedy here: temperature '
            f'0, and none of {further or "do_sample"}'
        )
    if options['max_gen_toks'] >= s.config.seq_len:
        raise ConfigError(
            f'a task asks for {options["max_gen_toks"]} tokens after a prompt, and '
            f'seq_len={s.config.seq_len}; give its generation_kwargs a max_gen_toks below'
        )
    if s.mesh.shape[CP] > 1:
        raise ConfigError(
            f'generation does not cut sequences, and mesh.cp={s.mesh.shape[CP]}; use a --mesh '
            f'without cp'
        )


def run(
    model: Any, tasks: Sequence[str], include: str = '', shots: int | None = None,
    limit: int | None = None,
) -> tuple[dict[str, float], str]:  # fmt: skip
    """Runs tasks of the harness; returns lm_eval/TASK/METRIC -> number, and its table as text.

    `include` is a folder of further tasks, `shots` overrides their examples, `limit` their items.
    Raises ConfigError for a task that the harness does not know.
    """
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table

    manager = TaskManager(include_path=include or None)
    for name in tasks:
        if name not in manager.all_tasks:
            raise ConfigError(
                f'--lm_eval={name} is no task of the harness; give a name that its folder of tasks '
                f'has, or the folder of your own with --lm_eval_include'
            )
    found = simple_evaluate(
        model, tasks=list(tasks), task_manager=manager, num_fewshot=shots, limit=limit,
        log_samples=False, bootstrap_iters=0,
    )  # fmt: skip
    numbers = {
        f'lm_eval/{task}/{metric.removesuffix(",none")}': float(value)
        for task, values in found['results'].items()
        for metric, value in values.items()
        if isinstance(value, int | float) and metric != 'sample_len' and math.isfinite(value)
    }
    return numbers, make_table(found)
