"""Units that are one another's translates: equal up to shift, sign and gain.

Works on crops around each unit's centre, so that full rows never leave the process that holds
them. Greedy leaders, refined by the mean of their aligned members.

    n   units      K   templates      C   channels      S   side of a crop, 2·half + 1
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dense2conv.shapes import Geometry
from dense2conv.structure.grid import InputGrid
from dense2conv.structure.locality import row_chunks

MIN_OVERLAP = 0.3  # share of a template's energy that must lie where the unit can show it
NUM_CANDIDATES = 16  # leaders tried for one template
NUM_REFINEMENTS = 2
EXACT = 0.999  # correlation of all but exact translates
MOST = 0.5  # share of units that must be such for only such to count
CLEAR_SHARE = 0.02  # of a unit's mass may lie on the image's outermost ring


OFF_PEAK = 0.05  # share of a kernel's mass that is given up to have its peak in the middle
EVERYTHING = 1 - 1e-6


@dataclass
class Crops:
    """What is known of each unit, small enough to be gathered from all processes.

    values  (n, C, S, S) weights around the centre, those sharing a cell summed, 0 outside
    count   (n, C, 2S-1, 2S-1) inputs in each cell around it, 0 outside the image: a validity mask;
            in float32, which holds whole numbers well enough
    energy  (n,) sum w² of the whole row, inside the crop or not
    clear   (n,) bool: the field does not touch the image's edge, so nothing of it is cut off
    """

    values: Tensor
    count: Tensor
    energy: Tensor
    clear: Tensor

    def __len__(self) -> int:
        return len(self.values)

    def select(self, index: Tensor) -> Crops:
        """The crops of some units."""
        return Crops(self.values[index], self.count[index], self.energy[index], self.clear[index])


def crops(
    weight: Tensor,
    geometry: Geometry,
    centre_y: Tensor,
    centre_x: Tensor,
    half: int,
    units: Tensor | None = None,
) -> Crops:
    """Cut a (2·half + 1)² window around the centre of every row, or of rows ``units`` (n,).

    weight: (·, D); centre_y, centre_x: (n,) int64. Result in float64, on the weight's device.
    """
    units = torch.arange(len(weight), device=weight.device) if units is None else units
    grid = InputGrid(geometry, weight.device)
    side, wide = 2 * half + 1, 4 * half + 1
    values, energy, clear = [], [], []
    for rows in row_chunks(len(units), max(weight.shape[1], grid.num_cells)):
        own = weight[units[rows]].double()  # (chunk, D)
        image = grid.scatter(own)  # (chunk, C, H, W)
        taps = grid.window(centre_y[rows], centre_x[rows], half, "zeros")
        values.append(grid.gather_own(image, taps).unflatten(2, (side, side)))
        energy.append(own.square().sum(1))
        mass = image.abs().sum(1)  # (chunk, H, W)
        ring = mass.sum((1, 2)) - mass[:, 1:-1, 1:-1].sum((1, 2))
        clear.append(ring <= CLEAR_SHARE * mass.sum((1, 2)))
    if not values:
        nothing = weight.new_zeros(0, dtype=torch.float64)
        return Crops(
            nothing.view(0, 1, 1, 1).expand(0, grid.channels, side, side),
            nothing.view(0, 1, 1, 1).expand(0, grid.channels, wide, wide).float(),
            nothing,
            nothing.bool(),
        )
    count = grid.gather(grid.count.float(), grid.window(centre_y, centre_x, 2 * half, "zeros"))
    return Crops(
        torch.cat(values), count.unflatten(2, (wide, wide)), torch.cat(energy), torch.cat(clear)
    )


def correlations(units: Crops, templates: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The best shift of every template on every unit.

    For template T at shift s, the unit's prediction is T(p - s) on each input at p; the
    correlation is <w, prediction> / (|w| |prediction|), where |w| is the whole row's (energy that
    the template does not reach counts against the unit) and |prediction| what the image shows of
    the template. Shifts that show under MIN_OVERLAP of the template's energy do not count.

    templates: (K, C, S, S). Returns correlation (n, K), signed, of greatest magnitude, and the
    shift y and x (n, K) from the unit's centre to the template's.
    """
    num_kernels, side = len(templates), templates.shape[-1]
    best, shift = [], []
    size = max(num_kernels, units.count.shape[1]) * units.count.shape[-1] ** 2
    for rows in row_chunks(len(units), size):
        values = F.pad(units.values[rows], (side // 2,) * 4)  # (n, C, 2S-1, 2S-1)
        product = _correlate(values, templates)  # (n, K, S, S)
        shown = _correlate(units.count[rows].double(), templates.square())  # (n, K, S, S)
        total = templates.square().sum((1, 2, 3)).view(1, -1, 1, 1)
        norm = (shown * units.energy[rows].view(-1, 1, 1, 1)).clamp_min(1e-300).sqrt()
        value = (product / norm * (shown >= MIN_OVERLAP * total)).flatten(2)  # (n, K, S²)
        # The nearest of equally good shifts, whatever the rounding.
        steps = torch.arange(side, device=value.device) - side // 2
        distance = (steps[:, None].square() + steps.square()).flatten()
        index = (value.abs() - 1e-9 * distance).argmax(2, keepdim=True)
        best.append(value.gather(2, index)[..., 0])
        shift.append(index[..., 0])
    if not best:
        empty = units.values.new_zeros(0, num_kernels)
        return empty, empty.long(), empty.long()
    where = torch.cat(shift)
    return torch.cat(best), where // side - side // 2, where % side - side // 2


def _correlate(images: Tensor, templates: Tensor) -> Tensor:
    """Valid cross-correlation by FFT, (n, C, A, A) with (K, C, S, S) → (n, K, A-S+1, A-S+1).

    Far faster than a direct one in float64.
    """
    size, kept = images.shape[-1], images.shape[-1] - templates.shape[-1] + 1
    spectrum = torch.fft.rfft2(images).flatten(2)  # (n, C, f)
    other = torch.fft.rfft2(templates, s=(size, size)).conj().flatten(2)  # (K, C, f)
    joined = torch.einsum("ncf,kcf->nkf", spectrum, other).unflatten(2, (size, -1))
    return torch.fft.irfft2(joined, s=(size, size))[..., :kept, :kept]


def aligned_mean(
    units: Crops, members: Tensor, correlation: Tensor, shift_y: Tensor, shift_x: Tensor
) -> tuple[Tensor, Tensor]:
    """Least-squares template of some units at given shifts, and their summed |weights| around it.

    members: (k,) indices; the others (n,). With g = correlation·|w| as gains:
    T(p) = sum g S(p + s) / sum g² count(p + s). Returns (C, S, S) and (S, S).
    """
    side = units.values.shape[-1]
    product, norm = (units.values.new_zeros(units.values.shape[1:]) for _ in range(2))
    mass = units.values.new_zeros(side, side)
    for rows in row_chunks(len(members), units.count[:1].numel()):
        some = members[rows]
        part, shift = units.select(some), (shift_y[some], shift_x[some])
        scale = part.energy.sqrt().view(-1, 1, 1, 1)
        gain = correlation[some].view(-1, 1, 1, 1) * scale
        values = _shifted(F.pad(part.values, (side // 2,) * 4), *shift, side)
        product += (gain * values).sum(0)
        norm += (gain.square() * _shifted(part.count, *shift, side)).sum(0)
        mass += (values.abs() / scale.clamp_min(1e-300)).sum((0, 1))
    return product / norm.clamp_min(1e-300), mass


def _shifted(padded: Tensor, shift_y: Tensor, shift_x: Tensor, side: int) -> Tensor:
    """(n, C, 2S-1, 2S-1), shifts (n,) from the middle → (n, C, S, S)."""
    steps = torch.arange(side, device=padded.device) + side // 2
    rows = (shift_y[:, None] + steps)[:, None, :, None]  # (n, 1, S, 1)
    columns = (shift_x[:, None] + steps)[:, None, None, :]  # (n, 1, 1, S)
    index = torch.arange(len(padded), device=padded.device).view(-1, 1, 1, 1)
    channel = torch.arange(padded.shape[1], device=padded.device).view(1, -1, 1, 1)
    return padded[index, channel, rows, columns]


@dataclass
class Templates:
    """values (K, C, S, S); mass (K, S, S) mean |w| of the aligned members; num_units (K,)."""

    values: Tensor
    mass: Tensor
    num_units: Tensor


def find_templates(
    units: Crops, max_kernels: int, min_correlation: float, min_units: int
) -> Templates:
    """Cluster units into templates that at least ``min_units`` of them repeat.

    If most units are all but exact translates of a few, only such units share a template, so that
    kernels which resemble one another stay apart; otherwise ``min_correlation`` decides.
    """
    if min_correlation < EXACT:
        found = _leaders(units, max_kernels, EXACT, min_units)
        if int(found.num_units.sum()) > MOST * int((units.energy > 0).sum()):
            return found
    return _leaders(units, max_kernels, min_correlation, min_units)


def _leaders(units: Crops, max_kernels: int, min_correlation: float, min_units: int) -> Templates:
    """Greedy leaders.

    Leaders are units clear of the image's edge where there are any. Of NUM_CANDIDATES leaders
    spread evenly over the units not yet explained, the one that most units repeat becomes a
    template: the aligned mean of its members. Deterministic.
    """
    side, channels = units.values.shape[-1], units.values.shape[1]
    alive = units.energy > 0
    leads = alive & units.clear if bool((alive & units.clear).any()) else alive
    left = alive & (_largest_correlation(units) >= min_correlation)
    values: list[Tensor] = []
    mass: list[Tensor] = []
    sizes: list[int] = []
    while len(values) < max_kernels and int(left.sum()) >= min_units and bool(leads.any()):
        pool = leads.nonzero()[:, 0]
        step = max(1, len(pool) // NUM_CANDIDATES)
        tried = pool[::step][:NUM_CANDIDATES]
        rest = left.nonzero()[:, 0]
        open_units = units.select(rest)
        scale = units.energy[tried].sqrt().view(-1, 1, 1, 1)
        correlation = correlations(open_units, units.values[tried] / scale)[0].abs()
        like = correlation >= min_correlation
        similar = (correlation * like).sum(0)  # (tried,)
        chosen = int((similar.round(decimals=6)).argmax())
        if int(like[:, chosen].sum()) < min(2, min_units):
            leads[tried] = False  # nobody but itself
            continue
        template = units.values[tried[chosen]] / scale[chosen]
        for _ in range(NUM_REFINEMENTS + 1):
            found, shift_y, shift_x = (v[:, 0] for v in correlations(open_units, template[None]))
            member = found.abs() >= min_correlation
            trusted = member & open_units.clear
            trusted = trusted if bool(trusted.any()) else member
            if not bool(trusted.any()):
                break
            members = trusted.nonzero()[:, 0]
            template, around = aligned_mean(open_units, members, found, shift_y, shift_x)
        if int(member.sum()) >= min_units:
            values.append(template)
            mass.append(around / trusted.sum())
            sizes.append(int(member.sum()))
            left[rest[member]] = leads[rest[member]] = False
            leads[tried[chosen]] = False
        else:
            leads[tried] = False
    empty = units.values.new_zeros(0, channels, side, side)
    return Templates(
        torch.stack(values) if values else empty,
        torch.stack(mass) if mass else empty[:, 0],
        torch.tensor(sizes, dtype=torch.int64),
    )


def _largest_correlation(units: Crops) -> Tensor:
    """(n,) what no correlation of a unit exceeds: the root of the energy's share inside the crop.

    Of a row that is spread over the image next to nothing is, and nobody has to be compared with it.
    """
    half = units.values.shape[-1] // 2
    bound = []
    for rows in row_chunks(len(units), max(1, units.values[:1].numel())):
        count = F.pad(units.count[rows].double(), (-half,) * 4)  # (chunk, C, S, S)
        inside = (units.values[rows].square() / count.clamp_min(1)).sum((1, 2, 3))
        bound.append((inside / units.energy[rows].clamp_min(1e-300)).sqrt())
    # Rounding must not exclude a unit whose crop is all of it.
    return torch.cat(bound or [units.energy]) + 1e-6


def kernel_side(templates: Templates, share: float, max_side: int) -> int:
    """The smallest odd side whose best window holds ``share`` of the members' mean |w|.

    Averaged over units, so that a few odd ones do not widen every kernel.
    """
    weights = templates.num_units.to(templates.mass.device).double()
    for side in range(1, max_side, 2):
        inside = F.avg_pool2d(templates.mass[:, None], side, 1).flatten(1).amax(1) * side**2
        held = inside / templates.mass.sum((1, 2)).clamp_min(1e-300)  # (K,)
        if float((held * weights).sum() / weights.sum()) >= share:
            return side
    return max_side


def cut_kernels(templates: Templates, side: int) -> Tensor:
    """A ``side × side`` window of each template: (K, C, side, side).

    The one that holds most mass and, of those that hold the same, the one nearest to the mass's
    middle. Where no window holds everything, a window around the largest tap is as good if it holds
    nearly as much: a kernel's centre is then its peak, which is what a unit's place means.
    """
    full, half = templates.mass.shape[-1], side // 2
    positions = full - side + 1
    share = templates.mass / templates.mass.sum((1, 2), keepdim=True).clamp_min(1e-300)
    held = F.avg_pool2d(share[:, None], side, 1)[:, 0] * side**2  # (K, P, P)
    steps = torch.arange(full, dtype=torch.float64, device=held.device)
    middle_y = (share.sum(2) * steps).sum(1).view(-1, 1, 1) - half
    middle_x = (share.sum(1) * steps).sum(1).view(-1, 1, 1) - half
    start = steps[:positions]
    far = (start[:, None] - middle_y).square() + (start - middle_x).square()  # (K, P, P)
    best = (held - 1e-6 * far).flatten(1).amax(1)  # (K,)
    index = (held - 1e-6 * far).flatten(1).argmax(1)
    peak = share.flatten(1).argmax(1)
    top, left = peak // full - half, peak % full - half
    possible = (top >= 0) & (top < positions) & (left >= 0) & (left < positions)
    centred = (top * positions + left).clamp(0, positions**2 - 1)
    nearly = held.flatten(1).gather(1, centred[:, None])[:, 0] >= best - OFF_PEAK
    index = torch.where(possible & nearly & (best < EVERYTHING), centred, index)
    kernels = [
        templates.values[k, :, int(i) // positions :, int(i) % positions :][:, :side, :side]
        for k, i in enumerate(index)
    ]
    return torch.stack(kernels) if kernels else templates.values[:, :, :side, :side]
