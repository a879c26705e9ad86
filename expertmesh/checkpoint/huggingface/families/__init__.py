"""The model types that can be imported, each with what its `config.json` means."""

from __future__ import annotations

from expertmesh.checkpoint.huggingface.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from expertmesh.checkpoint.huggingface.families.family import Family
from expertmesh.checkpoint.huggingface.families.glm import GLM4_MOE
from expertmesh.checkpoint.huggingface.families.gpt_oss import GPT_OSS
from expertmesh.checkpoint.huggingface.families.granite import GRANITEMOE
from expertmesh.checkpoint.huggingface.families.mixtral import MIXTRAL
from expertmesh.checkpoint.huggingface.families.olmoe import OLMOE
from expertmesh.checkpoint.huggingface.families.phimoe import PHIMOE
from expertmesh.checkpoint.huggingface.families.qwen import QWEN2_MOE, QWEN3_MOE

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        DEEPSEEK_V2,
        DEEPSEEK_V3,
        GLM4_MOE,
        GPT_OSS,
        GRANITEMOE,
        MIXTRAL,
        OLMOE,
        PHIMOE,
        QWEN2_MOE,
        QWEN3_MOE,
    )
}
