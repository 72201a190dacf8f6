import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest

from onerec_jax.config import TokenizerConfig
from onerec_jax.errors import InputError
from onerec_jax.tokenizer import content
from onerec_jax.tokenizer.content import co_occurrence, content_vectors, positive_pmi

TEXTS = ["red lip stick", "red lip gloss", "blue shampoo", "blue shampoo bottle", ""]


def config(*kinds, **settings):
    return TokenizerConfig(content=kinds, **settings)


def brute_co_occurrence(histories, num_items, window):
    counts = np.zeros((num_items, num_items))
    for history in histories:
        for i, left in enumerate(history):
            for j in range(i + 1, min(i + window, len(history) - 1) + 1):
                if left != history[j]:
                    counts[left, history[j]] += 1 / (j - i)
                    counts[history[j], left] += 1 / (j - i)
    return counts


def test_given_embeddings_are_normalised_and_zero_stays_zero(make_dataset):
    vectors = content_vectors(make_dataset(3, embedding=[[3, 4], [0, 0], [0, -2]]), config("embedding"), 0)
    np.testing.assert_allclose(vectors, [[0.6, 0.8], [0, 0], [0, -1]], atol=1e-6)
    assert vectors.dtype == np.float32


def test_several_kinds_are_joined_each_with_its_own_norm(make_dataset):
    dataset = make_dataset(5, [[0, 1, 2, 3]] * 2, embedding=np.eye(5) * 7, text=TEXTS)
    vectors = content_vectors(dataset, config("embedding", "text", "behaviour", dimensions=3), 0)
    assert vectors.shape == (5, 5 + 3 + 3)
    for block in np.split(vectors, [5, 8], axis=1):
        norms = np.linalg.norm(block, axis=1)
        assert np.all(np.isclose(norms, 1, atol=1e-5) | (norms == 0))
    np.testing.assert_array_equal(vectors[4, 5:], 0)


def test_items_with_like_texts_are_neighbours(make_dataset):
    vectors = content_vectors(make_dataset(5, text=TEXTS), config("text", dimensions=4), 0)
    similarity = vectors @ vectors.T
    assert similarity[0, 1] > similarity[0, 2] + 0.2 and similarity[2, 3] > similarity[1, 3] + 0.2


def test_text_width_is_bounded_by_the_rank(make_dataset):
    assert content_vectors(make_dataset(5, text=TEXTS), config("text", dimensions=64), 0).shape == (5, 5)
    assert content_vectors(make_dataset(1, text=["word"]), config("text"), 0).shape == (1, 1)


def test_co_occurrence_equals_brute_force():
    rng = np.random.default_rng(0)
    histories = [rng.integers(0, 8, length) for length in (0, 1, 2, 5, 17, 30)]
    users = np.repeat(np.arange(6), [len(history) for history in histories])
    counts = co_occurrence(np.concatenate(histories).astype(np.int64), users, 8, window=5)
    np.testing.assert_allclose(counts.toarray(), brute_co_occurrence(histories, 8, 5), atol=1e-12)


def test_positive_pmi_equals_its_definition():
    counts = brute_co_occurrence([np.random.default_rng(1).integers(0, 6, 12)], 7, 5)
    p = counts / counts.sum()
    with np.errstate(divide="ignore", invalid="ignore"):
        expected = np.maximum(np.nan_to_num(np.log(p / np.outer(p.sum(1), p.sum(0))), neginf=0), 0)
    np.testing.assert_allclose(positive_pmi(content.sparse.csr_matrix(counts)).toarray(), expected, atol=1e-9)


def test_items_met_together_are_neighbours_and_unmet_items_are_zero(make_dataset):
    histories = [[0, 1, 2], [2, 1, 0], [3, 4, 5], [5, 3, 4]] * 3 + [[2, 3]]
    vectors = content_vectors(make_dataset(8, histories), config("behaviour", dimensions=4), 0)
    similarity = vectors @ vectors.T
    assert similarity[0, 1] > 0.5 + similarity[0, 4] and similarity[4, 5] > 0.5 + similarity[1, 5]
    np.testing.assert_array_equal(vectors[6:], 0)


def test_behaviour_never_looks_past_the_train_events(make_dataset):
    histories, stops = [[0, 1, 2, 3], [3, 2, 0, 1]], [3, 2]
    vectors = content_vectors(make_dataset(5, histories, stops), config("behaviour", dimensions=3), 0)
    changed = [[0, 1, 2, 4], [3, 2, 4, 4]]
    again = content_vectors(make_dataset(5, changed, stops), config("behaviour", dimensions=3), 0)
    np.testing.assert_array_equal(vectors, again)
    leaked = content_vectors(make_dataset(5, changed), config("behaviour", dimensions=3), 0)
    assert not np.array_equal(vectors, leaked)


@pytest.mark.parametrize("kind", ["text", "behaviour"])
def test_the_same_seed_gives_the_same_vectors(make_dataset, kind):
    rng = np.random.default_rng(2)
    texts = [" ".join(f"w{word}" for word in rng.integers(0, 30, 6)) for _ in range(40)]
    dataset = make_dataset(40, rng.integers(0, 40, (10, 20)), text=texts)
    first, second = (content_vectors(dataset, config(kind, dimensions=5), seed=3) for _ in range(2))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("embedding", "names 'embedding' but the dataset's items have none"),
        ("text", "names 'text' but no item has a text"),
        ("sentence", "names 'sentence' but no item has a text"),
        ("behaviour", "asks for behaviour but no user has two items in train"),
    ],
)
def test_absent_content_is_refused_by_name(make_dataset, kind, message):
    with pytest.raises(InputError, match=message):
        content_vectors(make_dataset(3, [[0], [1]]), config(kind), 0)


def test_no_content_at_all_and_wordless_texts_are_refused(make_dataset):
    with pytest.raises(InputError, match="content is empty"):
        content_vectors(make_dataset(2), config(), 0)
    with pytest.raises(InputError, match="no item's text has a word"):
        content_vectors(make_dataset(2, text=["!!", "?"]), config("text"), 0)


def test_sentence_without_the_extra_names_the_install_command(make_dataset, monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(InputError, match=r"pip install 'onerec_jax\[text\]'"):
        content_vectors(make_dataset(5, text=TEXTS), config("sentence"), 0)


@pytest.fixture
def sentence_library(monkeypatch):
    """Stands in for sentence-transformers: a sentence's vector is its length and its number of words."""
    opened = []

    class SentenceTransformer:
        def __init__(self, folder, local_files_only=False):
            assert local_files_only
            opened.append(folder)

        def encode(self, texts, batch_size, show_progress_bar):
            return np.array([[len(text), len(text.split())] for text in texts], np.float32)

    library = ModuleType("sentence_transformers")
    library.SentenceTransformer = SentenceTransformer  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "sentence_transformers", library)
    return opened


def test_sentence_model_is_read_from_a_folder_and_empty_texts_stay_zero(make_dataset, sentence_library, tmp_path):
    settings = config("sentence", sentence_model=str(tmp_path))
    vectors = content_vectors(make_dataset(5, text=TEXTS), settings, 0)
    assert sentence_library == [str(tmp_path)]
    np.testing.assert_allclose(vectors[0], np.array([13, 3]) / np.hypot(13, 3), rtol=1e-6)
    np.testing.assert_array_equal(vectors[4], 0)


def test_sentence_model_is_found_inside_an_installed_package(make_dataset, sentence_library, monkeypatch, tmp_path):
    names = ("__init__.py", "model/modules.json", "model/1_Pooling/config.json")
    files = [tmp_path / "package" / name for name in names]
    listing = [SimpleNamespace(name=file.name, locate=lambda file=file: file) for file in files]
    monkeypatch.setattr(content.importlib.metadata, "files", lambda name: listing if name == "a-model" else None)
    content_vectors(make_dataset(5, text=TEXTS), config("sentence", sentence_model="a-model"), 0)
    assert sentence_library == [str(tmp_path / "package" / "model")]


def test_unknown_sentence_model_is_refused(make_dataset, sentence_library):
    with pytest.raises(InputError, match="sentence_model 'no-such-model' is neither a folder nor an installed package"):
        content_vectors(make_dataset(5, text=TEXTS), config("sentence", sentence_model="no-such-model"), 0)
