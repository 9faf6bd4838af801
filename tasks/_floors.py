"""Baselines without a sequence model, shared by the tasks."""

from __future__ import annotations

import numba
import numpy as np

from lra.task import Split

MAX_FITTED = 10_000
"""Largest number of training examples a baseline is fitted to."""


@numba.njit(cache=True)
def _histogram(values: np.ndarray, offsets: np.ndarray, documents: np.ndarray, width: int) -> np.ndarray:
    """Share of each token in each document: (documents, width)."""
    counts = np.zeros((len(documents), width), np.float64)
    for row in range(len(documents)):
        start, stop = offsets[documents[row]], offsets[documents[row] + 1]
        for i in range(start, stop):
            counts[row, values[i]] += 1.0
        counts[row] /= max(1, stop - start)
    return counts


def token_shares(split: Split, rows: np.ndarray, width: int) -> np.ndarray:
    """Square roots of the token shares of the examples `rows`, whatever the order of the tokens: (n, features).

    width: number of token ids. Two towers u, v give the features [u, v, u * v, |u - v|].
    """
    towers = [
        np.sqrt(_histogram(split.values, split.offsets, np.asarray(split.index[rows, tower]), width))
        for tower in range(split.index.shape[1])
    ]
    if len(towers) == 1:
        return towers[0]
    u, v = towers
    return np.concatenate([u, v, u * v, np.abs(u - v)], axis=1)


def bag_of_tokens(train: Split, test: Split, classes: int) -> float:
    """Test accuracy of multinomial logistic regression on token shares.

    Fitted to at most MAX_FITTED examples, spread evenly over `train`.
    """
    rows = np.linspace(0, len(train) - 1, min(MAX_FITTED, len(train))).astype(np.int64)
    width = 1 + max(int(train.values.max(initial=0)), int(test.values.max(initial=0)))
    x, y = token_shares(train, rows, width), np.asarray(train.labels)[rows]
    mean, scale = x.mean(axis=0), x.std(axis=0)
    used = scale > 0
    weight, bias = logistic(((x - mean) / np.where(used, scale, 1))[:, used], y, classes)
    z = (token_shares(test, np.arange(len(test)), width) - mean) / np.where(used, scale, 1)
    return float(((z[:, used] @ weight + bias).argmax(axis=1) == np.asarray(test.labels)).mean())


def logistic(x: np.ndarray, y: np.ndarray, classes: int, penalty: float = 1e-4) -> tuple[np.ndarray, np.ndarray]:
    """Multinomial logistic regression by L-BFGS: x (n, f), y (n,) -> weight (f, classes), bias (classes,)."""
    from scipy.optimize import minimize
    from scipy.special import logsumexp, softmax

    n, features = x.shape
    target = np.eye(classes)[y]

    def loss(flat: np.ndarray) -> tuple[float, np.ndarray]:
        weight, bias = flat[:-classes].reshape(features, classes), flat[-classes:]
        logits = x @ weight + bias
        value = (logsumexp(logits, axis=1) - logits[np.arange(n), y]).mean() + penalty / 2 * (weight**2).sum()
        error = (softmax(logits, axis=1) - target) / n
        return float(value), np.concatenate([(x.T @ error + penalty * weight).ravel(), error.sum(axis=0)])

    start = np.zeros((features + 1) * classes)
    solution = minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 50}).x
    return solution[:-classes].reshape(features, classes), solution[-classes:]
