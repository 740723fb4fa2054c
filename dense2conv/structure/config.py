"""What the extraction may be told."""

from __future__ import annotations

from dataclasses import dataclass, field

from dense2conv.shapes import InputError
from dense2conv.structure.grid import PADDINGS


@dataclass
class ExtractConfig:
    """How a dense layer is turned into convolutions."""

    window: int = field(
        default=0,
        metadata={"help": "side of the kernels, odd; 0 finds the smallest that holds them"},
    )
    max_window: int = field(
        default=7, metadata={"help": "largest side that window=0 may find, odd"}
    )
    max_kernels: int = field(default=8, metadata={"help": "most kernels a layer may have"})
    min_correlation: float = field(
        default=0.8,
        metadata={"help": "weights of units of one kernel correlate at least this much"},
    )
    min_units: int = field(
        default=4, metadata={"help": "a kernel that fewer units repeat is none: they are left over"}
    )
    min_improvement: float = field(
        default=0.05,
        metadata={
            "help": "share of the unexplained output power that one more kernel must explain"
        },
    )
    min_r2: float = field(
        default=0.4, metadata={"help": "a unit whose output is explained less is left over"}
    )
    padding: str = field(
        default="auto", metadata={"help": "auto | none | zeros | reflect | replicate | circular"}
    )
    samples: int = field(
        default=8192, metadata={"help": "training images that kernels and padding are fitted on"}
    )
    sampled_units: int = field(
        default=4096, metadata={"help": "units whose windows are gathered to find the kernels"}
    )
    split_signs: bool = field(
        default=False,
        metadata={
            "help": "give the next layer's grid one channel for each sign of a kernel's gain"
        },
    )

    def validate(self) -> None:
        """Raise InputError where a field cannot be."""
        for name in ("window", "max_window"):
            side = getattr(self, name)
            if not (side == 0 and name == "window") and (side < 1 or side % 2 == 0):
                raise InputError(f"extract.{name}={side}; a kernel's side is odd, e.g. 5")
        for name in ("max_kernels", "min_units", "samples", "sampled_units"):
            if getattr(self, name) < 1:
                raise InputError(f"extract.{name}={getattr(self, name)}; use 1 or more")
        for name in ("min_correlation", "min_improvement", "min_r2"):
            if not 0 < getattr(self, name) <= 1:
                raise InputError(f"extract.{name}={getattr(self, name)}; use a share in (0, 1]")
        if self.padding != "auto" and self.padding not in PADDINGS:
            raise InputError(
                f"extract.padding={self.padding!r} is unknown; use auto or one of "
                f"{', '.join(PADDINGS)}"
            )
