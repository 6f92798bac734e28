"""The one tree of errors.

QuantineError
├── PlanError           a rule, preset or option cannot be honoured; nothing has started yet
├── FamilyError         the architecture, or a module in it, is not covered
├── CheckpointError     the source model is missing, incomplete, unreadable or not finite
├── CalibrationError    the calibration text or tokenizer cannot give the samples asked for
├── SolverError         a layer could not be solved (its name is in the message)
├── FormatError         packed bytes are not what docs/format.md says, or cannot hold a tensor
├── OutputError         the output directory is not ours to write, or the disk is full
│   └── ResumeMismatch  an unfinished run was started with other inputs
└── BackendUnavailable  a kernel was asked for that does not exist here
"""


class QuantineError(Exception):
    """Base of every error quantine raises on purpose; its message names the remedy."""


class PlanError(QuantineError):
    """A plan, preset or option cannot be honoured."""


class FamilyError(QuantineError):
    """The model's architecture, or one of its modules, is not covered."""


class CheckpointError(QuantineError):
    """The source model is missing, incomplete, unreadable or holds non-finite weights."""


class CalibrationError(QuantineError):
    """The calibration text cannot give the samples asked for."""


class SolverError(QuantineError):
    """A layer could not be solved."""


class FormatError(QuantineError):
    """Packed bytes break the byte specification, or a format cannot hold a tensor."""


class OutputError(QuantineError):
    """The output directory must not be written, or the disk is full."""


class ResumeMismatch(OutputError):
    """The unfinished run in the output directory was started with other inputs."""


class BackendUnavailable(QuantineError):
    """The requested kernel backend does not exist on this machine."""
