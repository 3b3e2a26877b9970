"""A comparison that takes seconds."""

from growkit.compare.settings import CompareSettings
from growkit.train.settings import FitSettings

INPUT = ("img_size=8", "patch_size=4", "in_chans=1", "mlp_ratio=2")
SMALL = (*INPUT, "num_heads=2", "embed_dim=16", "depth=1")
LARGE = ("num_heads=4", "mlp_ratio=2", "embed_dim=32", "depth=2")
RECIPE = FitSettings(
    epochs=6.25, batch_size=64, hflip=0, scale_min=0.8, color_jitter=0, workers=0, cache="device", precision="fp32"
)


def options(**given: object) -> CompareSettings:
    """Two methods, one seed, one run each; `given` says what differs."""
    quick = {
        "methods": "mango,lemon",
        "controls": "none",
        "seeds": 1,
        "budgets": "1",
        "lrs": "2e-3",
        "operator_steps": 3,
        "operator_lrs": "1e-3",
        "evals": 2,
        "share": 0.1,
    }
    return CompareSettings(**{**quick, **given})
