"""The LitServe example over HTTP: streams, batches, health, and what it refuses."""

import argparse
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from examples.gpt import GPT
from lightning_bfmoe import load_packed, pack, swap_feed_forward
from lightning_bfmoe.deploy import Sampling, TokenGenerator

pytest.importorskip(
    "litserve", reason="examples/serve.py needs litserve: pip install -e '.[serve]'"
)

ROOT = Path(__file__).parents[2]
INIT = {"vocab_size": 256, "context": 48, "width": 16, "depth": 1, "heads": 2}


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    torch.manual_seed(0)
    model = GPT(**INIT)
    with torch.no_grad():
        model.embed.weight.normal_()
        model.norm.weight.normal_()
    swap_feed_forward(model, num_experts=3)
    path = tmp_path_factory.mktemp("served") / "model.bfmoe"
    pack(model, path, angles="int8")
    return path


@pytest.fixture(scope="module")
def port(file):
    """A running server; all its processes end with the tests of this file."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [
        sys.executable, "-m", "examples.serve", str(file), "--module", "examples.gpt:GPT",
        "--port", str(port), "--accelerator", "cpu", "--max-batch-size", "4",
        "--batch-timeout", "0.2",
    ]  # fmt: skip
    log = file.with_name("server.log")
    with open(log, "wb") as out:
        server = subprocess.Popen(command, cwd=ROOT, stdout=out, stderr=out, start_new_session=True)
    try:
        end = time.monotonic() + 120
        while time.monotonic() < end and server.poll() is None:
            try:
                if call(port, "GET", "/health")[0] == 200:
                    break
            except OSError:
                pass
            time.sleep(0.2)
        else:
            pytest.fail(log.read_text()[-3000:])
        yield port
    finally:
        for kind in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(server.pid, kind)
                server.wait(10)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                pass


def call(port, method, path, body=None, kind="application/json"):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request(method, path, body, {"content-type": kind})
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def ask(port, **body):
    status, text = call(port, "POST", "/generate", json.dumps(body))
    assert status == 200, text
    lines = [json.loads(line) for line in text.splitlines()]
    assert [("finished" in line) for line in lines] == [False] * (len(lines) - 1) + [True]
    return "".join(line["text"] for line in lines), lines[-1]["finished"]


def expected(file, prompt, sampling):
    """The same text, written here."""
    generator = TokenGenerator(load_packed(file, GPT(**INIT)))
    (row,) = generator.generate([list(prompt.encode())], sampling)
    return bytes(row.tokens).decode(errors="replace"), row.finished


def test_health(port):
    assert call(port, "GET", "/health") == (200, "ok")


def test_a_prompt_is_continued_as_a_stream(port, file):
    found = ask(port, prompt="näher", max_new_tokens=12, temperature=0.0)
    assert found == expected(file, "näher", Sampling(12, 0.0))
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("POST", "/generate", '{"prompt": "a"}', {"content-type": "application/json"})
    answer = connection.getresponse()
    assert answer.getheader("transfer-encoding") == "chunked"
    first = answer.readline()
    assert "text" in json.loads(first)
    connection.close()  # the client hangs up; the server goes on serving others
    assert ask(port, prompt="a", max_new_tokens=1)[1] == "length"


def test_requests_together_get_what_each_gets_alone(port, file):
    asked = [
        {"prompt": p, "max_new_tokens": n, "temperature": t, "seed": s}
        for p, n, t, s in [("a", 3, 1.0, 1), ("longer prompt", 20, 0.0, 2), ("é", 40, 1.5, 3)]
    ]
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda body: ask(port, **body), asked))
    for body, answer in zip(asked, found, strict=True):
        settings = {name: value for name, value in body.items() if name != "prompt"}
        assert answer == expected(file, body["prompt"], Sampling(**settings))


@pytest.mark.parametrize(
    ("body", "status", "match"),
    [
        ({}, 422, "prompt: Field required"),
        ({"prompt": 3}, 422, "prompt: Input should be a valid string"),
        ({"prompt": ["a"]}, 422, "valid string"),
        ({"prompt": ""}, 422, "at least one token"),
        ({"prompt": "a" * 48}, 422, "fit the context of 48 tokens"),
        ({"prompt": "a" * 40, "max_new_tokens": 9}, 422, "40 tokens and 9 new"),
        ({"prompt": "a", "max_new_tokens": "9"}, 422, "max_new_tokens: Input should be"),
        ({"prompt": "a", "max_new_tokens": 0}, 422, "max_new_tokens is a count"),
        ({"prompt": "a", "temperature": -1.0}, 422, "temperature is a finite number"),
        ({"prompt": "a", "seed": True}, 422, "seed: Input should be"),
        ({"prompt": "a", "length": 3}, 422, "length: Extra inputs"),
        (b'{"prompt": "\xff\xfe"}', 400, "error parsing the body"),
        (b'{"prompt": "\\ud800"}', 422, "lone surrogates"),
        (b'{"prompt": NaN}', 422, "valid string"),
        (b'{"prompt": "a"', 422, "the body is a JSON object"),
        (b"[1, 2]", 422, "the body is a JSON object"),
        (b'{"prompt": "' + b"a" * 2_000_000 + b'"}', 413, "too large"),
    ],
)
def test_bad_requests_are_answered_with_4xx_and_a_reason(port, body, status, match):
    raw = json.dumps(body) if isinstance(body, dict) else body
    found, text = call(port, "POST", "/generate", raw)
    assert (found, match in text) == (status, True), text
    assert isinstance(json.loads(text)["detail"], str)


def test_other_ways_in_are_refused(port):
    assert "application/json" in call(port, "POST", "/generate", "prompt=a", "text/plain")[1]
    assert call(port, "GET", "/generate")[0] == 405
    assert ask(port, prompt="still here", max_new_tokens=2)[1] == "length"


def options(file, **changed):
    given = {
        "file": str(file), "module": "examples.gpt:GPT", "tokenizer": None, "cache": True,
        "max_batch_size": 1, "batch_timeout": 0.0, "low_memory": True,
    }  # fmt: skip
    return argparse.Namespace(**given, **changed)


def test_an_error_in_the_middle_is_a_line_of_the_stream(file):
    from examples.serve import Completion, Generate, Limits

    Completion.limits = Limits(options(file))
    api = Generate(options(file))
    api.setup("cpu")
    request = Completion(prompt="a", max_new_tokens=5)
    assert list(api.predict(request))[-1]["finished"] == "length"
    with torch.no_grad():
        api.generator.model.head.weight.fill_(torch.nan)
    assert "the logits of a model are finite" in list(api.predict([request]))[-1][0]["error"]


def test_a_batch_is_decoded_together_and_streams(file):
    from examples.serve import Completion, Generate, Limits

    Completion.limits = Limits(options(file))
    api = Generate(options(file))
    api.setup("cpu")
    passes = []
    api.generator.model.register_forward_hook(lambda *_: passes.append(1))
    asked = [("a", 3, 1.0, 1), ("longer prompt", 9, 0.0, 2), ("é", 5, 1.5, 3)]
    batch = [Completion(prompt=p, max_new_tokens=n, temperature=t, seed=s) for p, n, t, s in asked]
    steps = list(api.predict(batch))
    assert len(steps) == len(passes) == 9  # as many as the longest takes, not the sum
    for row, request in enumerate(batch):
        pieces = [step[row] for step in steps if step[row]]
        alone = [piece for piece in api.predict(request) if piece]
        assert pieces == alone and pieces[-1]["finished"] == "length"


def test_a_server_that_cannot_start_says_why(file, capsys):
    from examples.serve import main

    assert main([str(file), "--module", "examples.gpt:Nothing"]) == 2
    assert "must be importable" in capsys.readouterr().err
    assert main([str(file) + "x", "--module", "examples.gpt:GPT"]) == 2
    assert "must be readable" in capsys.readouterr().err
