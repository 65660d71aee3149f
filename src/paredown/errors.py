"""Every error a user can cause, in one tree.

    ParedownError                 exit code 1
    ├── UsageError                exit code 2   options that do not fit together
    ├── ModelError
    │   ├── ModelNotFoundError    no such folder, hub id or testbed
    │   ├── CheckpointError       files missing, truncated, pickled, NaN, or at odds with the config
    │   └── ArchitectureError     a role (block, router, ...) that could not be found
    ├── DataError                 calibration or evaluation data that cannot be used
    ├── RecipeError               a recipe with unknown keys, wrong types or steps that do not fit together
    ├── BudgetError               a keep, top-k or group constraint that cannot be met
    ├── OutputError               a folder that exists, cannot be written, or belongs to another run
    ├── NothingTouchedError       a step that would leave every weight as it was
    ├── PolicyError               a policy that cannot run here, or two that do not go together
    ├── GateError                 exit code 3   quality fell beyond the stated loss
    └── ProofError                exit code 4   the written result is not the model that was in memory

Each message is one sentence: what is wrong, where, and how to mend it.
"""

from __future__ import annotations


class ParedownError(Exception):
    """Root of everything a user can cause; the command line prints it as one line."""

    exit_code: int = 1


class UsageError(ParedownError):
    """Options that contradict each other or cannot be read."""

    exit_code = 2


class ModelError(ParedownError):
    """Something is wrong with the model that was given."""


class ModelNotFoundError(ModelError):
    """No such folder, hub id or testbed."""


class CheckpointError(ModelError):
    """The checkpoint's files are missing, broken, unsafe, or at odds with its config."""


class ArchitectureError(ModelError):
    """A role that the work needs was not found in the model."""


class DataError(ParedownError):
    """Calibration or evaluation data that cannot be read or is too small."""


class RecipeError(ParedownError):
    """A recipe or a method's field with an unknown key, a wrong type or an illegal value."""


class BudgetError(ParedownError):
    """A budget that cannot be met exactly."""


class OutputError(ParedownError):
    """The output folder exists, cannot be written, or belongs to another run."""


class NothingTouchedError(ParedownError):
    """A step changed nothing although its budget asked for a change."""


class PolicyError(ParedownError):
    """A policy that cannot be attached to this model, this cache, or next to another policy."""


class GateError(ParedownError):
    """Quality fell beyond the stated loss; nothing was written."""

    exit_code = 3


class ProofError(ParedownError):
    """The result, loaded in a fresh process, is not the model that was in memory."""

    exit_code = 4
