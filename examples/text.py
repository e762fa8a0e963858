"""Language modelling: a small byte-level GPT on Shakespeare, sparse from the first step.

    gapfx sparsify examples/text.py --out runs/text

It trains on nine plays (1.2 MB) that come with this file. `python tools/get_data.py text` fetches all 42 works, which
are then used instead; $TEXT_FILE names any other text. `--entry llama` trains a Llama of Hugging Face instead.
"""

from __future__ import annotations

import lzma
import math
import os
from collections.abc import Iterable
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.data import Dataset

Batch = tuple[Tensor, Tensor]  # bytes [B, T] and the bytes that follow them [B, T]

DATA = Path(__file__).parent / "data"
NUM_BYTES = 256
CONTEXT = 64  # bytes that the model sees
HELD_OUT_SHARE = 0.1  # of the text, from its end: half of it for validation, then half for the test
NUM_HELD_OUT_WINDOWS = 512  # that either takes

# Command-line flags win over these.
defaults = {
    "sparsity": 0.8,
    "groups": 4,
    "rounds": 1,
    "phase_epochs": 0.4,
    "finetune_epochs": 1.2,
    "batch_size": 16,
}


class Block(nn.Module):
    """A pre-norm Transformer block with causal attention and rotary positions: [B, T, D] to [B, T, D]."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.proj = nn.Linear(width, width, bias=False)
        self.norm2 = nn.LayerNorm(width)
        self.fc = nn.Linear(width, 4 * width, bias=False)
        self.out = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor, angles: Tensor) -> Tensor:
        q, k, v = rearrange(self.qkv(self.norm1(x)), "b t (part h d) -> part b h t d", part=3, h=self.num_heads)
        attended = F.scaled_dot_product_attention(rotate(q, angles), rotate(k, angles), v, is_causal=True)
        x = x + self.proj(rearrange(attended, "b h t d -> b t (h d)"))
        return x + self.out(F.relu(self.fc(self.norm2(x))).square())


class GPT(nn.Module):
    """Scores of the next byte at every position: [B, T] to [B, T, 256]."""

    angles: Tensor

    def __init__(self, width: int = 96, num_blocks: int = 4, num_heads: int = 3) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NUM_BYTES, width)
        self.blocks = nn.ModuleList(Block(width, num_heads) for _ in range(num_blocks))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, NUM_BYTES, bias=False)
        frequencies = 10_000 ** -torch.linspace(0, 1, width // num_heads // 2)
        self.register_buffer("angles", torch.outer(torch.arange(CONTEXT), frequencies), persistent=False)
        nn.init.normal_(self.embedding.weight, std=0.1)
        for name, parameter in self.named_parameters():
            if name.endswith(("proj.weight", "out.weight", "head.weight")):
                nn.init.zeros_(parameter)  # every block starts as the identity, every byte as equally likely

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x, self.angles[: tokens.shape[1]])
        return self.head(self.norm(x))


def rotate(x: Tensor, angles: Tensor) -> Tensor:
    """Rotary positions (Su et al., 2021): pairs of features of x [B, H, T, D] turned by angles [T, D / 2]."""
    (a, b), cos, sin = x.chunk(2, -1), angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


class Windows(Dataset[Batch]):
    """Windows of CONTEXT bytes side by side, and the same windows one byte later."""

    def __init__(self, text: Tensor) -> None:
        self.text = text

    def __len__(self) -> int:
        return (len(self.text) - 1) // CONTEXT

    def __getitem__(self, index: int) -> Batch:
        if not 0 <= index < len(self):
            raise IndexError(index)
        window = self.text[index * CONTEXT : (index + 1) * CONTEXT + 1].long()
        return window[:-1], window[1:]


def read_text() -> bytes:
    """The text of $TEXT_FILE, else all works when they were fetched, else the subset."""
    full = DATA / "text-full" / "shakespeare.txt"
    path = Path(os.environ.get("TEXT_FILE") or (full if full.is_file() else DATA / "text" / "shakespeare.txt.xz"))
    return lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()


def model() -> nn.Module:
    return GPT()


def llama() -> nn.Module:
    """Of about the same size, from a configuration of Hugging Face's transformers."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=NUM_BYTES,
        hidden_size=96,
        intermediate_size=256,
        num_hidden_layers=4,
        num_attention_heads=6,
        num_key_value_heads=3,
        max_position_embeddings=CONTEXT,
        use_cache=False,
    )
    return LlamaForCausalLM(config)


def data(split: str) -> Windows:
    text = torch.frombuffer(bytearray(read_text()), dtype=torch.uint8)
    bounds = [int(len(text) * share) for share in (0, 1 - HELD_OUT_SHARE, 1 - HELD_OUT_SHARE / 2, 1)]
    number = ("train", "val", "test").index(split)
    part = text[bounds[number] : bounds[number + 1]]
    return Windows(part if split == "train" else part[: NUM_HELD_OUT_WINDOWS * CONTEXT + 1])


def loss(model: nn.Module, batch: Batch) -> Tensor:
    tokens, following = batch
    scores = model(tokens)
    scores = scores if isinstance(scores, Tensor) else scores.logits  # what models of Hugging Face return holds more
    return F.cross_entropy(scores.flatten(0, 1), following.flatten())


def evaluate(model: nn.Module, loader: Iterable[Batch]) -> dict[str, float]:
    """Mean loss in nats, its exponential, and in bits: what a compressor with this model would need for each byte."""
    total, count = 0.0, 0
    for batch in loader:
        total, count = total + float(loss(model, batch)) * batch[1].numel(), count + batch[1].numel()
    nats = total / count
    return {"bits_per_byte": nats / math.log(2), "perplexity": math.exp(nats), "loss": nats}


def optimizer(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=3e-3, weight_decay=0.1, betas=(0.9, 0.98))
