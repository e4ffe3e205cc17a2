"""Images, text files, search, export and import."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterator
from contextlib import closing

import pytest
from PIL import Image, ImageDraw

from kimi_mlx.session.open import open_session
from kimi_mlx.session.session import SessionOptions
from tests.browser.chat_page import ChatPage
from tests.browser.conftest import OpenPage
from tests.fakes import KIMI_MINI
from tests.server.running_server import RunningServer, serving

pytestmark = [pytest.mark.browser, pytest.mark.slow]

KIMI_MINI_VL = KIMI_MINI.with_name("kimi-mini-vl")


@pytest.fixture(scope="module")
def vision_server() -> Iterator[RunningServer]:
    """The server with kimi-mini-vl."""
    with (
        closing(open_session(SessionOptions(KIMI_MINI_VL))) as session,
        serving(session, folder=KIMI_MINI_VL) as server,
    ):
        yield server


def red_circle() -> bytes:
    image = Image.new("RGB", (128, 128), "white")
    ImageDraw.Draw(image).ellipse((30, 30, 98, 98), fill="red")
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def attach(chat: ChatPage, name: str, kind: str, data: bytes) -> None:
    chat.page.set_input_files("#files", [{"name": name, "mimeType": kind, "buffer": data}])


PASTE = """(data) => {
  const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], 'image.png', { type: 'image/png' }));
  document.querySelector('#input').dispatchEvent(
    new ClipboardEvent('paste', { clipboardData: transfer, bubbles: true, cancelable: true }));
}"""

DROP = """(data) => {
  const bytes = Uint8Array.from(atob(data), (character) => character.charCodeAt(0));
  const transfer = new DataTransfer();
  transfer.items.add(new File([bytes], 'image.png', { type: 'image/png' }));
  for (const type of ['dragenter', 'dragover', 'drop'])
    document.querySelector('#log').dispatchEvent(
      new DragEvent(type, { dataTransfer: transfer, bubbles: true, cancelable: true }));
}"""


@pytest.mark.parametrize("way", ["file", "paste", "drop"])
def test_images(vision_server: RunningServer, open_page: OpenPage, way: str) -> None:
    chat = open_page(vision_server.url)
    chat.wait_true("() => !document.querySelector('#camera').hidden")
    data = red_circle()
    if way == "file":
        attach(chat, "circle.png", "image/png", data)
    else:
        chat.run(PASTE if way == "paste" else DROP, base64.b64encode(data).decode())
    chat.find("#attachments img").wait_for()
    assert "circle" in chat.ask("What is in this picture?").lower()
    assert chat.find("#attachments img").count() == 0
    assert chat.run("() => document.querySelector('.message.user img').naturalWidth") == 128
    chat.page.reload()
    chat.wait_messages(1)
    chat.wait_true("() => document.querySelector('.message.user img').naturalWidth === 128")


def test_images_of_other_formats(vision_server: RunningServer, open_page: OpenPage) -> None:
    chat = open_page(vision_server.url)
    chat.wait_true("() => !document.querySelector('#camera').hidden")
    file = io.BytesIO()
    Image.open(io.BytesIO(red_circle())).save(file, "BMP")
    attach(chat, "circle.bmp", "image/bmp", file.getvalue())
    assert "circle" in chat.ask("What is in this picture?").lower()
    attach(chat, "broken.bmp", "image/bmp", b"BMnonsense")
    chat.wait_text("cannot be read as an image", "#banner")


def test_images_where_the_model_sees_none(running: RunningServer, open_page: OpenPage) -> None:
    chat = open_page(running.url)
    chat.wait_model("kimi-mini")
    attach(chat, "circle.png", "image/png", red_circle())
    chat.wait_text("does not see images", "#banner")
    assert not chat.find("#camera").is_visible()


def test_text_files(running: RunningServer, open_page: OpenPage) -> None:
    chat = open_page(running.url)
    attach(chat, "notes.txt", "text/plain", "Grüße ```` 你好\n".encode())
    attach(chat, "more.py", "text/x-python", b"print(1)\n")
    assert chat.find(".attachment").count() == 2
    chat.page.get_by_role("button", name="Remove more.py").click()
    chat.ask("Read this.")
    shown = chat.find(".message.user").inner_text()
    assert "notes.txt" in shown
    assert "more.py" not in shown
    assert chat.find(".message.user .file pre").text_content() == "Grüße ```` 你好"
    stored = chat.run("async () => (await import('/page/store.js')).messages(location.hash.slice(2))")
    (sent,) = [message["content"] for message in stored if message["role"] == "user"]
    assert sent[0]["text"] == "notes.txt:\n`````\nGrüße ```` 你好\n`````"
    attach(chat, "alone.txt", "text/plain", b"x")
    chat.send("")
    chat.wait_messages(2)
    chat.wait_answer()
    assert chat.find(".message.user .footer").last.inner_text() == "Edit"  # there is no text to copy
    attach(chat, "large.txt", "text/plain", b"x" * 2_000_000)
    chat.wait_text("at most 1.0 MB", "#banner")
    assert chat.find(".attachment").count() == 0


def test_search(running: RunningServer, open_page: OpenPage) -> None:
    chat = open_page(running.url)
    for message in ("Alpha is first.", "Beta is second."):
        chat.ask(message)
        chat.click("New conversation")
    chat.page.fill("#search", "second beta")
    chat.find("#conversations li").nth(1).wait_for(state="detached")
    assert chat.find("#conversations a").all_inner_texts() == ["Beta is second."]
    chat.page.fill("#search", "IS")
    chat.find("#conversations li").nth(1).wait_for()
    chat.page.fill("#search", "gamma")
    chat.wait_text("Nothing found for “gamma”", "#conversations")


def test_export_and_import(running: RunningServer, open_page: OpenPage) -> None:
    chat = open_page(running.url)
    chat.ask("What are you?")
    chat.click("Retry")
    chat.wait_text("2 of 2", ".versions")
    chat.wait_answer()
    chat.click("Settings")
    chat.page.get_by_label("Instructions").fill("Be brief.")
    chat.page.get_by_label("Temperature").fill("0.5")
    chat.click("Save")
    chat.ask("And now?")
    shown = chat.find("#log .content").all_inner_texts()
    with chat.page.expect_download() as download:
        chat.click("Export all")
    exported = download.value.path().read_text()
    (conversation,) = json.loads(exported)["conversations"]
    assert conversation["settings"] == {"system": "Be brief.", "temperature": 0.5}
    assert [message["role"] for message in conversation["messages"]] == [
        *("user", "assistant", "assistant", "user", "assistant")
    ]

    other = open_page(running.url)  # another browser
    name = download.value.suggested_filename
    other.page.set_input_files(
        "#import-file", [{"name": name, "mimeType": "application/json", "buffer": exported.encode()}]
    )
    other.wait_text("Conversations imported: 1", "#banner")  # and it is shown
    other.wait_messages(2)
    other.wait_answer()
    assert other.find("#log .content").all_inner_texts() == shown
    other.click("Settings")
    assert other.page.get_by_label("Instructions").input_value() == "Be brief."
    other.click("Cancel")
    assert other.ask("Go on.")

    chat.click("Export")
    with chat.page.expect_download() as download:
        chat.click("As Markdown")
    markdown = download.value.path().read_text()
    assert markdown.startswith("# What are you?\n")
    assert "Be brief." in markdown
    assert download.value.suggested_filename == "What-are-you-.md"


def test_import_of_other_programs(running: RunningServer, open_page: OpenPage) -> None:
    """Contents may be lists, and arguments objects; a file that is not in our form is shown as it is sent."""
    chat = open_page(running.url)
    call = {"id": "1", "type": "function", "function": {"name": "look", "arguments": {"at": "it"}}}
    messages = [
        {"role": "user", "content": [{"type": "text", "name": "a.txt", "text": "not in a fence"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "**Yes**"}], "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "1", "content": "seen"},
    ]
    buffer = json.dumps(messages).encode()
    chat.page.set_input_files("#import-file", [{"name": "a.json", "mimeType": "application/json", "buffer": buffer}])
    chat.wait_text("a", "#conversations a")
    chat.find("#conversations a").click()
    chat.wait_text("Yes", ".markdown strong")
    assert chat.find(".file pre").text_content() == "not in a fence"
    assert json.loads(chat.find(".call pre").inner_text()) == {"at": "it"}
    chat.ask("And?")
    assert "refuses" not in chat.remark
