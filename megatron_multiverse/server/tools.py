"""The tools that a chat may call, as clients name them, and what is asked of the answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast, get_args

from megatron_multiverse.server.body import Fields
from megatron_multiverse.server.errors import refuse

MOST_NAME_CHARACTERS = 256
Choice = Literal["none", "auto", "required"]
_CHOICES = 'none, auto, required or {"type": "function", "function": {"name": ...}}'


class Function(Fields):
    """What a tool of type function is."""

    name: str
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """A JSON schema of its arguments; without one it takes none."""
    strict: bool | None = None
    """Whether calls are held to the schema where nothing else asks for it."""

    @property
    def arguments_schema(self) -> dict[str, Any]:
        """Of the arguments, an object."""
        if self.parameters is None:
            return {"type": "object", "properties": {}, "additionalProperties": False}
        return {"type": "object"} | self.parameters

    def check(self) -> None:
        """Refuse what is no function.

        Raises:
            ApiError: 400.
        """
        if not 1 <= len(self.name) <= MOST_NAME_CHARACTERS:
            allowed = f"1 to {MOST_NAME_CHARACTERS} are allowed"
            raise refuse("tools", f"a function whose name has {len(self.name)} characters; {allowed}")
        kind = (self.parameters or {}).get("type", "object")
        if kind != "object":
            raise refuse(
                "tools",
                f"the parameters of function {self.name[:40]!r} are a schema of type {kind!r:.40}; arguments have "
                'names, so give a schema of type "object"',
            )

    def shown(self) -> dict[str, Any]:
        """The function as templates take it. `strict` is for the server, not for the model."""
        given = {"description": self.description, "parameters": self.parameters}
        named = {"name": self.name} | {name: value for name, value in given.items() if value is not None}
        return {"type": "function", "function": named | (self.model_extra or {})}


class Tool(Fields):
    """One entry of `tools`."""

    type: str = "function"
    function: Function | None = None


class NamedFunction(Fields):
    """The function that a `tool_choice` names."""

    name: str


class NamedChoice(Fields):
    """A `tool_choice` that names a function."""

    type: str = "function"
    function: NamedFunction | None = None


@dataclass(frozen=True, kw_only=True)
class ToolUse:
    """What a request says of tools, checked."""

    functions: Sequence[Function] = ()
    choice: Choice = "none"
    """Whether the answer may, or must, call any of the functions; none where there are no functions."""
    named: Function | None = None
    """The only one that it must call, once."""
    most_calls: int | None = None

    @property
    def shown(self) -> list[dict[str, Any]]:
        """The functions as templates take them."""
        return [function.shown() for function in self.functions]

    @property
    def may_call(self) -> bool:
        """Whether calls are read in the answer."""
        return self.choice != "none"


def tool_use(tools: Sequence[Tool], choice: str | NamedChoice | None, *, parallel: bool) -> ToolUse:
    """What the fields `tools`, `tool_choice` and `parallel_tool_calls` ask for.

    Raises:
        ApiError: 400, naming the field.
    """
    functions = {}
    for tool in tools:
        function = _function(tool)
        if function.name in functions:
            raise refuse("tools", f"several functions are called {function.name[:40]!r}; give each its own name")
        functions[function.name] = function
    most = None if parallel else 1
    if isinstance(choice, NamedChoice):
        named = _named(choice, functions)
        return ToolUse(functions=list(functions.values()), choice="required", named=named, most_calls=1)
    choice = choice or "auto"
    if choice not in get_args(Choice):
        raise refuse("tool_choice", f"{choice!r:.40}; {_CHOICES} are served")
    if choice == "required" and not functions:
        raise refuse("tool_choice", "required, but there are no tools; give at least one function, or leave it out")
    if not functions:
        return ToolUse()
    return ToolUse(functions=list(functions.values()), choice=cast(Choice, choice), most_calls=most)


def _function(tool: Tool) -> Function:
    if tool.type != "function":
        raise refuse("tools", f"a tool of type {tool.type[:40]!r}; only those of type function are served")
    if tool.function is None:
        raise refuse("tools", "a tool without function; give it an object with name, description and parameters")
    tool.function.check()
    return tool.function


def _named(choice: NamedChoice, functions: dict[str, Function]) -> Function:
    if choice.type != "function" or choice.function is None:
        raise refuse("tool_choice", f"type {choice.type[:40]!r} with no function to call; {_CHOICES} are served")
    name = choice.function.name
    if name not in functions:
        have = ", ".join(list(functions)[:10])[:200] or "none"
        raise refuse("tool_choice", f"there is no function {name[:40]!r} among the tools ({have}); name one of them")
    return functions[name]
