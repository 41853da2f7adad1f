"""Zip archives damaged and hostile. Tars, in which ImageNet comes, are in `test_imagenet`."""

import struct
import zipfile
from pathlib import Path

import pytest

from gnp.data import archives
from tests.data.fake_archives import message_of, tree


def link(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.create_system, info.external_attr = 3, 0o120777 << 16
    return info


@pytest.mark.parametrize(
    "name",
    [
        "top/../../evil",
        "top/../evil",
        "../evil",
        "/evil",
        "evil",
        "other/evil",
        "top/..\\evil",
        "top/C:evil",
        link("top/link"),
    ],
)
def test_a_zip_that_leaves_its_folder_is_refused_whole(tmp_path, name):
    inside = tmp_path / "inside"
    inside.mkdir()
    path = inside / "top.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("top/good", "good")
        archive.writestr(name, "/etc/passwd")
    assert "nothing of it is used" in message_of(archives.unpack_zip, path, inside / "top")
    assert set(tree(tmp_path)) == {"inside/top.zip"}
    assert [entry.name for entry in inside.iterdir()] == ["top.zip"]


@pytest.mark.parametrize(
    "name", ["/evil", "//evil", "..", "a/../../b", "", ".", "a\\b", "c:b", "a\0b"]
)
def test_paths_that_leave_a_folder_are_known(name):
    message_of(archives._safe_parts, Path("archive"), name)


def test_a_zip_of_absurd_size_is_refused(tmp_path):
    path = tmp_path / "top.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for i in range(3):
            archive.writestr(f"top/{i}", bytes(400_000))
    message = message_of(archives.unpack_zip, path, tmp_path / "top", max_bytes=1_000_000)
    assert "would unpack to 1.2 MB" in message
    archives.unpack_zip(path, tmp_path / "top", max_bytes=1_200_000)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-50])


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[60] ^= 0xFF
    path.write_bytes(content)


def understate(path: Path) -> None:
    """Declares that the file has 10 bytes in place of 400,000."""
    content = bytearray(path.read_bytes())
    entry = content.index(b"PK\x01\x02")
    content[entry + 24 : entry + 28] = struct.pack("<I", 10)
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [cut, flip, understate])
def test_a_damaged_zip_is_told(tmp_path, damage):
    path = tmp_path / "top.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("top/file", bytes(400_000))
    damage(path)
    message = message_of(archives.unpack_zip, path, tmp_path / "top")
    assert message.startswith(f"{path} is damaged: ")
    assert [entry.name for entry in tmp_path.iterdir()] == ["top.zip"]
