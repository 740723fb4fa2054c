"""What to train on."""

from __future__ import annotations

from dataclasses import dataclass, field

from dense2conv.shapes import ImageShape, InputError


@dataclass
class DataConfig:
    """Images, their size, and the noise that the model of the world adds to them."""

    kind: str = field(
        default="natural",
        metadata={"help": "natural (embedded photographs) | folder (data.root) | noise (control)"},
    )
    root: str | None = field(
        default=None, metadata={"help": "folder of images, searched recursively (data=folder)"}
    )
    side: int = field(default=16, metadata={"help": "side of the square patches, pixels"})
    channels: int = field(default=1, metadata={"help": "1 (grey) or 3 (colour)"})
    resize: int = field(
        default=0,
        metadata={"help": "resize photographs to this shorter side before cropping; 0: leave"},
    )
    max_images: int = field(
        default=2000,
        metadata={"help": "decode at most this many images of a folder, evenly spaced"},
    )
    input_noise_std: float = field(
        default=0.05,
        metadata={
            "help": "standard deviation of the noise added to each training input (pixel = 1)"
        },
    )
    permute_pixels: bool = field(
        default=False, metadata={"help": "control: permute all pixels by one fixed permutation"}
    )

    @property
    def shape(self) -> ImageShape:
        return ImageShape(self.channels, self.side, self.side)

    def validate(self) -> None:
        """Raise InputError where the fields contradict each other."""
        if self.kind not in ("natural", "folder", "noise"):
            raise InputError(f"data.kind={self.kind!r} is unknown; use natural, folder or noise")
        if self.kind == "folder" and not self.root:
            raise InputError("data=folder needs a folder of images; set data.root=PATH")
        if self.channels not in (1, 3):
            raise InputError(f"data.channels={self.channels}; use 1 (grey) or 3 (colour)")
        if self.side < 2:
            raise InputError(f"data.side={self.side} is too small; use 2 pixels or more")
        if self.resize and self.resize < self.side:
            raise InputError(
                f"data.resize={self.resize} is smaller than data.side={self.side}; "
                "raise data.resize, or set it to 0"
            )
        if self.input_noise_std < 0:
            raise InputError(
                f"data.input_noise_std={self.input_noise_std} is negative; use 0 or more"
            )
