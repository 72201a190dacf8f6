"""Lists of a model with both heads, against the scores of every item by each of them."""

from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from tiny import ALONE, tiny_model

from onerec_jax.data.pipeline import make_batch
from onerec_jax.data.store import Dataset
from onerec_jax.generate.recommender import Recommender, scores_of_items
from onerec_jax.model.onerec import build
from onerec_jax.tokenizer.semantic_ids import SemanticIds


@pytest.mark.parametrize(("inferences", "weight"), [(1, 0.0), (1, 2.5), (2, 1.0)])
def test_beams_of_both_heads_are_ranked_by_both(tiny_recipe, inferences: int, weight: float):
    dataset, ids = Dataset(tiny_recipe.dataset_directory), SemanticIds.load(tiny_recipe.tokenizer_directory)
    config = tiny_model(**ALONE, head="both", softmax="legal", causal=True)
    settings = {"beam_width": ids.trie.leaves, "item_weight": weight, "inferences": inferences, "left_out": 0.0}
    recipe = tiny_recipe.model_copy(
        update={"model": config, "evaluate": tiny_recipe.evaluate.model_copy(update=settings)}
    )
    model = build(config, dataset.vocabulary(ids.codebook_sizes))
    params, tables = model.init(0)
    params["decoder"]["heads"] = jax.tree.map(lambda x: 5 * x, params["decoder"]["heads"])
    params["head"] = jax.tree.map(lambda x: 9 * x, params["head"])
    state = SimpleNamespace(params=params, tables=tables, bias=model.init_bias())
    recommender = Recommender(Path(), recipe, dataset, ids, model, state)  # type: ignore[arg-type]
    examples = np.asarray(dataset.examples("test")[:5])
    k, everything = dataset.num_items, np.tile(np.arange(dataset.num_items), (5, 1))
    found, scores = recommender.recommend(examples, None, k)

    batch = model.localise(make_batch(dataset, ids.codes, config, examples, 1, frozen=True), touched_only=False)[0]
    outputs = model.bind(params).outputs(batch, recommender.rows, state.bias, None)
    own = jax.nn.log_softmax(np.asarray(outputs.states[:, 0]) @ np.asarray(outputs.items).T)
    expected = scores_of_items(recommender, examples, everything) + weight * np.asarray(own)
    assert (np.sort(found, axis=1) == everything).all()
    np.testing.assert_allclose(scores, np.take_along_axis(expected, found, axis=1), atol=1e-4)
    assert (np.diff(scores, axis=1) <= 1e-6).all()
