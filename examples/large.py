"""Models that no laptop holds, to plan: Llama 3.1 405B, and a mixture of experts of the sizes of DeepSeek-V3 (671B).

    gapfx plan examples/large.py --meta --dtype bf16 --zero 3 --ranks 64,256,1024 --memory 80GiB
    gapfx plan examples/large.py --entry deepseek --meta --dtype bf16 --zero 3 --ranks 64,256,1024 --memory 80GiB

With --meta no weight is allocated: shapes are all that a plan needs. The configurations are the public ones.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, LlamaConfig, LlamaForCausalLM

LENGTH = 4096  # tokens of a micro-batch

# Command-line flags win over these.
defaults = {"sparsity": 0.9, "groups": 4, "calibrate": False}


def model() -> nn.Module:
    config = LlamaConfig(
        vocab_size=128_256,
        hidden_size=16_384,
        intermediate_size=53_248,
        num_hidden_layers=126,
        num_attention_heads=128,
        num_key_value_heads=8,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def deepseek() -> nn.Module:
    # Routing by values would need some. Without values, products of groups are known in bf16 alone.
    options: dict[str, Any] = {"use_cache": False, "experts_implementation": "grouped_mm"}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**options)).bfloat16()


def example() -> tuple[Tensor, Tensor]:
    """Tokens, and who sees whom: a mask of four dimensions is taken as it is, without a look at its values."""
    causal = torch.ones(1, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    return torch.zeros(1, LENGTH, dtype=torch.long), causal
