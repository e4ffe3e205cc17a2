"""Images in the conversation: commands, dropped files and thumbnails, with and without a pseudo-terminal."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pyte
import pytest
from PIL import Image

from kimi_mlx.cli.chat.files.attachments import read_attachment
from kimi_mlx.cli.chat.input.user_input import UserInput
from kimi_mlx.cli.chat.repl import Repl
from kimi_mlx.cli.chat.repl_state import ReplState
from kimi_mlx.engine.request import Request
from kimi_mlx.errors import EngineError
from kimi_mlx.session.conversation import Conversation
from kimi_mlx.session.local_chat_model import LocalChatModel
from tests.cli.conftest import Spawn
from tests.fakes import FixedSession, conversation_of
from tests.terminal import COMMAND, CONTROLLING_TERMINAL, CTRL_C, CTRL_D, ENTER, ROOT, TAB

FAKE = (
    CONTROLLING_TERMINAL
    + """
from kimi_mlx.cli.chat.input.user_input import UserInput
from kimi_mlx.cli.chat.repl import run_repl
from kimi_mlx.cli.chat.repl_state import ReplState
from tests.fakes import conversation_of
conversation = conversation_of({answer}, sees_images=True)
run_repl(ReplState(conversation))
print([[part["type"] for part in message.content] for message in conversation.messages if message.role == "user"])
"""
)
QUICK = FAKE.format(answer="'Two red circles.'")


class Lines:
    """An input line that was typed beforehand; remembers the drafts that it was given."""

    def __init__(self, *lines: str):
        self._lines = iter(lines)
        self.drafts: list[str] = []

    def read(self, draft: str = "", toolbar: Callable[[int], str] | None = None) -> UserInput:
        self.drafts.append(draft)
        return UserInput(next(self._lines))


@pytest.fixture
def picture(tmp_path: Path) -> Path:
    return write_picture(tmp_path / "two words.png")


def write_picture(path: Path, size: tuple[int, int] = (60, 40), colour: str = "red") -> Path:
    Image.new("RGB", size, colour).save(path)
    return path


def type_lines(conversation: Conversation, *lines: str) -> list[str]:
    """Send lines; returns the draft before each of them, and before `/quit`."""
    typed = Lines(*lines, "/quit")
    Repl(ReplState(conversation)).run(typed)
    return typed.drafts


def sent(conversation: Conversation) -> list[object]:
    """The user's messages: text, or text and names of part types."""
    contents = [message.content for message in conversation.messages if message.role == "user"]
    return [
        content if isinstance(content, str) else [part.get("text", part["type"]) for part in content or ()]
        for content in contents
    ]


def session_of(conversation: Conversation) -> FixedSession:
    """The session that answers."""
    assert isinstance(conversation.model, LocalChatModel)
    session = conversation.model._session  # pyright: ignore[reportPrivateUsage]
    assert isinstance(session, FixedSession)
    return session


def images_of(conversation: Conversation) -> list[int]:
    """The number of images of each request."""
    return [len(request.images) for request in session_of(conversation).requests]


def test_an_attached_image_goes_with_the_next_message(picture: Path, capfd: pytest.CaptureFixture[str]) -> None:
    conversation = conversation_of("yes", sees_images=True)
    type_lines(conversation, f"/image {picture}", "What is it?", "And now?", "/files")
    assert sent(conversation) == [["image", "What is it?"], "And now?"]
    assert images_of(conversation) == [1, 1]  # each turn sends the whole conversation
    output = capfd.readouterr().err
    assert "two words.png · 60x40 · 6 tokens\nattached to the next message" in output
    assert "1  two words.png  60x40  6 tokens  sent" in output
    assert "\x1b" not in output


def test_a_dropped_image_keeps_its_place(picture: Path, tmp_path: Path) -> None:
    other = shutil.copy(picture, tmp_path / "other.png")
    conversation = conversation_of("yes", sees_images=True)
    type_lines(conversation, f"Compare '{picture}' with {other}, please", f"{other} and this", f"//{other}")
    assert sent(conversation) == [
        ["Compare", "image", "with", "image", ", please"],
        ["image", "and this"],
        f"/{other}",  # a message that starts with // is text
    ]


def test_a_line_of_files_only_waits_for_its_message(picture: Path, capfd: pytest.CaptureFixture[str]) -> None:
    conversation = conversation_of("yes", sees_images=True)
    type_lines(conversation, f"{picture} ", "/files", "What is it?")
    assert sent(conversation) == [["image", "What is it?"]]
    assert "1  two words.png  60x40  6 tokens  attached" in capfd.readouterr().err


def test_files_of_the_command_line_come_first(picture: Path) -> None:
    conversation = conversation_of("yes", sees_images=True)
    Repl(ReplState(conversation, attached=[read_attachment(picture, "image")])).run(Lines("hi", "again", "/quit"))
    assert sent(conversation) == [["image", "hi"], "again"]


def test_images_are_dropped_by_number_or_all(picture: Path, capfd: pytest.CaptureFixture[str]) -> None:
    conversation = conversation_of("yes", sees_images=True)
    image = f"/image {picture}"
    type_lines(conversation, "/files", "/files drop all", image, image, "one", image, "/files drop 3", "/files drop 1")
    assert sent(conversation) == [["image", "one"]]
    type_lines(conversation, "hi")
    assert sent(conversation) == [["image", "one"], "hi"]
    output = capfd.readouterr().err
    assert "there are no files; /file FILE attaches a text" in output
    assert "there are no files\n" in output
    assert output.count("dropped two words.png") == 2


def test_reset_forgets_all_images(picture: Path, capfd: pytest.CaptureFixture[str]) -> None:
    conversation = conversation_of("yes", sees_images=True)
    type_lines(conversation, f"/image {picture}", "one", f"/image {picture}", "/reset", "/files", "two")
    assert sent(conversation) == ["two"]
    assert "there are no files" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("line", "message", "hint"),
    [
        ("/image", "/image needs a file", "Tab completes"),
        (
            "/image {folder}/two wrods.png",
            "there is no file `{folder}/two wrods.png`",
            "did you mean `{folder}/two wo",
        ),
        ("/image {folder}/no/x.png", "there is no file `{folder}/no/x.png`", "there is no folder `{folder}/no` either"),
        ("/image {folder}", "`{folder}` is a folder, not an image", "name a file in it"),
        (
            "/image {folder}/broken.png",
            "`{folder}/broken.png`: it is a text file, which is not read as an image",
            "send it as text",
        ),
        (
            "What is {folder}/broken.png?",
            "`{folder}/broken.png`: it is a text file, which is not read as an image",
            "send it as text",
        ),
        ("/image {folder}/empty.png", "`{folder}/empty.png`: the file is empty", "save it again"),
        ("/image {folder}/fifo.png", "`{folder}/fifo.png` is a pipe, not a file", "save its contents"),
        ("/image file:///%00.png", "there is no file `/\\x00.png`", "check the path"),
        ("/image {folder}/clip.png", "`{folder}/clip.png`: it is a video, not an image", "`/video`"),
        ("/image https://example.org/a.png", "an image is a file here, not a URL", "`curl -O URL`"),
        ("{folder}/doc.pdf what is it?", "`{folder}/doc.pdf` does not have the name of an image", "`/image FILE`"),
        ("{folder}", "`{folder}` is a folder", "drop the images in it"),
        ("/files drop 1", "there is no file 1", "/files lists"),
        ("/files 1", "/files does not know `1`", "/files drop 1"),
        pytest.param("/files drop " + "5" * 5000, "/files does not know", "/files drop 1", id="many digits"),
    ],
)
def test_an_error_sends_nothing_and_gives_the_line_back(
    picture: Path, capfd: pytest.CaptureFixture[str], line: str, message: str, hint: str
) -> None:
    folder = picture.parent
    (folder / "broken.png").write_bytes(b"no image at all")
    (folder / "empty.png").touch()
    (folder / "doc.pdf").touch()
    (folder / "clip.png").write_bytes(b"\0\0\0\x1cftypisom\0\0\2\0")
    os.mkfifo(folder / "fifo.png")
    conversation = conversation_of("yes", sees_images=True)
    line, message, hint = (text.format(folder=folder) for text in (line, message, hint))
    assert type_lines(conversation, line, "") == ["", line, ""]
    assert conversation.messages == []
    output = capfd.readouterr().err
    assert f"error: {message}" in output
    assert hint in output


def test_one_bad_file_of_several_attaches_none(picture: Path) -> None:
    conversation = conversation_of("yes", sees_images=True)
    type_lines(conversation, f"/image '{picture}' {picture.parent}/missing.png", "hi")
    assert sent(conversation) == ["hi"]


def test_a_model_without_vision(picture: Path, capfd: pytest.CaptureFixture[str]) -> None:
    conversation = conversation_of("yes")
    lines = (f"/image {picture}", f"{picture}", f"Resize {picture} to 10x10")
    assert type_lines(conversation, *lines) == ["", lines[0], lines[1], ""]
    assert sent(conversation) == [lines[2]]
    output = capfd.readouterr().err
    assert output.count("error: this model does not see images\nhint: choose one that does") == 2
    assert "this model does not see images: paths are sent as text" in output


def test_a_message_that_fails_keeps_its_attached_images(picture: Path, capfd: pytest.CaptureFixture[str]) -> None:
    conversation = conversation_of("yes", sees_images=True)
    session = session_of(conversation)

    def fail(request: Request) -> None:
        raise EngineError("the prompt is too long")

    succeed, session._before = session._before, fail  # pyright: ignore[reportPrivateUsage]
    repl = Repl(ReplState(conversation))
    repl.run(Lines(f"/image {picture}", "What is it?", "/quit"))
    assert conversation.messages == []
    assert "not answered: the files stay attached" in capfd.readouterr().err
    session._before = succeed  # pyright: ignore[reportPrivateUsage]
    repl.handle(UserInput("What is it?"))
    assert sent(conversation) == [["image", "What is it?"]]


def test_control_characters_in_names_are_not_shown(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    path = write_picture(tmp_path / "red\x1b[31m\x07.png")
    type_lines(conversation_of("yes", sees_images=True), f"/image {path}", "/files")
    output = capfd.readouterr().err
    assert output.count("red.png") == 2
    assert "\x1b" not in output


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "begin"),
    [
        ({"TERM": "xterm-kitty"}, b"\x1b_Ga=T,f=100,q=2,r=2,m="),
        ({"TERM": "xterm-256color", "TERM_PROGRAM": "iTerm.app"}, b"\x1b]1337;File=inline=1;size="),
        pytest.param({"TERM": "xterm-256color", "TERM_PROGRAM": "Apple_Terminal"}, None, marks=pytest.mark.sweep),
        pytest.param({"TERM": "xterm-kitty", "TMUX": "/tmp/tmux-0/default,1,0"}, None, marks=pytest.mark.sweep),
        ({"TERM": "dumb", "TERM_PROGRAM": "iTerm.app"}, None),
    ],
    ids=["kitty", "iterm2", "terminal", "tmux", "dumb"],
)
def test_thumbnails_on_a_terminal(
    spawn: Spawn, picture: Path, environment: dict[str, str], begin: bytes | None
) -> None:
    secret = b"a comment in the file that must not reach the terminal"
    with Image.open(picture) as image:
        image.save(picture.with_suffix(".jpg"), comment=secret)
    terminal = spawn(QUICK, **{"TERM_PROGRAM": "", "TMUX": "", "LC_TERMINAL": "", "KITTY_WINDOW_ID": "", **environment})
    terminal.expect("\n> ")
    answer = terminal.ask(f"What is {picture.with_suffix('.jpg')}?{ENTER}")
    assert "two words.jpg · 60x40 · 6 tokens\n" in answer
    assert "Two red circles." in answer
    if begin is None:
        assert b"\x1b_G" not in terminal.raw
        assert b"1337;File" not in terminal.raw
    else:
        assert terminal.raw.count(begin) == 1
    assert secret not in terminal.raw
    terminal.send(CTRL_D)
    terminal.expect("[['text', 'image', 'text']]")
    assert terminal.wait() == 0


@pytest.mark.slow
def test_names_are_completed_and_a_wrong_line_comes_back(spawn: Spawn, picture: Path) -> None:
    (picture.parent / "two.txt").touch()
    (picture.parent / "folder").mkdir()
    shutil.copy(picture, picture.parent / "folder")
    terminal = spawn(QUICK)
    terminal.expect("\n> ")
    terminal.send(f"/image {picture.parent}/two" + TAB)
    terminal.expect("words.png")  # the cursor jumps over the space
    assert "attached to the next message" in terminal.ask(ENTER)
    terminal.send(f"/image {picture} {picture.parent}/fol" + TAB)  # a second name, in a folder
    terminal.expect("der/")
    terminal.send("two" + TAB)
    terminal.expect("\\ words.png")
    assert terminal.ask(ENTER).count("two words.png · ") == 2
    terminal.ask("/files drop 3" + ENTER)
    terminal.ask("/files drop 2" + ENTER)
    assert "there is no file" in terminal.ask("/image missing.png" + ENTER)
    terminal.expect("/image missing.png")  # to be corrected
    terminal.send(CTRL_C)
    terminal.expect("> ")  # drawn over it
    # as terminals paste: bracketed, with a space at the end
    dropped = str(picture).replace(" ", "\\ ")
    terminal.ask(f"Is it \x1b[200~{dropped} \x1b[201~{ENTER}")
    terminal.send(CTRL_D)
    terminal.expect("[['image', 'text', 'image']]")
    assert terminal.wait() == 0


@pytest.mark.slow
def test_reading_a_file_shows_progress_and_can_be_stopped(spawn: Spawn, picture: Path) -> None:
    slow = "\nimport time, kimi_mlx.images.cache as cache\ncache.prepare_image = lambda *arguments: time.sleep(60)\n"
    terminal = spawn(QUICK.replace("\nconversation =", slow + "conversation ="))
    terminal.expect("\n> ")
    terminal.send(f"/image {picture}" + ENTER)
    terminal.expect("reading two words.png")
    assert "error: reading `two words.png` was stopped" in terminal.ask(CTRL_C)
    terminal.send(CTRL_C)  # clears the line, which came back
    terminal.send(CTRL_D)
    assert terminal.wait() == 0


@pytest.mark.slow
def test_a_narrow_terminal(spawn: Spawn, picture: Path) -> None:
    long_name = write_picture(picture.parent / f"a-picture-with-a-name-{'very-' * 8}long.png", (900, 100))
    terminal = spawn(QUICK, columns=40, TERM="xterm-kitty")
    terminal.expect("\n> ")
    terminal.ask(f"/image {long_name}{ENTER}")
    terminal.ask("/files" + ENTER)
    terminal.ask("What?" + ENTER)
    screen = pyte.Screen(40, 60)
    pyte.ByteStream(screen).feed(
        b"".join(part.partition(b"\x1b\\")[2] or part for part in terminal.raw.split(b"\x1b_G"))
    )
    shown = "".join(line.rstrip() for line in screen.display)
    assert f"{long_name.name} · 900x100 · 132 tokens".replace(" ", "") in shown.replace(" ", "")
    assert "c=32" in terminal.raw.decode(errors="replace")  # the thumbnail is no wider than the terminal
    assert "Two red circles." in shown
    assert "132 tokens · attached" in shown


KIMI_MINI_VL = ROOT / "kimi_mlx" / "models" / "kimi-mini-vl"


@pytest.mark.slow
def test_a_conversation_with_kimi_mini_vl(spawn: Spawn, picture: Path) -> None:
    terminal = spawn(COMMAND, "chat", "kimi-mini-vl", "--max-tokens", "8", "--image", str(picture), "-t", "0")
    terminal.expect("\n> ")
    assert "two words.png · 60x40 · 6 tokens" in terminal.text  # shown before the first message
    assert "error" not in terminal.ask("What do you see?" + ENTER)
    assert "images " in terminal.ask("/stats" + ENTER)  # its time
    assert "error" not in terminal.ask(f"And in {picture.parent}/two\\ words.png ?" + ENTER)
    listed = terminal.ask("/files" + ENTER)
    assert listed.count("  sent") == 2
    terminal.ask("/files drop 1" + ENTER)
    assert "error" not in terminal.ask("And now?" + ENTER)
    terminal.send("/quit" + ENTER)
    assert terminal.wait() == 0
    assert terminal.has_old_modes()


@pytest.mark.slow
def test_ctrl_c_stops_encoding(spawn: Spawn, tmp_path: Path) -> None:
    """The same tower, but images are not shrunk, so that encoding takes seconds."""
    folder = shutil.copytree(KIMI_MINI_VL, tmp_path / "patient")
    (folder / "preprocessor_config.json").unlink()
    for number in range(12):
        write_picture(tmp_path / f"{number}.png", (700, 700), f"#{number:02x}0000")
    terminal = spawn(COMMAND, "chat", str(folder), "--max-tokens", "8", columns=40)
    terminal.expect("\n> ")
    names = " ".join(str(tmp_path / f"{number}.png") for number in range(12))
    terminal.ask(f"/image {names}" + ENTER)
    terminal.send("What do you see?" + ENTER)
    terminal.expect(": encoding ")  # its progress
    answer = terminal.ask(CTRL_C)
    assert "[stopped]" in answer
    assert "not answered: the files stay attached" in " ".join(answer.split())
    assert terminal.ask("/files" + ENTER).count("attached") == 12
    terminal.send(CTRL_D)
    assert terminal.wait() == 0
