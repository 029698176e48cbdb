"""Checkpoints come back bit for bit, or not at all and with a sentence."""

import errno
import hashlib
import json
import logging
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import struct
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from run_files import WRITES_NO_CACHE
from trees import assert_same_bits

from cait_jax.checkpoint import manifest, reader
from cait_jax.checkpoint.store import Checkpoints
from cait_jax.errors import UserError
from cait_jax.sharding import copy_to_host


@struct.dataclass
class State:
    step: jax.Array
    params: dict
    opt_state: optax.OptState


def make_state(seed: int = 0) -> State:
    keys = jax.random.split(jax.random.key(seed), 4)
    params = {
        "stem": {"kernel": jax.random.normal(keys[0], (8, 12)), "scale": jnp.float32(seed + 0.1)},
        "half": jax.random.normal(keys[1], (16, 4), jnp.bfloat16),
        "bits": jax.random.bits(keys[2], (8,), jnp.uint32),
        "count": jnp.int32(-7 - seed),
        "blocks": [jax.random.normal(keys[3], (4,)), jnp.arange(3, dtype=jnp.int32)],
    }
    weights = {"stem": params["stem"], "half": params["half"]}
    transform = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    return State(jnp.int32(seed), params, transform.init(weights))


def abstract(state, sharding=None):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding or x.sharding), state
    )


def save_steps(directory, *steps, **options):
    with Checkpoints(directory, **options) as checkpoints:
        for step in steps:
            checkpoints.save(step, make_state(step), {"step": step})


def array_file(step_directory: Path) -> Path:
    """The largest file of arrays."""
    return max((step_directory / "state").rglob("d/*"), key=lambda p: p.stat().st_size)


def flip_bit(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def steps_on_disk(directory: Path) -> list[int]:
    return sorted(int(p.name) for p in directory.iterdir() if p.name.isdecimal())


def test_round_trip_gives_the_same_types_dtypes_and_bits(tmp_path):
    state, meta = make_state(3), {"config": {"lr": 0.1, "names": ["a", None]}, "epoch": 2}
    with Checkpoints(tmp_path / "new" / "run") as checkpoints:
        assert checkpoints.restore(abstract(state)) is None
        checkpoints.save(30, state, meta)
        checkpoints.wait()
        assert checkpoints.latest_step() == 30
    step, restored, found = Checkpoints(tmp_path / "new" / "run").restore(abstract(state))
    assert (step, found) == (30, meta)
    assert_same_bits(restored, state)
    assert isinstance(restored.opt_state[1][0], optax.ScaleByAdamState)


@struct.dataclass
class Later(State):
    """`State` with a field that is empty in older runs."""

    carried: dict = struct.field(default_factory=dict)


def test_a_checkpoint_is_older_than_a_field_without_leaves(tmp_path):
    state = make_state()
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, state, {})
    later = Later(**vars(state))
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        step, found, _ = checkpoints.restore(abstract(later))
        assert step == 1
        assert_same_bits(found, later)
        with pytest.raises(UserError, match="carried"):
            checkpoints.restore(abstract(later.replace(carried={"average": jnp.zeros(2)})))


def test_arrays_serve_as_template(tmp_path):
    save_steps(tmp_path, 1)
    _, restored, _ = Checkpoints(tmp_path).restore(make_state(9))
    assert_same_bits(restored, make_state(1))
    _, restored, _ = Checkpoints(tmp_path).restore(jax.tree.map(np.asarray, make_state(9)))
    assert_same_bits(restored, make_state(1))


def test_saves_the_state_at_the_time_of_save_though_it_is_donated_right_after(tmp_path):
    # On the CPU a host copy may be no copy at all; large leaves, so that writing takes a while.
    advance = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    state = advance({f"w{i}": jnp.full((500_000,), float(i)) for i in range(4)})
    with Checkpoints(tmp_path, keep=9) as checkpoints:
        for step in range(1, 5):
            meta = {"step": step}
            checkpoints.save(step, state, meta)
            meta["step"] = -1
            for _ in range(5):
                state = advance(state)
            jax.block_until_ready(state)
        for step in range(1, 5):
            _, saved, meta = checkpoints.restore(state, step)
            assert meta == {"step": step}
            for i in range(4):
                np.testing.assert_array_equal(saved[f"w{i}"], float(i) + 1 + 5 * (step - 1))


def test_restored_arrays_can_be_donated(tmp_path):
    save_steps(tmp_path, 1)
    _, restored, _ = Checkpoints(tmp_path).restore(make_state())
    double = jax.jit(lambda s: jax.tree.map(lambda x: x + x, s), donate_argnums=0)
    assert_same_bits(double(restored), jax.tree.map(lambda x: x + x, make_state(1)))


def test_restores_onto_the_mesh_of_the_template(tmp_path):
    save_steps(tmp_path, 5)
    mesh = jax.sharding.Mesh(
        np.array(jax.devices()[:4]).reshape(2, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2
    )
    specs = {2: PartitionSpec("a", "b"), 1: PartitionSpec(), 0: PartitionSpec()}
    template = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=NamedSharding(mesh, specs[x.ndim])
        ),
        make_state(),
    )
    _, restored, _ = Checkpoints(tmp_path).restore(template)
    assert_same_bits(restored, make_state(5))
    jax.tree.map(lambda x, t: x.sharding == t.sharding or pytest.fail(str(x)), restored, template)

    with Checkpoints(tmp_path / "sharded") as checkpoints:
        checkpoints.save(6, restored, {})
        checkpoints.wait()
        _, back, _ = checkpoints.restore(make_state())
    assert_same_bits(back, make_state(5))


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"count": jnp.float32(0)}, r"params/count is int32 \(\) .* should be float32 \(\)"),
        ({"half": jnp.zeros((16, 4))}, r"params/half is bfloat16 .* should be float32"),
        ({"bits": jnp.zeros((9,), jnp.uint32)}, r"uint32 \(8,\) .* should be uint32 \(9,\)"),
        ({"head": jnp.zeros(2)}, r"params/head is not in the checkpoint"),
        ({"stem": {"scale": jnp.float32(0)}}, r"the checkpoint's params/stem/kernel has no place"),
        ({"blocks": [jnp.zeros(5), jnp.zeros(3)]}, r"params/blocks/0 .*; and 1 more\.$"),
        ({"extra": {}}, r"does not fit .*extra"),
    ],
)
def test_refuses_what_does_not_fit_the_template(tmp_path, change, sentence):
    save_steps(tmp_path, 1)
    state = make_state()
    template = abstract(state.replace(params={**state.params, **change}))
    with pytest.raises(UserError, match=sentence) as caught:
        Checkpoints(tmp_path).restore(template)
    assert "\n" not in str(caught.value)


def test_refuses_a_template_with_another_optimizer(tmp_path):
    save_steps(tmp_path, 1)
    state = make_state()
    with pytest.raises(UserError, match="opt_state"):
        Checkpoints(tmp_path).restore(state.replace(opt_state=optax.sgd(0.1).init(state.params)))


def test_a_part_comes_to_the_host_with_its_meta(tmp_path):
    save_steps(tmp_path, 1, 2)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    params = make_state(2).params
    for template in (None, params, abstract(params)):
        step, found, meta = Checkpoints(tmp_path).restore_part("params", template)
        assert (step, meta) == (2, {"step": 2})
        assert_same_bits(found, params)
        assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(found))
    assert Checkpoints(tmp_path).restore_part("step", step=1)[1] == 1
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before
    assert Checkpoints(tmp_path / "absent").restore_part("params") is None


def test_the_other_parts_of_a_state_are_not_loaded(tmp_path, monkeypatch):
    save_steps(tmp_path, 1)
    read, real = [], ocp.type_handlers.NumpyHandler.deserialize

    async def deserialize(handler, infos, args=None):
        read.extend(info.name for info in infos)
        return await real(handler, infos, args)

    monkeypatch.setattr(ocp.type_handlers.NumpyHandler, "deserialize", deserialize)
    Checkpoints(tmp_path).restore_part("params")
    assert len(read) == len(jax.tree.leaves(make_state().params))
    assert all(name.startswith("params") for name in read)


@pytest.mark.parametrize(
    ("part", "template", "sentence"),
    [
        ("ema", None, r"step 1 .* holds no ema; it holds opt_state, params, step\."),
        (
            "step",
            jnp.float32(0),
            r"step is int32 \(\) in the checkpoint and should be float32 \(\)",
        ),
        (
            "params",
            {"half": jnp.zeros(3)},
            r"checkpoint's params/bits has no place in it; and 6 more",
        ),
    ],
)
def test_a_part_that_is_missing_or_does_not_fit(tmp_path, part, template, sentence):
    save_steps(tmp_path, 1)
    with pytest.raises(UserError, match=sentence) as caught:
        Checkpoints(tmp_path).restore_part(part, template)
    assert "\n" not in str(caught.value)


def test_a_part_of_a_damaged_step_is_that_of_the_one_before(tmp_path):
    save_steps(tmp_path, 1, 2)
    flip_bit(array_file(tmp_path / "2"))
    step, found, _ = Checkpoints(tmp_path).restore_part("params")
    assert step == 1
    assert_same_bits(found, make_state(1).params)
    with pytest.raises(UserError, match=r"step 2 .* unusable"):
        Checkpoints(tmp_path).restore_part("params", step=2)


def test_a_step_deleted_while_it_is_read_gives_way_to_the_next(tmp_path, monkeypatch):
    save_steps(tmp_path, 1)
    real = reader.read_part

    def overtaken(path, *arguments):
        if path.name == "1":
            save_steps(tmp_path, 2)
            shutil.rmtree(tmp_path / "1")
        return real(path, *arguments)

    monkeypatch.setattr(reader, "read_part", overtaken)
    step, found, _ = Checkpoints(tmp_path).restore_part("params")
    assert step == 2
    assert_same_bits(found, make_state(2).params)


def test_keeps_the_latest_and_the_best(tmp_path):
    accuracy = {1: 0.3, 2: 0.9, 3: 0.5, 4: 0.6, 5: 0.7, 6: 0.2}
    with Checkpoints(tmp_path, keep=2, best_metric="accuracy") as checkpoints:
        for step, value in accuracy.items():
            checkpoints.save(step, make_state(step), {}, {"accuracy": value})
        checkpoints.wait()
        assert (checkpoints.latest_step(), checkpoints.best_step()) == (6, 2)
        # Step 4 was not deleted for a step 6 that was not committed.
        assert steps_on_disk(tmp_path) == [2, 4, 5, 6]
        _, best, _ = checkpoints.restore(make_state(), checkpoints.best_step())
    assert_same_bits(best, make_state(2))
    assert Checkpoints(tmp_path).best_step() is None


def test_metrics_recorded_after_a_save_count_as_those_given_with_it(tmp_path):
    options = {"keep": 1, "best_metric": "accuracy"}
    with Checkpoints(tmp_path, **options) as checkpoints:
        for step, value in {1: 0.9, 2: 0.1, 3: 0.3}.items():
            checkpoints.save(step, make_state(step), {})
            checkpoints.record(step, {"accuracy": value, "loss": float("nan")})
    with Checkpoints(tmp_path, **options) as checkpoints:
        assert checkpoints.best_step() == 1
        assert checkpoints.metrics(3)["accuracy"] == 0.3
        assert np.isnan(checkpoints.metrics(3)["loss"])
        checkpoints.record(3, {"accuracy": 0.95})  # of a step that was restored
        checkpoints.wait()
        assert checkpoints.best_step() == 3
        step, restored, _ = checkpoints.restore(make_state())
    assert step == 3
    assert_same_bits(restored, make_state(3))


def test_metrics_that_cannot_be_recorded_are_said_and_the_step_stays(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_state(1), {})
    checkpoints.wait()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        checkpoints.record(1, {"accuracy": 0.5})
        with pytest.raises(UserError, match=r"step 1 .*No space left"):
            checkpoints.wait()
    assert checkpoints.metrics(1) == {}
    step, restored, _ = checkpoints.restore(make_state())
    checkpoints.close()
    assert step == 1
    assert_same_bits(restored, make_state(1))


def test_best_can_be_the_least_and_of_equals_is_the_newest(tmp_path):
    options = {"best_metric": "loss", "best_mode": "min", "keep": 9}
    with Checkpoints(tmp_path, **options) as checkpoints:
        for step, value in {1: 2.0, 2: 0.5, 3: 0.5, 4: 1.0}.items():
            checkpoints.save(step, {"x": jnp.zeros(2)}, {}, {"loss": value})
    assert Checkpoints(tmp_path, **options).best_step() == 3


@pytest.mark.parametrize("metrics", [None, {}, {"other": 1.0}, {"accuracy": float("nan")}])
def test_a_step_without_a_finite_metric_never_evicts_the_best(tmp_path, metrics):
    options = {"keep": 1, "best_metric": "accuracy"}
    with Checkpoints(tmp_path, **options) as checkpoints:
        checkpoints.save(1, {"x": jnp.zeros(2)}, {}, metrics)
        checkpoints.save(2, {"x": jnp.zeros(2)}, {}, {"accuracy": 0.5})
        for step in range(3, 6):
            checkpoints.save(step, {"x": jnp.zeros(2)}, {}, metrics)
    # Opened anew, so that the metrics are those on disk.
    with Checkpoints(tmp_path, **options) as checkpoints:
        checkpoints.save(6, {"x": jnp.zeros(2)}, {}, metrics)
        checkpoints.wait()
        assert checkpoints.best_step() == 2
    assert steps_on_disk(tmp_path) == [2, 5, 6]


def test_what_is_overtaken_as_best_goes_only_after_its_successor_is_committed(
    tmp_path, monkeypatch
):
    with Checkpoints(tmp_path, keep=1, best_metric="accuracy") as checkpoints:
        for step, value in {1: 0.5, 2: 0.1, 3: 0.2}.items():
            checkpoints.save(step, {"x": jnp.zeros(2)}, {}, {"accuracy": value})
        checkpoints.wait()
        monkeypatch.setattr(os, "fsync", no_space)
        checkpoints.save(4, {"x": jnp.zeros(2)}, {}, {"accuracy": 0.9})
        with pytest.raises(UserError):
            checkpoints.wait()
        assert checkpoints.best_step() == 1


def flip_array(step: Path) -> str:
    flip_bit(array_file(step))
    return array_file(step).relative_to(step).as_posix()


def truncate_array(step: Path) -> str:
    file = array_file(step)
    os.truncate(file, file.stat().st_size - 1)
    return file.relative_to(step).as_posix()


def remove_array(step: Path) -> str:
    file = array_file(step)
    file.unlink()
    return file.relative_to(step).as_posix()


def remove_manifest(step: Path) -> str:
    (step / "manifest.json").unlink()
    return "manifest.json"


def flip_manifest(step: Path) -> str:
    text = (step / "manifest.json").read_text()
    (step / "manifest.json").write_text(text.replace('"size": ', '"size": 1', 1))
    return "manifest.json"


def tear_manifest(step: Path) -> str:
    os.truncate(step / "manifest.json", 40)
    return "manifest.json"


def flip_meta(step: Path) -> str:
    flip_bit(step / "meta" / "metadata")
    return "meta/metadata"


def rewrite_manifest(step: Path, change: Callable[[dict], object]) -> str:
    """A manifest with the right checksum over whatever `change` gives."""
    body = json.loads((step / "manifest.json").read_text())
    del body["sha256"]
    body = change(body)
    if isinstance(body, dict):
        text = json.dumps(body, sort_keys=True)
        body = {"sha256": hashlib.sha256(text.encode()).hexdigest(), **body}
    (step / "manifest.json").write_text(json.dumps(body))
    return "manifest.json"


def manifest_is_a_list(step: Path) -> str:
    return rewrite_manifest(step, lambda body: [body])


def manifest_lacks_files(step: Path) -> str:
    return rewrite_manifest(step, lambda body: {k: v for k, v in body.items() if k != "files"})


def manifest_has_files_of_text(step: Path) -> str:
    return rewrite_manifest(step, lambda body: {**body, "files": {"state": "large"}})


def manifest_has_metrics_of_text(step: Path) -> str:
    return rewrite_manifest(step, lambda body: {**body, "metrics": {"accuracy": "high"}})


def nest_manifest(step: Path) -> str:
    (step / "manifest.json").write_text("[" * 100_000)
    return "manifest.json"


def add_a_file(step: Path) -> str:
    (step / "state" / "extra").write_text("new")
    return "state/extra"


def replace_by_another_runs(step: Path) -> str:
    other = step.parent.parent / "other"
    save_steps(other, int(step.name))
    shutil.rmtree(step)
    (other / step.name).rename(step)
    return "another run"


def replace_the_config(step: Path) -> str:
    """With the right checksum of the file that holds it."""
    text = json.dumps({"config": {"seed": 1}}).encode()
    (step / "meta" / "metadata").write_bytes(text)
    file = {"size": len(text), "sha256": hashlib.sha256(text).hexdigest()}
    rewrite_manifest(step, lambda body: {**body, "files": {**body["files"], "meta/metadata": file}})
    return "its config is not the one"


def lose_the_sum_of_the_config(step: Path) -> str:
    rewrite_manifest(step, lambda body: {k: v for k, v in body.items() if k != "config_sha256"})
    return "its config is not the one"


def rename_an_older_one(step: Path) -> str:
    shutil.rmtree(step)
    shutil.copytree(step.with_name("10"), step)
    return "of step 10"


FAULTS = [
    flip_array,
    truncate_array,
    remove_array,
    remove_manifest,
    flip_manifest,
    tear_manifest,
    flip_meta,
    manifest_is_a_list,
    manifest_lacks_files,
    manifest_has_files_of_text,
    manifest_has_metrics_of_text,
    nest_manifest,
    add_a_file,
    replace_by_another_runs,
    rename_an_older_one,
    replace_the_config,
    lose_the_sum_of_the_config,
]


@pytest.mark.parametrize("fault", FAULTS)
def test_a_damaged_step_is_passed_over_and_kept_aside(tmp_path, fault, caplog):
    save_steps(tmp_path, 10, 20)
    damaged = fault(tmp_path / "20")
    with Checkpoints(tmp_path) as checkpoints:
        with caplog.at_level(logging.WARNING, "cait_jax"):
            step, restored, meta = checkpoints.restore(make_state())
        assert (step, meta) == (10, {"step": 10})
        assert_same_bits(restored, make_state(10))
        assert any("step 20" in m and damaged in m for m in caplog.messages)
        assert checkpoints.latest_step() == 10
        with pytest.raises(UserError, match=f"step 20 .*{damaged}"):
            checkpoints.restore(make_state(), 20)

        checkpoints.save(20, make_state(21), {"step": "again"})
        checkpoints.wait()
        step, restored, meta = checkpoints.restore(make_state())
    assert (step, meta) == (20, {"step": "again"})
    assert_same_bits(restored, make_state(21))
    assert (tmp_path / "broken" / "20" / "state").is_dir()
    assert steps_on_disk(tmp_path) == [10, 20]


def test_meta_reads_no_array_and_passes_over_what_is_not_good(tmp_path):
    save_steps(tmp_path, 1, 2, 3, keep=3)
    flip_meta(tmp_path / "3")
    truncate_array(tmp_path / "2")
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        assert checkpoints.meta() == {"step": 1}
        assert checkpoints.meta(1) == {"step": 1}
        with pytest.raises(UserError, match=r"step 3 .*meta/metadata"):
            checkpoints.meta(3)
        checkpoints.save(4, make_state(4), {"step": 4})
        checkpoints.wait()
        assert checkpoints.meta() == {"step": 4}
    flip_array(tmp_path / "4")
    assert Checkpoints(tmp_path).meta() == {"step": 4}
    assert sorted(p.name for p in (tmp_path / "broken").iterdir()) == ["2", "3"]


def test_meta_of_nothing_is_refused(tmp_path):
    with pytest.raises(UserError, match="no checkpoint"):
        Checkpoints(tmp_path / "absent").meta()
    assert not (tmp_path / "absent").exists()


def test_damage_found_while_saving_goes_on_is_never_deleted(tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(1, make_state(1), {})
        checkpoints.save(2, make_state(2), {})
        checkpoints.wait()
        flip_meta(tmp_path / "2")
        assert checkpoints.meta() == {}
        for step in (3, 4):
            checkpoints.save(step, make_state(step), {})
    assert (tmp_path / "broken" / "2").is_dir()
    assert steps_on_disk(tmp_path) == [3, 4]


def test_a_second_broken_step_of_the_same_number_is_kept_too(tmp_path):
    save_steps(tmp_path, 10)
    for _ in range(2):
        save_steps(tmp_path, 20)
        remove_manifest(tmp_path / "20")
    save_steps(tmp_path, 20)
    assert sorted(p.name for p in (tmp_path / "broken").iterdir()) == ["20", "20-2"]


def test_a_manifest_is_read_once_until_it_changes(tmp_path, monkeypatch):
    read, reads = manifest.read, []
    monkeypatch.setattr(manifest, "read", lambda path: reads.append(path) or read(path))
    save_steps(tmp_path, 10, 20)
    checkpoints = Checkpoints(tmp_path, best_metric="accuracy")
    for _ in range(3):
        assert checkpoints.latest_step() == 20
        assert checkpoints.best_step() is None
    known = len(reads)
    assert checkpoints.latest_step() == 20
    assert len(reads) == known
    checkpoints.record(10, {"accuracy": 0.5})
    checkpoints.wait()
    assert checkpoints.best_step() == 10
    assert len(reads) == known + 2  # to change it, and then


def test_a_step_of_a_later_format_is_refused(tmp_path):
    save_steps(tmp_path, 10, 20)
    rewrite_manifest(tmp_path / "20", lambda body: {**body, "format": 99})
    with pytest.raises(UserError, match="of format 99, and this version reads 2"):
        Checkpoints(tmp_path).restore(make_state())


@pytest.mark.parametrize("number", [None, 1])
def test_steps_of_older_formats_are_read_and_go_on(tmp_path, number):
    """Of before runs had an id, and of format 1, which has no SHA-256 of the config."""
    save_steps(tmp_path, 10, 20)
    old = ("config_sha256", "format")
    if number is None:
        (tmp_path / "run.json").unlink()
        old += ("run", "rollback_point")
    formats = {} if number is None else {"format": number}
    for step in ("10", "20"):
        rewrite_manifest(
            tmp_path / step,
            lambda body: {k: v for k, v in body.items() if k not in old} | formats,
        )
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        assert checkpoints.restore(make_state())[0] == 20
        assert checkpoints.rollback_step() == 20
        checkpoints.save(30, make_state(30), {})
    assert Checkpoints(tmp_path).restore(make_state(), 10)[0] == 10


@pytest.mark.parametrize("content", [None, "[]", "{", '{"run": 3}'])
def test_a_lost_run_file_is_made_anew_with_the_runs_id(tmp_path, content):
    save_steps(tmp_path, 10, 20)
    before = json.loads((tmp_path / "run.json").read_text())
    (tmp_path / "run.json").unlink()
    if content is not None:
        (tmp_path / "run.json").write_text(content)
    save_steps(tmp_path, 30)
    assert json.loads((tmp_path / "run.json").read_text()) == before
    assert Checkpoints(tmp_path).restore(make_state())[0] == 30


def test_the_newest_rollback_point_is_kept(tmp_path):
    with Checkpoints(tmp_path, keep=1) as checkpoints:
        checkpoints.save(10, make_state(10), {})
        checkpoints.save(11, make_state(11), {}, rollback_point=False)
        checkpoints.save(12, make_state(12), {}, rollback_point=False)
        checkpoints.wait()
        assert checkpoints.rollback_step() == 10
        checkpoints.save(20, make_state(20), {})
        checkpoints.wait()
        assert checkpoints.rollback_step() == 20
        flip_array(tmp_path / "20")
        assert checkpoints.rollback_step() in (10, None)


def test_few_unusable_steps_are_kept_aside(tmp_path):
    save_steps(tmp_path, 10)
    for _ in range(5):
        save_steps(tmp_path, 20)
        remove_manifest(tmp_path / "20")
    save_steps(tmp_path, 20)
    assert len(list((tmp_path / "broken").iterdir())) == 3


@pytest.mark.parametrize("fault", [flip_array, remove_manifest, tear_manifest])
def test_nothing_but_damage_is_said_in_a_sentence(tmp_path, fault):
    save_steps(tmp_path, 10, 20)
    for step in ("10", "20"):
        fault(tmp_path / step)
    with pytest.raises(UserError, match=r"steps 10, 20; .* start afresh"):
        Checkpoints(tmp_path).restore(make_state())


def test_a_lone_step_without_a_manifest_is_a_first_save_that_was_killed(tmp_path, caplog):
    save_steps(tmp_path, 10)
    remove_manifest(tmp_path / "10")
    assert Checkpoints(tmp_path).restore(make_state()) is None
    assert "step 10" in caplog.text
    save_steps(tmp_path, 10)
    assert Checkpoints(tmp_path).latest_step() == 10
    flip_array(tmp_path / "10")
    with pytest.raises(UserError, match="None of the checkpoints"):
        Checkpoints(tmp_path).restore(make_state())


def test_refuses_a_missing_step_and_one_that_is_saved_already(tmp_path):
    save_steps(tmp_path, 1)
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(UserError, match=r"no checkpoint of step 7 .* there are: 1\."):
            checkpoints.restore(make_state(), 7)
        with pytest.raises(UserError, match="Step 1 is already saved"):
            checkpoints.save(1, make_state(2), {})
        checkpoints.save(2, make_state(2), {})
    _, first, _ = Checkpoints(tmp_path).restore(make_state(), 1)
    assert_same_bits(first, make_state(1))


def no_space(descriptor):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize("said_by", ["save", "wait", "close"])
def test_a_failed_commit_is_said_once_and_the_step_before_stays(tmp_path, monkeypatch, said_by):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, make_state(1), {})
    checkpoints.wait()
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", no_space)
        checkpoints.save(2, make_state(2), {})
        call = {
            "save": lambda: checkpoints.save(3, make_state(3), {}),
            "wait": checkpoints.wait,
            "close": checkpoints.close,
        }[said_by]
        with pytest.raises(
            UserError, match=r"step 2 .* failed \(No space left on device\): make room"
        ) as caught:
            call()
        assert "\n" not in str(caught.value)
    step, restored, _ = checkpoints.restore(make_state())
    assert step == 1
    assert_same_bits(restored, make_state(1))
    checkpoints.save(2, make_state(2), {})
    checkpoints.close()
    checkpoints.close()
    assert Checkpoints(tmp_path).latest_step() == 2


def test_a_write_that_fails_in_the_background_is_said(tmp_path):
    # A limit on the size of a file is what stops root too, whom no permission does.
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    large = {"w": jax.random.bits(jax.random.key(0), (100_000,), jnp.uint32)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, large, {})
        checkpoints.wait()
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
            checkpoints.save(2, large, {})
            with pytest.raises(UserError, match=r"Saving step 2 .* failed \(File too large\)"):
                checkpoints.wait()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert checkpoints.restore(large)[0] == 1
        assert not list(tmp_path.glob("2*"))  # it may have taken the last room
        checkpoints.save(2, large, {})
        checkpoints.wait()
        assert checkpoints.latest_step() == 2
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1", "2", "run.json"]


FULL = """
import gc, resource, sys
import jax.numpy as jnp
from cait_jax.checkpoint.store import Checkpoints

resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[2]),) * 2)
state = {str(number): jnp.arange(float(10_000 * number)) for number in range(1, 5)}
try:
    with Checkpoints(sys.argv[1]) as checkpoints:
        checkpoints.save(1, state, {})
except Exception as error:
    print(type(error).__name__, error)
gc.collect()  # of tasks whose exceptions nobody has fetched asyncio tells when they are deleted
"""


@pytest.mark.parametrize("most", [100, 60_000])
def test_orbax_says_nothing_of_its_own_of_a_failed_save(tmp_path, most):
    """In a program that knows nothing of logging: in Python the last resort prints warnings and errors."""
    result = subprocess.run(
        [sys.executable, "-c", FULL, str(tmp_path), str(most)],
        capture_output=True, text=True, check=True,
        env=os.environ | {"JAX_PLATFORMS": "cpu"} | WRITES_NO_CACHE,
    )  # fmt: skip
    assert result.stdout.startswith(
        f"StorageError Saving step 1 under {tmp_path} failed (File too large): make room"
    )
    assert not result.stderr


def test_other_errors_of_asyncio_are_logged(tmp_path, caplog):
    Checkpoints(tmp_path)
    logging.getLogger("asyncio").error("Task", exc_info=ValueError("not Orbax's"))
    assert "not Orbax's" in caplog.text


def test_a_committed_step_outlives_storage_that_can_neither_amend_nor_read_it(
    tmp_path, monkeypatch
):
    def away(*arguments):
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    def unreadable(*arguments):
        raise manifest.DamagedError("manifest.json cannot be read (Input/output error)")

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1), {})
        checkpoints.wait()
        with monkeypatch.context() as patch:
            patch.setattr(manifest, "amend", away)
            patch.setattr(manifest, "of_step", unreadable)
            checkpoints.record(1, {"accuracy": 0.5})
            with pytest.raises(UserError, match="Input/output error"):
                checkpoints.wait()
        step, restored, _ = checkpoints.restore(make_state())
    assert step == 1
    assert_same_bits(restored, make_state(1))


def test_a_directory_that_cannot_be_made_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with (
        Checkpoints(tmp_path / "file" / "run") as checkpoints,
        pytest.raises(UserError, match=r"Saving step 1 .* failed"),
    ):
        checkpoints.save(1, make_state(), {})


def test_a_failed_save_does_not_hide_the_exception_that_ends_the_run(tmp_path, monkeypatch, caplog):
    def run():
        with Checkpoints(tmp_path) as checkpoints:
            checkpoints.save(1, make_state(), {})
            checkpoints.wait()
            monkeypatch.setattr(os, "fsync", no_space)
            checkpoints.save(2, make_state(), {})
            raise KeyError("the run")

    with pytest.raises(KeyError, match="the run"):
        run()
    assert "Saving step 2" in caplog.text


def test_committing_does_not_hold_up_the_caller(tmp_path, monkeypatch):
    real, done = os.fsync, []

    def slow(descriptor):
        time.sleep(0.02)
        done.append(descriptor)
        real(descriptor)

    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, make_state(1), {})
        checkpoints.wait()
        monkeypatch.setattr(os, "fsync", slow)
        checkpoints.save(2, make_state(2), {})
        assert not done
        assert checkpoints.latest_step() == 1
        checkpoints.wait()
        assert len(done) > 10
        assert checkpoints.latest_step() == 2


def test_everything_is_synced_before_the_manifest_appears(tmp_path, monkeypatch):
    synced, real_fsync, real_replace = set(), os.fsync, Path.replace

    def fsync(descriptor):
        synced.add(str(Path(f"/proc/self/fd/{descriptor}").readlink()))
        real_fsync(descriptor)

    def replace(source, target):
        if Path(target).name == "manifest.json":
            step = tmp_path / "1"
            assert {str(p) for p in step.rglob("*")} | {str(step), str(tmp_path)} <= synced
            synced.clear()
        return real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(Path, "replace", replace)
    save_steps(tmp_path, 1)
    assert synced == {str(tmp_path / "1")}
    manifest = json.loads((tmp_path / "1" / "manifest.json").read_text())
    on_disk = {p.relative_to(tmp_path / "1").as_posix() for p in (tmp_path / "1").rglob("*")}
    assert {n for n in on_disk if (tmp_path / "1" / n).is_file()} == {
        *manifest["files"],
        "manifest.json",
    }


def test_reading_leaves_a_save_in_progress_alone(tmp_path):
    save_steps(tmp_path, 10, 20)
    remove_manifest(tmp_path / "20")
    temporary = tmp_path / "30.orbax-checkpoint-tmp"
    temporary.mkdir()
    with Checkpoints(tmp_path) as reader:
        reader.restore(make_state())
        reader.meta()
    assert (tmp_path / "20").is_dir()
    assert temporary.is_dir()
    save_steps(tmp_path, 30)
    assert not temporary.exists()


@pytest.mark.parametrize("options", [{"keep": 0}, {"best_mode": "most"}])
def test_refuses_senseless_options(tmp_path, options):
    with pytest.raises(UserError, match="must be"):
        Checkpoints(tmp_path, **options)


ENDLESS_RUN = """
import sys
import jax.numpy as jnp
from cait_jax.checkpoint.store import Checkpoints

state = {"w": jnp.zeros(300_000), "step": jnp.int32(0)}
with Checkpoints(sys.argv[1], keep=1) as checkpoints:
    resumed = checkpoints.restore(state)
    step = resumed[0] if resumed else 0
    while True:
        step += 1
        checkpoints.save(step, {"w": jnp.full(300_000, float(step)), "step": jnp.int32(step)}, {})
        print(checkpoints.latest_step(), flush=True)
"""


@pytest.mark.slow
def test_killed_at_any_moment_leaves_the_newest_committed_step(tmp_path):
    root = Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    template = {"w": jnp.zeros(300_000), "step": jnp.int32(0)}
    draw = random.Random(0)
    reached = dict.fromkeys(("a", "b", "c"), 0)
    for _ in range(2):
        runs = {
            name: subprocess.Popen(
                [sys.executable, "-c", ENDLESS_RUN, str(tmp_path / name)],
                env=environment,
                stdout=subprocess.PIPE,
                text=True,
            )
            for name in reached
        }
        for name, run in runs.items():
            with run:
                committed = None
                while committed is None or committed < reached[name] + 2:
                    line = run.stdout.readline().strip()
                    assert line, "the run ended by itself"
                    committed = None if line == "None" else int(line)
                time.sleep(draw.uniform(0, 0.2))
                run.kill()
                told = [int(word) for word in run.stdout.read().split()]
            step, state, _ = Checkpoints(tmp_path / name).restore(template)
            assert step >= max([committed, *told])
            assert int(state["step"]) == step
            np.testing.assert_array_equal(state["w"], float(step))
            reached[name] = step


def test_what_is_not_finite_is_null_in_every_json(tmp_path):
    meta = {"metrics": {"loss": float("nan"), "accuracy": 0.5}, "list": [float("inf"), 1]}
    with Checkpoints(tmp_path, best_metric="loss") as checkpoints:
        checkpoints.save(1, make_state(), meta, meta["metrics"])
        checkpoints.wait()
        assert checkpoints.best_step() is None
        assert checkpoints.meta() == {
            "metrics": {"loss": None, "accuracy": 0.5}, "list": [None, 1]
        }  # fmt: skip

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    for file in (tmp_path / "1" / "meta" / "metadata", tmp_path / "1" / "manifest.json"):
        json.loads(file.read_text(), parse_constant=refuse)


def test_a_host_copy_takes_the_buffers_that_fit():
    state, later = make_state(0), make_state(1)
    copy = copy_to_host(state)
    assert_same_bits(copy, state)
    leaves = jax.tree.leaves(copy)
    again = copy_to_host(later, copy)
    assert_same_bits(again, later)
    assert all(a is b for a, b in zip(jax.tree.leaves(again), leaves, strict=True))
    for other in ({"a": jnp.zeros(3)}, {"a": jnp.zeros(3, jnp.int32)}, {"a": jnp.zeros((3, 3))}):
        assert_same_bits(copy_to_host(other, {"a": np.ones(3, np.float32)}), other)
    first = {"a": jnp.zeros(3)}
    assert not np.shares_memory(copy_to_host(first)["a"], np.asarray(first["a"]))
