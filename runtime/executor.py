"""Runs iterations: packs them, computes the forward, samples. The only owner of device memory.

Everything here runs on the inference lane's thread, one call at a time.
"""

from __future__ import annotations

import logging
import time
from typing import TYPE_CHECKING, Protocol

import psutil
import torch

from ..streams.graphs import GraphRecorder, sizes_up_to
from .decoder import LeanDecoder, UnlistedError, layer_attentions
from .errors import ConfigError
from .kernels.choose import choose_kernels
from .kernels.plain import HeadShape
from .module_forward import ModuleForward
from .packing import pack_steps
from .sampling import Sampler
from .static_decode import StaticDecode
from .step import SequenceResult, SequenceStep, StepResult

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from ..streams.graphs import Recorder
    from .config import CacheConfig
    from .kernels.batch import PackedBatch
    from .kernels.plain import PlainKernels
    from .loading import LoadedModel
    from .lora import LoraWeights
    from .static_decode import StaticDecodeStatistics
    from .types import TokenLogprob

logger = logging.getLogger(__name__)

# Share of the memory that is free after loading which KV pages may take. A CPU shares its memory
# with everything else on the machine; a GPU is ours, but activations and training need room.
_MEMORY_FRACTION = {"cpu": 0.25, "cuda": 0.8}
# Largest root mean square difference between a forward's logits and the model's own at start-up,
# as a share of the logits' spread. Rounding costs 1e-6 in float32 and 1e-2 in bfloat16; a norm or
# a rotation that is not as the model has it costs 0.1 and more.
_TOLERANCE = {torch.float32: 1e-3, torch.float16: 1e-2, torch.bfloat16: 3e-2}


class Forward(Protocol):
    """A packed forward: `LeanDecoder` or `ModuleForward`."""

    def __call__(self, batch: PackedBatch) -> torch.Tensor:
        """The logits (N, V) of the wanted rows; writes the KV of all rows."""
        ...

    def install_adapter(self, slot: int, weights: LoraWeights) -> None:
        """Copy an adapter's matrices into a slot (1 and up)."""
        ...

    def clear_adapter(self, slot: int) -> None:
        """Empty a slot."""
        ...


class Executor:
    """A model ready to run iterations, with its KV pages.

    Attributes:
        num_pages, page_size: of the KV cache.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        kernels: PlainKernels,
        forward: Forward,
        *,
        num_pages: int,
        description: dict[str, str],
    ) -> None:
        self._forward = forward
        self._kernels = kernels
        self._device = kernels.device
        self._sampler = Sampler(loaded.vocab_size, kernels.device)
        self._description = description
        self._static: StaticDecode | None = None
        self.page_size = kernels.page_size
        self.num_pages = num_pages

    @classmethod
    @torch.inference_mode()
    def create(
        cls,
        loaded: LoadedModel,
        *,
        device: torch.device,
        cache: CacheConfig,
        max_num_batched_tokens: int,
        max_num_seqs: int = 256,
        record_decodes: bool = True,
        recorder: Recorder | None = None,
    ) -> Executor:
        """Choose kernels and a forward, prove them against the model, and make the KV pages.

        Args:
            record_decodes: on CUDA, whether decodes are recorded as CUDA graphs.
            recorder: records decodes instead, on any device.

        Raises:
            ConfigError: the pages asked for do not fit, or hold less than one sequence.
        """
        layers = layer_attentions(loaded)
        first = loaded.attention_layers[0]
        shape = HeadShape(heads=first.query_heads, kv_heads=first.kv_heads, head_dim=first.head_dim)
        kernels = choose_kernels(shape, layers, dtype=loaded.dtype, device=device)
        if cache.page_size is not None and cache.page_size != kernels.page_size:
            raise ConfigError(
                f"cache.page_size is {cache.page_size}, but {kernels.name} use pages of "
                f"{kernels.page_size} tokens; leave it unset",
                param="cache.page_size",
            )
        prepack = _can_prepack(loaded, device)
        forward, path = _choose_forward(loaded, kernels, prepack)
        num_pages = _count_pages(loaded, kernels, cache, max_num_seqs)
        reason = "not on a CPU" if record_decodes else "lanes.cuda_graphs is off"
        if recorder is None and record_decodes and device.type == "cuda":
            recorder = GraphRecorder(device)
        if recorder is not None:
            reason = _unrecordable(forward)
        # Recorded decodes write the KV of rows that belong to nobody to one page more.
        kernels.allocate(num_pages + (recorder is not None and not reason))
        description = {
            "dtype": str(loaded.dtype).removeprefix("torch."),
            "attention": kernels.name,
            "forward": path,
            "linears": "prepacked (oneDNN)" if prepack else "plain",
            "decode": f"kernel by kernel ({reason})",
            "page_size": str(kernels.page_size),
            "kv_pages": str(num_pages),
            "kv_bytes": str(num_pages * kernels.page_bytes),
        }
        executor = cls(loaded, kernels, forward, num_pages=num_pages, description=description)
        # A budget may exceed the context; there are no positions beyond it.
        executor._warm_up(min(max_num_batched_tokens, loaded.max_model_len))
        if recorder is not None and not reason:
            executor._record_decodes(loaded, recorder, max_num_seqs)
        return executor

    def describe(self) -> dict[str, str]:
        """What was chosen at start, for reports."""
        return dict(self._description)

    @torch.inference_mode()
    def execute(self, steps: Sequence[SequenceStep]) -> StepResult:
        """Run one iteration: the KV of every token is written, and asked-for tokens are sampled."""
        began = time.perf_counter()
        if self._static is not None and self._static.takes(steps):
            logits = self._static(steps)
        else:
            logits = self._forward(self._pack(steps))
        forwarded = time.perf_counter()
        results = self._sample(steps, logits)
        return StepResult(results, forwarded - began, time.perf_counter() - forwarded)

    def recorded_decodes(self) -> StaticDecodeStatistics | None:
        """What was recorded and replayed; None where decodes run kernel by kernel."""
        return None if self._static is None else self._static.statistics()

    def _pack(self, steps: Sequence[SequenceStep]) -> PackedBatch:
        return pack_steps(steps, page_size=self.page_size, device=self._device)

    def _sample(
        self, steps: Sequence[SequenceStep], logits: torch.Tensor
    ) -> Sequence[SequenceResult]:
        states = [step.sampling for step in steps if step.sampling is not None]
        if len(states) == len(steps) == logits.shape[0]:
            output = self._sampler.sample(logits, states)
            return [
                SequenceResult(token, logprob, (), error)
                for token, logprob, error in zip(
                    output.token_ids, output.logprobs, output.errors, strict=True
                )
            ]
        spans: list[tuple[int, int]] = []  # of the logits, for each step
        at = 0
        for step in steps:
            width = len(step.token_ids) if step.prompt_logprobs is not None else 0
            spans.append((at, at + (width or (step.sampling is not None))))
            at = spans[-1][1]
        sampled: Iterator[tuple[int, TokenLogprob | None, str | None]] = iter(())
        if states:
            ends = [
                high - 1
                for step, (_, high) in zip(steps, spans, strict=True)
                if step.sampling is not None
            ]
            output = self._sampler.sample(logits[ends], states)
            sampled = zip(output.token_ids, output.logprobs, output.errors, strict=True)
        results = []
        for step, (low, high) in zip(steps, spans, strict=True):
            prompt: tuple[TokenLogprob, ...] = ()
            if step.prompt_logprobs is not None and step.prompt_targets:
                end = min(high, low + len(step.prompt_targets))
                prompt = self._sampler.prompt_logprobs(
                    logits[low:end], step.prompt_targets, step.prompt_logprobs
                )
            if step.sampling is None:
                results.append(SequenceResult(prompt_logprobs=prompt))
            else:
                token, logprob, error = next(sampled)
                results.append(SequenceResult(token, logprob, prompt, error))
        return results

    def install_adapter(self, slot: int, weights: LoraWeights) -> None:
        """Copy an adapter's matrices into a slot (1 and up)."""
        self._forward.install_adapter(slot, weights)

    def clear_adapter(self, slot: int) -> None:
        """Empty a slot."""
        self._forward.clear_adapter(slot)

    def _warm_up(self, tokens: int) -> None:
        """Touch every code path once, so that the first request does not pay for it."""
        room = self.num_pages * self.page_size
        for length in (1, min(tokens, room)):
            pages = list(range(-(-length // self.page_size)))
            step = SequenceStep(token_ids=[0] * length, start=0, block_table=pages)
            self._forward(self._pack([step]))

    def _record_decodes(self, loaded: LoadedModel, recorder: Recorder, max_num_seqs: int) -> None:
        """Record decodes of every batch size, and keep them if they give what they should."""
        forward = self._forward
        assert isinstance(forward, LeanDecoder)
        began = time.perf_counter()
        prefills, decodes = self._proof_steps(loaded)
        self._forward(self._pack(prefills))
        expected = self._forward(self._pack(decodes))
        static = StaticDecode(
            forward,
            recorder,
            sizes=sizes_up_to(max_num_seqs),
            vocab_size=expected.shape[1],
            dtype=expected.dtype,
            page_size=self.page_size,
            longest_table=-(-loaded.max_model_len // self.page_size),
            scratch_page=self.num_pages,
            tolerance=_TOLERANCE[loaded.dtype],
            device=self._device,
        )
        reason = static.record_all(decodes, expected)
        if reason:
            logger.warning("decodes are not recorded: %s", reason)
            self._description["decode"] = f"kernel by kernel ({reason})"
            return
        self._static = static
        sizes = static.statistics().sizes
        self._description["decode"] = f"{recorder.name} for up to {sizes[-1]} sequences"
        logger.info(
            "recorded decodes of %d batch sizes in %.1f s", len(sizes), time.perf_counter() - began
        )

    def _proof_steps(self, loaded: LoadedModel) -> tuple[list[SequenceStep], list[SequenceStep]]:
        """Some prompts at and around a page's end, and a decode of each of them."""
        generator = torch.Generator().manual_seed(0)
        prefills, decodes, used = [], [], 0
        for wanted in (self.page_size - 1, 3, self.page_size + 2, 7, self.page_size):
            length = min(wanted, loaded.max_model_len - 1)
            count = length // self.page_size + 1
            if used + count > self.num_pages:
                continue
            pages = list(range(used, used + count))
            used += count
            tokens = torch.randint(loaded.vocab_size, (length + 1,), generator=generator).tolist()
            prefills.append(SequenceStep(token_ids=tokens[:-1], start=0, block_table=pages))
            # Logits are wanted as for a prompt's log-probabilities: nothing is sampled here.
            decodes.append(
                SequenceStep(
                    token_ids=tokens[-1:], start=length, block_table=pages, prompt_logprobs=0
                )
            )
        return prefills, decodes


def _unrecordable(forward: Forward) -> str:
    """Why decodes through this forward cannot be recorded, or ""."""
    if not isinstance(forward, LeanDecoder):
        return "the model's own modules may ask the device for values"
    if not forward.can_record():
        return f"attention by {forward.kernels.name} asks the device for values"
    return ""


def _can_prepack(loaded: LoadedModel, device: torch.device) -> bool:
    """Whether a second, prepacked copy of the weights pays and fits in memory."""
    if device.type != "cpu" or loaded.dtype not in (torch.float32, torch.bfloat16):
        return False
    copy = sum(p.numel() * p.element_size() for p in loaded.model.parameters())
    if psutil.virtual_memory().available < 2 * copy:
        logger.warning(
            "the weights (%d MB) are not prepacked: too little memory is free", copy >> 20
        )
        return False
    return True


def _choose_forward(
    loaded: LoadedModel, kernels: PlainKernels, prepack: bool
) -> tuple[Forward, str]:
    """The lean forward where it reproduces the model's own logits, else the model's modules."""
    try:
        lean = LeanDecoder.build(loaded, kernels, prepack=prepack)
    except UnlistedError as error:
        return ModuleForward(loaded, kernels, prepack=prepack), f"model's modules ({error})"
    difference = _difference(loaded, kernels, lean)
    if difference <= _TOLERANCE[loaded.dtype]:
        return lean, "lean decoder"
    logger.warning(
        "the lean decoder differs from %s by %.2g; the model's own modules are used instead",
        loaded.name,
        difference,
    )
    forward = ModuleForward(loaded, kernels, prepack=prepack)
    return forward, f"model's modules (the lean decoder differed by {difference:.2g})"


def _difference(loaded: LoadedModel, kernels: PlainKernels, forward: Forward) -> float:
    """The difference of logits to the model's own over two packed prompts, relative."""
    generator = torch.Generator().manual_seed(0)
    prompts = [
        torch.randint(loaded.vocab_size, (length,), generator=generator).tolist()
        for length in (min(19, loaded.max_model_len), min(5, loaded.max_model_len))
    ]
    size = kernels.page_size
    steps, used = [], 0
    for prompt in prompts:
        pages = list(range(used, used + -(-len(prompt) // size)))
        used += len(pages)
        steps.append(
            SequenceStep(
                token_ids=prompt,
                start=0,
                block_table=pages,
                prompt_logprobs=0,
                prompt_targets=prompt[1:],
            )
        )
    kernels.allocate(used)
    batch = pack_steps(steps, page_size=size, device=kernels.device)
    actual = forward(batch).float()
    worst, at = 0.0, 0
    for prompt in prompts:
        ids = torch.tensor([prompt], device=kernels.device)
        expected = loaded.model(input_ids=ids, use_cache=False).logits[0].float()
        difference = (actual[at : at + len(prompt)] - expected).square().mean().sqrt()
        relative = float(difference / (expected.std() + 1e-6))
        worst = max(worst, relative if relative == relative else float("inf"))
        at += len(prompt)
    return worst


def _count_pages(
    loaded: LoadedModel, kernels: PlainKernels, cache: CacheConfig, max_num_seqs: int
) -> int:
    """How many KV pages to make: as asked, else what the memory allows and could ever be used."""
    if kernels.device.type == "cuda":
        available, _total = torch.cuda.mem_get_info(kernels.device)
    else:
        available = psutil.virtual_memory().available
    per_sequence = -(-loaded.max_model_len // kernels.page_size)
    if cache.num_pages is not None:
        pages, param = cache.num_pages, "cache.num_pages"
    elif cache.kv_bytes is not None:
        pages, param = cache.kv_bytes // kernels.page_bytes, "cache.kv_bytes"
    else:
        fraction = cache.memory_fraction or _MEMORY_FRACTION[kernels.device.type]
        pages = int(available * fraction) // kernels.page_bytes
        pages, param = min(pages, per_sequence * max_num_seqs), "cache.memory_fraction"
    if pages * kernels.page_bytes > available:
        raise ConfigError(
            f"{pages} KV pages need {pages * kernels.page_bytes >> 20} MB, "
            f"but {available >> 20} MB are free; lower {param}",
            param=param,
        )
    if pages < per_sequence:
        raise ConfigError(
            f"{pages} KV pages of {kernels.page_size} tokens hold less than one sequence of "
            f"max_model_len {loaded.max_model_len}; raise {param} or lower model.max_model_len",
            param=param,
        )
    return pages
