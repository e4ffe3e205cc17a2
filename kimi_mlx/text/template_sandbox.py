"""jinja2's sandbox with limits on time and memory, because a chat template may be malicious.

Limits on loop steps alone do not help: `{% set s = s ~ s %}` written 40 times makes a terabyte. So every operation that
can repeat work or enlarge a value is counted: loops, calls, filters, tests, comparisons, operators, slices, literals
and output. The size of a result is checked before the operation runs. Everything else that jinja2 offers (other
filters, other string methods, includes) is not available.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, cast

import jinja2
from jinja2 import meta, nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

from kimi_mlx.text import template_operations as operations
from kimi_mlx.text.template_budget import (
    CONTAINERS,
    Budget,
    TemplateLimitError,
    budget,
    budget_of_run,
    check_chars,
    count_steps,
)

MAX_SOURCE_CHARS = 100_000
"""Limit of a template's text. Published templates have up to 30,000 characters."""
TEXT_METHODS = (
    "capitalize casefold count endswith find index isalnum isalpha isascii isdecimal isdigit isidentifier islower"
    " isnumeric isprintable isspace istitle isupper join lower lstrip partition removeprefix removesuffix replace"
    " rfind rindex rpartition rsplit rstrip split splitlines startswith strip swapcase title upper"
)
SAFE_METHODS: Mapping[type, frozenset[str]] = {
    str: frozenset(TEXT_METHODS.split()),
    dict: frozenset(["get", "items", "keys", "values"]),
    list: frozenset(["count", "index"]),
    tuple: frozenset(["count", "index"]),
}
"""Methods that a template may use. Results are at most as large as the inputs, or `check_method` checks them."""


class BoundedEnvironment(ImmutableSandboxedEnvironment):
    """jinja2's sandbox with limits, and with the functions and settings that published chat templates need."""

    intercepted_binops = frozenset(["+", "*", "**", "%"])
    filters: dict[str, Any]
    tests: dict[str, Any]

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=["jinja2.ext.loopcontrols"],
            optimized=False,  # the optimizer computes constants while it compiles, without a budget
            finalize=operations.output_text,
        )
        self.filters = operations.bounded_filters(self.filters)
        self.tests = operations.bounded_tests(self.tests)
        self.globals = dict(operations.FUNCTIONS)

    def compile_template(self, source: str) -> jinja2.Template:
        """Return the compiled template.

        Raises:
            jinja2.TemplateSyntaxError: the source is no template, is nested too deeply or is too long.
        """
        if len(source) > MAX_SOURCE_CHARS:
            message = f"the template has {len(source)} characters, more than {MAX_SOURCE_CHARS}"
            raise jinja2.TemplateSyntaxError(message, 1)
        try:
            return self.from_string(source)
        except (RecursionError, SyntaxError, MemoryError, ValueError, OverflowError) as error:
            raise jinja2.TemplateSyntaxError(f"the template cannot be compiled: {error}", 1) from error

    def texts_of(self, source: str) -> list[str]:
        """Return the texts that a template can write: what is outside of tags, and its string constants."""
        text_nodes = self.parse(source).find_all((nodes.TemplateData, nodes.Const))
        values = [node.data if isinstance(node, nodes.TemplateData) else node.value for node in text_nodes]
        return [value for value in values if isinstance(value, str)]

    def variables_of(self, source: str) -> set[str]:
        """Return the names of the variables that a template reads and does not set itself."""
        return meta.find_undeclared_variables(self.parse(source))

    def render(self, template: jinja2.Template, variables: Mapping[str, Any]) -> str:
        """Run a template of `compile_template` within the limits.

        Raises:
            Exception: whatever the template raises; `TemplateLimitError` for a limit.
        """
        token = budget_of_run.set(Budget())
        try:
            return template.render(variables)
        finally:
            budget_of_run.reset(token)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _InsertChecks().visit(super()._parse(source, name, filename))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Return whether a template may read an attribute: of built-in types, only `SAFE_METHODS`."""
        if isinstance(obj, (str, bytes, int, float, *CONTAINERS)):
            return any(isinstance(obj, kind) and attr in names for kind, names in SAFE_METHODS.items())
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """Return None, so that `str.format` is not available."""

    def call(self, context: jinja2.runtime.Context, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function for a template."""
        owner = getattr(function, "__self__", None)
        if owner is self:  # a check that `_InsertChecks` wrote; in a loop, jinja2 adds keyword arguments of its own
            return function(*args)
        limits = budget()
        limits.step()
        if isinstance(owner, str):
            args = tuple(map(_as_list, args))
            operations.check_method(limits, owner, function.__name__, args, kwargs)
        return limits.charge(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        """Compute an operator whose result could be large."""
        limits = budget()
        limits.step()
        if operator == "**":
            raise TemplateLimitError("`**` makes a value that is too large")
        if operator == "%" and isinstance(left, str):
            return limits.charge(operations.format_percent(limits, left, right))
        if operator == "*":
            operations.check_product(limits, left, right)
        elif operator == "+":
            check_chars(operations.length_of(left) + operations.length_of(right))
        return limits.charge(super().call_binop(context, operator, left, right))

    # The names below are called by compiled templates; see `_InsertChecks`.

    concat = staticmethod(operations.concat)
    """Join the output of a template, a macro or a block."""

    def join_values(self, *values: Any) -> str:
        """Compute the operator `~`."""
        return self.concat(map(operations.as_text, values))

    def count_steps(self, values: Iterable[Any]) -> Iterator[Any]:
        """Count the steps of a loop."""
        return count_steps(values)

    def charge(self, value: Any) -> Any:
        """Count a literal or a slice."""
        limits = budget()
        limits.step()
        return limits.charge(value)

    def check_operand(self, value: Any) -> Any:
        """Check an operand of a comparison."""
        limits = budget()
        limits.step()
        limits.size(value)
        return value


class _InsertChecks(NodeTransformer):
    """Makes loops, `~`, literals, slices and comparisons of a template call the checks of `BoundedEnvironment`."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _call("count_steps", node.iter)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("join_values", *node.nodes)

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return _call("charge", node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return _call("charge", node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _call("charge", node) if node.ctx == "load" else node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _call("charge", node) if isinstance(node.arg, nodes.Slice) else node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _call("check_operand", node.expr)
        for operand in node.ops:
            operand.expr = _call("check_operand", operand.expr)
        return node


def _as_list(value: Any) -> Any:
    """Return the entries of an iterator, for `join` of strings; other values unchanged."""
    return list(cast("Iterator[Any]", value)) if isinstance(value, Iterator) else value


def _call(name: str, *args: nodes.Node) -> nodes.Call:
    """Return the node of a call of a method of the environment."""
    node = nodes.Call(nodes.EnvironmentAttribute(name), cast("list[nodes.Expr]", list(args)), [], None, None)
    return cast("nodes.Call", node.set_lineno(args[0].lineno if args else 1))
