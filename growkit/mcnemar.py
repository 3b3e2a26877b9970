"""McNemar's exact test: whether predictions on the same images changed one way more often than chance explains."""

from scipy.special import bdtr  # scipy.stats would take half a second to load


def mcnemar(turned_wrong: int, turned_right: int) -> float:
    """Exact two-sided p-value (binomial, one half); 1 if nothing changed."""
    turned = turned_wrong + turned_right
    return min(1.0, 2 * float(bdtr(min(turned_wrong, turned_right), turned, 0.5)))
