"""Law 6 on a GPU, in bf16: every backend that takes a call errs no more than it may."""

from __future__ import annotations

import pytest
import torch

from encoding_cases import BACKENDS, refusal
from test_budgets import check_budget

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
@pytest.mark.parametrize("kind", ["in_order", "full", "positions", "masked"])
@pytest.mark.parametrize("case", ["pope", "pope/quarter-raw", "pope-id", "rope"])
def test_error_on_a_gpu(case: str, kind: str, backend: str) -> None:
    if backend == "flex" and (kind, case) not in (("in_order", "pope"), ("masked", "pope")):
        pytest.skip("each mask and width of FlexAttention takes seconds to compile")
    with torch.device("cuda"):
        why = refusal(case, backend, kind, dtype=torch.bfloat16)
        if why is not None:
            pytest.skip(why)
        check_budget(case, backend, kind, torch.bfloat16)
