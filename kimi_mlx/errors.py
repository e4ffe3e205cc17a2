"""The exceptions of kimi-mlx.

KimiMlxError
├── UsageError       an option or argument that cannot be meant that way
│   ├── HostfileError       a hostfile, or a list of hosts, that cannot be meant that way
│   └── GrammarError        a schema, or a choice of tools, that answers cannot be made to keep to
├── ConfigError      a `config.json` (or one like it) that we cannot serve
├── WeightsError     checkpoint files: missing, foreign, broken
│   └── MissingModelError   a model that is not on a host yet
├── TextError        tokenizer, chat template, messages
├── PlacementError   a model that cannot be divided as asked
├── EngineError      generation: request too long, cache misuse
│   └── CacheError          a block of the prompt cache on disk that cannot be used
├── StepError        a step of the model that failed, with all answers that were in it
├── LinkError        hosts with no network between them, or only one that is too slow
├── SshError         a host that ssh does not reach, or that does not do what it is told
├── InstallError     kimi-mlx cannot be brought to hosts
└── RingError        ranks that do not start, die or fall silent
    └── StallError   ranks that are alive, but come no further

Each one says what failed and where, with both numbers where there are two, and carries a hint: what to type next.
"""

from __future__ import annotations


class KimiMlxError(Exception):
    """Base of every error that is meant for the user.

    Args:
        message: what failed, where, with the numbers; no full stop, literals in backticks.
        hint: what the user can do about it, usually a command to type.
        rank: the rank that met the error, if it was not this process.
    """

    def __init__(self, message: str, hint: str | None = None, rank: int | None = None):
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.rank = rank

    def __reduce__(self) -> tuple[type[KimiMlxError], tuple[str, str | None, int | None]]:
        """Keep hint and rank when the error crosses a process boundary."""
        return type(self), (self.message, self.hint, self.rank)


class UsageError(KimiMlxError):
    """An option or argument that cannot be meant that way (exit code 2)."""


class ConfigError(KimiMlxError):
    """A configuration file that we cannot serve."""


class WeightsError(KimiMlxError):
    """Checkpoint files that are missing, foreign or broken."""


class MissingModelError(WeightsError):
    """A model that is not on a host yet."""


class TextError(KimiMlxError):
    """Tokenizer, chat template or message trouble."""


class PlacementError(KimiMlxError):
    """A model that cannot be divided over the ranks as asked."""


class EngineError(KimiMlxError):
    """A generation request that cannot be served."""


class CacheError(EngineError):
    """A block of the prompt cache on disk that cannot be used."""


class SshError(KimiMlxError):
    """A host that ssh does not reach, or that does not do what it is told."""


class InstallError(KimiMlxError):
    """kimi-mlx cannot be brought to hosts."""


class HostfileError(UsageError):
    """A hostfile, or a list of hosts, that cannot be meant that way."""


class GrammarError(UsageError):
    """A schema, or a choice of tools, that answers cannot be made to keep to; the message begins with the place."""


class StepError(KimiMlxError):
    """A step of the model that failed, with all answers that were in it; the next ones begin afresh."""


class LinkError(KimiMlxError):
    """Hosts with no network between them, or only one that is too slow."""


class RingError(KimiMlxError):
    """Ranks that do not start, die or fall silent."""


class StallError(RingError):
    """Ranks that are alive, but come no further."""
