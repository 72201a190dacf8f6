"""From a run directory to a `Recommender`."""

from __future__ import annotations

from onerec_jax.generate.recommender import Recommender, kept_frequencies
from onerec_jax.parallel.mesh import make_mesh
from onerec_jax.recipe import load_recipe
from onerec_jax.train.checkpoint import Checkpoints, parse_run
from onerec_jax.train.loop import load_inputs
from onerec_jax.train.optimizer import make_optimizer
from onerec_jax.train.promotion import served_run
from onerec_jax.train.state import abstract_state


def load_recommender(run: str, overrides: list[str] | tuple[str, ...] = (), *, runs: str = "runs") -> Recommender:
    """The newest checkpoint of RUN, or that of RUN@STEP, with settings overridden (the model's may not be).

    A run that was not promoted (`train.promotion`) has the parameters of the one it started from.

    Raises:
        InputError: no such run or checkpoint, or one that does not fit its dataset.
    """
    folder, step = parse_run(run, runs)
    recipe = load_recipe(str(folder / "config.yaml"), overrides)
    dataset, ids, model = load_inputs(recipe)
    abstract = abstract_state(model, make_optimizer(recipe.train, recipe.model.width_share), make_mesh(recipe.mesh))
    source, step = served_run(folder, step)
    checkpoints = Checkpoints(source)
    try:
        state, _ = checkpoints.restore(abstract, recipe, step)
    finally:
        checkpoints.close()
    return Recommender(folder, recipe, dataset, ids, model, state, kept_frequencies(folder))
