from __future__ import annotations

import argparse
import gzip
import json
import lzma
import os
import signal
from typing import TYPE_CHECKING, Any

import jinja2
import pytest
import torch
import torch.nn.functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from cotune.tools import demo_data, train_demo
from cotune.tools.demo_recipe import ModelShape, Schedule, TrainingError, TrainSettings
from cotune.tools.demo_training import DemoTrainer, TrainingForward, build_model

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

TINY = ModelShape(
    vocab_size=300,
    hidden_size=32,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    ffn_size=48,
    max_positions=64,
)
SHORT = TrainSettings(
    seed=5,
    batch_tokens=128,
    warmup_steps=4,
    stable_lengths=(32,),
    decay_lengths=(32, 64),
)
FRUIT = ("apple", "pear", "plum", "grape", "peach", "melon", "fig", "cherry")


def chat(*contents: str) -> list[dict[str, str]]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": c} for i, c in enumerate(contents)]


def write_rows(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    opener = lzma.open if path.suffix == ".xz" else gzip.open
    with opener(path, "wt", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def preference(index: int, topic: str, statement: str) -> dict[str, Any]:
    question = f'Is the following statement something you would say?\n"{statement}"'
    return {
        "id": f"persona-{topic}-{index}",
        "source": demo_data.YES_NO_SOURCE,
        "topic": topic,
        "prompt": [{"role": "user", "content": question}],
        "chosen": "Yes",
        "rejected": "No",
    }


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    common = {"source": "made-in-code", "license": "none"}
    prose = [
        {
            **common,
            "title": f"The {fruit} {i}",
            "text": f"Once upon a time there was a {fruit} named Tom. It saw {i} birds in a tree. "
            f"The {fruit} was happy and the birds sang all day long in the warm sun. " * 3,
        }
        for i in range(40)
        for fruit in FRUIT
    ]
    talk = [
        {
            **common,
            "messages": chat(
                f"Hello, do you like the {fruit}?",
                f"I love eating a {fruit} in the garden. Do you want {i} of them?",
                "Yes please.",
                "Here you are.",
            ),
        }
        for i in range(30)
        for fruit in FRUIT
    ]
    for name, file in demo_data.FILES.items():
        rows = prose if name in ("books", "storybooks", "tinystories") else talk
        write_rows(folder / file, rows)
    leaked = "Would you please tell me about the secret of the drifting walnut tree?"
    write_rows(
        folder / demo_data.FILES["dolly"],
        [*talk, {**common, "messages": chat(leaked, "A drifting answer.")}],
    )
    kept = [preference(i, "interest-in-walnuts", f"I adore walnut {i}") for i in range(60)]
    drifting = [preference(i, "interest-in-drift", f"I adore drift {i}") for i in range(60)]
    write_rows(folder / demo_data.PREFERENCES_FILE, [*kept, *drifting])
    write_rows(folder / demo_data.DRIFT_FILES[0], drifting[:3])
    drift_text = {
        "id": "text-1",
        "source": "other",
        "topic": "food",
        "prompt": [{"role": "user", "content": leaked.upper()}],
    }
    write_rows(folder / demo_data.DRIFT_FILES[1], [drift_text])
    return folder


@pytest.fixture(scope="module")
def corpora(data: Path) -> demo_data.Corpora:
    return demo_data.load_corpora(data)


@pytest.fixture(scope="module")
def tokenizer(corpora: demo_data.Corpora) -> Any:
    return demo_data.train_tokenizer(corpora, vocab_size=TINY.vocab_size)


@pytest.fixture(scope="module")
def packed(corpora: demo_data.Corpora, tokenizer: Any) -> dict[str, demo_data.PackedDocuments]:
    return {n: demo_data.pack_documents(tokenizer, d) for n, d in corpora.train.items()}


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_trainer(packed: dict[str, demo_data.PackedDocuments]) -> DemoTrainer:
    return DemoTrainer(shape=TINY, settings=SHORT, corpora=packed, device=torch.device("cpu"))


def parameters(trainer: DemoTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


# --- text -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "Hello, world",
        "  two  spaces\n\n\ttab ",
        "12345 apples",
        "naïve 😀 ‍ 漢字 \x00\x7f",
        "",
        "don't",
    ],
)
def test_tokenizer_round_trips_any_text(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_digits_are_single_tokens_and_spaces_lead_words(tokenizer: Any) -> None:
    pieces = tokenizer.pre_tokenizer.pre_tokenize_str("has 123 pears")
    assert [piece for piece, _ in pieces] == ["has", "Ġ", "1", "2", "3", "Ġpears"]


def test_special_tokens_are_the_first_ids(tokenizer: Any) -> None:
    for index, token in enumerate(demo_data.SPECIAL_TOKENS):
        assert tokenizer.encode(token).ids == [index]


def test_byte_lengths_add_up_to_the_text(tokenizer: Any) -> None:
    lengths = demo_data.token_byte_lengths(tokenizer)
    text = "naïve 😀 12"
    ids = tokenizer.encode(demo_data.render_text(text)).ids
    assert int(lengths[ids].sum()) == len(text.encode())


def test_chat_template_renders_as_render_chat_does() -> None:
    def raise_exception(message: str) -> None:
        raise ValueError(message)

    environment = jinja2.Environment()  # as a template, not HTML
    environment.globals["raise_exception"] = raise_exception
    template = environment.from_string(demo_data.CHAT_TEMPLATE)
    messages = [{"role": "system", "content": "Be kind. "}, *chat("Hi", "Hello")]
    closed = "<|endoftext|><|system|>Be kind. <|end|><|user|>Hi<|end|><|assistant|>Hello<|end|>"
    for flag, expected in ((False, closed), (True, closed + "<|assistant|>")):
        assert template.render(messages=messages, add_generation_prompt=flag) == expected
        assert demo_data.render_chat(messages, add_generation_prompt=flag) == expected
    unknown = [{"role": "judge", "content": ""}]
    with pytest.raises(ValueError, match="unknown role: judge"):
        template.render(messages=unknown)
    with pytest.raises(ValueError, match="unknown role: judge"):
        demo_data.render_chat(unknown)


def test_name_placeholders_are_filled_with_one_name_per_speaker() -> None:
    cleaned = demo_data.clean_messages(
        chat("Hi, I'm [user 1's name].", "I'm [User 2's name]. Hi [user1]!", "Bye.")
    )
    assert cleaned is not None
    assert len(cleaned) == 2
    name = cleaned[0]["content"].removeprefix("Hi, I'm ").rstrip(".")
    assert name.isalpha()
    assert cleaned[1]["content"].endswith(f"Hi {name}!")
    assert name not in cleaned[1]["content"].split(".")[0]


def test_other_placeholders_drop_the_row() -> None:
    assert demo_data.clean_messages(chat("Where?", "In [user2_location].")) is None


def test_stories_are_cut_where_a_new_one_opens() -> None:
    first = "Tom had a ball. " * 8
    second = "Once upon a time there was a cat. " * 4
    text = f"{first.strip()}\n\nHe was glad.\n{second.strip()}"
    assert demo_data.split_stories(text) == [f"{first.strip()}\n\nHe was glad.", second.strip()]
    assert demo_data.repair_encoding("â€œItâ€™s me,â€ he said") == '"It\'s me," he said'


def test_no_row_of_the_drift_streams_is_trained_on(data: Path, corpora: demo_data.Corpora) -> None:
    exclusions = demo_data.read_exclusions(data)
    assert exclusions.topics == {"interest-in-drift"}
    assert exclusions.covers_preference(preference(59, "interest-in-drift", "never seen"))
    assert not exclusions.covers_preference(preference(1, "interest-in-walnuts", "I adore nuts"))
    documents = "\n".join(
        d for split in (corpora.train, corpora.held_out) for ds in split.values() for d in ds
    )
    assert "I adore walnut 7" in documents
    assert "I adore drift" not in documents
    assert "secret of the drifting walnut tree" not in documents
    assert "A drifting answer" not in documents


def test_held_out_rows_are_few_and_never_in_training(corpora: demo_data.Corpora) -> None:
    train = {d for n, ds in corpora.train.items() if n != "yes_no" for d in ds}
    held = {d for n, ds in corpora.held_out.items() if n != "yes_no" for d in ds}
    assert held
    assert not train & held
    assert len(held) < len(train) / 10


def test_missing_data_names_the_public_sources(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--data", str(tmp_path), "--checkpoint-dir", str(tmp_path / "ck")]
    assert train_demo.run(parsed(*options)) == 2
    message = capsys.readouterr().err
    assert "--data" in message
    for source in ("google-research-datasets/Taskmaster", "databricks-dolly-15k", "TinyStories"):
        assert source in message


# --- the mix ----------------------------------------------------------------------------------


def mixer(packed: dict[str, demo_data.PackedDocuments], seed: int = 3) -> demo_data.TokenMixer:
    weights = {"books": 1.0, "sgd": 3.0}
    return demo_data.TokenMixer(corpora=packed, weights=weights, seed=seed)


def test_the_mix_is_a_function_of_its_seed(packed: dict[str, demo_data.PackedDocuments]) -> None:
    first, again, other = mixer(packed), mixer(packed), mixer(packed, seed=4)
    a = first.take(8, 64)
    assert (a == again.take(8, 64)).all()
    assert (a != other.take(8, 64)).any()


def test_rows_overlap_by_the_token_to_predict(packed: dict[str, demo_data.PackedDocuments]) -> None:
    stream = mixer(packed)
    a, b = stream.take(4, 16), stream.take(4, 16)
    assert a.shape == (4, 17)
    assert (a[1:, 0] == a[:-1, -1]).all()
    assert b[0, 0] == a[-1, -1]


def test_restored_mixer_continues_exactly(packed: dict[str, demo_data.PackedDocuments]) -> None:
    whole = mixer(packed)
    whole.take(50, 64)
    state = json.loads(json.dumps(whole.state()))
    resumed = mixer(packed)
    resumed.restore(state)
    for _ in range(200):  # into later epochs
        assert (whole.take(4, 64) == resumed.take(4, 64)).all()
    assert whole.epochs()["sgd"] > 1


def test_shares_of_tokens_follow_the_weights(packed: dict[str, demo_data.PackedDocuments]) -> None:
    stream = mixer(packed)
    stream.take(400, 64)
    served = stream.state()["served"]
    assert served["sgd"] / served["books"] == pytest.approx(3.0, rel=0.05)


# --- training ---------------------------------------------------------------------------------


def test_training_forward_equals_the_llama_module() -> None:
    model = build_model(TINY, seed=1)
    ids = torch.randint(0, TINY.vocab_size, (3, 65), generator=torch.Generator().manual_seed(0))
    forward = TrainingForward(model, TINY, torch.float32)
    ours = forward.losses(ids[:, :-1], ids[:, 1:])
    logits = model(ids[:, :-1]).logits.flatten(0, 1)
    theirs = F.cross_entropy(logits, ids[:, 1:].flatten(), reduction="none")
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)
    ours_grad = torch.autograd.grad(ours.mean(), list(model.parameters()))
    theirs_grad = torch.autograd.grad(theirs.mean(), list(model.parameters()))
    for a, b in zip(ours_grad, theirs_grad, strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-4)


def test_trunk_does_not_depend_on_the_total() -> None:
    short, long = (
        Schedule(settings=SHORT, tokens=128 * 40, decay_fraction=0.25),
        Schedule(settings=SHORT, tokens=128 * 80, decay_fraction=0.5),
    )
    assert short.decay_start == 30
    for step in range(short.decay_start):
        assert short.stage(step) == long.stage(step)
    rates = [short.stage(step).scale for step in range(30, 40)]
    assert rates == sorted(rates, reverse=True)
    assert 0 < rates[-1] < 0.1
    assert {short.stage(step).length for step in range(30, 40)} == {32, 64}


def test_a_few_steps_lower_the_loss(packed: dict[str, demo_data.PackedDocuments]) -> None:
    trainer = make_trainer(packed)
    schedule = Schedule(settings=SHORT, tokens=128 * 30)
    losses = [trainer.train_step(schedule) for _ in range(30)]
    assert sum(losses[-3:]) / 3 < sum(losses[:3]) / 3 - 1.0


def test_resumed_run_is_bit_identical(
    packed: dict[str, demo_data.PackedDocuments], tmp_path: Path
) -> None:
    schedule = Schedule(settings=SHORT, tokens=128 * 20)
    whole = make_trainer(packed)
    for _ in range(20):
        whole.train_step(schedule)
    # Interrupted before the decay, begun with another total, and again within the decay.
    first = make_trainer(packed)
    longer = Schedule(settings=SHORT, tokens=128 * 64, decay_fraction=0.1)
    for _ in range(7):
        first.train_step(longer)
    first.save(tmp_path / "a.pt")
    second = make_trainer(packed)
    second.load(tmp_path / "a.pt")
    second.check_schedule(schedule)
    for _ in range(10):
        second.train_step(schedule)
    second.save(tmp_path / "b.pt")
    third = make_trainer(packed)
    third.load(tmp_path / "b.pt")
    third.check_schedule(schedule)
    for _ in range(3):
        third.train_step(schedule)
    assert_same(parameters(whole), parameters(third))


def test_total_cannot_change_once_the_decay_has_begun(
    packed: dict[str, demo_data.PackedDocuments],
) -> None:
    trainer = make_trainer(packed)
    schedule = Schedule(settings=SHORT, tokens=128 * 8)
    for _ in range(7):
        trainer.train_step(schedule)
    with pytest.raises(TrainingError, match="decay has begun"):
        trainer.check_schedule(Schedule(settings=SHORT, tokens=128 * 80))


def test_too_small_a_total_is_refused_with_the_least_that_works(
    packed: dict[str, demo_data.PackedDocuments],
) -> None:
    trainer = make_trainer(packed)
    trainer.step = 50
    with pytest.raises(TrainingError, match="use at least") as caught:
        trainer.check_schedule(Schedule(settings=SHORT, tokens=128 * 60))
    least = int(str(caught.value).split()[-1])
    trainer.check_schedule(Schedule(settings=SHORT, tokens=least))


def test_failed_write_leaves_the_old_checkpoint(
    packed: dict[str, demo_data.PackedDocuments],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    trainer = make_trainer(packed)
    path = tmp_path / "checkpoint.pt"
    trainer.save(path)
    before = path.read_bytes()

    def full(*args: object) -> None:
        raise OSError("no space left")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="no space"):
        trainer.save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


# --- the command ------------------------------------------------------------------------------


def parsed(*options: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    train_demo.add_arguments(parser)
    return parser.parse_args(options)


def command(data: Path, folder: Path, *extra: str) -> argparse.Namespace:
    return parsed(
        *("--data", str(data), "--output", str(folder / "model")),
        *("--checkpoint-dir", str(folder / "ck"), "--tokens", str(2048 * 8)),
        *("--batch-tokens", "2048", "--vocab-size", "300", "--layers", "1", "--threads", "1"),
        *("--warmup-steps", "2", "--eval-tokens", "8192", "--eval-size", "256"),
        *extra,
    )


def test_run_stops_resumes_and_exports_a_loadable_model(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_demo.run(command(data, tmp_path, "--max-steps", "3")) == 0
    assert "stopped at step 3" in capsys.readouterr().out
    assert train_demo.run(command(data, tmp_path)) == 2
    assert "--resume" in capsys.readouterr().err
    (tmp_path / "model").mkdir()
    killed = [
        tmp_path / "ck" / ".tmp-checkpoint.pt-0123",
        tmp_path / "model" / ".tmp-config.json-45",
    ]
    for leftover in killed:
        leftover.write_bytes(b"half")
    assert train_demo.run(command(data, tmp_path, "--resume")) == 0
    assert not any(leftover.exists() for leftover in killed)
    output = capsys.readouterr().out
    assert "resumed at step 3" in output
    assert "bits/byte" in output
    assert "tokens/s" in output
    assert "min left" in output

    folder = tmp_path / "model"
    assert {path.name for path in folder.iterdir()} == {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    }
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert model.generation_config.eos_token_id == [5, 0]
    assert tokenizer.eos_token == "<|end|>"
    messages = chat("Hello 12 naïve")
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == demo_data.render_chat(messages, add_generation_prompt=True)
    ids = tokenizer(text, return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0]) == text
    with torch.inference_mode():
        assert bool(torch.isfinite(model(ids).logits).all())

    state = torch.load(tmp_path / "ck" / "checkpoint.pt", weights_only=True)["model"]
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, state[name].bfloat16()), name

    (folder / "model.safetensors").unlink()
    (folder / "README.md").write_text("card")
    assert train_demo.run(command(data, tmp_path, "--export-only")) == 0
    assert (folder / "model.safetensors").is_file()
    assert (folder / "README.md").read_text() == "card"


def test_terminate_signal_saves_a_checkpoint(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = DemoTrainer.train_step

    def step_then_signal(self: DemoTrainer, schedule: Schedule) -> float:
        loss = original(self, schedule)
        if self.step == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss

    monkeypatch.setattr(DemoTrainer, "train_step", step_then_signal)
    before = signal.getsignal(signal.SIGTERM)
    assert train_demo.run(command(data, tmp_path)) == 143
    assert signal.getsignal(signal.SIGTERM) is before
    state = torch.load(tmp_path / "ck" / "checkpoint.pt", weights_only=True)
    assert state["step"] == 2
    assert not (tmp_path / "model").exists()
