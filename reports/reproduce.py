"""Everything that is published about the shipped checkpoint, from prompts to figures, on as many GPUs as there are.

    python reports/reproduce.py --data ../shared/data --gpus 4

Each step is one command of ``lenvm`` or a script of ``benchmarks/``; this file says in which order they run and lets
GPUs share them. Finished steps are remembered in ``--work``, and the commands themselves go on where they were cut, so
that the same call can be given again after a kill. A step that fails takes only those down that need it.
``--plan`` prints the commands and runs none. Logs are ``WORK/logs/STEP.log``.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

RECIPE = "smollm2-135m-instruct"


@dataclass(frozen=True)
class Step:
    """A shell command. ``after``: steps it needs; ``gpus``: how many (``ALL``: every one); ``gives_way``: is
    stopped for any other step that lacks a GPU, and begun again."""

    name: str
    command: str
    after: tuple[str, ...] = ()
    gpus: int = 1
    gives_way: bool = False


ALL = -1


@dataclass
class Sizes:
    """How much of everything; ``smoke`` is seconds of each on a CPU, to see that all fits together."""

    samples: int = 64
    tasks: int = 100
    tuning: int = 32
    targets: str = "32,64,128,256,512,1024"
    prompts: int = 300
    extra: dict[str, str] = field(default_factory=dict)  # step (or its stem) -> more arguments

    @classmethod
    def smoke(cls, backbone: Path) -> Sizes:
        """Nothing that could be published, with a tiny backbone."""
        recipe = (
            f"--set backbone={backbone} --set rollouts.prompts.math=6 --set rollouts.prompts.code=6 "
            "--set rollouts.prompts.if=6 --set rollouts.samples=2 --set rollouts.valid_prompts=2 "
            "--set rollouts.max_rows=16 "
            "--set generator.max_new_tokens=48 --set branches.prompts=4 --set branches.sentences=4 "
            "--set branches.targets=[8,24] --set branches.max_new_tokens=24 --set branches.max_rows=8 "
            "--set train.batch_tokens=4096 --set train.micro_tokens=2048 --set train.compile=false "
            "--set branches.points=2 --set train.epochs=1"
        )
        few = f"--prompts 4 --max-new-tokens 48 --backbone {backbone}"
        small = f"--backbone {backbone} --batch-tokens 2048 --micro-tokens 2048 --seeds 1 --test-prompts 4 --prompts 4"
        return cls(
            2, 2, 1, "8", 6,
            {
                "sample": recipe, "guide": recipe, "branches": recipe, "train": recipe,
                "prompt-only": f"--set backbone={backbone} --set train.compile=false --set train.batch_tokens=2048 "
                "--set train.micro_tokens=2048 --set train.epochs=1",
                "test": few, "calibration": few,
                "prediction": "--probe-prompts 0", "conditional": "--max-new-tokens 32",
                "lifebench": "--front 2", "tradeoff": "--prompts 2 --samples 1 --max-new-tokens 32 --sets ifeval "
                "--least-pass 0", "tokens": "--resample 4 --min-count 2 --min-prompts 2 --no-examples",
                "precision": f"{small} --steps 1", "precision-train": few, "precision-test": few,
                "ablation": f"{small} --steps 1", "scaling": f"{small} --steps 1",
                "bench-rollout": "--prompts 2 --samples 1", "bench-training": "--tiny",
                "scheduling": "--requests 300 --seeds 2 --tuning-seeds 1",
            },
        )  # fmt: skip


def plan(options: argparse.Namespace) -> list[Step]:
    """All steps; what stands first runs first where both could.

    With ``--keep-model`` the checkpoint that is there is measured: what only makes a new one is left out.
    """
    sizes = Sizes.smoke(options.smoke) if options.smoke else Sizes()
    data, work, model, n = options.data, options.work, options.model, max(1, options.gpus)
    on = "cuda" if options.gpus else "cpu"
    fast = "bfloat16" if options.gpus else "float32"
    python = shlex.quote(sys.executable)
    lenvm = f"{python} -m lenvm_service.cli"
    out = f"--report {options.reports}/%s.json --figures {options.figures}"
    steps: list[Step] = []

    def add(name: str, command: str, *after: str, gpus: int = 1, gives_way: bool = False) -> str:
        stem = name.rsplit("/", 1)[0]
        more = sizes.extra.get(stem, sizes.extra.get(stem.partition(":")[0], ""))
        steps.append(Step(name, f"{command} {more}".strip(), after, gpus, gives_way))
        return name

    def each(name: str, command: str, *after: str) -> tuple[str, ...]:
        """A step in as many parts as there are GPUs; ``{part}`` in the command."""
        return tuple(add(f"{name}/{i + 1}", command.format(part=f"{i + 1}/{n}", i=i), *after) for i in range(n))

    recipe = f"train {RECIPE} --data {data} --work {work}/run --device {on}"
    stages = "valid,train" if options.keep_model else "valid,train,sentences"
    sampled = each("sample", f"{lenvm} {recipe} --only {stages} --part {{part}}")
    made: tuple[str, ...] = ()
    if not options.keep_model:
        guide = add("guide:1", f"{lenvm} {recipe} --only guide", *sampled)
        branches = each("branches:1", f"{lenvm} {recipe} --only branches --part {{part}}", guide)
        guide = add("guide:2", f"{lenvm} {recipe} --only guide-2", *branches)
        branches = each("branches:2", f"{lenvm} {recipe} --only branches-2 --part {{part}}", guide)
        many = f"{python} -m torch.distributed.run --standalone --nproc-per-node {n} -m lenvm_service.cli"
        made = (add("train", f"{many if n > 1 else lenvm} {recipe} --output {model}", *branches, gpus=ALL),)

    common = f"{lenvm} rollout --data {data} --device {on} --max-rows {3072 if options.gpus else 16}"
    test = each(
        "test",
        f"{common} --split test --samples {sizes.samples} --seed 7 --max-prompt-tokens 6144 --out {work}/test "
        "--part {part}",
        *sampled,
    )
    if not options.keep_model:
        held_out = each(
            "calibration",
            f"{common} --split calibration --samples 8 --seed 3 --out {work}/calibration --part {{part}}",
            *sampled,
        )
        fit = f"{lenvm} calibrate {model} --data {data} --rollouts {work}/calibration --device {on}"
        made = (add("calibrate", fit, *made, *held_out),)
    rival = add(
        "prompt-only",
        f"{lenvm} train smollm2-135m-prompt-only --rollouts {work}/run/rollouts-train --work {work}/prompt-only-run "
        f"--output {work}/prompt-only --device {on}",
        *sampled,
    )
    add(
        "prediction",
        f"{lenvm} eval prediction --data {data} --model {model} --test-rollouts {work}/test --train-rollouts "
        f"{work}/run/rollouts-train --prompt-encoder {work}/prompt-only --device {on} --update-card "
        + out
        % "prediction",
        *made,
        rival,
        *test,
    )
    _lifebench(add, lenvm, options, sizes, on, fast, out, made)
    _conditional(add, each, lenvm, options, sizes, on, fast, out, made)
    _tradeoff(add, lenvm, options, on, fast, out, made)
    add(
        "tokens",
        f"{lenvm} eval tokens --model {model} --rollouts {work}/test --answers 300 --device {on} --dtype {fast} "
        + out % "tokens",
        *made,
        *test,
    )
    _benchmarks(add, python, options, on, sampled)
    _scheduling(add, lenvm, python, options, on, made, test)
    _experiments(add, lenvm, options, on, out, (*sampled, *test))
    return steps


def _lifebench(add, lenvm, options, sizes, on, fast, out, made) -> None:  # type: ignore[no-untyped-def]
    base = (
        f"{lenvm} eval lifebench --data {options.data} --model {options.model} --device {on} --dtype {fast} "
        f"--targets {sizes.targets} --tasks {sizes.tasks} --tuning-tasks {sizes.tuning} "
        # Below what is asked of the test (8 nats, 5 %): a choice looks better on the tasks that it was made on.
        "--cost-cap 7.7 --forced-cap 0.03 --resample 4 "
        f"--tolerance 0.01,0.015,0.02 --min-eos-prob 0.001,0.002,0.004 --max-rows {options.guided_rows}"
    )
    guided = "posterior,posterior_resampled,paper_value,paper_length"
    gates = "unguided,unguided_resampled,eos_gate,eos_gate_resampled,force_eos"
    files = []
    for name, modes, kind in (
        ("equal-guided", guided, "equal_to"), ("equal-gates", gates, "equal_to"), ("most-guided", guided, "at_most"),
        ("least-guided", guided, "at_least"), ("most-gates", gates, "at_most"), ("least-gates", gates, "at_least"),
    ):  # fmt: skip
        files.append(f"{options.work}/lifebench-{name}.jsonl")
        add(f"lifebench:{name}", f"{base} --modes {modes} --kinds {kind} --work {files[-1]}", *made)
    everything = " ".join(f"--work {file}" for file in [f"{options.work}/lifebench.jsonl", *files])
    names = [f"lifebench:{Path(file).stem.partition('-')[2]}" for file in files]
    add("lifebench:report", f"{base} {everything} {out % 'lifebench'}", *names)


def _conditional(add, each, lenvm, options, sizes, on, fast, out, made) -> None:  # type: ignore[no-untyped-def]
    work = options.work
    base = (
        f"{lenvm} eval conditional --data {options.data} --model {options.model} --device {on} --dtype {fast} "
        f"--prompts {sizes.prompts} --samples {max(8, sizes.samples)} --pairs-per-prompt 5 --resample 4 "
        f"--max-rows {options.guided_rows}"
    )
    parts = each("conditional", f"{base} --part {{part}} --work {work}/conditional-{{i}}.jsonl", *made)
    files = " ".join(f"--work {work}/conditional-{i}.jsonl" for i in range(len(parts)))
    add("conditional:report", f"{base} --work {work}/conditional.jsonl {files} {out % 'conditional'}", *parts)


def _tradeoff(add, lenvm, options, on, fast, out, made) -> None:  # type: ignore[no-untyped-def]
    work = options.work
    base = (
        f"{lenvm} eval tradeoff --data {options.data} --model {options.model} --device {on} --dtype {fast} "
        f"--max-rows {options.guided_rows}"
    )
    first = f"{work}/tradeoff-none.jsonl"
    unguided = add("tradeoff:none", f"{base} --methods none --work {first}", *made)
    groups = {"tilt": "tilt", "most": "at_most", "rivals": "eos_gate,be_brief"}
    parts = [
        add(
            f"tradeoff:{name}",
            f"{base} --methods {methods} --work {work}/tradeoff-{name}.jsonl --also {first}",
            unguided,
        )
        for name, methods in groups.items()
    ]
    also = " ".join(f"--also {work}/tradeoff-{name}.jsonl" for name in ("none", *groups))
    add("tradeoff:report", f"{base} --work {work}/tradeoff.jsonl {also} {out % 'tradeoff'}", *parts)


def _benchmarks(add, python, options, on, sampled) -> None:  # type: ignore[no-untyped-def]
    rows = "--rows 3072 --guided-rows 1024" if options.gpus else "--rows 8"
    add(
        "bench-rollout",
        f"{python} benchmarks/rollout.py --data {options.data} --device {on} {rows} --report "
        f"{options.reports}/rollout_speed.json",
        *sampled,
    )
    add(
        "bench-training",
        f"{python} benchmarks/training.py --device {on} --variants dense,full --report "
        f"{options.reports}/training_speed.json",
        *sampled,
    )
    add(
        "bench-resume",
        f"{python} benchmarks/resume.py --rollouts {options.work}/run/rollouts-valid --device {on} --report "
        f"{options.reports}/resume.json" + (" --batch-tokens 512 --checkpoint-every 2" if options.smoke else ""),
        *sampled,
    )


def _scheduling(add, lenvm, python, options, on, made, test) -> None:  # type: ignore[no-untyped-def]
    lengths = f"{options.work}/lengths-test.jsonl.gz"
    add("lengths", f"{lenvm} rollout lengths {options.work}/test --out {lengths}", *test)
    add(
        "scheduling",
        f"{python} benchmarks/scheduling.py --lengths {lengths} --rollouts {options.work}/test --model {options.model} "
        f"--cache {options.work} --device {on} --report {options.reports}/scheduling.json",
        "lengths",
        *made,
    )


def _experiments(add, lenvm, options, on, out, after) -> None:  # type: ignore[no-untyped-def]
    """Many small models: they fill the GPUs that nothing else needs, and give way to what does."""
    work = options.work
    shared = f"--rollouts {work}/run/rollouts-train --test {work}/test --device {on}"
    base = f"{lenvm} eval ablation {shared} --steps 100 --seeds 2"
    groups = {"target": "target", "head": "head,order", "gamma": "gamma", "rest": "lambda"}
    parts = [
        add(f"ablation:{name}", f"{base} --only {only} --work {work}/ablation-{name}.jsonl", *after, gives_way=True)
        for name, only in groups.items()
    ]
    files = " ".join(f"{work}/ablation-{name}.jsonl" for name in groups)
    add(
        "ablation:report",
        f"cat {files} > {work}/ablation.jsonl && {base} --only {','.join(groups.values())} "
        f"--work {work}/ablation.jsonl {out % 'ablation'}",
        *parts,
    )
    # Of answers of its own: float32 takes its time, and the comparison needs few.
    rollout = f"{lenvm} rollout --data {options.data} --device {on} --max-rows {3072 if options.gpus else 16}"
    train = f"{rollout} --split train --prompts 1200 --samples 3 --out {work}/precision-train"
    test = f"{rollout} --split test --prompts 200 --samples 8 --seed 7 --out {work}/precision-test"
    add(
        "precision",
        f"{lenvm} eval ablation --rollouts {work}/precision-train --test {work}/precision-test --device {on} "
        f"--steps 60 --seeds 1 --only precision --work {work}/precision.jsonl "
        f"--report {options.reports}/precision.json",
        add("precision-train", train),
        add("precision-test", test),
        gives_way=True,
    )
    base = f"{lenvm} eval scaling {shared} --prompts 2500"
    axes = ("depth", "prompts", "samples")
    parts = [
        add(f"scaling:{axis}", f"{base} --axes {axis} --work {work}/scaling-{axis}.jsonl", *after, gives_way=True)
        for axis in axes
    ]
    files = " ".join(f"{work}/scaling-{axis}.jsonl" for axis in axes)
    add(
        "scaling:report",
        f"cat {files} > {work}/scaling.jsonl && {base} --work {work}/scaling.jsonl {out % 'scaling'}",
        *parts,
    )


class Scheduler:
    """Runs steps on GPUs, in the plan's order as far as needs and GPUs allow."""

    def __init__(self, steps: list[Step], work: Path, gpus: int) -> None:
        self.steps = {step.name: step for step in steps}
        self.work = work
        self.slots = list(range(max(1, gpus)))
        self.on_gpu = gpus > 0
        self.running: dict[str, tuple[subprocess.Popen[bytes], list[int], float]] = {}
        self.failed: set[str] = set()
        self.stopped: set[str] = set()  # those that gave way
        self.began = time.monotonic()
        for folder in ("done", "logs"):
            (work / folder).mkdir(parents=True, exist_ok=True)

    def run(self) -> int:
        """All steps; the number of those that failed or could not run."""
        while True:
            self._reap()
            while (step := self._next()) is not None:
                self._start(step)
            if not self.running:
                break
            time.sleep(0.2)
        missing = [name for name in self.steps if not self._is_done(name)]
        for name in missing:
            self._say(name, "FAILED" if name in self.failed else "not run")
        return len(missing)

    def _is_done(self, name: str) -> bool:
        return (self.work / "done" / name.replace("/", "-")).exists()

    def _next(self) -> Step | None:
        """The first step that can start now. While one waits for every GPU, nothing else starts."""
        ready = [step for step in self.steps.values() if self._is_ready(step)]
        for step in ready:
            if step.gpus != ALL:
                continue
            if not self.running:
                return step
            self._make_way(len(self.running))
            return None
        if ready and not self.slots:
            self._make_way(sum(not step.gives_way for step in ready))
        return ready[0] if ready and self.slots else None

    def _make_way(self, wanted: int) -> None:
        """Stop steps that give way until ``wanted`` are on their way out; they begin again later."""
        for name, (process, _, _) in self.running.items():
            if len(self.stopped) < wanted and self.steps[name].gives_way and name not in self.stopped:
                self.stopped.add(name)
                os.killpg(process.pid, signal.SIGTERM)

    def _is_ready(self, step: Step) -> bool:
        started = step.name in self.running or step.name in self.failed or self._is_done(step.name)
        return not started and all(self._is_done(name) for name in step.after)

    def _start(self, step: Step) -> None:
        count = len(self.slots) if step.gpus == ALL else 1
        slots, self.slots = self.slots[:count], self.slots[count:]
        # Small problems on the CPU (a calibration, a probe) crawl where every process takes every core.
        threads = str(max(1, min(8, (os.cpu_count() or 1) // (len(self.slots) + len(slots) or 1))))
        environment = {"OMP_NUM_THREADS": threads, "OPENBLAS_NUM_THREADS": threads, **os.environ}
        if self.on_gpu:
            environment["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, slots))
        with (self.work / "logs" / f"{step.name.replace('/', '-')}.log").open("ab") as log:
            log.write(f"$ {step.command}\n".encode())
            log.flush()
            process = subprocess.Popen(
                ["bash", "-c", step.command], stdout=log, stderr=log, env=environment, start_new_session=True
            )
        self.running[step.name] = (process, slots, time.monotonic())
        self._say(step.name, f"on {slots}")

    def _reap(self) -> None:
        for name, (process, slots, began) in list(self.running.items()):
            code = process.poll()
            if code is None:
                continue
            del self.running[name]
            self.slots = sorted([*self.slots, *slots])
            if name in self.stopped:
                self.stopped.remove(name)
                self._say(name, "gave way")
            elif code == 0:
                (self.work / "done" / name.replace("/", "-")).touch()
                self._say(name, f"done in {time.monotonic() - began:.0f} s")
            else:
                self.failed.add(name)
                self._say(name, f"FAILED with {code}: see {self.work}/logs")

    def _say(self, name: str, what: str) -> None:
        print(f"{time.monotonic() - self.began:7.1f} s  {name:24} {what}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, default=Path("runs/reproduce"))
    parser.add_argument("--model", type=Path, default=Path(f"models/zoo/{RECIPE}"))
    parser.add_argument("--reports", type=Path, default=Path("reports"))
    parser.add_argument("--figures", type=Path, default=Path("docs/figures"))
    parser.add_argument("--gpus", type=int, default=1, help="0: on the CPU")
    parser.add_argument("--guided-rows", type=int, default=512, help="guided answers in flight on each GPU")
    parser.add_argument("--keep-model", action="store_true", help="measure the checkpoint that is there")
    parser.add_argument("--only", default="", help="steps whose names begin so, commas between them; default: all")
    parser.add_argument("--smoke", type=Path, metavar="DIR", help="tiny sizes with this tiny backbone")
    parser.add_argument("--plan", action="store_true", help="print the steps and run none")
    options = parser.parse_args()
    steps = plan(options)
    if options.only:
        steps = [step for step in steps if step.name.startswith(tuple(options.only.split(",")))]
    if options.plan:
        for step in steps:
            print(f"# {step.name}, after {', '.join(step.after) or 'nothing'}\n{step.command}\n")
        return
    for folder in (options.reports, options.figures):
        folder.mkdir(parents=True, exist_ok=True)
    sys.exit(1 if Scheduler(steps, options.work, options.gpus).run() else 0)


if __name__ == "__main__":
    main()
