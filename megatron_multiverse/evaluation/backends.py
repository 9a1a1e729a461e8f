"""Who answers: an engine in this process, or a running server. Both give the same answers."""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import os
import time
from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

from megatron_multiverse.clients.http import KEY_VARIABLE, base_of, error_text
from megatron_multiverse.errors import ConfigError, GenerationError, MultiverseError
from megatron_multiverse.evaluation.config import EvaluateConfig
from megatron_multiverse.evaluation.samples import Answer, Job
from megatron_multiverse.patience import BUSY, STARTING, Deadline, Patience

if TYPE_CHECKING:
    import httpx2

    from megatron_multiverse.inference import Result

logger = logging.getLogger(__name__)

Outcome = Answer | MultiverseError
"""An answer, or why this one prompt got none; the others go on."""


class Backend(Protocol):
    """What the evaluation asks of whoever answers."""

    name: str
    """Of the model; a run goes on only with the same one."""
    settings: dict[str, Any]
    """What else of it decides over answers, and must be the same when a run goes on."""
    device: str
    """What it runs on, for whoever reads the seconds; "unknown" if that is not told."""

    def answers(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Outcome]]:
        """Answer jobs, yielding each as it finishes.

        Raises:
            MultiverseError: nothing more can be answered.
        """


class EngineBackend:
    """An engine in this process.

    Raises:
        CheckpointError, ConfigError: see `build_engine`.
    """

    def __init__(self, config: EvaluateConfig) -> None:
        from megatron_multiverse.checkpoints.sources import loadable, weights_fingerprint
        from megatron_multiverse.data.generation_config import end_ids
        from megatron_multiverse.data.tokenizers import build_tokenizer
        from megatron_multiverse.dtypes import engine_dtype
        from megatron_multiverse.model.device import choose_device, device_name

        assert config.load is not None
        self.name = str(config.load)
        config = dataclasses.replace(config, load=(load := loadable(config.load)))
        self._device = choose_device(config.device)
        self.device = device_name(self._device)
        self._dtype = engine_dtype(config.dtype, self._device)
        names = ("round_as_trained", "quantization", "max_paths", "max_depth")
        self.settings: dict[str, Any] = {name: getattr(config.engine, name) for name in names}
        self.settings["dtype"] = str(self._dtype).removeprefix("torch.")
        self._config = config
        self._tokenizer = build_tokenizer(config.tokenizer_type, config.tokenizer_model or load)
        self._ends = tuple(end_ids(load, self._tokenizer))
        texts = self._tokenizer.id_to_text, self._tokenizer.chat_template if config.chat else None
        self.settings |= {
            "weights": weights_fingerprint(load),
            "tokenizer": hashlib.sha256(repr(texts).encode(errors="surrogatepass")).hexdigest()[:16],
            "end_tokens": list(self._ends),
        }

    def answers(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Outcome]]:
        """See `Backend`."""
        from megatron_multiverse.inference import Request, answer_text

        prompts = self._prompt_ids(jobs)
        waiting = iter(zip(jobs, prompts, strict=True))
        engine = self._engine(max(map(len, prompts)))
        running: dict[int, tuple[Job, float]] = {}
        while True:
            for job, ids in islice(waiting, self._config.concurrency - len(running)):
                try:
                    number = engine.add_request(Request(prompt_ids=ids, sampling=self._sampling(job)))
                    running[number] = job, time.perf_counter()
                except GenerationError as error:
                    yield job, error
            if not running:
                return
            for result in engine.step():
                job, started = running.pop(result.request_id)
                text = answer_text(result, self._tokenizer.detokenize)
                yield job, _of_result(result, text, time.perf_counter() - started)

    def _prompt_ids(self, jobs: Sequence[Job]) -> list[list[int]]:
        texts = [job.prompt for job in jobs]
        if self._config.chat and self._tokenizer.chat_template is not None:
            texts = [self._tokenizer.render_chat(text) for text in texts]
        return self._tokenizer.tokenize_batch(texts)

    def _engine(self, longest_prompt: int) -> Any:
        from megatron_multiverse.inference import build_engine

        config = self._config
        assert config.load is not None
        return build_engine(
            config.load,
            self._tokenizer,
            config.engine,
            longest=longest_prompt + config.draw.max_tokens,
            dtype=self._dtype,
            device=self._device,
        )

    def _sampling(self, job: Job) -> Any:
        from megatron_multiverse.config import SamplingParams

        draw = self._config.draw
        return SamplingParams(
            **vars(draw),
            seed=job.key.seed,
            max_critical_tokens=job.key.budget,
            max_concurrent_branches=1 if self._config.sequential else None,
            stop_token_ids=self._ends,
        )


def _of_result(result: Result, text: str, seconds: float) -> Outcome:
    if result.finish_reason not in ("stop", "length"):
        return GenerationError(f"the engine ended the answer ({result.finish_reason}): {result.error}")
    return Answer(
        text=text,
        finish_reason=result.finish_reason,
        tokens=len(result.token_ids),
        critical_tokens=result.critical_tokens,
        decode_steps=result.decode_steps,
        blocks=len(result.blocks),
        paths=sum(len(block.branches) for block in result.blocks),
        malformed=dict(result.malformed),
        seconds=seconds,
    )


class ServerBackend:
    """Running servers of one model, which share the answers.

    Raises:
        ConfigError: they serve models of different names, or of different weights.
        GenerationError: nobody answers there, or the key is refused.
    """

    def __init__(self, config: EvaluateConfig) -> None:
        self._concurrency = config.concurrency
        self._servers = [_Server(config, url) for url in config.url]
        names = {server.name for server in self._servers}
        if len(names) > 1:
            served = ", ".join(f"{server.url} serves {server.name}" for server in self._servers)
            raise ConfigError(f"--url: {served}; servers that share an evaluation serve the same model")
        (self.name,) = names
        hashes = {server.weights for server in self._servers if server.weights is not None}
        if len(hashes) > 1:
            have = ", ".join(f"{server.url} has {server.weights or 'untold ones'}" for server in self._servers)
            raise ConfigError(
                f"--url: the servers have other weights under the same name ({have}); give each the same checkpoint"
            )
        self.settings: dict[str, Any] = {"weights": hashes.pop()} if hashes else {}
        self.device = _all_devices([server.device for server in self._servers])

    def answers(self, jobs: Sequence[Job]) -> Iterator[tuple[Job, Outcome]]:
        """See `Backend`. Threads wait for the servers; grades are given by the caller's thread."""
        waiting = iter(jobs)
        running: dict[Future[Outcome], tuple[Job, _Server]] = {}
        pool = ThreadPoolExecutor(self._concurrency)
        try:
            while True:
                for job in islice(waiting, self._concurrency - len(running)):
                    asked = Counter(server.url for _, server in running.values())
                    least = min(self._servers, key=lambda server: asked[server.url])
                    running[pool.submit(least.answer, job)] = job, least
                if not running:
                    return
                for done in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(done)[0], done.result()
        finally:
            # Ends the requests under way, so that their threads end now and the servers free what they hold.
            for server in self._servers:
                server.close()
            pool.shutdown(wait=False, cancel_futures=True)


def _all_devices(devices: Sequence[str]) -> str:
    """What each server runs on, as one line for the report."""
    if len(devices) == 1:
        return devices[0]
    return ", ".join(f"{count} server{'s' * (count > 1)} on {one}" for one, count in Counter(devices).items())


class _Server:
    """One server, over HTTP.

    Attributes:
        name: of its model.
        weights: a hash of its weights, None if it tells none.
        device: what it runs on, "unknown" if it does not tell.
    """

    def __init__(self, config: EvaluateConfig, url: str) -> None:
        import httpx2

        self.url = url
        self._config = config
        self._patience, self._beginning = Patience(f"--url {url}"), Deadline()
        key = os.environ.get(KEY_VARIABLE)
        self._client = httpx2.Client(
            base_url=base_of(url),
            timeout=httpx2.Timeout(config.timeout, connect=10.0),
            headers={"Authorization": f"Bearer {key}"} if key else {},
            limits=httpx2.Limits(max_connections=config.concurrency),
        )
        models = self._ask("GET", "/v1/models", None)
        try:
            self.name = str(models["data"][0]["id"])
        except (KeyError, IndexError, TypeError) as error:
            raise GenerationError(f"--url {url}: /v1/models names no model; is this our server?") from error
        self._wait_until_ready()
        info = self._told("/model_info")
        weights = info.get("weights")
        self.weights = weights if isinstance(weights, str) and weights else None
        self.device = _device_of(info)

    def _wait_until_ready(self) -> None:
        """Wait for a server that loads its model still: it tells nothing of it yet. Ours says here alone that its
        engine has died. What others say there, in whatever form, is of no matter."""
        self._response("GET", "/health/ready", None, {429, 503})

    def _told(self, route: str) -> dict[str, Any]:
        """What the server says there; nothing if it is an older one, or another, or something in between passes on what
        asks for answers alone, or answers by itself."""
        response, _ = self._response("GET", route, None)
        try:
            return {} if response.status_code == 200 and _object_of(response) is None else self._content(response)
        except (_Refused, _Unknown):
            return {}

    def close(self) -> None:
        self._client.close()

    def answer(self, job: Job) -> Outcome:
        """Ask and wait; in any thread."""
        config = self._config
        ours: dict[str, Any] = {"max_critical_tokens": job.key.budget}
        if config.sequential:
            ours["max_concurrent_branches"] = 1
        body: dict[str, Any] = {**vars(config.draw), "seed": job.key.seed, "multiverse": ours}
        route = "/v1/chat/completions" if config.chat else "/v1/completions"
        body |= {"messages": [{"role": "user", "content": job.prompt}]} if config.chat else {"prompt": job.prompt}
        try:
            answer, seconds = self._timed("POST", route, body)
        except _Refused as error:
            return GenerationError(str(error))
        return _of_response(answer, seconds)

    def _ask(self, method: str, route: str, body: dict[str, Any] | None) -> dict[str, Any]:
        return self._timed(method, route, body)[0]

    def _timed(self, method: str, route: str, body: dict[str, Any] | None) -> tuple[dict[str, Any], float]:
        """The answer, and the seconds of the try that brought it."""
        response, seconds = self._response(method, route, body)
        return self._content(response), seconds

    def _response(
        self, method: str, route: str, body: dict[str, Any] | None, statuses: Collection[int] | None = None
    ) -> tuple[httpx2.Response, float]:
        """The response, whatever it says, and the seconds of the try that brought it. A server that is busy or starting
        is asked again: one that answers with one of `statuses`, by default what the method can mean by that. What is
        asked when the command begins (GET) has one deadline in all, and each problem (POST) one of its own.

        Raises:
            GenerationError: it answers nothing, or one of these still after all that patience, or its engine has died.
        """
        import httpx2

        usual, deadline = (STARTING, self._beginning) if method == "GET" else (BUSY, None)
        question = self._patience.question(statuses or usual, deadline)
        while True:
            started = time.perf_counter()
            try:
                response = self._client.request(method, route, json=body)
            except httpx2.TimeoutException as error:
                raise GenerationError(f"--url {self.url}: no answer in {self._config.timeout:g} s") from error
            except (httpx2.HTTPError, httpx2.InvalidURL) as error:
                raise GenerationError(
                    f"--url {self.url}: {error}; start tools/run_text_generation_server.py there, then the "
                    "same command goes on"
                ) from error
            status, text = response.status_code, "" if response.status_code == 200 else response.text
            said = f"{route} answers {error_text(status, text)}"
            pause = question.pause(status, text, said, response.headers.get("retry-after"))
            if pause is not None:
                time.sleep(pause)
            elif (given_up := question.given_up(status, text)) is not None:
                raise GenerationError(f"--url {self.url}: {said}{given_up}")
            else:
                return response, time.perf_counter() - started

    def _content(self, response: httpx2.Response) -> dict[str, Any]:
        content = _object_of(response)
        if content is not None:
            return content
        message = f"--url {self.url}: {error_text(response.status_code, response.text)}"
        if response.status_code in (400, 500):
            raise _Refused(message)
        if response.status_code in (401, 403, 404, 405):
            raise _Unknown(message)
        raise GenerationError(message)


def _object_of(response: httpx2.Response) -> dict[str, Any] | None:
    """The JSON object of a response; None if it holds none, or is an error."""
    try:
        content = response.json() if response.status_code == 200 else None
    except ValueError:
        return None
    return content if isinstance(content, dict) else None


def _device_of(info: dict[str, Any]) -> str:
    """The device that a server names in /model_info, with the number of those that hold its model where there are
    several."""
    name = info.get("device")
    if not isinstance(name, str) or not name:
        return "unknown"
    sizes = [info.get(f"{kind}_model_parallel_size", 1) for kind in ("tensor", "pipeline")]
    number = math.prod(size for size in sizes if isinstance(size, int))
    return f"{number} x {name}" if number > 1 else name


class _Unknown(GenerationError):
    """There is no such route, or not for us."""


class _Refused(GenerationError):
    """This one request cannot be served."""


def _of_response(response: dict[str, Any], seconds: float) -> Outcome:
    try:
        choice = response["choices"][0]
        ours = choice["multiverse"]
        if choice["finish_reason"] not in ("stop", "length"):
            return GenerationError(f"the server ended the answer ({choice['finish_reason']})")
        return Answer(
            text=choice["message"]["content"] if "message" in choice else choice["text"],
            finish_reason=choice["finish_reason"],
            tokens=response["usage"]["completion_tokens"],
            critical_tokens=ours["critical_tokens"],
            decode_steps=ours["decode_steps"],
            blocks=len(ours["blocks"]),
            paths=sum(len(block["branches"]) for block in ours["blocks"]),
            malformed=ours["malformed"],
            seconds=seconds,
        )
    except (KeyError, IndexError, TypeError) as error:
        raise GenerationError(
            f"the answer has no {error}: --url takes the address of tools/run_text_generation_server.py"
        ) from error
