"""The chat template of a model: finding it in the folder, rendering it within limits, and the token that ends turns."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import ext, nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from ..errors import LoadError, WrappedErrors
from ..files.bounded_json import UnreadableError, read_json_object
from ..log import log
from .template_limits import (
    BUDGET,
    FILTERS,
    METHODS,
    Budget,
    checked_filter,
    require_small,
    require_small_call,
    weight,
)

# The file of a processor's template before chat_template.jinja.
_OLDER = "chat_template.json"
_DEFAULT = "default"
# Texts of an example turn, rendered to find the token that ends it.
_QUESTION, _ANSWER = "question", "answer"
# Most lines of Python that a template may run: Qwen's take some hundred for each message. Fewer while a model is
# loaded, when two messages are rendered and cannot be cancelled.
_MOST_STEPS, _MOST_STEPS_LOADING = 2_000_000, 200_000
# Most characters of a template. Long ones have 30,000.
_LONGEST = 1 << 17


def have_template(folder: Path, renderer: Any, tokenizer: Any) -> None:
    """Give the renderer of prompts the folder's chat template, from whichever file has it.

    A processor reads only files of its own, and a tokenizer does not read chat_template.json.

    Args:
        renderer: the processor, or the tokenizer of a model without one.
    """
    if not renderer.chat_template:
        renderer.chat_template = tokenizer.chat_template or _older(folder)
    named = renderer.chat_template
    if isinstance(named, dict) and _DEFAULT not in named and len(named) == 1:
        renderer.chat_template = next(iter(named.values()))


def written(
    renderer: Any,
    tokenizer: Any,
    messages: list[dict[str, Any]],
    check: Callable[[], None] = lambda: None,
    most_steps: int = _MOST_STEPS,
    **more: Any,
) -> str:
    """Render the messages by the chat template, as apply_chat_template would, but within limits.

    A template is a program from the model's folder: it may never end, fill the memory, and could not be cancelled.

    Args:
        check: called while the template is rendered; raises to cancel.
        most_steps: most lines of Python that rendering may run.
        more: further variables of the template.

    Raises:
        ValueError: the model has no template, or too long a one.
        jinja2.TemplateError: the template fails, or exceeds a limit.
        Anything that check raises passes through.
    """
    template = renderer.chat_template
    template = template.get(_DEFAULT) if isinstance(template, dict) else template
    if not isinstance(template, str):
        raise ValueError("the model does not have a chat template")
    if len(template) > _LONGEST:
        raise ValueError(f"it has {len(template):,} characters, and no model's has {_LONGEST:,}")
    given = {"tools": None, "documents": None, "add_generation_prompt": False, **tokenizer.special_tokens_map, **more}
    compiled = _compiled(template)
    with Budget(check, most_steps).spent():
        return compiled.render(messages=messages, **given)


def turn_ends(renderer: Any, tokenizer: Any, parts: bool) -> list[int]:
    """Return the ids of tokens that end an answer, by the tokenizer and the chat template.

    config.json is not enough: that of a base model names only the end of a document.

    Args:
        parts: True if the template takes a message as a list of parts.
    """
    ends = [tokenizer.eos_token_id, _end_of_turn(renderer, tokenizer, parts)]
    return [token for token in ends if token is not None]


def _older(folder: Path) -> str | None:
    try:
        template = read_json_object(folder / _OLDER).get("chat_template")
    except UnreadableError as error:
        if (folder / _OLDER).exists():
            log.warning("%s", error)
        return None
    return template if isinstance(template, str) else None


def _end_of_turn(renderer: Any, tokenizer: Any, parts: bool) -> int | None:
    """Return the id of the control token that the template writes after an answer; None if it writes no such token."""
    turn = {"user": _QUESTION, "assistant": _ANSWER}
    messages = [
        {"role": role, "content": [{"type": "text", "text": text}] if parts else text} for role, text in turn.items()
    ]
    try:
        with WrappedErrors("its chat template renders no turn of the model"):
            rendered = written(renderer, tokenizer, messages, most_steps=_MOST_STEPS_LOADING)
            _, found, rest = rendered.rpartition(_ANSWER)
            ids = tokenizer.encode(rest.lstrip(), add_special_tokens=False) if found else []
            controls = set(tokenizer.get_added_vocab().values())
    except LoadError as error:
        # A template that cannot be used is an error of the first question, not of loading.
        log.debug("%s", error)
        return None
    return ids[0] if ids and ids[0] in controls else None


@lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    return _Sandbox().from_string(template)


class _Code(CodeGenerator):
    """A code generator that also checks the size of values that a template makes without a call."""

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        escaped = frame.eval_ctx.volatile or frame.eval_ctx.autoescape
        join = "(markup_join if context.eval_ctx.autoescape else str_join)" if escaped else "str_join"
        self.write(f"environment.charged({join}(environment.small((")
        for child in node.nodes:
            self.visit(child, frame)
            self.write(", ")
        self.write("))))")

    def visit_Getitem(self, node: nodes.Getitem, frame: Frame) -> None:
        self._checked(super().visit_Getitem, node, frame, isinstance(node.arg, nodes.Slice))

    def visit_List(self, node: nodes.List, frame: Frame) -> None:
        self._checked(super().visit_List, node, frame, True)

    def visit_Dict(self, node: nodes.Dict, frame: Frame) -> None:
        self._checked(super().visit_Dict, node, frame, True)

    def visit_Tuple(self, node: nodes.Tuple, frame: Frame) -> None:
        self._checked(super().visit_Tuple, node, frame, node.ctx == "load")

    def _checked(self, write: Callable[[Any, Frame], None], node: Any, frame: Frame, makes: bool) -> None:
        self.write("environment.charged(" if makes else "(")
        write(node, frame)
        self.write(")")


class _Generation(ext.Extension):
    """The tag {% generation %}, which marks what the model says; its content is rendered as it is."""

    tags = {"generation"}

    def parse(self, parser: Any) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Macro) -> str:
        return caller()


class _PlainNamespace(Namespace):
    """A jinja2 namespace without names that begin with "_", which could lead to Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *rest = args
        values = dict(*rest, **kwargs)
        for name in values:
            _require_plain(name)
        Namespace.__init__(self, values)

    def __setitem__(self, name: str, value: Any) -> None:
        _require_plain(name)
        Namespace.__setitem__(self, name, value)


def _require_plain(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace must not have the name {name[:99]!r}")


class _Sandbox(ImmutableSandboxedEnvironment):
    """The environment in which transformers renders chat templates, with limits."""

    code_generator_class = _Code
    intercepted_binops = frozenset(ImmutableSandboxedEnvironment.default_binop_table)

    def __init__(self) -> None:
        # optimized=False, because what is computed while a template is compiled is not counted.
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, ext.loopcontrols],
            optimized=False,
            finalize=_shown,
        )
        known = {**self.filters, "tojson": _to_json}
        self.filters = {name: checked_filter(name, known[name], self.charged) for name in FILTERS}
        del self.globals["lipsum"]
        self.globals |= {
            "dict": lambda *args, **kwargs: dict(*args, **kwargs),
            "namespace": _PlainNamespace,
            "raise_exception": _fail,
            "strftime_now": _now,
        }

    def charged(self, value: Any) -> Any:
        """Return the value that a template has made, after charging its size to the budget."""
        if budget := BUDGET.get():
            budget.charge(value)
        return value

    def small(self, value: Any) -> Any:
        """Return the value, which is about to become a text; TemplateRuntimeError if it is too large."""
        weight(value)
        return value

    def concat(self, parts: Any) -> str:  # type: ignore[override]
        """Join the parts of an output, a macro or a block."""
        return self.charged("".join(self.small(list(parts))))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        require_small(operator, left, right)
        return self.charged(super().call_binop(context, operator, left, right))

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: N805
        given = require_small_call(__obj, args, kwargs)
        return __self.charged(super().call(__context, __obj, *given, **kwargs))

    def getitem(self, obj: Any, argument: Any) -> Any:
        # jinja2's own getitem() ignores any exception of the lookup, a cancel too.
        try:
            return obj[argument]
        except (TypeError, LookupError):
            found = isinstance(argument, str)
            return self.getattr(obj, argument) if found else self.undefined(obj=obj, name=argument)

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        allowed = next((names for kind, names in METHODS.items() if isinstance(obj, kind)), None)
        return super().is_safe_attribute(obj, attr, value) and (allowed is None or attr in allowed)


@jinja2.pass_context
def _shown(context: Context, value: Any) -> Any:
    """Charge a value that is put into the text. With a context argument, jinja2 does not call it at compile time."""
    return context.environment.charged(value)  # type: ignore[attr-defined]


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: Sequence[str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)  # type: ignore[arg-type]


def _fail(message: str) -> None:
    raise TemplateError(message)


def _now(form: str) -> str:
    require_small("%", form, ())
    return datetime.now().strftime(form)
