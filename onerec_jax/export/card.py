"""The model card: what a person needs to know before using an export, as Markdown."""

from __future__ import annotations

import json
from typing import Any

from onerec_jax.export.quantize import DType
from onerec_jax.generate.recommender import Recommender
from onerec_jax.model.onerec import count_parameters
from onerec_jax.storage import is_remote
from onerec_jax.train.loop import code_revision

LICENCES = {
    "kuairand": "KuaiRand is published under CC BY-SA 4.0: name it (Gao et al. 2022), and share what you make of it alike.",
    "amazon": "The Amazon review data are published for research; do not use this model for anything else.",
    "simulator": "The log is of a simulator: no person is in it, and no licence limits its use.",
    "parquet": "The log is the user's own; whether the model may be passed on is for its owner to say.",
}

_CARD = """\
# {name}

A generative recommender of the OneRec kind, step {step}. {what}

## Data

Source: {source}, {counts}.
{licence}
{personal}

Semantic IDs: {kind}, codebooks of {sizes}; {items:,} items share {leaves:,} IDs.

## Training

Recipe `{name}`, digest {digest}, code revision {revision}. {parameters:,} parameters without id tables, {tables:,} in id tables and
item vectors. Weights are stored as {dtype}{note}.

{recipe}
## Metrics

{metrics}

## Intended use

Lists of items for users of the platform whose log it was trained on, or of one like it. It repeats what that log holds: what was
popular stays popular, and what nobody was shown is not found. Scores order the items of one list; they are no promise that an
item will be watched. Lists are made with {k} items and {width} beams{exclude}.

## How to load it

```sh
python recommend.py --user ID          # jax and NumPy, nothing else
python pytorch_model.py --help         # torch and safetensors
```

```python
import recommend                       # StableHLO: CPU, GPU and TPU, any number of requests
served = recommend.load(".")
items, scores = served.recommend(served.features(served.users()[0]))

from onerec_jax.export.artifact import load_artifact      # JAX: the model, its parameters and its catalogue
artifact = load_artifact(".")
params, tables, bias = artifact.parameters
```

Training goes on from here with `onerec pretrain RECIPE train.init_from=DIR`{resumable}. `signature.json` names every input and
output of `recommend.stablehlo` and `score.stablehlo`. `hashes.json` has the SHA-256 of every file here, and loading checks them.
"""


def model_card(recommender: Recommender, config: dict[str, Any], dtype: DType, users: int) -> str:
    """The text of MODEL_CARD.md.

    Args:
        config: what `config.json` will hold.
        dtype: as which weights are stored.
        users: how many sample users the directory will hold.
    """
    dataset, ids, model, recipe = recommender.dataset, recommender.ids, recommender.model, recommender.recipe
    counts, parameters, kind = dataset.card["counts"], count_parameters(model), dataset.card["source"]["kind"]
    heads = {"codes": "semantic IDs", "items": "items", "both": "semantic IDs and items"}
    beside = "; norms, biases and routers are float32" if dtype != "float32" else ""
    return _CARD.format(
        name=recipe.name,
        step=config["step"],
        what=f"From a user's events it predicts {heads[model.config.head]}, and lists the items of the best.",
        source=kind,
        counts=", ".join(f"{counts[name]:,} {name.replace('_', ' ')}" for name in ("users", "items", "events")),
        licence=LICENCES[kind],
        personal=_personal(kind, users),
        kind=ids.kind,
        sizes=" × ".join(f"{size:,}" for size in ids.codebook_sizes),
        items=dataset.num_items,
        leaves=ids.trie.leaves,
        digest=config["recipe_digest"],
        revision=code_revision(),
        parameters=sum(parameters[part] for part in ("model", "codes", "features")),
        tables=parameters["tables"],
        dtype=dtype,
        note=f", one scale per output channel{beside}" if dtype == "int8" else beside,
        recipe="".join(f"    {line}\n" for line in recipe.to_yaml().splitlines()),
        metrics=_metrics(recommender),
        k=config["lists"]["k"],
        width=config["lists"]["width"],
        exclude=", without items that the user has met" if config["exclude_seen"] else "",
        resumable="" if dtype != "int8" else ", once it is exported as float32 or bfloat16",
    )


def _personal(kind: str, users: int) -> str:
    if not users:
        return "`users.jsonl` is empty: this directory holds no history of anyone."
    if kind == "simulator":
        return f"`users.jsonl` holds the histories of {users} simulated users at most."
    return (
        f"`users.jsonl` holds the histories of {users} people at most, which are personal data: export with `--users 0` before "
        "passing this on to who may not see them."
    )


def _metrics(recommender: Recommender) -> str:
    """The table of `evaluation.json`, or that there is none."""
    path = recommender.run / "evaluation.json"
    if is_remote(recommender.run) or not path.is_file():
        return "Not evaluated; `onerec evaluate RUN` before `onerec export RUN` writes a table here."
    found = json.loads(path.read_text(encoding="utf-8"))
    names = [name for name in found["rows"]["model"] if not name.endswith("±")]
    lines = ["| |" + "|".join(names) + "|", "|---|" + "---|" * len(names)]
    for row, metrics in found["rows"].items():
        cells = [f"{metrics[name]:.4f}" if name in metrics else "" for name in names]
        lines.append(f"|{row}|" + "|".join(cells) + "|")
    return f"{found['protocol']}; measured with float32 weights.\n\n" + "\n".join(lines)
