"""How a program is run: an explicit argument, never a global."""

import dataclasses
from typing import Literal

import jax

from fedjax_core.errors import ArgumentError

Mode = Literal["auto", "reference", "stacked", "streamed"]


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a federated computation is run.

    Args:
      mode: "reference", an interpreter over Python lists, slow and obviously right; "stacked", all
        clients side by side (memory grows with the cohort); "streamed", waves of clients one after
        the other, with the aggregations fused into the loop (memory does not grow); "auto" is
        "streamed".
      lanes: how many clients run side by side in one wave of the streamed mode. "auto" is a
        function of the backend alone: 1 on CPU, where batching the clients' own weights only adds
        work, else 16.
      donate: whether `update` of an algorithm may reuse the memory of the state it is given, which
        is then gone for the caller.

    Raises:
      ArgumentError: for a mode or a number of lanes that does not exist.
    """

    mode: Mode = "auto"
    lanes: int | Literal["auto"] = "auto"
    donate: bool = False

    def __post_init__(self) -> None:
        modes = ("auto", "reference", "stacked", "streamed")
        if self.mode not in modes:
            raise ArgumentError(f"Expected a mode out of {modes}, got {self.mode!r}.")
        is_count = isinstance(self.lanes, int) and not isinstance(self.lanes, bool)
        if self.lanes != "auto" and not (is_count and self.lanes >= 1):
            raise ArgumentError(
                f"Expected lanes to be 'auto' or a positive int, got {self.lanes!r}."
            )

    def num_lanes(self, num_clients: int) -> int:
        """How many clients run side by side in a cohort of `num_clients`."""
        if self.mode == "stacked":
            return max(num_clients, 1)
        if self.lanes == "auto":
            return 1 if jax.default_backend() == "cpu" else min(16, max(num_clients, 1))
        return min(self.lanes, max(num_clients, 1))
