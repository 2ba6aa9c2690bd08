"""The demo model: its training forward and loss, evaluation, steps, checkpoints and export."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from ..runtime.learning.durable import remove_leftovers, replacing
from . import demo_data
from .demo_data import TokenMixer
from .demo_recipe import (
    CHECKPOINT_FILE,
    TRUNK_FILE,
    ModelShape,
    Schedule,
    TrainingError,
    TrainSettings,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from pathlib import Path

    from tokenizers import Tokenizer
    from torch import Tensor

CHECKPOINT_FORMAT = 1
_LOSS_CHUNK = 1024


# --- the model and its training forward -------------------------------------------------------


def build_model(shape: ModelShape, *, seed: int) -> LlamaForCausalLM:
    """A freshly initialized model in float32; `seed` decides every weight."""
    config = LlamaConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        intermediate_size=shape.ffn_size,
        max_position_embeddings=shape.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        rms_norm_eps=shape.norm_eps,
        tie_word_embeddings=True,
        bos_token_id=demo_data.SPECIAL_TOKENS.index(demo_data.DOCUMENT_TOKEN),
        eos_token_id=[
            demo_data.SPECIAL_TOKENS.index(demo_data.END_TOKEN),
            demo_data.SPECIAL_TOKENS.index(demo_data.DOCUMENT_TOKEN),
        ],
        pad_token_id=demo_data.SPECIAL_TOKENS.index(demo_data.DOCUMENT_TOKEN),
    )
    model = LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 2:
                std = 0.02
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    std /= math.sqrt(2 * shape.layers)
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
            else:
                parameter.fill_(1.0)
    return model


def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, block: int) -> Tensor:
    """Causal attention, one block of queries at a time against the keys up to its end.

    q (B, T, H, D), already scaled; k, v (B, T, K, D); mask (block, T), additive, of the last block.
    Returns (B, T, H * D). Twice as fast on CPU as the fused kernel, forward and backward together.
    """
    b, t, h, d = q.shape
    kv = k.shape[2]
    group = h // kv
    q = q.view(b, t, kv, group, d).permute(0, 2, 3, 1, 4).reshape(b * kv, group, t, d)
    k = k.permute(0, 2, 3, 1).reshape(b * kv, d, t)
    v = v.permute(0, 2, 1, 3).reshape(b * kv, t, d)
    outputs = []
    for start in range(0, t, block):
        end = start + block
        queries = q[:, :, start:end].reshape(b * kv, group * block, d)
        scores = torch.bmm(queries, k[:, :, :end]).view(b * kv, group, block, end)
        weights = torch.softmax(scores + mask[:, t - end :], dim=-1)
        mixed = torch.bmm(weights.view(b * kv, group * block, end), v[:, :end])
        outputs.append(mixed.view(b * kv, group, block, d))
    out = torch.cat(outputs, dim=2).view(b, kv, group, t, d)
    return out.permute(0, 3, 1, 2, 4).reshape(b, t, h * d)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-second, first], dim=-1) * sin


def _layer(
    x: Tensor,
    attention_norm: Tensor,
    qkv: Tensor,
    output: Tensor,
    ffn_norm: Tensor,
    gate_up: Tensor,
    down: Tensor,
    cos: Tensor,
    sin: Tensor,
    mask: Tensor,
    shape: ModelShape,
    block: int,
) -> Tensor:
    """One decoder layer; x (B, T, hidden). Same mathematics as LlamaDecoderLayer."""
    dtype = x.dtype
    b, t, _ = x.shape
    d = shape.head_dim
    size = (shape.hidden_size,)
    h = F.rms_norm(x, size, attention_norm.to(dtype), shape.norm_eps)
    widths = [shape.heads * d, shape.kv_heads * d, shape.kv_heads * d]
    q, k, v = torch.split(F.linear(h, qkv.to(dtype)), widths, dim=-1)
    q = _rotate(q.view(b, t, shape.heads, d), cos, sin) * d**-0.5
    k = _rotate(k.view(b, t, shape.kv_heads, d), cos, sin)
    mixed = _attend(q, k, v.view(b, t, shape.kv_heads, d), mask, block)
    x = x + F.linear(mixed, output.to(dtype))
    h = F.rms_norm(x, size, ffn_norm.to(dtype), shape.norm_eps)
    gate, up = F.linear(h, gate_up.to(dtype)).chunk(2, dim=-1)
    return x + F.linear(F.silu(gate) * up, down.to(dtype))


def _chunk_loss(x: Tensor, embedding: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy of each of a chunk's positions, float32 (n,)."""
    logits = F.linear(x, embedding).float()
    return F.cross_entropy(logits, targets, reduction="none")


@dataclass(slots=True, eq=False)
class TrainingForward:
    """Loss of a batch, computed from a LlamaForCausalLM's own parameters.

    Written for few and large operations, which the module's own forward is not; a test holds the
    two equal. `compiled` lets torch.compile fuse what is left between the matrix products (needs a
    C++ compiler and half a minute per sequence length).
    """

    model: LlamaForCausalLM
    shape: ModelShape
    dtype: torch.dtype = torch.bfloat16
    compiled: bool = False
    _layer: Callable[..., Tensor] = field(init=False)
    _chunk_loss: Callable[..., Tensor] = field(init=False)
    _tables: dict[int, tuple[Tensor, Tensor, Tensor, int]] = field(init=False)

    def __post_init__(self) -> None:
        """Choose eager or compiled functions."""
        self._layer = torch.compile(_layer, dynamic=False) if self.compiled else _layer
        self._chunk_loss = (
            torch.compile(_chunk_loss, dynamic=False) if self.compiled else _chunk_loss
        )
        self._tables = {}

    def losses(self, inputs: Tensor, targets: Tensor) -> Tensor:
        """Negative log-likelihood in nats of every target, shape (B * T,).

        inputs, targets: (B, T) token ids; targets[:, i] follows inputs[:, i].
        """
        cos, sin, mask, block = self._table(inputs.shape[1], inputs.device)
        llama = self.model.model
        embedding = llama.embed_tokens.weight
        x = F.embedding(inputs, embedding).to(self.dtype)
        for layer in llama.layers:
            attention, ffn = layer.self_attn, layer.mlp
            qkv = [attention.q_proj.weight, attention.k_proj.weight, attention.v_proj.weight]
            x = self._layer(
                x,
                layer.input_layernorm.weight,
                torch.cat(qkv),
                attention.o_proj.weight,
                layer.post_attention_layernorm.weight,
                torch.cat([ffn.gate_proj.weight, ffn.up_proj.weight]),
                ffn.down_proj.weight,
                cos,
                sin,
                mask,
                self.shape,
                block,
            )
        size = (self.shape.hidden_size,)
        x = F.rms_norm(x, size, llama.norm.weight.to(self.dtype), self.shape.norm_eps)
        x = x.reshape(-1, self.shape.hidden_size)
        flat = targets.reshape(-1)
        embedding = embedding.to(self.dtype)
        chunks = [
            self._chunk_loss(x[i : i + _LOSS_CHUNK], embedding, flat[i : i + _LOSS_CHUNK])
            for i in range(0, x.shape[0], _LOSS_CHUNK)
        ]
        return torch.cat(chunks)

    def _table(self, length: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor, int]:
        """RoPE tables (T, 1, D), mask (block, T) and block size for rows of `length`; kept."""
        if length not in self._tables:
            block = max(math.gcd(length, 128), length // 8 if length % 8 == 0 else 1)
            d = self.shape.head_dim
            exponents = torch.arange(0, d, 2, dtype=torch.float32) / d
            frequencies = 1.0 / self.shape.rope_theta**exponents
            angles = torch.outer(torch.arange(length, dtype=torch.float32), frequencies)
            angles = torch.cat([angles, angles], dim=-1)[:, None]
            mask = torch.zeros(block, length)
            above = torch.ones(block, block, dtype=torch.bool).triu(1)
            mask[:, length - block :].masked_fill_(above, float("-inf"))
            self._tables[length] = (
                angles.cos().to(device, self.dtype),
                angles.sin().to(device, self.dtype),
                mask.to(device, self.dtype),
                block,
            )
        return self._tables[length]


# --- held-out evaluation ----------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOutScore:
    """Summed negative log-likelihood of held-out text."""

    nats: float
    tokens: int
    text_bytes: int

    @property
    def token_perplexity(self) -> float:
        """exp of the mean loss per token."""
        return math.exp(self.nats / max(1, self.tokens))

    @property
    def bits_per_byte(self) -> float:
        """Bits per byte of text; markers of turns and documents cost bits and have no bytes."""
        return self.nats / math.log(2) / max(1, self.text_bytes)

    @property
    def byte_perplexity(self) -> float:
        """2 ** `bits_per_byte`; nearly all text is ASCII, so this is per character."""
        return math.pow(2.0, self.bits_per_byte)


def evaluate(
    forward: TrainingForward,
    held_out: Mapping[str, demo_data.PackedDocuments],
    byte_lengths: Tensor,
    *,
    length: int,
    max_tokens: int,
    device: torch.device,
) -> dict[str, HeldOutScore]:
    """Score each corpus on at most `max_tokens` of its held-out text, and "all" together."""
    scores: dict[str, HeldOutScore] = {}
    with torch.inference_mode():
        for name, packed in held_out.items():
            stream = torch.from_numpy(packed.tokens[: max_tokens + 1].astype("int64"))
            nats, tokens, text_bytes = 0.0, 0, 0
            for start in range(0, len(stream) - 1, 8 * length):
                part = stream[start : start + 8 * length + 1]
                rows = max(1, (len(part) - 1) // length)
                size = min(length, len(part) - 1)
                inputs = part[: rows * size].view(rows, size)
                targets = part[1 : rows * size + 1].view(rows, size)
                losses = forward.losses(inputs.to(device), targets.to(device))
                nats += float(losses.double().sum())
                tokens += targets.numel()
                text_bytes += int(byte_lengths[targets].sum())
            if tokens:
                scores[name] = HeldOutScore(nats=nats, tokens=tokens, text_bytes=text_bytes)
    scores["all"] = HeldOutScore(
        nats=sum(score.nats for score in scores.values()),
        tokens=sum(score.tokens for score in scores.values()),
        text_bytes=sum(score.text_bytes for score in scores.values()),
    )
    return scores


def format_scores(scores: Mapping[str, HeldOutScore]) -> str:
    """A plain table of held-out scores."""
    lines = [f"{'held-out':<12} {'tokens':>8} {'ppl/token':>10} {'ppl/char':>9} {'bits/byte':>10}"]
    for name, score in scores.items():
        lines.append(
            f"{name:<12} {score.tokens:>8} {score.token_perplexity:>10.2f}"
            f" {score.byte_perplexity:>9.3f} {score.bits_per_byte:>10.3f}"
        )
    return "\n".join(lines)


# --- training ---------------------------------------------------------------------------------


@dataclass(slots=True, kw_only=True, eq=False)
class DemoTrainer:
    """Model, optimizers and text stream of one run; the only writer of all three."""

    shape: ModelShape
    settings: TrainSettings
    corpora: Mapping[str, demo_data.PackedDocuments]
    device: torch.device
    compiled: bool = False
    dtype: torch.dtype = torch.bfloat16
    step: int = field(init=False, default=0)
    decay: tuple[int, int] | None = field(init=False, default=None)
    """First step of the decay and total steps, once the decay has begun; None before."""
    model: LlamaForCausalLM = field(init=False)
    forward: TrainingForward = field(init=False)
    stable_mixer: TokenMixer = field(init=False)
    decay_mixer: TokenMixer = field(init=False)
    _muon: torch.optim.Muon = field(init=False)
    _adam: torch.optim.AdamW = field(init=False)

    def __post_init__(self) -> None:
        """Build everything in its initial state."""
        self.model = build_model(self.shape, seed=self.settings.seed)
        self.model.to(self.device)
        self.forward = TrainingForward(self.model, self.shape, self.dtype, self.compiled)
        self.stable_mixer = TokenMixer(
            corpora=self.corpora, weights=demo_data.STABLE_WEIGHTS, seed=self.settings.seed
        )
        self.decay_mixer = TokenMixer(
            corpora=self.corpora, weights=demo_data.DECAY_WEIGHTS, seed=self.settings.seed + 1
        )
        embedding = self.model.model.embed_tokens.weight
        hidden = [p for p in self.model.parameters() if p.ndim == 2 and p is not embedding]
        others = [p for p in self.model.parameters() if p.ndim != 2 or p is embedding]
        self._muon = torch.optim.Muon(
            hidden,
            lr=self.settings.muon_lr,
            momentum=0.95,
            weight_decay=self.settings.weight_decay,
        )
        self._adam = torch.optim.AdamW(
            others, lr=self.settings.adam_lr, betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0
        )

    def train_step(self, schedule: Schedule) -> float:
        """One optimizer step; returns the mean loss in nats before it."""
        stage = schedule.stage(self.step)
        if stage.is_decay and self.decay is None:
            self.decay = (schedule.decay_start, schedule.total_steps)
        mixer = self.decay_mixer if stage.is_decay else self.stable_mixer
        rows = self.settings.batch_tokens // stage.length
        batch = torch.from_numpy(mixer.take(rows, stage.length)).to(self.device)
        losses = self.forward.losses(batch[:, :-1], batch[:, 1:])
        loss = losses.mean()
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.grad_clip)
        for optimizer, rate in (
            (self._muon, self.settings.muon_lr),
            (self._adam, self.settings.adam_lr),
        ):
            for group in optimizer.param_groups:
                group["lr"] = rate * stage.scale
            optimizer.step()  # type: ignore[no-untyped-call]  # Muon.step has no annotations
            optimizer.zero_grad(set_to_none=True)
        self.step += 1
        return float(loss.detach())

    def save(self, path: Path) -> None:
        """Write everything needed to go on.

        The old file stays whole until the new one is on disk. Its folder must be there.
        """
        state = {
            "format": CHECKPOINT_FORMAT,
            "shape": asdict(self.shape),
            "settings": json.dumps(asdict(self.settings)),
            "step": self.step,
            "decay": list(self.decay) if self.decay is not None else None,
            "model": self.model.state_dict(),
            "muon": self._muon.state_dict(),
            "adam": self._adam.state_dict(),
            "stable_mixer": self.stable_mixer.state(),
            "decay_mixer": self.decay_mixer.state(),
        }
        with replacing(path) as temporary, temporary.open("wb") as file:
            torch.save(state, file)

    def load(self, path: Path) -> None:
        """Continue from a file that `save` wrote.

        Raises: TrainingError when it belongs to a run with other settings.
        """
        state = torch.load(path, map_location=self.device, weights_only=True)
        if state["format"] != CHECKPOINT_FORMAT:
            raise TrainingError(f"{path} has format {state['format']}, not {CHECKPOINT_FORMAT}")
        ours = (asdict(self.shape), json.dumps(asdict(self.settings)))
        if (state["shape"], state["settings"]) != ours:
            raise TrainingError(
                f"{path} was written with {state['shape']} {state['settings']}, this run has"
                f" {ours[0]} {ours[1]}; pass the same options or another --checkpoint-dir"
            )
        self.model.load_state_dict(state["model"])
        self._muon.load_state_dict(state["muon"])
        self._adam.load_state_dict(state["adam"])
        self.stable_mixer.restore(state["stable_mixer"])
        self.decay_mixer.restore(state["decay_mixer"])
        self.step = state["step"]
        self.decay = None if state["decay"] is None else (state["decay"][0], state["decay"][1])

    def check_schedule(self, schedule: Schedule) -> None:
        """Raise TrainingError when the run so far is not the beginning of `schedule`."""
        if self.decay is not None and self.decay != (schedule.decay_start, schedule.total_steps):
            raise TrainingError(
                f"the decay has begun (steps {self.decay[0]} to {self.decay[1]}); resume with the"
                f" same --tokens and --decay-fraction, or copy {TRUNK_FILE} over {CHECKPOINT_FILE}"
                " to redo the decay"
            )
        if self.decay is None and self.step > schedule.decay_start:
            least = math.ceil(self.step / (1 - schedule.decay_fraction)) + 2
            raise TrainingError(
                f"step {self.step} is past the decay start {schedule.decay_start} of --tokens"
                f" {schedule.tokens}; use at least {least * self.settings.batch_tokens}"
            )


def export(
    shape: ModelShape, weights: Mapping[str, Tensor], tokenizer: Tokenizer, output: Path
) -> None:
    """Write model (bfloat16), tokenizer, chat template and sampling defaults to `output`.

    Each file is replaced whole; other files there, such as a model card, stay.
    """
    staging = output.with_name(f".{output.name}.tmp")
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    model = build_model(shape, seed=0)
    model.load_state_dict(weights)
    model.to(torch.bfloat16)
    ends = [
        demo_data.SPECIAL_TOKENS.index(token)
        for token in (demo_data.END_TOKEN, demo_data.DOCUMENT_TOKEN)
    ]
    model.generation_config = GenerationConfig(
        do_sample=True,
        temperature=0.5,
        top_p=0.9,
        repetition_penalty=1.1,
        max_new_tokens=256,
        bos_token_id=ends[1],
        eos_token_id=ends,
        pad_token_id=ends[1],
    )
    model.save_pretrained(staging)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=demo_data.DOCUMENT_TOKEN,
        eos_token=demo_data.END_TOKEN,
        pad_token=demo_data.DOCUMENT_TOKEN,
        model_max_length=shape.max_positions,
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = demo_data.CHAT_TEMPLATE
    fast.save_pretrained(staging)
    # The class name that every version of transformers knows, not the newest one's.
    settings_file = staging / "tokenizer_config.json"
    written = json.loads(settings_file.read_text(encoding="utf-8"))
    written["tokenizer_class"] = "PreTrainedTokenizerFast"
    settings_file.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")
    output.mkdir(parents=True, exist_ok=True)
    remove_leftovers(output)
    for file in sorted(staging.iterdir()):
        with replacing(output / file.name) as temporary:
            shutil.copyfile(file, temporary)
    shutil.rmtree(staging)
