"""The prompt of a single answer: the option `--prompt`, files, and piped input."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from kimi_mlx.cli.chat.files.text_files import MAX_TEXT_BYTES, TextFile, decode_text, read_text_file, with_text_files
from kimi_mlx.cli.chat.options import PIPE, OutputOptions, PromptOptions
from kimi_mlx.cli.chat.standard_input import ADD_PROMPT, is_piped, require_prompt
from kimi_mlx.cli.output import print_note, slow_status
from kimi_mlx.errors import EngineError, UsageError
from kimi_mlx.units import format_bytes

if TYPE_CHECKING:
    from kimi_mlx.runtime.chat_tokenizer import ChatTokenizer

PIPE_NAME = "piped input"

READ_BYTES = 1 << 16


def read_prompt(prompts: PromptOptions, output: OutputOptions) -> str | None:
    """Return the prompt: text files, then `--prompt`, then the piped input; None for a conversation.

    Args:
        prompts: options of the prompt.
        output: options of the answer, of which some need a prompt.

    Raises:
        UsageError: there is no prompt, or it is empty, or the piped input is not text or too large.
    """
    require_prompt(prompts.prompt)
    piped = _read_pipe(is_quiet=output.quiet)
    text = _join(prompts, piped, is_quiet=output.quiet or output.json)
    if text is None:
        if output.need_prompt:
            raise UsageError(f"{' and '.join(output.need_prompt)} need a prompt", hint=ADD_PROMPT)
        return None
    files = [piped if path == Path(PIPE) else read_text_file(path) for path in prompts.text_files]
    return with_text_files(text, [file for file in files if file is not None])


def check_prompt_size(texts: Iterable[str], tokenizer: ChatTokenizer, context: int) -> None:
    """Check that the texts of a prompt fit the context of the model, before the model is loaded.

    The markers of the messages are not counted: a prompt that exceeds the context only by them is refused later.

    Args:
        texts: prompt and system prompt.
        tokenizer: tokenizer of the model.
        context: number of tokens.

    Raises:
        EngineError: they do not fit.
    """
    from kimi_mlx.text.tokenizer import MAX_ENCODE_CHARS

    num_tokens, is_whole = 0, True
    for text in texts:
        for at in range(0, len(text), MAX_ENCODE_CHARS):
            if num_tokens > context:  # all of it could take long
                is_whole = False
                break
            num_tokens += len(tokenizer.encode(text[at : at + MAX_ENCODE_CHARS]))
    if num_tokens > context:
        count = f"{'' if is_whole else 'more than '}{num_tokens}"
        raise EngineError(f"the prompt has {count} tokens, but the context holds {context}", hint="shorten the prompt")


def _join(prompts: PromptOptions, piped: TextFile | None, *, is_quiet: bool) -> str | None:
    """Return the text of `--prompt` and of the piped input, if that is not attached as a file; None without both."""
    text = prompts.prompt
    if piped is None and PIPE in (text, *(prompts.file or ())):
        option = "-p -" if text == PIPE else "-f -"
        raise UsageError(f"`{option}` reads piped input, but nothing is piped", hint='use `kimi-mlx chat -p "Hello"`')
    if piped is not None and not piped.text.strip() and text not in (None, PIPE) and not is_quiet:
        print_note("the piped input is empty")
    if prompts.takes_pipe_as_file:
        if text is None:
            raise UsageError("`-f -` attaches the piped input to a prompt, and there is none", hint=ADD_PROMPT)
    elif piped is not None and (text in (None, PIPE)):
        text = piped.text
    elif piped is not None and piped.text.strip():
        text = f"{text}\n\n{piped.text}"
    if text is not None and not text.strip():
        raise UsageError("the prompt is empty", hint='use `kimi-mlx chat -p "Hello"`, or no -p for a conversation')
    return text


def _read_pipe(*, is_quiet: bool) -> TextFile | None:
    """Return piped or redirected standard input; None if there is neither.

    Raises:
        UsageError: it is not text, or larger than any context.
    """
    if not is_piped():
        return None
    data = bytearray()
    with slow_status(is_quiet) as set_status:
        set_status(f"waiting for the {PIPE_NAME}")
        while part := os.read(sys.stdin.fileno(), READ_BYTES):
            data += part
            set_status(f"reading the {PIPE_NAME}: {format_bytes(len(data))}")
            if len(data) > MAX_TEXT_BYTES:
                size = format_bytes(MAX_TEXT_BYTES)
                raise UsageError(f"the {PIPE_NAME} is larger than the limit of {size}", hint="pipe a part of it")
    try:
        return decode_text(bytes(data), PIPE_NAME)
    except ValueError as error:
        raise UsageError(f"the {PIPE_NAME} is not text: {error}", hint="give an image by name: `-f FILE`") from None
