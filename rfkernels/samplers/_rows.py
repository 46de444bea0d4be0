"""Arithmetic on row scalars on the host: float64 numbers, or arrays of them per sample or frame."""

import math

import numpy as np
from torch import Tensor

__all__ = [
    "Form",
    "Row",
    "add",
    "form_values",
    "log_snr",
    "neg_log_sigma",
    "phi",
    "ratio",
    "same_form",
    "where",
]

Row = float | np.ndarray | Tensor  # arrays and tensors are float64
Form = dict[str, Row]  # a linear combination: coefficient of each name


def ratio(a: Row, b: Row) -> Row:
    """a / b, and 0 where b is 0 or infinite or the quotient is not finite: a term without a history."""
    with np.errstate(all="ignore"):
        quotient = np.divide(a, b)
    return np.where(np.isfinite(quotient), quotient, 0.0)[()]


def where(condition, a: Row, b: Row) -> Row:
    """numpy's where; numbers stay numbers."""
    return np.where(condition, a, b)[()]


def log_snr(sigma: Row) -> Row:
    r""":math:`\ln((1-\sigma)/\sigma)`, infinite at the ends."""
    with np.errstate(divide="ignore"):
        return np.log1p(-np.asarray(sigma, dtype=np.float64))[()] - np.log(sigma)


def neg_log_sigma(sigma: Row) -> Row:
    r""":math:`-\ln\sigma`, infinite at 0."""
    with np.errstate(divide="ignore"):
        return -np.log(np.asarray(sigma, dtype=np.float64))[()]


def phi(k: int, z: Row) -> Row:
    r""":math:`\varphi_k(z) = \sum_{j\ge 0} z^j/(j+k)!`, 0 at minus infinity; :math:`\varphi_1 = (e^z-1)/z`.

    By the series near 0, else by :math:`\varphi_{k+1}(z) = (\varphi_k(z) - 1/k!)/z`.
    """
    z = np.asarray(z, dtype=np.float64)
    small = np.abs(z) < 1
    near, term = np.zeros_like(z), np.full_like(z, 1 / math.factorial(k))
    for j in range(1, 24):
        near = near + term
        term = term * np.where(small, z, 0) / (j + k)
    with np.errstate(all="ignore"):
        far = np.expm1(z) / z
        for j in range(1, k):
            far = (far - 1 / math.factorial(j)) / z
    return np.where(small, near, np.where(np.isfinite(far), far, 0.0))[()]


def add(*terms: tuple[Row, Form]) -> Form:
    """The linear combination sum of coefficient * form."""
    total: Form = {}
    for scale, form in terms:
        for name, value in form.items():
            total[name] = total[name] + scale * value if name in total else scale * value
    return total


def form_values(form: Form) -> Form:
    """The form with arrays in place of tensors, without the terms whose coefficient is 0 everywhere."""
    values = {name: v.numpy() if isinstance(v, Tensor) else v for name, v in form.items()}
    return {name: v for name, v in values.items() if nonzero(v)}


def nonzero(row: Row) -> bool:
    """Whether any of the row is not 0."""
    return row != 0 if isinstance(row, (float, int)) else bool(np.any(row))


def same_form(a: Form, b: Form) -> bool:
    return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)


def same(a: Row, b: Row) -> bool:
    return a == b if isinstance(a, float) and isinstance(b, float) else np.array_equal(a, b)
