"""Models as ONNX files, and what ONNX Runtime makes of them."""

from __future__ import annotations

import contextlib
import importlib
import io
import logging
import warnings
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.backends.mha
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from gapfx.errors import UserError

# Share of zeros from which a weight is smaller as values with 8-byte places.
SPARSE_FROM = 0.75
_LEAST_NUMEL = 1024


def write_onnx(
    path: Path, module: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], *, is_sparse: bool = False
) -> None:
    """Write the model, in eval mode, as it runs on these inputs; the first dimension of tensors may differ later.

    `is_sparse` writes weights with many zeros as sparse initialisers: values and places. Raises UserError without the
    libraries onnx and onnxscript, and for a model that torch's exporter does not take.
    """
    onnx = _need("onnx")
    _need("onnxscript")
    with _quietly(), without_fast_path():
        try:
            program: Any = torch.onnx.export(
                module,
                tuple(args),
                kwargs=dict(kwargs) or None,
                dynamo=True,
                verbose=False,
                dynamic_shapes=_first_dimensions(args, kwargs),
            )
        except torch.onnx.OnnxExporterError as error:
            first = str(error).strip().splitlines()[0]
            raise UserError(
                f"torch's exporter to ONNX does not take this model: {first}", fix="export it as safetensors"
            ) from error
    model = program.model_proto
    if is_sparse:
        _make_sparse(model)
    onnx.save(model, str(path), save_as_external_data=model.ByteSize() > 2**31 - 2**20)


def _first_dimensions(args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    def dims(value: Any) -> Any:
        return {0: torch.export.Dim.AUTO} if isinstance(value, Tensor) and value.dim() else None

    shapes = tree_map(dims, tuple(args))
    return (*shapes, *tree_map(dims, dict(kwargs)).values()) if kwargs else shapes


def _make_sparse(model: Any) -> None:
    """Put initialisers that are mostly zeros, in place, as values and the places of these in the flat tensor."""
    onnx = _need("onnx")
    dense = list(model.graph.initializer)
    for tensor in dense:
        values = onnx.numpy_helper.to_array(tensor)
        numel, places = values.size, np.flatnonzero(values)
        if numel < _LEAST_NUMEL or values.dtype != np.float32 or places.size > (1 - SPARSE_FROM) * numel:
            continue
        live = onnx.numpy_helper.from_array(values.reshape(-1)[places], tensor.name)
        where = onnx.numpy_helper.from_array(places.astype(np.int64), f"{tensor.name}_places")
        model.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(live, where, values.shape))
        model.graph.initializer.remove(tensor)


def run_onnx(path: Path, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Tensor]:
    """What ONNX Runtime computes from these inputs. Raises UserError without it."""
    runtime = _need("onnxruntime")
    options = runtime.SessionOptions()
    options.log_severity_level = 3
    session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    given = [leaf for leaf in tree_leaves((tuple(args), dict(kwargs))) if isinstance(leaf, Tensor)]
    fed = {item.name: x.detach().cpu().numpy() for item, x in zip(session.get_inputs(), given, strict=True)}
    return [torch.from_numpy(np.asarray(found)) for found in session.run(None, fed)]


@contextlib.contextmanager
def without_fast_path() -> Generator[None]:
    """Attention by ops that ONNX has, not by the one op of torch's fast path."""
    mha = torch.backends.mha
    before = mha.get_fastpath_enabled()
    mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def _quietly() -> Generator[None]:
    """Without the exporter's words."""
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        log.setLevel(level)


def _need(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"ONNX files need the library {name}", fix="pip install -c constraints.txt 'gapfx[onnx]'"
        ) from error
