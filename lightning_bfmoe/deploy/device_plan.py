r"""How many experts a device holds when a whole language model has to live on it.

.. math:: \text{RAM} \cdot \text{share} \ge \text{runtime} + \text{KV cache} +
   \text{rest of the model} + \text{workspace} + L \cdot \text{feed-forward}(N)

The feed-forward layers are counted as the packed file stores them (`plan_memory`, equal to the file
byte for byte), which is what `load_packed(low_memory=True)` keeps. A GPU's decode step, or a CPU
that shall be fast, keeps the matrix unpacked besides: the form `butterfly_fast`.
"""

from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE
from rich.console import Console, ConsoleOptions, RenderResult
from rich.table import Table

from lightning_bfmoe.deploy.devices import GIB, MIB, device_bytes, human_bytes
from lightning_bfmoe.deploy.memory import MemoryPlan, plan_memory
from lightning_bfmoe.errors import ConfigError
from lightning_bfmoe.functional.codes import CODE_BITS

RUNTIMES = {"torch": 310 * MIB, "onnxruntime": 54 * MIB, "none": 0}
"""Resident bytes of a process before any model: Python 3.11 with torch 2.13 (CPU wheel) and this
package, or with numpy, onnxruntime 1.32 and tokenizers; measured on x86-64 Linux."""
FORMS = {
    "moe_fp32": "standard MoE, fp32",
    "moe_ternary": "standard MoE, ternary",
    "butterfly_fast": "ButterflyMoE, kept unpacked",
    "butterfly": "ButterflyMoE, low_memory",
}
_UNITS = {"": 1, "B": 1, "K": 1 << 10, "M": MIB, "G": GIB}


@dataclass(frozen=True)
class DevicePlan:
    """What a device holds; see `plan_device`."""

    name: str
    ram: int
    """Bytes that may be used: RAM times share."""
    parts: dict[str, int]
    """What is taken before any expert: runtime, kv cache, rest of the model, workspace (bytes)."""
    experts: dict[str, int]
    """Form -> most experts per layer; 0: not one."""
    needed: dict[str, int]
    """Form -> bytes that the asked number of experts takes, all parts included."""
    asked: int
    """Experts per layer that were asked for."""

    def fits(self, form: str = "butterfly") -> bool:
        """Whether the asked number of experts fits."""
        return self.needed[form] <= self.ram

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Prints what is taken and a line a form."""
        taken = ", ".join(f"{name} {human_bytes(size)}" for name, size in self.parts.items())
        yield f"{self.name}: {human_bytes(self.ram)} to use; before any expert: {taken}"
        table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
        table.add_column("feed-forward layers as")
        table.add_column("experts that fit", justify="right", no_wrap=True)
        table.add_column(f"model with {self.asked:,}", justify="right", no_wrap=True)
        table.add_column("", no_wrap=True)
        for form, label in FORMS.items():
            table.add_row(
                label, f"{self.experts[form]:,}", human_bytes(self.needed[form]),
                "fits" if self.fits(form) else "does not fit",
            )  # fmt: skip
        yield table


def plan_device(
    device: str | int,
    d_model: int,
    d_ff: int,
    num_experts: int,
    *,
    layers: int = 1,
    vocab_size: int = 0,
    context: int = 1024,
    batch: int = 1,
    kv_width: int | None = None,
    rest_bits: int = 32,
    runtime: str | int = "torch",
    share: float = 1.0,
    **settings: Any,
) -> DevicePlan:
    """Counts a decoder-only language model on a device, and the experts that still fit.

    The rest of the model is taken to be per layer attention of four d_model x d_model matrices with
    biases and two norms, one more norm, an embedding tied to the output, and learned positions.

    Example:
        >>> plan = plan_device("512MB", 512, 2048, 64, layers=8, vocab_size=32000)
        >>> plan.fits("butterfly"), plan.fits("moe_ternary"), plan.experts["moe_fp32"]
        (True, False, 1)

    Args:
        device: A name of `DEVICES`, bytes, or a size as `512MB` or `4GiB` (both binary).
        d_model: Width of the model.
        d_ff: Hidden width.
        num_experts: Experts per layer that are asked for.
        layers: Layers.
        vocab_size: Tokens of the embedding; 0: none is counted.
        context: Tokens of the key-value cache, for each sequence.
        batch: Sequences at once.
        kv_width: Width of keys (and of values) in a layer; None: d_model.
        rest_bits: 32 or 16: of the rest of the model and of the cache.
        runtime: A name of `RUNTIMES`, or bytes.
        share: Part of the RAM that may be used, in (0, 1]; the system and others take the rest.
        **settings: As in `plan_memory`: gated, angle_bits, gains, trit_bits, ...

    Raises:
        ConfigError: The device or runtime is unknown, or a setting out of range.
    """
    sizes = {"layers": layers, "context": context, "batch": batch, "num_experts": num_experts}
    if kv_width is not None:
        sizes["kv_width"] = kv_width
    for name, value in (*sizes.items(), ("vocab_size", vocab_size + 1)):
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ConfigError(f"{name} must be a count", got=value, fix="Use a positive number.")
    if rest_bits not in (32, 16):
        raise ConfigError("rest_bits must be 32 or 16", got=rest_bits, fix="Use 32.")
    if not 0 < share <= 1:
        raise ConfigError("share must lie in (0, 1]", got=share, fix="Use share=1.0 for all of it.")
    name = f"{device}"
    ram = int(device_bytes(parse_size(device)) * share)
    width = d_model if kv_width is None else kv_width
    attention = layers * (4 * d_model * (d_model + 1) + 4 * d_model) + 2 * d_model
    rest = (attention + (vocab_size + context) * d_model) * rest_bits // 8
    workspace = 4 * d_model * d_ff  # one matrix, unpacked while it is multiplied
    parts = {
        "runtime": _runtime(runtime),
        "kv cache": 2 * layers * batch * context * width * rest_bits // 8,
        "rest of the model": rest,
        "workspace": workspace,
    }
    settings = settings | {"layers": layers, "top_k": 1}
    plans = [plan_memory(d_model, d_ff, count, **settings) for count in (1, 2, num_experts)]
    experts, needed = {}, {}
    for form in FORMS:
        fixed = sum(parts.values()) - (0 if form.startswith("butterfly") else workspace)
        one, two, asked = (_layer_bytes(plan, form, settings) for plan in plans)
        needed[form] = fixed + asked
        room = ram - fixed - (2 * one - two)
        experts[form] = max(0, room // (two - one))
    return DevicePlan(name, ram, parts, experts, needed, num_experts)


def parse_size(size: str | int) -> str | int:
    """`512MB`, `4GiB` or `1000000` as bytes, in binary units; anything else as it is.

    Example:
        >>> parse_size("512MB") == parse_size("512 MiB") == 512 << 20, parse_size("rpi5")
        (True, 'rpi5')
    """
    if isinstance(size, int):
        return size
    text = size.strip().upper().removesuffix("IB").removesuffix("B").strip()
    unit = text[-1:] if text[-1:] in ("K", "M", "G") else ""
    number = text.removesuffix(unit).strip()
    return int(number) * _UNITS[unit] if number.isdigit() else size


def _layer_bytes(plan: MemoryPlan, form: str, settings: dict[str, Any]) -> int:
    """All feed-forward layers in a form; the fast one keeps float32 matrices and coded angles."""
    if form != "butterfly_fast":
        return plan.bytes(form)
    matrices = plan.parts["dense_fp32"]["weights"]
    bits = settings.get("angle_bits", 16)
    angles = plan.parts["butterfly"]["angles"] * 32 / bits if bits in CODE_BITS else 0
    return plan.bytes() + round(plan.layers * (matrices + angles))


def _runtime(runtime: str | int) -> int:
    known = isinstance(runtime, str) and runtime in RUNTIMES
    if known:
        return RUNTIMES[str(runtime)]
    size = parse_size(runtime)
    if not isinstance(size, int) or size < 0:
        raise ConfigError(
            "runtime must be a known name or bytes",
            got=repr(runtime),
            fix=f"Known: {', '.join(RUNTIMES)}.",
        )
    return size
