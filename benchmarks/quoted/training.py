"""What docs/training.md quotes from results."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.quoted import source
from benchmarks.report_training import ROWS, in_words, recomputed, two_gpus

ENGINES = ("one_process", "megatron")
CALL_BEFORE = {"TP2": 55_340, "DP2": 55_970}
"""Tokens per second and GPU in the call before that of the last results; commit 051ba62 has its results."""


def training() -> Iterator[str]:
    """docs/training.md: its tables of shares of the mask, of layouts of two GPUs, of rivals and of FP8."""
    for name, column in (("cpu", "area_over_mean"), ("h200", "time_over_mean")):
        rows = source.results(f"results/training_balance_{name}")
        for case in ("packed", "wide", "deep", "realistic"):
            cells = [source.rounded(row[column], 3) for row in rows if row["case"] == case]
            yield f"| {' | '.join(cells)} |"
    yield from _training_layouts()
    yield from _training_beside_others()
    yield from beside_fsdp_rows()
    yield from _large_model()
    yield from _training_fp8()
    yield from _checkpoints()
    yield from _resumed()


def _checkpoints() -> Iterator[str]:
    """What a checkpoint holds up, waited for and written beside the training."""
    found = source.results("results/checkpoint_cpu")
    yield f"{found['parameters'] / 1e6:.0f} million parameters ({found['gigabytes']:.2f} GB a checkpoint)"
    for name in ("wait_s", "next_step_s"):
        for engine in ENGINES:
            beside, waiting = (source.rounded(found[f"{engine}_{way}"][name], 1) for way in ("beside", "waiting"))
            yield f"{beside} s instead of {waiting} s"
    yield from _checkpoints_of_a_gpu(source.results("results/checkpoint_h200"))


def _checkpoints_of_a_gpu(found: dict[str, Any]) -> Iterator[str]:
    """The same on an H200, with what its first checkpoint makes."""
    size = found["gigabytes"]
    yield f"{found['cores']} cores, two layers"
    yield f"{found['parameters'] / 1e6:.0f} million parameters ({size:.2f} GB a checkpoint)"
    beside, waiting = ([found[f"{engine}_{way}"] for engine in ENGINES] for way in ("beside", "waiting"))
    for run, stands in zip(beside, waiting, strict=True):
        yield f"{run['wait_s']:.2f} s instead of {stands['wait_s']:.1f} s"
        assert f"{run['copy_s']:.2f}" == "0.15"

    def both(name: str, unit: str, scale: float = 1, digits: int = 1) -> str:
        first, second = (f"{scale * run[name]:.{digits}f}{unit}" for run in beside)
        return f"{first} and {second}"

    yield f"next step takes {both('next_step_s', '', 1e3, 0)} ms, where steps before the save take"
    yield f"before the save take {both('step_s', '', 1e3, 0)}"
    yield f"whole {both('save_s', '')} s after a save began"
    yield f"without any checkpoint in {found['plain_write_s']:.1f} s"
    yield f"holds it up for {both('first_wait_s', ' s')}: of these {both('first_copy_s', ' s')} are the copy"
    yield f"which later takes {beside[0]['copy_s']:.2f} s"
    yield f"the kernel clears {size:.1f} GB"


def _resumed() -> Iterator[str]:
    """A run over NCCL that was stopped half way beside one that was not."""
    runs = source.results("results/training_resume_h200")
    for found in runs:
        assert found["losses_equal"] and found["grad_norms_equal"] and found["weights_differing"] == 0
        assert found["gpus"] == 2 and found["model"] == "qwen2.5-7b, 1 layers" and found["steps"] == 6
    layouts = " and ".join(found["layout"] for found in runs)
    yield f"two H200, {layouts}, one layer of Qwen2.5-7B: after 3 of 6 steps"


def _training_fp8() -> Iterator[str]:
    """Two tables: what FP8 saves of a step, and its loss beside the noise of bf16."""
    for row in source.results("results/training_fp8_h200"):
        mean, largest = (f"{100 * row[f'{name}_distance']:.1f} %" for name in ("mean", "largest"))
        if row["rows"] == "1 x 8192 packed" and row["way"] != "bf16":
            yield f"| {row['way'].replace('fp8', 'FP8')} | {row['last_loss']:.3f} | {mean} | {largest} |"
        elif row["way"].startswith("fp8"):
            yield f"| {row['way'].replace('fp8', 'FP8')} | {row['time_beside_first']:.2f} |"


def _training_layouts() -> Iterator[str]:
    """Rows of the table of layouts, and of longer rows beside it."""
    titles = {
        "DP2": "DP2, distributed optimizer",
        "TP2+SP": "TP2 + SP",
        "CP2 a2a": "CP2, all-to-all",
        "CP2 all_gather": "CP2, all-gather",
        "PP2 interleaved": "PP2, interleaved",
        "ZeRO-3 DP2": "ZeRO 3, DP2",
        "ZeRO-3 CP2": "ZeRO 3, CP2",
    }
    every = [
        row
        for row in source.results("results/training_layouts_h200")
        if row["gpus"] == 2 and row["model"] == "qwen2.5-7b, 4 layers"
    ]
    for row in (row for row in every if row["rows"] == "2 x 65536 packed"):
        yield f"{row['tokens_per_s_per_gpu']:,.0f}"
    rows = [row for row in every if row["rows"] == "4 x 32768 packed"]
    for row in sorted(rows, key=lambda row: -row["tokens_per_s_per_gpu"]):
        title = titles.get(row["layout"], row["layout"])
        yield f"| {title} | {row['tokens_per_s_per_gpu']:,.0f} | {row['mfu_visible']:.2f} | {row['peak_gib']:.1f} |"
    difference = source.short(max(row["loss_difference"] for row in rows), 0)
    yield f"differ from those of the first layout of the same call by {difference} of their value at most"
    now = {row["layout"]: row["tokens_per_s_per_gpu"] for row in rows}
    more, less = (100 * (CALL_BEFORE[name] / now[name] - 1) for name in ("TP2", "DP2"))
    yield f"TP2 trained {more:.0f} % more tokens a second and DP2 {-less:.0f} % less"
    (zero,) = (row for row in rows if row["layout"] == "ZeRO-3 CP2")
    yield f"its losses of ten steps lay within {source.short(zero['loss_difference'], 0)} of an earlier DP2's"


def _large_model() -> Iterator[str]:
    """What a step of 32B would take, by two and by four of its layers on two GPUs."""
    runs = source.results("results/training_layouts_h200")
    two, four = (next(row for row in runs if row["model"] == f"qwen2.5-32b, {layers} layers") for layers in (2, 4))
    assert two["rows"] == four["rows"] == "2 x 32768 packed" and two["layout"] == four["layout"] == "TP2+SP"
    yield f"{two['s_per_step']:.3f} s a step with 2 layers and {four['s_per_step']:.3f} s with 4"
    yield f"MFU {two['mfu_visible']:.2f} and {four['mfu_visible']:.2f}"
    layer = (four["s_per_step"] - two["s_per_step"]) / 2 / 2  # two layers more, two rows
    around = two["s_per_step"] / 2 - 2 * layer
    row = 2 * (64 * layer + around)  # GPU-seconds of two GPUs
    yield f"a layer takes {layer:.3f} s a row, what stands around the layers {around:.3f} s"
    yield f"all 64 layers would take {row:.1f} GPU-seconds a row"
    yield f"would take {500 * 16 * row / 8 / 3600:.1f} hours on eight H200"


def beside_fsdp_rows() -> Iterator[str]:
    """docs/training.md: half of a model on two GPUs, fastest first for each kind of rows."""
    rows = two_gpus(source.results("results/training_layouts_h200"))
    for kind in ROWS:
        of_kind = [row for row in rows if row["rows"] == kind and "result" not in row]
        for row in sorted(of_kind, key=lambda row: -row["tokens_per_s_per_gpu"]):
            yield (
                f"| {in_words(kind)} | {row['layout']} | {recomputed(row)} | {row['tokens_per_s_per_gpu']:,.0f} | "
                f"{row['mfu_visible']:.2f} | {row['peak_gib']:.1f} |"
            )
    yield from _zero_beside_fsdp({row["layout"]: row for row in rows if row["rows"] == "2 x 16384 packed"})
    yield f"is {beside_fsdp():.1f} times as fast as transformers under FSDP2 at 32K"
    one, two = (
        next(
            row
            for row in source.results("results/training_layouts_h200")
            if row["gpus"] == gpus and "16384" in row["model"]
        )
        for gpus in (1, 2)
    )
    yield f"CP2 takes {two['s_per_step']:.3f} s a step and one GPU {one['s_per_step']:.3f} s"
    yield f"two GPUs are {one['s_per_step'] / two['s_per_step']:.2f} times as fast as one"


def _zero_beside_fsdp(runs: dict[str, dict[str, Any]]) -> Iterator[str]:
    """What ZeRO 3 gains and takes beside two forms of transformers under FSDP2; runs of one call by layout."""
    fsdp = "transformers, dense mask, FSDP2"
    zero, whole, chunks = (runs[name] for name in ("ZeRO-3 DP2", fsdp, f"{fsdp}, loss in chunks"))
    assert zero["command"] == whole["command"] == chunks["command"] and zero["commit"] == whole["commit"]
    assert zero["recompute"] == "none" and whole["recompute"] == chunks["recompute"] == "full"
    fastest = max(row["tokens_per_s_per_gpu"] for row in (whole, chunks))
    yield (
        f"is {zero['tokens_per_s_per_gpu'] / fastest:.1f} times as fast, and takes {zero['peak_gib']:.1f} GiB beside "
        f"their {whole['peak_gib']:.1f} and, with their loss in chunks of 2,048 tokens, {chunks['peak_gib']:.1f}"
    )


def beside_fsdp() -> float:
    """How many times as fast as transformers under FSDP2 the fastest layout of two GPUs is at 32K tokens."""
    rows = [row for row in two_gpus(source.results("results/training_layouts_h200")) if "x 32768 " in row["rows"]]
    ours, theirs = (
        max(row["tokens_per_s_per_gpu"] for row in rows if ("transformers" in row["layout"]) == is_theirs)
        for is_theirs in (False, True)
    )
    return float(ours / theirs)


def _training_beside_others() -> Iterator[str]:
    """The table of what others take, longer rows last, and of one wide row."""
    rows = source.results("results/training_beside_transformers_h200")
    four = [row for row in rows if row["model"] == "qwen2.5-7b, 4 layers"]
    runs = {(row["case"], row["tokens"], row["runner"]): row for row in four}
    for tokens, times in ((8192, " times as long"), (16384, ""), (32768, "")):
        ours, theirs, causal = (
            runs["packed", tokens, name]
            for name in ("ours", "transformers, dense mask, checkpointing", "ours with TE causal attention")
        )
        yield (
            f"| {tokens:,} | {ours['tokens_per_s']:,.0f} | {theirs['time_beside_ours']:.2f}{times} | "
            f"{causal['time_beside_ours']:.2f} | {ours['peak_gib']:.1f}, {theirs['peak_gib']:.1f} | "
            f"{100 * ours['scan_and_data_share']:.1f} % |"
        )
    wide = runs["wide", 16384, "ours with TE causal attention"]
    yield f"On one wide row of 16,384 tokens plain causal attention takes {wide['time_beside_ours']:.2f} times as long"
    ours, causal = (
        next(row for row in rows if (row["model"], row["runner"]) == ("qwen2.5-7b, 13 layers", name))
        for name in ("ours", "ours with TE causal attention")
    )
    assert ours["case"] == causal["case"] == "wide" and ours["tokens"] == causal["tokens"] == 32768
    yield (
        f"and 13 layers, plain causal attention takes {causal['s_per_step'] / ours['s_per_step']:.2f} times as long as "
        f"ours ({causal['s_per_step']:.3f} s and {ours['s_per_step']:.3f} s a step)"
    )
    ten = {(row["tokens"], row["runner"]): row for row in rows if row["model"] == "qwen2.5-7b, 10 layers"}
    ours, at_once = ten[16384, "ours"], ten[16384, "ours, loss of all tokens at once"]
    theirs = ten[16384, "transformers, dense mask, checkpointing"]
    yield (
        f"at 16,384 tokens: {ours['tokens_per_s']:,.0f} tokens/s, {theirs['time_beside_ours']:.1f} times as many as "
        "theirs"
    )
    yield f"scan and loader take {100 * ours['scan_and_data_share']:.1f} % of a step"
    yield (
        f"took {at_once['time_beside_ours']:.3f} times as long in a call of its own, and "
        f"{at_once['peak_gib'] - ours['peak_gib']:.1f} GiB more than chunks do"
    )
    yield from _short_rows(ten)
    yield from _memory_with_recompute(ten)
    peaks = [f"{runs['packed', tokens, 'ours, full recompute']['peak_gib']:.1f}" for tokens in (8192, 16384, 32768)]
    yield f"all layers recomputed took {peaks[0]}, {peaks[1]} and {peaks[2]} GiB at 8,192, 16,384 and 32,768 tokens"


def _short_rows(runs: dict[tuple[int, str], dict[str, Any]]) -> Iterator[str]:
    """Ten layers beside plain causal attention, and at 8,192 tokens beside all else; runs by tokens and runner."""
    ours, at_once, theirs = (
        runs[8192, name]
        for name in ("ours", "ours, loss of all tokens at once", "transformers, dense mask, checkpointing")
    )
    shares = [runs[tokens, "ours with TE causal attention"]["time_beside_ours"] for tokens in (8192, 16384, 32768)]
    yield f"plain causal attention takes {shares[0]:.2f}, {shares[1]:.2f} and {shares[2]:.2f} times as long as ours"
    yield f"At 8,192 tokens theirs takes {theirs['time_beside_ours']:.1f} times as long"
    yield f"scan and loader take {100 * ours['scan_and_data_share']:.2f} % of a step"
    yield (
        f"took {at_once['time_beside_ours']:.3f} times as long and "
        f"{ours['peak_gib'] - at_once['peak_gib']:.1f} GiB less"
    )


def _whole_model_recomputed() -> float:
    """How many times as fast as theirs 28 layers would be at 16K tokens, from what 4 and 10 of them take."""
    rows = source.results("results/training_beside_transformers_h200")

    def seconds(runner: str) -> float:
        four, ten = (
            next(
                row["s_per_step"]
                for row in rows
                if (row["runner"], row["tokens"], row["case"]) == (runner, 16384, "packed")
                and row["model"] == f"qwen2.5-7b, {layers} layers"
            )
            for layers in (4, 10)
        )
        return float(ten + 18 * (ten - four) / 6)

    return seconds("transformers, dense mask, checkpointing") / seconds("ours, full recompute")


def _memory_with_recompute(runs: dict[tuple[int, str], dict[str, Any]]) -> Iterator[str]:
    """The table of ours without, with some and with all recompute and of theirs; runs by tokens and runner."""
    again = ("ours, three in five layers recomputed", "ours, full recompute")
    names = ("ours", *again, "transformers, dense mask, checkpointing")
    of = {tokens: [runs[tokens, name] for name in names] for tokens in (8192, 16384, 32768)}
    assert len({(run["command"], run["commit"]) for four in of.values() for run in four}) == 1
    for ours, some, every, theirs in of.values():
        assert every["peak_gib"] < some["peak_gib"] < min(ours["peak_gib"], theirs["peak_gib"])
        assert ours["s_per_step"] < some["s_per_step"] < every["s_per_step"] < theirs["s_per_step"]
    assert [ours["peak_gib"] > theirs["peak_gib"] for ours, _, _, theirs in of.values()] == [True, True, False]

    def each(values: list[float], digits: int = 1) -> str:
        first, second, third = (source.rounded(round(value, 3), digits) for value in values)
        return f"{first}, {second} and {third}"

    seconds = {tokens: [run["s_per_step"] for run in four] for tokens, four in of.items()}
    yield f"and is {seconds[32768][3] / seconds[32768][0]:.1f} times as fast"
    yield f"costs {each([100 * (some / ours - 1) for ours, some, *_ in seconds.values()], 0)} % of time"
    below = each([theirs["peak_gib"] - some["peak_gib"] for _, some, _, theirs in of.values()])
    times = each([theirs / some for _, some, _, theirs in seconds.values()])
    yield f"stays below theirs at all three lengths, by {below} GiB, and is {times} times as fast"
    yield f"is still {each([theirs / every for _, _, every, theirs in seconds.values()])} times as fast"
    yield f"All 28 layers recomputed would be {_whole_model_recomputed():.1f} times as fast as theirs at 16,384 tokens"
    for tokens, four in of.items():
        cells = [f"{run['tokens_per_s']:,.0f} tokens/s, {source.rounded(run['peak_gib'], 1)} GiB" for run in four]
        yield f"| {tokens:,} | {' | '.join(cells)} |"
