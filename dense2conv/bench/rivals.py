"""How others compute rates: the forms in print, and a package that can be installed.

z   (m, d) features, samples as rows
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import one_hot

Rate = Callable[[Tensor], Tensor]


def primal(z: Tensor, epsilon_squared: float) -> Tensor:
    """R by a Cholesky factor of the d×d matrix, whatever the shape, through autograd."""
    m, d = z.shape
    return _half_logdet(d / (m * epsilon_squared) * (z.T @ z))


def dual(z: Tensor, epsilon_squared: float) -> Tensor:
    """R by a Cholesky factor of the m×m matrix, whatever the shape, through autograd."""
    m, d = z.shape
    return _half_logdet(d / (m * epsilon_squared) * (z @ z.T))


def _half_logdet(gram: Tensor) -> Tensor:
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    return torch.linalg.cholesky(eye + gram).diagonal().log().sum()


def textbook_rate(z: Tensor, epsilon_squared: float) -> Tensor:
    """R as MCR²'s code has it: torch.logdet, an LU factorisation, of the d×d matrix."""
    m, d = z.shape
    eye = torch.eye(d, dtype=z.dtype, device=z.device)
    return 0.5 * torch.logdet(eye + d / (m * epsilon_squared) * z.T @ z)


def textbook_rate_reduction(z: Tensor, memberships: Tensor, epsilon_squared: float) -> Tensor:
    """ΔR in MCR²'s textbook form: ZᵀΠ_kZ with a diagonal matrix Π_k, and an LU for each class.

    memberships: (K, m, m).
    """
    m, d = z.shape
    eye = torch.eye(d, dtype=z.dtype, device=z.device)
    value = textbook_rate(z, epsilon_squared)
    for membership in memberships:
        m_k = torch.trace(membership) + 1e-8
        logdet = torch.logdet(eye + d / (m_k * epsilon_squared) * (z.T @ membership @ z))
        value = value - m_k / (2 * m) * logdet
    return value


def published_rate_reduction(
    z: Tensor, labels: Tensor, num_classes: int, epsilon_squared: float
) -> Tensor:
    """ΔR with all that the loss of MCR²'s published code does (Yu et al. 2020).

    It makes the memberships, and computes every term once more, for the log.
    """
    memberships = torch.diag_embed(one_hot(labels, num_classes).T.to(z))
    with torch.no_grad():
        textbook_rate_reduction(z, memberships, epsilon_squared)
    return textbook_rate_reduction(z, memberships, epsilon_squared)


def lightly_rate(epsilon_squared: float) -> Rate | None:
    """R of lightly's EMP-SSL loss, if that package is there: pip install --no-deps lightly."""
    package = importlib.util.find_spec("lightly")
    if package is None or not package.submodule_search_locations:
        return None
    # The one file: the package itself wants torchvision.
    path = Path(package.submodule_search_locations[0]) / "loss" / "emp_ssl_loss.py"
    spec = importlib.util.spec_from_file_location("emp_ssl_loss", path)
    if spec is None or spec.loader is None or not path.is_file():
        return None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    rate: Callable[..., Tensor] = module.tcr_loss
    return lambda z: rate(z[None], epsilon_squared)
