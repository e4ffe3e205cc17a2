"""jinja2's sandbox with limits on time and memory, because a chat template may be made to harm.

Limits on loop steps alone do not help: `{% set s = s ~ s %}` written 40 times makes a terabyte. So every operation that
can repeat work or enlarge a value is counted: loops, calls, filters, tests, comparisons, operators, slices, literals
and output. The size of a result is checked before the operation runs. Everything else that jinja2 offers (other
filters, other string methods, includes) is not available.
"""

from __future__ import annotations

import functools
import itertools
import json
import re
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextvars import ContextVar
from datetime import datetime
from typing import Any, cast

import jinja2
from jinja2 import nodes
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.visitor import NodeTransformer

MAX_SOURCE_CHARS = 100_000
"""Limit of a template's text. Published templates have up to 30,000 characters."""
MAX_STEPS = 1_000_000
"""Limit of loop steps, calls, filters and other operations in one run."""
MAX_CPU_S = 1.5
"""Limit of processor time in one run."""
MAX_CHARS = 32_000_000
"""Limit of one text; also of the texts in one list or object together, where each entry counts as `ENTRY_CHARS`."""
ENTRY_CHARS = 32
MAX_BYTES = 512 * 2**20
"""Limit of all values that one run makes, including those that it no longer uses."""
MAX_SPLIT_CHARS = 4_000_000
"""Limit of a text that is cut into words or lines, because each part is an object of its own."""
MAX_INTEGER_BITS = 10_000
MAX_WIDTH = 1_000
"""Limit of widths, indents and precisions."""

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
"""Methods that a template may use. Results are at most as large as the inputs, or `_predict_method` checks them."""

ITERATING = "batch groupby join list map max min reject rejectattr select selectattr slice sort unique"
ITERATING_FILTERS = frozenset(ITERATING.split())
"""Filters that visit every entry of their input."""
OTHER_FILTERS = (
    "abs attr capitalize count d default dictsort e escape first float forceescape format indent int items last length"
    " lower replace reverse round safe string title trim truncate upper"
)
SAFE_FILTERS = (*ITERATING_FILTERS, *OTHER_FILTERS.split())
"""Filters that a template may use, beside `tojson`."""

CONTAINERS = (list, tuple, dict, set, frozenset)


class TemplateLimitError(Exception):
    """A template exceeds a limit of this module."""


class Budget:
    """What one run of a template may still use."""

    def __init__(self) -> None:
        self._steps = MAX_STEPS
        self._bytes = MAX_BYTES
        self._deadline = time.thread_time() + MAX_CPU_S
        # A container stays referenced, so that its id is not used for another one.
        self._sizes: dict[int, tuple[Any, int]] = {}

    def step(self, count: int = 1) -> None:
        """Count operations.

        Raises:
            TemplateLimitError: too many operations, or too much time.
        """
        self._steps -= count
        if self._steps < 0:
            raise TemplateLimitError(f"loops take more than {MAX_STEPS} steps")
        if time.thread_time() > self._deadline:
            raise TemplateLimitError(f"the template takes more than {MAX_CPU_S} s")

    def size(self, value: Any) -> int:
        """Return the characters of a text, or of all texts in a container, with `ENTRY_CHARS` for each entry.

        Raises:
            TemplateLimitError: the value has more than `MAX_CHARS`.
        """
        if isinstance(value, str):
            return require(len(value))
        if not _is_container(value):
            return ENTRY_CHARS
        if (known := self._sizes.get(id(value))) is not None:
            return known[1]
        container = cast("Any", value)
        entries: Iterable[Any] = itertools.chain(*container.items()) if type(container) is dict else container
        total = ENTRY_CHARS
        for entry in entries:
            total = require(total + ENTRY_CHARS + self.size(entry))
        self._sizes[id(container)] = (container, total)
        return total

    def made(self, value: Any) -> Any:
        """Count a new value and return it.

        Raises:
            TemplateLimitError: the value is too large, or all values together are.
        """
        self.size(value)
        if isinstance(value, str):
            self._bytes -= sys.getsizeof(value)
        elif _is_container(value):
            self._bytes -= 64 * len(value)
        if self._bytes < 0:
            raise TemplateLimitError(f"the template makes values of more than {MAX_BYTES} bytes: too large")
        return value


_budget: ContextVar[Budget] = ContextVar("budget")


def require(num_chars: int) -> int:
    """Return the number of characters.

    Raises:
        TemplateLimitError: there are more than `MAX_CHARS`.
    """
    if num_chars > MAX_CHARS:
        raise TemplateLimitError(f"a value of more than {MAX_CHARS} characters is too large")
    return num_chars


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
            finalize=_to_text,
        )
        self.filters = {name: _bounded_filter(name, self.filters[name]) for name in SAFE_FILTERS}
        self.filters["tojson"] = _bounded_filter("tojson", _to_json)
        self.tests = {name: _bounded_test(test) for name, test in self.tests.items()}
        self.globals = {"raise_exception": _raise_exception, "strftime_now": _strftime_now, "range": _range}
        self.globals |= {"namespace": _Namespace, "dict": dict}

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
        found = self.parse(source).find_all((nodes.TemplateData, nodes.Const))
        values = [node.data if isinstance(node, nodes.TemplateData) else node.value for node in found]
        return [value for value in values if isinstance(value, str)]

    def render(self, template: jinja2.Template, variables: Mapping[str, Any]) -> str:
        """Run a template of `compile_template` within the limits.

        Raises:
            Exception: whatever the template raises; `TemplateLimitError` for a limit.
        """
        token = _budget.set(Budget())
        try:
            return template.render(variables)
        finally:
            _budget.reset(token)

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        return _InsertChecks().visit(super()._parse(source, name, filename))

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Return whether a template may read an attribute: of built-in types, only `SAFE_METHODS`."""
        if isinstance(obj, (str, bytes, int, float, *CONTAINERS)):
            return any(isinstance(obj, kind) and attr in names for kind, names in SAFE_METHODS.items())
        return super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> None:
        """Offer no `str.format`."""

    def call(self, context: jinja2.runtime.Context, function: Any, *args: Any, **kwargs: Any) -> Any:
        """Call a function for a template."""
        owner = getattr(function, "__self__", None)
        if owner is self:  # a check that `_InsertChecks` wrote; in a loop, jinja2 adds keyword arguments of its own
            return function(*args)
        budget = _budget.get()
        budget.step()
        if isinstance(owner, str):
            _predict_method(budget, owner, function.__name__, args, kwargs)
        return budget.made(super().call(context, function, *args, **kwargs))

    def call_binop(self, context: jinja2.runtime.Context, operator: str, left: Any, right: Any) -> Any:
        """Compute an operator whose result could be large."""
        budget = _budget.get()
        budget.step()
        if operator == "**":
            raise TemplateLimitError("`**` makes a value that is too large")
        if operator == "%" and isinstance(left, str):
            return budget.made(_format_percent(budget, left, right))
        if operator == "*":
            _predict_product(budget, left, right)
        elif operator == "+":
            require(_length(left) + _length(right))
        return budget.made(super().call_binop(context, operator, left, right))

    # The names below are called by compiled templates; see `_InsertChecks`.

    @staticmethod
    def concat(parts: Iterable[str]) -> str:
        """Join the output of a template, a macro or a block."""
        budget = _budget.get()
        total = 0
        kept: list[str] = []
        for part in parts:
            total = require(total + len(part))
            kept.append(part)
            budget.step()
        return budget.made("".join(kept))

    def join_values(self, *values: Any) -> str:
        """Compute the operator `~`."""
        return self.concat(map(_to_text_part, values))

    def count_steps(self, values: Iterable[Any]) -> Iterator[Any]:
        """Count the steps of a loop."""
        return _counted(values)

    def made(self, value: Any) -> Any:
        """Count a literal or a slice."""
        budget = _budget.get()
        budget.step()
        return budget.made(value)

    def checked(self, value: Any) -> Any:
        """Check an operand of a comparison."""
        budget = _budget.get()
        budget.step()
        budget.size(value)
        return value


class _InsertChecks(NodeTransformer):
    """Lets loops, `~`, literals, slices and comparisons of a template call the checks of `BoundedEnvironment`."""

    def visit_For(self, node: nodes.For) -> nodes.Node:
        self.generic_visit(node)
        node.iter = _call("count_steps", node.iter)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _call("join_values", *node.nodes)

    def visit_List(self, node: nodes.List) -> nodes.Node:
        self.generic_visit(node)
        return _call("made", node)

    def visit_Dict(self, node: nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return _call("made", node)

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _call("made", node) if node.ctx == "load" else node

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _call("made", node) if isinstance(node.arg, nodes.Slice) else node

    def visit_Compare(self, node: nodes.Compare) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _call("checked", node.expr)
        for operand in node.ops:
            operand.expr = _call("checked", operand.expr)
        return node


def _call(name: str, *args: nodes.Node) -> nodes.Call:
    """Return the node of a call of a method of the environment."""
    node = nodes.Call(nodes.EnvironmentAttribute(name), cast("list[nodes.Expr]", list(args)), [], None, None)
    return cast("nodes.Call", node.set_lineno(args[0].lineno if args else 1))


def _is_container(value: Any) -> bool:
    return isinstance(value, CONTAINERS)


class _Namespace(jinja2.utils.Namespace):
    """A namespace whose text does not show its values, which could be a namespace again without end."""

    def __repr__(self) -> str:
        return "<Namespace>"


def _counted(values: Iterable[Any]) -> Iterator[Any]:
    budget = _budget.get()
    for value in values:
        budget.step()
        yield value


def _range(*bounds: int) -> range:
    """Return a range that is no longer than a run may take steps."""
    steps = range(*bounds)
    if len(steps) > MAX_STEPS:
        raise TemplateLimitError(f"loops take more than {MAX_STEPS} steps")
    return steps


def _length(value: Any) -> int:
    """Return a text's number of characters, or a sequence's as `ENTRY_CHARS` for each entry; 0 for other values."""
    if isinstance(value, str):
        return len(value)
    return ENTRY_CHARS * len(cast("list[Any]", value)) if isinstance(value, list | tuple) else 0


def _to_text(value: Any) -> Any:
    """Return what `{{ value }}` writes, with lists and objects converted to text."""
    return _to_text_part(value) if _is_container(value) else value


def _to_text_part(value: Any) -> str:
    if isinstance(value, str):
        return value
    budget = _budget.get()
    budget.size(value)
    return budget.made(str(value))


def _predict_product(budget: Budget, left: Any, right: Any) -> None:
    """Check the size of `left * right`."""
    if isinstance(left, int) and isinstance(right, int):
        if left.bit_length() + right.bit_length() > MAX_INTEGER_BITS:
            raise TemplateLimitError("`*` makes a number that is too large")
        return
    for sequence, count in ((left, right), (right, left)):
        if isinstance(sequence, str | list | tuple) and isinstance(count, int):
            require(_length(sequence) * max(count, 0))


def _predict_method(budget: Budget, text: str, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Check what a string method makes, if that can be more than its inputs."""
    values = [*args, *kwargs.values()]
    if name == "replace":
        _predict_replace(text, *values[:2])
    elif name == "join":
        parts = values[0] if values else ()
        require(budget.size(parts) + len(text) * len(cast("list[Any]", parts)))
    elif name in ("split", "rsplit", "splitlines"):
        separator = values[0] if values and name != "splitlines" else None
        if not (isinstance(separator, str) and separator):
            _require_short(text)
        else:
            budget.step(text.count(separator))


def _predict_replace(text: str, old: Any = "", new: Any = "", *_: Any) -> None:
    old, new = str(old), str(new)
    require(len(text) + text.count(old) * max(len(new) - len(old), 0))


def _require_short(text: str) -> None:
    if len(text) > MAX_SPLIT_CHARS:
        raise TemplateLimitError(f"a text of {len(text)} characters is too large to be split")


def _require_width(value: Any) -> None:
    width = len(value) if isinstance(value, str) else value
    if isinstance(width, int) and abs(width) > MAX_WIDTH:
        raise TemplateLimitError(f"a width of {width} is too large")


def _format_percent(budget: Budget, text: str, values: Any) -> str:
    """Return `text % values` if its widths and its values are small enough."""
    if "*" in text:
        raise TemplateLimitError("`*` as a width in a format is not available")
    for digits in re.findall(r"\d+", text):
        _require_width(int(digits[:9]))
    require(len(text) + text.count("%") * (MAX_WIDTH + budget.size(values)))
    return text % values


def _bounded_filter(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a filter that counts its work and its result."""
    first = 1 if hasattr(function, "jinja_pass_arg") else 0

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        budget = _budget.get()
        budget.step()
        before, (value, *options) = args[:first], args[first:]
        budget.size(value)
        if name in ITERATING_FILTERS:
            value = list(_counted(value))
            budget.made(value)
        _predict_filter(budget, name, value, [*options, *kwargs.values()])
        if name == "format":
            return budget.made(_format_percent(budget, str(value), kwargs or tuple(options)))
        result = function(*before, value, *options, **kwargs)
        return _counted(cast("Iterator[Any]", result)) if isinstance(result, Iterator) else budget.made(result)

    return run


def _predict_filter(budget: Budget, name: str, value: Any, options: list[Any]) -> None:
    """Check what a filter makes, if that can be more than a few times its input."""
    for option in options:
        budget.size(option)
    if name == "replace":
        _predict_replace(str(value), *options)
    elif name == "join":
        separator = next((option for option in options if isinstance(option, str)), "")
        require(budget.size(value) + len(separator) * len(value))
    elif name == "title":
        _require_short(str(value))
    elif name in ("indent", "round", "tojson", "batch", "slice"):
        for option in options:
            _require_width(option)
        if name == "indent":
            width = max([4, *(len(option) if isinstance(option, str) else int(option) for option in options)])
            text = str(value)
            require(len(text) + (text.count("\n") + 1) * width)


def _bounded_test(test: Callable[..., Any]) -> Callable[..., Any]:
    """Return a test (`x is eq(y)`) that counts its work."""

    @functools.wraps(test)
    def run(*args: Any) -> Any:
        budget = _budget.get()
        budget.step()
        for value in args:
            budget.size(value)
        return test(*args)

    return run


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON as Hugging Face's templates expect it: without HTML escapes or Unicode escapes."""
    encoder = json.JSONEncoder(ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
    if indent is None:
        return encoder.encode(value)
    return BoundedEnvironment.concat(encoder.iterencode(value))


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    if len(pattern) > MAX_WIDTH or re.search(r"%[^a-zA-Z%]*\d", pattern):
        raise TemplateLimitError("a date pattern with a width is not available")
    return datetime.now().strftime(pattern)
