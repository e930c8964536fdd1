"""Training steps on a device that is not the CPU, on machines without one: ``python second_device.py single|placed SCENARIO ...``.

A second device is made in Python: its tensors hold CPU tensors, and a mode runs every operation on those. So what a GPU would refuse
or wait for can be seen: tensors of host and device in one operation, host tensors in collectives or such that are not contiguous,
indices that the host copies to the device by itself. Prints a line of JSON: what was found, and by run both losses and norms.

A process of its own, as torch keeps a registered device. FSDP is left out: it needs streams.
"""

import json
import sys
from collections import Counter
from dataclasses import replace

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.nn import functional as F
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from moetrain.parallel import parallelize
from moetrain.parallel.layouts import FSSDPSettings, Layout
from moetrain.testing.layouts import Training
from moetrain.testing.scenarios import SCENARIOS
from moetrain.train.step import evaluate_loss

NAME = "secondary"
COLLECTIVES = (
    "all_to_all_single", "all_reduce", "all_gather_into_tensor", "all_gather_single", "reduce_scatter_tensor", "reduce_scatter_single",
)  # fmt: skip
LAYOUTS = {
    "ep": Layout("ep", 1, 2, degree=2),
    "ep, two hops": Layout("ep", 1, 2, deduplicate=True, ranks_per_node=1),
    "zero3_experts": Layout("zero3_experts", 1, 2, fssdp=FSSDPSettings(planner="everywhere", split="even")),
    "fssdp": Layout("fssdp", 1, 2, ranks_per_node=1, fssdp=FSSDPSettings(transport="striped", accumulate="step", calibrate=True)),
}

found: Counter[str] = Counter()


class Backend(backend_registration._DummyBackendModule):
    def get_amp_supported_dtype(self):
        return [torch.bfloat16]


def register():
    """The device; and what torch does not take to it."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, Backend())
    torch_tensor = torch.tensor  # copies behind the dispatcher's back
    torch.tensor = lambda data, *, device=None, **options: torch_tensor(data, **options).to(device)
    F.scaled_dot_product_attention = attention
    return torch.device(NAME, 0)


def attention(query, key, value, *, attn_mask, is_causal, scale, enable_gqa):
    assert not enable_gqa
    scores = query @ key.transpose(-1, -2) * (scale or query.shape[-1] ** -0.5)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return torch.softmax(scores, dim=-1) @ value


class There(torch.Tensor):
    """A tensor of the device."""

    @staticmethod
    def __new__(cls, held):
        return torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(), dtype=held.dtype, device=torch.device(NAME, 0)
        )

    def __init__(self, held):
        self.held = held

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})

    def tolist(self):  # torch has none for subclasses
        return self.held.tolist()


def held(value):
    return value.held if isinstance(value, There) else value


def where():
    """The innermost lines of the package."""
    lines, frame = [], sys._getframe(2)
    while frame is not None and len(lines) < 3:
        if frame.f_globals.get("__name__", "").startswith("moetrain."):
            lines.append(f"{frame.f_globals['__name__']}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(lines)


def run(func, args, kwargs):
    """An operation on what its arguments hold; its results are on the device if an argument is, or if it is told so."""
    tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    there = any(isinstance(t, There) for t in tensors)
    # a scalar of the host may meet tensors of a device
    if there and func._schema.name != "aten::copy_" and any(not isinstance(t, There) and t.dim() for t in tensors):
        found[f"{func._schema.name} of host and device: {where()}"] += 1
    device = kwargs.get("device")
    options = tree_map(held, kwargs) | ({} if device is None else {"device": "cpu"})
    out = func(*tree_map(held, args), **options)
    if func._schema.name == "aten::copy_":
        return args[0]
    if not (there if device is None else torch.device(device).type == NAME):
        return out
    out = tree_map(lambda t: There(t) if isinstance(t, torch.Tensor) else t, out)
    return return_and_correct_aliasing(func, args, kwargs, out) if there and device is None else out


class Everything(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return run(func, args, kwargs or {})


def watched(collective):
    """A collective that runs on what tensors hold."""

    def call(*args, **options):
        for tensor in (t for t in args if isinstance(t, torch.Tensor)):
            if not isinstance(tensor, There):
                found[f"{collective.__name__} of a host tensor: {where()}"] += 1
            elif not tensor.is_contiguous():
                found[f"{collective.__name__} of a tensor that is not contiguous: {where()}"] += 1
        return collective(*map(held, args), **options)

    return call


def to_second_device(training, device):
    """A training that was started on CPU."""
    placed = training.placed
    for module in placed.model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = torch.nn.Parameter(There(tensor.detach())) if tensors is module._parameters else There(tensor)
    placed.device = device
    for executor in placed.executors().values():
        executor.device = device
        executor.plan = executor.plan  # its indices


def steps(training):
    """Losses and norms of two steps, with plain gradient descent."""
    figures = []
    for step in range(2):
        result = training.gradients(step)
        figures += [result.loss, training.placed.clip_gradients(None).item()]
        with torch.no_grad():
            for _, parameter in training.placed.parameters():
                if parameter.grad is not None:
                    parameter -= 0.01 * parameter.grad
        for name, layer in training.placed.model.moe_layers().items():
            layer.router.end_step(result.statistics[name])
        training.placed.end_step(result.statistics)
        training.optimizer.zero_grad = lambda **_: [setattr(p, "grad", None) for _, p in training.placed.parameters()]
    evaluate_loss(training.placed, training.scenario.objective.build(), training.batches(0))
    return figures


def compare(rank, name, layout, device):
    """Figures of a scenario on CPU and on the second device."""
    scenario = replace(SCENARIOS[name], dtype=torch.float32)
    plain = steps(Training.start(rank, scenario, layout))
    training = Training.start(rank, scenario, layout)
    originals = {name: getattr(dist, name) for name in COLLECTIVES if hasattr(dist, name)}
    for collective, original in originals.items():
        setattr(dist, collective, watched(original))
    try:
        with Everything():
            to_second_device(training, device)
            training.optimizer.zero_grad(set_to_none=True)
            return plain, steps(training)
    finally:
        for collective, original in originals.items():
            setattr(dist, collective, original)


def report(figures):
    print(json.dumps({"found": found, "figures": figures}), flush=True)


def placed(rank, names, port):
    device = register()
    store = dist.TCPStore("127.0.0.1", port, 2, is_master=False)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2)
    init_device_mesh = parallelize.init_device_mesh
    parallelize.init_device_mesh = lambda kind, *args, **options: init_device_mesh("cpu", *args, **options)
    parallelize.apply_fsdp = lambda *args, **options: None
    figures = {f"{name} {label}": compare(rank, name, layout, device) for name in names for label, layout in LAYOUTS.items()}
    everywhere = [None, None]
    dist.all_gather_object(everywhere, dict(found))
    found.update({what: 1 for other in everywhere for what in other})
    if rank == 0:
        report(figures)
    dist.destroy_process_group()


if __name__ == "__main__":
    if sys.argv[1] == "single":
        device = register()
        report({name: compare(0, name, Layout("single", 1, 1), device) for name in sys.argv[2:]})
    else:
        store = dist.TCPStore("127.0.0.1", 0, 2, is_master=True, wait_for_workers=False)
        mp.spawn(placed, (sys.argv[2:], store.port), nprocs=2)
