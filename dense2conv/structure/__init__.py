"""Locality, translation, emission: which convolution a dense layer has become."""

from dense2conv.structure.config import ExtractConfig
from dense2conv.structure.discovery import Channel
from dense2conv.structure.emission import ExtractedLayer
from dense2conv.structure.extraction import LayerExtraction, extract_layer
from dense2conv.structure.lattice import Lattice, fit_lattice
from dense2conv.structure.locality import (
    ReceptiveFields,
    random_radius,
    receptive_fields,
    shuffled,
)
from dense2conv.structure.stack import ExtractedStack, load, save

__all__ = [
    "Channel",
    "ExtractConfig",
    "ExtractedLayer",
    "ExtractedStack",
    "Lattice",
    "LayerExtraction",
    "ReceptiveFields",
    "extract_layer",
    "fit_lattice",
    "load",
    "random_radius",
    "receptive_fields",
    "save",
    "shuffled",
]
