from __future__ import annotations

from pathlib import Path

import pytest

from expertmesh.checkpoint.manifest import Manifest
from expertmesh.errors import SetupError
from expertmesh.local.plan import Options, Plan, plan_mesh

FLAGS = {"--passes=1", "--micro-batches=1"}


def planned(model: Path, tmp_path: Path, **options: object) -> Plan:
    return plan_mesh(model, Manifest.read(model), tmp_path, Options(**options))  # type: ignore[arg-type]


def arguments(plan: Plan, name: str) -> set[str]:
    return set(next(process.arguments for process in plan.processes if process.name == name))


def test_where_all_share_the_cores_one_pass_is_under_way(model: Path, tmp_path: Path) -> None:
    assert arguments(planned(model, tmp_path), "gateway.0") >= FLAGS


@pytest.mark.parametrize("options", [{"devices": {"gating": "cuda:0"}}, {"simulate": {"expert": "5"}}])
def test_where_devices_are_their_own_the_gateway_finds_out(
    model: Path, tmp_path: Path, options: dict[str, object]
) -> None:
    assert not arguments(planned(model, tmp_path, **options), "gateway.0") & FLAGS


def test_what_the_environment_says_of_it_holds(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPERTMESH_PASSES", "2")
    assert arguments(planned(model, tmp_path), "gateway.0") & FLAGS == {"--micro-batches=1"}


def test_simulated_time_is_told_to_the_services_it_is_for(model: Path, tmp_path: Path) -> None:
    plan = planned(model, tmp_path, simulate={"expert": "25+100", "expert-3": "7", "gating": "5"})
    assert arguments(plan, "expert-0.0") >= {"--simulate-step-ms=25", "--simulate-row-us=100"}
    assert arguments(plan, "expert-3.0") >= {"--simulate-step-ms=7", "--simulate-row-us=0"}
    assert arguments(plan, "gating.0") >= {"--simulate-step-ms=5"}
    assert not any(argument.startswith("--simulate") for argument in arguments(plan, "classifier.0"))


def test_a_service_that_is_not_there_cannot_be_simulated(model: Path, tmp_path: Path) -> None:
    with pytest.raises(SetupError, match="no service 'oracle'"):
        planned(model, tmp_path, simulate={"oracle": "5"})
