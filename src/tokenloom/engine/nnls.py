"""Non-negative least squares."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def nnls(a: Array, b: Array) -> Array:
    """The x >= 0 that makes |a x - b| smallest; a `[m, n]`, b `[m]`, x `[n]`.

    Active-set method of Lawson and Hanson (Solving Least Squares Problems, 1974, chapter 23). Columns of
    `a` may depend on each other; one of the best x is returned then.
    """
    scale = np.linalg.norm(a, axis=0)
    scale[scale == 0.0] = 1.0
    a = a / scale
    n = a.shape[1]
    x = np.zeros(n)
    free = np.zeros(n, dtype=bool)  # columns whose x may be above zero
    tolerance = 1e-12 * (float(np.linalg.norm(b)) + 1.0)
    for _ in range(10 * n):  # it ends after about n rounds; the bound is for rounding errors only
        gain = np.where(free, 0.0, a.T @ (b - a @ x))
        while gain.max(initial=0.0) > tolerance:
            entering = int(gain.argmax())
            free[entering] = True
            wanted = _solve(a, b, free)
            if wanted[entering] > 0.0:
                break
            free[entering] = False  # its gain was rounding error
            gain[entering] = 0.0
        else:
            break
        while free.any() and wanted[free].min() <= 0.0:
            # Walk towards the wanted point until the first x reaches zero, and fix that one there.
            falling = np.flatnonzero(free & (wanted <= 0.0))
            steps = x[falling] / (x[falling] - wanted[falling])
            x += steps.min() * (wanted - x)
            free[falling[steps.argmin()]] = False
            free &= x > 0.0
            x[~free] = 0.0
            wanted = _solve(a, b, free)
        x = wanted
    return x / scale


def _solve(a: Array, b: Array, free: NDArray[np.bool_]) -> Array:
    x = np.zeros(a.shape[1])
    x[free] = np.linalg.lstsq(a[:, free], b, rcond=None)[0]
    return x
