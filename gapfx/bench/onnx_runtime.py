"""A model in ONNX Runtime, where that is installed."""

from __future__ import annotations

import contextlib
import importlib
import io
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gapfx.io.onnx_file import without_fast_path


def missing() -> str:
    """Why there is no ONNX Runtime here; "" when there is."""
    for name in ("onnx", "onnxruntime"):
        try:
            importlib.import_module(name)
        except ImportError:
            return f"{name} is not installed"
    return ""


def session_of(model: nn.Module, inputs: tuple[Tensor, ...]) -> Callable[[], object]:
    """Runs the model on these inputs with as many threads as torch has. Raises what the export raises."""
    runtime: Any = importlib.import_module("onnxruntime")
    file = io.BytesIO()
    export: Any = torch.onnx.export  # whose types leave out the files that it takes
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), without_fast_path():
        warnings.simplefilter("ignore")
        export(model, inputs, file, dynamo=False)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    # Else its threads spin on for milliseconds, at the cost of whatever is timed next.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = runtime.InferenceSession(file.getvalue(), options, providers=["CPUExecutionProvider"])
    fed = {item.name: x.detach().numpy() for item, x in zip(session.get_inputs(), inputs, strict=True)}
    return lambda: session.run(None, fed)
