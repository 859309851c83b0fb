"""A small GPT as a plain LightningModule. It knows nothing of lightning_bfmoe: "your model".

Pre-LayerNorm decoder, learned positions, GELU feed-forward blocks, output tied to the embedding.
"""

import math
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Attention(nn.Module):
    """Causal multi-head self-attention, ``[batch, time, width]`` -> same.

    Args:
        width: Size of a token vector.
        heads: Number of heads; must divide ``width``.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(self, x: Tensor, memory: Any = None) -> Tensor:
        """Mix every position with the ones before it; `memory` keeps those of earlier calls."""
        batch, time, width = x.shape
        heads = self.qkv(x).view(batch, time, 3, self.heads, width // self.heads)
        q, k, v = heads.permute(2, 0, 3, 1, 4)  # each [batch, heads, time, width / heads]
        mask = None
        if memory is not None:
            k, v, mask = memory.update(k, v)  # those of all tokens so far
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None)
        return self.out(mixed.transpose(1, 2).reshape(batch, time, width))


class FeedForward(nn.Module):
    """Two linear maps with a GELU between them, on each position alone.

    Args:
        width: Size of a token vector.
        hidden: Size between the two maps.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.expand = nn.Linear(width, hidden)
        self.act = nn.GELU()
        self.contract = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """``[..., width]`` -> same."""
        return self.contract(self.act(self.expand(x)))


class Block(nn.Module):
    """One layer: attention and feed-forward, each behind a LayerNorm and beside a skip.

    Args:
        width: Size of a token vector.
        heads: Number of attention heads.
        hidden: Hidden size of the feed-forward block.
    """

    def __init__(self, width: int, heads: int, hidden: int) -> None:
        super().__init__()
        self.norm_attention = nn.LayerNorm(width)
        self.attention = Attention(width, heads)
        self.norm_mlp = nn.LayerNorm(width)
        self.mlp = FeedForward(width, hidden)

    def forward(self, x: Tensor, memory: Any = None) -> Tensor:
        """``[batch, time, width]`` -> same."""
        x = x + self.attention(self.norm_attention(x), memory)
        return x + self.mlp(self.norm_mlp(x))


class GPT(L.LightningModule):
    """A decoder-only language model.

    Example:
        >>> model = GPT(vocab_size=50, context=8, width=16, depth=1, heads=2)
        >>> model(torch.zeros(3, 5, dtype=torch.int64)).shape
        torch.Size([3, 5, 50])

    Args:
        vocab_size: Number of token ids.
        context: Most tokens the model can look at.
        width: Size of a token vector.
        depth: Number of layers.
        heads: Attention heads per layer; must divide ``width``.
        hidden: Hidden size of the feed-forward blocks; None for ``4 * width``.
        learning_rate: AdamW's rate after the warm-up.
        weight_decay: AdamW's decay, on matrices only.
    """

    def __init__(
        self,
        vocab_size: int = 1024,
        context: int = 128,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        hidden: int | None = None,
        learning_rate: float = 2e-3,
        weight_decay: float = 0.1,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.context = context
        self.learning_rate, self.weight_decay = learning_rate, weight_decay
        self.embed = nn.Embedding(vocab_size, width)
        self.position = nn.Parameter(torch.zeros(context, width))
        self.blocks = nn.ModuleList(Block(width, heads, hidden or 4 * width) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocab_size, bias=False)
        self.head.weight = self.embed.weight  # tied
        self.apply(_init)

    def forward(self, tokens: Tensor, cache: Any = None) -> Tensor:
        """Ids ``[batch, time]`` -> logits ``[batch, time, vocab_size]``; time <= context.

        With a key-value cache only the new tokens come in: it says where they stand
        (``cache.positions``, ``[batch, time]``) and keeps a memory for each layer.
        """
        places = slice(tokens.shape[1]) if cache is None else cache.positions
        x = self.embed(tokens) + self.position[places]
        for number, block in enumerate(self.blocks):
            x = block(x, None if cache is None else cache[number])
        return self.head(self.norm(x))

    def loss(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        """Mean cross-entropy of the next token, in nats."""
        tokens, targets = batch
        return F.cross_entropy(self(tokens).flatten(0, 1), targets.flatten())

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        """One step; logs ``train_loss``."""
        loss = self.loss(batch)
        self.log("train_loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        """Logs ``val_loss``, averaged over all windows."""
        self.log("val_loss", self.loss(batch), prog_bar=True, batch_size=len(batch[0]))

    def configure_optimizers(self) -> dict:
        """AdamW (decay on matrices only) with warm-up and cosine over the whole run."""
        decay = [p for p in self.parameters() if p.requires_grad and p.dim() >= 2]
        plain = [p for p in self.parameters() if p.requires_grad and p.dim() < 2]
        optimizer = torch.optim.AdamW(
            [
                {"params": decay, "weight_decay": self.weight_decay},
                {"params": plain, "weight_decay": 0.0},
            ],
            lr=self.learning_rate,
            betas=(0.9, 0.95),
        )
        steps = int(self.trainer.estimated_stepping_batches)
        scheduler = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: warm_up_and_cosine(step, steps)
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    @torch.no_grad()
    def generate(
        self,
        prompt: Tensor,
        num_tokens: int,
        *,
        temperature: float = 0.8,
        top_k: int | None = 40,
        seed: int = 0,
    ) -> Tensor:
        """Continue a prompt by sampling; the global random state is not touched.

        Args:
            prompt: int64 ``[time]``, at least one token; its last ``context`` tokens are used.
            num_tokens: How many tokens to add.
            temperature: Divides the logits; 0 takes the most likely token.
            top_k: Sample among so many tokens; None for all.
            seed: Seed of the call's own generator.

        Returns:
            int64 ``[time + num_tokens]``, the prompt included.
        """
        generator = torch.Generator(device=prompt.device).manual_seed(seed)
        was_training = self.training
        self.eval()
        tokens = prompt
        for _ in range(num_tokens):
            logits = self(tokens[None, -self.context :])[0, -1].float()
            if top_k is not None:
                best = logits.topk(min(top_k, len(logits))).values[-1]
                logits = logits.masked_fill(logits < best, -torch.inf)
            if temperature == 0:
                new = logits.argmax()[None]
            else:
                new = torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator)
            tokens = torch.cat([tokens, new])
        self.train(was_training)
        return tokens


def warm_up_and_cosine(step: int, steps: int) -> float:
    """Factor of the learning rate: up over a tenth of the steps, then a cosine down to 0.

    Example:
        >>> [round(warm_up_and_cosine(step, 20), 2) for step in (0, 1, 11, 20)]
        [0.5, 1.0, 0.5, 0.0]
    """
    warm = max(steps // 10, 1)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * min((step - warm) / max(steps - warm, 1), 1.0)))


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, std=0.02)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)
