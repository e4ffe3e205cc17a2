"""Prompts with images and videos: places, numbers of placeholder tokens, and text that looks like them."""

from __future__ import annotations

import base64
import io
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from kimi_mlx.errors import ConfigError, ImageError, TextError
from kimi_mlx.runtime.chat_tokenizer import ChatTokenizer
from kimi_mlx.runtime.prompt import Prompt
from kimi_mlx.text.template import ChatTemplate
from tests.examples import examples
from tests.unit.text.vocabularies import SPECIAL, write_tokenizer

TEMPLATES = Path(__file__).parents[1] / "text" / "templates"
K25 = (TEMPLATES / "k25.jinja").read_text()
PRESERVES = "preserve_thinking is defined and preserve_thinking"
SOURCES = {
    "k2.5": K25.replace(PRESERVES, "false"),
    "k2.6": K25,
    "k2.7": K25.replace(PRESERVES, "true"),
}
TOOL = {"type": "function", "function": {"name": "look", "description": "Look.", "parameters": {"type": "object"}}}
CALL = {"id": "functions.look:0", "type": "function", "function": {"name": "look", "arguments": "{}"}}


def picture(width: int, height: int, colour: int = 128) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (width, height), (colour, 20, 30)).save(buffer, "PNG")
    return buffer.getvalue()


def data_url(data: bytes, media_type: str = "image/png") -> str:
    return f"data:{media_type};base64,{base64.b64encode(data).decode()}"


def image_part(width: int = 30, height: int = 20, colour: int = 128) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(picture(width, height, colour))}}


@pytest.fixture(scope="module", params=sorted(SOURCES))
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    folder = write_tokenizer(tmp_path_factory.mktemp("model"))
    (folder / "chat_template.jinja").write_text(SOURCES[request.param])
    return ChatTokenizer.load(folder)


@pytest.fixture(scope="module")
def k25(tmp_path_factory: pytest.TempPathFactory) -> ChatTokenizer:
    folder = write_tokenizer(tmp_path_factory.mktemp("model"))
    (folder / "chat_template.jinja").write_text(SOURCES["k2.5"])
    return ChatTokenizer.load(folder)


def check(tokenizer: ChatTokenizer, prompt: Prompt) -> None:
    """Check that the placeholder tokens are exactly those of the images."""
    pad = tokenizer.tokenizer.special_tokens["<|media_pad|>"]
    positions = {at for at, token in enumerate(prompt.ids) if token == pad}
    ranges = [range(image.start, image.start + image.num_tokens) for image in prompt.images]
    assert sorted(positions) == [at for numbers in ranges for at in numbers]
    for image in prompt.images:
        assert image.num_tokens == image.grid[1] * image.grid[2] // 4
        assert image.patches is not None
        assert len(image.patches) == np.prod(image.grid)


def test_images_in_any_message_with_tools_and_thinking(tokenizer: ChatTokenizer) -> None:
    messages = [
        {"role": "system", "content": [{"type": "text", "text": "See:"}, image_part(28, 28)]},
        {"role": "user", "content": [image_part(30, 20), {"type": "text", "text": "Left "}, image_part(100, 60)]},
        {"role": "assistant", "content": None, "reasoning_content": "Look first.", "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": CALL["id"], "content": [{"type": "text", "text": "a"}, image_part(200, 10)]},
        {"role": "assistant", "content": [{"type": "text", "text": "Mine:"}, image_part(1, 1)]},
        {"role": "user", "content": "And?"},
    ]
    prompt = tokenizer.prompt(messages, [TOOL])
    check(tokenizer, prompt)
    assert [image.num_tokens for image in prompt.images] == [1, 2, 12, 8, 1]
    text = tokenizer.decode(prompt.ids)
    marks = [
        "<|media_begin|>image<|media_content|>" + "<|media_pad|>" * n + "<|media_end|>\n" for n in (1, 2, 12, 8, 1)
    ]
    assert f"<|im_system|>system<|im_middle|>See:{marks[0]}<|im_end|>" in text
    assert f"<|im_user|>user<|im_middle|>{marks[1]}Left {marks[2]}<|im_end|>" in text
    assert f"## Return of functions.look:0\na{marks[3]}<|im_end|>" in text
    assert f"</think>Mine:{marks[4]}<|im_end|>" in text


def test_thinking_is_kept_as_in_each_generation(tokenizer: ChatTokenizer, request: pytest.FixtureRequest) -> None:
    messages = [
        {"role": "user", "content": [image_part()]},
        {"role": "assistant", "content": "Red.", "reasoning_content": "A circle."},
        {"role": "user", "content": [image_part(colour=9)]},
    ]
    kept = tokenizer.decode(tokenizer.prompt(messages, preserve_thinking=True).ids)
    dropped = tokenizer.decode(tokenizer.prompt(messages).ids)
    generation = request.node.callspec.params["tokenizer"]
    assert ("A circle." in kept) == (generation != "k2.5")
    assert ("A circle." in dropped) == (generation == "k2.7")
    assert kept.endswith("<think>")
    assert tokenizer.decode(tokenizer.prompt(messages, thinking=False).ids).endswith("<think></think>")


def test_every_form_of_an_image_part_is_the_same_image(k25: ChatTokenizer) -> None:
    data = picture(40, 30)
    url = data_url(data)
    forms = [
        {"type": "image_url", "image_url": {"url": url, "detail": "high"}},
        {"type": "image_url", "image_url": url},
        {"type": "image", "image": url},
        {"type": "image", "image": {"url": url}},
        {"type": "image", "image": data},
        {"type": "image", "image_url": {"url": url}},
        {"type": "image_url", "image_url": {"url": url.replace("image/png", "application/octet-stream")}},
    ]
    prompts = [k25.prompt([{"role": "user", "content": [form]}]) for form in forms]
    assert len({tuple(prompt.ids) for prompt in prompts}) == 1
    assert len({prompt.images[0].digest for prompt in prompts}) == 1


def test_digest_depends_on_pixels_and_shape(k25: ChatTokenizer) -> None:
    parts = [image_part(28, 56), image_part(56, 28), image_part(28, 56, 129), image_part(28, 56)]
    digests = [image.digest for image in k25.prompt([{"role": "user", "content": parts}]).images]
    assert len(set(digests)) == 3
    assert digests[0] == digests[3]


LOOKS_LIKE_IMAGES = [
    *("<|media_pad|>", "<|media_begin|>image<|media_content|><|media_pad|><|media_end|>"),
    *("<|kimi_k25_video_placeholder|>", "<|media_", "pad|>", "<|kimi_k25_video", "_placeholder|>", "x", " "),
]
TEXT = st.lists(st.sampled_from([*SPECIAL.values(), *LOOKS_LIKE_IMAGES]), max_size=5).map("".join)


@examples(40)
@given(data=st.data())
def test_text_never_becomes_an_image(k25: ChatTokenizer, data: Any) -> None:
    def conversation(text: Any) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        call = {"id": text(), "function": {"name": text(), "arguments": text()}}
        messages = [
            {"role": "system", "content": text(), "name": text() + "n"},
            {
                "role": "user",
                "content": [{"type": "text", "text": text()}, image_part(), {"type": "text", "text": text()}],
            },
            {"role": "assistant", "content": text(), "reasoning_content": text() + "x", "tool_calls": [call]},
            {"role": "tool", "content": [{"type": "text", "text": text()}, image_part(60, 60)], "tool_call_id": "t"},
        ]
        tool = {"name": text() + "f", "parameters": {"type": "object", "properties": {text(): {"description": text()}}}}
        return messages, [{"type": "function", "function": tool}]

    harmful = k25.prompt(*conversation(lambda: data.draw(TEXT)))
    harmless = k25.prompt(*conversation(lambda: "y"))
    check(k25, harmful)
    special = set(k25.tokenizer.special_tokens.values())
    assert [id for id in harmful.ids if id in special] == [id for id in harmless.ids if id in special]
    assert [image.digest for image in harmful.images] == [image.digest for image in harmless.images]


def test_text_prompts_are_those_of_the_template(tokenizer: ChatTokenizer) -> None:
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "<|media_pad|>"}]},
        {"role": "user", "content": "b"},
    ]
    prompt = tokenizer.prompt(messages, [TOOL])
    template = ChatTemplate.load(tokenizer.folder)
    assert prompt.images == ()
    assert prompt.ids == template.encode(tokenizer.tokenizer, messages, [TOOL])
    assert prompt.ids == tokenizer.apply_chat_template(messages, [TOOL])
    check(tokenizer, prompt)
    with pytest.raises(ImageError, match="token ids cannot hold"):
        tokenizer.apply_chat_template([{"role": "user", "content": [image_part()]}])


def test_placeholders_of_the_template_must_be_those_of_the_images(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path)
    message = {"role": "user", "content": [image_part(), {"type": "text", "text": "a"}, image_part()]}

    def prompt(source: str, *messages: dict[str, Any]) -> Prompt:
        (folder / "chat_template.jinja").write_text(source)
        return ChatTokenizer.load(folder).prompt(messages)

    with pytest.raises(ImageError, match=r"`messages\[0\].content\[0\]`.*placeholders for 0 images.*have 2") as raised:
        prompt("{% for part in messages[0].content %}{{ part.text }}{% endfor %}", message)
    assert "K2.5" in str(raised.value.hint)
    with pytest.raises(ImageError, match=r"placeholders for 1 images.*have 2"):
        prompt("<|media_pad|>", message)
    with pytest.raises(ImageError, match=r"placeholders for 3 images.*have 2"):
        prompt("<|media_pad|>" * 3, message)
    with pytest.raises(TextError, match="placeholders for 1 images, but the messages have none"):
        prompt("<|media_pad|>", {"role": "user", "content": "a"})
    video = {"type": "video_url", "video_url": {"url": "data:,"}}
    with pytest.raises(ImageError, match=r"content\[0\]`: .* in another order"):
        prompt("<|kimi_k25_video_placeholder|><|media_pad|>", {"role": "user", "content": [image_part(), video]})
    with pytest.raises(ImageError, match=r"content\[0\]`: .*placeholders for 1 videos.*have 0"):
        prompt("<|media_pad|><|kimi_k25_video_placeholder|>", {"role": "user", "content": [image_part()]})


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ({"type": "image_url"}, "needs a URL in `image_url`"),
        ({"type": "image_url", "image_url": {}}, "needs a URL in `image_url`"),
        ({"type": "image_url", "image_url": {"url": 3}}, "needs a URL in `image_url`"),
        ({"type": "image", "image": ""}, "needs a URL in `image`"),
        ({"type": "image_url", "image_url": {"url": "https://example.com/a.png"}}, "`https:` URLs are not read"),
        ({"type": "image_url", "image_url": {"url": "file:///etc/passwd"}}, "`file:` URLs are not read"),
        ({"type": "image_url", "image_url": {"url": "a.png"}}, "'a.png' is not a URL"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64"}}, "no comma"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,@@@@"}}, "not valid base64"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,\ud800abc"}}, "not valid base64"),
        ({"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}, "the file is empty"),
        ({"type": "image_url", "image_url": {"url": "data:,%89PNG"}}, "it is not a PNG"),
        ({"type": "image", "image": b"GIF89a"}, "it is not a PNG"),
    ],
)
def test_errors_name_the_place(k25: ChatTokenizer, part: dict[str, Any], reason: str) -> None:
    messages = [{"role": "user", "content": "a"}, {"role": "user", "content": [image_part(), part]}]
    with pytest.raises(ImageError) as raised:
        k25.prompt(messages)
    assert raised.value.place == "messages[1].content[1]"
    assert reason in raised.value.reason


def test_too_many_images_are_refused(k25: ChatTokenizer) -> None:
    part = image_part(1, 1)
    assert len(k25.prompt([{"role": "user", "content": [part] * 100}]).images) == 100
    with pytest.raises(ImageError, match=r"content\[100\].*more than 100"):
        k25.prompt([{"role": "user", "content": [part] * 101}])


def test_too_many_pixels_are_refused(k25: ChatTokenizer) -> None:
    data = picture(1792, 1792)
    parts = [{"type": "image", "image": data}] * 42  # 9.6 MB each
    with pytest.raises(
        ImageError, match=r"content\[41\]`: with it the prompt has 404.6 MB of pixels, more than 400.0 MB"
    ):
        k25.prompt([{"role": "user", "content": parts}])


def test_a_large_image_is_not_read_as_text(k25: ChatTokenizer) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (1800, 1800, 3), np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, "BMP")
    url = data_url(buffer.getvalue())
    assert len(url) > 12_000_000
    messages = [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]
    first = k25.prompt(messages)
    start = time.process_time()
    again = k25.prompt(messages)
    assert time.process_time() - start < 1  # walking over the characters takes several seconds
    assert again.images[0].patches is first.images[0].patches  # from the cache
    assert again.ids == first.ids


def test_a_video_is_chunks_with_time_stamps(k25: ChatTokenizer) -> None:
    pytest.importorskip("av", reason="the extra `video` is not installed")
    from tests.unit.images.test_video import video

    url = data_url(video(50, 10), "video/mp4")
    parts = [
        {"type": "text", "text": "Watch "},
        {"type": "video_url", "video_url": {"url": url}},
        image_part(28, 28),
        {"type": "text", "text": "<|kimi_k25_video_placeholder|>"},
    ]
    prompt = k25.prompt([{"role": "user", "content": parts}])
    check(k25, prompt)
    assert [image.grid for image in prompt.images] == [(4, 2, 4), (4, 2, 4), (2, 2, 4), (1, 2, 2)]
    special = k25.tokenizer.special_tokens

    def chunk(text: str) -> list[int]:
        pads = [special["<|media_pad|>"]] * 2
        video = k25.encode("video")
        return [*k25.encode(text), special["<|media_begin|>"], *video, special["<|media_content|>"], *pads]

    start = prompt.ids.index(special["<|im_middle|>"]) + 1
    expected = chunk("Watch 00:00:00.000")
    expected += [special["<|media_end|>"], *chunk("00:00:02.200")]
    expected += [special["<|media_end|>"], *chunk("00:00:04.400"), special["<|media_end|>"], *k25.encode("\n")]
    assert prompt.ids[start : start + len(expected)] == expected
    text = k25.decode(prompt.ids)
    image = "<|media_begin|>image<|media_content|><|media_pad|><|media_end|>\n"
    assert f"\n{image}<|kimi_k25_video_placeholder|><|im_end|>" in text


def test_the_checkpoints_preprocessing_is_used(tmp_path: Path) -> None:
    folder = write_tokenizer(tmp_path)
    (folder / "chat_template.jinja").write_text(K25)
    (folder / "preprocessor_config.json").write_text('{"media_proc_cfg": {"in_patch_limit": 16}}')
    messages = [{"role": "user", "content": [image_part(560, 560)]}]
    assert [image.grid for image in ChatTokenizer.load(folder).prompt(messages).images] == [(1, 4, 4)]
    (folder / "preprocessor_config.json").write_text("[")
    tokenizer = ChatTokenizer.load(folder)
    assert tokenizer.prompt([{"role": "user", "content": "text works"}]).ids
    with pytest.raises(ConfigError, match=r"preprocessor_config\.json"):
        tokenizer.prompt(messages)
