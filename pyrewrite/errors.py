"""Exceptions that callers may want to tell apart. Each is also a ValueError."""

from __future__ import annotations

LONGEST_MESSAGE = 1500


class CheckpointError(ValueError):
    """A file cannot be loaded as a generator. The message names the file, what was found and what was expected.

    Much of a message can come from the file: it is cut to LONGEST_MESSAGE characters, and what does not print is shown
    as an escape, so that it can neither flood a terminal nor steer it.
    """

    def __init__(self, message: str) -> None:
        if len(message) > LONGEST_MESSAGE:
            message = f"{message[: LONGEST_MESSAGE - 400]} ... {message[-390:]}"
        printed = (c if c.isprintable() else c.encode("unicode_escape").decode() for c in message)
        super().__init__("".join(printed))


class NotACheckpointError(CheckpointError):
    """The file is something else: a picture, a text, an archive, an empty file."""


class DamagedCheckpointError(CheckpointError):
    """The file was a checkpoint and is truncated or damaged."""


class CheckpointMismatchError(CheckpointError):
    """The file was read, but its names or shapes are not those of a generator that is known here."""


class UnknownLayerError(KeyError, ValueError):
    """A layer name that the generator does not have. The message lists those it has."""

    # KeyError shows its message with repr(), which escapes quotes and line ends.
    __str__ = Exception.__str__


class NonFiniteError(ValueError):
    """NaN or infinity where numbers are needed: in weights, activations or an edit."""


class EditError(ValueError):
    """An edit record, a mask or a setting that cannot be used. The message names the field and what was expected."""


class PatchError(ValueError):
    """A patch that cannot be read, applied or removed. The generator is as it was before."""


class NonFiniteWeightsError(CheckpointError, NonFiniteError):
    """A checkpoint holds NaN or infinite weights."""
