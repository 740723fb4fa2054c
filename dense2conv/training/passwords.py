"""No password gets into a run: its configuration is written to config.yaml and told to W&B."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from typing import Any

from dense2conv.shapes import InputError

# user:password@ in an address; a shell variable in its place is no secret.
_PASSWORD = re.compile(r"://[^/\s:@]*:[^/\s@$]+@")
_SECRET_NAME = re.compile(r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL", re.IGNORECASE)
_SHORTEST = 8  # characters of a value that is looked for


def refuse_secrets(config: dict[str, Any]) -> None:
    """Raise InputError where a text of ``config`` holds a password, or a secret of the environment."""
    secrets = [
        (name, value)
        for name, value in os.environ.items()
        if _SECRET_NAME.search(name) and len(value) >= _SHORTEST and not os.path.exists(value)
    ]
    for key, text in _texts(config, ""):
        remedy = (
            "which config.yaml would keep and W&B be told; name a variable that the shell fills in, in "
            "single quotes: 'data.root=\"pipe:curl -s https://user:$PASSWORD@host/train.tar\"'"
        )
        if _PASSWORD.search(text):
            raise InputError(f"{key} holds a password, {remedy}")
        for name, value in secrets:
            if value in text:
                raise InputError(f"{key} holds the value of the environment's {name}, {remedy}")


def _texts(value: Any, key: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        yield key, value
    elif isinstance(value, dict):
        for name, item in value.items():
            yield from _texts(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item, key)
