"""The operator over the insertion's kernels: cut anywhere, on any number of threads, its bits are the same."""

from __future__ import annotations

import pytest
import torch
from insertion_support import case, cast, operator_arguments

from pyrewrite.ops.insertion_kernel import insertion_steps_

IMPLS = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def test_any_number_of_threads_gives_the_same_bits():
    arguments = operator_arguments(*cast(*case(o=70, i=16, rank=4, sizes=((9, 9), (6, 11)), demodulate=True)))
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3, 16):
            torch.set_num_threads(count)
            results.append(kernel_steps(arguments, chunks=(40,)))
    finally:
        torch.set_num_threads(threads)
    for lambda_, losses in results[1:]:
        assert torch.equal(lambda_, results[0][0])
        assert torch.equal(losses, results[0][1])


def kernel_steps(arguments, chunks, impl=None, place=lambda x: x):
    """The kernel alone from zero state, in chunks of so many steps: Lambda and losses of the first edit."""
    arguments = [[place(torch.zeros_like(x)) for x in held] if n < 3 else held for n, held in enumerate(arguments)]
    arguments[3] = [place(torch.zeros(sum(chunks), dtype=torch.float64)) for _ in arguments[0]]
    done = 0
    for count in chunks:
        arguments[22:24] = done, count
        insertion_steps_(*arguments, impl)
        done += count
    return arguments[0][0], arguments[3][0]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "variant",
    [
        {"o": 9, "i": 16, "demodulate": True},
        {"o": 3, "i": 16, "rank": 1, "sizes": ((5, 6),), "demodulate": True},
        {"o": 265, "i": 8, "rank": 1, "sizes": ((40, 41),), "demodulate": True},
        {"o": 2, "i": 70, "rank": 66, "sizes": ((3, 2),), "demodulate": True},
    ],
    ids=str,
)
def test_chunks_carry_the_state_exactly(variant, impl, on_device):
    arguments = operator_arguments(*cast(*case(**variant)))
    arguments = [[on_device(x) for x in held] if n < 15 else held for n, held in enumerate(arguments)]
    whole, losses = kernel_steps(arguments, (6,), impl, on_device)
    parts, part_losses = kernel_steps(arguments, (1, 3, 0, 2), impl, on_device)
    assert torch.equal(whole, parts)
    assert torch.equal(losses, part_losses)


@pytest.mark.parametrize("demodulate", [False, True])
def test_opcheck(demodulate):
    arguments = operator_arguments(*cast(*case(demodulate=demodulate)))
    torch.library.opcheck(torch.ops.pyrewrite.insertion_steps_, arguments)


def test_compiles_as_a_whole():
    arguments = operator_arguments(*cast(*case()))

    def doubled(lambda_, *rest):
        insertion_steps_(lambda_, *rest)
        return lambda_[0] * 2

    compiled = torch.compile(doubled, fullgraph=True, backend="aot_eager")
    mine = [[x.clone() for x in held] if n < 15 else held for n, held in enumerate(arguments)]
    assert torch.equal(compiled(*mine), doubled(*arguments))
    assert torch.equal(mine[0][0], arguments[0][0])


def test_operator_checks_what_it_is_given():
    arguments = [*operator_arguments(*cast(*case())), None]
    state, (losses,), (keys,) = arguments[0], arguments[3], arguments[5]
    for index, value, error, message in [
        (1, [state[0][:, :3]], ValueError, "exp_avg: expected shape"),
        (3, [losses[:1]], ValueError, "losses"),
        (3, [losses.float()], TypeError, "losses"),
        (5, [keys.double()], TypeError, "keys: expected float32"),
        (5, [keys, keys], ValueError, "lists for 1 edits"),
        (15, [2], ValueError, "shapes: expected height and width of"),
        (15, [0], ValueError, "shapes: expected height and width of"),
        (16, [4, 6, 2, 4, 4, 5], ValueError, "starts from 0 to 56"),
        (20, [3, 2], ValueError, "kernel"),
        (20, [3], ValueError, "lists for"),
        (28, "gpu", ValueError, "impl"),
        (17, [5], ValueError, "rank"),
        (10, [torch.zeros(3, 6)], ValueError, "energy, cross and gram"),
        (0, [state[0].t().contiguous().t()], ValueError, "contiguous"),
        (0, arguments[1], ValueError, "share their memory"),
        (0, [state[0][0]], ValueError, "O x K"),
    ]:
        with pytest.raises(error, match=message):
            insertion_steps_(*arguments[:index], value, *arguments[index + 1 :])
