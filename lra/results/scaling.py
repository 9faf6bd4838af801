"""Scaling laws fitted to runs: a power law in one quantity, and Chinchilla's law in parameters and tokens.

    L(x)    = a x^-b + c
    L(N, D) = E + A / N^alpha + B / D^beta        Hoffmann et al. 2022, arXiv:2203.15556, equation 2 and appendix D.3

Both are fitted as in that paper: L-BFGS minimises the sum of the Huber loss (delta = 10^-3) of log L - LSE(log of each
term) from many starts. The starts are the paper's grid, with log E relative to the smallest loss; L-BFGS runs from
those with the lowest objective. Departures: logarithms of N and D are centred and the objective is scaled, because
L-BFGS otherwise stops early (Besiroglu et al. 2024, arXiv:2404.10102).

Intervals are 95 % percentile bootstrap intervals over runs. With one seed they do not include the variation between
seeds, and they are not valid outside the range of the data. If the runs do not determine a law, UserError gives the
reason.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy import optimize, stats

from lra.errors import UserError
from lra.results.statistics import LEVEL, Estimate

Numbers = Sequence[float] | np.ndarray
"""(n,)."""
DELTA = 1e-3
RESAMPLES = 200
FOLLOWED = 20
"""Number of starts from which L-BFGS runs."""
FEWEST_OF_LAW, FEWEST_OF_CHINCHILLA = 6, 10
"""Smallest number of runs: twice the number of parameters of the law."""
RANGE_OF_LAW, RANGE_OF_CHINCHILLA = 8.0, 4.0
"""Smallest ratio of the largest and the smallest value of a quantity."""
COLLINEAR = 0.9
"""Correlation of log N and log D above which their effects cannot be separated."""


@dataclass(frozen=True)
class PowerLaw:
    """L(x) = a x^-b + c. samples: (resamples, 3), the parameters of each resample."""

    a: Estimate
    b: Estimate
    c: Estimate
    samples: np.ndarray

    def at(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Loss at x (k,), and the lower and upper ends of its interval."""

        def law(a: Any, b: Any, c: Any) -> np.ndarray:
            return a * np.asarray(x, float) ** -b + c

        a, b, c = self.samples.T[:, :, None]
        return law(self.a.mean, self.b.mean, self.c.mean), *_ends(law(a, b, c))


@dataclass(frozen=True)
class Chinchilla:
    """L(N, D) = E + A / N^alpha + B / D^beta. samples: (resamples, 5), in the order E, A, B, alpha, beta.

    flops_per: FLOPs of training per parameter and token, kappa in C = kappa N D.
    """

    E: Estimate
    A: Estimate
    B: Estimate
    alpha: Estimate
    beta: Estimate
    samples: np.ndarray
    flops_per: float = 6.0

    @property
    def exponent(self) -> Estimate:
        """The exponent of the compute-optimal number of parameters, N_opt ~ C^(beta / (alpha + beta))."""
        alpha, beta = self.samples[:, 3], self.samples[:, 4]
        low, high = _ends((beta / (alpha + beta))[:, None])
        share = self.beta.mean / (self.alpha.mean + self.beta.mean)
        return Estimate(share, float(low[0]), float(high[0]), self.alpha.count, self.alpha.source)

    def loss(self, parameters: np.ndarray, tokens: np.ndarray) -> np.ndarray:
        """The fitted loss of models of `parameters` trained on `tokens`."""
        return _chinchilla(self._means, np.asarray(parameters, float), np.asarray(tokens, float))

    def optimum(self, flops: np.ndarray) -> dict[str, np.ndarray]:
        """The compute-optimal parameters, tokens and loss at budgets (k,), and the interval of the loss.

        N = G (C / kappa)^(beta / (alpha + beta)), D = C / (kappa N), G = (alpha A / (beta B))^(1 / (alpha + beta)).
        Resamples with an exponent of 0 or below have no optimum; the interval is over the others.
        """
        product = np.asarray(flops, float) / self.flops_per
        best = _allocation(self._means, product)
        falling = self.samples[(self.samples[:, 3:] > 0).all(axis=1)]
        sampled = [_chinchilla(row, *_allocation(row, product)) for row in falling]
        low, high = _ends(np.stack(sampled))
        names = ("parameters", "tokens", "loss", "low", "high")
        return dict(zip(names, (*best, _chinchilla(self._means, *best), low, high), strict=True))

    @property
    def _means(self) -> np.ndarray:
        return np.array([e.mean for e in (self.E, self.A, self.B, self.alpha, self.beta)])


def fit_power_law(x: Numbers, loss: Numbers, *, what: str = "x", resamples: int = RESAMPLES, seed: int = 0) -> PowerLaw:
    """Fit L(x) = a x^-b + c to runs. x, loss: (n,), above 0; what: the name of x, for messages. Raises UserError if
    the runs do not determine the law."""
    values, losses = _checked({what: x}, loss, FEWEST_OF_LAW, RANGE_OF_LAW, fewest_values=4)
    logs, log_loss = np.log(values), np.log(losses)
    _require_fall(logs[0], log_loss, what)
    (log_a, log_c, b), sampled = _fit(logs, log_loss, resamples, seed)
    samples = [np.exp(sampled[0]), sampled[2], np.exp(sampled[1])]
    a, slope, c = _estimates([np.exp(log_a), b, np.exp(log_c)], samples, len(losses))
    law = PowerLaw(a, slope, c, np.stack(samples, axis=1))
    _require_exponent(law.b, what)
    return law


def fit_chinchilla(
    parameters: Numbers, tokens: Numbers, loss: Numbers, *,
    flops: Numbers | None = None, resamples: int = RESAMPLES, seed: int = 0,
) -> Chinchilla:  # fmt: skip
    """Fit L(N, D) = E + A / N^alpha + B / D^beta to runs.

    parameters, tokens, loss: (n,), above 0. flops: (n,) of training, above 0, which give the FLOPs per parameter and
    token (geometric mean); 6 without them. Raises UserError if the runs do not determine the law.
    """
    quantities = {"parameters": parameters, "tokens": tokens}
    values, losses = _checked(quantities, loss, FEWEST_OF_CHINCHILLA, RANGE_OF_CHINCHILLA, fewest_values=3)
    work = None if flops is None else _positive("FLOPs", flops, len(losses))
    logs, log_loss = np.log(values), np.log(losses)
    if abs(together := float(np.corrcoef(logs)[0, 1])) > COLLINEAR:
        raise UserError(
            f"parameters and tokens vary together (correlation of their logarithms {together:.2f}), so their effects "
            "cannot be separated; train several widths on the same tokens"
        )
    for name, own, other in (("parameters", logs[0], logs[1:]), ("tokens", logs[1], logs[:1])):
        _require_fall(own, log_loss - _best(other, log_loss), name)
    (log_a, log_b, log_e, alpha, beta), sampled = _fit(logs, log_loss, resamples, seed)
    order = [np.exp(log_e), np.exp(log_a), np.exp(log_b), alpha, beta]
    samples = [np.exp(sampled[2]), np.exp(sampled[0]), np.exp(sampled[1]), sampled[3], sampled[4]]
    per = 6.0
    if work is not None:
        per = float(np.exp(np.mean(np.log(work) - logs.sum(axis=0))))
    E, A, B, own_alpha, own_beta = _estimates(order, samples, len(losses))
    law = Chinchilla(E, A, B, own_alpha, own_beta, np.stack(samples, axis=1), per)
    _require_exponent(law.alpha, "parameters")
    _require_exponent(law.beta, "tokens")
    return law


def _checked(
    quantities: dict[str, Numbers], loss: Numbers, fewest: int, widest: float, fewest_values: int
) -> tuple[np.ndarray, np.ndarray]:
    """The quantities (k, n) and the losses (n,). Raises UserError for too few runs or a range that is too narrow."""
    count = len(loss)
    values = np.stack([_positive(name, given, count) for name, given in quantities.items()])
    losses = _positive("the loss", loss, count)
    if count < fewest:
        raise UserError(f"{count} run{'s' * (count != 1)}; at least {fewest}")
    for name, row in zip(quantities, values, strict=True):
        if (different := len(np.unique(row))) < fewest_values:
            raise UserError(f"{different} different values of {name}; at least {fewest_values}")
        if (ratio := row.max() / row.min()) < widest:
            raise UserError(f"{name} varies by a factor of {ratio:.3g}; at least {widest:g}")
    return values, losses


def _positive(name: str, given: Numbers, count: int) -> np.ndarray:
    """A quantity of `count` runs, (count,). Raises UserError unless every run has a finite one above 0."""
    values = np.asarray(given, float)
    if len(values) != count:
        raise UserError(f"{len(values)} values of {name} for {count} losses; one for each run")
    if not (np.isfinite(values) & (values > 0)).all():
        raise UserError(f"{name}: the value of a run is not a finite number above 0")
    return values


def _require_fall(values: np.ndarray, log_loss: np.ndarray, what: str) -> None:
    """Raise UserError unless losses fall with the values (Spearman's rank correlation, one-sided, 5 %). log_loss: the
    log losses minus the effect of other quantities."""
    found = stats.spearmanr(values, log_loss, alternative="less") if np.ptp(log_loss) else None
    if found is None or not found.pvalue < LEVEL:
        told = "" if found is None else f" (rank correlation {found.statistic:.2f}, p = {found.pvalue:.2g})"
        raise UserError(f"the loss does not fall measurably with {what}{told}")


def _require_exponent(b: Estimate, what: str) -> None:
    if b.low <= 0:
        raise UserError(
            f"the loss does not fall measurably with {what}: the exponent is {b.mean:.3g}, 95 % interval [{b.low:.3g}, "
            f"{b.high:.3g}]"
        )


def _best(logs: np.ndarray, log_loss: np.ndarray) -> np.ndarray:
    """log L of the best fit, without an interval, (n,)."""
    centre = logs.mean(axis=1)
    x, weights = logs - centre[:, None], np.ones(len(log_loss))
    theta = _follow(_starts(centre, float(log_loss.min())), x, log_loss, weights, 5)[:1]
    return log_loss + DELTA * _values(theta, x, log_loss, weights)[1][0]


def _fit(logs: np.ndarray, log_loss: np.ndarray, resamples: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Parameters (2 k + 1,) and those of each resample (2 k + 1, resamples): the logarithms of the k factors, that of
    the constant, and the k exponents. logs: (k, n). Raises UserError if resamples hold too few different runs."""
    centre, count = logs.mean(axis=1), len(log_loss)
    x = logs - centre[:, None]
    starts = _starts(centre, float(log_loss.min()))
    best = _follow(starts, x, log_loss, np.ones(count), FOLLOWED)
    random, found = np.random.default_rng(seed), []
    for _ in range(10 * resamples):
        weights = np.bincount(random.integers(0, count, count), minlength=count).astype(float)
        kept = x[:, weights > 0]
        # with fewer values than terms the parameters are not determined
        if all(len(np.unique(row)) > 2 for row in kept):
            found.append(_follow(best, x, log_loss, weights, 2)[0])
        if len(found) == resamples:
            break
    else:
        raise UserError("too few different runs for a bootstrap interval; add runs")
    return _uncentred(best[0], centre), _uncentred(np.stack(found), centre).T


def _starts(centre: np.ndarray, smallest: float) -> np.ndarray:
    """The paper's grid of starts: (starts, 2 k + 1)."""
    k = len(centre)
    factors, exponents = (np.linspace(0, 25, 6),) * k, (np.linspace(0, 2, 5),) * k
    constants = smallest - np.array([0.02, 0.1, 0.3, 1.0, 2.0])
    grid = np.array(list(itertools.product(*factors, constants, *exponents)))
    grid[:, :k] -= grid[:, k + 1 :] * centre
    return grid


def _uncentred(theta: np.ndarray, centre: np.ndarray) -> np.ndarray:
    k = len(centre)
    moved = theta.copy()
    moved[..., :k] += moved[..., k + 1 :] * centre
    return moved


def _follow(starts: np.ndarray, x: np.ndarray, log_loss: np.ndarray, weights: np.ndarray, count: int) -> np.ndarray:
    """The minima that L-BFGS finds from the `count` best starts, the lowest first."""
    values = np.concatenate([_values(part, x, log_loss, weights)[0] for part in np.array_split(starts, 9)])
    ends = [
        optimize.minimize(_objective, starts[i], (x, log_loss, weights), "L-BFGS-B", jac=True, options={"maxiter": 500})
        for i in np.argsort(values, kind="stable")[:count]
    ]
    return np.stack([end.x for end in sorted(ends, key=lambda end: float(end.fun))])


def _objective(theta: np.ndarray, x: np.ndarray, log_loss: np.ndarray, weights: np.ndarray) -> tuple[float, np.ndarray]:
    """Huber loss of the residuals over DELTA^2, and its gradient. x: (k, n), centred logarithms."""
    k = len(x)
    value, residual, shares = _values(theta[None], x, log_loss, weights)
    pulls = shares[:, 0] * (weights * np.clip(residual[0], -1, 1) / DELTA)
    return float(value[0]), np.concatenate([pulls.sum(axis=1), -(pulls[:k] * x).sum(axis=1)])


def _values(
    theta: np.ndarray, x: np.ndarray, log_loss: np.ndarray, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For parameters (m, 2 k + 1): the objective (m,), residuals over DELTA (m, n), and the share of each of the k + 1
    terms in the fitted loss (k + 1, m, n)."""
    k = len(x)
    terms = np.empty((k + 1, len(theta), x.shape[1]))
    for i in range(k):
        terms[i] = theta[:, i, None] - theta[:, k + 1 + i, None] * x[i]
    terms[k] = theta[:, k, None]
    largest = terms.max(axis=0)
    shares = np.exp(terms - largest)
    total = shares.sum(axis=0)
    shares /= total
    residual = (largest + np.log(total) - log_loss) / DELTA
    size = np.abs(residual)
    return np.where(size <= 1, 0.5 * residual**2, size - 0.5) @ weights, residual, shares


def _estimates(values: Numbers, samples: Sequence[np.ndarray], count: int) -> list[Estimate]:
    ends = [_ends(sampled[:, None]) for sampled in samples]
    return [
        Estimate(float(value), float(low[0]), float(high[0]), count, "runs, bootstrap")
        for value, (low, high) in zip(values, ends, strict=True)
    ]


def _ends(samples: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Ends of the intervals over the first axis."""
    low, high = np.quantile(samples, (LEVEL / 2, 1 - LEVEL / 2), axis=0)
    return low, high


def _chinchilla(theta: np.ndarray, parameters: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    E, A, B, alpha, beta = theta
    return E + A / parameters**alpha + B / tokens**beta


def _allocation(theta: np.ndarray, product: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Parameters and tokens that minimise the loss where parameters * tokens = product."""
    _, A, B, alpha, beta = theta
    parameters = (alpha * A / (beta * B)) ** (1 / (alpha + beta)) * product ** (beta / (alpha + beta))
    return parameters, product / parameters
