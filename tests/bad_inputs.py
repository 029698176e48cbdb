"""Files and directories of every wrong kind, beside sound ones, for `test_bad_input.py`."""

import json
import os
import pickle
import socket
import struct
import zlib

import numpy as np
from PIL import Image
from trees import random_params

from cait_jax import create_model, save_pretrained

SPARSE = 3 * 2**30
CLASSES = ("cat", "dog")
_CONFIG = "from configs import common\n\n\ndef get_config():\n    config = common.get_config()\n"


def _png(width, height):
    """A PNG whose header promises a size, and nothing behind it."""

    def chunk(kind, data):
        body = kind + data
        return struct.pack(">I", len(data)) + body + struct.pack(">I", zlib.crc32(body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def _sparse(path):
    with path.open("wb") as file:
        file.truncate(SPARSE)


def _socket(path):
    here = os.getcwd()  # noqa: PTH109
    os.chdir(path.parent)  # the path of a socket is short
    try:
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(path.name)
    finally:
        os.chdir(here)


def _odd(folder, stem, suffix):
    """What is no regular file, and what is one and too much."""
    os.mkfifo(folder / f"fifo{suffix}")
    _socket(folder / f"socket{suffix}")
    (folder / f"zero{suffix}").symlink_to("/dev/zero")
    (folder / f"to_fifo{suffix}").symlink_to(folder / f"fifo{suffix}")
    (folder / f"dangling{suffix}").symlink_to("nowhere")
    (folder / f"loop{suffix}").symlink_to(f"loop{suffix}")
    (folder / f"folder{suffix}").mkdir()
    (folder / f"empty{suffix}").touch()
    (folder / f"text{suffix}").write_text("no " + stem)
    _sparse(folder / f"sparse{suffix}")


CONFIG_FILES = {
    "raises": "def get_config():\n    return 1 / 0\n",
    "raises_at_once": "raise RuntimeError('first\\nsecond')\n",
    "raises_without_words": "raise ValueError\n",
    "asserts": "assert False\n",
    "exits": "import sys\nsys.exit('no')\n",
    "exits_in_words": "def get_config():\n    raise SystemExit\n",
    "generator_exit": "raise GeneratorExit\n",
    "recurses": "def get_config():\n    return get_config()\n",
    "lacks": "x = 1\n",
    "is_a_value": "get_config = 3\n",
    "is_a_class": "class get_config:\n    pass\n",
    "takes_two": "def get_config(a, b):\n    return None\n",
    "takes_keyword": "def get_config(*, a):\n    return None\n",
    "returns_none": "def get_config():\n    pass\n",
    "returns_dict": "def get_config():\n    return {}\n",
    "returns_text": "def get_config():\n    return 'seed'\n",
    "returns_list": "def get_config():\n    return [1]\n",
    "returns_empty": "from ml_collections import ConfigDict\n\n\ndef get_config():\n    return ConfigDict()\n",
    "is_a_generator": "def get_config():\n    yield 1\n",
    "syntax": "def get_config(:\n",
    "indentation": "def get_config():\nreturn 1\n",
    "empty": "",
    "imports_nothing": "import there_is_no_such_module\n",
    "imports_itself": "from imports_itself_again import x\n",
    "latin": b"# \xe9\xff\ndef get_config():\n    pass\n",
    "zeros": b"\0" * 64,
    "utf16": "def get_config(): pass\n".encode("utf-16"),
    "binary": bytes(range(256)),
    "unknown_coding": "# -*- coding: nothing -*-\n",
    "section_is_a_number": _CONFIG
    + "    config.unlock()\n    config.model = 3\n    return config\n",
    "key_is_a_section": _CONFIG
    + "    config.unlock()\n    config.seed = {'a': 1}\n    return config\n",
    "lacks_a_section": _CONFIG
    + "    config.unlock()\n    del config['model']\n    return config\n",
    "unknown_key": _CONFIG + "    config.model.widht = 3\n    return config\n",
    "number_as_key": _CONFIG + "    config.unlock()\n    config[3] = 3\n    return config\n",
    "wrong_type": _CONFIG + "    config.seed = 'x'\n    return config\n",
}


def _deep(depth=100_000):
    return "[" * depth + "]" * depth


def saved_variants(config):
    """`config.json` of saved models, as text by name; `config` is a sound one."""
    section = config["cait_jax"]
    attributes = section["attributes"]

    def of(**changed):
        return json.dumps({"cait_jax": {**section, **changed}})

    def attribute(**changed):
        return of(attributes={**attributes, **changed})

    texts = {
        "no_json": "{",
        "empty": "",
        "list": "[]",
        "null": "null",
        "number": "3",
        "deep": _deep(),
        "deep_inside": json.dumps({"cait_jax": 0}).replace("0", _deep()),
        "not_utf8": b"\xff\xfe{}",
        "section_list": json.dumps({"cait_jax": [1]}),
        "section_text": json.dumps({"cait_jax": "x"}),
        "section_empty": json.dumps({"cait_jax": {}}),
        "format_newer": of(format=99),
        "format_text": of(format="new"),
        "format_list": of(format=[1]),
        "format_none": of(format=None),
        "format_zero": of(format=0),
        "format_true": of(format=True),
        "family_unknown": of(family="ResNet"),
        "family_list": of(family=["CaiT"]),
        "family_none": of(family=None),
        "attributes_list": of(attributes=[1]),
        "attributes_none": of(attributes=None),
        "attributes_text": of(attributes="x"),
        "attributes_empty": of(attributes={}),
        "attribute_unknown": attribute(widht=3),
        "labels_few": of(label_names=["cat"]),
        "labels_text": of(label_names="cat"),
        "labels_numbers": of(label_names=[1, 2]),
        "labels_nested": of(label_names=[["cat"], ["dog"]]),
        "labels_dict": of(label_names={"0": "cat"}),
        "labels_number": of(label_names=3),
        "labels_none_inside": of(label_names=["cat", None]),
        "preprocessing_list": of(preprocessing=[1]),
        "preprocessing_text": of(preprocessing="x"),
        "preprocessing_number": of(preprocessing=3),
        "preprocessing_empty": of(preprocessing={}),
        "sha_none": of(weights_sha256=None),
        "sha_list": of(weights_sha256=[]),
        "sha_other": of(weights_sha256="0" * 64),
    }
    settings = section["preprocessing"]
    for key in settings:
        for name, value in (
            ("text", "x"), ("none", None), ("list", []), ("dict", {}), ("negative", -1), ("nan", float("nan")),
            ("nested", [[1], [2]]), ("huge", 10**400),
        ):  # fmt: skip
            texts[f"preprocessing_{key}_{name}"] = of(preprocessing={**settings, key: value})
    for key in attributes:
        for name, value in (
            ("text", "x"), ("list", []), ("dict", {"a": 1}), ("negative", -1), ("nan", float("nan")),
            ("nested", [[1]]), ("huge", 10**400), ("large", 10**9), ("nothing", None),
        ):  # fmt: skip
            texts[f"attribute_{key}_{name}"] = attribute(**{key: value})
    return texts


class Evil:
    """What runs code where it is unpickled."""

    def __reduce__(self):
        return (os.mkdir, ("unpickled",))


def make(place):
    """Fills a directory."""
    # Pictures
    rng = np.random.default_rng(0)
    photos = place / "photos"
    for label in CLASSES:
        for i in range(12):
            path = photos / label / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(path)
    sound = (photos / "cat" / "0.png").read_bytes()
    (place / "good.png").write_bytes(sound)
    odd = place / "odd"
    odd.mkdir()
    _odd(odd, "picture", ".png")
    (odd / "torn.png").write_bytes(sound[: len(sound) // 2])
    (odd / "bomb.png").write_bytes(_png(2**31 - 1, 2**31 - 1))
    (odd / "large.png").write_bytes(_png(20_000, 20_000))
    (odd / "flat.png").write_bytes(_png(0, 5))
    for name in ("fifo", "socket", "zero", "to_fifo", "sparse"):
        folder = place / f"with_{name}"
        for label in CLASSES:
            (folder / label).mkdir(parents=True)
            for i in range(12):
                (folder / label / f"{i}.png").write_bytes(sound)
        (folder / "cat" / f"{name}.png").symlink_to(odd / f"{name}.png")
    (place / "no_pictures").mkdir()
    (place / "no_classes").mkdir()
    (place / "no_classes" / "a.png").write_bytes(sound)
    (place / "one_class" / "cat").mkdir(parents=True)
    (place / "one_class" / "cat" / "a.png").write_bytes(sound)
    # Configs
    configs = place / "configs"
    configs.mkdir()
    for name, source in CONFIG_FILES.items():
        data = source if isinstance(source, bytes) else source.encode()
        (configs / f"{name}.py").write_bytes(data)
    _odd(configs, "config", ".py")
    # Weights
    weights = place / "weights"
    weights.mkdir()
    _odd(weights, "weights", ".safetensors")
    _odd(weights, "weights", ".pth")
    (weights / "good.txt").write_text("x")
    header = struct.pack("<Q", 2**62)
    (weights / "huge_header.safetensors").write_bytes(header + b"{}")
    (weights / "bad_header.safetensors").write_bytes(struct.pack("<Q", 8) + b"[[[[[[[[")
    deep = _deep(10_000).encode()
    (weights / "deep_header.safetensors").write_bytes(struct.pack("<Q", len(deep)) + deep)
    with (weights / "evil.pth").open("wb") as file:
        pickle.dump(Evil(), file)
    with (weights / "list.pth").open("wb") as file:
        pickle.dump([1, 2], file)
    (weights / "zip.pth").write_bytes(b"PK\x03\x04" + b"\0" * 100)
    # Models
    model = create_model(
        "vit_6x256", depth=1, width=8, num_heads=1, patch_size=4, image_size=8, num_classes=2
    )
    variables = {"params": random_params(model)}
    settings = {
        "image_size": [8, 8], "crop_pct": 0.9, "mean": [0.5] * 3, "std": [0.2] * 3, "channels": 3
    }  # fmt: skip
    save_pretrained(place / "model", model, variables, label_names=CLASSES, preprocessing=settings)
    file = place / "model" / "config.json"
    texts = saved_variants(json.loads(file.read_text()))
    for name, text in texts.items():
        other = place / "models" / name
        other.mkdir(parents=True)
        (other / "config.json").write_bytes(text if isinstance(text, bytes) else text.encode())
        (other / "model.safetensors").hardlink_to(place / "model" / "model.safetensors")
    models = place / "models"
    (models / "no_weights").mkdir()
    (models / "no_weights" / "config.json").write_text(file.read_text())
    (models / "no_config").mkdir()
    (models / "no_config" / "model.safetensors").hardlink_to(place / "model" / "model.safetensors")
    for name in ("fifo", "zero", "sparse", "folder"):
        (models / f"config_{name}").mkdir()
        (models / f"config_{name}" / "config.json").symlink_to(configs / f"{name}.py")
        (models / f"weights_{name}").mkdir()
        (models / f"weights_{name}" / "config.json").write_text(file.read_text())
        (models / f"weights_{name}" / "model.safetensors").symlink_to(
            weights / f"{name}.safetensors"
        )
    (models / "no_folder").write_text("a file")
    (models / "nothing").mkdir()
    # Runs
    run = place / "runs"
    for name, text in {
        "no_metrics": None, "empty": "", "zeros": "\0" * 99, "list": "[1]\n", "deep": _deep() + "\n",
        "text_step": '{"step": "x"}\n', "nested": '{"step": [1]}\n', "nothing": '{"step": 1}\n',
        "text_value": '{"step": 1, "train/loss": "x"}\n', "list_value": '{"step": 1, "train/loss": [1]}\n',
        "huge_step": '{"step": 1' + "0" * 400 + ', "train/loss": 1}\n',
        "huge_value": '{"step": 1, "train/loss": 1' + "0" * 400 + "}\n",
    }.items():  # fmt: skip
        (run / name).mkdir(parents=True)
        if text is not None:
            (run / name / "metrics.jsonl").write_text(text)
    for name in ("fifo", "zero", "sparse"):
        (run / name).mkdir()
        (run / name / "metrics.jsonl").symlink_to(configs / f"{name}.py")
    (run / "empty_steps" / "checkpoints").mkdir(parents=True)
    (run / "step_without_manifest" / "checkpoints" / "5").mkdir(parents=True)
    (run / "inspect" / "inspect").mkdir(parents=True)
    (run / "inspect" / "inspect" / "x.npz").write_text("x")
    (run / "inspect_number" / "inspect").mkdir(parents=True)
    (run / "inspect_number" / "inspect" / "3.npz").write_text("x")
    # Names of classes, logits
    names = place / "names"
    names.mkdir()
    _odd(names, "names", ".txt")
    for name, text in {
        "three": "a\nb\nc\n", "blank": "a\n\n", "list_numbers": "[1, 2]", "dict": '{"a": "b"}', "deep": _deep(),
        "nested": '[["a"], ["b"]]', "broken": "[", "number": "3", "gap": '{"0": "a", "2": "b"}',
        "huge": '{"1' + "0" * 5000 + '": "a", "0": "b"}', "id2label": '{"id2label": 3}',
        "nan": '{"0": NaN, "1": "b"}',
    }.items():  # fmt: skip
        (names / f"{name}.json").write_text(text)
    (names / "latin.txt").write_bytes(b"\xe9\n\xff\n")
    logits = place / "logits"
    logits.mkdir()
    _odd(logits, "logits", ".npz")
    np.save(logits / "array.npy", np.zeros((3, 3)))
    np.savez(logits / "objects.npz", logits=np.array([Evil()], object))
    np.savez(logits / "other.npz", other=np.zeros(3))
    np.savez(logits / "integers.npz", logits=np.zeros((3, 3), int))
    np.savez(logits / "shape.npz", logits=np.zeros((3, 3), np.float32))
    return sorted(texts)
