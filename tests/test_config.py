"""Recipes: what is read, inherited, overridden, refused and printed."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from onerec_jax import config
from onerec_jax.config import RQVAE, FiniteScalarQuantizer, Recipe, Section
from onerec_jax.errors import InputError
from onerec_jax.recipe import CONFIGS, load_recipe, make_recipe

RECIPES = sorted(path.stem for path in CONFIGS.glob("*.yaml"))
SIMULATED = "data: {source: {kind: simulator}}\n"


@pytest.fixture
def write(tmp_path: Path):
    """Writes a recipe file and gives its path."""

    def make(text: str, name: str = "mine") -> str:
        path = tmp_path / f"{name}.yaml"
        path.write_text(text)
        return str(path)

    return make


def refusal(*arguments) -> str:
    with pytest.raises(InputError) as caught:
        load_recipe(*arguments)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_resolves_to_its_golden_file(name: str, golden):
    golden(f"config/{name}.yaml", load_recipe(name).to_yaml())


def test_every_golden_config_is_of_a_recipe_that_exists():
    folder = Path(__file__).parent / "golden" / "config"
    assert sorted(path.stem for path in folder.iterdir()) == RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_the_yaml_of_a_recipe_loads_to_an_equal_recipe(name: str, write):
    recipe = load_recipe(name)
    again = load_recipe(write(recipe.to_yaml(), "printed"))
    assert again == recipe and again.digest() == recipe.digest()


@settings(max_examples=30, deadline=None)
@given(
    runs=st.sampled_from(["null", "~", "true", "no", "1", "1e5", "0x10", "1_000", "2022-05-01", "- a", "a: b", "#", ""])
    | st.text(st.characters(exclude_characters="$", exclude_categories=["C"]), max_size=8),
    rate=st.floats(min_value=0, exclude_min=True, allow_infinity=False),
)
def test_strings_and_floats_survive_being_printed_as_yaml(tmp_path_factory, runs: str, rate: float):
    recipe = make_recipe(
        {"name": "1e5", "runs": runs, "data": {"source": {"kind": "simulator"}}, "train": {"learning_rate": rate}}
    )
    path = tmp_path_factory.getbasetemp() / "printed.yaml"
    path.write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(str(path)) == recipe


def is_section(kind: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, Section)


def test_every_setting_is_described():
    sections = [value for value in vars(config).values() if is_section(value) and value is not Section]
    assert Recipe in sections and len(sections) >= 13
    for section in sections:
        assert section.__doc__
        for name, field in section.model_fields.items():
            tag = name == "kind"
            assert field.description or tag or is_section(field.annotation), f"{section.__name__}.{name}"


def test_the_digest_changes_with_any_setting_and_with_nothing_else():
    changes = ([], ["seed=1"], ["train.b1=0.5"], ["evaluate.ks=[3]"], ["data.source.users=9"])
    assert len({load_recipe("quickstart", change).digest() for change in changes}) == len(changes)
    assert load_recipe("quickstart", ["train.b1=0.9"]).digest() == load_recipe("quickstart").digest()
    kinds = {
        load_recipe("quickstart", [f"tokenizer.quantizer.kind={kind}"]).digest() for kind in ("rq_vae", "random", "fsq")
    }
    assert len(kinds) == 3


def test_a_digest_is_of_what_is_stated():
    recipe = load_recipe("quickstart", ["tokenizer.quantizer.kind=rq_vae", "train.half_life_days=2"])
    stated = recipe.stated()
    assert stated["tokenizer"]["quantizer"]["kind"] == "rq_vae" and stated["train"]["half_life_days"] == 2
    assert "half_life_from" not in stated["train"], "a setting that nobody gave changed the digest of every recipe"


# -------------------------------------------------------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("trian: {}\n", "unknown setting 'trian', did you mean 'train'?"),
        ("train: {stepz: 1}\n", "unknown setting 'train.stepz', did you mean 'steps'?"),
        ("model: {moe: {expert: 1}}\n", "unknown setting 'model.moe.expert', did you mean 'experts'?"),
        ("mesh: {pipeline: 2}\n", "unknown setting 'mesh.pipeline', known here: data, expert, fsdp, slices, tensor"),
        ("data: {source: {kind: simulator, userz: 1}}\n", "unknown setting 'data.source.userz', did you mean 'users'?"),
        (
            "tokenizer: {quantizer: {kind: rq_vae, latnet: 1}}\n",
            "unknown setting 'tokenizer.quantizer.latnet', did you mean 'latent'?",
        ),
        (
            "tokenizer: {quantizer: {kind: rq_vae, rq_vae: {latent: 1}}}\n",
            "unknown setting 'tokenizer.quantizer.rq_vae', known here: batch_size, collaborative_weight, ",
        ),
        (
            "tokenizer: {quantizer: {kind: random, zzz: 1}}\n",
            "unknown setting 'tokenizer.quantizer.zzz', known here: kind",
        ),
    ],
)
def test_an_unknown_key_is_refused_with_a_suggestion(write, text: str, said: str):
    assert said in refusal(write(text if "data" in text.split(":")[0] else SIMULATED + text))


def test_all_problems_of_a_recipe_are_in_one_message(write):
    text = """
name: a/b
seed: -1
modle: {}
data: {source: {kind: parquet, evens: x}, split: {valid_from: soon}, targets: 0}
model: {d_model: 10, heads: 4, dropout: 1.0, moe: {experts: many}}
train: {batch_size: 10, accumulation: 4, optimizer: sgd, learning_rate: .nan}
evaluate: {ks: [0], floors: [random]}
mesh: {data: 0}
tokenizer: {codebook_sizes: []}
"""
    message = refusal(write(text))
    for part in (
        "mine.yaml: ", "'name' is 'a/b'", "'seed' is -1", "unknown setting 'modle', did you mean 'model'?",
        "'data.source.events' is required", "unknown setting 'data.source.evens', did you mean 'events'?",
        "split.valid_from must be an ISO date-time or a share in (0, 1), not 'soon'", "'data.targets' is 0",
        "'model.dropout' is 1.0", "'model.moe.experts' is 'many'", "'train.optimizer' is 'sgd'",
        "'train.learning_rate' is nan", "'evaluate.ks.0' is 0", "'evaluate.floors.0' is 'random'",
        "mesh.data must be positive", "'tokenizer.codebook_sizes' is []",
    ):  # fmt: skip
        assert part in message


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.d_model=90", "model.d_model 90 must be a multiple of model.heads 4"),
        ("model.moe.active=9", "model.moe.active 9 must be at most model.moe.experts 8"),
        ("model.moe.every=2", "model.moe.every 2 must divide the 1 layers of each MoE stack"),
        ("model.causal=true", "model.causal needs short_length > 0 and positive_length = lifelong_length = 0"),
        ("train.accumulation=3", "train.batch_size 128 does not divide into train.accumulation 3 micro-batches"),
        ("mesh.data=0", "mesh.data must be positive, or -1 for all remaining devices"),
        ("data.split.test_from=1.5", "split.test_from must be an ISO date-time or a share in (0, 1), not 1.5"),
    ],
)
def test_settings_that_do_not_fit_each_other_are_named_with_their_values(override: str, said: str):
    assert said in refusal("quickstart", [override])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("a: [\n", "not valid YAML"),
        ("seed: 1\nseed: 2\n", "duplicate key seed"),
        ("- a\n", "a recipe is a mapping of settings"),
        ("3\n", "not valid YAML"),
        ("seed: !!int many\n" + SIMULATED, "not valid YAML: invalid literal"),
        ("seed: !!bool many\n" + SIMULATED, "not valid YAML"),
        ("seed: " + "9" * 5_000 + "\n" + SIMULATED, "not valid YAML: "),
        ("seed: " + "9" * 30 + "\n" + SIMULATED, "a whole number has more than 64 bits"),
        ("runs: " + "[" * 3_000 + "\n" + SIMULATED, "nested more than 32 deep"),
        ("runs: ???\n" + SIMULATED, "'???' is no value of a setting"),
        ('runs: "a\\0b"\n' + SIMULATED, "is no value of a setting"),
        ("runs: !!binary AAAA\n" + SIMULATED, "is no text, number, list, mapping or null"),
        ("base: ???\n" + SIMULATED, "'???' is no value of a setting"),
        ("base: ${name}\n" + SIMULATED, "no recipe '${name}'"),
        ("base: " + "a" * 300 + "\n" + SIMULATED, "no recipe 'aaa"),
        ("seed: true\n" + SIMULATED, "'seed' is True: input should be a number"),
        ("evaluate: {ks: [true]}\n" + SIMULATED, "'evaluate.ks.0' is True: input should be a number"),
        ("name: ..\n" + SIMULATED, "'name' is '..'"),
        ('"a\\nb": 3\n' + SIMULATED, "unknown setting 'a b'"),
        ("runs: ${nowhere}\n" + SIMULATED, "'nowhere' not found"),
        ("", "'data' is required"),
        ("data:\n", "'data' is None"),
        ("3: 4\n" + SIMULATED, "unknown setting '3'"),
        ("data: {source: {kind: postgres}}\n", "'data.source' is {'kind': 'postgres'}"),
        ("data: {source: {users: 3}}\n", "'data.source.kind' is required"),
        ("tokenizer: {quantizer: {latent: 3}}\n" + SIMULATED, "unknown setting 'tokenizer.quantizer.latent'"),
        ("tokenizer: {quantizer: 3}\n" + SIMULATED, "'tokenizer.quantizer' is 3"),
        ("tokenizer: 3\n" + SIMULATED, "'tokenizer' is 3"),
        ("tokenizer: {quantizer: {kind: rq_vae, hidden: [0]}}\n" + SIMULATED, "'tokenizer.quantizer.hidden.0' is 0"),
    ],
)
def test_a_file_that_is_no_recipe_is_refused_by_name(write, text: str, said: str):
    message = refusal(write(text))
    assert ("mine.yaml: " in message or said.startswith("no recipe")) and said in message and len(message) < 500


def test_a_file_that_is_no_text_is_refused_by_name(tmp_path: Path):
    (tmp_path / "mine.yaml").write_bytes(b"\xff\xfe\x00a")
    assert "mine.yaml: not valid YAML" in refusal(str(tmp_path / "mine.yaml"))


def test_a_recipe_that_does_not_exist_is_refused_with_the_nearest_name():
    assert "no recipe 'quickstrat'" in refusal("quickstrat")
    assert "did you mean 'quickstart'?" in refusal("quickstrat")
    assert all(name in refusal("zzz") for name in RECIPES)


# ----------------------------------------------------------------------------------------------------- base and overrides


def test_a_recipe_inherits_from_one_in_configs_and_from_one_beside_it(write):
    write("base: quickstart\nseed: 5\ntrain: {steps: 7}\n", "middle")
    recipe, quickstart = load_recipe(write("base: middle\ntrain: {b1: 0.5}\n")), load_recipe("quickstart")
    assert recipe.name == "mine"
    assert (recipe.seed, recipe.train.steps, recipe.train.b1) == (5, 7, 0.5)
    assert recipe.model == quickstart.model and recipe.train.batch_size == quickstart.train.batch_size


def test_lists_of_a_base_are_replaced_and_not_joined(write):
    assert load_recipe(write("base: quickstart\nevaluate: {ks: [3]}\n")).evaluate.ks == (3,)


def test_another_kind_of_source_inherits_nothing_of_the_source_of_its_base(write):
    write("data: {source: {kind: simulator, users: 9}, targets: 2}\n", "simulated")
    recipe = load_recipe(write("base: simulated\ndata: {source: {kind: amazon, path: here}}\n"))
    assert recipe.data.source.model_dump() == {"kind": "amazon", "path": "here"} and recipe.data.targets == 2
    same_kind = load_recipe(write("base: simulated\ndata: {source: {kind: simulator, items: 8}}\n", "other"))
    assert same_kind.data.source.model_dump()["users"] == 9


def test_another_kind_of_quantizer_inherits_nothing_of_the_quantizer_of_its_base(write):
    write(SIMULATED + "tokenizer: {quantizer: {kind: rq_vae, latent: 9}, dimensions: 3}\n", "learned")
    tokenizer = load_recipe(write("base: learned\ntokenizer: {quantizer: {kind: fsq, steps: 5}}\n")).tokenizer
    assert tokenizer.quantizer == FiniteScalarQuantizer(steps=5) and tokenizer.dimensions == 3
    for settings_of_the_same in ("{kind: rq_vae, steps: 5}", "{steps: 5}"):
        text = f"base: learned\ntokenizer: {{quantizer: {settings_of_the_same}}}\n"
        assert load_recipe(write(text, "other")).tokenizer.quantizer == RQVAE(latent=9, steps=5)


@pytest.mark.parametrize(
    "overrides",
    [
        ["tokenizer.quantizer.kind=fsq", "tokenizer.quantizer.steps=5"],
        ["tokenizer.quantizer.steps=5", "tokenizer.quantizer.kind=fsq"],
        ["tokenizer.quantizer={kind: fsq, steps: 5}"],
        ["tokenizer={quantizer: {kind: fsq, steps: 5}}"],
        ["tokenizer.quantizer.kind=random", "tokenizer.quantizer.kind=fsq", "tokenizer.quantizer.steps=5"],
    ],
)
def test_another_kind_in_an_override_inherits_nothing_of_the_kind_in_the_file(write, overrides: list[str]):
    path = write(SIMULATED + "tokenizer: {quantizer: {kind: rq_vae, latent: 9}, dimensions: 3}\n")
    tokenizer = load_recipe(path, overrides).tokenizer
    assert tokenizer.quantizer == FiniteScalarQuantizer(steps=5) and tokenizer.dimensions == 3


def test_an_override_of_the_same_kind_keeps_the_settings_of_the_file(write):
    path = write(SIMULATED + "tokenizer: {quantizer: {kind: rq_vae, latent: 9}}\n")
    for override in ("tokenizer.quantizer.steps=5", "tokenizer.quantizer={kind: rq_vae, steps: 5}"):
        assert load_recipe(path, [override]).tokenizer.quantizer == RQVAE(latent=9, steps=5)
    source = load_recipe("quickstart", ["data.source.kind=amazon", "data.source.path=here"]).data.source
    assert source.model_dump() == {"kind": "amazon", "path": "here"}


@pytest.mark.parametrize("bases", [("mine",), ("second", "mine"), ("second", "third", "second")])
def test_a_base_that_goes_in_a_circle_is_refused(write, bases: tuple[str, ...]):
    for name, base in zip(("mine", "second", "third"), bases, strict=False):
        write(f"base: {base}\n" + SIMULATED, name)
    assert "'base' goes in a circle" in refusal(write(f"base: {bases[0]}\n" + SIMULATED))


def test_a_base_that_does_not_exist_is_refused(write):
    assert "no recipe 'nowhere'" in refusal(write("base: nowhere\n"))


@pytest.mark.parametrize(
    ("override", "section", "field", "value"),
    [
        ("train.steps=7", "train", "steps", 7),
        ("train.learning_rate=1e-4", "train", "learning_rate", 1e-4),
        ("train.tensorboard=false", "train", "tensorboard", False),
        ("train.init_from=other@100", "train", "init_from", "other@100"),
        ("train.init_from=null", "train", "init_from", None),
        ("train.init_from=", "train", "init_from", None),
        ("train.init_from='null'", "train", "init_from", "null"),
        ("tokenizer.codebook_sizes=[8, 4]", "tokenizer", "codebook_sizes", (8, 4)),
        ("tokenizer.content=[text]", "tokenizer", "content", ("text",)),
        ("data.positive_labels=[]", "data", "positive_labels", ()),
        ("data.directory=a=b", "data", "directory", "a=b"),
        (" data.directory = here", "data", "directory", "here"),
    ],
)
def test_an_override_sets_a_value_of_its_type(override: str, section: str, field: str, value):
    found = getattr(getattr(load_recipe("quickstart", [override]), section), field)
    assert found == value and type(found) is type(value)


def test_overrides_win_over_the_file_and_the_last_one_wins():
    assert load_recipe("quickstart", ["seed=1", "seed=2"]).seed == 2


def test_an_override_reaches_nested_settings_and_leaves_their_neighbours():
    recipe, quickstart = load_recipe("quickstart", ["model.moe.experts=6"]), load_recipe("quickstart")
    assert recipe.model.moe.experts == 6 and recipe.model.moe.hidden == quickstart.model.moe.hidden
    merged = load_recipe("quickstart", ["model={moe: {experts: 6}, heads: 2}"])
    assert (merged.model.moe.experts, merged.model.heads) == (6, 2)
    assert merged.model.d_model == quickstart.model.d_model


def test_a_name_longer_than_a_file_can_have_is_no_recipe():
    assert "no recipe 'aaa" in refusal("a" * 5_000) and len(refusal("a" * 5_000)) < 500


def test_an_override_of_several_lines_is_refused():
    assert "a value is one line" in refusal("quickstart", ["seed=1\nruns: elsewhere"])


@pytest.mark.parametrize("override", ["seed", "=3", " =3", "", "seed 3"])
def test_an_override_without_a_key_or_an_equals_sign_is_refused(override: str):
    assert refusal("quickstart", [override]) == f"override '{override.strip()}' must have the form key.path=value"


@pytest.mark.parametrize(
    "override", ["runs=[a", "runs={a: b", "runs=a: b", "runs=${nowhere}", "runs=@x", "[=1", "runs=???"]
)
def test_an_override_that_is_no_yaml_or_no_path_is_refused(override: str):
    assert f"override '{override}' does not fit the recipe: " in refusal("quickstart", [override])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("train.step=1", "unknown setting 'train.step', did you mean 'steps'?"),
        ("seed.x=1", "'seed' is {'x': 1}"),
        ("train.steps=many", "'train.steps' is 'many'"),
        ("train.steps=1.5", "'train.steps' is 1.5"),
        ("train=null", "'train' is None"),
        ("tokenizer.codebook_sizes=8", "'tokenizer.codebook_sizes' is 8"),
        ("tokenizer.codebook_sizes=[8,0]", "'tokenizer.codebook_sizes.1' is 0"),
        ("train.learning_rate=.inf", "'train.learning_rate' is inf"),
    ],
)
def test_an_override_is_checked_like_the_file(override: str, said: str):
    assert said in refusal("quickstart", [override])


def test_a_recipe_cannot_be_changed_once_it_is_made():
    recipe = load_recipe("quickstart")
    with pytest.raises(ValueError, match="frozen"):
        recipe.train.steps = 1  # type: ignore[misc]


def test_folders_follow_from_the_name_unless_they_are_given():
    recipe = load_recipe("quickstart")
    assert [str(recipe.dataset_directory), str(recipe.tokenizer_directory), str(recipe.run_directory)] == [
        "datasets/quickstart", "datasets/quickstart/semantic_ids", "runs/quickstart"
    ]  # fmt: skip
    moved = load_recipe("quickstart", ["name=b", "runs=r", "data.directory=d", "tokenizer.directory=t"])
    assert [str(moved.dataset_directory), str(moved.tokenizer_directory), str(moved.run_directory)] == ["d", "t", "r/b"]


def test_a_setting_of_the_default_kind_needs_no_kind():
    recipe = load_recipe("beauty_small", ["tokenizer.quantizer.balanced_levels=[3]"])
    assert recipe.tokenizer.quantizer.kind == "residual_kmeans"
    assert recipe.tokenizer.quantizer.balanced_levels == (3,)
