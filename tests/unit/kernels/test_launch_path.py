"""The launches themselves, without a GPU: a stand-in driver says that there is an H100, and every kernel is compiled, not run.

So the arguments reach the kernels as they will on a GPU, with the types, the divisibility and the constants of the real call.
"""

import json
import os
import subprocess
import sys
from importlib.util import find_spec

import pytest

SCRIPT = """
import json, sys
import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

class Hopper:
    get_current_target = staticmethod(lambda: GPUTarget("cuda", 90, 32))
    get_current_device = staticmethod(lambda: 0)
    get_current_stream = staticmethod(lambda device=None: 0)
    get_active_torch_device = staticmethod(lambda: torch.device("cuda", 0))

driver.set_active(Hopper())
run, seen = JITFunction.run, []

def compile_only(kernel, *args, grid, warmup, **options):
    compiled = run(kernel, *args, grid=grid, warmup=True, **options)
    seen.append((kernel.__name__, "wgmma" in compiled.asm["ptx"], "cp.async.bulk.tensor" in compiled.asm["ptx"]))
    return compiled

JITFunction.run = compile_only
from moetrain.kernels.triton_ops import expert_ffn, router, segment_sum, sort_experts
from moetrain.ops.expert_sets import ExpertSet

def block(tokens, width, hidden, experts, top_k, gather, copied=0, rows_of_own=0):
    rows = tokens * top_k
    x = torch.zeros(tokens, width, dtype=torch.bfloat16)
    w_in, w_out = x.new_zeros(experts, 2 * hidden, width), x.new_zeros(experts, width, hidden)
    counts, index = torch.full((experts,), rows // experts), torch.arange(rows)
    options = dict.fromkeys(("token", "weight", "place", "bounds")) | {"activation": "silu", "gated": True}
    if gather:
        options |= {"token": index // top_k, "weight": torch.ones(rows), "place": index}
    sets = [ExpertSet((w_in, w_out), counts)]
    if copied:
        parts = x.new_zeros(copied, 3 * hidden * width).split([2 * hidden * width, hidden * width], dim=1)
        weights = parts[0].unflatten(1, (2 * hidden, width)), parts[1].unflatten(1, (width, hidden))
        sets = [ExpertSet((w_in, w_out), counts, rows_of_own), ExpertSet(weights, counts[:copied], rows - rows_of_own)]
    y, h = expert_ffn.forward(x, sets, **options)
    expert_ffn.backward(y, x, h, sets, **options)

block(1024, 256, 512, 8, 2, True)
block(1024, 256, 512, 8, 1, False)
block(1001, 250, 510, 1, 1, True)
block(1024, 256, 512, 3, 2, True, copied=2, rows_of_own=1001)
routed = router.forward(torch.zeros(1000, 64), 6, renormalise=True)
router.backward(routed, renormalise=True, grad_weight=routed.weight)
sort_experts.sort_by_expert(torch.zeros(1000, dtype=torch.int64), 8)
rows = torch.zeros(1000, 256, dtype=torch.bfloat16)
segment_sum.combine_backward(rows, rows, torch.zeros(1000, dtype=torch.int64), torch.ones(1000))
print(json.dumps(seen))
"""


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_launches_compile_for_an_h100(tmp_path):
    # one tile each: measuring would need the GPU
    settings = {"TRITON_CACHE_DIR": str(tmp_path), "MOETRAIN_TRITON_TUNE": "0", "TRITON_INTERPRET": "0"}
    done = subprocess.run([sys.executable, "-c", SCRIPT], env={**os.environ, **settings}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    seen = json.loads(done.stdout.splitlines()[-1])
    products = ["_activation", "_plain", "_activation_backward", "_outer", "_outer", "_plain"]
    combined = ["_activation", "_plain", "_segment_sum", "_activation_backward", "_outer", "_outer", "_plain", "_segment_sum"]
    of_copies = (
        ["_activation", "_plain"] * 2 + ["_segment_sum"] + ["_activation_backward", "_outer", "_outer", "_plain"] * 2 + ["_segment_sum"]
    )
    others = ["_forward", "_backward", "_rank_in_block", "_scatter", "_combine_backward"]
    assert [name for name, _, _ in seen] == combined + products + combined + of_copies + others
    assert all(wgmma for name, wgmma, _ in seen if name in products), "a product without the matrix instructions of Hopper"
    boxed = [boxed for name, _, boxed in seen if name in products]
    assert boxed == [True] * 12 + [False] * 6 + [True] * 12, "boxes are copied by the hardware exactly where rows are whole vectors"
