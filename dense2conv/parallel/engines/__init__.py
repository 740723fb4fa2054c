"""Engines: who runs forward, backward and the step."""

from dense2conv.parallel.engines.engine import (
    ENGINES,
    DeepspeedConfig,
    Engine,
    make_engine,
    validate_engine,
)
from dense2conv.parallel.engines.native import NativeEngine

__all__ = [
    "ENGINES",
    "DeepspeedConfig",
    "Engine",
    "NativeEngine",
    "make_engine",
    "validate_engine",
]
