"""Chat templates as tokenizer_config.json holds them, and a fixed date for those that write today's."""

from __future__ import annotations

import datetime
import re
from typing import Any

from megatron_multiverse.errors import ConfigError

DEFAULT_DATE = "2024-07-26"
"""The date that Llama 3.1's template names where it has no clock."""

_CLOCK = "strftime_now"
_CLOCK_CALL = re.compile(_CLOCK + r"\(\s*(['\"])(.*?)\1\s*\)")
# `+%}` keeps a newline at the start of the template, which the renderer would else take for the end of this line.
_FIXED_CLOCK = "{%- macro " + _CLOCK + "(format) -%}{{ fixed_dates[format] }}{%- endmacro +%}"


def named_templates(value: Any) -> dict[str, str]:
    """Templates by name: one text is called "default"; several come as a list of names and texts, or as a mapping.

    Args:
        value: ``chat_template`` of tokenizer_config.json, or None.

    Raises:
        ConfigError: it is none of these.
    """
    if value is None:
        return {}
    if isinstance(value, str):
        return {"default": value}
    if isinstance(value, list) and all(
        isinstance(entry, dict) and {"name", "template"} <= set(entry) for entry in value
    ):
        value = {entry["name"]: entry["template"] for entry in value}
    if isinstance(value, dict) and all(isinstance(template, str) for template in value.values()):
        return value
    raise ConfigError(
        f"chat_template in tokenizer_config.json is a {type(value).__name__} that holds no templates; it must be a "
        'text, or a list of {"name": ..., "template": ...}'
    )


def parse_date(text: str) -> datetime.date:
    """The date that the option ``template_date`` names.

    Raises:
        ConfigError: it is no date.
    """
    try:
        return datetime.date.fromisoformat(text)
    except ValueError as error:
        raise ConfigError(f"template_date ({text}) must be a date such as 2026-01-31") from error


def writes_date(template: str) -> bool:
    """Whether a template writes the date of the day on which it is rendered."""
    return _CLOCK in template


def fix_date(template: str, date: datetime.date) -> tuple[str, dict[str, Any]]:
    """The template with another clock, which always shows `date`, and the variables that it needs.

    The same rows then give the same prompts on every day.

    Raises:
        ConfigError: the template computes the format of its date.
    """
    formats = [match[2] for match in _CLOCK_CALL.finditer(template)]
    if len(formats) != template.count(_CLOCK + "("):
        raise ConfigError(
            "the chat template writes today's date in a computed format, so prompts would differ from day to day: "
            f"write the format into the call of {_CLOCK}, or use --chat-template never"
        )
    return _FIXED_CLOCK + template, {"fixed_dates": {text: date.strftime(text) for text in formats}}
