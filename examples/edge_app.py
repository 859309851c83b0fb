"""Text from an exported folder with numpy, onnxruntime and tokenizers only: no torch, no package.

bfmoe export model.bfmoe --out edge --module examples.gpt:GPT
python examples/edge_app.py edge --prompt "To be" --temperature 0
"""

import argparse
import contextlib
import ctypes
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import onnxruntime


def load(folder, threads=0, library=None):
    """Settings, session and tokenizer (None: bytes), once every file is known to be whole.

    With a library that holds our custom op (docs/deploy.md) the rotations run fused.
    """
    settings = json.loads((folder / "generation.json").read_text(encoding="utf-8"))
    if (settings["format"], settings["version"]) != ("bfmoe-onnx", 1):
        raise ValueError("generation.json is of another version")
    for name, file in settings["files"].items():
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != file["sha256"]:
            raise ValueError(f"{name} is damaged")
    if [int(n) for n in re.findall(r"\d+", onnxruntime.__version__)[:2]] < [1, 28]:
        raise ValueError(
            f"onnxruntime {onnxruntime.__version__} has no fast 2-bit product, 1.28 has"
        )
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    options.enable_mem_pattern = False  # it keeps memory for every length
    if library is not None:
        options.register_custom_ops_library(str(library.resolve()))
    graph = "model.onnx" if library is None else "model_ops.onnx"
    session = onnxruntime.InferenceSession(folder / graph, options)
    with contextlib.suppress(AttributeError, OSError, TypeError):  # glibc keeps what is freed
        ctypes.CDLL(None).malloc_trim(0)
    if settings["tokenizer"] == "bytes":
        return settings, session, None
    from tokenizers import Tokenizer

    return settings, session, Tokenizer.from_file(str(folder / settings["tokenizer"]))


def generate(settings, session, prompt, num_tokens, temperature=0.0, top_k=40, seed=0):
    """Yields token ids after the prompt's, until an end token or the end of the context."""
    context, rng = settings["context"] or 2**62, np.random.default_rng(seed)
    if not prompt or max(prompt) >= settings["vocab_size"]:
        raise ValueError("the prompt is empty, or holds tokens that the model does not know")
    if len(prompt) > context:
        raise ValueError(f"the prompt has {len(prompt)} tokens, the context holds {context}")
    names = [value.name for value in session.get_inputs()]
    widths = [(c["heads"], c[w]) for c in settings["cache"] for w in ("key_width", "value_width")]
    cache = [np.zeros((1, heads, 0, width), np.float32) for heads, width in widths]
    pieces = [prompt[at : at + 32] for at in range(0, len(prompt), 32)]  # bounds the memory
    for _ in range(min(num_tokens, context - len(prompt) + 1)):
        for piece in pieces:
            feed = [np.array([piece], np.int64), *cache]
            logits, *cache = session.run(None, dict(zip(names, feed, strict=True)))
        best = np.argsort(-logits[0, -1], kind="stable")[: top_k if temperature > 0 else 1]
        weight = np.exp((logits[0, -1, best] - logits[0, -1, best[0]]) / (temperature or 1.0))
        token = int(rng.choice(best, p=weight / weight.sum()))
        if token in settings["generation"]["eos"]:
            return
        yield token
        pieces = [[token]]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--prompt", default="Hello")
    parser.add_argument("--threads", type=int, default=0, help="0: one a core")
    parser.add_argument(
        "--library", type=Path, help="with the custom op; left out: the stock graph"
    )
    for name, kind in (("num_tokens", int), ("temperature", float), ("top_k", int), ("seed", int)):
        parser.add_argument(f"--{name.replace('_', '-')}", dest=name, type=kind)
    given = vars(parser.parse_args())
    try:
        settings, session, words = load(*map(given.pop, ("folder", "threads", "library")))
        text = given.pop("prompt")
        raw = list(text.encode())  # raises unless it is text
        ids = raw if words is None else words.encode(text).ids
        options = {k: v for k, v in settings["generation"].items() if k != "eos"}
        options |= {name: value for name, value in given.items() if value is not None}
        written = []
        print(text, end="", flush=True)
        text = ""
        for token in generate(settings, session, ids, **options):
            written.append(token)
            longer = (
                bytes(t for t in written if t < 256).decode(errors="replace")
                if words is None
                else words.decode(written)
            )
            if not longer.endswith("\ufffd"):  # a character may take several tokens
                print(longer[len(text) :], end="", flush=True)
                text = longer
        print()
    except UnicodeEncodeError:
        raise SystemExit("error: the prompt is not UTF-8 text") from None
    except Exception as error:  # onnxruntime has its own for an opset or operator it does not know
        kind = type(error).__name__
        raise SystemExit(
            f"error: {kind}: {error}\nIs the folder whole, onnxruntime new enough?"
        ) from None


if __name__ == "__main__":
    main()
