"""Fitting: every language, start and sample of the runs at once, in one vmapped program.

Each fit is a damped Gauss-Newton (Levenberg-Marquardt) descent of

    sum_n w_n huber((L(r_n) - y_n) / s; 2) + 1/2 |penalty|^2,

in float64 on the host, for a fit is a few thousand operations and the accelerator has better to do. s is the language's
noise, estimated from the residuals of a first fit. A sample is a set of weights w of the runs (folds, leave-one-out) or
of losses y (bootstrap), and starts where the fit to all runs ended.

The penalties keep what the data leave open from running off, and are far below the noise wherever the data speak:
log-linear  c = m sigmoid(u), m the least loss observed, and u has the prior N(0, 1.5^2): where the runs show no
            curvature, c is about half of m. What one standard deviation of a group's share does to log(L - c) has the
            prior N(0, 1).
power       g has the prior N(0, 1), log o has N(log(0.1 p at the prior), 2^2): in a study of the starter corpus (44
            languages, 35 runs) a nearly flat prior left log(o / 0.1 p) with a median of -0.2 and a standard deviation
            of 2.1. A narrower one pulls o down where a language learns as much from others as from its own few tokens.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import cho_factor, cho_solve
from jaxtyping import Array, Float

from eurollm_jax.ablation.laws import Law, LawName, LogLinear, Observations, Power

HUBER = 2.0  # standard deviations of the noise, beyond which a residual counts linearly
STEPS = 60  # of Gauss-Newton at most, of a fit from new starts
STEPS_AGAIN = 12  # of a sample; most take fewer, and the slowest would hold up all
LEAST_SPREAD = 1e-3  # of a group's share, for the penalty: of a fixed share nothing is known, and its t is about 0
LEAST_OFFSET = 1e-4  # share of tokens, on which the prior of a power law's offset is centred at least


@dataclass(frozen=True)
class Form:
    """A law as the solver sees it, for one language. Functions of parameters [P], features [F] and context [C]."""

    predict: Callable[[Array, Array, Array], Array]  # -> the loss
    penalty: Callable[[Array, Array], Array]  # of parameters and context -> a vector, of unit variance under the prior


def _log_linear(params: Array, shares: Array, context: Array) -> Array:
    """c + E exp(s (r - prior) / E), E = l - c, of c (as the logit of c / m), l (the loss at the prior), s (its slopes).

    The runs determine l and s well, and c moves next to nothing but the curvature: a descent in b and t would follow a
    narrow bent valley.
    """
    floor = context[0] * jax.nn.sigmoid(params[0])
    excess, prior = params[1] - floor, context[1 : shares.shape[0] + 1]
    return floor + excess * jnp.exp(params[2:] @ (shares - prior) / excess) + jnp.where(excess > 0, 0.0, jnp.inf)


def _log_linear_penalty(params: Array, context: Array) -> Array:
    excess = params[1] - context[0] * jax.nn.sigmoid(params[0])
    return jnp.concatenate([params[:1] / 1.5, params[2:] / excess * context[params.shape[0] - 1 :]])


def _power(params: Array, own: Array, context: Array) -> Array:
    return jnp.exp(params[0] - params[1] * jnp.log(own[0] + jnp.exp(params[2])))


def _power_penalty(params: Array, context: Array) -> Array:
    return jnp.stack([params[1], (params[2] - context[0]) / 2])


FORMS = {"log-linear": Form(_log_linear, _log_linear_penalty), "power": Form(_power, _power_penalty)}


@dataclass(frozen=True, eq=False)
class Fit:
    """A law fitted to all runs, with what samples of them need. All arrays are float64 on the host."""

    name: LawName
    prior: Float[np.ndarray, "G"]
    holds: Float[np.ndarray, "L G"]
    features: Float[np.ndarray, "L N F"]
    context: Float[np.ndarray, "L C"]
    losses: Float[np.ndarray, "N L"]
    noise: Float[np.ndarray, "L"]  # standard deviation of the residuals, bits per byte
    params: Float[np.ndarray, "L P"]
    leverage: Float[np.ndarray, "N L"]  # of each run on its own prediction, 0 to 1

    @property
    def law(self) -> Law:
        return self.law_of(self.params)

    @property
    def predicted(self) -> Float[np.ndarray, "N L"]:
        """Of the runs."""
        return self.predicted_by(self.params[None])[0]

    def predicted_by(self, params: Float[np.ndarray, "S L P"]) -> Float[np.ndarray, "S N L"]:
        with _float64_on_the_host():
            return np.asarray(_predictions(FORMS[self.name], params, self.features, self.context))

    def law_of(self, params: Float[np.ndarray, "... L P"]) -> Law:
        if self.name == "power":
            return Power(np.exp(params[..., 0]), params[..., 1], np.exp(params[..., 2]), self.holds)
        floor = self.context[:, 0] / (1 + np.exp(-params[..., 0]))
        excess = params[..., 1] - floor
        transfer = params[..., 2:] / excess[..., None]
        return LogLinear(floor, np.log(excess), transfer - (transfer @ self.prior)[..., None])

    def again(
        self,
        losses: Float[np.ndarray, "S N L"] | None = None,
        weights: Float[np.ndarray, "S N"] | None = None,
    ) -> Float[np.ndarray, "S L P"]:
        """Parameters fitted to samples: to other losses of the same runs, or to the runs with other weights."""
        if losses is None:
            assert weights is not None
            losses = np.broadcast_to(self.losses, (len(weights), *self.losses.shape))
        if weights is None:
            weights = np.ones(losses.shape[:2])
        starts = self.params[:, None]
        return _fit(self.name, self.features, self.context, losses, weights, starts, self.noise, STEPS_AGAIN)[0]


def fit(
    name: LawName,
    runs: Observations,
    prior: Float[np.ndarray, "G"],
    holds: Float[np.ndarray, "L G"],
    *,
    starts: int,
    seed: int,
) -> Fit:
    """The law fitted to all runs, from `starts` starts."""
    losses = np.asarray(runs.losses, np.float64)
    count, languages = losses.shape
    shares = np.asarray(runs.shares, np.float64)
    rng = np.random.default_rng(seed)
    if name == "log-linear":
        features = np.broadcast_to(shares, (languages, *shares.shape))
        spread = np.maximum(shares.std(0), LEAST_SPREAD)
        context = np.column_stack([losses.min(0), np.tile(prior, (languages, 1)), np.tile(spread, (languages, 1))])
        begin = _log_linear_starts(shares, losses, prior, starts, rng)
    else:
        features = (shares @ holds.T).T[..., None]
        context = np.log(np.maximum(0.1 * holds @ prior, LEAST_OFFSET))[:, None]
        begin = _power_starts(losses, context[:, 0], starts, rng)
    all_losses, ones = losses[None], np.ones((1, count))
    noise = np.maximum(0.005 * losses.mean(0), 1e-9)
    for _ in range(2):
        params, leverage = _fit(name, features, context, all_losses, ones, begin, noise, STEPS)
        found = Fit(name, prior, holds, features, context, losses, noise, params[0], leverage[0].T)
        noise = _noise(losses - found.predicted, found.leverage)
        begin = np.broadcast_to(found.params[:, None], begin.shape)  # of one shape, for one compilation
    params, leverage = _fit(name, features, context, all_losses, ones, begin, noise, STEPS)
    return Fit(name, prior, holds, features, context, losses, noise, params[0], leverage[0].T)


def _log_linear_starts(
    shares: Float[np.ndarray, "N G"],
    losses: Float[np.ndarray, "N L"],
    prior: Float[np.ndarray, "G"],
    starts: int,
    rng: np.random.Generator,
) -> Float[np.ndarray, "L T P"]:
    """For c from near 0 to near the least loss: the regression of log(L - c) on the shares, by ridge; then jittered."""
    groups = shares.shape[1]
    begins: list[Float[np.ndarray, "L P"]] = []
    for u in np.linspace(-2.5, 2.0, starts) if starts > 1 else [0.0]:
        floor = losses.min(0) / (1 + np.exp(-u))
        logs = np.log(losses - floor)
        middle = logs.mean(0)
        slopes = np.linalg.solve(shares.T @ shares + 1e-2 * np.eye(groups), shares.T @ (logs - middle)) + middle
        slopes += 0.1 * rng.standard_normal(slopes.shape) if begins else 0.0
        at_prior = prior @ slopes
        excess = np.exp(at_prior)
        begins.append(np.vstack([np.full_like(excess, u), floor + excess, (slopes - at_prior) * excess]).T)
    return np.stack(begins, 1)


def _power_starts(
    losses: Float[np.ndarray, "N L"], offset: Float[np.ndarray, "L"], starts: int, rng: np.random.Generator
) -> Float[np.ndarray, "L S P"]:
    languages = losses.shape[1]
    begin = np.column_stack([np.log(losses.mean(0)) - 0.2, np.full(languages, 0.1), offset])[:, None]
    jitter = rng.standard_normal((languages, starts, 3)) * np.array([0.1, 0.1, 1.0])
    jitter[:, 0] = 0
    return begin + jitter


def _noise(residuals: Float[np.ndarray, "N L"], leverage: Float[np.ndarray, "N L"]) -> Float[np.ndarray, "L"]:
    """Standard deviation by language, for the degrees of freedom that the fit left; outliers cut at 2.5 medians."""
    free = np.maximum(len(residuals) - leverage.sum(0), 1)
    rough = 1.4826 * np.median(np.abs(residuals), 0) * np.sqrt(len(residuals) / free)
    cut = np.minimum(np.abs(residuals), 2.5 * rough)
    return np.maximum(np.sqrt((cut**2).sum(0) / free), 1e-9)


@contextmanager
def _float64_on_the_host() -> Iterator[None]:
    with jax.enable_x64(True), jax.default_device(jax.local_devices(backend="cpu")[0]):
        yield


def _fit(
    name: LawName,
    features: Float[np.ndarray, "L N F"],
    context: Float[np.ndarray, "L C"],
    losses: Float[np.ndarray, "S N L"],
    weights: Float[np.ndarray, "S N"],
    starts: Float[np.ndarray, "L T P"],
    noise: Float[np.ndarray, "L"],
    steps: int,
) -> tuple[Float[np.ndarray, "S L P"], Float[np.ndarray, "S L N"]]:
    """Of each sample and language, the best of all starts; with the leverage of each run."""
    with _float64_on_the_host():
        params, leverage = _program(FORMS[name], features, context, losses, weights, starts, noise, steps)
        return np.asarray(params), np.asarray(leverage)


@partial(jax.jit, static_argnums=0)
def _predictions(
    form: Form, params: Float[Array, "S L P"], features: Float[Array, "L N F"], context: Float[Array, "L C"]
) -> Float[Array, "S N L"]:
    of_runs = jax.vmap(form.predict, (None, 0, None))
    of_languages = jax.vmap(of_runs, (0, 0, 0), out_axes=1)
    return jax.vmap(of_languages, (0, None, None))(params, features, context)


@partial(jax.jit, static_argnums=0)
def _program(
    form: Form,
    features: Float[Array, "L N F"],
    context: Float[Array, "L C"],
    losses: Float[Array, "S N L"],
    weights: Float[Array, "S N"],
    starts: Float[Array, "L T P"],
    noise: Float[Array, "L"],
    steps: int,
) -> tuple[Float[Array, "S L P"], Float[Array, "S L N"]]:
    def one(features, context, losses, weights, starts, noise):  # type: ignore[no-untyped-def]
        problem = _Problem(form, features, context, losses, weights, noise)
        params, costs = jax.vmap(problem.descend, (0, None))(starts, steps)
        best = params[jnp.argmin(costs)]
        return best, problem.leverage(best)

    of_languages = jax.vmap(one, (0, 0, 1, None, 0, 0))
    return jax.vmap(of_languages, (None, None, 0, 0, None, None))(features, context, losses, weights, starts, noise)


@dataclass(frozen=True, eq=False)
class _Problem:
    """One language and sample, inside the program."""

    form: Form
    features: Float[Array, "N F"]
    context: Float[Array, "C"]
    losses: Float[Array, "N"]
    weights: Float[Array, "N"]
    noise: Float[Array, ""]

    def residuals(self, params: Array) -> Float[Array, "N"]:
        """In standard deviations of the noise."""
        predicted = jax.vmap(self.form.predict, (None, 0, None))(params, self.features, self.context)
        return (predicted - self.losses) / self.noise

    def cost(self, params: Array) -> Array:
        size = jnp.abs(self.residuals(params))
        huber = jnp.where(size <= HUBER, 0.5 * size**2, HUBER * (size - 0.5 * HUBER))
        return self.weights @ huber + 0.5 * (self.form.penalty(params, self.context) ** 2).sum()

    def linearised(self, params: Array) -> tuple[Array, Array, Array, Array]:
        """(gradient [P], Gauss-Newton matrix [P, P], Jacobian [N, P], weights with Huber's [N])."""
        residuals, jacobian = self.residuals(params), jax.jacfwd(self.residuals)(params)
        weights = self.weights * jnp.minimum(1, HUBER / jnp.maximum(jnp.abs(residuals), 1e-30))
        penalty = self.form.penalty(params, self.context)
        to_penalty = jax.jacfwd(self.form.penalty)(params, self.context)
        gradient = jacobian.T @ (weights * residuals) + to_penalty.T @ penalty
        return gradient, (jacobian.T * weights) @ jacobian + to_penalty.T @ to_penalty, jacobian, weights

    def descend(self, start: Float[Array, "P"], steps: int) -> tuple[Float[Array, "P"], Float[Array, ""]]:
        def step(state):  # type: ignore[no-untyped-def]
            params, cost, damping, count, _ = state
            gradient, matrix, _, _ = self.linearised(params)
            damped = matrix + jnp.diag(damping * jnp.diag(matrix) + 1e-9)
            change = cho_solve(cho_factor(damped), gradient)
            tried = params - change
            new = self.cost(tried)
            better = new <= cost  # False also where it is not finite
            settled = jnp.where(better, cost - new <= 1e-8 * (1 + cost), damping > 1e8)
            return (
                jnp.where(better, tried, params),
                jnp.where(better, new, cost),
                jnp.where(better, damping * 0.1, damping * 10),
                count + 1,
                settled,
            )

        first = (start, self.cost(start), jnp.asarray(1e-3, start.dtype), 0, False)
        state = jax.lax.while_loop(lambda state: ~state[4] & (state[3] < steps), step, first)
        return state[0], state[1]

    def leverage(self, params: Float[Array, "P"]) -> Float[Array, "N"]:
        _, matrix, jacobian, weights = self.linearised(params)
        solved = cho_solve(cho_factor(matrix + 1e-9 * jnp.eye(len(params))), jacobian.T)
        return weights * (jacobian.T * solved).sum(0)
