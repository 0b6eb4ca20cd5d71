"""What ranks tell each other in a step, over the CPU: a GPU with work ahead of it does not have to wait."""

from typing import Any, TypeVar

from torch import distributed

Value = TypeVar("Value")


class Ranks:
    """All processes of a run; one that is alone talks to itself."""

    def __init__(self, world: int) -> None:
        """Open a channel beside that of the gradients; every rank must do so."""
        self.world = world
        self._group: Any = distributed.new_group(backend="gloo") if world > 1 else None

    def gather(self, value: Value) -> list[Value]:
        """Return everyone's value in the order of the ranks; any small object will do.

        Raises:
            ConnectionError: another rank is gone.
        """
        if self.world == 1:
            return [value]
        values: list[Any] = [None] * self.world
        try:
            distributed.all_gather_object(values, value, group=self._group)
        except RuntimeError as error:
            raise ConnectionError(
                f"another rank is gone ({str(error).splitlines()[0]}); its own log says why; "
                "the same command goes on from the newest checkpoint"
            ) from error
        return values
