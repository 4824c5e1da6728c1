#!/usr/bin/env bash
# torch 2.13.0: torch.optim.Muon with bfloat16 parameters and nesterov=False divides its own momentum by
# its norm at every step. Newton-Schulz begins with grad.bfloat16(), which is no copy of a bfloat16 tensor,
# and then divides in place. A momentum of norm 1 outweighs gradients of a small norm: after forty of norm
# near 0.005 it still points along the first. float32 parameters, and nesterov=True, are not affected.
# Changed after 2.13: github.com/pytorch/pytorch/pull/194664.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet --retries 0 torch==2.13.0 numpy \
  --extra-index-url https://download.pytorch.org/whl/cpu
"$work/venv/bin/python" - <<'PYTHON'
import torch


def momentum(dtype, nesterov):
    """Returns the momentum after 40 steps, and how far it still points along the first gradient."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.nn.Parameter(torch.zeros(8, 4, dtype=dtype))
    optimizer = torch.optim.Muon([weight], nesterov=nesterov)
    grads = 1e-3 * torch.randn(40, 8, 4, generator=generator)
    for grad in grads:
        weight.grad = grad.to(dtype)
        optimizer.step()
    found = optimizer.state[weight]['momentum_buffer'].float().flatten()
    return found.norm(), torch.cosine_similarity(found, grads[0].flatten(), dim=0)


for dtype, nesterov in ((torch.float32, False), (torch.bfloat16, True)):
    norm, along_first = momentum(dtype, nesterov)
    assert norm < 0.01 and abs(along_first) < 0.5, (dtype, nesterov, norm, along_first)
norm, along_first = momentum(torch.bfloat16, False)
assert abs(norm - 1) < 0.02 and along_first > 0.99, f'changed: {norm}, {along_first}'
print(
    f'seen with torch {torch.__version__}: a momentum of norm {norm:.3f} after gradients of norm 0.005, '
    f'cosine with the first of them {along_first:.4f}'
)
PYTHON
