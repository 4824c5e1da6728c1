"""Makes golden/scores.json: what transformers scores continuations with the models of released/.

    pip install torch==2.13.0 transformers==5.24.0 safetensors==0.8.0 && python make_scores.py

For each model, pairs of a context and a continuation of random tokens (seed 0), some of which are
what greedy decoding would give; their log-likelihood, the sum over the continuation's tokens in
float64 of transformers' float32 log_softmax, and whether each token is the argmax.
"""

import json
import pathlib

import numpy as np
import torch
import transformers

HERE = pathlib.Path(__file__).parent
PAIRS, LONGEST = 12, 16


def scored(model: torch.nn.Module, rng: np.random.Generator, greedy: bool) -> dict:
    """Draws a pair and scores it; with `greedy`, the continuation is the model's own."""
    vocab = model.config.vocab_size
    context = rng.integers(0, vocab, rng.integers(1, LONGEST // 2)).tolist()
    n = int(rng.integers(1, LONGEST // 2 + 1))
    continuation = rng.integers(0, vocab, n).tolist()
    with torch.no_grad():
        if greedy:
            row = list(context)
            for _ in range(n):
                row.append(int(model(torch.tensor([row])).logits[0, -1].argmax()))
            continuation = row[len(context) :]
        logits = model(torch.tensor([context + continuation[:-1]])).logits[0, -n:].float()
    log_p = torch.log_softmax(logits, -1).double()[torch.arange(n), continuation]
    return {
        'context': context,
        'continuation': continuation,
        'log_likelihood': float(log_p.sum()),
        'greedy': bool((logits.argmax(-1) == torch.tensor(continuation)).all()),
    }


def main() -> None:
    found = {'versions': {'torch': torch.__version__, 'transformers': transformers.__version__}}
    for folder in sorted((HERE / 'released').iterdir()):
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation='eager'
        ).eval()
        rng = np.random.default_rng(0)
        found[folder.name] = [scored(model, rng, greedy=i % 3 == 0) for i in range(PAIRS)]
    lines = [f'{json.dumps(name)}: {json.dumps(value)}' for name, value in found.items()]
    (HERE / 'scores.json').write_text('{\n' + ',\n'.join(lines) + '\n}\n')


if __name__ == '__main__':
    main()
