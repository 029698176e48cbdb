import os
from pathlib import Path

import pytest


@pytest.fixture
def real_data_dir() -> str:
    folder = os.environ.get("TFDS_DATA_DIR")
    if not folder:
        pytest.skip("TFDS_DATA_DIR is not set, so there is no real data set to read")
    missing = [name for name in ("cifar10", "imagenet2012") if not (Path(folder) / name).is_dir()]
    if missing:
        pytest.skip(f"TFDS_DATA_DIR holds no {' and no '.join(missing)}")
    return folder
