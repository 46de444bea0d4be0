r"""FlowChef: steer a flow by what its estimate of the data should satisfy, without the network's gradient.

Patel et al., "Steering rectified flow models in the vector field for controlled image generation", 2024. At
each step :math:`\hat x_0 = x - \sigma v`; a few gradient steps move x with
:math:`\partial\hat x_0/\partial x = 1` and v held, and Euler's step goes on from there with the same v. As
:math:`\hat x_0` moves as x does, that is :math:`x' = \hat x_0^{(n)} + \sigma' v`, with :math:`\hat x_0^{(n)}`
the estimate after n gradient steps.

A gradient step on a linear problem :math:`|A\hat x_0 - y|^2` has a closed form for any n: `Keep` (A a mask)
and `Separable` (A of two small factors: average pooling, blur, crop). `Linear` and `Descent` take the steps.

The released code's loss is the mean of :math:`1000\,m(\hat x_0 - y)^2`, so that its step shrinks the distance
to y by :math:`q = 1 - 2000\,lr/numel`: the same lr is weak for a large state and diverges for a small one.
Rates here are `pull` = 1 - q, of the sum of squares over two, the same for any size; `pull_of` converts.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from rfkernels.editing._launches import Launches, Velocity, evaluate, falling, levels, like, weight_of
from rfkernels.editing.operators import Factors

__all__ = ["Descent", "Keep", "Linear", "Separable", "flow_chef", "pull_of"]


def pull_of(lr: float, numel: int, *, loss_scale: float = 1000.0) -> float:
    r"""The `pull` of a released learning rate: :math:`2\,loss\_scale\,lr/numel`.

    Args:
        lr: of plain gradient descent on the mean of `loss_scale` times the square: FLUX .4 to 1.0.
        numel: elements of the whole tensor that the mean was over; 262144 for FLUX at 1024 x 1024.

    Raises:
        ValueError: a rate for which q = 1 - pull is not within -1 .. 1: it diverges.
    """
    pull = 2 * loss_scale * lr / numel
    _stable("pull_of", pull, f": lr {lr} needs more than {loss_scale * lr:g} elements, got {numel}")
    return pull


@dataclass(frozen=True)
class Keep:
    """Data known where `mask` is 1, in closed form and in the launch of the step itself.

    Args:
        target: y, broadcast to the state.
        mask: 1 where y holds, broadcast to the state, at its resolution (as packed as it is); None
            everywhere. Between 0 and 1 it weighs the step.
        pull: 1 - q of one gradient step, see `pull_of`; 1 puts y there at once.
        inner: gradient steps n.
        whole_until: steps at the start that pull everywhere (`source_steps` of the released code).
    """

    target: Tensor
    mask: Tensor | None = None
    pull: float = 1.0
    inner: int = 1
    whole_until: int = 0

    def __post_init__(self) -> None:
        _stable("Keep", self.pull)


@dataclass(frozen=True)
class Separable:
    r"""Measurements :math:`y = A_h X A_w^T` of the last two axes, in closed form.

    n gradient steps of rate c are :math:`\hat X_0 - V_h[\phi\odot(U_h^T(A\hat X_0 - Y)U_w)]V_w^T` with
    singular values :math:`\lambda = s_h s_w^T` and :math:`\phi = (1 - (1 - c\lambda^2)^n)/\lambda`, which is
    0 where lambda is.

    Args:
        target: y, `[batch, ..., rows of A_h, rows of A_w]`.
        rows, columns: :math:`A_h`, :math:`A_w`, see `rfkernels.editing.operators`.
        pull: :math:`c\,\lambda_{max}^2`: that of the strongest direction.
        inner: gradient steps n; `math.inf` projects.
    """

    target: Tensor
    rows: Tensor
    columns: Tensor
    pull: float = 1.0
    inner: float = 1

    def __post_init__(self) -> None:
        _stable("Separable", self.pull)

    def mover(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        factors = Factors(self.rows, self.columns, x)
        measured = factors.measured(self.target)
        gains = factors.gains(self.pull, self.inner)
        return lambda x0: x0 - factors.back(gains * (factors.along(x0) - measured))


@dataclass(frozen=True)
class Linear:
    r"""Measurements y = A x of any linear A, by n gradient steps :math:`\hat x_0 - c A^T(A\hat x_0 - y)`.

    Args:
        target: y.
        apply, adjoint: A and its transpose; without `adjoint` autograd makes it.
        pull: :math:`c |A|^2`.
        norm: :math:`|A|`, the largest singular value, or a bound from above.
        inner: gradient steps n.
    """

    target: Tensor
    apply: Callable[[Tensor], Tensor]
    adjoint: Callable[[Tensor], Tensor] | None = None
    pull: float = 1.0
    norm: float = 1.0
    inner: int = 1

    def __post_init__(self) -> None:
        _stable("Linear", self.pull)

    def mover(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        rate = self.pull / self.norm**2

        def move(x0: Tensor) -> Tensor:
            for _ in range(self.inner):
                x0 = x0 - rate * self._gradient(x0)
            return x0

        return move

    def _gradient(self, x0: Tensor) -> Tensor:
        if self.adjoint is not None:
            return self.adjoint(self.apply(x0) - self.target)
        with torch.inference_mode(False), torch.enable_grad():
            leaf = x0.clone().requires_grad_()
            y = self.apply(leaf)
            return torch.autograd.grad(y, leaf, (y - self.target).detach())[0]


@dataclass(frozen=True)
class Descent:
    r"""Any loss of the estimate, by gradient steps on it: a classifier, a decoder's output, a reward.

    Args:
        loss: `loss(x0)`, a number or one for each sample; differentiable. The network of the flow is not in
            it.
        lr: step size.
        inner: gradient steps n.
        optimizer: "sgd", or "adam": Adam made anew at every gradient step, as in the released code for
            InstaFlow. Its step is :math:`lr\,g/(|g| + 10^{-8})`: of size lr wherever the gradient is well
            above 1e-8, and below that the scale of the loss is the rate.
    """

    loss: Callable[[Tensor], Tensor]
    lr: float
    inner: int = 1
    optimizer: str = "sgd"

    def __post_init__(self) -> None:
        if self.optimizer not in ("sgd", "adam"):
            raise ValueError(f"Descent: optimizer must be 'sgd' or 'adam', got {self.optimizer!r}")

    def mover(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        def move(x0: Tensor) -> Tensor:
            for _ in range(self.inner):
                with torch.inference_mode(False), torch.enable_grad():
                    leaf = x0.clone().requires_grad_()
                    (g,) = torch.autograd.grad(self.loss(leaf).sum(), leaf)
                x0 = x0 - self.lr * (g / (g.abs() + 1e-8) if self.optimizer == "adam" else g)
            return x0

        return move


Steer = Keep | Separable | Linear | Descent


@torch.no_grad()
def flow_chef(
    velocity: Velocity,
    x: Tensor,
    sigmas: Tensor,
    steer: Steer,
    *,
    stop: int | None = None,
    guidance: float | Tensor | None = None,
    masked_guidance: float | None = None,
) -> Tensor:
    r"""Returns data that follow the flow and satisfy `steer`.

    A step with `Keep` is one launch, the gradient steps, guidance and Euler's step together: with gain
    :math:`g = 1 - q^n`, :math:`x' = x + (\sigma'-\sigma)v - m g(x - \sigma v - y)`. The others take one
    launch for the estimate and one for the step, with their own work between. A gain of 0 is Euler's method
    to the bit.

    Args:
        velocity: `velocity(x, sigma)`; (uncond, cond) with guidance.
        x: the state at `sigmas[0]`, `[batch, ...]`; left as it is.
        sigmas: falling, strictly, within 0 .. 1.
        steer: `Keep`, `Separable`, `Linear` or `Descent`.
        stop: steps that are steered, from the start; None for all.
        guidance: scale of classifier-free guidance, a number or `[batch]`.
        masked_guidance: g of :math:`v = c + (1 - m)(c - u) g`, the released form: none where data are kept.

    Raises:
        ValueError: a grid that does not fall, a velocity of the wrong kind, both guidances, or
            `masked_guidance` without a mask.
    """
    name = "flow_chef"
    grid = falling(name, sigmas)
    count = len(grid) - 1
    stop = count if stop is None else min(stop, count)
    if masked_guidance is not None and (guidance is not None or getattr(steer, "mask", None) is None):
        raise ValueError(f"{name}: masked_guidance needs Keep with a mask, and no guidance besides")
    weight = weight_of(name, guidance, x)
    guided = weight is not None or masked_guidance is not None
    sigma, x = levels(grid, x), x.contiguous()
    if isinstance(steer, Keep):
        step = _kept(name, x, grid, steer, stop, weight, masked_guidance)
    else:
        step = _moved(x, grid, steer, stop, weight)
    for i in range(count):
        x = step(i, x, evaluate(name, velocity, x, sigma[i], guided))
    return x


def _kept(name, x, grid, steer, stop, weight, masked):
    """The step of data that are known somewhere: one launch."""
    y, gain = like(name, "target", steer.target, x), 1 - (1 - steer.pull) ** steer.inner
    mask = None if steer.mask is None else like(name, "mask", steer.mask, x)
    names = ["x", "u", "c", "y"] if masked is not None else ["x", "v", "y"]

    def row(i: int, pulled: bool, boost: float) -> dict[str, float]:
        g, v = gain * (pulled and i < stop), grid[i + 1] - grid[i]
        v = v + g * grid[i]
        split = {"v": v} if masked is None else {"u": -boost * v, "c": (1 + boost) * v}
        return {"x": 1 - g, "y": g, **split}

    extra, steps = masked or 0.0, range(len(grid) - 1)
    free = [[row(i, i < steer.whole_until or mask is None, extra)] for i in steps]
    held = [[row(i, True, 0.0)] for i in steps]
    launch = Launches(x, names, free, inside=None if mask is None else held, weight=weight)
    return lambda i, x, v: launch(i, [x, *v, y], mask=mask)[0]


def _moved(x, grid, steer, stop, weight):
    """The step of an estimate that is moved between two launches."""
    euler = Launches(x, ["x", "v"], [[{"x": 1.0, "v": b - a}] for a, b in pairwise(grid)], weight=weight)
    estimate = Launches(x, ["x", "v"], [[{"x": 1.0, "v": -a}] for a in grid[:-1]], weight=weight)
    after = Launches(x, ["x", "v"], [[{"x": 1.0, "v": b}] for b in grid[1:]], weight=weight)
    move = steer.mover(x)

    def step(i: int, x: Tensor, v: Sequence[Tensor]) -> Tensor:
        if i >= stop:
            return euler(i, [x, *v])[0]
        x0 = move(estimate(i, [x, *v])[0])
        return after(i, [x0.to(x.dtype).contiguous(), *v])[0]

    return step


def _stable(name: str, pull: float, why: str = "") -> None:
    if not (math.isfinite(pull) and abs(1 - pull) <= 1):
        raise ValueError(f"{name}: pull must be 0 .. 2 (|1 - pull| <= 1), got {pull:g}{why}")
