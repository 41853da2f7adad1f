"""A run's numbers as TensorBoard reads them."""

import contextlib
import itertools
import logging
import os
import pathlib
import tempfile
import time
from collections.abc import Iterator
from typing import Any

from etils import epath
from ml_collections import ConfigDict
from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData, SessionStartInfo
from tensorboardX.proto.summary_pb2 import Summary, SummaryMetadata

from gnp import config as gnp_config
from gnp.files import is_remote, write_atomically

_log = logging.getLogger(__name__)

_FLUSH_SECONDS = 10.0  # between two writes to the disk
_REMOTE_SECONDS = 30.0  # between two writes of a file that cannot be appended to


class Events:
    """TensorBoard events; one that cannot be written ends them, with a warning.

    The fields of the configuration are hyperparameters of TensorBoard's HParams, where the runs of
    a sweep are the rows of a table.

    They are written at once, and not by tensorboardX's `SummaryWriter`: a full disk ends the thread
    that it writes in, and then a call blocks for ever when its queue is full.

    Args:
      workdir: where they are written.
      purge_step: TensorBoard forgets what earlier files say of this step and later ones.
      config: of the run; None for none.
    """

    _numbers = itertools.count()

    def __init__(
        self, workdir: epath.Path, *, purge_step: int, config: ConfigDict | None = None
    ) -> None:
        self._workdir = workdir
        self._writer: EventsWriter | None = None
        self._copied: tempfile.TemporaryDirectory[str] | None = None  # to where nothing is appended
        self._flush_time = time.monotonic()
        with self._ended_by_an_error():
            if is_remote(workdir):
                self._copied = tempfile.TemporaryDirectory(prefix="gnp-events-")
            self._writer = EventsWriter(
                os.path.join(self._copied.name if self._copied else workdir, "events"),
                f".{os.getpid()}.{next(self._numbers)}",
            )
            start = SessionLog(status=SessionLog.START)
            self._writer.write_event(
                Event(step=purge_step, wall_time=time.time(), session_log=start)
            )
            if config is not None:
                self._writer.write_event(
                    Event(wall_time=time.time(), summary=hyperparameters(config))
                )

    def write(self, row: dict[str, Any]) -> None:
        """Writes a row's numbers."""
        if self._writer is None:
            return
        values = [
            Summary.Value(tag=f"{row['split']}/{name}", simple_value=value)
            for name, value in row.items()
            if isinstance(value, float) and name != "wall_time"
        ]
        with self._ended_by_an_error():
            self._writer.write_event(
                Event(step=row["step"], wall_time=time.time(), summary=Summary(value=values))
            )
        every = _REMOTE_SECONDS if self._copied else _FLUSH_SECONDS
        if time.monotonic() - self._flush_time >= every:
            self.flush()

    def flush(self) -> None:
        """Returns when the disk has all events."""
        if self._writer is None:
            return
        self._flush_time = time.monotonic()
        with self._ended_by_an_error():
            self._writer.flush()
            if self._copied:
                for path in pathlib.Path(self._copied.name).iterdir():
                    write_atomically(self._workdir / path.name, path.read_bytes())

    def close(self) -> None:
        """Writes what is buffered."""
        self.flush()
        self._end()

    @contextlib.contextmanager
    def _ended_by_an_error(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            _log.warning(
                "cannot write TensorBoard's events to %s (%s); the run goes on without them",
                *(self._workdir, error.strerror or error),
            )
            self._end()

    def _end(self) -> None:
        writer, self._writer = self._writer, None
        with contextlib.suppress(OSError):
            if writer is not None:
                writer.close()
            if self._copied is not None:
                self._copied.cleanup()


def hyperparameters(config: ConfigDict) -> Summary:
    """The fields of a configuration by their dotted names, as TensorBoard's HParams reads them.

    What has no field of its own kind there, as a list, is its text; None is left out.
    """
    session = SessionStartInfo()
    for name, value in gnp_config.flat(config).items():
        if isinstance(value, bool):
            session.hparams[name].bool_value = value
        elif isinstance(value, int | float):
            session.hparams[name].number_value = value
        elif value is not None:
            session.hparams[name].string_value = str(value)
    content = HParamsPluginData(session_start_info=session).SerializeToString()
    plugin = SummaryMetadata.PluginData(plugin_name="hparams", content=content)
    tag = "_hparams_/session_start_info"
    return Summary(value=[Summary.Value(tag=tag, metadata=SummaryMetadata(plugin_data=plugin))])
