"""A packed layer's decoding in Triton: on a GPU, and without one under the interpreter.

The checks take a device; see `test_rows_cuda`.
"""

import functools
import importlib
import importlib.util

import pytest
import torch

from lightning_bfmoe.functional import apply_butterfly
from lightning_bfmoe.functional.packing import pack_trits
from lightning_bfmoe.kernels import choose, decode, decode_plan, use_kernel
from lightning_bfmoe.kernels.decode_plan import Sizes, join, passes_in, passes_out, tiles_of
from lightning_bfmoe.layers import ButterflyMoE, PackedSubstrate
from tests.kernels.test_rows_cuda import in_a_process, with_triton

route = importlib.import_module("lightning_bfmoe.kernels.route")
DTYPES = torch.float32, torch.bfloat16, torch.float16


@functools.cache
def packed(d, d_ff, experts=3, k=2, bits="2", half=False, **options):
    """A packed layer whose every number matters."""
    torch.manual_seed(d + d_ff)
    layer = ButterflyMoE(d, d_ff, experts, k, angle_std=1.0, **options).eval()
    for matrix in layer.experts.linears().values():
        matrix.substrate = PackedSubstrate.from_substrate(matrix.substrate, bits)
        for name in ("bias", "gain_in", "gain_out"):
            if getattr(matrix, name) is not None:
                getattr(matrix, name).data.normal_(1, 0.4)
        if half:
            matrix.rotate_in.freeze(torch.float16)
            matrix.rotate_out.freeze(torch.float16)
    return layer.requires_grad_(False)


def plainly(layer, x, ids, weights):
    """The definition in double: every row by its own angles."""
    rows = x.repeat_interleave(ids.shape[1], 0).double()
    chosen = ids.reshape(-1)

    def times(matrix, rows):
        own = [getattr(matrix, name) for name in ("gain_in", "gain_out", "bias")]
        gain_in, gain_out, bias = (None if t is None else t.double() for t in own)
        if gain_in is not None:
            rows = rows * gain_in[chosen]
        rows = apply_butterfly(rows, matrix.rotate_in.angles.double()[chosen], inverse=True)
        rows = rows @ matrix.substrate.weight().double().T
        rows = apply_butterfly(rows, matrix.rotate_out.angles.double()[chosen])
        if gain_out is not None:
            rows = rows * gain_out[chosen]
        return rows if bias is None else rows + bias

    experts = layer.experts
    hidden = times(experts.up, rows)
    if experts.gate is None:
        hidden = experts.activation(hidden)
    else:
        hidden = experts.activation(times(experts.gate, rows)) * hidden
    y = times(experts.down, hidden).reshape(*ids.shape, -1)
    return (weights.double().unsqueeze(-1) * y).sum(1)


def check(device, d, d_ff, tokens=3, dtype=torch.float32, k=2, **options):
    """No further from the definition than twice the parts; poisoned where torch.empty is."""
    layer = packed(d, d_ff, k=k, **options).to(device)
    x = torch.randn(tokens, d, device=device).to(dtype)
    ids, weights = torch.randint(0, 3, (tokens, k), device=device), torch.rand(tokens, k).to(device)
    linears, name = layer.experts._packed(), layer.experts.activation.name
    assert decode.is_fused(x, ids, linears, name)
    y = decode.experts_cuda(x, ids, weights, linears, name, None)
    with use_kernel("rotate", "reference"):
        parts = layer.experts._parts(x, ids, weights)
    exact = plainly(layer, x, ids, weights)
    assert y.dtype == dtype and y.shape == exact.shape
    errors = [float((t - exact).norm() / exact.norm()) for t in (y, parts)]
    assert errors[0] <= 2 * errors[1] + 2e-7, (d, d_ff, tokens, dtype, options, errors)


def check_route(device):
    """The choice, its weights and the load, also where logits are not finite."""
    for experts, k, tokens in ((8, 2, 5), (5, 3, 4), (64, 4, 3), (1, 1, 2), (3, 3, 4)):
        for bias in (None, torch.randn(experts, device=device)):
            logits = 3 * torch.randn(tokens, experts, device=device)
            ours, load = route.route_cuda(logits, k, bias)
            plain, plain_load = route.route_reference(logits, k, bias)
            assert torch.equal(ours.experts, plain.experts) and torch.equal(load, plain_load)
            torch.testing.assert_close(ours.weights, plain.weights)
            torch.testing.assert_close(ours.probs, plain.probs)
    logits[0, 0], logits[1] = float("nan"), float("-inf")
    ours, load = route.route_cuda(logits, k, None)
    assert ours.weights[:2].isnan().all() and ours.weights[2:].isfinite().all()
    assert torch.equal(load, torch.full((3,), 2, device=device))  # of the two finite tokens
    assert torch.equal(ours.experts.sort(dim=1).values, torch.arange(3).expand(4, 3).to(device))
    for tokens, d, experts, dtype in ((3, 16, 5, torch.float32), (2, 700, 9, torch.bfloat16)):
        x, weight = torch.randn(tokens, d).to(device, dtype), torch.randn(experts, d).to(device)
        torch.testing.assert_close(route.scored(x, weight), x.float() @ weight.T)


def check_opaque(device):
    """The ops under `opcheck`."""
    layer = packed(16, 32, gains=True).to(device)
    x, ids = torch.randn(2, 16, device=device), torch.randint(0, 3, (2, 2), device=device)
    lists = [
        [decode.words_of(m.packed, m.d_out, m.d_in, m.bits), m.alpha, *m[5:]]
        for m in layer.experts._packed()
        if m is not None
    ]
    given = x, ids, torch.rand(2, 2, device=device), lists[0], [], lists[1], [16, 32, 32, 16]
    torch.library.opcheck(decode.fused, (*given, "gelu"))
    logits = torch.randn(3, 5, device=device)
    torch.library.opcheck(route.routed, (logits, 2, None))
    torch.library.opcheck(route.scored, (x, torch.randn(5, 16, device=device)))


def check_interpreted():
    """Run by `test_interpreted` where triton interprets."""
    check("cpu", 8, 16)
    check("cpu", 16, 32, gains=True, bits="1.6", half=True)
    decode_plan.ONE_TILE, decode_plan.TILE = 3, 32
    check("cpu", 32, 64, gains=True)
    check("cpu", 32, 64, tokens=2, k=1, gated=True, activation="silu")
    check("cpu", 48, 96, tokens=9, gains=True, activation="gelu_tanh", bits="1.6")
    check("cpu", 24, 80, gated=True, gains=True, activation="relu2", half=True)
    check("cpu", 40, 160, tokens=1, k=3, gated=True, bias=False)
    check("cpu", 64, 128, stages=4)
    check("cpu", 64, 128, tokens=2, dtype=torch.bfloat16)
    for activation in decode.FUSED_ACTIVATIONS:
        check("cpu", 16, 32, tokens=1, activation=activation, granularity="tensor")
    check_route("cpu")
    check_opaque("cpu")


def check_compiled():
    """Every kind of launch for a GPU that need not be there."""
    from tests.kernels import sm90

    before, product, _ = plan_of(2048, 8192, 2).inner[0]
    sm90.check(*(one.call for one in (*before, product)))
    plan = plan_of(768, 3072, 16)
    before, product, behind = plan.inner[0]
    sm90.check(*(one.call for one in (*before, product, *behind, *plan.down[1])))


def plan_of(d, d_ff, rows):
    stages = [(d - 1).bit_length(), (d_ff - 1).bit_length()]
    up = Sizes(d, d_ff, *stages, True, True, True, True)
    down = Sizes(d_ff, d, *reversed(stages), True, True, True, True)
    device = torch.device("cpu")
    return decode_plan.LayerPlan(up, None, down, "gelu", 2, rows, 2, device)


@with_triton
def test_interpreted():
    in_a_process(__name__, "check_interpreted", 1)


@with_triton
def test_compiles_for_a_gpu():
    in_a_process(__name__, "check_compiled", 0)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("d", "d_ff", "options"),
    [
        (2048, 8192, {}),
        (512, 2048, {"gains": True, "half": True}),
        (768, 3072, {"gated": True, "activation": "silu", "bits": "1.6"}),
        (4096, 16384, {"half": True}),
    ],
    ids=str,
)
def test_values_on_a_gpu(d, d_ff, options, dtype):
    for tokens in (1, 3, 8):
        check("cuda", d, d_ff, tokens, dtype, **options)


@pytest.mark.gpu
def test_the_rest_on_a_gpu():
    check_route("cuda")
    check_opaque("cuda")


@pytest.mark.gpu
def test_a_layer_in_a_graph_on_a_gpu():
    layer, x = packed(512, 2048, experts=8).to("cuda"), torch.randn(2, 512, device="cuda")
    assert choose("experts", x, torch.zeros(2, 2), layer.experts._packed(), "gelu").name == "triton"
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        layer(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
    x.normal_()
    graph.replay()
    with use_kernel("experts", "parts"), use_kernel("route", "reference"):
        torch.testing.assert_close(y, layer(x), rtol=1e-4, atol=1e-5)


def test_rows_are_cut_into_tiles():
    assert tiles_of(8192, 13) == (13, 0, 7) and tiles_of(8192, 13).segments == [
        (False, 0, 7), (True, 7, 13),
    ]  # fmt: skip
    assert tiles_of(768, 10) == (8, 2, 8) and tiles_of(512, 3).segments == [(False, 0, 3)]
    assert decode_plan.is_cut(640, 10) and not decode_plan.is_cut(600, 10)
    assert not decode_plan.is_cut(31, 7)  # all its stages are irregular


def test_two_rotations_share_a_pass_where_nothing_gathers():
    for d, passes in ((8192, 3), (768, 3)):
        stages = (d - 1).bit_length()
        sizes = Sizes(d, d, stages, stages, True, True, True, True)
        found = join(passes_out(sizes), passes_in(sizes))
        assert len(found) == passes
        stages_of = [
            (range(c["OUT_FIRST"], c["OUT_STOP"]), range(c["IN_FIRST"], c["IN_STOP"]))
            for c in (one.constants for one in found)
        ]
        regular = tiles_of(d, stages).regular
        for side in (0, 1):
            assert sorted(s for pair in stages_of for s in pair[side]) == list(range(regular))
        gains = [(c.constants["OUT_GAIN"], c.constants["IN_GAIN"]) for c in found]
        assert [sum(side) for side in zip(*gains, strict=True)] == [1, 1]


def test_words_are_the_bytes_of_the_2_bit_format_or_a_copy():
    trits = torch.randint(-1, 2, (5, 32), dtype=torch.int8)
    packed = pack_trits(trits, "2")
    words = decode.words_of(packed, 5, 32, "2")
    assert words.data_ptr() == packed.data_ptr() and words.shape == (5, 2)
    other = pack_trits(trits, "1.6")
    assert torch.equal(decode.words_of(other, 5, 32, "1.6"), words)
    assert decode.words_of(other, 5, 32, "1.6") is decode.words_of(other, 5, 32, "1.6")
    narrow = decode.words_of(pack_trits(trits[:, :20], "2"), 5, 20, "2")
    digits = narrow.unsqueeze(-1) >> (2 * torch.arange(16)) & 3
    assert torch.equal(digits.reshape(5, 32)[:, :20] - 1, trits[:, :20].int())
    assert (digits.reshape(5, 32)[:, 20:] == 1).all()


def test_what_is_not_fused_takes_the_parts():
    layer, x, ids = packed(16, 32), torch.randn(2, 16), torch.zeros(2, 2, dtype=torch.int64)
    linears = layer.experts._packed()
    assert choose("experts", x, ids, linears, "gelu").name == "parts"  # no GPU
    assert decode.is_fused(x, ids, linears, "gelu")
    assert not decode.is_fused(x, ids, linears, "mish")
    assert not decode.is_fused(x.double(), ids, linears, "gelu")
    assert not decode.is_fused(x, ids.expand(40, 2, 2).reshape(-1, 2), linears, "gelu")
    assert not decode.is_fused(x.clone().requires_grad_(), ids, linears, "gelu")
    assert not decode.is_fused(x, ids, packed(31, 62).experts._packed(), "gelu")
    rounding = packed(16, 32, activation_bits=8).experts
    assert rounding._packed() is None and ButterflyMoE(16, 32).experts._packed() is None
    assert packed(16, 32, down="dense").experts._packed() is None


def test_a_dropout_in_training_takes_the_parts():
    experts = packed(16, 32, dropout=0.5).experts
    assert experts._packed() is not None
    assert experts.train()._packed() is None
    experts.eval()
