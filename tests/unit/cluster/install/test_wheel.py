"""The wheel of the running kimi-mlx: contents, and installation with pip."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import os
import subprocess
import sys
import zipfile
from importlib.metadata import PackageNotFoundError, PathDistribution, distribution
from pathlib import Path

import pytest

from kimi_mlx.cluster.hosts.facts import own_interpreter
from kimi_mlx.cluster.install import wheel
from kimi_mlx.cluster.install.wheel import build_wheel, pack_wheel
from kimi_mlx.errors import InstallError


@pytest.fixture(scope="module")
def built_wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


def check_record(archive: zipfile.ZipFile) -> None:
    """Check that RECORD lists every file with its digest and size (without both for RECORD itself)."""
    (record,) = [name for name in archive.namelist() if name.endswith(".dist-info/RECORD")]
    rows = list(csv.reader(io.StringIO(archive.read(record).decode())))
    assert [row[0] for row in rows] == archive.namelist()
    for path, digest, size in rows:
        if path == record:
            assert (digest, size) == ("", "")
            continue
        data = archive.read(path)
        encoded = base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()
        assert (digest, size) == (f"sha256={encoded}", str(len(data)))


def test_wheel_has_all_files(built_wheel: Path) -> None:
    with zipfile.ZipFile(built_wheel) as archive:
        names = archive.namelist()
        check_record(archive)
        assert archive.testzip() is None
        assert (
            archive.read("kimi_mlx/cluster/hosts/facts.sh") == (wheel.PACKAGE / "cluster/hosts/facts.sh").read_bytes()
        )
    for name in ("__init__.py", "hub/catalogue.json", "models/kimi-mini/model.safetensors", "cluster/install/wheel.py"):
        assert f"kimi_mlx/{name}" in names
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]
    folder = next(name for name in names if name.endswith("/METADATA")).removesuffix("METADATA")
    assert all(name.startswith((folder, "kimi_mlx/")) for name in names)
    assert {name.removeprefix(folder) for name in names if name.startswith(folder)} == {
        "METADATA",
        "WHEEL",
        "RECORD",
        "entry_points.txt",
        "licenses/LICENSE",
    }


def test_metadata_equals_the_installed_one(built_wheel: Path) -> None:
    own = distribution("kimi-mlx")
    with zipfile.ZipFile(built_wheel) as archive:
        packed = PathDistribution(zipfile.Path(archive, f"kimi_mlx-{own.version}.dist-info/"))  # pyright: ignore[reportArgumentType]
        assert packed.requires == own.requires
        assert packed.version == own.version
        assert [(each.name, each.value) for each in packed.entry_points] == [("kimi-mlx", "kimi_mlx.__main__:main")]
    assert any(each.startswith("mlx[cpu]") and "sys_platform == 'linux'" in each for each in own.requires or [])


@pytest.mark.slow
def test_same_files_give_the_same_wheel(built_wheel: Path, tmp_path: Path) -> None:
    again = build_wheel(tmp_path)
    assert again.name == built_wheel.name
    assert again.read_bytes() == built_wheel.read_bytes()


@pytest.mark.slow
def test_pip_installs_it(built_wheel: Path, tmp_path: Path) -> None:
    pytest.importorskip("pip")  # environments of uv have no pip
    target = tmp_path / "it's a target"
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--no-compile"]
    subprocess.run([*install, "--target", str(target), str(built_wheel)], check=True, capture_output=True, cwd=tmp_path)
    program = (
        "import sys; from kimi_mlx.cluster.hosts.facts import own_interpreter as own;"
        "import kimi_mlx; print(kimi_mlx.__file__, own().packages['kimi-mlx'], own().code)"
    )
    environment = {**os.environ, "PYTHONPATH": str(target), "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    own = own_interpreter()
    assert done.stdout.strip() == f"{target}/kimi_mlx/__init__.py {own.packages['kimi-mlx']} {own.code}"
    wrapper = (target / "bin/kimi-mlx").read_text()
    assert "from kimi_mlx.__main__ import main" in wrapper


def test_comma_in_a_file_name(tmp_path: Path) -> None:
    packed = pack_wheel(tmp_path, "x_y", "1.0", {"x/a,b.txt": b"1", "x/__init__.py": b""}, {"METADATA": b"Name: x-y\n"})
    assert packed.name == "x_y-1.0-py3-none-any.whl"
    with zipfile.ZipFile(packed) as archive:
        check_record(archive)


def test_kimi_mlx_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_distribution(name: str) -> None:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(wheel, "distribution", no_distribution)
    with pytest.raises(InstallError, match="is not installed") as caught:
        build_wheel(tmp_path)
    assert caught.value.hint == "run `pip install -e .` in its folder"
