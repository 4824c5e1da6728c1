"""This project's training step beside PyTorch's, in turns on the same machine.

    pip install torch transformers && python benchmarks/beside_torch.py
    python benchmarks/beside_torch.py --models=dense --rounds=1 --json

Runs the dense model and the mixture of experts of train_step.py and torch_step.py, each in a
process of its own, one after the other, several times, and shows the best of each. PyTorch runs
with glibc kept from returning memory, which makes it faster.
"""

import functools

from absl import flags
from common import Figures, figures_of, in_turns, need, run

FLAGS = flags.FLAGS
MALLOC = ('MALLOC_MMAP_THRESHOLD_', 'MALLOC_TRIM_THRESHOLD_', 'MALLOC_TOP_PAD_')
MODELS = {
    'dense': ([], ['--model=dense']),
    'moe': (['--block=dense,moe', '--attention=mla'], ['--model=deepseek']),
}


def best_rates(model: str) -> dict[str, float]:
    """Returns the most tokens per second that the step reached, of each of both projects."""
    ours, theirs = MODELS[model]
    keep_freed = dict.fromkeys(MALLOC, '4294967296')
    runs = {
        'jaxformer': functools.partial(figures_of, 'train_step.py', [*ours, '--repeats=2']),
        'pytorch': functools.partial(
            figures_of, 'torch_step.py', [*theirs, '--steps=6'], keep_freed
        ),
    }
    results = in_turns(runs, FLAGS.rounds)
    return {name: max(x['tokens_per_second'] for x in found) for name, found in results.items()}


def main() -> Figures:
    need('torch', *(['transformers'] if 'moe' in FLAGS.models else []))
    figures: Figures = {}
    for model in FLAGS.models:
        rates = best_rates(model)
        figures |= {f'{model}_{name}_tokens_per_second': rate for name, rate in rates.items()}
        figures[f'{model}_times_pytorch'] = rates['jaxformer'] / rates['pytorch']
    return figures


if __name__ == '__main__':
    flags.DEFINE_integer('rounds', 2, 'Rounds of which the best counts.', lower_bound=1)
    flags.DEFINE_list('models', list(MODELS), 'Models to run.')
    flags.register_validator('models', lambda names: {*names} <= {*MODELS}, 'choose dense, moe')
    run(main)
