"""A checkpoint of 1.6 TB on 100 workers, planned for real and timed on paper; docs/scale.md holds what this prints.

    python benchmarks/checkpoints/arithmetic.py

Tasks, parts, requests, bytes and memory are those of the product's own planner, which needs names and shapes only. The
rest is division: what is assumed stands in the constants below and in the first table.
"""

import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))

from markdown_table import table

from fleetpress.compression.scheme import SCHEMES
from fleetpress.compression.treatment import KEPT, PACK, Treatment
from fleetpress.jobs.checkpoint.forecast import Forecast, forecast
from fleetpress.jobs.checkpoint.layout import BLOCK_BYTES, Item, PlannedShard, plan_shards
from fleetpress.jobs.checkpoint.tasks import checkpoint_tasks
from fleetpress.jobs.tasks import to_json

# The model: a mixture of experts, in files of 5 GB.
LAYERS, EXPERTS, HIDDEN, EXPERT_WIDTH = 60, 296, 7168, 2048
HEADS, KV_HEADS, HEAD_WIDTH, VOCABULARY = 128, 8, 128, 150_000
SOURCE_FILE_BYTES = 5_000_000_000

# The cluster, and the network of one worker.
WORKERS = 100
MEMORY_BYTES = 2 << 30
READING, SENDING = 4, 2  # requests of one worker under way: storage/streams.py
CONNECTION_MB = 100  # MB/s of one connection to S3
LATENCY_SECONDS = 0.02  # of a request
LOOK_UPS = 16  # records that a resume reads at once: jobs/driver/run.py
UNHIDDEN = 4  # requests of a task that nothing overlaps: two records, the first block, the last part
CPU_SECONDS_PER_GB = 2.5  # of source, imports included: the goal that chain.py measures
HASH_MB = 1550  # MB/s of sha256 and crc32 together on one core, measured

# Assumed list prices in dollars, AWS us-east-1, as known in 2025: look them up before relying on them.
PUT_DOLLARS, GET_DOLLARS = 0.005 / 1000, 0.0004 / 1000
CORE_HOUR_DOLLARS = 0.05
EGRESS_DOLLARS = {"to another region": 0.02, "through a NAT gateway": 0.045, "out to the internet": 0.09}
START_SECONDS = 300  # of every node that is paid for before and after the work

# S3's limits: requests a second below one prefix before it has split any, parts of an upload, bytes of a part.
PUTS_PER_SECOND, GETS_PER_SECOND, MOST_PARTS = 3500, 5500, 10_000


@dataclass(frozen=True, kw_only=True)
class Work:
    """What the plan asks for."""

    tensors: int
    source_files: int
    shards: Sequence[PlannedShard]
    forecast: Forecast
    description_bytes: int

    @property
    def records(self) -> int:
        """One a task: those that convert, one a shard that ends it, one that opens uploads, one that assembles."""
        return self.forecast.tasks + len(self.shards) + 2

    @property
    def gets(self) -> int:
        """Blocks of the source, parts read back, crumbs, headers, and records, which the next task reads."""
        records = 2 * self.forecast.tasks + 2 * len(self.shards)
        headers = 2 * self.source_files + len(self.shards)
        return self.forecast.source_ranges + self.forecast.uploads + self.forecast.crumbs + headers + records

    @property
    def puts(self) -> int:
        """Parts, records, crumbs; each upload is created and completed."""
        return self.forecast.uploads + self.records + self.forecast.crumbs + 2 * len(self.shards)


def tensors() -> Iterator[tuple[str, tuple[int, ...], bool]]:
    """Name, shape and whether it is quantized, in the order of the files."""
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN), False
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}."
        for projection, rows, columns in (
            ("q_proj", HEADS * HEAD_WIDTH, HIDDEN),
            ("k_proj", KV_HEADS * HEAD_WIDTH, HIDDEN),
            ("v_proj", KV_HEADS * HEAD_WIDTH, HIDDEN),
            ("o_proj", HIDDEN, HEADS * HEAD_WIDTH),
        ):
            yield f"{prefix}self_attn.{projection}.weight", (rows, columns), True
        yield f"{prefix}input_layernorm.weight", (HIDDEN,), False
        yield f"{prefix}mlp.gate.weight", (EXPERTS, HIDDEN), False
        for expert in range(EXPERTS):
            yield f"{prefix}mlp.experts.{expert}.gate_proj.weight", (EXPERT_WIDTH, HIDDEN), True
            yield f"{prefix}mlp.experts.{expert}.up_proj.weight", (EXPERT_WIDTH, HIDDEN), True
            yield f"{prefix}mlp.experts.{expert}.down_proj.weight", (HIDDEN, EXPERT_WIDTH), True
        yield f"{prefix}post_attention_layernorm.weight", (HIDDEN,), False
    yield "model.norm.weight", (HIDDEN,), False
    yield "lm_head.weight", (VOCABULARY, HIDDEN), False


def plan() -> Work:
    """The plan of the product for these tensors, W4A16 in groups of 128."""
    quantized = Treatment(scheme=SCHEMES["W4A16"], layout=PACK)
    items: list[Item] = []
    file, offset = 0, 0
    for name, shape, is_quantized in tensors():
        size = 2 * math.prod(shape)
        if offset + size > SOURCE_FILE_BYTES:
            file, offset = file + 1, 0
        items.append(
            Item(
                name=name,
                path=f"model-{file + 1:05}.safetensors",
                etag="0" * 32,
                offset_bytes=offset,
                size_bytes=size,
                dtype="BF16",
                shape=shape,
                treatment=quantized if is_quantized else KEPT,
                layer=name.removesuffix(".weight"),
                check=True,
            )
        )
        offset += size
    shards = plan_shards(items)
    place = {
        "output": "s3://bucket/output",
        "root": "s3://bucket/models/large",
        "uri": "s3://bucket/models/large",
    }
    described, _ = checkpoint_tasks(
        shards, name="large", artifact="0" * 64, place=place, memory_bytes=MEMORY_BYTES
    )
    return Work(
        tensors=len(items),
        source_files=file + 1,
        shards=shards,
        forecast=forecast(shards, MEMORY_BYTES),
        description_bytes=sum(len(json.dumps(to_json(task))) for task in described),
    )


@dataclass(frozen=True, kw_only=True)
class Timing:
    """Seconds of a run on one kind of network, and what it asks of S3."""

    network: str
    reading_mb: float
    bound: str
    work_seconds: float
    last_shard_seconds: float

    @property
    def seconds(self) -> float:
        """In all."""
        return self.work_seconds + self.last_shard_seconds


def timing(work: Work, network: str, line_mb: float, connection_mb: float) -> Timing:
    """Workers read, compute and write at the same time: the slowest of the three sets the pace."""
    reading, sending = min(READING * connection_mb, line_mb), min(SENDING * connection_mb, line_mb)
    read, written = work.forecast.read_bytes / 1e6 / WORKERS, work.forecast.written_bytes / 1e6 / WORKERS
    paces = {
        "reading": read / reading,
        "writing": written / sending,
        "CPU": read / 1000 * CPU_SECONDS_PER_GB,
    }
    bound = max(paces, key=lambda name: paces[name])
    waiting = work.forecast.tasks / WORKERS * UNHIDDEN * LATENCY_SECONDS
    proof = min(reading, HASH_MB)
    largest = max(work.shards, key=lambda shard: shard.size_bytes)
    return Timing(
        network=network,
        reading_mb=read / paces[bound],
        bound=bound,
        work_seconds=paces[bound] + waiting + written / proof,
        last_shard_seconds=largest.size_bytes / 1e6 / proof + len(largest.tasks) * LATENCY_SECONDS,
    )


def print_plan(work: Work) -> None:
    """What the planner says."""
    cost = work.forecast
    read, written = cost.read_bytes / 1e9, cost.written_bytes / 1e9
    parts = [size for shard in work.shards for task in shard.tasks for size in task.parts]
    most = max(sum(len(task.parts) for task in shard.tasks) + len(shard.tail_parts) for shard in work.shards)
    described = work.records - 1  # assembling is not told in full here
    table(
        ("planned", "number", "GB"),
        (
            (f"tensors, in {work.source_files} source files", f"{work.tensors:,}", f"{read:,.0f}"),
            ("output shards", f"{len(work.shards):,}", f"{written:,.0f}"),
            ("tasks that convert, of about 128 MiB of source", f"{cost.tasks:,}", ""),
            (
                f"GETs of source, of {BLOCK_BYTES >> 20} MiB at most",
                f"{cost.source_ranges:,}",
                f"{read:,.0f}",
            ),
            (_parts(parts), f"{cost.uploads:,}", f"{written:,.0f}"),
            (f"parts of one upload at most (S3 allows {MOST_PARTS:,})", f"{most:,}", ""),
            ("GETs that read the parts back", f"{cost.uploads:,}", f"{cost.read_back_bytes / 1e9:,.0f}"),
            ("records", f"{work.records:,}", ""),
            ("GETs in all", f"{work.gets:,}", f"{read + cost.read_back_bytes / 1e9:,.0f}"),
            ("PUTs and POSTs in all", f"{work.puts:,}", f"{written:,.0f}"),
            (
                "task descriptions in the driver, as JSON",
                f"{described:,}",
                f"{work.description_bytes / 1e9:.2f}",
            ),
            ("memory of a task at most", "", f"{cost.memory_bytes / 1e9:.2f}"),
        ),
    )


def _parts(sizes: Sequence[int]) -> str:
    return f"parts, of {min(sizes) / 2**20:.1f} to {max(sizes) / 2**20:.1f} MiB"


def print_times(work: Work, timings: Sequence[Timing]) -> None:
    """How long it takes, and how often S3 is asked."""
    table(
        ("one worker's network", "source MB/s", "bound by", "work s", "last shard s", "s", "GET/s", "PUT/s"),
        [
            (
                one.network,
                f"{one.reading_mb:.0f}",
                one.bound,
                f"{one.work_seconds:.0f}",
                f"{one.last_shard_seconds:.0f}",
                f"{one.seconds:.0f}",
                f"{work.gets / one.work_seconds:,.0f}",
                f"{work.puts / one.work_seconds:,.0f}",
            )
            for one in timings
        ],
    )


def print_costs(work: Work, timings: Sequence[Timing]) -> None:
    """What is paid for."""
    rows = [("requests", f"{work.puts * PUT_DOLLARS + work.gets * GET_DOLLARS:.2f}")]
    for one in timings[:2]:
        held = one.seconds + START_SECONDS
        rows.append(
            (
                f"{WORKERS} cores for {one.seconds:.0f} s ({one.network}) and {START_SECONDS} s to come and go",
                f"{WORKERS * held / 3600 * CORE_HOUR_DOLLARS:.2f}",
            )
        )
    for way, price in EGRESS_DOLLARS.items():
        rows.append((f"the source {way}", f"{work.forecast.read_bytes / 1e9 * price:,.0f}"))
    table(("cost", "$"), rows)


def main() -> None:
    """Print the tables."""
    work = plan()
    timings = [
        timing(work, "1 Gbit/s", 125, CONNECTION_MB),
        timing(work, f"10 Gbit/s, {CONNECTION_MB} MB/s a connection", 1250, CONNECTION_MB),
        timing(work, "10 Gbit/s, a connection as fast as that", 1250, 1250),
    ]
    print_plan(work)
    print()
    print_times(work, timings)
    print()
    print_costs(work, timings)
    print()
    seconds = min(one.work_seconds for one in timings)
    room = min(GETS_PER_SECOND / work.gets, PUTS_PER_SECOND / work.puts) * seconds
    print(
        f"{WORKERS * room:.0f} workers would ask as often as S3 answers below a prefix it has not split yet"
        f" ({GETS_PER_SECOND:,} GET/s, {PUTS_PER_SECOND:,} PUT/s)."
    )
    looking = work.records * LATENCY_SECONDS
    print(
        f"A resume that finds every record reads them in {looking / LOOK_UPS:.0f} s, {LOOK_UPS} at a time"
        f" ({looking:.0f} s one after the other)."
    )


if __name__ == "__main__":
    main()
