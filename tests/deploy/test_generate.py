"""Generation: with a cache, through Hugging Face's, and without, one and the same text."""

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from examples.gpt import GPT
from lightning_bfmoe import load_packed, pack, swap_feed_forward
from lightning_bfmoe.deploy import Continuation, KVCache, Sampling, Step, TokenGenerator
from lightning_bfmoe.errors import BFMoEError, ConfigError, ShapeError
from lightning_bfmoe.layers import set_blend

VOCAB, CONTEXT = 31, 24
PROMPTS = [[3, 1, 4, 1, 5, 9], [2], [6, 5, 3]]
GREEDY = Sampling(10, temperature=0)


def build():
    return GPT(vocab_size=VOCAB, context=CONTEXT, width=16, depth=2, heads=2)


@pytest.fixture(scope="module")
def swapped():
    """A swapped GPT with large weights, so that greedy text does not settle on one token."""
    torch.manual_seed(0)
    model = build()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.5)
        model.norm.weight.normal_()  # the output's embedding is not the input's any more
    swap_feed_forward(model, num_experts=4, top_k=2)
    set_blend(model, 1.0)
    return model.eval()


@pytest.fixture(scope="module")
def packed(swapped, tmp_path_factory):
    path = tmp_path_factory.mktemp("packed") / "model.bfmoe"
    pack(swapped, path, angles="int8")
    return path


@pytest.mark.parametrize("low_memory", [False, True])
def test_greedy_text_is_the_same_with_and_without_a_cache(packed, low_memory):
    model = load_packed(packed, build(), low_memory=low_memory).double()
    with_cache = TokenGenerator(model).generate(PROMPTS, GREEDY)
    without = TokenGenerator(model, cache=False).generate(PROMPTS, GREEDY)
    assert with_cache == without
    assert len({token for row in with_cache for token in row.tokens}) > 5
    for prompt, row in zip(PROMPTS, with_cache, strict=True):  # nor does a row depend on the others
        assert TokenGenerator(model).generate([prompt], GREEDY) == [row]
        logits = model(torch.tensor([[*prompt, *row.tokens]]))[0, len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == row.tokens


def test_cached_logits_equal_the_whole_prefix_in_double(swapped):
    model = copy.deepcopy(swapped).double()
    tokens = torch.randint(VOCAB, (2, 12), generator=torch.Generator().manual_seed(0))
    cache = KVCache(2, CONTEXT)
    with torch.no_grad():
        whole, parts = model(tokens), []
        for first, stop in ((0, 5), (5, 6), (6, 9), (9, 12)):
            cache.begin(stop - first, stop)
            parts.append(model(tokens[:, first:stop], cache))
            cache.lengths.add_(stop - first)
    assert (torch.cat(parts, dim=1) - whole).abs().max() < 1e-12
    assert cache.bytes == 2 * 2 * 2 * CONTEXT * 16 * 8  # layers, keys and values, rows


def test_the_text_of_a_seed_does_not_depend_on_the_batch(packed):
    generator = TokenGenerator(load_packed(packed, build()))
    settings = [Sampling(8, 1.5, seed=s, top_k=None, top_p=0.9) for s in (1, 2, 3)]
    state = torch.get_rng_state()
    together = generator.generate(PROMPTS, settings)
    assert torch.equal(torch.get_rng_state(), state)
    alone = [generator.generate([p], s)[0] for p, s in zip(PROMPTS, settings, strict=True)]
    assert together == alone
    assert generator.generate([PROMPTS[0]], Sampling(8, 1.5, seed=9))[0] != together[0]


def test_sampling_follows_the_probabilities(packed):
    model = load_packed(packed, build())
    with torch.no_grad():
        probs = (model(torch.tensor([PROMPTS[0]]))[0, -1] / 2.0).softmax(-1)
    generator = TokenGenerator(model)
    drawn = torch.zeros(VOCAB)
    for start in range(0, 2000, 500):
        seeds = [Sampling(1, 2.0, top_k=None, seed=start + i) for i in range(500)]
        for row in generator.generate([PROMPTS[0]] * 500, seeds):
            drawn[row.tokens[0]] += 1
    assert (drawn / 2000 - probs).abs().max() < 0.04


@pytest.mark.parametrize(
    ("setting", "kept"), [({"top_k": 3}, 3), ({"top_k": None, "top_p": 0.5}, None), ({}, 40)]
)
def test_top_k_and_top_p_keep_the_likeliest(packed, setting, kept):
    model = load_packed(packed, build())
    with torch.no_grad():
        probs, order = model(torch.tensor([PROMPTS[0]]))[0, -1].softmax(-1).sort(descending=True)
    if kept is None:
        kept = int((probs.cumsum(0) < 0.5).sum()) + 1
    settings = [Sampling(1, 1.0, seed=s, **setting) for s in range(300)]
    drawn = {row.tokens[0] for row in TokenGenerator(model).generate([PROMPTS[0]] * 300, settings)}
    assert drawn <= set(order[:kept].tolist())
    assert len(drawn) > 1


def test_rows_end_on_their_own(packed):
    generator = TokenGenerator(load_packed(packed, build()))
    full = generator.generate(PROMPTS, GREEDY)
    stop = full[1].tokens[4]
    first = full[1].tokens.index(stop)
    settings = [Sampling(2, 0), Sampling(10, 0, stop=[stop]), Sampling(None, 0)]
    steps = list(generator.stream(PROMPTS, settings))
    assert all(isinstance(step, Step) for step in steps)
    assert len(steps) == CONTEXT - len(PROMPTS[2])  # the last row fills the context
    rows = [[s.tokens[i] for s in steps if s.tokens[i] is not None] for i in range(3)]
    assert rows[0] == full[0].tokens[:2]
    assert rows[1] == full[1].tokens[:first]
    assert rows[2][:10] == full[2].tokens
    assert steps[1].finished[0] == "length" and steps[0].finished[0] is None
    assert steps[-1].finished == ["length", "stop", "length"]
    assert generator.generate(PROMPTS, settings)[1] == Continuation(rows[1], "stop")


def test_a_stream_comes_token_by_token(packed):
    calls = []
    model = load_packed(packed, build())
    model.register_forward_hook(lambda module, args, output: calls.append(args[0].shape))
    stream = TokenGenerator(model).stream([PROMPTS[0]], GREEDY)
    assert calls == []
    next(stream)
    assert calls == [(1, 6)]
    next(stream)
    assert calls == [(1, 6), (1, 1)]


def test_one_stream_at_a_time(packed):
    generator = TokenGenerator(load_packed(packed, build()))
    stream = generator.stream([[1]], GREEDY)
    next(stream)
    with pytest.raises(ConfigError, match="one stream of a generator"):
        generator.stream([[1]], GREEDY)
    stream.close()
    assert generator.generate([[1]], GREEDY)


@pytest.mark.parametrize(
    ("prompts", "sampling", "error", "match"),
    [
        ([[]], GREEDY, ConfigError, "at least one token"),
        ([], GREEDY, ConfigError, "at least one prompt"),
        ([[1]], [GREEDY] * 2, ConfigError, "one Sampling for all or for each"),
        ([[1] * CONTEXT], Sampling(), ConfigError, "fit the context of 24"),
        ([[1] * 20], Sampling(5), ConfigError, "20 tokens and 5 new"),
        ([[VOCAB]], GREEDY, ConfigError, "tokens 0 .. 30"),
        ([[-1]], GREEDY, ConfigError, "tokens 0 .. 30"),
        ([[1.5]], GREEDY, ShapeError, "integer token ids"),
        ([torch.ones(1, 2)], GREEDY, ShapeError, "integer token ids"),
    ],
)
@pytest.mark.parametrize("cache", [True, False])
def test_bad_requests_are_refused_before_anything_runs(
    packed, prompts, sampling, error, match, cache
):
    generator = TokenGenerator(load_packed(packed, build()), cache=cache)
    with pytest.raises(error, match=match):
        generator.stream(prompts, sampling)


@pytest.mark.parametrize(
    ("setting", "match"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is a count"),
        ({"max_new_tokens": True}, "max_new_tokens is a count"),
        ({"top_k": 0}, "top_k is a count"),
        ({"temperature": -1.0}, "temperature is a finite number"),
        ({"temperature": float("nan")}, "temperature is a finite number"),
        ({"temperature": "hot"}, "temperature is a finite number"),
        ({"top_p": 0.0}, "top_p is a finite number"),
        ({"top_p": 1.5}, "top_p is a finite number"),
        ({"seed": -1}, "seed is an integer"),
        ({"stop": "ab"}, "collection of token ids"),
    ],
)
def test_settings_out_of_range(setting, match):
    with pytest.raises(ConfigError, match=match):
        Sampling(**setting)


class NoCache(nn.Module):
    """Causal, without a word about a cache or a context."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(VOCAB, VOCAB)

    def forward(self, tokens):
        return self.embed(tokens)


def test_nothing_falls_back_silently():
    with pytest.raises(ConfigError, match="pass cache=False"):
        TokenGenerator(NoCache(), context=8)
    with pytest.raises(ConfigError, match="give the model an attribute `context`"):
        TokenGenerator(NoCache(), cache=False)
    assert len(TokenGenerator(NoCache(), context=8, cache=False).generate([[1, 2]])[0].tokens) == 6
    with pytest.raises(ConfigError, match="the model says 24"):
        TokenGenerator(build(), context=25)
    with pytest.raises(ConfigError, match="needs a model on CUDA"):
        TokenGenerator(build(), cuda_graph=True)


def test_a_model_that_says_something_else():
    model = nn.Sequential(nn.Embedding(VOCAB, 4), nn.Flatten())
    generator = TokenGenerator(model, context=8, cache=False)
    with pytest.raises(ConfigError, match=r"logits \(rows, time, vocabulary\)"):
        generator.generate([[1, 2]])


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_reported(temperature):
    model = NoCache()
    model.embed.weight.data[7] = torch.nan
    generator = TokenGenerator(model, context=8, cache=False)
    with pytest.raises(BFMoEError, match="prompt 1 after 0 new tokens"):
        generator.generate([[1], [7]], Sampling(temperature=temperature))
    assert generator.generate([[1]], Sampling(1, temperature=0))  # it is free again


def test_a_model_that_moves_is_noticed(packed):
    model = load_packed(packed, build())
    generator = TokenGenerator(model)
    model.double()
    with pytest.raises(ConfigError, match="new TokenGenerator"):
        generator.generate([[1]])


class NoWaiting(TorchDispatchMode):
    """Refuses what would stop the queue of a GPU, and so the capture of a graph."""

    waits = ("_local_scalar_dense", "nonzero", "masked_select", "_unique2", "is_nonzero", "item")

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.overloadpacket.__name__
        assert name not in self.waits, f"{name} waits for the device"
        if name.startswith("index"):
            indices = args[1] if isinstance(args[1], list | tuple) else [args[1]]
            masks = [i for i in indices if isinstance(i, torch.Tensor) and i.dtype == torch.bool]
            assert not masks, f"{name} by a mask waits for the device"
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("angles", ["fp16", "int8", "int4"])
@pytest.mark.parametrize("low_memory", [False, True])
def test_a_decode_step_never_waits_for_the_device(swapped, tmp_path, angles, low_memory):
    pack(swapped, tmp_path / "m.bfmoe", angles=angles)
    model = load_packed(tmp_path / "m.bfmoe", build(), low_memory=low_memory)
    decoding = TokenGenerator(model).decoding
    with torch.no_grad():
        decoding.prefill(PROMPTS, [5, 5, 5])
        with NoWaiting():
            decoding.step(torch.tensor([1, 2, 3]))
            with pytest.raises(AssertionError, match="waits"):
                torch.ones(2).sum().item()


# --- Hugging Face ---


def hugging_face(kind):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=VOCAB, n_positions=CONTEXT, n_embd=16, n_layer=2, n_head=2,
            initializer_range=0.5,
        )  # fmt: skip
        return transformers.GPT2LMHeadModel(config)
    sizes = {
        "vocab_size": VOCAB, "max_position_embeddings": CONTEXT, "hidden_size": 16,
        "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "initializer_range": 0.5,
    }  # fmt: skip
    if kind == "llama":
        return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes))
    return transformers.MistralForCausalLM(transformers.MistralConfig(sliding_window=4, **sizes))


@pytest.mark.parametrize("kind", ["gpt2", "llama", "mistral"])
def test_hugging_face_models_decode_with_their_own_cache(kind, tmp_path):
    model = hugging_face(kind).double().eval()
    swap_feed_forward(model, num_experts=2, top_k=1)
    set_blend(model, 1.0)
    with_cache = TokenGenerator(model).generate(PROMPTS, GREEDY)
    assert with_cache == TokenGenerator(model, cache=False).generate(PROMPTS, GREEDY)
    assert with_cache == TokenGenerator(model).generate(PROMPTS, GREEDY)
    assert len({token for row in with_cache for token in row.tokens}) > 4
    theirs = model.generate(
        torch.tensor([PROMPTS[0]]), max_new_tokens=10, do_sample=False, pad_token_id=0
    )
    assert theirs[0, len(PROMPTS[0]) :].tolist() == with_cache[0].tokens


def test_a_hugging_face_batch_must_fit_together():
    generator = TokenGenerator(hugging_face("gpt2"))
    with pytest.raises(ConfigError, match="longest prompt and the most new tokens"):
        generator.generate([[1] * 20, [1]], [Sampling(2), Sampling(20)])


@pytest.mark.gpu
@pytest.mark.parametrize("angles", ["fp16", "int8"])
@pytest.mark.parametrize("low_memory", [False, True])
def test_cuda_graphs_write_the_same_text(swapped, tmp_path, angles, low_memory):
    pack(swapped, tmp_path / "m.bfmoe", angles=angles)
    model = load_packed(tmp_path / "m.bfmoe", build(), device="cuda", low_memory=low_memory)
    plain = TokenGenerator(model, cuda_graph=False).generate(PROMPTS, GREEDY)
    graphed = TokenGenerator(model)
    for _ in range(2):  # captured, then replayed with the same buffers
        assert graphed.generate(PROMPTS, GREEDY) == plain
        assert graphed.generate(PROMPTS[:1], GREEDY) == plain[:1]


@pytest.mark.gpu
def test_cuda_graphs_of_hugging_face_models():
    model = hugging_face("llama").cuda().eval()
    plain = TokenGenerator(model, cuda_graph=False).generate(PROMPTS, GREEDY)
    graphed = TokenGenerator(model)
    assert graphed.generate(PROMPTS, GREEDY) == plain == graphed.generate(PROMPTS, GREEDY)
    sliding = TokenGenerator(hugging_face("mistral").cuda())
    with pytest.raises(ConfigError, match="plain static layers"):
        sliding.generate(PROMPTS, GREEDY)
