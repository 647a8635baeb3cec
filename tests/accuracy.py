"""The one accuracy rule (DESIGN section 8): our error against fp64, judged by eager PyTorch's own."""

from __future__ import annotations

import torch
from torch import Tensor

UNIT = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float64: 2.0**-52}


def assert_accurate(ours: Tensor, eager: Tensor, exact: Tensor, *, what: str = "output") -> None:
    """max|ours - fp64| <= 2 max|eager - fp64| + 4 u max(1, max|fp64|), mean|..| <= 1.25 mean|eager - fp64| + u.

    u belongs to the dtype of `ours`. NaN and infinities must sit where fp64 has them.
    """
    assert ours.shape == exact.shape, f"{what}: shape {tuple(ours.shape)}, expected {tuple(exact.shape)}"
    assert ours.dtype == eager.dtype, f"{what}: dtype {ours.dtype}, eager has {eager.dtype}"
    if exact.numel() == 0:
        return
    u = UNIT[ours.dtype]
    exact = exact.double()
    finite = torch.isfinite(exact)
    same = torch.equal(torch.nan_to_num(ours.double()[~finite]), torch.nan_to_num(exact[~finite]))
    assert same, f"{what}: NaN or infinity where fp64 has another value"
    if not finite.any():
        return
    our_error, eager_error = ((value.double() - exact)[finite].abs() for value in (ours, eager))
    scale = max(1.0, exact[finite].abs().max().item())
    bound = 2 * eager_error.max().item() + 4 * u * scale
    # `not <=` instead of `>`: a NaN must fail.
    assert our_error.max().item() <= bound, (
        f"{what}: max error {our_error.max().item():.3e} > {bound:.3e} (eager {eager_error.max().item():.3e})"
    )
    bound = 1.25 * eager_error.mean().item() + u
    assert our_error.mean().item() <= bound, (
        f"{what}: mean error {our_error.mean().item():.3e} > {bound:.3e} (eager {eager_error.mean().item():.3e})"
    )
