"""Contents of a checkpoint, and the protocol of checkpoint sources."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, cast

from kimi_mlx.errors import WeightsError
from kimi_mlx.model.config import ModelConfig, parse_config
from kimi_mlx.model.vision_names import is_vision
from kimi_mlx.store.manifest import Origin
from kimi_mlx.weights.header import TensorInfo, read_header

Headers = Mapping[str, Mapping[str, TensorInfo]]
"""File name -> tensor name -> location of the tensor."""


@dataclass(frozen=True)
class CheckpointContents:
    """Contents of a checkpoint, except the data of its tensors.

    Args:
        origin: repository and commit.
        sizes: size in bytes of each weight file, by name.
        headers: tensors of each weight file, by name.
        small_files: name -> content of each other file that a model needs: configuration, tokenizer, template.
        skipped_bytes: bytes of the weight files that are skipped because they have only vision tensors.
        lacks_vision: whether tensors of the vision tower are in none of the files; the table then has none of them.
    """

    origin: Origin
    sizes: Mapping[str, int]
    headers: Headers
    small_files: Mapping[str, bytes]
    skipped_bytes: int = 0
    lacks_vision: bool = False

    @property
    def table(self) -> dict[str, TensorInfo]:
        """All tensors by name; their files have no folder.

        Raises:
            WeightsError: a tensor name occurs twice.
        """
        table: dict[str, TensorInfo] = {}
        for file, header in self.headers.items():
            for name, info in header.items():
                if self.lacks_vision and is_vision(name):
                    continue
                if name in table:
                    raise WeightsError(
                        f"tensor `{name}` of `{self.origin.repository}` is in `{table[name].file.name}` and in "
                        f"`{file}`",
                        hint="remove the file that does not belong to the checkpoint, or choose another repository",
                    )
                table[name] = info
        return table

    def config(self) -> ModelConfig:
        """Parse the model's configuration.

        Raises:
            ConfigError: unsupported model.
            WeightsError: `config.json` is missing or is not a JSON object.
        """
        where = f"{self.origin.repository}/config.json"
        if "config.json" not in self.small_files:
            raise WeightsError(f"`{where}` does not exist", hint="give a repository or a folder that contains a model")
        try:
            raw = json.loads(self.small_files["config.json"])
        except ValueError as error:
            raise WeightsError(f"`{where}` is not JSON: {error}", hint="fetch the file again") from error
        if not isinstance(raw, dict):
            raise WeightsError(f"`{where}` contains {type(raw).__name__}, not an object", hint="fetch the file again")
        return parse_config(cast(dict[str, Any], raw), where)


class CheckpointSource(Protocol):
    """Source of a checkpoint's files. Weight files are fetched when they are needed."""

    contents: CheckpointContents

    @property
    def kept_bytes(self) -> int:
        """Bytes of source files that stay on this machine without `--keep-source`, because they were here before."""
        ...

    def local_bytes(self, file: str) -> int:
        """Return the number of bytes of a file on this machine."""
        ...

    def extra_bytes(self, files: Iterable[str]) -> int:
        """Return the disk space that these files need in addition: for all if they are kept, else for two at a time."""
        ...

    def fetch(self, file: str, progress: Callable[[int], None], stop: threading.Event) -> Path:
        """Fetch a file, verify it and return its path.

        Args:
            file: file name.
            progress: callback for the number of newly fetched bytes.
            stop: event that cancels the download.
        """
        ...

    def release(self, file: str) -> None:
        """Release a file that is no longer needed."""
        ...

    def finish(self) -> None:
        """Clean up after a build."""
        ...

    def read(self, info: TensorInfo) -> bytes:
        """Read a small tensor from a file that this process does not fetch."""
        ...


def read_header_by_name(path: Path) -> dict[str, TensorInfo]:
    """Return the tensors of a file. Their path is the file name, as in a repository.

    Raises:
        WeightsError: the file is damaged.
    """
    return {name: replace(info, file=Path(path.name)) for name, info in read_header(path).items()}
