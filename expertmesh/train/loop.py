"""The training loop: steps, epochs, the best weights, and going on where a run was stopped.

A run that was stopped and resumed ends with the same bits as one that was not, given the same machine and threads:
the state holds weights, averages, optimizer moments and generator states, and epochs are functions of their number.
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from rich.console import Console

from expertmesh.errors import SetupError
from expertmesh.model.full import FullModel
from expertmesh.model.gating import GatingStage
from expertmesh.tokenization.tokenizer import Tokenizer
from expertmesh.train import checkpoint, losses
from expertmesh.train.batches import Batch, TrainingBatches, batched, one_hot
from expertmesh.train.config import TrainConfig
from expertmesh.train.data import Split
from expertmesh.train.evaluation import Evaluation, Routes, evaluate
from expertmesh.train.optimisation import AveragedWeights, initialise, make_optimizer, rate_at
from expertmesh.train.report import Report
from expertmesh.train.vectors import token_vectors

EVALUATION_ROWS = 256


class Trainer:
    """Trains one model.

    Args:
        config: What and how.
        split: Rows to learn from and to judge by.
        data_digest: SHA-256 of the file that the rows come from.
        tokenizer: Its vocabulary must fit the model's.
        out: Folder of the checkpoint.
        console: Where progress is shown.
    """

    def __init__(
        self, config: TrainConfig, split: Split, data_digest: str, tokenizer: Tokenizer, out: Path, console: Console
    ) -> None:
        if tokenizer.vocab > config.model.embedding.vocab:
            raise SetupError(f"the tokenizer has {tokenizer.vocab} pieces, the model {config.model.embedding.vocab}")
        if config.train.device == "cuda" and not torch.cuda.is_available():
            raise SetupError("train.device is 'cuda', but torch sees no such device")
        self.config, self.split, self.data_digest, self.out, self.console = config, split, data_digest, out, console
        self.device = torch.device(config.train.device)
        if config.train.threads:
            torch.set_num_threads(config.train.threads)
        torch.manual_seed(config.train.seed)
        self.model = FullModel(config.model, config.train.dropout)
        initialise(self.model, config.train)
        if config.train.cooccurrence_start:
            self._start_from_cooccurrence(tokenizer)
        self.model.to(self.device)
        self.judged = FullModel(config.model).to(self.device)
        self.average = AveragedWeights(self.model, config.train.ema_decay)
        self.optimizer = make_optimizer(self.model, config.train)
        self.batches = TrainingBatches(split.training, tokenizer, config)
        self.heldout = _heldout_batches(split, tokenizer, config)
        self.steps = config.train.epochs * self.batches.steps_per_epoch
        self.step = 0
        self.totals = _Totals(config)
        self.history: list[dict[str, Any]] = []

    def run(self, stop_after: int | None = None) -> dict[str, Any]:
        """Trains to the end, or until `stop_after` steps of the whole run are done; gives the last report."""
        per_epoch, save_every = self.batches.steps_per_epoch, self.config.train.save_every_steps
        with Report(self.console, self.steps, self.step) as report:
            while self.step < self.steps:
                started = time.monotonic()
                for batch in self.batches.epoch(self.step // per_epoch)[self.step % per_epoch :]:
                    report.step(self._train_step(batch.to(self.device)))
                    if self.step % per_epoch == 0:
                        report.epoch(self._end_epoch(started), self.config.train.epochs)
                    elif self.step == stop_after or (save_every and self.step % save_every == 0):
                        self._save_state()
                    if self.step == stop_after:
                        return {}
        return self._write_report()

    def _start_from_cooccurrence(self, tokenizer: Tokenizer) -> None:
        encoded = tokenizer.encode([row.text for row in self.split.training], self.config.model.context)
        table = self.model.embedding.token.weight
        ids_T, lengths_B = torch.from_numpy(encoded.ids_T).long(), torch.from_numpy(encoded.lengths_B).long()
        table.data.copy_(
            token_vectors(ids_T, lengths_B, table.shape[0], table.shape[1], self.config.train.embedding_std)
        )

    def _train_step(self, batch: Batch) -> float:
        train = self.config.train
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * rate_at(self.step, self.steps, train)
        self.model.train()
        routes = Routes()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=train.autocast == "bfloat16"):
            logits_BC = self.model(batch.ids_T, batch.lengths_B, observe=routes).logits_BC
        task = losses.smoothed_cross_entropy(logits_BC, batch.targets_BC, train.label_smoothing)
        loss = task + self._router_losses(routes)
        if train.consistency_weight:
            loss = loss + train.consistency_weight * losses.consistency_loss(*logits_BC.chunk(2))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), train.clip_norm, error_if_nonfinite=True)
        self.optimizer.step()
        self.average.update(self.model, self.step)
        self.step += 1
        self.totals.add(task.item(), logits_BC, batch, routes)
        return task.item()

    def _router_losses(self, routes: Routes) -> torch.Tensor:
        train, terms = self.config.train, []
        for layer, gated in routes.gated.items():
            gating = cast(GatingStage, self.model.gating[layer])
            logits_TE = gating.router_logits(gated.expert_input_TD)
            balance = losses.load_balancing_loss(logits_TE, gated.expert_ids_TK)
            terms.append(train.balance_weight * balance + train.router_z_weight * losses.router_z_loss(logits_TE))
        return torch.stack(terms).mean()

    def _end_epoch(self, started: float) -> dict[str, Any]:
        stored = checkpoint.to_storage(self._weights(), self.config.train.storage_dtype)
        self.judged.load_state_dict(stored)
        judged = evaluate(self.judged, self.heldout)
        rank = (judged.accuracy, -judged.loss)
        best = all(rank > (line["heldout_accuracy"], -line["heldout_loss"]) for line in self.history)
        self.history.append(
            {
                "epoch": len(self.history) + 1,
                **self.totals.means(),
                "heldout_loss": judged.loss,
                "heldout_accuracy": judged.accuracy,
                "heldout_expert_shares": judged.shares_LE,
                "best": best,
                "seconds": time.monotonic() - started,
            }
        )
        self.totals = _Totals(self.config)
        if best:
            digest = checkpoint.write_weights(self.out, self.config.model, stored)
            self._best = {"weights_sha256": digest, "heldout": _judgement(judged, self.config)}
        self._write_report()
        self._save_state()
        return self.history[-1]

    def _weights(self) -> dict[str, torch.Tensor]:
        return self.average.weights if self.config.train.ema_decay else self.model.state_dict()

    def _write_report(self) -> dict[str, Any]:
        report = {
            "config": self.config.to_dict(),
            "data_sha256": self.data_digest,
            "rows": {
                "training": len(self.split.training),
                "heldout": len(self.split.heldout),
                "duplicates_left_out": self.split.duplicates,
                "near_heldout_left_out": self.split.guarded,
            },
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "torch": torch.__version__,
            "epochs": self.history,
            **self._best,
        }
        checkpoint.write_json(self.out / checkpoint.REPORT_FILE, report)
        return report

    def _save_state(self) -> None:
        tensors = {f"model.{name}": weight for name, weight in self.model.state_dict().items()}
        tensors |= {f"average.{name}": weight for name, weight in self.average.weights.items()}
        for index, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{name}": value for name, value in moments.items()}
        tensors["generator.cpu"] = torch.get_rng_state()
        if self.device.type == "cuda":
            tensors["generator.cuda"] = torch.cuda.get_rng_state()
        progress = {
            "run": self._run_digest(),
            "step": self.step,
            "totals": self.totals.values,
            "history": self.history,
            "best": getattr(self, "_best", None),
        }
        checkpoint.write_state(self.out, checkpoint.ResumeState(tensors, progress))

    def resume(self) -> None:
        """Goes back to where the last state in the folder was written.

        Raises:
            SetupError: There is none, or it is of another configuration or other data.
        """
        state = checkpoint.read_state(self.out)
        progress, tensors = state.progress, state.tensors
        if progress["run"] != self._run_digest():
            raise SetupError(f"{self.out}: its state is of another configuration or other data; train anew without it")
        self.model.load_state_dict(_named(tensors, "model."))
        self.average.weights = {n: w.to(self.device) for n, w in _named(tensors, "average.").items()}
        moments: dict[int, dict[str, torch.Tensor]] = {}
        for name, value in _named(tensors, "optimizer.").items():
            index, moment = name.split(".")
            moments.setdefault(int(index), {})[moment] = value
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": moments})
        torch.set_rng_state(tensors["generator.cpu"])
        if self.device.type == "cuda":
            torch.cuda.set_rng_state(tensors["generator.cuda"])
        self.step, self.history = progress["step"], progress["history"]
        self.totals.values = progress["totals"]
        if progress["best"]:
            self._best = progress["best"]

    def _run_digest(self) -> str:
        told = json.dumps([self.config.to_dict(), self.data_digest], sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()


class _Totals:
    """Sums over the training steps of an epoch."""

    def __init__(self, config: TrainConfig) -> None:
        shape = (config.model.layers, config.model.router.experts)
        self.values: dict[str, Any] = {"loss": 0.0, "right": 0, "rows": 0, "counts_LE": np.zeros(shape, int).tolist()}

    def add(self, loss: float, logits_BC: torch.Tensor, batch: Batch, routes: Routes) -> None:
        values, rows = self.values, len(batch.lengths_B)
        counts_LE = routes.counts_LE(len(values["counts_LE"][0])).numpy()
        values["loss"] += loss * rows
        values["right"] += int((logits_BC.argmax(dim=1) == batch.targets_BC.argmax(dim=1)).sum())
        values["rows"] += rows
        values["counts_LE"] = (np.array(values["counts_LE"]) + counts_LE).tolist()

    def means(self) -> dict[str, Any]:
        values, counts_LE = self.values, np.array(self.values["counts_LE"])
        return {
            "loss": values["loss"] / values["rows"],
            "accuracy": values["right"] / values["rows"],
            "expert_shares": (counts_LE / counts_LE.sum(axis=1, keepdims=True)).tolist(),
        }


def _heldout_batches(split: Split, tokenizer: Tokenizer, config: TrainConfig) -> list[Batch]:
    encoded = tokenizer.encode([row.text for row in split.heldout], config.model.context)
    targets_BC = one_hot(split.heldout, len(config.model.head.labels))
    return batched(encoded.ids_T, encoded.lengths_B, targets_BC, EVALUATION_ROWS)


def _judgement(judged: Evaluation, config: TrainConfig) -> dict[str, Any]:
    return {
        "accuracy": judged.accuracy,
        "loss": judged.loss,
        "confusion": judged.confusion_CC(len(config.model.head.labels)),
        "expert_shares": judged.shares_LE,
    }


def _named(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
