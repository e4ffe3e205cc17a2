"""The document of GET /v1/cluster: the served model, its ranks, the queue, and answers in progress."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any

from pydantic import TypeAdapter

from kimi_mlx.images.preprocessing import Preprocessing
from kimi_mlx.server.activity import RunningAnswer, TokenRates
from kimi_mlx.server.health import health_problem
from kimi_mlx.server.model_info import ModelInfo
from kimi_mlx.server.service import Service
from kimi_mlx.session.model_status import ModelDeployment, ModelStatus, model_status
from kimi_mlx.session.session import DraftStatus


@dataclass(frozen=True)
class ClusterStatus(ModelStatus):
    """Status of the server and its model.

    Args:
        names: names of the model in requests, beginning with that of ModelStatus.model.
        media: kinds of media that requests may have besides text.
        preprocessing: settings of the image preprocessing, by name in `media_proc_cfg`; empty if the model does not see
            images.
        sampling: sampling parameters, by name, of requests that set none; `max_tokens` if the model has a limit of its
            own.
        instant_sampling: sampling parameters that differ when thinking is off.
        queue_capacity: maximum number of answers that wait; further ones are refused.
        batch_sizes: number of steps by the number of their sequences: `1`, `2`, `3-4` and so on.
        drafts: use of drafts since the start; None if they are not enabled.
        answers: answers in progress and in the queue, the oldest first.
        rates: token rates of the last minutes.
        prompt_tokens: number of prompt tokens of all finished answers.
        reused_tokens: number of these that were in the prompt cache.
    """

    names: Sequence[str] = ()
    media: Sequence[str] = ()
    preprocessing: Mapping[str, float | int] = field(default_factory=dict[str, "float | int"])
    sampling: Mapping[str, float | int] = field(default_factory=dict[str, "float | int"])
    instant_sampling: Mapping[str, float] = field(default_factory=dict[str, float])
    queue_capacity: int = 0
    batch_sizes: Mapping[str, int] = field(default_factory=dict[str, int])
    drafts: DraftStatus | None = None
    answers: Sequence[RunningAnswer] = ()
    rates: TokenRates = field(default_factory=TokenRates)
    prompt_tokens: int = 0
    reused_tokens: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Return the document, without the address of the server, which the client knows."""
        document = super().to_dict()
        del document["url"]
        return document


def cluster_status(service: Service, model_info: ModelInfo, deployment: ModelDeployment) -> ClusterStatus:
    """Return the status of a server.

    Args:
        service: service that answers requests.
        model_info: names and properties of the model.
        deployment: the model and its hosts.
    """
    status = model_status(deployment, service.session)
    tokenizer = service.prompt_builder.tokenizer
    prompt_tokens, reused_tokens = service.metrics.prompt_totals
    session_status = service.status()
    reason = health_problem(service, session_status)
    values: dict[str, Any] = {item.name: getattr(status, item.name) for item in fields(status)}
    return replace(
        ClusterStatus(**values),
        model=model_info.name,
        context_tokens=model_info.context_tokens,
        is_up=reason is None,
        reason=reason,
        active=service.running,
        waiting=service.waiting,
        names=model_info.names,
        media=model_info.media,
        preprocessing=asdict(Preprocessing.load(tokenizer.folder)) if model_info.media else {},
        sampling=_without_none({**asdict(tokenizer.sampling), "max_tokens": tokenizer.max_tokens}),
        instant_sampling=service.prompt_builder.instant_sampling,
        queue_capacity=service.queue_capacity,
        batch_sizes=session_status.batch_sizes.to_dict(),
        drafts=session_status.drafts,
        answers=service.running_answers(),
        rates=service.rates.rates(),
        prompt_tokens=prompt_tokens,
        reused_tokens=reused_tokens,
    )


def _without_none(values: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in values.items() if value is not None}


def cluster_schema(ref_template: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the JSON schema of the document, and the schemas that it refers to.

    Args:
        ref_template: form of the references, such as `#/components/schemas/{model}`.
    """
    schema = TypeAdapter(ClusterStatus).json_schema(ref_template=ref_template, mode="serialization")
    definitions = schema.pop("$defs", {})
    del schema["properties"]["url"]
    for item in (schema, *definitions.values()):
        item["required"] = list(item["properties"])  # the document has all of its fields
    return schema, definitions
