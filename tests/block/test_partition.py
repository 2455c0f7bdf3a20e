import re

import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from colossal_bcd.block import partition
from colossal_bcd.block.parameters import read_parameters

SMALL = {"hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 3, "num_attention_heads": 2}


def decoder(kind, **options):
    config = getattr(transformers, f"{kind}Config")(vocab_size=16, num_key_value_heads=2, **SMALL, **options)
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def gpt2():
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=16, n_embd=8, n_layer=3, n_head=2))


def t5(tied=True):
    config = transformers.T5Config(
        vocab_size=16, d_model=8, d_kv=4, d_ff=12, num_layers=2, num_decoder_layers=3, num_heads=2,
        tie_word_embeddings=tied,
    )  # fmt: skip
    return transformers.T5ForConditionalGeneration(config)


def opt():
    config = transformers.OPTConfig(
        vocab_size=16, hidden_size=8, word_embed_proj_dim=8, ffn_dim=12, num_hidden_layers=3, num_attention_heads=2
    )
    return transformers.OPTForCausalLM(config)


def vit():
    config = transformers.ViTConfig(image_size=8, patch_size=4, num_labels=3, **SMALL)
    return transformers.ViTForImageClassification(config)


def lora():
    config = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    return get_peft_model(decoder("Llama"), config)


MODELS = {
    "llama": (lambda: decoder("Llama"), "model.layers.{}", ["model.norm.weight"]),
    "llama-tied": (lambda: decoder("Llama", tie_word_embeddings=True), "model.layers.{}", ["model.norm.weight"]),
    "mistral": (lambda: decoder("Mistral"), "model.layers.{}", ["model.norm.weight"]),
    "gpt2": (gpt2, "transformer.h.{}", ["transformer.ln_f.weight", "transformer.ln_f.bias"]),
    "roberta": (
        lambda: transformers.RobertaForSequenceClassification(transformers.RobertaConfig(vocab_size=16, **SMALL)),
        "roberta.encoder.layer.{}",
        [],
    ),
    "bert": (
        lambda: transformers.BertForSequenceClassification(transformers.BertConfig(vocab_size=16, **SMALL)),
        "bert.encoder.layer.{}",
        ["bert.pooler.dense.weight", "bert.pooler.dense.bias"],
    ),
    "bert-mlm": (
        lambda: transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=16, **SMALL)),
        "bert.encoder.layer.{}",
        [],
    ),
    "opt": (
        opt,
        "model.decoder.layers.{}",
        ["model.decoder.final_layer_norm.weight", "model.decoder.final_layer_norm.bias"],
    ),
    "vit": (vit, "vit.encoder.layer.{}", ["vit.layernorm.weight", "vit.layernorm.bias"]),
}  # fmt: skip


def names_of(model):
    return [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize("kind", MODELS)
def test_partition_default_is_one_block_per_layer(kind):
    build, pattern, _ = MODELS[kind]
    names = names_of(build())
    blocks = partition(names)
    assert [block.name for block in blocks] == [pattern.format(index) for index in range(3)]
    for block in blocks:
        assert list(block.parameters) == [name for name in names if name.startswith(block.name + ".")]


@pytest.mark.parametrize("kind", MODELS)
def test_partition_with_ends_leaves_out_only_final_norm_and_pooler(kind):
    build, pattern, rest = MODELS[kind]
    roster = read_parameters(build().named_parameters(remove_duplicate=False))
    blocks = partition(roster.parameters, aliases=roster.aliases, include_embedding=True, include_lm_head=True)
    trained = [name for block in blocks for name in block.parameters]
    assert len(trained) == len(set(trained))
    assert [name for name in roster.parameters if name not in trained] == rest
    assert blocks[0].name == "embedding"
    tied_head_alone = kind in ("llama-tied", "gpt2", "opt")
    assert (blocks[-1].name == "head") == (not tied_head_alone)
    assert [block.name for block in blocks if block.name not in ("embedding", "head")] == [
        pattern.format(index) for index in range(3)
    ]


def test_partition_t5_has_the_layers_of_both_stacks():
    names = names_of(t5(tied=False))
    blocks = partition(names, include_embedding=True, include_lm_head=True)
    layers = [*(f"encoder.block.{i}" for i in range(2)), *(f"decoder.block.{i}" for i in range(3))]
    assert [block.name for block in blocks] == ["embedding", *layers, "head"]
    assert blocks[0].parameters == ("shared.weight",)
    assert blocks[-1].parameters == ("lm_head.weight",)
    trained = {name for block in blocks for name in block.parameters}
    assert set(names) - trained == {"encoder.final_layer_norm.weight", "decoder.final_layer_norm.weight"}


def test_partition_lora_llama_has_the_adapters_of_each_layer():
    roster = read_parameters(lora().named_parameters())
    blocks = partition(roster.parameters, trainable=roster.in_blocks)
    assert [block.name for block in blocks] == [f"base_model.model.model.layers.{i}" for i in range(3)]
    for block in blocks:
        assert len(block.parameters) == 4
        assert all(".lora_A." in name or ".lora_B." in name for name in block.parameters)


@pytest.mark.parametrize(
    ("embedding", "head", "owner"), [(True, True, 0), (True, False, 0), (False, True, -1), (False, False, None)]
)
def test_partition_tied_weight_is_in_one_block_or_in_none(embedding, head, owner):
    roster = read_parameters(decoder("Llama", tie_word_embeddings=True).named_parameters(remove_duplicate=False))
    assert roster.aliases == {"lm_head.weight": "model.embed_tokens.weight"}
    blocks = partition(roster.parameters, aliases=roster.aliases, include_embedding=embedding, include_lm_head=head)
    holders = [block for block in blocks if "model.embed_tokens.weight" in block.parameters]
    assert holders == ([] if owner is None else [blocks[owner]])
    assert len(blocks) == 3 + (owner is not None)


@pytest.mark.parametrize("option", ["include_embedding", "include_lm_head"])
def test_partition_refuses_to_include_what_is_not_there(option):
    with pytest.raises(ValueError, match=f"{option}: got True, but no parameter name looks like .* block_prefix_list"):
        partition(["body.0.weight", "body.1.weight"], **{option: True})


@pytest.mark.parametrize("option", ["include_embedding", "include_lm_head"])
def test_partition_refuses_to_include_what_is_frozen(option):
    names = ["wte.weight", "h.0.w", "lm_head.weight"]
    with pytest.raises(ValueError, match=f"{option}: got True, but .* may not be trained"):
        partition(names, trainable=["h.0.w"], **{option: True})


def test_partition_refuses_names_without_layers():
    with pytest.raises(ValueError, match="none of the 2 names shows a layer .* block_prefix_list"):
        partition(["encoder.weight", "head.bias"])


def test_partition_drops_frozen_layers_and_refuses_when_none_is_left():
    names = [f"h.{i}.{part}" for i in range(3) for part in ("a", "b")]
    blocks = partition(names, trainable=["h.0.a", "h.2.a", "h.2.b"])
    assert [block.parameters for block in blocks] == [("h.0.a",), ("h.2.a", "h.2.b")]
    with pytest.raises(ValueError, match="every parameter of the 3 layers is frozen"):
        partition(names, trainable=[])


def test_partition_merges_neighbouring_layers():
    names = [f"h.{i}.w" for i in range(5)]
    blocks = partition(names, num_layers_per_block=2)
    assert [block.parameters for block in blocks] == [("h.0.w", "h.1.w"), ("h.2.w", "h.3.w"), ("h.4.w",)]
    assert [block.name for block in blocks] == ["h.0+h.1", "h.2+h.3", "h.4"]


def test_partition_merges_random_layers_by_the_seed_alone():
    names = [f"h.{i}.w" for i in range(12)]
    torch.manual_seed(1)
    blocks = partition(names, num_layers_per_block=3, merge_seed=5)
    torch.manual_seed(2)
    assert blocks == partition(names, num_layers_per_block=3, merge_seed=5)
    assert blocks != partition(names, num_layers_per_block=3, merge_seed=6)
    assert sorted(name for block in blocks for name in block.parameters) == sorted(names)
    assert all(list(block.parameters) == sorted(block.parameters, key=names.index) for block in blocks)
    assert [len(block.parameters) for block in blocks] == [3] * 4


@pytest.mark.parametrize(("value", "error"), [(0, ValueError), (1.0, TypeError)])
def test_partition_refuses_layers_per_block(value, error):
    with pytest.raises(error, match="n_layer_per_block"):
        partition(["h.0.w"], num_layers_per_block=value)


component = st.sampled_from(["layers", "layer", "1", "10", "11", "w", "bias", "mlp"])
dotted = st.lists(component, min_size=1, max_size=4).map(".".join)


@settings(max_examples=200, deadline=None)
@given(st.lists(dotted, min_size=1, max_size=12, unique=True), dotted, st.sampled_from(["", "."]))
def test_partition_prefix_matches_whole_components(names, prefix, end):
    """A substring match would put layer 10 into the block of layer 1."""
    parts = prefix.split(".")
    expected = tuple(name for name in names if name.split(".")[: len(parts)] == parts)
    if expected:
        (block,) = partition(names, block_prefix_list=[[prefix + end]])
        assert block.parameters == expected
    else:
        with pytest.raises(ValueError, match=re.escape(f"block prefix {prefix + end!r} matches no parameter")):
            partition(names, block_prefix_list=[[prefix + end]])


def test_partition_takes_bare_strings_and_aliases():
    blocks = partition(["e.weight", "h.0.w"], aliases={"head.weight": "e.weight"}, block_prefix_list=["h.0", ["head."]])
    assert [(block.name, block.parameters) for block in blocks] == [("h.0", ("h.0.w",)), ("head", ("e.weight",))]


def test_partition_names_the_closest_prefixes():
    names = [f"model.layers.{i}.mlp.weight" for i in range(3)]
    with pytest.raises(ValueError, match="'model.layer.1.' matches no parameter; closest names are model.layers.1"):
        partition(names, block_prefix_list=[["model.layer.1."]])


@pytest.mark.parametrize(
    ("blocks", "error", "message"),
    [
        ([], ValueError, "got an empty list, expected at least one block"),
        ([["h.0"], []], ValueError, r"block_prefix_list\[1\]: got an empty list"),
        ([["h.0"], ["h"]], ValueError, "'h.0.w' is in block 0 .* and in block 1"),
        ([["h.0"], ["head.weight"], ["e"]], ValueError, "'e.weight' is in block 1 .* and in block 2 .* Tied"),
        (
            [["h.1"]],
            ValueError,
            r"block_prefix_list\[0\]: \['h.1'\] matches 1 parameters, none of which may be trained",
        ),
        ("h.0", TypeError, "expected a list of blocks"),
        ([3], TypeError, r"block_prefix_list\[0\]: got 3"),
        ([[3]], TypeError, "block prefix: got 3 of type int, expected a string"),
        ([[""]], ValueError, "matches no parameter"),
        ([["."]], ValueError, "matches no parameter"),
    ],
)
def test_partition_refuses_block_lists(blocks, error, message):
    with pytest.raises(error, match=message):
        partition(
            ["e.weight", "h.0.w", "h.1.w"],
            aliases={"head.weight": "e.weight"},
            trainable=["e.weight", "h.0.w"],
            block_prefix_list=blocks,
        )


@pytest.mark.parametrize(
    "option", [{"include_embedding": True}, {"include_lm_head": True}, {"num_layers_per_block": 2}]
)
def test_partition_refuses_options_that_a_block_list_would_ignore(option):
    with pytest.raises(ValueError, match="block_prefix_list: got it with"):
        partition(["h.0.w"], block_prefix_list=["h.0"], **option)
