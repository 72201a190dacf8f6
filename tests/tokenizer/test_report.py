"""The report: a page that needs nothing from outside, and numbers that loops over items confirm."""

import json
import re
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest

from onerec_jax.config import TokenizerConfig
from onerec_jax.errors import InputError
from onerec_jax.tokenizer import item_map, report
from onerec_jax.tokenizer.content import content_vectors
from onerec_jax.tokenizer.report import contents, html, write_report
from onerec_jax.tokenizer.semantic_ids import fit_semantic_ids

HOSTILE = "</script><script>alert('x')</script><img src=x onerror=alert(1)> & \u2028 {{REPORT}} <!--"


class Page(HTMLParser):
    """What a browser would find: tags, attributes that load something, the text of each script."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.ids, self.scripts, self.inside = [], [], [], {}, None
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        values = dict(attributes)
        self.tags.append(tag)
        self.ids += [values["id"]] if "id" in values else []
        self.links += [value for name, value in attributes if name in ("src", "href", "srcset", "data", "action")]
        if tag == "script":
            self.inside = values.get("id", "program")
            self.scripts[self.inside] = ""

    def handle_endtag(self, tag):
        if tag == "script":
            self.inside = None

    def handle_data(self, data):
        if self.inside:
            self.scripts[self.inside] += data


def make_ids(dataset, dedup="none", **settings):
    config = TokenizerConfig(**{"codebook_sizes": (4, 3), "iterations": 4, "dedup": dedup, **settings})
    return fit_semantic_ids(dataset, config, seed=0)


@pytest.fixture
def catalogue(make_dataset):
    """Items of which many share a vector, and users who clicked some of them."""

    def make(items=30, distinct=12, text=None, histories=((0, 1, 2, 3), (2, 3, 4))):
        rng = np.random.default_rng(0)
        vectors = rng.normal(size=(distinct, 4))[rng.integers(0, distinct, items)].astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        text = text or [f"item of words {row}" for row in range(items)]
        dataset = make_dataset(items, [[i for i in h if i < items] for h in histories], embedding=vectors, text=text)
        dataset.item_ids = np.array([f"id-{row}" for row in range(items)])
        return dataset, vectors

    return make


def shown(ids, dataset, vectors, tmp_path):
    write_report(ids, dataset, vectors, tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    return page, json.loads(page.scripts["report"])


def reachable(tree):
    """Own id -> codes of the node it hangs under, as a click-through from the root finds it."""
    stops = np.cumsum(tree["shown"])
    paths = list(zip(*tree["codes"], strict=True))
    return {item: paths[int(np.searchsorted(stops, i, side="right"))] for i, item in enumerate(tree["id"])}


@pytest.mark.parametrize("dedup", ["none", "extra_level"])
def test_every_item_of_a_small_catalogue_is_reachable_under_its_own_codes(catalogue, tmp_path, dedup):
    dataset, vectors = catalogue()
    ids = make_ids(dataset, dedup)
    tree = shown(ids, dataset, vectors, tmp_path)[1]["tree"]
    assert reachable(tree) == {f"id-{row}": tuple(code) for row, code in enumerate(ids.codes.tolist())}
    assert tree["whole"] and tree["items"] == tree["shown"] and sum(tree["items"]) == 30
    paths = list(zip(*tree["codes"], strict=True))
    assert paths == sorted(set(paths))
    assert dict(zip(tree["id"], tree["title"], strict=True)) == {f"id-{i}": f"item of words {i}" for i in range(30)}


def test_the_page_loads_nothing_and_names_no_address(catalogue, tmp_path):
    page, _ = shown(*(lambda dataset, vectors: (make_ids(dataset), dataset, vectors))(*catalogue()), tmp_path)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text.replace("// ", "")) and page.links == []
    assert {"link", "img", "iframe", "object", "embed"}.isdisjoint(page.tags)
    assert "default-src 'none'" in text


def test_every_element_that_the_program_fills_is_on_the_page(catalogue, tmp_path):
    dataset, vectors = catalogue()
    page, _ = shown(make_ids(dataset), dataset, vectors, tmp_path)
    assert set(re.findall(r'\bat\("([\w-]+)"\)', page.scripts["program"])) <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))


def test_a_hostile_title_stays_text(catalogue, tmp_path):
    text = [HOSTILE] * 30
    dataset, vectors = catalogue(text=text)
    dataset.item_ids = np.array([f"</script>{row}" for row in range(30)])
    page, values = shown(make_ids(dataset), dataset, vectors, tmp_path)
    assert page.tags.count("script") == 2 and "img" not in page.tags
    expected = " ".join(HOSTILE.split())[:89]
    assert all(title.startswith(expected[:80]) for title in values["tree"]["title"] + values["map"]["title"])
    assert set(values["tree"]["id"]) == set(dataset.item_ids.tolist())
    assert "innerHTML" not in page.scripts["program"]


def test_titles_are_cut_and_a_missing_one_is_empty(catalogue):
    dataset, vectors = catalogue(text=["  two\n words ", None, "long " * 500] + [""] * 27)
    values = contents(make_ids(dataset), dataset, vectors)
    titles = dict(zip(values["tree"]["id"], values["tree"]["title"], strict=True))
    assert titles["id-0"] == "two words" and titles["id-1"] == ""
    assert titles["id-2"].endswith("…") and len(titles["id-2"]) <= 90


def test_levels_count_what_a_counter_counts(catalogue):
    dataset, _ = catalogue(distinct=3)
    ids = make_ids(dataset, "extra_level")
    for level, (column, size) in enumerate(zip(ids.codes.T, ids.codebook_sizes, strict=True)):
        counted = Counter(column.tolist())
        use = report.level_use(column, size)
        sizes = sorted((counted[code] for code in range(size)), reverse=True)
        assert use["curve"] == [list(range(size)), sizes] and use["largest"] == sizes[0]
        assert (use["codes"], use["used"]) == (size, len(counted))
        assert use["entropy"] == pytest.approx(ids.quality["levels"][level]["entropy"])
        for low, high, codes in use["histogram"]:
            assert codes == sum(low <= number <= high for number in sizes)
        assert sum(bar[2] for bar in use["histogram"]) == size
    assert report.level_use(ids.codes[:, 0], 4)["histogram"][0] == [0, 0, 1]


def test_collisions_are_those_of_the_quantizer_with_or_without_an_extra_level(catalogue):
    dataset, vectors = catalogue()
    for dedup in ("none", "extra_level"):
        ids = make_ids(dataset, dedup)
        groups = Counter(map(tuple, ids.codes[:, :2].tolist()))
        found = contents(ids, dataset, vectors)["collisions"]
        for low, high, number, items in found["shared_by"]:
            inside = [size for size in groups.values() if low <= size <= (high or size)]
            assert (number, items) == (len(inside), sum(inside))
        assert sum(row[3] for row in found["shared_by"]) == 30
        sizes = [group["items"] for group in found["largest"]]
        assert sizes == sorted((size for size in groups.values() if size > 1), reverse=True)[:9]
        for group in found["largest"]:
            assert groups[tuple(group["code"])] == group["items"] and len(group["title"]) <= 5


def test_reconstruction_starts_at_the_mean_and_ends_at_the_quality_report(catalogue):
    dataset, vectors = catalogue(distinct=30)
    ids = make_ids(dataset)
    losses = contents(ids, dataset, vectors)["reconstruction"]
    assert losses[0]["explained"] == 0 and losses[0]["mse"] == pytest.approx(vectors.var(0).mean(), rel=1e-5)
    first = np.mean((vectors - ids.decode(ids.codes[:, :1])) ** 2)
    assert losses[1]["mse"] == pytest.approx(first, rel=1e-5)
    assert losses[1]["explained"] == pytest.approx(1 - first / vectors.var(0).mean(), rel=1e-4)
    assert losses[2]["mse"] == pytest.approx(ids.quality["reconstruction_mse"], rel=1e-6)
    assert losses[2]["relative"] == pytest.approx(ids.quality["reconstruction_relative"], rel=1e-6)


def test_node_bounds_cut_the_items_into_the_prefixes(catalogue):
    dataset, _ = catalogue()
    ids = make_ids(dataset, "extra_level")
    for depth, starts in enumerate(report.node_bounds(ids)):
        parts = np.split(ids.trie.items, starts[1:-1])
        prefixes = [{tuple(code) for code in ids.codes[part, :depth].tolist()} for part in parts]
        assert all(len(prefix) == 1 for prefix in prefixes) and len(set.union(*prefixes)) == len(parts)


def test_a_large_catalogue_shows_counts_and_a_sample_of_items(catalogue, monkeypatch):
    monkeypatch.setattr(report, "_WHOLE", 20)
    monkeypatch.setattr(report, "_SAMPLED", 6)
    dataset, vectors = catalogue()
    ids = make_ids(dataset)
    tree = contents(ids, dataset, vectors)["tree"]
    assert not tree["whole"] and len(tree["codes"]) == 1
    counted = Counter(ids.codes[:, 0].tolist())
    assert dict(zip(tree["codes"][0], tree["items"], strict=True)) == counted
    assert max(tree["shown"]) <= 2 and min(tree["shown"]) >= 1 and len(tree["id"]) == sum(tree["shown"])
    for item, path in reachable(tree).items():
        assert ids.codes[int(item.removeprefix("id-")), 0] == path[0]


def test_codes_of_long_ids_that_tell_nothing_apart_are_left_out_of_the_tree(catalogue, monkeypatch):
    monkeypatch.setattr(report, "_CODES", 10)
    dataset, vectors = catalogue()
    ids = make_ids(dataset, codebook_sizes=(4, 3, 4, 3))
    tree = contents(ids, dataset, vectors)["tree"]
    assert 1 <= len(tree["codes"]) < 4 and sorted(tree["id"]) == sorted(dataset.item_ids.tolist())
    assert len(tree["items"]) == len(np.unique(ids.codes, axis=0))


def test_sampling_of_a_large_catalogue_keeps_the_figures_near(catalogue, monkeypatch):
    dataset, vectors = catalogue()
    ids = make_ids(dataset)
    whole = contents(ids, dataset, vectors)
    monkeypatch.setattr(report, "_DECODED_ITEMS", 25)
    sampled = contents(ids, dataset, vectors)
    assert sampled["reconstruction"][0]["mse"] == pytest.approx(whole["reconstruction"][0]["mse"], rel=0.3)
    assert sampled["reconstruction"] != whole["reconstruction"]


def test_the_same_arguments_give_the_same_page_and_a_number_of_items_on_the_map(catalogue, monkeypatch):
    monkeypatch.setattr(report, "_MAP_ITEMS", 20)
    dataset, vectors = catalogue()
    ids = make_ids(dataset)
    first, again = (contents(ids, dataset, vectors) for _ in range(2))
    assert html(first) == html(again)
    assert len(first["map"]["x"]) == len(set(first["map"]["id"])) == 20
    assert first["map"]["layout"] == "the first two principal axes"
    assert all(0 <= place <= 1000 for place in first["map"]["x"] + first["map"]["y"])
    for item, code in zip(first["map"]["id"], first["map"]["code"], strict=True):
        assert ids.codes[int(item.removeprefix("id-"))].tolist() == code


def test_a_dataset_nobody_clicked_in_has_content_neighbours_only(catalogue):
    dataset, vectors = catalogue(histories=())
    near = contents(make_ids(dataset), dataset, vectors)["neighbours"]
    assert near["co_clicked"] is None and near["content"] is not None


@pytest.mark.parametrize(
    "settings", [{"kind": "product", "rotate": False}, {"kind": "hierarchical"}, {"kind": "random"}]
)
def test_any_construction_has_a_report(catalogue, tmp_path, settings):
    dataset, vectors = catalogue()
    ids = make_ids(dataset, quantizer=settings)
    _, values = shown(ids, dataset, vectors, tmp_path)
    assert values["kind"] == settings["kind"] and len(values["reconstruction"]) == len(values["levels"]) + 1 == 3


@pytest.mark.parametrize("vectors", [np.ones((1, 4)), np.ones((60, 4)), np.zeros((30, 4))])
def test_one_item_and_equal_items_have_a_report(make_dataset, tmp_path, vectors):
    dataset = make_dataset(len(vectors), embedding=vectors)
    dataset.item_ids = np.arange(len(vectors))
    content = content_vectors(dataset, TokenizerConfig(), 0)
    _, values = shown(make_ids(dataset), dataset, content, tmp_path)
    assert values["items"] == len(vectors) == sum(values["tree"]["items"])
    assert values["reconstruction"][-1]["explained"] == pytest.approx(1, abs=1e-2)


def test_vectors_of_other_items_are_refused(catalogue, tmp_path):
    dataset, vectors = catalogue()
    with pytest.raises(InputError, match="report of 30 items needs as many content vectors; there are 29"):
        write_report(make_ids(dataset), dataset, vectors[:29], tmp_path / "report.html")


def test_a_full_disk_leaves_the_former_report_whole(catalogue, tmp_path, monkeypatch):
    dataset, vectors = catalogue()
    ids = make_ids(dataset)
    write_report(ids, dataset, vectors, tmp_path / "report.html")
    before = (tmp_path / "report.html").read_text(encoding="utf-8")

    def full(path, text, **settings):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(report.Path, "write_text", full)
    with pytest.raises(InputError, match=r"cannot write .*report\.html: No space left on device"):
        write_report(ids, dataset, vectors, tmp_path / "report.html")
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == before


def test_ids_with_a_report_beside_them_are_replaced_and_read(catalogue, tmp_path):
    dataset, vectors = catalogue()
    ids = make_ids(dataset)
    ids.save(tmp_path / "ids")
    write_report(ids, dataset, vectors, tmp_path / "ids" / "report.html")
    np.testing.assert_array_equal(type(ids).load(tmp_path / "ids", dataset).codes, ids.codes)
    ids.save(tmp_path / "ids")
    assert not (tmp_path / "ids" / "report.html").exists()


def test_like_items_lie_together_on_the_map(monkeypatch):
    rng = np.random.default_rng(0)
    cluster = np.repeat(np.arange(3), 20)
    vectors = (5 * np.eye(3)[cluster] + 0.1 * rng.normal(size=(60, 3))).astype(np.float32)
    places, layout = item_map.plane(vectors, seed=0)
    assert layout == "t-SNE" and places.shape == (60, 2) and np.isfinite(places).all()
    assert places.min() >= 0 and places.max() <= 1
    distance = np.linalg.norm(places[:, None] - places[None], axis=2)
    same = cluster[:, None] == cluster[None]
    assert distance[same].mean() < 0.5 * distance[~same].mean()


def test_few_items_lie_on_their_principal_axes():
    vectors = np.array([[0, 0], [2, 0], [4, 1], [6, 1]], np.float32)
    places, layout = item_map.plane(vectors, seed=0)
    centred = vectors - vectors.mean(0)
    expected = centred @ np.linalg.svd(centred)[2].T
    expected = (expected - expected.min(0)) / np.ptp(expected, axis=0)
    assert layout != "t-SNE"
    for axis in (0, 1):
        found = places[:, axis]
        assert np.allclose(found, expected[:, axis], atol=1e-5) or np.allclose(1 - found, expected[:, axis], atol=1e-5)
