"""One memory need for one set-up, whichever command names it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from kimi_mlx.cli.model_size import draft_download_bytes, draft_shape, memory_requirement, model_shape
from kimi_mlx.cli.placement import SINGLE_RANK, with_placement
from kimi_mlx.cluster.doctor.run_checks import DoctorRequest, check_hosts
from kimi_mlx.cluster.hosts.facts import Facts, HeldStore
from kimi_mlx.cluster.hosts.host import Host, Hostfile
from kimi_mlx.model.config import read_json
from kimi_mlx.planner.choice import Choice
from kimi_mlx.planner.links import RDMA
from kimi_mlx.planner.machines import parse_machines
from kimi_mlx.planner.model_shape import with_expert_bits
from kimi_mlx.planner.needs import memory_per_host
from kimi_mlx.planner.search import make_plan
from kimi_mlx.sizing.expert_memory import ALL_EXPERTS
from kimi_mlx.sizing.hosts import CONTEXT_TOKENS
from kimi_mlx.weights.conversion import open_conversion
from kimi_mlx.weights.convert import convert
from kimi_mlx.weights.convert_options import ConvertOptions
from tests.drafts import draft_config, write_draft
from tests.fakes import KIMI_MINI


@pytest.fixture(autouse=True)
def empty_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine without downloads."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("KIMI_MLX_STORES", str(tmp_path / "stores"))


@pytest.mark.parametrize("model", ["kimi-k2", "kimi-k2.6"])
@pytest.mark.parametrize("ranks", [1, 2])
def test_models_plan_and_doctor_name_one_need(model: str, ranks: int) -> None:
    shape = model_shape(model)
    choice = SINGLE_RANK if ranks == 1 else Choice("hybrid", "")
    need = with_placement(memory_requirement(model), choice, ranks)
    store = HeldStore(need.repository or "", "c", f"{choice.strategy}-{ranks}-a", 0, "f", 7)
    facts = Facts("mac", True, stores=(store,))  # the size on disk is not the need
    doctor = [need.memory_bytes(facts, [rank], ranks) for rank in range(ranks)]
    machines = parse_machines("m3-ultra-512x2")
    options = make_plan(shape, machines, [RDMA], CONTEXT_TOKENS, expert_memory=ALL_EXPERTS).options
    strategy = "single" if ranks == 1 else "hybrid"
    (planned,) = (option for option in options if option.strategy == strategy)
    assert doctor == [host.needed_bytes for host in planned.memory]
    assert max(host.needed_bytes for host in planned.memory) == memory_per_host(shape, ranks)


def test_a_draft_model_is_part_of_the_need_of_rank_0() -> None:
    draft = draft_shape("auto", "kimi-k2.6")
    facts, requirement = Facts("mac", True), memory_requirement("kimi-k2.6")
    without, drafted = (with_placement(requirement, Choice("hybrid", ""), 2, with_it) for with_it in (None, draft))
    before, after = ([need.memory_bytes(facts, [rank], 2) or 0 for rank in (0, 1)] for need in (without, drafted))
    assert after == [before[0] + draft.memory.total_bytes(CONTEXT_TOKENS), before[1]]


def test_a_draft_model_that_is_not_here_is_assumed_for_a_launch() -> None:
    assumed = draft_shape("someone/draft", "kimi-k2.6", is_assumed=True)
    assert assumed.memory == draft_shape("auto", "kimi-k2.6").memory


@pytest.mark.parametrize("has_embedding", [False, True])
def test_an_embedding_in_the_files_of_a_draft_model_is_counted(has_embedding: bool, tmp_path: Path) -> None:
    config = draft_config(read_json(KIMI_MINI / "config.json"))
    folder = write_draft(tmp_path / "draft", config, layer="layers.0.", prefix="model.", has_embedding=has_embedding)
    assert draft_shape(str(folder), "kimi-mini").has_embedding == has_embedding


def test_expert_bits_plan_what_the_conversion_makes(tmp_path: Path) -> None:
    convert(open_conversion(KIMI_MINI, ConvertOptions(expert_bits=3)), tmp_path / "converted")
    converted = model_shape(str(tmp_path / "converted"))
    assert with_expert_bits(model_shape(str(KIMI_MINI)), 3).bytes == converted.bytes


def test_a_missing_draft_model_needs_disk_space() -> None:
    assert draft_download_bytes("auto", "kimi-k2.6") == pytest.approx(3.7e9, rel=0.01)
    assert draft_download_bytes("auto", "kimi-mini") == 0
    need = replace(memory_requirement("kimi-mini"), draft_download_bytes=7)
    request = DoctorRequest(Hostfile((Host("localhost"),)), need)
    facts = Facts("localhost", True, disk_free_bytes=6, stores_folder="/stores")
    (finding,) = (finding for finding in check_hosts(request, {"localhost": facts}, {}) if finding.check == "disk")
    assert (finding.state, finding.message) == ("problem", "needs 7 B; 6 B are free for `/stores`")
