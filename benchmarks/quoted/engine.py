"""What docs/engine.md and docs/layers.md quote from results."""

from __future__ import annotations

from collections.abc import Iterator
from statistics import median
from typing import Any

from benchmarks.quoted import source
from benchmarks.report_blocks import decode_steps, ideal_speedup, speedup_by_steps
from megatron_multiverse.model.families import preset


def engine() -> Iterator[str]:
    """docs/engine.md."""
    soak = source.results("results/engine_soak_h200")
    assert soak["missing_pages"] == 0 and soak["logprob_off"] < soak["tolerance"]
    yield f"{soak['answers']:,} answers, {soak['checked_tokens']:,} tokens checked"
    yield from _fp8()
    yield from _blocks()
    yield from _drawing()
    yield from _small_and_short()
    yield from _beside_vllm()
    yield from _uneven()
    yield from _parts()
    yield from _chunks()
    yield from _tiles()
    found = source.results("results/fp8_logits_cpu")
    right = found["right_answers"]["fp8"] * found["problems"]
    yield (
        f"model logits move by {100 * found['fp8']['relative']:.1f} % of their spread, where bf16 moves them by "
        f"{100 * found['bf16']['relative']:.1f} %, and {right:.0f} of {found['problems']} held-out problems stay right"
    )
    fuzz = source.results("results/fuzz_cpu")
    yield f"{fuzz['distinct_trees']:,} different trees and {fuzz['soup_engines']:,} engines of tag soup"
    row = next(
        row for row in source.results("results/small_sums_h200") if row["rows"] == 1 and row["hidden_size"] == 3584
    )
    yield f"{row['sum_norm_us']:.1f} us for one row of Qwen2.5-7B on two H200"
    torch_us, nccl_us = row["symmetric_memory_us"], row["nccl_us"]
    yield f"symmetric memory up to 512 KiB ({torch_us:.1f} us), and larger ones NCCL ({nccl_us:.1f} us"
    alone = source.results("results/engine_tp2_h200")["decode"][0]
    yield (
        f"Qwen2.5-7B takes {alone['tp2_ms']:.2f} ms a step on two H200 and {alone['one_gpu_ms']:.2f} on one, with sum "
        f"and norm apart {alone['tp2_with_sum_and_norm_apart_ms']:.2f}"
    )
    yield from _forks_under_load()
    yield from _host_steps()


def _host_steps() -> Iterator[str]:
    """The host's time for the steps of a block: of each commit the smallest of its runs' medians."""
    runs = source.results("results/host_blocks_cpu")["runs"]
    before, after = (
        {kind: min(run["kinds"][kind]["median_ms"] for run in runs if run["label"] == label) for kind in run["kinds"]}
        for run, label in ((runs[0], runs[0]["label"]), (runs[-1], runs[-1]["label"]))
    )
    kinds = ("after fork", "after end of a path", "fork", "join")
    new, old = ([source.rounded(found[kind], 2) for kind in kinds] for found in (after, before))
    yield (
        f"The step after a fork of four paths takes the host {new[0]} ms in place of {old[0]}, one after the end of a "
        f"path {new[1]} in place of {old[1]}, the one that forks {new[2]} in place of {old[2]} and the one that joins "
        f"{new[3]} in place of {old[3]}, a plain one {source.rounded(after['plain'], 2)}"
    )


def _fp8() -> Iterator[str]:
    """Weights in FP8."""
    bf16, fp8 = (source.results("results/engine_fp8_h200")[name]["rows"] for name in ("decode", "fp8"))
    yield (
        f"takes {fp8[0]['ms_per_step']:.2f} ms at batch 1 and {fp8[-1]['ms_per_step']:.2f} at 32, in bf16 "
        f"{bf16[0]['ms_per_step']:.2f} and {bf16[2]['ms_per_step']:.2f}"
    )
    layer = source.results("kernels/results/fp8_products_h200")
    faster = [_sum_of(layer, "widened_us", n) / _sum_of(layer, "scaled_mm_us", n) for n in (48, 128, 2048)]
    yield (
        f"{faster[0]:.1f} times as fast as widening the weights in each call at 48 rows, {faster[1]:.1f} times at "
        f"128 and {faster[2]:.1f} times at 2,048"
    )
    many = source.results("results/engine_fp8_h200")["fp8_many_rows"]["rows"][0]
    (plain,) = (
        row["ms_per_step"]
        for row in source.results("results/engine_h200")["decode"]
        if (row["model"], row["batch"]) == ("qwen2.5-7b", 128)
    )
    yield (
        f"at batch 128 a step takes {many['ms_per_step']:.2f} ms ({many['tokens_per_second']:,.0f} tokens/s), with "
        f"bf16 weights [{plain:.2f}](../benchmarks/results/engine_h200.json)"
    )


def _blocks() -> Iterator[str]:
    """What blocks save and cost, and steps that are held for them."""
    layer = source.results("kernels/results/fp8_products_h200")
    blocks = source.results("results/engine_blocks_h200")
    rows, before = blocks["rows"], blocks["before"]["rows"]
    shares = {
        n: [row["speedup_per_parallel"] for row in rows if row.get("batch") == n and row.get("branches")]
        for n in (1, 8, 32)
    }
    yield (
        f"{min(shares[1]):.2f} to {max(shares[1]):.2f} of num_parallel at batch 1, {max(shares[8]):.2f} down to "
        f"{min(shares[8]):.2f} at 8 and {max(shares[32]):.2f} down to {min(shares[32]):.2f} at 32"
    )
    yield "take {:.0f} us for 48 rows, {:.0f} for 128 and {:.0f} for 256".format(
        *(_sum_of(layer, "bf16_us", n) for n in (48, 128, 256))
    )
    shared, whole = (
        next(row["seconds"] for row in found if row["case"] == "speedup, batch 8, num_parallel 2")
        for found in (rows, blocks["keys_read_by_each_row"]["rows"])
    )
    yield (
        f"those figures are of {shared:.3f} s, and a commit that let each of the 24 rows read all of its keys took "
        f"{whole:.3f}"
    )
    yield from _step_shares(rows)
    eight, many = (_ideal_share(batch) for batch in (8, 32))
    yield f"would keep {eight} at batch 8 and {many} at 32"
    held = source.results("results/engine_held_steps_h200")
    more = [min(row["held"]) - min(row["ahead"]) for row in held["decode"]["rows"]]
    waits = [min(row["in_turn"]) - min(row["ahead"]) for row in held["decode"]["rows"]]
    yield (
        f"Qwen2.5-7B takes {more[0]:.2f} ms more at batch 1 and at most {max(more[1:]):.2f} at 8 and 32, a step in "
        f"turn {min(waits):.1f} to {max(waits):.1f} ms more"
    )
    link = "(../benchmarks/results/engine_held_steps_h200.json)"
    joints = [[row for row in found if "fork_and_join_ms" in row] for found in (before, rows)]
    yield "took {:.1f} ms with overlap and {:.1f} in turn".format(*(row["fork_and_join_ms"] for row in joints[0]))
    joint, in_turn = joints[1]
    assert (len(joint["runs_ms"]), len(in_turn["runs_ms"])) == (7, 3)
    yield (
        f"They take {joint['fork_and_join_ms']:.1f} ms with overlap, {joint['in_steps']:.2f} steps, in seven runs "
        f"between {min(joint['runs_ms']):.1f} and {max(joint['runs_ms']):.1f} ms (commit {joint['commit']}), and "
        f"{in_turn['fork_and_join_ms']:.1f} in turn, {in_turn['in_steps']:.2f} steps ({in_turn['commit']}, three runs)"
    )
    waits = [[joint["turns"][kind][f"gpu_{part}_ms"] for kind in ("fork", "join")] for part in ("idle", "copy")]
    yield "{:.1f} ms at the fork and {:.1f} at the join until its copies are known".format(*waits[0])
    yield "another {:.1f} and {:.1f} until the list of work is made".format(*waits[1])
    apart, once = (held["fork_and_join"][name] for name in ("held", "alike_once"))
    yield (
        f"took [{once['fork_and_join_ms']:.1f} ms]{link}, and {apart['fork_and_join_ms']:.1f} until what the paths "
        "begin with alike was computed once"
    )


def _step_shares(rows: list[dict[str, Any]]) -> Iterator[str]:
    """What the times of steps alone would leave of num_parallel, and how much of that is kept."""
    steps = decode_steps("qwen2.5-7b")
    forked = {n: [row for row in rows if row.get("batch") == n and row.get("branches")] for n in (8, 32)}
    bound = {n: [speedup_by_steps(row, steps) / row["num_parallel"] for row in forked[n]] for n in forked}
    kept = {
        n: [100 * row["speedup_per_parallel"] / share for row, share in zip(forked[n], bound[n], strict=True)]
        for n in forked
    }
    yield (
        f"would give {bound[8][0]:.2f} down to {bound[8][-1]:.2f} at batch 8 and {bound[32][0]:.2f} down to "
        f"{bound[32][-1]:.2f} at 32"
    )
    yield f"keeps {min(kept[8]):.0f} to {max(kept[8]):.0f} % of that"
    yield f"at 32 {min(kept[32]):.0f} to {max(kept[32]):.0f} %"
    lost = bound[32][-1] - forked[32][-1]["speedup_per_parallel"]
    yield f"160 rows in place of 32 cost {1 - bound[32][-1]:.2f}, and forks, joins and all else {lost:.2f}"


def _small_and_short() -> Iterator[str]:
    """Steps that the host decides: small models, and prompts call by call."""
    before, after = source.small_steps("b874601"), source.small_steps("a504396")
    text, block = (zip(after[case], before[case], strict=True) for case in ("1x0", "1x4"))
    steps, hosts, graphs = ([*one, *four] for one, four in zip(text, block, strict=True))
    yield "a step takes {} ms instead of {}, one of a block's four paths {} instead of {}".format(*steps)
    yield "The host takes {} ms instead of {} and {} instead of {}".format(*hosts)
    yield "the graphs {} instead of {} and {} instead of {}".format(*graphs)
    lists = {
        (case["rows"], case["paths"], case["prefix"]): [
            source.rounded(case[build]["ms"], 2) for build in ("after", "before")
        ]
        for case in source.results("results/work_list_cpu")["cases"]
    }
    yield (
        "For 96 paths, three of each request after 1,024 tokens, the host takes {} ms per step on average for the list "
        "instead of {}, for 160 in eights after 4,096 tokens {} instead of {}"
    ).format(*lists[96, 3, 1024], *lists[160, 8, 4096])
    grammar = source.results("results/grammar_cpu")
    yield (
        f"The bits of {grammar['ids']:,} ids, a vocabulary made up for this, take the host "
        f"{grammar['mask_us_median']:.0f} us in the median of {grammar['tokens']:,} tokens of JSON, and "
        f"{grammar['mask_us_95_percent']:.0f} or less in 95 % of them"
    )
    rows = source.results("results/engine_prompts_h200")["rows"]
    of = {(row["model"], row["tokens"], row["by"]): row["ms"] for row in rows}
    graph, by_list = "graph with FlashAttention", "graph with the list of work"
    small, large = "qwen2.5-1.5b", "qwen2.5-7b"
    yield (
        f"of 1,000 tokens after {of[small, 1000, graph]:.1f} ms by a graph and {of[small, 1000, 'calls']:.1f} call by "
        f"call, of 2,048 after {of[small, 2048, graph]:.1f} and {of[small, 2048, 'calls']:.1f}; 7B of 640 after "
        f"{of[large, 640, graph]:.1f} and {of[large, 640, 'calls']:.1f}, of 1,000 after {of[large, 1000, graph]:.1f} "
        f"and {of[large, 1000, 'calls']:.1f}"
    )
    yield (
        f"prompt of 250 tokens takes {of[small, 250, by_list]:.1f} ms by the list and {of[small, 250, graph]:.1f} by "
        f"FlashAttention, one of 500 {of[small, 500, by_list]:.1f} and {of[small, 500, graph]:.1f}"
    )


def _beside_vllm() -> Iterator[str]:
    """Blocks with their join, and text with its prompts, beside vLLM in one run."""
    runs = source.results("results/beside_vllm_h200")["runs"]

    def of(part: str, side: str, name: str, size: int | None = None) -> float:
        """Median; `size`: requests at once, or tokens of a prompt."""
        key = "context" if part.startswith("prompts") else "batch"
        found = [run[name] for run in runs if (run["part"], run["side"], run["case"].get(key)) == (part, side, size)]
        return float(median(found))

    for part, rival, words in (
        (
            "block",
            "vllm",
            "within the paths takes {:.2f} ms and vLLM's {:.2f} ({:.2f}), the whole block {} s and {} ({})",
        ),
        ("long", "vllm long", "after 65,536 tokens {:.2f} ms and {:.2f} ({:.2f}), and {} s and {} ({})"),
    ):
        step, whole = ([of(part, side, name) for side in ("ours", rival)] for name in ("ms_per_step", "seconds"))
        yield words.format(
            *step, step[0] / step[1], *(source.rounded(value, 2) for value in (*whole, whole[0] / whole[1]))
        )
    sides = ("ours small", "vllm small", "vllm small earlier runner")
    (ours, *theirs), (our_first, *first), (our_step, *their_steps) = (
        [of("decode", side, name, 128) for side in sides] for name in ("seconds", "begun_seconds", "ms_per_step")
    )
    yield (
        f"take {ours:.2f} s, in vLLM {min(theirs):.2f}: {our_first:.2f} until the last has begun (vLLM "
        f"{min(first):.2f}), then {our_step:.2f} ms a step ({min(their_steps):.2f})"
    )
    whole, begun = (
        [of("decode-7b", side, name, 128) for side in ("ours", "vllm")] for name in ("seconds", "begun_seconds")
    )
    yield f"of 7B {whole[0]:.2f} s and {whole[1]:.2f}, since its prompts take {begun[0]:.2f} and {begun[1]:.2f}"
    for part, names in (("prompts", sides), ("prompts-7b", ("ours", "vllm"))):
        times = []
        for tokens in (300, 1000, 4000):
            mine, *others = (1e3 * of(part, side, "begun_seconds", tokens) for side in names)
            times.append(f"{mine:.0f} ms ({min(others):.0f})")
        yield ", ".join(times[:-1]) + f" and {times[-1]}"


def _uneven() -> Iterator[str]:
    """Prompts of unequal length beside vLLM: medians, its faster runner for the small model."""
    runs = source.results("results/beside_vllm_uneven_h200")["runs"]

    def of(part: str, batch: int) -> tuple[float, float]:
        """Milliseconds of a step: ours, vLLM's."""
        found = [run for run in runs if run["part"] == part and run["case"]["batch"] == batch]
        sides = dict.fromkeys(run["side"] for run in found)
        mine, *others = (median(run["ms_per_step"] for run in found if run["side"] == side) for side in sides)
        return mine, min(others)

    few, many, small, more = (of(part, batch) for part in ("uneven-7b", "uneven") for batch in (32, 128))
    yield "a step of 7B takes {:.2f} ms with 32 requests ({:.2f}) and {:.2f} with 128 ({:.2f})".format(*few, *many)
    yield "of 1.5B {:.2f} ({:.2f}) and {:.2f} ({:.2f})".format(*small, *more)


def _parts() -> Iterator[str]:
    """Sums that the norm adds up, in place of the last program that shares them: how much of a step that saves."""
    found = source.results("results/engine_parts_h200")["last call"]
    small, large, larger = (
        [100 * (1 - median(runs["norm w16" if "norm w16" in runs else "new"]) / median(runs["old"])) for runs in cases]
        for cases in ([found[name][batch] for batch in ("1", "8", "32")] for name in found if "fp8" not in name)
    )
    yield (
        f"makes a step of Qwen2.5-1.5B {min(small):.0f} to {max(small):.0f} % shorter at batch 1 to 32, one of 7B "
        f"{min(large):.0f} to {max(large):.0f} %, and sixteen layers of 32B {min(larger):.0f} to {max(larger):.0f} %"
    )


def _chunks() -> Iterator[str]:
    """How many tokens of prompts a step takes."""
    runs = {(run["model"], run["max_step_tokens"]): run for run in source.results("results/engine_chunks_h200")["runs"]}
    small, large = ([runs[f"qwen2.5-{size}", tokens] for tokens in (2048, 8192)] for size in ("1.5b", "7b"))
    of_large, of_small = (
        (*(median(run["seconds"]) for run in found), *(run["longest_step_ms"] for run in found))
        for found in (large, small)
    )
    yield (
        "take {:.2f} s with 2,048 tokens a step and {:.2f} with 8,192 in Qwen2.5-7B on an H200, where the longest step "
        "takes {:.0f} and {:.0f} ms".format(*of_large)
    )
    yield "1.5B takes {:.2f} and {:.2f} s, {:.0f} and {:.0f} ms".format(*of_small)


def _tiles() -> Iterator[str]:
    """Attention of paths that share their prompt."""
    found = source.results("kernels/results/tree_decode_tiles_h200")["cases"]
    cases = {case["case"]: (case["new_padded_us"], case["old_padded_us"]) for case in found}
    three, five, three_long, five_long = (
        cases[f"32 trees x {paths}, {keys}K + 123"] for keys in (1, 4) for paths in (3, 5)
    )
    yield "{:.1f} us instead of {:.1f} for 32 requests of three paths after 1,024 tokens and {:.1f}".format(
        *three, five[0]
    )
    yield "instead of {:.1f} for five, {:.1f} instead of {:.1f} and {:.1f} instead of {:.1f} after 4,096".format(
        five[1], *three_long, *five_long
    )
    longer = [name for name, (new, old) in cases.items() if new > old]
    assert longer == ["8 rows, 512 + 256", "8 rows, 512 + 251"], f"kernels/tree_decode/README.md names others: {longer}"


def _drawing() -> Iterator[str]:
    """What drawing tokens with filters costs."""
    found = source.results("kernels/results/draw_h200")

    def shown(rows: int, logits: str, asked: str, way: str = "ours_us") -> str:
        """Microseconds of one case."""
        (row,) = (row for row in found if (row["rows"], row["logits"], row["asked"]) == (rows, logits, asked))
        return f"{row[way]:,.0f}"

    three = ("top-p 0.95", "top-k 20", "top-k 20, top-p 0.8")
    ours = [shown(32, "peaked", asked) for asked in three]
    sorting = [shown(32, "peaked", asked, "plain_us") for asked in three]
    yield f"at commit {found[0]['commit']}, 32 rows"
    yield f"temperature alone takes {shown(32, 'flat', 'temperature')} us"
    yield (
        f"nearly all of the mass, {ours[0]} us (top-p 0.95), {ours[1]} (top-k 20) and {ours[2]} (both: top-k 20, top-p "
        f"0.8), where torch, which sorts, takes {sorting[0]}, {sorting[1]} and {sorting[2]}"
    )
    yield (
        f"top-k 20 takes {shown(32, 'flat', three[1])} us, with top-p 0.8 {shown(32, 'flat', three[2])}; at one row "
        f"{shown(1, 'flat', three[1])} and {shown(1, 'flat', three[2])}, which is more than the "
        f"{shown(1, 'flat', three[1], 'plain_us')} of sorting"
    )
    yield f"{sum(row['tokens_that_differ'] for row in found)} of {sum(row['tokens'] for row in found):,} tokens differ"
    greedy, warm, _, both = (row["ms_per_step"] for row in source.results("results/engine_draw_h200")["decode"])
    yield (
        f"take {warm['1']:.2f} ms at batch 1 with a temperature and {warm['32']:.2f} at 32, greedy {greedy['1']:.2f} "
        f"and {greedy['32']:.2f}, with top-k 20 and top-p 0.8 {both['1']:.2f} and {both['32']:.2f}"
    )


def _forks_under_load() -> Iterator[str]:
    """Whether forks pay under load."""
    mixed = source.results("load/results/load_h200_7b")["traces"]["mixed"]
    never, always, ours = (mixed[policy]["summaries"] for policy in ("never fork", "always fork", "by step time"))

    def times(name: str, others: dict[str, Any]) -> list[float]:
        """Smallest and largest of ours over theirs, seed by seed."""
        ratios = [ours[seed][name] / others[seed][name] for seed in ours]
        return [min(ratios), max(ratios)]

    goodput = "goodput_tokens_per_second"
    low, high = times(goodput, never)
    yield f"three seeds give {low:.2f} to {high:.2f} times the tokens of never forking within 50 ms of each other"
    low, high = times(goodput, always)
    yield f"{low:.1f} to {high:.1f} times those of always"
    yield f"at most {max(times('serial_gap_p99_ms', never)):.2f} times that of never"


def _sum_of(rows: list[dict[str, Any]], name: str, count: int) -> float:
    """Of all products with so many rows."""
    total: float = sum(row[name] for row in rows if row["rows"] == count)
    return total


def _ideal_share(batch: int) -> str:
    """What would be left of num_parallel at this batch if only bytes counted, over all cases that fork."""
    found = source.results("results/engine_blocks_h200")
    shape, context = preset(found["environment"]["model"]), int(found["environment"]["context"].replace(",", ""))
    rows = [row for row in found["rows"] if row.get("batch") == batch and row.get("branches")]
    shares = [ideal_speedup(row, shape, context) / row["num_parallel"] for row in rows]
    return f"{min(shares):.2f} to {max(shares):.2f}"


def layers() -> Iterator[str]:
    """docs/layers.md: its table of one layer beside megatron-core's stock one."""
    cases = [("bf16", "bf16, megatron-core 0.16.1", "0.16.1"), ("bf16", "bf16, megatron-core 0.19.2", "0.19.2")]
    cases += [
        (mode, mode.replace("fp8", "FP8"), "0.16.1")
        for mode in ("bf16, full recompute", "fp8 tensorwise", "fp8 blockwise")
    ]
    for mode, title, version in cases:
        rows = [row for row in source.results(f"kernels/results/layer_mcore_{version}_h200") if row["mode"] == mode]
        stock = min((row for row in rows if row["layer"].startswith("stock")), key=lambda row: row["ms"])
        (ours,) = (row for row in rows if row["layer"].startswith("ours") and row["layout"] == "realistic")
        yield (
            f"| {title} | {source.rounded(stock['ms'], 1)} ms | {source.rounded(ours['ms'], 1)} ms | "
            f"{ours['time_ratio']:.2f} | +{100 * (ours['memory_ratio'] - 1):.1f} % |"
        )
