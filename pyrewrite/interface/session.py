"""One generator, one document, one worker thread: the interface without a transport.

Hosts hand in messages and get messages back through a callback; what they say is in `actions` and `state`. Only the
worker thread touches the model. A long piece of work (a solve, statistics, a search) calls `breathe` between its steps:
there the worker answers what has come in meanwhile, so that painting and pictures do not wait for it.
"""

from __future__ import annotations

import atexit
import collections
import logging
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..edit import Settings
from ..generators import Generator
from . import actions, jobs, state
from .document import Document, History
from .fields import NotYet
from .live import Live
from .model import JOB_BATCH, STATISTICS_BATCH, Model

Callback = Callable[[dict[str, Any], list[bytes]], object]
Reply = tuple[dict[str, Any], list[bytes]]

PROGRESS_SECONDS = 0.15  # between two progress messages
BREATH_SECONDS = 0.3  # a long job is kept waiting so long at most, by one breath
READ_ONLY = ("hint", "snapshot")  # jobs that need no full statistics and leave document and weights alone
FIRST_PICTURES = 32  # of the strip, drawn before anybody asks: a browser takes its time to open
AHEAD = 8  # of them at once: a message waits so long at most
MAX_WAITING = 2000  # messages of one client that are not answered yet
MAX_WAITING_BYTES = 256 << 20
CLOSED = "the session is closed"
MERGE_SECONDS = 1.5  # changes of one slider that follow each other as fast are one step of undo

_log = logging.getLogger(__name__)


class Cancelled(Exception):
    """Ends a job between two of its steps."""


@dataclass(eq=False)
class Client:
    """One connected front end; a handle for hosts."""

    callback: Callback
    number: int
    waiting: int = 0  # messages that are not answered, and their bytes
    waiting_bytes: int = 0


@dataclass(eq=False)
class Job:
    """Work that takes seconds. run: called in the worker, returns the reply."""

    kind: str
    label: str
    run: Callable[[Job], dict[str, Any] | Reply]
    client: Client
    id: Any
    steps: int = 0
    step: int = 0
    loss: float | None = None
    cancelled: bool = False
    started: bool = False

    def progress(self) -> dict[str, Any]:
        return {"kind": self.kind, "label": self.label, "step": self.step, "steps": self.steps, "loss": self.loss}


@dataclass
class Collecting:
    """Statistics that are being collected."""

    layer: str
    done: int = 0
    of: int = 0


@dataclass(eq=False)
class Incoming:
    client: Client
    message: dict[str, Any]
    buffers: list[bytes] = field(default_factory=list)
    parts: dict[Any, Any] = field(default_factory=dict)  # of the answer to a long read, see NotYet

    @property
    def size(self) -> int:
        return sum(map(len, self.buffers))


class Session:
    """The interface of one generator; see the module.

    generator: the session applies its edits to it and takes them off again in `close`. layer: the first layer to edit
    (default: one that usually fits). samples, seed: of the statistics and the numbered pictures. folder: where named
    edits are saved and found, made when the first one is. cache_dir: of the statistics, as in `Rewriter`.
    name: of the generator, to be shown. strip: the first numbers of the picture strip.
    """

    def __init__(
        self,
        generator: Generator,
        *,
        layer: str | None = None,
        samples: int = 1000,
        seed: int = 1,
        folder: str | Path = "pyrewrite-edits",
        cache_dir: str | Path | bool | None = None,
        name: str | None = None,
        strip: str = "0-31",
    ) -> None:
        self.model = Model(generator, samples, seed, cache_dir)
        self.folder = Path(folder)
        self.name = name or (generator.path.name if generator.path else generator.family)
        settings = Settings(samples=samples, seed=seed, truncation=generator.truncation)
        first = generator.find_layer(layer).name if layer else state.usual_layer(generator)
        numbers, _ = actions.strip_numbers(strip, samples, {})
        self.history = History(Document(first, settings, strip=strip, numbers=numbers))
        self.live = Live(self.model)
        self.shown = "edited"
        self.job: Job | None = None
        self.collecting: Collecting | None = None
        self.scans: dict[Any, Any] = {}  # of `actions.scan`: how one direction fires on every picture
        self.hints: dict[Any, list[dict[str, Any]]] = {}  # of `jobs.hint`, by what they depend on
        self.next_edit = 1
        self._ahead = list(numbers[:FIRST_PICTURES])
        self._failed_statistics: dict[str, str] = {}
        self._unwanted: str | None = None  # statistics that were cancelled, until the document changes
        self._last_merge = 0.0
        self._last_progress = 0.0
        self._revision = 0
        self._dirty = True
        self._closed = False
        self._busy = False
        self._wake = threading.Condition()
        self._messages: collections.deque[Incoming] = collections.deque()
        self._reads: collections.deque[Incoming] = collections.deque()
        self._clients: list[Client] = []
        self._numbers = 0
        self._sending = threading.RLock()
        self._state: dict[str, Any] = {}
        self._previews: dict[str, Reply] = {}  # kind -> the newest
        self._push_state()
        atexit.register(_close, weakref.ref(self))
        self._thread = threading.Thread(target=self._work, name="pyrewrite-session", daemon=True)
        self._thread.start()

    # -- for hosts, from any thread ----------------------------------------------------------------------------------

    def connect(self, callback: Callback) -> Client:
        """Add a front end. callback(message, buffers) is called from any thread, the state first."""
        with self._sending:
            self._numbers += 1
            client = Client(callback, self._numbers)
            self._clients.append(client)
            self._send(client, self._state)
        return client

    def receive(self, client: Client, message: dict[str, Any], buffers: Sequence[bytes] = ()) -> None:
        """Take in a message of a client; the answer comes through its callback. Returns at once and never raises."""
        incoming = Incoming(client, message, [bytes(b) for b in buffers])
        with self._wake:
            refused = self._refusal(incoming)
            if refused is None:
                client.waiting += 1
                client.waiting_bytes += incoming.size
                read = isinstance(message, dict) and message.get("type") == "get"
                (self._reads if read else self._messages).append(incoming)
                self._wake.notify_all()
        if refused is not None:
            self._refuse(incoming, refused)

    def _refusal(self, incoming: Incoming) -> str | None:
        if self._closed:
            return CLOSED
        if incoming.client.waiting >= MAX_WAITING:
            return f"{MAX_WAITING} messages are waiting already: expected fewer at a time"
        if incoming.client.waiting and incoming.client.waiting_bytes + incoming.size > MAX_WAITING_BYTES:
            return f"{MAX_WAITING_BYTES} bytes are waiting already: expected fewer at a time"
        return None

    def _refuse(self, incoming: Incoming, text: str) -> None:
        message = incoming.message if isinstance(incoming.message, dict) else {}
        self._reply_error(incoming, message.get("id"), message.get("action") or message.get("what"), ValueError(text))

    def disconnect(self, client: Client) -> None:
        """Forget a front end. The document and a running job live on."""
        with self._sending:
            if client in self._clients:
                self._clients.remove(client)
        with self._wake:
            self._reads = collections.deque(i for i in self._reads if i.client is not client)

    def settle(self, timeout: float = 60.0) -> bool:
        """Wait until nothing is left to do: no message, job, preview or statistics. False after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        with self._wake:
            while self._busy or self._has_work():
                left = deadline - time.monotonic()
                if left <= 0 or not self._wake.wait(left):
                    return not (self._busy or self._has_work())
        return True

    def close(self) -> None:
        """End the worker, cancelling what it does, and take the session's edits off the generator."""
        with self._wake:
            self._closed = True
            self._wake.notify_all()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    # -- sending -----------------------------------------------------------------------------------------------------

    def _send(self, client: Client, message: dict[str, Any], buffers: Sequence[bytes] = ()) -> None:
        try:
            client.callback(message, list(buffers))
        except Exception:  # a broken connection is the host's affair and not the session's end
            _log.exception("the callback of client %d failed: it is disconnected", client.number)
            self.disconnect(client)

    def broadcast(self, message: dict[str, Any], buffers: Sequence[bytes] = ()) -> None:
        with self._sending:
            for client in list(self._clients):
                self._send(client, message, buffers)

    def _reply(self, incoming: Incoming | Job, message: dict[str, Any], buffers: Sequence[bytes] = ()) -> None:
        with self._sending:
            if incoming.client in self._clients:
                self._send(incoming.client, message, buffers)

    def notice(self, level: str, message: str) -> None:
        """Tell every front end: level "info", "warning" or "error"."""
        self.broadcast({"type": "notice", "level": level, "message": message})

    def send_state(self, client: Client) -> None:
        """The state and the present previews to one front end that asks for them."""
        if self._dirty:
            self._push_state()
        with self._sending:
            if client in self._clients:
                self._send(client, self._state)
                for message, buffers in self._previews.values():  # those that a page missed while it was loading
                    if message["key"] == self.live.key:
                        self._send(client, message, buffers)

    def _push_state(self) -> None:
        self._revision += 1
        self._dirty = False
        built = {"type": "state", "revision": self._revision, **state.of(self)}
        with self._sending:
            self._state = built
            self.broadcast(built)

    @property
    def revision(self) -> int:
        return self._revision

    @property
    def closed(self) -> bool:
        """Whether `close` was called."""
        return self._closed

    @property
    def identity(self) -> dict[str, str]:
        """Which generator an edit record belongs to."""
        return {"family": self.model.generator.family, "hash": self.model.hash}

    @property
    def images(self) -> dict[str, Any]:
        """What else than seed and truncation decides the numbered pictures; see Edit."""
        return self.model.generator.settings()

    def scan_ready(self) -> bool:
        """Whether the outlines of the present context or query can be had at once."""
        return jobs.scan_key(self) in self.scans

    # -- the document, in the worker ---------------------------------------------------------------------------------

    @property
    def document(self) -> Document:
        return self.history.document

    def change(self, label: str, document: Document, merge: Any = None) -> None:
        """Make `document` the present, with the weights that belong to it; on an error nothing has changed."""
        document = document.tidied()
        if document == self.document:
            return
        now = time.monotonic()
        if now - self._last_merge > MERGE_SECONDS:
            self.history.settle()
        self._last_merge = now
        self.model.set_edits(document.active)
        self.history.push(label, document, merge)
        self._unwanted = None
        self.touch()

    def step_back(self) -> None:
        self.model.set_edits(self.history.undone().active)
        self.history.undo()
        self.touch()

    def step_forward(self) -> None:
        self.model.set_edits(self.history.redone().active)
        self.history.redo()
        self.touch()

    def touch(self) -> None:
        """The state has changed: tell the front ends, and renew the live preview where it is concerned."""
        self._dirty = True
        self.live.request(self.document)

    # -- the worker --------------------------------------------------------------------------------------------------

    def _has_work(self) -> bool:
        return bool(
            self._messages
            or self._reads
            or (self.job and not self.job.started)
            or self._dirty
            or self.live.pending
            or self._ahead
            or self._statistics_wanted() is not None
        )

    def _work(self) -> None:
        while True:
            with self._wake:
                while not self._closed and not self._has_work():
                    self._busy = False
                    self._wake.notify_all()
                    self._wake.wait()
                self._busy = True
                if self._closed:
                    break
            try:
                self._step()
            except Cancelled:
                pass
            except Exception as error:
                _failed("the session's worker", error)
                self.notice("error", f"{type(error).__name__}: {error}")
        try:
            self.model.set_edits(())
        finally:
            with self._wake:
                left = [*self._messages, *self._reads]
                self._busy = False
                self._messages.clear()
                self._reads.clear()
                self._wake.notify_all()
            for incoming in left:  # nobody waits for ever
                self._refuse(incoming, CLOSED)
            if (job := self.job) is not None:
                self.job = None
                self._reply_error(job, job.id, job.kind, ValueError(CLOSED))

    def _step(self) -> None:
        """One piece of work, the most urgent first."""
        if self._serve(waiting := self.job is not None and not self.job.started):
            return
        if waiting:
            self._run_job(self.job)
        elif self._ahead:
            batch, self._ahead = self._ahead[:AHEAD], self._ahead[AHEAD:]
            self.model.pictures(batch, {}, original=True)
        elif (layer := self._statistics_wanted()) is not None:
            self._collect_in_background(layer)

    def _serve(self, job_waits: bool = False) -> bool:
        """Something that somebody waits for, alone or between two steps of a job; False where there is nothing.

        A preview writes into the weights and puts the same bits back before it returns: a job that this interrupts
        does not see it. job_waits: only the preview that a stroke waits for comes before the job.
        """
        if self._answer_one():
            return True
        if self._dirty:
            self._push_state()
        elif self.live.pending and self.live.urgent:
            self._preview()
        elif self._read_one():
            return True
        elif self.live.pending and not job_waits:
            self._preview()
        else:
            return False
        return True

    @staticmethod
    def _taken(queue: collections.deque[Incoming]) -> Incoming | None:
        if not queue:
            return None
        incoming = queue.popleft()
        incoming.client.waiting -= 1
        incoming.client.waiting_bytes -= incoming.size
        return incoming

    def _answer_one(self) -> bool:
        with self._wake:
            incoming = self._taken(self._messages)
        if incoming is not None:
            self._answer(incoming)
        return incoming is not None

    def _read_one(self) -> bool:
        with self._wake:
            incoming = self._taken(self._reads)
        if incoming is not None:
            try:
                self._answer(incoming)
            except NotYet:
                with self._wake:
                    if incoming.client in self._clients:
                        incoming.client.waiting += 1
                        incoming.client.waiting_bytes += incoming.size
                        self._reads.appendleft(incoming)
        return incoming is not None

    def _answer(self, incoming: Incoming) -> None:
        message = incoming.message if isinstance(incoming.message, dict) else {}
        identity = message.get("id")
        try:
            result = actions.answer(self, incoming.client, incoming.message, incoming.buffers, incoming.parts)
        except NotYet:
            raise
        except Exception as error:
            self._reply_error(incoming, identity, message.get("action") or message.get("what"), error)
            return
        if result is not None:  # None: a job has been started, it answers when it is done
            data, buffers = result if isinstance(result, tuple) else (result, [])
            self._reply(incoming, {"type": "done", "id": identity, **data}, buffers)

    def _reply_error(self, to: Incoming | Job, identity: Any, action: Any, error: BaseException) -> None:
        action = action if isinstance(action, str) else None
        identity = identity if isinstance(identity, (int, str)) else None
        text = str(error) or type(error).__name__
        if isinstance(error, RecursionError):
            text = "a field is nested too deep: expected numbers, texts and short lists"
        elif not isinstance(error, (ValueError, FileNotFoundError, Cancelled)):
            _failed(f"{action} failed", error)
            text = f"{type(error).__name__}: {error}"
        self._reply(to, {"type": "error", "id": identity, "action": action, "message": text})

    # -- jobs --------------------------------------------------------------------------------------------------------

    def start(self, job: Job) -> None:
        """Queue a job. ValueError while another one is there."""
        if self.job is not None:
            raise ValueError(f"{self.job.label} is running: wait for it, or cancel it")
        self.job = job
        self.touch()

    def cancel(self) -> None:
        """End the job, at its next step at the latest; without one the statistics, until something is changed that
        needs them. ValueError when nothing is running.
        """
        job = self.job
        if job is None:
            if self.collecting is None:
                raise ValueError("nothing is running that could be cancelled")
            self._unwanted = self._failure_key(self.collecting.layer)
            self.touch()
            return
        job.cancelled = True
        if not job.started:
            self.job = None
            self._reply_error(job, job.id, job.kind, Cancelled(f"{job.label}: cancelled"))
            self.touch()

    def _run_job(self, job: Job) -> None:
        job.started = True
        self._push_state()
        try:
            result = job.run(job)
            data, buffers = result if isinstance(result, tuple) else (result, [])
            message: dict[str, Any] | None = {"type": "done", "id": job.id, **data}
        except Exception as error:
            # A job changes the document, and with it the weights, as its last step: here all is as it was before.
            message, buffers = None, []
            self._reply_error(job, job.id, job.kind, error)
        self.job = None
        self.touch()
        if message is not None:
            self._push_state()
            self._reply(job, message, buffers)

    def breathe(self, job: Job | None = None) -> None:
        """Between two steps of long work: answer what has come in. Raises Cancelled where the work is to end."""
        deadline = time.monotonic() + BREATH_SECONDS
        while not self._closed and not (job and job.cancelled) and time.monotonic() < deadline:
            if not self._serve():
                break
        if job is None and self.job is not None and self.job.kind in READ_ONLY and not self.job.started:
            self._run_job(self.job)  # not after statistics that it does not need
        if self._closed or (job and job.cancelled):
            raise Cancelled(f"{job.label}: cancelled" if job else CLOSED)
        now = time.monotonic()
        if now - self._last_progress > PROGRESS_SECONDS:
            self._last_progress = now
            self.broadcast(
                {
                    "type": "progress",
                    "job": self.job.progress() if self.job else None,
                    "statistics": state.statistics(self),
                }
            )

    # -- statistics and previews -------------------------------------------------------------------------------------

    def _statistics_wanted(self) -> str | None:
        """The layer whose statistics are to be collected, once something is painted that will need them."""
        document = self.document
        if not (document.painted or document.object or document.paste or document.context):
            return None
        key = self._failure_key(document.layer)
        if self.model.has_statistics(document.layer) or key in self._failed_statistics or key == self._unwanted:
            return None
        return document.layer

    def _failure_key(self, layer: str) -> str:
        return f"{layer} {self.model.weights(below=layer)}"

    def ensure_statistics(self, layer: str, job: Job | None = None, quantiles: bool = False) -> None:
        """Collect the layer's statistics where they are not there yet, breathing."""
        self.collecting = Collecting(layer)
        self._dirty = True  # now there is something to cancel
        begun = self._failure_key(layer)

        def go_on() -> None:
            # The stack may move while nobody waits for the pass: half of its keys would be those of other weights.
            if job is None and (self._statistics_wanted() != layer or self._failure_key(layer) != begun):
                raise Cancelled("the statistics are not needed any more")

        def progress(done: int, of: int) -> None:
            self.collecting = Collecting(layer, done, of)
            if job is not None:
                job.step, job.steps, job.loss = done, of, None
            go_on()
            self.breathe(job)
            go_on()

        try:
            self.model.collect(layer, progress, quantiles, JOB_BATCH if job is not None else STATISTICS_BATCH)
        finally:
            self.collecting = None
        self.touch()

    def _collect_in_background(self, layer: str) -> None:
        try:
            self.ensure_statistics(layer)
        except Cancelled:
            self.touch()
        except Exception as error:
            self._failed_statistics[self._failure_key(layer)] = str(error)
            self.notice("error", f"statistics of {layer}: {error}")
            self.touch()

    def _preview(self) -> None:
        try:
            messages = self.live.step()
        except Exception as error:  # a job that waits for this goes on
            _failed("a preview", error)
            self.notice("error", f"preview: {type(error).__name__}: {error}")
            return
        for message, buffers in messages:
            message = {"type": "preview", "revision": self._revision, "weights": self.model.weights(), **message}
            self._previews[message["kind"]] = message, buffers
            self.broadcast(message, buffers)
        if self.live.changed():
            self._dirty = True


def _failed(what: str, error: BaseException) -> None:
    if threading.main_thread().is_alive():  # not at the interpreter's end, where thread pools refuse all work
        _log.error(what, exc_info=error)


def _close(session: weakref.ref[Session]) -> None:
    """At the interpreter's end: a thread inside torch must not outlive it."""
    if (found := session()) is not None:
        found.close()
