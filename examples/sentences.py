"""Sentences as points: a trained MiniLM made sparse, so that its sentences stay where the dense model puts them.

    python tools/get_data.py minilm --out minilm
    MINILM_DIR=minilm gapfx sparsify examples/sentences.py --init minilm/model.safetensors --out runs/sentences

$MINILM_DIR names the folder. Without it a small random BERT learns to keep its own points of lines of Shakespeare,
which shows the way and no more. Quality is told in three ways. `retrieval`: of all second sentences of the held-out
pairs, how often the one nearest to a first sentence is the one that follows it in its paragraph; `mrr` is the mean of
1 / its rank. `fidelity`: the rank correlation of all cosines between first and second sentences with those of the dense
model. `human`: the correlation of cosines between 50 documents with how alike people found them (Lee et al., 2005).
"""

from __future__ import annotations

import hashlib
import lzma
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset
from transformers import BertConfig, BertModel

from gapfx.errors import TaskError

Sentence = tuple[Tensor, Tensor]  # tokens [T], and the point [D] that the dense model puts it to
Batch = tuple[
    Tensor, Tensor
]  # tokens [B, T], padded, and points [B, D]; of pairs the first, the second, the first, ...

SUBSET = Path(__file__).parent / "data" / "text" / "shakespeare.txt.xz"
PAD = 0
MAX_TOKENS, MAX_DOCUMENT_TOKENS = 32, 64
NUM_PAIRS = {"val": 128, "test": 700}
SHAKESPEARE = {"train": (0, 512), "val": (2_000, 2_064), "test": (3_000, 3_064)}  # lines
FILES = ("model.safetensors", "config.json", "tokenizer.json", "train.txt", "val.txt", "test.txt")

# Command-line flags win over these.
defaults = {
    "sparsity": 0.8,
    "groups": 3,
    "rounds": 1,
    "phase_epochs": 0.07,
    "finetune_epochs": 0.28,
    "batch_size": 16,
    "dense": ["pooler.*"],  # it is in the files, and the points do not come from it
    "growth": "saved",
}


def folder() -> Path | None:
    """$MINILM_DIR. Raises TaskError when it does not hold the model and the text."""
    if not (name := os.environ.get("MINILM_DIR")):
        return None
    if missing := [file for file in FILES if not (Path(name) / file).is_file()]:
        fix = "run `python tools/get_data.py minilm --out FOLDER` and set MINILM_DIR to that folder"
        raise TaskError(f"there is no {missing[0]} in $MINILM_DIR", where=name, fix=fix)
    return Path(name)


def model() -> nn.Module:
    """The architecture. Weights come by `--init`; without, they are random."""
    place = folder()
    config = BertConfig.from_json_file(place / "config.json") if place else tiny()
    # Dropout would move the points that are to stay.
    config.hidden_dropout_prob = config.attention_probs_dropout_prob = 0.0
    return BertModel(config)


def tiny() -> BertConfig:
    return BertConfig(vocab_size=256, hidden_size=48, num_hidden_layers=3, num_attention_heads=3, intermediate_size=96)


def dense_model() -> nn.Module:
    """The model whose points are kept."""
    place = folder()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found = model()
    if place:
        found.load_state_dict(load_file(place / "model.safetensors"), strict=False)  # it holds a buffer more
    return found.eval()


def embed(model: nn.Module, tokens: Tensor) -> Tensor:
    """Points of length 1 of tokens [B, T]: the mean over what is not padded, [B, D]."""
    is_token = tokens != PAD
    hidden = model(input_ids=tokens, attention_mask=is_token.long()).last_hidden_state
    total = (hidden * is_token[..., None]).sum(1)
    return F.normalize(total.float(), dim=-1)  # the mean and the sum have one direction


class Tokens:
    """Tokens of texts: those of the model, or bytes where there is none."""

    def __init__(self, limit: int) -> None:
        self.limit, place = limit, folder()
        self.tokenizer = Tokenizer.from_file(str(place / "tokenizer.json")) if place else None
        if self.tokenizer:
            self.tokenizer.no_padding()
            self.tokenizer.enable_truncation(limit)

    def __call__(self, texts: Sequence[str]) -> list[Tensor]:
        if self.tokenizer:
            return [torch.tensor(text.ids) for text in self.tokenizer.encode_batch(list(texts))]
        return [torch.tensor(list(text.encode()[: self.limit])) for text in texts]


class Sentences(Dataset[list[Sentence]]):
    """Sentences in ones, for training, or in pairs of which the second follows the first, with their points."""

    def __init__(self, lines: Sequence[Sequence[str]], points: Tensor) -> None:
        texts = [text for line in lines for text in line]
        self.tokens, self.points, self.size = Tokens(MAX_TOKENS)(texts), points, len(lines[0])

    def __len__(self) -> int:
        return len(self.tokens) // self.size

    def __getitem__(self, index: int) -> list[Sentence]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        first = index * self.size
        return [(self.tokens[i], self.points[i]) for i in range(first, first + self.size)]


def data(split: str) -> Sentences:
    lines = lines_of(split)
    return Sentences(lines, points_of([text for line in lines for text in line]))


def lines_of(split: str) -> list[list[str]]:
    """The sentences of each line of a split: one, or two that follow each other."""
    if place := folder():
        found = (place / f"{split}.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
        return [line.split("\t") for line in found[: NUM_PAIRS.get(split)]]
    start, stop = SHAKESPEARE[split]
    texts = [line for line in lzma.decompress(SUBSET.read_bytes()).decode().splitlines() if len(line) > 20]
    size = 1 if split == "train" else 2
    return [texts[index : index + size] for index in range(start, stop, size)]


def points_of(texts: Sequence[str]) -> Tensor:
    """Points of the dense model [N, D]; those of a folder are kept in a file there, named after model and text."""
    if not (place := folder()):
        return all_points(dense_model(), Tokens(MAX_TOKENS)(texts))
    model_file = (place / "model.safetensors").stat()
    named = "\n".join((f"{model_file.st_size} {model_file.st_mtime_ns} {MAX_TOKENS}", *texts))
    path = place / f"points-{hashlib.sha256(named.encode()).hexdigest()[:12]}.safetensors"
    if not path.is_file():
        part = path.with_suffix(f".{os.getpid()}")  # several ranks may be at it, and each makes the same
        save_file({"points": all_points(dense_model(), Tokens(MAX_TOKENS)(texts))}, part)
        part.replace(path)
    return load_file(path)["points"]


def all_points(model: nn.Module, tokens: Sequence[Tensor], device: torch.device | None = None) -> Tensor:
    """Points of sentences of any lengths, [N, D]."""
    order = sorted(range(len(tokens)), key=lambda index: len(tokens[index]))
    with torch.no_grad():
        found = [embed(model, padded([tokens[i] for i in part]).to(device)) for part in parts(order)]
    return torch.cat(found)[torch.tensor(order).argsort()]


def parts(order: Sequence[int], size: int = 16) -> Iterator[Sequence[int]]:
    return (order[start : start + size] for start in range(0, len(order), size))


def padded(tokens: Sequence[Tensor]) -> Tensor:
    return pad_sequence(list(tokens), batch_first=True, padding_value=PAD)


def collate(samples: Sequence[Sequence[Sentence]]) -> Batch:
    tokens, points = zip(*(sentence for sample in samples for sentence in sample), strict=True)
    return padded(tokens), torch.stack(points)


def loss(model: nn.Module, batch: Batch) -> Tensor:
    """One minus the cosine to the point of the dense model."""
    tokens, points = batch
    return 1 - F.cosine_similarity(embed(model, tokens), points).mean()


def evaluate(model: nn.Module, loader: Iterable[Batch]) -> dict[str, float]:
    found, wanted = list[Tensor](), list[Tensor]()
    device = torch.device("cpu")
    for tokens, points in loader:
        found.append(embed(model, tokens))
        wanted.append(points)
        device = tokens.device
    ours, theirs = torch.cat(found), torch.cat(wanted)
    cosines, dense_cosines = (points[::2] @ points[1::2].T for points in (ours, theirs))
    ranks = (cosines > cosines.diagonal()[:, None]).sum(1) + 1
    metrics = {
        "retrieval": float((ranks == 1).float().mean()),
        "mrr": float((1 / ranks.float()).mean()),
        "fidelity": correlation(places(cosines.flatten()), places(dense_cosines.flatten())),
        "loss": float(1 - F.cosine_similarity(ours, theirs).mean()),
    }
    return metrics | human(model, device)


def human(model: nn.Module, device: torch.device) -> dict[str, float]:
    """How well cosines between documents go with what people said; nothing without the documents."""
    place = folder()
    if place is None or not (place / "lee.txt").is_file():
        return {}
    texts = (place / "lee.txt").read_text(encoding="utf-8").splitlines()
    rows = (place / "lee-similarities.txt").read_text().splitlines()
    told = torch.tensor([[float(number) for number in row.split()] for row in rows])
    points = all_points(model, Tokens(MAX_DOCUMENT_TOKENS)(texts), device).cpu()
    above = torch.ones_like(told).triu(1).bool()
    return {"human": correlation((points @ points.T)[above], told[above])}


def correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack((a.double(), b.double())))[0, 1])


def places(values: Tensor) -> Tensor:
    """The place of each value in their order; equal values share the mean of theirs."""
    _, which, counts = values.unique(return_inverse=True, return_counts=True)
    return (counts.cumsum(0) - (counts - 1) / 2)[which]


def optimizer(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(params, lr=1e-3, weight_decay=0.0, fused=True)
