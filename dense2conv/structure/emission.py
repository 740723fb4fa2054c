"""A dense layer written as convolutions: an ordinary nn.Module, and the dense rows it stands for.

Shapes:

    m   samples      D   inputs      d   units      n   units on a kernel      K   kernels
    C, H, W   grid of the inputs      s   side of a kernel
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dense2conv.shapes import Geometry, InputError
from dense2conv.structure.consistency import contradictions
from dense2conv.structure.grid import InputGrid
from dense2conv.structure.lattice import Lattice


class ExtractedLayer(nn.Module):
    """z (m, d) of x (m, D): convolutions read off at each unit's place, times its gain.

    Units on kernel k: z = gain · conv_k(padded grid of x) at (y, x). Left-over units: sparse dense
    rows. All other units are dead and give their bias, or 0. Units keep the dense layer's order,
    and x is flattened as the dense layer reads it. Kernels that share stride and phase share one
    ``nn.Conv2d``.

    geometry: of the D inputs. kernels: (K, C, s, s), s odd. lattices: one a kernel. kernel, y, x:
    (d,) int64, kernel -1 for a unit on none. gain: (d,), read where kernel ≥ 0. left_unit,
    left_input: (nnz,) int32 and left_value (nnz,): weights of left-over units. bias: (d,) or None.
    Raises InputError where these contradict one another.
    """

    kernel: Tensor
    y: Tensor
    x: Tensor
    left_unit: Tensor
    left_input: Tensor
    channel_of_input: Tensor
    y_of_input: Tensor
    x_of_input: Tensor
    interior: Tensor
    # Derived from those above, and not saved.
    on_kernel: Tensor
    unit_kernel: Tensor
    readout: Tensor
    order: Tensor
    left_units: Tensor
    left_offsets: Tensor
    cell: Tensor
    count: Tensor
    plain: Tensor
    others: Tensor
    reached: Tensor
    segment: Tensor
    segment_count: Tensor

    def __init__(
        self,
        geometry: Geometry,
        kernels: Tensor,
        lattices: Sequence[Lattice],
        padding: str,
        kernel: Tensor,
        y: Tensor,
        x: Tensor,
        gain: Tensor,
        left_unit: Tensor,
        left_input: Tensor,
        left_value: Tensor,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.shape, self.num_units, self.num_inputs = geometry.shape, len(kernel), len(geometry)
        self.padding, self.lattices = padding, list(lattices)
        self.side = kernels.shape[-1]
        device = kernels.device
        persistent = {
            "kernel": kernel, "y": y, "x": x, "channel_of_input": geometry.channel,
            "y_of_input": geometry.y, "x_of_input": geometry.x,
        }  # fmt: skip
        for name, tensor in persistent.items():
            self.register_buffer(name, tensor.to(device, torch.int64, copy=True))
        for name, tensor in {"left_unit": left_unit, "left_input": left_input}.items():
            self.register_buffer(name, tensor.to(device, torch.int32, copy=True))
        grid = InputGrid(geometry, device)
        wrong = contradictions(self, kernels, gain, left_value, bias)
        if wrong:
            raise InputError(
                f"an extracted layer contradicts itself: {'; '.join(wrong)}; extract it again"
            )

        self.kernels_of_conv = _groups(self.lattices)
        self.convs = nn.ModuleList()
        for members in self.kernels_of_conv:
            first = self.lattices[members[0]]
            conv = nn.Conv2d(
                self.shape.channels, len(members), self.side,
                stride=(first.stride_y, first.stride_x), bias=False,
                dtype=kernels.dtype, device="meta",
            )  # fmt: skip
            conv.weight = nn.Parameter(kernels[members].clone())
            self.convs.append(conv)
        on_kernel = (self.kernel >= 0).nonzero()[:, 0]
        self.gain = nn.Parameter(gain.to(kernels)[on_kernel].clone())  # (n,)
        self.left_value = nn.Parameter(left_value.to(kernels).clone())  # (nnz,)
        self.bias = None if bias is None else nn.Parameter(bias.to(kernels).clone())

        def derived(name: str, tensor: Tensor) -> None:
            self.register_buffer(name, tensor, persistent=False)

        derived("on_kernel", on_kernel)
        derived("cell", grid.cell)
        derived("count", grid.count)
        derived("readout", self._readout(on_kernel))
        left, first_weight = _first_of_runs(self.left_unit)
        derived("left_units", left)
        derived("left_offsets", first_weight)
        # Units in the order [on a kernel, left over, dead]; dead ones read a column of zeros.
        order = torch.full_like(self.kernel, len(on_kernel) + len(left))
        order[on_kernel] = torch.arange(len(on_kernel), device=device)
        order[left] = torch.arange(len(left), device=device) + len(on_kernel)
        derived("order", order)
        inside = grid.inside(self.y, self.x, self.side // 2) & (self.kernel >= 0)
        derived("interior", inside)
        self._index_taps(grid)

    def _readout(self, on_kernel: Tensor) -> Tensor:
        """(n,) index of each unit in the convolutions' outputs, flattened and joined."""
        index = torch.empty_like(on_kernel)
        start = 0
        unit_kernel = self.kernel[on_kernel]
        for members in self.kernels_of_conv:
            top, left = self._origin(members)
            stride_y, stride_x = (
                self.lattices[members[0]].stride_y, self.lattices[members[0]].stride_x,
            )  # fmt: skip
            margin = self.side // 2 if self.padding == "none" else 0
            rows = (self.shape.height - 1 - margin - top) // stride_y + 1
            columns = (self.shape.width - 1 - margin - left) // stride_x + 1
            for channel, k in enumerate(members):
                mine = unit_kernel == k
                unit = on_kernel[mine]
                row = torch.div(self.y[unit] - top, stride_y, rounding_mode="floor")
                column = torch.div(self.x[unit] - left, stride_x, rounding_mode="floor")
                index[mine] = start + (channel * rows + row) * columns + column
            start += len(members) * rows * columns
        return index

    def _origin(self, members: Sequence[int]) -> tuple[int, int]:
        """First place (y, x) of a group of kernels."""
        return (
            min(self.lattices[k].offset_y for k in members),
            min(self.lattices[k].offset_x for k in members),
        )

    def _index_taps(self, grid: InputGrid) -> None:
        """What unrolled_l1 needs: units whose taps all reach one input each, and the others'
        (unit, input cell) segments, so that taps folded onto one pixel are added before |·|.
        """
        half = self.side // 2
        y, x, unit_kernel = (v[self.on_kernel] for v in (self.y, self.x, self.kernel))
        taps = grid.window(y, x, half, self.padding)  # (n, s²)
        count = grid.gather(grid.count, taps)  # (n, C, s²)
        plain = (count == 1).all(2).all(1) & grid.inside(y, x, half)  # (n,)
        others = (~plain).nonzero()[:, 0]
        places = grid.height * grid.width
        channel = torch.arange(grid.channels, device=taps.device).view(1, -1, 1)
        cell = channel * places + taps[others, None].clamp_min(0)  # (o, C, s²)
        row = torch.arange(len(others), device=taps.device).view(-1, 1, 1)
        key = (row * grid.num_cells + cell).flatten()
        reached = (count[others] > 0).flatten()
        keys, segment = torch.unique(key[reached], return_inverse=True)
        for name, tensor in {
            "plain": plain, "others": others, "reached": reached.nonzero()[:, 0],
            "segment": segment, "segment_count": grid.count.flatten()[keys % grid.num_cells],
            "unit_kernel": unit_kernel,
        }.items():  # fmt: skip
            self.register_buffer(name, tensor, persistent=False)

    def kernel_bank(self) -> Tensor:
        """All kernels in the order of ``kernel``: (K, C, s, s), differentiable."""
        order = [k for members in self.kernels_of_conv for k in members]
        if not order:
            return self.gain.new_zeros(0, self.shape.channels, self.side, self.side)
        bank = torch.cat([conv.weight for conv in self._convolutions()])
        return bank[torch.tensor(order, device=bank.device).argsort()]

    def _convolutions(self) -> list[nn.Conv2d]:
        return [conv for conv in self.convs if isinstance(conv, nn.Conv2d)]

    def forward(self, x: Tensor) -> Tensor:
        """(m, D) → (m, d)."""
        parts = []
        if len(self.on_kernel):
            padded = self._padded(x)
            maps = []
            margin = self.side // 2 if self.padding == "none" else 0
            for members, conv in zip(self.kernels_of_conv, self.convs, strict=True):
                top, left = self._origin(members)
                maps.append(conv(padded[:, :, top - margin :, left - margin :]).flatten(1))
            joined = torch.cat(maps, dim=1) if len(maps) > 1 else maps[0]
            parts.append(joined[:, self.readout] * self.gain)  # (m, n)
        if len(self.left_units):
            left_over = F.embedding_bag(
                self.left_input, x.T.contiguous(), self.left_offsets, mode="sum",
                per_sample_weights=self.left_value,
            )  # (left, m)  # fmt: skip
            parts.append(left_over.T)
        parts.append(x.new_zeros(len(x), 1))
        z = torch.cat(parts, dim=1)[:, self.order]  # (m, d)
        return z if self.bias is None else z + self.bias

    def _padded(self, x: Tensor) -> Tensor:
        """(m, D) → the padded grid (m, C, H + 2p, W + 2p)."""
        cells = x.new_zeros(len(x), self.shape.numel + 1).index_add(1, self.cell, x)
        images = cells[:, :-1].unflatten(
            1, (self.shape.channels, self.shape.height, self.shape.width)
        )
        half = self.side // 2
        if self.padding == "none" or half == 0:
            return images
        mode = "constant" if self.padding == "zeros" else self.padding
        return F.pad(images, (half,) * 4, mode=mode)

    def unrolled_l1(self) -> Tensor:
        """‖W‖₁ of the dense matrix that this layer stands for, differentiable; biases not counted.

        Exact where padding folds several taps onto one pixel. Never builds the matrix: memory is
        n·s²·C at the edges of the grid, and n elsewhere.
        """
        bank = self.kernel_bank()
        norms = bank.abs().sum((1, 2, 3))  # (K,)
        total = self.left_value.abs().sum()
        total = total + (self.gain.abs() * norms[self.unit_kernel])[self.plain].sum()
        taps = self.gain[self.others].view(-1, 1, 1, 1) * bank[self.unit_kernel[self.others]]
        sums = taps.new_zeros(len(self.segment_count))
        sums = sums.index_add(0, self.segment, taps.flatten()[self.reached])
        return total + (sums.abs() * self.segment_count.to(sums)).sum()

    @torch.no_grad()
    def unrolled_rows(self, units: Tensor | Sequence[int]) -> Tensor:
        """Rows of the equivalent dense matrix: (n,) unit indices → (n, D)."""
        units = torch.as_tensor(units, dtype=torch.int64, device=self.gain.device)
        geometry = self.geometry
        grid = InputGrid(geometry, units.device)
        rows = self.gain.new_zeros(len(units), grid.num_cells + 1)
        gain = self.gain.new_zeros(self.num_units).index_put((self.on_kernel,), self.gain)
        mine = (self.kernel[units] >= 0).nonzero()[:, 0]
        some = units[mine]
        taps = grid.window(self.y[some], self.x[some], self.side // 2, self.padding)[:, None]
        channel = torch.arange(grid.channels, device=taps.device).view(1, -1, 1)
        cell = torch.where(taps < 0, grid.num_cells, taps + channel * grid.height * grid.width)
        values = gain[some].view(-1, 1, 1) * self.kernel_bank()[self.kernel[some]].flatten(2)
        rows[mine] = rows[mine].scatter_add(1, cell.flatten(1), values.flatten(1))
        rows[:, -1] = 0
        dense = rows[:, grid.cell]  # (n, D)
        for i in (self.kernel[units] < 0).nonzero()[:, 0].tolist():
            weights = self.left_unit == units[i]
            dense[i, self.left_input[weights]] = self.left_value[weights]
        return dense

    @property
    def geometry(self) -> Geometry:
        """Places of the inputs."""
        return Geometry(self.shape, self.channel_of_input, self.y_of_input, self.x_of_input)

    @property
    def num_kernels(self) -> int:
        return len(self.lattices)

    @property
    def num_weights(self) -> int:
        """Numbers the layer is made of: kernels, gains, biases and left-over non-zeros."""
        return sum(parameter.numel() for parameter in self.parameters())

    def extra_repr(self) -> str:
        return (
            f"{self.num_inputs} → {self.num_units} units, grid {self.shape}, {self.num_kernels} "
            f"kernels {self.side}×{self.side}, padding={self.padding}, "
            f"{len(self.left_units)} units left over, {self.num_weights} weights"
        )


def _groups(lattices: Sequence[Lattice]) -> list[list[int]]:
    """Kernels that one convolution can hold: same stride and same phase."""
    groups: dict[tuple[int, int, int, int], list[int]] = {}
    for k, lattice in enumerate(lattices):
        key = (
            lattice.stride_y, lattice.stride_x,
            lattice.offset_y % lattice.stride_y, lattice.offset_x % lattice.stride_x,
        )  # fmt: skip
        groups.setdefault(key, []).append(k)
    return list(groups.values())


def _first_of_runs(sorted_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Distinct ids and where each one's run starts."""
    ids, counts = torch.unique_consecutive(sorted_ids, return_counts=True)
    return ids, (counts.cumsum(0) - counts).to(ids)
