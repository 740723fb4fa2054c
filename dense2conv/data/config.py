"""What to train on."""

from __future__ import annotations

from dataclasses import dataclass, field

from dense2conv.shapes import ImageShape, InputError

SETS = ("imagenet", "webdataset", "cifar10", "parquet")
KINDS = ("natural", "folder", "noise", "gaussian", "mosaic", *SETS)
TILES = 3  # tiles along the side of a mosaic
MAX_COVARIANCE = 16_384  # pixels whose covariance is still held whole: 2 GiB in float64


@dataclass
class DataConfig:
    """Images, their size, and the noise that the model of the world adds to them."""

    kind: str = field(
        default="natural",
        metadata={
            "help": "natural (embedded photographs) | folder | imagenet | webdataset | cifar10 | parquet "
            "(data.root) | mosaic, gaussian (made of photographs) | noise (control)"
        },
    )
    root: str | None = field(
        default=None,
        metadata={
            "help": "the images: a folder, or shards such as train-{0000..0146}.tar or pipe:COMMAND"
        },
    )
    held_out_root: str | None = field(
        default=None,
        metadata={"help": "held-out images; null: those that root calls val or test, or every 8th"},
    )
    side: int = field(default=16, metadata={"help": "side of the square patches, pixels"})
    channels: int = field(default=1, metadata={"help": "1 (grey) or 3 (colour)"})
    resize: int = field(
        default=0,
        metadata={"help": "resize photographs to this shorter side before cropping; 0: leave"},
    )
    flip: bool = field(
        default=False,
        metadata={"help": "mirror half of the training images of a set, at random"},
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
    whiten: str = field(
        default="none",
        metadata={
            "help": "none | zca: decorrelate the pixels, nearest to themselves | fourier: by one filter "
            "for all places"
        },
    )
    whiten_ridge: float = field(
        default=0.01,
        metadata={"help": "added to each variance before whitening (a pixel's mean variance = 1)"},
    )
    statistics_samples: int = field(
        default=10_000,
        metadata={"help": "training images on which a set's mean, and any covariance, is measured"},
    )
    on_error: str = field(
        default="skip",
        metadata={"help": "a bad image of a set: skip (count and name it, take the next) | fail"},
    )
    max_bad_share: float = field(
        default=0.01, metadata={"help": "stop when more than this share of a set's images is bad"}
    )
    accept: str | None = field(
        default=None,
        metadata={"help": "resume on images that have changed: the name that the error gives them"},
    )
    cache: str | None = field(
        default=None,
        metadata={"help": "folder for a set's decoded pixels, built once and memory-mapped"},
    )
    workers: int = field(default=4, metadata={"help": "threads that decode a set's images"})
    prefetch: int = field(default=2, metadata={"help": "batches of a set that are read in advance"})
    image_column: str = field(
        default="image", metadata={"help": "column of encoded images (data=parquet)"}
    )
    label_column: str = field(
        default="label",
        metadata={"help": "column of integer labels, if there is one (data=parquet)"},
    )

    @property
    def shape(self) -> ImageShape:
        return ImageShape(self.channels, self.side, self.side)

    def validate(self) -> None:
        """Raise InputError where the fields contradict each other."""
        for name, allowed in (
            ("kind", KINDS),
            ("whiten", ("none", "zca", "fourier")),
            ("on_error", ("skip", "fail")),
        ):
            if getattr(self, name) not in allowed:
                raise InputError(
                    f"data.{name}={getattr(self, name)!r} is unknown; use {', '.join(allowed[:-1])} "
                    f"or {allowed[-1]}"
                )
        if self.kind in ("folder", *SETS) and not self.root:
            raise InputError(f"data={self.kind} needs images; set data.root=PATH")
        if self.channels not in (1, 3):
            raise InputError(f"data.channels={self.channels}; use 1 (grey) or 3 (colour)")
        if self.side < 2:
            raise InputError(f"data.side={self.side} is too small; use 2 pixels or more")
        if self.kind == "mosaic" and self.side % TILES:
            raise InputError(
                f"data.side={self.side} does not divide into {TILES}×{TILES} tiles; "
                f"use a multiple of {TILES}"
            )
        if self.resize and self.resize < self.side:
            raise InputError(
                f"data.resize={self.resize} is smaller than data.side={self.side}; "
                "raise data.resize, or set it to 0"
            )
        for name in ("input_noise_std", "max_bad_share", "prefetch"):
            if not getattr(self, name) >= 0:
                raise InputError(f"data.{name}={getattr(self, name)} is negative; use 0 or more")
        if not self.whiten_ridge > 0:
            raise InputError(f"data.whiten_ridge={self.whiten_ridge}; use a positive number")
        for name, least in (("workers", 1), ("statistics_samples", 2)):
            if getattr(self, name) < least:
                raise InputError(f"data.{name}={getattr(self, name)}; use {least} or more")
        if self.kind not in SETS:
            for name in ("flip", "cache", "held_out_root"):
                if getattr(self, name):
                    raise InputError(
                        f"data.{name}={getattr(self, name)} has no meaning for data={self.kind}; it is "
                        f"for {', '.join(SETS)}"
                    )
        if (self.whiten == "zca" or self.kind == "gaussian") and self.shape.numel > MAX_COVARIANCE:
            raise InputError(
                f"the covariance of {self.shape} = {self.shape.numel} pixels takes "
                f"{self.shape.numel**2 * 8 / 2**30:.0f} GiB; lower data.side to "
                f"{int((MAX_COVARIANCE / self.channels) ** 0.5)} or less, or use data.whiten=fourier"
            )
