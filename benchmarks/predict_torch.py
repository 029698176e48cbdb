"""timm's side of `predict.py`, which starts it in an environment with PyTorch: DIRECTORY IMAGE... to names.

The loop that timm's users write: its own transform, a `DataLoader` with a worker for each core, batches of 32,
no gradient; five classes of each image as lines of JSON.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from PIL import Image
from safetensors.torch import load_file


class Files(torch.utils.data.Dataset):
    """Images of files, cropped and normalised."""

    def __init__(self, paths: list[str], transform: Callable[[Image.Image], torch.Tensor]) -> None:
        self.paths, self.transform = paths, transform

    def __len__(self) -> int:
        """Number of images."""
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        """One image."""
        with Image.open(self.paths[index]) as image:
            return self.transform(image.convert("RGB"))


def main(directory: str, *paths: str) -> None:
    config = json.loads((Path(directory) / "config.json").read_text())
    model = timm.create_model(config["architecture"], **config["model_args"]).eval()
    model.load_state_dict(load_file(Path(directory) / "model.safetensors"), strict=True)
    data = timm.data.resolve_data_config(config["pretrained_cfg"])
    files = Files(list(paths), timm.data.create_transform(**data))
    loader = torch.utils.data.DataLoader(files, batch_size=32, num_workers=os.cpu_count() or 1)
    found: list[tuple[list[int], list[float]]] = []
    with torch.inference_mode():
        for images in loader:
            best = model(images).softmax(-1).topk(5)
            found += zip(best.indices.tolist(), best.values.tolist(), strict=True)
    for path, (classes, values) in zip(paths, found, strict=True):
        print(json.dumps({"path": path, "classes": classes, "probabilities": values}))


if __name__ == "__main__":
    main(*sys.argv[1:])
