"""The version, kept in one place: the build writes it into the binary, and the package compares the two on import."""

__version__ = "0.1.0"
