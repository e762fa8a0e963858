"""Translation from English to German: a Transformer on sentences of software manuals, sparse from the first step.

    python tools/get_data.py translation
    gapfx sparsify examples/translation.py --out runs/translation

$TRANSLATION_DIR names another folder with train.en, train.de, val.en and val.de, one sentence a line, as of WMT.
`--entry transformer_big` is the model of the paper; give it $TRANSLATION_SUBWORDS=32000 with WMT.
$TRANSLATION_MAX_TOKENS=30 trains on shorter sentences alone: a batch is as long as its longest.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import cast

import sacrebleu
import torch
import torch.nn.functional as F
from einops import rearrange
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from gapfx.errors import TaskError

Pair = tuple[Tensor, Tensor]  # subwords [S] of a sentence and [T] of its translation
Batch = tuple[Tensor, Tensor]  # the same, padded: [B, S] and [B, T]
KeysValues = tuple[Tensor, Tensor]  # each [B, heads, S, D / heads]
Step = Callable[[Tensor, Tensor], Tensor]

DATA = Path(__file__).parent / "data" / "translation-full"
PAD, START, END = range(3)
NUM_SUBWORDS = int(os.environ.get("TRANSLATION_SUBWORDS", "4000"))  # of both languages together
MAX_TOKENS = int(os.environ.get("TRANSLATION_MAX_TOKENS", "100"))  # longer pairs are not trained on
WARM_UP = 4000  # steps; with `--phase-lr restart`, as in the paper, at the start of every phase
SMOOTHING = 0.1
BEAM, LENGTH_PENALTY = 4, 0.6
NUM_TRANSLATED = 200  # validation sentences that BLEU is taken of: a beam search is slow

# Command-line flags win over these.
defaults = {
    "sparsity": 0.8,
    "groups": 3,
    "rounds": 1,
    "phase_epochs": 1,
    "finetune_epochs": 3,
    "batch_size": 64,
}


class Attention(nn.Module):
    """Attention of x [B, T, D] over `memory` [B, S, D]: [B, T, D]. `mask` is True where it may look."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.q, self.k, self.v, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor, memory: Tensor, mask: Tensor | None = None) -> Tensor:
        # Without a mask it is the decoder over itself: padding comes last, where no earlier token looks.
        return self.attend(x, self.keys_values(memory), mask, is_causal=mask is None)

    def keys_values(self, memory: Tensor) -> KeysValues:
        return self.split(self.k(memory)), self.split(self.v(memory))

    def attend(self, x: Tensor, memory: KeysValues, mask: Tensor | None = None, *, is_causal: bool = False) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        q = self.split(self.q(x))
        attended = F.scaled_dot_product_attention(q, *memory, mask, dropout, is_causal=is_causal)
        return self.out(rearrange(attended, "b h t d -> b t (h d)"))

    def split(self, x: Tensor) -> Tensor:
        return rearrange(x, "b t (h d) -> b h t d", h=self.num_heads)


class Layer(nn.Module):
    """A pre-norm layer of the encoder, or of the decoder with a `memory` [B, S, D]: [B, T, D] to [B, T, D]."""

    def __init__(self, width: int, hidden: int, num_heads: int, dropout: float, *, is_decoder: bool) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, num_heads, dropout)
        if is_decoder:
            self.norm2, self.cross = nn.LayerNorm(width), Attention(width, num_heads, dropout)
        self.norm3 = nn.LayerNorm(width)
        self.fc1, self.fc2 = nn.Linear(width, hidden), nn.Linear(hidden, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor, memory: Tensor | None = None) -> Tensor:
        y = self.norm1(x)
        x = x + self.dropout(self.attention(y, y, mask if memory is None else None))
        if memory is not None:
            x = x + self.dropout(self.cross(self.norm2(x), memory, mask))
        return x + self.dropout(self.fc2(self.dropout(F.relu(self.fc1(self.norm3(x))))))

    def extend(self, x: Tensor, own: KeysValues | None, cross: KeysValues, mask: Tensor) -> tuple[Tensor, KeysValues]:
        """What the decoder makes of one more token x [B, 1, D], and `own`, the keys and values of all so far."""
        y = self.norm1(x)
        new = self.attention.keys_values(y)
        own = new if own is None else (torch.cat((own[0], new[0]), 2), torch.cat((own[1], new[1]), 2))
        x = x + self.attention.attend(y, own)
        x = x + self.cross.attend(self.norm2(x), cross, mask)
        return x + self.fc2(F.relu(self.fc1(self.norm3(x)))), own


class Transformer(nn.Module):
    """Scores of the next subword of the translation: [B, S] and [B, T] to [B, T, NUM_SUBWORDS]."""

    def __init__(self, width: int, hidden: int, num_heads: int, num_layers: int, dropout: float = 0.1) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NUM_SUBWORDS, width)
        self.enc = nn.ModuleList(Layer(width, hidden, num_heads, dropout, is_decoder=False) for _ in range(num_layers))
        self.enc_norm = nn.LayerNorm(width)
        self.dec = nn.ModuleList(Layer(width, hidden, num_heads, dropout, is_decoder=True) for _ in range(num_layers))
        self.dec_norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, NUM_SUBWORDS, bias=False)
        self.dropout = nn.Dropout(dropout)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.xavier_uniform_(parameter)
        nn.init.normal_(self.embedding.weight, std=width**-0.5)
        self.head.weight = self.embedding.weight

    def encode(self, source: Tensor) -> Tensor:
        x, mask = self.embed(source), is_token(source)
        for layer in self.enc:
            x = layer(x, mask)
        return self.enc_norm(x)

    def decode(self, source: Tensor, memory: Tensor, target: Tensor) -> Tensor:
        x, mask = self.embed(target), is_token(source)
        for layer in self.dec:
            x = layer(x, mask, memory)
        return self.dec_norm(x)

    def embed(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        return self.dropout(x * math.sqrt(x.shape[-1]) + positions(x))

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        return self.head(self.decode(source, self.encode(source), target))


def is_token(tokens: Tensor) -> Tensor:
    """The attention mask of padded tokens [B, S]: [B, 1, 1, S]."""
    return (tokens != PAD)[:, None, None, :]


def positions(x: Tensor) -> Tensor:
    """Sines and cosines of the positions (Vaswani et al., 2017) of x [B, T, D]: [T, D]."""
    places = torch.arange(x.shape[1], device=x.device, dtype=torch.float32)
    frequencies = 10_000 ** -torch.linspace(0, 1, x.shape[2] // 2, device=x.device)
    angles = torch.outer(places, frequencies)
    return torch.cat((angles.sin(), angles.cos()), -1).to(x.dtype)


def model() -> nn.Module:
    return Transformer(width=128, hidden=512, num_heads=4, num_layers=3)


def transformer_big() -> nn.Module:
    return Transformer(width=1024, hidden=4096, num_heads=16, num_layers=6)


class Pairs(Dataset[Pair]):
    """Subwords of sentences and of their translations; these start with START, and both end with END."""

    def __init__(self, folder: Path, split: str) -> None:
        english, german = (read_lines(folder, split, side) for side in ("en", "de"))
        if len(english) != len(german):
            what = f"{split}.en has {len(english):,} lines, and {split}.de has {len(german):,}"
            raise TaskError(what, where=str(folder), fix="line by line, one must be the translation of the other")
        tokenizer = subwords(folder)
        sides = [[text.ids for text in tokenizer.encode_batch(lines)] for lines in (english, german)]
        limit = MAX_TOKENS if split == "train" else math.inf
        self.pairs = [(en, de) for en, de in zip(*sides, strict=True) if max(len(en), len(de)) < limit]

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> Pair:
        source, target = self.pairs[index]
        return torch.tensor([*source, END]), torch.tensor([START, *target, END])


def data_folder() -> Path:
    """$TRANSLATION_DIR, else what was fetched. Raises TaskError when nothing was."""
    folder = Path(os.environ.get("TRANSLATION_DIR") or DATA)
    missing = [name for name in ("train.en", "train.de", "val.en", "val.de") if not (folder / name).is_file()]
    if missing:
        fix = "run `python tools/get_data.py translation`, or set TRANSLATION_DIR to a folder with such files"
        raise TaskError(f"there is no {missing[0]} to translate", where=str(folder), fix=fix)
    return folder


def read_lines(folder: Path, split: str, side: str) -> list[str]:
    text = (folder / f"{split}.{side}").read_bytes().decode()
    return text.removesuffix("\n").split("\n")  # not splitlines: rarer separators stand within sentences


def subwords(folder: Path) -> Tokenizer:
    """Byte-pair encoding of the training text, kept in a file beside it that is named after text and size."""
    text = [line for side in ("en", "de") for line in read_lines(folder, "train", side)]
    digest = hashlib.sha256("\n".join(text).encode()).hexdigest()[:12]
    path = folder / f"subwords-{NUM_SUBWORDS}-{digest}.json"
    if not path.is_file():
        part = path.with_suffix(f".{os.getpid()}")  # several ranks may be at it, and each makes the same
        trained_subwords(text).save(str(part))
        part.replace(path)
    return Tokenizer.from_file(str(path))


def trained_subwords(text: Iterable[str]) -> Tokenizer:
    """Byte-level, so that every text can be written with it and read back unchanged."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_SUBWORDS,
        special_tokens=["<pad>", "<start>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(text, trainer)
    return tokenizer


def data(split: str) -> Pairs:
    return Pairs(data_folder(), split)


def collate(samples: list[Pair]) -> Batch:
    source, target = (
        pad_sequence(list(side), batch_first=True, padding_value=PAD) for side in zip(*samples, strict=True)
    )
    return source, target


def loss(model: nn.Module, batch: Batch) -> Tensor:
    return token_loss(model, batch, SMOOTHING) / num_targets(batch)


def token_loss(model: nn.Module, batch: Batch, smoothing: float) -> Tensor:
    """Sum of the cross-entropy over all subwords of the translations, END among them."""
    source, target = batch
    scores = model(source, target[:, :-1]).flatten(0, 1).float()
    following = target[:, 1:].flatten()
    return F.cross_entropy(scores, following, ignore_index=PAD, label_smoothing=smoothing, reduction="sum")


def num_targets(batch: Batch) -> Tensor:
    return (batch[1][:, 1:] != PAD).sum()


def evaluate(model: Transformer, loader: Iterable[Batch]) -> dict[str, float]:
    """Lower-cased BLEU of the first translations, and the mean loss in nats per subword, without smoothing."""
    total, count, translated, references = 0.0, 0, list[list[int]](), list[list[int]]()
    for batch in loader:
        total, count = total + float(token_loss(model, batch, 0)), count + int(num_targets(batch))
        if (room := NUM_TRANSLATED - len(translated)) > 0:
            translated += translate(model, batch[0][:room])
            references += batch[1][:room].tolist()
    tokenizer = subwords(data_folder())
    texts = [tokenizer.decode_batch(lines) for lines in (translated, references)]
    bleu = sacrebleu.corpus_bleu(texts[0], [texts[1]], lowercase=True, force=True)
    return {"bleu": bleu.score, "loss": total / count}


def translate(model: Transformer, source: Tensor, beam: int = BEAM) -> list[list[int]]:
    """The best translation of each sentence of source [B, S], without START, END and padding."""
    sources = source.repeat_interleave(beam, 0)
    limits = (source != PAD).sum(1) * 3 // 2 + 10
    found = beam_search(Decoding(model, sources), torch.full_like(source[:, :1], START), limits, beam).tolist()
    return [list(itertools.takewhile(lambda token: token > END, tokens[1:])) for tokens in found]


class Decoding:
    """What follows the beginnings of translations of source [B, S], by one pass over each token."""

    def __init__(self, model: Transformer, source: Tensor) -> None:
        self.model, self.mask = model, is_token(source)
        memory = model.encode(source)
        self.layers = [cast(Layer, layer) for layer in model.dec]
        self.cross = [layer.cross.keys_values(memory) for layer in self.layers]
        self.own: list[KeysValues | None] = [None] * len(self.layers)

    def __call__(self, tokens: Tensor, rows: Tensor) -> Tensor:
        x = self.model.embed(tokens)[:, -1:]
        for index, layer in enumerate(self.layers):
            own = self.own[index]
            past = None if own is None else (own[0][rows], own[1][rows])
            x, self.own[index] = layer.extend(x, past, self.cross[index], self.mask)
        return self.model.head(self.model.dec_norm(x))[:, 0].float().log_softmax(-1)


def beam_search(step: Step, start: Tensor, limits: Tensor, beam: int) -> Tensor:
    """The sequences of the highest log-probability by length ** LENGTH_PENALTY that a search finds: [B, T].

    It goes on from start [B, 1] up to limits [B] more tokens; what ends earlier is padded. `step` gives the
    log-probabilities [B * beam, V] of what follows tokens [B * beam, T], which continue its rows [B * beam] so far.
    """
    num_rows = len(start)
    first_rows = torch.arange(num_rows, device=start.device)[:, None] * beam
    tokens, rows = start.repeat_interleave(beam, 0), torch.arange(num_rows * beam, device=start.device)
    lengths = torch.zeros(num_rows, beam, device=start.device)
    total = lengths.index_fill(1, torch.arange(1, beam, device=start.device), -math.inf)  # all beams begin alike
    for count in range(int(limits.max())):
        is_ended = (tokens[:, -1] == END) | (tokens[:, -1] == PAD)
        is_ended = is_ended.view(num_rows, beam) | (count >= limits[:, None])
        if is_ended.all():
            break
        scores = step(tokens, rows).view(num_rows, beam, -1)
        scores = total[..., None] + only_padding_after_end(scores, is_ended)
        lengths = lengths + ~is_ended
        chosen = (scores / lengths[..., None] ** LENGTH_PENALTY).flatten(1).topk(beam).indices
        total, parents = scores.flatten(1).gather(1, chosen), chosen // scores.shape[-1]
        lengths, rows = lengths.gather(1, parents), (parents + first_rows).flatten()
        tokens = torch.cat((tokens[rows], (chosen % scores.shape[-1]).view(-1, 1)), 1)
    return tokens.view(num_rows, beam, -1)[:, 0]


def only_padding_after_end(scores: Tensor, is_ended: Tensor) -> Tensor:
    """Log-probabilities [B, beam, V] by which an ended sequence [B, beam] stays as it is, and others get no padding."""
    scores = scores.index_fill(2, torch.tensor([PAD, START], device=scores.device), -math.inf)
    stays = torch.full_like(scores, -math.inf).index_fill(2, torch.tensor([PAD], device=scores.device), 0.0)
    return torch.where(is_ended[..., None], stays, scores)


def optimizer(params: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=1e-3, betas=(0.9, 0.98), eps=1e-9)


def lr(step: int, num_steps: int) -> float:
    """Linear warm-up, then the inverse square root: the paper's, which it begins anew in each phase."""
    warm_up = min(WARM_UP, 1 + num_steps // 5)
    return min((step + 1) / warm_up, math.sqrt(warm_up / (step + 1)))
