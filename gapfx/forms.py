"""The rule that decides how an owner is masked: in its own forward where a trace of that is exact, else at its reads.

A trace is exact when the forward does the same ops at every call, whatever its inputs, flags and the world around it.
Torch's own layers may branch on their settings, which are fixed. Code outside of torch may not branch or loop at all,
nor read what could change between calls. A read is always right, so any doubt decides for it.
"""

from __future__ import annotations

import dis
import sys
import sysconfig
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import BuiltinFunctionType, CodeType, FrameType, FunctionType, ModuleType
from typing import Any, cast

import torch
from torch import fx, nn

from gapfx.capture.state import collector_paused, restored

# What every module has and no forward depends on.
BOOKKEEPING = frozenset(vars(nn.Module()))
FIXED = (ModuleType, FunctionType, BuiltinFunctionType, type)
_TORCH = str(Path(torch.__file__).parent)
_PYTHON = sysconfig.get_path("stdlib")
_LAYERS = str(Path(nn.Linear.forward.__code__.co_filename).parent)
_MODULE = nn.Module.__call__.__code__.co_filename


class _Tracer(fx.Tracer):
    # Else ops on buffers alone run while tracing and are not in the graph.
    proxy_buffer_attributes = True


def exact_trace(module: nn.Module, names: tuple[str, ...]) -> fx.Graph | str:
    """The graph of the module's forward, which reads the parameters `names`; or why a trace of it is not exact."""
    forward = type(module).forward
    if "forward" in vars(module):
        return f"the forward of this {type(module).__name__} was replaced on the object"
    problem = "runs modules of its own" if any(vars(module)["_modules"].values()) else ""
    if not problem and not isinstance(forward, FunctionType):
        problem = "is no Python function"
    problem = problem or _code_problem(cast(FunctionType, forward).__code__, vars(module))
    if not problem:
        graph, problem = _traced(module)
        problem = problem or _graph_problem(graph, module, names)
        if not problem:
            return graph
    return f"the forward of {type(module).__name__} {problem}"


def _traced(module: nn.Module) -> tuple[fx.Graph, str]:
    problems: list[str] = []

    def look(frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            problem = _code_problem(frame.f_code, vars(module)) or _surroundings_problem(frame)
            problems.extend([problem] * bool(problem))

    try:
        # A collection would call functions of others, which look like parts of the forward.
        with collector_paused(), restored(module), _profiled(look):
            graph = _Tracer().trace(module)
    except Exception as error:
        return fx.Graph(), f"cannot be traced: {type(error).__name__}"
    return graph, next(iter(problems), "")


@contextmanager
def _profiled(look: Any) -> Generator[None]:
    before = sys.getprofile()
    sys.setprofile(look)
    try:
        yield
    finally:
        sys.setprofile(before)


def _code_problem(code: CodeType, attributes: dict[str, Any]) -> str:
    """What makes the ops of a function change from call to call, by its bytecode."""
    is_own = _is_own(code)
    if not is_own and (code.co_filename == _MODULE or not code.co_filename.startswith(_LAYERS)):
        return ""
    if "training" in code.co_names:
        return "depends on the training flag"
    for step in dis.get_instructions(code):
        # A trace takes an argument that is left out for one that is there.
        if "NONE" in step.opname.split("_") or step.opname == "IS_OP":
            return "asks whether something is None"
        if is_own and ("_IF_" in step.opname or step.opname == "FOR_ITER"):
            return "branches or loops"
        if is_own and step.opname.startswith(("STORE_ATTR", "STORE_SUBSCR", "STORE_GLOBAL", "DELETE_")):
            return "writes outside of its variables"
    changeable = (name for name in code.co_names if name in attributes and name not in BOOKKEEPING)
    name = next(changeable, "") if is_own else ""
    return f"reads the attribute {name}, which may change" if name else ""


def _is_own(code: CodeType) -> bool:
    """Whether a function is the model's: neither torch's, nor Python's library, nor of this file."""
    path = code.co_filename
    is_library = path.startswith((_PYTHON, "<frozen")) and "-packages" not in path
    return not (path.startswith(_TORCH) or is_library or path == __file__)


def _surroundings_problem(frame: FrameType) -> str:
    """Values around a function outside of torch that may change; modules, functions and classes do not."""
    code = frame.f_code
    if not _is_own(code):
        return ""
    names = [step.argval for step in dis.get_instructions(code) if step.opname == "LOAD_GLOBAL"]
    around = [(name, frame.f_globals[name]) for name in names if name in frame.f_globals]
    around += [(name, frame.f_locals[name]) for name in code.co_freevars if name in frame.f_locals]
    name = next((name for name, value in around if not isinstance(value, FIXED)), "")
    return f"depends on {name}, which may change" if name else ""


def _graph_problem(graph: fx.Graph, module: nn.Module, names: tuple[str, ...]) -> str:
    stored = vars(module)
    kept = {name for table in ("_parameters", "_buffers") for name, value in stored[table].items() if value is not None}
    reads = {str(node.target) for node in graph.nodes if node.op == "get_attr"}
    unread = [name for name in names if name not in reads]
    if unread:
        return f"does not read {unread[0]} itself"
    if reads - kept:
        return "makes tensors that a trace keeps as constants"
    return next(_writes(graph), "")


def _writes(graph: fx.Graph) -> Iterator[str]:
    for node in graph.nodes:
        name = str(getattr(node.target, "__name__", node.target))
        if node.op in ("call_function", "call_method") and (name.endswith("_") or name in ("setitem", "iadd", "imul")):
            yield f"writes in place, by {name}"
