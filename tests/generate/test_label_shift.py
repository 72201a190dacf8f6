"""Scores corrected to new frequencies, against Bayes' rule on a population that is written out."""

import numpy as np

from onerec_jax.generate.label_shift import label_shift, shifted


def test_a_correction_is_bayes_rule_under_the_new_frequencies():
    """Users of three kinds like four items; the items' frequencies move, what a kind says about an item does not."""
    rng = np.random.default_rng(0)
    kind_of_item = rng.dirichlet(np.ones(3), size=4)  # P(kind | item), which stays
    old, new = rng.dirichlet(np.ones(4)), rng.dirichlet(np.ones(4))

    def item_of_kind(prior):
        joint = kind_of_item * prior[:, None]
        return (joint / joint.sum(axis=0)).T

    shift = label_shift(old, 1e6 * new, 1e-6)
    np.testing.assert_allclose(np.exp(shifted(np.log(item_of_kind(old)), shift)), item_of_kind(new), rtol=1e-4)


def test_the_prior_holds_back_what_few_events_say():
    own, recent = np.array([0.5, 0.3, 0.2]), np.array([0, 3, 1])
    np.testing.assert_allclose(label_shift(own, recent, 1e9), 0.0, atol=1e-6)
    expected = [(0 + 8 * 0.5) / 12 / 0.5, (3 + 8 * 0.3) / 12 / 0.3, (1 + 8 * 0.2) / 12 / 0.2]
    np.testing.assert_allclose(np.exp(label_shift(own, recent, 8.0)), expected, rtol=1e-6)
    np.testing.assert_allclose(np.exp(label_shift(7 * own, recent, 8.0)), expected, rtol=1e-6)


def test_corrected_scores_are_log_probabilities():
    log_p = np.log(np.random.default_rng(1).dirichlet(np.ones(5), size=3))
    np.testing.assert_allclose(np.exp(shifted(log_p, np.array([0.3, -2, 0, 1, 0.5]))).sum(axis=1), 1.0)
