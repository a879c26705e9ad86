"""The training loop: steps, epochs, the best weights, and going on where a run was stopped.

A run that was stopped and resumed ends with the same bits as one that was not, given the same machine and threads:
the state holds weights, averages, optimizer moments and generator states, and epochs are functions of their number.
"""

from __future__ import annotations

import hashlib
import json
import time
from pathlib import Path
from typing import Any, Generic, cast

import numpy as np
import torch
from rich.console import Console

from expertmesh.errors import SetupError
from expertmesh.model.full import FullModel
from expertmesh.model.gating import GatingStage
from expertmesh.train import checkpoint, losses
from expertmesh.train.config import TrainConfig
from expertmesh.train.optimisation import AveragedWeights, initialise, make_optimizer, rate_at
from expertmesh.train.report import Report
from expertmesh.train.routes import Routes, shares
from expertmesh.train.task import BatchT, StepLoss, Task


class Trainer(Generic[BatchT]):
    """Trains one model.

    Args:
        config: What and how.
        task: What is learnt, from which data.
        data_digest: SHA-256 of the files that the data come from.
        out: Folder of the checkpoint.
        console: Where progress is shown.
    """

    def __init__(self, config: TrainConfig, task: Task[BatchT], data_digest: str, out: Path, console: Console) -> None:
        if config.train.device == "cuda" and not torch.cuda.is_available():
            raise SetupError("train.device is 'cuda', but torch sees no such device")
        self.config, self.task, self.data_digest, self.out, self.console = config, task, data_digest, out, console
        self.device = torch.device(config.train.device)
        if config.train.threads:
            torch.set_num_threads(config.train.threads)
        torch.manual_seed(config.train.seed)
        self.model = FullModel(config.model, config.train.dropout)
        initialise(self.model, config.train)
        task.start(self.model)
        self.model.to(self.device)
        self.judged = FullModel(config.model).to(self.device)
        self.average = AveragedWeights(self.model, config.train.ema_decay)
        self.optimizer = make_optimizer(self.model, config.train)
        self.steps = config.train.epochs * task.steps_per_epoch
        self.decay_steps = config.train.decay_epochs * task.steps_per_epoch
        self.step = 0
        self.totals = _Totals(config)
        self.history: list[dict[str, Any]] = []
        self._best: dict[str, Any] | None = None

    def run(self, stop_after: int | None = None) -> dict[str, Any]:
        """Trains to the end, or until `stop_after` steps of the whole run are done; gives the last report."""
        per_epoch, save_every = self.task.steps_per_epoch, self.config.train.save_every_steps
        started = time.monotonic()
        with Report(self.console, self.task.columns, self.steps, self.step) as report:
            while self.step < self.steps:
                for batch in self.task.epoch(self.step // per_epoch)[self.step % per_epoch :]:
                    report.step(self._train_step(batch.to(self.device)))
                    if self._is_to_be_judged():
                        line = self._judge(started)
                        report.epoch(line, self.config.train.epochs, self.task.cells(line))
                        started = time.monotonic()
                    elif self.step == stop_after or (save_every and self.step % save_every == 0):
                        self._save_state()
                    if self.step == stop_after:
                        return {}
        return self._write_report()

    def _is_to_be_judged(self) -> bool:
        epochs, rest = divmod(self.step, self.task.steps_per_epoch)
        return not rest and (epochs % self.task.judge_every == 0 or self.step == self.steps)

    def _train_step(self, batch: BatchT) -> float:
        train = self.config.train
        for group in self.optimizer.param_groups:
            group["lr"] = group["rate"] * rate_at(self.step, self.steps, train, self.decay_steps)
        self.model.train()
        routes = Routes()
        with torch.autocast(self.device.type, torch.bfloat16, enabled=train.autocast == "bfloat16"):
            logits = self.task.logits(self.model, batch, routes)
        said = self.task.loss(logits, batch)
        self.optimizer.zero_grad(set_to_none=True)
        (said.loss + self._router_losses(routes)).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), train.clip_norm, error_if_nonfinite=True)
        self.optimizer.step()
        self.average.update(self.model, self.step)
        self.step += 1
        self.totals.add(said, routes)
        return said.sums["loss"] / said.count

    def _router_losses(self, routes: Routes) -> torch.Tensor:
        train, terms = self.config.train, []
        for layer, gated in routes.gated.items():
            gating = cast(GatingStage, self.model.gating[layer])
            logits_TE = gating.router_logits(gated.expert_input_TD)
            balance = losses.load_balancing_loss(logits_TE, gated.expert_ids_TK)
            terms.append(train.balance_weight * balance + train.router_z_weight * losses.router_z_loss(logits_TE))
        return torch.stack(terms).mean()

    def _judge(self, started: float) -> dict[str, Any]:
        stored = checkpoint.to_storage(self._weights(), self.config.train.storage_dtype)
        self.judged.load_state_dict(stored)
        judged = self.task.judge(self.judged)
        best = self._best is None or judged.rank > tuple(self._best["rank"])
        self.history.append(
            {
                "epoch": self.step // self.task.steps_per_epoch,
                **self.totals.means(),
                **judged.line,
                "best": best,
                "seconds": time.monotonic() - started,
            }
        )
        self.totals = _Totals(self.config)
        if best:
            digest = checkpoint.write_weights(self.out, self.config.model, stored)
            self._best = {"rank": list(judged.rank), "told": {"weights_sha256": digest, "heldout": judged.heldout}}
        self._write_report()
        self._save_state()
        return self.history[-1]

    def _weights(self) -> dict[str, torch.Tensor]:
        return self.average.weights if self.config.train.ema_decay else self.model.state_dict()

    def _write_report(self) -> dict[str, Any]:
        report = {
            "config": self.config.to_dict(),
            "data_sha256": self.data_digest,
            **self.task.data,
            "parameters": sum(parameter.numel() for parameter in self.model.parameters()),
            "torch": torch.__version__,
            "epochs": self.history,
            **(self._best["told"] if self._best else {}),
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
            "end": self._end(),
            "step": self.step,
            "totals": self.totals.values,
            "history": self.history,
            "best": self._best,
        }
        checkpoint.write_state(self.out, checkpoint.ResumeState(tensors, progress))

    def resume(self) -> None:
        """Goes back to where the last state in the folder was written.

        Raises:
            SetupError: There is none, or it is of another configuration or other data. Only `epochs`,
                `decay_epochs` and `last_epochs` may be others, as long as the rate is constant and does not yet fall.
        """
        state = checkpoint.read_state(self.out)
        progress, tensors = state.progress, state.tensors
        if progress["run"] != self._run_digest() or not self._leads_on(progress["step"], progress["end"]):
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
        self._best = progress["best"]

    def _end(self) -> list[int]:
        """Epochs in all, and how many of the last differ, in two ways: what a run with a constant rate may change."""
        return [self.config.train.epochs, self.config.train.decay_epochs, self.config.texts.last_epochs]

    def _leads_on(self, step: int, end: list[int]) -> bool:
        """Whether a state of this step would be the same had its run been meant to end as this one does.

        That is so where both runs have a constant rate, and none has come to its last epochs.
        """
        if end == self._end():
            return True
        per_epoch, warmup = self.task.steps_per_epoch, self.config.train.warmup_steps
        return self.decay_steps > 0 and all(
            step <= (epochs - max(lasts)) * per_epoch and warmup <= epochs * per_epoch // 2
            for epochs, *lasts in (end, self._end())
        )

    def _run_digest(self) -> str:
        values = self.config.to_dict()
        values["train"] |= {"epochs": 0, "decay_epochs": self.config.train.decay_epochs > 0}
        values.get("texts", {}).pop("last_epochs", None)
        told = json.dumps([values, self.data_digest], sort_keys=True)
        return hashlib.sha256(told.encode()).hexdigest()


class _Totals:
    """Sums over the training steps since the last judgement."""

    def __init__(self, config: TrainConfig) -> None:
        shape = (len(config.model.sparse_layers), config.model.router.experts)
        self.values: dict[str, Any] = {"count": 0, "sums": {}, "counts_LE": np.zeros(shape, int).tolist()}

    def add(self, said: StepLoss, routes: Routes) -> None:
        values = self.values
        values["count"] += said.count
        for name, value in said.sums.items():
            values["sums"][name] = values["sums"].get(name, 0.0) + value
        counts_LE = np.array(values["counts_LE"])
        values["counts_LE"] = (counts_LE + routes.counts_LE(counts_LE.shape[1]).numpy()).tolist()

    def means(self) -> dict[str, Any]:
        means = {name: value / self.values["count"] for name, value in self.values["sums"].items()}
        return means | {"expert_shares": shares(np.array(self.values["counts_LE"]))}


def _named(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
