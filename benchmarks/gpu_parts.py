"""The parts of the GPU battery: each does a piece of real work and tells what it cost.

They run the ready configurations of Qwen3-VL-2B, shortened, on random weights. Knows no schedule:
`gpu.py` runs each of them in a process of its own.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from gpu_sizes import Bench, StepClock, Stopwatch, build_model, layer_parameters, make_records
from gpu_stages import configured, grpo_trainer, train

from twn_rl.inference.embedder import ThinkingEmbedder
from twn_rl.launch.arguments import DataArguments, ModelArguments
from twn_rl.modeling.gate import QUERY_SIDE, fit_gate
from twn_rl.modeling.model import DualLoraModel
from twn_rl.runtime.zero import describe_engine
from twn_rl.training.adapter_trainer import AdapterCheckpoints
from twn_rl.training.measure_gains import measure_gains
from twn_rl.training.sft import SftTrainer


def machine(bench: Bench) -> None:
    """How fast the device multiplies and copies, which bounds everything else."""
    side, is_gpu = bench.sizes.side, bench.is_gpu
    if is_gpu:
        properties = torch.cuda.get_device_properties(bench.device)
        bench.tell(device=properties.name, memory_gb=properties.total_memory / 1e9)
    else:
        bench.tell(device="cpu", threads=torch.get_num_threads())
    bench.tell(torch=torch.__version__, cuda=torch.version.cuda)
    dtype = torch.bfloat16 if is_gpu else torch.float32
    left, right = (torch.randn(side, side, device=bench.device, dtype=dtype) for _ in range(2))
    big = torch.randn(side * side * (8 if is_gpu else 1), device=bench.device)
    for _ in range(3):
        torch.matmul(left, right)
        big.clone()
    repeats, started = 10, bench.now()
    for _ in range(repeats):
        torch.matmul(left, right)
    bench.tell(matmul_tflops=repeats * 2 * side**3 / (bench.now() - started) / 1e12)
    copy, started = torch.empty_like(big), bench.now()
    for _ in range(repeats):
        copy.copy_(big)
    bench.tell(copy_gb_a_second=repeats * 2 * big.nbytes / (bench.now() - started) / 1e9)


def warm_start(bench: Bench) -> None:
    """Steps of the warm start: token loss, vectors with and without thoughts, one negative each."""
    size = bench.sizes.batch_size
    _, model_args, _, training = configured(
        bench, "sft", max_steps=3, per_device_train_batch_size=size
    )
    model = build_model(bench, model_args)
    records = make_records(bench, 3 * size, picture=bench.sizes.picture)
    seconds = train(bench, SftTrainer(model, training, records), StepClock(bench))
    query, target = (
        model.collate([item])["input_ids"].shape[1]
        for item in (records[0].query, records[0].positive)
    )
    thought = len(model.completion_ids(f"<think> {records[0].query_cot} </think>"))
    tokens = 3 * query + 2 * thought + 2 * target  # without, with, and taught; two targets
    rate = size * tokens / seconds
    # Two forwards, a recomputation and a backward: 8 operations a parameter and token.
    flops = 8 * layer_parameters(model) * rate
    bench.tell(
        tokens_a_record=tokens,
        records_a_second=size / seconds,
        tokens_a_second=rate,
        tflops=flops / 1e12,
    )


def rollouts(bench: Bench, folder: Path | None = None, **flags: Any) -> None:
    """Steps of GRPO, and the share of each of its pieces."""
    size, group = bench.sizes.rollouts
    _, model_args, _, _ = configured(bench, "sft")
    script, _, training = configured(
        bench,
        "grpo",
        max_steps=3,
        per_device_train_batch_size=size,
        num_generations=group,
        max_completion_length=bench.sizes.think_tokens,
        mask_truncated_completions=False,  # random weights hardly ever end their turn
        **flags,
    )
    model = build_model(bench, model_args, folder)
    records = make_records(bench, 4 * size // group, picture=bench.sizes.picture)
    started = bench.now()
    trainer = grpo_trainer(bench, script, training, records, model)
    bench.tell(bank_seconds=bench.now() - started, targets=len(trainer.scorer.targets.row_of))
    stopwatch = Stopwatch(bench)
    for holder, method, name in (
        (trainer, "_generate_single_turn", "generation"),
        (trainer, "rollout_columns", "scorer"),
        (trainer.scorer, "_similarities", "similarity"),
        (trainer, "compute_loss", "forward"),
        (trainer.accelerator, "backward", "backward"),
    ):
        stopwatch.watch(holder, method, name)
    clock = StepClock(bench, stopwatch)
    seconds = train(bench, trainer, clock)
    steps = len(clock.steps) - clock.warm_up
    shares = {name: spent / steps / seconds for name, spent in stopwatch.seconds.items()}
    shares["rest"] = 1 - sum(shares.values())
    tokens = [
        row["rollouts/think_tokens"]
        for row in trainer.state.log_history
        if "rollouts/think_tokens" in row
    ]
    bench.tell(
        rollouts_a_second=size / seconds,
        think_tokens=tokens[-1],
        **{f"share_{name}": share for name, share in shares.items()},
    )


def rollouts_vllm(bench: Bench) -> None:
    """The same with rollouts from vLLM in the same process."""
    rollouts(
        bench,
        bench.folder / "backbone",
        use_vllm=True,
        vllm_mode="colocate",
        vllm_max_model_length=bench.sizes.model_length,
        vllm_gpu_memory_utilization=0.3,
    )


def gate_labels(bench: Bench) -> None:
    """What a thought gains each input: the labels of the gate."""
    script, *_ = configured(
        bench,
        "gate",
        max_think_tokens=bench.sizes.think_tokens,
        batch_size=min(32, bench.sizes.inputs),
    )
    _, model_args, _, _ = configured(bench, "sft")
    model = build_model(bench, model_args).eval()
    records = make_records(bench, bench.sizes.inputs, picture=bench.sizes.picture)
    settings = script.label_settings()
    options: dict[str, Any] = {"settings": settings, "show_progress_bar": False}
    measure_gains(model, records[:2], QUERY_SIDE, bench.folder / "warm_up", **options)
    bench.forget_peak()
    started = bench.now()
    labels = measure_gains(model, records, QUERY_SIDE, bench.folder / "labels", **options)
    bench.tell(inputs_a_second=len(labels.rows) / (bench.now() - started), **bench.peak())
    bench.tell(inputs=len(labels.rows), think_tokens=float(labels.column("think_tokens").mean()))


def encode(bench: Bench) -> None:
    """Queries a second in every way to think."""
    _, model_args, _, _ = configured(bench, "sft", num_reason_tokens=8)
    model = build_model(bench, model_args).eval()
    records = make_records(bench, bench.sizes.inputs, picture=bench.sizes.picture)
    items = [record.query for record in records]
    embed_in_all_ways(bench, model, items, max_think_tokens=bench.sizes.think_tokens)


def embed_in_all_ways(
    bench: Bench, model: DualLoraModel, items: list[Any], prefix: str = "", **options: Any
) -> None:
    """Tell the queries a second of every way to think that the model has."""
    states = torch.randn(64, model.hidden_size)
    model.gates[QUERY_SIDE] = fit_gate(states, (states[:, 0] > 0).float())[0].to(model.device)
    embedder = ThinkingEmbedder(model)
    ways: dict[str, dict[str, Any]] = {
        "never": {"think": "never"},
        "auto_half": {"think": "auto", "think_rate": 0.5},
        "always": {"think": "always"},
    }
    if model.reason_ids:
        ways["latent"] = {"think": "latent"}
    for name, way in ways.items():
        embedder.encode_query(items[:2], **way, **{**options, "max_think_tokens": 2})
        bench.forget_peak()
        started = bench.now()
        embedder.encode_query(items, **way, **options)
        bench.tell(**{f"{prefix}{name}_queries_a_second": len(items) / (bench.now() - started)})
        bench.tell(**bench.peak(f"{prefix}{name}_peak"))


def chunks(bench: Bench) -> None:
    """A step of contrastive pairs at large batches, chunk by chunk."""
    batches = bench.sizes.contrastive
    _, model_args, _, _ = configured(bench, "sft")
    model = build_model(bench, model_args)
    records = make_records(
        bench, max(batches), picture=bench.sizes.small_picture, has_thoughts=False
    )
    for number, size in enumerate(batches):
        steps = 1 if number else 2  # the first batch warms up for all
        training = configured(
            bench,
            "sft",
            max_steps=steps,
            per_device_train_batch_size=size,
            token_weight=0,
            num_hard_negatives=0,
        )[3]
        trainer = SftTrainer(model, training, records)
        clock = StepClock(bench, warm_up=steps - 1)
        seconds = train(bench, trainer, clock, prefix=f"batch_{size}_")
        bench.tell(**{f"batch_{size}_records_a_second": size / seconds})


def resume(bench: Bench) -> None:
    """Save a checkpoint, go on from it anew, and arrive where the unbroken run did.

    Raises:
        RuntimeError: If the loss after resuming is another one.
    """
    size = max(4, bench.sizes.batch_size // 4)
    flags: dict[str, Any] = {"max_steps": 3, "per_device_train_batch_size": size}
    flags |= {"save_strategy": "steps", "save_steps": 2}
    records = make_records(bench, 4 * size, picture=bench.sizes.picture)
    losses = []
    for run in ("unbroken", "resumed"):
        _, model_args, _, training = configured(bench, "sft", **flags)
        model = build_model(bench, model_args)
        trainer: AdapterCheckpoints = SftTrainer(model, training, records)
        stopwatch = Stopwatch(bench)
        stopwatch.watch(trainer, "_save_checkpoint", "save")
        clock = StepClock(bench, warm_up=0)
        checkpoint = Path(training.output_dir or "") / "checkpoint-2"
        options = {} if run == "unbroken" else {"resume_from_checkpoint": str(checkpoint)}
        train(bench, trainer, clock, prefix=f"{run}_", **options)
        losses.append(bench.figures[f"{run}_last_loss"])
        if run == "unbroken":
            size_mb = sum(p.stat().st_size for p in checkpoint.rglob("*") if p.is_file()) / 1e6
            saves = len(list(checkpoint.parent.glob("checkpoint-*")))
            bench.tell(save_seconds=stopwatch.seconds["save"] / saves, checkpoint_mb=size_mb)
        else:
            bench.tell(load_seconds=clock.waits[0], resumed_steps=len(clock.steps))
    if abs(losses[1] - losses[0]) > 0.02 * abs(losses[0]):
        raise RuntimeError(
            f"loss of step 3 = {losses[1]} after resuming, expected {losses[0]} as in the unbroken "
            "run (within 2 %); compare the two runs' metrics"
        )


def zero2(bench: Bench) -> None:
    """Steps of the warm start on a DeepSpeed engine of one process.

    Raises:
        RuntimeError: If no engine was made.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}
    launch |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in launch.items()})
    size, file = max(4, bench.sizes.batch_size // 4), bench.folder / "zero2.json"
    file.write_text(
        '{"zero_optimization": {"stage": 2}, "bf16": {"enabled": "auto"}, '
        '"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": "auto", '
        '"gradient_clipping": "auto"}',
        encoding="utf-8",
    )
    _, model_args, _, training = configured(
        bench, "sft", max_steps=3, per_device_train_batch_size=size, deepspeed=file
    )
    model = build_model(bench, model_args)
    records = make_records(bench, 3 * size, picture=bench.sizes.picture)
    trainer = SftTrainer(model, training, records)
    seconds = train(bench, trainer, StepClock(bench))
    engine = trainer.model_wrapped
    if type(engine).__name__ != "DeepSpeedEngine":
        raise RuntimeError(f"the trainer ran {type(engine).__name__}, expected DeepSpeedEngine")
    bench.tell(engine=describe_engine(engine), records_a_second=size / seconds)


def demo(bench: Bench) -> None:
    """The embedded default: its warm start, RL and embedding, which launch many small kernels."""
    first, second = bench.sizes.demo_steps
    data = DataArguments(demo_dir=str(bench.folder / "data"), demo_scale=0.05)
    arguments = configured(bench, "sft", of="demo", max_steps=first)
    model_args: ModelArguments = arguments[1]
    model = model_args.build(0).to(bench.device)
    trainer = SftTrainer(model, arguments[3], data.load("train"))
    train(bench, trainer, StepClock(bench), prefix="warm_start_")
    script, _, training = configured(bench, "grpo", of="demo", max_steps=second)
    records = data.load("rl")
    trainer = grpo_trainer(bench, script, training, records, model)
    train(bench, trainer, StepClock(bench), prefix="rl_")
    items = [record.query for record in data.load("test")][: bench.sizes.inputs]
    embed_in_all_ways(bench, model.eval(), items, prefix="encode_", max_think_tokens=32)


PARTS: dict[str, Callable[[Bench], None]] = {
    "machine": machine,
    "warm_start": warm_start,
    "grpo": rollouts,
    "encode": encode,
    "gate_labels": gate_labels,
    "chunks": chunks,
    "resume": resume,
    "zero2": zero2,
    "grpo_vllm": rollouts_vllm,
    "demo": demo,
}
