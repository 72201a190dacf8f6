"""What a recipe does, measured: each probe runs one part of the real code and returns an outcome to compare.

A probe is called in an empty working folder with (recipe, world); outcomes are compared with `==`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import grain
import jax
import jax.numpy as jnp
import numpy as np
import polars as pl
import pytest
from stand_ins import instant_reinforcement, instant_reward_training, instant_training, linear_model

from onerec_jax.config import MeshConfig, Recipe
from onerec_jax.data.checksums import sealed
from onerec_jax.data.pipeline import Pipeline, make_batch
from onerec_jax.data.prepare import prepare, write_dataset
from onerec_jax.data.schema import Tables
from onerec_jax.data.sources import load_tables
from onerec_jax.data.store import Dataset
from onerec_jax.data.train_log import train_log
from onerec_jax.errors import DamagedError, InputError, StoppedError
from onerec_jax.evaluate import stages
from onerec_jax.evaluate.evaluation import evaluate
from onerec_jax.evaluate.floors import fit_floor
from onerec_jax.evaluate.held_out import make_watch
from onerec_jax.evaluate.requests import collect_requests
from onerec_jax.evaluate.rerank import Reranker
from onerec_jax.generate import recommender
from onerec_jax.generate.beam import Beams
from onerec_jax.generate.ranking import rank
from onerec_jax.generate.step import make_catalogue as listed_catalogue
from onerec_jax.model.onerec import build
from onerec_jax.model.prefixes import device_trie, training_trie
from onerec_jax.parallel import distributed
from onerec_jax.parallel.mesh import make_mesh
from onerec_jax.parallel.sharding import shardings
from onerec_jax.posttrain import loop as rl_loop
from onerec_jax.posttrain.experience import make_experience
from onerec_jax.posttrain.group import Group
from onerec_jax.posttrain.judge import make_judge
from onerec_jax.posttrain.loop import reinforce, rl_recipe
from onerec_jax.posttrain.rollout import Rollout
from onerec_jax.posttrain.rsft import rsft_recipe
from onerec_jax.posttrain.step import Experience, make_rl_step
from onerec_jax.reward.candidates import make_catalogue
from onerec_jax.reward.pscore import build_reward, make_reward_loss
from onerec_jax.reward.training import reward_recipe, train_reward
from onerec_jax.tokenizer import kmeans
from onerec_jax.tokenizer.alignment import align
from onerec_jax.tokenizer.content import content_vectors
from onerec_jax.tokenizer.pairs import mine_pairs
from onerec_jax.tokenizer.semantic_ids import SemanticIds, fit_semantic_ids
from onerec_jax.train import loop as train_loop
from onerec_jax.train import session
from onerec_jax.train.checkpoint import POLICY
from onerec_jax.train.loop import load_inputs, pretrain
from onerec_jax.train.metrics import read_metrics
from onerec_jax.train.optimizer import make_optimizer
from onerec_jax.train.state import TrainState, init_state
from onerec_jax.train.step import make_train_step
from onerec_jax.train.watchdog import Watchdog


@dataclasses.dataclass(frozen=True)
class World:
    """What probes share: a small log, the tiny dataset with its semantic IDs, and pytest's monkeypatch."""

    tables: Tables
    dataset: Dataset
    ids: SemanticIds
    monkeypatch: pytest.MonkeyPatch


def digest(tree: Any) -> str:
    """A hash of the names, shapes, types and bytes of all arrays of a tree."""
    total = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        array = np.asarray(leaf)
        total.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
        total.update(str(array.tolist()).encode() if array.dtype == object else array.tobytes())
    return total.hexdigest()


# ------------------------------------------------------------------------------------------------------- data, tokenizer


def log_tables(recipe: Recipe, world: World) -> Any:
    """The canonical tables of the source."""
    _write_logs()
    tables = load_tables(recipe.data.source, recipe.seed)
    return [getattr(tables, name).to_pydict() for name in ("events", "items", "users")]


def _write_logs() -> None:
    """Every file format there is, in two variants: `one` has a single event, `two` has two."""
    users = {"user_id": ["0", "1"]} | {
        name: ["v", "w"]
        for name in (
            "user_active_degree", "is_live_streamer", "is_video_author", "follow_user_num_range", "fans_user_num_range",
            "friend_user_num_range", "register_days_range", *(f"onehot_feat{n}" for n in range(18)),
        )
    }  # fmt: skip
    flags = ("is_click", "long_view", "is_like", "is_follow", "is_comment", "is_forward", "is_hate", "is_profile_enter")
    times = {"date": 20220425, "time_ms": 1_650_900_000_000, "play_time_ms": 5, "duration_ms": 9}
    for count, name in enumerate(("one", "two"), start=1):
        folder = Path(name)
        folder.mkdir()
        pl.DataFrame({"user_id": [0, 1], "video_id": [7, 7]}).with_columns(
            **{column: pl.lit(value) for column, value in (times | dict.fromkeys(flags, 1)).items()}
        ).head(count).write_csv(folder / "log_standard_4_08_to_4_21_pure.csv")
        header = "video_id,author_id,video_type,upload_dt,upload_type,video_duration,music_id,tag"
        (folder / "video_features_basic_pure.csv").write_text(f"{header}\n7,1,NORMAL,2022-04-10,Web,9000.0,3,39\n")
        pl.DataFrame(users).write_csv(folder / "user_features_pure.csv")
        reviews = [{"reviewerID": f"A{n}", "asin": "B1", "unixReviewTime": 100} for n in range(count)]
        (folder / "reviews_Beauty_5.json").write_text("".join(json.dumps(review) + "\n" for review in reviews))
        events = pl.DataFrame({"user_id": [0, 1], "item_id": [7, 7], "timestamp_ms": [1, 2], "liked": [1, 0]})
        events.head(count).write_parquet(folder / "events.parquet")
    pl.DataFrame({"item_id": [7], "text": ["seven"]}).write_parquet("items.parquet")
    pl.DataFrame({"user_id": [0, 1], "age": [30, 40]}).write_parquet("users.parquet")


def dataset_files(recipe: Recipe, world: World) -> Any:
    """The content of the dataset directory made from the small log; its card is left out."""
    return Dataset(write_dataset(world.tables, recipe.data, Path("log"), recipe.seed, {})).card["content_hash"]


def dataset_place(recipe: Recipe, world: World) -> Any:
    """Where `prepare` writes."""
    prepare(recipe)
    return sorted(str(path) for path in Path().rglob("card.json"))


def semantic_ids_place(recipe: Recipe, world: World) -> Any:
    """Which semantic IDs training reads: those beside the dataset, or others in `elsewhere`."""
    shutil.copytree(world.dataset.directory / "semantic_ids", "elsewhere")
    card = json.loads(Path("elsewhere/card.json").read_text())
    Path("elsewhere/card.json").write_text(json.dumps(sealed(card | {"seed": 99})))
    return load_inputs(recipe)[1].origin["seed"]


def vectors(recipe: Recipe, world: World) -> Any:
    """Content vectors; a stand-in sentence model encodes a text as the hash of its own folder's name."""

    class SentenceTransformer:
        def __init__(self, folder: str, local_files_only: bool):
            self.value = hashlib.sha256(folder.encode()).digest()[:4]

        def encode(self, texts, batch_size, show_progress_bar):
            return np.tile(np.frombuffer(self.value, np.uint8), (len(texts), 1)).astype(np.float32)

    library = ModuleType("sentence_transformers")
    library.SentenceTransformer = SentenceTransformer  # type: ignore[attr-defined]
    world.monkeypatch.setitem(sys.modules, "sentence_transformers", library)
    for folder in ("model-a", "model-b"):
        Path(folder).mkdir()
    np.save("given.npy", np.eye(world.dataset.num_items, 3, dtype=np.float32))
    return digest(content_vectors(world.dataset, recipe.tokenizer, recipe.seed))


def aligned(recipe: Recipe, world: World) -> Any:
    """Aligned content vectors."""
    settings = recipe.tokenizer.alignment
    content = content_vectors(world.dataset, recipe.tokenizer, recipe.seed)
    return digest(align(content, mine_pairs(world.dataset, settings), settings, recipe.seed))


def semantic_ids(recipe: Recipe, world: World) -> Any:
    """Fitted codes, their sizes, and the order in which items of one ID are served."""
    ids = fit_semantic_ids(world.dataset, recipe.tokenizer, recipe.seed)
    return digest((ids.codes, ids.arrays, ids.trie.items)), ids.codebook_sizes


def assignments(recipe: Recipe, world: World) -> Any:
    """Shapes and precision of the batches that the quantizer assigns."""
    seen = []

    def recording(make: Any) -> Any:
        def made(precision: str) -> Any:
            def assign(rows, *rest):
                seen.append((rows.shape, precision))
                return make(precision)(rows, *rest)

            return assign

        return made

    for name in ("_assign_batch", "_lloyd_batch"):
        world.monkeypatch.setattr(kmeans, name, recording(getattr(kmeans, name)))
    fit_semantic_ids(world.dataset, recipe.tokenizer, recipe.seed)
    return seen


# -------------------------------------------------------------------------------------------------------- model and step


def _model(recipe: Recipe, world: World):
    return build(recipe.model, world.dataset.vocabulary(world.ids.codebook_sizes))


def _forward(recipe: Recipe, world: World):
    """The training forward pass of the recipe's model, and what to trace it with: parameters, rows, biases, a key."""
    built = _model(recipe, world)
    examples = world.dataset.examples("train")[:4]
    batch = make_batch(world.dataset, world.ids.codes, recipe.model, examples, recipe.data.targets)
    rows = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in built.tables.items()}

    trie = training_trie(recipe.model, world.ids.trie)

    def forward(params, rows, bias, key):
        return built.bind(params)(built.localise(batch, touched_only=False)[0], rows, bias, key, trie)

    return forward, (built.abstract, rows, jax.eval_shape(built.init_bias), jax.random.key(0))


def model(recipe: Recipe, world: World) -> Any:
    """Shapes of parameters, rows and biases, and the compiler's input for the forward pass, dead code removed."""
    forward, arguments = _forward(recipe, world)
    shapes = jax.tree.map(lambda leaf: leaf.shape, arguments[:3])
    return str(shapes), jax.jit(forward).lower(*arguments).as_text()


def kept_for_backward(recipe: Recipe, world: World) -> Any:
    """Shapes of all arrays that the forward pass keeps for the backward pass."""
    forward, arguments = _forward(recipe, world)
    backward = jax.eval_shape(lambda params, *rest: jax.vjp(lambda p: forward(p, *rest)[0], params)[1], *arguments)
    return sorted(leaf.shape for leaf in jax.tree.leaves(backward))


def layout(recipe: Recipe, world: World) -> Any:
    """The mesh over eight devices and where each parameter lives on it, or why there is no such mesh."""
    try:
        mesh = make_mesh(recipe.mesh, jax.devices()[:1] * 8)
    except InputError as error:
        return str(error)
    places = shardings(_model(recipe, world).abstract, mesh)
    return dict(mesh.shape), str(jax.tree.map(lambda place: place.spec, places))


def joined(recipe: Recipe, world: World) -> Any:
    """How a process joins the others."""
    calls = []
    world.monkeypatch.setattr(jax.distributed, "initialize", lambda *arguments: calls.append(arguments))
    distributed.start(recipe.distributed)
    return calls


def experts_on_a_mesh(recipe: Recipe, world: World) -> Any:
    """What the forward pass does on two devices that share the experts."""
    forward, arguments = _forward(recipe, world)
    with jax.sharding.use_abstract_mesh(make_mesh(MeshConfig(expert=2), jax.devices()[:1] * 2).abstract_mesh):
        return str(jax.make_jaxpr(forward)(*arguments))


def batch(recipe: Recipe, world: World) -> Any:
    """The first training batch."""
    return digest(Pipeline(world.dataset, world.ids.codes, recipe).batch_at(0))


def step(recipe: Recipe, world: World) -> Any:
    """The compiler's input for the whole train step of a linear model, dead code removed, and its micro-batches."""
    linear = linear_model(recipe.model, world.dataset.vocabulary(world.ids.codebook_sizes))
    optimizer = make_optimizer(recipe.train, recipe.model.width_share)
    state = jax.eval_shape(lambda: init_state(linear, optimizer, 0))
    examples = Pipeline(world.dataset, world.ids.codes, recipe).batch_at(0)
    return jax.jit(make_train_step(linear, recipe, optimizer)).lower(state, examples).as_text(), linear.micro_batches


def item_step(recipe: Recipe, world: World) -> Any:
    """The compiler's input for the train step of the recipe's own model."""
    built, optimizer = _model(recipe, world), make_optimizer(recipe.train, recipe.model.width_share)
    state = jax.eval_shape(lambda: init_state(built, optimizer, 0))
    examples = Pipeline(world.dataset, world.ids.codes, recipe).batch_at(0)
    trie = training_trie(recipe.model, world.ids.trie)
    return jax.jit(make_train_step(built, recipe, optimizer)).lower(state, examples, trie).as_text()


# ---------------------------------------------------------------------------------------------------------- train/loop


def training(recipe: Recipe, world: World) -> Any:
    """What a run leaves behind."""
    instant_training(world.monkeypatch)
    run = pretrain(recipe, lambda line: None)
    kept = ("step", "loss", "valid/loss")
    return {
        "run": str(run),
        "lines": [{name: line[name] for name in kept if name in line} for line in read_metrics(run)],
        "checkpoints": sorted(path.name for path in (run / "checkpoints").iterdir()),
        "tensorboard": (run / "tensorboard").is_dir(),
        "profile": (run / "profile").is_dir(),
    }


def patience(recipe: Recipe, world: World) -> Any:
    """Seconds after which a step of a run whose steps take 20 is a hang."""
    now = [0.0]
    watchdog = Watchdog(recipe.faults, Path("stacks"), lambda code: None, lambda: now[0])
    for _ in range(5):
        watchdog.beat()
        now[0] += 20.0
    watchdog.close()
    return watchdog.limit()


def diverging(recipe: Recipe, world: World) -> Any:
    """What a run says whose loss is five times what it was from step 5 on."""
    said: list[str] = []

    def compile_step(step, abstract, mesh):
        def stand_in(state, batch, trie):
            metrics = {"loss": (5.0 if int(state.step) >= 4 else 1.0, 1.0), "skipped": (0.0, 1.0)}
            return dataclasses.replace(state, step=state.step + 1), metrics

        return stand_in

    world.monkeypatch.setattr(train_loop, "build", linear_model)
    world.monkeypatch.setattr(train_loop, "compile_step", compile_step)
    with contextlib.suppress(StoppedError):
        pretrain(recipe, said.append)
    return [line.partition("  ")[0] for line in said]


def damaged_records(recipe: Recipe, world: World) -> Any:
    """Whether a batch can be made where one history cannot be read."""
    first = world.dataset.examples("train")[0, 0]
    histories = Dataset.histories

    def damaged(dataset, users):
        if first in np.asarray(users):
            raise DamagedError("damaged")
        return histories(dataset, users)

    world.monkeypatch.setattr(Dataset, "histories", damaged)
    pipeline = Pipeline(world.dataset, world.ids.codes, recipe)
    made = []
    for step in range(20):
        try:
            made.append(digest(pipeline.batch_at(step)))
        except DamagedError:
            made.append("damaged")
    return made


def promotion(recipe: Recipe, world: World) -> Any:
    """Which stages' runs are compared with what they began from; nothing is trained."""
    compared: list[str] = []
    world.monkeypatch.setattr(stages, "check_promotable", lambda recipe: None)
    world.monkeypatch.setattr(stages, "promote", lambda run, *given: compared.append(run))
    world.monkeypatch.setattr(stages, "rsft", lambda recipe, report: "rsft")
    world.monkeypatch.setattr(stages, "reinforce", lambda recipe, make_watch, report: "rl")
    stages.fine_tune(recipe, lambda line: None)
    stages.reinforce_watched(recipe, lambda line: None)
    return compared


def served(recipe: Recipe, world: World) -> Any:
    """The port on which a run serves its metrics."""
    ports: list[int] = []
    stand_in = SimpleNamespace(show=lambda *given: None, close=lambda: None)
    world.monkeypatch.setattr(session, "Served", lambda port: ports.append(port) or stand_in)
    training(recipe, world)
    return ports


def start(recipe: Recipe, world: World) -> Any:
    """The parameters that a run starts from; a run named `other` is there before it."""
    started = instant_training(world.monkeypatch)
    fresh = recipe.train.model_copy(update={"init_from": None})
    pretrain(recipe.model_copy(update={"name": "other", "train": fresh}), lambda line: None)
    before = len(started)
    pretrain(recipe, lambda line: None)
    return digest(started[before].params)


def loader(recipe: Recipe, world: World) -> Any:
    """The settings with which Grain reads ahead; its worker processes are not started."""
    asked = []
    read_options, worker_options = grain.ReadOptions, grain.MultiprocessingOptions

    def reading(**settings):
        asked.append(settings)
        return read_options(**settings)

    def multiprocessing(*settings, **named):
        asked.append((settings, named))
        return worker_options(*settings, **named)

    world.monkeypatch.setattr(grain, "ReadOptions", reading)
    world.monkeypatch.setattr(grain, "MultiprocessingOptions", multiprocessing)
    world.monkeypatch.setattr(grain.IterDataset, "mp_prefetch", lambda self, options: self)
    pipeline = Pipeline(world.dataset, world.ids.codes, recipe)
    next(pipeline)
    pipeline.close()
    return asked


# ------------------------------------------------------------------------------------------------------------- evaluate


def board(recipe: Recipe, world: World) -> Any:
    """The evaluation's table for a stand-in model that recommends the first items not seen."""

    def recommend(examples, seen, k, progress):
        return rank(np.tile(-np.arange(world.dataset.num_items, dtype=float), (len(examples), 1)), seen, k), None

    stand_in = SimpleNamespace(
        recipe=recipe, dataset=world.dataset, run=Path(), recommend=recommend, legality=lambda rows: float(len(rows))
    )
    return evaluate(stand_in, lambda line: None).rows  # type: ignore[arg-type]


def floor_scores(recipe: Recipe, world: World) -> Any:
    """Scores of the first floor named."""
    requests = collect_requests(world.dataset, recipe)
    return digest(fit_floor(recipe.evaluate.floors[0], train_log(world.dataset), recipe.evaluate)(requests.context))


def searches(recipe: Recipe, world: World) -> Any:
    """Width and batch size of every beam search of an evaluation."""
    asked = []

    def make_beam_search(model, width):
        def search(params, rows, bias, batch, trie):
            size = batch.user.shape[0]
            asked.append((width, size))
            nothing = jnp.full((size, width), -1, jnp.int32)
            return Beams(jnp.zeros((size, width, 3), jnp.int32), nothing, jnp.zeros((size, width)))

        return search

    world.monkeypatch.setattr(recommender, "make_beam_search", make_beam_search)
    state = SimpleNamespace(params={}, tables={}, bias={})
    examples = world.dataset.examples("test")[:20]
    built = recommender.Recommender(Path(), recipe, world.dataset, world.ids, None, state)  # type: ignore[arg-type]
    built.recommend(np.asarray(examples), None, max(recipe.evaluate.ks))
    return asked


def lists(recipe: Recipe, world: World) -> Any:
    """Lists of an untrained model."""
    built = _model(recipe, world)
    params, tables = built.init(0)
    state = SimpleNamespace(params=params, tables=tables, bias=built.init_bias())
    examples = np.asarray(world.dataset.examples("test")[:4])
    made = recommender.Recommender(Path(), recipe, world.dataset, world.ids, built, state)  # type: ignore[arg-type]
    return digest(made.recommend(examples, None, 5))


def judged_board(recipe: Recipe, world: World) -> Any:
    """The same, or which reward model it misses."""
    try:
        return board(recipe, world)
    except InputError as error:
        return str(error)


def reranked(recipe: Recipe, world: World) -> Any:
    """What a reranker lists where the reward model likes the last item most."""
    run = SimpleNamespace(
        recipe=recipe, recommend=lambda *_, **__: (np.array([[1, 2, 3]]), np.array([[-1.0, -1.1, -2.0]]))
    )
    scorer: Any = lambda *_: {"p_score": np.array([[0.1, 0.2, 0.3]])}  # noqa: E731
    items, scores = Reranker(run, scorer).recommend(np.zeros((1, 4)), None, 3)  # type: ignore[arg-type]
    return items.tolist(), scores.tolist()


# ----------------------------------------------------------------------------------------------------------- posttrain


def fine_tuning(recipe: Recipe, world: World) -> Any:
    """The settings of the pre-training that RSFT is."""
    return rsft_recipe(recipe).train


def reward_loss(recipe: Recipe, world: World) -> Any:
    """The compiler's input for the loss of the reward model."""
    recipe = reward_recipe(recipe)
    built = build_reward(recipe.reward, world.dataset.vocabulary(world.ids.codebook_sizes))
    given = (
        Pipeline(world.dataset, world.ids.codes, recipe).batch_at(0),
        make_catalogue(world.dataset, world.ids.codes),
    )
    return jax.jit(make_reward_loss(built)).lower(built.abstract, *given, jax.random.key(0)).as_text()


def reward_training(recipe: Recipe, world: World) -> Any:
    """What batches a run of the reward model reads, and what it leaves behind."""
    shapes = instant_reward_training(world.monkeypatch)
    run = train_reward(recipe, lambda line: None)
    return shapes, [(line["step"], line["loss"]) for line in read_metrics(run)]


def experience(recipe: Recipe, world: World) -> Any:
    """The compiler's input for the generation of candidates."""
    recipe = rl_recipe(recipe)
    built, request = _model(recipe, world), Pipeline(world.dataset, world.ids.codes, recipe).batch_at(0)
    params, tables = jax.eval_shape(lambda: built.init(0))
    policy = {"params": params, "tables": tables, "bias": jax.eval_shape(built.init_bias)}
    items = world.dataset.items
    listed = listed_catalogue(world.ids.trie, recipe.model, items.author, items.tag)
    catalogue = make_catalogue(world.dataset, world.ids.codes)
    given = (policy, policy, None, catalogue, listed, request, request, jax.random.key(0))
    made: Any = make_experience(built, recipe, world.dataset.labels, None)
    return made.lower(*given).as_text()


def judgement(recipe: Recipe, world: World) -> Any:
    """The compiler's input for what candidates earn."""
    request = Pipeline(world.dataset, world.ids.codes, recipe).batch_at(0)
    shape = (len(request.user), 3)
    codes, row = np.zeros((*shape, 3), np.int32), np.zeros(shape, np.int32)
    log_p = np.zeros((*shape, 3), np.float32)
    rollout = Rollout(codes, row, row, row == 0, log_p[..., 0], log_p, log_p)  # type: ignore[arg-type]
    given = (make_catalogue(world.dataset, world.ids.codes), request, request, rollout)
    return jax.jit(make_judge(recipe, world.dataset.labels, None)).lower(None, *given).as_text()


def rl_step(recipe: Recipe, world: World) -> Any:
    """The compiler's input for the whole RL step of a linear model, of three candidates per request."""
    recipe = rl_recipe(recipe)
    linear = linear_model(recipe.model, world.dataset.vocabulary(world.ids.codebook_sizes))
    optimizer = make_optimizer(recipe.train, recipe.model.width_share)
    state = jax.eval_shape(lambda: init_state(linear, optimizer, 0))
    logged = Pipeline(world.dataset, world.ids.codes, recipe).batch_at(0)
    shape = (len(logged.user), 3)
    codes, log_p = np.zeros((*shape, 1), np.int32), np.zeros((*shape, 1), np.float32)
    value, yes = np.zeros(shape, np.float32), np.ones(shape, bool)
    group = Group(log_p, log_p, log_p, value, yes, yes, value)  # type: ignore[arg-type]
    seen = Experience(logged, codes, group, codes, log_p, yes)  # type: ignore[arg-type]
    trie = device_trie(world.ids.trie, recipe.model)
    return jax.jit(make_rl_step(linear, recipe, optimizer)).lower(state, logged, seen, trie).as_text()


def reinforcement(recipe: Recipe, world: World) -> Any:
    """What an RL run is made from and what it leaves behind; its held-out recall falls by a tenth at every look."""
    instant_training(world.monkeypatch)
    steps, looks = instant_reinforcement(world.monkeypatch), iter(range(99))
    world.monkeypatch.setattr(rl_loop, "_start_policy", _zeros)
    with contextlib.suppress(StoppedError):
        reinforce(recipe, lambda *_: lambda *_: {"recall": 0.9 ** next(looks)}, lambda line: None)
    run = rl_recipe(recipe).run_directory
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {
        "lines": [line | {"time": 0} for line in lines],
        "checkpoints": sorted(path.name for path in (run / "checkpoints").iterdir()),
        "behaviour": [digest(step["behaviour"]) for step in steps],
        "requests": [step["request"].target_item.shape for step in steps],
        "answered": [int((step["request"].target_item >= 0).sum()) for step in steps],
        "logged": [len(step["logged"].user) for step in steps],
    }


def rl_without_a_start(recipe: Recipe, world: World) -> Any:
    """Which run RL says that it misses, where there is none."""
    instant_training(world.monkeypatch)
    with pytest.raises(InputError) as error:
        reinforce(recipe, make_watch, lambda line: None)
    return str(error.value)


def _zeros(recipe: Recipe, abstract: TrainState) -> Any:
    """A policy to start from that needs no run before it."""

    def place(leaf):
        return jax.device_put(np.zeros(leaf.shape, leaf.dtype), leaf.sharding)

    return {name: jax.tree.map(place, getattr(abstract, name)) for name in POLICY}


def watched(recipe: Recipe, world: World) -> Any:
    """What RL is watched by, for a stand-in model that recommends the first items."""
    asked = []

    def recommend(examples, seen, k):
        asked.append((len(examples), k))
        return rank(np.tile(-np.arange(world.dataset.num_items, dtype=float), (len(examples), 1)), seen, k), None

    stand_in = SimpleNamespace(recommend=recommend, legality=lambda rows: float(len(rows)))
    return make_watch(recipe, world.dataset)(stand_in, None), asked  # type: ignore[arg-type]
