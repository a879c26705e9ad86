"""Stages from a split model. Each function reads its own part files and no others."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from expertmesh.checkpoint import manifest as names
from expertmesh.checkpoint.manifest import Manifest
from expertmesh.checkpoint.parts import load_part
from expertmesh.model.attention import gating_stage
from expertmesh.model.embedding import EmbeddingStage
from expertmesh.model.full import FullModel
from expertmesh.model.gating import GatingStage
from expertmesh.model.graphs import Graphs
from expertmesh.model.head import ClassifierStage, LanguageHead, head
from expertmesh.model.layers import DTYPES, GatedMLP, arrange, narrow
from expertmesh.model.rotary import Rotary

StageT = TypeVar("StageT", bound=nn.Module)


class StageLoader:
    """Loads stages of one model onto one device.

    Args:
        folder: The split model.
        device: Where the weights go.
        graphs: Of that device, for what is computed with them.

    Raises:
        BadCheckpoint: From every method: the part is missing, damaged, or does not fit the spec.
    """

    def __init__(self, folder: Path, device: torch.device, graphs: Graphs | None = None) -> None:
        self.folder = folder
        self.device = device
        self.graphs = graphs
        self.manifest = Manifest.read(folder)
        self.spec = self.manifest.spec
        self.loaded: list[str] = []

    def embedding(self) -> EmbeddingStage:
        """The embedding."""
        return self._load(names.embedding_part(), lambda: EmbeddingStage(self.spec))

    def gating(self, layer: int) -> GatingStage:
        """One layer's attention and router."""
        stage = self._load(names.gating_part(layer), lambda: gating_stage(self.spec, layer))
        stage.graphs = self.graphs
        return stage

    def expert(self, layer: int, expert: int) -> GatedMLP:
        """One expert."""
        return self._load(names.expert_part(layer, expert), lambda: GatedMLP(self.spec.width, self.spec.expert))

    def classifier(self) -> ClassifierStage | LanguageHead:
        """The head."""
        return self._load(names.classifier_part(), lambda: head(self.spec))

    def rotary(self) -> Rotary:
        """The table of rotations."""
        return Rotary(self.spec, self.device)

    def full_model(self) -> FullModel:
        """Every stage."""
        with torch.device("meta"):
            model = FullModel(self.spec)
        model.graphs = self.graphs
        model.embedding = self.embedding()
        for layer in range(self.spec.layers):
            model.gating[layer] = self.gating(layer)
        for layer in self.spec.sparse_layers:
            model.experts[layer] = nn.ModuleList(
                self.expert(layer, expert) for expert in range(self.spec.router.experts)
            )
        model.classifier = self.classifier()
        return model.eval()

    def _load(self, name: str, make: Callable[[], StageT]) -> StageT:
        with torch.device("meta"):
            module = make()
        load_part(self.folder, self.manifest, name, module, self.device)
        self.loaded.append(name)
        return arrange(narrow(module, DTYPES[self.spec.dtype]))
