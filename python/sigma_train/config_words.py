"""What is said of a wrong setting: one sentence that names it, and the valid one nearest to it.

schema: the model of all settings, whose fields are the sections.
"""

import difflib
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from sigma_train.kinds import Wanted

Schema = type[BaseModel]


def sentence(error: ValidationError, settings: dict[str, Any], schema: Schema) -> str:
    """pydantic's report, cut to the one thing to mend first: a misspelt key before a wrong value."""
    errors = error.errors()
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    section, *key = first["loc"][:2] or [""]
    if first["type"] == "extra_forbidden" and not key:
        return f"unknown section {section!r}; {_nearest_section(section, schema)}"
    if first["type"] == "extra_forbidden":
        return f"unknown key {section}.{key[0]}; {nearest(f'{section}.{key[0]}', schema)}"
    if first["type"] == "value_error" and "error" in first.get("ctx", {}):
        return str(first["ctx"]["error"])
    if not key:
        return f"{section} must be a table of settings, found {settings[section]!r}"
    wanted = wanted_in(fields_of(section, schema)[key[0]])
    return f"{section}.{key[0]} must be {wanted}, found {settings[section][key[0]]!r}"


def nearest(name: str, schema: Schema) -> str:
    """The valid key closest to `name`: the same key elsewhere, else by spelling, else what the section has."""
    section, dot, key = name.partition(".")
    if not dot:
        section, key = "", name
    keys = [f"{s}.{k}" for s in schema.model_fields for k in fields_of(s, schema)]
    same = [full for full in keys if full.endswith(f".{key}")]
    local = [full for full in keys if full.startswith(f"{section}.")]
    short = {full.partition(".")[2]: full for full in reversed(keys)}
    by_spelling = [short[k] for k in difflib.get_close_matches(key, short, n=1)]
    close = same or difflib.get_close_matches(name, local, n=1, cutoff=0.75) or by_spelling
    if close:
        return f"did you mean {close[0]}?"
    if local:
        return f"[{section}] has {', '.join(fields_of(section, schema))}"
    return f"the sections are {', '.join(schema.model_fields)}"


def _nearest_section(name: str, schema: Schema) -> str:
    close = difflib.get_close_matches(name, schema.model_fields, n=1)
    return f"did you mean {close[0]}?" if close else f"the sections are {', '.join(schema.model_fields)}"


def fields_of(section: str, schema: Schema) -> dict[str, FieldInfo]:
    return schema.model_fields[section].annotation.model_fields


def wanted_in(field: FieldInfo) -> str:
    for note in field.metadata:
        if isinstance(note, Wanted):
            return note
    if get_origin(field.annotation) is Literal:
        return " or ".join(repr(choice) for choice in get_args(field.annotation))
    return {bool: "true or false", str: "a string"}[field.annotation]
