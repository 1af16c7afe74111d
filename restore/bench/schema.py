"""The keys of a benchmark's configuration: OmegaConf reads names, types and defaults from these classes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from restore.backbones.text_to_image import PipelineOptions
from restore.metrics import table


@dataclass
class Data:
    """See datasets.load_dataset."""

    name: str = "folder"
    folder: str | None = None
    names: Any = None
    split: str | None = None
    size: int | None = None
    every: int = 1
    limit: int | None = None
    stretch: bool = False


@dataclass
class Task:
    """operator: a mapping for build_operator, or a name of configs/task; per_image: with a random mask or kernel for
    every image. solve_at, resample: see images/resampling. backbone, model_options: in place of the benchmark's.
    labels: a class by name or index; for generation also a list to cycle through, or uniform. prompts: a file with one
    a line, or the name of one in data/prompts; prompt_limit: the first ones, so many; template: around each, with {}
    for it (a style); count: images to generate."""

    title: str | None = None
    operator: Any = field(default_factory=dict)
    per_image: bool = False
    solve_at: int | None = None
    resample: str = "bicubic"
    backbone: str | None = None
    model_options: dict[str, Any] = field(default_factory=dict)
    labels: Any = None
    prompts: str | None = None
    prompt_limit: int | None = None
    template: str | None = None
    negative_prompt: str = ""
    count: int | None = None
    note: str | None = None


@dataclass
class Entry:
    """The keys of a restore.method.Method. per_task: changes by task. sweep: dotted key to a list of values, each a
    method of its own. only: the tasks it runs on."""

    sampler: str = MISSING
    title: str | None = None
    steps: Any = None
    guidance: Any = None
    parameters: dict[str, Any] = field(default_factory=dict)
    only: list[str] | None = None
    per_task: dict[str, Any] = field(default_factory=dict)
    sweep: dict[str, Any] = field(default_factory=dict)
    note: str | None = None


@dataclass
class Metrics(table.MetricOptions):
    """names: of metrics.table, or "module:function". reference, full_reference: folders to compare sets with.
    group_by_prompt: IS and pairs within each prompt, of its first `pairs` images."""

    names: list[str] = field(default_factory=lambda: ["psnr", "ssim", "residual_ratio"])
    reference: str | None = None
    full_reference: str | None = None
    group_by_prompt: bool = False
    pairs: int = 100


@dataclass
class Worker:
    """A worker's share of a cluster."""

    cpus: float = 1
    gpus: float | None = None


@dataclass
class Published:
    """The paper's own numbers: values[method][task][metric]; titles of methods that are not run."""

    source: str | None = None
    titles: dict[str, Any] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    note: str | None = None


@dataclass
class Report:
    """pictures: images of a picture grid. layout: of the grid: "columns", one for each method, of a long sweep three;
    "rows", one for each method, all of them, as papers print samples. columns: metrics; curve: over sweeps, the first
    metric across, others up."""

    pictures: int = 6
    layout: str = "columns"
    columns: list[str] | None = None
    curve: list[str] | None = None


@dataclass
class Benchmark:
    """The whole of a file of configs/benchmark. model_options: keywords of restore.load for the backbone, such as
    heads, schedule and per_channel. compile: a mode of torch.compile ("default", "reduce-overhead", ...), see
    restore.compile_networks. batch: images computed together, or "auto": what memory allows, decided once for a
    run."""

    name: str = MISSING
    backbone: str = MISSING
    tasks: dict[str, Task] = field(default_factory=dict)
    methods: dict[str, Entry] = field(default_factory=dict)
    title: str | None = None
    source: str | None = None
    notes: list[str] = field(default_factory=list)
    kind: str = "restoration"
    out: str | None = None
    engine: str = "local"
    workers: int | None = None
    worker: Worker = field(default_factory=Worker)
    device: str = "auto"
    threads: int | None = None
    precision: str = "fp32"
    model_options: dict[str, Any] = field(default_factory=dict)
    checkpointing: bool = False
    compile: str | None = None
    offline: bool = False
    seed: int = 0
    samples: int = 1
    batch: Any = 1
    pipeline: PipelineOptions = field(default_factory=PipelineOptions)
    data: Data = field(default_factory=Data)
    metrics: Metrics = field(default_factory=Metrics)
    published: Published = field(default_factory=Published)
    report: Report = field(default_factory=Report)
