"""Rewrite the rules of a pretrained image generator."""

from pyrewrite._version import __version__

__all__ = ["__version__"]
