"""Where a value lives: at the clients, or at the server."""

import enum


class Placement(enum.Enum):
    """A group of participants that hosts a federated value."""

    CLIENTS = "CLIENTS"
    SERVER = "SERVER"

    def __str__(self) -> str:
        return self.value

    __repr__ = __str__


CLIENTS = Placement.CLIENTS
SERVER = Placement.SERVER
