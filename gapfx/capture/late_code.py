"""A GraphModule that writes its code when it is first needed: most graphs are looked at and never run."""

from __future__ import annotations

from typing import Any, cast

from torch import fx


class LateGraphModule(fx.GraphModule):
    """As GraphModule; the code is generated at the first call, and when it is asked for."""

    def recompile(self) -> Any:
        """Mark the code as out of date."""
        cast(Any, type(self)).forward = LateGraphModule.forward  # torch gives every GraphModule a class of its own

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Generate the code, which replaces this method, and run it."""
        return self.generated()(self, *args, **kwargs)

    def generated(self) -> Any:
        """The generated forward, as a function of this module and its inputs."""
        if type(self).forward is LateGraphModule.forward:
            super().recompile()
        return type(self).forward

    @property
    def code(self) -> str:
        """The Python code of the graph."""
        self.generated()
        return self._code

    def __reduce__(self) -> Any:
        return fx.GraphModule(self, self.graph, type(self).__name__).__reduce__()
