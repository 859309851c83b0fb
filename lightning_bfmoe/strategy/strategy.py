"""`ButterflyMoEStrategy`: Lightning's DDP, and what plain DDP gets wrong with these layers."""

from collections.abc import Mapping
from datetime import timedelta
from typing import Any, Literal

import lightning.pytorch as pl
import torch.distributed as dist
from lightning.fabric.plugins.collectives.torch_collective import default_pg_timeout
from lightning.fabric.utilities.distributed import _distributed_is_initialized
from lightning.fabric.utilities.seed import reset_seed
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.strategies.strategy import Strategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from lightning_bfmoe.callbacks import ButterflyMoECallback
from lightning_bfmoe.callbacks.recording import check_count
from lightning_bfmoe.callbacks.trainable import TrainableSet
from lightning_bfmoe.errors import ConfigError, ReplicaError
from lightning_bfmoe.strategy import settings as names
from lightning_bfmoe.strategy.buffers import KeptApart
from lightning_bfmoe.strategy.comm_hook import (
    COMPRESSIONS,
    Traffic,
    mixed_precision_hook,
    substrates,
)
from lightning_bfmoe.strategy.launchers import SwappingLauncher
from lightning_bfmoe.strategy.registry import register
from lightning_bfmoe.strategy.replicas import agree_on_trainable, check_replicas
from lightning_bfmoe.strategy.trainable import LatentFreezer


class ButterflyMoEStrategy(DDPStrategy):
    """Data parallel training that swaps by itself and keeps all copies of the model equal.

    Registered as ``bfmoe`` and ``bfmoe_ddp`` (processes of their own), ``bfmoe_ddp_spawn``,
    ``bfmoe_ddp_fork`` and ``bfmoe_ddp_notebook``. Beyond DDP:

    - Without a `ButterflyMoECallback` among the Trainer's callbacks it brings one.
    - When `requires_grad` of any parameter has changed it wraps the model anew before the next
      step. Plain DDP goes on with the old set: the processes part without an error.
    - After a spawned or forked training the caller's module is swapped and holds the weights.
    - The balance biases, which move alike everywhere, are not sent again before every forward pass.
    - One process trains without launcher, process group and wrapper.

    Example:
        >>> trainer = pl.Trainer(
        ...     accelerator="cpu", devices=2, logger=False, enable_checkpointing=False,
        ...     strategy=ButterflyMoEStrategy(num_experts=64, top_k=4, compress="bf16"),
        ... )

    Args:
        compress: "bf16" sends the gradients of the shared matrices in bfloat16, half the bytes, and
            all others as they are. None sends all as they are.
        freeze: What a plan with `freeze_latents` does in its first phase. "factor": their learning
            rate is 0. "requires_grad": they have no gradient, which costs no traffic either; the
            optimizer's averages for them begin when they thaw.
        check_replicas_every_n_steps: Compare all parameters of all processes after every n-th
            optimizer step (count); 0 never does.
        start_method: How processes are started: "popen", "spawn", "fork", "forkserver".
        timeout: How long a process waits for another one.
        find_unused_parameters: See `torch.nn.parallel.DistributedDataParallel`, as for the two
            that follow and for further names of its arguments.
        static_graph: The set of used parameters never changes.
        gradient_as_bucket_view: Gradients are views of what is sent, which saves a copy.
        **kwargs: The arguments of `ButterflyMoECallback` for the callback that is brought, those of
            Lightning's `DDPStrategy`, and those of `DistributedDataParallel`.

    Raises:
        ConfigError: An unknown name or value; several processes on MPS; settings for the layers
            here and a callback in the Trainer.

    Source: measured (docs/decisions.md).
    """

    strategy_name = "bfmoe"
    swaps_in_main_process = True
    """Read by the callback, which refuses other strategies that spawn or fork."""

    def __init__(
        self,
        *,
        compress: Literal["bf16"] | None = None,
        freeze: Literal["factor", "requires_grad"] = "factor",
        check_replicas_every_n_steps: int = 0,
        start_method: Literal["popen", "spawn", "fork", "forkserver"] = "popen",
        timeout: timedelta | None = default_pg_timeout,
        find_unused_parameters: bool = False,
        static_graph: bool = False,
        gradient_as_bucket_view: bool = True,
        **kwargs: Any,
    ) -> None:
        _check(compress, freeze, check_replicas_every_n_steps, kwargs)
        self.settings, others = names.split_settings(kwargs)
        super().__init__(
            start_method=start_method,
            timeout=timeout,
            find_unused_parameters=find_unused_parameters,
            static_graph=static_graph,
            gradient_as_bucket_view=gradient_as_bucket_view,
            **others,
        )
        self.compress, self.freeze = compress, freeze
        self.check_every = check_replicas_every_n_steps
        self.callback: ButterflyMoECallback | None = None
        """The callback that was brought; None when the Trainer has one."""
        self.traffic = Traffic()
        """What the communication hook has sent, where there is one."""
        self._forget()

    def _forget(self) -> None:
        self._watched: TrainableSet | None = None
        self._freezer: LatentFreezer | None = None
        self._buffers: KeptApart | None = None
        self._accumulating = False
        self._wraps = self._steps = 0

    __init__.__signature__ = names.whole_signature(__init__)  # type: ignore[attr-defined]

    # Before training: processes and devices, the callback, the wrapper.

    @property
    def is_alone(self) -> bool:
        """Whether this one process is all there is."""
        return self.num_nodes * self.num_processes == 1

    def _configure_launcher(self) -> None:
        if not self.is_alone and self.root_device.type == "mps":
            raise ConfigError(
                "several processes need devices of which there can be several",
                got=f"{self.num_processes} x {self.num_nodes} processes on MPS",
                fix="Use devices=1, or accelerator='cpu'.",
            )
        if self.is_alone:
            self._launcher = None
        elif self._start_method == "popen":
            super()._configure_launcher()
        else:
            self._launcher = SwappingLauncher(self, start_method=self._start_method)

    def bring_callback(self, trainer: pl.Trainer) -> None:
        """Put a callback into the Trainer where the user has none."""
        self.callback = names.bring_callback(trainer, self.settings, self.callback)

    def setup_environment(self) -> None:
        assert self.lightning_module is not None and self.cluster_environment is not None
        self.bring_callback(self.lightning_module.trainer)
        if self.is_alone:  # else the launcher has done it
            self.cluster_environment.validate_settings(num_devices=1, num_nodes=1)
        super().setup_environment()

    def setup_distributed(self) -> None:
        if not self.is_alone:
            super().setup_distributed()
            return
        reset_seed()
        self.set_world_ranks()

    def setup(self, trainer: pl.Trainer) -> None:
        self._forget()
        if not self.is_alone:
            super().setup(trainer)
            return
        Strategy.setup(self, trainer)  # nothing to synchronise
        assert self.lightning_module is not None
        self._watched = TrainableSet(self.lightning_module)

    def _setup_model(self, model: nn.Module) -> nn.Module:  # type: ignore[override]
        """Wrap, unless there is nobody to talk to or nothing to say."""
        if self.is_alone or not any(p.requires_grad for p in model.parameters()):
            return model
        return super()._setup_model(model)

    def configure_ddp(self) -> None:
        """Wrap the bare module as it is now; also when it was wrapped before."""
        module = self.lightning_module
        assert module is not None
        if isinstance(self.model, DistributedDataParallel):
            self.model._remove_autograd_hooks()  # the old wrapper must not answer any more
        self.model = module
        self._buffers = self._buffers or KeptApart(module)
        self._buffers.share()
        self._watched = TrainableSet(module)
        super().configure_ddp()
        self._wraps += 1
        self._pl_static_graph_delay_done = False

    def _register_ddp_hooks(self) -> None:
        if not isinstance(self.model, DistributedDataParallel):
            return
        super()._register_ddp_hooks()
        if self.compress is not None:  # Lightning registers hooks on CUDA only
            self.traffic.narrow = {id(p) for p in substrates(self.model.module)}
            self.model.register_comm_hook(self.traffic, mixed_precision_hook)

    # While training.

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        self._follow()
        return super().training_step(*args, **kwargs)

    def _follow(self) -> None:
        """Freeze by the plan, and wrap anew when the trainable set is not the wrapped one."""
        module = self.lightning_module
        assert module is not None and self._watched is not None
        if self.freeze == "requires_grad":
            self._freezer = self._freezer or LatentFreezer(module.trainer, module)
            self._freezer.follow()
        changed = self._watched.changed()
        if not changed:
            return
        if self._accumulating:
            raise ReplicaError(
                "requires_grad changes between optimizer steps, not while gradients accumulate",
                got=f"a change of {len(changed)} parameters ({', '.join(changed[:4])}) after a "
                "backward pass whose gradients were not used yet",
                fix="Change it in a batch that begins an accumulation: after the batch in which "
                "trainer.global_step advanced.",
            )
        self._watched = TrainableSet(module)
        if not self.is_alone:
            wait = (self._timeout or default_pg_timeout) / 2  # before the collectives give up
            agree_on_trainable(self._watched.flags, self._wraps, wait)
            self.configure_ddp()

    def backward(self, *args: Any, **kwargs: Any) -> Tensor:
        self._accumulating = True
        return super().backward(*args, **kwargs)

    def optimizer_step(self, optimizer: Optimizer, *args: Any, **kwargs: Any) -> Any:
        output = super().optimizer_step(optimizer, *args, **kwargs)
        self._accumulating = False
        self._steps += 1
        if self.check_every and self._steps % self.check_every == 0 and not self.is_alone:
            assert self.lightning_module is not None and self._buffers is not None
            check_replicas(self.lightning_module, self._buffers.tensors(), self._steps)
        return output

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        """As Lightning's, without the barrier that it puts before every reduction of a tensor.

        An all-reduce waits for all processes anyway; on a GPU the barrier also stops the host.
        """
        summed = str(getattr(reduce_op, "name", reduce_op)).lower() == "sum"
        if not (summed and isinstance(tensor, Tensor) and _distributed_is_initialized()):
            return super().reduce(tensor, group, reduce_op)
        dist.all_reduce(tensor, group=group)
        return tensor

    def teardown(self) -> None:
        if self._freezer is not None:
            self._freezer.thaw()
        if self._buffers is not None:
            self._buffers.release()
        super().teardown()
        self._forget()

    def __getstate__(self) -> dict[str, Any]:
        """Leave references to parameters behind when sent to a spawned process."""
        state = {**self.__dict__, "_watched": None, "_freezer": None, "_buffers": None}
        return {**state, "traffic": Traffic(sent=self.traffic.sent)}

    @classmethod
    def register_strategies(cls, strategy_registry: Any) -> None:
        """Put the names into a registry; see `strategy.registry`."""
        register(strategy_registry)


def _check(compress: object, freeze: object, every: object, kwargs: Mapping[str, Any]) -> None:
    if compress is not None and compress not in COMPRESSIONS:
        raise ConfigError(
            "compress names a narrower type for the shared matrices' gradients",
            got=f"compress={compress!r}",
            fix="Use compress='bf16', or None.",
        )
    if compress is not None and kwargs.get("ddp_comm_hook") is not None:
        raise ConfigError(
            "a wrapper has one communication hook",
            got=f"compress={compress!r} and a ddp_comm_hook",
            fix="Drop one of them.",
        )
    if freeze not in ("factor", "requires_grad"):
        raise ConfigError(
            "freeze says how latents stand still: 'factor' or 'requires_grad'",
            got=f"freeze={freeze!r}",
            fix="Use freeze='factor'.",
        )
    if every != 0:
        check_count("check_replicas_every_n_steps", every)
