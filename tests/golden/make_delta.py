"""Writes delta.npz: Gated DeltaNet and Kimi Delta Attention by transformers' layers.

    pip install torch transformers && python tests/golden/make_delta.py

Each kind has its weights by the names there, an input [B, T, D], the output, a gradient of it, and
the gradients of input and weights, all float32.
"""

import importlib.metadata
import pathlib
import platform

import numpy as np
import torch
from transformers.models.kimi_linear.configuration_kimi_linear import KimiLinearConfig
from transformers.models.kimi_linear.modeling_kimi_linear import KimiLinearDeltaAttention
from transformers.models.qwen3_next.configuration_qwen3_next import Qwen3NextConfig
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

B, T, D = 1, 24, 8
KEY_HEADS, HEADS, HEAD = 2, 4, 4


def layers() -> dict[str, torch.nn.Module]:
    qwen = Qwen3NextConfig(
        hidden_size=D, num_hidden_layers=1, linear_num_key_heads=KEY_HEADS,
        linear_num_value_heads=HEADS, linear_key_head_dim=HEAD, linear_value_head_dim=HEAD,
        layer_types=['linear_attention'], rms_norm_eps=1e-5,
    )  # fmt: skip
    kimi = KimiLinearConfig(
        hidden_size=D, num_hidden_layers=1, linear_num_heads=HEADS, linear_head_dim=HEAD,
        layer_types=['linear_attention'], mlp_layer_types=['dense'], rms_norm_eps=1e-5,
    )  # fmt: skip
    return {'gdn': Qwen3NextGatedDeltaNet(qwen, 0), 'kda': KimiLinearDeltaAttention(kimi, 0)}


def arrays(layer: torch.nn.Module) -> dict[str, np.ndarray]:
    """Draws weights, and returns them, input, output and gradients."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    for name, p in layer.named_parameters():
        fan_in = p.shape[-1] if p.ndim > 1 else 1
        p.data = draw(*p.shape) / fan_in**0.5 + (1 if name.endswith('norm.weight') else 0)
    x = draw(B, T, D).requires_grad_()
    out, d_out = layer(x), draw(B, T, D)
    out.backward(d_out)
    found = {'x': x, 'out': out, 'd_out': d_out, 'd_x': x.grad}
    for name, p in layer.named_parameters():
        found |= {f'w.{name}': p, f'd.{name}': p.grad}
    return {name: t.detach().numpy() for name, t in found.items()}


if __name__ == '__main__':
    versions = [f'{n} {importlib.metadata.version(n)}' for n in ('torch', 'transformers')]
    golden = {'versions': np.array([*versions, f'python {platform.python_version()}'])}
    for kind, layer in layers().items():
        golden |= {f'{kind}.{name}': x for name, x in arrays(layer).items()}
    np.savez_compressed(pathlib.Path(__file__).with_name('delta.npz'), **golden)
