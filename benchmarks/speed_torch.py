"""timm's side of `speed.py`, which starts it in an environment with PyTorch: commands in, answers out.

Each line of standard input is a JSON object: `do` names a method of `Worker`, the rest are its arguments. Each
line of standard output is the answer; `error` is in it where that failed. It waits, idle, for the next.
"""

import copy
import json
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file, save_file


class Worker:
    """The models and functions that were asked for."""

    def __init__(self) -> None:
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.functions: dict[str, Callable[[], torch.Tensor]] = {}

    def describe(self) -> dict:
        on_gpu = self.device.type == "cuda"
        return {
            "torch": torch.__version__,
            "timm": timm.__version__,
            "device": torch.cuda.get_device_name() if on_gpu else self.device.type,
            "threads": torch.get_num_threads(),
            "wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        }

    def load(self, directory: str, images: str, drop_path: float, dtype: str) -> dict:
        """Makes the model that `directory` describes, with its weights, and reads the images."""
        self.dtype = getattr(torch, dtype)
        # float32 in convolutions too: products already are, by PyTorch's default.
        torch.backends.cudnn.allow_tf32 = False
        config = json.loads((Path(directory) / "config.json").read_text())
        model = timm.create_model(
            config["architecture"], drop_path_rate=drop_path, **config["model_args"]
        )
        model.load_state_dict(load_file(Path(directory) / "model.safetensors"), strict=True)
        drawn = load_file(images)["images"].permute(0, 3, 1, 2)
        if self.dtype != torch.float32:
            model = model.to(memory_format=torch.channels_last)
        self.model, self.images = model.to(self.device), drawn
        return {}

    def logits(self, path: str, compiled: bool) -> dict:
        """Writes the logits of the images to a safetensors file."""
        forward = self._forward(self._model(compiled).eval(), self._images(len(self.images)))
        save_file({"logits": forward().float().cpu().contiguous()}, path)
        return {}

    def prepare(self, name: str, mode: str, batch: int, compiled: bool) -> dict:
        """Builds a function and calls it thrice; the bytes are the last call's, all told."""
        before = self._allocated()
        model, images = self._model(compiled), self._images(batch)
        make = self._forward if mode == "forward" else self._training
        function = make(model.train(mode != "forward"), images)
        start = time.perf_counter()
        function()
        self._wait()
        first = time.perf_counter() - start
        function()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        start = time.perf_counter()
        function()
        self._wait()
        seconds = time.perf_counter() - start
        self.functions[name] = function
        peak = torch.cuda.max_memory_allocated() - before if self.device.type == "cuda" else None
        return {"first": first, "seconds": seconds, "memory": peak}

    def time(self, name: str, calls: int) -> dict:
        """Seconds of so many calls."""
        function = self.functions[name]
        self._wait()
        start = time.perf_counter()
        for _ in range(calls):
            function()
        self._wait()
        return {"seconds": time.perf_counter() - start}

    def drop(self) -> dict:
        """Forgets the functions and what they hold."""
        self.functions.clear()
        torch.compiler.reset()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return {}

    def product(self, size: int, dtype: str) -> dict:
        """Operations per second of a product of two square matrices."""
        a = torch.randn(size, size, device=self.device).to(getattr(torch, dtype))
        rates = []
        for _ in range(5):
            self._wait()
            start = time.perf_counter()
            a @ a
            self._wait()
            rates.append(2 * size**3 / (time.perf_counter() - start))
        return {"rate": max(rates)}

    def _model(self, compiled: bool) -> torch.nn.Module:
        model = copy.deepcopy(self.model)
        return torch.compile(model, dynamic=False) if compiled else model

    def _images(self, batch: int) -> torch.Tensor:
        drawn = self.images
        images = drawn.repeat(math.ceil(batch / len(drawn)), 1, 1, 1)[:batch]
        layout = torch.contiguous_format if self.dtype == torch.float32 else torch.channels_last
        return images.to(self.device).contiguous(memory_format=layout)

    def _autocast(self) -> torch.autocast:
        return torch.autocast(
            self.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16
        )

    def _forward(self, model: torch.nn.Module, images: torch.Tensor) -> Callable[[], torch.Tensor]:
        def forward() -> torch.Tensor:
            with torch.inference_mode(), self._autocast():
                return model(images)

        return forward

    def _training(self, model: torch.nn.Module, images: torch.Tensor) -> Callable[[], torch.Tensor]:
        labels = torch.arange(len(images), device=self.device) % 1000
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)

        def step() -> torch.Tensor:
            optimizer.zero_grad(set_to_none=True)
            with self._autocast():
                logits = model(images)
                loss = torch.nn.functional.cross_entropy(logits.float(), labels)
            loss.backward()
            optimizer.step()
            return loss.detach()

        return step

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _allocated(self) -> int:
        return torch.cuda.memory_allocated() if self.device.type == "cuda" else 0


def main() -> None:
    # What libraries print must not come between the answers.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    worker = Worker()
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer = getattr(worker, command.pop("do"))(**command)
        except Exception as error:  # whatever it is, the other side says it and goes on
            words = str(error).strip() or "no message"
            answer = {"error": f"{type(error).__name__}: {words.splitlines()[0][:300]}"}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
