"""Batches as a function of split, seed and step; broken images; prefetching."""

import dataclasses
import itertools
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from marks import slow
from tfds_files import numbered_jpeg, write_imagenet2012

from cait_jax.data import Encoded, InMemory, eval_batches, load_split, loader, train_batches
from cait_jax.data.decode import center_crop
from cait_jax.data.loader import Batches, PrefetchIterator
from cait_jax.data.sampler import permutation
from cait_jax.data.split import BrokenImage
from cait_jax.errors import UserError

COUNT = 23
SIZE = (12, 16)
PINNED = [0, 21, 2, 11, 20, 17, 9, 1, 8, 13, 5, 16]  # seed 0


@pytest.fixture(scope="module")
def encoded():
    records = [{"image": numbered_jpeg(number, 30, 40), "label": number} for number in range(COUNT)]
    return Encoded(records, tuple(str(number) for number in range(COUNT)), 3)


@pytest.fixture(scope="module")
def in_memory(encoded):
    images = [center_crop(encoded.records[i]["image"], image_size=SIZE) for i in range(COUNT)]
    return InMemory(np.array(images), np.arange(COUNT, dtype=np.int32), encoded.class_names)


@pytest.fixture(scope="module", params=["encoded", "in_memory"])
def split(request):
    return request.getfixturevalue(request.param)


def take(split, steps, *, seed=0, batch_size=4, **options):
    with train_batches(
        split, seed=seed, batch_size=batch_size, image_size=SIZE, **options
    ) as batches:
        return list(itertools.islice(batches, steps))


def labels(batches):
    return np.concatenate([batch["label"] for batch in batches])


def assert_same(batches, expected):
    assert len(batches) == len(expected)
    for batch, other in zip(batches, expected, strict=True):
        assert batch.keys() == other.keys()
        for name in batch:
            assert type(batch[name]) is np.ndarray
            np.testing.assert_array_equal(batch[name], other[name])


def joined(parts):
    """The global batches of which each process holds a part."""
    return [
        {name: np.concatenate([part[name] for part in step]) for name in step[0]}
        for step in zip(*parts, strict=True)
    ]


def test_shapes_and_types(split):
    (batch,) = take(split, 1)
    assert batch.keys() == {"image", "label"}
    assert (batch["image"].shape, batch["image"].dtype) == ((4, *SIZE, 3), np.uint8)
    assert (batch["label"].shape, batch["label"].dtype) == ((4,), np.int32)


def test_every_epoch_shows_each_example_once_in_a_new_order(split):
    order = labels(take(split, 3 * COUNT // 4 + 1))[: 3 * COUNT].reshape(3, COUNT)
    for epoch in order:
        assert sorted(epoch) == list(range(COUNT))
    assert len({tuple(epoch) for epoch in order}) == 3


def test_repeats_show_a_part_of_the_epoch_several_times_with_other_crops(encoded, in_memory):
    steps = -(-2 * COUNT // 4)
    for split in (encoded, in_memory):
        order = labels(take(split, steps, repeats=3))[: 2 * COUNT].reshape(2, COUNT)
        for epoch, found in enumerate(order):
            expected = np.repeat(permutation(0, epoch, COUNT), 3)[:COUNT]
            np.testing.assert_array_equal(found, expected)
    parts = [take(encoded, 3, repeats=3, process_index=i, process_count=2) for i in range(2)]
    assert_same(joined(parts), take(encoded, 3, repeats=3))
    assert_same(take(encoded, 2, repeats=3, start_step=1), take(encoded, 3, repeats=3)[1:])
    first = take(encoded, 1, repeats=3)[0]["image"]
    assert not np.array_equal(first[0], first[1])


def test_balanced_classes_come_equally_often_in_any_kind_of_split(encoded):
    of_class = np.where(np.arange(COUNT) < 20, 0, 1).astype(np.int32)
    records = [{**record, "label": int(of_class[i])} for i, record in enumerate(encoded.records)]
    split = Encoded(records, ("many", "few"), 3)
    found = labels(take(split, 2 * COUNT // 2, batch_size=2, balance_labels=of_class))
    assert abs(int((found == 1).sum()) - COUNT) <= 1
    again = [
        take(split, 3, balance_labels=of_class, process_index=i, process_count=2) for i in range(2)
    ]
    assert_same(joined(again), take(split, 3, balance_labels=of_class))
    assert_same(
        take(split, 3, balance_labels=of_class, workers=1), take(split, 3, balance_labels=of_class)
    )


def test_both_kinds_of_split_have_the_same_order(encoded, in_memory):
    np.testing.assert_array_equal(labels(take(encoded, 13)), labels(take(in_memory, 13)))


def test_the_order_is_pinned(in_memory):
    """A run resumed under another version must go on in the order it began with."""
    assert labels(take(in_memory, 3)).tolist() == PINNED
    assert labels(take(in_memory, 3, seed=2**40)).tolist() != PINNED


def test_images_belong_to_their_labels(in_memory):
    for batch in take(in_memory, 8):
        np.testing.assert_array_equal(batch["image"], in_memory.images[batch["label"]])


def test_crops_differ_between_epochs_and_between_rows(encoded):
    batches = take(encoded, 2, batch_size=COUNT)
    first, second = (batch["image"][np.argsort(batch["label"])] for batch in batches)
    assert all(not np.array_equal(a, b) for a, b in zip(first, second, strict=True))
    one = Encoded([encoded.records[0]] * 6, encoded.class_names, 3)
    (batch,) = take(one, 1, batch_size=6)
    assert len({image.tobytes() for image in batch["image"]}) == 6


def test_a_seed_gives_one_stream_and_another_seed_another(split):
    assert_same(take(split, 4), take(split, 4))
    assert labels(take(split, 4)).tolist() != labels(take(split, 4, seed=1)).tolist()


@pytest.mark.parametrize("start", [1, 5, 6, 40])
def test_resuming_needs_the_step_only(split, start):
    assert_same(take(split, 3, start_step=start), take(split, start + 3)[start:])


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_divide_the_same_batches(split, processes):
    parts = [
        take(split, 9, process_index=index, process_count=processes) for index in range(processes)
    ]
    assert_same(joined(parts), take(split, 9))


@pytest.mark.parametrize("workers", [1, slow(2)])
def test_workers_do_not_change_the_batches(encoded, workers):
    assert_same(take(encoded, 5, workers=workers, start_step=3), take(encoded, 5, start_step=3))


@pytest.mark.slow
def test_workers_need_no_parsed_flags():
    code = textwrap.dedent(f"""
        from cait_jax.data import Encoded, train_batches
        if __name__ == "__main__":
            split = Encoded([{{"image": {numbered_jpeg(0, 9, 9)!r}, "label": 5}}], ("a",), 3)
            with train_batches(split, seed=0, batch_size=1, image_size=(8, 8), workers=1) as b:
                held = [next(b) for _ in range(2)]
                print(held[1]["label"])
    """)
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert shown.stdout == "[5]\n"
    assert shown.stderr == ""


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="looks for processes in /proc")
def test_workers_outlive_a_signal_to_the_group_but_not_their_parent(tmp_path):
    script = tmp_path / "job.py"
    script.write_text(
        textwrap.dedent(f"""
        import multiprocessing, os, signal, time
        from cait_jax.data import Encoded, train_batches
        if __name__ == "__main__":
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            split = Encoded([{{"image": {numbered_jpeg(0, 9, 9)!r}, "label": 5}}], ("a",), 3)
            b = train_batches(split, seed=0, batch_size=1, image_size=(8, 8), workers=1)
            next(b)
            os.killpg(0, signal.SIGTERM)
            for _ in range(20):
                next(b)
            print(*(child.pid for child in multiprocessing.active_children()), flush=True)
            time.sleep(60)
    """)
    )
    with subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as job:
        pids = [int(pid) for pid in job.stdout.readline().split()]
        assert pids
        job.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 10
    while any(_alive(pid) for pid in pids):
        assert time.monotonic() < deadline, "the workers outlived their parent"
        time.sleep(0.05)


def _alive(pid):
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        return state != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("batch_size", [4, 8, COUNT, 60])
@pytest.mark.parametrize("processes", [1, 2, 4])
def test_evaluation_sees_every_example_once_in_order(split, batch_size, processes):
    if batch_size % processes:
        batch_size += processes - batch_size % processes
    parts = [
        list(
            eval_batches(
                split,
                batch_size=batch_size,
                image_size=SIZE,
                process_index=index,
                process_count=processes,
            )
        )
        for index in range(processes)
    ]
    batches = joined(parts)
    assert len(batches) == -(-COUNT // batch_size)
    for batch in batches:
        assert (batch["image"].shape, batch["image"].dtype) == ((batch_size, *SIZE, 3), np.uint8)
        assert (batch["label"].dtype, batch["mask"].dtype) == (np.int32, np.bool_)
        assert not batch["image"][~batch["mask"]].any()
        assert not batch["label"][~batch["mask"]].any()
    mask = np.concatenate([batch["mask"] for batch in batches])
    np.testing.assert_array_equal(mask, np.arange(mask.size) < COUNT)
    np.testing.assert_array_equal(labels(batches)[mask], range(COUNT))


def test_evaluation_crops_the_middle(encoded, in_memory):
    options = {"batch_size": COUNT, "image_size": SIZE}
    assert_same(list(eval_batches(encoded, **options)), list(eval_batches(in_memory, **options)))
    (narrow,) = eval_batches(encoded, crop_pct=0.5, **options)
    expected = center_crop(encoded.records[7]["image"], image_size=SIZE, crop_pct=0.5)
    np.testing.assert_array_equal(narrow["image"][7], expected)


@pytest.mark.slow
def test_evaluation_with_workers(encoded):
    options = {"batch_size": 10, "image_size": SIZE}
    assert_same(
        list(eval_batches(encoded, workers=2, **options)), list(eval_batches(encoded, **options))
    )


def test_mistakes_show_at_the_call(split):
    with pytest.raises(UserError, match=r"batch of 24 .* has 23"):
        train_batches(split, seed=0, batch_size=24, image_size=SIZE)
    for make in (train_batches, eval_batches):
        options = {"seed": 0} if make is train_batches else {}
        with pytest.raises(UserError, match="among 3 processes"):
            make(split, batch_size=4, image_size=SIZE, process_count=3, **options)
        with pytest.raises(UserError, match="positive multiple"):
            make(split, batch_size=0, image_size=SIZE, **options)


def test_images_in_memory_of_another_size(in_memory):
    with pytest.raises(UserError, match="12 by 16"):
        train_batches(in_memory, seed=0, batch_size=4, image_size=(16, 16))


@pytest.mark.parametrize("workers", [0, 1])
def test_evaluation_names_an_undecodable_image(encoded, workers):
    records = [*encoded.records[:3], {"image": b"?", "label": 0, "file_name": b"n01_3.JPEG"}]
    broken = Encoded(records, encoded.class_names, 3)
    with pytest.raises(
        BrokenImage,
        match=r"image 3 \(n01_3.JPEG\) cannot be decoded: not a.*; remove or replace it",
    ):
        list(eval_batches(broken, batch_size=2, image_size=SIZE, workers=workers))


@dataclasses.dataclass
class Damaged:
    """The records of `encoded` `times` over, with some that are broken in one way or another."""

    records: list
    broken: dict
    times: int = 20

    def __len__(self):
        return len(self.records) * self.times

    def __getitem__(self, index):
        record = self.records[index % len(self.records)]
        match self.broken.get(index):
            case None:
                return record
            case "read":
                raise RuntimeError("chunk data hash mismatch\nsomewhere")
            case "empty":
                return {"image": None, "label": None}
            case data:
                return {**record, "image": data, "file_name": f"{index}.jpg"}


def damaged(encoded, broken, times=20):
    records = Damaged(list(encoded.records), broken, times)
    return Encoded(records, encoded.class_names, 3)


BROKEN = {int(permutation(0, 0, 460)[place]): kind for place, kind in
          ((5, "read"), (6, b"?"), (40, "empty"), (459, b"\xff\xd8\xff"))}  # fmt: skip


@pytest.fixture
def patient(monkeypatch):
    monkeypatch.setattr(loader, "JUDGED_FROM", 10_000)


@pytest.mark.usefixtures("patient")
def test_in_training_the_next_in_order_stands_in_for_a_broken_image(encoded, caplog):
    whole, holed = damaged(encoded, {}), damaged(encoded, BROKEN)
    order = permutation(0, 0, 460)
    with train_batches(holed, seed=0, batch_size=46, image_size=SIZE) as batches:
        found = labels(itertools.islice(batches, 10))
        assert batches.broken == 5  # the one at place 6 was met twice
    expected = order.copy()
    for place, other in ((5, 7), (6, 7), (40, 41), (459, 0)):
        expected[place] = order[other]
    np.testing.assert_array_equal(found, expected % COUNT)
    fine = np.setdiff1d(np.arange(46), [5, 6, 40])
    (batch,), (undamaged,) = (take(split, 1, batch_size=46) for split in (holed, whole))
    assert batch.keys() == {"image", "label"}
    np.testing.assert_array_equal(batch["image"][fine], undamaged["image"][fine])

    messages = [record.getMessage() for record in caplog.records][:4]
    by_reading, by_decoding, empty, cut = (int(order[place]) for place in (5, 6, 40, 459))
    assert messages == [
        f"image {by_reading} cannot be read: chunk data hash mismatch; it is replaced",
        f"image {by_decoding} ({by_decoding}.jpg) cannot be decoded: not a JPEG, PNG or WebP image, nor a "
        "GIF, BMP, TIFF, PPM, AVIF or HEIF; it is replaced",
        f"image {empty} cannot be read: its record is empty; it is replaced",
        messages[3],
    ]
    assert messages[3].startswith(f"image {cut} ({cut}.jpg) cannot be decoded: ")


@pytest.mark.slow
@pytest.mark.usefixtures("patient")
def test_workers_and_processes_replace_alike_and_tell_the_parent(encoded, caplog):
    holed = damaged(encoded, BROKEN)
    expected = take(holed, 4, batch_size=46)
    parts = [
        take(holed, 4, batch_size=46, process_index=index, process_count=2) for index in range(2)
    ]
    assert_same(joined(parts), expected)
    caplog.clear()
    with train_batches(holed, seed=0, batch_size=46, image_size=SIZE, workers=2) as batches:
        assert_same(list(itertools.islice(batches, 4)), expected)
        assert batches.broken == 4
    assert len(caplog.records) == 3
    assert_same(take(holed, 3, batch_size=46, start_step=1), expected[1:])


def test_a_broken_image_is_named_once(encoded, caplog):
    holed = damaged(encoded, {7: b"?"}, times=10)
    with train_batches(holed, seed=0, batch_size=46, image_size=SIZE) as batches:
        for _ in range(15):
            next(batches)
        assert batches.broken == 3
    assert len(caplog.records) == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_too_many_broken_images_stop_training(encoded, workers):
    holed = damaged(encoded, dict.fromkeys(range(0, 460, 50), b"?"))
    with train_batches(holed, seed=0, batch_size=23, image_size=SIZE, workers=workers) as batches:
        with pytest.raises(
            BrokenImage, match=r"\d+ of \d+ images read are broken, more than 1%"
        ) as e:
            list(itertools.islice(batches, 200))
        assert "\n" not in str(e.value)
        assert list(batches) == []


def test_one_broken_image_among_the_first_stops_nothing(encoded, caplog):
    holed = damaged(encoded, {int(permutation(0, 0, COUNT * 8)[0]): b"?"}, times=8)
    assert len(take(holed, 9, batch_size=COUNT)) == 9
    assert len(caplog.records) == 1


def test_nothing_but_broken_images(encoded):
    hopeless = damaged(encoded, dict.fromkeys(range(23), b"?"), times=1)
    with pytest.raises(BrokenImage, match="23 images in a row are broken, of which the last"):
        take(hopeless, 1)


def test_a_corrupt_record_of_a_file_is_named(encoded, tmp_path, caplog):
    examples = [(record["image"], record["label"]) for record in encoded.records * 5]
    folder = write_imagenet2012(tmp_path, {"train": examples})
    (shard,) = folder.glob("*.array_record*")
    content = bytearray(shard.read_bytes())
    middle = content.index(examples[11][0][-200:-100])
    content[middle : middle + 50] = bytes(50)
    shard.write_bytes(content)
    split = load_split("imagenet2012", "train", image_size=SIZE, data_dir=str(tmp_path))
    with pytest.raises(BrokenImage, match=r"image 11 cannot be read: .*mismatch"):
        list(eval_batches(split, batch_size=4, image_size=SIZE))
    assert len(take(split, 1, batch_size=115)) == 1
    assert [r.getMessage()[:26] for r in caplog.records] == ["image 11 cannot be read: C"]


def test_nothing_comes_after_close(split):
    batches = train_batches(split, seed=0, batch_size=4, image_size=SIZE)
    next(batches)
    batches.close()
    batches.close()
    assert list(batches) == []


@pytest.mark.parametrize("workers", [0, slow(2)])
def test_real_imagenet_batches(real_data_dir, workers):
    split = load_split("imagenet2012", "train[:20]", image_size=(64, 64), data_dir=real_data_dir)
    with train_batches(
        split, seed=0, batch_size=10, image_size=(64, 64), workers=workers
    ) as batches:
        shown = labels(itertools.islice(batches, 2))
    assert sorted(shown) == sorted(split.records[index]["label"] for index in range(20))


def test_a_worker_that_was_killed_is_a_sentence():
    def killed():
        raise RuntimeError("Worker process was terminated unexpectedly with exit code -9. Search")
        yield

    with pytest.raises(UserError, match=r"ended with exit code -9, .*: lower workers, or lower "):
        next(loader.Batches(killed()))


class Source:
    """Numbered batches; each waits for `may_load`, and closing waits for `may_close`."""

    def __init__(self, count, error=None):
        self.count, self.error = count, error
        self.made = 0
        self.may_load, self.may_close, self.closed = (threading.Event() for _ in range(3))
        self.loading = threading.Event()

    def __next__(self):
        self.loading.set()
        assert self.may_load.wait(10)
        if self.error is not None:
            raise self.error
        if self.made == self.count:
            raise StopIteration
        self.made += 1
        return {"image": np.array(self.made)}

    def close(self):
        assert self.may_close.wait(10)
        self.closed.set()


def test_the_first_batch_loads_unasked_and_the_end_is_not_waited_for():
    source = Source(3)
    with PrefetchIterator(Batches(source), count=3) as ahead:
        assert source.loading.wait(10)
        source.may_load.set()
        assert [int(batch["image"]) for batch in ahead] == [1, 2, 3]
        assert not source.closed.is_set()
    assert not source.closed.is_set()  # it could not end yet, and here we are
    source.may_close.set()
    assert source.closed.wait(10)


def test_closing_what_is_still_loading_waits_for_nothing():
    source = Source(3)
    ahead = PrefetchIterator(Batches(source), count=3)
    ahead.close()
    ahead.close()
    assert list(ahead) == []
    source.may_load.set()
    source.may_close.set()
    assert source.closed.wait(10)


def test_an_error_of_the_first_batch_comes_when_it_is_asked_for():
    source = Source(3, OSError("gone"))
    source.may_load.set()
    source.may_close.set()
    with PrefetchIterator(Batches(source), count=3) as ahead, pytest.raises(OSError, match="gone"):
        next(ahead)
    assert source.closed.wait(10)
