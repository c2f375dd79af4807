"""Bayesian logistic regressions: as numerical integration has them, one at a time or many."""

import numpy as np
import pytest

from learning.judging.logistic import INTERCEPT_SD, fit_posteriors

PRIOR_SD = 2.0


def draw_outcomes(count: int, seed: int, slope: float = 1.0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return a feature (n,), outcomes (n,) that depend on it, and weights (n,)."""
    rng = np.random.default_rng(seed)
    feature = rng.normal(size=count)
    liked = (rng.random(count) < 1 / (1 + np.exp(-(0.5 + slope * feature)))).astype(float)
    return feature, liked, rng.uniform(0.5, 1, count)


def integrate(feature: np.ndarray, liked: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray, float]:
    """Return mean, covariance and log evidence on a fine grid of intercepts and slopes."""
    axis = np.linspace(-8, 8, 401)
    grid = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)
    logits = grid @ np.stack([np.ones_like(feature), feature])
    log = (weights * (liked * logits - np.logaddexp(0, logits))).sum(1)
    for value, sd in zip(grid.T, (INTERCEPT_SD, PRIOR_SD), strict=True):
        log -= 0.5 * (value / sd) ** 2 + np.log(sd * np.sqrt(2 * np.pi))
    mass = np.exp(log - log.max())
    evidence = float(np.log(mass.sum() * (axis[1] - axis[0]) ** 2) + log.max())
    mean = mass @ grid / mass.sum()
    away = grid - mean
    return mean, (mass[:, None] * away).T @ away / mass.sum(), evidence


@pytest.mark.parametrize("seed", range(3))
def test_a_posterior_and_its_evidence_are_those_of_numerical_integration(seed):
    told = draw_outcomes(80, seed)
    feature, liked, weights = told
    found = fit_posteriors(feature[None, :, None], liked, weights, PRIOR_SD)
    mean, covariance, evidence = integrate(*told)
    assert found.means[0] == pytest.approx(mean, abs=0.1)
    assert found.covariances[0] == pytest.approx(covariance, rel=0.2, abs=0.01)
    assert found.log_evidence[0] == pytest.approx(evidence, abs=0.05)
    other = fit_posteriors(feature[None, ::-1, None], liked, weights, PRIOR_SD)  # the control: another feature
    assert other.means[0] != pytest.approx(mean, abs=0.1)
    assert other.log_evidence[0] != pytest.approx(evidence, abs=0.05)


def test_many_regressions_at_once_are_those_of_one_at_a_time():
    rng = np.random.default_rng(0)
    inputs, (_, liked, weights) = rng.normal(size=(7, 30, 3)), draw_outcomes(30, 0)
    together = fit_posteriors(inputs, liked, weights, PRIOR_SD)
    for row, one in enumerate(inputs):
        alone = fit_posteriors(one[None], liked, weights, PRIOR_SD)
        assert together.means[row] == pytest.approx(alone.means[0], abs=1e-4)
        assert together.covariances[row] == pytest.approx(alone.covariances[0], abs=1e-4)
        assert together.log_evidence[row] == pytest.approx(alone.log_evidence[0], abs=1e-6)


def test_the_feature_that_people_mean_has_more_evidence_than_a_constant_rate_and_another_feature_less():
    feature, liked, weights = draw_outcomes(60, 1, slope=2.0)
    lot = np.random.default_rng(5).normal(size=60)
    meant, drawn = fit_posteriors(np.stack([feature, lot])[..., None], liked, weights, PRIOR_SD).log_evidence
    constant = fit_posteriors(np.zeros((1, 60, 0)), liked, weights, PRIOR_SD).log_evidence[0]
    assert drawn < constant < meant


@pytest.mark.parametrize("liked", [np.ones(5), np.zeros(5), np.array([1.0, 1, 1, 0, 0])], ids=["all", "none", "separable"])
def test_outcomes_without_a_finite_maximum_of_the_likelihood_have_a_posterior(liked):
    inputs = np.array([[[9.0], [8], [7], [-8], [-9]]])
    found = fit_posteriors(inputs, liked, np.ones(5), PRIOR_SD)
    assert all(np.isfinite(one).all() for one in (found.means, found.covariances, found.log_evidence))
    assert (np.linalg.eigvalsh(found.covariances[0]) > 0).all()
