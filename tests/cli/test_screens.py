# ruff: noqa: RUF001
"""What a user sees, at three widths: screens that are kept as text in `screens/`.

After a change of the display, run this file with WRITE_SCREENS=1 and read what changed in the files.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TypeAlias

import pytest
from rich.text import Text

from kimi_mlx.cli import output
from kimi_mlx.cli.chat.output import answer_view, chat_status, terminal_output
from kimi_mlx.cli.chat.output.answer_view import AnswerView, ReasoningMode
from kimi_mlx.cli.chat.output.chat_status import ChatStatus
from kimi_mlx.engine.events import Encoded, Finished, FinishReason, Interrupted, Prefilled, Resumed, Statistics
from kimi_mlx.errors import RingError
from kimi_mlx.text.messages import Delta, ToolCall
from tests.screen import Screen, check_screens

SCREENS = Path(__file__).parent / "screens"
WIDTHS = (40, 80, 200)
MARKDOWN = """\
# Running Kimi on two Macs

The model is **split** between the Macs: each holds *half* of the layers, and `mlx.launch` starts a process on each. \
See the [documentation](https://example.com/docs/cluster) for the architecture of a mixture-of-experts model.

## Steps

1. Connect the Macs with a Thunderbolt cable
   - both need the same version of macOS
   - `ssh mac-b` must work without a password
2. Write the hostfile
3. Start it:

   ```sh
   kimi-mlx launch --hostfile two.json chat
   ```

- [x] memory
- [ ] network

> A slow link costs more than a slow processor.

| Strategy | Messages per token | Memory |
| :--- | ---: | --- |
| tensor | 122 | even |
| pipeline | 2 | by layers |

```python
def tokens_per_second(layers: int) -> float:
    \"\"\"Return an estimate.\"\"\"
    return 1.0 / (layers * 0.0005)  # seconds
```
"""
CHINESE = """\
## 混合专家模型

混合专家模型（Mixture of Experts）把网络分成许多“专家”，每个词元只使用其中的几个。\
这样，模型可以很大，而计算量仍然很小。👩‍🚀🇩🇪❤️

| 名称 | 说明 |
|---|---|
| 专家 | 每层有384个，使用8个 |
"""
WIDE_TABLE = """\
| Model | Parameters | Active | Layers | Context | Weights on disk | Remark |
|---|---|---|---|---|---|---|
| Kimi K2 Instruct | 1.04 T | 32 B | 61 | 131072 | 578 GB in 4 bits | needs two Macs with 512 GB |
| kimi-mini | 2.1 M | 1.2 M | 4 | 1024 | 4 MB | comes with the program |
"""
CALL = ToolCall("functions.weather:0", "weather", '{"city": "Paris", "days": 3}')
STATISTICS = Statistics(48_000, 12_288, 512, ttft_s=60.0, decode_s=25.6, peak_memory_bytes=10**9)


class Stage:
    """A terminal with an answer and a clock that only a scene moves."""

    def __init__(self, columns: int, monkeypatch: pytest.MonkeyPatch):
        self.now = 0.0
        clock = SimpleNamespace(monotonic=lambda: self.now)
        for module in (answer_view, chat_status, terminal_output):
            monkeypatch.setattr(module, "time", clock)
        self.screen = Screen(columns)
        self.console = self.screen.console()
        monkeypatch.setattr(output, "stderr", self.console)
        self.screen.write("> question\n\n")
        self.view = self.open("fold")

    def open(self, reasoning: ReasoningMode = "fold", plain: bool = False) -> AnswerView:
        """Begin an answer; its thread does not run."""
        status = ChatStatus("kimi-k2", num_ranks=4, context=131_072)
        self.view = AnswerView(status, reasoning, plain, self.console, self.console)
        return self.view

    def write(self, text: str, size: int = 20) -> None:
        """Let the model write a text, 20 characters a token and 10 tokens a second."""
        for start in range(0, len(text), size):
            self.view.show(Delta(text=text[start : start + size]))
            self.wait(0.1)

    def think(self, text: str) -> None:
        """Let the model reason, 20 characters a token and 10 tokens a second."""
        for start in range(0, len(text), 20):
            self.view.show(Delta(reasoning=text[start : start + 20]))
            self.wait(0.1)

    def wait(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds
        self.view.refresh()

    def finish(self, reason: FinishReason = "stop") -> None:
        """End the answer."""
        self.view.show(Finished(reason, STATISTICS))
        self.view.finish()


Scene: TypeAlias = Callable[[Stage], Iterator[str]]


def answer(stage: Stage) -> Iterator[str]:
    stage.write(MARKDOWN[:750])
    yield "while it is written"
    stage.write(MARKDOWN[750:])
    stage.finish()
    yield "at the end"


def reasoning(stage: Stage) -> Iterator[str]:
    stage.wait(0.5)
    stage.think("The user asks about two Macs. Both need the weights of their layers: I count the memory. " * 8)
    yield "while the model thinks"
    stage.write("It **fits**.")
    stage.finish()
    yield "folded"


def reasoning_shown(stage: Stage) -> Iterator[str]:
    stage.open("show")
    stage.think("The user asks about two Macs.\nBoth need the weights of their layers.")
    stage.write("It **fits**.")
    stage.finish()
    yield "at the end"


def tool_calls(stage: Stage) -> Iterator[str]:
    stage.write("I look it up.")
    other = ToolCall("functions.read_file:1", "read_file", '{"path": "/home/me/notes.txt"}')
    stage.view.show(Delta(tool_calls=(CALL, other)))
    with stage.view.paused():
        yield "before a question"
        stage.screen.write("Allow weather? [y]es\n")
    stage.view.tool_started(CALL)
    stage.wait(4)
    yield "while it runs"
    stage.view.tool_finished(CALL, "\n".join(f"day {day}: sunny, {20 + day} degrees" for day in range(12)))
    stage.view.tool_finished(other, "no such file: `/home/me/notes.txt`", is_error=True)
    stage.write("It stays *sunny*.")
    stage.finish()
    yield "at the end"


def long_prompt(stage: Stage) -> Iterator[str]:
    stage.view.show(Encoded(image=1, num_images=2, done=0, total=12))
    stage.view.show(Encoded(image=1, num_images=2, done=3, total=12))
    stage.wait(3)
    yield "an image"
    stage.view.show(Prefilled(0, 48_000))
    stage.wait(1)
    yield "at first"
    stage.view.show(Prefilled(12_288, 48_000))
    stage.wait(40)
    yield "after 41 seconds"
    stage.write("Read.")
    stage.finish()
    yield "at the end"


def interruption(stage: Stage) -> Iterator[str]:
    stage.write("The first paragraph.\n\nThe answer is in the mid")
    stage.view.show(Interrupted("lost rank 1 on `mac-b`: the connection was closed", 1, 3, wait_s=5.0))
    stage.wait(12)
    yield "while it is lost"
    stage.view.show(Resumed(21.0))
    stage.write("dle of a word.")
    stage.finish()
    yield "at the end"


def error(stage: Stage) -> Iterator[str]:
    stage.write("The answer begins\n\n- and")
    stage.view.finish()
    output.print_error(RingError("lost rank 1 (`mac-b`): no answer for 30 s", hint="check it with `kimi-mlx doctor`"))
    yield "at the end"


def stopped(stage: Stage) -> Iterator[str]:
    stage.write("An answer that goes on and on until **somebody")
    stage.finish("cancelled")
    output.print_note("[stopped]")
    yield "after Ctrl-C"


def chinese(stage: Stage) -> Iterator[str]:
    stage.write(CHINESE, size=4)
    stage.finish()
    yield "at the end"


def wide_table(stage: Stage) -> Iterator[str]:
    stage.write(WIDE_TABLE)
    stage.finish()
    yield "at the end"


def notes(stage: Stage) -> Iterator[str]:
    stage.write("Some text.\n\n```python\nx = 1\n")
    stage.view.print(Text("attached: photo.png"))
    stage.write("y = 2\n```\n")
    stage.finish()
    yield "at the end"


def plain(stage: Stage) -> Iterator[str]:
    stage.open(plain=True)
    stage.think("Let me see.")
    stage.write("# Title\n\nSome **bold** text with \x1b[31mcolour\x1b[0m.")
    stage.finish()
    yield "at the end"


SCENES: tuple[Scene, ...] = (
    *(answer, reasoning, reasoning_shown, tool_calls, long_prompt, interruption, error, stopped, chinese),
    *(wide_table, notes, plain),
)


@pytest.mark.parametrize("scene", SCENES, ids=lambda scene: scene.__name__)
def test_screens(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    screens: dict[str, str] = {}
    for columns in WIDTHS:
        stage = Stage(columns, monkeypatch)
        for title in scene(stage):
            screens[f"{columns} columns, {title}"] = stage.screen.text
    check_screens(SCREENS, scene.__name__, screens)


def test_a_resize_in_the_middle_leaves_no_old_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XTERM_VERSION", "XTerm")  # like this screen, it does not wrap rows again
    screens: dict[str, str] = {}
    for before, after in ((80, 40), (40, 80), (200, 80)):
        stage = Stage(before, monkeypatch)
        stage.write(MARKDOWN[:150])
        stage.screen.resize(after)
        stage.console.width = after
        stage.write(MARKDOWN[150:620])
        screens[f"{before} to {after} columns, while it is written"] = stage.screen.text
        stage.finish()
        screens[f"{before} to {after} columns, at the end"] = stage.screen.text
    check_screens(SCREENS, "resize", screens)
