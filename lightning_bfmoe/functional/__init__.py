"""Floor 0: the maths as pure functions of tensors. `reference` is the whole layer, in full."""

from lightning_bfmoe.functional.activation_quant import quantize_activations, round_rows
from lightning_bfmoe.functional.butterfly import (
    apply_butterfly,
    butterfly_matrix,
    hadamard_angles,
    num_pairs,
    num_stages,
    stage_pairs,
)
from lightning_bfmoe.functional.codes import (
    code_bytes,
    decode_codes,
    encode_codes,
    pack_nibbles,
    unpack_nibbles,
)
from lightning_bfmoe.functional.noise import counter_noise
from lightning_bfmoe.functional.outliers import (
    crest_factor,
    excess_kurtosis,
    incoherence,
    measures_from,
    merge_moments,
    outlier_moments,
    quantization_snr,
    tail_share,
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
    slot_rows,
    switch_loss,
    z_loss,
)
from lightning_bfmoe.functional.ternary import (
    check_finite,
    dequantize_ternary,
    quantize_ternary,
    ternarize,
)
from lightning_bfmoe.functional.usage import dead_experts, load_entropy, max_violation

__all__ = [
    "ExpertGroups",
    "TopK",
    "apply_butterfly",
    "balance_step",
    "butterfly_matrix",
    "check_finite",
    "code_bytes",
    "combine",
    "counter_noise",
    "crest_factor",
    "dead_experts",
    "decode_codes",
    "dequantize_ternary",
    "dispatch",
    "encode_codes",
    "excess_kurtosis",
    "expert_load",
    "group_by_expert",
    "hadamard_angles",
    "incoherence",
    "load_entropy",
    "max_violation",
    "measures_from",
    "merge_moments",
    "num_pairs",
    "num_stages",
    "outlier_moments",
    "pack_nibbles",
    "pack_trits",
    "packed_size",
    "quantization_snr",
    "quantize_activations",
    "quantize_ternary",
    "round_rows",
    "route_top_k",
    "stage_pairs",
    "slot_rows",
    "switch_loss",
    "tail_share",
    "ternarize",
    "unpack_trits",
    "unpack_nibbles",
    "z_loss",
]
