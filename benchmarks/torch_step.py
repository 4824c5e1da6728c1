"""The model of benchmarks/train_step.py in PyTorch, to compare with on the same machine.

    pip install torch && python benchmarks/torch_step.py
    pip install torch transformers && python benchmarks/torch_step.py --model=deepseek

Same sizes, same count of FLOPs: RMSNorm, RoPE, scaled_dot_product_attention, SwiGLU, tied head,
AdamW (fused), clipping; float32. 'deepseek' is the transformers package's DeepSeek-V3, with
experts in the last four of the 8 layers; its FLOPs are not counted. With MALLOC_MMAP_THRESHOLD_,
MALLOC_TRIM_THRESHOLD_ and MALLOC_TOP_PAD_ set to 4294967296, which keeps glibc from returning
memory, it is up to 20 % faster. beside_torch.py runs it beside this project's step.
"""

import argparse
import json
import time

import torch
import torch.nn.functional as F
from torch import nn

B, T, V, D, HEADS, LAYERS, FF = 16, 256, 8192, 256, 4, 8, 688


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention_norm, self.ff_norm = nn.RMSNorm(D), nn.RMSNorm(D)
        self.qkv, self.out = nn.Linear(D, 3 * D, bias=False), nn.Linear(D, D, bias=False)
        self.gate_up, self.down = nn.Linear(D, 2 * FF, bias=False), nn.Linear(FF, D, bias=False)

    def forward(self, x, cos, sin):
        q, k, v = self.qkv(self.attention_norm(x)).view(B, T, 3, HEADS, D // HEADS).unbind(2)
        q, k, v = (y.transpose(1, 2) for y in (q, k, v))
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).reshape(B, T, D))
        gate, up = self.gate_up(self.ff_norm(x)).chunk(2, dim=-1)
        return x + self.down(F.silu(gate) * up)


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(V, D)
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
        self.norm = nn.RMSNorm(D)
        half = D // HEADS // 2
        angle = torch.arange(T)[:, None] / 10_000 ** (torch.arange(half) / half)
        self.register_buffer('cos', angle.cos())
        self.register_buffer('sin', angle.sin())

    def forward(self, tokens, targets):
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        logits = F.linear(self.norm(x), self.embed.weight)
        return F.cross_entropy(logits.view(-1, V), targets.reshape(-1))


class DeepSeek(nn.Module):
    """As `train_step.py --block=dense,moe --attention=mla`, but for the order of the layers."""

    def __init__(self):
        super().__init__()
        from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

        config = DeepseekV3Config(
            vocab_size=V, hidden_size=D, intermediate_size=FF, num_hidden_layers=LAYERS,
            first_k_dense_replace=LAYERS // 2, moe_intermediate_size=512, n_routed_experts=8,
            num_experts_per_tok=2, n_shared_experts=1, n_group=1, topk_group=1,
            num_attention_heads=HEADS, num_key_value_heads=HEADS, q_lora_rank=None,
            kv_lora_rank=64, qk_nope_head_dim=32, qk_rope_head_dim=32, v_head_dim=64,
            tie_word_embeddings=True, use_cache=False, attn_implementation='sdpa',
        )  # fmt: skip
        self.model = DeepseekV3ForCausalLM(config)

    def forward(self, tokens, targets):
        logits = self.model(tokens).logits
        return F.cross_entropy(logits.view(-1, V), targets.reshape(-1))


def matmul_flops_per_second(n: int = 2048, repeats: int = 5) -> float:
    a, b = torch.randn(n, n), torch.randn(n, n)
    best = float('inf')
    for _ in range(repeats):
        start = time.perf_counter()
        torch.mm(a, b)
        best = min(best, time.perf_counter() - start)
    return 2 * n**3 / best


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--model', choices=('dense', 'deepseek'), default='dense')
    parser.add_argument('--steps', type=int, default=10)
    parser.add_argument('--json', action='store_true')
    args = parser.parse_args()
    torch.manual_seed(0)
    model = Model() if args.model == 'dense' else DeepSeek()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, weight_decay=0.1, fused=True)
    tokens = torch.randint(V, (B, T + 1))

    def step():
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    seconds = []
    for _ in range(args.steps + 2):
        start = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - start)
    n_parameters = sum(p.numel() for p in model.parameters())
    rate = B * T / min(seconds[2:])
    peak = matmul_flops_per_second()
    result = {
        'parameters': n_parameters,
        'tokens_per_second': rate,
        'median_tokens_per_second': B * T / sorted(seconds[2:])[args.steps // 2],
        'matmul_gflops': peak / 1e9,
    }
    if args.model == 'dense':
        flops = (6 * n_parameters + 6 * LAYERS * D * T) * rate
        result |= {'model_gflops': flops / 1e9, 'share_of_matmul_rate': flops / peak}
    for name, value in result.items():
        print(f'{name:>30}  {value:,.3f}')
    if args.json:
        print(json.dumps(result))


if __name__ == '__main__':
    main()
