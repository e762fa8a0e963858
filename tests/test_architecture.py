"""The shape that ARCHITECTURE.md describes, checked on the source itself."""

import ast
import graphlib
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINK = ROOT / "gapfx" / "passes"
SOURCE_FOLDERS = ("gapfx", "passes")
ALL_FOLDERS = (*SOURCE_FOLDERS, "tests", "tools", "examples")
VAGUE_NAMES = {"base", "common", "core", "helper", "helpers", "manager", "managers", "misc", "util", "utils"}
ALLOWED_NOTHING = ""
EVERYTHING = "*"

# Part of gapfx -> the other parts that it may import. A new module needs a row: put it where the layers allow it.
MAY_IMPORT = {
    "gapfx": EVERYTHING,
    "__main__": "cli runtime",
    "errors": ALLOWED_NOTHING,
    "chains": ALLOWED_NOTHING,
    "quantities": ALLOWED_NOTHING,
    "plugins": "errors",
    "registry": "errors plugins",
    "allocation": "errors",
    "globs": "errors",
    "options": "errors",
    "typed_json": "errors",
    "plan": "errors typed_json",
    "pattern": "errors registry kernels threshold",
    "criterion": "errors registry",
    "masks": "errors pattern kernels",
    "kernels": ALLOWED_NOTHING,
    "threshold": "kernels",
    "ops": "errors masks kernels",
    "io": "errors plan typed_json masks ops",
    "budget": "plan registry",
    "schedules": "errors plan budget",
    "schedule": "errors plan budget schedules",
    "doctor": "errors kernels",
    "calibration": "errors plan pattern masks kernels ops doctor",
    "capture": "errors",
    "layers": "errors capture",
    "block_flow": "capture",
    "forms": "capture",
    "owners": "errors plan capture forms",
    "in_place": "masks",
    "rows": ALLOWED_NOTHING,
    "realise": "errors plan capture masks ops owners in_place rows",
    "emit": "capture owners compiler text",
    "text": "errors plan pattern schedule capture quantities",
    "compiler": "errors registry options plan capture owners realise text",
    "lowered": "plan calibration ops capture owners compiler",
    "repeats": ALLOWED_NOTHING,
    "passes": "errors registry allocation chains globs repeats plan pattern criterion masks ops capture layers "
    "block_flow owners compiler calibration lowered",
    "runtime": "errors registry plan pattern criterion masks ops io schedule threshold",
    "settings": "errors",
    "method_settings": "errors budget schedules settings",
    "direction": ALLOWED_NOTHING,
    "task": "errors registry",
    "run_dir": "errors plan settings",
    "progress": "errors plan schedule quantities",
    "report": "direction errors plan schedule quantities run_dir",
    "figure": "plan quantities chains capture layers compiler passes report",
    "expectation": "plan pattern calibration passes",
    "quality": "plan layers compiler passes text",
    "verify": "errors plan masks capture owners compiler realise",
    "compile_notes": "plan pattern capture compiler layers",
    "sparse": "errors plan pattern criterion masks ops capture compiler passes realise verify calibration lowered "
    "compile_notes",
    "writers": "errors registry plan",
    "recording": "errors plan settings run_dir progress writers runtime",
    "model_file": "errors io masks runtime",
    "results": "direction errors io plan masks settings task run_dir report model_file runtime",
    "metrics": "errors task runtime",
    "phasing": "errors globs plan method_settings schedule settings runtime",
    "training": "errors estimate metrics phasing origin plan settings task run_dir progress writers compiler sparse "
    "runtime recording results",
    "two_of_four": "plan",
    "origin": "errors io plan run_dir",
    "loading": "errors plan masks kernels ops task compiler passes sparse training two_of_four origin",
    "holding": "errors plan pattern criterion masks runtime",
    "hf": "errors plan masks holding",
    "export": "errors io plan run_dir origin loading",
    "bench": "errors io plan pattern masks kernels ops settings task run_dir doctor calibration runtime sparse "
    "training two_of_four loading",
    "flops": "plan",
    "estimate": "criterion device_profile errors plan flops runtime",
    "activations": "flops",
    "device_profile": "errors",
    "forecast": "activations device_profile errors plan flops estimate quantities text",
    "compare": "direction errors method_settings phasing plan schedule settings task run_dir quantities report results "
    "training flops runtime",
    "commands": EVERYTHING,
    "planning": EVERYTHING,
    "cli_flags": "settings",
    "cli": "errors commands planning cli_flags doctor export kernels",
}
# Above compiler and runtime: imported by each other alone.
TOP_PARTS = {
    "__main__",
    "bench",
    "cli",
    "commands",
    "compare",
    "export",
    "loading",
    "metrics",
    "model_file",
    "planning",
    "recording",
    "results",
    "sparse",
    "training",
}
MAY_PRINT = {"__main__", "cli", "commands", "progress"}


def python_files(*folders: str) -> list[Path]:
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    return [path for path in files if LINK not in path.parents]


def module_name(path: Path) -> str:
    """Dotted name of a source file: passes/x.py is gapfx.passes.x."""
    parts = list(path.relative_to(ROOT).with_suffix("").parts)
    if parts[0] == "passes":
        parts.insert(0, "gapfx")
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def part_of(module: str) -> str:
    """`gapfx.runtime.loop` -> `runtime`; the package itself -> `gapfx`."""
    return module.split(".")[1] if "." in module else module


def imports_of(path: Path, known: set[str]) -> Iterator[str]:
    """Every module of gapfx that a file imports, also inside functions."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            names = [name for name in names if name in known and (name != "gapfx" or len(names) == 1)]
        else:
            continue
        yield from (name for name in names if name.split(".")[0] == "gapfx")


SOURCES = {module_name(path): path for path in python_files(*SOURCE_FOLDERS)}


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_the_source_is_found() -> None:
    assert {"gapfx", "gapfx.plan", "gapfx.runtime.launch", "gapfx.passes.partition"} <= set(SOURCES)
    assert len(SOURCES) == len(python_files(*SOURCE_FOLDERS))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("import gapfx.plan", ["gapfx.plan"]),
        ("from gapfx import plan", ["gapfx.plan"]),
        ("from gapfx.plan import Plan", ["gapfx.plan"]),
        ("from gapfx.runtime import launch", ["gapfx.runtime", "gapfx.runtime.launch"]),
        ("def late():\n    from gapfx.errors import UserError", ["gapfx.errors"]),
        ("import torch\nfrom networkx import Graph", []),
    ],
)
def test_every_way_to_import_is_seen(text: str, found: list[str], tmp_path: Path) -> None:
    path = tmp_path / "module.py"
    path.write_text(text)
    assert list(imports_of(path, set(SOURCES))) == found


def test_every_part_has_a_row_in_the_import_table() -> None:
    assert {part_of(module) for module in SOURCES} - set(MAY_IMPORT) == set()


@pytest.mark.parametrize("module", sorted(SOURCES))
def test_imports_point_down(module: str) -> None:
    part = part_of(module)
    if MAY_IMPORT[part] == EVERYTHING:
        return
    allowed = {part, *MAY_IMPORT[part].split()}
    imported = {part_of(name) for name in imports_of(SOURCES[module], set(SOURCES))}
    assert imported - allowed == set(), f"{module} ({part}) may import only {sorted(allowed)}"


def test_the_import_table_has_no_cycle_and_nothing_below_the_command_line_imports_the_top() -> None:
    rows = {part: set(parts.split()) for part, parts in MAY_IMPORT.items() if parts != EVERYTHING}
    list(graphlib.TopologicalSorter(rows).static_order())
    below = [parts for part, parts in rows.items() if part not in TOP_PARTS]
    assert set().union(*below) & TOP_PARTS == set()


def test_compiler_and_runtime_share_only_the_plan_and_its_words() -> None:
    compiler_side, runtime_side = ({part, *MAY_IMPORT[part].split()} for part in ("passes", "runtime"))
    shared = {"errors", "registry", "plan", "pattern", "criterion", "masks", "ops"}
    assert compiler_side & runtime_side == shared


def test_modules_have_no_import_cycle() -> None:
    graph = {
        module: set(imports_of(path, set(SOURCES))) - {module} for module, path in SOURCES.items() if module != "gapfx"
    }
    list(graphlib.TopologicalSorter(graph).static_order())


@pytest.mark.parametrize("path", python_files(*ALL_FOLDERS), ids=lambda path: str(path.relative_to(ROOT)))
def test_a_file_is_short_well_named_and_imports_by_full_name(path: Path) -> None:
    text = path.read_text()
    assert len(text.splitlines()) <= 350, "split it by meaning"
    assert path.stem not in VAGUE_NAMES, "name it after what it holds"
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            assert (node.module or "").split(".")[0] != "passes", f"line {node.lineno}: write gapfx.passes"
        if isinstance(node, ast.Import):
            assert all(alias.name.split(".")[0] != "passes" for alias in node.names), f"line {node.lineno}"
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno < 60, f"{node.name} has 60 lines or more"


def test_half_of_the_files_are_at_most_130_lines_long() -> None:
    assert statistics.median(len(path.read_text().splitlines()) for path in SOURCES.values()) <= 130


def test_only_the_command_line_prints_or_exits() -> None:
    found = [
        f"{module}:{node.lineno}"
        for module, path in SOURCES.items()
        if part_of(module) not in MAY_PRINT
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("print", "sys.exit", "exit")
    ]
    assert found == []


def test_every_folder_with_code_is_in_the_packages_list() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    folders = {module_name(path) if path.stem == "__init__" else module_name(path.parent) for path in SOURCES.values()}
    assert sorted(listed) == sorted(folders)
    assert [folder for folder in folders if folder not in SOURCES] == [], "a folder without __init__.py"


def test_gapfx_passes_is_a_link_to_passes() -> None:
    # A clone with core.symlinks=false has a small file instead of the link.
    assert (LINK.readlink() if LINK.is_symlink() else Path(LINK.read_text())) == Path("../passes")
    assert [path for path in (ROOT / "passes").iterdir() if path.is_dir() and path.name != "__pycache__"] == []


def test_import_gapfx_loads_neither_torch_nor_deepspeed() -> None:
    assert run_python("import sys, gapfx; print({'torch', 'deepspeed'} & set(sys.modules))") == "set()\n"


def test_gapfx_help_loads_neither_torch_nor_deepspeed() -> None:
    code = """
import sys
from gapfx.cli import main
sys.argv = ["gapfx", "--help"]
try:
    main()
except SystemExit as end:
    assert end.code in (0, None), end.code
print({"torch", "deepspeed"} & set(sys.modules))
"""
    shown = run_python(code)
    assert "sparsify" in shown
    assert shown.endswith("set()\n")


def test_every_public_name_loads_and_no_module_of_the_same_name_hides_it() -> None:
    code = """
import importlib, types
import gapfx
for name in gapfx.__all__:
    if name != "__version__":
        importlib.import_module(gapfx._PUBLIC[name])
    value = getattr(gapfx, name)
    assert not isinstance(value, types.ModuleType), name
    assert name in dir(gapfx), name
assert set(gapfx.__all__) == {*gapfx._PUBLIC, "__version__"}
"""
    run_python(code)


def test_an_unknown_name_is_an_attribute_error() -> None:
    import gapfx

    with pytest.raises(AttributeError, match="module 'gapfx' has no attribute 'nonsense'"):
        _ = gapfx.nonsense
