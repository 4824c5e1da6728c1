"""EleutherAI's harness on a run: the numbers of its own Hugging Face backend, on the same weights.

pip install -r requirements/eval.txt && python -m pytest -m live tests/test_harness.py
"""

import json
import pathlib

import pytest

import evaluate
from config import ConfigError
from convert import export_model, import_model
from runtime import harness
from runtime.evaluation import checkpoint_config

WORDS = ['one', 'red', 'fox', 'runs', 'over', 'two', 'blue', 'dogs', 'and', 'three', 'green',
         'birds', 'sleep', 'under', 'an', 'old', 'tree', 'while', 'mice', 'look']  # fmt: skip
KINDS = ('choice', 'cloze', 'rolling', 'generation')


def sentence(i: int, n: int) -> str:
    return ' '.join(WORDS[(i * 7 + k * k + 3 * k) % len(WORDS)] for k in range(n))


def write_tasks(folder: pathlib.Path) -> None:
    """Writes a task of each kind, with prompts that do not fit, trailing spaces and examples."""
    docs = [
        {
            'text': sentence(i, 4 + 9 * (i % 9)) + ('  ' if i % 3 == 0 else ''),
            'choices': [sentence(i + k, 1 + k) for k in range(3)],
            'gold': i % 3,
        }
        for i in range(40)
    ]
    folder.mkdir()
    (folder / 'docs.jsonl').write_text('\n'.join(map(json.dumps, docs)))
    common = {
        'dataset_path': 'json',
        'dataset_kwargs': {'data_files': {'test': str(folder / 'docs.jsonl')}},
        'test_split': 'test',
    }
    kinds = {
        'choice': {
            'output_type': 'multiple_choice', 'doc_to_text': '{{text}}',
            'doc_to_choice': 'choices', 'doc_to_target': 'gold', 'num_fewshot': 2,
            'fewshot_config': {'sampler': 'first_n', 'split': 'test'},
            'metric_list': [{'metric': m} for m in ('acc', 'acc_norm', 'acc_mutual_info')],
        },
        'cloze': {
            'output_type': 'loglikelihood', 'doc_to_text': '{{text}}',
            'doc_to_target': '{{choices[2]}}',
            'metric_list': [{'metric': m} for m in ('perplexity', 'acc')],
        },
        'rolling': {
            'output_type': 'loglikelihood_rolling', 'doc_to_text': '', 'doc_to_target': '{{text}}',
            'metric_list': [{'metric': m} for m in ('word_perplexity', 'bits_per_byte')],
        },
        'generation': {
            'output_type': 'generate_until', 'doc_to_text': '{{text}}',
            'doc_to_target': '{{choices[2]}}',
            'generation_kwargs': {'until': ['e'], 'max_gen_toks': 12},
            'metric_list': [{'metric': 'exact_match'}],
        },
    }  # fmt: skip
    for name, fields in kinds.items():
        (folder / f'{name}.yaml').write_text(json.dumps({'task': name, **common, **fields}))


def write_release(folder: pathlib.Path) -> None:
    """Writes a random Llama and a vocabulary of its own, as transformers does."""
    import tokenizers
    import torch
    import transformers

    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=320, special_tokens=['<|endoftext|>'],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator([sentence(i, 40) for i in range(30)], trainer)
    wrapped = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token='<|endoftext|>', pad_token='<|endoftext|>'
    )
    wrapped.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=320, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
        tie_word_embeddings=False, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    for name, x in model.named_parameters():
        if 'norm' not in name:
            x.data.normal_(0, 2 * x.shape[-1] ** -0.5)
    model.save_pretrained(folder)


@pytest.fixture(scope='module')
def weights(tmp_path_factory) -> tuple[pathlib.Path, pathlib.Path]:
    """Returns a workdir, and the release that convert.py made of it."""
    folder = tmp_path_factory.mktemp('weights')
    write_release(folder / 'release')
    import_model(str(folder / 'release'), str(folder / 'run'))
    export_model(str(folder / 'run'), str(folder / 'exported'))
    return folder / 'run', folder / 'exported'


def samples(model, include: pathlib.Path) -> tuple[dict, dict]:
    """Returns the harness's numbers, and each item's answers."""
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        model, tasks=list(KINDS), task_manager=TaskManager(include_path=str(include)),
        bootstrap_iters=0,
    )  # fmt: skip
    return found['results'], {
        name: {x['doc_id']: x['filtered_resps'] for x in items}
        for name, items in found['samples'].items()
    }


@pytest.mark.live
@pytest.mark.parametrize('sizes', ['', 'fsdp=2,tp=2,pp=2'])
def test_numbers_are_those_of_its_own_backend(weights, tmp_path, sizes):
    pytest.importorskip('lm_eval', reason='needs pip install -r requirements/eval.txt')
    from lm_eval.models.huggingface import HFLM

    workdir, exported = weights
    write_tasks(tmp_path / 'tasks')
    step, config = checkpoint_config(str(workdir), None, None)
    config = evaluate.evaluated_config(config, sizes, 4)
    s, params, encoding = evaluate.loaded(str(workdir), config, step, False)
    ours, our_items = samples(harness.make_model(s, params, encoding), tmp_path / 'tasks')
    theirs, their_items = samples(
        HFLM(pretrained=str(exported), device='cpu', dtype='float32', batch_size=4,
             add_bos_token=False),
        tmp_path / 'tasks',
    )  # fmt: skip
    for kind in KINDS:
        for metric, value in theirs[kind].items():
            if isinstance(value, float):
                assert ours[kind][metric] == pytest.approx(value, rel=1e-5), (kind, metric)
        for i, theirs_of_item in their_items[kind].items():
            check(our_items[kind][i], theirs_of_item)


def check(ours, theirs) -> None:
    """Compares answers: texts and flags exactly, log-likelihoods to 1e-5."""
    if isinstance(theirs, list | tuple):
        for a, b in zip(ours, theirs, strict=True):
            check(a, b)
    elif isinstance(theirs, float):
        assert ours == pytest.approx(theirs, rel=1e-5)
    else:
        assert ours == theirs


def test_a_missing_harness_is_named(monkeypatch):
    monkeypatch.setattr(harness.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(ConfigError, match='pip install lm-eval'):
        harness.need_lm_eval()
