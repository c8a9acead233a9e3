"""Every operator from several threads, on a stream of its own, in a CUDA graph and on a second GPU: the same bits as
alone. What needs streams needs torch with CUDA; threads are tried wherever a kernel runs.
"""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from insertion_support import case, cast, operator_arguments
from torch import Tensor

from pyrewrite.ops import project_, project_adam_, second_moment_
from pyrewrite.ops.convolution import conv3x3, upconv3x3
from pyrewrite.ops.insertion_kernel import insertion_steps_

IMPLS = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]
needs_streams = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU, so there are no streams"),
]


@dataclass
class Work:
    """A call that changes `state` in place and reads `inputs`."""

    state: list[Tensor]
    inputs: list[Tensor]
    call: Callable[[list[Tensor], list[Tensor], str | None], object]

    def run(self, impl: str | None = None) -> None:
        self.call(self.state, self.inputs, impl)

    def placed(self, place: Callable[[Tensor], Tensor]) -> Work:
        """The same with copies of all tensors."""
        return Work([place(x.clone()) for x in self.state], [place(x.clone()) for x in self.inputs], self.call)

    def result(self, impl: str | None, times: int = 1) -> list[Tensor]:
        """The state after so many calls, of which nothing else is left."""
        for _ in range(times):
            self.run(impl)
        return [x.cpu() for x in self.state]


def moment_work() -> Work:
    maps = torch.randn(5, 70, 9, 11)
    moment = torch.zeros(70, 70, dtype=torch.float64)
    return Work([moment], [maps], lambda s, x, impl: second_moment_(s[0], x[0], impl=impl))


def projection_work() -> Work:
    weights = [torch.randn(40, 36, 3, 3), torch.randn(7, 5, 2, 3)]
    rows = [torch.linalg.qr(torch.randn(w.shape[1], 3))[0].T.contiguous() for w in weights]
    bases = [torch.randn_like(w) for w in weights]
    return Work(weights, bases + rows, lambda s, x, impl: project_(s, x[:2], x[2:], impl=impl))


def adam_work() -> Work:
    weight, base, grad = (torch.randn(40, 36, 3, 3) for _ in range(3))
    direction = torch.linalg.qr(torch.randn(36, 5))[0].T.contiguous()

    def call(state: list[Tensor], inputs: list[Tensor], impl: str | None) -> None:
        project_adam_(state[0], *inputs, *state[1:], step=3, lr=0.01, impl=impl)

    return Work([weight, torch.zeros_like(weight), torch.rand_like(weight)], [base, direction, grad], call)


def insertion_work(**variant: object) -> Work:
    arguments = operator_arguments(*cast(*case(i=16, **variant)), count=2)
    tensors, settings = [x for (x,) in arguments[:15]], arguments[15:]

    def call(state: list[Tensor], inputs: list[Tensor], impl: str | None) -> None:
        insertion_steps_(*([x] for x in (*state, *inputs)), *settings, impl)

    return Work(tensors[:4], tensors[4:], call)


def convolution_work(operator: Callable[..., Tensor], *filters: Sequence[float]) -> Work:
    x, weight = torch.randn(2, 32, 11, 7), torch.randn(48, 32, 3, 3)
    style, demod, bias = torch.rand(2, 32), torch.rand(2, 48), torch.randn(48)
    size = (22, 14) if filters else (11, 7)
    noise, result = torch.randn(size), torch.zeros(2, 48, *size)

    def call(state: list[Tensor], inputs: list[Tensor], impl: str | None) -> None:
        x, weight, *rest = inputs
        names = ("in_scale", "out_scale", "bias", "noise")
        state[0] += operator(x, weight, *filters, **dict(zip(names, rest, strict=True)), impl=impl)

    return Work([result], [x, weight, style, demod, bias, noise], call)


WORKS = {
    "second_moment_": moment_work,
    "project_": projection_work,
    "project_adam_": adam_work,
    "insertion, resident": lambda: insertion_work(o=30, rank=1, sizes=((16, 17),), demodulate=True),
    "insertion, unfolded": lambda: insertion_work(o=265, rank=1, sizes=((40, 41),), demodulate=True),
    "insertion, cluster": lambda: insertion_work(o=20, rank=5, sizes=((6, 9), (4, 4)), demodulate=True),
    "insertion, general": lambda: insertion_work(o=3, rank=16, kernel=(7, 7), sizes=((4, 5),)),
}


# These have no CUDA kernel.
ON_THE_PROCESSOR = {
    "conv3x3": lambda: convolution_work(conv3x3),
    "upconv3x3": lambda: convolution_work(upconv3x3, (0.5, 1, 1.5, 0.3), (0.7, 1.2, 0.9, 0.4)),
}


@pytest.fixture(params=WORKS)
def work(request) -> Work:
    torch.manual_seed(0)
    return WORKS[request.param]()


def same(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("impl", IMPLS)
def test_threads(work, impl, on_device):
    """Two threads at once, each with its own tensors and, on a GPU, its own stream."""
    check_threads(work, impl, on_device if impl == "cuda" else lambda x: x)


@pytest.mark.parametrize("name", ON_THE_PROCESSOR)
def test_threads_of_operators_without_a_cuda_kernel(name):
    torch.manual_seed(0)
    check_threads(ON_THE_PROCESSOR[name](), "cpu", lambda x: x)


def check_threads(work: Work, impl: str, place: Callable[[Tensor], Tensor]) -> None:
    expected = work.placed(place).result(impl, times=3)
    assert not same(expected, work.state)
    mine = [work.placed(place) for _ in range(2)]
    started, found = threading.Barrier(2), [None, None]

    def body(n: int) -> None:
        started.wait()
        if impl == "cuda" and torch.cuda.is_available():
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.default_stream())  # the copies were made there
            with torch.cuda.stream(stream):
                found[n] = mine[n].result(impl, times=3)
        else:
            found[n] = mine[n].result(impl, times=3)

    threads = [threading.Thread(target=body, args=(n,)) for n in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0] is not None, "the first thread raised"
    assert found[1] is not None, "the second thread raised"
    assert same(found[0], expected)
    assert same(found[1], expected)


FORK = """
import hashlib, os, signal, sys
sys.path += sys.argv[2:]
import torch
import test_streams_and_threads as tests

def tell(works):
    for name, work in works.items():
        result = work.result("cpu")
        print(name, hashlib.sha256(b"".join(x.numpy().tobytes() for x in result)).hexdigest(), flush=True)

torch.manual_seed(0)
torch.set_num_threads(3)
works = {name: make() for name, make in {**tests.WORKS, **tests.ON_THE_PROCESSOR}.items()}
copies = {name: work.placed(lambda x: x) for name, work in works.items()}
torch.rand(1 << 20).exp()  # starts torch's threads, which the child has none of
if sys.argv[1] == "operators":
    for work in works.values():
        work.placed(lambda x: x).run("cpu")
child = os.fork()
if child == 0:
    signal.alarm(60)  # rather than wait for threads that are not there
    try:
        tell(copies)
    finally:
        os._exit(0)
os.waitpid(child, 0)
tell(works)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system cannot fork")
@pytest.mark.parametrize("before", ["operators", "torch alone"])
def test_a_forked_child_gets_the_same_bits(before):
    """Whatever started torch's threads before the fork. Torch's own operators would wait for these threads for ever
    in the child, so all that it takes from torch here is too small to be shared out.
    """
    here = Path(__file__).parent
    command = [sys.executable, "-c", FORK, before, str(here), str(here.parent)]
    done = subprocess.run(command, cwd=here, capture_output=True, text=True, timeout=120)
    told, count = done.stdout.splitlines(), len(WORKS) + len(ON_THE_PROCESSOR)
    assert len(told) == 2 * count, done
    assert told[:count] == told[count:]


@pytest.mark.cuda
def test_threads_with_different_sizes(on_device):
    """How much shared memory a kernel may have is the kernel's, not the launch's: a small launch must not take it from
    a large one of another thread, which would then be refused.
    """
    works = [
        insertion_work(o=2, rank=1, sizes=(size,)).placed(on_device)
        for size in ((50, 52), (50, 51), (2, 3), (3, 2), (2, 2), (3, 3))
    ]
    started, problems = threading.Barrier(len(works)), []

    def body(work: Work) -> None:
        started.wait()
        try:
            work.result("cuda", times=250)
        except RuntimeError as problem:
            problems.append(problem)

    threads = [threading.Thread(target=body, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems


class TestStreams:
    pytestmark = needs_streams

    def test_it_takes_its_turn_on_the_current_stream(self, work):
        expected = work.placed(Tensor.cuda).result("cuda")
        late = work.placed(Tensor.cuda)
        arriving = [x.clone() for x in late.inputs]
        for x in late.inputs:
            x.zero_()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)  # the inputs arrive long after the call has returned
            for x, value in zip(late.inputs, arriving, strict=True):
                x.copy_(value)
            late.run("cuda")
        stream.synchronize()
        assert same([x.cpu() for x in late.state], expected)

    def test_it_can_be_captured_and_replayed(self, work):
        """A graph takes up the call with all that it allocates; a replay reads what is there then."""
        mine = work.placed(Tensor.cuda)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            work.placed(Tensor.cuda).run("cuda")  # loads the kernels
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            mine.run("cuda")
        graph.replay()
        # Lands on the call's scratch, if that was freed.
        filler = [torch.full((1 << 18,), float("nan"), device="cuda") for _ in range(8)]
        graph.replay()
        torch.cuda.synchronize()
        del filler
        assert same([x.cpu() for x in mine.state], work.placed(Tensor.cuda).result("cuda", times=2))

    @pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU at most")
    def test_tensors_on_another_gpu_than_the_current_one(self, work):
        expected = work.placed(Tensor.cuda).result("cuda")
        with torch.cuda.device(0):
            other = work.placed(lambda x: x.to("cuda:1"))
            assert same(other.result("cuda"), expected)
            assert torch.cuda.current_device() == 0


BAD_CALL = """
from pyrewrite.ops import _library
native = _library.native()
nowhere = (1 << 20, (9, 9, 3, 1))  # an address that nothing has
weight = native.Weight((4, 1, 3, 3), [nowhere, nowhere], (1 << 20, (1, 1)), 1)
try:
    native.project_cuda([weight], None, device=0, stream=0, wait=True)
except RuntimeError as error:
    print(error)
"""


@pytest.mark.cuda
def test_a_kernel_that_fails_is_told_of_by_the_call_that_waits(tmp_path):
    """In a process of its own: an error of the device spoils it for all that comes later."""
    done = subprocess.run([sys.executable, "-c", BAD_CALL], cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.stdout.startswith("projection on GPU 0: CUDA error 700, "), done
