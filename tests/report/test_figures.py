"""Pictures: sizes and colours of known weights, and the empty and degenerate cases."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from dense2conv.report import centre_map, curves, histogram, kernel_bank, montage
from dense2conv.report.charts import series
from dense2conv.report.images import GAP, data_uri, diverging, in_the_dark, reads_in_black, sheet
from dense2conv.shapes import ImageShape, InputError

RNG = np.random.default_rng(0)


def test_diverging_is_neutral_at_zero_and_opposite_at_the_ends() -> None:
    blue, zero, red, missing = diverging([-1.0, 0.0, 1.0, np.nan])
    assert zero.tolist() == [247, 247, 247]
    assert blue[2] > blue[0]
    assert red[0] > red[2]
    assert tuple(missing) == GAP


def test_every_colour_can_be_written_on_by_day_and_in_the_dark() -> None:
    day = diverging(np.linspace(-1.0, 1.0, 255))

    def luminance(colour: np.ndarray) -> np.ndarray:
        share = colour / 255.0
        linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
        return linear[..., 0] * 0.2126 + linear[..., 1] * 0.7152 + linear[..., 2] * 0.0722

    for colour in (day, in_the_dark(day)):
        ink = np.where(reads_in_black(colour), 0.0, 1.0)
        low, high = np.minimum(ink, luminance(colour)), np.maximum(ink, luminance(colour))
        assert ((high + 0.05) / (low + 0.05)).min() >= 4.5
    blue, _, red = in_the_dark(diverging([-1.0, 0.0, 1.0])).astype(int)
    assert blue[2] > blue[0]
    assert red[0] > red[2]


@pytest.mark.parametrize(
    ("shape", "units"),
    [
        (ImageShape(1, 16, 16), 9),
        (ImageShape(1, 4, 12), 7),
        (ImageShape(3, 8, 5), 5),
        (ImageShape(2, 6, 6), 1),
        (ImageShape(1, 1, 1), 3),
    ],
)
def test_montage_holds_every_tile(shape: ImageShape, units: int) -> None:
    image = montage(RNG.normal(size=(units, shape.numel)), shape, zoom=3)
    assert image.mode == "RGB"
    pixels = np.asarray(image)
    assert tuple(pixels[0, 0]) == GAP
    # All tiles of one size with a gap around: the sides are whole numbers of them.
    gap = max(2, min(14, round(shape.width * 3 / 14)))
    columns, rest_x = divmod(image.width - gap, shape.width * 3 + gap)
    rows, rest_y = divmod(image.height - gap, shape.height * 3 + gap)
    assert (rest_x, rest_y) == (0, 0)
    assert (rows - 1) * columns < units <= rows * columns


def test_montage_puts_a_weight_where_it_lies() -> None:
    shape = ImageShape(1, 3, 4)
    weight = torch.zeros(1, 12)
    weight[0, 1 * 4 + 2] = -5.0
    pixels = np.asarray(montage(weight, shape, zoom=1))[2:-2, 2:-2]
    assert pixels[1, 2].tolist() == [5, 48, 97]
    assert (np.delete(pixels.reshape(12, 3), 6, axis=0) == 247).all()


def test_montage_scales_each_unit_alone_and_shows_colour_around_grey() -> None:
    shape = ImageShape(3, 2, 2)
    weight = np.zeros((2, 12))
    weight[0, 0] = 1e-6  # red channel, first place
    pixels = np.asarray(montage(weight, shape, zoom=1))
    assert pixels[2, 2].tolist() == [255, 128, 128]
    assert pixels[3, 3].tolist() == [128, 128, 128]


def test_montage_survives_nan_dead_units_and_nothing() -> None:
    for shape in (ImageShape(1, 4, 4), ImageShape(3, 4, 4), ImageShape(2, 4, 4)):
        weight = np.zeros((3, shape.numel))
        weight[0] = np.nan
        weight[1, 0] = np.inf
        assert montage(weight, shape).size > (0, 0)
        assert montage(weight[:0], shape).size > (0, 0)


def test_montage_refuses_another_shape() -> None:
    with pytest.raises(InputError, match=r"needs weights of shape \(n, 16\)"):
        montage(np.zeros((2, 9)), ImageShape(1, 4, 4))


def test_montage_shows_at_most_max_units() -> None:
    weight, shape = RNG.normal(size=(50, 4)), ImageShape(1, 2, 2)
    a, b = montage(weight, shape, 16), montage(weight[:16], shape, 16)
    assert a.tobytes() == b.tobytes()


@pytest.mark.parametrize("size", [(1, 1, 5, 5), (6, 1, 3, 3), (2, 3, 7, 7), (3, 5, 3, 3),
                                  (2, 1, 11, 11), (0, 1, 3, 3), (60, 1, 3, 3)])  # fmt: skip
def test_kernel_bank_draws_any_bank(size: tuple[int, ...]) -> None:
    kernels = RNG.normal(size=size)
    kernels.flat[:1] = np.nan
    image = kernel_bank(kernels)
    assert image.mode == "RGB"
    assert image.width <= 2000


def test_kernel_bank_refuses_a_matrix() -> None:
    with pytest.raises(InputError, match=r"\(K, C, k, k\)"):
        kernel_bank(np.zeros((5, 5)))


def test_data_uri_keeps_a_palette_image_exactly() -> None:
    image = montage(RNG.normal(size=(40, 256)), ImageShape(1, 16, 16), zoom=2)
    encoded = base64.b64decode(data_uri(image).split(",")[1])
    assert Image.open(io.BytesIO(encoded)).mode == "P"
    assert Image.open(io.BytesIO(encoded)).convert("RGB").tobytes() == image.tobytes()


@pytest.mark.parametrize("channels", [1, 3])
def test_only_the_gaps_of_a_picture_are_transparent(channels: int) -> None:
    drawn = sheet(RNG.normal(size=(7, channels, 20, 30)), columns=4)
    assert drawn.size == (4 * 31, 2 * 21)
    encoded = base64.b64decode(data_uri(drawn).split(",")[1])
    alpha = np.asarray(Image.open(io.BytesIO(encoded)).convert("RGBA"))[..., 3]
    cells = alpha.reshape(2, 21, 4, 31).swapaxes(1, 2).reshape(8, 21, 31)
    assert (cells[:7, :20, :30] == 255).all()
    assert not cells[:7, 20].any()
    assert not cells[:7, :, 30].any()
    assert not cells[7].any()


def test_centre_map_counts_what_it_draws() -> None:
    y, x = np.divmod(np.arange(12), 4)
    kernel = np.array([0] * 6 + [1] * 3 + [-1] * 3)
    alive = np.ones(12, bool)
    alive[11] = False
    svg = centre_map(y, x, kernel, np.full(12, -2.0), 3, 4, alive)
    assert "11 living units" in svg
    assert "kernel 0: 6 units" in svg
    assert "left over: 2 units" in svg
    assert svg.count("<circle") == 11 + 3  # and the legend
    sampled = centre_map(y, x, kernel, None, 3, 4, max_units=5)
    assert "an even sample of 5 of 12 units" in sampled


def test_centre_map_survives_nan_crowds_and_nothing() -> None:
    y = np.array([0.0, 0.0, np.nan])
    svg = centre_map(y, y, np.array([0, 30, -1]), np.array([np.nan, np.inf, 0.0]), 1, 1)
    assert "nan" not in svg
    assert "inf" not in svg
    assert "Map of 0 living units" in centre_map([], [], [], [], 4, 4)


def test_curves_draw_a_line_a_layer_and_skip_what_is_not_finite() -> None:
    metrics = [
        {"step": s, "sparsity": s / 10, "rate": float("nan") if s == 3 else 1.0, "layer2/rate": s}
        for s in range(10)
    ]
    svg = curves({"a": [*metrics, {"step": "x", "rate": None}]}, random_radius=6.5)
    assert svg.count("<polyline") == 3
    assert "layer2" in svg
    assert "not logged" in svg  # objective and radius
    assert not re.search(r"\bnan\b", svg)


def test_curves_of_one_step_of_constants_and_of_nothing() -> None:
    assert "<circle" in curves({"a": [{"step": 0, "rate": 2.0, "radius": 1.0}]})
    assert "nan" not in curves({"a": [{"step": s, "rate": 0.0, "radius": 0.0} for s in range(3)]})
    assert "No curve was logged" in curves({"a": []})


def test_a_long_log_keeps_its_extremes_and_stays_small() -> None:
    metrics = [{"step": s, "sparsity": float(s == 7_777)} for s in range(20_000)]
    svg = curves({"a": metrics})
    assert len(svg) < 30_000
    # The spike reaches the top of the first panel.
    points = re.search(r'points="([^"]+)"', svg)
    assert points is not None
    assert "30.0" in {point.split(",")[1] for point in points.group(1).split()}


def test_the_later_record_of_a_step_counts() -> None:
    steps, values = series([{"step": 1, "rate": 1.0}, {"step": 1, "rate": 2.0}], "rate")
    assert (steps.tolist(), values.tolist()) == ([1.0], [2.0])


def test_histogram_says_its_medians_and_survives_nothing() -> None:
    svg = histogram([1.0, 2.0, 3.0, np.nan], [5.0, 6.0, 7.0], "Radius", "pixels")
    assert "median 2 over 3 units; null median 6" in svg
    assert "nan" not in histogram([], [np.nan], "Radius", "pixels")
    assert "nan" not in histogram([0.0], [0.0], "Radius", "pixels")
