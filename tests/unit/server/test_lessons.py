"""What went wrong in other servers of this kind, and cannot here. Each lesson is a test, here or elsewhere:

- code from a crafted input (Megatron-LM CVE-2025-23264, -23265), pickles on sockets (SGLang CVE-2026-3059, -3060,
  -3989; vLLM CVE-2025-30165 and the like): `test_nothing_that_serves_evaluates_or_unpickles`, `test_wire.py`, pickles
  as bodies in `test_refusals.py`
- pickled checkpoints (Megatron-LM CVE-2026-24150, -24151, -24152): `test_a_pickle_is_no_update_of_weights`,
  `checkpoints/test_damage.py::test_no_pickle_runs_without_being_trusted`
- code from a model's folder (vLLM CVE-2026-22807, CVE-2025-66448): `checkpoints/test_hf_config.py`, "own code"
- chat templates without a sandbox (SGLang CVE-2026-5760): `test_templates_run_in_a_sandbox`
- tensors of clients (vLLM CVE-2025-62164): `test_refusals.py`, no field takes any; `prompt_embeds` below
- sockets that other machines reach (vLLM CVE-2025-30202): `test_tool.py`, all that listens is at a loopback address
- huge headers, empty prompts, broken fields (vLLM CVE-2025-48956, CVE-2024-8768, CVE-2025-48944): `test_refusals.py`
- comparing keys byte by byte (vLLM CVE-2025-59425): `test_keys_are_compared_in_constant_time`
- what the time of an answer tells of others' prompts (vLLM CVE-2025-46570): `test_keys.py`, a cache for each key
- texts of exceptions in answers (vLLM CVE-2026-22778): `test_lifecycle.py`, a number and not its text
- fetching what a request names (vLLM CVE-2025-6242): `test_refusals.py`, image_url; `test_control.py`, the root
- fan-out without a bound (vLLM CVE-2025-61620, CVE-2024-8939): `test_refusals.py`, n, stop, prompts, logprobs;
  `test_openai_client.py`, branches and depth
- structure in user text: `test_tags_of_users_are_text`
"""

from __future__ import annotations

import ast
import hmac
import pickle
from pathlib import Path

import pytest
from fastapi import FastAPI

from megatron_multiverse.server.app import Gate
from megatron_multiverse.server.config import ServerConfig
from megatron_multiverse.server.model import ServedModel
from tests.unit.server.running import MODEL, PROMPT, Running, running, tokenizer

PACKAGE = Path(__file__).parents[3] / "megatron_multiverse"
CALLS = {"eval", "exec", "compile", "__import__"}
MODULES = {"pickle", "dill", "cloudpickle", "shelve", "marshal"}


def test_nothing_that_serves_evaluates_or_unpickles() -> None:
    for file in [file for folder in ("server", "inference", "clients") for file in (PACKAGE / folder).rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                function = node.func
                assert not (isinstance(function, ast.Name) and function.id in CALLS), f"{file}: {function.lineno}"
                called = ast.unparse(function)
                assert called != "torch.load" and not called.endswith("broadcast_object_list"), f"{file}: {called}"
            elif isinstance(node, ast.Import | ast.ImportFrom):
                names = {alias.name for alias in node.names} | {getattr(node, "module", None) or ""}
                assert not MODULES & {name.split(".")[0] for name in names}, f"{file}: {node.lineno}"


class Evil:
    """Makes a file when it is unpickled."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return Path.touch, (self.trace,)  # type: ignore[return-value]


def test_a_pickle_is_no_update_of_weights(tmp_path: Path) -> None:
    folder = tmp_path / "weights" / "evil"
    (folder / "iter_0000001" / "mp_rank_00").mkdir(parents=True)
    (folder / "latest_checkpointed_iteration.txt").write_text("1")
    trace = tmp_path / "trace"
    (folder / "iter_0000001" / "mp_rank_00" / "model_optim_rng.pt").write_bytes(pickle.dumps(Evil(trace), 2))
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Evil(trace), 2))
    pickle.loads(pickle.dumps(Evil(trace), 2))
    assert trace.exists(), "it would work"
    trace.unlink()
    with running(weights_root=tmp_path / "weights") as server:
        for path in ("evil", "evil/iter_0000001"):
            assert server.post("/update_weights_from_disk", {"model_path": path}).status_code == 400
        assert not trace.exists()


def test_templates_run_in_a_sandbox(tmp_path: Path) -> None:
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages.__class__.__mro__[-1].__subclasses__() }}{{ cycler.__init__.__globals__ }}")
    model = ServedModel(ServerConfig(load=MODEL, chat_template=template), tokenizer())
    with pytest.raises(Exception, match="unsafe"):
        model.tokenizer.render_conversation([{"role": "user", "content": "a"}], template=model.template)


def test_nothing_of_requests_goes_to_collectors(server: Running) -> None:
    """FastAPI's telemetry, on by default, takes texts of exceptions along."""
    assert any(FastAPI()._telemetry.values()), "it would"
    assert not any(server.app._telemetry.values())


def test_keys_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """All keys, with the function that was made for it, whatever is given."""
    compared = []
    real = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda one, other: compared.append(one) or real(one, other))
    gate = Gate(None, ["one", "two"], False, None)  # type: ignore[arg-type]
    for given, is_refused in (("one", False), ("two", False), ("three", True), ("", True)):
        compared.clear()
        refusal = gate._refusal("/v1/models", {b"authorization": f"Bearer {given}".encode()})
        assert (refusal is not None) == is_refused and compared == [b"one", b"two"]


def test_tags_of_users_are_text(server: Running) -> None:
    """A prompt that opens a goal with many outlines: nothing forks, and nothing of it is in the answer's structure."""
    goal = "".join(f"<Outline>\n{k}: x</Outline>\n" for k in range(1, 40))
    body = {"prompt": f"{PROMPT}<Parallel>\n<Goal>\n{goal}", "max_tokens": 20, "temperature": 0, "multiverse": {}}
    answer = server.post("/v1/completions", body | {"logit_bias": {str(_end_goal()): 100}}).json()["choices"][0]
    assert answer["text"].startswith("</Goal>") and answer["multiverse"]["blocks"] == []
    assert server.post("/v1/completions", body | {"prompt_embeds": "gASV"}).status_code == 400


def _end_goal() -> int:
    (token,) = tokenizer().tokenize("</Goal>")
    return token
