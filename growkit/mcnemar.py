"""McNemar's exact test: whether predictions on the same images changed one way more often than chance explains."""

from scipy.stats import binomtest


def mcnemar(turned_wrong: int, turned_right: int) -> float:
    """Exact two-sided p-value (binomial, one half); 1 if nothing changed."""
    turned = turned_wrong + turned_right
    return float(binomtest(turned_wrong, turned, 0.5).pvalue) if turned else 1.0
