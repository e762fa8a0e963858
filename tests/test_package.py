"""What a user gets from `pip install`: wheel, editable install, clone without symbolic links."""

import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins() -> dict[str, str]:
    """Distribution name -> version in constraints.txt."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    return {name.lower(): version for name, version in (line.split("==") for line in lines)}


def run(*command: str | Path, cwd: Path) -> str:
    result = subprocess.run([str(part) for part in command], cwd=cwd, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def copy_of_checkout(folder: Path) -> Path:
    """The files that a commit of the working tree would hold, so that building leaves nothing in the checkout."""
    names = run("git", "ls-files", "--cached", "--others", "--exclude-standard", cwd=ROOT).splitlines()
    for name in names:
        source, target = ROOT / name, folder / name
        if source.is_symlink() or source.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)
    return folder


def environment(folder: Path) -> Path:
    """Python of a new virtual environment without pip that sees the packages of the running one, but not gapfx."""
    venv.create(folder, with_pip=False, symlinks=True)
    return folder / "bin" / "python"


@pytest.mark.parametrize("extra", ["", *PROJECT["optional-dependencies"]])
def test_every_requirement_is_pinned_inside_its_range(extra: str) -> None:
    lines = PROJECT["optional-dependencies"][extra] if extra else PROJECT["dependencies"]
    others = (one for one in map(Requirement, lines) if one.name != "gapfx")  # an extra that takes another in
    for requirement in others:
        version = pins()[requirement.name]
        assert version in requirement.specifier, f"{requirement} against {version}"


def test_torch_has_no_upper_bound() -> None:
    [torch] = [line for line in map(Requirement, PROJECT["dependencies"]) if line.name == "torch"]
    assert torch.specifier.contains("99.0")
    assert not torch.specifier.contains("2.10")


def test_the_readme_marks_one_install_and_one_test_command() -> None:
    readme = (ROOT / "README.md").read_text()
    blocks = re.findall(r"<!-- (\w+)-command -->\n```bash\n(.+?)```", readme, flags=re.DOTALL)
    assert [name for name, _ in blocks] == ["run", "test"]
    assert all("-c constraints.txt" in text for _, text in blocks)


@pytest.mark.slow
def test_the_wheel_holds_every_source_file_and_nothing_else(tmp_path: Path) -> None:
    checkout = copy_of_checkout(tmp_path / "checkout")
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "-w", tmp_path, checkout, cwd=tmp_path)
    [wheel] = tmp_path.glob("gapfx-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        licenses = [name for name in archive.namelist() if name.endswith("/licenses/LICENSE")]
    sources = {
        name if name.startswith("gapfx/") else f"gapfx/{name}"
        for folder in ("gapfx", "passes")
        for path in (checkout / folder).rglob("*")
        if path.is_file() and (name := str(path.relative_to(checkout)))
    }
    compiled = {name for name in names if re.fullmatch(r"gapfx/kernels/_native\..*so", name)}
    assert names - compiled == sources
    assert len(compiled) == (shutil.which(sysconfig.get_config_var("CC").split()[0]) is not None)
    assert {"gapfx/py.typed", "gapfx/passes/__init__.py", "gapfx/passes/partition.py"} <= names
    assert len(licenses) == 1


@pytest.mark.slow
@pytest.mark.parametrize("has_link", [True, False], ids=["with-link", "core.symlinks=false"])
def test_an_editable_install_maps_passes_and_sees_new_files(has_link: bool, tmp_path: Path) -> None:
    checkout = copy_of_checkout(tmp_path / "checkout")
    if not has_link:  # what git writes where it may not make links
        (checkout / "gapfx" / "passes").unlink()
        (checkout / "gapfx" / "passes").write_text("../passes")
    python = environment(tmp_path / "environment")
    target = [f"--python={python}", "install", "--quiet", "--no-deps", "-e", checkout]
    run(sys.executable, "-m", "pip", *target, cwd=tmp_path)
    (checkout / "passes" / "brand_new.py").write_text("ANSWER = 42\n")
    # Importing gapfx.passes loads torch, which is not in the new environment: find the files without running them.
    code = """
import importlib.util, pathlib, gapfx
spec = importlib.util.find_spec("gapfx.passes")
print(gapfx.__version__, *sorted(path.name for path in pathlib.Path(spec.origin).parent.glob("*.py")))
"""
    version, *names = run(python, "-I", "-c", code, cwd=tmp_path).split()
    assert version == PROJECT["version"]
    assert {"__init__.py", "brand_new.py", "insert_masks.py"} <= set(names)
    bare = subprocess.run([python, "-I", "-c", "import passes"], cwd=tmp_path, capture_output=True, check=False)
    assert bare.returncode != 0
