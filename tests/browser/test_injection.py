"""Hostile text in each place that shows foreign text: answers, tool calls, titles, imported files, file names.

None of it may run, load anything, restyle the page or leave it. The fixture also fails for every violation of the CSP,
so these tests show that the page does not depend on the policy.
"""

from __future__ import annotations

import json

import pytest

from tests.browser.chat_page import ChatPage
from tests.browser.conftest import OpenPage
from tests.browser.servers import answering
from tests.server.running_server import RunningServer

pytestmark = pytest.mark.browser

ATTACKS = [
    "<script>window.hacked = 1</script>",
    "<img src=x onerror='window.hacked = 1'>",
    '"><svg onload=window.hacked=1><animate onbegin=window.hacked=1 attributeName=x dur=1s>',
    "<svg><script href='data:text/javascript,window.hacked=1'></script></svg>",
    "<style>* { display: none } body { background: url(https://evil.example/css) }</style>",
    '<p style="position: fixed; inset: 0">over everything</p>',
    "<iframe src='javascript:parent.hacked=1' srcdoc='<script>parent.hacked=1</script>'></iframe>",
    "<object data='data:text/html,<script>top.hacked=1</script>'></object><embed src='https://evil.example/e'>",
    "<base href='https://evil.example/'><meta http-equiv=refresh content='0;url=https://evil.example/'>",
    "<form action='https://evil.example/'><button id=send>Send</button></form>",
    "<link rel=stylesheet href='https://evil.example/l.css'><a href='javascript:hacked=1' id=input>x</a>",
    "<math><mtext><table><mglyph><style><img src=x onerror=window.hacked=1>",
    "<template><img src=x onerror=window.hacked=1></template><noscript><img src=x onerror=window.hacked=1></noscript>",
    "[link](javascript:window.hacked=1) [link](JaVaScRiPt:window.hacked=1) [link](&#106;avascript:window.hacked=1)",
    "[link](java\tscript:window.hacked=1) [link](\x01javascript:window.hacked=1) [link](vbscript:window.hacked=1)",
    "[link](data:text/html,<script>window.hacked=1</script>) [link](blob:x)",
    "[link](file:///etc/passwd) [link](//evil.example)",
    "<javascript:window.hacked=1> <data:text/html;base64,PHNjcmlwdD4=>",
    "![image](https://evil.example/pixel.png) ![image](data:image/svg+xml,<svg/onload=window.hacked=1>)",
    "![image][reference]\n\n[reference]: https://evil.example/other.png 'title\" onmouseover=\"window.hacked=1'",
    '[title](https://example.com "x\\" onmouseover=\\"window.hacked=1")',
    "[click](https://example.com/\"onmouseover='window.hacked=1')",
    '```html" onmouseover="window.hacked=1\n</code></pre><script>window.hacked = 1</script>\n```',
    "```<img/src=x/onerror=window.hacked=1>\ncode\n```",
    "~~~js\n</script><script>window.hacked=1</script>\n~~~",
    "| <img src=x onerror=window.hacked=1> | b |\n| - | - |\n| `<script>hacked=1</script>` | </table><script>x |",
    "<!-- --><script>window.hacked=1</script><!-- -->",
    "<![CDATA[<script>window.hacked=1</script>]]>",
    "&lt;script&gt;window.hacked=1&lt;/script&gt; &#60;img src=x onerror=window.hacked=1&#62;",
    "\u202eevil\u202c \u0000\ufffd <scr\u0000ipt>window.hacked=1</scr\u0000ipt>",
    "${window.hacked=1} {{constructor.constructor('window.hacked=1')()}} __proto__ constructor",
]

ALLOWED = {
    *("A", "BLOCKQUOTE", "BR", "BUTTON", "CODE", "DEL", "DIV", "EM", "H1", "H2", "H3", "H4", "H5", "H6", "HR", "LI"),
    *("OL", "P", "PRE", "SPAN", "STRONG", "TABLE", "TBODY", "TD", "TH", "THEAD", "TR", "UL", "DETAILS", "SUMMARY"),
    *("ARTICLE", "FORM", "PROGRESS", "TEXTAREA"),
}

# every element and attribute below the messages
LOOK = """() => [...document.querySelectorAll('#log *')].map((node) => ({
  tag: node.tagName, attributes: Object.fromEntries([...node.attributes].map(({name, value}) => [name, value])),
}))"""


def check_harmless(chat: ChatPage) -> None:
    """Check that the page shows formatted text only, and that no script has run."""
    for link in chat.find("#log a").all():
        href = link.get_attribute("href") or ""
        assert href.startswith(("https://", "http://", "mailto:")), href
    for node in chat.run(LOOK):
        assert node["tag"] in ALLOWED, node
        attributes = node["attributes"]
        assert not [name for name in attributes if name.startswith("on") or name in ("style", "src", "srcdoc")], node
        assert attributes.get("id") not in ("send", "input"), node
    assert chat.run("() => window.hacked") is None
    assert chat.page.url.startswith(chat.url)
    assert len(chat.page.frames) == 1
    assert chat.find("#input").is_visible()


def hover_over_everything(chat: ChatPage) -> None:
    """Send the events that attacks wait for to every element below the messages."""
    chat.run("""() => { for (const node of document.querySelectorAll('#log *'))
      for (const type of ['mouseover', 'focus', 'pointerenter', 'animationstart', 'error', 'load'])
        node.dispatchEvent(new Event(type)); }""")


@pytest.mark.slow
def test_in_answers_and_reasoning(open_page: OpenPage) -> None:
    text = "\n\n".join(ATTACKS)
    with answering(text, text) as server:
        chat = open_page(server.url)
        chat.ask("\n\n".join(ATTACKS))
        hover_over_everything(chat)
        check_harmless(chat)
        assert "<script>window.hacked = 1</script>" in chat.answer
        assert "<script>window.hacked = 1</script>" in (chat.find(".reasoning").text_content() or "")
        chat.page.reload()
        chat.wait_answer()
        hover_over_everything(chat)
        check_harmless(chat)


@pytest.mark.slow
def test_while_an_answer_is_unfinished(open_page: OpenPage) -> None:
    """Prefixes of the attacks are rendered while they stream."""
    with answering("\n\n".join(ATTACKS[:12]), tokens_per_s=100) as server:
        chat = open_page(server.url)
        chat.send("Go on.")
        while chat.find("#stop").is_visible() or not chat.find(".message.assistant").count():
            check_harmless(chat)
        chat.wait_answer()
        check_harmless(chat)


@pytest.mark.slow
def test_in_calls_of_tools(open_page: OpenPage) -> None:
    attack = "<img src=x onerror=window.hacked=1>"
    call = (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.look:0<|tool_call_argument_begin|>"
        f"{json.dumps({'x': attack})}<|tool_call_end|><|tool_calls_section_end|>"
    )
    with answering(call) as server:
        chat = open_page(server.url)
        chat.click("Settings")
        tools = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]
        chat.page.get_by_label("Tools (JSON").fill(json.dumps(tools))
        chat.click("Save")
        chat.send("Look.")
        chat.wait_text(attack, ".call")
        chat.page.get_by_label("Result: look").fill(attack)
        hover_over_everything(chat)
        check_harmless(chat)


@pytest.mark.slow
def test_in_titles(running: RunningServer, open_page: OpenPage) -> None:
    chat = open_page(running.url)
    chat.ask(ATTACKS[1])
    chat.wait_text(ATTACKS[1], "#conversations a")
    chat.page.fill("#title", ATTACKS[2])
    chat.page.press("#title", "Tab")
    chat.wait_text(ATTACKS[2], "#conversations a")
    assert chat.page.title().startswith(ATTACKS[2])
    assert chat.find("#conversations img, #conversations svg").count() == 0
    chat.page.fill("#search", ATTACKS[0])
    chat.wait_text(ATTACKS[0], "#conversations .hint")
    chat.page.fill("#search", "")
    chat.find("#conversations button[title=Delete]").click()
    assert ATTACKS[2] in chat.find("#dialog h2").inner_text()
    assert chat.find("#dialog svg").count() == 0
    chat.click("Cancel")
    check_harmless(chat)


def exported(messages: list[dict[str, object]], **fields: object) -> str:
    conversation = {"id": "1", "title": ATTACKS[1], "settings": {}, "leaf": "1", "messages": messages, **fields}
    return json.dumps({"format": "kimi-mlx-conversations", "version": 1, "conversations": [conversation]})


def image_message(url: str) -> dict[str, object]:
    content = [{"type": "image_url", "image_url": {"url": url}}]
    return {"id": "1", "parent": None, "role": "user", "content": content}


FILES = {
    "attacks": exported(
        [
            {"id": "0", "parent": None, "role": "user", "content": "\n".join(ATTACKS)},
            {
                "id": "1",
                "parent": "0",
                "role": "assistant",
                "content": "\n\n".join(ATTACKS),
                "reasoning": ATTACKS[0],
                "finish": "error",
                "error": {"status": 400, "message": ATTACKS[0]},
                "html": ATTACKS[0],
                "usage": {"total_tokens": ATTACKS[0]},
            },
        ],
        id=ATTACKS[1],
        model=ATTACKS[1],
        settings={"system": ATTACKS[0], "temperature": ATTACKS[0], "__proto__": {"hacked": 1}},
    ),
    "OpenAI's format": json.dumps({"title": ATTACKS[0], "messages": [{"role": "user", "content": ATTACKS[1]}]}),
}

BROKEN_FILES = {
    "no JSON": "<script>window.hacked=1</script>",
    "a foreign role": exported([{"id": "1", "parent": None, "role": "<img src=x onerror=hacked=1>", "content": "x"}]),
    "a circle": exported([{"id": "1", "parent": "1", "role": "user", "content": "x"}]),
    "an unknown parent": exported([{"id": "1", "parent": "2", "role": "user", "content": "x"}]),
    "an image of another host": exported([image_message("https://evil.example/x.png")]),
    "an SVG": exported([image_message("data:image/svg+xml,<svg/>")]),
    "numbers": "[1, 2, 3]",
    "null": "null",
    "nothing": "",
    "no list": '{"format": "kimi-mlx-conversations", "conversations": {"a": 1}}',
}


def import_file(chat: ChatPage, text: str, name: str = "file.json") -> None:
    chat.page.set_input_files("#import-file", [{"name": name, "mimeType": "application/json", "buffer": text.encode()}])


@pytest.mark.slow
@pytest.mark.parametrize("name", FILES)
def test_in_imported_files(running: RunningServer, open_page: OpenPage, name: str) -> None:
    chat = open_page(running.url)
    import_file(chat, FILES[name])
    chat.wait_text("imported", "#banner")  # and it is shown
    chat.wait_messages(1, "user")
    if name == "attacks":
        chat.wait_answer()
        chat.click("Settings")
        assert chat.page.get_by_label("Instructions").input_value() == ATTACKS[0]
        assert chat.page.get_by_label("Temperature").input_value() == ""
        chat.click("Cancel")
    hover_over_everything(chat)
    check_harmless(chat)
    assert chat.run("() => ({}).hacked") is None


@pytest.mark.slow
def test_broken_files_are_refused(running: RunningServer, open_page: OpenPage) -> None:
    chat = open_page(running.url)
    for text in BROKEN_FILES.values():
        chat.run("() => { document.querySelector('#banner').textContent = '' }")
        import_file(chat, text, "<img src=x onerror=window.hacked=1>.json")
        chat.wait_text("Cannot import this file", "#banner")
    assert chat.find("#conversations li").all_inner_texts() == ["No conversations yet"]
    check_harmless(chat)


@pytest.mark.slow
def test_in_names_of_files(running: RunningServer, open_page: OpenPage) -> None:
    chat = open_page(running.url)
    name = "<img src=x onerror=window.hacked=1>`\n.txt"
    chat.page.set_input_files("#files", [{"name": name, "mimeType": "text/plain", "buffer": b"```\n<script>\n"}])
    chat.wait_text("<img src=x", "#attachments")
    assert chat.find("#attachments img").count() == 0
    chat.ask("Look at it.")
    chat.wait_text("<img src=x", ".message.user")
    buffer = bytes(range(256))
    chat.page.set_input_files("#files", [{"name": name, "mimeType": "application/x", "buffer": buffer}])
    chat.wait_text("is not a text file", "#banner")
    assert chat.find("#banner img").count() == 0
    check_harmless(chat)
