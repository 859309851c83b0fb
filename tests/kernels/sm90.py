"""Compile the launches of a plan for a GPU that is not there, and read what they need.

To be run in a process of its own, with TRITON_INTERPRET=0 and from the repository's root.
"""

import os
import subprocess
import tempfile

TYPES = {
    "p_weights": "*fp32", "p_back": "*i64", "p_dot": "*fp32", "p_choice": "*i64", "p_part": "*i32",
    "p_order": "*i64", "p_expert": "*i64", "p_counts": "*i64", "p_weight": "*fp32",
    "p_parts": "*fp32", "p_blend": "*fp32", "p_experts": "*i64", "p_partner": "*i32",
    "p_pair": "*i32", "p_words": "*i32",
}  # fmt: skip


def resources(call):
    """The compiler's report on a `cuda_plan.Call`; pointers are bf16 unless `TYPES` knows them."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {}
    for name in call.kernel.arg_names:
        other = TYPES.get(name, "*bf16") if name.startswith("p_") else "i32"
        signature[name] = "constexpr" if name in call.constants else other
    aligned = {
        (i,): [["tt.divisibility", 16]] for i, t in enumerate(signature.values()) if t[0] == "*"
    }
    source = ASTSource(call.kernel, signature, call.constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=call.options)
    tools = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin")
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [os.path.join(tools, "cuobjdump"), "-res-usage", file.name]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout.split("Function", 1)[1]


def check(*calls):
    """No launch keeps registers in memory."""
    for call in calls:
        report = resources(call)
        assert "STACK:0" in report, (call.kernel.__name__, call.constants, report)
        print(call.kernel.__name__, call.constants, report.split()[1])
