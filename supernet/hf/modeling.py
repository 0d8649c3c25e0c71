"""A sub-model as a transformers model: the source of a folder's ``modeling_formfit.py``.

:func:`supernet.hf.export.write_hf` puts these classes, and the definitions of :mod:`space` that they use,
into one file. Easy to get wrong:

- The state of earlier calls is ``cache`` in transformers 5.24 and ``past_key_values`` in older 5.x; both
  names are accepted, and the output has the one that the installed version knows.
- A tied head is the embedding, used twice. It is one parameter, so transformers has nothing to tie.
- States cannot be cut back to an earlier token: no assisted generation.
- Positions count padding, which changes nothing: the mixers see only how far apart tokens are.
"""

# mypy: allow-untyped-calls
# (transformers leaves much of what a subclass calls untyped)

from dataclasses import fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from space.architecture import Architecture, ModelConfig
from space.blocks import State, add_parameter, forward, initial
from space.shapes import is_half_precision, is_matrix, model_shapes, parameter_mixer

# The field of an output that holds the cache.
CACHE = "cache" if "cache" in {field.name for field in fields(CausalLMOutputWithPast)} else "past_key_values"
REFUSED = ("inputs_embeds", "position_ids", "output_attentions", "output_hidden_states")


class FormfitConfig(PretrainedConfig):
    """The configuration of a model.

    Sizes under the names of transformers follow from the first two.

    Args:
        architecture: as in ``architecture.json``.
        model_config: settings of the space, as in ``architecture.json``.
        use_cache: a call returns a cache unless it says otherwise.
        bos_token_id: first token of a sequence.
        eos_token_id: token that ends generation.
        pad_token_id: token that fills a batch on the left.
        kwargs: other settings of transformers.
    """

    model_type = "formfit"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]  # noqa: RUF012 (an annotation makes it a field)

    def __init__(
        self,
        architecture: dict[str, Any] | None = None,
        model_config: dict[str, Any] | None = None,
        use_cache: bool = True,
        bos_token_id: int | None = 0,
        eos_token_id: int | None = 0,
        pad_token_id: int | None = 0,
        **kwargs: Any,
    ) -> None:
        # transformers also makes a config without arguments, to find what differs from it.
        architecture = architecture or {"width": 16, "layers": [{"mixer": "none", "ffn": 16}]}
        model_config = model_config or {"vocab_size": 256, "max_seq_len": 256, "head_dim": 16}
        read = Architecture.from_json(architecture, "config.json: architecture")
        settings = {
            "architecture": architecture,
            "model_config": model_config,
            "vocab_size": model_config["vocab_size"],
            "max_position_embeddings": model_config["max_seq_len"],
            "hidden_size": read.width,
            "num_hidden_layers": read.depth,
            "tie_word_embeddings": False,
            "use_cache": use_cache,
            "bos_token_id": bos_token_id,
            "eos_token_id": eos_token_id,
            "pad_token_id": pad_token_id,
        }
        super().__init__(**kwargs | settings)
        for name, value in settings.items():  # transformers drops those that it knows as generate()'s
            setattr(self, name, value)


class FormfitCache:
    """The state of B sequences: the number of tokens read, padding included, and the states of each slot.

    A call with a cache changes it in place.
    """

    is_compileable = False
    is_croppable = False
    is_linear = (False,)  # its length is known, so that generate() can leave out what it has seen

    def __init__(self) -> None:
        self.position = 0
        self.states: dict[int, State] = {}

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of tokens read; transformers asks by layer, and all are alike."""
        return self.position

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some of the sequences.

        Args:
            indices: their places, in the new order [B'].
        """
        for state in self.states.values():
            for name, value in state.items():
                state[name] = value.index_select(0, indices.to(value.device))

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """The same under the name that beam search uses."""
        self.batch_select_indices(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each sequence: [B, ...] -> [B * repeats, ...]."""
        for state in self.states.values():
            for name, value in state.items():
                state[name] = value.repeat_interleave(repeats, 0)


class FormfitForCausalLM(PreTrainedModel, GenerationMixin):
    """A sub-model that formfit found: :func:`forward` on weights of the same names."""

    config_class = FormfitConfig
    _is_stateful = True
    _supports_sdpa = True
    _skip_keys_device_placement = ["cache", "past_key_values"]  # noqa: RUF012 (transformers declares it)

    def __init__(self, config: FormfitConfig) -> None:
        super().__init__(config)
        self.architecture = Architecture.from_json(config.architecture, "config.json: architecture")
        self.model_config = ModelConfig.from_json(config.model_config, "config.json: model_config")
        self.shapes = shapes = model_shapes(self.architecture, self.model_config)
        for name, shape in shapes.items():
            if is_matrix(name, shape, self.architecture):
                _add_matrix(self, name, shape, parameter_mixer(name, self.architecture))
            else:
                add_parameter(self, name, torch.empty(shape))
        for slot, layer in enumerate(self.architecture.layers):
            if layer.mixer != "none":
                block: Any = self.get_submodule(f"layers.{slot}.mixer")
                block.mixer_name = layer.mixer  # for the first values of its parameters
        # These stay in fp32 whatever type a model is loaded in, as they do in training. The exponents of
        # decays need it, and norms and convolutions are too small for bf16 to gain anything.
        self._keep_in_fp32_modules_strict = [
            name for name, shape in shapes.items() if not is_half_precision(name, shape, self.architecture)
        ]
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        """Draw the parameters of a module that no file gave."""
        generator = torch.Generator().manual_seed(int(torch.randint(2**31, (), device="cpu")))
        for leaf, parameter in module.named_parameters(recurse=False):
            if not getattr(parameter, "_is_hf_initialized", False):
                # A matrix is the weight of a module; one without a name is an embedding of another size.
                name = getattr(module, "matrix_name", "embedding") if leaf == "weight" else leaf
                value = initial(
                    name, tuple(parameter.shape), generator,
                    mixer=getattr(module, "mixer_name", ""), tie_embeddings=self.model_config.tie_embeddings,
                )  # fmt: skip
                parameter.data.copy_(value)

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def get_input_embeddings(self) -> nn.Module:
        """The embedding, which is the output matrix too if they are tied."""
        return self.get_submodule("embedding")

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the embedding."""
        self.add_module("embedding", value)

    def get_output_embeddings(self) -> nn.Module | None:
        """The output matrix; None if it is the embedding."""
        return None if self.model_config.tie_embeddings else self.get_submodule("head")

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        """Replace the output matrix."""
        self.add_module("head", new_embeddings)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """Change the number of tokens, as for every model of transformers; the configuration follows."""
        embedding: nn.Embedding = super().resize_token_embeddings(*args, **kwargs)
        size = int(self.get_parameter("embedding.weight").shape[0])
        self.config.model_config = {**self.config.model_config, "vocab_size": size}
        self.config.vocab_size = size
        self.model_config = replace(self.model_config, vocab_size=size)
        return embedding

    def _weights(self) -> dict[str, Tensor]:
        """The values of all parameters by their names in :func:`space.shapes.model_shapes`."""
        return {
            name: _matrix(self.get_submodule(name))
            if is_matrix(name, shape, self.architecture)
            else self.get_parameter(name)
            for name, shape in self.shapes.items()
        }

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        cache: FormfitCache | None = None,
        past_key_values: FormfitCache | None = None,
        attention_mask: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """The arguments of :meth:`forward` in a step of generation.

        Args:
            input_ids: all tokens, or the new ones [B, T].
            next_sequence_length: number of new tokens; None before transformers 5.24.
            cache: the cache of the step before.
            past_key_values: the same, by its older name.
            attention_mask: [B, tokens in all].
            use_cache: as in :meth:`forward`.
            logits_to_keep: as in :meth:`forward`.
            kwargs: other arguments of transformers, which no formfit model needs.
        """
        cache = cache if cache is not None else past_key_values
        if next_sequence_length is not None:
            input_ids = input_ids[:, -next_sequence_length:]
        elif cache is not None and attention_mask is not None and input_ids.shape == attention_mask.shape:
            input_ids = input_ids[:, cache.position :]  # before 5.24 every step brings the whole text
        return {
            "input_ids": input_ids.to(self.device),
            "attention_mask": None if attention_mask is None else attention_mask.to(self.device),
            CACHE: cache,
            "use_cache": use_cache,
            "logits_to_keep": logits_to_keep,
        }

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: FormfitCache | None = None,
        past_key_values: FormfitCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        return_dict: bool | None = None,
        num_items_in_batch: int | Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        """Run the model on the next tokens of B sequences.

        Args:
            input_ids: [B, T].
            attention_mask: [B, tokens in the cache + T], 0 for padding, which stands on the left.
            cache: the cache that an earlier call returned; changed in place.
            past_key_values: the same, by its older name.
            labels: [B, T], the tokens themselves; -100 is ignored.
            use_cache: return a cache; None follows the config, and is False in training.
            logits_to_keep: number of last tokens that get logits, 0 for all; or the tokens' places.
            return_dict: False returns a tuple.
            num_items_in_batch: divisor of the summed loss; None is the number of labels.
            kwargs: other arguments of transformers, which no formfit model needs.

        Returns:
            logits [B, T or fewer, vocabulary], the loss where there are labels, and the cache.

        Raises:
            ValueError: the mask has another length, or an argument is not supported.
            TypeError: the cache is of another class.
        """
        _refuse(kwargs)
        if use_cache is None:
            use_cache = bool(self.config.use_cache) and not self.training
        cache = _cache(cache if cache is not None else past_key_values, use_cache)
        position, states = (cache.position, cache.states) if cache is not None else (0, None)
        total = position + input_ids.shape[1]
        mask = _padding(attention_mask, (input_ids.shape[0], total))
        last = logits_to_keep if isinstance(logits_to_keep, int) and labels is None else 0
        logits, states = forward(
            self._weights(), self.architecture, self.model_config, input_ids,
            position=position, states=states, mask=mask, keep=last,
        )  # fmt: skip
        if cache is not None:
            cache.position, cache.states = total, states
        loss = None if labels is None else _loss(logits, labels, num_items_in_batch)
        logits = _kept(logits, logits_to_keep)
        held: dict[str, Any] = {CACHE: cache if use_cache else None}
        output = CausalLMOutputWithPast(loss=loss, logits=logits, **held)
        wanted = self.config.return_dict if return_dict is None else return_dict
        return output if wanted else output.to_tuple()


def _add_matrix(model: nn.Module, name: str, shape: tuple[int, ...], mixer: str) -> None:
    """Register a matrix as the weight of a plain module, which libraries such as PEFT look for."""
    rows, columns = shape
    module: Any = nn.Embedding(rows, columns) if name == "embedding" else nn.Linear(columns, rows, bias=False)
    module.matrix_name, module.mixer_name = name, mixer  # for the first values
    *path, leaf = name.split(".")
    for step in path:
        if step not in model._modules:
            model.add_module(step, nn.Module())
        model = model.get_submodule(step)
    model.add_module(leaf, module)


def _matrix(module: Any) -> Tensor:
    """The matrix of a module, with what the active LoRA adapters of PEFT add to it."""
    base = getattr(module, "base_layer", None)
    if base is None:
        weight: Tensor = module.weight
        return weight
    if getattr(module, "lora_variant", None) or not hasattr(module, "lora_A"):
        raise TypeError(f"{type(module).__name__}: of PEFT's methods, formfit models take plain LoRA only")
    weight = base.weight
    if module.disable_adapters or module.merged:
        return weight
    for adapter in module.active_adapters:
        if adapter in module.lora_A:
            weight = weight + module.get_delta_weight(adapter).to(weight.dtype)
    return weight


def _refuse(arguments: dict[str, Any]) -> None:
    """Raise for an argument that asks for what the model has not."""
    asked = [name for name in REFUSED if arguments.get(name) is not None and arguments[name] is not False]
    if asked:
        raise ValueError(f"{', '.join(asked)}: formfit models take no such argument")


def _cache(cache: FormfitCache | None, wanted: bool) -> FormfitCache | None:
    """The cache of a call: the given one, a new one if one is wanted, or None."""
    if cache is not None and not isinstance(cache, FormfitCache):
        raise TypeError(
            f"cache: a {type(cache).__name__} has no states of these mixers; leave it out in the first call, "
            "and give the next one the FormfitCache that the first returned"
        )
    return FormfitCache() if wanted and cache is None else cache


def _kept(logits: Tensor, places: int | Tensor) -> Tensor:
    """The logits [B, T, V] of the last so many tokens (all for 0), or of the tokens at these places."""
    if isinstance(places, Tensor):
        return logits[:, places]
    return logits[:, -places:] if places else logits


def _padding(mask: Tensor | None, shape: tuple[int, int]) -> Tensor | None:
    """The mask as bool [B, tokens]; None where nothing is padding, which is faster."""
    if mask is None:
        return None
    if mask.shape != shape:
        raise ValueError(
            f"attention_mask: shape {tuple(mask.shape)}, expected {shape}: a value for each token, also for "
            "those in the cache"
        )
    return None if mask.all() else mask.bool()


def _loss(logits: Tensor, labels: Tensor, count: int | Tensor | None) -> Tensor:
    """Cross-entropy of each token given those before it, in fp32: logits [B, T, V], labels [B, T]."""
    flat, wanted = logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten().to(logits.device)
    if count is None:
        return F.cross_entropy(flat, wanted)
    return F.cross_entropy(flat, wanted, reduction="sum") / count
