"""All errors that quantine raises on purpose, in one tree.

QuantineError
├── PlanError           a rule, preset or option cannot be honoured; nothing has started yet
├── FamilyError         the architecture, or a module in it, is not covered
├── CheckpointError     the source model is missing, incomplete, unreadable or not finite
├── CalibrationError    the calibration text or tokenizer cannot give the samples asked for
├── SolverError         a layer could not be solved (its name is in the message)
├── FormatError         packed bytes are not what docs/format.md says, or cannot hold a tensor
├── OutputError         the output directory is not ours to write, or the disk is full
│   └── ResumeMismatch  an unfinished run was started with other inputs
├── DeviceMemoryError   a device, or what of it may be used, is too small for the run
├── RankError           another process of a run is gone; --resume goes on
└── BackendUnavailable  a kernel or device was asked for that does not exist here
"""

from __future__ import annotations


def is_out_of_memory(error: BaseException) -> bool:
    """Whether ``error`` says that memory ran out; PyTorch has no class of its own for the CPU's."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError)
        and any(text in said for text in ("allocate memory", "out of memory", "unable to mmap"))
    )


def cut(value: object, most: int = 120) -> str:
    """``value`` in one line of at most ``most`` characters, as it may stand in a message.

    It ends with a whole word where that leaves more than half.

    What users give, files hold and libraries say may be of any length; an error that says nothing
    is named by its class.
    """
    text = " ".join(str(value).split()) or type(value).__name__
    if len(text) <= most:
        return text
    words = text[: most - 3].rpartition(" ")[0]
    return f"{words if 2 * len(words) > most else text[: most - 3]}..."


def ending(name: object, most: int = 100) -> str:
    """The name of a file or text in a message, of which only the end is left if it is long."""
    text = str(name)
    return text if len(text) <= most else f"…{text[-most:]}"


def shown(value: object) -> str:
    """``repr(value)`` as `cut` gives it, for a value that is not what it should be."""
    return cut(repr(value))


class QuantineError(Exception):
    """Base of every error that quantine raises on purpose; the message names the remedy."""


class PlanError(QuantineError):
    """A plan, preset or option cannot be honoured; raised before any work starts."""


class FamilyError(QuantineError):
    """The model's architecture, or one of its modules, is not covered."""


class CheckpointError(QuantineError):
    """The source model is missing, incomplete, unreadable or holds non-finite weights."""


class CalibrationError(QuantineError):
    """The calibration text or tokenizer cannot give the samples asked for, or none were given."""


class SolverError(QuantineError):
    """A layer could not be solved; the message names the layer and the cause."""


class FormatError(QuantineError):
    """Packed bytes contradict docs/format.md, or a format cannot hold a tensor."""


class OutputError(QuantineError):
    """The output directory must not be written, cannot be written, or the disk is full."""


class ResumeMismatch(OutputError):
    """The unfinished run in the output directory was started with other inputs."""


class DeviceMemoryError(QuantineError):
    """The memory of a device, or what of it may be used, is too small for the run."""


class RankError(QuantineError):
    """Another process of a run that several share has ended, or does not answer."""


class BackendUnavailable(QuantineError):
    """The requested kernel backend or device does not exist on this machine."""
