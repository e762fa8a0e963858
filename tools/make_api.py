"""Writes the reference of gapfx's Python side from its docstrings, as Markdown.

    python tools/make_api.py --out docs/api.md

What is public stands in `SECTIONS`: a new public name goes there, and its words into its docstring.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, ModuleType
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

sys.path.insert(0, str(Path(__file__).parent.parent))

app = typer.Typer(add_completion=False, help=__doc__)
EMPTY = inspect.Parameter.empty
WIDTH = 100  # columns of a signature on one line
HEAD = "# Python reference\n\nMade by `python tools/make_api.py --out docs/api.md` from the docstrings.\n"


@dataclass(frozen=True)
class Section:
    """A heading, words below it, and what is public of a module; with `table`, a registry whose entries are listed."""

    title: str
    words: str
    module: str
    names: tuple[str, ...]
    table: str = ""


PLAN = ("Plan", "Group", "Weight", "DenseWeight", "OwnerForm", "Phase")
ERRORS = (
    *("GapfxError", "UserError", "TaskError", "CaptureError", "PlanError", "FileError", "CheckpointError"),
    *("DivergedError", "PassError", "AuditError", "Interrupted"),
)
SECTIONS = (
    Section(
        "Compile and train",
        "All of it is imported from `gapfx`, and loads on first use: `import gapfx` imports no torch.",
        "gapfx",
        ("sparsify", "Sparse", "hold", "Held", "masks_from_zeros", "load", "with_schedule", "Budget"),
    ),
    Section("Files", "", "gapfx", ("save_sparse", "load_sparse", "load_masks")),
    Section(
        "Hugging Face",
        "Needs `pip install 'gapfx[hf]'`.",
        "gapfx.hf",
        ("SparseCallback", "save_pretrained", "from_pretrained", "write_state", "read_state"),
    ),
    Section("The plan", "`gapfx.Plan` and what it is made of.", "gapfx.plan", PLAN),
    Section(
        "Schedules",
        "A method is a function `(budget: Budget, num_groups: int) -> Schedule` under `@SCHEDULES.register(name)`, and "
        "`--method name` takes it. [examples/custom_method.py](../examples/custom_method.py) adds one.",
        "gapfx.schedule",
        ("Schedule",),
        "SCHEDULES",
    ),
    Section(
        "Criteria",
        "What a prune keeps, by `--criterion`, under `@CRITERIA.register(name)`.",
        "gapfx.criterion",
        ("Criterion", "ByGradient", "elementwise", "ordinal"),
        "CRITERIA",
    ),
    Section(
        "Patterns",
        "Which weights may be zero together, by `--pattern`, under `@PATTERNS.register(name)`; `N:M` needs no name.",
        "gapfx.pattern",
        ("Pattern", "SlicedPattern", "PatternParser", "parse_pattern", "Unstructured", "NOfM", "Block"),
    ),
    Section(
        "Passes",
        "What the compiler does, by `--passes`, under `@register`. `gapfx passes` shows the options of each.",
        "gapfx.compiler",
        ("Pass", "Analysis", "Rewrite", "Unit"),
        "PASSES",
    ),
    Section(
        "Registries", "Where methods, criteria, patterns and passes have their names.", "gapfx.registry", ("Registry",)
    ),
    Section(
        "Errors",
        "Every error that gapfx raises on purpose. `UserError` has `what`, `where` and `fix` as texts; those with exit "
        "code 2 are its kinds.",
        "gapfx.errors",
        ERRORS,
    ),
)


class Bare(str):
    """An annotation as it stands in the source, without quotes."""

    __slots__ = ()
    __repr__ = str.__str__


def page() -> str:
    """The whole reference."""
    importlib.import_module("gapfx.passes")  # registers them
    return "\n".join([HEAD, *(line for section in SECTIONS for line in _section(section))])


def _section(section: Section) -> Iterator[str]:
    module = importlib.import_module(section.module)
    yield f"## {section.title}\n"
    if section.words:
        yield f"{section.words}\n"
    if section.table:
        registry = getattr(module, section.table)
        yield _table(("name", "what it is"), [(f"`{name}`", _summary(registry[name])) for name in registry])
    things = [getattr(module, name) for name in section.names]
    if all(inspect.isclass(thing) and issubclass(thing, Exception) for thing in things):
        rows = [(f"`{thing.__name__}`", str(thing.exit_code), _summary(thing)) for thing in things]
        yield _table(("error", "exit code", "when"), rows)
        return
    for name, thing in zip(section.names, things, strict=True):
        yield f"### {section.module}.{name}\n"
        if _has_signature(thing):
            yield f"```py\n{_signature(name, thing)}\n```\n"
        yield f"{_doc(thing)}\n"
        yield from _members(thing) if inspect.isclass(thing) else ()


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = (head, ["---"] * len(head), *rows)
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def _members(kind: type) -> Iterator[str]:
    """Public methods and properties of the class itself; for a protocol the call too."""
    for name, value in vars(kind).items():
        member = value.__func__ if isinstance(value, staticmethod | classmethod) else value
        is_call = name == "__call__" and _is_protocol(kind)
        if (name.startswith("_") and not is_call) or not isinstance(member, FunctionType | property):
            continue
        returned = getattr(member, "fget", None)
        shown = f"{name}: {returned.__annotations__['return']}" if returned else _signature(name, member, 10_000)
        yield f"- `{shown}`\n\n{textwrap.indent(_doc(member), '  ')}\n"


def _is_protocol(thing: Any) -> bool:
    return bool(getattr(thing, "_is_protocol", False))


def _has_signature(thing: Any) -> bool:
    """Not for a protocol, nor for what is made by others: it would show what is nobody's business."""
    if not inspect.isclass(thing):
        return True
    names = list(inspect.signature(thing).parameters)
    return bool(names) and not _is_protocol(thing) and not any(name.startswith("_") for name in names)


def _signature(name: str, thing: Any, width: int = WIDTH) -> str:
    """On one line, or a parameter a line. Names of literals in annotations become the literals."""
    found, module = inspect.signature(thing), sys.modules[thing.__module__]
    parameters = [p for p in found.parameters.values() if p.name != "self"]
    shown = [str(_plain(p, module)) for p in parameters]
    named = next((place for place, p in enumerate(parameters) if p.kind is p.KEYWORD_ONLY), None)
    if named is not None and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
        shown.insert(named, "*")
    is_class = inspect.isclass(thing)
    result = "" if is_class else f" -> {_literal(str(found.return_annotation), module)}"
    line = f"{name}({', '.join(shown)}){result}"
    return line if len(line) <= width else f"{name}(\n" + "".join(f"    {part},\n" for part in shown) + f"){result}"


def _plain(parameter: inspect.Parameter, module: ModuleType) -> inspect.Parameter:
    annotation, default = parameter.annotation, parameter.default
    if isinstance(annotation, str):
        parameter = parameter.replace(annotation=Bare(_literal(annotation, module)))
    return (
        parameter.replace(default=Bare(default.__name__))
        if inspect.isclass(default) and default is not EMPTY
        else parameter
    )


def _literal(annotation: str, module: ModuleType) -> str:
    def text(found: re.Match[str]) -> str:
        value = getattr(module, found[0], None)
        return f"Literal[{', '.join(map(repr, get_args(value)))}]" if get_origin(value) is Literal else found[0]

    return re.sub(r"\b[A-Za-z_]+\b", text, annotation).replace("'", '"')


def _doc(thing: Any) -> str:
    return inspect.cleandoc(getattr(thing, "score", thing).__doc__ or "")


def _summary(thing: Any) -> str:
    return _doc(thing).partition("\n\n")[0].replace("\n", " ").replace("|", "\\|")


@app.command()
def main(out: Annotated[Path | None, typer.Option(help="write a Markdown file")] = None) -> None:
    """Print the reference, or write it."""
    if out:
        out.write_text(page())
    else:
        typer.echo(page())


if __name__ == "__main__":
    app()
