"""Words of the command line to a run's configuration, and what to say when they are none."""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from dense2conv.shapes import InputError
from dense2conv.training.config import Config
from dense2conv.training.run_folder import RunFolder


def load_config(command: str, overrides: list[str], schema: type[Config] = Config) -> Config:
    """Compose and check the configuration of a command.

    A new run, or its plan, starts from the defaults and the groups in ``conf/``. Resumed runs and the
    other commands start from what the run was trained with, and take the overrides on top.

    Raises:
        InputError: unknown or ill-typed keys, or values that contradict each other.
    """
    composed = compose(overrides, run=schema)
    # All processes look before any of them may make the folder, which takes all to be connected.
    there = RunFolder(Path(composed.run.root) / composed.run.name).config.is_file()
    resume = composed.resume or (composed.run.existing == "resume" and there)
    if resume or command not in ("train", "plan"):
        composed = _saved(composed, overrides, schema)
    config: Config = OmegaConf.to_object(composed)  # type: ignore[assignment]
    config.resume = resume
    config.validate()
    return config


def compose(
    overrides: list[str], schema: type | None = None, run: type[Config] = Config
) -> DictConfig:
    """A run's configuration from ``conf/``, or, of a ``schema``, its defaults; overrides on top."""
    store = ConfigStore.instance()
    store.store(name="schema", node=run)
    if schema is not None:
        store.store(name="bench", node=schema)
    try:
        with initialize_config_dir(config_dir=str(config_folder()), version_base="1.3"):
            return hydra_compose(config_name="bench" if schema else "config", overrides=overrides)
    except (HydraException, OmegaConfBaseException) as error:
        keys = [key for key, _, _ in config_keys(schema() if schema else run())]
        raise InputError(explain(error, keys)) from error


def _saved(composed: DictConfig, overrides: list[str], schema: type[Config]) -> DictConfig:
    folder = RunFolder(Path(composed.run.root) / composed.run.name)
    folder.require("run", folder.config, "train")
    try:
        saved = OmegaConf.merge(OmegaConf.structured(schema), OmegaConf.load(folder.config))
    except (OmegaConfBaseException, YAMLError, OSError) as error:
        raise InputError(
            f"{folder.config} is no configuration of a run: {explain(error)}"
        ) from error
    for override in overrides:
        key = override.split("=", 1)[0].lstrip("+")
        if OmegaConf.select(composed, key) is not None or "." in key:
            OmegaConf.update(saved, key, OmegaConf.select(composed, key), merge=False)
    assert isinstance(saved, DictConfig)
    return saved


def config_folder() -> Path:
    """``conf/``: inside the installed package, or beside it in a checkout."""
    inside = Path(__file__).parent / "conf"
    return inside if inside.is_dir() else Path(__file__).parent.parent / "conf"


def explain(error: Exception, keys: Sequence[str] = ()) -> str:
    """Hydra's message as one sentence, with the key that was probably meant."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    cause = error.__cause__
    if cause is not None and str(cause) not in str(error):
        lines += [line.strip() for line in str(cause).splitlines() if line.strip()]
    lines = [
        line
        for line in lines
        if not re.match(
            r"(full_key|object_type|reference_type|Config search path:|provider=)", line
        )
    ]
    message = " ".join(lines)
    unknown = re.search(r"[Kk]ey '([\w.]+)'|Could not override '([\w.@]+)'", message)
    if unknown and "not in" in message:
        override = re.search(r"Could not override '([\w.]+)'", message)
        key = override.group(1) if override else unknown.group(1)
        known = "; see hydra.cc" if key.startswith("hydra.") else closest(key, keys)
        return f"key {key!r} is unknown{known}"
    return f"{message} (--help lists every key)"


def closest(word: str, choices: Any) -> str:
    close = difflib.get_close_matches(word, list(choices), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else f"; use one of {', '.join(choices)}"


def config_keys(node: Any = None, prefix: str = "") -> list[tuple[str, Any, str]]:
    """(key, default, help) of every key, read off the dataclasses."""
    node = Config() if node is None else node
    keys: list[tuple[str, Any, str]] = []
    for field in dataclasses.fields(node):
        value = getattr(node, field.name)
        if dataclasses.is_dataclass(value):
            keys += config_keys(value, f"{prefix}{field.name}.")
        else:
            keys.append((f"{prefix}{field.name}", value, field.metadata.get("help", "")))
    return keys
