"""`python -m gateway.llama_worker`: proves llama.cpp, loads the model, serves until SIGTERM.

The life of the process, in order: arguments, proof in a child, model and context, HTTP thread, ready-file, decode loop on
the main thread, drain, exit 0. It has no children once it is ready and holds no lock: a kill leaves nothing behind.
"""

from __future__ import annotations

import argparse
import asyncio
import hashlib
import ipaddress
import json
import logging
import os
import signal
import socket
import sys
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import uvicorn
import uvloop

from gateway import __version__
from gateway.llama_worker.proof import Mode, NoWorkingMode, prove
from gateway.llama_worker.steady import FASTEST, steady

log = logging.getLogger("gateway.llama_worker")

DRAIN_S = 5.0
SWITCH_INTERVAL_S = 0.0005  # how long the HTTP thread and the decode loop may keep each other from the GIL
KV_BUDGET_BYTES = 2 * 2**30  # what the default context may take for all sequences together
SMALLEST_CONTEXT = 512
KEEP_ALIVE_S = 300
# A thread waits for the others after every operation: below so much weight each, the waiting costs more than it saves.
WEIGHT_BYTES_PER_THREAD = 16 * 2**20
# How long OpenMP's threads spin before they sleep. Its default (some hundred thousand rounds) makes decoding three times
# slower as soon as a second worker decodes on the same cores (8 streams each on two cores, ms a step: 71 at 500 rounds, 86 at
# 2,000, 113 at 4,000, 200 at 300,000); where the cores are free, 2,000 is 5 to 10% faster than 500, and more adds little.
SPIN_ROUNDS = "2000"


def main() -> int:
    """Runs the worker; the exit code."""
    options = parse_arguments(sys.argv[1:])
    logging.basicConfig(level=options.log_level, format="%(asctime)s %(levelname)s %(name)s %(message)s")
    logging.getLogger("gguf").setLevel(logging.WARNING)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPIN_ROUNDS)  # read when llama.cpp is imported, here and in the child
    try:
        cores = len(os.sched_getaffinity(0))
        options.threads = options.threads or default_threads(options.model.stat().st_size, cores)
        key = _read_key(options.key_file)
        listener = _bind(options.host, options.port)
        with ThreadPoolExecutor(1) as pool:
            digest = pool.submit(_digest, options.model)  # beside the proof: both read the whole file
            mode = prove(options.model, options.threads)
            from gateway.llama_worker.native import NativeError  # imports llama.cpp: not before it is proved

            try:
                worker = Worker(options, mode, key, listener, digest)
            except NativeError as error:  # say, no memory for the context
                log.critical("%s", error)
                return 1
            return worker.run()
    except (NoWorkingMode, OSError) as error:
        log.critical("%s", error)
        return 1


def parse_arguments(arguments: list[str]) -> argparse.Namespace:
    """The command line; argparse exits with 2 when it is wrong."""
    parser = argparse.ArgumentParser(prog="python -m gateway.llama_worker", description=__doc__)
    parser.add_argument("--model", type=Path, required=True, help="the GGUF file")
    parser.add_argument("--served-name", required=True, help="what requests call the base")
    parser.add_argument("--key-file", type=Path, required=True, help="holds the key that requests must carry")
    parser.add_argument("--ready-file", type=Path, required=True, help="written when the worker can decode")
    parser.add_argument("--host", type=_loopback, default="127.0.0.1")
    parser.add_argument("--port", type=_whole(0, 65535), default=0, help="0 takes a free one")
    parser.add_argument(
        "--ctx", type=_whole(0, 2**24), default=0, help="positions a sequence; 0 = the model's, if it fits"
    )
    parser.add_argument("--max-seqs", type=_whole(1, 256), default=8, help="sequences that run at the same time")
    parser.add_argument("--max-queue", type=_whole(0, 100_000), default=128, help="sequences that may wait")
    parser.add_argument(
        "--max-adapters", type=_whole(1, 4096), default=16, help="adapters in memory; more may be loaded"
    )
    parser.add_argument(
        "--cache-mib", type=_whole(0, 2**20), default=512, help="memory for computed prefixes; 0 = none"
    )
    parser.add_argument("--kv-type", choices=["f16", "f32"], default="f16", help="f32 doubles the KV, for comparisons")
    parser.add_argument(
        "--fastest",
        action="store_true",
        help="flash attention and any kernel: faster under load, but a reply may change with what else runs",
    )
    parser.add_argument(
        "--threads", type=_whole(0, 1024), default=0, help="0 = this process's cores, fewer for a small model"
    )
    parser.add_argument("--log-level", default="INFO", choices=["DEBUG", "INFO", "WARNING", "ERROR"])
    return parser.parse_args(arguments)


class Worker:
    """The running parts, in the order of their life."""

    def __init__(
        self, options: argparse.Namespace, mode: Mode, key: str, listener: socket.socket, digest: Future[str]
    ) -> None:
        # Imported here, so that a bad command line or a crash in the proof costs nothing.
        from gateway.llama_worker.adapters import Adapters
        from gateway.llama_worker.delivery import publisher
        from gateway.llama_worker.embedding import Embedder
        from gateway.llama_worker.fields import Limits
        from gateway.llama_worker.filling import PROMPT_CHUNK
        from gateway.llama_worker.http import Front
        from gateway.llama_worker.metrics import Metrics
        from gateway.llama_worker.native import (
            FLASH_ATTENTION_OFF,
            FLASH_ATTENTION_ON,
            Context,
            ContextSize,
            Model,
            NativeLog,
            library_version,
        )
        from gateway.llama_worker.prefix_cache import PrefixCache
        from gateway.llama_worker.scheduler import Scheduler
        from gateway.llama_worker.structured.compiler import KINDS
        from gateway.llama_worker.vocabulary import NativeVocabulary

        self._options = options
        self._listener = listener
        self._model = Model(options.model, NativeLog(), mode.use_extra_bufts)
        context = options.ctx or default_context(
            self._model.trained_context, self._model.kv_bytes_per_token(options.kv_type), options.max_seqs
        )
        if context > self._model.trained_context:
            log.warning("--ctx is %d; the model was trained on %d positions", context, self._model.trained_context)
        size = ContextSize(context, options.max_seqs, max(PROMPT_CHUNK, options.max_seqs), options.kv_type)
        arrangement = FASTEST if options.fastest else steady(self._model.file_type)
        arrangement.prepare()
        flash_attention = FLASH_ATTENTION_ON if arrangement.flash_attention else FLASH_ATTENTION_OFF
        self._context = Context(self._model, size, options.threads, flash_attention)
        self._adapters = Adapters(self._model, options.served_name, options.max_adapters, arrangement.adapters)
        cache = PrefixCache(options.cache_mib * 2**20 if self._model.restorable else 0)
        self._embedder = Embedder(self._model, context, options.threads)
        self._loop = uvloop.new_event_loop()
        metrics = Metrics()
        self._scheduler = Scheduler(
            self._model,
            self._context,
            self._adapters,
            options.served_name,
            cache,
            metrics,
            publisher(self._loop),
            arrangement.rows,
        )
        self._version = {
            "version": __version__,
            "kind": "llama",
            "llama_cpp": library_version(),
            "base_digest": digest.result(),
            "mode": {
                "name": mode.name,
                "use_extra_bufts": mode.use_extra_bufts,
                "threads": options.threads,
                "fastest": options.fastest,
            },
            "max_model_len": context,
            "max_num_seqs": options.max_seqs,
            "structured_outputs": list(KINDS),
            "embedding_width": self._embedder.width if self._embedder.pooling else None,
        }
        limits = Limits(context, options.max_seqs, self._model.vocab_size)
        self._front = Front(
            self._scheduler,
            self._adapters,
            metrics,
            limits,
            options.served_name,
            key,
            self._version,
            options.max_queue,
            NativeVocabulary(self._model),
            self._embedder,
        )
        self._server = uvicorn.Server(
            uvicorn.Config(
                self._front.app,
                http="httptools",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                date_header=False,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=1,
            )
        )

    def run(self) -> int:
        """Serves until a signal says to stop; the exit code."""
        from gateway.llama_worker.native import NativeError

        thread = threading.Thread(target=self._serve_http, name="http", daemon=True)
        thread.start()
        while not self._server.started:  # it accepts connections from then on; a failure ends the process
            time.sleep(0.002)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._stop)
        ready = {"pid": os.getpid(), "start_time": start_time(), "port": self._listener.getsockname()[1]}
        _write_atomically(self._options.ready_file, json.dumps({**ready, **self._version}))
        log.info("ready on port %d: %s", ready["port"], self._version)
        try:
            self._scheduler.run()
        except NativeError as error:
            log.critical("llama.cpp keeps failing, so this process ends: %s", error)
            os._exit(1)  # its objects may be in any state: freeing them could hang
        self._server.should_exit = True
        thread.join(timeout=DRAIN_S)
        self._embedder.close()
        self._context.close()
        self._adapters.close()
        self._model.close()
        log.info("stopped")
        return 0

    def _stop(self, number: int, frame: Any) -> None:
        self._front.draining = True
        self._scheduler.stop(DRAIN_S)

    def _serve_http(self) -> None:
        asyncio.set_event_loop(self._loop)
        try:
            self._loop.run_until_complete(self._server.serve(sockets=[self._listener]))
        except Exception:  # the boundary of a thread: without HTTP the process is of no use
            log.critical("the HTTP thread failed", exc_info=True)
            os._exit(1)


def start_time() -> int:
    """When this process started, in clock ticks since boot (field 22 of /proc/self/stat): with the pid, its identity."""
    text = Path("/proc/self/stat").read_text()
    return int(text[text.rindex(")") + 2 :].split()[19])


def default_threads(weight_bytes: int, cores: int) -> int:
    """As many threads as have enough to do."""
    return max(1, min(cores, weight_bytes // WEIGHT_BYTES_PER_THREAD))


def default_context(trained: int, sequence_bytes_per_token: int, sequences: int) -> int:
    """The model's own context, halved until the KV of all sequences fits the budget; not below SMALLEST_CONTEXT."""
    context = trained
    while context > SMALLEST_CONTEXT and context * sequences * sequence_bytes_per_token > KV_BUDGET_BYTES:
        context //= 2
    if context < trained:
        log.warning("the context is %d of the model's %d, so that its KV fits; --ctx sets it", context, trained)
    return context


def _read_key(path: Path) -> str:
    key = path.read_text().strip()
    if not key:
        raise OSError(f"{path} is empty; it must hold the key that requests carry")
    return key


def _bind(host: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((host, port))
    return listener


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"


def _write_atomically(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)


def _loopback(text: str) -> str:
    if not ipaddress.ip_address(text).is_loopback:
        raise argparse.ArgumentTypeError(
            f"{text} is not a loopback address; the worker is for this machine's gateway only"
        )
    return text


def _whole(low: int, high: int) -> Any:
    def parse(text: str) -> int:
        if not (text.isascii() and text.isdigit() and low <= int(text) <= high):
            raise argparse.ArgumentTypeError(f"{text!r} is not an integer from {low} to {high}")
        return int(text)

    return parse


if __name__ == "__main__":
    sys.exit(main())
