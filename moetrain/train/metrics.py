"""Metrics: one line per step in metrics.jsonl, and sinks (Weights & Biases, TensorBoard) that cannot stop training."""

from __future__ import annotations

import json
import logging
import math
import secrets
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol, cast

from torch.profiler import record_function

from moetrain.storage import replace, storage_errors
from moetrain.train.settings import LoggingSection

log = logging.getLogger(__name__)


class Phases:
    """Seconds spent in the named phases of a step, as seen by this rank's main thread; in a trace, ranges ``train.<name>``."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            with record_function(f"train.{name}"):
                yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


class Sink(Protocol):
    """Receives every line of metrics.jsonl as flat numbers."""

    def write(self, step: int, values: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class MetricsFile:
    """metrics.jsonl of a run. Each step has one line: lines after ``resumed_step`` belong to work that was lost and are
    removed when the file is opened."""

    def __init__(self, path: Path, *, resumed_step: int) -> None:
        self.path = path
        with storage_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                keep_until(path, resumed_step)
            self.file = path.open("a", encoding="utf-8")

    def write(self, line: Mapping[str, Any]) -> None:
        """Append one line; floats keep full precision, NaN and infinities (of a skipped step) become null.

        Raises StorageError if the disk refuses it.
        """
        with storage_errors(self.path):
            self.file.write(json.dumps(finite(line), allow_nan=False) + "\n")
            self.file.flush()

    def close(self) -> None:
        try:
            self.file.close()
        except OSError as error:  # what a full disk refused is still buffered; write() has reported it
            log.warning("%s may lack its last line: %s", self.path, error)


def keep_until(path: Path, step: int) -> None:
    """Drop the lines of a metrics file after ``step``, and a last line that was cut short."""
    kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= step]
    replace(path, "".join(line + "\n" for line in kept))


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError):
        return float("inf")


def finite(value: Any) -> Any:
    """The same nested value with null for every number that JSON does not have."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite(entry) for key, entry in value.items()}
    return value


def flatten(line: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """Numbers of a nested line under names joined by slashes; lists and texts are left out."""
    flat: dict[str, float] = {}
    for key, value in line.items():
        if isinstance(value, Mapping):
            flat.update(flatten(value, f"{prefix}{key}/"))
        elif isinstance(value, (int, float)):
            flat[f"{prefix}{key}"] = value
    return flat


class Recorder:
    """Writes lines to the file and to all sinks; a sink that fails is dropped with a warning."""

    def __init__(self, file: MetricsFile, sinks: list[Sink]) -> None:
        self.file = file
        self.sinks = sinks

    def write(self, line: Mapping[str, Any]) -> None:
        self.file.write(line)
        if self.sinks:
            flat = flatten(line)
            self._each(lambda sink: sink.write(line["step"], flat))

    def close(self) -> None:
        self._each(lambda sink: sink.close())
        self.file.close()

    def _each(self, action: Callable[[Sink], None]) -> None:
        for sink in list(self.sinks):
            try:
                action(sink)
            except Exception as error:  # whatever a third-party service does must not end the run
                log.warning("%s stopped receiving metrics: %s", type(sink).__name__, error)
                self.sinks.remove(sink)


def open_sinks(settings: LoggingSection, run_dir: Path, config: Mapping[str, Any]) -> list[Sink]:
    """The sinks that the settings ask for; one that cannot start is left out with a warning."""
    wanted: list[Callable[[], Sink]] = []
    if settings.wandb != "off":
        wanted.append(lambda: WandbSink(settings, run_dir, config))
    if settings.tensorboard:
        wanted.append(lambda: TensorBoardSink(run_dir / "tensorboard"))
    sinks = []
    for start in wanted:
        try:
            sinks.append(start())
        except Exception as error:  # see Recorder._each
            log.warning("a metrics sink could not start and is left out: %s", error)
    return sinks


class WandbSink:
    """Weights & Biases. The run's id lives in the run folder, so a resumed run goes on under the same id."""

    def __init__(self, settings: LoggingSection, run_dir: Path, config: Mapping[str, Any]) -> None:
        import wandb

        id_file = run_dir / "wandb_id"
        if not id_file.exists():
            id_file.write_text(secrets.token_hex(4))
        self.run = wandb.init(
            project=settings.wandb_project,
            name=run_dir.name,
            id=id_file.read_text(),
            resume="allow",
            mode=cast(Literal["offline", "online"], settings.wandb),
            dir=str(run_dir),
            config=dict(config),
            settings=wandb.Settings(init_timeout=60, console="off", silent=True),
        )
        # after falling back to an older checkpoint steps repeat, which wandb's own counter refuses
        self.run.define_metric("*", step_metric="step")

    def write(self, step: int, values: Mapping[str, float]) -> None:
        self.run.log(dict(values))

    def close(self) -> None:
        self.run.finish()


class TensorBoardSink:
    """TensorBoard event files."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(folder))

    def write(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()
