"""The CUDA kernel by the compiler that compiles it on a GPU machine. It runs on a Hopper GPU alone; what it computes is
tested on a CPU (tests/unit/test_hopper.py)."""

from __future__ import annotations

import json
import re
import subprocess
import sys

from tests.support import nvrtc_wheel

COMPILE = """
import json

from lenvm.paged import hopper

said = {}
of_64 = [(64, 3, 3, 1), (64, 3, 3, 16), (64, 3, 3, 64), (64, 8, 2, 32), (64, 1, 1, 32)]
for shape in [*of_64, (128, 6, 2, 16), (128, 2, 8, 16)]:
    told = hopper.options(*shape, norm=shape in [(64, 8, 2, 32), (128, 2, 8, 16)])
    code, log = hopper.compiled(hopper.source(shape[0]), [*told, "--ptxas-options=-v"])
    assert b"step_attention" in code
    said["-".join(map(str, shape))] = log
quiet = hopper.compiled(hopper.source(64), hopper.options(64, 3, 3, 16))[1]
# The bindings write into bytes; those of one byte are everybody's.
assert (quiet, b" "[0], b"\\0"[0]) == ("", 32, 0)
try:
    hopper.compiled("int main( {", hopper.options(64, 3, 3, 16))
except RuntimeError as error:
    said["error"] = str(error)
print(json.dumps(said))
"""


def test_it_is_compiled_within_its_registers_and_a_mistake_is_named(real_parts_required: bool) -> None:
    environment = nvrtc_wheel.environment(required=real_parts_required)
    done = subprocess.run(
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert "NVRTC_ERROR_COMPILATION" in said["error"]
    assert "step_attention.cu(1): error" in said.pop("error")
    assert len(said) == 7
    for shape, log in said.items():
        # Registers in memory, or products one after another for want of them (C7512), would cost what it is there for.
        assert "0 bytes spill stores, 0 bytes spill loads" in log, (shape, log)
        assert "C75" not in log, (shape, log)
        used = re.search(r"Used (\d+) registers", log)
        assert used is not None, (shape, log)
        # Of 64, with a block of the product in front all that a processor has.
        assert int(used[1]) <= (144 if shape.startswith("64-") else 168), (shape, log)
