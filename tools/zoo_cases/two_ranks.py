"""Two processes that train one masked model by DistributedDataParallel, against one process that does both halves."""

from __future__ import annotations

import datetime
import json
import os
import tempfile
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from gapfx.capture import tensors_in
from gapfx.masks import stored_parameter
from tools.zoo_cases.cases import Case, Inputs, kind_of
from tools.zoo_cases.checks import Result, built, put_back
from tools.zoo_cases.masked import by_hand, compiled, put_on, random_masks
from tools.zoo_cases.running import STEP_SIZE, NotRunnable, Outcome, compare, loss_of, seed_all

RANKS = 2
TIMEOUT = datetime.timedelta(seconds=60)
# The architectures of the whole sweep that also run on two ranks.
TWO_RANKS = {
    "hand-made": "attention-kdim lstm gru routed-experts tied weight-norm batch-norm autograd-function script-module",
    "timm": "test_vit test_convnext test_resnet mixer_s32_224 test_mambaout",
    "torchvision": "resnet18 mobilenet_v3_small regnet_y_400mf ssdlite320_mobilenet_v3_large r3d_18",
    "diffusers": "UNet2DModel UNet2DConditionModel DiTTransformer2DModel AutoencoderKL",
    "torch_geometric": "GCNConv GATv2Conv TransformerConv GIN",
    "transformers": "bert gpt2 llama t5 mixtral whisper clip mamba vit",
}
Gradients = dict[str, Tensor]


def check_two_ranks(case: Case) -> Result:
    """Whether both ranks get the mean of the gradients that one process gets, and keep zeros after a step."""
    result = Result(f"{case.key} on two ranks", case.family)
    try:
        result.facts["kind"] = kind_of(case, built(case)[1])
    except NotRunnable as error:
        return result.stop(error)
    with tempfile.TemporaryDirectory() as folder:
        for pid in [_start(case, rank, Path(folder)) for rank in range(RANKS)]:
            os.waitpid(pid, 0)
        answers = [_answer(Path(folder) / f"{rank}.json") for rank in range(RANKS)]
    for rank, answer in enumerate(answers):
        result.facts |= answer["facts"]
        if answer["fault"]:
            result.fail("two ranks", f"rank {rank}: {answer['fault']}")
    plain = [answer["plain"] for answer in answers if answer["plain"]]
    return result.stop(plain[0]) if len(plain) == RANKS else result


def _answer(path: Path) -> dict[str, Any]:
    if path.exists():
        return json.loads(path.read_text())
    return {"fault": "it ended without an answer", "plain": "", "facts": {}}


def _start(case: Case, rank: int, folder: Path) -> int:
    """The process id of a fork of this process, which must not have run a backward on an accelerator."""
    pid = os.fork()
    if pid:
        return pid
    answer: dict[str, Any] = {"fault": "", "plain": "", "facts": {}}
    try:
        _join(rank, folder / "masked")
        answer["fault"], answer["facts"] = _rank(case, rank)
    except Exception as error:
        answer["fault"] = f"{type(error).__name__}: {error}"
        answer["plain"] = _plain_fault(case, rank, folder / "plain")
    except BaseException:
        traceback.print_exc()
    finally:
        (folder / f"{rank}.part").write_text(json.dumps(answer))
        (folder / f"{rank}.part").rename(folder / f"{rank}.json")
        os._exit(0)


def _join(rank: int, store: Path) -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=RANKS, timeout=TIMEOUT)


def _rank(case: Case, rank: int) -> tuple[str, dict[str, Any]]:
    """What is wrong on this rank, or nothing."""
    masked, inputs = built(case)
    plan = compiled(masked, inputs).plan
    masks = random_masks(plan)
    reference, _ = built(case)
    by_hand(reference, masks)
    put_on(masked, plan, masks)
    halves = [_gradients(reference, reference, _batch(case, half), half) for half in range(RANKS)]
    expected = _mean(halves, masks)
    wrapped = _wrap(
        masked, is_sparse_in_use=any(set(half) != set(dict(reference.named_parameters())) for half in halves)
    )
    found = _gradients(wrapped, masked, _batch(case, rank), rank)
    difference = compare(Outcome(dict(sorted(found.items()))), Outcome(dict(sorted(expected.items()))))
    facts = {"two ranks_bits": difference.worst == 0, "weights": len(masks), "gradients": len(found)}
    if not difference.is_equal():
        return f"gradients differ by {difference.worst:.1e} at {difference.where}", facts
    with torch.no_grad():
        for fqn, grad in found.items():
            stored_parameter(masked, fqn).sub_(STEP_SIZE * grad)
    leaks = [fqn for fqn, mask in masks.items() if bool(stored_parameter(masked, fqn)[~mask].any())]
    return (f"{leaks[0]} is not 0 where it is masked after a step" if leaks else ""), facts


def _plain_fault(case: Case, rank: int, store: Path) -> str:
    """Why the plain model does not train on two ranks either; empty when it does."""
    try:
        _join(rank, store)
        plain, _ = built(case)
        _gradients(_wrap(plain, is_sparse_in_use=True), plain, _batch(case, rank), rank)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _wrap(model: nn.Module, *, is_sparse_in_use: bool) -> nn.Module:
    return DistributedDataParallel(model, find_unused_parameters=is_sparse_in_use)


def _batch(case: Case, rank: int) -> Inputs:
    seed_all(10 + rank)
    return case.batch(case.batch_sizes[0])


def _gradients(called: nn.Module, model: nn.Module, inputs: Inputs, rank: int) -> Gradients:
    """Gradients by FQN of one call of `called`, which is `model` or wraps it; buffers of the model are put back."""
    buffers = {fqn: buffer.clone() for fqn, buffer in model.named_buffers()}
    seed_all(20 + rank)
    loss_of(tensors_in(called(*inputs.args, **inputs.kwargs))).backward()
    found: Gradients = {}
    for fqn, _ in model.named_parameters():
        parameter = stored_parameter(model, fqn)
        if parameter.grad is not None:
            grad = parameter.grad.detach()
            found[fqn] = grad.to_dense() if grad.is_sparse else grad.clone()
            parameter.grad = None
    put_back(model, buffers)
    return found


def _mean(halves: list[Gradients], masks: Mapping[str, Tensor]) -> Gradients:
    """The mean over the ranks, masked by hand; a rank that does not use a parameter counts as zeros."""
    mean: Gradients = {}
    for fqn in {fqn: None for half in halves for fqn in half}:
        parts = [half[fqn] for half in halves if fqn in half]
        total = torch.stack(parts).sum(0) / RANKS
        mean[fqn] = total * masks[fqn] if fqn in masks else total
    return mean
