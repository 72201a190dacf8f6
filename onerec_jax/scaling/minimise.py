"""Minimises many small sums of squares, or of Huber losses, side by side.

Starts of a grid and resamples of a bootstrap are the same problem thousands of times over; in turn they take minutes, as rows of
one array seconds. The step is Gauss and Newton's, damped: with residuals z, Huber's rho of unit width and weights w,

    H = J (w (rho''(z) + lambda rho'(z) / z)) J^T,    step = -H^-1 J (w rho'(z))

lambda -> infinity majorises (iteratively reweighted least squares), lambda -> 0 is Newton's method on a function that is quadratic
in pieces. A row's lambda falls after every step that brings its loss down, and rises after one that does not and is undone.

Axis letters as in `law`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from scipy import optimize

# (constants [S,P], which rows of the whole they are) -> residuals [S,R], their derivatives [S,P,R]
Residuals = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]

LONGEST_STEP = 2.0  # of any constant; they are logarithms and exponents
HOPELESS = 1e10  # lambda


def total_loss(z_SR: np.ndarray, weight_SR: np.ndarray, huber: bool) -> np.ndarray:
    """Weighted sums [S] of Huber's loss or of z^2 / 2; infinite where a residual is."""
    with np.errstate(over="ignore", invalid="ignore"):
        size = np.abs(z_SR)
        loss = np.where(size < 1, 0.5 * size**2, size - 0.5) if huber else 0.5 * size**2
        total = (weight_SR * loss).sum(axis=1)
    return np.where(np.isfinite(total), total, np.inf)


def minimise(
    residuals: Residuals, start_SP: np.ndarray, weight_SR: np.ndarray, huber: bool, steps: int = 300, tol: float = 1e-10
) -> tuple[np.ndarray, np.ndarray]:
    """The minimum that each row of starts leads to, and its loss: [S,P], [S]. A row ends where its step is below `tol`."""
    theta_SP, rows = np.array(start_SP, np.float64), np.arange(len(start_SP))
    z, jacobian = residuals(theta_SP, rows)
    loss_S = total_loss(z, weight_SR, huber)
    damping = np.ones(len(rows))
    for _ in range(steps):
        weight = weight_SR[rows]
        step = _step(z, jacobian, weight, damping, huber)
        tried = theta_SP[rows] + step
        new_z, new_jacobian = residuals(tried, rows)
        new_loss = total_loss(new_z, weight, huber)
        better = new_loss < loss_S[rows]
        theta_SP[rows[better]], loss_S[rows[better]] = tried[better], new_loss[better]
        z = np.where(better[:, None], new_z, z)
        jacobian = np.where(better[:, None, None], new_jacobian, jacobian)
        damping = np.where(better, np.maximum(0.3 * damping, 1e-8), 4 * damping)
        going = (np.abs(step).max(axis=1) > tol) & (damping < HOPELESS)
        rows, z, jacobian, damping = rows[going], z[going], jacobian[going], damping[going]
        if not len(rows):
            break
    return theta_SP, loss_S


def _step(z: np.ndarray, jacobian: np.ndarray, weight: np.ndarray, damping: np.ndarray, huber: bool) -> np.ndarray:
    """The damped step [S,P] of every row; zero, which ends it, for one without a finite slope."""
    size = np.abs(z)
    pull = 1 / np.maximum(size, 1) if huber else np.ones_like(z)  # rho'(z) / z
    bend = (size < 1) if huber else np.ones_like(z)  # rho''(z)
    with np.errstate(over="ignore", invalid="ignore"):
        slope = np.einsum("spr,sr->sp", jacobian, weight * pull * z)
        hessian = (jacobian * (weight * (bend + damping[:, None] * pull))[:, None]) @ jacobian.transpose(0, 2, 1)
    known = np.isfinite(hessian).all(axis=(1, 2)) & np.isfinite(slope).all(axis=1)
    identity = np.eye(slope.shape[1])
    hessian, slope = np.where(known[:, None, None], hessian, identity), np.where(known[:, None], slope, 0.0)
    diagonal = np.einsum("spp->sp", hessian)
    ridge = 1e-3 * damping[:, None] * diagonal + 1e-9 * diagonal.max(axis=1, keepdims=True) + 1e-300
    step = -np.linalg.solve(hessian + ridge[:, :, None] * identity, slope[..., None])[..., 0]
    return step / np.maximum(1, np.abs(step).max(axis=1, keepdims=True) / LONGEST_STEP)


def polish(residuals: Residuals, start_P: np.ndarray, huber: bool) -> tuple[np.ndarray, float]:
    """One unweighted minimum [P] by L-BFGS-B at a tolerance of the last digits, and its loss."""

    def loss_and_slope(theta_P: np.ndarray) -> tuple[float, np.ndarray]:
        z, jacobian = residuals(theta_P[None], np.zeros(1, int))
        slope = jacobian[0] @ (np.clip(z, -1, 1) if huber else z)[0]
        return float(total_loss(z, np.ones_like(z), huber)[0]), slope

    found = optimize.minimize(
        loss_and_slope, start_P, jac=True, method="L-BFGS-B",
        options={"ftol": 1e-15, "gtol": 1e-9, "maxiter": 10_000, "maxfun": 20_000, "maxcor": 20},
    )  # fmt: skip
    return found.x, float(found.fun)
