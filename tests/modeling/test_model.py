"""The model's public surface: batches, token loss, thoughts, configuration."""

import pytest
import torch
from tiny_backbones import make_llama

from twn_rl.data.chat import Renderer
from twn_rl.data.record import Item
from twn_rl.modeling.backbone import load_backbone
from twn_rl.modeling.config import LoraSettings, TwnConfig
from twn_rl.modeling.model import DualLoraModel

FAMILIES = ["idefics3", "qwen3_vl", "qwen2_5_vl", "llama"]
THOUGHT = "<think> camel is top left </think>"
FORBIDDEN = {
    "idefics3": ["<image>", "<fake_token_around_image>", "<global-img>", "<row_1_col_2>"],
    "qwen3_vl": ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"],
    "qwen2_5_vl": ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"],
    "llama": ["<pad>"],
}


def _ids(model, text):
    return model.completion_ids(text)


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_are_padded_left_and_completions_right(make_model, make_items, name):
    model, items = make_model(name), make_items(name)
    batch = model.collate(items, [THOUGHT, None] + ["<think> it </think>"] * (len(items) - 2))
    for row in batch["attention_mask"].tolist():
        assert row == sorted(row)
    for row in batch["completion_mask"].tolist():
        assert row == sorted(row, reverse=True)
    assert batch["completion_mask"].sum(1).tolist() == [6, 0] + [3] * (len(items) - 2)


@pytest.mark.parametrize("name", FAMILIES)
def test_token_loss_equals_the_log_probabilities_of_a_plain_forward(make_model, make_items, name):
    model, items = make_model(name), make_items(name)
    completions = [model.completion_ids(THOUGHT, add_eos=True) for _ in items]
    completions[1] = completions[1][:3]
    nll, count = model.token_nll(model.collate(items, completions))
    assert count.tolist() == [len(completion) for completion in completions]
    for row, (item, ids) in enumerate(zip(items, completions, strict=True)):
        prompt = model.collate([item])
        width = prompt["input_ids"].shape[1]
        for key in prompt.keys() & {"mm_token_type_ids", "attention_mask"}:
            value = int(key == "attention_mask")
            prompt[key] = torch.nn.functional.pad(prompt[key], (0, len(ids)), value=value)
        prompt["input_ids"] = torch.cat([prompt["input_ids"], torch.tensor([ids])], 1)
        with torch.no_grad():
            logits = model.peft_model(**prompt).logits[0, width - 1 : -1].double()
        picked = logits.log_softmax(-1)[torch.arange(len(ids)), torch.tensor(ids)]
        torch.testing.assert_close(nll[row].double(), -picked.sum(), atol=1e-4, rtol=1e-5)


def test_forward_gives_what_its_parts_give(make_model, make_items):
    model, items = make_model(), make_items("idefics3")
    batch = model.collate(items, [THOUGHT] * len(items))
    output = model(embed={"query": batch, "no_think": model.collate(items)}, token_nll=batch)
    assert set(output) == {"embeds", "token_nll", "token_count"}
    assert torch.equal(output["embeds"]["query"], model.embed(batch))
    assert torch.equal(output["token_nll"], model.token_nll(batch)[0])
    assert set(model(embed={"query": batch})) == {"embeds"}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_random_policy_never_writes_a_forbidden_token(make_model, make_items, name):
    model, items = make_model(name), make_items(name)
    suppressed = set(model.suppressed_token_ids)
    vocabulary = model.tokenizer.get_vocab()
    assert {vocabulary[token] for token in FORBIDDEN[name]} <= suppressed
    assert set(model.readout_ids) <= suppressed
    assert model.backbone.eos_token_id not in suppressed
    assert not {vocabulary["<think>"], vocabulary["</think>"]} & suppressed
    rows = model.reason(
        model.collate(items),
        do_sample=True,
        temperature=5.0,
        num_thoughts=4,
        max_think_tokens=30,
        seeds=0,
    )
    written = [token_id for row in rows for token_id in row]
    assert len(rows) == 4 * len(items)
    assert len(written) > 200
    assert not suppressed & set(written)
    assert len(set(written)) > 20
    # Such a rollout can always be embedded.
    repeated = [item for item in items for _ in range(4)]
    assert model.embed(model.collate(repeated, rows)).isfinite().all()


def test_think_tags_stay_allowed_when_they_are_special(make_model):
    model = make_model()
    model.tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>"]})
    vocabulary = model.tokenizer.get_vocab()
    assert not {vocabulary["<think>"], vocabulary["</think>"]} & set(model.suppressed_token_ids)


def test_greedy_thoughts_do_not_depend_on_the_batch(make_model, make_items):
    for name in FAMILIES:
        model, items = make_model(name), make_items(name)
        together = model.reason(model.collate(items), max_think_tokens=6)
        alone = [model.reason(model.collate([item]), max_think_tokens=6)[0] for item in items]
        assert together == alone


def test_sampling_is_repeatable_by_seed_and_leaves_the_random_state(make_model, make_items):
    model, items = make_model(), make_items("idefics3")
    batch, before = model.collate(items), torch.random.get_rng_state()
    first, again, other = (model.reason(batch, do_sample=True, seeds=s) for s in (1, 1, 2))
    assert first == again != other
    assert torch.equal(before, torch.random.get_rng_state())


def test_thinking_uses_the_reasoning_adapter_and_restores_modes(make_model, make_items):
    model, items = make_model(), make_items("idefics3")
    model.train()
    model.backbone.inner_model.vision_model.eval()
    modes = [module.training for module in model.modules()]
    model.gradient_checkpointing_enable()
    rows = model.reason(model.collate(items), max_think_tokens=4)
    assert modes == [module.training for module in model.modules()]
    with torch.no_grad():
        for key, parameter in model.peft_model.named_parameters():
            if ".embedding." in key:
                parameter.mul_(3.0)
    assert model.reason(model.collate(items), max_think_tokens=4) == rows


def test_several_greedy_thoughts_are_refused(make_model, make_items):
    model = make_model()
    with pytest.raises(ValueError, match="num_thoughts = 2 with do_sample = False"):
        model.reason(model.collate(make_items("idefics3")), num_thoughts=2)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_rendered_thought_reads_back(make_model, name):
    model = make_model(name)
    ids = model.completion_ids(model.renderer.completion("camel is top"), add_eos=True)
    think = model.think([*ids, 5, 5])
    assert think.is_complete
    assert think.text == "camel is top"
    assert model.completion_for_embedding([*ids, 5]) == ids[:-1]


@pytest.mark.parametrize("name", FAMILIES)
def test_what_is_written_behind_a_thought_is_not_embedded(make_model, make_items, name):
    model, item = make_model(name), make_items(name)[1]
    thought = model.completion_ids(model.renderer.completion("camel is top"))
    behind = model.completion_ids("pizza zebra tree")
    found = model.completion_for_embedding([*thought, *behind, model.backbone.eos_token_id])
    assert found == thought
    with torch.no_grad():
        pair = model.embed(model.collate([item, item], [thought, [*thought, *behind]]))
    assert not torch.allclose(pair[0], pair[1], atol=1e-3), "it would have changed the vector"


def test_a_mark_that_ends_within_a_token_is_cut_there():
    backbone = make_llama()
    backbone.tokenizer.add_tokens(["[", "]", "]pizza", "a", "b"])
    backbone.model.resize_token_embeddings(len(backbone.tokenizer))
    renderer = Renderer(think_open="[", think_close="]")
    model = DualLoraModel.from_backbone(backbone, TwnConfig(renderer=renderer))
    ids = [backbone.tokenizer.convert_tokens_to_ids(token) for token in ("[", "a", "]pizza", "b")]
    close = backbone.tokenizer.convert_tokens_to_ids("]")
    found = model.completion_for_embedding([*ids, model.backbone.eos_token_id])
    assert found == [*ids[:2], close]
    assert model.until_close(ids[:2]) == ids[:2]


@pytest.mark.parametrize(
    ("text", "has_eos", "problem"),
    [
        ("<think> camel is", True, "truncated"),
        ("<think> camel is", False, "truncated"),
        ("<think> camel is top </think>", False, "truncated"),
        ("camel is top </think>", True, "no_open"),
        ("<think> <think> camel </think>", True, "nested"),
        ("<think> </think>", True, "empty"),
    ],
)
@pytest.mark.parametrize("interface", ["reencode", "kv_detach", "shared_prefill"])
def test_a_malformed_thought_falls_back_to_the_no_think_vector(
    make_model, make_items, interface, text, has_eos, problem
):
    model, items = make_model(interface=interface), make_items("idefics3")[2:4]
    ids = model.completion_ids(text, add_eos=has_eos)
    think = model.think(ids)
    assert not think.is_complete
    assert think.problem == problem
    fallback = model.completion_for_embedding(ids)
    assert fallback == []
    with torch.no_grad():
        plain = model.embed(model.collate(items))
        torch.testing.assert_close(
            model.embed(model.collate(items, [fallback, fallback])), plain, atol=1e-6, rtol=0
        )


def test_collate_refuses_what_it_cannot_pair_or_fit(make_model, make_items):
    model, items = make_model(), make_items("idefics3")
    with pytest.raises(ValueError, match="2 completions for 5 items"):
        model.collate(items, [None, None])
    with pytest.raises(ValueError, match=r"prompt of item 2 .* has \d+ tokens.*max_length = 11"):
        model.collate(items, max_length=11)
    with pytest.raises(ValueError, match="items is empty"):
        model.collate([])
    with pytest.raises(ValueError, match="no completion_ids"):
        model.token_nll(model.collate(items))


def test_a_text_model_refuses_images(make_model, make_items):
    with pytest.raises(ValueError, match="reads text only"):
        make_model("llama").collate(make_items("idefics3"))


def test_images_may_be_paths(make_model, make_items, tmp_path):
    model, item = make_model(), make_items("idefics3")[2]
    item.images[0].save(tmp_path / "picture.png")
    on_disk = Item(instruction=item.instruction, images=(tmp_path / "picture.png",))
    with torch.no_grad():
        assert torch.equal(
            model.embed(model.collate([on_disk])), model.embed(model.collate([item]))
        )


@pytest.mark.parametrize("name", ["idefics3", "llama"])
def test_a_backbone_loads_from_a_folder(make_backbone, tmp_path, name):
    built = make_backbone(name)
    built.model.save_pretrained(tmp_path)
    built.processor.save_pretrained(tmp_path)
    loaded = load_backbone(tmp_path)
    assert loaded.name == str(tmp_path)
    for field in ("is_multimodal", "language_prefix", "hidden_size", "uses_mrope"):
        assert getattr(loaded, field) == getattr(built, field)
    assert loaded.tokenizer.padding_side == "left"
    rows = [one.model.get_input_embeddings().state_dict()["weight"] for one in (loaded, built)]
    assert torch.equal(*rows)


def test_config_survives_json_and_refuses_unknown_keys(tmp_path):
    config = TwnConfig(
        backbone="some/name",
        interface="kv_detach",
        reasoning_lora=LoraSettings(r=4, alpha=8, targets=("q_proj",)),
        renderer=Renderer(system_prompt="be brief"),
        gate_threshold=0.25,
    )
    config.save(tmp_path)
    assert TwnConfig.load(tmp_path) == config
    for broken in ({"colour": 1}, {"reasoning_lora": {"rank": 1}}, {"renderer": {"shape": 1}}):
        with pytest.raises(ValueError, match="unknown keys"):
            TwnConfig.from_dict(broken)


def test_config_reports_every_problem_at_once():
    with pytest.raises(ValueError, match=r"interface = 'none'.*num_readout_tokens = 0"):
        TwnConfig.from_dict({"interface": "none", "num_readout_tokens": 0})
    with pytest.raises(ValueError, match=r"r = 0.*dropout = 1\.5"):
        LoraSettings(r=0, alpha=1, dropout=1.5)


def test_from_backbone_does_not_change_the_config_it_was_given(make_backbone):
    config = TwnConfig()
    DualLoraModel.from_backbone(make_backbone("llama"), config)
    assert config == TwnConfig()
