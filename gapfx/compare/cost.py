"""What runs of a study cost in operations, and how long each must be to cost what the control costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gapfx.compare.records import Records
from gapfx.compare.study import CONTROL, Contender, Study, Trial
from gapfx.errors import UserError
from gapfx.flops import ForwardFlops, count_forward, training_flops
from gapfx.method_settings import read_by
from gapfx.phasing import with_phases
from gapfx.plan import Plan
from gapfx.settings import Settings
from gapfx.task import Task
from gapfx.training import Request, compile_task, first_batches, make_feed

Load = Callable[[Mapping[str, Any]], tuple[Task, Settings]]


@dataclass
class Costs:
    """Plans and operations of the runs of a study; `load` gives the task with settings over its own.

    Where one threshold over many weights shares out the zeros, what each weight keeps is known from a run alone, so a
    run at equal operations follows that at equal epochs, whose record has the shares. They count from the first prune.
    """

    study: Study
    load: Load
    records: Records
    _plans: dict[tuple[str, float], tuple[Plan, float]] = field(default_factory=dict[tuple[str, float], Any])
    _forward: ForwardFlops | None = None

    def given(self, trial: Trial) -> dict[str, Any]:
        """Settings of a run beside those of the task: longer or shorter phases where operations shall be equal."""
        given = self._given(trial.contender, trial.sparsity) | {"seed": trial.seed}
        if trial.candidate is not None:
            return given | {"lr_scale": trial.candidate}
        given |= {"test": True} if self.study.test else {}
        if trial.budget == "epochs":
            return given
        control = dataclasses.replace(trial, contender=self._control(), sparsity=0.0)
        scale = self.study.flops * self.flops(control) / self.flops(trial)
        if scale == 1:
            return given
        _, settings = self.load(given)
        lengths = {key: getattr(settings, key) * scale for key in ("phase_epochs", "finetune_epochs")}
        return given | lengths

    def flops(self, trial: Trial) -> float:
        """Operations of a run at the epochs of the study. Raises UserError where a run that tells them is missing."""
        plan, _ = self._plan(trial.contender, trial.sparsity)
        shares = self._shares(trial) if is_found_by_run(plan) else {}
        return training_flops(with_shares(plan, shares), self.forward())

    def waits_for(self, trial: Trial) -> str | None:
        """Name of a run without whose record this one cannot start, or None."""
        if trial.budget == "epochs" or not is_found_by_run(self._plan(trial.contender, trial.sparsity)[0]):
            return None
        twin = dataclasses.replace(trial, budget="epochs").name
        return None if twin in self.records.found else twin

    def epochs(self, plan: Plan) -> float:
        """Epochs of a plan."""
        return plan.num_steps / self._plan(self.study.contenders[0], self._some_sparsity())[1]

    def forward(self) -> ForwardFlops:
        """Operations of one forward of a batch, the same for all runs."""
        if self._forward is None:
            task, settings = self.load(self._given(self.study.contenders[0], self._some_sparsity()))
            model, batch, _ = first_batches(task, settings)
            assert task.loss is not None
            loss, share = task.loss, settings.batch_size / (settings.micro_batch or settings.batch_size)
            found = count_forward(model, lambda module: loss(module, batch))
            by_weight = {fqn: round(flops * share) for fqn, flops in found.by_weight.items()}
            self._forward = ForwardFlops(round(found.total * share), by_weight)
        return self._forward

    def _plan(self, contender: Contender, sparsity: float) -> tuple[Plan, float]:
        """A run's plan, and steps of an epoch."""
        key = contender.name, sparsity
        if key not in self._plans:
            task, settings = self.load(self._given(contender, sparsity))
            quiet = dataclasses.replace(settings, calibrate=False, kernels="expand", zero=min(settings.zero, 1))
            feed = make_feed(task, quiet, 0, 1)
            with torch.random.fork_rng():
                plan = compile_task(task, quiet, feed, None, Request(Path())).plan
            self._plans[key] = with_phases(plan, quiet, feed.steps_per_epoch), feed.steps_per_epoch
        return self._plans[key]

    def _shares(self, trial: Trial) -> Mapping[str, float]:
        twin, where = dataclasses.replace(trial, budget="epochs").name, str(self.records.folder)
        told = f"what {trial.name} costs is told by {twin}, which"
        if twin not in self.records.found:
            raise UserError(f"{told} is not there", where=where, fix='have "epochs" in budgets')
        shares = self.records.found[twin].shares
        if not shares:
            raise UserError(f"{told} has no shares", where=where, fix="delete its line in runs.jsonl to train it again")
        return shares

    def _given(self, contender: Contender, sparsity: float) -> dict[str, Any]:
        shared = read_by(contender.method, self.study.settings)  # the same for all, though not all read it
        return {**shared, **contender.settings, "method": contender.method, "sparsity": sparsity}

    def _control(self) -> Contender:
        found = next((c for c in self.study.contenders if c.method == CONTROL), None)
        if found is None:
            raise UserError(f"the study has no {CONTROL} runs", fix=f'add "{CONTROL}" to methods')
        return found

    def _some_sparsity(self) -> float:
        return 0.0 if self.study.contenders[0].method == CONTROL else self.study.sparsities[0]


def is_found_by_run(plan: Plan) -> bool:
    """Whether what each weight keeps comes out at a prune, not from the plan."""
    return plan.allocation == "global" and plan.sparsity > 0


def with_shares(plan: Plan, shares: Mapping[str, float]) -> Plan:
    """The plan with these live shares, by FQN, as its targets; weights without one keep theirs."""
    groups = (
        dataclasses.replace(
            group,
            weights=tuple(
                dataclasses.replace(w, sparsity=1 - shares[w.fqn]) if w.fqn in shares else w for w in group.weights
            ),
        )
        for group in plan.groups
    )
    return dataclasses.replace(plan, groups=tuple(groups))
