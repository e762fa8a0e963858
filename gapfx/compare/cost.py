"""What runs of a study cost in operations, and how long each must be to cost what the control costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from gapfx.compare.study import CONTROL, Contender, Study, Trial
from gapfx.errors import UserError
from gapfx.flops import ForwardFlops, count_forward, training_flops
from gapfx.plan import Plan
from gapfx.settings import Settings
from gapfx.task import Task
from gapfx.training import Request, compile_task, first_batches, make_feed, with_phases

Load = Callable[[Mapping[str, Any]], tuple[Task, Settings]]


@dataclass
class Costs:
    """Plans and operations of the runs of a study; `load` gives the task with settings over its own."""

    study: Study
    load: Load
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
        control = self._control()
        scale = self.study.flops * self.flops(control, 0.0) / self.flops(trial.contender, trial.sparsity)
        if scale == 1:
            return given
        _, settings = self.load(given)
        lengths = {key: getattr(settings, key) * scale for key in ("phase_epochs", "finetune_epochs")}
        return given | lengths

    def flops(self, contender: Contender, sparsity: float) -> float:
        """Operations of a run at the epochs of the study."""
        return training_flops(self._plan(contender, sparsity)[0], self.forward())

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
            self._plans[key] = with_phases(plan, quiet, feed), feed.steps_per_epoch
        return self._plans[key]

    def _given(self, contender: Contender, sparsity: float) -> dict[str, Any]:
        return {**self.study.settings, **contender.settings, "method": contender.method, "sparsity": sparsity}

    def _control(self) -> Contender:
        found = next((c for c in self.study.contenders if c.method == CONTROL), None)
        if found is None:
            raise UserError(f"the study has no {CONTROL} runs", fix=f'add "{CONTROL}" to methods')
        return found

    def _some_sparsity(self) -> float:
        return 0.0 if self.study.contenders[0].method == CONTROL else self.study.sparsities[0]
