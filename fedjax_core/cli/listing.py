"""``fedjax-core datasets``."""

from fedjax_core.datasets import available


def run() -> bool:
    """Prints what `load` knows; returns False, for nothing here can be interrupted."""
    for description in available():
        settings = ", ".join(f"{name}={value!r}" for name, value in description.settings.items())
        print(f"{description.name}: {description.summary}")
        print(f"  features: {description.features}")
        print(f"  source:   {description.source}")
        print(f"  settings: {settings}")
    return False
