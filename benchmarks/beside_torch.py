"""This project's training step beside PyTorch's, in turns on the same machine.

    pip install torch transformers && python benchmarks/beside_torch.py

The dense model and the mixture of experts of train_step.py and torch_step.py, each in a process of
its own, one after the other, several times; the best of each is shown. PyTorch runs with glibc kept
from returning memory, which makes it faster.
"""

import argparse
import json
import os
import subprocess
import sys

HERE = os.path.dirname(os.path.abspath(__file__))
MALLOC = ('MALLOC_MMAP_THRESHOLD_', 'MALLOC_TRIM_THRESHOLD_', 'MALLOC_TOP_PAD_')
MODELS = {
    'dense': ([], ['--model=dense']),
    'moe': (['--block=dense,moe', '--attention=mla'], ['--model=deepseek']),
}


def tokens_per_second(script: str, arguments: list[str], **variables: str) -> float:
    """Of one run of a benchmark. Raises CalledProcessError if it fails; its error is shown."""
    done = subprocess.run(
        [sys.executable, os.path.join(HERE, script), *arguments, '--json'],
        env=os.environ | variables,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])['tokens_per_second']


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--rounds', type=int, default=2)
    parser.add_argument('--models', nargs='+', choices=MODELS, default=list(MODELS))
    parser.add_argument('--json', action='store_true')
    args = parser.parse_args()
    result = {}
    for name in args.models:
        ours, theirs = MODELS[name]
        pairs = [
            (
                tokens_per_second('train_step.py', [*ours, '--repeats=2']),
                tokens_per_second(
                    'torch_step.py', [*theirs, '--steps=6'], **dict.fromkeys(MALLOC, '4294967296')
                ),
            )
            for _ in range(args.rounds)
        ]
        jax_rate, torch_rate = (max(rates) for rates in zip(*pairs, strict=True))
        result |= {f'{name}_jaxformer_tokens_per_second': jax_rate}
        result |= {f'{name}_pytorch_tokens_per_second': torch_rate}
        result |= {f'{name}_times_pytorch': jax_rate / torch_rate}
    for name, value in result.items():
        print(f'{name:>36}  {value:,.2f}')
    if args.json:
        print(json.dumps(result))


if __name__ == '__main__':
    main()
