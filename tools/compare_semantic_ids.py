"""All constructions of semantic IDs on one dataset: reconstruction, utilisation, entropy, collisions, neighbours, recall.

    onerec data beauty_small data.source.path=FOLDER
    python tools/compare_semantic_ids.py beauty_small                      the figures of the IDs alone
    python tools/compare_semantic_ids.py beauty_small --seeds 3 --steps 500    and Recall@10 of one small model on each

Every construction quantizes the same content vectors. The model of the last column is the same for all, with the same budget;
items that share an ID get an extra level there. Every result is kept in `RESULTS/RECIPE/` as it comes, so a run that was
stopped goes on, and `--part 1/2` and `--part 2/2` share the work between two processes. Prints the table as Markdown, with the
rank correlation of each figure with recall. Overrides of the recipe may follow as KEY=VALUE.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata

from onerec_jax.config import Recipe
from onerec_jax.data.store import Dataset
from onerec_jax.recipe import load_recipe
from onerec_jax.tokenizer.content import content_vectors, train_co_occurrence
from onerec_jax.tokenizer.neighbours import neighbour_recall
from onerec_jax.tokenizer.semantic_ids import fit_semantic_ids

KIND = "tokenizer.quantizer.kind"
CONSTRUCTIONS: dict[str, list[str]] = {
    "residual k-means": [],
    "residual k-means, level 3 balanced": ["tokenizer.quantizer.balanced_levels=[3]"],
    "residual k-means, all balanced": ["tokenizer.quantizer.balanced_levels=[1,2,3]"],
    "residual k-means, aligned content": ["tokenizer.alignment.steps=1000"],
    "RQ-VAE": [f"{KIND}=rq_vae"],
    "RQ-VAE, rotation trick": [f"{KIND}=rq_vae", "tokenizer.quantizer.estimator=rotation"],
    "RQ-VAE, LETTER": [
        f"{KIND}=rq_vae", "tokenizer.quantizer.collaborative_weight=0.02", "tokenizer.quantizer.diversity_weight=0.001"
    ],
    "OPQ": [f"{KIND}=product"],
    "FSQ": [f"{KIND}=fsq"],
    "hierarchical k-means, 3 x 32": [f"{KIND}=hierarchical", "tokenizer.codebook_sizes=[32,32,32]"],
    "co-occurrence graph, 3 x 32": [
        f"{KIND}=hierarchical", "tokenizer.quantizer.of=co_occurrence", "tokenizer.codebook_sizes=[32,32,32]"
    ],
    "sequential": [f"{KIND}=sequential"],
    "random": [f"{KIND}=random"],
}  # fmt: skip
SMALL_MODEL = [
    "model.d_model=64", "model.ffn_hidden=128", "model.encoder_layers=1", "model.decoder_layers=1", "model.dropout=0",
    "model.item_input=sid", "model.event_features=[]", "model.project_events=true", "model.short_length=10",
    "model.head=codes", "model.softmax=all", "train.batch_size=128", "train.length_buckets=[]", "train.label_smoothing=0",
    "train.learning_rate=3e-3", "train.b2=0.95", "train.warmup_steps=100",
    "train.eval_every=0", "train.checkpoint_every=1000000", "train.tensorboard=false",
    "evaluate.split=valid", "evaluate.max_examples=4000", "evaluate.beam_width=20", "evaluate.free_examples=0",
    "evaluate.floors=[]",
]  # fmt: skip


def figures(recipe: Recipe, dataset: Dataset, co_occurrence: Any) -> dict[str, Any]:
    """Quality of the IDs before items of one ID are told apart."""
    settings = recipe.tokenizer.model_copy(update={"dedup": "none"})
    content = content_vectors(dataset, settings, recipe.seed)
    started = time.perf_counter()
    ids = fit_semantic_ids(dataset, settings, recipe.seed, content)
    seconds = time.perf_counter() - started
    kept = neighbour_recall(ids.codes[:, : ids.levels], content, co_occurrence, sample=2000)
    levels = ids.quality["levels"]
    variance = float(np.mean((content - content.mean(0)) ** 2))
    return {
        "seconds": seconds,
        "unexplained": ids.quality["reconstruction_mse"] / variance if not recipe.tokenizer.alignment.steps else None,
        "utilisation": [level["utilisation"] for level in levels],
        "entropy": [level["entropy"] for level in levels],
        "collisions": ids.quality["collision_rate"],
        "content": kept["content"][:2],
        "co_clicked": kept["co_clicked"][:2],
        "chance": kept["chance"][:2],
    }


def trained_recall(recipe: Recipe) -> float:
    """Recall@10 of the recipe's model trained on the recipe's IDs."""
    from onerec_jax.evaluate.evaluation import evaluate
    from onerec_jax.generate.load import load_recommender
    from onerec_jax.train.loop import pretrain

    dataset = Dataset(recipe.dataset_directory)
    fit_semantic_ids(dataset, recipe.tokenizer, recipe.seed).save(recipe.tokenizer_directory)
    run = pretrain(recipe, lambda line: None)
    return evaluate(load_recommender(str(run)), lambda line: None).rows["model"]["R@10"]


def row(name: str, found: dict[str, Any], recalls: list[float]) -> str:
    def numbers(values: list[float], digits: int) -> str:
        return " ".join(f"{value:.{digits}f}" for value in values)

    spread = f" ± {np.std(recalls, ddof=1):.4f}" if len(recalls) > 1 else ""
    cells = [
        name,
        "–" if found["unexplained"] is None else f"{found['unexplained']:.3f}",
        numbers(found["utilisation"], 3),
        numbers(found["entropy"], 2),
        f"{found['collisions']:.3f}",
        numbers(found["content"], 3),
        numbers(found["co_clicked"], 3),
        f"{found['seconds']:.0f}",
        f"{np.mean(recalls):.4f}{spread}" if recalls else "",
    ]
    return "| " + " | ".join(cells) + " |"


PREDICTORS: dict[str, Callable[[dict[str, Any]], float | None]] = {
    "unexplained variance": lambda found: found["unexplained"],
    "utilisation, least of the levels": lambda found: min(found["utilisation"]),
    "entropy of level 1": lambda found: found["entropy"][0],
    "entropy, mean of the levels": lambda found: float(np.mean(found["entropy"])),
    "items that share an ID": lambda found: found["collisions"],
    "content neighbours at 1 code": lambda found: found["content"][0],
    "content neighbours at 2 codes": lambda found: found["content"][1],
    "co-clicked neighbours at 1 code": lambda found: found["co_clicked"][0],
    "co-clicked neighbours at 2 codes": lambda found: found["co_clicked"][1],
}


# Codes of these stand for an item or a cluster of items, so that their error is that of knowing which, not of a codebook.
WITHOUT_CODEBOOKS = ("hierarchical", "co-occurrence", "sequential", "random")


def predictors(figures_of: dict[str, dict[str, Any]], recall_of: dict[str, list[float]]) -> list[str]:
    """Spearman's rank correlation of each figure with mean recall: over all constructions, and those with codebooks."""
    groups = [list(recall_of), [name for name in recall_of if not name.startswith(WITHOUT_CODEBOOKS)]]
    lines = ["| figure | rank correlation with Recall@10 | among constructions with codebooks |", "|---|---|---|"]
    for name, figure in PREDICTORS.items():
        cells = [_correlation([(figure(figures_of[key]), recall_of[key]) for key in group]) for group in groups]
        if any(cells):
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return lines if len(lines) > 2 else []


def _correlation(pairs: list[tuple[float | None, list[float]]]) -> str:
    known = [(value, np.mean(recalls)) for value, recalls in pairs if value is not None and recalls]
    if len(known) < 3 or len({value for value, _ in known}) < 2:
        return ""
    ranks = [rankdata(column) for column in zip(*known, strict=True)]
    return f"{np.corrcoef(*ranks)[0, 1]:+.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--seeds", type=int, default=0, help="models trained per construction")
    parser.add_argument("--steps", type=int, default=500, help="training steps of each")
    parser.add_argument(
        "--part",
        default="1/1",
        help="which results this process makes where they are missing: every N-th from the I-th, as I/N",
    )
    parser.add_argument("--results", default="comparison", help="folder that keeps the results; runs go to comparison/")
    parser.add_argument("--show", action="store_true", help="make nothing; print the table of what there is")
    parser.add_argument("--only", default="", help="constructions whose name contains this")
    given = parser.parse_intermixed_args()
    base = load_recipe(given.recipe, given.overrides)
    dataset = Dataset(base.dataset_directory)
    co_occurrence = train_co_occurrence(dataset)
    changed = hashlib.sha256("\n".join(sorted(given.overrides)).encode()).hexdigest()[:8]
    name = f"{base.name}_{changed}" if given.overrides else base.name
    folder, results = Path("comparison") / name, Path(given.results) / name
    results.mkdir(parents=True, exist_ok=True)
    chosen = {name: changes for name, changes in CONSTRUCTIONS.items() if given.only in name}
    part, parts = map(int, given.part.split("/"))

    def kept(file: Path, make: Callable[[], Any]) -> Any:
        """What a file holds; made first where it is missing and its turn is this process'."""
        nonlocal turn
        turn += 1
        if not file.exists():
            if given.show or turn % parts != part % parts:
                return None
            partial = file.with_suffix(".partial")
            partial.write_text(json.dumps(make(), indent=1) + "\n")
            partial.rename(file)
            print(f"{file.stem}: {file.read_text()}", flush=True)
        return json.loads(file.read_text())

    turn = 0
    figures_of, recall_of = {}, {name: [] for name in chosen}
    for name, changes in chosen.items():
        recipe = load_recipe(given.recipe, [*given.overrides, *changes])
        figures_of[name] = kept(results / f"{_file(name)}.json", lambda r=recipe: figures(r, dataset, co_occurrence))
    for seed in range(given.seeds):
        for name, changes in chosen.items():
            own = f"{_file(name)}_{seed}"
            recipe = load_recipe(
                given.recipe,
                [
                    *given.overrides, *SMALL_MODEL, *changes, f"seed={seed}", f"train.steps={given.steps}",
                    "tokenizer.dedup=extra_level", f"name=comparison_{own}", f"runs={folder}/runs",
                    f"data.directory={base.dataset_directory}", f"tokenizer.directory={folder}/ids/{own}",
                ],
            )  # fmt: skip
            recall = kept(results / f"{own}_{given.steps}.json", lambda r=recipe: trained_recall(r))
            if recall is not None:
                recall_of[name].append(recall)
    if parts > 1:
        return
    head = (
        "construction", "unexplained variance", "utilisation", "entropy, nats", "items that share an ID",
        "content neighbours at 1, 2 codes", "co-clicked neighbours at 1, 2 codes", "fit, s", "Recall@10",
    )  # fmt: skip
    print("| " + " | ".join(head) + " |\n|" + "---|" * len(head))
    figures_of = {name: found for name, found in figures_of.items() if found}
    recall_of = {name: recall_of[name] for name in figures_of}
    for name in figures_of:
        print(row(name, figures_of[name], recall_of[name]))
    print("\n".join(["", *predictors(figures_of, recall_of)]))


def _file(name: str) -> str:
    return name.replace(" ", "_").replace(",", "")


if __name__ == "__main__":
    main()
