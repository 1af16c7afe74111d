"""PAG, SoftPAG, head sets and the other guidance of this package as a guider of diffusers' modular pipelines.

pipe.update_components(guider=Guider(PAG(3.0, layers="b7:3"), guidance_scale=7.0))
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import diffusers
import torch
from diffusers.configuration_utils import FrozenDict, register_to_config
from torch import nn

from operators import RestoreError
from restore.backbones.forwards import replace_forward
from restore.guidance import Guidance, Term, build_guidance, describe_guidance
from restore.guidance.base import SCHEDULES, Estimate, as_guidance
from restore.guidance.config import require_known_names
from restore.guidance.layouts import NetworkCall, sample_of
from restore.guidance.pipelines import PipelineNetwork, check_terms, check_unguided, find_network, split_guidance
from restore.zoo.sharing import explain_hub

try:
    from diffusers.guiders.guider_utils import BaseGuidance, GuiderOutput
    from diffusers.modular_pipelines import ComponentSpec, ModularPipelineBlocks
    from diffusers.modular_pipelines.flux.denoise import FluxKontextLoopDenoiser, FluxLoopDenoiser

    BaseGuidance.prepare_inputs_from_block_state  # noqa: B018
except (ImportError, AttributeError) as error:
    raise RestoreError(
        "restore.integrations.diffusers must have the guiders of diffusers 0.36 or newer, got diffusers "
        f"{diffusers.__version__}; try restore.guided with an ordinary pipeline"
    ) from error


class Guider(BaseGuidance):
    """Classifier-free guidance with restore's guidance in the denoising loop of a modular pipeline:

        u + g (c − u) + sum_k s_k (c − c_weak_k)                         (PAG, Ahn et al. 2024, eq. 14)

    It is what restore.guided does in an ordinary pipeline: terms, layers, heads and scope mean the same, s = 0 is off,
    and weak passes start at the first layer that they change. They run while the network predicts c, and what the
    network returns stays as it is.

    guidance: terms such as PAG, or plain data as restore.guidance.build_guidance takes it, such as a search's
        guidance.yaml; its names must be restore's own, since a file from the hub must not name code to import.
    guidance_scale: g, as in diffusers; 1 is off, and no prediction without the prompt is made.
    start, stop: shares of the steps between which anything is guided; terms_start, terms_stop: those between which the
        terms act, beside a term's own `interval` of the scheduler's times.
    Raises RestoreError for CFG terms (give guidance_scale = w + 1), and combinations, schedules and terms that need
    noise levels; once it sees the network, for one that is not known, and for unknown layers.
    """

    _input_predictions = ["pred_cond", "pred_uncond"]

    @register_to_config
    def __init__(
        self,
        guidance: Term | Guidance | Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        guidance_scale: float = 7.5,
        start: float = 0.0,
        stop: float = 1.0,
        terms_start: float = 0.0,
        terms_stop: float = 1.0,
        enabled: bool = True,
    ) -> None:
        super().__init__(start, stop, enabled)
        if not 0 <= terms_start <= terms_stop <= 1:
            raise RestoreError(
                f"terms_start and terms_stop must be shares of the steps in order, got {terms_start} and {terms_stop}"
            )
        if guidance is not None and not isinstance(guidance, (Term, Guidance)):
            require_known_names(guidance)
            guidance = build_guidance(guidance)
        self.guidance = as_guidance(guidance)
        check_terms(self.guidance)
        for term in self.guidance.terms if self.guidance is not None else ():
            if term.schedule in SCHEDULES and term.schedule != "constant":
                raise RestoreError(f"schedule must be 'constant' or a function in a guider, got '{term.schedule}'")
        self.guidance_scale, self.terms_start, self.terms_stop = guidance_scale, terms_start, terms_stop
        self._armed, self._estimate, self._changes, self._adapter = ExitStack(), None, None, None
        self._seen: tuple[torch.Tensor, float, torch.Tensor] | None = None
        self._shift: torch.Tensor | None = None
        # As plain data; and diffusers takes options that are not given by name for defaults when it copies a config.
        self.register_to_config(guidance=describe_guidance(self.guidance), _use_default_values=[])

    def new(self, **kwargs: Any) -> Guider:
        """Return a copy with other options."""
        return super().new(**{"guidance": self.guidance} | kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Write guider_config.json, see diffusers. Raises RestoreError if it names code that is not restore's."""
        require_known_names(self.config["guidance"])
        super().save_pretrained(save_directory, push_to_hub, **kwargs)

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Push guider_config.json, see diffusers' PushToHubMixin for the options (private, token, ...). Raises
        RestoreError as save_pretrained does, and if the hub refuses it or the upload breaks off."""
        require_known_names(self.config["guidance"])
        with explain_hub(repo_id, "pushed to"):
            return super().push_to_hub(repo_id, **options)

    def set_state(self, step: int, num_inference_steps: int, timestep: torch.Tensor) -> None:
        if self._step is None or step <= self._step:
            self._estimate = None  # layers may have changed between two runs
        super().set_state(step, num_inference_steps, timestep)
        self._armed.close()
        self._seen = self._shift = None

    def prepare_models(self, denoiser: nn.Module) -> None:
        """Let the next call of the network, by this thread, make the weak passes as well if it is the one with the
        prompt."""
        super().prepare_models(denoiser)
        self._armed.close()
        if not (self.is_conditional and self.guidance is not None and self._are_terms_enabled()):
            return
        if self._estimate is None or self._adapter.network is not denoiser:
            self._adapter = PipelineNetwork(find_network(denoiser))
            guidance, self._changes = split_guidance(self.guidance, self._adapter)
            self._estimate = Estimate(self._adapter, guidance)
        self._armed.enter_context(replace_forward([denoiser], self._guide))

    def cleanup_models(self, denoiser: nn.Module) -> None:
        self._armed.close()

    def _guide(self, network: nn.Module, inner: Any) -> Any:
        def forward(*args, **kwargs):
            self._armed.close()  # one call only, whatever it ends with
            estimate = self._estimate
            call = NetworkCall(network, args, kwargs, None, "all", estimate.tapes, self._adapter.time_scale)
            check_unguided(network, None)
            with replace_forward([network], lambda *_: inner):
                strong, eps = estimate(call.x, call.t, call)
            self._seen = call.x, call.t, sample_of(call.output)
            self._shift = eps - strong.eps.detach() if estimate.is_guided else None
            return call.output

        return forward

    def prepare_inputs(self, data: dict[str, Any]) -> list[Any]:
        return [self._prepare_batch(data, i, name) for i, name in self._list_batches()]

    def prepare_inputs_from_block_state(self, data: Any, input_fields: dict[str, Any]) -> list[Any]:
        return [self._prepare_batch_from_block_state(input_fields, data, i, name) for i, name in self._list_batches()]

    def _list_batches(self) -> list[tuple[int, str]]:
        return [*enumerate(self._input_predictions)][: self.num_conditions]

    def __call__(self, data: list[Any]) -> GuiderOutput:
        """Return the guided prediction of a step."""
        try:
            return super().__call__(data)
        finally:
            # Between two runs nobody is outside of a window: the prompt's encoder asks how many predictions are made.
            if self._num_inference_steps is not None and self._step >= self._num_inference_steps - 1:
                self._step = self._num_inference_steps = self._estimate = self._adapter = None
            self._seen = self._shift = None

    def forward(self, pred_cond: torch.Tensor, pred_uncond: torch.Tensor | None = None) -> GuiderOutput:
        pred = pred_cond if pred_uncond is None else pred_uncond + self.guidance_scale * (pred_cond - pred_uncond)
        if self._seen is not None:
            x, t, strong = self._seen
            if not torch.allclose(_cut(strong, pred).to(pred), pred_cond, rtol=0, atol=0, equal_nan=True):
                raise RestoreError("a pipeline with this guider must leave the network's prediction as it is")
            pred = pred if self._shift is None else pred + _cut(self._shift, pred).to(pred)
            pred = self._changes.change(pred, _cut(x, pred), t)
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)

    @property
    def is_conditional(self) -> bool:
        return self._count_prepared == 1

    @property
    def num_conditions(self) -> int:
        is_off = not self._enabled or self.guidance_scale == 1 or not self._is_within(self._start, self._stop)
        return 1 if is_off else 2

    def _are_terms_enabled(self) -> bool:
        windows = (self._start, self._stop), (self.terms_start, self.terms_stop)
        return self._enabled and all(self._is_within(*window) for window in windows)

    def _is_within(self, start: float, stop: float) -> bool:
        n = self._num_inference_steps
        return n is None or int(start * n) <= self._step < int(stop * n)


class _GuidedFlux(ModularPipelineBlocks):
    @property
    def expected_components(self) -> list[ComponentSpec]:
        config = FrozenDict({"guidance_scale": 1.0})
        guider = ComponentSpec("guider", Guider, config=config, default_creation_method="from_config")
        return [guider, *super().expected_components]

    @torch.no_grad()
    def __call__(self, components: Any, block_state: Any, i: int, t: torch.Tensor) -> tuple[Any, Any]:
        guider = components.guider
        guider.set_state(step=i, num_inference_steps=block_state.num_inference_steps, timestep=t)
        if guider.num_conditions != 1:
            scale = guider.guidance_scale
            raise RestoreError(f"guidance_scale must be 1 with FLUX.1, which embeds no negative prompt, got {scale}")
        (batch,) = guider.prepare_inputs({"hidden_states": block_state.latents})
        guider.prepare_models(components.transformer)
        components, block_state = super().__call__(components, block_state, i=i, t=t)
        guider.cleanup_models(components.transformer)
        batch.noise_pred = block_state.noise_pred
        block_state.noise_pred = guider([batch]).pred
        return components, block_state


class GuidedFluxDenoiser(_GuidedFlux, FluxLoopDenoiser):
    """FLUX.1's step of the denoising loop with a guider."""


class GuidedKontextDenoiser(_GuidedFlux, FluxKontextLoopDenoiser):
    """FLUX.1 Kontext's step of the denoising loop with a guider."""


def add_guider(blocks: ModularPipelineBlocks) -> ModularPipelineBlocks:
    """Give FLUX.1's blocks, which have none, the component `guider`, and return them.

    Raises RestoreError if there is no denoising step of FLUX.1 among them; those of other models have a guider.
    """
    replacements = {FluxLoopDenoiser: GuidedFluxDenoiser, FluxKontextLoopDenoiser: GuidedKontextDenoiser}
    if not _replace_blocks(blocks, replacements):
        raise RestoreError(f"blocks must have a denoising step of FLUX.1, got {type(blocks).__name__}")
    return blocks


def _replace_blocks(blocks: ModularPipelineBlocks, replacements: Mapping[type, type]) -> int:
    count = 0
    for name, block in (getattr(blocks, "sub_blocks", None) or {}).items():
        if type(block) in replacements:
            blocks.sub_blocks[name] = replacements[type(block)]()
            count += 1
        else:
            count += _replace_blocks(block, replacements)
    return count


def _cut(tensor: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Keep the part that a pipeline keeps of a network's prediction: without masks, variances, tokens of references."""
    return tensor[tuple(slice(size) for size in like.shape)]
