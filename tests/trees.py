"""Parameters for tests."""

import jax
import numpy as np


def noisy(model, seed=0, std=0.3):
    """Parameters of a blueprint, large enough that every part of the model matters to its output: scales around 1,
    everything else around 0. Nothing is compiled for it.
    """
    rng = np.random.default_rng(seed)

    def draw(path, x):
        around = 1.0 if "scale" in jax.tree_util.keystr(path[-1:]) else 0.0
        return jax.numpy.asarray(around + std * rng.normal(size=x.shape), np.float32)

    return jax.tree_util.tree_map_with_path(draw, model.shapes)
