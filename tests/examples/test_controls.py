"""The controls: right against a slow double loop, equal to the dense block at first, real bytes."""

import copy

import pytest
import torch
import torch.nn.functional as F

from examples.control_files import (
    count_bytes,
    feed_forward_bytes,
    header_bytes,
    read_model,
    ternary_names,
    write_model,
)
from examples.controls import GPTWithBalanceLoss, StandardMoE, TernaryFeedForward, set_blend
from examples.gpt import GPT, FeedForward
from lightning_bfmoe.functional.routing import switch_loss
from lightning_bfmoe.functional.ternary import quantize_ternary

KINDS = {
    "dense": lambda dense: dense,
    "ternary dense": TernaryFeedForward,
    "moe": lambda dense: StandardMoE(dense, 4, 2),
    "ternary moe": lambda dense: StandardMoE(dense, 4, 2, ternary=True),
}


@pytest.fixture
def dense():
    torch.manual_seed(0)
    block = FeedForward(8, 24).double()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return block


def apart(moe):
    """Experts as they are after training: different from one another, and a decided router."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in moe.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
            parameter.add_(0.5 * noise)
    return moe


def double_loop(moe, x, blend):
    """A token at a time, an expert at a time, with the dense formula."""
    out = []
    for token in x.reshape(-1, x.shape[-1]):
        logits = moe.router @ token
        best = logits.topk(moe.top_k)
        total = torch.zeros_like(token)
        for weight, expert in zip(best.values.softmax(0), best.indices, strict=True):
            up, down = moe.up[expert], moe.down[expert]
            if blend:
                up, down = quantize_ternary(up, blend), quantize_ternary(down, blend)
            hidden = F.gelu(up @ token + moe.up_bias[expert])
            total = total + weight * (down @ hidden + moe.down_bias[expert])
        out.append(total)
    return torch.stack(out).view_as(x)


@pytest.mark.parametrize(("ternary", "blend"), [(False, 0.0), (True, 0.4), (True, 1.0)])
@pytest.mark.parametrize(("num_experts", "top_k"), [(4, 2), (5, 1), (3, 3)])
def test_moe_equals_the_double_loop_with_every_gradient(dense, num_experts, top_k, ternary, blend):
    fast = apart(StandardMoE(dense, num_experts, top_k, ternary=ternary).double())
    slow = copy.deepcopy(fast)
    fast.blend = blend
    x = torch.randn(2, 7, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
    ours, theirs = fast(inputs[0]), double_loop(slow, inputs[1], blend if ternary else 0.0)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-10, atol=1e-10)
    for (name, ours), theirs in zip(fast.named_parameters(), slow.parameters(), strict=True):
        assert theirs.grad.abs().sum() > 0 or (top_k == 1 and name == "router"), name
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-10, atol=1e-10)


def test_an_expert_without_tokens_is_no_trouble(dense):
    moe = StandardMoE(dense, 4, 1).double()
    with torch.no_grad():
        moe.router.zero_()
        moe.router[2] = 1.0
    moe(torch.ones(3, 8, dtype=torch.float64)).sum().backward()
    assert moe.up.grad[2].abs().sum() > 0
    assert moe.up.grad[[0, 1, 3]].abs().sum() == 0


@pytest.mark.parametrize("kind", KINDS)
def test_every_control_starts_as_the_dense_block(dense, kind):
    x = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    control = KINDS[kind](copy.deepcopy(dense)).double()
    torch.testing.assert_close(control(x), dense(x), rtol=1e-6, atol=1e-7)


def test_balance_loss_is_the_switch_loss_and_reaches_the_router(dense):
    moe = apart(StandardMoE(dense, 4, 2).double())
    x = torch.randn(9, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    moe(x)
    logits = x @ moe.router.T
    expected = switch_loss(logits.softmax(-1), logits.topk(2).indices)
    torch.testing.assert_close(moe.balance_loss, expected)
    (gradient,) = torch.autograd.grad(moe.balance_loss, moe.router)
    assert gradient.abs().sum() > 0


def test_the_training_step_adds_the_balance_loss(monkeypatch):
    torch.manual_seed(0)
    model = GPTWithBalanceLoss(vocab_size=20, context=6, width=8, depth=2, heads=2)
    for block in model.blocks:
        block.mlp = apart(StandardMoE(block.mlp, 4, 2))
    monkeypatch.setattr(model, "log", lambda *args, **kwargs: None)
    batch = (torch.zeros(2, 6, dtype=torch.int64), torch.ones(2, 6, dtype=torch.int64))
    total = model.training_step(batch, 0)
    extra = sum(float(block.mlp.balance_loss.detach()) for block in model.blocks) / 2
    assert float(total.detach()) == pytest.approx(model.loss(batch).item() + 0.01 * extra, rel=1e-5)


def small_gpt(kind):
    torch.manual_seed(0)
    model = GPT(vocab_size=20, context=6, width=8, depth=2, heads=2, hidden=20)
    for block in model.blocks:
        block.mlp = KINDS[kind](block.mlp)
        if kind != "dense":
            apart(block.mlp)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_bytes_counted_are_the_bytes_on_disk_but_for_the_header(tmp_path, kind):
    model = small_gpt(kind)
    size = write_model(model, tmp_path / "model.safetensors")
    assert size == (tmp_path / "model.safetensors").stat().st_size
    assert size - header_bytes(tmp_path / "model.safetensors") == count_bytes(model)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model.safetensors"]
    others = sum(4 * p.numel() for n, p in model.named_parameters() if ".mlp." not in n)
    assert feed_forward_bytes(model) == count_bytes(model) - others


def test_bytes_by_hand():
    # 4 experts: 20 x 8 and 8 x 20 trits, 28 row scales and 28 biases; a router of 4 x 8
    model = small_gpt("ternary moe")
    one = (4 * 160 // 5) + 4 * 4 * 20 + (4 * 160 // 5) + 4 * 4 * 8 + 4 * 4 * 28 + 4 * 32
    assert feed_forward_bytes(model) == 2 * one
    assert feed_forward_bytes(small_gpt("moe")) == 2 * 4 * (4 * (320 + 28) + 32)


@pytest.mark.parametrize("kind", KINDS)
def test_a_file_gives_the_model_back(tmp_path, kind):
    model = small_gpt(kind)
    set_blend(model, 1.0)
    write_model(model, tmp_path / "model.safetensors")
    fresh = small_gpt(kind)
    for parameter in fresh.parameters():
        torch.nn.init.constant_(parameter, 7.0)
    read_model(fresh, tmp_path / "model.safetensors")
    tokens = torch.arange(6)[None]
    with torch.no_grad():
        assert torch.equal(fresh(tokens), model(tokens))


def test_names_of_ternary_matrices():
    assert ternary_names(small_gpt("moe")) == {}
    assert len(ternary_names(small_gpt("ternary moe"))) == 4
    for scale in ("lstsq", "absmean"):
        block = TernaryFeedForward(FeedForward(4, 8), scale)
        assert ternary_names(block) == {"up": scale, "down": scale}


@pytest.mark.parametrize("scale", ["lstsq", "absmean"])
def test_a_file_holds_the_function_of_its_own_scale(scale, tmp_path):
    torch.manual_seed(0)
    block, x = TernaryFeedForward(FeedForward(8, 16), scale), torch.randn(5, 8)
    block.blend = 1.0
    write_model(block, tmp_path / "block")
    copy = read_model(TernaryFeedForward(FeedForward(8, 16)), tmp_path / "block")
    torch.testing.assert_close(copy(x), block(x))


@pytest.mark.parametrize("ternary", [False, True])
def test_all_tokens_computes_the_same_sum_and_gradients(ternary):
    block, x = FeedForward(8, 16).double(), torch.randn(5, 8, dtype=torch.float64)
    found = []
    for all_tokens in (False, True):
        moe = StandardMoE(block, 4, 2, ternary=ternary, all_tokens=all_tokens).double()
        with torch.no_grad():
            moe.up.copy_(torch.linspace(-1, 1, moe.up.numel()).sin().view_as(moe.up))
        moe.blend = 0.5
        y = moe(x)
        y.square().sum().backward()
        found.append([y.detach(), *(p.grad for p in moe.parameters())])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
        assert one.abs().sum() > 0
