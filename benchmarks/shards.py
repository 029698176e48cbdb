"""What a process holds of an array_record file that it has read one record of, by the number of records.

Command: python benchmarks/shards.py [--records=1000000] [--bytes=8] [--out=runs/benchmark_shards]

The file has its records in groups of one, as TFDS writes them. "opened" is the data source made, "read" the first
record from it, in the middle. Memory is what is added to the process's anonymous memory, which no file backs.
"""

import argparse
import tempfile
import time
from pathlib import Path

from array_record.python.array_record_data_source import ArrayRecordDataSource
from array_record.python.array_record_module import ArrayRecordWriter
from reports import write_report


def anonymous() -> int:
    """Bytes of this process's anonymous memory, from Linux."""
    status = Path("/proc/self/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=10**6)
    parser.add_argument("--bytes", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmark_shards"))
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "shard.array_record")
        writer = ArrayRecordWriter(path, "group_size:1")
        for _ in range(args.records):
            writer.write(bytes(args.bytes))
        writer.close()
        before, began = anonymous(), time.perf_counter()
        source = ArrayRecordDataSource([path])
        assert len(source) == args.records
        opened = {"seconds": time.perf_counter() - began, "bytes": anonymous() - before}
        assert len(source[args.records // 2]) == args.bytes
        read = {"seconds": time.perf_counter() - began, "bytes": anonymous() - before}
    for name, found in (("opened", opened), ("read", read)):
        a_record = found["bytes"] / args.records
        print(
            f"{name}: {found['seconds']:.2f} s, {found['bytes'] / 1e6:.0f} MB, {a_record:.0f} bytes a record"
        )
    write_report(args.out / "shards.json", records=args.records, opened=opened, read=read)


if __name__ == "__main__":
    main()
