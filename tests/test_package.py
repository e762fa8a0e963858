"""What a user gets from `pip install`: wheel, editable install, clone without symbolic links."""

import os
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
NOT_BUILT = "not built: install gapfx where a C++ compiler is at hand"
# Forward and backward of the layers of training, and the layer of inference, against torch's own.
PRODUCTS = """
import torch, gapfx
import torch.nn.functional as F
from gapfx.masks import pack
from gapfx.ops.fixed_linear import fixed_linear
from gapfx.ops.sparse_linear import sparse_linear
mask = torch.rand(24, 40) < 0.3
dense, x, bias = torch.randn(24, 40) * mask, torch.randn(20, 40, requires_grad=True), torch.randn(24)
values, bits = dense[mask].view(-1, 1), pack(mask)
found, wanted = sparse_linear(x, values, bits, bias, (24, 40)), F.linear(x, dense, bias)
torch.testing.assert_close(found, wanted)
of_found, of_wanted = (torch.autograd.grad(y.square().sum(), x)[0] for y in (found, wanted))
torch.testing.assert_close(of_found, of_wanted)
torch.testing.assert_close(fixed_linear(x.detach(), values, bits, bias, (24, 40)), wanted)
print(gapfx.__file__)
"""
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def pins() -> dict[str, str]:
    """Distribution name -> version in constraints.txt."""
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    return {name.lower(): version for name, version in (line.split("==") for line in lines)}


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    given, env = [str(part) for part in command], os.environ | variables
    result = subprocess.run(given, cwd=cwd, env=env, capture_output=True, text=True, check=False)
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


@pytest.fixture(scope="module", params=["false", "/nowhere/c++"], ids=["that fails", "that is missing"])
def installed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where gapfx lies after an install with a compiler like this; processes that start there import it from there."""
    folder = tmp_path_factory.mktemp("installed")
    checkout = copy_of_checkout(folder / "checkout")
    target = ["install", "--quiet", "--no-deps", "--no-build-isolation", "--target", folder / "target", checkout]
    run(sys.executable, "-m", "pip", *target, cwd=folder, CC=request.param, CXX=request.param)
    return folder / "target"


def of_the_installed(folder: Path, *arguments: str | Path) -> str:
    """What Python prints that finds gapfx in this folder before any other."""
    return run(sys.executable, *arguments, cwd=folder, COLUMNS="200", GAPFX_NATIVE="")


@pytest.mark.slow
def test_with_such_a_compiler_the_install_goes_on_and_doctor_says_that_no_kernels_were_built(installed: Path) -> None:
    assert list(installed.rglob("*.so")) == []
    told = of_the_installed(installed, "-m", "gapfx", "doctor")
    assert f"torch's, the native ones are {NOT_BUILT}\n" in told


@pytest.mark.slow
def test_with_such_a_compiler_torch_multiplies(installed: Path) -> None:
    imported = of_the_installed(installed, "-c", PRODUCTS).strip()
    assert Path(imported).is_relative_to(installed)


@pytest.mark.slow
def test_with_such_a_compiler_a_plan_names_the_reason_where_kernels_are_wanted(installed: Path) -> None:
    task = ROOT / "tests" / "tasks" / "classify.py"
    plan = of_the_installed(installed, "-m", "gapfx", "plan", task, "--kernels", "sparse")
    assert re.search(r"^expand +1 +16x8 ", plan, flags=re.MULTILINE)
    assert f"note: stem.weight: no sparse kernel: no native kernels: {NOT_BUILT}\n" in plan
