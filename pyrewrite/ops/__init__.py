"""The backend: torch operators over the package's own kernels, each with its plain-torch reference (`<operator>_ref`)
beside it.

Each takes ``impl=None | "cuda" | "cpu" | "torch"``; pyrewrite.ops._library says what that means. They work on any
torch tensors and need nothing else of this package.
"""

from pyrewrite.ops._library import MissingKernelError
from pyrewrite.ops.closed_form import solve_low_rank
from pyrewrite.ops.convolution import (
    conv3x3,
    conv3x3_kernel_takes,
    conv3x3_ref,
    prepare_conv3x3,
    prepare_upconv3x3,
    upconv3x3,
    upconv3x3_ref,
)
from pyrewrite.ops.insertion import (
    ConvLayer,
    Edit,
    Insertion,
    InsertionTarget,
    crop_key,
    demodulation,
    insert_low_rank,
    insert_low_rank_batch,
    insert_low_rank_ref,
    insertion_loss,
    key_size,
    layer_values,
)
from pyrewrite.ops.projected import ProjectedInsertion, insert_projected
from pyrewrite.ops.projection import project, project_, project_adam_, project_adam_ref, project_ref
from pyrewrite.ops.second_moment import second_moment, second_moment_, second_moment_ref

__all__ = [
    "ConvLayer",
    "Edit",
    "Insertion",
    "InsertionTarget",
    "MissingKernelError",
    "ProjectedInsertion",
    "conv3x3",
    "conv3x3_kernel_takes",
    "conv3x3_ref",
    "crop_key",
    "demodulation",
    "insert_low_rank",
    "insert_low_rank_batch",
    "insert_low_rank_ref",
    "insert_projected",
    "insertion_loss",
    "key_size",
    "layer_values",
    "prepare_conv3x3",
    "prepare_upconv3x3",
    "project",
    "project_",
    "project_adam_",
    "project_adam_ref",
    "project_ref",
    "second_moment",
    "second_moment_",
    "second_moment_ref",
    "solve_low_rank",
    "upconv3x3",
    "upconv3x3_ref",
]
