"""Engines: who runs forward, backward and the step."""

from dense2conv.parallel.engines.native import NativeEngine

__all__ = ["NativeEngine"]
