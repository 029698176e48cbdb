"""Linear probe: how well a linear classifier reads the classes off frozen features."""

import numpy as np
from jaxtyping import Float, Int

from cait_jax.errors import UserError


def probe_accuracy(
    train_features: Float[np.ndarray, "n d"],
    train_labels: Int[np.ndarray, "n"],
    test_features: Float[np.ndarray, "m d"],
    test_labels: Int[np.ndarray, "m"],
    *,
    inverse_l2: float = 1.0,
    max_iterations: int = 1000,
) -> float:
    """Fits multinomial logistic regression to standardised features and scores it.

    Each feature is shifted and scaled to mean 0 and variance 1 over the training examples. The fit is
    scikit-learn's `LogisticRegression` (L-BFGS), which warns where it has not converged.

    Args:
      train_features: one vector an example.
      train_labels: their classes.
      test_features: what to classify.
      test_labels: what is right.
      inverse_l2: the inverse of the strength of the L2 penalty, `C` of scikit-learn.
      max_iterations: of the fit at most.

    Returns:
      The share of test examples that are right, from 0 to 1.

    Raises:
      UserError: scikit-learn is missing, or the training examples have one class only.
    """
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise UserError(
            'the linear probe is fitted by scikit-learn: pip install "cait-jax[probe]"'
        ) from error
    if len(np.unique(train_labels)) < 2:
        raise UserError(
            "a linear probe tells classes apart, and the training examples have only one; choose a "
            "split with more"
        )
    probe = make_pipeline(
        StandardScaler(), LogisticRegression(C=inverse_l2, max_iter=max_iterations)
    )
    probe.fit(train_features, train_labels)
    return float(probe.score(test_features, test_labels))
