"""What holds for every test: offline, one thread, its own Hugging Face folder, fixed seeds."""

import os
import random
import tempfile

import numpy as np
import pytest
import torch
from hypothesis import settings

# Set before any test module imports huggingface_hub, which reads these once; subprocesses of tests inherit them.
_HF_HOME = tempfile.TemporaryDirectory(prefix="sparseq-tests-")
os.environ["HF_HOME"] = _HF_HOME.name
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)

# Generated examples are the same in every run: the gate must not fail for one person and pass for the next.
settings.register_profile("sparseq", derandomize=True, deadline=None, print_blob=True)
settings.load_profile("sparseq")


@pytest.fixture(autouse=True)
def _seeds() -> None:
    """Each test starts from the same random state, whatever ran before it on its worker."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
