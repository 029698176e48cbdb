"""Wrong input to `train.py` and `cait` ends before anything is compiled, in one sentence that says what to do."""

import os
import re
import shlex
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import bad_inputs
import jax
import numpy as np
import pytest
from absl.testing import flagsaver
from click.testing import CliRunner
from marks import slow_unless

import train
from cait_jax import UserError, load_pretrained
from cait_jax.cli import main
from cait_jax.cli.output import check_writable, text_output
from cait_jax.errors import config_flags, speaking
from cait_jax.processes import explain
from cait_jax.reading import MAX_IMAGE, check_regular, read_bytes
from cait_jax.sharding import (
    batch_shards,
    check_batch_size,
    local_bytes,
    make_mesh,
    param_shardings,
)
from cait_jax.train import NonFiniteError, setup
from cait_jax.train.config import flatten
from cait_jax.train.keys import KEYS, Name, Number, Several, Size, Words

CONFIGS = Path(__file__).parents[1] / "configs"
DIGITS = f"--config={CONFIGS / 'digits.py'}"
SECONDS = 10
compiled = []
jax.monitoring.register_event_duration_secs_listener(
    lambda name, seconds, **_: compiled.append(name) if "backend_compile" in name else None
)


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A directory of what is wrong, in which the tests run."""
    folder = tmp_path_factory.mktemp("bad")
    bad_inputs.make(folder)
    return folder


@pytest.fixture(autouse=True)
def _there(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("TFDS_DATA_DIR", str(place / "no_pictures"))
    # What comes first of all that compiles.
    init_state = setup.Trainer.init_state

    def uncompiled(self, workdir=None):
        with monkeypatch.context() as inside:
            inside.setattr(jax, "jit", _accepted)
            return init_state(self, workdir)

    monkeypatch.setattr(setup.Trainer, "init_state", uncompiled)


def _accepted(*arguments, **options):
    pytest.fail("accepted")


@contextmanager
def _soon():
    def late(number, frame):
        pytest.fail(f"not refused in {SECONDS} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def run_train(*flags):
    """The sentence with which `train.py` refuses flags."""
    with flagsaver.flagsaver(), speaking(config_flags), _soon():
        try:
            train.main(train.parse(["train.py", *flags]))
        except (UserError, NonFiniteError) as error:
            return str(error)
        except (OSError, MemoryError, RuntimeError) as error:
            sentence = explain(error)
            if sentence is None:
                raise
            return sentence
    raise AssertionError("accepted")


def run_cait(*arguments):
    """The sentence with which `cait` refuses arguments."""
    with _soon():
        result = CliRunner().invoke(main, list(arguments), prog_name="cait")
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code, f"accepted: {result.output}"
    assert "Traceback" not in result.output
    last: str = result.stderr.rstrip().splitlines()[-1]
    assert last == last.lstrip(), "the end of a longer message"
    return last


def test_reading_a_model_compiles_nothing(place):
    """What is wrong with the rest of a command line is found after it."""
    jax.clear_caches()
    before = len(compiled)
    load_pretrained("model")
    load_pretrained("model", num_classes=0)
    assert len(compiled) == before


def check(run, *arguments):
    jax.clear_caches()  # what another test compiled would not be counted
    before = len(compiled)
    sentence = run(*arguments)
    assert len(compiled) == before, f"{len(compiled) - before} programs compiled: {sentence}"
    assert len(sentence) > 15, sentence
    assert "\n" not in sentence
    assert "Error(" not in sentence
    assert len(sentence) < 1500
    return sentence


def some_fast(lines):
    """Every eighth, and what is quick; the fast stage leaves the others out."""
    fast = {*lines[::8], *(line for line in lines if line.startswith("--coordinator"))}
    return slow_unless(fast.__contains__, lines)


# Every key of a config

TEXTS = (
    "nan", "inf", "-inf", "1e400", "9" * 400, "9" * 5000, "abc", "1,2,3,4", "None", "-0.5", "(", "", "[]", "{}",
    "()", "[[1]]", "1e300", "-1", "0", "True", "\0", "é\u202e", "1;2", "0x", "[" * 9999,
)  # fmt: skip
VALUES = (
    float("nan"), float("inf"), float("-inf"), 1e300, -1, -0.5, 0, 10**400, "abc", "", "nan", (), (1, 2, 3, 4),
    [1, 2, 3, 4], ["a"], [float("nan")], {}, {"a": 1}, True, None, b"x", 1j, object(), max, [[1]],
)  # fmt: skip


def is_right(key, value):
    """Whether a key may have a value, said again and without the code's own rule."""
    kind = key.kind
    if value is None:
        return key.default is None
    if kind is str:
        return isinstance(value, str)
    if isinstance(kind, Name):
        return isinstance(value, str) and value.strip() != ""
    if kind is bool:
        return isinstance(value, bool)

    def number(of, value):
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        if of.whole and not isinstance(value, int):
            return False
        if value != value or abs(value) > 1e308:
            return False
        above = value > of.low or (value == of.low and not of.above)
        below = value < of.high or (value == of.high and not of.below)
        return value == of.also or (above and below)

    if isinstance(kind, Number):
        return number(kind, value)
    if isinstance(kind, Words):
        counts = (
            kind.count and str(value)[:20].isdecimal() and number(kind.count, int(str(value)[:20]))
        )
        return isinstance(value, str) and (value in kind.known or bool(counts))
    if isinstance(kind, Size):
        return number(kind.side, value) or is_right(key._replace(kind=kind.both), value)
    assert isinstance(kind, Several)
    if not isinstance(value, list | tuple) or len(value) not in kind.counts:
        return False
    ordered = not kind.increasing or list(value) == sorted(value)
    return ordered and all(number(kind.each, member) for member in value)


@pytest.mark.parametrize("name", sorted(KEYS))
def test_no_wrong_value_of_a_key_passes(name):
    from cait_jax.train import train as run
    from configs import digits

    section, _, last = name.rpartition(".")
    wrong = [value for value in VALUES if not is_right(KEYS[name], value)]
    assert len(wrong) >= 15
    for value in wrong:
        config = digits.get_config().unlock()
        try:
            with config.ignore_type():
                (config[section] if section else config)[last] = value
        except OverflowError:  # the ConfigDict's own refusal
            continue
        if is_right(KEYS[name], flatten(config).get(name)):  # it makes 1.0 of True
            continue

        def start(config=config):
            with pytest.raises(UserError) as caught, speaking(config_flags), _soon():
                run(config, "runs/never")
            return str(caught.value)

        assert f"config.{name}" in check(start) or isinstance(value, dict), value


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(KEYS))
def test_no_wrong_text_for_a_key_passes(name):
    key, refused = KEYS[name], 0
    for text in TEXTS:
        if _passes(name, text):
            continue
        sentence = check(run_train, DIGITS, f"--config.{name}={text}")
        assert sentence.startswith(f"--config.{name} is ")
        assert " and must be " in sentence
        refused += 1
    assert refused >= 12 or key.kind in (str, Name())


def _passes(name, text):
    """Whether a text is right for a key, by Python's own reading of it."""
    key = KEYS[name]
    if key.kind is str or (key.kind == Name() and text) or (text == "None" and key.default is None):
        return True
    if key.kind is bool:
        return text in ("0", "True")
    if isinstance(key.kind, Words):
        return is_right(key, text)
    try:
        number = int(text)
    except ValueError:
        try:
            number = float(text)
        except ValueError:
            return False
    if isinstance(key.kind, Several):
        number = (float(number),) if abs(number) < 1e300 else (float("nan"),)
    return is_right(key, number)


# Flags of train.py, and files of configs

TRAIN = """
nothing
digits
-
-- x
--workdir
--workdir=
--workdir=good.png
--workdir=good.png/run
--workdir=odd/fifo.png
--workdir=odd/dangling.png
--workdir=odd/loop.png
--workdir=/proc/run
--workdir=/dev/null
--workdir=/dev/null/run
--workdir=gs://bucket/run
--workdir=s3://bucket/run
--workdir=run[1]
--workdir=run*
--workdir=LONG
--workdr=x
--nosuch
--config.seed
--config.seed=
--config.seeds=1
--config.=1
--config.model=3
--config.model={}
--config.model.name
--config.model.name=resnet50
--config.model.name=../x
--config..seed=1
--config.Seed=1
--config.seed=1.0
--config.seed=99999999999999999999
--config.seed=-1
--config.epochs=1e300
--config.epochs=0
--config.epochs=999999 --config.batch_size=1
--config.steps=0
--config.steps=99999999999
--config.batch_size=0
--config.batch_size=7 --config.mesh.data=8
--config.batch_size=100000
--config.image_size=0
--config.image_size=9
--config.image_size=16385
--config.image_size=7
--config.model.width=0
--config.model.width=5
--config.model.width=100000
--config.model.width=2147483647
--config.model.depth=0
--config.model.depth=2147483647
--config.model.depth=1000000
--config.model.num_heads=0
--config.model.num_heads=7
--config.model.num_heads=2147483647
--config.model.patch_size=0
--config.model.patch_size=3
--config.model.patch_size=9
--config.model.mlp_ratio=-1
--config.model.mlp_ratio=0
--config.model.mlp_ratio=nan
--config.model.mlp_ratio=1e300
--config.model.mlp_ratio=1e9
--config.model.mlp_ratio=1e-300
--config.model.class_mlp_ratio=1e300
--config.model.class_mlp_ratio=1e-9
--config.model.class_depth=2147483647
--config.model.class_token=99
--config.model.class_token=-1
--config.model.class_token=input --config.model.class_depth=2
--config.model.residual=rezero --config.model.layer_scale_init=0.1
--config.model.layer_scale_init=1e300
--config.model.layer_scale_init=-1e39
--config.model.dtype=int32
--config.model.dtype=float64
--config.model.distilled=True
--config.model.attention=tpu
--config.model.attention=gpu
--config.data.mean=abc
--config.data.mean=1,2
--config.data.mean=1,2,3
--config.data.mean=1e300
--config.data.std=0
--config.data.std=1e-300
--config.data.std=0.1,0.2,0.3
--config.data.name=nowhere
--config.data.name=
--config.data.name=./nowhere
--config.data.name=good.png
--config.data.name=./good.png
--config.data.name=./no_pictures
--config.data.name=./no_classes
--config.data.name=./one_class
--config.data.name=./odd
--config.data.name=/dev/null
--config.data.name=./odd/fifo.png
--config.data.name=gs://x
--config.data.name=synthetic/png
--config.data.name=mnist
--config.data.name=mnist --config.data.data_dir=nowhere
--config.data.name=mnist --config.data.data_dir=good.png
--config.data.name=mnist --config.data.data_dir=gs://x
--config.data.train_split=
--config.data.train_split=nothing
--config.data.train_split=train[
--config.data.eval_split=nothing
--config.data.eval_split=train[:0%]
--config.data.aug_repeats=0
--config.data.workers=-1
--config.data.workers=99999
--config.augment.scale=1,0
--config.augment.scale=nan,nan
--config.augment.ratio=0,1
--config.augment.ratio=1e-300,1e300
--config.augment.rotate=181
--config.augment.shear=1e300
--config.augment.color_jitter=1e300 --config.augment.rand_augment=
--config.augment.rand_augment=rand
--config.augment.rand_augment=abc
--config.augment.rand_augment=rand-m99
--config.augment.rand_augment=rand-mnan
--config.augment.rand_augment=rand-m9-n0
--config.augment.rand_augment=rand-m9-n-1
--config.augment.rand_augment=rand-m9-n999999999
--config.augment.rand_augment=rand-m9-mstdnan
--config.augment.rand_augment=rand-m9-mstdinf
--config.augment.rand_augment=rand-m-9
--config.augment.rand_augment=rand-m9-x3
--config.augment.rand_augment=rand-m9-inc9
--config.augment.rand_augment=rand-m9-p2
--config.augment.rand_augment=rand-m9-m8
--config.augment.mixup=1e300
--config.augment.mixup=1e-300
--config.augment.cutmix=1e300
--config.augment.mixup=0.8 --config.augment.mix_rows=3
--config.augment.pad_crop=99999
--config.augment.three_augment --config.augment.rand_augment=rand-m9
--config.loss.name=hinge
--config.loss.smoothing=1
--config.loss.target_threshold=0.2
--config.distill.kind=hard
--config.distill.kind=hard --config.distill.teacher=nowhere
--config.distill.kind=hard --config.distill.teacher=good.png
--config.distill.kind=hard --config.distill.teacher=model
--config.distill.kind=hard --config.distill.teacher=cait_xs24
--config.distill.kind=hard --config.distill.teacher=
--config.distill.kind=soft --config.distill.temperature=0
--config.distill.kind=soft --config.distill.teacher=models/labels_few
--config.distill.kind=soft --config.distill.weights=weights/fifo.pth
--config.distill.kind=soft --config.distill.weights=nowhere
--config.distill.weights=nowhere.pth
--config.distill.kind=soft --config.distill.logits=nowhere
--config.distill.kind=soft --config.distill.logits=logits/fifo.npz
--config.distill.kind=soft --config.distill.logits=logits/to_fifo.npz
--config.distill.kind=soft --config.distill.logits=logits/socket.npz
--config.distill.kind=soft --config.distill.logits=logits/zero.npz
--config.distill.kind=soft --config.distill.logits=logits/sparse.npz
--config.distill.kind=soft --config.distill.logits=logits/folder.npz
--config.distill.kind=soft --config.distill.logits=logits/empty.npz
--config.distill.kind=soft --config.distill.logits=logits/text.npz
--config.distill.kind=soft --config.distill.logits=logits/array.npy
--config.distill.kind=soft --config.distill.logits=logits/objects.npz
--config.distill.kind=soft --config.distill.logits=logits/other.npz
--config.distill.kind=soft --config.distill.logits=logits/integers.npz
--config.distill.kind=soft --config.distill.logits=logits/shape.npz
--config.distill.logits=logits/shape.npz
--config.optimizer.name=adam
--config.optimizer.schedule=linear
--config.optimizer.learning_rate=1e300
--config.optimizer.learning_rate=nan
--config.optimizer.weight_decay=-1
--config.optimizer.weight_decay=1e300
--config.optimizer.b1=1
--config.optimizer.b2=1
--config.optimizer.eps=-1
--config.optimizer.eps=0
--config.optimizer.eps=1e300
--config.optimizer.grad_accum=7
--config.optimizer.train=99
--config.optimizer.train=class_attention --config.model.name=vit_6x256
--config.optimizer.layer_decay=1e-300
--config.optimizer.warmup_epochs=1e300
--config.optimizer.ema_decay=1
--config.optimizer.sam_rho=1e300
--config.optimizer.grad_clip_norm=1e300
--config.optimizer.momentum=1
--config.optimizer.decay_rate=2
--config.phases.head_epochs=1 --config.phases.blocks=99
--config.phases.head_epochs=1 --config.optimizer.train=head
--config.phases.head_learning_rate=1e300 --config.phases.head_epochs=1
--config.mesh.data=3
--config.mesh.data=0
--config.mesh.data=-1 --config.mesh.fsdp=-1
--config.mesh.tensor=3
--config.mesh.fsdp=16
--config.eval.batch_size=0
--config.eval.batch_size=2147483647
--config.eval.crop_pct=0
--config.eval.crop_pct=1e-300
--config.eval.every_epochs=0
--config.checkpoint.keep=0
--config.checkpoint.every_steps=0
--config.report.every_steps=0
--config.init.weights=nowhere
--config.init.weights=
--config.init.pretrained
--config.init.reset_head
--config.init.ema
--config.init.weights=x --config.init.pretrained
--coordinator=localhost
--coordinator=localhost:8476
--coordinator=localhost:abc --processes=2 --process=0
--coordinator=localhost: --processes=2 --process=0
--coordinator=:8476 --processes=2 --process=0
--coordinator=localhost:0 --processes=2 --process=1
--coordinator=localhost:-1 --processes=2 --process=0
--coordinator=localhost:65536 --processes=2 --process=0
--coordinator=localhost:99999999999999999999 --processes=2 --process=0
--coordinator=localhost:8476:1 --processes=2 --process=0
--coordinator=http://localhost:8476 --processes=2 --process=0
--coordinator=local,host:8476 --processes=2 --process=0
--coordinator=localhost:8476 --processes=2 --process=2
--coordinator=localhost:8476 --processes=2 --process=-1
--coordinator=localhost:8476 --processes=0 --process=0
--coordinator=localhost:8476 --processes=-1 --process=0
--coordinator=localhost:8476 --processes=99999999999 --process=0
--coordinator=localhost:8476 --processes=two --process=0
--coordinator= --processes=2 --process=0
--coordinator=[::1 --processes=2 --process=0
--processes=2
--process=0
--processes=nan
--process=1.5
--distributed=maybe
--nodistributed=1
--help-config=x
""".strip().splitlines()  # fmt: skip


@pytest.mark.parametrize("line", some_fast(TRAIN))
def test_train_refuses(line):
    check(run_train, DIGITS, *shlex.split(line.replace("LONG", "x" * 300)))


FILES = [
    *(f"--config=configs/{name}.py" for name in bad_inputs.CONFIG_FILES),
    *(f"--config=configs/{kind}.py" for kind in
      ("fifo", "socket", "zero", "to_fifo", "dangling", "loop", "folder", "text", "sparse")),
    "", "--config", "--config=", "--config=.", "--config=/", "--config=configs", "--config=nowhere.py",
    "--config=nowhere/x.py", "--config=good.png", "--config=model", "--config=/dev/null", "--config=/dev/stdin",
    f"{DIGITS}:x", f"--config={CONFIGS / 'deit.py'}", f"--config={CONFIGS / 'deit.py'}:huge",
    f"--config={CONFIGS / 'folder.py'}", f"--config={CONFIGS / 'folder.py'}:nowhere",
    f"--config={CONFIGS / 'folder.py'}:good.png", f"--config={CONFIGS / 'folder.py'}:one_class",
    f"--config={CONFIGS / 'folder.py'}:with_sparse", f"--config={CONFIGS / 'cait_xs24.py'}:9",
    f"--config={'x' * 1000}", "--config='\0'",
]  # fmt: skip


@pytest.mark.parametrize("line", FILES)
def test_train_refuses_a_config_file(line):
    check(run_train, *shlex.split(line))


# Commands

M = "-m model"
CAIT = f"""
nosuch
models nothing*
models ''
models --nosuch
models a b
recipes nothing*
recipes --keys nothing*
recipes --keys [
predict
predict good.png
predict {M}
predict nowhere.png {M}
predict . -m nowhere
predict no_pictures {M}
predict 'nothing*.png' {M}
predict '[' {M}
predict '**' -m '**'
predict /dev/null {M}
predict /dev/zero {M}
predict good.png -m ''
predict good.png -m good.png
predict good.png -m cait_xs24
predict good.png -m cait_x
predict good.png -m no_pictures
predict good.png -m photos
predict good.png -m configs/fifo.py
predict good.png -m runs/empty_steps
predict good.png -m runs/step_without_manifest
predict good.png -m /dev/null
predict good.png -m weights/zero.pth
predict good.png {M} --top 0
predict good.png {M} --top x
predict good.png {M} --top nan
predict good.png {M} --batch-size 0
predict good.png {M} --batch-size -1
predict good.png {M} --batch-size 99999999999
predict good.png {M} --image-size 0
predict good.png {M} --image-size 9
predict good.png {M} --image-size 99999
predict good.png {M} --image-size 16384
predict good.png {M} --dtype float16
predict good.png {M} --ema
predict good.png {M} --weights nowhere
predict good.png {M} --weights nowhere.pth
predict good.png {M} --weights no_pictures
predict good.png {M} -o nowhere/x
predict good.png {M} -o good.png/x
predict good.png {M} -o no_pictures
predict good.png {M} -o /proc/x
predict good.png {M} -o odd/fifo.png
predict good.png {M} -o odd/socket.png
predict good.png {M} -o odd/loop.png
predict good.png {M} -o {"x" * 300}
predict good.png {M} --json --nosuch
predict good.png {M} --class-names nowhere
predict good.png -m models/no_config
predict good.png -m cait_xs24 --weights model/model.safetensors
evaluate {M}
evaluate --data digits
evaluate {M} --data nowhere
evaluate {M} --data ''
evaluate {M} --data digits --split nothing
evaluate {M} --data ./good.png
evaluate {M} --data ./no_pictures
evaluate {M} --data ./no_classes
evaluate {M} --data ./photos --split nothing
evaluate {M} --data ./photos --split train[
evaluate {M} --data ./photos --split train[:0%]
evaluate {M} --data imagenet
evaluate {M} --data imagenet --data-dir nowhere
evaluate {M} --data ./photos --rule none
evaluate {M} --data ./photos --workers -1
evaluate {M} --data ./photos --workers 9999
evaluate {M} --data ./photos --knn --train-split all
evaluate {M} --data ./photos --knn --train-split nothing
evaluate {M} --data ./photos --confusion x.bmp
evaluate {M} --data ./photos --confusion x
evaluate {M} --data ./photos --confusion nowhere/x.png
evaluate {M} --data ./photos --confusion /proc/x.png
evaluate {M} --data ./photos --confusion good.png/x.png
evaluate {M} --data ./photos --confusion odd/fifo.png
evaluate {M} --data ./photos --output nowhere/x.json
evaluate {M} --data ./photos --output /proc/x.json
evaluate {M} --data ./photos --output good.png/x
evaluate {M} --data ./photos --output odd/fifo.png
evaluate {M} --data ./photos --output no_pictures
evaluate {M} --data ./photos --logits nowhere/x.npz
evaluate {M} --data ./photos --logits /proc/x.npz
evaluate {M} --data ./photos --logits good.png/x.npz
evaluate {M} --data ./photos --class-names names/three.json
evaluate {M} --data ./photos --output x.json --confusion x.json
features good.png {M}
features good.png {M} -o x.txt
features good.png {M} -o x
features good.png {M} -o nowhere/x.npz
features good.png {M} -o /proc/x.npz
features good.png {M} -o good.png/x.npz
features good.png {M} -o x.npz --layer nothing
features good.png {M} -o x.npz --layer blocks.9
features good.png {M} -o x.npz --layer blocks.-1
features good.png {M} -o x.npz --layer blocks.x
features good.png {M} -o x.npz --layer ''
features good.png {M} -o x.npz --layer blocks.{"9" * 5000}
features good.png {M} -o x.npz --layer blocks.²
features good.png {M} -o x.npz --tokens
features no_pictures {M} -o x.npz
explain good.png {M} -o good.png
explain good.png {M} -o good.png/x
explain good.png {M} -o /proc/x
explain good.png {M} -o nowhere/x
explain good.png {M} -o odd/dangling.png
explain good.png {M} --method magic
explain good.png {M} --methods some
explain good.png {M} --show nothing
explain good.png {M} --patch 99
explain good.png {M} --patch -1
explain good.png {M} --layer 9
explain good.png {M} --layer -1
explain good.png {M} --steps 0
explain good.png {M} --seed -1
explain good.png {M} --seed 99999999999
explain good.png {M} --format gif
explain good.png {M} --class nothing
explain good.png {M} --class 9
explain good.png {M} --class -1
explain good.png {M} --class ''
explain good.png -m regnety_160 --weights weights/empty.pth
explain nowhere {M}
report good.png {M} -o nowhere/x.html
report good.png {M} -o /proc/x.html
report good.png {M} -o good.png/x.html
report good.png {M} -o no_pictures
report good.png {M} -o odd/fifo.png
report good.png {M} -o x.txt
report good.png {M} {M} {M}
report good.png {M} --self-attention other.png
report good.png {M} --class nothing
report good.png {M} --top 0
report nowhere.png {M}
plot
plot nowhere
plot good.png
plot runs/no_metrics
plot runs/empty
plot runs/empty -o x.bmp
plot runs/empty -o nowhere/x.png
plot runs/empty -o /proc/x.png
plot runs/empty --layer-scale
plot runs/empty --layer-scale --branch-ratio
plot runs/empty runs/list --layer-scale
plot runs/inspect --layer-scale
plot runs/inspect_number --branch-ratio
plot runs/empty --watch -o x.png
plot runs/empty --watch -o nowhere/x.html
plot runs/empty --watch -o /proc/x.html
plot runs/empty --watch --every 0
plot runs/empty --watch --every nan
plot runs/empty --every inf
plot runs/empty --every x
plot runs/zeros
plot runs/list
plot runs/deep
plot runs/text_step
plot runs/nested
plot runs/nothing
plot runs/text_value
plot runs/list_value
plot runs/huge_step
plot runs/huge_value
plot runs/fifo
plot runs/zero
plot runs/sparse
finetune
finetune photos
finetune nowhere {M}
finetune good.png {M}
finetune no_pictures {M}
finetune no_classes {M}
finetune one_class {M}
finetune odd {M}
finetune photos -m nowhere
finetune photos -m cait_x
finetune photos -m good.png
finetune photos -m regnety_160
finetune photos {M} --what some
finetune photos {M} --epochs 0
finetune photos {M} --epochs nan
finetune photos {M} --epochs inf
finetune photos {M} --epochs 1e300
finetune photos {M} --batch-size 0
finetune photos {M} --batch-size 1000
finetune photos {M} --image-size 9
finetune photos {M} --image-size 16384
finetune photos {M} --image-size 0
finetune photos {M} --seed -1
finetune photos {M} --seed x
finetune photos {M} --workdir good.png
finetune photos {M} --workdir good.png/x
finetune photos {M} --workdir /proc/x
finetune photos {M} --workdir gs://x
finetune photos {M} --workdir odd/dangling.png
finetune photos {M} --weights nowhere
finetune with_fifo {M}
finetune with_socket {M}
finetune with_zero {M}
finetune with_to_fifo {M}
finetune with_sparse {M}
convert {M}
convert x
convert {M} good.png
convert {M} good.png/x
convert {M} /proc/x
convert {M} x.safetensors
convert {M} nowhere/x.safetensors --to timm --average nowhere
convert {M} x --to torch
convert {M} x --average nowhere
convert {M} x --average good.png
convert {M} x --average models/attributes_list
convert {M} odd/dangling.png
convert {M} odd/fifo.png
convert {M} odd/loop.png
convert {M} odd/folder.png/x.safetensors/y --image-size 9
data
data nosuch
data show
data show nowhere
data show ''
data show ./good.png
data show ./no_pictures
data show ./no_classes
data show photos --split nothing
data show photos --images 0
data show photos --images x
data show photos --sheet nowhere/x.png
data show photos --sheet /proc/x.png
data show photos --sheet good.png/x.png
data show photos --sheet no_pictures
data show photos --sheet odd/fifo.png
data show photos --sheet x.jpg
data show photos --sheet x.txt
data show mnist --data-dir nowhere
data show mnist --data-dir gs://x
push
push model
push model a/b
push model a --yes
push model a/b/c --yes
push model hf://a/b --yes
push model a/.. --yes
push model a/b --yes --image x.png --no-image
push model a/b --yes --image nowhere.png
push model a/b --yes --image odd/fifo.png
push good.png a/b --yes
push nowhere a/b --yes
data convert
data convert nowhere
data convert good.png
data convert no_pictures
data convert /dev/null
data prepare
data prepare nothing_of_this_name
data prepare ''
data prepare ../x
data prepare mnist --data-dir gs://x
plan
plan --config={CONFIGS}/digits.py
plan --topology=v5e:4x8
plan --config=nowhere.py --topology=v5e:4x8
plan --config=configs/raises.py --topology=h100:8
plan --config=configs/fifo.py --topology=h100:8
plan --config=configs/folder.py --topology=h100:8
plan --config={CONFIGS}/digits.py --topology=
plan --config={CONFIGS}/digits.py --topology=z80:8
plan --config={CONFIGS}/digits.py --topology=h100
plan --config={CONFIGS}/digits.py --topology=h100:0
plan --config={CONFIGS}/digits.py --topology=h100:-8
plan --config={CONFIGS}/digits.py --topology=h100:8x
plan --config={CONFIGS}/digits.py --topology=h100:1x2x3
plan --config={CONFIGS}/digits.py --topology=h100:{"9" * 30}
plan --config={CONFIGS}/digits.py --topology=h100:{"9" * 5000}
plan --config={CONFIGS}/digits.py --topology=v5e:4
plan --config={CONFIGS}/digits.py --topology=v5e:99999x99999
plan --config={CONFIGS}/digits.py --topology=h100:8 --config.nothing=1
plan --config={CONFIGS}/digits.py --topology=h100:8 --config.batch_size=nan
plan --config={CONFIGS}/digits.py --topology=h100:8 --config.batch_size=7
plan --config={CONFIGS}/digits.py --topology=h100:8 stray
plan --config={CONFIGS}/digits.py --topology=h100:8 --nothing
plan --config={CONFIGS}/digits.py --topology=h100:8 --config.mesh.tensor=3
plan --config={CONFIGS}/digits.py --topology=v5e:2x2 --cache good.png
sweep
sweep --config={CONFIGS}/digits.py
sweep --config=nowhere.py --config.seed=0,1
sweep --config=configs/raises.py --config.seed=0,1
sweep --config=configs/fifo.py --config.seed=0,1
sweep --config={CONFIGS}/digits.py --config.seed=0,0
sweep --config={CONFIGS}/digits.py --config.seed=0,x
sweep --config={CONFIGS}/digits.py --config.seed=0,
sweep --config={CONFIGS}/digits.py --config.nothing=0,1
sweep --config={CONFIGS}/digits.py --config.steps=1..2
sweep --config={CONFIGS}/digits.py --config.steps=2..1 --trials 2
sweep --config={CONFIGS}/digits.py --config.steps=0..1 --trials 2
sweep --config={CONFIGS}/digits.py --config.optimizer.learning_rate=1..nan --trials 2
sweep --config={CONFIGS}/digits.py --config.model.dropout=0..0.5:log --trials 2
sweep --config={CONFIGS}/digits.py --config.seed=0,1 --trials 2
sweep --config={CONFIGS}/digits.py --config.seed=0,1 --trials 0
sweep --config={CONFIGS}/digits.py --config.seed=0,1 --jobs 0
sweep --config={CONFIGS}/digits.py --config.seed=0,1 --out good.png
sweep --config={CONFIGS}/digits.py --config.seed=0,1 --out good.png/x
sweep --config={CONFIGS}/digits.py --config.seed=0,1 --out /proc/x
sweep --config={CONFIGS}/digits.py --config.seed=0,1 odd
export
export x {M}
export x -m nowhere --to onnx
export x {M} --to nothing
export good.png/x {M} --to stablehlo
export /proc/x {M} --to stablehlo
export good.png {M} --to stablehlo
export x {M} --to stablehlo --image-size 9
export x {M} --to stablehlo --int8
export x {M} --to stablehlo --images nowhere
export x {M} --to stablehlo --images no_pictures
export x {M} --to stablehlo --images odd/fifo.png
export x {M} --to onnx --environment nowhere
export x {M} --to onnx --environment good.png --install
export x {M} --to web --environment nowhere --runtime nowhere
export x {M} --to onnx --runtime nowhere
""".strip().splitlines()
CAIT += [f"predict odd/{kind}.png {M}" for kind in (
    "fifo", "socket", "zero", "to_fifo", "dangling", "loop", "folder", "empty", "text", "sparse", "torn", "bomb",
    "large", "flat",
)]  # fmt: skip
CAIT += [
    f"{command} {M}{rest}"
    for command, rest in (
        ("predict odd", ""), ("features odd", " -o x.npz"), ("explain odd/fifo.png", ""),
        ("report odd/fifo.png", ""), ("explain odd", ""),
    )
]  # fmt: skip
CAIT += [
    f"{command} with_{kind}{rest}"
    for kind in ("fifo", "socket", "zero", "to_fifo", "sparse")
    for command, rest in (("data show", " --images 4"), ("evaluate -m model --data", ""))
]
CAIT += [
    f"predict good.png {M} --weights weights/{kind}{suffix}"
    for suffix in (".safetensors", ".pth")
    for kind in ("fifo", "socket", "zero", "to_fifo", "dangling", "loop", "folder", "empty", "text", "sparse")
] + [f"predict good.png {M} --weights weights/{name}" for name in (
    "good.txt", "huge_header.safetensors", "bad_header.safetensors", "deep_header.safetensors", "evil.pth",
    "list.pth", "zip.pth",
)]  # fmt: skip
CAIT += [
    f"predict good.png {M} --class-names names/{name}"
    for name in (
        "fifo.txt", "socket.txt", "zero.txt", "to_fifo.txt", "dangling.txt", "loop.txt", "folder.txt", "empty.txt",
        "text.txt", "sparse.txt", "three.json", "blank.json", "list_numbers.json", "dict.json", "deep.json",
        "nested.json", "broken.json", "number.json", "gap.json", "huge.json", "id2label.json", "nan.json",
        "latin.txt",
    )
]  # fmt: skip


@pytest.mark.parametrize("line", some_fast(CAIT))
def test_cait_refuses(line):
    check(run_cait, *shlex.split(line))


RIGHT_MODELS = {
    f"attribute_{name}_nothing"
    for name in ("attention", "class_depth", "class_mlp_ratio", "precision", "projection_dropout")
} | {"attribute_layer_scale_init_negative"}


@pytest.mark.slow
def test_cait_refuses_a_saved_model(place):
    wrong = {}
    for folder in sorted((place / "models").iterdir()):
        if folder.name in RIGHT_MODELS:
            continue
        try:
            check(run_cait, "predict", "good.png", "-m", f"models/{folder.name}")
        except BaseException as error:
            wrong[folder.name] = f"{type(error).__name__}: {str(error)[:150]}"
    assert not wrong, "\n".join(f"{k}: {v}" for k, v in wrong.items())


PROCESSES = (
    ("JAX_PLATFORMS=cuda", "train.py --config=DIGITS", "unset JAX_PLATFORMS"),
    ("JAX_PLATFORMS=cuda", "cait predict good.png -m model", "unset JAX_PLATFORMS"),
    ("JAX_PLATFORMS=nothing", "train.py --config=DIGITS", "unset JAX_PLATFORMS"),
    ("", "train.py --config=configs/raises.py", "ZeroDivisionError"),
    ("", "train.py --config=configs/exits.py", "SystemExit: no"),
    ("", "train.py --config=configs/fifo.py", "named pipe"),
    ("", "train.py --config=DIGITS stray", "'stray' is no flag"),
    ("", "train.py --config=DIGITS --config.seed=99999999999999999999", "must be a whole number"),
    ("", "train.py --config=DIGITS --config.model.width=100000", "GB of each device, which has"),
    (
        "",
        "train.py --config=DIGITS --coordinator=a:b --processes=2 --process=0",
        "a port from 1 to",
    ),
    (
        "",
        "train.py --config=DIGITS --coordinator=a:0 --processes=2 --process=1",
        "a port from 1 to",
    ),
    ("", "train.py --config=DIGITS --workdir=good.png/run", "choose another directory"),
    ("", "cait predict odd/fifo.png -m model", "1 of 1 images were left out"),
    ("", "cait predict odd/zero.png -m model", "1 of 1 images were left out"),
    ("", "cait predict odd/sparse.png -m model", "1 of 1 images were left out"),
    ("", "cait predict good.png -m models/deep", "nests too deeply"),
    ("", "cait evaluate -m model --data ./photos -o /proc/x", "cannot be written"),
    ("", "cait convert -m model good.png/x", "nothing can be written"),
    ("", "cait plot runs/zeros", "holds no metrics yet"),
    ("", "cait data show with_fifo --sheet x.jpg", "does not end in .png"),
)


@pytest.mark.slow
@pytest.mark.parametrize(("variable", "command", "words"), PROCESSES)
def test_a_process_ends_with_the_sentence(place, variable, command, words):
    root = CONFIGS.parent
    program = {"train.py": [str(root / "train.py")], "cait": ["-m", "cait_jax"]}
    name, *arguments = shlex.split(command.replace("DIGITS", str(CONFIGS / "digits.py")))
    environment = {**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    if variable:
        key, _, value = variable.partition("=")
        environment[key] = value
    ended = subprocess.run(
        [sys.executable, *program[name], *arguments], env=environment, cwd=place, capture_output=True,
        text=True, timeout=120, check=False,
    )  # fmt: skip
    assert ended.returncode == 1
    assert "Traceback" not in ended.stderr
    assert words in ended.stderr.splitlines()[-1]


# What is right beside it


def test_help_config_prints_every_key_of_a_recipe_with_its_value(capsys):
    with flagsaver.flagsaver(), speaking(config_flags):
        line = train.parse(["train.py", DIGITS, "--help-config", "--config.seed=4"])
        assert train.main(line) == 0
    rows = {row.split()[0]: row for row in capsys.readouterr().out.splitlines()[2:]}
    assert rows.keys() == KEYS.keys()
    assert re.fullmatch(r"seed +4 +a whole number from 0 to 4,294,967,295 +every .*", rows["seed"])
    assert all(rows[name].rstrip().endswith(key.meaning) for name, key in KEYS.items())


def test_the_memory_that_a_state_needs_is_said_in_numbers():
    sentence = run_train(DIGITS, "--config.model.width=100000", "--config.model.num_heads=4")
    assert re.search(
        r"[0-9,]{12,} parameters, .* take [0-9,.]+ GB of each device, which has", sentence
    )
    assert "lower --config.model.width" in sentence


def test_a_state_of_many_devices_is_counted_by_its_shards():
    mesh = make_mesh(fsdp=8, data=1)
    params = {"fc1": {"kernel": jax.ShapeDtypeStruct((1024, 64), np.float32)}}
    shaped = setup.with_shardings(params, param_shardings(params, mesh))
    assert local_bytes(shaped) == 1024 * 64 * 4 // 8


def test_a_batch_of_a_run_that_goes_on_can_stay_on_three_devices():
    sentence = (
        "batch_size 64 must be a multiple of 3 .* keeps its batch size: .*config.mesh.tensor=3"
    )
    with pytest.raises(UserError, match=sentence):
        check_batch_size(64, shards=3)
    check_batch_size(64, batch_shards(make_mesh(jax.devices()[:3], tensor=3)))


def test_dev_null_and_existing_files_are_outputs(tmp_path):
    (tmp_path / "there.json").write_text("x")
    check_writable(tmp_path / "there.json", tmp_path / "new.json", None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["there.json"]
    with text_output(Path(os.devnull)) as write:
        write("x")


def test_an_image_may_have_a_gibibyte_and_no_more(place):
    with pytest.raises(OSError, match="3,221,225,472 bytes, more than the limit of 1,073,741,824"):
        read_bytes(place / "odd" / "sparse.png", MAX_IMAGE)
    with pytest.raises(OSError, match="a named pipe, no regular file"):
        check_regular(place / "odd" / "to_fifo.png")
    assert read_bytes(place / "good.png", MAX_IMAGE).startswith(b"\x89PNG")
