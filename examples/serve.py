"""Serve a packed language model over HTTP with LitServe: streams, batches, clear refusals.

    pip install litserve
    python -m examples.serve model.bfmoe --module examples.gpt:GPT
    curl -N localhost:8000/generate --json '{"prompt": "To be", "max_new_tokens": 40}'

The answer is a line of JSON per piece of text: ``{"text": ", or"}``; the last one says why it
ended: ``{"text": "", "finished": "length"}``. ``GET /health`` answers 200 when the model is loaded.
A bad request is answered with 4xx and ``{"detail": "what is wrong"}`` before it takes a place in a
batch. Requests that arrive within the batch timeout are decoded together; what each of them gets
does not depend on the others.
"""

import argparse
import sys
from collections.abc import Iterator
from typing import Any, ClassVar

import litserve as ls
import torch
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, model_validator
from torch import nn

from lightning_bfmoe import BFMoEError, load_packed
from lightning_bfmoe.cli_packed import import_name
from lightning_bfmoe.data import BPETokenizer, ByteTokenizer, TextTokenizer
from lightning_bfmoe.deploy import Sampling, TextStream, TokenGenerator, read_packed

MAX_BODY = 1 << 20  # bytes of a request


class Limits:
    """What a prompt must fit, known without loading the weights."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.tokenizer = load_tokenizer(options.tokenizer)
        with torch.device("meta"):
            self.generator = TokenGenerator(build(options), cache=options.cache)

    def encode(self, prompt: str, max_new_tokens: int | None) -> list[int]:
        """Ids of a prompt that fits.

        Raises:
            ValueError: It does not.
        """
        try:
            prompt.encode()
        except UnicodeEncodeError:  # JSON can spell half a character
            raise ValueError("a prompt is text, without lone surrogates") from None
        ids = self.generator.check(self.tokenizer.encode(prompt))
        self.generator.room(len(ids), max_new_tokens)
        return ids


class Completion(BaseModel):
    """The body of a request; checked in the server's front, before it reaches the model."""

    model_config = ConfigDict(extra="forbid", strict=True)
    limits: ClassVar[Limits]

    prompt: str
    max_new_tokens: int | None = None
    temperature: float = 0.8
    top_k: int | None = 40
    top_p: float = 1.0
    seed: int = 0

    def sampling(self) -> Sampling:
        """The settings without the prompt."""
        return Sampling(**self.model_dump(exclude={"prompt"}))

    @model_validator(mode="after")
    def _fits(self) -> "Completion":
        self.sampling()
        self.limits.encode(self.prompt, self.max_new_tokens)
        return self


class Generate(ls.LitAPI):
    """One model, in a process of its own on its device.

    Args:
        options: The command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        super().__init__(
            max_batch_size=options.max_batch_size,
            batch_timeout=options.batch_timeout,
            stream=True,
            api_path="/generate",
        )
        self.options = options

    def setup(self, device: str) -> None:
        """Load the file; called once in each worker."""
        options = self.options
        self.tokenizer = load_tokenizer(options.tokenizer)
        model = load_packed(
            options.file, build(options), device=device, low_memory=options.low_memory
        )
        self.generator = TokenGenerator(model, cache=options.cache)

    def decode_request(self, request: Completion) -> Completion:
        """The annotation is what makes the front check a body."""
        return request

    def predict(self, requests: Any) -> Iterator[Any]:
        """Yield for each step the pieces of all requests; of the request alone when it is one."""
        batch = requests if isinstance(requests, list) else [requests]
        for pieces in self._pieces(batch):
            yield pieces if isinstance(requests, list) else pieces[0]

    def encode_response(self, output: Iterator[Any]):  # LitServe takes an annotation as the body's
        """Each piece becomes a line of JSON."""
        yield from output

    def _pieces(self, batch: list[Completion]) -> Iterator[list[dict | str]]:
        prompts = [self.tokenizer.encode(request.prompt).tolist() for request in batch]
        texts = [TextStream(self._decode, prompt) for prompt in prompts]
        ended = [False] * len(batch)
        try:
            for step in self.generator.stream(prompts, [request.sampling() for request in batch]):
                pieces: list[dict | str] = [""] * len(batch)  # nothing is sent for an empty one
                for row, (token, reason) in enumerate(zip(*step, strict=True)):
                    text = "" if token is None else texts[row].add(token)
                    if reason is not None and not ended[row]:
                        ended[row] = True
                        pieces[row] = {"text": text + texts[row].end(), "finished": reason}
                    elif text:
                        pieces[row] = {"text": text}
                yield pieces
        except BFMoEError as error:  # the stream has begun, so the status can say it no more
            yield ["" if done else {"error": str(error)} for done in ended]

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(torch.tensor(ids, dtype=torch.int64))


def build(options: argparse.Namespace) -> nn.Module:
    """The model's class with the arguments that the file keeps."""
    return import_name(options.module)(**read_packed(options.file).header.init)


def load_tokenizer(path: str | None) -> TextTokenizer:
    """UTF-8 bytes, or a JSON file of the package `tokenizers`."""
    return ByteTokenizer() if path is None else BPETokenizer.load(path)


async def explain(request: Request, error: Exception) -> JSONResponse:
    """What is wrong with a body, in one line of plain text."""
    assert isinstance(error, RequestValidationError)
    problems = []
    for item in error.errors():
        text = item["msg"].removeprefix("Value error, ")
        if item["type"] in ("json_invalid", "model_attributes_type", "missing_body"):
            text = "the body is a JSON object, sent as application/json"
        names = [part for part in item["loc"] if isinstance(part, str) and part != "body"]
        problems.append(": ".join([*names, text]))
    text = "; ".join(problems).encode("ascii", "backslashreplace").decode()
    return JSONResponse({"detail": text}, status_code=422)


def make_server(options: argparse.Namespace) -> ls.LitServer:
    """The server, ready to `run`."""
    Completion.limits = Limits(options)
    server = ls.LitServer(
        Generate(options), accelerator=options.accelerator, max_payload_size=MAX_BODY, timeout=60
    )
    server.app.add_exception_handler(RequestValidationError, explain)
    return server


def main(arguments: list[str] | None = None) -> int:
    """Parse the command line and serve until it is stopped."""
    parser = argparse.ArgumentParser(
        prog="serve", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", help="a packed file")
    parser.add_argument("--module", required=True, help="class of the model: package.module:Name")
    parser.add_argument("--tokenizer", help="JSON file of `tokenizers`; left out: UTF-8 bytes")
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 serves other machines too")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--accelerator", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--max-batch-size", type=int, default=8, help="requests decoded together")
    parser.add_argument(
        "--batch-timeout", type=float, default=0.01, help="seconds to wait for more"
    )
    parser.add_argument("--low-memory", action="store_true", help="keep the packed form alone")
    parser.add_argument("--no-cache", dest="cache", action="store_false",
                        help="for a class without a cache: compute every prefix anew")  # fmt: skip
    options = parser.parse_args(arguments)
    try:
        server = make_server(options)
    except BFMoEError as error:
        print(error, file=sys.stderr)  # noqa: T201
        return 2
    server.run(host=options.host, port=options.port, generate_client_file=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
