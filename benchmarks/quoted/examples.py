"""What the examples and docs/rl.md quote from results."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from benchmarks.quoted import source

OWN = "../examples/paper_in_miniature/results/"
"""Results of the miniature, from this folder."""


def rl() -> Iterator[str]:
    """docs/rl.md."""
    toy = source.results("results/rl_toy_cpu")
    assert {name.rpartition("_")[0] for name in toy} == {"learns", "control"} and len(toy) == 6, "from three seeds"
    assert all(rewards[-1] > 0.99 for name, rewards in toy.items() if name.startswith("learns"))
    steps = [row for row in source.results("results/rl_quickstart_h200") if row["kind"] == "train"]
    models = source.results("results/rl_quickstart_h200_compared")["models"]
    before, after = models["runs/rl/sft/model"], models["runs/rl/seed_1/model"]

    def forks(family: str) -> list[float]:
        return [100 * of["by_family"][family]["forks"] for of in (before, after)]

    yield f"{len(steps)} steps of {steps[0]['answers']} answers, one seed"
    yield "fork in {1:.0f} % of held-out answers instead of {0:.0f} %".format(*forks("narrow"))
    yield "wide ones in {1:.0f} % instead of {0:.0f} %; they take".format(*forks("wide"))
    steps_less, time_less = after["net_speedup_steps"], after["net_speedup"]
    yield f"they take {steps_less:.2f} times fewer steps and {time_less:.2f} times less wall clock"
    yield f"and {100 * after['accuracy']:.0f} % instead of {100 * before['accuracy']:.0f} % are right"
    models = source.results("results/rl_quickstart_seeds_h200_compared")["models"]
    before, *seeds = models.values()
    trained = {row["seed"] for row in source.results("results/rl_quickstart_seeds_h200") if row["kind"] == "train"}
    assert len(seeds) == len(trained) == 3 and all(of["by_family"]["narrow"]["forks"] == 0 for of in seeds)
    clock, steps_less = ([of[name] for of in seeds] for name in ("net_speedup", "net_speedup_steps"))
    yield f"{min(clock):.2f} to {max(clock):.2f} times less wall clock per right answer"
    yield f"{min(steps_less):.2f} to {max(steps_less):.2f} times fewer steps; "
    yield f"{100 * min(of['accuracy'] for of in seeds):.0f} % are right instead of {100 * before['accuracy']:.0f} %"
    steps = [row for row in source.results("results/rl_quickstart_cpu") if row["kind"] == "train"]
    drawn = {
        family: [100 * row[name] for row in steps if (name := f"trigger_ratio/{family}") in row]
        for family in ("narrow", "wide")
    }
    yield f"fork in {drawn['narrow'][-1]:.0f} % of answers instead of {drawn['narrow'][0]:.0f} %"
    yield f"wide ones in {drawn['wide'][-1]:.0f} % instead of {drawn['wide'][0]:.0f} %"
    models = source.results("results/rl_quickstart_cpu_compared")["models"]
    before, after = models["before"], models["after"]
    yield f"take {after['net_speedup_steps']:.2f} times fewer steps per right answer"
    yield f"and {after['net_speedup']:.2f} times less wall clock"
    yield f"right are {100 * after['accuracy']:.0f} % instead of {100 * before['accuracy']:.0f} %"
    usual, rounded = source.results("results/rl_rounding_h200")["runs"]
    yield f"[{100 * rounded['ratio_far']:.2f} %](../benchmarks/results/rl_rounding_h200.json)"
    yield f"have such a ratio instead of {100 * usual['ratio_far']:.2f} %"
    first = [100 * run["first_step_ratio_far"] for run in (rounded, usual)]
    yield "in the first step {:.3f} % instead of {:.3f} %".format(*first)
    rows, tree = source.results("results/rl_shared_prefix_h200")
    yield f"[{tree['speedup']:.1f} times](../benchmarks/results/rl_shared_prefix_h200.md) as fast"
    yield f"it takes {tree['peak_gib']:.0f} GiB, where rows one after the other take {rows['peak_gib']:.0f}"
    yield f"on an H200, {rows['peak_gib']:.1f} and {tree['peak_gib']:.1f} GiB, it says"
    (drawn,) = source.results("results/rl_rollouts_h200")
    yield f"[{drawn['tokens_per_s_drawing']:,.0f} tokens/s](../benchmarks/results/rl_rollouts_h200.md)"
    yield f"the bare engine's {drawn['tokens_per_s_bare']:,.0f}; with the hand-over"
    yield f"grades it is {drawn['whole_over_bare']:.2f} of that"


def evaluation() -> Iterator[str]:
    """docs/evaluation.md."""
    found = source.results("results/evaluators_agree_cpu")
    for package in found["packages"]:
        name, _, version = package.partition("==")
        yield f"{name.partition('[')[0]} {version}"
    assert len(found["beside_completions"]) == 4, "this tool's chat, lm-eval's completions and chat, evalscope's chat"
    (same,) = {count for counts in found["beside_completions"].values() for count in counts.values()}
    yield f"[{same} of {found['questions']} answers](../benchmarks/results/evaluators_agree_cpu.json)"
    yield f"{found['right']} of which are right"


def quickstart() -> Iterator[str]:
    """examples/quickstart/README.md."""
    report = source.results("results/quickstart_cpu")
    modes = ("parallel", "sequential", "autoregressive")
    yield (
        f"packages installed: {report['total_seconds']:.0f} seconds, the first answer after "
        f"{report['first_answer_seconds']:.0f}."
    )
    right = [f"{100 * report[name]:.0f} %" for name in ("accuracy", "accuracy_sequential", "accuracy_autoregressive")]
    rows = {
        "right answers": right,
        "tokens per answer": [f"{report[f'tokens_per_answer_{mode}']:.0f}" for mode in modes],
        "decode steps per answer": [f"{report[f'decode_steps_per_answer_{mode}']:.0f}" for mode in modes],
        "seconds per answer, one at a time": [f"{report[f'seconds_per_answer_{mode}']:.2f}" for mode in modes],
        "seconds for all 100, batched": [f"{report[f'batch_seconds_{mode}']:.1f}" for mode in modes],
    }
    for name, cells in rows.items():
        yield f"| {name} | {' | '.join(cells)} |"
    (steps, clock), (plain_steps, plain_clock) = (
        [report[f"net_speedup_{unit}{rival}"] for unit in ("steps", "wall_clock")]
        for rival in ("", "_over_autoregressive")
    )
    yield f"num_parallel is {report['num_parallel']:.2f}."
    yield f"{steps:.2f} in steps and {clock:.2f} in wall clock over one branch at a time"
    yield f"and {plain_steps:.2f} and {plain_clock:.2f} over thinking without blocks"
    yield f"one teacher-forced forward pass by at most {source.short(report['max_abs_logit_difference'], 1)}."
    yield "right are {:.0f} % of those with 6 expressions, {:.0f} % with 8 and {:.0f} % at depth 3".format(
        *(100 * report[f"accuracy_{kind}"] for kind in ("6_expressions", "8_expressions", "depth_3"))
    )
    yield f"Of {report['larger_problems']} larger problems of each kind"
    trained = source.results("../examples/quickstart/model/accuracy")
    yield f"accuracy on {trained['num_problems']:,} problems ({100 * trained['accuracy']:.1f} %)"


def quickstart_model() -> Iterator[str]:
    """examples/quickstart/model/README.md."""
    report = source.results("../examples/quickstart/model/accuracy")
    assert report["parallel_equals_sequential"], "or do not say that every token is the same"
    right = [f"{100 * report[name]:.1f} %" for name in ("accuracy", "accuracy_sequential", "accuracy_autoregressive")]
    for name, share in zip(
        (
            "2 to 4 expressions, depth up to 2; in parallel",
            "the same, one branch at a time (same tokens, every one)",
            "the same, without blocks",
        ),
        right,
        strict=True,
    ):
        yield f"| {name} | {report['num_problems']:,} | {share} |"
    for kind, name in (
        ("6_expressions", "6 expressions, depth up to 2"),
        ("8_expressions", "8 expressions, depth up to 2"),
        ("depth_3", "2 or 3 expressions, depth 3"),
    ):
        yield f"| {name}; in parallel | {report['larger_problems']:,} | {100 * report[f'accuracy_{kind}']:.0f} % |"


def miniature() -> Iterator[str]:
    """examples/paper_in_miniature/README.md, whose other tables are made by its paper_report.py."""
    trials = source.results("results/miniature_trials_h200")
    eight = {name: 100 * run["right"]["chains-8"] / trials["problems"] for name, run in trials["1600_steps"].items()}
    whole = f"{eight['multiverse-0']:.0f} and {eight['multiverse-1']:.0f}"
    yield f"right in {eight['looks-back']:.0f} % of 8 chains, the whole recipe in {whole}"
    for name, run in trials["learning_rate"].items():
        yield f"| {name} | {run['loss']['240']:.3f} | {run['loss']['480']:.3f} |"
    run = source.results(f"{OWN}multiverse-0")
    yield f"{run['training_s'] + run['evaluation_s']:.0f} s as one of four on a GPU"
    yield f"`models/` ({2 * run['parameters'] / 1e6:.0f} MB for each run, in bf16)"
    yield f"one run: {run['tokens'] / 1e6:.0f}M tokens, then the evaluation"
    yield f"Each evaluation asks {len(run['sets']['chains-8']['right'])} problems of each size"
    found = source.results("results/miniature_lookup_h200")
    for text, loss in found["losses"].items():
        yield f"| {text} | " + " | ".join(f"{loss[step]:.4f}" for step in ("200", "300", "500", "700"))
    for number in (6, 8, 12):
        gaps = found["accuracy without gaps in labels"], {name: run["right"] for name, run in found["accuracy"].items()}
        seeds = ("multiverse-0", "multiverse-1")
        yield f"| {number} chains | " + " | ".join(
            ", ".join(f"{100 * runs[seed][f'chains-{number}'] / 32:.0f}" for seed in seeds) for runs in gaps
        )
    first, *others = (f"{source.results(f'{OWN}plain-{seed}')['loss']:.4f}" for seed in range(3))
    yield f"are {first}, {' and '.join(others)} instead of {found['accuracy']['plain-0']['loss']:.4f}"
    yield from _labelled_lists()
    yield from _closings()
    yield from _deeper()
    looks = source.results("results/miniature_qk_norm_h200")["runs"]
    tied, untied = looks["tied embeddings, no QK norm"], looks["untied embeddings, QK norm"]
    yield f"from {tied['loss']['1300']:.3f} to {untied['loss']['1300']:.3f}"


def _labelled_lists() -> Iterator[str]:
    """What lists with labels have changed, and what training once more changes."""
    found = source.results("results/miniature_labelled_lists_h200")

    def now(kind: str, name: str) -> list[int]:
        runs = (source.results(f"{OWN}{kind}-{seed}") for seed in range(3))
        return [sum(run["sets"][name]["right"]) for run in runs]

    def percent(right: Sequence[int]) -> str:
        return ", ".join(f"{100 * count / found['problems']:.0f}" for count in right)

    for name in ("chains-6", "chains-8", "chains-12", "variables-4"):
        task, number = name.split("-")
        before = [found["right"][f"multiverse-{seed}"][name] for seed in (0, 1)]
        yield f"| {number} {task} | {percent(before)} | {percent(now('multiverse', name))} |"
    twice = {kind: now(kind, "chains-8") for kind in ("multiverse", "tagged", "plain")}
    least = f"right in {min(twice['multiverse'])} of 32 problems or more"
    yield f"{least}, the best tagged one in {max(twice['tagged'])}, the best plain one in {max(twice['plain'])}."
    again = found["again"]["right"]["multiverse-0"]
    for name, title in (("chains-12", "12 chains"), ("variables-5", "5 variables")):
        yield f"{percent([again[name]])} % of {title}"
        yield f"instead of {percent(now('multiverse', name)[:1])}"
    yield from _wall_clock()


def _closings() -> Iterator[str]:
    """What a model writes behind the blocks that it has closed."""
    found = source.results("results/miniature_closings_cpu")
    deeper = found["sets"]["variables-5"]
    assert deeper["paths"]["right"] == deeper["paths"]["of"] and not any(deeper["right"]), "or do not say so"
    yield f"In {len(deeper['right'])} of these problems `{found['run']}`, trained once more, begins all"
    yield f"begins all {deeper['paths']['of']} paths as it should"
    for name in ("variables-4", "variables-5"):
        counts = (found["sets"][name]["closings"][levels] for levels in "1234")
        cells = (f"{count['right']} of {count['of']}" for count in counts)
        yield f"| right behind them, {name[-1]} variables | {' | '.join(cells)} |"
    fourth = deeper["closings"]["4"]
    yield f"Behind four levels stands `</Think>` with the answer, {fourth['ended']} of {fourth['of']} times"
    third = [line for line in deeper["wrong"] if line["levels"] == 3]
    for line in third:
        assert line["written"] == line["outermost"][:-1] + line["right"][-1] != line["right"], "or do not say so"
    yield f"Behind three, all {len(third)} of the wrong verdicts have"
    yield f"and the right sign: `{third[0]['written']}` for `{third[0]['right']}`"
    assert found["model"]["right"]["variables-5"] == 0 and found["model"]["run"] == found["run"]


def _deeper() -> Iterator[str]:
    """What links back do for searches deeper than trained."""

    def right(run: str) -> int:
        return sum(source.results(f"{OWN}{run}")["sets"]["variables-5"]["right"])

    linked = [right(f"{run}-{seed}") for run in ("back-links", "low-trees") for seed in (0, 1)]
    assert linked == [32] * 4, "or do not say so"
    yield f"In all four runs all {linked[0]}"
    yield f"right in {right('tagged-back-links-0')} of 32 and plain text in {right('plain-back-links-0')}"
    runs = source.results("results/miniature_deeper_h200")["runs"]
    six, seven = (
        [sum(runs[f"low-trees-{seed}"]["sets"][f"variables-{number}"]["right"]) for seed in (0, 1)] for number in (6, 7)
    )
    yield f"are right in {six[0]} and {six[1]} of 32 searches of 6 variables"
    yield f"and in {seven[0]} and {seven[1]} of 32 of 7"


def _wall_clock() -> Iterator[str]:
    """How far the times of single answers lie apart."""
    modes = source.results(f"{OWN}alone")["modes"]
    ours, plain = ([row for row in modes[mode] if row["chains"] == 4] for mode in ("parallel", "plain"))
    net = [theirs["seconds"] / row["seconds"] for row, theirs in zip(ours, plain, strict=True)]
    yield f"the net speedup at 4 paths is between {min(net):.2f} and {max(net):.2f}"
    # In milliseconds: the shortest time per step of each, over as many steps as the answers have.
    of_four = [min(1000 * row["seconds"] / row["critical"] for row in rows) for rows in (plain, ours)]
    shortest = of_four[0] * sum(row["tokens"] for row in plain) / (of_four[1] * sum(row["critical"] for row in ours))
    yield f"by the shortest times per step of both it would be {shortest:.2f}"
    yield f"where these took {of_four[0]:.2f} and {of_four[1]:.2f} at best"
    steps = sum(row["tokens"] for row in plain) / sum(row["critical"] for row in ours)
    yield f"a plain answer of 4 chains has {steps:.2f} times as many as one in parallel"
    graphs = {case: graph for case, (_, _, graph) in source.small_steps("a504396").items()}
    yield f"The GPU alone takes {graphs['1x0']} and {graphs['1x4']} ms"
