"""The structured log: one event name and key/value pairs per line, to standard error, masked.

``configure`` once per process, then ``get_log("receiver").warning("delivery_refused", reason="signature_wrong")``.
Levels by data loss: WARNING means that nothing was lost, ERROR that a person must act.

Lines of other libraries (Faust, uvicorn, librdkafka, asyncio) come through the same masking. Their texts may quote what
they were handling, so only their template and numbers are shown, except for the few loggers known to speak of
connections only.
"""

from __future__ import annotations

import logging
import re
import sys
import threading
from collections.abc import MutableMapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, Literal, TextIO

import orjson
import structlog

from telemetry.masking import MASKED, describe_exception, mask_members, mask_text, mask_value

if TYPE_CHECKING:
    from types import TracebackType

    from structlog.typing import FilteringBoundLogger, WrappedLogger

Format = Literal["json", "console"]
Event = MutableMapping[str, Any]

UNNAMED = "unnamed_event"
"""Stands for an event whose name is not a name: a sentence may hold payload."""

_EVENT_NAME = re.compile(r"[a-z][a-z0-9_.]{0,79}\Z")
_LOGGERS_OF_CONNECTIONS: Final = ("kafka", "uvicorn.error", "redis")
"""Their messages name hosts, ports and protocol errors, never records."""
_QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"|\d{6,}|(?<==)\S+")


def configure(
    level: str = "info",
    format: Format = "json",  # noqa: A002 - the setting is called so
    *,
    masking: bool = True,
    stream: TextIO | None = None,
) -> None:
    """Set up the log of this process; a second call replaces the first.

    It owns the root logger: start libraries without a log configuration of their own (uvicorn: ``log_config=None``).
    ``level`` is ``debug``, ``info``, ``warning`` or ``error``. ``masking=False`` is for tests only: it shows what a
    search for planted data must then find. Uncaught exceptions are logged by type and place, without their text.
    """
    number = logging.getLevelNamesMapping()[level.upper()]
    renderer = _Renderer(format, stream, masking=masking)
    structlog.configure(
        processors=[structlog.contextvars.merge_contextvars, structlog.processors.add_log_level, renderer],
        wrapper_class=structlog.make_filtering_bound_logger(number),
        logger_factory=lambda *_: renderer,
        cache_logger_on_first_use=False,  # else a logger kept in a module would outlive a second call
    )
    root = logging.getLogger()
    root.handlers[:] = [_Bridge(renderer)]  # any other handler would write beside the masking
    # Libraries are asked for warnings only, unless someone debugs: their chatter is not about this deployment.
    root.setLevel(number if number <= logging.DEBUG else max(number, logging.WARNING))
    logging.captureWarnings(capture=True)
    sys.excepthook = _log_uncaught
    threading.excepthook = _log_uncaught_in_thread


def get_log(component: str, **context: object) -> FilteringBoundLogger:
    """A logger that names its component on every line; ``context`` is added too."""
    logger: FilteringBoundLogger = structlog.get_logger(component=component, **context)
    return logger


class _Renderer:
    """Last processor and sink: masks, renders, writes one line. Never raises: a full pipe must not stop money."""

    def __init__(self, form: Format, stream: TextIO | None, *, masking: bool) -> None:
        self._stream = stream
        self._masking = masking
        self._console = (
            structlog.dev.ConsoleRenderer(colors=(stream or sys.stderr).isatty(), pad_event_to=0)
            if form == "console"
            else None
        )
        self._lock = threading.Lock()

    def __call__(self, logger: WrappedLogger, method: str, event: Event) -> str:
        # The form of a structlog processor: what it returns is handed to `msg`, `info`, ... below.
        del logger, method
        return self.render(event)

    def render(self, event: Event) -> str:
        """The line for an event."""
        error = _take_exception(event)
        name = str(event.pop("event", UNNAMED))
        level = str(event.pop("level", "info"))
        members: dict[str, Any] = dict(event)
        if self._masking:
            if not _EVENT_NAME.match(name):
                name = UNNAMED
            members = mask_members(members)
            if error is not None:
                members |= describe_exception(error)
        elif error is not None:
            members |= {"error": type(error).__name__, "text": str(error)}
        now = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        line = {"timestamp": now, "level": level, "event": name, **members}
        if self._console is not None:
            return str(self._console(None, level, line))
        return orjson.dumps(line, default=_show_unmasked, option=orjson.OPT_NON_STR_KEYS).decode()

    def write(self, line: str) -> None:
        """Write one line to standard error as it is now."""
        stream = self._stream or sys.stderr
        try:
            with self._lock:
                stream.write(line + "\n")
                stream.flush()
        except (OSError, ValueError):  # closed or broken pipe: there is nowhere left to say it
            return

    debug = info = warning = warn = error = critical = fatal = exception = msg = log = write


class _Bridge(logging.Handler):
    """Brings lines of the standard library's logging into the structured log."""

    def __init__(self, renderer: _Renderer) -> None:
        super().__init__()
        self._renderer = renderer

    def emit(self, record: logging.LogRecord) -> None:
        """Render one record; what cannot be rendered is counted as a line of its own, by type."""
        try:
            self._renderer.write(self._renderer.render(self._translate(record)))
        except Exception as error:  # noqa: BLE001 - a log call must never raise into the caller
            self._renderer.write(
                self._renderer.render({"event": "log_line_unreadable", "reason": type(error).__name__})
            )

    def _translate(self, record: logging.LogRecord) -> Event:
        event: Event = {"event": "library_message", "level": record.levelname.lower(), "component": record.name}
        if not self._renderer._masking:  # noqa: SLF001 - the two are one part
            event["text"] = record.getMessage()
        elif record.name.startswith(_LOGGERS_OF_CONNECTIONS):
            event["text"] = mask_text(_first_line(record.getMessage()))
        else:
            event["text"] = mask_text(_QUOTED.sub(MASKED, _first_line(str(record.msg))))
            arguments = record.args if isinstance(record.args, tuple) else ()
            shown = [
                mask_value(argument) for argument in arguments if isinstance(argument, int | float | BaseException)
            ]
            if shown:
                event["arguments"] = shown
        if record.exc_info and record.exc_info[1] is not None:
            event["exc_info"] = record.exc_info[1]
        return event


def _take_exception(event: Event) -> BaseException | None:
    """Take ``exc_info`` (an exception, a triple, or True for the current one) out of the event."""
    given = event.pop("exc_info", None)
    if given is True:
        given = sys.exc_info()
    if isinstance(given, tuple):
        given = given[1]
    return given if isinstance(given, BaseException) else None


def _first_line(text: str) -> str:
    lines = text.splitlines()
    return lines[0] if lines else ""


def _show_unmasked(value: object) -> str:
    """Only reached with masking off: bytes as text, so that a search for planted data finds them."""
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def _log_uncaught(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if issubclass(kind, KeyboardInterrupt):
        return
    get_log("process").critical("uncaught_exception", exc_info=error.with_traceback(trace))


def _log_uncaught_in_thread(arguments: threading.ExceptHookArgs) -> None:
    if arguments.exc_value is not None and not isinstance(arguments.exc_value, SystemExit):
        get_log("process").critical("uncaught_exception", exc_info=arguments.exc_value)
