"""Memory, traffic and time of training a GPT: plain DeepSpeed, and gapfx with masks and with live values alone.

    python tools/bench_memory.py
    python tools/bench_memory.py --zero 2 --dtype fp32 --sparsity 0.8 --blocks 4 --width 256

Two ranks on this machine, micro-batches of one sample. gapfx trains cyclic GaP with four groups, so that one of four is
dense at any time; its peak covers the start, every phase boundary and every checkpoint. The plain run trains as many
steps, without any sparsity: with torch's AdamW as it comes, and with the fused one, which gapfx takes where a task says
nothing. Peaks are those of the largest rank, and of each in turn; `above` is without what importing everything takes.
`optimizer` is the most a rank's optimizer holds after a step: its state, and the weights that it updates, which at
ZeRO 1 to 3 are the rank's share in fp32. At ZeRO 3 the first two steps of a phase gather each weight twice, until
DeepSpeed knows the order of uses; phases of the default length have hardly any other steps: give --steps 48.
"""

from __future__ import annotations

import atexit
import functools
import itertools
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

VOCABULARY = 256
RANKS = 2


class Layer(nn.Module):
    """A pre-norm Transformer layer with causal attention."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // 64
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """The same shape."""
        q, k, v = (
            part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, -1)
        )
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class Gpt(nn.Module):
    """Embedding, layers, head."""

    def __init__(self, blocks: int, width: int, length: int) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(VOCABULARY, width), nn.Parameter(torch.zeros(length, width))
        self.blocks = nn.ModuleList(Layer(width) for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        """Scores of every next token."""
        x = self.tokens(tokens) + self.places
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Traffic:
    """Bytes of the results of collectives, between one forward and the next, and those that optimizers hold."""

    NAMES = ("all_reduce", "reduce", "broadcast", "all_gather", "all_gather_into_tensor", "reduce_scatter_tensor")

    def __init__(self) -> None:
        self.marks: list[int] = []
        self._bytes, self._depth, self._optimizer = 0, 0, 0

    def watch(self) -> None:
        """Count from now on; before DeepSpeed is imported."""
        for name in self.NAMES:
            setattr(torch.distributed, name, self._counted(getattr(torch.distributed, name)))
        register_optimizer_step_post_hook(self._weigh)
        atexit.register(self.write)

    def _counted(self, plain: Callable[..., object]) -> Callable[..., object]:
        @functools.wraps(plain)
        def counted(*args: Any, **kwargs: Any) -> object:
            first = args[0] if args else next(iter(kwargs.values()))
            tensors = cast(list[Tensor], first if isinstance(first, list) else [first])
            self._bytes += 0 if self._depth else sum(tensor.nbytes for tensor in tensors)
            self._depth += 1
            try:
                return plain(*args, **kwargs)
            finally:
                self._depth -= 1

        return counted

    def mark(self) -> None:
        """A forward begins."""
        self.marks.append(self._bytes)

    def _weigh(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        states = cast(dict[Tensor, dict[str, object]], optimizer.state)
        tensors = [value for weight, state in states.items() for value in (weight, *state.values())]
        held = sum(value.nbytes for value in tensors if isinstance(value, Tensor))
        self._optimizer = max(self._optimizer, held)

    def write(self) -> None:
        """Leave what was counted in the file that the environment names."""
        if "RANK" in os.environ and "TRAFFIC" in os.environ:
            steps = sorted(later - earlier for earlier, later in itertools.pairwise(self.marks))
            found = {"traffic": steps[len(steps) // 2] if steps else 0, "optimizer": self._optimizer}
            Path(f"{os.environ['TRAFFIC']}-{os.environ['RANK']}").write_text(json.dumps(found))


TRAFFIC = Traffic()


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    """Cross-entropy of the next token."""
    if model.training:
        TRAFFIC.mark()
    return F.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())


def samples(length: int, count: int) -> list[Tensor]:
    """Made-up tokens."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(VOCABULARY, (length + 1,), generator=generator) for _ in range(count)]


TASK = """
import sys
sys.path.insert(0, {folder!r})
from tools.bench_memory import TRAFFIC, Gpt, loss_of, samples
TRAFFIC.watch()
def model(): return Gpt({blocks}, {width}, {length})
def data(split): return samples({length}, {ranks} * {steps} if split == "train" else {ranks})
loss = loss_of
"""

PLAIN = """
import sys, json, os, time, resource
sys.path.insert(0, {folder!r})
from tools.bench_memory import TRAFFIC, Gpt, loss_of, samples
TRAFFIC.watch()
import torch, deepspeed, deepspeed.ops
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
from gapfx.runtime.engine import EngineOptions, process_group
with process_group():
    base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    torch.manual_seed(0)
    model = Gpt({blocks}, {width}, {length})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused={fused})
    config = EngineOptions(1, 1, 1.0, {dtype!r}, {zero}).config({ranks})
    engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)[0]
    seconds = []
    for sample in samples({length}, {steps}):
        began = time.perf_counter()
        engine.backward(loss_of(engine, sample[None]))
        engine.step()
        seconds.append(time.perf_counter() - began)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    engine.destroy()
    peaks = [0] * {ranks}
    torch.distributed.all_gather_object(peaks, peak)
    if torch.distributed.get_rank() == 0:
        median = sorted(seconds)[len(seconds) // 2]
        with open(sys.argv[1], "w") as answer:
            json.dump({{"peaks": peaks, "base": base, "seconds": median}}, answer)
    TRAFFIC.write()
# The engine still holds process groups: C++ may abort an interpreter that ends while their threads run.
os._exit(0)
"""


@dataclass(frozen=True)
class Found:
    """What a run took: `peaks` and `optimizer` by rank; `base` is the peak before a model was built, 0 if unknown."""

    peaks: list[int]
    seconds: float
    traffic: int
    optimizer: list[int]
    base: int = 0

    def line(self, name: str, plain: Found) -> str:
        """The numbers, and their shares of the plain run's."""
        above, whole = max(self.peaks) - plain.base, max(plain.peaks) - plain.base
        return (
            f"{name:<16} peak {max(self.peaks) / 2**20:7.0f} MiB (ranks {_mib(self.peaks)}), "
            f"above {above / 2**20:7.0f} MiB ({above / whole:.2f}), median step {self.seconds:.2f} s, "
            f"optimizer {_mib(self.optimizer)} MiB ({max(self.optimizer) / max(1, *plain.optimizer):.2f}), "
            f"reduced and gathered {self.traffic / 2**20:5.0f} MiB ({self.traffic / max(1, plain.traffic):.2f})"
        )


def _mib(sizes: list[int]) -> str:
    return "/".join(f"{size / 2**20:.0f}" for size in sizes)


def _watched(folder: Path) -> dict[str, Any]:
    """Traffic of rank 0 and optimizer bytes of each, as the ranks left them."""
    told = [json.loads((folder / f"traffic-{rank}").read_text()) for rank in range(RANKS)]
    return {"traffic": told[0]["traffic"], "optimizer": [each["optimizer"] for each in told]}


def _run(command: list[str], folder: Path) -> None:
    env = {**os.environ, "TRAFFIC": str(folder / "traffic")}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        sys.exit(f"{command[:4]} ended with {done.returncode}:\n{done.stdout}{done.stderr}")


def run_plain(folder: Path, facts: dict[str, object]) -> Found:
    """Peaks, peak before the model was built, and the median step of plain DeepSpeed."""
    script, answer = folder / "plain.py", folder / "plain.json"
    script.write_text(PLAIN.format(**facts))
    command = [sys.executable, str(script), str(answer)]
    launch = f"import sys; from gapfx.runtime.launch import run_ranks; sys.exit(run_ranks({command!r}, {RANKS}))"
    _run([sys.executable, "-c", launch], folder)
    return Found(**json.loads(answer.read_text()), **_watched(folder))


def run_gapfx(folder: Path, facts: dict[str, object], form: str) -> Found:
    """Peaks and median step of `gapfx sparsify`."""
    task, out = folder / "task.py", folder / form
    task.write_text(TASK.format(**facts))
    flags = [
        "--form",
        form,
        "--nproc",
        RANKS,
        "--batch-size",
        RANKS,
        "--zero",
        facts["zero"],
        "--dtype",
        facts["dtype"],
        "--sparsity",
        facts["sparsity"],
    ]
    flags += ["--groups", 4, "--phase-epochs", 0.25, "--finetune-epochs", 0.25, "--eval-epochs", 0, "--log-every", 1]
    command = [sys.executable, "-m", "gapfx", "sparsify", task, "--out", out, *flags]
    _run([*map(str, command)], folder)
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    times = [event["seconds"] for event in steps if event["event"] == "step"]
    gaps = sorted(later - earlier for earlier, later in itertools.pairwise(times))
    peaks = json.loads((out / "summary.json").read_text())["peak_rss_bytes_by_rank"]
    return Found(peaks, gaps[len(gaps) // 2], **_watched(folder))


def main(
    zero: Annotated[int, typer.Option(help="ZeRO stage.")] = 1,
    dtype: Annotated[str, typer.Option(help="fp32 or bf16.")] = "bf16",
    sparsity: Annotated[float, typer.Option(help="Share of zeros in gapfx's sparse weights.")] = 0.9,
    blocks: Annotated[int, typer.Option(help="Layers.")] = 12,
    width: Annotated[int, typer.Option(help="Width, a multiple of 64.")] = 768,
    length: Annotated[int, typer.Option(help="Tokens of a sample.")] = 128,
    steps: Annotated[int, typer.Option(help="Steps of an epoch.")] = 12,
) -> None:
    """Print one line a run."""
    facts: dict[str, object] = {
        **{"zero": zero, "dtype": dtype, "blocks": blocks, "width": width, "length": length, "steps": steps},
        **{"sparsity": sparsity, "ranks": RANKS, "folder": str(Path(__file__).parent.parent)},
    }
    with tempfile.TemporaryDirectory() as folder:
        plain = run_plain(Path(folder), {**facts, "fused": False})
        found = {"plain DeepSpeed": plain, "plain, fused": run_plain(Path(folder), {**facts, "fused": True})}
        for form in ("masked", "compact"):
            found[f"gapfx {form}"] = run_gapfx(Path(folder), facts, form)
    for name, numbers in found.items():
        print(numbers.line(name, plain))


if __name__ == "__main__":
    typer.run(main)
