"""Ridge regression towards weights that are there: rows of inputs and outputs, to new weights."""

from __future__ import annotations

import torch
from torch import Tensor


def solved(x: Tensor, y: Tensor, old: Tensor, ridge: float) -> tuple[float, Tensor | None]:
    """Minimise mean ||y - W x||^2 + ridge * mean(x^2) * ||W - old||^2 by the normal equations.

    Args:
        x: [rows, in].
        y: [rows, out].
        old: [out, in].
        ridge: of the mean squared input.

    Returns:
        The mean squared error of `old`, summed over outputs; and W, None where all inputs are zero.
    """
    gram, cross = (x.T @ x / len(x)).double(), (y.T @ x / len(x)).double()
    strength = ridge * float(gram.diagonal().mean())
    system = gram + strength * torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    error = float((y - x @ old.T).square().mean(0).sum())
    if not strength > 0:
        return error, None
    new = torch.linalg.solve(system, (cross + strength * old.double()).T).T.to(old)
    return error, new


def solved_by_fewer(x: Tensor, y: Tensor, old: Tensor, ridge: float) -> tuple[float, Tensor | None]:
    """Do so for the change W - old, in as many unknowns as there are rows or inputs.

    With R = y - x old^T and s the ridge's strength, the change is R^T x (x^T x + s I)^-1, or
    R^T (x x^T + s I)^-1 x; the smaller one of the two symmetric matrices is taken apart.
    """
    n = len(x)
    rest = y - x @ old.T
    error = float(rest.square().mean(0).sum())
    strength = ridge * float(x.square().mean())
    if not strength > 0:
        return error, None
    fewer_rows = n < x.shape[1]
    square = ((x @ x.T if fewer_rows else x.T @ x) / n).double()
    square.diagonal().add_(strength)
    factor, failed = torch.linalg.cholesky_ex(square)
    if int(failed):
        return solved(x, y, old, ridge)
    sought = (rest if fewer_rows else x.T @ rest).double() / n
    found = torch.cholesky_solve(sought, factor).to(old)
    return error, old + (found.T @ x if fewer_rows else found.T)
