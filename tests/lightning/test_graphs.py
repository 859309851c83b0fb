"""Values of the plan change at every step, and a compiled layer is never compiled again."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("activation_bits", [0, 8])
def test_thirty_values_of_lambda_are_one_set_of_graphs(activation_bits, tmp_path):
    module = "tests.lightning.training_compiled"
    command = [sys.executable, "-m", module, str(tmp_path), str(activation_bits)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert len({after["blend"] for after in found}) == len(found) == 30
    # one graph for each of the two blocks: the input of the first needs no gradient
    assert [after["graphs"] for after in found] == [2] * 30
    assert found[-1]["breaks"] == 0
