"""Fields of Chat Completions that constrain the answer: OpenAI's, and those of vLLM, SGLang and llama.cpp."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from pydantic import Field

from kimi_mlx.errors import GrammarError
from kimi_mlx.server.errors import ApiError
from kimi_mlx.server.http.body import Body
from kimi_mlx.server.request_fields import ListOf, missing_field
from kimi_mlx.server.request_grammar import schema_error
from kimi_mlx.server.unsupported_fields import CheckedBody
from kimi_mlx.text.lark_rules import choice_rule, grammar_rule, regex_rule

Schema = Mapping[str, Any] | bool
SchemaField = dict[str, Any] | str | None
"""A JSON schema, or its JSON text."""


class JsonSchema(Body):
    """A schema that the answer must satisfy."""

    name: str | None = None
    description: str | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Body):
    """The format of the answer. `schema` next to the type is llama.cpp's form."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | None = Field(None, alias="schema")


class StructuredOutputs(Body):
    """Constraint of the answer in vLLM: one of the fields."""

    json_: SchemaField = Field(None, alias="json")
    json_object: bool | None = None
    regex: str | None = None
    choice: ListOf[str] | None = None
    grammar: str | None = None
    structural_tag: Any = Field(None, description="Not supported.")
    whitespace_pattern: str | None = Field(None, description="Not supported.")
    disable_additional_properties: bool | None = Field(None, description="Not supported.")


@dataclass(frozen=True)
class AnswerConstraint:
    """The constraint of an answer's text.

    Args:
        name: location in the body, for error messages.
        schema: JSON schema; True for any JSON object, None if there is a rule.
        rule: body of a grammar rule in llguidance's dialect of Lark, if there is no schema.
    """

    name: str
    schema: Schema | None = None
    rule: str | None = None


class ConstrainedBody(CheckedBody):
    """Fields that constrain the answer."""

    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = Field(None, description="vLLM's field.")
    guided_json: SchemaField = Field(None, description="Earlier field of vLLM.")
    guided_json_object: bool | None = None
    guided_choice: ListOf[str] | None = None
    guided_regex: str | None = None
    guided_grammar: str | None = Field(None, description="GBNF, or llguidance's dialect of Lark.")
    json_schema: SchemaField = Field(None, description="llama.cpp's field.")
    grammar: str | None = Field(None, description="GBNF, as in llama.cpp.")
    regex: str | None = Field(None, description="SGLang's field.")
    ebnf: str | None = Field(None, description="SGLang's field.")

    def answer_constraint(self) -> AnswerConstraint | None:
        """Return the constraint of the answer; None if any text is allowed.

        Raises:
            ApiError: there are several, one is not supported, or one is invalid.
        """
        try:
            constraints = list(self._constraints())
        except GrammarError as error:
            raise schema_error(error) from error
        if len(constraints) > 1:
            first, second = (constraint.name for constraint in constraints[:2])
            raise ApiError(400, f"`{first}` and `{second}` both constrain the answer: send one", param=second)
        return constraints[0] if constraints else None

    def _constraints(self) -> Iterator[AnswerConstraint]:
        if self.response_format is not None and self.response_format.type != "text":
            yield _of_response_format(self.response_format)
        if self.structured_outputs is not None:
            yield from _of_structured_outputs(self.structured_outputs)
        yield from _of_values(
            {
                "guided_json": self.guided_json,
                "guided_json_object": self.guided_json_object or None,
                "guided_choice": self.guided_choice,
                "guided_regex": self.guided_regex,
                "guided_grammar": self.guided_grammar,
                "json_schema": self.json_schema,
                "grammar": self.grammar,
                "regex": self.regex,
                "ebnf": self.ebnf,
            }
        )


def _of_response_format(response_format: ResponseFormat) -> AnswerConstraint:
    nested = response_format.json_schema
    if nested is not None and nested.schema_ is not None and response_format.type == "json_schema":
        return AnswerConstraint("response_format.json_schema.schema", nested.schema_)
    if response_format.schema_ is not None:
        return AnswerConstraint("response_format.schema", response_format.schema_)
    if response_format.type == "json_object":
        return AnswerConstraint("response_format", True)
    raise missing_field("response_format.json_schema.schema")


def _of_structured_outputs(outputs: StructuredOutputs) -> Iterator[AnswerConstraint]:
    for name in ("structural_tag", "whitespace_pattern", "disable_additional_properties"):
        if getattr(outputs, name):
            param = f"structured_outputs.{name}"
            raise ApiError(400, f"`{param}` is not supported: leave it out", "unsupported_parameter", param)
    values = {
        "json": outputs.json_,
        "json_object": outputs.json_object or None,
        "regex": outputs.regex,
        "choice": outputs.choice,
        "grammar": outputs.grammar,
    }
    yield from _of_values({f"structured_outputs.{name}": value for name, value in values.items()})


def _of_values(values: Mapping[str, Any]) -> Iterator[AnswerConstraint]:
    """Yield the constraints of fields; the last part of a name is the kind of constraint."""
    for name, value in values.items():
        if value is None or value == "":
            continue
        kind = name.rpartition(".")[2].removeprefix("guided_")
        if kind == "json_object":
            yield AnswerConstraint(name, True)
        elif kind in ("json", "json_schema"):
            yield AnswerConstraint(name, _schema(value, name))
        elif kind == "choice":
            yield AnswerConstraint(name, rule=choice_rule(value, name))
        elif kind == "regex":
            yield AnswerConstraint(name, rule=regex_rule(value))
        else:
            yield AnswerConstraint(name, rule=grammar_rule(value, name))


def _schema(value: dict[str, Any] | str, name: str) -> Mapping[str, Any]:
    """Return a schema that may be given as JSON text."""
    if isinstance(value, dict):
        return value
    try:
        schema = json.loads(value)
    except (ValueError, RecursionError) as error:
        raise ApiError(400, f"`{name}`: not JSON: {error}", "invalid_schema", name) from error
    if not isinstance(schema, dict):
        raise ApiError(400, f"`{name}`: must be the JSON text of an object", "invalid_schema", name)
    return cast("dict[str, Any]", schema)
