"""The interface without its transport: `Session` holds one generator and one document and answers messages."""

from .session import Session

__all__ = ["Session"]
