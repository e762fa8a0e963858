"""Model state that `gapfx plan --ranks` predicts against what ranks hold: `python tools/bench_estimate.py`.

Three runs of a GPT on this machine. Each rank weighs its tensors just before every step of the optimizer, when
gradients are there and activations are gone: all that came after the data, each memory once. The largest rank at its
largest step counts. As a task file this is the GPT.
"""

from __future__ import annotations

import atexit
import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

sys.path.insert(0, str(Path(__file__).parent.parent))

from gapfx.estimate import Setup, Sizes, estimate
from gapfx.plan import Plan
from tools.bench_memory import VOCABULARY, Gpt

LENGTH = 64
LEAST = 100_000  # weights of an optimizer that trains the model
CASES = (
    ("--nproc 1 --zero 1 --dtype fp32", Setup(1, 1, 4)),
    ("--nproc 2 --zero 2 --dtype bf16", Setup(2, 2, 2)),
    ("--nproc 2 --zero 3 --dtype fp32", Setup(2, 3, 4)),
)
defaults = {"groups": 4, "rounds": 1, "batch_size": 2, "micro_batch": 1, "calibrate": False, "eval_epochs": 0}
_BEFORE: set[int] = set()
_PEAK = [0]


def model() -> nn.Module:
    """Of the width that the environment says."""
    return Gpt(blocks=4, width=int(os.environ.get("WIDTH", "256")), length=LENGTH)


class Tokens:
    """Made when they are asked for, so that nothing of them is held."""

    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> Tensor:
        return torch.randint(VOCABULARY, (LENGTH,), generator=torch.Generator().manual_seed(index))


def data(split: str) -> Tokens:
    """The same for both; what is alive before the first is not the model's."""
    if split == "train" and "WEIGHED" in os.environ and not _BEFORE:
        _BEFORE.update(storage for storage, _ in storages())
        register_optimizer_step_pre_hook(weigh)
        atexit.register(tell)
    return Tokens()


def loss(model: nn.Module, batch: Tensor) -> Tensor:
    """Each token is to be told from itself: what is learned does not matter."""
    return F.cross_entropy(model(batch).flatten(0, 1), batch.flatten())


def storages() -> Iterator[tuple[int, int]]:
    """Memory and bytes of every tensor that is alive."""
    for item in gc.get_objects():
        if isinstance(item, Tensor) and item.device.type == "cpu" and type(item).__name__ != "FakeTensor":
            held: Any = item.untyped_storage()
            yield held._cdata, held.nbytes()
            if item.is_leaf and item.grad is not None:
                grown: Any = item.grad.untyped_storage()
                yield grown._cdata, grown.nbytes()


def weigh(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Remember the most; gapfx tries optimizers on a small weight first, which counts for nothing."""
    if sum(parameter.numel() for group in optimizer.param_groups for parameter in group["params"]) < LEAST:
        return
    _PEAK[0] = max(_PEAK[0], sum({key: size for key, size in storages() if key not in _BEFORE}.values()))


def tell() -> None:
    """Leave it in a file of this rank."""
    if "RANK" in os.environ:
        Path(os.environ["WEIGHED"], os.environ["RANK"]).write_text(json.dumps(_PEAK[0]))


def main(
    sparsity: Annotated[float, typer.Option(help="Of planned weights.")] = 0.9,
    width: Annotated[int, typer.Option(help="Of the GPT, a multiple of 64.")] = 512,
) -> None:
    """Print both for each case."""
    for flags, setup in CASES:
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "run"
            lengths = ("--phase-epochs", "0.5", "--finetune-epochs", "0.5")
            flag_list = [*flags.split(), "--sparsity", str(sparsity), *lengths]
            command = [sys.executable, "-m", "gapfx", "sparsify", __file__, "--out", str(out), *flag_list]
            environment = {**os.environ, "WEIGHED": folder, "WIDTH": str(width), "OMP_NUM_THREADS": "1"}
            subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)
            measured = max(json.loads(Path(folder, str(rank)).read_text()) for rank in range(setup.ranks))
            plan, summary = Plan.load(out / "plan.json"), json.loads((out / "summary.json").read_text())
        predicted = max(e.rank.state for e in estimate(plan, Sizes.of(plan, summary["num_parameters"]), setup))
        print(
            f"{flags}: predicted {predicted / 2**20:.1f} MiB, measured {measured / 2**20:.1f} MiB, "
            f"predicted over measured {predicted / measured:.3f}"
        )


if __name__ == "__main__":
    typer.run(main)
