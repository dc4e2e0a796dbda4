# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""LoRA adapters of M3FM through PEFT: which modules, on which base, and switched per call.

An adapter is PEFT's own folder (`adapter_config.json`, `adapter_model.safetensors`), which `PeftModel.from_pretrained`
and `model.load_adapter` read, and beside it `m3fm_base.json`: the hashes of the weights that it was trained on.
"""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

if TYPE_CHECKING:
    from peft import LoraConfig, PeftModel

#: Names that transformers gives to linear layers: query and value of attention each on its own (DINOv2, ViT, BERT,
#: DistilBERT, DeBERTa, Llama) or in one matrix with the key (ModernBERT, GPT-2, GPT-NeoX).
QUERY_VALUE = r"(q_proj|v_proj|q_lin|v_lin|query|value|query_proj|value_proj|Wqkv|qkv|c_attn|query_key_value)"
# The other layers of a decoder's blocks.
_BLOCK = (
    r"(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|fc1|fc2|c_attn|c_proj|c_fc|query_key_value|dense\w*)"
)
# Regular expressions over whole module names. The towers are adapted where LoRA's authors did (Hu et al., ICLR 2022),
# the decoder in all linear layers of its blocks, which writing needs (QLoRA: Dettmers et al., NeurIPS 2023).
VISION_LORA = rf"(.*\.)?vision_model\..*\.{QUERY_VALUE}"
TEXT_LORA = rf"(.*\.)?text_encoder\..*\.{QUERY_VALUE}"
DECODER_LORA = rf"(.*\.)?decoder\..*\.{_BLOCK}"

#: What `lora_config` takes: diagnosis, another language or vocabulary of findings, a site's report style, everything.
PRESETS: Mapping[str, str] = {
    "vision": VISION_LORA,
    "text": TEXT_LORA,
    "decoder": DECODER_LORA,
    "all": f"({VISION_LORA}|{TEXT_LORA}|{DECODER_LORA})",
}
#: `modules_to_save` of an adapter for `M3FMForImageClassification`.
CLASSIFICATION_HEAD = ("classifier",)
BASE_FILE = "m3fm_base.json"
_ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")
# Heads belong to adapters, and memories of reports are no part of the network that adapters are trained in.
_NOT_BASE = ("classifier.", "support_memory")


def lora_config(
    preset: str,
    r: int = 8,
    lora_alpha: int | None = None,
    lora_dropout: float = 0.0,
    modules_to_save: Sequence[str] = (),
) -> "LoraConfig":
    """Returns PEFT's configuration for a part of M3FM.

    Args:
        preset: One of `PRESETS`: "vision", "text", "decoder" or "all".
        r: Rank of the updates.
        lora_alpha: Updates are scaled by `lora_alpha / r`; None: twice `r`.
        lora_dropout: Before the updates, in training.
        modules_to_save: Trained in full and saved with the adapter: `CLASSIFICATION_HEAD` for diagnosis.

    Raises:
        ValueError: If the preset is unknown or the rank is below 1.
        ImportError: Without PEFT.
    """
    if preset not in PRESETS:
        raise ValueError(f"Unknown LoRA preset {preset!r}: expected one of {', '.join(PRESETS)}.")
    if r < 1:
        raise ValueError(f"Expected r >= 1, got {r}.")
    return import_peft().LoraConfig(
        r=r,
        lora_alpha=2 * r if lora_alpha is None else lora_alpha,
        lora_dropout=lora_dropout,
        target_modules=PRESETS[preset],
        modules_to_save=list(modules_to_save) or None,
    )


# --------------------------------------------------------------------------------------------------------------------
# Which base


def base_fingerprint(model: torch.nn.Module) -> dict[str, str]:
    """Returns the SHA-256 of the base weights by part (`vision_model`, `text_encoder`, `decoder`, ...), as hex.

    Adapters in the model, a diagnosis head and the support memory are not counted, and values are hashed as float32:
    the parts that two classes share have the same hash in both, whatever precision a checkpoint is stored in.

    Args:
        model: An M3FM model, with or without adapters, unmerged.
    """
    digests: dict[str, Any] = {}
    weights = [(_base_name(name), weight) for name, weight in model.state_dict().items()]
    for name, weight in sorted((pair for pair in weights if not pair[0].startswith(_NOT_BASE)), key=itemgetter(0)):
        part = name.split(".", 1)[0]
        digest = digests.setdefault(part, hashlib.sha256())
        digest.update(name.encode())
        digest.update(weight.detach().to("cpu", torch.float32).contiguous().numpy())
    return {part: digest.hexdigest() for part, digest in sorted(digests.items())}


def _base_name(name: str) -> str:
    """Returns the name that a weight has without PEFT and in `M3FMModel`; "classifier." for what adapters brought."""
    name = name.removeprefix("base_model.model.").replace(".base_layer.", ".").replace(".original_module.", ".")
    if "lora_" in name or ".modules_to_save." in name:
        return "classifier."
    return name.removeprefix("model.")


def check_base(recorded: Mapping[str, str], model: torch.nn.Module, what: str) -> None:
    """Refuses a model whose weights are not those that something was trained on.

    Args:
        recorded: `base_fingerprint` of the model that it was trained on.
        model: The model that it is to be used with; the parts that both have are compared.
        what: Named in the message, like "The adapter in tb/".

    Raises:
        ValueError: If a part differs, or no part is common.
    """
    found = base_fingerprint(model)
    differing = sorted(part for part in recorded.keys() & found.keys() if recorded[part] != found[part])
    if differing or not recorded.keys() & found.keys():
        raise ValueError(
            f"{what} was trained on another base: {', '.join(differing) or 'no part'} of this model "
            f"{'has other weights' if differing else 'is known to it'}. Load it with the checkpoint it was trained on."
        )


# --------------------------------------------------------------------------------------------------------------------
# Save and load


def save_adapter(model: torch.nn.Module, folder: str | Path, adapter_name: str = "default") -> Path:
    """Saves one adapter alone, a few MB, with the hashes of its base; returns its folder.

    What was trained in full beside LoRA, like the projections of a run, is a part of the base that it names.

    Args:
        model: With the adapter: a `PeftModel`, or an M3FM model with LoRA in its own layers, as training puts it.
        folder: Made if missing. Adapters that are not called "default" go into a folder of their name in it.
        adapter_name: Which of the model's adapters.

    Raises:
        ValueError: If the model has no such adapter, or the adapter is merged into its base.
    """
    if any(getattr(module, "merged", False) for module in model.modules()):
        raise ValueError("The adapter is merged into its base: call unmerge_adapter() before it is saved.")
    folder = Path(folder)
    target = folder if adapter_name == "default" else folder / adapter_name
    if isinstance(model, import_peft().PeftModel):
        _refuse_unknown_adapter(model, adapter_name)
        model.save_pretrained(folder, selected_adapters=[adapter_name])
    else:
        _save_injected(model, target, adapter_name)
    base = {"weights_sha256": base_fingerprint(model)}
    (target / BASE_FILE).write_text(json.dumps(base, indent=1) + "\n", encoding="utf-8")
    return target


def _save_injected(model: torch.nn.Module, folder: Path, adapter_name: str) -> None:
    """Writes what `PeftModel.save_pretrained` would, of LoRA in the layers of a model that is no `PeftModel`."""
    from peft.tuners.lora import LoraLayer

    found = {name: each for name, each in model.named_modules() if isinstance(each, LoraLayer)}
    layers = {name: each for name, each in found.items() if adapter_name in each.r}
    if not layers:
        known = sorted({name for each in found.values() for name in each.r})
        raise ValueError(f"The model has no adapter {adapter_name!r}: expected one of {known}.")
    ranks = {name: each.r[adapter_name] for name, each in layers.items()}
    alphas = {name: each.lora_alpha[adapter_name] for name, each in layers.items()}
    first = next(iter(layers))
    config = import_peft().LoraConfig(
        r=ranks[first],
        lora_alpha=alphas[first],
        lora_dropout=max(getattr(each.lora_dropout[adapter_name], "p", 0.0) for each in layers.values()),
        target_modules=sorted(layers),
        # Towers may have LoRA of different ranks.
        rank_pattern={name: r for name, r in ranks.items() if r != ranks[first]},
        alpha_pattern={name: alpha for name, alpha in alphas.items() if alpha != alphas[first]},
        fan_in_fan_out=any(each.fan_in_fan_out for each in layers.values()),
        inference_mode=True,
    )
    weights = {
        f"base_model.model.{name.replace(f'.{adapter_name}.', '.')}": weight.detach().cpu().contiguous()
        for name, weight in model.state_dict().items()
        if re.search(rf"\.lora_\w+\.{re.escape(adapter_name)}\.", name)
    }
    folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(folder)
    save_file(weights, folder / _ADAPTER_FILES[1], metadata={"format": "pt"})


def load_adapter_checked(
    model: torch.nn.Module, folder: str | Path, adapter_name: str = "default", is_trainable: bool = False
) -> "PeftModel":
    """Loads an adapter as `PeftModel.from_pretrained` does, and refuses one of another base.

    Args:
        model: The base, or a `PeftModel` of it that has other adapters.
        folder: Of the adapter.
        adapter_name: Its name in the model.
        is_trainable: Whether training goes on from it.

    Returns:
        The model with the adapter active.

    Raises:
        ValueError: If the folder is no adapter, was trained on another base, or the name is taken.
        ImportError: Without PEFT.
    """
    peft_model = import_peft().PeftModel
    folder = Path(folder)
    if missing := [name for name in _ADAPTER_FILES if not (folder / name).is_file()]:
        raise ValueError(f"{folder} is not an adapter: expected {' and '.join(missing)} in it.")
    record = folder / BASE_FILE
    if not record.is_file():
        raise ValueError(
            f"{folder} does not say what base it was trained on: expected {BASE_FILE}, which save_adapter writes. "
            "PeftModel.from_pretrained loads it unchecked."
        )
    try:
        recorded = json.loads(record.read_text(encoding="utf-8"))["weights_sha256"]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{record} is damaged: expected JSON with weights_sha256.") from None
    check_base(recorded, model, f"The adapter in {folder}")
    if not isinstance(model, peft_model):
        return peft_model.from_pretrained(
            model, folder, adapter_name=adapter_name, is_trainable=is_trainable, use_safetensors=True
        )
    if adapter_name in model.peft_config:
        raise ValueError(f"The model already has an adapter {adapter_name!r}: expected another name.")
    model.load_adapter(folder, adapter_name=adapter_name, is_trainable=is_trainable, use_safetensors=True)
    model.set_adapter(adapter_name, inference_mode=not is_trainable)
    return model.eval() if not is_trainable else model


# --------------------------------------------------------------------------------------------------------------------
# Switch


@contextlib.contextmanager
def use_adapter(model: torch.nn.Module, adapter_name: str | None) -> Iterator[torch.nn.Module]:
    """Runs calls with one of a model's adapters, or with none; what was active before is active again afterwards.

    Args:
        model: A `PeftModel`, or a transformers model whose adapters came by `model.load_adapter`.
        adapter_name: None runs the base, whose outputs are then exactly those without any adapter.

    Yields:
        The model.

    Raises:
        ValueError: If the model has no such adapter.

    Example:

    ```python
    >>> with use_adapter(model, "tb"):
    ...     logits = model(**inputs).logits
    ```
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import ModulesToSaveWrapper

    if adapter_name is not None:
        _refuse_unknown_adapter(model, adapter_name)
    # By layer: `enable_adapters` of transformers 5.23 leaves heads in modules_to_save disabled.
    layers = [layer for layer in model.modules() if isinstance(layer, BaseTunerLayer | ModulesToSaveWrapper)]
    was_disabled = any(layer.disable_adapters for layer in layers)
    trainable = [name for name, weight in model.named_parameters() if weight.requires_grad]
    active = model.active_adapters() if callable(model.active_adapters) else model.active_adapter
    if adapter_name is not None:
        model.set_adapter(adapter_name)
    _enable(layers, adapter_name is not None)
    try:
        yield model
    finally:
        model.set_adapter(active)
        _enable(layers, not was_disabled)
        _require_gradients(model, trainable)


def _enable(layers: Sequence[Any], enabled: bool) -> None:
    for layer in layers:
        layer.enable_adapters(enabled)


def _require_gradients(model: torch.nn.Module, names: Sequence[str]) -> None:
    """Makes these weights the trainable ones: switching adapters makes the active one trainable."""
    trainable = set(names)
    for name, weight in model.named_parameters():
        weight.requires_grad_(name in trainable)


def _refuse_unknown_adapter(model: torch.nn.Module, adapter_name: str) -> None:
    known = list(getattr(model, "peft_config", {}))
    if adapter_name not in known:
        raise ValueError(f"The model has no adapter {adapter_name!r}: expected one of {known}.")


def import_peft() -> Any:
    """Returns the module `peft`.

    Raises:
        ImportError: With the extra that brings it.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError('Adapters need PEFT: pip install "m3fm[train]"') from error
    return peft
