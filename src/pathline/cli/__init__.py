"""The command line: `pathline fit`, `sample`, `score`, `check`, `report`, `reproduce`."""

from .app import main as main

__all__ = ["main"]
