"""Check a model's tokenizer and chat template for the doctor."""

from __future__ import annotations

from kimi_mlx.cluster.hosts.findings import Finding
from kimi_mlx.errors import TextError
from kimi_mlx.store.locate import config_folder
from kimi_mlx.store.model_ref import resolve_model_name
from kimi_mlx.text.template import check_text_files


def text_findings(name: str, host: str) -> tuple[Finding, ...]:
    """Return the finding about a model's tokenizer and chat template; none if its files are not on this machine.

    Args:
        name: alias, folder or repository of the model.
        host: name of this machine in the report.
    """
    folder = config_folder(resolve_model_name(name))
    if folder is None:
        return ()
    try:
        check_text_files(folder)
    except TextError as error:
        return (Finding(host, "text", "problem", error.message, error.hint),)
    return (Finding(host, "text", "ok", "the tokenizer has the special tokens of the chat template"),)
