"""The DeepSpeed configuration of a run: gapfx's own, with what the user's JSON file adds to it.

What the file says about things that gapfx decides must agree with it; "auto" leaves them to gapfx. What does not work
with weights whose shapes change from phase to phase is refused with the reason, never left out in silence.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from gapfx.errors import UserError

# Bucket sizes in elements. DeepSpeed's default of 5e8 is a buffer of gigabytes even for a toy model.
BUCKET_SIZE = 5_000_000
AUTO = "auto"

FLAGS = {
    "train_batch_size": "--batch-size",
    "train_micro_batch_size_per_gpu": "--micro-batch",
    "gradient_accumulation_steps": "--batch-size and --micro-batch",
    "gradient_clipping": "--clip",
    "bf16.enabled": "--dtype",
    "zero_optimization.stage": "--zero",
}
REFUSED = {
    "optimizer": "the task's optimizer(params) decides, any torch optimizer",
    "scheduler": "the task's lr(step, num_steps) decides",
    "fp16": "loss scaling skips steps, which a schedule of phases cannot count; use --dtype bf16",
    "amp": "use --dtype bf16",
    "torch_autocast": "ops that take live values get two dtypes under it; use --dtype bf16",
    "zenflow": "it updates weights late, which gave other losses than plain steps, also without sparsity",
    "compile": "DeepCompile rewrites the modules that gapfx has rewritten",
    "tensor_parallel": "it splits layers by name and shape, which live values do not have",
    "autotp": "it splits layers by name and shape, which live values do not have",
    "pipeline": "a pipeline needs its own module class",
    "sparse_gradients": "gradients of live values are dense vectors",
    "compression_training": "gapfx decides what is pruned",
    "data_types.buffer_dtype": "the finished model would hold rounded buffers; they stay fp32",
    "data_types.param_dtype": "--dtype decides, and evaluations are in fp32",
    "elasticity": "start ranks with torchrun and continue with --resume at any number of ranks",
    "checkpoint": "gapfx writes its own checkpoints",
    "data_efficiency": "gapfx's feed decides the order of samples",
    "curriculum_learning": "gapfx's feed decides the order of samples",
    "zero_optimization.memory_efficient_linear": "it replaces torch's linear for the whole process, for good",
    "zero_optimization.zero_quantized_weights": "ZeRO++ rounds weights on their way, so that ranks do not repeat one",
    "zero_optimization.zero_quantized_nontrainable_weights": "ZeRO++ rounds weights on their way",
    "zero_optimization.zero_quantized_gradients": "ZeRO++ rounds gradients on their way",
    "zero_optimization.zero_hpz_partition_size": "its second partition is not known to the slices of a state",
    "zero_optimization.mics_shard_size": "DeepSpeed has removed MiCS",
    "zero_optimization.zenflow": "it updates weights late, which gave other losses than plain steps",
    "zero_optimization.offload_optimizer.super_offload": "SuperOffload replaces the optimizer",
}
# What else of DeepSpeed's own is passed on. It ignores other names without a word: a misspelled one would do nothing.
PASSED_ON = (
    *("zero_allow_untested_optimizer", "zero_force_ds_cpu_optimizer", "data_types", "communication_data_type"),
    *("seq_parallel_communication_data_type", "prescale_gradients", "gradient_predivide_factor"),
    *("gradient_allreduce_op", "disable_allgather", "disable_python_gc", "activation_checkpointing", "aio"),
    *("steps_per_print", "wall_clock_breakdown", "memory_breakdown", "dump_state", "log_level", "timers"),
    *("flops_profiler", "comms_logger", "tensorboard", "wandb", "csv_monitor", "comet"),
)
_SIZES_OF_NONE = {"zero_optimization.zero_hpz_partition_size": 1, "zero_optimization.mics_shard_size": -1}


def read_deepspeed_file(path: Path) -> str:
    """The file as JSON text without spaces. Raises UserError for one that is no JSON object or asks for the refused."""
    try:
        found: Any = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} cannot be read: {error}", where="--deepspeed", fix="give a DeepSpeed JSON file"
        ) from error
    if not isinstance(found, dict):
        raise UserError(f"{path} holds no JSON object", where="--deepspeed", fix="give a DeepSpeed JSON file")
    check_deepspeed(cast(dict[str, Any], found), str(path))
    return json.dumps(found, separators=(",", ":"), sort_keys=True)


def check_deepspeed(given: Mapping[str, Any], where: str) -> None:
    """Raise UserError, with the reason, for the first thing in a user's configuration that gapfx cannot do."""
    values = dict(_flat(given))
    for name, reason in REFUSED.items():
        value = values.get(name, _part(given, name))
        if not _is_off(name, value):
            raise UserError(f"DeepSpeed's {name} cannot be used: {reason}", where=where, fix=f"take out {name}")
    _check_known(given, where)
    for kind in ("offload_param", "offload_optimizer"):
        if values.get(f"zero_optimization.{kind}.device") == "nvme":
            raise UserError(
                f"{kind} to nvme cannot be used: its file format holds one engine's shapes",
                where=where,
                fix='offload to "cpu"',
            )


def _is_off(name: str, value: Any) -> bool:
    """Whether a refused thing is switched off, so that a file that lists everything still serves."""
    if isinstance(value, dict):
        switches = cast(dict[str, Any], value)
        return not switches or switches.get("enabled", switches.get("deepcompile")) in (False, AUTO)
    return value in (None, False, AUTO) or (value == _SIZES_OF_NONE.get(name) and value is not True)


def _check_known(given: Mapping[str, Any], where: str) -> None:
    known = {name.partition(".")[0] for name in (*FLAGS, *REFUSED, *PASSED_ON)}
    for name in sorted(given.keys() - known):
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"write {near[0]}, or " if near else ""
        raise UserError(
            f"{name} is no setting of DeepSpeed that gapfx passes on", where=where, fix=f"{hint}take out {name}"
        )


def deepspeed_config(own: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """`own` with what `given` adds. Raises UserError where both say something else about what a flag decides."""
    decided = dict(_flat(own))
    for name, value in _flat(given):
        if name in FLAGS and value not in (AUTO, decided.get(name)):
            raise UserError(
                f"the DeepSpeed file says {name} {value!r}, this run {decided.get(name)!r}",
                where="--deepspeed",
                fix=f'change {FLAGS[name]} or the file, or write "auto" there',
            )
    return _merged(own, given)


def without_flags(given: Mapping[str, Any]) -> dict[str, Any]:
    """What a file adds beside the things that flags decide, for an engine in which gapfx decides them otherwise.

    That the file agrees with the flags is known before the first engine; it says nothing of engines for a gradient, for
    an evaluation in fp32, or on some of the ranks.
    """
    return _without(given, "")


def _without(given: Mapping[str, Any], above: str) -> dict[str, Any]:
    result: dict[str, Any] = {}
    for name, value in given.items():
        if isinstance(value, dict):
            result[name] = _without(cast(dict[str, Any], value), f"{above}{name}.")
        elif f"{above}{name}" not in FLAGS:
            result[name] = value
    return result


def own_config(
    *, micro_batch: int, accumulation: int, world_size: int, clip: float, dtype: str, stage: int
) -> dict[str, Any]:
    """Settings that hold at every stage."""
    return {
        "train_batch_size": micro_batch * accumulation * world_size,
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip,
        "steps_per_print": 10**9,
        "zero_allow_untested_optimizer": True,
        # The task's optimizer serves also where its state is on the CPU.
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": dtype == "bf16"},
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": BUCKET_SIZE,
            "allgather_bucket_size": BUCKET_SIZE,
            "memory_efficient_linear": False,
        },
    }


def _merged(own: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    result = dict(own)
    for name, value in given.items():
        if isinstance(value, dict):
            below = result.get(name, {})
            result[name] = _merged(below if isinstance(below, dict) else {}, cast(dict[str, Any], value))
        elif value != AUTO:
            result[name] = value
    return result


def _flat(tree: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in tree.items():
        if isinstance(value, dict):
            yield from _flat(cast(dict[str, Any], value), f"{above}{name}.")
        else:
            yield f"{above}{name}", value


def _part(tree: Mapping[str, Any], name: str) -> Any:
    value: Any = tree
    for key in name.split("."):
        if not isinstance(value, dict):
            return None
        value = cast(dict[str, Any], value).get(key)
    return value
