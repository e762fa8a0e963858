"""A whole training step, dense and sparse: forward, backward, optimizer.

    python tools/bench_step.py                        # GPT of 86 million weights, 512 tokens, 80 and 90 %
    python tools/bench_step.py --model vit --batch 4
    python tools/bench_step.py --model resnet --batch 8 --threads 2

All ways run in one process, in turns, and medians are compared: dense in plain torch, in torch.compile and on DeepSpeed
(ZeRO 1, one process), and gapfx's lowered model with one of four groups dense and with all sparse, each with the weight
made dense (`expand`) and with the kernels that calibration chooses (`sparse`). On one thread the times are those of the
process, which other programs on the machine do not lengthen. The optimizer is fused AdamW everywhere.
"""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from gapfx.bench.live import hold_live
from gapfx.calibration.measure import interleaved
from gapfx.ops.recompute import without_dense
from gapfx.runtime.engine import Engine, EngineOptions, process_group
from gapfx.runtime.launch import single_process_environment
from gapfx.sparse import CompileOptions, compile_model
from tools.bench_models import made

NUM_GROUPS = 4
Step = Callable[[], object]


def plain_step(model: nn.Module, batch: Any, loss: Callable[[nn.Module, Any], Tensor]) -> Step:
    """One step of torch with fused AdamW."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with without_dense():
            value = loss(model, batch)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def deepspeed_step(model: nn.Module, batch: Any, loss: Callable[[nn.Module, Any], Tensor]) -> Step:
    """One step of a DeepSpeed engine, ZeRO 1."""
    engine = Engine(model, lambda params: torch.optim.AdamW(params, lr=1e-4, fused=True), EngineOptions(len(batch)))
    return lambda: engine.train_step([batch], loss, 1.0)


def sparse_steps(
    sizes: tuple[str, int, int, int], sparsity: float, pattern: str, ways: tuple[Literal["expand", "auto"], ...]
) -> dict[str, Step]:
    """Ways of gapfx at one sparsity."""
    found: dict[str, Step] = {}
    for kernels in ways:
        model, data, loss = made(*sizes)
        options = CompileOptions(sparsity=sparsity, groups=NUM_GROUPS, pattern=pattern, form="compact", kernels=kernels)
        compiled = compile_model(model, lambda m, loss=loss, data=data: loss(m, data), options)
        way = "sparse" if kernels == "auto" else kernels
        grown = hold_live(copy.deepcopy(compiled.module), compiled.plan, {NUM_GROUPS // 2})
        found[f"gapfx {way} {sparsity:.0%}, a group dense"] = plain_step(grown, data, loss)
        found[f"gapfx {way} {sparsity:.0%}, all sparse"] = plain_step(
            hold_live(compiled.module, compiled.plan), data, loss
        )
    return found


def main(
    model: Annotated[str, typer.Option(help="gpt, vit or resnet.")] = "gpt",
    batch: Annotated[int, typer.Option(help="Samples of a step.")] = 4,
    length: Annotated[int, typer.Option(help="Tokens of a sample of the GPT.")] = 128,
    sparsity: Annotated[list[float], typer.Option(help="Shares of zeros.")] = [0.8, 0.9],  # noqa: B006
    pattern: Annotated[str, typer.Option(help="Pattern of the masks.")] = "unstructured",
    threads: Annotated[int, typer.Option(help="Threads of torch and of the kernels.")] = 1,
    layers: Annotated[int, typer.Option(help="Layers of the GPT and of the ViT.")] = 12,
    expand: Annotated[bool, typer.Option("--expand/--no-expand", help="Time dense products of live values.")] = True,
    seconds: Annotated[float, typer.Option(help="Time for measuring, beside what building takes.")] = 60,
    with_compile: Annotated[bool, typer.Option("--compile/--no-compile", help="Time torch.compile too.")] = True,
) -> None:
    """Print one line a way: the median and its ratio to dense torch."""
    torch.set_num_threads(threads)
    sizes = (model, batch, length, layers)
    single_process_environment()
    with process_group():
        steps: dict[str, Step] = {"dense torch": plain_step(*made(*sizes))}
        if with_compile:
            compiled, data, loss = made(*sizes)
            compiled.compile()
            steps["dense torch.compile"] = plain_step(compiled, data, loss)
        steps["dense DeepSpeed"] = deepspeed_step(*made(*sizes))
        for share in sparsity:
            steps |= sparse_steps(sizes, share, pattern, ("expand", "auto") if expand else ("auto",))
        times = interleaved(steps, seconds)
    for way, taken in times.items():
        ratios = f"{taken / times['dense torch']:.2f} of torch, {taken / times['dense DeepSpeed']:.2f} of DeepSpeed"
        print(f"{way:<36} {taken * 1e3:9.1f} ms  {ratios}")


if __name__ == "__main__":
    typer.run(main)
