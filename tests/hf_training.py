"""A training by the Trainer of Hugging Face, as a program: a sparse Llama on made-up text, with the callback or not."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

import gapfx
from gapfx.hf import SparseCallback
from gapfx.sparse import CompileOptions, compile_model


def model_of() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2, use_cache=False))


def plan_of(steps: int) -> gapfx.Plan:
    tokens = torch.randint(64, (1, 16))
    plan = compile_model(model_of(), lambda m: m(tokens), CompileOptions(sparsity=0.8, groups=2)).plan
    return gapfx.with_schedule(plan, "gap", gapfx.Budget(1, steps // 4, steps - 2 * (steps // 4)))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--steps", type=int, default=20)
    for flag in ("--plain", "--plan", "--resume"):
        parser.add_argument(flag, action="store_true")
    given = parser.parse_args()
    model, generator = model_of(), torch.Generator().manual_seed(1)
    planned = [fqn for fqn, _ in model.named_parameters() if "proj" in fqn]
    masks = {fqn: torch.rand(model.get_parameter(fqn).shape, generator=generator) < 0.2 for fqn in planned}
    for fqn, mask in masks.items():
        model.get_parameter(fqn).data *= mask
    before = {fqn: model.get_parameter(fqn).detach().clone() for fqn in planned}
    callback = SparseCallback(plan=plan_of(given.steps)) if given.plan else SparseCallback(masks=masks)
    texts = [{"input_ids": (row := torch.randint(64, (16,), generator=generator)), "labels": row} for _ in range(64)]
    arguments = TrainingArguments(
        output_dir=str(given.out),
        max_steps=given.steps,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        weight_decay=0.1,
        save_steps=10,
        logging_steps=10,
        report_to=[],
        use_cpu=True,
        seed=0,
    )
    trainer = Trainer(model, arguments, train_dataset=texts, callbacks=[] if given.plain else [callback])
    trainer.train(resume_from_checkpoint=given.resume)
    held = callback.held
    final = masks if held is None else {fqn: mask.cpu() for fqn, mask in held.masks.items()}
    values = {fqn: model.get_parameter(fqn).detach() for fqn in final}
    if trainer.is_world_process_zero():
        facts = {
            "alive": sum(int(values[fqn][~mask].count_nonzero()) for fqn, mask in final.items()),
            "masked": sum(int((~mask).sum()) for mask in final.values()),
            "moved": sum(int((values[fqn] != before[fqn]).sum()) for fqn in final),
            "sparsity": held.sparsity if held else 0.0,
            "steps": trainer.state.global_step,
        }
        (given.out / "facts.json").write_text(json.dumps(facts))


if __name__ == "__main__":
    main()
