"""Memory of devices that people deploy to, for the planner."""

from lightning_bfmoe.errors import ConfigError

MIB, GIB = 1 << 20, 1 << 30

# RAM as the maker's data sheet names it; the system and other programs take a part of it.
DEVICES: dict[str, int] = {
    "esp32-s3": 512 << 10,  # Espressif ESP32-S3 data sheet: 512 KB on-chip SRAM
    "stm32h7": 1 * MIB,  # ST STM32H743 data sheet: 1 MB on-chip RAM
    "rpi-zero2w": 512 * MIB,  # Raspberry Pi Zero 2 W product brief: 512 MB LPDDR2
    "rpi4": 4 * GIB,  # Raspberry Pi 4 Model B product brief: the 4 GB model
    "rpi5": 8 * GIB,  # Raspberry Pi 5 product brief: the 8 GB model, as in the paper's table
    "jetson-nano": 4 * GIB,  # NVIDIA Jetson Nano data sheet: 4 GB LPDDR4, as in the paper's table
    "jetson-orin-nano": 8 * GIB,  # NVIDIA Jetson Orin Nano data sheet: 8 GB LPDDR5
    "phone": 8 * GIB,  # a usual phone of 2024-2026
    "laptop": 16 * GIB,  # a usual laptop of 2024-2026
    "rtx4090": 24 * GIB,  # NVIDIA GeForce RTX 4090 product page: 24 GB GDDR6X
    "h100": 80 * GIB,  # NVIDIA H100 data sheet: 80 GB HBM
}
"""Name -> RAM in bytes."""


def device_bytes(device: str | int) -> int:
    """RAM of a device by name, or a number of bytes as it is.

    Example:
        >>> device_bytes("rpi5") == 8 * GIB
        True

    Raises:
        ConfigError: The name is unknown, or the number is not positive.
    """
    if isinstance(device, int) and not isinstance(device, bool) and device > 0:
        return device
    if not isinstance(device, str) or device not in DEVICES:
        raise ConfigError(
            "device must be a known name or a positive number of bytes",
            got=repr(device),
            fix=f"Known: {', '.join(DEVICES)}; any other by its memory, as --ram 512MB.",
        )
    return DEVICES[device]


def human_bytes(count: float) -> str:
    """A byte count for people, in binary units.

    Example:
        >>> human_bytes(425984), human_bytes(3)
        ('416.0 KiB', '3 B')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    return f"{count:.1f} TiB"
