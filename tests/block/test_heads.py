"""Fresh heads of a task, which default blocks leave as they are: said where it matters."""

import logging

import pytest
import torch
import transformers

from colossal_bcd import BlockOptimizer, BlockOptimizerRatio

SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24, "vocab_size": 40}
OWN = {
    "DistilBert": {"dim": 16, "n_layers": 2, "n_heads": 2, "hidden_dim": 24, "vocab_size": 40},
    "GPT2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40, "pad_token_id": 0},
    "T5": {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "vocab_size": 40},
    "Bart": {
        "d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2, "vocab_size": 40,
        "decoder_attention_heads": 2, "encoder_ffn_dim": 24, "decoder_ffn_dim": 24,
    },
    "XLNet": {"d_model": 16, "n_layer": 2, "n_head": 2, "d_inner": 24, "vocab_size": 40},
    "OPT": {**SIZES, "ffn_dim": 24, "word_embed_proj_dim": 16},
    "ViT": {"image_size": 16, "patch_size": 8, **SIZES},
    "Llama": {**SIZES, "num_key_value_heads": 2, "pad_token_id": 0},
    "Gemma": {**SIZES, "num_key_value_heads": 2, "head_dim": 8, "pad_token_id": 0},
    "Electra": {**SIZES, "embedding_size": 16},
    "Albert": {**SIZES, "embedding_size": 8},
}  # fmt: skip
HEADS = {
    "BertForSequenceClassification": ["classifier."],
    "BertForTokenClassification": ["classifier."],
    "BertForQuestionAnswering": ["qa_outputs."],
    "RobertaForSequenceClassification": ["classifier."],
    "DistilBertForSequenceClassification": ["pre_classifier.", "classifier."],
    "DebertaV2ForSequenceClassification": ["pooler.", "classifier."],
    "AlbertForSequenceClassification": ["classifier."],
    "ElectraForMultipleChoice": ["sequence_summary.", "classifier."],
    "GPT2ForSequenceClassification": ["score."],
    "GPT2DoubleHeadsModel": ["multiple_choice_head."],
    "LlamaForSequenceClassification": ["score."],
    "GemmaForTokenClassification": ["score."],
    "OPTForSequenceClassification": ["score."],
    "GPTNeoXForSequenceClassification": ["score."],
    "T5ForSequenceClassification": ["classification_head."],
    "BartForSequenceClassification": ["classification_head."],
    "XLNetForSequenceClassification": ["sequence_summary.", "logits_proj."],
    "ViTForImageClassification": ["classifier."],
}
PRETRAINED = [
    "BertModel", "BertForMaskedLM", "RobertaForMaskedLM", "DistilBertForMaskedLM", "ElectraForMaskedLM",
    "AlbertForMaskedLM", "DebertaV2ForMaskedLM", "GPT2LMHeadModel", "LlamaForCausalLM", "GemmaForCausalLM",
    "GPTNeoXForCausalLM", "OPTForCausalLM", "T5ForConditionalGeneration", "T5EncoderModel",
    "BartForConditionalGeneration", "XLNetLMHeadModel", "ViTModel",
]  # fmt: skip
FAMILIES = ("DistilBert", "DebertaV2", "Roberta", "Albert", "Electra", "Bert", "GPT2", "GPTNeoX", "Llama", "Gemma",
            "OPT", "T5", "Bart", "XLNet", "ViT")  # fmt: skip


def build(name):
    family = next(family for family in FAMILIES if name.startswith(family))
    config = getattr(transformers, f"{family}Config")(**OWN.get(family, SIZES))
    return getattr(transformers, name)(config)


def wrap(model, **options):
    base = torch.optim.AdamW(model.parameters())
    return BlockOptimizer(base, list(model.named_parameters()), verbose=0, **options)


def warnings_of(caplog):
    return [
        record.getMessage()
        for record in caplog.records
        if record.levelno == logging.WARNING and record.name.startswith("colossal_bcd")
    ]


@pytest.mark.parametrize("name", HEADS)
def test_a_fresh_head_in_no_block_is_said_with_the_remedy(name, caplog):
    """BERT and RoBERTa classifiers kept the head that they were initialised with, in one line among others."""
    wrap(build(name))
    (message,) = warnings_of(caplog)
    assert f"active_modules={str(HEADS[name]).replace(chr(39), chr(34))}" in message
    caplog.clear()
    model = build(name)
    wrapped = wrap(model, active_modules=HEADS[name])
    assert warnings_of(caplog) == []
    heads = {parameter for parameter, _ in model.named_parameters() if parameter.startswith(tuple(HEADS[name]))}
    assert heads
    assert heads == set(wrapped.always_active)


@pytest.mark.parametrize("name", PRETRAINED)
def test_what_is_pretrained_is_not_shouted_about(name, caplog):
    """Embeddings, heads over the vocabulary and final norms stay as they are by BAdam's design."""
    wrap(build(name))
    assert warnings_of(caplog) == []


def test_who_chose_is_not_warned(caplog):
    model = build("BertForSequenceClassification")
    wrap(model, block_prefix_list=[["bert.encoder.layer.0."], ["bert.encoder.layer.1."]])
    wrap(build("BertForSequenceClassification"), include_lm_head=True)
    wrap(build("BertForSequenceClassification"), sgd_mode="all")
    frozen = build("BertForSequenceClassification")
    frozen.classifier.requires_grad_(False)
    wrap(frozen)
    assert warnings_of(caplog) == []


def test_the_ratio_form_says_it_too(caplog):
    model = build("RobertaForSequenceClassification")
    BlockOptimizerRatio([{"params": list(model.parameters())}], list(model.named_parameters()), verbose=0)
    (message,) = warnings_of(caplog)
    assert "include_lm_head=True" in message
    caplog.clear()
    for name, options in (("RobertaForSequenceClassification", {"include_lm_head": True}), ("LlamaForCausalLM", {})):
        model = build(name)
        named = list(model.named_parameters())
        BlockOptimizerRatio([{"params": list(model.parameters())}], named, verbose=0, **options)
    assert warnings_of(caplog) == []


def test_other_ranks_say_nothing(caplog, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    wrap(build("BertForSequenceClassification"))
    assert warnings_of(caplog) == []
