"""This project's training step beside PyTorch's, in turns on the same machine.

    pip install torch transformers && python benchmarks/beside_torch.py
    python benchmarks/beside_torch.py --models=dense --rounds=1 --json

Runs the dense model and the mixture of experts of train_step.py and torch_step.py, each in a
process of its own, in turns whose order alternates, and shows the medians over the rounds of the
fastest steps of each, and of the ratio of a round. PyTorch runs
with glibc kept from returning memory, which makes it faster.
"""

import functools

from absl import flags
from common import Figures, figures_of, in_turns, medians, need, run

FLAGS = flags.FLAGS
MALLOC = ('MALLOC_MMAP_THRESHOLD_', 'MALLOC_TRIM_THRESHOLD_', 'MALLOC_TOP_PAD_')
MODELS = {
    'dense': ([], ['--model=dense']),
    'moe': (['--block=dense,moe', '--attention=mla'], ['--model=deepseek']),
}


def rounds_of(model: str) -> list[dict[str, float]]:
    """Returns of each round the most tokens per second of both projects' steps, and their ratio."""
    ours, theirs = MODELS[model]
    keep_freed = dict.fromkeys(MALLOC, '4294967296')
    runs = {
        'jaxformer': functools.partial(figures_of, 'train_step.py', [*ours, '--repeats=2']),
        'pytorch': functools.partial(
            figures_of, 'torch_step.py', [*theirs, '--steps=6'], keep_freed
        ),
    }
    results = in_turns(runs, FLAGS.rounds)
    pairs = zip(*([x['tokens_per_second'] for x in results[name]] for name in runs), strict=True)
    return [
        {
            f'{model}_jaxformer_tokens_per_second': a,
            f'{model}_pytorch_tokens_per_second': b,
            f'{model}_times_pytorch': a / b,
        }
        for a, b in pairs
    ]


def main() -> Figures:
    need('torch', *(['transformers'] if 'moe' in FLAGS.models else []))
    figures: Figures = {}
    for model in FLAGS.models:
        figures |= medians(rounds_of(model))
    return figures


if __name__ == '__main__':
    flags.DEFINE_integer('rounds', 3, 'Rounds, over which medians are taken.', lower_bound=1)
    flags.DEFINE_list('models', list(MODELS), 'Models to run.')
    flags.register_validator('models', lambda names: {*names} <= {*MODELS}, 'choose dense, moe')
    run(main)
