"""Small models of real library classes, each with an input: what the swap must understand."""

import torch
import torch.nn.functional as F
import transformers
from torch import nn

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


class Plain(nn.Module):
    """An embedding, one block with a residual around it, and a head."""

    def __init__(self, block, d=16):
        super().__init__()
        self.embed, self.mlp, self.head = nn.Embedding(64, d), block, nn.Linear(d, 8)

    def forward(self, ids):
        x = self.embed(ids)
        return self.head(x + self.mlp(x))


class TimmMlp(nn.Module):
    """The attribute names and order of a vision transformer's Mlp."""

    def __init__(self, d=16, hidden=40, drop=0.1):
        super().__init__()
        self.fc1, self.act, self.drop1 = nn.Linear(d, hidden), nn.GELU(), nn.Dropout(drop)
        self.norm, self.fc2, self.drop2 = nn.Identity(), nn.Linear(hidden, d), nn.Dropout(drop)

    def forward(self, x):
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


class W123(nn.Module):
    """SwiGLU in the names of older checkpoints: w1 is the gate, w3 the up matrix."""

    def __init__(self, d=16, hidden=40):
        super().__init__()
        self.w1, self.w2 = nn.Linear(d, hidden, bias=False), nn.Linear(hidden, d, bias=False)
        self.w3 = nn.Linear(d, hidden, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Square(W123):
    """All three matrices have one shape, so that only a probe tells their roles."""

    def __init__(self, d=16):
        super().__init__(d, d)

    def forward(self, x):
        return self.w3(self.w2(x) * torch.relu(self.w1(x)))


class FusedGate(nn.Module):
    """GEGLU: one matrix gives the hidden units first, then their gate."""

    def __init__(self, d=16, hidden=24):
        super().__init__()
        self.wi, self.wo = nn.Linear(d, 2 * hidden), nn.Linear(hidden, d)

    def forward(self, x):
        hidden, gate = self.wi(x).chunk(2, dim=-1)
        return self.wo(hidden * F.gelu(gate))


class Weird(nn.Module):
    """Functional activation and dropout, children whose names say nothing."""

    def __init__(self, d=16):
        super().__init__()
        self.b, self.a, self.rate = nn.Linear(40, d), nn.Linear(d, 40, bias=False), 0.2

    def forward(self, x):
        hidden = F.relu(self.a(x)).square()
        return F.dropout(self.b(hidden), self.rate, self.training)


class WithParameter(nn.Module):
    """An activation that is not in the registry and has a parameter."""

    def __init__(self, d=16):
        super().__init__()
        self.up, self.act, self.down = nn.Linear(d, 40), nn.PReLU(init=0.3), nn.Linear(40, d)

    def forward(self, x):
        return self.down(self.act(self.up(x)))


class EinsumBlock(nn.Module):
    """Bare weights: no adapter knows how they are used."""

    def __init__(self, d=16):
        super().__init__()
        self.expand = nn.Parameter(torch.randn(d, 40) / 4)
        self.shrink = nn.Parameter(torch.randn(40, d) / 6)

    def forward(self, x):
        return torch.einsum(
            "...f,fd->...d", torch.einsum("...d,df->...f", x, self.expand).relu(), self.shrink
        )


class Expert(nn.Module):
    def __init__(self, d=16, hidden=24):
        super().__init__()
        self.w1, self.w2 = nn.Linear(d, hidden, bias=False), nn.Linear(hidden, d, bias=False)
        self.w3, self.act_fn = nn.Linear(d, hidden, bias=False), nn.SiLU()

    def forward(self, x):
        return self.w2(self.act_fn(self.w1(x)) * self.w3(x))


class ListMoE(nn.Module):
    """A sparse block that calls its experts one by one."""

    def __init__(self, d=16, count=4):
        super().__init__()
        self.gate = nn.Linear(d, count, bias=False)
        self.experts = nn.ModuleList([Expert(d) for _ in range(count)])

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        weights, chosen = self.gate(rows).softmax(-1).topk(2, dim=-1)
        weights = weights / weights.sum(-1, keepdim=True)
        out = torch.zeros_like(rows)
        for i in range(len(self.experts)):
            token, k = torch.where(chosen == i)
            out.index_add_(0, token, self.experts[i](rows[token]) * weights[token, k, None])
        return out.reshape(x.shape)


class TorchStack(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        layer = {"d_model": 16, "nhead": 2, "dim_feedforward": 40, **kwargs}
        self.embed = nn.Embedding(64, 16)
        nested = layer.get("batch_first", False) and not layer.get("norm_first", False)
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(**layer), 2, enable_nested_tensor=nested
        )
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**layer), 1)

    def forward(self, ids):
        x = self.embed(ids)
        return self.decoder(x, self.encoder(x))


def _hf(name, **changes):
    config = getattr(transformers, f"{name}Config")(**{**SIZES, **changes})
    classes = {"Bert": "BertModel"}
    return getattr(transformers, classes.get(name, f"{name}ForCausalLM"))(config)


def gpt2():
    config = transformers.GPT2Config(
        vocab_size=64,
        n_embd=32,
        n_layer=2,
        n_head=2,
        n_positions=32,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config)


def mixtral(**changes):
    return _hf("Mixtral", num_key_value_heads=1, num_local_experts=4, **changes)


def bart():
    sizes = {
        f"{side}_{name}": n
        for side in ("encoder", "decoder")
        for name, n in (("layers", 1), ("ffn_dim", 48), ("attention_heads", 2))
    }  # noqa: E501
    tokens = {"pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 2}
    config = transformers.BartConfig(
        vocab_size=64,
        d_model=32,
        max_position_embeddings=32,
        activation_dropout=0.1,
        **sizes,
        **tokens,
    )
    return transformers.BartModel(config)


# name: (factory, family, number of blocks, gated, activation, dropout, dropout of the output)
ZOO = {
    "gpt2": (gpt2, "structure", 2, False, "gelu_tanh", 0.0, 0.1),
    "llama": (lambda: _hf("Llama"), "structure", 2, True, "silu", 0.0, 0.0),
    "bert": (lambda: _hf("Bert"), "split-bert", 2, False, "gelu", 0.0, 0.0),
    "bart": (bart, "fc-pair", 2, False, "gelu", 0.1, 0.0),
    "encoder": (
        lambda: TorchStack(batch_first=True),
        "torch-transformer",
        3,
        False,
        "relu",
        0.1,
        0.0,
    ),
    "encoder-gelu": (
        lambda: TorchStack(norm_first=True, activation="gelu", dropout=0.0),
        "torch-transformer",
        3,
        False,
        "gelu",
        0.0,
        0.0,
    ),
    "sequential": (
        lambda: Plain(
            nn.Sequential(
                nn.Linear(16, 40), nn.ReLU(), nn.Dropout(0.3), nn.Linear(40, 16), nn.Dropout(0.2)
            )
        ),
        "structure",
        1,
        False,
        "relu",
        0.3,
        0.2,
    ),
    "run": (
        lambda: Plain(
            nn.Sequential(
                nn.LayerNorm(16), nn.Linear(16, 40), nn.SiLU(), nn.Linear(40, 16), nn.Dropout(0.2)
            )
        ),
        "sequential",
        1,
        False,
        "silu",
        0.0,
        0.0,
    ),
    "timm": (lambda: Plain(TimmMlp()), "structure", 1, False, "gelu", 0.1, 0.1),
    "w123": (lambda: Plain(W123()), "structure", 1, True, "silu", 0.0, 0.0),
    "square": (lambda: Plain(Square()), "structure", 1, True, "relu", 0.0, 0.0),
    "fused-gate": (lambda: Plain(FusedGate()), "structure", 1, True, "gelu", 0.0, 0.0),
    "weird": (lambda: Plain(Weird()), "structure", 1, False, "relu2", 0.0, 0.2),
    "with-parameter": (lambda: Plain(WithParameter()), "structure", 1, False, "custom", 0.0, 0.0),
}


def make(name, seed=0):
    """A model of the zoo in eval mode, and ids for it."""
    torch.manual_seed(seed)
    model = ZOO[name][0]().eval()
    return model, torch.randint(0, 64, (2, 7), generator=torch.Generator().manual_seed(1))


def run(model, ids):
    """The first tensor of a model's output."""
    out = model(ids)
    return out if isinstance(out, torch.Tensor) else out[0]


def state(model):
    """A copy of a model's state_dict."""
    return {
        k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in model.state_dict().items()
    }


def relative(got, wanted):
    got, wanted = got.detach(), wanted.detach()
    return float((got - wanted).norm() / wanted.norm())
