"""Writes in place: which nodes must run before a node although no value flows between them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable

from torch import Tensor, fx
from torch.multiprocessing.reductions import StorageWeakRef


class Memory:
    """Last writer of each storage and its readers since, in the order of recording."""

    def __init__(self) -> None:
        self._held: dict[int, StorageWeakRef] = {}
        self._writer: dict[int, fx.Node] = {}
        self._readers: defaultdict[int, set[fx.Node]] = defaultdict(set)

    def storage(self, tensor: Tensor) -> int:
        """Key of the storage under a tensor and all its views, its own id where it has none."""
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):
            return id(tensor)
        key = storage._cdata  # pyright: ignore[reportPrivateUsage]
        # A weak reference keeps the address from being used again: a false dependency would change from run to run.
        self._held.setdefault(key, StorageWeakRef(storage))
        return key

    def depend(self, node: fx.Node, touched: Iterable[Tensor], written: set[int]) -> None:
        """Set `mem_deps` of a node that touches these tensors and writes those storages."""
        storages = {self.storage(tensor) for tensor in touched}
        before = {self._writer[key] for key in storages if key in self._writer}
        for key in storages:
            if key in written:
                before |= self._readers.pop(key, set())
                self._writer[key] = node
            else:
                self._readers[key].add(node)
        names = {dep.name for dep in before - {node} - set(node.all_input_nodes)}
        node.meta["mem_deps"] = tuple(sorted(names))


def version(tensor: Tensor) -> int | None:
    """Grows with each write in place; None where torch does not count (inference tensors)."""
    try:
        return tensor._version
    except RuntimeError:
        return None
