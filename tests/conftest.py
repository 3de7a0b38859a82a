"""Shared by all tests: an offline environment, and tiny random models of every family with tokenizers and templates of their own kind."""

import os
import socket

with socket.socket() as free:  # a port for the Hub of the tests; to no other does any client here ever speak
    free.bind(("127.0.0.1", 0))
    HUB_PORT = free.getsockname()[1]

os.environ |= {
    "HF_ENDPOINT": f"http://127.0.0.1:{HUB_PORT}",  # read when the client is imported
    "HF_HUB_DISABLE_XET": "1",  # plain HTTP for large files, as that Hub serves them
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "GRADIO_ANALYTICS_ENABLED": "False",
    "TOKENIZERS_PARALLELISM": "false",
    "CUDA_VISIBLE_DEVICES": "",
}
# Two torch jobs at two threads on two cores are several times slower than at one.
os.environ.setdefault("OMP_NUM_THREADS", os.environ.get("LQA_TEST_THREADS", "1"))

from functools import cache

import pytest
import torch
import transformers
from chromium import browser, url, visit  # noqa: F401  fixtures
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from lqa.activations import layer_list
from lqa.chat import render, resolve_span
from lqa.conditioning import MAPPED, Projection
from lqa.config import DecoderConfig, default_prompt
from lqa.injection import Injection
from lqa.models import Base

torch.set_num_threads(int(os.environ.get("LQA_TEST_THREADS", "1")))

# As on the Hub: each family's template has habits that a naive reading of it gets wrong.
TEMPLATES = {
    # SmolLM2: a default system prompt where the chat has none
    "chatml": (
        "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}"
        "<|im_start|>system\nYou are a helpful AI assistant.<|im_end|>\n"
        "{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    # Llama 3: BOS as text (the tokenizer would add another one), contents trimmed
    "llama3": (
        "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n{{ m['content'] | trim }}<|eot_id|>"
        "{% endfor %}{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
    ),
    # Qwen 3: the last answer gets an empty think block, earlier ones lose theirs
    "qwen3": (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}<|im_start|>assistant\n"
        "{% if loop.last %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m['content'].split('</think>')[-1].lstrip('\n') }}<|im_end|>\n"
        "{% else %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
    # Gemma 3: the system turn is put into the user's, the assistant is called model, roles must alternate, contents trimmed
    "gemma": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
        "{% set rest = messages[1:] %}"
        "{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}"
        "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Conversation roles must alternate') }}{% endif %}"
        "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
        "{{ first if loop.first else '' }}{{ m['content'] | trim }}"
        "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    ),
    # Mistral 0.3: no generation header, the end of an answer is EOS, the system prompt stands in the first instruction
    "mistral": (
        "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}"
        "{% set rest = messages[1:] %}"
        "{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}"
        "{% if m['role'] == 'user' %}[INST] {{ first if loop.first else '' }}{{ m['content'] }}[/INST]"
        "{% elif m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}"
        "{% else %}{{ raise_exception('Only user and assistant roles are supported') }}{% endif %}{% endfor %}"
    ),
    # gpt-oss: a preamble, system text as the developer's, a channel in answers, the last answer closed by another token than the others
    "harmony": (
        "<|start|>system<|message|>You are ChatGPT, a large language model.\nKnowledge cutoff: 2024-06<|end|>{% for m in messages %}"
        "{% if m['role'] == 'system' %}<|start|>developer<|message|># Instructions\n\n{{ m['content'] }}\n\n<|end|>"
        "{% elif m['role'] == 'user' %}<|start|>user<|message|>{{ m['content'] }}<|end|>"
        "{% else %}<|start|>assistant<|channel|>final<|message|>{{ m['content'] }}"
        "{{ '<|return|>' if loop.last and not add_generation_prompt else '<|end|>' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
    ),
    "none": None,
}

SPECIALS = {  # style: (bos, eos, further special tokens, is BOS added by the tokenizer)
    "chatml": ("<|im_start|>", "<|im_end|>", [], False),
    "llama3": ("<|begin_of_text|>", "<|eot_id|>", ["<|start_header_id|>", "<|end_header_id|>"], True),
    "qwen3": (None, "<|im_end|>", ["<|im_start|>", "<|endoftext|>"], False),
    "gemma": ("<bos>", "<eos>", ["<start_of_turn>", "<end_of_turn>"], True),
    "mistral": ("<s>", "</s>", ["[INST]", "[/INST]"], True),
    "harmony": ("<|startoftext|>", "<|return|>", ["<|start|>", "<|message|>", "<|channel|>", "<|end|>"], False),
    "none": ("<s>", "</s>", [], True),
}

STYLE = {"llama": "llama3", "qwen3": "qwen3", "gemma3": "gemma", "mistral": "mistral", "gptoss": "harmony"}
STYLE |= {"smol": "chatml", "plain": "none"}
FAMILIES = ["llama", "qwen3", "gemma3", "mistral", "gptoss"]

_TEXT = """You are a helpful AI assistant. Speak like a pirate. The user asks what the weather will be like tomorrow. system user assistant
model Layer 0: 1: 2: 3: Instructions Knowledge How will the assistant speak? Who is it? Formally. Like a pirate, with many words of the sea.
What does the person want? It is a doctor from France who likes to cook. Please answer in one sentence and tell me about the city."""


@cache
def _trained(style: str) -> str:
    bos, eos, more, _ = SPECIALS[style]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = [AddedToken(t, special=True, normalized=False) for t in (bos, eos, *more) if t]
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([_TEXT], trainer)
    return tokenizer.to_str()


def make_tokenizer(style: str):
    """A byte-level BPE tokenizer of about 400 tokens with the special tokens and the chat template of `style`."""
    bos, eos, _, adds_bos = SPECIALS[style]
    backend = Tokenizer.from_str(_trained(style))
    if adds_bos:
        backend.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=eos)
    tokenizer.chat_template = TEMPLATES[style]
    return tokenizer


def make_model(family: str, vocabulary: int, **overrides):
    """A random causal model: 3 blocks, 32 wide.  Weights are large enough for its outputs to depend on its inputs."""
    sizes = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "initializer_range": 0.15,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
    }
    kind, own = {
        "qwen3": ("Qwen3", {}),
        "gemma3": ("Gemma3Text", {"query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}),
        "mistral": ("Mistral", {"sliding_window": None}),
        "gptoss": ("GptOss", {"num_local_experts": 4, "num_experts_per_tok": 2, "rope_parameters": {"rope_type": "default"}}),
    }.get(family, ("Llama", {}))
    model = {"Gemma3Text": "Gemma3"}.get(kind, kind)
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**sizes | own | overrides)
    return getattr(transformers, f"{model}ForCausalLM")(config).float().eval()


def tiny_base(name: str, **overrides) -> Base:
    tokenizer = make_tokenizer(STYLE[name])
    return Base(make_model(name, len(tokenizer), **overrides), tokenizer, f"tiny/{name}")


@pytest.fixture(scope="session")
def tiny():
    """tiny(name, **config): a new Base of the family ("llama", "qwen3", "gemma3", "mistral", "gptoss"), or of a tiny Llama with SmolLM2's
    template ("smol") or none ("plain").  The same arguments give the same weights."""

    return tiny_base


@pytest.fixture(scope="session")
def tokenizer_of():
    """tokenizer_of(style): a tokenizer with the chat template of that style, without a model."""
    return make_tokenizer


@pytest.fixture(params=FAMILIES)
def base(request, tiny):
    """A tiny model of every family in turn."""
    return tiny(request.param)


def make_config(base: Base, **changes) -> DecoderConfig:
    values = {
        "base": {"name": base.name, "weights": base.weights, "fingerprint": base.fingerprint()},
        "read_layers": [0, 1],
        "layers_per_reading": 1,
        "default_layer": 1,
        "write_layer": 0,
        "injection": "replace_scaled",
        "injection_constant": 4.5,
        "conditioning": "raw",
        "conditioning_constant": None,
        "slot_token_id": base.tokenizer(" ?", add_special_tokens=False)["input_ids"][0],
        "prompt": default_prompt(base.tokenizer),
        "positions": "sequential",
        "answer_role": "assistant",
        "lora": {"r": 4},
        "corpus": {"name": "é", "revision": "0", "mixture": {"forms": {"system": 1.0}, "pool": 0.5, "none": 0.05}},
        "training": {"code": "test", "loss": 1.25},
    }
    return DecoderConfig(**values | changes)


@pytest.fixture(scope="session")
def config_for():
    """config_for(base, **changes): a sidecar for a tiny base; it reads layers 0 and 1, and replaces behind block 0 with scaling."""
    return make_config


def example(n: int, span: str = "turn:-1", layer: int = 1, qa: int = 2, patched: bool = True, **changes) -> dict:
    """The n-th of a few training examples that differ in all their lengths."""
    words = "pirate doctor cook sea city weather".split()
    chat = [
        {"role": "system", "content": f"Speak like a {words[n % 6]}" + " at sea" * (n % 3) + "."},
        {"role": "user", "content": f"What of {n}?"},
    ]
    pairs = [
        {"question": "How will the assistant speak?" + " Please." * i, "answer": f"Like a {words[(n + i) % 6]}" + "!" * i}
        for i in range(qa)
    ]
    return {
        "id": f"goal-test-{n}",
        "form": "system",
        "chat": chat,
        "span": span,
        "layers": [layer],
        "qa": pairs,
        "patched": patched,
    } | changes


@pytest.fixture(scope="session")
def examples():
    """examples(n): n training examples with spans, layers and numbers of questions of many kinds, every fourth one not patched."""

    def build(n: int, **changes) -> list[dict]:
        spans = ["turn:-1", "all", "last:3"]
        kinds = [{"span": spans[i % 3], "layer": i % 2, "qa": 1 + i % 3, "patched": i % 4 != 3} for i in range(n)]
        return [example(i, **kind | changes) for i, kind in enumerate(kinds)]

    return build


@pytest.fixture(scope="session")
def decoder_folder(tiny, config_for, tmp_path_factory):
    """decoder_folder(family, **sidecar changes): a decoder for a tiny base as a folder, with a random LoRA that changes every answer."""
    import peft

    def build(family: str = "smol", **changes):
        base = tiny(family)
        folder = tmp_path_factory.mktemp(f"decoder-{family}")
        torch.manual_seed(1)
        lora = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
        peft.get_peft_model(base.model, lora).save_pretrained(folder)
        config = config_for(tiny(family), **changes)
        config.save(folder)
        if config.conditioning in MAPPED:
            width, centred = base.hidden_size, config.conditioning == "centred"
            inputs = {k: width * len(layer_list(k)) for k in config.maps}
            Projection({k: (None if centred else torch.randn(width, n), torch.randn(width)) for k, n in inputs.items()}).save(folder)
        return folder

    return build


@pytest.fixture
def tiny_decoder(tiny, decoder_folder):
    """tiny_decoder(family): a LatentDecoder over a tiny base."""
    from lqa import LatentDecoder

    return lambda family="smol", **changes: LatentDecoder.from_pretrained(decoder_folder(family, **changes), base=tiny(family))


def separate(base, config, rows):
    """The log-probabilities of all answers' tokens in order, from one plain row per question: no packing, mask, padding or positions."""
    out = []
    for row in rows:
        rendered = render(base.tokenizer, row["chat"])
        span = resolve_span(row["span"], rendered)
        with torch.no_grad():
            seen = []
            for layer in row["layers"]:
                handle = base.blocks[layer].register_forward_hook(lambda m, a, o: seen.append(o if torch.is_tensor(o) else o[0]))  # noqa: B023
                base.model(input_ids=torch.tensor([rendered.ids]))
                handle.remove()
            for pair in row["qa"]:
                ids, slots = config.prompt.prefix(base.tokenizer, config.slot_token_id, len(span), row["layers"])
                answer = config.prompt.answer(base.tokenizer, pair["answer"])
                ids = ids + config.prompt.question(base.tokenizer, pair["question"]) + answer
                slots = torch.tensor([slots + [False] * (len(ids) - len(slots))]) & row["patched"]
                values = torch.cat([h[0, span] for h in seen]) if row["patched"] else torch.empty(0, base.hidden_size)
                with Injection(base, config.write_layer, config.operation) as injection, injection.armed(slots, values):
                    logprobs = base.model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
                n = len(answer)
                out.append(logprobs[-n - 1 : -1].gather(1, torch.tensor(answer).unsqueeze(1)).squeeze(1))
    return torch.cat(out)


@pytest.fixture(scope="session", name="separate")
def _separate():
    """separate(base, config, rows): the log-probabilities of all answers' tokens by the plainest forward passes."""
    return separate


def make_trainer(base, config, out, rows, evaluation=None, cache=None, dropout=0.0, callbacks=None, **args):
    import peft
    from datasets import Dataset
    from trl import SFTConfig

    from train.collator import ActivationCache, LatentQACollator
    from train.trainer import LatentQATrainer

    values = {
        "output_dir": str(out),
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 8,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "bf16": False,
        "use_cpu": True,
        "gradient_checkpointing": False,
        "disable_tqdm": True,
        "seed": 0,
    }
    lora = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules="all-linear", r=4, lora_alpha=8, lora_dropout=dropout, base_model_name_or_path=base.name
    )
    base.model.config._name_or_path = base.name
    store = ActivationCache(cache, base.fingerprint()) if cache else None
    return LatentQATrainer(
        base,
        config,
        LatentQACollator(base.tokenizer, config, base.context, store),
        SFTConfig(**values | args),
        train_dataset=Dataset.from_list(rows),
        eval_dataset=evaluation,
        peft_config=lora,
        callbacks=callbacks,
    )


@pytest.fixture(scope="session")
def trainer_for():
    """trainer_for(base, config, out, rows, evaluation=None, cache=None, **SFTConfig): a trainer of a rank 4 LoRA, on CPU."""
    return make_trainer


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub on loopback for the client of this process: online, logged in as `me`, with an empty cache."""
    from hub_server import HubServer
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    monkeypatch.setenv("HF_TOKEN", "hf_write")
    with HubServer(HUB_PORT) as server:
        yield server
