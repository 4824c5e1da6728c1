"""Writes quantized.safetensors: weights in float8 and MXFP4, and what transformers takes them for.

    pip install torch transformers safetensors && python tests/golden/make_quantized.py

'fp8.weight' has factors for blocks of 8 rows and 16 columns, the last ones smaller; 'mxfp4' are two
experts. What transformers makes of them, in bfloat16, begins with 'want.'. Made by Python 3.11.7,
torch 2.13.0, transformers 5.24.0 and safetensors 0.8.0.
"""

import pathlib

import torch
from safetensors.torch import save_file
from transformers.integrations.finegrained_fp8 import _dequantize_fp8_weight
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

SEED = 0
BLOCK = [8, 16]


def main() -> None:
    torch.manual_seed(SEED)
    weight = (torch.randn(21, 40) * 50).to(torch.float8_e4m3fn)
    factors = torch.rand(3, 3) * 1e-2
    blocks = torch.randint(0, 256, (2, 6, 2, 16), dtype=torch.uint8)
    scales = torch.randint(110, 130, (2, 6, 2), dtype=torch.uint8)
    tensors = {
        'fp8.weight': weight,
        'fp8.weight_scale_inv': factors,
        'want.fp8': _dequantize_fp8_weight(weight, factors, BLOCK, torch.float32).bfloat16(),
        'mxfp4_blocks': blocks,
        'mxfp4_scales': scales,
        'want.mxfp4': convert_moe_packed_tensors(blocks, scales).contiguous(),
    }
    save_file(tensors, pathlib.Path(__file__).with_name('quantized.safetensors'))


if __name__ == '__main__':
    main()
