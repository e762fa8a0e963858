"""Run directories as a run would leave them, made up from a plan."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gapfx.plan import DenseWeight, Group, Phase, Plan, Weight
from gapfx.schedule import Budget, with_schedule

START = 1_790_000_000.0
LOG_EVERY, EVAL_EVERY = 5, 50


def make_plan(method: str = "gap", num_groups: int = 4, per_group: int = 2, budget: Budget | None = None) -> Plan:
    """Attention-like blocks with a target sparsity that varies a little."""
    kinds = (("attn.qkv", (96, 32)), ("attn.out", (32, 32)), ("mlp.up", (128, 32)), ("mlp.down", (32, 128)))

    def weight(index: int) -> Weight:
        kind, shape = kinds[index % len(kinds)]
        name = f"blocks.{index // len(kinds)}.{kind}.weight"
        return Weight(name, shape, sparsity=round(0.9 + 0.03 * math.sin(1.7 * index), 4) if method != "dense" else 0.0)

    groups = tuple(
        Group(f"group {index + 1}", tuple(weight(index * per_group + i) for i in range(per_group)))
        for index in range(num_groups)
    )
    dense = (DenseWeight("embed.weight", (1000, 32), "read by an embedding"),)
    plan = Plan(groups, dense, method=method, sparsity=0.0 if method == "dense" else 0.9, partition="blocks")
    return with_schedule(plan, method, budget or Budget(rounds=2, phase_steps=50, finetune_steps=100))


def kept_of(weight: Weight) -> int:
    return round(weight.numel * (1 - weight.sparsity))


def events_of(plan: Plan, seed: int = 0) -> Iterator[dict[str, Any]]:
    """What a run of the plan logs, with losses that fall, jump at every phase and fall again."""
    rng = random.Random(seed)
    header = {"method": plan.method, "num_steps": plan.num_steps, "phases": len(plan.phases), "world_size": 2}
    yield {"event": "start", "step": 0, "time": START, **header}
    explored = 0.1
    for index, phase in enumerate(plan.phases):
        yield {"event": "phase", "step": phase.start, "phase": index, **phase_facts(plan, phase)}
        for step in range(phase.start + LOG_EVERY, phase.stop + 1, LOG_EVERY):
            yield step_event(plan, index, phase, step, rng)
            if step % EVAL_EVERY == 0:
                yield eval_event(plan, index, step, rng)
        if phase.prune:
            explored += 0.5 * (1 - explored) * len(phase.prune) / len(plan.groups)
            yield prune_event(plan, index, phase, explored, rng)
        yield {"event": "checkpoint", "step": phase.stop, "path": f"checkpoints/{phase.stop}"}


def phase_facts(plan: Plan, phase: Phase) -> dict[str, Any]:
    grow, prune = ([plan.groups[i].name for i in indices] for indices in (phase.grow, phase.prune))
    return {"name": phase.name, "round": phase.round, "grow": grow, "prune": prune, "stop": phase.stop}


def step_event(plan: Plan, index: int, phase: Phase, step: int, rng: random.Random) -> dict[str, Any]:
    age, share = (step - phase.start) / phase.num_steps, step / plan.num_steps
    loss = (0.4 + 2.6 * math.exp(-5 * share) + 0.25 * math.exp(-12 * age)) * math.exp(rng.gauss(0, 0.06))
    lr = 1e-3 * min(1.0, 10 * age) * (0.5 + 0.5 * math.cos(math.pi * age))
    seconds = round(step * 0.42, 2)
    facts = {"loss": loss, "lr": lr, "grad_norm": 1.0, "seconds": seconds}
    return {"event": "step", "step": step, "phase": index, **facts}


def eval_event(plan: Plan, index: int, step: int, rng: random.Random) -> dict[str, Any]:
    share = step / plan.num_steps
    accuracy = min(0.93, 0.93 - 0.55 * math.exp(-5 * share) + rng.gauss(0, 0.006))
    metrics = {"loss": 0.45 + 1.8 * math.exp(-5 * share), "accuracy": accuracy}
    grown = {plan.groups[i].name for i in plan.phases[index].grow}
    live = sum(w.numel if g.name in grown else kept_of(w) for g in plan.groups for w in g.weights)
    sparsity = 1 - live / sum(group.numel for group in plan.groups)
    return {"event": "eval", "step": step, "phase": index, "metrics": metrics, "sparsity": sparsity}


def prune_event(plan: Plan, index: int, phase: Phase, explored: float, rng: random.Random) -> dict[str, Any]:
    def facts(weight: Weight) -> dict[str, Any]:
        changed = round(weight.numel * 2 * (1 - weight.sparsity) * rng.uniform(0.5, 0.8) / (1 + phase.round))
        counts = {"numel": weight.numel, "kept": kept_of(weight), "target": weight.sparsity}
        return {**counts, "changed_bits": changed, "delta2": rng.uniform(0.02, 0.2)}

    groups = [plan.groups[i] for i in phase.prune]
    weights = {weight.fqn: facts(weight) for group in groups for weight in group.weights}
    names = [group.name for group in groups]
    head = {"event": "prune", "step": phase.stop, "phase": index, "groups": names}
    return {**head, "weights": weights, "explored": explored}


def summary_of(plan: Plan, events: list[dict[str, Any]]) -> dict[str, Any]:
    total = sum(group.numel for group in plan.groups)
    kept = {w.fqn: {"numel": w.numel, "kept": kept_of(w), "group": g.name} for g in plan.groups for w in g.weights}
    actual = 1 - sum(kept_of(weight) for weight in plan.weights()) / total
    evals = [event["metrics"] for event in events if event["event"] == "eval"]
    best = {"accuracy": max(e["accuracy"] for e in evals), "loss": min(e["loss"] for e in evals)}
    return {
        "method": plan.method,
        "sparsity_target": plan.sparsity,
        "sparsity_actual": actual,
        "sparsity_model": actual * total / (total + 32000),
        "per_weight": kept,
        "groups": [{"name": g.name, "weights": [w.fqn for w in g.weights]} for g in plan.groups],
        "phases": json.loads(plan.to_json())["phases"],
        "metrics": {"final": evals[-1], "best": best},
        "seconds": plan.num_steps * 0.42 + 12,
        "peak_rss_bytes": 1_523_000_000,
        "world_size": 2,
        "zero_stage": 1,
        "form": "masked",
        "seed": 7,
        "versions": {"gapfx": "0.1.0", "torch": "2.13.0", "deepspeed": "0.19.8", "python": "3.11.2"},
    }


def write_run(path: Path, plan: Plan, *, until: int | None = None) -> Path:
    """A run directory as training leaves it; `until` stops the log after that step and leaves out the summary."""
    path.mkdir(parents=True, exist_ok=True)
    config = {"task": "task.py", "method": plan.method, "sparsity": plan.sparsity, "batch_size": 64, "nproc": 2}
    (path / "config.json").write_text(json.dumps(config))
    (path / "plan.json").write_text(plan.to_json())
    events = list(events_of(plan))
    kept = [event for event in events if until is None or event["step"] <= until]
    if until is None:
        kept.append({"event": "end", "step": plan.num_steps, "seconds": plan.num_steps * 0.42})
        (path / "summary.json").write_text(json.dumps(summary_of(plan, events)))
        (path / "model.safetensors").write_bytes(bytes(4096))
    (path / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in kept))
    return path
