"""Lightning: a callback that grows, prunes and holds masks, and puts them into the checkpoints of the Trainer.

    pip install -c constraints.txt '.[lightning]'
    python examples/lightning_loop.py --out runs/lightning
    python examples/lightning_loop.py --out runs/lightning --steps 400 --resume

Copy `Sparse` into your project: `Trainer(..., callbacks=[Sparse(plan=plan)])`. A training is not continued from a
checkpoint without masks, since its zeros would fill up.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fashion
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from plain_loop import accuracy, plan_of
from torch import Tensor, nn
from torch.utils.data import DataLoader

import gapfx

KEY = "gapfx"  # of the masks in a checkpoint
NAME = "last.ckpt"


class Sparse(Callback):
    """Holds masks of `module.net`, or follows a plan, one step of the optimizer at a time."""

    def __init__(self, *, masks: Mapping[str, Tensor] | None = None, plan: gapfx.Plan | None = None) -> None:
        self.masks, self.plan = masks, plan
        self.held: gapfx.Held | None = None
        self._state: dict[str, Any] | None = None

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if KEY not in checkpoint:
            raise gapfx.UserError(
                "the checkpoint has no masks, so its zeros would fill up",
                fix="continue from a checkpoint that was written with this callback",
            )
        self._state = checkpoint[KEY]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        net: Any = pl_module.net
        optimizer = trainer.optimizers[0]
        self.held = gapfx.hold(net, optimizer, masks=self.masks, plan=self.plan, state=self._state)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        if self.held is not None:
            checkpoint[KEY] = self.held.state_dict()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.held is not None:
            self.held.remove()


class Classifier(LightningModule):
    """The network of fashion.py."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def training_step(self, batch: fashion.Batch, batch_idx: int) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return fashion.loss(self.net, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4)


def train(out: Path, steps: int, sparsity: float, *, is_resumed: bool = False) -> tuple[nn.Module, gapfx.Held]:
    """Train to `steps`, from the start or from the checkpoint in `out`, and write one there."""
    seed_everything(0, verbose=False)
    # The phases stay as they are when a run becomes longer.
    module, sparse = Classifier(fashion.model()), Sparse(plan=plan_of(300, sparsity))
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_steps=steps,
        max_epochs=-1,
        callbacks=[sparse],
        default_root_dir=out,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(fashion.data("train"), 64, shuffle=True, drop_last=True)
    trainer.fit(module, loader, ckpt_path=str(out / NAME) if is_resumed else None)
    trainer.save_checkpoint(out / NAME)
    assert sparse.held is not None
    return module.net, sparse.held


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the checkpoint")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--sparsity", type=float, default=0.9)
    parser.add_argument("--resume", action="store_true")
    given = parser.parse_args()
    net, held = train(given.out, given.steps, given.sparsity, is_resumed=given.resume)
    print(f"step {held.num_steps}: sparsity {held.sparsity:.3f}, accuracy {accuracy(net):.3f}")


if __name__ == "__main__":
    main()
