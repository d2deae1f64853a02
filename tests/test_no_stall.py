"""Nothing on the host waits for the device but the one reader, and that at the beginning of a step."""

import contextlib
import dataclasses
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from loops import SHAPES, Loop, small
from tiny_models import MODELS, build, sample
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.backends.cudagraphs import find_input_mutations, get_device_node_mapping
from torch._inductor.utils import get_first_incompatible_cudagraph_node
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from adacache_triton import (
    AdaCacheConfig,
    Codebook,
    MotionRegularization,
    apply_adacache,
    batch,
    distributed,
    readback,
)
from adacache_triton.batch import Batch
from adacache_triton.readback import Readback

STEPS = 9
DEVICE = "meta"  # its tensors hold no values: whoever asks for one raises
SHORT, LONG = 0.05, 10.0  # a distance after which steps are reused, and one after which none is
CODEBOOK = Codebook((0.1, 0.3), (3, 2, 1))


class Told:
    """The reader's double: what the device would have measured comes from a script."""

    late = True
    script, log = iter(()), []

    def __init__(self, numbers: Tensor, group=None):
        assert numbers.dim() == 2 and numbers.dtype == torch.float32 and numbers.device.type == DEVICE
        rows, columns = numbers.shape
        self._rows = [next(Told.script)[:columns] if columns > 1 else [0.0] for _ in range(rows)]
        Told.log.append("sent")

    def row(self, index: int) -> list[float]:
        Told.log.append("read")
        return self._rows[index]


@pytest.fixture
def told(monkeypatch):
    """Sets the distances of the videos and calls to come, again and again; returns what happens to them."""
    for module in (batch, distributed):
        monkeypatch.setattr(module, "Readback", Told)

    def tell(*distances: float) -> list[str]:
        # Sums of the distance and of the motion, each with what it is relative to, for two strides.
        Told.script, Told.log = ([d, 1.0, 0.3, 1.0, 0.3, 1.0] for d in itertools.cycle(distances)), []
        return Told.log

    return tell


class NoCopies(TorchDispatchMode):
    """Fails where a tensor goes from the host to the device or back, which waits for all that is queued."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        copies = func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        # A single number of the host's is an argument of the kernel, not a copy.
        tensors = (x for x in tree_iter((args, kwargs, result)) if isinstance(x, Tensor) and (x.dim() or copies))
        if len({x.device for x in tensors}) > 1:
            raise RuntimeError(f"{func} takes tensors of the host and of the device")
        return result


class NoValues(TorchFunctionMode):
    """Fails where a tensor on the device is made of the host's values: a copy that the dispatcher does not see."""

    makers = (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = func in self.makers and result.device.type == DEVICE and result is not args[0]
        if made or (func in (Tensor.__getitem__, Tensor.__setitem__) and isinstance(args[1], list)):
            raise RuntimeError(f"{func.__name__} takes the host's values to the device")
        return result


@contextlib.contextmanager
def no_waiting():
    with torch.no_grad(), NoValues(), NoCopies():
        yield


def config_of(per_video: bool, granularity: str = "stack") -> AdaCacheConfig:
    motion = MotionRegularization((1, STEPS), (1, 2), scale=0.3)
    return AdaCacheConfig(CODEBOOK, motion, granularity=granularity, per_video=per_video)


CASES = [("latte", 1, True, "stack"), ("wan", 2, True, "stack")]
CASES += itertools.product(["toy"], [1, 2], [False, True], ["stack", "block", "module"])


@pytest.mark.parametrize("name, calls, per_video, granularity", CASES)
def test_a_pipelines_loop(told, name, calls, per_video, granularity):
    log = told(SHORT, LONG) if per_video else told(SHORT)
    loop = Loop(name, calls, config_of(per_video, granularity), DEVICE)
    loop(6, around=no_waiting)
    videos = loop.handle.report().videos if per_video else [loop.handle.report()]
    assert {step.reason for video in videos for step in video.steps} >= {"rate", "reused"}
    assert len({tuple(video.computed_steps) for video in videos}) == len(videos), "the batch was split"
    assert {"sent", "read"} == set(log)


@pytest.mark.parametrize("forecast", ("fitted", "quadratic"))
@pytest.mark.parametrize("name, calls, per_video", [("latte", 1, True), ("wan", 2, False)])
def test_a_forecast(told, name, calls, per_video, forecast):
    told(SHORT, LONG) if per_video else told(SHORT)
    config = dataclasses.replace(config_of(per_video), forecast=forecast)
    loop = Loop(name, calls, config, DEVICE)
    loop(8, around=no_waiting)
    report = loop.handle._report()  # the public one looks at the slopes, too, which are values
    for each in report.videos or (report,):
        assert {step.reason for step in each.steps} >= {"rate"}
    assert any(not step.computed for each in report.videos or (report,) for step in each.steps)


def test_a_serving_loop(told):
    told(SHORT, LONG, SHORT, SHORT, LONG)
    (latents, text), (model, stack) = SHAPES["toy"], small("toy", DEVICE)
    handle = apply_adacache(model, config_of(per_video=True), stack=stack)
    sessions, reports = [handle.session(STEPS), handle.session(STEPS - 3)], []
    for _ in range(STEPS):
        inputs = (torch.randn(2 * len(sessions), *shape, device=DEVICE) for shape in (latents, (), text))
        with no_waiting(), handle.step(sessions):
            model(*inputs)
        reports += [session.report() for session in sessions if session.over]
        sessions = [session for session in sessions if not session.over]
    assert [report.num_steps for report in reports] == [STEPS - 3, STEPS]
    assert all({step.reason for step in report.steps} >= {"rate", "reused"} for report in reports)


@pytest.mark.parametrize("name, granularity", [("wan", "stack"), ("toy", "block")])
def test_both_graphs_of_a_compiled_model_could_be_captured(told, name, granularity):
    """All in them lies on the device, none writes to its inputs, and no operation is one that a CUDA graph refuses."""
    told(SHORT)
    graphs = []

    def compiler(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    model, stack = small(name, DEVICE)
    model.compile(backend=aot_autograd(fw_compiler=compiler, inference_compiler=compiler), fullgraph=True)
    handle = apply_adacache(model, dataclasses.replace(config_of(False, granularity), num_steps=STEPS), stack=stack)
    latents, text = SHAPES[name]
    inputs = [torch.randn(2, *shape, device=DEVICE) for shape in (latents, (), text)]
    with torch.no_grad(), handle.run():
        for _ in range(4):
            model(*inputs)
    assert [step.computed for step in handle.report().steps] == [True, True, False, False]
    assert len(graphs) == 2
    for graph in graphs:
        assert {device.type for device in get_device_node_mapping(graph)} == {DEVICE}
        assert not find_input_mutations(graph.graph) and get_first_incompatible_cudagraph_node(graph) is None


CULPRITS = {
    "item": lambda x: x.sum().item(),
    "float": lambda x: float(x.max()),
    "bool": lambda x: bool(x.isfinite().all()),
    "equal": lambda x: torch.equal(x, x),
    "tolist": lambda x: x.tolist(),
    "numpy": lambda x: x.numpy(),
    "cpu": lambda x: x.cpu(),
    "copy to the host": lambda x: torch.empty(x.shape).copy_(x, non_blocking=True),
    "nonzero": lambda x: x.nonzero(),
    "mask": lambda x: x[x > 0],
    "index of the host's": lambda x: x[torch.tensor([0, 0])],
    "list of indices": lambda x: x[[0, 0]],
    "index on the device": lambda x: range(9)[x.argmax()],
    "tensor": lambda x: torch.tensor(1.0, device=x.device),
    "new tensor": lambda x: x.new_tensor([1.0, 2.0]),
    "copy to the device": lambda x: torch.zeros(()).to(x.device),
    "copy into the device": lambda x: x.copy_(torch.zeros(x.shape)),
}


@pytest.mark.parametrize("culprit", CULPRITS)
def test_one_that_waits_would_be_caught(told, culprit, monkeypatch):
    told(SHORT)
    observe, loop = Batch.observe, Loop("toy", 1, config_of(per_video=False), DEVICE)

    def with_culprit(self, residuals, *args):
        if self.sessions[0].step == 2:
            CULPRITS[culprit](residuals[0])
        observe(self, residuals, *args)

    monkeypatch.setattr(Batch, "observe", with_culprit)
    with pytest.raises((RuntimeError, TypeError), match="(?i)meta|to the device|and of the device"):
        loop(6, around=no_waiting)
    assert loop.handle.current.step == 2


class Logged(Readback):
    """The reader on a CPU, which says when it is sent and read."""

    log = []

    def __init__(self, numbers, group=None):
        super().__init__(numbers, group)
        self.name = "sums" if numbers.shape[1] > 1 else "check"
        self.log.append(f"{self.name} sent")

    def row(self, index):
        if self._rows is None:
            self.log.append(f"{self.name} read")
        return super().row(index)


class Late(Logged):
    """As on a GPU."""

    late = True


def run(monkeypatch, reader, spoil=()) -> tuple[list[list[str]], list[str], list[Tensor]]:
    """What happens in each step of a run whose rate is always 3, the steps' reasons, and what they return.

    At the steps in `spoil` the last block returns NaN.
    """
    model = build(MODELS["wan"].kind, MODELS["wan"].config | {"num_layers": 4})
    log, outputs = [], []
    monkeypatch.setattr(batch, "Readback", reader)
    monkeypatch.setattr(Logged, "log", log)
    handle = apply_adacache(model, AdaCacheConfig(Codebook((1e9,), (3, 1)), num_steps=STEPS))
    for i, block in enumerate(model.blocks):
        block.register_forward_pre_hook(lambda *_, i=i: log.append(f"block {i}"))
        block.ffn.register_forward_pre_hook(lambda *_, i=i: log.append(f"mlp {i}"))
    model.blocks[-1].register_forward_hook(lambda _, __, x: x * torch.nan if len(outputs) + 1 in spoil else None)
    happened = []
    with torch.no_grad(), handle.run():
        for step in range(1, STEPS + 1):
            outputs.append(sample(model(**MODELS["wan"].inputs(0, 1000 - step))))
            happened.append(log.copy())
            log.clear()
    return happened, [step.reason for step in handle.report().steps], outputs


BEFORE = ["block 0", "mlp 0", "block 1"]  # the probe's attention is in here
BEHIND = ["mlp 1", "block 2", "mlp 2", "block 3", "mlp 3"]
FIRST = [*BEFORE, *BEHIND, "check sent"]
COMPUTED = [*BEFORE, "sums sent", *BEHIND, "check sent"]


def test_sent_right_after_the_probe_and_read_when_the_next_step_begins(monkeypatch):
    happened, reasons, _ = run(monkeypatch, Late)
    assert reasons == ["first", "rate", "reused", "reused", "rate", "reused", "reused", "rate", "tail"]
    reused = [["sums read"], ["check read"]]  # what was kept is checked when the step after its own is queued
    assert happened == [FIRST, COMPUTED, *reused, COMPUTED, *reused, COMPUTED, ["sums read", *COMPUTED]]


def test_a_device_that_is_the_host_is_asked_at_once(monkeypatch):
    happened, reasons, _ = run(monkeypatch, Logged)
    reused = [["sums read", "check read"], []]
    last = ["sums read", "check read", *COMPUTED]
    assert happened == [FIRST, COMPUTED, *reused, COMPUTED, *reused, COMPUTED, last]
    assert reasons == run(monkeypatch, Late)[1]


def test_what_is_not_finite_is_reused_once_at_most(monkeypatch):
    """The step that kept it has returned it, and so does the one queued behind; the next one is computed."""
    _, reasons, outputs = run(monkeypatch, Late, spoil={2})
    assert reasons[:5] == ["first", "rate", "reused", "restart", "rate"]
    assert [bool(x.isfinite().all()) for x in outputs] == [True, False, False] + [True] * (STEPS - 3)
    plain = run(monkeypatch, Late)[2]
    assert torch.equal(outputs[4], plain[4]), "computed in both"

    _, reasons, outputs = run(monkeypatch, Logged, spoil={2})
    assert reasons[:5] == ["first", "rate", "rate", "reused", "reused"]
    assert [bool(x.isfinite().all()) for x in outputs] == [True, False] + [True] * (STEPS - 2)


class OnDevice(Tensor):
    """A CPU tensor that takes itself for a GPU's."""

    is_cuda = True
    __torch_function__ = torch._C._disabled_torch_function_impl


@pytest.mark.parametrize("grouped", [False, True])
def test_the_copy_is_asynchronous_and_only_its_event_is_waited_for(monkeypatch, grouped):
    log, empty, copy, streams = [], torch.empty, Tensor.copy_, ["the blocks'"]

    class Event:
        def record(self, stream):
            log.append(f"event on {stream}")

        def synchronize(self):
            log.append("host waits")

    @contextlib.contextmanager
    def stream(name):
        streams.append(name)
        yield
        streams.pop()

    def pinned(*args, pin_memory=False, **kwargs):
        assert pin_memory
        log.append("pinned")
        return empty(*args, **kwargs)

    def noted(self, other, non_blocking=False):
        assert non_blocking
        log.append(f"copy on {streams[-1]}")
        return copy(self, other)

    class Work:
        def wait(self):
            log.append(f"{streams[-1]} waits for the ranks")

    cuda = SimpleNamespace(
        Event=Event, Stream=lambda device: "the side", stream=stream, current_stream=lambda device: streams[-1]
    )
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(torch, "empty", pinned)
    monkeypatch.setattr(Tensor, "copy_", noted)
    monkeypatch.setattr(Tensor, "record_stream", lambda self, name: log.append(f"kept for {name}"))
    monkeypatch.setattr(readback.dist, "all_reduce", lambda numbers, group, async_op: Work() if async_op else None)
    readback._beside.cache_clear()
    numbers = torch.tensor([[1.0, 2.0], [3.0, 4.0]]).as_subclass(OnDevice)
    sent = Readback(numbers, object() if grouped else None)
    where, sums = "the side" if grouped else "the blocks'", ["kept for the side", "the side waits for the ranks"]
    assert log == [*(sums if grouped else []), "pinned", f"copy on {where}", f"event on {where}"]
    log.clear()
    assert sent.late and [sent.row(1), sent.row(0), sent.row(1)] == [[3.0, 4.0], [1.0, 2.0], [3.0, 4.0]]
    assert log == ["host waits"] and math.isfinite(sent.row(0)[0])
    readback._beside.cache_clear()
