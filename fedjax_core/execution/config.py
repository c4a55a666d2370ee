"""How a program is run: an explicit argument, never a global."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, cast, get_args

import jax
from jax.sharding import Mesh

from fedjax_core.errors import ArgumentError

Mode = Literal["auto", "reference", "stacked", "streamed", "unrolled", "dispatched"]

# Those that the host drives: no JAX transformation may be around them.
HOST_DRIVEN = ("reference", "dispatched")


class TuningRow(NamedTuple):
    """One way to run a round, measured.

    Attributes:
      mode, lanes: of the `Execution`.
      compile_seconds: of the first round, None if it failed.
      seconds: a round, the median, None if it failed.
      failure: why, if it failed.
    """

    mode: str
    lanes: int | str
    compile_seconds: float | None
    seconds: float | None
    failure: str = ""

    def __str__(self) -> str:
        if self.seconds is None or self.compile_seconds is None:
            return f"  {self.mode:<10} lanes {self.lanes:<4} failed: {self.failure}"
        times = f"{1e3 * self.seconds:9.2f} ms a round, {self.compile_seconds:6.2f} s to compile"
        return f"  {self.mode:<10} lanes {self.lanes:<4} {times}"


class Tuning(NamedTuple):
    """What `tune` measured, kept with the choice that came of it.

    Attributes:
      platform, device, jax_version: where.
      num_clients: of the cohort.
      rows: one for each candidate.
    """

    platform: str
    device: str
    jax_version: str
    num_clients: int
    rows: tuple[TuningRow, ...]

    def __str__(self) -> str:
        where = f"{self.platform} ({self.device}), jax {self.jax_version}"
        head = f"measured with {self.num_clients} clients on {where}:"
        return "\n".join([head, *map(str, self.rows)])


class Choice(NamedTuple):
    """What "auto" comes to, and why.

    Attributes:
      mode: of those that are not "auto".
      lanes: clients side by side on each device.
      why_mode, why_lanes: the reasons, for a person.
    """

    mode: str
    lanes: int
    why_mode: str
    why_lanes: str


@dataclasses.dataclass(frozen=True)
class Execution:
    """How a federated computation is run.

    Args:
      mode: "reference", an interpreter over Python lists, slow and obviously right; "stacked", all
        clients side by side (memory grows with the cohort); "streamed", waves of clients one after
        the other in one loop, with the aggregations fused into it (memory does not grow);
        "unrolled", the same waves without a loop around them (compilation grows with the cohort);
        "dispatched", a program for one wave, which the host calls (it sees every wave, and can stop
        between them); "auto" is "streamed".
      lanes: how many clients run side by side in one wave of the streamed mode, on each device.
        "auto" is a function of the backend alone: 1 on CPU, where clients side by side take a model
        with convolutions twice the time and more, and gain small ones little; else 16.
      mesh: the devices to spread the clients over; None for one device. What the server has is on
        all of them. See `fedjax_core.execution.sharding`.
      axis: the axis of `mesh`, or several, along which the clients are spread. The devices along
        the other axes hold the same clients.
      donate: whether `update` of an algorithm may reuse the memory of the state it is given, which
        is then gone for the caller.
      wire: whether messages of codecs travel as the bytes of frames, written and read on the host.
        It is slow, and gives the same values, to the bit on CPU; it proves what the ledger counts,
        which gains rows named "framing". See `compression.frame`.
      tuning: the measurements that led to this choice, if `tune` made it; they change nothing.

    Raises:
      ArgumentError: for a mode or a number of lanes that does not exist, another `donate` or `wire`
        than a bool, an axis that the mesh does not have, or a mesh in the reference mode.

    Examples:
      >>> mesh = jax.make_mesh((1,), ("clients",))
      >>> Execution(lanes=4, mesh=mesh).num_lanes(100)
      4
    """

    mode: Mode = "auto"
    lanes: int | Literal["auto"] = "auto"
    mesh: Mesh | None = None
    axis: str | tuple[str, ...] = "clients"
    donate: bool = False
    wire: bool = False
    tuning: Tuning | None = None

    def __post_init__(self) -> None:
        modes = get_args(Mode)
        if not isinstance(self.mode, str) or self.mode not in modes:
            raise ArgumentError(f"Expected a mode out of {modes}, got {self.mode!r}.")
        is_auto = isinstance(self.lanes, str) and self.lanes == "auto"
        if not is_auto and not _is_positive(self.lanes):
            raise ArgumentError(
                f"Expected lanes to be 'auto' or a positive int, got {self.lanes!r}."
            )
        if not isinstance(self.donate, bool):
            raise ArgumentError(f"Expected donate to be True or False, got {self.donate!r}.")
        if not isinstance(self.wire, bool):
            raise ArgumentError(f"Expected wire to be True or False, got {self.wire!r}.")
        if self.tuning is not None and not isinstance(self.tuning, Tuning):
            raise ArgumentError(
                f"Expected tuning to be the measurements that tune made, got {self.tuning!r}; "
                "leave it out."
            )
        self._check_axes()
        if self.mesh is not None:
            self._check_mesh(self.mesh)

    def _check_axes(self) -> None:
        axes = self.axes
        is_named = isinstance(axes, tuple) and all(isinstance(name, str) for name in axes)
        if not (is_named and axes and len(set(axes)) == len(axes)):
            raise ArgumentError(
                f"Expected axis to be the name of a mesh axis, or a tuple of names, got "
                f"{self.axis!r}."
            )

    def _check_mesh(self, mesh: Mesh) -> None:
        if not isinstance(mesh, Mesh):
            raise ArgumentError(
                f"Expected mesh to be a jax.sharding.Mesh, got {mesh!r}; make one with "
                "jax.make_mesh((num_devices,), ('clients',))."
            )
        if self.mode in HOST_DRIVEN:
            raise ArgumentError(
                f"Expected no mesh in the {self.mode} mode, which the host drives on one device, "
                f"got {mesh!r}; leave out mesh, or use mode='auto'."
            )
        missing = [name for name in self.axes if name not in mesh.axis_names]
        if missing:
            raise ArgumentError(
                f"Expected axis to name axes of the mesh, which are {mesh.axis_names}, got "
                f"{missing[0]!r}; pass axis=, or name an axis of the mesh 'clients'."
            )

    @property
    def axes(self) -> tuple[str, ...]:
        """The names in `axis`."""
        return (self.axis,) if isinstance(self.axis, str) else self.axis

    @property
    def num_shards(self) -> int:
        """How many parts the clients are spread over: 1 without a mesh."""
        return 1 if self.mesh is None else math.prod(self.mesh.shape[name] for name in self.axes)

    def num_lanes(self, num_clients: int) -> int:
        """How many clients run side by side, on each device, in a cohort of `num_clients`."""
        return self.choose(num_clients).lanes

    def choose(self, num_clients: int) -> Choice:
        """What runs for a cohort of `num_clients`, and why; a function of these and the backend."""
        on_device = max(-(-num_clients // self.num_shards), 1)
        chosen = "measured by tune" if self.tuning else "as given"
        why_mode = "automatic" if self.mode == "auto" else chosen
        mode = "streamed" if self.mode == "auto" else self.mode
        if mode == "stacked":
            return Choice(mode, on_device, why_mode, "all clients of a device")
        if self.lanes != "auto":
            return Choice(mode, min(int(self.lanes), on_device), why_mode, chosen)
        if self.platform == "cpu":
            why = "one after the other: side by side gains a CPU little, and convolutions lose"
            return Choice(mode, 1, why_mode, why)
        why = "side by side, as one client alone does not fill the device"
        return Choice(mode, min(16, on_device), why_mode, why)

    @property
    def device(self) -> Any:
        """The first device that it runs on."""
        return jax.devices()[0] if self.mesh is None else self.mesh.devices.flat[0]

    @property
    def platform(self) -> str:
        """The backend that it runs on, such as "cpu"."""
        return jax.default_backend() if self.mesh is None else self.device.platform

    def resolved(self, num_clients: int) -> "Execution":
        """The same with what "auto" comes to here for cohorts of `num_clients`."""
        choice = self.choose(num_clients)
        return dataclasses.replace(self, mode=cast(Mode, choice.mode), lanes=choice.lanes)

    def to_dict(self, *, tuning: bool = True) -> dict[str, Any]:
        """The execution as what JSON knows, to be kept with a run; `from_dict` reads it.

        Args:
          tuning: whether the measurements are in it.

        Examples:
          >>> Execution(lanes=4).to_dict()  # doctest: +NORMALIZE_WHITESPACE
          {'mode': 'auto', 'lanes': 4, 'axis': 'clients', 'donate': False, 'wire': False,
           'mesh': None}
        """
        mesh = self.mesh
        record: dict[str, Any] = {
            "mode": self.mode,
            "lanes": self.lanes,
            "axis": self.axis if isinstance(self.axis, str) else list(self.axis),
            "donate": self.donate,
            "wire": self.wire,
            "mesh": None if mesh is None else dict(mesh.shape),
        }
        if tuning and self.tuning is not None:
            rows = [row._asdict() for row in self.tuning.rows]
            record["tuning"] = {**self.tuning._asdict(), "rows": rows}
        return record

    @classmethod
    def from_dict(cls, record: Any, mesh: Mesh | None = None) -> "Execution":
        """The execution that `to_dict` wrote.

        Args:
          record: what it wrote, maybe read from JSON.
          mesh: of the devices that are there now, where it was on a mesh; of the same shape.

        Raises:
          ArgumentError: for another record, or a mesh of another shape.

        Examples:
          >>> Execution.from_dict(Execution(lanes=4).to_dict()) == Execution(lanes=4)
          True
        """
        known = {"mode", "lanes", "axis", "donate", "wire", "mesh", "tuning"}
        if not isinstance(record, Mapping) or not {"mode", "lanes"} <= record.keys() <= known:
            raise ArgumentError(
                f"Expected what Execution.to_dict wrote, with mode and lanes and nothing but "
                f"{sorted(known)}, got {record!r:.200}."
            )
        shape = None if mesh is None else dict(mesh.shape)
        if record.get("mesh") != shape:
            raise ArgumentError(
                f"Expected a mesh of the shape that the record names, {record.get('mesh')}, got "
                f"{shape}; pass mesh=jax.make_mesh(...) of that shape, or none where it names none."
            )
        axis = record.get("axis", "clients")
        return cls(
            mode=record["mode"],
            lanes=record["lanes"],
            mesh=mesh,
            axis=tuple(axis) if isinstance(axis, list) else axis,
            donate=record.get("donate", False),
            wire=record.get("wire", False),
            tuning=_read_tuning(record.get("tuning")),
        )


def _read_tuning(record: Any) -> Tuning | None:
    if record is None:
        return None
    try:
        rows = tuple(TuningRow(**row) for row in record["rows"])
        return Tuning(**{**record, "rows": rows})
    except (KeyError, TypeError) as error:
        raise ArgumentError(
            f"Expected the measurements that tune made, got {record!r:.200} ({error}); leave out "
            "'tuning', which changes nothing."
        ) from error


def _is_positive(number: Any) -> bool:
    return isinstance(number, int) and not isinstance(number, bool) and number >= 1
