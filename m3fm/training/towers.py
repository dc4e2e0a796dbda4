# Copyright 2026 The m3fm authors. Licensed under the Apache License, Version 2.0.
"""What of a tower is trained, how fast each of its layers is, and LoRA inside it.

A tower is a transformer of any architecture: its blocks are found, not named. LoRA is put into its layers in place, so
that the model stays the class that it is, with its `forward`, its `save_pretrained` and its name in checkpoints.
"""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..adapters import QUERY_VALUE, import_peft

__all__ = [
    "LoraBlock",
    "blocks_of",
    "check_training",
    "has_lora",
    "layer_depth",
    "merge_lora",
    "parameter_groups",
    "set_training",
    "unread_parameters",
]

TOWERS = ("vision_model", "text_encoder", "decoder")
_LAST = re.compile(r"last_(\d+)")


@dataclass(frozen=True)
class LoraBlock:
    """How LoRA is put into a tower (Hu et al., ICLR 2022).

    Attributes:
        r: Rank of the updates.
        alpha: Updates are scaled by `alpha / r`; None: twice `r`.
        dropout: Before the updates, in training.
        layers: "attention": query and value alone, where LoRA's authors put it; "all": every linear layer of the
            blocks, which writing needs (QLoRA: Dettmers et al., NeurIPS 2023); "auto": "all" in a decoder, else
            "attention".
    """

    r: int = 8
    alpha: int | None = None
    dropout: float = 0.0
    layers: str = "auto"

    def __post_init__(self):
        if self.r < 1:
            raise ValueError(f"`lora` expected r >= 1, got {self.r}.")
        if self.alpha is not None and self.alpha <= 0:
            raise ValueError(f"`lora` expected alpha > 0, got {self.alpha}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"`lora` expected 0 <= dropout < 1, got {self.dropout}.")
        if self.layers not in ("auto", "attention", "all"):
            raise ValueError(f'`lora` expected layers to be "auto", "attention" or "all", got {self.layers!r}.')


# --------------------------------------------------------------------------------------------------------------------
# Blocks


def blocks_of(tower: nn.Module) -> tuple[str, nn.ModuleList]:
    """Returns the name and the list of a tower's blocks: the longest list of modules that is in no other list.

    Raises:
        ValueError: If it has none.
    """
    lists: dict[str, nn.ModuleList] = {}
    for name, module in tower.named_modules():
        nested = any(name.startswith(f"{outer}.") for outer in lists)
        if isinstance(module, nn.ModuleList) and len(module) and not nested:
            lists[name] = module
    if not lists:
        raise ValueError(f"{type(tower).__name__} has no list of blocks: expected a transformer.")
    name = max(lists, key=lambda name: len(lists[name]))
    return name, lists[name]


def layer_depth(tower: nn.Module) -> dict[str, int]:
    """Returns the depth of each parameter by name: 0 embeddings, 1 to N the N blocks, N + 1 what follows them."""
    name, blocks = blocks_of(tower)
    inside = re.compile(rf"{re.escape(name)}\.(\d+)\.")
    inputs = _embedding_weights(tower)
    depths, behind = {}, False
    for each, weight in tower.named_parameters():
        if block := inside.match(each):
            depths[each], behind = 1 + int(block.group(1)), True
            continue
        # Modules come in the order in which they are run, but for final norms that are named so (OPT).
        follows = (behind or "final" in each) and id(weight) not in inputs
        depths[each] = len(blocks) + 1 if follows else 0
    return depths


def _embedding_weights(tower: nn.Module) -> set[int]:
    tables = [module for name, module in tower.named_modules() if name.rsplit(".", 1)[-1].startswith("embeddings")]
    if isinstance(tower, PreTrainedModel):
        tables += [tower.get_input_embeddings()]
    return {id(weight) for table in tables if isinstance(table, nn.Module) for weight in table.parameters()}


def unread_parameters(tower: PreTrainedModel) -> set[str]:
    """Returns the names of parameters that the states of the last layer do not depend on, like DINOv2's mask token.

    They would get no gradient, for which DistributedDataParallel would wait. The tower is run once on the meta device,
    where nothing is computed; one whose code asks there for values (DeBERTa) is taken to read all that it has.
    """
    with torch.device("meta"):
        twin = type(tower)(tower.config).eval()
    try:
        output = twin(**example_inputs(twin))
    except RuntimeError:
        return set()
    states = output.logits if hasattr(output, "logits") else output.last_hidden_state
    names, weights = zip(*twin.named_parameters(), strict=True)
    gradients = torch.autograd.grad(states, weights, torch.empty_like(states), allow_unused=True)
    own = {name for name, _ in tower.named_parameters()}
    return {name for name, gradient in zip(names, gradients, strict=True) if gradient is None} & own


def example_inputs(tower: PreTrainedModel, height: int | None = None, width: int | None = None) -> dict[str, Any]:
    """Returns the smallest inputs that a tower takes, on the meta device: an image of its size, or four tokens."""
    if tower.main_input_name != "pixel_values":
        return {"input_ids": torch.zeros(1, 4, dtype=torch.long, device="meta")}
    size = getattr(tower.config, "image_size", None) or 224
    own_height, own_width = size if isinstance(size, list | tuple) else (size, size)
    channels = getattr(tower.config, "num_channels", 3)
    return {"pixel_values": torch.zeros(1, channels, height or own_height, width or own_width, device="meta")}


# --------------------------------------------------------------------------------------------------------------------
# What is trained


def check_training(mode: str, num_blocks: int, where: str) -> int | None:
    """Refuses a mode of training that a tower cannot have; returns N of "last_N", else None.

    Args:
        mode: "frozen", "full", "lora" or "last_N".
        num_blocks: Blocks of the tower.
        where: Named in the message, like "vision_training".

    Raises:
        ValueError: If the mode is unknown, or N is not one of 1 to `num_blocks`.
    """
    if mode in ("frozen", "full", "lora"):
        return None
    last = _LAST.fullmatch(mode) if isinstance(mode, str) else None
    if last is None:
        raise ValueError(
            f'`{where}` expected "frozen", "full", "lora" or "last_N" (as "last_4": the last four blocks), got '
            f"{mode!r}."
        )
    if not 1 <= int(last.group(1)) <= num_blocks:
        raise ValueError(
            f'`{where}` is {mode!r}, and the tower has {num_blocks} blocks: expected "last_1" to "last_{num_blocks}".'
        )
    return int(last.group(1))


def set_training(tower: PreTrainedModel, mode: str, lora: LoraBlock | None = None, where: str = "training") -> None:
    """Sets what of a tower is trained; parameters that its states do not depend on never are.

    Args:
        tower: An image tower, a text encoder or a decoder.
        mode: "frozen"; "full"; "lora": updates of low rank alone, put into its layers in place; "last_N": its last N
            blocks and what follows them.
        lora: Of mode "lora"; None: the default one.
        where: The recipe's name for the mode, for messages.

    Raises:
        ValueError: If the tower cannot be trained so.
        ImportError: For "lora" without PEFT.
    """
    num_blocks = len(blocks_of(tower)[1])
    last = check_training(mode, num_blocks, where)
    if mode == "lora":
        _add_lora(tower, lora or LoraBlock())
        return
    tower.requires_grad_(False)
    if mode == "frozen":
        return
    unread = unread_parameters(tower)
    first = 0 if last is None else num_blocks - last + 1
    depths = layer_depth(tower)
    for name, weight in tower.named_parameters():
        weight.requires_grad_(depths[name] >= first and name not in unread)


# --------------------------------------------------------------------------------------------------------------------
# LoRA


def _add_lora(tower: PreTrainedModel, lora: LoraBlock) -> None:
    peft = import_peft()
    if has_lora(tower):
        raise ValueError(f"{type(tower).__name__} already has LoRA in its layers: merge_lora it first.")
    config = peft.LoraConfig(
        r=lora.r,
        lora_alpha=2 * lora.r if lora.alpha is None else lora.alpha,
        lora_dropout=lora.dropout,
        target_modules=_lora_layers(tower, lora.layers),
    )
    tower.requires_grad_(False)
    peft.inject_adapter_in_model(config, tower)
    tower.train(tower.training)  # what is new in it would train in a tower that does not


def _lora_layers(tower: PreTrainedModel, layers: str) -> list[str]:
    name, blocks = blocks_of(tower)
    linear = [
        f"{name}.{each}"
        for each, module in blocks.named_modules()
        if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"  # GPT-2's linear layer
    ]
    if layers == "auto":
        layers = "all" if tower.get_output_embeddings() is not None else "attention"
    attention = [each for each in linear if re.fullmatch(QUERY_VALUE, each.rsplit(".", 1)[-1])]
    return attention if layers == "attention" and attention else linear


def has_lora(model: nn.Module) -> bool:
    """Tells whether LoRA is in the layers of a model."""
    return any(".lora_A." in name for name, _ in model.named_parameters())


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Adds the updates of LoRA to the weights, and takes LoRA out: the model is an ordinary one again."""
    if not has_lora(model):
        return
    import_peft()
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, layer in list(model.named_modules()):
        if isinstance(layer, BaseTunerLayer):
            layer.merge()
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, layer.get_base_layer())
    for module in model.modules():
        if "peft_config" in vars(module):
            del module.peft_config


# --------------------------------------------------------------------------------------------------------------------
# How fast


def parameter_groups(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    layer_decay: float = 1.0,
    rates: Mapping[str, float] | None = None,
) -> list[dict[str, Any]]:
    """Sorts what is trained into an optimizer's groups.

    A weight learns at `learning_rate * rates[part] * layer_decay ** (N + 1 - depth)`, depth being that of
    `layer_depth` in a tower of N blocks; what is outside the towers has no depth (BEiT: Bao et al., ICLR 2022,
    appendix). Weight decay is for matrices and token embeddings: norms, biases, queries, positions and the temperature
    have none.

    Args:
        model: An M3FM model, not wrapped.
        learning_rate: Of the parts that are not in `rates`, at the top of the towers.
        weight_decay: Of the matrices.
        layer_decay: How much slower each block is than the one above it; 1: not at all.
        rates: Multipliers by part: `vision_model`, `text_encoder`, `decoder`, or any other module or parameter that
            stands beside them.

    Returns:
        Groups with `params`, `lr`, `weight_decay`, and a `name` for logs. Each trained parameter is in exactly one.

    Raises:
        ValueError: If a part is unknown or a number is out of range.
    """
    if not 0 < layer_decay <= 1:
        raise ValueError(f"`layer_decay` expected 0 < layer_decay <= 1, got {layer_decay}.")
    rates = dict(rates or {})
    parts = {_part(name) for name, _ in model.named_parameters()}
    for part, rate in rates.items():
        if part not in parts:
            raise ValueError(
                f"`learning_rates` names {part!r}: expected parts of {type(model).__name__}, "
                f"{', '.join(sorted(parts))}."
            )
        if not rate > 0:
            raise ValueError(
                f'`learning_rates` expected a number above 0 for {part}, got {rate}: freeze it by "frozen".'
            )
    groups: dict[tuple[str, int, bool], dict[str, Any]] = {}
    for name, weight, steps in _trained(model):
        part, decays = _part(name), weight.dim() > 1 and name.endswith(".weight")
        lr = learning_rate * rates.get(part, 1.0) * layer_decay**steps
        group = groups.setdefault(
            (part, steps, decays),
            {
                "params": [],
                "lr": lr,
                "weight_decay": weight_decay if decays else 0.0,
                "name": f"{part}-{steps}" + ("" if decays else "-no_decay"),
            },
        )
        group["params"].append(weight)
    return list(groups.values())


def _part(name: str) -> str:
    return name.removeprefix("model.").split(".", 1)[0]


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter, int]]:
    """Yields the name, the parameter and the steps from the top of its tower of all that is trained."""
    below: dict[str, int] = {}
    for prefix, module in model.named_modules():
        if prefix.removeprefix("model.") in TOWERS:
            top = len(blocks_of(module)[1]) + 1
            below |= {f"{prefix}.{name}": top - depth for name, depth in layer_depth(module).items()}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            yield name, weight, below.get(name, 0)
