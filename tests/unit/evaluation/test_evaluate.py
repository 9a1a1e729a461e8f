"""The whole command on the quickstart's model: in this process and through a server, interrupted and again."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron_multiverse.checkpoints.load import load_checkpoint
from megatron_multiverse.config import EngineConfig
from megatron_multiverse.errors import ConfigError, DataError, GenerationError
from megatron_multiverse.evaluation import backends
from megatron_multiverse.evaluation.backends import ServerBackend
from megatron_multiverse.evaluation.config import DrawConfig, EvaluateConfig
from megatron_multiverse.evaluation.report import comparison_lines
from megatron_multiverse.evaluation.run import compare, evaluate
from megatron_multiverse.evaluation.samples import SAMPLES, Sample, read_samples
from megatron_multiverse.model.weights import save_model
from tests.unit.server.running import MODEL, running

QUESTIONS = {
    "Work out A = 583 + 967; B = 48 + 76.": "A = 1550; B = 124",
    "Work out A = 12 + 13; B = 40 + 2.": "A = 25; B = 43",  # neither the model (62) nor right
}


@pytest.fixture
def config(tmp_path: Path) -> EvaluateConfig:
    rows = [{"problem": question, "answer": gold} for question, gold in QUESTIONS.items()]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return EvaluateConfig(
        tasks=["arithmetic"],
        data=[f"arithmetic={file}"],
        load=MODEL,
        output=tmp_path / "run",
        draw=DrawConfig(temperature=0, max_tokens=600),
        engine=EngineConfig(max_rows=16),
        dtype="float32",
        device="cpu",
        chat=False,
    )


@pytest.fixture
def brief(config: EvaluateConfig) -> EvaluateConfig:
    """The same, where it does not matter what the answers say."""
    return dataclasses.replace(config, draw=DrawConfig(temperature=0, max_tokens=40))


def measured(folder: Path) -> dict[Any, dict[str, Any]]:
    """All that does not depend on the clock."""
    return {
        sample.key: {name: value for name, value in vars(sample).items() if name != "seconds"}
        for sample in read_samples(folder / SAMPLES)
    }


def test_engine_and_server_answer_alike(config: EvaluateConfig, tmp_path: Path) -> None:
    result = evaluate(dataclasses.replace(config, budgets=[60, 500]))
    full, cut = (next(score for key, score in result.scores.items() if key.budget == b) for b in (500, 60))
    assert (full.accuracy, full.trigger_ratio, full.malformed, full.truncated) == (0.5, 1.0, 0.0, 0.0)
    assert full.num_parallel > 1.2 and cut.token_latency <= 60 and cut.truncated == 1.0 and cut.accuracy == 0.0
    with running(engine=config.engine) as server, running(engine=config.engine) as second:
        over_http = dataclasses.replace(
            config, load=None, url=[server.url, second.url], budgets=[60, 500], output=tmp_path / "http"
        )
        evaluate(over_http)
        for one in (server, second):
            assert "multiverse_answers_total{" in one.http.get("/metrics").text, "each has answered"
        chat = dataclasses.replace(over_http, chat=True, budgets=[500], output=tmp_path / "chat")
        evaluate(chat)
        grown = evaluate(dataclasses.replace(over_http, thinking=["parallel", "none"], budgets=[500], limit=1))
        assert [(score.samples, setting.thinking) for setting, score in grown.scores.items()] == [
            (1, "parallel"),
            (1, "none"),
        ]
    assert measured(tmp_path / "run") == {
        key: value for key, value in measured(tmp_path / "http").items() if key.thinking == "parallel"
    }
    # This model has no chat template: chat asks it the same.
    assert measured(tmp_path / "chat").items() <= measured(tmp_path / "run").items()
    assert {"report.md", "report.json", "report.png"} <= {file.name for file in (tmp_path / "http").iterdir()}
    with pytest.raises(GenerationError, match="start tools"):
        evaluate(over_http)  # nobody is there any more


def test_a_run_does_not_go_on_with_other_weights_of_a_server(brief: EvaluateConfig, tmp_path: Path) -> None:
    model, shape = load_checkpoint(MODEL)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.001)
    save_model(model, shape, tmp_path / "weights" / "later")
    with running(engine=brief.engine, weights_root=tmp_path / "weights") as server, running() as other:
        over_http = dataclasses.replace(brief, load=None, url=[server.url], limit=1)
        evaluate(over_http)
        first, second = (one.http.get("/model_info").json()["weights"] for one in (server, other))
        assert first == second == json.loads((brief.output / "run.json").read_text())["weights"]
        assert server.post("/update_weights_from_disk", {"model_path": "later"}).status_code == 200
        later = server.http.get("/model_info").json()["weights"]
        with pytest.raises(ConfigError, match="the servers have other weights under the same name"):
            evaluate(dataclasses.replace(over_http, url=[server.url, other.url], output=tmp_path / "two"))
        more = dataclasses.replace(over_http, limit=None)
        with pytest.raises(ConfigError, match=rf"of other weights \({first}\) than the server has now \({later}\)"):
            evaluate(more)
        assert len(measured(brief.output)) == 1
        evaluate(dataclasses.replace(more, allow_other_weights=True))
        assert len(measured(brief.output)) == 2
        assert json.loads((brief.output / "report.json").read_text())["weights"] == f"{first}, then {later}"
        evaluate(dataclasses.replace(over_http, url=[other.url]))  # those of the first answers are served there
        assert json.loads((brief.output / "report.json").read_text())["weights"] == f"{first}, then {later}"


@pytest.mark.parametrize(
    "answer",
    [httpx2.Response(404), httpx2.Response(200, text="OK"), httpx2.Response(200, json=["model"])],
)
def test_a_server_that_tells_nothing_of_its_weights_goes_on(
    brief: EvaluateConfig, answer: httpx2.Response, caplog: Any, monkeypatch: Any
) -> None:
    request = httpx2.Client.request

    def untelling(client: httpx2.Client, method: str, url: str, **options: Any) -> httpx2.Response:
        return answer if url == "/model_info" else request(client, method, url, **options)

    with running(engine=brief.engine) as server:
        over_http = dataclasses.replace(brief, load=None, url=[server.url], limit=1)
        evaluate(over_http)
        assert json.loads((brief.output / "report.json").read_text())["device"] == "CPU"
        monkeypatch.setattr(httpx2.Client, "request", untelling)
        evaluate(dataclasses.replace(over_http, limit=None))
        assert "does not tell whether its weights are still those of the answers" in caplog.text
        untold = dataclasses.replace(over_http, output=brief.output.with_name("untold"))
        evaluate(untold)
        assert "weights" not in json.loads((untold.output / "run.json").read_text())
        assert "\n- device: unknown\n" in (untold.output / "report.md").read_text()


def test_a_server_that_loads_its_model_is_waited_for(brief: EvaluateConfig, monkeypatch: Any) -> None:
    request = httpx2.Client.request
    asked: list[str] = []

    def loading(client: httpx2.Client, method: str, url: str, **options: Any) -> httpx2.Response:
        asked.append(url)
        if url == "/health/ready" and asked.count(url) == 1:
            return httpx2.Response(503, headers={"retry-after": "0"})
        if url == "/model_info" and asked.count("/health/ready") < 2:
            return httpx2.Response(200, json={"weights": "", "device": None})
        return request(client, method, url, **options)

    monkeypatch.setattr(httpx2.Client, "request", loading)
    with running(engine=brief.engine) as server:
        evaluate(dataclasses.replace(brief, load=None, url=[server.url], limit=1))
        report = json.loads((brief.output / "report.json").read_text())
        assert (report["weights"], report["device"]) == (server.client.control.weights, "CPU")


@pytest.mark.parametrize(
    "answer",
    [
        *(httpx2.Response(200, text="OK"), httpx2.Response(200), httpx2.Response(200, json=["ready"])),
        *(httpx2.Response(204), httpx2.Response(404), httpx2.Response(502, text="<html>Bad Gateway</html>")),
    ],
)
def test_what_another_server_says_of_being_ready_is_of_no_matter(
    config: EvaluateConfig, answer: httpx2.Response, monkeypatch: Any
) -> None:
    asked = []

    def request(client: httpx2.Client, method: str, url: str, **options: Any) -> httpx2.Response:
        asked.append(url)
        told = {"/v1/models": {"data": [{"id": "model"}]}, "/model_info": {"device": "X", "weights": "abc"}}
        return answer if url == "/health/ready" else httpx2.Response(200, json=told[url])

    monkeypatch.setattr(httpx2.Client, "request", request)
    backend = ServerBackend(dataclasses.replace(config, load=None, url=["http://a"]))
    assert "/health/ready" in asked and (backend.settings, backend.device) == ({"weights": "abc"}, "X")


def test_a_server_that_never_gets_ready_is_given_up(config: EvaluateConfig, monkeypatch: Any) -> None:
    def request(client: httpx2.Client, method: str, url: str, **options: Any) -> httpx2.Response:
        models = httpx2.Response(200, json={"data": [{"id": "model"}]})
        return models if url == "/v1/models" else httpx2.Response(503, text="it loads the model")

    monkeypatch.setattr(httpx2.Client, "request", request)
    monkeypatch.setattr("megatron_multiverse.patience.PATIENCE_S", -1.0)
    with pytest.raises(GenerationError, match="it loads the model"):
        ServerBackend(dataclasses.replace(config, load=None, url=["http://a"]))


@pytest.mark.parametrize(
    ("told", "device"),
    [
        ([{"device": "X", "tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1}], "X"),
        ([{"device": "X", "tensor_model_parallel_size": 4, "pipeline_model_parallel_size": 2}], "8 x X"),
        ([{"device": "X"}, {"device": 5}, {"device": "X"}], "2 servers on X, 1 server on unknown"),
        ([{"device": "X", "tensor_model_parallel_size": "many"}], "X"),
    ],
)
def test_servers_say_on_what_they_run(
    config: EvaluateConfig, monkeypatch: Any, told: list[dict[str, Any]], device: str
) -> None:
    def request(client: httpx2.Client, method: str, url: str, **options: Any) -> httpx2.Response:
        models = {"data": [{"id": "model"}]}
        return httpx2.Response(200, json=models if url == "/v1/models" else told[int(client.base_url.host[1:])])

    monkeypatch.setattr(httpx2.Client, "request", request)
    urls = [f"http://s{number}" for number in range(len(told))]
    assert ServerBackend(dataclasses.replace(config, load=None, url=urls)).device == device


def test_a_run_goes_on_where_it_was_killed(config: EvaluateConfig) -> None:
    evaluate(config)
    file = config.output / SAMPLES
    whole = measured(config.output)
    first, second = file.read_bytes().splitlines(keepends=True)
    kept = first.replace(b'"tokens": ', b'"tokens": 1')  # told apart from one that was made again
    file.write_bytes(kept + second[: len(second) // 2])
    result = evaluate(config)
    again = measured(config.output)
    assert again.keys() == whole.keys() and result.missing == 0
    assert file.read_bytes().startswith(kept)
    assert sum(again[key] != whole[key] for key in whole) == 1
    with pytest.raises(ConfigError, match=r"other settings .*sequential"):
        evaluate(dataclasses.replace(config, sequential=True))
    with pytest.raises(ConfigError, match=r"other settings \(dtype was 'float32' and is 'float64' now\)"):
        evaluate(dataclasses.replace(config, dtype="float64"))
    engine = dataclasses.replace(config.engine, quantization="fp8", max_depth=1, page_size=64)
    with pytest.raises(ConfigError, match=r"other settings \(max_depth was 8 and is 1 now, quantization was"):
        evaluate(dataclasses.replace(config, engine=engine))


def test_a_run_goes_on_with_the_same_weights_and_tokenizer(config: EvaluateConfig, tmp_path: Path) -> None:
    """Training that goes on leaves another model under the name of the one that was evaluated."""
    model = tmp_path / "model"
    shutil.copytree(MODEL, model)
    config = dataclasses.replace(config, load=model, draw=DrawConfig(temperature=0, max_tokens=8))
    evaluate(config)
    kept = measured(config.output)
    settings = model / "generation_config.json"
    settings.write_text(json.dumps({"eos_token_id": [0, 5]}), encoding="utf-8")
    with pytest.raises(ConfigError, match=r"other settings \(end_tokens was"):
        evaluate(config)
    shutil.copyfile(MODEL / settings.name, settings)
    weights = load_file(model / "model.safetensors")
    save_file({name: tensor * 2 for name, tensor in weights.items()}, model / "model.safetensors")
    with pytest.raises(ConfigError, match=r"other settings \(weights was .* choose a new folder"):
        evaluate(config)
    assert measured(config.output) == kept


def test_a_corrected_right_answer_grades_the_finished_answers_anew(config: EvaluateConfig) -> None:
    evaluate(config)
    file = Path(config.data[0].partition("=")[2])
    rows = file.read_text()
    file.write_text(rows.replace("B = 43", "B = 62"))
    (score,) = evaluate(config).scores.values()
    assert score.accuracy == 1.0
    assert {sample.gold for sample in read_samples(config.output / SAMPLES)} == {"A = 1550; B = 124", "A = 25; B = 62"}
    choices = '"correct answer": "A = 25; B = 62", ' + ", ".join(f'"incorrect answer {k}": "{k}"' for k in (1, 2, 3))
    file.write_text(file.read_text().replace('"answer": "A = 25; B = 62"', choices))
    with pytest.raises(DataError, match="choose another --output"):
        evaluate(config)


def test_an_answer_that_cannot_be_had_is_missing_and_the_others_are_kept(config: EvaluateConfig) -> None:
    long = {"problem": "1 + " * 3000 + "1", "answer": "3001"}
    with Path(config.data[0].partition("=")[2]).open("a") as file:
        file.write(json.dumps(long) + "\n")
    result = evaluate(config)
    assert result.missing == 1 and "shorten the prompt" in result.first_error
    assert len(measured(config.output)) == 2
    assert json.loads((config.output / "report.json").read_text())["missing answers"] == 1


def test_two_runs_are_compared(config: EvaluateConfig, tmp_path: Path) -> None:
    evaluate(config)
    slow = [
        dataclasses.replace(sample, seconds=3 * sample.seconds, thinking="sequential", correct=False)
        for sample in read_samples(config.output / SAMPLES)
    ]
    slow[0] = dataclasses.replace(slow[0], concurrency=1)
    (tmp_path / "slow").mkdir()
    write(tmp_path / "slow" / SAMPLES, slow)
    (found,) = compare(EvaluateConfig(compare=[tmp_path / "slow", config.output], output=tmp_path / "comparison"))
    assert found.accuracy == (0.0, 0.5) and found.difference.low >= 0
    assert found.speedup.value == pytest.approx(3) and found.step_speedup.value == 1
    assert "so their seconds do not compare" in comparison_lines([found])[-1]
    assert {"comparison.md", "comparison.json", "comparison.png"} == {
        file.name for file in (tmp_path / "comparison").iterdir()
    }
    ours = json.loads((config.output / "run.json").read_text())
    other = ours | {"model": "other", "dtype": "bfloat16", "draw": ours["draw"] | {"temperature": 0.6}}
    (tmp_path / "slow/run.json").write_text(json.dumps(other | {"device": "unknown"}))
    compare(EvaluateConfig(compare=[tmp_path / "slow", config.output], output=tmp_path / "comparison"))
    report = (tmp_path / "comparison/comparison.md").read_text()
    assert (
        "\nThe runs were made with another dtype (bfloat16 and float32): what differs may come from that.\n" in report
    )
    assert "another temperature (0.6 and 0)" in report and report.count("made with another") == 2
    (tmp_path / "slow/run.json").write_text(json.dumps(ours | {"device": "CPU, then NVIDIA H200"}))
    compare(EvaluateConfig(compare=[tmp_path / "slow", config.output], output=tmp_path / "comparison"))
    report = (tmp_path / "comparison/comparison.md").read_text()
    assert "made with another device (CPU, then NVIDIA H200 and CPU)" in report and report.count("made with") == 1


def test_what_is_named_twice_is_asked_for_once() -> None:
    config = EvaluateConfig(tasks=["a,a"], load=MODEL, budgets=[64, 32, 64], thinking=["none", "none"])
    assert (config.tasks, config.budgets, config.thinking) == (["a"], [64, 32], ["none"])


def test_two_files_for_one_task_are_refused() -> None:
    """The last one would stand for both."""
    config = EvaluateConfig(tasks=["a", "b"], load=MODEL, data=["a=x.jsonl", "b=x.jsonl", "a=x.jsonl"])
    assert config.sources() == {"a": "x.jsonl", "b": "x.jsonl"}
    with pytest.raises(ConfigError, match=r"--data a=y\.jsonl: a is x\.jsonl already"):
        dataclasses.replace(config, data=[*config.data, "a=y.jsonl"]).sources()


def test_the_report_says_what_the_seconds_are_of(config: EvaluateConfig) -> None:
    evaluate(config)
    report = json.loads((config.output / "report.json").read_text())
    assert "format" not in report and report["device"] == "CPU" and re.fullmatch(r"20\d\d-\d\d-\d\d", report["date"])
    assert "\n- device: CPU\n" in (config.output / "report.md").read_text()


def test_a_run_remembers_on_what_its_answers_were_made(brief: EvaluateConfig, caplog: Any, monkeypatch: Any) -> None:
    def device_in(name: str) -> str | None:
        told: str | None = json.loads((brief.output / name).read_text()).get("device")
        return told

    evaluate(dataclasses.replace(brief, limit=1))
    assert device_in("run.json") == "CPU"
    monkeypatch.setattr("megatron_multiverse.model.device.device_name", lambda device: "GPU")
    evaluate(dataclasses.replace(brief, limit=1))  # asks for nothing, so nothing was made on another device
    assert device_in("run.json") == device_in("report.json") == "CPU" and "seconds" not in caplog.text
    with monkeypatch.context() as broken:
        broken.setattr(backends.EngineBackend, "answers", lambda self, jobs: iter([(jobs[0], GenerationError("no"))]))
        evaluate(brief)
    assert device_in("run.json") == "CPU"
    evaluate(brief)
    assert "holds answers made on CPU, further ones are made on GPU" in caplog.text
    assert device_in("run.json") == device_in("report.json") == "CPU, then GPU"
    evaluate(dataclasses.replace(brief, thinking=["parallel", "none"]))
    assert device_in("run.json") == "CPU, then GPU" and caplog.text.count("further ones") == 1
    file = brief.output / "run.json"
    file.write_text(
        json.dumps({name: value for name, value in json.loads(file.read_text()).items() if name != "device"})
    )
    evaluate(dataclasses.replace(brief, thinking=["parallel", "none", "sequential"]))  # a run of an earlier version
    assert device_in("run.json") == "unknown, then GPU"


def write(file: Path, samples: list[Sample]) -> None:
    file.write_text("".join(json.dumps(dataclasses.asdict(sample)) + "\n" for sample in samples))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "--tasks is missing"),
        ({"tasks": ["aime24"]}, "either --load"),
        ({"tasks": ["aime24"], "load": MODEL, "url": ["http://x"]}, "either --load"),
        ({"tasks": ["aime24"], "load": MODEL, "num_seeds": 0}, "--num-seeds must be at least 1"),
        ({"tasks": ["aime24"], "load": MODEL, "budgets": [0]}, "--budgets must be at least 1"),
        (
            {"tasks": ["aime24"], "load": MODEL, "budgets": [9, 32769]},
            "--budgets 32769 is above --draw.max-tokens 32768",
        ),
        ({"tasks": ["aime24"], "load": MODEL, "num_seeds": 2, "draw": DrawConfig(temperature=0)}, "all answers are"),
        ({"compare": [Path("a")]}, "--compare takes two"),
    ],
)
def test_options_that_cannot_work(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=r"--draw: top_p must lie in \(0, 1\], got 2.0"):
        DrawConfig(top_p=2.0)
    with pytest.raises(ConfigError, match=message):
        EvaluateConfig(**options)
