"""What the binary module refuses by itself. The operators check before it, so only a mistake in them gets this far; it
must end in an error and not in memory that is nobody's: the addresses here are null.
"""

from __future__ import annotations

import pytest

from pyrewrite.ops import _library

pytestmark = pytest.mark.skipif(_library.native_problem() != "", reason="needs the binary module")
MODES = ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)]


def edit(sizes=(2, 1, 1, 0, 3), starts=(0, 6), shape=(1, 1, False), shapes=(2, 3), lr=0.05):
    settings = [0.2, 1.0, lr, 0.9, 0.999, 1e-8]
    return _library.native().InsertionEdit(sizes, starts, shape, shapes, [0] * 11, [0] * 4, settings)


def insert(mode, *edits):
    if mode == "cpu":
        _library.native().insertion_steps_cpu(list(edits), threads=1)
    else:  # before its first launch
        assert not _library.native().insertion_workspace([], device=0)
        _library.native().insertion_steps_cuda(list(edits), workspace=0, device=0, stream=0, wait=True)


@pytest.mark.parametrize("starts", [(), (0,)])
def test_an_edit_without_targets(starts):
    with pytest.raises(ValueError, match="no targets"):
        edit(starts=starts, shapes=())


@pytest.mark.parametrize("shapes", [(), (2,), (2, 3, 1, 1)])
def test_an_edit_with_shapes_of_other_targets(shapes):
    with pytest.raises(ValueError, match="a shape for each target"):
        edit(shapes=shapes)


@pytest.mark.parametrize("mode", MODES)
def test_sizes_that_do_not_fit_together(mode):
    for changed, message in [
        *(({"sizes": tuple(0 if i == n else 1 for i in range(5))}, "none may be 0") for n in range(3)),
        ({"starts": (0, 0)}, "0 pixels: none may be 0"),
        ({"starts": (1, 6)}, "do not cover the pixels 0 ... 6"),
        ({"starts": (0, 6, 6), "shapes": (2, 3, 1, 1)}, "target 1 is empty"),
        ({"starts": (0, 7, 6), "shapes": (1, 7, 1, 1)}, "target 1 is empty"),
    ]:
        with pytest.raises(ValueError, match=message):
            insert(mode, edit(**changed))


@pytest.mark.cuda
def test_sizes_that_a_gpu_does_not_take():
    for changed, error, message in [
        ({"sizes": (2, 1, 9, 0, 3)}, ValueError, "9 taps are no 1 x 1 kernel"),
        ({"shapes": (2, 4)}, ValueError, "target 0 of 2 x 4 does not have 6 pixels"),
        ({"shapes": (-2, -3)}, ValueError, "target 0 of -2 x -3"),
        ({"starts": range(130), "shapes": [1] * 258}, RuntimeError, "129 targets .* takes 128 targets"),
        ({"starts": (0, 1 << 15), "shapes": (1, 1 << 15)}, RuntimeError, "takes sides up to 32767"),
        ({"starts": (0, 1 << 31), "shapes": (1 << 16, 1 << 15)}, RuntimeError, "2147483648 pixels"),
        ({"sizes": (2, 100_000, 1, 0, 3)}, RuntimeError, "rank 100000 with 1 taps needs more shared memory"),
    ]:
        with pytest.raises(error, match=message):
            insert("cuda", edit(**changed))
    for other in (edit(sizes=(2, 1, 1, 1, 3)), edit(sizes=(2, 1, 1, 0, 4)), edit(lr=0.06)):
        with pytest.raises(ValueError, match="edit 1 has other steps or settings of Adam than edit 0"):
            insert("cuda", edit(), other)


@pytest.mark.parametrize("mode", MODES)
def test_a_projection_with_too_few_tensors(mode):
    native = _library.native()
    nowhere = (0, (1, 1, 1, 1))
    adam = native.Adam(step=1, lr=0.1, beta1=0.9, beta2=0.999, eps=1e-8, project=True)
    rest = {"threads": 1} if mode == "cpu" else {"device": 0, "stream": 0, "wait": True}
    for count, settings in ((1, None), (3, None), (2, adam), (6, adam)):
        weight = native.Weight((1, 1, 1, 1), [nowhere] * count, (0, (1, 1)), 1)
        with pytest.raises(ValueError, match="projection: wrong number of tensors"):
            getattr(native, f"project_{mode}")([weight], settings, **rest)


@pytest.mark.cuda
def test_a_projection_that_a_gpu_does_not_take():
    native = _library.native()
    weight = native.Weight((1, 1, 9, 9), [(0, (81, 81, 9, 1))] * 2, (0, (1, 1)), 10_000)
    with pytest.raises(RuntimeError, match="rank 10000 with a 9 x 9 kernel needs more shared memory"):
        native.project_cuda([weight], None, device=0, stream=0, wait=True)
