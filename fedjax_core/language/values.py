"""Concrete values at a placement."""

import dataclasses
from typing import Any

import jax

from fedjax_core.errors import PlacementError
from fedjax_core.language.placements import SERVER, Placement
from fedjax_core.language.sequences import Sequence as Sequence


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Federated:
    """A concrete value at a placement; a pytree, so that JAX transforms see through it.

    Args:
      value: a pytree of arrays. At `CLIENTS`, unless `all_equal`, every leaf has a leading clients
        axis.
      placement: `CLIENTS` or `SERVER`.
      all_equal: whether all members hold the same value; by default only at the server.

    Examples:
      >>> import numpy as np
      >>> from fedjax_core.language.placements import CLIENTS
      >>> Federated(np.array([68.5, 70.3, 69.8]), CLIENTS).value.shape
      (3,)
    """

    value: Any
    placement: Placement = dataclasses.field(metadata={"static": True})
    all_equal: bool = dataclasses.field(default=None, metadata={"static": True})  # pyright: ignore[reportAssignmentType] - None means "as the placement has it", resolved below

    def __post_init__(self) -> None:
        if not isinstance(self.placement, Placement):
            raise PlacementError(
                f"Expected CLIENTS or SERVER as the placement, got {self.placement!r}."
            )
        if self.all_equal is None:
            object.__setattr__(self, "all_equal", self.placement is SERVER)
