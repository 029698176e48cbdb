"""How the GPUs' kernel cuts its work, and what it takes."""

import dataclasses
import math
from typing import Any

import jax

ROWS = 64  # queries of a warpgroup, as wgmma has them
KEYS = 16  # of a tile; the depth of wgmma's product with the values
ALIGNED = 8  # tokens: the rows of a swizzled tile, at whose multiples TMA can start
WORKERS = 2  # warpgroups that compute
MOST_HEADS, MOST_CHANNELS = 16, 48
SHARED_BYTES = 232_448  # of a program on Hopper, at most
_HOPPER = ("H100", "H200", "H800", "H20", "GH200")  # in the names of devices


@dataclasses.dataclass(frozen=True)
class Plan:
    """How the work is cut, with so many bfloat16 parts a number."""

    tokens: int
    heads: int
    dim: int  # of a head
    parts: int

    @property
    def width(self) -> int:
        """Channels of all heads."""
        return self.heads * self.dim

    @property
    def by_head(self) -> bool:
        """Whether warpgroups share queries and divide heads."""
        return self.heads > 4

    @property
    def tiles(self) -> int:
        """Tiles of queries in a program."""
        return 1 if self.by_head else WORKERS

    @property
    def group(self) -> int:
        """Heads of a warpgroup; where they do not come out even, both compute the one in the middle."""
        return -(-self.heads // WORKERS) if self.by_head else self.heads

    @property
    def sweeps(self) -> int:
        """How often the second pass runs."""
        return -(-self.group // 4)

    @property
    def outputs(self) -> int:
        """Heads of a warpgroup whose outputs one sweep computes."""
        return -(-self.group // self.sweeps)

    @property
    def step(self) -> int:
        """Keys whose logits of all heads are in registers together."""
        return KEYS if self.heads <= 8 else KEYS // 2

    @property
    def shift(self) -> int:
        """Most tokens of the image before that are in the first tile."""
        return ALIGNED - math.gcd(self.tokens, ALIGNED)

    @property
    def blocks(self) -> int:
        """Tiles of keys."""
        return -(-(self.tokens + self.shift) // KEYS)

    @property
    def programs(self) -> int:
        """Of an image."""
        return -(-(self.tokens + self.shift) // (ROWS * self.tiles))

    @property
    def rows(self) -> int:
        """Of all of an image's programs."""
        return self.programs * self.tiles * ROWS

    @property
    def staged(self) -> int:
        """Heads of a warpgroup whose outputs are in shared memory together."""
        return self.outputs if self.parts == 1 else 1

    @property
    def slots(self) -> int:
        """Tiles of the ring that fit beside everything else."""
        queries = self.tiles * ROWS * self.width * 2 * self.parts
        outputs = WORKERS * ROWS * self.staged * self.dim * (2 if self.parts == 1 else 4)
        sums = self.tiles * self.heads * ROWS * 4
        small = 6 * 1024  # weights, barriers, alignment
        tile = KEYS * self.width * 2 * self.parts
        return min(6, (SHARED_BYTES - queries - outputs - sums - small) // tile)


class BackwardPlan(Plan):
    """Of the gradient's kernels, whose programs hold two tiles and stream two."""

    @property
    def by_head(self) -> bool:
        """As above; in float32 one tile of queries is all that fits."""
        return self.heads > 4 or self.parts > 1

    @property
    def step(self) -> int:
        """Of logits and gradients of maps."""
        return KEYS // 2

    @property
    def staged(self) -> int:
        """One, since two tiles are held."""
        return 1

    @property
    def statistics(self) -> int:
        """Rows of statistics by head, so many that slots of them are whole multiples of TMA's 128 bytes."""
        return -(-self.heads // 2) * 2

    @property
    def _room(self) -> int:
        """Tiles of the ring that fit beside everything else."""
        held = 2 * self.tiles * ROWS * self.width * 2 * self.parts
        outputs = WORKERS * ROWS * self.dim * (2 if self.parts == 1 else 4)
        statistics = 2 * self.tiles * self.statistics * ROWS * 4
        totals = WORKERS * ROWS * ROWS * 4
        small = 6 * 1024  # weights, barriers, alignment
        tile = KEYS * (self.width * 2 * self.parts + self.statistics * 4)
        return (SHARED_BYTES - held - outputs - statistics - totals - small) // tile

    @property
    def fits(self) -> bool:
        """Whether shared memory has two tiles of the ring."""
        return self._room >= 2

    @property
    def slots(self) -> int:
        """As above, or two where they do not fit."""
        return max(2, min(6, self._room))


def refusal(q: Any, k: Any, v: Any) -> str | None:
    """Why the kernel does not take these (batch, tokens, heads, dim), or this device; None if it does."""
    heads, dim = q.shape[2:]
    dtypes = {x.dtype.name for x in (q, k, v)}
    if len(dtypes) > 1 or dtypes - {"bfloat16", "float32"}:
        return f"it takes bfloat16 or float32, not {' and '.join(sorted(dtypes))}"
    if heads > MOST_HEADS or dim % 16 or dim > MOST_CHANNELS:
        return f"it takes up to {MOST_HEADS} heads of 16, 32 or 48 channels, not {heads} of {dim}"
    if heads > 8 and jax.__version_info__ < (0, 11):
        return f"more than 8 heads, here {heads}, need jax 0.11 or newer, not {jax.__version__}"
    if plan(q).slots < 1:
        return f"{heads} heads in float32 do not fit in shared memory; bfloat16 does"
    name = _device()
    if name is not None and not any(hopper in name for hopper in _HOPPER):
        return f"it is for Hopper GPUs (H100, H200), not for {name}"
    return None


def backward_refusal(q: Any, *, interpret: bool = False) -> str | None:
    """Why the gradient's kernels do not take what `refusal` lets pass; None if they do.

    The interpreter has as much shared memory as is asked for.
    """
    heads = q.shape[2]
    if jax.__version_info__ < (0, 11):
        return f"its kernels need jax 0.11 or newer, not {jax.__version__}"
    if heads > 8:
        return f"its kernels take up to 8 heads, not {heads}"
    if not interpret and not backward_plan(q).fits:
        return f"{heads} heads in float32 do not fit in its kernels' shared memory; bfloat16 does"
    return None


def _device() -> str | None:
    """The name of the GPU that is compiled for; None if there is none to ask."""
    target = getattr(jax.sharding.get_abstract_mesh(), "abstract_device", None)
    if target is None and jax.default_backend() == "gpu":
        target = jax.devices()[0]
    kind = getattr(target, "device_kind", None)
    return kind if kind and kind != "cpu" else None


def plan(q: Any) -> Plan:
    """For queries (batch, tokens, heads, dim), bfloat16 or float32."""
    tokens, heads, dim = q.shape[1:]
    return Plan(tokens, heads, dim, parts=1 if q.dtype.name == "bfloat16" else 3)


def backward_plan(q: Any) -> BackwardPlan:
    """As `plan`, of the gradient's kernels."""
    return BackwardPlan(**dataclasses.asdict(plan(q)))
