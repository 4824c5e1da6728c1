#!/usr/bin/env bash
# lm-eval 0.4.13: the tokens of an answer are those of context and answer together, less as many as the
# context has alone. Where the answer's first characters end the context's last word, both together may have
# as many tokens as the context alone, of which the last one differs: "x sel" + "f" is [x][ self], and "x sel"
# alone is [x][ sel]. The answer then has no token at all, and nothing is said: a backend scores nothing
# (that for transformers ends with an AssertionError). Give answers that begin at a word, or score the
# tokens from the first one that differs.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet lm-eval==0.4.13 tokenizers==0.22.1
"$work/venv/bin/python" - <<'PYTHON'
from lm_eval.api.model import TemplateLM
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

tokenizer = Tokenizer(models.BPE())
tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
alphabet = pre_tokenizers.ByteLevel.alphabet()
trainer = trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
tokenizer.train_from_iterator(['return self.x', 'sel self self'] * 50, trainer)


class Model(TemplateLM):
    eot_token_id = 0

    def tok_encode(self, string, **_):
        return tokenizer.encode(string).ids

    def _loglikelihood_tokens(self, requests, **_):
        raise NotImplementedError

    def loglikelihood_rolling(self, requests, **_):
        raise NotImplementedError

    def generate_until(self, requests, **_):
        raise NotImplementedError


model = Model()
alone, whole = model.tok_encode('x sel'), model.tok_encode('x self')
assert len(alone) == len(whole) and alone != whole, (alone, whole)
context, answer = model._encode_pair('x sel', 'f')
assert answer == [], f'changed: the answer has the tokens {answer}'
_, word = model._encode_pair('x', ' self')
assert word == whole[1:], word
print(f"seen with lm-eval 0.4.13: 'x sel' is {alone}, 'x self' {whole}, and the answer 'f' {answer}")
PYTHON
