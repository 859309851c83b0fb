"""Corpora of the Hugging Face Hub, read through `datasets`; they need a network once.

Both come with a validation split of their own, which is the one that is held out.
"""

from itertools import islice
from typing import Any

from lightning_bfmoe.data.offline import hub_is_reachable, import_datasets
from lightning_bfmoe.data.sources import Source
from lightning_bfmoe.errors import BFMoEError

STORIES = {"train": 20_000, "validation": 2_000}
"""Stories of TinyStories that are read (count): about 18 and 1.6 million characters."""


def wikitext2() -> Source:
    """WikiText-2 (raw, 11 million characters) from the Hub, or from its local cache.

    Raises:
        BFMoEError: The Hub cannot be reached and the cache does not hold it.
    """
    name, config = "Salesforce/wikitext", "wikitext-2-raw-v1"

    def read(datasets: Any, split: str) -> str:
        return "".join(datasets.load_dataset(name, config, split=split)["text"])

    return _from_hub("wikitext2", f"{name} / {config}", "CC-BY-SA-3.0", read)


def tinystories() -> Source:
    """The first `STORIES` of TinyStories, streamed: of 2 GB only what is read is downloaded.

    Raises:
        BFMoEError: The Hub cannot be reached.
    """
    name = "roneneldan/TinyStories"

    def read(datasets: Any, split: str) -> str:
        rows = datasets.load_dataset(name, split=split, streaming=True)
        return "\n\n".join(row["text"].strip() for row in islice(rows, STORIES[split])) + "\n"

    origin = f"{name}, the first {STORIES['train']:,} stories"
    return _from_hub("tinystories", origin, "CDLA-Sharing-1.0", read)


def _from_hub(corpus: str, origin: str, licence: str, read: Any) -> Source:
    """Both splits; whatever goes wrong on the way to the Hub is one kind of error."""
    datasets = import_datasets()
    try:
        splits = {split: read(datasets, split) for split in ("train", "validation")}
    except Exception as error:
        raise BFMoEError(
            f"the corpus {corpus!r} is downloaded from the Hugging Face Hub ({origin})",
            got=f"{type(error).__name__}, Hub reachable: {hub_is_reachable()}",
            fix="Connect, unset HF_HUB_OFFLINE, or take 'shakespeare' or 'stdlib' (offline).",
        ) from error
    return Source(splits, f"Hugging Face Hub, {origin}", licence, "validation")
