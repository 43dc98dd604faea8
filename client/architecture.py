"""What the tiny base is made of: a tokenizer of whole words, a processor, a LLaVA of under a million weights."""

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from fedstrata.core.seeds import derive
from fedstrata.scenarios import drawing
from fedstrata.scenarios.pretraining import pretraining_examples, pretraining_prompts
from fedstrata.scenarios.vocabulary import WORDS

SPECIAL = ("<pad>", "<s>", "</s>", "<image>")
PAD, BOS, EOS, IMAGE = range(4)
PATCH, VISION, LANGUAGE = 8, (128, 4, 3), (96, 4, 3)  # hidden size, heads, layers
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'user' %}{{ 'USER: ' }}{% if m['content'] is string %}"
    "{{ m['content'] }}{% else %}{% for p in m['content'] if p['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
    "{% for p in m['content'] if p['type'] == 'text' %}{{ p['text'] }}{% endfor %}{% endif %}"
    "{% else %}{{ ' ASSISTANT: ' }}{% if m['content'] is string %}{{ m['content'] }}{% else %}"
    "{% for p in m['content'] if p['type'] == 'text' %}{{ p['text'] }}{% endfor %}{% endif %}{{ '</s>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE in which every word of `WORDS` and of the pre-training prompts is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    prompts = [question for questions in pretraining_prompts(0, 200).values() for question in questions]
    text = (
        [f" {word} {word}" for word in WORDS]
        + [word for word in WORDS if word[0].isupper()] * 2
        + prompts
        + [f" {prompt}" for prompt in prompts]
    )
    text += [f" {example.answer}" for example in pretraining_examples(0, 2000)] + ["USER:  ASSISTANT:"] * 9
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=4000, min_frequency=2, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(text, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
        extra_special_tokens={"image_token": "<image>"},
        model_max_length=256,
    )


def make_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """Pictures [32, 32] to 16 image tokens, questions through the vicuna-like chat template."""
    side = {"height": drawing.SIZE, "width": drawing.SIZE}
    images = CLIPImageProcessorPil(size={"shortest_edge": drawing.SIZE}, crop_size=side)
    return LlavaProcessor(  # type: ignore[no-untyped-call]
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=TEMPLATE,
        image_token="<image>",
    )


def make_model(vocabulary: int, seed: int) -> LlavaForConditionalGeneration:
    """A random LLaVA. At the usual initializer range of 0.02 one this small does not learn, at 0.1 it does."""
    torch.manual_seed(derive(seed, "base weights"))
    hidden, heads, layers = VISION
    vision = CLIPVisionConfig(
        hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers, num_attention_heads=heads,
        image_size=drawing.SIZE, patch_size=PATCH, projection_dim=hidden, initializer_range=0.1,
    )  # fmt: skip
    hidden, heads, layers = LANGUAGE
    language = LlamaConfig(
        vocab_size=vocabulary, hidden_size=hidden, intermediate_size=2 * hidden, num_hidden_layers=layers,
        num_attention_heads=heads, max_position_embeddings=256, tie_word_embeddings=True, initializer_range=0.1,
        pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=language, image_token_index=IMAGE, vision_feature_layer=-1,
        vision_feature_select_strategy="default", image_seq_length=(drawing.SIZE // PATCH) ** 2,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = LlavaForConditionalGeneration(config)
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        do_sample=False, max_new_tokens=24, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS
    )
    return model
