import json
import math
import random
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tomli_w
import torch
from rich.console import Console
from safetensors.torch import load_file

from expertmesh.checkpoint.manifest import Manifest
from expertmesh.checkpoint.split import split
from expertmesh.cli.train import train
from expertmesh.errors import SetupError
from expertmesh.model.full import FullModel
from expertmesh.model.spec import ModelSpec
from expertmesh.tokenization.language import LanguageTokenizer
from expertmesh.train import checkpoint
from expertmesh.train.config import TrainConfig
from expertmesh.train.language import Language
from expertmesh.train.likelihood import TextIds, Window, measure, read_ids, windows_of
from expertmesh.train.loop import Trainer
from expertmesh.train.optimisation import rate_at
from expertmesh.train.pieces import make_pieces
from expertmesh.train.texts import Texts, read_texts

CONFIG = {
    "model": {
        "width": 16,
        "layers": 2,
        "context": 24,
        "embedding": {"vocab": 300, "learned_positions": False},
        "attention": {"kind": "grouped", "heads": 2, "kv_heads": 1, "head_width": 8, "qk_norm": "head"},
        "router": {"experts": 4, "top_k": 2},
        "expert": {"width": 16},
        "head": {"kind": "language", "end_ids": [2]},
        "norm": {"kind": "rms"},
        "rotary": {"frequencies": [1.0, 0.1, 0.01, 0.001]},
    },
    "tokenizer": {"character_coverage": 1, "sampling_alpha": 0.1},
    "texts": {"window": 16, "others_share": 0.3, "last_epochs": 1},
    "train": {
        "epochs": 4,
        "batch_rows": 16,
        "learning_rate": 0.01,
        "warmup_steps": 4,
        "decay_epochs": 1,
        "dropout": {"embedding": 0.1, "attention": 0.1, "expert": 0.1, "head": 0.1},
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
def texts():
    draw = random.Random(0)
    lines = [
        f"{draw.choice(['ROMEO', 'JULIET'])}:\n{draw.choice(['Speak', 'Hear me', 'Go'])}, good night.\n\n"
        for _ in range(200)
    ]
    return Texts("".join(lines), ("Other words stand here, and they are others. " * 40,), "".join(lines[:20]))


@pytest.fixture(scope="module")
def folder(texts, tmp_path_factory):
    folder = tmp_path_factory.mktemp("pieces")
    make_pieces(texts.main, TrainConfig.from_dict(CONFIG).tokenizer, 300, folder)
    return folder


@pytest.fixture(scope="module")
def pieces(texts, folder):
    return make_pieces(texts.main, TrainConfig.from_dict(CONFIG).tokenizer, 300, folder)


def changed(texts=None, **settings):
    config = TrainConfig.from_dict(CONFIG)
    return replace(config, train=replace(config.train, **settings), texts=replace(config.texts, **(texts or {})))


def trainer(config, texts, pieces, out):
    return Trainer(config, Language(config, texts, pieces), "digest of the data", out, Console(quiet=True))


def assert_same_bits(first, second):
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.numpy().tobytes() == second[name].numpy().tobytes(), name


@pytest.mark.parametrize("stop_after", [3, 17])
def test_a_resumed_run_ends_with_the_bits_of_one_that_never_stopped(texts, pieces, tmp_path, stop_after):
    config = TrainConfig.from_dict(CONFIG)
    report = trainer(config, texts, pieces, tmp_path / "whole").run()
    assert trainer(config, texts, pieces, tmp_path / "stopped").run(stop_after=stop_after) == {}
    torch.manual_seed(999)
    resumed = trainer(config, texts, pieces, tmp_path / "stopped")
    resumed.resume()
    assert resumed.step == stop_after
    resumed_report = resumed.run()
    states = [checkpoint.read_state(tmp_path / name) for name in ("whole", "stopped")]
    assert_same_bits(states[0].tensors, states[1].tensors)
    for told in (report, resumed_report):
        for line in told["epochs"]:
            line.pop("seconds")
    assert report == resumed_report


def test_a_run_with_a_constant_rate_may_become_longer_while_it_has_not_begun_to_fall(texts, pieces, tmp_path):
    short, long = changed(epochs=3), changed(texts={"last_epochs": 0}, epochs=4, decay_epochs=2)
    per_epoch = Language(short, texts, pieces).steps_per_epoch
    trainer(long, texts, pieces, tmp_path / "long").run()
    trainer(short, texts, pieces, tmp_path / "short").run(stop_after=2 * per_epoch)
    with pytest.raises(SetupError, match="another configuration"):
        trainer(changed(epochs=4, seed=3), texts, pieces, tmp_path / "short").resume()
    resumed = trainer(long, texts, pieces, tmp_path / "short")
    resumed.resume()
    resumed.run()
    states = [checkpoint.read_state(tmp_path / name) for name in ("long", "short")]
    assert_same_bits(states[0].tensors, states[1].tensors)
    trainer(short, texts, pieces, tmp_path / "late").run(stop_after=2 * per_epoch + 1)
    for other in (long, changed(epochs=3, decay_epochs=2), changed(texts={"last_epochs": 0}, epochs=3)):
        with pytest.raises(SetupError, match="another configuration"):
            trainer(other, texts, pieces, tmp_path / "late").resume()


def test_what_is_written_is_a_whole_checkpoint_that_scores_what_its_report_says(texts, folder, pieces, tmp_path):
    out = tmp_path / "run"
    report = trainer(changed(texts={"judge_every": 3}), texts, pieces, out).run()
    assert report == json.loads((out / "training.json").read_text())
    assert [line["epoch"] for line in report["epochs"]] == [3, 4]
    losses = [line["loss"] for line in report["epochs"]]
    assert losses[1] < losses[0] < math.log(300)
    spec = ModelSpec.from_dict(json.loads((out / "spec.json").read_text()))
    weights = load_file(out / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float16}
    model = FullModel(spec)
    model.load_state_dict(weights)
    (out / "tokenizer").symlink_to(folder)
    manifest = split(out, tmp_path / "parts")
    judged = measure(model, read_ids(tmp_path / "parts", manifest, texts.heldout), 16, 8)
    assert judged.nats / len(texts.heldout) == pytest.approx(report["heldout"]["nats_per_character"], abs=1e-6)
    assert judged.nats / len(texts.heldout) < 1.0
    for shares in report["heldout"]["expert_shares"]:
        assert sum(shares) == pytest.approx(1)


def test_others_are_read_until_the_last_epochs(texts, pieces):
    config = changed(texts={"others_share": 0.5})
    other_words = replace(texts, others=("@" * 4000,))
    task = Language(config, other_words, pieces)
    (mark,) = set(pieces.encode("@@").tolist()) - set(pieces.encode(texts.main).tolist())
    shares = [np.mean([(batch.ids_T == mark).float().mean() for batch in task.epoch(number)]) for number in range(4)]
    assert all(0.35 < share < 0.65 for share in shares[:3])
    assert shares[3] == 0


def test_an_epoch_is_a_function_of_seed_and_number(texts, pieces):
    one, other = (Language(changed(), texts, pieces) for _ in range(2))
    for number in (1, 0):
        for first, second in zip(one.epoch(number), other.epoch(number), strict=True):
            assert torch.equal(first.ids_T, second.ids_T)
    assert not torch.equal(one.epoch(0)[0].ids_T, one.epoch(1)[0].ids_T)


def test_targets_are_the_tokens_that_follow(texts, pieces):
    batch = Language(changed(texts={"others_share": 0.0}), texts, pieces).epoch(0)[0]
    assert batch.lengths_B.tolist() == [16] * 16
    for ids, targets in zip(batch.ids_T.split(16), batch.targets_T.split(16), strict=True):
        assert torch.equal(ids[1:], targets[:-1])


def test_pieces_give_a_text_back_and_are_what_a_language_tokenizer_reads(texts, folder, pieces):
    tokenizer = LanguageTokenizer.load(folder)
    for text in (texts.heldout, "  two  spaces\n\n\nand lines ", "naïve 漢字 ☃"):
        ids = pieces.encode(text).tolist()
        assert tokenizer.encode(text) == ids
        assert tokenizer.decode([ids]) == [text]
        assert tokenizer.decode([pieces.sample(text, 0.5, 1).tolist()]) == [text]
    assert pieces.encode("a\n\nb").tolist().count(pieces.encode("\n")[0]) == 2
    first, same, other = (pieces.sample(texts.main, 0.5, seed) for seed in (1, 1, 2))
    assert first.tolist() == same.tolist() != other.tolist()


class _Uneven:
    """Token t is followed by token (t + 1) mod 4 with probability 1/2 if it is seen first in its window, else 1/4."""

    def __init__(self):
        self.spec = SimpleNamespace(
            sparse_layers=(0,), router=SimpleNamespace(experts=2), embedding=SimpleNamespace(vocab=4)
        )
        self.weight = torch.zeros(1)

    def parameters(self):
        return iter([self.weight])

    def eval(self):
        return self

    def logits(self, ids_T, lengths_B, observe):
        from expertmesh.dispatch import Gate, Gated

        observe(Gate(0, ids_T, lengths_B), Gated(None, None, torch.zeros(len(ids_T), 1, dtype=torch.int64)))
        rows = []
        for ids in ids_T.split(lengths_B.tolist()):
            for place, id_ in enumerate(ids.tolist()):
                likely = 0.5 if place == 0 else 0.25
                row = torch.full((4,), (1 - likely) / 3)
                row[(id_ + 1) % 4] = likely
                rows.append(row.log())
        return torch.stack(rows)


def test_nats_are_those_of_every_token_once_in_the_window_that_counts_it():
    ids = TextIds(np.arange(8) % 4, 14)
    told = measure(_Uneven(), ids, window=4, stride=2)
    assert told.tokens == 7
    assert told.nats == pytest.approx(math.log(2) + 6 * math.log(4))
    assert told.counts_LE.tolist() == [[4 + 4 + 4, 0]]
    apart = measure(_Uneven(), ids, window=1, stride=1)
    assert apart.nats == pytest.approx(7 * math.log(2))


@pytest.mark.parametrize(("tokens", "window", "stride"), [(1, 4, 2), (4, 4, 2), (5, 4, 2), (23, 8, 3), (23, 8, 8)])
def test_windows_count_every_token_once(tokens, window, stride):
    places = windows_of(tokens, window, stride)
    counted = [place.start + index for place in places for index in range(place.counted, place.length)]
    assert counted == list(range(tokens))
    for place in places[1:]:
        assert place.length == window
        assert place.counted >= window - stride
    assert windows_of(5, 4, 2) == [Window(0, 4, 0), Window(1, 4, 3)]


def test_the_rate_stays_until_it_falls():
    settings = changed(learning_rate=1.0, warmup_steps=10, final_rate=0.1).train
    rates = [rate_at(step, 100, settings, 20) for step in range(100)]
    assert rates[9:81] == [1.0] * 72
    assert rates[90] == pytest.approx(0.55)
    assert rates[-1] == pytest.approx(0.1 + 0.9 / 20)


@pytest.mark.parametrize(
    ("table", "values", "message"),
    [
        ("train", {"title_dropout": 0.1}, "title_dropout is for classifiers"),
        ("train", {"epochs": 2, "decay_epochs": 3}, "decay_epochs"),
        ("texts", {"window": 25}, "texts.window must not be more"),
        ("texts", {"others_share": 2}, "others_share"),
        ("texts", {"windows": 2}, "texts.windows is not known"),
        ("texts", 3, "texts must be a table"),
        ("tokenizer", {"sampling_alpha": 1.0}, "sampling_alpha"),
        ("model", {**CONFIG["model"], "head": {"kind": "language"}}, "end_ids"),
        ("model", {**CONFIG["model"], "dtype": "bfloat16"}, "dtype must be 'float32'"),
        ("model", {**CONFIG["model"], "dense": {"layers": [0, 1], "width": 8}}, "leave a layer that has experts"),
        ("model", {**CONFIG["model"], "attention": {**CONFIG["model"]["attention"], "windows": [4, 0]}}, "windows"),
        ("model", {**CONFIG["model"], "attention": {**CONFIG["model"]["attention"], "sinks": True}}, "sinks"),
    ],
)
def test_a_bad_setting_is_refused_by_name(table, values, message):
    with pytest.raises(SetupError, match=message):
        TrainConfig.from_dict({**CONFIG, table: values})


def test_texts_are_no_setting_of_a_classifier():
    model = {**CONFIG["model"], "attention": {"heads": 2}, "head": {"labels": ["a", "b"]}, "rotary": {}}
    with pytest.raises(SetupError, match="for a language model"):
        TrainConfig.from_dict({"model": model, "texts": {"window": 8}})


def test_a_text_that_fills_no_window_and_a_vocabulary_that_does_not_fit_are_refused(texts, pieces, tmp_path):
    config = changed()
    with pytest.raises(SetupError, match="the first text has"):
        Language(config, replace(texts, main="Go."), pieces)
    with pytest.raises(SetupError, match="the other text has"):
        Language(config, replace(texts, others=("Go.",)), pieces)
    larger = replace(config, model=replace(config.model, embedding=replace(config.model.embedding, vocab=301)))
    with pytest.raises(SetupError, match="300 pieces"):
        Language(larger, texts, pieces)
    with pytest.raises(SetupError, match="no vocabulary of 900"):
        make_pieces("Too few words.", config.tokenizer, 900, tmp_path)


def test_the_command_trains_measures_and_goes_on(texts, tmp_path, capsys):
    from expertmesh.cli.eval import eval as evaluate

    first, other = tmp_path / "plays.txt", tmp_path / "wiki.tokens"
    first.write_text(texts.main)
    other.write_text(" = Heading = \n \n Words , which are apart @-@ set . \n" * 30)
    config, out, parts = tmp_path / "config.toml", tmp_path / "out", tmp_path / "parts"
    config.write_text(tomli_w.dumps({**CONFIG, "train": {**CONFIG["train"], "epochs": 1}}))
    train(config, [first, other], out)
    report = json.loads((out / "training.json").read_text())
    before = (out / "model.safetensors").read_bytes()
    with pytest.raises(SetupError, match="--resume"):
        train(config, [first, other], out)
    train(config, [first, other], out, resume=True)
    assert (out / "model.safetensors").read_bytes() == before
    manifest = split(out, parts)
    assert {"tokenizer/tokenizer.model", "tokenizer/tokenizer_config.json"} <= manifest.parts.keys()
    capsys.readouterr()
    evaluate(tmp_path, first, parts, "mesh", held_out=True, address="", window=16, stride=8)
    told = capsys.readouterr().out
    assert f"nats per character  {report['heldout']['nats_per_character']:.4f}" in told
    assert f"characters          {len(read_texts([first]).heldout)}" in told
    for wrong, message in (({"window": 25}, "context of 24"), ({"window": 8, "stride": 9}, "window of 8")):
        with pytest.raises(SetupError, match=message):
            evaluate(tmp_path, first, parts, "mesh", False, "", **{"window": 0, "stride": 0, **wrong})
    with pytest.raises(SetupError, match="in this process"):
        evaluate(tmp_path, first, parts, "full-model", False, "", 0, 0)


def test_the_bundled_configuration_is_understood():
    config = TrainConfig.load(Path("configs/tinytext.toml"))
    assert config.model.generates
    assert TrainConfig.from_dict(config.to_dict()) == config


def test_a_missing_start_token_leaves_the_first_token_uncounted(texts, folder, pieces, tmp_path):
    out = tmp_path / "run"
    trainer(changed(epochs=1), texts, pieces, out).run()
    (out / "tokenizer").symlink_to(folder)
    manifest = split(out, tmp_path / "parts")
    told = read_ids(tmp_path / "parts", manifest, "night night")
    assert told.stream_T[0] == 2
    assert told.characters == 11
    spec = manifest.spec
    without = Manifest(manifest.name, replace(spec, head=replace(spec.head, end_ids=())), manifest.parts)
    bare = read_ids(tmp_path / "parts", without, "night night")
    assert bare.stream_T.tolist() == told.stream_T.tolist()[1:]
    assert 0 < bare.characters < 11
    with pytest.raises(SetupError, match="no token to predict"):
        read_ids(tmp_path / "parts", without, "")
