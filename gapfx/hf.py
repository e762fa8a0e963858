"""Hugging Face: a Trainer callback that holds or makes masks, and sparse checkpoints as of `save_pretrained`.

    from gapfx.hf import SparseCallback
    Trainer(model=model, ..., callbacks=[SparseCallback(masks=gapfx.masks_from_zeros(model))]).train()

Importing this module imports transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModel, TrainerCallback

from gapfx.errors import FileError, UserError
from gapfx.holding import Held, hold
from gapfx.masks import num_bytes, pack, unpack
from gapfx.plan import Plan

MASKS = "gapfx_masks.safetensors"


class SparseCallback(TrainerCallback):
    """Holds masks while a Trainer trains, or follows the phases of a plan, one optimizer step at a time.

    Checkpoints get the masks beside the model; a training that continues from one without them is refused, since its
    zeros would fill up. DeepSpeed inside of the Trainer is refused: `gapfx sparsify` trains with it.
    """

    def __init__(self, *, masks: Mapping[str, Tensor] | None = None, plan: Plan | None = None, seed: int = 0) -> None:
        self.given: dict[str, Any] = {"masks": masks, "plan": plan, "seed": seed}
        self.held: Held | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Hook the model and its optimizer; read the masks of the checkpoint that the training goes on from."""
        model, optimizer = kwargs["model"], kwargs["optimizer"]
        if getattr(args, "deepspeed", None):
            raise UserError("masks cannot be held in a Trainer with DeepSpeed", fix="train with `gapfx sparsify`")
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        read = read_state(folder) if state.global_step else None
        self.held = hold(model, optimizer, **self.given, state=read)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Write the masks beside the model."""
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if self.held is not None and state.is_world_process_zero and folder.is_dir():
            write_state(folder, self.held.state_dict())

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Take the hooks off."""
        if self.held is not None:
            self.held.remove()


def write_state(folder: Path, state: Mapping[str, Any]) -> None:
    """Write `Held.state_dict()` as gapfx_masks.safetensors into a checkpoint's folder."""
    facts = {key: value for key, value in state.items() if key != "bits"}
    temporary = folder / f".{MASKS}.writing"
    save_file(dict(state["bits"]), temporary, {"gapfx": json.dumps(facts)})
    temporary.replace(folder / MASKS)


def read_state(folder: Path) -> dict[str, Any]:
    """The state that `write_state` wrote, for `Held.load_state_dict`. Raises FileError for none or a damaged one."""
    path = folder / MASKS
    if not path.is_file():
        raise FileError(
            f"the checkpoint has no {MASKS}, so its zeros would fill up",
            where=str(folder),
            fix="continue from a checkpoint that was written with the callback, or begin anew from the weights",
        )
    try:
        with safe_open(path, framework="pt") as file:
            facts = json.loads(file.metadata()["gapfx"])
            return {**facts, "bits": {key: file.get_tensor(key) for key in file.keys()}}  # noqa: SIM118
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise FileError(f"the masks cannot be read: {error}", where=str(path), fix="restore the file") from error


def save_pretrained(model: Any, folder: str | Path, masks: Mapping[str, Tensor]) -> None:
    """`model.save_pretrained(folder)`, its masked weights exactly 0 (in the model, too), and the masks beside it.

    `masks` are bool tensors by FQN, True = kept. Raises UserError for one that fits no parameter.
    """
    own = dict(model.named_parameters())
    for fqn, mask in masks.items():
        if fqn not in own or own[fqn].shape != mask.shape:
            raise UserError(f"the model has no parameter {fqn!r} of shape {list(mask.shape)}")
        own[fqn].data.masked_fill_(~mask.to(own[fqn].device), 0)
    model.save_pretrained(folder)
    write_state(
        Path(folder),
        {"version": 1, "num_steps": 0, "phase": 0, "bits": {fqn: pack(mask.cpu()) for fqn, mask in masks.items()}},
    )


def from_pretrained(folder: str | Path, kind: Any = AutoModel, **options: Any) -> tuple[Any, dict[str, Tensor]]:
    """`kind.from_pretrained(folder, **options)` and its masks: bool tensors by FQN, True = kept.

    Raises FileError where the file of the masks is not there, or weights that they drop are not 0.
    """
    model: Any = kind.from_pretrained(str(folder), **options)
    own, masks = dict(model.named_parameters()), dict[str, Tensor]()
    for fqn, bits in read_state(Path(folder))["bits"].items():
        if fqn not in own or bits.numel() != num_bytes(own[fqn].numel()):
            raise FileError(f"the masks are of another model: {fqn}", where=str(folder), fix="give the right folder")
        masks[fqn] = unpack(bits, own[fqn].shape)
        alive = int(own[fqn].detach()[~masks[fqn]].count_nonzero())
        if alive:
            raise FileError(
                f"{alive} weights of {fqn} are not 0 where its mask drops",
                where=str(folder),
                fix="the weights were changed without the masks: take the folder that both were written to",
            )
    return model, masks
