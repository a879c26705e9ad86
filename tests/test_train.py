import json
import os
import random
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

from expertmesh.errors import BadCheckpoint, SetupError
from expertmesh.model.full import FullModel
from expertmesh.model.spec import ModelSpec
from expertmesh.tokenization.tokenizer import Encoded, Tokenizer
from expertmesh.train import checkpoint
from expertmesh.train.batches import TrainingBatches, batched, thinned_out
from expertmesh.train.classification import Classification
from expertmesh.train.config import TrainConfig
from expertmesh.train.data import Row, split
from expertmesh.train.evaluation import evaluate
from expertmesh.train.loop import Trainer
from expertmesh.train.optimisation import rate_at
from expertmesh.train.teacher import cross_fitted
from expertmesh.train.vocabulary import make_tokenizer

WORDS = (("goal", "match", "team", "coach"), ("bank", "profit", "shares", "market"))
FILLER = ("the", "a", "of", "on", "friday", "said", "new", "after", "with", "one", "more", "again")

CONFIG = {
    "model": {
        "width": 16,
        "layers": 2,
        "context": 24,
        "embedding": {"vocab": 64, "bigram_buckets": 97, "bigram_width": 8},
        "attention": {"heads": 2},
        "router": {"experts": 4, "top_k": 2},
        "expert": {"width": 16},
        "head": {"labels": ["Sports", "Business"]},
    },
    "tokenizer": {"sampling_alpha": 0.3, "character_coverage": 1},
    "train": {
        "epochs": 3,
        "batch_rows": 32,
        "learning_rate": 0.01,
        "warmup_steps": 4,
        "dropout": {"embedding": 0.1, "attention": 0.1, "expert": 0.1, "head": 0.1},
        "word_dropout": 0.1,
        "title_dropout": 0.2,
        "label_smoothing": 0.05,
        "teacher_weight": 0.2,
        "consistency_weight": 0.5,
        "cooccurrence_start": True,
        "embedding_rate": 0.5,
        "ema_decay": 0.9,
        "storage_dtype": "float16",
        "threads": 1,
    },
}


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def parts():
    draw = random.Random(0)
    rows = []
    for _ in range(240):
        label = draw.randrange(2)
        words = [draw.choice(WORDS[label] if draw.random() < 0.4 else FILLER) for _ in range(12)]
        rows.append(Row(label, draw.choice(WORDS[label]), " ".join(words)))
    return split(rows)


@pytest.fixture(scope="module")
def tokenizer(parts, tmp_path_factory):
    config = TrainConfig.from_dict(CONFIG)
    texts = [row.text for row in parts.training]
    return make_tokenizer(texts, config.tokenizer, 64, tmp_path_factory.mktemp("vocabulary"))


def changed(**settings):
    config = TrainConfig.from_dict(CONFIG)
    return replace(config, train=replace(config.train, **settings))


def trainer(config, parts, tokenizer, out):
    return Trainer(config, Classification(config, parts, tokenizer), "digest of the data", out, Console(quiet=True))


def assert_same_bits(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.numpy().tobytes() == second[name].numpy().tobytes(), name


@pytest.mark.parametrize("stop_after", [3, 7, 8])
def test_a_resumed_run_ends_with_the_bits_of_one_that_never_stopped(parts, tokenizer, tmp_path, stop_after):
    config = TrainConfig.from_dict(CONFIG)
    whole = trainer(config, parts, tokenizer, tmp_path / "whole")
    report = whole.run()
    stopped = trainer(config, parts, tokenizer, tmp_path / "stopped")
    assert stopped.run(stop_after=stop_after) == {}
    torch.manual_seed(999)
    resumed = trainer(config, parts, tokenizer, tmp_path / "stopped")
    resumed.resume()
    assert resumed.step == stop_after
    resumed_report = resumed.run()
    assert_same_bits(load_file(tmp_path / "whole/model.safetensors"), load_file(tmp_path / "stopped/model.safetensors"))
    states = [checkpoint.read_state(tmp_path / name) for name in ("whole", "stopped")]
    assert_same_bits(states[0].tensors, states[1].tensors)
    for told in (report, resumed_report):
        for line in told["epochs"]:
            line.pop("seconds")
    assert report == resumed_report


def test_what_is_written_is_a_whole_checkpoint_that_scores_what_its_report_says(parts, tokenizer, tmp_path):
    config = changed(epochs=4)
    report = trainer(config, parts, tokenizer, tmp_path).run()
    assert report == json.loads((tmp_path / "training.json").read_text())
    spec = ModelSpec.from_dict(json.loads((tmp_path / "spec.json").read_text()))
    weights = load_file(tmp_path / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float16}
    model = FullModel(spec)
    model.load_state_dict(weights)
    encoded = tokenizer.encode([row.text for row in parts.heldout], spec.context)
    targets = torch.eye(2)[[row.label for row in parts.heldout]]
    judged = evaluate(model, batched(encoded.ids_T, encoded.lengths_B, targets, 5))
    assert judged.accuracy == report["heldout"]["accuracy"] > 0.8
    assert judged.confusion_CC(2) == report["heldout"]["confusion"]
    assert report["weights_sha256"] == checkpoint.file_digest(tmp_path / "model.safetensors")
    for shares in report["heldout"]["expert_shares"]:
        assert sum(shares) == pytest.approx(1)
    assert report["heldout"]["accuracy"] == max(line["heldout_accuracy"] for line in report["epochs"])


def test_training_learns_without_any_extras(parts, tokenizer, tmp_path):
    config = changed(consistency_weight=0.0, teacher_weight=0.0, ema_decay=0.0, word_dropout=0.0, autocast="bfloat16")
    report = trainer(config, parts, tokenizer, tmp_path).run()
    losses = [line["loss"] for line in report["epochs"]]
    assert losses[-1] < losses[0]


def test_a_state_of_another_run_is_refused(parts, tokenizer, tmp_path):
    trainer(changed(), parts, tokenizer, tmp_path).run(stop_after=1)
    with pytest.raises(SetupError, match="another configuration"):
        trainer(changed(seed=5), parts, tokenizer, tmp_path).resume()
    (tmp_path / checkpoint.STATE_FILE).write_bytes(b"damaged")
    with pytest.raises(SetupError, match="no state to resume from"):
        trainer(changed(), parts, tokenizer, tmp_path).resume()


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    path = tmp_path / "file"
    checkpoint.write_atomically(path, b"old")

    def fail(*_):
        raise OSError("no space")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="no space"):
        checkpoint.write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_an_epoch_is_a_function_of_seed_and_number(parts, tokenizer):
    config = TrainConfig.from_dict(CONFIG)
    one, other = (TrainingBatches(parts.training, tokenizer, config) for _ in range(2))
    for number in (1, 0):
        for first, second in zip(one.epoch(number), other.epoch(number), strict=True):
            assert torch.equal(first.ids_T, second.ids_T)
            assert torch.equal(first.targets_BC, second.targets_BC)
    assert not torch.equal(one.epoch(0)[0].ids_T, one.epoch(1)[0].ids_T)


def test_both_views_of_a_batch_hold_the_same_texts(parts, tokenizer):
    batch = TrainingBatches(parts.training, tokenizer, TrainConfig.from_dict(CONFIG)).epoch(0)[0]
    first, second = batch.targets_BC.chunk(2)
    assert torch.equal(first, second)
    assert len(batch.ids_T) == batch.lengths_B.sum()


def test_a_text_without_tokens_becomes_one_unknown_token(tokenizer):
    encoded = tokenizer.encode(["goal", "", "match", ""], 8)
    batches = batched(encoded.ids_T, encoded.lengths_B, torch.eye(4), 3)
    assert batches[0].lengths_B[1] == batches[1].lengths_B[0] == 1
    assert batches[1].ids_T.tolist() == [0]
    assert sum(len(batch.ids_T) for batch in batches) == len(encoded.ids_T) + 2


def test_thinning_out_takes_tokens_and_leaves_texts_apart():
    encoded = Encoded(np.arange(10, dtype=np.int32), np.array([3, 0, 5, 2], np.int32), np.zeros(4, bool))
    ids_T, lengths_B = thinned_out(encoded, np.isin(np.arange(10), (0, 2, 8, 9)))
    assert ids_T.tolist() == [0, 2, 8, 9]
    assert lengths_B.tolist() == [2, 0, 0, 2]


def test_the_teacher_judges_rows_that_it_has_not_seen(parts):
    texts = [row.text for row in parts.training]
    labels = torch.tensor([row.label for row in parts.training])
    probabilities = cross_fitted(texts, labels, 2, seed=0)
    assert torch.allclose(probabilities.sum(dim=1), torch.ones(len(texts)))
    assert (probabilities.argmax(dim=1) == labels).float().mean() > 0.9
    lied = labels.clone()
    lied[0] = 1 - lied[0]
    assert cross_fitted(texts, lied, 2, seed=0)[0].argmax() == labels[0]


def test_the_learning_rate_rises_and_falls():
    settings = changed(warmup_steps=10, final_rate=0.1).train
    rates = [rate_at(step, 100, settings) for step in range(100)]
    assert rates[0] == pytest.approx(settings.learning_rate / 10)
    assert max(rates) == rates[9] == pytest.approx(settings.learning_rate)
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert rates[-1] == pytest.approx(settings.learning_rate * 0.1, rel=0.01)


@pytest.mark.parametrize(
    ("table", "values", "message"),
    [
        ("train", {"epochs": 0}, "epochs"),
        ("train", {"epoch": 1}, "epoch is not known"),
        ("train", {"epochs": "3"}, "must be of type int"),
        ("train", {"dropout": {"heads": 0.1}}, "train.dropout.heads"),
        ("train", {"device": "tpu"}, "device"),
        ("tokenizer", {"steps": ["nothing"]}, "tokenizer.steps"),
        ("tpu", {}, "knows no tpu"),
    ],
)
def test_a_bad_setting_is_refused_by_name(table, values, message):
    with pytest.raises(SetupError, match=message):
        TrainConfig.from_dict({**CONFIG, table: values})


def test_the_bundled_configurations_are_understood():
    for path in sorted(Path("configs").glob("*.toml")):
        config = TrainConfig.load(path)
        assert TrainConfig.from_dict(config.to_dict()) == config


def test_a_configuration_that_is_no_toml_or_no_model_is_refused(tmp_path):
    with pytest.raises(SetupError, match="cannot be read"):
        TrainConfig.load(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("[model\n")
    with pytest.raises(SetupError, match="cannot be read"):
        TrainConfig.load(tmp_path / "bad.toml")
    with pytest.raises(BadCheckpoint):
        TrainConfig.from_dict({"model": {"width": 3}})


def test_a_classifier_is_trained_on_one_file(tmp_path):
    import tomli_w

    from expertmesh.cli.train import train

    (tmp_path / "config.toml").write_text(tomli_w.dumps(CONFIG))
    with pytest.raises(SetupError, match="one file, not 2"):
        train(tmp_path / "config.toml", [tmp_path / "a.csv", tmp_path / "b.csv"], tmp_path / "out")


def test_a_vocabulary_that_does_not_fit_the_model_is_refused(parts, tokenizer, tmp_path):
    config = TrainConfig.from_dict({**CONFIG, "model": {**CONFIG["model"], "embedding": {"vocab": 20}}})
    with pytest.raises(SetupError, match="pieces"):
        trainer(config, parts, tokenizer, tmp_path)


def test_the_command_trains_and_goes_on(parts, tmp_path):
    import csv

    import tomli_w

    from expertmesh.cli.train import train

    data, config, out = tmp_path / "train.csv", tmp_path / "config.toml", tmp_path / "out"
    with data.open("w", newline="") as file:
        csv.writer(file).writerows(
            (row.label + 1, row.title, row.description) for row in parts.training + parts.heldout
        )
    config.write_text(tomli_w.dumps({**CONFIG, "train": {**CONFIG["train"], "epochs": 1}}))
    train(config, [data], out)
    Tokenizer.load(out / "tokenizer")
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(SetupError, match="--resume"):
        train(config, [data], out)
    train(config, [data], out, resume=True)
    assert (out / "model.safetensors").read_bytes() == before
