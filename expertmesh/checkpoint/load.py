"""Stages from a split model. Each function reads its own part files and no others."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from expertmesh.checkpoint import manifest as names
from expertmesh.checkpoint.manifest import Manifest
from expertmesh.checkpoint.parts import load_part
from expertmesh.model.full import FullModel
from expertmesh.model.stages import ClassifierStage, EmbeddingStage, Expert, GatingStage

StageT = TypeVar("StageT", bound=nn.Module)


class StageLoader:
    """Loads stages of one model onto one device.

    Args:
        folder: The split model.
        device: Where the weights go.

    Raises:
        BadCheckpoint: From every method: the part is missing, damaged, or does not fit the spec.
    """

    def __init__(self, folder: Path, device: torch.device) -> None:
        self.folder = folder
        self.device = device
        self.manifest = Manifest.read(folder)
        self.spec = self.manifest.spec
        self.loaded: list[str] = []

    def embedding(self) -> EmbeddingStage:
        """The embedding."""
        return self._load(EmbeddingStage, names.embedding_part())

    def gating(self, layer: int) -> GatingStage:
        """One layer's attention and router."""
        return self._load(GatingStage, names.gating_part(layer))

    def expert(self, layer: int, expert: int) -> Expert:
        """One expert."""
        return self._load(Expert, names.expert_part(layer, expert))

    def classifier(self) -> ClassifierStage:
        """The head."""
        return self._load(ClassifierStage, names.classifier_part())

    def full_model(self) -> FullModel:
        """Every stage."""
        with torch.device("meta"):
            model = FullModel(self.spec)
        model.embedding = self.embedding()
        for layer in range(self.spec.layers):
            model.gating[layer] = self.gating(layer)
            model.experts[layer] = nn.ModuleList(
                self.expert(layer, expert) for expert in range(self.spec.router.experts)
            )
        model.classifier = self.classifier()
        return model.eval()

    def _load(self, stage: type[StageT], name: str) -> StageT:
        with torch.device("meta"):
            module = stage(self.spec)
        load_part(self.folder, self.manifest, name, module, self.device)
        self.loaded.append(name)
        return module
