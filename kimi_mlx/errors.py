"""The exceptions of kimi-mlx.

KimiMlxError
├── UsageError       invalid option or argument
│   ├── HostfileError       invalid hostfile or list of hosts
│   ├── GrammarError        schema or tool choice that cannot be enforced
│   └── ToolConfigError     file of MCP servers that is wrong
├── ConfigError      unsupported or invalid `config.json` (or similar file)
├── WeightsError     checkpoint files that are missing, unsupported or corrupt
│   ├── MissingModelError   model that is not on a host yet
│   └── UnreachableError    hub that cannot be reached, or must not be (HF_HUB_OFFLINE)
├── TextError        tokenizer, chat template or messages
│   └── CallIdError         id of a tool call or of its result that does not fit the conversation
├── ImageError       image or video that cannot be read, or that the model cannot see
├── VisionError      patches, grids or placeholders of images that do not fit the model or each other
├── PlacementError   model that cannot be split as requested
├── MemoryLimitError model that does not fit, even if its experts are read from the SSD
├── ToolError        MCP server that cannot be used, or tool call without a result
├── EngineError      generation: request that cannot be served, cache misuse
│   ├── ContextLengthError  prompt that does not fit the context
│   └── CacheError          unusable block of the prompt cache on disk
├── AnswerError      empty answer, or one that does not match its schema
├── StepError        failed step of the model, with all of its requests
├── HistoryError     history of chats that cannot be used, or a conversation that is not in it
├── LinkError        hosts without a network between them, or with one that is too slow
├── SshError         host that ssh cannot reach, or where a command fails
├── ServerError      server that cannot be reached, refuses a request, or breaks off an answer
├── InstallError     kimi-mlx cannot be installed on hosts
├── ServiceError     background service that launchd or systemd cannot run
└── RingError        ranks that fail to start, die or stop responding
    └── StallError   ranks that are alive but make no progress

Each message says what failed and where, with both numbers if there are two; the hint says what to type next.
"""

from __future__ import annotations


class KimiMlxError(Exception):
    """Base class of all errors for the user.

    Args:
        message: what failed, where, and the numbers; without a full stop, literals in backticks.
        hint: remedy, usually a command to type.
        rank: rank on which the error occurred, if not this process.
    """

    def __init__(self, message: str, hint: str | None = None, rank: int | None = None):
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.rank = rank

    def __reduce__(self) -> tuple[type[KimiMlxError], tuple[str | int | None, ...]]:
        """Keep hint and rank when the error crosses a process boundary."""
        return type(self), (self.message, self.hint, self.rank)


class UsageError(KimiMlxError):
    """Invalid option or argument (exit code 2)."""


class ConfigError(KimiMlxError):
    """Unsupported or invalid configuration file."""


class WeightsError(KimiMlxError):
    """Checkpoint files that are missing, unsupported or corrupt."""


class MissingModelError(WeightsError):
    """Model that is not on a host yet."""


class UnreachableError(WeightsError):
    """Hub that cannot be reached, or must not be (HF_HUB_OFFLINE)."""


class TextError(KimiMlxError):
    """Error in the tokenizer, the chat template or the messages."""


class CallIdError(TextError):
    """Id of a tool call or of its result that does not fit the conversation.

    Args:
        place: location of the message in the conversation; the message of the error begins with it.
        reason: what is wrong with the id.
    """

    def __init__(self, place: str, reason: str):
        super().__init__(f"`{place}`: {reason}")
        self.place = place
        self.reason = reason

    def __reduce__(self) -> tuple[type[CallIdError], tuple[str, str]]:
        """Keep all fields when the error crosses a process boundary."""
        return type(self), (self.place, self.reason)


class ImageError(KimiMlxError):
    """Image or video that cannot be read, or that the model cannot see.

    Args:
        place: name of the file, or location of the image in the messages; the message begins with it.
        reason: what is wrong with the image.
        hint: remedy, usually a command to type.
        rank: rank on which the error occurred, if not this process.
    """

    def __init__(self, place: str, reason: str, hint: str | None = None, rank: int | None = None):
        super().__init__(f"`{place}`: {reason}", hint, rank)
        self.place = place
        self.reason = reason

    def __reduce__(self) -> tuple[type[ImageError], tuple[str | int | None, ...]]:
        """Keep all fields when the error crosses a process boundary."""
        return type(self), (self.place, self.reason, self.hint, self.rank)


class VisionError(KimiMlxError):
    """Patches, grids or placeholders of images that do not fit the model or each other."""


class PlacementError(KimiMlxError):
    """Model that cannot be split over the ranks as requested."""


class MemoryLimitError(KimiMlxError):
    """Model that does not fit in memory, even if its experts are read from the SSD."""


class EngineError(KimiMlxError):
    """Generation request that cannot be served."""


class ContextLengthError(EngineError):
    """Prompt that does not fit the context, or the KV cache."""


class CacheError(EngineError):
    """Unusable block of the prompt cache on disk."""


class SshError(KimiMlxError):
    """Host that ssh cannot reach, or where a command fails."""


class ServerError(KimiMlxError):
    """Server that cannot be reached, refuses a request, or breaks off an answer."""


class InstallError(KimiMlxError):
    """kimi-mlx cannot be installed on hosts."""


class ServiceError(KimiMlxError):
    """Background service that launchd or systemd cannot run."""


class HostfileError(UsageError):
    """Invalid hostfile or list of hosts."""


class GrammarError(UsageError):
    """Schema or tool choice that cannot be enforced. The message begins with the location in the schema."""


class AnswerError(KimiMlxError):
    """Answer that is empty, or that does not match its schema because it ended too early."""


class ToolConfigError(UsageError):
    """File of MCP servers that cannot be read, or that describes one wrongly."""


class ToolError(KimiMlxError):
    """MCP server that cannot be used, or tool call without a result."""


class StepError(KimiMlxError):
    """Failed step of the model. All of its requests fail; later steps are not affected."""


class HistoryError(KimiMlxError):
    """History of chats that cannot be used, or a conversation that is not in it."""


class LinkError(KimiMlxError):
    """Hosts without a network between them, or with one that is too slow."""


class RingError(KimiMlxError):
    """Ranks that fail to start, die or stop responding."""


class StallError(RingError):
    """Ranks that are alive but make no progress."""
