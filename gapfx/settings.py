"""Settings of a run: gapfx's defaults, then the task file's `defaults`, then the command line's flags."""

from __future__ import annotations

import dataclasses
import difflib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args, get_origin, get_type_hints

from gapfx.errors import UserError


@dataclass(frozen=True)
class Settings:
    """One value for each thing that a run can be told; the field names are those of flags and of config.json."""

    method: str = "gap"
    sparsity: float = 0.9
    groups: int | Literal["auto"] = "auto"
    partition: Literal["blocks", "params", "stages", "random", "by-hand"] = "blocks"
    group: tuple[str, ...] = ()
    pattern: str = "unstructured"
    allocation: Literal["uniform", "erk", "global"] = "uniform"
    criterion: str = "magnitude"
    dense: tuple[str, ...] = ()
    prune_embeddings: bool = False
    passes: str = ""
    init: str = ""
    replicas: int = 0
    rounds: int = 1
    phase_epochs: float = 1.0
    finetune_epochs: float = 2.0
    steps_per_epoch: int = 0
    batch_size: int = 64
    micro_batch: int = 0
    clip: float = 1.0
    lr_scale: float = 1.0
    state: Literal["auto", "reset", "carry"] = "auto"
    regrow_warmup: int = 0
    phase_lr: Literal["auto", "restart", "continue"] = "auto"
    growth: Literal["zero", "saved"] = "zero"
    landing: int = 1
    exchange: float = 0.0
    update_steps: int = 100
    dtype: Literal["fp32", "bf16"] = "fp32"
    zero: int = 1
    form: Literal["masked", "compact"] = "compact"
    kernels: Literal["auto", "expand", "sparse"] = "auto"
    calibrate: bool = True
    deepspeed: str = ""
    nproc: int = 1
    seed: int = 0
    test: bool = False
    log_every: int = 10
    log_to: str = ""
    eval_epochs: float = 1.0
    checkpoint_every: int = 0
    keep_checkpoints: int = 3

    def validate(self) -> None:
        """Raise UserError for a value out of its range."""
        if not 0 <= self.sparsity < 1:
            raise UserError(
                f"sparsity {self.sparsity} is not in [0, 1)",
                fix="sparsity is the share of zeros: 0.9 keeps one weight in ten",
            )
        if not 0 <= self.exchange < 1:
            raise UserError(
                f"exchange {self.exchange} is not in [0, 1)",
                fix="it is a share of the live weights: 0.3, or 0 for none",
            )
        for name, low in _LOWEST.items():
            value = getattr(self, name)
            if value != "auto" and value < low:
                raise UserError(f"{name} is {value}, it must be at least {low}", fix=f"change {flag(name)}")
        if self.zero not in (0, 1, 2, 3):
            raise UserError(f"there is no ZeRO stage {self.zero}", fix="use --zero 0, 1, 2 or 3")
        if self.zero == 0 and self.dtype == "bf16":
            raise UserError(
                "bf16 at ZeRO stage 0 is not exact: DeepSpeed's optimizer there strays from stages 1 to 3",
                fix="use --zero 1, which on one process takes no more memory, or --dtype fp32",
            )
        if bool(self.group) != (self.partition == "by-hand"):
            raise UserError("--group and --partition by-hand go together", fix="give both or neither")

    def batches(self, world_size: int) -> tuple[int, int]:
        """Samples of a micro-batch, and micro-batches a step, on each rank. Raises UserError when they do not fit."""
        micro = self.micro_batch or self.batch_size // world_size
        if not micro or self.batch_size % (micro * world_size):
            raise UserError(
                f"a batch of {self.batch_size} is no multiple of micro-batches of {micro or 1} on {world_size} ranks",
                fix="--batch-size is the global batch: a multiple of --micro-batch times the number of ranks",
            )
        return micro, self.batch_size // (micro * world_size)

    def to_json(self) -> str:
        """Flat JSON object, one key a setting."""
        return json.dumps(dataclasses.asdict(self), indent=1)


_LOWEST: Mapping[str, float] = {
    "groups": 1,
    "replicas": 0,
    "rounds": 1,
    "phase_epochs": 0,
    "finetune_epochs": 0,
    "steps_per_epoch": 0,
    "batch_size": 1,
    "micro_batch": 0,
    "clip": 0,
    "lr_scale": 0,
    "regrow_warmup": 0,
    "update_steps": 1,
    "landing": 1,
    "nproc": 1,
    "log_every": 1,
    "eval_epochs": 0,
    "checkpoint_every": 0,
    "keep_checkpoints": 1,
}


def flag(name: str) -> str:
    """The command-line flag of a setting."""
    return "--" + name.replace("_", "-")


def merge(*layers: tuple[str, Mapping[str, Any]]) -> Settings:
    """Settings from (where, values) layers, later ones win; a value of None is not given.

    Raises UserError that names the layer of an unknown name or a value of the wrong type.
    """
    values: dict[str, Any] = {}
    for where, layer in layers:
        values |= {name: _checked(name, value, where) for name, value in layer.items() if value is not None}
    if values.get("group") and "partition" not in values:
        values["partition"] = "by-hand"
    settings = Settings(**values)
    settings.validate()
    return settings


def _checked(name: str, value: Any, where: str) -> Any:
    hints = get_type_hints(Settings)
    if name not in hints:
        near = difflib.get_close_matches(str(name), hints, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise UserError(f"unknown setting {name!r}", where=where, fix=f"{hint}known: {', '.join(hints)}")
    return _convert(hints[name], value, name, where)


def _convert(kind: Any, value: Any, name: str, where: str) -> Any:
    wrong = UserError(f"{name} is {value!r}, expected {_spoken(kind)}", where=where, fix=f"change {flag(name)}")
    options = get_args(kind)
    if get_origin(kind) is Literal:
        if value not in options:
            raise wrong
        return value
    if get_origin(kind) is tuple:
        if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in cast(list[Any], value)):
            raise wrong
        return tuple(cast(list[str], value))
    if int in options:
        if value == "auto":
            return value
        kind, value = int, int(value) if isinstance(value, str) and value.isdecimal() else value
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is float and is_number and abs(value) <= sys.float_info.max:
        return float(value)
    if kind in (int, str, bool) and type(value) is kind:
        return value
    raise wrong


def _spoken(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(map(str, get_args(kind)))
    if get_origin(kind) is tuple:
        return "a list of texts"
    if int in get_args(kind):
        return "a whole number or auto"
    return {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}[kind]
