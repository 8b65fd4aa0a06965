"""A training run from a config to an exit code: assemble, announce, train, report.

The order is chosen for the first step to come soon. Everything that can refuse the run comes
first and needs no compiler: devices, mesh, rules, batch, the folder. Then two things that take
seconds go on side by side: a thread opens the data (and imports grain) while the step is traced
and compiled; the initial state is built while the compiler works on the step.

Everything for people goes to stderr. The last line on stdout is one JSON object.
"""

from __future__ import annotations

import json
import os
import sys
import time
import zlib
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import closing, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import jax
import numpy as np

from meshwright.models.config import count_parameters
from meshwright.models.pure import functional
from meshwright.sharding.errors import (
    CheckpointError,
    ConfigError,
    MissingExtraError,
)
from meshwright.sharding.processes import fetch, started
from meshwright.sharding.report import decisions_table
from meshwright.sharding.topology import Topology
from meshwright.sharding.units import format_bytes
from meshwright.train.checkpoint import Checkpoints
from meshwright.train.config import TrainConfig
from meshwright.train.configfile import dump
from meshwright.train.explain import layout_of, totals_of
from meshwright.train.flops import flops_per_token, peak_flops
from meshwright.train.loop import Loop, Outcome
from meshwright.train.metrics import Metrics
from meshwright.train.parallelism import (
    check_batch,
    choose_dtype,
    choose_mesh,
    choose_places,
    describe_devices,
    without_absent_axes,
)
from meshwright.train.program import Program, step_spec
from meshwright.train.progress import Progress
from meshwright.train.relayout import Reordering
from meshwright.train.runfolder import RunFolder
from meshwright.train.state import TrainState
from meshwright.train.stopping import StopSignals

__all__ = ["run_training"]


_DATA_PATIENCE_SECONDS = 0.3
_LONGEST_PATH_BYTES = 4096
_SAME_EVERYWHERE = (
    *("steps", "batch_size", "grad_accum", "eval_every", "eval_batches", "checkpoint_every"),
    *("log_every", "resume"),
)


@dataclass(frozen=True)
class _Run:
    """A run's parts, assembled."""

    config: TrainConfig
    program: Program
    folder: RunFolder
    checkpoints: Checkpoints
    opening: Future[Any]
    started: float


@dataclass
class _Start:
    """Where a run begins: a fresh state or a restored one."""

    state: TrainState
    extra: dict[str, Any]
    notes: list[str]


def run_training(config: TrainConfig) -> int:
    """Train as the config says.

    Args:
        config: the whole run.

    Returns:
        The exit code: 0 done, 143 or 130 stopped by a signal after saving.

    Raises:
        MeshwrightError: anything the user can mend; carries its exit code.
    """
    started = _process_start()
    _check_extras(config)
    devices = Topology.parse(config.topology).devices()
    on_cpu = devices[0].platform == "cpu"
    _use_compilation_cache(config)
    spec = choose_mesh(config, len(devices), simulated=on_cpu)
    if config.resume:
        config, left_out = without_absent_axes(config, spec)
        for name in left_out:
            _say(f"mesh {spec} has no axis for the setting `{name}`: it is as by default now")
    model = functional(config.model, choose_places(config, spec))
    layout = layout_of(config, model, spec)
    check_batch(config, layout.rules, spec)
    dtype = choose_dtype(config, on_cpu=on_cpu)
    _check_same({"mesh": spec, **{name: getattr(config, name) for name in _SAME_EVERYWHERE}})
    folder = _open_folder(config)
    if config.resume:
        folder.check_model(config.model)
    program = Program.prepare(config, step_spec(config, model, layout, spec.build(devices), dtype))
    checkpoints = Checkpoints(folder.checkpoints, config.keep_last, config.keep_best)
    try:
        with ThreadPoolExecutor(1, thread_name_prefix="data") as background:
            opening = background.submit(_open_data, config, program.rows_dealt())
            background.submit(checkpoints.prepare)
            _raise_early(opening)
            _announce(config, program, folder, describe_devices(devices))
            program.start()
            run = _Run(config, program, folder, checkpoints, opening, started)
            return _train(run)
    except BaseException:
        # A run that was refused leaves no folder behind; one with anything in it stays.
        if _speaks():
            with suppress(OSError):
                folder.path.rmdir()
        raise


def _train(run: _Run) -> int:
    config, program, folder = run.config, run.program, run.folder
    with (
        StopSignals() as stop,
        closing(run.checkpoints) as checkpoints,
        Path(os.devnull).open("w", encoding="utf-8") as quiet,
    ):
        start = _begin(config, program, checkpoints)
        corpus, batches, heldout = run.opening.result()
        prompt = _sample_prompt(config, corpus.tokenizer)
        for line in (_describe_data(corpus), *start.notes):
            _say(line)
        _check_same(batches.state())
        first = int(start.state.step)
        if config.resume:
            batches.restore(start.extra["data"])
            if first >= config.steps:
                _say(f"nothing to do: {first} of {config.steps} steps are done; raise --steps")
        with (
            batches,
            _open_metrics(config, folder, first) as metrics,
            Progress(config.steps, start=first, stream=None if _speaks() else quiet) as progress,
        ):
            loop = Loop(
                config=config,
                program=program,
                batches=batches,
                heldout=heldout,
                checkpoints=checkpoints,
                metrics=metrics,
                progress=progress,
                stop=stop,
                process_start=run.started,
                extra={
                    **start.extra,
                    "mesh": str(program.spec.layout.mesh),
                    "places": list(program.spec.model.places),
                },
                profile_folder=folder.profile,
                peak_tokens_per_second=_peak_tokens(config),
            )
            state, outcome = loop.run(start.state)
    if not outcome.exit_code:
        _show_sample(config, program, corpus.tokenizer, prompt, state)
    _report(config, program, folder, outcome)
    return outcome.exit_code


def _open_folder(config: TrainConfig) -> RunFolder:
    """The run's folder, which process 0 finds and makes for all."""
    if jax.process_count() == 1:
        return RunFolder.open(config.out, config.model.name, config.resume)
    from jax.experimental import multihost_utils

    name = np.zeros(_LONGEST_PATH_BYTES, np.uint8)
    if jax.process_index() == 0:
        path = RunFolder.open(config.out, config.model.name, config.resume).path
        text = str(path).encode()
        name[: len(text)] = np.frombuffer(text, np.uint8)
    name = np.asarray(multihost_utils.broadcast_one_to_all(name))
    return RunFolder(Path(name.tobytes().rstrip(b"\0").decode()))


def _check_same(facts: dict[str, Any]) -> None:
    """Refuse processes that were started for another run than process 0, or with other data.

    Raises:
        ConfigError: on those that differ.
    """
    if jax.process_count() == 1:
        return
    from jax.experimental import multihost_utils

    digest = {name: zlib.crc32(str(value).encode()) for name, value in facts.items()}
    mine = np.array(list(digest.values()), np.uint32)
    theirs = np.asarray(multihost_utils.broadcast_one_to_all(mine))
    pairs = zip(digest, mine, theirs, strict=True)
    differing = [name for name, own, other in pairs if own != other]
    if differing:
        raise ConfigError(
            f"process {jax.process_index()} was not started for the same run as process 0",
            where=f"{differing[0]} is {facts[differing[0]]} here",
            why=f"other on process 0: {', '.join(differing)}",
            fix="start all processes with the same flags, where the same training data is",
        )


def _open_metrics(config: TrainConfig, folder: RunFolder, first: int) -> Metrics:
    """Where records go: of several processes, those of process 0 to the run's folder."""
    if not _speaks():
        return Metrics(Path(os.devnull))
    folder.write_config(dump(config))
    return Metrics(
        folder.metrics,
        tensorboard=folder.tensorboard if config.tensorboard else None,
        resumed_step=first if config.resume else None,
    )


def _raise_early(opening: Future[Any]) -> None:
    """Refuse unreadable data before the compiler is started, where that is known by now."""
    done, _ = wait([opening], timeout=_DATA_PATIENCE_SECONDS)
    if done:
        opening.result()


def _begin(config: TrainConfig, program: Program, checkpoints: Any) -> _Start:
    if not config.resume:
        return _Start(program.init(), {}, [])
    shapes = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        program.shapes,
        program.shardings,
    )
    model = program.spec.model

    def reordering(extra: dict[str, Any]) -> Reordering:
        return Reordering(extra.get("places", ()), model.places, len(model.layers))

    restored = checkpoints.restore(shapes, reordering)
    if "data" not in restored.extra:
        raise CheckpointError(
            "cannot resume: the checkpoint holds no data position",
            why=f"step {restored.step} was not saved by a training run",
            fix="resume from a run's own folder",
        )
    said = f"resumed at step {restored.step}, saved on mesh {restored.extra.get('mesh')}"
    return _Start(restored.state, dict(restored.extra), [*restored.notes, said])


def _open_data(config: TrainConfig, block: tuple[int, int]) -> tuple[Any, Any, Any]:
    """Corpus, training batches and a function that makes a pass over the held-out ones.

    Args:
        config: the run.
        block: which block of rows this process reads, and how many there are.
    """
    from meshwright.train.batches import Batches, heldout_batches
    from meshwright.train.corpus import open_corpus

    corpus = open_corpus(config.data, seq_len=config.seq_len, vocab_size=config.model.vocab_size)
    batches = Batches(
        corpus.train,
        config.batch_size,
        seed=config.seed,
        process_index=block[0],
        process_count=block[1],
        microbatches=config.grad_accum,
    )
    batches.start()

    def heldout() -> Any:
        return heldout_batches(
            corpus.heldout,
            config.batch_size,
            config.eval_batches,
            process_index=block[0],
            process_count=block[1],
            microbatches=config.grad_accum,
        )

    return corpus, batches, heldout


def _use_compilation_cache(config: TrainConfig) -> None:
    """Keep compiled programs between runs; a cache that is set up already is left alone."""
    if config.compilation_cache == "off" or jax.config.values["jax_compilation_cache_dir"]:
        return
    home = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = config.compilation_cache or str(Path(home) / "meshwright" / "programs")
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def _announce(config: TrainConfig, program: Program, folder: RunFolder, devices: str) -> None:
    """Say what was decided and derived, before anything runs."""
    if not _speaks():
        return
    from rich.console import Console

    layout, dtype = program.spec.layout, program.spec.compute_dtype
    console = Console(stderr=True, width=None if sys.stderr.isatty() else 160)
    strategies = " + ".join(f"{name}({axis})" for name, axis in layout.rules.strategies)
    tokens = config.batch_size * config.seq_len
    itemsize = jax.numpy.dtype(dtype).itemsize
    totals = totals_of(layout, grad_accum=config.grad_accum, compute_itemsize=itemsize)
    parameters = count_parameters(config.model)
    lines = [
        f"model      {config.model.name}, {parameters:,} parameters",
        f"devices    {devices}",
        f"mesh       {layout.mesh}: {strategies}",
        f"step       {config.batch_size} rows × {config.seq_len} tokens = {tokens:,} tokens"
        f" in {config.grad_accum} microbatch(es), {jax.numpy.dtype(dtype).name} compute",
        f"optimizer  {config.optimizer.name}, learning rate {config.optimizer.learning_rate:g}, "
        f"{config.optimizer.schedule}, {config.optimizer.warmup_for(config.steps)} warm-up steps",
        f"a device   {format_bytes(totals.state_bytes)} of state: parameters "
        f"{format_bytes(totals.parameters_bytes)}, gradients "
        f"{format_bytes(totals.gradients_bytes)}, optimizer "
        f"{format_bytes(totals.optimizer_bytes)}",
        f"out        {folder.path}",
    ]
    console.print("\n".join(lines), highlight=False, markup=False)
    tables = [("params", layout.working), ("optimizer", layout.masters)]
    console.print(decisions_table("", tables))


def _describe_data(corpus: Any) -> str:
    facts = corpus.description
    lines = [
        f"data       {facts['source']}: {facts['documents']:,} documents, "
        f"{format_bytes(facts['bytes'])}, tokenizer {facts['tokenizer']}",
        f"           {facts['train_tokens']:,} tokens to train on, "
        f"{facts['heldout_tokens']:,} held out ({facts['split']})",
    ]
    return "\n".join([*lines, *(f"           {note}" for note in facts["notes"])])


def _peak_tokens(config: TrainConfig) -> float | None:
    """Tokens/s at the devices' peak (full-attention convention), where the chip is known."""
    peak = peak_flops(jax.devices()[0].device_kind)
    if peak is None:
        return None
    return peak * jax.device_count() / flops_per_token(config.model, config.seq_len)


def _check_extras(config: TrainConfig) -> None:
    """Refuse at once what would be missing only after the compiler has run.

    Raises:
        MissingExtraError: with the install command.
    """
    needed = ["grain", *(["tensorboardX"] if config.tensorboard else [])]
    for package in needed:
        if find_spec(package) is None:
            instead = ", or --no-tensorboard" if package == "tensorboardX" else ""
            raise MissingExtraError(
                f"`meshwright train` needs the package `{package}`",
                why="it comes with the extra `train`, which is not installed",
                fix=f"pip install 'meshwright[train]' (-e '.[train]' in a checkout){instead}",
            )


def _sample_prompt(config: TrainConfig, tokenizer: Any) -> list[int]:
    """The tokens a sample starts from; one end of document where the prompt is empty.

    Raises:
        ConfigError: text that is no text, or a sample longer than the model reads.
    """
    try:
        prompt = [int(token) for token in tokenizer.encode(config.sample_prompt)]
    except UnicodeError:
        raise ConfigError(
            "cannot start the sample",
            where="--sample-prompt",
            why="it is not Unicode text",
            fix="use another prompt, or --sample-tokens 0",
        ) from None
    prompt = prompt or [tokenizer.end_id]
    room = config.model.max_length - len(prompt)
    if config.sample_tokens > room:
        raise ConfigError(
            f"cannot sample {config.sample_tokens} tokens",
            where=f"sample_tokens={config.sample_tokens}, "
            f"model.max_length={config.model.max_length}",
            why=f"the prompt has {len(prompt)} tokens, which leaves room for {room}",
            fix=f"use --sample-tokens {max(room, 0)} or less, or a larger --model.max-length",
        )
    return prompt


def _show_sample(
    config: TrainConfig, program: Program, tokenizer: Any, prompt: list[int], state: TrainState
) -> None:
    if not config.sample_tokens:
        return
    from meshwright.models.sampling import generate

    params, hooks = program.sampler(state.params)
    out = generate(
        program.spec.model,
        params,
        jax.numpy.asarray([prompt], jax.numpy.int32),
        steps=config.sample_tokens,
        key=state.key,
        temperature=0.8,
        top_k=40,
        hooks=hooks,
    )
    text = tokenizer.decode([int(token) for token in fetch(out)[0]])
    _say("sample\n" + "\n".join(f"  | {line}" for line in text.splitlines()))


def _report(config: TrainConfig, program: Program, folder: RunFolder, outcome: Outcome) -> None:
    from meshwright.train.runfolder import saved_steps

    steps = saved_steps(folder.checkpoints)
    checkpoint = str(folder.checkpoints / str(steps[-1])) if steps else None
    _say(f"checkpoint {checkpoint}")
    document = {
        "steps": outcome.step,
        "loss": outcome.loss,
        "eval_loss": outcome.eval_loss,
        "tokens_per_second": outcome.tokens_per_second,
        "first_step_seconds": outcome.first_step_seconds,
        "compile_seconds": program.compile_seconds,
        "checkpoint": checkpoint,
        "mesh": program.spec.layout.mesh.sizes,
        "parameters": count_parameters(config.model),
        "step_seconds": outcome.step_seconds,
        "data_wait_seconds": outcome.data_wait_seconds,
        "save_block_seconds": outcome.save_block_seconds,
    }
    if _speaks():
        sys.stdout.write(json.dumps(document) + "\n")
        sys.stdout.flush()


def _process_start() -> float:
    """When this process began, on the clock of `time.perf_counter`; now where that is unknown."""
    now = time.perf_counter()
    try:
        fields = Path("/proc/self/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        began = int(fields[19]) / os.sysconf("SC_CLK_TCK")  # proc(5): starttime, since boot
        return now - (time.clock_gettime(time.CLOCK_BOOTTIME) - began)
    except (OSError, AttributeError, ValueError, IndexError):
        return now


def _speaks() -> bool:
    """Whether this is the one of several processes that prints and writes files."""
    return started().index == 0


def _say(text: str) -> None:
    if not _speaks():
        return
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
