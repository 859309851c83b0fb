"""Floor 0: the maths as pure functions of tensors. `reference` is the whole layer, in full."""

from lightning_bfmoe.functional.butterfly import (
    apply_butterfly,
    butterfly_matrix,
    hadamard_angles,
    num_pairs,
    num_stages,
    stage_pairs,
)
from lightning_bfmoe.functional.packing import pack_trits, packed_size, unpack_trits
from lightning_bfmoe.functional.routing import (
    ExpertGroups,
    TopK,
    balance_step,
    combine,
    dispatch,
    expert_load,
    group_by_expert,
    route_top_k,
    switch_loss,
    z_loss,
)
from lightning_bfmoe.functional.ternary import (
    check_finite,
    dequantize_ternary,
    quantize_ternary,
    ternarize,
)

__all__ = [
    "ExpertGroups",
    "TopK",
    "apply_butterfly",
    "balance_step",
    "butterfly_matrix",
    "check_finite",
    "combine",
    "dequantize_ternary",
    "dispatch",
    "expert_load",
    "group_by_expert",
    "hadamard_angles",
    "num_pairs",
    "num_stages",
    "pack_trits",
    "packed_size",
    "quantize_ternary",
    "route_top_k",
    "stage_pairs",
    "switch_loss",
    "ternarize",
    "unpack_trits",
    "z_loss",
]
