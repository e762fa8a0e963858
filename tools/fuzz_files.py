"""Read damaged and hostile sparse files and plans: `python tools/fuzz_files.py --cases 200000`.

Each case changes a good file: bytes, pieces, its length, numbers and texts of its index (with or without a new
checksum), or a plan's JSON. It must be refused with a FileError or PlanError, or be read as what was written; anything
else, a crash, a case of more than `--seconds`, or memory above `--mib`, is a failure, and the file is kept.
"""

from __future__ import annotations

import copy
import json
import multiprocessing
import random
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, cast

import torch
import typer
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))

from gapfx.errors import FileError, PlanError
from gapfx.io.dense_files import InMemory
from gapfx.io.sparse_file import CHECK, ENTRY, open_sparse, text_digest
from gapfx.io.write_sparse import write_sparse
from gapfx.plan import Group, Plan, Weight
from gapfx.schedule import Budget, with_schedule

ODD: tuple[Any, ...] = (
    *(0, 1, -1, 7, 2**31, 2**63, -(2**63), 10**30, 0.5, 1e308, "", "x", "F32", None, True),
    *([], [2**40, 2**40], {}, [[]]),
)


def good_tensors() -> dict[str, Tensor]:
    """A small model: masks of both codes, a tied weight, a dense tensor, whole numbers."""
    generator = torch.Generator().manual_seed(0)

    def sparse(share: float, *shape: int) -> Tensor:
        is_live = torch.rand(shape, generator=generator) < share
        return torch.where(is_live, torch.randn(shape, generator=generator), 0)

    a = sparse(0.1, 20, 30)
    free = {"bias": torch.randn(9, generator=generator), "n": torch.tensor(3)}
    return {"a": a, "tied": a, "b": sparse(0.5, 16, 8), **free}


def good_plan() -> Plan:
    """The plan of that model."""
    groups = (Group("g", (Weight("a", (20, 30), 0.9, aliases=("tied",)),)), Group("h", (Weight("b", (16, 8), 0.5),)))
    return with_schedule(Plan(groups, sparsity=0.8), "gap", Budget(2, 10, 5))


def mutated_bytes(content: bytes, draw: random.Random) -> bytes:
    """The bytes with a few changed, cut, doubled, or moved."""
    data = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 8))):
        if not data:
            break
        place, length = draw.randrange(len(data)), draw.choice((1, 1, 2, 8, 64))
        kind = draw.randrange(5)
        if kind == 0:
            data[place] = draw.randrange(256)
        elif kind == 1:
            data[place : place + length] = draw.randbytes(length)
        elif kind == 2:
            del data[place : place + length]
        elif kind == 3:
            data[place:place] = data[place : place + length]
        else:
            del data[max(1, place) :]
    return bytes(data)


def mutated_json(value: Any, draw: random.Random) -> Any:
    """The value with one place of it changed."""
    made: Any = copy.deepcopy(value)
    place, parent, key = made, cast(Any, None), cast(Any, None)
    while isinstance(place, (dict, list)) and place and (parent is None or draw.random() < 0.85):
        parent = cast(Any, place)
        key = draw.choice(list(parent)) if isinstance(parent, dict) else draw.randrange(len(parent))
        place = parent[key]
    if parent is None:
        return draw.choice(ODD)
    if draw.random() < 0.2:
        del parent[key]
    elif isinstance(parent, list) and draw.random() < 0.2:
        cast(list[Any], parent).append(copy.deepcopy(place))
    elif isinstance(place, int) and draw.random() < 0.3:
        parent[key] = place + draw.choice((-1, 1))
    else:
        parent[key] = draw.choice(ODD)
    return made


def read_file(path: Path) -> str:
    """Read all of a file: what came of it."""
    wanted = good_tensors()
    try:
        with open_sparse(path) as file:
            found = {key: file.tensor(key) for key in file.keys()}  # noqa: SIM118
    except FileError:
        return "refused"
    same = found.keys() == wanted.keys() and all(
        found[key].dtype == value.dtype and torch.equal(found[key], value) for key, value in wanted.items()
    )
    return "as written" if same else "another model"


def read_plan(text: str) -> str:
    """Read a plan: what came of it. A plan that validates is one, whatever it plans."""
    try:
        Plan.from_json(text)
    except PlanError:
        return "refused"
    return "a plan"


class Case:
    """Makes case after case of one seed, and reads them."""

    def __init__(self, seed: int, folder: Path) -> None:
        self.draw, self.path = random.Random(seed), folder / f"case-{seed}"
        self.good = folder / f"good-{seed}"
        write_sparse(self.good, InMemory(good_tensors()), plan=good_plan())
        self.content, self.plan = self.good.read_bytes(), good_plan().to_json()
        with safe_open(self.good, framework="pt") as file:
            self.tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            self.index = json.loads(file.metadata()[ENTRY])

    def run(self) -> str:
        """One case: its kind and what came of it."""
        kinds: tuple[Callable[[], str], ...] = (self.of_bytes, self.of_index, self.of_forged_index, self.of_plan)
        return self.draw.choice(kinds)()

    def of_bytes(self) -> str:
        """Bytes of a file."""
        self.path.write_bytes(mutated_bytes(self.content, self.draw))
        return f"bytes: {read_file(self.path)}"

    def of_index(self) -> str:
        """The index, whose checksum stays as it was."""
        return (
            f"index: {self._with(json.dumps(mutated_json(self.index, self.draw)), text_digest(json.dumps(self.index)))}"
        )

    def of_forged_index(self) -> str:
        """The index by somebody who makes a new checksum: it may be another model, never a crash."""
        text = json.dumps(mutated_json(self.index, self.draw))
        return f"forged index: {self._with(text, text_digest(text))}"

    def _with(self, text: str, check: str) -> str:
        self.path.write_bytes(save(self.tensors, {ENTRY: text, CHECK: check}))
        return read_file(self.path)

    def of_plan(self) -> str:
        """A plan, as text and as JSON."""
        if self.draw.random() < 0.5:
            return f"plan: {read_plan(json.dumps(mutated_json(json.loads(self.plan), self.draw)))}"
        return f"plan: {read_plan(mutated_bytes(self.plan.encode(), self.draw).decode('utf-8', 'replace'))}"


FAILURES = ("bytes: another model", "index: another model")


def work(seed: int, count: int, folder: Path, seconds: int, mib: int, told: Any) -> None:
    """Run cases in this process, which may not take more memory, and tell what came of them."""
    resource.setrlimit(resource.RLIMIT_DATA, (mib * 2**20, mib * 2**20))
    signal.signal(signal.SIGALRM, lambda *_: (_ for _ in ()).throw(TimeoutError()))
    case, counts = Case(seed, folder), Counter[str]()
    for number in range(count):
        signal.alarm(seconds)
        try:
            outcome = case.run()
        except Exception as error:
            outcome = f"failure: {type(error).__name__}: {str(error)[:80]}"
        signal.alarm(0)
        counts[outcome] += 1
        if outcome.startswith("failure") or outcome in FAILURES:
            case.path.rename(folder / f"failure-{seed}-{number}") if case.path.exists() else None
    told.put(counts)


def main(
    cases: Annotated[int, typer.Option(help="How many.")] = 200_000,
    seed: Annotated[int, typer.Option(help="Of the first process.")] = 0,
    processes: Annotated[int, typer.Option(help="At once.")] = 2,
    folder: Annotated[Path, typer.Option(help="Where files are made.")] = Path("/dev/shm/gapfx-fuzz"),
    seconds: Annotated[int, typer.Option(help="That a case may take.")] = 5,
    mib: Annotated[int, typer.Option(help="Memory that a process may take.")] = 2048,
) -> None:
    """Count what comes of damaged files; exit code 1 when any does not end as it should."""
    folder.mkdir(parents=True, exist_ok=True)
    began, told = time.monotonic(), cast(Any, multiprocessing.Queue())
    share = -(-cases // processes)
    workers = [
        multiprocessing.Process(target=work, args=(seed + number, share, folder, seconds, mib, told))
        for number in range(processes)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    total: Counter[str] = Counter()
    for _ in [worker for worker in workers if worker.exitcode == 0]:
        total += told.get()
    for outcome, count in sorted(total.items()):
        print(f"{count:>9,}  {outcome}")
    crashed = [worker.exitcode for worker in workers if worker.exitcode]
    wrong = sum(count for outcome, count in total.items() if outcome.startswith("failure") or outcome in FAILURES)
    print(
        f"{sum(total.values()):,} cases in {time.monotonic() - began:.0f} s, {wrong} failures, {len(crashed)} crashes"
    )
    raise typer.Exit(1 if wrong or crashed or sum(total.values()) < cases else 0)


if __name__ == "__main__":
    typer.run(main)
