"""Speed of the training step of benchmarks/train_step.py's model in PyTorch, on the same machine.

    pip install torch && python benchmarks/torch_step.py
    pip install torch transformers && python benchmarks/torch_step.py --model=deepseek

Same sizes, same count of FLOPs: RMSNorm, RoPE, scaled_dot_product_attention, SwiGLU, tied head,
AdamW (fused), clipping; float32. 'deepseek' is the transformers package's DeepSeek-V3, with
experts in the last four of the 8 layers; its FLOPs are not counted. With MALLOC_MMAP_THRESHOLD_,
MALLOC_TRIM_THRESHOLD_ and MALLOC_TOP_PAD_ set to 4294967296, which keeps glibc from returning
memory, it is up to 20 % faster. beside_torch.py runs it beside this project's step.
"""

import functools
import statistics
import sys

from absl import flags
from common import Figures, need, run, timed

try:
    import torch
    from torch import Tensor, nn
    from torch.nn import functional
except ImportError as error:
    sys.exit(f'PyTorch cannot be imported ({error}): pip install torch')

FLAGS = flags.FLAGS
B, T, V, D, N, L, F = 16, 256, 8192, 256, 4, 8, 688


def rotate(x_BNTH: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Returns the queries or keys with their rotary position embedding."""
    a, b = x_BNTH.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Block(nn.Module):
    """One pre-norm layer: attention of N heads and a SwiGLU."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.ff_norm = nn.RMSNorm(D), nn.RMSNorm(D)
        self.qkv, self.out = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
        self.gate_up, self.down = nn.Linear(D, 2 * F, bias=False), nn.Linear(F, D, bias=False)

    def forward(self, x_BTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        qkv = self.qkv(self.attention_norm(x_BTD)).view(B, T, 3, N, D // N).unbind(2)
        q_BNTH, k_BNTH, v_BNTH = (x_BTNH.transpose(1, 2) for x_BTNH in qkv)
        q_BNTH, k_BNTH = rotate(q_BNTH, cos, sin), rotate(k_BNTH, cos, sin)
        y_BNTH = functional.scaled_dot_product_attention(q_BNTH, k_BNTH, v_BNTH, is_causal=True)
        x_BTD = x_BTD + self.out(y_BNTH.transpose(1, 2).reshape(B, T, D))
        gate_BTF, up_BTF = self.gate_up(self.ff_norm(x_BTD)).chunk(2, dim=-1)
        return x_BTD + self.down(functional.silu(gate_BTF) * up_BTF)


class Model(nn.Module):
    """The dense model: (inputs, targets), both int64 [B, T] -> mean cross-entropy."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, D)
        self.blocks = nn.ModuleList(Block() for _ in range(L))
        self.norm = nn.RMSNorm(D)
        half = D // N // 2
        angle = torch.arange(T)[:, None] / 10_000 ** (torch.arange(half) / half)
        self.register_buffer('cos', angle.cos())
        self.register_buffer('sin', angle.sin())

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        x_BTD = self.embed(tokens_BT)
        for block in self.blocks:
            x_BTD = block(x_BTD, self.cos, self.sin)
        logits_BTV = functional.linear(self.norm(x_BTD), self.embed.weight)
        return functional.cross_entropy(logits_BTV.view(-1, V), targets_BT.reshape(-1))


class DeepSeek(nn.Module):
    """The model of `train_step.py --block=dense,moe --attention=mla`, but with all dense layers
    first: (inputs, targets), both int64 [B, T] -> mean cross-entropy."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

        config = DeepseekV3Config(
            vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=L,
            first_k_dense_replace=L // 2, moe_intermediate_size=512, n_routed_experts=8,
            num_experts_per_tok=2, n_shared_experts=1, n_group=1, topk_group=1,
            num_attention_heads=N, num_key_value_heads=N, q_lora_rank=None,
            kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=64,
            tie_word_embeddings=True, use_cache=False, attn_implementation='sdpa',
        )  # fmt: skip
        self.model = DeepseekV3ForCausalLM(config)

    def forward(self, tokens_BT: Tensor, targets_BT: Tensor) -> Tensor:
        logits_BTV = self.model(tokens_BT).logits
        return functional.cross_entropy(logits_BTV.view(-1, V), targets_BT.reshape(-1))


def matmul_flops_per_second(n: int = 2048, repeats: int = 5) -> float:
    """Returns the FLOP/s of the fastest of several float32 matmuls of n x n."""
    a, b = torch.randn(n, n), torch.randn(n, n)
    return 2 * n**3 / min(timed(torch.mm, a, b)[0] for _ in range(repeats))


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, tokens_BT: Tensor) -> float:
    """Makes one step on int64 [B, T + 1] and returns its loss."""
    loss = model(tokens_BT[:, :-1], tokens_BT[:, 1:])
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return loss.item()


def main() -> Figures:
    if FLAGS.model == 'deepseek':
        need('transformers')
    torch.manual_seed(0)
    model = Model() if FLAGS.model == 'dense' else DeepSeek()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1, fused=True)
    step = functools.partial(train_step, model, optimizer, torch.randint(V, (B, T + 1)))
    seconds = [timed(step)[0] for _ in range(FLAGS.steps + 2)][2:]
    n_parameters = sum(p.numel() for p in model.parameters())
    rate = B * T / min(seconds)
    peak = matmul_flops_per_second()
    figures: Figures = {
        'parameters': n_parameters,
        'tokens_per_second': rate,
        'median_tokens_per_second': B * T / statistics.median_high(seconds),
        'matmul_gflops': peak / 1e9,
    }
    if FLAGS.model == 'dense':
        flops = (6 * n_parameters + 6 * L * D * T) * rate
        figures |= {'model_gflops': flops / 1e9, 'share_of_matmul_rate': flops / peak}
    return figures


if __name__ == '__main__':
    flags.DEFINE_enum('model', 'dense', ['dense', 'deepseek'], 'The model.')
    flags.DEFINE_integer('steps', 10, 'Steps, after two that warm up.', lower_bound=1)
    run(main)
